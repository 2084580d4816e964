"""Bengio 1994, Pascanu 2013: the gradient through time of a recurrent network, and the bound on it.

Learning long-term dependencies with gradient descent is difficult (IEEE Trans. Neural Networks 5,
1994); On the difficulty of training recurrent neural networks, arXiv 1211.5063, section 2.1. With
x' = tanh(W x + input), W the same at every step, ||dx_T/dx_0|| <= (max|phi'| ||W||)^T: gradients
vanish if ||W|| < 1 = 1/max|phi'|, and ||W|| > 1 is necessary for them to explode. It is not
sufficient: for Gaussian W of gain g, ||W|| = 2 g, whereas the measured norm grows at the rate 1/2
log chi_1 per step.

Derived: in discrete time the states of a wide network with tied Gaussian weights at two times are
as correlated as two inputs of an untied one, which inputs drawn anew at every step and chaos both
decorrelate, so that the rate of tied weights is that of mean field, `meanfield.chi_1` at the gain g
with the input's variance for that of the bias. Verified by simulation, for gains on both sides of
explosion, within 5%; near chi_1 = 1, where 5% is no test, it is drawn. The bound lies above the
norm by a factor that grows as exp([log 2 g - 1/2 log chi_1] T). Not covered: training, clipping.
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
from papers.common import COLOURS, GREY, LIMIT, THEORY, Claim, close, mean_error, panels, points

SOURCE = "section 2.1, arXiv 1211.5063"
RATE = "1/2 log chi_1, formula 6"


@dataclass(frozen=True)
class Config:
    seed: int = 0
    width: int = 800
    seq_len: int = 120
    settle: int = 15  # steps left out at either end
    networks: int = 8
    gains: tuple[float, ...] = (0.45, 0.7, 1.5, 3.0, 4.0, 6.0)
    input_std: float = 0.3
    narrow: int = 100  # width of the networks whose whole Jacobian is taken
    last: int = 60  # and their T
    shown: tuple[float, ...] = (0.45, 0.7, 3.0)  # their gains
    wrong: float = 1.0  # multiplies the gain of what is simulated


SMALL = dict(width=400, seq_len=100, gains=(0.45, 3.0, 6.0), networks=8, narrow=50, last=40)
CONTROLS = {"gain 10% larger": dict(wrong=1.1)}


def rate(key: jax.Array, gain: jax.Array, *, config: Config) -> jax.Array:
    """Growth per step, nats, of the gradient's norm on its way back through one network."""
    (of_w, of_u, of_h, of_g), n = jax.random.split(key, 4), config.width
    w = gain / n**0.5 * jax.random.normal(of_w, (n, n))
    inputs = config.input_std * jax.random.normal(of_u, (config.seq_len, n))
    h, cotangent = (jax.random.normal(k, (n,)) for k in (of_h, of_g))

    def step(h, u):
        return jnp.tanh(w @ h + u)

    logs = gradjax.signals(step, h, inputs, loss=lambda h: cotangent @ h).log_cotangent_rms
    return (logs[config.settle] - logs[-config.settle]) / (len(logs) - 2 * config.settle)


def norms(key: jax.Array, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """(log ||dx_T/dx_0|| (gains, last), log ||W|| (gains,)); one W, in units of each gain."""
    (of_w, of_u, of_h), n = jax.random.split(key, 3), config.narrow
    w = jax.random.normal(of_w, (n, n)) / n**0.5
    inputs = config.input_std * jax.random.normal(of_u, (config.last, n))
    h, gains = jax.random.normal(of_h, (n,)), np.array(config.shown, np.float32) * config.wrong
    jacobians = jax.jit(
        lambda g: gradjax.layer_jacobians(lambda h, u: jnp.tanh(g * (w @ h) + u), h, inputs)
    )
    found = np.zeros((len(gains), config.last))
    for i, gain in enumerate(gains):
        product = np.eye(n)
        for t, factor in enumerate(np.asarray(jacobians(gain), float)):
            product = factor @ product
            found[i, t] = np.log(np.linalg.norm(product, 2))
    return found, np.log(gains * np.linalg.norm(np.asarray(w, float), 2))


def run(config: Config) -> xr.Dataset:
    """Rates per gain and network; norms and the bound over T."""
    of_rate, of_norm = jax.random.split(jax.random.key(config.seed))
    one = functools.partial(rate, config=config)
    simulate = jax.jit(lambda keys, gain: jax.lax.map(lambda key: one(key, gain), keys))
    gains = np.array(config.gains)
    keys = jax.random.split(of_rate, (len(gains), config.networks))
    found = [
        simulate(row, jnp.float32(gain * config.wrong))
        for row, gain in zip(keys, gains, strict=True)
    ]
    norm, top = norms(of_norm, config)
    fine = np.geomspace(0.3, 8, 60)
    everywhere = np.concatenate([gains, config.shown, fine])
    theory = 0.5 * np.log(np.asarray(meanfield.chi_1(everywhere, config.input_std), float))
    of_gains, of_shown, of_fine = np.split(theory, np.cumsum([len(gains), len(config.shown)]))
    return xr.Dataset(
        {
            "rate": (("gain", "network"), np.array(found, float)),
            "theory": ("gain", of_gains),
            "curve": ("fine", of_fine),
            "log_norm": (("shown", "time"), norm),
            "log_top": ("shown", top),
            "shown_theory": ("shown", of_shown),
        },
        coords={
            "gain": gains,
            "fine": fine,
            "time": np.arange(1, config.last + 1),
            "shown": list(config.shown),
        },
    )


def check(ds: xr.Dataset) -> tuple[Claim, ...]:
    """The rates against mean field, the largest singular value, and the gap to the bound."""
    claims = []
    mean, error = mean_error(ds["rate"].values, axis=1)
    for gain, found, e, expected in zip(
        ds["gain"].values, mean, error, ds["theory"].values, strict=True
    ):
        if abs(expected) > 0.2:
            statement = f"gain {gain:g}: growth of the gradient per step, nats"
            claims.append(
                close(statement, found, expected, RATE, relative=0.05, error=e, asymptotic=True)
            )
    top = np.exp(ds["log_top"].values) / ds["shown"].values
    claims.append(
        close(
            "largest singular value of W over its gain",
            top[0],
            2.0,
            "2 (N -> infinity)",
            relative=0.06,
        )
    )
    time = ds["time"].values
    late, last = (
        time > len(time) // 4,
        ds.isel(shown=-1),
    )  # the chaotic one, whose rate varies least
    slope = np.polyfit(
        time[late], (last["log_top"].values * time - last["log_norm"].values)[late], 1
    )[0]
    gain, expected = float(last["shown"]), float(last["shown_theory"])
    statement = f"gain {gain:g}: log of bound over norm per step"
    claims.append(
        close(statement, slope, np.log(2 * gain) - expected, f"log 2 g less {RATE}", relative=0.1)
    )
    return tuple(claims)


def plot(ds: xr.Dataset) -> Figure:
    """Norms and bounds over T; rates and bounds over the gain."""
    figure, ((over, rates),) = panels(1, 2)
    time = np.append(0, ds["time"].values)
    for i, (gain, colour) in enumerate(zip(ds["shown"].values, COLOURS, strict=False)):
        over.plot(
            time,
            np.append(0, ds["log_norm"][i]) / np.log(10),
            color=colour,
            lw=1.6,
            label=f"gain {gain:g}",
        )
        over.plot(time, ds["log_top"].values[i] * time / np.log(10), "--", color=colour, lw=1.1)
    over.axhline(0, color=GREY, lw=1)
    over.set(xlabel="steps $T$", ylabel=r"$\log_{10} \Vert \partial x_T / \partial x_0 \Vert$")
    over.set(title=r"dashed: the bound $(\max|\phi'|\,\Vert W \Vert)^T$", ylim=(-25, 25))
    mean, error = mean_error(ds["rate"].values, axis=1)
    fine = ds["fine"].values
    rates.axhline(0, color=GREY, lw=1)
    rates.plot(fine, ds["curve"], color=THEORY, label=r"mean field, $\frac{1}{2}\log\chi_1$")
    rates.plot(fine, np.log(2 * fine), "--", color=LIMIT, lw=1.2, label=r"bound, $\log 2g$")
    points(rates, ds["gain"], mean, error, label="simulation, tied weights")
    rates.axvspan(0.5, fine[np.argmax(ds["curve"].values > 0)], color=GREY, alpha=0.35, lw=0)
    rates.text(0.52, 2.3, "bound explodes,\ngradient vanishes", fontsize=8)
    rates.set(xscale="log", xlabel="gain $g$", ylabel="growth of the gradient per step, nats")
    rates.set_xticks([0.3, 0.5, 1, 2, 4, 8], ["0.3", "0.5", "1", "2", "4", "8"])
    rates.minorticks_off()
    over.legend(frameon=False, fontsize=8, loc="upper left")
    rates.legend(frameon=False, fontsize=8, loc="lower right")
    return figure
