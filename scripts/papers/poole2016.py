"""Poole 2016: lengths, correlations and curvature of tanh networks in depth (arXiv 1606.05340).

    h_l = W_l tanh(h_{l-1}) + b_l
    sigma_b = 0.3,      sigma_w = 1.3 (ordered), 2.5, 4 (chaotic)

The length q of a layer runs to q* from any start (fig. 1), the correlation of two inputs to c* = 1
in order and below 1 in chaos (fig. 2), and a circle of inputs is shrunk or stretched by chi_1 per
layer and crumpled, its curvature obeying kappa^2' = 3 chi_2 / chi_1^2 + kappa^2 / chi_1 (fig. 4).
Networks of width 1000 against the maps of `gradjax.meanfield`.

Verified: q* within 2%, c* and the trajectories of c within 0.02, chi_1 as the growth of a tangent's
squared length per layer within 3%, the trajectory of the curvature within 15%. The maps hold for
infinite width, so standard errors are shown and not judged. Not covered: the paper's theorems on
expressivity.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array
from matplotlib.figure import Figure

from gradjax.core.activations import ACTIVATIONS
from gradjax.theory import meanfield
from papers.common import COLOURS, Claim, close, mean_error, panels, points

SIGMA_B = 0.3
SIGMA_W = (1.3, 2.5, 4.0)
START = (0.25, 1.0, 4.0)  # lengths of the first layer, times q*
CORRELATIONS = (0.0, 0.5, 0.9)  # of the first layer


@dataclass(frozen=True)
class Config:
    seed: int = 0
    width: int = 1000
    num_samples: int = 32  # networks
    depth: int = 20
    num_points: int = 8  # of the circle
    gain: float = 1.0  # times every sigma_w
    activation: str = "tanh"


SMALL = {"width": 500, "num_samples": 32, "num_points": 4}
CONTROLS = {"sigma_w 5% off": {"gain": 1.05}, "erf in place of tanh": {"activation": "erf"}}


class Curve(NamedTuple):
    """Inputs moving on a curve: position, velocity, acceleration."""

    h: Any  # (sigma_w, inputs, N)
    v: Any
    a: Any


def mean_square(x):
    return jnp.mean(x**2, -1)


def curvature(curve: Curve):
    """kappa^2 in units of h's mean square: [v^2 a^2 - (v a)^2] / (v^2)^3."""
    v2, a2, va = mean_square(curve.v), mean_square(curve.a), jnp.mean(curve.v * curve.a, -1)
    return (v2 * a2 - va**2) / v2**3


@functools.partial(jax.jit, static_argnames="activation")
def network(keys, start: Curve, sigma_w, *, activation: str) -> tuple[Curve, dict[str, Array]]:
    """Lengths, correlations with input 0, squared velocities and curvatures along the layers."""
    phi = ACTIVATIONS[activation]
    n = start.h.shape[-1]

    def step(curve, key):
        of_w, of_b = jax.random.split(key)
        w, b = jax.random.normal(of_w, (n, n)), SIGMA_B * jax.random.normal(of_b, (n,))

        def layer(h):
            return sigma_w[:, None, None] / math.sqrt(n) * (phi(h) @ w.T) + b[None, None]

        def velocity(h, v):
            return jax.jvp(layer, (h,), (v,))

        (h, v), (_, a) = jax.jvp(velocity, (curve.h, curve.v), (curve.v, curve.a))
        return Curve(h, v, a), observed(curve)

    def observed(curve):
        length = mean_square(curve.h)
        overlap = jnp.mean(curve.h * curve.h[:, :1], -1)
        correlation = overlap / jnp.sqrt(length * length[:, :1])
        return {
            "q": length,
            "c": correlation,
            "speed": mean_square(curve.v),
            "kappa2": curvature(curve),
        }

    return jax.lax.scan(step, start, keys)


def inputs(rng: np.random.Generator, n: int, q: np.ndarray, num_points: int) -> Curve:
    """Points of a circle of length q*, then inputs of other lengths.

    The points lie at the angles of CORRELATIONS from point 0, then evenly.
    """
    plane = np.linalg.qr(rng.standard_normal((n, 2)))[0].T
    angle = np.concatenate(
        [[0], np.arccos(CORRELATIONS), 2 * math.pi * np.arange(1, num_points) / num_points]
    )
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    h = cos * plane[0] + sin * plane[1]
    v = cos * plane[1] - sin * plane[0]
    others = rng.standard_normal((len(START), n))
    others *= np.sqrt(START)[:, None] / np.linalg.norm(others, axis=1, keepdims=True)
    still = np.zeros_like(others)
    radius = np.sqrt(n * q)[:, None, None]
    parts = (np.concatenate([x, y]) for x, y in ((h, others), (v, still), (-h, still)))
    return Curve(*(np.float32(radius * x) for x in parts))


def run(config: Config) -> xr.Dataset:
    rng = np.random.default_rng(config.seed)
    q = np.asarray(meanfield.q_star(np.array(SIGMA_W), SIGMA_B), float)
    sigma_w, found = np.float32(config.gain * np.array(SIGMA_W)), []
    for key in jax.random.split(jax.random.key(config.seed), config.num_samples):
        start = inputs(rng, config.width, q, config.num_points)
        keys = jax.random.split(key, config.depth)
        found.append(network(keys, start, sigma_w, activation=config.activation)[1])
    moving = -len(START)  # the points of the circle come first

    def of(name, part):
        return np.array([np.moveaxis(x[name], 0, -1)[:, part] for x in found], float)

    def dims(of_inputs):
        return ("sample", "sigma_w", of_inputs, "layer")

    ds = xr.Dataset(
        {
            "q": (dims("start"), of("q", slice(moving, None))),
            "c": (dims("pair"), of("c", slice(1, 1 + len(CORRELATIONS)))),
            "speed": (dims("point"), of("speed", slice(moving))),
            "kappa2": (dims("point"), of("kappa2", slice(moving))),
        },
        coords={"sigma_w": list(SIGMA_W), "start": list(START), "pair": list(CORRELATIONS)},
    )
    return ds.assign(maps(config.depth, q)).assign_attrs(width=config.width)


def maps(depth: int, q_star: np.ndarray) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """The same from mean field, with the paper's sigma_w and tanh."""
    sigma_w = np.array(SIGMA_W)[:, None]
    q, c, kappa2 = (
        q_star[:, None] * np.array(START),
        np.tile(CORRELATIONS, (len(SIGMA_W), 1)),
        1 / q_star,
    )
    rows = []
    for _ in range(depth):
        rows.append((q, c, kappa2))
        q, c = (
            meanfield.length_map(q, sigma_w, SIGMA_B),
            meanfield.correlation_map(c, sigma_w, SIGMA_B),
        )
        kappa2 = meanfield.curvature_map(kappa2, sigma_w[:, 0], SIGMA_B)
    q, c, kappa2 = (np.moveaxis(np.array(x, float), 0, -1) for x in zip(*rows, strict=True))
    return {
        "q_map": (("sigma_w", "start", "layer"), q),
        "c_map": (("sigma_w", "pair", "layer"), c),
        "kappa2_map": (("sigma_w", "layer"), kappa2),
    }


def plot(ds: xr.Dataset) -> Figure:
    fig, axes = panels(1, 4, (3.5, 3.2))
    lengths, correlations, speeds, curvatures = axes[0]
    layers = np.arange(ds.sizes["layer"])
    for colour, sigma_w in zip(COLOURS, SIGMA_W, strict=False):
        one, options = ds.sel(sigma_w=sigma_w), {"color": colour, "ms": 2.5}
        for ax, name, dim in ((lengths, "q", "start"), (correlations, "c", "pair")):
            for i in range(ds.sizes[dim]):
                ax.plot(layers, one[f"{name}_map"].isel({dim: i}), color=colour, lw=1)
                points(
                    ax,
                    layers,
                    *mean_error(one[name].isel({dim: i}).transpose("sample", "layer")),
                    **options,
                )
        speed, kappa2 = (
            one[name].mean("point").transpose("sample", "layer").values
            for name in ("speed", "kappa2")
        )
        chi_1 = float(meanfield.chi_1(sigma_w, SIGMA_B))
        speeds.plot(layers, chi_1**layers, color=colour, lw=1)
        points(
            speeds,
            layers,
            *mean_error(speed / speed[:, :1]),
            **options,
            label=rf"$\sigma_w = {sigma_w:g}$",
        )
        curvatures.plot(layers, one.kappa2_map, color=colour, lw=1)
        points(curvatures, layers, *mean_error(kappa2), **options)
    lengths.set(title="length $q$", yscale="log")
    correlations.set(title="correlation $c$ of two inputs", ylim=(-0.05, 1.05))
    speeds.set(title="squared speed along a circle", yscale="log")
    curvatures.set(title=r"its curvature $\kappa^2$", yscale="log")
    speeds.legend(frameon=False, fontsize=8)
    for ax in axes[0]:
        ax.set(xlabel="layer", xticks=range(0, len(layers), 5))
    fig.suptitle(f"tanh, width {ds.attrs['width']}: lines are mean field", fontsize=11)
    return fig


def check(ds: xr.Dataset) -> tuple[Claim, ...]:
    claims, late = [], slice(ds.sizes["layer"] // 2, None)
    for sigma_w in SIGMA_W:
        one, at = ds.sel(sigma_w=sigma_w).transpose("sample", ...), f"sigma_w = {sigma_w:g}"
        source = "mean field, Poole 2016"
        value, error = mean_error(one.q.isel(layer=late).mean(("start", "layer")))
        options = {"error": error, "asymptotic": True}
        q_star = meanfield.q_star(sigma_w, SIGMA_B)
        claims.append(close(f"length q*, {at}", value, q_star, source, **options, relative=0.02))
        value, options["error"] = mean_error(one.c.isel(layer=late).mean(("pair", "layer")))
        expected = one.c_map.isel(layer=late).mean()
        claims.append(
            close(
                f"correlation in the last layers, {at}",
                value,
                expected,
                source,
                **options,
                absolute=0.02,
            )
        )
        off = np.sqrt(((one.c.mean("sample") - one.c_map) ** 2).mean())
        claims.append(close(f"rms of c^l off the map, {at}", off, 0, source, absolute=0.02))
        speed = one.speed.mean("point").values
        value, options["error"] = mean_error(
            (speed[:, -1] / speed[:, 0]) ** (1 / (speed.shape[1] - 1))
        )
        chi_1 = meanfield.chi_1(sigma_w, SIGMA_B)
        claims.append(
            close(f"chi_1, growth per layer, {at}", value, chi_1, source, **options, relative=0.03)
        )
        off = np.log(one.kappa2.mean(("sample", "point")) / one.kappa2_map).isel(
            layer=slice(1, None)
        )
        off = np.sqrt((off**2).mean())
        claims.append(close(f"rms of log kappa^2 off the map, {at}", off, 0, source, absolute=0.15))
    return tuple(claims)
