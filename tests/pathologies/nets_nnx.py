"""Flax NNX networks, each a function (seed, depth, ...) -> Problem; layer 3 has the path
`layers[3]`."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import gradjax
from pathologies.case import Problem
from pathologies.problems import HE, UNIT, cross_entropy, digits, pool, sequences

Init = Callable[..., Any]
zeros = nnx.initializers.zeros_init()
List = getattr(nnx, "List", list)  # Flax before 0.12 takes plain lists


def problem(model: nnx.Module, x, y) -> Problem:
    """Cross-entropy of the model as a function of its floating parameters."""
    loss_fn, params = gradjax.functional(lambda model, x, y: cross_entropy(model(x), y), model)
    return Problem(loss_fn, params, (x, y))


class MLP(nnx.Module):
    """Linear, [norm], phi."""

    def __init__(self, depth, width, act, kernel, bias, norm, rngs, skipped=-1, cut=-1):
        sizes = [64] + [width] * depth
        options = {"kernel_init": kernel, "bias_init": bias, "rngs": rngs}
        self.layers = List([nnx.Linear(a, b, **options) for a, b in itertools.pairwise(sizes)])
        make = {"batch": nnx.BatchNorm, "layer": nnx.LayerNorm}.get(norm)
        self.norms = List([make(width, rngs=rngs) for _ in range(depth)] if make else [])
        self.readout = nnx.Linear(width, 10, kernel_init=UNIT, rngs=rngs)
        self.act, self.skipped, self.cut = act, skipped, cut

    def __call__(self, h):
        for i, layer in enumerate(self.layers):
            z = layer(h)
            z = self.act(self.norms[i](z) if len(self.norms) else z)
            z = jax.lax.stop_gradient(z) if i == self.cut else z
            h = h if i == self.skipped else z
        return self.readout(h)


def mlp(
    seed: int,
    depth: int,
    width: int = 64,
    *,
    act: Callable = nnx.relu,
    kernel: Init = HE,
    bias: Init = zeros,
    norm: str = "",
    batch: int = 32,
    scale: float = 1.0,
    **fields,
):
    """A multilayer perceptron on digits."""
    model = MLP(depth, width, act, kernel, bias, norm, nnx.Rngs(seed), **fields)
    return problem(model, *digits(seed, batch, scale=scale))


class CNN(nnx.Module):
    """3x3 convolutions that wrap around."""

    def __init__(self, depth, width, act, kernel, norm, rngs):
        sizes = [1] + [width] * depth
        options = {"padding": "CIRCULAR", "kernel_init": kernel, "rngs": rngs}
        self.layers = List(
            [nnx.Conv(a, b, (3, 3), **options) for a, b in itertools.pairwise(sizes)]
        )
        self.norms = List([nnx.BatchNorm(width, rngs=rngs) for _ in range(depth)] if norm else [])
        self.readout = nnx.Linear(64 * width, 10, kernel_init=UNIT, rngs=rngs)
        self.act = act

    def __call__(self, h):
        for i, layer in enumerate(self.layers):
            h = layer(h)
            h = self.act(self.norms[i](h) if len(self.norms) else h)
        return self.readout(h.reshape(len(h), -1))


def cnn(
    seed: int,
    depth: int,
    width: int = 16,
    *,
    act=nnx.relu,
    kernel: Init = HE,
    norm="",
    batch: int = 32,
):
    """A convolutional network on the 8x8 images."""
    model = CNN(depth, width, act, kernel, norm, nnx.Rngs(seed))
    return problem(model, *digits(seed, batch, image=True))


class LeNet(nnx.Module):
    """LeNet-5's layers on 8x8 images with NNX's default initialisers."""

    def __init__(self, act, rngs):
        self.layers = List([nnx.Conv(1, 6, (3, 3), rngs=rngs), nnx.Conv(6, 16, (3, 3), rngs=rngs)])
        self.dense = List([nnx.Linear(64, 120, rngs=rngs), nnx.Linear(120, 84, rngs=rngs)])
        self.readout, self.act = nnx.Linear(84, 10, rngs=rngs), act

    def __call__(self, h):
        for layer in self.layers:
            h = pool(self.act(layer(h)))
        h = h.reshape(len(h), -1)
        for layer in self.dense:
            h = self.act(layer(h))
        return self.readout(h)


def lenet(seed: int, depth: int, *, act=nnx.tanh, batch: int = 32):
    """LeNet-5; `depth` is 4, its hidden layers."""
    return problem(LeNet(act, nnx.Rngs(seed)), *digits(seed, batch, image=True))


class Block(nnx.Module):
    """h + scale * W_2 relu([norm] W_1 relu([norm] h))."""

    def __init__(self, width, norm, kernel, last, scale, rngs):
        self.first = nnx.Linear(width, width, kernel_init=kernel, rngs=rngs)
        self.second = nnx.Linear(width, width, kernel_init=last, rngs=rngs)
        make = {"batch": nnx.BatchNorm, "layer": nnx.LayerNorm}.get(norm)
        self.norm_first, self.norm_second = (
            make(width, rngs=rngs) if make else None for _ in range(2)
        )
        self.scale = None if scale is None else nnx.Param(jnp.full((), scale, jnp.float32))

    def __call__(self, h):
        normed = lambda norm, z: nnx.relu(z if norm is None else norm(z))
        a = self.second(normed(self.norm_second, self.first(normed(self.norm_first, h))))
        return h + (a if self.scale is None else self.scale[...] * a)


class ResNet(nnx.Module):
    """A stem, residual blocks named `layers`, a read-out."""

    def __init__(self, depth, width, norm, kernel, last, scale, rngs):
        self.stem = nnx.Linear(64, width, kernel_init=UNIT, rngs=rngs)
        self.layers = List([Block(width, norm, kernel, last, scale, rngs) for _ in range(depth)])
        self.readout = nnx.Linear(width, 10, kernel_init=UNIT, rngs=rngs)

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
    norm: str = "",
    kernel: Init = HE,
    last: Init = HE,
    scale: float | None = None,
    batch: int = 32,
):
    """A residual network of dense blocks on digits."""
    model = ResNet(depth, width, norm, kernel, last, scale, nnx.Rngs(seed))
    return problem(model, *digits(seed, batch))


class Sequence(nnx.Module):
    """A cell run over time, read out at the last step."""

    def __init__(self, cell, width, rngs):
        self.rnn = nnx.RNN(cell)
        self.readout = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        return self.readout(self.rnn(x)[:, -1])


def rnn(
    seed: int,
    seq_len: int,
    cell: Callable,
    width: int = 32,
    *,
    batch: int = 32,
    scale: float = 1.0,
    **options,
):
    """`cell(features, width, rngs=...)` on normal sequences; a "layer" is a time step."""
    rngs = nnx.Rngs(seed)
    model = Sequence(cell(8, width, rngs=rngs, **options), width, rngs)
    return problem(model, *sequences(seed, seq_len, batch, scale=scale))


class EncoderBlock(nnx.Module):
    """Attention and a two-layer MLP, wired `pre`, `post` or `noskip` (attention only)."""

    def __init__(self, width, wiring, rngs):
        self.attn = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.norm_attn, self.norm_mlp = (nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.up, self.down = (
            nnx.Linear(width, 2 * width, rngs=rngs),
            nnx.Linear(2 * width, width, rngs=rngs),
        )
        self.wiring = wiring

    def __call__(self, h):
        mlp = lambda z: self.down(nnx.gelu(self.up(z)))
        if self.wiring == "noskip":
            return self.attn(h)
        if self.wiring == "post":
            h = self.norm_attn(h + self.attn(h))
            return self.norm_mlp(h + mlp(h))
        h = h + self.attn(self.norm_attn(h))
        return h + mlp(self.norm_mlp(h))


class Transformer(nnx.Module):
    """Encoder blocks over the eight rows of a digit as tokens, mean-pooled."""

    def __init__(self, depth, width, wiring, rngs):
        self.embed = nnx.Linear(8, width, rngs=rngs)
        self.places = nnx.Param(0.5 * jax.random.normal(rngs.params(), (1, 8, width)))
        self.layers = List([EncoderBlock(width, wiring, rngs) for _ in range(depth)])
        self.readout = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        h = self.embed(x.reshape(len(x), 8, 8)) + self.places[...]
        for layer in self.layers:
            h = layer(h)
        return self.readout(h.mean(1))


def transformer(seed: int, depth: int, width: int = 32, *, wiring: str = "pre", batch: int = 16):
    """A transformer encoder on digits."""
    return problem(Transformer(depth, width, wiring, nnx.Rngs(seed)), *digits(seed, batch))
