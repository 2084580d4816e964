"""The verdict as an object, as words and as JSON; over seeds; and without the `lab` extra."""

import json
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pathologies.synthetic import evidence

import gradjax
from gradjax.core.extras import LAB
from gradjax.diagnosis import measurements, verdict
from gradjax.diagnosis.rules import findings


def test_a_finding_of_half_of_the_seeds_stays_and_a_broken_seed_always():
    exploding, healthy = evidence([0.3] * 99), evidence([0.0] * 99)
    broken = replace(healthy, loss=np.nan)

    def vote(*seeds):
        return verdict.vote([findings(e, None) for e in seeds])

    assert [f.pathology for f in vote(exploding, healthy)] == ["exploding_gradients"]
    assert not vote(exploding, healthy, healthy)
    assert [f.pathology for f in vote(healthy, healthy, broken)] == ["non_finite"]
    (kept,) = vote(exploding, exploding, healthy)
    assert kept.evidence["fraction_of_seeds"] == 2 / 3


def test_the_json_is_json_and_has_the_names_that_others_build_on():
    growth = np.zeros(29)
    growth[9] = -np.inf
    seen = evidence(growth)
    for ds in (measurements.table([seen]), measurements.dataset([seen])):
        found = verdict.judge([seen], ds, {"seed": 0})
        record = json.loads(found.to_json())
        assert record["findings"][0]["evidence"]["growth_nats"] == "-inf"
        assert record["healthy"] is found.healthy is False
        assert len(record["layers"]) == 30 and record["meta"] == {"seed": 0}
        assert set(record) == {
            *("healthy", "findings", "layers", "product", "theory", "not_run", "notes", "meta")
        }
        assert set(record["layers"][0]) == {
            "name",
            "log_activation_rms",
            "log_cotangent_rms",
            "log_gradient_norm",
            "log_singular_value_max",
            "log_singular_value_min",
        }
        product = {"log_singular_values", "growth_nats_per_layer", "condition_nats"}
        assert set(record["product"]) == product
        assert found.measurements.sizes["layer"] == 30
        assert str(found).startswith("verdict: vanishing_gradients\nOn its way back from hidden_11")


SCRIPT = """
import sys
for name in {blocked}:
    sys.modules[name] = None

import jax, jax.numpy as jnp, gradjax, optax

def loss(ws, x):
    for i, w in enumerate(ws):
        x = gradjax.tap(jnp.tanh(x @ w), f"layer{{i}}")
    return jnp.mean(x**2)

ws = 9.0 / 64**0.5 * jax.random.normal(jax.random.key(0), (2, 64, 64))
x = jax.random.normal(jax.random.key(1), (32, 64))
verdict = gradjax.diagnose(loss, list(ws), x, history=[1.0] * 20)
print(verdict)
assert verdict.findings[0].pathology == "saturated_units"
assert '"saturated_units"' in verdict.to_json()
for ask in (lambda: verdict.measurements, verdict.figure):
    try:
        ask()
    except ImportError as error:
        print(error)
"""


def test_a_verdict_without_the_lab_extra():
    code = SCRIPT.format(blocked=[*LAB, "gradjax.experiment"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "verdict: saturated_units"
    install = "which is not installed; run: pip install 'gradjax[lab]'"
    assert lines[-2:] == [
        f"Diagnosis.measurements needs xarray, {install}",
        f"Diagnosis.figure needs matplotlib, {install}",
    ]


@pytest.mark.parametrize("num_steps", [0, 2.5])
def test_a_number_of_steps_that_is_none_is_refused(num_steps):
    with pytest.raises(ValueError, match=f"num_steps is {num_steps}; an integer of at least 1"):
        verdict.diagnose(None, None, num_steps=num_steps)


def test_parameters_that_are_meant_to_be_unused_are_declared():
    def loss(params, x):
        h = gradjax.tap(jnp.tanh(x @ params["w"]), "h")
        return jnp.mean((h - jax.lax.stop_gradient(x @ params["target"])) ** 2)

    params = {"w": jnp.eye(4), "target": 0.5 * jnp.eye(4)}
    x = jax.random.normal(jax.random.key(0), (8, 4))
    assert gradjax.diagnose(loss, params, x).findings[0].pathology == "untrained_layer"
    assert gradjax.diagnose(loss, params, x, unused=("target",)).healthy
    with pytest.raises(ValueError, match="unused='tarjet' is in no parameter's key path"):
        gradjax.diagnose(loss, params, x, unused=("tarjet",))
