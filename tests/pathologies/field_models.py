"""Section D of the field: solvers with loops inside, small copies of published models, a short
time; kinds 23, 27 and 29.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from pathologies.field_case import (
    ANY,
    HE,
    UNJUDGED,
    batch,
    both,
    case,
    chain,
    classifier,
    cross_entropy,
    draw,
    either,
    finds,
    free_of,
    matrices,
    matrix,
    range_of,
    says,
    sound,
    t,
)

CASES = []

# Kind 23: names inside jit inside a loop


@jax.jit
def field(h, a):
    return t(h @ a, "field")


@case(CASES, 23, sound())
def name_in_jit_in_while_of_a_custom_rule():
    """A solver with a step size of its own; its adjoint solves backward, as diffrax's."""

    def solve_to(a, h, sign):
        def body(carry):
            time, h = carry
            return time + 0.1, h + sign * 0.1 * field(h, a)

        return lax.while_loop(lambda carry: carry[0] < 1.0, body, (0.0, h))[1]

    @jax.custom_vjp
    def solve(a, h):
        return solve_to(a, h, 1.0)

    def forward(a, h):
        return solve(a, h), (a, h)

    def backward(kept, g):
        a, h = kept
        g_start = solve_to(a.T, g, 1.0)
        return h.T @ g_start, g_start

    solve.defvjp(forward, backward)
    loss_fn, params, (x, y) = classifier(2, 16)

    def solved(params, x, y):
        return loss_fn(params, t(solve(params["a"], x), "end"), y)

    return solved, params | {"a": -0.5 * jnp.eye(16)}, (x, y), {}


@case(CASES, 23, finds("exploding_gradients", "field|h|end"))
def name_in_jit_in_fori_loop():
    """60 steps of factor 1.5 in a loop of known length, which JAX differentiates."""
    loss_fn, params, (x, y) = classifier(2, 16)

    def looped(params, x, y):
        h = lax.fori_loop(0, 60, lambda _, h: field(h, params["a"]), 1e-6 * x)
        return loss_fn(params, t(h, "end"), y)

    return looped, params | {"a": 1.5 * jnp.eye(16)}, (x, y), {}


@case(CASES, 23, sound())
def implicit_layer():
    """A fixed point found in a while loop that is not differentiated, and one step that is."""
    loss_fn, params, (x, y) = classifier(2, 16)
    params = params | {"a": matrix(5, 16, 16, 0.5)}

    def solved(params, x, y):
        a, start = lax.stop_gradient((params["a"], x))

        def body(carry):
            count, h, _ = carry
            new = jnp.tanh(field(h, a) + start)
            return count + 1, new, jnp.max(jnp.abs(new - h))

        def is_unfinished(carry):
            return (carry[0] < 50) & (carry[2] > 1e-4)

        first = jnp.int32(0), jnp.zeros_like(start), jnp.float32(1)
        _, h, _ = lax.while_loop(is_unfinished, body, first)
        return loss_fn(params, t(jnp.tanh(h @ params["a"] + x), "step"), y)

    return solved, params, (x, y), {}


@case(CASES, 23, sound())
def while_in_a_metric():
    """The loop computes a metric from the activations, which comes back as aux."""
    loss_fn, params, (x, y) = classifier(3, 32)

    def with_metric(params, x, y):
        h = x @ params["layers"][0]

        def body(carry):
            return carry[0] + 1, 0.5 * carry[1]

        count, _ = lax.while_loop(lambda c: jnp.max(jnp.abs(c[1])) > 0.1, body, (0, h))
        return loss_fn(params, x, y), count

    return with_metric, params, (x, y), {"has_aux": True}


# Kind 27: published models


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(64, name="fc1")(x))
        return nn.Dense(16, name="fc2_mean")(h), nn.Dense(16, name="fc2_logvar")(h)


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, z):
        return nn.Dense(64, name="fc2")(nn.relu(nn.Dense(64, name="fc1")(z)))


class FlaxVAE(nn.Module):
    """As in Flax's examples, smaller."""

    def setup(self):
        self.encoder, self.decoder = Encoder(), Decoder()

    def __call__(self, x, noise):
        mean, log_variance = self.encoder(x)
        z = mean + jnp.exp(0.5 * log_variance) * noise
        return self.decoder(z), mean, log_variance


def flax_vae(encoder_bias: float, decoder_bias: float) -> tuple:
    model, x = FlaxVAE(), jax.nn.sigmoid(draw(1, 32, 64))
    noise = draw(2, 32, 16)
    params = model.init(jax.random.key(0), x, noise)["params"]
    params["encoder"]["fc1"]["bias"] += encoder_bias
    params["decoder"]["fc1"]["bias"] += decoder_bias

    def loss_fn(params, x, noise):
        logits, mean, log_variance = model.apply({"params": params}, x, noise)
        binary = jnp.mean(jax.nn.softplus(logits) - x * logits, 0).sum()
        divergence = 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance)
        return binary + divergence.sum(-1).mean()

    return loss_fn, params, (x, noise), {}


def judges_layers(count: int):
    """At least so many layers were judged."""

    def right(diagnosis):
        if diagnosis.meta["layers"] >= count:
            return ""
        return f"{diagnosis.meta['layers']} layers judged, {count} are there"

    return right


@case(CASES, 27, both(sound(), judges_layers(4)))
def flax_vae_healthy():
    """On every path: encoder/fc1, a second layer, decoder/fc1, decoder/fc2."""
    return flax_vae(0.0, 0.0)


@case(CASES, 27, finds("dead_units", "encoder/fc1|encoder.fc1"))
def flax_vae_with_a_dead_encoder():
    return flax_vae(-20.0, 0.0)


@case(CASES, 27, finds("dead_units", "decoder/fc1|decoder.fc1"))
def flax_vae_with_a_dead_decoder():
    return flax_vae(0.0, -20.0)


class ActorCritic(nn.Module):
    """PureJaxRL's: two networks of one observation."""

    act: object = nn.tanh

    @nn.compact
    def __call__(self, x):
        def dense(n, gain, name):
            return nn.Dense(n, kernel_init=nn.initializers.orthogonal(gain), name=name)

        h = self.act(dense(64, HE, "actor0")(x))
        h = self.act(dense(64, HE, "actor1")(h))
        logits = dense(8, 0.1, "actor_out")(h)
        h = self.act(dense(64, HE, "critic0")(x))
        h = self.act(dense(64, HE, "critic1")(h))
        return logits, dense(1, 1.0, "critic_out")(h)[:, 0]


def ppo(act, change) -> tuple:
    model, (x, actions) = ActorCritic(act), batch()
    params = model.init(jax.random.key(0), x)["params"]
    change(params)

    def loss_fn(params, x, actions, advantages, returns):
        logits, value = model.apply({"params": params}, x)
        log_p = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(log_p, actions[:, None], 1)[:, 0]
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, -1).mean()
        return (
            -jnp.mean(chosen * advantages) + 0.5 * jnp.mean((value - returns) ** 2) - 0.01 * entropy
        )

    return loss_fn, params, (x, actions, draw(8, 32), draw(9, 32)), {}


@case(CASES, 27, both(finds("saturated_units", "actor"), free_of("untrained_layer")))
def ppo_with_a_saturated_actor():
    def change(params):
        params["actor0"]["kernel"] *= 30
        params["actor1"]["kernel"] *= 30

    return ppo(nn.tanh, change)


@case(CASES, 27, finds("dead_units", "^actor0|/actor0"))
def ppo_with_a_dead_actor():
    def change(params):
        params["actor0"]["bias"] -= 30

    return ppo(nn.relu, change)


@case(CASES, 27, sound())
def ppo_healthy():
    def change(params):
        pass

    return ppo(nn.tanh, change)


def score_network(gain: float) -> tuple:
    """Every layer adds the embedding of the time, made by an MLP of its own."""
    depth = 20
    params = {
        "time": matrices(1, 2, 32),
        "layers": matrices(2, depth, 64, gain),
        "shifts": [matrix(100 + i, 32, 64, 0.1) for i in range(depth)],
        "out": matrix(3, 64, 64),
    }

    def loss_fn(params, x, time, target):
        angles = time[:, None] * jnp.arange(1, 17)
        embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
        embedding = chain(params["time"], embedding, jax.nn.silu, "time")
        h = x
        for i, (w, shift) in enumerate(zip(params["layers"], params["shifts"], strict=True)):
            h = t(jax.nn.relu(h @ w + embedding @ shift), f"h{i}")
        return jnp.mean((t(h @ params["out"], "out") - target) ** 2)

    args = draw(4, 32, 64), jnp.linspace(0.0, 1.0, 32), draw(5, 32, 64)
    return loss_fn, params, args, {}


@case(CASES, 27, finds("exploding_gradients", "h" + range_of(13, 19), "weights_too_large"))
def score_network_exploding():
    return score_network(3 * HE)


@case(CASES, 27, sound())
def score_network_healthy():
    return score_network(HE)


def norm(h):
    return jax.nn.standardize(h)


def attention(p, h, memory, mask=None):
    """One head; queries from h, keys and values from the memory."""
    q, k, v = h @ p["q"], memory @ p["k"], memory @ p["v"]
    scores = q @ k.swapaxes(1, 2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = jnp.where(mask, scores, -1e9)
    return jax.nn.softmax(scores) @ v @ p["o"]


def attention_weights(seed: int, width: int, gain: float = 0.3) -> dict:
    names = {"q": 1.0, "k": 1.0, "v": 1.0, "o": gain}
    return {k: matrix(seed + i, width, width, g) for i, (k, g) in enumerate(names.items())}


def block_weights(seed: int, width: int, gain: float = 0.3, cross: bool = False) -> dict:
    weights = {
        "self": attention_weights(seed, width),
        "up": matrix(seed + 20, width, 2 * width),
        "down": matrix(seed + 21, 2 * width, width, gain),
    }
    if cross:
        weights["cross"] = attention_weights(seed + 10, width)
    return weights


def block(p, h, name, memory=None, mask=None):
    h = h + attention(p["self"], norm(h), norm(h), mask)
    if memory is not None:
        h = h + attention(p["cross"], norm(h), memory)
    return t(h + jax.nn.gelu(norm(h) @ p["up"]) @ p["down"], name)


def translator(factor: float) -> tuple:
    """An encoder of four blocks, a decoder of six; the MLP of the decoder's block 1 is scaled."""
    width, tokens, classes = 32, 6, 32
    params = {
        "embed": draw(1, classes, width),
        "encoder": [block_weights(100 * i, width) for i in range(1, 5)],
        "decoder": [block_weights(100 * i, width, cross=True) for i in range(5, 11)],
        "readout": matrix(2, width, classes),
    }
    params["decoder"][1]["down"] *= factor
    mask = jnp.tril(jnp.ones((tokens, tokens), bool))

    def loss_fn(params, sources, targets):
        memory, h = params["embed"][sources], params["embed"][targets]
        for i, p in enumerate(params["encoder"]):
            memory = block(p, memory, f"encoder{i}")
        memory = norm(memory)
        for i, p in enumerate(params["decoder"]):
            h = block(p, h, f"decoder{i}", memory, mask)
        return cross_entropy(norm(h) @ params["readout"], targets)

    tokens_of = jax.random.randint(jax.random.key(3), (2, 16, tokens), 0, classes)
    return loss_fn, params, (tokens_of[0], tokens_of[1]), {}


@case(
    CASES,
    27,
    finds("exploding_gradients exploding_activations residual_growth", "decoder1"),
)
def translator_with_a_large_block():
    return translator(1e5)


@case(CASES, 27, sound())
def translator_healthy():
    return translator(1.0)


def nano_gpt(std: float) -> tuple:
    """Tied embeddings of the given size; GPT-2 has 0.02."""
    width, tokens, classes = 32, 8, 64
    params = {
        "wte": std * draw(1, classes, width),
        "wpe": 0.02 * draw(2, tokens, width),
        "blocks": [block_weights(100 * i, width, 0.1) for i in range(1, 5)],
    }
    mask = jnp.tril(jnp.ones((tokens, tokens), bool))

    def loss_fn(params, x, y):
        h = params["wte"][x] + params["wpe"]
        for i, p in enumerate(params["blocks"]):
            h = block(p, h, f"block{i}", mask=mask)
        logits = t(norm(h) @ params["wte"].T, "logits")
        return cross_entropy(logits, y)

    tokens_of = jax.random.randint(jax.random.key(3), (2, 16, tokens), 0, classes)
    return loss_fn, params, (tokens_of[0], tokens_of[1]), {}


@case(
    CASES,
    27,
    either(
        finds(r"\w*(loss|logit)\w*"),
        finds(ANY, place="wte|embed|logits"),
        finds(ANY, text="chance|classes"),
    ),
)
def nano_gpt_with_large_embeddings():
    """Fifty times GPT-2's size in a model 24 times narrower: loss far above log 64."""
    return nano_gpt(5.0)


@case(CASES, 27, sound())
def nano_gpt_healthy():
    return nano_gpt(0.02)


# Kind 29: a short time


def gru(steps: int) -> tuple:
    width = 32
    params = {
        "gates": matrix(1, 2 * width, 2 * width, 1.4),
        "new": matrix(2, 2 * width, width, 0.9),
        "out": matrix(3, width, 8),
    }

    def loss_fn(params, x, y):
        def step(h, x):
            both = jnp.concatenate([h, x], -1)
            reset, keep = jnp.split(jax.nn.sigmoid(both @ params["gates"]), 2, -1)
            inner = jnp.concatenate([reset * h, x], -1)
            h = keep * h + (1 - keep) * jnp.tanh(inner @ params["new"])
            return t(h, "h"), None

        h, _ = lax.scan(step, jnp.zeros((32, width)), x)
        return cross_entropy(h @ params["out"], y)

    _, y = batch()
    return loss_fn, params, (draw(4, steps, 32, width), y), {}


HEDGED = says(UNJUDGED + "|how sure|certain|may be|depends on|the task")


@case(CASES, 29, both(HEDGED, either(finds("vanishing_gradients", "h"), sound())))
def gru_of_16_steps():
    """Some -8 nats over time: what the task needs of the past is unknown."""
    return gru(16)


@case(CASES, 29, finds("vanishing_gradients", r"h\[1\d\d\]"))
def gru_of_200_steps():
    return gru(200)
