"""Products of matrices whose singular values are known, for the tests of the spectrum."""

import functools

import mpmath
import numpy as np

# One shape for most tests: every other one compiles again.
DEPTH, N = 12, 8


def rng(seed=0):
    return np.random.default_rng(seed)


def gaussian(depth=DEPTH, n=N, seed=0, dtype=np.float64):
    return (rng(seed).standard_normal((depth, n, n)) / np.sqrt(n)).astype(dtype)


def orthogonal(n, seed):
    return np.linalg.qr(rng(seed).standard_normal((n, n)))[0]


def descending(x):
    return -np.sort(-np.asarray(x, float))


def multiprecision(factors, digits=150):
    """Log singular values by mpmath; exact below a condition of 10^(digits / 2)."""
    with mpmath.workdps(digits):
        product = mpmath.matrix(np.asarray(factors[0], float).tolist())
        for factor in factors[1:]:
            product = mpmath.matrix(np.asarray(factor, float).tolist()) * product
        sigma = mpmath.svd_r(product, compute_uv=False)
        return descending([float(mpmath.log(x)) if x > 0 else -np.inf for x in map(abs, sigma)])


def naive(factors):
    """The log singular values of the product formed in float64."""
    eye = np.eye(factors.shape[-1])
    product = functools.reduce(lambda j, w: w.astype(float) @ j, factors, eye)
    with np.errstate(divide="ignore"):
        return np.log(np.linalg.svd(product, compute_uv=False))


def known_product(n, depth, span, noise=0.3, seed=0):
    """Q_L D_L Q_{L-1}^T ... Q_1 D_1 Q_0^T and its log singular values; `span` nats in all."""
    q = [orthogonal(n, seed + i) for i in range(depth + 1)]
    logs = np.linspace(span / 2, -span / 2, n) / depth
    logs = logs + noise * rng(seed).standard_normal((depth, n))
    factors = np.stack([q[i + 1] @ np.diag(np.exp(d)) @ q[i].T for i, d in enumerate(logs)])
    return factors, descending(logs.sum(0))
