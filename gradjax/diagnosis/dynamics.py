"""What a few steps of the user's optimiser, its state and a history of losses show of training."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gradjax import matrix_free
from gradjax.core import scale
from gradjax.core.unwrap import optimizer_state, plain
from gradjax.diagnosis.clipped import Note, gathered, noting
from gradjax.diagnosis.probing import Measurement
from gradjax.diagnosis.rules import Dynamics
from gradjax.replay.nonfinite import NonFinite, search_update
from gradjax.taps.probe import arrays_of, merger
from gradjax.transforms import clipping_rules, telemetry

PyTree = Any


def observe(
    measurement: Measurement,
    args: tuple,
    has_aux: bool,
    tx: optax.GradientTransformation | None,
    opt_state: PyTree,
    learning_rate: float | None,
    num_steps: int,
    history: Any,
) -> tuple[Dynamics, dict[str, str]]:
    """Collect what the rules of training need, as far as the arguments of `diagnose` allow.

    Returns:
      What was seen; and for the rules that have nothing to go by: names of rules -> what they need.

    Raises:
      ValueError: `history` is neither losses (steps,) nor a mapping with such a "loss".
    """
    not_run: dict[str, str] = {}
    loss_fn, params = measurement.traced.loss_fn, measurement.traced.params
    opt_state = optimizer_state(opt_state)

    def scalar(params: PyTree, *args: Any) -> Any:
        out = loss_fn(params, *args)
        return out[0] if has_aux else out

    losses, seen, clipping, bad = np.zeros(0), {}, (), _bad_moments(opt_state, params)
    culprit = None
    largest, log_norms, clips, at_rest = None, None, (), ()
    if tx is not None:
        state = tx.init(plain(params)) if opt_state is None else opt_state
        notes: list[Note] = []
        run = _training(scalar, tx, args, notes)
        losses, state, entries, log_norms, noted, at_rest = _steps(run, params, state, num_steps)
        clips = gathered(notes, noted)
        largest = float(np.max(entries))
        culprit = _bad_update(run, tx, params, opt_state, losses, entries, log_norms)
        seen = {key: np.asarray(value) for key, value in telemetry(state).items()}
        clipping = clipping_rules(state)
        # a state that breaks only because the loss does is not the optimiser's fault
        if not bad and np.isfinite(losses).all():
            bad = _bad_moments(state, params)
    elif opt_state is None:
        not_run["frozen_optimizer"] = "needs opt_state or tx"
    if not clips and not clipping:
        not_run["clipping_always, clipping_never"] = (
            "need tx that clips: a rule of gradjax.transforms, or by norm"
        )
    sharpness = None
    if learning_rate is not None:
        found = matrix_free.sharpness(scalar, params, *args, key=jax.random.key(0))
        sharpness = float(found.eigenvalues)
    elif tx is None:
        not_run["unstable_step_size"] = "needs learning_rate or tx"
    if history is not None:
        losses = _losses(history)
    else:
        not_run["loss_spikes"] = "needs history"
    dynamics = Dynamics(
        losses=losses,
        telemetry=seen,
        opt_bad=bad,
        largest_update=largest,
        log_norms=log_norms,
        clips=clips,
        at_rest=at_rest,
        half=any(x.dtype == jnp.float16 for x in jax.tree.leaves(params)),
        sharpness=sharpness,
        learning_rate=learning_rate,
        from_history=history is not None,
        clipping=clipping,
        bad_update=culprit,
    )
    return dynamics, not_run


def _losses(history: Any) -> np.ndarray:
    past = history.get("loss") if isinstance(history, Mapping) else history
    if past is None or np.ndim(past) != 1:
        raise ValueError(
            'diagnose: history must be losses (steps,), or a mapping with such a "loss".'
        )
    return np.asarray(past, float)


def _training(
    scalar: Callable, tx: optax.GradientTransformation, args: tuple, notes: list[Note]
) -> Callable:
    """(params, optimiser's state, number of steps) -> (the two after them, what was seen of each
    step, the last gradient); compiled. The clipping rules fill `notes`.
    """
    optimizer = noting(tx, notes)
    arrays, merge = arrays_of(args), merger(args)

    def largest_entry(updates: PyTree) -> Any:
        return jnp.max(jnp.stack([jnp.max(jnp.abs(u)).astype(float) for u in updates]))

    @functools.partial(jax.jit, static_argnums=3)
    def run(params, state, arrays, num_steps):
        def loss_of(p):
            return scalar(p, *merge(arrays))

        def step(carry, _):
            # A loop may be traced more than once.
            notes.clear()
            params, state = carry
            loss, grads = jax.value_and_grad(loss_of)(params)
            old, grads = plain(params), plain(grads)
            more = {"value": loss, "grad": grads, "value_fn": loss_of}
            updates, state = optimizer.update(grads, state, old, **more)
            new = jax.tree.leaves(optax.apply_updates(old, updates))
            params = jax.tree.unflatten(jax.tree.structure(params), new)
            noted = [tuple(note)[2:] for note in notes]
            largest = largest_entry(jax.tree.leaves(updates))
            seen = loss, largest, scale.log_norm(grads), noted
            return (params, state), seen

        (params, state), seen = lax.scan(step, (params, state), None, length=num_steps)
        last_loss, last_grads = jax.value_and_grad(loss_of)(params)
        return params, state, seen, last_loss, last_grads

    return lambda params, state, num_steps: run(params, state, arrays, num_steps)


def _steps(
    run: Callable, params: PyTree, state: PyTree, num_steps: int
) -> tuple[np.ndarray, PyTree, np.ndarray, np.ndarray, list, tuple[str, ...]]:
    """Training on one batch.

    Returns:
      losses (num_steps + 1,) before each step and after the last, the optimiser's state, the
      largest absolute entry of each update and the gradients' log norms, (num_steps,) both, what
      the clipping rules noted, and the parameters that did not move.
    """
    # Optax's own rules mix dtypes
    with jax.numpy_dtype_promotion("standard"):
        after, state, (losses, largest, norms, noted), last_loss, _ = run(params, state, num_steps)
    losses = np.append(np.asarray(losses, float), float(last_loss))
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(plain(params)), jax.tree.leaves(after), strict=True
    )
    at_rest = tuple(
        jax.tree_util.keystr(path)
        for (path, x), y in pairs
        if np.array_equal(np.asarray(x), np.asarray(y))
    )
    largest, norms = np.asarray(largest, float), np.asarray(norms, float)
    return losses, state, largest, norms, noted, at_rest


def _bad_update(
    run: Callable,
    tx: optax.GradientTransformation,
    params: PyTree,
    opt_state: PyTree,
    losses: np.ndarray,
    largest: np.ndarray,
    log_norms: np.ndarray,
) -> tuple[int, NonFinite] | None:
    """(step, culprit) of the first update that is not finite although its gradient is."""
    bad = np.flatnonzero(~np.isfinite(largest))
    if not bad.size:
        return None
    step = int(bad[0])
    if not np.isfinite(losses[step]) or np.isnan(log_norms[step]) or log_norms[step] == np.inf:
        return None
    state = tx.init(plain(params)) if opt_state is None else opt_state
    with jax.numpy_dtype_promotion("standard"):
        params, state, _, _, grads = run(params, state, step)
    culprit = search_update(tx, state, plain(params), plain(grads), losses[step])
    return None if culprit is None else (step, culprit)


def _bad_moments(state: PyTree, params: PyTree) -> tuple[str, ...]:
    """Key paths of the moments that hold inf or NaN: the floating leaves of an optimiser's state
    that belong to a parameter, by the end of their path and by their shape.

    Other figures may be inf by design: a best value so far, the logarithm of the norm of zeros.
    """
    shapes = {
        path: np.shape(x)
        for path, x in jax.tree_util.tree_leaves_with_path(plain(params))
        if np.ndim(x)
    }
    bad = []
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        is_float = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
        ends = (path[k:] for k in range(len(path) + 1))
        if not is_float or not any(shapes.get(end) == np.shape(x) for end in ends):
            continue
        if not np.isfinite(np.asarray(x, np.float64)).all():
            bad.append(jax.tree_util.keystr(path))
    return tuple(bad)
