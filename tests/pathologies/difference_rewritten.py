"""Pairs that differ by rounding from the start, because one is a rewrite, and then by a mistake."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from gradjax import tap
from pathologies.difference_case import (
    Pair,
    log_likelihood,
    mean_square,
    normal,
    planted,
    projections,
    weights,
)

PAIRS: list[Pair] = []
differs = functools.partial(planted, PAIRS)


@differs("scores")
def fused_projections_and_no_scale():
    def reference(params, x):
        q, k, v = (tap(x @ w, name) for w, name in zip(params["qkv"], "qkv", strict=True))
        scores = tap(q @ k.T / 8**0.5, "scores")  # <- a
        return jnp.sum(tap(jax.nn.softmax(scores) @ v, "mixed") ** 2)

    def rewrite(params, x):
        fused = x @ jnp.concatenate(list(params["qkv"]), axis=1)
        q, k, v = (tap(z, name) for z, name in zip(jnp.split(fused, 3, axis=1), "qkv", strict=True))
        scores = tap(q @ k.T, "scores")  # <- b
        return jnp.sum(tap(jax.nn.softmax(scores) @ v, "mixed") ** 2)

    params = {"qkv": weights(0, 3, 8, 8)}
    return reference, params, rewrite, params, (normal(1, 6, 8),)


@differs("normed")
def unrolled_layers_and_another_eps():
    def reference(params, x, y):
        def layer(h, w):
            return h + jnp.tanh(h @ w), None

        h = tap(x @ params["in"], "embedded")
        h, _ = lax.scan(layer, h, params["layers"])
        h = tap(0.1 * h, "encoded")
        h = h * lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6)  # <- a
        return mean_square(tap(h, "normed"), y)

    def rewrite(params, x, y):
        h = tap(x @ params["in"], "embedded")
        for w in params["layers"]:
            h = h + jnp.tanh(h @ w)
        h = tap(0.1 * h, "encoded")
        h = h * lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-4)  # <- b
        return mean_square(tap(h, "normed"), y)

    params = {"in": weights(0, 8, 8), "layers": weights(1, 6, 8, 8)}
    return reference, params, rewrite, params, (normal(2, 4, 8), normal(3, 4, 8))


@differs("active")
def bracketed_products_and_gelu_by_tanh():
    def reference(params, x, y):
        for i, (down, up) in enumerate(params["layers"]):
            x = tap(x + (jnp.tanh(x) @ down) @ up, f"layer{i}")
        x = tap(jax.nn.gelu(x, approximate=False), "active")  # <- a
        return mean_square(x @ params["out"], y)

    def rewrite(params, x, y):
        for i, (down, up) in enumerate(params["layers"]):
            x = tap(x + jnp.tanh(x) @ (down @ up), f"layer{i}")
        x = tap(jax.nn.gelu(x), "active")  # <- b
        return mean_square(x @ params["out"], y)

    layers = [(weights(i, 16, 4), weights(i + 10, 4, 16)) for i in range(6)]
    params = {"layers": layers, "out": weights(20, 16, 4)}
    return reference, params, rewrite, params, (normal(21, 4, 16), normal(22, 4, 4))


@differs("pooled")
def convolution_by_shifts_and_average_of_the_padding():
    def reference(params, x, y):
        layout = ("NWC", "WIO", "NWC")
        h = lax.conv_general_dilated(x, params["kernel"], (1,), "SAME", dimension_numbers=layout)
        h = jnp.pad(tap(jax.nn.relu(h), "conv"), ((0, 0), (1, 1), (0, 0)))
        pooled = (h[:, :-2] + h[:, 1:-1] + h[:, 2:]) / 3.0  # <- a
        return mean_square(tap(pooled, "pooled"), y)

    def rewrite(params, x, y):
        padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
        h = sum(padded[:, i : i + 8] @ params["kernel"][i] for i in range(3))
        h = jnp.pad(tap(jax.nn.relu(h), "conv"), ((0, 0), (1, 1), (0, 0)))
        count = jnp.full((1, 8, 1), 3.0).at[:, jnp.array([0, 7])].set(2.0)
        pooled = (h[:, :-2] + h[:, 1:-1] + h[:, 2:]) / count  # <- b
        return mean_square(tap(pooled, "pooled"), y)

    params = {"kernel": 0.4 * normal(0, 3, 4, 6)}
    return reference, params, rewrite, params, (normal(1, 2, 8, 4), normal(2, 2, 8, 6))


@differs("out")
def parallel_recurrence_and_a_dropped_bias():
    def reference(params, x, y):
        def step(h, u):
            h = jax.nn.sigmoid(params["decay"]) * h + u
            return h, h

        _, states = lax.scan(step, jnp.zeros(8), x)
        states = tap(states, "states")
        out = tap(states @ params["out"] + params["bias"], "out")  # <- a
        return mean_square(out, y)

    def combine(left, right):
        return left[0] * right[0], left[1] * right[0] + right[1]

    def rewrite(params, x, y):
        decay = jnp.broadcast_to(jax.nn.sigmoid(params["decay"])[None], x.shape)
        _, states = lax.associative_scan(combine, (decay, x))
        states = tap(states, "states")
        out = tap(states @ params["out"], "out")
        return mean_square(out, y)

    params = {"decay": normal(0, 8), "out": weights(1, 8, 4), "bias": 0.1 * normal(2, 1, 4)}
    return reference, params, rewrite, params, (normal(3, 8, 8), normal(4, 8, 4))


@differs("Dense_1")
def two_pass_variance_and_another_slope():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm()(nn.Dense(16)(x))
            x = nn.leaky_relu(x)  # <- a
            return nn.Dense(4)(x)

    def reference(params, x, labels):
        return -jnp.mean(log_likelihood(Net().apply(params, x), labels))

    def rewrite(params, x, labels):
        h = tap(jnp.einsum("nd,de->ne", x, params["w0"]), "dense0")
        centred = h - jnp.sum(h, axis=-1, keepdims=True) / 16
        variance = jnp.einsum("nd,nd->n", centred, centred)[:, None] / 16
        h = tap(centred / jnp.sqrt(variance + 1e-6), "norm")
        h = jnp.where(h > 0.0, h, 0.02 * h)  # <- b
        logits = tap(h @ params["w1"], "dense1")
        return -jnp.mean(log_likelihood(logits, labels))

    x = normal(0, 6, 8)
    params = Net().init(jax.random.key(1), x)
    ported = {f"w{i}": params["params"][f"Dense_{i}"]["kernel"] for i in (0, 1)}
    names = {"Dense_0": "dense0", "LayerNorm_0": "norm", "Dense_1": "dense1"}
    return reference, params, rewrite, ported, (x, jnp.arange(6) % 4), {"names": names}


@differs("", "loss")
def log_sum_exp_by_hand_and_a_smoothed_label():
    def reference(params, x, labels):
        logits = tap(x @ params["w"], "logits")
        log_z = tap(jax.nn.logsumexp(logits, axis=-1), "log_z")
        picked = tap(logits[jnp.arange(8), labels], "picked")
        return jnp.mean(log_z - picked)  # <- a

    def rewrite(params, x, labels):
        logits = tap(x @ params["w"], "logits")
        log_z = tap(jnp.log(jnp.sum(jnp.exp(logits), axis=-1)), "log_z")
        picked = tap(jnp.sum(logits * jax.nn.one_hot(labels, 8), axis=-1), "picked")
        return jnp.mean(log_z - 0.99 * picked - 0.01 * jnp.mean(logits, axis=-1))  # <- b

    params = projections(0, "w", 8)
    return reference, params, rewrite, params, (2.0 * normal(1, 8, 8), jnp.arange(8))


@differs("h0", "cotangent")
def two_hand_written_rules_of_which_one_is_wrong():
    @jax.custom_vjp
    def swish(x):
        return x * jax.nn.sigmoid(x)

    def forward(x):
        return swish(x), x

    def backward(x, g):
        s = jax.nn.sigmoid(x)
        return (g * (s + x * s * (1.0 - s)),)

    swish.defvjp(forward, backward)

    @jax.custom_vjp
    def tanh(x):
        return jnp.tanh(x)

    def tanh_forward(x):
        return jnp.tanh(x), x

    def tanh_backward(x, g):
        return (g * (1.0 - x**2),)  # <- b

    tanh.defvjp(tanh_forward, tanh_backward)

    def reference(params, x, y):
        h = tap(x @ params["w0"], "h0")
        h = tap(jnp.tanh(h), "bounded")  # <- a
        h = tap(h @ params["w1"], "h1")
        h = tap(h * jax.nn.sigmoid(h), "active")
        return mean_square(h @ params["w2"], y)

    def rewrite(params, x, y):
        h = tap(x @ params["w0"], "h0")
        h = tap(tanh(h), "bounded")
        h = tap(h @ params["w1"], "h1")
        h = tap(swish(h), "active")
        return mean_square(h @ params["w2"], y)

    params = projections(0, "w0 w1 w2", 8)
    return reference, params, rewrite, params, (normal(3, 4, 8), normal(4, 4, 8))


@differs("normed")
def sums_in_bfloat16_and_a_missing_square_root():
    def reference(params, x, y):
        h = tap(x.astype(jnp.bfloat16) @ params["in"], "h")
        power = tap(jnp.mean(h**2, axis=-1, keepdims=True), "power")
        h = tap(h * lax.rsqrt(power + 1e-3), "normed")  # <- a
        return mean_square((h @ params["out"]).astype(jnp.float32), y)

    def rewrite(params, x, y):
        x = x.astype(jnp.bfloat16)
        h = tap(x[:, :16] @ params["in"][:16] + x[:, 16:] @ params["in"][16:], "h")
        power = tap(jnp.mean(h**2, axis=-1, keepdims=True), "power")
        h = tap(h / (power + 1e-3), "normed")  # <- b
        return mean_square((h @ params["out"]).astype(jnp.float32), y)

    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), projections(0, "in out", 32))
    return reference, params, rewrite, params, (2.0 * normal(2, 4, 32), normal(3, 4, 32))


@differs("layers[2]")
def batched_equinox_and_a_transposed_weight():
    def loss_a(model, x, y):
        return mean_square(jax.vmap(model)(x), y)  # <- a

    def loss_b(params, x, y):
        (w0, b0), (w1, b1), (w2, b2) = params
        h = tap(x @ w0.T + b0[None], "h0")
        h = tap(jax.nn.relu(h) @ w1.T + b1[None], "h1")
        h = tap(jax.nn.relu(h) @ w2 + b2[None], "h2")  # <- b
        return mean_square(h, y)

    model = eqx.nn.MLP(16, 16, 16, 2, key=jax.random.key(0))
    params = [(layer.weight, layer.bias) for layer in model.layers]
    names = {f"layers[{i}]": f"h{i}" for i in range(3)}
    args = (normal(1, 5, 16), normal(2, 5, 16))
    return loss_a, model, loss_b, params, args, {"names": names}


@differs("weights")
def bracketed_scores_and_a_mask_of_a_window():
    def reference(params, x):
        i = jnp.arange(8)
        scores = tap((x @ params["q"]) @ (x @ params["k"]).T / 8**0.5, "scores")
        near = jnp.where(jnp.abs(i[:, None] - i[None]) <= 2, scores, -1e9)  # <- a
        weights = tap(jax.nn.softmax(near), "weights")
        return jnp.sum(tap(weights @ x, "mixed") ** 2)

    def rewrite(params, x):
        i = jnp.arange(8)
        scores = tap(x @ (params["q"] @ params["k"].T / 8**0.5) @ x.T, "scores")
        near = jnp.where(jnp.abs(i[:, None] - i[None]) < 2, scores, -1e9)  # <- b
        weights = tap(jax.nn.softmax(near), "weights")
        return jnp.sum(tap(weights @ x, "mixed") ** 2)

    params = projections(0, "q k", 8)
    return reference, params, rewrite, params, (normal(2, 8, 8),)
