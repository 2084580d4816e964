"""A program evaluated one equation at a time gives what it gives compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from bounds import assert_rounding
from gradjax.replay.tape import SMALL, Step, Value, holds, inputs, record

W = jax.random.normal(jax.random.key(0), (4, 4)) / 2
X = jax.random.normal(jax.random.key(1), (3, 4))


@jax.custom_jvp
def cubed(x):
    return x**3


@cubed.defjvp
def _(primals, tangents):
    return cubed(*primals), 3 * primals[0] ** 2 * tangents[0]


def scanned(w, x):
    def step(h, t):
        h = jnp.tanh(h @ w) + t
        return h, jnp.sum(h)

    h, sums = lax.scan(step, x, jnp.arange(5.0))
    return jnp.sum(h) + jnp.sum(sums**2)


def looped(w, x):
    halved = lax.while_loop(lambda h: jnp.max(jnp.abs(h)) > 0.1, lambda h: h / 2, x @ w)
    return jnp.sum(lax.stop_gradient(halved) * w[:3])


def branched(w, x):
    h = lax.cond(jnp.sum(x) > 0, lambda h: h @ w, lambda h: -h, x)
    return jnp.sum(lax.switch(jnp.int32(7), [jnp.sin, jnp.cos, jnp.tanh], h))


PROGRAMS = {
    "plain": lambda w, x: jnp.sum(jax.nn.softmax(x @ w) ** 2),
    "jit": lambda w, x: jnp.sum(jax.jit(lambda w, x: jax.jit(jnp.sin)(x @ w))(w, x)),
    "checkpoint": lambda w, x: jnp.sum(jax.checkpoint(lambda x: jnp.tanh(x @ w))(x)),
    "custom_jvp": lambda w, x: jnp.sum(cubed(x @ w)) + jnp.sum(jax.nn.relu(x)),
    "vmap": lambda w, x: jnp.sum(jax.vmap(lambda row: jnp.linalg.norm(w @ row))(x)),
    "solve": lambda w, x: jnp.sum(jnp.linalg.solve(w + 3 * jnp.eye(4), x.T)),
    "random": lambda w, x: jnp.sum(x @ w * jax.random.normal(jax.random.key(3), x.shape)),
    "scan": scanned,
    "while": looped,
    "branches": branched,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_values_are_those_of_the_compiled_program(name):
    gradient = jax.value_and_grad(PROGRAMS[name])
    found = record(jax.make_jaxpr(gradient)(W, X), inputs([W, X]))
    for ours, theirs in zip(found, jax.jit(gradient)(W, X), strict=True):
        assert_rounding(ours.data, theirs, terms=200, size=np.abs(theirs).max() + 1)


def test_a_large_finite_value_is_forgotten_and_what_a_bad_step_read_is_not():
    x = jnp.zeros(2 * SMALL)

    def loss(x):
        finite = jnp.cos(x)
        other = finite + 1.0
        return jnp.sum(jnp.log(x * finite)) + jnp.sum(other)

    (out,) = record(jax.make_jaxpr(loss)(x), inputs([x]))
    kept = {}
    todo = [out]
    while todo:
        value = todo.pop()
        if isinstance(value.origin, Step):
            kept[value.origin.name] = value.data is not None
            todo += value.origin.operands
    assert kept["log"] and kept["mul"] and not kept["cos"]


def test_it_stops_at_the_first_output_that_is_bad():
    def both(x):
        return jnp.sum(x), jnp.log(x), jnp.cos(x)

    total, log, cos = record(jax.make_jaxpr(both)(0.0), inputs([0.0]), until_bad=True)
    assert float(total.data) == 0.0 and log.inf and cos is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64", "float8_e5m2"])
def test_what_an_array_holds(dtype):
    x = jnp.array([1.0, jnp.inf, 2.0], dtype)
    assert holds(x) == (False, True) and Value(x, None).first("inf") == (1,)
    assert holds(jnp.array([1.0, jnp.nan], dtype)) == (True, False)
    assert holds(jnp.ones(3, dtype)) == (False, False)
    assert holds(np.arange(3)) == (False, False)
