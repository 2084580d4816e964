"""Rules of units and directions: dead, saturated, all alike, all examples in one point, frozen
attention, low rank.
"""

import math
from typing import Any

import numpy as np

from gradjax.diagnosis.evidence import Evidence
from gradjax.diagnosis.rules.finding import (
    GROWTH_NATS,
    STANDARD_DEVIATIONS,
    Finding,
    guilty_run,
    hidden,
    layer_place,
    fraction_of,
    weight_scale,
    where,
)
from gradjax.taps.statistics import FLAT


def _rows(x: Any) -> np.ndarray:
    return np.atleast_1d(np.asarray(x, float))


def _index_of(e: Evidence, activation: Any, row: int | None) -> int:
    """The layer that an activation function belongs to: by the name before it, else the next one;
    -1 for none.
    """
    name, path = activation.layer, activation.site.path
    mine = [i for i, layer in enumerate(e.layers) if layer.row == row]
    for i in mine:
        layer = e.layers[i]
        if layer.site.name == name or name.startswith((layer.site.name + "/", layer.name + ".")):
            return i
    if row is not None:  # of several scans the one that it is in
        mine = [i for i in mine if e.layers[i].site.path[:1] == path[:1]]
    after = [i for i in mine if e.layers[i].site.path > path]
    return after[0] if after else mine[-1] if mine else -1


def _activation_place(e: Evidence, activation: Any, row: int | None) -> dict[str, Any]:
    index = _index_of(e, activation, row)
    if index >= 0:
        return where("layer", index, e.layers[index].name)
    name = activation.layer or activation.site.kind
    return where("layer", index, name if row is None else f"{name}[{row}]")


DEAD_SHARE = 0.75


def dead_units(e: Evidence) -> list[Finding]:
    """ReLU units that are off for every example: no gradient passes them."""
    source = (
        "more than three quarters of a layer: with symmetric weights a unit is off for all examples with probability "
        "at most 1/2, reached when all examples are alike"
    )
    for activation, seen in e.activations:
        if activation.site.kind != "relu" or seen is None:
            continue
        fraction = _rows(seen)
        units = activation.site.shape[-1] if activation.site.shape else 1
        threshold = max(DEAD_SHARE, min(0.5 + STANDARD_DEVIATIONS * math.sqrt(0.25 / units), 0.99))
        bad = np.flatnonzero(fraction > threshold)
        if bad.size:
            row = int(bad[0]) if activation.site.lead else None
            evidence = {"dead_fraction": float(fraction[bad[0]]), "layers_affected": int(bad.size)}
            place = _activation_place(e, activation, row)
            return [Finding("dead_units", place, "bias", evidence, threshold, source)]
    return []


SATURATED_SHARE = 0.5


def saturated_units(e: Evidence) -> list[Finding]:
    """tanh, sigmoid and their like in their flat part, where every path through the layer meets
    them.
    """
    source = f"half of the units with a slope below {FLAT} of the steepest (Glorot & Bengio 2010, section 3, saturation)"
    for activation, seen in e.activations:
        kind = activation.site.kind
        if (
            kind not in ("tanh", "logistic", "erf", "hard_tanh")
            or not activation.on_chain
            or activation.gates
        ):
            continue
        if _of_output(e, activation):
            continue  # certain where it is flat
        fraction = _rows(seen)
        bad = np.flatnonzero(fraction > SATURATED_SHARE)
        if bad.size:
            row = int(bad[0]) if activation.site.lead else None
            place = _activation_place(e, activation, row)
            evidence = {"saturated_fraction": float(fraction[bad[0]]), "activation": kind}
            cause = _why_saturated(e, place["index"])
            return [Finding("saturated_units", place, cause, evidence, SATURATED_SHARE, source)]
    return _saturated_gates(e)


def _of_output(e: Evidence, activation: Any) -> bool:
    """Whether an activation function makes the model's output: behind the read-out."""
    if activation.site.lead or not e.layers:
        return False
    last = len(e.layers) - 1
    behind = (
        activation.site.path > e.layers[last].site.path or _index_of(e, activation, None) == last
    )
    return behind and (last == 0 or e.hidden == last)


GATES_SHARE = 0.9


def _saturated_gates(e: Evidence) -> list[Finding]:
    """A recurrence whose gates and candidates are all flat: one alone may be open or shut for good
    reason.
    """
    for recurrence, _, _ in e.recurrences:
        scan = recurrence.sites[0].path[:-1]
        inside = [
            np.median(_rows(seen)) for a, seen in e.activations
            if a.gates and a.site.kind in ("tanh", "logistic") and a.site.path[: len(scan)] == scan
        ]  # fmt: skip
        fractions = sorted(inside, reverse=True)[
            : max(3, len(inside) - 1)
        ]  # tanh of an LSTM's cell gates the output only
        if len(fractions) > 2 and min(fractions) > GATES_SHARE:
            large = max(
                [*e.arg_log_rms, float(e.log_activation[0]) if e.layers else 0.0]
            ) > math.log(3.0)
            source = "nine tenths of every gate and candidate of a recurrence in their flat part at every step"
            evidence = {"saturated_fraction": float(min(fractions)), "activation": "gates"}
            place = where("step", 0, recurrence.name)
            cause = "input_scale" if large else "weights_too_large"
            return [Finding("saturated_units", place, cause, evidence, GATES_SHARE, source)]
    return []


def _why_saturated(e: Evidence, index: int) -> str:
    if index < 0:
        return (
            "input_scale"
            if max(e.arg_log_rms, default=0.0) > math.log(3.0)
            else "weights_too_large"
        )
    layer = e.layers[index]
    weights = weight_scale(e, layer)
    into = e.log_activation[index - 1] if index else max(e.arg_log_rms, default=0.0)
    if weights is None or not np.isfinite(into):
        return "weights_too_large"
    biases = []
    for leaf in layer.leaves:
        rows = layer.row is not None and np.ndim(e.leaf_log_rms[leaf]) == 1
        if len(e.leaf_shapes[leaf]) - int(rows) == 1:
            value = np.asarray(e.leaf_log_rms[leaf])
            biases.append(float(value[layer.row] if rows else value))
    if max(biases, default=-math.inf) > math.log(max(weights, 1e-300)) + into:
        return "bias"
    return "input_scale" if into > math.log(3.0) and weights < 3.0 else "weights_too_large"


def symmetric_units(e: Evidence) -> list[Finding]:
    """All units of a layer alike: the same value, the same gradient, for ever."""
    for i in range(e.hidden):
        layer = e.layers[i]
        if layer.site.shape[-1:] in ((), (1,)) or not layer.weighs:
            continue
        zero = e.log_activation[i] == -np.inf and not layer.skip and weight_scale(e, layer) == 0.0
        if zero or (
            e.units[i] < 1e-9 and _weights_alike(e, layer)
        ):  # a large common bias hides the differences
            evidence = {"units_variance_fraction": float(e.units[i])}
            source = "variance over units below 1e-9 of the mean square: rounding alone; equal units stay equal"
            return [
                Finding(
                    "symmetric_units", layer_place(e, i), "identical_init", evidence, 1e-9, source
                )
            ]
    return []


def _weights_alike(e: Evidence, layer: Any) -> bool:
    """Whether every kernel of a layer has the same weights for all of its outputs."""
    kernels = [leaf for leaves, _, _ in layer.kernels for leaf in leaves]
    for leaf in kernels:
        stacked = layer.row is not None and np.ndim(e.leaf_log_rms[leaf]) > 0
        w = np.asarray(e.params[leaf][layer.row] if stacked else e.params[leaf], np.float64)
        if w.ndim > 1 and min(np.mean(np.var(w, axis=axis)) for axis in (0, -1)) > 1e-9 * np.mean(
            w**2
        ):
            return False
    return True


def rank_collapse(e: Evidence) -> list[Finding]:
    """All examples, or all positions of an example, become one point."""
    attention = any(a.site.kind == "softmax" for a, _ in e.activations)
    # ReLU at He's initialisation, the slowest healthy law of examples: 1 - c_L = (9 pi^2 / 2) / L^2
    law = min(1e-3, 0.05 * 4.5 * math.pi**2 / max(e.hidden, 1) ** 2)
    for of, fraction, threshold in (("tokens", e.tokens, 1e-3), ("examples", e.examples, law)):
        d = fraction[hidden(e)]
        if of == "examples" and not np.isnan(e.tokens[hidden(e)]).all():
            continue  # positions tell the examples of a sequence apart
        if len(d) < 2 or np.isnan(d).any() or d[0] < 1e-2 or not (d < threshold).any():
            continue
        falls = -np.diff(np.log(np.maximum(d, 1e-15)))
        first, _ = guilty_run(falls)
        source = (
            "variance over examples or positions, a share of the mean square, below 1e-3 (Dong et al. 2021, arXiv "
            "2103.03404) and below a twentieth of that of a critical ReLU network, 1 - c_L = (9 pi^2/2)/L^2 (Hayou et "
            "al. 2019, arXiv 1902.06853)"
        )
        evidence = {
            "fraction": float(d[-1]),
            "of": of,
            "collapsed_at": e.layers[int(np.argmax(d < threshold))].name,
        }
        skips = fraction_of(e.layers[1 : e.hidden], lambda x: x.skip) > 0.5
        cause = "averaging" if attention and not skips else "weights_too_small"
        return [
            Finding("rank_collapse", layer_place(e, first + 1), cause, evidence, threshold, source)
        ]
    return []


def attention_logit_growth(e: Evidence) -> list[Finding]:
    """Attention so sharp that a row sees one key."""
    for activation, seen in e.activations:
        if activation.site.kind != "softmax" or seen is None:
            continue
        deviation, keys, largest = (_rows(x) for x in seen)
        threshold = np.sqrt(2 * np.log(np.maximum(keys, 2.0)))
        bad = np.flatnonzero((deviation > 2 * threshold) & (largest > 0.9))
        if bad.size:
            row = int(bad[0]) if activation.site.lead else None
            evidence = {
                "logit_deviation": float(deviation[bad[0]]),
                "largest_fraction": float(largest[bad[0]]),
            }
            source = (
                "standard deviation of a row's logits above 2 sqrt(2 log keys), twice where a softmax of Gaussian "
                "logits freezes (Derrida 1981, random energy model); cf. Dehghani et al. 2023, arXiv 2302.05442"
            )
            place = _activation_place(e, activation, row)
            limit, weights = float(2 * threshold[bad[0]]), _weights_at(e, place["index"])
            cause = (
                "weights_too_large" if weights is not None and weights > 2 else "attention_scale"
            )
            return [Finding("attention_logit_growth", place, cause, evidence, limit, source)]
    return []


SVD_WORK = 2e8  # cubes of widths: a second or two of singular values


def _weights_at(e: Evidence, index: int) -> float | None:
    return weight_scale(e, e.layers[index]) if index >= 0 else None


def ill_conditioned_jacobian(e: Evidence) -> list[Finding]:
    """A layer whose weights pass fewer than a quarter of the directions that they could."""
    work = sum(min(fan_in, fan_out) ** 3 for x in e.layers for _, fan_in, fan_out in x.kernels)
    for i in range(
        0, e.hidden, 1 + int(work / SVD_WORK)
    ):  # of a very deep network a part of the layers
        layer = e.layers[i]
        if layer.skip or not layer.kernels:
            continue
        for leaves, fan_in, fan_out in layer.kernels:
            if len(leaves) != 1:
                continue
            (leaf,) = leaves
            stacked = layer.row is not None and np.ndim(e.leaf_log_rms[leaf]) > 0
            w = e.params[leaf][layer.row] if stacked else e.params[leaf]
            if (
                w.size != fan_in * fan_out
                or w.ndim != 2
                or min(w.shape) < 4
                or not np.isfinite(w.astype(np.float64)).all()
                or w.size > 2**20
            ):
                continue
            values = np.linalg.svd(w.astype(np.float64), compute_uv=False)
            middle = values[len(values) // 4]
            if values[0] > 0 and middle < values[0] * math.exp(-GROWTH_NATS):
                evidence = {
                    "log_condition_of_a_quarter": float(np.log(values[0] / max(middle, 1e-300)))
                }
                source = (
                    "three quarters of a layer's singular values lie more than 6 nats (a factor of 400) below the "
                    "largest; of Gaussian weights the upper quarter lies within 1 nat (Marchenko & Pastur 1967)"
                )
                place = layer_place(e, i)
                return [
                    Finding(
                        "ill_conditioned_jacobian",
                        place,
                        "low_rank_weights",
                        evidence,
                        GROWTH_NATS,
                        source,
                    )
                ]
    return []


SHATTERED_COSINE = 0.2


def shattered_gradients(e: Evidence) -> list[Finding]:
    """A gradient that an invisible change of the input turns around: white noise, from which
    nothing is learned.
    """
    measured = e.shattering()
    if measured is None or measured[0] > SHATTERED_COSINE:
        return []
    cosine, change = measured
    cause = (
        "frequency" if change > 0.3 else "normalized_chaos"
    )  # features that oscillate move at once
    first = e.layers[0].name if e.layers else "input"
    source = (
        "cosine below 0.2 between the loss's gradients at inputs 1% apart; white noise has 0, a smooth loss 1 "
        "(Balduzzi et al. 2017, arXiv 1702.08591)"
    )
    evidence = {"cosine": cosine, "change_of_second_layer": change}
    return [
        Finding(
            "shattered_gradients",
            where("layer", 0, first),
            cause,
            evidence,
            SHATTERED_COSINE,
            source,
        )
    ]
