"""What the tests of the theory compare with: multi-precision, plain quadrature, statistics."""

import functools
import itertools

import jax
import mpmath
import numpy as np
from scipy import stats

from gradjax.core.activations import SLOPES

SIGMA_B = 0.05**0.5  # Schoenholz 2017


# Activations in multi-precision and in NumPy


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
    "leaky_relu": (
        lambda x: x if x > 0 else x / 100,
        lambda x: 1 if x > 0 else mpmath.mpf(1) / 100,
    ),
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

NUMPY = {
    "linear": lambda x: x,
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
}


# Quadrature


def mp_mean(f, q, kinks=()):
    """E f(sqrt(q) z) in multi-precision, cut at the kinks."""
    with mpmath.workdps(20):
        s = mpmath.sqrt(q)
        cuts = {mpmath.mpf(k) / s for k in (*kinks, -4, -1.5, 0, 1.5, 4)}
        cuts |= {mpmath.mpf(k) for k in (-11, -4, 4, 11)}
        cuts = sorted(k for k in cuts if abs(k) <= 11)

        def integrand(z):
            return f(s * z) * mpmath.exp(-z * z / 2)

        integral = mpmath.quad(integrand, cuts, method="gauss-legendre", maxdegree=5)
        return float(integral / mpmath.sqrt(2 * mpmath.pi))


@functools.cache
def _legendre(nodes):
    return np.polynomial.legendre.leggauss(nodes)


def panels(cuts, low=-9.0, high=9.0, nodes=40, parts=8):
    """Plain Gauss-Legendre on equal parts between cuts: nothing in common with what it checks."""
    x, w = _legendre(nodes)
    ends = np.unique(np.clip([low, *cuts, high], low, high))
    ends = np.unique(
        np.concatenate([np.linspace(a, b, parts + 1) for a, b in itertools.pairwise(ends)])
    )
    a, h = ends[:-1, None], np.diff(ends)[:, None]
    z, w = (a + 0.5 * h * (x + 1)).ravel(), (0.5 * h * w).ravel()
    return z, w * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)


# Statistics


def z_score(samples, expected):
    """Distance of the mean from `expected` in standard errors."""
    samples = np.asarray(samples, float)
    return (samples.mean(0) - expected) / (samples.std(0, ddof=1) / np.sqrt(len(samples)))


def joint_p(z):
    """Chi-squared p-value of independent z-scores."""
    return float(stats.chi2.sf(np.sum(np.square(z)), np.size(z)))


def p_value(samples, expected):
    """Joint test that the rows of `samples` have mean `expected`: Hotelling's T^2."""
    samples = np.asarray(samples, float)
    count, dim = samples.shape
    off = samples.mean(0) - np.asarray(expected, float)
    t2 = count * off @ np.linalg.solve(np.atleast_2d(np.cov(samples.T)), off)
    return float(stats.f.sf(t2 * (count - dim) / (dim * (count - 1)), dim, count - dim))


# Random matrices


def gaussian(rng, *shape):
    return rng.standard_normal(shape) / np.sqrt(shape[-1])


def orthogonal(rng, *shape):
    q, r = np.linalg.qr(rng.standard_normal(shape))
    return q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[..., None, :]


def erf(x):
    """The papers' scaling of erf, whose slope at 0 is 1."""
    return jax.scipy.special.erf(np.sqrt(np.pi) / 2 * x)
