"""Section B of the field: broken programs whose main road is not a single chain, kinds 5 to 8, each
with healthy twins.

A sigmoid layer with LeCun's weights multiplies the gradient by 0.24, a ReLU layer with three times
He's weights by 3.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pathologies.field_case import (
    HE,
    batch,
    case,
    chain,
    cross_entropy,
    draw,
    finds,
    matrices,
    matrix,
    range_of,
    sound,
    t,
)

CASES = []
DEPTH = 30
# Every layer contributes, so it starts at the last hidden layer, give or take chance.
LATE = range_of(23, 29)
EXPLODES = "exploding_gradients"
VANISHES = "vanishing_gradients"


class Sickness(NamedTuple):
    """How a road of `DEPTH` layers is made."""

    gain: float
    act: object


SIGMOID = Sickness(1.0, jax.nn.sigmoid)
TRIPLED = Sickness(3 * HE, jax.nn.relu)
SMALL = Sickness(0.4 * HE, jax.nn.relu)
SOUND = Sickness(HE, jax.nn.relu)


def road(kind: Sickness, seed: int = 1, depth: int = DEPTH, width: int = 64) -> list[Array]:
    return matrices(seed, depth, width, kind.gain)


# Kind 5: one more term of loss


def with_penalty(kind: Sickness, factor: float = 1e-4) -> tuple:
    params = {"layers": road(kind), "readout": matrix(9, 64, 8)}

    def loss_fn(params, x, y):
        h = t(kind.act(x @ params["layers"][0]), "h0")
        penalty = jnp.mean(h**2)
        for i, w in enumerate(params["layers"][1:], 1):
            h = t(kind.act(h @ w), f"h{i}")
        logits = t(h @ params["readout"], "logits")
        return cross_entropy(logits, y) + factor * penalty

    return loss_fn, params, batch(), {}


@case(CASES, 5, finds(VANISHES, "h" + LATE, "activation_slope"))
def penalty_on_a_vanishing_chain():
    return with_penalty(SIGMOID)


@case(CASES, 5, finds(EXPLODES, "h" + LATE, "weights_too_large"))
def penalty_on_an_exploding_chain():
    return with_penalty(TRIPLED)


@case(CASES, 5, sound())
def penalty_on_a_healthy_chain():
    return with_penalty(SOUND)


@case(CASES, 5, finds(VANISHES, "h" + LATE, "activation_slope"))
def weight_decay_and_two_penalties():
    """Also an entropy bonus on the logits, and weight decay."""
    inner, params, args, _ = with_penalty(SIGMOID)

    def loss_fn(params, x, y):
        squares = [jnp.sum(w**2) for w in jax.tree.leaves(params)]
        first = jax.nn.sigmoid(x @ params["layers"][0])
        return inner(params, x, y) + 1e-4 * sum(squares) + 1e-3 * jnp.mean(jnp.abs(first))

    return loss_fn, params, args, {}


# Kind 6: towers


def vae(kind: Sickness) -> tuple:
    params = {
        "encoder": road(SOUND, 1, 3),
        "mean": matrix(2, 64, 64),
        "log_variance": matrix(3, 64, 64, 0.1),
        "decoder": road(kind, 4),
        "readout": matrix(5, 64, 64),
    }

    def loss_fn(params, x, noise):
        h = chain(params["encoder"], x, name="encoder")
        mean = t(h @ params["mean"], "mean")
        log_variance = t(h @ params["log_variance"], "log_variance")
        z = t(mean + jnp.exp(0.5 * log_variance) * noise, "z")
        h = chain(params["decoder"], z, kind.act, "decoder")
        reconstruction = jnp.mean((t(h @ params["readout"], "image") - x) ** 2)
        divergence = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1 - log_variance)
        return reconstruction + divergence

    return loss_fn, params, (draw(6, 32, 64), draw(7, 32, 64)), {}


@case(CASES, 6, finds(VANISHES, "decoder" + LATE, "activation_slope"))
def vae_with_a_vanishing_decoder():
    return vae(SIGMOID)


@case(CASES, 6, sound())
def vae_healthy():
    return vae(SOUND)


def two_towers(kind: Sickness, actor_first: bool = True) -> tuple:
    """Policy gradient with a baseline: the actor's and the critic's terms of one loss."""
    params = {
        "actor": road(kind, 1),
        "policy": matrix(2, 64, 8),
        "critic": road(SOUND, 3, 6),
        "value": matrix(4, 64, 1),
    }
    x, actions = batch()

    def loss_fn(params, x, actions, advantages, returns):
        def policy():
            h = chain(params["actor"], x, kind.act, "actor")
            log_p = jax.nn.log_softmax(t(h @ params["policy"], "policy"))
            chosen = jnp.take_along_axis(log_p, actions[:, None], 1)[:, 0]
            return -jnp.mean(chosen * advantages)

        def value():
            h = chain(params["critic"], x, name="critic")
            return jnp.mean((t(h @ params["value"], "value")[:, 0] - returns) ** 2)

        if actor_first:
            return policy() + 0.5 * value()
        return 0.5 * value() + policy()

    return loss_fn, params, (x, actions, draw(8, 32), draw(9, 32)), {}


@case(CASES, 6, finds(VANISHES, "actor" + LATE, "activation_slope"))
def actor_vanishes_beside_a_critic():
    return two_towers(SIGMOID)


@case(CASES, 6, finds(EXPLODES, "actor" + LATE, "weights_too_large"))
def actor_explodes_beside_a_critic():
    return two_towers(TRIPLED, actor_first=False)


@case(CASES, 6, sound())
def actor_and_critic_healthy():
    return two_towers(SOUND)


@case(CASES, 6, finds(VANISHES, "image" + LATE, "activation_slope"))
def clip_image_tower_vanishes():
    params = {"image": road(SIGMOID, 1), "text": road(SOUND, 2, 6)}

    def unit(h):
        return h / jnp.linalg.norm(h, axis=-1, keepdims=True)

    def loss_fn(params, images, texts):
        image = unit(chain(params["image"], images, jax.nn.sigmoid, "image"))
        text = unit(chain(params["text"], texts, name="text"))
        logits = 10 * image @ text.T
        labels = jnp.arange(len(logits))
        return 0.5 * (cross_entropy(logits, labels) + cross_entropy(logits.T, labels))

    return loss_fn, params, (draw(3, 32, 64), draw(4, 32, 64)), {}


def unet(kind: Sickness) -> tuple:
    params = {
        "down": matrix(1, 64, 64, HE),
        "inner": road(kind, 2),
        "up": matrix(3, 128, 64, HE),
        "out": matrix(4, 64, 64),
    }

    def loss_fn(params, x, target):
        skip = t(jax.nn.relu(x @ params["down"]), "down")
        h = chain(params["inner"], skip, kind.act, "inner")
        both = jnp.concatenate([skip, h], axis=-1)
        h = t(jax.nn.relu(both @ params["up"]), "up")
        return jnp.mean((t(h @ params["out"], "out") - target) ** 2)

    return loss_fn, params, (draw(5, 32, 64), draw(6, 32, 64)), {}


@case(CASES, 6, finds(VANISHES, "inner" + LATE, "activation_slope"))
def unet_with_a_vanishing_inner_path():
    return unet(SIGMOID)


@case(CASES, 6, finds(EXPLODES, "inner" + LATE, "weights_too_large"))
def unet_with_an_exploding_inner_path():
    return unet(TRIPLED)


@case(CASES, 6, sound())
def unet_healthy():
    return unet(SOUND)


# Kind 7: something of every layer reaches the loss


def mixture_of_experts(gain: float, depth: int = 24) -> tuple:
    """Two experts per layer, mixed, and a balance loss of each router."""
    params = {
        "experts": [matrices(10 + i, 2, 64, gain * 2**0.5) for i in range(depth)],
        "routers": [matrix(500 + i, 64, 2, 0.1) for i in range(depth)],
        "readout": matrix(9, 64, 8),
    }

    def loss_fn(params, x, y):
        h, balance = x, 0.0
        layers = zip(params["experts"], params["routers"], strict=True)
        for i, (experts, router) in enumerate(layers):
            normed = h * lax.rsqrt(jnp.mean(lax.stop_gradient(h) ** 2))
            gates = jax.nn.softmax(normed @ router)
            outs = jnp.stack([jax.nn.relu(h @ w) for w in experts], -1)
            h = t(jnp.sum(outs * gates[:, None], -1), f"moe{i}")
            balance += jnp.sum(jnp.mean(gates, 0) ** 2)
        logits = t(h @ params["readout"], "logits")
        return cross_entropy(logits, y) + 1e-2 * balance

    return loss_fn, params, batch(), {}


@case(CASES, 7, finds(EXPLODES, "moe" + range_of(17, 23), "weights_too_large"))
def moe_balance_loss_exploding():
    return mixture_of_experts(3 * HE)


@case(CASES, 7, sound())
def moe_balance_loss_healthy():
    return mixture_of_experts(1.2)


def scan_with_outputs(kind: Sickness) -> tuple:
    """Every iteration returns the size of its activations, which the loss penalises."""
    params = {"layers": jnp.stack(road(kind)), "readout": matrix(9, 64, 8)}

    def loss_fn(params, x, y):
        def layer(h, w):
            h = t(kind.act(h @ w), "h")
            return h, jnp.mean(h**2)

        h, sizes = lax.scan(layer, x, params["layers"])
        return cross_entropy(h @ params["readout"], y) + 1e-5 * jnp.sum(sizes)

    return loss_fn, params, batch(), {}


@case(CASES, 7, finds(VANISHES, r"h\[" + LATE, "activation_slope"))
def scan_outputs_in_the_loss_vanishing():
    return scan_with_outputs(SIGMOID)


@case(CASES, 7, finds(EXPLODES, r"h\[" + LATE, "weights_too_large"))
def scan_outputs_in_the_loss_exploding():
    return scan_with_outputs(TRIPLED)


@case(CASES, 7, sound())
def scan_outputs_in_the_loss_healthy():
    return scan_with_outputs(SOUND)


def every_layer_read(kind: Sickness, factor: float) -> tuple:
    """Jumping knowledge: the head reads the last layer, and the sum of all times a factor."""
    params = {"layers": road(kind), "readout": matrix(9, 64, 8)}

    def loss_fn(params, x, y):
        h, total = x, 0.0
        for i, w in enumerate(params["layers"]):
            h = t(kind.act(h @ w), f"h{i}")
            total += factor * h
        return cross_entropy(t((h + total) @ params["readout"], "logits"), y)

    return loss_fn, params, batch(), {}


@case(CASES, 7, finds(VANISHES, "h" + LATE, "activation_slope"))
def jumping_knowledge_vanishing():
    return every_layer_read(SIGMOID, 1e-6)


@case(CASES, 7, sound())
def jumping_knowledge_healthy():
    return every_layer_read(SOUND, 0.1)


def half_gradient(h: Array) -> Array:
    """The value as it is, half of its gradient (MuZero's scaling)."""
    return 0.5 * h + lax.stop_gradient(0.5 * h)


def deep_supervision(factor: float) -> tuple:
    """A head after every layer. The gradient of each is halved at every layer below."""
    depth = 24
    params = {
        "layers": road(SOUND, 1, depth),
        "heads": [matrix(500 + i, 64, 8) for i in range(depth)],
    }

    def loss_fn(params, x, y):
        h, loss = x, 0.0
        for i, (w, head) in enumerate(zip(params["layers"], params["heads"], strict=True)):
            h = t(jax.nn.relu(half_gradient(h) @ w), f"h{i}")
            weight = 1.0 if i == depth - 1 else factor
            loss += weight * cross_entropy(t(h @ head, f"head{i}"), y)
        return loss

    return loss_fn, params, batch(), {}


@case(CASES, 7, sound())
def deep_supervision_with_full_weight():
    return deep_supervision(1.0)


@case(CASES, 7, finds(VANISHES, "h" + range_of(17, 23)))
def deep_supervision_with_tiny_weight():
    return deep_supervision(1e-8)


# Kind 8: loops over the batch


def loss_of(params, x, y, act):
    h = chain(params["layers"], x, act)
    return cross_entropy(t(h @ params["readout"], "logits"), y)


def microbatches(kind: Sickness) -> tuple:
    params = {"layers": road(kind), "readout": matrix(9, 64, 8)}
    x, y = batch()

    def loss_fn(params, x, y):
        def add(total, part):
            return total + loss_of(params, *part, kind.act), None

        parts = x.reshape(4, 8, 64), y.reshape(4, 8)
        total, _ = lax.scan(add, 0.0, parts)
        return total / 4

    return loss_fn, params, (x, y), {}


@case(CASES, 8, finds(EXPLODES, "h" + LATE, "weights_too_large"))
def microbatches_by_scan_exploding():
    return microbatches(TRIPLED)


@case(CASES, 8, finds(VANISHES, "h" + LATE, "activation_slope"))
def microbatches_by_scan_vanishing():
    return microbatches(SIGMOID)


@case(CASES, 8, sound())
def microbatches_by_scan_healthy():
    return microbatches(SOUND)


def examples(kind: Sickness, over) -> tuple:
    """One example at a time, by `lax.map` or `vmap`."""
    params = {"layers": road(kind), "readout": matrix(9, 64, 8)}

    def loss_fn(params, x, y):
        def each(example):
            return loss_of(params, *example, kind.act)

        return jnp.mean(over(each, (x, y)))

    return loss_fn, params, batch(), {}


def by_vmap(function, xs):
    return jax.vmap(function)(xs)


@case(CASES, 8, finds(EXPLODES, "h" + LATE, "weights_too_large"))
def examples_by_map_exploding():
    return examples(TRIPLED, lax.map)


@case(CASES, 8, finds(VANISHES, "h" + LATE, "activation_slope"))
def examples_by_vmap_vanishing():
    return examples(SIGMOID, by_vmap)


@case(CASES, 8, sound())
def examples_by_map_healthy():
    return examples(SOUND, lax.map)
