"""Whether two values were computed in different dtypes, and where that begins."""

import jax.numpy as jnp

from gradjax.comparison import rounding
from gradjax.comparison.blame import Blame, lines, primitives, producer
from gradjax.comparison.compared import Compared
from gradjax.comparison.counterparts import Place, Side, all_before
from gradjax.comparison.listing import Equation, Node
from gradjax.comparison.sites import COTANGENT, VALUE


def _rounded(side: Side, other: Side, node: Node | None) -> list[tuple[Equation, str]]:
    """What is computed, and in which dtype, since the last value that both programs have."""
    if node is None:
        return []
    known = set(other.keys.values())

    def stop(node):
        is_named = isinstance(node.origin, Equation) and node.origin.name in (VALUE, COTANGENT)
        return is_named or side.keys[node] in known

    found = []
    for equation in all_before(side.listing, node, stop):
        if rounding.rounds(equation, side.data):
            found.append((equation, str(side.data[equation.outputs[0]].dtype)))
    return found


def dtype_differs(a: Side, b: Side, item: Compared) -> bool:
    """Whether two values that are not equal were computed in different dtypes."""
    return None not in item.nodes and len(set(_narrowest(a, b, item))) > 1


def _narrowest(a: Side, b: Side, item: Compared) -> tuple[str, str]:
    """In each program the narrowest dtype that a value was computed in."""
    found = []
    for k, (side, other) in enumerate(((a, b), (b, a))):
        dtypes = [dtype for _, dtype in _rounded(side, other, item.nodes[k])]
        found.append(max([*dtypes, item.row.dtypes[k]], key=_epsilon))
    return found[0], found[1]


def _epsilon(dtype: str) -> float:
    return float(jnp.finfo(dtype).eps)


def blame_dtype(a: Side, b: Side, item: Compared) -> Blame:
    """Where two programs begin to compute in different dtypes.

    Args:
      a, b: the programs.
      item: a value for which `dtype_differs`.
    """
    dtypes = _narrowest(a, b, item)
    places: list[Place | None] = []
    for k, (side, other) in enumerate(((a, b), (b, a))):
        found = _rounded(side, other, item.nodes[k])
        own = [each for each, dtype in found if dtype == dtypes[k]]
        node = item.nodes[k]
        assert node is not None
        places.append((own[0], ()) if own else producer(node, item.indices[k]))
    known, names = lines(places), primitives(places)
    what = next((name for name in names if name), "")
    place = next((f", {line}" for line in known if line is not None), "")
    text = (
        f"a computes {what or 'it'} in {dtypes[0]}, b in {dtypes[1]}, first at "
        f"{item.names[0]}{place}."
    )
    return Blame(*known, *names, text)


__all__ = ["blame_dtype", "dtype_differs"]
