"""Pairs of normalisations: square roots, eps, axes and order."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from gradjax import tap
from pathologies.difference_case import Pair, mean_square, normal, planted, projections, weights

PAIRS: list[Pair] = []
differs = functools.partial(planted, PAIRS)


@differs("normed")
def rms_norm_without_its_square_root():
    def reference(params, x, y):
        h = tap(x @ params["in"], "h")
        power = jnp.mean(h**2, axis=-1, keepdims=True)
        h = tap(h * jax.lax.rsqrt(power + 1e-6), "normed")  # <- a
        return mean_square(h @ params["out"], y)

    def port(params, x, y):
        h = tap(x @ params["in"], "h")
        power = jnp.mean(h**2, axis=-1, keepdims=True)
        h = tap(h / (power + 1e-6), "normed")  # <- b
        return mean_square(h @ params["out"], y)

    params = projections(0, "in out", 8)
    return reference, params, port, params, (3.0 * normal(2, 4, 8), normal(3, 4, 8))


@differs("normed")
def layer_norm_divided_by_the_variance():
    def reference(params, x):
        h = tap(jnp.tanh(params["in"] @ x), "h")
        centred = tap(h - jnp.mean(h), "centred")
        h = tap(centred / jnp.std(h), "normed")  # <- a
        return params["out"] @ (params["gain"] * h)

    def port(params, x):
        h = tap(jnp.tanh(params["in"] @ x), "h")
        centred = tap(h - jnp.mean(h), "centred")
        h = tap(centred / jnp.var(h), "normed")  # <- b
        return params["out"] @ (params["gain"] * h)

    def loss_a(params, x, y):
        return mean_square(jax.vmap(reference, in_axes=(None, 0))(params, x), y)

    def loss_b(params, x, y):
        return mean_square(jax.vmap(port, in_axes=(None, 0))(params, x), y)

    params = projections(0, "in out", 8) | {"gain": 1.0 + 0.1 * normal(2, 8)}
    return loss_a, params, loss_b, params, (normal(3, 5, 8), normal(4, 5, 8))


@differs("normed")
def eps_outside_the_square_root():
    def reference(params, x, y):
        h = tap(x @ params["in"], "h")
        variance = jnp.var(h, axis=-1, keepdims=True)
        centred = h - jnp.mean(h, axis=-1, keepdims=True)
        h = tap(centred / jnp.sqrt(variance + 1e-3), "normed")  # <- a
        return mean_square(h @ params["out"], y)

    def port(params, x, y):
        h = tap(x @ params["in"], "h")
        variance = jnp.var(h, axis=-1, keepdims=True)
        centred = h - jnp.mean(h, axis=-1, keepdims=True)
        h = tap(centred / (jnp.sqrt(variance) + 1e-3), "normed")  # <- b
        return mean_square(h @ params["out"], y)

    params = projections(0, "in out", 8)
    return reference, params, port, params, (0.1 * normal(2, 4, 8), normal(3, 4, 8))


@differs("Encoder_0/LayerNorm_0")
def eps_of_another_library():
    class Encoder(nn.Module):
        eps: float

        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8)(x)
            x = nn.LayerNorm(epsilon=self.eps)(x)  # <- a  # <- b
            return nn.Dense(8)(nn.relu(x))

    class Net(nn.Module):
        eps: float

        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(Encoder(self.eps)(x))

    def loss(model):
        def loss_fn(params, x):
            return jnp.mean(model.apply(params, x) ** 2)

        return loss_fn

    x = 0.05 * normal(0, 4, 8)
    params = Net(1e-5).init(jax.random.key(1), x)
    return loss(Net(1e-5)), params, loss(Net(1e-3)), params, (x,)


@differs("normed1")
def eps_added_in_the_second_norm_only():
    def reference(params, x, y):
        h = tap(x @ params["w0"], "h0")
        h = tap(h * jax.lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6), "normed0")
        h = tap(h @ params["w1"], "h1")
        h = tap(h * jax.lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6), "normed1")  # <- a
        return mean_square(h @ params["w2"], y)

    def port(params, x, y):
        h = tap(x @ params["w0"], "h0")
        h = tap(h * jax.lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6), "normed0")
        h = tap(h @ params["w1"], "h1")
        h = tap(h * jax.lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-3), "normed1")  # <- b
        return mean_square(h @ params["w2"], y)

    params = projections(0, "w0 w1 w2", 8)
    params["w1"] = 0.3 * params["w1"]
    return reference, params, port, params, (normal(3, 4, 8), normal(4, 4, 8))


@differs("normed")
def layer_norm_over_the_batch():
    def reference(params, x, y):
        h = tap(x @ params["in"], "h")
        h = tap(jax.nn.standardize(h, axis=-1), "normed")  # <- a
        return mean_square(jax.nn.relu(h) @ params["out"], y)

    def port(params, x, y):
        h = tap(x @ params["in"], "h")
        h = tap(jax.nn.standardize(h, axis=0), "normed")  # <- b
        return mean_square(jax.nn.relu(h) @ params["out"], y)

    params = projections(0, "in out", 8)
    args = (normal(2, 8, 8), normal(3, 8, 8))
    return jax.jit(reference), params, jax.jit(port), params, args


@differs("norm")
def layer_norm_for_rms_norm():
    class Reference(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(8, name="in")(x)
            h = nn.RMSNorm(name="norm")(h)  # <- a
            return nn.Dense(4, name="out")(nn.silu(h))

    class Port(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(8, name="in")(x)
            h = nn.LayerNorm(use_bias=False, name="norm")(h)  # <- b
            return nn.Dense(4, name="out")(nn.silu(h))

    def loss(model):
        return lambda params, x, y: mean_square(model.apply(params, x), y)

    x = normal(0, 4, 8)
    params = Reference().init(jax.random.key(1), x)
    return loss(Reference()), params, loss(Port()), params, (x, normal(2, 4, 4))


@differs("normed")
def standard_deviation_of_the_sample():
    def reference(params, x, y):
        h = tap(jax.nn.tanh(x @ params["in"]), "h")
        centred = tap(h - jnp.mean(h, axis=-1, keepdims=True), "centred")
        spread = jnp.std(h, axis=-1, keepdims=True)  # <- a
        return mean_square(tap(centred / spread, "normed") @ params["out"], y)

    def port(params, x, y):
        h = tap(jax.nn.tanh(x @ params["in"]), "h")
        centred = tap(h - jnp.mean(h, axis=-1, keepdims=True), "centred")
        spread = jnp.std(h, axis=-1, keepdims=True, ddof=1)  # <- b
        return mean_square(tap(centred / spread, "normed") @ params["out"], y)

    params = projections(0, "in out", 8)
    return reference, params, port, params, (normal(2, 4, 8), normal(3, 4, 8))


@differs("BatchNorm_0")
def batch_norm_in_evaluation():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(8)(x)
            x = nn.BatchNorm(use_running_average=not train)(x)  # <- a  # <- b
            x = nn.Dense(8)(nn.relu(x))
            return nn.Dense(1)(nn.relu(x))

    model, x = Net(), normal(0, 8, 4)
    variables = model.init(jax.random.key(1), x, train=False)
    statistics = variables["batch_stats"]

    def train_loss(params, x):
        variables = {"params": params, "batch_stats": statistics}
        out, _ = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return jnp.mean((out - 1.0) ** 2)

    def evaluation_loss(params, x):
        variables = {"params": params, "batch_stats": statistics}
        return jnp.mean((model.apply(variables, x, train=False) - 1.0) ** 2)

    return train_loss, variables["params"], evaluation_loss, variables["params"], (x,)


@differs("norms[1]")
def groups_of_another_size():
    class Net(eqx.Module):
        layers: list
        norms: list
        readout: eqx.nn.Linear

        def __init__(self, groups, key):
            keys = jax.random.split(key, 3)
            self.layers = [eqx.nn.Linear(8, 8, key=k) for k in keys[:2]]
            self.norms = [eqx.nn.GroupNorm(g, 8) for g in groups]
            self.readout = eqx.nn.Linear(8, 2, key=keys[2])

        def __call__(self, x):
            for layer, norm in zip(self.layers, self.norms, strict=True):
                x = layer(x)
                x = jax.nn.relu(norm(x))  # <- a  # <- b
            return self.readout(x)

    def loss_fn(model, x, y):
        return mean_square(jax.vmap(model)(x), y)

    a = Net((2, 2), jax.random.key(0))
    b = Net((2, 4), jax.random.key(0))
    return loss_fn, a, loss_fn, b, (normal(1, 6, 8), normal(2, 6, 2))


@differs("block1")
def norm_after_the_sum():
    def pre_norm(params, x, y):
        h = tap(x @ params["in"], "block0")
        h = tap(h + jnp.tanh(jax.nn.standardize(h) @ params["w1"]), "block1")  # <- a
        h = tap(h + jnp.tanh(jax.nn.standardize(h) @ params["w2"]), "block2")
        return mean_square(h, y)

    def post_norm(params, x, y):
        h = tap(x @ params["in"], "block0")
        h = tap(jax.nn.standardize(h + jnp.tanh(h @ params["w1"])), "block1")  # <- b
        h = tap(jax.nn.standardize(h + jnp.tanh(h @ params["w2"])), "block2")
        return mean_square(h, y)

    params = projections(0, "in w1 w2", 8)
    return pre_norm, params, post_norm, params, (normal(3, 4, 8), normal(4, 4, 8))


@differs("norm")
def gain_stored_as_an_offset_from_one():
    class Norm(nnx.Module):
        def __init__(self, rngs):
            self.scale = nnx.Param(0.3 * jax.random.normal(rngs.params(), (8,)))

        def __call__(self, x):
            x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
            return x * (1.0 + self.scale[None])  # <- a

    class PlainNorm(Norm):
        def __call__(self, x):
            x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
            return x * self.scale[None]  # <- b

    class Net(nnx.Module):
        def __init__(self, norm, rngs):
            self.embed = nnx.Linear(4, 8, rngs=rngs)
            self.norm = norm(rngs)
            self.readout = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.readout(self.norm(self.embed(x)))

    def loss_fn(model, x, y):
        return mean_square(model(x), y)

    a, b = Net(Norm, nnx.Rngs(0)), Net(PlainNorm, nnx.Rngs(0))
    return loss_fn, a, loss_fn, b, (normal(1, 5, 4), normal(2, 5, 2))


@differs("step")
def adaptive_step_without_its_square_root():
    def error(w, x, y):
        return mean_square(jnp.tanh(x @ w), y)

    def adapted_loss(params, x, y):
        g = tap(jax.grad(error)(params["w"], x, y), "inner_gradient")
        step = tap(g / (jnp.sqrt(g**2 + params["second"]) + 1e-8), "step")  # <- a
        return error(params["w"] - params["rate"] * step, x, y)

    def port(params, x, y):
        g = tap(jax.grad(error)(params["w"], x, y), "inner_gradient")
        step = tap(g / (g**2 + params["second"] + 1e-8), "step")  # <- b
        return error(params["w"] - params["rate"] * step, x, y)

    params = {"w": weights(0, 4, 4), "second": jnp.full((4, 4), 1e-2), "rate": jnp.float32(0.1)}
    return adapted_loss, params, port, params, (normal(1, 8, 4), normal(2, 8, 4))


@differs("normed")
def spread_over_the_whole_batch():
    def reference(params, x):
        h = tap(params["in"] @ x, "h")
        spread = jnp.sqrt(jnp.mean(h**2) + 1e-6)  # <- a
        return params["out"] @ tap(h / spread, "normed")

    def loss_a(params, x, y):
        return mean_square(jax.vmap(reference, in_axes=(None, 0))(params, x), y)

    def loss_b(params, x, y):
        h = tap(x @ params["in"].T, "h")
        spread = jnp.sqrt(jnp.mean(h**2) + 1e-6)  # <- b
        normed = tap(h / spread, "normed")
        return mean_square(normed @ params["out"].T, y)

    params = projections(0, "in out", 8)
    return loss_a, params, loss_b, params, (normal(2, 6, 8), normal(3, 6, 8))
