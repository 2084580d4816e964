"""Whether a loss is the same function when it is traced again."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradjax.replay import source
from gradjax.replay.gradient import equations
from gradjax.taps.probe import Traced, trace


def what_changes(traced: Traced, loss_fn: Any, params: Any, args: tuple, has_aux: bool) -> str:
    """What differs between two traces of the loss: keys or numbers drawn outside of it."""
    again = trace(loss_fn, params, args, has_aux, "find_nonfinite", needs_names=False)
    for (eqn, _), (other, _) in zip(equations(traced.jaxpr), equations(again.jaxpr), strict=False):
        if eqn.primitive.name != other.primitive.name or not _same_literals(eqn, other):
            places = source.lines([eqn])
            place = f" at {places[0]}" if places else ""
            return (
                "The loss is not the same function when it is traced twice: "
                f"{eqn.primitive.name}{place} differs. Pass keys and random numbers as arguments."
            )
    pairs = list(zip(traced.jaxpr.consts, again.jaxpr.consts, strict=False))
    for a, b in pairs:
        if np.shape(a) != np.shape(b) or not _equal(a, b):
            return (
                "The loss is not the same function when it is traced twice: an array of shape "
                f"{np.shape(a)} that it holds differs. Pass keys and random numbers as arguments."
            )
    return ""


def _same_literals(eqn: Any, other: Any) -> bool:
    for a, b in zip(eqn.invars, other.invars, strict=False):
        if hasattr(a, "val") != hasattr(b, "val"):
            return False
        if hasattr(a, "val") and not _equal(a.val, b.val):
            return False
    return True


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if jnp.issubdtype(jnp.asarray(a).dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    x, y = np.asarray(a), np.asarray(b)
    has_nan = jnp.issubdtype(x.dtype, jnp.inexact)
    return bool(np.array_equal(x, y, equal_nan=has_nan))
