"""The graph of the equations that carry activations, and its chain of post-dominators.

The graph of a traced loss has one sink, the loss. v *post-dominates* u when every path from u to
the loss runs through v (Prosser 1959; immediate post-dominators by one sweep backwards, Cooper,
Harvey & Kennedy 2001). A parameter becomes an *activation* where it meets data. Calls inside a
jaxpr are treated as if written in place; the body of a scan is a graph of its own.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from gradjax.taps.jaxprs import INLINE, REMAT, Literal, Path, inner, insides, scan_split

# What a variable holds: literals and what is computed from them only; data; parameters and what is
# computed from them only; activations.
NEUTRAL, DATA, PARAM, ACT = range(4)
# Primitives without a derivative.
CUTS = {
    "stop_gradient",
    "floor",
    "ceil",
    "round",
    "sign",
    "is_finite",
    "argmax",
    "argmin",
}
PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"}
# Producers of activations that enter the body of a scan: the carry, and anything else outside.
ENTRY, OUTSIDE = -1, -2


class Value(NamedTuple):
    """What is known about a variable."""

    kind: int = NEUTRAL
    # the node that produced it, if it is an activation
    node: int | None = None
    # the parameters that it is computed from, if it is computed from parameters only
    leaves: frozenset[int] = frozenset()
    # which of the node's outputs it is
    out: int = 0


@dataclasses.dataclass
class Node:
    """An equation that carries activations."""

    path: Path
    primitive: str
    eqn: Any
    # (producer, which of its outputs) of the activations among the operands
    uses: frozenset[tuple[int, int]]
    # parameters that meet activations here
    leaves: frozenset[int] = frozenset()
    # of the weights applied here; 0 if there are none
    fan_in: int = 0
    fan_out: int = 0
    # the graph of a scan's body
    body: "Frame | None" = None
    # a scan that uses the same weights in every iteration
    over_time: bool = False

    @property
    def inputs(self) -> set[int]:
        """The producers of the activations among the operands."""
        return {producer for producer, _ in self.uses}

    @property
    def weighs(self) -> bool:
        """Whether weights are applied to activations here."""
        return self.fan_in > 0


@dataclasses.dataclass
class Frame:
    """The graph of a jaxpr's activations; a node without consumers is not alive."""

    nodes: list[Node] = dataclasses.field(default_factory=list)
    outputs: list[Value] = dataclasses.field(default_factory=list)
    # alive node, or ENTRY -> the nodes that use it; the sink is len(nodes)
    consumers: dict[int, set[int]] = dataclasses.field(default_factory=dict)
    # alive node, or ENTRY -> its immediate post-dominator
    dominator: dict[int, int] = dataclasses.field(default_factory=dict)
    # parameters of which parts are taken
    sliced: set[int] = dataclasses.field(default_factory=set)
    # parameters with a differentiable path to the outputs
    used: frozenset[int] = frozenset()


def is_float(atom: Any) -> bool:
    """Whether a variable or literal can be differentiated."""
    return jnp.issubdtype(atom.aval.dtype, jnp.inexact)


def _fans(eqn: Any, weights: int) -> tuple[int, int]:
    """(fan_in, fan_out) of operand number `weights` of a product."""
    shape = eqn.invars[weights].aval.shape
    size = math.prod(shape)
    numbers = eqn.params["dimension_numbers"]
    if eqn.primitive.name == "dot_general":
        contracted, batched = numbers[0][weights], numbers[1][weights]
        fan_in = batch = 1
        for d in contracted:
            fan_in *= shape[d]
        for d in batched:
            batch *= shape[d]
        return max(fan_in, 1), max(size // max(fan_in * batch, 1), 1)
    if eqn.primitive.name == "conv_general_dilated" and weights == 1:
        spec = numbers.rhs_spec
        window = size // max(shape[spec[0]] * shape[spec[1]], 1)
        return max(window * shape[spec[1]], 1), max(window * shape[spec[0]], 1)
    return max(size, 1), max(size, 1)


def _holds_product(jaxpr: Any) -> bool:
    for eqn in jaxpr.jaxpr.eqns:
        if eqn.primitive.name in PRODUCTS:
            return True
        if any(_holds_product(each) for _, each in insides(eqn)):
            return True
    return False


def walk(jaxpr: Any, given: Sequence[Value], frame: Frame, path: Path) -> list[Value]:
    """Add the equations of a closed jaxpr to `frame`.

    Args:
      jaxpr: closed.
      given: what is known about its operands.
      frame: the graph that grows.
      path: where the jaxpr stands in the whole one.

    Returns:
      What is known about the jaxpr's outputs.
    """
    env: dict[Any, Value] = {}
    for var, const in zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True):
        env[var] = Value(NEUTRAL if getattr(const, "size", 1) <= 1 else DATA)
    env.update(zip(jaxpr.jaxpr.invars, given, strict=True))

    def read(atom):
        return Value() if isinstance(atom, Literal) else env[atom]

    for i, eqn in enumerate(jaxpr.jaxpr.eqns):
        values, here = [read(atom) for atom in eqn.invars], (*path, i)
        if eqn.primitive.name in INLINE | REMAT:
            out = walk(inner(eqn), values, frame, here)
        elif eqn.primitive.name == "scan":
            out = _walk_scan(eqn, values, frame, here)
        else:
            out = _walk_equation(eqn, values, frame, here)
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(atom) for atom in jaxpr.jaxpr.outvars]


def _add(frame: Frame, node: Node) -> int:
    frame.nodes.append(node)
    return len(frame.nodes) - 1


def _producers(values: Iterable[Value]) -> frozenset[tuple[int, int]]:
    return frozenset((v.node, v.out) for v in values if v.kind == ACT and v.node is not None)


def _leaves(values: Iterable[Value]) -> frozenset[int]:
    return frozenset().union(*(v.leaves for v in values if v.kind == PARAM))


def _walk_equation(eqn: Any, values: list[Value], frame: Frame, here: Path) -> list[Value]:
    name, kinds, leaves = eqn.primitive.name, {v.kind for v in values}, _leaves(values)
    if name in CUTS or not any(map(is_float, eqn.outvars)):
        return [Value(DATA if kinds - {NEUTRAL} else NEUTRAL)] * len(eqn.outvars)
    if name in ("slice", "dynamic_slice", "gather") and kinds <= {PARAM, NEUTRAL}:
        frame.sliced |= leaves
    has_constant_array = any(
        v.kind == NEUTRAL and atom.aval.shape for v, atom in zip(values, eqn.invars, strict=True)
    )
    meets = PARAM in kinds and (DATA in kinds or (name in PRODUCTS and has_constant_array))
    if ACT not in kinds and not meets:
        return [Value(max(kinds, default=NEUTRAL), None, leaves)] * len(eqn.outvars)
    node = Node(here, name, eqn, _producers(values), leaves)
    if name in PRODUCTS and PARAM in kinds:
        node.fan_in, node.fan_out = _fans(eqn, [v.kind for v in values].index(PARAM))
    elif name == "gather" and values[0].kind == PARAM:
        # an embedding table: each output is one row
        node.fan_in = node.fan_out = 1
    elif PARAM in kinds and any(_holds_product(each) for _, each in insides(eqn)):
        node.fan_in = node.fan_out = max(eqn.outvars[0].aval.shape[-1:] or (1,))
    index = _add(frame, node)
    return [
        Value(ACT, index, out=k) if is_float(var) else Value(DATA)
        for k, var in enumerate(eqn.outvars)
    ]


def _walk_scan(eqn: Any, values: list[Value], frame: Frame, here: Path) -> list[Value]:
    num_consts, num_carry = scan_split(eqn)
    ends = num_consts + num_carry
    consts, xs = _from_outside(values[:num_consts]), _from_outside(values[ends:])
    body = _walk_body(eqn, consts, values[num_consts:ends], xs, here)
    if all(v.kind != ACT for v in body.outputs):
        return body.outputs
    node = Node(here, "scan", eqn, _producers(values), body.used, body=body)
    weights = [n for n in body.nodes if n.weighs]
    if weights:
        node.fan_in, node.fan_out = weights[0].fan_in, weights[0].fan_out
    used = frozenset().union(*(n.leaves for n in weights))
    stacked, shared = _leaves(xs), _leaves(consts)
    node.over_time = bool(used & shared) and not used & stacked
    index = _add(frame, node)
    return [Value(ACT, index, out=k) if v.kind == ACT else v for k, v in enumerate(body.outputs)]


def _from_outside(values: Iterable[Value]) -> list[Value]:
    """The values as the body of a scan sees them."""
    return [v._replace(node=OUTSIDE) if v.kind == ACT else v for v in values]


def _walk_body(eqn: Any, consts: list, carry: list, xs: list, here: Path) -> Frame:
    """The graph of a scan's body.

    A carried value is of the kind of its start or of its next value, whichever is greater, so the
    body is walked until these kinds do not change: at most three times.
    """
    kinds = [v.kind for v in carry]
    while True:
        body = Frame()
        entry = [Value(kind, ENTRY if kind == ACT else None) for kind in kinds]
        body.outputs = walk(inner(eqn), [*consts, *entry, *xs], body, here)
        again = [max(kind, v.kind) for kind, v in zip(kinds, body.outputs, strict=False)]
        if again == kinds:
            link_up(body)
            return body
        kinds = again


def link_up(frame: Frame) -> None:
    """Find consumers and immediate post-dominators of the nodes with a path to the outputs."""
    sink = len(frame.nodes)
    alive = {v.node for v in frame.outputs if v.kind == ACT and v.node is not None}
    frame.consumers = {u: {sink} for u in alive}
    depth, ahead = {sink: 0}, {}
    frame.dominator = ahead

    def common(a: int, b: int) -> int:
        """The nearest node that post-dominates both."""
        while a != b:
            if depth[a] >= depth[b]:
                a = ahead[a]
            else:
                b = ahead[b]
        return a

    def settle(u: int) -> None:
        first, *rest = frame.consumers[u]
        for v in rest:
            first = common(first, v)
        ahead[u], depth[u] = first, depth[first] + 1

    for u in range(sink - 1, -1, -1):
        if u not in frame.consumers:
            continue
        settle(u)
        for v in frame.nodes[u].inputs:
            frame.consumers.setdefault(v, set()).add(u)
    if ENTRY in frame.consumers:
        settle(ENTRY)
    living = [u for u in frame.consumers if 0 <= u < sink]
    _drop_unused_stacks(frame, living)
    direct = frozenset().union(*(v.leaves for v in frame.outputs))
    frame.used = direct.union(*(frame.nodes[u].leaves for u in living))


def _drop_unused_stacks(frame: Frame, living: Sequence[int]) -> None:
    """Link the bodies of scans again without the stacked outputs that nothing uses."""
    used = {(v.node, v.out) for v in frame.outputs if v.kind == ACT}
    used = used.union(*(frame.nodes[u].uses for u in living))
    for u in sorted(living):
        node = frame.nodes[u]
        if node.body is None:
            continue
        carried = scan_split(node.eqn)[1]
        outputs = enumerate(node.body.outputs)
        node.body.outputs = [
            v if k < carried or (u, k) in used else Value(DATA) for k, v in outputs
        ]
        link_up(node.body)
        node.leaves = node.body.used


def chain_from(frame: Frame, start: int) -> list[int]:
    """A node and its post-dominators in the order of the computation."""
    chain, sink = [], len(frame.nodes)
    while start != sink:
        if start >= 0:
            chain.append(start)
        start = frame.dominator[start]
    return chain


def main_chain(frame: Frame, inside_scan: bool) -> list[int]:
    """The chain from a scan's carry or, outside, from the input with the most layers ahead."""
    if inside_scan:
        return chain_from(frame, ENTRY) if ENTRY in frame.dominator else []
    roots = [u for u in sorted(frame.consumers) if not frame.nodes[u].inputs]
    chains = [chain_from(frame, root) for root in roots]

    def num_layers(chain: list[int]) -> int:
        return sum(_rows(frame.nodes[u]) for u in chain)

    # Of several longest chains, `max` returns the first.
    return max(chains, key=num_layers, default=[])


def _rows(node: Node) -> int:
    """How many layers a node counts for: a scan over stacked weights, one for each iteration."""
    is_stack = node.body is not None and not node.over_time
    return node.eqn.params["length"] if is_stack else 1
