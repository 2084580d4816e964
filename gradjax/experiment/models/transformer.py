"""Transformer whose depth is one scan, with three placements of its norm.

    pre       h + scale f(norm(h))          (Xiong et al. 2020, arXiv 2002.04745); one more norm
                                            before the read-out
    post      norm(h + scale f(h))          (Vaswani et al. 2017, arXiv 1706.03762)
    deepnorm  norm(alpha h + scale f(h))    (Wang et al. 2022, arXiv 2203.00555: alpha is
                                            (2 N)^(1/4), and the weights of value, output and
                                            feed-forward times beta = (8 N)^(-1/4), N = depth)

f is attention, softmax(q k^T / sqrt(width / num_heads)) v, then two maps, width -> 4 width ->
width, with `activation` in between. `depth` counts blocks of both. All W ~ sigma_w * (the
distribution `weights`), b ~ N(0, sigma_b^2), the input map 1 / fan_in. `residual_scale`, learned
with `residual_learned`, is 1; from 0 it is ReZero (Bachlechner et al. 2020, arXiv 2003.04887).
Dropout acts on what each f returns. Positions are added as sines (Vaswani 2017, section 3.5).

With a target per step (`per_step`) attention is causal; otherwise every step sees all, and the mean
over the steps is read out. The attention logits of every block are sown as "attention_logits" into
"intermediates".
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gradjax.experiment.models.layers import (
    Activation,
    Dense,
    Dropout,
    Skip,
    Treated,
    normalize,
    plus,
    settings,
)
from gradjax.experiment.models.network import LAYERS, Network, Part, Readout, part
from gradjax.experiment.models.sequences import check_sequences, no_batchnorm, sequence_of
from gradjax.experiment.schema import Model


class Attention(Treated):
    """Multi-head attention of a sequence to itself; `beta` scales value and output."""

    width: int
    num_heads: int
    causal: bool
    beta: float

    @nn.compact
    def __call__(self, h: Array) -> Array:
        """(..., seq_len, width) -> (..., seq_len, width)."""
        heads = (*h.shape[:-1], self.num_heads, self.width // self.num_heads)

        def dense(name: str, scale: float = 1.0) -> Dense:
            return settings(self, Dense, sigma_w=self.sigma_w * scale, name=name)

        q, k = (dense(name)(h).reshape(heads) for name in ("query", "key"))
        v = dense("value", self.beta)(h).reshape(heads)
        logits = jnp.einsum("...qhd,...khd->...hqk", q, k) / math.sqrt(heads[-1])
        self.sow("intermediates", "attention_logits", logits)
        if self.causal:
            seen = jnp.broadcast_to(jnp.tri(h.shape[-2], dtype=bool), logits.shape)
            logits = jnp.where(seen, logits, jnp.full_like(logits, -1e30))
        mixed = jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(logits), v)
        return dense("out", self.beta)(mixed.reshape(h.shape))


class FeedForward(Treated):
    """Two maps, applied to every step by itself; `beta` scales both."""

    width: int
    depth: int
    beta: float

    @nn.compact
    def __call__(self, h: Array) -> Array:
        """(..., width) -> (..., width)."""
        sigma_w = self.sigma_w * self.beta
        z = settings(self, Dense, width=4 * self.width, sigma_w=sigma_w, name="up")(h)
        a = Activation(self.activation, self.depth)(z)
        return settings(self, Dense, sigma_w=sigma_w, name="down")(a)


class Norm(nn.Module):
    """layernorm, rmsnorm or none, under a name of its own."""

    kind: str

    @nn.compact
    def __call__(self, h: Array) -> Array:
        """Every step normalised by itself."""
        return normalize(self.kind, h, train=True)


class Block(Treated):
    """Attention and feed-forward maps, each with its skip and norm."""

    width: int
    depth: int
    residual_scale: float | Array
    residual_learned: bool
    placement: str
    num_heads: int
    dropout: float | Array | None
    causal: bool

    @nn.compact
    def __call__(self, h: Array, train: bool) -> Array:
        """The next state, (..., seq_len, width)."""
        alpha, beta = 1.0, 1.0
        if self.placement == "deepnorm":
            alpha, beta = (2 * self.depth) ** 0.25, (8 * self.depth) ** -0.25
        for kind, name in ((Attention, "attention"), (FeedForward, "mlp")):
            branch = settings(self, kind, beta=beta, name=name)
            norm = Norm(self.normalization, name=f"norm_{name}")
            z = branch(norm(h) if self.placement == "pre" else h)
            if self.dropout is not None and train:
                z = Dropout(self.dropout, name=f"dropout_{name}")(z)
            h = Skip(self.residual_scale, self.residual_learned, name=f"skip_{name}")(alpha * h, z)
            if self.placement != "pre":
                h = norm(h)
        return h


class Embed(nn.Module):
    """A linear map of every step plus its position."""

    width: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """(..., seq_len, features) -> (..., seq_len, width)."""
        z = Dense(self.width, name="dense")(x)
        return plus(z, positions(x.shape[-2], self.width))


class Head(nn.Module):
    """A norm, where the blocks have theirs before the branch, and the read-out."""

    num_outputs: int
    kind: str
    averaged: int

    @nn.compact
    def __call__(self, h: Array, train: bool) -> Array:
        """(..., seq_len, width) -> (..., num_outputs), or (..., seq_len, num_outputs)."""
        h = Norm(self.kind, name="norm")(h)
        return settings(self, Readout, name="dense")(h, train)


def positions(seq_len: int, width: int) -> Array:
    """(seq_len, width) sines and cosines of wavelengths 2 pi .. 10,000 * 2 pi."""
    angles = np.arange(seq_len)[:, None] / 10_000.0 ** (2 * (np.arange(width) // 2) / width)
    return jnp.asarray(np.where(np.arange(width) % 2, np.cos(angles), np.sin(angles)), jnp.float32)


class Transformer(Network, kw_only=True):
    """`depth` blocks of `width` units in `num_heads` heads; see the module's equations."""

    depth: int
    width: int
    activation: str = "gelu"
    residual_scale: float | Array = 1.0
    residual_learned: bool = False
    normalization: str = "layernorm"
    placement: str = "pre"
    num_heads: int = 4
    dropout: float | Array | None = None
    per_step: bool = False

    @staticmethod
    def check_compatible(model: Model) -> str:
        """Why a transformer cannot have these settings; empty where it can."""
        if model.width % model.num_heads:
            return (
                f"models: {model.num_heads} heads do not divide a width of {model.width}; choose "
                "a model.num_heads that does."
            )
        return no_batchnorm(model)

    @nn.nowrap
    def _check(self, x: Array) -> None:
        check_sequences("transformer", self, x)

    @nn.nowrap
    def _first_state(self, x: Array) -> Array:
        return jnp.moveaxis(sequence_of(x, self.num_outputs), 0, -2)

    def _parts(self, x: Array) -> list[Part]:
        before = self.normalization if self.placement == "pre" else "none"
        averaged = 0 if self.per_step else 1
        return [
            part("embed", self, Embed),
            part(LAYERS, self, Block, self.depth, causal=self.per_step),
            part("readout", self, Head, kind=before, averaged=averaged),
        ]
