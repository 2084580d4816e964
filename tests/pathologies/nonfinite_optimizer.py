"""Updates that are not finite although loss and gradients are, and inf or NaN that came in."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from pathologies.nonfinite_case import Broken, broken, ramp, weights

CASES: list[Broken] = []
optimizer = functools.partial(broken, CASES, "optimizer")
data = functools.partial(broken, CASES, "data", "")
parameter = functools.partial(broken, CASES, "parameter", "")


@optimizer("div", "zero_eps", leaf="shift")
def adam_zero_eps_float16():
    def loss_fn(params, x, y):
        prediction = x @ params["kernel"] + 1e-4 * params["shift"][None]
        return jnp.mean((prediction - y) ** 2)

    params = {"kernel": jnp.ones((3, 4), jnp.float16), "shift": jnp.zeros(4, jnp.float16)}
    args = jnp.full((8, 3), 2, jnp.float16), jnp.zeros((8, 4), jnp.float16)
    # In float16 eps=1e-8 is zero, and so is the square of the small gradient.
    return loss_fn, params, args, optax.adam(1e-3)


@optimizer("div rsqrt mul", "zero_eps", leaf="Dense_0")
def rmsprop_without_eps_and_a_dead_layer():
    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.relu(nn.Dense(8, bias_init=nn.initializers.constant(-50.0))(x))
            return nn.Dense(1, bias_init=nn.initializers.ones)(h + 1.0)

    model = MLP()

    def loss_fn(params, x, y):
        return jnp.mean((model.apply(params, x) - y) ** 2)

    x = ramp(6, 3)
    params = model.init(jax.random.key(0), x)
    return loss_fn, params, (x, jnp.zeros((6, 1))), optax.rmsprop(1e-2, eps=0.0)


@optimizer("div", "zero_eps", leaf="embedding")
def adamw_without_eps_and_an_unseen_token():
    def loss_fn(params, tokens, labels):
        logits = jnp.mean(params["embedding"][tokens], axis=1) @ params["readout"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    params = {"embedding": weights(0, 6, 4), "readout": weights(1, 4, 3)}
    tokens, labels = jnp.array([[0, 1, 2], [4, 5, 0]]), jnp.array([0, 2])
    tx = optax.adamw(1e-3, eps=0.0)
    grads = jax.grad(loss_fn)(params, tokens, labels)
    # The third token has not occurred in the ten steps before either.
    opt_state = tx.init(params)
    for _ in range(10):
        _, opt_state = tx.update(grads, opt_state, params)
    return loss_fn, params, (tokens, labels), tx, opt_state


@optimizer("div", "division_by_zero")
def schedule_that_divides_by_its_first_step():
    def inverse_time(step):
        return 0.1 / jnp.sqrt(step)  # <- here

    def loss_fn(params, x, y):
        return jnp.mean((jnp.tanh(x @ params["w"]) - y) ** 2)

    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(inverse_time))
    return loss_fn, {"w": weights(0, 3, 2)}, (ramp(6, 3), jnp.ones((6, 2))), tx


@optimizer("div", "zero_over_zero")
def normalised_gradient_of_an_unused_parameter():
    def normalise(gradient):
        scale = jnp.max(jnp.abs(gradient))
        return gradient / scale  # <- here

    def update(updates, state, params=None):
        return jax.tree.map(normalise, updates), state

    def loss_fn(params, x, y):
        hidden = jnp.tanh(x @ params["trunk"])
        return jnp.mean((hidden @ params["head"] - y) ** 2)

    params = {"trunk": weights(0, 3, 4), "head": weights(1, 4, 2), "other_head": weights(2, 4, 2)}
    tx = optax.chain(optax.GradientTransformation(lambda _: (), update), optax.scale(-0.01))
    return loss_fn, params, (ramp(6, 3), jnp.ones((6, 2))), tx


@optimizer("mul", "overflow", leaf="w")
def step_too_long_for_float16():
    def loss_fn(params, x):
        return jnp.mean(jnp.square(x @ params["w"]))

    params = {"w": jnp.full((2, 1), 8, jnp.float16)}
    return loss_fn, params, (jnp.full((4, 2), 8, jnp.float16),), optax.sgd(100.0)


@data("bad_data", leaf="image")
def batch_with_a_nan():
    class CNN(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3))(x))
            return nn.Dense(3)(x.mean(axis=(1, 2)))

    model = CNN()
    image = ramp(4, 4, 4, 1)

    def loss_fn(params, batch):
        logits = model.apply(params, batch["image"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses.mean()

    params = model.init(jax.random.key(0), image)
    image = image.at[2, 0, 3, 0].set(jnp.nan)
    return loss_fn, params, ({"image": image, "label": jnp.array([0, 1, 2, 0])},)


@data("bad_data", leaf="target")
def target_of_infinity():
    def loss_fn(w, batch):
        return jnp.mean(optax.huber_loss(batch["x"] @ w, batch["target"]))

    target = jnp.ones(6).at[4].set(-jnp.inf)
    return loss_fn, jnp.ones(3), ({"x": ramp(6, 3), "target": target},)


@data("bad_data", leaf="series")
def sensor_drops_out_in_a_series():
    def loss_fn(model, series):
        def step(h, x):
            return model(x, h), None

        h, _ = jax.lax.scan(step, jnp.zeros(8), series["series"])
        return jnp.mean(h**2)

    series = ramp(10, 2).at[6, 1].set(jnp.nan)
    cell = eqx.nn.GRUCell(2, 8, key=jax.random.key(0))
    return loss_fn, cell, ({"time": jnp.arange(10.0), "series": series},)


@parameter("bad_parameter", leaf="Dense_1")
def kernel_with_a_nan():
    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(3):
                x = nn.gelu(nn.Dense(8)(x))
            return nn.Dense(1)(x)

    model, x = MLP(), ramp(6, 3)
    params = model.init(jax.random.key(0), x)
    kernel = params["params"]["Dense_1"]["kernel"]
    params["params"]["Dense_1"]["kernel"] = kernel.at[3, 2].set(jnp.nan)

    def loss_fn(params, x):
        return jnp.mean(model.apply(params, x) ** 2)

    return loss_fn, params, (x,)


@parameter("bad_parameter", leaf="second")
def bias_of_infinity():
    class MLP(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 8, rngs=rngs)
            self.second = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.first(x)))

    model = MLP(nnx.Rngs(0))
    model.second.bias[...] = jnp.array([jnp.inf])

    def loss_fn(model, x, y):
        return jnp.mean((model(x) - y) ** 2)

    return loss_fn, model, (ramp(6, 3), jnp.zeros((6, 1)))


@parameter("bad_parameter", leaf="layers[2]")
def weight_after_a_bad_update():
    model = eqx.nn.MLP(3, 1, 8, 2, key=jax.random.key(0))
    spoiled = jnp.full_like(model.layers[2].weight, jnp.nan)
    model = eqx.tree_at(lambda model: model.layers[2].weight, model, spoiled)

    def loss_fn(model, x, y):
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    return loss_fn, model, (ramp(6, 3), jnp.zeros((6, 1)))
