"""Architectures in Flax Linen, one per file, each with its `links`: the same network as steps.

`MODELS` is the one place that knows the names: name -> function(config, num_outputs) -> module with `links`.
"""

from gradjax.models.mlp import MLP

MODELS = {"mlp": MLP.from_config}

__all__ = ["MLP", "MODELS"]
