"""The layers of a traced loss: which values every gradient passes through, and what lies between
two of them.

The chain of post-dominators of an input (`gradjax.taps.graph`) is the network's main road: between
two of its values p and q the whole derivative is d q / d p, so that their product is the layer
product; a value with a skip around it is not on it. Nothing of a framework is known here: a
residual sum is on the chain although no module outputs it.

A *layer* is a stretch of the chain that applies weights. A scan over stacked weights is a layer for
each iteration; a scan that uses the same weights in every iteration is a recurrence over time, one
node of the chain, with a record of its own (`Recurrence`).
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core

from gradjax.taps.dominators import (  # fmt: skip
    ACT,
    DATA,
    ENTRY,
    PARAM,
    PRODUCTS,
    Frame,
    Node,
    Value,
    chain_from,
    is_float,
    link_up,
    main_chain,
    walk,
)
from gradjax.taps.interpret import Site
from gradjax.taps.jaxprs import Path, inner, scan_split


@dataclasses.dataclass
class Layer:
    """A stretch of the chain that applies weights, up to and with the site at its end."""

    site: Site
    row: int | None  # of the site's rows: the iteration of a scan
    leaves: frozenset[int]
    kernels: tuple[
        tuple[frozenset[int], int, int], ...
    ]  # (parameters, fan_in, fan_out) of the weights applied
    weighs: bool  # weights are applied, here or in a scan over time
    fan_in: int  # the smallest number of units on the way, which bounds the fluctuations
    skip: bool  # there is a way around the weights
    norm: str  # "batch", "layer" or ""
    post_norm: bool  # normalised after the skip was added
    name: str

    @property
    def stacked(self) -> bool:
        """Whether its parameters are a row of stacked ones."""
        return self.row is not None


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
    leaves: frozenset[int]  # of the parameters that it uses


class Structure(NamedTuple):
    """What `analyse` finds."""

    layers: list[Layer]
    activations: list[Activation]
    recurrences: list[Recurrence]
    untrained: list[int]  # parameter leaves without a differentiable way to the loss
    sliced: frozenset[int] = frozenset()  # parameter leaves that hold more than one layer's


def analyse(jaxpr: Any, sites: Sequence[Site], num_params: int) -> Structure:
    """The layers of a traced loss, from the input with the most of them ahead.

    Args:
      jaxpr: closed; its first `num_params` operands are parameters, its first output the loss.
      sites: its named values.
    """
    names = {site.path: site for site in sites}
    frame = Frame()
    given = [Value(PARAM, None, frozenset({i})) for i in range(num_params)]
    given += [Value(DATA)] * (len(jaxpr.jaxpr.invars) - num_params)
    frame.outputs = walk(jaxpr, given, frame, ())[:1]
    link_up(frame)
    layers = _layers(frame, main_chain(frame, False), names, ())
    activations, recurrences = [], []
    _collect(frame, names, (), False, activations, recurrences, "")
    untrained = [i for i in range(num_params) if i not in frame.used]
    return Structure(layers, activations, recurrences, untrained, frozenset(frame.sliced))


def _between(frame: Frame, before: int, after: int) -> list[int]:
    """The nodes on the ways from `before` (excluded; ENTRY - 1 for the start) to `after`
    (included), in order.
    """
    found, todo = {after}, [after]
    while todo:
        for v in frame.nodes[todo.pop()].inputs:
            if v > before and v >= 0 and v not in found:
                found.add(v)
                todo.append(v)
    return sorted(found)


def _has_skip(frame: Frame, segment: list[int], before: int, after: int) -> bool:
    """Whether a way from `before` to `after` applies no weights."""
    free = {before}
    for u in segment:
        node = frame.nodes[u]
        if not node.weighs and free & set(node.inputs):
            free.add(u)
    return after in free


_JOINS = {"add", "add_any", "sub", "concatenate"}


def _is_join(node: Node) -> bool:
    return node.primitive in _JOINS and len(node.inputs) > 1


def _norms(frame: Frame, segment: Sequence[int]) -> list[tuple[int, str]]:
    """(node, kind) of every division by a standard deviation of activations."""
    found = []
    for u in segment:
        if (
            frame.nodes[u].primitive in ("rsqrt", "sqrt")
            and frame.nodes[u].eqn.outvars[0].aval.size > 1
        ):
            kind = _reduced_over(frame, u)
            found += [(u, kind)] if kind else []
    return found


def _reduced_over(frame: Frame, u: int) -> str:
    """Where the nearest sum behind a node runs: "batch" over the first of several axes, "layer"
    over others only.
    """
    todo = [u]
    for _ in range(24):
        if not todo:
            break
        node = frame.nodes[max(todo)]
        todo.remove(max(todo))
        if node.primitive in ("reduce_sum", "reduce_mean"):
            many = len(node.eqn.invars[0].aval.shape) > 1
            return "batch" if many and 0 in node.eqn.params["axes"] else "layer"
        todo += [v for v in node.inputs if v >= 0 and v not in todo and not frame.nodes[v].weighs]
    return ""


def _layers(
    frame: Frame, chain: list[int], names: dict[Path, Site], lead: tuple[int, ...]
) -> list[Layer]:
    """The layers along a chain; those in a scan over stacked weights once for each iteration."""
    layers: list[Layer] = []
    weights = any(frame.nodes[u].weighs for u in frame.consumers if 0 <= u < len(frame.nodes))
    last_name, before = "", ENTRY if lead else ENTRY - 1
    for u in chain:
        node = frame.nodes[u]
        site = names.get(node.path)
        if node.body is not None and not node.over_time and len(lead) == 0:
            length = node.eqn.params["length"]
            inside = main_chain(node.body, True)
            rows = _layers(node.body, inside, names, (length,))
            if rows:
                each = range(length)[::-1] if node.eqn.params["reverse"] else range(length)
                layers += [_row(layer, r) for r in each for layer in rows]
                before = u
                continue
        aval = node.eqn.outvars[0].aval
        reduces = bool(layers) and len(aval.shape) < len(
            layers[-1].site.shape
        )  # a sum in the loss, not in the network
        if site is None and _is_join(node) and is_float(node.eqn.outvars[0]) and not reduces:
            last_name = _nearest(frame, u, names)
            site = Site(
                node.path,
                f"{last_name}+skip" if last_name else "skip",
                "skip",
                "",
                aval.shape,
                aval.dtype,
                lead,
            )
        if site is None or len(site.lead) != len(lead):
            continue
        segment = _between(frame, before, u)
        made = _layer(frame, segment, before, u, site)
        if layers and weights and not made.weighs:  # the same layer goes on to here
            if layers[-1].row is not None:
                continue
            old = layers.pop()
            if not old.weighs:
                layers.append(made)
                before = u
                continue
            made = dataclasses.replace(
                old, site=site, name=_shorter(old, site), norm=old.norm or made.norm,
                post_norm=old.post_norm or bool(made.norm and old.skip),
            )  # fmt: skip
        layers.append(made)
        before = u
    return layers


def _shorter(layer: Layer, site: Site) -> str:
    """The name of the module around a layer in place of the layer's, but never the whole model's; a
    tap's for a sum.
    """
    around = site.kind == "module" and layer.name.startswith((f"{site.name}/", f"{site.name}."))
    return site.name if around or (site.kind == "tap" and layer.site.kind == "skip") else layer.name


def _row(layer: Layer, row: int) -> Layer:
    return dataclasses.replace(layer, row=row, name=f"{layer.name}[{row}]")


def _layer(frame: Frame, segment: list[int], before: int, u: int, site: Site) -> Layer:
    nodes = [frame.nodes[v] for v in segment]
    weights = [n for n in nodes if n.weighs]
    norms = _norms(frame, segment)
    skip = before > ENTRY - 1 and bool(weights) and _has_skip(frame, segment, before, u)
    chain = (
        set(chain_from(frame, before))
        if before >= ENTRY and (before >= 0 or ENTRY in frame.dominator)
        else set()
    )
    joins = [v for v in segment if v in chain and _is_join(frame.nodes[v])]
    kinds = [kind for _, kind in norms]
    return Layer(
        site, None, frozenset().union(*(n.leaves for n in nodes)),
        tuple((n.leaves, n.fan_in, n.fan_out) for n in weights if n.body is None),
        bool(weights), min((n.fan_in for n in weights if n.fan_in > 1), default=1),
        skip, "batch" if "batch" in kinds else "layer" if kinds else "",
        skip and bool(joins) and any(v > joins[-1] for v, _ in norms), site.name,
    )  # fmt: skip


def _nearest(frame: Frame, u: int, names: dict[Path, Site]) -> str:
    """Name of the last named value at or before a node; that of a leaf module where one is inside
    another.
    """
    for v in range(u, -1, -1):
        if site := names.get(frame.nodes[v].path):
            return site.name
    return ""


# -- activation functions, softmax, recurrences ----------------------------------------------------------


def _is_zero(atom: Any) -> bool:
    return isinstance(atom, core.Literal) and not np.any(np.asarray(atom.val))


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


def _function(frame: Frame, u: int) -> str:
    """The kind of activation function that a node is, empty for none."""
    node = frame.nodes[u]
    if node.primitive in ("tanh", "logistic", "erf"):
        return node.primitive
    if node.primitive == "clamp":
        return "hard_tanh"
    if _is_relu(node.eqn):
        return "" if _is_variance(frame, u) else "relu"
    return "softmax" if node.primitive == "exp" and _is_attention(frame, u) else ""


def _is_variance(frame: Frame, u: int) -> bool:
    """max(variance, 0) before a square root, which is no activation function."""
    todo = {u}
    for v in range(u + 1, min(u + 16, len(frame.nodes))):
        if todo & set(frame.nodes[v].inputs):
            if frame.nodes[v].primitive in ("rsqrt", "sqrt"):
                return True
            todo.add(v)
    return False


def _is_attention(frame: Frame, u: int) -> bool:
    """exp(logits - max) over rows of at least three axes, divided by its sum and then multiplied
    with activations.
    """
    if len(frame.nodes[u].eqn.outvars[0].aval.shape) < 3:
        return False
    sums, todo = False, {u}
    for v in range(u + 1, min(u + 16, len(frame.nodes))):
        node = frame.nodes[v]
        if todo & set(node.inputs):
            sums |= node.primitive == "reduce_sum"
            if node.primitive in PRODUCTS:
                return sums and not node.weighs
            todo.add(v)
    return False


def _gates(frame: Frame, u: int) -> bool:
    """Whether a node's output, through additions and products with constants, multiplies another
    activation.
    """
    todo, sink = [u], len(frame.nodes)
    while todo:
        for v in frame.consumers.get(todo.pop(), ()):
            if v == sink:
                continue
            node = frame.nodes[v]
            if node.primitive == "mul" and len(node.inputs) > 1:
                return True
            if node.primitive in (
                "add",
                "sub",
                "mul",
                "neg",
                "convert_element_type",
                "slice",
                "split",
                "integer_pow",
            ):
                todo += [v] if len(node.inputs) == 1 else []
    return False


def _collect(
    frame, names, lead, over_time, activations: list, recurrences: list, outer: str
) -> None:
    """Activation functions and recurrences of a frame and of the scans in it."""
    chain, last = set(main_chain(frame, bool(lead))), outer
    for u, node in enumerate(frame.nodes):
        if u not in frame.consumers:
            continue
        if site := names.get(node.path):
            last = site.name
        if node.body is not None:
            length = node.eqn.params["length"]
            if node.over_time:
                recurrences += _recurrence(node, (*lead, length), names)
            _collect(
                node.body, names, (*lead, length), node.over_time, activations, recurrences, last
            )
        elif kind := _function(frame, u):
            if (
                kind == "softmax"
            ):  # of the logits less their largest, which the exponential hides where it underflows
                node = frame.nodes[max(node.inputs)] if max(node.inputs, default=-1) >= 0 else node
            path, aval = node.path, node.eqn.outvars[0].aval
            site = Site(path, f"{last}:{kind}", kind, "", aval.shape, aval.dtype, lead)
            activations.append(Activation(site, u in chain, _gates(frame, u), last))


def _recurrence(node: Node, lead: tuple[int, ...], names: dict[Path, Site]) -> list[Recurrence]:
    _, num_carry = scan_split(node.eqn)
    carried = [k for k, value in enumerate(node.body.outputs[:num_carry]) if value.kind == ACT]  # type: ignore[union-attr]
    if not carried or len(lead) != 1 or lead[0] < 2:
        return []
    inside = [site for path, site in names.items() if path[: len(node.path)] == node.path]
    modules = [
        re.sub(r"\[\d+\]$", "", site.name) for site in inside if site.kind in ("module", "tap")
    ]
    name = min(
        modules, key=lambda name: (len(re.findall(r"[/.]", name)), len(name)), default="scan"
    )
    avals = [node.eqn.outvars[k].aval for k in carried]
    sites = tuple(
        Site((*node.path, -1 - k), f"{name}.carry", "carry", "", aval.shape, aval.dtype, lead)
        for k, aval in zip(carried, avals, strict=True)
    )
    width = max((aval.shape[-1] for aval in avals if aval.shape), default=1)
    return [Recurrence(sites, name, lead[0], node.eqn.params["reverse"], width, node.body.used)]  # type: ignore[union-attr]
