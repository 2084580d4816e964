"""Optax transforms that survive an explosion: clipping, guards, projections, schedules, telemetry.

Each is a factory that returns an `optax.GradientTransformation` and drops into any `optax.chain`.
"""

from gradjax.transforms.adaptive import adagc as adagc
from gradjax.transforms.adaptive import autoclip as autoclip
from gradjax.transforms.adaptive import historical_clip as historical_clip
from gradjax.transforms.adaptive import spam as spam
from gradjax.transforms.adaptive import zclip as zclip
from gradjax.transforms.clipping import adaptive_grad_clip as adaptive_grad_clip
from gradjax.transforms.clipping import clip as clip
from gradjax.transforms.clipping import clip_by_block_rms as clip_by_block_rms
from gradjax.transforms.clipping import clip_by_global_norm as clip_by_global_norm
from gradjax.transforms.clipping import clip_by_layer_norm as clip_by_layer_norm
from gradjax.transforms.clipping import normalize_by_norm as normalize_by_norm
from gradjax.transforms.clipping import per_example_clip as per_example_clip
from gradjax.transforms.clipping import prune_gradients as prune_gradients
from gradjax.transforms.guards import CAUSES as CAUSES
from gradjax.transforms.guards import freeze_diverged as freeze_diverged
from gradjax.transforms.guards import last_good_params as last_good_params
from gradjax.transforms.guards import leaf_name as leaf_name
from gradjax.transforms.guards import restore_moments as restore_moments
from gradjax.transforms.guards import skip_non_finite as skip_non_finite
from gradjax.transforms.guards import skip_spikes as skip_spikes
from gradjax.transforms.projections import add_l1 as add_l1
from gradjax.transforms.projections import max_norm as max_norm
from gradjax.transforms.projections import proximal_l1 as proximal_l1
from gradjax.transforms.projections import spectral_norm as spectral_norm
from gradjax.transforms.projections import weight_clip as weight_clip
from gradjax.transforms.rule import RuleState as RuleState
from gradjax.transforms.rule import telemetry as telemetry
from gradjax.transforms.schedules import exponential_decay as exponential_decay
from gradjax.transforms.schedules import growth_limited_warmup as growth_limited_warmup
from gradjax.transforms.schedules import piecewise_constant_schedule as piecewise_constant_schedule
from gradjax.transforms.schedules import reduce_on_plateau as reduce_on_plateau
from gradjax.transforms.schedules import (
    warmup_cosine_decay_schedule as warmup_cosine_decay_schedule,
)
from gradjax.transforms.watching import watch as watch
