"""Residual network of convolutions (He et al. 2016, arXiv 1603.05027, full pre-activation), with or
without BatchNorm.

    h_{l+1} = h_l + residual_scale f(h_l),   f(h) = W'' * phi(norm(W' * phi(norm(h)) + b')) + b''

on small images as in He et al. 2015 (arXiv 1512.03385, section 4.2): a 3x3 convolution to `width`
channels, then three stages (fewer where depth is less than 3) over which `depth` blocks are shared
out. From the second stage on the first block halves the sides and doubles the channels, and its
skip is a 1x1 convolution of stride 2; the other blocks of a stage are equal, and one scan. A last
phi(norm(h)) and the mean over pixels come before the logits. A block's maps apart, the forms of
`gradjax.models.mlp` hold:

    residual_learned   the scale is a parameter of each block (SkipInit, De & Smith 2020, arXiv 2002.10444: from 0)
    fixup              f(h) = W'' * (phi(W' * (a + b1) + b2) + b3), a = phi(h), and h + s f(h) + b4: W'' and the
                       read-out start at 0, W' is scaled by depth^(-1/2); no normalisation
                                                            (Zhang, Dauphin, Ma 2019, arXiv 1901.09321)
"""

from typing import Any

import flax.linen as nn
from jax import Array

from gradjax.experiment.models.convolution import (
    Conv,
    Network,
    Part,
    Readout,
    part,
    settings,
    blocks_per_stage,
)
from gradjax.experiment.models.layers import Activation, Skip, Treated, image_of, normalize


class Stem(nn.Module):
    """The first convolution, linear: the blocks activate what they are given."""

    width: int
    sigma_w: float | Array
    sigma_b: float | Array
    weights: str
    weight_standardization: bool

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Flat images (..., features) -> (..., side, side, width)."""
        return settings(self, Conv, features=self.width, name="conv")(image_of(x))


class Rectify(nn.Module):
    """phi(norm(h))."""

    activation: str
    normalization: str
    depth: int

    @nn.compact
    def __call__(self, h: Array, train: bool) -> Array:
        """A state of the same shape."""
        return Activation(self.activation, self.depth, name="activation")(
            normalize(self.normalization, h, train)
        )


class Head(nn.Module):
    """Logits of the mean pixel of phi(norm(h))."""

    num_outputs: int
    depth: int
    activation: str
    normalization: str
    fixup: bool = False

    @nn.compact
    def __call__(self, h: Array, train: bool) -> Array:
        """(..., side, side, channels) -> (..., num_outputs)."""
        a = settings(self, Rectify, name="rectify")(h, train)
        return Readout(self.num_outputs, zero=self.fixup, name="logits")(a, train)


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
        return settings(
            self,
            Conv,
            name=name,
            **{"features": self.features, "stride": 1, "sigma_w": sigma_w, **own},
        )

    @nn.compact
    def __call__(self, h: Array, train: bool) -> Array:
        """(..., side, side, channels) -> (..., side / stride, side / stride, features)."""
        rectify = lambda name: settings(self, Rectify, name=name)
        shift = lambda name, h: (
            h + self.param(name, nn.initializers.zeros, (), h.dtype) if self.fixup else h
        )
        a, no_bias = rectify("rectify_1")(h, train), not self.fixup
        down = self._conv(
            "conv_1", self.depth**-0.5 if self.fixup else 1.0, stride=self.stride, use_bias=no_bias
        )
        a = rectify("rectify_2")(shift("bias_2", down(shift("bias_1", a))), train)
        branch = self._conv("conv_2", 0.0 if self.fixup else 1.0, use_bias=no_bias)(
            shift("bias_3", a)
        )
        if branch.shape != h.shape:  # equal lengths, whatever scale the branch has
            h = self._conv("shortcut", stride=self.stride, size=1, use_bias=False, sigma_w=1.0)(h)
        skip = Skip(self.residual_scale, self.residual_learned or self.fixup, name="skip")
        return shift("bias_4", skip(h, branch))


class ResNet(Network, kw_only=True):
    """`depth` residual blocks of two 3x3 convolutions, `width` channels in the first stage, and a
    read-out.
    """

    depth: int
    width: int
    residual_scale: float | Array = 1.0
    residual_learned: bool = False
    fixup: bool = False

    @staticmethod
    def check_compatible(model: Any) -> str:
        """Which of the settings, of this module or of a `gradjax.config.Model`, exclude each other;
        empty if none.
        """
        if model.fixup and (model.normalization != "none" or model.weight_standardization):
            return (
                "resnet: model.fixup stands in normalisation's place; leave model.normalization and "
                "model.weight_standardization out."
            )
        return ""

    def _parts(self, x: Array) -> list[Part]:
        if reason := self.check_compatible(self):
            raise ValueError(reason)
        parts = [part("embed", self, Stem)]
        for stage, count in enumerate(blocks_per_stage(self.depth)):
            own = {"features": self.width * 2**stage}
            parts += [part(f"down_{stage}", self, Block, stride=2, **own)] if stage else []
            count -= bool(stage)
            parts += (
                [part(f"stage_{stage + 1}", self, Block, count, stride=1, **own)] if count else []
            )
        return [*parts, part("readout", self, Head)]
