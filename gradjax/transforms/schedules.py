"""Schedules whose numbers may be traced: one program trains a vmapped sweep of learning rates.

Optax's `warmup_cosine_decay_schedule`, `exponential_decay`, `piecewise_constant_schedule` and
`reduce_on_plateau` branch on their floats in Python and raise on a tracer. These have the same
names, arguments and (to rounding) values; every number, floats and step counts alike, may be traced
and vmapped. A schedule is a function step -> value in float32 (float64 under x64). Static numbers
are checked, traced ones are not.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.core import Tracer

from gradjax.transforms.eager import compile_when_eager
from gradjax.transforms.rule import RuleState, check_number, count_of

Number = float | Array
Steps = int | Array


def _float(x: Any) -> Array:
    return jnp.asarray(x).astype(jnp.result_type(float))


def _fraction(count: Any, steps: Any) -> Array:
    """count / steps in [0, 1]; 1 from the start for 0 steps."""
    steps = _float(steps)
    return jnp.where(steps > 0, jnp.clip(_float(count) / jnp.maximum(steps, 1), 0, 1), 1)


def warmup_cosine_decay_schedule(
    init_value: Number,
    peak_value: Number,
    warmup_steps: Steps,
    decay_steps: Steps,
    end_value: Number = 0.0,
    exponent: Number = 1.0,
) -> optax.Schedule:
    """Linear from `init_value` to `peak_value`, then half a cosine down to `end_value`.

        peak (alpha + (1 - alpha) ((1 + cos(pi t / T)) / 2)^exponent)

    with T = decay_steps - warmup_steps, t = step - warmup_steps, alpha = end_value / peak_value.

    Args:
      init_value: first value.
      peak_value: value at `warmup_steps`; with 0 the decay is 0 throughout, as in Optax.
      warmup_steps: length of the warm-up; 0 for none.
      decay_steps: the whole length, warm-up included, more than `warmup_steps`.
      end_value: value from `decay_steps` on.
      exponent: of the cosine.

    References:
      Loshchilov, Hutter 2017, SGDR, arXiv 1608.03983, eq. 5; Goyal et al. 2017, Accurate, large
      minibatch SGD, arXiv 1706.02677, section 2.2 (linear warm-up).
    """
    check_number("warmup_cosine_decay_schedule: warmup_steps", warmup_steps)
    check_number("warmup_cosine_decay_schedule: decay_steps", decay_steps, open_low=True)
    if not isinstance(warmup_steps, Tracer) and not isinstance(decay_steps, Tracer):
        check_number(
            "warmup_cosine_decay_schedule: decay_steps - warmup_steps", decay_steps - warmup_steps
        )

    def schedule(count):
        first, peak, last = map(_float, (init_value, peak_value, end_value))
        rising = first + (peak - first) * _fraction(count, warmup_steps)
        passed = _float(count) - _float(warmup_steps)
        turn = jnp.pi * _fraction(passed, decay_steps - warmup_steps)
        cosine = jnp.power(0.5 * (1 + jnp.cos(turn)), _float(exponent))
        falling = jnp.where(peak == 0, 0, last + (peak - last) * cosine)
        return jnp.where(passed < 0, rising, falling)

    return schedule


def exponential_decay(
    init_value: Number,
    transition_steps: Steps,
    decay_rate: Number,
    transition_begin: Steps = 0,
    staircase: bool = False,
    end_value: Number | None = None,
) -> optax.Schedule:
    """init_value * decay_rate^((step - transition_begin) / transition_steps).

    Args:
      init_value: value up to `transition_begin`.
      transition_steps: steps per factor of `decay_rate`; constant for <= 0, as in Optax.
      decay_rate: non-negative; constant for 0, as in Optax.
      transition_begin: first step of the decay.
      staircase: whether the exponent is rounded down.
      end_value: a lower bound for decay_rate < 1, an upper bound otherwise.
    """
    check_number("exponential_decay: decay_rate", decay_rate)

    def schedule(count):
        first, rate, steps = map(_float, (init_value, decay_rate, transition_steps))
        passed = _float(jnp.asarray(count) - jnp.maximum(jnp.asarray(transition_begin), 0))
        exponent = passed / jnp.where(steps > 0, steps, 1)
        if staircase:
            exponent = jnp.floor(exponent)
        value = first * jnp.power(jnp.where(rate > 0, rate, 1), exponent)
        value = jnp.where(passed <= 0, first, value)
        if end_value is not None:
            last = _float(end_value)
            value = jnp.where(rate < 1, jnp.maximum(value, last), jnp.minimum(value, last))
        return jnp.where((steps > 0) & (rate != 0), value, first)

    return schedule


def piecewise_constant_schedule(
    init_value: Number,
    boundaries_and_scales: Mapping[int, Number] | Sequence[tuple[Steps, Number]] | None = None,
) -> optax.Schedule:
    """Step decay: init_value times every scale whose boundary has been reached (step >= boundary).

    Args:
      init_value: first value.
      boundaries_and_scales: {step: non-negative scale}; the scales may be traced. With traced
        boundaries pass a sequence of pairs instead of a dict.
    """
    pairs = boundaries_and_scales or {}
    pairs = list(pairs.items() if isinstance(pairs, Mapping) else pairs)
    for boundary, factor in pairs:
        check_number(f"piecewise_constant_schedule: the scale at step {boundary}", factor)

    def schedule(count):
        value = _float(init_value)
        for boundary, factor in pairs:
            is_reached = jnp.asarray(count) >= jnp.asarray(boundary)
            value = value * jnp.where(is_reached, _float(factor), 1)
        return value

    return schedule


def growth_limited_warmup(
    schedule: Number | optax.Schedule, init_value: Number, max_growth: Number = 1.02
) -> optax.Schedule:
    """min(schedule(step), init_value * max_growth^step): a warm-up set by its rate of growth.

    Its length follows from the rate: at 1.02 per step it takes 349 steps from 1e-6 to 1e-3, and 581
    to 1e-1. While the limit binds, log(learning rate) grows linearly; afterwards the schedule
    applies.

    Args:
      schedule: the learning rate to reach, a number or a schedule.
      init_value: first value, positive.
      max_growth: at least 1; 1.02 is the value that D-Adaptation and Prodigy document for their
        `growth_rate`, "a kind of learning rate warmup effect".

    References:
      Defazio, Mishchenko 2023, Learning-rate-free learning by D-adaptation, arXiv 2301.07733
      (growth_rate, in the code); Kalra, Barkeshli 2024, Why warmup the learning rate?, arXiv
      2406.09405 (the benefit: sharpness falls while the rate grows).
    """
    check_number("growth_limited_warmup: init_value", init_value, open_low=True)
    check_number("growth_limited_warmup: max_growth", max_growth, 1.0)

    def limited(count):
        target = _float(schedule(count) if callable(schedule) else schedule)
        # The power itself would be inf at step 4481, its logarithm never is.
        limit = jnp.log(_float(init_value)) + _float(count) * jnp.log(_float(max_growth))
        return jnp.where(limit < jnp.log(target), jnp.exp(jnp.minimum(limit, 80)), target)

    return limited


def reduce_on_plateau(
    factor: Number = 0.1,
    patience: Steps = 10,
    rtol: Number = 1e-4,
    atol: Number = 0.0,
    cooldown: Steps = 0,
    accumulation_size: Steps = 1,
    min_scale: Number = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Multiply the updates by a scale that falls by `factor` when the loss has stopped falling.

    As `optax.contrib.reduce_on_plateau`: the mean of `accumulation_size` values passed as
    `update(..., value=loss)` is an improvement if it is below (1 - rtol) best - atol; after
    `patience` means without one the scale is multiplied by `factor`, and `cooldown` means are then
    ignored. NaN is no improvement. Telemetry: `scale`, `best_value`, `plateau_count`,
    `cooldown_count`.

    Args:
      factor: in (0, 1]. All arguments may be traced.
      patience: means without improvement before a reduction.
      rtol: relative improvement needed, in [0, 1].
      atol: absolute improvement needed.
      cooldown: means to ignore after a reduction.
      accumulation_size: values per mean.
      min_scale: lower bound of the scale.

    Raises:
      ValueError: for a static number out of its range; from `update` without `value`.
    """
    check_number("reduce_on_plateau: factor", factor, 0.0, 1.0, open_low=True)
    check_number("reduce_on_plateau: rtol", rtol, 0.0, 1.0)
    check_number("reduce_on_plateau: accumulation_size", accumulation_size, 1)
    check_number("reduce_on_plateau: atol", atol)
    check_number("reduce_on_plateau: patience", patience)
    check_number("reduce_on_plateau: cooldown", cooldown)
    check_number("reduce_on_plateau: min_scale", min_scale)
    follow = compile_when_eager(
        _follow_plateau, factor, patience, rtol, atol, cooldown, accumulation_size, min_scale
    )

    def init_fn(params):
        counters = {name: count_of() for name in ("plateau_count", "cooldown_count", "count")}
        values = {"scale": _float(1), "best_value": _float(jnp.inf), "mean": _float(0)}
        return RuleState(values | counters, (), "reduce_on_plateau")

    def update_fn(updates, state, params=None, *, value=None, **_):
        if value is None:
            raise ValueError(
                "reduce_on_plateau: it follows the loss; call update(grads, state, params, "
                "value=loss)."
            )
        out, telemetry = follow(updates, state.telemetry, value)
        return out, RuleState(telemetry, (), "reduce_on_plateau")

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # type: ignore[arg-type]


def _follow_plateau(
    factor: Number,
    patience: Steps,
    rtol: Number,
    atol: Number,
    cooldown: Steps,
    accumulation_size: Steps,
    min_scale: Number,
) -> Callable:
    """(updates, telemetry, value) -> (updates, telemetry one step later)."""

    def integer(x):
        return jnp.asarray(x).astype(jnp.int32)

    def follow(updates, old, value):
        count = old["count"] + 1
        mean = (_float(old["count"]) * old["mean"] + _float(value)) / _float(count)
        is_full = count == integer(accumulation_size)
        better = mean < (1 - _float(rtol)) * old["best_value"] - _float(atol)
        resting = old["cooldown_count"] > 0
        waited = jnp.where(better, 0, old["plateau_count"] + 1)
        reduce = ~resting & (waited == integer(patience))
        smaller = jnp.where(reduce, old["scale"] * _float(factor), old["scale"])
        smaller = jnp.maximum(smaller, _float(min_scale))
        rest = jnp.where(reduce, integer(cooldown), 0)
        after_mean = {
            "scale": jnp.where(resting, old["scale"], smaller),
            "best_value": jnp.where(better, mean, old["best_value"]),
            "mean": _float(0),
            "plateau_count": jnp.where(resting | reduce, 0, waited),
            "cooldown_count": jnp.where(resting, old["cooldown_count"] - 1, rest),
            "count": count_of(),
        }
        before_mean = old | {"mean": mean, "count": count}
        new = {name: jnp.where(is_full, after_mean[name], before_mean[name]) for name in old}
        out = jax.tree.map(lambda g: g * new["scale"].astype(g.dtype), updates)
        return out, new

    return follow
