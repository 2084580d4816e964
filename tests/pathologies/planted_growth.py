"""Planted growth and decay of gradients, over depth and over time: the rows of `planted.PLANTED` of
that kind.

G in a comment is the change of log rms of the cotangent from the last hidden value to the first, in
nats, measured."""

from collections.abc import Callable
from functools import reduce
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gradjax.core.initializers import gaussian, orthogonal
from pathologies import nets_equinox, nets_linen, nets_nnx, nets_plain
from pathologies.case import Case, last_integer
from pathologies.problems import GAIN, edit, times

LINEAR = lambda z: z
leaky = lambda z: jax.nn.leaky_relu(z, 0.2)


def planted(
    name: str,
    framework: str,
    architecture: str,
    depth: int,
    build: Callable[..., Any],
    label: tuple[str, str | None, int | None, str],
    *edits: tuple,
    position: Callable = last_integer,
    **fields: Any,
) -> Case:
    """The case whose problem is `build(seed, depth, **fields)` after the edits (layer, leaf,
    change)."""
    make = lambda seed: reduce(lambda p, e: edit(p, *e), edits, build(seed, depth, **fields))
    return Case(name, framework, architecture, depth, make, *label, position)


def exploding(cause: str, layer: int, severity: str):
    return "exploding_gradients", cause, layer, severity


def vanishing(cause: str | None, layer: int, severity: str):
    return "vanishing_gradients", cause, layer, severity


LARGE, SMALL = "weights_too_large", "weights_too_small"
linen, nnx_, eqx_, plain = nets_linen, nets_nnx, nets_equinox, nets_plain

EXPLODING = (
    planted(
        "relu_gain",
        "linen",
        "mlp",
        50,
        linen.mlp,
        exploding(LARGE, 49, "severe"),
        kernel=gaussian(1.5 * GAIN),
    ),
    planted(
        "relu_gain_mild",
        "linen",
        "mlp",
        30,
        linen.mlp,
        exploding(LARGE, 29, "mild"),
        kernel=gaussian(1.42 * GAIN),
    ),
    planted(
        "linear_orthogonal_1.25",
        "linen",
        "mlp",
        50,
        linen.mlp,
        exploding(LARGE, 49, "mild"),
        kind=linen.SetupMLP,
        act=LINEAR,
        kernel=orthogonal(1.25),
    ),
    planted(
        "relu_scan_200",
        "linen",
        "mlp",
        200,
        linen.mlp,
        exploding(LARGE, 199, "severe"),
        kind=linen.StackedMLP,
        kernel=gaussian(1.25 * GAIN),
    ),
    planted(
        "tanh_chaos_remat",
        "linen",
        "mlp",
        60,
        linen.mlp,
        exploding(LARGE, 59, "severe"),
        kind=linen.RematMLP,
        act=jnp.tanh,
        kernel=gaussian(2.5),
    ),
    planted(
        "relu_one_layer",
        "nnx",
        "mlp",
        20,
        nnx_.mlp,
        exploding(LARGE, 9, "mild"),
        (9, "kernel", times(2e4)),
    ),
    planted(
        "leaky_gain",
        "equinox",
        "mlp",
        40,
        eqx_.mlp,
        exploding(LARGE, 39, "severe"),
        act=leaky,
        init=gaussian(2.1),
    ),
    planted(
        "relu_scan_taps",
        "plain",
        "mlp",
        100,
        plain.mlp,
        exploding(LARGE, 99, "severe"),
        init=gaussian(1.4 * GAIN),
    ),
    planted(
        "linear_one_layer_taps",
        "plain",
        "mlp",
        30,
        plain.mlp,
        exploding(LARGE, 17, "mild"),
        (17, "w", times(1e5)),
        act=LINEAR,
        init=orthogonal(1.0),
        scan=False,
    ),
    planted(
        "conv_gain",
        "linen",
        "cnn",
        20,
        linen.cnn,
        exploding(LARGE, 19, "mild"),
        kernel=gaussian(1.9 * GAIN),
    ),
    planted(
        "conv_gain",
        "nnx",
        "cnn",
        40,
        nnx_.cnn,
        exploding(LARGE, 39, "severe"),
        kernel=gaussian(1.6 * GAIN),
    ),
    planted(
        "conv_one_layer",
        "equinox",
        "cnn",
        12,
        eqx_.cnn,
        exploding(LARGE, 5, "mild"),
        (5, "weight", times(3e4)),
    ),
    planted(
        "rnn_gain",
        "plain",
        "rnn",
        50,
        plain.rnn,
        exploding(LARGE, 49, "severe"),
        act=LINEAR,
        init=orthogonal(1.3),
    ),
    planted(
        "rnn_relu_gain",
        "linen",
        "rnn",
        30,
        linen.rnn,
        exploding(LARGE, 29, "severe"),
        cell=nn.SimpleCell(32, activation_fn=nn.relu, recurrent_kernel_init=gaussian(1.6 * GAIN)),
    ),
)

VANISHING = (
    planted(
        "relu_small",
        "linen",
        "mlp",
        30,
        linen.mlp,
        vanishing(SMALL, 29, "mild"),
        kernel=gaussian(0.7 * GAIN),
    ),
    planted(
        "relu_small",
        "nnx",
        "mlp",
        50,
        nnx_.mlp,
        vanishing(SMALL, 49, "severe"),
        kernel=gaussian(0.6 * GAIN),
    ),
    planted(
        "default_init", "equinox", "mlp", 20, eqx_.mlp, vanishing(SMALL, 19, "severe"), init=None
    ),
    planted(
        "relu_scan_small_200",
        "linen",
        "mlp",
        200,
        linen.mlp,
        vanishing(SMALL, 199, "severe"),
        kind=linen.StackedMLP,
        remat=True,
        kernel=gaussian(0.8 * GAIN),
    ),
    planted(
        "tanh_small",
        "plain",
        "mlp",
        60,
        plain.mlp,
        vanishing(SMALL, 59, "mild"),
        act=jnp.tanh,
        init=gaussian(0.8),
    ),
    planted(
        "relu_one_layer_small",
        "linen",
        "mlp",
        20,
        linen.mlp,
        vanishing(SMALL, 12, "mild"),
        (12, "kernel", times(3e-5)),
    ),
    planted(
        "linear_one_layer_small",
        "plain",
        "mlp",
        50,
        plain.mlp,
        vanishing(SMALL, 20, "mild"),
        (20, "w", times(1e-5)),
        act=LINEAR,
        init=orthogonal(1.0),
    ),
    planted(
        "sigmoid_xavier",
        "linen",
        "mlp",
        12,
        linen.mlp,
        vanishing("activation_slope", 11, "severe"),
        act=nn.sigmoid,
        kernel=nn.initializers.xavier_normal(),
    ),
    planted(
        "sigmoid",
        "equinox",
        "mlp",
        10,
        eqx_.mlp,
        vanishing("activation_slope", 9, "mild"),
        act=jax.nn.sigmoid,
        init=gaussian(1.2),
    ),
    planted(
        "sigmoid_scan",
        "plain",
        "mlp",
        40,
        plain.mlp,
        vanishing("activation_slope", 39, "severe"),
        act=jax.nn.sigmoid,
        init=gaussian(1.5),
    ),
    planted(
        "conv_small",
        "linen",
        "cnn",
        20,
        linen.cnn,
        vanishing(SMALL, 19, "mild"),
        kernel=gaussian(0.6 * GAIN),
    ),
    planted(
        "conv_sigmoid",
        "nnx",
        "cnn",
        10,
        nnx_.cnn,
        vanishing("activation_slope", 9, "severe"),
        act=jax.nn.sigmoid,
    ),
    planted(
        "rnn_small",
        "plain",
        "rnn",
        30,
        plain.rnn,
        vanishing(SMALL, 29, "severe"),
        init=orthogonal(0.6),
    ),
    planted(
        "rnn_sigmoid",
        "linen",
        "rnn",
        20,
        linen.rnn,
        vanishing("activation_slope", 19, "severe"),
        cell=nn.SimpleCell(32, activation_fn=nn.sigmoid),
    ),
)
