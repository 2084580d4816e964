"""Learning curves, gradients and weights of a training, over its seeds."""

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from gradjax.report.style import BLUE, GREEN, GREY, LOG10, ORANGE, STYLE, band, log_axis


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over blocks of `window` steps: a thousand batches are more ink than information."""
    count = values.shape[-1] // window
    return values[..., : count * window].reshape(*values.shape[:-1], count, window).mean(-1)


def training_figure(ds: xr.Dataset, title: str = "") -> Figure:
    """Four panels of a `gradjax.train` dataset over its seeds: loss, score, gradient norm, gradient
    per layer.

    Args:
      ds: a dataset of `gradjax.sweep` whose members are seeds alone.
      title: above the panels.
    """
    window = max(1, ds.sizes["step"] // 200)
    step = (np.arange(ds.sizes["step"] // window) + 1) * window
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(7.4, 6.0), layout="constrained")
        evaluation = ds["evaluation"].values
        ax = axes[0, 0]
        band(ax, step, _smooth(ds["loss"].values, window), BLUE, "training batches")
        band(ax, evaluation, ds["validation_loss"].values, ORANGE, "validation")
        ax.set(title="Loss", xlabel="step", yscale="log")
        ax.legend()
        ax = axes[0, 1]
        band(ax, step, _smooth(ds["score"].values, window), BLUE, "training batches")
        band(ax, evaluation, ds["validation_score"].values, ORANGE, "validation")
        ax.axhline(ds.attrs["target"], color=GREY, lw=1, ls="--", label="target")
        ax.set(title="Score", xlabel="step")
        ax.legend(loc="lower right")
        ax = axes[1, 0]
        band(
            ax,
            step,
            _smooth(ds["log_gradient_norm"].values, window) / LOG10,
            GREEN,
            "before clipping",
        )
        log_axis(ax, "Gradient norm", "step", "norm")
        ax = axes[1, 1]
        layer = np.arange(1, ds.sizes["layer"] + 1)
        last = ds.sizes["evaluation"] - 1
        for i, color in ((0, ORANGE), (last, GREEN))[: 1 + bool(last)]:
            values = ds["layer_log_gradient_norm"].values[:, i] / LOG10
            band(ax, layer, values, color, f"step {evaluation[i]}")
        if len(layer) == 1:
            ax.lines[0].set_marker("o")
            ax.lines[-1].set_marker("o")
        log_axis(
            ax,
            "Gradient per layer",
            "hidden layer $l$",
            r"norm $\|\partial\mathcal{L}/\partial\theta_l\|$",
        )
        ax.legend()
        frozen = int((ds["diverged_at"].values >= 0).sum())
        count = (
            f"{int(ds['trained'].sum())} of {ds['trained'].size} seeds trained"
            + f", {frozen} diverged" * bool(frozen)
        )
        figure.suptitle(f"{title}: {count}" if title else count, fontsize=12)
    return figure
