"""Overflow-safe norms: a norm is carried as (mantissa, exponent), ||x|| = mantissa * 2^exponent.

The square of a float32 above 1.8e19 is inf and below 1e-23 is 0, so sqrt(sum(x^2)) is wrong over half of the range
that a float32 has. Here every group of numbers is first multiplied by the power of two that brings its largest
magnitude into [1/2, 1): exact, no division (`x / 1e38` would multiply by a reciprocal that flushes to zero), no
overflow. The logarithm of the norm then exists for every finite group, and `multiply` applies a factor
mantissa * 2^exponent that may itself lie outside the range of a float.

Subnormal numbers are flushed to zero by XLA's arithmetic on CPU, but not by its integers: the largest magnitude is
found among the bit patterns, and where it is tiny the group is first lifted out of the subnormal range through them.
So norms are right from 1.4e-45 to 3.4e38 in float32 and bfloat16 (float16 and float64 alike), eagerly and under jit.

None of that is needed where the plain sum of squares lies in [2^-60, inf): nothing overflowed, and the squares that
were flushed, each below 2^-126, do not count. So that sum is tried first, and the rest is a branch that is rarely
taken; it stays a branch under vmap, taken if any lane needs it, while each lane's value is its own.

Half-precision leaves are computed in float32, complex ones as their two parts. A group that holds NaN has the norm NaN,
one that holds inf (and no NaN) inf. Cost: one pass over the tree; three to four more for groups whose sum of squares is
0, tiny or not finite.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

PyTree = Any
Axis = int | Sequence[int] | None

LOG2 = 0.6931471805599453
_SAFE = 2.0**-60  # from here on a sum of squares has lost nothing to underflow (for up to 2^40 terms)
_LIFT = 64  # tiny groups are multiplied by 2^64, which takes the smallest subnormal float32 to 2^-85


class Norm(NamedTuple):
    """A non-negative number mantissa * 2^exponent; mantissa is 0, inf or NaN where the number is."""

    mantissa: Array  # float32, or float64 for float64 input
    exponent: Array  # int32


class _Format(NamedTuple):
    """IEEE 754 binary format: the integer type of its bits, stored bits of the significand, exponent bias."""

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
        raise ValueError(f"scale: got a leaf {x.shape} {x.dtype}; norms need real or complex floating arrays.")
    if x.dtype == jnp.bfloat16:  # the upper half of a float32; a conversion would flush subnormals
        x = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16, jnp.float32)
    elif x.dtype != jnp.float64:
        x = x.astype(jnp.float32)
    return x


@jax.custom_batching.custom_vmap
def _any_lane(flag: Array) -> Array:
    """`flag`; under vmap whether any lane's holds, one value for all lanes, so that a `lax.cond` on it stays one."""
    return flag


@_any_lane.def_vmap
def _(axis_size: int, in_batched: list[bool], flag: Array) -> tuple[Array, bool]:
    return _any_lane(jnp.any(flag, axis=0)), False


def _wide(x: Any) -> tuple[Array, Array]:
    """`x` widened, and the bit patterns of its magnitudes."""
    x = widen(x)
    f = _format(x.dtype)
    mask = _int((1 << (f.significand + 8 if f.bias == 127 else 63)) - 1, f)
    return x, lax.bitcast_convert_type(x, f.bits) & mask


def _power(exponent: Array, dtype: Any) -> Array:
    """2^exponent for exponents of normal numbers; 0 below them."""
    f = _format(dtype)
    biased = exponent.astype(f.bits) + _int(f.bias, f)
    return lax.bitcast_convert_type(jnp.clip(biased, 0, 2 * f.bias) << _int(f.significand, f), dtype)


def _times_power(x: Array, exponent: Array) -> Array:
    """x * 2^exponent, exact where the result is normal, in two factors that are each normal (|exponent| <= 2 bias)."""
    half = exponent >> 1
    return x * _power(half, x.dtype) * _power(exponent - half, x.dtype)


def _lifted(x: Array, bits: Array) -> Array:
    """x * 2^64 exactly, for |x| < 1/2: a subnormal's bits are an integer, and converting that flushes nothing."""
    f = _format(x.dtype)
    integer = bits.astype(x.dtype)
    subnormal = integer * jnp.asarray(2.0 ** (_LIFT + 1 - f.bias - f.significand), x.dtype)
    subnormal = jnp.where(jnp.signbit(x), -subnormal, subnormal)
    is_subnormal = bits < _int(1 << f.significand, f)
    return jnp.where(is_subnormal, subnormal, x * jnp.asarray(2.0**_LIFT, x.dtype))


def _top(bits: Array, axis: Axis) -> Array:
    return jnp.max(bits, axis=axis, keepdims=True, initial=0)


def _exponent(top: Array, dtype: Any) -> Array:
    """The e with 2^(e-1) <= largest magnitude < 2^e of normal magnitudes; 0 for zero and non-finite ones."""
    f = _format(dtype)
    biased = top >> _int(f.significand, f)
    return jnp.where((biased == 0) | (biased > 2 * f.bias), 0, biased - f.bias + 1).astype(jnp.int32)


def _is_tiny(top: Array, dtype: Any) -> Array:
    """Whether a group may hold subnormal numbers that matter beside its largest magnitude."""
    f = _format(dtype)
    return top < _int((f.bias - 64) << f.significand, f)


# The branches of a `lax.cond` are functions of the module: as lambdas they would be compiled anew at every eager call.
def _lift_where(x: Array, bits: Array, tiny: Array) -> Array:
    return jnp.where(tiny, _lifted(x, bits), x)


def _leave(x: Array, bits: Array, tiny: Array) -> Array:
    return x


def _lift_if_tiny(x: Array, bits: Array, top: Array) -> tuple[Array, Array, Array]:
    """(x, top, shift) with x * 2^shift in place of x where the group is tiny (the branch is rarely taken)."""
    f, tiny = _format(x.dtype), _is_tiny(top, x.dtype)
    tiny_like = jnp.broadcast_to(tiny, x.shape) if tiny.ndim == x.ndim else tiny
    if x.ndim == 0:
        x = _lift_where(x, bits, tiny)
    else:
        x = lax.cond(_any_lane(jnp.any(tiny)), _lift_where, _leave, x, bits, tiny_like)
    top_value = lax.bitcast_convert_type(top, x.dtype)
    lifted_top = lax.bitcast_convert_type(_lifted(top_value, top), f.bits)
    return x, jnp.where(tiny, lifted_top, top), jnp.where(tiny, _LIFT, 0).astype(jnp.int32)


def _mantissa(sum_of_squares: Array, top: Array) -> Array:
    """The root, or inf and NaN where the largest bit pattern is theirs (computed, they would spread over the group)."""
    f = _format(sum_of_squares.dtype)
    infinity = _int((2 * f.bias + 1) << f.significand, f)
    root = jnp.sqrt(sum_of_squares)
    root = jnp.where(top == infinity, jnp.asarray(jnp.inf, root.dtype), root)
    return jnp.where(top > infinity, jnp.asarray(jnp.nan, root.dtype), root)


def _axes(x: Any, axis: Axis) -> tuple[int, ...]:
    axes = range(jnp.ndim(x)) if axis is None else (axis,) if isinstance(axis, int) else axis
    return tuple(a % jnp.ndim(x) for a in axes)


def _sum_of_squares(x: Array, axes: tuple[int, ...]) -> Array:
    """Kept at length 1 over `axes`; whatever overflows or underflows does."""
    if jnp.iscomplexobj(x):
        squares = jnp.square(x.real) + jnp.square(x.imag)
    else:
        squares = jnp.square(x if x.dtype == jnp.float64 else x.astype(jnp.float32))
    return jnp.sum(squares, axis=axes, keepdims=True)


def _scaled_norm(x: Array, axes: tuple[int, ...]) -> Norm:
    """By scaling with a power of two, right for every input; kept at length 1 over `axes`."""
    wide, bits = _wide(x)
    inner = (*axes, x.ndim) if wide.ndim > x.ndim else axes
    top = _top(bits, inner)
    lifted, top_lifted, shift = _lift_if_tiny(wide, bits, top)
    exponent = _exponent(top_lifted, wide.dtype)
    squares = jnp.square(_times_power(lifted, -exponent))
    mantissa = _mantissa(jnp.sum(squares, axis=inner, keepdims=True), top)
    exponent = jnp.where(top == 0, 0, exponent - shift)
    shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    return Norm(mantissa.reshape(shape), exponent.reshape(shape))


def _is_safe(sums: Array) -> Array:
    return (sums >= _SAFE) & (sums < jnp.inf)


def _norms(arrays: tuple[Array, ...], axes: tuple[tuple[int, ...], ...], union: bool) -> Norm:
    sums = [_sum_of_squares(*each).ravel() for each in zip(arrays, axes, strict=True)]
    dtype = max((x.dtype for x in sums), key=lambda dtype: dtype.itemsize)
    sizes = np.cumsum([0] + [x.size for x in sums])
    flat = jnp.concatenate([x.astype(dtype) for x in sums])
    total = jnp.sum(flat, keepdims=True) if union else flat
    root = jnp.sqrt(jnp.where(_is_safe(total), total, 1))
    exponent = _exponent(lax.bitcast_convert_type(root, _format(dtype).bits), dtype)
    plain = Norm(root * _power(-exponent, dtype), exponent)

    def careful(i):
        value = _scaled_norm(arrays[i], axes[i])
        return Norm(value.mantissa.ravel().astype(dtype), value.exponent.ravel())

    def group(i):
        """The groups of array i: those that are safe as they are, the others by scaling."""
        part = slice(int(sizes[i]), int(sizes[i + 1]))
        safe = _is_safe(flat[part])
        kept = Norm(plain.mantissa[part], plain.exponent[part])
        choose = lambda: jax.tree.map(lambda a, b: jnp.where(safe, a, b), kept, careful(i))
        return lax.cond(_any_lane(jnp.any(~safe)), choose, lambda: kept)

    def all_careful():
        if not union:
            parts = [group(i) for i in range(len(arrays))]
            return Norm(jnp.concatenate([p.mantissa for p in parts]), jnp.concatenate([p.exponent for p in parts]))
        each = [careful(i) for i in range(len(arrays))]
        value = jax.tree.map(lambda x: x.reshape(1), combine(each))
        return jax.tree.map(lambda a, b: jnp.where(_is_safe(total), a, b), plain, value)

    # a loop of none or one turn: XLA copies the operands of a `cond`, and those of a loop it does not change stay put
    unsafe = _any_lane(jnp.any(~_is_safe(total)))
    start = (unsafe, *plain)
    _, mantissa, exponent = lax.while_loop(lambda c: c[0], lambda c: (jnp.zeros_like(c[0]), *all_careful()), start)
    return Norm(mantissa, exponent)


_norms = jax.custom_jvp(jax.jit(_norms, static_argnums=(1, 2)), nondiff_argnums=(1, 2))


@_norms.defjvp
def _(axes, union, primals, tangents):
    """d||x|| = Re<x, dx> / ||x||, with x scaled by the exponent of its norm."""
    (arrays,), (tangents,) = primals, tangents
    value, out, start = _norms(arrays, axes, union), [], 0
    for x, dx, inner in zip(arrays, tangents, axes, strict=True):
        shape = tuple(1 if a in inner else n for a, n in enumerate(x.shape))
        part = slice(0, 1) if union else slice(start, start := start + math.prod(shape))
        m, e = value.mantissa[part], value.exponent[part]
        m, e = (y.reshape((1,) * x.ndim if union else shape) for y in (m, e))
        product = sum(
            _times_power(a.astype(m.dtype), -e) * (b.astype(m.dtype) / m)
            for a, b in (((x.real, dx.real), (x.imag, dx.imag)) if jnp.iscomplexobj(x) else ((x, dx),))
        )
        out.append(_times_power(jnp.sum(product, axis=inner, keepdims=True), -e).ravel())
    tangent = sum(out[1:], out[0]) if union else jnp.concatenate(out)
    return value, Norm(tangent, np.zeros(value.exponent.shape, jax.dtypes.float0))  # type: ignore[arg-type]


def _checked(arrays: Sequence[Any]) -> tuple[Array, ...]:
    arrays = tuple(jnp.asarray(x) for x in arrays)
    for x in arrays:
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise ValueError(f"scale: got a leaf {x.shape} {x.dtype}; norms need real or complex floating arrays.")
    return arrays


def flat_norms(arrays: Sequence[Any], axes: Sequence[Axis]) -> Norm:
    """The norms of the groups of several arrays one after the other, cheaper than `array_norm` of each.

    Args:
      arrays: n real or complex floating arrays.
      axes: n times the axes of one group, as in `array_norm`.

    Returns:
      `Norm` of shape (all groups,), each array's raveled; in the widest dtype.
    """
    arrays = _checked(arrays)
    if not arrays:
        return Norm(jnp.zeros(0, jnp.float32), jnp.zeros(0, jnp.int32))
    return _norms(arrays, tuple(_axes(*each) for each in zip(arrays, axes, strict=True)), False)


def array_norm(x: Any, axis: Axis = None) -> Norm:
    """Euclidean norm of an array over `axis` (all axes by default), with the reduced axes kept at length 1.

    Args:
      x: real or complex floating array.
      axis: the axes of one group, e.g. all but the first for the layers of a scanned stack.

    Returns:
      `Norm` of the shape of `x` with the axes of the group at length 1, or of shape () for all axes.
    """
    value, axes = flat_norms([x], [axis]), _axes(x, axis)
    shape = () if axis is None else tuple(1 if a in axes else n for a, n in enumerate(jnp.shape(x)))
    return Norm(value.mantissa.reshape(shape), value.exponent.reshape(shape))


def norm(tree: PyTree) -> Norm:
    """Euclidean norm of all leaves of a pytree: ||tree|| = mantissa * 2^exponent.

    Args:
      tree: pytree of real or complex floating arrays of any shapes and dtypes; empty trees have the norm 0.

    Returns:
      mantissa: () float32 (float64 if a leaf is), in [1/2, sqrt(size)); 0, inf or NaN where the norm is.
      exponent: () int32.
    """
    leaves = _checked([x for x in jax.tree.leaves(tree) if jnp.size(x)])
    if not leaves:
        return Norm(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))
    value = _norms(leaves, tuple(_axes(x, None) for x in leaves), True)
    return Norm(value.mantissa[0], value.exponent[0])


def combine(norms: Sequence[Norm]) -> Norm:
    """Norm of the union of groups of equal shape, sqrt(sum of squares), from their norms.

    >>> import jax.numpy as jnp
    >>> combine([array_norm(jnp.full(9, 1e38)), array_norm(jnp.full(16, 1e38))]).exponent.item()   # 5e38 < 2^129
    127
    """
    dtype = max((n.mantissa.dtype for n in norms), key=lambda dtype: dtype.itemsize)
    return union(Norm(jnp.stack([n.mantissa.astype(dtype) for n in norms]), jnp.stack([n.exponent for n in norms])))


def union(norms: Norm) -> Norm:
    """`combine` over the first axis of a `Norm`."""
    mantissa, exponent = norms
    alive = mantissa != 0  # NaN and inf too: with exponent 0 they need no place of their own
    lowest = jnp.asarray(jnp.iinfo(jnp.int32).min // 2, jnp.int32)
    largest = jnp.max(jnp.where(alive, exponent, lowest), axis=0, initial=jnp.iinfo(jnp.int32).min // 2)
    shared = jnp.where(jnp.any(alive, axis=0), largest, 0)
    part = _times_power(
        mantissa, jnp.maximum(exponent - shared[None], -2000 if mantissa.dtype == jnp.float64 else -250)
    )
    part = jnp.where(jnp.isfinite(mantissa), part, mantissa)
    return Norm(jnp.sqrt(jnp.sum(jnp.square(part), axis=0)), shared)


def of_number(value: Any, dtype: Any = jnp.float32) -> Norm:
    """A non-negative number, traced or not, as a `Norm` with mantissa in [1/2, 1)."""
    return array_norm_max(jnp.asarray(value, dtype))


def greater(a: Norm, b: Norm) -> Array:
    """a > b without leaving (mantissa, exponent); False where either is NaN."""
    dtype = a.mantissa.dtype
    (m, e), (n, f) = ((jnp.frexp(x.mantissa)) for x in (a, b))
    gap = jnp.clip(e.astype(jnp.int32) + a.exponent - f.astype(jnp.int32) - b.exponent, -4, 4)
    return _times_power(m, gap) > n.astype(dtype)  # normalised mantissas differ by less than 2 ** 2


def divide(a: Norm, b: Norm) -> Norm:
    """a / b, for a factor to `multiply` with."""
    return Norm(a.mantissa.astype(b.mantissa.dtype) / b.mantissa, a.exponent - b.exponent)


def normal(value: Norm) -> Norm:
    """The same number with mantissa in [1/2, 1) (or minus that), exponent 0 where it is zero."""
    mantissa, shift = jnp.frexp(value.mantissa)
    return Norm(mantissa, jnp.where(mantissa == 0, 0, value.exponent + shift.astype(jnp.int32)))


def times(*factors: Norm) -> Norm:
    """The product of numbers of either sign."""
    mantissa, exponent = factors[0]
    for factor in factors[1:]:
        mantissa, exponent = mantissa * factor.mantissa.astype(mantissa.dtype), exponent + factor.exponent
    return normal(Norm(mantissa, exponent))


def plus(a: Norm, b: Norm) -> Norm:
    """a + b of numbers of either sign."""
    a, b = normal(a), normal(b)
    larger = jnp.where(b.mantissa == 0, a.exponent, jnp.maximum(a.exponent, b.exponent))
    shared = jnp.where(a.mantissa == 0, b.exponent, larger)
    part = lambda x: _times_power(x.mantissa, jnp.clip(x.exponent - shared, -100, 0))
    return normal(Norm(part(a) + part(b).astype(a.mantissa.dtype), shared))


def minus(a: Norm, b: Norm) -> Norm:
    """a - b of numbers of either sign."""
    return plus(a, Norm(-b.mantissa, b.exponent))


def log2(value: Norm) -> Array:
    """Base-2 logarithm of a `Norm`: -inf for zero, inf and NaN as they are."""
    return jnp.log2(value.mantissa) + value.exponent.astype(value.mantissa.dtype)


def log_norm(tree: PyTree) -> Array:
    """Natural logarithm of the Euclidean norm of a pytree; -inf for zeros, and never an overflow.

    >>> import jax.numpy as jnp
    >>> round(float(log_norm({"w": jnp.full(4, 1e38)})) / jnp.log(10.0).item(), 3)   # log10 of 2e38
    38.301
    """
    value = norm(tree)
    return jnp.log(value.mantissa) + value.exponent.astype(value.mantissa.dtype) * LOG2


def log_rms(tree: PyTree) -> Array:
    """Natural logarithm of the root mean square over all entries of a pytree."""
    size = max(sum(jnp.size(x) for x in jax.tree.leaves(tree)), 1)
    value = log_norm(tree)
    return value - 0.5 * jnp.log(jnp.asarray(size, value.dtype))


def multiply(x: Array, factor: Norm, shrinks: bool = False) -> Array:
    """x * mantissa * 2^exponent in the dtype of `x`, right wherever the result is a normal number.

    Args:
      x: real or complex floating array, finite.
      factor: broadcasts against `x`; it may lie outside the range of the dtype.
      shrinks: whether the factor is known to be at most 1 wherever the result is used. Then no subnormal number can
        become a normal one, the pass over `x` that looks for them is left out, and the product is one that XLA fuses.
    """
    wide, bits = _wide(x)
    mantissa, exponent = factor.mantissa.astype(wide.dtype), factor.exponent
    if wide.ndim > jnp.ndim(x) and mantissa.ndim:  # complex
        mantissa, exponent = mantissa[..., None], exponent[..., None]
    unit, shift = jnp.frexp(mantissa)
    exponent = exponent + shift.astype(jnp.int32)
    if not shrinks:
        wide, _, lift = _lift_if_tiny(wide, bits, _top(bits, None).reshape(()))
        exponent = exponent - lift
    limit = 2 * _format(wide.dtype).bias
    out = _times_power(wide * unit, jnp.clip(exponent, -limit, limit))
    if jnp.iscomplexobj(x):
        return lax.complex(out[..., 0], out[..., 1]).astype(jnp.asarray(x).dtype)
    return out.astype(jnp.asarray(x).dtype)


def assemble(x: Array, exponent: Array) -> Array:
    """x * 2^exponent of a real float32 or float64 array, subnormal results included.

    A subnormal result is put together as the integer that its bits are, since arithmetic would flush it to zero.
    """
    f = _format(x.dtype)
    mantissa, shift = jnp.frexp(x)
    exponent = exponent + shift.astype(jnp.int32)  # |mantissa| in [1/2, 1)
    is_subnormal = (exponent < 2 - f.bias) & jnp.isfinite(x)
    place = jnp.clip(exponent + f.bias - 1 + f.significand, -2, f.significand + 1)
    integer = jnp.round(jnp.abs(_times_power(mantissa, place))).astype(f.bits)
    subnormal = lax.bitcast_convert_type(jnp.where(is_subnormal, integer, 0), x.dtype)
    limit = 2 * f.bias
    normal = _times_power(mantissa, jnp.clip(exponent, -limit, limit))
    return jnp.where(is_subnormal, jnp.copysign(subnormal, x), normal)


def normalize(tree: PyTree) -> tuple[PyTree, Array]:
    """(tree * 2^-exponent, exponent) with the largest magnitude in [1/2, 1): exact, dtypes kept.

    Zero and non-finite trees are returned as they are, with exponent 0.
    """
    leaves = [x for x in jax.tree.leaves(tree) if jnp.size(x)]
    norms = [array_norm_max(x) for x in leaves]
    exponent = jnp.zeros((), jnp.int32)
    if norms:
        finite = jnp.all(jnp.stack([jnp.isfinite(n.mantissa) for n in norms]))
        lowest = jnp.asarray(jnp.iinfo(jnp.int32).min, jnp.int32)
        largest = jnp.max(jnp.stack([jnp.where(n.mantissa > 0, n.exponent, lowest) for n in norms]))
        exponent = jnp.where(finite & (largest > lowest), largest, 0)
    one = jnp.ones((), jnp.float32)
    return jax.tree.map(lambda x: multiply(x, Norm(one, -exponent)), tree), exponent


def array_norm_max(x: Any) -> Norm:
    """The largest magnitude of an array (of a complex one: of its parts), with mantissa in [1/2, 1)."""
    wide, bits = _wide(x)
    top = _top(bits, None).reshape(())
    value, top_lifted, shift = _lift_if_tiny(lax.bitcast_convert_type(top, wide.dtype), top, top)
    exponent = _exponent(top_lifted, wide.dtype)
    return Norm(_mantissa(jnp.square(_times_power(value, -exponent)), top), jnp.where(top == 0, 0, exponent - shift))
