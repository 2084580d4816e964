"""Saxe 2013, fig. 6B: singular values of orthogonal and of Gaussian products (arXiv 1312.6120).

The singular values of W_L ... W_1. Orthogonal factors: all are 1 at any depth, dynamical isometry.
Gaussian factors of variance 1/N: the mean square stays 1, while the distribution becomes a spike at
0 with a tail of a few large values.

Verified: the isometry to the rounding of the factors in float32 and float64; and the fourth power
of the singular values, a = E tr (J J^T)^2 / N, against the exact moment at finite width
(`random_matrix.log_second_moments`, derived there); Fuss-Catalan's L + 1, its limit for infinite
width, must be refuted at this width. Not covered: the paper draws the matrices of a trained network
beside these; here all are at initialisation.
"""

from dataclasses import dataclass

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

import gradjax
from gradjax.theory import random_matrix as rm
from papers.common import (
    COLOURS,
    THEORY,
    WEIGHTS,
    Claim,
    apart,
    close,
    density,
    gaussian,
    mean_error,
    panels,
    points,
)

DEPTH, WIDTH = 6, 32  # of the moments: L/N is large enough to separate the two theories
DEPTHS = (1, 6, 30)  # of the densities


@dataclass(frozen=True)
class Config:
    seed: int = 0
    num_samples: int = 5_000  # products whose moments are averaged
    density_width: int = 100
    num_densities: int = 8
    sigma_w: float = 1.0
    isometric: str = "orthogonal"  # weights of the products that shall be isometries


SMALL = {"num_samples": 2_000, "density_width": 50, "num_densities": 2}
CONTROLS = {
    "sigma_w 5% off": {"sigma_w": 1.05},
    "Gaussian in place of orthogonal": {"isometric": "gaussian"},
}


def run(config: Config) -> xr.Dataset:
    rng = np.random.default_rng(config.seed)
    sigma_w = config.sigma_w
    ds = xr.Dataset(coords={"depth": list(DEPTHS), "dtype": ["float32", "float64"]})

    factors = sigma_w * gaussian(rng, config.num_samples, DEPTH, WIDTH, WIDTH)
    ds["log_moments"] = ("sample", "k"), gradjax.moments(factors, (1, 2))

    # layers of the identity after the shallow products: one shape, so one compilation, for all
    # depths
    shape = (config.num_densities, max(DEPTHS), config.density_width, config.density_width)
    layer = np.arange(max(DEPTHS))[:, None, None]
    factors, found = sigma_w * gaussian(rng, *shape), []
    for depth in DEPTHS:
        found.append(
            gradjax.log_singular_values(np.where(layer < depth, factors, np.eye(shape[-1])))
        )
    ds["log_sigma"] = ("depth", "lane", "i"), np.array(found)

    isometry = sigma_w * WEIGHTS[config.isometric](rng, *shape)
    found = [
        gradjax.log_singular_values(isometry.astype(dtype)) for dtype in (np.float32, np.float64)
    ]
    ds["isometry"] = ("dtype", "lane", "i"), np.array(found)
    curves = [density(rm.derivative_law("linear"), depth) for depth in DEPTHS]
    ds["theory"] = (
        ("depth", "axis", "point"),
        np.array([[x.log_lambda / 2, 2 * x.density] for x in curves]),
    )
    return ds


def plot(ds: xr.Dataset) -> Figure:
    fig, axes = panels(1, len(DEPTHS), (3.6, 3.2))
    for ax, depth in zip(axes[0], DEPTHS, strict=True):
        values = ds.log_sigma.sel(depth=depth).values.ravel() / np.log(10)
        counts, edges = np.histogram(values, 30, (max(-4.0, values.min()), values.max()))
        per_decade = values.size * np.diff(edges)
        x, density = ds.theory.sel(depth=depth).values
        ax.plot(x / np.log(10), density * np.log(10), color=THEORY, label="Gaussian, theory")
        middle = (edges[1:] + edges[:-1]) / 2
        points(
            ax,
            middle,
            counts / per_decade,
            np.sqrt(counts) / per_decade,
            label="Gaussian, measured",
            ms=3,
        )
        ax.axvline(0, color=COLOURS[0], lw=2, label="orthogonal, all of them")
        ax.set(xlim=(-4, 1.5), ylim=(0, None), title=f"{depth} layer{'s' * (depth > 1)}")
        ax.set_xlabel(r"$\log_{10}$ singular value")
    axes[0, 0].set_ylabel("density per decade")
    axes[0, 0].legend(frameon=False, fontsize=8, loc="upper left")
    return fig


def check(ds: xr.Dataset) -> tuple[Claim, ...]:
    first, second = np.exp(ds.log_moments).transpose("k", "sample").values
    a, b = (float(np.exp(x)) for x in rm.log_second_moments(float(DEPTH), float(WIDTH)))
    dof = first.size - 1
    claims = []
    for dtype, bound in (("float32", 1e-5), ("float64", 1e-10)):
        off = abs(np.expm1(ds.isometry.sel(dtype=dtype))).max()
        statement = f"largest |sigma - 1|, {max(DEPTHS)} orthogonal layers, {dtype}"
        claims.append(close(statement, off, 0, "Saxe 2013, sec. 3", absolute=bound))
    for name, samples, exact in (
        ("tr JJ'/N", first, 1.0),
        ("(tr JJ'/N)^2", first**2, b),
        ("tr (JJ')^2/N", second, a),
    ):
        mean, error = mean_error(samples)
        statement = f"E {name}, {DEPTH} Gaussian layers of width {WIDTH}"
        claims.append(
            close(statement, mean, exact, "formula 3", error=error, dof=dof, relative=0.05)
        )
    mean, error = mean_error(second)
    fuss_catalan = np.exp(float(rm.fuss_catalan_log_moment(2.0, float(DEPTH))))
    statement = "E tr (JJ')^2/N is not that of infinite width"
    claims.append(
        apart(statement, mean, fuss_catalan, "Fuss-Catalan, formula 2", error=error, dof=dof)
    )
    return tuple(claims)
