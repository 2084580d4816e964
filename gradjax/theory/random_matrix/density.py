"""The law of the squared derivative, and the density of the spectrum of J J^T that follows from it.

With w = 1/xi, A = E d^2 / (1 - d^2 w), B = E 1 / (1 - d^2 w) = 1 + M(xi), d^2 the squared
derivative and M its moment transform, S-transforms multiply to (sigma_w = 1)

    lambda = (A / B)^(L-1) / w   (orthogonal),      A^(L-1) B / w   (Gaussian),
    density of log lambda = Im B / pi

on the curve in Im w > 0 where lambda is real. On the circle |w| = r, arg(1 / lambda) is theta minus
an integral of sin(theta) / (x^2 - 2 x r cos(theta) + r^2) over x > 0, whose ratio to theta falls:
the curve meets each circle once or never (Belinschi & Bercovici, IMRN 2005), lambda is monotone
along it, and one bisection per radius finds it with no branch to choose. Cost:
O(num * atoms * 60).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.scipy.special import erf

from gradjax.core.activations import ACTIVATIONS, Phi, resolve
from gradjax.theory.gaussian import density as gaussian_density
from gradjax.theory.gaussian import derivative, graded_nodes
from gradjax.theory.random_matrix.checks import WEIGHTS, choose, within

CLASSES = ("bernoulli", "smooth")

# Quadrature of a smooth law: nodes on either side of 0, up to |z| = 10.
_ARM_NODES, _REACH = 320, 10.0


# Formula 4: the law of the squared derivative, and the moments of the spectrum


class DerivativeLaw(NamedTuple):
    """The law of phi'(sqrt(q*) z)^2 as atoms.

    Exact for piecewise linear phi; quadrature nodes for the others.
    """

    values: Array  # (K,) d^2 >= 0
    probabilities: Array  # (K,) summing to 1


def derivative_law(activation: str | Phi, q_star: Any = 1.0) -> DerivativeLaw:
    """The law of phi'(h)^2, h ~ N(0, q_star).

    Args:
      activation: a name of `gradjax.core.activations`, or an elementwise function, smooth except
        for a kink at 0.
      q_star: () positive, variance of the pre-activations h; activations with one slope on either
        side of 0 do not depend on it.

    Returns:
      `DerivativeLaw`: two atoms for piecewise linear phi, {1, 0} with probability
      erf(1 / sqrt(2 q*)) of 1 for hard-tanh; 640 quadrature nodes for the other names.
    """
    q = within("q_star", q_star, 0, closed=False)
    if isinstance(activation, str):
        choose("activation", activation, tuple(ACTIVATIONS))
    act = resolve(activation)
    if activation == "hard_tanh":
        p = erf(1 / jnp.sqrt(2 * q))
        return DerivativeLaw(jnp.asarray([1.0, 0.0], q.dtype), jnp.stack([p, 1 - p]))
    if act.slopes:
        left, right = act.slopes
        p = jnp.full_like(q, 1.0 if left == right else 0.5)
        return DerivativeLaw(jnp.asarray([right**2, left**2], q.dtype), jnp.stack([p, 1 - p]))
    s = jnp.sqrt(q)
    z, weight = graded_nodes(
        jnp.zeros((1,), q.dtype), jnp.minimum(1 / s, 1.0), -_REACH, _REACH, _ARM_NODES
    )
    weight = weight * gaussian_density(z)
    return DerivativeLaw(jnp.square(derivative(act.phi)(s * z)), weight / jnp.sum(weight))


def derivative_moment(law: DerivativeLaw, k: int) -> Array:
    """mu_k = E phi'^(2k), (); sigma_w = mu_1^(-1/2) is critical."""
    return jnp.sum(law.probabilities * law.values**k)


def relative_variance(law: DerivativeLaw, depth: Any, weights: str = "gaussian") -> Array:
    """Variance over squared mean of the eigenvalues of J J^T, N -> infinity.

        L (mu_2 / mu_1^2 - 1 - s_1),      s_1 = -1 for Gaussian weights, 0 for orthogonal ones

    The mean is (sigma_w^2 mu_1)^L. ReLU has 2 L and L.

    References:
      Pennington, Schoenholz, Ganguli, Resurrecting the sigmoid in deep learning through dynamical
      isometry (arXiv:1711.04735).
    """
    choose("weights", weights, WEIGHTS)
    depth = within("depth", depth, 0).astype(law.values.dtype)
    mu = derivative_moment(law, 1)
    # mu_2 / mu_1^2 - 1 without cancellation
    spread = jnp.sum(law.probabilities * (law.values / mu - 1) ** 2)
    return depth * (spread + float(weights == "gaussian"))


# Formulas 4 and 5: the density of the spectrum


class ProductDensity(NamedTuple):
    """The law of lambda = sigma^2: a curve, ascending in log lambda, one atom, and a mass at zero.

    `sum(mass) + atom_mass + zero_mass` is 1; E f(lambda) is `sum(mass f(exp(log_lambda)))` plus the
    atoms, by Gauss-Legendre along the curve. The density of log sigma is 2 `density` at
    `log_lambda / 2`.
    """

    log_lambda: Array  # (num,)
    density: Array  # (num,) per unit of log lambda, without atoms; that of lambda: density / lambda
    mass: Array  # (num,) of the curve around each point
    log_atom: Array  # () where the atom is
    atom_mass: Array  # ()
    zero_mass: Array  # () the atom at lambda = 0
    log_lambda_max: Array  # () the larger of the curve's edge and the atom; differentiable


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
    """(log lambda, density, mass) along the curve of radii exp(low) .. exp(high).

    Args:
      inverse: log w -> (log lambda, B), holomorphic.
      low: log of the smallest radius, where log lambda is largest.
      high: log of the largest radius.
      num: points, which crowd at both ends, where a density is a square root.

    Returns:
      Three arrays (num,), ascending in log lambda.
    """
    x, weight = np.polynomial.legendre.leggauss(num)
    place = (1 - np.cos(np.pi * (1 + x) / 2)) / 2
    weight = weight * np.sin(np.pi * (1 + x) / 2) * np.pi / 4

    def point(place, weight):
        log_r = high - (high - low) * place
        outside = _angle(inverse, log_r) >= 0

        def above(theta):
            return inverse(lax.complex(log_r, theta))[0].imag < 0

        def with_slope(u):
            return jax.jvp(inverse, (u,), (jnp.ones_like(u),))

        theta = _bisect(above, _tiny(log_r), jnp.asarray(np.pi, log_r.dtype))
        (value, _), (k, _) = with_slope(lax.complex(log_r, theta))
        # one Newton step: the last digits, and the derivative by the implicit function theorem
        step = value.imag / jnp.where(outside, 1, lax.stop_gradient(k.real))
        theta = theta - jnp.where(outside, 0, step)
        (value, b), (k, _) = with_slope(lax.complex(log_r, theta))
        density = jnp.where(outside, 0, jnp.abs(b.imag) / np.pi)
        speed = (k.real**2 + k.imag**2) / jnp.where(outside, 1, jnp.abs(k.real))
        on_the_axis = inverse(lax.complex(log_r, jnp.zeros_like(log_r)))[0].real
        value = jnp.where(outside, on_the_axis, value.real)
        return value, density, density * speed * weight * (high - low)

    return jax.vmap(point)(jnp.asarray(place, low.dtype), jnp.asarray(weight, low.dtype))


def _product_inverse(law: DerivativeLaw, depth: Array, free: bool) -> Callable:
    """log w -> (log lambda, B) for sigma_w = 1 and the largest d^2 scaled to 1.

    `free` says that the weights are Gaussian.
    """
    values, p = law
    top = jnp.max(values)
    d, p_c = (lax.complex(x, jnp.zeros_like(x)) for x in (values / top, p))
    power = lax.complex(depth - 1, jnp.zeros_like(depth))

    def inverse(u: Array) -> tuple[Array, Array]:
        w = jnp.exp(u)
        terms = p_c / (1 - d * w)
        a, b = jnp.sum(d * terms), jnp.sum(terms)
        if free:
            return power * jnp.log(a) + jnp.log(b) - u, b
        # Beside the pole w = 1 both sums are taken times 1 - w. The ratio comes before its
        # logarithm, because the arguments of a and of b may both lie next to pi.
        near = jnp.where(values == top, p_c, terms * (1 - w))
        ratio = jnp.where(jnp.abs(1 - w) < 0.5, jnp.sum(d * near) / jnp.sum(near), a / b)
        return power * jnp.log(ratio) - u, b

    return inverse


def _product_radii(
    law: DerivativeLaw, depth: Array, free: bool, inverse: Callable
) -> tuple[Array, Array]:
    """Logs of the radii between which the curve runs.

    The first edge lies below the first singularity of the Poisson integral: the pole r = 1, or with
    orthogonal weights the zero of B that follows it.
    """
    values, p = law
    top = jnp.max(values)
    dtype = values.dtype
    zero, eps = jnp.zeros((), dtype), jnp.finfo(dtype).eps
    order = jnp.argsort(values)
    counted = (jnp.cumsum(jnp.where(values > 0, p, 0)[order]) > eps) & (values[order] > 0)
    # The smallest d^2 whose cumulative probability counts in this dtype.
    least = values[order][jnp.argmax(counted)] / top
    reach = jnp.minimum(
        jnp.log(depth) - jnp.log(least) - 2 * jnp.log(eps), 0.45 * jnp.log(jnp.finfo(dtype).max)
    )
    first = zero
    if not free:
        second = jnp.max(jnp.where(values < top, values, 0)) / top
        stop = jnp.minimum(-jnp.log(second), reach)
        first = _bisect(lambda s: jnp.sum(p / (1 - values / top * jnp.exp(s))) > 0, zero, stop)
    low = _bisect(lambda s: _angle(inverse, s) < 0, -reach, first)
    end = jnp.minimum(-jnp.log(least), reach)
    high = jnp.maximum(_bisect(lambda s: _angle(inverse, s) >= 0, end, end + reach), low)
    return low, jnp.minimum(high, low + reach)


def product_density(
    law: DerivativeLaw, depth: Any, sigma_w: Any = 1.0, weights: str = "gaussian", *, num: int = 400
) -> ProductDensity:
    """The spectrum of J J^T at finite depth, N -> infinity, for equal layers (see the module).

    Args:
      law: of the squared derivative, `derivative_law(...)` or any atoms.
      depth: L >= 1; L >= 2 with orthogonal weights (L = 1 is sigma_w^2 `law` itself).
      sigma_w: () positive.
      weights: "gaussian" or "orthogonal".
      num: points of the curve, static.

    Returns:
      `ProductDensity`. Orthogonal weights leave an atom of mass max(0, L p - L + 1) at
      (sigma_w^2 d^2)^L, p the probability of d^2; d^2 = 0 leaves its own probability at 0. The
      total is 1 to 1e-11 for piecewise linear phi (leaky ReLU, L = 2: 5e-5, because its density has
      a gap). Smooth phi at small L has 2e-5 in a tail of lambda -> 0, where the nodes of `law`
      become visible one by one (SELU at L = 2: 7e-3). Moments are accurate to 1e-12.

    References:
      Pennington, Schoenholz, Ganguli, The emergence of spectral universality in deep networks
      (arXiv:1802.09979).
    """
    choose("weights", weights, WEIGHTS)
    free = weights == "gaussian"
    values, p = law
    depth = within("depth", depth, 1 if free else 2).astype(values.dtype)
    sigma_w = within("sigma_w", sigma_w, 0, closed=False).astype(values.dtype)
    zero = jnp.zeros((), values.dtype)
    inverse = _product_inverse(law, depth, free)
    low, high = _product_radii(law, depth, free, inverse)
    log_lambda, density, mass = _trace(inverse, low, high, num)

    top = jnp.max(values)
    scale = depth * (2 * jnp.log(sigma_w) + jnp.log(top))
    biggest = jnp.argmax(jnp.where(values > 0, p, 0))
    log_atom = depth * jnp.log(values[biggest] / top) + scale
    atom = zero if free else jnp.maximum(0, depth * p[biggest] - depth + 1)
    edge = inverse(lax.complex(low, zero))[0].real + scale
    edge = jnp.where(jnp.sum(mass) > 0, edge, -jnp.inf)
    return ProductDensity(
        log_lambda=log_lambda + scale,
        density=density,
        mass=mass,
        log_atom=log_atom,
        atom_mass=atom,
        zero_mass=jnp.sum(jnp.where(values > 0, 0, p)),
        log_lambda_max=jnp.maximum(edge, jnp.where(atom > 0, log_atom, -jnp.inf)),
    )


def limit_density(sigma0_squared: Any, universality: str, *, num: int = 400) -> ProductDensity:
    """The spectrum of J J^T as L grows at fixed sigma_0^2, with orthogonal weights and m_1 = 1.

        sigma_0^2 = L (mu_2 / mu_1^2 - 1)
        bernoulli: S(z) = exp(-sigma_0^2 z / (1 + z))      hard-tanh: phi' is 0 or 1
        smooth:    S(z) = exp(-sigma_0^2 z)                erf, tanh

    Bernoulli: an atom of mass max(0, 1 - sigma_0^2) at e^{sigma_0^2}; the curve ends at e sigma_0^2
    and falls as 1 / log(lambda)^2. Smooth: lambda_max = (1 + 1/z) e^{sigma_0^2 z},
    z = (sqrt(1 + 4 / sigma_0^2) - 1) / 2. Derived as the limit of [p (1 + z) / (z + p)]^L with
    1/p - 1 = sigma_0^2 / L, and from log S = -sigma_0^2 z + O(1/L).

    Args:
      sigma0_squared: () positive.
      universality: "bernoulli" or "smooth".
      num: points of the curve, static.

    References:
      Pennington, Schoenholz, Ganguli (arXiv:1802.09979).
    """
    choose("universality class", universality, CLASSES)
    s2 = within("sigma0_squared", sigma0_squared, 0, closed=False)
    smooth, zero = universality == "smooth", jnp.zeros_like(s2)
    s2_c = lax.complex(s2, zero)

    def inverse(u: Array) -> tuple[Array, Array]:
        zeta = jnp.exp(u)  # m / (1 + m)
        b = 1 / (1 - zeta)
        return s2_c * (zeta * b if smooth else zeta) - u, b

    if smooth:
        low = lax.stop_gradient(-2 * jnp.arcsinh(jnp.sqrt(s2) / 2))
        high, atom = -low, zero
    else:
        low = lax.stop_gradient(-jnp.log(s2))
        high, atom = low - jnp.log(jnp.finfo(s2.dtype).eps), jnp.maximum(0, 1 - s2)
    log_lambda, density, mass = _trace(inverse, low, high, num)
    edge = inverse(lax.complex(low, zero))[0].real
    edge = jnp.where(atom > 0, jnp.maximum(edge, s2), edge)
    return ProductDensity(log_lambda, density, mass, s2, atom, zero, edge)
