"""Deep graph convolution (Kipf & Welling 2017, arXiv 1609.02907, eq. 2), where over-smoothing is a
vanishing signal.

    H_1 = phi(norm(A_hat X W_0 + b_0)),   H_{l+1} = [H_l + residual_scale] phi(norm(A_hat H_l W_l + b_l))
    logits = H_L V + c

An example is a float array [A_hat | X] of shape (nodes, nodes + features): the graph's normalised
adjacency D^(-1/2) (A + I) D^(-1/2), then the features of its nodes (`gradjax.tasks.graphs` makes
such). A_hat has the eigenvalue 1 with the eigenvector sqrt(degree) and the others between -1 and 1,
so each layer shrinks the differences between nodes by them, to nothing for a deep network whatever
W is (over-smoothing; Oono & Suzuki 2020, arXiv 1905.10947), and with the differences the gradient
that could tell nodes apart. A residual layer keeps them. `depth` counts H_1 .. H_L; the L - 1 equal
layers are one scan. With `per_step` every node has logits, else the graph, of its mean node.

`links` follows the states H alone: the graph stands in every theta, and gets no gradient.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from gradjax.core.step import Links, Scan
from gradjax.experiment.models.convolution import Stack
from gradjax.experiment.models.layers import Activation, Dense, Skip, Treated, normalize, settings

PyTree = Any


class Layer(Treated):
    """One graph convolution; the state is (A_hat, H), of which A_hat stays."""

    first: bool
    width: int
    depth: int
    residual: bool
    residual_scale: float | Array
    residual_learned: bool

    @nn.compact
    def __call__(self, state: tuple[Array, Array], train: bool) -> tuple[Array, Array]:
        """(A_hat (..., nodes, nodes), H (..., nodes, features)) -> the same with H (..., nodes,
        width).
        """
        graph, h = state
        z = settings(self, Dense, name="dense")(graph @ h)
        a = Activation(self.activation, self.depth, name="activation")(
            normalize(self.normalization, z, train)
        )
        if self.residual and not self.first:
            a = Skip(self.residual_scale, self.residual_learned, name="skip")(h, a)
        return graph, a


def split(x: Array) -> tuple[Array, Array]:
    """A_hat and X of [A_hat | X]."""
    nodes = x.shape[-2] if x.ndim > 1 else x.shape[-1]
    if nodes >= x.shape[-1]:
        raise ValueError(
            f"gcn: an example has shape {x.shape[-2:]}; a graph is (nodes, nodes + features). Choose a task of graphs, "
            "as task.name = 'communities'."
        )
    return x[..., :nodes], x[..., nodes:]


class GCN(nn.Module):
    """`depth` graph convolutions of `width` features per node, and a linear read-out."""

    num_outputs: int
    depth: int
    width: int
    activation: str = "tanh"
    sigma_w: float | Array = 1.0
    sigma_b: float | Array = 0.0
    weights: str = "gaussian"
    weight_standardization: bool = False
    residual: bool = False
    residual_scale: float | Array = 1.0
    residual_learned: bool = False
    normalization: str = "none"
    per_step: bool = False

    def _layer(self, first: bool, **where: Any) -> Layer:
        return settings(self, Layer, first=first, **where)

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Logits (batch, num_outputs) of (batch, nodes, nodes + features); per_step: (batch, nodes,
        num_outputs).
        """
        state = self._layer(True, name="embed")(split(x if x.ndim == 3 else x[0]), train)
        if self.depth > 1:
            layer = lambda **where: settings(
                self, Layer, first=False, **where
            )  # `_layer` would bind it to this module
            state = Stack(layer, self.depth - 1, name="stage")(state, train)
        h = state[1] if self.per_step else jnp.mean(state[1], -2)
        return nn.Dense(
            self.num_outputs, kernel_init=nn.initializers.lecun_normal(), name="readout"
        )(h)

    def links(self, variables: PyTree, x: Array, key: Array | None = None) -> tuple[Array, Links]:
        """The network in training mode as links, for `gradjax.core.step` and `gradjax.spectrum`.

        Args:
          variables: as `init` returns them.
          x: one graph (nodes, nodes + features), or a batch.
          key: not used; there is no dropout.

        Returns:
          The features X, and [(embed, theta), Scan(layer, thetas), (readout, theta)], without the Scan at depth 1. The
          read-out is that of the last node with `per_step`, else of the mean one.
        """
        graph, h = split(x)
        own = lambda name: {kind: tree[name] for kind, tree in variables.items() if name in tree}

        def layer_step(first: bool):
            layer = self._layer(first, parent=None)

            def step(h, theta):
                state = lax.stop_gradient(theta["graph"]), h
                return layer.apply(theta["variables"], state, True, mutable=["batch_stats"])[0][1]

            return step

        def readout(h, theta):
            h = h[..., -1, :] if self.per_step else jnp.mean(h, -2)
            return nn.Dense(self.num_outputs, parent=None).apply(theta["variables"], h)

        stack = {kind: tree["layers"] for kind, tree in own("stage").items()}
        thetas = {
            "graph": jnp.broadcast_to(graph, (self.depth - 1, *graph.shape)),
            "variables": stack,
        }
        hidden = [Scan(layer_step(False), thetas)] if self.depth > 1 else []
        embed = {"graph": graph, "variables": own("embed")}
        return h, [(layer_step(True), embed), *hidden, (readout, {"variables": own("readout")})]
