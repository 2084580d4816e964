"""Yang 2019: BatchNorm makes gradients explode, at a rate set by batch size and activation.

A mean field theory of batch normalization, arXiv 1902.08129, its figures of gradient norms over
layers: h' = W phi(BatchNorm(h)), whatever the weights' variance. Squared gradients grow per layer
on their way back by (B-2)/(B-3) for linear networks and, for ReLU, by a rate that tends to
pi/(pi-1) = 1.467 as the batch grows.

The paper gives ReLU's rate for large B; at finite B it is `meanfield.batchnorm_growth`, derived for
this package and compared here. Averages of logarithms at small width miss it by 4% (fluctuations of
single units count), so that rates are ratios of squares summed over units at a width well above
batch * depth, without the layers next to either end. Without BatchNorm the same network with He's
weights keeps its gradients. Not covered: other activations, the correlations that the forward pass
settles at, learned scales and shifts, training.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

import gradjax
from gradjax.theory import meanfield
from papers.common import (
    COLOURS,
    GREY,
    LIMIT,
    THEORY,
    Claim,
    close,
    joint,
    mean_error,
    panels,
    points,
)

SOURCE = "formula 7, arXiv 1902.08129"
ENDS = (2, 1)  # layers left out: where the forward pass settles, and next to the loss


@dataclass(frozen=True)
class Config:
    seed: int = 0
    width: int = 1200
    depth: int = 10
    rows: int = 128  # examples, normalised in groups of the batch size
    batches: tuple[int, ...] = (8, 16, 32, 64, 128)
    networks: int = 3
    theory: str = "relu"  # whose activation the theory has
    tracked: bool = True  # whether gradients go through the mean and the variance


SMALL = dict(width=400, depth=6, rows=32, batches=(8, 16, 32), networks=4)
CONTROLS = {
    "theory of a linear network": dict(theory="linear"),
    "statistics as constants": dict(tracked=False),
}


def network(key: jax.Array, batch: jax.Array, *, config: Config) -> jax.Array:
    """(depth + 1,) log of the mean square cotangent at every state; batch 0 is no normalisation."""
    of_w, of_h, of_g = jax.random.split(key, 3)
    w = (
        jax.random.normal(of_w, (config.depth, config.width, config.width))
        * (2 / config.width) ** 0.5
    )
    h, cotangents = (jax.random.normal(k, (config.rows, config.width)) for k in (of_h, of_g))
    group = jnp.arange(config.rows) // jnp.maximum(batch, 1)
    average = (group[:, None] == group[None, :]) / jnp.maximum(
        batch, 1
    )  # the mean over a group, all sizes in one program

    def step(h, layer):  # theta is a layer's number: the gradients of its weights are not asked for
        mean = average @ h
        variance = average @ jnp.square(h - mean)
        if not config.tracked:
            mean, variance = jax.lax.stop_gradient((mean, variance))
        normal = (h - mean) / jnp.sqrt(jnp.where(batch > 0, variance, 1.0))
        return jax.nn.relu(jnp.where(batch > 0, normal, h)) @ w[layer]

    found = gradjax.signals(
        step, h, jnp.arange(config.depth), loss=lambda h: jnp.sum(cotangents * h)
    )
    return 2 * found.log_cotangent_rms


def run(config: Config) -> xr.Dataset:
    """Squared gradients per batch size (0: no BatchNorm), network and state."""
    simulate = jax.jit(functools.partial(network, config=config))
    batches = np.array([*config.batches, 0])
    keys = jax.random.split(jax.random.key(config.seed), (len(batches), config.networks))
    found = [
        [simulate(key, batch) for key in row] for row, batch in zip(keys, batches, strict=True)
    ]
    dims = ("batch", "network", "state")
    ds = xr.Dataset({"log_cotangent": (dims, np.asarray(found, float))}, {"batch": batches})
    ds["theory"] = (
        "batch",
        np.append(meanfield.batchnorm_growth(batches[:-1].astype(float), config.theory), 1.0),
    )
    fine = np.geomspace(5, 300, 60)
    for name in ("relu", "linear"):
        ds[f"{name}_curve"] = (
            "fine_batch",
            np.asarray(meanfield.batchnorm_growth(fine, name), float),
        )
    return ds.assign_coords(fine_batch=fine)


def rates(ds: xr.Dataset) -> tuple[np.ndarray, np.ndarray, int]:
    """(factor per layer of the squared gradient, its error, degrees of freedom), per batch size."""
    logs = ds["log_cotangent"].values[:, :, ENDS[0] : -ENDS[1]]
    samples = np.exp(logs[:, :, :-1] - logs[:, :, 1:]).reshape(len(logs), -1)
    return *mean_error(samples, axis=1), samples.shape[1] - 1


def check(ds: xr.Dataset) -> tuple[Claim, ...]:
    """Every rate to 1.5%, all of them together to their errors."""
    rate, error, dof = rates(ds)
    theory, batches = ds["theory"].values, ds["batch"].values
    claims = [
        joint(
            "BN-ReLU: growth at every batch size",
            rate,
            theory,
            error,
            SOURCE + ", finite B",
            dof=dof,
        )
    ]
    for i, batch in enumerate(batches[:-1]):  # the errors are judged jointly
        what = f"BN-ReLU: growth per layer, B = {batch}"
        claims.append(
            close(what, rate[i], theory[i], SOURCE, relative=0.015, error=error[i], asymptotic=True)
        )
    what, he = "no BatchNorm: growth per layer", "He's weights: chi_1 = 1"
    claims.append(close(what, rate[-1], theory[-1], he, relative=0.03, error=error[-1], dof=dof))
    return tuple(claims)


def plot(ds: xr.Dataset) -> Figure:
    """Gradients over layers as in the paper; rates over batch sizes."""
    figure, ((layers, over),) = panels(1, 2)
    state = np.arange(ds.sizes["state"])
    for i, batch in enumerate(ds["batch"].values):
        logs = ds["log_cotangent"].values[i]
        mean, error = mean_error((logs - logs[:, -1:]) / np.log(10))
        colour = COLOURS[i % len(COLOURS)]
        anchor = len(state) - 1 - ENDS[1]
        line = mean[anchor] + (anchor - state) * np.log10(ds["theory"].values[i])
        layers.plot(state[: anchor + 1], line[: anchor + 1], color=colour, lw=1)
        points(
            layers,
            state,
            mean,
            error,
            color=colour,
            label=f"B = {batch}" if batch else "no BatchNorm",
        )
    layers.set(
        xlabel="layer",
        ylabel=r"$\log_{10}$ squared gradient, last layer = 0",
        title="BN-ReLU: lines are theory",
    )
    layers.legend(frameon=False, fontsize=8)
    rate, error, _ = rates(ds)
    over.plot(ds["fine_batch"], ds["relu_curve"], color=THEORY, label="ReLU, theory")
    over.plot(ds["fine_batch"], ds["linear_curve"], color=GREY, label="linear, (B-2)/(B-3)")
    over.axhline(np.pi / (np.pi - 1), color=LIMIT, ls="--", lw=1.2, label=r"$\pi/(\pi-1)$")
    points(over, ds["batch"][:-1], rate[:-1], error[:-1], label="ReLU, simulation")
    over.set(xscale="log", xlabel="batch size", ylabel="growth per layer", ylim=(1, 2))
    over.set(title="Growth of the squared gradient")
    over.legend(frameon=False, fontsize=8)
    return figure
