"""The graph of the equations that carry activations, and its chain of post-dominators.

The graph of a traced loss has one sink, the loss. v *post-dominates* u when every path from u to
the loss runs through v (Prosser 1959; immediate post-dominators by one sweep backwards, Cooper,
Harvey & Kennedy 2001). A parameter becomes an *activation* where it meets data. Calls inside a
jaxpr are written in place; a scan's body is a graph of its own.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core

from gradjax.taps.jaxprs import INLINE, REMAT, Path, inner, insides, scan_split

NEUTRAL, DATA, PARAM, ACT = range(
    4
)  # literals and what is made of them; data; parameters alone; activations
CUTS = {
    "stop_gradient",
    "floor",
    "ceil",
    "round",
    "sign",
    "is_finite",
    "argmax",
    "argmin",
}  # no derivative
PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"}
ENTRY, OUTSIDE = (
    -1,
    -2,
)  # where an activation in a scan's body comes from: the carry, or elsewhere outside


class Value(NamedTuple):
    """What is known of a variable."""

    kind: int = NEUTRAL
    node: int | None = None  # that produced it, if it is an activation
    leaves: frozenset[int] = (
        frozenset()
    )  # the parameters that it is made of, if it is made of parameters alone
    out: int = 0  # which of the node's outputs


@dataclasses.dataclass
class Node:
    """An equation that carries activations."""

    path: Path
    primitive: str
    eqn: Any
    uses: frozenset[
        tuple[int, int]
    ]  # (producer, which of its outputs) of the activations that go in
    leaves: frozenset[int] = frozenset()  # parameters that meet activations here
    fan_in: int = 0  # of the weights applied here; 0 where there are none
    fan_out: int = 0
    body: "Frame | None" = None  # of a scan
    over_time: bool = False  # a scan that uses the same weights in every iteration

    @property
    def inputs(self) -> set[int]:
        """The producers of the activations that go in."""
        return {producer for producer, _ in self.uses}

    @property
    def weighs(self) -> bool:
        """Whether weights are applied to activations here."""
        return self.fan_in > 0


@dataclasses.dataclass
class Frame:
    """The activations' graph of a jaxpr, calls inside it written in place; a scan's body is a frame
    of its own.
    """

    nodes: list[Node] = dataclasses.field(default_factory=list)
    outputs: list[Value] = dataclasses.field(default_factory=list)
    consumers: dict[int, set[int]] = dataclasses.field(
        default_factory=dict
    )  # of alive nodes, and of ENTRY
    dominator: dict[int, int] = dataclasses.field(
        default_factory=dict
    )  # immediate post-dominators; the sink is len(nodes)
    sliced: set[int] = dataclasses.field(default_factory=set)  # parameters of which parts are taken
    used: frozenset[int] = frozenset()  # parameters with a differentiable way to the outputs


def is_float(atom: Any) -> bool:
    """Whether a variable or literal holds what can be differentiated."""
    return jnp.issubdtype(atom.aval.dtype, jnp.inexact)


def _fans(eqn: Any, weights: int) -> tuple[int, int]:
    """(fan_in, fan_out) of the operand `weights` of a product."""
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
    return any(
        e.primitive.name in PRODUCTS or any(_holds_product(each) for _, each in insides(e))
        for e in jaxpr.jaxpr.eqns
    )


def walk(jaxpr: Any, given: Sequence[Value], frame: Frame, path: Path) -> list[Value]:
    """Add the equations of a closed jaxpr to `frame`; the values of its outputs."""
    env: dict[Any, Value] = {}
    for var, const in zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True):
        env[var] = Value(NEUTRAL if getattr(const, "size", 1) <= 1 else DATA)
    env.update(zip(jaxpr.jaxpr.invars, given, strict=True))
    read = lambda atom: Value() if isinstance(atom, core.Literal) else env[atom]
    for i, eqn in enumerate(jaxpr.jaxpr.eqns):
        values, here = [read(atom) for atom in eqn.invars], (*path, i)
        if eqn.primitive.name in INLINE | REMAT:
            out = walk(inner(eqn), values, frame, here)
        elif eqn.primitive.name == "scan":
            out = _walk_scan(eqn, values, frame, here)
        else:
            out = _walk_plain(eqn, values, frame, here)
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(atom) for atom in jaxpr.jaxpr.outvars]


def _add(frame: Frame, node: Node) -> int:
    frame.nodes.append(node)
    return len(frame.nodes) - 1


def _producers(values: Iterable[Value]) -> frozenset[tuple[int, int]]:
    return frozenset((v.node, v.out) for v in values if v.kind == ACT and v.node is not None)


def _leaves(values: Iterable[Value]) -> frozenset[int]:
    return frozenset().union(*(v.leaves for v in values if v.kind == PARAM))


def _walk_plain(eqn: Any, values: list[Value], frame: Frame, here: Path) -> list[Value]:
    name, kinds, leaves = eqn.primitive.name, {v.kind for v in values}, _leaves(values)
    if name in CUTS or not any(map(is_float, eqn.outvars)):
        return [Value(DATA if kinds - {NEUTRAL} else NEUTRAL)] * len(eqn.outvars)
    if name in ("slice", "dynamic_slice", "gather") and kinds <= {PARAM, NEUTRAL}:
        frame.sliced |= leaves
    bulky = any(
        v.kind == NEUTRAL and atom.aval.shape for v, atom in zip(values, eqn.invars, strict=True)
    )
    meets = PARAM in kinds and (DATA in kinds or (name in PRODUCTS and bulky))
    if ACT not in kinds and not meets:
        return [Value(max(kinds, default=NEUTRAL), None, leaves)] * len(eqn.outvars)
    node = Node(here, name, eqn, _producers(values), leaves)
    if name in PRODUCTS and PARAM in kinds:
        node.fan_in, node.fan_out = _fans(eqn, [v.kind for v in values].index(PARAM))
    elif name == "gather" and values[0].kind == PARAM:
        node.fan_in = node.fan_out = 1  # a table: each output is one row
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
    outside = lambda v: v._replace(node=OUTSIDE) if v.kind == ACT else v
    consts, xs = [outside(v) for v in values[:num_consts]], [outside(v) for v in values[ends:]]
    carry = [v.kind for v in values[num_consts:ends]]
    while True:  # a carry is what goes in and what comes back: at most three rounds
        body = Frame()
        entry = [Value(kind, ENTRY if kind == ACT else None) for kind in carry]
        out = walk(inner(eqn), [*consts, *entry, *xs], body, here)
        again = [max(a, b.kind) for a, b in zip(carry, out, strict=False)]
        if again == carry:
            break
        carry = again
    body.outputs = out
    link_up(body)
    kinds = {v.kind for v in out}
    if ACT not in kinds:
        return out
    stacked, shared = _leaves(xs), _leaves(consts)
    weights = [n for n in body.nodes if n.weighs]
    node = Node(here, "scan", eqn, _producers(values), body.used, body=body)
    node.fan_in, node.fan_out = (weights[0].fan_in, weights[0].fan_out) if weights else (0, 0)
    used = frozenset().union(*(n.leaves for n in weights))
    node.over_time = bool(used & shared) and not used & stacked
    index = _add(frame, node)
    return [Value(ACT, index, out=k) if v.kind == ACT else v for k, v in enumerate(out)]


def link_up(frame: Frame) -> None:
    """Consumers and immediate post-dominators of the nodes with a way to the outputs."""
    frame.consumers, frame.dominator = {}, {}
    sink = len(frame.nodes)
    alive = {v.node for v in frame.outputs if v.kind == ACT and v.node is not None}
    frame.consumers = {u: {sink} for u in alive}
    depth, ahead = {sink: 0}, frame.dominator

    def common(a: int, b: int) -> int:
        while a != b:
            a, b = (ahead[a], b) if depth[a] >= depth[b] else (a, ahead[b])
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
    used = {(v.node, v.out) for v in frame.outputs if v.kind == ACT}
    used = used.union(*(frame.nodes[u].uses for u in frame.consumers if 0 <= u < sink))
    for u, node in enumerate(frame.nodes):
        if (
            node.body is not None and u in frame.consumers
        ):  # what a scan stacks up may be used by nobody
            carried = scan_split(node.eqn)[1]
            outputs = node.body.outputs
            node.body.outputs = [
                v if k < carried or (u, k) in used else Value(DATA) for k, v in enumerate(outputs)
            ]
            link_up(node.body)
            node.leaves = node.body.used
    direct = frozenset().union(*(v.leaves for v in frame.outputs))
    frame.used = direct.union(
        *(frame.nodes[u].leaves for u in frame.consumers if u >= 0 and u < sink)
    )


def chain_from(frame: Frame, start: int) -> list[int]:
    """The post-dominators of a node in the order of the computation, itself first."""
    chain, sink = [], len(frame.nodes)
    while start != sink:
        if start >= 0:
            chain.append(start)
        start = frame.dominator[start]
    return chain


def main_chain(frame: Frame, inside_scan: bool) -> list[int]:
    """The chain from the carry of a scan's body, or from the input with the most layers ahead of
    it.
    """
    if inside_scan:
        return chain_from(frame, ENTRY) if ENTRY in frame.dominator else []
    roots = [u for u in sorted(frame.consumers) if not frame.nodes[u].inputs]
    chains = [chain_from(frame, root) for root in roots]
    weight = lambda chain: sum(_rows(frame.nodes[u]) for u in chain)
    return max(chains, key=weight, default=[])  # the first of the longest


def _rows(node: Node) -> int:
    return node.eqn.params["length"] if node.body is not None and not node.over_time else 1
