"""Figures from datasets; nothing is computed here but medians and quantiles over seeds.

`diagnosis_figure` is drawn for a page's full width and stays readable at one column's (half of it).
"""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

LOG10 = np.log(10.0)
FLOAT32 = (np.log(np.finfo(np.float32).tiny) / LOG10, np.log(np.finfo(np.float32).max) / LOG10)
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#767676"  # Okabe and Ito: safe for colour blindness
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


def _power(value: float, _position) -> str:
    return rf"$10^{{{value:g}}}$"


def _curve(ax: Axes, x: np.ndarray, ds: xr.Dataset, name: str, color: str, label: str, style: str = "-") -> None:
    """Median over seeds in powers of ten, with the band between the smallest and the largest seed."""
    values = np.where(np.isfinite(ds[name].values), ds[name].values / LOG10, np.nan)
    if np.isnan(values).all():
        return
    with np.errstate(all="ignore"):
        ax.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.2, lw=0)
        ax.plot(x, np.median(values, axis=0), style, color=color, label=label, lw=1.8)


def _theory(ax: Axes, x: np.ndarray, ds: xr.Dataset, name: str, label: str = "theory") -> None:
    """The theory of a variable, dashed, in powers of ten, with one network's standard deviation to either side."""
    if f"theory_{name}" not in ds:
        return
    mean = np.broadcast_to(ds[f"theory_{name}"].values / LOG10, x.shape)
    if f"theory_sd_{name}" in ds:
        sd = ds[f"theory_sd_{name}"].values / LOG10
        ax.fill_between(x, mean - sd, mean + sd, color=GREY, alpha=0.2, lw=0)
    ax.plot(x, mean, "--", color="black", lw=1.1, label=label)


def _log_axis(ax: Axes, title: str, xlabel: str, ylabel: str) -> None:
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    low, high = ax.get_ylim()
    middle = (low + high) / 2
    ax.set_ylim(min(low, middle - 1.1), max(high, middle + 1.1))  # two decades at the least: noise is no trend
    ax.yaxis.set_major_formatter(FuncFormatter(_power))


def _note(ax: Axes, title: str, text: str) -> None:
    ax.set(title=title, xticks=[], yticks=[])
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=GREY)


def diagnosis_figure(ds: xr.Dataset, title: str = "") -> Figure:
    """Four panels of a `gradjax.measure.measure` dataset: signals, gradients, layer Jacobians, layer product.

    Args:
      ds: the measurements; what is absent is said in its panel.
      title: the verdict, above the panels.
    """
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(7.4, 6.0), layout="constrained")
        layer = np.arange(1, ds.sizes["layer"] + 1)
        xlabel = "hidden layer $l$"

        ax = axes[0, 0]
        _curve(ax, layer, ds, "log_activation_rms", BLUE, "activation $h_l$")
        _curve(ax, layer, ds, "log_cotangent_rms", ORANGE, r"cotangent $\partial\mathcal{L}/\partial h_l$")
        _theory(ax, layer, ds, "log_activation_rms", "theory")
        _theory(ax, layer, ds, "log_cotangent_rms", "_")
        _log_axis(ax, "Signals", xlabel, "rms per unit")
        ax.legend(loc="best")

        ax = axes[0, 1]
        _curve(ax, layer, ds, "log_gradient_norm", GREEN, "gradient")
        _log_axis(ax, "Parameter gradients", xlabel, r"norm $\|\partial\mathcal{L}/\partial\theta_l\|$")

        ax, name = axes[1, 0], "Layer Jacobians $J_l$"
        if "log_gain" in ds:
            _jacobian_panel(ax, ds, layer)
            _log_axis(ax, name, xlabel, "singular value")
            low, high = ax.get_ylim()
            ax.set_ylim(low, high + 0.3 * (high - low))  # room for the legend above the curves
            ax.legend(loc="upper center", ncols=2, columnspacing=1.0, handlelength=1.2)
        else:
            _note(ax, name, _left_out(ds))

        depth = ds.sizes["layer"]
        ax, name = axes[1, 1], rf"Layer product $J = J_{{{depth}}}\cdots J_2$"
        if "log_singular_values" in ds:
            _product_panel(ax, ds)
            _log_axis(ax, name, "index $i$", r"singular value $\sigma_i$")
            ax.legend(loc="best")
        else:
            _note(ax, "Layer product", "no square layer" if depth == 1 else _left_out(ds))
        if title:
            figure.suptitle(title, fontsize=12)
    return figure


def _left_out(ds: xr.Dataset) -> str:
    return "not computed: " + (ds.attrs.get("left_out") or "no seeds asked for")


def _jacobian_panel(ax: Axes, ds: xr.Dataset, layer: np.ndarray) -> None:
    _curve(ax, layer, ds, "log_singular_value_max", ORANGE, "largest")
    _curve(ax, layer, ds, "log_gain", BLUE, "rms")
    zeros = np.isneginf(ds["log_singular_value_min"].values)
    if zeros.all():
        ax.plot([], [], color=GREEN, label="smallest: 0")
    else:
        _curve(ax, layer, ds, "log_singular_value_min", GREEN, "smallest" + " (gaps: 0)" * bool(zeros.any()))
    _theory(ax, layer, ds, "log_gain")
    ax.axhline(0, color=GREY, lw=1, ls=":")


def _product_panel(ax: Axes, ds: xr.Dataset) -> None:
    values = ds["log_singular_values"].values
    index = np.arange(1, values.shape[1] + 1)
    rank = int(np.median(np.isfinite(values).sum(1)))
    _curve(ax, index, ds, "log_singular_values", BLUE, f"rank {rank} of {values.shape[1]}")
    if "theory_log_product_rms" in ds:
        rms, mean, sd = (
            float(np.median(ds[name])) / LOG10
            for name in ("log_product_rms", "theory_log_product_rms", "theory_sd_log_product_rms")
        )
        _theory(ax, index, ds, "log_product_rms", rf"rms $10^{{{rms:.1f}}}$, theory $10^{{{mean:.1f}\pm{sd:.1f}}}$")
    finite = values[np.isfinite(values)] / LOG10
    for limit, name in zip(FLOAT32, ("smallest", "largest"), strict=True):
        if finite.size and finite.min() < limit < finite.max():
            ax.axhline(limit, color=ORANGE, lw=1, ls="-.", label=f"{name} float32")
    ax.axhline(0, color=GREY, lw=1, ls=":")
