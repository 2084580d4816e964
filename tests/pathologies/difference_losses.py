"""Pairs of losses on the same outputs."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from gradjax import tap
from pathologies.difference_case import (
    Pair,
    log_likelihood,
    mean_square,
    normal,
    planted,
    projections,
    weights,
)

PAIRS: list[Pair] = []
differs = functools.partial(planted, PAIRS)


@differs("", "loss")
def label_smoothing():
    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(nn.relu(nn.Dense(8)(x)))

    model = Classifier()

    def reference(params, x, labels):
        log_p = jax.nn.log_softmax(model.apply(params, x))
        return -jnp.mean(jnp.sum(jax.nn.one_hot(labels, 4) * log_p, axis=-1))  # <- a

    def port(params, x, labels):
        log_p = jax.nn.log_softmax(model.apply(params, x))
        target = 0.9 * jax.nn.one_hot(labels, 4) + 0.1 / 4  # <- b
        return -jnp.mean(jnp.sum(target * log_p, axis=-1))

    x = normal(0, 6, 5)
    params = model.init(jax.random.key(1), x)
    return reference, params, port, params, (x, jnp.arange(6) % 4)


@differs("", "loss")
def mean_for_sum():
    def reference(params, x, y):
        out = tap(jnp.tanh(x @ params["w"]) @ params["out"], "out")
        return jnp.mean(jnp.sum((out - y) ** 2, axis=-1))  # <- a

    def port(params, x, y):
        out = tap(jnp.tanh(x @ params["w"]) @ params["out"], "out")
        return jnp.mean((out - y) ** 2)  # <- b

    params = projections(0, "w out", 8)
    return jax.jit(reference), params, jax.jit(port), params, (normal(2, 4, 8), normal(3, 4, 8))


@differs("", "loss")
def padding_in_the_mean():
    def reference(params, tokens, labels, mask):
        h = tap(params["table"][tokens], "h")
        nll = tap(-log_likelihood(h @ params["out"], labels), "nll")
        return jnp.sum(nll * mask) / jnp.sum(mask)  # <- a

    def port(params, tokens, labels, mask):
        h = tap(params["table"][tokens], "h")
        nll = tap(-log_likelihood(h @ params["out"], labels), "nll")
        return jnp.mean(nll * mask)  # <- b

    params = {"table": normal(0, 10, 8), "out": weights(1, 8, 10)}
    tokens = jnp.array([3, 1, 4, 1, 0, 0])
    return reference, params, port, params, (tokens, (tokens + 1) % 10, jnp.float32(tokens != 0))


@differs("nll")
def labels_not_shifted():
    def reference(params, tokens):
        h = tap(jnp.cumsum(params["table"][tokens], axis=0), "h")
        logits = tap(h @ params["out"], "logits")
        nll = tap(-log_likelihood(logits[:-1], tokens[1:]), "nll")  # <- a
        return jnp.mean(nll)

    def port(params, tokens):
        h = tap(jnp.cumsum(params["table"][tokens], axis=0), "h")
        logits = tap(h @ params["out"], "logits")
        nll = tap(-log_likelihood(logits[:-1], tokens[:-1]), "nll")  # <- b
        return jnp.mean(nll)

    params = {"table": normal(0, 10, 8), "out": weights(1, 8, 10)}
    return reference, params, port, params, (jnp.array([3, 1, 4, 1, 5, 9]),)


@differs("", "loss")
def divergence_in_the_other_direction():
    def reference(params, x, teacher):
        log_q = tap(jax.nn.log_softmax(x @ params["w"]), "log_q")
        log_p = tap(jax.nn.log_softmax(teacher), "log_p")
        return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))  # <- a

    def port(params, x, teacher):
        log_q = tap(jax.nn.log_softmax(x @ params["w"]), "log_q")
        log_p = tap(jax.nn.log_softmax(teacher), "log_p")
        return jnp.mean(jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1))  # <- b

    params = projections(0, "w", 8)
    return reference, params, port, params, (normal(1, 5, 8), 2.0 * normal(2, 5, 8))


@differs("", "loss")
def weight_decay_of_the_biases_too():
    def reference(params, x, y):
        error = mean_square(tap(x @ params["w"] + params["b"], "out"), y)
        return error + 0.1 * jnp.sum(params["w"] ** 2)  # <- a

    def port(params, x, y):
        error = mean_square(tap(x @ params["w"] + params["b"], "out"), y)
        return error + 0.1 * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))  # <- b

    params = {"w": weights(0, 8, 8), "b": normal(1, 1, 8)}
    return reference, params, port, params, (normal(2, 4, 8), normal(3, 4, 8))


@differs("returns")
def discount_one_step_late():
    def reference(params, states, rewards):
        values = tap(jnp.tanh(states @ params["w"]) @ params["out"], "values")
        discounts = 0.9 ** jnp.arange(6.0)
        returns = tap(jnp.sum(discounts * rewards) + 0.9**6 * values[-1], "returns")  # <- a
        return mean_square(values[0], returns)

    def port(params, states, rewards):
        values = tap(jnp.tanh(states @ params["w"]) @ params["out"], "values")
        discounts = 0.9 ** jnp.arange(6.0)
        returns = tap(jnp.sum(discounts * rewards) + 0.9**5 * values[-1], "returns")  # <- b
        return mean_square(values[0], returns)

    params = {"w": weights(0, 4, 8), "out": weights(1, 8, 1)[:, 0]}
    return reference, params, port, params, (normal(2, 7, 4), normal(3, 6))
