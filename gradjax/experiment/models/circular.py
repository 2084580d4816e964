"""Convolutional network on a torus, for which mean field theory is exact.

    h_1 = phi(norm(W_0 * x + b_0)),   h_{l+1} = phi(norm(W_l * h_l + b_l))
    logits = V mean over pixels(h_L) + c                        (Xiao et al. 2018, arXiv 1806.05393)

3x3 convolutions with circular padding and `width` channels throughout, so that all pixels are
alike: lengths and gradients grow per layer as those of an MLP, with fan_in = 9 width. `depth`
counts h_1 .. h_L; the L - 1 equal layers are one scan. With delta-orthogonal weights, sigma_w = 1,
no biases and linear phi each of these is an exact isometry.
"""

from jax import Array

from gradjax.experiment.models.convolution import ConvLayer, ConvNet
from gradjax.experiment.models.network import Part, Readout, part


class CircularCNN(ConvNet, kw_only=True):
    """`depth` circular convolutions of `width` channels and a linear read-out of the mean pixel."""

    depth: int
    width: int

    def _parts(self, x: Array) -> list[Part]:
        own = {"features": self.width, "padding": "circular"}
        parts = [part("embed", self, ConvLayer, flat=True, **own)]
        if self.depth > 1:
            parts.append(part("stage", self, ConvLayer, self.depth - 1, **own))
        return [*parts, part("readout", self, Readout, averaged=2)]
