"""Training as two pure functions of one member, `init` and `run_chunk`; vmap makes an ensemble.

A member is one seed at one setting of the swept floats. Its training is a scan, cut into chunks of
`train.eval_every` steps; where chunks end changes no bit. What happens to a member is data, never
control flow: one that has diverged or reached its target stays in the batch but is frozen, and the
other members are bitwise unaffected.

    problem = problem_of(experiment, splits)       # static: what the program is compiled for
    state = init(key, hparams, splits, problem)    # hparams: {"optimizer.learning_rate": 0.1, ...}
    state, record = run_chunk(state, hparams, splits, problem)

The data are arguments, never constants of the program.

Integer targets are classes (softmax cross-entropy; the score is accuracy); float targets are a
regression (squared error; the score is R^2 = 1 - residual / variance). Classes may have a time
axis, (examples, seq_len); negative labels are masked (ignored in loss and score). A regression may
have several outputs, (examples, outputs), each with its own mean in R^2.

Not covered: everything host-level (lanes, devices, checkpoints, progress), which is in
`gradjax.experiment.sweep`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

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


class Network(Protocol):
    """What a model of `gradjax.experiment.models` offers."""

    def init(self, rngs: PyTree, *args: Any, **kwargs: Any) -> Any:
        """Variables; see `flax.linen.Module.init`."""
        ...

    def apply(self, variables: PyTree, *args: Any, **kwargs: Any) -> Any:
        """Logits; see `flax.linen.Module.apply`."""
        ...

    def links(self, variables: PyTree, x: Array, key: Array | None = None) -> tuple[Any, list]:
        """First state and links, as `gradjax.core.step` takes them."""
        ...


@dataclass(frozen=True)
class Problem:
    """What a program is compiled for.

    Attributes:
      experiment: its swept floats are ignored.
      features: shape of one example.
      num_outputs: classes, or outputs of a regression.
      per_step: whether there is a target for every step of a sequence.
      batch_sharding: sharding of the batch, if it is distributed over devices.
    """

    experiment: Experiment
    features: tuple[int, ...]
    num_outputs: int
    per_step: bool = False
    batch_sharding: jax.sharding.NamedSharding | None = None


class State(NamedTuple):
    """One member in the middle of its training; a checkpoint holds nothing else.

    Attributes:
      variables: params, batch_stats.
      opt_state: state of the optimiser chain.
      key: PRNG key of the member: its network, order of batches, dropout masks, augmentation.
      count: int32, steps taken.
      stopped_at: int32, the step after which the target was reached; -1: not yet, or not asked for.
    """

    variables: PyTree
    opt_state: PyTree
    key: Array
    count: Array
    stopped_at: Array


class Scores(NamedTuple):
    """Mean loss and score of a split."""

    loss: Array
    score: Array


class Record(NamedTuple):
    """What a chunk has measured.

    Attributes:
      loss: (steps,) of the training batches.
      score: (steps,) of the training batches.
      log_gradient_norm: (steps,) natural log of the norm before clipping.
      clipped: (steps,) fraction clipped, as the clipping rule reports it; nan without a rule.
      validation: scores after the chunk.
      signals: signals of one training batch after the chunk, natural logs per link.
      frozen: () whether the member has diverged so far.
    """

    loss: Array
    score: Array
    log_gradient_norm: Array
    clipped: Array
    validation: Scores
    signals: step.Signals
    frozen: Array


def problem_of(experiment: Experiment, splits: Splits) -> Problem:
    """The static part of an experiment on its data.

    Raises:
      ValueError: a batch larger than the training split; augmentation of data that are no images;
        sequences or graphs for a network of vectors.
    """
    y, task, shape = splits.train.y, experiment.task, splits.train.x.shape[1:]
    if len(shape) > 1 and not models.takes(experiment.model.name, "per_step"):
        raise ValueError(
            f"training: an example of task.name = {task.name!r} has shape {shape}, and "
            f"model.name = {experiment.model.name!r} takes vectors; choose a network of "
            "sequences or graphs, or a task of images."
        )
    if task.augment != "none":
        key = jax.eval_shape(jax.random.key, 0)
        jax.eval_shape(tasks.AUGMENT[task.augment], key, splits.train.x)
    classes = jnp.issubdtype(y.dtype, jnp.integer)
    size, batch = len(y), experiment.task.batch_size
    if batch > size and not experiment.train.full_batch:
        raise ValueError(
            f"training: task.batch_size is {batch}; the training split has {size} examples."
        )
    num_outputs = int(y.max()) + 1 if classes else math.prod(y.shape[1:])
    return Problem(experiment, shape, num_outputs, per_step=bool(classes) and y.ndim > 1)


def loss_and_score(logits: Array, y: Array) -> Scores:
    """Mean loss and score of predictions.

    Args:
      logits: (..., outputs).
      y: integer classes (...), of which negative ones are ignored; or the numbers of a regression,
        (...) for one output, else (..., outputs).
    """
    if jnp.issubdtype(y.dtype, jnp.integer):
        asked = y >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(y, 0))
        right = (jnp.argmax(logits, -1) == y).astype(jnp.float32)
        return Scores(jnp.mean(losses, where=asked), jnp.mean(right, where=asked))
    if y.ndim < logits.ndim:
        logits, variance = logits[..., 0], jnp.var(y)
    else:
        variance = jnp.mean(jnp.var(y, axis=0))
    residual = jnp.mean(jnp.square(logits - y))
    return Scores(residual, 1 - residual / jnp.maximum(variance, jnp.finfo(y.dtype).tiny))


def _model(hparams: HParams, problem: Problem) -> tuple[Network, Experiment]:
    experiment = config.replace(problem.experiment, hparams)
    return models.build(experiment.model, problem.num_outputs, problem.per_step), experiment


def _optimizer(experiment: Experiment) -> optax.GradientTransformationExtraArgs:
    return optimizers.build(
        experiment.optimizer, experiment.train.num_steps, experiment.train.max_loss
    )


def splits_of(experiment: Experiment) -> Splits:
    """The data of an experiment; its seed determines the split, and what is generated."""
    task, key = experiment.task, jax.random.split(jax.random.key(experiment.seed))[0]
    own = {name: getattr(task, name) for name in ("validation", "test", "normalize", "seq_len")}
    return tasks.load(task.name, key, **own)


def start(key: Array, model: Network, experiment: Experiment, first: Split, train: Split) -> PyTree:
    """The variables of a member before its first step: initialised, and pre-trained if configured.

    Args:
      key: PRNG key of the member.
      model: network of the experiment.
      experiment: its floats may be traced.
      first: a batch, for initialisations that depend on data.
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
      data: the splits, for pre-training and for initialisations that depend on data.
      problem: static.
    """
    model, experiment = _model(hparams, problem)
    first = _batch(key, jnp.zeros((), jnp.int32), data, experiment)
    variables = start(key, model, experiment, first, data.train)
    opt_state = _optimizer(experiment).init(variables["params"])
    count, never = jnp.zeros((), jnp.int32), jnp.full((), -1, jnp.int32)
    return State(variables, opt_state, key, count, never)


def frozen_at(state: State) -> Array:
    """The step at which the member diverged, -1 if it has not."""
    return state.opt_state.telemetry["frozen_at"]


def divergence(state: State) -> dict[str, Array]:
    """Where and why a member diverged.

    Returns:
      `diverged_at` (a step, -1: it has not), `diverged_leaf` (an index, -1: none) and
      `diverged_cause` (an index into `gradjax.transforms.CAUSES`).
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
    state: State, model: Network, experiment: Experiment, data: Splits, problem: Problem
) -> tuple[State, tuple[Array, Array, Array, Array]]:
    """One step; returns the state and (loss, score, log gradient norm, fraction clipped)."""
    tx = _optimizer(experiment)
    batch = _training_batch(state, data, experiment)
    if problem.batch_sharding is not None:
        batch = lax.with_sharding_constraint(batch, problem.batch_sharding)
    params = state.variables["params"]
    rest = {name: value for name, value in state.variables.items() if name != "params"}
    rngs = {"dropout": jax.random.fold_in(jax.random.fold_in(state.key, 1), state.count)}

    def loss_of(params):
        logits, changed = model.apply(
            {"params": params, **rest}, batch.x, train=True, rngs=rngs, mutable=list(rest)
        )
        loss, score = loss_and_score(logits, batch.y)
        return loss, (score, changed)

    (loss, (score, changed)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    extra = {}
    if experiment.optimizer.name == "lbfgs":
        extra = {"grad": grads, "value_fn": lambda p: loss_of(p)[0]}
    # Optax's Adam mixes floats and int32 counts, even where the user forbids it.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = tx.update(grads, state.opt_state, params, value=loss, **extra)
    assert isinstance(opt_state, RuleState)
    # A diverged member goes back to its last good parameters, and a skipped batch must leave no
    # trace in running averages.
    healthy = opt_state.telemetry["frozen_at"] < 0
    kept = healthy & (opt_state.telemetry["doubtful"] == 0)
    moved = select(healthy, optax.apply_updates(params, updates), last_good_params(opt_state))
    variables = {"params": moved, **select(kept, dict(changed), rest)}
    new = State(variables, opt_state, state.key, state.count + 1, state.stopped_at)
    clipped = _clip_fraction(opt_state, experiment, params)
    log_norm = opt_state.telemetry["log2_norm"] * jnp.log(2.0).astype(jnp.float32)
    return new, (loss, score, log_norm, clipped)


def _training_batch(state: State, data: Splits, experiment: Experiment) -> Split:
    """The member's batch of this step, augmented."""
    batch, augment = _batch(state.key, state.count, data, experiment), experiment.task.augment
    if augment == "none":
        return batch
    key = jax.random.fold_in(jax.random.fold_in(state.key, 3), state.count)
    return batch._replace(x=tasks.AUGMENT[augment](key, batch.x))


def _clip_fraction(opt_state: RuleState, experiment: Experiment, params: PyTree) -> Array:
    """Mean over its groups of what the clipping rule clipped in this step; nan without a rule."""
    rules = optimizers.find_clipping_rules(experiment.optimizer, params)
    fractions = [
        jnp.ravel(value)
        for name, value in telemetry(opt_state).items()
        if any(f".{rule}/clipped" in name for rule in rules)
    ]
    return jnp.mean(jnp.concatenate(fractions)) if fractions else jnp.full((), jnp.nan)


def run_chunk(
    state: State, hparams: HParams, data: Splits, problem: Problem, num_steps: int | None = None
) -> tuple[State, Record]:
    """`num_steps` training steps of one member, then its validation and signals.

    A member whose target was reached before the chunk is returned unchanged. One that diverges in
    the chunk keeps its last good parameters, and its later losses are recorded at those.

    Args:
      state: from `init` or the previous chunk.
      hparams: as for `init`.
      data: the splits.
      problem: static.
      num_steps: static; default: `train.eval_every`.
    """
    model, experiment = _model(hparams, problem)
    if num_steps is None:
        num_steps = experiment.train.eval_every

    def body(carry, _):
        return _train_step(carry, model, experiment, data, problem)

    new, (loss, score, log_norm, clipped) = lax.scan(body, state, None, length=num_steps)
    resting = state.stopped_at >= 0
    new = _select_state(resting, state, new)
    validation = evaluate(new, hparams, data.validation, problem)
    if experiment.train.stop_at_target:
        reached = (validation.score >= experiment.train.target) & ~resting
        new = new._replace(stopped_at=jnp.where(reached, new.count, new.stopped_at))
    size = min(experiment.task.batch_size, len(data.train.y))
    batch = tasks.batch_at(data.train, jax.random.fold_in(new.key, 0), 0, size)
    h0, links = model.links(new.variables, batch.x, jax.random.fold_in(new.key, 2))
    # The links of a sequence end at its last step.
    last = batch.y[:, -1] if problem.per_step else batch.y
    signals = step.signals(links, h0, loss=lambda logits: loss_and_score(logits, last).loss)
    return new, Record(loss, score, log_norm, clipped, validation, signals, frozen_at(new) >= 0)


def _select_state(condition: Array, new: State, old: State) -> State:
    # The key never changes, and `where` does not take typed keys.
    plain = select(condition, new._replace(key=()), old._replace(key=()))
    return plain._replace(key=old.key)


def evaluate(state: State, hparams: HParams, split: Split, problem: Problem) -> Scores:
    """Loss and score of a split in test mode (running statistics, no dropout); nan if empty."""
    if not len(split.y):
        return Scores(jnp.full((), jnp.nan), jnp.full((), jnp.nan))
    model, _ = _model(hparams, problem)
    return loss_and_score(model.apply(state.variables, split.x, train=False), split.y)
