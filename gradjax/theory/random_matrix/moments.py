"""Exponents, moments, norms and eigenvalues of layer products in closed form.

Newman's exponents of Gaussian products, their Fuss-Catalan moments, exact second moments at finite
width, the law of the norm of one direction, and the eigenvalues of products. Cost: O(width) each.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import digamma, gammaln, logsumexp, polygamma, xlog1py, xlogy

from gradjax.theory.random_matrix.checks import common, within

# Formula 1: products of Gaussian matrices


def newman_exponents(width: int, sigma_w: Any = 1.0) -> Array:
    """Lyapunov exponents of a product of real Ginibre matrices of variance sigma_w^2 / N.

        lambda_i = log sigma_w + 1/2 [log(2/N) + psi((N - i + 1)/2)],      i = 1 .. N

    Args:
      width: N, static.
      sigma_w: () positive.

    Returns:
      (N,) descending, nats per layer.

    References:
      Newman, The distribution of Lyapunov exponents: exact results for random matrices
      (Commun. Math. Phys. 103, 1986). Derived here from the QR decomposition: by rotation
      invariance its i-th diagonal entry grows by an independent chi_{N-i+1}.
    """
    within("width", width, 1)
    sigma_w = within("sigma_w", sigma_w, 0, closed=False)
    half = jnp.arange(width, 0, -1).astype(sigma_w.dtype) / 2
    return jnp.log(sigma_w) + 0.5 * (digamma(half) - jnp.log(width / jnp.asarray(2, sigma_w.dtype)))


def newman_variance(width: int, depth: Any) -> Array:
    """Variance of each of Newman's exponents measured over `depth` layers.

        Var = psi'((N - i + 1)/2) / (4 L),      (N,) nats^2

    Exact for the growth rates of the QR decomposition; for log sigma_i / L it is the leading term
    in 1/L.
    """
    within("width", width, 1)
    depth = within("depth", depth, 1)
    return polygamma(1, jnp.arange(width, 0, -1).astype(depth.dtype) / 2) / (4 * depth)


def newman_limit(fraction: Any) -> Array:
    """Newman's exponents as N grows, 1/2 log(1 - i/N), nats per layer, for sigma_w = 1.

    Args:
      fraction: i/N in [0, 1], scalar or array.
    """
    return 0.5 * jnp.log1p(-within("fraction", fraction, 0, 1))


# Formulas 2 and 3: moments of linear and ReLU products with Gaussian weights


def fuss_catalan_log_moment(k: Any, depth: Any) -> Array:
    """Log of the k-th moment of J J^T for `depth` Gaussian factors of sigma_w = 1, N -> infinity.

        m_k = lim E tr (J J^T)^k / N = C(Lk + k, k) / (Lk + 1)

    Derived from M^{-1}(z) = (1 + z)^(L+1) / z by Lagrange inversion (Penson & Zyczkowski,
    arXiv:1103.3453). At L/N > 0.1 it is visibly wrong, where `log_second_moments` is exact.
    """
    k, depth = common(within("k", k, 0), within("depth", depth, 0))
    binomial = gammaln((depth + 1) * k + 1) - gammaln(k + 1) - gammaln(depth * k + 1)
    return binomial - jnp.log1p(depth * k)


def log_second_moments(
    depth: Any, width: Any, sigma_w: Any = 1.0, keep: Any = 1.0
) -> tuple[Array, Array]:
    """Logs of the exact second moments E tr (J J^T)^2 / N and E (tr J J^T)^2 / N^2 at finite width.

    Gaussian weights, D of independent Bernoulli(keep) entries: 1 is linear, 1/2 ReLU (He:
    sigma_w^2 = 2). One layer maps (a, b) by

        sigma_w^4 {keep^2 (1 - 1/N) I + keep [[2/N, 1], [2/N^2, 1/N]]},

    whose second part has rank one, so

        a = [(N + 2) x^L - (N - 1) y^L] / 3,      b = [(N + 2) x^L + 2 (N - 1) y^L] / (3 N),
        y = sigma_w^4 keep^2 (1 - 1/N),           x = y + 3 sigma_w^4 keep / N,

    x = 1 + 2/N for a critical linear network, 1 + 5/N for He's; the mean of tr J J^T / N is
    (keep sigma_w^2)^L. Derivation: with M = J J^T and the rows w_i of W, E (w_i M w_i)^2 =
    sigma_w^4 (b + 2 a / N) and E (w_i M w_j)^2 = sigma_w^4 a / N. Both are even in w_i, so they are
    independent of the sign of its unit: the result is exact for a real ReLU network. As N grows,
    a = 1 + L / keep.

    Args:
      depth: L >= 0, scalar or array, as the others.
      width: N >= 1.
      sigma_w: positive.
      keep: in (0, 1].

    Returns:
      (log a, log b), of the arguments' shape.
    """
    depth, n = within("depth", depth, 0), within("width", width, 1)
    sigma_w = within("sigma_w", sigma_w, 0, closed=False)
    keep = within("keep", keep, 0, 1, closed=False)
    depth, n, sigma_w, keep = common(depth, n, sigma_w, keep)
    # x / y - 1, which is infinite at N = 1, where y = 0.
    spread = 3 / (keep * (n - 1))
    ratio = jnp.exp(-depth * jnp.log1p(spread)) * (n - 1)
    ratio = jnp.where(n > 1, ratio, 0)
    top = depth * (4 * jnp.log(sigma_w) + jnp.log(keep) + jnp.log(keep * (1 - 1 / n) + 3 / n))
    return top + jnp.log((n + 2 - ratio) / 3), top + jnp.log((n + 2 + 2 * ratio) / (3 * n))


# Formula 8: the norm of one direction


class NormMoments(NamedTuple):
    """Moments of ||J u||^2 for a fixed unit vector u, at sigma_w^2 keep = 1.

    One layer multiplies ||J u||^2 by chi^2_K / (keep n).
    """

    mean: Array  # of log ||J u||^2, given that it is not zero, nats
    variance: Array  # of log ||J u||^2, given that it is not zero, nats^2
    log_fourth: Array  # log E ||J u||^4 = sum log(1 + (3 / keep - 1) / n)
    beta: Array  # sum (3 / keep - 1) / n: the Gaussian limit is N(-beta/2, beta)
    log_survival: Array  # log of the probability that J u is not zero


def norm_moments(widths: Sequence[int], keep: Any = 0.5) -> NormMoments:
    """The exact law of log ||J u||^2 in a ReLU or linear network with Gaussian weights.

    Layers are independent: ||J_l u||^2 = chi^2_K / (keep n_l), K ~ Bin(n_l, keep) the live units.
    Given K > 0, the mean of the log is E [psi(K/2) + log 2 - log(keep n)] and its variance
    E psi'(K/2) + Var psi(K/2), because the sign of a row is independent of its length along u.

    Args:
      widths: n_1 .. n_L, the layers' outputs, static integers.
      keep: () in (0, 1]; 1/2 for ReLU, 1 for a linear network.

    References:
      Hanin & Nica, Products of many large random matrices and gradients in deep neural networks
      (arXiv:1812.05994): beta = 5 sum 1/n. Hanin (arXiv:1801.03744): E ||J u||^4 grows with the
      same sum.
    """
    within("widths", widths, 1)
    keep = within("keep", keep, 0, 1, closed=False)
    sizes, counts = np.unique(np.asarray(widths, int), return_counts=True)
    n = jnp.asarray(sizes, keep.dtype)[:, None]
    k = jnp.arange(1, sizes.max() + 1, dtype=keep.dtype)[None, :]
    rest = jnp.maximum(n - k, 0)
    binomial = gammaln(n + 1) - gammaln(k + 1) - gammaln(rest + 1)
    log_p = binomial + xlogy(k, keep) + xlog1py(rest, -keep)
    log_p = jnp.where(k <= n, log_p, -jnp.inf)
    survival = logsumexp(log_p, axis=1, keepdims=True)
    p = jnp.exp(log_p - survival)
    psi = digamma(k / 2) - jnp.log(keep * n / 2)
    mean = jnp.sum(p * psi, axis=1, keepdims=True)
    variance = jnp.sum(p * (polygamma(1, k / 2) + (psi - mean) ** 2), axis=1)
    excess = (3 / keep - 1) / n[:, 0]

    def total(x):
        return jnp.sum(jnp.asarray(counts, keep.dtype) * x)

    return NormMoments(
        mean=total(mean[:, 0]),
        variance=total(variance),
        log_fourth=total(jnp.log1p(excess)),
        beta=total(excess),
        log_survival=total(survival[:, 0]),
    )


# Formula 11: eigenvalues of products


def ginibre_product_cdf(radius: Any, num_factors: Any) -> Array:
    """P(|z| < radius) = r^(2/k) for the eigenvalues z of a product of k Gaussian factors.

    For sigma_w = 1 and N -> infinity. Derivation: free circular products are R-diagonal, so
    1 / r^2 = S(F - 1) = F^-k (Haagerup & Larsen 2000, theorem 4.4). In figure 6C of Saxe et al.
    (arXiv:1312.6120) a bin of area 0.01 at the origin holds (0.01 / pi)^(1/k) of the eigenvalues,
    32% for 5 factors and 94% for 100.

    Args:
      radius: r >= 0, scalar or array.
      num_factors: k >= 1.
    """
    radius, k = common(within("radius", radius, 0), within("num_factors", num_factors, 1))
    return jnp.minimum(radius, 1) ** (2 / k)
