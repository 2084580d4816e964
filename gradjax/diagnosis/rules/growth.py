"""Rules of growth: gradients over depth and time, activations over depth, and the causes."""

import math
from dataclasses import replace

import numpy as np

from gradjax.diagnosis.evidence import Evidence
from gradjax.diagnosis.rules.finding import (
    Finding,
    fraction_of,
    hidden,
    layer_place,
    weight_scale,
    where,
)
from gradjax.diagnosis.rules.main_rule import (
    GROWTH_NATS,
    SOURCE,
    Growth,
    growth_run,
    measure_growth,
    rises,
)
from gradjax.taps.structure import Layer, Recurrence


def gradient_growth(e: Evidence) -> list[Finding]:
    """The main rule, over depth."""
    growth = _depth_growth(e)
    if growth is None or not growth.passes_threshold:
        return []
    cotangent, activation = e.log_cotangent[hidden(e)], e.log_activation[hidden(e)]
    # in the order of the backward pass, from the last layer to the first
    first, last = growth_run(rises(cotangent[::-1], growth.nats))
    steps = len(cotangent) - 1
    run = slice(steps - 1 - last, steps - first + 1)
    evidence = growth.evidence(steps) | {
        "run_ends_at": e.layers[steps - 1 - last].name,
        "log_activation_rms_first": float(activation[0]),
        "log_activation_rms_last": float(activation[-1]),
    }
    if growth.nats > 0:
        cause = _why_exploding(e, run)
        pathology = "batchnorm_explosion" if cause == "batchnorm" else "exploding_gradients"
    else:
        cause = _why_vanishing(e, e.layers[run])
        pathology = "vanishing_gradients"
    place = layer_place(e, steps - first)
    return [Finding(pathology, place, cause, evidence, growth.threshold, SOURCE)]


def _depth_growth(e: Evidence) -> Growth | None:
    """G over the hidden layers; None where it is not defined."""
    cotangent = e.log_cotangent[hidden(e)]
    if len(cotangent) < 2 or np.isnan(cotangent).any() or cotangent[-1] == -np.inf:
        return None
    return measure_growth(cotangent, e.size[hidden(e)], _fan_ins(e))


def _fan_ins(e: Evidence) -> list[int]:
    """Units of the hidden layers after the first, without the layers that have no weights."""
    return [layer.fan_in for layer in e.layers[1 : e.hidden] if layer.fan_in > 1]


def _why_exploding(e: Evidence, run: slice) -> str:
    layers, activation = e.layers[run], e.log_activation[run]
    per_layer = (activation[-1] - activation[0]) / max(len(activation) - 1, 1)
    if fraction_of(layers, lambda x: x.norm == "batch") > 0.5 and per_layer < 0.5:
        return "batchnorm"
    normalized = fraction_of(layers, lambda x: bool(x.norm))
    if fraction_of(layers, lambda x: x.skip) > 0.5 and not normalized:
        return "unscaled_residual"
    if fraction_of(layers, lambda x: x.norm == "layer") > 0.5:
        return "normalized_chaos"
    return "weights_too_large"


def _why_vanishing(e: Evidence, layers: list[Layer]) -> str:
    if fraction_of(layers, lambda x: x.post_norm) > 0.5:
        return "layernorm_placement"
    has_sigmoid = any(a.site.kind == "logistic" and a.on_chain for a, _ in e.activations)
    scales = [weight_scale(e, layer) for layer in layers]
    known = [scale for scale in scales if scale is not None]
    if has_sigmoid and known and float(np.median(known)) > 0.4:
        return "activation_slope"
    return "weights_too_small"


def time_growth(e: Evidence) -> list[Finding]:
    """The main rule, over the steps of every recurrence."""
    out = []
    for recurrence, _, back in e.recurrences:
        alive = np.flatnonzero(back > -np.inf)
        not_finite = np.isnan(back).any() or np.isposinf(back).any()
        if not_finite or not alive.size or alive[-1] < 1:
            continue
        cotangent = back[: alive[-1] + 1]
        steps = len(cotangent) - 1
        growth = measure_growth(cotangent, np.ones(steps + 1), [recurrence.fan_in] * steps)
        if not growth.passes_threshold:
            continue
        first, _ = growth_run(rises(cotangent[::-1], growth.nats))
        if growth.nats > 0:
            pathology, cause = "exploding_gradients", "weights_too_large"
        else:
            pathology, cause = "vanishing_gradients", _why_vanishing_in_time(e, recurrence)
        place = where("step", steps - first, f"{recurrence.name}[{steps - first}]")
        evidence = growth.evidence(steps)
        out.append(Finding(pathology, place, cause, evidence, growth.threshold, SOURCE))
    return out


def _why_vanishing_in_time(e: Evidence, recurrence: Recurrence) -> str:
    inside = [a for a, _ in e.activations if a.site.kind == "logistic" and a.site.lead]
    if any(a.on_chain for a in inside):
        return "activation_slope"
    biases = [
        float(np.max(e.leaf_log_rms[i])) for i in recurrence.leaves if len(e.leaf_shapes[i]) == 1
    ]
    # a bias of rms above 1 shuts the gates
    if any(a.gates for a in inside) and max(biases, default=-math.inf) > 0.0:
        return "bias"
    return "weights_too_small"


def activation_growth(e: Evidence) -> list[Finding]:
    """Growth of the forward pass, along skips without normalisation or through the layers."""
    activation = e.log_activation[hidden(e)]
    not_finite = np.isnan(activation).any() or np.isposinf(activation).any()
    if len(activation) < 2 or not_finite or not np.isfinite(activation[0]):
        return []
    if activation.max() < -GROWTH_NATS:
        return [_small_from_the_start(e, float(activation.max()))]
    growth = measure_growth(activation[::-1], e.size[hidden(e)][::-1], _fan_ins(e))
    if not growth.passes_threshold:
        return []
    # growth or decay that only returns to a usual size is healthy
    last = activation[-1]
    if (growth.nats > 0 and last <= 0) or (growth.nats < 0 and last >= -0.5 * GROWTH_NATS):
        return []
    first, _ = growth_run(rises(activation, growth.nats))
    return [_of_activations(e, growth, first + 1, e.hidden)]


def _of_activations(e: Evidence, growth: Growth, start: int, count: int) -> Finding:
    """The finding for a growth over the first `count` layers that starts at one of them."""
    layers = e.layers[1:count]
    skips = fraction_of(layers, lambda x: x.skip) > 0.5
    normalized = fraction_of(layers, lambda x: bool(x.norm)) >= 0.5
    if growth.nats < 0:
        name, cause = "vanishing_activations", "weights_too_small"
    elif skips and not normalized:
        name, cause = "residual_growth", "unscaled_residual"
    else:
        name, cause = "exploding_activations", "weights_too_large"
    evidence = growth.evidence(count - 1)
    return Finding(name, layer_place(e, start), cause, evidence, growth.threshold, SOURCE)


def before_overflow(e: Evidence) -> list[Finding]:
    """Growth of the forward pass up to the layer, or the step in time, that left the range of its
    dtype; up to the last one where only the loss left it.
    """
    out = []
    activation = e.log_activation[hidden(e)]
    count = _finite_prefix(activation)
    if count > 1:
        sizes = e.size[hidden(e)][:count]
        growth = measure_growth(activation[:count][::-1], sizes[::-1], _fan_ins(e)[: count - 1])
        if growth.nats > 0 and growth.passes_threshold:
            first, _ = growth_run(rises(activation[:count], growth.nats))
            overflows = count < e.hidden
            found = _of_activations(e, growth, count if overflows else first + 1, count)
            end = found.where["name"] if overflows else "the loss"
            out.append(replace(found, evidence=found.evidence | {"out_of_range_at": end}))
    for recurrence, state, _ in e.recurrences if not out else ():
        count = _finite_prefix(state)
        if count < 2:
            continue
        fan_ins = [recurrence.fan_in] * (count - 1)
        growth = measure_growth(state[:count][::-1], np.ones(count), fan_ins)
        if growth.nats > 0 and growth.passes_threshold:
            step = min(count, len(state) - 1)
            place = where("step", step, f"{recurrence.name}[{step}]")
            end = place["name"] if count < len(state) else "the loss"
            evidence = growth.evidence(count - 1) | {"out_of_range_at": end}
            name, cause = "exploding_activations", "weights_too_large"
            out.append(Finding(name, place, cause, evidence, growth.threshold, SOURCE))
    cause_of_half = {"exploding_activations": "float_range"} if e.half else {}
    return [replace(x, cause=cause_of_half.get(x.pathology, x.cause)) for x in out]


def _finite_prefix(values: np.ndarray) -> int:
    """How many values there are before the first that is inf or NaN."""
    bad = np.flatnonzero(np.isnan(values) | np.isposinf(values))
    return int(bad[0]) if bad.size else len(values)


def _small_from_the_start(e: Evidence, largest: float) -> Finding:
    inputs = max(e.arg_log_rms, default=0.0)
    cause = "input_scale" if inputs < -GROWTH_NATS else "weights_too_small"
    return Finding(
        "vanishing_activations",
        layer_place(e, 0),
        cause,
        {"log_activation_rms_largest": largest},
        -GROWTH_NATS,
        "rms below e^-6 of a unit in every layer: biases and rounding outweigh the signal",
    )
