"""Moments, traces and spectral densities by Monte Carlo, built on matfree."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from matfree import decomp, stochtrace

from gradjax.core import scale
from gradjax.core.step import Links, Step
from gradjax.matrix_free.rows import Operator, flat_operator, relative, scaled

PyTree = Any


class Estimate(NamedTuple):
    """A Monte Carlo estimate and the standard error of its value, inf from a single sample."""

    value: Array
    standard_error: Array


class SpectralDensity(NamedTuple):
    """Quadrature nodes and weights of the spectrum, and their sum smoothed by a Gaussian.

    Attributes:
      grid: (num_points,) log sigma in nats, or eigenvalues.
      density: (num_points,) per unit of the grid; its integral is 1 - mass_at_zero.
      standard_error: (num_points,) of the density, over the samples, without the bias of smoothing.
      nodes: (num_samples, m) Ritz values, for use in sums only; -inf: sigma is zero.
      weights: (num_samples, m), rows sum to 1.
      mass_at_zero: () fraction of the singular values that are zero to rounding.
    """

    grid: Array
    density: Array
    standard_error: Array
    nodes: Array
    weights: Array
    mass_at_zero: Array


def _samples(
    name: str, integrand: Callable, n: int, num_samples: int, key: Array
) -> tuple[PyTree, PyTree]:
    """Mean and standard error of integrand(z) over Rademacher vectors z."""
    _check_counts(name, num_samples=num_samples)
    sampler = stochtrace.sampler_signs(jnp.zeros((n,)), num=num_samples)
    run = stochtrace.estimator_monte_carlo_mean_and_sem(lambda _, z: integrand(z), sampler)
    mean, error = run(None, key)
    if num_samples == 1:
        return mean, jnp.full_like(mean, jnp.inf)
    # matfree divides the sum of squares by num_samples, an unbiased estimate by num_samples - 1
    return mean, error * (num_samples / (num_samples - 1)) ** 0.5


def log_moments(
    step: Step | Links | Operator,
    h0: PyTree,
    thetas: PyTree | None = None,
    *,
    key: Array,
    order: int = 2,
    num_samples: int = 16,
) -> Estimate:
    """log m_j = log(tr (J J^T)^j / N'), j = 1 .. order, by Hutchinson's estimator.

        tr (J J^T)^j = E ||.. J^T J z||^2 with j factors,  z_i = +-1

    N' is the size of the last state.

    Args:
      step, h0, thetas: as in `top_singular_values`; m_j may be far beyond a float.
      key, num_samples: for the vectors z, which go through J as one block.
      order: the last moment.

    Returns:
      `Estimate` of (order,) nats; the standard error is that of m_j divided by m_j.

    Raises:
      ValueError: order or num_samples below 1; a step as in `check_step`.

    References:
      Hutchinson, A stochastic estimator of the trace of the influence matrix, Comm. Stat. Simul.
      19, 1990.
    """
    _check_counts("log_moments", order=order)
    pilot, key = jax.random.split(key)
    matvec, exponent, n_in, n_out = scaled(step, h0, thetas, pilot)

    def integrand(z):
        squares = []
        for factor in range(order):
            z = matvec(z, transpose=factor % 2 == 1)
            squares.append(jnp.sum(z**2))
        return jnp.stack(squares)

    mean, error = _samples("log_moments", integrand, n_in, num_samples, key)
    powers = 2.0 * scale.LOG2 * jnp.arange(1, order + 1, dtype=mean.dtype)
    log_scale = powers * exponent.astype(mean.dtype) - jnp.log(jnp.asarray(n_out, mean.dtype))
    return Estimate(jnp.log(mean) + log_scale, relative(error, mean))


def trace(operator: Operator, like: PyTree, *, key: Array, num_samples: int = 16) -> Estimate:
    """Hutchinson's estimate, (), of the trace of a linear operator v -> A v on pytrees like `like`.

    Raises:
      ValueError: an operator as in `top_eigenvalues`; num_samples below 1.
    """
    matvec, n = flat_operator("trace", operator, like)
    return Estimate(*_samples("trace", lambda z: jnp.vdot(z, matvec(z)), n, num_samples, key))


def _check_counts(name: str, **counts: int) -> None:
    for count, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}: {count} is {value}; at least 1 is needed.")


def _until_exhausted(small: Any, *offsets: int) -> Array:
    """matfree's tri- or bidiagonal matrix until the Krylov space is exhausted, then zeros.

    From there on matfree divides a rounding error by its norm, or 0 by 0, and the later vectors are
    not orthogonal to the earlier ones. They have no weight in the quadrature: the coupling, a
    product of the entries at `offsets`, is zero.
    """
    size = jnp.max(jnp.where(jnp.isfinite(small), jnp.abs(small), 0.0))
    couplings = [jnp.abs(jnp.diagonal(small, offset))[: small.shape[0] - 1] for offset in offsets]
    rounding = 30.0 * jnp.finfo(small.dtype).eps * size
    goes_on = jnp.stack([x > rounding for x in couplings]).all(axis=0)
    kept = jnp.concatenate([jnp.ones(1, bool), jnp.cumprod(goes_on) > 0])
    return jnp.where(kept[:, None] & kept[None, :], small, 0.0)


def _smooth(
    nodes: Array, weights: Array, bandwidth: float | None, floor: Any, num_points: int
) -> SpectralDensity:
    """The density on a grid; `floor` is the smallest bandwidth that is chosen by default."""
    finite = jnp.isfinite(nodes)
    seen = finite & (weights > 1e-6)
    low, high = jnp.min(jnp.where(seen, nodes, jnp.inf)), jnp.max(jnp.where(seen, nodes, -jnp.inf))
    low, high = (jnp.where(jnp.isfinite(x), x, 0.0) for x in (low, high))
    if bandwidth is None:
        width = jnp.maximum((high - low) / nodes.shape[1], floor)
    else:
        width = jnp.asarray(bandwidth, low.dtype)
    grid = jnp.linspace(low - 5.0 * width, high + 5.0 * width, num_points)
    z = (grid[:, None, None] - jnp.where(finite, nodes, 0.0)[None]) / width
    kernels = jnp.exp(-0.5 * z**2) / (width * (2.0 * jnp.pi) ** 0.5)
    density = jnp.sum(kernels * jnp.where(finite, weights, 0.0)[None], axis=2)
    count = nodes.shape[0]
    error = jnp.full(num_points, jnp.inf)
    if count > 1:
        error = jnp.std(density, axis=1, ddof=1) / count**0.5
    at_zero = jnp.sum(jnp.where(finite, 0.0, weights)) / count
    return SpectralDensity(grid, jnp.mean(density, axis=1), error, nodes, weights, at_zero)


def singular_value_density(
    step: Step | Links | Operator,
    h0: PyTree,
    thetas: PyTree | None = None,
    *,
    key: Array,
    num_samples: int = 16,
    num_matvecs: int = 32,
    bandwidth: float | None = None,
    num_points: int = 256,
) -> SpectralDensity:
    """The density of log sigma of the Jacobian, by stochastic Lanczos quadrature.

        rho(x) = 1/N sum_i delta(x - log sigma_i) = E sum_m w_m delta(x - log s_m)

    s_m are the singular values of the bidiagonal matrix that matfree makes from a random vector z.

    Args:
      step, h0, thetas: as in `top_singular_values`, N numbers in h0.
      key, num_samples: for the vectors z, whose entries are +-1.
      num_matvecs: nodes per vector, m: their sums are exact for polynomials in sigma^2 up to degree
        2 m - 1; at most the smaller side of J is used.
      bandwidth: nats; by default the nodes' spread / num_matvecs, which is what they can resolve,
        and at least 0.01.
      num_points: of the grid, which goes 5 bandwidths beyond the nodes.

    Returns:
      `SpectralDensity` over log sigma in nats. Values below num_matvecs * eps of the largest are
      noise and count as zero: for a network as graded as that, `mass_at_zero` is the fraction
      below.

    Raises:
      ValueError: a count below 1, a step as in `check_step`.

    References:
      Ubaru, Chen, Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, SIAM J.
      Matrix Anal. 38, 2017.
      Lin, Saad, Yang, Approximating spectral densities of large matrices, arXiv:1308.5467, 2013,
      section 3.2.
    """
    name = "singular_value_density"
    _check_counts(name, num_samples=num_samples, num_matvecs=num_matvecs, num_points=num_points)
    pilot, key = jax.random.split(key)
    matvec, exponent, n_in, n_out = scaled(step, h0, thetas, pilot)
    decompose = decomp.bidiag(min(num_matvecs, n_in, n_out), materialize=True, reortho="full")

    def quadrature(z):
        _, sigma, right = jnp.linalg.svd(
            _until_exhausted(decompose(matvec, z).J_small, 0, 1), full_matrices=False
        )
        return sigma, right[:, 0] ** 2

    signs = stochtrace.sampler_signs(jnp.zeros((n_in,)), num=num_samples)(key)
    sigma, weights = jax.vmap(quadrature)(signs)
    zero = sigma <= num_matvecs * jnp.finfo(sigma.dtype).eps * jnp.max(sigma)
    shift = exponent.astype(sigma.dtype) * scale.LOG2
    nodes = jnp.where(zero, -jnp.inf, jnp.log(jnp.where(zero, 1.0, sigma)) + shift)
    return _smooth(nodes, weights, bandwidth, 0.01, num_points)


def spectral_density(
    operator: Operator,
    like: PyTree,
    *,
    key: Array,
    num_samples: int = 16,
    num_matvecs: int = 32,
    bandwidth: float | None = None,
    num_points: int = 256,
) -> SpectralDensity:
    """The density of a symmetric operator's eigenvalues, by stochastic Lanczos quadrature.

    For the Hessian of a loss see Ghorbani, Krishnan, Xiao, arXiv:1901.10159, 2019.

    Args:
      operator, like: as in `top_eigenvalues`.
      key, num_samples, num_matvecs, num_points: as in `singular_value_density`.
      bandwidth: in the unit of the eigenvalues; by default the nodes' spread / num_matvecs.

    Returns:
      `SpectralDensity` over the eigenvalues; `mass_at_zero` is 0.

    Raises:
      ValueError: a count below 1, an operator as in `top_eigenvalues`.
    """
    name = "spectral_density"
    _check_counts(name, num_samples=num_samples, num_matvecs=num_matvecs, num_points=num_points)
    matvec, n = flat_operator(name, operator, like)
    # This is what matfree's tridiag_sym runs; that averages H with its transpose, which would hide
    # an exhausted space.
    decompose = decomp.hessenberg(min(num_matvecs, n), reortho="full", custom_vjp=False)

    def quadrature(z):
        small: Any = decompose(matvec, z).J_small
        diagonal, below = jnp.diag(small), jnp.diag(small, -1)
        small = jnp.diag(diagonal) + jnp.diag(below, -1) + jnp.diag(below, 1)
        values, vectors = jnp.linalg.eigh(_until_exhausted(small, 1))
        return values, vectors[0] ** 2

    signs = stochtrace.sampler_signs(jnp.zeros((n,)), num=num_samples)(key)
    nodes, weights = jax.vmap(quadrature)(signs)
    # a spectrum of one point has no spread
    floor = jnp.maximum(1e-3 * jnp.max(jnp.abs(nodes)), jnp.finfo(nodes.dtype).tiny)
    return _smooth(nodes, weights, bandwidth, floor, num_points)
