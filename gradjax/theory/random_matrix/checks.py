"""Ranges and options checked on the host, and one dtype for all arguments."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

WEIGHTS = ("gaussian", "orthogonal")


def within(
    name: str, value: Any, low: float, high: float = np.inf, *, closed: bool = True
) -> Array:
    """`value` as a floating array; tracers pass unchecked.

    Args:
      name: of the argument, for the message.
      value: scalar or array.
      low: lower end of the range, which belongs to it if `closed`.
      high: upper end, which belongs to the range.
      closed: whether the lower end belongs to the range.

    Raises:
      ValueError: if a value lies outside its range.
    """
    if not isinstance(value, Tracer):
        x = np.asarray(value)
        above = x >= low if closed else x > low
        if not np.all(above & (x <= high)):
            left = "[" if closed else "("
            raise ValueError(
                f"random_matrix: {name} = {value}; it must lie in {left}{low}, {high}]."
            )
    # A Python number stays weakly typed, so that it follows the other arguments.
    x = jnp.asarray(float(value) if isinstance(value, int) else value)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.result_type(float))


def choose(name: str, value: str, options: Sequence[str]) -> None:
    """Raise a ValueError that lists the options unless `value` is one of them."""
    if value not in options:
        raise ValueError(
            f"random_matrix: unknown {name} {value!r}; choose one of {', '.join(options)}."
        )


def common(*values: Array) -> list[Array]:
    """All values in the widest dtype among them; weakly typed Python numbers follow."""
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*values)
    return [x.astype(dtype) for x in values]
