"""Overflow-safe norms: a norm is carried as (mantissa, exponent), ||x|| = mantissa * 2^exponent.

The square of a float32 above 1.8e19 is inf and below 1e-23 is 0, so sqrt(sum(x^2)) is wrong over
half of the range that a float32 has. The sum S of squares of a group of n numbers is right where

    n 2^30 tiny <= S < 2^126

(float64: n 2^59 tiny and 2^1000), tiny the smallest normal number: nothing overflowed, and the
squares that were flushed, each below tiny, do not count. So that sum is tried first. Any other
group is summed once more after an exact multiplication by 2^90 or 2^-80 (float64: 2^600, 2^-600),
which brings every float, subnormal numbers included, into the range of its square. That branch is
rarely taken; it stays a branch under vmap, taken if any member needs it, while each member's value
is its own. Norms are right from 1.4e-45 to 3.4e38 in float32 and bfloat16 (float16 and float64
alike), eagerly and under jit, and their logarithm exists for every finite group.

Accuracy: that of a plain sum of squares and its root. The tests hold a gradient clipped by such a
norm to 4 ulp of the exact result; groups of many entries add the rounding of their sum.

Half-precision leaves are computed in float32, complex ones as their two parts. A group that holds
NaN has the norm NaN, one that holds inf (and no NaN) inf. Cost: one pass over the tree; one more in
a call in which any group has a sum of squares that is 0, tiny or not finite.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gradjax.core.powers import LOG2 as LOG2
from gradjax.core.powers import Norm as Norm
from gradjax.core.powers import array_log_rms as array_log_rms
from gradjax.core.powers import array_norm_max as array_norm_max
from gradjax.core.powers import assemble as assemble
from gradjax.core.powers import countable, log, magnitude, normal, power, times_power, union, widen
from gradjax.core.powers import divide as divide
from gradjax.core.powers import greater as greater
from gradjax.core.powers import log2 as log2
from gradjax.core.powers import minus as minus
from gradjax.core.powers import multiply as multiply
from gradjax.core.powers import normalize as normalize
from gradjax.core.powers import of_number as of_number
from gradjax.core.powers import plus as plus
from gradjax.core.powers import times as times
from gradjax.core.powers import to_unit as to_unit

PyTree = Any
Axis = int | Sequence[int] | None

_LANES = 32  # partial sums of a large group: XLA vectorises over them, and they round less
_SMALL = 256  # groups of so few entries become the rows of one array


class _Range(NamedTuple):
    """Exponents of two: sums of squares below 2^top are safe; other groups are scaled first."""

    top: int
    up: int
    down: int


_RANGE = {"float32": _Range(126, 90, -80), "float64": _Range(1000, 600, -600)}


class _Groups(NamedTuple):
    """An array (float32 or float64) whose entries along `axes` are one group, many times."""

    x: Array
    axes: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(n for a, n in enumerate(self.x.shape) if a not in self.axes)

    @property
    def size(self) -> int:
        """Entries of one group."""
        return math.prod(self.x.shape[a] for a in self.axes)

    @property
    def low(self) -> float:
        """The sum of squares from which on flushed squares do not count."""
        info = jnp.finfo(self.x.dtype)
        return max(self.size, 1) * 2.0 ** (info.nmant + 7) * float(info.tiny)


@jax.custom_batching.custom_vmap
def _any_member(flag: Array) -> Array:
    """`flag`; under vmap whether it holds for any member, one value for all of them.

    A branch on it stays a branch when it is vmapped.
    """
    return flag


@_any_member.def_vmap
def _(axis_size: int, in_batched: list[bool], flag: Array) -> tuple[Array, bool]:
    return _any_member(jnp.any(flag, axis=0)), False


def _axes(x: Any, axis: Axis) -> tuple[int, ...]:
    if axis is None:
        axis = range(jnp.ndim(x))
    elif isinstance(axis, int):
        axis = (axis,)
    return tuple(sorted(a % jnp.ndim(x) for a in axis))


def _sums_of_squares(groups: _Groups) -> Array:
    """(count,) in the dtype of the array; whatever overflows or underflows does."""
    x, axes = groups
    if groups.size <= 2 * _LANES:
        return jnp.sum(jnp.square(x), axis=axes).ravel()
    last, size = axes[-1], x.shape[axes[-1]]
    most = min(_LANES, 8192 // groups.count + 1)
    lanes = max(d for d in range(1, most + 1) if size % d == 0)
    x = x.reshape(*x.shape[:last], size // lanes, lanes, *x.shape[last + 1 :])
    partial = jnp.sum(jnp.square(x), axis=axes, keepdims=True)
    return jnp.sum(partial, axis=(*axes, last + 1)).ravel()


def _scaled(groups: _Groups, shift: Array) -> _Groups:
    """Each group multiplied by 2^shift, shift (count,) in -600 .. 600."""
    shape = [1 if a in groups.axes else n for a, n in enumerate(groups.x.shape)]
    value, exponent = countable(groups.x, shift.reshape(shape))
    return groups._replace(x=value * power(exponent, value.dtype))


def _rows(x: Array, axes: tuple[int, ...]) -> Array:
    """(groups, entries of one), widened."""
    kept = [a for a in range(x.ndim) if a not in axes]
    count = math.prod(x.shape[a] for a in kept)
    rows = widen(jnp.transpose(x, (*kept, *axes)))
    return rows.reshape(count, rows.size // max(count, 1))


def _joined(
    arrays: tuple[Array, ...], axes: Sequence[tuple[int, ...]]
) -> tuple[list[_Groups], np.ndarray]:
    """The same groups, those of small arrays as the rows of one: a kernel for each compiles long.

    Returns:
      the widened arrays; and the place of every group of the arguments among theirs.
    """
    given = [_Groups(x, inner) for x, inner in zip(arrays, axes, strict=True)]
    is_small = [
        g.count <= _LANES and g.size <= _SMALL and g.x.dtype not in (jnp.float64, jnp.complex128)
        for g in given
    ]
    order = sorted(range(len(given)), key=lambda i: not is_small[i])
    ends = np.cumsum([0] + [given[i].count for i in order])
    place: list[Any] = [None] * len(given)
    for start, i in zip(ends, order, strict=False):
        place[i] = start + np.arange(given[i].count)

    joined = []
    rows = [_rows(*g) for g, small in zip(given, is_small, strict=True) if small]
    if rows:
        width = max(r.shape[1] for r in rows)
        padded = [jnp.pad(r, ((0, 0), (0, width - r.shape[1]))) for r in rows]
        joined.append(_Groups(jnp.concatenate(padded), (1,)))
    for g, small in zip(given, is_small, strict=True):
        if not small:
            # a complex array has its two parts on a new last axis
            inner = (*g.axes, g.x.ndim) if jnp.iscomplexobj(g.x) else g.axes
            joined.append(_Groups(widen(g.x), inner))
    return joined, np.concatenate(place)


def _root(total: Array, shift: Array) -> Norm:
    """sqrt(total) * 2^-shift."""
    return normal(Norm(jnp.sqrt(total), -shift))


def _where(condition: Array, a: Norm, b: Norm) -> Norm:
    return Norm(*(jnp.where(condition, x, y) for x, y in zip(a, b, strict=True)))


def _norms(arrays: tuple[Array, ...], axes: tuple[tuple[int, ...], ...], whole: bool) -> Norm:
    """(groups,) norms of all groups in the widest dtype, or with `whole` (1,), that of all."""
    if not whole and not any(axes) and not any(map(jnp.iscomplexobj, arrays)):
        entries = [widen(x).ravel() for x in arrays]
        if len({x.dtype for x in entries}) == 1:
            return magnitude(jnp.concatenate(entries))
    groups, place = _joined(arrays, axes)
    counts = [g.count for g in groups]
    cuts = np.cumsum(counts)[:-1]
    dtype = max((g.x.dtype for g in groups), key=lambda dtype: dtype.itemsize)

    def join(parts):
        return jnp.concatenate([part.astype(dtype) for part in parts])

    def each(value):
        return np.repeat([value(g) for g in groups], counts).astype(dtype)

    sums = join(map(_sums_of_squares, groups))
    low, top = each(lambda g: g.low), each(lambda g: 2.0 ** _RANGE[g.x.dtype.name].top)
    total = sums
    if whole:
        total = jnp.sum(sums)[None]
        low_total, top_total = np.sum(low, keepdims=True), np.max(top, keepdims=True)
        is_safe = (total >= low_total) & (total < top_total)
    else:
        is_safe = (total >= low) & (total < top)
    plain = _root(jnp.where(is_safe, total, 1), jnp.zeros(total.shape, jnp.int32))

    def one_array(g, own, at_least, below):
        """The norms of the groups of one array, scaled where their own sums need it."""
        limits = _RANGE[g.x.dtype.name]
        shift = jnp.where(own < at_least, limits.up, jnp.where(own < below, 0, limits.down))
        shift = shift.astype(jnp.int32)

        def scaled():
            return _root(_sums_of_squares(_scaled(g, shift)).astype(dtype), shift)

        needs_scale = _any_member(jnp.any(shift != 0))
        return lax.cond(needs_scale, scaled, lambda: _root(own, jnp.zeros_like(shift)))

    def careful():
        """The norms that no sum overflows or underflows."""
        parts = (jnp.split(sums, cuts), np.split(low, cuts), np.split(top, cuts))
        found = list(map(one_array, groups, *parts))
        value = Norm(*(jnp.concatenate(part) for part in zip(*found, strict=True)))
        if whole:
            value = jax.tree.map(lambda part: part[None], normal(union(value)))
        return _where(is_safe, plain, value)

    # A loop of none or one turn: XLA copies the operands of a `cond`, while those of a loop that it
    # does not change stay put.
    start = (_any_member(jnp.any(~is_safe)), plain)
    _, value = lax.while_loop(
        lambda carry: carry[0], lambda carry: (jnp.zeros_like(carry[0]), careful()), start
    )
    if whole or np.all(np.diff(place) == 1):
        return value
    return jax.tree.map(lambda part: part[place], value)


_norms = jax.custom_jvp(jax.jit(_norms, static_argnums=(1, 2)), nondiff_argnums=(1, 2))


@_norms.defjvp
def _(axes, whole, primals, tangents):
    """d||x|| = Re<x, dx> / ||x||, with x scaled by the exponent of its norm."""
    (arrays,), (tangents,) = primals, tangents
    value, out, start = _norms(arrays, axes, whole), [], 0
    for x, dx, inner in zip(arrays, tangents, axes, strict=True):
        shape = tuple(1 if a in inner else n for a, n in enumerate(x.shape))
        part = slice(0, 1)
        if not whole:
            part = slice(start, start := start + math.prod(shape))
        own = (1,) * x.ndim if whole else shape
        m, e = (y[part].reshape(own) for y in value)
        pairs = [(x.real, dx.real), (x.imag, dx.imag)] if jnp.iscomplexobj(x) else [(x, dx)]
        product = sum(
            times_power(a.astype(m.dtype), -e) * (b.astype(m.dtype) / m) for a, b in pairs
        )
        out.append(times_power(jnp.sum(product, axis=inner, keepdims=True), -e).ravel())
    tangent = sum(out[1:], out[0]) if whole else jnp.concatenate(out)
    zero = np.zeros(value.exponent.shape, jax.dtypes.float0)
    return value, Norm(tangent, zero)  # type: ignore[arg-type]


def _checked(arrays: Sequence[Any]) -> tuple[Array, ...]:
    arrays = tuple(jnp.asarray(x) for x in arrays)
    for x in arrays:
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise ValueError(
                f"scale: got a leaf {x.shape} {x.dtype}; "
                "norms need real or complex floating arrays."
            )
    return arrays


def flat_norms(arrays: Sequence[Any], axes: Sequence[Axis]) -> Norm:
    """The norms of the groups of several arrays in one vector, cheaper than `array_norm` of each.

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


def split(flat: PyTree, arrays: Sequence[Any], axes: Sequence[Axis]) -> list[PyTree]:
    """What `flat_norms` of the same arguments returned, array by array, all axes kept.

    Args:
      flat: that `Norm`, or any tree of arrays of its shape.
      arrays, axes: as given to `flat_norms`.
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
    """Euclidean norm of an array over `axis` (all axes by default).

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
      mantissa: () float32 (float64 if a leaf is), in [1/2, 1); 0, inf or NaN where the norm is.
      exponent: () int32.
    """
    leaves = _checked([x for x in jax.tree.leaves(tree) if jnp.size(x)])
    if not leaves:
        return Norm(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))
    value = _norms(leaves, tuple(_axes(x, None) for x in leaves), True)
    return jax.tree.map(lambda part: part[0], value)


def combine(norms: Sequence[Norm]) -> Norm:
    """Norm of the union of groups of equal shape, sqrt(sum of squares), from their norms.

    >>> import jax.numpy as jnp
    >>> both = combine([array_norm(jnp.full(9, 1e38)), array_norm(jnp.full(16, 1e38))])
    >>> round(log2(both).item(), 3)  # of 5e38, which no float32 holds
    128.555
    """
    dtype = max((n.mantissa.dtype for n in norms), key=lambda dtype: dtype.itemsize)
    mantissa = jnp.stack([n.mantissa.astype(dtype) for n in norms])
    return union(Norm(mantissa, jnp.stack([n.exponent for n in norms])))


def log_norm(tree: PyTree) -> Array:
    """Natural logarithm of the Euclidean norm of a pytree; -inf for zeros, and never an overflow.

    >>> import jax.numpy as jnp
    >>> round(float(log_norm({"w": jnp.full(4, 1e38)})) / jnp.log(10.0).item(), 3)  # log10 of 2e38
    38.301
    """
    return log(norm(tree))


def log_rms(tree: PyTree) -> Array:
    """Natural logarithm of the root mean square over all entries of a pytree."""
    size = max(sum(jnp.size(x) for x in jax.tree.leaves(tree)), 1)
    value = log_norm(tree)
    return value - 0.5 * jnp.log(jnp.asarray(size, value.dtype))
