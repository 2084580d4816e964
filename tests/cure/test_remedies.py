"""The catalogue: each entry is a pure function config -> config that a network takes or refuses
with a reason."""

import jax
import jax.numpy as jnp
import pytest

from gradjax.cure import remedies
from gradjax.cure.remedies import ADVICE, REMEDIES, NotApplicable
from gradjax.diagnosis.rules import BY_NAME, CAUSAL
from gradjax.experiment import config, models, tasks, training
from gradjax.experiment.schema import ConfigError, Experiment
from gradjax.theory import meanfield


def network(name: str, **settings) -> Experiment:
    """A checked config of the architecture with its own defaults."""
    values = {"model.name": name, "model.depth": 4, "model.width": 16} | settings
    values = {
        k: v
        for k, v in values.items()
        if k == "model.name" or models.takes(name, k.removeprefix("model."))
    }
    return config.replace(Experiment(), values)


FLOATS = set(config.sweepable())
NETWORKS = {name: network(name) for name in models.MODELS}


def outcome(name: str, experiment: Experiment) -> Experiment | str:
    try:
        return remedies.apply(name, experiment)
    except NotApplicable as reason:
        return str(reason)


# Each compiles mean-field functions of its own; `tanh` takes the same path.
COMPILES = ("gelu", "elu", "prelu", "tailored_relu")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in COMPILES else n for n in REMEDIES],
)
def test_a_remedy_changes_some_network_and_is_refused_with_a_reason_by_the_others(name):
    remedy = REMEDIES[name]
    assert remedy.description and remedy.cost and remedy.reference
    assert set(remedy.fits) <= set(CAUSAL)
    # some entries repair what the plain networks do not have wrong
    special = {
        "no_norm": network("mlp", **{"model.normalization": "batchnorm"}),
        "normalize_inputs": config.replace(NETWORKS["mlp"], {"task.normalize": "none"}),
        "adam": config.replace(NETWORKS["mlp"], {"optimizer.name": "sgd"}),
        "pretrain_rbm": network("mlp", **{"model.activation": "sigmoid"}),
        "pre_norm": network("transformer", **{"model.placement": "post"})
        if "transformer" in NETWORKS
        else None,
    }
    tried = {**NETWORKS, "special": special.get(name) or NETWORKS["mlp"]}
    changed = 0
    for experiment in tried.values():
        before = config.to_toml(experiment)
        treated = outcome(name, experiment)
        assert config.to_toml(experiment) == before
        if isinstance(treated, str):
            assert len(treated) > 10
        else:
            changed += 1
            config.check(treated)
            assert treated != experiment
            assert remedies.apply(name, experiment) == treated
    assert changed


def test_every_pathology_that_training_can_cure_has_remedies():
    without = [p for p in CAUSAL if not any(p in remedy.fits for remedy in REMEDIES.values())]
    # the user's code is at fault
    in_code = {"symmetric_units", "untrained_layer", "gradient_underflow", "flat_loss"}
    assert set(without) == in_code


def test_what_findings_advise_is_in_the_catalogue_or_the_users_to_do():
    for pathology, entry in BY_NAME.items():
        names = entry.remedies
        assert set().union(*entry.by_cause.values()) <= set(REMEDIES) | set(ADVICE)
        assert set(names) <= set(REMEDIES) | set(ADVICE)
        assert not [
            name for name in names if name in REMEDIES and pathology not in REMEDIES[name].fits
        ]


def test_the_remedies_of_the_first_finding_come_first():
    names = remedies.fitting(["vanishing_gradients", "loss_spikes"])
    assert names.index("critical_init") < names.index("skip_spikes")
    assert len(names) == len(set(names))
    assert remedies.fitting([]) == list(REMEDIES)


def check_initialises(model):
    """What `apply` accepts is never refused later, when a whole comparison would be lost."""
    x = {"gcn": (2, 6, 10)}.get(model, (2, 8, 3) if models.takes(model, "per_step") else (2, 64))
    pairs = ["lsuv_init+weight_standardization", "batchnorm+residual", "fixup+layernorm"]
    seen = set()
    for name in [*REMEDIES, *pairs]:
        treated = outcome(name, config.replace(NETWORKS[model], {"task.batch_size": 2}))
        if isinstance(treated, str):
            continue
        # The values of floats decide nothing about whether there is such a network.
        values = config.flatten(treated).items()
        kind = tuple(
            (k, v is None if k in FLOATS else v)
            for k, v in values
            if k.startswith(("model.", "train.pretrain"))
        )
        if kind in seen:
            continue
        seen.add(kind)
        y = jnp.zeros((2, x[1]) if model == "gcn" else 2, jnp.int32)
        splits = tasks.Splits(*[tasks.Split(jnp.zeros(x), y)] * 3)
        network = models.build(treated.model, 3, model == "gcn")

        def start(key, network=network, treated=treated, train=splits.train):
            return training.start(key, network, treated, train, train)

        jax.eval_shape(start, jax.random.key(0))


def test_what_is_accepted_can_be_initialised():
    check_initialises("mlp")


@pytest.mark.slow
@pytest.mark.parametrize("model", [name for name in models.MODELS if name != "mlp"])
def test_what_is_accepted_can_be_initialised_by_every_model(model):
    check_initialises(model)


def test_what_sequence_models_cannot_have_is_left_out_with_the_reason():
    for model in ("rnn", "lstm", "transformer"):
        assert "has no batchnorm" in outcome("batchnorm", NETWORKS[model])
    assert "has no lsuv" in outcome("lsuv_init", NETWORKS["gru"])
    assert "takes it away again" in outcome("lsuv_init+weight_standardization", NETWORKS["mlp"])
    assert "in normalisation's place" in outcome(
        "layernorm", remedies.apply("fixup", NETWORKS["resnet"])
    )


def test_networks_that_always_have_skips_take_their_scales():
    for model in ("resnet", "transformer"):
        scaled, zero = (outcome(name, NETWORKS[model]) for name in ("residual_scaled", "rezero"))
        assert (
            scaled.model.residual_scale == 0.5
            and zero.model.residual_learned
            and zero.model.residual_scale == 0
        )
    assert outcome("fixup", NETWORKS["resnet"]).model.fixup
    assert "already" in outcome("residual", NETWORKS["resnet"])


def test_another_cell_starts_at_unit_gain_and_remembers_the_whole_sequence():
    rnn = network("rnn", **{"model.sigma_w": 0.5, "model.sigma_b": 0.3})
    for cell in ("lstm", "gru", "minimal_rnn", "orthogonal_rnn"):
        treated = outcome(cell, rnn)
        assert (treated.model.sigma_w, treated.model.sigma_b) == (1.0, 0.0)
    pixels = {"task.name": "sequential_mnist"}
    assert outcome("lstm", config.replace(rnn, pixels)).model.chrono == 784
    assert outcome("chrono_init", config.replace(NETWORKS["gru"], pixels)).model.chrono == 784
    copied = config.replace(NETWORKS["lstm"], {"task.name": "copy_memory", "task.seq_len": 50})
    assert outcome("chrono_init", copied).model.chrono == 70


def test_another_optimizer_leaves_nothing_of_the_one_before():
    own = {
        "optimizer.name": "coordinate",
        "optimizer.block": "coordinate",
        "optimizer.order": "random",
    }
    treated = outcome("adam", config.replace(NETWORKS["mlp"], own))
    assert treated.optimizer == config.Optimizer(name="adam", learning_rate=1e-3)
    assert "adam already" in outcome("adam", NETWORKS["mlp"])
    cosine = config.replace(
        NETWORKS["mlp"], {"optimizer.schedule": "cosine", "optimizer.decay": 0.01}
    )
    assert outcome("growth_limited_warmup", cosine).optimizer.decay == 0.1


def test_two_remedies_in_turn():
    both = remedies.apply("residual+clip_by_global_norm", NETWORKS["mlp"])
    assert both.model.residual and both.optimizer.clipping == "clip_by_global_norm"


def test_critical_init_is_the_critical_point():
    treated = remedies.apply("critical_init", config.replace(Experiment(), {"model.sigma_w": 2.0}))
    assert treated.model.sigma_w**2 == pytest.approx(
        1.76095, rel=1e-4
    )  # Schoenholz 2017 at sigma_b^2 = .05
    relu = config.replace(Experiment(), {"model.activation": "relu", "model.sigma_b": 0.0})
    assert remedies.apply("critical_init", relu).model.sigma_w == pytest.approx(2**0.5)


@pytest.mark.parametrize(
    "activation",
    [
        "tanh",
        *(
            pytest.param(a, marks=pytest.mark.slow)
            for a in ("relu", "gelu", "silu", "elu", "sigmoid", "prelu")
        ),
    ],
)
def test_the_critical_point_keeps_its_length(activation):
    sigma_w, sigma_b = remedies.critical_point(activation, 0.1)
    assert float(meanfield.chi_1(sigma_w, sigma_b, activation)) == pytest.approx(1.0, abs=1e-2)


@pytest.mark.slow
def test_softplus_has_no_critical_point():
    with pytest.raises(NotApplicable, match="softplus has no critical point"):
        remedies.critical_point("softplus", 0.1)


def test_what_cannot_apply_says_why():
    one = config.replace(NETWORKS["mlp"], {"task.batch_size": 1})
    assert "no variance" in outcome("batchnorm", one)
    assert "no model.forget_bias" in outcome("forget_bias", NETWORKS["mlp"])
    assert "already" in outcome(
        "tanh", remedies.apply("tanh", config.replace(Experiment(), {"model.sigma_w": 3.0}))
    )
    assert "not recurrent" in outcome("lstm", NETWORKS["mlp"])


def test_an_unknown_remedy_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'batchnorm'"):
        remedies.apply("batch_norm", NETWORKS["mlp"])
