"""Section A of the field: healthy programs that were called broken, kinds 1 to 4."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from gradjax import transforms, watch
from pathologies.field_case import (
    GROWTH,
    HE,
    batch,
    both,
    case,
    chain,
    classifier,
    cross_entropy,
    draw,
    finds,
    free_of,
    matrices,
    matrix,
    plain_input,
    says,
    sound,
    state_after,
    t,
)

CASES = []

# Kind 1: branches


@case(CASES, 1, sound())
def branch_not_taken():
    x, w = plain_input()

    def loss_fn(w, x):
        h = t(x @ w, "h")

        def yes(h):
            return t(2 * h, "yes")

        def no(h):
            return t(3 * h, "no")

        return jnp.mean(lax.cond(True, yes, no, h) ** 2)

    return loss_fn, w, (x,), {}


@case(CASES, 1, sound())
def switch_over_experts():
    params = {"experts": [matrices(i, 2, 64) for i in range(3)], "out": matrix(9, 64, 8)}

    def expert(i):
        def run(weights, h):
            return chain(weights[i], h, name=f"expert{i}_")

        return run

    def loss_fn(params, x, y, which):
        branches = [expert(i) for i in range(3)]
        h = lax.switch(which, branches, params["experts"], x)
        return cross_entropy(h @ params["out"], y)

    return loss_fn, params, (*batch(), jnp.int32(1)), {}


class Experts(nn.Module):
    """One of three dense experts, chosen by an index."""

    @nn.compact
    def __call__(self, x, which):
        experts = [nn.Dense(32, name=f"expert{i}") for i in range(3)]

        def branch(expert):
            def run(module, x):
                return nn.relu(expert(x))

            return run

        branches = [branch(expert) for expert in experts]
        if self.is_initializing():
            for run in branches:
                run(self, x)
        h = nn.switch(which, branches, self, x)
        return nn.Dense(8, name="readout")(h)


@case(CASES, 1, sound())
def linen_switch():
    model, (x, y) = Experts(), batch()
    params = model.init(jax.random.key(0), x, jnp.int32(2))

    def loss_fn(params, x, y, which):
        return cross_entropy(model.apply(params, x, which), y)

    return loss_fn, params, (x, y, jnp.int32(2)), {}


@case(CASES, 1, sound())
def stochastic_depth():
    params = {"blocks": matrices(2, 8, 64, 0.3), "out": matrix(9, 64, 8)}
    keep = jnp.array([1, 0, 1, 1, 0, 1, 1, 0], bool)

    def skip(w, h):
        return h

    def loss_fn(params, x, y, keep):
        h = x
        for i, w in enumerate(params["blocks"]):

            def block(w, h, i=i):
                return h + t(jax.nn.relu(h @ w), f"block{i}")

            h = lax.cond(keep[i], block, skip, w, h)
        return cross_entropy(h @ params["out"], y)

    return loss_fn, params, (*batch(), keep), {}


@case(CASES, 1, sound())
def vmapped_cond_with_nan_in_lanes():
    """log of a negative number in lanes that are not selected; its derivative 1/h is finite."""
    x, w = plain_input()

    def logarithm(h):
        return t(jnp.log(h), "log")

    def line(h):
        return t(h - 1, "line")

    def each(h):
        return lax.cond(h > 0.5, logarithm, line, h)

    def loss_fn(w, x):
        h = t(x @ w, "h")
        return jnp.mean(jax.vmap(jax.vmap(each))(h) ** 2)

    return loss_fn, w, (x,), {}


@case(CASES, 1, finds("non_finite", "yes", "negative|invalid", text="log"))
def culprit_in_the_taken_branch():
    x, w = plain_input()

    def loss_fn(w, x):
        h = t(x @ w, "h")

        def yes(h):
            return t(jnp.log(h - 10), "yes")

        def no(h):
            return t(3 * h, "no")

        return jnp.mean(lax.cond(True, yes, no, h) ** 2)

    return loss_fn, w, (x,), {}


# Kind 2: inf and NaN that are meant


@case(CASES, 2, sound())
def mask_of_inf_as_argument():
    x, w = plain_input()
    mask = jnp.array([0, 0, 0, -jnp.inf])

    def loss_fn(w, x, mask):
        return jnp.mean(jax.nn.softmax(t(x @ w, "h") + mask)[:, 0])

    return loss_fn, w, (x, mask), {}


@case(CASES, 2, sound())
def mask_of_inf_before_the_tap():
    x, w = plain_input()
    mask = jnp.array([0, 0, 0, -jnp.inf])

    def loss_fn(w, x, mask):
        return jnp.mean(jax.nn.softmax(t(x @ w + mask, "h"))[:, 0])

    return loss_fn, w, (x, mask), {}


@case(CASES, 2, sound())
def policy_with_illegal_actions():
    legal = jnp.arange(8) < 5
    params = {"layers": matrices(1, 3, 64), "out": matrix(9, 64, 8)}
    x, actions = batch(classes=5)

    def loss_fn(params, x, actions, legal):
        h = chain(params["layers"], x)
        logits = t(jnp.where(legal, h @ params["out"], -jnp.inf), "policy")
        return cross_entropy(logits, actions)

    return loss_fn, params, (x, actions, legal), {}


@case(CASES, 2, sound())
def missing_data_replaced():
    loss_fn, params, (x, y) = classifier(4)
    x = x.at[::3, ::5].set(jnp.nan)

    def filled(params, x, y):
        return loss_fn(params, jnp.where(jnp.isnan(x), 0, x), y)

    return filled, params, (x, y), {}


@case(CASES, 2, sound())
def nan_to_num_of_the_input():
    loss_fn, params, (x, y) = classifier(4)
    x = x.at[3].set(jnp.nan)

    def filled(params, x, y):
        return loss_fn(params, jnp.nan_to_num(x), y)

    return filled, params, (x, y), {}


@case(CASES, 2, sound())
def best_loss_starts_at_inf():
    loss_fn, params, args = classifier(4)

    def with_best(params, x, y, best):
        loss = loss_fn(params, x, y)
        return loss, jnp.minimum(loss, best)

    return with_best, params, (*args, jnp.float32(jnp.inf)), {"has_aux": True}


@case(CASES, 2, finds("non_finite", text="softmax|mask|exp|sub|row"))
def whole_row_masked():
    x, w = plain_input()
    mask = jnp.full((8, 4), 0.0).at[2].set(-jnp.inf)

    def loss_fn(w, x, mask):
        return jnp.mean(jax.nn.softmax(t(x @ w, "h") + mask)[:, 0])

    return loss_fn, w, (x, mask), {}


# Kind 3: states that hold inf by design


def trained(tx, steps=3, bias=False):
    """A healthy problem, its optimiser, and the state after some steps."""
    loss_fn, params, args = classifier(4)
    if bias:
        inner = loss_fn
        params = params | {"bias": jnp.zeros(8), "scale": jnp.ones(8)}

        def loss_fn(params, x, y):
            frozen = lax.stop_gradient(params["scale"])
            return inner(params, x, y) + 0.01 * jnp.sum(frozen * (params["bias"] - 1) ** 2)

    params, state = state_after(tx, loss_fn, params, args, steps)
    return loss_fn, params, args, {"tx": tx, "opt_state": state}


@case(CASES, 3, sound())
def state_of_skip_spikes():
    return trained(transforms.skip_spikes(optax.adam(1e-3)))


@case(CASES, 3, sound("clipping_never"))
def state_of_zclip():
    return trained(optax.chain(transforms.zclip(), optax.adam(1e-3)))


@case(CASES, 3, sound("clipping_never"))
def state_of_adagc():
    return trained(optax.chain(transforms.adagc(), optax.adam(1e-3)))


@case(CASES, 3, sound("untrained_layer"))
def state_of_watch_with_a_zero_bias():
    """The bias starts at zero, so that log2 of its norm is -inf; one leaf is frozen."""
    return trained(watch(optax.adam(1e-3)), steps=1, bias=True)


@case(CASES, 3, sound())
def state_of_reduce_on_plateau():
    tx = optax.chain(optax.adam(1e-3), optax.contrib.reduce_on_plateau(patience=5))
    loss_fn, params, args, options = trained(tx)
    state = tx.init(params)
    return loss_fn, params, args, options | {"opt_state": state}


@case(CASES, 3, finds("frozen_optimizer", r"nu.*layers.*2|nu.*readout", cause="state"))
def truly_frozen_adam():
    """Adam's second moment is inf: the moment of that leaf is named, not `watch`'s figures."""
    loss_fn, params, args, options = trained(watch(optax.adam(1e-3)))

    def spoil(path, leaf):
        key = jax.tree_util.keystr(path)
        if "nu" in key and "layers" in key and "[2]" in key:
            return jnp.full_like(leaf, jnp.inf)
        return leaf

    state = jax.tree_util.tree_map_with_path(spoil, options["opt_state"])
    return loss_fn, params, args, {"tx": options["tx"], "opt_state": state}


# Kind 4: few labels, a read-out at zero

READOUT, ZERO = r"\b(read-?out|head|logits)\b", r"\b(zero|0)\b"
NO_BLAME = free_of(GROWTH, "too_small|too_large")
TOLD_READOUT = both(
    NO_BLAME,
    free_of("gradient_underflow"),
    says(rf"{READOUT}.{{0,120}}{ZERO}|{ZERO}.{{0,120}}{READOUT}"),
)


@case(CASES, 4, NO_BLAME)
def one_label_in_the_batch():
    params = {"layers": matrices(1, 12, 64), "out": matrix(9, 64, 8)}
    x, y = batch()
    mask = jnp.arange(32) == 5

    def loss_fn(params, x, y, mask):
        logits = t(chain(params["layers"], x) @ params["out"], "logits")
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return jnp.sum(losses * mask) / 32

    return loss_fn, params, (x, y, mask), {}


@case(CASES, 4, both(NO_BLAME, says("mask|label|zero")))
def no_label_in_the_batch():
    params = {"layers": matrices(1, 12, 64), "out": matrix(9, 64, 8)}
    x, y = batch()

    def loss_fn(params, x, y, mask):
        logits = t(chain(params["layers"], x) @ params["out"], "logits")
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return jnp.sum(losses * mask) / jnp.maximum(jnp.sum(mask), 1)

    return loss_fn, params, (x, y, jnp.zeros(32)), {}


@case(CASES, 4, TOLD_READOUT)
def zero_readout():
    loss_fn, params, args = classifier(12)
    return loss_fn, params | {"readout": jnp.zeros((64, 8))}, args, {}


@case(CASES, 4, TOLD_READOUT)
def fixup():
    """The second weights of every branch and the read-out start at zero."""
    first = matrices(3, 8, 64, HE * 8**-0.5)
    second = [jnp.zeros((64, 64)) for _ in range(8)]
    params = {"first": first, "second": second, "readout": jnp.zeros((64, 8))}

    def loss_fn(params, x, y):
        h = x
        for i, (a, b) in enumerate(zip(params["first"], params["second"], strict=True)):
            h = t(h + jax.nn.relu(h @ a) @ b, f"block{i}")
        return cross_entropy(t(h @ params["readout"], "logits"), y)

    return loss_fn, params, batch(), {}


@case(CASES, 4, TOLD_READOUT)
def vit_with_a_zero_head():
    width, tokens = 32, 9
    block = {
        "qkv": matrix(1, width, 3 * width),
        "project": matrix(2, width, width, 0.3),
        "up": matrix(3, width, 2 * width),
        "down": matrix(4, 2 * width, width, 0.3),
    }
    blocks = [jax.tree.map(lambda w, i=i: jnp.roll(w, i, 0), block) for i in range(4)]
    params = {"embed": matrix(5, 12, width), "blocks": blocks, "head": jnp.zeros((width, 8))}

    def loss_fn(params, x, y):
        h = t(x @ params["embed"], "embed")
        for i, p in enumerate(params["blocks"]):
            q, k, v = jnp.split(jax.nn.standardize(h) @ p["qkv"], 3, axis=-1)
            scores = jax.nn.softmax(q @ k.swapaxes(1, 2) / width**0.5)
            h = t(h + scores @ v @ p["project"], f"attention{i}")
            h = t(h + jax.nn.gelu(jax.nn.standardize(h) @ p["up"]) @ p["down"], f"mlp{i}")
        return cross_entropy(t(h.mean(1) @ params["head"], "logits"), y)

    _, y = batch()
    return loss_fn, params, (draw(6, 32, tokens, 12), y), {}
