"""Rules of growth: gradients over depth and over time, activations over depth; and why they
grow.
"""

import math
from typing import Any

import numpy as np

from gradjax.diagnosis.evidence import Evidence
from gradjax.diagnosis.rules.finding import (
    GROWTH_NATS,
    SOURCE,
    Finding,
    depth_growth,
    fans,
    growth,
    guilty_run,
    hidden,
    layer_place,
    fraction_of,
    weight_scale,
    where,
)


def gradient_growth(e: Evidence) -> list[Finding]:
    """The main rule, over depth."""
    found = depth_growth(e)
    if found is None or not found.sick:
        return []
    c, a = e.log_cotangent[hidden(e)], e.log_activation[hidden(e)]
    with np.errstate(invalid="ignore"):  # behind a cut every cotangent is -inf
        backward = np.nan_to_num(
            np.sign(found.nats) * (c[:-1] - c[1:])[::-1], nan=0.0, posinf=np.inf, neginf=0.0
        )
    first, last = guilty_run(backward)
    steps = len(c) - 1
    run = slice(steps - 1 - last, steps - first + 1)
    evidence = found.evidence(steps) | {
        "run_ends_at": e.layers[steps - 1 - last].name,
        "log_activation_rms_first": float(a[0]),
        "log_activation_rms_last": float(a[-1]),
    }
    exploding = found.nats > 0
    pathology = "exploding_gradients" if exploding else "vanishing_gradients"
    cause = _why_exploding(e, run) if exploding else _why_vanishing(e, run)
    if cause == "batchnorm":
        pathology = "batchnorm_explosion"
    return [
        Finding(pathology, layer_place(e, steps - first), cause, evidence, found.threshold, SOURCE)
    ]


def _why_exploding(e: Evidence, run: slice) -> str:
    layers, a = e.layers[run], e.log_activation[run]
    per_layer = (a[-1] - a[0]) / max(len(a) - 1, 1)
    if fraction_of(layers, lambda x: x.norm == "batch") > 0.5 and per_layer < 0.5:
        return "batchnorm"
    if fraction_of(layers, lambda x: x.skip) > 0.5 and not fraction_of(
        layers, lambda x: bool(x.norm)
    ):
        return "unscaled_residual"
    if fraction_of(layers, lambda x: x.norm == "layer") > 0.5:
        return "normalized_chaos"
    return "weights_too_large"


def _why_vanishing(e: Evidence, run: slice) -> str:
    layers = e.layers[run]
    if fraction_of(layers, lambda x: x.post_norm) > 0.5:
        return "layernorm_placement"
    slopes = [a for a, _ in e.activations if a.site.kind == "logistic" and a.on_chain]
    weights = [w for layer in layers for w in [weight_scale(e, layer)] if w is not None]
    if slopes and weights and float(np.median(weights)) > 0.4:
        return "activation_slope"
    return "weights_too_small"


def time_growth(e: Evidence) -> list[Finding]:
    """The main rule, over the steps of every recurrence."""
    out = []
    for recurrence, _, back in e.recurrences:
        alive = np.flatnonzero(back > -np.inf)
        if np.isnan(back).any() or np.isposinf(back).any() or not alive.size or alive[-1] < 1:
            continue
        c = back[: alive[-1] + 1]
        steps = len(c) - 1
        found = growth(c, np.ones(len(c)), [recurrence.fan_in] * steps)
        if not found.sick:
            continue
        with np.errstate(invalid="ignore"):
            rises = np.nan_to_num(
                np.sign(found.nats) * (c[:-1] - c[1:])[::-1], nan=0.0, posinf=np.inf, neginf=0.0
            )
        first, _ = guilty_run(rises)
        pathology = "exploding_gradients" if found.nats > 0 else "vanishing_gradients"
        cause = "weights_too_large" if found.nats > 0 else _why_vanishing_in_time(e, recurrence)
        place = where("step", steps - first, f"{recurrence.name}[{steps - first}]")
        out.append(Finding(pathology, place, cause, found.evidence(steps), found.threshold, SOURCE))
    return out


def _why_vanishing_in_time(e: Evidence, recurrence: Any) -> str:
    inside = [a for a, _ in e.activations if a.site.kind == "logistic" and a.site.lead]
    if any(a.on_chain for a in inside):
        return "activation_slope"
    biases = [
        float(np.max(e.leaf_log_rms[i])) for i in recurrence.leaves if len(e.leaf_shapes[i]) == 1
    ]
    closed = (
        any(a.gates for a in inside) and max(biases, default=-math.inf) > 0.0
    )  # rms above 1: gates shut
    return "bias" if closed else "weights_too_small"


def activation_growth(e: Evidence) -> list[Finding]:
    """Growth of the forward pass: along skips without normalisation, or through the layers
    themselves.
    """
    a = e.log_activation[hidden(e)]
    if len(a) < 2 or not np.isfinite(a[0]) or np.isnan(a).any() or np.isposinf(a).any():
        return []
    layers = e.layers[1 : e.hidden]
    if a.max() < -GROWTH_NATS:  # small from the first layer on
        source = "rms below e^-6 of a unit in every layer: biases and rounding outweigh the signal"
        cause = (
            "input_scale" if max(e.arg_log_rms, default=0.0) < -GROWTH_NATS else "weights_too_small"
        )
        evidence = {"log_activation_rms_largest": float(a.max())}
        return [
            Finding(
                "vanishing_activations", layer_place(e, 0), cause, evidence, -GROWTH_NATS, source
            )
        ]
    found = growth(a[::-1], e.size[hidden(e)][::-1], fans(e))
    ends_apart = (
        a[-1] > 0 if found.nats > 0 else a[-1] < -0.5 * GROWTH_NATS
    )  # not merely back to a usual size
    if not found.sick or not ends_apart:
        return []
    rises = np.nan_to_num(np.sign(found.nats) * np.diff(a), nan=0.0, posinf=np.inf, neginf=0.0)
    first, _ = guilty_run(rises)
    evidence = found.evidence(len(a) - 1)
    skips = (
        fraction_of(layers, lambda x: x.skip) > 0.5
        and fraction_of(layers, lambda x: bool(x.norm)) < 0.5
    )
    if found.nats > 0 and skips:
        name, cause = "residual_growth", "unscaled_residual"
    else:
        name = "exploding_activations" if found.nats > 0 else "vanishing_activations"
        cause = "weights_too_large" if found.nats > 0 else "weights_too_small"
    return [Finding(name, layer_place(e, first + 1), cause, evidence, found.threshold, SOURCE)]
