"""`watch`: norms of gradients, updates and parameters per leaf and per layer, around any optimiser, in one line.

For every leaf, and every layer of a leaf that is `stacked`, at every step

    log2_grad    log2 ||g||,    log2_update  log2 ||u||,    log2_param  log2 ||p||,
    log2_ratio   log2 ||u|| / ||p||, the relative step (about -10 in a healthy run by a common rule of thumb)

and, once in a run, the first leaf that held inf or NaN and its step. The optimiser is not changed: its updates and
state are its own. The norms are the ones of `gradjax.scale`: a gradient of 1e30 has one, and
one of 1e-40 is not zero; -inf means that all entries are zero, inf and NaN what they say. Read all of it, the rules
inside included, with `gradjax.transforms.telemetry(opt_state)`. The state has a fixed structure and lives in scans,
vmaps and checkpoints. Cost: three norms of the tree, or that of one in `every` steps.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradjax import scale
from gradjax.transforms.rule import RuleState, Stacked, stacked_leaves
from gradjax.transforms.wrapping import Inside, first_bad, leaf_norms

PyTree = Any


def watch(
    tx: optax.GradientTransformation, stacked: Stacked = None, every: int = 1
) -> optax.GradientTransformationExtraArgs:
    """`tx` and a record of its gradients, updates and parameters; see the module.

    Args:
      tx: any Optax transform or optimiser.
      stacked: the leaves whose first axis is the layer of a scan: a prefix tree of bools or a predicate on the path.
      every: measure at steps 0, every, 2 every ... only, and keep the last values between. A NaN is then found at the
        next measured step, by which time it may have spread to other leaves.

    >>> import jax.numpy as jnp, optax
    >>> from gradjax.transforms import telemetry, watch
    >>> tx = watch(optax.sgd(0.5))
    >>> params = {"w": jnp.full(4, 2.0)}
    >>> _, state = tx.update({"w": jnp.full(4, 1e20)}, tx.init(params), params)
    >>> {k: round(float(v), 1) for k, v in telemetry(state).items() if "log2" in k}["0.watch/log2_ratio/['w']"]
    64.4
    """
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"watch: every is {every}; an integer in [1, inf) is needed.")
    inner = optax.with_extra_args_support(tx)
    fields = ("log2_grad", "log2_update", "log2_param", "log2_ratio")

    def measure(updates, out, params):
        updates, out, params = jax.lax.stop_gradient((updates, out, params))
        norms, leaf_of = leaf_norms([updates, out, params], stacked)
        grad, step, param = (scale.log2(n) for n in norms)
        ratio = jnp.where(step == -jnp.inf, step, step - param)  # nothing over nothing is no step
        leaves, structure = jax.tree.flatten(updates)
        flags = jax.tree.leaves(stacked_leaves(stacked, updates))
        ends = np.cumsum([0] + [x.shape[0] if flag else 1 for x, flag in zip(leaves, flags, strict=True)])

        def split(flat):
            parts = [flat[a:b] if flag else flat[a] for a, b, flag in zip(ends, ends[1:], flags, strict=False)]
            return jax.tree.unflatten(structure, parts)

        return {k: split(v) for k, v in zip(fields, (grad, step, param, ratio), strict=True)}, first_bad(norms, leaf_of)

    def init_fn(params):
        seen = jax.eval_shape(lambda: measure(params, params, params)[0])
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), seen)
        none = jnp.full((), -1, jnp.int32)
        marks = {"first_bad_leaf": none, "first_bad_step": none, "count": jnp.zeros((), jnp.int32)}
        return RuleState(zeros | marks, Inside(inner.init(params)), "watch")

    def update_fn(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("watch: it measures the parameters too; call update(grads, state, params).")
        out, inner_state = inner.update(updates, state.memory.inner_state, params, **extra)
        old = state.telemetry
        if every == 1:
            seen, bad = measure(updates, out, params)
        else:  # a loop of none or one turn: XLA would copy what is handed to a `cond`
            before = {k: old[k] for k in fields}, jnp.full((), -1, jnp.int32)
            turn = lambda carry: (jnp.zeros_like(carry[0]), measure(updates, out, params))
            _, (seen, bad) = jax.lax.while_loop(lambda c: c[0], turn, (old["count"] % every == 0, before))
        # never true: it orders the measurement before the step in place, which would else need a copy of the parameters
        out = jax.tree.map(lambda u: jnp.where(bad < -1, jnp.zeros_like(u), u), out)
        first = (old["first_bad_step"] < 0) & (bad >= 0)
        marks = {
            "first_bad_leaf": jnp.where(first, bad, old["first_bad_leaf"]),
            "first_bad_step": jnp.where(first, old["count"], old["first_bad_step"]),
            "count": old["count"] + 1,
        }
        return out, RuleState(seen | marks, Inside(inner_state), "watch")

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # type: ignore[arg-type]
