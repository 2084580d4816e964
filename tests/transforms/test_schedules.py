"""Schedules have Optax's values, and take traced numbers where Optax's raise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transforms.stepping import GRADS, PARAMS, loose

from gradjax.transforms import schedules

STEPS = np.arange(0, 130)
COSINE = "warmup_cosine_decay_schedule"
SCHEDULES = {
    "cosine": (COSINE, (0.01, 0.3, 20, 100), {"end_value": 0.02, "exponent": 1.5}),
    "cosine without warm-up": (COSINE, (0.3, 0.3, 0, 100), {}),
    "cosine of zero": (COSINE, (0.1, 0.0, 20, 100), {"end_value": 0.1}),
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


def test_schedules_are_those_of_optax():
    @jax.jit
    def values(steps):
        found = {}
        for case, (name, args, kwargs) in SCHEDULES.items():
            ours, theirs = (getattr(module, name)(*args, **kwargs) for module in (schedules, optax))
            with jax.numpy_dtype_promotion("standard"):
                expected = jax.vmap(lambda t, f=theirs: jnp.asarray(f(t), jnp.float32))(steps)
            found[case] = jax.vmap(ours)(steps), expected
        return found

    for case, (ours, expected) in values(STEPS).items():
        np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=1e-8, err_msg=case)


TRACED = {
    COSINE: lambda module, x: module.warmup_cosine_decay_schedule(0.0, x, 20, 100, 0.1 * x),
    "exponential_decay": lambda module, x: module.exponential_decay(0.3, 7, x),
    "piecewise_constant_schedule": lambda module, x: module.piecewise_constant_schedule(
        0.3, {30: x}
    ),
}


def test_schedules_take_traced_numbers_where_optax_raises():
    values = [0.1, 0.4, 0.9]

    @jax.jit
    def both(values_traced, steps):
        found = {}
        for name, make in TRACED.items():
            ours = jax.vmap(lambda x, make=make: jax.vmap(make(schedules, x))(steps))
            with jax.numpy_dtype_promotion("standard"):
                theirs = [jax.vmap(make(optax, x))(steps) for x in values]
            found[name] = ours(values_traced), theirs
        return found

    for ours, theirs in both(jnp.array(values), STEPS).values():
        for row, expected in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(row, expected, rtol=2e-6, atol=1e-8)
    for name in TRACED:
        with pytest.raises(jax.errors.TracerBoolConversionError):
            jax.eval_shape(lambda x, name=name: TRACED[name](optax, x)(50), 0.1)


def test_step_counts_may_be_traced():
    lengths = jnp.array([10, 20])
    cosine = lambda n: schedules.warmup_cosine_decay_schedule(0.0, 1.0, n, 5 * n)(15)
    drop = lambda n: schedules.piecewise_constant_schedule(1.0, [(n, 0.1)])(15)
    ours, steps = jax.jit(lambda n: (jax.vmap(cosine)(n), jax.vmap(drop)(n)))(lengths)
    expected = [float(optax.warmup_cosine_decay_schedule(0.0, 1.0, n, 5 * n)(15)) for n in (10, 20)]
    np.testing.assert_allclose(ours, expected, rtol=2e-6)
    np.testing.assert_allclose(steps, [0.1, 1.0], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_schedules_drive_optimisers_of_any_dtype(dtype):
    params = {"w": jnp.ones(3, dtype)}
    tx = optax.sgd(schedules.exponential_decay(0.5, 10, 0.5))
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["w"].dtype == dtype
    np.testing.assert_allclose(np.asarray(updates["w"], np.float32), -0.5)


LOSSES = np.concatenate(
    [np.linspace(2, 1, 8), np.full(14, 1.0), [np.nan], np.linspace(1, 0.9, 5), np.full(12, 0.95)]
)


def test_plateau_decay_is_that_of_optax_and_takes_traced_numbers():
    cases = [(cooldown, size) for cooldown in (0, 3) for size in (1, 3)]
    fixed = {"patience": 3, "rtol": 1e-3, "min_scale": 0.01}
    params, losses = {"w": np.ones(2, np.float32)}, np.float32(LOSSES)

    def scales(module, factor, cooldown, size):
        make = module.reduce_on_plateau
        tx = loose(make(factor, cooldown=cooldown, accumulation_size=size, **fixed))

        def body(state, value):
            updates, state = tx.update(params, state, params, value=value)
            return state, updates["w"][0]

        return jax.lax.scan(body, tx.init(params), losses)[1]

    @jax.jit
    def both(factors, cooldowns, sizes):
        ours = jax.vmap(
            lambda f: jax.vmap(lambda c, s: scales(schedules, f, c, s))(cooldowns, sizes)
        )
        return ours(factors), [scales(optax.contrib, 0.5, *case) for case in cases]

    ours, theirs = both(jnp.array([0.5, 0.1]), *map(jnp.array, zip(*cases, strict=True)))
    for half, tenth, expected in zip(*ours, theirs, strict=True):
        assert expected[-1] < 1, "the case has a plateau"
        np.testing.assert_allclose(half, expected, rtol=1e-6)
        assert tenth.sum() < half.sum()
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.eval_shape(lambda factor: scales(optax.contrib, factor, 0, 1), 0.5)


def test_the_warm_up_grows_by_its_factor_until_the_schedule_applies():
    @jax.jit
    def rates(steps):
        decay = schedules.exponential_decay(1.0, 10, 0.5)
        constant = schedules.growth_limited_warmup(1e-3, 1e-6, 1.02)
        decaying = schedules.growth_limited_warmup(decay, 0.1, 1.1)
        return jax.vmap(constant)(steps), jax.vmap(decaying)(steps)

    constant, decaying = (np.asarray(x, np.float64) for x in rates(np.arange(6000)))
    np.testing.assert_allclose(constant[:300], 1e-6 * 1.02 ** np.arange(300), rtol=1e-4)
    assert np.argmax(constant == np.float32(1e-3)) == 349
    assert (constant[349:] == np.float32(1e-3)).all()
    assert decaying[5] == pytest.approx(0.1 * 1.1**5, rel=1e-5)
    assert decaying[60] == pytest.approx(2.0**-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
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
        (
            lambda: schedules.reduce_on_plateau().update(GRADS, None, PARAMS),
            r"it follows the loss",
        ),
    ],
)
def test_bad_input_is_refused_with_the_value_and_the_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
