"""The command line killed at random, on full disks, in several processes: always the same bits."""

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

# Each costs a start of the command, some twelve seconds.
KILLS = 5

CONFIG = """
name = "resume"
[model]
depth = 2
width = 32
[optimizer]
clipping = "clip_by_global_norm"
[train]
num_steps = 1500
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
    arguments = ["sweep", str(place / "resume.toml"), "--output", str(output)]
    command = [sys.executable, "-m", "gradjax", *arguments]
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


def wait_for_work(process: subprocess.Popen, output: Path) -> None:
    """Until a process has written a checkpoint or a shard, or has ended."""

    def written():
        folder = output / "resume"
        return {*folder.glob("checkpoints/*/*"), *folder.glob("shards/*")}

    before = written()
    while process.poll() is None and written() == before:
        time.sleep(0.01)


def test_five_kills_and_the_same_bits(place, undisturbed, capsys):
    kills, runs, chance = 0, 0, random.Random(0)
    while kills < KILLS:
        output, runs, ended = place / f"killed-{runs}", runs + 1, False
        while not ended:
            process = start(place, output, "--resume")
            # so that it is killed at work, not while it starts
            wait_for_work(process, output)
            try:
                process.wait(chance.uniform(0, 1.5) if kills < KILLS else None)
                ended = True
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
        assert process.returncode == 0, process.stderr.read()
        assert dataset(output).identical(undisturbed)
        shutil.rmtree(output)
    with capsys.disabled():
        print(f"\n{kills} kills over {runs} runs: every dataset equal bit for bit to undisturbed")


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
    with capsys.disabled():
        print(f"\nbits equal; start to end: two processes {two:.1f} s, eight devices {eight:.1f} s")


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
        with pytest.raises(checkpoint.CheckpointError) as caught:
            for step in range(1, 100):
                states[step] = tree(4 * step)
                writer.save(step, states[step], {})
                writer.wait()
                saved = step
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert saved >= 1 and f"the last good state is {folder}/{saved:012d}" in str(caught.value)
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
            f"\nfull disk ({kind}): {saved} states written, the last one restored; message: "
            f"{caught.value}"
        )
    if kind == "tmpfs":
        subprocess.run(["umount", str(tmp_path / "disk")], check=True)
