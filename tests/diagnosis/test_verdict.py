"""The main rule on planted sicknesses and on healthy networks; JSON that is JSON."""

import json
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import xarray as xr
from hypothesis import given

from gradjax.diagnosis import measurements, verdict, words
from gradjax.diagnosis.evidence import Evidence
from gradjax.diagnosis.rules import findings
from gradjax.diagnosis.rules.finding import maximal_run
from gradjax.diagnosis.verdict import judge
from gradjax.experiment import config
from gradjax.experiment.measure import examine, measure
from gradjax.report import files
from gradjax.taps.interpret import Site
from gradjax.taps.statistics import Cotangent, Statistics
from gradjax.taps.structure import Layer, Structure


def planted(growth, width=128, activation=None, **layer):
    """Evidence of a network whose log cotangent rms grows by growth[l] from layer l+1 back to layer
    l."""
    growth = np.asarray(growth, float)
    depth = len(growth) + 1
    with np.errstate(invalid="ignore"):
        cotangent = np.append(np.cumsum(growth[::-1])[::-1], 0.0)
    fields = {"skip": False, "norm": "", "post_norm": False, **layer}
    layers = [
        Layer(Site((i,), f"hidden_{i + 1}", "module", "", (8, width), np.float32), None, frozenset(), (), True, width,
              name=f"hidden_{i + 1}", **fields)
        for i in range(depth)
    ]  # fmt: skip
    value = Statistics(*map(np.float32, (0.0, 0.0, 0.0, -1.0, 0.0)))
    return Evidence(
        loss=1.0, half=False, aux=None, structure=Structure(layers, [], [], []), layers=layers,
        log_activation=np.zeros(depth) if activation is None else np.asarray(activation, float),
        log_cotangent=cotangent, log_gradient=cotangent, size=np.full(depth, 8.0 * width),
        examples=np.ones(depth), tokens=np.full(depth, np.nan), units=np.ones(depth),
        values={x.name: value for x in layers}, order=[(x.name, None) for x in layers], cotangents={},
        activations=[], recurrences=[], leaf_names=[], leaf_shapes=[], leaf_log_rms=[], leaf_log_gradient=[],
        leaf_bad=[], arg_log_rms=[0.0], arg_bad=[], skipped={},
    )  # fmt: skip


def found(evidence):
    return findings(evidence, None)


@pytest.mark.parametrize(
    ("per_layer", "verdict"),
    [(0.3, "exploding_gradients"), (-0.3, "vanishing_gradients"), (0.01, None)],
)
def test_uniform_growth_starts_at_the_last_layer(per_layer, verdict):
    seen = found(planted([per_layer] * 99))
    assert [f.pathology for f in seen] == ([verdict] if verdict else [])
    if seen:
        assert seen[0].where == {"kind": "layer", "index": 99, "name": "hidden_100"}
        np.testing.assert_allclose(seen[0].evidence["growth_nats"], 99 * per_layer)
        assert abs(seen[0].evidence["growth_nats"]) > abs(seen[0].threshold)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("guilty", [0, 17, 48])
def test_one_guilty_layer_is_named(guilty, sign):
    growth = 0.1 * np.random.default_rng(0).standard_normal(49)
    growth[guilty] = sign * 20.0
    (finding,) = found(planted(growth))
    assert abs(finding.where["index"] - (guilty + 1)) <= 1
    assert finding.evidence["run_ends_at"] == f"hidden_{guilty + 1}"


def test_growth_within_the_fluctuations_of_a_narrow_network_is_healthy():
    """width 10, depth 100: beta = 49.5, so 8 nats is 3 standard deviations (10.6) minus 12; at
    width 1000 it is not."""
    assert not found(planted([-0.1] * 99, width=10))
    assert found(planted([-0.1] * 99, width=1000))


def test_a_cut_path_vanishes_at_the_cut():
    growth = np.zeros(29)
    growth[9] = -np.inf
    evidence = planted(growth)
    assert (evidence.log_cotangent[:10] == -np.inf).all()
    (finding,) = found(evidence)
    assert finding.pathology == "vanishing_gradients"
    assert finding.where["index"] == 10
    assert finding.evidence["growth_nats"] == -np.inf
    record = json.loads(verdict.judge([evidence], measurements.dataset([evidence])).to_json())
    assert record["findings"][0]["evidence"]["growth_nats"] == "-inf"
    assert "0" in words.explain(finding)


@pytest.mark.parametrize(
    ("layer", "growth", "rise", "pathology", "cause"),
    [
        ({"norm": "batch"}, 0.19, 0.0, "batchnorm_explosion", "batchnorm"),
        ({"norm": "batch"}, 0.19, 0.8, "exploding_gradients", "weights_too_large"),
        ({"norm": "layer"}, 0.19, 0.0, "exploding_gradients", "normalized_chaos"),
        ({"skip": True}, 0.3, 0.3, "residual_growth", "unscaled_residual"),
        ({"skip": True, "norm": "layer"}, 0.3, 0.0, "exploding_gradients", "normalized_chaos"),
        (
            {"skip": True, "norm": "layer", "post_norm": True},
            -0.2,
            0.0,
            "vanishing_gradients",
            "layernorm_placement",
        ),
        ({}, -0.2, 0.0, "vanishing_gradients", "weights_too_small"),
        ({}, 0.0, -0.2, "vanishing_activations", "weights_too_small"),
        ({}, 0.0, 0.2, "exploding_activations", "weights_too_large"),
    ],
)
def test_the_same_growth_has_other_causes(layer, growth, rise, pathology, cause):
    first = found(planted([growth] * 60, activation=rise * np.arange(61), **layer))[0]
    assert (first.pathology, first.cause) == (pathology, cause)


def test_nothing_broken_is_healthy():
    evidence = planted([0.0] * 30)
    bad = Statistics(*map(np.float32, (np.inf, 1.0, 1.0, 3.0, 0.0)))
    hidden = replace(evidence, values=evidence.values | {"hidden_13": bad})
    (finding,) = found(hidden)
    assert (finding.pathology, finding.cause, finding.where["name"]) == (
        "non_finite",
        "invalid_operation",
        "hidden_13",
    )
    large = Statistics(*map(np.float32, (87.0, 88.0, 0.0, -1.0, 0.0)))
    (finding,) = found(replace(hidden, values=hidden.values | {"hidden_12": large}))
    assert (finding.pathology, finding.where["index"]) == ("exploding_activations", 12)
    assert "hidden_13" in words.explain(finding)
    assert found(replace(evidence, loss=np.nan))[0].where["name"] == "loss"
    assert found(replace(evidence, arg_bad=["[0]"]))[0].cause == "bad_data"
    assert (
        found(replace(evidence, leaf_bad=[True], leaf_names=["['w']"]))[0].cause == "bad_parameter"
    )
    overflow = Cotangent(*map(np.float32, (np.inf, 1.0, 0.0, 0.0)))
    backward = replace(evidence, cotangents={"hidden_2": overflow})
    assert [found(replace(backward, half=half))[0].cause for half in (True, False)] == [
        "float_range",
        "invalid_operation",
    ]


def test_a_finding_of_half_of_the_seeds_stays_and_a_broken_seed_always():
    sick, well = planted([0.3] * 99), planted([0.0] * 99)
    broken = replace(well, loss=np.nan)
    names = lambda *seeds: [f.pathology for f in verdict.vote([found(e) for e in seeds])]
    assert names(sick, well) == ["exploding_gradients"]
    assert names(sick, well, well) == []
    assert names(well, well, broken) == ["non_finite"]
    kept = verdict.vote([found(e) for e in (sick, sick, well)])[0]
    assert kept.evidence["fraction_of_seeds"] == 2 / 3


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12))
def test_maximal_run_is_the_best_of_all_runs(values):
    first, last = maximal_run(np.array(values))
    sums = [sum(values[i : j + 1]) for i in range(len(values)) for j in range(i, len(values))]
    assert sum(values[first : last + 1]) == pytest.approx(max(sums), abs=1e-9)


def test_median_of_infinite_seeds_is_no_nan():
    ds = xr.Dataset(
        {"x": (("seed", "i"), [[-np.inf, 1.0], [-np.inf, 3.0], [0.0, -np.inf], [0.0, 2.0]])}
    )
    np.testing.assert_array_equal(measurements.median(ds, "x"), [-np.inf, 1.5])
    assert measurements.median(ds, "absent") is None


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
    verdict = judge(evidence, ds)
    assert [f.pathology for f in verdict.findings[:1]] == ([pathology] if pathology else []), str(
        verdict
    )
    record = json.loads(verdict.to_json())
    assert record["healthy"] == verdict.healthy
    assert (
        bool(record["theory"]["note"])
        == ("model.normalization" in values)
        == ("theory_log_gain" not in ds)
    )
    assert len(record["layers"]) == experiment.model.depth


@pytest.mark.slow
def test_the_json_has_the_names_that_others_build_on():
    experiment = config.replace(config.Experiment(), {"model.depth": 20, **SMALL})
    ds, evidence = examine(experiment)
    record = json.loads(judge(evidence, ds, {"seed": 0}).to_json())
    assert set(record) == {"healthy", "findings", "layers", "product", "theory", "not_run", "meta"}
    assert set(record["layers"][0]) == {
        "name", "log_activation_rms", "log_cotangent_rms", "log_gradient_norm", "log_singular_value_max",
        "log_singular_value_min",
    }  # fmt: skip
    assert set(record["product"]) == {
        "log_singular_values",
        "growth_nats_per_layer",
        "condition_nats",
    }
    assert len(record["product"]["log_singular_values"]) == 64


@pytest.mark.slow
def test_a_seed_is_the_same_network_whatever_their_number():
    experiment = config.replace(
        config.Experiment(), {"model.depth": 10, **SMALL, "diagnose.spectrum_seeds": 0}
    )
    three = measure(experiment)
    five = measure(config.replace(experiment, {"diagnose.num_seeds": 5}))
    np.testing.assert_allclose(three.log_cotangent_rms, five.log_cotangent_rms[:3], atol=1e-5)


@pytest.mark.slow
def test_what_is_too_dear_is_absent_and_said():
    values = {"model.depth": 4, "model.normalization": "batchnorm", "task.batch_size": 64}
    ds, evidence = examine(config.replace(config.Experiment(), {**SMALL, **values}))
    assert "log_singular_values" not in ds and "4096" in ds.attrs["left_out"]
    assert json.loads(judge(evidence, ds).to_json())["product"]["log_singular_values"] is None


def test_measurements_survive_the_disk_and_a_flipped_bit_raises(tmp_path):
    ds = measurements.dataset([planted([0.3] * 20)])
    path = files.save(ds, tmp_path / "results.nc")
    xr.testing.assert_identical(files.load(path), ds)
    damaged = 0
    data = bytearray(path.read_bytes())
    good = measurements.layers(ds)
    for offset in range(2000, len(data), max(1, len(data) // 40)):
        data[offset] ^= 16
        path.write_bytes(data)
        try:
            assert measurements.layers(files.load(path)) == good  # a byte that holds no data
        except (OSError, RuntimeError, KeyError, ValueError):
            damaged += 1
        data[offset] ^= 16
    assert damaged > 0


def test_run_folders_are_never_overwritten(tmp_path):
    names = [files.run_folder(tmp_path / "runs", "demo").name for _ in range(3)]
    assert names == ["demo", "demo-2", "demo-3"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_he_network_is_not_flagged_for_its_fluctuations(seed):
    values = {
        **HE,
        "model.depth": 50,
        "model.width": 100,
        "diagnose.spectrum_seeds": 0,
        "diagnose.num_seeds": 1,
    }
    ds, evidence = examine(config.replace(config.Experiment(), {**values, "seed": seed}))
    assert judge(evidence, ds).healthy
