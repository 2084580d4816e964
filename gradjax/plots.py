"""Figures from datasets; nothing is computed here but medians and quantiles over seeds.

`diagnosis_figure` is drawn for a page's full width and stays readable at one column's (half of it).
"""

import textwrap
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

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
        label = rf"theory $10^{{{mean:.1f}\pm{sd:.1f}}}$" + "\n" + rf"of rms $10^{{{rms:.1f}}}$"
        _theory(ax, index, ds, "log_product_rms", label)
    finite = values[np.isfinite(values)] / LOG10
    for limit, name in zip(FLOAT32, ("smallest", "largest"), strict=True):
        if finite.size and finite.min() < limit < finite.max():
            ax.axhline(limit, color=ORANGE, lw=1, ls="-.", label=f"{name} float32")
    ax.axhline(0, color=GREY, lw=1, ls=":")


# -- any loss function -----------------------------------------------------------------------------------


def verdict_figure(ds: xr.Dataset, marks: Sequence[tuple[str, int, str]] = (), title: str = "") -> Figure:
    """Signals and parameter gradients per layer of a `gradjax.diagnose` dataset, and its recurrence over time.

    A bar along an edge stands for what a logarithm cannot show: zeros below, inf and NaN above.

    Args:
      ds: `Diagnosis.measurements`; without the dimension `time` there is no panel of it, and with it none of layers
        where there is one layer alone.
      marks: (dimension "layer" or "time", index, text) of what is to be pointed at, the first one strongest.
      title: the verdict, above the panels.
    """
    import matplotlib.pyplot as plt

    layers: Any = [["signals"], ["gradients"]]
    over_time = "time" in ds.dims
    panels: Any = layers
    size = (7.4, 5.2)
    if over_time:
        one = ds.sizes["layer"] < 2
        panels, size = ([["time"]], (7.4, 3.4)) if one else ([[*row, "time"] for row in layers], (10.4, 5.2))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplot_mosaic(panels, figsize=size, layout="constrained")
        if "signals" in axes:
            _layer_panels(axes["signals"], axes["gradients"], ds, [mark[1:] for mark in marks if mark[0] == "layer"])
        if "time" in axes:
            ax, x = axes["time"], np.arange(ds.sizes["time"])
            _signals(ax, x, ds, "log_time_activation_rms", "log_time_cotangent_rms", "h_t")
            ax.set_xlabel(f"step $t$ of {_short_name(ds.attrs.get('recurrence', 'the recurrence'))}")
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
    _curve(low, x, ds, "log_gradient_norm", GREEN, "gradient", _style(x))
    shown = (ds["log_gradient_norm"], GREEN, "gradient")
    _finish(low, r"gradient $\|\partial\mathcal{L}/\partial\theta_l\|$", [shown])
    _mark(top, marks, len(x))
    _mark(low, marks, len(x), with_text=False)
    _names(low, names, [i for i, _ in marks])


def _style(x: np.ndarray) -> str:
    return "-" if len(x) > 40 else ".-"


def _signals(ax: Axes, x: np.ndarray, ds: xr.Dataset, activation: str, cotangent: str, symbol: str) -> None:
    _curve(ax, x, ds, activation, BLUE, f"activation ${symbol}$", _style(x))
    _curve(ax, x, ds, cotangent, ORANGE, rf"cotangent $\partial\mathcal{{L}}/\partial {symbol}$", _style(x))
    _finish(ax, "rms per unit", ((ds[activation], BLUE, "activation"), (ds[cotangent], ORANGE, "cotangent")))


def _finish(ax: Axes, ylabel: str, shown: Sequence[tuple[xr.DataArray, str, str]]) -> None:
    """The axis of powers of ten, with bars along its edges where a median over seeds is zero (below) or not finite."""
    if ax.lines:
        _log_axis(ax, "", "", ylabel)
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
            options = {"color": color, "lw": 4, "transform": ax.get_xaxis_transform(), "label": f"{label}: {text}"}
            ax.hlines(np.full(len(first), y if text == "zero" else 1 - y), first - 0.4, last - 0.6, **options)
    ax.set_ylim(low - rows["zero"] * room, high + rows["inf or NaN"] * room)
    bottom, top = (0.06 * n for n in rows.values())
    if len(ax.get_legend_handles_labels()[1]) > 1 or bottom or top:
        ax.legend(loc="best", bbox_to_anchor=(0, bottom, 1, 1 - bottom - top))


def _mark(ax: Axes, marks: Sequence[tuple[int, str]], count: int, with_text: bool = True) -> None:
    """A vertical line through each place, its text above the axes: on the lowest line that is free there."""
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
            n for n in range(len(texts)) if not any(n == m and left < b and a < left + width for m, a, b in taken)
        )
        taken.append((line, left, left + width))
        if with_text:
            spot = {"xy": (i, 1), "xycoords": ax.get_xaxis_transform(), "textcoords": "offset points"}
            ax.annotate(text, xytext=(0, 4 + 13 * line), ha=side, color=color, fontsize=10, **spot)


def _short_name(name: str) -> str:
    return name if len(name) <= 24 else "…" + name[-23:]


def _names(ax: Axes, names: np.ndarray, marked: Sequence[int]) -> None:
    """Names below the axis: twelve at most, evenly spaced, and bold those of the marked places."""
    count = len(names)
    gap = next(step * power for power in 10 ** np.arange(9) for step in (1, 2, 5) if step * power * 12 >= count)
    spaced = [i for i in range(0, count, gap) if all(abs(i - j) > 0.6 * gap for j in marked)]
    shown = sorted({*marked, *spaced})
    ax.set_xticks(
        shown, [_short_name(names[i]) for i in shown], rotation=40, ha="right", rotation_mode="anchor", fontsize=9
    )
    for i, label in zip(shown, ax.get_xticklabels(), strict=True):
        label.set_fontweight("bold" if i in marked else "normal")


# -- training --------------------------------------------------------------------------------------------


def _band(ax: Axes, x: np.ndarray, values: np.ndarray, color: str, label: str) -> None:
    """Median over the first axis, with the band of the quartiles and the thin range of all."""
    values = np.where(np.isfinite(values), values, np.nan)
    with warnings.catch_warnings():  # a column without a finite value has no quantile: a gap
        warnings.simplefilter("ignore", RuntimeWarning)
        low, first, middle, third, high = np.nanquantile(values, [0, 0.25, 0.5, 0.75, 1], axis=0)
    ax.fill_between(x, low, high, color=color, alpha=0.1, lw=0)
    ax.fill_between(x, first, third, color=color, alpha=0.25, lw=0)
    ax.plot(x, middle, color=color, lw=1.8, label=label)


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over blocks of `window` steps: a thousand batches are more ink than information."""
    count = values.shape[-1] // window
    return values[..., : count * window].reshape(*values.shape[:-1], count, window).mean(-1)


def training_figure(ds: xr.Dataset, title: str = "") -> Figure:
    """Four panels of a `gradjax.train` dataset over its seeds: loss, score, gradient norm, gradient per layer.

    Args:
      ds: a dataset of `gradjax.sweep` whose members are seeds alone.
      title: above the panels.
    """
    import matplotlib.pyplot as plt

    window = max(1, ds.sizes["step"] // 200)
    step = (np.arange(ds.sizes["step"] // window) + 1) * window
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(7.4, 6.0), layout="constrained")
        evaluation = ds["evaluation"].values
        ax = axes[0, 0]
        _band(ax, step, _smooth(ds["loss"].values, window), BLUE, "training batches")
        _band(ax, evaluation, ds["validation_loss"].values, ORANGE, "validation")
        ax.set(title="Loss", xlabel="step", yscale="log")
        ax.legend()
        ax = axes[0, 1]
        _band(ax, step, _smooth(ds["score"].values, window), BLUE, "training batches")
        _band(ax, evaluation, ds["validation_score"].values, ORANGE, "validation")
        ax.axhline(ds.attrs["target"], color=GREY, lw=1, ls="--", label="target")
        ax.set(title="Score", xlabel="step")
        ax.legend(loc="lower right")
        ax = axes[1, 0]
        _band(ax, step, _smooth(ds["log_gradient_norm"].values, window) / LOG10, GREEN, "before clipping")
        _log_axis(ax, "Gradient norm", "step", "norm")
        ax = axes[1, 1]
        layer = np.arange(1, ds.sizes["layer"] + 1)
        last = ds.sizes["evaluation"] - 1
        for i, color in ((0, ORANGE), (last, GREEN))[: 1 + bool(last)]:
            values = ds["layer_log_gradient_norm"].values[:, i] / LOG10
            _band(ax, layer, values, color, f"step {evaluation[i]}")
        if len(layer) == 1:
            ax.lines[0].set_marker("o")
            ax.lines[-1].set_marker("o")
        _log_axis(ax, "Gradient per layer", "hidden layer $l$", r"norm $\|\partial\mathcal{L}/\partial\theta_l\|$")
        ax.legend()
        frozen = int((ds["diverged_at"].values >= 0).sum())
        count = f"{int(ds['trained'].sum())} of {ds['trained'].size} seeds trained" + f", {frozen} diverged" * bool(
            frozen
        )
        figure.suptitle(f"{title}: {count}" if title else count, fontsize=12)
    return figure


def sweep_figure(ds: xr.Dataset, title: str = "") -> Figure:
    """Final loss, share of seeds trained and share diverged over the plane of a sweep's two first dimensions.

    Args:
      ds: a dataset of `gradjax.sweep`. Over one dimension it draws lines; a third and further ones are drawn at their
        best setting, which the title names.
      title: above the panels.
    """
    import matplotlib.pyplot as plt

    dims = [str(dim) for dim in ds["trained"].dims if dim != "seed"]
    loss = ds["final_loss"].median("seed")
    trained = ds["trained"].astype(float).mean("seed")
    diverged = (ds["diverged_at"] >= 0).astype(float).mean("seed")
    notes = ""
    if len(dims) > 2:
        best = trained.stack(setting=dims).fillna(-1).argmax("setting")
        chosen = {dim: trained.stack(setting=dims).isel(setting=best)[dim].item() for dim in dims[2:]}
        loss, trained, diverged = (x.sel(chosen) for x in (loss, trained, diverged))
        notes = " at " + ", ".join(f"{name} = {_short(value)}" for name, value in chosen.items())
    with plt.rc_context(STYLE):
        width = 8.6 if len(dims) > 1 else 7.4
        figure, axes = plt.subplots(1, 3, figsize=(width, 3.2), layout="constrained", sharex=True)
        shown = ((loss, "Median final loss"), (trained, "Share trained"), (diverged, "Share diverged"))
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
    ax.set_xticks(np.arange(values.size), [_short(x) for x in values[dim].values.tolist()], rotation=45)
    if name.startswith("Share"):
        ax.set_ylim(-0.05, 1.05)


def _plane_panel(figure: Figure, ax: Axes, values: xr.DataArray, dims: list[str], name: str) -> None:
    """A heat map; the loss on a log scale, cut at ten times that of guessing nothing."""
    from matplotlib.colors import LogNorm

    grid, share = values.transpose(*dims).values.astype(float), name.startswith("Share")
    options: dict[str, Any] = {"vmin": 0, "vmax": 1, "cmap": "viridis" if "trained" in name else "magma_r"}
    if not share:
        known = grid[np.isfinite(grid) & (grid > 0)]
        low = known.min() if known.size else 0.1
        high = min(known.max() if known.size else 1.0, 1e3 * low)
        options = {"norm": LogNorm(low, max(high, 2 * low)), "cmap": "viridis_r"}
    image = ax.imshow(np.where(np.isfinite(grid), grid, np.nan), origin="lower", aspect="auto", **options)
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


# -- coordinate check ------------------------------------------------------------------------------------


def coordinate_figure(ds: xr.Dataset, title: str = "", size: str = "") -> Figure:
    """Four panels of a `gradjax.coordinate_check` dataset against width or depth, with the exponents beside them.

    Values at creation, their change after the first step (dashed) and the last (solid), gradient and update of every
    parameter at the first step. Lines are medians over seeds, bands the range of all; the colours of values run
    from the input to the output.

    Args:
      ds: `CoordinateCheck.dataset`.
      title: the verdict, above the panels.
      size: "width" or "depth", by default the first that varies; the other one is at its largest.
    """
    import matplotlib.pyplot as plt

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
            _log_axis(ax, name, size, "rms")
            ax.set_xscale("log")
            ax.set_xticks(ds[size].values, map(str, ds[size].values))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.legend(
                loc="upper left", bbox_to_anchor=(1, 1.02), fontsize=8, title=f"exponent of {size}", title_fontsize=8
            )
        if title:
            figure.suptitle(title, fontsize=12)
    return figure


def _coordinates(ax: Axes, ds: xr.Dataset, variable: str, step: int, size: str, style: str) -> None:
    """A line per layer; of more than ten the legend names ten. What never changes has none."""
    from matplotlib import colormaps

    ds = ds.sel(step=step)
    dim = str(ds[f"slope_{variable}"].dims[0])
    labels = [str(label) for label in ds[dim].values]
    named = set(np.linspace(0, len(labels) - 1, min(len(labels), 10)).round().astype(int)) if style == "-" else ()
    for i, label in enumerate(labels):
        values = ds[variable].isel({dim: i}).transpose("seed", size).values
        if not np.isfinite(values).any():
            continue
        values = np.where(np.isfinite(values), values, np.nan) / LOG10
        color = colormaps["viridis"](0.9 * i / max(len(labels) - 1, 1))
        slope = round(float(ds[f"slope_{variable}"][i]), 2) + 0.0  # no -0.00
        text = f"{slope:+.2f}  {label.removeprefix('params/')}" if i in named else "_"
        ax.plot(ds[size].values, np.median(values, axis=0), style, color=color, marker="o", ms=3, lw=1.5, label=text)
        ax.fill_between(ds[size].values, values.min(0), values.max(0), color=color, alpha=0.12, lw=0)
