"""The claims of `scripts/articles.py`: what is measured for each, and the rule of its verdict."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from article_numbers import (
    CONDITIONAL,
    CONFIRMED,
    HE,
    NO_LIMIT,
    RATES,
    REFUTED,
    STRONG,
    WEAK,
    Runs,
    Size,
    Starts,
    Verdict,
    best,
    changed,
    cures,
    explodes,
    listed,
    of_rates,
    three,
    tuned,
    vanishes,
)
from reporting import Row, above, mean

from gradjax.experiment import models, tasks, training
from gradjax.experiment.schema import Experiment, Task

# Starts and trainings by label, and the verdict on their numbers


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
    """Confirmed if only ReLU explodes at its own scale, refuted in the reverse case.

    In the reverse case ReLU does not explode at its own scale, and a network without it does at
    twice its own.
    """
    bad = {label: explodes(values, size.deep - 1) for label, values in starts.items()}
    own = {name: bad[f"{name}, 1 x critical"] for name in ACTIVATIONS}
    twice = [name for name in ACTIVATIONS if name != "relu" and bad[f"{name}, 2 x critical"]]
    others = [name for name in ACTIVATIONS if name != "relu" and own[name]]
    word = CONDITIONAL
    if own["relu"] and not others:
        word = CONFIRMED
    elif not own["relu"] and twice:
        word = REFUTED

    def value(label):
        return float(starts[label].mean())

    own_scale, larger = value("relu, 1 x critical"), value("relu, 2 x critical")
    because = (
        f"At its own scale ReLU grows by {own_scale:+.2f} nats per layer; weights twice as large "
        f"add {larger - own_scale:.2f}, ReLU in place of a linear network "
        f"{larger - value('linear, 2 x critical'):+.2f}. Networks without ReLU that explode at "
        f"twice their scale: {listed(twice)}."
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
    """Confirmed if sigmoids vanish at all scales and ReLU at none, refuted if neither holds."""
    lost = {label: vanishes(values, size.deep - 1) for label, values in starts.items()}
    holds = [lost[label] == label.startswith("sigmoid") for label in starts]
    names = [label for label in starts if lost[label]]
    kept = [label for label in starts if not lost[label]]
    because = f"Vanishing over {size.deep} layers: {listed(names)}; not: {listed(kept)}."
    return Verdict(three(holds), because, "nats per layer", [mean(k, v) for k, v in starts.items()])


def _exploding(size: Size) -> Experiment:
    return changed(size.base, model__sigma_w=STRONG)


def _adam(size: Size) -> dict:
    exploding = _exploding(size)
    return (
        tuned("untreated SGD", exploding, RATES["exploding"])
        | tuned("Adam", exploding, RATES["adam"], optimizer__name="adam")
        | tuned("SGD, clipping at 1", exploding, RATES["healthy"], optimizer__max_norm=1.0)
        | tuned("SGD, He's scale", size.base, RATES["healthy"])
        | tuned(
            "Adam, clipping at 1",
            exploding,
            RATES["adam"],
            optimizer__name="adam",
            optimizer__max_norm=1.0,
        )
        | tuned("Adam, He's scale", size.base, RATES["adam"], optimizer__name="adam")
    )


def judge_adam(size: Size, starts: Starts, runs: Runs) -> Verdict:
    """Better than both, neither or one of the rivals, by paired test accuracy at the best rates."""
    test = {label: best(runs[label]).test for label in runs}
    rivals = ("SGD, clipping at 1", "SGD, He's scale")
    beaten = [label for label in rivals if above(test["Adam"], test[label])]
    enough = [label for label in runs if cures(runs[label])]
    gaps = [f"{label} {mean('', test['Adam'] - test[label]).numbers}" for label in rivals]
    because = (
        f"Adam's test accuracy minus that of: {'; '.join(gaps)}. "
        f"Nine in ten seeds train with: {listed(enough)}."
    )
    word = three([label in beaten for label in rivals])
    return Verdict(word, because, "test accuracy", of_rates(list(runs), runs))


THRESHOLDS = (0.1, 1.0, 10.0)


def _slow(size: Size) -> dict:
    runs = tuned("no clipping", size.base, RATES["healthy"])
    for limit in THRESHOLDS:
        # A step is the rate times the threshold.
        rates = RATES["healthy"] if limit >= 1 else (*RATES["healthy"], 3.0, 10.0)
        runs |= tuned(f"clipping at {limit:g}", size.base, rates, optimizer__max_norm=limit)
    return runs


def judge_slow(size: Size, starts: Starts, runs: Runs) -> Verdict:
    """Confirmed if every threshold costs steps at its own best rate; refuted if none ever does.

    Conditional: some do, or they do at the rate that is best without clipping.
    """

    def fastest(run):
        return -float(run.steps.mean())

    free = best(runs["no clipping"], fastest)
    rows = [mean(f"none, rate {free.rate:g}", free.steps)]
    slow: dict[str, list[str]] = {"the same rate": [], "its own best rate": []}
    for limit in THRESHOLDS:
        own = runs[f"clipping at {limit:g}"]
        same = next(r for r in own if r.rate == free.rate)
        for which, run in zip(slow, (same, best(own, fastest)), strict=True):
            rows.append(mean(f"at {limit:g}, rate {run.rate:g}", run.steps))
            if above(run.steps, free.steps):
                slow[which].append(f"{limit:g}")
    holds = [f"{limit:g}" in slow["its own best rate"] for limit in THRESHOLDS]
    word = three(holds)
    if word == REFUTED and any(slow.values()):
        word = CONDITIONAL
    parts = [f"at {which} slower with thresholds {listed(names)}" for which, names in slow.items()]
    because = f"To 90% of validation accuracy: {'; '.join(parts)}."
    return Verdict(word, because, "steps to the target", list(dict.fromkeys(rows)))


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
    """Confirmed if it makes both train and its own gradient explodes at none of the depths."""
    failing = [label for label in ("vanishing", "exploding") if not cures(runs[f"{label}, plain"])]
    cured = [label for label in failing if cures(runs[f"{label}, BatchNorm"])]
    deep = next(v for label, v in starts.items() if "layers" in label)
    explosion = explodes(deep, _deeper(size) - 1)
    word = CONDITIONAL
    if not cured:
        word = REFUTED
    elif cured == ["vanishing", "exploding"] and not explosion:
        word = CONFIRMED
    grown = [float(v.mean()) for k, v in starts.items() if k.startswith("BatchNorm")]

    def score(label):
        return f"{best(runs[label]).test.mean():.3f}"

    gains = [
        f"{k} {score(f'{k}, plain')} to {score(f'{k}, BatchNorm')}"
        for k in ("vanishing", "exploding")
    ]
    because = (
        f"{size.depth} layers that did not train and do with it: {listed(cured)} (test accuracy: "
        f"{'; '.join(gains)}). With BatchNorm the gradient grows by {min(grown):.2f} to "
        f"{max(grown):.2f} nats per layer whatever the weights' scale: "
        f"{deep.mean() * (_deeper(size) - 1):.1f} in all over {_deeper(size)} layers, which "
        f"{'explodes' if explosion else 'does not explode'}."
    )
    rows = [mean(k, v) for k, v in starts.items()]
    return Verdict(word, because, "nats per layer", rows)


def measure_test_mode(size: Size) -> dict[str, np.ndarray]:
    """Test accuracy of BatchNorm networks by what the norm uses at test time.

    Running averages, the batch's own statistics, or no norm at all.
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

        def score(logits):
            return training.loss_and_score(logits, data.test.y).score

        batch = model.apply(variables, data.test.x, train=True, mutable=["batch_stats"])[0]
        return {
            "running averages": score(model.apply(variables, data.test.x)),
            "batch statistics": score(batch),
            "without the norm": score(bare.apply({"params": variables["params"]}, data.test.x)),
        }

    found = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), size.seeds))
    return {label: np.asarray(values, float) for label, values in found.items()}


def judge_test_mode(size: Size, starts: Starts, runs: Runs) -> Verdict:
    """Refuted if leaving the normalisation out at test time costs accuracy, else confirmed."""
    kept, without = starts["running averages"], starts["without the norm"]
    word = REFUTED if above(kept, without) else CONFIRMED
    because = (
        f"Left out, the accuracy is {without.mean():.3f} instead of {kept.mean():.3f}. Only the "
        "source of its statistics changes: the test batch's own give "
        f"{starts['batch statistics'].mean():.3f}."
    )
    return Verdict(word, because, "test accuracy", [mean(k, v) for k, v in starts.items()])


# The settings of each; the last of L2 is so strong that it matters at the rates left by explosion.
REGULARIZERS = {
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
    exploding = changed(_exploding(size), **neutral)
    runs = tuned("untreated", _exploding(size), RATES["exploding"])
    for name, setting in REGULARIZERS.items():
        rates = RATES["projected"] if name in PROJECTIONS else RATES["exploding"]
        for key, values in setting.items():
            for value in values:
                runs |= tuned(f"{name} {value:.3g}", exploding, rates, **{key: value})
    return runs


def judge_regularizers(size: Size, starts: Starts, runs: Runs) -> Verdict:
    """Whether all, none or some of the five bring 90% of the seeds to the target.

    At some strength and rate.
    """
    cured = {
        name: [k for k in runs if k.startswith(name) and cures(runs[k])] for name in REGULARIZERS
    }
    test = {label: best(runs[label]).test for label in runs}
    better = [
        label for label in runs if label != "untreated" and above(test[label], test["untreated"])
    ]
    cures_found = [label for labels in cured.values() for label in labels]
    because = (
        f"Cures: {listed(cures_found)}. Better than nothing: {listed(better)}. "
        f"Untreated: {test['untreated'].mean():.3f}."
    )
    word = three([bool(v) for v in cured.values()])
    return Verdict(word, because, "test accuracy", of_rates(list(runs), runs))


RESIDUAL_SIGMAS = {"sigma_w 0.5": 0.5, "LeCun": 1.0, "He": HE, "sigma_w 2": 2.0}


def _residual_starts(size: Size) -> dict[str, Experiment]:
    return {
        f"{kind}, {name}": start(size, 5, width=64, sigma_w=sigma, residual=kind == "skips")
        for kind in ("plain", "skips")
        for name, sigma in RESIDUAL_SIGMAS.items()
    }


def judge_residual(size: Size, starts: Starts, runs: Runs) -> Verdict:
    """Whether the gradient changes less per layer with skips: at every scale, none or some."""
    change = {label: np.abs(values) for label, values in starts.items()}
    calmer = [
        name
        for name in RESIDUAL_SIGMAS
        if above(change[f"plain, {name}"], change[f"skips, {name}"])
    ]
    largest = max(float(values.mean()) for values in change.values())
    others = [name for name in RESIDUAL_SIGMAS if name not in calmer]
    because = (
        f"With skips the gradient changes less per layer at: {listed(calmer)}; at {listed(others)} "
        f"more, or as much. Over the four maps of five layers the largest change is "
        f"{4 * largest:.1f} nats: too few layers to explode or vanish."
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
    """Number of parameters of the 20-layer network, by the form of its skips."""
    found = {}
    for label, values in FORMS.items():
        model = models.build(start(size, size.deep, **values).model, 10)
        x = jnp.zeros((1, 64), jnp.float32)
        params = jax.eval_shape(lambda model=model, x=x: model.init(jax.random.key(0), x))["params"]
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
        found[label] = np.array([float(count)])
    return found


def judge_parameters(size: Size, starts: Starts, runs: Runs) -> Verdict:
    """Refuted where h + f(h) has as many parameters as f(h)."""
    count = {label: int(values[0]) for label, values in starts.items()}
    added = {label: n - count["plain"] for label, n in count.items() if label != "plain"}
    word = CONFIRMED if added["identity skips"] > 0 else REFUTED
    parts = [f"{label} {n:,}" for label, n in added.items()]
    because = f"Added to {count['plain']:,}: {'; '.join(parts)}."
    rows = [Row(k, float(n), float(n), float(n)) for k, n in count.items()]
    return Verdict(word, because, "parameters", rows)


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
    """Whether it raises the test accuracy of both networks, of neither, or of one.

    One is a sigmoid network whose gradient vanishes, the other is healthy.
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
    base = Experiment(task=Task(name="sequential_digits"))
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
    """Whether less of the gradient vanishes in the LSTM, for all pairs of gain and forget bias."""
    lost = {label: np.maximum(-values, 0.0) for label, values in starts.items()}
    rnns = [label for label in starts if label.startswith("RNN")]
    lstms = [label for label in starts if label.startswith("LSTM")]
    wins = {a: [b for b in rnns if above(lost[b], lost[a])] for a in lstms}
    parts = [f"{a}: {listed(found)}" for a, found in wins.items()]
    because = f"Less vanishes than in: {'; '.join(parts)}."
    word = three([b in wins[a] for a in lstms for b in rnns])
    return Verdict(word, because, "nats per time step", [mean(k, v) for k, v in starts.items()])


def _normalized(size: Size) -> dict:
    runs: dict = {}
    for label, sigma in (("exploding", STRONG), ("vanishing", WEAK)):
        failing = changed(size.base, model__sigma_w=sigma)
        rule = {"optimizer__clipping": "normalize_by_norm", "optimizer__max_norm": 1.0}
        runs |= tuned(f"{label}, untreated", failing, RATES[label])
        runs |= tuned(f"{label}, normalised", failing, RATES["unit_steps"], **rule)
    return runs


def judge_normalized(size: Size, starts: Starts, runs: Runs) -> Verdict:
    """Whether 90% of the seeds of both networks, neither or one train with normalised gradients."""
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
        f"Test accuracy: {'; '.join(parts)}; better: {listed(better)}. Dividing the whole gradient "
        "by its norm does not change the ratio of one layer's gradient to another's."
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
