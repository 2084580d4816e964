"""Convolutions and pooling, on integers: their sums are exact in float32, whatever their order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gradjax.experiment.models.convolution import (
    Conv,
    blocks_per_stage,
    convolve,
    direct,
    neighbours,
    pool,
    tiled,
)


def integers(seed, *shape, step=1):
    """Multiples of `step` from -3 to 3, as float32."""
    return step * np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)


def windows(h, sides, stride):
    """(batch, rows, columns, channels, *sides) of (batch, height, width, channels)."""
    view = np.lib.stride_tricks.sliding_window_view(h, sides, axis=(1, 2))
    return view[:, ::stride, ::stride]


def squares_of(z):
    """(batch, rows, 2, columns, 2, channels) of 2 x 2 squares; an odd row or column is left out."""
    rows, columns = z.shape[1] // 2, z.shape[2] // 2
    return z[:, : 2 * rows, : 2 * columns].reshape(len(z), rows, 2, columns, 2, -1)


def convolution(h, kernel, stride=1):
    return np.einsum("nijcab,abco->nijo", windows(h, kernel.shape[:2], stride), kernel)


def reference(h, kernel, g, stride=1, pooled=False):
    """In NumPy: the convolution, and the gradients of its product with g for h and kernel.

    A square's gradient is divided among equally large entries: exactly, if g are multiples of 12.
    """
    size, seen = kernel.shape[0], windows(h, kernel.shape[:2], stride)
    z = out = convolution(h, kernel, stride)
    if pooled:
        squares = squares_of(z)
        out = squares.max((2, 4))
        mask = squares == out[:, :, None, :, None]
        divided = mask * (g / mask.sum((2, 4)))[:, :, None, :, None]
        rows, columns = squares.shape[1], squares.shape[3]
        g = np.zeros_like(z)
        g[:, : 2 * rows, : 2 * columns] = divided.reshape(len(z), 2 * rows, 2 * columns, -1)
    kernel_gradient = np.einsum("nijcab,nijo->abco", seen, g)
    gradient = np.zeros_like(h)
    for a, b in np.ndindex(size, size):
        rows = slice(a, a + stride * (z.shape[1] - 1) + 1, stride)
        columns = slice(b, b + stride * (z.shape[2] - 1) + 1, stride)
        gradient[:, rows, columns] += g @ kernel[a, b].T
    return out, gradient, kernel_gradient


def shape_of(side, size, stride, pooled):
    out = [(s - size) // stride + 1 for s in side]
    return [s // 2 for s in out] if pooled else out


@pytest.mark.parametrize(
    ("side", "cin", "size", "stride", "tile", "pooled"),
    [
        ((7, 11), 2, 5, 1, (2, 4), False),  # the last tile reaches beyond the image
        ((9, 6), 2, 3, 2, (3, 2), False),
        pytest.param((6, 6), 2, 5, 1, None, False, marks=pytest.mark.slow),
        ((7, 11), 1, 5, 1, None, True),
        pytest.param((6, 15), 1, 3, 1, None, True, marks=pytest.mark.slow),
        ((5, 7), 2, 5, 1, None, True),  # one row of outputs: no square
        ((7, 6), 64, 3, 1, None, True),  # tiles of side 1: pooled afterwards
        pytest.param((9, 8), 2, 3, 2, None, True, marks=pytest.mark.slow),
    ],
)
def test_tiles_give_the_convolution_and_its_gradients(side, cin, size, stride, tile, pooled):
    h, kernel = integers(0, 6, *side, cin), integers(1, size, size, cin, 3)
    shape = shape_of(side, size, stride, pooled)
    if pooled and not min(shape):
        # Where there is no square nothing is pooled.
        shape, pooled_there = shape_of(side, size, stride, False), False
    else:
        pooled_there = pooled
    g = integers(2, 6, *shape, 3, step=12)

    @jax.jit
    def found(h, kernel, g):
        lead = h.reshape(2, 3, *h.shape[1:])
        out, back = jax.vjp(
            lambda h, kernel: tiled(h, kernel, stride, tile, pooled=pooled), lead, kernel
        )
        return out, *back(g.reshape(out.shape))

    for ours, wanted in zip(
        found(h, kernel, g), reference(h, kernel, g, stride, pooled_there), strict=True
    ):
        np.testing.assert_array_equal(np.reshape(ours, wanted.shape), wanted)


def test_tiles_in_forward_mode_and_under_vmap():
    h, moved = integers(0, 2, 8, 8, 2), integers(1, 2, 8, 8, 2, step=12)
    kernel = integers(2, 5, 5, 2, 3)

    @jax.jit
    def found(h, moved):
        f = functools.partial(tiled, kernel=jnp.asarray(kernel), pooled=True)
        return jax.jvp(f, (h,), (moved,)), jax.vmap(lambda h, m: jax.jvp(f, (h,), (m,)))(h, moved)

    squares = squares_of(convolution(h, kernel))
    out = squares.max((2, 4))
    mask = squares == out[:, :, None, :, None]
    change = squares_of(convolution(moved, kernel))
    change = (mask * change).sum((2, 4)) / mask.sum((2, 4), dtype=np.float32)
    for pair in found(h, moved):
        np.testing.assert_array_equal(pair[0], out)
        np.testing.assert_array_equal(pair[1], change)


def test_xlas_own_convolution_is_the_same():
    h, kernel = integers(0, 6, 9, 6, 2), integers(1, 3, 3, 2, 3)
    found = jax.jit(direct, static_argnums=2)(h.reshape(2, 3, 9, 6, 2), kernel, 2)
    wanted = convolution(h, kernel, 2)
    np.testing.assert_array_equal(np.reshape(found, wanted.shape), wanted)


def test_padding():
    """z_i = sum of W_a h_{i + a - centre}, beyond the edge 0 or the other side."""
    h, kernels = integers(0, 1, 6, 7, 2), [integers(1, n, n, 2, 3) for n in (3, 5)]
    cases = [(kernel, padding) for kernel in kernels for padding in ("same", "circular")]

    @jax.jit
    def found(h):
        return [convolve(h, jnp.asarray(kernel), padding=padding) for kernel, padding in cases]

    for (kernel, padding), z in zip(cases, found(h), strict=True):
        c = len(kernel) // 2
        mode = "wrap" if padding == "circular" else "constant"
        padded = np.pad(h, [(0, 0), (c, c), (c, c), (0, 0)], mode=mode)
        np.testing.assert_array_equal(z, convolution(padded, kernel))


def test_pooling():
    h = integers(0, 3, 7, 4, 2)

    @jax.jit
    def found(h):
        return pool(h), pool(h, average=True), neighbours(h)

    largest, mean, near = found(h)
    np.testing.assert_array_equal(largest, squares_of(h).max((2, 4)))
    np.testing.assert_array_equal(mean, squares_of(h).mean((2, 4)))
    padded = np.pad(h, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="edge")
    np.testing.assert_array_equal(near, windows(padded, (3, 3), 1).max((-2, -1)))

    def shapes(h):
        layer = Conv(3, 5, pooled=True)
        deep = jnp.zeros((3, 5, 6, 2)), jnp.zeros((5, 5, 2, 3))
        one = layer.init_with_output(jax.random.key(0), h)[0]
        return pool(h[:, :1]), convolve(*deep, padding="valid", pooled=True), one

    found = [out.shape for out in jax.eval_shape(shapes, h)]
    assert found == [(3, 1, 4, 2), (3, 1, 2, 3), (3, 3, 2, 3)]


def test_derivative_of_pooling():
    """The largest has it, ties divide it, and nan is not lost."""
    h = np.asarray([[1.0, 3.0], [2.0, 0.0]], np.float32)
    cases = {
        "plain": (h, [[0, 1], [0, 0]]),
        "one of three": (np.maximum(h, 2), [[0, 1], [0, 0]]),
        "all equal": (np.ones_like(h), [[0.25, 0.25], [0.25, 0.25]]),
        "two equal": (np.where(h == 2, 3, h), [[0, 0.5], [0.5, 0]]),
    }
    given = np.stack([case for case, _ in cases.values()])[..., None]
    gradient = jax.jit(jax.vmap(jax.grad(lambda h: jnp.sum(pool(h)))))(given)
    for i, (name, (_, wanted)) in enumerate(cases.items()):
        np.testing.assert_array_equal(gradient[i, ..., 0], wanted, err_msg=name)
    # Not compiled: in a program XLA may replace the product with the mask by a choice, with 0 here.
    lost = jnp.asarray(np.where(h == 1, np.nan, h), jnp.float32)[..., None]
    value, gradient = jax.value_and_grad(lambda h: jnp.sum(pool(h)))(lost)
    assert np.isnan(value) and np.isnan(gradient).all()


def test_stages():
    found = [blocks_per_stage(depth) for depth in (1, 2, 3, 8)]
    assert found == [[1], [1, 1], [1, 1, 1], [3, 3, 2]]


@pytest.mark.slow
def test_weights_have_the_mean_field_variance(key):
    """On a torus E z^2 = sigma_w^2 E x^2, fan_in being 9 channels; zeros beyond the edge cost a
    part of it."""
    h = jax.random.normal(key, (8, 8, 4))
    kinds = ("gaussian", "orthogonal", "delta_orthogonal")

    def length(k, weights, padding):
        layer = Conv(4, padding=padding, weights=weights, sigma_w=1.7)
        return jnp.mean(layer.init_with_output(k, h)[0] ** 2) / jnp.mean(h**2)

    def lengths(k):
        return [[length(k, kind, padding) for padding in ("circular", "same")] for kind in kinds]

    found = jax.jit(lambda keys: lax.map(lengths, keys))(jax.random.split(key, 300))
    for kind, (each, cut) in zip(kinds, found, strict=True):
        error = 3 * each.std() / 300**0.5 + 1e-5
        assert abs(each.mean() - 1.7**2) < error < abs(each.mean() - (1.1 * 1.7) ** 2)
        if kind != "delta_orthogonal":  # which has no weight beyond the edge
            assert cut.mean() < 1.7**2 - 3 * cut.std() / 300**0.5


def test_halves_meet_floats_alike():
    """Images in bfloat16 and kernels in float32, as mixed precision has them, by either way."""
    h = jnp.asarray(integers(0, 2, 6, 6, 3), jnp.bfloat16)
    kernel = integers(1, 3, 3, 3, 4)
    with jax.numpy_dtype_promotion("standard"):
        by_tiles, by_xla = jax.jit(lambda h: (tiled(h, kernel), direct(h, jnp.asarray(kernel))))(h)
    assert by_tiles.dtype == by_xla.dtype == jnp.float32
    np.testing.assert_array_equal(by_tiles, by_xla)
