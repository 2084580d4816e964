"""A rule that is called outside of `jax.jit` runs as one compiled program.

Called eagerly, an update would be a hundred programs of one operation each, and JAX would compile
control flow (`lax.while_loop`, `lax.fori_loop`) anew at every call, because its body is a new
Python function each time. Here the update is compiled once per structure of its arguments.

All transforms from one factory share these programs: floats and arrays among the factory's
arguments are operands, so neither another threshold nor `optax.inject_hyperparams`, which calls
the factory at every step, compiles again. Other arguments (integers, flags, predicates) are static.

Within a trace (jit, grad, vmap, scan) the update is inlined, so that XLA fuses it with its
surroundings. It is also called as it is where an operand is not an array. Wrappers of a user's
optimiser compile only their own part: the optimiser inside is called as the user wrote it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import jax
import numpy as np
import optax
from jax.core import Tracer

Options = ParamSpec("Options")
Transform = optax.GradientTransformationExtraArgs

_OPERAND = object()  # stands in the static options where a number belongs


class _Key(NamedTuple):
    """What a program depends on besides the structure of its operands."""

    make: Callable[..., Callable]
    structure: Any
    static: tuple


def compile_when_eager(make: Callable[..., Callable], *options: Any, **named: Any) -> Callable:
    """The function `make(*options, **named)`, compiled where it is called with concrete arrays.

    Args:
      make: options -> a pure function of pytrees. A function at the top of a module, or at least
        one that is made only once: programs are kept by its identity.
      *options: the options; floats and arrays may be traced by `make`.
      **named: more of them.
    """
    plain = make(*options, **named)
    leaves, structure = jax.tree.flatten((options, named), is_leaf=lambda x: x is None)
    is_number = [isinstance(x, float | np.generic | np.ndarray | jax.Array) for x in leaves]
    numbers = [x for x, is_one in zip(leaves, is_number, strict=True) if is_one]
    static = tuple(_OPERAND if is_one else x for x, is_one in zip(leaves, is_number, strict=True))
    key = _Key(make, structure, static)
    try:
        hash(key)
    except TypeError:
        return plain

    def call(*args):
        if not _all_concrete((numbers, args)):
            return plain(*args)
        return _program(key)(numbers, args)

    return call


@functools.lru_cache(maxsize=128)
def _program(key: _Key) -> Callable:
    def run(numbers, args):
        remaining = iter(numbers)
        leaves = [next(remaining) if x is _OPERAND else x for x in key.static]
        options, named = jax.tree.unflatten(key.structure, leaves)
        return key.make(*options, **named)(*args)

    return jax.jit(run)


def _all_concrete(tree: Any) -> bool:
    """Whether all leaves are arrays or Python numbers, and none of them is being traced."""
    arrays = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)
    return all(isinstance(x, arrays) and not isinstance(x, Tracer) for x in jax.tree.leaves(tree))


def compiled(factory: Callable[Options, Transform]) -> Callable[Options, Transform]:
    """Decorates the factory of a rule whose whole update may be compiled."""

    def make_update(*options: Options.args, **named: Options.kwargs) -> Callable:
        return factory(*options, **named).update

    @functools.wraps(factory)
    def make(*options: Options.args, **named: Options.kwargs) -> Transform:
        update = compile_when_eager(make_update, *options, **named)

        def update_fn(updates, state, params=None, **_):
            return update(updates, state, params)

        return Transform(factory(*options, **named).init, update_fn)  # type: ignore[arg-type]

    return make
