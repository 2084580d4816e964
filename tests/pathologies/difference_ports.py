"""Pairs of a model and its port to another framework."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from gradjax import tap
from pathologies.difference_case import Pair, log_likelihood, mean_square, normal, planted

PAIRS: list[Pair] = []
differs = functools.partial(planted, PAIRS)


def linen_loss(model):
    def loss_fn(params, x, y):
        return mean_square(model.apply(params, x), y)

    return loss_fn


@differs("LayerNorm_0")
def linen_to_plain_with_the_eps_of_torch():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8)(x)
            x = nn.LayerNorm()(x)  # <- a
            return nn.Dense(2)(nn.relu(x))

    def port(params, x, y):
        h = tap(x @ params["0.weight"] + params["0.bias"], "0")
        mean, variance = jnp.mean(h, -1, keepdims=True), jnp.var(h, -1, keepdims=True)
        h = (h - mean) / jnp.sqrt(variance + 1e-5)  # <- b
        h = tap(params["1.weight"] * h + params["1.bias"], "1")
        out = tap(jax.nn.relu(h) @ params["2.weight"] + params["2.bias"], "2")
        return mean_square(out, y)

    x = 0.02 * normal(0, 4, 8)
    params = Net().init(jax.random.key(1), x)
    dense0, norm, dense1 = (params["params"][k] for k in ("Dense_0", "LayerNorm_0", "Dense_1"))
    ported = {
        "0.weight": dense0["kernel"],
        "0.bias": dense0["bias"][None],
        "1.weight": norm["scale"][None],
        "1.bias": norm["bias"][None],
        "2.weight": dense1["kernel"],
        "2.bias": dense1["bias"][None],
    }
    names = {"Dense_0": "0", "LayerNorm_0": "1", "Dense_1": "2"}
    return linen_loss(Net()), params, port, ported, (x, normal(2, 4, 2)), {"names": names}


@differs("hidden_1")
def linen_to_plain_without_one_bias():
    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(3):
                layer = nn.Dense(8, bias_init=nn.initializers.normal(0.3), name=f"hidden_{i}")
                x = nn.tanh(layer(x))  # <- a
            return x

    def port(params, x, y):
        h = tap(x @ params["w"][0] + params["b"][:1], "h0")
        h = tap(jnp.tanh(h) @ params["w"][1], "h1")  # <- b
        h = tap(jnp.tanh(h) @ params["w"][2] + params["b"][2:], "h2")
        return mean_square(jnp.tanh(h), y)

    x = normal(0, 4, 8)
    params = MLP().init(jax.random.key(1), x)
    layers = [params["params"][f"hidden_{i}"] for i in range(3)]
    ported = {
        "w": [layer["kernel"] for layer in layers],
        "b": jnp.stack([layer["bias"] for layer in layers]),
    }
    names = {f"hidden_{i}": f"h{i}" for i in range(3)}
    return linen_loss(MLP()), params, port, ported, (x, normal(2, 4, 8)), {"names": names}


@differs("Dense_1")
def linen_to_nnx_with_another_activation():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8)(x)
            x = nn.swish(x)  # <- a
            return nn.Dense(2)(x)

    class Port(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(4, 8, rngs=rngs)
            self.readout = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            x = self.hidden(x)
            x = nnx.gelu(x)  # <- b
            return self.readout(x)

    def port_loss(model, x, y):
        return mean_square(model(x), y)

    x = normal(0, 6, 4)
    params = Net().init(jax.random.key(1), x)
    model = Port(nnx.Rngs(0))
    for layer, name in ((model.hidden, "Dense_0"), (model.readout, "Dense_1")):
        layer.kernel[...] = params["params"][name]["kernel"]
        layer.bias[...] = params["params"][name]["bias"]
    names = {"Dense_0": "hidden", "Dense_1": "readout"}
    return linen_loss(Net()), params, port_loss, model, (x, normal(2, 6, 2)), {"names": names}


@differs("layers[1]")
def equinox_to_plain_with_a_weight_not_transposed():
    class Net(eqx.Module):
        layers: list

        def __call__(self, x):
            for layer in self.layers:
                x = jax.nn.relu(layer(x))  # <- a
            return x

    def loss_fn(model, x, y):
        return mean_square(jax.vmap(model)(x), y)

    def port(params, x, y):
        (w0, b0), (w1, b1), (w2, b2) = params
        h = tap(x @ w0.T + b0[None], "h0")
        h = tap(jax.nn.relu(h) @ w1 + b1[None], "h1")  # <- b
        h = tap(jax.nn.relu(h) @ w2.T + b2[None], "h2")
        return mean_square(jax.nn.relu(h), y)

    keys = jax.random.split(jax.random.key(0), 3)
    model = Net([eqx.nn.Linear(8, 8, key=key) for key in keys])
    params = [(layer.weight, layer.bias) for layer in model.layers]
    names = {f"layers[{i}]": f"h{i}" for i in range(3)}
    args = (normal(1, 4, 8), normal(2, 4, 8))
    return loss_fn, model, port, params, args, {"names": names}


@differs("attention")
def equinox_to_plain_with_a_scale_of_all_heads():
    class Attention(eqx.Module):
        query: eqx.nn.Linear
        key: eqx.nn.Linear

        def __call__(self, x):
            q = jax.vmap(self.query)(x).reshape(5, 2, 4)
            k = jax.vmap(self.key)(x).reshape(5, 2, 4)
            scores = jnp.einsum("qhd,khd->hqk", q, k) / 4**0.5  # <- a
            return jnp.einsum("hqk,kd->qd", jax.nn.softmax(scores), x)

    class Encoder(eqx.Module):
        attention: Attention
        readout: eqx.nn.Linear

        def __call__(self, x):
            return jax.vmap(self.readout)(x + self.attention(x))

    def loss_fn(model, x, y):
        return mean_square(model(x), y)

    def port(params, x, y):
        q = tap(x @ params["query"].T, "query").reshape(5, 2, 4)
        k = tap(x @ params["key"].T, "key").reshape(5, 2, 4)
        scores = jnp.einsum("qhd,khd->hqk", q, k) / 8**0.5  # <- b
        mixed = tap(jnp.einsum("hqk,kd->qd", jax.nn.softmax(scores), x), "mixed")
        return mean_square((x + mixed) @ params["readout"].T, y)

    keys = jax.random.split(jax.random.key(0), 3)
    query, key, readout = (eqx.nn.Linear(8, 8, use_bias=False, key=k) for k in keys)
    params = {"query": query.weight, "key": key.weight, "readout": readout.weight}
    names = {"attention": "mixed", "attention.query": "query", "attention.key": "key"}
    args = (3.0 * normal(1, 5, 8), normal(2, 5, 8))
    model = Encoder(Attention(query, key), readout)
    return loss_fn, model, port, params, args, {"names": names}


@differs("readout")
def nnx_to_equinox_with_maximum_pooling():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Linear(4, 8, rngs=rngs)
            self.readout = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            h = nnx.relu(self.embed(x))
            pooled = jnp.mean(h, axis=1)  # <- a
            return self.readout(pooled)

    class Port(eqx.Module):
        embed: eqx.nn.Linear
        readout: eqx.nn.Linear

        def __call__(self, x):
            h = jax.nn.relu(jax.vmap(self.embed)(x))
            pooled = jnp.max(h, axis=0)  # <- b
            return self.readout(pooled)

    def linear(layer):
        new = eqx.nn.Linear(*layer.kernel.shape, key=jax.random.key(0))
        arrays = (layer.kernel[...].T, layer.bias[...])
        return eqx.tree_at(lambda new: (new.weight, new.bias), new, arrays)

    def loss_a(model, x, labels):
        return -jnp.mean(log_likelihood(model(x), labels))

    def loss_b(model, x, labels):
        return -jnp.mean(log_likelihood(jax.vmap(model)(x), labels))

    model = Net(nnx.Rngs(0))
    port = Port(linear(model.embed), linear(model.readout))
    return loss_a, model, loss_b, port, (normal(1, 3, 5, 4), jnp.arange(3))


@differs("Block_1/RMSNorm_0")
def linen_decoder_to_plain_with_one_norm_of_the_sum():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.RMSNorm(use_scale=False)(x)  # <- a
            return x + nn.Dense(8, use_bias=False)(nn.silu(h))

    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(10, 8)(tokens)
            for _ in range(3):
                x = Block()(x)
            return nn.Dense(10, use_bias=False)(x)

    def loss_fn(params, tokens, labels):
        return -jnp.mean(log_likelihood(Decoder().apply(params, tokens), labels))

    def rms_norm(x, eps):
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps)

    def block(i, w, x):
        h = tap(rms_norm(x, 1e-6), f"norm{i}")
        return tap(x + jax.nn.silu(h) @ w, f"block{i}")

    def port(params, tokens, labels):
        x = tap(params["embed"][tokens], "embed")
        x = block(0, params["w"][0], x)
        h = tap(x / (jnp.sum(x**2, axis=-1, keepdims=True) ** 0.5 + 1e-6), "norm1")  # <- b
        x = tap(x + jax.nn.silu(h) @ params["w"][1], "block1")
        x = block(2, params["w"][2], x)
        return -jnp.mean(log_likelihood(tap(x @ params["out"], "out"), labels))

    tokens = jnp.array([3, 1, 4, 1, 5, 9])
    params = Decoder().init(jax.random.key(0), tokens)
    tree = params["params"]
    blocks = [tree[f"Block_{i}"]["Dense_0"]["kernel"] for i in range(3)]
    ported = {"embed": tree["Embed_0"]["embedding"], "w": blocks, "out": tree["Dense_0"]["kernel"]}
    names = {"Embed_0": "embed", "Dense_0": "out"}
    names |= {f"Block_{i}": f"block{i}" for i in range(3)}
    names |= {f"Block_{i}/RMSNorm_0": f"norm{i}" for i in range(3)}
    args = (tokens, (tokens + 1) % 10)
    return loss_fn, params, port, ported, args, {"names": names}
