"""Multilayer perceptron whose depth is a scan.

    h_1 = phi(norm(W_0 x + b_0)),   h_{l+1} = h_l (x) phi(norm(W_l h_l + b_l)),   logits = V h_L + c

W ~ (sigma_w^2 / fan_in), b ~ sigma_b^2, V ~ (1 / fan_in), c = 0. `depth` counts the hidden layers
h_1 .. h_L; the L - 1 square layers between them are one `nn.scan`, so that compile time does not
depend on depth, and the layer product J = J_L ... J_2 is that of the square layers. `depth=1,
width=256` on MNIST is the 784-256-10 classifier, `depth=1, width=100` on 1000 features the
1000-100-10 regression. How a square layer joins its input (x) is one of

    plain              f(h)
    residual           h + residual_scale f(h)                  (He et al. 2015, arXiv 1512.03385)
    residual_learned   h + s_l f(h), s_l a parameter from residual_scale (from 0: ReZero,
                       Bachlechner et al. 2020, arXiv 2003.04887; SkipInit, De & Smith 2020, arXiv
                       2002.10444)
    bottleneck         f(h) = W'' phi(norm(W' h + b')) + b'', with so many units inside the branch
    fixup              f(h) = W'' (phi(W' (h + b1) + b2) + b3), and h + s_l f(h) + b4 with scalars
                       s_l, b1 .. b4; W'' and the read-out start at 0, and W' is scaled by
                       (L - 1)^(-1/2), L^(-1/(2m-2)) for branches of m = 2 maps
                       (Zhang, Dauphin, Ma 2019, arXiv 1901.09321, rules 1 to 3)
    highway            T f(h) + (1 - T) h, T = sigmoid(W_T h + b_T), b_T from -2
                       (Srivastava et al. 2015, arXiv 1505.00387)

`remat=True` keeps no activation inside blocks of sqrt(L) layers: the backward pass computes them
again. Outputs and gradients are the same to rounding, except with dropout, whose masks are drawn
from other keys.

Every float (sigma_w, sigma_b, residual_scale, dropout) may be a traced value; what changes the
program (depth, width, names) is static. `dropout=None` leaves the layer out, a number puts it in,
0.0 included: after each phi, or with `dropout_on="last"` only on h_L.
"""

from typing import Any

import flax.linen as nn
import jax
from jax import Array

from gradjax.core.step import nested_scan
from gradjax.experiment.models.layers import (
    Activation,
    Dense,
    Dropout,
    Skip,
    Treated,
    normalize,
    settings,
)
from gradjax.experiment.models.network import LAYERS, Network, Part, Readout, part
from gradjax.experiment.schema import Model

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

    def _dense(self, width: int, name: str, gain: float = 1.0, **own: Any) -> Dense:
        sigma_w = self.sigma_w if gain == 1.0 else gain * self.sigma_w
        return settings(self, Dense, width=width, sigma_w=sigma_w, name=name, **own)

    @nn.compact
    def __call__(self, h: Array, train: bool) -> Array:
        """The next state, (..., width)."""
        if self.first:
            return self._hidden(self._dense(self.width, "dense")(h), train)
        if self.fixup:
            return self._fixup(h, train)
        a = self._hidden(self._dense(self.bottleneck or self.width, "dense")(h), train)
        if self.bottleneck:
            a = self._dense(self.width, "up")(a)
        if self.highway:
            gate = jax.nn.sigmoid(self._dense(self.width, "gate", bias_start=-2.0)(h))
            return gate * a + (1.0 - gate) * h
        if self.residual:
            return Skip(self.residual_scale, self.residual_learned, name="skip")(h, a)
        return a

    def _hidden(self, z: Array, train: bool) -> Array:
        """Normalisation, activation, dropout."""
        z = normalize(self.normalization, z, train)
        a = Activation(self.activation, self.depth, name="activation")(z)
        if self.dropout is not None and train:
            a = Dropout(self.dropout, name="dropout")(a)
        return a

    def _fixup(self, h: Array, train: bool) -> Array:
        def shift(name: str, h: Array) -> Array:
            return h + self.param(name, nn.initializers.zeros, (), h.dtype)

        inner, gain = self.bottleneck or self.width, (self.depth - 1) ** -0.5
        z = self._dense(inner, "dense", gain, use_bias=False)(shift("bias_1", h))
        a = self._hidden(shift("bias_2", z), train)
        branch = self._dense(self.width, "up", 0.0, use_bias=False)(shift("bias_3", a))
        return shift("bias_4", Skip(self.residual_scale, learned=True, name="skip")(h, branch))


class Output(Readout):
    """The read-out, with the dropout of `dropout_on = "last"` before it."""

    dropout: float | Array | None = None

    @nn.compact
    def __call__(self, h: Array, train: bool) -> Array:
        """(..., width) -> (..., num_outputs)."""
        if self.dropout is not None and train:
            h = Dropout(self.dropout, name="dropout")(h)
        return super().__call__(h, train)


class MLP(Network, kw_only=True):
    """`depth` hidden layers of `width` units and a linear read-out; see the module's equations."""

    depth: int
    width: int
    residual: bool = False
    residual_scale: float | Array = 1.0
    residual_learned: bool = False
    fixup: bool = False
    bottleneck: int = 0
    highway: bool = False
    dropout: float | Array | None = None
    dropout_on: str = "all"
    remat: bool = False

    @staticmethod
    def check_compatible(model: Model) -> str:
        """Why the settings exclude each other; empty where they do not."""
        wrong = ""
        if model.highway and (model.residual or model.bottleneck):
            wrong = (
                "highway = true is a gate in the skip's place; leave model.residual and "
                "model.bottleneck out"
            )
        elif not model.residual and (model.fixup or model.bottleneck or model.residual_learned):
            names = ("fixup", "bottleneck", "residual_learned")
            name = next(name for name in names if getattr(model, name))
            wrong = f"{name} shapes residual branches; it needs model.residual = true"
        elif model.fixup and (model.normalization != "none" or model.weight_standardization):
            wrong = (
                "fixup = true stands in normalisation's place; leave normalization and "
                "weight_standardization out"
            )
        return f"mlp: model.{wrong}." if wrong else ""

    def _parts(self, x: Array) -> list[Part]:
        inside, at_end = self.dropout, None
        if self.dropout_on == "last":
            inside, at_end = at_end, inside
        parts = [part("embed", self, Layer, first=True, dropout=inside)]
        if self.depth > 1:
            square = {"first": False, "dropout": inside}
            parts.append(part(LAYERS, self, Layer, self.depth - 1, **square))
        return [*parts, part("readout", self, Output, zero=self.fixup, dropout=at_end)]

    @nn.nowrap
    def _run(self, part: Part, h: Array, train: bool) -> Array:
        """The state after a part; with `remat` the square layers take O(sqrt(depth)) memory."""
        if not part.count or not self.remat or self.is_initializing():
            return super()._run(part, h, train)
        layer: Any = part.layer(parent=None)
        keys = None
        if layer.dropout is not None and train:
            keys = jax.random.split(self.make_rng("dropout"), part.count)

        def step(h: Array, theta: PyTree) -> tuple[Array, PyTree]:
            variables, key = theta
            rngs = {} if key is None else {"dropout": key}
            h, changed = layer.apply(variables, h, train, rngs=rngs, mutable=["batch_stats"])
            return h, changed.get("batch_stats", {})

        thetas = (part.variables(self.variables), keys)
        h, stats = nested_scan(step, h, thetas, part.count)
        if train and stats and self.is_mutable_collection("batch_stats"):
            self.put_variable("batch_stats", LAYERS, stats)
        return h
