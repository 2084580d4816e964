"""Learning curves, gradients and weights of a training, over its seeds."""

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradjax.report.style import BLUE, GREEN, GREY, LOG10, ORANGE, STYLE, band, log_axis


def training_figure(ds: xr.Dataset, title: str = "") -> Figure:
    """Four panels over the seeds of a training: loss, score, gradient norm, gradient per layer.

    Args:
      ds: a dataset of `gradjax.sweep` whose members are seeds only.
      title: above the panels.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(7.4, 6.0), layout="constrained")
        _progress(axes[0, 0], ds, "loss", "validation_loss")
        axes[0, 0].set(title="Loss", xlabel="step", yscale="log")
        axes[0, 0].legend()
        _progress(axes[0, 1], ds, "score", "validation_score")
        axes[0, 1].axhline(ds.attrs["target"], color=GREY, lw=1, ls="--", label="target")
        axes[0, 1].set(title="Score", xlabel="step")
        axes[0, 1].legend(loc="lower right")
        step, norms = _smooth(ds["log_gradient_norm"].values)
        band(axes[1, 0], step, norms / LOG10, GREEN, "before clipping")
        log_axis(axes[1, 0], "Gradient norm", "step", "norm")
        _per_layer(axes[1, 1], ds)
        count = f"{int(ds['trained'].sum())} of {ds['trained'].size} seeds trained"
        diverged = int((ds["diverged_at"].values >= 0).sum())
        if diverged:
            count += f", {diverged} diverged"
        figure.suptitle(f"{title}: {count}" if title else count, fontsize=12)
    return figure


def _smooth(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and means over blocks of steps (..., at most 200 or so): a thousand batches are more
    ink than information.
    """
    window = max(1, values.shape[-1] // 200)
    count = values.shape[-1] // window
    blocks = values[..., : count * window].reshape(*values.shape[:-1], count, window)
    return (np.arange(count) + 1) * window, blocks.mean(-1)


def _progress(ax: Axes, ds: xr.Dataset, training: str, validation: str) -> None:
    band(ax, *_smooth(ds[training].values), BLUE, "training batches")
    band(ax, ds["evaluation"].values, ds[validation].values, ORANGE, "validation")


def _per_layer(ax: Axes, ds: xr.Dataset) -> None:
    """Gradient per layer at the first and the last evaluation."""
    layer = np.arange(1, ds.sizes["layer"] + 1)
    last = ds.sizes["evaluation"] - 1
    for i, color in {0: ORANGE, last: GREEN if last else ORANGE}.items():
        values = ds["layer_log_gradient_norm"].values[:, i] / LOG10
        band(ax, layer, values, color, f"step {ds['evaluation'].values[i]}")
    if len(layer) == 1:
        ax.lines[0].set_marker("o")
        ax.lines[-1].set_marker("o")
    ylabel = r"norm $\|\partial\mathcal{L}/\partial\theta_l\|$"
    log_axis(ax, "Gradient per layer", "hidden layer $l$", ylabel)
    ax.legend()
