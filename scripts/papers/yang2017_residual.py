"""Yang & Schoenholz 2017: gradients of residual networks grow as exp(sqrt(depth)).

Mean field residual networks, arXiv 1712.08969, figures 2 and 3: h' = h + V phi(W h + b) + a with
Gaussian weights. The length of a tanh network grows as its depth, p ~ (sigma_v^2 + sigma_a^2) l,
and therefore

    tanh:  log chi_0 / chi_L ~ A sqrt(L)
           A = (4/3) sqrt(2/pi) sigma_v^2 sigma_w / sqrt(sigma_v^2 + sigma_a^2)
    ReLU:  chi_l / chi_{l+1} = 1 + sigma_v^2 sigma_w^2 / 2

Both constants are derived again: with q = sigma_w^2 p large, E tanh'(sqrt(q) z)^2 = (4/3) / sqrt(2
pi q), and the sum over layers of sigma_v^2 sigma_w^2 times that is A sqrt(L) to leading order; a
ReLU's slope is 1 half of the time. The measured ratios of means are compared with the exact
recursion `meanfield.residual` layer by layer, which has no asymptotics in it, and A with the slope
of a straight line. Not covered: the angle between two inputs, other activations, training.
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
from papers.common import COLOURS, THEORY, Claim, close, joint, mean_error, panels, points, without

SOURCE = "formula 9, arXiv 1712.08969"
SETTINGS = {
    "tanh": dict(sigma_w=1.5, sigma_b=0.1, sigma_v=1.2, sigma_a=0.3),
    "relu": dict(
        sigma_w=1.0, sigma_b=0.0, sigma_v=0.4, sigma_a=0.0
    ),  # small: 1.08^500 is still a float32
}


@dataclass(frozen=True)
class Config:
    seed: int = 0
    width: int = 100
    depth: int = 500
    networks: int = 10
    batch: int = 16  # inputs of each network, each with a cotangent of its own
    activation: str = "tanh"  # of the panels whose theory is tanh's
    gain: float = 1.0  # multiplies sigma_w of what is simulated, not of the theory


SMALL = dict(width=64, depth=150, networks=10)
CONTROLS = {
    "sigma_w 10% larger": dict(gain=1.1),
    "ReLU for tanh": dict(activation="relu"),
}
FIRST = 0.2  # the straight lines are fitted from this fraction of the depth on


@functools.partial(jax.jit, static_argnames="config")
def network(key: jax.Array, sigma: dict[str, jax.Array], rectify: jax.Array, *, config: Config):
    """Logs of the mean square activation and cotangent of a network's batch, (depth + 1,) each."""
    n, keys = config.width, jax.random.split(key, 6)
    shapes = dict(w=(n, n), v=(n, n), b=(1, n), a=(1, n))
    weights = {
        x: jax.random.normal(k, (config.depth, *shapes[x]))
        for x, k in zip("wvba", keys[:4], strict=True)
    }
    h, cotangents = (jax.random.normal(k, (config.batch, n)) for k in keys[4:])

    def step(h, layer):
        # theta is a layer's number, because the gradients of its weights are not needed.
        w, v, b, a = (sigma[x] * weights[x][layer] for x in "wvba")
        z = h @ w / n**0.5 + jnp.broadcast_to(b, h.shape)
        phi = jnp.where(rectify, jax.nn.relu(z), jnp.tanh(z))  # both kinds in one compiled program
        return h + phi @ v / n**0.5 + jnp.broadcast_to(a, h.shape)

    h = h / jnp.sqrt(jnp.mean(h**2, axis=1, keepdims=True))
    found = gradjax.signals(
        step, h, jnp.arange(config.depth), loss=lambda h: jnp.sum(cotangents * h)
    )
    return 2 * found.log_activation_rms, 2 * found.log_cotangent_rms


def run(config: Config) -> xr.Dataset:
    """Lengths and gradients of both kinds of network per layer, and those of the recursion."""
    ds = xr.Dataset(coords={"state": np.arange(config.depth + 1)})
    simulate = functools.partial(network, config=without(config, "gain", "activation"))
    for number, (name, setting) in enumerate(SETTINGS.items()):
        rectify = jnp.asarray("relu" in (name, config.activation))
        sigma = {x: jnp.float32(setting[f"sigma_{x}"]) for x in "wvba"}
        sigma["w"] = sigma["w"] * config.gain
        keys = jax.random.split(
            jax.random.fold_in(jax.random.key(config.seed), number), config.networks
        )
        found = [simulate(key, sigma, rectify) for key in keys]
        length, cotangent = np.asarray(found, float).swapaxes(0, 1)
        theory = meanfield.residual(
            config.depth, *(setting[f"sigma_{x}"] for x in "wbva"), activation=name
        )
        ds[f"{name}_log_length"] = ("network", "state"), length
        ds[f"{name}_log_cotangent"] = ("network", "state"), cotangent
        ds[f"{name}_theory_length"] = "state", np.asarray(theory.p, float)
        ds[f"{name}_theory_growth"] = (
            "state",
            np.append(0.0, np.cumsum(theory.log_growth, dtype=float)),
        )
    return ds


def growth(ds: xr.Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean over networks and standard error of log chi_0 / chi_l over l.

    chi is the mean over a network's batch.
    """
    logs = ds[f"{name}_log_cotangent"].values
    return mean_error(logs[:, :1] - logs)


def segments(ds: xr.Dataset, name: str, count: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Factor of the mean square gradient over each run of layers over theory's, and its error."""
    ends = np.linspace(0, ds.sizes["state"] - 1, count + 1).round().astype(int)
    logs = ds[f"{name}_log_cotangent"].values[:, ends]
    theory = np.diff(ds[f"{name}_theory_growth"].values[ends])
    return mean_error(np.exp(logs[:, :-1] - logs[:, 1:] - theory))


def fit(ds: xr.Dataset, name: str, power: float) -> tuple[float, float, float]:
    """Slope, its error and Akaike's criterion of a line through log chi_0 / chi_L over L^power."""
    x = ds["state"].values[int(FIRST * ds.sizes["state"]) :] ** power
    logs = ds[f"{name}_log_cotangent"].values
    y = (logs[:, :1] - logs)[:, -len(x) :]
    slopes, offsets = np.polyfit(x, y.T, 1)
    slope, error = mean_error(slopes)
    residual = y.mean(0) - slope * x - offsets.mean()
    return (
        float(slope),
        float(error),
        float(len(x) * np.log(np.mean(residual**2))),
    )  # both laws have two coefficients


def constant() -> float:
    """A of the leading order."""
    w, v, a = (SETTINGS["tanh"][f"sigma_{x}"] for x in "wva")
    return 4 / 3 * (2 / np.pi) ** 0.5 * v**2 * w / (v**2 + a**2) ** 0.5


def check(ds: xr.Dataset) -> tuple[Claim, ...]:
    """Both growth laws, the exact recursion, and Akaike's choice between sqrt(L) and L."""
    dof = ds.sizes["network"] - 1
    slope, slope_error, root = fit(ds, "tanh", 0.5)
    rate, rate_error, _ = fit(ds, "relu", 1.0)
    preferred = fit(ds, "tanh", 1.0)[2] - root
    length, length_error = mean_error(np.exp(ds["tanh_log_length"].values[:, -1]))
    expected = np.log1p(0.5 * (SETTINGS["relu"]["sigma_v"] * SETTINGS["relu"]["sigma_w"]) ** 2)
    exact = "the recursion of " + SOURCE
    statement = "tanh: slope of log chi_0/chi_L over sqrt(L)"
    claims = [
        close(
            statement, slope, constant(), SOURCE, relative=0.05, error=slope_error, asymptotic=True
        )
    ]
    statement = "tanh: Akaike's criterion of a law in L, less that of sqrt(L)"
    passed = bool(preferred >= 10)
    claims.append(Claim(statement, preferred, 0.0, 10.0, "at least 10", SOURCE, passed))
    for name in SETTINGS:
        mean, error = segments(ds, name)
        statement = f"{name}: gradient growth over ten runs of layers"
        claims.append(joint(statement, mean, 1.0, error, exact, dof=dof))
    statement, theory = "tanh: length p at the last layer", ds["tanh_theory_length"][-1]
    claims.append(close(statement, length, theory, exact, error=length_error, dof=dof))
    statement = "ReLU: slope of log chi_0/chi_L over L"
    claims.append(
        close(statement, rate, expected, SOURCE, relative=0.05, error=rate_error, dof=dof)
    )
    return tuple(claims)


def plot(ds: xr.Dataset) -> Figure:
    """Lengths over depth; the gradients over sqrt(depth) and depth."""
    figure, ((lengths, tanh, relu),) = panels(1, 3)
    depth = ds["state"].values.astype(float)
    some = np.unique(np.linspace(1, depth[-1], 15).round().astype(int))
    mean, error = mean_error(np.exp(ds["tanh_log_length"].values))
    lengths.plot(depth, ds["tanh_theory_length"], color=THEORY, label="mean field recursion")
    points(lengths, depth[some], mean[some], error[some], label="simulation")
    lengths.set(title="tanh: length", xlabel="layer $l$", ylabel="$p^{(l)}$")
    for ax, name, x in ((tanh, "tanh", np.sqrt(depth)), (relu, "relu", depth)):
        grown, error = growth(ds, name)
        ax.plot(x, ds[f"{name}_theory_growth"], color=THEORY, label="mean field recursion")
        points(ax, x[some], grown[some], error[some], label="simulation")
        ax.set(ylabel=r"$\log\, \chi_0 / \chi_l$")
    tanh.plot(
        np.sqrt(depth),
        constant() * np.sqrt(depth),
        "--",
        color=COLOURS[2],
        lw=1.2,
        label=r"$A\sqrt{l}$",
    )
    tanh.set(title=r"tanh: gradients grow as $e^{A\sqrt{l}}$", xlabel=r"$\sqrt{l}$")
    relu.set(title="ReLU: gradients grow exponentially", xlabel="layer $l$")
    for ax in (lengths, tanh, relu):
        ax.legend(frameon=False)
    return figure
