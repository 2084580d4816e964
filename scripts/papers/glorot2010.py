"""Glorot & Bengio 2010: singular values of layer Jacobians, and gradients at initialisation.

AISTATS 2010, no arXiv id. A tanh network of five layers, weights uniform: standard U(-1/sqrt(n_in),
1/sqrt(n_in)) or normalised, of variance 2 / (n_in + n_out). Back-propagated gradients shrink by
sqrt(3) per layer with the first and keep their size with the second; the mean singular value of the
layer Jacobians is about 0.5 and 0.8.

Verified: 0.8 and 0.5 are recovered. For a linear layer of variance 1/N the singular values follow
the quarter circle, whose mean is 8 / (3 pi) = 0.849, over sqrt(3) 0.490 for the standard one:
within 1%; tanh, measured on images, must lie in [0.75, 0.85] and [0.45, 0.50]. Not covered: the
paper's Shapeset is not public; the images are scikit-learn's digits at its size, 32 x 32, centred.
Nothing is trained.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import gradjax
from papers.common import COLOURS, THEORY, Claim, between, close, mean_error, panels, points

INITS = {
    "standard": 1 / math.sqrt(3),
    "normalized": 1.0,
}  # sigma_w: standard deviation times sqrt(N), equal widths
PHI = {"linear": lambda h: h, "tanh": jnp.tanh}
QUARTER_CIRCLE = 8 / (3 * math.pi)
NUM_LAYERS = 5


@dataclass(frozen=True)
class Config:
    seed: int = 0
    width: int = 500
    num_samples: int = 4  # networks of each kind, each at an image of its own
    gain: float = 1.0  # times the bounds of the uniform weights
    contrast: float = 1.0  # times the images


SMALL = {"width": 200, "num_samples": 3}
CONTROLS = {"bounds 5% off": {"gain": 1.05}, "images three times as bright": {"contrast": 3.0}}


def run(config: Config) -> xr.Dataset:
    rng = np.random.default_rng(config.seed)
    pixels = np.asarray(load_digits(return_X_y=True)[0]).reshape(-1, 8, 8)
    images = np.kron(pixels / 16, np.ones((4, 4))).reshape(-1, 1024)
    images -= images.mean(0)
    n, depth = config.width, NUM_LAYERS - 1
    shape = (len(INITS), len(PHI), config.num_samples, depth)
    sigma, cotangents = np.empty((*shape, n)), np.empty((*shape[:-1], NUM_LAYERS, n))
    for i, (init, sigma_w) in enumerate(INITS.items()):
        for j, phi in enumerate(PHI.values()):
            for k in range(config.num_samples):
                x = config.contrast * rng.choice(images)
                std = {
                    "standard": 1 / math.sqrt(3 * x.size),
                    "normalized": math.sqrt(2 / (x.size + n)),
                }[init]

                def uniform(*shape):
                    return config.gain * math.sqrt(3) * rng.uniform(-1, 1, shape)

                h = phi(std * uniform(n, x.size) @ x)
                w = sigma_w / math.sqrt(n) * uniform(depth, n, n)

                def step(h, w, phi=phi):
                    return phi(w @ h)

                jacobians = np.asarray(
                    gradjax.layer_jacobians(step, jnp.float32(h), jnp.float32(w))
                )
                sigma[i, j, k] = np.linalg.svd(jacobians, compute_uv=False)
                g = rng.standard_normal(n)  # of the loss by the last layer's units
                cotangents[i, j, k, -1] = g
                for layer in reversed(range(depth)):
                    cotangents[i, j, k, layer] = g = jacobians[layer].T @ g
    return xr.Dataset(
        {
            "sigma": (("init", "activation", "sample", "jacobian", "i"), sigma),
            "cotangent": (("init", "activation", "sample", "layer", "i"), cotangents),
        },
        coords={
            "init": list(INITS),
            "activation": list(PHI),
            "layer": np.arange(1, NUM_LAYERS + 1),
        },
    )


def plot(ds: xr.Dataset) -> Figure:
    fig, axes = panels(2, 2, (4.6, 2.9))
    for row, init in enumerate(INITS):
        one = ds.sel(init=init)
        left, right = axes[row]
        top = 2 * INITS[init]
        x = np.linspace(0, top, 300)
        density = np.sqrt(np.maximum(0, 1 - (x / top) ** 2)) * 4 / (math.pi * top)
        left.plot(x, density, color=THEORY, label="linear: quarter circle")
        for colour, activation in zip(COLOURS, PHI, strict=False):
            values = one.sigma.sel(activation=activation).values.ravel()
            counts, edges = np.histogram(values, 24, (0, top))
            scale = values.size * np.diff(edges)
            label = f"{activation}, mean {values.mean():.2f}"
            middle = (edges[1:] + edges[:-1]) / 2
            points(left, middle, counts / scale, np.sqrt(counts) / scale, color=colour, label=label)
        left.set(ylabel="density", title=f"{init}: layer Jacobians")
        left.legend(frameon=False, fontsize=8, loc="lower left")
        edges = np.linspace(-2.5, 2.5, 51)
        for layer in ds.layer.values[::-1]:
            g = one.cotangent.sel(activation="tanh", layer=layer).values.ravel()
            shade = str(0.75 - 0.75 * (layer - 1) / (NUM_LAYERS - 1))
            counts = np.histogram(g, edges, density=True)[0]
            right.stairs(counts, edges, color=shade, label=f"layer {layer}")
        right.set(
            title=f"{init}: back-propagated gradients, tanh", xlim=(-2.5, 2.5), ylim=(0, None)
        )
        right.legend(frameon=False, fontsize=8)
    axes[1, 0].set_xlabel("singular value")
    axes[1, 1].set_xlabel("gradient (the last layer has variance 1)")
    return fig


def check(ds: xr.Dataset) -> tuple[Claim, ...]:
    mean, error = mean_error(
        ds.sigma.mean(("jacobian", "i")).transpose("sample", "init", "activation").values
    )
    ranges = {"standard": (0.45, 0.50), "normalized": (0.75, 0.85)}
    claims = []
    for i, (init, sigma_w) in enumerate(INITS.items()):
        statement, expected = (
            f"mean singular value of a layer Jacobian, {init}",
            QUARTER_CIRCLE * sigma_w,
        )
        options = {"error": error[i, 0], "relative": 0.01, "asymptotic": True}
        claims.append(
            close(
                f"{statement}, linear",
                mean[i, 0],
                expected,
                "8 / (3 pi), quarter circle",
                **options,
            )
        )
        source = "Glorot & Bengio 2010: 0.5 and 0.8"
        claims.append(
            between(f"{statement}, tanh", mean[i, 1], *ranges[init], source, error=error[i, 1])
        )
        square = (ds.cotangent.sel(init=init, activation="linear") ** 2).mean("i")
        ratio, sd = mean_error((square.sel(layer=1) / square.sel(layer=NUM_LAYERS)).values)
        statement = f"variance of the gradient, layer 1 over layer 5, {init}, linear"
        dof = ds.sizes["sample"] - 1
        options = {"error": sd, "dof": dof, "relative": 0.3}
        claims.append(
            close(statement, ratio, sigma_w ** (2 * (NUM_LAYERS - 1)), "(n Var W)^4", **options)
        )
    return tuple(claims)
