"""Guards around an optimiser: what happens to a step that should not be taken.

Each is a wrapper `guard(inner, ...)` of any Optax transform. At every step, and without a branch in
the program (so that one lane of a vmapped sweep may skip while its neighbours train), it decides
whether the updates and the inner state are the new ones or the old:

    skip_non_finite   a gradient or an update with inf or NaN: skips the step, or repairs entries
    skip_spikes       a gradient whose norm jumps out of its recent history: skips the step
    freeze_diverged   a diverged run: no update from then on, the last good parameters are kept
    restore_moments   an optimiser state that overflowed: restores entries (in `moments`)

Norms are those of `gradjax.core.scale`, so a finite gradient of 1e20 is finite here and a norm of
1e-30 is not zero. Zero and subnormal gradients pass. Telemetry holds leaves as int32 indices (-1:
none) and steps counted from 0; `leaf_name` turns an index into a key path on the host. Cost: one
norm of the gradients and a selection over the inner state.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from gradjax.core import scale
from gradjax.transforms.eager import compile_when_eager
from gradjax.transforms.rule import RuleState, check_number, count_of
from gradjax.transforms.wrapping import (
    Inside,
    Step,
    first_bad,
    first_bad_of,
    guard,
    leaf_norms,
    record,
    select,
)

PyTree = Any
Number = float | Array
Wrapper = optax.GradientTransformationExtraArgs


def skip_non_finite(inner: optax.GradientTransformation, repair: bool = False) -> Wrapper:
    """Skip every step whose gradient or update holds inf or NaN: zero updates, old inner state.

    Where `optax.apply_if_finite` accepts updates again after `max_consecutive_errors`, this never
    lets a NaN through; and an update that the inner transform itself made non-finite is stopped as
    well. Telemetry: `skipped` steps, `bad_leaf` of this step, `first_bad_leaf` and `first_bad_step`
    of the run (leaves of the gradients, or of the updates where the gradients are finite); with
    `repair`, clipped = the fraction of the entries replaced.

    Args:
      inner: the transform or optimiser that is to see finite gradients only.
      repair: replace non-finite entries of the gradient by zero and take the step with the rest, as
        `jnp.nan_to_num(g, posinf=0, neginf=0)`; a non-finite update is skipped all the same.
    """
    judge = compile_when_eager(_judge_finite, repair)
    if repair:
        return guard("skip_non_finite", inner, judge, prepare=_zero_non_finite, skipped=0)
    return guard("skip_non_finite", inner, judge, skipped=0)


def _zero_non_finite(updates: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x)), updates)


def _judge_finite(repair: bool) -> Callable[[Step], tuple[PyTree, RuleState]]:
    def judge(step):
        (norms,), leaf_of = leaf_norms([step.updates])
        bad_gradient, bad_update = first_bad([norms], leaf_of), first_bad_of(step.out)
        if repair:
            clipped = _non_finite_fraction(step.updates)
            taken = bad_update < 0
        else:
            clipped = (bad_gradient >= 0).astype(jnp.float32)
            taken = (bad_update < 0) & (bad_gradient < 0)
        bad = jnp.where(bad_gradient >= 0, bad_gradient, bad_update)
        out = select(taken, step.out, optax.tree.zeros_like(step.out))
        state = step.state
        memory = Inside(select(taken, step.inner_state, state.memory.inner_state))
        skipped = state.telemetry["skipped"] + (~taken).astype(jnp.int32)
        log2_norm = scale.log2(scale.union(norms))
        clipped = jnp.where(taken, clipped, 1.0)
        return out, record(state, memory, log2_norm, clipped, bad, skipped=skipped)

    return judge


def _non_finite_fraction(tree: PyTree) -> Array:
    leaves = jax.tree.leaves(tree)
    bad = jnp.zeros((), jnp.float32)
    for x in leaves:
        bad += jnp.sum(~jnp.isfinite(x), dtype=jnp.float32)
    return bad / max(sum(x.size for x in leaves), 1)


def skip_spikes(
    inner: optax.GradientTransformation,
    deviations: Number = 6.0,
    factor: Number = 2.0,
    window: int = 128,
) -> Wrapper:
    """Skip every step whose gradient norm jumps out of its recent history.

    With x = log2 ||g|| and the median m of the last `window` values,

        skip  if  x > m + max(deviations * 1.4826 median|x_i - m|, log2(factor))

    (1.4826 makes the median deviation a standard deviation for Gaussian x). Medians, because one
    spike of 1e20 in a running mean and deviation would hide the next hundred. Every finite norm
    enters the history, that of a skipped step too, so a new level is accepted once it has lasted
    half a window. No finite step is skipped before half a window has been seen; a non-finite
    gradient is always skipped, and a zero one passes and is not remembered.

    Args:
      inner: the transform or optimiser to protect.
      deviations: 6, OLMo 2's `sigma_factor`. May be traced.
      factor: the smallest jump that counts, at least 1; 2 is our choice, needed because the
        deviation of a constant norm is 0. May be traced.
      window: number of norms remembered, 128 as OLMo 2's `rolling_interval_length`; static.

    References:
      OLMo team 2025, 2 OLMo 2 Furious, arXiv 2501.00656 (its code: SkipStepOptimizer of OLMo-core,
      mean and deviation of the norm itself); Chowdhery et al. 2022, PaLM, arXiv 2204.02311, section
      5.1 (skipped batches).
    """
    check_number("skip_spikes: deviations", deviations)
    check_number("skip_spikes: factor", factor, 1.0)
    if not isinstance(window, int) or window < 2:
        raise ValueError(f"skip_spikes: window is {window}; an integer in [2, inf] is needed.")

    def remember(params):
        dtype = jax.eval_shape(scale.log_norm, params).dtype
        return {"log2_norms": jnp.full((window,), jnp.inf, dtype), "seen": count_of()}

    judge = compile_when_eager(_judge_spikes, deviations, factor, window)
    return guard("skip_spikes", inner, judge, remember, skipped=0, limit=0.0)


def _judge_spikes(
    deviations: Number, factor: Number, window: int
) -> Callable[[Step], tuple[PyTree, RuleState]]:
    def judge(step):
        ((norms,), leaf_of), own = leaf_norms([step.updates]), step.state.memory.own
        now = scale.log2(scale.union(norms))
        history, count = own["log2_norms"], jnp.minimum(own["seen"], window)
        middle = _median(history, count)
        spread = _median(jnp.abs(history - jnp.where(count > 0, middle, 0)), count)
        robust = jnp.asarray(deviations, now.dtype) * jnp.asarray(1.4826, now.dtype) * spread
        limit = middle + jnp.maximum(robust, jnp.log2(jnp.asarray(factor, now.dtype)))
        limit = jnp.where(count >= (window + 1) // 2, limit, jnp.inf)
        taken = (now <= limit) & (now < jnp.inf)
        out = select(taken, step.out, optax.tree.zeros_like(step.out))
        is_finite = jnp.isfinite(now)
        place = own["seen"] % window
        own = {
            "log2_norms": history.at[place].set(jnp.where(is_finite, now, history[place])),
            "seen": own["seen"] + is_finite.astype(jnp.int32),
        }
        state, clipped = step.state, (~taken).astype(jnp.float32)
        memory = Inside(select(taken, step.inner_state, state.memory.inner_state), own)
        skipped = state.telemetry["skipped"] + (~taken).astype(jnp.int32)
        bad = first_bad([norms], leaf_of)
        return out, record(state, memory, now, clipped, bad, skipped=skipped, limit=limit)

    return judge


def _median(values: Array, count: Array) -> Array:
    """The median of the `count` smallest values; the others are inf."""
    values = jnp.sort(values)
    return 0.5 * (values[jnp.maximum(count - 1, 0) // 2] + values[count // 2])


# The words for `cause` in the telemetry of freeze_diverged.
CAUSES = ("", "params", "value", "gradient", "update")


def freeze_diverged(
    inner: optax.GradientTransformation,
    max_param_norm: Number = jnp.inf,
    max_value: Number = jnp.inf,
    patience: int = 1,
) -> Wrapper:
    """Give up a run that has diverged: zero updates and a fixed inner state from that step on.

    A run has diverged at a step whose gradient, update, parameters (before it, or after it) or loss
    hold inf or NaN, whose parameters' norm exceeds `max_param_norm`, or whose loss exceeds
    `max_value`. The loss is judged where the caller passes it: `update(grads, state, params,
    value=loss)`. The frozen run keeps the parameters it has; `last_good_params(opt_state)` returns
    those of the last step at which loss, gradient and update were all finite and within the bounds.
    Memory: one copy of the parameters. Telemetry: `frozen_at` (step, -1 for never), `cause` (index
    into `CAUSES`), `first_bad_leaf`, and `doubtful`, the number of steps in a row up to this one
    whose gradient or loss was not finite.

    Args:
      inner: the optimiser.
      max_param_norm: largest global norm of the parameters, may be traced.
      max_value: largest loss, may be traced (negative losses are fine).
      patience: a run is given up at this many steps in a row with a non-finite gradient or loss and
        finite parameters and update: 1, or more where `inner` is a guard that skips such steps.

    Raises:
      ValueError: from `update` without params.
    """
    check_number("freeze_diverged: max_param_norm", max_param_norm, open_low=True)
    check_number("freeze_diverged: max_value", max_value, -float("inf"))
    check_number("freeze_diverged: patience", patience, 1)

    def remember(params):
        # Copies: a donated buffer must not be both the parameters and the state.
        return jax.tree.map(lambda x: jnp.array(x, copy=True), params)

    judge = compile_when_eager(_judge_divergence, max_param_norm, max_value, patience)
    missing = "it keeps and judges the parameters"
    return guard(
        "freeze_diverged",
        inner,
        judge,
        remember,
        needs_params=missing,
        frozen_at=-1,
        cause=0,
        doubtful=0,
    )


def _judge_divergence(
    max_param_norm: Number, max_value: Number, patience: int
) -> Callable[[Step], tuple[PyTree, RuleState]]:
    def judge(step):
        updates, out, inner_state, state, params, value = step
        (norms, of_params), leaf_of = leaf_norms([updates, params])
        dtype = jnp.result_type(float)
        value = jnp.asarray(0.0 if value is None else value).astype(dtype)
        max_log2 = jnp.log2(jnp.asarray(max_param_norm, jnp.float32))
        params_after = jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, out)
        gradient, before = (first_bad([each], leaf_of) for each in (norms, of_params))
        update, after = first_bad_of(out), first_bad_of(params_after)
        too_large = ~(scale.log2(scale.union(of_params)).astype(jnp.float32) <= max_log2)
        in_doubt = ~jnp.isfinite(value) | (gradient >= 0)
        doubtful = jnp.where(in_doubt, state.telemetry["doubtful"] + 1, 0)
        given_up = doubtful >= patience
        too_high = jnp.isfinite(value) & (value > jnp.asarray(max_value, dtype))
        # In this order: a NaN in the parameters spreads to the loss, and from there to the gradient
        # and the update.
        causes = jnp.stack(
            [
                (before >= 0) | too_large,
                too_high | (~jnp.isfinite(value) & given_up),
                (gradient >= 0) & given_up,
                (update >= 0) | (after >= 0),
            ]
        )
        cause = jnp.where(jnp.any(causes), jnp.argmax(causes).astype(jnp.int32) + 1, 0)
        was = state.telemetry["frozen_at"]
        fine = (was < 0) & (cause == 0)
        is_new = (was < 0) & (cause != 0)
        bad = jnp.where(gradient >= 0, gradient, jnp.maximum(update, after))
        bad = jnp.where(before >= 0, before, bad)
        # Failures handled by an inner guard are reported by that guard.
        bad = jnp.where(fine, -1, bad)
        good = select(fine & ~in_doubt, params, state.memory.own)
        memory = Inside(select(fine, inner_state, state.memory.inner_state), good)
        counters = {
            "frozen_at": jnp.where(is_new, state.telemetry["count"], was),
            "cause": jnp.where(is_new, cause, state.telemetry["cause"]),
            "doubtful": doubtful,
        }
        out = select(fine, out, optax.tree.zeros_like(out))
        log2_norm, clipped = scale.log2(scale.union(norms)), (~fine).astype(jnp.float32)
        return out, record(state, memory, log2_norm, clipped, bad, **counters)

    return judge


def last_good_params(opt_state: PyTree) -> PyTree:
    """The parameters kept by `freeze_diverged`, from a state that holds exactly one such guard.

    Raises:
      ValueError: if the state holds none, or several.
    """

    def is_rule(x):
        return isinstance(x, RuleState)

    def find(tree):
        for node in filter(is_rule, jax.tree.leaves(tree, is_leaf=is_rule)):
            if node.rule == "freeze_diverged":
                yield node.memory.own
            yield from find(node.memory)

    found = list(find(opt_state))
    if len(found) != 1:
        raise ValueError(
            f"last_good_params: the optimiser state holds {len(found)} freeze_diverged; one is "
            "needed."
        )
    return found[0]


def leaf_name(tree: PyTree, index: int) -> str:
    """The key path of leaf number `index` of params (or gradients), "" for -1.

    Args:
      tree: the params.
      index: as in the telemetry.

    Raises:
      ValueError: if the tree has no such leaf.

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
