"""Zhang 2019 (Fixup): the first step changes the function by the same amount at every depth.

Fixup initialization, arXiv 1901.09321, section 3: L residual branches of m matrices, the last of
each zero and the others He's times L^(-1/(2m-2)); a step of gradient descent then moves the output
by order eta, whatever L. With only He's weights, activations and gradients double in each block.

To first order a step of eta on f = v . h_L changes f by -eta sum_l ||df/dtheta_l||^2. Derived for
the blocks here, h' = h + W_m relu(.. relu(W_1 h)) with Var W = 2/fan_in but for W_1, which sees no
ReLU (1/fan_in), exact in the mean at every width and in units of |v|^2 |h_0|^2 / 2: Fixup's sum is
1 for all L and m, and L without its scale; that of He's weights (m + 1) L 2^(L-1). The figure has
this change over L; the paper's figures train on CIFAR-10, which is not covered, nor are its scalar
biases and multipliers.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

import gradjax
from papers.common import COLOURS, Claim, close, joint, mean_error, panels, points, without

SOURCE = "section 3, arXiv 1901.09321, constant derived"
KINDS = ("Fixup", "He")


@dataclass(frozen=True)
class Config:
    seed: int = 0
    width: int = 64
    depths: tuple[int, ...] = (4, 8, 16, 32, 64)
    matrices: tuple[int, ...] = (2, 3)  # m
    networks: int = 24
    power: float = 1.0  # of Fixup's scale: 1 is the paper's


SMALL = dict(width=48, depths=(4, 16, 64), networks=16)
CONTROLS = {"half the exponent": dict(power=0.5), "no scale": dict(power=0.0)}


def change(
    key: jax.Array, depth: jax.Array, scale: jax.Array, last: jax.Array, *, m: int, config: Config
) -> jax.Array:
    """log of 2 sum_l ||df/dtheta_l||^2 / (|v|^2 |h_0|^2), ().

    One compiled program for both kinds and all depths: of the deepest stack only the first `depth`
    blocks are there, `scale` multiplies the first m - 1 matrices, `last` the last.
    """
    (of_w, of_h, of_v), n, deepest = jax.random.split(key, 3), config.width, max(config.depths)
    w = jax.random.normal(of_w, (deepest, m, n, n)) / n**0.5
    factors = jnp.append(jnp.full(m - 1, scale), last) * jnp.where(jnp.arange(m) > 0, 2**0.5, 1.0)
    h, v = jax.random.normal(of_h, (n,)), jax.random.normal(of_v, (n,))

    def block(h, theta):
        branch = theta["w"][0] @ h
        for matrix in theta["w"][1:]:
            branch = matrix @ jax.nn.relu(branch)
        return h + jnp.where(theta["index"] < depth, branch, jnp.zeros_like(branch))

    thetas = {"w": w * factors[None, :, None, None], "index": jnp.arange(deepest)}
    found = gradjax.signals(block, h, thetas, loss=lambda h: v @ h)
    # The sum leaves float32 in a deep network of He's weights, its logarithm does not.
    total = jax.nn.logsumexp(2 * found.log_gradient_norm)
    return total - jnp.log(jnp.sum(v**2) * jnp.sum(h**2) / 2)


@functools.partial(jax.jit, static_argnames=("m", "config"))
def changes(keys, depth, scale, last, *, m: int, config: Config) -> jax.Array:
    """`change` of one network for each key."""
    return jax.lax.map(lambda key: change(key, depth, scale, last, m=m, config=config), keys)


def run(config: Config) -> xr.Dataset:
    """Log change per kind, m, depth and network."""
    depths = np.array(config.depths, float)
    keys = jax.random.split(jax.random.key(config.seed), config.networks)
    ds = xr.Dataset(coords={"depth": depths, "m": list(config.matrices)})
    found = {kind: [] for kind in KINDS}
    for m in config.matrices:
        simulate = functools.partial(changes, keys, m=m, config=without(config, "power"))
        scale = depths ** (-config.power / (2 * m - 2))
        for kind, scales, last in zip(KINDS, (scale, scale**0), (0.0, 1.0), strict=True):
            found[kind].append([simulate(d, s, last) for d, s in zip(depths, scales, strict=True)])
    for kind, values in found.items():
        ds[kind] = ("m", "depth", "network"), np.array(values, float)
    return ds


def expected(kind: str, m: int, depth: np.ndarray) -> np.ndarray:
    """Log of the mean change, by the docstring's laws."""
    return 0 * depth if kind == "Fixup" else np.log((m + 1) * depth) + (depth - 1) * np.log(2)


def check(ds: xr.Dataset) -> tuple[Claim, ...]:
    """Fixup's change at every depth, its exponent, and He's explosion."""
    claims, depth = [], ds["depth"].values
    dof = ds.sizes["network"] - 1
    x = np.log(depth) - np.log(depth).mean()
    for m in ds["m"].values:
        logs = ds["Fixup"].sel(m=m).values
        mean, error = mean_error(np.exp(logs), axis=1)
        claims.append(
            joint(
                f"Fixup, m = {m}: change at every depth, in units of |v|^2 |h|^2 / 2",
                mean,
                1.0,
                error,
                SOURCE,
                dof=dof,
            )
        )
        slope, error = mean_error(x @ logs / (x @ x))
        statement = f"Fixup, m = {m}: exponent of depth of the change"
        claims.append(
            close(statement, slope, 0.0, SOURCE, absolute=0.05, error=error, asymptotic=True)
        )
        doubled = ds["He"].sel(m=m).values - np.log(depth)[:, None]
        slope, error = mean_error(np.polyfit(depth, doubled, 1)[0])
        statement = f"He, m = {m}: log (change / L) per block"
        claims.append(
            close(statement, slope, np.log(2), SOURCE, relative=0.08, error=error, asymptotic=True)
        )
    return tuple(claims)


def plot(ds: xr.Dataset) -> Figure:
    """The change of the output per learning rate over depth."""
    figure, axes = panels(1, ds.sizes["m"])
    depth = ds["depth"].values
    for ax, m in zip(axes[0], ds["m"].values, strict=True):
        for kind, colour in zip(KINDS, COLOURS, strict=False):
            mean, error = mean_error(ds[kind].sel(m=m).values / np.log(10), axis=1)
            ax.plot(depth, expected(kind, int(m), depth) / np.log(10), color=colour, lw=1.2)
            points(ax, depth, mean, error, color=colour, label=kind)
        ax.plot(
            depth,
            np.log10(depth),
            "--",
            color=COLOURS[0],
            lw=1,
            label="Fixup without its scale, theory",
        )
        ax.set(
            xscale="log",
            xlabel="number of blocks $L$",
            title=f"branches of {m} matrices",
            ylim=(-1, 24),
        )
        ax.set_xticks(depth, [f"{d:g}" for d in depth])
        ax.minorticks_off()
    axes[0, 0].set_ylabel(r"$\log_{10}$ change of $f$ by the first step / $\eta$")
    axes[0, 0].legend(frameon=False, fontsize=8)
    return figure
