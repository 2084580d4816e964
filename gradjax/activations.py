"""Activation functions by name: elementwise phi, real -> real, as `jax.nn` and `jax.scipy` have them.

`ACTIVATIONS` is the one place that knows the names; a new activation is one line.
"""

from collections.abc import Callable

import jax
from jax import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "linear": lambda x: x,
    "tanh": jax.numpy.tanh,
    "hard_tanh": jax.nn.hard_tanh,
    "erf": jax.scipy.special.erf,
    "sigmoid": jax.nn.sigmoid,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
}
