"""What a few steps of the user's optimiser, its state and a history of losses say about
training.
"""

import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gradjax import matrix_free
from gradjax.core import scale
from gradjax.diagnosis.rules import Dynamics
from gradjax.taps.probe import arrays_of, merger
from gradjax.transforms import telemetry

PyTree = Any


def examine(
    examination, args, has_aux, tx, opt_state, learning_rate, num_steps, history
) -> tuple[Dynamics, dict]:
    """What is known of training, and which rules have nothing to go by."""
    not_run, losses, seen, bad, sharpness = {}, np.zeros(0), {}, _bad_leaves(opt_state), None
    largest, log_norms, max_norms = None, None, _max_norms(tx)
    loss_fn, params = examination.traced.loss_fn, examination.traced.params
    scalar = (lambda p, *a: loss_fn(p, *a)[0]) if has_aux else loss_fn
    if tx is not None:
        state = tx.init(params) if opt_state is None else opt_state
        losses, state, largest, log_norms = _steps(scalar, tx, params, state, args, num_steps)
        seen = {key: np.asarray(value) for key, value in telemetry(state).items()}
        bad = bad or (_bad_leaves(state) if np.isfinite(losses).all() else ())
    elif opt_state is None:
        not_run["frozen_optimizer"] = "needs opt_state or tx"
    if not any(key.endswith("/clip_fraction") for key in seen) and not max_norms:
        not_run["clipping_always, clipping_never"] = (
            "need tx that clips: a rule of gradjax.transforms, or by norm"
        )
    if learning_rate is not None:
        found = matrix_free.sharpness(scalar, params, *args, key=jax.random.key(0))
        sharpness = float(found.eigenvalues)
    elif tx is None:
        not_run["unstable_step_size"] = "needs learning_rate or tx"
    from_history = history is not None
    if from_history:
        past = history.get("loss") if isinstance(history, Mapping) else history
        if past is None or np.ndim(past) != 1:
            raise ValueError(
                'diagnose: history must be losses (steps,), or a mapping with such a "loss".'
            )
        losses = np.asarray(past, float)
    else:
        not_run["loss_spikes"] = "needs history"
    half = any(x.dtype == jnp.float16 for x in jax.tree.leaves(params))
    steps = (largest, log_norms, max_norms, half, sharpness, learning_rate, from_history)
    return Dynamics(losses, seen, bad, *steps), not_run


def _max_norms(tx: Any) -> tuple[float, ...]:
    """The thresholds of `optax.clip_by_global_norm` inside an optimiser, which leaves no trace in
    its state.
    """
    found: list[Any] = []
    todo: list[Any] = [getattr(tx, "update", None)]
    known: set[int] = set()
    while todo:
        function: Any = todo.pop()
        if isinstance(function, (tuple, list)):
            todo += function
            continue
        if id(function) in known or not isinstance(function, types.FunctionType):
            continue
        known.add(id(function))
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        inside = {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
        if function.__qualname__.startswith(
            "clip_by_global_norm."
        ) and function.__module__.startswith("optax"):
            found.append(inside.get("max_norm"))
        todo += [getattr(value, "update", value) for value in inside.values()]
    return tuple(float(x) for x in found if isinstance(x, int | float))


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _steps(
    scalar: Callable, tx: Any, params: PyTree, state: PyTree, args: tuple, num_steps: int
) -> tuple:
    """Training on one batch.

    Returns:
      losses before each step and after the last, the optimiser's state, the largest entry of an update, the gradients'
      log norms.
    """
    tx = optax.with_extra_args_support(tx)
    arrays, merge = arrays_of(args), merger(args)

    @jax.jit
    def run(params, state, arrays):
        loss_of = lambda p: scalar(p, *merge(arrays))

        def one(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(loss_of)(params)
            updates, state = tx.update(
                grads, state, params, value=loss, grad=grads, value_fn=loss_of
            )
            seen = (
                loss,
                jnp.max(
                    jnp.stack([jnp.max(jnp.abs(u)).astype(float) for u in jax.tree.leaves(updates)])
                ),
            )
            return (optax.apply_updates(params, updates), state), (*seen, scale.log_norm(grads))

        (params, state), (losses, largest, norms) = lax.scan(
            one, (params, state), None, length=num_steps
        )
        return jnp.append(losses, loss_of(params)), state, jnp.max(largest), norms

    with jax.numpy_dtype_promotion("standard"):  # Optax's own rules need it
        losses, state, largest, norms = run(params, state, arrays)
    return np.asarray(losses, float), state, float(largest), np.asarray(norms, float)


def _bad_leaves(tree: PyTree) -> tuple[str, ...]:
    """Key paths of the floating leaves that hold inf or NaN."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    floats = [
        (p, x) for p, x in flat if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
    ]
    return tuple(
        jax.tree_util.keystr(p)
        for p, x in floats
        if not np.isfinite(np.asarray(x, np.float64)).all()
    )
