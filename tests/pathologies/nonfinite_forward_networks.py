"""Networks of Linen, NNX and Equinox whose forward pass is not finite."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from pathologies.nonfinite_case import Broken, broken, ramp

CASES: list[Broken] = []
forward = functools.partial(broken, CASES, "forward")
constant = nn.initializers.constant


@forward("log", "log_of_zero")
def log_of_an_underflowed_softmax():
    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(16)(x))
            x = nn.relu(nn.Dense(16)(x))
            return nn.softmax(nn.Dense(4)(x))

    model = Classifier()

    @jax.jit
    def loss_fn(params, x, y):
        probabilities = model.apply(params, x)
        log_likelihood = jnp.log(probabilities[jnp.arange(8), y])  # <- here
        return -jnp.mean(log_likelihood)

    x = 2000.0 * ramp(8, 3)
    return loss_fn, model.init(jax.random.key(0), x), (x, jnp.arange(8) % 4)


@forward("sub", "masked_row", module="SelfAttention")
def attention_row_all_masked():
    class SelfAttention(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            q, k, v = (nn.Dense(8, name=name)(x) for name in ("query", "key", "value"))
            scores = q @ k.swapaxes(-1, -2) / 8**0.5
            scores = jnp.where(mask, scores, -jnp.inf)
            weights = jax.nn.softmax(scores, axis=-1)  # <- here
            return nn.Dense(8, name="out")(weights @ v)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            x = x + SelfAttention()(nn.LayerNorm()(x), mask)
            return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))

    model = Block()
    mask = jnp.ones((2, 4, 4), bool).at[1, 2].set(False)
    x = ramp(2, 4, 8)

    def loss_fn(params, x, mask, y):
        return jnp.mean((model.apply(params, x, mask) - y) ** 2)

    return loss_fn, model.init(jax.random.key(0), x, mask), (x, mask, jnp.zeros((2, 4, 8)))


@forward("sub", "masked_row")
def library_attention_with_a_row_of_infinite_bias():
    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, x, bias):
            q, k, v = (nn.DenseGeneral((2, 4))(x) for _ in range(3))
            return nn.dot_product_attention(q, k, v, bias=bias)  # <- here

    model = Decoder()
    # The second sequence is padding from its first to its last token.
    bias = jnp.zeros((2, 1, 4, 4)).at[1].set(-jnp.inf)
    x = ramp(2, 4, 8)

    def loss_fn(params, x, bias):
        return jnp.mean(model.apply(params, x, bias) ** 2)

    return loss_fn, model.init(jax.random.key(0), x, bias), (x, bias)


@forward("sub", "masked_row", module="pointer")
def pointer_network_without_a_choice():
    class Pointer(nnx.Module):
        def __init__(self, rngs):
            self.score = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x, free):
            scores = jnp.where(free, self.score(x)[..., 0], -jnp.inf)
            return jax.nn.log_softmax(scores)  # <- here

    class Router(nnx.Module):
        def __init__(self, rngs):
            self.encoder = nnx.Linear(2, 8, rngs=rngs)
            self.pointer = Pointer(rngs)

        def __call__(self, x, free):
            return self.pointer(nnx.tanh(self.encoder(x)), free)

    def loss_fn(model, x, free, choice):
        return -jnp.mean(jnp.take_along_axis(model(x, free), choice[:, None], axis=1))

    free = jnp.ones((3, 5), bool).at[1].set(False)
    return loss_fn, Router(nnx.Rngs(0)), (ramp(3, 5, 2), free, jnp.array([0, 2, 4]))


@forward("mul", "zero_times_infinity", module="attention")
def additive_mask_as_a_product():
    class Attention(eqx.Module):
        project: eqx.nn.Linear

        def __call__(self, x, mask):
            q, k, v = jnp.split(jax.vmap(self.project)(x), 3, axis=-1)
            bias = (1.0 - mask) * -jnp.inf  # <- here
            return jax.nn.softmax(q @ k.T + bias, axis=-1) @ v

    class Encoder(eqx.Module):
        embed: eqx.nn.Linear
        attention: Attention

        def __call__(self, x, mask):
            return self.attention(jax.vmap(self.embed)(x), mask)

    keys = jax.random.split(jax.random.key(0))
    attention = Attention(eqx.nn.Linear(8, 24, key=keys[0]))
    model = Encoder(eqx.nn.Linear(3, 8, key=keys[1]), attention)

    def loss_fn(model, x, mask):
        return jnp.mean(model(x, mask) ** 2)

    return loss_fn, model, (ramp(4, 3), jnp.tril(jnp.ones((4, 4))))


@forward("log", "log_of_zero")
def cross_entropy_of_a_saturated_sigmoid():
    class Discriminator(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(4, 16, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)])
            self.readout = nnx.Linear(16, 1, bias_init=constant(60.0), rngs=rngs)

        def __call__(self, x):
            for layer in self.layers:
                x = nnx.leaky_relu(layer(x))
            return nnx.sigmoid(self.readout(x))[:, 0]

    def loss_fn(model, real, fake):
        log_real = jnp.log(model(real))
        log_fake = jnp.log(1.0 - model(fake))  # <- here
        return -jnp.mean(log_real) - jnp.mean(log_fake)

    return loss_fn, Discriminator(nnx.Rngs(0)), (ramp(4, 4), -ramp(4, 4))


@forward("log", "log_of_zero", module="policy")
def squashed_gaussian_policy():
    class Policy(eqx.Module):
        net: eqx.nn.MLP

        def __call__(self, observation, noise):
            mean, log_std = jnp.split(self.net(observation), 2)
            u = mean + jnp.exp(jnp.clip(log_std, -5.0, 2.0)) * noise
            log_p = -0.5 * noise**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)
            correction = jnp.log(1.0 - jnp.tanh(u) ** 2)  # <- here
            return jnp.tanh(u), jnp.sum(log_p - correction)

    class Agent(eqx.Module):
        policy: Policy
        critic: eqx.nn.MLP

    keys = jax.random.split(jax.random.key(0))
    policy = Policy(eqx.nn.MLP(3, 4, 8, 2, key=keys[0]))
    agent = Agent(policy, eqx.nn.MLP(5, "scalar", 8, 2, key=keys[1]))

    def loss_fn(agent, observations, noise):
        actions, log_p = jax.vmap(agent.policy)(observations, noise)
        value = jax.vmap(agent.critic)(jnp.concatenate([observations, actions], axis=-1))
        return jnp.mean(0.2 * log_p - value)

    return loss_fn, agent, (ramp(4, 3), 40.0 * ramp(4, 2))


@forward("log", "log_of_negative")
def gaussian_likelihood_of_a_negative_variance():
    class Regressor(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.tanh(nn.Dense(16)(x))
            return nn.Dense(1, name="mean")(h), nn.Dense(1, name="variance")(h)

    model = Regressor()

    def loss_fn(params, x, y):
        mean, variance = model.apply(params, x)
        log_scale = 0.5 * jnp.log(variance)  # <- here
        return jnp.mean(log_scale + 0.5 * (y - mean) ** 2 / variance)

    x = 3.0 * ramp(8, 2)
    return loss_fn, model.init(jax.random.key(0), x), (x, jnp.zeros((8, 1)))


@forward("log", "log_of_zero", module="Mixture")
def mixture_density_far_from_its_components():
    class Mixture(nn.Module):
        components: int = 4

        @nn.compact
        def __call__(self, h, y):
            weight = nn.softmax(nn.Dense(self.components)(h))
            mean = nn.Dense(self.components)(h)
            density = jnp.exp(-0.5 * (y - mean) ** 2) / (2 * jnp.pi) ** 0.5
            likelihood = jnp.sum(weight * density, axis=-1)
            return jnp.log(likelihood)  # <- here

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, y):
            return Mixture()(nn.tanh(nn.Dense(16)(x)), y)

    model = Network()

    def loss_fn(params, x, y):
        return -jnp.mean(model.apply(params, x, y))

    x, y = ramp(6, 2), jnp.full((6, 1), 30.0)
    return loss_fn, model.init(jax.random.key(0), x, y), (x, y)


@forward("exp", "overflow", module="Encoder")
def log_variance_of_an_autoencoder():
    class Encoder(nn.Module):
        @nn.compact
        def __call__(self, x, noise):
            h = nn.relu(nn.Dense(16)(x))
            mean, log_variance = nn.Dense(4)(h), nn.Dense(4, bias_init=constant(200.0))(h)
            variance = jnp.exp(log_variance)  # <- here
            kl = 0.5 * jnp.sum(variance + mean**2 - 1.0 - log_variance, axis=-1)
            return mean + jnp.sqrt(variance) * noise, kl

    class VAE(nn.Module):
        @nn.compact
        def __call__(self, x, noise):
            z, kl = Encoder()(x, noise)
            return nn.Dense(6)(nn.relu(nn.Dense(16)(z))), kl

    model = VAE()

    def loss_fn(params, x, noise):
        logits, kl = model.apply(params, x, noise)
        return optax.sigmoid_binary_cross_entropy(logits, x).sum(axis=-1).mean() + kl.mean()

    x, noise = ramp(4, 6, low=0.0), ramp(4, 4)
    return loss_fn, model.init(jax.random.key(0), x, noise), (x, noise)


@forward("dot_general", "overflow", module="up")
def matrix_product_in_float16():
    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x):
            wide = nn.Dense(16, dtype=jnp.float16, kernel_init=constant(100.0), name="wide")
            x = nn.relu(wide(jnp.abs(x)))
            up = nn.Dense(8, dtype=jnp.float16, kernel_init=constant(30.0), name="up")
            x = up(x)  # <- here
            return nn.Dense(1, dtype=jnp.float32)(x.astype(jnp.float32) / 1e4)

    model = MLP()

    def loss_fn(params, x, y):
        return jnp.mean((model.apply(params, x) - y) ** 2)

    x = ramp(4, 4)
    return loss_fn, model.init(jax.random.key(0), x), (x, jnp.zeros((4, 1)))


@forward("convert_element_type", "cast_overflow", module="first")
def half_precision_layer_of_raw_inputs():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 16, dtype=jnp.float16, rngs=rngs)
            self.second = nnx.Linear(16, 1, dtype=jnp.float16, rngs=rngs)

        def __call__(self, x):
            h = self.first(x)  # <- here
            return self.second(nnx.leaky_relu(h)).astype(jnp.float32)

    def loss_fn(model, x, y):
        return jnp.mean((model(x) - y) ** 2)

    x = ramp(4, 3).at[2, 0].set(7e4)
    return loss_fn, Model(nnx.Rngs(0)), (x, jnp.zeros((4, 1)))


@forward("div", "division_by_zero", iteration=5, module="TimeAwareCell")
def irregular_series_with_a_repeated_time():
    class TimeAwareCell(nn.Module):
        @nn.compact
        def __call__(self, h, inputs):
            x, dt = inputs
            rate = nn.sigmoid(nn.Dense(8)(x)) / dt  # <- here
            h = nn.leaky_relu(nn.Dense(8)(h) + nn.Dense(8)(x) + 0.1 * rate)
            return h, h

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, dt):
            cell = nn.scan(TimeAwareCell, variable_broadcast="params", split_rngs={"params": False})
            h, _ = cell()(jnp.zeros((x.shape[1], 8)), (x, dt))
            return nn.Dense(1)(h)

    model = Network()
    x, times = ramp(12, 2, 3), jnp.arange(12.0).at[5].set(4.0)
    dt = jnp.diff(times, prepend=-1.0)[:, None, None]

    def loss_fn(params, x, dt):
        return jnp.mean(model.apply(params, x, dt) ** 2)

    return loss_fn, model.init(jax.random.key(0), x, dt), (x, dt)


@forward("div", "zero_over_zero", module="norm")
def instance_norm_of_a_constant_image():
    class InstanceNorm(nnx.Module):
        def __init__(self, features):
            self.scale = nnx.Param(jnp.ones(features))

        def __call__(self, x):
            mean = x.mean(axis=(1, 2), keepdims=True)
            std = x.std(axis=(1, 2), keepdims=True)
            return self.scale[None, None, None] * ((x - mean) / std)  # <- here

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.norm = InstanceNorm(1)
            self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)

        def __call__(self, x):
            return nnx.relu(self.conv(self.norm(x))).mean(axis=(1, 2))

    def loss_fn(model, images):
        return jnp.mean(model(images) ** 2)

    return loss_fn, Net(nnx.Rngs(0)), (ramp(3, 4, 4, 1).at[1].set(0.5),)


@forward("rsqrt", "division_by_zero", module="LayerNorm_0")
def layer_norm_without_eps():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(8, 4, embedding_init=nn.initializers.zeros)(tokens)
            x = nn.LayerNorm(epsilon=0.0)(x)  # <- here
            return nn.Dense(8)(x)

    model = Block()
    tokens = jnp.arange(6).reshape(2, 3)

    def loss_fn(params, tokens):
        logits = model.apply(params, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

    return loss_fn, model.init(jax.random.key(0), tokens), (tokens,)


@forward("div", "zero_over_zero", module="LinearAttention")
def linear_attention_of_dead_features():
    class LinearAttention(nn.Module):
        @nn.compact
        def __call__(self, x):
            q, k = (nn.relu(nn.Dense(4, bias_init=constant(-9.0))(x)) for _ in range(2))
            values = nn.Dense(8)(x)
            normaliser = q @ jnp.sum(k, axis=1)[..., None]
            return q @ (k.swapaxes(1, 2) @ values) / normaliser  # <- here

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = x + nn.remat(LinearAttention)()(x)
            return x

    model = Model()

    def loss_fn(params, x):
        return jnp.mean(model.apply(params, x) ** 2)

    x = ramp(2, 3, 8)
    return loss_fn, model.init(jax.random.key(0), x), (x,)


@forward("div", "division_by_zero")
def temperature_annealed_to_zero():
    @eqx.filter_jit
    def relaxed_sample(model, x, gumbel, step):
        temperature = jnp.maximum(0.0, 1.0 - step / 128.0)
        scores = jax.vmap(model)(x) + gumbel
        return jax.nn.softmax(scores / temperature, axis=-1)  # <- here

    def loss_fn(model, x, gumbel, step):
        return jnp.mean(relaxed_sample(model, x, gumbel, step)[:, 0])

    model = eqx.nn.MLP(3, 4, 8, 2, key=jax.random.key(0))
    return loss_fn, model, (ramp(5, 3), ramp(5, 4), jnp.array(128.0))


@forward("div", "empty_mean", module="layers[1]")
def mean_over_no_neighbours():
    class Convolution(eqx.Module):
        linear: eqx.nn.Linear
        pool: bool = eqx.field(static=True)

        def __call__(self, x, senders, receivers):
            messages = jax.vmap(self.linear)(x)[senders]
            total = jax.ops.segment_sum(messages, receivers, len(x))
            if not self.pool:
                return total
            degree = jax.ops.segment_sum(jnp.ones((len(senders), 1)), receivers, len(x))
            return total / degree  # <- here

    class GNN(eqx.Module):
        layers: list

        def __call__(self, x, senders, receivers):
            for layer in self.layers:
                x = jax.nn.relu(layer(x, senders, receivers))
            return x

    keys = jax.random.split(jax.random.key(0))
    linears = [eqx.nn.Linear(n, 8, key=key) for n, key in zip((3, 8), keys, strict=True)]
    model = GNN([Convolution(linears[0], False), Convolution(linears[1], True)])

    def loss_fn(model, x, senders, receivers):
        return jnp.mean(model(x, senders, receivers) ** 2)

    # Node 4 has no neighbour.
    return loss_fn, model, (ramp(5, 3), jnp.array([0, 1, 2, 3, 4]), jnp.array([1, 0, 3, 2, 0]))
