"""Lyapunov exponents and moments: closed forms, identities, derivatives."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from products import descending, gaussian, naive, rng

from gradjax.spectrum.exponents import lyapunov_exponents, moments
from gradjax.spectrum.jacobian import jacobian_spectrum, log_singular_values


def test_exponents_commute_and_sum_to_the_log_determinant():
    logs = descending(rng(1).standard_normal(5))
    factors = np.stack([np.stack([np.diag(np.exp(logs))] * 30), gaussian(30, 5)])
    found = lyapunov_exponents(factors)
    assert found.exponents.shape == (2, 5) and found.exponents.dtype == np.float64
    # of commuting factors
    assert np.abs(found.exponents[0] - logs).max() < 1e-12
    assert np.abs(found.standard_errors[0]).max() < 1e-12
    log_determinant = np.linalg.slogdet(factors)[1].mean(-1)
    assert np.abs(found.exponents.sum(-1) - log_determinant).max() < 1e-12


def newman(n):
    """Exponents of Gaussian factors (Newman 1986), and the variance of one factor's growth."""
    from scipy.special import digamma, polygamma

    freedom = (n - np.arange(n)) / 2
    return 0.5 * (np.log(2 / n) + digamma(freedom)), polygamma(1, freedom) / 4


@pytest.mark.slow
def test_newman_exponents():
    """The joint chi-squared over all exponents, and a gain 1% off as the control."""
    from scipy.stats import chi2

    n, depth = 8, 4000
    factors = gaussian(depth, n, 4)
    exact, variance = newman(n)
    error = np.sqrt(variance / depth)
    found = lyapunov_exponents(factors)
    for values in (log_singular_values(factors) / depth, found.exponents):
        assert chi2.sf((((values - exact) / error) ** 2).sum(), n) > 1e-3
        assert chi2.sf((((values + 0.01 - exact) / error) ** 2).sum(), n) < 1e-3
    ratio = found.standard_errors / error
    assert (ratio < 2).all() and (ratio > 0.5).all()


@pytest.mark.slow
def test_depth_ten_thousand():
    """Keys as thetas: no weight is held; Newman's exponents are not rejected."""
    from scipy.stats import chi2

    n, depth = 64, 10_000
    step = lambda h, key: jax.random.normal(key, (n, n)) @ h / np.float32(np.sqrt(n))
    found = jacobian_spectrum(step, jnp.zeros(n), jax.random.split(jax.random.key(3), depth))
    exact, variance = newman(n)
    z = (found.log_singular_values / depth - exact) / np.sqrt(variance / depth)
    assert chi2.sf((z**2).sum(), n) > 1e-3 and found.info.trusted


def test_exponents_differentiate():
    with jax.enable_x64(True):
        factors = np.eye(4) + 0.3 * gaussian(6, 4)
        direction = rng(9).standard_normal(factors.shape)
        weights = np.arange(1.0, 5.0)

        def f(t):
            return jnp.sum(weights * lyapunov_exponents(factors + t * direction).exponents ** 2)

        @jax.jit
        def derivatives(t):
            return f(t), jax.grad(f)(t), jax.grad(jax.grad(f))(t)

        _, slope, second = derivatives(0.0)
        (high, *_), (low, *_) = derivatives(1e-5), derivatives(-1e-5)
        assert abs(slope - (high - low) / 2e-5) < 1e-7 * (1 + abs(slope))
        assert np.isfinite(second)


def test_exponents_refuse_unequal_widths():
    with pytest.raises(ValueError, match="square"):
        lyapunov_exponents([np.zeros((3, 4)), np.zeros((2, 3))])


def test_moments_are_those_of_the_singular_values():
    traced = jax.jit(lambda w: moments(w, (1, 2, 5)))
    for gain in (1e-20, 1.0, 1e20):
        factors = gaussian(dtype=np.float32) * np.float32(gain)
        values = naive(factors)
        found = moments(factors, (1, 2, 5))
        exact = [mpmath.log(sum(mpmath.exp(2 * k * v) for v in values) / 8) for k in (1, 2, 5)]
        assert np.abs(found - np.array(exact, float)).max() < 1e-5 * max(1, np.log10(gain) ** 2)
        in_float32 = traced(factors)
        assert in_float32.dtype == jnp.float32 and np.abs(in_float32 / found - 1).max() < 1e-4
    assert (moments(np.zeros_like(factors), (1, 2, 5)) == -np.inf).all()


def test_moments_differentiate_and_take_unequal_widths():
    with jax.enable_x64(True):
        factors = [rng(i).standard_normal(s) for i, s in enumerate([(5, 3), (4, 5)])]
        j = factors[1] @ factors[0]
        assert moments(factors, 1) == pytest.approx(np.log(np.sum(j * j) / 4), abs=1e-12)
        f = lambda t: moments([factors[0] * (1 + t), factors[1]], 2)
        # the second moment is of degree 4
        assert jax.jit(jax.grad(f))(0.0) == pytest.approx(4.0)


def test_moments_refuse_bad_k():
    with pytest.raises(ValueError, match="k is 0"):
        moments(np.zeros((3, 2, 2)), 0)
