"""Run folders and datasets on disk: never overwritten, never silently damaged.

A run leaves one folder `runs/<name>`, the next of that name `runs/<name>-2`. Datasets are netCDF4
through h5netcdf, compressed by zlib and with a fletcher32 checksum per chunk: a flipped bit raises
when it is read. JSON, folders and provenance need no package of the `lab` extra.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradjax.core.extras import needed_for
from gradjax.core.names import suggest_names

if TYPE_CHECKING:
    import xarray as xr

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "xarray")


def run_folder(output: str | Path, name: str) -> Path:
    """Create and return the first new folder of `output/name`, `output/name-2`, ..."""
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
    """The newest run folder of a name whose results are not written yet; None without one."""
    of_name = re.compile(rf"{re.escape(name)}(-\d+)?")
    begun = [
        folder
        for folder in Path(output).glob(f"{name}*")
        if of_name.fullmatch(folder.name)
        and (folder / "config.toml").exists()
        and not (folder / "results.nc").exists()
    ]
    return max(begun, key=lambda folder: (folder / "config.toml").stat().st_mtime, default=None)


def summary(ds: xr.Dataset) -> dict[str, Any]:
    """One row per setting of a sweep's dataset over its seeds, best first: by the number of seeds
    that trained, then by the median score. Intervals of the fraction trained are Wilson's at 95%.
    """
    swept = [str(dim) for dim in ds["trained"].dims if dim != "seed"]
    names = [
        str(name)
        for name, values in ds.coords.items()
        if values.ndim and set(values.dims) <= set(swept) and name != "setting"
    ]
    flat = ds.stack(setting=swept) if swept else ds.expand_dims("setting")
    settings = [flat.isel(setting=i) for i in range(flat.sizes["setting"])]
    rows = [{name: one[name].item() for name in names} | _over_seeds(one) for one in settings]

    def rank(row: dict[str, Any]) -> tuple[float, float]:
        return -row["trained"], -np.nan_to_num(row["validation_score"], nan=-np.inf)

    rows.sort(key=rank)
    return {
        "swept": names,
        "num_seeds": ds.sizes["seed"],
        "plan": ds.attrs.get("plan", ""),
        "settings": rows,
    }


def _over_seeds(one: xr.Dataset) -> dict[str, Any]:
    """What a row reports of one setting."""
    count = int(one["trained"].sum())
    return {
        "trained": count,
        "trained_interval": wilson(count, one.sizes["seed"]),
        "validation_score": _nanmedian(one["final_score"].values),
        "test_score": _nanmedian(one["test_score"].values),
        "diverged": int((one["diverged_at"] >= 0).sum()),
    }


def wilson(count: int, seeds: int) -> list[float]:
    """Wilson's 95% interval of a fraction of seeds.

    >>> [round(end, 2) for end in wilson(8, 8)]
    [0.68, 1.0]
    """
    import scipy.stats

    interval = scipy.stats.binomtest(count, seeds).proportion_ci(method="wilson")
    return [float(interval.low), float(interval.high)]


def _nanmedian(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if known.size else math.nan


def _git_revision() -> str:
    """Revision of the source tree, with `-dirty` where it has changes; `unknown` outside a
    checkout.
    """
    folder = str(Path(__file__).parent)
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    command = ["git", "-C", folder, *describe]
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
        **{name: version for name in PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str:
    """The version of an installed package, "" where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def save(ds: xr.Dataset, path: str | Path) -> Path:
    """Write a dataset as netCDF4 with zlib and fletcher32, through a temporary file and a rename.

    Raises:
      ImportError: h5netcdf is not installed; it comes with `gradjax[lab]`.
    """
    with needed_for("saving a dataset"):
        import h5netcdf  # noqa: F401 - xarray would name its own engines instead
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
    """Read a dataset into memory.

    Raises:
      OSError: a chunk is damaged.
      ImportError: xarray or h5netcdf is not installed; both come with `gradjax[lab]`.
    """
    with needed_for("loading a dataset"):
        import h5netcdf  # noqa: F401
        import xarray as xr
    with xr.open_dataset(path, engine="h5netcdf") as ds:
        return ds.load()


def jsonable(value: Any) -> Any:
    """`value` with NumPy's numbers and arrays as Python's, and inf and NaN as the strings "inf",
    "-inf" and "nan".
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
        return str(value)
    return value


def dumps(value: Any) -> str:
    """Valid JSON of `value`, non-finite numbers as strings."""
    return json.dumps(jsonable(value), indent=2, allow_nan=False)


__getattr__ = suggest_names(__name__)
