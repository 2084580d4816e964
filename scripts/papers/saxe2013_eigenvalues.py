"""Saxe 2013, fig. 6C: eigenvalue clouds of products of random matrices (arXiv 1312.6120).

Eigenvalues of W_k ... W_1 in the complex plane, for k = 1, 5, 100 factors of width 1000. Gaussian
factors (variance 1/N) crowd at the origin: the paper's text gives 32% and 94% of all eigenvalues in
the bin of width 0.1 at the origin for 5 and 100 factors. Orthogonal factors keep all of them on the
unit circle.

Verified: the two published fractions, read in the paper's text, and over all radii the law P(|z| <
r) = r^(2/k), derived in `random_matrix.ginibre_product_cdf`, which gives (0.01/pi)^(1/k) = 31.7%
and 94.4%. The square bin is taken as the disc of its area, which changes the fraction by 0.1 points
at k = 5. Not covered: the excess of real eigenvalues, some sqrt(2 N k / pi) at finite N.
"""

import math
from dataclasses import dataclass

import numpy as np
import xarray as xr
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from gradjax.theory.random_matrix import ginibre_product_cdf
from papers.common import WEIGHTS, Claim, close, mean_error, panels

FACTORS = (1, 5, 100)
BIN = 0.1


@dataclass(frozen=True)
class Config:
    seed: int = 0
    width: int = 1000
    num_samples: int = 2  # Gaussian products
    circle_width: int = 300  # of the one orthogonal product
    sigma_w: float = 1.0
    family: str = "gaussian"  # of the row that the claims on the origin are about


SMALL = {"width": 400, "num_samples": 4, "circle_width": 100}
CONTROLS = {"sigma_w 5% off": {"sigma_w": 1.05}, "orthogonal weights": {"family": "orthogonal"}}


def eigenvalues(
    rng: np.random.Generator, family: str, width: int, sigma_w: float = 1.0
) -> np.ndarray:
    """(factors, N) complex: one product, looked at after 1, 5 and 100 factors."""
    product, found = np.eye(width), []
    for count in range(1, max(FACTORS) + 1):
        product = sigma_w * WEIGHTS[family](rng, width, width) @ product
        if count in FACTORS:
            found.append(np.linalg.eigvals(product))
    return np.array(found)


def run(config: Config) -> xr.Dataset:
    rng = np.random.default_rng(config.seed)

    def draw():
        return eigenvalues(rng, config.family, config.width, config.sigma_w)

    clouds = {"gaussian": np.array([draw() for _ in range(config.num_samples)])}
    clouds["orthogonal"] = eigenvalues(rng, "orthogonal", config.circle_width)[None]
    ds = xr.Dataset(coords={"factors": list(FACTORS)})
    for name, z in clouds.items():
        dims = (f"{name}_sample", "factors", f"{name}_eigenvalue")
        ds[f"{name}_real"], ds[f"{name}_imag"] = (dims, np.real(z)), (dims, np.imag(z))
    return ds


def in_bin(ds: xr.Dataset, name: str) -> np.ndarray:
    """(samples, factors) fraction of the eigenvalues in the square bin at the origin."""
    inside = (abs(ds[f"{name}_real"]) < BIN / 2) & (abs(ds[f"{name}_imag"]) < BIN / 2)
    return inside.mean(f"{name}_eigenvalue").values


def plot(ds: xr.Dataset) -> Figure:
    fig, axes = panels(2, len(FACTORS), (3.1, 2.9), sharex=True, sharey=True)
    edges = np.arange(-1.25, 1.26, BIN)
    angle = np.linspace(0, 2 * math.pi, 200)
    image = None
    for row, name in enumerate(("gaussian", "orthogonal")):
        fraction = in_bin(ds, name).mean(0)
        for column, factors in enumerate(FACTORS):
            x, y = (
                ds[f"{name}_{part}"].sel(factors=factors).values.ravel()
                for part in ("real", "imag")
            )
            ax = axes[row, column]
            counts = np.histogram2d(x, y, edges)[0].T / x.size
            image = ax.pcolormesh(
                edges, edges, counts, norm=LogNorm(1e-4, 1), cmap="viridis", rasterized=True
            )
            ax.set_facecolor("#440154")
            ax.plot(np.cos(angle), np.sin(angle), "--", color="w", lw=0.7)
            ax.set_aspect("equal")
            kind = name.replace("gauss", "Gauss")
            ax.set_title(f"{factors} {kind}: {100 * fraction[column]:.1f}% at 0", fontsize=9)
        axes[row, 0].set_ylabel("Im $z$")
    for ax in axes[-1]:
        ax.set_xlabel("Re $z$")
    assert image is not None
    fig.colorbar(image, ax=axes, shrink=0.7, label="fraction of the eigenvalues per bin")
    fig.suptitle(
        f"Eigenvalues of products of random matrices, width {ds.sizes['gaussian_eigenvalue']}",
        fontsize=11,
    )
    return fig


def check(ds: xr.Dataset) -> tuple[Claim, ...]:
    mean, error = mean_error(in_bin(ds, "gaussian"))
    law = ginibre_product_cdf(BIN / math.sqrt(math.pi), np.array(FACTORS, float))
    claims = []
    for i, published in ((1, 0.32), (2, 0.94)):
        statement = f"fraction of the eigenvalues in the origin bin, {FACTORS[i]} Gaussian factors"
        one_point = {"error": error[i], "absolute": 0.01, "asymptotic": True}
        claims.append(
            close(f"{statement}, in print", mean[i], published, "Saxe 2013, fig. 6C", **one_point)
        )
        claims.append(
            close(
                f"{statement}, law", mean[i], law[i], "formula 11, (0.01 / pi)^(1/k)", **one_point
            )
        )
    for i, factors in enumerate(FACTORS):
        radius = np.sort(
            np.hypot(ds.gaussian_real, ds.gaussian_imag).isel(factors=i).values.ravel()
        )
        above = radius > 1e-6  # rounding decides the smaller ones of 100 factors
        gap = abs(
            (np.arange(radius.size) + 0.5) / radius.size - ginibre_product_cdf(radius, factors)
        )[above].max()
        statement = f"largest gap between P(|z| < r) and r^(2/k), {factors} Gaussian"
        claims.append(close(statement, gap, 0, "formula 11", absolute=0.03))
    claims.append(
        close(
            "fraction in the origin bin, orthogonal",
            in_bin(ds, "orthogonal").max(),
            0,
            "Saxe 2013",
            absolute=0.0,
        )
    )
    off = abs(np.hypot(ds.orthogonal_real, ds.orthogonal_imag) - 1).max()
    claims.append(
        close(
            "largest | |z| - 1 |, orthogonal", off, 0, "eigenvalues of an isometry", absolute=1e-10
        )
    )
    return tuple(claims)
