"""The equations at which two programs part.

As a rule, the first without a counterpart. Some differences show elsewhere than where they are
made, and are looked for by name: loops of different lengths, values that are the same but for the
order of their entries, constants that one program computes and the other has, gradients that one
program stops.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, cast

from gradjax.comparison.compared import Compared
from gradjax.comparison.counterparts import PLUMBING, Index, Place, Region, Search, Side, region
from gradjax.comparison.describe import has_begun, same_operation, words
from gradjax.comparison.listing import REVERSED, Equation, Node
from gradjax.comparison.sites import COTANGENT, VALUE
from gradjax.replay import source
from gradjax.replay.source import Line
from gradjax.taps.jaxprs import insides

Searches = tuple[Search, Search]
# Our own names, and what keeps XLA from moving operations.
_UNSEEN = {COTANGENT, VALUE, "gradjax_name", "gradjax_tangent", "optimization_barrier"}
# Their derivative is zero everywhere.
_FLAT = {"ceil", "convert_element_type", "floor", "round", "sign", "stop_gradient"}


class Blame(NamedTuple):
    """Where two programs part.

    Attributes:
      line_a, line_b: the user's lines; None where none is known.
      primitive_a, primitive_b: the equations; "" where there is none.
      words: what differs, in a sentence.
    """

    line_a: Line | None
    line_b: Line | None
    primitive_a: str
    primitive_b: str
    words: str


def blame(a: Side, b: Side, item: Compared) -> Blame:
    """Where the programs part before a value that differs.

    Args:
      a, b: the programs.
      item: the value.
    """
    searches = Search(a, b), Search(b, a)
    regions = _regions(item, searches)
    places = [
        _place(each, node, index)
        for each, node, index in zip(regions, item.nodes, item.indices, strict=True)
    ]
    if item.kind in ("cotangent", "gradient"):
        found = _stopped((a, b), item, places)
        if found is not None:
            return found
    found = _loops_of_other_length(places)
    if found is not None:
        return found
    places = _of_data(regions, places)
    regions, places = _rearranged(item, searches, regions, places)
    return Blame(*lines(places), *primitives(places), words(searches, regions, places, item))


def _regions(item: Compared, searches: Searches, strict: bool = False) -> list[Region]:
    found = []
    for node, index, search in zip(item.nodes, item.indices, searches, strict=True):
        matched = search.matched_in_order if strict else search.matched
        found.append(Region() if node is None else region(node, index, matched))
    return found


def _place(found: Region, node: Node | None, index: Index) -> Place | None:
    """Where a region begins; what made the node where the other program has its value too."""
    if node is None or has_begun(found):
        return found.first
    return producer(node, index)


def producer(node: Node, index: Index = ()) -> Place | None:
    """The equation that made a node; names are left out."""
    for equation, place in region(node, index, _never).equations[::-1]:
        if equation.name not in _UNSEEN:
            return equation, place
    return None


def _never(node: Node, index: Index) -> bool:
    return False


def lines(places: list[Place | None]) -> tuple[Line | None, Line | None]:
    """The user's lines of two equations."""
    found = [None if place is None else _line(place[0].eqns) for place in places]
    return found[0], found[1]


def _line(eqns: Sequence[Any]) -> Line | None:
    return next(iter(source.lines(eqns)), None)


def primitives(places: list[Place | None]) -> tuple[str, str]:
    """The primitives of two equations."""
    found = ["" if place is None else place[0].name for place in places]
    return found[0], found[1]


# Loops


def _loops_of_other_length(places: list[Place | None]) -> Blame | None:
    """Two loops, if the programs part where only one of them has an iteration."""
    loops = [each for each in map(_loop, places) if each is not None]
    if len(loops) < 2:
        return None
    lengths = [eqns[-1].params["length"] for eqns in loops]
    beyond = False
    for place, length in zip(places, lengths, strict=True):
        assert place is not None
        row = place[1][0] if place[1] else 0
        iteration = length - 1 - row if REVERSED in place[0].order else row
        beyond |= iteration >= min(lengths)
    if lengths[0] == lengths[1] or not beyond:
        return None
    known = [_line(eqns) for eqns in loops]
    text = f"The loop has {lengths[0]} iterations in a, {lengths[1]} in b."
    return Blame(known[0], known[1], "scan", "scan", text)


def _loop(place: Place | None) -> tuple[Any, ...] | None:
    """The outermost scan around an equation, with the equations around it."""
    for k, eqn in enumerate(place[0].calls if place is not None else ()):
        if eqn.primitive.name == "scan":
            return cast(Place, place)[0].calls[: k + 1]
    return None


# Constants and the order of entries


def _of_data(regions: list[Region], places: list[Place | None]) -> list[Place | None]:
    """In place of the computation of a constant, the operation that uses it, unless the other
    program parts at a constant too.
    """
    out = list(places)
    for k in range(2):
        own, other = places[k], places[1 - k]
        if own is None or other is None or not _is_constant(own[0]) or _is_constant(other[0]):
            continue
        rest = [each for each in regions[k].equations if each[0].name not in PLUMBING]
        out[k] = next((each for each in rest if not _is_constant(each[0])), own)
    return out


def _is_constant(equation: Equation) -> bool:
    """Whether an equation depends on no operand of the program."""
    seen: set[Node] = set()
    stack = list(equation.operands)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node.origin, Equation):
            stack += node.origin.operands
        elif node.origin.kind == "input":
            return False
        else:
            stack += [each for each in (node.origin.node, node.back) if each is not None]
    return True


def _rearranged(
    item: Compared, searches: Searches, regions: list[Region], places: list[Place | None]
) -> tuple[list[Region], list[Place | None]]:
    """Where the programs part in the order of entries, if they compute the same otherwise."""
    moved = _moved(searches, regions)
    if not moved:
        if places[0] is None or places[1] is None or places[0][0].name != places[1][0].name:
            return regions, places
        if same_operation(searches, cast(list[Place], places), True):
            return regions, places
    strict = _regions(item, searches, strict=True)
    firsts = []
    for each, place in zip(strict, places, strict=True):
        own = [(eq, index) for eq, index in each.equations if eq.name not in _KEEPS_ORDER]
        firsts.append(own[0] if own else place)
    return strict, firsts


def _moved(searches: Searches, regions: list[Region]) -> bool:
    """Whether a value that both programs have, in another order of axes, was repeated or reshaped.

    Its entries then are in an order that the other program does not have.
    """
    for search, found in zip(searches, regions, strict=True):
        for place in found.equations:
            if place[0].name in _REPEATS and _operand_matched(search, place):
                return True
    return False


# What comes with other operations and repeats or reshapes a value.
_KEEPS_ORDER = _UNSEEN | {"convert_element_type"}
_REPEATS = {"expand_dims", "reshape", "squeeze"}


def _operand_matched(search: Search, place: Place) -> bool:
    equation, index = place
    node = equation.operands[0]
    return search.matched(node, index[: node.depth])


# Gradients that are stopped


def _stopped(sides: tuple[Side, Side], item: Compared, places: list) -> Blame | None:
    """Where one program stops a gradient that the other does not."""
    stops = [_stops(side) for side in sides]
    for k in _stopping(item):
        extra = _more(stops[k], stops[1 - k])
        place = None
        if not extra:
            place = _consumer(sides[k], item.names[k], _FLAT)
        if not extra and place is None:
            continue
        known, names = list(lines(places)), list(primitives(places))
        if place is not None:
            both = [place, _consumer(sides[1 - k], item.names[1 - k])]
            for side, each in zip((k, 1 - k), both, strict=True):
                if each is not None:
                    known[side], names[side] = _line(each.eqns), each.name
        else:
            eqns = _after_site(extra, sides[k], item.names[k])
            known[k], names[k] = _line(eqns), "stop_gradient"
        own, other = sides[k].name, sides[1 - k].name
        text = f"{own} stops a gradient that {other} does not."
        if place is not None:
            text = f"No gradient flows back through {place.name} in {own}; in {other} one does."
        return Blame(known[0], known[1], names[0], names[1], text)
    return None


def _stopping(item: Compared) -> list[int]:
    """The programs that may stop a gradient: those where it is zero; else that where it is less."""
    zero = []
    for k, (node, side) in enumerate(zip(item.nodes, item.sides, strict=True)):
        if node is None or not side.array(node).any():
            zero.append(k)
    return zero or [0, 1]


def _consumer(side: Side, name: str, among: Collection[str] = ()) -> Equation | None:
    """The first operation on a named value; `among`: the primitives to look for."""
    node = side.listing.named(VALUE).get(name)
    for equation in side.listing.all():
        if node in equation.operands and (not among or equation.name in among):
            return equation
    return None


def _after_site(extra: list, side: Side, name: str) -> tuple[Any, ...]:
    """The first stop after a named value, with the equations around it."""
    site = side.listing.sites.get(name)
    after = [each for each in extra if site is None or each[0] > site.path]
    _, eqn, around = (after or extra)[0]
    return (*around, eqn)


def _stops(side: Side) -> list[tuple[tuple[int, ...], Any, tuple]]:
    return [each for each in _walk(side.traced.jaxpr) if each[1].primitive.name == "stop_gradient"]


def _walk(jaxpr: Any, path: tuple = (), around: tuple = ()) -> Iterator[tuple[tuple, Any, tuple]]:
    """(path, equation, equations around it) of all equations of a loss."""
    for i, eqn in enumerate(jaxpr.jaxpr.eqns):
        yield (*path, i), eqn, around
        for _, each in insides(eqn):
            yield from _walk(each, (*path, i), (*around, eqn))


def _more(own: list, other: list) -> list:
    """What is left of one list if those of the other with the same shape are taken out."""
    counts = Counter(eqn.outvars[0].aval.shape for _, eqn, _ in other)
    left = []
    for each in own:
        shape = each[1].outvars[0].aval.shape
        if counts[shape] > 0:
            counts[shape] -= 1
        else:
            left.append(each)
    return left


__all__ = ["Blame", "blame", "lines", "primitives", "producer"]
