"""Deep graph convolution (Kipf & Welling 2017, arXiv 1609.02907, eq. 2), with over-smoothing.

    H_1 = phi(norm(A_hat X W_0 + b_0))
    H_{l+1} = [H_l + residual_scale] phi(norm(A_hat H_l W_l + b_l)),   logits = H_L V + c

An example is a float array [A_hat | X] of shape (nodes, nodes + features): the graph's normalised
adjacency D^(-1/2) (A + I) D^(-1/2), then the features of its nodes (`gradjax.tasks.graphs` makes
such). A_hat has the eigenvalue 1 with the eigenvector sqrt(degree) and the others between -1 and 1,
so each layer shrinks the differences between nodes by them, to nothing for a deep network whatever
W is (over-smoothing; Oono & Suzuki 2020, arXiv 1905.10947), and with the differences it shrinks the
gradient that could separate the nodes. A residual layer keeps them. `depth` counts H_1 .. H_L; the
L - 1 equal layers are one scan. With `per_step` every node has logits; without it, the graph has,
computed from the mean node.

The state is H only: the graph is a constant of every layer, and gets no gradient.
"""

import flax.linen as nn
from jax import Array, lax

from gradjax.experiment.models.layers import (
    Activation,
    Dense,
    Skip,
    Treated,
    normalize,
    settings,
)
from gradjax.experiment.models.network import Network, Part, Readout, part


class Layer(Treated):
    """One graph convolution."""

    graph: Array
    first: bool
    width: int
    depth: int
    residual: bool
    residual_scale: float | Array
    residual_learned: bool

    @nn.compact
    def __call__(self, h: Array, train: bool) -> Array:
        """H (..., nodes, features) -> (..., nodes, width)."""
        z = settings(self, Dense, name="dense")(self.graph @ h)
        z = normalize(self.normalization, z, train)
        a = Activation(self.activation, self.depth, name="activation")(z)
        if self.residual and not self.first:
            return Skip(self.residual_scale, self.residual_learned, name="skip")(h, a)
        return a


def split(x: Array) -> tuple[Array, Array]:
    """A_hat and X of [A_hat | X].

    Raises:
      ValueError: a shape other than (..., nodes, nodes + features).
    """
    if x.ndim < 2 or x.shape[-2] >= x.shape[-1]:
        raise ValueError(
            f"gcn: an example has shape {x.shape[-2:]}; a graph is (nodes, nodes + features). "
            "Choose a task of graphs, as task.name = 'communities'."
        )
    nodes = x.shape[-2]
    return x[..., :nodes], x[..., nodes:]


class GCN(Network, kw_only=True):
    """`depth` graph convolutions of `width` features per node, and a linear read-out."""

    depth: int
    width: int
    residual: bool = False
    residual_scale: float | Array = 1.0
    residual_learned: bool = False
    per_step: bool = False

    @nn.nowrap
    def _check(self, x: Array) -> None:
        super()._check(x)
        # Without a batch of graphs, the first axis is that of the examples.
        split(x if x.ndim == 3 else x[0])

    @nn.nowrap
    def _first_state(self, x: Array) -> Array:
        return split(x)[1]

    def _parts(self, x: Array) -> list[Part]:
        graph = lax.stop_gradient(split(x)[0])
        parts = [part("embed", self, Layer, graph=graph, first=True)]
        if self.depth > 1:
            parts.append(part("stage", self, Layer, self.depth - 1, graph=graph, first=False))
        return [*parts, part("readout", self, Readout, averaged=0 if self.per_step else 1)]
