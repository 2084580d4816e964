"""Convolutions, pooling, and networks of layers of different shapes as a list of parts.

    z[i, j, o] = sum over (a, b, c) of W[a, b, c, o] h[s i + a, s j + b, c] + b[o],   h (height, width, channels)

padded by zeros to the same size ("same"), not at all ("valid"), or with the image's opposite edge
("circular": a convolution on a torus, for which mean field theory is exact; Xiao et al. 2018, arXiv
1806.05393).

`convolve` is the one place that chooses how a convolution is computed. On a CPU it is a matrix
times patches, where a patch gives a whole tile of outputs and the matrix holds the kernel once for
each output of the tile. XLA's own convolution takes 5 to 40 times as long inside a loop, and a
training is one, as alone. Forward pass and gradients, milliseconds on two cores, batch 64:

                                             XLA     XLA in a loop    tiles of side 1    2    (in a loop)
    5 x 5 x 16 -> 40, 14 x 14                24.7    287              19.5              10.7
    3 x 3 x 3 -> 16, 28 x 28                  9.3     44               5.3               4.1
    3 x 3 x 16 -> 16, 28 x 28                                         28.8              10.9
    3 x 3 x 32 -> 32, 14 x 14                                          9.3               8.5
    3 x 3 x 64 -> 64, 7 x 7                   8.2    144               6.3               9.4
    3 x 3 x 128 -> 128, 7 x 7                19.7    814              26.8              36.1
    1 x 1 x 64 -> 64, 14 x 14                11.8    137               3.7               8.9

A step of small networks of the zoo takes 2 to 9 times as long with XLA's. A vmap over seeds is
dearer per seed than one seed alone (2 times at 32 channels for 4 seeds): a CPU trains convolutions
one seed per lane.

Cost of analysis: a state has height x width x channels entries; spectra are for small images.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint

from gradjax.core.initializers import bias
from gradjax.core.step import Links, Scan
from gradjax.experiment.models.layers import (
    Activation,
    Dense,
    Dropout,
    Treated,
    image_of,
    normalize,
    settings,
    weight,
)

PyTree = Any


# -- the convolution -------------------------------------------------------------------------------------


@functools.partial(
    jax.jit, static_argnames=("stride", "padding", "pooled"), inline=True
)  # one program, not forty
def convolve(
    h: Array, kernel: Array, stride: int = 1, padding: str = "same", pooled: bool = False
) -> Array:
    """The convolution of images with a kernel, by whichever way is faster here (see the module).

    Args:
      h: (..., height, width, channels in).
      kernel: (rows, columns, channels in, channels out).
      stride: of both axes.
      padding: "same", "valid" or "circular".
      pooled: whether `pool` follows.

    Returns:
      (..., ceil(height / stride), ceil(width / stride), channels out); valid: of the height - rows
      + 1 that fit.

    >>> convolve(jnp.ones((8, 8, 1)), jnp.ones((3, 3, 1, 2)))[0, 0]      # a corner sees 4 of its 9 neighbours
    Array([4., 4.], dtype=float32)
    """
    rows, columns = kernel.shape[:2]
    if padding != "valid":
        sides = [((size - 1) // 2, size // 2) for size in (rows, columns)]
        mode = {"mode": "wrap"} if padding == "circular" else {}
        h = jnp.pad(h, [(0, 0)] * (h.ndim - 3) + [*sides, (0, 0)], **mode)
    if jax.default_backend() == "cpu":
        return tiled(h, kernel, stride, pooled=pooled)
    z = direct(h, kernel, stride)
    return pool(z) if pooled else z


def direct(h: Array, kernel: Array, stride: int = 1) -> Array:
    """A valid convolution by XLA's own operation."""
    dtype = jnp.promote_types(h.dtype, kernel.dtype)
    batch, kernel = h.astype(dtype).reshape(-1, *h.shape[-3:]), kernel.astype(dtype)
    z = lax.conv_general_dilated(
        batch, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return z.reshape(*h.shape[:-3], *z.shape[1:])


def _rule_for_tiles(size: int, cin: int, stride: int) -> int:
    """Side of a tile: as large as its matrix, of (size + side - 1)^2 cin rows and mostly zeros,
    still is cheap.
    """
    if size == 1 or stride > 1 or cin >= 64:
        return 1
    return 4 if cin == 1 and size >= 5 else 2


def tiled(
    h: Array,
    kernel: Array,
    stride: int = 1,
    tile: tuple[int, int] | None = None,
    pooled: bool = False,
) -> Array:
    """A valid convolution as a matrix times patches, a patch for each `tile` = rows x columns of
    outputs; then `pool`.

    Inside the examples are the last axis, along which the processor's loops then run; the result keeps that layout.
    """
    *lead, height, width, cin = h.shape
    *sides, _, cout = kernel.shape
    t = _rule_for_tiles(max(sides), cin, stride)
    tile = tile or (t, t)
    out = [(size - side) // stride + 1 for size, side in zip((height, width), sides, strict=True)]
    if pooled and (min(out) < 2 or tile[0] % 2 or tile[1] % 2):  # no square, or none inside a tile
        return pool(tiled(h, kernel, stride, tile))
    count = [-(-size // t) for size, t in zip(out, tile, strict=True)]
    block = [t * stride for t in tile]  # from tile to tile; a patch is `span` blocks
    span = [-(-(b - stride + side) // b) for b, side in zip(block, sides, strict=True)]
    # where in a patch output i of a tile finds weight a: patch[stride i + a]
    find = [
        jnp.asarray(
            np.arange(n * b)[:, None, None] == stride * np.arange(t)[:, None] + np.arange(k),
            kernel.dtype,
        )
        for n, b, t, k in zip(span, block, tile, sides, strict=True)
    ]
    matrix = jnp.einsum("via,wjb,abco->ijovwc", *find, kernel)
    matrix = matrix.reshape(*tile, cout, span[0], block[0], span[1], block[1], cin).swapaxes(4, 5)
    if pooled:  # the place in a 2 x 2 square comes first
        tile = tile[0] // 2, tile[1] // 2
        matrix = jnp.moveaxis(
            matrix.reshape(tile[0], 2, tile[1], 2, *matrix.shape[2:]), (1, 3), (0, 1)
        )
    need = [(n + m - 1) * b for n, m, b in zip(count, span, block, strict=True)]
    h = jnp.pad(
        h,
        [(0, 0)] * len(lead)
        + [(0, max(need[0] - height, 0)), (0, max(need[1] - width, 0)), (0, 0)],
    )
    h = h[..., : need[0], : need[1], :].reshape(
        -1, need[0] // block[0], block[0], need[1] // block[1], block[1], cin
    )
    patches = _patches(h.transpose(2, 4, 5, 1, 3, 0), tuple(span), tuple(count))
    patches = patches.reshape(math.prod(matrix.shape[-5:]), -1)
    z = (matrix.reshape(-1, len(patches)) @ patches).reshape(*matrix.shape[:-5], *count, -1)
    if pooled:
        z, out = _largest(z), [size // 2 for size in out]
    z = z.transpose(5, 3, 0, 4, 1, 2).reshape(-1, count[0] * tile[0], count[1] * tile[1], cout)
    z = with_layout_constraint(z[:, : out[0], : out[1]], Layout(major_to_minor=(3, 1, 2, 0)))
    return z.reshape(*lead, *z.shape[1:])


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _patches(h: Array, span: tuple[int, int], count: tuple[int, int]) -> Array:
    """Windows of `count` blocks at each of `span` shifts: (..., rows, columns, examples) -> (*span,
    ..., examples).
    """
    across = jnp.stack([h[..., j : j + count[1], :] for j in range(span[1])])
    return jnp.stack([across[..., i : i + count[0], :, :] for i in range(span[0])])


@_patches.defjvp
def _patches_jvp(span: tuple, count: tuple, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """The same windows by a loop: its transpose adds each in place, that of a stack pads each to
    the whole first.
    """
    (h,), (moved,) = primals, tangents
    size = (*h.shape[:-3], *count, h.shape[-1])
    window = lambda k: lax.dynamic_slice(
        moved, (*[0] * (h.ndim - 3), k // span[1], k % span[1], 0), size
    )
    windows = lax.map(window, jnp.arange(math.prod(span)))
    return _patches(h, span, count), windows.reshape(*span, *size)


@functools.partial(jax.jit, static_argnames="average", inline=True)
def pool(h: Array, average: bool = False) -> Array:
    """The largest, or the mean, of each 2 x 2 square; a last odd row or column is left out, and
    side 1 stays.
    """
    *lead, height, width, channels = h.shape
    rows, columns = height // 2, width // 2
    if not rows or not columns:
        return h
    squares = h[..., : 2 * rows, : 2 * columns, :].reshape(*lead, rows, 2, columns, 2, channels)
    squares = jnp.moveaxis(squares, (-4, -2), (0, 1))
    return _sum(squares) * jnp.asarray(0.25, h.dtype) if average else _largest(squares)


def _sum(squares: Array) -> Array:
    return (squares[0, 0] + squares[0, 1]) + (squares[1, 0] + squares[1, 1])


@jax.custom_jvp
def _largest(squares: Array) -> Array:
    """The largest of each square: (2, 2, ...) -> (...)."""
    return jnp.maximum(
        jnp.maximum(squares[0, 0], squares[0, 1]), jnp.maximum(squares[1, 0], squares[1, 1])
    )


@_largest.defjvp
def _largest_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """Those equal to the largest share its derivative.

    The transpose of this product with a mask is one fused loop; that of four slices is four padded arrays and their
    sum, which took a third of the time of LeNet-5's gradient.
    """
    (squares,), (moved,) = primals, tangents
    largest = _largest(squares)
    mask = (squares == largest[None, None]).astype(squares.dtype)
    return largest, jnp.sum(moved * mask, (0, 1)) / _sum(mask)


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
    """z = W * h + b with the weights of `gradjax.models.layers`, fan_in = size^2 channels in;
    pooled if asked for.

    The bias is added after pooling: the same numbers, bit for bit (rounding is monotone), from a quarter of the work.
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: str = "same"
    weights: str = "gaussian"
    sigma_w: float | Array = 1.0
    sigma_b: float | Array = 0.0
    weight_standardization: bool = False
    use_bias: bool = True
    pooled: bool = False

    @nn.compact
    def __call__(self, h: Array) -> Array:
        """(..., height, width, channels) -> (..., height', width', features)."""
        apply = functools.partial(convolve, stride=self.stride, padding=self.padding)
        kernel = weight(self, h, (self.size, self.size, h.shape[-1], self.features), apply)
        z = apply(h, kernel, pooled=self.pooled)
        if not self.use_bias:
            return z
        return z + jnp.broadcast_to(
            self.param("bias", bias(self.sigma_b), (self.features,)), z.shape
        )


# -- layers ----------------------------------------------------------------------------------------------


class ConvLayer(Treated, kw_only=True):
    """phi(pool(norm(W * h + b))): the maximum and an increasing phi may change places, and this way
    is cheaper.
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: str = "same"
    pooled: bool = False
    flat: bool = False  # whether h is an image as a task gives it, (..., features)
    depth: int | None = None

    @nn.compact
    def __call__(self, h: Array, train: bool) -> Array:
        """The next state, (..., height', width', features)."""
        h = image_of(h) if self.flat else h
        early = self.pooled and self.normalization == "none"
        z = settings(self, Conv, name="conv", pooled=early)(h)
        z = z if early else normalize(self.normalization, z, train)
        z = pool(z) if self.pooled and not early else z
        return Activation(self.activation, self.depth, name="activation")(z)


class DenseLayer(Treated, kw_only=True):
    """phi(norm(W h + b)) of the whole image, then dropout."""

    width: int
    depth: int | None = None
    dropout: float | Array | None = None

    @nn.compact
    def __call__(self, h: Array, train: bool) -> Array:
        """(..., height, width, channels) or a vector -> (..., width)."""
        z = normalize(self.normalization, settings(self, Dense, name="dense")(vector_of(h)), train)
        a = Activation(self.activation, self.depth, name="activation")(z)
        return a if self.dropout is None or not train else Dropout(self.dropout, name="dropout")(a)


class Readout(nn.Module):
    """Logits V h + c, V ~ 1 / fan_in (or 0) and c = 0, of a vector, or of the mean over an image's
    pixels.
    """

    num_outputs: int
    zero: bool = False

    @nn.compact
    def __call__(self, h: Array, train: bool) -> Array:
        """(..., height, width, channels) or a vector -> (..., num_outputs)."""
        h = jnp.mean(h, (-3, -2)) if h.ndim > 2 else h
        start = nn.initializers.zeros if self.zero else nn.initializers.lecun_normal()
        kernel = self.param("kernel", start, (h.shape[-1], self.num_outputs))
        z = h @ kernel
        return z + jnp.broadcast_to(
            self.param("bias", nn.initializers.zeros, (self.num_outputs,)), z.shape
        )


def vector_of(h: Array) -> Array:
    """An image, or a batch of them, without its spatial axes; vectors as they are."""
    return h.reshape(*h.shape[:-3], -1) if h.ndim > 2 else h


def side_of(x: Array) -> int:
    """Pixels along a side of the images."""
    return jax.eval_shape(image_of, x).shape[-2]


def blocks_per_stage(depth: int, stages: int = 3) -> list[int]:
    """Layers of each stage, at least one each, the earlier stages with one more where it does not
    divide.

    >>> shares(8), shares(2)
    ([3, 3, 2], [1, 1])
    """
    stages = min(stages, depth)
    return [depth // stages + (stage < depth % stages) for stage in range(stages)]


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


class Network(nn.Module, kw_only=True):
    """A network of parts: what it is made of is all that an architecture says."""

    num_outputs: int
    activation: str = "tanh"
    sigma_w: float | Array = 1.0
    sigma_b: float | Array = 0.0
    weights: str = "gaussian"
    weight_standardization: bool = False
    normalization: str = "none"

    def _parts(self, x: Array) -> Sequence[Part]:
        """The layers, from the flat images x to the logits."""
        raise NotImplementedError

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Logits (batch, num_outputs) of flat images (batch, features)."""
        h = x
        for name, layer, count in self._parts(x):
            h = (Stack(layer, count, name=name) if count else layer(name=name))(h, train)
        return h

    def links(self, variables: PyTree, x: Array, key: Array | None = None) -> tuple[Array, Links]:
        """The parts in training mode as links, for `gradjax.core.step` and `gradjax.spectrum`.

        Args:
          variables: as `init` returns them.
          x: flat images, (features,) or (batch, features).
          key: PRNG key of the dropout masks, needed where there is dropout.

        Returns:
          x, and a link (step, theta) for each part, a `Scan` for a stack; theta holds the layer's variables and, with
          dropout, its key. With BatchNorm the states are whole batches.
        """
        links: list = []
        for index, (name, layer, count) in enumerate(self._parts(x)):
            module = layer(parent=None)
            own = {kind: tree[name] for kind, tree in variables.items() if name in tree}
            theta: Any = {
                "variables": {kind: tree["layers"] for kind, tree in own.items()} if count else own
            }
            if getattr(module, "dropout", None) is not None:
                if key is None:
                    raise ValueError(
                        "links: a network with dropout draws masks; pass key=jax.random.key(...)."
                    )
                mine = jax.random.fold_in(key, index)
                theta["key"] = jax.random.split(mine, count) if count else mine

            def step(h, theta, module=module):
                rngs = {"dropout": theta["key"]} if "key" in theta else {}
                return module.apply(
                    theta["variables"], h, True, rngs=rngs, mutable=["batch_stats"]
                )[0]

            links.append(Scan(step, theta) if count else (step, theta))
        return x, links
