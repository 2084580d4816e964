"""Tolerances that follow from a bound: how far two floating-point computations may lie apart.

A sum (or product, or dot product) of n terms computed in any order satisfies

    |fl(s) - s| <= gamma_n sum_i |x_i|,    gamma_n = n u / (1 - n u),    u = eps / 2,

(Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1 and equation 4.4), with or
without fused multiply-adds, on any processor and for any vector width. Two computations of one
quantity therefore differ by at most twice that.
"""

import jax.numpy as jnp
import numpy as np


def gamma(terms: int, dtype=np.float32) -> float:
    """gamma_n of `terms` roundings in `dtype`."""
    n_u = terms * float(jnp.finfo(dtype).eps) / 2
    assert n_u < 0.5, f"{terms} roundings in {jnp.dtype(dtype)} leave no digit; bound it otherwise"
    return n_u / (1 - n_u)


def assert_rounding(found, expected, *, terms: int, size=None, dtype=None, exact: bool = False):
    """Assert that two results of `terms` roundings each differ by no more than rounding explains.

    Args:
      found: what a program returned.
      expected: the same quantity from another program, or its true value with `exact`.
      terms: roundings on the way from exact operands to one entry: the terms of its sums and the
        factors of its products, added over consecutive operations.
      size: sum of the absolute values of what is summed, broadcast against the entries; by default
        the largest absolute entry of `expected`, which serves where nothing cancels.
      dtype: of the arithmetic; by default that of `found`.
      exact: whether `expected` carries no rounding error of its own.
    """
    dtype = jnp.dtype(dtype or jnp.asarray(found).dtype)
    found = np.asarray(found, np.float64)
    expected = np.asarray(expected, np.float64)
    assert found.shape == expected.shape, f"shapes {found.shape} and {expected.shape}"
    if size is None:
        size = np.max(np.abs(expected), initial=0.0)
    # a result below the normal range may have been flushed to zero
    floor = float(jnp.finfo(dtype).tiny)
    sides = 1 if exact else 2
    allowed = sides * (gamma(terms, dtype) * np.asarray(size, np.float64) + floor)
    excess = np.abs(found - expected) - allowed
    worst = np.unravel_index(np.argmax(excess), excess.shape) if excess.size else ()
    assert not excess.size or excess[worst] <= 0, (
        f"entry {tuple(map(int, worst))}: {found[worst]!r} and {expected[worst]!r} differ by "
        f"{abs(found[worst] - expected[worst]):.3g}; {terms} roundings in {dtype} explain "
        f"{np.broadcast_to(allowed, excess.shape)[worst]:.3g}"
    )
