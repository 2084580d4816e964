"""The four panels of `gradjax diagnose`: signals, Jacobians and the product's spectrum of a
configured network.
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


def diagnosis_figure(ds: xr.Dataset, title: str = "") -> Figure:
    """Four panels of a `gradjax.experiment.measure.measure` dataset: signals, gradients, layer
    Jacobians, layer product.

    Args:
      ds: the measurements; what is absent is said in its panel.
      title: the verdict, above the panels.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(7.4, 6.0), layout="constrained")
        layer = np.arange(1, ds.sizes["layer"] + 1)
        xlabel = "hidden layer $l$"

        ax = axes[0, 0]
        curve(ax, layer, ds, "log_activation_rms", BLUE, "activation $h_l$")
        curve(
            ax,
            layer,
            ds,
            "log_cotangent_rms",
            ORANGE,
            r"cotangent $\partial\mathcal{L}/\partial h_l$",
        )
        theory_band(ax, layer, ds, "log_activation_rms", "theory")
        theory_band(ax, layer, ds, "log_cotangent_rms", "_")
        log_axis(ax, "Signals", xlabel, "rms per unit")
        ax.legend(loc="best")

        ax = axes[0, 1]
        curve(ax, layer, ds, "log_gradient_norm", GREEN, "gradient")
        log_axis(
            ax, "Parameter gradients", xlabel, r"norm $\|\partial\mathcal{L}/\partial\theta_l\|$"
        )

        ax, name = axes[1, 0], "Layer Jacobians $J_l$"
        if "log_gain" in ds:
            _jacobian_panel(ax, ds, layer)
            log_axis(ax, name, xlabel, "singular value")
            low, high = ax.get_ylim()
            ax.set_ylim(low, high + 0.3 * (high - low))  # room for the legend above the curves
            ax.legend(loc="upper center", ncols=2, columnspacing=1.0, handlelength=1.2)
        else:
            note(ax, name, _left_out(ds))

        depth = ds.sizes["layer"]
        ax, name = axes[1, 1], rf"Layer product $J = J_{{{depth}}}\cdots J_2$"
        if "log_singular_values" in ds:
            _product_panel(ax, ds)
            log_axis(ax, name, "index $i$", r"singular value $\sigma_i$")
            ax.legend(loc="best")
        else:
            note(ax, "Layer product", "no square layer" if depth == 1 else _left_out(ds))
        if title:
            figure.suptitle(title, fontsize=12)
    return figure


def _left_out(ds: xr.Dataset) -> str:
    return "not computed: " + (ds.attrs.get("left_out") or "no seeds asked for")


def _jacobian_panel(ax: Axes, ds: xr.Dataset, layer: np.ndarray) -> None:
    curve(ax, layer, ds, "log_singular_value_max", ORANGE, "largest")
    curve(ax, layer, ds, "log_gain", BLUE, "rms")
    zeros = np.isneginf(ds["log_singular_value_min"].values)
    if zeros.all():
        ax.plot([], [], color=GREEN, label="smallest: 0")
    else:
        curve(
            ax,
            layer,
            ds,
            "log_singular_value_min",
            GREEN,
            "smallest" + " (gaps: 0)" * bool(zeros.any()),
        )
    theory_band(ax, layer, ds, "log_gain")
    ax.axhline(0, color=GREY, lw=1, ls=":")


def _product_panel(ax: Axes, ds: xr.Dataset) -> None:
    values = ds["log_singular_values"].values
    index = np.arange(1, values.shape[1] + 1)
    rank = int(np.median(np.isfinite(values).sum(1)))
    curve(ax, index, ds, "log_singular_values", BLUE, f"rank {rank} of {values.shape[1]}")
    if "theory_log_product_rms" in ds:
        rms, mean, sd = (
            float(np.median(ds[name])) / LOG10
            for name in ("log_product_rms", "theory_log_product_rms", "theory_sd_log_product_rms")
        )
        label = rf"theory $10^{{{mean:.1f}\pm{sd:.1f}}}$" + "\n" + rf"of rms $10^{{{rms:.1f}}}$"
        theory_band(ax, index, ds, "log_product_rms", label)
    finite = values[np.isfinite(values)] / LOG10
    for limit, name in zip(FLOAT32, ("smallest", "largest"), strict=True):
        if finite.size and finite.min() < limit < finite.max():
            ax.axhline(limit, color=ORANGE, lw=1, ls="-.", label=f"{name} float32")
    ax.axhline(0, color=GREY, lw=1, ls=":")
