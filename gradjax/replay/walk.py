"""From a value that is inf or NaN back to the operation that made it so.

The walk follows one bad entry from an output to the operand that it came from, through loops, until
it reaches an equation that made it:

    inf    of operands that are finite, or an input of the program
    NaN    of operands that are not NaN. If they hold inf, the operation that made that inf is the
           culprit; an inf that was given (a mask of -inf) is none, then it is the equation itself

What does not reach the output is never met: masks, branches that were not taken, entries that a
`where` did not select.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradjax.replay.loops import unfold
from gradjax.replay.tape import Constant, Input, Step, Value
from gradjax.taps.jaxprs import bind

Entry = tuple[int, ...]
Index = tuple[Any, ...]
# Operations that only move entries of their first operand.
_MOVES = {
    "broadcast_in_dim",
    "copy",
    "copy_p",
    "dynamic_slice",
    "expand_dims",
    "gather",
    "gradjax_name",
    "reshape",
    "rev",
    "slice",
    "squeeze",
    "transpose",
}


@dataclass
class Culprit:
    """Where a walk ended.

    Attributes:
      value: the bad output of the equation, or the input.
      kind: how it is bad, "inf" or "nan".
      entry: the index of its entry.
      step: the equation; None if the value was given from outside.
      operand_index: for every operand what the entry depends on; slices where it is several.
      through: the steps that turned inf into NaN on the way from it, the first of them first.
      zeros: (step, operand, entry) of the zeros that met the bad entry on its way.
      named: the step that gave the nearest value on that way a name.
    """

    value: Value
    kind: str
    entry: Entry
    step: Step | None = None
    operand_index: list[Index | None] = field(default_factory=list)
    through: list[Step] = field(default_factory=list)
    zeros: list[tuple[Step, Value, Entry]] = field(default_factory=list)
    named: Step | None = None

    @property
    def order(self) -> tuple[int, ...]:
        """Place in the order of evaluation; what was given comes first."""
        return () if self.step is None else self.step.order


def trace_back(value: Value, kind: str, entry: Entry | None = None) -> Culprit:
    """The equation, or the input, that made an entry bad.

    Args:
      value: holds such an entry.
      kind: "inf" or "nan".
      entry: its index; the first one by default.
    """
    entry = value.first(kind) if entry is None else entry
    others: list[Culprit] = []
    zeros: list[tuple[Step, Value, Entry]] = []
    named = None
    while True:
        inside, entry = unfold(value, kind, entry)
        if inside is not value:
            value = inside
            continue
        if isinstance(value.origin, Input | Constant):
            return _earliest([Culprit(value, kind, entry), *others])
        step = value.origin
        index = depends_on(step, value.position, entry)
        source = _source(step, index, kind)
        zeros += _zeros(step, index)
        if source is None:
            culprit = _made(Culprit(value, kind, entry, step, index))
            culprit.zeros += zeros
            culprit.named = culprit.named or named
            return _earliest([culprit, *others])
        if kind == "nan" and step.name in _SUMS and len(others) < _MOST_OTHERS:
            others += _infinite_terms(step, index)
        named = step if step.name == "gradjax_name" else named
        value, entry = source


def _zeros(step: Step, indices: Sequence[Index | None]) -> list[tuple[Step, Value, Entry]]:
    """The factors and the numerator of a step that are exactly 0."""
    factors = {"mul": step.operands, "div": step.operands[:1]}.get(step.name, [])
    found = []
    for operand, index in zip(factors, indices, strict=False):
        x = entries(operand, index)
        if index is not None and x is not None and np.all(x == 0):
            found.append((step, operand, index))
    return found


# Sums, which are not finite if one of their terms is not.
_SUMS = {"reduce_sum", "dot_general", "cumsum", "conv_general_dilated"}
_MOST_OTHERS = 4


def _infinite_terms(step: Step, indices: Sequence[Index | None]) -> list[Culprit]:
    """What made the infinite terms of a sum whose other terms are NaN: it may come first."""
    source = _source(step, indices, "inf")
    if source is None:
        return []
    culprit = trace_back(source[0], "inf", source[1])
    return [] if is_meant(culprit.value) else [culprit]


def _earliest(culprits: list[Culprit]) -> Culprit:
    return min(culprits, key=lambda culprit: culprit.order)


def _made(culprit: Culprit) -> Culprit:
    """An equation that made its output bad: of finite operands, or NaN of inf."""
    step = culprit.step
    assert step is not None
    if culprit.kind == "inf":
        return culprit
    sources = []
    for operand, index in zip(step.operands, culprit.operand_index, strict=True):
        entry = _first_bad(operand, index, "inf")
        if entry is not None:
            sources.append(trace_back(operand, "inf", entry))
    if not sources or any(is_meant(source.value) for source in sources):
        return culprit
    earliest = min(sources, key=lambda source: source.order)
    earliest.through.append(step)
    return earliest


def is_meant(value: Value) -> bool:
    """Whether a given value holds inf on purpose: a literal, or a mask, whose finite entries are
    all the same.
    """
    if isinstance(value.origin, Constant) and not value.origin.captured:
        return True
    if not isinstance(value.origin, Input | Constant) or value.nan:
        return False
    x = np.asarray(value.data)
    return len(np.unique(x[np.isfinite(x)])) <= 1


def _source(step: Step, indices: Sequence[Index | None], kind: str) -> tuple[Value, Entry] | None:
    """The operand, and its entry, from which a bad entry comes: the one that was made first."""
    found = []
    for operand, index in zip(step.operands, indices, strict=True):
        entry = _first_bad(operand, index, kind)
        if entry is not None:
            order = operand.origin.order if isinstance(operand.origin, Step) else ()
            # A literal is -inf on purpose, as the start of a maximum is.
            is_literal = isinstance(operand.origin, Constant) and not operand.origin.captured
            found.append((is_literal, order, len(found), operand, entry))
    return min(found, key=lambda each: each[:3])[3:] if found else None


def _first_bad(value: Value, index: Index | None, kind: str) -> Entry | None:
    """The first entry that is bad in that way among those at `index`."""
    if index is None or not (value.nan if kind == "nan" else value.inf):
        return None
    bad = value.where(kind)
    among = np.zeros_like(bad)
    among[index] = bad[index]
    if not among.any():
        return None
    return tuple(int(i) for i in np.unravel_index(int(among.argmax()), among.shape))


def depends_on(step: Step, position: int, entry: Entry) -> list[Index | None]:
    """For every operand the entries on which an entry of an output depends; None for none of them.

    Where an operation's rule is not known, all entries: the walk then takes the first bad one.
    """
    eqn, operands = step.eqn, step.operands
    shape = step.outputs[position].shape
    if step.name == "select_n":
        which = np.asarray(operands[0].data)
        chosen = 1 + int(which if which.ndim == 0 else which[entry])
        return [entry if k == chosen else None for k in range(len(operands))]
    if step.name in _MOVES:
        return [_moved(step, entry), *(_all(x) for x in operands[1:])]
    if step.name == "concatenate":
        return _part_of_concatenation(eqn.params["dimension"], operands, entry)
    if step.name == "dot_general":
        return _rows_and_columns(eqn.params["dimension_numbers"], operands, entry)
    if "axes" in eqn.params and step.name.startswith("reduce_"):
        index: list[Any] = list(entry)
        for axis in sorted(eqn.params["axes"]):
            index.insert(axis, slice(None))
        return [tuple(index)]
    elementwise = all(_broadcasts(x.shape, shape) for x in operands)
    if elementwise and step.name not in _MIXING and len(step.outputs) == 1:
        return [_broadcast_index(x.shape, entry) for x in operands]
    return [_all(x) for x in operands]


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an operand of an elementwise operation may have this shape: axes of length 1 are
    repeated.
    """
    if not shape:
        return True
    same_rank = len(shape) == len(to)
    return same_rank and all(n in (1, m) for n, m in zip(shape, to, strict=True))


def _broadcast_index(shape: tuple[int, ...], entry: Entry) -> Index:
    return tuple(0 if n == 1 else i for n, i in zip(shape, entry, strict=False))


# Their output has the shape of their operand, and each of its entries depends on many.
_MIXING = {
    "all_to_all",
    "cholesky",
    "cumlogsumexp",
    "cummax",
    "cummin",
    "cumprod",
    "cumsum",
    "custom_linear_solve",
    "dynamic_update_slice",
    "fft",
    "pallas_call",
    "ppermute",
    "psum",
    "scatter",
    "shard_map",
    "sort",
    "triangular_solve",
}


def _all(value: Value) -> Index:
    return (slice(None),) * len(value.shape)


def _moved(step: Step, entry: Entry) -> Index:
    """Where an entry stood before it was moved: the equation is evaluated on numbered entries."""
    first = step.operands[0]
    if step.name in ("copy", "copy_p", "gradjax_name"):
        return entry
    numbers = np.arange(first.size, dtype=np.int32).reshape(first.shape)
    params = {k: v for k, v in step.eqn.params.items() if k != "fill_value"}
    eqn = step.eqn.replace(params=params | ({"fill_value": 0} if step.name == "gather" else {}))
    flat = int(np.asarray(bind(eqn, [numbers, *(x.data for x in step.operands[1:])])[0])[entry])
    return tuple(int(i) for i in np.unravel_index(flat, first.shape))


def _part_of_concatenation(axis: int, operands: Sequence[Value], entry: Entry) -> list:
    out, start = [], 0
    for x in operands:
        inside = entry[axis] - start
        start += x.shape[axis]
        own = (*entry[:axis], inside, *entry[axis + 1 :])
        out.append(own if 0 <= inside < x.shape[axis] else None)
    return out


def _rows_and_columns(numbers: Any, operands: Sequence[Value], entry: Entry) -> list:
    (contracted, batched) = numbers
    out, taken = [], len(batched[0])
    for x, own_contracted, own_batched in zip(operands, contracted, batched, strict=True):
        index: list[Any] = [slice(None)] * len(x.shape)
        for k, axis in enumerate(own_batched):
            index[axis] = entry[k]
        for axis in range(len(x.shape)):
            if axis not in own_contracted and axis not in own_batched:
                index[axis] = entry[taken]
                taken += 1
        out.append(tuple(index))
    return out


def entries(value: Value, index: Index | None) -> np.ndarray | None:
    """The entries of a value at an index, None where they are no longer known."""
    if index is None or value.data is None:
        return None
    return np.asarray(value.data)[index]
