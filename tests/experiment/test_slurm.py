"""scripts/sweep_slurm.py on submitit's local executor: shared sweeps, and preemption."""

import importlib.util
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from gradjax.experiment import config, sweep
from gradjax.report import files
from support import SCRIPTS

# The jobs are processes of their own, which compile with all optimisations: so must this one.
pytestmark = [pytest.mark.slow, pytest.mark.optimized]
SCRIPT = SCRIPTS / "sweep_slurm.py"

CONFIG = """
name = "slurm"
[model]
depth = 2
width = 16
[train]
num_steps = 800
eval_every = 50
num_seeds = 2
lanes = 1
checkpoint_seconds = 0.0
[sweep.vmap]
optimizer.learning_rate = [0.001, 0.01]
"""


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("sweep_slurm", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sweep_slurm"] = module  # submitit pickles the job by its module's name
    spec.loader.exec_module(module)
    yield module
    del sys.modules["sweep_slurm"]


@pytest.mark.parametrize("processes, preempt", [(2, False), (1, True)])
def test_a_job_gives_the_bits_of_the_plain_sweep(script, tmp_path, monkeypatch, processes, preempt):
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parent))
    path = tmp_path / "slurm.toml"
    path.write_text(CONFIG)
    flags = (f"--output={tmp_path / 'runs'}",)
    job = script.Job(str(path), flags, processes, logs=str(tmp_path / "logs"), local=True)
    handle = script.submit(job)
    if preempt:
        while not any((tmp_path / "runs").glob("slurm/checkpoints/*/*")):
            assert handle.state in ("RUNNING", "UNKNOWN", "PENDING"), handle.stderr()
            time.sleep(0.05)
        controller = Path(f"/proc/{handle.job_id}/task/{handle.job_id}/children")
        if not controller.exists():
            pytest.skip("no /proc to find the task by")
        (task,) = map(int, controller.read_text().split())
        os.kill(task, signal.SIGUSR2)  # what Slurm sends before it takes the node away
    assert handle.results() == [0] * processes
    if preempt:
        assert (
            "this job is preempted" in handle.stderr()
            and "Requeued job" in handle.stdout() + handle.stderr()
        )
    vary, static = config.sweep_tables(path)
    plain = sweep.sweep(config.load(path), vary, static).drop_attrs()
    assert files.load(tmp_path / "runs/slurm/results.nc").drop_attrs().identical(plain)
    # the requeued job went on in the same folder
    assert len(list((tmp_path / "runs").iterdir())) == 1
