"""The command line as a user meets it: verdicts, files, one message and status 2 for what cannot be
used."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gradjax.cli.main import main
from gradjax.experiment import config
from gradjax.report import files
from support import ROOT

CONFIGS = ROOT / "configs"
SMALL = ["--model.depth", "40", "--model.width=48", "--diagnose.num_seeds", "2"]
SMALL += ["--diagnose.spectrum_seeds=1"]


@pytest.fixture
def diagnose(tmp_path, capsys):
    """Run `gradjax diagnose`; returns (status, stdout, stderr)."""

    def run(path, *flags):
        status = main(["diagnose", str(path), "--output", str(tmp_path / "runs"), *flags])
        return status, *capsys.readouterr()

    return run


def test_a_verdict_is_a_result_with_table_and_files(diagnose, tmp_path):
    small = [*SMALL, "--diagnose.spectrum_seeds", "0"]
    status, out, _ = diagnose(CONFIGS / "demo.toml", *small)
    assert status == 0
    assert "theory: +0.2" in out and "standard errors" in out
    assert "exploding_gradients" in out and "nats per layer" in out and "hidden_40" in out
    folder = tmp_path / "runs" / "demo"
    assert {p.name for p in folder.iterdir()} == {
        "config.toml", "diagnosis.json", "diagnosis.png", "diagnosis.svg", "results.nc",
    }  # fmt: skip
    assert config.load(folder / "config.toml").model.depth == 40
    ds = files.load(folder / "results.nc")
    assert ds.attrs["seed"] == 0 and ds.attrs["version_jax"] and ds.attrs["version_git"]
    assert config.load(folder / "config.toml") == config.load(
        CONFIGS / "demo.toml", [*small, "--output", str(tmp_path / "runs")]
    )


@pytest.mark.slow
def test_json_is_all_of_standard_output_and_folders_are_kept(diagnose, tmp_path):
    """The first run has spectra, the second has none."""
    for seeds, folder in ((1, "demo"), (0, "demo-2")):
        flags = ["--json", "--diagnose.spectrum_seeds", str(seeds)]
        status, out, _ = diagnose(CONFIGS / "demo.toml", *SMALL, *flags)
        record = json.loads(out)
        assert status == 0 and not record["healthy"]
        assert Path(record["meta"]["folder"]).name == folder
        assert record["meta"]["config"]["model"]["depth"] == 40
        assert (record["product"]["log_singular_values"] is None) == (seeds == 0)


@pytest.mark.slow
def test_a_verdict_with_spectra_prints_the_layer_product(diagnose):
    status, out, _ = diagnose(CONFIGS / "demo.toml", *SMALL)
    assert status == 0 and "layer product: singular values from" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["diagnose", str(CONFIGS / "demo.toml"), "--model.dept", "10"],
            ["model.dept", "'model.depth'"],
        ),
        (
            ["diagnose", str(CONFIGS / "demo.toml"), "--model.depth", "ten"],
            ["model.depth", "'ten'", "integer"],
        ),
        (
            ["diagnose", str(CONFIGS / "demo.toml"), "--model.sigma_w", "-1"],
            ["model.sigma_w", "-1", "[0,"],
        ),
        (
            ["diagnose", str(CONFIGS / "demo.toml"), "--model.activation", "tahn"],
            ["tahn", "'tanh'", "relu"],
        ),
        (
            ["diagnose", str(CONFIGS / "demo.toml"), "--task.name", "minst"],
            ["minst", "'mnist'", "digits"],
        ),
        (["diagnose", "configs/dmo.toml"], ["configs/dmo.toml"]),
        (["diagnose"], ["CONFIG"]),
        (["diagnos", "x"], ["diagnos", "'diagnose'"]),
        (["data", "fetch", "imagenet"], ["imagenet", "digits, mnist"]),
        (["data", "eat"], ["eat", "usage"]),
        (
            ["diagnose", str(CONFIGS / "demo.toml"), "--task.batch_size", "100000"],
            ["batch_size=100000", "1257"],
        ),
    ],
)
def test_bad_input_is_one_message_and_status_2(arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    for word in words:
        assert word in err
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_a_typo_in_a_file_is_named_with_the_file(tmp_path, capsys):
    path = tmp_path / "mine.toml"
    path.write_text("[model]\nwidht = 3\n")
    assert main(["diagnose", str(path)]) == 2
    message = capsys.readouterr().err
    assert "model.widht" in message and "'model.width'" in message and "mine.toml" in message


def test_missing_and_truncated_data_files_are_named(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "data" / "mnist"
    folder.mkdir(parents=True)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b\x08\x00")
    monkeypatch.setenv("GRADJAX_DATA_DIR", str(tmp_path / "data"))
    demo = str(CONFIGS / "demo.toml")
    assert main(["diagnose", demo, "--task.name", "mnist", "--output", str(tmp_path)]) == 2
    assert "train-images-idx3-ubyte" in capsys.readouterr().err


@pytest.mark.slow
def test_an_unwritable_output_is_one_message(tmp_path, diagnose):
    (tmp_path / "runs").write_text("a file")
    status, _, err = diagnose(CONFIGS / "demo.toml", *SMALL, "--diagnose.spectrum_seeds", "0")
    assert status == 2 and "runs" in err


def test_help_has_flags_and_examples(capsys):
    assert main(["--help"]) == 0
    assert "gradjax diagnose configs/demo.toml" in capsys.readouterr().out
    assert main(["diagnose", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--model.sigma_w" in out and "--json" in out and "examples" in out
    assert main(["cure", "--list"]) == 0
    out = capsys.readouterr().out
    assert "critical_init" in out and "lower_learning_rate" in out


def test_the_installed_command_answers():
    done = subprocess.run(
        [sys.executable, "-m", "gradjax", "data", "list", "--no_cache"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "digits" in done.stdout and "mnist" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "depth"), [("1", "100"), ("2", "200")])
@pytest.mark.parametrize(
    ("name", "verdict"),
    [("demo", "exploding_gradients"), ("vanishing", "vanishing_gradients"), ("healthy", None)],
)
def test_the_shipped_configs_keep_their_verdict(name, verdict, depth, seed, diagnose):
    flags = ["--json", "--seed", seed, "--model.depth", depth, "--diagnose.spectrum_seeds", "0"]
    status, out, _ = diagnose(CONFIGS / f"{name}.toml", *flags)
    record = json.loads(out)
    assert status == 0
    # what follows from it may stand behind it: norms that overflow at depth 200, inputs that become
    # one point
    assert [f["pathology"] for f in record["findings"]][:1] == ([verdict] if verdict else [])
    assert record["healthy"] is (verdict is None)


TINY = """
name = "small"
[model]
depth = 2
width = 8
[train]
num_steps = 10
eval_every = 5
num_seeds = 2
target = 0.05
"""


@pytest.mark.slow
def test_train_writes_curves_states_and_scores(tmp_path, capsys):
    path = tmp_path / "small.toml"
    path.write_text(TINY)
    assert main(["train", str(path), "--output", str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    assert "2/2" in out and "A seed is trained when its validation score reaches 0.05" in out
    folder = tmp_path / "runs/small"
    assert {"config.toml", "results.nc", "summary.json", "train.png", "train.svg"} <= {
        p.name for p in folder.iterdir()
    }
    assert [p.name for p in (folder / "checkpoints/000-00000").iterdir()] == [
        "000000000010"
    ]  # the trained states


@pytest.mark.slow
def test_sweep_prints_json_and_names_its_settings(tmp_path, capsys):
    path = tmp_path / "small.toml"
    path.write_text(
        TINY + "[sweep.vmap]\noptimizer.learning_rate = [0.01, 0.1]\nmodel.sigma_w = [1.0, 2.0]\n"
    )
    assert main(["sweep", str(path), "--output", str(tmp_path / "runs"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert len(summary["settings"]) == 4 and summary["swept"] == [
        "optimizer.learning_rate",
        "model.sigma_w",
    ]
    assert (tmp_path / "runs/small/sweep.png").stat().st_size > 10_000
    (tmp_path / "runs/small/results.nc").unlink()
    output = str(tmp_path / "runs")
    resumed = ["sweep", str(path), "--output", output, "--resume", "--train.num_seeds", "3"]
    assert main(resumed) == 2
    assert "train.num_seeds: 2 and 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, words",
    [
        ("", "varies nothing"),
        ("[sweep.vmap]\nmodel.depth = [1, 2]\n", "put it under sweep.static"),
        ("[sweep.vmap]\nmodel.sigma = [1.0]\n", "did you mean 'model.sigma_w'"),
    ],
)
def test_a_sweep_that_cannot_be_is_one_message(tmp_path, capsys, more, words):
    path = tmp_path / "small.toml"
    path.write_text(TINY + more)
    assert main(["sweep", str(path), "--output", str(tmp_path / "runs")]) == 2
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err and not (tmp_path / "runs").exists()
