"""Statistics of a value or cotangent, reduced inside the program so that large models need not
return activations.

Cheap on purpose: a 100-layer network has hundreds of sites, and each statistic is compiled for each
of them. The rms is taken after an exact division by the power of two of the largest magnitude, so
that it neither overflows nor underflows.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

LOG2 = 0.6931471805599453
FLAT = 0.05  # a unit is saturated where its slope is below this share of the steepest
MASKED = -1e8  # logits below are masks
BINS = 32  # of histogram, each of 8 powers of two from 2^-128 on


class Statistics(NamedTuple):
    """Of one value, float32, with a leading axis for each scan around it. Natural logarithms."""

    log_rms: Array
    log_max: Array
    bad: Array  # entries that are inf or NaN
    first_bad: Array  # flat index of the first of them, -1 for none
    zeros: Array  # share of entries that are exactly 0


class Spread(NamedTuple):
    """How different a value's examples, positions and units are: shares of its mean square in [0,
    1], or NaN.
    """

    examples: Array  # variance over the first axis
    tokens: Array  # variance over the second of three axes
    units: Array  # variance over the last axis


def scaled(x: Array) -> tuple[Array, Array]:
    """(x * 2^-e, e) with the largest finite magnitude in [1, 2); float32, of a complex array the
    magnitudes.
    """
    x = jnp.abs(x) if jnp.iscomplexobj(x) else x
    if x.dtype == jnp.float64:
        top = jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), 0.0), initial=0.0)
        exponent = jnp.clip(jnp.floor(jnp.log2(jnp.maximum(top, 1e-300))), -1000, 1000)
        return (x * jnp.exp2(-exponent)).astype(jnp.float32), exponent.astype(jnp.int32)
    x = x.astype(jnp.float32)
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    top = jnp.max(jnp.where(bits < 0x7F800000, bits, 0), initial=0)
    exponent = jnp.clip(top >> 23, 1, 253)
    return x * lax.bitcast_convert_type((254 - exponent) << 23, jnp.float32), exponent - 127


def log_rms(x: Array, axes: Any = None) -> Array:
    """Natural log of the root mean square; -inf for zeros, inf or NaN where an entry is."""
    y, exponent = scaled(x)
    return 0.5 * jnp.log(jnp.mean(y * y, axis=axes)) + exponent.astype(jnp.float32) * LOG2


def statistics(x: Array) -> Statistics:
    """`Statistics` of an array."""
    y, exponent = scaled(x)
    good = jnp.isfinite(y)
    bad = jnp.sum(~good, dtype=jnp.float32)
    first = jnp.where(bad > 0, jnp.argmin(good.reshape(-1)).astype(jnp.float32), -1.0)
    shift = exponent.astype(jnp.float32) * LOG2
    finite = jnp.where(good, y, 0.0)
    value = 0.5 * jnp.log(jnp.mean(y * y)) + shift
    return Statistics(
        value, jnp.log(jnp.max(jnp.abs(finite), initial=0.0)) + shift, bad, first, jnp.mean(y == 0)
    )


def spread(x: Array) -> Spread:
    """`Spread` of an array (examples, ..., units)."""
    y, _ = scaled(x)
    whole, none = jnp.mean(y * y), jnp.float32(jnp.nan)
    over = lambda axis: jnp.mean(jnp.square(y - jnp.mean(y, axis=axis, keepdims=True))) / whole
    if x.ndim < 2 or x.shape[0] < 2:
        return Spread(none, none, over(-1) if x.ndim else none)
    return Spread(over(0), over(1) if x.ndim == 3 and x.shape[1] > 1 else none, over(-1))


def dead(x: Array) -> Array:
    """Share of units that are 0 for every example (and position; in an image, of its entries)."""
    axes = tuple(range(x.ndim - 1)) if x.ndim <= 3 else (0,)
    return jnp.mean(jnp.all(x == 0, axis=axes)) if x.ndim > 1 else jnp.float32(jnp.nan)


def flat(x: Array, kind: str) -> Array:
    """Share of entries of an activation function's output where its slope is below FLAT of the
    steepest.
    """
    y = x.astype(jnp.float32)
    slope = {
        "tanh": lambda: 1 - y * y,
        "logistic": lambda: 4 * y * (1 - y),
        "erf": lambda: 1 - jnp.abs(y),
    }
    if kind == "hard_tanh":
        return jnp.mean((y <= jnp.min(y)) | (y >= jnp.max(y)))
    return jnp.mean(slope[kind]() < FLAT)


class Logits(NamedTuple):
    """Attention logits per row of keys, medians over rows."""

    deviation: Array  # standard deviation over the keys of a row
    keys: Array  # how many are not masked
    largest: Array  # share that the largest takes after the softmax


def logits(x: Array) -> Logits:
    """`Logits` of (..., keys)."""
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
    """Share of entries in BINS bins of 8 powers of two: |x| in [2^(8 i - 128), 2^(8 i - 120)),
    zeros in the first.
    """
    bits = lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)
    which = jnp.clip((bits >> 23) + 1, 0, 255) >> 3
    return jnp.mean(
        which.reshape(-1)[:, None] == jnp.arange(BINS)[None, :], axis=0, dtype=jnp.float32
    )


class Summary(NamedTuple):
    """`Statistics` of a value with its histogram."""

    log_rms: Array
    log_max: Array
    bad: Array
    first_bad: Array
    zeros: Array
    histogram: Array  # (..., BINS)


def summary(x: Array) -> Summary:
    """`Summary` of an array."""
    return Summary(*statistics(x), histogram(x))


@jax.custom_vjp
def observed(value: Array, sink: Any) -> Array:
    """The value; the sink's "gradient" is (log rms, largest, bad entries, zeros, exponent) of the
    value's cotangent.
    """
    return value


class Cotangent(NamedTuple):
    """What `observed` and `rescaled` say of a cotangent; float32 each."""

    log_rms: Array
    bad: Array
    zeros: Array
    exponent: Array  # by which it was divided for those before it


def blank() -> Cotangent:
    """A sink."""
    return Cotangent(*(jnp.zeros((), jnp.float32) for _ in Cotangent._fields))


def cotangent(g: Array, exponent: Any = 0.0) -> Cotangent:
    """`Cotangent` of an array."""
    y, e = scaled(g)
    value = 0.5 * jnp.log(jnp.mean(y * y)) + e.astype(jnp.float32) * LOG2
    return Cotangent(
        value, jnp.sum(~jnp.isfinite(y), dtype=jnp.float32), jnp.mean(y == 0), jnp.float32(exponent)
    )


observed.defvjp(lambda value, sink: (value, None), lambda _, g: (g, cotangent(g)))


@jax.custom_vjp
def rescaled(value: Array, sink: Any) -> Array:
    """As `observed`, but hands on the cotangent divided by the power of two of its largest
    entry.
    """
    return value


def _pass_on(_, g: Array) -> tuple[Array, Cotangent]:
    y, e = scaled(g)
    passed = g * jnp.exp2(-e.astype(jnp.float32)) if jnp.iscomplexobj(g) else y
    return passed.astype(g.dtype), cotangent(g, e.astype(jnp.float32))


rescaled.defvjp(lambda value, sink: (value, None), _pass_on)
