"""Numbers mantissa * 2^exponent, and exact scaling by powers of two.

A float32 ends at 3.4e38 and is subnormal below 1.2e-38. XLA's arithmetic on CPU flushes subnormal
numbers to zero, but its integers do not: exponents are therefore read from the bit patterns, and a
subnormal number enters a product as the integer that its bits are. A factor 2^e is put together
from its bits too (`x / 1e38` would multiply by a reciprocal that flushes to zero), so that scaling
is exact wherever the result is a normal number.

`Norm` is such a number; `times`, `divide`, `plus`, `minus` and `greater` compute with it outside
the range of a float, each rounding once or twice. `multiply` applies one to an array.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

PyTree = Any

LOG2 = 0.6931471805599453


class Norm(NamedTuple):
    """A number mantissa * 2^exponent; mantissa is 0, inf or NaN where the number is."""

    mantissa: Array  # float32, or float64 for float64 input
    exponent: Array  # int32


class _Format(NamedTuple):
    """IEEE 754 binary format: integer type of its bits, stored significand bits, exponent bias."""

    bits: Any
    significand: int
    bias: int


def _format(dtype: Any) -> _Format:
    return _Format(jnp.int64, 52, 1023) if dtype == jnp.float64 else _Format(jnp.int32, 23, 127)


def _int(value: int, f: _Format) -> Array:
    return jnp.asarray(value, f.bits)


def widen(x: Any) -> Array:
    """`x` as float32 or float64, exactly; complex as two parts on a new last axis."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"scale: got a leaf {x.shape} {x.dtype}; norms need real or complex floating arrays."
        )
    if x.dtype == jnp.bfloat16:
        # a bfloat16 is the upper half of a float32; a conversion would flush subnormals
        upper = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
        return lax.bitcast_convert_type(upper << 16, jnp.float32)
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def magnitude_bits(x: Array) -> Array:
    """The bit patterns of the magnitudes of a float32 or float64 array."""
    f = _format(x.dtype)
    without_sign = (1 << 63) - 1 if x.dtype == jnp.float64 else (1 << 31) - 1
    return lax.bitcast_convert_type(x, f.bits) & _int(without_sign, f)


def power(exponent: Array, dtype: Any) -> Array:
    """2^exponent for the exponents of normal numbers; 0 below them."""
    f = _format(dtype)
    biased = exponent.astype(f.bits) + _int(f.bias, f)
    biased = jnp.clip(biased, 0, 2 * f.bias)
    return lax.bitcast_convert_type(biased << _int(f.significand, f), dtype)


def times_power(x: Array, exponent: Array) -> Array:
    """x * 2^exponent for |exponent| <= 2 bias, exact where the result is normal.

    The factor is applied as two, each of which is a normal number.
    """
    half = exponent >> 1
    return x * power(half, x.dtype) * power(exponent - half, x.dtype)


def _exponent(bits: Array, dtype: Any) -> Array:
    """The e with 2^(e-1) <= magnitude < 2^e of normal magnitudes; 0 for all others."""
    f = _format(dtype)
    biased = bits >> _int(f.significand, f)
    is_normal = (biased > 0) & (biased <= 2 * f.bias)
    return jnp.where(is_normal, biased - f.bias + 1, 0).astype(jnp.int32)


def _any_exponent(bits: Array, dtype: Any) -> Array:
    """`_exponent`, of subnormal magnitudes too."""
    f = _format(dtype)
    # the bits of a subnormal number are the integer that it is in units of the smallest one
    count = lax.bitcast_convert_type(bits.astype(dtype), f.bits)
    subnormal = jnp.where(bits == 0, 0, _exponent(count, dtype) + 1 - f.bias - f.significand)
    is_subnormal = bits < _int(1 << f.significand, f)
    return jnp.where(is_subnormal, subnormal, _exponent(bits, dtype))


def countable(x: Array, exponent: Array) -> tuple[Array, Array]:
    """(y, e) with y * 2^e = x * 2^exponent and y normal or zero.

    Converting the bits of a subnormal number to a float flushes nothing.
    """
    f, bits = _format(x.dtype), magnitude_bits(x)
    is_subnormal = bits < _int(1 << f.significand, f)
    value = jnp.where(is_subnormal, jnp.copysign(bits.astype(x.dtype), x), x)
    return value, jnp.where(is_subnormal, exponent + (1 - f.bias - f.significand), exponent)


def _limited(exponent: Array, dtype: Any) -> Array:
    limit = 2 * _format(dtype).bias
    return jnp.clip(exponent, -limit, limit)


def magnitude(x: Array) -> Norm:
    """|x| entry by entry, exactly, with mantissa in [1/2, 1)."""
    bits = magnitude_bits(x)
    value = lax.bitcast_convert_type(bits, x.dtype)
    exponent = _any_exponent(bits, x.dtype)
    return Norm(times_power(*countable(value, -exponent)), exponent)


def array_norm_max(x: Any) -> Norm:
    """The largest magnitude of an array (of a complex one: of its parts), mantissa in [1/2, 1)."""
    wide = widen(x)
    largest = jnp.max(magnitude_bits(wide), initial=0)
    return magnitude(lax.bitcast_convert_type(largest, wide.dtype))


def of_number(value: Any, dtype: Any = jnp.float32) -> Norm:
    """A non-negative number, traced or not, as a `Norm` with mantissa in [1/2, 1)."""
    return array_norm_max(jnp.asarray(value, dtype))


# Arithmetic


def normal(value: Norm) -> Norm:
    """The same number with |mantissa| in [1/2, 1); exponent 0 where it is 0, inf or NaN."""
    shift = _exponent(magnitude_bits(value.mantissa), value.mantissa.dtype)
    has_exponent = (value.mantissa != 0) & jnp.isfinite(value.mantissa)
    exponent = jnp.where(has_exponent, value.exponent + shift, 0)
    return Norm(times_power(value.mantissa, -shift), exponent)


def log2(value: Norm) -> Array:
    """Base-2 logarithm of a `Norm`: -inf for zero, inf and NaN as they are."""
    return jnp.log2(value.mantissa) + value.exponent.astype(value.mantissa.dtype)


def log(value: Norm) -> Array:
    """Natural logarithm of a `Norm`: -inf for zero, inf and NaN as they are."""
    return jnp.log(value.mantissa) + value.exponent.astype(value.mantissa.dtype) * LOG2


def greater(a: Norm, b: Norm) -> Array:
    """a > b without leaving (mantissa, exponent); False where either is NaN."""
    a, b = normal(a), normal(b)
    # both mantissas lie in [1/2, 1), so exponents further apart than 4 decide by themselves
    gap = jnp.clip(a.exponent - b.exponent, -4, 4)
    return times_power(a.mantissa, gap) > b.mantissa.astype(a.mantissa.dtype)


def divide(a: Norm, b: Norm) -> Norm:
    """a / b, for a factor to `multiply` with."""
    quotient = a.mantissa.astype(b.mantissa.dtype) / b.mantissa
    return Norm(quotient, a.exponent - b.exponent)


def times(*factors: Norm) -> Norm:
    """The product of numbers of either sign."""
    mantissa, exponent = factors[0].mantissa, factors[0].exponent
    for factor in factors[1:]:
        mantissa = mantissa * factor.mantissa.astype(mantissa.dtype)
        exponent = exponent + factor.exponent
    return normal(Norm(mantissa, exponent))


def plus(a: Norm, b: Norm) -> Norm:
    """a + b of numbers of either sign, each as `normal` returns it."""
    larger = jnp.where(b.mantissa == 0, a.exponent, jnp.maximum(a.exponent, b.exponent))
    common = jnp.where(a.mantissa == 0, b.exponent, larger)

    def part(x):
        return times_power(x.mantissa, jnp.clip(x.exponent - common, -100, 0))

    return normal(Norm(part(a) + part(b).astype(a.mantissa.dtype), common))


def minus(a: Norm, b: Norm) -> Norm:
    """a - b of numbers of either sign."""
    return plus(a, Norm(-b.mantissa, b.exponent))


def union(norms: Norm) -> Norm:
    """sqrt(sum of squares) over the first axis of a `Norm`."""
    mantissa, exponent = norms.mantissa, norms.exponent
    # NaN and inf count as alive: with exponent 0 they need no place of their own
    alive = mantissa != 0
    lowest = jnp.iinfo(jnp.int32).min // 2
    largest = jnp.max(
        jnp.where(alive, exponent, jnp.asarray(lowest, jnp.int32)), axis=0, initial=lowest
    )
    common = jnp.where(jnp.any(alive, axis=0), largest, 0)
    negligible = -2000 if mantissa.dtype == jnp.float64 else -250
    part = times_power(mantissa, jnp.maximum(exponent - common[None], negligible))
    part = jnp.where(jnp.isfinite(mantissa), part, mantissa)
    return Norm(jnp.sqrt(jnp.sum(jnp.square(part), axis=0)), common)


# Scaling of arrays


def multiply(x: Array, factor: Norm, shrinks: bool = False) -> Array:
    """x * mantissa * 2^exponent in the dtype of `x`, right wherever the result is a normal number.

    Args:
      x: real or complex floating array, finite.
      factor: broadcasts against `x`; it may lie outside the range of the dtype.
      shrinks: whether the factor is known to be at most 1 wherever the result is used. Then no
        subnormal number can become a normal one, the pass over `x` that looks for them is left
        out, and XLA fuses the product with what surrounds it.
    """
    wide = widen(x)
    factor = normal(Norm(factor.mantissa.astype(wide.dtype), factor.exponent))
    if jnp.iscomplexobj(x) and factor.mantissa.ndim:
        factor = jax.tree.map(lambda part: part[..., None], factor)
    # the unit lies in [1, 2) or [1/2, 1), so that only the result may leave the range of the dtype
    grows = factor.exponent > 0
    unit = jnp.where(grows, 2 * factor.mantissa, factor.mantissa)
    exponent = factor.exponent - grows.astype(jnp.int32)
    value = wide
    if not shrinks:
        value, exponent = countable(wide, exponent)
    out = times_power(value * unit, _limited(exponent, wide.dtype))
    if jnp.iscomplexobj(x):
        out = lax.complex(out[..., 0], out[..., 1])
    return out.astype(jnp.asarray(x).dtype)


def assemble(x: Array, exponent: Array) -> Array:
    """x * 2^exponent of a real float32 or float64 array, subnormal results included.

    A subnormal result is put together as the integer that its bits are, since arithmetic would
    flush it to zero.
    """
    f = _format(x.dtype)
    mantissa, exponent = normal(Norm(x, exponent))
    is_subnormal = (exponent < 2 - f.bias) & jnp.isfinite(x)
    place = jnp.clip(exponent + f.bias - 1 + f.significand, -2, f.significand + 1)
    integer = jnp.round(jnp.abs(times_power(mantissa, place))).astype(f.bits)
    subnormal = lax.bitcast_convert_type(jnp.where(is_subnormal, integer, 0), x.dtype)
    plain = times_power(mantissa, _limited(exponent, x.dtype))
    return jnp.where(is_subnormal, jnp.copysign(subnormal, x), plain)


def normalize(tree: PyTree) -> tuple[PyTree, Array]:
    """(tree * 2^-exponent, exponent) with the largest magnitude in [1/2, 1): exact, dtypes kept.

    Zero and non-finite trees are returned as they are, with exponent 0.
    """
    largest = [array_norm_max(x) for x in jax.tree.leaves(tree) if jnp.size(x)]
    exponent = jnp.zeros((), jnp.int32)
    if largest:
        is_finite = jnp.all(jnp.stack([jnp.isfinite(n.mantissa) for n in largest]))
        lowest = jnp.asarray(jnp.iinfo(jnp.int32).min, jnp.int32)
        top = jnp.max(jnp.stack([jnp.where(n.mantissa > 0, n.exponent, lowest) for n in largest]))
        exponent = jnp.where(is_finite & (top > lowest), top, 0)
    factor = Norm(jnp.ones((), jnp.float32), -exponent)
    return jax.tree.map(lambda x: multiply(x, factor), tree), exponent


def to_unit(x: Array) -> tuple[Array, Array]:
    """(x * 2^-e, e) in float32 with the largest finite magnitude in [1, 2); inf and NaN pass.

    Cheap to compile: no branch, one pass for the largest bit pattern. Subnormal entries are flushed
    to zero. Of a complex array the magnitudes are taken.
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


def array_log_rms(x: Array, axes: Any = None) -> Array:
    """Natural log of the root mean square over `axes`, float32, by one `to_unit` of the array.

    -inf for zeros, inf or NaN where an entry is. Groups more than 2^63 below the array's largest
    entry lose digits; `gradjax.core.scale.flat_norms` gives each group its own exponent.
    """
    y, exponent = to_unit(x)
    return 0.5 * jnp.log(jnp.mean(y * y, axis=axes)) + exponent.astype(jnp.float32) * LOG2
