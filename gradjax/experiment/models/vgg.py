"""VGG (Simonyan & Zisserman 2014, arXiv 1409.1556) for small images: 3x3 convolutions only,
channels doubled by stage.

    stage s: conv 3x3, 2^s w, then equal ones;   2x2 pool;   ...   then a dense layer of 8w, and the logits

`depth` convolutions are shared out over three stages (fewer where depth is less than 3), the
earlier ones getting one more where it does not divide; each stage ends with its pooling, the layers
between its first and last are one scan. This is also the plain network of He et al. 2015 (arXiv
1502.01852), whose 22 and 30 layers Xavier's initialisation does not train. Scaled: three stages for
five, one dense layer of 8w for two of 4096.
"""

from jax import Array

from gradjax.experiment.models.convolution import (
    ConvLayer,
    DenseLayer,
    Network,
    Part,
    Readout,
    part,
    blocks_per_stage,
)


class VGG(Network, kw_only=True):
    """`depth` convolutions, `width` channels in the first stage, a dense layer and a linear
    read-out.
    """

    depth: int
    width: int
    dropout: float | Array | None = None

    def _parts(self, x: Array) -> list[Part]:
        parts = []
        for stage, count in enumerate(blocks_per_stage(self.depth)):
            channels, name = self.width * 2**stage, f"stage_{stage + 1}"
            one = lambda name, count=0, n=channels, **own: part(
                name, self, ConvLayer, count, features=n, **own
            )
            parts.append(one(f"{name}_first", flat=stage == 0, pooled=count == 1))
            parts += [one(name, count - 2)] if count > 2 else []
            parts += [one(f"{name}_last", pooled=True)] if count > 1 else []
        return [
            *parts,
            part("dense", self, DenseLayer, width=8 * self.width),
            part("readout", self, Readout),
        ]
