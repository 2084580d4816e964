"""Recurrent networks whose time is one scan: plain, LSTM, GRU, minimalRNN, and one whose recurrence
stays orthogonal.

    rnn             h' = phi(W x + U h + b)                                    (Elman 1990; IRNN: relu, U = I)
    orthogonal_rnn  the same, U = sigma_w (1 + A)^-1 (1 - A), A = -A^T learned (Helfrich et al. 2018, arXiv 1707.09520)
    lstm            c' = s(f) c + s(i) phi(g),  h' = s(o) phi(c'),  (i, f, g, o) = W x + U h + b
                                                                              (Hochreiter &
                                                                              Schmidhuber 1997, Gers
                                                                              2000)
    gru             h' = s(u) h + (1 - s(u)) phi(W x + s(r) U h + b)           (Cho et al. 2014, arXiv 1406.1078)
    minimal_rnn     h' = s(u) h + (1 - s(u)) z,  z = phi(W x + b),  u = U h + V z + b'   (Chen et al. 2018, 1806.05394)

s is the sigmoid; the GRU resets behind its product, as cuDNN does. U ~ sigma_w * (the distribution
`weights`), block by block of the gates; W, V ~ 1 / fan_in; b ~ N(start, sigma_b^2), where the start
of f (of u in cells without f) is `forget_bias`, or with `chrono` = T (Tallec & Ollivier 2018, arXiv
1804.11188, eq. 16) log of a uniform number in [1, T - 1], and that of i its negative; chrono wins
over forget_bias.

`depth` layers stand on top of each other, all of them inside one step of the scan; with `residual`
each adds its output times residual_scale to its input (not the first, whose input is another
space). Dropout acts on what goes up, never on what goes on in time (Zaremba et al. 2014, arXiv
1409.2329). `layernorm` and `rmsnorm` act on W x and U h, each gate by itself (Ba et al. 2016, arXiv
1607.06450, eq. 20), so that b is outside. Tokens are one-hot of `num_outputs` symbols, times its
root.

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
from gradjax.core.initializers import WEIGHTS, bias, gaussian
from gradjax.core.step import Links, Scan
from gradjax.experiment.models.layers import Dropout, settings

PyTree = Any
Weights = dict[str, Array]

INPUTS = {"rnn": 1, "orthogonal_rnn": 1, "lstm": 4, "gru": 3, "minimal_rnn": 1}  # blocks of W and U
# the blocks of b: i keeps out what f keeps in; None starts at 0
BIASES = {
    "rnn": (None,),
    "orthogonal_rnn": (None,),
    "lstm": ("input", "forget", None, None),
    "gru": (None, "forget", None),
    "minimal_rnn": (None, "forget"),
}


class Kernel(nn.Module):
    """A matrix by itself, under the name by which regularisation knows weights."""

    shape: tuple[int, int]
    init: Any

    @nn.compact
    def __call__(self) -> Array:
        """(fan_in, fan_out)."""
        return self.param("kernel", self.init, self.shape)


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
        """W (features, blocks * width), U (width, blocks * width), b, and what else the cell
        has.
        """
        blocks, width = INPUTS[self.cell], self.width
        own = {"input": Kernel((features, blocks * width), gaussian(1.0), name="input")()}
        if self.cell == "orthogonal_rnn":
            skew = self.param("skew", gaussian(1.0), (width, width))
            own["recurrent"] = jnp.asarray(self.sigma_w, skew.dtype) * cayley(skew)
        else:
            own["recurrent"] = Kernel((width, blocks * width), self._by_block, name="recurrent")()
        own["bias"] = self.param("bias", self._bias)
        if self.cell == "minimal_rnn":
            own["gate"] = Kernel((width, width), gaussian(1.0), name="gate")()
        if self.activation == "prelu":
            own["slope"] = self.param("slope", nn.initializers.constant(0.25), ())
        if self.normalization != "none":
            own["scales"] = self.param("scales", nn.initializers.ones, (2, blocks * width))
        return own

    def _by_block(self, key: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Array:
        draw, (width, all_blocks) = WEIGHTS[self.weights](self.sigma_w), shape
        keys = jax.random.split(key, all_blocks // width)
        blocks = jax.vmap(lambda key: draw(key, (width, width), dtype))(keys)
        return jnp.moveaxis(blocks, 0, 1).reshape(shape)

    def _bias(self, key: Array) -> Array:
        first, second = jax.random.split(key)
        starts = {name: jnp.zeros(self.width, jnp.float32) for name in (None, "input", "forget")}
        if self.chrono is not None:
            longest = jnp.asarray(self.chrono, jnp.float32)
            starts["forget"] = jnp.log1p(
                jax.random.uniform(first, (self.width,), jnp.float32) * (longest - 2.0)
            )
            starts["input"] = -starts["forget"]
        elif self.forget_bias is not None:
            starts["forget"] = jnp.full(self.width, self.forget_bias, jnp.float32)
        start = jnp.concatenate([starts[name] for name in BIASES[self.cell]])
        return start + bias(self.sigma_b)(second, start.shape, jnp.float32)


def cayley(skew: Array) -> Array:
    """The orthogonal (1 + A)^-1 (1 - A) of A = (B - B^T) / sqrt(2): every one without the
    eigenvalue -1.

    With B ~ N(0, 1 / n) the eigenvalues of A fill i [-2, 2] (a semicircle), those of the result turn by up to 127
    degrees. One solve, O(n^3), whatever the number of time steps.
    """
    a, one = (
        (skew - skew.T) * jnp.asarray(0.5**0.5, skew.dtype),
        jnp.eye(len(skew), dtype=skew.dtype),
    )
    return jnp.linalg.solve(one + a, one - a)


def _plus(z: Array, vector: Array) -> Array:
    return z + jnp.broadcast_to(vector, z.shape)


class Recurrent(nn.Module):
    """`depth` recurrent layers of `width` units of one `cell` and a linear read-out; see the
    module's equations.
    """

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
    def check_compatible(model: Any) -> str:
        """What a recurrence cannot have, of this module or of a `gradjax.config.Model`; empty if
        nothing.
        """
        if model.weights == "lsuv":
            return (
                "models: a recurrence has no lsuv, whose first state of zeros would scale nothing; choose "
                "model.weights = 'orthogonal'."
            )
        return no_batchnorm(model)

    def _layer(self, **kwargs: Any) -> Layer:
        return settings(self, Layer, **kwargs)

    def _features(self, x: Array) -> list[int]:
        return [x.shape[-1]] + [self.width] * (self.depth - 1)

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Logits (batch, num_outputs) at the last step, or with per_step (batch, seq_len,
        num_outputs).

        Args:
          x: (batch, seq_len, features), or int tokens (batch, seq_len).
          train: whether dropout drops, drawing from the "dropout" key.
        """
        check_sequences(self.cell, self, x)
        xs = sequence_of(x, self.num_outputs)
        layers = [self._layer(name=f"layer_{i}")(n) for i, n in enumerate(self._features(xs))]
        keys = None
        if self.dropout is not None and train:
            keys = jax.random.split(self.make_rng("dropout"), xs.shape[0] + 1)

        def step(states, theta):
            states = self._step(layers, states, *theta)
            return states, (states if self.per_step else None)

        inner = None if keys is None else keys[:-1]
        last, seen = lax.scan(step, self._zero(xs), (xs, inner))
        states: Any = seen if self.per_step else last
        top = self._top(states, None if keys is None else keys[-1])
        top = jnp.moveaxis(top, 0, 1) if self.per_step else top
        return nn.Dense(
            self.num_outputs, kernel_init=nn.initializers.lecun_normal(), name="readout"
        )(top)

    def links(self, variables: PyTree, x: Array, key: Array | None = None) -> tuple[PyTree, Links]:
        """The network in training mode as links: every time step is one, and the read-out.

        Args:
          variables: as `init` returns them.
          x: (seq_len, features) or tokens (seq_len,) of one example, or a batch of them.
          key: PRNG key of the dropout masks, needed where there is dropout.

        Returns:
          The zero states of all layers, and [(first step, theta), Scan(step, thetas), (readout, theta)], without the
          Scan at seq_len 1. Each theta of a step holds its input, which gets no gradient, and the weights.
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
        over_time = lambda w: jnp.broadcast_to(w, (len(xs), *w.shape))
        thetas = {"x": xs, "variables": {"params": jax.tree.map(over_time, weights)}}
        last: dict[str, Any] = {"variables": {"params": params["readout"]}}
        if self.dropout is not None:
            keys = jax.random.split(key, len(xs) + 1)  # type: ignore[arg-type]
            thetas["key"], last["key"] = keys[:-1], keys[-1]

        def step(states, theta):
            x = lax.stop_gradient(theta["x"])  # the gradient of a step is that of its weights
            return self._step(theta["variables"]["params"], states, x, theta.get("key"))

        def readout(states, theta):
            dense = nn.Dense(self.num_outputs, parent=None)
            return dense.apply(theta["variables"], self._top(states, theta.get("key")))

        first, rest = jax.tree.map(lambda t: t[0], thetas), jax.tree.map(lambda t: t[1:], thetas)
        middle = [Scan(step, rest)] if len(xs) > 1 else []
        return self._zero(xs), [(step, first), *middle, (readout, last)]

    def _zero(self, xs: Array) -> tuple:
        h = jnp.zeros((*xs.shape[1:-1], self.width), xs.dtype)
        return ((h, h) if self.cell == "lstm" else h,) * self.depth

    def _step(self, layers: Sequence[Weights], states: tuple, x: Array, key: Array | None) -> tuple:
        """All layers, one step on in time."""
        keys = [None] * self.depth if key is None else list(jax.random.split(key, self.depth))
        up, new = x, []
        for i, (weights, state) in enumerate(zip(layers, states, strict=True)):
            state = self._cell(weights, state, up)
            up = self._up(up if i else None, state, keys[i])
            new.append(state)
        return tuple(new)

    def _top(self, states: tuple, key: Array | None) -> Array:
        """What the read-out reads: the highest layer's output, with residual the sum of all."""
        if not self.residual:
            return self._up(None, states[-1], key)
        keys = [None] * self.depth if key is None else list(jax.random.split(key, self.depth))
        up = None
        for state, key in zip(states, keys, strict=True):
            up = self._up(up, state, key)
        return up  # type: ignore[return-value]

    def _up(self, below: Array | None, state: PyTree, key: Array | None) -> Array:
        """What a layer hands to the one above it."""
        h: Any = state[1] if self.cell == "lstm" else state
        if key is not None and self.dropout is not None:
            h = Dropout(self.dropout, parent=None).apply({}, h, rngs={"dropout": key})
        if below is None or not self.residual:
            return h
        return below + jnp.asarray(self.residual_scale, h.dtype) * h

    def _cell(self, w: Weights, state: PyTree, x: Array) -> PyTree:
        """One layer, one step on in time."""
        h = state[1] if self.cell == "lstm" else state
        z, r = x @ w["input"], h @ w["recurrent"]
        if self.normalization != "none":
            z, r = self._normalized(z, w["scales"][0]), self._normalized(r, w["scales"][1])
        split = lambda z: jnp.split(z, z.shape[-1] // self.width, axis=-1)
        if self.cell == "lstm":
            i, f, g, o = split(_plus(z + r, w["bias"]))
            c = jax.nn.sigmoid(f) * state[0] + jax.nn.sigmoid(i) * self._phi(w, g)
            return c, jax.nn.sigmoid(o) * self._phi(w, c)
        if self.cell == "gru":
            (z_r, z_u, z_n), (r_r, r_u, r_n) = split(_plus(z, w["bias"])), split(r)
            u = jax.nn.sigmoid(z_u + r_u)
            return u * h + (1 - u) * self._phi(w, z_n + jax.nn.sigmoid(z_r + r_r) * r_n)
        if self.cell == "minimal_rnn":
            candidate = self._phi(w, _plus(z, w["bias"][: self.width]))
            u = jax.nn.sigmoid(_plus(r + candidate @ w["gate"], w["bias"][self.width :]))
            return u * h + (1 - u) * candidate
        return self._phi(w, _plus(z + r, w["bias"]))

    def _phi(self, w: Weights, z: Array) -> Array:
        if self.activation == "prelu":
            return jnp.where(z >= 0, z, w["slope"] * z)
        return ACTIVATIONS[self.activation](z)

    def _normalized(self, z: Array, scale: Array) -> Array:
        """Every gate's block over its own units."""
        by_gate = z.reshape(*z.shape[:-1], -1, self.width)
        if self.normalization == "layernorm":
            by_gate = by_gate - jnp.mean(by_gate, -1, keepdims=True)
        by_gate = by_gate * lax.rsqrt(jnp.mean(jnp.square(by_gate), -1, keepdims=True) + 1e-6)
        return by_gate.reshape(z.shape) * jnp.broadcast_to(scale, z.shape)


def sequence_of(x: Array, num_outputs: int) -> Array:
    """(seq_len, ..., features) of (..., seq_len, features), or of tokens (..., seq_len): one-hot of
    mean square 1.
    """
    if jnp.issubdtype(x.dtype, jnp.integer):
        x = jax.nn.one_hot(x, num_outputs, dtype=jnp.float32) * num_outputs**0.5
    return jnp.moveaxis(x, -2, 0)


def no_batchnorm(model: Any) -> str:
    """Why sequence models have no BatchNorm, where one is asked for; empty where not."""
    if model.normalization != "batchnorm":
        return ""
    return (
        "models: a sequence model has no batchnorm, whose averages would differ from step to step in time; choose "
        "model.normalization = 'layernorm', 'rmsnorm' or 'none'."
    )


def check_sequences(name: str, model: Any, x: Array) -> None:
    """Raises `ValueError` for what the sequence model `name` refuses, and for examples that are no
    sequences.
    """
    if reason := model.check_compatible(model):
        raise ValueError(reason)
    if x.ndim != (2 if jnp.issubdtype(x.dtype, jnp.integer) else 3):
        raise ValueError(
            f"models: {name} needs sequences (batch, seq_len, features), or tokens (batch, seq_len), and got {x.dtype} "
            f"of shape {tuple(x.shape)}; choose a task of sequences, as task.name = 'sequential_digits'."
        )
