"""`find_cure`: ranking on made-up results, and small real trainings."""

import itertools
import json
import math
import types

import numpy as np
import pytest
import xarray as xr

from gradjax.cli.main import main
from gradjax.cure import remedies, search
from gradjax.diagnosis.verdict import Diagnosis
from gradjax.experiment import config, sweep
from gradjax.experiment.schema import ConfigError

SMALL = {
    "model.depth": 4,
    "model.width": 16,
    "model.activation": "relu",
    "model.sigma_b": 0.0,
    "train.num_steps": 60,
    "train.num_seeds": 2,
    "train.eval_every": 30,
    "train.target": 0.3,
    "diagnose.num_seeds": 2,
    "diagnose.spectrum_seeds": 0,
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.05,
}


def experiment(**more):
    return config.replace(
        config.Experiment(), SMALL | {k.replace("__", "."): v for k, v in more.items()}
    )


def made_up(trained, scores, deviation=0.1, seconds=1.0):
    """A dataset of `compare` with the given outcomes per seed."""
    seeds, steps = len(scores), 50
    norms = np.tile(deviation * np.where(np.arange(steps) % 2, 1.0, -1.0), (seeds, 1))
    return xr.Dataset(
        {
            "trained": ("seed", np.array(trained, bool)),
            "trained_at": ("seed", np.where(trained, 40, -1)),
            "final_score": ("seed", np.array(scores)),
            "test_score": ("seed", np.array(scores)),
            "diverged_at": ("seed", np.full(seeds, -1)),
            "log_gradient_norm": (("seed", "step"), norms),
        },
        attrs={"seconds_per_step": seconds, "program": 0, "target": 0.9},
    )


def test_ranking_goes_by_fraction_then_score_then_stability_then_cost():
    yes, no = [True] * 4, [True, True, False, False]
    found = {
        "untreated": made_up([False] * 4, [0.1] * 4),
        "half": made_up(no, [0.99] * 4),
        "low": made_up(yes, [0.91] * 4),
        "expensive": made_up(yes, [0.95] * 4, 0.1, 2.0),
        "cheap": made_up(yes, [0.95] * 4, 0.1, 1.0),
        "shaky": made_up(yes, [0.95] * 4, 0.5, 0.1),
    }
    assert [row["remedy"] for row in search.rank(found)] == [
        "cheap",
        "expensive",
        "shaky",
        "low",
        "half",
        "untreated",
    ]


def test_rows_have_wilsons_and_students_intervals():
    row = search.rank({"a": made_up([True] * 8, np.linspace(0.9, 1.0, 8))})[0]
    assert row["fraction_interval"] == pytest.approx(
        [0.6756, 1.0], abs=1e-4
    )  # Wilson 1927 for 8 of 8
    half = 2.3646 * np.std(np.linspace(0.9, 1.0, 8), ddof=1) / 8**0.5  # t of 7 degrees of freedom
    assert row["score_interval"] == pytest.approx([0.95 - half, 0.95 + half], rel=1e-4)


def test_a_lost_gradient_has_no_stability():
    norms, lost = np.zeros((3, 20)), np.zeros(3, bool)
    norms[:2, 10:] = np.inf
    assert math.isinf(search.stability(norms, lost)) and search.stability(norms[2:], lost[2:]) == 0
    assert math.isinf(search.stability(np.zeros((3, 20)), ~lost))


def test_stability_is_that_of_a_seeds_own_steps():
    rng = np.random.default_rng(0)
    norms = rng.normal(size=(1, 100))
    padded = np.concatenate(
        [norms, np.full((1, 300), np.nan)], 1
    )  # it came to rest, others went on
    assert (
        search.stability(padded, np.zeros(1, bool))
        == search.stability(norms, np.zeros(1, bool))
        > 0
    )
    norms[0, 50] = np.nan  # a step that a guard left out
    assert 0 < search.stability(norms, np.zeros(1, bool)) < 2
    assert math.isinf(search.stability(np.full((1, 9), np.nan), np.zeros(1, bool)))


def test_a_winner_is_better_beyond_chance():
    rng = np.random.default_rng(0)
    chance = {f"r{i}": made_up([False] * 8, 0.1 + 0.01 * rng.normal(size=8)) for i in range(40)}
    found = {"untreated": made_up([False] * 8, 0.1 + 0.01 * rng.normal(size=8))} | chance
    assert not any(search.is_better(name, found) for name in found)
    found["good"] = made_up([False] * 8, 0.3 + 0.01 * rng.normal(size=8))
    found["one seed"] = made_up([True] + [False] * 7, [0.1] * 8)
    found["gone"] = made_up([False] * 8, [math.nan] * 8)
    assert [n for n in found if search.is_better(n, found)] == ["good", "one seed"]
    flat = {"untreated": made_up([True] * 4, [0.5] * 4), "same": made_up([True] * 4, [0.5] * 4)}
    assert not search.is_better("same", flat)


def test_pairs_are_of_remedies_that_do_not_undo_each_other():
    names = ("relu", "leaky_relu", "residual", "rezero", "clip", "l1")
    tried = {"untreated": experiment(model__activation="tanh")}
    tried |= {name: remedies.apply(name, tried["untreated"]) for name in names}
    pairs = {
        (a, b) for a, b in itertools.combinations(names, 2) if search.are_complementary(a, b, tried)
    }
    assert ("relu", "leaky_relu") not in pairs and ("residual", "rezero") not in pairs
    assert {
        ("relu", "residual"),
        ("leaky_relu", "rezero"),
        ("clip", "l1"),
        ("residual", "clip"),
    } <= pairs


def test_what_trains_needs_no_cure_and_says_so():
    rows = search.rank(
        {"untreated": made_up([True] * 8, [0.95] * 8), "relu": made_up([True] * 8, [0.94] * 8)}
    )
    healthy = Diagnosis((), xr.Dataset(), {}, {})
    text = search.story(search.Cure(healthy, rows, {}, "untreated", None, xr.Dataset(), 1, {}))
    assert "It trains as it is, and needs no cure." in text and "Nothing" not in text


def test_names_are_remedies_and_validation_is_needed():
    with pytest.raises(ConfigError, match=r"unknown remedy 'rellu'.*did you mean 'relu'"):
        search.find_cure(experiment(), "rellu")
    with pytest.raises(ConfigError, match="unknown remedy 'relo'"):
        search.find_cure(experiment(), ["relu", "relo"])
    with pytest.raises(ConfigError, match=r"task\.validation is 0"):
        search.find_cure(experiment(task__validation=0.0), "relu")


def test_programs_are_shared_by_what_differs_only_in_floats():
    base = experiment()
    settings = {
        "a": base,
        "b": config.replace(base, {"model.sigma_w": 1.0}),
        "c": config.replace(base, {"model.residual": True}),
        "d": config.replace(base, {"model.residual": True, "model.residual_scale": 0.5}),
        "e": config.replace(base, {"model.dropout": 0.1}),
    }
    assert sweep.programs(settings) == [["a", "b"], ["c", "d"], ["e"]]


@pytest.mark.slow
def test_experiments_of_other_seeds_have_their_own_data():
    one, two = (experiment(seed=seed, train__num_steps=4, train__eval_every=2) for seed in (0, 1))
    together = sweep.compare({"one": one, "two": two})
    for name, own in (("one", one), ("two", two)):
        np.testing.assert_array_equal(
            together[name]["loss"], sweep.compare({name: own})[name]["loss"]
        )


@pytest.mark.slow
def test_steps_that_were_not_taken_cost_nothing(monkeypatch):
    """By a clock that ticks once whenever it is looked at: all ticks over the 30 steps taken, not
    over the 3,000."""
    ticks = itertools.count()
    monkeypatch.setattr(sweep, "time", types.SimpleNamespace(monotonic=lambda: float(next(ticks))))
    own = experiment(
        train__stop_at_target=True, train__target=-1.0, train__num_steps=3000, train__eval_every=30
    )
    ds = sweep.compare({"one": own})["one"]
    assert ds.sizes["step"] == 30
    took = ds.attrs["seconds_per_step"] * own.train.num_seeds * 30
    assert took == pytest.approx(round(took)) and 1 <= took <= next(ticks)


@pytest.mark.slow
def test_what_fits_a_recurrent_network_runs_or_is_left_out():
    small = {
        "model.name": "rnn",
        "model.depth": 1,
        "model.width": 8,
        "model.sigma_w": 0.3,
        "train.num_steps": 2,
    }
    small |= {
        "task.name": "temporal_order",
        "task.seq_len": 20,
        "train.eval_every": 1,
        "train.num_seeds": 2,
    }
    vanishing = config.replace(
        config.Experiment(), small | {"diagnose.num_seeds": 2, "diagnose.spectrum_seeds": 0}
    )
    names = ["batchnorm", "lsuv_init", "gru", "orthogonal_rnn", "critical_init"]
    assert set(names) <= set(remedies.fitting(["vanishing_gradients"]))
    found = search.find_cure(vanishing, names, pairs=False)
    assert found.verdict.findings[0].pathology == "vanishing_gradients"
    assert (
        "has no batchnorm" in found.left_out["batchnorm"]
        and "has no lsuv" in found.left_out["lsuv_init"]
    )
    assert {row["remedy"] for row in found.ranking} == {"untreated", *names[2:]}


@pytest.mark.slow
def test_compared_members_are_those_of_a_sweep():
    base = experiment(train__lanes=2)
    found = sweep.compare({"one": base, "two": config.replace(base, {"model.sigma_w": 2.0})})
    ds = sweep.sweep(base, vary={"model.sigma_w": [base.model.sigma_w, 2.0]})
    for i, name in enumerate(("one", "two")):
        np.testing.assert_array_equal(found[name]["loss"].values, ds["loss"].values[i])


@pytest.mark.slow
def test_starts_that_differ_share_an_executable_and_change_no_bit():
    small = {"train__num_steps": 4, "train__eval_every": 2, "model__depth": 2}
    starts = {
        name: experiment(model__weights=name, **small) for name in ("he_normal", "glorot_normal")
    }
    together = sweep.compare(starts | {"residual": experiment(model__residual=True, **small)})
    program = {name: ds.attrs["program"] for name, ds in together.items()}
    assert program["he_normal"] == program["glorot_normal"] != program["residual"]
    for name, own in starts.items():
        np.testing.assert_array_equal(
            together[name]["loss"], sweep.compare({name: own})[name]["loss"]
        )
    assert not np.array_equal(together["he_normal"]["loss"], together["glorot_normal"]["loss"])


@pytest.mark.slow
def test_a_vanishing_network_is_cured_and_says_so():
    vanishing = experiment(
        model__sigma_w=0.2, model__depth=6, train__num_steps=300, train__eval_every=100
    )
    found = search.find_cure(vanishing, ["critical_init", "l1", "forget_bias"], pairs=False)
    assert found.verdict.headline.startswith(("vanishing", "dead", "rank"))
    assert found.winner == "critical_init" and search.is_cured(found)
    assert "no model.forget_bias" in found.left_out["forget_bias"]
    assert found.after is not None and found.after.healthy
    assert set(found.results["remedy"].values) == {"untreated", "critical_init", "l1"}
    text = str(found)
    assert "What cured it: critical_init" in text and "Did not help: l1" in text
    json.dumps(search.to_dict(found)["ranking"])


@pytest.mark.slow
def test_a_network_whose_every_remedy_fails_ends_with_that_verdict():
    found = search.find_cure(
        experiment(train__target=1.0, train__num_steps=4, train__eval_every=2), ["l1", "clip"]
    )
    assert found.winner in ("untreated", "l1", "clip", "l1+clip", "clip+l1")
    assert "Nothing cured it" in str(found)


@pytest.mark.slow
def test_the_command_writes_results_figure_and_story(tmp_path, capsys):
    path = tmp_path / "vanishing.toml"
    path.write_text(
        config.to_toml(
            experiment(name="vanishing", model__sigma_w=0.2, output=str(tmp_path / "runs"))
        )
    )
    assert main(["cure", str(path), "--remedies", "critical_init,l1", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    folder = tmp_path / "runs/vanishing"
    names = {
        "config.toml",
        "cured.toml",
        "results.nc",
        "cure.json",
        "cure.txt",
        "cure.png",
        "cure.svg",
    }
    assert names <= {p.name for p in folder.iterdir()}
    assert summary["winner"] == "critical_init"
    assert config.load(folder / "cured.toml").model.sigma_w == pytest.approx(2**0.5)
