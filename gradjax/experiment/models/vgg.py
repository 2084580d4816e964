"""VGG (Simonyan & Zisserman 2014, arXiv 1409.1556) for small images: only 3x3 convolutions.

    stage s: conv 3x3, 2^s w, then equal ones;   2x2 pool;   ...   then a dense layer of 8w, and the
    logits

`depth` convolutions are divided over three stages (fewer where depth is less than 3), the earlier
ones getting one more where it does not divide; each stage ends with its pooling, the layers between
its first and last are one scan. This is also the plain network of He et al. 2015 (arXiv
1502.01852), whose 22 and 30 layers Xavier's initialisation does not train. Scaled: three stages for
five, one dense layer of 8w for two of 4096.
"""

from jax import Array

from gradjax.experiment.models.convolution import ConvLayer, ConvNet, DenseLayer, blocks_per_stage
from gradjax.experiment.models.network import Part, Readout, part


class VGG(ConvNet, kw_only=True):
    """`depth` convolutions, `width` channels in the first stage, a dense layer and a read-out."""

    depth: int
    width: int
    dropout: float | Array | None = None

    def _parts(self, x: Array) -> list[Part]:
        parts = []
        for stage, count in enumerate(blocks_per_stage(self.depth)):
            name, own = f"stage_{stage + 1}", {"features": self.width * 2**stage}
            first = {"flat": stage == 0, "pooled": count == 1, **own}
            parts.append(part(f"{name}_first", self, ConvLayer, **first))
            if count > 2:
                parts.append(part(name, self, ConvLayer, count - 2, **own))
            if count > 1:
                parts.append(part(f"{name}_last", self, ConvLayer, pooled=True, **own))
        parts.append(part("dense", self, DenseLayer, width=8 * self.width))
        return [*parts, part("readout", self, Readout)]
