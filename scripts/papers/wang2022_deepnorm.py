"""Wang 2022 (DeepNorm): the first step moves post-LN transformers more with depth, not DeepNorm's.

DeepNet, arXiv 2203.00555, sections 3 and 4 and its figure of model updates: x' = LN(alpha x + F(x))
with alpha = (2N)^(1/4), and the feed-forward, value and output matrices times beta = (8N)^(-1/4),
for one stack of N layers. Then the update of the network by a step of gradient descent is bounded
whatever N; with alpha = beta = 1 it grows.

To first order a step of size eta on a function f = c . x_N of the last state changes it by -eta
sum_l ||df/dtheta_l||^2, c Gaussian: this sum is drawn. DeepNorm's matrices have squared gradients ~
beta^2 / alpha^2 = 1/(4N) each, of which there are O(N): the exponent of N is 0. The paper says that
post-LN's grows, and that is the claim: N layers with gradients alike would give the exponent 1, and
those of networks of this width differ by decades and rise towards the input. alpha and beta are
read in secondary text; without either the exponent is 0.5 or more. The paper's figure is of
training runs with Adam, which are not covered; nor are encoder-decoders.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

import gradjax
from papers.common import COLOURS, Claim, apart, close, mean_error, panels, points, without

SOURCE = "formula 13, arXiv 2203.00555"
KINDS = ("DeepNorm", "post-LN")
NAMES = ("query", "key", "value", "output", "first", "second")


@dataclass(frozen=True)
class Config:
    seed: int = 0
    width: int = 48
    seq_len: int = 8
    depths: tuple[int, ...] = (8, 32, 128)
    # Of post-LN, whose gradients differ by decades between networks; of DeepNorm an eighth.
    networks: int = 64
    alpha: float = 0.25  # DeepNorm's exponents of 2N and 8N
    beta: float = -0.25


SMALL = dict(width=24, seq_len=8, depths=(8, 24, 72), networks=64)
CONTROLS = {
    "alpha without its exponent": dict(alpha=0.0),
    "beta without its exponent": dict(beta=0.0),
}


def normalize(x: jax.Array) -> jax.Array:
    """LayerNorm over the last axis with its initial scale and shift."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-6)


@functools.partial(jax.jit, static_argnames="config")
def network(key: jax.Array, depth: jax.Array, alpha: jax.Array, beta: jax.Array, *, config: Config):
    """(deepest,) squared gradient of f per layer, 0 where there is none, of one sequence.

    One compiled program for all kinds and depths: of the deepest stack only the last `depth` layers
    are there.
    """
    (of_x, of_w, of_c), n, deepest = jax.random.split(key, 3), config.width, max(config.depths)
    draws = jax.random.normal(of_w, (len(NAMES), deepest, n, n)) / n**0.5
    w = {
        name: x * jnp.where(name in ("query", "key"), 1.0, beta)
        for name, x in zip(NAMES, draws, strict=True)
    }

    def layer(x, theta):
        w, before = theta["w"], x
        scores = jax.nn.softmax((x @ w["query"]) @ (x @ w["key"]).T / n**0.5, axis=-1)
        x = normalize(alpha * x + scores @ (x @ w["value"]) @ w["output"])
        x = normalize(alpha * x + jax.nn.relu(x @ w["first"]) @ w["second"])
        return jnp.where(theta["index"] >= deepest - depth, x, before)

    x, c = (jax.random.normal(k, (config.seq_len, n)) for k in (of_x, of_c))

    def loss(x):
        return jnp.sum(c * x) / (config.seq_len * n) ** 0.5

    found = gradjax.signals(layer, x, {"w": w, "index": jnp.arange(deepest)}, loss=loss)
    return jnp.exp(2 * found.log_gradient_norm)


def run(config: Config) -> xr.Dataset:
    """Squared gradients per kind, depth, network and layer."""
    counts = {"DeepNorm": config.networks // 8, "post-LN": config.networks}
    simulate = functools.partial(network, config=without(config, "alpha", "beta"))
    ds = xr.Dataset(coords={"depth": list(config.depths)})
    for kind, count in counts.items():
        keys = jax.random.split(jax.random.key(config.seed), count)
        settings = [
            (n, (2 * n) ** config.alpha, (8 * n) ** config.beta)
            if kind == "DeepNorm"
            else (n, 1.0, 1.0)
            for n in config.depths
        ]
        found = [
            [simulate(key, *map(jnp.float32, setting)) for key in keys] for setting in settings
        ]
        ds[kind] = ("depth", f"{kind}_network", "layer"), np.array(found, float)
    return ds


def change(ds: xr.Dataset, kind: str) -> np.ndarray:
    """(depths, networks) log of the sum over layers: the first step's change of f over eta."""
    return np.log(np.sum(ds[kind].values, axis=-1))


def check(ds: xr.Dataset) -> tuple[Claim, ...]:
    """The exponents of depth."""
    claims, x = [], np.log(ds["depth"].values)
    x = x - x.mean()
    for kind in KINDS:
        slope, error = mean_error(x @ change(ds, kind) / (x @ x))
        statement = f"{kind}: exponent of depth of the first step's change"
        if kind == "DeepNorm":
            claims.append(
                close(statement, slope, 0.0, SOURCE, absolute=0.1, error=error, asymptotic=True)
            )
        else:
            dof = ds.sizes["post-LN_network"] - 1
            claims.append(
                apart(f"{statement} is above 0", max(slope, 0.0), 0.0, SOURCE, error=error, dof=dof)
            )
    return tuple(claims)


def plot(ds: xr.Dataset) -> Figure:
    """The change over depth; the gradients over layers of the deepest networks."""
    figure, ((over, layers),) = panels(1, 2)
    depth = ds["depth"].values
    for kind, colour in zip(KINDS, COLOURS, strict=False):
        logs = change(ds, kind)
        mean, error = mean_error(logs, axis=1)
        spread = np.exp(mean) * np.abs(
            np.expm1([-error, error])
        )  # of geometric means, as the claims have it
        if kind == "DeepNorm":
            over.axhline(np.exp(np.mean(mean)), color=colour, lw=1)
        label = "DeepNorm, line: $N^0$" if kind == "DeepNorm" else kind
        points(over, depth, np.exp(mean), spread, color=colour, label=label)
        mean, error = mean_error(ds[kind].values[-1])
        layers.errorbar(
            np.arange(1, len(mean) + 1),
            mean,
            error,
            color=colour,
            lw=1,
            errorevery=8,
            capsize=1.5,
            label=kind,
        )
    over.set(
        xscale="log",
        yscale="log",
        xlabel="number of layers $N$",
        ylabel=r"change of $f$ by the first step / $\eta$",
    )
    over.set_xticks(depth, [str(d) for d in depth])
    over.minorticks_off()
    layers.set(yscale="log", xlabel="layer", title=f"{depth[-1]} layers")
    layers.set_ylabel(r"$\Vert \partial f / \partial \theta_l \Vert^2$")
    over.set_title("DeepNorm's first step is bounded")
    for ax in (over, layers):
        ax.legend(frameon=False, fontsize=8)
    return figure
