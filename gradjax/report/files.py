"""Run folders and datasets on disk: never overwritten, never silently damaged.

A run leaves one folder `runs/<name>`, the next of that name `runs/<name>-2`. Datasets are netCDF4
through h5netcdf, compressed by zlib and with a fletcher32 checksum per chunk: a flipped bit raises
when it is read.
"""

import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import xarray as xr

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "xarray")


def run_folder(output: str | Path, name: str) -> Path:
    """Create and return the first of `output/name`, `output/name-2`, `output/name-3` ... that does
    not exist.
    """
    Path(output).mkdir(parents=True, exist_ok=True)
    count = 1
    while True:
        folder = Path(output) / (name if count == 1 else f"{name}-{count}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            count += 1


def unfinished(output: str | Path, name: str) -> Path | None:
    """The newest run folder of a name whose results are not written yet; None where there is
    none.
    """
    runs = [
        p
        for p in Path(output).glob(f"{name}*")
        if re.fullmatch(rf"{re.escape(name)}(-\d+)?", p.name)
    ]
    begun = [p for p in runs if (p / "config.toml").exists() and not (p / "results.nc").exists()]
    return max(begun, key=lambda p: (p / "config.toml").stat().st_mtime, default=None)


def summary(ds: xr.Dataset) -> dict[str, Any]:
    """One row per setting of a sweep's dataset over its seeds, best first: share trained, then
    median score.

    The interval of the share is Wilson's at 95%.
    """
    swept = [str(dim) for dim in ds["trained"].dims if dim != "seed"]
    names = [
        name for name in ds.coords if swept and set(ds[name].dims) <= set(swept) and ds[name].ndim
    ]
    flat = ds.stack(setting=swept) if swept else ds.expand_dims("setting")
    rows = []
    for i in range(flat.sizes["setting"]):
        one = flat.isel(setting=i)
        count, seeds = int(one["trained"].sum()), one.sizes["seed"]
        rows.append(
            {str(name): one[name].item() for name in names if name != "setting"}
            | {
                "trained": count,
                "trained_interval": wilson(count, seeds),
                "validation_score": _nanmedian(one["final_score"].values),
                "test_score": _nanmedian(one["test_score"].values),
                "diverged": int((one["diverged_at"] >= 0).sum()),
            }
        )
    rows.sort(
        key=lambda row: (-row["trained"], -np.nan_to_num(row["validation_score"], nan=-np.inf))
    )
    columns = [str(name) for name in names if name != "setting"]
    return {
        "swept": columns,
        "num_seeds": ds.sizes["seed"],
        "plan": ds.attrs.get("plan", ""),
        "settings": rows,
    }


def wilson(count: int, seeds: int) -> list[float]:
    """Wilson's 95% interval of a share of seeds.

    >>> [round(end, 2) for end in wilson(8, 8)]
    [0.68, 1.0]
    """
    interval = scipy.stats.binomtest(count, seeds).proportion_ci(method="wilson")
    return [float(interval.low), float(interval.high)]


def _nanmedian(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if known.size else math.nan


def _git_revision() -> str:
    """Revision of the gradjax source tree, with `-dirty` where it has changes; `unknown` outside a
    checkout.
    """
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def provenance() -> dict[str, Any]:
    """Versions, git revision, platform and command: what is needed to run the same thing again."""
    import gradjax

    return {
        "gradjax": gradjax.__version__,
        "git": _git_revision(),
        "python": platform.python_version(),
        "platform": platform.machine(),
        "command": " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def save(ds: xr.Dataset, path: str | Path) -> Path:
    """Write a dataset as netCDF4 with zlib and fletcher32, through a temporary file and a
    rename.
    """
    path = Path(path)
    encoding = {
        str(name): {"zlib": True, "fletcher32": True}
        for name, variable in ds.variables.items()
        if variable.ndim and variable.size and variable.dtype.kind in "fiub"
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    ds.to_netcdf(temporary, engine="h5netcdf", encoding=encoding)
    os.replace(temporary, path)
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write a small file through a temporary one and a rename: it is there whole, or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
    return path


def load(path: str | Path) -> xr.Dataset:
    """Read a dataset into memory; a damaged chunk raises OSError."""
    with xr.open_dataset(path, engine="h5netcdf") as ds:
        return ds.load()


def jsonable(value: Any) -> Any:
    """`value` with NumPy numbers and arrays as lists, and inf and NaN as the strings "inf", "-inf",
    "nan".
    """
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return jsonable(value.tolist())
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, np.generic):
        return jsonable(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def dumps(value: Any) -> str:
    """Valid JSON of `value`, non-finite numbers as strings."""
    return json.dumps(jsonable(value), indent=2, allow_nan=False)
