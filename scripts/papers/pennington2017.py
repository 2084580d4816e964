"""Pennington 2017: the spectrum of the input-output Jacobian, eight networks (arXiv 1711.04735).

J = D_L W_L ... D_1 W_1 of critical networks (linear, ReLU, hard-tanh, erf; Gaussian and orthogonal
weights), real ones with their forward pass. The relative variance of the eigenvalues of J J^T grows
as

    m_2 / m_1^2 - 1 = L (mu_2 / mu_1^2 - 1 - s_1)
    s_1 = -1 Gaussian, 0 orthogonal,      mu_k = E phi'(h)^(2k)

so that only orthogonal weights, and only next to linear (hard-tanh and erf at small q*), keep it
bounded: dynamical isometry. Densities of singular values are drawn over those of free probability
at the same depth.

Verified: the slope in L of all eight, within 5% of the prediction. At N = 300 and L = 64 the
formula is up to 40% low, so what is predicted is the exact recursion for independent D:
`random_matrix.log_second_moments` for Gaussian weights (mu_1^2 / mu_2 acts as Bernoulli's keep),
and its analogue for Haar weights, derived here in `haar_moments`; the formula is its limit, drawn
as a dashed line. Linear and ReLU networks fulfil it exactly, so those are held to their standard
errors too. Not covered: the paper draws its densities at other q*; here q* is 0.5 (hard-tanh) and
0.2 (erf).
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

import gradjax
from gradjax.theory import meanfield
from gradjax.theory import random_matrix as rm
from papers.common import COLOURS, WEIGHTS, Claim, close, density, mean_error, panels, points

DEPTHS = (2, 4, 8, 16, 32, 64)
WEIGHT = 1 / np.array(DEPTHS)  # of each depth in the mean slope: relative errors grow with L
DRAWN = (4, 16)  # depths of the densities
FAMILIES = ("gaussian", "orthogonal")


def erf(x):
    """The paper's erf, of slope 1 at 0."""
    return jax.scipy.special.erf(math.sqrt(math.pi) / 2 * x)


# q* of the critical point; linear and ReLU networks keep any length
NETWORKS = {
    "linear": ("linear", 1.0),
    "relu": ("relu", 1.0),
    "hard_tanh": ("hard_tanh", 0.5),
    "erf": (erf, 0.2),
}
PHI = {
    "linear": lambda h: h,
    "relu": jax.nn.relu,
    "hard_tanh": lambda h: jnp.clip(h, -1, 1),
    "erf": erf,
}
EXACT = (
    "linear",
    "relu",
)  # D is independent of W: the finite-width prediction has no approximation


@dataclass(frozen=True)
class Config:
    seed: int = 0
    width: int = 300
    num_samples: int = 5  # networks of each kind, of depth 64
    num_densities: int = 3
    gain: float = 1.0  # times the critical sigma_w
    families: tuple[str, str] = FAMILIES  # the weights that are drawn for those two names


SMALL = {"width": 60, "num_samples": 12}
CONTROLS = {
    "sigma_w 5% off": {"gain": 1.05},
    "Gaussian for orthogonal weights": {"families": ("gaussian", "gaussian")},
}


def critical(name: str) -> tuple[float, float]:
    """(sigma_w, sigma_b) with chi_1 = 1 at the q* of the network."""
    if name in EXACT:
        return {"linear": 1.0, "relu": math.sqrt(2)}[name], 0.0
    activation, q = NETWORKS[name]
    return tuple(float(x) for x in meanfield.critical_line(q, activation))  # type: ignore[return-value]


@functools.partial(jax.jit, static_argnames="name")
def spectra_of(x, w, b, *, name: str):
    """One network x -> phi(W x + b): its layers D_l W_l, and (m_1, m_1^2, m_2) for every depth.

    Those of depth L are means over all 64 / L stretches of L layers: products of two stretches make
    the next depth.
    """

    def step(x, theta):
        return PHI[name](theta[0] @ x + theta[1])

    layers = gradjax.layer_jacobians(step, x, (w, b))
    product, found = jnp.asarray(layers), []
    for _ in DEPTHS:
        product = product[1::2] @ product[::2]
        gram = product @ product.swapaxes(1, 2)
        m_1, m_2 = jnp.trace(gram, axis1=1, axis2=2) / x.size, jnp.sum(gram**2, (1, 2)) / x.size
        found.append([m_1.mean(), (m_1**2).mean(), m_2.mean()])
    return layers, jnp.array(found)


def draw(
    rng: np.random.Generator, family: str, config: Config
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every network of the same random draws.

    Returns:
        name -> (layers of the shallowest 16, moments (depth, 3)).
    """
    n, depth, found = config.width, max(DEPTHS), {}
    w, z, x = (
        WEIGHTS[family](rng, depth, n, n),
        rng.standard_normal((depth, n)),
        rng.standard_normal(n),
    )
    for name, (_, q) in NETWORKS.items():
        sigma_w, sigma_b = critical(name)
        length = math.sqrt(n * (q - sigma_b**2)) / sigma_w
        inputs = (length * x / np.linalg.norm(x), config.gain * sigma_w * w, sigma_b * z)
        layers, moments = spectra_of(*(np.float32(a) for a in inputs), name=name)
        found[name] = np.asarray(layers[: max(DRAWN)]), np.asarray(moments, float)
    return found


def log_sigma(layers: np.ndarray) -> list:
    """Log singular values after each of the drawn depths.

    The layers behind a depth are identities, so that one compilation serves all depths.
    """
    index = np.arange(max(DRAWN))[:, None, None]
    eye = np.eye(layers.shape[-1], dtype=layers.dtype)
    return [gradjax.log_singular_values(np.where(index < depth, layers, eye)) for depth in DRAWN]


def run(config: Config) -> xr.Dataset:
    rng = np.random.default_rng(config.seed)
    samples = {
        family: [draw(rng, drawn, config) for _ in range(config.num_samples)]
        for family, drawn in zip(FAMILIES, config.families, strict=True)
    }
    pairs = [(name, family) for name in NETWORKS for family in FAMILIES]
    moments = [[sample[name][1] for sample in samples[family]] for name, family in pairs]
    few = [
        np.array([x[name][0] for x in samples[family][: config.num_densities]])
        for name, family in pairs
    ]
    curves = []
    for name, family in pairs:
        law = rm.derivative_law(*NETWORKS[name])
        each = [density(law, depth, critical(name)[0], family) for depth in DRAWN]
        curves.append([[x.log_lambda / 2, 2 * x.density] for x in each])
    return xr.Dataset(
        {
            "moments": (("network", "sample", "depth", "moment"), np.array(moments)),
            "log_sigma": (("network", "drawn", "lane", "i"), np.array([log_sigma(x) for x in few])),
            "theory": (("network", "drawn", "axis", "point"), np.array(curves)),
        },
        coords={
            "network": [f"{name}, {family}" for name, family in pairs],
            "depth": list(DEPTHS),
            "drawn": list(DRAWN),
            "moment": ["m_1", "m_1^2", "m_2"],
        },
    )


def haar_moments(
    depth: int, n: int, sigma_w: float, mu_1: float, mu_2: float
) -> tuple[float, float]:
    """(E tr (J J^T)^2 / N, E (tr J J^T)^2 / N^2) for Haar weights and independent D, exact.

    Of H = O M O^T, with a = tr M^2 / N and b = (tr M)^2 / N^2: E H_ii^2 = (N b + 2 a) / (N + 2),
    the off-diagonal rest of a row has E sum_j H_ij^2 = N (a - b) / (N + 2), and E sum_j H_ii H_jj =
    N ((N + 1) b - 2 a / N) / (N + 2); D multiplies the first by mu_2, the others by mu_1^2.
    """
    a = b = 1.0
    for _ in range(depth):
        diagonal, rest = (n * b + 2 * a) / (n + 2), n * (a - b) / (n + 2)
        pairs = n * ((n + 1) * b - 2 * a / n) / (n + 2)
        a = sigma_w**4 * (mu_2 * diagonal + mu_1**2 * rest)
        b = sigma_w**4 * (mu_2 * diagonal + mu_1**2 * pairs) / n
    return a, b


def predictions(network: str, n: int) -> tuple[np.ndarray, float]:
    """E m_2 / E m_1^2 - 1 of a critical network at this width for every depth.

    And the slope in L of formula 4.
    """
    name, family = network.split(", ")
    law, (sigma_w, _) = rm.derivative_law(*NETWORKS[name]), critical(name)
    mu_1, mu_2 = (float(rm.derivative_moment(law, k)) for k in (1, 2))
    if family == "orthogonal":
        a, b = np.array([haar_moments(depth, n, sigma_w, mu_1, mu_2) for depth in DEPTHS]).T
    else:
        keep = mu_1**2 / mu_2
        with jax.enable_x64(True):
            a, b = (
                np.exp(x)
                for x in rm.log_second_moments(np.array(DEPTHS, float), float(n), keep**-0.5, keep)
            )
    return np.asarray(a / b - 1), float(rm.relative_variance(law, 1.0, family))


def relative_variance(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(estimate, its leave-one-out values) of E m_2 / E m_1^2 - 1 from (samples, depth, 3)."""
    total = moments.sum(0)

    def ratio(x):
        return x[..., 2] / x[..., 1] - 1

    return ratio(total), ratio(total - moments)


def jackknife(left_out: np.ndarray) -> np.ndarray:
    """Standard error from leave-one-out values, over the first axis."""
    return np.sqrt((len(left_out) - 1) * left_out.var(0))


def plot(ds: xr.Dataset) -> Figure:
    fig, axes = panels(3, len(NETWORKS), (3.3, 2.6))
    for column, name in enumerate(NETWORKS):
        for row, family in enumerate(FAMILIES):
            ax, one = axes[row, column], ds.sel(network=f"{name}, {family}")
            draw_densities(ax, one)
            ax.set_title(
                f"{name}, {family.replace('gauss', 'Gauss')}".replace("_", "-"), fontsize=10
            )
            ax.set_xlabel("log singular value (nats)")
            draw_variance(axes[2, column], one, family, COLOURS[row])
        axes[2, column].set(
            xscale="log", yscale="log", xlabel="depth $L$", xticks=DEPTHS, xticklabels=DEPTHS
        )
        axes[2, column].set_xticks([], minor=True)
    for ax in axes[:2, 0]:
        ax.set_ylabel("density (per nat)")
    axes[2, 0].set_ylabel("relative variance of $\\sigma^2$")
    axes[0, 0].legend(frameon=False, fontsize=8)
    axes[2, 0].legend(frameon=False, fontsize=8)
    return fig


def draw_densities(ax, one: xr.Dataset) -> None:
    """Histograms as points with Poisson errors over the theory's lines, zeros left out."""
    if abs(one.log_sigma).max() < 1e-3:
        ax.axvline(0, color=COLOURS[0], lw=2)
        ax.text(0.05, 0.9, "every value is 1", transform=ax.transAxes, fontsize=8)
        ax.set(xlim=(-3, 2), yticks=[])
        return
    low, top = -3.0, 0.0
    for colour, depth in zip(COLOURS, DRAWN, strict=False):
        values = one.log_sigma.sel(drawn=depth).values.ravel()
        x, y = one.theory.sel(drawn=depth).values
        counts, edges = np.histogram(values, np.arange(low, 2.5, 0.25))
        scale = values.size * np.diff(edges)
        seen = counts > 0
        middle = (edges[1:] + edges[:-1]) / 2
        points(
            ax,
            middle[seen],
            (counts / scale)[seen],
            (np.sqrt(counts) / scale)[seen],
            color=colour,
            ms=2.5,
        )
        ax.plot(x, y, color=colour, label=f"$L = {depth}$")
        top = max(top, np.max(np.where(x > low, y, 0)[5:-5]))
    ax.set(xlim=(low, 2.5), ylim=(0, 1.25 * top))


def draw_variance(ax, one: xr.Dataset, family: str, colour: str) -> None:
    """The relative variance over depth: measured, at this width, and for infinite width."""
    finite, slope = predictions(str(one.network.values), one.sizes["i"])
    if slope == 0:
        return
    mean, left_out = relative_variance(one.moments.values)
    points(ax, DEPTHS, mean, jackknife(left_out), color=colour, label="measured")
    ax.plot(DEPTHS, finite, color=colour, lw=1.2, label=f"width {one.sizes['i']}")
    ax.plot(DEPTHS, slope * np.array(DEPTHS), "--", color=colour, lw=0.9, label="infinite width")


def check(ds: xr.Dataset) -> tuple[Claim, ...]:
    claims, dof = [], ds.sizes["sample"] - 1
    for network in ds.network.values:
        moments, exact = ds.moments.sel(network=network), network.split(", ")[0] in EXACT
        finite, slope = predictions(network, ds.sizes["i"])
        variance, left_out = relative_variance(moments.values)
        if slope == 0:
            statement, off = f"largest variance of the spectrum, {network}", abs(variance).max()
            claims.append(
                close(statement, off, 0, "Pennington 2017, dynamical isometry", absolute=1e-4)
            )
        else:
            # every depth's slope, with the weight that its relative error leaves it
            def mean(x, finite=finite, slope=slope):
                return slope * np.average(x / finite, axis=-1, weights=WEIGHT)

            options = {
                "error": jackknife(mean(left_out)),
                "dof": dof,
                "relative": 0.05,
                "asymptotic": not exact,
            }
            statement, source = (
                f"slope in L of the relative variance, {network}",
                "formula 4, corrected to this width",
            )
            claims.append(close(statement, mean(variance), slope, source, **options))
        found, error = mean_error(moments.sel(moment="m_1", depth=8).values)
        options = {
            "error": error,
            "dof": dof,
            "relative": 0.1,
            "asymptotic": not exact or slope == 0,
        }
        claims.append(
            close(f"m_1 over 8 layers, {network}", found, 1, "(sigma_w^2 mu_1)^L", **options)
        )
    return tuple(claims)
