"""Equinox networks, each a function (seed, depth, ...) -> Problem; layer 3 has the path
`layers[3]`.

A model maps one example; the loss vmaps it.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

import gradjax
from pathologies.case import Problem
from pathologies.problems import GAIN, HE, UNIT, cross_entropy, digits, sequences

Init = Callable[..., Any] | None


def problem(model: eqx.Module, x, y) -> Problem:
    """Cross-entropy of the model as a function of its floating arrays."""
    loss_fn, params = gradjax.functional(
        lambda model, x, y: cross_entropy(jax.vmap(model)(x), y), model
    )
    return Problem(loss_fn, params, (x, y))


def linear(key, n: int, m: int, init: Init = None) -> eqx.nn.Linear:
    """A map from n to m features; `init` on a kernel (n, m) replaces Equinox's own and makes the
    bias zero."""
    layer = eqx.nn.Linear(n, m, key=key)
    if init is None:
        return layer
    return eqx.tree_at(lambda q: (q.weight, q.bias), layer, (init(key, (n, m)).T, jnp.zeros(m)))


class MLP(eqx.Module):
    """Linear, [LayerNorm], phi."""

    layers: list
    norms: list
    readout: eqx.nn.Linear
    act: Callable = eqx.field(static=True)
    cut: int = eqx.field(static=True)

    def __init__(self, key, depth, width, act, init, norm, cut):
        keys = jax.random.split(key, depth + 1)
        self.layers = [
            linear(k, 64 if i == 0 else width, width, init) for i, k in enumerate(keys[:-1])
        ]
        self.norms = [eqx.nn.LayerNorm(width) for _ in range(depth)] if norm else []
        self.readout = linear(keys[-1], width, 10, UNIT)
        self.act, self.cut = act, cut

    def __call__(self, h):
        for i, layer in enumerate(self.layers):
            h = layer(h)
            h = self.act(self.norms[i](h) if self.norms else h)
            h = jax.lax.stop_gradient(h) if i == self.cut else h
        return self.readout(h)


def mlp(
    seed: int,
    depth: int,
    width: int = 64,
    *,
    act: Callable = jax.nn.relu,
    init: Init = HE,
    norm: str = "",
    cut: int = -1,
    batch: int = 32,
    scale: float = 1.0,
):
    """A multilayer perceptron on digits; init=None: Equinox's default."""
    return problem(
        MLP(jax.random.key(seed), depth, width, act, init, norm, cut),
        *digits(seed, batch, scale=scale),
    )


class CNN(eqx.Module):
    """3x3 convolutions that wrap around, on (channels, 8, 8)."""

    layers: list
    readout: eqx.nn.Linear
    act: Callable = eqx.field(static=True)

    def __init__(self, key, depth, width, act, gain):
        keys = jax.random.split(key, depth + 1)
        self.act, self.layers = act, []
        for i, k in enumerate(keys[:-1]):
            layer = eqx.nn.Conv2d(
                width if i else 1, width, 3, padding=1, padding_mode="CIRCULAR", key=k
            )
            shape = layer.weight.shape
            weight = gain * (shape[1] * 9) ** -0.5 * jax.random.normal(k, shape)
            self.layers.append(
                eqx.tree_at(lambda q: (q.weight, q.bias), layer, (weight, 0 * layer.bias))
            )
        self.readout = linear(keys[-1], 64 * width, 10, UNIT)

    def __call__(self, h):
        h = jnp.moveaxis(h, -1, 0)
        for layer in self.layers:
            h = self.act(layer(h))
        return self.readout(h.ravel())


def cnn(
    seed: int,
    depth: int,
    width: int = 16,
    *,
    act: Callable = jax.nn.relu,
    gain: float = GAIN,
    batch: int = 32,
):
    """A convolutional network on the 8x8 images."""
    return problem(
        CNN(jax.random.key(seed), depth, width, act, gain), *digits(seed, batch, image=True)
    )


class LeNet(eqx.Module):
    """LeNet-5's layers on 8x8 images with Equinox's default initialisers."""

    layers: list
    dense: list
    pool: eqx.nn.AvgPool2d
    readout: eqx.nn.Linear
    act: Callable = eqx.field(static=True)

    def __init__(self, key, act):
        k = jax.random.split(key, 5)
        self.layers = [
            eqx.nn.Conv2d(1, 6, 3, padding=1, key=k[0]),
            eqx.nn.Conv2d(6, 16, 3, padding=1, key=k[1]),
        ]
        self.dense = [eqx.nn.Linear(64, 120, key=k[2]), eqx.nn.Linear(120, 84, key=k[3])]
        self.pool, self.readout, self.act = (
            eqx.nn.AvgPool2d(2, 2),
            eqx.nn.Linear(84, 10, key=k[4]),
            act,
        )

    def __call__(self, h):
        h = jnp.moveaxis(h, -1, 0)
        for layer in self.layers:
            h = self.pool(self.act(layer(h)))
        h = h.ravel()
        for layer in self.dense:
            h = self.act(layer(h))
        return self.readout(h)


def lenet(seed: int, depth: int, *, act: Callable = jax.nn.relu, batch: int = 32):
    """LeNet-5; `depth` is 4, its hidden layers."""
    return problem(LeNet(jax.random.key(seed), act), *digits(seed, batch, image=True))


class Block(eqx.Module):
    """h + scale * W_2 phi(W_1 h), with a LayerNorm before W_1 ("pre"), behind the sum ("post"), or
    none."""

    first: eqx.nn.Linear
    second: eqx.nn.Linear
    norm: eqx.nn.LayerNorm | None
    scale: jax.Array | None
    act: Callable = eqx.field(static=True)
    wiring: str = eqx.field(static=True)

    def __call__(self, h):
        a = self.second(self.act(self.first(self.norm(h) if self.wiring == "pre" else h)))
        h = h + (a if self.scale is None else self.scale * a)
        return self.norm(h) if self.wiring == "post" else h


class ResNet(eqx.Module):
    """A stem, residual blocks named `layers`, a read-out."""

    stem: eqx.nn.Linear
    layers: list
    readout: eqx.nn.Linear

    def __call__(self, h):
        h = self.stem(h)
        for layer in self.layers:
            h = layer(h)
        return self.readout(h)


def resnet(
    seed: int,
    depth: int,
    width: int = 64,
    *,
    first: Init = HE,
    second: Init = UNIT,
    act: Callable = jax.nn.relu,
    norm: str = "",
    scale: float | None = None,
    batch: int = 32,
):
    """A residual network of dense blocks on digits; `scale` is a learned scalar's start, None: no
    scalar."""
    keys = jax.random.split(jax.random.key(seed), 2 * depth + 2)
    blocks = [
        Block(
            linear(keys[2 * i], width, width, first),
            linear(keys[2 * i + 1], width, width, second),
            eqx.nn.LayerNorm(width) if norm else None,
            None if scale is None else jnp.full((), scale, jnp.float32),
            act,
            norm,
        )
        for i in range(depth)
    ]
    return problem(
        ResNet(linear(keys[-2], 64, width, UNIT), blocks, linear(keys[-1], width, 10, UNIT)),
        *digits(seed, batch),
    )


class Sequence(eqx.Module):
    """A cell scanned over time; the hidden state is named `h`."""

    cell: eqx.Module
    readout: eqx.nn.Linear

    def __call__(self, x):
        lstm = isinstance(self.cell, eqx.nn.LSTMCell)
        start = jnp.zeros(self.cell.hidden_size)

        def step(state, x):
            new = self.cell(x, state)
            h = gradjax.tap(new[0] if lstm else new, "h")
            return ((h, gradjax.tap(new[1], "c")) if lstm else h), None

        state, _ = jax.lax.scan(step, (start, start) if lstm else start, x)
        return self.readout(state[0] if lstm else state)


def rnn(
    seed: int,
    seq_len: int,
    cell: Callable,
    width: int = 32,
    *,
    bias: float | None = None,
    batch: int = 32,
):
    """`cell(features, width, key=...)` on normal sequences; `bias` fills the forget gate's bias of
    an LSTM."""
    keys = jax.random.split(jax.random.key(seed))
    made = cell(8, width, key=keys[0])
    if bias is not None:  # Equinox orders an LSTM's gates i, f, g, o
        made = eqx.tree_at(lambda c: c.bias, made, made.bias.at[width : 2 * width].set(bias))
    return problem(
        Sequence(made, eqx.nn.Linear(width, 10, key=keys[1])), *sequences(seed, seq_len, batch)
    )


class EncoderBlock(eqx.Module):
    """Attention and a two-layer MLP on (tokens, width); attention's logits are multiplied by
    `sharpen`."""

    attn: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    norm_attn: eqx.nn.LayerNorm
    norm_mlp: eqx.nn.LayerNorm
    wiring: str = eqx.field(static=True)
    sharpen: float = eqx.field(static=True)

    def __call__(self, h):
        attend = lambda z: self.attn(self.sharpen * z, z, z)
        mlp = lambda z: jax.vmap(lambda t: self.down(jax.nn.gelu(self.up(t))))(z)
        if self.wiring == "noskip":
            return attend(h)
        if self.wiring == "post":
            h = jax.vmap(self.norm_attn)(h + attend(h))
            return jax.vmap(self.norm_mlp)(h + mlp(h))
        h = h + attend(jax.vmap(self.norm_attn)(h))
        return h + mlp(jax.vmap(self.norm_mlp)(h))


class Transformer(eqx.Module):
    """Encoder blocks over the eight rows of a digit as tokens, mean-pooled."""

    embed: eqx.nn.Linear
    places: jax.Array
    layers: list
    readout: eqx.nn.Linear

    def __call__(self, x):
        h = jax.vmap(self.embed)(x.reshape(8, 8)) + self.places
        for layer in self.layers:
            h = layer(h)
        return self.readout(h.mean(0))


def transformer(
    seed: int,
    depth: int,
    width: int = 32,
    *,
    wiring: str = "pre",
    sharpen: float = 1.0,
    batch: int = 16,
):
    """A transformer encoder on digits; `sharpen` far above 1 is a missing 1 / sqrt(d) in the
    logits."""
    keys = jax.random.split(jax.random.key(seed), depth + 1)

    def block(key):
        a, b, c = jax.random.split(key, 3)
        xavier = jax.nn.initializers.xavier_uniform()
        return EncoderBlock(
            eqx.nn.MultiheadAttention(4, width, key=a),
            linear(b, width, 2 * width, xavier),
            linear(c, 2 * width, width, xavier),
            eqx.nn.LayerNorm(width),
            eqx.nn.LayerNorm(width),
            wiring,
            sharpen,
        )

    a, b, c = jax.random.split(keys[-1], 3)
    places = 0.5 * jax.random.normal(b, (8, width))
    model = Transformer(
        linear(a, 8, width, UNIT), places, [block(k) for k in keys[:-1]], linear(c, width, 10, UNIT)
    )
    return problem(model, *digits(seed, batch))
