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
from gradjax.transforms.rule import RuleState as RuleState
from gradjax.transforms.rule import telemetry as telemetry
