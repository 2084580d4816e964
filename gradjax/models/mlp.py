"""Multilayer perceptron whose depth is a scan.

    h_1 = phi(norm(W_0 x + b_0)),   h_{l+1} = [h_l +] [residual_scale] phi(norm(W_l h_l + b_l)),   logits = V h_L + c

W ~ (sigma_w^2 / fan_in), b ~ sigma_b^2, V ~ (1 / fan_in), c = 0. `depth` counts the hidden layers h_1 .. h_L; the
L - 1 square layers between them are one `nn.scan`, so that compile time does not depend on depth, and the layer
product J = J_L ... J_2 is that of the square layers. `depth=1, width=256` on MNIST is the 784-256-10 classifier.

`remat=True` keeps no activation inside blocks of sqrt(L) layers: the backward pass computes them again. Outputs and
gradients are the same to rounding, but with dropout, whose masks are drawn from other keys.

Every float (sigma_w, sigma_b, residual_scale, dropout) may be a traced value; what changes the program (depth,
width, names) is static. `dropout=None` leaves the layer out, a number puts it in, 0.0 included.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from gradjax.activations import ACTIVATIONS
from gradjax.models.layers import Dense, Dropout
from gradjax.step import Links, Scan, nested_scan

PyTree = Any


class Layer(nn.Module):
    """One hidden layer: dense, normalisation, activation, dropout, and the skip where the widths agree."""

    width: int
    activation: str
    sigma_w: float | Array
    sigma_b: float | Array
    weights: str
    residual: bool
    residual_scale: float | Array
    normalization: str
    dropout: float | Array | None

    @nn.compact
    def __call__(self, h: Array, train: bool) -> Array:
        """The next state, (..., width)."""
        z = Dense(self.width, self.weights, self.sigma_w, self.sigma_b, name="dense")(h)
        if self.normalization == "layernorm":
            z = nn.LayerNorm(name="norm")(z)
        elif self.normalization == "batchnorm":
            z = nn.BatchNorm(use_running_average=not train, name="norm")(z)
        a = ACTIVATIONS[self.activation](z)
        if self.dropout is not None and train:
            a = Dropout(self.dropout, name="dropout")(a)
        if self.residual and h.shape == a.shape:
            return h + jnp.asarray(self.residual_scale, a.dtype) * a
        return a


class MLP(nn.Module):
    """`depth` hidden layers of `width` units and a linear read-out; see the module's equations."""

    num_outputs: int
    depth: int
    width: int
    activation: str = "tanh"
    sigma_w: float | Array = 1.0
    sigma_b: float | Array = 0.0
    weights: str = "gaussian"
    residual: bool = False
    residual_scale: float | Array = 1.0
    normalization: str = "none"
    dropout: float | Array | None = None
    remat: bool = False

    def _layer(self, residual: bool, **kwargs) -> Layer:
        shared = {name: getattr(self, name) for name in _LAYER_FIELDS}
        return Layer(**{**shared, "residual": residual}, **kwargs)

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Logits (batch, num_outputs) of inputs (batch, features); one example without the batch axis works too.

        With `train=True` BatchNorm uses the batch's statistics (make "batch_stats" mutable) and dropout draws from
        the "dropout" key.
        """
        h = self._layer(residual=False, name="embed")(x, train)
        if self.depth > 1 and self.remat and not self.is_initializing():
            h = self._rematerialized(h, train)
        elif self.depth > 1:
            layers = nn.scan(
                lambda layer, h, _: (layer(h, train), None),
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True, "dropout": True},
                length=self.depth - 1,
            )
            h, _ = layers(self._layer(self.residual, name="layers"), h, None)
        return nn.Dense(self.num_outputs, kernel_init=nn.initializers.lecun_normal(), name="readout")(h)

    def _rematerialized(self, h: Array, train: bool) -> Array:
        """The same layers on the same variables with gradients in O(sqrt(depth)) memory: blocks of blocks."""
        layer, count = self._layer(self.residual, parent=None), self.depth - 1
        own = {kind: tree["layers"] for kind, tree in self.variables.items() if "layers" in tree}
        keys = None
        if self.dropout is not None and train:
            keys = jax.random.split(self.make_rng("dropout"), count)

        def step(h, theta):
            variables, key = theta
            rngs = {} if key is None else {"dropout": key}
            h, changed = layer.apply(variables, h, train, rngs=rngs, mutable=["batch_stats"])
            return h, changed.get("batch_stats", {})

        h, stats = nested_scan(step, h, (own, keys), count)
        if train and stats and self.is_mutable_collection("batch_stats"):
            self.put_variable("batch_stats", "layers", stats)
        return h

    def links(self, variables: PyTree, x: Array, key: Array | None = None) -> tuple[Array, Links]:
        """The network in training mode as links, for `gradjax.step` and `gradjax.spectrum`.

        Args:
          variables: as `init` returns them.
          x: inputs, (features,) or (batch, features).
          key: PRNG key of the dropout masks, needed where there is dropout.

        Returns:
          x and [(embed, theta), Scan(layer, thetas), (readout, theta)], without the Scan at depth 1. Each theta holds
          one layer's variables and, with dropout, its key. With BatchNorm the states are whole batches.
        """
        if self.dropout is not None and key is None:
            raise ValueError("MLP.links: a network with dropout draws masks; pass key=jax.random.key(...).")

        def layer_step(residual):
            layer = self._layer(residual, parent=None)

            def step(h, theta):
                rngs = {"dropout": theta["key"]} if "key" in theta else {}
                return layer.apply(theta["variables"], h, True, rngs=rngs, mutable=["batch_stats"])[0]

            return step

        def theta(name) -> dict[str, Any]:
            own = {kind: tree[name] for kind, tree in variables.items() if name in tree}
            return {"variables": own}

        embed, layers = theta("embed"), theta("layers")
        if self.dropout is not None:
            embed_key, layers_key = jax.random.split(key)  # type: ignore[arg-type]
            embed["key"], layers["key"] = embed_key, jax.random.split(layers_key, max(self.depth - 1, 1))

        def readout(h, theta):
            return nn.Dense(self.num_outputs).apply(theta["variables"], h)

        hidden = [Scan(layer_step(self.residual), layers)] if self.depth > 1 else []
        return x, [(layer_step(False), embed), *hidden, (readout, theta("readout"))]


_LAYER_FIELDS = (
    "width", "activation", "sigma_w", "sigma_b", "weights", "residual_scale", "normalization", "dropout",
)  # fmt: skip
