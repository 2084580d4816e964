"""Convolutions, pooling, and the layers made of them.

    z[i, j, o] = sum over (a, b, c) of W[a, b, c, o] h[s i + a, s j + b, c] + b[o]

for images h (height, width, channels), padded by zeros to the same size ("same"), not at all
("valid"), or with the image's opposite edge ("circular": a convolution on a torus, for which mean
field theory is exact; Xiao et al. 2018, arXiv 1806.05393).

`convolve` is the one place that chooses how a convolution is computed. On a CPU it is a matrix
times patches, where a patch gives a whole tile of outputs and the matrix holds the kernel once for
each output of the tile. Inside a loop, and a training is one, XLA's own convolution takes 5 to 40
times as long as outside. Forward pass and gradients, milliseconds on two cores, batch 64:

                                  XLA     XLA in a loop    tiles of side 1    2    (in a loop)
    5 x 5 x 16 -> 40, 14 x 14     24.7    287              19.5              10.7
    3 x 3 x 3 -> 16, 28 x 28       9.3     44               5.3               4.1
    3 x 3 x 16 -> 16, 28 x 28                              28.8              10.9
    3 x 3 x 32 -> 32, 14 x 14                               9.3               8.5
    3 x 3 x 64 -> 64, 7 x 7        8.2    144               6.3               9.4
    3 x 3 x 128 -> 128, 7 x 7     19.7    814              26.8              36.1
    1 x 1 x 64 -> 64, 14 x 14     11.8    137               3.7               8.9

A training step of our small networks takes 2 to 9 times as long with XLA's. Vmapping over seeds
costs more per seed than a single seed (2 times at 32 channels for 4 seeds), so a CPU trains
convolutions one seed per lane.

Cost of analysis: a state has height x width x channels entries; spectra are for small images.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint

from gradjax.core.initializers import bias
from gradjax.experiment.models.layers import (
    Activation,
    Dense,
    Dropout,
    Treated,
    image_of,
    normalize,
    plus,
    settings,
    weight,
)
from gradjax.experiment.models.network import Network


# One program each: op by op a convolution is forty.
@functools.partial(jax.jit, static_argnames=("stride", "padding", "pooled"), inline=True)
def convolve(
    h: Array, kernel: Array, stride: int = 1, padding: str = "same", pooled: bool = False
) -> Array:
    """The convolution of images with a kernel, by the faster way on this backend (see the module).

    Args:
      h: (..., height, width, channels in).
      kernel: (rows, columns, channels in, channels out).
      stride: of both axes.
      padding: "same", "valid" or "circular".
      pooled: whether to `pool` the result.

    Returns:
      (..., ceil(height / stride), ceil(width / stride), channels out); for "valid", height and
      width are those of the height - rows + 1 places that fit.

    >>> convolve(jnp.ones((8, 8, 1)), jnp.ones((3, 3, 1, 2)))[0, 0]  # corners see 4 of 9 pixels
    Array([4., 4.], dtype=float32)
    """
    rows, columns = kernel.shape[:2]
    if padding != "valid":
        sides = [((size - 1) // 2, size // 2) for size in (rows, columns)]
        mode = "wrap" if padding == "circular" else "constant"
        h = jnp.pad(h, [(0, 0)] * (h.ndim - 3) + [*sides, (0, 0)], mode=mode)
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


def tiled(
    h: Array,
    kernel: Array,
    stride: int = 1,
    tile: tuple[int, int] | None = None,
    pooled: bool = False,
) -> Array:
    """A valid convolution as a matrix times patches, one patch for each tile of outputs.

    Internally the examples are the last axis, along which the processor's loops then run; the
    result keeps that layout. The steps are XLA's `direct`, then `pool` where `pooled`.

    Args:
      h: (..., height, width, channels in).
      kernel: (rows, columns, channels in, channels out).
      stride: of both axes.
      tile: rows and columns of a tile; by default from a rule for speed.
      pooled: whether to `pool` the result.
    """
    *lead, height, width, cin = h.shape
    *sides, _, cout = kernel.shape
    side = _side_of_tile(max(sides), cin, stride)
    tile = tile or (side, side)
    out = [(size - side) // stride + 1 for size, side in zip((height, width), sides, strict=True)]
    if pooled and (min(out) < 2 or tile[0] % 2 or tile[1] % 2):
        # There is no 2 x 2 square, or none that lies inside one tile.
        return pool(tiled(h, kernel, stride, tile))
    count = [-(-size // t) for size, t in zip(out, tile, strict=True)]
    # From tile to tile the image moves by one block; a patch is `span` blocks.
    block = [t * stride for t in tile]
    span = [-(-(b - stride + side) // b) for b, side in zip(block, sides, strict=True)]
    matrix = _matrix_of(kernel, tile, stride, block, span)
    if pooled:
        # The place within a 2 x 2 square comes first.
        tile = tile[0] // 2, tile[1] // 2
        matrix = matrix.reshape(tile[0], 2, tile[1], 2, *matrix.shape[2:])
        matrix = jnp.moveaxis(matrix, (1, 3), (0, 1))
    patches = _patches(_blocks(h, block, span, count), tuple(span), tuple(count))
    patches = patches.reshape(math.prod(matrix.shape[-5:]), -1)
    z = (matrix.reshape(-1, len(patches)) @ patches).reshape(*matrix.shape[:-5], *count, -1)
    if pooled:
        z, out = _largest(z), [size // 2 for size in out]
    z = z.transpose(5, 3, 0, 4, 1, 2).reshape(-1, count[0] * tile[0], count[1] * tile[1], cout)
    z = with_layout_constraint(z[:, : out[0], : out[1]], Layout(major_to_minor=(3, 1, 2, 0)))
    return z.reshape(*lead, *z.shape[1:])


def _side_of_tile(size: int, cin: int, stride: int) -> int:
    """Side of a tile whose matrix, of (size + side - 1)^2 cin mostly empty rows, is still cheap."""
    if size == 1 or stride > 1 or cin >= 64:
        return 1
    return 4 if cin == 1 and size >= 5 else 2


def _matrix_of(kernel: Array, tile: tuple, stride: int, block: list, span: list) -> Array:
    """The kernel once for each output of a tile.

    Returns:
      (*tile, channels out, span rows, span columns, block rows, block columns, channels in).
    """
    *sides, cin, cout = kernel.shape
    # Output i of a tile finds weight a at patch[stride i + a].
    find = [
        jnp.asarray(
            np.arange(n * b)[:, None, None] == stride * np.arange(t)[:, None] + np.arange(k),
            kernel.dtype,
        )
        for n, b, t, k in zip(span, block, tile, sides, strict=True)
    ]
    matrix = jnp.einsum("via,wjb,abco->ijovwc", *find, kernel)
    return matrix.reshape(*tile, cout, span[0], block[0], span[1], block[1], cin).swapaxes(4, 5)


def _blocks(h: Array, block: list, span: list, count: list) -> Array:
    """The images cut into the blocks that the patches need, padded by zeros at the end.

    Returns:
      (block rows, block columns, channels, rows of blocks, columns of blocks, examples).
    """
    *lead, height, width, cin = h.shape
    need = [(n + m - 1) * b for n, m, b in zip(count, span, block, strict=True)]
    pads = [(0, max(need[0] - height, 0)), (0, max(need[1] - width, 0)), (0, 0)]
    h = jnp.pad(h, [(0, 0)] * len(lead) + pads)[..., : need[0], : need[1], :]
    h = h.reshape(-1, need[0] // block[0], block[0], need[1] // block[1], block[1], cin)
    return h.transpose(2, 4, 5, 1, 3, 0)


def _windows(h: Array, span: tuple[int, int], count: tuple[int, int]) -> Array:
    """Windows of `count` blocks at each of `span` shifts.

    (..., rows, columns, examples) -> (*span, ..., examples).
    """
    across = jnp.stack([h[..., j : j + count[1], :] for j in range(span[1])])
    return jnp.stack([across[..., i : i + count[0], :, :] for i in range(span[0])])


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _patches(h: Array, span: tuple[int, int], count: tuple[int, int]) -> Array:
    """`_windows`, with a derivative of its own."""
    return _windows(h, span, count)


@_patches.defjvp
def _patches_jvp(span: tuple, count: tuple, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """The same windows by a loop, whose transpose adds each in place.

    The transpose of a stack pads each window to the whole first.
    """
    (h,), (moved,) = primals, tangents
    if jax.__version_info__ < (0, 10):
        # It cannot transpose this loop.
        return _patches(h, span, count), _windows(moved, span, count)
    size = (*h.shape[:-3], *count, h.shape[-1])

    def window(k: Array) -> Array:
        start = (*[0] * (h.ndim - 3), k // span[1], k % span[1], 0)
        return lax.dynamic_slice(moved, start, size)

    windows = lax.map(window, jnp.arange(math.prod(span)))
    return _patches(h, span, count), windows.reshape(*span, *size)


@functools.partial(jax.jit, static_argnames="average", inline=True)
def pool(h: Array, average: bool = False) -> Array:
    """The largest, or the mean, of each 2 x 2 square.

    A last odd row or column is left out, and an image of side 1 stays as it is.
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
    upper = jnp.maximum(squares[0, 0], squares[0, 1])
    return jnp.maximum(upper, jnp.maximum(squares[1, 0], squares[1, 1]))


@_largest.defjvp
def _largest_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """Entries that are equally the largest divide the derivative among them.

    The transpose of this product with a mask is one fused loop; that of four slices is four padded
    arrays and their sum, which took a third of the time of LeNet-5's gradient.
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
    """z = W * h + b with the weights of `gradjax.models.layers`, pooled if asked for.

    fan_in is size^2 channels in. The bias is added after pooling: the same numbers, bit for bit
    (rounding is monotone), from a quarter of the work.
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
        return plus(z, self.param("bias", bias(self.sigma_b), (self.features,)))


class ConvLayer(Treated, kw_only=True):
    """phi(pool(norm(W * h + b))), cheaper than pooling last, and equal to it for an increasing phi.

    `flat` says that h is an image as a task gives it, (..., features).
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: str = "same"
    pooled: bool = False
    flat: bool = False
    depth: int | None = None

    @nn.compact
    def __call__(self, h: Array, train: bool) -> Array:
        """The next state, (..., height', width', features)."""
        if self.flat:
            h = image_of(h)
        early = self.pooled and self.normalization == "none"
        z = settings(self, Conv, name="conv", pooled=early)(h)
        if not early:
            z = normalize(self.normalization, z, train)
            z = pool(z) if self.pooled else z
        return Activation(self.activation, self.depth, name="activation")(z)


class DenseLayer(Treated, kw_only=True):
    """phi(norm(W h + b)) of the whole image, then dropout."""

    width: int
    depth: int | None = None
    dropout: float | Array | None = None

    @nn.compact
    def __call__(self, h: Array, train: bool) -> Array:
        """(..., height, width, channels) or a vector -> (..., width)."""
        h = h.reshape(*h.shape[:-3], -1) if h.ndim > 2 else h
        z = normalize(self.normalization, settings(self, Dense, name="dense")(h), train)
        a = Activation(self.activation, self.depth, name="activation")(z)
        if self.dropout is None or not train:
            return a
        return Dropout(self.dropout, name="dropout")(a)


def blocks_per_stage(depth: int, stages: int = 3) -> list[int]:
    """Layers of each stage: at least one each, and an earlier stage gets one more if need be.

    >>> blocks_per_stage(8), blocks_per_stage(2)
    ([3, 3, 2], [1, 1])
    """
    stages = min(stages, depth)
    return [depth // stages + (stage < depth % stages) for stage in range(stages)]


class ConvNet(Network, kw_only=True):
    """A network of images: a CPU trains one seed of it at a time (see the module)."""
