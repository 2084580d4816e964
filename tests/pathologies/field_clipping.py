"""Section C of the field: clipping is judged where it stands, kind 20."""

import jax.numpy as jnp
import optax

from gradjax import transforms
from pathologies.field_case import case, classifier, finds, sound

CASES = []


def problem(tx, big: float = 1.0, **options) -> tuple:
    """A small classifier with one more leaf, whose gradient has the norm `big`.

    Without it the norm of the gradient is about 2.
    """
    inner, params, args = classifier(2)
    params = {"layers": params, "big": jnp.zeros(4)}

    def loss_fn(params, x, y):
        return inner(params["layers"], x, y) + 0.5 * big * jnp.sum(params["big"])

    return loss_fn, params, args, {"tx": tx, **options}


ALWAYS = finds("clipping_always", cause="threshold")
NEVER = finds("clipping_never", cause="threshold")


@case(CASES, 20, NEVER)
def clip_behind_a_tiny_rate():
    return problem(optax.chain(optax.sgd(1e-6), optax.clip_by_global_norm(1.0)))


@case(CASES, 20, ALWAYS)
def clip_behind_a_large_factor():
    """The gradient's norm is above 10, its millionfold above 1e7."""
    scaled = optax.chain(optax.scale(1e6), optax.clip_by_global_norm(1e7), optax.sgd(1e-10))
    return problem(scaled, big=20.0)


@case(CASES, 20, NEVER)
def clip_of_one_small_leaf():
    mask = {"layers": True, "big": False}
    tx = optax.chain(optax.masked(optax.clip_by_global_norm(50.0), mask), optax.sgd(1e-4))
    return problem(tx, big=1000.0)


@case(CASES, 20, ALWAYS)
def clip_inside_partition():
    rules = {
        "clipped": optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1e-2)),
        "free": optax.sgd(1e-4),
    }
    labels = {"layers": "clipped", "big": "free"}
    return problem(optax.partition(rules, labels))


@case(CASES, 20, ALWAYS)
def clip_with_injected_threshold():
    clip = optax.inject_hyperparams(optax.clip_by_global_norm)(max_norm=1e-3)
    return problem(optax.chain(clip, optax.sgd(1e-2)))


@case(CASES, 20, ALWAYS)
def clip_of_each_layer():
    return problem(optax.chain(transforms.clip_by_layer_norm(1e-6), optax.sgd(1e-2)))


@case(CASES, 20, ALWAYS)
def clip_of_block_rms():
    """Optax's own rule for each leaf."""
    return problem(optax.chain(optax.clip_by_block_rms(1e-7), optax.sgd(1e-2)))


@case(CASES, 20, NEVER)
def clip_of_each_layer_far_above():
    return problem(optax.chain(transforms.clip_by_layer_norm(1e6), optax.sgd(1e-2)))


@case(CASES, 20, ALWAYS)
def clip_behind_adam():
    """Adam's update has entries of 1 before the rate, so that the norm is about 90."""
    tx = optax.chain(optax.scale_by_adam(), optax.clip_by_global_norm(5.0), optax.scale(-1e-3))
    return problem(tx, big=0.01)


@case(CASES, 20, sound())
def clip_now_and_then():
    """The norm falls from above the threshold to below within the steps."""
    inner, params, args = classifier(2)
    params = {"layers": params, "centre": jnp.full(4, 5.0)}

    def loss_fn(params, x, y):
        return 1e-3 * inner(params["layers"], x, y) + 0.5 * jnp.sum(params["centre"] ** 2)

    tx = optax.chain(optax.clip_by_global_norm(5.0), optax.sgd(0.2))
    return loss_fn, params, args, {"tx": tx}
