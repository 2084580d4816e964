"""What was measured, as a dataset per layer and seed, and the numbers that the JSON object
reports.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from gradjax.diagnosis.evidence import Evidence


def dataset(evidences: Sequence[Evidence]) -> xr.Dataset:
    """The measurements of one network, or of several seeds of it, per hidden layer: float64 natural
    logarithms.
    """
    first = evidences[0]
    hidden = slice(0, first.hidden)
    stack = lambda name: (
        ("seed", "layer"),
        np.stack([getattr(e, name)[hidden] for e in evidences]),
    )
    names = [layer.name for layer in first.layers[hidden]]
    counts = Counter(names)
    unique = [name if counts[name] == 1 else f"{name} ({i})" for i, name in enumerate(names)]
    ds = xr.Dataset(
        {
            "log_activation_rms": stack("log_activation"),
            "log_cotangent_rms": stack("log_cotangent"),
            "log_gradient_norm": stack("log_gradient"),
            "loss": (("seed",), np.array([e.loss for e in evidences])),
        },
        coords={"layer": unique, "seed": np.arange(len(evidences))},
        attrs={
            "left_out": "see gradjax.jacobian_spectrum",
            "notes": "",
            "theory": "",
            "width": min(first.size[hidden]),
        }
        if names
        else {"left_out": "no layer was found", "notes": "", "theory": ""},
    )
    over_time, name = _over_time(evidences)
    return ds.assign(over_time).assign_attrs(name)


def _over_time(evidences: Sequence[Evidence]) -> tuple[dict[str, Any], dict[str, str]]:
    """Variables over the steps of a recurrence, of several the one whose cotangent changes most,
    and its name.
    """
    change = lambda back: np.ptp(back[np.isfinite(back)]) if np.isfinite(back).any() else np.inf
    found = evidences[0].recurrences
    if not found:
        return {}, {}
    chosen = int(np.argmax([change(back) for _, _, back in found]))
    stack = lambda part: (
        ("seed", "time"),
        np.stack([e.recurrences[chosen][part] for e in evidences]),
    )
    variables = {"log_time_activation_rms": stack(1), "log_time_cotangent_rms": stack(2)}
    return variables, {"recurrence": found[chosen][0].name}


def median(ds: xr.Dataset, name: str) -> np.ndarray | None:
    """Median over seeds of a measurement, None where it was too dear to compute; exact with -inf
    among the seeds.
    """
    if name not in ds:
        return None
    values = np.asarray(ds[name])
    if np.isnan(values).any():
        return np.where(
            np.isnan(values).any(0), np.nan, np.median(np.nan_to_num(values, nan=0.0), axis=0)
        )
    low, high = (
        np.quantile(values, 0.5, axis=0, method=m) for m in ("lower", "higher")
    )  # -inf + inf is no median
    with np.errstate(invalid="ignore"):
        return np.where(low == high, low, 0.5 * low + 0.5 * high)


_LAYER_FIELDS = (
    "log_activation_rms", "log_cotangent_rms", "log_gradient_norm", "log_singular_value_max", "log_singular_value_min",
)  # fmt: skip


def layers(ds: xr.Dataset) -> list[dict[str, Any]]:
    """One row per hidden layer: its name and the medians over seeds, None for what was too dear."""
    columns = {name: median(ds, name) for name in _LAYER_FIELDS}
    return [
        {"name": str(layer)}
        | {name: None if x is None else float(x[i]) for name, x in columns.items()}
        for i, layer in enumerate(ds["layer"].values)
    ]


def product(ds: xr.Dataset) -> dict[str, Any]:
    """Log singular values of J, its growth log(||J||_F / sqrt(N)) per layer, and log(sigma_max /
    sigma_min).

    Medians over seeds; the condition is inf where J has lost rank, and nan where J is zero.
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


def theory(ds: xr.Dataset) -> dict[str, Any]:
    """The growth G_l of log rms cotangent from the last layer to layer l: theory, measurement, and
    their distance

        z_l = (mean_s G_l - G_l of theory) / (max(std_s G_l, sd_l of theory) / sqrt(num_seeds)),      s the seeds

    Theory is `gradjax.theory.finite_width`'s mean of the log at this width and batch: no bias of order depth / width is left in G.
    The larger deviation counts because few seeds of a skewed law often show too small a one, and theory's leaves out
    what it does not know. `note` says why there is none; null where something is not finite.
    """
    fields = (
        "growth_nats_per_layer",
        "measured_nats_per_layer",
        "standard_error",
        "standard_errors",
    )
    rows = [
        {"name": str(name), "log_cotangent_rms": None, "standard_errors": None}
        for name in ds["layer"].values
    ]
    out: dict[str, Any] = {
        "note": ds.attrs.get("theory", ""),
        **dict.fromkeys(fields),
        "layers": rows,
    }
    steps = len(rows) - 1
    if "theory_log_cotangent_rms" not in ds or not steps:
        return out
    expected, measured = (
        np.asarray(ds["theory_log_cotangent_rms"]),
        np.asarray(ds["log_cotangent_rms"]),
    )
    with np.errstate(all="ignore"):
        growth = measured - measured[:, -1:]
        spread = growth.std(0, ddof=min(1, len(growth) - 1))
        error = np.fmax(spread, ds["theory_sd_log_cotangent_rms"].values) / math.sqrt(len(growth))
        z = (growth.mean(0) - expected + expected[-1]) / error
    finite = lambda x: float(x) if np.isfinite(x) else None
    for i, row in enumerate(rows):
        row |= {"log_cotangent_rms": finite(expected[i]), "standard_errors": finite(z[i])}
    per_layer = (
        np.array([expected[0] - expected[-1], growth[:, 0].mean(), error[0]]) / steps
    ).tolist()
    return out | dict(zip(fields, map(finite, (*per_layer, z[0])), strict=True))
