"""Mean field theory against multi-precision integrals, published numbers, finite differences and
simulated networks."""

import functools
import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given
from scipy import stats

from gradjax.core.activations import ACTIVATIONS, KINKS, SLOPES, resolve
from gradjax.theory import meanfield
from gradjax.theory.gaussian import (
    derivative,
    gaussian_mean,
    phi_pair,
    secant,
    second_moment,
    slope_moment,
    slope_pair,
)

SIGMA_B = 0.05**0.5  # Schoenholz 2017


quick_pair = jax.jit(phi_pair, static_argnums=0)
quick_moments = jax.jit(
    lambda act, q: (second_moment(act, jnp.asarray(q)), slope_moment(act, q)), static_argnums=0
)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


# --- moments -------------------------------------------------------------------------------------------------------


def mp_sigmoid(x):
    return 1 / (1 + mpmath.exp(-x))


SELU = (
    mpmath.mpf("1.0507009873554804934193349852946"),
    mpmath.mpf("1.6732632423543772848170429916717"),
)
GELU = mpmath.sqrt(2 / mpmath.pi)
TAILORED = SLOPES["tailored_relu"]
MP = {  # (phi, phi') in multi-precision
    "linear": (lambda x: x, lambda x: mpmath.mpf(1)),
    "tanh": (mpmath.tanh, lambda x: mpmath.sech(x) ** 2),
    "hard_tanh": (lambda x: max(-1, min(1, x)), lambda x: mpmath.mpf(abs(x) < 1)),
    "erf": (mpmath.erf, lambda x: 2 / mpmath.sqrt(mpmath.pi) * mpmath.exp(-x * x)),
    "sigmoid": (mp_sigmoid, lambda x: mp_sigmoid(x) * mp_sigmoid(-x)),
    "relu": (lambda x: max(x, 0), lambda x: mpmath.mpf(x > 0)),
    "leaky_relu": (lambda x: x if x > 0 else x / 100, lambda x: 1 if x > 0 else mpmath.mpf(1) / 100),
    "prelu": (lambda x: x if x > 0 else x / 4, lambda x: 1 if x > 0 else mpmath.mpf(1) / 4),
    "tailored_relu": (lambda x: TAILORED[x > 0] * x, lambda x: mpmath.mpf(TAILORED[x > 0])),
    "elu": (lambda x: x if x > 0 else mpmath.expm1(x), lambda x: 1 if x > 0 else mpmath.exp(x)),
    "selu": (
        lambda x: SELU[0] * (x if x > 0 else SELU[1] * mpmath.expm1(x)),
        lambda x: SELU[0] * (1 if x > 0 else SELU[1] * mpmath.exp(x)),
    ),
    "gelu": (
        lambda x: x / 2 * (1 + mpmath.tanh(GELU * (x + mpmath.mpf("0.044715") * x**3))),
        lambda x: (
            (1 + mpmath.tanh(GELU * (x + mpmath.mpf("0.044715") * x**3))) / 2
            + x / 2 * mpmath.sech(GELU * (x + mpmath.mpf("0.044715") * x**3)) ** 2 * GELU
            * (1 + 3 * mpmath.mpf("0.044715") * x**2)
        ),
    ),
    "silu": (lambda x: x * mp_sigmoid(x), lambda x: mp_sigmoid(x) * (1 + x * mp_sigmoid(-x))),
    "softplus": (lambda x: mpmath.log1p(mpmath.exp(x)), mp_sigmoid),
}  # fmt: skip


def mp_mean(f, q, kinks):
    with mpmath.workdps(20):
        s = mpmath.sqrt(q)
        cuts = {mpmath.mpf(k) / s for k in (*kinks, -4, -1.5, 0, 1.5, 4)} | {
            mpmath.mpf(k) for k in (-11, -4, 4, 11)
        }
        cuts = sorted(k for k in cuts if abs(k) <= 11)
        g = lambda z: f(s * z) * mpmath.exp(-z * z / 2)
        return float(mpmath.quad(g, cuts, maxdegree=7) / mpmath.sqrt(2 * mpmath.pi))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_moments_agree_with_multiprecision(name, report):
    """E phi^2 and E phi'^2 from q = 1e-4 to 100, and the quadrature itself where a closed form
    hides it."""
    act, worst = resolve(name), 0.0
    phi, slope = MP[name]
    for q in (1e-4, 0.7, 100.0):
        for closed in {act, act._replace(slopes=None)}:
            got = quick_moments(closed, q)
            for value, f in zip(got, (phi, slope), strict=True):
                want = mp_mean(lambda x, f=f: f(x) ** 2, q, KINKS.get(name, ()))
                worst = max(worst, abs(float(value) / want - 1))
    report(f"formula 6, E phi^2 and E phi'^2 against multi-precision: {name}", worst)
    assert worst < 1e-10


def panels(cuts, low=-9.0, high=9.0, nodes=40, parts=8):
    """Plain Gauss-Legendre on equal parts between cuts: nothing in common with what it checks."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    ends = np.unique(np.clip([low, *cuts, high], low, high))
    ends = np.unique(
        np.concatenate([np.linspace(a, b, parts + 1) for a, b in itertools.pairwise(ends)])
    )
    a, h = ends[:-1, None], np.diff(ends)[:, None]
    z, w = (a + 0.5 * h * (x + 1)).ravel(), (0.5 * h * w).ravel()
    return z, w * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)


def reference_pair(f, kinks, q, c):
    """E f(u_1) f(u_2) with u_2 = c u_1 + sqrt(1 - c^2) .., the other integral cut at each node of
    the first."""
    s, r = np.sqrt(q), np.sqrt(1 - c * c)
    near = np.concatenate(
        [[k / s + r * t for t in (-6, -2, -0.5, 0, 0.5, 2, 6)] for k in kinks or (0.0,)]
    )
    z, w = panels(near, nodes=20, parts=4)
    total = 0.0
    for zi, wi in zip(z, w, strict=True):
        y, wy = panels(
            [(k / s - c * zi) / r for k in kinks or (0.0,)], nodes=20, parts=10 if q < 50 else 40
        )
        total += wi * float(f(s * zi)) * np.sum(wy * f(s * (c * zi + r * y)))
    return total


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in ACTIVATIONS if n != "linear"])
def test_pair_moments_agree_with_other_quadrature(name, report):
    act, worst = resolve(name), 0.0
    f = _numpy(name)
    for q, c in ((1.3, 0.6), (1.3, -0.6)):
        want = reference_pair(f, act.kinks, q, c)
        for closed in {act, act._replace(slopes=None)}:
            got = float(quick_pair(closed, q, c))
            worst = max(worst, abs(got - want) / float(second_moment(act, jnp.asarray(q))))
    report(f"formula 6, E phi(u_1) phi(u_2) against other quadrature: {name}", worst)
    assert worst < 1e-10


def _numpy(name):
    return {
        "tanh": np.tanh,
        "hard_tanh": lambda x: np.clip(x, -1, 1),
        "erf": lambda x: np.asarray(jax.scipy.special.erf(x)),
        "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
        "relu": lambda x: np.maximum(x, 0),
        "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
        "prelu": lambda x: np.where(x > 0, x, 0.25 * x),
        "tailored_relu": lambda x: np.where(x > 0, TAILORED[1], TAILORED[0]) * x,
        "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
        "selu": lambda x: (
            float(SELU[0]) * np.where(x > 0, x, float(SELU[1]) * np.expm1(np.minimum(x, 0)))
        ),
        "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
        "silu": lambda x: x / (1 + np.exp(-x)),
        "softplus": lambda x: np.logaddexp(x, 0.0),
    }[name]


def test_pair_moments_of_erf_have_a_closed_form_up_to_q_100():
    """E phi phi = (2/pi) arcsin(2 q c / (1 + 2 q)): also its chord as c -> 1, and phi' phi', for q
    from 1e-4 to 100."""
    act, worst = resolve("erf"), 0.0
    ours = jax.jit(lambda q, c: (phi_pair(act, q, c), slope_pair(act, q, c)))
    apart = jax.jit(lambda q, c: (secant(act, q, 1 - c), slope_pair(act, q, c, split=True)))
    for q in (1e-4, 1.0, 100.0):
        for c in (-1.0, -0.9, 0.0, 0.5, 0.999999, 1.0):
            with mpmath.workdps(40):
                inner, full = (
                    2 * mpmath.mpf(q) * x / (1 + 2 * mpmath.mpf(q)) for x in (mpmath.mpf(c), 1)
                )
                pair, top = (2 / mpmath.pi * mpmath.asin(x) for x in (inner, full))
                slope = 4 / mpmath.pi / ((1 + 2 * mpmath.mpf(q)) * mpmath.sqrt(1 - inner**2))
                got = ours(q, c)
                errors = [(got[0] - float(pair)) / float(top), got[1] / float(slope) - 1]
                if 0 <= c < 1:
                    got = apart(q, c)
                    errors += [
                        got[0] / float((top - pair) / (q * (1 - mpmath.mpf(c)))) - 1,
                        got[1] / float(slope) - 1,
                    ]
            worst = max(worst, *(abs(float(e)) for e in errors))
    print(f"erf: largest error of pair moments {worst:.1e}")
    assert worst < 1e-10


@pytest.mark.slow
def test_price_gives_the_derivative_at_the_corner():
    """d/dc E phi phi = q E phi' phi', at c = 1 too, where the derivative of the quadrature's nodes
    is infinite."""
    f = jax.jit(functools.partial(phi_pair, resolve("hard_tanh")))
    df = jax.jit(jax.grad(functools.partial(phi_pair, resolve("hard_tanh")), (0, 1)))
    q = 1.5
    assert df(q, 1.0)[1] == pytest.approx(
        q * float(slope_moment(resolve("hard_tanh"), jnp.asarray(q))), rel=1e-11
    )
    step = (f(q + 1e-5, 0.4) - f(q - 1e-5, 0.4)) / 2e-5
    assert df(q, 0.4)[0] == pytest.approx(float(step), rel=1e-8)


def test_derivatives_of_moments_carry_the_moving_kinks():
    """d/dq P(|sqrt(q) z| < 1), of which the integrand knows nothing between its cuts."""
    mu = jax.jit(lambda q: slope_moment(resolve("hard_tanh"), q))
    want = -float(jnp.exp(-0.5 / 1.5) / jnp.sqrt(2 * jnp.pi)) / 1.5**1.5
    assert jax.grad(mu)(1.5) == pytest.approx(want, rel=1e-11)


# --- formula 6 -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_formula_6_table():
    """Tanh, sigma_b^2 = 0.05: q*, chi_1, c*, xi_c to the digits given, and the critical point."""
    sigma_w = np.sqrt([1.0, 1.7, 4.0])
    d = meanfield.phase_diagram(sigma_w, SIGMA_B)
    np.testing.assert_allclose(d.q_star, [0.1936, 0.5331, 2.1955], atol=5e-5)
    np.testing.assert_allclose(d.chi_1, [0.7590, 0.9867, 1.3424], atol=5e-5)
    np.testing.assert_allclose(d.c_star, [1.0, 1.0, 0.1651], atol=5e-5)
    np.testing.assert_allclose(d.xi_c, [3.627, 74.92, 6.980], rtol=1.4e-4)
    np.testing.assert_allclose(d.xi_grad, -1 / np.log(d.chi_1), rtol=1e-12)
    critical = meanfield.critical_sigma_w(SIGMA_B)
    assert critical**2 == pytest.approx(1.76095, abs=5e-6)
    assert meanfield.q_star(critical, SIGMA_B) == pytest.approx(0.57005, abs=5e-6)
    on_the_line = meanfield.critical_line(meanfield.q_star(critical, SIGMA_B))
    np.testing.assert_allclose(on_the_line, [critical, SIGMA_B], rtol=1e-10)


@pytest.mark.slow
def test_formula_6_depth_scales_are_rates_of_the_maps():
    """xi_q and xi_c against the maps iterated from nearby, xi_q = -1 / log [chi_1 + sigma_w^2 E
    phi'' phi]."""
    sigma_w = np.sqrt([1.0, 1.7, 4.0])
    d = meanfield.phase_diagram(sigma_w, SIGMA_B)
    scales = meanfield.depth_scales(sigma_w, SIGMA_B)
    np.testing.assert_allclose([scales.xi_q, scales.xi_c], [d.xi_q, d.xi_c], rtol=1e-12)
    rate_q = (meanfield.length_map(d.q_star + 1e-6, sigma_w, SIGMA_B) - d.q_star) / 1e-6
    rate_c = (meanfield.correlation_map(d.c_star - 1e-6, sigma_w, SIGMA_B) - d.c_star) / -1e-6
    np.testing.assert_allclose(np.exp(-1 / d.xi_q), rate_q, rtol=1e-5)
    np.testing.assert_allclose(np.exp(-1 / d.xi_c), rate_c, rtol=1e-5)
    bend = jax.jit(
        jax.vmap(
            lambda q: gaussian_mean(lambda x: derivative(derivative(jnp.tanh))(x) * jnp.tanh(x), q)
        )
    )
    np.testing.assert_allclose(
        -1 / np.log(d.chi_1 + sigma_w**2 * bend(d.q_star)), d.xi_q, rtol=1e-10
    )


def test_formula_6_curvature():
    """kappa^2 after one layer, and chi_2 against its definition; infinite where phi' jumps."""
    q = float(meanfield.q_star(2.5, 0.3))
    with mpmath.workdps(20):
        bend = lambda x: (-2 * mpmath.tanh(x) * mpmath.sech(x) ** 2) ** 2
        want = 2.5**2 * mp_mean(bend, q, ())
    second, first = meanfield.chi_2(2.5, 0.3), meanfield.chi_1(2.5, 0.3)
    assert second == pytest.approx(want, rel=1e-10)
    assert meanfield.curvature_map(0.5, 2.5, 0.3) == pytest.approx(
        float(3 * second / first**2 + 0.5 / first)
    )
    assert np.isinf(meanfield.chi_2(1.0, 0.3, "relu")) and np.isinf(
        meanfield.chi_2(1.0, 0.3, "leaky_relu")
    )


# --- fixed points --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tanh", slow("selu")])
@given(sigma_w=st.floats(0.3, 4.0), sigma_b=st.floats(0.0, 2.0), dropout=st.floats(0.0, 0.5))
def test_fixed_points_are_fixed(name, sigma_w, sigma_b, dropout):
    q = meanfield.q_star(sigma_w, sigma_b, name, dropout=dropout)
    assert not np.isnan(q)
    if np.isfinite(q):
        again = meanfield.length_map(q, sigma_w, sigma_b, name, dropout=dropout)
        assert again == pytest.approx(float(q), rel=1e-12, abs=1e-25)
    c = meanfield.c_star(sigma_w, sigma_b, name, dropout=dropout)
    assert 0 <= c <= 1
    if np.isfinite(q) and q > 0:
        again = meanfield.correlation_map(c, sigma_w, sigma_b, name, dropout=dropout)
        assert again == pytest.approx(float(c), abs=1e-10)


@pytest.mark.parametrize(
    "name", ["linear", "relu", *(slow(n) for n in ACTIVATIONS if n not in ("linear", "relu"))]
)
def test_every_activation_has_its_point(name):
    """The length map keeps q*, which a bare callable with its kinks, by quadrature, has too."""
    q = meanfield.q_star(0.9, 0.4, name)
    assert meanfield.length_map(q, 0.9, 0.4, name) == pytest.approx(float(q), rel=1e-12)
    own = meanfield.q_star(0.9, 0.4, ACTIVATIONS[name], kinks=KINKS.get(name))
    assert own == pytest.approx(float(q), rel=1e-11)


def test_tiny_lengths_are_as_exact_as_others():
    """q* = 2 sigma_b^2 and c* = 2/3 for tanh's linear part at sigma_w = dropout = 1/2, however
    small the bias."""
    for sigma_b in (1e-6, 1e-12, 1e-30):
        numbers = {"sigma_w": 0.5, "sigma_b": sigma_b, "dropout": 0.5}
        assert meanfield.q_star(**numbers) == pytest.approx(2 * sigma_b**2, rel=1e-11)
        assert meanfield.c_star(**numbers) == pytest.approx(2 / 3, rel=1e-10)


@pytest.mark.slow
def test_near_critical_points_are_found():
    """1 - c* falls linearly with the distance from the critical line, down to 1e-9 of it, and
    nothing is NaN."""
    critical = float(meanfield.critical_sigma_w(SIGMA_B))
    distance = np.array([1e-3, 1e-5, 1e-7, 1e-9])
    d = meanfield.phase_diagram(critical * (1 + distance), SIGMA_B)
    ratio = (1 - d.c_star) / distance
    np.testing.assert_allclose(ratio[1:3], ratio[2], rtol=1e-3)
    np.testing.assert_allclose(ratio[3], ratio[2], rtol=1e-2)
    below = meanfield.phase_diagram(critical * (1 - distance), SIGMA_B)
    np.testing.assert_array_equal(below.c_star, 1.0)
    for x in (*d, *below):
        assert np.all(np.isfinite(x))
    assert np.all(np.diff(d.xi_c) > 0)


def test_lengths_without_a_limit_are_inf():
    he = 2**0.5
    assert meanfield.q_star(he, 0.0, "relu", q0=3.0) == 3.0  # every length is kept
    assert np.isinf(meanfield.q_star([he, 1.5], [0.1, 0.0], "relu")).all()
    assert np.isinf(meanfield.q_star(2.0, 0.1, "gelu"))
    assert meanfield.q_star(1.0, 0.3, "relu") == pytest.approx(0.18, rel=1e-14)
    assert meanfield.chi_1(3.0, 0.1, "relu") == pytest.approx(4.5)
    assert meanfield.c_star(3.0, 0.1, "relu") == 1 and np.isinf(
        meanfield.depth_scales(3.0, 0.1, "relu").xi_c
    )
    assert meanfield.critical_sigma_w(0.2, "relu") == pytest.approx(he)
    assert meanfield.q_star(0.9, 0.0) == 0 and meanfield.c_star(0.9, 0.0) == 1
    assert meanfield.critical_sigma_w(0.0) == pytest.approx(1.0, rel=1e-12)
    assert meanfield.c_star(2.0, 0.0) == pytest.approx(0.0, abs=1e-14)


def test_no_second_moment_is_nan():
    assert np.isnan(gaussian_mean(lambda x: jnp.exp(x**2), jnp.asarray(0.6)))
    assert gaussian_mean(lambda x: jnp.exp(x**2), jnp.asarray(0.1)) == pytest.approx(
        1 / np.sqrt(0.8), rel=1e-6
    )


def test_q0_chooses_between_two_limits():
    """Softplus shifted below zero: short signals die away, long ones grow."""
    phi = lambda x: x**3 / 3.0
    assert meanfield.q_star(1.0, 0.0, phi, q0=0.1) == 0
    assert np.isinf(meanfield.q_star(1.0, 0.0, phi, q0=3.0))


# --- transformations -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "f",
    [
        lambda w: meanfield.q_star(w, 0.3),
        slow(lambda w: meanfield.chi_1(w, 0.3, "hard_tanh")),
        slow(lambda w: meanfield.c_star(w, 0.3)),
        slow(lambda w: meanfield.depth_scales(w, 0.3).xi_c),
        slow(lambda b: meanfield.critical_sigma_w(b)),
        lambda w: meanfield.chi_1(w, 0.3, layernorm=True),
        slow(lambda w: meanfield.gated("minimal_rnn", w, 1.0, 1.0).chi),
    ],
    ids=["q_star", "chi_1", "c_star", "xi_c", "critical", "layernorm", "gated"],
)
def test_derivatives_agree_with_finite_differences(f):
    x = 2.1
    step = (f(x + 1e-5) - f(x - 1e-5)) / 2e-5
    assert jax.grad(f)(x) == pytest.approx(float(step), rel=1e-6)
    assert jax.jvp(f, (x,), (1.0,))[1] == pytest.approx(float(step), rel=1e-6)


@pytest.mark.slow
def test_vmap_jit_and_broadcasting_agree():
    w, b = (
        np.linspace(0.8, 2.5, 30),
        np.linspace(0.05, 0.4, 10),
    )  # more points than are solved at once
    grid = meanfield.phase_diagram(w[:, None], b[None, :], correlations=False)
    assert grid.c_star is None and grid.xi_q.shape == (30, 10)
    mapped = jax.jit(jax.vmap(lambda w: meanfield.q_star(w, 0.4)))(jnp.asarray(w))
    np.testing.assert_allclose(grid.q_star[:, -1], mapped, rtol=1e-12)
    np.testing.assert_allclose(grid.q_star[7, 3], meanfield.q_star(w[7], b[3]), rtol=1e-12)


def test_dtypes_are_the_callers():
    w = np.array([1.2, 2.0, 3.0])
    exact = meanfield.chi_1(w, 0.3)
    with jax.enable_x64(False):
        rounded = meanfield.chi_1(jnp.asarray(w, jnp.float32), 0.3)
        assert rounded.dtype == jnp.float32
        assert jax.eval_shape(meanfield.q_star, jnp.asarray(2.0, jnp.bfloat16)).dtype == jnp.float32
    np.testing.assert_allclose(rounded, exact, rtol=1e-5)
    assert jax.eval_shape(lambda: meanfield.q_star(2)).dtype == jnp.float64  # whole numbers


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: meanfield.q_star(0.0), r"sigma_w = 0\.0.*\(0, inf\)"),
        (lambda: meanfield.q_star(float("nan")), "sigma_w"),
        (lambda: meanfield.q_star(1.0, -0.1), r"sigma_b = -0\.1.*\[0, inf\)"),
        (lambda: meanfield.chi_1(1.0, 0.1, dropout=1.0), "dropout"),
        (lambda: meanfield.correlation_map(1.1, 1.0), r"c = 1\.1.*\[-1, 1\]"),
        (lambda: meanfield.q_star(1.0, 0.1, "swish"), "'swish'.*tanh.*silu"),
        (lambda: meanfield.batchnorm_growth(8, "tanh"), "linear, relu or leaky_relu"),
        (lambda: meanfield.gated("rhn", 1.0), "minimal_rnn, gru, lstm"),
        (lambda: meanfield.log_variance([10], 1.0, weights="uniform"), "gaussian, orthogonal"),
        (lambda: meanfield.log_variance([], 1.0), "at least one unit"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# --- simulated networks --------------------------------------------------------------------------------------------


def z_score(samples, expected):
    """Distance of the mean from `expected` in standard errors."""
    samples = np.asarray(samples, float)
    return (samples.mean(0) - expected) / (samples.std(0, ddof=1) / np.sqrt(len(samples)))


def joint_p(z):
    """Chi-squared p-value of independent z-scores."""
    return float(stats.chi2.sf(np.sum(np.square(z)), np.size(z)))


@functools.cache
def plain(name, sigma_w, sigma_b, dropout=0.0, layernorm=False, n=400, depth=12, draws=60):
    """Per draw: q and c before the last layer and its mean squared Jacobian, from inputs of the
    theory's q* and c*."""
    rng, phi = np.random.default_rng(3), _numpy(name)
    slope = (
        np.asarray
        if name == "linear"
        else lambda x: np.asarray(derivative(ACTIVATIONS[name])(jnp.asarray(x)))
    )
    network = {"dropout": dropout, "layernorm": layernorm}
    q, c = (
        float(f(sigma_w, sigma_b, name, **network)) for f in (meanfield.q_star, meanfield.c_star)
    )
    out = []
    for _ in range(draws):
        h = np.sqrt(q) * (np.linalg.cholesky([[1, c], [c, 1]]) @ rng.standard_normal((2, n)))
        for _ in range(depth):
            before = h
            spread = h.std(1, keepdims=True) if layernorm else 1.0
            seen = (h - h.mean(1, keepdims=True)) / spread if layernorm else h
            mask = (rng.random(h.shape) >= dropout) / (1 - dropout)
            w = sigma_w / np.sqrt(n) * rng.standard_normal((n, n))
            h = (mask * phi(seen)) @ w.T + sigma_b * rng.standard_normal(n)
        gradient = (
            np.sum(np.square(w * (mask[0] * slope(seen[0]) / (spread[0] if layernorm else 1.0))))
            / n
        )
        lengths = np.mean(before**2, 1)
        out.append(
            [
                lengths.mean(),
                np.mean(before[0] * before[1]) / np.sqrt(lengths[0] * lengths[1]),
                gradient,
            ]
        )
    return np.asarray(out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sigma_w", "sigma_b", "network"),
    [
        ("tanh", 2.0, 0.3, {}),
        slow("hard_tanh", 1.8, 0.2, {}),
        ("tanh", 1.5, 0.3, {"dropout": 0.2}),
        ("tanh", 3.0, 0.3, {"layernorm": True}),
    ],
    ids=["tanh", "hard_tanh", "dropout", "layernorm"],
)
def test_simulated_networks_and_a_wrong_sigma_w(name, sigma_w, sigma_b, network):
    """q*, c*, chi_1 within the standard errors jointly; sigma_w 5% off is rejected."""
    # the mean over draws has a bias of order 1/n, a tenth of a standard error here
    samples = plain(name, sigma_w, sigma_b, **network)

    def distance(sigma_w):
        q = meanfield.q_star(sigma_w, sigma_b, name, **network)
        if network.get("layernorm"):
            q = meanfield.length_map(1.0, sigma_w, sigma_b, name)
        chi = meanfield.chi_1(sigma_w, sigma_b, name, **network)
        return z_score(
            samples,
            [float(q), float(meanfield.c_star(sigma_w, sigma_b, name, **network)), float(chi)],
        )

    assert joint_p(distance(sigma_w)) > 1e-3, distance(sigma_w)
    assert joint_p(distance(1.05 * sigma_w)) < 1e-6, distance(1.05 * sigma_w)


def batchnorm_samples(phi, slope, b, draws=4000, n=1):
    """Per draw of a batch of one unit: numerator and denominator of the growth, by its
    definition."""
    rng = np.random.default_rng(0)
    out = []
    for _ in range(draws):
        h = rng.standard_normal(b)
        h -= h.mean()
        r = h / np.linalg.norm(h)
        x = np.sqrt(b) * r
        center = np.eye(b) - 1 / b
        jac = np.sqrt(b) / np.linalg.norm(h) * (center - np.outer(r, r)) * slope(x)  # P D
        y = phi(x)
        out.append([np.sum((jac @ center) ** 2) / (b - 1), np.sum((y - y.mean()) ** 2) / (b - 1)])
    return np.asarray(out)


@pytest.mark.parametrize("b", [8, 32])
def test_formula_7_batchnorm(b):
    """Yang 2019: linear (B-2)/(B-3); ReLU by simulation of one unit, 2% off rejected; pi/(pi-1) as
    B grows."""
    assert meanfield.batchnorm_growth(b, "linear") == pytest.approx((b - 2) / (b - 3), rel=1e-12)
    assert meanfield.batchnorm_growth(1e7) == pytest.approx(1.46694, abs=5e-6)
    assert np.isinf(meanfield.batchnorm_growth(3))
    x = batchnorm_samples(lambda x: np.maximum(x, 0), lambda x: (x > 0).astype(float), b)
    ratio = x[:, 0].mean() / x[:, 1].mean()
    spread = np.std(x[:, 0] - ratio * x[:, 1]) / x[:, 1].mean() / np.sqrt(len(x))
    expected = float(meanfield.batchnorm_growth(b))
    assert abs(ratio - expected) < 3 * spread, (ratio, expected, spread)
    assert abs(ratio - expected * (1.02 + 1 / b)) > 3 * spread


def test_formula_9_residual():
    """Tanh: log chi_0 / chi_L ~ A sqrt(L); ReLU: 1 + sigma_v^2 sigma_w^2 / 2 per layer, exactly."""
    w, v, a = 1.5, 1.2, 0.3
    total = np.cumsum(meanfield.residual(4000, w, 0.1, v, a).log_growth)
    slope = (total[3999] - total[1999]) / (4000**0.5 - 2000**0.5)
    expected = 4 / 3 * (2 / np.pi) ** 0.5 * v**2 * w / (v**2 + a**2) ** 0.5
    assert slope == pytest.approx(expected, rel=2e-3)
    assert slope != pytest.approx(1.05 * expected, rel=2e-3)
    relu = meanfield.residual(5, w, 0.1, v, a, "relu")
    np.testing.assert_allclose(relu.log_growth, np.log1p(v**2 * w**2 / 2), rtol=1e-12)


def test_formula_9_residual_simulated():
    """p, c and the gradient after six layers of a network with both matrices."""
    w, b, v, a, n, depth = 1.5, 0.2, 0.8, 0.1, 300, 6
    rng, out = np.random.default_rng(1), []
    for _ in range(60):
        h = np.linalg.cholesky([[1, 0.5], [0.5, 1]]) @ rng.standard_normal((2, n))
        u = rng.standard_normal((n, 20))
        u = u / np.linalg.norm(u, axis=0)
        for _ in range(depth):
            ws, vs = (s / np.sqrt(n) * rng.standard_normal((n, n)) for s in (w, v))
            z = h @ ws.T + b * rng.standard_normal(n)
            u = u + vs @ ((1 - np.tanh(z[0]) ** 2)[:, None] * (ws @ u))
            h = h + np.tanh(z) @ vs.T + a * rng.standard_normal(n)
        growth = np.mean(np.sum(u**2, 0))
        out.append([np.mean(h[0] ** 2), np.mean(h[0] * h[1]), growth])
    theory = meanfield.residual(depth, w, b, v, a, c=0.5)
    expected = np.array(
        [theory.p[-1], theory.p[-1] * theory.c[-1], np.exp(np.sum(theory.log_growth))]
    )
    assert joint_p(z_score(out, expected)) > 1e-3, z_score(out, expected)
    assert joint_p(z_score(out, expected * 1.05)) < 1e-3


def test_formula_10_shattered_gradients():
    """Balduzzi 2017: 2^-L without skips at c = 0; L^(-1/2) with them."""
    assert meanfield.gradient_correlation(0.0) ** 20 == pytest.approx(2.0**-20, rel=1e-10)
    layers = np.arange(1.0, 4001.0)
    factors = np.asarray(meanfield.gradient_correlation(0.0, branch=1 / (layers + 1)))
    total = np.cumsum(np.log(factors))
    assert (total[3999] - total[999]) / np.log(4) == pytest.approx(-0.5, rel=2e-3)
    assert meanfield.gradient_correlation(1.0, 2.0, "tanh") == pytest.approx(1.0, rel=1e-10)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gated_samples(cell, sigma_w, variance, bias, n=100, steps=40, draws=24):
    """Mean squared singular value of the last step's Jacobian, from jax.jacfwd of the cell with
    untied weights."""
    rng = np.random.default_rng(5)

    def minimal_rnn(h, w, x):
        u = jax.nn.sigmoid(w[0] @ h + x[0] + bias)
        return u * h + (1 - u) * jnp.tanh(x[1])

    def gru(h, w, x):
        r, z = jax.nn.sigmoid(w[0] @ h + x[0]), jax.nn.sigmoid(w[1] @ h + x[1] + bias)
        return (1 - z) * jnp.tanh(x[2] + r * (w[2] @ h)) + z * h

    def lstm(state, w, x):
        c, h = state[:n], state[n:]
        f, i, o = (jax.nn.sigmoid(w[k] @ h + x[k] + (bias if k == 0 else 0.0)) for k in range(3))
        c = f * c + i * jnp.tanh(w[3] @ h + x[3])
        return jnp.concatenate([c, o * jnp.tanh(c)])

    step = {"minimal_rnn": minimal_rnn, "gru": gru, "lstm": lstm}[cell]
    run, jacobian = jax.jit(step), jax.jit(lambda *a: jnp.sum(jnp.square(jax.jacfwd(step)(*a))))
    out = []
    for _ in range(draws):
        state = jnp.zeros(2 * n if cell == "lstm" else n)
        for t in range(steps):
            weights = jnp.asarray(sigma_w / np.sqrt(n) * rng.standard_normal((4, n, n)))
            args = (state, weights, jnp.asarray(np.sqrt(variance) * rng.standard_normal((4, n))))
            if t < steps - 1:
                state = run(*args)
        out.append([float(jnp.mean(jnp.square(state[-n:]))), float(jacobian(*args)) / state.size])
    return np.asarray(out)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["minimal_rnn", slow("gru"), slow("lstm")])
def test_formula_12_gated(cell):
    """Per-step mean squared singular value, untied: 3 standard errors and 3%; sigma_w 20% off
    rejected; bias -> 1."""
    samples = gated_samples(cell, 2.0, 0.5, 1.0)
    theory = meanfield.gated(cell, 2.0, 0.5, 1.0)
    assert joint_p(z_score(samples, np.array(theory))) > 1e-3, (samples.mean(0), theory)
    assert samples[:, 1].mean() == pytest.approx(float(theory.chi), rel=0.03)
    assert joint_p(z_score(samples, np.array(meanfield.gated(cell, 2.4, 0.5, 1.0)))) < 1e-3
    chi = np.asarray(meanfield.gated(cell, 1.0, 1.0, np.array([0.0, 2.0, 4.0, 8.0])).chi)
    assert np.all(np.diff(chi) > 0) and (cell == "lstm" or abs(chi[-1] - 1) < 0.01)


def log_growths(name, sigma_w, weights, n=48, depth=30, draws=1200):
    """log ||J u||^2 of random networks from their stationary length on."""
    act = ACTIVATIONS[name]

    def draw(key):
        def layer(state, key):
            h, u, log = state
            k1, k2 = jax.random.split(key)
            w = jax.random.normal(k1, (n, n)) / np.sqrt(n)
            if weights == "orthogonal":
                w = jax.random.orthogonal(k2, n)
            g, u = sigma_w * (w @ act(h)), sigma_w * (w @ (derivative(act)(h) * u))
            size = jnp.sum(u**2)
            return (g, u / jnp.sqrt(size), log + jnp.log(size)), None

        k1, k2, k3 = jax.random.split(key, 3)
        q = meanfield.q_star(sigma_w, 0.0, name)
        h = jnp.sqrt(q) * jax.random.normal(k1, (n,))
        u = jax.random.normal(k2, (n,))
        start = (h, u / jnp.linalg.norm(u), jnp.zeros(()))
        return jax.lax.scan(layer, start, jax.random.split(k3, depth))[0][2]

    return np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), draws)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "weights"),
    [("relu", "gaussian"), slow("tanh", "gaussian"), slow("tanh", "orthogonal")],
)
def test_formula_8_log_variance(name, weights):
    """Var log ||J u||^2 = beta within 8% + sampling error; the conditional part alone fails for
    tanh."""
    sigma_w = 2**0.5 if name == "relu" else 1.5
    logs = log_growths(name, sigma_w, weights)
    beta = float(meanfield.log_variance([48] * 30, sigma_w, 0.0, name, weights=weights))
    error = np.sqrt(2 / len(logs))
    print(name, weights, logs.var(), beta)
    assert abs(logs.var() / beta - 1) < 0.08 + 3 * error
    assert abs(logs.var() / (1.5 * beta) - 1) > 0.08 + 3 * error


@pytest.mark.slow
def test_formula_4_and_8_values():
    """Hanin-Nica's 5 for ReLU; 3 (mu_2 / mu_1^2 - 1) = 3 for orthogonal weights, 2 and 0 for a
    linear network."""
    beta = lambda name, weights: (
        meanfield.log_variance([20, 30, 60], 2**0.5, 0.0, name, weights=weights) * 10
    )
    np.testing.assert_allclose(beta("relu", "gaussian"), 5.0, rtol=1e-12)
    np.testing.assert_allclose(beta("relu", "orthogonal"), 3.0, rtol=1e-12)
    np.testing.assert_allclose(beta("linear", "gaussian"), 2.0, rtol=1e-12)
    np.testing.assert_allclose(beta("linear", "orthogonal"), 0.0, atol=1e-12)
    for k in (1, 2):  # formula 4: erf(sqrt(pi) x / 2) has mu_k = (1 + k pi q)^(-1/2)
        act = resolve(lambda x: jax.scipy.special.erf(np.sqrt(np.pi) / 2 * x))
        assert slope_moment(act, jnp.asarray(0.7), k) == pytest.approx(
            (1 + k * np.pi * 0.7) ** -0.5, rel=1e-12
        )
