"""Pairs of programs that agree bit for bit."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
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
bit_equal = functools.partial(equal, PAIRS, bit_equal=True)


@bit_equal()
def same_function_twice():
    def loss_fn(params, x, y):
        h = tap(jnp.tanh(x @ params["w0"]), "h0")
        h = tap(jnp.tanh(h @ params["w1"]), "h1")
        return mean_square(tap(h @ params["w2"], "out"), y)

    params = projections(0, "w0 w1 w2", 8)
    return loss_fn, params, loss_fn, params, (normal(3, 4, 8), normal(4, 4, 8))


@bit_equal()
def same_code_written_twice():
    def loss_a(params, x, y):
        h = tap(jax.nn.gelu(x @ params["in"]), "h")
        return mean_square(tap(jax.nn.softmax(h @ params["out"]), "out"), y)

    def loss_b(params, x, y):
        h = tap(jax.nn.gelu(x @ params["in"]), "h")
        return mean_square(tap(jax.nn.softmax(h @ params["out"]), "out"), y)

    params = projections(0, "in out", 8)
    return loss_a, params, loss_b, params, (normal(2, 4, 8), normal(3, 4, 8))


@bit_equal()
def jitted_and_not():
    def loss_fn(params, x):
        scores = tap((x @ params["q"]) @ (x @ params["k"]).T / 8**0.5, "scores")
        weights = tap(jax.nn.softmax(scores), "weights")
        return jnp.sum(tap(weights @ x, "mixed") ** 2)

    params = projections(0, "q k", 8)
    return loss_fn, params, jax.jit(loss_fn), params, (normal(2, 6, 8),)


@bit_equal()
def rematerialised_and_not():
    def block(w, h, i):
        return tap(h + jnp.tanh(h @ w), f"block{i}")

    def loss_a(params, x):
        for i in range(3):
            x = block(params[i], x, i)
        return jnp.sum(x**2)

    def loss_b(params, x):
        for i in range(3):
            x = jax.checkpoint(block, static_argnums=2)(params[i], x, i)
        return jnp.sum(x**2)

    params = [weights(i, 8, 8) for i in range(3)]
    return loss_a, params, loss_b, params, (normal(3, 4, 8),)


@bit_equal()
def other_names():
    def loss_a(params, x, y):
        h = tap(jax.nn.relu(x @ params["in"]), "encoder/hidden")
        return mean_square(tap(h @ params["out"], "encoder/out"), y)

    def loss_b(params, x, y):
        h = tap(jax.nn.relu(x @ params["in"]), "model.0")
        return mean_square(tap(h @ params["out"], "model.1"), y)

    params = projections(0, "in out", 8)
    names = {"encoder/hidden": "model.0", "encoder/out": "model.1"}
    args = (normal(2, 4, 8), normal(3, 4, 8))
    return loss_a, params, loss_b, params, args, {"names": names}


@bit_equal()
def parameters_in_another_order():
    def loss_fn(params, x, y):
        h = tap(jnp.tanh(x @ params["kernel"] + params["bias"]), "h")
        return mean_square(tap(h @ params["readout"], "out"), y)

    a = {"kernel": weights(0, 8, 8), "bias": normal(1, 1, 8), "readout": weights(2, 8, 8)}
    b = {name: a[name] for name in ("readout", "bias", "kernel")}
    return loss_fn, a, loss_fn, b, (normal(3, 4, 8), normal(4, 4, 8))


@bit_equal()
def same_scan():
    def loss_a(params, x, y):
        def step(h, u):
            return tap(jnp.tanh(h @ params["w"] + u), "h"), None

        h, _ = lax.scan(step, jnp.zeros((2, 8)), x)
        return mean_square(h @ params["out"], y)

    def loss_b(params, x, y):
        def cell(state, row):
            state = tap(jnp.tanh(state @ params["w"] + row), "h")
            return state, state

        last, _ = lax.scan(cell, jnp.zeros((2, 8)), x)
        return mean_square(last @ params["out"], y)

    params = projections(0, "w out", 8)
    return loss_a, params, loss_b, params, (normal(2, 6, 2, 8), normal(3, 2, 8))


@bit_equal()
def linen_in_setup_and_compact():
    class Compact(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(8, name="first")(x))
            x = nn.LayerNorm(name="norm")(x)
            return nn.Dense(2, name="last")(x)

    class Setup(nn.Module):
        def setup(self):
            self.last = nn.Dense(2)
            self.norm = nn.LayerNorm()
            self.first = nn.Dense(8)

        def __call__(self, x):
            return self.last(self.norm(nn.relu(self.first(x))))

    def loss(model):
        def loss_fn(params, x, y):
            return mean_square(model.apply(params, x), y)

        return loss_fn

    x = normal(0, 4, 8)
    params = Compact().init(jax.random.key(1), x)
    return loss(Compact()), params, loss(Setup()), params, (x, normal(2, 4, 2))


@bit_equal()
def nnx_copy():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(3)])
            self.norm = nnx.LayerNorm(8, rngs=rngs)

        def __call__(self, x):
            for layer in self.layers:
                x = nnx.gelu(layer(x))
            return self.norm(x)

    def loss_fn(model, x, y):
        return mean_square(model(x), y)

    model = Net(nnx.Rngs(0))
    return loss_fn, model, loss_fn, nnx.clone(model), (normal(0, 4, 8), normal(1, 4, 8))


@bit_equal()
def equinox_jitted_and_not():
    def loss_fn(model, x, y):
        return mean_square(jax.vmap(model)(x), y)

    model = eqx.nn.MLP(4, 2, 8, 2, key=jax.random.key(0))
    args = (normal(1, 5, 4), normal(2, 5, 2))
    return loss_fn, model, eqx.filter_jit(loss_fn), model, args


@bit_equal()
def half_and_division_by_two():
    def loss_a(params, x):
        h = tap(x @ params["w"] * 0.5, "h")
        return jnp.sum(tap(jnp.sin(h), "out"))

    def loss_b(params, x):
        h = tap(x @ params["w"] / 2.0, "h")
        return jnp.sum(tap(jnp.sin(h), "out"))

    params = projections(0, "w", 8)
    return loss_a, params, loss_b, params, (normal(1, 4, 8),)


@bit_equal()
def mask_values_without_effect():
    def loss_a(params, x, mask):
        scores = tap((x @ params["q"]) @ (x @ params["k"]).T / 8**0.5, "scores")
        weights = tap(jax.nn.softmax(jnp.where(mask, scores, -1e9)), "weights")
        return jnp.sum(tap(weights @ x, "mixed") ** 2)

    def loss_b(params, x, mask):
        scores = tap((x @ params["q"]) @ (x @ params["k"]).T / 8**0.5, "scores")
        weights = tap(jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)), "weights")
        return jnp.sum(tap(weights @ x, "mixed") ** 2)

    params = projections(0, "q k", 8)
    return loss_a, params, loss_b, params, (normal(2, 6, 8), jnp.tril(jnp.ones((6, 6), bool)))


@bit_equal()
def both_in_bfloat16():
    def loss_a(params, x, labels):
        h = tap(jax.nn.relu(x.astype(jnp.bfloat16) @ params["w"]), "h")
        logits = tap((h @ params["out"]).astype(jnp.float32), "logits")
        return -jnp.mean(log_likelihood(logits, labels))

    def loss_b(params, x, labels):
        hidden = tap(jnp.maximum(x.astype(jnp.bfloat16) @ params["w"], 0.0), "h")
        logits = tap((hidden @ params["out"]).astype(jnp.float32), "logits")
        return -jnp.mean(log_likelihood(logits, labels))

    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), projections(0, "w out", 16))
    return loss_a, params, loss_b, params, (normal(2, 8, 16), jnp.arange(8))


@bit_equal()
def dropout_with_the_same_key():
    def loss_a(params, x, key):
        h = tap(jax.nn.relu(x @ params["in"]), "h")
        kept = jax.random.bernoulli(key, 0.5, h.shape)
        h = tap(jnp.where(kept, h * 2.0, 0.0), "dropped")
        return jnp.mean(h @ params["out"])

    def loss_b(params, x, key):
        h = tap(jax.nn.relu(x @ params["in"]), "h")
        kept = jax.random.bernoulli(key, 0.5, h.shape)
        h = tap(lax.select(kept, h / 0.5, jnp.zeros_like(h)), "dropped")
        return jnp.mean(h @ params["out"])

    params = projections(0, "in out", 8)
    return loss_a, params, loss_b, params, (normal(2, 4, 8), jax.random.key(3))


@bit_equal()
def stop_gradient_where_none_flows():
    def loss_a(params, x):
        h = tap(x @ params["w"], "h")
        active = jnp.where(h > 0.0, h, 0.0)
        return jnp.sum(tap(active, "active") ** 2)

    def loss_b(params, x):
        h = tap(x @ params["w"], "h")
        active = jnp.where(lax.stop_gradient(h) > 0.0, h, 0.0)
        return jnp.sum(tap(active, "active") ** 2)

    params = projections(0, "w", 8)
    return loss_a, params, loss_b, params, (normal(1, 4, 8),)


@bit_equal()
def branch_of_a_cond_and_its_content():
    def loss_a(params, x, train):
        h = tap(x @ params["in"], "h")
        h = lax.cond(train, jax.nn.relu, jnp.tanh, h)
        return jnp.sum(tap(h, "active") ** 2)

    def loss_b(params, x, train):
        h = tap(x @ params["in"], "h")
        return jnp.sum(tap(jax.nn.relu(h), "active") ** 2)

    params = projections(0, "in", 8)
    return loss_a, params, loss_b, params, (normal(1, 4, 8), jnp.array(True))


@bit_equal()
def einsum_and_matmul():
    def loss_a(params, x, y):
        h = tap(x @ params["in"], "h")
        return mean_square(tap(jnp.tanh(h) @ params["out"].T, "out"), y)

    def loss_b(params, x, y):
        h = tap(jnp.einsum("btd,de->bte", x, params["in"]), "h")
        return mean_square(tap(jnp.einsum("bte,fe->btf", jnp.tanh(h), params["out"]), "out"), y)

    params = projections(0, "in out", 16)
    return loss_a, params, loss_b, params, (normal(2, 2, 5, 16), normal(3, 2, 5, 16))


@bit_equal()
def eps_below_rounding():
    class Net(nn.Module):
        eps: float

        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm(epsilon=self.eps)(nn.Dense(8)(x))
            return nn.Dense(2)(nn.relu(x))

    def loss(model):
        def loss_fn(params, x, y):
            return mean_square(model.apply(params, x), y)

        return loss_fn

    x = 50.0 * normal(0, 4, 8)
    params = Net(1e-6).init(jax.random.key(1), x)
    return loss(Net(1e-6)), params, loss(Net(1e-5)), params, (x, normal(2, 4, 2))


@bit_equal()
def linen_to_nnx():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(8, name="hidden")(x))
            return nn.Dense(2, name="readout")(nn.RMSNorm(name="norm")(x))

    class Port(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(4, 8, rngs=rngs)
            self.norm = nnx.RMSNorm(8, rngs=rngs)
            self.readout = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.readout(self.norm(nnx.relu(self.hidden(x))))

    def loss_a(params, x, y):
        return mean_square(Net().apply(params, x), y)

    def loss_b(model, x, y):
        return mean_square(model(x), y)

    x = normal(0, 5, 4)
    params, model = Net().init(jax.random.key(1), x), Port(nnx.Rngs(0))
    for layer, name in ((model.hidden, "hidden"), (model.readout, "readout")):
        layer.kernel[...] = params["params"][name]["kernel"]
    return loss_a, params, loss_b, model, (x, normal(2, 5, 2))


@bit_equal()
def mean_as_a_sum():
    def loss_a(params, x):
        h = tap(jax.nn.silu(x @ params["w"]), "h")
        return jnp.sum(tap(jnp.mean(h, axis=1), "pooled") ** 2)

    def loss_b(params, x):
        h = tap(jax.nn.silu(x @ params["w"]), "h")
        return jnp.sum(tap(jnp.sum(h, axis=1) / 7, "pooled") ** 2)

    params = projections(0, "w", 8)
    return loss_a, params, loss_b, params, (normal(1, 3, 7, 8),)


@bit_equal()
def variance_accumulated_in_float32():
    def loss_a(params, x, y):
        h = tap(x.astype(jnp.bfloat16) @ params["w"], "h")
        variance = tap(jnp.var(h, axis=-1), "variance")
        return mean_square(variance.astype(jnp.float32), y)

    def loss_b(params, x, y):
        h = tap(x.astype(jnp.bfloat16) @ params["w"], "h")
        exact = h.astype(jnp.float32)
        centred = exact - jnp.mean(exact, axis=-1, keepdims=True)
        variance = tap(jnp.mean(centred**2, axis=-1).astype(jnp.bfloat16), "variance")
        return mean_square(variance.astype(jnp.float32), y)

    params = {"w": weights(0, 16, 16).astype(jnp.bfloat16)}
    return loss_a, params, loss_b, params, (normal(1, 4, 16), normal(2, 4))
