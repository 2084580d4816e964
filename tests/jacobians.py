"""Small networks, their Jacobians in float64, and operators as matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gradjax import matrix_free
from gradjax.core.step import is_links, layer_jacobians


def tanh_step(h, w):
    return jnp.tanh(w @ h)


def linear_step(h, w):
    return w @ h


def gaussian(key, depth, n, gain=1.2):
    return gain / n**0.5 * jax.random.normal(key, (depth, n, n))


def dense(layers):
    """The product in float64 of layer Jacobians applied first to last."""
    product = np.eye(layers[0].shape[1])
    for layer in layers:
        product = np.asarray(layer, np.float64) @ product
    return product


def tanh_jacobian(h, weights):
    """The Jacobian of scanned `tanh_step`, by hand in NumPy float64."""
    h, product = np.asarray(h, np.float64), np.eye(np.size(h))
    for w in np.asarray(weights, np.float64):
        h = np.tanh(w @ h)
        product = (1 - h[:, None] ** 2) * (w @ product)
    return product


def singular_values(jacobian):
    return np.linalg.svd(jacobian, compute_uv=False)


def jacobian_of(step, h, thetas=None):
    """The product of `layer_jacobians` in float64."""
    layers = jax.jit(lambda h: layer_jacobians(step, h, thetas))(h)
    return dense([np.asarray(x.astype(jnp.float32)) for x in layers])


def compiled(function, *args, key, **options):
    """`function(*args, key=key, **options)` as one compiled program."""
    return jax.jit(lambda key: function(*args, key=key, **options))(key)


def flat(rows):
    """(k, N) of a pytree with leading axes k."""
    return np.concatenate(
        [np.asarray(x, np.float64).reshape(x.shape[0], -1) for x in jax.tree.leaves(rows)], axis=1
    )


@functools.partial(jax.jit, static_argnames=("step", "k", "block_size", "num_iters"))
def _top(step, h0, thetas, key, **options):
    return matrix_free.top_singular_values(step, h0, thetas, key=key, **options)


def top_of(step, h0, thetas=None, *, key, **options):
    """`top_singular_values` compiled, once per step and shapes; links are not hashable and are
    closed over."""
    if is_links(step):
        return jax.jit(
            lambda h0, key: matrix_free.top_singular_values(step, h0, key=key, **options)
        )(h0, key)
    return _top(step, h0, thetas, key, **options)
