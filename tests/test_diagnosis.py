"""The main rule on planted sicknesses and on healthy networks; JSON that is JSON."""

import json

import hypothesis.strategies as st
import numpy as np
import pytest
import xarray as xr
from hypothesis import given

from gradjax import config, diagnosis, results
from gradjax.diagnosis import judge, maximal_run
from gradjax.measure import measure


def planted(growth, width=128, seeds=5, noise=0.0):
    """Measurements whose log cotangent rms grows by growth[l] from layer l+1 back to layer l."""
    rng = np.random.default_rng(0)
    growth = np.asarray(growth, float) + noise * rng.standard_normal((seeds, len(growth)))
    cotangent = np.concatenate([np.cumsum(growth[:, ::-1], 1)[:, ::-1], np.zeros((seeds, 1))], axis=1)
    layer = [f"hidden_{i + 1}" for i in range(cotangent.shape[1])]
    variables = {name: (("seed", "layer"), np.zeros_like(cotangent)) for name in ("log_activation_rms",)}
    variables["log_gradient_norm"] = variables["log_cotangent_rms"] = (("seed", "layer"), cotangent)
    variables["loss"] = (("seed",), np.ones(seeds))
    return xr.Dataset(variables, coords={"layer": layer}, attrs={"width": width, "left_out": ""})


@pytest.mark.parametrize(
    ("per_layer", "verdict"), [(0.3, "exploding_gradients"), (-0.3, "vanishing_gradients"), (0.01, None)]
)
def test_uniform_growth_starts_at_the_last_layer(per_layer, verdict):
    found = judge(planted([per_layer] * 99)).findings
    assert [f.pathology for f in found] == ([verdict] if verdict else [])
    if found:
        assert found[0].where == {"kind": "layer", "index": 99, "name": "hidden_100"}
        np.testing.assert_allclose(found[0].evidence["growth_nats"], 99 * per_layer)
        assert abs(found[0].evidence["growth_nats"]) > abs(found[0].threshold)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("guilty", [0, 17, 48])
def test_one_guilty_layer_is_named(guilty, sign):
    growth = np.zeros(49)
    growth[guilty] = sign * 20.0
    finding = judge(planted(growth, noise=0.1)).findings[0]
    assert abs(finding.where["index"] - (guilty + 1)) <= 1
    assert finding.evidence["run_ends_at"] == f"hidden_{guilty + 1}"


def test_growth_within_the_fluctuations_of_a_narrow_network_is_healthy():
    """width 10, depth 100: beta = 49.5, so 8 nats is 3 standard deviations (10.6) minus 12; at width 1000 it is not."""
    assert judge(planted([-0.1] * 99, width=10)).healthy
    assert not judge(planted([-0.1] * 99, width=1000)).healthy


def test_a_cut_path_vanishes_at_the_cut():
    ds = planted([0.0] * 30)
    ds["log_cotangent_rms"].values[:, :10] = -np.inf
    finding = judge(ds).findings[0]
    assert finding.pathology == "vanishing_gradients"
    assert finding.where["index"] == 10
    assert finding.evidence["growth_nats"] == -np.inf
    assert json.loads(judge(ds).to_json())["findings"][0]["evidence"]["growth_nats"] == "-inf"
    assert "0" in diagnosis.explain(finding)


def test_an_overflowing_forward_pass_names_its_layer():
    ds = planted([0.0] * 30)
    ds["log_activation_rms"].values[2, 12:] = np.inf
    ds["log_cotangent_rms"].values[2, :] = np.nan
    (finding,) = judge(ds).findings
    assert (finding.pathology, finding.where["index"]) == ("exploding_activations", 12)
    assert finding.evidence["share_of_seeds"] == 0.2
    assert "hidden_13" in diagnosis.explain(finding)


def test_nan_is_never_healthy():
    ds = planted([0.0] * 30)
    ds["log_cotangent_rms"].values[0, :] = np.nan
    assert judge(ds).findings[0].pathology == "non_finite"


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12))
def test_maximal_run_is_the_best_of_all_runs(values):
    first, last = maximal_run(np.array(values))
    sums = [sum(values[i : j + 1]) for i in range(len(values)) for j in range(i, len(values))]
    assert sum(values[first : last + 1]) == pytest.approx(max(sums), abs=1e-9)


def test_median_of_infinite_seeds_is_no_nan():
    ds = xr.Dataset({"x": (("seed", "i"), [[-np.inf, 1.0], [-np.inf, 3.0], [0.0, -np.inf], [0.0, 2.0]])})
    np.testing.assert_array_equal(diagnosis.median(ds, "x"), [-np.inf, 1.5])
    assert diagnosis.median(ds, "absent") is None


SMALL = {"model.width": 64, "task.batch_size": 16, "diagnose.num_seeds": 3, "diagnose.spectrum_seeds": 2}
CRITICAL_TANH = {"model.sigma_w": 1.32701}
HE = {"model.activation": "relu", "model.sigma_w": 2**0.5, "model.sigma_b": 0.0}


@pytest.mark.parametrize(
    ("values", "pathology"),
    [
        ({"model.sigma_w": 2.5}, "exploding_gradients"),
        ({"model.sigma_w": 1.0}, "vanishing_gradients"),
        (CRITICAL_TANH, None),
        (HE, None),
        ({"model.normalization": "batchnorm", **HE}, "exploding_gradients"),
        ({"model.normalization": "layernorm", "model.sigma_w": 2.5}, None),
        ({"model.residual": True, "model.residual_scale": 0.1, **CRITICAL_TANH}, None),
        ({**HE, "model.sigma_w": 9.0}, "exploding_activations"),
        ({**HE, "model.depth": 1}, None),
    ],
)
def test_networks_get_their_verdict(values, pathology):
    experiment = config.replace(config.Experiment(), {"model.depth": 60, **SMALL, **values})
    ds = measure(experiment)
    found = judge(ds).findings
    assert [f.pathology for f in found] == ([pathology] if pathology else []), [diagnosis.explain(f) for f in found]
    record = json.loads(judge(ds).to_json())
    assert record["healthy"] == (not found)
    assert bool(record["theory"]["note"]) == ("model.normalization" in values) == ("theory_log_gain" not in ds)
    assert len(record["layers"]) == experiment.model.depth


def test_the_json_has_the_names_that_others_build_on():
    experiment = config.replace(config.Experiment(), {"model.depth": 20, **SMALL})
    record = json.loads(judge(measure(experiment), {"seed": 0}).to_json())
    assert set(record) == {"healthy", "findings", "layers", "product", "theory", "meta"}
    assert set(record["layers"][0]) == {
        "name", "log_activation_rms", "log_cotangent_rms", "log_gradient_norm", "log_singular_value_max",
        "log_singular_value_min",
    }  # fmt: skip
    assert set(record["product"]) == {"log_singular_values", "growth_nats_per_layer", "condition_nats"}
    assert len(record["product"]["log_singular_values"]) == 64


def test_a_seed_is_the_same_network_whatever_their_number():
    experiment = config.replace(config.Experiment(), {"model.depth": 10, **SMALL, "diagnose.spectrum_seeds": 0})
    three = measure(experiment)
    five = measure(config.replace(experiment, {"diagnose.num_seeds": 5}))
    np.testing.assert_allclose(three.log_cotangent_rms, five.log_cotangent_rms[:3], atol=1e-5)


def test_what_is_too_dear_is_absent_and_said():
    values = {"model.depth": 4, "model.normalization": "batchnorm", "task.batch_size": 64}
    ds = measure(config.replace(config.Experiment(), {**SMALL, **values}))
    assert "log_singular_values" not in ds and "4096" in ds.attrs["left_out"]
    assert json.loads(judge(ds).to_json())["product"]["log_singular_values"] is None


def test_measurements_survive_the_disk_and_a_flipped_bit_raises(tmp_path):
    ds = planted([0.3] * 20, noise=0.1)
    path = results.save(ds, tmp_path / "results.nc")
    xr.testing.assert_identical(results.load(path), ds)
    damaged = 0
    data = bytearray(path.read_bytes())
    good = judge(ds).findings[0].evidence["growth_nats"]
    for offset in range(2000, len(data), max(1, len(data) // 40)):
        data[offset] ^= 16
        path.write_bytes(data)
        try:
            assert judge(results.load(path)).findings[0].evidence["growth_nats"] == good  # a byte that holds no data
        except (OSError, RuntimeError, KeyError, ValueError):
            damaged += 1
        data[offset] ^= 16
    assert damaged > 0


def test_run_folders_are_never_overwritten(tmp_path):
    names = [results.run_folder(tmp_path / "runs", "demo").name for _ in range(3)]
    assert names == ["demo", "demo-2", "demo-3"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_he_network_is_not_flagged_for_its_fluctuations(seed):
    values = {**HE, "model.depth": 50, "model.width": 100, "diagnose.spectrum_seeds": 0, "diagnose.num_seeds": 1}
    assert judge(measure(config.replace(config.Experiment(), {**values, "seed": seed}))).healthy
