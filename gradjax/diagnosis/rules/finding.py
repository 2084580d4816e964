"""What the rules of a diagnosis share: findings, where they start, remedies in causal order, and
growth in nats.

The main rule. G is the change of C = log rms dL/dh from the last hidden layer to the first (or from
the last step of a recurrence to the first). A critical network of finite width does not have G = 0:
for layers of widths n_l

    log ||J u||^2  ~  N(-beta/2, beta),   beta = 5 sum_l 1 / n_l        (ReLU; Hanin & Nica 2018, arXiv 1812.05994)

so G is exploding (vanishing) when G > 6 (G < -6), a factor of 400, *and* lies more than three
standard deviations, 3 sqrt(beta)/2, above (below) the critical mean -beta/4. Smoother activations
fluctuate less: the rule errs towards healthy. Where layers differ in size, norm and rms must agree:
G is the smaller change of the two.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradjax.diagnosis.evidence import Evidence

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
    "residual_growth": ("residual_scaled", "rezero", "layernorm"),
    "batchnorm_explosion": ("residual", "layernorm", "shallower_network"),
    "exploding_gradients": ("critical_init", "orthogonal_init", "layernorm", "clip_by_global_norm"),
    "exploding_activations": ("critical_init", "layernorm", "residual_scaled"),
    "attention_logit_growth": ("qk_norm", "scale_logits", "lower_learning_rate"),
    "saturated_units": ("critical_init", "normalize_inputs", "relu", "batchnorm"),
    "dead_units": ("lower_learning_rate", "leaky_relu", "zero_biases", "he_init"),
    "rank_collapse": ("residual", "critical_init"),
    "ill_conditioned_jacobian": ("orthogonal_init", "residual"),
    "vanishing_gradients": ("critical_init", "orthogonal_init", "residual", "layernorm"),
    "vanishing_activations": ("critical_init", "layernorm"),
    "shattered_gradients": ("residual", "critical_init", "lower_input_frequency"),
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
    """One pathology: what, where it starts, why, by which numbers, against which threshold, and
    what to try.
    """

    pathology: str
    where: dict[
        str, Any
    ]  # {"kind": "layer" | "step" | "leaf" | "argument", "index": 0-based, "name"}
    cause: str
    evidence: dict[str, Any]  # natural logarithms unless the name says otherwise
    threshold: float
    source: str
    remedies: tuple[str, ...] = ()


def where(kind: str, index: int, name: str) -> dict[str, Any]:
    """Where a finding starts."""
    return {"kind": kind, "index": int(index), "name": name}


def layer_place(e: Evidence, index: int) -> dict[str, Any]:
    """Where a finding starts that starts at a layer of the chain, or at a step of an unrolled
    recurrence.
    """
    kind = "step" if over_time(e) else "layer"
    return where(kind, index, e.layers[index].name)


def over_time(e: Evidence) -> bool:
    """Whether the layers are the steps of an unrolled recurrence: the same weights again and
    again.
    """
    plain = [layer for layer in e.layers if layer.kernels and layer.row is None]
    kernels = [
        frozenset().union(*(k[0] for k in layer.kernels)) - e.structure.sliced for layer in plain
    ]
    kernels = [k for k in kernels if k]
    return len(kernels) > 2 and len(set(kernels)) <= len(kernels) // 2


def row_of(x: Any, row: int | None) -> float:
    """One row of a statistic, or the statistic of a value outside of scans."""
    return float(np.asarray(x) if row is None else np.asarray(x)[row])


def maximal_run(growth: np.ndarray) -> tuple[int, int]:
    """The run [first, last] of `growth` with the largest sum (Kadane's algorithm); ties go to the
    earliest.

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
    """The change from the last entry to the first; the smaller one of rms and norm where the sizes
    differ.
    """
    with np.errstate(invalid="ignore"):
        rms = float(log_rms[0] - log_rms[-1])
        norm = rms + 0.5 * math.log(size[0] / size[-1])
    smaller = min(rms, norm, key=abs)
    nats = smaller if rms * norm > 0 or math.isinf(rms) else 0.0
    beta = 5.0 * sum(1.0 / max(n, 1) for n in fan_in)
    return Growth(nats, -beta / 4, math.sqrt(beta) / 2)


def hidden(e: Evidence) -> slice:
    """The hidden layers."""
    return slice(0, e.hidden)


def fans(e: Evidence) -> list[int]:
    """Units of the hidden layers after the first, those without weights left out."""
    return [layer.fan_in for layer in e.layers[1 : e.hidden] if layer.fan_in > 1]


def depth_growth(e: Evidence) -> Growth | None:
    """G over the hidden layers; None where it cannot be told."""
    c = e.log_cotangent[hidden(e)]
    if len(c) < 2 or np.isnan(c).any() or c[-1] == -np.inf:
        return None
    return growth(c, e.size[hidden(e)], fans(e))


def fraction_of(layers: Sequence, test: Callable) -> float:
    """The share of the layers with weights that pass a test."""
    weighing = [layer for layer in layers if layer.weighs]
    return sum(map(test, weighing)) / max(len(weighing), 1)


def weight_scale(e: Evidence, layer: Any) -> float | None:
    """rms of a layer's largest kernel times sqrt(fan_in): 1 for LeCun's initialisation."""
    best = None
    for leaves, fan_in, _ in layer.kernels:
        for leaf in leaves:
            if len(e.leaf_shapes[leaf]) > 1:
                log_rms = np.asarray(e.leaf_log_rms[leaf])
                value = float(
                    log_rms[layer.row]
                    if log_rms.ndim and layer.row is not None
                    else np.max(log_rms)
                )
                scale = math.exp(min(value, 300.0)) * math.sqrt(fan_in)
                best = scale if best is None else max(best, scale)
    return best
