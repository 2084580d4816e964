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
      ds: `Diagnosis.measurements`; without the dimension `time` there is no panel of it, and with it none of layers
        where there is one layer alone.
      marks: (dimension "layer" or "time", index, text) of what is to be pointed at, the first one
        strongest.
      title: the verdict, above the panels.
    """
    layers: Any = [["signals"], ["gradients"]]
    over_time = "time" in ds.dims
    panels: Any = layers
    size = (7.4, 5.2)
    if over_time:
        one = ds.sizes["layer"] < 2
        panels, size = (
            ([["time"]], (7.4, 3.4)) if one else ([[*row, "time"] for row in layers], (10.4, 5.2))
        )
    with plt.rc_context(STYLE):
        figure, axes = plt.subplot_mosaic(panels, figsize=size, layout="constrained")
        if "signals" in axes:
            _layer_panels(
                axes["signals"],
                axes["gradients"],
                ds,
                [mark[1:] for mark in marks if mark[0] == "layer"],
            )
        if "time" in axes:
            ax, x = axes["time"], np.arange(ds.sizes["time"])
            _signals(ax, x, ds, "log_time_activation_rms", "log_time_cotangent_rms", "h_t")
            ax.set_xlabel(
                f"step $t$ of {_short_name(ds.attrs.get('recurrence', 'the recurrence'))}"
            )
            _mark(ax, [mark[1:] for mark in marks if mark[0] == "time"], len(x))
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


def line_style(x: np.ndarray) -> str:
    return "-" if len(x) > 40 else ".-"


def _signals(
    ax: Axes, x: np.ndarray, ds: xr.Dataset, activation: str, cotangent: str, symbol: str
) -> None:
    curve(ax, x, ds, activation, BLUE, f"activation ${symbol}$", line_style(x))
    curve(
        ax,
        x,
        ds,
        cotangent,
        ORANGE,
        rf"cotangent $\partial\mathcal{{L}}/\partial {symbol}$",
        line_style(x),
    )
    _finish(
        ax,
        "rms per unit",
        ((ds[activation], BLUE, "activation"), (ds[cotangent], ORANGE, "cotangent")),
    )


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
            options = {
                "color": color,
                "lw": 4,
                "transform": ax.get_xaxis_transform(),
                "label": f"{label}: {text}",
            }
            ax.hlines(
                np.full(len(first), y if text == "zero" else 1 - y),
                first - 0.4,
                last - 0.6,
                **options,
            )
    ax.set_ylim(low - rows["zero"] * room, high + rows["inf or NaN"] * room)
    bottom, top = (0.06 * n for n in rows.values())
    if len(ax.get_legend_handles_labels()[1]) > 1 or bottom or top:
        ax.legend(loc="best", bbox_to_anchor=(0, bottom, 1, 1 - bottom - top))


def _mark(ax: Axes, marks: Sequence[tuple[int, str]], count: int, with_text: bool = True) -> None:
    """A vertical line through each place, its text above the axes: on the lowest line that is free
    there.
    """
    texts: dict[int, list[str]] = {}
    for i, text in marks:
        texts.setdefault(i, []).append(text)
    taken: list[tuple[int, float, float]] = []  # line, from, to
    for i, found in texts.items():
        color, text = GREY if taken else "black", ", ".join(found)
        ax.axvline(i, color=color, lw=1.2, ls=(0, (4, 2)), zorder=1.5)
        side = "left" if i < count / 3 else "right" if i > 2 * count / 3 else "center"
        width = 0.018 * len(text) * count  # of a letter: a generous guess
        left = i - {"left": 0.0, "center": 0.5, "right": 1.0}[side] * width
        line = next(
            n
            for n in range(len(texts))
            if not any(n == m and left < b and a < left + width for m, a, b in taken)
        )
        taken.append((line, left, left + width))
        if with_text:
            spot = {
                "xy": (i, 1),
                "xycoords": ax.get_xaxis_transform(),
                "textcoords": "offset points",
            }
            ax.annotate(text, xytext=(0, 4 + 13 * line), ha=side, color=color, fontsize=10, **spot)


def _short_name(name: str) -> str:
    return name if len(name) <= 24 else "…" + name[-23:]


def _names(ax: Axes, names: np.ndarray, marked: Sequence[int]) -> None:
    """Names below the axis: twelve at most, evenly spaced, and bold those of the marked places."""
    count = len(names)
    gap = next(
        step * power
        for power in 10 ** np.arange(9)
        for step in (1, 2, 5)
        if step * power * 12 >= count
    )
    spaced = [i for i in range(0, count, gap) if all(abs(i - j) > 0.6 * gap for j in marked)]
    shown = sorted({*marked, *spaced})
    ax.set_xticks(
        shown,
        [_short_name(names[i]) for i in shown],
        rotation=40,
        ha="right",
        rotation_mode="anchor",
        fontsize=9,
    )
    for i, label in zip(shown, ax.get_xticklabels(), strict=True):
        label.set_fontweight("bold" if i in marked else "normal")
