"""Theory over measured spectra of a layer product: free-probability densities and Newman's exponents.

    python scripts/spectral_densities.py densities.png exponents.png

The first figure draws formulas 4 and 5 (Pennington, Schoenholz, Ganguli 2017, arXiv:1711.04735, and 2018,
arXiv:1802.09979) over histograms of log singular values, the second Newman's exponents (1986) with their standard
error at this depth over one measured spectrum. About a minute on two cores.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import math

import jax
import matplotlib
import numpy as np
from scipy import stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import gradjax
from gradjax import random_matrix as rm

THEORY, LIMIT, BARS = "#c2410c", "#1d4ed8", "#c9ced6"
ERF = lambda x: jax.scipy.special.erf(math.sqrt(math.pi) / 2 * x)
# name, activation, q*, phi'(h)
PANELS = (
    ("linear", "linear", 1.0, np.ones_like),
    ("ReLU", "relu", 1.0, lambda h: (h > 0) * 1.0),
    ("hard-tanh, q* = 0.2", "hard_tanh", 0.2, lambda h: (np.abs(h) < 1) * 1.0),
    ("erf, q* = 0.05", ERF, 0.05, lambda h: np.exp(-math.pi * h**2 / 4)),
)


def weights(rng, family, *shape):
    w = rng.standard_normal(shape)
    if family == "gaussian":
        return w / math.sqrt(shape[-1])
    q, r = np.linalg.qr(w)
    return q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[..., None, :]


def measured(rng, family, depth, width, lanes, q, slope, sigma_w):
    """log singular values of `lanes` products D_L W_L ... D_1 W_1 at mean field."""
    d = slope(math.sqrt(q) * rng.standard_normal((lanes, depth, width, 1)))
    return gradjax.log_singular_values(sigma_w * d * weights(rng, family, lanes, depth, width, width)).ravel()


def draw(ax, values, curve, limit, low, zeros):
    """Histogram of what is neither zero nor in the atom, the density of log sigma over it, the atoms as text."""
    at_atom = (np.abs(values - curve.log_atom / 2) < 1e-6) if curve.atom_mass > 0 else np.zeros(values.shape, bool)
    rest = values[np.isfinite(values) & ~at_atom]
    high = max(float(curve.log_lambda_max) / 2, rest.max() if rest.size else 0.0) + 0.15
    if rest.size:
        counts, edges = np.histogram(rest[rest > low], bins=48, range=(low, high))
        ax.stairs(counts / (values.size * np.diff(edges)), edges, fill=True, color=BARS, label="measured")
        ax.plot(curve.log_lambda / 2, 2 * curve.density, color=THEORY, lw=1.8, label="finite depth, theory")
    if limit is not None:
        ax.plot(limit.log_lambda / 2, 2 * limit.density, "--", color=LIMIT, lw=1.2, label="infinite depth, theory")
    lines = []
    if curve.atom_mass > 0:
        ax.axvline(float(curve.log_atom) / 2, color=THEORY, lw=1, ls=":")
        lines.append(f"atom: {curve.atom_mass:.3f} (measured {at_atom.mean():.3f})")
    if curve.zero_mass > 0:
        lines.append(
            f"zeros: {curve.zero_mass:.3f}; at this width\n{zeros:.3f} (measured {np.mean(values == -np.inf):.3f})"
        )
    if not curve.mass.any():
        lines.append("every singular value is 1")
        ax.set_yticks([])
    ax.text(0.03, 0.95, "\n".join(lines), transform=ax.transAxes, va="top", fontsize=8)
    ax.set_xlim(low, high)
    ax.set_ylim(0, 1.3 * ax.get_ylim()[1])  # room for the atoms' line
    ax.spines[["top", "right"]].set_visible(False)


def densities(path, depth=16, width=256, lanes=10):
    rng = np.random.default_rng(0)
    fig, axes = plt.subplots(2, 4, figsize=(14, 6), layout="constrained")
    for row, family in enumerate(rm.WEIGHTS):
        for col, (name, activation, q, slope) in enumerate(PANELS):
            law = rm.derivative_law(activation, q)
            sigma_w = float(rm.derivative_moment(law, 1)) ** -0.5
            curve = jax.tree.map(np.asarray, rm.product_density(law, depth, sigma_w, family))
            limit = None
            if family == "orthogonal" and col >= 2:
                spread = rm.relative_variance(law, depth, family)
                limit = jax.tree.map(np.asarray, rm.limit_density(spread, ("bernoulli", "smooth")[col - 2]))
            values = measured(rng, family, depth, width, lanes, q, slope, sigma_w)
            ax = axes[row, col]
            dead = 1 - stats.binom(width, float(curve.zero_mass)).cdf(np.arange(width)) ** depth
            zeros = dead.sum() / width  # the least of `depth` ranks
            draw(
                ax,
                values,
                curve,
                limit,
                -1.5 if col == 3 and row == 1 else -6.0 if row == 0 or col == 1 else -3.0,
                zeros,
            )
            ax.set_title(f"{name}, {family.replace('gauss', 'Gauss')}", fontsize=10)
            ax.set_xlabel("log singular value (nats)")
    for ax in axes[:, 0]:
        ax.set_ylabel("density (per nat)")
    axes[1, 2].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(0, 0.56))
    fig.suptitle(f"Critical layer products: depth {depth}, {lanes} networks of width {width}", fontsize=12)
    fig.savefig(path, dpi=160)


def exponents(path, width=64, depth=2000):
    w = weights(np.random.default_rng(1), "gaussian", depth, width, width)
    found = gradjax.log_singular_values(w) / depth
    theory = np.asarray(rm.newman_exponents(width), float)
    error = np.sqrt(np.asarray(rm.newman_variance(width, depth), float))
    z = (found - theory) / error
    fig, (top, low) = plt.subplots(
        2, 1, figsize=(6.5, 6), sharex=True, height_ratios=(3, 1), layout="constrained", squeeze=True
    )
    i = np.arange(1, width + 1)
    top.plot(i, found, "o", ms=4, color="#475569", label=f"measured, depth {depth}")
    top.plot(i, theory, color=THEORY, lw=1.6, label="Newman, exact at this width")
    fine = np.linspace(0, 1 - 0.5 / width, 400)
    top.plot(fine * width, rm.newman_limit(fine), "--", color=LIMIT, lw=1.2, alpha=0.8, label="infinite width")
    top.set_ylabel("Lyapunov exponent (nats per layer)")
    top.legend(frameon=False)
    low.axhspan(-2, 2, color=THEORY, alpha=0.12, lw=0)
    low.axhline(0, color=THEORY, lw=1)
    low.plot(i, z, "o", ms=4, color="#475569")
    low.set(xlabel="index i", ylabel="difference\n(standard errors)", ylim=(-4, 4))
    for ax in (top, low):
        ax.spines[["top", "right"]].set_visible(False)
    top.set_title(f"Product of Gaussian matrices, width {width}: $\\chi^2/N$ = {np.mean(z**2):.2f}", fontsize=11)
    fig.savefig(path, dpi=160)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("densities", help="PNG of the densities")
    parser.add_argument("exponents", help="PNG of Newman's exponents")
    args = parser.parse_args()
    densities(args.densities)
    exponents(args.exponents)
