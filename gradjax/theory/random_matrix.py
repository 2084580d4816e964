"""What random matrices say of the layer product J = D_L W_L ... D_1 W_1: exponents, moments,
densities, norms.

    W_l = sigma_w * (Gaussian of variance 1/N, or Haar orthogonal),      D_l = diag phi'(h_l),      lambda = sigma^2(J)

Newman's exponents, Fuss-Catalan, exact finite-width moments, the free-probability spectrum of J J^T
at finite and infinite depth, Hanin and Nica's law of log ||J u||^2, the eigenvalues of Ginibre
products and Saxe's learning dynamics. Every entry of D is taken to be independent with the law of
phi'(sqrt(q*) z), z ~ N(0, 1): mean field, exact for linear and for ReLU networks without bias (a
sign is independent of |h|), an approximation of order 1/N else. Not covered: tied (recurrent)
weights, unequal widths in the densities, the 1/N corrections of the densities.

Densities. With w = 1/xi, A = E d^2 / (1 - d^2 w), B = E 1 / (1 - d^2 w) = 1 + M(xi), d^2 the
squared derivative and M its moment transform, S-transforms multiply to (sigma_w = 1)

    lambda = (A / B)^(L-1) / w   (orthogonal),      A^(L-1) B / w   (Gaussian),      density of log lambda = Im B / pi

on the curve in Im w > 0 where lambda is real. On the circle |w| = r, arg(1 / lambda) is theta minus
an integral of sin(theta) / (x^2 - 2 x r cos(theta) + r^2) over x > 0, whose ratio to theta falls:
the curve meets each circle once or never (Belinschi & Bercovici, IMRN 2005), lambda is monotone
along it, and one bisection per radius finds it with no branch to choose. Cost O(num * atoms * 60).
Pure JAX in the caller's dtype; what can overflow is a natural logarithm.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.scipy.special import digamma, erf, gammaln, logsumexp, polygamma, xlog1py, xlogy

from gradjax.core.activations import ACTIVATIONS

WEIGHTS = ("gaussian", "orthogonal")
CLASSES = ("bernoulli", "smooth")


def _check(
    name: str, value: Any, low: float, high: float = np.inf, *, closed: bool = True
) -> Array:
    """`value` as a floating array, refused on the host if it is outside its range; tracers pass."""
    if not isinstance(value, Tracer):
        x = np.asarray(value)
        if not np.all((x >= low if closed else x > low) & (x <= high)):
            raise ValueError(
                f"random_matrix: {name} = {value}; it must lie in {'[' if closed else '('}{low}, {high}]."
            )
    x = jnp.asarray(
        float(value) if isinstance(value, int) else value
    )  # a Python number follows the other arguments
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.result_type(float))


def _choose(name: str, value: str, options: Sequence[str]) -> None:
    if value not in options:
        raise ValueError(
            f"random_matrix: unknown {name} {value!r}; choose one of {', '.join(options)}."
        )


def _common(*values: Array) -> list[Array]:
    """The same dtype for all, the widest; weak Python numbers follow."""
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*values)
    return [x.astype(dtype) for x in values]


# ---- formula 1: products of Gaussian matrices


def newman_exponents(width: int, sigma_w: Any = 1.0) -> Array:
    """Lyapunov exponents of a product of real Ginibre matrices, variance sigma_w^2 / N, (N,)
    descending, nats.

        lambda_i = log sigma_w + 1/2 [log(2/N) + psi((N - i + 1)/2)],      i = 1 .. N = width (static)

    References:
        Newman, The distribution of Lyapunov exponents: exact results for random matrices (Commun. Math. Phys. 103,
        1986); re-derived: by rotation invariance the i-th diagonal of QR grows by an independent chi_{N-i+1}.
    """
    _check("width", width, 1)
    sigma_w = _check("sigma_w", sigma_w, 0, closed=False)
    half = jnp.arange(width, 0, -1).astype(sigma_w.dtype) / 2
    return jnp.log(sigma_w) + 0.5 * (digamma(half) - jnp.log(width / jnp.asarray(2, sigma_w.dtype)))


def newman_variance(width: int, depth: Any) -> Array:
    """Variance of each of Newman's exponents measured over `depth` layers: psi'((N - i + 1)/2) / (4
    L), (N,) nats^2.

    That of the QR growth rates, where it is exact; of log sigma_i / L it is the leading term in 1/L.
    """
    _check("width", width, 1)
    depth = _check("depth", depth, 1)
    return polygamma(1, jnp.arange(width, 0, -1).astype(depth.dtype) / 2) / (4 * depth)


def newman_limit(fraction: Any) -> Array:
    """The exponents as N grows: 1/2 log(1 - i/N) at `fraction` = i/N in [0, 1] (sigma_w = 1), nats
    per layer.
    """
    return 0.5 * jnp.log1p(-_check("fraction", fraction, 0, 1))


# ---- formulas 2 and 3: moments of linear and ReLU products with Gaussian weights


def fuss_catalan_log_moment(k: Any, depth: Any) -> Array:
    """Log of m_k = lim E tr (J J^T)^k / N of `depth` Gaussian factors of sigma_w = 1: C(Lk + k, k)
    / (Lk + 1).

    Derived: M^{-1}(z) = (1 + z)^(L+1) / z and Lagrange inversion (Penson & Zyczkowski, arXiv:1103.3453). N -> infinity:
    at L/N > 0.1 it is visibly wrong, and `log_second_moments` is exact.
    """
    k, depth = _common(_check("k", k, 0), _check("depth", depth, 0))
    return (
        gammaln((depth + 1) * k + 1)
        - gammaln(k + 1)
        - gammaln(depth * k + 1)
        - jnp.log1p(depth * k)
    )


def fuss_catalan_log_edge(depth: Any) -> Array:
    """Log of the largest lambda of `depth` Gaussian factors: (L+1)^(L+1) / L^L, where M^{-1} is
    stationary, z = 1/L.
    """
    depth = _check("depth", depth, 1)
    return jnp.log1p(depth) + depth * jnp.log1p(1 / depth)


def log_second_moments(
    depth: Any, width: Any, sigma_w: Any = 1.0, keep: Any = 1.0
) -> tuple[Array, Array]:
    """Exact second moments at finite width N: logs of E tr (J J^T)^2 / N and of E (tr J J^T)^2 /
    N^2.

    Gaussian weights, D of independent Bernoulli(keep): 1 is linear, 1/2 ReLU (He: sigma_w^2 = 2). One layer maps (a, b)
    by sigma_w^4 {keep^2 (1 - 1/N) I + keep [[2/N, 1], [2/N^2, 1/N]]}, whose second part has rank one, so

        a = [(N + 2) x^L - (N - 1) y^L] / 3,      b = [(N + 2) x^L + 2 (N - 1) y^L] / (3 N),
        y = sigma_w^4 keep^2 (1 - 1/N),           x = y + 3 sigma_w^4 keep / N,

    x = 1 + 2/N for critical linear, 1 + 5/N for He; the mean of tr J J^T / N is (keep sigma_w^2)^L. Derived: with
    M = J J^T and rows w_i of W, E (w_i M w_i)^2 = sigma_w^4 (b + 2 a / N), E (w_i M w_j)^2 = sigma_w^4 a / N; both are
    even in w_i, so independent of its unit's sign: exact for a real ReLU network. N -> infinity: a = 1 + L / keep.

    Returns:
        (log a, log b) for depth >= 0, width >= 1, sigma_w > 0, keep in (0, 1], scalars or arrays of
        one shape.
    """
    depth, n = _check("depth", depth, 0), _check("width", width, 1)
    sigma_w, keep = (
        _check("sigma_w", sigma_w, 0, closed=False),
        _check("keep", keep, 0, 1, closed=False),
    )
    depth, n, sigma_w, keep = _common(depth, n, sigma_w, keep)
    spread = 3 / (keep * (n - 1))  # x / y - 1; inf at N = 1, where y = 0
    ratio = jnp.exp(-depth * jnp.log1p(spread)) * (n - 1)
    top = depth * (4 * jnp.log(sigma_w) + jnp.log(keep) + jnp.log(keep * (1 - 1 / n) + 3 / n))
    ratio = jnp.where(n > 1, ratio, 0)
    return top + jnp.log((n + 2 - ratio) / 3), top + jnp.log((n + 2 + 2 * ratio) / (3 * n))


# ---- formula 4: the law of the squared derivative, and the moments of the spectrum


class DerivativeLaw(NamedTuple):
    """The law of phi'(sqrt(q*) z)^2 as atoms: exact for piecewise linear phi, quadrature nodes for
    the others.
    """

    values: Array  # (K,) d^2 >= 0
    probabilities: Array  # (K,) summing to 1


@functools.lru_cache
def _gauss_panels(panels: int = 20, order: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of E f(z), z ~ N(0, 1): Gauss-Legendre panels on +-10, graded towards a
    kink at 0.
    """
    x, w = np.polynomial.legendre.leggauss(order)
    edges = 10 * np.sinh(4 * np.arange(panels + 1) / panels) / np.sinh(4)
    half = np.diff(edges)[:, None] / 2
    z, w = (edges[:-1, None] + half * (1 + x)).ravel(), (half * w).ravel()
    w = w * np.exp(-(z**2) / 2)
    return np.concatenate([-z[::-1], z]), np.concatenate([w[::-1], w]) / (2 * w.sum())


def derivative_law(activation: str | Callable[[Array], Array], q_star: Any = 1.0) -> DerivativeLaw:
    """The law of phi'(h)^2, h ~ N(0, q_star).

    Args:
        activation: a name of `gradjax.core.activations`, or an elementwise function, smooth but for
          a kink at 0.
        q_star: variance of the pre-activations h, positive scalar; linear and ReLU do not depend on
          it.

    Returns:
        `DerivativeLaw`: {1, 0} with erf(1 / sqrt(2 q*)) for hard-tanh; 640 quadrature nodes for a
        smooth phi.
    """
    q = _check("q_star", q_star, 0, closed=False)
    atoms = {
        "linear": (1.0, 1.0),
        "relu": (1.0, 0.0),
        "leaky_relu": (1.0, 1e-4),
        "hard_tanh": (1.0, 0.0),
    }
    if isinstance(activation, str):
        _choose("activation", activation, tuple(ACTIVATIONS))
        if activation in atoms:
            p = {"linear": jnp.ones_like(q), "hard_tanh": erf(1 / jnp.sqrt(2 * q))}.get(
                activation, jnp.full_like(q, 0.5)
            )
            return DerivativeLaw(jnp.asarray(atoms[activation], q.dtype), jnp.stack([p, 1 - p]))
        activation = ACTIVATIONS[activation]
    z, weight = (jnp.asarray(x, q.dtype) for x in _gauss_panels())
    return DerivativeLaw(jax.vmap(jax.grad(activation))(jnp.sqrt(q) * z) ** 2, weight)


def derivative_moment(law: DerivativeLaw, k: int) -> Array:
    """mu_k = E phi'^(2k), () ; sigma_w = mu_1^(-1/2) is critical."""
    return jnp.sum(law.probabilities * law.values**k)


def relative_variance(law: DerivativeLaw, depth: Any, weights: str = "gaussian") -> Array:
    """Variance over squared mean of the eigenvalues of J J^T, N -> infinity: L (mu_2 / mu_1^2 - 1 -
    s_1), ().

    s_1 = -1 for Gaussian weights, 0 for orthogonal; the mean is (sigma_w^2 mu_1)^L. ReLU: 2 L and L. Pennington,
    Schoenholz, Ganguli, Resurrecting the sigmoid in deep learning through dynamical isometry (arXiv:1711.04735).
    """
    _choose("weights", weights, WEIGHTS)
    depth = _check("depth", depth, 0).astype(law.values.dtype)
    mu = derivative_moment(law, 1)
    spread = jnp.sum(
        law.probabilities * (law.values / mu - 1) ** 2
    )  # mu_2 / mu_1^2 - 1 without cancellation
    return depth * (spread + float(weights == "gaussian"))


# ---- formulas 4 and 5: the density of the spectrum


class ProductDensity(NamedTuple):
    """The law of lambda = sigma^2: a curve, ascending in log lambda, one atom, and what is mapped
    to zero.

    `sum(mass) + atom_mass + zero_mass` is 1; E f(lambda) is `sum(mass f(exp(log_lambda)))` + atoms, by Gauss-Legendre
    along the curve. The density of log sigma is 2 `density` at `log_lambda / 2`.
    """

    log_lambda: Array  # (num,)
    density: Array  # (num,) per unit of log lambda, the atoms left out; that of lambda is density / lambda
    mass: Array  # (num,) of the curve around each point
    log_atom: Array  # () where the atom is
    atom_mass: Array  # ()
    zero_mass: Array  # () the atom at lambda = 0
    log_lambda_max: (
        Array  # () the edge of the curve or the atom, whichever is larger; differentiable
    )


def _bisect(inside: Callable[[Array], Array], low: Array, high: Array) -> Array:
    """Where `inside` turns from False (at low) to True (at high); no derivative."""

    def halve(_, pair):
        low, high = pair
        mid = low + (high - low) / 2
        yes = inside(mid)
        return jnp.where(yes, low, mid), jnp.where(yes, mid, high)

    low, high = lax.fori_loop(0, jnp.finfo(low.dtype).nmant + 8, halve, (low, high))
    return lax.stop_gradient(low + (high - low) / 2)


def _tiny(x: Array) -> Array:
    """An angle whose Im parts keep their relative precision, far below any that matters."""
    return jnp.asarray(float(jnp.finfo(x.dtype).eps) ** 2, x.dtype)


def _angle(inverse: Callable, log_r: Array) -> Array:
    """Im log(1 / lambda) just above the real axis: negative inside the support."""
    return -inverse(lax.complex(log_r, _tiny(log_r)))[0].imag


def _trace(inverse: Callable, low: Array, high: Array, num: int) -> tuple[Array, Array, Array]:
    """(log lambda, density, mass) along the curve of radii exp(low) .. exp(high), ascending in log
    lambda.

    inverse: log w -> (log lambda, B), holomorphic. The points crowd at both ends, where a density is a square root.
    """
    x, weight = np.polynomial.legendre.leggauss(num)
    place, weight = (
        (1 - np.cos(np.pi * (1 + x) / 2)) / 2,
        weight * np.sin(np.pi * (1 + x) / 2) * np.pi / 4,
    )

    def point(place, weight):
        log_r = high - (high - low) * place
        outside = _angle(inverse, log_r) >= 0
        above = lambda theta: inverse(lax.complex(log_r, theta))[0].imag < 0
        theta = _bisect(above, _tiny(log_r), jnp.asarray(np.pi, log_r.dtype))
        slope = lambda u: jax.jvp(inverse, (u,), (jnp.ones_like(u),))
        (value, _), (k, _) = slope(lax.complex(log_r, theta))
        # one Newton step: the last digits, and the derivative by the implicit function theorem
        theta = theta - jnp.where(
            outside, 0, value.imag / jnp.where(outside, 1, lax.stop_gradient(k.real))
        )
        (value, b), (k, _) = slope(lax.complex(log_r, theta))
        density = jnp.where(outside, 0, jnp.abs(b.imag) / np.pi)
        speed = (k.real**2 + k.imag**2) / jnp.where(outside, 1, jnp.abs(k.real))
        value = jnp.where(
            outside, inverse(lax.complex(log_r, jnp.zeros_like(log_r)))[0].real, value.real
        )
        return value, density, density * speed * weight * (high - low)

    return jax.vmap(point)(jnp.asarray(place, low.dtype), jnp.asarray(weight, low.dtype))


def product_density(
    law: DerivativeLaw, depth: Any, sigma_w: Any = 1.0, weights: str = "gaussian", *, num: int = 400
) -> ProductDensity:
    """The spectrum of J J^T at finite depth, N -> infinity, for equal layers (the module's
    docstring has the equation).

    Args:
        law: of the squared derivative, `derivative_law(...)` or any atoms of one's own.
        depth: L >= 1; L >= 2 with orthogonal weights (L = 1 is sigma_w^2 `law` itself).
        sigma_w: positive scalar; weights: "gaussian" or "orthogonal"; num: points of the curve,
          static.

    Returns:
        `ProductDensity`. Orthogonal weights leave an atom of mass max(0, L p - L + 1) at (sigma_w^2 d^2)^L, p the
        probability of d^2; d^2 = 0 leaves its own probability at 0. The total is 1 to 1e-11 for piecewise linear phi
        (leaky ReLU, L = 2: 5e-5, its density has a gap); smooth phi at small L has 2e-5 in a tail of lambda -> 0 where
        the nodes of `law` show one by one. Moments are good to 1e-12.

    References:
        Pennington, Schoenholz, Ganguli, The emergence of spectral universality in deep networks
        (arXiv:1802.09979).
    """
    _choose("weights", weights, WEIGHTS)
    free = weights == "gaussian"
    dtype = law.values.dtype
    depth = _check("depth", depth, 1 if free else 2).astype(dtype)
    scale = 2 * depth * jnp.log(_check("sigma_w", sigma_w, 0, closed=False).astype(dtype))
    values, p = law.values, law.probabilities
    top = jnp.max(values)
    d, p_c = (lax.complex(x, jnp.zeros_like(x)) for x in (values / top, p))  # the largest d^2 is 1
    one = jnp.ones((), dtype)
    power = lax.complex(depth - 1, 0 * one)

    def inverse(u: Array) -> tuple[Array, Array]:
        w = jnp.exp(u)
        fraction = p_c / (1 - d * w)
        a, b = jnp.sum(d * fraction), jnp.sum(fraction)
        if free:
            return power * jnp.log(a) + jnp.log(b) - u, b
        # beside the pole w = 1 both times 1 - w; and a / b before its logarithm, as both arguments
        # may lie next to pi
        near = jnp.where(values == top, p_c, fraction * (1 - w))
        ratio = jnp.where(jnp.abs(1 - w) < 0.5, jnp.sum(d * near) / jnp.sum(near), a / b)
        return power * jnp.log(ratio) - u, b

    # The first edge lies below the first singularity of the Poisson integral: the pole r = 1, or
    # with orthogonal weights the zero of B that follows it.
    eps = jnp.finfo(dtype).eps
    order = jnp.argsort(values)
    counted = (jnp.cumsum(jnp.where(values > 0, p, 0)[order]) > eps) & (values[order] > 0)
    least = values[order][jnp.argmax(counted)] / top  # what lies below has no weight in this dtype
    reach = jnp.minimum(
        jnp.log(depth) - jnp.log(least) - 2 * jnp.log(eps), 0.45 * jnp.log(jnp.finfo(dtype).max)
    )
    second = jnp.max(jnp.where(values < top, values, 0)) / top
    stop = jnp.minimum(-jnp.log(second), reach)
    first = (
        0 * one
        if free
        else _bisect(lambda s: jnp.sum(p / (1 - values / top * jnp.exp(s))) > 0, 0 * one, stop)
    )
    low = _bisect(lambda s: _angle(inverse, s) < 0, -reach, first)
    end = jnp.minimum(-jnp.log(least), reach)
    high = jnp.maximum(_bisect(lambda s: _angle(inverse, s) >= 0, end, end + reach), low)
    scale = scale + depth * jnp.log(top)
    log_lambda, density, mass = _trace(inverse, low, jnp.minimum(high, low + reach), num)
    biggest = jnp.argmax(jnp.where(values > 0, p, 0))
    log_atom = depth * jnp.log(values[biggest] / top) + scale
    atom = 0 * one if free else jnp.maximum(0, depth * p[biggest] - depth + 1)
    zero = jnp.sum(jnp.where(values > 0, 0, p))
    edge = jnp.where(
        jnp.sum(mass) > 0, inverse(lax.complex(low, 0 * one))[0].real + scale, -jnp.inf
    )
    edge = jnp.maximum(edge, jnp.where(atom > 0, log_atom, -jnp.inf))
    return ProductDensity(log_lambda + scale, density, mass, log_atom, atom, zero, edge)


def limit_density(sigma0_squared: Any, universality: str, *, num: int = 400) -> ProductDensity:
    """The spectrum of J J^T as L grows, orthogonal weights, L (mu_2 / mu_1^2 - 1) = sigma0_squared
    held, m_1 = 1.

        bernoulli: S(z) = exp(-sigma_0^2 z / (1 + z))      hard-tanh: phi' is 0 or 1
        smooth:    S(z) = exp(-sigma_0^2 z)                erf, tanh

    Bernoulli: an atom of mass max(0, 1 - sigma_0^2) at e^{sigma_0^2}; the curve ends at e sigma_0^2 and falls as
    1 / log(lambda)^2. Smooth: lambda_max = (1 + 1/z) e^{sigma_0^2 z}, z = (sqrt(1 + 4 / sigma_0^2) - 1) / 2. Derived:
    the limit of [p (1 + z) / (z + p)]^L with 1/p - 1 = sigma_0^2 / L, and log S = -sigma_0^2 z + O(1/L). (Pennington,
    Schoenholz, Ganguli, arXiv:1802.09979.)
    """
    _choose("universality class", universality, CLASSES)
    s2 = _check("sigma0_squared", sigma0_squared, 0, closed=False)
    smooth, zero = universality == "smooth", jnp.zeros_like(s2)
    s2_c = lax.complex(s2, zero)

    def inverse(u: Array) -> tuple[Array, Array]:
        zeta = jnp.exp(u)  # m / (1 + m)
        b = 1 / (1 - zeta)
        return s2_c * (zeta * b if smooth else zeta) - u, b

    reach = -jnp.log(jnp.finfo(s2.dtype).eps)
    low = lax.stop_gradient(-2 * jnp.arcsinh(jnp.sqrt(s2) / 2) if smooth else -jnp.log(s2))
    log_lambda, density, mass = _trace(inverse, low, -low if smooth else low + reach, num)
    atom = zero if smooth else jnp.maximum(0, 1 - s2)
    edge = inverse(lax.complex(low, zero))[0].real
    return ProductDensity(
        log_lambda, density, mass, s2, atom, zero, jnp.where(atom > 0, jnp.maximum(edge, s2), edge)
    )


# ---- formula 8: the norm of one direction


class NormMoments(NamedTuple):
    """Of ||J u||^2 for a fixed unit u, sigma_w^2 keep = 1; one layer multiplies it by chi^2_K /
    (keep n).
    """

    mean: Array  # of log ||J u||^2, given that it is not zero, nats
    variance: Array  # the same, nats^2
    log_fourth: Array  # log E ||J u||^4 = sum log(1 + (3 / keep - 1) / n)
    beta: Array  # sum (3 / keep - 1) / n: the Gaussian limit is N(-beta/2, beta)
    log_survival: Array  # log of the probability that J u is not zero


def norm_moments(widths: Sequence[int], keep: Any = 0.5) -> NormMoments:
    """The exact law of log ||J u||^2 in a ReLU (keep = 1/2) or linear (keep = 1) network of
    Gaussian weights.

    Layers are independent: ||J_l u||^2 = chi^2_K / (keep n_l), K ~ Bin(n_l, keep) the live units, so given K > 0 the
    mean is E [psi(K/2) + log 2 - log(keep n)], the variance E psi'(K/2) + Var psi(K/2). Derived: a row's sign is
    independent of its length along u.

    Args:
        widths: n_1 .. n_L, the layers' outputs, static integers; keep: in (0, 1], scalar.

    References:
        Hanin & Nica, Products of many large random matrices and gradients in deep neural networks (arXiv:1812.05994):
        beta = 5 sum 1/n; Hanin (arXiv:1801.03744): E ||J u||^4 grows with the same sum.
    """
    _check("widths", widths, 1)
    keep = _check("keep", keep, 0, 1, closed=False)
    sizes, counts = np.unique(np.asarray(widths, int), return_counts=True)
    n = jnp.asarray(sizes, keep.dtype)[:, None]
    k = jnp.arange(1, sizes.max() + 1, dtype=keep.dtype)[None, :]
    rest = jnp.maximum(n - k, 0)
    log_p = (
        gammaln(n + 1) - gammaln(k + 1) - gammaln(rest + 1) + xlogy(k, keep) + xlog1py(rest, -keep)
    )
    log_p = jnp.where(k <= n, log_p, -jnp.inf)
    survival = logsumexp(log_p, axis=1, keepdims=True)
    p = jnp.exp(log_p - survival)
    psi = digamma(k / 2) - jnp.log(keep * n / 2)
    mean = jnp.sum(p * psi, axis=1, keepdims=True)
    variance = jnp.sum(p * (polygamma(1, k / 2) + (psi - mean) ** 2), axis=1)
    excess = (3 / keep - 1) / n[:, 0]
    total = lambda x: jnp.sum(jnp.asarray(counts, keep.dtype) * x)
    return NormMoments(
        total(mean[:, 0]),
        total(variance),
        total(jnp.log1p(excess)),
        total(excess),
        total(survival[:, 0]),
    )


# ---- formula 11: eigenvalues of products, and learning dynamics


def ginibre_product_cdf(radius: Any, num_factors: Any) -> Array:
    """P(|z| < radius) for the eigenvalues z of a product of k Gaussian factors, sigma_w = 1, N ->
    infinity: r^(2/k).

    Derived: free circular products are R-diagonal, 1 / r^2 = S(F - 1) = F^-k (Haagerup & Larsen 2000, thm 4.4). Saxe et
    al. (arXiv:1312.6120), fig. 6C: an origin bin of area 0.01 holds (0.01 / pi)^(1/k), 32% of 5 and 94% of 100 factors.
    """
    radius, k = _common(_check("radius", radius, 0), _check("num_factors", num_factors, 1))
    return jnp.minimum(radius, 1) ** (2 / k)


def _logit_time(y: Array, y0: Array, gamma: Array) -> Array:
    """Integral of (1 + e^-x)^gamma over y0 .. y, by 96 nodes of Gauss and Legendre."""
    x, w = np.polynomial.legendre.leggauss(96)
    x, w = jnp.asarray((1 + x) / 2, y.dtype), jnp.asarray(w / 2, y.dtype)
    return (y - y0) * jnp.sum(w * jnp.exp(gamma * jnp.logaddexp(0, -(y0 + (y - y0) * x))))


def saxe_mode(t: Any, s: Any, u0: Any, num_layers: Any = 3, tau: Any = 1.0) -> Array:
    """Strength u(t) of one mode of a deep linear network under gradient descent from aligned,
    balanced weights.

        tau du/dt = (N_l - 1) u^{2 - 2/(N_l - 1)} (s - u),      u(0) = u0

    In y = log(u / (s - u)), tau dy/dt = (N_l - 1) s u^{1 - 2/(N_l - 1)}, linear for N_l = 3 (one hidden layer), where
    u = s e^{2st/tau} / (e^{2st/tau} - 1 + s/u0): t(u) is one quadrature, u(t) one bisection, no time stepping.

    Args:
        t: times >= 0, scalar or array; s: target, u0: start, 0 < u0 < s, scalars; num_layers: N_l >= 2 layers of units,
            N_l - 1 weight matrices; tau: 1 / learning rate, positive.

    Returns:
        u, the shape of t.

    References:
        Saxe, McClelland, Ganguli, Exact solutions to the nonlinear dynamics of learning
        (arXiv:1312.6120).
    """
    t, s, layers = (
        _check("t", t, 0),
        _check("s", s, 0, closed=False),
        _check("num_layers", num_layers, 2),
    )
    most = np.inf if isinstance(s, Tracer) else float(s)
    u0, tau = _check("u0", u0, 0, most, closed=False), _check("tau", tau, 0, closed=False)
    t, s, u0, layers, tau = _common(t, s, u0, layers, tau)
    gamma = 1 - 2 / (layers - 1)
    y0 = jnp.log(u0) - jnp.log(s - u0)
    full = -jnp.log(jnp.finfo(t.dtype).eps) + 4  # u = s in this dtype

    def one(t):
        target = t * (layers - 1) * s ** (1 + gamma) / tau
        y = _bisect(lambda y: _logit_time(y, y0, gamma) > target, y0, jnp.maximum(y0 + 1, full))
        y = y - (_logit_time(y, y0, gamma) - target) * lax.stop_gradient(
            jnp.exp(-gamma * jnp.logaddexp(0, -y))
        )
        return s * jax.nn.sigmoid(y)

    return jax.vmap(one)(t.ravel()).reshape(t.shape)
