"""What the search for inf and NaN costs: `find_nonfinite` over compiling and running one gradient.

    python benchmarks/bench_nonfinite.py [--quick] [--json] [--write]

The model is a transformer of 12 blocks and width 256, written out, with a failure in the middle:
in the forward pass, in the backward pass only, in the optimiser's step; and without one. All
compiled programs are dropped before every measurement, so that each pays for its own compilation.
The two alternate in one process; a ratio is of two times of one round. A user's own program is not
touched before something failed, so that there is no other cost.
"""

import os
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax
import report

from gradjax import find_nonfinite

GOAL = 3.0
BATCH, TOKENS, WIDTH, HEADS, WORDS = 4, 64, 256, 8, 1000
FAILURES = ("forward", "backward", "optimizer", "none")


def normalise(x, gain):
    mean = x.mean(-1, keepdims=True)
    variance = jnp.mean((x - mean) ** 2, -1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 1e-5) * gain


def attend(x, block):
    def heads(y):
        return y.reshape(BATCH, TOKENS, HEADS, WIDTH // HEADS).swapaxes(1, 2)

    q, k, v = (heads(y) for y in jnp.split(x @ block["qkv"], 3, -1))
    scores = q @ k.swapaxes(2, 3) / jnp.sqrt(WIDTH / HEADS)
    causal = jnp.tril(jnp.ones((TOKENS, TOKENS), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
    return (weights @ v).swapaxes(1, 2).reshape(x.shape) @ block["out"]


def transformer(depth, failure):
    """(loss, parameters, tokens), with a failure in the middle block."""

    def loss(params, tokens):
        x = params["words"][tokens]
        for i, block in enumerate(params["blocks"]):
            x = x + attend(normalise(x, block["gain"]), block)
            x = x + jax.nn.gelu(normalise(x, block["gain"]) @ block["up"]) @ block["down"]
            if i == depth // 2 and failure == "forward":
                x = x + jnp.log(jnp.abs(x) * 0)
            if i == depth // 2 and failure == "backward":
                x = x + jnp.sqrt(jnp.abs(x) * 0)
        logits = x @ params["words"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

    def normal(key, *shape):
        return jax.random.normal(key, shape) * shape[0] ** -0.5

    def block(key):
        keys = jax.random.split(key, 4)
        shapes = {
            "qkv": (WIDTH, 3 * WIDTH),
            "out": (WIDTH, WIDTH),
            "up": (WIDTH, 4 * WIDTH),
            "down": (4 * WIDTH, WIDTH),
        }
        weights = {n: normal(k, *s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
        return weights | {"gain": jnp.ones(WIDTH)}

    first, *keys = jax.random.split(jax.random.key(0), depth + 1)
    words = 0.02 * jax.random.normal(first, (WORDS, WIDTH))
    params = {"words": words, "blocks": [block(key) for key in keys], "unused": jnp.zeros(WIDTH)}
    tokens = jax.random.randint(jax.random.key(1), (BATCH, TOKENS), 0, WORDS)
    return loss, params, tokens


def measure(failure, depth, rounds):
    """Ratios of time and of processor time of the search over those of a gradient."""
    loss, params, tokens = transformer(depth, failure)
    # The gradient of a parameter that is not used is 0, and its update 0 / 0.
    tx = {"optimizer": optax.adam(1e-3, eps=0.0)}.get(failure)

    def gradient():
        jax.block_until_ready(jax.jit(jax.value_and_grad(loss))(params, tokens))

    def search():
        found = find_nonfinite(loss, params, tokens, tx=tx)
        assert bool(found) == (failure != "none"), str(found)

    ratios = []
    for _ in range(rounds):
        both = []
        for f in (gradient, search):
            jax.clear_caches()
            began = time.perf_counter(), time.process_time()
            f()
            both.append((time.perf_counter() - began[0], time.process_time() - began[1]))
        ratios.append([s / g for g, s in zip(*both, strict=True)])
    wall, processor = (sorted(each)[rounds // 2] for each in zip(*ratios, strict=True))
    return wall, processor


def main():
    options = report.parser(__doc__, "4 blocks, one round").parse_args()
    depth, rounds = (4, 1) if options.quick else (12, 3)
    began, rows = time.time(), []
    for failure in FAILURES:
        wall, processor = measure(failure, depth, rounds)
        what = f"failure: {failure}"
        rows.append(report.row(what, wall, GOAL, "", "gradients compiled and run"))
        rows.append(report.row(f"{what}, processor time", processor, None, "", "gradients"))
    title = "The search for inf and NaN"
    said = f"`python benchmarks/bench_nonfinite.py`: a transformer of {depth} blocks, width {WIDTH}"
    report.finish("bench_nonfinite", title, said, rows, began, options)


if __name__ == "__main__":
    main()
