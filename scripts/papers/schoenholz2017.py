"""Schoenholz 2017, figs. 2 and 4: depth scales of correlations and gradients (arXiv 1611.01232).

tanh networks with sigma_b^2 = 0.05 and sigma_w^2 from 1 to 4. Two inputs converge (order) or part
(chaos) as exp(-l / xi_c), gradients vanish or explode as exp(l / xi_grad) on their way back, 1 /
xi_grad = -log chi_1; both scales diverge at sigma_w^2 = 1.761, where chi_1 = 1.

Verified: the correlation c^l of networks of width 1000 against the iterated map, rms below 0.02 at
every sigma_w; the slope of the log squared gradient within 5% of log chi_1, within 0.01 where that
is small. Scales fitted to c^l are drawn and not judged: over so few layers a fit is no asymptote,
for the map itself (dashes in the figure) no more than for a network. Not covered: dropout, and the
trainable depth of fig. 5, which needs training.
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
from papers.common import COLOURS, LIMIT, THEORY, Claim, close, mean_error, panels, points

SIGMA_B = math.sqrt(0.05)
SQUARES = (1.0, 1.3, 1.5, 1.7, 1.9, 2.2, 2.5, 3.0, 3.5, 4.0)  # sigma_w^2
STEEP = 0.15  # |log chi_1| from which its slope is held to 5%


@dataclass(frozen=True)
class Config:
    seed: int = 0
    width: int = 1000
    num_samples: int = 16  # networks for c^l
    num_pairs: int = 8  # of inputs, per network
    num_layers: int = 30
    gradient_width: int = 500
    num_gradients: int = 10  # networks for the gradient
    gradient_layers: int = 40
    batch: int = 16  # inputs per network for the gradient
    gain: float = 1.0  # times every sigma_w


SMALL = {
    "width": 500,
    "num_samples": 12,
    "gradient_width": 300,
    "num_gradients": 12,
    "gradient_layers": 20,
}
CONTROLS = {"sigma_w 5% off": {"gain": 1.05}, "sigma_w 5% low": {"gain": 0.95}}


def layer(sigma_w, h, key):
    """h -> sigma_w W tanh(h) + sigma_b b; pre-activations (..., N) for all sigma_w of one draw."""
    of_w, of_b = jax.random.split(key)
    n = h.shape[-1]
    w, b = jax.random.normal(of_w, (n, n)) / math.sqrt(n), SIGMA_B * jax.random.normal(of_b, (n,))
    return sigma_w * (jnp.tanh(h) @ w.T) + b


@jax.jit
def correlations(keys, h, sigma_w):
    """(depth, sigma_w): along the layers, mean over pairs of inputs, h (sigma_w, 2, pairs, N)."""

    def step(h, key):
        a, b = h[:, 0], h[:, 1]

        def norm(x):
            return jnp.sqrt(jnp.sum(x**2, -1))

        c = jnp.sum(a * b, -1) / (norm(a) * norm(b))
        return layer(sigma_w[:, None, None, None], h, key), jnp.mean(c, -1)

    return jax.lax.scan(step, h, keys)[1]


@jax.jit
def gradients(keys, h, target, sigma_w):
    """Log rms of the gradient of a batch h (sigma_w, batch, N), each along its own direction.

    (sigma_w, depth + 1).
    """

    def one(h, sigma_w):
        step = functools.partial(layer, sigma_w)
        return gradjax.signals(step, h, keys, loss=lambda h: jnp.sum(h * target)).log_cotangent_rms

    return jax.vmap(one)(h, sigma_w)


def run(config: Config) -> xr.Dataset:
    rng = np.random.default_rng(config.seed)
    exact = np.sqrt(SQUARES)
    q = np.asarray(meanfield.q_star(exact, SIGMA_B), float)
    sigma_w = np.float32(config.gain * exact)
    of_c, of_gradients = jax.random.split(jax.random.key(config.seed))
    c, logs = [], []
    start = np.where(
        exact < meanfield.critical_sigma_w(SIGMA_B), 0.6, 0.9
    )  # far from c* in either phase
    for key in jax.random.split(of_c, config.num_samples):
        planes = np.linalg.qr(rng.standard_normal((config.num_pairs, config.width, 2)))[0]
        one, other = math.sqrt(config.width) * np.moveaxis(planes, -1, 0)
        h = np.array([[one, c * one + math.sqrt(1 - c**2) * other] for c in start])
        h = np.float32(np.sqrt(q)[:, None, None, None] * h)
        c.append(correlations(jax.random.split(key, config.num_layers), h, sigma_w))
    for key in jax.random.split(of_gradients, config.num_gradients):
        h, target = rng.standard_normal((2, config.batch, config.gradient_width))
        h = np.float32(np.sqrt(q)[:, None, None] * h)
        logs.append(
            gradients(jax.random.split(key, config.gradient_layers), h, np.float32(target), sigma_w)
        )
    trajectory = [start]
    for _ in range(config.num_layers - 1):
        trajectory.append(
            np.asarray(meanfield.correlation_map(trajectory[-1], exact, SIGMA_B), float)
        )
    return xr.Dataset(
        {
            "c": (("sample", "layer", "sigma_w2"), np.array(c, float)),
            "c_map": (("layer", "sigma_w2"), np.array(trajectory)),
            "log_gradient": (("network", "sigma_w2", "state"), np.array(logs, float)),
        },
        coords={"sigma_w2": list(SQUARES)},
        attrs={"width": config.width, "gradient_width": config.gradient_width},
    )


def fitted_scale(c: np.ndarray, c_star: float) -> float:
    """xi from the later layers, while c is more than 0.03 from c*; NaN from fewer than 4."""
    off = abs(c - c_star)
    near = np.argmax(off < 0.03) if np.any(off < 0.03) else len(off)
    layers = np.arange(near // 3, near)
    if len(layers) < 4:
        return math.nan
    return float(-1 / np.polyfit(layers, np.log(off[layers]), 1)[0])


def slopes(ds: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """(growth of the log squared gradient per layer, its error), for every sigma_w."""
    logs = ds.log_gradient.values
    return mean_error(2 * (logs[..., 0] - logs[..., -1]) / (logs.shape[-1] - 1))


def plot(ds: xr.Dataset) -> Figure:
    fig, ((left, middle, right),) = panels(1, 3, (4.4, 3.6))
    layers = np.arange(ds.sizes["layer"])
    shown = (1.0, 1.5, 1.7, 1.9, 2.5, 4.0)
    for colour, square in zip(COLOURS, shown, strict=True):
        one = ds.sel(sigma_w2=square)
        left.plot(layers, one.c_map, color=colour, lw=1)
        points(left, layers, *mean_error(one.c.transpose("sample", "layer")), color=colour, ms=2.5)
        logs = (
            (one.log_gradient - one.log_gradient.isel(state=-1))
            .transpose("network", "state")
            .values
        )
        states, chi_1 = np.arange(logs.shape[1]), float(meanfield.chi_1(math.sqrt(square), SIGMA_B))
        right.plot(states, (states[-1] - states) * math.log(chi_1), color=colour, lw=1)
        label = rf"$\sigma_w^2 = {square:g}$"
        points(
            right,
            states[::2],
            *(x[::2] for x in mean_error(2 * logs)),
            color=colour,
            ms=2.5,
            label=label,
        )
    left.set(xlabel="layer $l$", ylabel="correlation $c^l$")
    right.legend(
        frameon=False, fontsize=8, ncols=3, loc="upper right", handletextpad=0, columnspacing=0.5
    )
    right.set_ylim(top=20)
    right.set(xlabel="layer $l$", ylabel=r"log squared gradient, $\log\,\chi_1^{L-l}$")

    squares = np.linspace(0.9, 4.1, 200)
    scales = meanfield.depth_scales(np.sqrt(squares), SIGMA_B)
    middle.plot(squares, scales.xi_c, color=THEORY, label=r"$\xi_c$")
    middle.plot(squares, np.abs(scales.xi_grad), color=LIMIT, label=r"$|\xi_\nabla|$")
    fits, from_map = fits_of(ds)
    middle.plot(SQUARES, from_map, "_", color=THEORY, ms=9, label=r"$\xi_c$, fit to the map")
    points(middle, SQUARES, fits, color=THEORY, label=r"$\xi_c$, fit to $c^l$")
    slope, error = slopes(ds)
    points(
        middle, SQUARES, 1 / abs(slope), error / slope**2, color=LIMIT, fmt="s", label="gradients"
    )
    edge = float(meanfield.critical_sigma_w(SIGMA_B)) ** 2
    middle.axvline(edge, color="k", lw=0.8, ls=":")
    middle.text(
        edge + 0.05, 0.9, "edge of chaos", transform=middle.get_xaxis_transform(), fontsize=8
    )
    middle.set(xlabel=r"$\sigma_w^2$", ylabel="depth scale (layers)", yscale="log", ylim=(2, 150))
    middle.legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.92))
    widths = f"width {ds.attrs['width']} (gradients {ds.attrs['gradient_width']})"
    fig.suptitle(rf"tanh, $\sigma_b^2 = 0.05$, {widths}; lines are mean field", fontsize=11)
    return fig


def fits_of(ds: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """xi_c fitted to the measured c^l, and in the same way to the map's."""
    c_star = np.asarray(meanfield.c_star(np.sqrt(SQUARES), SIGMA_B), float)

    def fit(c):
        return np.array(
            [fitted_scale(x, limit) for x, limit in zip(c.values.T, c_star, strict=True)]
        )

    return fit(ds.c.mean("sample")), fit(ds.c_map)


def check(ds: xr.Dataset) -> tuple[Claim, ...]:
    exact, source = np.sqrt(SQUARES), "mean field, formula 6"
    claims = []
    off = np.sqrt(((ds.c.mean("sample") - ds.c_map) ** 2).mean("layer")).values
    for square, rms in zip(SQUARES, off, strict=True):
        claims.append(
            close(f"rms of c^l off the map, sigma_w^2 = {square:g}", rms, 0, source, absolute=0.02)
        )
    slope, error = slopes(ds)
    log_chi = np.log(np.asarray(meanfield.chi_1(exact, SIGMA_B), float))
    for i, square in enumerate(SQUARES):
        bound = {"relative": 0.05} if abs(log_chi[i]) > STEEP else {"absolute": 0.01}
        statement = f"slope of the log squared gradient, sigma_w^2 = {square:g}"
        claims.append(
            close(statement, slope[i], log_chi[i], source, error=error[i], asymptotic=True, **bound)
        )
    return tuple(claims)
