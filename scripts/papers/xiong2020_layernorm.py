"""Xiong 2020: gradients of the last layers of transformers, LayerNorm after or before sublayers.

On layer normalization in the transformer architecture, arXiv 2002.04745, figure 3 and theorem 1.
Post-LN, x' = LN(x + F(x)), keeps the gradient of the last feed-forward matrix W2 at order one in
the depth L; pre-LN, x' = x + F(LN(x)) with one LN before the loss, lets it fall as L^(-1/2), since
the stream's mean square grows as L and the last LN divides by its root. That is why post-LN needs a
warm-up.

Verified: both exponents within the tolerance of a fit over L = 4 to 48, and the reason for
pre-LN's, the growth of the stream. Over six seeds the fits gave +0.043 +- 0.008 and -0.499 +-
0.013: tokens grow alike with depth, and the sum over tokens in the gradient with them. Weights are
Xavier normal as in the paper, one head, the loss a cross entropy of random labels; the paper's
theorem has zero query and key matrices, here they are drawn. Not covered: the warm-up, training.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

import gradjax
from papers.common import COLOURS, Claim, close, mean_error, panels, points, without

SOURCE = "theorem 1, arXiv 2002.04745"
KINDS = {"post-LN": 0.0, "pre-LN": -0.5}  # and the exponent of depth


@dataclass(frozen=True)
class Config:
    seed: int = 0
    width: int = 64
    seq_len: int = 16
    num_outputs: int = 32
    depths: tuple[int, ...] = (4, 16, 48)
    networks: int = 24
    swapped: bool = False  # the two kinds, one for the other


SMALL = dict(width=32, seq_len=8, depths=(4, 16, 48), networks=24)
CONTROLS = {"the two kinds swapped": dict(swapped=True)}


def normalize(x: jax.Array) -> jax.Array:
    """LayerNorm over the last axis with its initial scale and shift."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-6)


def network(
    key: jax.Array, post: jax.Array, depth: jax.Array, *, config: Config
) -> tuple[jax.Array, jax.Array]:
    """Log norm of the gradient of W2 per layer, and log rms of the last stream (), of one sequence.

    One compiled program for both kinds and all depths: of the deepest stack only the last `depth`
    layers are there.
    """
    of_x, of_layers, of_w2, of_out, of_labels = jax.random.split(key, 5)
    n, deepest = config.width, max(config.depths)

    def xavier(key, *shape):
        return jax.random.normal(key, shape) * (2 / sum(shape[-2:])) ** 0.5

    def attention(x, key):
        q, k, v, out = (xavier(key, n, n) for key in jax.random.split(key, 4))
        scores = jax.nn.softmax((x @ q) @ (x @ k).T / n**0.5, axis=-1)
        return scores @ (x @ v) @ out

    def layer(x, theta):
        # Only the gradients of W2 are needed: the other matrices come from the key.
        first, second = jax.random.split(theta["key"])

        def feed_forward(x):
            return jax.nn.relu(x @ xavier(second, n, n)) @ theta["w2"]

        before = x
        for sublayer in (lambda x: attention(x, first), feed_forward):
            x = x + sublayer(jnp.where(post, x, normalize(x)))
            x = jnp.where(post, normalize(x), x)
        return jnp.where(theta["index"] >= deepest - depth, x, before)

    def loss(x):
        logits = jnp.where(post, x, normalize(x)) @ xavier(of_out, n, config.num_outputs)
        labels = jax.random.randint(of_labels, (config.seq_len,), 0, config.num_outputs)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))

    thetas = {
        "key": jax.random.split(of_layers, deepest),
        "index": jnp.arange(deepest),
        "w2": xavier(of_w2, deepest, n, n),
    }
    found = gradjax.signals(layer, jax.random.normal(of_x, (config.seq_len, n)), thetas, loss=loss)
    return found.log_gradient_norm, found.log_activation_rms[-1]


@functools.partial(jax.jit, static_argnames="config")
def networks(keys, post, depth, *, config: Config):
    """`network` for each key."""
    return jax.lax.map(lambda key: network(key, post, depth, config=config), keys)


def run(config: Config) -> xr.Dataset:
    """Gradient norms per network and layer, and the stream's rms, of both kinds and every depth."""
    keys = jax.random.split(jax.random.key(config.seed), config.networks)
    simulate = functools.partial(networks, keys, config=without(config, "swapped"))
    ds = xr.Dataset(coords={"depth": list(config.depths)})
    for name in KINDS:
        post = jnp.asarray((name == "post-LN") != config.swapped)
        found = [simulate(post, jnp.asarray(depth)) for depth in config.depths]
        gradients, rms = (np.array(x, float) for x in zip(*found, strict=True))
        ds[f"{name}_log_gradient"] = ("depth", "network", "layer"), gradients
        ds[f"{name}_log_rms"] = ("depth", "network"), rms
    return ds


def last(ds: xr.Dataset, name: str) -> np.ndarray:
    """(depths, networks) log norm of the last layer's gradient of W2."""
    return ds[f"{name}_log_gradient"].values[:, :, -1]


def exponent(ds: xr.Dataset, logs: np.ndarray) -> tuple[float, float]:
    """Slope of a log (depths, networks) over log depth, and its standard error."""
    x = np.log(ds["depth"].values)
    weights = (x - x.mean()) / np.sum((x - x.mean()) ** 2)
    mean, error = mean_error(logs, axis=1)
    return float(weights @ mean), float(np.sqrt(weights**2 @ error**2))


def check(ds: xr.Dataset) -> tuple[Claim, ...]:
    """The exponents of depth, and why pre-LN has its own."""
    claims = []
    for name, expected in KINDS.items():
        found, error = exponent(ds, last(ds, name))
        statement = f"{name}: exponent of depth of the last W2's gradient norm"
        claims.append(
            close(statement, found, expected, SOURCE, absolute=0.12, error=error, asymptotic=True)
        )
    found, error = exponent(ds, ds["pre-LN_log_rms"].values)
    statement = "pre-LN: exponent of the stream's rms"
    claims.append(close(statement, found, 0.5, SOURCE, absolute=0.12, error=error, asymptotic=True))
    return tuple(claims)


def plot(ds: xr.Dataset) -> Figure:
    """Gradients over layers at one depth, and of the last layer over depth, as in figure 3."""
    figure, ((layers, over),) = panels(1, 2)
    depth = ds["depth"].values
    middle = int(depth[len(depth) // 2])
    for (name, power), colour in zip(KINDS.items(), COLOURS, strict=False):
        mean, error = mean_error(
            np.exp(ds[f"{name}_log_gradient"].sel(depth=middle).values[:, -middle:])
        )
        points(layers, np.arange(1, middle + 1), mean, error, color=colour, fmt="o-", label=name)
        mean, error = mean_error(np.exp(last(ds, name)), axis=1)
        points(over, depth, mean, error, color=colour, label=name)
        fitted = np.exp(np.mean(np.log(mean / depth**power)))
        over.plot(
            depth, fitted * depth**power, "--", color=colour, lw=1, label=f"$L^{{{power:g}}}$"
        )
    layers.set(
        xlabel="layer",
        ylabel=r"$\Vert \partial \mathcal{L} / \partial W_2 \Vert$",
        title=f"{middle} layers",
        ylim=0,
    )
    over.set(xscale="log", yscale="log", xlabel="number of layers $L$", title="the last layer")
    over.set_xticks(depth, [str(d) for d in depth])
    over.set_yticks([0.25, 0.5, 1, 2], ["0.25", "0.5", "1", "2"])
    layers.xaxis.get_major_locator().set_params(integer=True)
    over.minorticks_off()
    for ax in (layers, over):
        ax.legend(frameon=False, fontsize=8)
    return figure
