"""LeNet-5 (LeCun, Bottou, Bengio, Haffner 1998, figure 2) as it is used today.

    28 x 28 -> conv 5x5, 6, same -> 2x2 pool -> phi -> conv 5x5, 16, valid -> 2x2 pool -> phi -> 120
    -> 84 -> logits

The maximum is pooled (1998: a weighted mean), the second convolution sees all six maps (1998: some
of them), any activation, and a linear read-out (1998: radial units). As in 1998 phi follows the
pooling, which for an increasing phi and the maximum is the same as before it. On images whose side
after the first pooling is less than 6, such as the 8 x 8 digits, the second convolution keeps the
size. 61,706 parameters on MNIST.

References:
  Gradient-based learning applied to document recognition, Proceedings of the IEEE 86 (1998).
"""

import jax
from jax import Array

from gradjax.experiment.models.convolution import ConvLayer, ConvNet, DenseLayer
from gradjax.experiment.models.layers import image_of
from gradjax.experiment.models.network import Part, Readout, part

LAYERS = 4


class LeNet5(ConvNet, kw_only=True):
    """Two convolutions, two dense layers, each with dropout behind it, and a linear read-out."""

    dropout: float | Array | None = None

    def _parts(self, x: Array) -> list[Part]:
        side = jax.eval_shape(image_of, x).shape[-2]
        padding = "valid" if side // 2 >= 6 else "same"
        conv = {"size": 5, "pooled": True, "depth": LAYERS}
        return [
            part("conv_1", self, ConvLayer, features=6, flat=True, **conv),
            part("conv_2", self, ConvLayer, features=16, padding=padding, **conv),
            part("dense_1", self, DenseLayer, width=120, depth=LAYERS),
            part("dense_2", self, DenseLayer, width=84, depth=LAYERS),
            part("readout", self, Readout),
        ]
