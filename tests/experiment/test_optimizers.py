"""Optimisers by name: each lowers a quadratic and takes traced numbers, and where Optax has it too,
the parameters are the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bounds import assert_rounding
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
    # a rate of 0 moves nothing, but L-BFGS has a line search that finds its own
    assert name == "lbfgs" or np.isclose(still, loss(START))


PEERS = {
    "sgd": optax.sgd(0.05),
    "momentum": optax.sgd(0.05, 0.9),
    "nesterov": optax.sgd(0.05, 0.9, nesterov=True),
    "adam": optax.adam(0.05),
    "adamw": optax.adamw(0.05, mask=optimizers.kernels),
    "nadam": optax.nadam(0.05),
    "rmsprop": optax.rmsprop(0.05),
    "adagrad": optax.adagrad(0.05),
    "adadelta": optax.adadelta(0.05),
    "lion": optax.lion(0.05, weight_decay=0.0),
}


@pytest.fixture(scope="module")
def five_steps():
    """{name: (our parameters, Optax's)} after five steps, by one compiled program.

    Ours come from the chain inside `freeze_diverged`; adam's also from the whole (`whole`).
    """
    small = {"dense": {"kernel": jnp.full((2, 2), 0.7), "bias": jnp.ones(2)}}

    def train(params):
        found = {}
        for name, peer in PEERS.items():
            chain = optax.chain(*optimizers._links(settings(name, learning_rate=0.05), 5))
            both = (optax.with_extra_args_support(tx) for tx in (chain, peer))
            found[name] = tuple(run(tx, 5, params)[0] for tx in both)
        whole = optimizers.build(settings("adam", learning_rate=0.05), 5)
        found["whole"] = run(whole, 5, params)[0], found["adam"][1]
        return found

    with jax.numpy_dtype_promotion("standard"):
        return jax.jit(train)(small)


@pytest.mark.parametrize("name", [*PEERS, "whole"])
def test_where_optax_has_the_optimiser_the_parameters_are_its(name, five_steps):
    """The same formula, some 20 operations a step, in another order."""
    mine, theirs = five_steps[name]
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        assert_rounding(a, b, terms=100)


def test_adam_without_bias_correction_is_its_formula():
    """A moment is a sum of n terms, and the power 1 - b^t is 1 exactly: about ten roundings."""
    g, (b1, b2, eps) = np.array([0.5, -2.0]), (0.9, 0.999, 1e-8)
    tx = optimizers.adam_uncorrected(b1, b2)
    state, m, v = tx.init({"w": jnp.zeros(2)}), 0.0, 0.0
    update = jax.jit(tx.update)
    for _ in range(3):
        out, state = update({"w": jnp.asarray(g, jnp.float32)}, state)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        # 1 - b2 has the rounding error eps / 2 of b2, which is 1 / (1 - b2) of it
        assert_rounding(out["w"], m / (np.sqrt(v) + eps), terms=20 + round(1 / (1 - b2)))


@pytest.mark.parametrize("block, count", [("layer", 4), ("coordinate", 22)])
def test_coordinate_descent_moves_one_block_at_a_time_and_all_of_them(block, count):
    tx = optimizers.coordinate_descent(block, "cyclic")
    state, grads, touched = tx.init(START), jax.tree.map(jnp.ones_like, START), 0
    update = jax.jit(tx.update)
    for _ in range(count):
        out, state = update(grads, state)
        moved = sum(np.count_nonzero(x) for x in jax.tree.leaves(out))
        assert moved == (1 if block == "coordinate" else 6 if touched < 18 else 4)
        touched += moved
    assert touched == 22  # every number once in a cycle


def test_random_coordinates_are_uniform():
    tx, grads = optimizers.coordinate_descent("layer", "random"), jax.tree.map(jnp.ones_like, START)

    def step(state, _):
        out, state = tx.update(grads, state)
        return state, jnp.append(out["layers"]["bias"][:, 0], out["readout"]["kernel"][0, 0])

    draw = jax.jit(lambda: jax.lax.scan(step, tx.init(START), None, length=4000)[1].sum(0))
    counts = np.asarray(draw())
    assert np.sum((counts - 1000) ** 2 / 1000) < 16.3  # chi-squared, 3 degrees of freedom, p = .001


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in optimizers.CLIPPING if n != "none"])
def test_each_clipping_rule_reports_and_holds_an_explosion(name):
    o = settings("sgd", clipping=name, learning_rate=0.1)
    tx = optimizers.build(o, 10)

    def step(state, size):
        updates, state = tx.update(
            jax.tree.map(lambda x: size * x, START), state, START, value=jnp.ones(())
        )
        return state, updates

    sizes = jnp.array([1e-3, 1e-3, 1e-3, 1e20])
    state, updates = jax.jit(lambda: jax.lax.scan(step, tx.init(START), sizes))()
    updates = jax.tree.map(lambda x: x[-1], updates)
    rules = optimizers.find_clipping_rules(o, START)
    assert rules
    for rule in rules:
        assert any(f".{rule}/clip_fraction" in key for key in telemetry(state))
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(updates))
    # historical_clip and zclip are in their warm-up, and autoclip's percentile is that of four
    assert np.isfinite(largest) and (largest < 10 or name in ("historical_clip", "zclip"))


def train_with_bad_steps(guard, bad, steps=60):
    """Parameters, state and last loss of runs whose gradient and loss are NaN at the steps `bad`.

    One compiled program for all the runs: `bad` is a list of lists of steps.
    """
    tx = optimizers.build(settings("adam", guard=guard), steps)

    def step(carry, is_bad):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        value, grads = jax.tree.map(lambda x: jnp.where(is_bad, jnp.nan, x), (value, grads))
        updates, state = tx.update(grads, state, params, value=value)
        return (optax.apply_updates(params, updates), state), None

    def train(is_bad):
        start = {"layers": START["layers"]}
        (params, state), _ = jax.lax.scan(step, (start, tx.init(start)), is_bad)
        return params, state.telemetry["frozen_at"], loss(params)

    is_bad = np.stack([np.isin(np.arange(steps), each) for each in bad])
    params, frozen_at, end = jax.jit(jax.vmap(train))(is_bad)
    return jax.tree.map(np.asarray, params), frozen_at.tolist(), np.asarray(end)


@pytest.mark.parametrize(
    "guard",
    [
        "skip_non_finite",
        "skip_spikes",
        pytest.param("repair_non_finite", marks=pytest.mark.slow),
        pytest.param("restore_moments", marks=pytest.mark.slow),
    ],
)
def test_a_guard_goes_on_after_a_bad_batch_and_gives_up_after_too_many(guard):
    patience, start = optimizers.PATIENCE, float(loss({"layers": START["layers"]}))
    few, nearly, many = [3, 17, 18], list(range(10, 9 + patience)), list(range(10, 60))
    params, frozen_at, end = train_with_bad_steps(guard, [[], few, nearly, many])
    assert frozen_at == [-1, -1, -1, 10 + patience - 1]
    assert end[1] < 1.5 * end[0] + 0.01 < start
    assert all(np.isfinite(x[3]).all() for x in jax.tree.leaves(params))


def test_without_a_guard_a_run_ends_at_its_first_bad_step():
    params, frozen_at, end = train_with_bad_steps("none", [[], [3]])
    assert frozen_at == [-1, 3] and end[0] < end[1]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


@pytest.mark.slow
def test_spam_restarts_moments_and_no_schedule():
    o = settings("adam", guard="spam", schedule="cosine", decay=0.0)
    tx = optimizers.build(o, 1200)

    def step(carry, _):
        updates, state = tx.update(
            {"x": jnp.ones(())}, carry, {"x": jnp.zeros(())}, value=jnp.zeros(())
        )
        return state, -updates["x"]

    @jax.jit
    def train():
        rate = jax.vmap(optimizers.learning_rate(o, 1200))(jnp.arange(1200))
        return jax.lax.scan(step, tx.init({"x": jnp.zeros(())}), None, length=1200)[1], rate

    moved, rate = train()
    # past the reset at 500 and the warm-up that follows it
    np.testing.assert_allclose(moved[700:900], rate[700:900], rtol=1e-3)
    other = optimizers.build(settings("sgd", guard="spam", schedule="plateau"), 60)
    assert jax.jit(lambda: run(other, 60)[2][-1])() < loss(START)


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


def test_schedules_rise_through_the_warm_up_and_end_where_they_say():
    def rates(name, peak, warmup):
        o = Optimizer(learning_rate=peak, schedule=name, warmup=warmup, decay=0.25)
        return jax.vmap(optimizers.learning_rate(o, 100))(jnp.arange(101))

    @jax.jit
    def every(peak, warmup):
        return {name: jax.vmap(lambda p, w, n=name: rates(n, p, w))(peak, warmup) for name in names}

    names = tuple(optimizers.SCHEDULES)
    ends = {"constant": 1.0, "plateau": 1.0, "cosine": 0.25, "exponential": 0.25, "step": 0.0625}
    fraction = np.arange(1, 10) / 10
    # the argument of an exponential or cosine, at most 4, is rounded, and so are ten products
    for name, values in every(jnp.array([1.0, 2.0]), jnp.array([0.1, 0.0])).items():
        values = np.asarray(values)
        assert_rounding(values[0, 10:], values[1, 10:] / 2, terms=64)
        assert_rounding(values[0, :9], values[1, :9] / 2 * fraction, terms=64)
        if name in ends:
            assert_rounding(values[0, -1], ends[name], terms=64)


@pytest.mark.slow
def test_regularisation_is_the_formula():
    o = settings("sgd", learning_rate=0.1, l2=0.5, l1=0.25, weight_clip=0.8, weight_norm=1.0)
    grads = jax.tree.map(jnp.zeros_like, START)
    tx = optimizers.build(o, 1)
    updates, _ = jax.jit(lambda: tx.update(grads, tx.init(START), START, value=0.0))()
    # l1 and l2, then the norm of two such weights is scaled to 1, which is below the clip
    kernel = 1 - 0.1 * (0.5 + 0.25)
    after = optax.apply_updates(START, updates)
    np.testing.assert_allclose(after["readout"]["kernel"], min(kernel, 0.5**0.5), rtol=1e-6)
    # neither decayed nor normed, but clipped
    np.testing.assert_allclose(after["layers"]["bias"], 0.8, rtol=1e-6)
    decayed = optimizers.build(settings("sgd", learning_rate=0.1, weight_decay=0.5), 1)
    updates, _ = jax.jit(lambda: decayed.update(grads, decayed.init(START), START, value=0.0))()
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
