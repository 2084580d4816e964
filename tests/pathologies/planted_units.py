"""Planted pathologies of units, skips, normalisation and attention: rows of `planted.PLANTED` of
that kind."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gradjax.core.initializers import gaussian, orthogonal
from pathologies import nets_equinox as eqx_
from pathologies import nets_linen as linen
from pathologies import nets_nnx as nnx_
from pathologies import nets_plain as plain
from pathologies.case import Problem
from pathologies.planted_growth import planted, vanishing
from pathologies.problems import GAIN, edit, plus, times


def saturated(cause: str, layer: int | None, severity: str):
    return "saturated_units", cause, layer, severity


def dead(layer: int, severity: str, cause: str | None = "bias"):
    return "dead_units", cause, layer, severity


def batchnorm(layer: int, severity: str):
    return "batchnorm_explosion", "batchnorm", layer, severity


def residual(severity: str):
    return "residual_growth", "unscaled_residual", 0, severity


def collapse(severity: str):
    return "rank_collapse", "averaging", 0, severity


def logits(cause: str, layer: int, severity: str):
    return "attention_logit_growth", cause, layer, severity


critical_tanh = {"act": jnp.tanh, "kernel": orthogonal(1.0)}

SATURATED = (
    # biases of 6 leave a slope of 2.5e-5: the one layer costs 10 nats by itself
    planted(
        "tanh_bias",
        "linen",
        "mlp",
        10,
        linen.mlp,
        saturated("bias", 4, "mild"),
        (4, "bias", plus(6.0)),
        **critical_tanh,
    ),
    planted(
        "tanh_bias_all",
        "nnx",
        "mlp",
        8,
        nnx_.mlp,
        saturated("bias", 0, "severe"),
        (None, "layers.*bias", plus(4.0)),
        **critical_tanh,
    ),
    planted(
        "sigmoid_bias_all",
        "plain",
        "mlp",
        8,
        plain.mlp,
        saturated("bias", 0, "severe"),
        act=jax.nn.sigmoid,
        init=gaussian(4.0),
        bias=8.0,
    ),
    planted(
        "tanh_unnormalized",
        "linen",
        "mlp",
        6,
        linen.mlp,
        saturated("input_scale", 0, "severe"),
        scale=500.0,
        **critical_tanh,
    ),
    planted(
        "tanh_unnormalized",
        "equinox",
        "mlp",
        6,
        eqx_.mlp,
        saturated("input_scale", 0, "severe"),
        act=jnp.tanh,
        init=gaussian(1.0),
        scale=1000.0,
    ),
    planted(
        "tanh_weights",
        "linen",
        "mlp",
        12,
        linen.mlp,
        saturated("weights_too_large", 5, "severe"),
        (5, "kernel", times(300.0)),
        kind=linen.SetupMLP,
        **critical_tanh,
    ),
    planted(
        "tanh_cnn_bias",
        "nnx",
        "cnn",
        8,
        nnx_.cnn,
        saturated("bias", 3, "mild"),
        (3, "bias", plus(-7.0)),
        act=jnp.tanh,
        kernel=gaussian(1.2),
    ),
    planted(
        "rnn_inputs",
        "plain",
        "rnn",
        20,
        plain.rnn,
        saturated("input_scale", None, "severe"),
        inputs=30.0,
    ),
)


def _bad_step(seed: int, depth: int, learning_rate: float) -> Problem:
    """One step of gradient descent, far too long, after which no unit is on for any example.

    Pixels are not centred and read-out weights have one sign, so that a target far below moves
    every unit down at once.
    """
    p = edit(linen.mlp(seed, depth), None, "readout.*kernel", jnp.abs)
    p = p._replace(args=(p.args[0] - p.args[0].min(), p.args[1]))
    model = linen.MLP(depth, 64)
    loss_fn = lambda params, x, y: (
        0.5 * ((model.apply({"params": params}, x).mean(-1) + 10.0) ** 2).mean()
    )
    grads = jax.grad(loss_fn)(p.params, *p.args)
    return Problem(
        loss_fn,
        jax.tree.map(lambda x, g: x - jnp.float32(learning_rate) * g, p.params, grads),
        p.args,
    )


DEAD = (
    planted(
        "relu_bad_step", "linen", "mlp", 1, _bad_step, dead(0, "severe", None), learning_rate=1.0
    ),
    planted(
        "relu_bias", "linen", "mlp", 10, linen.mlp, dead(4, "severe"), (4, "bias", plus(-30.0))
    ),
    planted(
        "relu_bias_setup",
        "linen",
        "mlp",
        20,
        linen.mlp,
        dead(13, "severe"),
        (13, "bias", plus(-30.0)),
        kind=linen.SetupMLP,
    ),
    planted("relu_bias", "nnx", "mlp", 6, nnx_.mlp, dead(0, "severe"), (0, "bias", plus(-30.0))),
    planted(
        "relu_bias_scan", "plain", "mlp", 16, plain.mlp, dead(8, "severe"), (8, "'b'", plus(-30.0))
    ),
    planted(
        "relu_bias", "equinox", "cnn", 6, eqx_.cnn, dead(3, "severe"), (3, "bias", plus(-30.0))
    ),
    planted(
        "relu_bias_half",
        "linen",
        "mlp",
        8,
        linen.mlp,
        dead(3, "mild"),
        (3, "bias", lambda b: b.at[: len(b) * 7 // 8].add(-30.0)),
    ),
)

BATCHNORM = (
    planted(
        "batchnorm_relu_50",
        "linen",
        "mlp",
        50,
        linen.mlp,
        batchnorm(49, "mild"),
        norm="batch",
        batch=64,
    ),
    planted(
        "batchnorm_relu_100",
        "linen",
        "mlp",
        100,
        linen.mlp,
        batchnorm(99, "severe"),
        norm="batch",
        kind=linen.SetupMLP,
    ),
    planted(
        "batchnorm_relu_scan_200",
        "linen",
        "mlp",
        200,
        linen.mlp,
        batchnorm(199, "severe"),
        norm="batch",
        kind=linen.StackedMLP,
    ),
    planted("batchnorm_relu_60", "nnx", "mlp", 60, nnx_.mlp, batchnorm(59, "severe"), norm="batch"),
    planted(
        "batchnorm_conv_50", "linen", "cnn", 50, linen.cnn, batchnorm(49, "mild"), norm="batch"
    ),
    planted(
        "batchnorm_tanh_80",
        "linen",
        "mlp",
        80,
        linen.mlp,
        batchnorm(79, "mild"),
        norm="batch",
        act=jnp.tanh,
        kernel=gaussian(1.0),
    ),
)

RESIDUAL = (
    planted(
        "dense",
        "linen",
        "resnet",
        40,
        linen.cnn,
        residual("severe"),
        kind=linen.ResNet,
        space=(),
        norm="",
        width=64,
    ),
    planted("conv", "linen", "resnet", 30, linen.cnn, residual("mild"), kind=linen.ResNet, norm=""),
    planted("dense", "nnx", "resnet", 50, nnx_.resnet, residual("severe")),
    planted("dense", "equinox", "resnet", 20, eqx_.resnet, residual("mild"), second=gaussian(GAIN)),
    planted("scan", "plain", "resnet", 100, plain.resnet, residual("severe")),
    planted(
        "remat_scan",
        "linen",
        "resnet",
        40,
        linen.mlp,
        residual("severe"),
        kind=linen.StackedMLP,
        residual=True,
        remat=True,
    ),
    planted(
        "no_norm", "plain", "transformer", 12, plain.transformer, residual("mild"), wiring="nonorm"
    ),
)

ATTENTION = (
    planted(
        "no_skips",
        "linen",
        "transformer",
        12,
        linen.transformer,
        collapse("severe"),
        wiring="noskip",
    ),
    planted(
        "no_skips", "nnx", "transformer", 8, nnx_.transformer, collapse("severe"), wiring="noskip"
    ),
    # Equinox's own weights are sqrt(3) too small to keep the values' size
    planted(
        "no_skips",
        "equinox",
        "transformer",
        10,
        eqx_.transformer,
        collapse("severe"),
        (None, "attn.*weight", times(3**0.5)),
        wiring="noskip",
    ),
    planted(
        "no_skips",
        "plain",
        "transformer",
        24,
        plain.transformer,
        collapse("severe"),
        wiring="noskip",
    ),
    planted(
        "no_skips_mlp",
        "plain",
        "transformer",
        12,
        plain.transformer,
        collapse("severe"),
        wiring="noskip_mlp",
    ),
    planted(
        "logits_gain",
        "linen",
        "transformer",
        4,
        linen.transformer,
        logits("weights_too_large", 0, "severe"),
        (None, "(query|key).*kernel", times(8.0)),
    ),
    planted(
        "logits_one_block",
        "linen",
        "transformer",
        6,
        linen.transformer,
        logits("weights_too_large", 3, "severe"),
        (3, "(query|key).*kernel", times(10.0)),
    ),
    planted(
        "logits_unscaled",
        "equinox",
        "transformer",
        4,
        eqx_.transformer,
        logits("attention_scale", 0, "severe"),
        sharpen=100.0,
    ),
    planted(
        "logits_unscaled",
        "plain",
        "transformer",
        6,
        plain.transformer,
        logits("attention_scale", 0, "severe"),
        temperature=0.05,
    ),
)

# the skips of a deep post-LN network do not help its tokens: their mean cosine reaches 1, while the
# cotangent of the blocks' outputs keeps its size (G = +0.4)
DEEP_POST_LN = planted(
    "post_ln_48",
    "linen",
    "transformer",
    48,
    linen.transformer,
    ("rank_collapse", None, 0, "severe"),
    wiring="post",
)

# LN(h + f(h)) divides by what f adds to the forward pass and gives the gradient only f's slope;
# with the norm inside the branch, h + f(LN h), the same networks keep their gradients (|G| < 2,
# measured)
POST_LN = (
    DEEP_POST_LN,
    planted(
        "post_ln_sigmoid",
        "linen",
        "transformer",
        40,
        linen.transformer,
        vanishing("layernorm_placement", 39, "severe"),
        wiring="post",
        act=nn.sigmoid,
        out=gaussian(3.0),
    ),
    planted(
        "post_ln_softplus",
        "linen",
        "transformer",
        30,
        linen.transformer,
        vanishing("layernorm_placement", 29, "mild"),
        wiring="post",
        act=nn.softplus,
        out=gaussian(1.5),
    ),
    planted(
        "post_ln_sigmoid",
        "equinox",
        "resnet",
        50,
        eqx_.resnet,
        vanishing("layernorm_placement", 49, "severe"),
        act=jax.nn.sigmoid,
        second=gaussian(2.0),
        norm="post",
    ),
)
