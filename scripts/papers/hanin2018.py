"""Hanin & Nica 2018: gradients of ReLU networks are lognormal, beta = 5 sum 1/n (arXiv 1812.05994).

See also arXiv 1801.03744.

    log ||J u||^2 ~ N(-beta/2, beta),      beta = 5 sum_l 1/n_l
    one layer exactly: (2/n) chi^2_K,      K ~ Bin(n, 1/2)

for a unit vector u at the input of a ReLU network with He's weights: only the sum of reciprocal
widths counts, not how the widths are arranged. Three profiles of the same sum (equal widths,
growing, a bottleneck), 6000 networks each.

Verified: mean and variance of the logarithm against the exact chi-squared law
(`random_matrix.norm_moments`, derived there), the Gaussian law's beta against it, and that the
profiles' distributions coincide (Kolmogorov and Smirnov: the laws differ at second order in 1/n,
too little for this many networks). Not covered: E ||J u||^4 = prod(1 + 5/n) itself, which sampling
misses (heavy tails: it lives in networks too rare to be drawn); its logarithm is compared.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
import xarray as xr
from matplotlib.figure import Figure

from gradjax.theory import random_matrix as rm
from papers.common import COLOURS, LEVEL, THEORY, Claim, close, norm_moments, panels, points

# sums of 1/n: 8/32 = 3/24 + 5/40 = 6/40 + 2/20 = 1/4, so that beta = 1.25
PROFILES = {
    "equal": (32,) * 8,
    "growing": (24,) * 3 + (40,) * 5,
    "bottleneck": (40,) * 3 + (20,) * 2 + (40,) * 3,
}
INPUTS = 32


@dataclass(frozen=True)
class Config:
    seed: int = 0
    num_samples: int = 6000  # networks of each profile
    gain: float = 1.0  # times He's sigma_w
    activation: str = "relu"
    widening: int = 1  # factor on the widths of the bottleneck profile


SMALL = {"num_samples": 2000}
CONTROLS = {
    "sigma_w 5% off": {"gain": 1.05},
    "linear": {"activation": "linear", "gain": 0.5**0.5},
    "a profile twice as wide": {"widening": 2},
}


@functools.partial(jax.jit, static_argnames=("widths", "activation"))
def log_norms(keys, gain, *, widths: tuple[int, ...], activation: str):
    """Log of the mean square of J u over that of u, at a random input; one network for each key."""
    phi = {"relu": jax.nn.relu, "linear": lambda h: h}[activation]

    shapes = [(m, n) for n, m in itertools.pairwise((INPUTS, *widths))]
    ends = np.cumsum([INPUTS, INPUTS, *(m * n for m, n in shapes)])

    def network(key):
        # One draw compiles faster than many.
        x, u, *flat = jnp.split(jax.random.normal(key, (ends[-1],)), ends[:-1])
        weights = [
            gain * math.sqrt(2 / n) * w.reshape(m, n)
            for w, (m, n) in zip(flat, shapes, strict=True)
        ]

        def forward(x):
            return functools.reduce(lambda x, w: phi(w @ x), weights, x)

        _, image = jax.jvp(forward, (x,), (u / jnp.linalg.norm(u),))
        return jnp.log(jnp.mean(image**2)) + math.log(INPUTS)

    return jax.vmap(network)(keys)


def run(config: Config) -> xr.Dataset:
    keys = jax.random.split(jax.random.key(config.seed), (len(PROFILES), config.num_samples))
    found = []
    for k, (name, widths) in zip(keys, PROFILES.items(), strict=True):
        widths = tuple(n * config.widening for n in widths) if name == "bottleneck" else widths
        found.append(log_norms(k, config.gain, widths=widths, activation=config.activation))
    return xr.Dataset(
        {"log_norm": (("profile", "sample"), np.array(found, float))},
        coords={"profile": list(PROFILES)},
    )


def law(name: str) -> rm.NormMoments:
    return norm_moments(PROFILES[name])


def alive(ds: xr.Dataset, name: str) -> np.ndarray:
    """The samples of a profile whose J u is not zero: all but one in a thousand or so."""
    values = ds.log_norm.sel(profile=name).values
    return values[np.isfinite(values)]


def plot(ds: xr.Dataset) -> Figure:
    fig, ((left, right),) = panels(1, 2, (4.6, 3.6))
    beta = law("equal").beta
    x = np.linspace(-8, 5, 300)
    left.plot(
        x,
        scipy.stats.norm.pdf(x, -beta / 2, beta**0.5),
        color=THEORY,
        label=r"$N(-\beta/2, \beta)$",
    )
    edges = np.arange(-8, 5.1, 0.5)
    for i, name in enumerate(PROFILES):
        values = alive(ds, name)
        counts, scale = np.histogram(values, edges)[0], values.size * np.diff(edges)
        middle = (edges[1:] + edges[:-1]) / 2 + 0.06 * (i - 1)
        points(
            left,
            middle,
            counts / scale,
            np.sqrt(counts) / scale,
            color=COLOURS[i],
            ms=3,
            label=name,
        )
        order = (np.arange(values.size) + 0.5) / values.size
        right.plot(
            scipy.stats.norm.ppf(order), np.sort(values), ".", ms=2, color=COLOURS[i], label=name
        )
    z = np.array([-3.5, 3.5])
    right.plot(z, -beta / 2 + beta**0.5 * z, color=THEORY)
    left.set(xlabel=r"$\log\,||J u||^2$ (nats)", ylabel="density", ylim=(0, None))
    right.set(xlabel="normal quantile", ylabel=r"$\log\,||J u||^2$ (nats)")
    left.legend(frameon=False, fontsize=8)
    right.legend(frameon=False, fontsize=8, markerscale=4)
    fig.suptitle(
        rf"ReLU networks of three width profiles, $\beta = 5 \sum 1/n = {float(beta):g}$",
        fontsize=11,
    )
    return fig


def check(ds: xr.Dataset) -> tuple[Claim, ...]:
    claims = []
    for name in PROFILES:
        values, exact = alive(ds, name), law(name)
        mean, variance = values.mean(), values.var(ddof=1)
        mean_error = math.sqrt(variance / values.size)
        error = math.sqrt((np.mean((values - mean) ** 4) - variance**2) / values.size)
        source, gaussian = (
            "formula 8, (2/n) chi^2_K per layer",
            "Hanin & Nica 2018, beta = 5 sum 1/n",
        )
        of_mean, of_variance = (f"{what} of log ||J u||^2, {name}" for what in ("mean", "variance"))
        claims += [
            close(of_mean, mean, exact.mean, source, error=mean_error, relative=0.15),
            close(of_variance, variance, exact.variance, source, error=error, relative=0.08),
            close(
                f"{of_variance}, at beta",
                variance,
                exact.beta,
                gaussian,
                error=error,
                relative=0.25,
                asymptotic=True,
            ),
        ]
    bound = float(scipy.stats.kstwobign.isf(LEVEL)) * math.sqrt(2 / ds.sizes["sample"])
    for one, other in itertools.combinations(PROFILES, 2):
        gap = scipy.stats.ks_2samp(alive(ds, one), alive(ds, other))[0]
        statement = f"largest gap between the distributions, {one} and {other}"
        claims.append(
            close(statement, gap, 0, "Hanin 2018, only sum 1/n counts", absolute=round(bound, 4))
        )
    return tuple(claims)
