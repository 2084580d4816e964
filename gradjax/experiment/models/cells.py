"""Recurrent cells: plain, orthogonal, LSTM, GRU, minimalRNN. To add one, add an entry to `CELLS`.

    rnn             h' = phi(W x + U h + b)                      (Elman 1990; IRNN: relu, U = I)
    orthogonal_rnn  the same with U = sigma_w (1 + A)^-1 (1 - A), A = -A^T learned
                                                    (Helfrich et al. 2018, arXiv 1707.09520)
    lstm            c' = s(f) c + s(i) phi(g),  h' = s(o) phi(c'),  (i, f, g, o) = W x + U h + b
                                                    (Hochreiter & Schmidhuber 1997, Gers 2000)
    gru             h' = s(u) h + (1 - s(u)) phi(W x + s(r) U h + b)
                                                    (Cho et al. 2014, arXiv 1406.1078)
    minimal_rnn     h' = s(u) h + (1 - s(u)) z,  z = phi(W x + b),  u = U h + V z + b'
                                                    (Chen et al. 2018, arXiv 1806.05394)

s is the sigmoid; the GRU resets behind its product, as cuDNN does.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import sigmoid

from gradjax.core.initializers import WEIGHTS, gaussian
from gradjax.experiment.models.layers import plus

PyTree = Any
Weights = dict[str, Array]
Phi = Callable[[Array], Array]


class Kernel(nn.Module):
    """A matrix by itself, under the name by which regularisation knows weights."""

    shape: tuple[int, int]
    init: Any

    @nn.compact
    def __call__(self) -> Array:
        """(fan_in, fan_out)."""
        return self.param("kernel", self.init, self.shape)


def drawn(layer: Any, columns: int) -> Array:
    """U (width, columns) ~ sigma_w * (the distribution `weights`), block by block of the gates."""

    def init(key: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Array:
        draw, width = WEIGHTS[layer.weights](layer.sigma_w), shape[0]
        keys = jax.random.split(key, shape[1] // width)
        blocks = jax.vmap(lambda key: draw(key, (width, width), dtype))(keys)
        return jnp.moveaxis(blocks, 0, 1).reshape(shape)

    return Kernel((layer.width, columns), init, name="recurrent")()


def rotated(layer: Any, columns: int) -> Array:
    """U = sigma_w times the orthogonal matrix of a learned skew-symmetric one, see `cayley`."""
    skew = layer.param("skew", gaussian(1.0), (layer.width, columns))
    return jnp.asarray(layer.sigma_w, skew.dtype) * cayley(skew)


def cayley(skew: Array) -> Array:
    """The orthogonal (1 + A)^-1 (1 - A) of A = (B - B^T) / sqrt(2), B being `skew`.

    Every orthogonal matrix without the eigenvalue -1 is one. With B ~ N(0, 1 / n) the eigenvalues
    of A fill i [-2, 2] (a semicircle), those of the result turn by up to 127 degrees. One solve,
    O(n^3), whatever the number of time steps.
    """
    a = (skew - skew.T) * jnp.asarray(0.5**0.5, skew.dtype)
    one = jnp.eye(len(skew), dtype=skew.dtype)
    return jnp.linalg.solve(one + a, one - a)


class Cell(NamedTuple):
    """A kind of recurrence: its weights, its state, and one step in time."""

    step: Callable[[Weights, PyTree, Array, Array, Phi], PyTree]
    """(weights, state, W x, U h, phi) -> the next state; the products are already normalised, and
    `weights["bias"]` is still to be added."""
    blocks: int
    """Blocks of W and U, of `width` columns each."""
    starts: tuple[str | None, ...]
    """Where each block of b starts: "forget" at `forget_bias` or `chrono`, "input" at the negative
    of chrono's (i keeps out what f keeps in), None at 0."""
    state: Callable[[Array], PyTree] = lambda h: h
    """The first state, whose arrays are all `h`."""
    output: Callable[[PyTree], Array] = lambda state: state
    """h of a state, which the next layer, the gates and the read-out see."""
    recurrent: Callable[[Any, int], Array] = drawn
    """(layer, columns) -> U; makes its parameters inside the layer's compact call."""
    squares: tuple[str, ...] = ()
    """Further matrices (width, width) ~ 1 / fan_in, which `step` finds under these names."""
    fixed: dict[str, Any] = {}
    """Settings that a network of this cell does not take, and the values they have instead."""

    def all_fixed(self) -> dict[str, Any]:
        """`fixed`, with the settings of the gates where the cell has none."""
        gates = {} if "forget" in self.starts else {"forget_bias": None, "chrono": None}
        return {**self.fixed, **gates}


def _plain(w: Weights, h: Array, z: Array, r: Array, phi: Phi) -> Array:
    return phi(plus(z + r, w["bias"]))


def _lstm(w: Weights, state: tuple, z: Array, r: Array, phi: Phi) -> tuple[Array, Array]:
    i, f, g, o = jnp.split(plus(z + r, w["bias"]), 4, axis=-1)
    c = sigmoid(f) * state[0] + sigmoid(i) * phi(g)
    return c, sigmoid(o) * phi(c)


def _gru(w: Weights, h: Array, z: Array, r: Array, phi: Phi) -> Array:
    z_r, z_u, z_n = jnp.split(plus(z, w["bias"]), 3, axis=-1)
    r_r, r_u, r_n = jnp.split(r, 3, axis=-1)
    u = sigmoid(z_u + r_u)
    return u * h + (1 - u) * phi(z_n + sigmoid(z_r + r_r) * r_n)


def _minimal(w: Weights, h: Array, z: Array, r: Array, phi: Phi) -> Array:
    bias, gate_bias = jnp.split(w["bias"], 2)
    candidate = phi(plus(z, bias))
    u = sigmoid(plus(r + candidate @ w["gate"], gate_bias))
    return u * h + (1 - u) * candidate


CELLS = {
    "rnn": Cell(_plain, 1, (None,)),
    "orthogonal_rnn": Cell(_plain, 1, (None,), recurrent=rotated, fixed={"weights": "gaussian"}),
    "lstm": Cell(
        _lstm,
        4,
        ("input", "forget", None, None),
        state=lambda h: (h, h),
        output=lambda state: state[1],
    ),
    "gru": Cell(_gru, 3, (None, "forget", None)),
    "minimal_rnn": Cell(_minimal, 1, (None, "forget"), squares=("gate",)),
}
