"""What a labelled pair of programs is: how to make it, and what differs first."""

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

MARKS = {"a": "# <- a", "b": "# <- b"}


class Pair(NamedTuple):
    """Two programs, and the first value in which they differ.

    `make` returns (loss_a, params_a, loss_b, params_b, args), followed by a dict of options such as
    {"names": {"Dense_0": "hidden"}}, from the names of program a to those of program b. Its source
    marks the line of the first operation that differs, with `# <- a` in program a and `# <- b` in
    program b. An operation that only one of them has is marked once. A line that both programs
    share has both marks.

    The first value is the first in the order of evaluation of program a, in which a scan completes
    one iteration before the next; of cotangents, the first in the order of the backward pass, which
    is the named value nearest to the loss.
    """

    name: str
    make: Callable[[], tuple]
    value: str = ""  # name in program a; "" where only the marked line counts
    kind: str = ""  # "value", "cotangent", "gradient", "dtype", "loss"; "" for equal pairs
    bit_equal: bool = False  # of equal pairs: all named values, cotangents and gradients
    leaf: str = ""  # of kind "gradient": a piece of the key path of the parameter
    iteration: int | None = None  # of a value inside a scan: the row that differs first


def planted(pairs: list[Pair], value: str, kind: str = "value", **fields):
    """Decorator that appends the pair made by a function, and named like it, to `pairs`."""

    def register(make):
        pairs.append(Pair(make.__name__, make, value, kind, **fields))
        return make

    return register


def equal(pairs: list[Pair], bit_equal: bool = False):
    """Decorator that appends a pair of programs that differ by rounding at most to `pairs`."""

    def register(make):
        pairs.append(Pair(make.__name__, make, bit_equal=bit_equal))
        return make

    return register


def marked_lines(pair: Pair) -> dict[str, tuple[str, int]]:
    """File and line number of the marked line of each program that has one, by "a" and "b"."""
    lines, first = inspect.getsourcelines(pair.make)
    file = inspect.getsourcefile(pair.make)
    found = {}
    for program, mark in MARKS.items():
        marked = [first + i for i, line in enumerate(lines) if mark in line]
        if marked:
            (line,) = marked
            found[program] = (file, line)
    return found


# Parts that the programs share


def normal(seed: int, *shape: int) -> jax.Array:
    """Independent standard normal numbers."""
    return jax.random.normal(jax.random.key(seed), shape)


def weights(seed: int, *shape: int) -> jax.Array:
    """Random weights of this shape that keep the variance of their input, of shape[-2] features."""
    return normal(seed, *shape) / math.sqrt(shape[-2])


def projections(seed: int, names: str, width: int) -> dict[str, jax.Array]:
    """A random square matrix for each of these names, separated by spaces."""
    return {name: weights(seed + i, width, width) for i, name in enumerate(names.split())}


def mean_square(x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean of the squared errors."""
    return jnp.mean((x - y) ** 2)


def log_likelihood(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The logarithm of the softmax of (n, classes) logits at n labels."""
    log_p = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
