"""What each rule costs: the time of a training step with it over that without, or with Optax's.

    python benchmarks/bench_transforms.py [--quick | --all] [--json] [--write]

Models: a 20 x 128 MLP (scanned, so its layers are stacked leaves), LeNet-5 and a two-block
transformer, Adam, float32. All variants run in one process, interleaved in random order; every
ratio is of two times of one round, and the median over rounds is printed with the quartiles. Ratios
below 1 are noise, or a lucky fusion.
"""

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
from rich.console import Console
from rich.table import Table

from gradjax import transforms as gt

GOALS = {
    "watch": ("none", 1.03),
    "watch, every 10": ("none", 1.03),
    "clip_by_global_norm": ("optax.clip_by_global_norm", 1.05),
}
GOALS["watch + clip_by_global_norm"] = ("clip_by_global_norm", 1.03)


# Models: (params, loss(params, batch), batch)


def dense(key, *shape):
    return jax.random.normal(key, shape) * np.sqrt(2 / shape[-2])


def cross_entropy(logits, labels):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def mlp(key, depth=20, width=128, batch=128):
    keys = jax.random.split(key, 4)
    layers = {"w": dense(keys[0], depth, width, width), "b": jnp.zeros((depth, width))}
    params = {
        "layers": layers,
        "in": dense(keys[1], 64, width),
        "out": dense(keys[2], width, 10) * 0.1,
    }

    def loss(params, data):
        x, labels = data
        layer = lambda h, p: (jax.nn.relu(h @ p["w"] + p["b"]), None)
        h, _ = jax.lax.scan(layer, jax.nn.relu(x @ params["in"]), params["layers"])
        return cross_entropy(h @ params["out"], labels)

    return params, loss, (jax.random.normal(keys[3], (batch, 64)), jnp.arange(batch) % 10)


def patches(x, size):
    """(batch, h, w, c) -> (batch, h', w', size * size * c): a convolution as one matrix product."""
    h, w = x.shape[1] - size + 1, x.shape[2] - size + 1
    return jnp.concatenate(
        [x[:, i : i + h, j : j + w] for i in range(size) for j in range(size)], axis=-1
    )


def lenet5(key, batch=128):
    keys = jax.random.split(key, 6)
    shapes = {
        "conv1": (25, 6),
        "conv2": (150, 16),
        "dense1": (256, 120),
        "dense2": (120, 84),
        "dense3": (84, 10),
    }
    params = {
        n: {"w": dense(k, *s), "b": jnp.zeros(s[-1])}
        for k, (n, s) in zip(keys[:-1], shapes.items(), strict=True)
    }
    affine = lambda p, x: x @ p["w"] + p["b"]
    pool = lambda x: x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).mean((2, 4))

    def loss(params, data):
        x, labels = data
        for name in ("conv1", "conv2"):
            x = pool(jnp.tanh(affine(params[name], patches(x, 5))))
        x = x.reshape(x.shape[0], -1)
        x = jnp.tanh(affine(params["dense1"], x))
        return cross_entropy(
            affine(params["dense3"], jnp.tanh(affine(params["dense2"], x))), labels
        )

    return params, loss, (jax.random.normal(keys[-1], (batch, 28, 28, 1)), jnp.arange(batch) % 10)


def transformer(key, depth=2, width=64, heads=4, seq_len=64, batch=16, vocabulary=65):
    keys = iter(jax.random.split(key, 4 * depth + 3))
    block = lambda: {
        "qkv": dense(next(keys), width, 3 * width),
        "out": dense(next(keys), width, width),
        "up": dense(next(keys), width, 4 * width),
        "down": dense(next(keys), 4 * width, width),
        "scale1": jnp.ones(width),
        "scale2": jnp.ones(width),
    }
    params = {f"block{i}": block() for i in range(depth)}
    params |= {
        "embed": 0.1 * dense(next(keys), vocabulary, width),
        "read": dense(next(keys), width, vocabulary),
    }
    norm = lambda x, scale: (
        scale * x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    )
    mask = jnp.where(jnp.tril(jnp.ones((seq_len, seq_len), bool)), 0.0, -1e9)

    def loss(params, tokens):
        x = params["embed"][tokens[:, :-1]]
        for i in range(depth):
            p = params[f"block{i}"]
            qkv = (norm(x, p["scale1"]) @ p["qkv"]).reshape(*x.shape[:2], 3, heads, -1)
            q, k, v = (qkv[:, :, j].swapaxes(1, 2) for j in range(3))
            weights = jax.nn.softmax(q @ k.swapaxes(2, 3) / np.sqrt(width / heads) + mask)
            x = x + (weights @ v).swapaxes(1, 2).reshape(x.shape) @ p["out"]
            x = x + jax.nn.gelu(norm(x, p["scale2"]) @ p["up"]) @ p["down"]
        return cross_entropy(x @ params["read"], tokens[:, 1:])

    return params, loss, jax.random.randint(next(keys), (batch, seq_len + 1), 0, vocabulary)


MODELS = {
    "MLP 20x128": (mlp, 20),
    "LeNet-5": (lenet5, 20),
    "transformer": (transformer, 8),
}  # steps per scan


# Variants


def variants(quick):
    """name -> (transform, the nearest of Optax or None)."""
    stacked = lambda path: "layers" in path
    adam = optax.adam(1e-4)
    before = lambda rule: optax.chain(rule, adam)
    found = {
        "none": (adam, None),
        "optax.clip_by_global_norm": (before(optax.clip_by_global_norm(1.0)), None),
        "clip_by_global_norm": (before(gt.clip_by_global_norm(1.0)), "optax.clip_by_global_norm"),
        "watch": (gt.watch(adam, stacked), None),
        "watch, every 10": (gt.watch(adam, stacked, every=10), None),
        "watch + clip_by_global_norm": (
            gt.watch(before(gt.clip_by_global_norm(1.0)), stacked),
            None,
        ),
        "optax.apply_if_finite": (optax.apply_if_finite(adam, 5), None),
        "skip_non_finite": (gt.skip_non_finite(adam), "optax.apply_if_finite"),
    }
    if quick:
        return found
    return found | {
        "optax.clip": (before(optax.clip(0.1)), None),
        "clip": (before(gt.clip(0.1)), "optax.clip"),
        "optax.clip_by_block_rms": (before(optax.clip_by_block_rms(0.1)), None),
        "clip_by_block_rms": (
            before(gt.clip_by_block_rms(0.1, stacked)),
            "optax.clip_by_block_rms",
        ),
        "clip_by_layer_norm": (
            before(gt.clip_by_layer_norm(0.1, stacked)),
            "optax.clip_by_block_rms",
        ),
        "optax.adaptive_grad_clip": (before(optax.adaptive_grad_clip(0.01)), None),
        "adaptive_grad_clip": (
            before(gt.adaptive_grad_clip(0.01, stacked=stacked)),
            "optax.adaptive_grad_clip",
        ),
        "autoclip": (before(gt.autoclip(10.0)), "optax.clip_by_global_norm"),
        "zclip": (before(gt.zclip()), "optax.clip_by_global_norm"),
        "adagc": (before(gt.adagc(stacked=stacked)), "optax.clip_by_block_rms"),
        "spam": (gt.spam(adam), None),
        "skip_spikes": (gt.skip_spikes(adam), "optax.apply_if_finite"),
        "freeze_diverged": (gt.freeze_diverged(adam), "optax.apply_if_finite"),
        "restore_moments": (gt.restore_moments(adam), None),
        "weight_clip": (optax.chain(adam, gt.weight_clip(1.0)), None),
        "max_norm": (optax.chain(adam, gt.max_norm(3.0, stacked)), None),
        "spectral_norm": (optax.chain(adam, gt.spectral_norm(2.0, stacked=stacked)), None),
    }


def program(tx, loss, num_steps):
    """(params, state, data) -> the same after `num_steps` steps on one batch."""

    def run(params, state, data):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, data)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, state), None, length=num_steps)

    return jax.jit(run)


def measure(model, rounds, quick, rng):
    """name -> times, one per round."""
    make, num_steps = MODELS[model]
    params, loss, data = make(jax.random.key(0))
    calls = {}
    for name, (tx, _) in variants(quick).items():
        run, state = program(tx, loss, num_steps), jax.jit(tx.init)(params)
        jax.block_until_ready(run(params, state, data))
        calls[name] = (run, state)
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name in rng.permutation(list(calls)):
            run, state = calls[name]
            start = time.perf_counter()
            jax.block_until_ready(run(params, state, data))
            times[name].append((time.perf_counter() - start) / num_steps)
    return times


def rows(times, quick):
    found = []
    for name, (_, peer) in variants(quick).items():
        over, goal = GOALS.get(name, (None, None))
        row = {
            "rule": name,
            "ms_per_step": 1e3 * statistics.median(times[name]),
            "over_none": report.ratio(times[name], times["none"]),
        }
        row |= {
            "peer": peer,
            "over_peer": report.ratio(times[name], times.get(peer)),
            "goal": goal,
            "goal_over": over,
        }
        row["measured"] = None if goal is None else report.ratio(times[name], times[over])
        row["reached"] = None if goal is None else row["measured"]["median"] <= goal
        found.append(row)
    return found


def in_words(row):
    return f"{row['measured']['median']:.3f} of {row['goal']} over {row['goal_over']}"


def show(model, found, console):
    table = Table(title=f"{model}: time of a training step")
    for column in ("rule", "ms", "over none", "over Optax's nearest", "goal"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    text = lambda r: f"{r['median']:.3f} [{r['low']:.2f}, {r['high']:.2f}]" if r else ""
    for row in found:
        goal = ""
        if row["goal"]:
            verdict = "[green]reached[/]" if row["reached"] else "[red]missed[/]"
            goal = f"{in_words(row)}: {verdict}"
        over_peer = ""
        if row["peer"]:
            over_peer = f"{text(row['over_peer'])} {row['peer'].removeprefix('optax.')}"
        cells = (f"{row['ms_per_step']:.2f}", text(row["over_none"]), over_peer, goal)
        table.add_row(row["rule"], *cells)
    console.print(table)


def write(result, about):
    """Put the tables between this benchmark's markers in RESULTS.md."""
    text = ["## Training step with each rule\n", report.in_words(about) + ". Ratios of times"]
    text[-1] += " of one round: median [quartiles]. A load above the number of cores means that"
    text[-1] += " other work ran beside it.\n"
    cell = report.text
    for model, found in result.items():
        text += [
            f"**{model}**\n",
            "| rule | ms | over none | over Optax's nearest | goal |",
            "|---|---|---|---|---|",
        ]
        for row in found:
            goal = peer = ""
            if row["peer"]:
                peer = f"{cell(row['over_peer'])} {row['peer']}"
            if row["goal"]:
                goal = f"{in_words(row)}: {'yes' if row['reached'] else '**no**'}"
            cells = (row["rule"], f"{row['ms_per_step']:.2f}", cell(row["over_none"]), peer, goal)
            text.append(f"| {' | '.join(cells)} |")
        text.append("")
    report.write("bench_transforms", text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="only the rules with a goal, fewer rounds"
    )
    parser.add_argument(
        "--all", action="store_true", help="every rule on every model (else on the MLP)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of tables"
    )
    parser.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    parser.add_argument("--rounds", type=int, default=0, help="rounds per model")
    parser.add_argument("--model", choices=MODELS, default=None)
    args = parser.parse_args()
    rounds = args.rounds or (15 if args.quick else 11)
    console, rng, result = Console(width=130), np.random.default_rng(0), {}
    for model in [args.model] if args.model else MODELS:
        quick = args.quick or not (args.all or args.model or model == "MLP 20x128")
        result[model] = rows(measure(model, rounds, quick, rng), quick)
        if not args.json:
            show(model, result[model], console)
    about = report.machine(rounds=rounds, optax=optax.__version__)
    if args.json:
        print(json.dumps(about | {"models": result}, indent=1))
    if args.write:
        write(result, about)


if __name__ == "__main__":
    main()
