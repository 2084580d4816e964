"""Chen 2018, Gilboa 2019: what gates do to the Jacobian of one step of a recurrent network.

Dynamical isometry and a mean field theory of RNNs, arXiv 1806.05394 (minimalRNN), and of LSTMs and
GRUs, arXiv 1901.08987. For weights drawn anew at every step (untied) and inputs of variance V at
every pre-activation, the mean squared singular value per step, tr J J^T / N, of

    vanilla       h' = tanh(W h + x)
                  chi = sigma_w^2 E tanh'^2 = meanfield.chi_1 with sigma_b^2 = V
    minimalRNN    h' = u h + (1 - u) tanh(x)
                  chi = E u^2 + sigma_w^2 E u'^2 (E h^2 + E tanh(x)^2)
    GRU, LSTM     chi of meanfield.gated

The gate that keeps the state has a bias; it moves the value towards 1, where gradients neither
vanish nor explode (the LSTM's to less, since its state is (c, h) and h has no memory of its own).
The formulas were derived for this package and are verified here at width 500 from the Jacobian of
the last step of a run; the LSTM's formula is itself accurate to 1%. Real networks have tied
weights: their deviation is drawn as crosses and reported, with no claim. Not covered: the width of
the spectrum and the depth scales of the papers' phase diagrams, training.
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
from papers.common import COLOURS, GREY, Claim, close, joint, mean_error, panels, points

SOURCE = "formula 12, arXiv 1806.05394 and 1901.08987"
# cell -> its number of recurrent matrices
CELLS = {"vanilla": 1, "minimal_rnn": 1, "gru": 3, "lstm": 4}
NAMES = {"vanilla": "vanilla", "minimal_rnn": "minimalRNN", "gru": "GRU", "lstm": "LSTM"}
EXACT = ("vanilla", "minimal_rnn", "gru")  # the LSTM's theory is a quadrature on three points


@dataclass(frozen=True)
class Config:
    seed: int = 0
    width: int = 500
    steps: int = 4  # from a state of the stationary length
    networks: int = 6  # with untied weights; 2 with tied ones
    lstm_steps: int = 18  # its cell starts elsewhere
    lstm_networks: int = 2
    settings: tuple[tuple[float, float], ...] = (
        (1.5, 0.0),
        (1.5, 1.0),
        (1.5, 2.0),
        (0.75, 1.0),
        (3.0, 1.0),
    )
    input_variance: float = 0.5
    gain: float = 1.0  # multiplies sigma_w of what is simulated


SMALL = dict(width=200, networks=8, lstm_networks=4, settings=((1.5, 0.0), (1.5, 2.0), (3.0, 1.0)))
CONTROLS = {"sigma_w 10% larger": dict(gain=1.1)}


def step(h, theta, *, cell: str, bias: jax.Array):
    """One time step; theta["w"] (matrices, N, N), theta["x"] (4, N)."""
    w, x, sigmoid = theta["w"], theta["x"], jax.nn.sigmoid
    if cell == "vanilla":
        return jnp.tanh(w[0] @ h + x[0])
    if cell == "minimal_rnn":
        u = sigmoid(w[0] @ h + x[0] + bias)
        return u * h + (1 - u) * jnp.tanh(x[1])
    if cell == "gru":
        r, z = sigmoid(w[0] @ h + x[0]), sigmoid(w[1] @ h + x[1] + bias)
        return z * h + (1 - z) * jnp.tanh(x[2] + r * (w[2] @ h))
    c, h = h
    f, i, o = sigmoid(w[0] @ h + x[0] + bias), sigmoid(w[1] @ h + x[1]), sigmoid(w[2] @ h + x[2])
    c = f * c + i * jnp.tanh(w[3] @ h + x[3])
    return c, o * jnp.tanh(c)


@functools.partial(jax.jit, static_argnames=("cell", "n", "last", "variance"))
def network(key, tied, sigma_w, bias, q, *, cell: str, n: int, last: int, variance: float):
    """Mean squared singular value of the Jacobian of the last of `last` steps, ()."""
    of_h, of_w, of_x = jax.random.split(key, 3)
    one = functools.partial(step, cell=cell, bias=bias)

    def draw(t):
        w = jax.random.normal(jax.random.fold_in(of_w, jnp.where(tied, 0, t)), (CELLS[cell], n, n))
        x = jax.random.normal(jax.random.fold_in(of_x, t), (4, n))
        return {"w": w * sigma_w / n**0.5, "x": x * variance**0.5}

    h = q**0.5 * jax.random.normal(of_h, (n,))
    h = (h, h) if cell == "lstm" else h
    h, _ = jax.lax.scan(lambda h, t: (one(h, draw(t)), None), h, jnp.arange(last))
    jacobian = gradjax.layer_jacobians(one, h, jax.tree.map(lambda x: x[None], draw(last)))[0]
    return jnp.sum(jacobian**2) / len(jacobian)


def theory(
    cell: str, sigma_w: np.ndarray, bias: np.ndarray, variance: float
) -> tuple[np.ndarray, np.ndarray]:
    """(q*, chi) of the untied cell."""
    if cell == "vanilla":
        found = meanfield.phase_diagram(sigma_w, variance**0.5, correlations=False)
        q = (np.asarray(found.q_star, float) - variance) / sigma_w**2
        return q, np.asarray(found.chi_1, float)
    found = meanfield.gated(cell, sigma_w, variance, bias)
    return np.asarray(found.q_star, float), np.asarray(found.chi, float)


def run(config: Config) -> xr.Dataset:
    """Per cell the measured values, untied and tied, at every setting, and the theory.

    The theory is also given along both axes.
    """
    sigma_w, bias = np.array(config.settings).T
    middle = (sigma_w[0], bias[-1])
    fine_w, fine_b = np.geomspace(0.5, 4, 12), np.linspace(0, 8, 12)
    all_w = np.concatenate([sigma_w, fine_w, np.full(12, middle[0])])
    all_b = np.concatenate([bias, np.full(12, middle[1]), fine_b])
    ds = xr.Dataset(coords={"sigma_w": ("setting", sigma_w), "bias": ("setting", bias)})
    ds = ds.assign_coords(fine_w=fine_w, fine_b=fine_b)
    for number, cell in enumerate(CELLS):
        q, chi = (
            np.split(x, [len(sigma_w), len(sigma_w) + 12])
            for x in theory(cell, all_w, all_b, config.input_variance)
        )
        ds[f"{cell}_theory"] = "setting", chi[0]
        ds[f"{cell}_by_w"], ds[f"{cell}_by_b"] = ("fine_w", chi[1]), ("fine_b", chi[2])
        count, last = config.networks, config.steps
        if cell == "lstm":
            count, last = config.lstm_networks, config.lstm_steps
        one = functools.partial(
            network, cell=cell, n=config.width, last=last, variance=config.input_variance
        )
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        keys = jax.random.split(key, len(sigma_w))
        for name, tied, several in ((cell, False, count), (f"{cell}_tied", True, 2)):
            found = [
                [
                    one(k, jnp.asarray(tied), *map(jnp.float32, setting))
                    for k in jax.random.split(key, several)
                ]
                for key, *setting in zip(keys, sigma_w * config.gain, bias, q[0], strict=True)
            ]
            ds[name] = ("setting", f"{name}_network"), np.array(found, float)
    return ds


def check(ds: xr.Dataset) -> tuple[Claim, ...]:
    """The untied values: on average over the settings to 3%, and jointly to their errors."""
    claims = []
    for cell in CELLS:
        mean, error = mean_error(ds[cell].values, axis=1)
        expected, dof = ds[f"{cell}_theory"].values, ds[cell].shape[1] - 1
        ratio = (mean / expected).mean()
        ratio_error = np.sqrt(np.sum((error / expected) ** 2)) / len(mean)
        cell_name = f"{NAMES[cell]}, untied"
        statement = (
            f"{cell_name}: mean squared singular value over theory's, mean of {len(mean)} settings"
        )
        claims.append(
            close(statement, ratio, 1, SOURCE, relative=0.03, error=ratio_error, asymptotic=True)
        )
        if cell in EXACT:
            statement = f"{cell_name}: every setting"
            claims.append(joint(statement, mean, expected, error, SOURCE, dof=dof))
    return tuple(claims)


def plot(ds: xr.Dataset) -> Figure:
    """The value over the bias of the gate and over sigma_w.

    Lines are theory, dots untied and crosses tied weights.
    """
    figure, ((over_b, over_w),) = panels(1, 2)
    w, b = ds["sigma_w"].values, ds["bias"].values
    for ax, x, which, fine in ((over_b, b, w == w[0], "fine_b"), (over_w, w, b == b[-1], "fine_w")):
        for cell, colour in zip(CELLS, COLOURS, strict=False):
            label = NAMES[cell] if ax is over_b else None
            ax.plot(ds[fine], ds[f"{cell}_by_{fine[-1]}"], color=colour, lw=1.2, label=label)
            for tied, mark in ((False, "o"), (True, "x")):
                mean, error = mean_error(ds[f"{cell}_tied" if tied else cell].values, axis=1)
                points(
                    ax,
                    x[which],
                    mean[which],
                    error[which],
                    fmt=mark,
                    color=colour,
                    ms=3.5 + 2 * tied,
                )
    for ax in (over_b, over_w):
        ax.axhline(1, color=GREY, lw=1, zorder=0)
    over_b.set(
        xlabel="bias of the gate that keeps the state",
        ylabel="mean squared singular value per step",
    )
    over_b.set_title(rf"$\sigma_w = {w[0]:g}$")
    over_w.set(
        xscale="log", xlabel=r"$\sigma_w$", title=f"bias {b[-1]:g}; dots untied, crosses tied"
    )
    over_w.set_xticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
    over_w.minorticks_off()
    over_b.legend(frameon=False, fontsize=8)
    return figure
