"""The catalogue of pathologies is whole, and the rules find what evidence made by hand has."""

import dataclasses
import re
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from pathologies import synthetic
from pathologies.synthetic import evidence

from gradjax.diagnosis import words
from gradjax.diagnosis.rules import CAUSAL, PATHOLOGIES, Dynamics, findings
from gradjax.diagnosis.rules.main_rule import maximal_run


def found(e):
    return findings(e, None)


# The catalogue


def test_every_pathology_has_one_whole_entry_and_a_planted_case():
    assert len(set(CAUSAL)) == len(CAUSAL) == len(PATHOLOGIES)
    assert set(synthetic.PLANTED) == set(CAUSAL)
    for entry in PATHOLOGIES:
        for field in dataclasses.fields(entry):
            assert getattr(entry, field.name) not in ("", (), None), (entry.name, field.name)
        assert re.fullmatch(r"[a-z_]+", entry.name)
        for cell in (entry.meaning, entry.first_remedy, entry.criterion, entry.source):
            assert "|" not in cell and "\n" not in cell, f"{entry.name}: a cell of a table"


@pytest.mark.parametrize("name", CAUSAL)
def test_a_planted_pathology_is_the_first_finding_and_is_explained(name):
    (entry,) = (entry for entry in PATHOLOGIES if entry.name == name)
    texts = []
    for make in synthetic.PLANTED[name]:
        planted = make()
        healthy = evidence([0.0] * 9)
        seen = (healthy, planted) if isinstance(planted, Dynamics) else (planted, None)
        finding = findings(*seen)[0]
        assert finding.pathology == name, finding
        assert not np.isnan(finding.threshold)
        own = name == "non_finite" and finding.evidence.get("text")
        assert finding.source and (own or set(entry.remedies) <= set(finding.remedies))
        texts.append(words.explain(finding))
    for template in entry.words:
        pattern = re.sub(r"\\\{.*?\\\}", ".*", re.escape(template))
        assert any(re.fullmatch(pattern, text) for text in texts), f"never printed: {template}"


def test_words_without_their_evidence_are_one_clear_error():
    finding = replace(found(evidence([0.3] * 99))[0], evidence={})
    with pytest.raises(ValueError, match="the words of exploding_gradients need evidence"):
        words.explain(finding)


# The main rule


@pytest.mark.parametrize(
    ("per_layer", "verdict"),
    [(0.3, "exploding_gradients"), (-0.3, "vanishing_gradients"), (0.01, None)],
)
def test_uniform_growth_starts_at_the_last_layer(per_layer, verdict):
    seen = found(evidence([per_layer] * 99))
    assert [f.pathology for f in seen] == ([verdict] if verdict else [])
    if seen:
        assert seen[0].where == {"kind": "layer", "index": 99, "name": "hidden_100"}
        np.testing.assert_allclose(seen[0].evidence["growth_nats"], 99 * per_layer)
        assert abs(seen[0].evidence["growth_nats"]) > abs(seen[0].threshold)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("layer", [0, 17, 48])
def test_the_one_layer_that_causes_a_growth_is_named(layer, sign):
    growth = 0.1 * np.random.default_rng(0).standard_normal(49)
    growth[layer] = sign * 20.0
    (finding,) = found(evidence(growth))
    assert abs(finding.where["index"] - (layer + 1)) <= 1
    assert finding.evidence["run_ends_at"] == f"hidden_{layer + 1}"


def test_growth_within_the_fluctuations_of_a_narrow_network_is_healthy():
    """width 10, depth 100: beta = 49.5, so 8 nats is 3 standard deviations (10.6) minus 12; at
    width 1000 it is not."""
    assert not found(evidence([-0.1] * 99, width=10))
    assert found(evidence([-0.1] * 99, width=1000))


def test_a_cut_path_vanishes_at_the_cut():
    growth = np.zeros(29)
    growth[9] = -np.inf
    seen = evidence(growth)
    assert (seen.log_cotangent[:10] == -np.inf).all()
    (finding,) = found(seen)
    assert finding.pathology == "vanishing_gradients"
    assert finding.where["index"] == 10
    assert finding.evidence["growth_nats"] == -np.inf
    assert "a factor of 0," in words.explain(finding)


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
    first = found(evidence([growth] * 60, activation=rise * np.arange(61), **layer))[0]
    assert (first.pathology, first.cause) == (pathology, cause)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12))
def test_maximal_run_is_the_best_of_all_runs(values):
    first, last = maximal_run(np.array(values))
    sums = [sum(values[i : j + 1]) for i in range(len(values)) for j in range(i, len(values))]
    assert sum(values[first : last + 1]) == pytest.approx(max(sums), abs=1e-9)


def test_remedies_of_the_cause_come_first():
    assert found(synthetic.over_time(-0.5))[0].remedies[:2] == ("lstm", "gru")
    small = evidence([0.0] * 9, activation=np.full(10, -7.0))
    assert found(small)[0].remedies[0] == "critical_init"
    small_inputs = replace(small, arg_log_rms=[-8.0])
    assert found(small_inputs)[0].remedies[0] == "normalize_inputs"


# Values that are not finite


def test_what_is_not_finite_is_named_with_its_cause():
    healthy = evidence([0.0] * 30)
    assert not found(healthy)
    zero = synthetic.culprit(reason="slope_at_zero", phase="backward", near="hidden_13")
    (finding,) = found(replace(healthy, culprit=zero))
    assert (finding.pathology, finding.cause) == ("non_finite", "slope_at_zero")
    assert finding.where == {"kind": "layer", "index": 12, "name": "hidden_13"}
    assert finding.evidence["line"] == "model.py:7" and finding.remedies == zero.remedies
    assert "model.py:7" in words.explain(finding)
    (finding,) = found(replace(healthy, culprit=replace(zero, near="")))
    assert finding.where["index"] == 31
    given = replace(zero, phase="data", primitive="", name="x", reason="bad_data")
    (finding,) = found(replace(healthy, culprit=given))
    assert finding.where == {"kind": "argument", "index": 0, "name": "x"}
    (finding,) = found(replace(healthy, leaf_bad=[True], leaf_names=["['w']"]))
    assert finding.cause == "bad_parameter"
    (finding,) = found(replace(healthy, loss=np.nan))
    assert finding.where["name"] == "loss" and "one operation at a time" in words.explain(finding)


def test_an_overflow_is_explained_by_the_growth_before_it():
    activation = np.append(0.5 * np.arange(20), [np.inf, np.nan])
    growing = evidence([0.0] * 21, activation=activation)
    (finding,) = found(replace(growing, culprit=synthetic.culprit()))
    assert (finding.pathology, finding.where["index"]) == ("exploding_activations", 20)
    assert finding.evidence["growth_nats_per_layer"] == pytest.approx(0.5)
    assert "hidden_21" in words.explain(finding) and "model.py:7" in words.explain(finding)
    in_the_loss = evidence([0.0] * 19, activation=0.5 * np.arange(20))
    (finding,) = found(replace(in_the_loss, culprit=synthetic.culprit(near="")))
    assert "On its way to the loss" in words.explain(finding)
    half = replace(growing, culprit=synthetic.culprit(dtype="float16"), half=True)
    assert found(half)[0].cause == "float_range"
    # without growth it is the operation that is to blame
    (finding,) = found(replace(evidence([0.0] * 21), culprit=synthetic.culprit()))
    assert (finding.pathology, finding.cause) == ("non_finite", "overflow")


def test_a_gradient_out_of_range_is_explained_by_its_growth():
    overflow = synthetic.culprit(phase="backward", reached="the gradient of ['w']")
    (finding,) = found(replace(evidence([0.0] * 30), culprit=overflow))
    assert (finding.pathology, finding.cause) == ("non_finite", "overflow")
    findings_of = found(replace(evidence([3.0] * 30), culprit=overflow))
    assert [finding.pathology for finding in findings_of] == ["exploding_gradients"]


# Training


@pytest.mark.parametrize(
    "seen",
    [
        synthetic.clipped(0.5),
        synthetic.clipped(1.0, 0.0),
        synthetic.clipped(0.0, 0.3),
        synthetic.clipped(1.0, 0.5),
        synthetic.clipped(1.0, declared=False),
        synthetic.clipped(0.0, declared=False),
    ],
)
def test_a_threshold_that_clips_now_and_then_or_is_none_is_healthy(seen):
    assert not findings(evidence([0.0] * 9), seen)
