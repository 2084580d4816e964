"""What residual branches, BatchNorm, gates and finite width change."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gradjax.core.activations import resolve
from gradjax.theory.gaussian import (
    both_positive,
    derivative,
    gaussian_mean,
    phi_pair,
    second_moment,
    slope_moment,
)
from gradjax.theory.meanfield.phase import point_of
from gradjax.theory.meanfield.roots import Name, Number, elementwise, evaluate, root_between


class Residual(NamedTuple):
    """Depth is the last axis; index l of p and c is the state h_l, 0 the input; index l of
    log_growth layer l + 1.
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
    """Lengths, correlations and gradients through h' = h + V phi(W h + b) + a, Var V = sigma_v^2 /
    fan_in.

    p' = p + sigma_v^2 E phi(sqrt(q) z)^2 + sigma_a^2 with q = sigma_w^2 p + sigma_b^2; gradients grow by
    1 + sigma_v^2 sigma_w^2 E phi'(sqrt(q) z)^2 per layer. There is no fixed point: tanh has p ~ l, and
    log chi_0 / chi_L ~ (4/3) sqrt(2/pi) sigma_v^2 sigma_w / sqrt(sigma_v^2 + sigma_a^2) sqrt(L), ReLU the factor
    1 + sigma_v^2 sigma_w^2 / 2. For a branch scale * phi(W h + b) without V: sigma_v = scale, sigma_a = 0, and an
    odd phi (another's mean adds up along the skip; the growth of gradients at given q is right for any phi).

    Args:
      p, c: E h_0^2 and the correlation of two inputs.

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
    """Factor of E ||dL/dh||^2 per layer h' = W phi(BatchNorm(h)), whatever sigma_w and sigma_b:
    BatchNorm explodes.

    The normalised batch of one unit is sqrt(B) r, r uniform on the unit sphere of 1-perp in R^B, so pairs have the
    correlation rho = -1/(B-1); ||h - mean||^2 is (E phi^2 - E phi phi) chi^2_{B-1} and independent of r. With
    D = diag phi'(r), G = I - 11^T/B, cotangents of covariance proportional to G are multiplied by

        B E tr[(G - rr^T) D G D] / ((B - 1)(B - 3)(E phi^2 - E phi_1 phi_2)).

    Linear: (B-2)/(B-3). ReLU tends to pi/(pi-1) = 1.46694. inf for B <= 3, where the mean does not
      exist.

    Args:
      batch: B > 2.
      activation: linear, relu or leaky_relu; the others have no such closed form.

    References: Yang et al. 2019 (arXiv 1902.08129) for linear nets and for large B; ReLU's rate at finite B
    was derived for this package and agrees with simulation.
    """
    slopes = resolve(activation).slopes
    if slopes is None:
        raise ValueError(
            f"meanfield: got activation {activation!r}; BatchNorm needs linear, relu or leaky_relu."
        )
    return elementwise(_batchnorm, (slopes,), batch=batch)


# --- gated recurrences ---------------------------------------------------------------------------------------------


class Gated(NamedTuple):
    """A gated recurrence at its stationary state."""

    q_star: Array  # E h^2
    chi: Array  # mean squared singular value of the Jacobian of one step, (1/dim) E tr J J^T


def _gate(f, bias, variance):
    """E f(bias + sqrt(variance) z), f a function of the logistic gate at that value."""
    return gaussian_mean(lambda x: f(jax.nn.sigmoid(x + bias)), variance, (-bias,))


_slope = lambda u: u * (1.0 - u)  # of the logistic function, from its value
_bend = lambda t: 1.0 - jnp.square(t)  # of tanh
_power = lambda k: lambda u: u**k


def _tanh_power(k, variance):
    return gaussian_mean(lambda x: jnp.tanh(x) ** k, variance)


def _minimal_rnn(w2, v, bias):
    def parts(q):
        gates = w2 * q + v
        u2 = _gate(jnp.square, bias, gates)
        return u2, _gate(lambda u: jnp.square(1 - u), bias, gates) * r / (1 - u2), gates

    r = _tanh_power(2, v)
    chi = lambda q: (
        parts(q)[0] + w2 * _gate(lambda u: jnp.square(_slope(u)), bias, parts(q)[2]) * (q + r)
    )
    return (lambda q: parts(q)[1]), chi


def _gru(w2, v, bias):
    def of_reset(q, f):
        """E over the reset gate r of E f(a, r), a = x + r y ~ N(0, v + r^2 w2 q)."""
        inner = lambda r: gaussian_mean(lambda a: f(a, r), v + jnp.square(r) * w2 * q)
        return gaussian_mean(lambda x: jax.vmap(inner)(jax.nn.sigmoid(x)), w2 * q + v)

    def length(q):
        gates = w2 * q + v
        n2 = of_reset(q, lambda a, r: jnp.square(jnp.tanh(a)))
        return (
            _gate(lambda z: jnp.square(1 - z), bias, gates)
            * n2
            / (1 - _gate(jnp.square, bias, gates))
        )

    def chi(q):
        gates = w2 * q + v

        def candidate(a, r):  # y given a is Gaussian
            fraction = r * w2 * q / (v + jnp.square(r) * w2 * q)
            y2 = w2 * q * (1 - r * fraction) + jnp.square(fraction * a)
            return jnp.square(_bend(jnp.tanh(a))) * (jnp.square(r) + jnp.square(_slope(r)) * y2)

        n2 = of_reset(q, lambda a, r: jnp.square(jnp.tanh(a)))
        through_z = w2 * _gate(lambda z: jnp.square(_slope(z)), bias, gates) * (q + n2)
        through_n = w2 * _gate(lambda z: jnp.square(1 - z), bias, gates) * of_reset(q, candidate)
        return _gate(jnp.square, bias, gates) + through_z + through_n

    return length, chi


def _lstm(w2, v, bias):
    points, weights = np.polynomial.hermite_e.hermegauss(16)
    weights = weights / weights.sum()

    def over(q, f):
        """E f(c, f, i, g) at the stationary law of c, known by its exact second and fourth
        moments.
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

    def length(q):
        return output(q, jnp.square) * over(
            q, lambda c, f, i, g: jnp.square(jnp.tanh(f * c + i * g))
        )

    def chi(q):
        def step(c, f, i, g):
            through_h = (
                jnp.square(c * _slope(f)) + jnp.square(g * _slope(i)) + jnp.square(i * _bend(g))
            )
            return jnp.square(f) + w2 * through_h

        o2, slope2 = output(q, jnp.square), output(q, lambda o: jnp.square(_slope(o)))
        read = lambda c, f, i, g: jnp.square(_bend(jnp.tanh(f * c + i * g))) * step(c, f, i, g)
        tanh2 = over(q, lambda c, f, i, g: jnp.square(jnp.tanh(f * c + i * g)))
        return 0.5 * (over(q, step) + o2 * over(q, read) + w2 * slope2 * tanh2)

    return length, chi


_CELLS = {"minimal_rnn": _minimal_rnn, "gru": _gru, "lstm": _lstm}


def _gated(cell, sigma_w, bias, input_variance):
    length, chi = _CELLS[cell](jnp.square(sigma_w), input_variance, bias)
    zero, one = jnp.zeros_like(sigma_w), jnp.ones_like(sigma_w)
    eps = 1e-6 * one  # |h| < 1 in all three, and h = 0 leaves what the input alone gives
    q = root_between(lambda q: length(q) - q, zero, one, length(eps) - eps, length(one) - one)
    return Gated(q, chi(q))


def gated(cell: str, sigma_w: Number, input_variance: Number = 1.0, bias: Number = 0.0) -> Gated:
    """Mean squared singular value per step of a gated recurrence at its stationary state, weights
    untied in time.

    All recurrent matrices have Var W = sigma_w^2 / fan_in; the inputs add N(0, input_variance) to every
    pre-activation, fresh at each step, and `bias` is added to the gate that keeps the state (u, z, f):

        minimal_rnn   h' = u h + (1 - u) x, x = tanh(input):   chi = E u^2 + sigma_w^2 E u'^2 (E h^2 + E x^2)
        gru           h' = z h + (1 - z) tanh(x + r (U h)), reset after the matrix as in Flax and cuDNN
        lstm          c' = f c + i g, h' = o tanh(c'); the state is (c, h), chi is over 2 * width singular values

    Quadrature is exact but for the LSTM, whose c has the exact second and fourth moments on three points: about 1%.
    Forget-gate bias takes chi to 1 (to 1/2 of the LSTM's two states each). Tied weights deviate where sigma_w is large.

    References: Chen, Pennington & Schoenholz 2018 (arXiv 1806.05394); Gilboa et al. 2019
    (arXiv 1901.08987). The GRU's and the LSTM's averages in this form were derived for this package.
    """
    if cell not in _CELLS:
        raise ValueError(f"meanfield: got cell {cell!r}; the cells are {', '.join(_CELLS)}.")
    return elementwise(_gated, (cell,), sigma_w=sigma_w, bias=bias, input_variance=input_variance)


# --- finite width --------------------------------------------------------------------------------------------------


def _log_variance(orthogonal, act, layernorm, *numbers):
    point = point_of(act, layernorm, *numbers)
    q, slope = point.at, derivative(act.phi)
    f, e = (lambda x: jnp.square(act.phi(x))), (lambda x: jnp.square(slope(x)))
    mean = lambda g: gaussian_mean(g, q, act.kinks)
    mu, mean_f = slope_moment(act, q), mean(f)
    ee = slope_moment(act, q, 2) / jnp.square(mu)
    ff, ef = (
        mean(lambda x: jnp.square(f(x))) - jnp.square(mean_f),
        mean(lambda x: e(x) * f(x)) / mu - mean_f,
    )
    rate = 3 * ee - 1
    if orthogonal:  # |W x| and |W u| do not fluctuate: what is correlated with them goes
        pinned = jnp.square((q - point.b2) / q) / (2 * jnp.square(q))
        fz = mean(lambda x: f(x) * (jnp.square(x) - q))
        ez = mean(lambda x: e(x) * (jnp.square(x) - q)) / mu
        rate = 3 * (ee - 1) - pinned * jnp.square(ez)
        ff, ef = ff - pinned * jnp.square(fz), ef - pinned * fz * ez
    if layernorm or act.slopes:
        return rate
    length = lambda q: point.s2 * second_moment(act, q)
    memory = 1 / (1 - jax.jvp(length, (q,), (jnp.ones_like(q),))[1])
    drift = (
        jax.jvp(lambda q: jnp.log(slope_moment(act, q)), (q,), (jnp.ones_like(q),))[1]
        * memory
        * point.s2
    )
    return rate + 2 * drift * ef + jnp.square(drift) * ff


_RATES = {  # made once: `evaluate` compiles for each function anew
    "gaussian": functools.partial(_log_variance, False),
    "orthogonal": functools.partial(_log_variance, True),
}


def log_variance(
    widths: Sequence[int],
    sigma_w: Number,
    sigma_b: Number = 0.0,
    activation: Name = "relu",
    *,
    weights: str = "gaussian",
    **network,
) -> Array:
    """beta = Var log ||J u||^2 over draws of a deep network's weights, to first order in 1 / width.

    beta = rate * sum_l 1/n_l, and log ||J u||^2 ~ N(L log chi_1 - beta/2, beta) for phi linear,
    ReLU, leaky ReLU:

        rate = 3 mu_2 / mu_1^2 - 1 (Gaussian, 5 for ReLU),   3 (mu_2 / mu_1^2 - 1) (orthogonal, 3 for ReLU).

    For other phi the length itself fluctuates and takes chi_1 with it: with f = phi^2, e = phi'^2 / mu_1,
    D = sigma_w^2 (d log mu_1 / dq) / (1 - dq'/dq), the rate has 2 D Cov(e, f) + D^2 Var f more, each without what a
    pinned |W x| takes away if W is orthogonal. That holds for depths well above xi_q, and diverges where xi_q does.

    Args:
      widths: of the layers, n_l.
      weights: gaussian or orthogonal (square).

    References: Hanin & Nica 2018 (arXiv 1812.05994); the general rate was derived for this package.
    """
    if weights not in _RATES:
        raise ValueError(
            f"meanfield: got weights {weights!r}; the families are {', '.join(_RATES)}."
        )
    if not len(widths) or min(widths) < 1:
        raise ValueError(
            f"meanfield: got widths {tuple(widths)}; every layer needs at least one unit."
        )
    return evaluate(_RATES[weights], sigma_w, sigma_b, activation, **network) * sum(
        1.0 / n for n in widths
    )
