"""A regression that a network of the same shape can learn: the teacher is a random tanh network.

    x ~ N(0, 1) of 1000 features,   y = W_2 tanh(W_1 x),   W ~ N(0, 1 / fan_in)

Each output is standardised over the examples, so that the squared error of a constant is 1 and R^2
= 1 - loss.
"""

import jax
import jax.numpy as jnp
from jax import Array

FEATURES, HIDDEN, OUTPUTS = 1000, 100, 10


def teacher(key: Array, num_examples: int = 10_000) -> tuple[Array, Array]:
    """Examples of one random teacher.

    Args:
      key: PRNG key of the teacher and of the inputs.
      num_examples: 10,000 by default, ten per feature: with fewer examples than features, no
        student can find the teacher.

    Returns:
      x float32 (num_examples, 1000) and y float32 (num_examples, 10), of mean 0 and variance 1 per
      output.

    >>> x, y = teacher(jax.random.key(0), 50)
    >>> x.shape, y.shape
    ((50, 1000), (50, 10))
    """
    first, second, inputs = jax.random.split(key, 3)
    x = jax.random.normal(inputs, (num_examples, FEATURES), jnp.float32)
    hidden = jnp.tanh(x @ jax.random.normal(first, (FEATURES, HIDDEN), jnp.float32) / FEATURES**0.5)
    y = hidden @ jax.random.normal(second, (HIDDEN, OUTPUTS), jnp.float32) / HIDDEN**0.5
    y = y - jnp.mean(y, axis=0, keepdims=True)
    return x, y / jnp.std(y, axis=0, keepdims=True)
