"""The law of the squared derivative and the density of the spectrum: closed forms,
multi-precision, simulation, wrong settings."""

import functools
import math

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from theory.reference import erf, gaussian, orthogonal, p_value

from gradjax import log_singular_values
from gradjax.theory import random_matrix as rm


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


_density = jax.jit(rm.product_density, static_argnames=("weights", "num"))
_limit = jax.jit(rm.limit_density, static_argnames=("universality", "num"))
_law = jax.jit(rm.derivative_law, static_argnums=0)


@functools.lru_cache
def density(activation, q, depth, weights, sigma_w=None):
    """(law, curve) at criticality unless sigma_w is given; one compilation per (number of atoms,
    weights)."""
    with jax.enable_x64(True):
        law = rm.DerivativeLaw(*map(np.asarray, _law(activation, q)))
        if sigma_w is None:
            sigma_w = rm.derivative_moment(law, 1) ** -0.5
        curve = _density(law, jnp.float64(depth), jnp.float64(sigma_w), weights)
        return law, jax.tree.map(np.asarray, curve)


@functools.lru_cache
def limit(s2, universality):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, _limit(jnp.float64(s2), universality))


def moment(curve, f):
    """E f(lambda) over curve and atoms."""
    atoms = curve.atom_mass * f(np.exp(curve.log_atom)) if curve.atom_mass else 0.0
    return np.sum(curve.mass * f(np.exp(curve.log_lambda))) + atoms + curve.zero_mass * f(0.0)


def fuss_catalan(k, depth):
    """m_k of `depth` Gaussian factors."""
    return mp.binomial(depth * k + k, k) / (depth * k + 1)


# Formula 4: the law of the squared derivative


@pytest.mark.parametrize("q", [1e-4, 0.1, 1.0, 10.0, 100.0])
def test_derivative_moments(q, close):
    def moments(name):
        law = rm.DerivativeLaw(*map(np.asarray, _law(name, q)))
        return [np.sum(law.probabilities * law.values**k) for k in (1, 2, 3)]

    close(
        f"formula 4, mu_k of erf, q {q}",
        moments(erf),
        [(1 + k * np.pi * q) ** -0.5 for k in (1, 2, 3)],
    )
    close("formula 4, mu_k of hard-tanh", moments("hard_tanh"), [mp.erf(1 / mp.sqrt(2 * q))] * 3)
    tanh = 2 * mp.quad(lambda z: mp.sech(mp.sqrt(q) * z) ** 4 * mp.npdf(z), [0, 0.1, 0.3, 1, 3, 12])
    close("formula 4, mu_1 of tanh", moments("tanh")[0], tanh)


def test_piecewise_linear_laws_are_exact():
    for name, values, p in (
        ("linear", [1.0, 1.0], 1.0),
        ("relu", [1.0, 0.0], 0.5),
        ("leaky_relu", [1.0, 1e-4], 0.5),
        ("prelu", [1.0, 0.0625], 0.5),
    ):
        law = _law(name, 1.0)
        np.testing.assert_allclose(law.values, values, rtol=1e-15)
        np.testing.assert_array_equal(law.probabilities, [p, 1 - p])


def test_relative_variance():
    hard = rm.DerivativeLaw(*map(np.asarray, _law("hard_tanh", 0.7)))
    p = hard.probabilities[0]

    def variance(law, depth, weights):
        return float(rm.relative_variance(law, float(depth), weights))

    relu = rm.DerivativeLaw(np.array([1.0, 0.0]), np.array([0.5, 0.5]))
    linear = rm.DerivativeLaw(np.array([1.0, 1.0]), np.array([1.0, 0.0]))
    for depth in (2, 8, 64):
        assert variance(relu, depth, "gaussian") == 2 * depth
        assert variance(relu, depth, "orthogonal") == depth
        assert variance(linear, depth, "gaussian") == depth
        assert variance(linear, depth, "orthogonal") == 0
        found = 1 + variance(hard, depth, "gaussian")
        assert found == pytest.approx((depth + p) / p, rel=1e-12)


# Formulas 4 and 5: densities

CASES = [
    (phi, q, depth, weights)
    for weights in rm.WEIGHTS
    for phi, q in (("linear", 1.0), ("relu", 1.0), ("hard_tanh", 0.3), (erf, 0.3), ("tanh", 0.5))
    for depth in ((2, 128) if phi in (erf, "tanh") else (2, 16, 128))
]


@pytest.mark.slow
@pytest.mark.parametrize("weights", rm.WEIGHTS)
def test_density_mass_and_moments(weights, close):
    for phi, q, depth, family in CASES:
        if family != weights:
            continue
        law, curve = density(phi, q, depth, weights)
        name = f"{phi if isinstance(phi, str) else 'erf'}, {weights}, L {depth}"
        smooth = phi == "tanh" or phi is erf
        total = curve.mass.sum() + curve.atom_mass + curve.zero_mass
        close(f"formula 5, total mass: {name}", total, 1, tol=1e-4 if smooth else 1e-10)
        mean, second = (moment(curve, lambda x, k=k: x**k) for k in (1, 2))
        close(f"formula 5, mean: {name}", mean, 1, tol=1e-6 if smooth else 1e-10)
        expected = rm.relative_variance(law, depth, weights)
        close(f"formula 4, variance: {name}", second - 1, expected, tol=1e-8 if smooth else 1e-10)
        if curve.mass.sum() > 0:
            assert np.all(np.diff(curve.log_lambda) > 0) and np.all(curve.density >= 0)


def test_density_of_gaussian_products_is_fuss_catalan(close):
    for depth in (2, 16, 128):
        _, curve = density("linear", 1.0, depth, "gaussian")
        # the largest lambda is (L + 1)^(L + 1) / L^L, where M^{-1} is stationary, z = 1/L
        edge = (depth + 1) * math.log(depth + 1) - depth * math.log(depth)
        close("formula 2, edge", curve.log_lambda_max, edge)
        for k in (1, 2, 3, 4):
            found = np.log(moment(curve, lambda x, k=k: x**k))
            close("formula 2, moments of the curve", found, mp.log(fuss_catalan(k, depth)))
        # the closed form over an angle: lambda = sin((L+1)f)^(L+1) / (sin f sin(L f)^L)
        f = np.linspace(0.05, 0.9, 50) * np.pi / (depth + 1)
        top, sine, rest = np.sin((depth + 1) * f), np.sin(f), np.sin(depth * f)
        log_lambda = (depth + 1) * np.log(top) - np.log(sine) - depth * np.log(rest)
        drawn = np.interp(log_lambda[::-1], curve.log_lambda, curve.density)[::-1]
        close("formula 2, density drawn", drawn, top * sine / (rest * np.pi), tol=2e-3)


def inverse_bernoulli(m, p, depth):
    return (1 + m) / m * ((m + p) / (p * (1 + m))) ** depth


def test_curves_satisfy_the_s_transform(close):
    """M of the curve, right of its support, put into M^{-1} gives the point back (formula 5)."""

    def transform(curve):
        x = 1.5 * np.exp(curve.log_lambda_max)
        return x, moment(curve, lambda t: t / (x - t))

    for depth in (2, 16, 128):
        law, curve = density("hard_tanh", 0.3, depth, "orthogonal")
        x, m = transform(curve)
        found = inverse_bernoulli(m, law.probabilities[0], depth) / x
        close("formula 5, M^-1 at finite L, Bernoulli", found, 1)
    for s2 in (0.25, 1.0, 4.0):
        for kind in rm.CLASSES:
            curve = limit(s2, kind)
            x, m = transform(curve)
            log_s = -s2 * m / (1 + m) if kind == "bernoulli" else -s2 * m
            close(f"formula 5, M^-1 of the {kind} limit", (1 + m) / m * np.exp(-log_s) / x, 1)
            close(f"formula 5, variance of the {kind} limit", moment(curve, lambda t: t**2) - 1, s2)


def test_formula_5_largest_eigenvalues():
    """Hard-tanh, L = 32, sigma_0^2 = 0.25: 1.285 is p^-L at L (1 - p) = 0.25, and 1.283 at
    L (1/p - 1) = 0.25; and the edges and atoms of the limits."""
    for p, expected in ((1 - 0.25 / 32, "1.285"), (1 / (1 + 0.25 / 32), "1.283")):
        law = rm.DerivativeLaw(np.array([1.0, 0.0]), np.array([p, 1 - p]))
        curve = _density(law, jnp.float64(32), jnp.float64(p**-0.5), "orthogonal")
        assert f"{math.exp(curve.log_lambda_max):.3f}" == expected
        assert float(curve.atom_mass) == pytest.approx(32 * p - 31, abs=1e-12)
    for s2 in (0.1, 0.25, 0.9):
        assert float(limit(s2, "bernoulli").log_lambda_max) == pytest.approx(s2, abs=1e-14)
        assert float(limit(s2, "bernoulli").atom_mass) == pytest.approx(1 - s2, abs=1e-14)
    for s2 in (1.5, 4.0):
        found = float(limit(s2, "bernoulli").log_lambda_max)
        assert found == pytest.approx(1 + math.log(s2), abs=1e-12)
    for s2 in (0.1, 1.0, 4.0):
        z = (-1 + math.sqrt(1 + 4 / s2)) / 2
        found = float(limit(s2, "smooth").log_lambda_max)
        assert found == pytest.approx(math.log(1 + 1 / z) + s2 * z, abs=1e-12)


@pytest.mark.slow
def test_finite_depth_tends_to_the_limit():
    depth, s2 = 4000, 1.5
    # not critical in sigma_0, close to it: mu_2 / mu_1^2 - 1 = s2 / L
    q = ((1 + s2 / depth) ** 2 - 1) / math.pi
    law = rm.DerivativeLaw(*map(np.asarray, _law(erf, q)))
    mu, fourth = (np.sum(law.probabilities * law.values**k) for k in (1, 2))
    # the edge does not depend on the number of points
    smooth = _density(law, jnp.float64(depth), mu**-0.5, "orthogonal", num=16)
    edge = limit(depth * (fourth / mu**2 - 1), "smooth").log_lambda_max
    assert edge == pytest.approx(float(smooth.log_lambda_max), abs=2e-3)


@pytest.mark.slow
def test_smooth_density_against_multiprecision(close):
    """The erf curve, whose law has no atoms: its points solve the equation with E by
    multi-precision quadrature."""
    q, depth = 0.3, 16
    _, curve = density(erf, q, depth, "orthogonal")
    c = mp.pi * mp.mpf(q) / 2  # d^2 = exp(-c z^2)

    def mean(f):
        cuts = [0, 1, 2, 4, 8, 14]
        return 2 * mp.quad(lambda z: f(mp.exp(-c * z * z)) * mp.npdf(z), cuts)

    log_sigma = mp.log(1 + mp.pi * q) / 4

    def log_lambda(u):
        w = mp.exp(u)
        a, b = mean(lambda d: d / (1 - d * w)), mean(lambda d: 1 / (1 - d * w))
        return (depth - 1) * mp.log(a / b) - u + 2 * depth * log_sigma, b

    u = mp.mpc(-0.3, 0.2)
    for i in [i for i in range(len(curve.density)) if curve.density[i] > 0.05][::25]:
        # continuation from the last root: an independent way to the same branch
        u = mp.findroot(
            lambda u, i=i: log_lambda(u)[0] - curve.log_lambda[i], u, tol=1e-22, maxsteps=60
        )
        found = abs(log_lambda(u)[1].imag) / mp.pi
        close("formula 5, erf density at L = 16", found, curve.density[i], tol=1e-10)


def spectra(rng, weights, lanes, depth, n, q, phi):
    w = (gaussian if weights == "gaussian" else orthogonal)(rng, lanes, depth, n, n)
    h = math.sqrt(q) * rng.standard_normal((lanes, depth, n))
    slope = (np.abs(h) < 1) if phi == "hard_tanh" else np.exp(-math.pi * h**2 / 4)
    return 2 * log_singular_values(slope[..., None] * w * critical(phi, q))


def critical(phi, q):
    """sigma_w of the critical network."""
    law = _law(phi, q)
    return float(jnp.sum(law.probabilities * law.values)) ** -0.5


def expected_fractions(curve, edges):
    """Fraction of the spectrum below each edge (log lambda), atoms included."""
    steps = np.diff(curve.log_lambda) * (curve.density[1:] + curve.density[:-1]) / 2
    cumulative = np.concatenate([[0], np.cumsum(steps)])
    below = np.interp(edges, curve.log_lambda, cumulative) + curve.zero_mass
    return below + curve.atom_mass * (edges > curve.log_atom)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phi", "weights"), [("hard_tanh", "orthogonal"), (erf, "orthogonal"), (erf, "gaussian")]
)
def test_density_against_simulation(phi, weights):
    q, depth, n = 0.2, 8, 128
    found = spectra(np.random.default_rng(3), weights, 32, depth, n, q, phi)
    curve = density(phi, q, depth, weights)[1]
    other = density(phi, q, depth, "gaussian" if weights == "orthogonal" else "orthogonal")[1]
    louder = density(phi, q, depth, weights, 1.01 * critical(phi, q))[1]
    if phi is erf:
        grid = np.linspace(-12, 3, 4000)
        edges = np.interp([0.1, 0.3, 0.5, 0.7], expected_fractions(curve, grid), grid)
        fractions = (found[:, :, None] < edges).mean(1)

        def p(curve):
            return p_value(fractions, expected_fractions(curve, edges))
    else:
        # Fractions near zero lag: the least of L ranks lies O(N^(1/2)) below p N. So the second
        # moment is tested, and the atom.
        second = np.exp(2 * found).mean(1)[:, None]

        def p(curve):
            return p_value(second, [moment(curve, lambda x: x**2)])

        atom = np.abs(found - curve.log_atom) < 1e-9
        assert p_value(atom.mean(1)[:, None], [curve.atom_mass]) > 1e-3
        assert not np.any(np.abs(found - louder.log_atom) < 1e-3)
    assert p(curve) > 1e-3
    assert p(other) < 1e-3
    assert p(louder) < 1e-3


# What a user may rely on


@pytest.mark.slow
def test_dtypes_and_jit():
    law = rm.derivative_law("hard_tanh", jnp.float32(0.3))
    curve = _density(law, 16, 1.1, "orthogonal", num=64)
    assert {x.dtype for x in (*law, *curve)} == {np.dtype("float32")}
    assert abs(float(curve.mass.sum() + curve.atom_mass + curve.zero_mass) - 1) < 1e-4


@pytest.mark.slow
def test_vmap_and_derivatives():
    def edge_and_mean(q):
        curve = rm.product_density(rm.derivative_law("hard_tanh", q), 64, 1.1, "orthogonal", num=64)
        return curve.log_lambda_max + jnp.sum(curve.mass * jnp.exp(curve.log_lambda))

    q = jnp.array([0.3, 0.3 + 1e-5, 0.3 - 1e-5])
    value, slope = jax.jit(jax.vmap(lambda q: jax.jvp(edge_and_mean, (q,), (jnp.ones_like(q),))))(q)
    assert float(slope[0]) == pytest.approx(float(value[1] - value[2]) / 2e-5, rel=1e-6)

    def second(s):
        curve = rm.limit_density(s, "smooth", num=64)
        return jnp.sum(curve.mass * jnp.exp(2 * curve.log_lambda))

    # its exact value is 1 + s
    assert float(jax.jit(jax.grad(second))(0.7)) == pytest.approx(1, abs=1e-8)


def test_extremes_stay_finite():
    _, curve = density("relu", 1.0, 10_000, "gaussian", 3.0)
    assert np.all(np.isfinite(curve.log_lambda)) and abs(curve.mass.sum() - 0.5) < 1e-10
    _, identity = density("linear", 1.0, 8, "orthogonal")
    assert identity.atom_mass == 1 and identity.log_lambda_max == 0 and not identity.mass.any()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rm.derivative_law("swish"), "hard_tanh"),
        (lambda: rm.derivative_law("tanh", 0.0), "q_star = 0.0"),
        (lambda: rm.product_density(RELU, 1, 1.0, "orthogonal"), "depth = 1"),
        (lambda: rm.product_density(RELU, 4, 1.0, "haar"), "gaussian, orthogonal"),
        (lambda: rm.limit_density(float("nan"), "smooth"), "sigma0_squared = nan"),
    ],
)
def test_errors_name_value_and_range(call, words):
    with pytest.raises(ValueError, match="random_matrix: ") as caught:
        call()
    assert words in str(caught.value)


RELU = rm.DerivativeLaw(np.array([1.0, 0.0]), np.array([0.5, 0.5]))
