"""The papers' plots: every figure small, every control fails, and the parts of
`scripts/reproduce.py`."""

import dataclasses
import json
import math
import re

import jax
import numpy as np
import pytest
import reproduce
import xarray as xr
from papers import common

from gradjax.report import files

NAMES = common.names()


@pytest.fixture(autouse=True)
def as_a_user_runs_it():
    """The figures are user code: promotion is as JAX ships it."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


# The figures

# Most of the others' time is compilation.
RUNNING = ("hanin2018",)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_small_figure_passes_its_claims_and_its_controls_fail(name, tmp_path):
    """In one process, so that the controls run the programs that the figure has compiled."""
    jax.config.update("jax_disable_most_optimizations", name not in RUNNING)
    row = reproduce.reproduce(name, tmp_path, small=True)
    assert not row["error"], row["error"]
    assert [claim for claim in row["claims"] if not claim["passed"]] == []
    assert len(row["claims"]) >= 2
    assert (tmp_path / f"{name}.png").stat().st_size > 5_000
    ds = files.load(tmp_path / f"{name}.nc")
    assert json.loads(ds.attrs["config"])["seed"] == 0

    figure = common.module(name)
    for control, config in common.controls(figure).items():
        claims = figure.check(figure.run(config))
        assert any(not claim.passed for claim in claims), f"{control}: every claim passed"


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_keeps_the_contract(name):
    figure = common.module(name)
    config = figure.Config()
    assert dataclasses.is_dataclass(config) and figure.Config.__dataclass_params__.frozen
    assert config.seed == 0
    assert common.small(figure) != config and common.controls(figure)
    assert all(wrong != common.small(figure) for wrong in common.controls(figure).values())
    assert common.tier(figure) in (1, 2)
    title = common.title(figure)
    assert re.fullmatch(r"\D+ \d{4}[^:]*: .+", title), title
    assert "not covered" in " ".join(figure.__doc__.lower().split())


# Claims


def test_close_needs_every_tolerance():
    def close(measured, **options):
        return common.close("x", measured, 2.0, "here", **options).passed

    assert close(2.09, relative=0.05) and not close(2.11, relative=0.05)
    assert close(2.09, absolute=0.1) and not close(1.89, absolute=0.1)
    # LEVEL is at 3.9 standard errors, and further out for an error from ten samples.
    assert close(2.3, error=0.1) and not close(2.4, error=0.1)
    assert close(2.4, error=0.1, dof=9) and not close(2.7, error=0.1, dof=9)
    assert not close(2.3, error=0.1, relative=0.05)
    assert close(2.09, error=1e-6, relative=0.05, asymptotic=True)
    assert not close(math.nan, error=1.0, relative=0.05)
    with pytest.raises(ValueError, match="no tolerance"):
        common.close("x", 1.0, 2.0, "here")


@pytest.mark.parametrize("dof", [math.inf, 5])
def test_a_joint_test_has_its_level(dof):
    """True claims of 20 numbers fail no more often than LEVEL says; one number far off, or all a
    little, fail them."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((1000, 20))
    if math.isfinite(dof):
        z /= np.sqrt(rng.chisquare(dof, z.shape) / dof)
    chi2 = [common.joint("x", row, 0.0, 1.0, "here", dof=dof) for row in z]
    assert sum(not claim.passed for claim in chi2) <= 4  # 0.1 are expected
    assert np.mean([claim.measured for claim in chi2]) == pytest.approx(1, abs=0.05)
    far = np.zeros(20)
    far[3] = 8 if math.isinf(dof) else 5000
    assert not common.joint("x", far, 0.0, 1.0, "here", dof=dof).passed
    little = np.full(20, 2.5 if math.isinf(dof) else 4.0)
    assert not common.joint("x", little, 0.0, 1.0, "here", dof=dof).passed
    assert not common.joint("x", np.array([0.0, np.nan]), 0.0, 1.0, "here", dof=dof).passed


def test_apart_and_between():
    assert common.apart("x", 2.0, 1.0, "there", error=0.1).passed
    assert not common.apart("x", 1.3, 1.0, "there", error=0.1).passed
    assert not common.apart("x", 2.0, 1.0, "there", error=0.1, dof=2).passed
    assert common.between("x", 0.8, 0.75, 0.85, "there").passed
    assert not common.between("x", math.nan, 0.75, 0.85, "there").passed


def test_mean_error():
    mean, error = common.mean_error([[1.0, 2.0], [3.0, 2.0]])
    np.testing.assert_allclose((mean, error), ([2, 2], [1, 0]))


# reproduce.py


class Toy:
    """A figure that no folder holds."""

    __doc__ = "Nobody 2000: a toy (arXiv 0000.00000)."

    @dataclasses.dataclass(frozen=True)
    class Config:
        seed: int = 0
        value: float = 1.0

    SMALL = {"value": 1.5}
    CONTROLS = {"off": {"value": 2.0}}

    @staticmethod
    def run(config):
        return xr.Dataset({"value": ("x", [config.value])})

    @staticmethod
    def plot(ds):
        figure, ((ax,),) = common.panels()
        common.points(ax, [0], ds.value, [0.1])
        return figure

    @staticmethod
    def check(ds):
        return (common.close("value", ds.value[0], 1, "here", absolute=0.1),)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(common, "module", lambda name: Toy)
    monkeypatch.setattr(common, "names", lambda: ["toy", "toad"])
    return Toy


def test_one_figure_leaves_dataset_picture_and_row(toy, tmp_path):
    row = reproduce.reproduce("toy", tmp_path, seed=7)
    assert reproduce.ok(row) and row["error"] == "" and row["title"].startswith("Nobody")
    ds = files.load(tmp_path / "toy.nc")
    assert json.loads(ds.attrs["config"]) == {"seed": 7, "value": 1.0}
    assert "version_jax" in ds.attrs and (tmp_path / "toy.png").exists()
    assert not reproduce.ok(reproduce.reproduce("toy", tmp_path, small=True))


def test_what_a_figure_raises_is_a_failure(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "check", staticmethod(lambda ds: 1 / 0))
    row = reproduce.reproduce("toy", tmp_path)
    assert "ZeroDivisionError" in row["error"] and not reproduce.ok(row)
    assert not reproduce.ok(row | {"error": ""})  # no claims


@pytest.mark.parametrize("value", [1.0, 2.0])
def test_the_command_reports_and_exits(toy, tmp_path, monkeypatch, capsys, value):
    def serial(names, folder, jobs, **options):
        return [reproduce.reproduce(name, folder, **options) for name in names]

    monkeypatch.setattr(reproduce, "run_all", serial)
    monkeypatch.setattr(
        toy,
        "Config",
        dataclasses.make_dataclass("Config", [("seed", int, 0), ("value", float, value)]),
    )
    for json_flag in ([], ["--json"]):
        status = reproduce.main(["toy", "--output", str(tmp_path), *json_flag])
        assert status == (value != 1.0)
        out = capsys.readouterr().out
        assert (json.loads(out)["claims"] == 1) if json_flag else ("Nobody 2000" in out)
    summary = json.loads((tmp_path / "reproduce-2" / "claims.json").read_text())
    assert summary["passed"] == (value == 1.0)
    assert summary["results"][0]["claims"][0]["measured"] == value


def test_choosing_figures(toy):
    assert reproduce.choose([], None) == ["toy", "toad"]
    assert reproduce.choose(["toad", "toad"], 1) == ["toad"]
    assert reproduce.choose([], 2) == []
    with pytest.raises(ValueError, match="did you mean toad"):
        reproduce.choose(["toda"], None)


def test_unusable_input_exits_with_2(toy, capsys):
    for wrong in (["nobody"], ["--jobs", "0"], ["--tier", "3"]):
        with pytest.raises(SystemExit) as error:
            reproduce.main(wrong)
        assert error.value.code == 2
    assert "The figures are" in capsys.readouterr().err


def test_the_list(capsys):
    assert reproduce.main(["--list", "newman1986"]) == 0
    assert capsys.readouterr().out.startswith("newman1986")
