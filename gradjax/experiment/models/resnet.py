"""Residual network of convolutions (He et al. 2016, arXiv 1603.05027, full pre-activation).

    h_{l+1} = h_l + residual_scale f(h_l),   f(h) = W'' * phi(norm(W' * phi(norm(h)) + b')) + b''

with or without BatchNorm, on small images as in He et al. 2015 (arXiv 1512.03385, section 4.2): a
3x3 convolution to `width` channels, then three stages (fewer where depth is less than 3) over which
`depth` blocks are divided. From the second stage on the first block halves the sides and doubles
the channels, and its skip is a 1x1 convolution of stride 2; the other blocks of a stage are equal,
and one scan. A last phi(norm(h)) and the mean over pixels come before the logits. Apart from a
block's maps, these are the forms of `gradjax.models.mlp`:

    residual_learned   the scale is a parameter of each block, from 0 in SkipInit (De & Smith 2020,
                       arXiv 2002.10444)
    fixup              f(h) = W'' * (phi(W' * (a + b1) + b2) + b3), a = phi(h), and h + s f(h) + b4:
                       W'' and the read-out start at 0, W' is scaled by depth^(-1/2); no
                       normalisation (Zhang, Dauphin, Ma 2019, arXiv 1901.09321)
"""

from typing import Any

import flax.linen as nn
from jax import Array

from gradjax.experiment.models.convolution import Conv, ConvNet, blocks_per_stage
from gradjax.experiment.models.layers import (
    Activation,
    Skip,
    Treated,
    image_of,
    normalize,
    settings,
)
from gradjax.experiment.models.network import Part, Readout, part
from gradjax.experiment.schema import Model


class Stem(Treated):
    """The first convolution, linear: the blocks activate what they are given."""

    width: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Flat images (..., features) -> (..., side, side, width)."""
        return settings(self, Conv, features=self.width, name="conv")(image_of(x))


class Rectify(Treated):
    """phi(norm(h))."""

    depth: int

    @nn.compact
    def __call__(self, h: Array, train: bool) -> Array:
        """A state of the same shape."""
        z = normalize(self.normalization, h, train)
        return Activation(self.activation, self.depth, name="activation")(z)


class Head(Treated, kw_only=True):
    """Logits of the mean pixel of phi(norm(h))."""

    num_outputs: int
    depth: int
    fixup: bool = False

    @nn.compact
    def __call__(self, h: Array, train: bool) -> Array:
        """(..., side, side, channels) -> (..., num_outputs)."""
        a = settings(self, Rectify, name="rectify")(h, train)
        return Readout(self.num_outputs, zero=self.fixup, averaged=2, name="logits")(a, train)


class Block(Treated):
    """One residual block; where it halves the image it has `stride` 2 and more channels."""

    features: int
    stride: int
    depth: int
    residual_scale: float | Array
    residual_learned: bool
    fixup: bool

    def _conv(self, name: str, gain: float = 1.0, **own: Any) -> Conv:
        sigma_w = self.sigma_w if gain == 1.0 else gain * self.sigma_w
        own = {"stride": 1, "sigma_w": sigma_w, "use_bias": not self.fixup, **own}
        return settings(self, Conv, name=name, **own)

    @nn.compact
    def __call__(self, h: Array, train: bool) -> Array:
        """(..., side, side, channels) -> (..., side / stride, side / stride, features)."""

        def shift(name: str, h: Array) -> Array:
            if not self.fixup:
                return h
            return h + self.param(name, nn.initializers.zeros, (), h.dtype)

        down = self._conv("conv_1", self.depth**-0.5 if self.fixup else 1.0, stride=self.stride)
        up = self._conv("conv_2", 0.0 if self.fixup else 1.0)
        a = settings(self, Rectify, name="rectify_1")(h, train)
        z = shift("bias_2", down(shift("bias_1", a)))
        a = settings(self, Rectify, name="rectify_2")(z, train)
        branch = up(shift("bias_3", a))
        if branch.shape != h.shape:
            # The skip keeps the length of its input, whatever scale the branch has.
            own = {"stride": self.stride, "size": 1, "use_bias": False, "sigma_w": 1.0}
            h = self._conv("shortcut", **own)(h)
        skip = Skip(self.residual_scale, self.residual_learned or self.fixup, name="skip")
        return shift("bias_4", skip(h, branch))


class ResNet(ConvNet, kw_only=True):
    """`depth` residual blocks, `width` channels in the first stage, and a read-out."""

    depth: int
    width: int
    residual_scale: float | Array = 1.0
    residual_learned: bool = False
    fixup: bool = False

    @staticmethod
    def check_compatible(model: Model) -> str:
        """Why the settings exclude each other; empty where they do not."""
        if model.fixup and (model.normalization != "none" or model.weight_standardization):
            return (
                "resnet: model.fixup stands in normalisation's place; leave model.normalization "
                "and model.weight_standardization out."
            )
        return ""

    def _parts(self, x: Array) -> list[Part]:
        parts = [part("embed", self, Stem)]
        for stage, count in enumerate(blocks_per_stage(self.depth)):
            features = self.width * 2**stage
            if stage:
                parts.append(part(f"down_{stage}", self, Block, stride=2, features=features))
                count -= 1
            if count:
                own = {"stride": 1, "features": features}
                parts.append(part(f"stage_{stage + 1}", self, Block, count, **own))
        return [*parts, part("readout", self, Head)]
