"""The layers of a traced loss: which values every gradient passes, and what lies between them.

The chain of post-dominators of an input (`gradjax.taps.dominators`) is the network's main road:
between two of its values p and q the whole derivative is d q / d p, so that their product is the
layer product; a value with a skip around it is not on the chain. Nothing of a framework is known
here: a residual sum is on the chain although no module outputs it.

A *layer* is a stretch of the chain that applies weights. A scan over stacked weights is a layer for
each iteration; a scan that uses the same weights in every iteration is a recurrence over time: one
node of the chain, with a record of its own (`Recurrence`). The functions of activations and the
recurrences are found in `gradjax.taps.patterns`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from gradjax.taps.dominators import (
    DATA,
    ENTRY,
    PARAM,
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
from gradjax.taps.jaxprs import Path
from gradjax.taps.patterns import Activation, Recurrence, collect


@dataclasses.dataclass
class Layer:
    """A stretch of the chain that applies weights, up to and including the site at its end."""

    site: Site
    # of the site's rows: the iteration of a scan
    row: int | None
    leaves: frozenset[int]
    # (parameters, fan_in, fan_out) of the weights applied
    kernels: tuple[tuple[frozenset[int], int, int], ...]
    # weights are applied, here or in a scan over time
    weighs: bool
    # the smallest number of units on the way, which bounds the fluctuations
    fan_in: int
    # a path leads around the weights
    skip: bool
    # "batch", "layer" or ""
    norm: str
    # normalised after the skip was added
    post_norm: bool
    name: str

    @property
    def stacked(self) -> bool:
        """Whether its parameters are a row of stacked ones."""
        return self.row is not None


class Structure(NamedTuple):
    """What `analyse` finds."""

    layers: list[Layer]
    activations: list[Activation]
    recurrences: list[Recurrence]
    untrained: list[int]  # parameter leaves without a differentiable path to the loss
    sliced: frozenset[int] = frozenset()  # parameter leaves that hold more than one layer's


def analyse(jaxpr: Any, sites: Sequence[Site], num_params: int) -> Structure:
    """The layers of a traced loss, from the input with the most of them ahead.

    Args:
      jaxpr: closed; its first `num_params` operands are parameters, its first output the loss.
      sites: its named values.
      num_params: number of parameter leaves.
    """
    names = {site.path: site for site in sites}
    frame = Frame()
    given = [Value(PARAM, None, frozenset({i})) for i in range(num_params)]
    given += [Value(DATA)] * (len(jaxpr.jaxpr.invars) - num_params)
    frame.outputs = walk(jaxpr, given, frame, ())[:1]
    link_up(frame)
    layers = _layers(frame, main_chain(frame, False), names, ())
    activations, recurrences = collect(frame, names)
    untrained = [i for i in range(num_params) if i not in frame.used]
    return Structure(layers, activations, recurrences, untrained, frozenset(frame.sliced))


def _between(frame: Frame, before: int, after: int) -> list[int]:
    """The nodes on the paths from `before` (excluded) to `after` (included), in order.

    `before` is ENTRY - 1 for the start.
    """
    found, todo = {after}, [after]
    while todo:
        for v in frame.nodes[todo.pop()].inputs:
            if v > before and v >= 0 and v not in found:
                found.add(v)
                todo.append(v)
    return sorted(found)


def _has_skip(frame: Frame, segment: list[int], before: int, after: int) -> bool:
    """Whether a path from `before` to `after` applies no weights."""
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
        node = frame.nodes[u]
        is_root = node.primitive in ("rsqrt", "sqrt") and node.eqn.outvars[0].aval.size > 1
        if is_root and (kind := _reduced_over(frame, u)):
            found.append((u, kind))
    return found


def _reduced_over(frame: Frame, u: int) -> str:
    """The axes of the nearest sum before a node: "batch" if the first of several is among them.

    "layer" for other axes; "" if there is no sum near.
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
    has_weights = any(frame.nodes[u].weighs for u in frame.consumers if 0 <= u < len(frame.nodes))
    before = ENTRY if lead else ENTRY - 1
    for u in chain:
        node = frame.nodes[u]
        is_stack = node.body is not None and not node.over_time and not lead
        if is_stack and (rows := _stack(node, names)):
            layers += rows
            before = u
            continue
        site = names.get(node.path) or _skip_site(frame, u, names, layers, lead)
        if site is None or len(site.lead) != len(lead):
            continue
        new = _layer(frame, _between(frame, before, u), before, u, site)
        if layers and has_weights and not new.weighs:
            # The layer before goes on to here; a row of a stack cannot.
            if layers[-1].row is not None:
                continue
            old = layers.pop()
            if old.weighs:
                new = _extended(old, new)
        layers.append(new)
        before = u
    return layers


def _stack(node: Node, names: dict[Path, Site]) -> list[Layer]:
    """The layers of a scan over stacked weights, in the order of the computation."""
    length = node.eqn.params["length"]
    rows = _layers(node.body, main_chain(node.body, True), names, (length,))  # type: ignore[arg-type]
    iterations = range(length)
    if node.eqn.params["reverse"]:
        iterations = iterations[::-1]
    return [_row(layer, i) for i in iterations for layer in rows]


def _skip_site(
    frame: Frame, u: int, names: dict[Path, Site], layers: list[Layer], lead: tuple[int, ...]
) -> Site | None:
    """A site for the sum of a skip that has no name; None for any other node."""
    node = frame.nodes[u]
    aval = node.eqn.outvars[0].aval
    # A sum that reduces axes belongs to the loss, not to the network.
    reduces = bool(layers) and len(aval.shape) < len(layers[-1].site.shape)
    if not _is_join(node) or not is_float(node.eqn.outvars[0]) or reduces:
        return None
    nearest = _nearest(frame, u, names)
    name = f"{nearest}+skip" if nearest else "skip"
    return Site(node.path, name, "skip", "", aval.shape, aval.dtype, lead)


def _extended(old: Layer, new: Layer) -> Layer:
    """A layer that goes on to the end of `new`, which applies no weights."""
    return dataclasses.replace(
        old,
        site=new.site,
        name=_shorter(old, new.site),
        norm=old.norm or new.norm,
        post_norm=old.post_norm or bool(new.norm and old.skip),
    )


def _shorter(layer: Layer, site: Site) -> str:
    """The name of a layer that goes on to `site`.

    That of the site if it is the module around the layer (but not the whole model), or a tap of the
    layer's sum; else the layer's.
    """
    is_around = site.kind == "module" and layer.name.startswith((f"{site.name}/", f"{site.name}."))
    is_tapped_sum = site.kind == "tap" and layer.site.kind == "skip"
    return site.name if is_around or is_tapped_sum else layer.name


def _row(layer: Layer, row: int) -> Layer:
    return dataclasses.replace(layer, row=row, name=f"{layer.name}[{row}]")


def _layer(frame: Frame, segment: list[int], before: int, u: int, site: Site) -> Layer:
    """The layer of the nodes `segment` after node `before` up to node `u`."""
    nodes = [frame.nodes[v] for v in segment]
    weights = [n for n in nodes if n.weighs]
    norms = _norms(frame, segment)
    kinds = [kind for _, kind in norms]
    if "batch" in kinds:
        norm = "batch"
    else:
        norm = "layer" if kinds else ""
    skip = before > ENTRY - 1 and bool(weights) and _has_skip(frame, segment, before, u)
    # The chain ahead; there is none before the start, or if the scan's carry reaches nothing.
    is_known = before >= ENTRY and (before >= 0 or ENTRY in frame.dominator)
    chain = set(chain_from(frame, before)) if is_known else set()
    joins = [v for v in segment if v in chain and _is_join(frame.nodes[v])]
    return Layer(
        site=site,
        row=None,
        leaves=frozenset().union(*(n.leaves for n in nodes)),
        kernels=tuple((n.leaves, n.fan_in, n.fan_out) for n in weights if n.body is None),
        weighs=bool(weights),
        fan_in=min((n.fan_in for n in weights if n.fan_in > 1), default=1),
        skip=skip,
        norm=norm,
        post_norm=skip and bool(joins) and any(v > joins[-1] for v, _ in norms),
        name=site.name,
    )


def _nearest(frame: Frame, u: int, names: dict[Path, Site]) -> str:
    """Name of the last named value at or before a node, "" if there is none."""
    for v in range(u, -1, -1):
        if site := names.get(frame.nodes[v].path):
            return site.name
    return ""
