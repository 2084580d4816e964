"""Networks as Equinox's examples have them, small: healthy as published, and broken in stated
ways."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from pathologies.case import Case
from pathologies.unseen_data import (
    cross_entropy,
    digits,
    labelled,
    module,
    numbered,
    sentiment,
    spirals,
)


def keys(seed, n):
    return jax.random.split(jax.random.key(seed), n)


class CNN(eqx.Module):
    """One convolution, three dense layers: max-pooling, ReLU, sigmoid, ReLU between them."""

    layers: list

    def __init__(self, seed):
        k = keys(seed, 4)
        self.layers = [
            eqx.nn.Conv2d(1, 3, kernel_size=4, key=k[0]),
            eqx.nn.MaxPool2d(kernel_size=2),
            jax.nn.relu,
            jnp.ravel,
            eqx.nn.Linear(3 * 12 * 12, 128, key=k[1]),
            jax.nn.sigmoid,
            eqx.nn.Linear(128, 64, key=k[2]),
            jax.nn.relu,
            eqx.nn.Linear(64, 10, key=k[3]),
            jax.nn.log_softmax,
        ]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class RNN(eqx.Module):
    """A cell scanned over a sequence, and a read-out of its last state through a sigmoid."""

    cell: eqx.Module
    linear: eqx.nn.Linear
    bias: jax.Array

    def __init__(self, seed, cell=eqx.nn.GRUCell, hidden=16):
        k = keys(seed, 2)
        self.cell = cell(2, hidden, key=k[0])
        self.linear = eqx.nn.Linear(hidden, 1, use_bias=False, key=k[1])
        self.bias = jnp.zeros(1)

    def __call__(self, xs):
        import gradjax

        def step(h, x):
            return gradjax.tap(self.cell(x, h), "h"), None

        h, _ = jax.lax.scan(step, jnp.zeros(self.linear.in_features), xs)
        return jax.nn.sigmoid(self.linear(h) + self.bias)


class TanhCell(eqx.Module):
    """h' = tanh(U x + W h), W Gaussian of standard deviation gain / sqrt(hidden)."""

    inp: eqx.nn.Linear
    weight: jax.Array

    def __init__(self, in_size, hidden, gain, *, key):
        k = jax.random.split(key)
        self.inp = eqx.nn.Linear(in_size, hidden, key=k[0])
        self.weight = gain * jax.random.normal(k[1], (hidden, hidden)) / np.float32(hidden) ** 0.5

    def __call__(self, x, h):
        return jnp.tanh(self.inp(x) + self.weight @ h)


def binary(model, x, y):
    p = jax.vmap(model)(x)
    return -(y * jnp.log(p) + (1 - y) * jnp.log(1 - p)).mean()


class AttentionBlock(eqx.Module):
    """LayerNorm, attention, skip; LayerNorm, two-layer MLP, skip. `skip=False` forgets both."""

    norms: list
    attention: eqx.nn.MultiheadAttention
    linear1: eqx.nn.Linear
    linear2: eqx.nn.Linear
    skip: bool = eqx.field(static=True)

    def __init__(self, width, hidden, heads, skip, key):
        k = jax.random.split(key, 3)
        self.norms = [eqx.nn.LayerNorm(width) for _ in range(2)]
        self.attention = eqx.nn.MultiheadAttention(heads, width, key=k[0])
        self.linear1, self.linear2 = (
            eqx.nn.Linear(width, hidden, key=k[1]),
            eqx.nn.Linear(hidden, width, key=k[2]),
        )
        self.skip = skip

    def __call__(self, x):
        h = jax.vmap(self.norms[0])(x)
        y = self.attention(h, h, h)
        x = x + y if self.skip else y
        y = jax.vmap(lambda h: self.linear2(jax.nn.gelu(self.linear1(self.norms[1](h)))))(x)
        return x + y if self.skip else y


class ViT(eqx.Module):
    """Patches of 4 x 4, a class token, positions, blocks, and a linear head on the class token."""

    patch: eqx.nn.Linear
    positions: jax.Array
    token: jax.Array
    blocks: list
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, seed, depth=6, width=32, skip=True):
        k = keys(seed, depth + 4)
        self.patch = eqx.nn.Linear(16, width, key=k[0])
        self.positions, self.token = (
            jax.random.normal(k[1], (17, width)),
            jax.random.normal(k[2], (1, width)),
        )
        self.blocks = [AttentionBlock(width, 2 * width, 4, skip, key) for key in k[4:]]
        self.norm, self.head = eqx.nn.LayerNorm(width), eqx.nn.Linear(width, 10, key=k[3])

    def __call__(self, x):
        patches = x.reshape(4, 4, 4, 4).transpose(0, 2, 1, 3).reshape(16, 16)
        x = jnp.concatenate([self.token, jax.vmap(self.patch)(patches)]) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[0]))


class MixerBlock(eqx.Module):
    """MLPs over the patches and over the channels, with LayerNorm before and a skip around each."""

    patch_mixer: eqx.nn.MLP
    hidden_mixer: eqx.nn.MLP
    norms: list

    def __init__(self, patches, width, key):
        k = jax.random.split(key)
        self.patch_mixer = eqx.nn.MLP(patches, patches, 64, depth=1, key=k[0])
        self.hidden_mixer = eqx.nn.MLP(width, width, 64, depth=1, key=k[1])
        self.norms = [eqx.nn.LayerNorm((width, patches)), eqx.nn.LayerNorm((patches, width))]

    def __call__(self, x):
        x = x + jax.vmap(self.patch_mixer)(self.norms[0](x))
        return (x.T + jax.vmap(self.hidden_mixer)(self.norms[1](x.T))).T


class Mixer(eqx.Module):
    """The score of a noisy image at a time."""

    conv_in: eqx.nn.Conv2d
    blocks: list
    norm: eqx.nn.LayerNorm
    conv_out: eqx.nn.ConvTranspose2d

    def __init__(self, seed, depth=4, width=32):
        k = keys(seed, depth + 2)
        self.conv_in = eqx.nn.Conv2d(2, width, 4, stride=4, key=k[0])
        self.conv_out = eqx.nn.ConvTranspose2d(width, 1, 4, stride=4, key=k[1])
        self.blocks = [MixerBlock(16, width, key) for key in k[2:]]
        self.norm = eqx.nn.LayerNorm((width, 16))

    def __call__(self, t, x):
        x = self.conv_in(jnp.concatenate([x, jnp.full_like(x, t / 10)])).reshape(-1, 16)
        for block in self.blocks:
            x = block(x)
        return self.conv_out(self.norm(x).reshape(-1, 4, 4))


def denoising(model, x, _):
    """The weighted loss of denoising, times and noise drawn once for all."""
    t = 10 * (jnp.arange(len(x), dtype=jnp.float32) + 0.5) / len(x)
    noise = jax.random.normal(jax.random.key(0), x.shape)

    def single(x, t, noise):
        std = jnp.sqrt(jnp.maximum(1 - jnp.exp(-t), 1e-5))
        score = model(t, (x - 0.3) / 0.37 * jnp.exp(-0.5 * t) + std * noise)
        return (1 - jnp.exp(-t)) * ((score + noise / std) ** 2).mean()

    return jax.vmap(single)(x, t, noise).mean()


class BertLayer(eqx.Module):
    """Attention, skip, LayerNorm; two-layer MLP, skip, LayerNorm."""

    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.Linear
    output: eqx.nn.Linear
    norms: list

    def __init__(self, width, heads, key):
        k = jax.random.split(key, 3)
        bias = dict.fromkeys(
            ("use_query_bias", "use_key_bias", "use_value_bias", "use_output_bias"), True
        )
        self.attention = eqx.nn.MultiheadAttention(heads, width, **bias, key=k[0])
        self.mlp, self.output = (
            eqx.nn.Linear(width, 4 * width, key=k[1]),
            eqx.nn.Linear(4 * width, width, key=k[2]),
        )
        self.norms = [eqx.nn.LayerNorm(width) for _ in range(2)]

    def __call__(self, x):
        x = jax.vmap(self.norms[0])(x + self.attention(x, x, x))
        return jax.vmap(lambda h: self.norms[1](h + self.output(jax.nn.gelu(self.mlp(h)))))(x)


class Bert(eqx.Module):
    """Embeddings with LayerNorm, post-LN layers, a tanh pooler of the first token, a classifier."""

    tokens: eqx.nn.Embedding
    positions: eqx.nn.Embedding
    norm: eqx.nn.LayerNorm
    layers: list
    pooler: eqx.nn.Linear
    classifier: eqx.nn.Linear

    def __init__(self, seed, depth=3, width=32):
        k = keys(seed, depth + 4)
        self.tokens, self.positions = (
            eqx.nn.Embedding(64, width, key=k[0]),
            eqx.nn.Embedding(20, width, key=k[1]),
        )
        self.norm = eqx.nn.LayerNorm(width)
        self.layers = [BertLayer(width, 2, key) for key in k[4:]]
        self.pooler, self.classifier = (
            eqx.nn.Linear(width, width, key=k[2]),
            eqx.nn.Linear(width, 2, key=k[3]),
        )

    def __call__(self, ids):
        x = jax.vmap(self.tokens)(ids) + jax.vmap(self.positions)(jnp.arange(len(ids)))
        x = jax.vmap(self.norm)(x)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(jnp.tanh(self.pooler(x[0])))


def mapped(model, x, y):
    return cross_entropy(jax.vmap(model)(x), y)


def mlp(depth, **options):
    return lambda seed: eqx.nn.MLP(256, 10, 64, depth, key=jax.random.key(seed), **options)


def weights(where, function):
    """An `alter`: `function` of the leaf that `where` finds."""
    return lambda model: eqx.tree_at(where, model, replace_fn=function)


def cnn_position(where):
    """The CNN's layer: its list holds a convolution, pooling and activations, and dense layers at
    4, 6 and 8."""
    index = numbered("layer")(where)
    return None if index is None else 0 if index < 4 else index // 2 - 1


def tanh_rnn(gain, length):
    return module(
        lambda seed: RNN(seed, functools.partial(TanhCell, gain=gain), 64),
        spirals(length=length),
        binary,
    )


flat, image = digits(flat=True), digits(channels_first=True, scale=2.0, shift=-1.0)
block, adam = numbered("block"), optax.adam(0.003)
case = functools.partial(Case, framework="equinox")

CASES = (
    case(
        name="equinox_mnist_cnn",
        architecture="cnn",
        depth=3,
        make=module(CNN, image, mapped, tx=optax.adam(3e-4)),
        position=cnn_position,
        source="equinox/docs/examples/mnist.ipynb: pixels in [-1, 1], Adam(0.0003)",
    ),
    case(
        name="equinox_gru_trained",
        architecture="rnn",
        depth=16,
        make=module(RNN, spirals(), binary, tx=adam, steps=300),
        source="equinox/docs/examples/train_rnn.ipynb, after 300 steps of Adam(0.003)",
    ),
    case(
        name="equinox_vit",
        architecture="transformer",
        depth=4,
        make=module(lambda seed: ViT(seed, 4), image, mapped, tx=optax.adam(1e-4)),
        position=block,
        source="equinox/docs/examples/vision_transformer.ipynb",
    ),
    case(
        name="equinox_mixer",
        architecture="mlp",
        depth=4,
        make=module(Mixer, digits(channels_first=True), denoising, tx=optax.adabelief(3e-4)),
        position=block,
        source="equinox/docs/examples/score_based_diffusion.ipynb: an MLP mixer, AdaBelief(0.0003)",
    ),
    case(
        name="equinox_bert",
        architecture="transformer",
        depth=3,
        make=module(Bert, sentiment(), mapped, tx=optax.adam(1e-3)),
        position=numbered("layer"),
        source="equinox/docs/examples/bert.ipynb: post-LN, three layers",
    ),
    case(
        name="equinox_gru_untrained",
        architecture="rnn",
        depth=16,
        make=module(RNN, spirals(), binary, tx=adam),
        source="equinox/docs/examples/train_rnn.ipynb as initialised: its log shows 110 steps at "
        "the loss of chance",
        **labelled("vanishing_gradients", None, 15, "mild"),
    ),
    case(
        name="equinox_mlp_default_20",
        architecture="mlp",
        depth=20,
        make=module(mlp(20), flat, mapped),
        source="eqx.nn.MLP(depth=20): the default weights have a third of LeCun's variance",
        **labelled("vanishing_gradients", "weights_too_small", 19),
    ),
    case(
        name="equinox_one_layer_large",
        architecture="mlp",
        depth=8,
        make=module(
            mlp(8), flat, mapped, weights(lambda model: model.layers[5].weight, lambda w: 1e4 * w)
        ),
        source="eqx.nn.MLP(depth=8), one of whose layers was initialised 10,000 times too large",
        **labelled("exploding_gradients", "weights_too_large", 5),
    ),
    case(
        name="equinox_mnist_bytes",
        architecture="cnn",
        depth=3,
        make=module(CNN, digits(channels_first=True, scale=255.0), mapped),
        position=cnn_position,
        source="equinox/docs/examples/mnist.ipynb without its normalisation: bytes into a sigmoid",
        **labelled("saturated_units", "input_scale", 1),
    ),
    case(
        name="equinox_vit_no_skip",
        architecture="transformer",
        depth=8,
        make=module(lambda seed: ViT(seed, 8, skip=False), image, mapped),
        position=block,
        source="equinox/docs/examples/vision_transformer.ipynb without its skips",
        **labelled("rank_collapse", None, 0),
    ),
    case(
        name="equinox_tanh_rnn_gain_3",
        architecture="rnn",
        depth=80,
        make=tanh_rnn(3.0, 80),
        source="equinox/docs/examples/train_rnn.ipynb with a tanh cell of recurrent gain 3",
        **labelled("exploding_gradients", "weights_too_large", 79),
    ),
    case(
        name="equinox_tanh_rnn_gain_03",
        architecture="rnn",
        depth=32,
        make=tanh_rnn(0.3, 32),
        source="equinox/docs/examples/train_rnn.ipynb with a tanh cell of recurrent gain 0.3",
        **labelled("vanishing_gradients", "weights_too_small", 31),
    ),
)
