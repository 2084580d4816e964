"""A constant that differs between two programs that are the same otherwise.

Such as the eps of a normalization: where the variance is large, what comes out differs by a few
ulp, which rounding might explain. The operation with the constant shows it.
"""

from typing import Any

import numpy as np

from gradjax.comparison import rounding
from gradjax.comparison.blame import Blame, lines, primitives
from gradjax.comparison.compared import Compared
from gradjax.comparison.counterparts import Place, Search, Side, all_before
from gradjax.comparison.describe import same_operation
from gradjax.comparison.listing import Equation, Node

# So many times what rounding explains, since constants come rounded too.
_FACTOR = 2.0


def other_constant(a: Side, b: Side, item: Compared) -> Blame | None:
    """The one operation whose constant differs on the way to a value; None if that is not so.

    Args:
      a, b: the programs.
      item: the first value that they do not have bit for bit.
    """
    found = []
    for node, own, other in zip(item.nodes, (a, b), (b, a), strict=True):
        found.append([] if node is None else _new(own, other, node))
    if len(found[0]) != len(found[1]):
        return None
    differing: list[tuple[Equation, Equation]] = []
    for first, second in zip(*found, strict=True):
        if not _is_alike(first, second):
            return None
        pairs = zip(first.operands, second.operands, strict=True)
        if any(not _same_constant(x, y) for x, y in pairs):
            differing.append((first, second))
    if len(differing) != 1 or not _shows(a, b, *differing[0]):
        return None
    first, second = differing[0]
    index = (0,) * first.outputs[0].depth
    places: list[Place | None] = [(first, index), (second, index)]
    searches = Search(a, b), Search(b, a)
    text = same_operation(searches, [(first, index), (second, index)], True)
    text = f"{text} The programs are the same otherwise, up to there."
    return Blame(*lines(places), *primitives(places), text)


def _new(own: Side, other: Side, node: Node) -> list[Equation]:
    """The equations that lead to a node, back to what the other program has bit for bit."""
    known = set(other.keys.values())

    def stop(node):
        return own.keys[node] in known

    return all_before(own.listing, node, stop)


def _is_alike(first: Equation, second: Equation) -> bool:
    """Whether two equations are the same, up to the values of their operands."""
    if first.name != second.name or len(first.operands) != len(second.operands):
        return False
    if first.outputs[0].depth != second.outputs[0].depth:
        return False
    return all(_same_text(x, second.eqn.params.get(key)) for key, x in first.eqn.params.items())


def _same_text(x: Any, y: Any) -> bool:
    return callable(x) or str(x) == str(y)


def _same_constant(first: Node, second: Node) -> bool:
    """Whether two operands are equal constants, or both are none."""
    x, y = first.constant, second.constant
    if x is None or y is None:
        return x is y
    return np.shape(x) == np.shape(y) and np.array_equal(rounding.wide(x), rounding.wide(y))


def _shows(a: Side, b: Side, first: Equation, second: Equation) -> bool:
    """Whether the results of two equations differ by more than rounding explains."""
    node, other = first.outputs[0], second.outputs[0]
    if not a.inexact(node) or a.array(node).shape != b.array(other).shape:
        return False
    allowed = _FACTOR * rounding.together(a.allowed(node), b.allowed(other))
    dtypes = a.data[node].dtype, b.data[other].dtype
    return rounding.compare(a.array(node), b.array(other), dtypes, allowed).differs


__all__ = ["other_constant"]
