"""The figure of `gradjax cure`: ranking, learning curves, gradient and spectrum."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gradjax.report.style import (
    BLUE,
    FLOAT32,
    GREEN,
    GREY,
    LOG10,
    ORANGE,
    STYLE,
    band,
    curve,
    log_axis,
    note,
)

SHOWN = 16  # remedies in the ranking; the worst are left out
CURVES = (GREEN, BLUE, "#cc79a7")  # of the best three
UNTREATED = ORANGE


def cure_figure(
    ranking: Sequence[Mapping[str, Any]],
    ds: xr.Dataset,
    before: xr.Dataset,
    after: xr.Dataset | None,
    title: str = "",
) -> Figure:
    """Ranking on the left; on the right learning curves, gradient norm and the product's spectrum.

    Args:
      ranking: the rows of `gradjax.cure.search.rank`, best first.
      ds: results along `remedy`.
      before, after: `gradjax.experiment.measure` datasets of the untreated network and of the
        winner (None: none is better).
      title: above the panels.
    """
    untreated = next(row for row in ranking if row["remedy"] == "untreated")
    rows = [*[row for row in ranking if row["remedy"] != "untreated"][:SHOWN], untreated]
    best = [row["remedy"] for row in rows[:-1][: len(CURVES)]]
    colors = dict(zip(best, CURVES, strict=False)) | {"untreated": UNTREATED}
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(10.5, max(5.2, 2.0 + 0.27 * len(rows))), layout="constrained")
        grid = figure.add_gridspec(2, 3, width_ratios=(1.25, 1, 1))
        _ranking(figure.add_subplot(grid[:, 0]), rows, colors)
        _scores(figure.add_subplot(grid[0, 1]), ds, colors)
        _norms(figure.add_subplot(grid[0, 2]), ds, colors)
        winner = ranking[0]["remedy"] if after is not None else ""
        _layers(figure.add_subplot(grid[1, 1]), before, after, winner)
        _spectra(figure.add_subplot(grid[1, 2]), before, after, winner)
        if title:
            figure.suptitle(title, fontsize=12)
    return figure


def _ranking(ax: Axes, rows: Sequence[Mapping[str, Any]], colors: Mapping[str, str]) -> None:
    """Fraction of seeds that train with Wilson's interval, the best on top, and the mean score."""
    y = np.arange(len(rows))[::-1]
    fraction = np.array([row["fraction"] for row in rows])
    low, high = np.array([row["fraction_interval"] for row in rows]).T
    color = [colors.get(row["remedy"], "#b5b5b5") for row in rows]
    ax.barh(y, fraction, color=color, height=0.7)
    interval = np.clip([fraction - low, high - fraction], 0, None)
    ax.errorbar(fraction, y, xerr=interval, fmt="none", ecolor="black", lw=0.9)
    for place, row in zip(y, rows, strict=True):
        lost = f"  {row['diverged']} lost" if row["diverged"] else ""
        text = f"{row['score']:.2f}{lost}"
        ax.text(1.04, place, text, va="center", fontsize=8.5, color=GREY)
    names = [row["remedy"].replace("_", " ").replace("+", " +\n") for row in rows]
    ax.set_yticks(y, names, fontsize=9)
    # the coloured names are the legend of the other panels
    for label, row in zip(ax.get_yticklabels(), rows, strict=True):
        label.set_color(colors.get(row["remedy"], "black"))
    ax.set(title="Seeds that train", xlabel="fraction (95% interval); mean score beside it")
    ax.set(xlim=(0, 1.0), ylim=(-0.6, len(rows) - 0.4))
    ax.grid(axis="y", visible=False)


def _scores(ax: Axes, ds: xr.Dataset, colors: Mapping[str, str]) -> None:
    for name, color in reversed(list(colors.items())):
        one = ds["validation_score"].sel(remedy=name).dropna("evaluation", how="all")
        scores = one.transpose("seed", ...).values
        band(ax, one["evaluation"].values, scores, color, name.replace("_", " "))
    ax.axhline(ds.attrs["target"], color=GREY, lw=1, ls="--")
    finite = ds["validation_score"].values
    finite = finite[np.isfinite(finite)]
    low = float(np.quantile(finite, 0.02)) if finite.size else 0.0
    ax.set(title="Validation score (dashed: target)", xlabel="step")
    ax.set_ylim(max(low, -0.2) - 0.05, 1.03)


def _norms(ax: Axes, ds: xr.Dataset, colors: Mapping[str, str]) -> None:
    """Norm of the whole gradient along the steps."""
    for name, color in reversed(list(colors.items())):
        values = ds["log_gradient_norm"].sel(remedy=name).transpose("seed", "step").values / LOG10
        window = max(1, values.shape[1] // 150)
        count = values.shape[1] // window
        smooth = np.median(values[:, : count * window].reshape(len(values), count, window), -1)
        band(ax, (np.arange(count) + 1) * window, smooth, color, name)
    log_axis(ax, "Gradient norm in training", "step", "before clipping")


def _layers(ax: Axes, before: xr.Dataset, after: xr.Dataset | None, winner: str) -> None:
    """Gradient of each layer's parameters; where the network is one recurrence, the cotangent of
    its state over time.
    """
    over_time = before.sizes.get("layer", 0) < 2 and "log_time_cotangent_rms" in before
    name, dim, title, xlabel = "log_gradient_norm", "layer", "Gradient per layer", "layer"
    ylabel = r"norm $\|\partial\mathcal{L}/\partial\theta_l\|$"
    if over_time:
        name, dim, title, xlabel = "log_time_cotangent_rms", "time", "Gradient over time", "step"
        ylabel = r"rms $\partial\mathcal{L}/\partial h_t$"
    for ds, color, label in _compared(before, after, winner):
        if ds is not None and name in ds and ds.sizes[dim]:
            curve(ax, np.arange(1, ds.sizes[dim] + 1), ds, name, color, label)
    log_axis(ax, f"{title}, at the start", xlabel, ylabel)
    ax.legend(fontsize=8)


def _compared(before: xr.Dataset, after: xr.Dataset | None, winner: str) -> list[tuple]:
    """(dataset, colour, label) of the two networks."""
    return [(before, UNTREATED, "before"), (after, GREEN, winner.replace("_", " "))]


def _spectra(ax: Axes, before: xr.Dataset, after: xr.Dataset | None, winner: str) -> None:
    drawn = False
    for ds, color, label in _compared(before, after, winner):
        if ds is not None and "log_singular_values" in ds:
            values = ds["log_singular_values"].values
            x = (np.arange(values.shape[1]) + 0.5) / values.shape[1]
            curve(ax, x, ds, "log_singular_values", color, label)
            drawn = True
    if not drawn:
        return note(ax, "Layer product", "not computed")
    ax.axhline(0, color=GREY, lw=1, ls=":")
    low, high = ax.get_ylim()
    for limit in FLOAT32:
        if low < limit < high:
            ax.axhline(limit, color=GREY, lw=1, ls="-.")
    log_axis(ax, "Layer product $J$", "fraction of the index", "singular value")
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    return None
