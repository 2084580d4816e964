"""Guards around an optimiser: what becomes of a step that should not be taken.

Each is a wrapper `guard(inner, ...)` of any Optax transform and decides, per step and without a
branch in the program (so that one lane of a vmapped sweep may skip while its neighbours train),
whether the updates and the inner state are the new ones or the old:

    skip_non_finite   a gradient or an update that holds inf or NaN: the step is not taken, or its entries are repaired
    skip_spikes       a gradient whose norm jumps out of its recent history
    freeze_diverged   a run that is lost: no update from then on, and the last good parameters are kept
    restore_moments   an optimiser state that overflowed, entry by entry

Norms are those of `gradjax.core.scale`, so a finite gradient of 1e20 is finite here and a norm of
1e-30 is not zero. Zero and subnormal gradients pass. Telemetry holds leaves as int32 indices (-1:
none) and steps counted from 0; `leaf_name` turns an index into a key path on the host. Cost: one
norm of the gradients and a selection over the inner state.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from gradjax.core import scale
from gradjax.transforms.rule import RuleState, check_number
from gradjax.transforms.wrapping import (
    Inside,
    count_of,
    first_bad,
    first_bad_of,
    first_true,
    guard,
    leaf_norms,
    record,
    select,
)

PyTree = Any
Number = float | Array
Wrapper = optax.GradientTransformationExtraArgs


def skip_non_finite(inner: optax.GradientTransformation, repair: bool = False) -> Wrapper:
    """Take no step whose gradient or update holds inf or NaN: zero updates, inner state as if the
    step had not been.

    Where `optax.apply_if_finite` gives in after `max_consecutive_errors`, this never lets a NaN through; and an update
    that the inner transform itself made non-finite is stopped as well. Telemetry: `skipped` steps, `bad_leaf` of this
    step, `first_bad_leaf` and `first_bad_step` of the run (leaves of the gradients, or of the updates where the
    gradients are finite); with `repair`, clipped = the share of entries replaced.

    Args:
      inner: the transform or optimiser that is to see finite gradients only.
      repair: replace non-finite entries of the gradient by zero and take the step with the rest, as
        `jnp.nan_to_num(g, posinf=0, neginf=0)`; a non-finite update is skipped all the same.
    """

    def update(wrapped, updates, state, params, extra):
        (norms,), leaf_of = leaf_norms([updates])
        bad_gradient = first_bad([norms], leaf_of)
        clipped = (bad_gradient >= 0).astype(jnp.float32)
        given = updates
        if repair:
            entries = sum(
                jnp.sum(~jnp.isfinite(x), dtype=jnp.float32) for x in jax.tree.leaves(updates)
            )
            clipped = jnp.asarray(entries, jnp.float32) / max(
                sum(x.size for x in jax.tree.leaves(updates)), 1
            )
            given = jax.tree.map(
                lambda x: jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x)), updates
            )
        out, inner_state = wrapped.update(given, state.memory.inner_state, params, **extra)
        bad_update = first_bad_of(out)
        taken = (bad_update < 0) if repair else (bad_update < 0) & (bad_gradient < 0)
        bad = jnp.where(bad_gradient >= 0, bad_gradient, bad_update)
        out = select(taken, out, optax.tree.zeros_like(out))
        memory = Inside(select(taken, inner_state, state.memory.inner_state))
        skipped = state.telemetry["skipped"] + (~taken).astype(jnp.int32)
        clipped = jnp.where(taken, clipped, 1.0)
        return out, record(
            state, memory, scale.log2(scale.union(norms)), clipped, bad, skipped=skipped
        )

    return guard("skip_non_finite", inner, update, skipped=0)


def skip_spikes(
    inner: optax.GradientTransformation,
    deviations: Number = 6.0,
    factor: Number = 2.0,
    window: int = 128,
) -> Wrapper:
    """Take no step whose gradient norm jumps: with x = log2 ||g|| and the median m of the last
    `window` values,

        skip  if  x > m + max(deviations * 1.4826 median|x_i - m|, log2(factor))

    (1.4826 makes the median deviation a standard deviation for Gaussian x). Medians, because one spike of 1e20 in a
    running mean and deviation would hide the next hundred. Every finite norm enters the history, a skipped one too: a
    level that stays for half a window is accepted. No finite step is skipped before half a window has been seen;
    a non-finite gradient always is, and a zero one passes and is not remembered.

    Args:
      inner: the transform or optimiser to protect.
      deviations: 6, OLMo 2's `sigma_factor`. May be traced.
      factor: the smallest jump that counts, at least 1; 2 is ours: with a constant norm the deviation is 0. May be
        traced.
      window: remembered steps, 128 as OLMo 2's `rolling_interval_length`.

    References:
      OLMo team 2025, 2 OLMo 2 Furious, arXiv 2501.00656 (its code: SkipStepOptimizer of OLMo-core, mean and
      deviation of the norm itself); Chowdhery et al. 2022, PaLM, arXiv 2204.02311, section 5.1 (skipped batches).
    """
    check_number("skip_spikes: deviations", deviations)
    check_number("skip_spikes: factor", factor, 1.0)
    if not isinstance(window, int) or window < 2:
        raise ValueError(f"skip_spikes: window is {window}; an integer in [2, inf] is needed.")

    def median(values, count):  # of the first `count` in ascending order; empty places are inf
        values = jnp.sort(values)
        return 0.5 * (values[jnp.maximum(count - 1, 0) // 2] + values[count // 2])

    def remember(params):
        dtype = jax.eval_shape(scale.log_norm, params).dtype
        return {"log2_norms": jnp.full((window,), jnp.inf, dtype), "seen": count_of()}

    def update(wrapped, updates, state, params, extra):
        ((norms,), leaf_of), own = leaf_norms([updates]), state.memory.own
        now = scale.log2(scale.union(norms))
        history, count = own["log2_norms"], jnp.minimum(own["seen"], window)
        middle = median(history, count)
        spread = median(jnp.abs(history - jnp.where(count > 0, middle, 0)), count)
        robust = jnp.asarray(deviations, now.dtype) * jnp.asarray(1.4826, now.dtype) * spread
        limit = middle + jnp.maximum(robust, jnp.log2(jnp.asarray(factor, now.dtype)))
        limit = jnp.where(count >= (window + 1) // 2, limit, jnp.inf)
        taken = (now <= limit) & (now < jnp.inf)
        out, inner_state = wrapped.update(updates, state.memory.inner_state, params, **extra)
        out = select(taken, out, optax.tree.zeros_like(out))
        finite = jnp.isfinite(now)
        place = own["seen"] % window
        own = {
            "log2_norms": history.at[place].set(jnp.where(finite, now, history[place])),
            "seen": own["seen"] + finite.astype(jnp.int32),
        }
        memory = Inside(select(taken, inner_state, state.memory.inner_state), own)
        skipped = state.telemetry["skipped"] + (~taken).astype(jnp.int32)
        bad = first_bad([norms], leaf_of)
        return out, record(
            state, memory, now, (~taken).astype(jnp.float32), bad, skipped=skipped, limit=limit
        )

    return guard("skip_spikes", inner, update, remember, skipped=0, limit=0.0)


CAUSES = ("", "params", "value", "gradient", "update")  # of freeze_diverged's telemetry `cause`


def freeze_diverged(
    inner: optax.GradientTransformation,
    max_param_norm: Number = jnp.inf,
    max_value: Number = jnp.inf,
    patience: int = 1,
) -> Wrapper:
    """Give up a run that has diverged: zero updates and an inner state at rest from that step on.

    Diverged is a step whose gradient, update, parameters (before it, or after it) or loss hold inf or NaN, whose
    parameters' norm exceeds `max_param_norm`, or whose loss exceeds `max_value`. The loss is judged where the caller
    passes it: `update(grads, state, params, value=loss)`. The frozen run keeps the parameters it has; those of the
    last step at which all was well (loss, gradient and update) are `last_good_params(opt_state)`. Memory: one copy of
    the parameters. Telemetry: `frozen_at` (step, -1 for never), `cause` (index into `CAUSES`), `first_bad_leaf`, and
    `doubtful`, the steps in a row up to this one whose gradient or loss was not finite.

    Args:
      inner: the optimiser.
      max_param_norm: largest global norm of the parameters, may be traced.
      max_value: largest loss, may be traced (negative losses are fine).
      patience: how many steps in a row whose gradient or loss is not finite, though parameters and update are, are
        one too many: 1, or more where `inner` is a guard that takes such a step by itself.

    Raises:
      ValueError: from `update` without params.
    """
    check_number("freeze_diverged: max_param_norm", max_param_norm, open_low=True)
    check_number("freeze_diverged: max_value", max_value, -float("inf"))
    check_number("freeze_diverged: patience", patience, 1)

    def remember(params):
        return jax.tree.map(
            lambda x: jnp.array(x, copy=True), params
        )  # a donated buffer must not be both

    def update(wrapped, updates, state, params, extra):
        if params is None:
            raise ValueError(
                "freeze_diverged: it keeps and judges the parameters; call update(grads, state, params)."
            )
        (norms, of_params), leaf_of = leaf_norms([updates, params])
        out, inner_state = wrapped.update(updates, state.memory.inner_state, params, **extra)
        dtype = jnp.result_type(float)
        value = jnp.asarray(extra.get("value", 0.0)).astype(dtype)
        limit = jnp.log2(jnp.asarray(max_param_norm, jnp.float32))
        of_after = jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, out)
        leaves = [first_bad([each], leaf_of) for each in (norms, of_params)]
        leaves += [first_bad_of(out), first_bad_of(of_after)]
        too_large = ~(scale.log2(scale.union(of_params)).astype(jnp.float32) <= limit)
        bad_gradient, bad_params, bad_update, bad_after = (leaf >= 0 for leaf in leaves)
        in_doubt = ~jnp.isfinite(value) | bad_gradient
        doubtful = jnp.where(in_doubt, state.telemetry["doubtful"] + 1, 0)
        given_up, too_high = (
            doubtful >= patience,
            jnp.isfinite(value) & (value > jnp.asarray(max_value, dtype)),
        )
        no_value = too_high | (~jnp.isfinite(value) & given_up)
        # in this order: a NaN in the parameters spreads to the loss, from there to the gradient and
        # the update
        causes = [bad_params | too_large, no_value, bad_gradient & given_up, bad_update | bad_after]
        causes = jnp.stack(causes)
        cause = jnp.where(jnp.any(causes), jnp.argmax(causes).astype(jnp.int32) + 1, 0)
        was = state.telemetry["frozen_at"]
        fine = (was < 0) & (cause == 0)
        new = (was < 0) & (cause != 0)
        frozen_at = jnp.where(new, state.telemetry["count"], was)
        bad = jnp.where(
            bad_params,
            leaves[1],
            jnp.where(bad_gradient, leaves[0], jnp.maximum(leaves[2], leaves[3])),
        )
        good = select(fine & ~in_doubt, params, state.memory.own)
        memory = Inside(select(fine, inner_state, state.memory.inner_state), good)
        cause = jnp.where(new, cause, state.telemetry["cause"])
        out = select(fine, out, optax.tree.zeros_like(out))
        told = {"frozen_at": frozen_at, "cause": cause, "doubtful": doubtful}
        bad = jnp.where(fine, -1, bad)  # what the guard inside dealt with is its own to tell
        log2_norm = scale.log2(scale.union(norms))
        return out, record(state, memory, log2_norm, (~fine).astype(jnp.float32), bad, **told)

    return guard("freeze_diverged", inner, update, remember, frozen_at=-1, cause=0, doubtful=0)


def last_good_params(opt_state: PyTree) -> PyTree:
    """The parameters that `freeze_diverged` keeps, from any optimiser state that holds exactly one
    such guard.

    Raises:
      ValueError: if the state holds none, or several.
    """
    is_rule = lambda x: isinstance(x, RuleState)

    def find(tree):
        for node in filter(is_rule, jax.tree.leaves(tree, is_leaf=is_rule)):
            if node.rule == "freeze_diverged":
                yield node.memory.own
            yield from find(node.memory)

    found = list(find(opt_state))
    if len(found) != 1:
        raise ValueError(
            f"last_good_params: the optimiser state holds {len(found)} freeze_diverged; one is needed."
        )
    return found[0]


def leaf_name(tree: PyTree, index: int) -> str:
    """The key path of leaf number `index` of params (or gradients), "" for -1.

    >>> leaf_name({"w": 0.0, "b": 0.0}, 1)
    "['w']"
    """
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]
    if not -1 <= int(index) < len(paths):
        raise ValueError(
            f"leaf_name: index is {index}; the tree has {len(paths)} leaves, -1 means none."
        )
    return paths[int(index)] if index >= 0 else ""


# -- moments: the square of a gradient of 1e20 is inf in float32, and never decays in a second moment -----------------


def _owners(state: PyTree, params: PyTree) -> list[int]:
    """For every leaf of the state the index of the parameter whose path its own ends in (the
    longest), or -1.
    """
    of_params = jax.tree_util.tree_flatten_with_path(params)[0]

    def owner(path, leaf):
        if not jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact):
            return -1
        fits = [
            (len(name), i)
            for i, (name, p) in enumerate(of_params)
            if len(name) <= len(path)
            and path[len(path) - len(name) :] == name
            and (
                name or jnp.shape(leaf) == jnp.shape(p)
            )  # a bare array has no name: only its shape tells
        ]
        return max(fits)[1] if fits else -1

    return [owner(*each) for each in jax.tree_util.tree_flatten_with_path(state)[0]]


def _any_like(bad: Array, like: Array) -> Array:
    """Entry for entry where the shapes agree, else (factored moments) one scalar for the whole."""
    return bad if bad.shape == like.shape else jnp.any(bad)


def restore_moments(inner: optax.GradientTransformation) -> Wrapper:
    """Entries whose moments (or update) became inf or NaN keep the moments they had and get the
    update zero.

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

    def update(wrapped, updates, state, params, extra):
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
                return jnp.where(
                    jnp.isfinite(value), value, jnp.where(jnp.isfinite(previous), previous, 0)
                )
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

    return guard("restore_moments", inner, update, restored=0)
