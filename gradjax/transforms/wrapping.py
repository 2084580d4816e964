"""Shared by all wrappers: their state, their telemetry, and which leaf is not finite."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from gradjax.core import scale
from gradjax.core.scale import Norm
from gradjax.transforms.rule import (
    RuleState,
    Stacked,
    count_of,
    count_step,
    layer_axes,
    stacked_leaves,
)

PyTree = Any


class Inside(NamedTuple):
    """What a wrapper remembers: the state of the transform inside it, and its own."""

    inner_state: PyTree
    own: PyTree = ()


class Step(NamedTuple):
    """One step of the transform inside a wrapper, and what the wrapper was called with.

    Attributes:
      updates: what the wrapper received.
      out: what the transform inside returned.
      inner_state: its new state.
      state: the wrapper's old state.
      params: the parameters, where the wrapper needs them.
      value: the loss, where the caller passed it.
    """

    updates: PyTree
    out: PyTree
    inner_state: PyTree
    state: RuleState
    params: PyTree
    value: Any = None


def leaf_groups(tree: PyTree, stacked: Stacked) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """The groups of a tree: every leaf, or every layer of a stacked leaf.

    Returns:
      for each leaf the axes of one group; for each group the index of its leaf.
    """
    leaves = jax.tree.leaves(tree)
    flags = jax.tree.leaves(stacked_leaves(stacked, tree))
    axes = [layer_axes(x, flag) for x, flag in zip(leaves, flags, strict=True)]
    sizes = [x.shape[0] if flag else 1 for x, flag in zip(leaves, flags, strict=True)]
    return axes, np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)


def leaf_norms(trees: Sequence[PyTree], stacked: Stacked = None) -> tuple[list[Norm], np.ndarray]:
    """The norms of all leaves (or layers of a stacked leaf) of trees of one structure.

    Returns:
      a `Norm` of shape (groups,) for every tree, in the order of `jax.tree.leaves`; and the leaf of
      each group.
    """
    axes, leaf_of = leaf_groups(trees[0], stacked)
    leaves = [x for tree in trees for x in jax.tree.leaves(tree)]
    norms = scale.flat_norms(leaves, axes * len(trees))
    size = len(leaf_of)
    parts = [
        jax.tree.map(lambda x, k=k: x[k * size : (k + 1) * size], norms) for k in range(len(trees))
    ]
    return parts, leaf_of


def first_bad(norms: Sequence[Norm], leaf_of: np.ndarray) -> Array:
    """int32 index of the first leaf whose norm is not finite in any of the trees, -1 for none."""
    bad = jnp.zeros(leaf_of.shape, bool)
    for norm in norms:
        bad = bad | ~jnp.isfinite(norm.mantissa)
    return first_leaf(bad, leaf_of)


def first_leaf(bad: Array, leaf_of: np.ndarray) -> Array:
    """int32 index of the leaf of the first group that is `bad`, -1 for none."""
    none = jnp.iinfo(jnp.int32).max
    first = jnp.min(jnp.where(bad, leaf_of, none), initial=none)
    return jnp.where(first == none, -1, first).astype(jnp.int32)


def first_bad_of(tree: PyTree) -> Array:
    """int32 index of the first leaf with an inf or NaN, -1 for none, without a norm."""
    return first_true([~jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)])


def first_true(flags: Sequence[Array]) -> Array:
    """int32 index of the first flag that is set, -1 for none."""
    if not flags:
        return count_of(-1)
    stack = jnp.stack(list(flags))
    return jnp.where(jnp.any(stack), jnp.argmax(stack).astype(jnp.int32), -1)


def first_time(telemetry: dict[str, Any], bad_leaf: Array) -> dict[str, Array]:
    """The first bad leaf of the run and its step, after a step with this `bad_leaf`."""
    is_first = (telemetry["first_bad_step"] < 0) & (bad_leaf >= 0)
    return {
        "first_bad_leaf": jnp.where(is_first, bad_leaf, telemetry["first_bad_leaf"]),
        "first_bad_step": jnp.where(is_first, telemetry["count"], telemetry["first_bad_step"]),
    }


def record(
    state: RuleState,
    memory: PyTree,
    log2_norm: PyTree,
    clipped: PyTree,
    bad_leaf: Array,
    **extra: Any,
) -> RuleState:
    """The next state of a wrapper.

    Args:
      state: the old one.
      memory: for the next step.
      log2_norm: of the updates it received.
      clipped: the fraction of them that it replaced.
      bad_leaf: index of the first leaf that is not finite, or -1.
      **extra: further telemetry.
    """
    telemetry = count_step(state.telemetry, log2_norm, clipped) | {"bad_leaf": bad_leaf}
    telemetry |= first_time(state.telemetry, bad_leaf)
    return RuleState(telemetry | extra, memory, state.rule)


def select(new_if: Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` where the scalar `new_if` holds, else `old`: NaN in one never reaches the other."""
    return jax.tree.map(lambda a, b: jnp.where(new_if, a, b), new, old)


def guard(
    name: str,
    inner: optax.GradientTransformation,
    judge: Callable[[Step], tuple[PyTree, RuleState]],
    remember: Callable[[PyTree], PyTree] = lambda params: (),
    prepare: Callable[[PyTree], PyTree] = lambda updates: updates,
    needs_params: str = "",
    **extra: float,
) -> optax.GradientTransformationExtraArgs:
    """A wrapper of `inner` with the telemetry of `record`.

    Args:
      name: the wrapper's name in the telemetry.
      inner: the transform inside, to which `Inside.inner_state` belongs.
      judge: the step of `inner` -> (updates, state).
      remember: params -> the wrapper's own first memory, `Inside.own`.
      prepare: the updates -> what `inner` sees of them.
      needs_params: the message where the parameters are missing; "" if they may be.
      **extra: further telemetry, with the number each starts from.
    """
    wrapped = optax.with_extra_args_support(inner)

    def init_fn(params):
        zero = jnp.zeros((), jax.eval_shape(scale.log_norm, params).dtype)
        telemetry = {"log2_norm": zero, "clipped": jnp.float32(0), "clip_fraction": jnp.float32(0)}
        # Each counter is an array of its own: a buffer cannot be donated twice.
        telemetry["count"] = count_of()
        for field in ("bad_leaf", "first_bad_leaf", "first_bad_step"):
            telemetry[field] = count_of(-1)
        for field, start in extra.items():
            is_count = isinstance(start, int)
            telemetry[field] = count_of(start) if is_count else jnp.full_like(zero, start)
        return RuleState(telemetry, Inside(wrapped.init(params), remember(params)), name)

    def update_fn(updates, state, params=None, **extra):
        if needs_params and params is None:
            raise ValueError(f"{name}: {needs_params}; call update(grads, state, params).")
        out, inner_state = wrapped.update(
            prepare(updates), state.memory.inner_state, params, **extra
        )
        seen = params if needs_params else None
        return judge(Step(updates, out, inner_state, state, seen, extra.get("value")))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # type: ignore[arg-type]
