"""The four panels of `gradjax diagnose`: signals, gradients, layer Jacobians and the product's
spectrum of a configured network.
"""

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradjax.report.style import (
    BLUE,
    FLOAT32,
    GREEN,
    GREY,
    LOG10,
    ORANGE,
    STYLE,
    curve,
    log_axis,
    note,
    theory_band,
)

LAYER = "hidden layer $l$"


def diagnosis_figure(ds: xr.Dataset, title: str = "") -> Figure:
    """Four panels of a `gradjax.experiment.measure.measure` dataset.

    Args:
      ds: the measurements; a panel says so where its measurement is absent.
      title: the verdict, above the panels.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(7.4, 6.0), layout="constrained")
        layer = np.arange(1, ds.sizes["layer"] + 1)
        _signals(axes[0, 0], ds, layer)
        _gradients(axes[0, 1], ds, layer)
        _jacobians(axes[1, 0], ds, layer)
        _product(axes[1, 1], ds)
        if title:
            figure.suptitle(title, fontsize=12)
    return figure


def _left_out(ds: xr.Dataset) -> str:
    return "not computed: " + (ds.attrs.get("left_out") or "no seeds asked for")


def _signals(ax: Axes, ds: xr.Dataset, layer: np.ndarray) -> None:
    curve(ax, layer, ds, "log_activation_rms", BLUE, "activation $h_l$")
    label = r"cotangent $\partial\mathcal{L}/\partial h_l$"
    curve(ax, layer, ds, "log_cotangent_rms", ORANGE, label)
    theory_band(ax, layer, ds, "log_activation_rms", "theory")
    theory_band(ax, layer, ds, "log_cotangent_rms", "_")
    log_axis(ax, "Signals", LAYER, "rms per unit")
    ax.legend(loc="best")


def _gradients(ax: Axes, ds: xr.Dataset, layer: np.ndarray) -> None:
    curve(ax, layer, ds, "log_gradient_norm", GREEN, "gradient")
    log_axis(ax, "Parameter gradients", LAYER, r"norm $\|\partial\mathcal{L}/\partial\theta_l\|$")


def _jacobians(ax: Axes, ds: xr.Dataset, layer: np.ndarray) -> None:
    title = "Layer Jacobians $J_l$"
    if "log_gain" not in ds:
        return note(ax, title, _left_out(ds))
    curve(ax, layer, ds, "log_singular_value_max", ORANGE, "largest")
    curve(ax, layer, ds, "log_gain", BLUE, "rms")
    zeros = np.isneginf(ds["log_singular_value_min"].values)
    if zeros.all():
        ax.plot([], [], color=GREEN, label="smallest: 0")
    else:
        label = "smallest (gaps: 0)" if zeros.any() else "smallest"
        curve(ax, layer, ds, "log_singular_value_min", GREEN, label)
    theory_band(ax, layer, ds, "log_gain")
    ax.axhline(0, color=GREY, lw=1, ls=":")
    log_axis(ax, title, LAYER, "singular value")
    # room for the legend above the curves
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.3 * (high - low))
    ax.legend(loc="upper center", ncols=2, columnspacing=1.0, handlelength=1.2)
    return None


def _product(ax: Axes, ds: xr.Dataset) -> None:
    depth = ds.sizes["layer"]
    if "log_singular_values" not in ds:
        return note(ax, "Layer product", "no square layer" if depth == 1 else _left_out(ds))
    values = ds["log_singular_values"].values
    index = np.arange(1, values.shape[1] + 1)
    rank = int(np.median(np.isfinite(values).sum(1)))
    curve(ax, index, ds, "log_singular_values", BLUE, f"rank {rank} of {values.shape[1]}")
    if "theory_log_product_rms" in ds:
        names = ("log_product_rms", "theory_log_product_rms", "theory_sd_log_product_rms")
        rms, mean, sd = (float(np.median(ds[name])) / LOG10 for name in names)
        # Where the forward pass overflows, theory has no number either.
        if np.isfinite((rms, mean, sd)).all():
            label = rf"theory $10^{{{mean:.1f}\pm{sd:.1f}}}$" + "\n" + rf"of rms $10^{{{rms:.1f}}}$"
            theory_band(ax, index, ds, "log_product_rms", label)
    finite = values[np.isfinite(values)] / LOG10
    for limit, name in zip(FLOAT32, ("smallest", "largest"), strict=True):
        if finite.size and finite.min() < limit < finite.max():
            ax.axhline(limit, color=ORANGE, lw=1, ls="-.", label=f"{name} float32")
    ax.axhline(0, color=GREY, lw=1, ls=":")
    title = rf"Layer product $J = J_{{{depth}}}\cdots J_2$"
    log_axis(ax, title, "index $i$", r"singular value $\sigma_i$")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="best")
    return None
