"""Healthy networks after some steps of training, and with the optimiser that trains them."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradjax import transforms
from gradjax.core.initializers import orthogonal
from pathologies import healthy_start as start
from pathologies import nets_equinox as eqx_
from pathologies import nets_linen as linen
from pathologies import nets_nnx as nnx_
from pathologies import nets_plain as plain
from pathologies.case import Case, Problem
from pathologies.healthy_start import HE_, SAXE, healthy
from pathologies.problems import digits, edit, filled, sequences, train, with_options

adam, sgd = optax.adam, optax.sgd
momentum = lambda lr: optax.sgd(lr, momentum=0.9)


def _train(
    seed: int,
    depth: int,
    net: Callable,
    tx: Callable,
    rate: float,
    steps: int,
    data: str = "digits",
    edits: tuple = (),
    **fields: Any,
) -> Problem:
    """`net` after `steps` of tx(rate) on batches of 512 examples, with what goes on from there in
    its options."""
    p = net(seed, depth, **fields)
    for e in edits:
        p = edit(p, *e)
    load = {
        "digits": lambda: digits(seed, 512),
        "images": lambda: digits(seed, 512, image=True),
        "sequences": lambda: sequences(seed, depth, 512, scale=fields.get("scale", 1.0)),
    }[data]
    params, state = train(p, tx(rate), steps, load())
    return with_options(p._replace(params=params), tx=tx(rate), opt_state=state, learning_rate=rate)


def _options(
    seed: int, depth: int, net: Callable, rate: float, tx: Callable, **fields: Any
) -> Problem:
    return with_options(net(seed, depth, **fields), tx=tx(rate), learning_rate=rate)


def _history(seed: int, depth: int, net: Callable) -> Problem:
    """A noisy loss that falls and never jumps."""
    rng, steps = np.random.default_rng(seed), np.arange(600)
    loss = (0.3 + 2.0 * np.exp(-steps / 100)) * np.exp(0.05 * rng.standard_normal(600))
    return with_options(net(seed, depth), history={"loss": loss.astype(np.float32)})


def _clipped(max_norm: float) -> Callable:
    return lambda rate: optax.chain(transforms.clip_by_global_norm(max_norm), optax.adam(rate))


def after(name, framework, architecture, depth, net, source, tx, rate, steps, **fields) -> Case:
    """A case trained by `_train`."""
    name = f"{name}_after_{steps}"
    return healthy(
        name,
        framework,
        architecture,
        depth,
        _train,
        source,
        net=net,
        tx=tx,
        rate=rate,
        steps=steps,
        **fields,
    )


KINGMA = "Kingma, Ba 2014, arXiv 1412.6980: Adam at 1e-3"
open_gates = ((None, "hf.*bias", filled(3.0)),)

TRAINED = (
    after("he_relu_5", "linen", "mlp", 5, linen.mlp, KINGMA, adam, 1e-3, 200),
    after(
        "he_relu_10",
        "linen",
        "mlp",
        10,
        linen.mlp,
        HE_,
        sgd,
        0.02,
        300,
        width=128,
        kind=linen.SetupMLP,
    ),
    after(
        "he_relu_20_scan",
        "linen",
        "mlp",
        20,
        linen.mlp,
        HE_,
        adam,
        3e-4,
        200,
        width=128,
        kind=linen.StackedMLP,
    ),
    after(
        "critical_tanh_10",
        "linen",
        "mlp",
        10,
        linen.mlp,
        start.CRITICAL,
        momentum,
        0.01,
        200,
        width=128,
        **start.critical,
    ),
    after(
        "xavier_tanh_4",
        "nnx",
        "mlp",
        4,
        nnx_.mlp,
        start.XAVIER,
        adam,
        1e-3,
        150,
        act=jnp.tanh,
        kernel=nn.initializers.xavier_normal(),
    ),
    after("he_relu_8", "equinox", "mlp", 8, eqx_.mlp, HE_, adam, 1e-3, 150),
    after("he_relu_10", "plain", "mlp", 10, plain.mlp, HE_, momentum, 0.005, 200),
    after(
        "orthogonal_linear_20",
        "plain",
        "mlp",
        20,
        plain.mlp,
        SAXE,
        sgd,
        0.005,
        200,
        act=lambda z: z,
        init=orthogonal(1.0),
    ),
    after(
        "gelu_layernorm_6",
        "equinox",
        "mlp",
        6,
        eqx_.mlp,
        "Ba et al. 2016, arXiv 1607.06450",
        adam,
        1e-3,
        150,
        act=jax.nn.gelu,
        norm="layer",
    ),
    after(
        "batchnorm_relu_5",
        "linen",
        "mlp",
        5,
        linen.mlp,
        "Ioffe, Szegedy 2015, arXiv 1502.03167",
        adam,
        1e-3,
        200,
        norm="batch",
    ),
    after(
        "dropout_relu_4",
        "linen",
        "mlp",
        4,
        linen.mlp,
        "Srivastava et al. 2014, JMLR 15",
        adam,
        1e-3,
        200,
        dropout=0.2,
    ),
    after(
        "lenet5",
        "linen",
        "cnn",
        4,
        linen.cnn,
        start.LECUN,
        adam,
        2e-3,
        300,
        data="images",
        kind=linen.LeNet,
    ),
    after("lenet5", "equinox", "cnn", 4, eqx_.lenet, start.LECUN, adam, 2e-3, 200, data="images"),
    after("he_conv_4", "nnx", "cnn", 4, nnx_.cnn, HE_, adam, 1e-3, 60, data="images"),
    after(
        "resnet_4",
        "linen",
        "resnet",
        4,
        linen.cnn,
        "He et al. 2016, arXiv 1603.05027",
        adam,
        1e-3,
        40,
        data="images",
        kind=linen.ResNet,
    ),
    after(
        "rezero_12",
        "nnx",
        "resnet",
        12,
        nnx_.resnet,
        "Bachlechner et al. 2020, arXiv 2003.04887",
        adam,
        1e-3,
        150,
        scale=0.0,
    ),
    after(
        "pre_ln_4",
        "linen",
        "transformer",
        4,
        linen.transformer,
        "Xiong et al. 2020, arXiv 2002.04745",
        adam,
        1e-3,
        150,
    ),
    after(
        "pre_ln_3",
        "nnx",
        "transformer",
        3,
        nnx_.transformer,
        "Xiong et al. 2020, arXiv 2002.04745",
        adam,
        1e-3,
        100,
    ),
    after(
        "pre_ln_scan_6",
        "plain",
        "transformer",
        6,
        plain.transformer,
        "Xiong et al. 2020, arXiv 2002.04745",
        adam,
        1e-3,
        150,
    ),
    after(
        "lstm_20",
        "linen",
        "lstm",
        20,
        linen.rnn,
        start.OPEN,
        adam,
        2e-3,
        200,
        data="sequences",
        edits=open_gates,
        cell=nn.OptimizedLSTMCell(32),
    ),
    after(
        "lstm_20",
        "equinox",
        "lstm",
        20,
        eqx_.rnn,
        start.CHRONO,
        adam,
        2e-3,
        150,
        data="sequences",
        cell=eqx.nn.LSTMCell,
        bias=3.0,
    ),
    after(
        "orthogonal_tanh_20",
        "plain",
        "rnn",
        20,
        plain.rnn,
        "Henaff et al. 2016, arXiv 1602.06662",
        adam,
        5e-4,
        200,
        data="sequences",
        inputs=0.1,
    ),
)

OPTIMIZED = (
    healthy("sgd_rate", "linen", "mlp", 4, _options, HE_, net=linen.mlp, rate=0.02, tx=sgd),
    healthy("adam_rate", "equinox", "mlp", 5, _options, KINGMA, net=eqx_.mlp, rate=1e-3, tx=adam),
    healthy(
        "clipped_adam",
        "plain",
        "transformer",
        4,
        _options,
        "max_norm 1: Brown et al. 2020, arXiv 2005.14165",
        net=plain.transformer,
        rate=1e-3,
        tx=_clipped(1.0),
    ),
    healthy("falling_loss", "linen", "mlp", 4, _history, HE_, net=linen.mlp),
)
