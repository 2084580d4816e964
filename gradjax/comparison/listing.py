"""Every value of a program: a loss with its gradient, evaluated with all that lies in between.

    listing = Listing(traced)      equations in the order of evaluation, calls entered
    data = listing.evaluate()      node -> its array

A value inside a scan has one row for each iteration; a `cond` has the branch that is taken. A
`while` loop and a program over several devices are evaluated whole. Cost: one compilation per
distinct operation, and the memory of everything that is computed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from gradjax.comparison.sites import gradient_with_sites
from gradjax.taps.interpret import Site
from gradjax.taps.jaxprs import (
    INLINE,
    REMAT,
    Literal,
    bind,
    closed,
    inner,
    scan_split,
)
from gradjax.taps.probe import Traced

_CUSTOM = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
# Their implementation outside of jit is slow, or does not exist.
_WHOLE = {"while", "shard_map", "xla_pmap", "pallas_call", "custom_linear_solve"}


# The graph of a program's values

ROW, REVERSED = "row", "reversed row"
Order = tuple[int | str, ...]


class Origin(NamedTuple):
    """Where the value of a node comes from if no equation made it.

    Attributes:
      kind: "input", "literal", "captured" (an array from a closure), "outside" (read by a loop),
        "row" (one row of what a loop goes through), "carry", "branch".
      node: the node outside, or the first carried value.
      index: number of the operand, for an input.
    """

    kind: str
    node: "Node | None" = None
    index: int = 0


@dataclass(eq=False)
class Node:
    """A value of a program.

    Attributes:
      origin: the equation that made it, or an `Origin`.
      depth: number of scans around it; its array has so many axes of rows in front.
      constant: its array if it stands in the program.
      back: for a carried value, the node that the iteration before ended with.
      reverse: for a carried value, whether the rows are read from the last to the first.
      length: for a carried value, the number of iterations.
    """

    origin: "Equation | Origin"
    depth: int = 0
    constant: Any = None
    back: "Node | None" = None
    reverse: bool = False
    length: int = 0


@dataclass(eq=False)
class Equation:
    """An equation of a program, with what lies inside a scan or a `cond`.

    Attributes:
      eqn: the equation of the jaxpr.
      calls: the equations around it, the outermost first.
      operands, outputs: its nodes.
      order: place in the order of evaluation, with `ROW` or `REVERSED` in place of an iteration.
      bodies: the equations of a scan's body, or of each branch of a `cond`.
      given: the nodes that the body, or each branch, starts from.
      ends: the nodes that it ends with.
      taken: the branch of a `cond` that was taken.
    """

    eqn: Any
    calls: tuple[Any, ...]
    operands: list[Node]
    outputs: list[Node] = field(default_factory=list)
    order: Order = ()
    bodies: list[list["Equation"]] = field(default_factory=list)
    given: list[list[Node]] = field(default_factory=list)
    ends: list[list[Node]] = field(default_factory=list)
    taken: int = -1
    compiled: dict[Any, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.eqn.primitive.name

    @property
    def carried(self) -> list[Node]:
        """The nodes of the values that a scan carries, inside it."""
        num_consts, num_carry = scan_split(self.eqn)
        return self.given[0][num_consts : num_consts + num_carry]

    @property
    def eqns(self) -> tuple[Any, ...]:
        """The equations around it and its own."""
        return (*self.calls, self.eqn)

    def place(self, index: tuple[int, ...]) -> tuple[int, ...]:
        """Its place in the order of evaluation, in the iterations that make the rows `index`."""
        rows = iter(index)
        place = []
        for each in self.order:
            if isinstance(each, int):
                place.append(each)
            else:
                place.append(next(rows) if each == ROW else -next(rows))
        return tuple(place)


def _build(
    jaxpr: Any,
    operands: Sequence[Node],
    calls: tuple[Any, ...],
    order: Order,
    depth: int,
) -> tuple[list[Equation], list[Node]]:
    """The equations of a closed jaxpr, calls entered, and the nodes of its outputs."""
    env: dict[Any, Node] = {}
    for var, const in zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True):
        env[var] = Node(Origin("captured"), 0, const)
    env.update(zip(jaxpr.jaxpr.invars, operands, strict=True))
    found: list[Equation] = []

    def read(atom):
        if isinstance(atom, Literal):
            dtype = getattr(atom.aval, "dtype", None)
            return Node(Origin("literal"), 0, np.asarray(atom.val, dtype))
        return env[atom]

    for i, eqn in enumerate(jaxpr.jaxpr.eqns):
        given, here = [read(atom) for atom in eqn.invars], (*order, i)
        if eqn.primitive.name in INLINE | REMAT | _CUSTOM and inner(eqn) is not None:
            inside, out = _build(inner(eqn), given, (*calls, eqn), here, depth)
            found += inside
        else:
            equation = _equation(eqn, given, calls, here, depth)
            found.append(equation)
            out = equation.outputs
        env.update(zip(eqn.outvars, out, strict=True))
    return found, [read(atom) for atom in jaxpr.jaxpr.outvars]


def _equation(eqn: Any, operands: list[Node], calls: tuple, order: Order, depth: int) -> Equation:
    equation = Equation(eqn, calls, operands, order=order)
    if eqn.primitive.name == "scan":
        _build_scan(equation, depth)
    else:
        equation.outputs = [Node(equation, depth) for _ in eqn.outvars]
    # The branch that is taken differs from iteration to iteration; inside a scan none is entered.
    if eqn.primitive.name == "cond" and not depth:
        for k, branch in enumerate(eqn.params["branches"]):
            given = operands[1:]
            inside, out = _build(closed(branch), given, equation.eqns, (*order, k), depth)
            equation.bodies.append(inside)
            equation.given.append(given)
            equation.ends.append(out)
    return equation


def _build_scan(equation: Equation, depth: int) -> None:
    num_consts, num_carry = scan_split(equation.eqn)
    reverse, end = equation.eqn.params["reverse"], num_consts + num_carry
    given = []
    for i, node in enumerate(equation.operands):
        if i < num_consts:
            given.append(Node(Origin("outside", node), node.depth, node.constant))
        elif i < end:
            carried = Node(Origin("carry", node), depth + 1, reverse=reverse)
            carried.length = equation.eqn.params["length"]
            given.append(carried)
        else:
            given.append(Node(Origin("row", node), node.depth + 1))
    order = (*equation.order, REVERSED if reverse else ROW)
    inside, ends = _build(inner(equation.eqn), given, equation.eqns, order, depth + 1)
    for node, back in zip(given[num_consts:end], ends[:num_carry], strict=True):
        node.back = back
    equation.outputs = [Node(equation, depth) for _ in ends]
    equation.bodies, equation.given, equation.ends = [inside], [given], [ends]


def _all(equations: Sequence[Equation]) -> Iterator[Equation]:
    """The equations and those inside them, in order; branches that are not taken are left out."""
    for equation in equations:
        for k, body in enumerate(equation.bodies):
            if equation.name == "scan" or k == equation.taken:
                yield from _all(body)
        yield equation


# Evaluation

Data = dict[Node, Any]
# Signs of the rounding errors of an equation's outputs; None where it is exact.
Signs = dict[Equation, list[Any]]
# (equation, operands, outputs, signs) -> the outputs with rounding errors of these signs.
Perturb = Callable[[Equation, list[Any], list[Any], list[Any]], list[Any]]


def _read(data: Data, node: Node) -> Any:
    return node.constant if node.constant is not None else data[node]


def _execute(
    equations: Sequence[Equation], data: Data, perturb: Perturb | None, signs: Signs
) -> None:
    """Put the arrays of all nodes into `data`, which has those that the equations start from."""
    for equation in equations:
        given = [_read(data, node) for node in equation.operands]
        if equation.name == "scan":
            _execute_scan(equation, given, data, perturb, signs)
            continue
        if equation.bodies:
            out = _execute_branch(equation, given, data, perturb, signs)
        elif equation.name in _WHOLE:
            if "whole" not in equation.compiled:
                eqn = equation.eqn
                equation.compiled["whole"] = jax.jit(lambda ops, eqn=eqn: bind(eqn, ops))
            out = equation.compiled["whole"](given)
        else:
            out = bind(equation.eqn, given)
        if equation in signs and perturb is not None:
            out = perturb(equation, given, out, signs[equation])
        data.update(zip(equation.outputs, out, strict=True))


def _execute_branch(
    equation: Equation, given: list, data: Data, perturb: Perturb | None, signs: Signs
) -> list:
    # Evaluated again with rounding errors, a program takes the branches that it took.
    if equation.taken < 0:
        number = np.asarray(given[0]).astype(int)
        equation.taken = int(np.clip(number, 0, len(equation.bodies) - 1))
    _execute(equation.bodies[equation.taken], data, perturb, signs)
    return [_read(data, node) for node in equation.ends[equation.taken]]


def _execute_scan(
    equation: Equation, given: list, data: Data, perturb: Perturb | None, signs: Signs
) -> None:
    inside = list(_within(equation))
    noisy = [each for each in _all(equation.bodies[0]) if each in signs]
    key = ("scan", tuple(map(id, noisy)))
    if key not in equation.compiled:
        equation.compiled[key] = jax.jit(_scanned(equation, inside, noisy, perturb))
    out, rows = equation.compiled[key](given, [signs[each] for each in noisy])
    data.update(zip(inside, rows, strict=True))
    data.update(zip(equation.outputs, out, strict=True))
    for node, x in zip(equation.given[0], given, strict=True):
        # What is read from outside is there already; the rows of an array are the array.
        if isinstance(node.origin, Origin) and node.origin.kind != "carry":
            data[node] = x


def _within(equation: Equation) -> Iterator[Node]:
    """The nodes inside a scan that have a row for each iteration."""
    for node in equation.given[0]:
        if isinstance(node.origin, Origin) and node.origin.kind == "carry":
            yield node
    for each in equation.bodies[0]:
        if each.name == "scan":
            yield from each.given[0]
            carried = set(each.given[0])
            yield from (node for node in _within(each) if node not in carried)
        yield from each.outputs


def _scanned(
    equation: Equation, inside: list[Node], noisy: list[Equation], perturb: Perturb | None
) -> Callable[[list, list], tuple[list, list]]:
    """The function (operands, signs) -> (outputs of the scan, rows of the nodes inside)."""
    num_consts, num_carry = scan_split(equation.eqn)
    end = num_consts + num_carry
    starts, ends = equation.given[0], equation.ends[0]
    options = {key: equation.eqn.params[key] for key in ("length", "reverse")}

    def function(given, signs):
        def body(carry, row):
            own, own_signs = row
            local = dict(zip(starts, [*given[:num_consts], *carry, *own], strict=True))
            _execute(equation.bodies[0], local, perturb, dict(zip(noisy, own_signs, strict=True)))
            out = [_read(local, node) for node in ends]
            return out[:num_carry], (out[num_carry:], [local[node] for node in inside])

        final, (ys, rows) = lax.scan(body, given[num_consts:end], (given[end:], signs), **options)
        return [*final, *ys], rows

    return function


class Listing:
    """A program of value and gradient as equations and nodes.

    Attributes:
      equations: in the order of evaluation; those inside a scan or a `cond` are in `bodies`.
      inputs: the nodes of the operands.
      loss: the node of the loss.
      grads: the nodes of the parameters' gradients.
      sites: name -> its site, in the order of evaluation.
      varying: names of the values that depend on the parameters.
    """

    def __init__(self, traced: Traced):
        self.sites: dict[str, Site] = {site.name: site for site in traced.sites}
        self.traced = traced
        gradient, self.varying = gradient_with_sites(traced)
        self.inputs = [Node(Origin("input", index=i)) for i in range(len(traced.leaves))]
        self.equations, (self.loss, *self.grads) = _build(gradient, self.inputs, (), (), 0)

    def evaluate(
        self, operands: Sequence[Any], perturb: Perturb | None = None, signs: Signs | None = None
    ) -> Data:
        """The array of every node.

        Args:
          operands: of the program.
          perturb: adds rounding errors to the outputs of an equation.
          signs: those of the equations that get them; inside a scan a row for each iteration.
        """
        data = dict(zip(self.inputs, operands, strict=True))
        _execute(self.equations, data, perturb, signs or {})
        return data

    def all(self) -> list[Equation]:
        """All equations that were evaluated, in order; a scan or a `cond` after its inside."""
        return list(_all(self.equations))

    def named(self, primitive: str) -> dict[str, Node]:
        """Name -> node, of the values or the cotangents (`gradjax.comparison.sites`)."""
        found: dict[str, Node] = {}
        for equation in self.all():
            if equation.name == primitive:
                # A rematerialised value comes again, and is the first one.
                found.setdefault(equation.eqn.params["site"], equation.outputs[0])
        return found


__all__ = [
    "Data",
    "Equation",
    "Listing",
    "Node",
    "Origin",
    "Perturb",
    "Signs",
]
