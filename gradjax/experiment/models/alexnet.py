"""AlexNet (Krizhevsky, Sutskever, Hinton 2012) for small images: five convolutions, two dense
layers, a read-out.

    conv 5x5, w -> pool -> conv 5x5, 8w/3 -> pool -> conv 3x3, 4w -> conv 3x3, 4w -> conv 3x3, 8w/3
    -> pool -> 8w -> 8w

each with phi, in the paper's proportions of channels (96, 256, 384, 384, 256) with w = `width`.
Scaled: 5x5 for 11x11 with stride 4, pooling 2x2 for 3x3, dense layers of 8w for 4096, one stream
for two, `normalization` for the local one. Dropout follows the dense layers, as in the paper (there
with rate 0.5).
"""

from jax import Array

from gradjax.experiment.models.convolution import (
    ConvLayer,
    DenseLayer,
    Network,
    Part,
    Readout,
    part,
)

LAYERS = 7


class AlexNet(Network, kw_only=True):
    """Five convolutions whose first has `width` channels, two dense layers and a linear
    read-out.
    """

    width: int
    dropout: float | Array | None = None

    def _parts(self, x: Array) -> list[Part]:
        wide = 8 * self.width // 3
        plan = [
            (self.width, 5, True),
            (wide, 5, True),
            (4 * self.width, 3, False),
            (4 * self.width, 3, False),
        ]
        plan.append((wide, 3, True))
        convolutions = [
            part(
                f"conv_{i}",
                self,
                ConvLayer,
                features=n,
                size=size,
                pooled=pooled,
                flat=i == 1,
                depth=LAYERS,
            )
            for i, (n, size, pooled) in enumerate(plan, 1)
        ]
        dense = [
            part(f"dense_{i}", self, DenseLayer, width=8 * self.width, depth=LAYERS) for i in (1, 2)
        ]
        return [*convolutions, *dense, part("readout", self, Readout)]
