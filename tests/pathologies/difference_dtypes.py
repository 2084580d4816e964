"""Pairs of precisions: products, softmax, sums and parameters in fewer bits."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from gradjax import tap
from pathologies.difference_case import (
    Pair,
    log_likelihood,
    mean_square,
    normal,
    planted,
    projections,
)

PAIRS: list[Pair] = []
differs = functools.partial(planted, PAIRS)


@differs("h1", "dtype")
def product_in_bfloat16():
    def reference(params, x, y):
        h = tap(jnp.tanh(x @ params["w0"]), "h0")
        h = tap(h @ params["w1"], "h1")  # <- a
        out = tap(jnp.tanh(h).astype(jnp.float32) @ params["w2"], "out")
        return mean_square(out, y)

    def port(params, x, y):
        h = tap(jnp.tanh(x @ params["w0"]), "h0")
        h, w1 = h.astype(jnp.bfloat16), params["w1"].astype(jnp.bfloat16)  # <- b
        h = tap(h @ w1, "h1")
        out = tap(jnp.tanh(h).astype(jnp.float32) @ params["w2"], "out")
        return mean_square(out, y)

    params = projections(0, "w0 w1 w2", 8)
    return reference, params, port, params, (normal(3, 4, 8), normal(4, 4, 8))


@differs("Dense_1", "dtype")
def layer_of_another_dtype():
    class Net(nn.Module):
        dtype: jnp.dtype

        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(16, dtype=jnp.float32)(x))
            x = nn.Dense(16, dtype=self.dtype)(x)  # <- a  # <- b
            return nn.Dense(2, dtype=jnp.float32)(nn.relu(x))

    def loss(dtype):
        def loss_fn(params, x, y):
            return mean_square(Net(dtype).apply(params, x), y)

        return loss_fn

    x = normal(0, 6, 4)
    params = Net(jnp.float32).init(jax.random.key(1), x)
    return loss(jnp.float32), params, loss(jnp.bfloat16), params, (x, normal(2, 6, 2))


@differs("layers[0]", "dtype")
def model_in_half_precision():
    class Net(nnx.Module):
        def __init__(self, dtype, rngs):
            self.layers = nnx.List(
                [nnx.Linear(8, 8, dtype=dtype, param_dtype=dtype, rngs=rngs) for _ in range(3)]
            )

        def __call__(self, x):
            for layer in self.layers:
                x = nnx.tanh(layer(x))  # <- a  # <- b
            return x

    def loss_fn(model, x, y):
        return mean_square(model(x).astype(jnp.float32), y)

    a = Net(jnp.float32, nnx.Rngs(0))
    graph, _ = nnx.split(Net(jnp.float16, nnx.Rngs(0)))
    b = nnx.merge(graph, jax.tree.map(lambda p: p.astype(jnp.float16), nnx.state(a)))
    return loss_fn, a, loss_fn, b, (normal(0, 5, 8), normal(1, 5, 8))


@differs("weights", "dtype")
def softmax_in_float16():
    def reference(params, x):
        q, k = tap(x @ params["q"], "q"), tap(x @ params["k"], "k")
        scores = tap(q @ k.T / 8**0.5, "scores")
        weights = tap(jax.nn.softmax(scores), "weights")  # <- a
        return jnp.mean((weights @ x) ** 2)

    def port(params, x):
        q, k = tap(x @ params["q"], "q"), tap(x @ params["k"], "k")
        scores = tap(q @ k.T / 8**0.5, "scores")
        weights = tap(jax.nn.softmax(scores.astype(jnp.float16)), "weights")  # <- b
        return jnp.mean((weights.astype(jnp.float32) @ x) ** 2)

    params = projections(0, "q k", 8)
    return reference, params, port, params, (normal(2, 6, 8),)


@differs("mixed")
def softmax_in_bfloat16_between_casts():
    @jax.jit
    def reference(params, x):
        scores = tap((x @ params["q"]) @ (x @ params["k"]).T / 8**0.5, "scores")
        weights = jax.nn.softmax(scores)  # <- a
        return jnp.sum(tap(weights @ x, "mixed") ** 2)

    @jax.jit
    def port(params, x):
        scores = tap((x @ params["q"]) @ (x @ params["k"]).T / 8**0.5, "scores")
        weights = jax.nn.softmax(scores.astype(jnp.bfloat16)).astype(jnp.float32)  # <- b
        return jnp.sum(tap(weights @ x, "mixed") ** 2)

    params = projections(0, "q k", 8)
    return reference, params, port, params, (3.0 * normal(2, 6, 8),)


@differs("total", "dtype", iteration=0)
def running_sum_in_bfloat16():
    def reference(params, x):
        h = tap(jax.nn.softplus(x @ params["in"]), "h")

        def step(total, row):
            total = tap(total + row, "total")  # <- a
            return total, None

        total, _ = jax.lax.scan(step, jnp.zeros(8), h)
        return jnp.sum(jnp.log(total))

    def port(params, x):
        h = tap(jax.nn.softplus(x @ params["in"]), "h")

        def step(total, row):
            total = tap(total.astype(jnp.bfloat16) + row.astype(jnp.bfloat16), "total")  # <- b
            return total.astype(jnp.float32), None

        total, _ = jax.lax.scan(step, jnp.zeros(8), h)
        return jnp.sum(jnp.log(total))

    params = projections(0, "in", 8)
    return reference, params, port, params, (normal(1, 32, 8),)


@differs("product")
def products_accumulated_in_bfloat16():
    def reference(params, x, y):
        h = tap(jnp.tanh(x).astype(jnp.bfloat16), "h")
        product = jnp.matmul(h, params["w"], preferred_element_type=jnp.float32)  # <- a
        return mean_square(jnp.tanh(tap(product, "product")), y)

    def port(params, x, y):
        h = tap(jnp.tanh(x).astype(jnp.bfloat16), "h")
        product = jnp.matmul(h, params["w"]).astype(jnp.float32)  # <- b
        return mean_square(jnp.tanh(tap(product, "product")), y)

    params = {"w": projections(0, "w", 32)["w"].astype(jnp.bfloat16)}
    return reference, params, port, params, (normal(1, 4, 32), normal(2, 4, 32))


@differs("norm", "dtype")
def statistics_in_float16():
    class Norm(eqx.Module):
        scale: jax.Array

        def __call__(self, x):
            x = x * jax.lax.rsqrt(jnp.mean(x**2) + 1e-6)  # <- a
            return self.scale.astype(x.dtype) * x

    class Port(Norm):
        def __call__(self, x):
            x = x.astype(jnp.float16)  # <- b
            x = x * jax.lax.rsqrt(jnp.mean(x**2) + 1e-6)
            return self.scale.astype(x.dtype) * x

    class Net(eqx.Module):
        embed: eqx.nn.Linear
        norm: Norm

        def __call__(self, x):
            return self.norm(self.embed(x)).astype(jnp.float32)

    def loss_fn(model, x, y):
        return mean_square(jax.vmap(model)(x), y)

    embed = eqx.nn.Linear(4, 8, key=jax.random.key(0))
    scale = 1.0 + 0.1 * normal(1, 8)
    a, b = Net(embed, Norm(scale)), Net(embed, Port(scale))
    return loss_fn, a, loss_fn, b, (normal(2, 5, 4), normal(3, 5, 8))


@differs("logits", "dtype")
def logits_in_bfloat16():
    def reference(params, x, labels):
        h = tap(jax.nn.relu(x @ params["w"]), "h")
        logits = tap(h @ params["out"], "logits")  # <- a
        return -jnp.mean(log_likelihood(logits, labels))

    def port(params, x, labels):
        h = tap(jax.nn.relu(x @ params["w"]), "h")
        logits = tap((h @ params["out"]).astype(jnp.bfloat16), "logits")  # <- b
        return -jnp.mean(log_likelihood(logits.astype(jnp.float32), labels))

    params = projections(0, "w out", 16)
    return reference, params, port, params, (normal(2, 8, 16), jnp.arange(8))
