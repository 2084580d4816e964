"""Guards, projections, schedules and `watch`: what a bad step leaves behind, and what training does
after it.

The contract that they share with all rules is in test_transforms.py.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradjax.transforms import guards, projections, schedules, telemetry, watching

PARAMS = {"a": jnp.array([1.0, -2.0, 3.0]), "b": {"w": jnp.array([[0.5, -1.0], [2.0, 4.0]])}}
GRADS = jax.tree.map(lambda x: 0.1 * x + 0.05, PARAMS)


def loose(tx):
    """Optax's optimisers, some of which add integers to floats: strict promotion is for what wraps
    them."""

    def update(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return optax.with_extra_args_support(tx).update(*args, **kwargs)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def adam(learning_rate):
    return loose(optax.adam(learning_rate))


GUARDS = {
    "skip_non_finite": guards.skip_non_finite,
    "repair": lambda tx: guards.skip_non_finite(tx, repair=True),
    "skip_spikes": lambda tx: guards.skip_spikes(tx, window=4),
    "freeze_diverged": guards.freeze_diverged,
    "restore_moments": guards.restore_moments,
    "watch": watching.watch,
}


def spoiled(value, grads=GRADS):
    return grads | {"b": {"w": grads["b"]["w"].at[1, 0].set(value)}}


def run(tx, stream, params=PARAMS, jit=True, **extra):
    """The parameters and the state after a list of gradients."""
    state = jax.jit(tx.init)(params) if jit else tx.init(params)
    update = jax.jit(tx.update) if jit else tx.update
    for grads in stream:
        updates, state = update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


def inner(state):
    return state.memory.inner_state


def read(state, field):
    return next(float(v) for k, v in telemetry(state).items() if k.endswith("/" + field))


# -- every guard ------------------------------------------------------------------------


@pytest.mark.parametrize("name", GUARDS)
def test_a_healthy_run_is_the_one_without_the_guard(name):
    stream = [jax.tree.map(lambda x, k=k: x * (1 + 0.1 * k), GRADS) for k in range(6)]
    guarded, state = run(GUARDS[name](adam(0.1)), stream)
    plain, plain_state = run(adam(0.1), stream)
    chex.assert_trees_all_close(
        (guarded, inner(state)), (plain, plain_state), rtol=1e-6
    )  # two programs: not bitwise
    if name != "watch":
        assert read(state, "clip_fraction") == 0


# -- non-finite steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_skipped_step_has_never_been(value):
    tx = guards.skip_non_finite(adam(0.1))
    _, before = run(tx, [GRADS, GRADS])
    updates, after = jax.jit(tx.update)(spoiled(value), before, PARAMS)
    chex.assert_trees_all_equal(inner(after), inner(before))
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(PARAMS))
    with_it, state = run(tx, [GRADS, GRADS, spoiled(value), GRADS])
    without, plain = run(tx, [GRADS] * 3)
    chex.assert_trees_all_equal((with_it, inner(state)), (without, inner(plain)))
    assert (
        read(state, "skipped"),
        read(state, "first_bad_step"),
        read(state, "clip_fraction"),
    ) == (1, 2, 0.25)
    assert guards.leaf_name(PARAMS, int(read(state, "first_bad_leaf"))) == "['b']['w']"


def test_it_never_gives_in_where_apply_if_finite_does():
    stream = [spoiled(jnp.nan)] * 4
    ours, _ = run(guards.skip_non_finite(optax.sgd(0.1)), stream)
    theirs, _ = run(optax.apply_if_finite(optax.sgd(0.1), 2), stream)
    chex.assert_trees_all_equal(ours, PARAMS)
    assert np.isnan(theirs["b"]["w"]).any(), "the control"


def test_repair_takes_the_step_with_the_other_entries():
    zeroed, state = run(guards.skip_non_finite(adam(0.1), repair=True), [GRADS, spoiled(jnp.nan)])
    expected, _ = run(adam(0.1), [GRADS, spoiled(0.0)])
    chex.assert_trees_all_close(zeroed, expected, rtol=1e-6)
    assert read(state, "clipped") == pytest.approx(1 / 7) and read(state, "skipped") == 0


def test_an_update_that_the_optimiser_itself_spoils_is_skipped_too():
    broken = optax.stateless(lambda updates, params: jax.tree.map(lambda g: g / 0.0, updates))
    params, state = run(guards.skip_non_finite(broken), [GRADS])
    chex.assert_trees_all_equal(params, PARAMS)
    assert read(state, "skipped") == 1


# -- spikes --------------------------------------------------------------------------------------------


def norms(values):
    return [{"w": jnp.full((4,), v / 2, jnp.float32)} for v in values]


def test_a_spike_is_skipped_and_the_next_one_is_seen_as_well():
    """Mean and deviation, as in the source, would be blind for the rest of the window after the
    first spike."""
    rng = np.random.default_rng(0)
    values = np.exp(0.1 * rng.standard_normal(24))
    values[[16, 18, 21]] = [1e20, 30.0, np.inf]
    tx, params = guards.skip_spikes(optax.sgd(1.0), window=12), {"w": jnp.zeros(4)}
    state, skipped = tx.init(params), []
    for k, grads in enumerate(norms(values)):
        updates, state = jax.jit(tx.update)(grads, state, params)
        if not np.asarray(updates["w"]).any():
            skipped.append(k)
    assert skipped == [16, 18, 21] and read(state, "skipped") == 3
    assert values[18] < values[6:18].mean() + 6 * values[6:18].std(), (
        "the control: hidden by the first"
    )


def test_the_limit_is_that_of_the_formula():
    values = np.random.default_rng(1).uniform(0.5, 2.0, 9)
    tx, params = (
        guards.skip_spikes(optax.sgd(1.0), deviations=3.0, factor=1.1, window=6),
        {"w": jnp.zeros(4)},
    )
    _, state = run(tx, norms(values), params)
    history = np.log2(values[2:8])
    middle = np.median(history)
    limit = middle + max(3 * 1.4826 * np.median(np.abs(history - middle)), np.log2(1.1))
    assert read(state, "limit") == pytest.approx(limit, abs=1e-5)


def test_a_level_that_stays_is_accepted_after_half_a_window():
    tx, params = guards.skip_spikes(optax.sgd(1.0), window=8), {"w": jnp.zeros(4)}
    _, state = run(tx, norms([1.0] * 8 + [100.0] * 8), params)
    assert 3 <= read(state, "skipped") <= 5


def test_zero_gradients_pass_and_are_not_remembered():
    _, state = run(
        guards.skip_spikes(optax.sgd(1.0), window=4), norms([0.0] * 6 + [1.0]), {"w": jnp.zeros(4)}
    )
    assert read(state, "skipped") == 0


# -- divergence ----------------------------------------------------------------------------------------


def test_a_frozen_run_stays_put_and_the_last_good_parameters_can_be_had():
    good, _ = run(adam(0.1), [GRADS])  # at them, the second gradient was still finite
    stop, _ = run(adam(0.1), [GRADS] * 2)
    tx = optax.chain(optax.identity(), guards.freeze_diverged(adam(0.1)))
    params, state = run(tx, [GRADS, GRADS, spoiled(jnp.nan), GRADS, GRADS])
    chex.assert_trees_all_equal(params, stop)
    chex.assert_trees_all_equal(guards.last_good_params(state), good)
    assert read(state, "frozen_at") == 2 and guards.CAUSES[int(read(state, "cause"))] == "gradient"


@pytest.mark.parametrize(
    ("kwargs", "extra", "cause"),
    [
        ({"max_value": 5.0}, {"value": 5.1}, "value"),
        ({}, {"value": jnp.nan}, "value"),
        ({"max_param_norm": 1.0}, {}, "params"),
        ({"max_param_norm": 100.0, "max_value": 5.0}, {"value": 4.9}, ""),
    ],
)
def test_bounds_on_loss_and_parameters(kwargs, extra, cause):
    _, state = run(guards.freeze_diverged(optax.sgd(0.1), **kwargs), [GRADS], **extra)
    assert guards.CAUSES[int(read(state, "cause"))] == cause


def test_a_step_that_would_overflow_the_parameters_is_not_taken():
    huge = jax.tree.map(lambda x: 0.5e38 * x, PARAMS)
    params, state = run(guards.freeze_diverged(optax.sgd(1.0)), [spoiled(-3.4e38)], huge)
    assert (
        guards.CAUSES[int(read(state, "cause"))] == "update" and np.isfinite(params["b"]["w"]).all()
    )


def test_bounds_may_be_traced():
    def frozen(bound):
        return run(guards.freeze_diverged(optax.sgd(0.1), max_param_norm=bound), [GRADS])[
            1
        ].telemetry["cause"]

    assert jax.vmap(frozen)(jnp.array([1.0, 100.0])).tolist() == [1, 0]


# -- moments -------------------------------------------------------------------------------------------


def train(tx, num_steps=5000, spike=100, value=1e20):
    """min (w - 1)^2 / 2 from 0, one gradient of 1e20 at step 100 for the first of two weights."""

    def body(carry, step):
        params, state = carry
        grads = params - 1.0
        grads = grads.at[0].set(jnp.where(step == spike, value, grads[0]))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), params

    params = jnp.zeros(2)
    scan = jax.jit(lambda: jax.lax.scan(body, (params, tx.init(params)), jnp.arange(num_steps)))
    (end, state), path = scan()
    return np.asarray(end), path, state


@pytest.mark.parametrize("optimizer", [optax.adam, optax.rmsprop, optax.nadam, optax.adabelief])
def test_one_gradient_of_1e20_freezes_the_optimiser_for_good_and_not_the_guarded_one(optimizer):
    frozen, path, _ = train(loose(optimizer(1e-3)))
    assert abs(frozen[0] - path[101, 0]) < 1e-2 and abs(frozen[0] - 1) > 0.5, (
        "the control: Optax alone"
    )
    guarded, _, state = train(guards.restore_moments(loose(optimizer(1e-3))))
    np.testing.assert_allclose(guarded, 1, atol=5e-2)
    assert read(state, "restored") == 1 and read(state, "first_bad_step") == 100


def test_only_the_overflowed_entries_are_put_back_and_all_their_moments():
    guarded, state = run(guards.restore_moments(adam(0.1)), [GRADS, spoiled(1e20)])
    plain, plain_state = run(adam(0.1), [GRADS, spoiled(1e20)])
    before, before_state = run(adam(0.1), [GRADS])
    at = np.zeros((2, 2), bool)
    at[1, 0] = True
    moment = lambda name: [getattr(s[0], name) for s in (inner(state), plain_state, before_state)]
    for ours, new, old in ((guarded, plain, before), moment("mu"), moment("nu")):
        np.testing.assert_array_equal(ours["a"], new["a"])
        np.testing.assert_array_equal(ours["b"]["w"], np.where(at, old["b"]["w"], new["b"]["w"]))


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
    tx = guards.restore_moments(wrap(loose(optax.scale_by_adam())))
    _, state = run(tx, [GRADS, spoiled(1e20)])
    _, before = run(tx, [GRADS])
    for name in ("mu", "nu"):
        new, old = (optax.tree.get_all_with_path(s, name)[0][1]["b"]["w"] for s in (state, before))
        assert new[1, 0] == old[1, 0] and (new != old).sum() == 3


def test_factored_moments_are_restored_leaf_by_leaf():
    params = {"w": jnp.ones((128, 128)), "b": jnp.ones(3)}
    grads = jax.tree.map(lambda x: 0.1 * x, params)
    tx = guards.restore_moments(loose(optax.adafactor(0.1)))
    state, update = tx.init(params), jax.jit(tx.update)
    _, before = update(grads, state, params)
    updates, after = update(grads | {"w": grads["w"].at[3, 4].set(1e20)}, before, params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(inner(after)))
    assert np.isfinite(updates["w"]).all() and np.asarray(updates["b"]).any()


def test_a_state_that_was_damaged_before_starts_anew():
    tx = guards.restore_moments(adam(0.1))
    state = tx.init(PARAMS)
    first, *rest = inner(state)
    damaged = first._replace(nu=jax.tree.map(lambda x: jnp.full_like(x, jnp.inf), first.nu))
    state = type(state)(
        state.telemetry, state.memory._replace(inner_state=(damaged, *rest)), state.rule
    )
    for _ in range(3):
        updates, state = jax.jit(tx.update)(GRADS, state, PARAMS)
    assert all(np.asarray(u).all() for u in jax.tree.leaves(updates)), "it moves again"


# -- projections ---------------------------------------------------------------------------------------

KERNELS = {
    "dense": 3 * jax.random.normal(jax.random.key(0), (6, 5)),
    "conv": 3 * jax.random.normal(jax.random.key(1), (3, 3, 4, 5)),
    "layers": jnp.array([1e-3, 1.0, 1e15])[:, None, None]
    * jax.random.normal(jax.random.key(2), (3, 6, 6)),
}
STACKED = {"dense": False, "conv": False, "layers": True}


def is_stack(path):
    return "layers" in path


def unit_norms(w, stacked):
    w = np.asarray(w, np.float64)
    return np.sqrt((w**2).sum(1 if stacked else tuple(range(w.ndim - 1))))


def singular(w, stacked):
    w = np.asarray(w, np.float64)
    return np.linalg.norm(w if stacked else w.reshape(-1, w.shape[-1]), 2, axis=(-2, -1))


CONSTRAINTS = {
    "weight_clip": (
        lambda: projections.weight_clip(0.7),
        lambda w, _: np.abs(np.asarray(w, np.float64)),
        1,
    ),
    "max_norm": (lambda: projections.max_norm(0.7, is_stack), unit_norms, 1),
    "spectral_norm": (lambda: projections.spectral_norm(0.7, 20, is_stack), singular, 12),
}


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_projection_reaches_its_constraint_and_is_then_the_identity(name, dtype):
    make, measure, num_steps = CONSTRAINTS[name]
    tx = make()
    kernels = KERNELS if dtype == jnp.float32 else {"layers": KERNELS["layers"]}
    params = jax.tree.map(lambda x: x.astype(dtype), kernels)
    zeros = optax.tree.zeros_like(params)
    # p + (P(p) - p) is P(p) to a rounding of p: two steps where p is 1e15
    projected, _ = run(tx, [zeros] * (num_steps + 1), params)
    eps = float(jnp.finfo(dtype).eps)
    for key, stacked in ((k, STACKED[k]) for k in kernels):
        bound = 0.7 + 0.7 * (2e-3 if name == "spectral_norm" else 0) + 8 * eps
        assert measure(projected[key], stacked).max() <= bound
        assert measure(projected[key], stacked).max() >= 0.6, "projected onto, not into"
    again, _ = run(tx, [zeros] * (num_steps + 1), projected)
    chex.assert_trees_all_close(again, projected, rtol=4 * eps if name != "spectral_norm" else 1e-2)
    np.testing.assert_allclose(  # the layer inside the bound was never touched
        np.asarray(projected["layers"][0], np.float32),
        np.asarray(params["layers"][0], np.float32),
        rtol=0,
    )


def test_proximal_l1_is_the_soft_threshold_and_makes_exact_zeros():
    params, grads = {"w": jnp.array([1.0, -1.0, 0.1, 0.0])}, {"w": jnp.array([0.5, 0.5, 0.1, 0.0])}
    tx = optax.chain(
        optax.sgd(0.1),
        projections.proximal_l1(2.0, schedules.piecewise_constant_schedule(0.1, {1: 0.5})),
    )
    out, _ = run(tx, [grads], params)
    np.testing.assert_allclose(out["w"], [0.75, -0.85, 0.0, 0.0], atol=1e-6)
    assert out["w"][2] == 0
    out, _ = run(
        tx, [grads, optax.tree.zeros_like(grads)], params
    )  # the schedule halves the threshold
    np.testing.assert_allclose(out["w"], [0.65, -0.75, 0.0, 0.0], atol=1e-6)


def test_coupled_l1_adds_the_subgradient():
    updates, _ = run_once(
        projections.add_l1(0.5), {"w": jnp.ones(3)}, {"w": jnp.array([2.0, -2.0, 0.0])}
    )
    np.testing.assert_array_equal(updates["w"], [1.5, 0.5, 1.0])


def run_once(tx, updates, params):
    return tx.update(updates, tx.init(params), params)


# -- schedules -----------------------------------------------------------------------------------------

STEPS = jnp.arange(0, 130)
SCHEDULES = {
    "cosine": (
        "warmup_cosine_decay_schedule",
        (0.01, 0.3, 20, 100),
        {"end_value": 0.02, "exponent": 1.5},
    ),
    "cosine without warm-up": ("warmup_cosine_decay_schedule", (0.3, 0.3, 0, 100), {}),
    "cosine of zero": ("warmup_cosine_decay_schedule", (0.1, 0.0, 20, 100), {"end_value": 0.1}),
    "exponential": (
        "exponential_decay",
        (0.3, 7, 0.8),
        {"transition_begin": 11, "end_value": 0.01},
    ),
    "staircase": ("exponential_decay", (0.3, 7, 0.8), {"staircase": True}),
    "growing": ("exponential_decay", (0.3, 7, 1.2), {"end_value": 2.0}),
    "rate zero": ("exponential_decay", (0.3, 7, 0.0), {}),
    "steps": ("piecewise_constant_schedule", (0.3, {10: 0.5, 60: 0.1}), {}),
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_schedules_are_those_of_optax(case):
    name, args, kwargs = SCHEDULES[case]
    ours, theirs = (getattr(module, name)(*args, **kwargs) for module in (schedules, optax))
    with jax.numpy_dtype_promotion("standard"):
        expected = jax.vmap(lambda t: jnp.asarray(theirs(t), jnp.float32))(STEPS)
    np.testing.assert_allclose(jax.vmap(ours)(STEPS), expected, rtol=2e-6, atol=1e-8)
    np.testing.assert_allclose(jax.jit(ours)(30), expected[30], rtol=2e-6, atol=1e-8)


TRACED = {
    "warmup_cosine_decay_schedule": lambda module, x: module.warmup_cosine_decay_schedule(
        0.0, x, 20, 100, 0.1 * x
    ),
    "exponential_decay": lambda module, x: module.exponential_decay(0.3, 7, x),
    "piecewise_constant_schedule": lambda module, x: module.piecewise_constant_schedule(
        0.3, {30: x}
    ),
}


@pytest.mark.parametrize("name", TRACED)
def test_schedules_take_traced_numbers_where_optax_raises(name):
    values = jnp.array([0.1, 0.4, 0.9])
    ours = jax.vmap(lambda x: jax.vmap(TRACED[name](schedules, x))(STEPS))(values)
    with jax.numpy_dtype_promotion("standard"):
        for row, x in zip(ours, values.tolist(), strict=True):
            expected = jax.vmap(lambda t, x=x: TRACED[name](optax, x)(t))(STEPS)
            np.testing.assert_allclose(row, expected, rtol=2e-6, atol=1e-8)
        with pytest.raises(jax.errors.TracerBoolConversionError):
            jax.vmap(lambda x: TRACED[name](optax, x)(50))(values)


def test_step_counts_may_be_traced():
    lengths = jnp.array([10, 20])
    ours = jax.vmap(lambda n: schedules.warmup_cosine_decay_schedule(0.0, 1.0, n, 5 * n)(15))(
        lengths
    )
    expected = [float(optax.warmup_cosine_decay_schedule(0.0, 1.0, n, 5 * n)(15)) for n in (10, 20)]
    np.testing.assert_allclose(ours, expected, rtol=2e-6)
    steps = jax.vmap(lambda n: schedules.piecewise_constant_schedule(1.0, [(n, 0.1)])(15))(lengths)
    np.testing.assert_allclose(steps, [0.1, 1.0], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_schedules_drive_optimisers_of_any_dtype(dtype):
    params = {"w": jnp.ones(3, dtype)}
    updates, _ = run_once(optax.sgd(schedules.exponential_decay(0.5, 10, 0.5)), params, params)
    assert updates["w"].dtype == dtype
    np.testing.assert_allclose(np.asarray(updates["w"], np.float32), -0.5)


LOSSES = np.concatenate(
    [np.linspace(2, 1, 8), np.full(14, 1.0), [np.nan], np.linspace(1, 0.9, 5), np.full(12, 0.95)]
)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("cooldown", [0, 3])
def test_plateau_decay_is_that_of_optax_and_takes_traced_factors(cooldown, size):
    kwargs = {
        "patience": 3,
        "rtol": 1e-3,
        "cooldown": cooldown,
        "accumulation_size": size,
        "min_scale": 0.01,
    }
    params = {"w": jnp.ones(2)}

    def scales(tx):
        def body(state, value):
            updates, state = tx.update(params, state, params, value=value)
            return state, updates["w"][0]

        return jax.lax.scan(body, tx.init(params), jnp.asarray(LOSSES, jnp.float32))[1]

    expected = scales(loose(optax.contrib.reduce_on_plateau(0.5, **kwargs)))
    assert expected[-1] < 1, "the case has a plateau"
    np.testing.assert_allclose(
        scales(schedules.reduce_on_plateau(0.5, **kwargs)), expected, rtol=1e-6
    )
    lanes = jax.vmap(lambda factor: scales(schedules.reduce_on_plateau(factor, **kwargs)))(
        jnp.array([0.5, 0.1])
    )
    np.testing.assert_allclose(lanes[0], expected, rtol=1e-6)
    assert lanes[1].sum() < lanes[0].sum()
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.vmap(lambda factor: scales(optax.contrib.reduce_on_plateau(factor, **kwargs)))(
            jnp.array([0.5])
        )


def test_the_warm_up_grows_by_its_factor_until_the_schedule_rules():
    rates = np.asarray(
        jax.vmap(schedules.growth_limited_warmup(1e-3, 1e-6, 1.02))(jnp.arange(6000)), np.float64
    )
    np.testing.assert_allclose(rates[:300], 1e-6 * 1.02 ** np.arange(300), rtol=1e-4)
    assert np.argmax(rates == np.float32(1e-3)) == 349 and (rates[349:] == np.float32(1e-3)).all()
    decaying = schedules.growth_limited_warmup(schedules.exponential_decay(1.0, 10, 0.5), 0.1, 1.1)
    assert float(decaying(5)) == pytest.approx(0.1 * 1.1**5, rel=1e-5) and float(
        decaying(60)
    ) == pytest.approx(2.0**-6)


# -- watch ---------------------------------------------------------------------------------------------


def test_watch_measures_every_layer_of_a_stack():
    params = {"layers": jnp.full((3, 4), 2.0), "head": jnp.full((2, 2), 1e-30)}
    grads = {
        "layers": jnp.asarray(np.outer([1e-40, 1.0, 1e38], np.ones(4)), jnp.float32),
        "head": jnp.zeros((2, 2)),
    }
    tx = watching.watch(optax.sgd(0.5), stacked=lambda path: "layers" in path)
    _, state = run_once(tx, grads, params)
    seen = telemetry(state)
    expected = np.log2(2 * np.array([1e-40, 1.0, 1e38]))
    np.testing.assert_allclose(seen["0.watch/log2_grad/['layers']"], expected, rtol=1e-5)
    np.testing.assert_allclose(
        seen["0.watch/log2_update/['layers']"][1:], expected[1:] - 1, rtol=1e-5
    )
    np.testing.assert_allclose(
        seen["0.watch/log2_ratio/['layers']"][1:], expected[1:] - 3, rtol=1e-5
    )
    assert seen["0.watch/log2_grad/['head']"] == seen["0.watch/log2_ratio/['head']"] == -np.inf
    np.testing.assert_allclose(seen["0.watch/log2_param/['head']"], np.log2(2e-30), rtol=1e-5)
    assert seen["0.watch/first_bad_leaf"] == -1


def test_watch_names_the_first_leaf_and_step_that_were_not_finite():
    nan = {"a": GRADS["a"].at[0].set(jnp.nan), "b": GRADS["b"]}
    _, state = run(
        watching.watch(guards.skip_non_finite(adam(0.1))), [GRADS, GRADS, spoiled(jnp.inf), nan]
    )
    seen = telemetry(state)
    assert (seen["0.watch/first_bad_leaf"], seen["0.watch/first_bad_step"]) == (1, 2)
    assert seen["0.0.skip_non_finite/skipped"] == 2, "the rules inside are read as well"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
def test_the_norms_of_watch_are_right_at_every_magnitude(dtype):
    """Leaves small and large, stacked or not; from the smallest number to the largest, and one tree
    of all of them."""
    rng, shapes = (
        np.random.default_rng(0),
        [(), (3,), (5, 4), (300, 7), (3, 40, 20), (4, 2), (2, 0), (0, 2)],
    )
    flags = [False, False, False, False, True, True, False, True]
    info = jnp.finfo("float32" if dtype == "complex64" else dtype)
    low, high = np.log10(float(info.smallest_subnormal)), np.log10(float(info.max))
    norms = jax.jit(lambda leaves: watching.log2_norms(leaves, flags))
    for exponent in [*np.linspace(low, high, 20), None]:
        sizes = (
            rng.uniform(low, high, len(shapes))
            if exponent is None
            else np.full(len(shapes), exponent)
        )
        draws = [
            rng.uniform(0.5, 1, s) * rng.choice([-1, 1], s) * 10.0**e
            for s, e in zip(shapes, sizes, strict=True)
        ]
        leaves = [jnp.asarray(np.asarray(x).astype(jnp.dtype(dtype))) for x in draws]
        squares = [np.abs(np.asarray(x).astype(np.complex128)) ** 2 for x in leaves]
        sums = [
            x.sum(tuple(range(flag, x.ndim))).ravel()
            for x, flag in zip(squares, flags, strict=True)
        ]
        with np.errstate(divide="ignore"):
            np.testing.assert_allclose(
                norms(leaves), 0.5 * np.log2(np.concatenate(sums)), rtol=1e-6, atol=1e-5
            )
    bad = [
        x.at[(0,) * x.ndim].set(value)
        for x, value in zip(leaves[:2], (jnp.inf, jnp.nan), strict=True)
    ]
    np.testing.assert_array_equal(watching.log2_norms(bad, flags[:2]), [np.inf, np.nan])


def test_watch_keeps_the_rows_of_the_last_steps_and_telemetry_reads_the_newest():
    tx = watching.watch(optax.sgd(0.5), keep=3)
    _, state = run(tx, [jax.tree.map(lambda x, k=k: x * 2.0**k, GRADS) for k in range(5)])
    grads = state.telemetry["figures"].values[:, 0]
    np.testing.assert_allclose(np.diff(grads, axis=0), 1.0, rtol=1e-5)
    seen = telemetry(state)
    assert [k for k in seen if "grad" in k] == [
        "0.watch/log2_grad/['a']",
        "0.watch/log2_grad/['b']['w']",
    ]
    assert seen["0.watch/log2_grad/['b']['w']"] == grads[-1, 1]
    traced = jax.jit(telemetry)(state)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, traced), jax.tree.map(np.asarray, seen))
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    assert telemetry(stacked)["0.watch/log2_grad/['a']"].tolist() == [grads[-1, 0]] * 2
    assert len(jax.tree.leaves(state)) == 4, "a step returns four arrays more"


@pytest.mark.parametrize("name", GUARDS)
def test_a_fresh_state_may_be_donated(name):
    tx = watching.watch(GUARDS[name](adam(0.1)))
    jax.jit(tx.update, donate_argnums=(1,))(GRADS, tx.init(PARAMS), PARAMS)


def test_watch_may_measure_only_some_steps():
    stream = [jax.tree.map(lambda x, k=k: x * 2.0**k, GRADS) for k in range(5)]
    third, always = watching.watch(optax.sgd(0.1), every=3), watching.watch(optax.sgd(0.1))
    for measured, steps in ((1, 3), (4, 4), (4, 5)):
        seen, expected = run(third, stream[:steps])[1], run(always, stream[:measured])[1]
        assert (
            telemetry(seen)["0.watch/log2_grad/['a']"]
            == telemetry(expected)["0.watch/log2_grad/['a']"]
        )


# -- bad input -----------------------------------------------------------------------------------------

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
        lambda: guards.last_good_params(optax.sgd(1.0).init(PARAMS)),
        r"holds 0 freeze_diverged; one is needed",
    ),
    (lambda: guards.leaf_name(PARAMS, 7), r"index is 7; the tree has 2 leaves"),
    (lambda: watching.watch(optax.sgd(1.0), every=0), r"every is 0; an integer in \[1, inf\)"),
    (lambda: watching.watch(optax.sgd(1.0), keep=0), r"keep is 0; an integer in \[1, inf\)"),
    (lambda: projections.weight_clip(-1.0), r"max_delta is -1\.0; a number in \[0, inf\]"),
    (lambda: projections.max_norm(jnp.nan), r"max_norm: limit is nan"),
    (lambda: projections.spectral_norm(0.0), r"limit is 0\.0; a number in \(0, inf\]"),
    (lambda: projections.spectral_norm(1.0, 0), r"num_steps is 0; an integer in \[1, inf\]"),
    (lambda: projections.proximal_l1(-1.0, 0.1), r"strength is -1\.0"),
    (lambda: projections.add_l1(-1.0), r"strength is -1\.0"),
    (
        lambda: schedules.warmup_cosine_decay_schedule(0.0, 1.0, 20, 10),
        r"decay_steps - warmup_steps is -10",
    ),
    (lambda: schedules.exponential_decay(1.0, 10, -0.5), r"decay_rate is -0\.5"),
    (
        lambda: schedules.piecewise_constant_schedule(1.0, {3: -0.5}),
        r"the scale at step 3 is -0\.5",
    ),
    (
        lambda: schedules.growth_limited_warmup(1.0, 0.0),
        r"init_value is 0\.0; a number in \(0, inf\]",
    ),
    (
        lambda: schedules.growth_limited_warmup(1.0, 0.1, 0.9),
        r"max_growth is 0\.9; a number in \[1, inf\]",
    ),
    (lambda: schedules.reduce_on_plateau(1.5), r"factor is 1\.5; a number in \(0, 1\]"),
    (lambda: run_once(schedules.reduce_on_plateau(), GRADS, PARAMS), r"it follows the loss"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_bad_input_is_refused_with_the_value_and_the_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


NEED_PARAMS = {
    "freeze_diverged": guards.freeze_diverged(optax.sgd(1.0)),
    "watch": watching.watch(optax.sgd(1.0)),
    "weight_clip": projections.weight_clip(0.7),
    "max_norm": projections.max_norm(0.7),
    "spectral_norm": projections.spectral_norm(0.7),
    "proximal_l1": projections.proximal_l1(0.3, 0.5),
    "add_l1": projections.add_l1(0.3),
}


@pytest.mark.parametrize("name", NEED_PARAMS)
def test_rules_that_need_the_parameters_say_so(name):
    tx = NEED_PARAMS[name]
    with pytest.raises(ValueError, match=rf"{name}: .*update\(\w+, state, params\)"):
        tx.update(GRADS, jax.jit(tx.init)(PARAMS))
