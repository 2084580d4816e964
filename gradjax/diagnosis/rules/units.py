"""Rules of units and directions: units that are dead, saturated or all alike, attention that sees
one key, examples that merge, weights of low rank, gradients that are noise.
"""

import math
from typing import Any

import numpy as np

from gradjax.diagnosis.evidence import Evidence
from gradjax.diagnosis.rules.finding import (
    Finding,
    fraction_of,
    hidden,
    layer_place,
    row_of,
    row_of_leaf,
    weight_scale,
    where,
)
from gradjax.diagnosis.rules.main_rule import GROWTH_NATS, STANDARD_DEVIATIONS, growth_run, rises
from gradjax.taps.statistics import FLAT
from gradjax.taps.structure import Activation, Layer

DEAD_FRACTION = 0.75
SATURATED_FRACTION = 0.5
GATES_FRACTION = 0.9  # of the gates and candidates of a recurrence
LARGE_INPUT = math.log(3.0)  # log rms of an input that saturates units by its size
ALIKE = 1e-9  # variance over units as a fraction of the mean square: rounding leaves more
COLLAPSED = 1e-3  # variance over examples or positions as a fraction of the mean square
SPREAD = 1e-2  # the same in the first layer of a network whose inputs differ
SHARP_WEIGHT = 0.9  # the largest attention weight of a row
SHATTERED_COSINE = 0.2
SVD_WORK = 2e8  # cubes of widths: a second or two of singular values
SVD_SIZE = 2**20  # entries of the largest weights that are decomposed


def _rows(x: Any) -> np.ndarray:
    return np.atleast_1d(np.asarray(x, float))


def _first_row(activation: Activation, bad: np.ndarray) -> int | None:
    """The first bad row of an activation inside a scan, None for one outside."""
    return int(bad[0]) if activation.site.lead else None


def _layer_index(e: Evidence, activation: Activation, row: int | None) -> int:
    """The layer that an activation function belongs to: by the name before it, else the next one;
    -1 for none.
    """
    name, path = activation.layer, activation.site.path
    candidates = [i for i, layer in enumerate(e.layers) if layer.row == row]
    for i in candidates:
        layer = e.layers[i]
        if layer.site.name == name or name.startswith((layer.site.name + "/", layer.name + ".")):
            return i
    # of several scans, the one that holds the activation
    if row is not None:
        candidates = [i for i in candidates if e.layers[i].site.path[:1] == path[:1]]
    after = [i for i in candidates if e.layers[i].site.path > path]
    if after:
        return after[0]
    return candidates[-1] if candidates else -1


def _activation_place(e: Evidence, activation: Activation, row: int | None) -> dict[str, Any]:
    index = _layer_index(e, activation, row)
    if index >= 0:
        return where("layer", index, e.layers[index].name)
    name = activation.layer or activation.site.kind
    return where("layer", index, name if row is None else f"{name}[{row}]")


def dead_units(e: Evidence) -> list[Finding]:
    """ReLU units that are off for every example: no gradient passes them."""
    for activation, seen in e.activations:
        if activation.site.kind != "relu" or seen is None:
            continue
        fraction = _rows(seen)
        units = activation.site.shape[-1] if activation.site.shape else 1
        by_chance = min(0.5 + STANDARD_DEVIATIONS * math.sqrt(0.25 / units), 0.99)
        threshold = max(DEAD_FRACTION, by_chance)
        bad = np.flatnonzero(fraction > threshold)
        if bad.size:
            place = _activation_place(e, activation, _first_row(activation, bad))
            evidence = {"dead_fraction": float(fraction[bad[0]]), "layers_affected": int(bad.size)}
            return [Finding("dead_units", place, "bias", evidence, threshold)]
    return []


def saturated_units(e: Evidence) -> list[Finding]:
    """Units of tanh, sigmoid and their like in the flat part, where every path through the layer
    meets them.
    """
    for activation, seen in e.activations:
        kind = activation.site.kind
        if kind not in ("tanh", "logistic", "erf", "hard_tanh"):
            continue
        if not activation.on_chain or activation.gates or _is_output(e, activation):
            continue
        fraction = _rows(seen)
        bad = np.flatnonzero(fraction > SATURATED_FRACTION)
        if bad.size:
            place = _activation_place(e, activation, _first_row(activation, bad))
            evidence = {"saturated_fraction": float(fraction[bad[0]]), "activation": kind}
            cause = _why_saturated(e, place["index"])
            source = (
                f"half of the units with a slope below {FLAT} of the steepest "
                "(Glorot & Bengio 2010, section 3, saturation)"
            )
            return [Finding("saturated_units", place, cause, evidence, SATURATED_FRACTION, source)]
    return _saturated_gates(e)


def _is_output(e: Evidence, activation: Activation) -> bool:
    """Whether an activation function makes the model's output, behind the read-out: where it is
    flat there the model is certain.
    """
    if activation.site.lead or not e.layers:
        return False
    last = len(e.layers) - 1
    after = activation.site.path > e.layers[last].site.path
    behind = after or _layer_index(e, activation, None) == last
    return behind and (last == 0 or e.hidden == last)


def _saturated_gates(e: Evidence) -> list[Finding]:
    """A recurrence whose gates and candidates are all flat; a single saturated gate can be
    legitimate.
    """
    for recurrence, _, _ in e.recurrences:
        scan = recurrence.sites[0].path[:-1]
        inside = [
            np.median(_rows(seen))
            for a, seen in e.activations
            if a.gates and a.site.kind in ("tanh", "logistic") and a.site.path[: len(scan)] == scan
        ]
        # the least saturated one may be the tanh of an LSTM's cell, which gates only the output
        counted = sorted(inside, reverse=True)[: max(3, len(inside) - 1)]
        if len(counted) < 3 or min(counted) <= GATES_FRACTION:
            continue
        first_layer = float(e.log_activation[0]) if e.layers else 0.0
        large = max([*e.arg_log_rms, first_layer]) > LARGE_INPUT
        cause = "input_scale" if large else "weights_too_large"
        source = (
            "nine tenths of every gate and candidate of a recurrence in their flat part "
            "at every step"
        )
        evidence = {"saturated_fraction": float(min(counted)), "activation": "gates"}
        place = where("step", 0, recurrence.name)
        return [Finding("saturated_units", place, cause, evidence, GATES_FRACTION, source)]
    return []


def _why_saturated(e: Evidence, index: int) -> str:
    inputs = max(e.arg_log_rms, default=0.0)
    if index < 0:
        return "input_scale" if inputs > LARGE_INPUT else "weights_too_large"
    layer = e.layers[index]
    weights = weight_scale(e, layer)
    into = e.log_activation[index - 1] if index else inputs
    if weights is None or not np.isfinite(into):
        return "weights_too_large"
    if _largest_bias(e, layer) > math.log(max(weights, 1e-300)) + into:
        return "bias"
    return "input_scale" if into > LARGE_INPUT and weights < 3.0 else "weights_too_large"


def _largest_bias(e: Evidence, layer: Layer) -> float:
    """Log rms of a layer's largest bias; -inf without one."""
    biases = [-math.inf]
    for leaf in layer.leaves:
        row = layer.row if np.ndim(e.leaf_log_rms[leaf]) == 1 else None
        if len(e.leaf_shapes[leaf]) - (row is not None) == 1:
            biases.append(row_of(e.leaf_log_rms[leaf], row))
    return max(biases)


def symmetric_units(e: Evidence) -> list[Finding]:
    """All units of a layer alike: the same value and the same gradient, always."""
    for i in range(e.hidden):
        layer = e.layers[i]
        if layer.site.shape[-1:] in ((), (1,)) or not layer.weighs:
            continue
        zero = e.log_activation[i] == -np.inf and not layer.skip and weight_scale(e, layer) == 0.0
        # the weights are compared as well, since a large common bias hides the units' differences
        if zero or (e.units[i] < ALIKE and _weights_alike(e, layer)):
            evidence = {"units_variance_fraction": float(e.units[i])}
            return [Finding("symmetric_units", layer_place(e, i), "identical_init", evidence)]
    return []


def _weights_alike(e: Evidence, layer: Layer) -> bool:
    """Whether every kernel of a layer has the same weights for all of its outputs."""
    for leaf in (leaf for leaves, _, _ in layer.kernels for leaf in leaves):
        w = _own_weights(e, layer, leaf).astype(np.float64)
        if w.ndim < 2:
            continue
        variance = min(np.mean(np.var(w, axis=axis)) for axis in (0, -1))
        if variance > ALIKE * np.mean(w**2):
            return False
    return True


def _own_weights(e: Evidence, layer: Layer, leaf: int) -> np.ndarray:
    """A layer's own part of a parameter leaf."""
    row = row_of_leaf(e, layer, leaf)
    return np.asarray(e.params[leaf] if row is None else e.params[leaf][row])


def rank_collapse(e: Evidence) -> list[Finding]:
    """All examples, or all positions of an example, become one point."""
    tokens, examples = e.tokens[hidden(e)], e.examples[hidden(e)]
    # ReLU at He's initialisation, the slowest healthy law of examples: 1 - c_L = (9 pi^2 / 2) / L^2
    law = 0.05 * 4.5 * math.pi**2 / max(e.hidden, 1) ** 2
    found = _collapse(e, "tokens", tokens, COLLAPSED)
    # where there are positions, they separate the examples of a sequence
    if not found and np.isnan(tokens).all():
        found = _collapse(e, "examples", examples, min(COLLAPSED, law))
    return found


def _collapse(e: Evidence, of: str, variance: np.ndarray, threshold: float) -> list[Finding]:
    """The finding for one kind of variance (layers,), a fraction of the mean square."""
    if len(variance) < 2 or np.isnan(variance).any() or variance[0] < SPREAD:
        return []
    below = variance < threshold
    if not below.any():
        return []
    first, _ = growth_run(rises(np.log(np.maximum(variance, 1e-15)), -1.0))
    evidence = {
        "fraction": float(variance[-1]),
        "of": of,
        "collapsed_at": e.layers[int(np.argmax(below))].name,
    }
    attention = any(a.site.kind == "softmax" for a, _ in e.activations)
    skips = fraction_of(e.layers[1 : e.hidden], lambda x: x.skip) > 0.5
    cause = "averaging" if attention and not skips else "weights_too_small"
    return [Finding("rank_collapse", layer_place(e, first + 1), cause, evidence, threshold)]


def attention_logit_growth(e: Evidence) -> list[Finding]:
    """Attention so sharp that a row sees one key."""
    for activation, seen in e.activations:
        if activation.site.kind != "softmax" or seen is None:
            continue
        deviation, keys, largest = (_rows(x) for x in seen)
        threshold = 2 * np.sqrt(2 * np.log(np.maximum(keys, 2.0)))
        bad = np.flatnonzero((deviation > threshold) & (largest > SHARP_WEIGHT))
        if not bad.size:
            continue
        first = bad[0]
        evidence = {
            "logit_deviation": float(deviation[first]),
            "largest_fraction": float(largest[first]),
        }
        place = _activation_place(e, activation, _first_row(activation, bad))
        index = place["index"]
        weights = weight_scale(e, e.layers[index]) if index >= 0 else None
        large = weights is not None and weights > 2
        cause = "weights_too_large" if large else "attention_scale"
        limit = float(threshold[first])
        return [Finding("attention_logit_growth", place, cause, evidence, limit)]
    return []


def ill_conditioned_jacobian(e: Evidence) -> list[Finding]:
    """A layer whose weights pass fewer than a quarter of the directions that they could."""
    work = sum(min(fan_in, fan_out) ** 3 for x in e.layers for _, fan_in, fan_out in x.kernels)
    # a very deep network has only every second, third, ... layer decomposed
    for i in range(0, e.hidden, 1 + int(work / SVD_WORK)):
        layer = e.layers[i]
        if layer.skip:
            continue
        for leaves, fan_in, fan_out in layer.kernels:
            if len(leaves) != 1:
                continue
            w = _own_weights(e, layer, *leaves)
            if not _is_decomposed(w, fan_in * fan_out):
                continue
            values = np.linalg.svd(w.astype(np.float64), compute_uv=False)
            quarter = values[len(values) // 4]
            if values[0] > 0 and quarter < values[0] * math.exp(-GROWTH_NATS):
                condition = float(np.log(values[0] / max(quarter, 1e-300)))
                evidence = {"log_condition_of_a_quarter": condition}
                place = layer_place(e, i)
                return [Finding("ill_conditioned_jacobian", place, "low_rank_weights", evidence)]
    return []


def _is_decomposed(w: np.ndarray, size: int) -> bool:
    """Whether weights are a matrix of that size, neither tiny nor huge, of finite entries."""
    if w.size != size or w.ndim != 2 or min(w.shape) < 4 or w.size > SVD_SIZE:
        return False
    return bool(np.isfinite(w.astype(np.float64)).all())


def shattered_gradients(e: Evidence) -> list[Finding]:
    """A gradient that an invisible change of the input turns around: white noise, from which
    nothing is learned.
    """
    measured = e.shattering()
    if measured is None or measured[0] > SHATTERED_COSINE:
        return []
    cosine, change = measured
    # features that oscillate already differ in the second layer
    cause = "frequency" if change > 0.3 else "normalized_chaos"
    place = where("layer", 0, e.layers[0].name if e.layers else "input")
    evidence = {"cosine": cosine, "change_of_second_layer": change}
    return [Finding("shattered_gradients", place, cause, evidence)]
