"""What was measured per layer and seed, as arrays with named axes, and the numbers of the JSON
object.

`Table` holds the measurements without xarray, so that a verdict can be printed and written as JSON
where the `lab` extra is not installed. The functions that read measurements take a table or an
`xarray.Dataset`. All logarithms are natural, in float64.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gradjax.core.extras import needed_for
from gradjax.diagnosis.evidence import Evidence

if TYPE_CHECKING:
    import xarray as xr

PER_LAYER = (
    "log_activation_rms",
    "log_cotangent_rms",
    "log_gradient_norm",
    "log_singular_value_max",
    "log_singular_value_min",
)
Variables = dict[str, tuple[tuple[str, ...], np.ndarray]]


@dataclass(frozen=True)
class Table:
    """Arrays with named axes, read as an `xarray.Dataset` is: `table["loss"]`, `table.sizes`.

    Attributes:
      variables: name -> (names of the axes, array).
      coords: name of an axis -> its values.
      attrs: what describes the whole.
    """

    variables: Variables
    coords: dict[str, np.ndarray]
    attrs: dict[str, Any]

    def __contains__(self, name: str) -> bool:
        return name in self.variables or name in self.coords

    def __getitem__(self, name: str) -> np.ndarray:
        return self.coords[name] if name in self.coords else self.variables[name][1]

    @property
    def sizes(self) -> dict[str, int]:
        """The length of every axis."""
        lengths = {
            axis: size
            for axes, values in self.variables.values()
            for axis, size in zip(axes, values.shape, strict=True)
        }
        return lengths | {name: len(values) for name, values in self.coords.items()}

    def to_xarray(self) -> xr.Dataset:
        """The same as a dataset.

        Raises:
          ImportError: xarray is not installed.
        """
        with needed_for("Diagnosis.measurements"):
            import xarray as xr
        return xr.Dataset(self.variables, self.coords, self.attrs)


def table(evidences: Sequence[Evidence]) -> Table:
    """The measurements of one network, or of several seeds of it, per hidden layer."""
    first = evidences[0]
    hidden = slice(0, first.hidden)

    def stacked(name: str) -> tuple[tuple[str, ...], np.ndarray]:
        return ("seed", "layer"), np.stack([getattr(e, name)[hidden] for e in evidences])

    variables: Variables = {
        "log_activation_rms": stacked("log_activation"),
        "log_cotangent_rms": stacked("log_cotangent"),
        "log_gradient_norm": stacked("log_gradient"),
        "loss": (("seed",), np.array([e.loss for e in evidences])),
    }
    names = _unique([layer.name for layer in first.layers[hidden]])
    coords = {"layer": np.array(names), "seed": np.arange(len(evidences))}
    attrs: dict[str, Any] = {"left_out": "no layer was found", "notes": "", "theory": ""}
    if names:
        attrs["left_out"] = "see gradjax.jacobian_spectrum"
        attrs["width"] = min(first.size[hidden])
    chosen = _recurrence(first)
    if chosen is not None:
        attrs["recurrence"] = first.recurrences[chosen][0].name
        states = np.stack([e.recurrences[chosen][1] for e in evidences])
        cotangents = np.stack([e.recurrences[chosen][2] for e in evidences])
        variables["log_time_activation_rms"] = (("seed", "time"), states)
        variables["log_time_cotangent_rms"] = (("seed", "time"), cotangents)
    return Table(variables, coords, attrs)


def dataset(evidences: Sequence[Evidence]) -> xr.Dataset:
    """`table` as an `xarray.Dataset`."""
    return table(evidences).to_xarray()


def _unique(names: list[str]) -> list[str]:
    """The names, those that occur more than once with their index."""
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} ({i})" for i, name in enumerate(names)]


def _recurrence(e: Evidence) -> int | None:
    """The recurrence whose cotangent changes most over its steps; None without one."""
    if not e.recurrences:
        return None

    def change(cotangent: np.ndarray) -> float:
        finite = cotangent[np.isfinite(cotangent)]
        return float(np.ptp(finite)) if finite.size else math.inf

    return int(np.argmax([change(cotangent) for _, _, cotangent in e.recurrences]))


def median(ds: Table | xr.Dataset, name: str) -> np.ndarray | None:
    """Median over seeds of a measurement, exact where seeds are -inf; None where it was not
    computed.
    """
    if name not in ds:
        return None
    values = np.asarray(ds[name])
    if np.isnan(values).any():
        middle = np.median(np.nan_to_num(values, nan=0.0), axis=0)
        return np.where(np.isnan(values).any(0), np.nan, middle)
    # NumPy's median would average the two middle seeds as -inf + inf
    low, high = (np.quantile(values, 0.5, axis=0, method=m) for m in ("lower", "higher"))
    with np.errstate(invalid="ignore"):
        return np.where(low == high, low, 0.5 * low + 0.5 * high)


def layers(ds: Table | xr.Dataset) -> list[dict[str, Any]]:
    """One row per hidden layer: its name and the medians over seeds, None for what was not
    computed.
    """
    columns = {name: median(ds, name) for name in PER_LAYER}
    rows = []
    for i, layer in enumerate(np.asarray(ds["layer"])):
        values = {name: None if x is None else float(x[i]) for name, x in columns.items()}
        rows.append({"name": str(layer), **values})
    return rows


def product(ds: Table | xr.Dataset) -> dict[str, Any]:
    """The layer product J: its log singular values, growth and condition, medians over seeds.

    Returns:
      log_singular_values; growth_nats_per_layer, log(||J||_F / sqrt(N)) per layer; condition_nats,
      log(sigma_max / sigma_min), inf where J has lost rank and NaN where J is zero. None where J
      was not computed.
    """
    values = median(ds, "log_singular_values")
    if values is None:
        return {"log_singular_values": None, "growth_nats_per_layer": None, "condition_nats": None}
    seeds = np.asarray(ds["log_singular_values"])
    rms = 0.5 * (np.logaddexp.reduce(2 * seeds, axis=1) - math.log(seeds.shape[1]))
    with np.errstate(invalid="ignore"):
        condition = seeds[:, 0] - seeds[:, -1]
    return {
        "log_singular_values": values,
        "growth_nats_per_layer": float(np.median(rms)) / (ds.sizes["layer"] - 1),
        "condition_nats": float(np.median(condition)),
    }


def theory(ds: Table | xr.Dataset) -> dict[str, Any]:
    """The growth G_l of log rms cotangent from the last layer to layer l: theory, measurement, and
    their distance

        z_l = (mean_s G_l - G_l of theory) / (max(std_s G_l, sd_l of theory) / sqrt(num_seeds))

    over seeds s. Theory is the mean of the log at this width and batch
    (`gradjax.theory.finite_width`), so that G has no bias of order depth / width. The larger
    deviation counts because few seeds of a skewed law often show too small a one, and theory's
    covers only the effects that it knows.

    Returns:
      growth_nats_per_layer (theory), measured_nats_per_layer, standard_error and standard_errors
      (z) from the last layer to the first; `layers`, theory and z of each; `note`, why there is no
      theory. None where a number is not finite.
    """
    columns = (
        "growth_nats_per_layer",
        "measured_nats_per_layer",
        "standard_error",
        "standard_errors",
    )
    rows: list[dict[str, Any]] = [
        {"name": str(name), "log_cotangent_rms": None, "standard_errors": None}
        for name in np.asarray(ds["layer"])
    ]
    note = ds.attrs.get("theory", "")
    out: dict[str, Any] = {"note": note, **dict.fromkeys(columns), "layers": rows}
    steps = len(rows) - 1
    if "theory_log_cotangent_rms" not in ds or not steps:
        return out
    expected = np.asarray(ds["theory_log_cotangent_rms"])
    measured = np.asarray(ds["log_cotangent_rms"])
    with np.errstate(all="ignore"):
        growth = measured - measured[:, -1:]
        deviation = growth.std(0, ddof=min(1, len(growth) - 1))
        of_theory = np.asarray(ds["theory_sd_log_cotangent_rms"])
        error = np.fmax(deviation, of_theory) / math.sqrt(len(growth))
        z = (growth.mean(0) - expected + expected[-1]) / error
    for i, row in enumerate(rows):
        row |= {"log_cotangent_rms": _finite(expected[i]), "standard_errors": _finite(z[i])}
    totals = (expected[0] - expected[-1], growth[:, 0].mean(), error[0])
    values = [*(_finite(total / steps) for total in totals), _finite(z[0])]
    return out | dict(zip(columns, values, strict=True))


def _finite(x: Any) -> float | None:
    return float(x) if np.isfinite(x) else None
