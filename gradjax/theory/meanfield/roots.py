"""Evaluation over arrays with domain checks, and bracketed roots, which give the fixed points."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer

from gradjax.core.activations import Phi, resolve
from gradjax.theory.gaussian import smallest

Number = float | Array | np.ndarray | Sequence[float]
Name = str | Phi

# Lengths above this are inf.
LARGEST = 1e8
LENGTHS = np.concatenate([[0.0], np.logspace(-12, np.log10(LARGEST), 121)])
# Points solved at once: they share the memory, and all wait for the longest search among them.
_BATCH = 256

# name -> (lowest, highest, whether the ends belong to the domain)
_DOMAIN = {
    "sigma_w": (0.0, np.inf, False, False),
    "sigma_b": (0.0, np.inf, True, False),
    "sigma_v": (0.0, np.inf, True, False),
    "sigma_a": (0.0, np.inf, True, False),
    "dropout": (0.0, 1.0, True, False),
    "q": (0.0, np.inf, True, False),
    "q0": (0.0, np.inf, False, False),
    "p": (0.0, np.inf, True, False),
    "c": (-1.0, 1.0, True, True),
    "batch": (2.0, np.inf, False, False),
}


def _check(name: str, value: Any) -> None:
    if name not in _DOMAIN or isinstance(value, Tracer):
        return
    low, high, with_low, with_high = _DOMAIN[name]
    x = np.asarray(value, float)
    if not np.all((x >= low if with_low else x > low) & (x <= high if with_high else x < high)):
        left, right = "[" if with_low else "(", "]" if with_high else ")"
        raise ValueError(
            f"meanfield: got {name} = {value}; it must lie in {left}{low:g}, {high:g}{right}."
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _map(scalar: Callable, static: tuple, numbers: tuple[Array, ...]) -> Any:
    def f(xs):
        return scalar(*static, *xs)

    if not numbers[0].ndim:
        return f(numbers)
    shape = numbers[0].shape
    flat = tuple(x.ravel() for x in numbers)
    out = jax.vmap(f)(flat) if flat[0].size <= _BATCH else lax.map(f, flat, batch_size=_BATCH)
    return jax.tree.map(lambda x: x.reshape(shape + x.shape[1:]), out)


def elementwise(scalar: Callable, static: tuple, **numbers: Number) -> Any:
    """`scalar(*static, *numbers)` over the broadcast numbers, in their dtype.

    Raises:
      ValueError: where a number lies outside its domain.
    """
    for name, value in numbers.items():
        _check(name, value)
    values = [np.asarray(x) if isinstance(x, list | tuple) else x for x in numbers.values()]
    dtype = jnp.result_type(*values)
    if not jnp.issubdtype(dtype, jnp.floating):
        dtype = jnp.result_type(float)
    elif jnp.finfo(dtype).bits < 32:
        dtype = jnp.float32
    arrays = [jnp.asarray(x, dtype) for x in values]
    shape = np.broadcast_shapes(*(x.shape for x in arrays))
    return _map(scalar, static, tuple(jnp.broadcast_to(x, shape) for x in arrays))


def evaluate(
    scalar,
    sigma_w,
    sigma_b,
    activation,
    numbers=None,
    *,
    dropout=0.0,
    layernorm=False,
    q0=1.0,
    kinks=None,
):
    """`scalar(act, layernorm, sigma_w, sigma_b, dropout, q0, *numbers)` elementwise."""
    static = (resolve(activation, kinks), bool(layernorm))
    return elementwise(
        scalar, static, sigma_w=sigma_w, sigma_b=sigma_b, dropout=dropout, q0=q0, **(numbers or {})
    )


def root_between(
    f: Callable[[Array], Array], low: Array, high: Array, f_low: Array, f_high: Array
) -> Array:
    """The root of f between two points where its signs differ.

    Regula falsi with the weights of Anderson and Bjorck (1973, BIT 13, 253), geometric bisection
    where that is slow. f is of order 1 away from its root. The derivative is that of the implicit
    function.

    Args:
      f: () -> (), continuous.
      low: one end of the bracket.
      high: the other end.
      f_low: f(low).
      f_high: f(high).

    Returns:
      () the root; NaN if 100 steps did not reach rounding.
    """
    eps = float(jnp.finfo(low.dtype).eps)

    def solve(f, start):
        def more(state):
            a, b, _, fb, step = state
            return (jnp.abs(fb) > 32 * eps) & (jnp.abs(b - a) > 2 * eps * jnp.abs(b)) & (step < 100)

        def advance(state):
            a, b, fa, fb, step = state
            lower, upper = jnp.minimum(a, b), jnp.maximum(a, b)
            chord = jnp.clip((a * fb - b * fa) / (fb - fa), lower, upper)
            halved = jnp.sqrt(jnp.maximum(lower, 1e-8 * upper) * upper)
            x = jnp.where(jnp.isfinite(chord) & ((step < 12) | (step % 2 == 0)), chord, halved)
            fx = f(x)
            same = jnp.sign(fx) == jnp.sign(fb)
            weight = 1.0 - fx / fb
            weight = jnp.where(weight > 0, weight, 0.5)
            return jnp.where(same, a, b), x, jnp.where(same, fa * weight, fb), fx, step + 1

        _, b, _, _, step = lax.while_loop(more, advance, (low, start, f_low, f_high, 0))
        return jnp.where(step < 100, b, jnp.nan)

    return lax.custom_root(f, high, solve, lambda g, y: y / g(jnp.ones_like(y)))


def limit(length: Callable[[Array], Array], q0: Array) -> Array:
    """The limit of a non-decreasing map q -> length(q) from q0.

    It is the nearest fixed point on the side to which q0 moves; inf if there is none.
    """
    grid = jnp.asarray(LENGTHS, q0.dtype)
    excess = jax.vmap(length)(grid) - grid
    excess = jnp.where(jnp.isnan(excess), jnp.inf, excess)
    start = length(q0) - q0
    up = start > 0
    above = up & (grid > q0) & (excess <= 0)
    below = (grid < q0) & (excess >= 0)
    index = jnp.where(up, jnp.argmax(above), grid.size - 1 - jnp.argmax(below[::-1]))
    other, excess_other = grid[index], excess[index]
    # The neighbour of `other` on the way back to q0, or q0 itself where that lies between.
    back = jnp.clip(jnp.where(up, index - 1, index + 1), 0, grid.size - 1)
    outside = jnp.where(up, grid[back] <= q0, grid[back] >= q0)
    near, excess_near = jnp.where(outside, q0, grid[back]), jnp.where(outside, start, excess[back])
    stays = jnp.abs(start) <= 8 * jnp.finfo(q0.dtype).eps * q0
    exists = jnp.where(up, jnp.any(above), jnp.any(below))
    zero = exists & (other == 0) & (excess_other == 0)
    regular = exists & ~zero & ~stays
    tiny = jnp.asarray(smallest(q0.dtype), q0.dtype)

    def safe(x, instead):
        return jnp.where(regular, x, instead)

    def f(q):
        return jnp.where(regular, length(q) / (q + tiny) - 1.0, q - 1.0)

    found = root_between(
        f,
        safe(near, 0.5 * jnp.ones_like(q0)),
        safe(other, jnp.ones_like(q0)),
        safe(excess_near / (near + tiny), -0.5),
        safe(excess_other / (other + tiny), 0.0),
    )
    end = jnp.where(zero, 0.0, jnp.where(exists, found, jnp.inf))
    return jnp.where(stays, q0, end)
