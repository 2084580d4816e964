"""`watch`: norms of gradients, updates and parameters per leaf and per layer, around any optimiser.

For every leaf, and every layer of a leaf that is `stacked`, at every step

    log2_grad    log2 ||g||,    log2_update  log2 ||u||,    log2_param  log2 ||p||,
    log2_ratio   log2 ||u|| / ||p||, the relative step (by a common rule of thumb about -10)

and, once in a run, the first leaf that held inf or NaN and its step. The optimiser's updates and
state are not changed. Norms are those of `gradjax.core.scale`: a gradient of 1e30 has a norm, and
one of 1e-40 is not zero; -inf means that all entries are zero, inf and NaN that one of them is.
`gradjax.telemetry(opt_state)` reads all of it, the telemetry of the rules inside included, and
`gradjax.Monitor` follows it during training. The state has a fixed structure and lives in scans,
vmaps and checkpoints; the measurements are one array with the rows of the last `keep` measured
steps, so that a loop may look at it less often and miss nothing.

Cost: three norms of the tree (in one of `every` steps), and the update is stored, which XLA would
otherwise fuse into the new parameters.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from gradjax.core import scale
from gradjax.transforms.eager import compile_when_eager
from gradjax.transforms.rule import (
    RuleState,
    Stacked,
    TelemetryBuffer,
    count_of,
    stacked_leaves,
)
from gradjax.transforms.wrapping import Inside, first_leaf, first_time, leaf_groups

PyTree = Any

FIELDS = ("log2_grad", "log2_update", "log2_param", "log2_ratio")


def watch(
    tx: optax.GradientTransformation, stacked: Stacked = None, every: int = 1, keep: int = 8
) -> optax.GradientTransformationExtraArgs:
    """`tx` and a record of its gradients, updates and parameters; see the module.

    Args:
      tx: any Optax transform or optimiser.
      stacked: the leaves whose first axis is the layer of a scan: a prefix tree of bools or a
        predicate on the path.
      every: measure only at steps 0, every, 2 every ..., and keep the last values in between. A NaN
        is then found at the next measured step, when it may have spread to other leaves.
      keep: rows in the state, one per measured step; `telemetry` reads the newest,
        `gradjax.Monitor` all.

    Raises:
      ValueError: for `every` or `keep` below 1; from `update` without params.

    >>> import jax.numpy as jnp, optax
    >>> from gradjax.transforms import telemetry, watch
    >>> tx = watch(optax.sgd(0.5))
    >>> params = {"w": jnp.full(4, 2.0)}
    >>> _, state = tx.update({"w": jnp.full(4, 1e20)}, tx.init(params), params)
    >>> round(float(telemetry(state)["0.watch/log2_ratio/['w']"]), 1)
    64.4
    """
    for name, value in (("every", every), ("keep", keep)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"watch: {name} is {value}; an integer in [1, inf) is needed.")
    inner = optax.with_extra_args_support(tx)
    record = compile_when_eager(_record, stacked, every)

    def names(params):
        flags = jax.tree.leaves(stacked_leaves(stacked, params))
        paths = jax.tree_util.tree_flatten_with_path(params)[0]
        return tuple(
            (jax.tree_util.keystr(path), x.shape[0] if flag else 0)
            for (path, x), flag in zip(paths, flags, strict=True)
        )

    def init_fn(params):
        row, _ = jax.eval_shape(lambda: measure(params, params, params, stacked))
        rows = jnp.zeros((keep, *row.shape), row.dtype)
        telemetry = {
            "figures": TelemetryBuffer(rows, FIELDS, names(params), every),
            "first_bad_leaf": count_of(-1),
            "first_bad_step": count_of(-1),
            "count": count_of(),
        }
        return RuleState(telemetry, Inside(inner.init(params)), "watch")

    def update_fn(updates, state, params=None, **extra):
        if params is None:
            raise ValueError(
                "watch: it measures the parameters too; call update(grads, state, params)."
            )
        out, inner_state = inner.update(updates, state.memory.inner_state, params, **extra)
        out, telemetry = record(updates, out, params, state.telemetry)
        return out, RuleState(telemetry, Inside(inner_state), "watch")

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # type: ignore[arg-type]


def measure(
    updates: PyTree, out: PyTree, params: PyTree, stacked: Stacked = None
) -> tuple[Array, Array]:
    """One row of the record.

    Args:
      updates: the gradients.
      out: the updates that the optimiser made of them.
      params: the parameters.
      stacked: as in `watch`.

    Returns:
      (fields, groups), and the int32 index of the first leaf that is not finite, or -1.
    """
    trees = lax.stop_gradient((updates, out, params))
    axes, leaf_of = leaf_groups(updates, stacked)
    norms = [scale.log2(scale.flat_norms(jax.tree.leaves(tree), axes)) for tree in trees]
    dtype = max((x.dtype for x in norms), key=lambda dtype: dtype.itemsize)
    grad, step, param = (x.astype(dtype) for x in norms)
    # Parameters and update may both be zero: no step.
    ratio = jnp.where(step == -jnp.inf, step, step - param)
    # -inf is the norm of zeros.
    is_bad = jnp.any(~(jnp.stack([grad, step, param]) < jnp.inf), axis=0)
    return jnp.stack([grad, step, param, ratio]), first_leaf(is_bad, leaf_of)


def _record(stacked: Stacked, every: int) -> Callable[..., tuple[PyTree, dict[str, Any]]]:
    """(updates, out, params, telemetry) -> (out, telemetry one step later)."""

    def record(updates, out, params, old):
        def measured(rows):
            row, bad = measure(updates, out, params, stacked)
            return jnp.concatenate([rows[1:], row[None].astype(rows.dtype)]), bad

        figures = old["figures"]
        if every == 1:
            rows, bad = measured(figures.values)
        else:
            # A loop of at most one turn: XLA would copy what is handed to a `cond`.
            rows, bad = lax.while_loop(
                lambda carry: carry[0],
                lambda carry: (jnp.zeros_like(carry[0]), measured(carry[1][0])),
                (old["count"] % every == 0, (figures.values, count_of(-1))),
            )[1]
        # The condition never holds. It makes XLA measure the parameters before it updates them in
        # place, which would otherwise need a copy of them.
        out = jax.tree.map(lambda u: jnp.where(bad < -1, jnp.zeros_like(u), u), out)
        figures = TelemetryBuffer(rows, FIELDS, figures.leaves, every)
        telemetry = {"figures": figures} | first_time(old, bad) | {"count": old["count"] + 1}
        return out, telemetry

    return record
