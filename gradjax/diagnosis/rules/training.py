"""Rules of training: the optimiser's state, the step against the curvature, spikes, thresholds of
clipping.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradjax.diagnosis.rules.finding import Finding, where


@dataclass(frozen=True)
class Dynamics:
    """What was seen of training: from `num_steps` steps on the given data, or from a history."""

    losses: np.ndarray  # (steps,) in order
    telemetry: dict[str, np.ndarray]  # of the optimiser after the last step
    opt_bad: tuple[str, ...] = ()  # leaves of the optimiser's state that hold inf or NaN
    largest_update: float | None = None  # of any entry in any of the steps
    log_norms: np.ndarray | None = None  # (steps,) of the gradients
    max_norms: tuple[float, ...] = ()  # thresholds of Optax's clip_by_global_norm in the optimiser
    half: bool = False  # parameters in float16
    sharpness: float | None = None
    learning_rate: float | None = None
    from_history: bool = False


def frozen_optimizer(d: Dynamics) -> list[Finding]:
    """An optimiser state that overflowed: its entries never move again."""
    moves = d.largest_update is None or d.largest_update > 1e-12 or not np.isfinite(d.losses).all()
    if not d.opt_bad and not moves and d.log_norms is not None and d.log_norms.max() > -np.inf:
        evidence = {"largest_update": d.largest_update, "steps": len(d.losses) - 1}
        source = "no entry of an update above 1e-12 in any step, though the gradient is not zero"
        place = where("leaf", 0, "every parameter")
        return [Finding("frozen_optimizer", place, "optimizer_state", evidence, 1e-12, source)]
    if not d.opt_bad:
        return []
    evidence = {"leaves": list(d.opt_bad)}
    place = where("leaf", 0, d.opt_bad[0])
    return [
        Finding(
            "frozen_optimizer",
            place,
            "optimizer_state",
            evidence,
            math.inf,
            "inf or NaN in the state",
        )
    ]


SHARPNESS_MARGIN = 1.2


def unstable_step_size(d: Dynamics) -> list[Finding]:
    """Learning rate against curvature, or a loss that rises on one and the same batch."""
    evidence: dict[str, Any] = {}
    if d.sharpness is not None and d.learning_rate:
        ratio = d.sharpness * d.learning_rate / 2
        evidence = {
            "sharpness": d.sharpness,
            "learning_rate": d.learning_rate,
            "sharpness_over_2_lr": ratio,
        }
        if ratio > SHARPNESS_MARGIN:
            source = "sharpness above 1.2 * 2/learning_rate, the edge of stability (Cohen et al. 2021, arXiv 2103.00065)"
            return [
                Finding(
                    "unstable_step_size",
                    where("run", 0, "loss"),
                    "learning_rate",
                    evidence,
                    SHARPNESS_MARGIN,
                    source,
                )
            ]
    if len(d.losses) > 2 and not d.from_history:
        first, last = float(d.losses[0]), float(d.losses[-1])
        highest = float(np.max(d.losses))  # NaN where one is
        grown = (
            not math.isfinite(highest)
            or last > 2 * abs(first) + 1e-3
            or highest > 10 * abs(first) + 1e-3
        )
        if d.half and not math.isfinite(highest):
            source = "a loss that becomes inf or NaN in training with float16, whose smallest number is 6e-8"
            place = where("step", int(np.argmax(~np.isfinite(d.losses))), "loss")
            return [Finding("non_finite", place, "float_range", evidence, math.inf, source)]
        if math.isfinite(first) and grown:
            source = f"the loss of one batch more than doubles in {len(d.losses) - 1} steps on it, or rises tenfold within"
            evidence |= {"loss_first": first, "loss_last": last, "loss_highest": highest}
            return [
                Finding(
                    "unstable_step_size",
                    where("run", 0, "loss"),
                    "learning_rate",
                    evidence,
                    2.0,
                    source,
                )
            ]
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
    return [
        Finding(
            "loss_spikes", where("step", starts[0], "loss"), "learning_rate", evidence, 6.0, source
        )
    ]


def clipping(d: Dynamics) -> list[Finding]:
    """A threshold that clips every step, or none."""
    out = []
    if d.log_norms is not None and len(d.log_norms) >= 10 and np.isfinite(d.log_norms).all():
        for limit in d.max_norms:
            fraction = float(np.mean(d.log_norms > math.log(max(limit, 1e-300))))
            evidence = {"clip_fraction": fraction, "steps": len(d.log_norms), "max_norm": limit}
            evidence |= {"log2_norm": float(np.median(d.log_norms)) / math.log(2)}
            out += _clipped("clip_by_global_norm", fraction, evidence)
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
        out += _clipped(rule, float(value), evidence)
    return out


def _clipped(rule: str, fraction: float, evidence: dict[str, Any]) -> list[Finding]:
    place = where("rule", 0, rule)
    if fraction >= 0.99:
        source = "every step clipped: the threshold sets the step, not the gradient"
        return [Finding("clipping_always", place, "clipping_threshold", evidence, 0.99, source)]
    if fraction == 0.0:
        source = "no step clipped: the threshold does nothing"
        return [Finding("clipping_never", place, "clipping_threshold", evidence, 0.0, source)]
    return []
