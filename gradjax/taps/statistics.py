"""Statistics of a value or cotangent, reduced inside the program: no activation is returned whole.

A network of 100 layers has hundreds of sites and every statistic is compiled for each of them, so
each statistic is cheap. The rms is taken after an exact division by the power of two of the largest
magnitude (`gradjax.core.scale.to_unit`), so that it neither overflows nor underflows.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from gradjax.core.scale import LOG2
from gradjax.core.scale import array_log_rms as log_rms  # noqa: F401
from gradjax.core.scale import to_unit as scaled

# A unit is saturated where its slope is below this fraction of the steepest slope.
FLAT = 0.05
# Attention logits below this are masks.
MASKED = -1e8
# The bins of a histogram, each of 8 powers of two, from 2^-128 on.
BINS = 32


class Statistics(NamedTuple):
    """Statistics of one value, float32, with a leading axis for each scan around it."""

    log_rms: Array  # natural logarithm
    log_max: Array  # natural logarithm of the largest finite magnitude
    bad: Array  # number of entries that are inf or NaN
    first_bad: Array  # flat index of the first such entry, -1 if there is none
    zeros: Array  # fraction of entries that are exactly 0


class Spread(NamedTuple):
    """How much a value varies, as fractions of its mean square in [0, 1]; NaN where undefined."""

    examples: Array  # variance over the first axis
    tokens: Array  # variance over the second of three axes
    units: Array  # variance over the last axis


def statistics(x: Array) -> Statistics:
    """`Statistics` of an array."""
    y, exponent = scaled(x)
    good = jnp.isfinite(y)
    bad = jnp.sum(~good, dtype=jnp.float32)
    first = jnp.where(bad > 0, jnp.argmin(good.reshape(-1)).astype(jnp.float32), -1.0)
    shift = exponent.astype(jnp.float32) * LOG2
    finite = jnp.where(good, y, 0.0)
    value = 0.5 * jnp.log(jnp.mean(y * y)) + shift
    largest = jnp.log(jnp.max(jnp.abs(finite), initial=0.0)) + shift
    return Statistics(value, largest, bad, first, jnp.mean(y == 0))


def spread(x: Array) -> Spread:
    """`Spread` of an array (examples, ..., units)."""
    y, _ = scaled(x)
    whole, none = jnp.mean(y * y), jnp.float32(jnp.nan)

    def variance(axis: int) -> Array:
        centred = y - jnp.mean(y, axis=axis, keepdims=True)
        return jnp.mean(jnp.square(centred)) / whole

    if x.ndim < 2 or x.shape[0] < 2:
        return Spread(none, none, variance(-1) if x.ndim else none)
    has_tokens = x.ndim == 3 and x.shape[1] > 1
    return Spread(variance(0), variance(1) if has_tokens else none, variance(-1))


def dead(x: Array) -> Array:
    """Fraction of units that are 0 for every example, and at every position of a sequence.

    The units of an image are its entries. NaN for an array of fewer than two axes.
    """
    if x.ndim <= 1:
        return jnp.float32(jnp.nan)
    axes = tuple(range(x.ndim - 1)) if x.ndim <= 3 else (0,)
    return jnp.mean(jnp.all(x == 0, axis=axes))


def flat(x: Array, kind: str) -> Array:
    """Fraction of an activation function's outputs where its slope is below FLAT of the steepest.

    Args:
      x: outputs of the activation function.
      kind: "tanh", "logistic", "erf" or "hard_tanh".
    """
    y = x.astype(jnp.float32)
    if kind == "hard_tanh":
        return jnp.mean((y <= jnp.min(y)) | (y >= jnp.max(y)))
    if kind == "tanh":
        slope = 1 - y * y
    elif kind == "logistic":
        slope = 4 * y * (1 - y)
    elif kind == "erf":
        slope = 1 - jnp.abs(y)
    else:
        raise KeyError(kind)
    return jnp.mean(slope < FLAT)


class Logits(NamedTuple):
    """Attention logits per row of keys, medians over rows."""

    deviation: Array  # standard deviation over the keys of a row
    keys: Array  # number of keys that are not masked
    largest: Array  # the largest weight after the softmax


def logits(x: Array) -> Logits:
    """`Logits` of an array (..., keys)."""
    y = x.astype(jnp.float32)
    real = y > MASKED
    count = jnp.sum(real, axis=-1, dtype=jnp.float32)
    at_least = jnp.maximum(count, 1.0)
    mean = jnp.sum(jnp.where(real, y, 0.0), axis=-1) / at_least
    square = jnp.sum(jnp.where(real, jnp.square(y - mean[..., None]), 0.0), axis=-1)
    top = jnp.max(jnp.where(real, y, -jnp.inf), axis=-1)
    total = jnp.sum(jnp.where(real, jnp.exp(y - top[..., None]), 0.0), axis=-1)
    return Logits(jnp.median(jnp.sqrt(square / at_least)), jnp.median(count), jnp.median(1 / total))


def histogram(x: Array) -> Array:
    """Fractions of entries in BINS bins of 8 powers of two each.

    Bin i holds |x| in [2^(8 i - 128), 2^(8 i - 120)); zeros are in the first.
    """
    bits = lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)
    which = jnp.clip((bits >> 23) + 1, 0, 255) >> 3
    hits = which.reshape(-1)[:, None] == jnp.arange(BINS)[None, :]
    return jnp.mean(hits, axis=0, dtype=jnp.float32)


class Summary(NamedTuple):
    """The fields of `Statistics`, and the histogram."""

    log_rms: Array
    log_max: Array
    bad: Array
    first_bad: Array
    zeros: Array
    histogram: Array  # (..., BINS)


def summary(x: Array) -> Summary:
    """`Summary` of an array."""
    return Summary(*statistics(x), histogram(x))


class Cotangent(NamedTuple):
    """What `observed` and `rescaled` record of a cotangent; float32 each."""

    log_rms: Array
    bad: Array  # number of entries that are inf or NaN
    zeros: Array  # fraction of entries that are exactly 0
    exponent: Array  # it was divided by 2^exponent before it was passed on


def blank() -> Cotangent:
    """A sink for `observed` or `rescaled`: differentiating with respect to it gives the record."""
    return Cotangent(*(jnp.zeros((), jnp.float32) for _ in Cotangent._fields))


def cotangent(g: Array, exponent: Any = 0.0) -> Cotangent:
    """`Cotangent` of an array that was divided by 2^exponent."""
    y, e = scaled(g)
    value = 0.5 * jnp.log(jnp.mean(y * y)) + e.astype(jnp.float32) * LOG2
    bad = jnp.sum(~jnp.isfinite(y), dtype=jnp.float32)
    return Cotangent(value, bad, jnp.mean(y == 0), jnp.float32(exponent))


@jax.custom_vjp
def observed(value: Array, sink: Any) -> Array:
    """The value; the sink's "gradient" is the `Cotangent` of the value's cotangent."""
    return value


observed.defvjp(lambda value, sink: (value, None), lambda _, g: (g, cotangent(g)))


@jax.custom_vjp
def rescaled(value: Array, sink: Any) -> Array:
    """As `observed`, but pass on the cotangent divided by the power of two of its largest entry."""
    return value


def _pass_on(_, g: Array) -> tuple[Array, Cotangent]:
    y, e = scaled(g)
    passed = g * jnp.exp2(-e.astype(jnp.float32)) if jnp.iscomplexobj(g) else y
    return passed.astype(g.dtype), cotangent(g, e.astype(jnp.float32))


rescaled.defvjp(lambda value, sink: (value, None), _pass_on)
