"""`restore_moments`: an optimiser whose moments overflowed is repaired entry by entry.

The square of one gradient of 1e20 is inf in float32. Adam's second moment then is inf, never decays, and divides every
later update of that parameter to 0: frozen for good, while every number one looks at is finite. The guard puts *all*
moments of such an entry back together: with the second restored alone, the first (1e19, finite) would be divided by a
healthy denominator, and the parameter would be thrown away instead. Which moments belong to which parameter is read off
the key paths: the path of `state[0].mu["a"]["w"]` ends in that of `params["a"]["w"]`, through chains, masks, labels and
injected hyperparameters alike.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from gradjax import scale
from gradjax.transforms.wrapping import (
    Inside,
    count_of,
    first_true,
    record,
    start,
)

PyTree = Any


def _owners(state: PyTree, params: PyTree) -> list[int]:
    """For every leaf of the state the index of the parameter whose path its own ends in (the longest), or -1."""
    of_params = jax.tree_util.tree_flatten_with_path(params)[0]

    def owner(path, leaf):
        if not jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact):
            return -1
        fits = [
            (len(name), i)
            for i, (name, p) in enumerate(of_params)
            if len(name) <= len(path)
            and path[len(path) - len(name) :] == name
            and (name or jnp.shape(leaf) == jnp.shape(p))  # a bare array has no name: only its shape tells
        ]
        return max(fits)[1] if fits else -1

    return [owner(*each) for each in jax.tree_util.tree_flatten_with_path(state)[0]]


def _any_like(bad: Array, like: Array) -> Array:
    """Entry for entry where the shapes agree, else (factored moments) one scalar for the whole."""
    return bad if bad.shape == like.shape else jnp.any(bad)


def restore_moments(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Entries whose moments (or update) became inf or NaN keep the moments they had and get the update zero.

    For such an entry it is as if the step had not been (shared counters go on); all others are untouched, bit for bit.
    A moment that is not finite even before the step (a checkpoint of a run already damaged) restarts at zero with its
    fellows: Adam's next step for that entry is then (1 - b1) / sqrt(1 - b2) of the usual, 3.2 at the defaults, once.
    Moments factored over rows and columns (Adafactor) have no entries: the leaf is restored as a whole.

    What it does not do: a finite moment that is merely huge (a gradient of 1e18, whose square is 1e36) stays, and holds
    its parameter still until it has decayed, log(1e36) / (1 - b2) = 83,000 steps. Clip, or `skip_spikes`, against that.

    Telemetry: clipped = the share of entries restored in this step, `restored` steps with any, `first_bad_leaf`,
    `first_bad_step`.

    Args:
      inner: any optimiser, e.g. `optax.adam(1e-3)`.

    Raises:
      ValueError: from `init`, if the state cannot be matched to the parameters' shapes.
    """
    wrapped = optax.with_extra_args_support(inner)

    def init_fn(params):
        return start("restore_moments", wrapped, params, restored=count_of())

    def update_fn(updates, state, params=None, **extra):
        before = state.memory.inner_state
        out, after = wrapped.update(updates, before, params, **extra)
        steps, structure = jax.tree.flatten(out)
        new, state_structure = jax.tree.flatten(after)
        old = state_structure.flatten_up_to(before)
        owners = _owners(after, out)
        bad = [~jnp.isfinite(u) for u in steps]
        spoiled = [jnp.zeros(u.shape, bool) for u in steps]  # before the step already
        for value, previous, i in zip(new, old, owners, strict=True):
            if i >= 0:
                bad[i] = bad[i] | _any_like(~jnp.isfinite(value), bad[i])
                spoiled[i] = spoiled[i] | _any_like(~jnp.isfinite(previous), spoiled[i])

        def restored(value, previous, i):
            if i < 0:
                if not jnp.issubdtype(jnp.asarray(value).dtype, jnp.inexact):
                    return value
                return jnp.where(jnp.isfinite(value), value, jnp.where(jnp.isfinite(previous), previous, 0))
            kept = jnp.where(_any_like(spoiled[i], value), jnp.zeros_like(previous), previous)
            return jnp.where(_any_like(bad[i], value), kept, value)

        values = [restored(*each) for each in zip(new, old, owners, strict=True)]
        result = [jnp.where(b, jnp.zeros_like(u), u) for b, u in zip(bad, steps, strict=True)]
        entries = sum((jnp.sum(b, dtype=jnp.float32) for b in bad), jnp.zeros((), jnp.float32))
        which = first_true([jnp.any(b) for b in bad])
        telemetry = record(
            state,
            Inside(jax.tree.unflatten(state_structure, values)),
            scale.log2(scale.norm(updates)),
            entries / max(sum(u.size for u in steps), 1),
            which,
            restored=state.telemetry["restored"] + (which >= 0).astype(jnp.int32),
        )
        return jax.tree.unflatten(structure, result), telemetry

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # type: ignore[arg-type]
