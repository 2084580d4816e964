"""Optimisers by name: each lowers a quadratic, takes traced numbers, and is Optax's where Optax has
it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradjax.experiment import config, optimizers
from gradjax.experiment.schema import Optimizer
from gradjax.transforms import telemetry

RATES = {
    "sgd": 0.1,
    "momentum": 0.03,
    "nesterov": 0.03,
    "lbfgs": 1.0,
    "coordinate": 0.3,
    "adadelta": 30.0,
    "adagrad": 0.3,
}
START = {
    "layers": {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))},
    "readout": {"kernel": jnp.ones((2, 2))},
}


@pytest.fixture(autouse=True)
def optax_promotes():
    """Optax's Adam multiplies floats and int32 counts."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def loss(params):
    return sum(jnp.sum(x[..., 0] ** 2 + 3 * x[..., 1] ** 2) / 2 for x in jax.tree.leaves(params))


def run(tx, steps, params=START, loss=loss):
    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=loss)
        return (optax.apply_updates(params, updates), state), value

    (params, state), values = jax.lax.scan(step, (params, tx.init(params)), None, length=steps)
    return params, state, values


def settings(name, **more):
    return Optimizer(**{"name": name, "learning_rate": RATES.get(name, 0.05), **more})


@pytest.mark.slow
@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_each_lowers_a_quadratic_under_jit_and_traced_rates(name):
    def last(rate):
        return run(optimizers.build(settings(name, learning_rate=rate), 60), 60)[2][-1]

    rates = RATES.get(name, 0.05) * jnp.array([1.0, 0.0])
    trained, still = jax.jit(jax.vmap(last))(rates)
    assert trained < 0.05 * loss(START)
    assert name == "lbfgs" or np.isclose(
        still, loss(START)
    )  # a rate of 0 moves nothing; a line search makes its own


@pytest.mark.parametrize(
    "name, peer",
    [
        ("sgd", optax.sgd(0.05)),
        ("momentum", optax.sgd(0.05, 0.9)),
        ("nesterov", optax.sgd(0.05, 0.9, nesterov=True)),
        ("adam", optax.adam(0.05)),
        ("adamw", optax.adamw(0.05, mask=optimizers.kernels)),
        ("nadam", optax.nadam(0.05)),
        ("rmsprop", optax.rmsprop(0.05)),
        ("adagrad", optax.adagrad(0.05)),
        ("adadelta", optax.adadelta(0.05)),
        ("lion", optax.lion(0.05, weight_decay=0.0)),
    ],
)
def test_where_optax_has_the_optimiser_the_parameters_are_its(name, peer):
    mine = run(optimizers.build(settings(name, learning_rate=0.05), 5), 5)[0]
    theirs = run(optax.with_extra_args_support(peer), 5)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), mine, theirs)


def test_adam_without_bias_correction_is_its_formula():
    g, (b1, b2, eps) = np.array([0.5, -2.0]), (0.9, 0.999, 1e-8)
    tx = optimizers.adam_uncorrected(b1, b2)
    state, m, v = tx.init({"w": jnp.zeros(2)}), 0.0, 0.0
    for _ in range(3):
        out, state = tx.update({"w": jnp.asarray(g, jnp.float32)}, state)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        np.testing.assert_allclose(out["w"], m / (np.sqrt(v) + eps), rtol=1e-5)


@pytest.mark.parametrize("block, count", [("layer", 4), ("coordinate", 22)])
def test_coordinate_descent_moves_one_block_at_a_time_and_all_of_them(block, count):
    tx = optimizers.coordinate_descent(block, "cyclic")
    state, grads, touched = tx.init(START), jax.tree.map(jnp.ones_like, START), 0
    for _ in range(count):
        out, state = tx.update(grads, state)
        moved = sum(int(jnp.sum(x != 0)) for x in jax.tree.leaves(out))
        assert moved == (1 if block == "coordinate" else 6 if touched < 18 else 4)
        touched += moved
    assert touched == 22  # every number once in a cycle


def test_random_coordinates_are_uniform():
    tx, grads = optimizers.coordinate_descent("layer", "random"), jax.tree.map(jnp.ones_like, START)

    def step(state, _):
        out, state = tx.update(grads, state)
        return state, jnp.append(out["layers"]["bias"][:, 0], out["readout"]["kernel"][0, 0])

    counts = jax.lax.scan(step, tx.init(START), None, length=4000)[1].sum(0)
    assert np.sum((counts - 1000) ** 2 / 1000) < 16.3  # chi-squared, 3 degrees of freedom, p = .001


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in optimizers.CLIPPING if n != "none"])
def test_each_clipping_rule_reports_and_holds_an_explosion(name):
    o = settings("sgd", clipping=name, learning_rate=0.1)
    tx = optimizers.build(o, 10)
    state = tx.init(START)
    for size in (1e-3, 1e-3, 1e-3, 1e20):
        updates, state = jax.jit(tx.update)(
            jax.tree.map(lambda x, s=size: s * x, START), state, START, value=1.0
        )
    assert any(f".{name}/clip_fraction" in key for key in telemetry(state))
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(updates))
    # historical_clip and zclip are in their warm-up, and autoclip's percentile is that of four
    assert np.isfinite(largest) and (largest < 10 or name in ("historical_clip", "zclip"))


@pytest.mark.slow
@pytest.mark.parametrize("name", optimizers.GUARDS)
def test_each_guard_builds_and_trains(name):
    assert run(optimizers.build(settings("adam", guard=name), 60), 60)[2][-1] < loss(START)


def with_bad_steps(guard, bad, steps=60):
    """Parameters, state and last loss of a run whose gradient and loss are NaN at the steps
    `bad`."""
    tx = optimizers.build(settings("adam", guard=guard), steps)

    def step(carry, is_bad):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        value, grads = jax.tree.map(lambda x: jnp.where(is_bad, jnp.nan, x), (value, grads))
        updates, state = tx.update(grads, state, params, value=value)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(
        step, (START, tx.init(START)), jnp.isin(jnp.arange(steps), jnp.array(bad))
    )
    return params, state, loss(params)


@pytest.mark.parametrize(
    "guard", ["skip_non_finite", "repair_non_finite", "skip_spikes", "restore_moments"]
)
def test_a_guard_goes_on_after_a_bad_batch_and_gives_up_after_too_many(guard):
    clean = with_bad_steps(guard, [-1])[2]
    _, state, end = with_bad_steps(guard, [3, 17, 18])
    assert state.telemetry["frozen_at"] == -1 and end < 1.5 * clean + 0.01 < loss(START)
    _, state, _ = with_bad_steps(guard, list(range(10, 10 + optimizers.PATIENCE - 1)))
    assert state.telemetry["frozen_at"] == -1
    params, state, _ = with_bad_steps(guard, list(range(10, 60)))
    assert state.telemetry["frozen_at"] == 10 + optimizers.PATIENCE - 1
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(params))
    _, state, _ = with_bad_steps("none", [3])
    assert state.telemetry["frozen_at"] == 3


def test_spam_restarts_moments_and_no_schedule():
    o = settings("adam", guard="spam", schedule="cosine", decay=0.0)
    tx = optimizers.build(o, 1200)

    def step(carry, _):
        updates, state = tx.update(
            {"x": jnp.ones(())}, carry, {"x": jnp.zeros(())}, value=jnp.zeros(())
        )
        return state, -updates["x"]

    _, moved = jax.lax.scan(step, tx.init({"x": jnp.zeros(())}), None, length=1200)
    rate = jax.vmap(optimizers.learning_rate(o, 1200))(jnp.arange(1200))
    np.testing.assert_allclose(
        moved[700:900], rate[700:900], rtol=1e-3
    )  # past the reset at 500 and its warm-up
    assert run(optimizers.build(settings("sgd", guard="spam", schedule="plateau"), 60), 60)[2][
        -1
    ] < loss(START)


def test_settings_that_mean_nothing_are_refused():
    for values, words in (
        (
            {"name": "sgd", "momentum": 0.9},
            "momentum = 0.9 means nothing to optimizer.name = 'sgd'",
        ),
        ({"name": "momentum", "b2": 0.9}, "b2 = 0.9"),
        ({"max_norm": 0.5}, "means nothing to optimizer.clipping = 'none'"),
        ({"clipping": "autoclip", "max_norm": 0.5}, "choose one of clip, clip_by_global_norm"),
        ({"decay": 0.5}, "optimizer.schedule = 'constant'"),
        ({"order": "random"}, "choose one of coordinate"),
        ({"name": "lbfgs", "guard": "spam"}, "'lbfgs' has none"),
    ):
        assert words in "\n".join(optimizers.check_compatible(Optimizer(**values)))
        table = {f"optimizer.{k}": v for k, v in values.items()} | {"train.full_batch": True}
        with pytest.raises(config.ConfigError):
            config.check(config.replace(config.Experiment(), table))
    fine = Optimizer(
        name="adam", momentum=0.8, b2=0.9, clipping="clip", max_norm=0.5, schedule="step", decay=0.5
    )
    assert optimizers.check_compatible(fine) == [] == optimizers.check_compatible(Optimizer())


@pytest.mark.parametrize("name", optimizers.SCHEDULES)
def test_schedules_rise_through_the_warm_up_and_end_where_they_say(name):
    def rates(peak, warmup, decay):
        o = Optimizer(learning_rate=peak, schedule=name, warmup=warmup, decay=decay)
        return jax.vmap(optimizers.learning_rate(o, 100))(jnp.arange(101))

    values = jax.jit(jax.vmap(rates))(
        jnp.array([1.0, 2.0]), jnp.array([0.1, 0.0]), jnp.array([0.25, 0.25])
    )
    np.testing.assert_allclose(values[0, 10:], values[1, 10:] / 2, rtol=1e-5)
    fraction = jnp.arange(1, 10) / 10
    np.testing.assert_allclose(values[0, :9], values[1, :9] / 2 * fraction, rtol=1e-5)
    ends = {"constant": 1.0, "plateau": 1.0, "cosine": 0.25, "exponential": 0.25, "step": 0.0625}
    assert name not in ends or np.isclose(values[0, -1], ends[name], rtol=1e-5)


@pytest.mark.slow
def test_regularisation_is_the_formula():
    o = settings("sgd", learning_rate=0.1, l2=0.5, l1=0.25, weight_clip=0.8, weight_norm=1.0)
    grads = jax.tree.map(jnp.zeros_like, START)
    tx = optimizers.build(o, 1)
    updates, _ = tx.update(grads, tx.init(START), START, value=0.0)
    kernel = 1 - 0.1 * (
        0.5 + 0.25
    )  # then the norm of two such weights to 1, which is below the clip
    after = optax.apply_updates(START, updates)
    np.testing.assert_allclose(after["readout"]["kernel"], min(kernel, 0.5**0.5), rtol=1e-6)
    np.testing.assert_allclose(
        after["layers"]["bias"], 0.8, rtol=1e-6
    )  # neither decayed nor normed, but clipped
    decayed = optimizers.build(settings("sgd", learning_rate=0.1, weight_decay=0.5), 1)
    updates, _ = decayed.update(grads, decayed.init(START), START, value=0.0)
    np.testing.assert_allclose(updates["layers"]["kernel"], -0.05, rtol=1e-6)
    assert not np.any(updates["layers"]["bias"])


@pytest.mark.slow
def test_lbfgs_clips_the_direction_and_never_the_gradient():
    """On an ill-conditioned quadratic secant pairs of clipped gradients would be wrong; the step
    obeys the bound."""
    bound = 0.05
    tx = optimizers.build(settings("lbfgs", clipping="clip_by_global_norm", max_norm=bound), 200)
    steep = lambda p: 0.5 * (1e4 * p["w"][0] ** 2 + p["w"][1] ** 2)
    params = {"w": jnp.ones(2)}
    _, _, values = run(tx, 200, params, steep)
    assert values[-1] < 1e-6 * values[0]
    state = tx.init(params)
    grads = jax.grad(steep)(params)
    updates, _ = tx.update(grads, state, params, value=steep(params), grad=grads, value_fn=steep)
    assert float(jnp.linalg.norm(updates["w"])) <= bound * (1 + 1e-6)


def test_lbfgs_on_batches_is_refused():
    with pytest.raises(config.ConfigError, match=r"train\.full_batch = true"):
        config.check(config.replace(config.Experiment(), {"optimizer.name": "lbfgs"}))
