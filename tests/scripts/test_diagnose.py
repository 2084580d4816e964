"""The short scripts, run as a user runs them, on healthy and on failing networks; and the phase
diagram."""

import os
import subprocess
import sys

import pytest

import support

SCRIPTS = sorted(support.SCRIPTS.glob("diagnose_*.py"))


def run(*command: str) -> str:
    """What a fresh interpreter prints; it must exit with 0. Programs are compiled quickly."""
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_is_one_for_each_framework():
    assert [path.stem for path in SCRIPTS] == ["diagnose_equinox", "diagnose_linen", "diagnose_nnx"]


def code(text: str) -> list[str]:
    """The lines that are neither blank nor imports nor the docstring."""
    return [line for line in text.splitlines() if not line.startswith(("import ", "from ", '"""'))
            and line.strip()]  # fmt: skip


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_the_scripts_are_short(path):
    assert len(code(path.read_text())) <= 20


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_short_script_finds_a_stock_model_healthy(path):
    assert run(str(path)).startswith("verdict: healthy\n")


@pytest.mark.slow
def test_the_same_script_with_forty_layers_finds_vanishing_gradients():
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
