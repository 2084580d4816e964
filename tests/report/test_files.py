"""Files of a run: never overwritten, never silently damaged, readable without the `lab` extra."""

import json
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr

from gradjax.core.extras import LAB
from gradjax.report import files


def test_a_dataset_survives_the_disk_and_a_flipped_bit_raises(tmp_path):
    values = np.random.default_rng(0).standard_normal((3, 40))
    ds = xr.Dataset({"x": (("seed", "layer"), values)}, {"seed": np.arange(3)}, {"note": "of it"})
    path = files.save(ds, tmp_path / "results.nc")
    xr.testing.assert_identical(files.load(path), ds)
    damaged = 0
    data = bytearray(path.read_bytes())
    for offset in range(2000, len(data), max(1, len(data) // 20)):
        data[offset] ^= 16
        path.write_bytes(data)
        try:
            # a byte that holds no data
            np.testing.assert_array_equal(files.load(path)["x"], values)
        except (OSError, RuntimeError, KeyError, ValueError):
            damaged += 1
        data[offset] ^= 16
    assert damaged > 0


def test_run_folders_are_never_overwritten(tmp_path):
    names = [files.run_folder(tmp_path / "runs", "demo").name for _ in range(3)]
    assert names == ["demo", "demo-2", "demo-3"]
    assert files.unfinished(tmp_path / "runs", "demo") is None
    (tmp_path / "runs" / "demo-2" / "config.toml").touch()
    assert files.unfinished(tmp_path / "runs", "demo").name == "demo-2"
    (tmp_path / "runs" / "demo-2" / "results.nc").touch()
    assert files.unfinished(tmp_path / "runs", "demo") is None


def test_json_holds_what_json_cannot():
    value = {"a": np.float32(0.5), 1: [np.array([np.inf, -np.inf]), (np.nan, None)], "b": True}
    assert json.loads(files.dumps(value)) == {
        "a": 0.5,
        "1": [["inf", "-inf"], ["nan", None]],
        "b": True,
    }


@pytest.mark.parametrize("swept", [("rate",), ()])
def test_a_summary_ranks_settings_by_seeds_trained_then_score(swept):
    shape = (3,) * len(swept)
    trained = np.array([[0, 1, 1], [1, 1, 1], [1, 1, 1]], bool)[: 3 if swept else 1]
    score = np.array([[0.1, 0.2, np.nan], [0.5, 0.6, 0.7], [0.7, 0.8, 0.9]])[: 3 if swept else 1]
    dims = (*swept, "seed")
    as_swept = lambda x: (dims, x.reshape(*shape, 3))
    variables = {"trained": as_swept(trained), "diverged_at": as_swept(np.where(trained, -1, 5))}
    variables |= {name: as_swept(score) for name in ("final_score", "test_score")}
    coords = {"rate": ("rate", [0.1, 0.2, 0.3])} if swept else {}
    found = files.summary(xr.Dataset(variables, coords))
    assert found["swept"] == list(swept) and found["num_seeds"] == 3
    rows = found["settings"]
    assert [row["trained"] for row in rows] == ([3, 3, 2] if swept else [2])
    assert rows[-1]["diverged"] == 1 and rows[-1]["validation_score"] == pytest.approx(0.15)
    if swept:
        assert [row["rate"] for row in rows] == [0.3, 0.2, 0.1]


def test_folders_and_json_need_no_package_of_the_lab_extra(tmp_path):
    code = f"""
import sys
for name in {list(LAB)}:
    sys.modules[name] = None
from gradjax.report import files
folder = files.run_folder({str(tmp_path)!r}, "run")
files.write_text(folder / "a.json", files.dumps(files.provenance()))
for ask in (lambda: files.load(folder / "x.nc"), lambda: files.save(None, folder / "x.nc")):
    try:
        ask()
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    load, save = done.stdout.splitlines()
    assert load.startswith("loading a dataset needs ") and load.endswith("'gradjax[lab]'")
    assert save.startswith("saving a dataset needs ") and save.endswith("'gradjax[lab]'")
    assert json.loads((tmp_path / "run" / "a.json").read_text())["command"] == "-c"
