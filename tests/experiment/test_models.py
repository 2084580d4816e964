"""The contract of every model: a new one is one line in `CASES`."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from model_contract import (
    OUTPUTS,
    apply,
    build,
    check_contract,
    check_spectrum,
    example_of,
    run,
    settings_of,
    started,
)

from gradjax.core.step import check_step
from gradjax.experiment import config, models
from gradjax.experiment.models.network import Network
from gradjax.experiment.schema import Model

RELU = {"activation": "relu", "sigma_w": 2**0.5, "sigma_b": 0.0}
BATCHNORM = {**RELU, "normalization": "batchnorm"}
BRANCH = {"residual": True, "residual_scale": 0.3}
LEARNED = {"residual_learned": True, "residual_scale": 0.5}
# model -> the settings of its cases; those that it takes of `SMALL` come first
SMALL = {"depth": 3, "width": 8, "num_heads": 2, "sigma_w": 1.2, "sigma_b": 0.1}
CASES = {
    "mlp": [
        {},
        {**BRANCH, "bottleneck": 5, "normalization": "rmsnorm", "remat": True},
        {"normalization": "batchnorm", "activation": "prelu", "highway": True},
        {"depth": 1},
        BRANCH,
        {"residual": True, **LEARNED},
        {"normalization": "layernorm"},
        {"weight_standardization": True, "activation": "tailored_relu"},
        {"dropout": 0.3},
        {"dropout": 0.3, "dropout_on": "last", "residual": True},
        {"weights": "lsuv"},
    ],
    "rnn": [
        {**BRANCH, "activation": "prelu"},
        {"depth": 2, "residual": True, "dropout": 0.3, "normalization": "rmsnorm"},
    ],
    "orthogonal_rnn": [{}],
    "lstm": [
        {"depth": 2, "normalization": "layernorm", "weights": "orthogonal", "forget_bias": 1.0}
    ],
    "gru": [{"depth": 1, "chrono": 20.0}],
    "minimal_rnn": [{"depth": 1, "forget_bias": 1.0}],
    "transformer": [
        {"placement": "post", "normalization": "rmsnorm", **LEARNED},
        {"placement": "pre", "normalization": "layernorm", "dropout": 0.1},
        {"placement": "deepnorm", "normalization": "layernorm", "weights": "orthogonal"},
    ],
    "lenet5": [RELU, {"weights": "lsuv", "dropout": 0.2}],
    "alexnet": [{"width": 3, "dropout": 0.5, **RELU}],
    "vgg": [{"depth": 7, "width": 2, **BATCHNORM}],
    "resnet": [
        {"depth": 2, "width": 4, **BATCHNORM},
        {"depth": 4, "width": 4, **RELU, **LEARNED},
    ],
    "densenet": [{"depth": 4, "width": 4, **BATCHNORM}],
    "inception": [{**RELU, "depth": 2, "weights": "orthogonal"}],
    "circular_cnn": [
        {"width": 4, "weights": "delta_orthogonal"},
        {"depth": 1, "width": 4, "weight_standardization": True},
    ],
    "gcn": [
        {},
        {"residual": True, **LEARNED},
        {"depth": 1, "normalization": "layernorm"},
    ],
}
SPECTRA = {
    "mlp": [{**BRANCH, "bottleneck": 5}, {"highway": True}],
    "lstm": [{"depth": 2}],
    "transformer": [{}],
    "resnet": [{"depth": 2, "width": 2}],
    "lenet5": [{}],
    "alexnet": [{"width": 1}],
    "vgg": [{"width": 2}],
    "densenet": [{"depth": 2, "width": 2}],
    "inception": [{"depth": 2}],
}
PER_STEP = [name for name in models.MODELS if models.takes(name, "per_step")]


def small(name, **settings):
    """The settings of a case, with those of `SMALL` that the model takes."""
    return {k: v for k, v in SMALL.items() if models.takes(name, k)} | settings


def rows(table):
    return [
        pytest.param(name, small(name, **case), id=f"{name}-{'-'.join(case) or 'plain'}")
        for name, cases in table.items()
        for case in cases
    ]


@pytest.fixture
def key():
    """Of XLA's own generator, which compiles three times as fast as Threefry."""
    return jax.random.key(0, impl="unsafe_rbg")


@pytest.mark.parametrize("name", models.MODELS)
def test_shapes_with_all_floats_traced(name, key):
    """What needs no compilation: network and links are traced, in both modes, and fit."""
    settings = settings_of(name, **small(name, **CASES[name][0]))
    x, _ = example_of(models.build(settings, OUTPUTS), key)
    fields = [f for f in dataclasses.fields(Model) if models.takes(name, f.name)]
    floats = {f.name: 2.5 if f.name == "chrono" else 0.5 for f in fields if "float" in str(f.type)}
    assert "sigma_w" in floats

    def traced(floats, key):
        model = models.build(dataclasses.replace(settings, **floats), OUTPUTS)
        variables = started(model, key, x)
        h0, links = model.links(variables, x, key)
        assert check_step(links, h0) >= 2
        network = [apply(model, variables, x, key, train) for train in (True, False)]
        return [*network, run(h0, links)]

    shapes = [out.shape for out in jax.eval_shape(traced, floats, key)]
    assert shapes == [(len(x), OUTPUTS)] * 3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), rows(CASES))
def test_contract(name, settings, key):
    model = build(name, **settings)
    x, y = example_of(model, key)
    check_contract(model, x, key, y)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm", "transformer", "gcn"])
def test_contract_per_step(name, key):
    """Tokens for sequence models, nodes for graphs."""
    model = build(name, per_step=True, **small(name, depth=2))
    x, y = example_of(model, key)
    if name != "gcn":
        x = jax.random.randint(key, (4, 6), 0, OUTPUTS)
        y = jnp.roll(x, -1, axis=1)
    check_contract(model, x, key, y)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), rows(SPECTRA))
def test_spectrum(name, settings, key):
    model = build(name, **settings)
    check_spectrum(model, example_of(model, key)[0], key)


@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        "transformer",
        *[
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("vgg", "resnet", "inception", "circular_cnn", "gcn")
        ],
    ],
)
def test_the_size_of_the_program_does_not_depend_on_depth(name, key):
    def size(depth):
        model = build(name, **small(name, depth=depth))
        x, _ = example_of(model, key)
        return str(jax.make_jaxpr(lambda key: started(model, key, x))(key)).count(" = ")

    assert size(60) == size(600)


def test_the_size_of_the_program_does_not_depend_on_time(key):
    model = build("lstm", **small("lstm", depth=1))

    def size(seq_len):
        x = jnp.zeros((2, seq_len, 3))
        return str(jax.make_jaxpr(lambda key: started(model, key, x))(key)).count(" = ")

    assert size(1000) == size(10)


# The table of models


class Misspelt(Network, kw_only=True):
    depth: int
    resdual_scale: float = 1.0


def test_a_misspelt_field_names_the_nearest_setting():
    with pytest.raises(TypeError, match=r"Misspelt has a field 'resdual_scale'.*'residual_scale'"):
        models.check_fields(Misspelt, {})
    models.check_fields(Misspelt, {"resdual_scale": 2.0})


def test_only_gated_cells_have_gates():
    for name in ("rnn", "orthogonal_rnn", "transformer", "mlp"):
        assert not models.takes(name, "chrono") and not models.takes(name, "forget_bias")
        with pytest.raises(ValueError, match=r"model\.chrono = 20\.0 means nothing to model\.name"):
            build(name, chrono=20.0)
    for name in ("lstm", "gru", "minimal_rnn"):
        assert models.takes(name, "chrono") and models.takes(name, "forget_bias")
    assert not models.takes("rnn", "cell") and not models.takes("orthogonal_rnn", "weights")
    assert not models.takes("transformer", "weight_standardization")


def test_a_target_per_step_needs_a_model_that_gives_one():
    assert PER_STEP == [
        "rnn", "orthogonal_rnn", "lstm", "gru", "minimal_rnn", "transformer", "gcn"
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"mlp gives one answer per example.*choose one of rnn,"):
        build("mlp", per_step=True)


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("mlp", {"fixup": True}, "model.fixup shapes residual branches"),
        ("mlp", {"bottleneck": 4}, "model.bottleneck shapes residual branches"),
        ("mlp", {"residual_learned": True}, "model.residual_learned shapes"),
        ("mlp", {"highway": True, "residual": True}, "highway = true is a gate in the skip's"),
        (
            "mlp",
            {"fixup": True, "residual": True, "normalization": "layernorm"},
            "in normalisation's place",
        ),
        ("mlp", {"weights": "lsuv", "weight_standardization": True}, "choose one of the two"),
        ("resnet", {"fixup": True, "normalization": "batchnorm"}, "in normalisation's place"),
        ("inception", {"width": 7}, "its four branches need 8 channels"),
        ("rnn", {"weights": "lsuv"}, "a recurrence has no lsuv"),
        ("rnn", {"normalization": "batchnorm"}, "has no batchnorm"),
        ("transformer", {"normalization": "batchnorm"}, "has no batchnorm"),
        ("transformer", {"num_heads": 3}, "3 heads do not divide a width of 8"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(name, settings, reason, key):
    """By the config before anything is compiled, and by the module itself."""
    with pytest.raises(config.ConfigError, match=reason):
        build(name, **small(name, **settings))
    model = models.build(dataclasses.replace(Model(name=name, depth=2, width=8), **settings), 5)
    with pytest.raises(ValueError, match=reason):
        for x in (jnp.zeros((4, 6, 3)), jnp.zeros((4, 64))):
            if name not in ("mlp", "resnet", "inception") or x.ndim == 2:
                jax.eval_shape(lambda x=x: started(model, key, x))


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("lenet5", (2, 65), "no square image"),
        ("gcn", (2, 64), "a graph is"),
        ("rnn", (4, 64), r"rnn needs sequences \(batch, seq_len, features\).*got float32 of shape"),
        ("transformer", (4, 64), r"transformer needs sequences.*got float32 of shape"),
    ],
)
def test_data_of_another_kind_are_refused(name, shape, reason, key):
    model = build(name, **small(name))
    with pytest.raises(ValueError, match=reason):
        jax.eval_shape(lambda: started(model, key, jnp.zeros(shape)))


@pytest.mark.parametrize("name", ["mlp", "lenet5", "rnn", "transformer"])
def test_links_of_a_network_with_dropout_need_a_key(name, key):
    model = build(name, **small(name, dropout=0.1))
    x, _ = example_of(model, key)
    with pytest.raises(ValueError, match=r"key=jax\.random\.key"):
        jax.eval_shape(lambda: model.links(started(model, key, x), x)[0])


def test_running_statistics_are_learnt_in_every_layer_of_a_stack(key):
    model = build("mlp", **small("mlp", normalization="batchnorm", depth=6, width=16))
    x = jax.random.normal(key, (8, 24))

    @jax.jit
    def both(key, x):
        variables = started(model, key, x)
        changed = model.apply(variables, x, train=True, mutable=["batch_stats"])[1]
        return [tree["batch_stats"]["layers"]["norm"]["mean"] for tree in (variables, changed)]

    before, after = both(key, x)
    assert after.shape == (5, 16) and (before != after).all()


def test_a_layer_of_linen_may_be_a_part(key):
    """A network needs nothing of ours but a module that is called as (h, train)."""

    class One(nn.Module):
        width: int

        @nn.compact
        def __call__(self, h, train):
            return nn.tanh(nn.Dense(self.width)(h))

    from gradjax.experiment.models.network import Readout, part

    class Plain(Network, kw_only=True):
        width: int

        def _parts(self, x):
            return [part("layer", self, One), part("readout", self, Readout)]

    model = Plain(num_outputs=OUTPUTS, width=4)
    x = jax.random.normal(key, (3, 7))
    assert jax.eval_shape(lambda: run(*model.links(started(model, key, x), x))).shape == (3, 5)
