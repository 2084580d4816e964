"""Rules of training: the optimiser's state, the step against the curvature, spikes of the loss,
thresholds of clipping.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gradjax.diagnosis.clipped import Clip
from gradjax.diagnosis.rules.finding import Finding, of_culprit, where
from gradjax.replay.nonfinite import NonFinite

SMALLEST_UPDATE = 1e-12
SHARPNESS_MARGIN = 1.2
SPIKE_WINDOW = 16  # losses that a spike is compared with
SPIKE_DEVIATIONS = 6.0
ALWAYS_CLIPPED = 0.99
FEWEST_STEPS = 10  # of a clip fraction that is judged
ONE_LEAF = 0.9  # of the squares in a global norm


@dataclass(frozen=True)
class Dynamics:
    """What was seen of training: from `num_steps` steps on the given data, or from a history.

    Attributes:
      losses: (steps,) in order.
      telemetry: of the optimiser after the last step.
      clipping: `<position>.<rule>` of the rules that clip, as the keys of `telemetry` begin.
      opt_bad: leaves of the optimiser's state that hold inf or NaN.
      largest_update: the largest absolute entry of an update in any of the steps.
      log_norms: (steps,) log norms of the gradients.
      at_rest: key paths of the parameters that no step moved.
      clips: what Optax's clipping rules in the optimiser were given in each step.
      half: whether parameters are in float16.
      sharpness: the largest eigenvalue of the loss's Hessian.
      learning_rate: of plain gradient descent.
      bad_update: the first step whose update is not finite although its gradient is, and why.
      from_history: whether `losses` are the user's history, over many batches.
    """

    losses: np.ndarray
    telemetry: dict[str, np.ndarray]
    opt_bad: tuple[str, ...] = ()
    largest_update: float | None = None
    log_norms: np.ndarray | None = None
    clips: tuple[Clip, ...] = ()
    at_rest: tuple[str, ...] = ()
    half: bool = False
    sharpness: float | None = None
    learning_rate: float | None = None
    from_history: bool = False
    clipping: tuple[str, ...] = ()
    bad_update: tuple[int, NonFinite] | None = None


def bad_update(d: Dynamics) -> list[Finding]:
    """An update that is not finite although the gradient is: the optimiser makes it so."""
    if d.bad_update is None:
        return []
    step, culprit = d.bad_update
    evidence = {"step": step} | of_culprit(culprit)
    place = where("leaf", 0, culprit.name)
    return [Finding("non_finite", place, culprit.reason, evidence, remedies=culprit.remedies)]


def frozen_optimizer(d: Dynamics) -> list[Finding]:
    """An optimiser state that overflowed: its entries never move again."""
    if d.bad_update is not None:
        return []
    if d.opt_bad:
        evidence = {"leaves": list(d.opt_bad)}
        place = where("leaf", 0, d.opt_bad[0])
        source = "inf or NaN in the state"
        return [Finding("frozen_optimizer", place, "optimizer_state", evidence, math.inf, source)]
    if d.largest_update is None or d.log_norms is None or not np.isfinite(d.losses).all():
        return []
    has_gradient = d.log_norms.max() > -np.inf
    if d.largest_update > SMALLEST_UPDATE or not has_gradient:
        return []
    evidence = {"largest_update": d.largest_update, "steps": len(d.losses) - 1}
    source = "no entry of an update above 1e-12 in any step, though the gradient is not zero"
    place = where("leaf", 0, "every parameter")
    return [
        Finding("frozen_optimizer", place, "optimizer_state", evidence, SMALLEST_UPDATE, source)
    ]


def unstable_step_size(d: Dynamics) -> list[Finding]:
    """The learning rate against the curvature, or a loss that rises on one and the same batch."""
    evidence: dict[str, Any] = {}
    if d.sharpness is not None and d.learning_rate:
        ratio = d.sharpness * d.learning_rate / 2
        evidence = {
            "sharpness": d.sharpness,
            "learning_rate": d.learning_rate,
            "sharpness_over_2_lr": ratio,
        }
        if ratio > SHARPNESS_MARGIN:
            source = (
                "sharpness above 1.2 * 2/learning_rate, the edge of stability "
                "(Cohen et al. 2021, arXiv 2103.00065)"
            )
            return [_too_long(evidence, SHARPNESS_MARGIN, source)]
    if len(d.losses) > 2 and not d.from_history and d.bad_update is None:
        return _rising_loss(d, evidence)
    return []


def _too_long(evidence: dict[str, Any], threshold: float, source: str) -> Finding:
    place = where("run", 0, "loss")
    return Finding("unstable_step_size", place, "learning_rate", evidence, threshold, source)


def _rising_loss(d: Dynamics, evidence: dict[str, Any]) -> list[Finding]:
    """The finding for a loss that grows in steps on one batch."""
    # `highest` is NaN where a loss is
    first, last, highest = float(d.losses[0]), float(d.losses[-1]), float(np.max(d.losses))
    if d.half and not math.isfinite(highest):
        source = (
            "a loss that becomes inf or NaN in training with float16, whose smallest number is 6e-8"
        )
        step = int(np.argmax(~np.isfinite(d.losses)))
        words = f"it leaves the range of float16 at step {step} of training on one batch"
        evidence |= {"reached": "the loss", "words": words}
        place = where("step", step, "loss")
        return [Finding("non_finite", place, "float_range", evidence, source=source)]
    doubled, tenfold = last > 2 * abs(first) + 1e-3, highest > 10 * abs(first) + 1e-3
    if not math.isfinite(first) or not (doubled or tenfold or not math.isfinite(highest)):
        return []
    source = (
        f"the loss of one batch more than doubles in {len(d.losses) - 1} steps on it, "
        "or rises tenfold within"
    )
    losses = {"loss_first": first, "loss_last": last, "loss_highest": highest}
    return [_too_long(evidence | losses, 2.0, source)]


def loss_spikes(d: Dynamics) -> list[Finding]:
    """Losses that jump out of their recent history."""
    losses = d.losses[np.isfinite(d.losses)]
    if not d.from_history or len(losses) < SPIKE_WINDOW:
        return []
    spikes = []
    for i in range(SPIKE_WINDOW, len(losses)):
        past = losses[i - SPIKE_WINDOW : i]
        middle = np.median(past)
        # 1.4826 medians of the absolute deviation are one standard deviation of a normal law
        deviation = 1.4826 * np.median(np.abs(past - middle))
        noise = max(SPIKE_DEVIATIONS * deviation, 0.5 * abs(middle))
        if losses[i] > middle + noise and losses[i] > past.max():
            spikes.append(i)
    starts = [i for i in spikes if i - 1 not in spikes]
    if not starts:
        return []
    evidence = {
        "spikes": len(starts),
        "first_step": starts[0],
        "largest_factor": float(losses[starts].max() / np.median(losses)),
    }
    return [Finding("loss_spikes", where("step", starts[0], "loss"), "learning_rate", evidence)]


def clipping(d: Dynamics) -> list[Finding]:
    """A threshold that clips every step, or none."""
    out = []
    for clip in d.clips:
        if len(clip.log_limit) >= FEWEST_STEPS and np.isfinite(clip.log_size).any():
            out += _of_optax(clip, d.at_rest)
    for rule in d.clipping:
        fractions = _field(d.telemetry, rule, "clip_fraction")
        steps = float(d.telemetry.get(f"{rule}/count", 0))
        if steps < FEWEST_STEPS or not fractions.size:
            continue
        lowest, highest = float(fractions.min()), float(fractions.max())
        log2_norm = float(np.max(_field(d.telemetry, rule, "log2_norm"), initial=-np.inf))
        evidence = {"clip_fraction": lowest, "steps": steps, "log2_norm": log2_norm}
        out += _clipped(rule, lowest, highest, evidence)
    return out


def _of_optax(clip: Clip, at_rest: tuple[str, ...]) -> list[Finding]:
    """The finding for a rule of Optax, by what it was given."""
    fractions = np.mean(clip.log_size > clip.log_limit[:, None], axis=0)
    lowest, highest = float(fractions.min()), float(fractions.max())
    evidence = {
        "clip_fraction": lowest,
        "steps": len(clip.log_limit),
        "max_norm": float(np.exp(np.median(clip.log_limit))),
        "log2_norm": float(np.median(clip.log_size)) / math.log(2),
    }
    found = _clipped(clip.rule, lowest, highest, evidence)
    with np.errstate(invalid="ignore"):
        squares = np.exp(2 * (clip.log_norms - np.max(clip.log_norms, 1, keepdims=True)))
    parts = np.median(squares / squares.sum(1, keepdims=True), axis=0)
    largest = int(np.argmax(parts))
    is_global = clip.log_size.shape[1] == 1 and len(clip.leaves) > 1
    if not found or lowest < ALWAYS_CLIPPED or not is_global or not parts[largest] > ONE_LEAF:
        return found
    evidence |= {"leaf": clip.leaves[largest], "leaf_fraction": float(parts[largest])}
    cause = "frozen_leaf" if evidence["leaf"] in at_rest else found[0].cause
    return [replace(found[0], cause=cause, evidence=evidence)]


def _field(telemetry: dict[str, np.ndarray], rule: str, field: str) -> np.ndarray:
    """The numbers of one field of a rule: one, or one per leaf, and per layer of a stacked leaf."""
    key = f"{rule}/{field}"
    found = [x for name, x in telemetry.items() if name == key or name.startswith(f"{key}/")]
    return np.concatenate([np.ravel(np.asarray(x, float)) for x in found] or [np.zeros(0)])


def _clipped(rule: str, lowest: float, highest: float, evidence: dict[str, Any]) -> list[Finding]:
    """The finding for a rule by the clip fractions of its leaves: it clips all of them in every
    step, or none in any.
    """
    place = where("rule", 0, rule)
    if lowest >= ALWAYS_CLIPPED:
        return [Finding("clipping_always", place, "clipping_threshold", evidence)]
    if highest == 0.0:
        return [Finding("clipping_never", place, "clipping_threshold", evidence)]
    return []
