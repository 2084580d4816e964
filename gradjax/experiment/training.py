"""Training as two pure functions of one member: `init` and `run_chunk`; vmap makes an ensemble of
it.

A member is one seed at one setting of the swept floats. Its whole training is a scan in chunks of
`train.eval_every` steps; where chunks end changes no bit. What a member is doing is data, never
control flow: one that has diverged or reached its target stays in the program, at rest, and its
neighbours' bits do not depend on it.

    problem = problem_of(experiment, splits)                    # static: what the program is compiled for
    state = init(key, hparams, splits, problem)                 # hparams: {"optimizer.learning_rate": 0.1, ...}
    state, record = run_chunk(state, hparams, splits, problem)  # data are arguments, never constants

Integer targets are classes (softmax cross-entropy; the score is accuracy), float targets a
regression (squared error; the score is R^2 = 1 - residual / variance). Classes may have a time
axis, (examples, seq_len), where a class below 0 is not asked for; a regression may have several
outputs, (examples, outputs), each of which has its own mean in R^2.

Does not cover: what is host-level (lanes, devices, checkpoints, progress), which is
`gradjax.experiment.sweep`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from gradjax.core import step
from gradjax.experiment import config, models, optimizers, pretraining, tasks
from gradjax.experiment.schema import Experiment
from gradjax.experiment.tasks import Split, Splits
from gradjax.transforms import RuleState, last_good_params, telemetry
from gradjax.transforms.wrapping import select

PyTree = Any
HParams = Mapping[str, Array]


@dataclass(frozen=True)
class Problem:
    """What a program is compiled for: the experiment without its swept floats, and the shapes of
    the data.
    """

    experiment: Experiment
    features: tuple[int, ...]  # shape of one example
    num_outputs: int
    per_step: bool = False  # a target for every step of a sequence
    batch_sharding: jax.sharding.NamedSharding | None = (
        None  # of the batch, where it is spread over devices
    )


class State(NamedTuple):
    """One member in the middle of its training; a checkpoint holds nothing else."""

    variables: PyTree  # params, batch_stats
    opt_state: PyTree
    key: Array  # of the member: its network, order of batches, dropout masks, variations of images
    count: Array  # int32, steps taken
    stopped_at: (
        Array  # int32, the step after which the target was reached, -1: not yet or not asked for
    )


class Scores(NamedTuple):
    """Mean loss and score of a split."""

    loss: Array
    score: Array


class Record(NamedTuple):
    """What a chunk has seen."""

    loss: Array  # (steps,) of the training batches
    score: Array  # (steps,)
    log_gradient_norm: Array  # (steps,) natural log of the norm before clipping
    clipped: Array  # (steps,) the clipping rule's own share, nan without one
    validation: Scores  # after the chunk
    signals: step.Signals  # after the chunk, of one training batch: natural logs per link
    frozen: Array  # () whether the member has diverged so far


def problem_of(experiment: Experiment, splits: Splits) -> Problem:
    """The static part of an experiment on its data.

    Raises:
      ValueError: a batch larger than the training split; data that are no images where images are to be varied;
        sequences or graphs for a network of vectors.
    """
    y, task, shape = splits.train.y, experiment.task, splits.train.x.shape[1:]
    if len(shape) > 1 and not models.takes(experiment.model.name, "per_step"):
        raise ValueError(
            f"training: an example of task.name = {task.name!r} has shape {shape}, and model.name = "
            f"{experiment.model.name!r} takes vectors; choose a network of sequences or graphs, or a task of images."
        )
    if task.augment != "none":
        jax.eval_shape(
            tasks.AUGMENT[task.augment], jax.eval_shape(jax.random.key, 0), splits.train.x
        )
    classes = jnp.issubdtype(y.dtype, jnp.integer)
    size, batch = len(y), experiment.task.batch_size
    if batch > size and not experiment.train.full_batch:
        raise ValueError(
            f"training: task.batch_size is {batch}; the training split has {size} examples."
        )
    num_outputs = int(y.max()) + 1 if classes else math.prod(y.shape[1:])
    return Problem(experiment, splits.train.x.shape[1:], num_outputs, bool(classes) and y.ndim > 1)


def loss_and_score(logits: Array, y: Array) -> Scores:
    """Mean loss and score of predictions (..., outputs).

    Targets: classes (...), of which one below 0 is not asked for; numbers (...) of a regression with one output, or
    (..., outputs).
    """
    if jnp.issubdtype(y.dtype, jnp.integer):
        asked = y >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(y, 0))
        right = (jnp.argmax(logits, -1) == y).astype(jnp.float32)
        return Scores(jnp.mean(losses, where=asked), jnp.mean(right, where=asked))
    several = y.ndim == logits.ndim
    residual = jnp.mean(jnp.square((logits if several else logits[..., 0]) - y))
    variance = jnp.mean(jnp.var(y, axis=0)) if several else jnp.var(y)
    return Scores(residual, 1 - residual / jnp.maximum(variance, jnp.finfo(y.dtype).tiny))


def _model(hparams: HParams, problem: Problem) -> tuple[Any, Experiment]:
    experiment = config.replace(problem.experiment, hparams)
    return models.build(experiment.model, problem.num_outputs, problem.per_step), experiment


def _optimizer(experiment: Experiment) -> optax.GradientTransformationExtraArgs:
    return optimizers.build(
        experiment.optimizer, experiment.train.num_steps, experiment.train.max_loss
    )


def splits_of(experiment: Experiment) -> Splits:
    """The data of an experiment, cut (and where they are generated, made) by its seed."""
    task, key = experiment.task, jax.random.split(jax.random.key(experiment.seed))[0]
    own = {name: getattr(task, name) for name in ("validation", "test", "normalize", "seq_len")}
    return tasks.load(task.name, key, **own)


def start(key: Array, model: Any, experiment: Experiment, first: Split, train: Split) -> PyTree:
    """The variables of a member before its first step: initialised on a batch, and pre-trained
    where that is asked for.

    Args:
      key: PRNG key of the member.
      model: of the experiment.
      experiment: its floats may be traced.
      first: a batch, for initialisations by data.
      train: the training split, for pre-training.
    """
    params_key, dropout_key = jax.random.split(key)
    variables = model.init({"params": params_key, "dropout": dropout_key}, first.x, train=True)
    if experiment.train.pretrain == "none":
        return variables
    return pretraining.pretrain(jax.random.fold_in(key, 4), variables, train, experiment)


def init(key: Array, hparams: HParams, data: Splits, problem: Problem) -> State:
    """A member before its first step.

    Args:
      key: PRNG key of the member.
      hparams: dotted names of the config's floats -> their values, which may be traced.
      data: the splits, which initialisations by data and pre-training look at.
      problem: static.
    """
    model, experiment = _model(hparams, problem)
    first = _batch(key, jnp.zeros((), jnp.int32), data, experiment)
    variables = start(key, model, experiment, first, data.train)
    none = jnp.full((), -1, jnp.int32)
    return State(
        variables,
        _optimizer(experiment).init(variables["params"]),
        key,
        jnp.zeros((), jnp.int32),
        none,
    )


def frozen_at(state: State) -> Array:
    """The step at which the member diverged, -1 if it has not."""
    return state.opt_state.telemetry["frozen_at"]


def divergence(state: State) -> dict[str, Array]:
    """Step (-1: none), leaf (index, -1: none) and cause (index into `gradjax.transforms.CAUSES`) of
    the divergence.
    """
    seen = state.opt_state.telemetry
    return {
        "diverged_at": seen["frozen_at"],
        "diverged_leaf": seen["first_bad_leaf"],
        "diverged_cause": seen["cause"],
    }


def _batch(key: Array, count: Array, data: Splits, experiment: Experiment) -> Split:
    """The member's batch at a step."""
    if experiment.train.full_batch:
        return data.train
    return tasks.batch_at(data.train, jax.random.fold_in(key, 0), count, experiment.task.batch_size)


def _train_step(
    state: State, model: Any, experiment: Experiment, data: Splits, problem: Problem
) -> tuple:
    tx = _optimizer(experiment)
    batch = _batch(state.key, state.count, data, experiment)
    if experiment.task.augment != "none":
        varied = jax.random.fold_in(jax.random.fold_in(state.key, 3), state.count)
        batch = batch._replace(x=tasks.AUGMENT[experiment.task.augment](varied, batch.x))
    if problem.batch_sharding is not None:
        batch = lax.with_sharding_constraint(batch, problem.batch_sharding)
    params, rest = (
        state.variables["params"],
        {k: v for k, v in state.variables.items() if k != "params"},
    )
    rngs = {"dropout": jax.random.fold_in(jax.random.fold_in(state.key, 1), state.count)}

    def loss_of(params):
        logits, changed = model.apply(
            {"params": params, **rest}, batch.x, train=True, rngs=rngs, mutable=list(rest)
        )
        loss, score = loss_and_score(logits, batch.y)
        return loss, (score, changed)

    (loss, (score, changed)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    extra = (
        {"grad": grads, "value_fn": lambda p: loss_of(p)[0]}
        if experiment.optimizer.name == "lbfgs"
        else {}
    )
    with jax.numpy_dtype_promotion(
        "standard"
    ):  # Optax's Adam mixes floats and int32 counts, whatever the user forbids
        updates, opt_state = tx.update(grads, state.opt_state, params, value=loss, **extra)
    assert isinstance(opt_state, RuleState)
    fine = opt_state.telemetry["frozen_at"] < 0  # else back to the last good parameters
    whole = fine & (
        opt_state.telemetry["doubtful"] == 0
    )  # a skipped batch leaves nothing in running averages
    moved = select(fine, optax.apply_updates(params, updates), last_good_params(opt_state))
    variables = {"params": moved, **select(whole, dict(changed), rest)}
    new = State(variables, opt_state, state.key, state.count + 1, state.stopped_at)
    mine = f".{experiment.optimizer.clipping}/clipped"
    fractions = [jnp.ravel(value) for name, value in telemetry(opt_state).items() if mine in name]
    clipped = jnp.mean(jnp.concatenate(fractions)) if fractions else jnp.full((), jnp.nan)
    log_norm = opt_state.telemetry["log2_norm"] * jnp.log(2.0).astype(jnp.float32)
    return new, (loss, score, log_norm, clipped)


def run_chunk(
    state: State, hparams: HParams, data: Splits, problem: Problem, num_steps: int | None = None
) -> tuple[State, Record]:
    """`num_steps` training steps of one member, then its validation and signals.

    A member that was at rest (its target reached) when the chunk began is returned as it came; one that diverges in
    it takes no step from there on (its loss is recorded at the parameters it has).

    Args:
      state: as `init` or the chunk before returned it.
      hparams: as for `init`.
      data: the splits.
      problem: static.
      num_steps: static; default: `train.eval_every`.
    """
    model, experiment = _model(hparams, problem)
    num_steps = experiment.train.eval_every if num_steps is None else num_steps

    def body(carry, _):
        return _train_step(carry, model, experiment, data, problem)

    new, (loss, score, log_norm, clipped) = lax.scan(body, state, None, length=num_steps)
    at_rest = state.stopped_at >= 0
    new = _select_state(at_rest, state, new)
    validation = evaluate(new, hparams, data.validation, problem)
    if experiment.train.stop_at_target:
        reached = (validation.score >= experiment.train.target) & ~at_rest
        new = new._replace(stopped_at=jnp.where(reached, new.count, new.stopped_at))
    size = min(experiment.task.batch_size, len(data.train.y))
    batch = tasks.batch_at(data.train, jax.random.fold_in(new.key, 0), 0, size)
    h0, links = model.links(new.variables, batch.x, jax.random.fold_in(new.key, 2))
    last = batch.y[:, -1] if problem.per_step else batch.y  # the links end at the last step
    seen = step.signals(links, h0, loss=lambda logits: loss_and_score(logits, last).loss)
    return new, Record(loss, score, log_norm, clipped, validation, seen, frozen_at(new) >= 0)


def _select_state(condition: Array, new: State, old: State) -> State:
    key = old.key  # it never changes, and typed keys know no `where`
    plain = select(condition, new._replace(key=()), old._replace(key=()))
    return plain._replace(key=key)


def evaluate(state: State, hparams: HParams, split: Split, problem: Problem) -> Scores:
    """Loss and score on a split in test mode (running statistics, no dropout); nan for an empty
    split.
    """
    if not len(split.y):
        return Scores(jnp.full((), jnp.nan), jnp.full((), jnp.nan))
    model, _ = _model(hparams, problem)
    return loss_and_score(model.apply(state.variables, split.x, train=False), split.y)
