"""Overflow-safe norms: a norm is carried as (mantissa, exponent), ||x|| = mantissa * 2^exponent.

The square of a float32 above 1.8e19 is inf and below 1e-23 is 0, so sqrt(sum(x^2)) is wrong over
half of the range that a float32 has. Here every group of numbers is first multiplied by the power
of two that brings its largest magnitude into [1/2, 1): exact, no division (`x / 1e38` would
multiply by a reciprocal that flushes to zero), no overflow. The logarithm of the norm then exists
for every finite group, and `multiply` applies a factor mantissa * 2^exponent that may itself lie
outside the range of a float.

Subnormal numbers are flushed to zero by XLA's arithmetic on CPU, but not by its integers: the
largest magnitude is found among the bit patterns, and where it is tiny the group is first lifted
out of the subnormal range through them. So norms are right from 1.4e-45 to 3.4e38 in float32 and
bfloat16 (float16 and float64 alike), eagerly and under jit.

None of that is needed where the plain sum of squares lies in [2^-60, 2^126): nothing overflowed,
and the squares that were flushed, each below 2^-126, do not count. So that sum is tried first, and
the rest is a branch that is rarely taken; it stays a branch under vmap, taken if any lane needs it,
while each lane's value is its own. The last sums and the root carry what their roundings lost
(`Norm.low`), so that an update that is clipped is rounded twice only.

Half-precision leaves are computed in float32, complex ones as their two parts. A group that holds
NaN has the norm NaN, one that holds inf (and no NaN) inf. Cost: one pass over the tree; three to
four more for groups whose sum of squares is 0, tiny or not finite.
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
_SAFE = (
    2.0**-60,
    2.0**126,
)  # a sum of squares in between has lost nothing to underflow (for up to 2^40 terms)
_LANES = 32  # partial sums of a large group, which are then added up without a rounding


class Norm(NamedTuple):
    """A non-negative number (mantissa + low) * 2^exponent; mantissa is 0, inf or NaN where the
    number is.
    """

    mantissa: Array  # float32, or float64 for float64 input
    exponent: Array  # int32
    low: Any = None  # what the rounding of the mantissa lost, where it is known


class _Format(NamedTuple):
    """IEEE 754 binary format: the integer type of its bits, stored bits of the significand,
    exponent bias.
    """

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
    if x.dtype == jnp.bfloat16:  # the upper half of a float32; a conversion would flush subnormals
        x = lax.bitcast_convert_type(
            lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16, jnp.float32
        )
    elif x.dtype != jnp.float64:
        x = x.astype(jnp.float32)
    return x


@jax.custom_batching.custom_vmap
def _any_lane(flag: Array) -> Array:
    """`flag`; under vmap whether any lane's holds, one value for all lanes, so that a `lax.cond` on
    it stays one.
    """
    return flag


@_any_lane.def_vmap
def _(axis_size: int, in_batched: list[bool], flag: Array) -> tuple[Array, bool]:
    return _any_lane(jnp.any(flag, axis=0)), False


def _bits(x: Array) -> Array:
    """The bit patterns of the magnitudes of a float32 or float64 array."""
    f = _format(x.dtype)
    return lax.bitcast_convert_type(x, f.bits) & _int(
        (1 << (f.significand + 8 if f.bias == 127 else 63)) - 1, f
    )


def _power(exponent: Array, dtype: Any) -> Array:
    """2^exponent for exponents of normal numbers; 0 below them."""
    f = _format(dtype)
    biased = exponent.astype(f.bits) + _int(f.bias, f)
    return lax.bitcast_convert_type(
        jnp.clip(biased, 0, 2 * f.bias) << _int(f.significand, f), dtype
    )


def _times_power(x: Array, exponent: Array) -> Array:
    """x * 2^exponent, exact where the result is normal, in two factors that are each normal
    (|exponent| <= 2 bias).
    """
    half = exponent >> 1
    return x * _power(half, x.dtype) * _power(exponent - half, x.dtype)


def _exponent(bits: Array, dtype: Any) -> Array:
    """The e with 2^(e-1) <= magnitude < 2^e of normal magnitudes; 0 for zero, subnormal and
    non-finite ones.
    """
    f = _format(dtype)
    biased = bits >> _int(f.significand, f)
    return jnp.where((biased == 0) | (biased > 2 * f.bias), 0, biased - f.bias + 1).astype(
        jnp.int32
    )


def _height(bits: Array, dtype: Any) -> Array:
    """`_exponent` of subnormal magnitudes too; -5000 for zero."""
    f = _format(dtype)
    count = lax.bitcast_convert_type(
        bits.astype(dtype), f.bits
    )  # a subnormal's bits are an integer
    subnormal = jnp.where(bits == 0, -5000, _exponent(count, dtype) + 1 - f.bias - f.significand)
    return jnp.where(bits < _int(1 << f.significand, f), subnormal, _exponent(bits, dtype))


def _countable(x: Array, exponent: Array) -> tuple[Array, Array]:
    """(y, e) with y * 2^e = x * 2^exponent and y normal: converting a subnormal's bits to a number
    flushes nothing.
    """
    f, bits = _format(x.dtype), _bits(x)
    is_subnormal = bits < _int(1 << f.significand, f)
    value = jnp.where(is_subnormal, jnp.copysign(bits.astype(x.dtype), x), x)
    return value, jnp.where(is_subnormal, exponent + (1 - f.bias - f.significand), exponent)


def _limited(exponent: Array, dtype: Any) -> Array:
    limit = 2 * _format(dtype).bias
    return jnp.clip(exponent, -limit, limit)


def _axes(x: Any, axis: Axis) -> tuple[int, ...]:
    axes = range(jnp.ndim(x)) if axis is None else (axis,) if isinstance(axis, int) else axis
    return tuple(sorted(a % jnp.ndim(x) for a in axes))


# -- sums of squares, and their roots, each as an unevaluated sum of two floats --------------------------


def _add(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    total = a[0] + b[0]
    part = total - a[0]
    return total, (a[0] - (total - part)) + (b[0] - part) + a[1] + b[1]


def _total(pair: Any, axes: tuple[int, ...]) -> tuple[Array, Array]:
    zero = jnp.zeros((), pair[0].dtype)
    return lax.reduce(pair, (zero, zero), _add, axes)  # type: ignore[return-value]


def _product(a: Array, b: Array) -> tuple[Array, Array]:
    """a * b and what its rounding lost (Dekker 1971)."""
    exponent, significand = (11, 26) if a.dtype == jnp.float64 else (8, 11)
    (ah, al), (bh, bl) = (
        (h, x - h) for x in (a, b) for h in [lax.reduce_precision(x, exponent, significand)]
    )
    product = a * b
    return product, ((ah * bh - product) + ah * bl + al * bh) + al * bl


def _sum_of_squares(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """(groups,) twice, of float32 or float64; whatever overflows or underflows does.

    A large group is first summed to some lanes in plain arithmetic, which is the pass that costs time.
    """
    if math.prod(x.shape[a] for a in axes) <= 2 * _LANES:
        pair = _product(x, x)
    else:
        last, size = axes[-1], x.shape[axes[-1]]
        most = min(_LANES, 8192 * math.prod(x.shape[a] for a in axes) // x.size + 1)
        lanes = max(d for d in range(1, most + 1) if size % d == 0)
        x = x.reshape(*x.shape[:last], size // lanes, lanes, *x.shape[last + 1 :])
        partial = jnp.sum(jnp.square(x), axis=axes, keepdims=True)
        pair, axes = (partial, jnp.zeros_like(partial)), (*axes, last + 1)
    return tuple(part.ravel() for part in _total(pair, axes))  # type: ignore[return-value]


def _root(total: Array, low: Array) -> Norm:
    """The root of a sum of squares between 2^-60 and 2^126, or of 0."""
    safe = jnp.where(total > 0, total, 1)
    root = jnp.sqrt(safe)
    square, rest = _product(root, root)
    error = ((safe - square) - rest + low) / (2 * root)
    exponent = _exponent(lax.bitcast_convert_type(root, _format(root.dtype).bits), root.dtype)
    power = _power(-exponent, root.dtype)
    return Norm(
        jnp.where(total > 0, root * power, total), exponent, jnp.where(total > 0, error * power, 0)
    )


def _rows(x: Array, axes: tuple[int, ...]) -> Array:
    """(groups, entries of one), widened."""
    kept = [a for a in range(x.ndim) if a not in axes]
    count = math.prod(x.shape[a] for a in kept)
    rows = widen(jnp.transpose(x, (*kept, *axes)))
    return rows.reshape(count, rows.size // max(count, 1))


def _joined(
    arrays: tuple[Array, ...], axes: Sequence[tuple[int, ...]]
) -> tuple[list, list, np.ndarray]:
    """The same groups with those of small arrays as the rows of one: a program for each leaf
    compiles long.

    Returns:
      the widened arrays; their axes; and the place of every group of the arguments among theirs.
    """
    sizes = [
        math.prod(n for i, n in enumerate(x.shape) if i not in a)
        for x, a in zip(arrays, axes, strict=True)
    ]
    small = [
        k <= 32 and x.size <= 256 * k and x.dtype not in (jnp.float64, jnp.complex128)
        for k, x in zip(sizes, arrays, strict=True)
    ]
    order = sorted(range(len(arrays)), key=lambda i: not small[i])
    ends = np.cumsum([0] + [sizes[i] for i in order])
    place = np.concatenate(
        [np.arange(ends[order.index(i)], ends[order.index(i) + 1]) for i in range(len(arrays))]
    )
    wide = [widen(x) for x, is_small in zip(arrays, small, strict=True) if not is_small]
    inner = [
        (*a, x.ndim) if jnp.iscomplexobj(x) else a
        for x, a, s in zip(arrays, axes, small, strict=True)
        if not s
    ]
    if any(small):
        rows = [_rows(x, a) for x, a, s in zip(arrays, axes, small, strict=True) if s]
        width = max(r.shape[1] for r in rows)
        padded = [jnp.pad(r, ((0, 0), (0, width - r.shape[1]))) for r in rows]
        wide, inner = [jnp.concatenate(padded), *wide], [(1,), *inner]
    return wide, inner, place


def _magnitude(x: Array) -> Norm:
    """|x| entry by entry, exactly, with mantissa in [1/2, 1)."""
    bits = _bits(x)
    value = lax.bitcast_convert_type(bits, x.dtype)
    height = jnp.where(jnp.isfinite(value) & (bits > 0), _height(bits, x.dtype), 0)
    return Norm(_times_power(*_countable(value, -height)), height, jnp.zeros_like(value))


def _norms(arrays: tuple[Array, ...], axes: tuple[tuple[int, ...], ...], union: bool) -> Norm:
    entries = [widen(x).ravel() for x in arrays if not jnp.iscomplexobj(x)]
    if (
        not union
        and not any(axes)
        and len(entries) == len(arrays)
        and len({x.dtype for x in entries}) == 1
    ):
        return _magnitude(jnp.concatenate(entries))
    wide, inner, place = _joined(arrays, axes)
    dtype = max((x.dtype for x in wide), key=lambda dtype: dtype.itemsize)
    join = lambda parts: jnp.concatenate([part.astype(dtype) for part in parts])
    total, low = (join(parts) for parts in zip(*map(_sum_of_squares, wide, inner), strict=True))
    sizes = [
        math.prod(n for i, n in enumerate(x.shape) if i not in a)
        for x, a in zip(wide, inner, strict=True)
    ]
    cuts = np.cumsum([0, *sizes])
    if union:
        total, low = (part[None] for part in _total((total, low), (0,)))
    safe = (total >= _SAFE[0]) & (total < _SAFE[1])
    plain = _root(jnp.where(safe, total, 1), jnp.where(safe, low, 0))

    def tops(i):
        """Per group the height of the largest magnitude, and whether that is 0: finite, 1: inf, 2:
        NaN.
        """
        f, bits = _format(wide[i].dtype), _bits(wide[i])
        top = jnp.max(bits, axis=inner[i], initial=0).ravel()
        infinity = _int((2 * f.bias + 1) << f.significand, f)
        return _height(top, wide[i].dtype), (top >= infinity).astype(jnp.int32) + (
            top > infinity
        ).astype(jnp.int32)

    def scaled_sum(i, height):
        shape = [1 if a in inner[i] else n for a, n in enumerate(wide[i].shape)]
        exponent = jnp.broadcast_to(height, (int(cuts[i + 1] - cuts[i]),)).reshape(shape)
        return _sum_of_squares(
            _times_power(*_countable(wide[i], _limited(-exponent, wide[i].dtype))), inner[i]
        )

    def finish(total, low, height, special):
        value = _root(total.astype(dtype), low.astype(dtype))
        mantissa = jnp.where(
            special == 0, value.mantissa, jnp.where(special == 1, jnp.inf, jnp.nan).astype(dtype)
        )
        finite = (special == 0) & (height > -5000)
        return Norm(
            mantissa, jnp.where(finite, value.exponent + height, 0), jnp.where(finite, value.low, 0)
        )

    def group(i):
        """The groups of array i: those that are safe as they are, the others by scaling."""
        part = slice(int(cuts[i]), int(cuts[i + 1]))
        kept, safe_ones = jax.tree.map(lambda x: x[part], plain), safe[part]

        def careful():
            height, special = tops(i)
            value = finish(*scaled_sum(i, height), height, special)
            return jax.tree.map(lambda a, b: jnp.where(safe_ones, a, b), kept, value)

        return lax.cond(_any_lane(jnp.any(~safe_ones)), careful, lambda: kept)

    def all_careful():
        indices = range(len(wide))
        if not union:
            return jax.tree.map(lambda *parts: jnp.concatenate(parts), *map(group, indices))
        height, special = (
            jnp.max(jnp.concatenate(parts)) for parts in zip(*map(tops, indices), strict=True)
        )
        sums = (
            join(parts) for parts in zip(*(scaled_sum(i, height) for i in indices), strict=True)
        )
        value = finish(*_total(tuple(sums), (0,)), height, special)
        return jax.tree.map(lambda a, b: jnp.where(safe, a, b[None]), plain, value)

    # a loop of none or one turn: XLA copies the operands of a `cond`, and those of a loop it does
    # not change stay put
    start = (_any_lane(jnp.any(~safe)), plain)
    value = lax.while_loop(lambda c: c[0], lambda c: (jnp.zeros_like(c[0]), all_careful()), start)[
        1
    ]
    return (
        value
        if union or np.all(np.diff(place) == 1)
        else jax.tree.map(lambda part: part[place], value)
    )


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
            for a, b in (
                ((x.real, dx.real), (x.imag, dx.imag)) if jnp.iscomplexobj(x) else ((x, dx),)
            )
        )
        out.append(_times_power(jnp.sum(product, axis=inner, keepdims=True), -e).ravel())
    tangent = sum(out[1:], out[0]) if union else jnp.concatenate(out)
    zero = np.zeros(value.exponent.shape, jax.dtypes.float0)
    return value, Norm(tangent, zero, jnp.zeros_like(tangent))  # type: ignore[arg-type]


def _checked(arrays: Sequence[Any]) -> tuple[Array, ...]:
    arrays = tuple(jnp.asarray(x) for x in arrays)
    for x in arrays:
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise ValueError(
                f"scale: got a leaf {x.shape} {x.dtype}; norms need real or complex floating arrays."
            )
    return arrays


def flat_norms(arrays: Sequence[Any], axes: Sequence[Axis]) -> Norm:
    """The norms of the groups of several arrays one after the other, cheaper than `array_norm` of
    each.

    Args:
      arrays: n real or complex floating arrays.
      axes: n times the axes of one group, as in `array_norm`.

    Returns:
      `Norm` of shape (all groups,), each array's raveled; in the widest dtype.
    """
    arrays = _checked(arrays)
    if not arrays:
        return Norm(jnp.zeros(0, jnp.float32), jnp.zeros(0, jnp.int32), jnp.zeros(0, jnp.float32))
    return _norms(arrays, tuple(_axes(*each) for each in zip(arrays, axes, strict=True)), False)


def split(flat: PyTree, arrays: Sequence[Any], axes: Sequence[Axis]) -> list[PyTree]:
    """What `flat_norms` of the same arguments returned (or any tree of its shape) for each array,
    all axes kept.
    """
    start, found = 0, []
    for x, axis in zip(arrays, axes, strict=True):
        inner = _axes(x, axis)
        shape = tuple(1 if a in inner else n for a, n in enumerate(jnp.shape(x)))
        part, start = slice(start, start + math.prod(shape)), start + math.prod(shape)
        found.append(jax.tree.map(lambda y, part=part, shape=shape: y[part].reshape(shape), flat))
    return found


def array_norms(arrays: Sequence[Any], axes: Sequence[Axis]) -> list[Norm]:
    """`array_norm` of each, all axes kept, cheaper than one by one."""
    return split(flat_norms(arrays, axes), arrays, axes)


def array_norm(x: Any, axis: Axis = None) -> Norm:
    """Euclidean norm of an array over `axis` (all axes by default), with the reduced axes kept at
    length 1.

    Args:
      x: real or complex floating array.
      axis: the axes of one group, e.g. all but the first for the layers of a scanned stack.

    Returns:
      `Norm` of the shape of `x` with the axes of the group at length 1, or of shape () for all
      axes.
    """
    value = array_norms([x], [axis])[0]
    return jax.tree.map(lambda part: part.reshape(()), value) if axis is None else value


def norm(tree: PyTree) -> Norm:
    """Euclidean norm of all leaves of a pytree: ||tree|| = mantissa * 2^exponent.

    Args:
      tree: pytree of real or complex floating arrays of any shapes and dtypes; empty trees have the
        norm 0.

    Returns:
      mantissa: () float32 (float64 if a leaf is), in [1/2, sqrt(size)); 0, inf or NaN where the
        norm is.
      exponent: () int32.
    """
    leaves = _checked([x for x in jax.tree.leaves(tree) if jnp.size(x)])
    if not leaves:
        return Norm(
            jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        )
    return jax.tree.map(
        lambda part: part[0], _norms(leaves, tuple(_axes(x, None) for x in leaves), True)
    )


def combine(norms: Sequence[Norm]) -> Norm:
    """Norm of the union of groups of equal shape, sqrt(sum of squares), from their norms.

    >>> import jax.numpy as jnp
    >>> both = combine([array_norm(jnp.full(9, 1e38)), array_norm(jnp.full(16, 1e38))])  # 5e38, beyond float32
    >>> round(log2(both).item(), 3)
    128.555
    """
    dtype = max((n.mantissa.dtype for n in norms), key=lambda dtype: dtype.itemsize)
    return union(
        Norm(
            jnp.stack([n.mantissa.astype(dtype) for n in norms]),
            jnp.stack([n.exponent for n in norms]),
        )
    )


def union(norms: Norm) -> Norm:
    """`combine` over the first axis of a `Norm`."""
    mantissa, exponent = norms.mantissa, norms.exponent
    alive = mantissa != 0  # NaN and inf too: with exponent 0 they need no place of their own
    lowest = jnp.asarray(jnp.iinfo(jnp.int32).min // 2, jnp.int32)
    largest = jnp.max(
        jnp.where(alive, exponent, lowest), axis=0, initial=jnp.iinfo(jnp.int32).min // 2
    )
    shared = jnp.where(jnp.any(alive, axis=0), largest, 0)
    part = _times_power(
        mantissa,
        jnp.maximum(exponent - shared[None], -2000 if mantissa.dtype == jnp.float64 else -250),
    )
    part = jnp.where(jnp.isfinite(mantissa), part, mantissa)
    return Norm(jnp.sqrt(jnp.sum(jnp.square(part), axis=0)), shared)


def of_number(value: Any, dtype: Any = jnp.float32) -> Norm:
    """A non-negative number, traced or not, as a `Norm` with mantissa in [1/2, 1)."""
    return array_norm_max(jnp.asarray(value, dtype))


def greater(a: Norm, b: Norm) -> Array:
    """a > b without leaving (mantissa, exponent); False where either is NaN."""
    a, b = normal(a), normal(b)
    gap = jnp.clip(a.exponent - b.exponent, -4, 4)
    return _times_power(a.mantissa, gap) > b.mantissa.astype(a.mantissa.dtype)  # both in [1/2, 1)


def divide(a: Norm, b: Norm) -> Norm:
    """a / b, for a factor to `multiply` with; rounded once where `low` is known."""
    x, y = a.mantissa.astype(b.mantissa.dtype), b.mantissa
    quotient = x / y
    if a.low is not None or b.low is not None:
        product, rest = _product(quotient, y)
        error = (x - product) - rest
        error = error if a.low is None else error + a.low.astype(y.dtype)
        error = error if b.low is None else error - quotient * b.low
        quotient = quotient + error / y
    return Norm(quotient, a.exponent - b.exponent)


def product(a: Norm, b: Norm) -> Norm:
    """a * b, with what the rounding lost."""
    x, y = a.mantissa.astype(b.mantissa.dtype), b.mantissa
    mantissa, low = _product(x, y)
    low = low if a.low is None else low + a.low.astype(y.dtype) * y
    low = low if b.low is None else low + x * b.low
    return Norm(mantissa, a.exponent + b.exponent, low)


def normal(value: Norm) -> Norm:
    """The same number with mantissa in [1/2, 1) (or minus that), exponent 0 where it is zero;
    without `low`.
    """
    shift = _exponent(_bits(value.mantissa), value.mantissa.dtype)
    exponent = jnp.where(value.mantissa == 0, 0, value.exponent + shift)
    return Norm(_times_power(value.mantissa, -shift), exponent)


def times(*factors: Norm) -> Norm:
    """The product of numbers of either sign."""
    mantissa, exponent = factors[0].mantissa, factors[0].exponent
    for factor in factors[1:]:
        mantissa, exponent = (
            mantissa * factor.mantissa.astype(mantissa.dtype),
            exponent + factor.exponent,
        )
    return normal(Norm(mantissa, exponent))


def plus(a: Norm, b: Norm) -> Norm:
    """a + b of numbers of either sign, each as `normal` returns it."""
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
    wide = widen(x)
    factor = normal(Norm(factor.mantissa.astype(wide.dtype), factor.exponent))
    if wide.ndim > jnp.ndim(x) and factor.mantissa.ndim:  # complex
        factor = jax.tree.map(lambda part: part[..., None], factor)
    grows = (
        factor.exponent > 0
    )  # the unit in [1, 2) or [1/2, 1): only the result may leave the range of the dtype
    unit, exponent = (
        jnp.where(grows, 2 * factor.mantissa, factor.mantissa),
        factor.exponent - grows.astype(jnp.int32),
    )
    value, exponent = (wide, exponent) if shrinks else _countable(wide, exponent)
    out = _times_power(value * unit, _limited(exponent, wide.dtype))
    if jnp.iscomplexobj(x):
        return lax.complex(out[..., 0], out[..., 1]).astype(jnp.asarray(x).dtype)
    return out.astype(jnp.asarray(x).dtype)


def assemble(x: Array, exponent: Array) -> Array:
    """x * 2^exponent of a real float32 or float64 array, subnormal results included.

    A subnormal result is put together as the integer that its bits are, since arithmetic would flush it to zero.
    """
    f = _format(x.dtype)
    mantissa, exponent, _ = normal(Norm(x, exponent))  # |mantissa| in [1/2, 1)
    is_subnormal = (exponent < 2 - f.bias) & jnp.isfinite(x)
    place = jnp.clip(exponent + f.bias - 1 + f.significand, -2, f.significand + 1)
    integer = jnp.round(jnp.abs(_times_power(mantissa, place))).astype(f.bits)
    subnormal = lax.bitcast_convert_type(jnp.where(is_subnormal, integer, 0), x.dtype)
    limit = 2 * f.bias
    plain = _times_power(mantissa, jnp.clip(exponent, -limit, limit))
    return jnp.where(is_subnormal, jnp.copysign(subnormal, x), plain)


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
    """The largest magnitude of an array (of a complex one: of its parts), with mantissa in [1/2,
    1).
    """
    wide = widen(x)
    return _magnitude(
        lax.bitcast_convert_type(jnp.max(_bits(wide), initial=0), wide.dtype)
    )._replace(low=None)
