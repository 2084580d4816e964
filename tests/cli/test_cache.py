"""The compilation cache of the command line, on real processes: it may cost a compilation and one
line on standard error, never a run."""

import json
import os
import subprocess
import sys
import time

import pytest

from gradjax.cli import cache
from support import ROOT

# A program of JAX's own is enough: what is kept, found damaged or refused does not depend on it.
PROGRAM = """
from gradjax.cli import cache
cache.turn_on()
import jax, jax.numpy as jnp
print(float(jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x))(jnp.arange(4.0))))
"""
SMALL = [
    "--model.depth=3",
    "--model.width=8",
    "--diagnose.num_seeds=2",
    "--diagnose.spectrum_seeds=1",
    "--json",
]


def run(arguments, folder):
    """One process with its cache in `folder`: (standard output, standard error)."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPIL")}
    env |= {"GRADJAX_CACHE_DIR": str(folder), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def entries(folder):
    return sorted(folder.rglob("*-cache"))


def age(folder, seconds):
    """Entries of the last second are not recorded, so let them look older."""
    for path in entries(folder):
        moment = time.time() - seconds
        os.utime(path, (moment, moment))


@pytest.fixture
def filled(tmp_path):
    """A cache with the entries of PROGRAM, every one with a checksum, and PROGRAM's output."""
    out, err = run(["-c", PROGRAM], tmp_path)
    assert entries(tmp_path) and not err
    (folder,) = tmp_path.iterdir()
    age(tmp_path, 10)
    cache._record(folder, time.time() - 60)
    assert len(cache._recorded(folder)) == len(entries(tmp_path))
    return out


def test_a_second_process_reads_what_the_first_compiled(filled, tmp_path):
    before = entries(tmp_path)
    out, err = run(["-c", PROGRAM], tmp_path)
    assert (out, err) == (filled, "") and entries(tmp_path) == before


@pytest.mark.parametrize("damage", ["truncated", "flipped", "everything"])
def test_damaged_entries_cost_a_compilation_and_one_warning(damage, filled, tmp_path):
    for path in tmp_path.rglob("*"):
        if path.is_file() and (damage == "everything" or path.name.endswith("-cache")):
            content = bytearray(path.read_bytes())
            if damage == "truncated":
                del content[len(content) // 2 :]
            else:
                content[len(content) // 2] ^= 0x10
            path.write_bytes(content)
    out, err = run(["-c", PROGRAM], tmp_path)
    assert out == filled and err.count("\n") == 1
    assert "of the compilation cache" in err and "--no_cache" in err
    if damage != "everything":
        # They were replaced, so that the third process finds nothing to warn of.
        assert run(["-c", PROGRAM], tmp_path) == (filled, "")


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path):
    occupied = tmp_path / "file"
    occupied.write_text("not a folder")
    out, err = run(["-c", PROGRAM], occupied)
    assert out and err.count("\n") == 1 and str(occupied) in err and "--no_cache" in err


def test_the_oldest_entries_go_first(filled, tmp_path, monkeypatch):
    (folder,) = tmp_path.iterdir()
    paths = entries(folder)
    for number, path in enumerate(paths):
        os.utime(path, (number, number))
    monkeypatch.setattr(cache, "MAX_BYTES", paths[-1].stat().st_size)
    cache._remove_oldest(folder)
    assert entries(folder) == paths[-1:]


def test_an_entry_without_a_checksum_is_kept_for_a_day(filled, tmp_path):
    (folder,) = tmp_path.iterdir()
    (folder / cache._CHECKSUMS).unlink()
    assert cache._remove_damaged(folder) == 0 and entries(folder)
    age(folder, cache.UNLISTED_SECONDS + 10)
    assert cache._remove_damaged(folder) == 0 and not entries(folder)


def test_the_users_own_setting_holds(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADJAX_CACHE_DIR", str(tmp_path / "ours"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "theirs"))
    cache.turn_on()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "theirs")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"GRADJAX_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/gradjax"),
        ({"HOME": "/c"}, "/c/.cache/gradjax"),
    ],
)
def test_where_the_folder_is(environment, folder, monkeypatch):
    for name in ("GRADJAX_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(cache.cache_folder().parent) == folder


def test_no_cache_leaves_no_folder(tmp_path):
    run(["-m", "gradjax", "data", "list", "--no_cache"], tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    run(["-m", "gradjax", "data", "list"], tmp_path / "cache")
    assert (tmp_path / "cache").exists()


@pytest.mark.slow
def test_a_command_runs_on_a_garbled_cache(tmp_path):
    config = str(ROOT / "configs" / "healthy.toml")
    command = ["-m", "gradjax", "diagnose", config, *SMALL, f"--output={tmp_path / 'runs'}"]
    folder = tmp_path / "cache"
    first, _ = run(command, folder)
    assert len(entries(folder)) > 10
    for path in entries(folder):
        path.write_bytes(b"garbled")
    second, err = run(command, folder)
    assert err.count("compilation cache") == 1
    assert json.loads(second)["findings"] == json.loads(first)["findings"]
    assert json.loads(second)["product"] == json.loads(first)["product"]
