"""The command line killed at random moments, on full disks and over several processes: the same
bits in the end."""

import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from gradjax.experiment import checkpoint
from gradjax.report import files

pytestmark = pytest.mark.slow

CONFIG = """
name = "resume"
[model]
depth = 2
width = 32
[optimizer]
clipping = "clip_by_global_norm"
[train]
num_steps = 3000
eval_every = 100
num_seeds = 4
lanes = 2
checkpoint_seconds = 0.0
[sweep.vmap]
optimizer.learning_rate = [0.001, 0.01]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    (folder / "resume.toml").write_text(CONFIG)
    return folder


def start(place: Path, output: Path, *flags: str, **environ: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "gradjax.cli.main",
        "sweep",
        str(place / "resume.toml"),
        "--output",
        str(output),
    ]
    cache = {  # the programs are compiled once for all the processes of this file
        "JAX_COMPILATION_CACHE_DIR": str(place / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *flags], env={**os.environ, **cache, **environ}, **pipes)


def dataset(output: Path):
    return files.load(output / "resume/results.nc").drop_attrs()


@pytest.fixture(scope="module")
def undisturbed(place):
    process = start(place, place / "whole")
    assert process.wait() == 0, process.stderr.read()
    return dataset(place / "whole")


def test_fifty_kills_and_the_same_bits(place, undisturbed, capsys):
    kills, runs, chance = 0, 0, random.Random(0)
    while kills < 50:
        output, runs = place / f"killed-{runs}", runs + 1
        while True:
            files = lambda folder=output / "resume": {
                *folder.glob("checkpoints/*/*"),
                *folder.glob("shards/*"),
            }
            before = files()
            process = start(place, output, "--resume")
            while (
                process.poll() is None and files() == before
            ):  # the dice are thrown when it works, not while it starts
                time.sleep(0.01)
            try:
                process.wait(chance.uniform(0, 1.5))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                if kills < 50:
                    continue
                process = start(place, output, "--resume")
                process.wait()
            assert process.returncode == 0, process.stderr.read()
            break
        assert dataset(output).identical(undisturbed)
        shutil.rmtree(output)
    with capsys.disabled():
        print(
            f"\n{kills} kills over {runs} runs: every dataset equal bit for bit to the undisturbed one"
        )


def test_two_processes_and_eight_devices_give_the_bits_of_one(place, undisturbed, capsys):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    cluster = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    began = time.monotonic()
    pair = [start(place, place / "two", **cluster, JAX_PROCESS_ID=str(i)) for i in range(2)]
    errors = [process.communicate()[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], errors
    assert (
        all("4 blocks" in error for error in errors) and len(list((place / "two").iterdir())) == 1
    )  # one folder
    two = time.monotonic() - began
    assert dataset(place / "two").identical(undisturbed)
    began = time.monotonic()
    process = start(place, place / "eight", XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert process.wait() == 0, process.stderr.read()
    eight = time.monotonic() - began
    assert dataset(place / "eight").identical(undisturbed)
    began = time.monotonic()
    assert start(place, place / "one").wait() == 0
    one = time.monotonic() - began
    with capsys.disabled():
        print(
            f"\nbits equal; start to end: one process {one:.1f} s, two {two:.1f} s, eight devices {eight:.1f} s"
        )


def test_what_one_process_began_two_may_finish(place, undisturbed):
    process = start(place, place / "handed")
    while not any((place / "handed").glob("resume/checkpoints/*/*")):
        time.sleep(0.01)
    time.sleep(0.5)
    process.kill()
    process.wait()
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    cluster = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    pair = [
        start(place, place / "handed", "--resume", **cluster, JAX_PROCESS_ID=str(i))
        for i in range(2)
    ]
    errors = [process.communicate()[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], errors
    assert dataset(place / "handed").identical(undisturbed)


def full_disk(folder: Path) -> str:
    """A file system of 3 MiB where root may mount one; otherwise nothing, and files are limited
    instead."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    done = shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0
    return "tmpfs" if done else "file size limit"


def test_a_full_disk_keeps_the_last_good_state_and_names_it(tmp_path, capsys):
    """State after state, each larger than the one before, until the disk is full."""
    kind = full_disk(tmp_path / "disk")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder, generator, saved = tmp_path / "disk/run", np.random.default_rng(0), 0
    tree = lambda step: {"x": generator.random((step, 16, 1024)).astype(np.float32)}
    states = {}
    try:
        if kind != "tmpfs":
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
        writer = checkpoint.Writer(folder, keep=1)
        with pytest.raises(checkpoint.CheckpointError) as told:
            for step in range(1, 100):
                states[step] = tree(4 * step)
                writer.save(step, states[step], {})
                writer.wait()
                saved = step
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert saved >= 1 and f"the last good state is {folder}/{saved:012d}" in str(told.value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = checkpoint.restore(folder, {"x": states[saved]["x"]})
    assert (
        found is not None
        and found.step == saved
        and np.array_equal(found.tree["x"], states[saved]["x"])
    )
    with capsys.disabled():
        print(
            f"\nfull disk ({kind}): {saved} states written, the last one restored; told: {told.value}"
        )
    if kind == "tmpfs":
        subprocess.run(["umount", str(tmp_path / "disk")], check=True)
