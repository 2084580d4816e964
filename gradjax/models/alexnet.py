"""AlexNet (Krizhevsky, Sutskever, Hinton 2012) for small images: five convolutions, two dense layers, a read-out.

    conv 5x5, w -> pool -> conv 5x5, 8w/3 -> pool -> conv 3x3, 4w -> conv 3x3, 4w -> conv 3x3, 8w/3 -> pool -> 8w -> 8w

each with phi, in the paper's proportions of channels (96, 256, 384, 384, 256) with w = `width`. Scaled: 5x5 for 11x11
with stride 4, pooling 2x2 for 3x3, dense layers of 8w for 4096, one stream for two, `normalization` for the local one.
Dropout follows the dense layers, as in the paper (there with rate 0.5).
"""

from typing import Any

import flax.linen as nn
from jax import Array

from gradjax.models.convolution import ConvLayer, DenseLayer, Part, Readout, forward, links_of, part
from gradjax.step import Links

PyTree = Any
LAYERS = 7


class AlexNet(nn.Module):
    """Five convolutions whose first has `width` channels, two dense layers and a linear read-out."""

    num_outputs: int
    width: int
    activation: str = "tanh"
    sigma_w: float | Array = 1.0
    sigma_b: float | Array = 0.0
    weights: str = "gaussian"
    weight_standardization: bool = False
    normalization: str = "none"
    dropout: float | Array | None = None

    def _parts(self) -> list[Part]:
        wide = 8 * self.width // 3
        plan = [(self.width, 5, True), (wide, 5, True), (4 * self.width, 3, False), (4 * self.width, 3, False)]
        plan.append((wide, 3, True))
        convolutions = [
            part(f"conv_{i}", self, ConvLayer, features=n, size=size, pooled=pooled, flat=i == 1, depth=LAYERS)
            for i, (n, size, pooled) in enumerate(plan, 1)
        ]
        dense = [part(f"dense_{i}", self, DenseLayer, width=8 * self.width, depth=LAYERS) for i in (1, 2)]
        return [*convolutions, *dense, part("readout", self, Readout)]

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Logits (batch, num_outputs) of flat images (batch, features)."""
        return forward(self._parts(), x, train)

    def links(self, variables: PyTree, x: Array, key: Array | None = None) -> tuple[Array, Links]:
        """The eight layers; see `gradjax.models.convolution.links_of`."""
        return links_of(self._parts(), variables, x, key)
