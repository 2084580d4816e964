"""What five popular articles say about exploding and vanishing gradients, each sentence an
experiment with a verdict.

    python scripts/articles.py --list
    python scripts/articles.py
    python scripts/articles.py sigmoid_vanishes adam_beats_others --seeds 16 --json

Two kinds of numbers are measured, over seeds. *At the start*: how much the gradient of the loss
grows on its way back, in nats per layer (or time step) between the last state and the first; times
the layers in between, more than 6 nats (a factor of 400) explode and less than -6 vanish, as for
`gradjax diagnose`. *In training*: the share of seeds whose validation accuracy reaches 90%, and the
test accuracy after the last step; every contestant has its own grid of learning rates and is judged
at the best of them by validation, because at one rate for all the comparison would be of rates. A
difference counts where the 95% interval of the paired difference over seeds leaves out 0.

A verdict is computed from these numbers: confirmed, refuted, or conditional where the sentence
holds here and not there; the rule stands in each claim's function. The exit status is 0 whatever
the verdicts are.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "OPENBLAS_NUM_THREADS", "1"
)  # before numpy: more threads stall on small matrices

import argparse
import contextlib
import difflib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

import gradjax
from gradjax.experiment import config, models, sweep, tasks, training
from gradjax.experiment.program import rule_for_workers
from gradjax.experiment.schema import Experiment
from gradjax.report import files

SICK = 6.0  # nats in all, the threshold of `gradjax diagnose`
CURED = 0.9  # share of seeds, as for `gradjax cure`
NO_LIMIT = 1e38  # a clipping threshold that no norm reaches: with and without clipping are one compiled program
HE = 2**0.5  # sigma_w at which ReLU keeps the scale (He 2015)
STRONG, WEAK = (
    4.0,
    0.5,
)  # sigma_w of the exploding and of the vanishing network, 2.8 times He's and as far below
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
        """The trained network: ReLU at He's scale on the digits, gradient descent without
        clipping.
        """
        values = {
            "model.depth": self.depth, "model.width": self.width, "model.activation": "relu", "model.sigma_w": HE,
            "model.sigma_b": 0.0, "optimizer.name": "sgd", "optimizer.clipping": "clip_by_global_norm",
            "optimizer.max_norm": NO_LIMIT, "train.num_steps": self.steps, "train.eval_every": max(self.steps // 20, 1),
            "train.num_seeds": self.seeds,
        }  # fmt: skip
        return config.replace(Experiment(), values)


SMALL = Size(seeds=3, starts=4, deep=8, depth=3, width=16, seq_len=12, steps=30)


# ---- numbers


class Run(NamedTuple):
    """One contestant at one learning rate; arrays along seeds."""

    rate: float
    validation: np.ndarray  # accuracy after the last step
    test: np.ndarray
    trained: np.ndarray  # whether the target was reached
    steps: np.ndarray  # to the target; all of them where it was not reached


class Row(NamedTuple):
    """A number with its 95% interval."""

    label: str
    value: float
    low: float
    high: float

    @property
    def numbers(self) -> str:
        """The number and its interval, which a count has not."""
        if self.low == self.high:
            return f"{self.value:,.0f}" if self.value == round(self.value) else f"{self.value:.3g}"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


class Verdict(NamedTuple):
    """What came out, why, and the numbers."""

    word: str
    because: str
    quantity: str  # what the rows hold
    rows: list[Row]


Starts = Mapping[str, np.ndarray]  # label -> growth per layer, or another number, per seed
Runs = Mapping[str, Sequence[Run]]  # label -> one run per learning rate


def mean(label: str, values: np.ndarray) -> Row:
    """Student's interval of a mean over seeds."""
    values = np.asarray(values, float)
    spread = scipy.stats.sem(values) if len(values) > 1 else math.nan
    half = scipy.stats.t.ppf(0.975, max(len(values) - 1, 1)) * spread
    return Row(
        label, float(values.mean()), float(values.mean() - half), float(values.mean() + half)
    )


def fraction(label: str, trained: np.ndarray) -> Row:
    """Wilson's interval of the share of seeds that train."""
    return Row(label, float(trained.mean()), *files.wilson(int(trained.sum()), len(trained)))


def above(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether `a` is above `b` seed by seed: the interval of the mean difference lies above 0."""
    return mean("", np.asarray(a, float) - np.asarray(b, float)).low > 0


def best(
    runs: Sequence[Run], key: Callable[[Run], float] = lambda r: float(r.validation.mean())
) -> Run:
    """The run at the best rate; by validation, so that the test accuracy is not what is selected
    on.
    """
    return max(runs, key=key)


def of_rates(labels: Sequence[str], runs: Runs) -> list[Row]:
    """Test accuracies at the best rates, which are named."""
    found = {label: best(runs[label]) for label in labels}
    return [mean(f"{label}, rate {run.rate:g}", run.test) for label, run in found.items()]


def cures(runs: Sequence[Run]) -> bool:
    """Whether nearly all seeds train at the best rate."""
    return max(float(run.trained.mean()) for run in runs) >= CURED


def explodes(growth: np.ndarray, layers: int) -> bool:
    """Whether the growth per layer makes more than 6 nats over `layers` maps, with its interval."""
    return mean("", growth).low * layers > SICK


def vanishes(growth: np.ndarray, layers: int) -> bool:
    """The same the other way."""
    return explodes(-np.asarray(growth), layers)


def three(holds: Sequence[bool]) -> str:
    """Confirmed where it always holds, refuted where it never does."""
    return CONFIRMED if all(holds) else CONDITIONAL if any(holds) else REFUTED


def listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


# ---- the experiments


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


def growth(
    experiments: Mapping[str, Experiment], seeds: int, say: Callable[[str], None]
) -> dict[str, np.ndarray]:
    """Nats per layer by which the gradient grows from the last hidden state to the first: label ->
    (seeds,).

    The digits' or pixels' first training batch; those that differ in floats share a compiled program.
    """
    groups = sweep.programs(experiments)

    def program(names: Sequence[str]) -> dict[str, np.ndarray]:
        own = experiments[names[0]]
        values = [config.flatten(experiments[name]) for name in names]
        columns = {
            key: [v[key] for v in values]
            for key in config.sweepable()
            if len({v[key] for v in values}) > 1
        }
        task = own.task
        train = tasks.load(
            task.name, jax.random.key(own.seed), normalize=task.normalize, seq_len=task.seq_len
        ).train
        x, y, num_outputs = (
            train.x[: task.batch_size],
            train.y[: task.batch_size],
            int(train.y.max()) + 1,
        )

        def one(floats: Mapping[str, jax.Array], key: jax.Array) -> jax.Array:
            model = models.build(config.replace(own, floats).model, num_outputs)
            first, second = jax.random.split(key)
            variables = model.init({"params": first, "dropout": second}, x, train=True)
            h0, links = model.links(variables, x, second)
            loss = lambda logits: training.loss_and_score(logits, y).loss
            back = gradjax.signals(links, h0, loss=loss).log_cotangent_rms[1:-1]
            return (back[0] - back[-1]) / (len(back) - 1)

        floats = {key: jnp.asarray(column, jnp.float32) for key, column in columns.items()}
        keys = jax.random.split(jax.random.key(own.seed + 1), seeds)
        over_seeds = jax.vmap(one, (None, 0))
        found = jax.jit(
            jax.vmap(over_seeds, (0, None)) if floats else lambda f, k: over_seeds(f, k)[None]
        )(floats, keys)
        m = own.model
        say(
            f"at the start: {m.activation} {m.name}, {m.depth} x {m.width}, {len(names)} settings x {seeds} seeds"
        )
        return dict(zip(names, np.asarray(found, float), strict=True))

    with ThreadPoolExecutor(rule_for_workers(Experiment())) as pool:
        parts = list(pool.map(program, groups))
    return {name: values for part in parts for name, values in part.items()}


def run_of(rate: float, ds: Any) -> Run:
    """A dataset of `gradjax.compare` as what the verdicts need."""
    steps = np.where(ds["trained_at"].values >= 0, ds["trained_at"].values, ds.sizes["step"])
    return Run(rate, ds["final_score"].values, ds["test_score"].values, ds["trained"].values, steps)


# ---- the claims: starts and trainings by label, and the verdict on their numbers


def start(size: Size, depth: int, **values: Any) -> Experiment:
    return changed(
        size.base, model__depth=depth, **{f"model__{key}": value for key, value in values.items()}
    )


ACTIVATIONS = {"linear": 1.0, "tanh": 1.0, "relu": HE}  # their critical sigma_w without biases


def _relu_starts(size: Size) -> dict[str, Experiment]:
    return {
        f"{name}, {times:g} x critical": start(
            size, size.deep, activation=name, sigma_w=times * critical
        )
        for name, critical in ACTIVATIONS.items()
        for times in (1.0, 2.0, 4.0)
    }


def judge_relu(size: Size, starts: Starts, runs: Runs) -> Verdict:
    """Confirmed where ReLU explodes at its own scale and others do not; refuted where it is the
    other way round.

    The other way round: ReLU does not at its own scale, and a network without it does at twice its own.
    """
    bad = {label: explodes(values, size.deep - 1) for label, values in starts.items()}
    own = {name: bad[f"{name}, 1 x critical"] for name in ACTIVATIONS}
    twice = [name for name in ACTIVATIONS if name != "relu" and bad[f"{name}, 2 x critical"]]
    others = [name for name in ACTIVATIONS if name != "relu" and own[name]]
    word = (
        CONFIRMED
        if own["relu"] and not others
        else REFUTED
        if not own["relu"] and twice
        else CONDITIONAL
    )
    value = lambda label: float(starts[label].mean())
    because = (
        f"At its own scale ReLU grows by {value('relu, 1 x critical'):+.2f} nats per layer; weights twice as large add "
        f"{value('relu, 2 x critical') - value('relu, 1 x critical'):.2f}, ReLU in a linear network's place "
        f"{value('relu, 2 x critical') - value('linear, 2 x critical'):+.2f}. Without ReLU explode at twice their "
        f"scale: {listed(twice)}."
    )
    return Verdict(word, because, "nats per layer", [mean(k, v) for k, v in starts.items()])


SCHEMES = {"LeCun": 1.0, "He": HE}


def _sigmoid_starts(size: Size) -> dict[str, Experiment]:
    sigmas = {"sigmoid": SCHEMES | {"sigma_w 4": 4.0, "sigma_w 10": 10.15}, "relu": SCHEMES}
    return {
        f"{name}, {scheme}": start(size, size.deep, activation=name, sigma_w=sigma)
        for name, schemes in sigmas.items()
        for scheme, sigma in schemes.items()
    }


def judge_sigmoid(size: Size, starts: Starts, runs: Runs) -> Verdict:
    """Confirmed where sigmoids vanish at every scale tried and ReLU at none; refuted where neither
    half ever holds.
    """
    lost = {label: vanishes(values, size.deep - 1) for label, values in starts.items()}
    holds = [lost[label] == label.startswith("sigmoid") for label in starts]
    names = [label for label in starts if lost[label]]
    kept = [label for label in starts if not lost[label]]
    because = f"Over {size.deep} layers vanish: {listed(names)}; do not: {listed(kept)}."
    return Verdict(three(holds), because, "nats per layer", [mean(k, v) for k, v in starts.items()])


def _exploding(size: Size) -> Experiment:
    return changed(size.base, model__sigma_w=STRONG)


def _adam(size: Size) -> dict:
    sick = _exploding(size)
    return (
        tuned("untreated SGD", sick, RATES["exploding"])
        | tuned("Adam", sick, RATES["adam"], optimizer__name="adam")
        | tuned("SGD, clipping at 1", sick, RATES["healthy"], optimizer__max_norm=1.0)
        | tuned("SGD, He's scale", size.base, RATES["healthy"])
        | tuned(
            "Adam, clipping at 1",
            sick,
            RATES["adam"],
            optimizer__name="adam",
            optimizer__max_norm=1.0,
        )
        | tuned("Adam, He's scale", size.base, RATES["adam"], optimizer__name="adam")
    )


def judge_adam(size: Size, starts: Starts, runs: Runs) -> Verdict:
    """Better than both, than neither, or than one of the two, by the paired test accuracy at the
    best rates.
    """
    test = {label: best(runs[label]).test for label in runs}
    rivals = ("SGD, clipping at 1", "SGD, He's scale")
    beaten = [label for label in rivals if above(test["Adam"], test[label])]
    enough = [label for label in runs if cures(runs[label])]
    gaps = [f"{label} {mean('', test['Adam'] - test[label]).numbers}" for label in rivals]
    because = f"Adam's test accuracy minus that of: {'; '.join(gaps)}. Nine in ten seeds train with: {listed(enough)}."
    return Verdict(
        three([label in beaten for label in rivals]),
        because,
        "test accuracy",
        of_rates(list(runs), runs),
    )


THRESHOLDS = (0.1, 1.0, 10.0)


def _slow(size: Size) -> dict:
    runs = tuned("no clipping", size.base, RATES["healthy"])
    for limit in THRESHOLDS:
        rates = (
            (*RATES["healthy"], 3.0, 10.0) if limit < 1 else RATES["healthy"]
        )  # a step is rate times threshold
        runs |= tuned(f"clipping at {limit:g}", size.base, rates, optimizer__max_norm=limit)
    return runs


def judge_slow(size: Size, starts: Starts, runs: Runs) -> Verdict:
    """Confirmed where every threshold costs steps at its own best rate; refuted where none does at
    any rate.

    Conditional: some do, or they do at the rate that is best without clipping.
    """
    fastest = lambda r: -float(r.steps.mean())
    free = best(runs["no clipping"], fastest)
    rows, slow = (
        [mean(f"none, rate {free.rate:g}", free.steps)],
        {"the same rate": [], "its own best rate": []},
    )
    for limit in THRESHOLDS:
        own = runs[f"clipping at {limit:g}"]
        same = next(r for r in own if r.rate == free.rate)
        for which, run in zip(slow, (same, best(own, fastest)), strict=True):
            rows.append(mean(f"at {limit:g}, rate {run.rate:g}", run.steps))
            if above(run.steps, free.steps):
                slow[which].append(f"{limit:g}")
    holds = [f"{limit:g}" in slow["its own best rate"] for limit in THRESHOLDS]
    word = CONFIRMED if all(holds) else CONDITIONAL if any(slow.values()) else REFUTED
    because = "; ".join(
        f"at {which} slower with thresholds {listed(names)}" for which, names in slow.items()
    )
    return Verdict(
        word,
        f"To 90% of validation accuracy: {because}.",
        "steps to the target",
        list(dict.fromkeys(rows)),
    )


SIGMAS = {"too small": WEAK, "He": HE, "too large": STRONG}


def _batchnorm_starts(size: Size) -> dict[str, Experiment]:
    plain = {f"plain, {name}": start(size, size.deep, sigma_w=s) for name, s in SIGMAS.items()}
    with_norm = {
        f"BatchNorm, {name}": start(size, size.deep, sigma_w=s, normalization="batchnorm")
        for name, s in SIGMAS.items()
    }
    deeper = start(size, _deeper(size), normalization="batchnorm")
    return plain | with_norm | {f"BatchNorm, He, {_deeper(size)} layers": deeper}


def _deeper(size: Size) -> int:
    return 5 * size.deep // 2


def _batchnorm(size: Size) -> dict:
    runs: dict = {}
    for label, sigma, rates in (
        ("vanishing", WEAK, "vanishing"),
        ("exploding", STRONG, "exploding"),
    ):
        runs |= tuned(f"{label}, plain", size.base, RATES[rates], model__sigma_w=sigma)
        norm = {"model__sigma_w": sigma, "model__normalization": "batchnorm"}
        runs |= tuned(f"{label}, BatchNorm", size.base, RATES["healthy"], **norm)
    return runs


def judge_batchnorm(size: Size, starts: Starts, runs: Runs) -> Verdict:
    """Confirmed where it makes both train and its own gradient does not explode at any depth
    tried.
    """
    sick = [label for label in ("vanishing", "exploding") if not cures(runs[f"{label}, plain"])]
    cured = [label for label in sick if cures(runs[f"{label}, BatchNorm"])]
    deep = next(v for label, v in starts.items() if "layers" in label)
    explosion = explodes(deep, _deeper(size) - 1)
    word = (
        REFUTED
        if not cured
        else CONFIRMED
        if cured == ["vanishing", "exploding"] and not explosion
        else CONDITIONAL
    )
    low, high = (
        f(float(v.mean()) for k, v in starts.items() if k.startswith("BatchNorm"))
        for f in (min, max)
    )
    score = lambda label: f"{best(runs[label]).test.mean():.3f}"
    gains = [
        f"{k} {score(f'{k}, plain')} to {score(f'{k}, BatchNorm')}"
        for k in ("vanishing", "exploding")
    ]
    because = (
        f"{size.depth} layers that did not train and do with it: {listed(cured)} (test accuracy: "
        f"{'; '.join(gains)}). With BatchNorm the gradient grows by "
        f"{low:.2f} to {high:.2f} nats per layer whatever the weights' scale: {deep.mean() * (_deeper(size) - 1):.1f} "
        f"in all over {_deeper(size)} layers, which {'explodes' if explosion else 'does not explode'}."
    )
    rows = [mean(k, v) for k, v in starts.items()]
    return Verdict(word, because, "nats per layer", rows)


def measure_test_mode(size: Size) -> dict[str, np.ndarray]:
    """Test accuracy of BatchNorm networks with running averages, with the batch's own, and with the
    norm left out.
    """
    own = changed(size.base, model__normalization="batchnorm", model__depth=min(size.depth, 5))
    own = changed(own, optimizer__learning_rate=0.1)
    data = tasks.load("digits", jax.random.key(0))
    problem = training.problem_of(own, data)
    model = models.build(own.model, problem.num_outputs)
    bare = models.build(changed(own, model__normalization="none").model, problem.num_outputs)

    def one(key: jax.Array) -> dict[str, jax.Array]:
        state = training.init(key, {}, data, problem)
        variables = training.run_chunk(state, {}, data, problem, size.steps)[0].variables
        score = lambda logits: training.loss_and_score(logits, data.test.y).score
        batch = model.apply(variables, data.test.x, train=True, mutable=["batch_stats"])[0]
        return {
            "running averages": score(model.apply(variables, data.test.x)),
            "batch statistics": score(batch),
            "without the norm": score(bare.apply({"params": variables["params"]}, data.test.x)),
        }

    found = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), size.seeds))
    return {label: np.asarray(values, float) for label, values in found.items()}


def judge_test_mode(size: Size, starts: Starts, runs: Runs) -> Verdict:
    """Refuted where leaving the normalisation out at test time costs accuracy; confirmed where it
    does not.
    """
    kept, without = starts["running averages"], starts["without the norm"]
    word = REFUTED if above(kept, without) else CONFIRMED
    because = (
        f"Left out, the accuracy is {without.mean():.3f} instead of {kept.mean():.3f}. What changes is whose "
        f"statistics it uses: the test batch's own give {starts['batch statistics'].mean():.3f}."
    )
    return Verdict(word, because, "test accuracy", [mean(k, v) for k, v in starts.items()])


REGULARIZERS = {  # what each is set to, the last of L2 so strong that it matters at the rates left by explosion
    "dropout": {"model__dropout": (0.2, 0.5)},
    "L1": {"optimizer__l1": (1e-2,)},
    "L2": {"optimizer__l2": (1e-1, 1e3)},
    "weight clipping": {"optimizer__weight_clip": (0.1, 0.2)},
    "max-norm": {"optimizer__weight_norm": (HE,)},
}
PROJECTIONS = ("weight clipping", "max-norm")  # they shrink the weights at once


def _regularizers(size: Size) -> dict:
    neutral = {"model__dropout": 0.0, "optimizer__l1": 0.0, "optimizer__l2": 0.0}
    neutral |= {"optimizer__weight_clip": NO_LIMIT, "optimizer__weight_norm": NO_LIMIT}
    sick = changed(_exploding(size), **neutral)  # one compiled program serves all that is tried
    runs = tuned("untreated", _exploding(size), RATES["exploding"])
    for name, setting in REGULARIZERS.items():
        rates = RATES["projected"] if name in PROJECTIONS else RATES["exploding"]
        for key, values in setting.items():
            for value in values:
                runs |= tuned(f"{name} {value:.3g}", sick, rates, **{key: value})
    return runs


def judge_regularizers(size: Size, starts: Starts, runs: Runs) -> Verdict:
    """Of the five, all, none or some bring 90% of the seeds to the target at some strength and
    rate.
    """
    cured = {
        name: [k for k in runs if k.startswith(name) and cures(runs[k])] for name in REGULARIZERS
    }
    test = {label: best(runs[label]).test for label in runs}
    better = [
        label for label in runs if label != "untreated" and above(test[label], test["untreated"])
    ]
    because = (
        f"Cure: {listed([label for labels in cured.values() for label in labels])}. Better than nothing: "
        f"{listed(better)}. Untreated: {test['untreated'].mean():.3f}."
    )
    return Verdict(
        three([bool(v) for v in cured.values()]),
        because,
        "test accuracy",
        of_rates(list(runs), runs),
    )


RESIDUAL_SIGMAS = {"sigma_w 0.5": 0.5, "LeCun": 1.0, "He": HE, "sigma_w 2": 2.0}


def _residual_starts(size: Size) -> dict[str, Experiment]:
    return {
        f"{kind}, {name}": start(size, 5, width=64, sigma_w=sigma, residual=kind == "skips")
        for kind in ("plain", "skips")
        for name, sigma in RESIDUAL_SIGMAS.items()
    }


def judge_residual(size: Size, starts: Starts, runs: Runs) -> Verdict:
    """Whether the gradient changes less per layer with skips than without: at every scale, at none,
    or at some.
    """
    change = {label: np.abs(values) for label, values in starts.items()}
    calmer = [
        name
        for name in RESIDUAL_SIGMAS
        if above(change[f"plain, {name}"], change[f"skips, {name}"])
    ]
    largest = max(float(values.mean()) for values in change.values())
    because = (
        f"With skips the gradient changes less per layer at: {listed(calmer)}; at "
        f"{listed([name for name in RESIDUAL_SIGMAS if name not in calmer])} more, or as much. Over the four "
        f"maps of five layers the largest change is {4 * largest:.1f} nats: too few layers for either sickness."
    )
    word = three([name in calmer for name in RESIDUAL_SIGMAS])
    return Verdict(word, because, "nats per layer", [mean(k, v) for k, v in starts.items()])


FORMS = {
    "plain": {},
    "identity skips": {"residual": True},
    "skips with a learned scale": {"residual": True, "residual_learned": True},
    "highway gates": {"highway": True},
}


def measure_parameters(size: Size) -> dict[str, np.ndarray]:
    """Numbers that are learned by the 20-layer network, by the form of its skips."""
    found = {}
    for label, values in FORMS.items():
        model = models.build(start(size, size.deep, **values).model, 10)
        x = jnp.zeros((1, 64), jnp.float32)
        params = jax.eval_shape(lambda model=model, x=x: model.init(jax.random.key(0), x))["params"]
        found[label] = np.array(
            [float(sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)))]
        )
    return found


def judge_parameters(size: Size, starts: Starts, runs: Runs) -> Verdict:
    """Refuted where h + f(h) has as many parameters as f(h)."""
    count = {label: int(values[0]) for label, values in starts.items()}
    added = {label: n - count["plain"] for label, n in count.items() if label != "plain"}
    word = CONFIRMED if added["identity skips"] > 0 else REFUTED
    because = (
        f"Added to {count['plain']:,}: {'; '.join(f'{label} {n:,}' for label, n in added.items())}."
    )
    return Verdict(
        word,
        because,
        "parameters",
        [Row(k, float(n), float(n), float(n)) for k, n in count.items()],
    )


def _pretraining(size: Size) -> dict:
    sigmoid = changed(size.base, model__activation="sigmoid", model__sigma_w=1.0)
    stage = {"train__pretrain_steps": max(2 * size.steps // 3, 1)}
    return (
        tuned("sigmoid", sigmoid, RATES["sigmoid"])
        | tuned("sigmoid, RBMs first", sigmoid, RATES["sigmoid"], train__pretrain="rbm", **stage)
        | tuned("ReLU, He", size.base, RATES["healthy"])
        | tuned(
            "ReLU, He, autoencoders first",
            size.base,
            RATES["healthy"],
            train__pretrain="autoencoder",
            **stage,
        )
    )


PRETRAINED = {"sigmoid": "sigmoid, RBMs first", "ReLU, He": "ReLU, He, autoencoders first"}


def judge_pretraining(size: Size, starts: Starts, runs: Runs) -> Verdict:
    """Whether it raises the test accuracy of both the sick sigmoid network and the healthy one, of
    neither, of one.
    """
    test = {label: best(runs[label]).test for label in runs}
    helped = [above(test[after], test[before]) for before, after in PRETRAINED.items()]
    parts = [
        f"{before} {mean('', test[after] - test[before]).numbers}"
        for before, after in PRETRAINED.items()
    ]
    trained = ", ".join(f"{label} {best(runs[label]).trained.mean():.0%}" for label in runs)
    because = f"Gain in test accuracy: {'; '.join(parts)}. Seeds that reach the target: {trained}."
    return Verdict(three(helped), because, "test accuracy", of_rates(list(runs), runs))


def _lstm_starts(size: Size) -> dict[str, Experiment]:
    base = Experiment(task=config.Task(name="sequential_digits"))
    base = changed(base, model__depth=1, model__width=32, model__sigma_b=0.0, model__sigma_w=1.0)
    rnn = {
        f"RNN, gain {g:g}": changed(base, model__name="rnn", model__sigma_w=g)
        for g in (0.5, 1.0, 1.5)
    }
    lstm = {
        f"LSTM, forget bias {b:g}": changed(base, model__name="lstm", model__forget_bias=b)
        for b in (0.0, 1.0, 3.0)
    }
    return rnn | lstm


def judge_lstm(size: Size, starts: Starts, runs: Runs) -> Verdict:
    """Over all pairs of an RNN's gain and an LSTM's forget bias: does less of the gradient vanish
    in the LSTM?
    """
    lost = {label: np.maximum(-values, 0.0) for label, values in starts.items()}
    rnns = [label for label in starts if label.startswith("RNN")]
    lstms = [label for label in starts if label.startswith("LSTM")]
    wins = {a: [b for b in rnns if above(lost[b], lost[a])] for a in lstms}
    because = (
        "Less vanishes than in: "
        + "; ".join(f"{a}: {listed(found)}" for a, found in wins.items())
        + "."
    )
    word = three([b in wins[a] for a in lstms for b in rnns])
    return Verdict(word, because, "nats per time step", [mean(k, v) for k, v in starts.items()])


def _normalized(size: Size) -> dict:
    runs: dict = {}
    for label, sigma in (("exploding", STRONG), ("vanishing", WEAK)):
        sick = changed(size.base, model__sigma_w=sigma)
        rule = {"optimizer__clipping": "normalize_by_norm", "optimizer__max_norm": 1.0}
        runs |= tuned(f"{label}, untreated", sick, RATES[label])
        runs |= tuned(f"{label}, normalised", sick, RATES["unit_steps"], **rule)
    return runs


def judge_normalized(size: Size, starts: Starts, runs: Runs) -> Verdict:
    """Whether 90% of the seeds train with normalised gradients: of both networks, of neither, or of
    one.
    """
    kinds = ("exploding", "vanishing")
    cured = [
        cures(runs[f"{kind}, normalised"]) and not cures(runs[f"{kind}, untreated"])
        for kind in kinds
    ]
    test = {label: best(runs[label]).test for label in runs}
    parts = [
        f"{k} {test[f'{k}, untreated'].mean():.3f} to {test[f'{k}, normalised'].mean():.3f}"
        for k in kinds
    ]
    better = [k for k in kinds if above(test[f"{k}, normalised"], test[f"{k}, untreated"])]
    because = (
        f"Test accuracy: {'; '.join(parts)}; better: {listed(better)}. Dividing the whole gradient by its norm leaves "
        "the ratio of one layer's gradient to another's as it was."
    )
    return Verdict(three(cured), because, "test accuracy", of_rates(list(runs), runs))


class Claim(NamedTuple):
    """A sentence, what is measured for it, and how its verdict is found."""

    says: str
    judge: Callable[[Size, Starts, Runs], Verdict]
    starts: Callable[[Size], dict[str, Experiment]] = lambda size: {}
    trainings: Callable[[Size], dict[tuple[str, float], Experiment]] = lambda size: {}
    measure: Callable[[Size], dict[str, np.ndarray]] = lambda size: {}


CLAIMS = {
    "relu_explodes": Claim(
        "ReLU is the main cause of exploding gradients", judge_relu, _relu_starts
    ),
    "sigmoid_vanishes": Claim(
        "Sigmoid's gradients vanish, ReLU's do not", judge_sigmoid, _sigmoid_starts
    ),
    "adam_beats_others": Claim(
        "Adam cures explosion better than clipping and initialisation", judge_adam, trainings=_adam
    ),
    "clipping_slows": Claim("Clipping slows convergence", judge_slow, trainings=_slow),
    "batchnorm_cures": Claim(
        "BatchNorm cures vanishing and explosion", judge_batchnorm, _batchnorm_starts, _batchnorm
    ),
    "batchnorm_at_test": Claim(
        "BatchNorm is not used at test time", judge_test_mode, measure=measure_test_mode
    ),
    "regularizers_cure": Claim(
        "Dropout, L1, L2 and weight clipping cure explosion",
        judge_regularizers,
        trainings=_regularizers,
    ),
    "residual_delta": Claim(
        "With skips the gradient of a 5 x 64 network changes less per layer",
        judge_residual,
        _residual_starts,
    ),
    "residual_parameters": Claim(
        "Residual connections add parameters", judge_parameters, measure=measure_parameters
    ),
    "pretraining_helps": Claim(
        "Greedy pre-training helps", judge_pretraining, trainings=_pretraining
    ),
    "lstm_vanishes_less": Claim(
        "An LSTM's gradient vanishes less than a plain RNN's", judge_lstm, _lstm_starts
    ),
    "normalised_gradients": Claim(
        "Gradients divided by their norm cure explosion and vanishing",
        judge_normalized,
        trainings=_normalized,
    ),
}


# ---- running them


class Tell(NamedTuple):
    """Two ways to report progress: a line, and an event of `gradjax.compare`."""

    line: Callable[[str], None]
    event: Callable[[sweep.Progress], None]


@contextlib.contextmanager
def progress_bar() -> Iterator[Tell]:
    """A bar on standard error."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("measuring", total=None)

        def event(e: sweep.Progress) -> None:
            if e.message:
                line(
                    e.message
                    if len(e.message) < 100
                    else f"{e.message[:40]} ...: {e.message.rpartition(': ')[2]}"
                )
            else:
                bar.update(
                    task,
                    completed=e.done,
                    total=e.total,
                    description=f"training, {e.diverged} diverged",
                )

        def line(text: str) -> None:
            console.print(text, highlight=False, markup=False)

        yield Tell(line, event)


def check(names: Sequence[str], size: Size, tell: Tell) -> dict[str, Verdict]:
    """Measure and judge the claims of these names; equal experiments are run once, for all of
    them.
    """
    claims = {name: CLAIMS[name] for name in names}
    starts = {name: claim.starts(size) for name, claim in claims.items()}
    trainings = {name: claim.trainings(size) for name, claim in claims.items()}
    unique = lambda tables: {
        str(i): e for i, e in enumerate(dict.fromkeys(e for t in tables for e in t.values()))
    }
    at_start, trained = unique(starts.values()), unique(trainings.values())
    grown = growth(at_start, size.starts, tell.line) if at_start else {}
    grown = {at_start[i]: values for i, values in grown.items()}
    found = gradjax.compare(trained, progress=tell.event) if trained else {}
    found = {trained[i]: ds for i, ds in found.items()}
    verdicts = {}
    for name, claim in claims.items():
        numbers = {label: grown[e] for label, e in starts[name].items()} | claim.measure(size)
        runs: dict[str, list[Run]] = {}
        for (label, rate), e in trainings[name].items():
            runs.setdefault(label, []).append(run_of(rate, found[e]))
        verdicts[name] = claim.judge(size, numbers, runs)
        tell.line(f"{name}: {verdicts[name].word}")
    return verdicts


# ---- in words and pictures


COLOURS = {CONFIRMED: "#009e73", REFUTED: "#d55e00", CONDITIONAL: "#0072b2"}


def figure(verdicts: Mapping[str, Verdict]) -> Any:
    """One panel per claim: its numbers with their intervals, the verdict above."""
    import textwrap

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    per_row = min(len(verdicts), 3)
    names = list(verdicts)
    lines = [names[i : i + per_row] for i in range(0, len(names), per_row)]
    heights = [0.21 * max(len(verdicts[n].rows) for n in line) + 0.9 for line in lines]
    style: Any = {"font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        fig = plt.figure(figsize=(5.2 * per_row, sum(heights)), layout="constrained")
        grid = fig.add_gridspec(len(lines), per_row, height_ratios=heights)
        for place, name in enumerate(names):
            v, ax = verdicts[name], fig.add_subplot(grid[place // per_row, place % per_row])
            colour, y = COLOURS[v.word], np.arange(len(v.rows))[::-1]
            value, low, high = (
                np.array([getattr(row, key) for row in v.rows]) for key in ("value", "low", "high")
            )
            spread = np.nan_to_num(np.clip([value - low, high - value], 0, None))
            ax.errorbar(value, y, xerr=spread, fmt="o", ms=4, lw=1.3, color=colour)
            ax.set_yticks(y, [row.label for row in v.rows])
            ax.set_ylim(-0.7, len(v.rows) - 0.3)
            ax.grid(axis="x", color="#e6e6e6")
            if v.quantity.startswith("nats"):
                ax.axvline(0, color="#767676", lw=0.8)
            elif v.quantity == "test accuracy":
                ax.axvline(0.9, color="#767676", lw=0.8, ls="--")
                ax.set_xlim(0, 1.02)
            else:
                ax.set_xlim(0, None)
            ax.xaxis.set_major_locator(MaxNLocator(5))
            ax.set_xlabel(v.quantity)
            says = "\n".join(textwrap.wrap(f"{CLAIMS[name].says}: {v.word}", 40))
            ax.set_title(says, loc="left", color=colour, fontsize=9.5, fontweight="bold")
    return fig


def print_report(verdicts: Mapping[str, Verdict]) -> None:
    """Every claim with its verdict, why, and its numbers; the verdicts once more at the end."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table(title="The articles' claims", title_justify="left")
    for heading in ("claim", "name", "verdict"):
        table.add_column(heading)
    for name, v in verdicts.items():
        word = Text(v.word, style=f"bold {COLOURS[v.word]}")
        table.add_row(CLAIMS[name].says, name, word)
        console.print(Text.assemble("\n", word, f"  {CLAIMS[name].says} ({name})"))
        console.print(v.because, markup=False)
        longest = max(len(row.label) for row in v.rows)
        console.print(f"  {'':{longest}}  {v.quantity}, 95% interval over seeds", style="dim")
        for row in v.rows:
            console.print(f"  {row.label:{longest}}  {row.numbers}", markup=False)
    console.print()
    console.print(table)


def choose(names: Sequence[str]) -> list[str]:
    """The claims asked for, all where none is named."""
    for name in names:
        if name not in CLAIMS:
            near = difflib.get_close_matches(name, CLAIMS, 1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ValueError(f"unknown claim {name!r}{hint} The claims are {', '.join(CLAIMS)}.")
    return list(dict.fromkeys(names)) or list(CLAIMS)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="CLAIM", help="claims; all of them where none is named"
    )
    parser.add_argument("--list", action="store_true", help="list the claims and stop")
    parser.add_argument(
        "--seeds", type=int, help="trainings per setting (default 8); four times as many starts"
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help="the sizes of the tests: seconds, and verdicts of no worth",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object in place of the table"
    )
    parser.add_argument("--output", default="runs", help="folder of the run folder; default: runs")
    args = parser.parse_args(arguments)
    try:
        names = choose(args.names)
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        for name in names:
            print(f"{name:22} {CLAIMS[name].says}")
        return 0
    size = SMALL if args.small else Size()
    if args.seeds is not None:
        if args.seeds < 2:
            parser.error(f"--seeds is {args.seeds}; an interval needs at least 2.")
        size = size._replace(seeds=args.seeds, starts=4 * args.seeds)

    began = time.perf_counter()
    with progress_bar() as tell:
        verdicts = check(names, size, tell)
    folder: Path = files.run_folder(args.output, "articles")
    fig = figure(verdicts)
    for kind in ("png", "svg"):
        fig.savefig(folder / f"articles.{kind}", dpi=110)
    summary = {
        "claims": {
            name: {"says": CLAIMS[name].says}
            | v._asdict()
            | {"rows": [row._asdict() for row in v.rows]}
            for name, v in verdicts.items()
        },
        "size": size._asdict(),
        "seconds": round(time.perf_counter() - began, 1),
        "folder": str(folder),
        "versions": files.provenance(),
    }
    files.write_text(folder / "articles.json", files.dumps(summary) + "\n")
    if args.json:
        print(files.dumps(summary))
    else:
        print_report(verdicts)
        count = {word: sum(v.word == word for v in verdicts.values()) for word in COLOURS}
        words = ", ".join(f"{n} {word}" for word, n in count.items())
        print(
            f"{len(verdicts)} claims: {words}; {summary['seconds']:.0f} s; figure and numbers in {folder}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
