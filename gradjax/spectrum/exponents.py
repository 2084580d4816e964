"""Lyapunov exponents and spectral moments of the layer product J = W_L ... W_1.

    lambda_i = lim 1/L log sigma_i(J) = lim 1/L sum_l log |r_ii(l)|,      m_k = tr (J J^T)^k / N

Both come from one pass without singular values, so that they have derivatives. On the host they run
in float64 and return NumPy; on tracers in the factors' own dtype.

Factors of unequal width have no exponents per step; a factor that has lost rank has an exponent of
-inf and no derivative there. Cost: O(depth * width^3), memory O(width^2),
or O(depth * width^2) under grad.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gradjax.spectrum.factors import at_least_float32, check_factors, on_tracers, stack_factors, x64
from gradjax.spectrum.logscale import safe_log


class LyapunovExponents(NamedTuple):
    """Finite-depth Lyapunov exponents of a product, in the order of the QR sweep.

    That order is descending in the limit.

    Attributes:
      exponents: (..., N) nats per factor.
      standard_errors: (..., N) nats per factor, by batch means; NaN below 4 factors.
    """

    exponents: Array
    standard_errors: Array


def _lyapunov(factors: Array) -> LyapunovExponents:
    """One lane, (L, N, N)."""
    depth, n = factors.shape[0], factors.shape[-1]

    def one(q, w):
        q, r = jnp.linalg.qr(jnp.matmul(w, q, precision="highest"))
        return q, safe_log(jnp.abs(jnp.diagonal(r)))

    _, growth = lax.scan(one, jnp.eye(n, dtype=factors.dtype), factors)
    batches = int(np.sqrt(depth))
    if batches < 2:
        return LyapunovExponents(jnp.mean(growth, 0), jnp.full(n, jnp.nan, growth.dtype))
    size = depth // batches
    means = jnp.mean(growth[depth - batches * size :].reshape(batches, size, n), axis=1)
    error = jnp.std(means, axis=0, ddof=1) / float(np.sqrt(batches))
    return LyapunovExponents(jnp.mean(growth, 0), error)


def _moments(factors: Array, *, ks: tuple[int, ...]) -> Array:
    """log tr (J J^T)^k / N of one lane, (L, N, N); intermediates have entries of at most 1."""

    def scaled(x, log_scale):
        top = lax.stop_gradient(jnp.max(jnp.abs(x)))
        return x / jnp.where(top > 0, top, 1.0), log_scale + safe_log(top)

    def one(state, w):
        # scaled first, so that the product of two large numbers is never formed
        w, log_w = scaled(w, state[1])
        return scaled(jnp.matmul(w, state[0], precision="highest"), log_w), None

    eye, zero = jnp.eye(factors.shape[-1], dtype=factors.dtype), jnp.zeros((), factors.dtype)
    (j, log_j), _ = lax.scan(one, (eye, zero), factors)
    gram, log_gram = scaled(jnp.matmul(j, j.T, precision="highest"), 2 * log_j)
    power, log_power, found = gram, log_gram, {}
    for k in range(1, max(ks) + 1):
        found[k] = safe_log(jnp.trace(power)) + log_power
        if k < max(ks):
            power, log_power = scaled(
                jnp.matmul(power, gram, precision="highest"), log_power + log_gram
            )
    return jnp.stack([found[k] for k in ks], axis=-1)


@functools.partial(jax.jit, static_argnames=("f",))
def _jitted(flat: Array, *, f: Callable) -> Any:
    return lax.map(f, flat)


def _by_lane(f: Callable, factors: Any) -> Any:
    """`f` over the lanes of a stack.

    In float64, returning NumPy, on the host; in the factors' own dtype on tracers.
    """
    if on_tracers(factors):
        flat = factors.reshape(-1, *factors.shape[-3:]).astype(at_least_float32(factors.dtype))
        found = jax.vmap(f)(flat)
        return jax.tree.map(lambda x: x.reshape(*factors.shape[:-3], -1), found)
    with jax.enable_x64(True):
        flat = jnp.asarray(factors).astype(float)
        found = _jitted(flat.reshape(-1, *flat.shape[-3:]), f=f)
        return jax.tree.map(lambda x: np.asarray(x).reshape(*flat.shape[:-3], -1), found)


def lyapunov_exponents(factors: Any) -> LyapunovExponents:
    """Lyapunov exponents of W_L ... W_1 by a QR sweep.

        lambda_i = 1/L sum_l log |r_ii(l)|,     W_l Q_{l-1} = Q_l R_l

    They tend to 1/L log sigma_i as L grows and differ from it at finite L (by nats in L lambda_i:
    for the singular values themselves use `log_singular_values`). Differentiable: a gradient can
    push exponents towards 0 (gradient flossing). The derivative is that of the sweep from Q_0 = 1,
    and exists where every factor has full rank.

    Args:
      factors: (..., L, N, N) floating, applied first to last.

    Returns:
      `LyapunovExponents`, (..., N) each. NumPy float64 on the host; on tracers jax arrays in the
      factors' own dtype. -inf where a factor has lost rank. The standard errors are those of about
      sqrt(L) batch means, so that batches need to be independent but steps need not.

    Raises:
      ValueError: empty, integer or complex factors, or factors that are not square: exponents are
        not defined for unequal widths.

    References:
      Benettin et al., Meccanica 15, 1980; Engelken, Gradient flossing, arXiv:2312.17306, 2023.

    >>> import jax.numpy as jnp
    >>> w = jnp.broadcast_to(jnp.diag(jnp.array([2.0, 0.5])), (1000, 2, 2))
    >>> lyapunov_exponents(w).exponents.round(4).tolist()
    [0.6931, -0.6931]
    """
    if isinstance(factors, list | tuple):
        shapes = [np.shape(x) for x in factors]
        raise ValueError(
            f"lyapunov_exponents: a list of factors with shapes {shapes}; exponents per step need "
            "square factors of one size, stacked to (..., L, N, N). For unequal widths use "
            "log_singular_values."
        )
    return _by_lane(_lyapunov, check_factors(factors, "lyapunov_exponents"))


def moments(factors: Any, k: int | Sequence[int] = (1, 2)) -> Any:
    """Logarithms of the spectral moments m_k = tr (J J^T)^k / N of J = W_L ... W_1.

    They exist where m_k itself overflows. Differentiable on tracers, and defined where singular
    values coincide. m_2 / m_1^2 - 1 is the relative variance of the squared singular values
    (Pennington, Schoenholz, Ganguli 2017).

    Args:
      factors: (..., L, N, N) floating, or a list of matrices of unequal shapes; N is then the rows
        of the last.
      k: one moment, or several, at least 1 each.

    Returns:
      (...) for an int, (..., len(k)) for a sequence, nats; -inf for a product that is zero. NumPy
      float64 on the host; on tracers in the factors' own dtype.

    Raises:
      ValueError: factors as in `log_singular_values`; k below 1.

    References:
      Pennington, Schoenholz, Ganguli, Resurrecting the sigmoid, arXiv:1711.04735, 2017, eq. 11 on.

    >>> import jax.numpy as jnp
    >>> w = jnp.broadcast_to(2.0 * jnp.eye(3), (1000, 3, 3))  # m_1 = 4^1000
    >>> moments(w, 1).round(3).tolist()
    1386.294
    """
    ks = (k,) if isinstance(k, int | np.integer) else tuple(k)
    if not ks or any(not isinstance(i, int | np.integer) or i < 1 for i in ks):
        raise ValueError(f"moments: k is {k}; integers of at least 1 are needed.")
    checked = check_factors(factors, "moments")
    with jax.enable_x64(x64() or not on_tracers(checked)):
        stack, shapes = stack_factors(checked)
    found = _by_lane(_moment_program(ks), stack) - float(np.log(shapes[-1][0]))
    return found[..., 0] if isinstance(k, int | np.integer) else found


@functools.cache
def _moment_program(ks: tuple[int, ...]) -> Callable:
    return functools.partial(_moments, ks=ks)
