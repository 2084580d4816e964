"""Exponents, moments and norms of random products: multi-precision, simulation, wrong settings."""

import functools
import math

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from scipy import stats
from theory.reference import gaussian, p_value

from gradjax import log_singular_values
from gradjax.theory import random_matrix as rm

fuss_catalan = jax.jit(rm.fuss_catalan_log_moment)
second_moments = jax.jit(rm.log_second_moments)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def close(report):
    """Largest relative error (absolute below 1), reported and held to a bound."""

    def check(name, value, expected, tol=1e-10):
        value, expected = np.asarray(value, float), np.asarray(expected, float)
        error = float(np.max(np.abs(value - expected) / np.maximum(1, np.abs(expected))))
        report(name, error)
        assert error < tol, (name, error)

    return check


# Formula 1


@pytest.fixture(scope="module")
def newman():
    """(exponents, variance) at N = 32, the exponents at N = 2000 and their limit, one program."""

    @jax.jit
    def all_of_them(sigma_w, depth):
        exponents = rm.newman_exponents(32, sigma_w), rm.newman_variance(32, depth)
        limit = rm.newman_limit(jnp.arange(1, 1901) / 2000)
        return *exponents, rm.newman_exponents(2000), limit

    return all_of_them


def test_newman_against_multiprecision(newman, close):
    depth, sigma_w = 4000.0, 1.3
    exponents, variance, many, limit = newman(sigma_w, depth)
    half = [mp.mpf(33 - i) / 2 for i in range(1, 33)]
    exact = [mp.log(sigma_w) + (mp.log(mp.mpf(2) / 32) + mp.psi(0, x)) / 2 for x in half]
    close("formula 1, exponents", exponents, exact)
    close("formula 1, variance", variance, [mp.psi(1, x) / (4 * depth) for x in half])
    close("formula 1, limit", np.asarray(limit)[[199, 1799]], [mp.log(0.9) / 2, mp.log(0.1) / 2])
    np.testing.assert_allclose(many[:1900], limit, atol=3e-3)


def test_newman_against_a_product(newman):
    """Growth rates of the QR decomposition, whose variance is exact; a gain 1% off is rejected."""
    n, depth = 32, 2000
    q, logs = np.eye(n), np.zeros(n)
    for w in gaussian(np.random.default_rng(0), depth, n, n):
        q, r = np.linalg.qr(w @ q)
        logs += np.log(np.abs(np.diag(r)))

    def p(sigma_w):
        exponents, variance, *_ = newman(sigma_w, float(depth))
        return stats.chi2.sf(np.sum((logs / depth - exponents) ** 2 / variance), n)

    assert p(1.0) > 1e-3
    assert p(1.01) < 1e-3 and p(0.99) < 1e-3


# Formulas 2 and 3


def test_fuss_catalan(close):
    k, depth = np.meshgrid([0.0, 1.0, 2.0, 3.0, 10.0], [1.0, 2.0, 6.0, 50.0])
    exact = np.vectorize(
        lambda k, L: mp.log(mp.binomial(L * k + k, k) / (L * k + 1)), otypes=[float]
    )
    found = fuss_catalan(k, depth)
    close("formula 2, log moments", found, exact(k, depth))
    np.testing.assert_allclose(np.exp(found[:, 2]), depth[:, 2] + 1, rtol=1e-12)


@pytest.mark.parametrize(
    ("keep", "sigma_w"), [(1.0, 1.0), (1.0, 1.1), (0.5, math.sqrt(2)), (0.8, 1.0)]
)
def test_second_moments_are_the_recursion(keep, sigma_w, close):
    depths, widths = (0, 1, 6, 199), (1, 2, 32)
    depth, width = np.meshgrid(np.float64(depths), np.float64(widths))
    shape = np.ones_like(depth)
    found = second_moments(depth, width, sigma_w * shape, keep * shape)
    exact = np.empty((2, *depth.shape))
    for row, n in enumerate(widths):
        a = b = mp.mpf(1)
        for layer in range(200):
            if layer in depths:
                exact[:, row, depths.index(layer)] = mp.log(a), mp.log(b)
            h2, h11 = b + 2 * a / n, b  # E H_ii^2, E H_ii H_jj of H = W M W^T; E H_ij^2 = a / n
            a, b = (
                sigma_w**4 * (keep * h2 + keep**2 * (n - 1) * a / n),
                sigma_w**4 * (keep * h2 / n + keep**2 * (1 - mp.mpf(1) / n) * h11),
            )
    close(f"formula 3, keep {keep}", found, exact)


def scalar_second_moments(*numbers):
    return np.array([float(x) for x in second_moments(*map(float, numbers))])


@pytest.mark.slow
def test_second_moment_of_linear_products():
    s = log_singular_values(gaussian(np.random.default_rng(1), 400, 6, 32, 32))
    found = np.stack([np.exp(4 * s).mean(1), np.exp(2 * s).mean(1) ** 2], 1)
    assert p_value(found, np.exp(scalar_second_moments(6, 32, 1, 1))) > 1e-3
    # L / N = 0.19: the law of infinite width is rejected, and so is sigma_w + 1%
    assert p_value(found[:, :1], [math.exp(fuss_catalan(2.0, 6.0))]) < 1e-3
    assert p_value(found, np.exp(scalar_second_moments(6, 32, 1.01, 1))) < 1e-3


def relu_products(rng, count, depth, n):
    """Jacobians of real ReLU networks (He), their masks from a forward pass."""
    w = gaussian(rng, count, depth, n, n) * math.sqrt(2)
    x, j = np.broadcast_to(np.eye(n)[0], (count, n)), np.broadcast_to(np.eye(n), (count, n, n))
    for layer in range(depth):
        h = np.einsum("cij,cj->ci", w[:, layer], x)
        j = (h > 0)[:, :, None] * (w[:, layer] @ j)
        x = np.maximum(h, 0)
    return j


def test_second_moment_of_relu_networks():
    j = relu_products(np.random.default_rng(2), 3000, 4, 16)
    gram = j @ j.transpose(0, 2, 1)
    square, trace = np.einsum("cij,cij->c", gram, gram) / 16, np.trace(gram, axis1=1, axis2=2) / 16
    found = np.stack([square, trace**2], 1)
    assert p_value(found, np.exp(scalar_second_moments(4, 16, math.sqrt(2), 0.5))) > 1e-3
    # the law of a linear network, and a gain 1% off
    assert p_value(found, np.exp(scalar_second_moments(4, 16, 1, 1))) < 1e-3
    assert p_value(found, np.exp(scalar_second_moments(4, 16, 1.01 * math.sqrt(2), 0.5))) < 1e-3


def test_formula_3_printed_values():
    assert f"{np.exp(scalar_second_moments(6, 32, 1, 1)[0]):.3f}" == "7.764"
    he = np.exp(scalar_second_moments(1, 32, math.sqrt(2), 0.5)[0])
    assert he == pytest.approx(1 + 2 + 3 / 32, rel=1e-12)


# Formula 8


def test_norm_moments(close):
    widths = [7, 16, 16]
    law = jax.jit(lambda keep: rm.norm_moments(widths, keep))
    for keep in (0.5, 1.0):
        found = law(keep)
        mean = variance = fourth = mp.mpf(0)
        for n in widths:
            pk = [
                mp.binomial(n, k) * mp.mpf(keep) ** k * mp.mpf(1 - keep) ** (n - k)
                for k in range(n + 1)
            ]
            alive = 1 - pk[0]
            psi = [mp.psi(0, mp.mpf(k) / 2) for k in range(1, n + 1)]
            first = [x + mp.log(2 / (keep * mp.mpf(n))) for x in psi]
            m = sum(p * f for p, f in zip(pk[1:], first, strict=True)) / alive
            second = [mp.psi(1, mp.mpf(k + 1) / 2) + (f - m) ** 2 for k, f in enumerate(first)]
            mean += m
            variance += sum(p * f for p, f in zip(pk[1:], second, strict=True)) / alive
            fourth += mp.log(sum(p * (k * k + 2 * k) for k, p in enumerate(pk)) / (keep * n) ** 2)
        close(
            f"formula 8, mean and variance, keep {keep}",
            [found.mean, found.variance],
            [mean, variance],
        )
        close(f"formula 8, fourth moment, keep {keep}", found.log_fourth, fourth)
    relu = law(0.5)
    assert float(relu.beta) == pytest.approx(5 * sum(1 / n for n in widths), rel=1e-14)
    fourth = math.log(math.prod(1 + 5 / n for n in widths))
    assert float(relu.log_fourth) == pytest.approx(fourth, rel=1e-14)


@pytest.mark.slow
def test_norm_moments_of_wide_networks():
    wide = rm.norm_moments([2000] * 50)
    assert float(wide.mean / -(wide.beta / 2)) == pytest.approx(1, abs=5e-3)
    assert float(wide.variance / wide.beta) == pytest.approx(1, abs=5e-3)


@pytest.mark.slow
def test_norm_moments_against_relu_networks():
    log_norm = np.log((relu_products(np.random.default_rng(5), 4000, 8, 16)[:, :, 3] ** 2).sum(1))

    def p(mean, variance):
        mean, variance = float(mean), float(variance)
        return p_value(np.stack([log_norm, (log_norm - mean) ** 2], 1), [mean, variance])

    def p_of_law(keep, widths):
        law = rm.norm_moments(widths, keep)
        return p(law.mean, law.variance)

    assert p_of_law(0.5, [16] * 8) > 1e-3
    assert p_of_law(1.0, [16] * 8) < 1e-3
    assert p_of_law(0.5, [15] * 8) < 1e-3
    beta = float(rm.norm_moments([16] * 8).beta)  # the Gaussian limit is not enough at this width
    assert p(-beta / 2, beta) < 1e-3


# Formula 11


def test_ginibre_products(close):
    cdf = jax.jit(rm.ginibre_product_cdf)
    for factors, printed in ((5.0, "32"), (100.0, "94")):
        fraction = float(cdf(math.sqrt(0.01 / math.pi), factors))
        assert f"{100 * fraction:.0f}" == printed
        close("formula 11, r^(2/k)", fraction, (0.01 / math.pi) ** (1 / factors))
    rng, radii = np.random.default_rng(6), np.array([0.1, 0.3, 0.6])
    found = []
    for _ in range(30):
        j = functools.reduce(np.matmul, gaussian(rng, 3, 120, 120))
        found.append((np.abs(np.linalg.eigvals(j))[:, None] < radii).mean(0))
    assert p_value(found, radii ** (2 / 3)) > 1e-3
    assert p_value(found, radii ** (2 / 2)) < 1e-3


# What a user may rely on


def test_extremes_stay_finite():
    log_a = scalar_second_moments(10_000, 64, 2, 1)[0]
    assert np.isfinite(log_a) and log_a > 20_000
    assert np.isfinite(float(fuss_catalan(50.0, 10_000.0)))


def test_dtypes_are_the_callers():
    def values():
        return (
            *rm.norm_moments([8], jnp.float32(0.5)),
            rm.newman_exponents(4, jnp.float32(1)),
            *rm.log_second_moments(3, jnp.float32(4)),
        )

    assert {x.dtype for x in jax.eval_shape(values)} == {np.dtype("float32")}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rm.newman_exponents(4, -1.0), "sigma_w = -1.0"),
        (lambda: rm.newman_exponents(0), "width = 0"),
        (lambda: rm.log_second_moments(3, 4, 1.0, 1.5), "keep = 1.5"),
        (lambda: rm.norm_moments([4, 0]), "widths"),
    ],
)
def test_errors_name_value_and_range(call, words):
    with pytest.raises(ValueError, match="random_matrix: ") as caught:
        call()
    assert words in str(caught.value)
