"""Pairs of recurrent networks, and differences inside scan, cond, while, vmap and remat."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from gradjax import tap
from pathologies.difference_case import Pair, mean_square, normal, planted, projections, weights

PAIRS: list[Pair] = []
differs = functools.partial(planted, PAIRS)


@differs("reset", iteration=0)
def gates_of_a_gru_in_another_order():
    def reference(params, x, y):
        def step(h, u):
            gates = tap(jax.nn.sigmoid(u @ params["gates_x"] + h @ params["gates_h"]), "gates")
            reset = tap(gates[:, :8], "reset")  # <- a
            update = gates[:, 8:]
            candidate = jnp.tanh(u @ params["x"] + reset * (h @ params["h"]))
            h = tap((1.0 - update) * candidate + update * h, "h")
            return h, None

        h, _ = lax.scan(step, params["h0"], x)
        return mean_square(h, y)

    def port(params, x, y):
        def step(h, u):
            gates = tap(jax.nn.sigmoid(u @ params["gates_x"] + h @ params["gates_h"]), "gates")
            reset = tap(gates[:, 8:], "reset")  # <- b
            update = gates[:, :8]
            candidate = jnp.tanh(u @ params["x"] + reset * (h @ params["h"]))
            h = tap((1.0 - update) * candidate + update * h, "h")
            return h, None

        h, _ = lax.scan(step, params["h0"], x)
        return mean_square(h, y)

    params = projections(0, "x h", 8) | {"h0": normal(6, 3, 8)}
    params |= {"gates_x": weights(2, 8, 16), "gates_h": weights(3, 8, 16)}
    return reference, params, port, params, (normal(4, 5, 3, 8), normal(5, 3, 8))


@differs("candidate", iteration=0)
def reset_gate_before_the_product():
    def reference(params, x, y):
        def step(h, u):
            r = tap(jax.nn.sigmoid(u @ params["rx"] + h @ params["rh"]), "reset")
            z = tap(jax.nn.sigmoid(u @ params["zx"] + h @ params["zh"]), "update")
            new = tap(jnp.tanh(u @ params["x"] + r * (h @ params["h"])), "candidate")  # <- a
            return (1.0 - z) * new + z * h, None

        h, _ = lax.scan(step, params["h0"], x)
        return mean_square(tap(h, "encoded"), y)

    def port(params, x, y):
        def step(h, u):
            r = tap(jax.nn.sigmoid(u @ params["rx"] + h @ params["rh"]), "reset")
            z = tap(jax.nn.sigmoid(u @ params["zx"] + h @ params["zh"]), "update")
            new = tap(jnp.tanh(u @ params["x"] + (r * h) @ params["h"]), "candidate")  # <- b
            return (1.0 - z) * new + z * h, None

        h, _ = lax.scan(step, params["h0"], x)
        return mean_square(tap(h, "encoded"), y)

    params = projections(0, "rx rh zx zh x h", 8) | {"h0": normal(6, 3, 8)}
    return reference, params, port, params, (normal(7, 5, 3, 8), normal(8, 3, 8))


@differs("forget", iteration=0)
def forget_gate_without_its_bias():
    def reference(params, x, y):
        def step(carry, u):
            h, c = carry
            z = u @ params["x"] + h @ params["h"]
            i, f, o, g = jnp.split(z, 4, axis=-1)
            f = tap(jax.nn.sigmoid(f + 1.0), "forget")  # <- a
            c = tap(f * c + jax.nn.sigmoid(i) * jnp.tanh(g), "cell")
            return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

        zero = jnp.zeros((3, 8))
        (h, _), _ = lax.scan(step, (zero, zero), x)
        return mean_square(tap(h, "encoded"), y)

    def port(params, x, y):
        def step(carry, u):
            h, c = carry
            z = u @ params["x"] + h @ params["h"]
            i, f, o, g = jnp.split(z, 4, axis=-1)
            f = tap(jax.nn.sigmoid(f), "forget")  # <- b
            c = tap(f * c + jax.nn.sigmoid(i) * jnp.tanh(g), "cell")
            return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

        zero = jnp.zeros((3, 8))
        (h, _), _ = lax.scan(step, (zero, zero), x)
        return mean_square(tap(h, "encoded"), y)

    params = {"x": weights(0, 8, 32), "h": weights(1, 8, 32)}
    return reference, params, port, params, (normal(2, 6, 3, 8), normal(3, 3, 8))


@differs("layer", iteration=3)
def one_layer_of_a_scan_with_another_scale():
    def reference(params, x, y):
        def layer(h, w):
            h = tap(h + 0.5 * jnp.tanh(h @ w), "layer")  # <- a
            return h, None

        h, _ = lax.scan(layer, x, params["layers"])
        return mean_square(tap(h @ params["out"], "out"), y)

    def port(params, x, y):
        def layer(h, row):
            i, w = row
            h = tap(h + jnp.where(i == 3, 1.0, 0.5) * jnp.tanh(h @ w), "layer")  # <- b
            return h, None

        h, _ = lax.scan(layer, x, (jnp.arange(6), params["layers"]))
        return mean_square(tap(h @ params["out"], "out"), y)

    params = {"layers": weights(0, 6, 8, 8), "out": weights(1, 8, 8)}
    return reference, params, port, params, (normal(2, 4, 8), normal(3, 4, 8))


@differs("layer", iteration=3)
def one_layer_of_a_checkpoint_transposed():
    @jax.jit
    def loss_fn(params, x, y):
        def layer(h, w):
            h = tap(jnp.tanh(h @ w), "layer")  # <- a  # <- b
            return h, None

        h, _ = lax.scan(jax.checkpoint(layer), x, params["layers"])
        return mean_square(tap(h @ params["out"], "out"), y)

    a = {"layers": weights(0, 6, 8, 8), "out": weights(1, 8, 8)}
    b = a | {"layers": a["layers"].at[3].set(a["layers"][3].T)}
    return loss_fn, a, loss_fn, b, (normal(2, 4, 8), normal(3, 4, 8))


@differs("layer", iteration=2)
def skip_of_one_layer_in_a_cond():
    def loss(layer):
        def loss_fn(params, x, y):
            h, _ = lax.scan(layer, x, (jnp.arange(6), params["layers"]))
            return mean_square(h, y)

        return loss_fn

    def reference(h, row):
        _, w = row
        h = tap(h + jnp.tanh(h @ w), "layer")  # <- a
        return h, None

    def port(h, row):
        i, w = row
        change = jnp.tanh(h @ w)
        h = lax.cond(i == 2, lambda: change, lambda: h + change)  # <- b
        return tap(h, "layer"), None

    params = {"layers": weights(0, 6, 8, 8)}
    return loss(reference), params, loss(port), params, (normal(1, 4, 8), normal(2, 4, 8))


@differs("state", iteration=0)
def recurrence_with_a_hidden_square_root():
    def reference(params, x, y):
        def step(h, u):
            a = jax.nn.sigmoid(params["decay"])
            h = tap(a * h + jnp.sqrt(1.0 - a**2) * u, "state")  # <- a
            return h, None

        h, _ = lax.scan(step, jnp.zeros(8), x)
        return mean_square(h, y)

    def port(params, x, y):
        def step(h, u):
            a = jax.nn.sigmoid(params["decay"])
            h = tap(a * h + (1.0 - a) * u, "state")  # <- b
            return h, None

        h, _ = lax.scan(step, jnp.zeros(8), x)
        return mean_square(h, y)

    def batched(loss):
        def loss_fn(params, x, y):
            return jnp.mean(jax.vmap(loss, in_axes=(None, 0, 0))(params, x, y))

        return loss_fn

    params = {"decay": normal(0, 8)}
    args = (normal(1, 3, 6, 8), normal(2, 3, 8))
    return batched(reference), params, batched(port), params, args


@differs("fixed_point")
def fewer_iterations_of_a_solver():
    def reference(params, x, y):
        u = tap(x @ params["in"], "u")

        def body(i, z):
            return jnp.tanh(u + z @ params["w"])

        z = lax.fori_loop(0, 8, body, jnp.zeros_like(u))  # <- a
        return mean_square(tap(z, "fixed_point") @ params["out"], y)

    def port(params, x, y):
        u = tap(x @ params["in"], "u")

        def body(i, z):
            return jnp.tanh(u + z @ params["w"])

        z = lax.fori_loop(0, 4, body, jnp.zeros_like(u))  # <- b
        return mean_square(tap(z, "fixed_point") @ params["out"], y)

    params = projections(0, "in w out", 8)
    params["w"] = 0.7 * params["w"]
    return reference, params, port, params, (normal(3, 4, 8), normal(4, 4, 8))


@differs("block1")
def activation_in_a_rematerialised_block():
    @jax.checkpoint
    def reference_block(w, h):
        return h + jax.nn.silu(h @ w["up"]) @ w["down"]  # <- a

    @jax.checkpoint
    def ported_block(w, h):
        return h + jax.nn.relu(h @ w["up"]) @ w["down"]  # <- b

    def reference(params, x):
        h = tap(jnp.tanh(x @ params["in"]), "block0")
        for i in (1, 2):
            h = tap(reference_block(params[f"block{i}"], h), f"block{i}")
        return jnp.mean(h**2)

    def port(params, x):
        h = tap(jnp.tanh(x @ params["in"]), "block0")
        for i in (1, 2):
            h = tap(ported_block(params[f"block{i}"], h), f"block{i}")
        return jnp.mean(h**2)

    params = {f"block{i}": projections(i, "up down", 8) for i in (1, 2)} | {"in": weights(9, 8, 8)}
    return reference, params, port, params, (normal(10, 4, 8),)


@differs("states")
def running_sum_in_reverse():
    def reference(params, x, y):
        u = tap(jax.nn.softplus(x @ params["in"]), "u")
        states = tap(lax.cumsum(u, axis=0), "states")  # <- a
        return mean_square(states @ params["out"], y)

    def port(params, x, y):
        u = tap(jax.nn.softplus(x @ params["in"]), "u")
        states = tap(lax.cumsum(u, axis=0, reverse=True), "states")  # <- b
        return mean_square(states @ params["out"], y)

    params = projections(0, "in out", 8)
    return reference, params, port, params, (normal(2, 6, 8), normal(3, 6, 8))
