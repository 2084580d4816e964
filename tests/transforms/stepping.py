"""For the tests of transforms: one small tree of parameters, and runs of a few steps on it."""

import jax
import jax.numpy as jnp
import optax

from gradjax.transforms import telemetry

PARAMS = {"a": jnp.array([1.0, -2.0, 3.0]), "b": {"w": jnp.array([[0.5, -1.0], [2.0, 4.0]])}}
GRADS = jax.tree.map(lambda x: 0.1 * x + 0.05, PARAMS)


def loose(tx):
    """Optax's optimisers, some of which add integers to floats: strict promotion is for ours."""

    def update(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return optax.with_extra_args_support(tx).update(*args, **kwargs)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def adam(learning_rate=0.1):
    return loose(optax.adam(learning_rate))


def spoiled(value, grads=GRADS):
    """The gradients with one entry replaced."""
    return grads | {"b": {"w": grads["b"]["w"].at[1, 0].set(value)}}


def run(tx, stream, params=PARAMS, **extra):
    """The parameters and the state after a list of gradients.

    Called eagerly: our update is then one program, which every test of the rule shares.
    """
    state = tx.init(params)
    for grads in stream:
        updates, state = tx.update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


def inner(state):
    return state.memory.inner_state


def read(state, field):
    """The first telemetry of that name."""
    return next(float(v) for k, v in telemetry(state).items() if k.endswith("/" + field))
