"""Recurrent networks of any of the `gradjax.models.cells`, whose time is one scan.

U ~ sigma_w * (the distribution `weights`), block by block of the gates; W, V ~ 1 / fan_in; b ~
N(start, sigma_b^2), where the start of f (of u in cells without f) is `forget_bias`, or with
`chrono` = T (Tallec & Ollivier 2018, arXiv 1804.11188, eq. 16) log of a uniform number in [1, T -
1], and that of i its negative; chrono wins over forget_bias.

`depth` layers stand on top of each other, all of them inside one step of the scan; with `residual`
each adds its output times residual_scale to its input (not the first, whose input is another
space). Dropout acts on what a layer hands up, never on what it hands on in time (Zaremba et al.
2014, arXiv 1409.2329). `layernorm` and `rmsnorm` act on W x and U h, each gate by itself (Ba et al.
2016, arXiv 1607.06450, eq. 20), so that b is outside. Tokens are one-hot of `num_outputs` symbols,
times its root.

As links a time step is a layer: the state is the tuple of all layers' states (an LSTM's is (c, h)),
the first link is the first time step, from a zero state, the last one reads the top layer out. The
gradients of a step are those of the matrices as it uses them (of U, not of A).
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from gradjax.core.activations import ACTIVATIONS
from gradjax.core.initializers import bias, gaussian
from gradjax.core.step import Links, Scan
from gradjax.experiment.models.cells import CELLS, Cell, Kernel, Weights
from gradjax.experiment.models.layers import Dropout, settings
from gradjax.experiment.models.network import Readout
from gradjax.experiment.models.sequences import check_sequences, no_batchnorm, sequence_of
from gradjax.experiment.schema import Model

PyTree = Any


class Layer(nn.Module):
    """The weights of one layer, as its step uses them."""

    width: int
    cell: str
    activation: str
    sigma_w: float | Array
    sigma_b: float | Array
    weights: str
    normalization: str
    forget_bias: float | Array | None
    chrono: float | Array | None

    @nn.compact
    def __call__(self, features: int) -> Weights:
        """W (features, blocks * width), U (width, blocks * width), b, and those of the cell."""
        cell, width = CELLS[self.cell], self.width
        columns = cell.blocks * width
        own = {"input": Kernel((features, columns), gaussian(1.0), name="input")()}
        own["recurrent"] = cell.recurrent(self, columns)
        own["bias"] = self.param("bias", self._bias)
        for name in cell.squares:
            own[name] = Kernel((width, width), gaussian(1.0), name=name)()
        if self.activation == "prelu":
            own["slope"] = self.param("slope", nn.initializers.constant(0.25), ())
        if self.normalization != "none":
            own["scales"] = self.param("scales", nn.initializers.ones, (2, columns))
        return own

    def _bias(self, key: Array) -> Array:
        first, second = jax.random.split(key)
        starts = {name: jnp.zeros(self.width, jnp.float32) for name in (None, "input", "forget")}
        if self.chrono is not None:
            longest = jnp.asarray(self.chrono, jnp.float32)
            uniform = jax.random.uniform(first, (self.width,), jnp.float32)
            starts["forget"] = jnp.log1p(uniform * (longest - 2.0))
            starts["input"] = -starts["forget"]
        elif self.forget_bias is not None:
            starts["forget"] = jnp.full(self.width, self.forget_bias, jnp.float32)
        start = jnp.concatenate([starts[name] for name in CELLS[self.cell].starts])
        return start + bias(self.sigma_b)(second, start.shape, jnp.float32)


class Recurrent(nn.Module):
    """`depth` recurrent layers of `width` units of one `cell` and a linear read-out."""

    num_outputs: int
    depth: int
    width: int
    cell: str
    activation: str = "tanh"
    sigma_w: float | Array = 1.0
    sigma_b: float | Array = 0.0
    weights: str = "gaussian"
    residual: bool = False
    residual_scale: float | Array = 1.0
    normalization: str = "none"
    dropout: float | Array | None = None
    forget_bias: float | Array | None = None
    chrono: float | Array | None = None
    per_step: bool = False

    @staticmethod
    def check_compatible(model: Model) -> str:
        """Why a recurrence cannot have these settings; empty where it can."""
        if model.weights == "lsuv":
            return (
                "models: a recurrence has no lsuv, whose first state of zeros would scale nothing; "
                "choose model.weights = 'orthogonal'."
            )
        return no_batchnorm(model)

    @property
    def _kind(self) -> Cell:
        return CELLS[self.cell]

    def _layer(self, **where: Any) -> Layer:
        return settings(self, Layer, **where)

    def _features(self, x: Array) -> list[int]:
        return [x.shape[-1]] + [self.width] * (self.depth - 1)

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Logits (batch, num_outputs) at the last step, or (batch, seq_len, num_outputs).

        Args:
          x: (batch, seq_len, features), or int tokens (batch, seq_len).
          train: whether dropout drops, drawing from the "dropout" key.

        Raises:
          ValueError: settings that a recurrence cannot have, or examples that are no sequences.
        """
        check_sequences(self.cell, self, x)
        xs = sequence_of(x, self.num_outputs)
        layers = [self._layer(name=f"layer_{i}")(n) for i, n in enumerate(self._features(xs))]
        step_keys, last_key = None, None
        if self.dropout is not None and train:
            keys = jax.random.split(self.make_rng("dropout"), xs.shape[0] + 1)
            step_keys, last_key = keys[:-1], keys[-1]

        def step(states, theta):
            states = self._step(layers, states, *theta)
            return states, (states if self.per_step else None)

        last, seen = lax.scan(step, self._zero(xs), (xs, step_keys))
        states: Any = seen if self.per_step else last
        top = self._top(states, last_key)
        if self.per_step:
            top = jnp.moveaxis(top, 0, 1)
        return Readout(self.num_outputs, name="readout")(top, train)

    def links(self, variables: PyTree, x: Array, key: Array | None = None) -> tuple[PyTree, Links]:
        """The network in training mode as links: one per time step, and the read-out.

        Args:
          variables: as `init` returns them.
          x: (seq_len, features) or tokens (seq_len,) of one example, or a batch of them.
          key: PRNG key of the dropout masks, needed where there is dropout.

        Returns:
          The zero states of all layers, and [(first step, theta), Scan(step, thetas), (readout,
          theta)], without the Scan at seq_len 1. Each theta of a step holds its input, which gets
          no gradient, and the weights.

        Raises:
          ValueError: a network with dropout and no key.
        """
        if self.dropout is not None and key is None:
            raise ValueError(
                "Recurrent.links: a network with dropout draws masks; pass key=jax.random.key(...)."
            )
        params, xs = variables["params"], sequence_of(x, self.num_outputs)
        weights = [
            self._layer(parent=None).apply({"params": params[f"layer_{i}"]}, n)
            for i, n in enumerate(self._features(xs))
        ]

        def over_time(w):
            return jnp.broadcast_to(w, (len(xs), *w.shape))

        thetas = {"x": xs, "variables": {"params": jax.tree.map(over_time, weights)}}
        last: dict[str, Any] = {"variables": {"params": params["readout"]}}
        if self.dropout is not None:
            keys = jax.random.split(key, len(xs) + 1)  # type: ignore[arg-type]
            thetas["key"], last["key"] = keys[:-1], keys[-1]

        def step(states, theta):
            # The gradient of a step is that of its weights.
            x = lax.stop_gradient(theta["x"])
            return self._step(theta["variables"]["params"], states, x, theta.get("key"))

        def readout(states, theta):
            logits = Readout(self.num_outputs, parent=None)
            return logits.apply(theta["variables"], self._top(states, theta.get("key")), True)

        first, rest = jax.tree.map(lambda t: t[0], thetas), jax.tree.map(lambda t: t[1:], thetas)
        middle = [Scan(step, rest)] if len(xs) > 1 else []
        return self._zero(xs), [(step, first), *middle, (readout, last)]

    def _zero(self, xs: Array) -> tuple:
        h = jnp.zeros((*xs.shape[1:-1], self.width), xs.dtype)
        return (self._kind.state(h),) * self.depth

    def _keys(self, key: Array | None) -> Sequence[Array | None]:
        """A key of masks per layer, or None where nothing drops."""
        return [None] * self.depth if key is None else list(jax.random.split(key, self.depth))

    def _step(self, layers: Sequence[Weights], states: tuple, x: Array, key: Array | None) -> tuple:
        """All layers, one step on in time."""
        up, new = x, []
        keys = self._keys(key)
        for i, (w, state) in enumerate(zip(layers, states, strict=True)):
            state = self._cell(w, state, up)
            up = self._up(up if i else None, state, keys[i])
            new.append(state)
        return tuple(new)

    def _top(self, states: tuple, key: Array | None) -> Array:
        """The input of the read-out: the highest layer's output, with residual the sum of all."""
        if not self.residual:
            return self._up(None, states[-1], key)
        up = None
        for state, own_key in zip(states, self._keys(key), strict=True):
            up = self._up(up, state, own_key)
        return up  # type: ignore[return-value]

    def _up(self, below: Array | None, state: PyTree, key: Array | None) -> Array:
        """The input that a layer gives to the one above it."""
        h: Any = self._kind.output(state)
        if key is not None and self.dropout is not None:
            h = Dropout(self.dropout, parent=None).apply({}, h, rngs={"dropout": key})
        if below is None or not self.residual:
            return h
        return below + jnp.asarray(self.residual_scale, h.dtype) * h

    def _cell(self, w: Weights, state: PyTree, x: Array) -> PyTree:
        """One layer, one step on in time."""
        z, r = x @ w["input"], self._kind.output(state) @ w["recurrent"]
        if self.normalization != "none":
            z, r = self._normalized(z, w["scales"][0]), self._normalized(r, w["scales"][1])

        def phi(z: Array) -> Array:
            if self.activation == "prelu":
                return jnp.where(z >= 0, z, w["slope"] * z)
            return ACTIVATIONS[self.activation](z)

        return self._kind.step(w, state, z, r, phi)

    def _normalized(self, z: Array, scale: Array) -> Array:
        """Every gate's block normalised over its own units."""
        by_gate = z.reshape(*z.shape[:-1], -1, self.width)
        if self.normalization == "layernorm":
            by_gate = by_gate - jnp.mean(by_gate, -1, keepdims=True)
        by_gate = by_gate * lax.rsqrt(jnp.mean(jnp.square(by_gate), -1, keepdims=True) + 1e-6)
        return by_gate.reshape(z.shape) * jnp.broadcast_to(scale, z.shape)
