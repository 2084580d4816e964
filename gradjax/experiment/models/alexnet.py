"""AlexNet (Krizhevsky, Sutskever, Hinton 2012) for small images.

    conv 5x5, w -> pool -> conv 5x5, 8w/3 -> pool -> conv 3x3, 4w -> conv 3x3, 4w -> conv 3x3, 8w/3
    -> pool -> 8w -> 8w -> logits

each with phi, in the paper's proportions of channels (96, 256, 384, 384, 256) with w = `width`.
Scaled: 5x5 for 11x11 with stride 4, pooling 2x2 for 3x3, dense layers of 8w for 4096, one stream
for two, `normalization` for the local one. Dropout follows the dense layers, as in the paper (there
with rate 0.5).
"""

from jax import Array

from gradjax.experiment.models.convolution import ConvLayer, ConvNet, DenseLayer
from gradjax.experiment.models.network import Part, Readout, part

LAYERS = 7


class AlexNet(ConvNet, kw_only=True):
    """Five convolutions whose first has `width` channels, two dense layers and a read-out."""

    width: int
    dropout: float | Array | None = None

    def _parts(self, x: Array) -> list[Part]:
        w = self.width
        # channels, side of the kernel, whether pooled
        plan = (w, 5, True), (8 * w // 3, 5, True), (4 * w, 3, False), (4 * w, 3, False)
        parts = []
        for i, (features, size, pooled) in enumerate([*plan, (8 * w // 3, 3, True)], 1):
            own = {"features": features, "size": size, "pooled": pooled, "flat": i == 1}
            parts.append(part(f"conv_{i}", self, ConvLayer, depth=LAYERS, **own))
        for i in (1, 2):
            parts.append(part(f"dense_{i}", self, DenseLayer, width=8 * w, depth=LAYERS))
        return [*parts, part("readout", self, Readout)]
