"""He 2015: how the initial weights of deep ReLU networks scale their gradients (arXiv 1502.01852).

The backward condition n^ Var(w) / 2 = 1 gives the ten 3 x 3 convolutions of VGG's model B standard
deviations 0.059, 0.042, 0.029, 0.021 for 64 to 512 filters; with 0.01 everywhere the gradient falls
by 1.7e4 between conv10 and conv2 (section 2.2). With Xavier's weights each layer of a ReLU network
halves the squared gradient: 2^(-L/2) of He's after L layers, which stalls 30 layers and only slows
22 (figs. 2 and 3, whose training is not run here).

Verified: the arithmetic, read in a secondary text, to its printed digits; the attenuation in nine
convolutions with circular padding (no border, no pooling) at initialisation; the factor 2^(-L/2) at
22 and 30 layers from independent networks, and He's own growth against the exact law of
`random_matrix.norm_moments`. Not covered: training, PReLU.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import lax
from matplotlib.figure import Figure

import gradjax
from papers.common import COLOURS, THEORY, Claim, close, mean_error, norm_moments, panels, points

FILTERS = (64, 64, 128, 128, 256, 256, 512, 512, 512, 512)  # of conv1 .. conv10
PUBLISHED = {64: 0.059, 128: 0.042, 256: 0.029, 512: 0.021}
ATTENUATION = 1.7e4
DEPTHS = (22, 30)


@dataclass(frozen=True)
class Config:
    seed: int = 0
    std: float = 0.01  # of every convolution
    num_convolutions: int = 12  # samples of conv2 .. conv10
    image: int = 4  # pixels per side
    width: int = 256
    num_samples: int = 32  # fully connected networks of each kind
    gain: float = 1.0  # times He's weights; Xavier's stay


SMALL = {"num_convolutions": 6, "width": 64, "num_samples": 64}
CONTROLS = {"He's weights 5% off": {"gain": 1.05}, "std 0.0105": {"std": 0.0105}}


def std(filters: int) -> float:
    """He's std of a 3 x 3 convolution into `filters` channels, by the backward condition."""
    return math.sqrt(2 / (9 * filters))


def convolution(h, kernel):
    """ReLU of a 3 x 3 convolution with circular padding; h is (height, width, channels)."""
    h = jnp.pad(h, ((1, 1), (1, 1), (0, 0)), mode="wrap")
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.nn.relu(
        lax.conv_general_dilated(h[None], kernel, (1, 1), "VALID", dimension_numbers=layout)[0]
    )


@jax.jit
def convolutions(x, target, kernels):
    """log rms of the gradient at the input of each of conv2 .. conv10, and at the last output."""
    links = [(convolution, kernel) for kernel in kernels]
    return gradjax.signals(links, x, loss=lambda h: jnp.sum(h * target)).log_cotangent_rms


@functools.partial(jax.jit, static_argnames=("depth", "width"))
def plain(keys, sigma_w, *, depth: int, width: int):
    """The same for fully connected ReLU networks with weights of variance sigma_w^2 / N.

    (samples, depth + 1).
    """

    def step(h, key):
        return jax.nn.relu(sigma_w / math.sqrt(width) * jax.random.normal(key, (width, width)) @ h)

    def network(key):
        of_layers, of_x, of_target = jax.random.split(key, 3)
        x, target = (jax.random.normal(k, (width,)) for k in (of_x, of_target))

        def loss(h):
            return jnp.sum(h * target)

        return gradjax.signals(
            step, x, jax.random.split(of_layers, depth), loss=loss
        ).log_cotangent_rms

    return jax.vmap(network)(keys)


def run(config: Config) -> xr.Dataset:
    rng = np.random.default_rng(config.seed)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    convolved = []
    for _ in range(config.num_convolutions):
        kernels = [
            np.float32(config.std) * normal(3, 3, *pair) for pair in itertools.pairwise(FILTERS)
        ]
        side = (config.image, config.image)
        convolved.append(
            convolutions(normal(*side, FILTERS[0]), normal(*side, FILTERS[-1]), kernels)
        )
    ds = xr.Dataset(
        {"conv": (("conv_sample", "layer"), np.array(convolved))}, attrs={"width": config.width}
    )
    gains = {"he": config.gain * math.sqrt(2), "xavier": 1.0}
    for i, (name, sigma_w) in enumerate(gains.items()):
        for j, depth in enumerate(DEPTHS):
            keys = jax.random.split(
                jax.random.key(1000 * config.seed + 10 * i + j), config.num_samples
            )
            found = plain(keys, sigma_w, depth=depth, width=config.width)
            ds[f"{name}_{depth}"] = ("sample", f"layer_{depth}"), np.array(found)
    return ds


def growth(ds: xr.Dataset, name: str, depth: int) -> np.ndarray:
    """(networks, depth + 1): log of the gradient's rms at every layer over that at the output."""
    values = ds[f"{name}_{depth}"].values
    return values - values[:, -1:]


def plot(ds: xr.Dataset) -> Figure:
    fig, ((left, right),) = panels(1, 2, (4.8, 3.6))
    layers = np.arange(2, 12)
    mean, error = mean_error(ds.conv.values - ds.conv.values[:, -1:])
    theory = np.concatenate(
        [np.cumsum([math.log(0.01 / std(n)) for n in FILTERS[:0:-1]])[::-1], [0]]
    )
    left.plot(layers, theory / math.log(10), color=THEORY, label="arithmetic")
    points(left, layers, mean / math.log(10), error / math.log(10), label="measured")
    labels = [f"conv{i}" for i in layers[:-1]] + ["output"]
    left.set_xticks(layers, labels, rotation=60, fontsize=8)
    left.set_ylabel(r"$\log_{10}$ gradient rms")
    left.set_title("VGG-B, every weight of std 0.01", fontsize=10)
    left.legend(frameon=False)
    for colour, depth in zip(COLOURS, DEPTHS, strict=False):
        for name, marker in (("he", "o"), ("xavier", "s")):
            middle, spread = mean_error(growth(ds, name, depth) / math.log(10))
            label = f"{name.capitalize()}, {depth} layers"
            points(
                right,
                np.arange(depth + 1),
                middle,
                spread,
                fmt=marker,
                color=colour,
                ms=3,
                label=label,
            )
        lost = 0.5 * math.log10(2) * (np.arange(depth + 1) - depth)
        right.plot(
            np.arange(depth + 1),
            lost,
            color=THEORY,
            lw=1,
            label="$2^{-l/2}$" if depth == 30 else None,
        )
    right.axhline(0, color=THEORY, lw=1)
    right.set(xlabel="layer", title=f"ReLU networks of width {ds.attrs['width']}")
    right.set_ylabel(r"$\log_{10}$ gradient rms")
    right.legend(frameon=False, fontsize=8)
    return fig


def check(ds: xr.Dataset) -> tuple[Claim, ...]:
    claims = [
        close(
            f"He's std for {filters} filters of 3 x 3",
            std(filters),
            published,
            "He 2015, sec. 2.2",
            relative=0.02,
        )
        for filters, published in PUBLISHED.items()
    ]
    product = math.prod(std(n) / 0.01 for n in FILTERS[1:])
    claims.append(
        close(
            "attenuation conv10 to conv2 by std 0.01, arithmetic",
            product,
            ATTENUATION,
            "sec. 2.2",
            relative=0.02,
        )
    )
    logs = (ds.conv[:, -1] - ds.conv[:, 0]).values
    mean, error = mean_error(np.exp(logs))
    options = {"error": error, "relative": 0.15, "asymptotic": True}
    claims.append(
        close("attenuation conv10 to conv2, measured", mean, ATTENUATION, "sec. 2.2", **options)
    )
    size = ds.sizes["sample"]
    for depth in DEPTHS:
        (he, he_error), (xavier, xavier_error) = (
            mean_error(growth(ds, name, depth)[:, 0]) for name in ("he", "xavier")
        )
        options = {
            "error": math.hypot(he_error, xavier_error),
            "dof": 2 * size - 2,
            "relative": 0.05,
        }
        statement = f"log gradient, Xavier over He, {depth} layers"
        claims.append(
            close(statement, xavier - he, -depth / 2 * math.log(2), "2^(-L/2)", **options)
        )
        with jax.enable_x64(True):
            exact = float(norm_moments((int(ds.attrs["width"]),) * depth).mean) / 2
        statement, source = f"mean log growth of He's gradient, {depth} layers", "formula 8"
        claims.append(close(statement, he, exact, source, error=he_error, dof=size - 1))
    return tuple(claims)
