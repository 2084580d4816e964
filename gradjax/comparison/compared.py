"""The values of two programs side by side: what is paired with what, and how far it differs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from gradjax.comparison import rounding
from gradjax.comparison.counterparts import Index, Side
from gradjax.comparison.listing import Node, Origin
from gradjax.comparison.pairing import (
    arranged,
    arrangements,
    check_mapping,
    pair_leaves,
    pair_names,
)
from gradjax.comparison.sites import COTANGENT, VALUE


@dataclass(frozen=True)
class Row:
    """One value, cotangent or gradient of both programs.

    Attributes:
      name_a, name_b: in each program; a key path for a gradient.
      ulps: largest distance of two entries, in ulps of the wider dtype at the largest magnitude;
        inf if they are not finite in different places.
      elementwise: the same, each in the ulps of its own entry.
      limit: what rounding explains, of `ulps`.
      ratio: rms in a over rms in b.
      differs: whether an entry differs beyond rounding.
      equal: whether they are equal bit for bit, NaN to NaN.
      dtypes: of a and of b.
    """

    name_a: str
    name_b: str
    ulps: float
    elementwise: float
    limit: float
    ratio: float
    differs: bool
    equal: bool
    dtypes: tuple[str, str]


@dataclass
class Compared:
    """A value of both programs, and how it compares.

    Attributes:
      kind: "value", "loss", "cotangent" or "gradient".
      names: in a and in b.
      sides: the programs.
      nodes: None where one has no such cotangent, which is then zero.
      orders: the orders of the axes of b to try.
      row: the comparison.
      indices: for values in a loop, the first row that differs, in a and in b.
    """

    kind: str
    names: tuple[str, str]
    sides: tuple[Side, Side]
    nodes: tuple[Node | None, Node | None]
    orders: list[tuple[int, ...]]
    row: Row
    indices: tuple[Index, Index] = ((), ())

    def place(self, k: int) -> tuple[int, ...]:
        """Its place in the order of evaluation, in the first row that differs.

        Args:
          k: 0 for that of a, 1 for that of b.
        """
        node = self.nodes[k]
        if node is None or isinstance(node.origin, Origin):
            return ()
        return node.origin.place(self.indices[k])

    def again(self) -> Compared:
        """The comparison with what is known of rounding now."""
        return _compared(self.kind, self.names, self.sides, self.nodes, self.orders)


def _compared(
    kind: str,
    names: tuple[str, str],
    sides: tuple[Side, Side],
    nodes: tuple[Node | None, Node | None],
    orders: list[tuple[int, ...]] | None = None,
) -> Compared:
    arrays = [None if n is None else side.array(n) for side, n in zip(sides, nodes, strict=True)]
    x, y = [_or_zeros(arrays, k) for k in range(2)]
    if orders is None:
        orders = [tuple(range(y.ndim))] if x.shape == y.shape else arrangements(x.shape, y.shape)
    if not orders:
        return _of_other_size(kind, names, sides, nodes, (x, y))
    found = [_under(order, x, y, sides, nodes) for order in orders]
    best = min(found, key=lambda each: (each.differs, each.ulps))
    order = orders[found.index(best)]
    row = Row(
        *names,
        ulps=best.ulps,
        elementwise=best.elementwise,
        limit=best.limit,
        ratio=best.ratio,
        differs=best.differs,
        equal=best.ulps == 0,
        dtypes=_dtypes(sides, nodes),
    )
    item = Compared(kind, names, sides, nodes, orders, row)
    item.indices = _first_rows(best.exceeding, nodes, y.shape, order)
    return item


def _or_zeros(arrays: list, k: int) -> np.ndarray:
    return np.zeros_like(arrays[1 - k]) if arrays[k] is None else arrays[k]


def _dtypes(sides: tuple[Side, Side], nodes: tuple[Node | None, Node | None]) -> tuple[str, str]:
    own = [None if n is None else str(s.data[n].dtype) for s, n in zip(sides, nodes, strict=True)]
    return str(own[0] or own[1]), str(own[1] or own[0])


def _under(
    order: tuple[int, ...],
    x: np.ndarray,
    y: np.ndarray,
    sides: tuple[Side, Side],
    nodes: tuple[Node | None, Node | None],
) -> rounding.Comparison:
    """The comparison with the axes of b in this order."""
    first, second = (
        np.zeros(z.shape) if node is None else side.allowed(node)
        for side, node, z in zip(sides, nodes, (x, y), strict=True)
    )
    allowed = rounding.together(first, arranged(second, order, x.shape))
    names = _dtypes(sides, nodes)
    dtypes = np.dtype(names[0]), np.dtype(names[1])
    return rounding.compare(x, arranged(y, order, x.shape), dtypes, allowed)


def _of_other_size(
    kind: str,
    names: tuple[str, str],
    sides: tuple[Side, Side],
    nodes: tuple[Node | None, Node | None],
    arrays: tuple[np.ndarray, np.ndarray],
) -> Compared:
    row = Row(
        *names,
        ulps=math.inf,
        elementwise=math.inf,
        limit=0.0,
        ratio=rounding.rms_ratio(*arrays),
        differs=True,
        equal=False,
        dtypes=_dtypes(sides, nodes),
    )
    indices = tuple((0,) * (node.depth if node else 0) for node in nodes)
    return Compared(kind, names, sides, nodes, [], row, (indices[0], indices[1]))


def _first_rows(
    exceeding: np.ndarray,
    nodes: tuple[Node | None, Node | None],
    shape_b: tuple[int, ...],
    order: tuple[int, ...],
) -> tuple[Index, Index]:
    """In each program the first iteration with an entry that exceeds its limit."""
    inverse = np.argsort(order)
    in_b = exceeding.reshape([shape_b[axis] for axis in order]).transpose(inverse)
    return _first_row(exceeding, nodes[0]), _first_row(in_b, nodes[1])


def _first_row(exceeding: np.ndarray, node: Node | None) -> Index:
    if node is None or not node.depth:
        return ()
    lead = exceeding.shape[: node.depth]
    bad = np.any(exceeding.reshape(*lead, -1), axis=-1)
    rows = [tuple(map(int, index)) for index in np.argwhere(bad)] or [(0,) * node.depth]
    place = getattr(node.origin, "place", tuple)
    return min(rows, key=place)


class Pairs:
    """What is paired with what in two programs.

    Attributes:
      unmatched_a, unmatched_b: names of values and parameters without a partner.
      note: what to do about it.
    """

    def __init__(self, a: Side, b: Side, names: Mapping[str, str], leaves: Mapping[str, str]):
        self.a, self.b = a, b
        self._values = a.listing.named(VALUE), b.listing.named(VALUE)
        self._cotangents = a.listing.named(COTANGENT), b.listing.named(COTANGENT)
        known_a, known_b = list(a.listing.sites), list(b.listing.sites)
        check_mapping(names, known_a, known_b, "names")
        shapes = [
            {name: side.array(values[name]).shape for name in side.listing.sites if name in values}
            for side, values in zip((a, b), self._values, strict=True)
        ]
        self._names = pair_names(shapes[0], shapes[1], names)
        parameters = _parameters(a, a.listing.inputs), _parameters(b, b.listing.inputs)
        check_mapping(leaves, list(parameters[0]), list(parameters[1]), "leaves")
        grads = _parameters(a, a.listing.grads), _parameters(b, b.listing.grads)
        self._leaves = pair_leaves(parameters, grads, leaves)
        self._parameters = parameters
        self.unmatched_a = self._unmatched(0, known_a)
        self.unmatched_b = self._unmatched(1, known_b)
        self.note = ""
        if not self._names:
            self.note = _NOTHING_PAIRED

    def _unmatched(self, side: int, known: list[str]) -> tuple[str, ...]:
        paired = {pair[side] for pair in (*self._names, *self._leaves)}
        return tuple(name for name in (*known, *self._parameters[side]) if name not in paired)

    def values(self) -> Iterator[Compared]:
        """The named values, in the order of evaluation of a."""
        values_a, values_b = self._values
        for pair in self._names:
            nodes = values_a[pair[0]], values_b[pair[1]]
            yield _compared("value", pair, (self.a, self.b), nodes)

    def loss(self) -> Iterator[Compared]:
        """The loss."""
        nodes = self.a.listing.loss, self.b.listing.loss
        yield _compared("loss", ("loss", "loss"), (self.a, self.b), nodes)

    def cotangents(self) -> Iterator[Compared]:
        """The cotangents of the named values, from the last to the first."""
        for pair in reversed(self._names):
            nodes = self._cotangents[0].get(pair[0]), self._cotangents[1].get(pair[1])
            has_tangents = pair[0] in self.a.listing.varying and pair[1] in self.b.listing.varying
            if has_tangents and nodes != (None, None):
                yield _compared("cotangent", pair, (self.a, self.b), nodes)

    def gradients(self) -> Iterator[Compared]:
        """The gradients of the parameters, in the order of a."""
        index_a, index_b = ({path: i for i, path in enumerate(each)} for each in self._parameters)
        for pair in self._leaves:
            grads = self.a.listing.grads[index_a[pair[0]]], self.b.listing.grads[index_b[pair[1]]]
            orders = self._orders_of_parameter(pair)
            yield _compared("gradient", pair, (self.a, self.b), grads, orders)

    def _orders_of_parameter(self, pair: tuple[str, str]) -> list[tuple[int, ...]] | None:
        """The order of the axes in which two parameters are equal; None if there is none."""
        x, y = self._parameters[0][pair[0]], self._parameters[1][pair[1]]
        for order in arrangements(x.shape, y.shape):
            if np.array_equal(x, arranged(y, order, x.shape), equal_nan=True):
                return [order]
        return None


_NOTHING_PAIRED = (
    "No named values were compared: the programs have none, or none with the same name or shape. "
    "Mark values with gradjax.tap and equal names in both, or give names={name in a: name in b}."
)


def _parameters(side: Side, nodes: list[Node]) -> dict[str, np.ndarray]:
    """Key path of a parameter -> the array of its node."""
    paths = side.leaves[: side.traced.num_params]
    return {path: side.array(node) for path, node in zip(paths, nodes, strict=False)}


__all__ = ["Compared", "Pairs", "Row"]
