"""Rules of numbers: inf and NaN, norms that overflow, parameters that can have no gradient."""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from gradjax.diagnosis.evidence import Evidence
from gradjax.diagnosis.rules import growth
from gradjax.diagnosis.rules.finding import Finding, of_culprit, where

FLOAT32_MAX = float(np.finfo(np.float32).max)
LOG_NORM_LIMIT = 0.5 * math.log(FLOAT32_MAX)
# Reasons of `gradjax.replay.reasons` that a growth over the layers can bring about.
OUT_OF_RANGE = ("overflow", "cast_overflow", "loss_scale")


def non_finite(e: Evidence) -> list[Finding]:
    """What makes the loss, a gradient or a parameter inf or NaN: the operation and its line; the
    growth of the forward pass where that took a value out of range.
    """
    if any(e.leaf_bad):
        first = e.leaf_bad.index(True)
        place = where("leaf", first, e.leaf_names[first])
        words = "it was given that way"
        evidence = {"loss": e.loss, "reached": place["name"], "words": words}
        return [Finding("non_finite", place, "bad_parameter", evidence)]
    if e.culprit is None:
        if math.isfinite(e.loss):
            return []
        words = "evaluated one operation at a time it is finite: it is at the edge of its range"
        evidence = {"loss": e.loss, "reached": "the loss", "words": words}
        place = where("layer", len(e.layers), "loss")
        return [Finding("non_finite", place, "float_range", evidence)]
    if e.culprit.reason in OUT_OF_RANGE:
        # The gradient's own growth is found by the other rules.
        growing = growth.before_overflow(e)
        if growing or e.culprit.phase == "backward":
            return [replace(x, evidence=x.evidence | of_culprit(e.culprit)) for x in growing]
    return [_of_culprit(e)]


def backward_overflow(e: Evidence) -> list[Finding]:
    """A gradient that leaves the range of its dtype although the network does not explode."""
    if e.culprit is None or e.culprit.phase != "backward":
        return []
    return [_of_culprit(e)] if e.culprit.reason in OUT_OF_RANGE else []


def _of_culprit(e: Evidence) -> Finding:
    culprit = e.culprit
    assert culprit is not None
    evidence = {"loss": e.loss} | of_culprit(culprit)
    return Finding("non_finite", _place(e), culprit.reason, evidence, remedies=culprit.remedies)


def _place(e: Evidence) -> dict[str, Any]:
    """Where a finding about the culprit starts."""
    culprit = e.culprit
    assert culprit is not None
    if culprit.phase == "data":
        return where("argument", 0, culprit.name)
    if culprit.phase == "parameter":
        known = [i for i, name in enumerate(e.leaf_names) if name == culprit.name]
        return where("leaf", known[0] if known else 0, culprit.name)
    if not culprit.near:
        return where("layer", len(e.layers), culprit.module or "loss")
    return where("layer", _layer_of(e, culprit.near), culprit.near)


def _layer_of(e: Evidence, name: str) -> int:
    """The index of the layer of that name; of a value inside a layer, that layer's; else 0."""
    names = [layer.name for layer in e.layers]
    if name in names:
        return names.index(name)
    inside = (i for i, layer in enumerate(e.layers) if name.startswith(layer.site.name))
    return next(inside, 0)


def untrained_layer(e: Evidence) -> list[Finding]:
    """Parameters without a differentiable way to the loss: by structure, not by underflow."""
    untrained = e.structure.untrained
    if not untrained:
        return []
    evidence = {"leaves": [e.leaf_names[i] for i in untrained]}
    place = where("leaf", untrained[0], e.leaf_names[untrained[0]])
    return [Finding("untrained_layer", place, "no_path", evidence)]


def norm_overflow(e: Evidence) -> list[Finding]:
    """Finite gradients whose squares are not: a plain norm is inf, and clipping by it gives
    zeros.
    """
    norms = np.array([float(np.max(x)) for x in e.leaf_log_gradient])
    not_finite = np.isnan(norms).any() or np.isposinf(norms).any()
    if not_finite or not (norms > LOG_NORM_LIMIT).any():
        return []
    worst = int(norms.argmax())
    place = where("leaf", worst, e.leaf_names[worst])
    return [Finding("norm_overflow", place, "float_range", {"log_norm": float(norms[worst])})]
