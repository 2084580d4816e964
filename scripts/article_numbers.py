"""What the claims of `scripts/articles.py` are made of: sizes, contestants, runs and verdicts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from reporting import Row, mean

from gradjax.experiment import config
from gradjax.experiment.schema import Experiment

FAILING = 6.0  # nats in all, the threshold of `gradjax diagnose`
CURED = 0.9  # fraction of seeds, as for `gradjax cure`
# A clipping threshold that no norm reaches: with and without clipping are one compiled program.
NO_LIMIT = 1e38
HE = 2**0.5  # sigma_w at which ReLU keeps the scale (He 2015)
# sigma_w of the exploding and of the vanishing network: 2.8 times He's, and He's over 2.8
STRONG, WEAK = 4.0, 0.5
CONFIRMED, REFUTED, CONDITIONAL = "confirmed", "refuted", "conditional"


class Size(NamedTuple):
    """How large the experiments are."""

    seeds: int = 8
    starts: int = 32  # seeds of what is measured at the start
    deep: int = 20  # layers of what is measured at the start
    depth: int = 10  # layers of what is trained
    width: int = 64
    seq_len: int = 64
    steps: int = 300

    @property
    def base(self) -> Experiment:
        """ReLU at He's scale on the digits, trained by gradient descent without clipping."""
        values = {
            "model.depth": self.depth,
            "model.width": self.width,
            "model.activation": "relu",
            "model.sigma_w": HE,
            "model.sigma_b": 0.0,
            "optimizer.name": "sgd",
            "optimizer.clipping": "clip_by_global_norm",
            "optimizer.max_norm": NO_LIMIT,
            "train.num_steps": self.steps,
            "train.eval_every": max(self.steps // 20, 1),
            "train.num_seeds": self.seeds,
        }
        return config.replace(Experiment(), values)


SMALL = Size(seeds=3, starts=4, deep=8, depth=3, width=16, seq_len=12, steps=30)


# Numbers


class Run(NamedTuple):
    """One contestant at one learning rate; arrays along seeds."""

    rate: float
    validation: np.ndarray  # accuracy after the last step
    test: np.ndarray
    trained: np.ndarray  # whether the target was reached
    steps: np.ndarray  # to the target; all of them where it was not reached


class Verdict(NamedTuple):
    """What came out, why, and the numbers."""

    word: str
    because: str
    quantity: str  # what the rows hold
    rows: list[Row]


Starts = Mapping[str, np.ndarray]  # label -> growth per layer, or another number, per seed
Runs = Mapping[str, Sequence[Run]]  # label -> one run per learning rate


def best(
    runs: Sequence[Run], key: Callable[[Run], float] = lambda r: float(r.validation.mean())
) -> Run:
    """The run at the best rate, chosen by validation and not by test accuracy."""
    return max(runs, key=key)


def of_rates(labels: Sequence[str], runs: Runs) -> list[Row]:
    """Test accuracies at the best rates, with the rates in their labels."""
    found = {label: best(runs[label]) for label in labels}
    return [mean(f"{label}, rate {run.rate:g}", run.test) for label, run in found.items()]


def cures(runs: Sequence[Run]) -> bool:
    """Whether nearly all seeds train at the best rate."""
    return max(float(run.trained.mean()) for run in runs) >= CURED


def explodes(growth: np.ndarray, layers: int) -> bool:
    """Whether the growth per layer makes more than 6 nats over `layers` maps, with its interval."""
    return mean("", growth).low * layers > FAILING


def vanishes(growth: np.ndarray, layers: int) -> bool:
    """The same the other way."""
    return explodes(-np.asarray(growth), layers)


def three(holds: Sequence[bool]) -> str:
    """Confirmed where it always holds, refuted where it never does."""
    if all(holds):
        return CONFIRMED
    return CONDITIONAL if any(holds) else REFUTED


def listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


# Experiments


def changed(experiment: Experiment, **values: Any) -> Experiment:
    """Other values under `table__name`."""
    return config.replace(
        experiment, {key.replace("__", "."): value for key, value in values.items()}
    )


def tuned(label: str, experiment: Experiment, rates: Sequence[float], **values: Any) -> dict:
    """The contestant at each learning rate: (label, rate) -> experiment."""
    return {(label, r): changed(experiment, optimizer__learning_rate=r, **values) for r in rates}


# Learning rates, chosen so that the best one is inside.
RATES = {
    "healthy": (0.01, 0.03, 0.1, 0.3, 1.0),
    "exploding": (1e-7, 1e-6, 3e-6, 1e-5, 1e-4),
    "projected": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2),
    "vanishing": (0.1, 1.0, 10.0, 100.0, 1000.0),
    "adam": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "sigmoid": (0.1, 0.3, 1.0, 3.0, 10.0),
    "unit_steps": (0.003, 0.01, 0.03, 0.1, 0.3),  # of gradients of norm 1
}
