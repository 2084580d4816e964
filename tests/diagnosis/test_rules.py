"""The labelled suite: a few cases at every run of the tests, its unseen half against the goals in
the slow ones."""

import json
import subprocess
import sys
from collections import Counter

import pytest
from pathologies import confusion
from pathologies.planted import PLANTED
from pathologies.unseen_examples import EXAMPLES

from support import ROOT

HERE = ROOT / "tests"


def test_the_suite_is_as_large_as_it_must_be():
    cases = [case for _, case in confusion.suite()]
    sick = [case for case in cases if case.pathology]
    assert len(sick) >= 60 and len(cases) - len(sick) >= 40
    assert {case.framework for case in sick} == {"linen", "nnx", "equinox", "plain"}
    assert {case.architecture for case in sick} == {
        "mlp",
        "cnn",
        "resnet",
        "rnn",
        "lstm",
        "transformer",
    }
    assert {"mild", "severe"} <= {case.severity for case in sick}
    assert len({case.pathology for case in sick}) == 21
    keys = Counter((case.framework, case.architecture, case.name) for case in (*PLANTED, *EXAMPLES))
    assert max(keys.values()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["relu_scan_taps", "tanh_small", "rnn_gain", "stop_gradient"])
def test_a_planted_sickness_is_found(name):
    """One process for each: what a case needs of dtype promotion is not that of the tests."""
    index = next(
        i for i, (_, case) in enumerate(confusion.suite()) if case.name == name and case in PLANTED
    )
    code = f"import json; from pathologies import confusion; print(json.dumps(confusion.examine({index}, 0)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["said"] == row["true"]
    assert row.get("layer_right", True) and row.get("cause_right", True)


def test_rates_and_goals_count_what_they_say():
    row = {"true": "dead_units", "said": "dead_units", "layer_right": True, "cause_right": False}
    wrong = {"true": "dead_units", "said": "healthy"}
    well, alarm = {"true": "healthy", "said": "healthy"}, {"true": "healthy", "said": "dead_units"}
    found = confusion.rates([row, wrong, well, alarm])
    assert found == {"pathology": (1, 2), "layer": (1, 1), "cause": (0, 1), "false alarms": (1, 2)}
    assert confusion.missed(found) == ["pathology", "cause", "false alarms"]
    assert confusion.missed(confusion.rates([row | {"cause_right": True}, well])) == []


@pytest.mark.slow
def test_every_third_case_of_the_unseen_half():
    """Not the goals, which the command itself judges on all of it: that the rates measured once do
    not fall."""
    command = [
        sys.executable,
        str(HERE / "pathologies" / "confusion.py"),
        "--half",
        "unseen",
        "--every",
        "3",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    record = json.loads(done.stdout.splitlines()[-1])
    rates = {name: right / max(judged, 1) for name, (right, judged) in record["unseen"].items()}
    assert rates["pathology"] >= 0.85 and rates["layer"] >= 0.9 and rates["cause"] >= 0.85, record[
        "rows"
    ]
    assert rates["false alarms"] <= 0.05, record["rows"]
