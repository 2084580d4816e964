"""Where two implementations of one model part: the first value that differs beyond rounding.

    value_a  !=  value_b      both programs of value and gradient, one equation at a time

Both losses are traced and evaluated with every value in between (`comparison.listing`). Named
values, their cotangents and the parameters' gradients are compared; what rounding explains is
measured by evaluating both again with errors of its size (`comparison.rounding`). From the first
value that differs, the walk back to what both programs have (`comparison.counterparts`) ends at the
equation. Cost: one compilation for each distinct operation, and the memory of all
values; five evaluations, one where the programs are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from gradjax.comparison.blame import Blame, blame
from gradjax.comparison.compared import Compared, Pairs, Row
from gradjax.comparison.counterparts import Side
from gradjax.comparison.dtypes import blame_dtype, dtype_differs
from gradjax.comparison.literals import other_constant
from gradjax.replay import source
from gradjax.replay.source import Line
from gradjax.taps.probe import Traced, trace

PyTree = Any


@dataclass(frozen=True)
class FirstDifference:
    """The first value that differs.

    Attributes:
      kind: "value", "cotangent", "gradient", "loss", or "dtype" if rounding explains what differs
        and the programs compute in different dtypes.
      name_a, name_b: the value; a key path for a gradient, "loss" for the loss.
      line_a, line_b: the user's lines of the first equation whose result the other program does not
        have; None where none is known.
      primitive_a, primitive_b: that equation; "" where there is none.
      iterations: the index of the first row that differs of a value in a loop, the outermost loop
        first; () outside of loops.
      ulps, ratio: of the value, as in `Row`.
      words: what differs, in a sentence.
    """

    kind: str
    name_a: str
    name_b: str
    line_a: Line | None
    line_b: Line | None
    primitive_a: str
    primitive_b: str
    iterations: tuple[int, ...]
    ulps: float
    ratio: float
    words: str


@dataclass(frozen=True)
class Difference:
    """What `difference` found; true if the programs differ.

    Attributes:
      first: the first difference; None if the programs agree.
      rows: the named values, in the order of evaluation.
      cotangents: of the same names, where both programs, or one of them, have one.
      gradients: of the parameters.
      losses: of a and of b.
      unmatched_a, unmatched_b: named values and parameters that were not compared.
      note: what else there is to say.
    """

    first: FirstDifference | None
    rows: tuple[Row, ...]
    cotangents: tuple[Row, ...]
    gradients: tuple[Row, ...]
    losses: tuple[float, float]
    unmatched_a: tuple[str, ...]
    unmatched_b: tuple[str, ...]
    note: str = ""

    def __bool__(self) -> bool:
        return self.first is not None

    def __str__(self) -> str:
        return "\n".join(_text(self))


def difference(
    loss_a: Callable[..., Any],
    params_a: PyTree,
    loss_b: Callable[..., Any],
    params_b: PyTree,
    *args: Any,
    args_b: tuple | None = None,
    names: Mapping[str, str] | None = None,
    leaves: Mapping[str, str] | None = None,
    has_aux: bool = False,
) -> Difference:
    """Compare two implementations of one model, and find the first value that differs.

    Named values (the outputs of Linen, NNX and Equinox modules, and what `gradjax.tap` marks) are
    paired by equal names and by `names`; where fewer than half have a partner, also by order and
    shape. Without names the loss is compared, and the search goes through the whole program.

    Args:
      loss_a, loss_b: (params, *args) -> loss of shape (), or (loss, aux) with `has_aux`.
      params_a, params_b: pytrees of floating arrays, or NNX or Equinox models.
      args: arrays in any pytrees, given to both; non-array leaves are static.
      args_b: the arguments of b, where they differ.
      names: name in a -> name in b, where names differ.
      leaves: key path of a parameter in a -> in b, as `jax.tree_util.keystr` gives it. By default
        parameters are paired by key path, by equal entries, or by order and shape.
      has_aux: as in `jax.value_and_grad`, of both.

    Returns:
      `Difference`; `print` it.

    Raises:
      ValueError: as `gradjax.probe`, except that nothing needs a name; a name of `names` or a key
        path of `leaves` that does not exist.

    >>> import jax.numpy as jnp
    >>> from gradjax import tap
    >>> def port(w, x):
    ...     return jnp.sum(tap(w * x, "h") ** 2)
    >>> def original(w, x):
    ...     return jnp.sum(tap(w * x + 1e-3, "h") ** 2)
    >>> found = difference(port, jnp.ones(3), original, jnp.ones(3), jnp.arange(3.0))
    >>> found.first.kind, found.first.name_a, found.first.primitive_b
    ('value', 'h', 'add')
    >>> bool(difference(port, jnp.ones(3), port, jnp.ones(3), jnp.arange(3.0)))
    False
    """
    traced_a = trace(loss_a, params_a, args, has_aux, "difference", needs_names=False)
    traced_b = trace(
        loss_b, params_b, args if args_b is None else args_b, has_aux, "difference", False
    )
    a, b = _side("a", traced_a), _side("b", traced_b)
    pairs = Pairs(a, b, names or {}, leaves or {})
    found = [*pairs.values(), *pairs.loss(), *pairs.cotangents(), *pairs.gradients()]
    if any(not each.row.equal for each in found):
        a.measure(b)
        b.measure(a)
        found = [each.again() for each in found]
    return Difference(
        first=_first(a, b, found),
        rows=tuple(each.row for each in found if each.kind == "value"),
        cotangents=tuple(each.row for each in found if each.kind == "cotangent"),
        gradients=tuple(each.row for each in found if each.kind == "gradient"),
        losses=(float(a.array(a.listing.loss)), float(b.array(b.listing.loss))),
        unmatched_a=pairs.unmatched_a,
        unmatched_b=pairs.unmatched_b,
        note=pairs.note,
    )


def _side(name: str, traced: Traced) -> Side:
    paths = jax.tree_util.tree_leaves_with_path(traced.params)
    leaves = [jax.tree_util.keystr(path) or "params" for path, _ in paths]
    count = len(traced.leaves) - traced.num_params
    return Side(name, traced, [*leaves, *(f"argument {i}" for i in range(count))])


def _first(a: Side, b: Side, found: list[Compared]) -> FirstDifference | None:
    unequal = [each for each in found if not each.row.equal]
    first = _earliest(unequal)
    if first is None:
        return None
    constant = other_constant(a, b, first)
    if constant is not None:
        return _described(first.kind, first, constant, "")
    differing = _earliest([each for each in found if each.row.differs])
    dtype = next((each for each in unequal if dtype_differs(a, b, each)), None)
    also = ""
    if dtype is not None:
        other = blame_dtype(a, b, dtype)
        if differing is None:
            also = "Rounding explains how far the values differ."
            return _described("dtype", dtype, other, also)
        also = f"{other.words} The difference is beyond that."
    if differing is None:
        return None
    return _described(differing.kind, differing, blame(a, b, differing), also)


def _described(kind: str, item: Compared, where: Blame, also: str) -> FirstDifference:
    return FirstDifference(
        kind=kind,
        name_a=item.row.name_a,
        name_b=item.row.name_b,
        line_a=where.line_a,
        line_b=where.line_b,
        primitive_a=where.primitive_a,
        primitive_b=where.primitive_b,
        iterations=item.indices[0] or item.indices[1],
        ulps=item.row.ulps,
        ratio=item.row.ratio,
        words=f"{where.words} {also}".rstrip(),
    )


def _earliest(found: list[Compared]) -> Compared | None:
    """The first of some values; in a loop, one iteration comes after the other."""
    same_kind = [each for each in found if each.kind == found[0].kind]
    for k in range(2):
        if same_kind and all(each.nodes[k] is not None for each in same_kind):
            return min(same_kind, key=lambda each: each.place(k))
    return next(iter(found), None)


# Text output

# Rows of a table: the first and the last ones of a long list.
_HEAD, _TAIL = 9, 8
_MOST_NAMES = 6


def _text(found: Difference) -> Iterator[str]:
    first = found.first
    if first is None:
        yield _agreement(found)
    else:
        yield _headline(first)
        yield first.words
        yield from _place("a", first.primitive_a, first.line_a)
        yield from _place("b", first.primitive_b, first.line_b)
    yield f"loss: a {found.losses[0]:.9g}, b {found.losses[1]:.9g}"
    yield from _table("value", found.rows)
    yield from _table("cotangent", found.cotangents)
    yield from _table("gradient", found.gradients)
    for side, names in (("a", found.unmatched_a), ("b", found.unmatched_b)):
        if names:
            rest = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
            yield f"not compared, in {side}: {', '.join(names[:_MOST_NAMES])}{rest}"
    if found.note:
        yield found.note


def _agreement(found: Difference) -> str:
    rows = [*found.rows, *found.cotangents, *found.gradients]
    what = (
        f"{len(found.rows)} named values, {len(found.cotangents)} cotangents, "
        f"{len(found.gradients)} gradients"
    )
    if all(row.equal for row in rows) and found.losses[0] == found.losses[1]:
        return f"The programs agree: the loss and {what} are equal bit for bit."
    most = max((row.ulps / max(row.limit, 1.0) for row in rows), default=0.0)
    return (
        f"The programs agree: {what} are equal within rounding, "
        f"at most {most:.2g} of what it explains apart."
    )


def _headline(first: FirstDifference) -> str:
    name = first.name_a
    if first.name_b != first.name_a:
        name += f" (in b {first.name_b})"
    if first.iterations:
        name += f", iteration {', '.join(map(str, first.iterations))}"
    if first.kind == "dtype":
        return f"The programs compute in different dtypes, first at {name}."
    what = "the loss" if first.kind == "loss" else f"the {_KINDS[first.kind]} {name}"
    if first.ulps == float("inf"):
        return f"The programs differ, first in {what}: inf or NaN, or a size, that one only has."
    return (
        f"The programs differ, first in {what}: by {first.ulps:.3g} ulp; "
        f"rms of a over that of b {first.ratio:.6g}."
    )


_KINDS = {"value": "value", "cotangent": "cotangent of", "gradient": "gradient of"}


def _place(side: str, primitive: str, line: Line | None) -> Iterator[str]:
    if line is None:
        if primitive:
            yield f"  {side}: {primitive}"
        return
    yield f"  {side}: {primitive} at {line}, in {line.function}"
    if text := source.marked(line):
        yield text


def _table(kind: str, rows: tuple[Row, ...]) -> Iterator[str]:
    if not rows:
        return
    lines = [(kind, "in b", "ulp", "limit", "a / b", "")]
    for row in rows:
        other = "" if row.name_b == row.name_a else row.name_b
        verdict = "differs" if row.differs else ""
        numbers = f"{row.ulps:.3g}", f"{row.limit:.3g}", f"{row.ratio:.6g}"
        lines.append((row.name_a, other, *numbers, verdict))
    hidden = len(rows) - _HEAD - _TAIL
    if hidden > 1:
        lines = lines[: 1 + _HEAD] + lines[-_TAIL:]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for i, (name, other, ulps, limit, ratio, verdict) in enumerate(lines):
        if hidden > 1 and i == 1 + _HEAD:
            yield f"... and {hidden} more"
        left = (
            f"{name:<{widths[0]}}  {other:<{widths[1]}}" if widths[1] > 4 else name.ljust(widths[0])
        )
        right = f"{ulps:>{widths[2]}}  {limit:>{widths[3]}}  {ratio:>{widths[4]}}  {verdict}"
        yield f"{left}  {right}".rstrip()


__all__ = ["Difference", "FirstDifference", "Row", "difference"]
