"""Equations of two programs in words: what each of them computes, of which operands."""

from typing import Any, cast

import numpy as np

from gradjax.comparison.compared import Compared
from gradjax.comparison.counterparts import PLUMBING, Index, Place, Region, Search, Side
from gradjax.comparison.listing import Node, Origin


def words(
    searches: tuple[Search, Search],
    regions: list[Region],
    places: list[Place | None],
    item: Compared,
) -> str:
    """What differs, in a sentence or two.

    Args:
      searches: of a and of b.
      regions: what has no counterpart in the other program.
      places: the equations that are blamed.
      item: the value that differs.
    """
    parts = [_what(searches, regions, places, item)]
    for search, found in zip(searches, regions, strict=True):
        own, other = search.own, search.other
        names = [own.leaves[i] for i in _given(found)]
        if names:
            listed = ", ".join(dict.fromkeys(names))
            parts.append(f"{listed} of {own.name} has no equal in {other.name}.")
    return " ".join(parts)


def _given(found: Region) -> list[int]:
    """The numbers of the operands among what has no counterpart."""
    origins = [node.origin for node in found.leaves]
    return [each.index for each in origins if isinstance(each, Origin) and each.kind == "input"]


def _what(
    searches: tuple[Search, Search],
    regions: list[Region],
    places: list[Place | None],
    item: Compared,
) -> str:
    for k, (node, side) in enumerate(zip(item.nodes, item.sides, strict=True)):
        if node is None:
            other = item.sides[1 - k]
            return f"No gradient flows back to it in {side.name}; in {other.name} one does."
    begun = [has_begun(each) for each in regions]
    if not any(begun):
        return "What each program names here, the other has at another place."
    if None not in places:
        same = same_operation(searches, cast(list[Place], places), all(begun))
        if same:
            return same
    shown = [_described(search, place) for search, place in zip(searches, places, strict=True)]
    for k in range(2):
        if not begun[1 - k] or _is_put_in(regions[k], places[k], places[1 - k]):
            more, less = ("a", "b") if k == 0 else ("b", "a")
            return f"{more} computes {shown[k]}, which {less} does not: it has {shown[1 - k]}."
    return f"a computes {shown[0]}; b computes {shown[1]}."


def _is_put_in(found: Region, place: Place | None, other: Place | None) -> bool:
    """Whether an equation comes before one like that of the other program, and feeds it."""
    if place is None or other is None or place[0].name == other[0].name:
        return False
    fed = set(place[0].outputs)
    for equation, _ in found.equations:
        if fed.intersection(equation.operands):
            if equation.name == other[0].name:
                return True
            if equation.name in PLUMBING:
                fed |= set(equation.outputs)
    return False


def has_begun(found: Region) -> bool:
    """Whether a region has an equation that a difference can be blamed on."""
    return any(equation.name not in PLUMBING for equation, _ in found.equations)


def same_operation(searches: tuple[Search, Search], places: list[Place], both_begun: bool) -> str:
    """What differs of one operation in both: operands, or parameters; "" if it is not one.

    Args:
      searches: of a and of b.
      places: the equations.
      both_begun: whether neither has a counterpart.
    """
    name = places[0][0].name
    if name != places[1][0].name:
        return ""
    operands = [
        [_shown(search.own, node, index) for node in equation.operands]
        for search, (equation, index) in zip(searches, places, strict=True)
    ]
    if len(operands[0]) == len(operands[1]):
        pairs = [pair for pair in zip(*operands, strict=True) if pair[0] != pair[1]]
        if pairs and (both_begun or len(pairs) < len(operands[0])):
            listed = "; ".join(f"{x} in a, {y} in b" for x, y in pairs)
            return f"Both compute {name}, of different operands: {listed}."
    parameters = _parameters(places[0][0].eqn, places[1][0].eqn)
    if parameters and both_begun:
        return f"Both compute {name}, differently: {parameters}."
    return ""


def _parameters(eqn: Any, other: Any) -> str:
    """The parameters of an equation that differ, in both."""
    parts = []
    for key, value in eqn.params.items():
        texts = str(value), str(other.params.get(key))
        if texts[0] == texts[1]:
            continue
        if hasattr(value, "eqns"):
            parts.append(f"its {key} is another one")
        elif max(map(len, texts)) < 60:
            parts.append(f"{key} {texts[0]} in a, {texts[1]} in b")
    return "; ".join(parts)


def _described(search: Search, place: Place | None) -> str:
    if place is None:
        return "a value that it was given"
    equation, index = place
    operands = ", ".join(_shown(search.own, node, index) for node in equation.operands)
    return f"{equation.name}({operands})"


def _shown(side: Side, node: Node, index: Index) -> str:
    """An operand as text: one number, or its shape and extremes."""
    index = index[: node.depth]
    x = side.array(node, index)
    dtype = str(side.data[node].dtype)
    if isinstance(node.origin, Origin) and node.origin.kind == "input":
        return f"{side.leaves[node.origin.index]} {dtype}{list(x.shape)}"
    same = x.size > 0 and bool(np.all((x == x.flat[0]) | (np.isnan(x) & np.isnan(x.flat[0]))))
    if same:
        where = " everywhere" if x.size > 1 else ""
        return f"{_number(x.flat[0])}{where}"
    size = np.abs(x[np.isfinite(x)])
    if not size.size or not side.inexact(node):
        return f"{dtype}{list(x.shape)}"
    return f"{dtype}{list(x.shape)} of {np.min(size):.3g} to {np.max(size):.3g}"


def _number(x: Any) -> str:
    return f"{x:.6g}" if not isinstance(x, complex | np.complexfloating) else str(x)


__all__ = ["has_begun", "same_operation", "words"]
