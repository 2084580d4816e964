"""Inception (Szegedy et al. 2015, arXiv 1409.4842, figure 2b): several sizes side by side.

    h' = [phi(W1 h), phi(W3 * phi(W3' h)), phi(W5 * phi(W5' h)), phi(Wp pool(h))]

(each with its norm and bias): 1x1, 3x3 and 5x5 convolutions, the larger ones after a 1x1 one to
half of their channels, and a 1x1 one of the largest of 3x3 neighbours. The four divide the block's
channels as GoogLeNet's first block does, 1/4, 1/2, 1/8 and 1/8. On small images: a 3x3 convolution
to `width` channels, then three stages (fewer where depth is less than 3) over which `depth` blocks
are divided; from the second on the first block doubles the channels after a 2x2 pooling, the others
of a stage are equal, and one scan. The mean over pixels comes before the logits. `width` is at
least 8.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from gradjax.experiment.models.convolution import (
    ConvLayer,
    ConvNet,
    blocks_per_stage,
    neighbours,
    pool,
)
from gradjax.experiment.models.layers import Treated, settings
from gradjax.experiment.models.network import Part, Readout, part
from gradjax.experiment.schema import Model


class Block(Treated):
    """Four branches of one input, put side by side; a `halved` block pools its input first."""

    features: int
    halved: bool
    depth: int

    @nn.compact
    def __call__(self, h: Array, train: bool) -> Array:
        """(..., side, side, channels) -> (..., side, side, features), the side maybe halved."""

        def conv(name: str, h: Array, features: int, size: int = 1) -> Array:
            own = {"features": max(features, 1), "size": size, "name": name}
            return settings(self, ConvLayer, **own)(h, train)

        h = pool(h) if self.halved else h
        n = self.features
        three = conv("three", conv("three_before", h, n // 4), n // 2, 3)
        five = conv("five", conv("five_before", h, n // 16), n // 8, 5)
        pooled = conv("pooled", neighbours(h), n // 8)
        return jnp.concatenate([conv("one", h, n - n // 2 - 2 * (n // 8)), three, five, pooled], -1)


class Inception(ConvNet, kw_only=True):
    """`depth` blocks, `width` channels in the first stage, and a read-out."""

    depth: int
    width: int

    @staticmethod
    def check_compatible(model: Model) -> str:
        """Why there is no network of this width; empty where there is."""
        if model.width >= 8:
            return ""
        return (
            f"inception: model.width is {model.width}; its four branches need 8 channels or more."
        )

    def _parts(self, x: Array) -> list[Part]:
        parts = [part("embed", self, ConvLayer, features=self.width, flat=True)]
        for stage, count in enumerate(blocks_per_stage(self.depth)):
            features = self.width * 2**stage
            if stage:
                parts.append(part(f"down_{stage}", self, Block, halved=True, features=features))
                count -= 1
            if count:
                own = {"halved": False, "features": features}
                parts.append(part(f"stage_{stage + 1}", self, Block, count, **own))
        return [*parts, part("readout", self, Readout, averaged=2)]
