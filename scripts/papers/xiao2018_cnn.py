"""Xiao 2018: convolutions that are isometries, and the critical line of convolutional networks.

Dynamical isometry and a mean field theory of CNNs, arXiv 1806.05393. A 3x3 kernel that is an
orthogonal matrix in its centre and zero elsewhere makes a linear network with circular padding
exactly isometric, whereas Gaussian kernels of the same variance spread the singular values with
depth (section 3.3). Gradients of tanh networks grow per layer by the fully connected chi_1 with Var
W = sigma_w^2 / (9 C), so that the critical line is the same (section 2, figure 1).

Verified: every singular value; chi_1 at points on both sides of the line for several sigma_b, from
the squared gradients of Gaussian networks that start at the length q* (ratios summed over space and
channels), and where it is 1. Not covered: the depth scales of signals that vary in space, zero
padding, training at 10,000 layers.
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
from papers.common import COLOURS, GREY, THEORY, Claim, close, joint, mean_error, panels, points

SOURCE = "arXiv 1806.05393"
KERNELS = ("delta-orthogonal", "Gaussian")


@dataclass(frozen=True)
class Config:
    seed: int = 0
    side: int = 3  # of the periodic images
    channels: int = 32  # of the linear network
    depth: int = 16
    wide: int = 64  # channels of the tanh networks
    tanh_depth: int = 16
    settle: int = 4  # their first layers, which are left out
    batch: int = 4
    networks: int = 8
    sigma_b2: tuple[float, ...] = (0.01, 0.05, 0.15)
    ratios: tuple[float, ...] = (0.8, 0.9, 1.0, 1.1, 1.2)  # sigma_w^2 over its critical value
    gain: float = 1.0  # multiplies the weights of what is simulated
    centred: bool = True  # the orthogonal matrix stands only in the kernel's centre


SMALL = dict(channels=8, depth=8, wide=32, tanh_depth=16, networks=8, sigma_b2=(0.05,))
CONTROLS = {
    "weights 5% larger": dict(gain=1.05),
    "orthogonal over the whole kernel": dict(centred=False),
}


def convolve(h: jax.Array, kernel: jax.Array) -> jax.Array:
    """(.., side, side, C) with a kernel (9, C, C') and circular padding."""
    shifts = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    patches = jnp.stack([jnp.roll(h, shift, axis=(-3, -2)) for shift in shifts], axis=-2)
    return jnp.einsum("...kc,kcd->...d", patches, kernel)


def isometry(key: jax.Array, config: Config) -> np.ndarray:
    """(kinds, N) log singular values of the linear networks."""
    of_delta, of_gaussian = jax.random.split(key)
    shape = (3, 3, config.channels, config.channels)
    draw = (
        jax.nn.initializers.delta_orthogonal()
        if config.centred
        else jax.nn.initializers.orthogonal()
    )
    delta = jax.vmap(lambda key: draw(key, shape))(jax.random.split(of_delta, config.depth))
    gaussian = jax.random.normal(of_gaussian, (config.depth, *shape)) / (9 * config.channels) ** 0.5
    kernels = config.gain * jnp.stack([delta, gaussian]).reshape(2, config.depth, 9, *shape[2:])
    h = jnp.zeros((config.side, config.side, config.channels))
    factors = jax.jit(
        lambda kernels: jax.lax.map(lambda k: gradjax.layer_jacobians(convolve, h, k), kernels)
    )(kernels)
    products = [
        np.linalg.multi_dot(list(x)[::-1]) for x in np.asarray(factors, float)
    ]  # few factors: float64 will do
    return np.log([np.linalg.svd(x, compute_uv=False) for x in products])


def network(
    key: jax.Array, sigma_w: jax.Array, sigma_b: jax.Array, q: jax.Array, *, config: Config
) -> jax.Array:
    """Growth of the squared gradient per layer, (), of a tanh network with input length q."""
    (of_w, of_b, of_h, of_g), c = jax.random.split(key, 4), config.wide
    kernels = (
        jax.random.normal(of_w, (config.tanh_depth, 9, c, c))
        * config.gain
        * sigma_w
        / (9 * c) ** 0.5
    )
    biases = jax.random.normal(of_b, (config.tanh_depth, 1, 1, 1, c)) * sigma_b
    h, cotangents = (
        jax.random.normal(k, (config.batch, config.side, config.side, c)) for k in (of_h, of_g)
    )

    def layer(
        h, index
    ):  # theta is a layer's number: the gradients of its weights are not asked for
        return convolve(jnp.tanh(h), kernels[index]) + jnp.broadcast_to(biases[index], h.shape)

    found = gradjax.signals(
        layer, q**0.5 * h, jnp.arange(config.tanh_depth), loss=lambda h: jnp.sum(cotangents * h)
    )
    logs = 2 * found.log_cotangent_rms[config.settle :]
    return jnp.mean(jnp.exp(logs[:-1] - logs[1:]))


def run(config: Config) -> xr.Dataset:
    """Log singular values of both linear networks, and growth of gradients with its theory."""
    of_linear, of_tanh = jax.random.split(jax.random.key(config.seed))
    sigma_b = np.sqrt(config.sigma_b2)
    critical = np.asarray(meanfield.critical_sigma_w(sigma_b), float)
    sigma_w = critical[:, None] * np.sqrt(config.ratios)
    theory = meanfield.phase_diagram(sigma_w, sigma_b[:, None], correlations=False)
    q = np.asarray(theory.q_star, float)
    one = functools.partial(network, config=config)
    simulate = jax.jit(lambda keys, *numbers: jax.lax.map(lambda key: one(key, *numbers), keys))
    keys = jax.random.split(of_tanh, (*sigma_w.shape, config.networks))
    grown = [
        [
            simulate(keys[i, j], *map(jnp.float32, (w, sigma_b[i], q[i, j])))
            for j, w in enumerate(row)
        ]
        for i, row in enumerate(sigma_w)
    ]
    line = np.square(
        meanfield.critical_line(np.linspace(0.01, 1.5, 60))
    )  # sigma_w^2 and sigma_b^2 by the length
    return xr.Dataset(
        {
            "log_sigma": (("kernel", "index"), isometry(of_linear, config)),
            "growth": (("sigma_b2", "ratio", "network"), np.array(grown, float)),
            "sigma_w2": (("sigma_b2", "ratio"), sigma_w**2),
            "chi_1": (("sigma_b2", "ratio"), np.asarray(theory.chi_1, float)),
            "critical": ("sigma_b2", critical**2),
            "line": (("sigma2", "length"), line),
        },
        coords={
            "kernel": list(KERNELS),
            "sigma_b2": list(config.sigma_b2),
            "ratio": list(config.ratios),
            "sigma2": ["w", "b"],
        },
    )


def grown(ds: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Mean growth over networks, (sigma_b2, ratio), and its error.

    Networks are the samples, because a network's layers have their lengths in common.
    """
    return mean_error(ds["growth"].values, axis=2)


def crossing(ds: xr.Dataset) -> np.ndarray:
    """The zero of a straight line through the log growth over log sigma_w^2, (sigma_b2,)."""
    mean, _ = grown(ds)
    lines = [
        np.polyfit(np.log(x), np.log(y), 1)
        for x, y in zip(ds["sigma_w2"].values, mean, strict=True)
    ]
    return np.array([np.exp(-offset / slope) for slope, offset in lines])


def check(ds: xr.Dataset) -> tuple[Claim, ...]:
    """The isometry, the spread of Gaussian kernels, chi_1 and the critical line."""
    off = np.abs(np.expm1(ds["log_sigma"].sel(kernel="delta-orthogonal"))).max()
    mean, error = grown(ds)
    dof = ds.sizes["network"] - 1
    claims = [
        close(
            "delta-orthogonal: largest |sigma - 1| of the linear network",
            off,
            0,
            SOURCE,
            absolute=1e-5,
        ),
        joint(
            "tanh, Gaussian: growth of squared gradients",
            mean,
            ds["chi_1"],
            error,
            "formula 6, " + SOURCE,
            dof=dof,
        ),
    ]
    for i, b2 in enumerate(ds["sigma_b2"].values):
        statement = f"critical sigma_w^2 at sigma_b^2 = {b2:g}"
        claims.append(
            close(
                statement, crossing(ds)[i], ds["critical"][i], "formula 6, " + SOURCE, relative=0.04
            )
        )
    return tuple(claims)


def plot(ds: xr.Dataset) -> Figure:
    """Singular values; growth across the critical line; the line itself."""
    figure, ((spectrum, growth, line),) = panels(1, 3)
    edges = np.linspace(-6.05, 1.55, 77)
    for name, colour in zip(KERNELS[::-1], (GREY, COLOURS[0]), strict=True):
        logs = ds["log_sigma"].sel(kernel=name).values / np.log(10)
        fraction = np.histogram(np.clip(logs, edges[0], edges[-1]), edges)[0] / logs.size
        spectrum.stairs(fraction, edges, fill=True, color=colour, alpha=0.8, label=name)
    spectrum.set(
        yscale="log",
        xlabel=r"$\log_{10}$ singular value",
        ylabel="fraction",
        title="linear network",
    )
    mean, error = grown(ds)
    for i, b2 in enumerate(ds["sigma_b2"].values):
        x = ds["sigma_w2"].values[i]
        growth.plot(x, ds["chi_1"][i], color=COLOURS[i], lw=1.2)
        points(growth, x, mean[i], error[i], color=COLOURS[i], label=rf"$\sigma_b^2 = {b2:g}$")
    growth.axhline(1, color=GREY, lw=1)
    growth.set(
        xlabel=r"$\sigma_w^2$",
        ylabel=r"gradient growth per layer, $\chi_1$",
        title="tanh: lines are theory",
    )
    line.plot(*ds["line"].values, color=THEORY, label="critical line, theory")
    points(line, crossing(ds), ds["sigma_b2"], fmt="o", ms=5, label="simulation")
    line.set(
        xlabel=r"$\sigma_w^2$",
        ylabel=r"$\sigma_b^2$",
        title="the edge of chaos",
        xlim=(1, 3),
        ylim=(0, 0.3),
    )
    line.text(1.15, 0.22, "ordered:\nvanishing")
    line.text(2.2, 0.05, "chaotic:\nexploding")
    for ax in (spectrum, growth, line):
        ax.legend(frameon=False, fontsize=8)
    return figure
