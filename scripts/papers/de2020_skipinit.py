"""De & Smith 2020 (SkipInit), Bachlechner 2020 (ReZero): residual streams, and a Jacobian of 1.

Batch normalization biases residual blocks towards the identity, arXiv 2002.10444, section 3 and
figure 2; ReZero is all you need, arXiv 2003.04887, figure of the Jacobian's singular values. Blocks
h' = h + alpha W_2 relu(N(W_1 h)), N BatchNorm or nothing, Var W = 2/fan_in but for W_1, which sees
no ReLU (1/fan_in). Derived and verified here, exact in the mean over weights at every width:

    BatchNorm, alpha = 1        E h_l^2 = 1 + l          W_2 adds 2 E relu(z)^2 = 1: branches count
                                                         as 1 / (l + 1)
    none, alpha = 1             E h_l^2 = 2^l            so is the mean squared singular value of J
    none, alpha = 1/sqrt(L)     E h_l^2 = (1 + 1/L)^l    so is the mean squared singular value of J
    alpha = 0                   h_l = h_0,  J = 1        to the last bit

Spectra are drawn as in ReZero's figure. Not covered: training, convolutions.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

import gradjax
from papers.common import COLOURS, Claim, close, joint, mean_error, panels, points

SOURCE = "section 3, arXiv 2002.10444, derived"
KINDS = ("BatchNorm", "no normalisation", "alpha = L^(-1/2)", "alpha = 0")
SPECTRA = KINDS[1:]
LABELS = {"alpha = L^(-1/2)": r"$\alpha = L^{-1/2}$", "alpha = 0": r"$\alpha = 0$"}


@dataclass(frozen=True)
class Config:
    seed: int = 0
    width: int = 128
    depth: int = 24
    batch: int = 32
    networks: int = 32
    spectrum_width: int = 64
    spectra: int = 8  # networks of each kind
    zero: float = 0.0  # what alpha = 0 is
    gain: float = 1.0  # multiplies He's standard deviation


SMALL = dict(width=64, depth=12, batch=32, networks=32, spectrum_width=32, spectra=8)
CONTROLS = {"alpha = 0.01 for 0": dict(zero=0.01), "He's gain 5% off": dict(gain=1.05)}


def weights(key: jax.Array, config: Config, width: int) -> jax.Array:
    """(depth, 2, width, width) of every block's W_1 and W_2."""
    he = jnp.array([1.0, 2**0.5])[None, :, None, None] * config.gain / width**0.5
    return he * jax.random.normal(key, (config.depth, 2, width, width))


def alphas(config: Config) -> dict[str, float]:
    return dict(zip(KINDS, (1.0, 1.0, config.depth**-0.5, config.zero), strict=True))


def lengths(
    key: jax.Array, normalised: jax.Array, alpha: jax.Array, *, config: Config
) -> jax.Array:
    """(depth + 1,) mean square of the stream over a batch."""
    of_w, of_h = jax.random.split(key)
    w = weights(of_w, config, config.width)
    h = jax.random.normal(of_h, (config.batch, config.width))

    def block(h, layer):
        z = h @ w[layer, 0]
        mean, deviation = jnp.mean(z, axis=0, keepdims=True), jnp.std(z, axis=0, keepdims=True)
        z = jnp.where(normalised, (z - mean) / deviation, z)
        return h + alpha * (jax.nn.relu(z) @ w[layer, 1])

    h = h / jnp.sqrt(jnp.mean(h**2))
    found = gradjax.signals(block, h, jnp.arange(config.depth), loss=jnp.sum)
    return jnp.exp(2 * found.log_activation_rms)


def spectra(key: jax.Array, config: Config) -> np.ndarray:
    """Log singular values of the Jacobian of h' = h + alpha W_2 relu(W_1 h).

    (kinds, networks, width).
    """
    of_w, of_h = jax.random.split(key)
    shape = (len(SPECTRA), config.spectra)
    alpha = np.array([alphas(config)[kind] for kind in SPECTRA], np.float32)
    draw = jax.vmap(lambda key: weights(key, config, config.spectrum_width))

    def lanes(x):
        return np.broadcast_to(x[:, None, None], (*shape, config.depth)).reshape(-1, config.depth)

    thetas = {
        "w": draw(jax.random.split(of_w, shape[0] * shape[1])),
        "alpha": lanes(alpha),
    }

    def block(h, theta):
        return h + theta["alpha"] * (theta["w"][1] @ jax.nn.relu(theta["w"][0] @ h))

    h = jax.random.normal(of_h, (config.spectrum_width,))
    jacobians = jax.jit(
        lambda thetas: jax.lax.map(lambda theta: gradjax.layer_jacobians(block, h, theta), thetas)
    )
    products = [np.linalg.multi_dot(list(x)[::-1]) for x in np.asarray(jacobians(thetas), float)]
    return np.log(np.linalg.svd(np.array(products), compute_uv=False)).reshape(*shape, -1)


def run(config: Config) -> xr.Dataset:
    """The stream's mean square per kind, network and layer; log singular values per kind."""
    of_lengths, of_spectra = jax.random.split(jax.random.key(config.seed))
    one = functools.partial(lengths, config=config)
    simulate = jax.jit(lambda keys, *numbers: jax.lax.map(lambda key: one(key, *numbers), keys))
    found = []
    for i, (kind, alpha) in enumerate(alphas(config).items()):
        keys = jax.random.split(jax.random.fold_in(of_lengths, i), config.networks)
        found.append(simulate(keys, jnp.asarray(kind == "BatchNorm"), jnp.float32(alpha)))
    return xr.Dataset(
        {
            "length": (("kind", "network", "state"), np.array(found, float)),
            "log_sigma": (("spectrum", "sample", "index"), spectra(of_spectra, config)),
        },
        coords={"kind": list(KINDS), "spectrum": list(SPECTRA)},
    )


def expected(kind: str, depth: int) -> np.ndarray:
    """(depth + 1,) the mean square of the stream."""
    l = np.arange(depth + 1)
    laws = (1.0 + l, 2.0**l, (1 + 1 / depth) ** l, 1.0 + 0 * l)
    return laws[KINDS.index(kind)]


def check(ds: xr.Dataset) -> tuple[Claim, ...]:
    """What every block adds, and the Jacobians."""
    depth, dof, claims = ds.sizes["state"] - 1, ds.sizes["network"] - 1, []
    for kind in KINDS[:3]:
        length = ds["length"].sel(kind=kind).values
        law = expected(kind, depth)
        if kind == "BatchNorm":  # what a block adds does not depend on what is there
            mean, error = mean_error(np.diff(length))
        else:
            mean, error = mean_error(length[:, 1:] / length[:, :-1] / (law[1:] / law[:-1]))
        claims.append(
            joint(f"{kind}: what each block does to E h^2", mean, 1.0, error, SOURCE, dof=dof)
        )
        if kind == "BatchNorm":
            found, theory, what = mean.mean(), 1.0, "growth of E h^2 per block"
        else:
            found, theory = (np.log(x[-1] / x[0]) / depth for x in (length.mean(0), law))
            what = "log growth of E h^2 per block"
        claims.append(close(f"{kind}: {what}", found, theory, SOURCE, relative=0.05))
    off = abs(ds["length"].sel(kind="alpha = 0") - 1).max()
    claims.append(close("alpha = 0: largest change of E h^2", off, 0, SOURCE, absolute=2e-6))
    sigma = ds["log_sigma"].values
    claims.append(
        close(
            "alpha = 0: largest |log sigma(J)|",
            abs(sigma[-1]).max(),
            0,
            "arXiv 2003.04887",
            absolute=1e-12,
        )
    )
    mean, error = mean_error(np.exp(2 * sigma[1]).mean(1))
    theory = expected(SPECTRA[1], depth)[-1]
    statement, dof = "alpha = L^(-1/2): mean squared singular value of J", sigma.shape[1] - 1
    claims.append(close(statement, mean, theory, SOURCE, error=error, dof=dof))
    return tuple(claims)


def plot(ds: xr.Dataset) -> Figure:
    """The stream over layers (figure 2 of De & Smith); spectra (ReZero)."""
    figure, ((stream, hist),) = panels(1, 2)
    state = np.arange(ds.sizes["state"])
    for kind, colour in zip(KINDS, COLOURS, strict=False):
        mean, error = mean_error(ds["length"].sel(kind=kind).values)
        stream.plot(state, expected(kind, state[-1]), color=colour, lw=1.2)
        points(stream, state, mean, error, color=colour, label=LABELS.get(kind, kind))
    stream.set(
        yscale="log",
        xlabel="block $l$",
        ylabel=r"$E\, h_l^2$",
        title="the residual stream: lines are theory",
    )
    stream.legend(frameon=False, fontsize=8)
    log10 = ds["log_sigma"].values / np.log(10)
    edges = np.linspace(-8, 5, 79)
    for kind, values, colour in zip(SPECTRA, log10, COLOURS[1:4], strict=True):
        fraction = np.histogram(np.clip(values, -8, 5), edges)[0] / values.size
        hist.stairs(
            fraction, edges, fill=True, alpha=0.6, color=colour, label=LABELS.get(kind, kind)
        )
    hist.set(
        xlabel=r"$\log_{10}$ singular value of $dh_L/dh_0$",
        ylabel="fraction",
        yscale="log",
        title="the Jacobian",
    )
    hist.legend(frameon=False, fontsize=8, loc="upper left")
    return figure
