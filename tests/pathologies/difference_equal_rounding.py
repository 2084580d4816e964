"""Pairs of programs that compute the same in another way: they agree within rounding."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from gradjax import tap
from pathologies.difference_case import (
    Pair,
    equal,
    log_likelihood,
    mean_square,
    normal,
    projections,
    weights,
)

PAIRS: list[Pair] = []
rounds = functools.partial(equal, PAIRS)


@rounds()
def sum_in_another_order():
    def loss_a(params, x):
        h = tap(jax.nn.softplus(x @ params["w"]), "h")
        return jnp.sum(tap(jnp.sum(h, axis=-1), "total") ** 2)

    def loss_b(params, x):
        h = tap(jax.nn.softplus(x @ params["w"]), "h")
        halves = jnp.sum(h[:, ::2], axis=-1) + jnp.sum(h[:, 1::2], axis=-1)
        return jnp.sum(tap(halves, "total") ** 2)

    params = projections(0, "w", 32)
    return loss_a, params, loss_b, params, (normal(1, 4, 32),)


@rounds()
def log_sum_exp_by_hand():
    def loss_a(params, x, labels):
        logits = tap(x @ params["w"], "logits")
        top = jnp.max(logits, axis=-1, keepdims=True)
        log_z = jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1)) + top[:, 0]
        log_z = tap(log_z, "log_z")
        return jnp.mean(log_z - jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0])

    def loss_b(params, x, labels):
        logits = tap(x @ params["w"], "logits")
        log_z = tap(jax.nn.logsumexp(logits, axis=-1), "log_z")
        return jnp.mean(log_z - logits[jnp.arange(8), labels])

    params = projections(0, "w", 8)
    return loss_a, params, loss_b, params, (3.0 * normal(1, 8, 8), jnp.arange(8))


@rounds()
def fused_and_separate_projections():
    def loss_a(params, x):
        q, k, v = (tap(x @ w, name) for w, name in zip(params["qkv"], "qkv", strict=True))
        return jnp.sum(tap(jax.nn.softmax(q @ k.T / 8**0.5) @ v, "mixed") ** 2)

    def loss_b(params, x):
        fused = x @ jnp.concatenate(list(params["qkv"]), axis=1)
        q, k, v = (tap(z, name) for z, name in zip(jnp.split(fused, 3, axis=1), "qkv", strict=True))
        return jnp.sum(tap(jax.nn.softmax(q @ k.T / 8**0.5) @ v, "mixed") ** 2)

    params = {"qkv": weights(0, 3, 8, 8)}
    return loss_a, params, loss_b, params, (normal(1, 6, 8),)


@rounds()
def product_bracketed_in_another_way():
    def loss_a(params, x, y):
        h = tap((x @ params["down"]) @ params["up"], "low_rank")
        return mean_square(tap(x + h, "out"), y)

    def loss_b(params, x, y):
        h = tap(x @ (params["down"] @ params["up"]), "low_rank")
        return mean_square(tap(x + h, "out"), y)

    params = {"down": weights(0, 16, 4), "up": weights(1, 4, 16)}
    return loss_a, params, loss_b, params, (normal(2, 4, 16), normal(3, 4, 16))


@rounds()
def softmax_without_its_maximum():
    def loss_a(params, x):
        scores = tap(x @ params["w"], "scores")
        return jnp.sum(tap(jax.nn.softmax(scores), "weights") ** 2)

    def loss_b(params, x):
        e = jnp.exp(tap(x @ params["w"], "scores"))
        return jnp.sum(tap(e / jnp.sum(e, axis=-1, keepdims=True), "weights") ** 2)

    params = projections(0, "w", 8)
    return loss_a, params, loss_b, params, (normal(1, 6, 8),)


@rounds()
def variance_by_two_formulas():
    def loss_a(params, x, y):
        h = tap(x @ params["w"], "h")
        variance = jnp.var(h, axis=-1, keepdims=True)
        centred = h - jnp.mean(h, axis=-1, keepdims=True)
        return mean_square(tap(centred / jnp.sqrt(variance + 1e-5), "normed"), y)

    def loss_b(params, x, y):
        h = tap(x @ params["w"], "h")
        mean = jnp.mean(h, axis=-1, keepdims=True)
        variance = jnp.mean(h**2, axis=-1, keepdims=True) - mean**2
        return mean_square(tap((h - mean) * lax.rsqrt(variance + 1e-5), "normed"), y)

    params = projections(0, "w", 16)
    return loss_a, params, loss_b, params, (normal(1, 4, 16), normal(2, 4, 16))


@rounds()
def scan_and_unrolled_loop():
    def loss_a(params, x, y):
        def layer(h, w):
            return h + jnp.tanh(h @ w), None

        h = tap(x @ params["in"], "embedded")
        h, _ = lax.scan(layer, h, params["layers"])
        return mean_square(tap(h, "encoded"), y)

    def loss_b(params, x, y):
        h = tap(x @ params["in"], "embedded")
        for w in params["layers"]:
            h = h + jnp.tanh(h @ w)
        return mean_square(tap(h, "encoded"), y)

    params = {"in": weights(0, 8, 8), "layers": weights(1, 6, 8, 8)}
    return loss_a, params, loss_b, params, (normal(2, 4, 8), normal(3, 4, 8))


@rounds()
def vmap_and_batched_product():
    def forward(params, x):
        h = tap(jnp.tanh(params["in"].T @ x), "h")
        return tap(params["out"].T @ h, "out")

    def loss_a(params, x, y):
        return mean_square(jax.vmap(forward, in_axes=(None, 0))(params, x), y)

    def loss_b(params, x, y):
        h = tap(jnp.tanh(x @ params["in"]), "h")
        return mean_square(tap(h @ params["out"], "out"), y)

    params = projections(0, "in out", 16)
    return loss_a, params, loss_b, params, (normal(2, 5, 16), normal(3, 5, 16))


@rounds()
def reciprocal_square_root():
    def loss_a(params, x, y):
        h = tap(x @ params["w"], "h")
        power = jnp.mean(h**2, axis=-1, keepdims=True)
        return mean_square(tap(h * lax.rsqrt(power + 1e-6), "normed"), y)

    def loss_b(params, x, y):
        h = tap(x @ params["w"], "h")
        power = jnp.einsum("nd,nd->n", h, h)[:, None] / 16
        return mean_square(tap(h / jnp.sqrt(power + 1e-6), "normed"), y)

    params = projections(0, "w", 16)
    return loss_a, params, loss_b, params, (normal(1, 4, 16), normal(2, 4, 16))


@rounds()
def gelu_by_hand():
    def loss_a(params, x):
        h = tap(x @ params["in"], "h")
        return jnp.sum(tap(jax.nn.gelu(h), "active") @ params["out"])

    def loss_b(params, x):
        h = tap(x @ params["in"], "h")
        active = h * jax.nn.sigmoid(2 * (2 / jnp.pi) ** 0.5 * (h + 0.044715 * h**3))
        return jnp.sum(tap(active, "active") @ params["out"])

    params = projections(0, "in out", 8)
    return loss_a, params, loss_b, params, (normal(2, 4, 8),)


@rounds()
def convolution_and_sum_of_shifts():
    def loss_a(params, x, y):
        layout = ("NWC", "WIO", "NWC")
        h = lax.conv_general_dilated(x, params["kernel"], (1,), "SAME", dimension_numbers=layout)
        return mean_square(tap(h, "conv"), y)

    def loss_b(params, x, y):
        padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
        h = sum(padded[:, i : i + 8] @ params["kernel"][i] for i in range(3))
        return mean_square(tap(h, "conv"), y)

    params = {"kernel": 0.4 * normal(0, 3, 4, 6)}
    return loss_a, params, loss_b, params, (normal(1, 2, 8, 4), normal(2, 2, 8, 6))


@rounds()
def linear_recurrence_in_parallel():
    def loss_a(params, x, y):
        def step(h, u):
            h = jax.nn.sigmoid(params["decay"]) * h + u
            return h, h

        _, states = lax.scan(step, jnp.zeros(8), x)
        return mean_square(tap(states, "states"), y)

    def combine(left, right):
        return left[0] * right[0], left[1] * right[0] + right[1]

    def loss_b(params, x, y):
        decay = jnp.broadcast_to(jax.nn.sigmoid(params["decay"])[None], x.shape)
        _, states = lax.associative_scan(combine, (decay, x))
        return mean_square(tap(states, "states"), y)

    params = {"decay": normal(0, 8)}
    return loss_a, params, loss_b, params, (normal(1, 8, 8), normal(2, 8, 8))


@rounds()
def hand_written_rule_that_is_right():
    @jax.custom_vjp
    def swish(x):
        return x * jax.nn.sigmoid(x)

    def forward(x):
        return swish(x), x

    def backward(x, g):
        s = jax.nn.sigmoid(x)
        return (g * (s + x * s * (1.0 - s)),)

    swish.defvjp(forward, backward)

    def loss_a(params, x):
        h = tap(x @ params["in"], "h")
        return jnp.sum(tap(h * jax.nn.sigmoid(h), "active") @ params["out"])

    def loss_b(params, x):
        h = tap(x @ params["in"], "h")
        return jnp.sum(tap(swish(h), "active") @ params["out"])

    params = projections(0, "in out", 8)
    return loss_a, params, loss_b, params, (normal(2, 4, 8),)


@rounds()
def log_probabilities_by_one_hot():
    def loss_a(params, x, labels):
        log_p = tap(jax.nn.log_softmax(x @ params["w"]), "log_p")
        return -jnp.mean(jnp.sum(jax.nn.one_hot(labels, 8) * log_p, axis=-1))

    def loss_b(params, x, labels):
        logits = x @ params["w"]
        log_p = tap(logits - jnp.log(jnp.sum(jnp.exp(logits), -1, keepdims=True)), "log_p")
        return -jnp.sum(log_p[jnp.arange(5), labels]) / 5

    params = projections(0, "w", 8)
    return loss_a, params, loss_b, params, (normal(1, 5, 8), jnp.arange(5))


@rounds()
def linen_to_plain():
    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm()(nn.Dense(16)(x))
            return nn.Dense(4)(nn.gelu(x))

    def loss_a(params, x, labels):
        return -jnp.mean(log_likelihood(MLP().apply(params, x), labels))

    def loss_b(params, x, labels):
        h = tap(x @ params["w0"], "dense0")
        h = tap(jax.nn.standardize(h, epsilon=1e-6), "norm")
        logits = tap(jax.nn.gelu(h) @ params["w1"], "dense1")
        return -jnp.mean(log_likelihood(logits, labels))

    x = normal(0, 6, 8)
    params = MLP().init(jax.random.key(1), x)
    ported = {f"w{i}": params["params"][f"Dense_{i}"]["kernel"] for i in (0, 1)}
    names = {"Dense_0": "dense0", "LayerNorm_0": "norm", "Dense_1": "dense1"}
    return loss_a, params, loss_b, ported, (x, jnp.arange(6) % 4), {"names": names}


@rounds()
def equinox_to_plain():
    def loss_a(model, x, y):
        return mean_square(jax.vmap(model)(x), y)

    def loss_b(params, x, y):
        for i, (w, b) in enumerate(params):
            x = jax.nn.relu(x) if i else x
            x = tap(x @ w.T + b[None], f"h{i}")
        return mean_square(x, y)

    model = eqx.nn.MLP(4, 2, 16, 2, key=jax.random.key(0))
    params = [(layer.weight, layer.bias) for layer in model.layers]
    names = {f"layers[{i}]": f"h{i}" for i in range(3)}
    return loss_a, model, loss_b, params, (normal(1, 5, 4), normal(2, 5, 2)), {"names": names}


@rounds()
def helper_function_and_inline():
    @jax.jit
    def attend(q, k, v):
        return jax.nn.softmax(q @ k.T / 8**0.5) @ v

    def loss_a(params, x):
        q, k, v = (tap(x @ params[name], name) for name in "qkv")
        return jnp.sum(tap(attend(q, k, v), "mixed") ** 2)

    def loss_b(params, x):
        q, k, v = (tap(x @ params[name], name) for name in "qkv")
        return jnp.sum(tap(jax.nn.softmax(q @ k.T / 8**0.5) @ v, "mixed") ** 2)

    params = projections(0, "q k v", 8)
    return loss_a, params, loss_b, params, (normal(3, 5, 8),)


@rounds()
def mean_as_a_product():
    def loss_a(params, x):
        h = tap(jax.nn.silu(x @ params["w"]), "h")
        return jnp.sum(tap(jnp.mean(h, axis=1), "pooled") ** 2)

    def loss_b(params, x):
        h = tap(jax.nn.silu(x @ params["w"]), "h")
        pooled = jnp.einsum("btd,t->bd", h, jnp.full(7, 1 / 7))
        return jnp.sum(tap(pooled, "pooled") ** 2)

    params = projections(0, "w", 8)
    return loss_a, params, loss_b, params, (normal(1, 3, 7, 8),)


@rounds()
def keys_repeated_and_groups_in_einsum():
    def loss_a(params, x):
        q = tap((x @ params["q"]).reshape(5, 4, 4), "q")
        k = tap((x @ params["k"]).reshape(5, 2, 4), "k")
        scores = jnp.einsum("qhd,khd->hqk", q, jnp.repeat(k, 2, axis=1))
        return jnp.sum(tap(jax.nn.softmax(scores), "weights") ** 2)

    def loss_b(params, x):
        q = tap((x @ params["q"]).reshape(5, 4, 4), "q")
        k = tap((x @ params["k"]).reshape(5, 2, 4), "k")
        scores = jnp.einsum("qgrd,kgd->grqk", q.reshape(5, 2, 2, 4), k).reshape(4, 5, 5)
        return jnp.sum(tap(jax.nn.softmax(scores), "weights") ** 2)

    params = {"q": weights(0, 8, 16), "k": weights(1, 8, 8)}
    return loss_a, params, loss_b, params, (normal(2, 5, 8),)
