"""Fixed points and the phase diagram against published numbers, finite differences and simulated
networks. Calls with Python numbers share the compiled programs."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given
from theory.reference import NUMPY, SIGMA_B, joint_p, mp_mean, panels, z_score

from gradjax.core.activations import ACTIVATIONS, KINKS, SLOPES
from gradjax.theory import meanfield
from gradjax.theory.gaussian import derivative, gaussian_mean


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def second_moment(name, q):
    """E phi(sqrt(q) z)^2 by plain quadrature."""
    z, w = panels([k / np.sqrt(q) for k in KINKS.get(name, ())], parts=16)
    return float(np.sum(w * NUMPY[name](np.sqrt(q) * z) ** 2))


# Formula 6


def test_formula_6_printed_values(report):
    """Tanh, sigma_b^2 = 0.05: all digits of q*, chi_1, c*, xi_c and of the critical point."""
    critical = float(meanfield.critical_sigma_w(SIGMA_B))
    at_critical = meanfield.phase_diagram(critical, SIGMA_B)
    assert at_critical.chi_1 == pytest.approx(1.0, abs=1e-9)
    printed = [(critical**2, "1.76095"), (at_critical.q_star, "0.57005")]
    for w2, row in {
        1.0: ("0.1936", "0.7590", "1.000000", "3.627"),
        1.7: ("0.5331", "0.9867", "1.000000", "74.92"),
        4.0: ("2.1955", "1.3424", "0.1651", "6.980"),
    }.items():
        d = meanfield.phase_diagram(w2**0.5, SIGMA_B)
        printed += zip((d.q_star, d.chi_1, d.c_star, d.xi_c), row, strict=True)
        assert d.xi_grad == pytest.approx(-1 / np.log(float(d.chi_1)), rel=1e-12)
    for found, text in printed:
        report(f"formula 6, printed value: {text}", abs(float(found) - float(text)))
        assert f"{float(found):.{len(text.partition('.')[2])}f}" == text


@pytest.mark.slow
def test_the_critical_line_is_the_critical_point():
    critical = meanfield.critical_sigma_w(SIGMA_B)
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
    bend = derivative(derivative(jnp.tanh))
    mean = jax.jit(jax.vmap(lambda q: gaussian_mean(lambda x: bend(x) * jnp.tanh(x), q)))
    rate = d.chi_1 + sigma_w**2 * mean(d.q_star)
    np.testing.assert_allclose(-1 / np.log(rate), d.xi_q, rtol=1e-10)


@pytest.mark.parametrize(
    "layernorm", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["layernorm", "plain"]
)
def test_formula_6_curvature(layernorm):
    """chi_1, chi_2 and kappa^2 after one layer against their definitions; with LayerNorm, where
    phi sees the length 1, there is no fixed point to search."""
    q, s2 = 1.0, 2.5**2
    numbers = {"sigma_w": 2.5, "sigma_b": 0.3, "layernorm": layernorm}
    if layernorm:
        s2 /= 2.5**2 * second_moment("tanh", 1.0) + 0.3**2
    else:
        q = float(meanfield.q_star(**numbers))
    first = s2 * mp_mean(lambda x: mpmath.sech(x) ** 4, q)
    second = s2 * mp_mean(lambda x: (2 * mpmath.tanh(x) * mpmath.sech(x) ** 2) ** 2, q)
    assert meanfield.chi_1(**numbers) == pytest.approx(first, rel=1e-10)
    assert meanfield.chi_2(**numbers) == pytest.approx(second, rel=1e-10)
    want = 3 * second / first**2 + 0.5 / first
    assert meanfield.curvature_map(0.5, **numbers) == pytest.approx(want, rel=1e-10)


def test_curvature_is_infinite_where_the_slope_jumps():
    assert np.isinf(meanfield.chi_2(1.0, 0.3, "relu"))


@pytest.mark.slow
def test_curvature_is_infinite_where_the_slope_jumps_a_little():
    assert np.isinf(meanfield.chi_2(1.0, 0.3, "leaky_relu"))


# Fixed points


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tanh", "selu"])
@given(sigma_w=st.floats(0.3, 4.0), sigma_b=st.floats(0.0, 2.0), dropout=st.floats(0.0, 0.5))
def test_fixed_points_are_fixed(name, sigma_w, sigma_b, dropout):
    d = meanfield.phase_diagram(sigma_w, sigma_b, name, dropout=dropout)
    q, c = d.q_star, d.c_star
    assert not np.isnan(q)
    if np.isfinite(q):
        again = meanfield.length_map(q, sigma_w, sigma_b, name, dropout=dropout)
        assert again == pytest.approx(float(q), rel=1e-12, abs=1e-25)
    assert 0 <= c <= 1
    if np.isfinite(q) and q > 0:
        again = meanfield.correlation_map(c, sigma_w, sigma_b, name, dropout=dropout)
        assert again == pytest.approx(float(c), abs=1e-10)


QUICK = ("relu",)


@pytest.mark.parametrize(
    "name",
    [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in ACTIVATIONS if n not in QUICK)],
)
def test_every_activation_has_its_point(name):
    """The length map keeps q*; a callable without the closed form has the same q* by quadrature."""
    q = float(meanfield.q_star(0.9, 0.4, name))
    assert 0.9**2 * second_moment(name, q) + 0.4**2 == pytest.approx(q, rel=1e-11)
    if name in SLOPES:
        own = meanfield.q_star(0.9, 0.4, ACTIVATIONS[name], kinks=KINKS.get(name))
        assert own == pytest.approx(q, rel=1e-11)


def test_tiny_lengths_are_as_exact_as_others():
    """q* = 2 sigma_b^2 and c* = 2/3 for tanh's linear part at sigma_w = dropout = 1/2, however
    small the bias."""
    for sigma_b in (1e-6, 1e-12, 1e-30):
        d = meanfield.phase_diagram(0.5, sigma_b, dropout=0.5)
        assert d.q_star == pytest.approx(2 * sigma_b**2, rel=1e-11)
        assert d.c_star == pytest.approx(2 / 3, rel=1e-10)


def test_near_critical_points_are_found():
    """1 - c* falls linearly with the distance from the critical line, down to 1e-9 of it, and
    nothing is NaN."""
    critical = float(meanfield.critical_sigma_w(SIGMA_B))
    distance = np.array([1e-3, 1e-5, 1e-7, 1e-9])

    def along(sigma_w):
        points = [meanfield.phase_diagram(w, SIGMA_B) for w in map(float, sigma_w)]
        return meanfield.PhaseDiagram(*np.array(points).T)

    above, below = along(critical * (1 + distance)), along(critical * (1 - distance))
    ratio = (1 - above.c_star) / distance
    np.testing.assert_allclose(ratio[1:3], ratio[2], rtol=1e-3)
    np.testing.assert_allclose(ratio[3], ratio[2], rtol=1e-2)
    np.testing.assert_array_equal(below.c_star, 1.0)
    assert np.all(np.isfinite(above)) and np.all(np.isfinite(below))
    assert np.all(np.diff(above.xi_c) > 0)


def test_lengths_without_a_limit_are_inf():
    he = 2**0.5

    def relu(sigma_w, sigma_b, **network):
        return meanfield.phase_diagram(sigma_w, sigma_b, "relu", **network)

    assert relu(he, 0.0, q0=3.0).q_star == 3.0  # every length is kept
    assert np.isinf(relu(he, 0.1).q_star) and np.isinf(relu(1.5, 0.0).q_star)
    assert relu(1.0, 0.3).q_star == pytest.approx(0.18, rel=1e-14)
    explodes = relu(3.0, 0.1)
    assert explodes.chi_1 == pytest.approx(4.5)
    assert explodes.c_star == 1 and np.isinf(explodes.xi_c)
    assert meanfield.critical_sigma_w(0.2, "relu") == pytest.approx(he)
    dies = meanfield.phase_diagram(0.9, 0.0)
    assert dies.q_star == 0 and dies.c_star == 1
    assert meanfield.critical_sigma_w(0.0) == pytest.approx(1.0, rel=1e-12)
    assert meanfield.phase_diagram(2.0, 0.0).c_star == pytest.approx(0.0, abs=1e-14)


@pytest.mark.slow
def test_the_functions_give_what_the_diagram_gives():
    d = meanfield.phase_diagram(2.0, 0.3)
    assert meanfield.q_star(2.0, 0.3) == pytest.approx(float(d.q_star), rel=1e-12)
    assert meanfield.c_star(2.0, 0.3) == pytest.approx(float(d.c_star), rel=1e-12)
    assert meanfield.chi_1(2.0, 0.3) == pytest.approx(float(d.chi_1), rel=1e-12)
    assert np.isinf(meanfield.q_star(2.0, 0.1, "gelu"))


@pytest.mark.slow
def test_q0_chooses_between_two_limits():
    """A cubic: short signals die away, long ones grow."""

    def phi(x):
        return x**3 / 3.0

    assert meanfield.q_star(1.0, 0.0, phi, q0=0.1) == 0
    assert np.isinf(meanfield.q_star(1.0, 0.0, phi, q0=3.0))


# Transformations


TANH_POINT = ("q_star", "c_star", "xi_c")


def tanh_point(w):
    d = meanfield.phase_diagram(w, 0.3)
    return jnp.stack([getattr(d, name) for name in TANH_POINT])


@pytest.mark.slow
@pytest.mark.parametrize(
    "f",
    [
        tanh_point,
        lambda w: meanfield.chi_1(w, 0.3, "hard_tanh")[None],
        lambda b: meanfield.critical_sigma_w(b)[None],
        lambda w: meanfield.chi_1(w, 0.3, layernorm=True)[None],
        lambda w: meanfield.gated("minimal_rnn", w, 1.0, 1.0).chi[None],
    ],
    ids=[", ".join(TANH_POINT), "chi_1", "critical", "layernorm", "gated"],
)
def test_derivatives_agree_with_finite_differences(f):
    """Forwards and backwards."""

    @jax.jit
    @jax.vmap
    def all_three(x):
        value, forwards = jax.jvp(f, (x,), (jnp.ones_like(x),))
        return value, forwards, jax.jacrev(f)(x)

    value, forwards, backwards = all_three(jnp.array([2.1, 2.1 + 1e-5, 2.1 - 1e-5]))
    step = np.asarray(value[1] - value[2]) / 2e-5
    np.testing.assert_allclose(forwards[0], step, rtol=1e-6)
    np.testing.assert_allclose(backwards[0], step, rtol=1e-6)


@pytest.mark.slow
def test_vmap_jit_and_broadcasting_agree():
    """On more points than are solved at once."""
    w, b = np.linspace(0.8, 2.5, 30), np.linspace(0.05, 0.4, 10)
    grid = meanfield.phase_diagram(w[:, None], b[None, :], correlations=False)
    assert grid.c_star is None and grid.xi_q.shape == (30, 10)
    mapped = jax.jit(jax.vmap(lambda w: meanfield.q_star(w, 0.4)))(jnp.asarray(w))
    np.testing.assert_allclose(grid.q_star[:, -1], mapped, rtol=1e-12)
    np.testing.assert_allclose(grid.q_star[7, 3], meanfield.q_star(w[7], b[3]), rtol=1e-12)


def test_dtypes_are_the_callers():
    with jax.enable_x64(False):
        for dtype in (jnp.float32, jnp.bfloat16):
            found = jax.eval_shape(meanfield.chi_1, jnp.asarray(2.0, dtype))
            assert found.dtype == jnp.float32
    assert jax.eval_shape(lambda: meanfield.q_star(2)).dtype == jnp.float64  # whole numbers


@pytest.mark.slow
def test_float32_has_the_digits_of_float32():
    exact = meanfield.phase_diagram(2.0, 0.3).chi_1
    with jax.enable_x64(False):
        rounded = meanfield.chi_1(jnp.float32(2.0), 0.3)
    assert rounded == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: meanfield.q_star(0.0), r"sigma_w = 0\.0.*\(0, inf\)"),
        (lambda: meanfield.q_star(float("nan")), "sigma_w"),
        (lambda: meanfield.q_star(1.0, -0.1), r"sigma_b = -0\.1.*\[0, inf\)"),
        (lambda: meanfield.chi_1(1.0, 0.1, dropout=1.0), "dropout"),
        (lambda: meanfield.correlation_map(1.1, 1.0), r"c = 1\.1.*\[-1, 1\]"),
        (lambda: meanfield.q_star(1.0, 0.1, "swish"), "'swish'.*tanh.*silu"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# Simulated networks


@functools.cache
def simulate(name, sigma_w, sigma_b, dropout=0.0, layernorm=False, n=400, depth=12, draws=60):
    """Per draw: q and c before the last layer and its mean squared Jacobian, from inputs of the
    theory's q* and c*."""
    rng, phi = np.random.default_rng(3), NUMPY[name]
    slope = jax.jit(derivative(ACTIVATIONS[name]))
    theory = meanfield.phase_diagram(sigma_w, sigma_b, name, dropout=dropout, layernorm=layernorm)
    q, c = float(theory.q_star), float(theory.c_star)
    out = []
    for _ in range(draws):
        h = np.sqrt(q) * (np.linalg.cholesky([[1, c], [c, 1]]) @ rng.standard_normal((2, n)))
        for _ in range(depth):
            before = h
            spread = h.std(1, keepdims=True) if layernorm else np.ones((2, 1))
            seen = (h - h.mean(1, keepdims=True)) / spread if layernorm else h
            mask = (rng.random(h.shape) >= dropout) / (1 - dropout)
            w = sigma_w / np.sqrt(n) * rng.standard_normal((n, n))
            h = (mask * phi(seen)) @ w.T + sigma_b * rng.standard_normal(n)
        last = w * (mask[0] * np.asarray(slope(seen[0])) / spread[0])
        lengths = np.mean(before**2, 1)
        correlation = np.mean(before[0] * before[1]) / np.sqrt(lengths[0] * lengths[1])
        out.append([lengths.mean(), correlation, np.sum(np.square(last)) / n])
    return np.asarray(out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sigma_w", "sigma_b", "network"),
    [
        ("tanh", 2.0, 0.3, {}),
        ("hard_tanh", 1.8, 0.2, {}),
        ("tanh", 1.5, 0.3, {"dropout": 0.2}),
        ("tanh", 3.0, 0.3, {"layernorm": True}),
    ],
    ids=["tanh", "hard_tanh", "dropout", "layernorm"],
)
def test_simulated_networks_and_a_wrong_sigma_w(name, sigma_w, sigma_b, network):
    """q*, c*, chi_1 within the standard errors jointly; sigma_w 5% off is rejected."""
    # The mean over draws has a bias of order 1/n, a tenth of a standard error here.
    samples = simulate(name, sigma_w, sigma_b, **network)

    def distance(sigma_w):
        d = meanfield.phase_diagram(sigma_w, sigma_b, name, **network)
        q = float(d.q_star)
        if network.get("layernorm"):
            q = sigma_w**2 * second_moment(name, 1.0) + sigma_b**2
        return z_score(samples, [q, float(d.c_star), float(d.chi_1)])

    assert joint_p(distance(sigma_w)) > 1e-3, distance(sigma_w)
    assert joint_p(distance(1.05 * sigma_w)) < 1e-6, distance(1.05 * sigma_w)
