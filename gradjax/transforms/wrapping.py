"""What the wrappers of a transform share: their state, their telemetry, and which leaf is not finite."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from gradjax import scale
from gradjax.scale import Norm
from gradjax.transforms.rule import RuleState, Stacked, layer_axes, stacked_leaves

PyTree = Any


class Inside(NamedTuple):
    """What a wrapper remembers: the state of the transform inside it, and its own."""

    inner_state: PyTree
    own: PyTree = ()


def norms_by_leaf(tree: PyTree, stacked: Stacked = None) -> list[Norm]:
    """The norm of every leaf, of shape (), or (depth,) for a stacked leaf; in the order of `jax.tree.leaves`."""
    leaves = jax.tree.leaves(tree)
    flags = jax.tree.leaves(stacked_leaves(stacked, tree)) if stacked is not None else [False] * len(leaves)

    def one(x, is_stacked):
        if not is_stacked:
            return scale.array_norm(x)
        value = scale.array_norm(x, layer_axes(x, True))
        return Norm(value.mantissa.reshape(-1), value.exponent.reshape(-1))

    return [one(x, flag) for x, flag in zip(leaves, flags, strict=True)]


def first_bad(bad: list[Array]) -> Array:
    """int32 index of the first True of a list of scalars, -1 for none."""
    if not bad:
        return jnp.full((), -1, jnp.int32)
    stack = jnp.stack(bad)
    return jnp.where(jnp.any(stack), jnp.argmax(stack).astype(jnp.int32), -1)


def record(
    state: RuleState, memory: PyTree, log2_norm: PyTree, clipped: PyTree, bad_leaf: Array, **extra: Any
) -> RuleState:
    """The next state of a wrapper: running clip_fraction, count, and the first bad leaf of the run with its step."""
    old = state.telemetry
    count = old["count"] + 1
    mean = lambda before, now: before + (now - before) / count.astype(before.dtype)
    first = (old["first_bad_step"] < 0) & (bad_leaf >= 0)
    telemetry = {
        "log2_norm": log2_norm,
        "clipped": clipped,
        "clip_fraction": jax.tree.map(mean, old["clip_fraction"], clipped),
        "count": count,
        "bad_leaf": bad_leaf,
        "first_bad_leaf": jnp.where(first, bad_leaf, old["first_bad_leaf"]),
        "first_bad_step": jnp.where(first, old["count"], old["first_bad_step"]),
    }
    return RuleState(telemetry | extra, memory, state.rule)


def select(new_if: Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` where the scalar `new_if` holds, else `old`: a selection, so NaN in the one cannot reach the other."""
    return jax.tree.map(lambda a, b: jnp.where(new_if, a, b), new, old)


def global_log2_norm(norms: list[Norm]) -> Array:
    """log2 of the norm of all groups together."""
    return scale.log2(scale.combine(norms)) if norms else jnp.full((), -jnp.inf, jnp.float32)


def first_bad_of(tree: PyTree) -> Array:
    """int32 index of the first leaf with an inf or NaN, -1 for none, without a norm."""
    return first_bad([~jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)])


def start(
    name: str, inner: optax.GradientTransformationExtraArgs, params: PyTree, own: PyTree = (), **extra: Any
) -> RuleState:
    """The first state of a wrapper, with the telemetry of `record`."""
    zero = jnp.zeros((), jax.eval_shape(scale.log_norm, params).dtype)
    telemetry = {"log2_norm": zero, "clipped": jnp.zeros((), jnp.float32), "clip_fraction": jnp.zeros((), jnp.float32)}
    none = jnp.full((), -1, jnp.int32)
    marks = {"count": jnp.zeros((), jnp.int32), "bad_leaf": none, "first_bad_leaf": none, "first_bad_step": none}
    return RuleState(telemetry | marks | extra, Inside(inner.init(params), own), name)


def count_of(value: int = 0) -> Array:
    """`value` as an int32 scalar."""
    return jnp.full((), value, jnp.int32)
