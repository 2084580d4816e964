"""The validator: what a sweep may trace, what is converted and what is rejected."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradjax.experiment import config
from gradjax.experiment.schema import ConfigError, Experiment, Model


def refusal(call, *args):
    with pytest.raises(ConfigError) as caught:
        call(*args)
    return str(caught.value)


def test_check_judges_types_of_an_experiment_built_by_hand():
    config.check(Experiment(model=Model(sigma_w=2)))
    assert "model.depth = 10.5 is not an integer" in refusal(
        config.check, Experiment(model=Model(depth=10.5))
    )  # type: ignore


def test_replace_takes_tracers_for_floats_and_only_for_those():
    def both(sigma_w):
        experiment = config.replace(
            Experiment(), {"model.sigma_w": sigma_w, "model.dropout": sigma_w}
        )
        assert experiment.model.sigma_w is sigma_w
        return experiment.model.sigma_w * experiment.model.dropout

    values = jnp.arange(3.0)
    np.testing.assert_array_equal(jax.jit(jax.vmap(both))(values), values**2)
    for key in ("model.depth", "model.residual", "model.activation", "task.validation"):
        assert f"{key} = " in refusal(
            jax.jit(lambda x, key=key: config.replace(Experiment(), {key: x})), 1.0
        )


def test_replace_converts_and_refuses():
    experiment = config.replace(Experiment(), {"model.depth": 3, "model.sigma_w": 2, "name": "x"})
    assert (experiment.name, experiment.model) == ("x", Model(depth=3, sigma_w=2.0))
    assert type(experiment.model.sigma_w) is float
    message = refusal(config.replace, experiment, {"model.dept": 1, "model.width": "8"})
    assert "'model.depth'" in message and "model.width = '8' is not an integer" in message
    assert "not a table" in refusal(config.replace, experiment, {"model": Model()})


def test_what_a_sweep_may_trace_are_the_floats_that_are_not_static():
    names = config.sweepable()
    assert {
        "model.sigma_w",
        "model.dropout",
        "optimizer.learning_rate",
        "optimizer.weight_decay",
    } <= set(names)
    assert not {
        "model.depth",
        "model.residual",
        "task.validation",
        "train.target",
        "optimizer.name",
    } & set(names)


def test_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Experiment().model.depth = 3  # type: ignore
    assert hash(Experiment()) == hash(Experiment())


def test_only_a_default_of_none_may_be_left_out_of_toml():
    left_out = [key for key, value in config.flatten(Experiment()).items() if value is None]
    assert {"model.dropout", "optimizer.weight_decay"} <= set(left_out) <= set(config.sweepable())
    assert "dropout =" not in config.to_toml(Experiment())
    for key, value in config.flatten(Experiment()).items():
        if value is not None:
            assert "None" in refusal(config.replace, Experiment(), {key: None})
