"""Clipping rules with a memory: thresholds from the gradient norms seen so far.

| rule | threshold at step t | group |
|---|---|---|
| `autoclip` | a percentile of the last norms, this one included | tree |
| `historical_clip` | mean + n standard deviations of the last norms | tree |
| `zclip` | the same of exponential moving averages, the lower the larger the spike | tree |
| `adagc` | a multiple of the moving average of each leaf's (or layer's) own norm | leaf, layer |
| `spam` | a multiple of each entry's root second moment; wraps an optimiser | entry |

A history may hold 1e38 and 1e-30, so norms are remembered as (mantissa, exponent), and added,
multiplied and sorted in that form: means and percentiles are those of the norms (not of their
logarithms) and exact to rounding even beyond float32.

Only norms that are finite and positive enter a memory: NaN and inf would stay in it for good, and
the norms of a leaf that is masked or dead for a while would drive its threshold to zero and freeze
it. A gradient that holds inf or NaN is passed on unchanged, flagged by `log2_norm` in the
telemetry, and leaves the memory as it was; a zero one stays zero. All rules report their threshold
(`log2_threshold`, inf while there is none), except `spam`, which has one per entry. Cost: the norm,
and `autoclip` sorts its window.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.core import Tracer

from gradjax.core import scale
from gradjax.core.scale import Norm
from gradjax.transforms.clipping import Number, layer_norm, limit_to
from gradjax.transforms.eager import compile_when_eager, compiled
from gradjax.transforms.rule import (
    Outcome,
    Stacked,
    check_number,
    columns,
    count_of,
    layer_axes,
    rule,
    stacked_leaves,
)

PyTree = Any


def _where(condition: Array, a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: jnp.where(condition, x.astype(y.dtype), y), a, b)


def _zero(dtype: Any, shape: tuple[int, ...] = ()) -> Norm:
    return Norm(jnp.zeros(shape, dtype), jnp.zeros(shape, jnp.int32))


def _unlimited(size: Norm) -> Norm:
    """The threshold that clips nothing."""
    return Norm(jnp.full_like(size.mantissa, jnp.inf), jnp.zeros_like(size.exponent))


def _known(size: Norm) -> Array:
    """Whether a norm may be remembered."""
    return jnp.isfinite(size.mantissa) & (size.mantissa > 0)


def _check_decay(where: str, value: Any) -> None:
    check_number(where, value, 0.0, 1.0)
    if not isinstance(value, Tracer) and np.any(np.asarray(value) == 1):
        raise ValueError(f"{where} is {value}; a number in [0, 1) is needed.")


# Rules on the norm of the tree


def by_history(
    name: str, start: Callable[[Any], PyTree], step: Callable[[Norm, PyTree], tuple[Norm, PyTree]]
) -> optax.GradientTransformationExtraArgs:
    """A rule that clips the norm of the tree to a threshold from its history.

    Args:
      name: the rule's name.
      start: dtype of the mantissas -> the empty memory.
      step: (norm, memory) -> (threshold, memory with this norm); the latter is taken only for
        finite, positive norms.
    """

    def init(params):
        return start(jax.eval_shape(scale.norm, params).mantissa.dtype)

    def update(updates, memory, params):
        size = scale.normal(scale.norm(updates))
        limit, after = step(size, memory)
        out = jax.tree.map(lambda x: limit_to(x, size, limit)[0], updates)
        clipped = (scale.greater(size, limit) & jnp.isfinite(size.mantissa)).astype(jnp.float32)
        memory = _where(_known(size), after, memory)
        extra = {"log2_threshold": scale.log2(limit)}
        return Outcome(out, scale.log2(size), clipped, memory, extra)

    return rule(name, update, init, clips=True)


def _empty_window(window: int, dtype: Any) -> dict[str, Any]:
    return {"norms": _zero(dtype, (window,)), "count": count_of()}


def _remember(size: Norm, memory: dict[str, Any], window: int) -> dict[str, Any]:
    place = memory["count"] % window

    def replace(old, new):
        return old.at[place].set(new.astype(old.dtype))

    norms = jax.tree.map(replace, memory["norms"], size)
    return {"norms": norms, "count": memory["count"] + 1}


@compiled
def autoclip(
    percentile: Number = 10.0, window: int = 1000
) -> optax.GradientTransformationExtraArgs:
    """g -> g min(1, c_t / ||g||), c_t a percentile of the norms of the last `window` steps.

    c_t is that of {||g_s||: t - window < s <= t}. The paper remembers all steps; here the memory is
    bounded, and the result is the same as the paper's up to `window` steps. Between two ranks the
    percentile is linear in the norms, as in `numpy.percentile`, also where a norm overflows
    float32.

    Args:
      percentile: p in [0, 100], 10 in the paper. May be traced.
      window: number of norms remembered; static.

    References:
      Seetharaman, Wichern, Pardo, Le Roux 2020, AutoClip: adaptive gradient clipping for source
      separation networks, arXiv 2007.14469.
    """
    check_number("autoclip: percentile", percentile, 0.0, 100.0)
    check_number("autoclip: window", window, 1)

    def step(size, memory):
        memory = _remember(size, memory, window)
        filled = jnp.minimum(memory["count"], window)
        is_empty = jnp.arange(window) >= filled
        exponent = jnp.where(is_empty, jnp.iinfo(jnp.int32).max, memory["norms"].exponent)
        exponent, mantissa = lax.sort((exponent, memory["norms"].mantissa), num_keys=2)
        rank = jnp.asarray(percentile, mantissa.dtype) * (filled - 1).astype(mantissa.dtype) / 100
        low = jnp.floor(rank).astype(jnp.int32)
        high = jnp.minimum(low + 1, filled - 1)
        below, above = (Norm(mantissa[i], exponent[i]) for i in (low, high))
        fraction = scale.of_number(rank - low.astype(rank.dtype), rank.dtype)
        return scale.plus(below, scale.times(scale.minus(above, below), fraction)), memory

    return by_history("autoclip", lambda dtype: _empty_window(window, dtype), step)


@compiled
def historical_clip(
    num_sigmas: Number = 3.0, window: int = 100, warmup_steps: Number = 10
) -> optax.GradientTransformationExtraArgs:
    """g -> g min(1, c_t / ||g||), c_t = mean + num_sigmas * deviation of the last clipped norms.

    Mean and standard deviation are over the last `window` norms, without this step's (one spike in
    n norms is never more than sqrt(n - 1) deviations from a mean it is part of), and a clipped
    gradient is remembered with the norm it was clipped to. Nothing is clipped before `warmup_steps`
    norms are known: put a `clip_by_global_norm` in front against a spike among those.

    Args:
      num_sigmas: non-negative; 3, the usual control limit (Shewhart 1931). May be traced.
      window: number of norms remembered; static.
      warmup_steps: norms to see before the first clipping. May be traced.
    """
    check_number("historical_clip: num_sigmas", num_sigmas)
    check_number("historical_clip: warmup_steps", warmup_steps)
    check_number("historical_clip: window", window, 1)

    def step(size, memory):
        norms, filled = memory["norms"], jnp.minimum(memory["count"], window)
        dtype = norms.mantissa.dtype
        is_filled = jnp.arange(window) < filled
        lowest = jnp.iinfo(jnp.int32).min // 2
        shared = jnp.max(jnp.where(is_filled, norms.exponent, lowest))
        parts = jnp.ldexp(norms.mantissa, jnp.maximum(norms.exponent - shared, -100))
        parts = jnp.where(is_filled, parts, 0)
        number = jnp.maximum(filled, 1).astype(dtype)
        mean = jnp.sum(parts) / number
        variance = jnp.sum(jnp.square(jnp.where(is_filled, parts - mean, 0))) / number
        mean, deviation = (scale.normal(Norm(x, shared)) for x in (mean, jnp.sqrt(variance)))
        sigmas = scale.of_number(num_sigmas, dtype)
        limit = scale.plus(mean, scale.times(deviation, sigmas))
        is_warm = (filled > 0) & (memory["count"] >= warmup_steps)
        limit = _where(is_warm, limit, _unlimited(limit))
        kept = _where(scale.greater(size, limit), limit, size)
        return limit, _remember(kept, memory, window)

    return by_history("historical_clip", lambda dtype: _empty_window(window, dtype), step)


@compiled
def zclip(
    alpha: Number = 0.97, z_thres: Number = 2.5, warmup_steps: Number = 25
) -> optax.GradientTransformationExtraArgs:
    """Clips a spike, z = (||g|| - mu) / s > z_thres, to mu + z_thres^2 s / z: harder the larger.

        mu <- alpha mu + (1 - alpha) n,   s^2 <- alpha s^2 + (1 - alpha) (n - mu)^2

    with n the norm after clipping and the new mu in the second equation. They start as the mean and
    the population variance of the first `warmup_steps` norms, during which nothing is clipped: put
    a `clip_by_global_norm` in front against a spike among those (as the authors' code does). Where
    s = 0 any norm above mu is a spike, and clipped to mu.

    Args:
      alpha: decay of the averages in [0, 1), .97 in the paper. May be traced.
      z_thres: non-negative, 2.5 in the paper. May be traced.
      warmup_steps: 25 in the paper. May be traced.

    References:
      Kumar, Owen, Chowdhury, Guera 2025, ZClip: adaptive spike mitigation for LLM pre-training,
      arXiv 2504.02507.
    """
    _check_decay("zclip: alpha", alpha)
    check_number("zclip: z_thres", z_thres)
    check_number("zclip: warmup_steps", warmup_steps, 1.0)

    def start(dtype):
        return {"mean": _zero(dtype), "variance": _zero(dtype), "count": count_of()}

    def step(size, memory):
        mean, variance, count = memory["mean"], memory["variance"], memory["count"] + 1
        dtype = mean.mantissa.dtype
        is_warm = memory["count"] >= warmup_steps
        excess = scale.minus(size, mean)
        threshold = scale.of_number(z_thres, dtype)
        bound = scale.times(threshold, threshold, variance)  # (z_thres s)^2
        is_outlier = (excess.mantissa > 0) & scale.greater(scale.times(excess, excess), bound)
        is_spike = is_warm & is_outlier
        limit = scale.plus(mean, scale.normal(scale.divide(bound, excess)))
        limit = _where(is_spike, limit, _unlimited(size))
        kept = _where(is_spike, limit, size)
        moments = _moving(mean, variance, kept, alpha)
        # Welford's update of mean and variance, while warming up.
        inverse = 1 / count.astype(dtype)
        move = scale.times(scale.of_number(inverse, dtype), excess)
        spread = scale.plus(variance, scale.times(move, excess))
        first_variance = scale.times(scale.of_number(1 - inverse, dtype), spread)
        first_moments = scale.plus(mean, move), first_variance
        mean, variance = _where(is_warm, moments, first_moments)
        return limit, {"mean": mean, "variance": variance, "count": count}

    return by_history("zclip", start, step)


def _moving(mean: Norm, variance: Norm, value: Norm, decay: Number) -> tuple[Norm, Norm]:
    """Exponential moving mean and variance with one more value."""
    dtype = mean.mantissa.dtype
    old, new = scale.of_number(decay, dtype), scale.of_number(1 - decay, dtype)
    mean = scale.plus(scale.times(old, mean), scale.times(new, value))
    gap = scale.minus(value, mean)
    return mean, scale.plus(scale.times(old, variance), scale.times(new, gap, gap))


# Rules per leaf and per entry


@compiled
def adagc(
    lambda_rel: Number = 1.05,
    lambda_abs: Number = 1.0,
    beta: Number = 0.98,
    warmup_steps: Number = 100,
    stacked: Stacked = None,
) -> optax.GradientTransformationExtraArgs:
    """Each leaf i (or layer of a stacked leaf) against its own history: g_i -> h_i g_i.

    With n_i = ||h_i g_i|| and ||g|| the norm of the tree, at t <= warmup_steps

        h_i = min(1, lambda_abs / ||g||),             gamma_i <- min(gamma_i, n_i)

    and afterwards

        h_i = min(1, lambda_rel gamma_i / ||g_i||),   gamma_i <- beta gamma_i + (1 - beta) n_i

    A leaf without a finite, positive norm so far has no gamma and is not clipped; its first such
    norm becomes its gamma.

    Args:
      lambda_rel: 1.05 in the paper. May be traced.
      lambda_abs: 1.0 in the paper. May be traced.
      beta: decay in [0, 1), .98 in the paper. May be traced.
      warmup_steps: T_start, 100 in the paper. May be traced.
      stacked: as in `clip_by_layer_norm`.

    References:
      Wang et al. 2025, AdaGC: improving training stability for large language model pretraining,
      arXiv 2502.11034.
    """
    check_number("adagc: lambda_rel", lambda_rel)
    check_number("adagc: lambda_abs", lambda_abs)
    check_number("adagc: warmup_steps", warmup_steps)
    _check_decay("adagc: beta", beta)

    def axes_of(tree):
        flags = jax.tree.leaves(stacked_leaves(stacked, tree))
        return [layer_axes(x, flag) for x, flag in zip(jax.tree.leaves(tree), flags, strict=True)]

    def sizes(tree):
        return scale.normal(scale.flat_norms(jax.tree.leaves(tree), axes_of(tree)))

    def init(params):
        groups = jax.eval_shape(sizes, params).mantissa
        return {"gamma": _zero(groups.dtype, groups.shape), "count": count_of()}

    def update(updates, memory, params):
        leaves, structure = jax.tree.flatten(updates)
        whole, size, gamma = scale.normal(scale.norm(updates)), sizes(updates), memory["gamma"]
        relative, absolute, old, new = (
            scale.of_number(x, size.mantissa.dtype)
            for x in (lambda_rel, lambda_abs, beta, 1 - beta)
        )
        is_warm = memory["count"] >= warmup_steps
        has_gamma = gamma.mantissa > 0
        limit = _where(has_gamma, scale.times(gamma, relative), _unlimited(size))
        over_first = scale.greater(whole, absolute) & jnp.isfinite(whole.mantissa)
        over = jnp.where(is_warm, scale.greater(size, limit), over_first)
        over &= jnp.isfinite(size.mantissa)
        factor = _where(is_warm, scale.divide(limit, size), scale.divide(absolute, whole))
        kept = _where(over, scale.times(size, factor), size)
        average = scale.plus(scale.times(gamma, old), scale.times(kept, new))
        smallest = _where(scale.greater(gamma, kept), kept, gamma)
        after = _where(has_gamma, _where(is_warm, average, smallest), kept)
        threshold = _where(is_warm, limit, _unlimited(size))
        telemetry = scale.log2(size), over.astype(jnp.float32), scale.log2(threshold)
        axes, done = axes_of(updates), []
        groups = scale.split((factor, over, telemetry), leaves, axes)
        for x, inner, (by, where, row) in zip(leaves, axes, groups, strict=True):
            out = jnp.where(where, scale.multiply(x, by, shrinks=True), x)
            done.append((out, *(part.reshape(x.shape[: x.ndim - len(inner)]) for part in row)))
        out, log2_norm, clipped, log2_threshold = columns(structure, done, 4)
        memory = {"gamma": _where(_known(size), after, gamma), "count": memory["count"] + 1}
        return Outcome(out, log2_norm, clipped, memory, {"log2_threshold": log2_threshold})

    return rule("adagc", update, init, clips=True)


def spam(
    inner: optax.GradientTransformation,
    threshold: Number = 5000.0,
    reset_every: Number = 500,
    warmup_steps: Number = 150,
    decay: Number = 0.999,
    min_history: Number = 20,
) -> optax.GradientTransformationExtraArgs:
    """Spike-aware wrapper of an optimiser: clips entries that spike, resets moments periodically.

        g_i -> sign(g_i) sqrt(threshold v_i)   where g_i^2 > threshold v_i
        v_i <- decay v_i + (1 - decay) g_i^2

    Every `reset_every` steps the state of `inner` starts anew, and k steps later its update is
    multiplied by 1 - .99 (1 + cos(pi k / (warmup_steps + 1))) / 2 for k < warmup_steps, from .01 to
    1. The whole state of `inner` is reset, so a schedule belongs behind this wrapper:
    `chain(spam(scale_by_adam()), scale_by_schedule(...))`.

    In the paper v is Adam's own second moment, and is lost with it at a reset, after which nothing
    is clipped for `min_history` steps. Here v belongs to the wrapper, for any optimiser, and is not
    reset, so that only the first steps are unprotected. An entry whose gradient was 0 so far has no
    v and is not clipped (the paper would hold it at 0 forever).

    Args:
      inner: any optax transform.
      threshold: on g^2 / v, 5000 in the paper. May be traced.
      reset_every: 500 in the paper. May be traced.
      warmup_steps: 150 in the paper. May be traced.
      decay: of v in [0, 1), Adam's .999. May be traced.
      min_history: steps before the first clipping, 20 in the authors' code. May be traced.

    References:
      Huang et al. 2025, SPAM: spike-aware Adam with momentum reset for stable LLM training, arXiv
      2501.06842.
    """
    check_number("spam: reset_every", reset_every, 1, 2**31 - 1)
    check_number("spam: threshold", threshold)
    check_number("spam: warmup_steps", warmup_steps)
    check_number("spam: min_history", min_history)
    _check_decay("spam: decay", decay)
    inner = optax.with_extra_args_support(inner)
    clip_entries = compile_when_eager(_clip_entries, threshold, decay, min_history)

    def init(params):
        moments = [
            _zero(size.mantissa.dtype, size.mantissa.shape)
            for size in jax.eval_shape(_entries, jax.tree.leaves(params))
        ]
        return {"inner": inner.init(params), "root_moment": moments, "count": count_of()}

    def update(updates, memory, params):
        count = memory["count"]
        done, moments = clip_entries(jax.tree.leaves(updates), memory["root_moment"], count)
        out, log2_norm, clipped = columns(jax.tree.structure(updates), done, 3)
        after = count % jnp.asarray(reset_every, jnp.int32)
        is_reset = (count > 0) & (after == 0)
        start = inner.init(updates if params is None else params)
        out, state = inner.update(out, _where(is_reset, start, memory["inner"]), params)
        turn = jnp.pi * after.astype(jnp.float32) / (jnp.asarray(warmup_steps, jnp.float32) + 1)
        is_warming = (count >= reset_every) & (after < warmup_steps)
        factor = jnp.where(is_warming, 1 - 0.495 * (1 + jnp.cos(turn)), 1.0)
        out = jax.tree.map(lambda x: jnp.where(factor == 1, x, x * factor.astype(x.dtype)), out)
        memory = {"inner": state, "root_moment": moments, "count": count + 1}
        extra = {"reset": is_reset.astype(jnp.int32), "warmup": factor}
        return Outcome(out, log2_norm, clipped, memory, extra)

    return rule("spam", update, init, clips=True)


def _entries(leaves: list[Array]) -> list[Norm]:
    """The magnitudes of all entries."""
    return [scale.normal(size) for size in scale.array_norms(leaves, [()] * len(leaves))]


def _clip_entries(threshold: Number, decay: Number, min_history: Number) -> Callable:
    """(leaves, root moments, count) -> rows (leaf, log2 norm, fraction clipped), root moments."""

    def clip_leaf(x, moment, size, count):
        dtype = size.mantissa.dtype
        root, old, new = (
            scale.of_number(jnp.sqrt(jnp.asarray(value, dtype)), dtype)
            for value in (threshold, decay, 1 - decay)
        )
        has_moment = (moment.mantissa > 0) & (count >= min_history)
        limit = _where(has_moment, scale.times(moment, root), _unlimited(size))
        out, over = limit_to(x, size, limit)
        kept = _where(over, limit, size)
        after = scale.normal(scale.combine([scale.times(moment, old), scale.times(kept, new)]))
        fraction = jnp.zeros((), jnp.float32)
        if x.size:
            fraction = jnp.mean(over.astype(jnp.float32))
        row = out, scale.log2(layer_norm(size, False)), fraction
        return row, _where(_known(size), after, moment)

    def clip_entries(leaves, moments, count):
        sizes = _entries(leaves)
        done = [clip_leaf(*each, count) for each in zip(leaves, moments, sizes, strict=True)]
        return [row for row, _ in done], [moment for _, moment in done]

    return clip_entries
