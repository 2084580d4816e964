"""What Optax's clipping rules are given, wherever they stand: in a chain, masked, partitioned, with
an injected threshold.

The rules keep no state. The optimiser's update function is made again from the same code, with
copies of its closures in which every clipping rule notes the size that it is given and its
threshold. The user's own optimiser is not touched.
"""

import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from gradjax.core import scale

PyTree = Any
# Optax's rules, and the variable that holds their threshold.
THRESHOLDS = {
    "clip_by_global_norm": "max_norm",
    "clip_by_block_rms": "threshold",
    "clip": "max_delta",
}


class Note(NamedTuple):
    """What one call of a rule was given; `Clip` has the same for all steps, in NumPy.

    Attributes:
      rule: its name.
      leaves: key paths of what it was given.
      log_size: what is compared with the threshold, natural logarithm: (1,) the global norm, or
        (leaves,) the rms or the largest entry of each.
      log_limit: () of the threshold.
      log_norms: (leaves,) of every leaf.
    """

    rule: str
    leaves: tuple[str, ...]
    log_size: Array
    log_limit: Array
    log_norms: Array


class Clip(NamedTuple):
    """The notes of a rule over all steps: as `Note`, with a leading axis of steps."""

    rule: str
    leaves: tuple[str, ...]
    log_size: np.ndarray
    log_limit: np.ndarray
    log_norms: np.ndarray


def noting(tx: optax.GradientTransformation, notes: list[Note]) -> Any:
    """The optimiser, whose clipping rules append to `notes` while they are traced."""
    return optax.with_extra_args_support(tx._replace(update=_Rebuilt(notes).function(tx.update)))


class _Rebuilt:
    """Copies of functions in which clipping rules note what they are given."""

    def __init__(self, notes: list[Note]):
        self.notes, self.known = notes, {}

    def function(self, function: Any) -> Any:
        """A copy of a function, or what is no plain function as it is."""
        if not isinstance(function, types.FunctionType):
            return function
        if id(function) in self.known:
            return self.known[id(function)]
        if (function.__module__ or "").startswith("optax"):
            rule, _, inner = function.__qualname__.partition(".<locals>.")
            if rule in THRESHOLDS and not inner:
                return self.factory(function)
            if rule in THRESHOLDS and inner == "update_fn":
                return self.update(function, rule)
        cells = function.__closure__ or ()
        new = tuple(types.CellType() for _ in cells)
        copy = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, new
        )
        copy.__kwdefaults__, copy.__module__ = function.__kwdefaults__, function.__module__
        copy.__qualname__ = function.__qualname__
        self.known[id(function)] = copy
        for cell, old in zip(new, cells, strict=True):
            try:
                cell.cell_contents = self.value(old.cell_contents)
            except ValueError:
                # not filled yet
                continue
        return copy

    def value(self, x: Any) -> Any:
        """What a closure holds, with the functions in it copied."""
        if isinstance(x, optax.GradientTransformation):
            return x._replace(update=self.function(x.update))
        if type(x) in (tuple, list):
            return type(x)(self.value(each) for each in x)
        if type(x) is dict:
            return {key: self.value(each) for key, each in x.items()}
        return self.function(x)

    def factory(self, make: Callable) -> Callable:
        """A function that makes a rule, as `optax.inject_hyperparams` calls it."""
        return lambda *args, **kwargs: self.value(make(*args, **kwargs))

    def update(self, function: types.FunctionType, rule: str) -> Callable:
        """The update function of a rule, which notes what it is given."""
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        limit = {name: cell.cell_contents for name, cell in cells}.get(THRESHOLDS[rule])

        def update(updates, state, params=None):
            if limit is not None:
                self.notes.append(_note(rule, updates, limit))
            return function(updates, state, params)

        return update


def _note(rule: str, updates: PyTree, limit: Any) -> Note:
    found = jax.tree_util.tree_leaves_with_path(updates)
    leaves = [x for _, x in found if x.size]
    norms = jnp.stack([scale.log_norm(x) for x in leaves])
    if rule == "clip_by_global_norm":
        size = scale.log_norm(leaves)[None]
    elif rule == "clip_by_block_rms":
        size = norms - jnp.asarray([0.5 * np.log(x.size) for x in leaves], norms.dtype)
    else:
        size = jnp.stack([jnp.log(jnp.max(jnp.abs(x))).astype(norms.dtype) for x in leaves])
    log_limit = jnp.log(jnp.maximum(jnp.asarray(limit, jnp.float32), 1e-37))
    names = tuple(jax.tree_util.keystr(path) for path, x in found if x.size)
    return Note(rule, names, size, log_limit, norms)


def gathered(notes: list[Note], arrays: list) -> tuple[Clip, ...]:
    """The notes of a compiled run: `arrays` has those of each, with a leading axis of steps."""
    host = [[np.asarray(x, float) for x in each] for each in arrays]
    return tuple(Clip(n.rule, n.leaves, *each) for n, each in zip(notes, host, strict=True))
