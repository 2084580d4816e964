"""Transformer whose depth is one scan, with its norm before, behind or DeepNorm's way, and visible
attention logits.

    pre       h + scale f(norm(h))          (Xiong et al. 2020, arXiv 2002.04745); one norm more before the read-out
    post      norm(h + scale f(h))          (Vaswani et al. 2017, arXiv 1706.03762)
    deepnorm  norm(alpha h + scale f(h))    (Wang et al. 2022, arXiv 2203.00555: alpha = (2 N)^(1/4), and the weights of
                                            value, output and feed-forward times beta = (8
                                            N)^(-1/4), N = depth)

f is attention, softmax(q k^T / sqrt(width / num_heads)) v, then two maps, width -> 4 width ->
width, with `activation` in between. `depth` counts blocks of both. All W ~ sigma_w * (the
distribution `weights`), b ~ N(0, sigma_b^2), the input map 1 / fan_in. `residual_scale`, learned
with `residual_learned`, is 1; from 0 it is ReZero (Bachlechner et al. 2020, arXiv 2003.04887).
Dropout acts on what each f returns. Positions are added as sines (Vaswani 2017, section 3.5).

With a target per step (`per_step`) no step sees a later one; else all see all, and the mean over
the steps is read out. The logits of every block are sown as "attention_logits" into
"intermediates".
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gradjax.core.step import Links, Scan
from gradjax.experiment.models.layers import Activation, Dense, Dropout, Skip, normalize, settings
from gradjax.experiment.models.recurrent import check_sequences, no_batchnorm, sequence_of

PyTree = Any


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself."""

    width: int
    num_heads: int
    causal: bool
    weights: str
    sigma_w: float | Array
    sigma_b: float | Array
    beta: float  # on value and output

    @nn.compact
    def __call__(self, h: Array) -> Array:
        """(..., seq_len, width) -> (..., seq_len, width)."""
        heads = (*h.shape[:-1], self.num_heads, self.width // self.num_heads)

        def dense(name: str, scale: float = 1.0) -> Dense:
            return Dense(self.width, self.weights, self.sigma_w * scale, self.sigma_b, name=name)

        q, k = (dense(name)(h).reshape(heads) for name in ("query", "key"))
        v = dense("value", self.beta)(h).reshape(heads)
        logits = jnp.einsum("...qhd,...khd->...hqk", q, k) / math.sqrt(heads[-1])
        self.sow("intermediates", "attention_logits", logits)
        if self.causal:
            seen = jnp.broadcast_to(jnp.tri(h.shape[-2], dtype=bool), logits.shape)
            logits = jnp.where(seen, logits, jnp.full_like(logits, -1e30))
        mixed = jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(logits), v)
        return dense("out", self.beta)(mixed.reshape(h.shape))


class FeedForward(nn.Module):
    """Two maps of every step by itself."""

    width: int
    depth: int  # of the network, to which a tailored activation is tailored
    activation: str
    weights: str
    sigma_w: float | Array
    sigma_b: float | Array
    beta: float

    @nn.compact
    def __call__(self, h: Array) -> Array:
        """(..., width) -> (..., width)."""
        scale = self.sigma_w * self.beta
        z = Dense(4 * self.width, self.weights, scale, self.sigma_b, name="up")(h)
        return Dense(self.width, self.weights, scale, self.sigma_b, name="down")(
            Activation(self.activation, self.depth)(z)
        )


class Norm(nn.Module):
    """layernorm, rmsnorm or none, under a name of its own."""

    kind: str

    @nn.compact
    def __call__(self, h: Array) -> Array:
        """Every step normalised by itself."""
        return normalize(self.kind, h, train=True)


class Block(nn.Module):
    """Attention and feed-forward maps, each with its skip and norm."""

    width: int
    depth: int
    activation: str
    sigma_w: float | Array
    sigma_b: float | Array
    weights: str
    residual_scale: float | Array
    residual_learned: bool
    normalization: str
    placement: str
    num_heads: int
    dropout: float | Array | None
    causal: bool

    @nn.compact
    def __call__(self, h: Array, train: bool) -> Array:
        """The next state, (..., seq_len, width)."""
        alpha, beta = (
            ((2 * self.depth) ** 0.25, (8 * self.depth) ** -0.25)
            if self.placement == "deepnorm"
            else (1, 1.0)
        )
        shared = {
            "weights": self.weights,
            "sigma_w": self.sigma_w,
            "sigma_b": self.sigma_b,
            "beta": beta,
        }
        branches = {
            "attention": Attention(
                self.width, self.num_heads, self.causal, **shared, name="attention"
            ),
            "mlp": FeedForward(self.width, self.depth, self.activation, **shared, name="mlp"),
        }
        for name, branch in branches.items():
            norm = Norm(self.normalization, name=f"norm_{name}")
            z = branch(norm(h) if self.placement == "pre" else h)
            if self.dropout is not None and train:
                z = Dropout(self.dropout, name=f"dropout_{name}")(z)
            h = Skip(self.residual_scale, self.residual_learned, name=f"skip_{name}")(alpha * h, z)
            h = h if self.placement == "pre" else norm(h)
        return h


class Embed(nn.Module):
    """A linear map of every step plus its position."""

    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(..., seq_len, features) -> (..., seq_len, width)."""
        z = Dense(self.width, name="dense")(x)
        return z + jnp.broadcast_to(positions(x.shape[-2], self.width), z.shape)


class Readout(nn.Module):
    """A norm where the blocks have theirs before the branch, and a linear map, of every step or of
    their mean.
    """

    num_outputs: int
    kind: str
    per_step: bool

    @nn.compact
    def __call__(self, h: Array) -> Array:
        """(..., seq_len, width) -> (..., num_outputs), or (..., seq_len, num_outputs)."""
        h = Norm(self.kind, name="norm")(h)
        h = h if self.per_step else jnp.mean(h, axis=-2)
        return nn.Dense(self.num_outputs, kernel_init=nn.initializers.lecun_normal(), name="dense")(
            h
        )


def positions(seq_len: int, width: int) -> Array:
    """(seq_len, width) sines and cosines of wavelengths 2 pi .. 10,000 * 2 pi."""
    angles = np.arange(seq_len)[:, None] / 10_000.0 ** (2 * (np.arange(width) // 2) / width)
    return jnp.asarray(np.where(np.arange(width) % 2, np.cos(angles), np.sin(angles)), jnp.float32)


class Transformer(nn.Module):
    """`depth` blocks of `width` units in `num_heads` heads; see the module's equations."""

    num_outputs: int
    depth: int
    width: int
    activation: str = "gelu"
    sigma_w: float | Array = 1.0
    sigma_b: float | Array = 0.0
    weights: str = "gaussian"
    residual_scale: float | Array = 1.0
    residual_learned: bool = False
    normalization: str = "layernorm"
    placement: str = "pre"
    num_heads: int = 4
    dropout: float | Array | None = None
    per_step: bool = False

    @staticmethod
    def check_compatible(model: Any) -> str:
        """What a transformer cannot have, of this module or of a `gradjax.config.Model`; empty if
        nothing.
        """
        if model.width % model.num_heads:
            return (
                f"models: {model.num_heads} heads do not divide a width of {model.width}; choose a model.num_heads "
                "that does."
            )
        return no_batchnorm(model)

    def _block(self, **kwargs: Any) -> Block:
        return settings(self, Block, causal=self.per_step, **kwargs)

    def _readout(self, per_step: bool, **kwargs: Any) -> Readout:
        return Readout(
            self.num_outputs,
            self.normalization if self.placement == "pre" else "none",
            per_step,
            **kwargs,
        )

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Logits (batch, num_outputs), or with per_step (batch, seq_len, num_outputs).

        Args:
          x: (batch, seq_len, features), or int tokens (batch, seq_len).
          train: whether dropout drops, drawing from the "dropout" key.
        """
        check_sequences("transformer", self, x)
        layers = nn.scan(
            lambda block, h, _: (block(h, train), None),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.depth,
        )
        h = Embed(self.width, name="embed")(self._inputs(x))
        h, _ = layers(self._block(name="layers"), h, None)
        return self._readout(self.per_step, name="readout")(h)

    def _inputs(self, x: Array) -> Array:
        return jnp.moveaxis(sequence_of(x, self.num_outputs), 0, -2)

    def links(self, variables: PyTree, x: Array, key: Array | None = None) -> tuple[Array, Links]:
        """The network in training mode as links.

        Args:
          variables: as `init` returns them.
          x: (seq_len, features) or tokens (seq_len,) of one example, or a batch of them.
          key: PRNG key of the dropout masks, needed where there is dropout.

        Returns:
          The inputs, and [(embed, theta), Scan(block, thetas), (readout, theta)], whose states are whole sequences and
          whose end are the logits, with per_step those of the last step.
        """
        if self.dropout is not None and key is None:
            raise ValueError(
                "Transformer.links: a network with dropout draws masks; pass key=jax.random.key(...)."
            )
        theta = lambda name: {"variables": {"params": variables["params"][name]}}
        layers = theta("layers")
        if self.dropout is not None:
            layers["key"] = jax.random.split(key, self.depth)  # type: ignore[arg-type]

        def embed(h, theta):
            return Embed(self.width, parent=None).apply(theta["variables"], h)

        def block(h, theta):
            rngs = {"dropout": theta["key"]} if "key" in theta else {}
            return self._block(parent=None).apply(theta["variables"], h, True, rngs=rngs)

        def readout(h, theta):
            h = h[..., -1:, :] if self.per_step else h
            return self._readout(False, parent=None).apply(
                theta["variables"], h
            )  # the mean over one step

        return self._inputs(x), [
            (embed, theta("embed")),
            Scan(block, layers),
            (readout, theta("readout")),
        ]
