"""Pairs of layers: weights, biases, activations, convolutions, pooling and blocks."""

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
differs = functools.partial(planted, PAIRS)


@differs("h1")
def square_weight_transposed():
    def reference(params, x, y):
        h = tap(jnp.tanh(x @ params["w0"]), "h0")
        h = tap(jnp.tanh(h @ params["w1"]), "h1")  # <- a
        return mean_square(tap(h @ params["w2"], "out"), y)

    def port(params, x, y):
        h = tap(jnp.tanh(x @ params["w0"]), "h0")
        h = tap(jnp.tanh(h @ params["w1"].T), "h1")  # <- b
        return mean_square(tap(h @ params["w2"], "out"), y)

    params = projections(0, "w0 w1 w2", 8)
    return reference, params, port, params, (normal(3, 4, 8), normal(4, 4, 8))


@differs("h2")
def bias_dropped_under_vmap():
    def reference(params, x):
        h = tap(jnp.tanh(params["w0"] @ x + params["b0"]), "h1")
        h = tap(params["w1"] @ h + params["b1"], "h2")  # <- a
        return jnp.sum(jax.nn.softplus(h))

    def port(params, x):
        h = tap(jnp.tanh(params["w0"] @ x + params["b0"]), "h1")
        h = tap(params["w1"] @ h, "h2")
        return jnp.sum(jax.nn.softplus(h))

    def loss_a(params, x):
        return jnp.mean(jax.vmap(functools.partial(reference, params))(x))

    def loss_b(params, x):
        return jnp.mean(jax.vmap(functools.partial(port, params))(x))

    params = projections(0, "w0 w1", 8) | {"b0": normal(2, 8), "b1": normal(3, 8)}
    return loss_a, params, loss_b, params, (normal(4, 5, 8),)


@differs("Dense_1")
def layer_without_a_bias():
    class Reference(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(8, bias_init=nn.initializers.normal(0.5))(x))
            x = nn.Dense(8, bias_init=nn.initializers.normal(0.5))(x)  # <- a
            return nn.Dense(2)(nn.relu(x))

    class Port(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(8)(x))
            x = nn.Dense(8, use_bias=False)(x)  # <- b
            return nn.Dense(2)(nn.relu(x))

    def loss_a(params, x, y):
        return mean_square(Reference().apply(params, x), y)

    def loss_b(params, x, y):
        return mean_square(Port().apply(params, x), y)

    x = normal(0, 6, 4)
    a = Reference().init(jax.random.key(1), x)
    b = {"params": dict(a["params"]) | {"Dense_1": {"kernel": a["params"]["Dense_1"]["kernel"]}}}
    return loss_a, a, loss_b, b, (x, normal(2, 6, 2))


@differs("pooled")
def mean_over_the_features():
    def reference(params, x, y):
        h = tap(jax.nn.relu(x @ params["in"]), "h")
        pooled = tap(jnp.mean(h, axis=1), "pooled")  # <- a
        return mean_square(pooled @ params["out"], y)

    def port(params, x, y):
        h = tap(jax.nn.relu(x @ params["in"]), "h")
        pooled = tap(jnp.mean(h, axis=2), "pooled")  # <- b
        return mean_square(pooled @ params["out"], y)

    params = projections(0, "in out", 8)
    return reference, params, port, params, (normal(2, 3, 8, 8), normal(3, 3, 8))


@differs("Dense_1")
def gelu_by_tanh():
    class Reference(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(16)(x)
            h = nn.gelu(h, approximate=False)  # <- a
            return nn.Dense(4)(h)

    class Port(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(16)(x)
            h = nn.gelu(h)  # <- b
            return nn.Dense(4)(h)

    def loss_a(params, x, y):
        return mean_square(Reference().apply(params, x), y)

    def loss_b(params, x, y):
        return mean_square(Port().apply(params, x), y)

    x = 2.0 * normal(0, 6, 8)
    params = Reference().init(jax.random.key(1), x)
    return loss_a, params, loss_b, params, (x, normal(2, 6, 4))


@differs("layers[1]")
def slope_of_leaky_relu():
    class Net(nnx.Module):
        slope = 0.01

        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(3)])

        def __call__(self, x):
            for layer in self.layers:
                x = nnx.leaky_relu(layer(x), self.slope)  # <- a  # <- b
            return x

    class Port(Net):
        slope = 0.2

    def loss_fn(model, x, y):
        return mean_square(model(x), y)

    return loss_fn, Net(nnx.Rngs(0)), loss_fn, Port(nnx.Rngs(0)), (normal(0, 5, 8), normal(1, 5, 8))


@differs("blocks[2]")
def residual_dropped_in_one_block():
    class Residual(eqx.Module):
        linear: eqx.nn.Linear

        def __call__(self, x):
            h = jax.nn.tanh(self.linear(x))
            return x + h  # <- a

    class Block(Residual):
        def __call__(self, x):
            return jax.nn.tanh(self.linear(x))

    class Net(eqx.Module):
        blocks: list
        readout: eqx.nn.Linear

        def __call__(self, x):
            for block in self.blocks:
                x = block(x)
            return self.readout(x)

    def loss_fn(model, x, y):
        return mean_square(jax.vmap(model)(x), y)

    *keys, last = jax.random.split(jax.random.key(0), 6)
    blocks = [Residual(eqx.nn.Linear(8, 8, key=key)) for key in keys]
    readout = eqx.nn.Linear(8, 2, key=last)
    ported = [*blocks[:2], Block(blocks[2].linear), *blocks[3:]]
    args = (normal(1, 4, 8), normal(2, 4, 2))
    return loss_fn, Net(blocks, readout), loss_fn, Net(ported, readout), args


@differs("Block_3/Dense_1")
def skip_connection_lost_before_the_last_block():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8)(nn.swish(nn.Dense(8)(x)))

    class Reference(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + Block()(x)
            x = x + Block()(x)
            x = x + Block()(x)  # <- a
            return x + Block()(x)

    class Port(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + Block()(x)
            x = x + Block()(x)
            x = Block()(x)
            return x + Block()(x)

    def loss_a(params, x):
        return jnp.mean(Reference().apply(params, x) ** 2)

    def loss_b(params, x):
        return jnp.mean(Port().apply(params, x) ** 2)

    x = normal(0, 4, 8)
    params = Reference().init(jax.random.key(1), x)
    return loss_a, params, loss_b, params, (x,)


@differs("Conv_1")
def stride_with_padding_on_both_sides():
    class Reference(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3))(x))
            x = nn.Conv(4, (3, 3), strides=2)(x)  # <- a
            return nn.Dense(2)(nn.relu(x).mean((1, 2)))

    class Port(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3), padding=1)(x))
            x = nn.Conv(4, (3, 3), strides=2, padding=1)(x)  # <- b
            return nn.Dense(2)(nn.relu(x).mean((1, 2)))

    def loss_a(params, x, y):
        return mean_square(Reference().apply(params, x), y)

    def loss_b(params, x, y):
        return mean_square(Port().apply(params, x), y)

    x = normal(0, 2, 8, 8, 3)
    params = Reference().init(jax.random.key(1), x)
    return loss_a, params, loss_b, params, (x, normal(2, 2, 2))


@differs("conv")
def kernel_flipped():
    def reference(params, x, y):
        layout = ("NHWC", "HWIO", "NHWC")
        h = tap(jax.nn.relu(x), "rectified")
        kernel = params["kernel"]
        h = lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=layout)  # <- a
        return mean_square(tap(h, "conv").mean((1, 2)), y)

    def port(params, x, y):
        layout = ("NHWC", "HWIO", "NHWC")
        h = tap(jax.nn.relu(x), "rectified")
        kernel = params["kernel"][::-1, ::-1]  # <- b
        h = lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=layout)
        return mean_square(tap(h, "conv").mean((1, 2)), y)

    params = {"kernel": 0.3 * normal(0, 3, 3, 2, 4)}
    return reference, params, port, params, (normal(1, 2, 6, 6, 2), normal(2, 2, 4))


@differs("pooled")
def average_that_counts_the_padding():
    def window_sum(x):
        return lax.reduce_window(x, 0.0, lax.add, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")

    def reference(params, x, y):
        h = tap(jnp.einsum("nhwi,io->nhwo", x, params["w"]), "h")
        pooled = tap(window_sum(h) / 9.0, "pooled")  # <- a
        return mean_square(jax.nn.relu(pooled).mean((1, 2)), y)

    def port(params, x, y):
        h = tap(jnp.einsum("nhwi,io->nhwo", x, params["w"]), "h")
        pooled = tap(window_sum(h) / window_sum(jnp.ones_like(h)), "pooled")  # <- b
        return mean_square(jax.nn.relu(pooled).mean((1, 2)), y)

    params = {"w": weights(0, 2, 4)}
    return reference, params, port, params, (normal(1, 2, 6, 6, 2), normal(2, 2, 4))


@differs("logits")
def tied_readout_transposed():
    def reference(params, tokens, labels):
        h = tap(params["embedding"][tokens], "embedded")
        h = tap(jnp.tanh(h @ params["w"]), "h")
        logits = tap(h @ params["embedding"].T, "logits")  # <- a
        return -jnp.mean(log_likelihood(logits, labels))

    def port(params, tokens, labels):
        h = tap(params["embedding"][tokens], "embedded")
        h = tap(jnp.tanh(h @ params["w"]), "h")
        logits = tap(h @ params["embedding"], "logits")  # <- b
        return -jnp.mean(log_likelihood(logits, labels))

    params = {"embedding": normal(0, 16, 16), "w": weights(1, 16, 16)}
    tokens = jnp.array([3, 1, 4, 1, 5, 9])
    return reference, params, port, params, (tokens, (tokens + 1) % 16)


@differs("embedded")
def embedding_scaled_without_its_square_root():
    def reference(params, tokens, labels):
        rows = tap(jnp.take(params["embedding"], tokens, axis=0), "rows")
        h = tap(rows * jnp.sqrt(16.0), "embedded")  # <- a
        logits = tap(jax.nn.gelu(h) @ params["out"], "logits")
        return -jnp.mean(log_likelihood(logits, labels))

    def port(params, tokens, labels):
        rows = tap(jnp.take(params["embedding"], tokens, axis=0), "rows")
        h = tap(rows * 16.0, "embedded")  # <- b
        logits = tap(jax.nn.gelu(h) @ params["out"], "logits")
        return -jnp.mean(log_likelihood(logits, labels))

    params = {"embedding": 0.1 * normal(0, 10, 16), "out": weights(1, 16, 10)}
    tokens = jnp.array([3, 1, 4, 1, 5, 9])
    return reference, params, port, params, (tokens, (tokens + 1) % 10)


@differs("dropped")
def dropout_without_its_scale():
    def reference(params, x, y, key):
        h = tap(jax.nn.relu(x @ params["in"]), "h")
        kept = jax.random.bernoulli(key, 0.8, h.shape)
        h = tap(jnp.where(kept, h / 0.8, 0.0), "dropped")  # <- a
        return mean_square(h @ params["out"], y)

    def port(params, x, y, key):
        h = tap(jax.nn.relu(x @ params["in"]), "h")
        kept = jax.random.bernoulli(key, 0.8, h.shape)
        h = tap(jnp.where(kept, h, 0.0), "dropped")  # <- b
        return mean_square(h @ params["out"], y)

    params = projections(0, "in out", 8)
    args = (normal(2, 4, 8), normal(3, 4, 8), jax.random.key(4))
    return reference, params, port, params, args


@differs("down")
def gate_and_value_swapped():
    class SwiGLU(eqx.Module):
        gate: eqx.nn.Linear
        up: eqx.nn.Linear
        down: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.gate = eqx.nn.Linear(8, 16, use_bias=False, key=keys[0])
            self.up = eqx.nn.Linear(8, 16, use_bias=False, key=keys[1])
            self.down = eqx.nn.Linear(16, 8, use_bias=False, key=keys[2])

        def __call__(self, x):
            gate, up = self.gate(x), self.up(x)
            return self.down(jax.nn.silu(gate) * up)  # <- a

    class Port(SwiGLU):
        def __call__(self, x):
            gate, up = self.gate(x), self.up(x)
            return self.down(gate * jax.nn.silu(up))  # <- b

    def loss_fn(model, x, y):
        return mean_square(jax.vmap(model)(x), y)

    a, b = SwiGLU(jax.random.key(0)), Port(jax.random.key(0))
    return loss_fn, a, loss_fn, b, (normal(1, 4, 8), normal(2, 4, 8))


@differs("mixed")
def expert_weights_not_normalised():
    def reference(params, x, y):
        gate = tap(jax.nn.softmax(x @ params["gate"]), "gate")
        top, chosen = lax.top_k(gate, 2)
        top = top / jnp.sum(top, axis=-1, keepdims=True)  # <- a
        experts = jnp.einsum("nd,nkde->nke", x, params["experts"][chosen])
        mixed = tap(jnp.einsum("nk,nke->ne", top, experts), "mixed")
        return mean_square(mixed, y)

    def port(params, x, y):
        gate = tap(jax.nn.softmax(x @ params["gate"]), "gate")
        top, chosen = lax.top_k(gate, 2)
        experts = jnp.einsum("nd,nkde->nke", x, params["experts"][chosen])
        mixed = tap(jnp.einsum("nk,nke->ne", top, experts), "mixed")
        return mean_square(mixed, y)

    params = {"gate": weights(0, 8, 4), "experts": weights(1, 4, 8, 8)}
    return reference, params, port, params, (normal(2, 5, 8), normal(3, 5, 8))
