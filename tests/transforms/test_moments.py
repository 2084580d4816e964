"""`restore_moments`: what a gradient whose square overflows leaves behind."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transforms.stepping import GRADS, PARAMS, adam, inner, loose, read, run, spoiled

from gradjax.transforms import restore_moments

OPTIMIZERS = (optax.adam, optax.rmsprop, optax.nadam, optax.adabelief)


def train(*transforms, num_steps=5000, spike=100, value=1e20):
    """min (w - 1)^2 / 2 from 0, one gradient of 1e20 at step 100 for the first of two weights.

    Returns, for each transform, the parameters after each step and the last state.
    """

    def run(tx):
        def body(carry, step):
            params, state = carry
            grads = params - 1.0
            grads = grads.at[0].set(jnp.where(step == spike, value, grads[0]))
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        params = jnp.zeros(2)
        (_, state), path = jax.lax.scan(body, (params, tx.init(params)), jnp.arange(num_steps))
        return path, state

    return jax.jit(lambda: [run(tx) for tx in transforms])()


@pytest.mark.parametrize(
    "optimizer",
    [optax.adam, *(pytest.param(each, marks=pytest.mark.slow) for each in OPTIMIZERS[1:])],
)
def test_one_gradient_of_1e20_freezes_the_optimiser_for_good_and_not_the_guarded_one(optimizer):
    plain = loose(optimizer(1e-3))
    (frozen, _), (guarded, state) = train(plain, restore_moments(plain))
    frozen = np.asarray(frozen)
    stays = abs(frozen[-1, 0] - frozen[100, 0]) < 1e-2 and abs(frozen[-1, 0] - 1) > 0.5
    assert stays, "the control: Optax without the guard"
    np.testing.assert_allclose(guarded[-1], 1, atol=5e-2)
    assert read(state, "restored") == 1 and read(state, "first_bad_step") == 100


def test_only_the_overflowed_entries_are_put_back_and_all_their_moments():
    guarded, state = run(restore_moments(adam()), [GRADS, spoiled(1e20)])
    plain, plain_state = run(adam(), [GRADS, spoiled(1e20)])
    before, before_state = run(adam(), [GRADS])
    at = np.zeros((2, 2), bool)
    at[1, 0] = True
    moment = lambda name: [getattr(s[0], name) for s in (inner(state), plain_state, before_state)]
    for ours, new, old in ((guarded, plain, before), moment("mu"), moment("nu")):
        np.testing.assert_array_equal(ours["a"], new["a"])
        expected = np.where(at, old["b"]["w"], new["b"]["w"])
        np.testing.assert_array_equal(ours["b"]["w"], expected)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.identity(), tx),
        lambda tx: optax.masked(tx, {"a": False, "b": True}),
        lambda tx: optax.multi_transform({"x": tx, "y": optax.sgd(0.1)}, {"a": "y", "b": "x"}),
        lambda tx: optax.inject_hyperparams(lambda learning_rate: tx)(0.1),
    ],
    ids=["chain", "masked", "multi_transform", "inject_hyperparams"],
)
def test_moments_are_found_inside_any_wrapping(wrap):
    tx = restore_moments(wrap(loose(optax.scale_by_adam())))
    _, state = run(tx, [GRADS, spoiled(1e20)])
    _, before = run(tx, [GRADS])
    for name in ("mu", "nu"):
        new, old = (
            np.asarray(optax.tree.get_all_with_path(s, name)[0][1]["b"]["w"])
            for s in (state, before)
        )
        assert new[1, 0] == old[1, 0] and (new != old).sum() == 3


def test_factored_moments_are_restored_leaf_by_leaf():
    params = {"w": np.ones((128, 128), np.float32), "b": np.ones(3, np.float32)}
    grads = {k: 0.1 * x for k, x in params.items()}
    tx = restore_moments(loose(optax.adafactor(0.1)))
    update = jax.jit(tx.update)
    _, before = update(grads, jax.jit(tx.init)(params), params)
    grads["w"][3, 4] = 1e20
    updates, after = update(grads, before, params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(inner(after)))
    assert np.isfinite(updates["w"]).all() and np.asarray(updates["b"]).any()


def test_a_state_that_was_damaged_before_starts_anew():
    tx = restore_moments(adam())
    state = tx.init(PARAMS)
    first, *rest = inner(state)
    infinite = jax.tree.map(lambda x: np.full(x.shape, np.inf, np.float32), first.nu)
    memory = state.memory._replace(inner_state=(first._replace(nu=infinite), *rest))
    state = type(state)(state.telemetry, memory, state.rule)
    for _ in range(3):
        updates, state = tx.update(GRADS, state, PARAMS)
    assert all(np.asarray(u).all() for u in jax.tree.leaves(updates)), "it moves again"
