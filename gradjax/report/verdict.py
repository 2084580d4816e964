"""The figure of a verdict over any loss function, the findings' places marked."""

import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradjax.report.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    STYLE,
    curve,
    log_axis,
)


def verdict_figure(
    ds: xr.Dataset, marks: Sequence[tuple[str, int, str]] = (), title: str = ""
) -> Figure:
    """Signals and parameter gradients per layer of a `gradjax.diagnose` dataset, and its recurrence
    over time.

    A bar along an edge stands for what a logarithm cannot show: zeros below, inf and NaN above.

    Args:
      ds: `Diagnosis.measurements`. The panel over time needs the dimension `time`; with it, the
        panels over layers need at least two layers.
      marks: (dimension "layer" or "time", index, text) of the places to point at, the first one
        strongest.
      title: the verdict, above the panels.
    """
    panels: Any = [["signals"], ["gradients"]]
    size = (7.4, 5.2)
    if "time" in ds.dims:
        if ds.sizes["layer"] < 2:
            panels, size = [["time"]], (7.4, 3.4)
        else:
            panels, size = [[*row, "time"] for row in panels], (10.4, 5.2)
    of_layers = [(i, text) for dim, i, text in marks if dim == "layer"]
    of_time = [(i, text) for dim, i, text in marks if dim == "time"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplot_mosaic(panels, figsize=size, layout="constrained")
        if "signals" in axes:
            _layer_panels(axes["signals"], axes["gradients"], ds, of_layers)
        if "time" in axes:
            _time_panel(axes["time"], ds, of_time)
        if title:
            figure.suptitle(textwrap.fill(title, 80), fontsize=12)
    return figure


def _layer_panels(top: Axes, low: Axes, ds: xr.Dataset, marks: Sequence[tuple[int, str]]) -> None:
    """Signals above parameter gradients, over the same layers."""
    names, x = ds["layer"].values.astype(str), np.arange(ds.sizes["layer"])
    low.sharex(top)
    _signals(top, x, ds, "log_activation_rms", "log_cotangent_rms", "h_l")
    top.tick_params(labelbottom=False)
    curve(low, x, ds, "log_gradient_norm", GREEN, "gradient", line_style(x))
    shown = (ds["log_gradient_norm"], GREEN, "gradient")
    _finish(low, r"gradient $\|\partial\mathcal{L}/\partial\theta_l\|$", [shown])
    _mark(top, marks, len(x))
    _mark(low, marks, len(x), with_text=False)
    _names(low, names, [i for i, _ in marks])


def _time_panel(ax: Axes, ds: xr.Dataset, marks: Sequence[tuple[int, str]]) -> None:
    """Signals over the steps of the recurrence."""
    x = np.arange(ds.sizes["time"])
    _signals(ax, x, ds, "log_time_activation_rms", "log_time_cotangent_rms", "h_t")
    name = _short_name(ds.attrs.get("recurrence", "the recurrence"))
    ax.set_xlabel(f"step $t$ of {name}")
    _mark(ax, marks, len(x))


def line_style(x: np.ndarray) -> str:
    """A line with dots where there are few enough points to see them."""
    return "-" if len(x) > 40 else ".-"


def _signals(
    ax: Axes, x: np.ndarray, ds: xr.Dataset, activation: str, cotangent: str, symbol: str
) -> None:
    curve(ax, x, ds, activation, BLUE, f"activation ${symbol}$", line_style(x))
    label = rf"cotangent $\partial\mathcal{{L}}/\partial {symbol}$"
    curve(ax, x, ds, cotangent, ORANGE, label, line_style(x))
    shown = ((ds[activation], BLUE, "activation"), (ds[cotangent], ORANGE, "cotangent"))
    _finish(ax, "rms per unit", shown)


def _finish(ax: Axes, ylabel: str, shown: Sequence[tuple[xr.DataArray, str, str]]) -> None:
    """The axis of powers of ten, with bars along its edges where a median over seeds is zero
    (below) or not finite.
    """
    if ax.lines:
        log_axis(ax, "", "", ylabel)
    else:
        ax.set(ylabel=ylabel, yticks=[])
    (low, high), rows = ax.get_ylim(), {"zero": 0, "inf or NaN": 0}
    room = 0.06 * (high - low)
    for variable, color, label in shown:
        with np.errstate(invalid="ignore"):
            values = np.median(variable.values, axis=0)
        zero = np.isneginf(values)
        for found, text in ((zero, "zero"), (~np.isfinite(values) & ~zero, "inf or NaN")):
            if not found.any():
                continue
            y = 0.025 + 0.05 * rows[text]
            rows[text] += 1
            ends = np.diff(np.concatenate([[0], found, [0]]))
            first, last = np.flatnonzero(ends == 1), np.flatnonzero(ends == -1)
            height = np.full(len(first), y if text == "zero" else 1 - y)
            along = {"transform": ax.get_xaxis_transform(), "label": f"{label}: {text}"}
            ax.hlines(height, first - 0.4, last - 0.6, color=color, lw=4, **along)
    ax.set_ylim(low - rows["zero"] * room, high + rows["inf or NaN"] * room)
    bottom, top = (0.06 * n for n in rows.values())
    if len(ax.get_legend_handles_labels()[1]) > 1 or bottom or top:
        ax.legend(loc="best", bbox_to_anchor=(0, bottom, 1, 1 - bottom - top))


def _mark(ax: Axes, marks: Sequence[tuple[int, str]], count: int, with_text: bool = True) -> None:
    """A vertical line through each place, its text above the axes on the lowest line of text that
    is free there.
    """
    texts: dict[int, list[str]] = {}
    for i, text in marks:
        texts.setdefault(i, []).append(text)
    # (line, left end, right end) of the texts that are placed
    taken: list[tuple[int, float, float]] = []
    for i, found in texts.items():
        color, text = GREY if taken else "black", ", ".join(found)
        ax.axvline(i, color=color, lw=1.2, ls=(0, (4, 2)), zorder=1.5)
        side, before = "center", 0.5
        if i < count / 3:
            side, before = "left", 0.0
        elif i > 2 * count / 3:
            side, before = "right", 1.0
        # a generous guess of the width of a letter
        width = 0.018 * len(text) * count
        left = i - before * width
        crossed = {line for line, a, b in taken if left < b and a < left + width}
        line = next(n for n in range(len(texts)) if n not in crossed)
        taken.append((line, left, left + width))
        if with_text:
            ax.annotate(
                text,
                xy=(i, 1),
                xycoords=ax.get_xaxis_transform(),
                xytext=(0, 4 + 13 * line),
                textcoords="offset points",
                ha=side,
                color=color,
                fontsize=10,
            )


def _short_name(name: str) -> str:
    return name if len(name) <= 24 else "…" + name[-23:]


def _names(ax: Axes, names: np.ndarray, marked: Sequence[int]) -> None:
    """Names below the axis: twelve at most, evenly spaced; those of the marked places in bold."""
    count = len(names)
    gaps = (step * power for power in 10 ** np.arange(9) for step in (1, 2, 5))
    gap = next(gap for gap in gaps if gap * 12 >= count)
    spaced = [i for i in range(0, count, gap) if all(abs(i - j) > 0.6 * gap for j in marked)]
    shown = sorted({*marked, *spaced})
    labels = [_short_name(names[i]) for i in shown]
    ax.set_xticks(shown, labels, rotation=40, ha="right", rotation_mode="anchor", fontsize=9)
    for i, label in zip(shown, ax.get_xticklabels(), strict=True):
        label.set_fontweight("bold" if i in marked else "normal")
