"""Planted pathologies of numbers, data, paths, initial values and optimisers: the rest of
`planted.PLANTED`."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradjax
from gradjax import transforms
from gradjax.core.initializers import gaussian, orthogonal
from pathologies import nets_equinox as eqx_
from pathologies import nets_linen as linen
from pathologies import nets_nnx as nnx_
from pathologies import nets_plain as plain
from pathologies.case import Problem
from pathologies.planted_growth import LINEAR, planted, vanishing
from pathologies.problems import GAIN, filled, low_rank, sharpness, train, with_options

LARGE = "weights_too_large"


def overflow(cause: str, layer: int):
    return "exploding_activations", cause, layer, "severe"


# the layer that overflows first, at seed 0; with random ReLU weights other seeds move it by up to
# three layers
RANGE = (
    planted(
        "linear_overflow",
        "linen",
        "mlp",
        200,
        linen.mlp,
        overflow(LARGE, 110),
        kind=linen.StackedMLP,
        act=LINEAR,
        kernel=orthogonal(2.2),
    ),
    planted(
        "relu_overflow", "nnx", "mlp", 120, nnx_.mlp, overflow(LARGE, 80), kernel=gaussian(3 * GAIN)
    ),
    planted(
        "relu_overflow",
        "plain",
        "mlp",
        100,
        plain.mlp,
        overflow(LARGE, 64),
        init=gaussian(4 * GAIN),
    ),
    planted(
        "rnn_overflow",
        "plain",
        "rnn",
        150,
        plain.rnn,
        overflow(LARGE, 126),
        act=LINEAR,
        init=orthogonal(2.0),
    ),
    planted(
        "relu_float16",
        "linen",
        "mlp",
        40,
        linen.mlp,
        overflow("float_range", 24),
        kernel=gaussian(1.5 * GAIN),
        dtype=jnp.float16,
    ),
    planted(
        "tiny_inputs",
        "linen",
        "mlp",
        10,
        linen.mlp,
        ("vanishing_activations", "input_scale", 0, "severe"),
        scale=1e-8,
    ),
    planted(
        "tiny_inputs",
        "equinox",
        "mlp",
        8,
        eqx_.mlp,
        ("vanishing_activations", "input_scale", 0, "severe"),
        scale=1e-7,
    ),
    planted(
        "tiny_inputs",
        "plain",
        "mlp",
        12,
        plain.mlp,
        ("vanishing_activations", "input_scale", 0, "severe"),
        scale=1e-9,
    ),
)

rank_one = low_rank(1)
same_columns = lambda w: jnp.broadcast_to(w[:, :1], w.shape)
same_rows = lambda w: jnp.broadcast_to(w.mean(0, keepdims=True), w.shape)


def ill_conditioned(layer: int):
    return "ill_conditioned_jacobian", "low_rank_weights", layer, "severe"


def symmetric(layer: int | None):
    return "symmetric_units", "identical_init", layer, "severe"


def untrained(layer: int):
    return "untrained_layer", "no_path", layer, "severe"


constant = nn.initializers.constant(0.05)

WEIGHTS = (
    planted(
        "rank_one",
        "linen",
        "mlp",
        10,
        linen.mlp,
        ill_conditioned(4),
        (4, "kernel", rank_one),
        act=nn.tanh,
        kernel=orthogonal(1.0),
    ),
    planted(
        "rank_one",
        "equinox",
        "mlp",
        8,
        eqx_.mlp,
        ill_conditioned(5),
        (5, "weight", rank_one),
        act=jnp.tanh,
        init=orthogonal(1.0),
    ),
    planted(
        "rank_two_scan",
        "plain",
        "mlp",
        20,
        plain.mlp,
        ill_conditioned(11),
        (11, "'w'", low_rank(2)),
        act=LINEAR,
        init=orthogonal(1.0),
    ),
    planted("constant", "linen", "mlp", 5, linen.mlp, symmetric(0), act=nn.tanh, kernel=constant),
    planted(
        "constant", "nnx", "cnn", 5, nnx_.cnn, symmetric(0), (None, "layers.*kernel", filled(0.02))
    ),
    planted(
        "constant",
        "plain",
        "mlp",
        6,
        plain.mlp,
        symmetric(0),
        (None, "'w'|embed", filled(0.03)),
        act=jnp.tanh,
    ),
    # a layer whose units have the same weights in and the same weights out stays one unit for ever
    planted(
        "one_layer_alike",
        "linen",
        "mlp",
        8,
        linen.mlp,
        symmetric(3),
        (3, "kernel", same_columns),
        (4, "kernel", same_rows),
        act=nn.tanh,
        kernel=orthogonal(1.0),
    ),
    planted(
        "constant_lstm",
        "linen",
        "lstm",
        20,
        linen.rnn,
        symmetric(None),
        cell=nn.OptimizedLSTMCell(32, kernel_init=constant, recurrent_kernel_init=constant),
    ),
    planted("stop_gradient", "linen", "mlp", 8, linen.mlp, untrained(0), cut=3),
    planted("stop_gradient", "equinox", "mlp", 6, eqx_.mlp, untrained(0), cut=0),
    planted(
        "stop_gradient_branch",
        "linen",
        "resnet",
        6,
        linen.cnn,
        untrained(2),
        kind=linen.ResNet,
        cut=2,
    ),
    planted("unused", "nnx", "mlp", 8, nnx_.mlp, untrained(5), skipped=5),
    planted("unused", "linen", "mlp", 6, linen.mlp, untrained(2), skipped=2),
)


def _fourier(seed: int, depth: int, frequency: float = 3e3) -> Problem:
    """An MLP on sin and cos of `frequency` times random projections of a point in the plane."""
    directions = frequency * jax.random.normal(jax.random.key(seed + 50), (2, 32))
    base = plain.mlp(seed, depth)

    def loss_fn(params, x, y):
        phase = x @ directions
        return base.loss_fn(params, jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], -1), y)

    return base._replace(
        loss_fn=loss_fn, args=(jax.random.uniform(jax.random.key(seed), (32, 2)), base.args[1])
    )


class _FourierMLP(nn.Module):
    frequency: float

    @nn.compact
    def __call__(self, x):
        phase = nn.Dense(32, kernel_init=gaussian(self.frequency), name="features")(x)
        return linen.MLP(4, 64, name="mlp")(jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], -1))


def _fourier_linen(seed: int, depth: int) -> Problem:
    x = jax.random.uniform(jax.random.key(seed), (32, 2))
    return linen.problem(_FourierMLP(3e3), seed, x, linen.digits(seed)[1])


def _chaos(seed: int, depth: int) -> Problem:
    """phi(LN z) = sin(3.5 LN z): every layer multiplies a small difference by about 2.4, and keeps
    the norm."""

    def act(z):
        z = z - z.mean(-1, keepdims=True)
        return GAIN * jnp.sin(3.5 * z / jnp.sqrt((z * z).mean(-1, keepdims=True) + 1e-6))

    return plain.mlp(seed, depth, act=act, init=gaussian(1.0))


SHATTERED = (
    planted(
        "fourier", "plain", "mlp", 4, _fourier, ("shattered_gradients", "frequency", None, "severe")
    ),
    planted(
        "fourier",
        "linen",
        "mlp",
        4,
        _fourier_linen,
        ("shattered_gradients", "frequency", None, "severe"),
    ),
    planted(
        "layernorm_chaos",
        "plain",
        "mlp",
        5,
        _chaos,
        ("shattered_gradients", "normalized_chaos", None, "mild"),
    ),
)


def _bad_batch(seed: int, depth: int, value: float, base: Callable = linen.mlp) -> Problem:
    p = base(seed, depth)
    return p._replace(args=(p.args[0].at[5, 3].set(value), *p.args[1:]))


def _log_of_zero(seed: int, depth: int) -> Problem:
    """-log of a softmax that underflows: logits a thousand apart."""
    model = linen.MLP(depth, 64)
    x, y = linen.digits(seed)
    loss_fn = lambda p, x, y: (
        -jnp.log(nn.softmax(1e3 * model.apply({"params": p}, x))[jnp.arange(len(y)), y]).mean()
    )
    return Problem(loss_fn, model.init(jax.random.key(seed), x)["params"], (x, y))


def _root_of_zero(seed: int, depth: int) -> Problem:
    """The distance between an example's read-out and itself: 0, with the derivative 0 / 0; the loss
    is finite."""
    p = plain.mlp(seed, depth)

    def loss_fn(params, x, y):
        z = x @ params["embed"]
        distance = jnp.sqrt(((z[:, None] - z[None]) ** 2).sum(-1))
        return p.loss_fn(params, x, y) + jnp.float32(0.01) * distance.mean()

    return p._replace(loss_fn=loss_fn)


def _empty_mask(seed: int, depth: int) -> Problem:
    """A mean over no example: 0 / 0."""
    model = linen.MLP(depth, 64)
    x, y = linen.digits(seed)

    def loss_fn(p, x, y, mask):
        losses = optax.softmax_cross_entropy_with_integer_labels(model.apply({"params": p}, x), y)
        return (losses * mask).sum() / mask.sum()

    return Problem(
        loss_fn, model.init(jax.random.key(seed), x)["params"], (x, y, jnp.zeros(len(y)))
    )


def _scaled_loss(
    seed: int, depth: int, factor: float, base: Callable = linen.mlp, **fields: Any
) -> Problem:
    p = base(seed, depth, **fields)
    return p._replace(loss_fn=lambda *args: jnp.float32(factor) * p.loss_fn(*args))


def _clipped_loss(seed: int, depth: int) -> Problem:
    """A loss clipped at 16, far above it."""
    p = plain.mlp(seed, depth)
    return p._replace(loss_fn=lambda *args: jnp.minimum(p.loss_fn(*args) + 100.0, 16.0))


def non_finite(cause: str, layer: int | None = None):
    return "non_finite", cause, layer, "severe"


WIDE = ("norm_overflow", "float_range", None, "severe")

NUMBERS = (
    planted("log_of_zero", "linen", "mlp", 4, _log_of_zero, non_finite("log_of_zero")),
    planted("root_of_zero", "plain", "mlp", 4, _root_of_zero, non_finite("slope_at_zero")),
    planted("empty_mask", "linen", "mlp", 4, _empty_mask, non_finite("empty_mean")),
    planted("nan_in_batch", "linen", "mlp", 5, _bad_batch, non_finite("bad_data"), value=np.nan),
    planted(
        "inf_in_batch",
        "equinox",
        "mlp",
        5,
        _bad_batch,
        non_finite("bad_data"),
        value=np.inf,
        base=eqx_.mlp,
    ),
    planted(
        "nan_parameter",
        "equinox",
        "mlp",
        6,
        eqx_.mlp,
        non_finite("bad_parameter", 2),
        (2, "weight", lambda w: w.at[0, 0].set(np.nan)),
    ),
    planted(
        "nan_parameter",
        "linen",
        "transformer",
        4,
        linen.transformer,
        non_finite("bad_parameter", 1),
        (1, "up.*kernel", lambda w: w.at[0, 0].set(np.nan)),
    ),
    planted(
        "float16_loss_scale",
        "linen",
        "mlp",
        6,
        _scaled_loss,
        non_finite("loss_scale"),
        factor=2.0**26,
        dtype=jnp.float16,
    ),
    planted(
        "float16_underflow",
        "linen",
        "mlp",
        6,
        _scaled_loss,
        ("gradient_underflow", "float_range", None, "severe"),
        factor=2.0**-22,
        dtype=jnp.float16,
    ),
    planted(
        "clipped_loss",
        "plain",
        "mlp",
        4,
        _clipped_loss,
        ("flat_loss", "clipped_or_saturated", None, "severe"),
    ),
    planted("gradients_1e20", "linen", "mlp", 5, _scaled_loss, WIDE, factor=1e21),
    planted("gradients_1e20", "plain", "mlp", 8, _scaled_loss, WIDE, factor=1e22, base=plain.mlp),
)


def _optimized(
    seed: int,
    depth: int,
    tx: Callable,
    base: Callable = linen.mlp,
    learning_rate: float = 0.05,
    **fields: Any,
):
    p = base(seed, depth, **fields)
    return with_options(p, tx=tx(learning_rate), learning_rate=learning_rate)


def _frozen(
    seed: int, depth: int, value: float, leaf: int | None, base: Callable = linen.mlp
) -> Problem:
    """Adam whose second moment holds `value` in one leaf, or in all: what one overflowed gradient
    leaves behind."""
    p, tx = base(seed, depth), optax.adam(1e-3)
    adam, *rest = tx.init(p.params)
    leaves, structure = jax.tree.flatten(adam.nu)
    leaves = [jnp.full_like(x, value) if leaf in (None, i) else x for i, x in enumerate(leaves)]
    adam = adam._replace(nu=jax.tree.unflatten(structure, leaves), count=jnp.int32(1000))
    return with_options(p, tx=tx, opt_state=(adam, *rest), learning_rate=1e-3)


def _too_fast(seed: int, depth: int, base: Callable, num_steps: int = 0, **fields: Any) -> Problem:
    """Gradient descent at four times the stable 2 / sharpness, the largest eigenvalue of the
    Hessian.

    It is measured after `num_steps` of training, since at the start a cross-entropy's sharpness
    falls faster than it hurts. Every one of these diverges within 20 steps.
    """
    p = base(seed, depth, **fields)
    if num_steps:
        p = p._replace(params=train(p, optax.sgd(0.05), num_steps)[0])
    learning_rate = 8.0 / sharpness(p)
    return with_options(p, tx=optax.sgd(learning_rate), learning_rate=learning_rate)


def _linear(seed: int, depth: int) -> Problem:
    """Least squares."""
    x = jax.random.normal(jax.random.key(seed), (64, 32))
    y = x @ jax.random.normal(jax.random.key(seed + 1), (32,)) / 32**0.5
    loss_fn = lambda w, x, y: 0.5 * ((gradjax.tap(x @ w["w"], "prediction") - y) ** 2).mean()
    return Problem(loss_fn, {"w": jnp.zeros(32)}, (x, y))


def _spikes(seed: int, depth: int, factor: float, base: Callable = linen.mlp) -> Problem:
    """A falling loss with five jumps up by `factor`, each forgotten within some ten steps."""
    rng, steps = np.random.default_rng(seed), np.arange(600)
    loss = (0.3 + 2.0 * np.exp(-steps / 100)) * np.exp(0.05 * rng.standard_normal(600))
    for start in (120, 210, 333, 420, 547):
        loss[start:] *= 1 + (factor - 1) * np.exp(-(steps[start:] - start) / 4)
    return with_options(base(seed, depth), history={"loss": loss.astype(np.float32)})


clipped = lambda max_norm: (
    lambda lr: optax.chain(transforms.clip_by_global_norm(max_norm), optax.sgd(lr))
)
clipped_adam = lambda max_norm: (
    lambda lr: optax.chain(transforms.clip_by_global_norm(max_norm), optax.adam(lr))
)
ALWAYS = ("clipping_always", "clipping_threshold", None, "severe")
NEVER = ("clipping_never", "clipping_threshold", None, "severe")
FROZEN = ("frozen_optimizer", "optimizer_state", None, "severe")
FAST = ("unstable_step_size", "learning_rate", None, "severe")
SPIKES = ("loss_spikes", None, None, "severe")

OPTIMIZERS = (
    planted("clip_1e-4", "linen", "mlp", 5, _optimized, ALWAYS, tx=clipped(1e-4)),
    planted(
        "clip_1e-3_adam",
        "plain",
        "mlp",
        6,
        _optimized,
        ALWAYS,
        tx=clipped_adam(1e-3),
        base=plain.mlp,
        learning_rate=1e-3,
    ),
    planted("clip_1e9", "linen", "mlp", 5, _optimized, NEVER, tx=clipped(1e9)),
    planted(
        "clip_1e6_adam",
        "nnx",
        "cnn",
        4,
        _optimized,
        NEVER,
        tx=clipped_adam(1e6),
        base=nnx_.cnn,
        learning_rate=1e-3,
    ),
    planted("adam_nu_inf", "linen", "mlp", 5, _frozen, FROZEN, value=np.inf, leaf=None),
    planted(
        "adam_nu_1e36", "plain", "mlp", 6, _frozen, FROZEN, value=1e36, leaf=None, base=plain.mlp
    ),
    planted(
        "adam_nu_inf_one_leaf",
        "equinox",
        "mlp",
        5,
        _frozen,
        ("frozen_optimizer", "optimizer_state", None, "mild"),
        value=np.inf,
        leaf=4,
        base=eqx_.mlp,
    ),
    planted("sgd_linear", "plain", "mlp", 1, _too_fast, FAST, base=_linear),
    planted("sgd_mlp", "linen", "mlp", 4, _too_fast, FAST, base=linen.mlp, num_steps=60),
    planted("sgd_cnn", "nnx", "cnn", 4, _too_fast, FAST, base=nnx_.cnn, num_steps=20),
    planted("spikes", "linen", "mlp", 4, _spikes, SPIKES, factor=10.0),
    planted(
        "spikes_mild",
        "nnx",
        "mlp",
        4,
        _spikes,
        ("loss_spikes", None, None, "mild"),
        factor=4.0,
        base=nnx_.mlp,
    ),
)

# gates that close: the product over time of a forget gate at sigmoid(b)
GATES = (
    planted(
        "lstm_default",
        "linen",
        "lstm",
        40,
        linen.rnn,
        vanishing(None, 39, "severe"),
        cell=nn.LSTMCell(32),
    ),
    planted(
        "lstm_closed",
        "linen",
        "lstm",
        20,
        linen.rnn,
        vanishing("bias", 19, "severe"),
        (None, "hf.*bias", filled(-3.0)),
        cell=nn.OptimizedLSTMCell(32),
    ),
    planted(
        "lstm_closed",
        "equinox",
        "lstm",
        20,
        eqx_.rnn,
        vanishing("bias", 19, "severe"),
        cell=eqx.nn.LSTMCell,
        bias=-3.0,
    ),
    planted(
        "gru_default",
        "linen",
        "rnn",
        40,
        linen.rnn,
        vanishing(None, 39, "severe"),
        cell=nn.GRUCell(32),
    ),
)
