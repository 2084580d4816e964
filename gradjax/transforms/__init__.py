"""Optax transforms that survive an explosion: clipping, guards, projections, schedules, telemetry.

Each is a factory that returns an `optax.GradientTransformation` and drops into any `optax.chain`.
"""

from gradjax.transforms.clipping import adaptive_grad_clip as adaptive_grad_clip
from gradjax.transforms.clipping import clip as clip
from gradjax.transforms.clipping import clip_by_block_rms as clip_by_block_rms
from gradjax.transforms.clipping import clip_by_global_norm as clip_by_global_norm
from gradjax.transforms.clipping import clip_by_layer_norm as clip_by_layer_norm
from gradjax.transforms.rule import RuleState as RuleState
from gradjax.transforms.rule import telemetry as telemetry
