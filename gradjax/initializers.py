"""Initialisers that `jax.nn.initializers` lacks: the mean-field parametrisation with a scale that may be traced.

    Gaussian:    W_ij ~ N(0, sigma_w^2 / fan_in)                   (Poole et al. 2016, arXiv 1606.05340, eq. 2)
    orthogonal:  W = sigma_w * Q, Q^T Q = I                        (Saxe et al. 2013, arXiv 1312.6120)
    bias:        b_i ~ N(0, sigma_b^2)

Each is a function `init(key, shape, dtype)` on kernels of shape (..., fan_in, fan_out) as Flax stores them.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import Initializer


def gaussian(sigma_w: float | Array) -> Initializer:
    """Kernel entries N(0, sigma_w^2 / fan_in); `sigma_w` may be a traced value."""

    def init(key, shape, dtype: Any = jnp.float32, out_sharding: Any = None):
        fan_in = math.prod(shape[:-1])
        return jax.random.normal(key, shape, dtype) * jnp.asarray(sigma_w / math.sqrt(fan_in), dtype)

    return init


def orthogonal(sigma_w: float | Array) -> Initializer:
    """Kernel sigma_w * Q with orthonormal rows or columns, whichever is shorter; `sigma_w` may be a traced value.

    A map to more dimensions is scaled by sqrt(fan_out / fan_in), so that the mean square per unit grows by sigma_w^2
    as it does for `gaussian`, whatever the shape.
    """
    unit = jax.nn.initializers.orthogonal()

    def init(key, shape, dtype: Any = jnp.float32, out_sharding: Any = None):
        widening = math.sqrt(max(shape[-1] / math.prod(shape[:-1]), 1.0))
        return unit(key, shape, dtype) * jnp.asarray(sigma_w * widening, dtype)

    return init


def bias(sigma_b: float | Array) -> Initializer:
    """Bias entries N(0, sigma_b^2); `sigma_b` may be a traced value."""

    def init(key, shape, dtype: Any = jnp.float32, out_sharding: Any = None):
        return jax.random.normal(key, shape, dtype) * jnp.asarray(sigma_b, dtype)

    return init


# lsuv is scaled by the data where the kernel is made (gradjax.models.layers)
WEIGHTS = {"gaussian": gaussian, "orthogonal": orthogonal, "lsuv": lambda sigma_w: orthogonal(1.0)}
