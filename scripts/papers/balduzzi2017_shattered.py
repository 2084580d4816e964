"""Balduzzi 2017: gradients of deep ReLU networks shatter into white noise; skips prevent it.

The shattered gradients problem, arXiv 1702.08591, figures 1 to 3: the gradients g_i = d f(x_i) / d
h of two examples lose their correlation with depth, halved by each layer of a BN-ReLU network, and
far more slowly with skips.

The laws for the blocks here, which are exact at infinite width. Feedforward, h' = W relu(BN(h)): in
a batch of B normalised pairs have the correlation -1/(B-1), and the gradients' falls by r = 1/2 -
arcsin(1/(B-1))/pi per layer (`meanfield.gradient_correlation`), 1/2 for large B. Residual, h' = h +
W relu(BN(h)), sigma_w^2 = 2: the batch's variance of a unit grows by (1 - 1/B)(1 - 2 E phi_1 phi_2)
per layer, to v_l, so that the branch has the mean squared Jacobian b_l = E[1/v] = (B-1)/((B-3)
v_l), and the correlation falls by (1 + b_l r)/(1 + b_l). As (1 - 1/pi) l -> v_l, it goes as
l^(-1/(2 - 2/pi)) = l^-0.73; the paper's l^-1/2 neglects that BatchNorm takes the mean away. The
statistics of the batch are constants in the gradient: f(x_i) is differentiated by its own input, as
at test time.

Verified by simulation: both laws, layer by layer. Figure 1's curves are drawn as in the paper, at
width 200, as an illustration without a claim. Not covered: the paper's beta rescaling, its "looks
linear" initialisation, training.
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
    MEASURED,
    THEORY,
    Claim,
    close,
    mean_error,
    panels,
    points,
    without,
)

SOURCE = "formula 10, arXiv 1702.08591"
KINDS = ("feedforward", "residual")
LINES = {
    "1-layer feedforward": (1, 0.0),
    "24-layer feedforward": (24, 0.0),
    "50-layer residual": (50, 1.0),
}


@dataclass(frozen=True)
class Config:
    seed: int = 0
    width: int = 256
    batch: int = 64
    readouts: int = 8  # scalar functions f of each network
    depths: tuple[int, int] = (8, 48)  # of the feedforward and the residual network
    networks: int = 24
    sigma_w: float = 2**0.5  # of what is simulated
    activation: str = "relu"
    grid: int = 256  # one-dimensional inputs of the illustration


SMALL = dict(width=128, batch=32, depths=(6, 24), networks=24, grid=16)
CONTROLS = {
    "linear in place of ReLU": dict(activation="linear"),
    "sigma_w^2 = 1 in place of 2": dict(sigma_w=1.0),
}


def gradients(
    h: jax.Array, weights: jax.Array, readout: jax.Array, skip: jax.Array, activation: str
) -> jax.Array:
    """(depth + 1, batch, width) gradients of f(x_i) = readout . h_i, at the last state first."""
    phi = {"relu": jax.nn.relu, "linear": lambda h: h}[activation]

    def layer(h, w):
        mean, deviation = (
            jax.lax.stop_gradient(f(h, axis=0, keepdims=True)) for f in (jnp.mean, jnp.std)
        )
        return gradjax.tap(skip * h + phi((h - mean) / deviation) @ w, "h"), None

    found = gradjax.probe(lambda h: jnp.sum(jax.lax.scan(layer, h, weights)[0] @ readout), h)
    return jnp.concatenate([found.cotangents["h"][::-1], found.grads[None]])


@functools.partial(jax.jit, static_argnames=("depth", "config"))
def correlation(
    key: jax.Array, skip: jax.Array, sigma_w: jax.Array, *, depth: int, config: Config
) -> jax.Array:
    """Mean of g_i . g_j over the mean of g_i . g_i, l layers before the last, (depth + 1,).

    Means are over pairs and readouts.
    """
    (of_h, of_w, of_v), n = jax.random.split(key, 3), config.width
    h = jax.random.normal(of_h, (config.batch, n))
    weights = sigma_w / n**0.5 * jax.random.normal(of_w, (depth, n, n))

    def sums(readout):
        g = gradients(h, weights, readout, skip, config.activation)
        return jnp.sum(g**2, axis=(1, 2)), jnp.sum(jnp.sum(g, axis=1) ** 2, axis=1)

    squares, total = (
        x.sum(0) for x in jax.vmap(sums)(jax.random.normal(of_v, (config.readouts, n)))
    )
    return (total / squares - 1) / (config.batch - 1)


def curve(key: jax.Array, x: np.ndarray, depth: int, skip: float, width: int = 200) -> np.ndarray:
    """The gradient of a network of one-dimensional inputs at every input, which are one batch."""
    of_u, of_b, of_w, of_v = jax.random.split(key, 4)
    u, b, readout = (jax.random.normal(k, (width,)) for k in (of_u, of_b, of_v))
    weights = (2 / width) ** 0.5 * jax.random.normal(of_w, (depth, width, width))
    h = jnp.outer(jnp.asarray(x), u) + jnp.broadcast_to(b, (len(x), width))
    return np.asarray(gradients(h, weights, readout, jnp.float32(skip), "relu")[-1] @ u, float)


def theory(kind: str, depth: int, batch: int) -> np.ndarray:
    """(depth + 1,) the correlation by the laws above."""
    c = -1 / (batch - 1)
    if kind == "feedforward":
        return float(meanfield.gradient_correlation(c)) ** np.arange(depth + 1)
    pair = float(meanfield.correlation_map(c, 2**0.5, 0.0, "relu", q0=1.0))  # 2 E phi_1 phi_2
    variance = (1 - 1 / batch) * (1 + np.arange(depth) * (1 - pair))
    branch = (batch - 1) / ((batch - 3) * variance)
    factors = np.asarray(meanfield.gradient_correlation(c, branch=branch), float)
    return np.append(1.0, np.cumprod(factors[::-1]))  # the last layer is the first on the way back


def run(config: Config) -> xr.Dataset:
    """Correlations per network and layer, and gradients of three networks with scalar inputs."""
    key, lines = jax.random.split(jax.random.key(config.seed))
    ds = xr.Dataset()
    for skip, (kind, depth) in enumerate(zip(KINDS, config.depths, strict=True)):
        numbers = jnp.float32(skip), jnp.float32(config.sigma_w)
        one = functools.partial(correlation, depth=depth, config=without(config, "sigma_w"))
        keys = jax.random.split(jax.random.fold_in(key, skip), config.networks)
        dims = ("network", f"{kind}_layer")
        ds[kind] = dims, np.asarray([one(key, *numbers) for key in keys], float)
        ds[f"{kind}_theory"] = dims[1], theory(kind, depth, config.batch)
    x = np.linspace(-2, 2, config.grid).astype(np.float32)
    for name, (depth, skip) in LINES.items():
        ds[name] = "x", curve(jax.random.fold_in(lines, depth), x, depth, skip)
    return ds.assign_coords(x=x)


def by_depth(ds: xr.Dataset, name: str) -> np.ndarray:
    """The correlation at the input of a network of each depth.

    (networks, depth + 1) or (depth + 1,).

    With skips the layer matters: those after the L-th multiply the correlations at states 0 and L
    alike, so that their ratio is that of a network of depth L. Without, all layers are alike.
    """
    back = ds[name].values
    return back[..., -1:] / back[..., ::-1] if "residual" in name else back


def slope(x: np.ndarray, y: np.ndarray, error: np.ndarray) -> float:
    """Of log y over x, weighted by the errors of y."""
    return float(np.polyfit(x, np.log(y), 1, w=y / error)[0])


def check(ds: xr.Dataset) -> tuple[Claim, ...]:
    """How the correlations fall with depth, and their value at one depth."""
    claims, dof = [], ds.sizes["network"] - 1
    for kind in KINDS:
        mean, error = mean_error(by_depth(ds, kind))
        law, depth = by_depth(ds, f"{kind}_theory"), np.arange(len(mean))
        used = slice(1, None) if kind == "feedforward" else slice(len(depth) // 6, None)
        x, what = (depth, "depth") if kind == "feedforward" else (np.log1p(depth), "log(1 + depth)")
        found, expected = (slope(x[used], y[used], error[used]) for y in (mean, law))
        statement = f"{kind}: slope of the log correlation over {what}"
        claims.append(
            close(statement, found, expected, SOURCE + ", law of this block", relative=0.05)
        )
        at = depth[-1] // 2 if kind == "feedforward" else depth[-1]
        one = {"error": error[at], "dof": dof, "relative": 0.06}
        claims.append(
            close(
                f"{kind}: correlation at depth {at}",
                mean[at],
                law[at],
                SOURCE + ", law of this block",
                **one,
            )
        )
    return tuple(claims)


def plot(ds: xr.Dataset) -> Figure:
    """Gradients over one-dimensional inputs (figure 1); the correlation over depth."""
    figure, axes = panels(2, 3, (3.9, 2.7))
    for ax, name in zip(axes[0], LINES, strict=True):
        ax.plot(ds["x"], ds[name] / np.abs(ds[name]).max(), color=MEASURED, lw=0.8)
        ax.set(title=name, xlabel="input $x$", ylabel=r"$df/dx$, largest = 1", ylim=(-1.05, 1.05))
    for i, kind in enumerate(KINDS):
        mean, error = mean_error(by_depth(ds, kind))
        depth = np.arange(len(mean))
        for ax in (axes[1, i], axes[1, 2]):
            shown = 1 + depth if ax is axes[1, 1] else depth
            ax.plot(
                shown,
                by_depth(ds, f"{kind}_theory"),
                color=THEORY,
                lw=1.4,
                label=None if ax is axes[1, 2] else "law",
            )
            points(ax, shown, mean, error, color=COLOURS[2 * i], label=kind)
    power = np.geomspace(8, 1 + depth[-1])
    exponent = -1 / (2 - 2 / np.pi)
    scale = by_depth(ds, "residual_theory")[-1] / power[-1] ** exponent
    axes[1, 1].plot(power, 1.4 * scale * power**exponent, "--", color=GREY, label="power -0.73")
    axes[1, 0].set(yscale="log", xlabel="depth $L$", title="halved by each layer")
    axes[1, 1].set(
        xscale="log", yscale="log", xlabel="1 + depth $L$", title="skips: a power of depth"
    )
    axes[1, 2].set(yscale="log", xlabel="depth $L$", ylim=(1e-3, 1.3), title="both")
    axes[1, 0].set_ylabel("correlation of gradients")
    for ax in axes[1]:
        ax.legend(frameon=False, fontsize=8)
    return figure
