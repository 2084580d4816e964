"""What recurrent networks and transformers share: their inputs, and what neither of them can do."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gradjax.experiment.schema import Model


def sequence_of(x: Array, num_outputs: int) -> Array:
    """(seq_len, ..., features) of (..., seq_len, features), or of tokens (..., seq_len).

    Tokens become one-hot vectors of `num_outputs` symbols with mean square 1.
    """
    if jnp.issubdtype(x.dtype, jnp.integer):
        x = jax.nn.one_hot(x, num_outputs, dtype=jnp.float32) * num_outputs**0.5
    return jnp.moveaxis(x, -2, 0)


def no_batchnorm(model: Model) -> str:
    """Why a sequence model cannot use BatchNorm; empty where none is asked for."""
    if model.normalization != "batchnorm":
        return ""
    return (
        "models: a sequence model has no batchnorm, whose averages would differ from step to step "
        "in time; choose model.normalization = 'layernorm', 'rmsnorm' or 'none'."
    )


def check_sequences(name: str, model: Any, x: Array) -> None:
    """Check the settings and the inputs of the sequence model called `name`.

    Raises:
      ValueError: settings that `model.check_compatible` rejects, or examples that are no sequences.
    """
    if reason := model.check_compatible(model):
        raise ValueError(reason)
    if x.ndim != (2 if jnp.issubdtype(x.dtype, jnp.integer) else 3):
        raise ValueError(
            f"models: {name} needs sequences (batch, seq_len, features), or tokens "
            f"(batch, seq_len), and got {x.dtype} of shape {tuple(x.shape)}; choose a task of "
            "sequences, as task.name = 'sequential_digits'."
        )
