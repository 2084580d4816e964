"""Healthy networks and optimisers, most with inf or NaN that reaches nothing."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from pathologies.nonfinite_case import Harmless, ramp, weights

CASES: list[Harmless] = []


def harmless(make):
    CASES.append(Harmless(make.__name__, make))
    return make


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@harmless
def linen_classifier():
    model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(16), nn.relu, nn.Dense(3)])
    x = ramp(6, 4)

    def loss_fn(params, x, y):
        return cross_entropy(model.apply(params, x), y)

    params = model.init(jax.random.key(0), x)
    return loss_fn, params, (x, jnp.arange(6) % 3), optax.adamw(1e-3)


@harmless
def linen_causal_self_attention():
    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(8, 8)(tokens)
            mask = nn.make_causal_mask(tokens)
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x), mask=mask)
            return nn.Dense(8)(nn.LayerNorm()(x))

    model = Decoder()
    tokens = jnp.arange(8).reshape(2, 4)

    def loss_fn(params, tokens):
        return cross_entropy(model.apply(params, tokens)[:, :-1], tokens[:, 1:])

    return loss_fn, model.init(jax.random.key(0), tokens), (tokens,)


@harmless
def linen_attention_with_an_infinite_bias():
    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, x, bias):
            q, k, v = (nn.DenseGeneral((2, 4))(x) for _ in range(3))
            return nn.dot_product_attention(q, k, v, bias=bias)

    model = nn.remat(Decoder)()
    x = ramp(2, 4, 8)
    bias = jnp.triu(jnp.full((4, 4), -jnp.inf), k=1)[None, None]

    def loss_fn(params, x, bias):
        return jnp.mean(model.apply(params, x, bias) ** 2)

    return loss_fn, model.init(jax.random.key(0), x, bias), (x, bias)


@harmless
def linen_maximum_pooling_with_padding():
    class CNN(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3))(x))
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
            return nn.Dense(3)(x.reshape(len(x), -1))

    model = CNN()
    x = ramp(4, 5, 5, 1)

    def loss_fn(params, x, y):
        return cross_entropy(model.apply(params, x), y)

    return loss_fn, model.init(jax.random.key(0), x), (x, jnp.array([0, 1, 2, 0]))


@harmless
def linen_scanned_lstm_of_missing_values():
    class Cell(nn.Module):
        @nn.compact
        def __call__(self, carry, x):
            x = jnp.where(jnp.isnan(x), self.param("fill", nn.initializers.zeros, (1, 2)), x)
            return nn.OptimizedLSTMCell(8)(carry, x)

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(Cell, variable_broadcast="params", split_rngs={"params": False})
            start = jnp.zeros((x.shape[1], 8)), jnp.zeros((x.shape[1], 8))
            _, h = scanned()(start, x)
            return nn.Dense(1)(h[-1])

    model = Network()
    x = ramp(6, 3, 2).at[2, 1].set(jnp.nan).at[3:, 0].set(jnp.nan)

    def loss_fn(params, x):
        return jnp.mean((model.apply(params, x) - 1.0) ** 2)

    return loss_fn, model.init(jax.random.key(0), x), (x,)


@harmless
def linen_mixture_density_in_log_space():
    class Mixture(nn.Module):
        @nn.compact
        def __call__(self, x, y):
            h = nn.tanh(nn.Dense(16)(x))
            enabled = jnp.array([[True, True, False]])
            weight = nn.log_softmax(jnp.where(enabled, nn.Dense(3)(h), -jnp.inf))
            log_density = -0.5 * (y - nn.Dense(3)(h)) ** 2
            return nn.logsumexp(weight + log_density, axis=-1)

    model = Mixture()
    x, y = ramp(6, 2), jnp.full((6, 1), 30.0)

    def loss_fn(params, x, y):
        return -jnp.mean(model.apply(params, x, y))

    return loss_fn, model.init(jax.random.key(0), x, y), (x, y)


@harmless
def linen_mixed_precision():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = nn.relu(nn.Dense(16, dtype=jnp.float16)(x))
            return nn.Dense(3, dtype=jnp.float16)(x).astype(jnp.float32)

    model = Net()
    x = ramp(6, 4)

    def loss_fn(params, x, y):
        return 256.0 * cross_entropy(model.apply(params, x), y)

    return loss_fn, model.init(jax.random.key(0), x), (x, jnp.arange(6) % 3)


@harmless
def nnx_regression():
    class MLP(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 16, rngs=rngs)
            self.norm = nnx.LayerNorm(16, rngs=rngs)
            self.second = nnx.Linear(16, 1, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.gelu(self.norm(self.first(x))))

    def loss_fn(model, x, y):
        return jnp.mean((model(x) - y) ** 2)

    return loss_fn, MLP(nnx.Rngs(0)), (ramp(6, 3), jnp.ones((6, 1)))


@harmless
def nnx_actor_with_forbidden_actions():
    class Actor(nnx.Module):
        def __init__(self, rngs):
            self.torso = nnx.Linear(3, 8, rngs=rngs)
            self.head = nnx.Linear(8, 4, rngs=rngs)

        def __call__(self, x, legal):
            logits = self.head(nnx.tanh(self.torso(x)))
            return jnp.where(legal, logits, -jnp.inf)

    def loss_fn(model, x, legal, action, advantage):
        log_p = nnx.log_softmax(model(x, legal))
        taken = jnp.take_along_axis(log_p, action[:, None], axis=-1)[:, 0]
        return -jnp.mean(taken * advantage)

    legal = jnp.ones((4, 4), bool).at[1, 2:].set(False).at[3, 0].set(False)
    actions, advantage = jnp.array([0, 1, 2, 3]), jnp.array([1.0, -1.0, 0.5, 2.0])
    return loss_fn, Actor(nnx.Rngs(0)), (ramp(4, 3), legal, actions, advantage)


@harmless
def nnx_attention_over_padded_keys():
    class Encoder(nnx.Module):
        def __init__(self, rngs):
            self.qkv = nnx.Linear(4, 12, rngs=rngs)

        def __call__(self, x, lengths):
            q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
            scores = q @ k.swapaxes(-1, -2) / 2.0
            valid = jnp.arange(5)[None, None] < lengths[:, None, None]
            return nnx.softmax(jnp.where(valid, scores, -jnp.inf), axis=-1) @ v

    def loss_fn(model, x, lengths):
        return jnp.mean(model(x, lengths) ** 2)

    return loss_fn, Encoder(nnx.Rngs(0)), (ramp(3, 5, 4), jnp.array([5, 1, 3]))


@harmless
def nnx_recurrent_network_of_padded_series():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(nnx.GRUCell(2, 8, rngs=rngs))
            self.out = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x):
            return self.out(self.rnn(x))[..., 0]

    def loss_fn(model, x, y):
        observed = jnp.isfinite(y)
        error = model(x) - jnp.where(observed, y, 0.0)
        return jnp.mean(error**2, where=observed)

    y = ramp(3, 6).at[0, 4:].set(jnp.nan).at[2, 1:].set(jnp.nan)
    return loss_fn, Network(nnx.Rngs(0)), (ramp(3, 6, 2), y)


@harmless
def nnx_layer_in_bfloat16():
    class Net(nnx.Module):
        def __init__(self, rngs):
            options = {"dtype": jnp.bfloat16, "rngs": rngs}
            self.layers = nnx.List([nnx.Linear(4, 8, **options), nnx.Linear(8, 1, **options)])

        def __call__(self, x):
            first, second = self.layers
            return second(nnx.silu(first(x))).astype(jnp.float32)

    def loss_fn(model, x, y):
        return jnp.mean((model(x) - y) ** 2)

    return loss_fn, Net(nnx.Rngs(0)), (ramp(6, 4), jnp.ones((6, 1)))


@harmless
def equinox_classifier():
    model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))

    @eqx.filter_jit
    def loss_fn(model, x, y):
        return cross_entropy(jax.vmap(model)(x), y)

    return loss_fn, model, (ramp(6, 4), jnp.arange(6) % 3)


@harmless
def equinox_masked_attention():
    model = eqx.nn.MultiheadAttention(2, 8, key=jax.random.key(0))

    def loss_fn(model, x, mask):
        return jnp.mean(model(x, x, x, mask=mask) ** 2)

    return loss_fn, model, (ramp(4, 8), jnp.tril(jnp.ones((4, 4), bool)))


@harmless
def equinox_recurrence_that_stops_at_the_padding():
    class Reader(eqx.Module):
        cell: eqx.nn.GRUCell
        out: eqx.nn.Linear

        def __call__(self, x):
            def step(h, x):
                padding = jnp.isnan(x).any()
                moved = self.cell(jnp.where(padding, 0.0, x), h)
                return jnp.where(padding, h, moved), None

            h, _ = jax.lax.scan(step, jnp.zeros(8), x)
            return self.out(h)

    keys = jax.random.split(jax.random.key(0))
    model = Reader(eqx.nn.GRUCell(2, 8, key=keys[0]), eqx.nn.Linear(8, 1, key=keys[1]))

    def loss_fn(model, x):
        return jnp.mean((jax.vmap(model)(x) - 1.0) ** 2)

    return loss_fn, model, (ramp(3, 6, 2).at[1, 4:].set(jnp.nan),)


@harmless
def equinox_maximum_over_no_neighbours():
    class Pool(eqx.Module):
        linear: eqx.nn.Linear

        def __call__(self, x, senders, receivers):
            messages = jax.vmap(self.linear)(x)[senders]
            largest = jax.ops.segment_max(messages, receivers, len(x))
            return jnp.where(jnp.isneginf(largest), 0.0, largest)

    def loss_fn(model, x, senders, receivers):
        return jnp.mean(model(x, senders, receivers) ** 2)

    model = Pool(eqx.nn.Linear(3, 8, key=jax.random.key(0)))
    return loss_fn, model, (ramp(4, 3), jnp.array([0, 1, 2, 3]), jnp.array([1, 0, 0, 2]))


@harmless
def equinox_convolution_with_a_nan_in_its_state():
    class Monitored(eqx.Module):
        conv: eqx.nn.Conv1d
        pool: eqx.nn.MaxPool1d
        last_loss: jax.Array

        def __call__(self, x):
            return self.pool(jax.nn.relu(self.conv(x)))

    conv = eqx.nn.Conv1d(1, 4, 3, key=jax.random.key(0))
    model = Monitored(conv, eqx.nn.MaxPool1d(3, 2, padding=1), jnp.array(jnp.nan))

    def loss_fn(model, x):
        return jnp.mean(jax.vmap(model)(x) ** 2)

    return loss_fn, model, (ramp(3, 1, 8),)


@harmless
def plateau_schedule_that_starts_at_infinity():
    def loss_fn(w, x, y):
        return jnp.mean((x @ w - y) ** 2)

    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=5)

    def init(w):
        return plateau.init(w)

    def update(updates, state, params=None):
        return plateau.update(updates, state, params, value=jnp.array(1.0))

    tx = optax.chain(optax.adam(1e-3), optax.GradientTransformation(init, update))
    return loss_fn, jnp.ones(3), (ramp(6, 3), jnp.ones(6)), tx


@harmless
def best_loss_kept_by_an_optimizer():
    def loss_fn(w, x, y):
        return jnp.mean((x @ w - y) ** 2)

    def update(updates, state, params=None):
        return updates, {"best": jnp.minimum(state["best"], optax.tree.norm(updates))}

    best = optax.GradientTransformation(lambda _: {"best": jnp.array(jnp.inf)}, update)
    tx = optax.chain(best, optax.sgd(0.1, momentum=0.9))
    w = jnp.ones(3)
    return loss_fn, w, (ramp(6, 3), jnp.ones(6)), tx, tx.init(w)


@harmless
def bfloat16_with_a_mask():
    def loss_fn(params, x, y):
        h = jax.nn.gelu(x @ params["w1"])
        logits = h @ params["w2"] + jnp.array([[0, -jnp.inf, 0]], jnp.bfloat16)
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), y).mean()

    params = {"w1": weights(0, 4, 8), "w2": weights(1, 8, 3)}
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    return loss_fn, params, (ramp(6, 4).astype(jnp.bfloat16), jnp.array([0, 2, 2, 0, 0, 2]))


@harmless
def moderate_float16_loss_scale():
    def loss_fn(params, x, y):
        w1, w2 = (params[name].astype(jnp.float16) for name in ("w1", "w2"))
        logits = (jnp.tanh(x.astype(jnp.float16) @ w1) @ w2).astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss * 2.0**10

    params = {"w1": weights(0, 3, 8), "w2": weights(1, 8, 4)}
    return loss_fn, params, (ramp(8, 3), jnp.arange(8) % 4), optax.adam(1e-3)
