"""Rules called outside jit: compiled once per structure, with any arguments that Optax passes."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transforms.stepping import GRADS, PARAMS, inner

from gradjax import transforms as T
from gradjax.transforms import eager


@contextlib.contextmanager
def counted_compilations():
    """A list with one entry per program compiled within the block."""
    found, is_open = [], [True]

    def listen(event, duration, **_):
        # JAX 0.8 has no way to take one listener away again.
        if is_open and event == "/jax/core/compile/backend_compile_duration":
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        is_open.clear()


def follow(tx, num_steps, state=None, **extra):
    state = tx.init(PARAMS) if state is None else state
    for _ in range(num_steps):
        out, state = tx.update(GRADS, state, PARAMS, **extra)
    return out, state


EAGER = {
    "watch, every 2": lambda: T.watch(optax.sgd(0.1), every=2),
    "spectral_norm": lambda: T.spectral_norm(0.5),
    "a chain": lambda: T.skip_non_finite(optax.chain(T.autoclip(window=3), optax.sgd(0.1))),
    "injected": lambda: optax.inject_hyperparams(T.clip_by_global_norm)(max_norm=0.1),
    "injected schedule": lambda: optax.inject_hyperparams(
        lambda learning_rate: T.watch(optax.sgd(learning_rate))
    )(optax.linear_schedule(0.1, 0.01, 9)),
}


@pytest.mark.parametrize("name", EAGER)
def test_an_eager_step_compiles_at_the_first_call_only(name):
    tx = EAGER[name]()
    _, state = follow(tx, 1)
    with counted_compilations() as compiled:
        follow(tx, 3, state)
    assert not compiled


def test_another_threshold_shares_the_program():
    follow(T.clip_by_global_norm(0.1), 1)
    with counted_compilations() as compiled:
        out = [follow(T.clip_by_global_norm(t), 1)[0] for t in (0.2, 0.4, 0.6)]
    assert not compiled
    sizes = [float(optax.tree.norm(x)) for x in out]
    np.testing.assert_allclose(sizes, [0.2, 0.4, 0.6], rtol=1e-6)


def test_the_control_a_fresh_loop_body_is_compiled_at_every_call():
    def turn(x):
        return jax.lax.while_loop(lambda x: x < 0, lambda x: x + 1, x)

    turn(jnp.zeros(()))
    with counted_compilations() as compiled:
        jax.lax.while_loop(lambda x: x < 0, lambda x: x + 1, jnp.zeros(()))
    assert len(compiled) == 1


def test_extra_arguments_reach_the_optimiser_inside():
    """Among them a function, as L-BFGS takes it, which no program may hold on to."""
    factor = [2.0]

    def value_fn(params):
        return factor[0] * jnp.sum(params["a"])

    def update(updates, state, params=None, *, value, grad, value_fn):
        return jax.tree.map(lambda g: (value + value_fn(params)) * g, grad), state

    inside = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = T.watch(T.freeze_diverged(T.skip_non_finite(inside)))
    state = tx.init(PARAMS)
    extra = {"value": 1.0, "grad": GRADS, "value_fn": value_fn}
    for factor[0] in (2.0, 5.0):
        out, state = tx.update(PARAMS, state, PARAMS, **extra)
        np.testing.assert_allclose(out["a"], (1 + factor[0] * 2.0) * GRADS["a"], rtol=1e-6)


def test_a_python_number_serves_as_the_loss():
    _, state = follow(T.freeze_diverged(optax.identity(), max_value=5.0), 1, value=5.1)
    assert T.CAUSES[int(state.telemetry["cause"])] == "value"


def test_an_optimiser_that_looks_at_its_numbers_works_inside_a_wrapper():
    """It cannot be traced, so only our part may be compiled."""

    def update(updates, state, params=None):
        size = float(optax.tree.norm(updates))
        return updates, [*state, size]

    tx = T.watch(optax.GradientTransformation(lambda params: [0.0], update))
    _, state = follow(tx, 2)
    assert len(inner(state)) == 3


def test_a_state_that_no_program_can_hold_is_stepped_without_one():
    inside = optax.GradientTransformation(lambda params: "a word", lambda g, s, params=None: (g, s))
    out, state = follow(T.watch(inside), 1)
    chex.assert_trees_all_equal(out, GRADS)
    assert inner(state) == "a word"


def test_what_is_not_an_array_or_is_traced_is_not_compiled():
    assert eager._all_concrete((GRADS, np.ones(2), 1.0, None))
    assert not eager._all_concrete((GRADS, {"a name": "not an array"}))
    seen = []
    jax.eval_shape(lambda x: seen.append(eager._all_concrete((GRADS, x))), 1.0)
    assert seen == [False]


def test_shardings_are_kept():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    params = jax.device_put({"w": jnp.ones(4)}, sharding)
    tx = T.clip_by_global_norm(0.1)
    out, _ = tx.update(params, tx.init(params), params)
    assert out["w"].sharding.is_equivalent_to(sharding, 1)


def test_under_a_trace_the_update_is_inlined():
    """A call within the program would be a boundary for XLA's fusion."""
    tx, state = T.add_l1(0.1), T.add_l1(0.1).init(PARAMS)
    jaxpr = jax.make_jaxpr(lambda g: tx.update(g, state, PARAMS)[0])(GRADS)
    ours = [e for e in jaxpr.eqns if e.primitive.name in ("jit", "pjit")]
    assert not any("run" in str(e.params.get("name")) for e in ours)
