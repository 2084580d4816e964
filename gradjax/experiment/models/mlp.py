"""Multilayer perceptron whose depth is a scan.

    h_1 = phi(norm(W_0 x + b_0)),   h_{l+1} = h_l (x) phi(norm(W_l h_l + b_l)),   logits = V h_L + c

W ~ (sigma_w^2 / fan_in), b ~ sigma_b^2, V ~ (1 / fan_in), c = 0. `depth` counts the hidden layers
h_1 .. h_L; the L - 1 square layers between them are one `nn.scan`, so that compile time does not
depend on depth, and the layer product J = J_L ... J_2 is that of the square layers. `depth=1,
width=256` on MNIST is the 784-256-10 classifier, `depth=1, width=100` on 1000 features the
1000-100-10 regression. How a square layer joins its input (x) is one of

    plain              f(h)
    residual           h + residual_scale f(h)                             (He et al. 2015, arXiv 1512.03385)
    residual_learned   h + s_l f(h), s_l a parameter from residual_scale   (from 0: ReZero, Bachlechner et al. 2020,
                                                    arXiv 2003.04887; SkipInit, De & Smith 2020,
                                                    arXiv 2002.10444)
    bottleneck         f(h) = W'' phi(norm(W' h + b')) + b'', with so many units inside the branch
    fixup              f(h) = W'' (phi(W' (h + b1) + b2) + b3), and h + s_l f(h) + b4 with scalars s_l, b1 .. b4; W''
                       and the read-out start at 0, and W' is scaled by (L - 1)^(-1/2), L^(-1/(2m-2)) for branches of
                       m = 2 maps                           (Zhang, Dauphin, Ma 2019, arXiv 1901.09321, rules 1 to 3)
    highway            T f(h) + (1 - T) h, T = sigmoid(W_T h + b_T), b_T from -2      (Srivastava et al. 2015, arXiv
                                                                                       1505.00387)

`remat=True` keeps no activation inside blocks of sqrt(L) layers: the backward pass computes them
again. Outputs and gradients are the same to rounding, but with dropout, whose masks are drawn from
other keys.

Every float (sigma_w, sigma_b, residual_scale, dropout) may be a traced value; what changes the
program (depth, width, names) is static. `dropout=None` leaves the layer out, a number puts it in,
0.0 included: after each phi, or with `dropout_on="last"` on h_L alone.
"""

from typing import Any

import flax.linen as nn
import jax
from jax import Array

from gradjax.core.step import Links, Scan, nested_scan
from gradjax.experiment.models.layers import (
    Activation,
    Dense,
    Dropout,
    Skip,
    Treated,
    normalize,
    settings,
)

PyTree = Any


class Layer(Treated):
    """One hidden layer; the first one, which maps the inputs, is always plain."""

    first: bool
    depth: int
    width: int
    residual: bool
    residual_scale: float | Array
    residual_learned: bool
    fixup: bool
    bottleneck: int
    highway: bool
    dropout: float | Array | None
    dropout_on: str

    def _dense(self, width: int, name: str, gain: float = 1.0, **more) -> Dense:
        sigma_w = self.sigma_w if gain == 1.0 else gain * self.sigma_w
        return Dense(
            width,
            self.weights,
            sigma_w,
            self.sigma_b,
            self.weight_standardization,
            name=name,
            **more,
        )

    @nn.compact
    def __call__(self, h: Array, train: bool) -> Array:
        """The next state, (..., width)."""
        if self.fixup and not self.first:
            return self._fixup(h, train)
        inner = 0 if self.first else self.bottleneck
        a = self._hidden(self._dense(inner or self.width, "dense")(h), train)
        if inner:
            a = self._dense(self.width, "up")(a)
        if self.first:
            return a
        if self.highway:
            gate = jax.nn.sigmoid(self._dense(self.width, "gate", bias_start=-2.0)(h))
            return gate * a + (1.0 - gate) * h
        return (
            Skip(self.residual_scale, self.residual_learned, name="skip")(h, a)
            if self.residual
            else a
        )

    def _hidden(self, z: Array, train: bool) -> Array:
        """Normalisation, activation, dropout."""
        a = Activation(self.activation, self.depth, name="activation")(
            normalize(self.normalization, z, train)
        )
        if self.dropout is not None and self.dropout_on == "all" and train:
            a = Dropout(self.dropout, name="dropout")(a)
        return a

    def _fixup(self, h: Array, train: bool) -> Array:
        shift = lambda name, h: h + self.param(name, nn.initializers.zeros, (), h.dtype)
        down = self._dense(
            self.bottleneck or self.width, "dense", (self.depth - 1) ** -0.5, use_bias=False
        )
        a = self._hidden(shift("bias_2", down(shift("bias_1", h))), train)
        branch = self._dense(self.width, "up", 0.0, use_bias=False)(shift("bias_3", a))
        return shift("bias_4", Skip(self.residual_scale, learned=True, name="skip")(h, branch))


class MLP(nn.Module):
    """`depth` hidden layers of `width` units and a linear read-out; see the module's equations."""

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
    fixup: bool = False
    bottleneck: int = 0
    highway: bool = False
    normalization: str = "none"
    dropout: float | Array | None = None
    dropout_on: str = "all"
    remat: bool = False

    def _layer(self, first: bool, **kwargs) -> Layer:
        return settings(self, Layer, first=first, **kwargs)

    def _readout(self, **kwargs) -> nn.Dense:
        start = nn.initializers.zeros if self.fixup else nn.initializers.lecun_normal()
        return nn.Dense(self.num_outputs, kernel_init=start, **kwargs)

    @staticmethod
    def check_compatible(model: Any) -> str:
        """Which of the settings, of this module or of a `gradjax.config.Model`, exclude each other;
        empty if none.
        """
        wrong = ""
        if model.highway and (model.residual or model.bottleneck):
            wrong = "highway = true is a gate in the skip's place; leave model.residual and model.bottleneck out"
        elif not model.residual and (model.fixup or model.bottleneck or model.residual_learned):
            name = (
                "fixup" if model.fixup else "bottleneck" if model.bottleneck else "residual_learned"
            )
            wrong = f"{name} shapes residual branches; it needs model.residual = true"
        elif model.fixup and (model.normalization != "none" or model.weight_standardization):
            wrong = "fixup = true stands in normalisation's place; leave normalization and weight_standardization out"
        return f"mlp: model.{wrong}." if wrong else ""

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Logits (batch, num_outputs) of inputs (batch, features); one example without the batch
        axis works too.

        With `train=True` BatchNorm uses the batch's statistics (make "batch_stats" mutable) and dropout draws from
        the "dropout" key.

        Raises:
          ValueError: settings that exclude each other.
        """
        if reason := self.check_compatible(self):
            raise ValueError(reason)
        h = self._layer(True, name="embed")(x, train)
        if self.depth > 1 and self.remat and not self.is_initializing():
            h = self._rematerialized(h, train)
        elif self.depth > 1:
            layers = nn.scan(
                lambda layer, h, _: (layer(h, train), None),
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True, "dropout": True},
                length=self.depth - 1,
            )
            h, _ = layers(self._layer(False, name="layers"), h, None)
        if self.dropout is not None and self.dropout_on == "last" and train:
            h = Dropout(self.dropout, name="dropout")(h)
        return self._readout(name="readout")(h)

    def _rematerialized(self, h: Array, train: bool) -> Array:
        """The same layers on the same variables with gradients in O(sqrt(depth)) memory: blocks of
        blocks.
        """
        layer, count = self._layer(False, parent=None), self.depth - 1
        own = {kind: tree["layers"] for kind, tree in self.variables.items() if "layers" in tree}
        keys = None
        if self.dropout is not None and self.dropout_on == "all" and train:
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
        """The network in training mode as links, for `gradjax.core.step` and `gradjax.spectrum`.

        Args:
          variables: as `init` returns them.
          x: inputs, (features,) or (batch, features).
          key: PRNG key of the dropout masks, needed where there is dropout.

        Returns:
          x and [(embed, theta), Scan(layer, thetas), (readout, theta)], without the Scan at depth 1. Each theta holds
          one layer's variables and, with dropout, its key. With BatchNorm the states are whole batches.
        """
        if self.dropout is not None and key is None:
            raise ValueError(
                "MLP.links: a network with dropout draws masks; pass key=jax.random.key(...)."
            )

        def layer_step(first):
            layer = self._layer(first, parent=None)

            def step(h, theta):
                rngs = {"dropout": theta["key"]} if "key" in theta else {}
                return layer.apply(theta["variables"], h, True, rngs=rngs, mutable=["batch_stats"])[
                    0
                ]

            return step

        def theta(name) -> dict[str, Any]:
            own = {kind: tree[name] for kind, tree in variables.items() if name in tree}
            return {"variables": own}

        embed, layers, last = theta("embed"), theta("layers"), theta("readout")
        if self.dropout is not None and self.dropout_on == "last":
            last["key"] = key
        elif self.dropout is not None:
            embed_key, layers_key = jax.random.split(key)  # type: ignore[arg-type]
            embed["key"], layers["key"] = (
                embed_key,
                jax.random.split(layers_key, max(self.depth - 1, 1)),
            )

        def readout(h, theta):
            if "key" in theta:
                h = Dropout(self.dropout, parent=None).apply({}, h, rngs={"dropout": theta["key"]})  # type: ignore[arg-type]
            return self._readout(parent=None).apply(theta["variables"], h)

        hidden = [Scan(layer_step(False), layers)] if self.depth > 1 else []
        return x, [(layer_step(True), embed), *hidden, (readout, last)]
