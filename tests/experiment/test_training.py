"""Training of members: it learns, its neighbours do not touch it, its chunks change no bit, and
every model trains."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradjax.experiment import config, tasks, training
from gradjax.experiment.tasks import Split, Splits
from gradjax.experiment.tasks.teacher import teacher

SMALL = {
    "model.depth": 2,
    "model.width": 16,
    "model.activation": "relu",
    "task.batch_size": 16,
    "train.num_steps": 60,
    "train.eval_every": 20,
    "optimizer.learning_rate": 1e-2,
    "optimizer.clipping": "clip_by_global_norm",
}


@pytest.fixture(scope="module")
def digits():
    return tasks.load("digits", jax.random.key(0))


def compiled(problem, num_steps=None):
    init = lambda key, hparams, data: training.init(key, hparams, data, problem)
    start = jax.jit(jax.vmap(init, in_axes=(0, 0, None)))
    chunk = lambda state, hparams, data: training.run_chunk(
        state, hparams, data, problem, num_steps
    )
    return start, jax.jit(jax.vmap(chunk, in_axes=(0, 0, None)))


def experiment(**more):
    return config.replace(
        config.Experiment(),
        SMALL | {name.replace("__", "."): value for name, value in more.items()},
    )


def bits(tree):
    leaves = jax.tree.leaves(tree)
    plain = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in leaves
    ]
    return [np.asarray(x).tobytes() for x in plain]


@pytest.mark.slow
def test_members_learn_and_one_that_explodes_leaves_the_others_bits_alone(digits):
    problem = training.problem_of(experiment(), digits)
    start, _ = compiled(problem)
    once = chex.assert_max_traces(lambda s, h, d: training.run_chunk(s, h, d, problem), n=1)
    chunk = jax.jit(jax.vmap(once, in_axes=(0, 0, None)))
    keys = jax.random.split(jax.random.key(1), 4)
    calm = {"optimizer.learning_rate": jnp.full(4, 1e-2), "optimizer.max_norm": jnp.full(4, 1e3)}
    wild = calm | {"optimizer.learning_rate": calm["optimizer.learning_rate"].at[2].set(1e18)}
    ends = []
    for hparams in (calm, wild):
        state = start(keys, hparams, digits)
        for _ in range(3):
            state, record = chunk(state, hparams, digits)
        ends.append((state, record))
    (state, record), (wild_state, wild_record) = ends
    assert (record.validation.score > 0.6).all() and (training.frozen_at(state) == -1).all()
    others = np.array([0, 1, 3])
    for a, b in ((state, wild_state), (record, wild_record)):
        take = lambda tree: jax.tree.map(lambda x: x[others], tree)
        assert bits(take(a)) == bits(take(b))
    assert training.frozen_at(wild_state).tolist() == [
        -1,
        -1,
        int(training.frozen_at(wild_state)[2]),
        -1,
    ]
    assert 0 < training.frozen_at(wild_state)[2] < 5 and wild_record.frozen.tolist() == [
        False,
        False,
        True,
        False,
    ]
    # at its last good state: finite parameters with a finite loss
    assert all(np.isfinite(x[2]).all() for x in jax.tree.leaves(wild_state.variables))
    assert np.isfinite(wild_record.loss[2, -1])


@pytest.mark.slow
def test_where_chunks_end_changes_no_bit(digits):
    problem = training.problem_of(
        experiment(model__dropout=0.1, model__normalization="batchnorm"), digits
    )
    keys, hparams = (
        jax.random.split(jax.random.key(1), 2),
        {"optimizer.max_norm": jnp.array([0.5, 5.0])},
    )
    ends = []
    start = compiled(problem)[0]
    for lengths in ((12,), (5, 7)):
        state, losses = start(keys, hparams, digits), []
        for length in lengths:
            state, record = compiled(problem, length)[1](state, hparams, digits)
            losses.append(record.loss)
        ends.append((state, jnp.concatenate(losses, 1)))
    assert bits(ends[0]) == bits(ends[1])


@pytest.mark.slow
def test_a_seed_that_has_reached_its_target_rests(digits):
    problem = training.problem_of(
        experiment(train__target=0.25, train__stop_at_target=True), digits
    )
    start, chunk = compiled(problem)
    hparams = {"optimizer.learning_rate": jnp.array([1e-2, 0.0])}
    state = start(jax.random.split(jax.random.key(1), 2), hparams, digits)
    first, _ = chunk(state, hparams, digits)
    second, _ = chunk(first, hparams, digits)
    assert first.stopped_at.tolist() == [20, -1] and second.stopped_at.tolist() == [20, -1]
    one = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    assert bits(one(first, 0)) == bits(one(second, 0)) and second.count.tolist() == [20, 40]


@pytest.mark.slow
def test_a_loss_above_its_bound_is_a_divergence(digits):
    problem = training.problem_of(experiment(train__max_loss=1e-3), digits)
    start, chunk = compiled(problem)
    state, record = chunk(start(jax.random.split(jax.random.key(1), 1), {}, digits), {}, digits)
    found = {name: value.tolist() for name, value in training.divergence(state).items()}
    # at the first step, because of the value
    assert found == {"diverged_at": [0], "diverged_leaf": [-1], "diverged_cause": [2]}
    np.testing.assert_array_equal(record.score[0, :1].shape, (1,))


@pytest.mark.slow
@pytest.mark.parametrize("sequence", [False, True])
def test_regression_and_sequences(sequence):
    """A linear teacher is learnt to R^2 > .99; targets of a class per time step are read like
    others."""
    key = jax.random.key(0)
    x = jax.random.normal(key, (400, 5, 4) if sequence else (400, 4))
    y = (x[..., 0] > 0).astype(jnp.int32) if sequence else x @ jnp.array([1.0, -2.0, 0.5, 0.0])
    data = Splits(Split(x[:300], y[:300]), Split(x[300:350], y[300:350]), Split(x[350:], y[350:]))
    problem = training.problem_of(experiment(model__name="rnn" if sequence else "mlp"), data)
    assert problem.num_outputs == (2 if sequence else 1) and problem.features == x.shape[1:]
    start, chunk = compiled(problem, 400)
    _, record = chunk(start(jax.random.split(key, 1), {}, data), {}, data)
    assert record.validation.score[0] > (0.95 if sequence else 0.98)
    if not sequence:
        prediction = 0.0 * data.test.y[:, None] + data.test.y.mean()
        assert (
            abs(float(training.loss_and_score(prediction, data.test.y).score)) < 1e-5
        )  # the mean explains nothing


def test_scores_of_targets_of_every_kind():
    """R^2 over all outputs with each output's own mean; negative classes are ignored; by hand."""
    score = jax.jit(training.loss_and_score)
    y = np.array([[1.0, 10.0], [3.0, 14.0]], np.float32)
    found = score(y + np.array([[1.0, 0.0]], np.float32), y)
    assert float(found.loss) == pytest.approx(0.5)
    assert float(found.score) == pytest.approx(1 - 0.5 / 2.5)
    assert float(score(np.broadcast_to(y.mean(0, keepdims=True), y.shape), y).score) == 0.0
    one = score(np.array([[1.0], [2.0]], np.float32), np.array([1.0, 4.0], np.float32))
    assert float(one.loss) == 2.0 and float(one.score) == pytest.approx(1 - 2 / 2.25)
    logits = np.log(np.array([[[0.9, 0.1], [0.2, 0.8]]], np.float32))
    masked = score(logits, np.array([[0, -1]], np.int32))
    assert float(masked.loss) == pytest.approx(-np.log(0.9), rel=1e-6)
    assert float(masked.score) == 1.0


@pytest.mark.slow
def test_several_outputs_are_one_regression():
    """The teacher has 1000-100-10 units and standardised outputs, and a student of that shape
    learns some of it."""
    x, y = teacher(jax.random.key(0), 1200)
    assert x.shape == (1200, 1000) and y.shape == (1200, 10) and y.dtype == jnp.float32
    np.testing.assert_allclose(jnp.mean(y, 0), 0, atol=1e-5)
    np.testing.assert_allclose(jnp.std(y, 0), 1, rtol=1e-5)
    parts = (slice(0, 1000), slice(1000, 1100), slice(1100, 1200))
    data = Splits(*(Split(x[part], y[part]) for part in parts))
    problem = training.problem_of(
        experiment(model__depth=1, model__width=100, model__activation="tanh"), data
    )
    assert problem.num_outputs == 10 and not problem.per_step and problem.features == (1000,)
    start, chunk = compiled(problem, 100)
    state, record = chunk(start(jax.random.split(jax.random.key(1), 1), {}, data), {}, data)
    assert state.variables["params"]["readout"]["kernel"].shape == (1, 100, 10)
    assert record.score[0, -1] > 0.5 > record.score[0, 0] and 0.1 < record.validation.score[0] < 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"optimizer.name": "lbfgs", "train.full_batch": True, "optimizer.learning_rate": 1.0},
        {
            "optimizer.name": "coordinate",
            "optimizer.learning_rate": 0.3,
            "optimizer.clipping": "none",
        },
        {
            "model.normalization": "layernorm",
            "model.residual": True,
            "optimizer.guard": "skip_spikes",
        },
        {"model.remat": True, "model.depth": 8},
    ],
    ids=["lbfgs", "coordinate", "layernorm", "remat"],
)
def test_more_ways_to_train(digits, more):
    problem = training.problem_of(config.replace(experiment(), more), digits)
    start, chunk = compiled(problem, 60)
    _, record = chunk(start(jax.random.split(jax.random.key(1), 1), {}, digits), {}, digits)
    assert record.loss[0, -1] < 0.6 * record.loss[0, 0]


def test_sequences_for_a_network_of_vectors_are_refused():
    x = np.zeros((20, 8, 2), np.float32)
    splits = Splits(*[Split(x, np.zeros(20, np.float32))] * 3)
    with pytest.raises(
        ValueError, match=r"has shape \(8, 2\), and model.name = 'mlp' takes vectors"
    ):
        training.problem_of(experiment(task__name="adding"), splits)
    training.problem_of(
        config.replace(config.Experiment(), {"model.name": "rnn", "task.batch_size": 4}), splits
    )


@pytest.mark.slow
def test_a_skipped_batch_leaves_nothing_in_running_averages(digits):
    e = experiment(
        optimizer__guard="skip_non_finite", model__normalization="batchnorm", train__num_steps=8
    )
    spoiled = digits._replace(train=digits.train._replace(x=digits.train.x.at[5].set(jnp.nan)))
    problem = training.problem_of(e, spoiled)
    state = jax.jit(lambda key: training.init(key, {}, digits, problem))(jax.random.key(0))
    run = jax.jit(lambda s: training.run_chunk(s, {}, spoiled, problem, 80))  # one epoch and a bit
    state, record = run(state)
    assert 1 <= int(jnp.isnan(record.loss).sum()) <= 3 and training.frozen_at(state) == -1
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state.variables))
    assert record.validation.score > 0.5


def test_a_batch_larger_than_the_split_is_refused():
    part = Split(np.zeros((1257, 64), np.float32), np.zeros(1257, np.int32))
    with pytest.raises(ValueError, match=r"task\.batch_size is 5000; the training split has 1257"):
        training.problem_of(experiment(task__batch_size=5000), Splits(part, part, part))
