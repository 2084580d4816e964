"""A finding, and what several rules read off the evidence: where a finding starts, the size of a
layer's weights, how many layers have a property.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradjax.diagnosis.evidence import Evidence
from gradjax.replay.nonfinite import NonFinite
from gradjax.taps.structure import Layer


@dataclass(frozen=True)
class Finding:
    """One pathology: what, where it starts, why, by which numbers, against which threshold, and
    what to try.

    A rule may leave out `threshold`, `source` and `remedies`; `findings` then takes those of the
    catalogue.

    Attributes:
      pathology: its name in `gradjax.diagnosis.rules.CAUSAL`.
      where: {"kind", "index": from 0, "name"}; a kind is layer, step, leaf, argument, rule or run.
      cause: why, in one word.
      evidence: the numbers; natural logarithms unless the name says otherwise.
      threshold: the bound that the deciding number passed.
      source: what was compared, and where the bound comes from.
      remedies: what to try, in order.
    """

    pathology: str
    where: dict[str, Any]
    cause: str
    evidence: dict[str, Any]
    threshold: float = math.nan
    source: str = ""
    remedies: tuple[str, ...] = ()


def where(kind: str, index: int, name: str) -> dict[str, Any]:
    """The place at which a finding starts."""
    return {"kind": kind, "index": int(index), "name": name}


def layer_place(e: Evidence, index: int) -> dict[str, Any]:
    """The place of a layer of the chain, or of a step where the layers unroll a recurrence."""
    kind = "step" if is_unrolled(e) else "layer"
    return where(kind, index, e.layers[index].name)


def is_unrolled(e: Evidence) -> bool:
    """Whether the layers are the steps of an unrolled recurrence: they use the same weights again
    and again.
    """
    plain = [layer for layer in e.layers if layer.kernels and layer.row is None]
    kernels = [
        frozenset().union(*(leaves for leaves, _, _ in layer.kernels)) - e.structure.sliced
        for layer in plain
    ]
    kernels = [k for k in kernels if k]
    return len(kernels) > 2 and len(set(kernels)) <= len(kernels) // 2


def row_of(x: Any, row: int | None) -> float:
    """One row of a statistic; the whole statistic where the value is outside of scans."""
    values = np.asarray(x)
    return float(values if row is None else values[row])


def hidden(e: Evidence) -> slice:
    """The hidden layers."""
    return slice(0, e.hidden)


def fraction_of(layers: Sequence[Layer], test: Callable[[Layer], bool]) -> float:
    """The fraction of the layers with weights that pass a test."""
    weighing = [layer for layer in layers if layer.weighs]
    return sum(map(test, weighing)) / max(len(weighing), 1)


def row_of_leaf(e: Evidence, layer: Layer, leaf: int) -> int | None:
    """The row of a parameter leaf that belongs to the layer; None where the leaf is not stacked."""
    stacked = np.ndim(e.leaf_log_rms[leaf]) > 0
    return layer.row if stacked else None


def weight_scale(e: Evidence, layer: Layer) -> float | None:
    """rms of a layer's largest kernel times sqrt(fan_in): 1 for LeCun's initialisation; None
    without a kernel.
    """
    scales = []
    for leaves, fan_in, _ in layer.kernels:
        for leaf in leaves:
            if len(e.leaf_shapes[leaf]) < 2:
                continue
            row = row_of_leaf(e, layer, leaf)
            log_rms = np.asarray(e.leaf_log_rms[leaf])
            value = float(np.max(log_rms) if row is None else log_rms[row])
            scales.append(math.exp(min(value, 300.0)) * math.sqrt(fan_in))
    return max(scales, default=None)


def of_culprit(culprit: NonFinite) -> dict[str, Any]:
    """What a finding says of the operation that made inf or NaN."""
    evidence = {
        "reached": culprit.reached,
        "phase": culprit.phase,
        "entry": list(culprit.entry),
        "value": culprit.value,
        "words": culprit.words,
        "dtype": culprit.dtype,
    }
    if culprit.primitive:
        evidence |= {
            "operation": culprit.primitive,
            "derivative_of": culprit.forward if culprit.phase == "backward" else None,
            "operands": list(culprit.operands),
            "line": None if culprit.line is None else str(culprit.line),
            "source": None if culprit.line is None else culprit.line.text.strip(),
            "module": culprit.module,
            "iterations": [list(each) for each in culprit.iterations],
        }
    return evidence | {"text": str(culprit)}
