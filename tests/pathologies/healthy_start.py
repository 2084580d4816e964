"""Healthy networks at initialisation: published set-ups, as they are published."""

from collections.abc import Callable
from functools import reduce
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp

from gradjax.core.initializers import bias, gaussian, orthogonal
from pathologies import nets_equinox as eqx_
from pathologies import nets_linen as linen
from pathologies import nets_nnx as nnx_
from pathologies import nets_plain as plain
from pathologies.case import Case
from pathologies.problems import edit, filled


def healthy(
    name: str,
    framework: str,
    architecture: str,
    depth: int,
    build: Callable[..., Any],
    source: str,
    *edits: tuple,
    **fields: Any,
) -> Case:
    """The case whose problem is `build(seed, depth, **fields)` after the edits (layer, leaf,
    change)."""
    make = lambda seed: reduce(lambda p, e: edit(p, *e), edits, build(seed, depth, **fields))
    return Case(name, framework, architecture, depth, make, source=source)


HE_ = "He et al. 2015, arXiv 1502.01852"
CRITICAL = "Schoenholz et al. 2016, arXiv 1611.01232: sigma_w^2 = 1.76, sigma_b^2 = 0.05"
XAVIER = "Glorot, Bengio 2010, AISTATS"
SAXE = "Saxe et al. 2013, arXiv 1312.6120"
LECUN = "LeCun et al. 1998, Gradient-based learning applied to document recognition"
critical = {"act": jnp.tanh, "kernel": gaussian(1.76**0.5), "bias": bias(0.05**0.5)}
identity = lambda key, shape, dtype=jnp.float32: jnp.eye(shape[0], dtype=dtype)
orthogonal_tanh = {"act": jnp.tanh, "kernel": orthogonal(1.0)}

MLPS = (
    healthy("he_relu_10", "linen", "mlp", 10, linen.mlp, HE_, width=128),
    healthy("he_relu_30", "linen", "mlp", 30, linen.mlp, HE_, width=128, kind=linen.SetupMLP),
    healthy("he_relu_50", "linen", "mlp", 50, linen.mlp, HE_, width=256, kind=linen.StackedMLP),
    healthy("he_relu_remat_20", "linen", "mlp", 20, linen.mlp, HE_, width=128, kind=linen.RematMLP),
    healthy("he_relu_10", "nnx", "mlp", 10, nnx_.mlp, HE_, width=128),
    healthy("he_relu_30", "equinox", "mlp", 30, eqx_.mlp, HE_, width=128),
    healthy("he_relu_50", "plain", "mlp", 50, plain.mlp, HE_, width=128),
    healthy("he_relu_loop_20", "plain", "mlp", 20, plain.mlp, HE_, width=100, scan=False),
    healthy("critical_tanh_30", "linen", "mlp", 30, linen.mlp, CRITICAL, width=128, **critical),
    healthy("critical_tanh_20", "nnx", "mlp", 20, nnx_.mlp, CRITICAL, width=100, **critical),
    healthy(
        "xavier_tanh_5",
        "linen",
        "mlp",
        5,
        linen.mlp,
        XAVIER,
        act=nn.tanh,
        kernel=nn.initializers.xavier_normal(),
    ),
    healthy(
        "xavier_tanh_5",
        "equinox",
        "mlp",
        5,
        eqx_.mlp,
        XAVIER,
        act=jnp.tanh,
        init=jax.nn.initializers.xavier_uniform(),
    ),
    healthy(
        "orthogonal_tanh_50",
        "linen",
        "mlp",
        50,
        linen.mlp,
        SAXE,
        kind=linen.StackedMLP,
        **orthogonal_tanh,
    ),
    healthy(
        "orthogonal_linear_100",
        "plain",
        "mlp",
        100,
        plain.mlp,
        SAXE,
        act=lambda z: z,
        init=orthogonal(1.0),
    ),
    healthy(
        "selu_20",
        "linen",
        "mlp",
        20,
        linen.mlp,
        "Klambauer et al. 2017, arXiv 1706.02515",
        act=nn.selu,
        kernel=nn.initializers.lecun_normal(),
        width=128,
    ),
    healthy(
        "gelu_layernorm_12",
        "linen",
        "mlp",
        12,
        linen.mlp,
        "Ba et al. 2016, arXiv 1607.06450",
        act=nn.gelu,
        norm="layer",
        width=128,
    ),
    healthy(
        "gelu_layernorm_8",
        "equinox",
        "mlp",
        8,
        eqx_.mlp,
        "Ba et al. 2016, arXiv 1607.06450",
        act=jax.nn.gelu,
        norm="layer",
    ),
    healthy(
        "dropout_relu_6",
        "linen",
        "mlp",
        6,
        linen.mlp,
        "Srivastava et al. 2014, JMLR 15",
        dropout=0.3,
        width=128,
    ),
    healthy(
        "batchnorm_relu_6",
        "linen",
        "mlp",
        6,
        linen.mlp,
        "Ioffe, Szegedy 2015, arXiv 1502.03167",
        norm="batch",
    ),
    healthy(
        "batchnorm_relu_8",
        "nnx",
        "mlp",
        8,
        nnx_.mlp,
        "Ioffe, Szegedy 2015, arXiv 1502.03167",
        norm="batch",
    ),
    healthy(
        "flax_default_relu_3",
        "linen",
        "mlp",
        3,
        linen.mlp,
        "Flax's default",
        kernel=nn.initializers.lecun_normal(),
    ),
    healthy(
        "equinox_default_relu_3", "equinox", "mlp", 3, eqx_.mlp, "Equinox's default", init=None
    ),
)

IMAGES = (
    healthy("lenet5", "linen", "cnn", 4, linen.cnn, LECUN, kind=linen.LeNet),
    healthy("lenet5_relu", "linen", "cnn", 4, linen.cnn, LECUN, kind=linen.LeNet, act=nn.relu),
    healthy("lenet5", "nnx", "cnn", 4, nnx_.lenet, LECUN),
    healthy("lenet5", "equinox", "cnn", 4, eqx_.lenet, LECUN),
    healthy(
        "vgg",
        "linen",
        "cnn",
        7,
        linen.cnn,
        "Simonyan, Zisserman 2014, arXiv 1409.1556",
        kind=linen.VGG,
    ),
    healthy("he_conv_12", "nnx", "cnn", 12, nnx_.cnn, HE_, width=32),
    healthy(
        "delta_orthogonal_20",
        "linen",
        "cnn",
        20,
        linen.cnn,
        "Xiao et al. 2018, arXiv 1806.05393",
        act=nn.tanh,
        kernel=nn.initializers.delta_orthogonal(),
        width=32,
    ),
    healthy(
        "resnet18_narrow",
        "linen",
        "resnet",
        8,
        linen.cnn,
        "He et al. 2016, arXiv 1603.05027",
        kind=linen.ResNet,
    ),
    healthy(
        "fixup_20",
        "linen",
        "resnet",
        20,
        linen.cnn,
        "Zhang et al. 2019, arXiv 1901.09321",
        kind=linen.ResNet,
        norm="",
        kernel=gaussian(2**0.5 * 20**-0.5),
        last=nn.initializers.zeros,
    ),
    healthy(
        "skipinit_30",
        "linen",
        "resnet",
        30,
        linen.cnn,
        "De, Smith 2020, arXiv 2002.10444",
        kind=linen.ResNet,
        norm="",
        scale=0.0,
    ),
    healthy(
        "rezero_40",
        "nnx",
        "resnet",
        40,
        nnx_.resnet,
        "Bachlechner et al. 2020, arXiv 2003.04887",
        scale=0.0,
    ),
    healthy(
        "scaled_residual_50",
        "plain",
        "resnet",
        50,
        plain.resnet,
        "Hayou et al. 2021, arXiv 2010.12859",
        gain=50**-0.5,
    ),
    healthy(
        "zero_last_30",
        "equinox",
        "resnet",
        30,
        eqx_.resnet,
        "Goyal et al. 2017, arXiv 1706.02677: zero gamma",
        second=jax.nn.initializers.zeros,
    ),
)

CHRONO = "Tallec, Ollivier 2018, arXiv 1804.11188: gate biases log(U[1, T - 1])"
OPEN = "Jozefowicz et al. 2015, ICML: a large positive bias of the forget gate"

SEQUENCES = (
    healthy(
        "lstm_30",
        "linen",
        "lstm",
        30,
        linen.rnn,
        OPEN,
        (None, "hf.*bias", filled(3.0)),
        cell=nn.OptimizedLSTMCell(32),
    ),
    healthy(
        "lstm_20",
        "linen",
        "lstm",
        20,
        linen.rnn,
        OPEN,
        (None, "hf.*bias", filled(2.0)),
        cell=nn.LSTMCell(32),
    ),
    healthy(
        "gru_30",
        "linen",
        "rnn",
        30,
        linen.rnn,
        CHRONO,
        (None, "iz.*bias", filled(3.0)),
        cell=nn.GRUCell(32),
    ),
    healthy("lstm_40", "equinox", "lstm", 40, eqx_.rnn, CHRONO, cell=eqx.nn.LSTMCell, bias=3.5),
    healthy("orthogonal_50", "plain", "rnn", 50, plain.rnn, SAXE, act=lambda z: z),
    healthy(
        "irnn_20",
        "plain",
        "rnn",
        20,
        plain.rnn,
        "Le et al. 2015, arXiv 1504.00941",
        act=jax.nn.relu,
        init=identity,
        inputs=0.1,
    ),
    healthy(
        "irnn_20",
        "linen",
        "rnn",
        20,
        linen.rnn,
        "Le et al. 2015, arXiv 1504.00941",
        cell=nn.SimpleCell(32, activation_fn=nn.relu, recurrent_kernel_init=identity),
    ),
    healthy(
        "orthogonal_tanh_20",
        "plain",
        "rnn",
        20,
        plain.rnn,
        "Henaff et al. 2016, arXiv 1602.06662",
        inputs=0.1,
    ),
)

TRANSFORMERS = (
    healthy(
        "pre_ln_6",
        "linen",
        "transformer",
        6,
        linen.transformer,
        "Xiong et al. 2020, arXiv 2002.04745",
    ),
    healthy(
        "pre_ln_12",
        "linen",
        "transformer",
        12,
        linen.transformer,
        "Xiong et al. 2020, arXiv 2002.04745",
    ),
    healthy(
        "pre_ln_6", "nnx", "transformer", 6, nnx_.transformer, "Xiong et al. 2020, arXiv 2002.04745"
    ),
    healthy(
        "pre_ln_4",
        "equinox",
        "transformer",
        4,
        eqx_.transformer,
        "Xiong et al. 2020, arXiv 2002.04745",
    ),
    healthy(
        "pre_ln_scan_12",
        "plain",
        "transformer",
        12,
        plain.transformer,
        "Xiong et al. 2020, arXiv 2002.04745",
    ),
    healthy(
        "post_ln_2",
        "linen",
        "transformer",
        2,
        linen.transformer,
        "Vaswani et al. 2017, arXiv 1706.03762",
        wiring="post",
    ),
    healthy(
        "post_ln_6",
        "linen",
        "transformer",
        6,
        linen.transformer,
        "Vaswani et al. 2017, arXiv 1706.03762",
        wiring="post",
    ),
    healthy(
        "deepnorm_24",
        "linen",
        "transformer",
        24,
        linen.transformer,
        "Wang et al. 2022, arXiv 2203.00555",
        wiring="post",
        alpha=(2 * 24) ** 0.25,
        out=nn.initializers.variance_scaling((8 * 24) ** -0.5, "fan_avg", "uniform"),
    ),
)
