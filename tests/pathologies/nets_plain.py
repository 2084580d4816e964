"""Plain functions with `gradjax.tap`, each (seed, depth, ...) -> Problem; the value behind layer 3
is `h[3]`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import gradjax
from gradjax.core.initializers import gaussian
from pathologies.case import Problem
from pathologies.problems import GAIN, HE, ORTHOGONAL, UNIT, cross_entropy, digits, sequences

Init = Callable[..., Any]


def _stack(key, depth: int, width: int, init: Init) -> jax.Array:
    return jax.vmap(lambda k: init(k, (width, width)))(jax.random.split(key, depth))


def _ends(key, features: int, width: int) -> dict[str, jax.Array]:
    a, b = jax.random.split(key)
    return {"embed": UNIT(a, (features, width)), "readout": UNIT(b, (width, 10))}


def mlp(
    seed: int,
    depth: int,
    width: int = 64,
    *,
    act: Callable = jax.nn.relu,
    init: Init = HE,
    bias: float = 0.0,
    residual: float = 0.0,
    scan: bool = True,
    batch: int = 32,
    scale: float = 1.0,
):
    """h <- [h +] phi(W h + b), scanned over layers (values `h[i]`) or as a Python loop (values
    `h_i`)."""
    a, b = jax.random.split(jax.random.key(seed))
    layers = {"w": _stack(a, depth, width, init), "b": jnp.full((depth, width), bias, jnp.float32)}
    params = {"layers": layers, **_ends(b, 64, width)}

    def step(h, layer, name):
        new = act(h @ layer["w"] + layer["b"][None])
        return gradjax.tap(residual * h + new if residual else new, name)

    def loss_fn(params, x, y):
        h = x @ params["embed"]
        if scan:
            h, _ = jax.lax.scan(lambda h, layer: (step(h, layer, "h"), None), h, params["layers"])
        else:
            for i in range(depth):
                h = step(h, jax.tree.map(lambda leaf: leaf[i], params["layers"]), f"h_{i}")  # noqa: B023
        return cross_entropy(h @ params["readout"], y)

    return Problem(loss_fn, params, digits(seed, batch, scale=scale))


def resnet(
    seed: int, depth: int, width: int = 64, *, gain: float = 1.0, scan: bool = True, batch: int = 32
):
    """h <- h + gain * W_2 relu(W_1 h) with He weights, scanned over blocks."""
    a, b, c = jax.random.split(jax.random.key(seed), 3)
    layers = {"first": _stack(a, depth, width, HE), "second": _stack(b, depth, width, UNIT)}
    params = {"layers": layers, **_ends(c, 64, width)}

    def step(h, layer):
        return gradjax.tap(
            h + gain * (jax.nn.relu(h @ layer["first"]) @ layer["second"]), "h"
        ), None

    def loss_fn(params, x, y):
        h, _ = jax.lax.scan(step, x @ params["embed"], params["layers"])
        return cross_entropy(h @ params["readout"], y)

    return Problem(loss_fn, params, digits(seed, batch))


def rnn(
    seed: int,
    seq_len: int,
    width: int = 32,
    *,
    act: Callable = jnp.tanh,
    init: Init = ORTHOGONAL,
    inputs: float = 1.0,
    batch: int = 32,
):
    """h <- phi(W h + U x_t), scanned over time, read out at the last step."""
    a, b, c = jax.random.split(jax.random.key(seed), 3)
    params = {
        "recurrent": init(a, (width, width)),
        "input": gaussian(inputs)(b, (8, width)),
        "readout": UNIT(c, (width, 10)),
    }

    def loss_fn(params, x, y):
        step = lambda h, x: (
            gradjax.tap(act(h @ params["recurrent"] + x @ params["input"]), "h"),
            None,
        )
        h, _ = jax.lax.scan(step, jnp.zeros((len(x), width), x.dtype), x.swapaxes(0, 1))
        return cross_entropy(h @ params["readout"], y)

    return Problem(loss_fn, params, sequences(seed, seq_len, batch))


def _attention(h, layer, heads: int, temperature: float):
    """Softmax attention over (batch, tokens, width); the logits have the name `logits`."""
    split = lambda z: z.reshape(*z.shape[:-1], heads, -1)
    q, k, v = (split(h @ layer[name]) for name in ("query", "key", "value"))
    logits = gradjax.tap(jnp.einsum("bqhd,bkhd->bhqk", q, k) / temperature, "logits")
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v)
    return mixed.reshape(h.shape) @ layer["out"]


def _layernorm(h):
    h = h - h.mean(-1, keepdims=True)
    return h / jnp.sqrt((h * h).mean(-1, keepdims=True) + 1e-6)


def transformer(
    seed: int,
    depth: int,
    width: int = 32,
    *,
    wiring: str = "pre",
    temperature: float | None = None,
    gain: float = 1.0,
    batch: int = 16,
):
    """Blocks scanned over depth; wiring pre, post, nonorm, noskip (attention only), noskip_mlp
    (both, no skips).

    `temperature` divides the logits (default: sqrt of a head's width), `gain` multiplies value and
    MLP weights.
    """
    heads, sizes = 4, {"up": (width, 2 * width), "down": (2 * width, width)}
    names = ("query", "key", "value", "out", "up", "down")
    keys = jax.random.split(jax.random.key(seed), len(names) + 2)
    draw = lambda key, name: jax.vmap(lambda k: UNIT(k, sizes.get(name, (width, width))))(
        jax.random.split(key, depth)
    )
    layers = {name: draw(key, name) for key, name in zip(keys, names, strict=False)}
    layers = {name: gain * w if name in ("value", "down") else w for name, w in layers.items()}
    params = {"layers": layers, **_ends(keys[-1], 8, width)}
    params["places"] = 0.5 * jax.random.normal(keys[-2], (1, 8, width))
    temperature = temperature or (width / heads) ** 0.5

    def step(h, layer):
        attend = lambda z: _attention(z, layer, heads, temperature)
        mlp = lambda z: GAIN * jax.nn.relu(z @ layer["up"]) @ layer["down"]
        if wiring == "noskip":
            h = attend(h)
        elif wiring == "noskip_mlp":
            h = mlp(_layernorm(attend(h)))
        elif wiring == "post":
            h = _layernorm(h + attend(h))
            h = _layernorm(h + mlp(h))
        else:
            norm = _layernorm if wiring == "pre" else lambda z: z
            h = h + attend(norm(h))
            h = h + mlp(norm(h))
        return gradjax.tap(h, "h"), None

    def loss_fn(params, x, y):
        h = x.reshape(len(x), 8, 8) @ params["embed"] + params["places"]
        h, _ = jax.lax.scan(step, h, params["layers"])
        h = _layernorm(h) if wiring == "pre" else h
        return cross_entropy(h.mean(1) @ params["readout"], y)

    return Problem(loss_fn, params, digits(seed, batch))
