"""What the wrappers of a transform share: their state, their telemetry, and which leaf is not
finite.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from gradjax.core import scale
from gradjax.core.scale import Norm
from gradjax.transforms.rule import RuleState, Stacked, layer_axes, stacked_leaves

PyTree = Any


class Inside(NamedTuple):
    """What a wrapper remembers: the state of the transform inside it, and its own."""

    inner_state: PyTree
    own: PyTree = ()


def leaf_norms(trees: Sequence[PyTree], stacked: Stacked = None) -> tuple[list[Norm], np.ndarray]:
    """The norms of all leaves (of every layer of a stacked leaf) of trees of one structure, one
    after the other.

    Returns:
      a `Norm` of shape (groups,) for every tree, in the order of `jax.tree.leaves`; and the leaf of
      each group.
    """
    leaves = [jax.tree.leaves(tree) for tree in trees]
    flags = jax.tree.leaves(stacked_leaves(stacked, trees[0]))
    axes = [layer_axes(*each) for each in zip(leaves[0], flags, strict=True)]
    value = scale.flat_norms([x for tree in leaves for x in tree], axes * len(trees))
    sizes = [x.shape[0] if flag else 1 for x, flag in zip(leaves[0], flags, strict=True)]
    cuts = [slice(k * sum(sizes), (k + 1) * sum(sizes)) for k in range(len(trees))]
    leaf_of = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    return [jax.tree.map(lambda part, cut=cut: part[cut], value) for cut in cuts], leaf_of


def first_bad(norms: Sequence[Norm], leaf_of: np.ndarray) -> Array:
    """int32 index of the first leaf whose norm is not finite in any of the trees, -1 for none."""
    bad = jnp.zeros(leaf_of.shape, bool)
    for norm in norms:
        bad = bad | ~jnp.isfinite(norm.mantissa)
    none = jnp.iinfo(jnp.int32).max
    first = jnp.min(jnp.where(bad, leaf_of, none), initial=none)
    return jnp.where(first == none, -1, first).astype(jnp.int32)


def record(
    state: RuleState,
    memory: PyTree,
    log2_norm: PyTree,
    clipped: PyTree,
    bad_leaf: Array,
    **extra: Any,
) -> RuleState:
    """The next state of a wrapper: running clip_fraction, count, and the first bad leaf of the run
    with its step.
    """
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
    """`new` where the scalar `new_if` holds, else `old`: a selection, so NaN in the one cannot
    reach the other.
    """
    return jax.tree.map(lambda a, b: jnp.where(new_if, a, b), new, old)


def first_bad_of(tree: PyTree) -> Array:
    """int32 index of the first leaf with an inf or NaN, -1 for none, without a norm."""
    return first_true([~jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)])


def first_true(flags: Sequence[Array]) -> Array:
    """int32 index of the first that holds, -1 for none."""
    if not flags:
        return jnp.full((), -1, jnp.int32)
    stack = jnp.stack(list(flags))
    return jnp.where(jnp.any(stack), jnp.argmax(stack).astype(jnp.int32), -1)


def guard(
    name: str,
    inner: optax.GradientTransformation,
    update: Callable[..., tuple[PyTree, RuleState]],
    remember: Callable[[PyTree], PyTree] = lambda params: (),
    **extra: float,
) -> optax.GradientTransformationExtraArgs:
    """A wrapper of `inner` with the telemetry of `record`.

    Args:
      name: in the telemetry.
      inner: the transform inside, to which `Inside.inner_state` belongs.
      update: (inner, updates, state, params, extra arguments) -> (updates, state).
      remember: params -> what the wrapper itself remembers at first, `Inside.own`.
      **extra: further telemetry, with the number each starts from.
    """
    wrapped = optax.with_extra_args_support(inner)

    def init_fn(params):
        zero = jnp.zeros((), jax.eval_shape(scale.log_norm, params).dtype)
        telemetry = {"log2_norm": zero, "clipped": jnp.float32(0), "clip_fraction": jnp.float32(0)}
        marks = {"count": count_of()}  # one array each: a buffer cannot be donated twice
        marks |= {name: count_of(-1) for name in ("bad_leaf", "first_bad_leaf", "first_bad_step")}
        own = {
            k: count_of(v) if isinstance(v, int) else jnp.full_like(zero, v)
            for k, v in extra.items()
        }
        return RuleState(
            telemetry | marks | own, Inside(wrapped.init(params), remember(params)), name
        )

    def update_fn(updates, state, params=None, **extra):
        return update(wrapped, updates, state, params, extra)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # type: ignore[arg-type]


def count_of(value: int = 0) -> Array:
    """`value` as an int32 scalar."""
    return jnp.full((), value, jnp.int32)
