"""Flax Linen networks, each a function (seed, depth, ...) -> Problem; layers are numbered from 0 in
their names."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from pathologies.case import Problem
from pathologies.problems import HE, UNIT, cross_entropy, digits, pool, sequences

Init = Callable[..., Any]
zeros = nn.initializers.zeros


def problem(model: nn.Module, seed: int, x: Array, y: Array, **rngs: Array) -> Problem:
    """Cross-entropy of `model` as a function of its params; BatchNorm's statistics come back as
    aux."""
    keys = {"params": jax.random.key(seed), **rngs}
    variables = dict(model.init(keys, x))
    params = variables.pop("params")
    if not variables:
        return Problem(
            lambda p, x, y: cross_entropy(model.apply({"params": p}, x, rngs=rngs), y),
            params,
            (x, y),
        )

    def loss_fn(p, x, y, stats):
        logits, new = model.apply({"params": p, **stats}, x, mutable=["batch_stats"], rngs=rngs)
        return cross_entropy(logits, y), new

    return Problem(loss_fn, params, (x, y, variables), {"has_aux": True})


def normalize(kind: str, name: str, dtype: Any = None) -> Callable[[Array], Array]:
    """BatchNorm over the batch, LayerNorm, or nothing."""
    if kind == "batch":
        return nn.BatchNorm(use_running_average=False, name=name, dtype=dtype)
    return nn.LayerNorm(name=name, dtype=dtype) if kind == "layer" else lambda x: x


class Layer(nn.Module):
    """phi(norm(W h + b)), with a skip where `residual`."""

    width: int
    act: Callable = nn.relu
    kernel: Init = HE
    bias: Init = zeros
    norm: str = ""
    residual: bool = False

    @nn.compact
    def __call__(self, h):
        z = nn.Dense(self.width, kernel_init=self.kernel, bias_init=self.bias, name="dense")(h)
        a = self.act(normalize(self.norm, "norm")(z))
        return h + a if self.residual else a


class MLP(nn.Module):
    """Dense, [norm], phi, all in one compact method."""

    depth: int
    width: int
    act: Callable = nn.relu
    kernel: Init = HE
    bias: Init = zeros
    norm: str = ""
    dropout: float = 0.0
    dtype: Any = None
    cut: int = -1  # no gradient passes back from this layer
    skipped: int = -1  # this layer is computed and not used

    @nn.compact
    def __call__(self, h):
        h = h.reshape(len(h), -1)
        for i in range(self.depth):
            dense = nn.Dense(
                self.width,
                kernel_init=self.kernel,
                bias_init=self.bias,
                dtype=self.dtype,
                name=f"layers_{i}",
            )
            z = self.act(normalize(self.norm, f"norm_{i}", self.dtype)(dense(h)))
            if self.dropout:
                z = nn.Dropout(self.dropout, deterministic=False, name=f"dropout_{i}")(z)
            z = jax.lax.stop_gradient(z) if i == self.cut else z
            h = h if i == self.skipped else z
        return nn.Dense(10, kernel_init=UNIT, dtype=self.dtype, name="readout")(h)


class SetupMLP(nn.Module):
    """The same layers, made in `setup`."""

    depth: int
    width: int
    act: Callable = nn.relu
    kernel: Init = HE
    bias: Init = zeros
    norm: str = ""

    def setup(self):
        make = lambda: Layer(self.width, self.act, self.kernel, self.bias, self.norm)
        self.layers = [make() for _ in range(self.depth)]
        self.readout = nn.Dense(10, kernel_init=UNIT)

    def __call__(self, h):
        for layer in self.layers:
            h = layer(h)
        return self.readout(h)


class StackedMLP(nn.Module):
    """An embedding, `depth` layers as one nn.scan (rematerialised if `remat`), a read-out."""

    depth: int
    width: int
    act: Callable = nn.relu
    kernel: Init = HE
    bias: Init = zeros
    norm: str = ""
    residual: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, h):
        h = nn.Dense(self.width, kernel_init=UNIT, name="embed")(h)
        fields = (self.width, self.act, self.kernel, self.bias, self.norm, self.residual)
        layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
        stack = nn.scan(
            lambda layer, h, _: (layer(h), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        h, _ = stack(layer(*fields, name="layers"), h, None)
        return nn.Dense(10, kernel_init=UNIT, name="readout")(h)


class RematMLP(nn.Module):
    """Every layer rematerialised by itself, unrolled."""

    depth: int
    width: int
    act: Callable = nn.relu
    kernel: Init = HE
    bias: Init = zeros
    norm: str = ""

    @nn.compact
    def __call__(self, h):
        for i in range(self.depth):
            layer = nn.remat(Layer)(
                self.width, self.act, self.kernel, self.bias, self.norm, name=f"layers_{i}"
            )
            h = layer(h)
        return nn.Dense(10, kernel_init=UNIT, name="readout")(h)


def mlp(
    seed: int,
    depth: int,
    width: int = 64,
    *,
    kind: type = MLP,
    batch: int = 32,
    scale: float = 1.0,
    **fields,
):
    """A multilayer perceptron on digits; `kind` is one of the modules above."""
    model = kind(depth, width, **fields)
    rngs = {"dropout": jax.random.key(seed + 100)} if fields.get("dropout") else {}
    return problem(model, seed, *digits(seed, batch, scale=scale), **rngs)


class CNN(nn.Module):
    """3x3 convolutions that wrap around, one after the other."""

    depth: int
    width: int
    act: Callable = nn.relu
    kernel: Init = HE
    norm: str = ""

    @nn.compact
    def __call__(self, h):
        for i in range(self.depth):
            h = nn.Conv(
                self.width, (3, 3), padding="CIRCULAR", kernel_init=self.kernel, name=f"layers_{i}"
            )(h)
            h = self.act(normalize(self.norm, f"norm_{i}")(h))
        return nn.Dense(10, kernel_init=UNIT, name="readout")(h.reshape(len(h), -1))


class LeNet(nn.Module):
    """LeNet-5's layers on 8x8 images with Flax's default names and initialisers."""

    act: Callable = nn.tanh

    @nn.compact
    def __call__(self, h):
        for channels in (6, 16):
            h = pool(self.act(nn.Conv(channels, (3, 3))(h)))
        h = h.reshape(len(h), -1)
        for width in (120, 84):
            h = self.act(nn.Dense(width)(h))
        return nn.Dense(10)(h)


class VGG(nn.Module):
    """Pairs of 3x3 convolutions between max-pools."""

    @nn.compact
    def __call__(self, h):
        he = nn.initializers.he_normal()
        for i, channels in enumerate((16, 16, 32, 32, 64, 64)):
            h = nn.relu(nn.Conv(channels, (3, 3), kernel_init=he, name=f"layers_{i}")(h))
            h = nn.max_pool(h, (2, 2), strides=(2, 2)) if i % 2 else h
        return nn.Dense(10, name="readout")(
            nn.relu(nn.Dense(64, kernel_init=he, name="layers_6")(h.reshape(len(h), -1)))
        )


class Block(nn.Module):
    """h + scale * conv(relu(norm(conv(relu(norm h))))), or the same with dense maps
    (`space=()`)."""

    width: int
    space: tuple = (3, 3)
    norm: str = "batch"
    kernel: Init = HE
    last: Init = HE
    scale: float | None = (
        None  # a learned scalar that starts here (SkipInit, ReZero); None: no scalar
    )
    cut: bool = False

    @nn.compact
    def __call__(self, h):
        def affine(init, name):
            if not self.space:
                return nn.Dense(self.width, kernel_init=init, name=name)
            return nn.Conv(self.width, self.space, padding="CIRCULAR", kernel_init=init, name=name)

        a = affine(self.kernel, "first")(nn.relu(normalize(self.norm, "norm_first")(h)))
        a = affine(self.last, "second")(nn.relu(normalize(self.norm, "norm_second")(a)))
        if self.scale is not None:
            a = a * self.param("scale", nn.initializers.constant(self.scale), ())
        return h + (jax.lax.stop_gradient(a) if self.cut else a)


class ResNet(nn.Module):
    """A stem, `depth` residual blocks, a mean over positions, a read-out."""

    depth: int
    width: int
    space: tuple = (3, 3)
    norm: str = "batch"
    kernel: Init = HE
    last: Init = HE
    scale: float | None = None
    cut: int = -1

    @nn.compact
    def __call__(self, h):
        fields = (self.width, self.space, self.norm, self.kernel, self.last, self.scale)
        if self.space:
            h = nn.Conv(self.width, (3, 3), kernel_init=UNIT, name="stem")(h)
        else:
            h = nn.Dense(self.width, kernel_init=UNIT, name="stem")(h)
        for i in range(self.depth):
            h = Block(*fields, i == self.cut, name=f"block_{i}")(h)
        h = nn.relu(normalize(self.norm, "norm_out")(h))
        h = h.mean((1, 2)) if self.space else h
        return nn.Dense(10, kernel_init=UNIT, name="readout")(h)


def cnn(seed: int, depth: int, width: int = 16, *, kind: type = CNN, batch: int = 32, **fields):
    """A convolutional or residual network on the 8x8 images."""
    model = kind(depth, width, **fields) if kind in (CNN, ResNet) else kind(**fields)
    image = not (kind is ResNet and fields.get("space") == ())
    return problem(model, seed, *digits(seed, batch, image=image))


class Sequence(nn.Module):
    """A cell run over time, read out at the last step."""

    cell: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10, name="readout")(nn.RNN(self.cell, name="rnn")(x)[:, -1])


def rnn(seed: int, seq_len: int, cell: nn.Module, *, batch: int = 32, scale: float = 1.0):
    """A recurrent network on normal sequences; a "layer" is a time step."""
    return problem(Sequence(cell), seed, *sequences(seed, seq_len, batch, scale=scale))


class EncoderBlock(nn.Module):
    """Attention and a two-layer MLP, wired `pre`, `post`, `noskip` (attention only) or
    `nonorm`."""

    width: int
    heads: int = 4
    wiring: str = "pre"
    alpha: float = 1.0  # DeepNorm: LN(alpha h + f(h))
    kernel: Init = nn.initializers.xavier_uniform()
    out: Init = nn.initializers.xavier_uniform()
    act: Callable = nn.gelu

    @nn.compact
    def __call__(self, h):
        attention = nn.MultiHeadDotProductAttention(
            self.heads, kernel_init=self.kernel, out_kernel_init=self.out, name="attn"
        )
        if self.wiring == "noskip":
            return attention(h)

        def mlp(z):
            z = nn.Dense(2 * self.width, kernel_init=self.kernel, name="up")(z)
            return nn.Dense(self.width, kernel_init=self.out, name="down")(self.act(z))

        for branch, name in ((attention, "norm_attn"), (mlp, "norm_mlp")):
            norm = nn.LayerNorm(name=name) if self.wiring != "nonorm" else lambda z: z
            h = (
                norm(jnp.asarray(self.alpha, h.dtype) * h + branch(h))
                if self.wiring == "post"
                else h + branch(norm(h))
            )
        return h


class Transformer(nn.Module):
    """Encoder blocks over the eight rows of a digit as tokens, mean-pooled."""

    depth: int
    width: int = 32
    wiring: str = "pre"
    alpha: float = 1.0
    kernel: Init = nn.initializers.xavier_uniform()
    out: Init = nn.initializers.xavier_uniform()
    act: Callable = nn.gelu

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(self.width, name="embed")(x.reshape(len(x), 8, 8))
        h = h + self.param("places", nn.initializers.normal(0.5), (1, 8, self.width))
        fields = (self.width, 4, self.wiring, self.alpha, self.kernel, self.out, self.act)
        for i in range(self.depth):
            h = EncoderBlock(*fields, name=f"block_{i}")(h)
        h = nn.LayerNorm(name="norm_out")(h) if self.wiring == "pre" else h
        return nn.Dense(10, name="readout")(h.mean(1))


def transformer(seed: int, depth: int, width: int = 32, *, batch: int = 16, **fields):
    """A transformer encoder on digits."""
    return problem(Transformer(depth, width, **fields), seed, *digits(seed, batch))
