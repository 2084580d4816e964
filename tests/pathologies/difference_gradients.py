"""Pairs with the same values and other cotangents or gradients."""

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
    log_likelihood,
    mean_square,
    normal,
    planted,
    projections,
    weights,
)

PAIRS: list[Pair] = []
cotangent_differs = functools.partial(planted, PAIRS, kind="cotangent")


def gradient_differs(leaf: str):
    return planted(PAIRS, "", "gradient", leaf=leaf)


@cotangent_differs("target")
def target_without_stop_gradient():
    def reference(params, x, view):
        online = tap(jnp.tanh(x @ params["encoder"]) @ params["predictor"], "online")
        target = tap(jnp.tanh(view @ params["encoder"]), "target")
        return mean_square(online, lax.stop_gradient(target))  # <- a

    def port(params, x, view):
        online = tap(jnp.tanh(x @ params["encoder"]) @ params["predictor"], "online")
        target = tap(jnp.tanh(view @ params["encoder"]), "target")
        return mean_square(online, target)

    params = projections(0, "encoder predictor", 8)
    x = normal(2, 4, 8)
    return reference, params, port, params, (x, x + 0.1 * normal(3, 4, 8))


@cotangent_differs("encoder")
def encoder_frozen_in_one():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.tanh(nn.Dense(8, name="encoder")(x))
            return nn.Dense(2, name="head")(h)

    class Port(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.tanh(nn.Dense(8, name="encoder")(x))
            h = lax.stop_gradient(h)  # <- b
            return nn.Dense(2, name="head")(h)

    def loss_a(params, x, y):
        return mean_square(Net().apply(params, x), y)

    def loss_b(params, x, y):
        return mean_square(Port().apply(params, x), y)

    x = normal(0, 4, 8)
    params = Net().init(jax.random.key(1), x)
    return loss_a, params, loss_b, params, (x, normal(2, 4, 2))


@cotangent_differs("z")
def rounding_without_straight_through():
    def reference(params, x, y):
        z = tap(3.0 * jnp.tanh(x @ params["in"]), "z")
        code = z + lax.stop_gradient(jnp.round(z) - z)  # <- a
        return mean_square(tap(code, "code") @ params["out"], y)

    def port(params, x, y):
        z = tap(3.0 * jnp.tanh(x @ params["in"]), "z")
        code = jnp.round(z)  # <- b
        return mean_square(tap(code, "code") @ params["out"], y)

    params = projections(0, "in out", 8)
    return reference, params, port, params, (normal(2, 4, 8), normal(3, 4, 8))


@cotangent_differs("h")
def hand_written_rule_with_a_wrong_factor():
    @jax.custom_vjp
    def swish(x):
        return x * jax.nn.sigmoid(x)

    def forward(x):
        return swish(x), x

    def backward(x, g):
        s = jax.nn.sigmoid(x)
        return (g * (s + x * s),)  # <- b

    swish.defvjp(forward, backward)

    def reference(params, x, y):
        h = tap(x @ params["in"], "h")
        h = tap(h * jax.nn.sigmoid(h), "active")  # <- a
        return mean_square(h @ params["out"], y)

    def port(params, x, y):
        h = tap(x @ params["in"], "h")
        h = tap(swish(h), "active")
        return mean_square(h @ params["out"], y)

    params = projections(0, "in out", 8)
    return reference, params, port, params, (normal(2, 4, 8), normal(3, 4, 8))


@gradient_differs("w1")
def hand_written_product_averaged_over_the_batch():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    def forward(x, w):
        return x @ w, (x, w)

    def backward(saved, g):
        x, w = saved
        return g @ w.T, x.T @ g / len(x)  # <- b

    product.defvjp(forward, backward)

    def reference(params, x, y):
        h = tap(jnp.tanh(x @ params["w0"]), "h")
        out = tap(h @ params["w1"], "out")  # <- a
        return mean_square(out, y)

    def port(params, x, y):
        h = tap(jnp.tanh(x @ params["w0"]), "h")
        out = tap(product(h, params["w1"]), "out")
        return mean_square(out, y)

    params = projections(0, "w0 w1", 8)
    return reference, params, port, params, (normal(2, 4, 8), normal(3, 4, 8))


@cotangent_differs("h0")
def cotangent_clipped_on_the_way():
    @jax.custom_vjp
    def clipped(x):
        return x

    def forward(x):
        return x, None

    def backward(_, g):
        return (jnp.clip(g, -0.01, 0.01),)  # <- b

    clipped.defvjp(forward, backward)

    def reference(params, x, y):
        h = tap(jnp.tanh(x @ params["w0"]), "h0")
        h = tap(jnp.tanh(h @ params["w1"]), "h1")
        return mean_square(h @ params["w2"], y)

    def port(params, x, y):
        h = tap(jnp.tanh(x @ params["w0"]), "h0")
        h = tap(jnp.tanh(clipped(h) @ params["w1"]), "h1")
        return mean_square(h @ params["w2"], y)

    params = projections(0, "w0 w1 w2", 8)
    return reference, params, port, params, (normal(3, 4, 8), normal(4, 4, 8))


@cotangent_differs("h")
def clip_of_the_norm_and_of_the_entries():
    def clipping(clip):
        @jax.custom_vjp
        def identity(x):
            return x

        identity.defvjp(lambda x: (x, None), lambda _, g: (clip(g),))
        return identity

    def by_norm(g):
        return g * jnp.minimum(1.0, 0.1 / jnp.linalg.norm(g))  # <- a

    def by_entry(g):
        return jnp.clip(g, -0.1, 0.1)  # <- b

    def loss(identity):
        def loss_fn(params, x, y):
            h = tap(jnp.tanh(x @ params["in"]), "h")
            out = tap(identity(h) @ params["out"], "out")
            return jnp.sum((out - y) ** 2)

        return loss_fn

    params = projections(0, "in out", 8)
    args = (normal(2, 4, 8), normal(3, 4, 8))
    return loss(clipping(by_norm)), params, loss(clipping(by_entry)), params, args


@gradient_differs("embedding")
def tied_readout_without_its_gradient():
    def reference(params, tokens, labels):
        h = tap(params["embedding"][tokens], "embedded")
        h = tap(jnp.tanh(h @ params["w"]), "h")
        logits = tap(h @ params["embedding"].T, "logits")  # <- a
        return -jnp.mean(log_likelihood(logits, labels))

    def port(params, tokens, labels):
        h = tap(params["embedding"][tokens], "embedded")
        h = tap(jnp.tanh(h @ params["w"]), "h")
        logits = tap(h @ lax.stop_gradient(params["embedding"]).T, "logits")  # <- b
        return -jnp.mean(log_likelihood(logits, labels))

    params = {"embedding": normal(0, 12, 8), "w": weights(1, 8, 8)}
    tokens = jnp.array([3, 1, 4, 1, 5, 9])
    return reference, params, port, params, (tokens, tokens + 1)


@gradient_differs("scale")
def frozen_gain():
    class Norm(nnx.Module):
        def __init__(self, rngs):
            self.scale = nnx.Param(1.0 + 0.1 * jax.random.normal(rngs.params(), (8,)))

        def __call__(self, x):
            return jax.nn.standardize(x) * self.scale[None]  # <- a

    class Frozen(Norm):
        def __call__(self, x):
            return jax.nn.standardize(x) * lax.stop_gradient(self.scale[None])  # <- b

    class Net(nnx.Module):
        def __init__(self, norm, rngs):
            self.layer = nnx.Linear(8, 8, rngs=rngs)
            self.norm = norm(rngs)

        def __call__(self, x):
            return self.norm(self.layer(x))

    def loss_fn(model, x, y):
        return mean_square(model(x), y)

    a, b = Net(Norm, nnx.Rngs(0)), Net(Frozen, nnx.Rngs(0))
    return loss_fn, a, loss_fn, b, (normal(1, 4, 8), normal(2, 4, 8))


@cotangent_differs("h")
def slope_of_relu_at_zero():
    def reference(params, x, y):
        h = tap(jax.nn.relu(x) @ params["in"], "h")
        h = tap(jax.nn.relu(h), "active")  # <- a
        return mean_square(h @ params["out"], y)

    def port(params, x, y):
        h = tap(jax.nn.relu(x) @ params["in"], "h")
        h = tap(jnp.maximum(h, 0.0), "active")  # <- b
        return mean_square(h @ params["out"], y)

    params = projections(0, "in out", 8)
    # Two examples are blank.
    x = normal(2, 6, 8).at[:2].set(0.0)
    return reference, params, port, params, (x, normal(3, 6, 8))


@cotangent_differs("features")
def domain_gradient_not_reversed():
    @jax.custom_vjp
    def reverse(x):
        return x

    def forward(x):
        return x, None

    def backward(_, g):
        return (-g,)  # <- a

    reverse.defvjp(forward, backward)

    class Net(eqx.Module):
        features: eqx.nn.Linear
        task: eqx.nn.Linear
        domain: eqx.nn.Linear

    def heads(model, x):
        h = model.features(x)
        return model.task(jnp.tanh(h)), model.domain(reverse(jnp.tanh(h)))

    def ported_heads(model, x):
        h = model.features(x)
        return model.task(jnp.tanh(h)), model.domain(jnp.tanh(h))

    def loss(heads):
        def loss_fn(model, x, y, domain):
            task, logit = jax.vmap(functools.partial(heads, model))(x)
            return mean_square(task, y) + jnp.mean(jax.nn.softplus(-domain * logit))

        return loss_fn

    keys = jax.random.split(jax.random.key(0), 3)
    model = Net(*(eqx.nn.Linear(8, n, key=k) for n, k in zip((8, 2, 1), keys, strict=True)))
    args = (normal(1, 6, 8), normal(2, 6, 2), jnp.sign(normal(3, 6, 1)))
    return loss(heads), model, loss(ported_heads), model, args


@cotangent_differs("h", iteration=2)
def truncated_backpropagation():
    def rnn(params, x, y, detach):
        def step(h, row):
            t, u = row
            h = tap(jnp.tanh(detach(t, h) @ params["w"] + u), "h")
            return h, None

        h, _ = lax.scan(step, jnp.zeros((2, 8)), (jnp.arange(6), x))
        return mean_square(tap(h @ params["out"], "out"), y)

    def full(params, x, y):
        return rnn(params, x, y, lambda t, h: h)

    def truncated(params, x, y):
        def detach(t, h):
            return jnp.where(t % 3 == 0, lax.stop_gradient(h), h)  # <- b

        return rnn(params, x, y, detach)

    params = projections(0, "w out", 8)
    return full, params, truncated, params, (normal(2, 6, 2, 8), normal(3, 2, 8))


@cotangent_differs("h")
def softplus_rule_recomputed_in_bfloat16():
    @jax.custom_vjp
    def softplus(x):
        return jnp.logaddexp(x, 0.0)

    def forward(x):
        return softplus(x), x

    def backward(x, g):
        slope = jax.nn.sigmoid(x.astype(jnp.bfloat16)).astype(jnp.float32)  # <- b
        return (g * slope,)

    softplus.defvjp(forward, backward)

    def reference(params, x, y):
        h = tap(params["in"] @ x, "h")
        h = tap(jnp.logaddexp(h, 0.0), "active")  # <- a
        return mean_square(params["out"] @ h, y)

    def port(params, x, y):
        h = tap(params["in"] @ x, "h")
        h = tap(softplus(h), "active")
        return mean_square(params["out"] @ h, y)

    def loss_a(params, x, y):
        return jnp.mean(jax.vmap(reference, (None, 0, 0))(params, x, y))

    def loss_b(params, x, y):
        return jnp.mean(jax.vmap(port, (None, 0, 0))(params, x, y))

    params = projections(0, "in out", 8)
    return loss_a, params, loss_b, params, (normal(2, 4, 8), normal(3, 4, 8))
