"""The first equation of a program whose result another program does not have.

From a value that differs one walks back through the equations that lead to it, and stops at every
value that the other program has too: with as many entries, equal within rounding, up to a reshape
or a transposition. The equations passed on the way are the *region*; the first of them in the order
of evaluation is where the programs part. In a loop, the region begins in the first iteration that
differs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradjax.comparison import rounding
from gradjax.comparison.listing import Equation, Listing, Node, Origin
from gradjax.comparison.pairing import arranged, entries_key, merged_arrangements
from gradjax.comparison.sites import COTANGENT, VALUE
from gradjax.taps.probe import Traced

Index = tuple[int, ...]
# An equation, and the row of it.
Place = tuple[Equation, Index]
# Equations that a difference is not blamed on: they come with other operations.
PLUMBING = {
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "copy_p",
    "expand_dims",
    "gradjax_name",
    "gradjax_tangent",
    "optimization_barrier",
    "reshape",
    "squeeze",
    COTANGENT,
    VALUE,
}

# Equations that only move entries.
_MOVES = {
    "broadcast_in_dim",
    "concatenate",
    "gather",
    "reshape",
    "rev",
    "slice",
    "split",
    "stack",
    "tile",
    "transpose",
}


class Side:
    """One of the two programs, evaluated.

    Attributes:
      name: "a" or "b".
      traced: the loss.
      listing: its equations.
      data: node -> array.
      leaves: name of each operand.
      movement: node -> how far rounding moves its entries (`comparison.rounding.movements`).
      keys: the bits of every node, whatever the order of its entries.
    """

    def __init__(self, name: str, traced: Traced, leaves: Sequence[str]):
        self.name, self.traced, self.leaves = name, traced, list(leaves)
        self.listing = Listing(traced)
        self.data = self.listing.evaluate(traced.leaves)
        for node in self._constants():
            self.data[node] = node.constant
        self.movement: dict[Node, np.ndarray] = {}
        self.keys = {node: _bits(x) for node, x in self.data.items()}
        self._wide: dict[Node, np.ndarray] = {}
        self._allowed: dict[tuple[Node, Index], np.ndarray] = {}
        self._reach: dict[tuple[Node, Index], float] = {}

    def _constants(self) -> Iterator[Node]:
        outputs = [self.listing.loss, *self.listing.grads]
        for nodes in (outputs, *(each.operands for each in self.listing.all())):
            yield from (node for node in nodes if node.constant is not None)

    def measure(self, other: "Side") -> None:
        """Measure how far rounding moves what the other program does not have bit for bit."""
        known = set(other.keys.values())
        noisy = []
        for equation in self.listing.all():
            is_new = any(self.keys[node] not in known for node in equation.outputs)
            if is_new and rounding.rounds(equation, self.data):
                noisy.append(equation)
        inputs = []
        for node in self.listing.inputs:
            if rounding.is_inexact(self.data[node]) and self.keys[node] not in known:
                inputs.append(node)
        self.movement = rounding.movements(self.listing, self.data, noisy, inputs)
        self._allowed.clear()
        self._reach.clear()

    def inexact(self, node: Node) -> bool:
        """Whether a node holds floating or complex numbers."""
        return rounding.is_inexact(self.data[node])

    def array(self, node: Node, index: Index = ()) -> np.ndarray:
        """The array of a node, wide, or one row of it."""
        if node not in self._wide:
            self._wide[node] = rounding.wide(self.data[node])
        return self._wide[node][index]

    def allowed(self, node: Node, index: Index = ()) -> np.ndarray:
        """How far each entry may be off; the rows of a loop are measured by themselves."""
        if (node, index) not in self._allowed:
            moved = self.movement.get(node)
            if moved is not None and len(index) < node.depth:
                rows = range(moved.shape[len(index)])
                found = np.stack([self.allowed(node, (*index, row)) for row in rows])
            else:
                own = None if moved is None else moved[index]
                found = rounding.allowance(self.array(node, index), own)
            self._allowed[node, index] = found
        return self._allowed[node, index]

    def reach(self, node: Node, index: Index) -> float:
        """The largest of what `allowed` gives."""
        if (node, index) not in self._reach:
            moved = self.movement.get(node)
            own = np.zeros(1) if moved is None else moved[index]
            self._reach[node, index] = float(np.max(own[np.isfinite(own)], initial=0.0))
        return self._reach[node, index]


def _bits(x: Any) -> tuple[str, bytes]:
    return _kind(x), entries_key(rounding.wide(x))


def _kind(x: Any) -> str:
    """Arrays of different kinds are no counterparts."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return "key"
    return "number" if rounding.is_inexact(x) else "integer"


# Counterparts


class _Rows(NamedTuple):
    """The rows of a node: the largest magnitude and the sum of magnitudes of each."""

    node: Node
    largest: np.ndarray
    total: np.ndarray


class Search:
    """Finds the counterparts of one program's values among those of the other."""

    def __init__(self, own: Side, other: Side):
        self.own, self.other = own, other
        self._known: dict[tuple[Node, Index], bool] = {}
        self._groups: dict[tuple[str, int], list[_Rows]] = {}
        for node, x in other.data.items():
            self._group(node, x)

    def _group(self, node: Node, x: Any) -> None:
        array = np.abs(rounding.wide(x))
        flat = np.where(np.isfinite(array), array, 0.0).reshape(*array.shape[: node.depth], -1)
        rows = _Rows(node, np.max(flat, axis=-1, initial=0.0), np.sum(flat, axis=-1))
        self._groups.setdefault((_kind(x), flat.shape[-1]), []).append(rows)

    def matched(self, node: Node, index: Index) -> bool:
        """Whether the other program has a row of a node, within rounding."""
        if (node, index) not in self._known:
            self._known[node, index] = self._find(node, index)
        return self._known[node, index]

    def matched_in_order(self, node: Node, index: Index) -> bool:
        """As `matched`; what only moves entries has a counterpart with the same order of them."""
        if not isinstance(node.origin, Equation) or node.origin.name not in _MOVES:
            return self.matched(node, index)
        return self._find(node, index, in_order=True)

    def _find(self, node: Node, index: Index, in_order: bool = False) -> bool:
        x = self.own.array(node, index)
        if not x.size:
            return True
        allowed = self.own.allowed(node, index)
        group = self._groups.get((_kind(self.own.data[node]), x.size), [])
        return any(
            self._agree(node, x, allowed, rows.node, place, in_order)
            for rows in group
            for place in self._places(rows, node, index, x)
        )

    def _places(self, rows: _Rows, node: Node, index: Index, x: np.ndarray) -> Iterator[Index]:
        """The rows of another node that may be a counterpart, by their sizes."""
        finite = np.where(np.isfinite(x), np.abs(x), 0.0)
        largest, total = np.max(finite), np.sum(finite)
        own = self.own.reach(node, index)
        if rows.node.depth == node.depth:
            if any(i >= n for i, n in zip(index, rows.largest.shape, strict=True)):
                return
            places = [index]
        else:
            places = list(np.ndindex(rows.largest.shape))
        for place in places:
            slack = own + self.other.reach(rows.node, place)
            slack += self._unit(node, rows.node) * largest
            near = abs(rows.largest[place] - largest) <= slack
            if near and abs(rows.total[place] - total) <= slack * x.size:
                yield place

    def _unit(self, node: Node, other: Node) -> float:
        """A rounding of the wider dtype, 0 for integers."""
        if not self.own.inexact(node):
            return 0.0
        own, others = self.own.data[node], self.other.data[other]
        return min(rounding.epsilon(own), rounding.epsilon(others))

    def _agree(
        self,
        node: Node,
        x: np.ndarray,
        allowed: np.ndarray,
        other: Node,
        place: Index,
        in_order: bool,
    ) -> bool:
        y, others = self.other.array(other, place), self.other.allowed(other, place)
        if x.ndim > y.ndim and not in_order:
            # The one with more axes is the one to transpose.
            x, y, allowed, others = y, x, others, allowed
        dtypes = self.own.data[node].dtype, self.other.data[other].dtype
        orders = [tuple(range(y.ndim))]
        # A square array that is transposed is another one.
        if x.shape != y.shape and not in_order:
            orders = merged_arrangements(x.shape, y.shape)
        for order in orders:
            z, own = arranged(y, order, x.shape), arranged(others, order, x.shape)
            if not self.own.inexact(node):
                if np.array_equal(x, z):
                    return True
                continue
            limit = rounding.together(allowed, own)
            if not rounding.compare(x, z, dtypes, limit).differs:
                return True
        return False


# The region


@dataclass
class Region:
    """What leads to a value and has no counterpart in the other program.

    Attributes:
      equations: (equation, index of its row) in the order of evaluation.
      leaves: operands and constants among it.
    """

    equations: list[Place] = field(default_factory=list)
    leaves: list[Node] = field(default_factory=list)

    @property
    def first(self) -> Place | None:
        """Where the region begins; an equation that only comes with others where there is none."""
        chosen = [each for each in self.equations if each[0].name not in PLUMBING]
        return (chosen or self.equations or [None])[0]


def region(node: Node, index: Index, matched: Callable[[Node, Index], bool]) -> Region:
    """What leads to a row of a node, back to what is matched.

    Args:
      node, index: the row.
      matched: whether to stop at a row of a node.
    """
    found = Region()
    seen: set[tuple[Node, Index]] = set()
    equations: dict[tuple[Equation, Index], None] = {}
    stack = [(node, index)]
    while stack:
        node, index = stack.pop()
        index = index[: node.depth]
        if (node, index) in seen:
            continue
        is_first = not seen
        seen.add((node, index))
        if not is_first and matched(node, index):
            continue
        if isinstance(node.origin, Origin):
            before = _before(node, index, matched)
            if before is None:
                found.leaves.append(node)
            else:
                stack.append(before)
        elif node.origin.bodies:
            stack.append(_inside(node.origin, node, index, matched))
        else:
            equations[node.origin, index] = None
            stack += [(operand, index) for operand in node.origin.operands]
    found.equations = sorted(equations, key=lambda each: each[0].place(each[1]))
    return found


def _before(
    node: Node, index: Index, matched: Callable[[Node, Index], bool]
) -> tuple[Node, Index] | None:
    """Where a node inside a loop gets its row from; None if it stands at the beginning."""
    origin = node.origin
    assert isinstance(origin, Origin)
    if origin.kind in ("outside", "row") and origin.node is not None:
        return origin.node, index
    if origin.kind != "carry" or origin.node is None or node.back is None:
        return None
    # Back to the iteration that was given what is matched.
    step = 1 if node.reverse else -1
    *outer, row = index
    previous = row + step
    while previous in range(node.length):
        if matched(node, (*outer, previous)):
            return node.back, (*outer, previous)
        previous += step
    if previous - step != row and matched(origin.node, tuple(outer)):
        return node.back, (*outer, previous - step)
    return origin.node, tuple(outer)


def _inside(
    equation: Equation, node: Node, index: Index, matched: Callable[[Node, Index], bool]
) -> tuple[Node, Index]:
    """The node and row inside a loop or a branch that an output is."""
    position = equation.outputs.index(node)
    if equation.name != "scan":
        return equation.ends[equation.taken][position], index
    end, length = equation.ends[0][position], equation.eqn.params["length"]
    rows = range(length)
    if equation.eqn.params["reverse"]:
        rows = rows[::-1]
    if position < len(equation.carried):
        return end, (*index, rows[-1])
    differing = (row for row in rows if not matched(end, (*index, row)[: end.depth]))
    return end, (*index, next(differing, rows[-1]))


def all_before(listing: Listing, node: Node, stop: Callable[[Node], bool]) -> list[Equation]:
    """The equations that lead to a node, in all iterations, back to nodes at which to stop."""
    found: dict[Equation, None] = {}
    seen: set[Node] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node in seen or (seen and stop(node)):
            continue
        seen.add(node)
        if isinstance(node.origin, Origin):
            stack += [each for each in (node.origin.node, node.back) if each is not None]
        elif node.origin.bodies:
            equation = node.origin
            stack.append(equation.ends[max(equation.taken, 0)][equation.outputs.index(node)])
        else:
            found[node.origin] = None
            stack += node.origin.operands
    place = {equation: i for i, equation in enumerate(listing.all())}
    return sorted(found, key=lambda equation: place[equation])


__all__ = ["PLUMBING", "Place", "Region", "Search", "Side", "all_before", "region"]
