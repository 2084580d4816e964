"""Activation functions, softmax and recurrences in the graph of a traced loss.

They are recognised by their primitives and what surrounds these, since no framework is known here:
max(x, 0) is a ReLU unless a square root follows, exp is a softmax of attention if its sum divides
it and the quotient multiplies activations. The logits of a softmax are taken less their largest.
"""

import re
from typing import Any, NamedTuple

import numpy as np

from gradjax.taps.dominators import ACT, PRODUCTS, Frame, Node, main_chain
from gradjax.taps.interpret import Site
from gradjax.taps.jaxprs import Literal, Path, inner, scan_split

# How many nodes ahead of one the patterns below are searched for.
_AHEAD = 16


class Activation(NamedTuple):
    """An activation function's or softmax's output, and where it stands."""

    site: Site
    on_chain: bool
    gates: bool  # it multiplies another activation
    layer: str  # name of the last named value before it


class Recurrence(NamedTuple):
    """A scan over time: its carried activations as sites."""

    sites: tuple[Site, ...]
    name: str
    length: int
    reverse: bool
    fan_in: int
    leaves: frozenset[int]  # the parameters that it uses


def collect(frame: Frame, names: dict[Path, Site]) -> tuple[list[Activation], list[Recurrence]]:
    """Activation functions and recurrences of a frame and of the scans in it."""
    activations: list[Activation] = []
    recurrences: list[Recurrence] = []
    _collect(frame, names, (), activations, recurrences, "")
    return activations, recurrences


def _collect(
    frame: Frame,
    names: dict[Path, Site],
    lead: tuple[int, ...],
    activations: list[Activation],
    recurrences: list[Recurrence],
    outer: str,
) -> None:
    chain, last = set(main_chain(frame, bool(lead))), outer
    for u, node in enumerate(frame.nodes):
        if u not in frame.consumers:
            continue
        if site := names.get(node.path):
            last = site.name
        if node.body is not None:
            inside = (*lead, node.eqn.params["length"])
            if node.over_time:
                recurrences += _recurrence(node, inside, names)
            _collect(node.body, names, inside, activations, recurrences, last)
        elif kind := _function(frame, u):
            if kind == "softmax" and max(node.inputs, default=-1) >= 0:
                # Its logits less their largest: the exponential hides them where it underflows.
                node = frame.nodes[max(node.inputs)]
            aval = node.eqn.outvars[0].aval
            site = Site(node.path, f"{last}:{kind}", kind, "", aval.shape, aval.dtype, lead)
            activations.append(Activation(site, u in chain, _gates(frame, u), last))


# Activation functions


def _function(frame: Frame, u: int) -> str:
    """The kind of activation function that a node is, "" if it is none."""
    node = frame.nodes[u]
    if node.primitive in ("tanh", "logistic", "erf"):
        return node.primitive
    if node.primitive == "clamp":
        return "hard_tanh"
    if _is_relu(node.eqn):
        return "" if _is_variance(frame, u) else "relu"
    if node.primitive == "exp" and _is_attention(frame, u):
        return "softmax"
    return ""


def _is_zero(atom: Any) -> bool:
    return isinstance(atom, Literal) and not np.any(np.asarray(atom.val))


def _is_relu(eqn: Any) -> bool:
    if eqn.primitive.name == "max":
        return any(map(_is_zero, eqn.invars))
    if eqn.primitive.name == "custom_jvp_call":
        inside = inner(eqn)
        while inside is not None and len(inside.jaxpr.eqns) == 1:
            (only,) = inside.jaxpr.eqns
            if _is_relu(only):
                return True
            inside = inner(only)
    return False


def _is_variance(frame: Frame, u: int) -> bool:
    """Whether a node is max(variance, 0) before a square root, and so no activation function."""
    reached = {u}
    for v in range(u + 1, min(u + _AHEAD, len(frame.nodes))):
        if reached & set(frame.nodes[v].inputs):
            if frame.nodes[v].primitive in ("rsqrt", "sqrt"):
                return True
            reached.add(v)
    return False


def _is_attention(frame: Frame, u: int) -> bool:
    """Whether a node is the exponential of a softmax over keys.

    That is exp(logits - max) over rows of at least three axes, divided by its sum and then
    multiplied with activations.
    """
    if len(frame.nodes[u].eqn.outvars[0].aval.shape) < 3:
        return False
    has_sum, reached = False, {u}
    for v in range(u + 1, min(u + _AHEAD, len(frame.nodes))):
        node = frame.nodes[v]
        if reached & set(node.inputs):
            has_sum |= node.primitive == "reduce_sum"
            if node.primitive in PRODUCTS:
                return has_sum and not node.weighs
            reached.add(v)
    return False


# Through these an activation still gates, if they have no other activation among their operands.
_PASSES = {"add", "sub", "mul", "neg", "convert_element_type", "slice", "split", "integer_pow"}


def _gates(frame: Frame, u: int) -> bool:
    """Whether a node's output multiplies another activation.

    Additions and products with constants may lie between.
    """
    todo, sink = [u], len(frame.nodes)
    while todo:
        for v in frame.consumers.get(todo.pop(), ()):
            if v == sink:
                continue
            node = frame.nodes[v]
            if node.primitive == "mul" and len(node.inputs) > 1:
                return True
            if node.primitive in _PASSES and len(node.inputs) == 1:
                todo.append(v)
    return False


# Recurrences


def _recurrence(node: Node, lead: tuple[int, ...], names: dict[Path, Site]) -> list[Recurrence]:
    """The recurrence that a scan over time is; none if it is nested or has fewer than two steps."""
    _, num_carry = scan_split(node.eqn)
    outputs = node.body.outputs[:num_carry]  # type: ignore[union-attr]
    carried = [k for k, value in enumerate(outputs) if value.kind == ACT]
    if not carried or len(lead) != 1 or lead[0] < 2:
        return []
    name = _outermost(node, names)
    sites = []
    for k in carried:
        aval = node.eqn.outvars[k].aval
        path = (*node.path, -1 - k)
        sites.append(Site(path, f"{name}.carry", "carry", "", aval.shape, aval.dtype, lead))
    width = max((site.shape[-1] for site in sites if site.shape), default=1)
    used = node.body.used  # type: ignore[union-attr]
    reverse = node.eqn.params["reverse"]
    return [Recurrence(tuple(sites), name, lead[0], reverse, width, used)]


def _outermost(node: Node, names: dict[Path, Site]) -> str:
    """The name of the outermost module or tap inside a scan, "scan" if there is none."""
    inside = [site for path, site in names.items() if path[: len(node.path)] == node.path]
    modules = [
        re.sub(r"\[\d+\]$", "", site.name) for site in inside if site.kind in ("module", "tap")
    ]

    def depth(name: str) -> tuple[int, int]:
        return len(re.findall(r"[/.]", name)), len(name)

    return min(modules, key=depth, default="scan")
