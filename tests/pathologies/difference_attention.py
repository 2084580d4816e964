"""Pairs of attention layers: masks, scales, heads and positions."""

import functools

import jax
import jax.numpy as jnp

from gradjax import tap
from pathologies.difference_case import Pair, mean_square, normal, planted, projections, weights

PAIRS: list[Pair] = []
differs = functools.partial(planted, PAIRS)


@differs("weights")
def mask_of_minus_ten_thousand():
    def bert(params, x, mask):
        q, k, v = (x @ params[name] for name in "qkv")
        scores = tap(q @ k.T / 8**0.5, "scores")
        scores = scores + (1.0 - mask) * -10000.0  # <- a
        weights = tap(jax.nn.softmax(scores), "weights")
        return jnp.mean((weights @ v) ** 2)

    def port(params, x, mask):
        q, k, v = (x @ params[name] for name in "qkv")
        scores = tap(q @ k.T / 8**0.5, "scores")
        scores = jnp.where(mask == 1.0, scores, jnp.finfo(scores.dtype).min)  # <- b
        weights = tap(jax.nn.softmax(scores), "weights")
        return jnp.mean((weights @ v) ** 2)

    params = projections(0, "q k v", 8)
    # The last two rows are padding, and no key is visible from there.
    mask = jnp.ones((6, 6)).at[:, 4:].set(0.0).at[4:].set(0.0)
    return bert, params, port, params, (normal(3, 6, 8), mask)


@differs("weights")
def mask_of_minus_infinity_with_a_row_of_padding():
    def reference(params, x, mask):
        q, k, v = (x @ params[name] for name in "qkv")
        scores = tap(q @ k.swapaxes(1, 2) / 8**0.5, "scores")
        scores = jnp.where(mask, scores, -1e9)  # <- a
        weights = tap(jax.nn.softmax(scores), "weights")
        return jnp.mean((weights @ v) ** 2)

    def port(params, x, mask):
        q, k, v = (x @ params[name] for name in "qkv")
        scores = tap(q @ k.swapaxes(1, 2) / 8**0.5, "scores")
        scores = jnp.where(mask, scores, -jnp.inf)  # <- b
        weights = tap(jax.nn.softmax(scores), "weights")
        return jnp.mean((weights @ v) ** 2)

    params = projections(0, "q k v", 8)
    mask = jnp.ones((2, 4, 4), bool).at[1, 3].set(False)
    return reference, params, port, params, (normal(3, 2, 4, 8), mask)


@differs("weights")
def mask_value_too_small_for_large_scores():
    def reference(params, x, mask):
        q, k = x @ params["q"], x @ params["k"]
        scores = tap(q @ k.T, "scores")
        bias = jnp.where(mask, 0.0, -1e9)  # <- a
        weights = tap(jax.nn.softmax(scores + bias), "weights")
        return jnp.mean((weights @ x) ** 2)

    def port(params, x, mask):
        q, k = x @ params["q"], x @ params["k"]
        scores = tap(q @ k.T, "scores")
        bias = jnp.where(mask, 0.0, -10.0)  # <- b
        weights = tap(jax.nn.softmax(scores + bias), "weights")
        return jnp.mean((weights @ x) ** 2)

    params = projections(0, "q k", 8)
    mask = jnp.tril(jnp.ones((6, 6), bool))
    return jax.jit(reference), params, jax.jit(port), params, (2.0 * normal(2, 6, 8), mask)


@differs("weights")
def causal_mask_that_hides_the_diagonal():
    def reference(params, x):
        scores = tap((x @ params["q"]) @ (x @ params["k"]).T / 8**0.5, "scores")
        visible = jnp.where(jnp.tril(jnp.ones((6, 6), bool)), scores, -1e9)  # <- a
        weights = tap(jax.nn.softmax(visible), "weights")
        return jnp.mean(tap(weights @ (x @ params["v"]), "mixed") ** 2)

    def port(params, x):
        scores = tap((x @ params["q"]) @ (x @ params["k"]).T / 8**0.5, "scores")
        visible = jnp.where(jnp.tril(jnp.ones((6, 6), bool), k=-1), scores, -1e9)  # <- b
        weights = tap(jax.nn.softmax(visible), "weights")
        return jnp.mean(tap(weights @ (x @ params["v"]), "mixed") ** 2)

    params = projections(0, "q k v", 8)
    return reference, params, port, params, (normal(3, 6, 8),)


@differs("weights")
def causal_mask_off_by_one():
    def reference(params, x):
        i = jnp.arange(5)
        scores = tap((x @ params["q"]) @ (x @ params["k"]).T / 8**0.5, "scores")
        visible = jnp.where(i[:, None] >= i[None], scores, -jnp.inf)  # <- a
        weights = tap(jax.nn.softmax(visible), "weights")
        return tap(weights @ (x @ params["v"]), "mixed")

    def port(params, x):
        i = jnp.arange(5)
        scores = tap((x @ params["q"]) @ (x @ params["k"]).T / 8**0.5, "scores")
        visible = jnp.where(i[:, None] >= i[None] - 1, scores, -jnp.inf)  # <- b
        weights = tap(jax.nn.softmax(visible), "weights")
        return tap(weights @ (x @ params["v"]), "mixed")

    def loss(attention):
        def batch_loss(params, x, y):
            mixed = jax.vmap(attention, in_axes=(None, 0))(params, x)
            return mean_square(mixed, y)

        return batch_loss

    params = projections(0, "q k v", 8)
    args = (normal(3, 2, 5, 8), normal(4, 2, 5, 8))
    return loss(reference), params, loss(port), params, args


@differs("scores")
def softmax_scale_missing():
    def reference(params, x, y):
        q, k, v = (tap(x @ params[name], name) for name in "qkv")
        scores = tap(q @ k.T / jnp.sqrt(q.shape[-1]), "scores")  # <- a
        return mean_square(jax.nn.softmax(scores) @ v, y)

    def port(params, x, y):
        q, k, v = (tap(x @ params[name], name) for name in "qkv")
        scores = tap(q @ k.T, "scores")  # <- b
        return mean_square(jax.nn.softmax(scores) @ v, y)

    params = projections(0, "q k v", 16)
    return reference, params, port, params, (normal(3, 6, 16), normal(4, 6, 16))


@differs("scores")
def softmax_scale_without_its_square_root():
    def reference(params, x, y):
        q, k, v = jnp.split(tap(x @ params["qkv"], "qkv"), 3, axis=-1)
        scores = tap(jnp.einsum("qd,kd->qk", q, k) * 8**-0.5, "scores")  # <- a
        return mean_square(tap(jax.nn.softmax(scores) @ v, "mixed"), y)

    def port(params, x, y):
        q, k, v = jnp.split(tap(x @ params["qkv"], "qkv"), 3, axis=-1)
        scores = tap(jnp.einsum("qd,kd->qk", q, k) / 8, "scores")  # <- b
        return mean_square(tap(jax.nn.softmax(scores) @ v, "mixed"), y)

    params = {"qkv": weights(0, 8, 24)}
    return jax.jit(reference), params, jax.jit(port), params, (normal(1, 6, 8), normal(2, 6, 8))


@differs("scores")
def query_scaled_twice():
    @jax.checkpoint
    def reference(params, x):
        q, k, v = (tap(x @ params[name], name) for name in "qkv")
        scores = tap(q @ k.T / 8**0.5, "scores")  # <- a
        return tap(x + jax.nn.softmax(scores) @ v, "block")

    @jax.checkpoint
    def port(params, x):
        q, k, v = (tap(x @ params[name], name) for name in "qkv")
        scores = tap((q * 8**-0.5) @ k.T / 8**0.5, "scores")  # <- b
        return tap(x + jax.nn.softmax(scores) @ v, "block")

    def loss_a(params, x, y):
        return mean_square(reference(params, x), y)

    def loss_b(params, x, y):
        return mean_square(port(params, x), y)

    params = projections(0, "q k v", 8)
    return loss_a, params, loss_b, params, (normal(3, 6, 8), normal(4, 6, 8))


@differs("weights")
def softmax_over_the_queries():
    def reference(params, x, y):
        scores = tap((x @ params["q"]) @ (x @ params["k"]).T / 8**0.5, "scores")
        weights = tap(jax.nn.softmax(scores, axis=-1), "weights")  # <- a
        return mean_square(weights @ x, y)

    def port(params, x, y):
        scores = tap((x @ params["q"]) @ (x @ params["k"]).T / 8**0.5, "scores")
        weights = tap(jax.nn.softmax(scores, axis=0), "weights")  # <- b
        return mean_square(weights @ x, y)

    params = projections(0, "q k", 8)
    return reference, params, port, params, (normal(2, 6, 8), normal(3, 6, 8))


@differs("scores")
def grouped_keys_tiled():
    def reference(params, x, y):
        q = tap((x @ params["q"]).reshape(5, 4, 4).swapaxes(0, 1), "q")
        k = tap((x @ params["k"]).reshape(5, 2, 4).swapaxes(0, 1), "k")
        k = jnp.repeat(k, 2, axis=0)  # <- a
        scores = tap(q @ k.swapaxes(1, 2) / 2.0, "scores")
        mixed = jax.nn.softmax(scores) @ x[None]
        return mean_square(mixed, y)

    def port(params, x, y):
        q = tap((x @ params["q"]).reshape(5, 4, 4).swapaxes(0, 1), "q")
        k = tap((x @ params["k"]).reshape(5, 2, 4).swapaxes(0, 1), "k")
        k = jnp.tile(k, (2, 1, 1))  # <- b
        scores = tap(q @ k.swapaxes(1, 2) / 2.0, "scores")
        mixed = jax.nn.softmax(scores) @ x[None]
        return mean_square(mixed, y)

    params = {"q": weights(0, 8, 16), "k": weights(1, 8, 8)}
    return reference, params, port, params, (normal(2, 5, 8), normal(3, 4, 5, 8))


@differs("heads")
def heads_in_the_inner_axis():
    def reference(params, x):
        q = tap(x @ params["q"], "q")
        q = tap(q.reshape(6, 2, 4).transpose(1, 0, 2), "heads")  # <- a
        k = (x @ params["k"]).reshape(6, 2, 4).transpose(1, 0, 2)
        return jnp.mean(jax.nn.softmax(q @ k.swapaxes(1, 2) / 2.0) ** 2)

    def port(params, x):
        q = tap(x @ params["q"], "q")
        q = tap(q.reshape(6, 4, 2).transpose(2, 0, 1), "heads")  # <- b
        k = (x @ params["k"]).reshape(6, 4, 2).transpose(2, 0, 1)
        return jnp.mean(jax.nn.softmax(q @ k.swapaxes(1, 2) / 2.0) ** 2)

    params = projections(0, "q k", 8)
    return reference, params, port, params, (normal(2, 6, 8),)


@differs("merged")
def heads_merged_without_their_transpose():
    def reference(params, x, y):
        heads = (x @ params["in"]).reshape(4, 2, 4).transpose(1, 0, 2)
        scores = tap(heads @ heads.swapaxes(1, 2) / 2.0, "scores")
        mixed = tap(jax.nn.softmax(scores) @ heads, "mixed")
        merged = tap(mixed.transpose(1, 0, 2).reshape(4, 8), "merged")  # <- a
        return mean_square(merged @ params["out"], y)

    def port(params, x, y):
        heads = (x @ params["in"]).reshape(4, 2, 4).transpose(1, 0, 2)
        scores = tap(heads @ heads.swapaxes(1, 2) / 2.0, "scores")
        mixed = tap(jax.nn.softmax(scores) @ heads, "mixed")
        merged = tap(mixed.reshape(4, 8), "merged")  # <- b
        return mean_square(merged @ params["out"], y)

    params = projections(0, "in out", 8)
    return reference, params, port, params, (normal(2, 4, 8), normal(3, 4, 8))


@differs("q")
def fused_projection_split_in_another_order():
    def reference(params, x, y):
        fused = tap(jnp.einsum("td,de->te", x, params["qkv"]), "fused")
        q, k, v = jnp.split(fused, 3, axis=-1)  # <- a
        scores = tap(q, "q") @ tap(k, "k").T / 8**0.5
        return mean_square(jax.nn.softmax(scores) @ tap(v, "v"), y)

    def port(params, x, y):
        fused = tap(jnp.einsum("td,de->te", x, params["qkv"]), "fused")
        k, q, v = jnp.split(fused, 3, axis=-1)  # <- b
        scores = tap(q, "q") @ tap(k, "k").T / 8**0.5
        return mean_square(jax.nn.softmax(scores) @ tap(v, "v"), y)

    params = {"qkv": weights(0, 8, 24)}
    return reference, params, port, params, (normal(1, 6, 8), normal(2, 6, 8))


@differs("rotated")
def rotary_embedding_interleaved():
    def reference(params, x):
        angle = jnp.arange(6.0)[:, None] * 10000.0 ** (-jnp.arange(4.0) / 4)[None]
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        q = tap(x @ params["q"], "q")
        x1, x2 = jnp.split(q, 2, axis=-1)  # <- a
        rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
        return jnp.mean(jax.nn.softmax(tap(rotated, "rotated") @ x.T) ** 2)

    def port(params, x):
        angle = jnp.arange(6.0)[:, None] * 10000.0 ** (-jnp.arange(4.0) / 4)[None]
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        q = tap(x @ params["q"], "q")
        x1, x2 = q[:, 0::2], q[:, 1::2]  # <- b
        rotated = jnp.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).reshape(6, 8)
        return jnp.mean(jax.nn.softmax(tap(rotated, "rotated") @ x.T) ** 2)

    params = projections(0, "q", 8)
    return reference, params, port, params, (normal(1, 6, 8),)


@differs("rotated")
def rotary_embedding_that_turns_the_other_way():
    def reference(params, x, angle):
        q = tap(x @ params["q"], "q")
        x1, x2 = jnp.split(q, 2, axis=-1)
        left = x1 * jnp.cos(angle) - x2 * jnp.sin(angle)  # <- a
        right = x2 * jnp.cos(angle) + x1 * jnp.sin(angle)
        rotated = tap(jnp.concatenate([left, right], axis=-1), "rotated")
        return jnp.mean(jax.nn.softmax(rotated @ x.T) ** 2)

    def port(params, x, angle):
        q = tap(x @ params["q"], "q")
        x1, x2 = jnp.split(q, 2, axis=-1)
        left = x1 * jnp.cos(angle) + x2 * jnp.sin(angle)  # <- b
        right = x2 * jnp.cos(angle) - x1 * jnp.sin(angle)
        rotated = tap(jnp.concatenate([left, right], axis=-1), "rotated")
        return jnp.mean(jax.nn.softmax(rotated @ x.T) ** 2)

    angle = jnp.arange(6.0)[:, None] * 100.0 ** (-jnp.arange(4.0) / 4)[None]
    params = projections(0, "q", 8)
    return reference, params, port, params, (normal(1, 6, 8), angle)


@differs("embedded")
def sinusoids_interleaved():
    def reference(params, tokens):
        rows = tap(params["table"][tokens], "rows")
        angle = jnp.arange(6.0)[:, None] / 100.0 ** (jnp.arange(4.0) / 4)[None]
        positions = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)  # <- a
        embedded = tap(rows + positions, "embedded")
        return jnp.mean(jnp.tanh(embedded @ params["out"]) ** 2)

    def port(params, tokens):
        rows = tap(params["table"][tokens], "rows")
        angle = jnp.arange(6.0)[:, None] / 100.0 ** (jnp.arange(4.0) / 4)[None]
        positions = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(6, 8)  # <- b
        embedded = tap(rows + positions, "embedded")
        return jnp.mean(jnp.tanh(embedded @ params["out"]) ** 2)

    params = {"table": normal(0, 8, 8), "out": weights(1, 8, 8)}
    return reference, params, port, params, (jnp.array([3, 1, 4, 1, 5, 7]),)


@differs("scores")
def learned_position_bias_transposed():
    def reference(params, x, y):
        q, k = tap(x @ params["q"], "q"), tap(x @ params["k"], "k")
        scores = tap(q @ k.T / 8**0.5 + params["bias"], "scores")  # <- a
        return mean_square(jax.nn.softmax(scores) @ x, y)

    def port(params, x, y):
        q, k = tap(x @ params["q"], "q"), tap(x @ params["k"], "k")
        scores = tap(q @ k.T / 8**0.5 + params["bias"].T, "scores")  # <- b
        return mean_square(jax.nn.softmax(scores) @ x, y)

    params = projections(0, "q k", 8) | {"bias": normal(2, 6, 6)}
    return reference, params, port, params, (normal(3, 6, 8), normal(4, 6, 8))
