"""Rules of numbers: inf and NaN, norms that overflow, parameters that can have no gradient."""

import math

import numpy as np

from gradjax.diagnosis.evidence import Evidence
from gradjax.diagnosis.rules.finding import Finding, layer_place, row_of, where

FLOAT16_MAX = 65504.0
FLOAT32_MAX = float(np.finfo(np.float32).max)
LOG_NORM_LIMIT = 0.5 * math.log(FLOAT32_MAX)


def non_finite(e: Evidence) -> list[Finding]:
    """The first value that is inf or NaN, and what made it."""
    if e.arg_bad:
        evidence = {"loss": e.loss, "arguments": e.arg_bad}
        return [Finding("non_finite", where("argument", 0, e.arg_bad[0]), "bad_data", evidence)]
    if any(e.leaf_bad):
        first = e.leaf_bad.index(True)
        place = where("leaf", first, e.leaf_names[first])
        return [Finding("non_finite", place, "bad_parameter", {"loss": e.loss})]
    before = -math.inf
    for name, row in e.order:
        seen = e.values[name]
        if row_of(seen.bad, row) > 0:
            return [_first_bad(e, name, row, before)]
        before = row_of(seen.log_max, row)
    if not math.isfinite(e.loss):
        cause = "float_range" if e.half else "invalid_operation"
        place = where("layer", len(e.layers), "loss")
        evidence = {"loss": e.loss, "last_value": e.order[-1][0]}
        return [Finding("non_finite", place, cause, evidence)]
    bad = [i for i, c in enumerate(e.log_cotangent) if np.isnan(c) or c == np.inf]
    if bad:
        evidence = {"loss": e.loss, "backward": True}
        place = layer_place(e, bad[-1])
        return [Finding("non_finite", place, "invalid_operation", evidence)]
    return []


def _first_bad(e: Evidence, name: str, row: int | None, before: float) -> Finding:
    """The finding for the first value that is not finite; e^before is the largest entry of the
    value before it.
    """
    place = where("layer", _layer_of(e, name, row), name if row is None else f"{name}[{row}]")
    dtype = np.dtype(next((x.site.dtype for x in e.layers), np.float32))
    half = dtype.name == "float16"
    limit = math.log(FLOAT16_MAX if half else FLOAT32_MAX)
    evidence = {
        "loss": e.loss,
        "log_max_before": before,
        "first_entry": int(row_of(e.values[name].first_bad, row)),
    }
    if before <= 0.4 * limit:
        return Finding("non_finite", place, "invalid_operation", evidence)
    cause = "float_range" if half else "weights_too_large"
    source = f"the forward pass leaves the range of {dtype.name}, |h| > {math.exp(limit):.3g}"
    return Finding("exploding_activations", place, cause, evidence, limit, source)


def _layer_of(e: Evidence, name: str, row: int | None) -> int:
    """The index of the layer with that value; of a value inside a layer, that layer's; else 0."""
    for i, layer in enumerate(e.layers):
        if layer.site.name == name and layer.row == row:
            return i
    return next((i for i, x in enumerate(e.layers) if name.startswith(x.site.name)), 0)


def backward_overflow(e: Evidence) -> list[Finding]:
    """Cotangents that leave the range of their dtype on the way back, while the forward pass stays
    in it.
    """
    bad = [
        i
        for i, x in enumerate(e.layers)
        if x.site.name in e.cotangents and row_of(e.cotangents[x.site.name].bad, x.row) > 0
    ]
    gradients = [i for i, x in enumerate(e.leaf_log_gradient) if not np.all(x < np.inf)]
    if bad:
        place = layer_place(e, bad[-1])
    elif gradients:
        place = where("leaf", gradients[0], e.leaf_names[gradients[0]])
    else:
        return []
    known = e.log_cotangent[np.isfinite(e.log_cotangent)]
    large = bool(known.size) and known.max() > 60
    cause = "float_range" if e.half or large else "invalid_operation"
    evidence = {"loss": e.loss, "backward": True}
    source = "a cotangent or gradient that is inf or NaN where every value is finite"
    return [Finding("non_finite", place, cause, evidence, source=source)]


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
