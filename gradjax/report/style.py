"""What the figures share: colours, sizes, axes of powers of ten, bands over seeds.

Figures are drawn from datasets; nothing is computed here but medians and quantiles over seeds. They
are drawn for a page's full width and stay readable at one column's (half of it).
"""

import warnings
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

LOG10 = np.log(10.0)
FLOAT32 = (np.log(np.finfo(np.float32).tiny) / LOG10, np.log(np.finfo(np.float32).max) / LOG10)
# Okabe and Ito's colours, which colour-blind readers tell apart
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#767676"
STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "legend.fontsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "svg.fonttype": "none",
}


def power(exponent: float, _position: int) -> str:
    """The label of a tick at 10^exponent."""
    return rf"$10^{{{exponent:g}}}$"


def curve(
    ax: Axes, x: np.ndarray, ds: xr.Dataset, name: str, color: str, label: str, style: str = "-"
) -> None:
    """Median over seeds in powers of ten, with the band between the smallest and the largest
    seed.
    """
    values = np.where(np.isfinite(ds[name].values), ds[name].values / LOG10, np.nan)
    if np.isnan(values).all():
        return
    with np.errstate(all="ignore"):
        ax.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.2, lw=0)
        ax.plot(x, np.median(values, axis=0), style, color=color, label=label, lw=1.8)


def theory_band(ax: Axes, x: np.ndarray, ds: xr.Dataset, name: str, label: str = "theory") -> None:
    """The theory of a variable, dashed, in powers of ten, with one network's standard deviation to
    either side.
    """
    if f"theory_{name}" not in ds:
        return
    mean = np.broadcast_to(ds[f"theory_{name}"].values / LOG10, x.shape)
    if f"theory_sd_{name}" in ds:
        sd = ds[f"theory_sd_{name}"].values / LOG10
        ax.fill_between(x, mean - sd, mean + sd, color=GREY, alpha=0.2, lw=0)
    ax.plot(x, mean, "--", color="black", lw=1.1, label=label)


def log_axis(ax: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Titles, and ticks at powers of ten, for curves that are drawn as logarithms."""
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    low, high = ax.get_ylim()
    middle = (low + high) / 2
    # at least two decades, so that noise does not look like a trend
    ax.set_ylim(min(low, middle - 1.1), max(high, middle + 1.1))
    ax.yaxis.set_major_formatter(FuncFormatter(power))


def note(ax: Axes, title: str, text: str) -> None:
    """A panel that says why it is empty."""
    ax.set(title=title, xticks=[], yticks=[])
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=GREY)


def band(ax: Axes, x: np.ndarray, values: np.ndarray, color: str, label: str) -> None:
    """Median over the first axis, with the band of the quartiles and the thin range of all."""
    values = np.where(np.isfinite(values), values, np.nan)
    # a column without a finite value has no quantile, which leaves a gap
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        low, first, middle, third, high = np.nanquantile(values, [0, 0.25, 0.5, 0.75, 1], axis=0)
    ax.fill_between(x, low, high, color=color, alpha=0.1, lw=0)
    ax.fill_between(x, first, third, color=color, alpha=0.25, lw=0)
    ax.plot(x, middle, color=color, lw=1.8, label=label)
