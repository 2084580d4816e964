"""The catalogue of remedies: name -> change of a config, findings it is for, cost, reference.

    REMEDIES["critical_init"].change(experiment) -> experiment

Each change is a pure function config -> config and nothing else. A remedy that a network cannot
take (BatchNorm at batch size 1, a forget bias without gates) raises `NotApplicable` with the
reason; `apply` turns what `gradjax.config.check` rejects into one, too. A new remedy is one entry
here and one line in its test.

Costs are per training step unless they say otherwise. `gradjax.cure.find_cure` measures which
remedy helps which network.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from gradjax.experiment import config
from gradjax.experiment.schema import ConfigError, Experiment, Model, Optimizer

EXPLODING = ("exploding_gradients", "exploding_activations", "norm_overflow", "non_finite")
VANISHING = ("vanishing_gradients", "vanishing_activations")
SCALE = (*EXPLODING, *VANISHING)
CONDITION = ("ill_conditioned_jacobian", "shattered_gradients", "rank_collapse")
UNITS = ("saturated_units", "dead_units")
STEPS = ("unstable_step_size", "loss_spikes")
GATED = ("lstm", "gru", "minimal_rnn")
RECURRENT = ("rnn", "orthogonal_rnn", *GATED)
CONVOLUTIONAL = ("circular_cnn", "vgg", "resnet")

Change = Callable[[Experiment], Experiment]


class NotApplicable(ConfigError):
    """Why a remedy does not apply to a network."""


class Remedy(NamedTuple):
    """One entry of the catalogue.

    Attributes:
      change: the change of the config.
      description: what it changes, in one line.
      fits: the pathologies it is for.
      cost: per training step, unless it says otherwise.
      reference: author, year and where it was published.
    """

    change: Change
    description: str
    fits: tuple[str, ...]
    cost: str
    reference: str


# Changes


def _set(**values: Any) -> Change:
    """Other values under `table__name`."""
    return lambda experiment: _replace(
        experiment, {key.replace("__", "."): value for key, value in values.items()}
    )


def _replace(experiment: Experiment, values: dict[str, Any]) -> Experiment:
    """Other values under dotted keys; `NotApplicable` if the model lacks one of them."""
    from gradjax.experiment import models

    def takes(name: str) -> bool:
        return models.takes(experiment.model.name, name)

    if values.get("model.residual") and not takes("residual") and takes("residual_scale"):
        # This model always has skips, and no setting for them.
        values = {key: value for key, value in values.items() if key != "model.residual"}
    for key in values:
        table, _, name = key.partition(".")
        if table == "model" and not takes(name):
            raise NotApplicable(f"{experiment.model.name} has no {key}")
    return config.replace(experiment, values)


@functools.cache
def critical_point(activation: str, sigma_b: float) -> tuple[float, float]:
    """(sigma_w, sigma_b) with chi_1 = 1 at a stable length.

    Args:
      activation: its name.
      sigma_b: tried first, then some other values.

    Raises:
      NotApplicable: no critical point was found.
    """
    from gradjax.theory import meanfield

    for bias in dict.fromkeys((sigma_b, 0.0, 0.05**0.5, 0.5, 0.8, 1.0)):
        sigma_w = float(meanfield.critical_sigma_w(bias, activation))
        if not math.isfinite(sigma_w):
            continue
        if abs(float(meanfield.chi_1(sigma_w, bias, activation)) - 1.0) < 1e-2:
            return sigma_w, bias
    raise NotApplicable(f"{activation} has no critical point")


def _critical(experiment: Experiment, **more: Any) -> Experiment:
    activation = more.get("activation", experiment.model.activation)
    sigma_w, sigma_b = critical_point(activation, experiment.model.sigma_b)
    values = {"weights": "gaussian", "sigma_w": sigma_w, "sigma_b": sigma_b} | more
    return _replace(experiment, {f"model.{name}": value for name, value in values.items()})


def _orthogonal(experiment: Experiment) -> Experiment:
    return _critical(experiment, weights="orthogonal")


def _delta_orthogonal(experiment: Experiment) -> Experiment:
    return _critical(experiment, weights="delta_orthogonal")


def _activation(name: str, weights: str | None = None) -> Change:
    """Another activation with its own initialisation: a scheme, or its critical point."""
    if weights is None:
        return lambda experiment: _critical(experiment, activation=name)
    return _set(
        model__activation=name, model__weights=weights, model__sigma_w=1.0, model__sigma_b=0.0
    )


def _weights(name: str) -> Change:
    return _set(model__weights=name, model__sigma_w=1.0, model__sigma_b=0.0)


def _identity(experiment: Experiment) -> Experiment:
    return _replace(_weights("identity")(experiment), {"model.activation": "relu"})


def _scale_by_depth(experiment: Experiment) -> Experiment:
    scale = experiment.model.depth**-0.5
    return _replace(experiment, {"model.residual": True, "model.residual_scale": scale})


def _only(names: Iterable[str], change: Change, why: str) -> Change:
    """The change for some architectures only."""

    def guarded(experiment: Experiment) -> Experiment:
        if experiment.model.name not in names:
            raise NotApplicable(f"{experiment.model.name} {why}")
        return change(experiment)

    return guarded


def _cell(name: str) -> Change:
    """Another recurrent cell; settings that it does not have return to their defaults."""

    def change(experiment: Experiment) -> Experiment:
        from gradjax.experiment import models

        if experiment.model.name == name:
            raise NotApplicable(f"the network is {name} already")
        defaults = {f.name: f.default for f in dataclasses.fields(Model) if f.name != "name"}
        dropped = {k: v for k, v in defaults.items() if not models.takes(name, k)}
        # Unit recurrent gain.
        values: dict[str, Any] = {"name": name, **dropped, "sigma_w": 1.0, "sigma_b": 0.0}
        if name in GATED:
            values |= {"weights": "gaussian", "chrono": _longest(experiment)}
        return config.replace(experiment, {f"model.{k}": v for k, v in values.items()})

    return _only(RECURRENT, change, "is not recurrent")


def _longest(experiment: Experiment) -> float:
    """The longest time that chrono initialisation must cover: the length of the sequence."""
    from gradjax.experiment import tasks

    return float(max(tasks.length(experiment.task.name, experiment.task.seq_len), 3))


def _chrono(experiment: Experiment) -> Experiment:
    return _replace(experiment, {"model.chrono": _longest(experiment)})


def _clip(rule: str, threshold: float) -> Change:
    return _set(optimizer__clipping=rule, optimizer__max_norm=threshold)


def _optimizer(name: str, rate: float) -> Change:
    """Another optimiser at its authors' rate, with its other settings at their defaults."""

    def change(experiment: Experiment) -> Experiment:
        if experiment.optimizer.name == name:
            raise NotApplicable(f"the optimiser is {name} already; it is the rate that can change")
        own = {key: getattr(Optimizer, key) for key in ("momentum", "b2", "block", "order")}
        own |= {"name": name, "learning_rate": rate}
        return config.replace(experiment, {f"optimizer.{key}": value for key, value in own.items()})

    return change


def _lower_rate(experiment: Experiment) -> Experiment:
    rate = 0.1 * experiment.optimizer.learning_rate
    return config.replace(experiment, {"optimizer.learning_rate": rate})


# What a finding may also advise although no config can do it: changes of the user's code or data.
ADVICE = (
    "reset_optimizer_state", "check_data", "random_initialization", "qk_norm", "scale_logits",
    "zero_biases", "lower_input_frequency", "shallower_network", "use_the_layer",
    "remove_stop_gradient", "loss_scaling", "raise_max_norm", "lower_max_norm", "bfloat16",
    "loss_of_logits", "remove_clipping", "clip_without_that_leaf",
)  # fmt: skip


# The catalogue

FREE, LITTLE = "none", "below 5%"
NORM = "10 to 50%"

# fmt: off
REMEDIES: dict[str, Remedy] = {
    # initialisation
    "critical_init": Remedy(_critical, "sigma_w, sigma_b where chi_1 = 1 for the activation",
        (*SCALE, *UNITS, "shattered_gradients", "rank_collapse"), FREE,
        "Schoenholz 2017, arXiv 1611.01232"),
    "orthogonal_init": Remedy(_orthogonal,
        "orthogonal weights at the critical scale", (*SCALE, "ill_conditioned_jacobian"),
        "QR at the start", "Saxe 2013, arXiv 1312.6120"),
    "he_init": Remedy(_weights("he_normal"), "Var W = 2 / fan_in, zero biases", (*SCALE, *UNITS),
        FREE, "He 2015, arXiv 1502.01852"),
    "glorot_init": Remedy(_weights("glorot_normal"), "Var W = 2 / (fan_in + fan_out), zero biases",
        (*SCALE, "saturated_units"), FREE, "Glorot & Bengio 2010, AISTATS 9"),
    "lecun_init": Remedy(_weights("lecun_normal"), "Var W = 1 / fan_in, zero biases",
        (*EXPLODING, "saturated_units"), FREE, "LeCun 1998, Efficient BackProp"),
    "lsuv_init": Remedy(_weights("lsuv"), "orthogonal weights scaled to unit variance on a batch",
        (*SCALE, *UNITS), "one batch at the start", "Mishkin & Matas 2016, arXiv 1511.06422"),
    "delta_orthogonal_init": Remedy(
        _only(CONVOLUTIONAL, _delta_orthogonal, "has no stack of convolutions"),
        "orthogonal in the centre of each kernel, zero elsewhere",
        (*SCALE, "ill_conditioned_jacobian"), "QR at the start", "Xiao 2018, arXiv 1806.05393"),
    "identity_init": Remedy(_only(("rnn",), _identity, "is no plain recurrent network"),
        "IRNN: recurrent matrix = identity, ReLU", SCALE, FREE, "Le 2015, arXiv 1504.00941"),
    "forget_bias": Remedy(_set(model__forget_bias=1.0), "forget gates start open", VANISHING, FREE,
        "Jozefowicz 2015, ICML 37"),
    "chrono_init": Remedy(_chrono, "forget biases log U(1, seq_len - 1)", VANISHING, FREE,
        "Tallec & Ollivier 2018, arXiv 1804.11188"),
    # activation
    "relu": Remedy(_activation("relu", "he_normal"), "ReLU with He's start",
        (*VANISHING, "saturated_units"), FREE, "Glorot 2011, AISTATS 15"),
    "leaky_relu": Remedy(_activation("leaky_relu", "he_normal"), "slope .01 below 0, He's start",
        (*VANISHING, *UNITS), FREE, "Maas 2013, ICML 30"),
    "prelu": Remedy(_activation("prelu"), "ReLU with a learned negative slope, critical start",
        (*VANISHING, *UNITS), LITTLE, "He 2015, arXiv 1502.01852"),
    "elu": Remedy(_activation("elu"), "ELU at its critical point", (*VANISHING, *UNITS), LITTLE,
        "Clevert 2016, arXiv 1511.07289"),
    "selu": Remedy(_activation("selu", "lecun_normal"), "self-normalising units, LeCun's start",
        (*SCALE, *UNITS), LITTLE, "Klambauer 2017, arXiv 1706.02515"),
    "gelu": Remedy(_activation("gelu"), "GELU at its critical point", (*VANISHING, *UNITS), LITTLE,
        "Hendrycks 2016, arXiv 1606.08415"),
    "tanh": Remedy(_activation("tanh"), "tanh at its critical point", (*EXPLODING, "dead_units"),
        LITTLE, "Schoenholz 2017, arXiv 1611.01232"),
    "tailored_relu": Remedy(_activation("tailored_relu"),
        "leaky ReLU whose slope is tailored to the depth", (*SCALE, *CONDITION), FREE,
        "Zhang 2022, arXiv 2203.08120"),
    # normalisation
    "batchnorm": Remedy(_set(model__normalization="batchnorm"), "BatchNorm before the activation",
        (*SCALE, *UNITS), NORM, "Ioffe & Szegedy 2015, arXiv 1502.03167"),
    "layernorm": Remedy(_set(model__normalization="layernorm"), "LayerNorm before the activation",
        (*SCALE, *UNITS, "batchnorm_explosion", "residual_growth"), NORM,
        "Ba 2016, arXiv 1607.06450"),
    "rmsnorm": Remedy(_set(model__normalization="rmsnorm"), "RMSNorm before the activation",
        (*SCALE, "residual_growth"), NORM, "Zhang & Sennrich 2019, arXiv 1910.07467"),
    "weight_standardization": Remedy(_set(model__weight_standardization=True),
        "each unit's weights with mean 0 and a fixed variance", (*SCALE, *UNITS), LITTLE,
        "Qiao 2019, arXiv 1903.10520"),
    "no_norm": Remedy(_set(model__normalization="none"), "the normalisation taken out",
        ("batchnorm_explosion",), "saves it", "Yang 2019, arXiv 1902.08129"),
    # residual forms
    "residual": Remedy(_set(model__residual=True, model__residual_scale=1.0), "h + f(h)",
        (*VANISHING, *CONDITION, "batchnorm_explosion"), LITTLE, "He 2016, arXiv 1512.03385"),
    "residual_scaled": Remedy(_scale_by_depth, "h + f(h) / sqrt(depth)",
        (*SCALE, *CONDITION, "residual_growth", "batchnorm_explosion"), LITTLE,
        "Yang & Schoenholz 2017, arXiv 1712.08969; Hayou 2021, arXiv 2010.12859"),
    "rezero": Remedy(
        _set(model__residual=True, model__residual_scale=0.0, model__residual_learned=True),
        "h + a f(h), a learned from 0",
        (*SCALE, *CONDITION, "residual_growth", "batchnorm_explosion"), LITTLE,
        "Bachlechner 2020, arXiv 2003.04887; De & Smith 2020, arXiv 2002.10444"),
    "fixup": Remedy(_set(model__residual=True, model__fixup=True, model__normalization="none"),
        "branches that start at 0 and scale with the depth",
        (*SCALE, "residual_growth", "batchnorm_explosion"), "two maps per branch",
        "Zhang 2019, arXiv 1901.09321"),
    "pre_norm": Remedy(_set(model__placement="pre"), "LayerNorm on the branch, not after the sum",
        (*SCALE, "rank_collapse"), FREE, "Xiong 2020, arXiv 2002.04745"),
    "deepnorm": Remedy(_set(model__placement="deepnorm"),
        "skips times (2N)^1/4, branches started smaller",
        (*SCALE, "residual_growth", "rank_collapse"), FREE, "Wang 2022, arXiv 2203.00555"),
    # gating
    "highway": Remedy(_set(model__highway=True), "a learned gate between the layer and its input",
        (*SCALE, *CONDITION), "twice the weights", "Srivastava 2015, arXiv 1505.00387"),
    "lstm": Remedy(_cell("lstm"), "LSTM cells, chrono start", SCALE, "four times the weights",
        "Hochreiter & Schmidhuber 1997"),
    "gru": Remedy(_cell("gru"), "GRU cells, chrono start", SCALE, "three times the weights",
        "Cho 2014, arXiv 1406.1078"),
    "minimal_rnn": Remedy(_cell("minimal_rnn"), "minimalRNN cells, chrono start", SCALE,
        "twice the weights", "Chen 2018, arXiv 1806.05394"),
    "orthogonal_rnn": Remedy(_cell("orthogonal_rnn"), "a recurrent matrix that stays orthogonal",
        SCALE, "a matrix function per step",
        "Arjovsky 2016, arXiv 1511.06464; Lezcano-Casado 2019, arXiv 1901.08428"),
    # the gradient
    "clip_by_global_norm": Remedy(_clip("clip_by_global_norm", 1.0),
        "gradients of norm above 1 are scaled to it", (*EXPLODING, *STEPS), LITTLE,
        "Pascanu 2013, arXiv 1211.5063"),
    "clip": Remedy(_clip("clip", 0.1), "entries of the gradient within +-.1", (*EXPLODING, *STEPS),
        LITTLE, "Mikolov 2012, thesis"),
    "adaptive_grad_clip": Remedy(_clip("adaptive_grad_clip", 0.01),
        "a unit's gradient at most .01 of its weights", (*EXPLODING, *STEPS), LITTLE,
        "Brock 2021, arXiv 2102.06171"),
    "autoclip": Remedy(_clip("autoclip", 1.0), "clipping at the 10th percentile of past norms",
        (*EXPLODING, *STEPS, "clipping_always", "clipping_never"), LITTLE,
        "Seetharaman 2020, arXiv 2007.14469"),
    "zclip": Remedy(_clip("zclip", 1.0), "spikes of the norm scaled down", (*EXPLODING, *STEPS),
        LITTLE, "2025, arXiv 2504.02507"),
    "gradient_normalization": Remedy(_clip("normalize_by_norm", 1.0),
        "every gradient scaled to norm 1", SCALE, LITTLE, "Hazan 2015, arXiv 1507.02030"),
    "skip_spikes": Remedy(_set(optimizer__guard="skip_spikes"),
        "steps of outlying norm are left out", ("loss_spikes", "non_finite"), LITTLE,
        "Chowdhery 2022, arXiv 2204.02311"),
    "skip_non_finite": Remedy(_set(optimizer__guard="skip_non_finite"),
        "steps with inf or NaN are left out", ("non_finite", "frozen_optimizer"), LITTLE,
        "Micikevicius 2018, arXiv 1710.03740"),
    "restore_moments": Remedy(_set(optimizer__guard="restore_moments"),
        "the optimiser's moments go back with the parameters", ("frozen_optimizer", "loss_spikes"),
        LITTLE, "gradjax.transforms.restore_moments"),
    # optimisers and schedules
    "adam": Remedy(_optimizer("adam", 1e-3), "Adam at 1e-3", (*SCALE, *STEPS, *UNITS),
        "two moments per weight", "Kingma & Ba 2015, arXiv 1412.6980"),
    "nadam": Remedy(_optimizer("nadam", 1e-3), "Adam with Nesterov's momentum", (*SCALE, *STEPS),
        "two moments per weight", "Dozat 2016"),
    "rmsprop": Remedy(_optimizer("rmsprop", 1e-3), "RMSprop at 1e-3", (*SCALE, *STEPS),
        "one moment per weight", "Tieleman & Hinton 2012"),
    "adagrad": Remedy(_optimizer("adagrad", 1e-2), "AdaGrad at 1e-2", (*SCALE, *STEPS),
        "one moment per weight", "Duchi 2011, JMLR 12"),
    "lion": Remedy(_optimizer("lion", 1e-4), "signs of momentum at 1e-4", (*SCALE, *STEPS),
        "one moment per weight", "Chen 2023, arXiv 2302.06675"),
    "muon": Remedy(_optimizer("muon", 2e-2), "orthogonalised momentum at .02",
        (*SCALE, "ill_conditioned_jacobian"), "Newton-Schulz", "Jordan 2024"),
    "warmup": Remedy(_set(optimizer__warmup=0.1), "the rate rises over the first tenth",
        (*EXPLODING, *STEPS, "attention_logit_growth"), FREE, "Goyal 2017, arXiv 1706.02677"),
    "growth_limited_warmup": Remedy(
        _set(optimizer__schedule="growth_limited", optimizer__decay=Optimizer.decay),
        "the rate grows by a factor per step, from .001 of it, over the first tenth",
        (*EXPLODING, *STEPS), FREE, "Gilmer 2021, arXiv 2110.04369; Kalra 2024, arXiv 2406.09405"),
    "cosine": Remedy(_set(optimizer__schedule="cosine"), "the rate falls as a cosine", STEPS, FREE,
        "Loshchilov 2017, arXiv 1608.03983"),
    "lower_learning_rate": Remedy(_lower_rate, "a tenth of the rate",
        (*EXPLODING, *STEPS, "dead_units", "attention_logit_growth"), "more steps", "LeCun 1998"),
    # regularisation and data
    "l2": Remedy(_set(optimizer__l2=1e-4), "1e-4 W added to the gradient", EXPLODING, LITTLE,
        "Krogh & Hertz 1991"),
    "l1": Remedy(_set(optimizer__l1=1e-5), "1e-5 sign W added to the gradient", EXPLODING, LITTLE,
        "Tibshirani 1996"),
    "weight_decay": Remedy(_set(optimizer__weight_decay=1e-2), "decoupled decay", EXPLODING, LITTLE,
        "Loshchilov 2019, arXiv 1711.05101"),
    "max_norm": Remedy(_set(optimizer__weight_norm=2.0), "a unit's weights have norm 2 at most",
        EXPLODING, LITTLE, "Srivastava 2014, JMLR 15"),
    "weight_clip": Remedy(_set(optimizer__weight_clip=0.1), "weights within +-.1", EXPLODING,
        LITTLE, "Arjovsky 2017, arXiv 1701.07875"),
    "dropout": Remedy(_set(model__dropout=0.2), "a fifth of the units dropped", (), LITTLE,
        "Srivastava 2014, JMLR 15"),
    "pretrain_rbm": Remedy(_set(train__pretrain="rbm"),
        "greedy pre-training by restricted Boltzmann machines", (*VANISHING, "saturated_units"),
        "its steps, per layer", "Hinton 2006, Neural Computation 18"),
    "pretrain_autoencoder": Remedy(_set(train__pretrain="autoencoder"),
        "greedy pre-training by denoising autoencoders", (*VANISHING, "saturated_units"),
        "its steps, per layer", "Vincent 2008, ICML 25"),
    "normalize_inputs": Remedy(_set(task__normalize="standard"), "inputs of mean 0 and variance 1",
        ("saturated_units", "non_finite"), FREE, "LeCun 1998"),
}
# fmt: on


def check_names(names: Iterable[str]) -> None:
    """Check that every name, or part of `a+b`, is a remedy.

    Raises:
      ConfigError: the first one that is not, with the nearest name.
    """
    for part in (part for name in names for part in name.split("+")):
        if part not in REMEDIES:
            near = config.nearest(part, {n: n for n in REMEDIES})
            raise ConfigError(
                f"cure: unknown remedy {part!r}{near}; `gradjax cure --list` shows them"
            )


def apply(name: str, experiment: Experiment) -> Experiment:
    """The experiment with a remedy, checked; `a+b` applies two in turn.

    Raises:
      NotApplicable: the network cannot take the remedy, or has it already; with the reason.
      ConfigError: an unknown name.

    >>> apply("residual_scaled", config.Experiment()).model.residual
    True
    """
    check_names([name])
    treated = experiment
    for part in name.split("+"):
        treated = REMEDIES[part].change(treated)
    if treated == experiment:
        raise NotApplicable("the network has it already")
    try:
        config.check(treated)
    except ConfigError as error:
        raise NotApplicable(str(error).removeprefix("config: ")) from None
    return treated


def fitting(pathologies: Iterable[str]) -> list[str]:
    """The remedies for any of the pathologies, in their order; all remedies if none is given."""
    found = [name for p in pathologies for name, remedy in REMEDIES.items() if p in remedy.fits]
    return list(dict.fromkeys(found)) or list(REMEDIES)
