"""Networks as Flax's NNX examples and Optax's have them, small: healthy as published, and broken in
stated ways."""

import functools
import itertools

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.nnx import initializers

from pathologies.case import Case
from pathologies.unseen_data import (
    cross_entropy,
    digits,
    labelled,
    module,
    numbered,
    order,
    row,
    text,
)
from pathologies.unseen_linen import pairs, pool


class MLP(nnx.Module):
    """`layers[0]` to `layers[depth - 1]` with activations, then `out`; `skip` adds each layer to
    its input."""

    def __init__(self, depth, rngs, width=64, act=nnx.relu, init=None, bias=0.0, skip=False):
        sizes = [256] + depth * [width]
        kinds = {
            "kernel_init": init or initializers.lecun_normal(),
            "bias_init": initializers.constant(bias),
        }
        self.layers = nnx.List(
            nnx.Linear(m, n, **kinds, rngs=rngs) for m, n in itertools.pairwise(sizes)
        )
        self.out = nnx.Linear(width, 10, rngs=rngs)
        self.act, self.skip = act, skip

    def __call__(self, x):
        for layer in self.layers:
            y = self.act(layer(x))
            x = x + y if self.skip and x.shape == y.shape else y
        return self.out(x)


class CNN(nnx.Module):
    """Two convolutions, BatchNorm and dropout after the first, two dense layers; `unused` leaves
    the second out."""

    def __init__(self, rngs, unused=False):
        self.conv1 = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.batch_norm1 = nnx.BatchNorm(8, rngs=rngs)
        self.dropout1 = nnx.Dropout(0.025, rngs=rngs)
        self.conv2 = nnx.Conv(8, 8 if unused else 16, (3, 3), rngs=rngs)
        self.linear1 = nnx.Linear(16 * (8 if unused else 16), 64, rngs=rngs)
        self.linear2 = nnx.Linear(64, 10, rngs=rngs)
        self.unused = unused

    def __call__(self, x):
        x = pool(nnx.relu(self.batch_norm1(self.dropout1(self.conv1(x)))))
        y = nnx.relu(self.conv2(x))
        x = pool(x if self.unused else y)
        return self.linear2(nnx.relu(self.linear1(x.reshape(len(x), -1))))


class NanoLM(nnx.Module):
    """A character-level decoder: token and position embeddings, pre-LN blocks, a head."""

    def __init__(self, depth, rngs, width=32, vocab=32, length=24):
        self.embed, self.pos_embed = (nnx.Embed(n, width, rngs=rngs) for n in (vocab, length))
        self.layers = nnx.List(
            nnx.Dict(
                ln_1=nnx.LayerNorm(width, rngs=rngs),
                attn=nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs),
                ln_2=nnx.LayerNorm(width, rngs=rngs),
                mlp_fc=nnx.Linear(width, 4 * width, rngs=rngs),
                mlp_proj=nnx.Linear(4 * width, width, rngs=rngs),
            )
            for _ in range(depth)
        )
        self.ln_f, self.head = nnx.LayerNorm(width, rngs=rngs), nnx.Linear(width, vocab, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.pos_embed(jnp.arange(tokens.shape[1]))[None]
        mask = nnx.make_causal_mask(tokens)
        for layer in self.layers:
            x = x + layer["attn"](layer["ln_1"](x), mask=mask)
            x = x + layer["mlp_proj"](nnx.relu(layer["mlp_fc"](layer["ln_2"](x))))
        return self.head(self.ln_f(x))


class VAE(nnx.Module):
    """An encoder of mean and log standard deviation, one sample, a decoder."""

    def __init__(self, rngs):
        self.linear1, self.linear_mean = (
            nnx.Linear(256, 128, rngs=rngs),
            nnx.Linear(128, 32, rngs=rngs),
        )
        self.linear_std = nnx.Linear(128, 32, rngs=rngs)
        self.decoder1, self.decoder2 = (
            nnx.Linear(32, 128, rngs=rngs),
            nnx.Linear(128, 256, rngs=rngs),
        )

    def __call__(self, x):
        h = nnx.relu(self.linear1(x))
        mean, std = self.linear_mean(h), jnp.exp(self.linear_std(h))
        z = mean + std * jax.random.normal(jax.random.key(1), mean.shape)
        return self.decoder2(nnx.relu(self.decoder1(z))), mean, std


def elbo(model, x, _):
    logits, mean, std = model(x)
    kl = 0.5 * (-jnp.log(std**2) - 1.0 + std**2 + mean**2).mean()
    return optax.sigmoid_binary_cross_entropy(logits, x).mean() + 0.1 * kl


class ScanMLP(nnx.Module):
    """`depth` layers Linear, BatchNorm, ReLU as one stack, scanned over the batch, then a
    read-out."""

    def __init__(self, depth, rngs, width=64):
        @nnx.split_rngs(splits=depth)
        @nnx.vmap(axis_size=depth)
        def stack(rngs):
            return nnx.Dict(
                linear=nnx.Linear(width, width, rngs=rngs), norm=nnx.BatchNorm(width, rngs=rngs)
            )

        self.inp, self.layers, self.out = (
            nnx.Linear(256, width, rngs=rngs),
            stack(rngs),
            nnx.Linear(width, 10, rngs=rngs),
        )

    def __call__(self, x):
        @nnx.scan
        def scan(x, block):
            return nnx.relu(block["norm"](block["linear"](x))), None

        return self.out(scan(self.inp(x), self.layers)[0])


def loss(model, x, y):
    return cross_entropy(model(x), y)


def nnx_make(model, data, alter=lambda model: model, loss=loss, **options):
    return module(lambda seed: model(nnx.Rngs(seed)), data, loss, alter, **options)


def scale(path, factor):
    """An `alter`: the kernel of the layer `layers[path]` times `factor`."""

    def alter(model):
        kernel = model.layers[path].kernel
        kernel[...] = factor * kernel[...]
        return model

    return alter


def sharpen(factor):
    """An `alter`: every query's and key's kernel times `factor`."""

    def alter(model):
        for layer in model.layers:
            for kernel in (layer["attn"].query.kernel, layer["attn"].key.kernel):
                kernel[...] = factor * kernel[...]
        return model

    return alter


def nan_weight(model):
    """One entry of the third layer's kernel lost, as from a torn checkpoint."""
    kernel = model.layers[2].kernel
    kernel[...] = kernel[...].at[5, 7].set(jnp.nan)
    return model


conv_linear, block, flat = (
    order("conv1", "conv2", "linear1", "linear2"),
    numbered("layer"),
    digits(flat=True),
)
he, adamw = initializers.he_normal(), optax.adamw(0.002)
case = functools.partial(Case, framework="nnx")

CASES = (
    case(
        name="nnx_mnist_cnn",
        architecture="cnn",
        depth=3,
        make=nnx_make(CNN, digits(), tx=optax.adamw(0.005, 0.9)),
        position=conv_linear,
        source="Flax documentation, MNIST tutorial: BatchNorm, dropout 0.025, AdamW(0.005, 0.9)",
    ),
    case(
        name="nnx_vae",
        architecture="mlp",
        depth=3,
        make=nnx_make(VAE, pairs(flat), loss=elbo, tx=optax.adam(0.001)),
        source="flax/examples/nnx_toy_examples/05_vae.py",
    ),
    case(
        name="nnx_nanolm",
        architecture="transformer",
        depth=4,
        make=nnx_make(lambda rngs: NanoLM(4, rngs), text(), tx=adamw),
        position=block,
        source="optax/examples/nanolm.ipynb: AdamW(0.002)",
    ),
    case(
        name="nnx_nanolm_trained",
        architecture="transformer",
        depth=3,
        make=nnx_make(lambda rngs: NanoLM(3, rngs), text(), tx=adamw, steps=200),
        position=block,
        source="optax/examples/nanolm.ipynb, after 200 steps",
    ),
    case(
        name="nnx_scan_over_layers",
        architecture="mlp",
        depth=5,
        make=nnx_make(lambda rngs: ScanMLP(5, rngs), flat),
        position=row,
        source="flax/examples/nnx_toy_examples/06_scan_over_layers.py",
    ),
    case(
        name="nnx_scan_60_layers",
        architecture="mlp",
        depth=60,
        make=nnx_make(lambda rngs: ScanMLP(60, rngs), digits(64, flat=True)),
        position=row,
        source="the same with 60 layers: BatchNorm without skips",
        **labelled("batchnorm_explosion", "batchnorm", 59),
    ),
    case(
        name="nnx_stddev_036",
        architecture="mlp",
        depth=12,
        make=nnx_make(lambda rngs: MLP(12, rngs, init=initializers.normal(0.36)), flat),
        source="an MLP of normal(0.36) weights, twice He's",
        **labelled("exploding_gradients", "weights_too_large", 11, "mild"),
    ),
    case(
        name="nnx_one_layer_small",
        architecture="mlp",
        depth=6,
        make=nnx_make(lambda rngs: MLP(6, rngs, init=he), flat, scale(3, 1e-4)),
        source="an MLP of He's weights, one of whose layers was initialised 10,000 times too small",
        **labelled("vanishing_gradients", "weights_too_small", 3),
    ),
    case(
        name="nnx_all_dead",
        architecture="mlp",
        depth=4,
        make=nnx_make(lambda rngs: MLP(4, rngs, bias=-10.0), flat),
        source="biases of -10 before every ReLU",
        **labelled("dead_units", "bias", 0),
    ),
    case(
        name="nnx_tanh_bias_8",
        architecture="mlp",
        depth=4,
        make=nnx_make(lambda rngs: MLP(4, rngs, act=nnx.tanh, bias=8.0), flat),
        source="biases of 8 before every tanh",
        **labelled("saturated_units", "bias", 0),
    ),
    case(
        name="nnx_conv_unused",
        architecture="cnn",
        depth=3,
        make=nnx_make(lambda rngs: CNN(rngs, unused=True), digits()),
        position=conv_linear,
        source="the MNIST tutorial, whose second convolution's output goes nowhere",
        **labelled("untrained_layer", "no_path", 1),
    ),
    case(
        name="nnx_nan_weight",
        architecture="mlp",
        depth=4,
        make=nnx_make(lambda rngs: MLP(4, rngs, init=he), flat, nan_weight),
        source="one NaN among the weights",
        **labelled("non_finite", "bad_parameter", 2),
    ),
    case(
        name="nnx_sharp_attention",
        architecture="transformer",
        depth=3,
        make=nnx_make(lambda rngs: NanoLM(3, rngs), text(), sharpen(6.0)),
        position=block,
        source="optax/examples/nanolm.ipynb with queries and keys six times too large",
        **labelled("attention_logit_growth", "weights_too_large", 0),
    ),
    case(
        name="nnx_residual_50",
        architecture="resnet",
        depth=50,
        make=nnx_make(lambda rngs: MLP(50, rngs, skip=True, init=he), flat),
        source="x + relu(W x) fifty times, with neither normalisation nor scaling",
        **labelled("residual_growth", "unscaled_residual", 0),
    ),
    case(
        name="nnx_adamw_rate_2",
        architecture="transformer",
        depth=3,
        make=nnx_make(lambda rngs: NanoLM(3, rngs), text(), tx=optax.adamw(2.0)),
        position=block,
        source="optax/examples/nanolm.ipynb with a learning rate 1,000 times too large",
        **labelled("unstable_step_size", "learning_rate"),
    ),
    case(
        name="nnx_clip_at_a_million",
        architecture="transformer",
        depth=2,
        make=nnx_make(
            lambda rngs: NanoLM(2, rngs),
            text(),
            tx=optax.chain(optax.clip_by_global_norm(1e6), adamw),
        ),
        position=block,
        source="optax/examples/nanolm.ipynb with a threshold that no gradient reaches",
        **labelled("clipping_never", "clipping_threshold", severity="mild"),
    ),
)
