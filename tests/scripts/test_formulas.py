"""Formulas 1 to 11: the published values, reproduced to the digits given, and the closed forms
against mpmath.

The searching tests (simulation, wrong settings) stand in test_meanfield, test_random_matrix and
test_theory."""

import math

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest

from gradjax.core.activations import resolve
from gradjax.theory import meanfield
from gradjax.theory import random_matrix as rm
from gradjax.theory.gaussian import second_moment

B2 = 0.05**0.5  # sigma_b of Schoenholz 2017


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


# formula, what, value, as printed; the last digit printed is the tolerance
TABLE = [
    (
        "formula 2",
        "m_2 at L = 6 is L + 1",
        lambda: jnp.exp(rm.fuss_catalan_log_moment(2, 6)),
        "7.000",
    ),
    ("formula 3", "N = 32, L = 6", lambda: jnp.exp(rm.log_second_moments(6, 32)[0]), "7.764"),
    (
        "formula 5",
        "hard-tanh, L = 32, sigma_0^2 = L (1 - p) = 0.25",
        lambda: edge(1 - 0.25 / 32),
        "1.285",
    ),
    ("formula 5", "the same at L (1/p - 1) = 0.25", lambda: edge(1 / (1 + 0.25 / 32)), "1.283"),
    ("formula 6", "critical sigma_w^2", lambda: meanfield.critical_sigma_w(B2) ** 2, "1.76095"),
    (
        "formula 6",
        "critical q*",
        lambda: meanfield.q_star(meanfield.critical_sigma_w(B2), B2),
        "0.57005",
    ),
    *(
        (
            "formula 6",
            f"{name} at sigma_w^2 = {w2}",
            lambda w2=w2, name=name: point(w2)[name],
            printed,
        )
        for w2, row in {
            1.0: ("0.1936", "0.7590", "1.000000", "3.627"),
            1.7: ("0.5331", "0.9867", "1.000000", "74.92"),
            4.0: ("2.1955", "1.3424", "0.1651", "6.980"),
        }.items()
        for name, printed in zip(("q_star", "chi_1", "c_star", "xi_c"), row, strict=True)
    ),
    ("formula 7", "pi / (pi - 1) as B grows", lambda: meanfield.batchnorm_growth(1e8), "1.46694"),
    ("formula 8", "beta n of one ReLU layer", lambda: 64 * rm.norm_moments([64]).beta, "5.000000"),
    ("formula 11", "share of 5 factors in Saxe's bin, %", lambda: 100 * fraction(5), "32"),
    ("formula 11", "share of 100 factors in Saxe's bin, %", lambda: 100 * fraction(100), "94"),
]


def edge(p):
    """Largest eigenvalue at L = 32, orthogonal weights, critical, of a derivative that is 1 with
    probability p."""
    law = rm.DerivativeLaw(jnp.array([1.0, 0.0]), jnp.array([p, 1 - p]))
    return jnp.exp(rm.product_density(law, 32, p**-0.5, "orthogonal").log_lambda_max)


def point(w2):
    return meanfield.phase_diagram(w2**0.5, B2)._asdict()


def fraction(factors):
    return rm.ginibre_product_cdf(math.sqrt(0.01 / math.pi), factors)


def test_values_to_the_digits_given(report):
    wrong = []
    for formula, what, value, printed in TABLE:
        digits = len(printed.partition(".")[2])
        found = float(value())
        report(f"{formula}, printed value: {what}", abs(found - float(printed)))
        if f"{found:.{digits}f}" != printed:
            wrong.append((formula, what, found, printed))
    assert not wrong


Q, ERF = 0.7, lambda x: jax.scipy.special.erf(math.sqrt(math.pi) / 2 * x)
mu = lambda phi: [rm.derivative_moment(rm.derivative_law(phi, Q), k) for k in (1, 2)]
psi = lambda k: [mp.psi(k, mp.mpf(33 - i) / 2) for i in range(1, 33)]
limit = jax.jit(rm.limit_density, static_argnames=("universality", "num"))
# formula, what, ours, closed form by mpmath
CLOSED = [
    ("formula 1", "exponents", lambda: rm.newman_exponents(32, 1.3),
     lambda: [mp.log(1.3) + (mp.log(mp.mpf(2) / 32) + x) / 2 for x in psi(0)]),
    ("formula 1", "variance", lambda: rm.newman_variance(32, 4000), lambda: [x / 16000 for x in psi(1)]),
    ("formula 1", "limit", lambda: rm.newman_limit(np.array([0.1, 0.9])), lambda: [mp.log(0.9) / 2, mp.log(0.1) / 2]),
    ("formula 2", "log m_3", lambda: rm.fuss_catalan_log_moment(3, 5), lambda: mp.log(mp.binomial(18, 3) / 16)),
    ("formula 2", "log edge", lambda: rm.fuss_catalan_log_edge(7), lambda: 8 * mp.log(8) - 7 * mp.log(7)),
    ("formula 3", "one layer of He", lambda: jnp.exp(rm.log_second_moments(1, 32, 2**0.5, 0.5)[0]),
     lambda: 1 + 2 + mp.mpf(3) / 32),
    ("formula 4", "mu_k of hard-tanh", lambda: mu("hard_tanh"), lambda: [mp.erf(1 / mp.sqrt(2 * Q))] * 2),
    ("formula 4", "mu_k of erf", lambda: mu(ERF), lambda: [(1 + k * mp.pi * Q) ** -0.5 for k in (1, 2)]),
    ("formula 4", "E phi^2 of erf", lambda: second_moment(resolve(ERF), jnp.asarray(Q)),
     lambda: 2 / mp.pi * mp.asin(mp.pi * Q / (2 + mp.pi * Q))),
    ("formula 4", "variance of ReLU, 2 L and L",
     lambda: [rm.relative_variance(rm.derivative_law("relu"), 9, w) for w in rm.WEIGHTS], lambda: [18, 9]),
    ("formula 4", "variance of hard-tanh, Gaussian, (L + p) / p - 1",
     lambda: rm.relative_variance(rm.derivative_law("hard_tanh", Q), 9), lambda: 9 / mp.erf(1 / mp.sqrt(2 * Q))),
    ("formula 5", "edges of the limits",
     lambda: [limit_edge(0.4, "bernoulli"), limit_edge(3.0, "bernoulli"), limit_edge(1.5, "smooth")],
     lambda: [mp.exp(0.4), 3 * mp.e, smooth_edge(1.5)]),
    ("formula 5", "atom of the Bernoulli class", lambda: limit(0.4, "bernoulli", num=64).atom_mass,
     lambda: 1 - 0.4),
    ("formula 6", "curvature map", lambda: meanfield.curvature_map(0.5, 1.5, 0.3),
     lambda: tanh_curvature(0.5, 1.5, float(meanfield.q_star(1.5, 0.3)))),
    ("formula 7", "linear", lambda: meanfield.batchnorm_growth(np.array([8.0, 32.0, 128.0]), "linear"),
     lambda: [mp.mpf(b - 2) / (b - 3) for b in (8, 32, 128)]),
    ("formula 8", "log E ||J u||^4", lambda: rm.norm_moments([7, 16, 16]).log_fourth,
     lambda: mp.log((1 + mp.mpf(5) / 7) * (1 + mp.mpf(5) / 16) ** 2)),
    ("formula 9", "ReLU", lambda: jnp.exp(meanfield.residual(3, 1.5, 0.1, 1.2, 0.3, "relu").log_growth),
     lambda: [1 + mp.mpf("1.44") * mp.mpf("2.25") / 2] * 3),
    ("formula 10", "2^-L", lambda: jnp.log2(meanfield.gradient_correlation(0.0) ** 30), lambda: -30),
    ("formula 11", "3 layers", lambda: rm.saxe_mode(1.3, 2.5, 1e-3, 3, 1.7),
     lambda: 2.5 * mp.exp(6.5 / 1.7) / (mp.exp(6.5 / 1.7) - 1 + 2500)),
    ("formula 11", "r^(2/k)", lambda: rm.ginibre_product_cdf(0.3, 7), lambda: mp.mpf("0.3") ** (mp.mpf(2) / 7)),
]  # fmt: skip


def limit_edge(s2, universality):
    return jnp.exp(limit(s2, universality, num=64).log_lambda_max)


def tanh_curvature(kappa2, sigma_w, q):
    """3 chi_2 / chi_1^2 + kappa^2 / chi_1 by multi-precision quadrature."""
    mean = lambda f: (
        sigma_w**2 * mp.quad(lambda z: f(mp.sqrt(q) * z) ** 2 * mp.npdf(z), [-12, -4, -1, 1, 4, 12])
    )
    first, second = (
        mean(lambda x: mp.sech(x) ** 2),
        mean(lambda x: 2 * mp.tanh(x) * mp.sech(x) ** 2),
    )
    return 3 * second / first**2 + kappa2 / first


def smooth_edge(s2):
    z = (mp.sqrt(1 + 4 / mp.mpf(s2)) - 1) / 2
    return (1 + 1 / z) * mp.exp(s2 * z)


def test_closed_forms_to_1e_10(report):
    """Relative error, absolute below 1."""
    wrong = []
    for formula, what, ours, closed in CLOSED:
        found, expected = (np.asarray(f(), float).ravel() for f in (ours, closed))
        error = float(np.max(np.abs(found - expected) / np.maximum(1, np.abs(expected))))
        report(f"{formula}, closed form: {what}", error)
        if not error < 1e-10:
            wrong.append((formula, what, error))
    assert not wrong


def test_every_formula_is_here():
    assert {int(name.split()[1]) for name, *_ in (*TABLE, *CLOSED)} == set(range(1, 12))
