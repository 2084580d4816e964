"""The main rule: is a change of log rms over the layers more than a healthy network may show?

G is the change of C = log rms dL/dh from the last hidden layer to the first (or from the last step
of a recurrence to the first). A critical network of finite width does not have G = 0: for layers of
widths n_l

    log ||J u||^2  ~  N(-beta/2, beta),   beta = 5 sum_l 1 / n_l       (ReLU; Hanin & Nica 2018,
                                                                        arXiv 1812.05994)

so G is exploding (vanishing) when G > 6 (G < -6), a factor of 400, *and* lies more than three
standard deviations, 3 sqrt(beta)/2, above (below) the critical mean -beta/4. Smoother activations
fluctuate less: the rule errs towards healthy. Where layers differ in size, norm and rms must agree:
G is the smaller change of the two.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

GROWTH_NATS = 6.0
STANDARD_DEVIATIONS = 3.0
SOURCE = (
    "design rule |G| > 6 nats (a factor of 400), beyond 3 standard deviations of the finite-width "
    "fluctuation log||Ju||^2 ~ N(-beta/2, beta), beta = 5 sum 1/n "
    "(Hanin & Nica 2018, arXiv 1812.05994)"
)


@dataclass(frozen=True)
class Growth:
    """A change in nats beside the mean and the standard deviation of a critical network's."""

    nats: float
    mean: float
    deviation: float

    @property
    def threshold(self) -> float:
        """The bound that the change must pass, of the sign of the change."""
        if self.nats > 0:
            return max(GROWTH_NATS, self.mean + STANDARD_DEVIATIONS * self.deviation)
        return min(-GROWTH_NATS, self.mean - STANDARD_DEVIATIONS * self.deviation)

    @property
    def passes_threshold(self) -> bool:
        """Whether the change is exploding or vanishing."""
        return abs(self.nats) > abs(self.threshold)

    def evidence(self, steps: int) -> dict[str, Any]:
        """Its numbers, for a finding over `steps` layers."""
        with np.errstate(invalid="ignore", divide="ignore"):
            deviations = float(np.divide(self.nats - self.mean, self.deviation))
        return {
            "growth_nats": self.nats,
            "growth_nats_per_layer": self.nats / max(steps, 1),
            "standard_deviations": deviations,
        }


def measure_growth(log_rms: np.ndarray, size: np.ndarray, fan_in: Sequence[int]) -> Growth:
    """The change from the last entry to the first.

    Args:
      log_rms: (layers,) log rms per unit.
      size: (layers,) entries of each value. Where the first and the last differ, the change is the
        smaller one of rms and norm, and 0 where these two disagree on the sign.
      fan_in: units of every layer between; they make the fluctuation.
    """
    with np.errstate(invalid="ignore"):
        rms = float(log_rms[0] - log_rms[-1])
        norm = rms + 0.5 * math.log(size[0] / size[-1])
    same_sign = rms * norm > 0 or math.isinf(rms)
    nats = min(rms, norm, key=abs) if same_sign else 0.0
    beta = 5.0 * sum(1.0 / max(n, 1) for n in fan_in)
    return Growth(nats, -beta / 4, math.sqrt(beta) / 2)


def rises(values: np.ndarray, sign: float) -> np.ndarray:
    """The step from every entry to the next, times the sign; between two infinite entries 0.

    >>> rises(np.array([0.0, -2.0, -np.inf, -np.inf]), -1.0)
    array([ 2., inf,  0.])
    """
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(np.sign(sign) * np.diff(values), nan=0.0, posinf=np.inf, neginf=0.0)


def maximal_run(growth: np.ndarray) -> tuple[int, int]:
    """The run [first, last] of `growth` with the largest sum (Kadane's algorithm); ties go to the
    earliest.

    >>> maximal_run(np.array([0.1, -3.0, 2.0, 2.0, -0.5, 0.2]))
    (2, 3)
    """
    best_sum, best_first, best_last = -math.inf, 0, 0
    run_sum, run_first = 0.0, 0
    for i, value in enumerate(growth):
        if run_sum > 0:
            run_sum += float(value)
        else:
            run_sum, run_first = float(value), i
        if run_sum > best_sum:
            best_sum, best_first, best_last = run_sum, run_first, i
    return best_first, best_last


def growth_run(growth: np.ndarray) -> tuple[int, int]:
    """The run [first, last] of layers in which a growth takes place.

    It is the run of the largest sum after half the mean growth is taken off every layer, so that
    the fluctuations of healthy layers do not join the run of one layer that causes it. An infinite
    growth (a cut) is a run by itself.

    Args:
      growth: growth per layer, of positive sum, in the order in which it accumulates.
    """
    infinite = np.flatnonzero(np.isposinf(growth))
    if infinite.size:
        return int(infinite[0]), int(infinite[0])
    return maximal_run(growth - growth.mean() / 2)
