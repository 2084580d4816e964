"""Gaussian moments against multi-precision, another quadrature and closed forms."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from theory.reference import MP, NUMPY, mp_mean, panels

from gradjax.core.activations import ACTIVATIONS, KINKS, resolve
from gradjax.theory.gaussian import (
    gaussian_mean,
    phi_pair,
    secant,
    second_moment,
    slope_moment,
    slope_pair,
)

LENGTHS = np.array([1e-4, 0.7, 100.0])


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def by_quadrature(act):
    """The activation, and the same without its closed form, if it has one."""
    return [act] if act.slopes is None else [act, act._replace(slopes=None)]


QUICK = ("tanh", "hard_tanh", "relu", "gelu")


@pytest.mark.parametrize(
    "names",
    [
        QUICK,
        pytest.param([n for n in ACTIVATIONS if n not in QUICK], marks=pytest.mark.slow),
    ],
    ids=["quick", "others"],
)
def test_moments_agree_with_multiprecision(names, report):
    """E phi^2 and E phi'^2 from q = 1e-4 to 100, and the quadrature itself where a closed form
    hides it."""

    def all_moments(q):
        def both(act):
            return jax.vmap(lambda q: jnp.stack([second_moment(act, q), slope_moment(act, q)]))(q)

        return [[both(act) for act in by_quadrature(resolve(name))] for name in names]

    for name, moments in zip(names, jax.jit(all_moments)(jnp.asarray(LENGTHS)), strict=True):
        squares = [lambda x, f=f: f(x) ** 2 for f in MP[name]]
        want = [[mp_mean(f, q, KINKS.get(name, ())) for f in squares] for q in LENGTHS]
        worst = max(np.max(np.abs(found / np.array(want) - 1)) for found in moments)
        report(f"formula 6, E phi^2 and E phi'^2 against multi-precision: {name}", worst)
        assert worst < 1e-10, name


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
    act, q, cs = resolve(name), 1.3, np.array([0.6, -0.6])
    want = [reference_pair(NUMPY[name], act.kinks, q, c) for c in cs]

    def at_all(c):
        return [jax.vmap(lambda c, a=a: phi_pair(a, q, c))(c) for a in by_quadrature(act)]

    got = jax.jit(at_all)(jnp.asarray(cs))
    size = float(second_moment(act, jnp.asarray(q)))
    worst = max(np.max(np.abs(np.asarray(found) - want)) / size for found in got)
    report(f"formula 6, E phi(u_1) phi(u_2) against other quadrature: {name}", worst)
    assert worst < 1e-10


def test_pair_moments_of_erf_have_a_closed_form_up_to_q_100():
    """E phi phi = (2/pi) arcsin(2 q c / (1 + 2 q)): also its chord as c -> 1, and phi' phi', for q
    from 1e-4 to 100."""
    act = resolve("erf")
    qs, cs = (1e-4, 1.0, 100.0), (-1.0, -0.9, 0.0, 0.5, 0.999999, 1.0)
    q, c = (jnp.asarray(a.ravel()) for a in np.meshgrid(qs, cs, indexing="ij"))
    split = np.asarray((c >= 0) & (c < 1))

    def one(q, c):
        return phi_pair(act, q, c), slope_pair(act, q, c)

    def apart(q, c):
        return secant(act, q, 1 - c), slope_pair(act, q, c, split=True)

    found, chord = jax.jit(lambda q, c: (jax.vmap(one)(q, c), jax.vmap(apart)(q[split], c[split])))(
        q, c
    )
    exact = []
    with mpmath.workdps(40):
        for qi, ci in zip(map(float, q), map(float, c), strict=True):
            inner, full = (2 * mpmath.mpf(qi) * x / (1 + 2 * mpmath.mpf(qi)) for x in (ci, 1))
            pair, top = (2 / mpmath.pi * mpmath.asin(x) for x in (inner, full))
            slope = 4 / mpmath.pi / ((1 + 2 * mpmath.mpf(qi)) * mpmath.sqrt(1 - inner**2))
            secants = 0 if ci == 1 else (top - pair) / (qi * (1 - mpmath.mpf(ci)))
            exact.append([float(x) for x in (pair, top, slope, secants)])
    pair, top, slope, secants = np.array(exact).T
    errors = [(found[0] - pair) / top, found[1] / slope - 1]
    errors += [chord[0] / secants[split] - 1, chord[1] / slope[split] - 1]
    worst = max(float(np.max(np.abs(e))) for e in errors)
    print(f"erf: largest error of pair moments {worst:.1e}")
    assert worst < 1e-10


@pytest.mark.slow
def test_price_gives_the_derivative_at_the_corner():
    """d/dc E phi phi = q E phi' phi', at c = 1 too, where the derivative of the quadrature's nodes
    is infinite."""
    act, q = resolve("hard_tanh"), 1.5

    @jax.jit
    def both(q, c):
        pair = functools.partial(phi_pair, act)
        return pair(q, c), jax.grad(pair, (0, 1))(q, c), slope_moment(act, q)

    _, (_, slope), moment = both(q, 1.0)
    assert slope == pytest.approx(q * float(moment), rel=1e-11)
    step = (both(q + 1e-5, 0.4)[0] - both(q - 1e-5, 0.4)[0]) / 2e-5
    assert both(q, 0.4)[1][0] == pytest.approx(float(step), rel=1e-8)


def test_derivatives_of_moments_carry_the_moving_kinks():
    """d/dq P(|sqrt(q) z| < 1), of which the integrand knows nothing between its cuts."""
    slope = jax.jit(jax.grad(lambda q: slope_moment(resolve("hard_tanh"), q)))
    want = -np.exp(-0.5 / 1.5) / np.sqrt(2 * np.pi) / 1.5**1.5
    assert slope(1.5) == pytest.approx(want, rel=1e-11)


def test_no_second_moment_is_nan():
    """E exp(x^2) = 1 / sqrt(1 - 2 q), which is infinite from q = 1/2 on."""
    mean = jax.jit(jax.vmap(lambda q: gaussian_mean(lambda x: jnp.exp(x**2), q)))
    none, some = mean(jnp.array([0.6, 0.1]))
    assert np.isnan(none)
    assert some == pytest.approx(1 / np.sqrt(0.8), rel=1e-6)


def test_formula_4_erf():
    """erf(sqrt(pi) x / 2): mu_k = (1 + k pi q)^(-1/2), and E phi^2 has an arcsine."""
    act = resolve(lambda x: jax.scipy.special.erf(np.sqrt(np.pi) / 2 * x))
    q = 0.7
    found = jax.jit(lambda q: [second_moment(act, q), *(slope_moment(act, q, k) for k in (1, 2))])(
        q
    )
    exact = [2 / np.pi * np.arcsin(np.pi * q / (2 + np.pi * q))]
    exact += [(1 + k * np.pi * q) ** -0.5 for k in (1, 2)]
    np.testing.assert_allclose(found, exact, rtol=1e-12)
