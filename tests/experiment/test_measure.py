"""Configured networks get their verdict, and what is measured does not depend on num_seeds."""

import json

import numpy as np
import pytest

from gradjax.diagnosis.verdict import judge
from gradjax.experiment import config
from gradjax.experiment.measure import examine, measure

SMALL = {
    "model.width": 64,
    "task.batch_size": 16,
    "diagnose.num_seeds": 3,
    "diagnose.spectrum_seeds": 2,
}
CRITICAL_TANH = {"model.sigma_w": 1.32701}
HE = {"model.activation": "relu", "model.sigma_w": 2**0.5, "model.sigma_b": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "pathology"),
    [
        ({"model.sigma_w": 2.5}, "exploding_gradients"),
        ({"model.sigma_w": 1.0}, "vanishing_gradients"),
        (CRITICAL_TANH, None),
        (HE, None),
        ({"model.normalization": "batchnorm", **HE}, "batchnorm_explosion"),
        ({"model.normalization": "layernorm", "model.sigma_w": 2.5}, None),
        ({"model.residual": True, "model.residual_scale": 0.1, **CRITICAL_TANH}, None),
        ({**HE, "model.sigma_w": 9.0}, "exploding_activations"),
        ({**HE, "model.depth": 1}, None),
    ],
)
def test_networks_get_their_verdict(values, pathology):
    experiment = config.replace(config.Experiment(), {"model.depth": 60, **SMALL, **values})
    ds, evidence = examine(experiment)
    verdict = judge(evidence, ds, {"seed": 0})
    names = [f.pathology for f in verdict.findings[:1]]
    assert names == ([pathology] if pathology else []), str(verdict)
    record = json.loads(verdict.to_json())
    assert record["healthy"] == verdict.healthy
    no_theory = "model.normalization" in values
    assert bool(record["theory"]["note"]) == no_theory == ("theory_log_gain" not in ds)
    assert len(record["layers"]) == experiment.model.depth
    has_product = not no_theory and experiment.model.depth > 1
    if has_product:
        assert len(record["product"]["log_singular_values"]) == 64


@pytest.mark.slow
def test_a_seed_is_the_same_network_whatever_their_number():
    values = {"model.depth": 10, **SMALL, "diagnose.spectrum_seeds": 0}
    experiment = config.replace(config.Experiment(), values)
    three = measure(experiment)
    five = measure(config.replace(experiment, {"diagnose.num_seeds": 5}))
    np.testing.assert_allclose(three.log_cotangent_rms, five.log_cotangent_rms[:3], atol=1e-5)


@pytest.mark.slow
def test_what_is_too_expensive_is_absent_and_said():
    values = {"model.depth": 4, "model.normalization": "batchnorm", "task.batch_size": 64}
    ds, evidence = examine(config.replace(config.Experiment(), {**SMALL, **values}))
    assert "log_singular_values" not in ds and "4096" in ds.attrs["left_out"]
    assert json.loads(judge(evidence, ds).to_json())["product"]["log_singular_values"] is None


@pytest.mark.slow
def test_a_healthy_he_network_is_not_flagged_for_its_fluctuations():
    values = {"model.depth": 50, "model.width": 100, "diagnose.spectrum_seeds": 0}
    values |= {**HE, "diagnose.num_seeds": 20}
    ds, evidence = examine(config.replace(config.Experiment(), values))
    assert len(evidence) == 20
    for seed in evidence:
        assert judge([seed], ds).healthy
