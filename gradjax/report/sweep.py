"""Final scores over the swept settings, as lines or planes."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradjax.report.style import BLUE, STYLE


def sweep_figure(ds: xr.Dataset, title: str = "") -> Figure:
    """Final loss, fraction of seeds trained and fraction diverged over a sweep's first two
    dimensions.

    Args:
      ds: a dataset of `gradjax.sweep`. Over one dimension the panels have lines; a third and
        further dimensions are kept at their best setting, which the title names.
      title: above the panels.
    """
    dims = [str(dim) for dim in ds["trained"].dims if dim != "seed"]
    loss = ds["final_loss"].median("seed")
    trained = ds["trained"].astype(float).mean("seed")
    diverged = (ds["diverged_at"] >= 0).astype(float).mean("seed")
    notes = ""
    if len(dims) > 2:
        stacked = trained.stack(setting=dims)
        best = stacked.isel(setting=stacked.fillna(-1).argmax("setting"))
        chosen = {dim: best[dim].item() for dim in dims[2:]}
        loss, trained, diverged = (x.sel(chosen) for x in (loss, trained, diverged))
        notes = " at " + ", ".join(f"{name} = {_short(value)}" for name, value in chosen.items())
    with plt.rc_context(STYLE):
        width = 8.6 if len(dims) > 1 else 7.4
        figure, axes = plt.subplots(1, 3, figsize=(width, 3.2), layout="constrained", sharex=True)
        shown = (
            (loss, "Median final loss"),
            (trained, "Fraction trained"),
            (diverged, "Fraction diverged"),
        )
        for ax, (values, name) in zip(axes, shown, strict=True):
            if len(dims) == 1:
                _line_panel(ax, values, dims[0], name)
            else:
                _plane_panel(figure, ax, values, dims[:2], name)
        figure.suptitle(f"{title}{notes}: {ds.sizes['seed']} seeds per setting", fontsize=12)
    return figure


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _line_panel(ax: Axes, values: xr.DataArray, dim: str, name: str) -> None:
    ax.plot(np.arange(values.size), values.values, "o-", color=BLUE)
    ax.set(title=name, xlabel=dim)
    labels = [_short(x) for x in values[dim].values.tolist()]
    ax.set_xticks(np.arange(values.size), labels, rotation=45)
    if name.startswith("Fraction"):
        ax.set_ylim(-0.05, 1.05)


def _plane_panel(
    figure: Figure, ax: Axes, values: xr.DataArray, dims: list[str], name: str
) -> None:
    """A heat map; the loss on a log scale of three decades at most, from the smallest one."""
    from matplotlib.colors import LogNorm

    grid = values.transpose(*dims).values.astype(float)
    options: dict[str, Any]
    if name.startswith("Fraction"):
        options = {"vmin": 0, "vmax": 1, "cmap": "viridis" if "trained" in name else "magma_r"}
    else:
        known = grid[np.isfinite(grid) & (grid > 0)]
        low = known.min() if known.size else 0.1
        high = min(known.max() if known.size else 1.0, 1e3 * low)
        options = {"norm": LogNorm(low, max(high, 2 * low)), "cmap": "viridis_r"}
    finite = np.where(np.isfinite(grid), grid, np.nan)
    image = ax.imshow(finite, origin="lower", aspect="auto", **options)
    ax.set_facecolor("#dddddd")
    for axis, dim in ((ax.yaxis, dims[0]), (ax.xaxis, dims[1])):
        ticks = values[dim].values.tolist()
        every = max(1, len(ticks) // 8)
        axis.set_ticks(np.arange(len(ticks))[::every], [_short(x) for x in ticks[::every]])
        axis.set_label_text(dim)
    ax.label_outer()
    ax.tick_params(axis="x", rotation=45)
    ax.grid(False)
    ax.set_title(name)
    figure.colorbar(image, ax=ax, shrink=0.9)
