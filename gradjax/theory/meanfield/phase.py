"""Length, correlation and gradient maps of plain networks, fixed points, and the phase diagram."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gradjax.core.activations import Activation, resolve
from gradjax.theory.gaussian import (
    derivative,
    gaussian_mean,
    phi_pair,
    secant,
    second_moment,
    slope_moment,
    slope_pair,
    smallest,
)
from gradjax.theory.meanfield.roots import (
    LARGEST,
    LENGTHS,
    Name,
    Number,
    elementwise,
    evaluate,
    limit,
    root_between,
)


class Point(NamedTuple):
    """A network at its fixed length, as the formulas need it."""

    q: Array  # q*, inf and NaN included
    at: Array  # q* cut off at LARGEST, where moments are taken
    s2: Array  # sigma_w^2 / (1 - dropout), divided by the length before a LayerNorm
    b2: Array  # sigma_b^2, divided by the length before a LayerNorm
    keep: Array  # 1 - dropout


def point_of(act: Activation, layernorm: bool, sigma_w, sigma_b, dropout, q0) -> Point:
    """The fixed-point length as seen by phi, with the weights and biases in its units."""
    keep = 1.0 - dropout
    s2, b2 = jnp.square(sigma_w) / keep, jnp.square(sigma_b)
    if layernorm:
        one = jnp.ones_like(q0)
        before = s2 * second_moment(act, one) + b2
        return Point(one, one, s2 / before, b2 / before, keep)
    if act.slopes:
        gain = s2 * second_moment(act, jnp.ones_like(q0))
        critical = jnp.abs(gain - 1.0) <= 8 * jnp.finfo(q0.dtype).eps
        bounded = (gain < 1) & ~critical
        q = jnp.where(
            bounded,
            b2 / jnp.where(bounded, 1.0 - gain, 1.0),
            jnp.where(critical & (b2 == 0), q0, jnp.inf),
        )
        q = jnp.where(q > LARGEST, jnp.inf, q)
    else:
        q = limit(lambda q: s2 * second_moment(act, q) + b2, q0)
    return Point(q, jnp.minimum(q, LARGEST), s2, b2, keep)


def _chi_1(act, point: Point) -> Array:
    return point.s2 * slope_moment(act, point.at)


def _p_star(act: Activation, point: Point) -> Array:
    """1 - c*, 0 where c = 1 is stable.

    It is the root p of 1 - keep S(p) - dropout s2 E phi^2 / (q p), S = s2 * secant. S is convex and
    falls from chi_1 at p = 0, so there is one root when chi_1 > 1 or the masks differ; the form has
    no double root at criticality.
    """
    q, s2, keep = point.at, point.s2, point.keep
    chi = _chi_1(act, point)
    if act.slopes:
        # S <= chi_1, and chi_1 <= 1 wherever q* is finite.
        splits = (keep < 1) & jnp.isfinite(point.q)
    else:
        splits = ((chi > 1) | (keep < 1)) & jnp.isfinite(point.q) & (point.q > 0)
    q = jnp.where(splits, q, 1.0)
    second = s2 * second_moment(act, q) / q

    def chord(p):
        if act.slopes:
            return (second_moment(act, q) - phi_pair(act, q, 1.0 - p)) / (q * p)
        return secant(act, q, p)

    if act.slopes:
        mean_square = second_moment(act, q) - q * chord(jnp.ones_like(q))
    else:
        mean_square = jnp.square(gaussian_mean(act.phi, q, act.kinks))

    def f(p):
        return jnp.where(splits, 1.0 - keep * s2 * chord(p) - (1.0 - keep) * second / p, p - 1.0)

    low = (1.0 - keep) * second
    f_low = jnp.where(keep < 1, -keep * chi, 1.0 - chi)
    f_high = 1.0 - second + keep * s2 * mean_square / q
    p = root_between(f, low, jnp.ones_like(q), f_low, jnp.where(splits, f_high, 0.0))
    return jnp.where(jnp.isnan(point.q), jnp.nan, jnp.where(splits, p, 0.0))


class DepthScales(NamedTuple):
    """Layers over which a perturbation decays by e; xi_grad is negative where gradients explode."""

    xi_q: Array
    xi_c: Array
    xi_grad: Array


class PhaseDiagram(NamedTuple):
    """Arrays of the shape of the broadcast sigma_w, sigma_b.

    The last two are None without `correlations`.
    """

    q_star: Array
    chi_1: Array
    xi_q: Array
    xi_grad: Array
    c_star: Array | None
    xi_c: Array | None


def _scale(chi: Array) -> Array:
    return jnp.where(chi == 1, jnp.inf, -1.0 / jnp.log(jnp.where(chi == 1, 0.5, chi)))


def _xi_q(act, layernorm, point: Point) -> Array:
    if layernorm:
        return jnp.zeros_like(point.q)
    slope = derivative(lambda q: point.s2 * second_moment(act, q))(point.at)
    return jnp.where(jnp.isinf(point.q), jnp.inf, _scale(jnp.abs(slope)))


def _xi_c(act, point: Point, p: Array) -> Array:
    """-1 / log of the slope of the correlation map at c*.

    inf without a limit of lengths, where c -> 1 is algebraic.
    """
    c = 1.0 - jnp.where(p == 0, 0.5, p)
    slope_apart = point.keep * point.s2 * slope_pair(act, point.at, c, split=True)
    chi = jnp.where(p == 0, _chi_1(act, point), slope_apart)
    return jnp.where(jnp.isinf(point.q), jnp.inf, _scale(chi))


def _length_map(act, layernorm, sigma_w, sigma_b, dropout, q0, q):
    seen = jnp.ones_like(q) if layernorm else q
    return jnp.square(sigma_w) / (1.0 - dropout) * second_moment(act, seen) + jnp.square(sigma_b)


def length_map(
    q: Number, sigma_w: Number, sigma_b: Number = 0.0, activation: Name = "tanh", **network
) -> Array:
    """Length of the next layer (Poole 2016).

    q' = sigma_w^2 E phi(sqrt(q) z)^2 / (1 - dropout) + sigma_b^2
    """
    return evaluate(_length_map, sigma_w, sigma_b, activation, {"q": q}, **network)


def _q_star(act, layernorm, *numbers):
    return point_of(act, layernorm, *numbers).q


def q_star(sigma_w: Number, sigma_b: Number = 0.0, activation: Name = "tanh", **network) -> Array:
    """Limit q* of the length map from q0; inf where there is none, NaN where it was not found.

    >>> round(float(q_star(2.0, 0.05**0.5)), 3)
    2.195
    """
    return evaluate(_q_star, sigma_w, sigma_b, activation, **network)


def _correlation_map(act, layernorm, sigma_w, sigma_b, dropout, q0, c):
    point = point_of(act, layernorm, sigma_w, sigma_b, dropout, q0)
    length = point.s2 * second_moment(act, point.at) + point.b2
    return (point.keep * point.s2 * phi_pair(act, point.at, c) + point.b2) / length


def correlation_map(
    c: Number, sigma_w: Number, sigma_b: Number = 0.0, activation: Name = "tanh", **network
) -> Array:
    """Correlation of two inputs one layer on, at the length q* (Poole 2016; see the package)."""
    return evaluate(_correlation_map, sigma_w, sigma_b, activation, {"c": c}, **network)


def _c_star(act, layernorm, *numbers):
    return 1.0 - _p_star(act, point_of(act, layernorm, *numbers))


def c_star(sigma_w: Number, sigma_b: Number = 0.0, activation: Name = "tanh", **network) -> Array:
    """Stable fixed point c* of the correlation map in [0, 1].

    1 where chi_1 <= 1 and nothing is dropped.
    """
    return evaluate(_c_star, sigma_w, sigma_b, activation, **network)


def _chi(k, act, layernorm, *numbers):
    point = point_of(act, layernorm, *numbers)
    if k == 1:
        return _chi_1(act, point)
    slope = derivative(act.phi)
    bend = derivative(slope)
    value = point.s2 * gaussian_mean(lambda x: jnp.square(bend(x)), point.at, act.kinks)
    if not act.kinks:
        return value
    kinks, step = jnp.asarray(act.kinks, point.at.dtype), 1e-3
    jumps = jnp.abs(slope(kinks + step) - slope(kinks - step)) > 10 * step
    return jnp.where(jnp.any(jumps), jnp.inf, value)


_chi_first, _chi_second = functools.partial(_chi, 1), functools.partial(_chi, 2)


def chi_1(sigma_w: Number, sigma_b: Number = 0.0, activation: Name = "tanh", **network) -> Array:
    """Mean squared singular value of a layer's Jacobian, chi_1 = sigma_w^2 E phi'(sqrt(q*) z)^2.

    Also the slope of the correlation map at c = 1. Divided by the squared length before a
    LayerNorm, by 1 - dropout with dropout (Schoenholz 2017).
    """
    return evaluate(_chi_first, sigma_w, sigma_b, activation, **network)


def chi_2(sigma_w: Number, sigma_b: Number = 0.0, activation: Name = "tanh", **network) -> Array:
    """chi_2 = sigma_w^2 E phi''(sqrt(q*) z)^2 (Poole 2016); inf where phi' jumps."""
    return evaluate(_chi_second, sigma_w, sigma_b, activation, **network)


def curvature_map(
    kappa2: Number, sigma_w: Number, sigma_b: Number = 0.0, activation: Name = "tanh", **network
) -> Array:
    """Squared extrinsic curvature of a curve of inputs one layer on.

        kappa'^2 = 3 chi_2 / chi_1^2 + kappa^2 / chi_1

    A circle of radius r starts from kappa^2 = 1 / r^2.

    References: Poole et al. 2016 (arXiv 1606.05340).
    """
    first = chi_1(sigma_w, sigma_b, activation, **network)
    second = chi_2(sigma_w, sigma_b, activation, **network)
    return 3 * second / jnp.square(first) + jnp.asarray(kappa2, first.dtype) / first


def _depth_scales(act, layernorm, *numbers):
    point = point_of(act, layernorm, *numbers)
    xi_c = _xi_c(act, point, _p_star(act, point))
    return DepthScales(_xi_q(act, layernorm, point), xi_c, _scale(_chi_1(act, point)))


def depth_scales(
    sigma_w: Number, sigma_b: Number = 0.0, activation: Name = "tanh", **network
) -> DepthScales:
    """Depth scales in layers.

    Lengths approach their limit as exp(-l / xi_q), correlations as exp(-l / xi_c), squared
    gradients change as exp(-l / xi_grad):

        1/xi_q = -log |dq'/dq| = -log |chi_1 + sigma_w^2 E phi'' phi|
        1/xi_c = -log sigma_w^2 E phi'(u_1) phi'(u_2) at c*
        1/xi_grad = -log chi_1

    References: Schoenholz et al. 2017 (arXiv 1611.01232).
    """
    return evaluate(_depth_scales, sigma_w, sigma_b, activation, **network)


def _diagram(correlations, act, layernorm, *numbers):
    point = point_of(act, layernorm, *numbers)
    p = _p_star(act, point) if correlations else None
    return PhaseDiagram(
        q_star=point.q,
        chi_1=_chi_1(act, point),
        xi_q=_xi_q(act, layernorm, point),
        xi_grad=_scale(_chi_1(act, point)),
        c_star=None if p is None else 1.0 - p,
        xi_c=None if p is None else _xi_c(act, point, p),
    )


_DIAGRAM = {flag: functools.partial(_diagram, flag) for flag in (False, True)}


def phase_diagram(
    sigma_w: Number,
    sigma_b: Number,
    activation: Name = "tanh",
    *,
    correlations: bool = True,
    **network,
) -> PhaseDiagram:
    """Length, gradient and correlation at every point of arrays that broadcast.

    For instance sigma_w[:, None] and sigma_b[None, :]. c* and xi_c take nearly all of the time;
    `correlations=False` leaves them out.
    """
    return evaluate(_DIAGRAM[bool(correlations)], sigma_w, sigma_b, activation, **network)


def _critical(act, layernorm, sigma_b, dropout):
    keep, b2 = 1.0 - dropout, jnp.square(sigma_b)
    one = jnp.ones_like(b2)
    if layernorm:
        # chi_1 = s2 mu_1(1) / (s2 E phi(z)^2 + sigma_b^2)
        return jnp.sqrt(keep * b2 / (slope_moment(act, one) - second_moment(act, one)))
    if act.slopes:
        return jnp.sqrt(keep / slope_moment(act, one))
    tiny, eps = smallest(b2.dtype), float(jnp.finfo(b2.dtype).eps)

    def ratio(q):
        return second_moment(act, q) / (slope_moment(act, q) * (q + tiny))

    grid = jnp.asarray(LENGTHS[1:], b2.dtype)
    excess = jax.vmap(ratio)(grid) - 1.0 + b2 / grid
    below = excess <= 32 * eps
    index = jnp.argmax(below)
    # The critical point lies at the origin where sigma_b = 0 and phi(0) = 0.
    origin = below[0]
    found = jnp.any(below) & ~origin

    def safe(x, instead):
        return jnp.where(found, x, instead)

    def f(q):
        return jnp.where(found, ratio(q) - 1.0 + b2 / (q + tiny), q - 1.0)

    before = jnp.maximum(index - 1, 0)
    q = root_between(
        f,
        safe(grid[before], 0.5),
        safe(grid[index], 1.0),
        safe(excess[before], -0.5),
        safe(excess[index], 0.0),
    )
    q = jnp.where(found, q, jnp.where(origin, 0.0, jnp.nan))
    return jnp.sqrt(keep / slope_moment(act, q))


def critical_sigma_w(
    sigma_b: Number,
    activation: Name = "tanh",
    *,
    dropout: Number = 0.0,
    layernorm: bool = False,
    kinks=None,
) -> Array:
    """The sigma_w at which chi_1 = 1 for a given sigma_b: the edge of chaos.

    The one of the smallest q* if there are several; NaN where there is none up to q* = 1e8. ReLU
    has sqrt(2) for every sigma_b, though q* is finite only at sigma_b = 0.

    >>> round(float(critical_sigma_w(0.05**0.5)) ** 2, 4)   # Schoenholz 2017
    1.761
    """
    static = (resolve(activation, kinks), bool(layernorm))
    return elementwise(_critical, static, sigma_b=sigma_b, dropout=dropout)


def _critical_line(act, q):
    s2 = 1.0 / slope_moment(act, q)
    return jnp.sqrt(s2), jnp.sqrt(q - s2 * second_moment(act, q))


def critical_line(q: Number, activation: Name = "tanh", *, kinks=None) -> tuple[Array, Array]:
    """(sigma_w, sigma_b) of the critical network whose length is q, without a search for a root.

    sigma_b is NaN where no critical network has that length.
    """
    return elementwise(_critical_line, (resolve(activation, kinks),), q=q)


def _gradient_correlation(act, c, q):
    return slope_pair(act, q, c) / slope_moment(act, q)


def gradient_correlation(
    c: Number,
    q: Number = 1.0,
    activation: Name = "relu",
    *,
    branch: Number | None = None,
    kinks=None,
) -> Array:
    """Factor per layer of the correlation between the input gradients of two inputs.

    r = E phi'(u_1) phi'(u_2) / E phi'^2 for a feedforward layer, (1 + branch r) / (1 + branch) with
    a skip around it. So BN-ReLU networks (c = 0) have 2^-L, and with skips on normalised inputs,
    branch_l = 1 / (l + 1), L^(-1/2).

    Args:
      c: correlation of the two inputs.
      q: their length.
      activation: a name or an elementwise callable.
      branch: mean squared Jacobian of the branch, sigma_v^2 sigma_w^2 E phi'^2; None: no skip.
      kinks: where a derivative of a callable activation jumps.

    References: Balduzzi et al. 2017 (arXiv 1702.08591).
    """
    r = elementwise(_gradient_correlation, (resolve(activation, kinks),), c=c, q=q)
    if branch is None:
        return r
    gain = jnp.asarray(branch, r.dtype)
    return (1.0 + gain * r) / (1.0 + gain)
