"""The cases of Linen's examples: what each follows, what breaks it, and where."""

import functools

import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.linen.initializers import constant, he_normal, normal

from pathologies.case import Case
from pathologies.unseen_data import (
    digits,
    edit,
    labelled,
    linen,
    numbered,
    order,
    row,
    sentiment,
    spirals,
    text,
)
from pathologies.unseen_linen import (
    CNN,
    LSTM,
    MLP,
    VAE,
    ActorCritic,
    Block,
    Decoder,
    ResNet,
    Seq2seq,
    TextClassifier,
    actor_critic,
    copying,
    elbo,
    pairs,
    reconstruction,
    resnet,
    sharper,
    unscaled,
)

momentum, flat = optax.sgd(0.1, momentum=0.9), digits(flat=True)
conv_dense, block = order("Conv_0", "Conv_1", "Dense_0", "Dense_1"), numbered("encoderdecoderblock")
autoencoder = order("encoder_fc1", "decoder_fc1")
case = functools.partial(Case, framework="linen")


def blocks(**options):
    return functools.partial(Block, **options)


def plain_conv(where):
    """The convolution of a network without skips, `conv_init` first."""
    return 0 if "conv_init" in where else None if (i := numbered("Conv")(where)) is None else i + 1


def residual_block(where):
    """The residual block of two convolutions, or the first one for what stands before it."""
    return 0 if "conv_init" in where else None if (i := numbered("Conv")(where)) is None else i // 2


def brightness(outputs, x):
    """The squared error of the images' summed brightness, in the network's own float16."""
    target = (x * 16).sum(axis=-1, keepdims=True).astype(outputs.dtype)
    return ((outputs[:, :1] - target) ** 2).mean()


CASES = (
    case(
        name="flax_mnist_cnn",
        architecture="cnn",
        depth=3,
        make=linen(CNN(), digits(), tx=optax.adam(0.001)),
        position=conv_dense,
        source="flax/examples/mnist's network as optax/examples/adversarial_training.ipynb trains "
        "it: Adam(0.001)",
    ),
    case(
        name="flax_mnist_cnn_trained",
        architecture="cnn",
        depth=3,
        make=linen(CNN(), digits(), tx=optax.adam(0.001), steps=300),
        position=conv_dense,
        source="the same after 300 steps",
    ),
    case(
        name="flax_resnet",
        architecture="resnet",
        depth=4,
        make=resnet(ResNet()),
        position=residual_block,
        source="flax/examples/imagenet: ResNet v1, the last scale of every block 0",
    ),
    case(
        name="flax_resnet_trained",
        architecture="resnet",
        depth=4,
        make=resnet(ResNet(), tx=momentum, steps=100),
        position=residual_block,
        source="optax/examples/cifar10_resnet.ipynb, after 100 steps",
    ),
    case(
        name="flax_lm1b",
        architecture="transformer",
        depth=4,
        make=linen(Decoder(4), text(), tx=optax.adamw(0.0016)),
        position=block,
        source="flax/examples/lm1b: pre-LN, Xavier's weights, AdamW(0.0016)",
    ),
    case(
        name="flax_sst2",
        architecture="lstm",
        depth=20,
        make=linen(TextClassifier(), sentiment(), learning_rate=0.1),
        source="flax/examples/sst2: bidirectional LSTM and attention, SGD(0.1)",
    ),
    case(
        name="flax_seq2seq",
        architecture="lstm",
        depth=7,
        make=linen(Seq2seq(), copying, tx=optax.adam(0.003)),
        source="flax/examples/seq2seq: LSTM encoder and decoder, Adam(0.003)",
    ),
    case(
        name="flax_vae",
        architecture="mlp",
        depth=2,
        make=linen(VAE(), pairs(flat), loss=elbo, tx=optax.adam(0.001)),
        position=autoencoder,
        source="flax/examples/vae: Adam(0.001)",
    ),
    case(
        name="flax_ppo",
        architecture="cnn",
        depth=4,
        make=actor_critic(ActorCritic(), tx=optax.adam(2.5e-4)),
        position=order("conv1", "conv2", "conv3", "hidden"),
        source="flax/examples/ppo: frames of bytes over 255, Adam(0.00025)",
    ),
    case(
        name="linen_stddev_1",
        architecture="mlp",
        depth=10,
        make=linen(MLP(10, kernel_init=normal(1.0)), flat),
        source="nn.Dense(64, kernel_init=normal(1.0)) ten times",
        **labelled("exploding_gradients", "weights_too_large", 9),
    ),
    case(
        name="linen_sigmoid_20",
        architecture="mlp",
        depth=20,
        make=linen(MLP(20, act=nn.sigmoid), flat),
        source="twenty layers of sigmoid with the default weights",
        **labelled("vanishing_gradients", "activation_slope", 19),
    ),
    case(
        name="linen_sigmoid_6",
        architecture="mlp",
        depth=6,
        make=linen(MLP(6, act=nn.sigmoid), flat),
        source="six layers of sigmoid with the default weights",
        **labelled("vanishing_gradients", "activation_slope", 5, "mild"),
    ),
    case(
        name="linen_tanh_bytes",
        architecture="mlp",
        depth=4,
        make=linen(MLP(4, act=nn.tanh), digits(scale=255.0, flat=True)),
        source="pixels of 0 to 255 into tanh",
        **labelled("saturated_units", "input_scale", 0),
    ),
    case(
        name="flax_sst2_embedding_1000",
        architecture="lstm",
        depth=20,
        make=linen(
            TextClassifier(), sentiment(), edit(lambda table: 1000 * table, "Embed_0", "embedding")
        ),
        source="flax/examples/sst2 with embeddings 1,000 times too large: every gate saturates",
        **labelled("saturated_units"),
    ),
    case(
        name="linen_lstm_60_steps",
        architecture="lstm",
        depth=60,
        make=linen(
            LSTM(),
            spirals(length=60),
            loss=lambda z, y: optax.sigmoid_binary_cross_entropy(z, y).mean(),
        ),
        source="nn.LSTMCell, whose forget bias is 0, over 60 steps, read at the last",
        **labelled("vanishing_gradients", None, 59),
    ),
    case(
        name="flax_mnist_dead_conv",
        architecture="cnn",
        depth=3,
        make=linen(CNN(), digits(), edit(lambda bias: bias - 10, "Conv_1", "bias")),
        position=conv_dense,
        source="flax/examples/mnist with biases of -10 in the second convolution",
        **labelled("dead_units", "bias", 1),
    ),
    case(
        name="flax_resnet_no_skip",
        architecture="cnn",
        depth=49,
        make=resnet(ResNet((24,), skip=False)),
        position=plain_conv,
        source="flax/examples/imagenet without its skips, 49 convolutions",
        **labelled("batchnorm_explosion", "batchnorm", 48),
    ),
    case(
        name="flax_resnet_no_norm",
        architecture="resnet",
        depth=24,
        make=resnet(ResNet((24,), norm=False, kernel_init=he_normal())),
        position=residual_block,
        source="flax/examples/imagenet without its BatchNorm, 24 blocks",
        **labelled("residual_growth", "unscaled_residual", 0, "mild"),
    ),
    case(
        name="flax_post_ln_24",
        architecture="transformer",
        depth=24,
        make=linen(Decoder(24, causal=False, scan=True, block=blocks(norm="post")), text(8)),
        position=row,
        source="flax/examples/lm1b's block with LayerNorm after the skip, 24 times, every token "
        "seeing every other",
        **labelled("rank_collapse", None, 0),
    ),
    case(
        name="flax_lm1b_no_skip",
        architecture="transformer",
        depth=8,
        make=linen(Decoder(8, causal=False, block=blocks(skip=False)), text(8)),
        position=block,
        source="flax/examples/lm1b's block without its skips",
        **labelled("rank_collapse", None, 0),
    ),
    case(
        name="flax_lm1b_unscaled_logits",
        architecture="transformer",
        depth=3,
        make=linen(Decoder(3, block=blocks(attention_fn=unscaled)), text(), sharper(2.0, 3)),
        position=block,
        source="flax/examples/lm1b without 1 / sqrt(head_dim), and queries and keys twice too "
        "large",
        **labelled("attention_logit_growth", "attention_scale", 0),
    ),
    case(
        name="linen_constant_init",
        architecture="mlp",
        depth=3,
        make=linen(MLP(3, kernel_init=constant(0.02)), flat),
        source="nn.Dense(64, kernel_init=constant(0.02)) three times",
        **labelled("symmetric_units", "identical_init", 0),
    ),
    case(
        name="flax_mnist_stop_gradient",
        architecture="cnn",
        depth=3,
        make=linen(CNN(stop=True), digits()),
        position=conv_dense,
        source="flax/examples/mnist with a stop_gradient left before its dense layers",
        **labelled("untrained_layer", "no_path", 0),
    ),
    case(
        name="flax_vae_rounded",
        architecture="mlp",
        depth=2,
        make=linen(VAE(hard=True), pairs(flat), loss=reconstruction),
        position=autoencoder,
        source="flax/examples/vae with rounded codes, no straight-through estimator and no KL term",
        **labelled("untrained_layer", "no_path", 0),
    ),
    case(
        name="linen_half_loss",
        architecture="mlp",
        depth=3,
        make=linen(MLP(3, dtype=jnp.float16), pairs(flat), loss=brightness),
        source="a squared error past 65,504 in float16",
        **labelled("non_finite", "overflow"),
    ),
    case(
        name="flax_mnist_rate_100",
        architecture="cnn",
        depth=3,
        make=linen(CNN(), digits(), tx=optax.sgd(100.0, momentum=0.9)),
        position=conv_dense,
        source="flax/examples/mnist with a learning rate 1,000 times too large",
        **labelled("unstable_step_size", "learning_rate"),
    ),
    case(
        name="linen_mlp_rate_30",
        architecture="mlp",
        depth=2,
        make=linen(MLP(2), flat, learning_rate=30.0),
        source="gradient descent at a rate of 30",
        **labelled("unstable_step_size", "learning_rate"),
    ),
    case(
        name="flax_mnist_clip_1e-6",
        architecture="cnn",
        depth=3,
        make=linen(CNN(), digits(), tx=optax.chain(optax.clip_by_global_norm(1e-6), momentum)),
        position=conv_dense,
        source="flax/examples/mnist with gradients clipped at 0.000001",
        **labelled("clipping_always", "clipping_threshold"),
    ),
)
