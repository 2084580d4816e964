"""Rules of numbers that are not: inf and NaN, norms that overflow, and gradients that cannot be
there at all.
"""

import math

import numpy as np

from gradjax.diagnosis.evidence import Evidence
from gradjax.diagnosis.rules.finding import Finding, layer_place, row_of, where


def non_finite(e: Evidence) -> list[Finding]:
    """The first value that is inf or NaN, and what made it."""
    make = lambda where, cause, **evidence: [
        Finding(
            "non_finite",
            where,
            cause,
            {"loss": e.loss} | evidence,
            math.inf,
            "a value that is inf or NaN",
        )
    ]
    if e.arg_bad:
        return make(where("argument", 0, e.arg_bad[0]), "bad_data", arguments=e.arg_bad)
    if any(e.leaf_bad):
        first = e.leaf_bad.index(True)
        return make(where("leaf", first, e.leaf_names[first]), "bad_parameter")
    before = -math.inf
    for name, row in e.order:
        seen = e.values[name]
        if row_of(seen.bad, row) > 0:
            return _first_bad(e, name, row, before)
        before = row_of(seen.log_max, row)
    if not math.isfinite(e.loss):
        cause = "float_range" if e.half else "invalid_operation"
        return make(where("layer", len(e.layers), "loss"), cause, last_value=e.order[-1][0])
    bad = [i for i, c in enumerate(e.log_cotangent) if np.isnan(c) or c == np.inf]
    if bad:
        return make(layer_place(e, bad[-1]), "invalid_operation", backward=True)
    return []


def _first_bad(e: Evidence, name: str, row: int | None, before: float) -> list[Finding]:
    """The value at `name` is the first that is not finite; the largest entry of the value before it
    is e^before.
    """
    index = next((i for i, x in enumerate(e.layers) if x.site.name == name and x.row == row), None)
    if index is None:  # inside a layer: the layer it belongs to
        index = next((i for i, x in enumerate(e.layers) if name.startswith(x.site.name)), 0)
    place = where("layer", index, name if row is None else f"{name}[{row}]")
    dtype = next((x.site.dtype for x in e.layers), np.float32)
    half = np.dtype(dtype).itemsize < 4 and np.dtype(dtype).name == "float16"
    limit = math.log(65504.0) if half else math.log(float(np.finfo(np.float32).max))
    evidence = {
        "loss": e.loss,
        "log_max_before": before,
        "first_entry": int(row_of(e.values[name].first_bad, row)),
    }
    if before > 0.4 * limit:
        cause = "float_range" if half else "weights_too_large"
        text = f"the forward pass leaves the range of {np.dtype(dtype).name}, |h| > {math.exp(limit):.3g}"
        return [Finding("exploding_activations", place, cause, evidence, limit, text)]
    return [
        Finding(
            "non_finite",
            place,
            "invalid_operation",
            evidence,
            math.inf,
            "a value that is inf or NaN",
        )
    ]


def backward_overflow(e: Evidence) -> list[Finding]:
    """Cotangents that leave the range of their dtype on the way back, though nothing of the forward
    pass does.
    """
    bad = [
        i for i, x in enumerate(e.layers)
        if x.site.name in e.cotangents and row_of(e.cotangents[x.site.name].bad, x.row) > 0
    ]  # fmt: skip
    gradients = [i for i, x in enumerate(e.leaf_log_gradient) if not np.all(x < np.inf)]
    if not bad and not gradients:
        return []
    place = (
        layer_place(e, bad[-1]) if bad else where("leaf", gradients[0], e.leaf_names[gradients[0]])
    )
    source = "a cotangent or gradient that is inf or NaN where every value is finite"
    known = e.log_cotangent[np.isfinite(e.log_cotangent)]
    cause = "float_range" if e.half or (known.size and known.max() > 60) else "invalid_operation"
    return [
        Finding("non_finite", place, cause, {"loss": e.loss, "backward": True}, math.inf, source)
    ]


def untrained_layer(e: Evidence) -> list[Finding]:
    """Parameters without a differentiable way to the loss: by structure, not by underflow."""
    dead = e.structure.untrained
    if not dead:
        return []
    evidence = {"leaves": [e.leaf_names[i] for i in dead]}
    place = where("leaf", dead[0], e.leaf_names[dead[0]])
    return [
        Finding(
            "untrained_layer", place, "no_path", evidence, 0.0, "no path to the loss in the jaxpr"
        )
    ]


def norm_overflow(e: Evidence) -> list[Finding]:
    """Finite gradients whose squares are not: a plain norm is inf, and clipping by it gives
    zeros.
    """
    limit = 0.5 * math.log(float(np.finfo(np.float32).max))
    norms = np.array([float(np.max(x)) for x in e.leaf_log_gradient])
    if np.isnan(norms).any() or np.isposinf(norms).any() or not (norms > limit).any():
        return []
    worst = int(norms.argmax())
    evidence = {"log_norm": float(norms[worst])}
    source = "a norm above sqrt(3.4e38) = 1.8e19, whose square is inf in float32: optax.global_norm is then inf"
    return [
        Finding(
            "norm_overflow",
            where("leaf", worst, e.leaf_names[worst]),
            "float_range",
            evidence,
            limit,
            source,
        )
    ]
