"""Optax transforms that survive an explosion: clipping, guards, projections, schedules, telemetry.

Each is a factory that returns an `optax.GradientTransformation` and drops into any `optax.chain`.
"""

from gradjax.core.names import suggest_names
from gradjax.transforms.adaptive import adagc, autoclip, historical_clip, spam, zclip
from gradjax.transforms.clipping import (
    adaptive_grad_clip,
    clip,
    clip_by_block_rms,
    clip_by_global_norm,
    clip_by_layer_norm,
    normalize_by_norm,
    per_example_clip,
)
from gradjax.transforms.guards import (
    CAUSES,
    freeze_diverged,
    last_good_params,
    leaf_name,
    skip_non_finite,
    skip_spikes,
)
from gradjax.transforms.moments import restore_moments
from gradjax.transforms.projections import (
    add_l1,
    max_norm,
    proximal_l1,
    spectral_norm,
    weight_clip,
)
from gradjax.transforms.rule import RuleState, clipping_rules, telemetry
from gradjax.transforms.schedules import (
    exponential_decay,
    growth_limited_warmup,
    piecewise_constant_schedule,
    reduce_on_plateau,
    warmup_cosine_decay_schedule,
)
from gradjax.transforms.watching import watch

__all__ = [
    # clipping
    "clip",
    "clip_by_global_norm",
    "clip_by_layer_norm",
    "clip_by_block_rms",
    "adaptive_grad_clip",
    "normalize_by_norm",
    "per_example_clip",
    # clipping with a memory
    "autoclip",
    "historical_clip",
    "zclip",
    "adagc",
    "spam",
    # guards
    "skip_non_finite",
    "skip_spikes",
    "freeze_diverged",
    "last_good_params",
    "leaf_name",
    "CAUSES",
    "restore_moments",
    # projections and penalties
    "weight_clip",
    "max_norm",
    "spectral_norm",
    "proximal_l1",
    "add_l1",
    # schedules
    "warmup_cosine_decay_schedule",
    "exponential_decay",
    "piecewise_constant_schedule",
    "growth_limited_warmup",
    "reduce_on_plateau",
    # telemetry
    "watch",
    "telemetry",
    "clipping_rules",
    "RuleState",
]

__getattr__ = suggest_names(__name__, __all__)
