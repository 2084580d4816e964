"""What residual branches, BatchNorm and gates change in mean field theory."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gradjax.core.activations import resolve
from gradjax.theory.gaussian import (
    both_positive,
    gaussian_mean,
    phi_pair,
    second_moment,
    slope_moment,
)
from gradjax.theory.meanfield.roots import Name, Number, elementwise, root_between


class Residual(NamedTuple):
    """Lengths, correlations and growth along the depth, which is the last axis.

    Index l of `p` and `c` is the state h_l, 0 the input; index l of `log_growth` is layer l + 1.
    """

    p: Array  # (..., depth + 1), E h^2
    c: Array  # (..., depth + 1), correlation of two inputs
    log_growth: Array  # (..., depth), log of the factor of ||dL/dh||^2 from h_{l+1} back to h_l


def _residual(act, depth, sigma_w, sigma_b, sigma_v, sigma_a, p, c):
    w2, b2, v2, a2 = (jnp.square(s) for s in (sigma_w, sigma_b, sigma_v, sigma_a))

    def layer(state, _):
        p, c = state
        q = w2 * p + b2
        after = p + v2 * second_moment(act, q) + a2
        shared = p * c + v2 * phi_pair(act, q, jnp.clip((w2 * p * c + b2) / q, -1.0, 1.0)) + a2
        growth = jnp.log1p(v2 * w2 * slope_moment(act, q))
        return (after, shared / after), (p, c, growth)

    (last_p, last_c), (ps, cs, growths) = lax.scan(layer, (p, c), length=depth)
    return Residual(jnp.append(ps, last_p), jnp.append(cs, last_c), growths)


def residual(
    depth: int,
    sigma_w: Number,
    sigma_b: Number = 0.0,
    sigma_v: Number = 1.0,
    sigma_a: Number = 0.0,
    activation: Name = "tanh",
    *,
    p: Number = 1.0,
    c: Number = 0.0,
    kinks: Sequence[float] | None = None,
) -> Residual:
    """Lengths, correlations and gradients through h' = h + V phi(W h + b) + a.

    With Var V = sigma_v^2 / fan_in and q = sigma_w^2 p + sigma_b^2,

        p' = p + sigma_v^2 E phi(sqrt(q) z)^2 + sigma_a^2,

    and the squared gradient grows by 1 + sigma_v^2 sigma_w^2 E phi'(sqrt(q) z)^2 per layer. There
    is no fixed point: tanh has p ~ l and

        log chi_0 / chi_L ~ (4/3) sqrt(2/pi) sigma_v^2 sigma_w sqrt(L / (sigma_v^2 + sigma_a^2)),

    ReLU the factor 1 + sigma_v^2 sigma_w^2 / 2. A branch scale * phi(W h + b) without V is covered
    as sigma_v = scale, sigma_a = 0 for an odd phi (the mean of any other adds up along the skip;
    the growth of gradients at given q is right for any phi).

    Args:
      depth: L, static.
      sigma_w: Var W = sigma_w^2 / fan_in.
      sigma_b: Var b = sigma_b^2.
      sigma_v: Var V = sigma_v^2 / fan_in.
      sigma_a: Var a = sigma_a^2.
      activation: a name or an elementwise callable.
      p: E h_0^2.
      c: correlation of two inputs.
      kinks: where a derivative of a callable activation jumps.

    References: Yang & Schoenholz 2017 (arXiv 1712.08969).
    """
    numbers = dict(sigma_w=sigma_w, sigma_b=sigma_b, sigma_v=sigma_v, sigma_a=sigma_a, p=p, c=c)
    return elementwise(_residual, (resolve(activation, kinks), depth), **numbers)


def _batchnorm(slopes, batch):
    low, jump = slopes[0], slopes[1] - slopes[0]
    mu = 0.5 * (slopes[0] ** 2 + slopes[1] ** 2)
    rho = -1.0 / (batch - 1.0)
    both, product = both_positive(rho)
    differs = mu - (low * low + low * jump) * rho - jump * jump * product
    slope_12 = low * low + low * jump + jump * jump * both
    inner = (
        batch * mu - mu - (batch - 1.0) * slope_12 - jump * jump * (0.5 + (batch - 1.0) * product)
    )
    trace = mu * (batch - 2.0) - inner / batch
    growth = batch * trace / ((batch - 3.0) * (batch - 1.0) * differs)
    return jnp.where(batch > 3, growth, jnp.inf)


def batchnorm_growth(batch: Number, activation: str = "relu") -> Array:
    """Factor of E ||dL/dh||^2 per layer h' = W phi(BatchNorm(h)): BatchNorm explodes.

    It does not depend on sigma_w or sigma_b. The normalised batch of one unit is sqrt(B) r, r
    uniform on the unit sphere of 1-perp in R^B, so pairs have the correlation rho = -1/(B-1);
    ||h - mean||^2 is (E phi^2 - E phi phi) chi^2_{B-1} and independent of r. With D = diag phi'(r)
    and G = I - 11^T/B, cotangents of covariance proportional to G are multiplied by

        B E tr[(G - rr^T) D G D] / ((B - 1)(B - 3)(E phi^2 - E phi_1 phi_2)).

    A linear network has (B-2)/(B-3); ReLU tends to pi/(pi-1) = 1.46694.

    Args:
      batch: B > 2.
      activation: an activation with one slope on either side of 0 (linear, relu, leaky_relu ...);
        the others have no such closed form.

    Returns:
      The factor, of the shape of `batch`; inf for B <= 3, where the mean does not exist.

    Raises:
      ValueError: for an activation without two slopes.

    References: Yang et al. 2019 (arXiv 1902.08129) for linear networks and for large B; the rate of
    ReLU at finite B was derived for this package and agrees with simulation.
    """
    slopes = resolve(activation).slopes
    if slopes is None:
        raise ValueError(
            f"meanfield: got activation {activation!r}; BatchNorm needs linear, relu or leaky_relu."
        )
    return elementwise(_batchnorm, (slopes,), batch=batch)


# Gated recurrences


class Gated(NamedTuple):
    """A gated recurrence at its stationary state."""

    q_star: Array  # E h^2
    chi: Array  # mean squared singular value of the Jacobian of one step, (1/dim) E tr J J^T


def _gate(f, bias, variance):
    """E f(logistic(bias + sqrt(variance) z))."""
    return gaussian_mean(lambda x: f(jax.nn.sigmoid(x + bias)), variance, (-bias,))


def _slope(u):
    """Derivative of the logistic function, from its value u."""
    return u * (1.0 - u)


def _bend(t):
    """Derivative of tanh, from its value t."""
    return 1.0 - jnp.square(t)


def _power(k: int) -> Callable[[Array], Array]:
    return lambda u: u**k


def _tanh_power(k, variance):
    return gaussian_mean(lambda x: jnp.tanh(x) ** k, variance)


def _minimal_rnn(w2, v, bias):
    """(length map, chi) as functions of q = E h^2, as for the other cells."""
    x2 = _tanh_power(2, v)

    def length(q):
        gates = w2 * q + v
        u2 = _gate(jnp.square, bias, gates)
        return _gate(lambda u: jnp.square(1 - u), bias, gates) * x2 / (1 - u2)

    def chi(q):
        gates = w2 * q + v
        through_u = w2 * _gate(lambda u: jnp.square(_slope(u)), bias, gates)
        return _gate(jnp.square, bias, gates) + through_u * (q + x2)

    return length, chi


def _gru(w2, v, bias):
    def of_reset(q, f):
        """E over the reset gate r of E f(a, r), a = x + r y ~ N(0, v + r^2 w2 q)."""

        def inner(r):
            return gaussian_mean(lambda a: f(a, r), v + jnp.square(r) * w2 * q)

        return gaussian_mean(lambda x: jax.vmap(inner)(jax.nn.sigmoid(x)), w2 * q + v)

    def closed(gates):
        return _gate(lambda z: jnp.square(1 - z), bias, gates)

    def candidate_square(a, r):
        return jnp.square(jnp.tanh(a))

    def length(q):
        gates = w2 * q + v
        n2 = of_reset(q, candidate_square)
        return closed(gates) * n2 / (1 - _gate(jnp.square, bias, gates))

    def chi(q):
        gates = w2 * q + v

        def candidate(a, r):
            # Given a, y is Gaussian.
            fraction = r * w2 * q / (v + jnp.square(r) * w2 * q)
            y2 = w2 * q * (1 - r * fraction) + jnp.square(fraction * a)
            return jnp.square(_bend(jnp.tanh(a))) * (jnp.square(r) + jnp.square(_slope(r)) * y2)

        n2 = of_reset(q, candidate_square)
        through_z = w2 * _gate(lambda z: jnp.square(_slope(z)), bias, gates) * (q + n2)
        through_n = w2 * closed(gates) * of_reset(q, candidate)
        return _gate(jnp.square, bias, gates) + through_z + through_n

    return length, chi


def _lstm(w2, v, bias):
    points, weights = np.polynomial.hermite_e.hermegauss(16)
    weights = weights / weights.sum()

    def over(q, f):
        """E f(c, f, i, g) at the stationary law of c.

        The law is replaced by three points with its exact second and fourth moments.
        """
        gates = w2 * q + v
        zero = jnp.zeros_like(q)
        f2, f4 = (_gate(_power(k), bias, gates) for k in (2, 4))
        i2, i4 = (_gate(_power(k), zero, gates) for k in (2, 4))
        g2, g4 = (_tanh_power(k, gates) for k in (2, 4))
        m2 = i2 * g2 / (1 - f2)
        m4 = (6 * f2 * i2 * g2 * m2 + i4 * g4) / (1 - f4)
        x, w = (jnp.asarray(a, q.dtype) for a in (points, weights))
        e = jnp.sqrt(gates) * x
        c = jnp.sqrt(m4 / m2) * jnp.asarray([-1.0, 0.0, 1.0], q.dtype)
        tail = 0.5 * jnp.square(m2) / m4
        wc = jnp.stack([tail, 1 - 2 * tail, tail])
        grid = jnp.meshgrid(
            c, jax.nn.sigmoid(e + bias), jax.nn.sigmoid(e), jnp.tanh(e), indexing="ij"
        )
        return jnp.einsum("abcd,a,b,c,d->", f(*grid), wc, w, w, w)

    def output(q, power):
        return _gate(power, jnp.zeros_like(q), w2 * q + v)

    def shown(c, f, i, g):
        return jnp.square(jnp.tanh(f * c + i * g))

    def length(q):
        return output(q, jnp.square) * over(q, shown)

    def chi(q):
        def step(c, f, i, g):
            through_f, through_i = jnp.square(c * _slope(f)), jnp.square(g * _slope(i))
            return jnp.square(f) + w2 * (through_f + through_i + jnp.square(i * _bend(g)))

        def read(c, f, i, g):
            return jnp.square(_bend(jnp.tanh(f * c + i * g))) * step(c, f, i, g)

        o2, slope2 = output(q, jnp.square), output(q, lambda o: jnp.square(_slope(o)))
        through_o = w2 * slope2 * over(q, shown)
        return 0.5 * (over(q, step) + o2 * over(q, read) + through_o)

    return length, chi


_CELLS = {"minimal_rnn": _minimal_rnn, "gru": _gru, "lstm": _lstm}


def _gated(cell, sigma_w, bias, input_variance):
    length, chi = _CELLS[cell](jnp.square(sigma_w), input_variance, bias)
    zero, one = jnp.zeros_like(sigma_w), jnp.ones_like(sigma_w)
    # |h| < 1 in all three cells, and at h = 0 the input makes the next length positive.
    eps = 1e-6 * one
    q = root_between(lambda q: length(q) - q, zero, one, length(eps) - eps, length(one) - one)
    return Gated(q, chi(q))


def gated(cell: str, sigma_w: Number, input_variance: Number = 1.0, bias: Number = 0.0) -> Gated:
    """Mean squared singular value per step of a gated recurrence, weights untied in time.

    All recurrent matrices have Var W = sigma_w^2 / fan_in; the inputs add N(0, input_variance) to
    every pre-activation, drawn afresh at each step, and `bias` is added to the gate that keeps the
    state (u, z, f):

        minimal_rnn   h' = u h + (1 - u) x, x = tanh(input):
                      chi = E u^2 + sigma_w^2 E u'^2 (E h^2 + E x^2)
        gru           h' = z h + (1 - z) tanh(x + r (U h)), reset after the matrix as in Flax and
                      cuDNN
        lstm          c' = f c + i g, h' = o tanh(c'); the state is (c, h), chi is over 2 * width
                      singular values

    Quadrature is exact except for the LSTM, whose c has the exact second and fourth moments on
    three points: about 1%. A large bias of the forget gate takes chi to 1 (for the LSTM to 1/2 for
    each of its two states). Tied weights deviate where sigma_w is large.

    Args:
      cell: minimal_rnn, gru or lstm.
      sigma_w: positive; number or array, as the others.
      input_variance: what the inputs add to every pre-activation.
      bias: of the gate that keeps the state.

    Returns:
      `Gated`, at the stationary state.

    Raises:
      ValueError: for an unknown cell.

    References: Chen, Pennington & Schoenholz 2018 (arXiv 1806.05394); Gilboa et al. 2019
    (arXiv 1901.08987). The averages of the GRU and of the LSTM in this form were derived for this
    package.
    """
    if cell not in _CELLS:
        raise ValueError(f"meanfield: got cell {cell!r}; the cells are {', '.join(_CELLS)}.")
    return elementwise(_gated, (cell,), sigma_w=sigma_w, bias=bias, input_variance=input_variance)
