"""Networks of Linen, NNX and Equinox with a finite loss whose gradient is not finite."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from pathologies.nonfinite_case import Broken, broken, ramp, weights

CASES: list[Broken] = []
backward = functools.partial(broken, CASES, "backward")


@backward("sqrt", "slope_at_zero")
def sqrt_at_zero_behind_three_layers():
    class Magnitude(nn.Module):
        @nn.compact
        def __call__(self, x):
            for width in (16, 16, 4):
                x = nn.tanh(nn.Dense(width, use_bias=False)(x))
            energy = jnp.sum(x**2, axis=-1)
            return jnp.sqrt(energy)  # <- here

    model = Magnitude()
    # The third example is padding.
    x = ramp(5, 3, low=0.5).at[2].set(0.0)

    def loss_fn(params, x, y):
        return jnp.mean((model.apply(params, x) - y) ** 2)

    return loss_fn, model.init(jax.random.key(0), x), (x, jnp.ones(5))


@backward("sqrt", "slope_at_zero")
def norm_penalty_of_a_bias_at_zero():
    class MLP(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(3, 8, rngs=rngs)
            self.out = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.gelu(self.hidden(x)))

    def loss_fn(model, x, y):
        error = jnp.mean((model(x) - y) ** 2)
        penalty = jnp.linalg.norm(model.hidden.bias[...])  # <- here
        return error + 1e-3 * penalty

    return loss_fn, MLP(nnx.Rngs(0)), (ramp(6, 3), jnp.ones((6, 1)))


@backward("pow", "slope_at_zero", module="GeM")
def generalised_mean_pooling_of_a_dark_image():
    class GeM(nn.Module):
        power: float = 3.0

        @nn.compact
        def __call__(self, x):
            pooled = jnp.mean(x**self.power, axis=(1, 2))
            return pooled ** (1.0 / self.power)  # <- here

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(GeM()(jnp.maximum(nn.Conv(4, (3, 3))(x), 0.0)))

    model = Net()
    images = ramp(3, 4, 4, 1, low=0.0).at[1].set(0.0)

    def loss_fn(params, images, labels):
        logits = model.apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss_fn, model.init(jax.random.key(0), images), (images, jnp.array([0, 1, 0]))


@backward("acosh", "edge_of_range", module="embedding")
def hyperbolic_distance_of_a_point_to_itself():
    class Poincare(eqx.Module):
        points: jax.Array

        def __call__(self, i, j):
            u, v = self.points[i], self.points[j]
            ratio = jnp.sum((u - v) ** 2) / ((1.0 - jnp.sum(u**2)) * (1.0 - jnp.sum(v**2)))
            return jnp.arccosh(1.0 + 2.0 * ratio)  # <- here

    class Hierarchy(eqx.Module):
        embedding: Poincare

    def loss_fn(model, parents, children):
        distance = jax.vmap(model.embedding)(parents, children)
        return jnp.mean(jax.nn.softplus(distance))

    model = Hierarchy(Poincare(0.2 * weights(0, 6, 2)))
    return loss_fn, model, (jnp.array([0, 1, 2]), jnp.array([3, 1, 5]))


@backward("log", "double_where", module="Block")
def masked_log_in_a_rematerialised_block():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(8)(x)
            compressed = jnp.where(h > 0, jnp.log(h), 0.0)  # <- here
            return x + nn.Dense(8)(compressed)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(nn.remat(Block)()(x))

    model = Net()
    # Two rows are padding; the bias starts at zero.
    x = ramp(6, 8, low=0.1).at[4:].set(0.0)

    def loss_fn(params, x):
        return jnp.mean(model.apply(params, x) ** 2)

    return loss_fn, model.init(jax.random.key(0), x), (x,)


@backward("sqrt", "slope_at_zero", iteration=0, module="Cell")
def recurrent_cell_normalised_before_any_input():
    class Cell(nn.Module):
        @nn.compact
        def __call__(self, h, x):
            z = nn.Dense(8, use_bias=False)(x) + nn.Dense(8, use_bias=False)(h)
            norm = jnp.linalg.norm(z, axis=-1, keepdims=True)  # <- here
            h = jnp.tanh(z / (norm + 1e-6))
            return h, h

    class RNN(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(Cell, variable_broadcast="params", split_rngs={"params": False})
            h, _ = scanned()(jnp.zeros((x.shape[1], 8)), x)
            return nn.Dense(1)(h)

    model = RNN()
    x = ramp(6, 2, 3, low=0.5).at[0].set(0.0)

    def loss_fn(params, x):
        return jnp.mean((model.apply(params, x) - 1.0) ** 2)

    return loss_fn, model.init(jax.random.key(0), x), (x,)


@backward("dot_general", "loss_scale", module="out")
def loss_scale_too_large_for_a_kernel():
    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, x):
            wide = nn.Dense(8, dtype=jnp.float16, kernel_init=nn.initializers.constant(4.0))
            h = nn.relu(wide(x))
            out = nn.Dense(2, dtype=jnp.float16, kernel_init=nn.initializers.zeros, name="out")
            logits = out(h)  # <- here
            return logits.astype(jnp.float32)

    model = Classifier()
    x = jnp.full((1, 2), 2.0)

    def loss_fn(params, x, y):
        logits = model.apply(params, x)
        return 2.0**15 * optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss_fn, model.init(jax.random.key(0), x), (x, jnp.array([1]))


@backward("sqrt", "slope_at_zero")
def triplet_loss_of_a_duplicate():
    @eqx.filter_jit
    def distances(model, anchor, other):
        embedded, compared = jax.vmap(model)(anchor), jax.vmap(model)(other)
        return jnp.linalg.norm(embedded - compared, axis=-1)  # <- here

    def loss_fn(model, anchor, positive, negative):
        near, far = distances(model, anchor, positive), distances(model, anchor, negative)
        return jnp.mean(jnp.maximum(near - far + 1.0, 0.0))

    model = eqx.nn.MLP(3, 4, 8, 2, key=jax.random.key(0))
    anchor = ramp(4, 3)
    return loss_fn, model, (anchor, (anchor + 0.1).at[1].set(anchor[1]), -anchor + 2.0)


@backward("sqrt", "slope_at_zero")
def root_mean_square_of_a_perfect_fit():
    class Forecaster(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(2, 8, rngs=rngs))
            self.readout = nnx.Linear(8, 1, kernel_init=nnx.initializers.zeros_init(), rngs=rngs)

        def __call__(self, series):
            return self.readout(self.rnn(series)[:, -1])

    def loss_fn(model, series, y):
        mse = jnp.mean((model(series) - y) ** 2)
        return jnp.sqrt(mse)  # <- here

    return loss_fn, Forecaster(nnx.Rngs(0)), (ramp(2, 5, 2), jnp.zeros((2, 1)))
