"""A guard of the optimiser's moments: the entries that overflowed are restored, all others kept.

The square of a gradient of 1e20 is inf in float32, and an infinite second moment never decays: its
parameter would not move again.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from gradjax.core import scale
from gradjax.transforms.eager import compile_when_eager
from gradjax.transforms.wrapping import Inside, Step, first_true, guard, record

PyTree = Any


def restore_moments(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Entries whose moments (or update) became inf or NaN keep their old moments, with update zero.

    For such an entry it is as if the step had not been (shared counters go on); all others are
    unchanged, bit for bit. A moment that is not finite even before the step (a checkpoint of a run
    already damaged) restarts at zero together with the entry's other moments: Adam's next step for
    that entry is then (1 - b1) / sqrt(1 - b2) of the usual, 3.2 at the defaults, once. Moments
    factored over rows and columns (Adafactor) have no entries: the leaf is restored as a whole.

    A finite moment that is merely huge (from a gradient of 1e18, whose square is 1e36) is kept, and
    holds its parameter still until it has decayed, log(1e36) / (1 - b2) = 83,000 steps. Clipping,
    or `skip_spikes`, prevents that.

    Telemetry: clipped = the fraction of the entries restored in this step, `restored` = number of
    steps with any, `first_bad_leaf`, `first_bad_step`.

    Args:
      inner: any optimiser, e.g. `optax.adam(1e-3)`.
    """
    return guard("restore_moments", inner, compile_when_eager(_judge_moments), restored=0)


def _judge_moments():
    def judge(step: Step):
        before = step.state.memory.inner_state
        updates, structure = jax.tree.flatten(step.out)
        new, state_structure = jax.tree.flatten(step.inner_state)
        old = state_structure.flatten_up_to(before)
        owners = _owners(step.inner_state, step.out)
        bad = [~jnp.isfinite(u) for u in updates]
        spoiled_before = [jnp.zeros(u.shape, bool) for u in updates]
        for value, previous, i in zip(new, old, owners, strict=True):
            if i >= 0:
                bad[i] |= _any_like(~jnp.isfinite(value), bad[i])
                spoiled_before[i] |= _any_like(~jnp.isfinite(previous), spoiled_before[i])

        def restored(value, previous, i):
            if i < 0:
                if not jnp.issubdtype(jnp.asarray(value).dtype, jnp.inexact):
                    return value
                finite = jnp.where(jnp.isfinite(previous), previous, 0)
                return jnp.where(jnp.isfinite(value), value, finite)
            spoiled = _any_like(spoiled_before[i], value)
            kept = jnp.where(spoiled, jnp.zeros_like(previous), previous)
            return jnp.where(_any_like(bad[i], value), kept, value)

        values = [restored(*each) for each in zip(new, old, owners, strict=True)]
        out = [jnp.where(b, jnp.zeros_like(u), u) for b, u in zip(bad, updates, strict=True)]
        entries = jnp.zeros((), jnp.float32)
        for b in bad:
            entries += jnp.sum(b, dtype=jnp.float32)
        bad_leaf = first_true([jnp.any(b) for b in bad])
        state = record(
            step.state,
            Inside(jax.tree.unflatten(state_structure, values)),
            scale.log2(scale.norm(step.updates)),
            entries / max(sum(u.size for u in updates), 1),
            bad_leaf,
            restored=step.state.telemetry["restored"] + (bad_leaf >= 0).astype(jnp.int32),
        )
        return jax.tree.unflatten(structure, out), state

    return judge


def _owners(state: PyTree, params: PyTree) -> list[int]:
    """For every leaf of the state the index of its parameter, or -1.

    That is the parameter with the longest key path that the leaf's own path ends in. A parameter
    that is a bare array has an empty path, and only the shape can match.
    """
    of_params = jax.tree_util.tree_flatten_with_path(params)[0]

    def owner(path, leaf):
        if not jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact):
            return -1
        fits = []
        for i, (name, p) in enumerate(of_params):
            is_end = len(name) <= len(path) and path[len(path) - len(name) :] == name
            if is_end and (name or jnp.shape(leaf) == jnp.shape(p)):
                fits.append((len(name), i))
        return max(fits)[1] if fits else -1

    return [owner(*each) for each in jax.tree_util.tree_flatten_with_path(state)[0]]


def _any_like(bad: Array, like: Array) -> Array:
    """Entry for entry where the shapes agree, else (factored moments) one scalar for the leaf."""
    return bad if bad.shape == like.shape else jnp.any(bad)
