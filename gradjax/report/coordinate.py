"""The figure of a coordinate check: sizes of updates and activations against width or depth."""

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from gradjax.report.style import LOG10, STYLE, log_axis


def coordinate_figure(ds: xr.Dataset, title: str = "", size: str = "") -> Figure:
    """Four panels of a coordinate check against width or depth, with the exponents beside them.

    Values at creation, their change after the first step (dashed) and the last (solid), gradient
    and update of every parameter at the first step. Lines are medians over seeds, bands the range
    of all; the colours run from the input to the output.

    Args:
      ds: `CoordinateCheck.dataset`.
      title: the verdict, above the panels.
      size: "width" or "depth", by default the first that varies; the other one is kept at its
        largest.
    """
    size = size or str(ds["size"].values[0])
    ds = ds.isel({"depth" if size == "width" else "width": -1}).sel(size=size)
    last = ds.sizes["step"] - 1
    panels = (
        ("Value at creation, $h_0$", "log_value_rms", (0,)),
        (f"Change, $h_{{{last}}} - h_0$ (dashed: $h_1 - h_0$)", "log_change_rms", (1, last)),
        (r"First gradient, $\partial\mathcal{L}/\partial\theta$", "log_gradient_rms", (0,)),
        (r"First update, $\Delta\theta$", "log_update_rms", (0,)),
    )
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(9.6, 6.4), layout="constrained")
        for ax, (name, variable, steps) in zip(axes.flat, panels, strict=True):
            for step in sorted(set(steps)):
                _coordinates(ax, ds, variable, step, size, "-" if step == steps[-1] else "--")
            log_axis(ax, name, size, "rms")
            ax.set_xscale("log")
            ax.set_xticks(ds[size].values, map(str, ds[size].values))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.legend(
                loc="upper left",
                bbox_to_anchor=(1, 1.02),
                fontsize=8,
                title=f"exponent of {size}",
                title_fontsize=8,
            )
        if title:
            figure.suptitle(title, fontsize=12)
    return figure


def _coordinates(ax: Axes, ds: xr.Dataset, variable: str, step: int, size: str, style: str) -> None:
    """A line per layer, none for a layer that never changes; the legend names ten at most."""
    from matplotlib import colormaps

    ds = ds.sel(step=step)
    dim = str(ds[f"slope_{variable}"].dims[0])
    labels = [str(label) for label in ds[dim].values]
    named: set[int] = set()
    if style == "-":
        named = set(np.linspace(0, len(labels) - 1, min(len(labels), 10)).round().astype(int))
    sizes = ds[size].values
    for i, label in enumerate(labels):
        values = ds[variable].isel({dim: i}).transpose("seed", size).values
        if not np.isfinite(values).any():
            continue
        values = np.where(np.isfinite(values), values, np.nan) / LOG10
        color = colormaps["viridis"](0.9 * i / max(len(labels) - 1, 1))
        text = "_"
        if i in named:
            # adding zero turns -0.0 into 0.0
            slope = round(float(ds[f"slope_{variable}"][i]), 2) + 0.0
            text = f"{slope:+.2f}  {label.removeprefix('params/')}"
        middle = np.median(values, axis=0)
        ax.plot(sizes, middle, style, color=color, marker="o", ms=3, lw=1.5, label=text)
        ax.fill_between(sizes, values.min(0), values.max(0), color=color, alpha=0.12, lw=0)
