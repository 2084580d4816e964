"""The rules of a diagnosis: one function for each pathology, from evidence to findings, each with its threshold's source.

The main rule. G is the change of C = log rms dL/dh from the last hidden layer to the first (or from the last step of a
recurrence to the first). A critical network of finite width does not have G = 0: for layers of widths n_l

    log ||J u||^2  ~  N(-beta/2, beta),   beta = 5 sum_l 1 / n_l        (ReLU; Hanin & Nica 2018, arXiv 1812.05994)

so G is exploding (vanishing) when G > 6 (G < -6), a factor of 400, *and* lies more than three standard deviations,
3 sqrt(beta)/2, above (below) the critical mean -beta/4. Smoother activations fluctuate less: the rule errs towards
healthy. Where layers differ in size, norm and rms must agree: G is the smaller change of the two.

`findings` puts them in causal order: saturated units before the gradients that vanish in them. A rule that cannot be
applied says why in `not_run`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gradjax.evidence import Evidence
from gradjax.taps.statistics import FLAT

GROWTH_NATS = 6.0
STANDARD_DEVIATIONS = 3.0
SOURCE = (
    "design rule |G| > 6 nats (a factor of 400), beyond 3 standard deviations of the finite-width fluctuation "
    "log||Ju||^2 ~ N(-beta/2, beta), beta = 5 sum 1/n (Hanin & Nica 2018, arXiv 1812.05994)"
)
REMEDIES = {
    "frozen_optimizer": ("reset_optimizer_state", "skip_non_finite", "restore_moments"),
    "non_finite": ("normalize_inputs", "check_data", "skip_non_finite", "lower_learning_rate"),
    "symmetric_units": ("random_initialization",),
    "residual_growth": ("residual_scaling", "rezero", "layernorm"),
    "batchnorm_explosion": ("residual", "layernorm", "shallower_network"),
    "exploding_gradients": ("critical_initialization", "orthogonal_weights", "layernorm", "clip_by_global_norm"),
    "exploding_activations": ("critical_initialization", "layernorm", "residual_scaling"),
    "attention_logit_growth": ("qk_norm", "scale_logits", "lower_learning_rate"),
    "saturated_units": ("critical_initialization", "normalize_inputs", "relu", "batchnorm"),
    "dead_units": ("lower_learning_rate", "leaky_relu", "zero_biases", "he_initialization"),
    "rank_collapse": ("residual", "critical_initialization"),
    "ill_conditioned_jacobian": ("orthogonal_weights", "residual"),
    "vanishing_gradients": ("critical_initialization", "orthogonal_weights", "residual", "layernorm"),
    "vanishing_activations": ("critical_initialization", "layernorm"),
    "shattered_gradients": ("residual", "critical_initialization", "lower_input_frequency"),
    "untrained_layer": ("use_the_layer", "remove_stop_gradient"),
    "norm_overflow": ("clip_by_global_norm", "loss_scaling"),
    "unstable_step_size": ("lower_learning_rate", "warmup", "clip_by_global_norm"),
    "loss_spikes": ("skip_spikes", "zclip", "lower_learning_rate"),
    "clipping_always": ("raise_max_norm", "autoclip"),
    "clipping_never": ("lower_max_norm", "autoclip"),
}
CAUSAL = tuple(REMEDIES)  # the order of the findings


@dataclass(frozen=True)
class Finding:
    """One pathology: what, where it starts, why, by which numbers, against which threshold, and what to try."""

    pathology: str
    where: dict[str, Any]  # {"kind": "layer" | "step" | "leaf" | "argument", "index": 0-based, "name"}
    cause: str
    evidence: dict[str, Any]  # natural logarithms unless the name says otherwise
    threshold: float
    source: str
    remedies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dynamics:
    """What was seen of training: from `num_steps` steps on the given data, or from a history."""

    losses: np.ndarray  # (steps,) in order
    telemetry: dict[str, np.ndarray]  # of the optimiser after the last step
    opt_bad: tuple[str, ...] = ()  # leaves of the optimiser's state that hold inf or NaN
    sharpness: float | None = None
    learning_rate: float | None = None
    from_history: bool = False


def where(kind: str, index: int, name: str) -> dict[str, Any]:
    """Where a finding starts."""
    return {"kind": kind, "index": int(index), "name": name}


def _layer(e: Evidence, index: int) -> dict[str, Any]:
    kind = "step" if _over_time(e) else "layer"
    return where(kind, index, e.layers[index].name)


def _over_time(e: Evidence) -> bool:
    """Whether the layers are the steps of an unrolled recurrence: the same weights again and again."""
    plain = [layer for layer in e.layers if layer.kernels and layer.row is None]
    kernels = [frozenset().union(*(k[0] for k in layer.kernels)) - e.structure.sliced for layer in plain]
    kernels = [k for k in kernels if k]
    return len(kernels) > 2 and len(set(kernels)) <= len(kernels) // 2


# -- non-finite ------------------------------------------------------------------------------------------


def _row(x: Any, row: int | None) -> float:
    return float(np.asarray(x) if row is None else np.asarray(x)[row])


def non_finite(e: Evidence) -> list[Finding]:
    """The first value that is inf or NaN, and what made it."""
    make = lambda where, cause, **evidence: [
        Finding("non_finite", where, cause, {"loss": e.loss} | evidence, math.inf, "a value that is inf or NaN")
    ]
    if e.arg_bad:
        return make(where("argument", 0, e.arg_bad[0]), "bad_data", arguments=e.arg_bad)
    if any(e.leaf_bad):
        first = e.leaf_bad.index(True)
        return make(where("leaf", first, e.leaf_names[first]), "bad_parameter")
    before = -math.inf
    for name, row in e.order:
        seen = e.values[name]
        if _row(seen.bad, row) > 0:
            return _first_bad(e, name, row, before)
        before = _row(seen.log_max, row)
    if not math.isfinite(e.loss):
        return make(where("layer", len(e.layers), "loss"), "invalid_operation", last_value=e.order[-1][0])
    bad = [i for i, c in enumerate(e.log_cotangent) if np.isnan(c) or c == np.inf]
    if bad:
        return make(_layer(e, bad[-1]), "invalid_operation", backward=True)
    return []


def _first_bad(e: Evidence, name: str, row: int | None, before: float) -> list[Finding]:
    """The value at `name` is the first that is not finite; the largest entry of the value before it is e^before."""
    index = next((i for i, x in enumerate(e.layers) if x.site.name == name and x.row == row), None)
    if index is None:  # inside a layer: the layer it belongs to
        index = next((i for i, x in enumerate(e.layers) if name.startswith(x.site.name)), 0)
    place = where("layer", index, name if row is None else f"{name}[{row}]")
    dtype = next((x.site.dtype for x in e.layers), np.float32)
    half = np.dtype(dtype).itemsize < 4 and np.dtype(dtype).name == "float16"
    limit = math.log(65504.0) if half else math.log(float(np.finfo(np.float32).max))
    evidence = {"loss": e.loss, "log_max_before": before, "first_entry": int(_row(e.values[name].first_bad, row))}
    if before > 0.4 * limit:
        cause = "float_range" if half else "weights_too_large"
        text = f"the forward pass leaves the range of {np.dtype(dtype).name}, |h| > {math.exp(limit):.3g}"
        return [Finding("exploding_activations", place, cause, evidence, limit, text)]
    return [Finding("non_finite", place, "invalid_operation", evidence, math.inf, "a value that is inf or NaN")]


def backward_overflow(e: Evidence) -> list[Finding]:
    """Cotangents that leave the range of their dtype on the way back, though nothing of the forward pass does."""
    bad = [
        i for i, x in enumerate(e.layers)
        if x.site.name in e.cotangents and _row(e.cotangents[x.site.name].bad, x.row) > 0
    ]  # fmt: skip
    gradients = [i for i, x in enumerate(e.leaf_log_gradient) if not np.all(x < np.inf)]
    if not bad and not gradients:
        return []
    place = _layer(e, bad[-1]) if bad else where("leaf", gradients[0], e.leaf_names[gradients[0]])
    source = "a cotangent or gradient that is inf or NaN where every value is finite"
    return [Finding("non_finite", place, "float_range", {"loss": e.loss, "backward": True}, math.inf, source)]


# -- growth over depth and time --------------------------------------------------------------------------


def maximal_run(growth: np.ndarray) -> tuple[int, int]:
    """The run [first, last] of `growth` with the largest sum (Kadane's algorithm); ties go to the earliest.

    >>> maximal_run(np.array([0.1, -3.0, 2.0, 2.0, -0.5, 0.2]))
    (2, 3)
    """
    best, run = (-math.inf, 0, 0), (0.0, 0)
    for i, value in enumerate(growth):
        run = (run[0] + float(value), run[1]) if run[0] > 0 else (float(value), i)
        if run[0] > best[0]:
            best = (run[0], run[1], i)
    return best[1], best[2]


def guilty_run(growth: np.ndarray) -> tuple[int, int]:
    """Where a growth per layer, of positive sum and in its own order, takes place.

    The run of the largest sum after half the mean growth is taken off every layer, so that the fluctuations of
    healthy layers do not join the run of one guilty layer. An infinite growth (a cut) is a run by itself.
    """
    infinite = np.flatnonzero(np.isposinf(growth))
    if infinite.size:
        return int(infinite[0]), int(infinite[0])
    return maximal_run(growth - growth.mean() / 2)


@dataclass(frozen=True)
class Growth:
    """A change in nats against what a critical network of this size may show."""

    nats: float
    mean: float
    deviation: float

    @property
    def threshold(self) -> float:
        """The bound that the change must pass, on its own side."""
        edge = self.mean + math.copysign(STANDARD_DEVIATIONS * self.deviation, self.nats)
        return max(GROWTH_NATS, edge) if self.nats > 0 else min(-GROWTH_NATS, edge)

    @property
    def sick(self) -> bool:
        """Whether it passes."""
        return abs(self.nats) > abs(self.threshold)

    def evidence(self, steps: int) -> dict[str, Any]:
        """Its numbers."""
        with np.errstate(invalid="ignore", divide="ignore"):
            deviations = float(np.divide(self.nats - self.mean, self.deviation))
        return {
            "growth_nats": self.nats, "growth_nats_per_layer": self.nats / max(steps, 1),
            "standard_deviations": deviations,
        }  # fmt: skip


def growth(log_rms: np.ndarray, size: np.ndarray, fan_in: Sequence[int]) -> Growth:
    """The change from the last entry to the first; the smaller one of rms and norm where the sizes differ."""
    with np.errstate(invalid="ignore"):
        rms = float(log_rms[0] - log_rms[-1])
        norm = rms + 0.5 * math.log(size[0] / size[-1])
    smaller = min(rms, norm, key=abs)
    nats = smaller if rms * norm > 0 or math.isinf(rms) else 0.0
    beta = 5.0 * sum(1.0 / max(n, 1) for n in fan_in)
    return Growth(nats, -beta / 4, math.sqrt(beta) / 2)


def _hidden(e: Evidence) -> slice:
    return slice(0, e.hidden)


def _fans(e: Evidence) -> list[int]:
    """Units of the hidden layers after the first, those without weights left out."""
    return [layer.fan_in for layer in e.layers[1 : e.hidden] if layer.fan_in > 1]


def depth_growth(e: Evidence) -> Growth | None:
    """G over the hidden layers; None where it cannot be told."""
    c = e.log_cotangent[_hidden(e)]
    if len(c) < 2 or np.isnan(c).any() or c[-1] == -np.inf:
        return None
    return growth(c, e.size[_hidden(e)], _fans(e))


def gradient_growth(e: Evidence) -> list[Finding]:
    """The main rule, over depth."""
    found = depth_growth(e)
    if found is None or not found.sick:
        return []
    c, a = e.log_cotangent[_hidden(e)], e.log_activation[_hidden(e)]
    with np.errstate(invalid="ignore"):  # behind a cut every cotangent is -inf
        backward = np.nan_to_num(np.sign(found.nats) * (c[:-1] - c[1:])[::-1], nan=0.0, posinf=np.inf, neginf=0.0)
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
    return [Finding(pathology, _layer(e, steps - first), cause, evidence, found.threshold, SOURCE)]


def _share(layers: Sequence, test: Callable) -> float:
    weighing = [layer for layer in layers if layer.weighs]
    return sum(map(test, weighing)) / max(len(weighing), 1)


def _why_exploding(e: Evidence, run: slice) -> str:
    layers, a = e.layers[run], e.log_activation[run]
    per_layer = (a[-1] - a[0]) / max(len(a) - 1, 1)
    if _share(layers, lambda x: x.norm == "batch") > 0.5 and per_layer < 0.5:
        return "batchnorm"
    if _share(layers, lambda x: x.skip) > 0.5 and not _share(layers, lambda x: bool(x.norm)):
        return "unscaled_residual"
    if _share(layers, lambda x: x.norm == "layer") > 0.5:
        return "normalized_chaos"
    return "weights_too_large"


def _why_vanishing(e: Evidence, run: slice) -> str:
    layers = e.layers[run]
    if _share(layers, lambda x: x.post_norm) > 0.5:
        return "layernorm_placement"
    slopes = [a for a, _ in e.activations if a.site.kind == "logistic" and a.on_chain]
    weights = [w for layer in layers for w in [weight_scale(e, layer)] if w is not None]
    if slopes and weights and float(np.median(weights)) > 0.4:
        return "activation_slope"
    return "weights_too_small"


def weight_scale(e: Evidence, layer: Any) -> float | None:
    """rms of a layer's largest kernel times sqrt(fan_in): 1 for LeCun's initialisation."""
    best = None
    for leaves, fan_in, _ in layer.kernels:
        for leaf in leaves:
            if len(e.leaf_shapes[leaf]) > 1:
                log_rms = np.asarray(e.leaf_log_rms[leaf])
                value = float(log_rms[layer.row] if log_rms.ndim and layer.row is not None else np.max(log_rms))
                scale = math.exp(min(value, 300.0)) * math.sqrt(fan_in)
                best = scale if best is None else max(best, scale)
    return best


def time_growth(e: Evidence) -> list[Finding]:
    """The main rule, over the steps of every recurrence."""
    out = []
    for recurrence, state, back in e.recurrences:
        alive = np.flatnonzero(back > -np.inf)
        if np.isnan(back).any() or np.isposinf(back).any() or not alive.size or alive[-1] < 1:
            continue
        c = back[: alive[-1] + 1]
        steps = len(c) - 1
        found = growth(c, np.ones(len(c)), [recurrence.fan_in] * steps)
        if not found.sick:
            continue
        with np.errstate(invalid="ignore"):
            rises = np.nan_to_num(np.sign(found.nats) * (c[:-1] - c[1:])[::-1], nan=0.0, posinf=np.inf, neginf=0.0)
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
    biases = [float(np.max(e.leaf_log_rms[i])) for i in recurrence.leaves if len(e.leaf_shapes[i]) == 1]
    closed = any(a.gates for a in inside) and max(biases, default=-math.inf) > 0.0  # rms above 1: gates shut
    return "bias" if closed else "weights_too_small"


def activation_growth(e: Evidence) -> list[Finding]:
    """Growth of the forward pass: along skips without normalisation, or through the layers themselves."""
    a = e.log_activation[_hidden(e)]
    if len(a) < 3 or not np.isfinite(a[0]) or np.isnan(a).any() or np.isposinf(a).any():
        return []
    layers = e.layers[1 : e.hidden]
    found = growth(a[::-1], e.size[_hidden(e)][::-1], _fans(e))
    if not found.sick:
        return []
    rises = np.nan_to_num(np.sign(found.nats) * np.diff(a), nan=0.0, posinf=np.inf, neginf=0.0)
    first, _ = guilty_run(rises)
    evidence = found.evidence(len(a) - 1)
    skips = _share(layers, lambda x: x.skip) > 0.5 and _share(layers, lambda x: bool(x.norm)) < 0.5
    if found.nats > 0 and skips:
        name, cause = "residual_growth", "unscaled_residual"
    else:
        name = "exploding_activations" if found.nats > 0 else "vanishing_activations"
        cause = "weights_too_large" if found.nats > 0 else "weights_too_small"
    return [Finding(name, _layer(e, first + 1), cause, evidence, found.threshold, SOURCE)]


# -- units -----------------------------------------------------------------------------------------------


def _rows(x: Any) -> np.ndarray:
    return np.atleast_1d(np.asarray(x, float))


def _index_of(e: Evidence, name: str, row: int | None) -> int:
    """The layer that a value belongs to."""
    for i, layer in enumerate(e.layers):
        if layer.row == row and (layer.site.name == name or name.startswith((layer.site.name + "/", layer.name + "."))):
            return i
    return -1


def _activation_place(e: Evidence, activation: Any, row: int | None) -> dict[str, Any]:
    index = _index_of(e, activation.layer, row)
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
        share = _rows(seen)
        units = activation.site.shape[-1] if activation.site.shape else 1
        threshold = max(DEAD_SHARE, min(0.5 + STANDARD_DEVIATIONS * math.sqrt(0.25 / units), 0.99))
        bad = np.flatnonzero(share > threshold)
        if bad.size:
            row = int(bad[0]) if activation.site.lead else None
            evidence = {"dead_share": float(share[bad[0]]), "layers_affected": int(bad.size)}
            place = _activation_place(e, activation, row)
            return [Finding("dead_units", place, "bias", evidence, threshold, source)]
    return []


SATURATED_SHARE = 0.5


def saturated_units(e: Evidence) -> list[Finding]:
    """tanh, sigmoid and their like in their flat part, where every path through the layer meets them."""
    source = (
        f"half of the units with a slope below {FLAT} of the steepest (Glorot & Bengio 2010, section 3, saturation)"
    )
    for activation, seen in e.activations:
        kind = activation.site.kind
        if kind not in ("tanh", "logistic", "erf", "hard_tanh") or not activation.on_chain or activation.gates:
            continue
        share = _rows(seen)
        bad = np.flatnonzero(share > SATURATED_SHARE)
        if bad.size:
            row = int(bad[0]) if activation.site.lead else None
            place = _activation_place(e, activation, row)
            evidence = {"saturated_share": float(share[bad[0]]), "activation": kind}
            cause = _why_saturated(e, place["index"])
            return [Finding("saturated_units", place, cause, evidence, SATURATED_SHARE, source)]
    return []


def _why_saturated(e: Evidence, index: int) -> str:
    if index < 0:
        return "weights_too_large"
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
        if zero or e.units[i] < 1e-9:
            evidence = {"units_variance_share": float(e.units[i])}
            source = "variance over units below 1e-9 of the mean square: rounding alone; equal units stay equal"
            return [Finding("symmetric_units", _layer(e, i), "identical_init", evidence, 1e-9, source)]
    return []


def rank_collapse(e: Evidence) -> list[Finding]:
    """All examples, or all positions of an example, become one point."""
    attention = any(a.site.kind == "softmax" for a, _ in e.activations)
    # ReLU at He's initialisation, the slowest healthy law of examples: 1 - c_L = (9 pi^2 / 2) / L^2
    law = min(1e-3, 0.05 * 4.5 * math.pi**2 / max(e.hidden, 1) ** 2)
    for of, share, threshold in (("tokens", e.tokens, 1e-3), ("examples", e.examples, law)):
        d = share[_hidden(e)]
        if len(d) < 2 or np.isnan(d).any() or d[0] < 1e-2 or not (d < threshold).any():
            continue
        falls = -np.diff(np.log(np.maximum(d, 1e-15)))
        first, _ = guilty_run(falls)
        source = (
            "variance over examples or positions, a share of the mean square, below 1e-3 (Dong et al. 2021, arXiv "
            "2103.03404) and below a twentieth of that of a critical ReLU network, 1 - c_L = (9 pi^2/2)/L^2 (Hayou et "
            "al. 2019, arXiv 1902.06853)"
        )
        evidence = {"share": float(d[-1]), "of": of, "collapsed_at": e.layers[int(np.argmax(d < threshold))].name}
        skips = _share(e.layers[1 : e.hidden], lambda x: x.skip) > 0.5
        cause = "averaging" if attention and not skips else "weights_too_small"
        return [Finding("rank_collapse", _layer(e, first + 1), cause, evidence, threshold, source)]
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
            evidence = {"logit_deviation": float(deviation[bad[0]]), "largest_share": float(largest[bad[0]])}
            source = (
                "standard deviation of a row's logits above 2 sqrt(2 log keys), twice where a softmax of Gaussian logits "
                "freezes (Derrida 1981, random energy model); cf. Dehghani et al. 2023, arXiv 2302.05442"
            )
            place = _activation_place(e, activation, row)
            limit, weights = float(2 * threshold[bad[0]]), weight_scale(e, e.layers[place["index"]])
            cause = "weights_too_large" if weights is not None and weights > 2 else "attention_scale"
            return [Finding("attention_logit_growth", place, cause, evidence, limit, source)]
    return []


SVD_WORK = 2e9  # cubes of widths: some ten seconds of singular values


def ill_conditioned_jacobian(e: Evidence) -> list[Finding]:
    """A layer whose weights pass fewer than a quarter of the directions that they could."""
    work = sum(min(fan_in, fan_out) ** 3 for x in e.layers for _, fan_in, fan_out in x.kernels)
    for i in range(0, e.hidden, 1 + int(work / SVD_WORK)):  # of a very deep network a part of the layers
        layer = e.layers[i]
        if layer.skip or not layer.kernels:
            continue
        for leaves, fan_in, fan_out in layer.kernels:
            if len(leaves) != 1:
                continue
            (leaf,) = leaves
            w = np.asarray(e.params[leaf], np.float64)
            if layer.row is not None and np.ndim(e.leaf_log_rms[leaf]):
                w = w[layer.row]
            if (
                w.size != fan_in * fan_out
                or w.ndim != 2
                or min(w.shape) < 4
                or not np.isfinite(w).all()
                or w.size > 2**20
            ):
                continue
            values = np.linalg.svd(w, compute_uv=False)
            middle = values[len(values) // 4]
            if values[0] > 0 and middle < values[0] * math.exp(-GROWTH_NATS):
                evidence = {"log_condition_of_a_quarter": float(np.log(values[0] / max(middle, 1e-300)))}
                source = (
                    "three quarters of a layer's singular values lie more than 6 nats (a factor of 400) below the "
                    "largest; of Gaussian weights the upper quarter lies within 1 nat (Marchenko & Pastur 1967)"
                )
                place = _layer(e, i)
                return [Finding("ill_conditioned_jacobian", place, "low_rank_weights", evidence, GROWTH_NATS, source)]
    return []


SHATTERED_COSINE = 0.2


def shattered_gradients(e: Evidence) -> list[Finding]:
    """A gradient that an invisible change of the input turns around: white noise, from which nothing is learned."""
    measured = e.shattering()
    if measured is None or measured[0] > SHATTERED_COSINE:
        return []
    cosine, change = measured
    cause = "frequency" if change > 0.3 else "normalized_chaos"  # features that oscillate move at once
    first = e.layers[0].name if e.layers else "input"
    source = (
        "cosine below 0.2 between the loss's gradients at inputs 1% apart; white noise has 0, a smooth loss 1 (Balduzzi et "
        "al. 2017, arXiv 1702.08591)"
    )
    evidence = {"cosine": cosine, "change_of_second_layer": change}
    return [Finding("shattered_gradients", where("layer", 0, first), cause, evidence, SHATTERED_COSINE, source)]


def untrained_layer(e: Evidence) -> list[Finding]:
    """Parameters without a differentiable way to the loss: by structure, not by underflow."""
    dead = e.structure.untrained
    if not dead:
        return []
    evidence = {"leaves": [e.leaf_names[i] for i in dead]}
    place = where("leaf", dead[0], e.leaf_names[dead[0]])
    return [Finding("untrained_layer", place, "no_path", evidence, 0.0, "no path to the loss in the jaxpr")]


def norm_overflow(e: Evidence) -> list[Finding]:
    """Finite gradients whose squares are not: a plain norm is inf, and clipping by it gives zeros."""
    limit = 0.5 * math.log(float(np.finfo(np.float32).max))
    norms = np.array([float(np.max(x)) for x in e.leaf_log_gradient])
    if np.isnan(norms).any() or np.isposinf(norms).any() or not (norms > limit).any():
        return []
    worst = int(norms.argmax())
    evidence = {"log_norm": float(norms[worst])}
    source = "a norm above sqrt(3.4e38) = 1.8e19, whose square is inf in float32: optax.global_norm is then inf"
    return [Finding("norm_overflow", where("leaf", worst, e.leaf_names[worst]), "float_range", evidence, limit, source)]


# -- training --------------------------------------------------------------------------------------------


def frozen_optimizer(d: Dynamics) -> list[Finding]:
    """An optimiser state that overflowed: its entries never move again."""
    if not d.opt_bad:
        return []
    evidence = {"leaves": list(d.opt_bad)}
    place = where("leaf", 0, d.opt_bad[0])
    return [Finding("frozen_optimizer", place, "optimizer_state", evidence, math.inf, "inf or NaN in the state")]


SHARPNESS_MARGIN = 1.2


def unstable_step_size(d: Dynamics) -> list[Finding]:
    """Learning rate against curvature, or a loss that rises on one and the same batch."""
    evidence: dict[str, Any] = {}
    if d.sharpness is not None and d.learning_rate:
        ratio = d.sharpness * d.learning_rate / 2
        evidence = {"sharpness": d.sharpness, "learning_rate": d.learning_rate, "sharpness_over_2_lr": ratio}
        if ratio > SHARPNESS_MARGIN:
            source = (
                "sharpness above 1.2 * 2/learning_rate, the edge of stability (Cohen et al. 2021, arXiv 2103.00065)"
            )
            return [
                Finding(
                    "unstable_step_size", where("run", 0, "loss"), "learning_rate", evidence, SHARPNESS_MARGIN, source
                )
            ]
    if len(d.losses) > 2 and not d.from_history:
        first, last = float(d.losses[0]), float(d.losses[-1])
        grown = not math.isfinite(last) or last > 2 * abs(first) + 1e-3
        if math.isfinite(first) and grown:
            source = f"the loss of one batch more than doubles in {len(d.losses) - 1} steps on it"
            evidence |= {"loss_first": first, "loss_last": last}
            return [Finding("unstable_step_size", where("run", 0, "loss"), "learning_rate", evidence, 2.0, source)]
    return []


def loss_spikes(d: Dynamics) -> list[Finding]:
    """Losses that jump out of their recent history."""
    x = d.losses[np.isfinite(d.losses)]
    if not d.from_history or len(x) < 16:
        return []
    window, spikes = 16, []
    for i in range(window, len(x)):
        past = x[i - window : i]
        middle = np.median(past)
        spread = 1.4826 * np.median(np.abs(past - middle))
        noise = max(6 * spread, 0.5 * abs(middle))
        if x[i] > middle + noise and x[i] > past.max():
            spikes.append(i)
    starts = [i for i in spikes if i - 1 not in spikes]
    if not starts:
        return []
    evidence = {
        "spikes": len(starts),
        "first_step": starts[0],
        "largest_factor": float(max(x[i] for i in starts) / np.median(x)),
    }
    source = "a loss more than 6 robust standard deviations and by half above the median of the 16 before it"
    return [Finding("loss_spikes", where("step", starts[0], "loss"), "learning_rate", evidence, 6.0, source)]


def clipping(d: Dynamics) -> list[Finding]:
    """A threshold that clips every step, or none."""
    out = []
    for key, value in d.telemetry.items():
        if not key.endswith("/clip_fraction") or np.ndim(value) > 0:
            continue
        rule, count = (
            key.removesuffix("/clip_fraction"),
            float(d.telemetry.get(key.replace("clip_fraction", "count"), 0)),
        )
        if count < 10 or "clip" not in rule.split(".")[-1]:
            continue
        evidence = {"clip_fraction": float(value), "steps": count}
        evidence |= {"log2_norm": float(np.max(d.telemetry[f"{rule}/log2_norm"]))}
        place, share = where("rule", 0, rule), float(value)
        if share >= 0.99:
            source = "every step clipped: the threshold sets the step, not the gradient"
            out.append(Finding("clipping_always", place, "clipping_threshold", evidence, 0.99, source))
        elif share == 0.0:
            source = "no step clipped: the threshold does nothing"
            out.append(Finding("clipping_never", place, "clipping_threshold", evidence, 0.0, source))
    return out


# -- all of them -----------------------------------------------------------------------------------------


def findings(e: Evidence, d: Dynamics | None) -> tuple[Finding, ...]:
    """Every rule's findings in causal order."""
    broken = non_finite(e)
    found = untrained_layer(e) + broken
    if not broken:
        for rule in (
            symmetric_units, gradient_growth, time_growth, activation_growth, dead_units, saturated_units,
            rank_collapse, attention_logit_growth, ill_conditioned_jacobian, norm_overflow,
        ):  # fmt: skip
            found += rule(e)
        if not any("exploding" in f.pathology or f.pathology == "batchnorm_explosion" for f in found):
            found += backward_overflow(e)
        if not found:  # it costs a gradient more, and what was found explains it
            found += shattered_gradients(e)
    if d is not None:
        for rule in (frozen_optimizer, unstable_step_size, loss_spikes, clipping):
            found += rule(d)
    return tuple(replace(f, remedies=REMEDIES[f.pathology]) for f in in_order(found))


def in_order(found: Sequence[Finding]) -> list[Finding]:
    """Findings, most causal first."""
    order = {name: i for i, name in enumerate(CAUSAL)}
    names = {f.pathology for f in found}
    late = set()
    if "rank_collapse" in names and not any(f.cause == "averaging" for f in found):
        late |= {"rank_collapse"}  # the ordered phase: examples merge because the weights are small
    return sorted(found, key=lambda f: (f.pathology in late, order[f.pathology]))
