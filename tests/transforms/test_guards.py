"""Guards: what a bad step leaves behind, and what training does after it.

The contract that they share with all rules is in test_rule.py.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transforms.stepping import GRADS, PARAMS, adam, inner, read, run, spoiled

from gradjax.transforms import guards, moments, watching

GUARDS = {
    "skip_non_finite": guards.skip_non_finite,
    "repair": lambda tx: guards.skip_non_finite(tx, repair=True),
    "skip_spikes": lambda tx: guards.skip_spikes(tx, window=4),
    "freeze_diverged": guards.freeze_diverged,
    "restore_moments": moments.restore_moments,
    "watch": watching.watch,
}


# Every guard


@pytest.mark.parametrize("name", GUARDS)
def test_a_healthy_run_is_the_one_without_the_guard(name):
    stream = [jax.tree.map(lambda x, k=k: x * (1 + 0.1 * k), GRADS) for k in range(6)]
    guarded, state = run(GUARDS[name](adam()), stream)
    plain, plain_state = run(adam(), stream)
    # two programs: not bitwise
    chex.assert_trees_all_close((guarded, inner(state)), (plain, plain_state), rtol=1e-6)
    if name != "watch":
        assert read(state, "clip_fraction") == 0


@pytest.mark.parametrize("name", GUARDS)
def test_a_fresh_state_may_be_donated(name):
    """No two arrays of a state, or of a state and the parameters, are one buffer."""
    tx = GUARDS[name](adam())
    arrays = jax.tree.leaves((PARAMS, tx.init(PARAMS)))
    assert len({x.unsafe_buffer_pointer() for x in arrays}) == len(arrays)


# Non-finite steps


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_skipped_step_has_never_been(value):
    tx = guards.skip_non_finite(adam())
    _, before = run(tx, [GRADS, GRADS])
    updates, after = tx.update(spoiled(value), before, PARAMS)
    chex.assert_trees_all_equal(inner(after), inner(before))
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    with_it, state = run(tx, [GRADS, GRADS, spoiled(value), GRADS])
    without, plain = run(tx, [GRADS] * 3)
    chex.assert_trees_all_equal((with_it, inner(state)), (without, inner(plain)))
    assert (read(state, "skipped"), read(state, "first_bad_step")) == (1, 2)
    assert read(state, "clip_fraction") == 0.25
    assert guards.leaf_name(PARAMS, int(read(state, "first_bad_leaf"))) == "['b']['w']"


def test_it_never_gives_in_where_apply_if_finite_does():
    stream = [spoiled(jnp.nan)] * 4
    ours, _ = run(guards.skip_non_finite(optax.sgd(0.1)), stream)
    theirs, _ = run(optax.apply_if_finite(optax.sgd(0.1), 2), stream)
    chex.assert_trees_all_equal(ours, PARAMS)
    assert np.isnan(theirs["b"]["w"]).any(), "the control"


def test_repair_takes_the_step_with_the_other_entries():
    zeroed, state = run(guards.skip_non_finite(adam(), repair=True), [GRADS, spoiled(jnp.nan)])
    expected, _ = run(adam(), [GRADS, spoiled(0.0)])
    chex.assert_trees_all_close(zeroed, expected, rtol=1e-6)
    assert read(state, "clipped") == pytest.approx(1 / 7) and read(state, "skipped") == 0


def test_an_update_that_the_optimiser_itself_spoils_is_skipped_too():
    broken = optax.stateless(lambda updates, params: jax.tree.map(lambda g: g / 0.0, updates))
    params, state = run(guards.skip_non_finite(broken), [GRADS])
    chex.assert_trees_all_equal(params, PARAMS)
    assert read(state, "skipped") == 1


# Spikes


def norms(values):
    return [{"w": np.full(4, v / 2, np.float32)} for v in values]


WEIGHTS = {"w": jnp.zeros(4)}


def test_a_spike_is_skipped_and_the_next_one_is_seen_as_well():
    """Mean and deviation, as in the source, would be blind to the second for a whole window."""
    rng = np.random.default_rng(0)
    values = np.exp(0.1 * rng.standard_normal(24))
    values[[16, 18, 21]] = [1e20, 30.0, np.inf]
    tx = guards.skip_spikes(optax.sgd(1.0), window=12)
    state, skipped = tx.init(WEIGHTS), []
    for k, grads in enumerate(norms(values)):
        updates, state = tx.update(grads, state, WEIGHTS)
        if not np.asarray(updates["w"]).any():
            skipped.append(k)
    assert skipped == [16, 18, 21] and read(state, "skipped") == 3
    hidden = values[18] < values[6:18].mean() + 6 * values[6:18].std()
    assert hidden, "the control: hidden by the first"


def test_the_limit_is_that_of_the_formula():
    values = np.random.default_rng(1).uniform(0.5, 2.0, 9)
    tx = guards.skip_spikes(optax.sgd(1.0), deviations=3.0, factor=1.1, window=6)
    _, state = run(tx, norms(values), WEIGHTS)
    history = np.log2(values[2:8])
    middle = np.median(history)
    limit = middle + max(3 * 1.4826 * np.median(np.abs(history - middle)), np.log2(1.1))
    assert read(state, "limit") == pytest.approx(limit, abs=1e-5)


def test_a_level_that_stays_is_accepted_after_half_a_window():
    tx = guards.skip_spikes(optax.sgd(1.0), window=6)
    _, state = run(tx, norms([1.0] * 6 + [100.0] * 6), WEIGHTS)
    assert 2 <= read(state, "skipped") <= 4


def test_zero_gradients_pass_and_are_not_remembered():
    tx = guards.skip_spikes(optax.sgd(1.0), window=6)
    _, state = run(tx, norms([0.0] * 8 + [1.0]), WEIGHTS)
    assert read(state, "skipped") == 0


# Divergence


def test_a_frozen_run_stays_put_and_keeps_the_last_good_parameters():
    good, _ = run(adam(), [GRADS])  # at them, the second gradient was still finite
    stop, _ = run(adam(), [GRADS] * 2)
    tx = optax.chain(optax.identity(), guards.freeze_diverged(adam()))
    params, state = run(tx, [GRADS, GRADS, spoiled(jnp.nan), GRADS, GRADS])
    chex.assert_trees_all_equal(params, stop)
    chex.assert_trees_all_equal(guards.last_good_params(state), good)
    assert read(state, "frozen_at") == 2 and guards.CAUSES[int(read(state, "cause"))] == "gradient"


@pytest.mark.parametrize(
    ("kwargs", "value", "cause"),
    [
        ({"max_value": 5.0}, 5.1, "value"),
        ({}, np.nan, "value"),
        ({"max_param_norm": 1.0}, 0.0, "params"),
        ({"max_param_norm": 100.0, "max_value": 5.0}, 4.9, ""),
    ],
)
def test_bounds_on_loss_and_parameters(kwargs, value, cause):
    _, state = run(guards.freeze_diverged(optax.sgd(0.1), **kwargs), [GRADS], value=value)
    assert guards.CAUSES[int(read(state, "cause"))] == cause


def test_a_step_that_would_overflow_the_parameters_is_not_taken():
    huge = jax.tree.map(lambda x: 0.5e38 * x, PARAMS)
    params, state = run(guards.freeze_diverged(optax.sgd(1.0)), [spoiled(-3.4e38)], huge)
    assert guards.CAUSES[int(read(state, "cause"))] == "update"
    assert np.isfinite(params["b"]["w"]).all()


def test_bounds_may_be_traced():
    def cause(bound):
        guard = guards.freeze_diverged(optax.sgd(0.1), max_param_norm=bound)
        return run(guard, [GRADS])[1].telemetry["cause"]

    assert jax.jit(jax.vmap(cause))(jnp.array([1.0, 100.0])).tolist() == [1, 0]


# Bad input

REFUSED = [
    (
        lambda: guards.skip_spikes(optax.sgd(1.0), deviations=-1.0),
        r"deviations is -1\.0; a number in \[0, inf\]",
    ),
    (
        lambda: guards.skip_spikes(optax.sgd(1.0), factor=0.5),
        r"factor is 0\.5; a number in \[1, inf\]",
    ),
    (
        lambda: guards.skip_spikes(optax.sgd(1.0), window=1),
        r"window is 1; an integer in \[2, inf\]",
    ),
    (lambda: guards.freeze_diverged(optax.sgd(1.0), max_param_norm=0.0), r"max_param_norm is 0\.0"),
    (lambda: guards.freeze_diverged(optax.sgd(1.0), max_value=jnp.nan), r"max_value is nan"),
    (
        lambda: guards.freeze_diverged(optax.sgd(1.0)).update(GRADS, None),
        r"freeze_diverged: .*update\(grads, state, params\)",
    ),
    (
        lambda: guards.last_good_params(optax.sgd(1.0).init(PARAMS)),
        r"holds 0 freeze_diverged; one is needed",
    ),
    (lambda: guards.leaf_name(PARAMS, 7), r"index is 7; the tree has 2 leaves"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_bad_input_is_refused_with_the_value_and_the_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
