"""Newman 1986: Lyapunov exponents of products of Gaussian matrices (Commun. Math. Phys. 103, 121).

    lambda_i = 1/2 [log(2/N) + psi((N - i + 1)/2)],      i = 1 .. N
    Var = psi'((N - i + 1)/2) / (4 L)

The whole spectrum of the product of 4000 Gaussian matrices of width 32 and variance 1/N, all N
values at once, and the variance over many shorter products. The formula is read in secondary texts;
it is derived again in `random_matrix.newman_exponents` (the diagonal of the QR sweep is an
independent chi_{N-i+1} per layer). The paper has no simulation of its own: the figure is ours. Not
covered: log sigma_i / L differs from the sweep's rates by O(1/L), some 0.1 standard errors here.
"""

import math
from dataclasses import dataclass

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

import gradjax
from gradjax.theory import random_matrix as rm
from papers.common import LIMIT, THEORY, WEIGHTS, Claim, close, joint, panels, points


@dataclass(frozen=True)
class Config:
    seed: int = 0
    width: int = 32
    depth: int = 4000
    num_short: int = 200  # short products, for the variance
    short_depth: int = 50
    sigma_w: float = 1.0
    family: str = "gaussian"


SMALL = {"depth": 2000, "num_short": 100, "short_depth": 10}
CONTROLS = {"sigma_w 1% off": {"sigma_w": 1.01}, "orthogonal weights": {"family": "orthogonal"}}


def run(config: Config) -> xr.Dataset:
    rng = np.random.default_rng(config.seed)
    n = config.width

    def draw(*shape):
        return config.sigma_w * WEIGHTS[config.family](rng, *shape, n, n)

    w, short = draw(config.depth), draw(config.num_short, config.short_depth)
    return xr.Dataset(
        {
            "log_sigma": ("i", gradjax.log_singular_values(w)),
            "exponents": ("i", gradjax.lyapunov_exponents(w).exponents),
            "short": (("sample", "i"), gradjax.lyapunov_exponents(short).exponents),
        },
        coords={"i": np.arange(1, n + 1)},
        attrs={"depth": config.depth, "short_depth": config.short_depth},
    )


def theory(ds: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """(exponents, standard errors at this depth)."""
    n = ds.sizes["i"]
    exact, variance = rm.newman_exponents(n), rm.newman_variance(n, float(ds.depth))
    return np.asarray(exact, float), np.sqrt(np.asarray(variance, float))


def plot(ds: xr.Dataset) -> Figure:
    n, (exact, error) = ds.sizes["i"], theory(ds)
    fig, axes = panels(1, 3, (4.0, 3.4))
    left, middle, right = axes[0]
    fine = np.linspace(0, 1 - 0.4 / n, 300)
    left.plot(
        fine * n + 0.5, rm.newman_limit(fine), "--", color=LIMIT, lw=1, label="infinite width"
    )
    left.plot(ds.i, exact, color=THEORY, label="Newman, this width")
    points(left, ds.i, ds.log_sigma / ds.depth, error, label=f"measured, {ds.depth} layers")
    left.set(xlabel="index $i$", ylabel="exponent (nats per layer)", title=f"Spectrum, width {n}")
    left.legend(frameon=False, fontsize=8)
    z = (ds.log_sigma / ds.depth - exact) / error
    middle.axhspan(-2, 2, color=THEORY, alpha=0.1, lw=0)
    middle.axhline(0, color=THEORY)
    points(middle, ds.i, z)
    middle.set(
        xlabel="index $i$",
        ylabel="difference (standard errors)",
        ylim=(-4.5, 4.5),
        title="Residuals",
    )
    count = ds.sizes["sample"]
    right.plot(
        ds.i,
        ds.short_depth * np.asarray(rm.newman_variance(n, float(ds.short_depth))),
        color=THEORY,
    )
    variance = ds.short_depth * ds.short.var("sample", ddof=1)
    points(right, ds.i, variance, variance * math.sqrt(2 / (count - 1)))
    right.set(xlabel="index $i$", ylabel="variance x depth (nats$^2$)", yscale="log")
    right.set_title(f"Variance over {count} products")
    return fig


def check(ds: xr.Dataset) -> tuple[Claim, ...]:
    n, (exact, error) = ds.sizes["i"], theory(ds)
    source = "Newman 1986, formula 1"
    count, variance = (
        ds.sizes["sample"],
        np.asarray(rm.newman_variance(n, float(ds.short_depth)), float),
    )
    ratio = (ds.short.var("sample", ddof=1) / variance).mean()
    ratio_error = math.sqrt(
        2 / (count - 1) / n
    )  # the sums over layers are all but normal, and independent over i
    return (
        joint(
            "log singular values / depth, every i", ds.log_sigma / ds.depth, exact, error, source
        ),
        joint("Lyapunov exponents by QR, every i", ds.exponents, exact, error, source),
        joint(
            "mean exponents of short products",
            ds.short.mean("sample"),
            exact,
            (variance / count) ** 0.5,
            source,
        ),
        close(
            "variance over short products / theory, mean",
            ratio,
            1,
            source,
            error=ratio_error,
            relative=0.1,
        ),
    )
