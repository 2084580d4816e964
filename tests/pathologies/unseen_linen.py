"""Networks as Flax's Linen examples and Optax's have them, small: healthy as published, and broken
in stated ways."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.linen.initializers import constant, normal, zeros

from pathologies.case import Problem
from pathologies.unseen_data import cross_entropy, digits, edit, initialiser, train


class MLP(nn.Module):
    """Hidden layers `Dense_0` to `Dense_{depth - 1}`, and a read-out."""

    depth: int
    width: int = 64
    act: callable = nn.relu
    kernel_init: callable = nn.initializers.lecun_normal()
    bias_init: callable = zeros
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth):
            layer = nn.Dense(
                self.width, self.dtype, kernel_init=self.kernel_init, bias_init=self.bias_init
            )
            x = self.act(layer(x))
        return nn.Dense(10, dtype=self.dtype)(x)


def pool(x):
    """The mean over squares of 2 x 2; Flax's `avg_pool` refuses strict promotion of dtypes."""
    batch, height, width, features = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, features).mean(axis=(2, 4))


class CNN(nn.Module):
    """Two convolutions with pooling, two dense layers."""

    act: callable = nn.relu
    stop: bool = False

    @nn.compact
    def __call__(self, x):
        for features in (8, 16):
            x = pool(self.act(nn.Conv(features, (3, 3))(x)))
        x = x.reshape(len(x), -1)
        x = jax.lax.stop_gradient(x) if self.stop else x
        x = self.act(nn.Dense(64)(x))
        return nn.Dense(10)(x)


class ResNet(nn.Module):
    """Residual blocks of two convolutions with BatchNorm, whose last scale starts at 0.

    Without `skip` a plain network (whose last scales start at 1), without `norm` no BatchNorm.
    """

    blocks: tuple = (2, 2)
    filters: int = 8
    skip: bool = True
    norm: bool = True
    kernel_init: callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=False, momentum=0.9)
        norm = norm if self.norm else lambda **_: lambda x: x
        conv = functools.partial(nn.Conv, use_bias=False, kernel_init=self.kernel_init)
        x = nn.relu(norm(name="bn_init")(conv(self.filters, (3, 3), name="conv_init")(x)))
        for stage, blocks in enumerate(self.blocks):
            for block in range(blocks):
                filters, strides = (
                    self.filters * 2**stage,
                    (2, 2) if stage and not block else (1, 1),
                )
                y = nn.relu(norm()(conv(filters, (3, 3), strides)(x)))
                last = zeros if self.skip else nn.initializers.ones
                y = norm(scale_init=last)(conv(filters, (3, 3))(y))
                if self.skip and y.shape != x.shape:
                    x = norm()(conv(filters, (1, 1), strides)(x))
                x = nn.relu(x + y) if self.skip else nn.relu(y)
        return nn.Dense(10)(x.mean(axis=(1, 2)))


def resnet(model, batch=32, steps=0, tx=None, **options):
    """A `make(seed)` whose loss returns the new running statistics beside it."""
    data = digits(batch)

    def make(seed):
        variables = initialiser(model)(jax.random.key(seed), data(seed)[0])
        stats = variables.get("batch_stats", {})

        def loss_fn(params, x, y):
            logits, new = model.apply(
                {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
            )
            return cross_entropy(logits, y), new

        params, given = variables["params"], options | {"has_aux": True}
        if steps:
            params, opt_state = train(loss_fn, params, data, tx, steps, seed, has_aux=True)
            given |= {"tx": tx, "opt_state": opt_state}
        return Problem(loss_fn, params, data(seed), given)

    return make


def sinusoids(length, width):
    angle = np.arange(length)[:, None] / 10000 ** (np.arange(width // 2) / (width // 2))
    return jnp.asarray(np.concatenate([np.sin(angle), np.cos(angle)], axis=1), jnp.float32)


class Block(nn.Module):
    """Self-attention and a two-layer MLP, each with LayerNorm before it, after it or none, and a
    skip or none."""

    norm: str = "pre"  # or "post"
    skip: bool = True
    heads: int = 2
    attention_fn: callable = nn.dot_product_attention

    @nn.compact
    def __call__(self, x, mask):
        init = nn.initializers.xavier_uniform()

        def attention(h):
            layer = nn.MultiHeadDotProductAttention(
                self.heads,
                use_bias=False,
                kernel_init=init,
                attention_fn=self.attention_fn,
                name="attention",
            )
            return layer(h, mask=mask)

        def mlp(h):
            h = nn.relu(nn.Dense(4 * x.shape[-1], kernel_init=init)(h))
            return nn.Dense(x.shape[-1], kernel_init=init)(h)

        for branch in (attention, mlp):
            y = branch(nn.LayerNorm()(x) if self.norm == "pre" else x)
            x = x + y if self.skip else y
            x = nn.LayerNorm()(x) if self.norm == "post" else x
        return x


class Layer(nn.Module):
    """A `Block` as `nn.scan` wants it."""

    block: callable

    @nn.compact
    def __call__(self, x, mask):
        return self.block(name="block")(x, mask), None


class Decoder(nn.Module):
    """A decoder-only Transformer; not `causal`, an encoder with a prediction for every token."""

    depth: int
    width: int = 32
    vocab: int = 32
    causal: bool = True
    scan: bool = False
    block: callable = Block

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocab, self.width, embedding_init=normal(1.0))(tokens)
        x = x + sinusoids(tokens.shape[1], self.width)[None]
        mask = nn.make_causal_mask(tokens) if self.causal else None
        if self.scan:
            variables = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            layers = nn.scan(Layer, **variables, in_axes=nn.broadcast, length=self.depth)
            x, _ = layers(self.block, name="layers")(x, mask)
        for i in range(0 if self.scan else self.depth):
            x = self.block(name=f"encoderdecoderblock_{i}")(x, mask)
        x = nn.LayerNorm(name="encoderdecoder_norm")(x)
        return nn.Dense(
            self.vocab, kernel_init=nn.initializers.xavier_uniform(), name="logitdense"
        )(x)


def unscaled(query, key, value, mask=None, **_):
    """Attention that forgot to divide its logits by sqrt(head_dim)."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key)
    weights = nn.softmax(jnp.where(mask, logits, -1e9))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def sharper(factor, depth):
    """Every query's and key's weights times `factor`."""

    def alter(params):
        for i in range(depth):
            for name in ("query", "key"):
                leaf = ("attention", name, "kernel")
                params = edit(lambda kernel: factor * kernel, f"encoderdecoderblock_{i}", *leaf)(
                    params
                )
        return params

    return alter


class TextClassifier(nn.Module):
    """Embedding, bidirectional LSTM, attention over the keys only, a tanh MLP."""

    hidden: int = 32

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(64, 32, embedding_init=normal(0.1))(tokens)
        x = nn.Bidirectional(*(nn.RNN(nn.OptimizedLSTMCell(self.hidden)) for _ in range(2)))(x)
        energy = nn.tanh(nn.Dense(self.hidden, use_bias=False, name="keys")(x))
        scores = nn.Dense(1, use_bias=False, name="energy")(energy)
        context = (nn.softmax(scores, axis=1) * x).sum(axis=1)
        h = nn.tanh(nn.Dense(self.hidden)(context))
        return nn.Dense(2, use_bias=False)(h)


class LSTM(nn.Module):
    """An LSTM, whose forget gates start half open, and a read-out of its last output."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.RNN(nn.LSTMCell(32))(x)[:, -1])


class Seq2seq(nn.Module):
    """An LSTM reads the one-hot tokens, another writes them again, given the right ones."""

    hidden: int = 64
    vocab: int = 16

    @nn.compact
    def __call__(self, tokens):
        x = jax.nn.one_hot(tokens, self.vocab)
        carry, _ = nn.RNN(nn.LSTMCell(self.hidden), return_carry=True, name="encoder")(x)
        shifted = jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
        return nn.Dense(self.vocab)(
            nn.RNN(nn.LSTMCell(self.hidden), name="decoder")(shifted, initial_carry=carry)
        )


def copying(seed):
    tokens = jnp.asarray(np.random.default_rng(seed).integers(0, 16, (32, 7)), jnp.int32)
    return tokens, tokens


class VAE(nn.Module):
    """A Gaussian encoder, one sample, a Bernoulli decoder; `hard`: the sample rounded, which cuts
    the encoder off."""

    hard: bool = False

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(128, name="encoder_fc1")(x))
        mean, logvar = (
            nn.Dense(20, name="encoder_fc2_mean")(h),
            nn.Dense(20, name="encoder_fc2_logvar")(h),
        )
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(jax.random.key(1), mean.shape)
        z = jnp.round(z) if self.hard else z
        logits = nn.Dense(x.shape[-1], name="decoder_fc2")(
            nn.relu(nn.Dense(128, name="decoder_fc1")(z))
        )
        return logits, mean, logvar


def reconstruction(outputs, x):
    return optax.sigmoid_binary_cross_entropy(outputs[0], x).sum(-1).mean()


def elbo(outputs, x):
    _, mean, logvar = outputs
    kl = -0.5 * (1 + logvar - mean**2 - jnp.exp(logvar)).sum(-1)
    return reconstruction(outputs, x) + kl.mean()


def pairs(data):
    """`data` with its images as their own targets."""
    return lambda seed: (data(seed)[0],) * 2


class ActorCritic(nn.Module):
    """Three convolutions over frames of bytes, a hidden layer, logits and a value; `divide` scales
    the bytes."""

    divide: float = 255.0
    bias: float = 0.0

    @nn.compact
    def __call__(self, x):
        x = x.astype(jnp.float32) / self.divide
        x = nn.relu(nn.Conv(8, (8, 8), (4, 4), name="conv1")(x))
        x = nn.relu(nn.Conv(16, (4, 4), (2, 2), name="conv2", bias_init=constant(self.bias))(x))
        x = nn.relu(nn.Conv(16, (3, 3), name="conv3")(x))
        x = nn.relu(nn.Dense(64, name="hidden")(x.reshape(len(x), -1)))
        return nn.log_softmax(nn.Dense(6, name="logits")(x)), nn.Dense(1, name="value")(x)[:, 0]


def actor_critic(model, **options):
    def make(seed):
        rng = np.random.default_rng(seed)
        frames = rng.integers(0, 256, (16, 36, 36, 4)) * (rng.random((16, 36, 36, 1)) < 0.2)
        actions, returns = rng.integers(0, 6, 16), rng.normal(size=16)
        params = initialiser(model)(jax.random.key(seed), jnp.asarray(frames, jnp.uint8))["params"]

        def loss_fn(params, frames, actions, returns):
            logp, value = model.apply({"params": params}, frames)
            advantage = jax.lax.stop_gradient(returns - value)
            policy = -(advantage * jnp.take_along_axis(logp, actions[:, None], axis=1)[:, 0]).mean()
            return (
                policy
                + 0.5 * ((returns - value) ** 2).mean()
                + 0.01 * (jnp.exp(logp) * logp).sum(-1).mean()
            )

        batch = (
            jnp.asarray(frames, jnp.uint8),
            jnp.asarray(actions, jnp.int32),
            jnp.asarray(returns, jnp.float32),
        )
        return Problem(loss_fn, params, batch, options)

    return make
