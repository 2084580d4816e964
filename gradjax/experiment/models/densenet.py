"""DenseNet (Huang et al. 2017, arXiv 1608.06993): every layer's output is appended to its input.

    h_{l+1} = [h_l, W_l * phi(norm(h_l)) + b_l],   3x3, with growth = width / 2 new channels

on small images: a 3x3 convolution to `width` channels (twice the growth, as in the paper's
DenseNet-BC), then three dense blocks (fewer where depth is less than 3) over which `depth` layers
are divided, with a transition between two blocks: phi(norm(h)), a 1x1 convolution to half the
channels, the mean of 2x2 pixels. A last phi(norm(h)) and the mean over pixels come before the
logits. Layers have unequal shapes, so compile time grows with depth.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from gradjax.experiment.models.convolution import Conv, ConvNet, blocks_per_stage, pool
from gradjax.experiment.models.layers import Treated, settings
from gradjax.experiment.models.network import Part, part
from gradjax.experiment.models.resnet import Head, Rectify, Stem


class Append(Treated):
    """[h, W * phi(norm(h)) + b]."""

    growth: int
    depth: int

    @nn.compact
    def __call__(self, h: Array, train: bool) -> Array:
        """(..., side, side, channels) -> (..., side, side, channels + growth)."""
        a = settings(self, Rectify, name="rectify")(h, train)
        new = settings(self, Conv, features=self.growth, name="conv")(a)
        return jnp.concatenate([h, new], -1)


class Transition(Treated):
    """Half the channels, half the sides."""

    depth: int

    @nn.compact
    def __call__(self, h: Array, train: bool) -> Array:
        """(..., side, side, channels) -> (..., side / 2, side / 2, channels / 2)."""
        a = settings(self, Rectify, name="rectify")(h, train)
        half = max(h.shape[-1] // 2, 1)
        return pool(settings(self, Conv, features=half, size=1, name="conv")(a), average=True)


class DenseNet(ConvNet, kw_only=True):
    """`depth` layers in dense blocks, each of which adds width / 2 channels, and a read-out."""

    depth: int
    width: int

    def _parts(self, x: Array) -> list[Part]:
        parts = [part("embed", self, Stem)]
        growth, layer = max(self.width // 2, 1), 0
        for stage, count in enumerate(blocks_per_stage(self.depth)):
            if stage:
                parts.append(part(f"transition_{stage}", self, Transition))
            for _ in range(count):
                layer += 1
                parts.append(part(f"dense_{layer}", self, Append, growth=growth))
        return [*parts, part("readout", self, Head)]
