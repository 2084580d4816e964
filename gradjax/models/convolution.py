"""Convolutions, pooling, and networks of layers of different shapes as a list of parts.

    z[i, j, o] = sum over (a, b, c) of W[a, b, c, o] h[s i + a, s j + b, c] + b[o],   h (height, width, channels)

padded by zeros to the same size ("same"), not at all ("valid"), or with the image's opposite edge ("circular": a
convolution on a torus, for which mean field theory is exact; Xiao et al. 2018, arXiv 1806.05393).

`convolve` is the one place that chooses how a convolution is computed. On a CPU one of few channels is a product of
patches with a matrix: a patch gives a whole tile of outputs, so that the matrix, which holds the kernel once for each
output of the tile, is large enough to keep a core busy. Forward pass and gradient on one core, batch 128, time of
XLA's convolution and of plain patches (one output each, im2col) over that of tiles:

                                           XLA           im2col        (in brackets: 4 seeds under one vmap)
    LeNet-5, 28 x 28, 5 x 5 x 1 -> 6       3.9  (5.2)    3.8  (8.4)
    LeNet-5, 14 x 14, 5 x 5 x 6 -> 16      2.2  (4.2)    1.8  (3.0)
    ResNet,  28 x 28, 3 x 3 x 16 -> 16     0.36          0.91
    ResNet,  14 x 14, 3 x 3 x 32 -> 32     0.39          0.90
    ResNet,  7 x 7,   3 x 3 x 64 -> 64     0.31          0.49

so tiles serve 5 x 5 kernels of few channels, and XLA the others. A vmap over seeds turns XLA's into a grouped one (at
32 channels 4 seeds take 4 times as long per seed as one alone): train wide convolutions one seed per lane on a CPU.

Pooling is the maximum of four slices: XLA's windowed maximum takes 16 to 34 times as long, mostly for its gradient.

Cost of analysis: a state has height x width x channels entries; spectra are for small images.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gradjax.initializers import bias
from gradjax.models.layers import Activation, Dense, Dropout, image_of, normalize, weight
from gradjax.step import Links, Scan

PyTree = Any
# Kernels of at least this side, with channels in times channels out up to this, are tiles on a CPU.
TILED_SIDE, TILED_CHANNELS = 5, 96


# -- the convolution -------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("stride", "padding"), inline=True)  # outside a jit one program, not forty
def convolve(h: Array, kernel: Array, stride: int = 1, padding: str = "same") -> Array:
    """The convolution of images with a kernel, by whichever way is faster here (see the module).

    Args:
      h: (..., height, width, channels in).
      kernel: (rows, columns, channels in, channels out).
      stride: of both axes.
      padding: "same", "valid" or "circular".

    Returns:
      (..., ceil(height / stride), ceil(width / stride), channels out); valid: of the height - rows + 1 that fit.

    >>> convolve(jnp.ones((8, 8, 1)), jnp.ones((3, 3, 1, 2)))[0, 0]      # a corner sees 4 of its 9 neighbours
    Array([4., 4.], dtype=float32)
    """
    rows, columns, cin, cout = kernel.shape
    if padding != "valid":
        sides = [((size - 1) // 2, size // 2) for size in (rows, columns)]
        mode = {"mode": "wrap"} if padding == "circular" else {}
        h = jnp.pad(h, [(0, 0)] * (h.ndim - 3) + [*sides, (0, 0)], **mode)
    few = min(rows, columns) >= TILED_SIDE and cin * cout <= TILED_CHANNELS
    return (tiled if few and jax.default_backend() == "cpu" else direct)(h, kernel, stride)


def direct(h: Array, kernel: Array, stride: int = 1) -> Array:
    """A valid convolution by XLA's own operation."""
    batch = h.reshape(-1, *h.shape[-3:])
    z = lax.conv_general_dilated(batch, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return z.reshape(*h.shape[:-3], *z.shape[1:])


def tiled(h: Array, kernel: Array, stride: int = 1, tile: tuple[int, int] | None = None) -> Array:
    """A valid convolution as patches times a matrix; each patch gives `tile` = rows x columns of outputs."""
    *lead, height, width, _ = h.shape
    rows, columns, _, cout = kernel.shape
    out = (height - rows) // stride + 1, (width - columns) // stride + 1
    tile = tile or (min(2, out[0]), next((t for t in (4, 5, 3, 2) if out[1] % t == 0), min(4, out[1])))
    count = [-(-n // t) for n, t in zip(out, tile, strict=True)]
    patch = [(t - 1) * stride + k for t, k in zip(tile, (rows, columns), strict=True)]
    # where in a patch output i of a tile finds weight a: patch[stride i + a]
    find = [
        jnp.asarray(np.arange(p)[:, None, None] == stride * np.arange(t)[:, None] + np.arange(k), kernel.dtype)
        for p, t, k in zip(patch, tile, (rows, columns), strict=True)
    ]
    matrix = jnp.einsum("via,wjb,abco->vwcijo", *find, kernel).reshape(-1, tile[0] * tile[1] * cout)
    step = [t * stride for t in tile]
    need = [(n - 1) * s + p for n, s, p in zip(count, step, patch, strict=True)]  # so that the last tile is whole
    h = jnp.pad(h, [(0, 0)] * len(lead) + [(0, max(need[0] - height, 0)), (0, max(need[1] - width, 0)), (0, 0)])
    down = [h[..., v : v + (count[0] - 1) * step[0] + 1 : step[0], :, :] for v in range(patch[0])]
    h = jnp.stack(down, -3)  # (..., tiles down, patch, width, cin)
    across = [h[..., j * step[1] : j * step[1] + patch[1], :] for j in range(count[1])]
    patches = jnp.stack(across, -4).reshape(*lead, *count, -1)
    z = (patches @ matrix).reshape(*lead, *count, *tile, cout)
    z = jnp.swapaxes(z, -4, -3).reshape(*lead, count[0] * tile[0], count[1] * tile[1], cout)
    return z[..., : out[0], : out[1], :]


@functools.partial(jax.jit, static_argnames="average", inline=True)
def pool(h: Array, average: bool = False) -> Array:
    """The largest, or the mean, of each 2 x 2 square; a last odd row or column is left out, and side 1 stays."""
    rows, columns = (size // 2 * 2 for size in h.shape[-3:-1])
    if not rows or not columns:
        return h
    a, b, c, d = (h[..., i:rows:2, j:columns:2, :] for i in (0, 1) for j in (0, 1))
    if average:
        return (a + b + c + d) * jnp.asarray(0.25, h.dtype)
    return jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d))


@functools.partial(jax.jit, inline=True)
def neighbours(h: Array) -> Array:
    """The largest of each pixel and its eight neighbours."""
    for axis in (h.ndim - 3, h.ndim - 2):
        edges = jnp.pad(h, [(int(i == axis),) * 2 for i in range(h.ndim)], mode="edge")
        size = h.shape[axis]
        a, b, c = (lax.slice_in_dim(edges, i, i + size, axis=axis) for i in range(3))
        h = jnp.maximum(jnp.maximum(a, b), c)
    return h


class Conv(nn.Module):
    """z = W * h + b with the weights of `gradjax.models.layers`, fan_in = size^2 channels in."""

    features: int
    size: int = 3
    stride: int = 1
    padding: str = "same"
    weights: str = "gaussian"
    sigma_w: float | Array = 1.0
    sigma_b: float | Array = 0.0
    weight_standardization: bool = False
    use_bias: bool = True

    @nn.compact
    def __call__(self, h: Array) -> Array:
        """(..., height, width, channels) -> (..., height', width', features)."""
        apply = functools.partial(convolve, stride=self.stride, padding=self.padding)
        kernel = weight(self, h, (self.size, self.size, h.shape[-1], self.features), apply)
        z = apply(h, kernel)
        if not self.use_bias:
            return z
        return z + jnp.broadcast_to(self.param("bias", bias(self.sigma_b), (self.features,)), z.shape)


# -- layers ----------------------------------------------------------------------------------------------


class ConvLayer(nn.Module):
    """phi(pool(norm(W * h + b))): the maximum and an increasing phi may change places, and this way is cheaper."""

    features: int
    size: int = 3
    stride: int = 1
    padding: str = "same"
    pooled: bool = False
    flat: bool = False  # whether h is an image as a task gives it, (..., features)
    depth: int | None = None
    activation: str = "tanh"
    sigma_w: float | Array = 1.0
    sigma_b: float | Array = 0.0
    weights: str = "gaussian"
    weight_standardization: bool = False
    normalization: str = "none"

    @nn.compact
    def __call__(self, h: Array, train: bool) -> Array:
        """The next state, (..., height', width', features)."""
        h = image_of(h) if self.flat else h
        z = settings(self, Conv, name="conv")(h)
        z = normalize(self.normalization, z, train)
        return Activation(self.activation, self.depth, name="activation")(pool(z) if self.pooled else z)


class DenseLayer(nn.Module):
    """phi(norm(W h + b)) of the whole image, then dropout."""

    width: int
    depth: int | None = None
    activation: str = "tanh"
    sigma_w: float | Array = 1.0
    sigma_b: float | Array = 0.0
    weights: str = "gaussian"
    weight_standardization: bool = False
    normalization: str = "none"
    dropout: float | Array | None = None

    @nn.compact
    def __call__(self, h: Array, train: bool) -> Array:
        """(..., height, width, channels) or a vector -> (..., width)."""
        z = normalize(self.normalization, settings(self, Dense, name="dense")(vector_of(h)), train)
        a = Activation(self.activation, self.depth, name="activation")(z)
        return a if self.dropout is None or not train else Dropout(self.dropout, name="dropout")(a)


class Readout(nn.Module):
    """Logits V h + c, V ~ 1 / fan_in (or 0) and c = 0, of a vector, or of the mean over an image's pixels."""

    num_outputs: int
    zero: bool = False

    @nn.compact
    def __call__(self, h: Array, train: bool) -> Array:
        """(..., height, width, channels) or a vector -> (..., num_outputs)."""
        h = jnp.mean(h, (-3, -2)) if h.ndim > 2 else h
        start = nn.initializers.zeros if self.zero else nn.initializers.lecun_normal()
        kernel = self.param("kernel", start, (h.shape[-1], self.num_outputs))
        z = h @ kernel
        return z + jnp.broadcast_to(self.param("bias", nn.initializers.zeros, (self.num_outputs,)), z.shape)


def vector_of(h: Array) -> Array:
    """An image, or a batch of them, without its spatial axes; vectors as they are."""
    return h.reshape(*h.shape[:-3], -1) if h.ndim > 2 else h


def side_of(x: Array) -> int:
    """Pixels along a side of the images."""
    return jax.eval_shape(image_of, x).shape[-2]


def shares(depth: int, stages: int = 3) -> list[int]:
    """Layers of each stage, at least one each, the earlier stages with one more where it does not divide.

    >>> shares(8), shares(2)
    ([3, 3, 2], [1, 1])
    """
    stages = min(stages, depth)
    return [depth // stages + (stage < depth % stages) for stage in range(stages)]


def settings(owner: nn.Module, kind: Callable[..., Any], **own: Any) -> Any:
    """`kind` with the fields that it shares with the module `owner`, and its `own`."""
    fields = kind.__dataclass_fields__  # type: ignore[attr-defined]
    shared = [name for name in fields if name not in ("name", "parent", *own) and hasattr(owner, name)]
    return kind(**{name: getattr(owner, name) for name in shared}, **own)


# -- networks --------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A layer of a network, or `count` equal ones on top of each other, which are scanned."""

    name: str
    layer: Callable[..., nn.Module]  # (name= or parent=) -> a module called as (h, train)
    count: int = 0


class Stack(nn.Module):
    """Equal layers, scanned: compile time does not depend on their number."""

    layer: Callable[..., nn.Module]
    count: int

    @nn.compact
    def __call__(self, h: PyTree, train: bool) -> PyTree:
        """The state after all of them."""
        scanned = nn.scan(
            lambda layer, h, _: (layer(h, train), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.count,
        )
        return scanned(self.layer(name="layers"), h, None)[0]


def part(name: str, owner: nn.Module, kind: Callable[..., Any], count: int = 0, **own: Any) -> Part:
    """A part made of a layer `kind` with its owner's settings."""
    return Part(name, lambda **where: settings(owner, kind, **own, **where), count)


def forward(parts: Sequence[Part], h: Array, train: bool) -> Array:
    """The parts one after the other, as submodules of the compact module that calls this."""
    for name, layer, count in parts:
        h = (Stack(layer, count, name=name) if count else layer(name=name))(h, train)
    return h


def links_of(parts: Sequence[Part], variables: PyTree, x: Array, key: Array | None = None) -> tuple[Array, Links]:
    """The parts in training mode as links, for `gradjax.step` and `gradjax.spectrum`.

    Args:
      parts: of the network.
      variables: as `init` returns them.
      x: flat images, (features,) or (batch, features).
      key: PRNG key of the dropout masks, needed where there is dropout.

    Returns:
      x, and a link (step, theta) for each part, a `Scan` for a stack; theta holds the layer's variables and, with
      dropout, its key. With BatchNorm the states are whole batches.
    """
    links = []
    for index, (name, layer, count) in enumerate(parts):
        module = layer(parent=None)
        own = {kind: tree[name] for kind, tree in variables.items() if name in tree}
        theta: Any = {"variables": {kind: tree["layers"] for kind, tree in own.items()} if count else own}
        if getattr(module, "dropout", None) is not None:
            if key is None:
                raise ValueError("links: a network with dropout draws masks; pass key=jax.random.key(...).")
            mine = jax.random.fold_in(key, index)
            theta["key"] = jax.random.split(mine, count) if count else mine

        def step(h, theta, module=module):
            rngs = {"dropout": theta["key"]} if "key" in theta else {}
            return module.apply(theta["variables"], h, True, rngs=rngs, mutable=["batch_stats"])[0]

        links.append(Scan(step, theta) if count else (step, theta))
    return x, links
