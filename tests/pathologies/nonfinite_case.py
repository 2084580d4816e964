"""What a labelled non-finite program is: how to make it, and which operation is to blame."""

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

MARK = "# <- here"


class Broken(NamedTuple):
    """A program whose loss, gradient, update or parameter is not finite.

    `make` returns (loss_fn, params, args), followed by tx and opt_state where they matter. The
    line of the operation ends with the mark; without one, `leaf` is a piece of the key path of the
    argument or parameter.
    """

    name: str
    make: Callable[[], tuple]
    primitives: frozenset[str]
    reason: str
    phase: str  # "forward" | "backward" | "optimizer" | "data" | "parameter"
    iteration: int | None = None
    module: str = ""
    device_count: int = 1
    leaf: str = ""


class Harmless(NamedTuple):
    """A program whose loss, gradients and updates are finite, whatever occurs inside."""

    name: str
    make: Callable[[], tuple]


def broken(cases: list[Broken], phase: str, primitives: str, reason: str, **fields):
    """Decorator that appends the case made by a function, and named like it, to `cases`."""

    def register(make):
        names = frozenset(primitives.split())
        cases.append(Broken(make.__name__, make, names, reason, phase, **fields))
        return make

    return register


def marked_line(case: Broken) -> tuple[str, int] | None:
    """File and line number of the operation, or None where no line of the program is to blame."""
    lines, first = inspect.getsourcelines(case.make)
    marked = [first + i for i, line in enumerate(lines) if line.rstrip().endswith(MARK)]
    if not marked:
        return None
    (line,) = marked
    return inspect.getsourcefile(case.make), line


def ramp(*shape: int, low: float = -1.0, high: float = 1.0) -> jax.Array:
    """Evenly spaced numbers from low to high in an array of this shape."""
    return jnp.linspace(low, high, math.prod(shape)).reshape(shape)


def weights(seed: int, n: int, m: int) -> jax.Array:
    """A random (n, m) matrix that keeps the variance of its input."""
    return jax.random.normal(jax.random.key(seed), (n, m)) / math.sqrt(n)
