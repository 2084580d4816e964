"""The scripts of fifteen lines, run as a user runs them, healthy and made sick; and the phase
diagram."""

import subprocess
import sys

import pytest

import support

SCRIPTS = sorted(support.SCRIPTS.glob("diagnose_*.py"))


def run(*command: str) -> str:
    """What a fresh interpreter prints; it must exit with 0."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_is_one_for_each_framework():
    assert [path.stem for path in SCRIPTS] == ["diagnose_equinox", "diagnose_linen", "diagnose_nnx"]


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_fifteen_lines_find_a_stock_model_healthy(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 15
    assert run(str(path)).startswith("verdict: healthy\n")


@pytest.mark.slow
def test_the_same_script_with_forty_layers_is_sick():
    """Equinox draws weights of variance 1/(3 fan_in); ReLU halves what is left: -0.9 nats per
    layer."""
    text = next(path for path in SCRIPTS if "equinox" in path.stem).read_text()
    assert "depth=3" in text
    verdict = run("-c", text.replace("depth=3", "depth=40"))
    assert verdict.startswith("verdict: vanishing_gradients")
    assert "weights too small" in verdict


@pytest.mark.slow
def test_the_phase_diagram_is_drawn(tmp_path):
    picture = tmp_path / "tanh.png"
    said = run(str(SCRIPTS[0].parent / "phase_diagram.py"), str(picture), "--points", "6")
    assert f"wrote {picture}" in said and picture.read_bytes().startswith(b"\x89PNG")
