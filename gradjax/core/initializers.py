"""Initialisers with a scale that may be traced; what `jax.nn.initializers` has is taken from there.

    gaussian:          W_ij ~ N(0, sigma_w^2 / fan_in)              Poole et al. 2016, eq. 2
    orthogonal:        W = sigma_w * Q, Q^T Q = I                   Saxe et al. 2013
    delta_orthogonal:  that at the centre of a convolution, else 0  Xiao et al. 2018, alg. 1
    identity:          W = sigma_w * I                              Le et al. 2015 (IRNN)
    uniform:           W_ij ~ sigma_w * U(-0.05, 0.05)              a default of early libraries
    glorot_*:          Var W = 2 sigma_w^2 / (fan_in + fan_out)     Glorot & Bengio 2010
    he_*:              Var W = 2 sigma_w^2 / fan_in                 He et al. 2015
    lecun_*:           Var W = sigma_w^2 / fan_in                   LeCun et al. 1998
    bias:              b_i ~ N(0, sigma_b^2)

So sigma_w = 1 is the rule as published; JAX truncates the *_normal ones at two deviations. Each is
a function `init(key, shape, dtype)` on kernels of shape (..., fan_in, fan_out) as Flax stores them,
the spatial axes of a convolution first.

References (arXiv): Poole 1606.05340, Saxe 1312.6120, Xiao 1806.05393, Le 1504.00941, He 1502.01852.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import initializers
from jax.nn.initializers import Initializer


def gaussian(sigma_w: float | Array) -> Initializer:
    """Kernel entries N(0, sigma_w^2 / fan_in); `sigma_w` may be a traced value."""

    def init(key, shape, dtype: Any = jnp.float32, out_sharding: Any = None):
        fan_in = math.prod(shape[:-1])
        return jax.random.normal(key, shape, dtype) * jnp.asarray(
            sigma_w / math.sqrt(fan_in), dtype
        )

    return init


def orthogonal(sigma_w: float | Array) -> Initializer:
    """Kernel sigma_w * Q with orthonormal rows or columns, whichever are fewer.

    `sigma_w` may be a traced value. A map to more dimensions is scaled by sqrt(fan_out / fan_in),
    so that the mean square per unit grows by sigma_w^2 as it does for `gaussian`, whatever the
    shape.
    """
    unit = initializers.orthogonal()

    def init(key, shape, dtype: Any = jnp.float32, out_sharding: Any = None):
        widening = math.sqrt(max(shape[-1] / math.prod(shape[:-1]), 1.0))
        # Seeds are drawn sequentially: two batched QR at a time wait for each other forever on two
        # cores (jaxlib 0.10.2).
        draw = jax.custom_batching.sequential_vmap(lambda key: unit(key, shape, dtype))
        return draw(key) * jnp.asarray(sigma_w * widening, dtype)

    return init


def at_centre(matrix: Initializer) -> Initializer:
    """A convolution that is a matrix (channels in, channels out) at its centre, and 0 elsewhere."""

    def init(key, shape, dtype: Any = jnp.float32, out_sharding: Any = None):
        centre = tuple((size - 1) // 2 for size in shape[:-2])
        return jnp.zeros(shape, dtype).at[centre].set(matrix(key, shape[-2:], dtype))

    return init


def delta_orthogonal(sigma_w: float | Array) -> Initializer:
    """`orthogonal` at the centre of a convolution; for a matrix, `orthogonal` itself.

    JAX's initialiser of this name needs spatial axes and no fewer channels out than in.
    """
    return at_centre(orthogonal(sigma_w))


def identity(sigma_w: float | Array) -> Initializer:
    """sigma_w times the identity.

    Between unequal widths the first entries pass; the others are cut off or start at 0.
    """

    def eye(key, shape, dtype: Any = jnp.float32, out_sharding: Any = None):
        return jnp.eye(*shape, dtype=dtype)

    return at_centre(times(eye)(sigma_w))


def times(rule: Initializer) -> Callable[[float | Array], Initializer]:
    """sigma_w -> the rule times sigma_w, which may be a traced value."""

    def scaled(sigma_w: float | Array) -> Initializer:
        def init(key, shape, dtype: Any = jnp.float32, out_sharding: Any = None):
            return rule(key, shape, dtype) * jnp.asarray(sigma_w, dtype)

        return init

    return scaled


def _uniform(key, shape, dtype: Any = jnp.float32, out_sharding: Any = None):
    return jax.random.uniform(key, shape, dtype, -0.05, 0.05)


def bias(sigma_b: float | Array) -> Initializer:
    """Bias entries N(0, sigma_b^2); `sigma_b` may be a traced value."""

    def init(key, shape, dtype: Any = jnp.float32, out_sharding: Any = None):
        return jax.random.normal(key, shape, dtype) * jnp.asarray(sigma_b, dtype)

    return init


WEIGHTS: dict[str, Callable[[float | Array], Initializer]] = {
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    # scaled by the data where the kernel is made (gradjax.experiment.models.layers)
    "lsuv": lambda sigma_w: orthogonal(1.0),
    "delta_orthogonal": delta_orthogonal,
    "identity": identity,
    "uniform": times(_uniform),
    "glorot_normal": times(initializers.glorot_normal()),
    "glorot_uniform": times(initializers.glorot_uniform()),
    "he_normal": times(initializers.he_normal()),
    "he_uniform": times(initializers.he_uniform()),
    "lecun_normal": times(initializers.lecun_normal()),
    "lecun_uniform": times(initializers.lecun_uniform()),
}
