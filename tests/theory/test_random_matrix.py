"""Theory of random layer products: every value of formulas 1-5, 8, 11, multi-precision, simulation,
wrong settings."""

import functools
import math

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from scipy import integrate, special, stats

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


def p_value(samples, expected):
    """Joint test that the rows of `samples` have mean `expected`: Hotelling's T^2."""
    samples = np.asarray(samples, float)
    count, dim = samples.shape
    off = samples.mean(0) - np.asarray(expected, float)
    t2 = count * off @ np.linalg.solve(np.atleast_2d(np.cov(samples.T)), off)
    return float(stats.f.sf(t2 * (count - dim) / (dim * (count - 1)), dim, count - dim))


def gaussian(rng, *shape):
    return rng.standard_normal(shape) / math.sqrt(shape[-1])


def orthogonal(rng, *shape):
    q, r = np.linalg.qr(rng.standard_normal(shape))
    return q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[..., None, :]


ERF = lambda x: jax.scipy.special.erf(math.sqrt(math.pi) / 2 * x)  # the papers' scaling of erf
_density = jax.jit(rm.product_density, static_argnames=("weights", "num"))
_limit = jax.jit(rm.limit_density, static_argnames=("universality", "num"))


@functools.lru_cache
def density(activation, q, depth, weights, sigma_w=None):
    """(law, curve) at criticality unless sigma_w is given; one compilation per (number of atoms,
    weights)."""
    with jax.enable_x64(True):
        law = rm.derivative_law(activation, q)
        sigma_w = rm.derivative_moment(law, 1) ** -0.5 if sigma_w is None else jnp.float64(sigma_w)
        return law, jax.tree.map(np.asarray, _density(law, jnp.float64(depth), sigma_w, weights))


def moment(curve, f):
    """E f(lambda) over curve and atoms."""
    atoms = curve.atom_mass * f(np.exp(curve.log_atom)) if curve.atom_mass else 0.0
    return np.sum(curve.mass * f(np.exp(curve.log_lambda))) + atoms + curve.zero_mass * f(0.0)


# ---- formula 1


def test_newman_against_multiprecision(close):
    n, depth, sigma = 32, 4000, 1.3
    half = [mp.mpf(n - i + 1) / 2 for i in range(1, n + 1)]
    exact = [mp.log(sigma) + (mp.log(mp.mpf(2) / n) + mp.psi(0, x)) / 2 for x in half]
    close("formula 1, exponents", rm.newman_exponents(n, sigma), exact)
    close(
        "formula 1, variance",
        rm.newman_variance(n, depth),
        [mp.psi(1, x) / (4 * depth) for x in half],
    )
    i = np.arange(1, 2001)
    np.testing.assert_allclose(
        rm.newman_exponents(2000)[:1900], rm.newman_limit((i / 2000)[:1900]), atol=3e-3
    )


def test_newman_against_a_measured_spectrum():
    n, depth = 32, 4000
    measured = log_singular_values(gaussian(np.random.default_rng(0), depth, n, n)) / depth

    def p(sigma):
        z2 = (measured - np.asarray(rm.newman_exponents(n, sigma))) ** 2 / np.asarray(
            rm.newman_variance(n, depth)
        )
        return stats.chi2.sf(z2.sum(), n)

    assert p(1.0) > 1e-3
    assert p(1.01) < 1e-3 and p(0.99) < 1e-3


# ---- formulas 2 and 3


def test_fuss_catalan(close):
    pairs = [(k, depth) for depth in (1, 2, 6, 50) for k in (0, 1, 2, 3, 10)]
    exact = [mp.log(mp.binomial(depth * k + k, k) / (depth * k + 1)) for k, depth in pairs]
    close(
        "formula 2, log moments",
        [rm.fuss_catalan_log_moment(k, depth) for k, depth in pairs],
        exact,
    )
    for depth in (1, 6, 100):
        assert math.exp(rm.fuss_catalan_log_moment(2, depth)) == pytest.approx(depth + 1, rel=1e-12)
    edges = [
        mp.log(mp.mpf(depth + 1) ** (depth + 1) / mp.mpf(depth) ** depth)
        for depth in (1, 2, 6, 10000)
    ]
    close(
        "formula 2, log edge",
        [rm.fuss_catalan_log_edge(depth) for depth in (1, 2, 6, 10000)],
        edges,
    )


@pytest.mark.parametrize(
    ("keep", "sigma_w"), [(1.0, 1.0), (1.0, 1.1), (0.5, math.sqrt(2)), (0.8, 1.0)]
)
def test_second_moments_are_the_recursion(keep, sigma_w, close):
    for n in (1, 2, 32):
        a = b = mp.mpf(1)
        for depth in range(200):
            if depth in (0, 1, 6, 199):
                close(
                    f"formula 3, keep {keep}",
                    rm.log_second_moments(depth, n, sigma_w, keep),
                    [mp.log(a), mp.log(b)],
                )
            h2, h11 = b + 2 * a / n, b  # E H_ii^2, E H_ii H_jj of H = W M W^T; E H_ij^2 = a / n
            a, b = (
                sigma_w**4 * (keep * h2 + keep**2 * (n - 1) * a / n),
                sigma_w**4 * (keep * h2 / n + keep**2 * (1 - mp.mpf(1) / n) * h11),
            )


@pytest.mark.slow
def test_second_moment_of_linear_products():
    log_a, log_b = rm.log_second_moments(6, 32)
    assert round(math.exp(log_a), 3) == 7.764  # formula 3
    s = log_singular_values(gaussian(np.random.default_rng(1), 400, 6, 32, 32))
    found = np.stack([np.exp(4 * s).mean(1), np.exp(2 * s).mean(1) ** 2], 1)
    assert p_value(found, np.exp([log_a, log_b])) > 1e-3
    # L / N = 0.19: the law of infinite width is rejected, and so is sigma_w + 1%
    assert p_value(found[:, :1], [math.exp(rm.fuss_catalan_log_moment(2, 6))]) < 1e-3
    assert p_value(found, np.exp(rm.log_second_moments(6, 32, 1.01))) < 1e-3


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
    found = np.stack(
        [np.einsum("cij,cij->c", gram, gram) / 16, (np.trace(gram, axis1=1, axis2=2) / 16) ** 2], 1
    )
    expected = rm.log_second_moments(4, 16, math.sqrt(2), 0.5)
    z = (found.mean(0) - np.exp(expected)) / (found.std(0) / math.sqrt(len(found)))
    print("z-scores of E tr(JJ^T)^2/N and E(tr JJ^T)^2/N^2:", z)
    assert p_value(found, np.exp(expected)) > 1e-3
    assert p_value(found, np.exp(rm.log_second_moments(4, 16, 1.0, 1.0))) < 1e-3  # the linear law
    assert p_value(found, np.exp(rm.log_second_moments(4, 16, 1.01 * math.sqrt(2), 0.5))) < 1e-3


# ---- formula 4


def test_derivative_moments(close):
    for q in (1e-4, 0.1, 1.0, 10.0, 100.0):
        law, hard = rm.derivative_law(ERF, q), rm.derivative_law("hard_tanh", q)
        for k in (1, 2, 3):
            close(
                f"formula 4, mu_{k} of erf, q {q}",
                rm.derivative_moment(law, k),
                (1 + k * math.pi * q) ** -0.5,
            )
            close(
                f"formula 4, mu_{k} of hard-tanh",
                rm.derivative_moment(hard, k),
                mp.erf(1 / mp.sqrt(2 * q)),
            )
        tanh = 2 * mp.quad(
            lambda z, q=q: mp.sech(mp.sqrt(q) * z) ** 4 * mp.npdf(z), [0, 0.1, 0.3, 1, 3, 12]
        )
        close(
            "formula 4, mu_1 of tanh", rm.derivative_moment(rm.derivative_law("tanh", q), 1), tanh
        )


@pytest.mark.parametrize("depth", [2, 8, 64])
def test_relative_variance(depth):
    relu, linear = rm.derivative_law("relu"), rm.derivative_law("linear")
    assert float(rm.relative_variance(relu, depth, "gaussian")) == 2 * depth
    assert float(rm.relative_variance(relu, depth, "orthogonal")) == depth
    assert float(rm.relative_variance(linear, depth, "gaussian")) == depth
    assert float(rm.relative_variance(linear, depth, "orthogonal")) == 0
    hard = rm.derivative_law("hard_tanh", 0.7)
    p = float(rm.derivative_moment(hard, 1))
    assert float(1 + rm.relative_variance(hard, depth, "gaussian")) == pytest.approx(
        (depth + p) / p, rel=1e-12
    )


# ---- formulas 4 and 5: densities

CASES = [
    (phi, q, depth, weights)
    for weights in rm.WEIGHTS
    for phi, q in (("linear", 1.0), ("relu", 1.0), ("hard_tanh", 0.3), (ERF, 0.3), ("tanh", 0.5))
    for depth in ((2, 128) if phi in (ERF, "tanh") else (2, 16, 128))
]


@pytest.mark.slow
@pytest.mark.parametrize("weights", rm.WEIGHTS)
def test_density_mass_and_moments(weights, close):
    for phi, q, depth, family in CASES:
        if family != weights:
            continue
        law, curve = density(phi, q, depth, weights)
        name = f"{phi if isinstance(phi, str) else 'erf'}, {weights}, L {depth}"
        smooth = phi == "tanh" or phi is ERF
        total = curve.mass.sum() + curve.atom_mass + curve.zero_mass
        close(f"formula 5, total mass: {name}", total, 1, tol=1e-4 if smooth else 1e-10)
        close(
            f"formula 5, mean: {name}", moment(curve, lambda x: x), 1, tol=1e-6 if smooth else 1e-10
        )
        variance = moment(curve, lambda x: x**2) - 1
        expected = rm.relative_variance(law, depth, weights)
        close(f"formula 4, variance: {name}", variance, expected, tol=1e-8 if smooth else 1e-10)
        if curve.mass.sum() > 0:
            assert np.all(np.diff(curve.log_lambda) > 0) and np.all(curve.density >= 0)


def test_density_of_gaussian_products_is_fuss_catalan(close):
    for depth in (2, 16, 128):
        _, curve = density("linear", 1.0, depth, "gaussian")
        close("formula 2, edge", curve.log_lambda_max, rm.fuss_catalan_log_edge(depth))
        for k in (1, 2, 3, 4):
            found = np.log(moment(curve, lambda x, k=k: x**k))
            close("formula 2, moments of the curve", found, rm.fuss_catalan_log_moment(k, depth))
        # the closed form over an angle: lambda = sin((L+1)f)^(L+1) / (sin f sin(L f)^L)
        f = np.linspace(0.05, 0.9, 50)[:, None] * np.pi / (depth + 1)
        log_lambda = (
            (depth + 1) * np.log(np.sin((depth + 1) * f))
            - np.log(np.sin(f))
            - depth * np.log(np.sin(depth * f))
        )
        exact = np.sin((depth + 1) * f) * np.sin(f) / (np.sin(depth * f) * np.pi)
        spline = np.interp(log_lambda[::-1, 0], curve.log_lambda, curve.density)[::-1]
        close("formula 2, density drawn", spline, exact[:, 0], tol=2e-3)


def inverse_bernoulli(m, p, depth):
    return (1 + m) / m * ((m + p) / (p * (1 + m))) ** depth


def test_curves_satisfy_the_s_transform(close):
    """M of the curve, right of its support, put into M^{-1} gives the point back (formula 5)."""
    for depth in (2, 16, 128):
        law, curve = density("hard_tanh", 0.3, depth, "orthogonal")
        x = 1.5 * np.exp(curve.log_lambda_max)
        m = moment(curve, lambda t, x=x: t / (x - t))
        p = float(rm.derivative_moment(law, 1))
        close("formula 5, M^-1 at finite L, Bernoulli", inverse_bernoulli(m, p, depth) / x, 1)
    for s2 in (0.25, 1.0, 4.0):
        for kind, log_s in (
            ("bernoulli", lambda m, s2=s2: -s2 * m / (1 + m)),
            ("smooth", lambda m, s2=s2: -s2 * m),
        ):
            curve = jax.tree.map(np.asarray, _limit(jnp.float64(s2), kind))
            x = 1.5 * np.exp(curve.log_lambda_max)
            m = moment(curve, lambda t, x=x: t / (x - t))
            close(f"formula 5, M^-1 of the {kind} limit", (1 + m) / m * np.exp(-log_s(m)) / x, 1)
            close(f"formula 5, variance of the {kind} limit", moment(curve, lambda t: t**2) - 1, s2)


def test_largest_eigenvalue():
    # formula 5: hard-tanh, L = 32, sigma_0^2 = 0.25; 1.285 is p^-L at L (1 - p) = 0.25, and 1.283
    # at L (1/p - 1) = 0.25
    for p, expected, mass in (
        (1 - 0.25 / 32, 1.285, 0.75),
        (1 / (1 + 0.25 / 32), 1.283, 1 - 0.25 / (1 + 0.25 / 32)),
    ):
        law = rm.DerivativeLaw(jnp.array([1.0, 0.0]), jnp.array([p, 1 - p]))
        curve = _density(law, jnp.float64(32), jnp.float64(p**-0.5), "orthogonal")
        assert round(math.exp(curve.log_lambda_max), 3) == expected
        assert float(curve.atom_mass) == pytest.approx(mass, abs=1e-12)
    for s2 in (0.1, 0.25, 0.9):
        curve = _limit(jnp.float64(s2), "bernoulli")
        assert float(curve.log_lambda_max) == pytest.approx(s2, abs=1e-14)
        assert float(curve.atom_mass) == pytest.approx(1 - s2, abs=1e-14)
    for s2 in (1.5, 4.0):
        assert float(_limit(jnp.float64(s2), "bernoulli").log_lambda_max) == pytest.approx(
            1 + math.log(s2), abs=1e-12
        )
    for s2 in (0.1, 1.0, 4.0):
        z = (-1 + math.sqrt(1 + 4 / s2)) / 2
        found = float(_limit(jnp.float64(s2), "smooth").log_lambda_max)
        assert found == pytest.approx(math.log(1 + 1 / z) + s2 * z, abs=1e-12)


def test_finite_depth_tends_to_the_limit():
    depth, s2 = 4000, 1.5
    q = (
        (1 + s2 / depth) ** 2 - 1
    ) / math.pi  # not critical in sigma_0, close to it: mu_2 / mu_1^2 - 1 = s2 / L
    law, smooth = density(ERF, q, depth, "orthogonal")
    s2 = float(rm.relative_variance(law, depth, "orthogonal"))
    assert float(_limit(jnp.float64(s2), "smooth").log_lambda_max) == pytest.approx(
        smooth.log_lambda_max, abs=2e-3
    )


@pytest.mark.slow
def test_smooth_density_against_multiprecision(close):
    """The erf curve, whose law has no atoms: its points solve the equation with E by
    multi-precision quadrature."""
    q, depth = 0.3, 16
    _, curve = density(ERF, q, depth, "orthogonal")
    c = mp.pi * mp.mpf(q) / 2  # d^2 = exp(-c z^2); E f(d^2 w)
    mean = lambda f: 2 * mp.quad(lambda z: f(mp.exp(-c * z * z)) * mp.npdf(z), [0, 1, 2, 4, 8, 14])
    log_sigma = mp.log(1 + mp.pi * q) / 4

    def log_lambda(u):
        w = mp.exp(u)
        a, b = mean(lambda d: d / (1 - d * w)), mean(lambda d: 1 / (1 - d * w))
        return (depth - 1) * mp.log(a / b) - u + 2 * depth * log_sigma, b

    inside = [i for i in range(len(curve.density)) if curve.density[i] > 0.05][::25]
    for i in inside:
        start = mp.mpc(-0.3, 0.2) if i == inside[0] else u
        # continuation from the last root: an independent way to the same branch
        u = mp.findroot(
            lambda u, i=i: log_lambda(u)[0] - curve.log_lambda[i], start, tol=1e-22, maxsteps=60
        )
        close(
            "formula 5, erf density at L = 16",
            abs(log_lambda(u)[1].imag) / mp.pi,
            curve.density[i],
            tol=1e-10,
        )


def spectra(rng, weights, lanes, depth, n, q, phi):
    w = (gaussian if weights == "gaussian" else orthogonal)(rng, lanes, depth, n, n)
    law = rm.derivative_law(phi, q)
    h = math.sqrt(q) * rng.standard_normal((lanes, depth, n))
    slope = (np.abs(h) < 1) if phi == "hard_tanh" else np.exp(-math.pi * h**2 / 4)
    return 2 * log_singular_values(
        slope[..., None] * w * float(rm.derivative_moment(law, 1)) ** -0.5
    )


def expected_fractions(curve, edges):
    """Share of the spectrum below each edge (log lambda), atoms included."""
    cumulative = np.concatenate(
        [[0], np.cumsum(np.diff(curve.log_lambda) * (curve.density[1:] + curve.density[:-1]) / 2)]
    )
    below = np.interp(edges, curve.log_lambda, cumulative) + curve.zero_mass
    return below + curve.atom_mass * (edges > curve.log_atom)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phi", "weights"), [("hard_tanh", "orthogonal"), (ERF, "orthogonal"), (ERF, "gaussian")]
)
def test_density_against_simulation(phi, weights):
    q, depth, n = 0.2, 8, 128
    found = spectra(np.random.default_rng(3), weights, 32, depth, n, q, phi)
    _, curve = density(phi, q, depth, weights)
    other = density(phi, q, depth, "gaussian" if weights == "orthogonal" else "orthogonal")[1]
    sigma = float(rm.derivative_moment(rm.derivative_law(phi, q), 1)) ** -0.5
    louder = density(phi, q, depth, weights, 1.01 * sigma)[1]
    if phi is ERF:  # shares of the histogram
        grid = np.linspace(-12, 3, 4000)
        edges = np.interp([0.1, 0.3, 0.5, 0.7], expected_fractions(curve, grid), grid)
        fractions = (found[:, :, None] < edges).mean(1)
        p = lambda curve: p_value(fractions, expected_fractions(curve, edges))
    else:  # shares near zero lag: the least of L ranks lies O(N^(1/2)) below p N. So the second moment, and the atom
        second = np.exp(2 * found).mean(1)[:, None]
        p = lambda curve: p_value(second, [moment(curve, lambda x: x**2)])
        atom = np.abs(found - curve.log_atom) < 1e-9
        assert p_value(atom.mean(1)[:, None], [curve.atom_mass]) > 1e-3
        assert not np.any(np.abs(found - louder.log_atom) < 1e-3)
    assert p(curve) > 1e-3
    assert p(other) < 1e-3
    assert p(louder) < 1e-3


# ---- formula 8


@pytest.mark.slow
def test_norm_moments(close):
    widths = [7, 16, 16]
    for keep in (0.5, 1.0):
        found = rm.norm_moments(widths, keep)
        mean = variance = fourth = mp.mpf(0)
        for n in widths:
            pk = [
                mp.binomial(n, k) * mp.mpf(keep) ** k * mp.mpf(1 - keep) ** (n - k)
                for k in range(n + 1)
            ]
            alive = 1 - pk[0]
            first = [
                mp.psi(0, mp.mpf(k) / 2) + mp.log(2 / (keep * mp.mpf(n))) for k in range(1, n + 1)
            ]
            m = sum(p * f for p, f in zip(pk[1:], first, strict=True)) / alive
            v = (
                sum(
                    p * (mp.psi(1, mp.mpf(k) / 2) + (first[k - 1] - m) ** 2)
                    for k, p in enumerate(pk)
                    if k
                )
                / alive
            )
            mean, variance = mean + m, variance + v
            fourth += mp.log(sum(p * (k * k + 2 * k) for k, p in enumerate(pk)) / (keep * n) ** 2)
        close(
            f"formula 8, mean and variance, keep {keep}",
            [found.mean, found.variance],
            [mean, variance],
        )
        close(f"formula 8, fourth moment, keep {keep}", found.log_fourth, fourth)
    relu = rm.norm_moments(widths)
    assert float(relu.beta) == pytest.approx(5 * sum(1 / n for n in widths), rel=1e-14)
    assert float(relu.log_fourth) == pytest.approx(
        math.log(math.prod(1 + 5 / n for n in widths)), rel=1e-14
    )
    wide = rm.norm_moments([2000] * 50)
    assert float(wide.mean / -(wide.beta / 2)) == pytest.approx(1, abs=5e-3)
    assert float(wide.variance / wide.beta) == pytest.approx(1, abs=5e-3)


@pytest.mark.slow
def test_norm_moments_against_relu_networks():
    log_norm = np.log((relu_products(np.random.default_rng(5), 4000, 8, 16)[:, :, 3] ** 2).sum(1))

    def p(keep, widths):
        law = rm.norm_moments(widths, keep)
        return p_value(
            np.stack([log_norm, (log_norm - float(law.mean)) ** 2], 1), [law.mean, law.variance]
        )

    assert p(0.5, [16] * 8) > 1e-3
    assert p(1.0, [16] * 8) < 1e-3
    assert p(0.5, [15] * 8) < 1e-3
    beta = float(rm.norm_moments([16] * 8).beta)  # the Gaussian limit is not enough at this width
    assert p_value(np.stack([log_norm, (log_norm + beta / 2) ** 2], 1), [-beta / 2, beta]) < 1e-3


# ---- formula 11


def test_ginibre_products():
    fraction = lambda k: float(rm.ginibre_product_cdf(math.sqrt(0.01 / math.pi), k))
    assert round(100 * fraction(5)) == 32 and round(100 * fraction(100)) == 94
    assert fraction(5) == pytest.approx((0.01 / math.pi) ** 0.2, rel=1e-14)
    rng, radii = np.random.default_rng(6), np.array([0.1, 0.3, 0.6])
    found = []
    for _ in range(30):
        j = functools.reduce(np.matmul, gaussian(rng, 3, 120, 120))
        found.append((np.abs(np.linalg.eigvals(j))[:, None] < radii).mean(0))
    assert p_value(found, rm.ginibre_product_cdf(radii, jnp.full(3, 3.0))) > 1e-3
    assert p_value(found, rm.ginibre_product_cdf(radii, jnp.full(3, 2.0))) < 1e-3


@pytest.mark.parametrize("layers", [2, 3, 4, 10, 100])
def test_learning_dynamics(layers, close):
    s, u0, tau = 2.5, 1e-3, 1.7
    rate = lambda t, u: (layers - 1) * u ** (2 - 2 / (layers - 1)) * (s - u) / tau
    t = (
        np.linspace(0, 5, 40)
        if layers < 4
        else np.concatenate([[0], np.geomspace(1e-3, 2000 / layers, 40)])
    )
    solved = integrate.solve_ivp(rate, (0, t[-1]), [u0], "LSODA", t, rtol=1e-12, atol=1e-15).y[0]
    found = rm.saxe_mode(t, s, u0, layers, tau)
    close(f"formula 11, ODE of {layers} layers", found, solved, tol=1e-9)
    if layers == 3:
        e = np.exp(2 * s * t / tau)
        close("formula 11, closed form of 3 layers", found, s * e / (e - 1 + s / u0))


# ---- what a user may rely on


@pytest.mark.slow
def test_dtypes_and_jit():
    law = rm.derivative_law("hard_tanh", jnp.float32(0.3))
    curve = _density(law, 16, 1.1, "orthogonal", num=64)
    assert {x.dtype for x in (*law, *curve)} == {np.dtype("float32")}
    assert abs(float(curve.mass.sum() + curve.atom_mass + curve.zero_mass) - 1) < 1e-4
    for x in (
        *rm.norm_moments([8], jnp.float32(0.5)),
        rm.newman_exponents(4, jnp.float32(1)),
        *rm.log_second_moments(3, jnp.float32(4)),
    ):
        assert x.dtype == jnp.float32


@pytest.mark.slow
def test_vmap_and_derivatives():
    def edge_and_mean(q):
        curve = rm.product_density(rm.derivative_law("hard_tanh", q), 64, 1.1, "orthogonal", num=64)
        return curve.log_lambda_max + jnp.sum(curve.mass * jnp.exp(curve.log_lambda))

    q = jnp.array([0.3, 0.3 + 1e-5, 0.3 - 1e-5])
    value, slope = jax.jit(jax.vmap(lambda q: jax.jvp(edge_and_mean, (q,), (jnp.ones_like(q),))))(q)
    assert float(slope[0]) == pytest.approx(float(value[1] - value[2]) / 2e-5, rel=1e-6)
    variance = lambda s: jnp.sum(
        (lambda c: c.mass * jnp.exp(2 * c.log_lambda))(rm.limit_density(s, "smooth", num=64))
    )
    assert float(jax.jit(jax.grad(variance))(0.7)) == pytest.approx(
        1, abs=1e-8
    )  # its exact value is 1 + s
    u = jax.value_and_grad(lambda s: rm.saxe_mode(2.0, s, 0.01, 5))
    assert float(u(1.5)[1]) == pytest.approx(
        float(u(1.5 + 1e-6)[0] - u(1.5 - 1e-6)[0]) / 2e-6, rel=1e-6
    )


def test_extremes_stay_finite():
    log_a, _ = rm.log_second_moments(10_000, 64, 2.0)
    assert np.isfinite(float(log_a)) and float(log_a) > 20_000
    assert np.isfinite(float(rm.fuss_catalan_log_moment(50, 10_000)))
    _, curve = density("relu", 1.0, 10_000, "gaussian", 3.0)
    assert np.all(np.isfinite(curve.log_lambda)) and abs(curve.mass.sum() - 0.5) < 1e-10
    _, identity = density("linear", 1.0, 8, "orthogonal")
    assert (
        float(identity.atom_mass) == 1
        and float(identity.log_lambda_max) == 0
        and not identity.mass.any()
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rm.newman_exponents(4, -1.0), "sigma_w = -1.0"),
        (lambda: rm.newman_exponents(0), "width = 0"),
        (lambda: rm.log_second_moments(3, 4, 1.0, 1.5), "keep = 1.5"),
        (lambda: rm.derivative_law("swish"), "hard_tanh"),
        (lambda: rm.derivative_law("tanh", 0.0), "q_star = 0.0"),
        (lambda: rm.product_density(rm.derivative_law("relu"), 1, 1.0, "orthogonal"), "depth = 1"),
        (
            lambda: rm.product_density(rm.derivative_law("relu"), 4, 1.0, "haar"),
            "gaussian, orthogonal",
        ),
        (lambda: rm.limit_density(float("nan"), "smooth"), "sigma0_squared = nan"),
        (lambda: rm.norm_moments([4, 0]), "widths"),
        (lambda: rm.saxe_mode(1.0, 1.0, 2.0), "u0 = 2.0"),
    ],
)
def test_errors_name_value_and_range(call, words):
    with pytest.raises(ValueError, match="random_matrix: ") as caught:
        call()
    assert words in str(caught.value)


def test_special_values():
    # scipy's own, where it has one
    np.testing.assert_allclose(
        rm.newman_exponents(6),
        0.5 * (np.log(2 / 6) + special.psi(np.arange(6, 0, -1) / 2)),
        atol=1e-12,
    )
