"""Overflow-safe norms: a norm is carried as (mantissa, exponent), ||x|| = mantissa * 2^exponent.

The square of a float32 above 1.8e19 is inf and below 1e-23 is 0, so sqrt(sum(x^2)) is wrong over half
of the range that a float32 has. Here every leaf is first multiplied by the power of two that brings the
largest magnitude of the tree into [1/2, 1): exact, no division (`x / 1e38` would multiply by a reciprocal
that flushes to zero), no overflow. The logarithm of the norm then exists for every finite tree.

Half-precision leaves are accumulated in float32. A tree that holds inf or NaN has the norm inf or NaN.
Numbers so small that XLA flushes them to zero on load (float32 subnormals on CPU) count as zero.
Cost: two passes over the tree.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

PyTree = Any

LOG2 = 0.6931471805599453


def _accumulator(x: Array) -> Array:
    """Magnitudes of `x` in the dtype in which its squares are summed: float32, or float64 for float64."""
    x = jnp.abs(x)
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def _leaves(tree: PyTree) -> list[Array]:
    leaves = [_accumulator(jnp.asarray(x)) for x in jax.tree.leaves(tree)]
    leaves = [x for x in leaves if x.size]
    if not leaves:
        return [jnp.zeros((1,), jnp.float32)]
    widest = max((x.dtype for x in leaves), key=lambda dtype: dtype.itemsize)
    return [x.astype(widest) for x in leaves]


def _shared_exponent(leaves: list[Array]) -> Array:
    """The exponent e with max |x| in [2^(e-1), 2^e); 0 where the maximum is zero or not finite."""
    top = jnp.max(jnp.stack([jnp.max(x) for x in leaves]))
    _, exponent = jnp.frexp(jnp.where(jnp.isfinite(top) & (top > 0), top, jnp.ones_like(top)))
    return exponent


def norm(tree: PyTree) -> tuple[Array, Array]:
    """Euclidean norm of all leaves of a pytree as (mantissa, exponent): ||tree|| = mantissa * 2^exponent.

    Args:
      tree: pytree of real or complex floating arrays of any shapes.

    Returns:
      mantissa: () float32 (float64 if a leaf is), in [1/2, sqrt(size)); 0, inf or NaN where the norm is.
      exponent: () int32.
    """
    leaves = _leaves(tree)
    exponent = _shared_exponent(leaves)
    return jnp.sqrt(sum(jnp.sum(jnp.square(jnp.ldexp(x, -exponent))) for x in leaves)), exponent


def log_norm(tree: PyTree) -> Array:
    """Natural logarithm of the Euclidean norm of a pytree; -inf for zeros, and never an overflow.

    >>> import jax.numpy as jnp
    >>> round(float(log_norm({"w": jnp.full(4, 1e38)})) / jnp.log(10.0).item(), 3)   # log10 of 2e38
    38.301
    """
    mantissa, exponent = norm(tree)
    return jnp.log(mantissa) + exponent.astype(mantissa.dtype) * LOG2


def log_rms(tree: PyTree) -> Array:
    """Natural logarithm of the root mean square over all entries of a pytree."""
    size = max(sum(x.size for x in jax.tree.leaves(tree)), 1)
    value = log_norm(tree)
    return value - 0.5 * jnp.log(jnp.asarray(size, value.dtype))


def normalize(tree: PyTree) -> tuple[PyTree, Array]:
    """(tree * 2^-exponent, exponent) with the largest magnitude in [1/2, 1): exact, dtypes kept.

    Zero and non-finite trees are returned as they are, with exponent 0.
    """
    exponent = _shared_exponent(_leaves(tree))
    return jax.tree.map(lambda x: jnp.ldexp(x, -exponent).astype(x.dtype), tree), exponent
