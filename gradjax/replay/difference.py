"""Where two implementations of one model part: the first value that differs beyond rounding.

    value_a  !=  value_b      both programs of value and gradient, one equation at a time

Both losses are traced and evaluated with every value in between (`gradjax.replay.listing`). Named
values, their cotangents and the parameters' gradients are compared; what rounding explains is
measured by evaluating both again with errors of its size (`gradjax.replay.rounding`). From the first
value that differs, the walk back to what both programs have (`gradjax.replay.counterparts`) ends at
the equation. Cost: one compilation for each distinct operation, and the memory of all values; about
five evaluations, one where the programs are equal bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradjax.replay import rounding, source
from gradjax.replay.blame import Blame, blame, shown_pair
from gradjax.replay.counterparts import Search, Side, all_before
from gradjax.replay.listing import COTANGENT, VALUE, Node
from gradjax.replay.pairing import (
    arranged,
    arrangements,
    check_mapping,
    pair_leaves,
    pair_names,
)
from gradjax.replay.rounding import Comparison
from gradjax.replay.source import Line
from gradjax.taps.probe import Traced, trace

PyTree = Any


@dataclass(frozen=True)
class Row:
    """One value, cotangent or gradient of both programs.

    Attributes:
      name_a, name_b: in each program; a key path for a gradient.
      ulps: largest distance of two entries, in ulps of the wider dtype at the largest magnitude;
        inf if they are not finite in different places.
      elementwise: the same, each in the ulps of its own entry.
      limit: what rounding explains, of `ulps`.
      ratio: rms in a over rms in b.
      differs: whether an entry differs beyond rounding.
      equal: whether they are equal bit for bit, NaN to NaN.
      dtypes: of a and of b.
    """

    name_a: str
    name_b: str
    ulps: float
    elementwise: float
    limit: float
    ratio: float
    differs: bool
    equal: bool
    dtypes: tuple[str, str]


@dataclass(frozen=True)
class FirstDifference:
    """The first value that differs.

    Attributes:
      kind: "value", "cotangent", "gradient", "loss", or "dtype" if rounding explains what differs
        and the programs compute in different dtypes.
      name_a, name_b: the value; a key path for a gradient, "loss" for the loss.
      line_a, line_b: the user's lines of the first equation whose result the other program does not
        have; None where none is known.
      primitive_a, primitive_b: that equation; "" where there is none.
      ulps, ratio: of the value, as in `Row`.
      words: what differs, in a sentence.
    """

    kind: str
    name_a: str
    name_b: str
    line_a: Line | None
    line_b: Line | None
    primitive_a: str
    primitive_b: str
    ulps: float
    ratio: float
    words: str


@dataclass(frozen=True)
class Difference:
    """What `difference` found; true if the programs differ.

    Attributes:
      first: the first difference; None if the programs agree.
      rows: the named values, in the order of evaluation.
      cotangents: of the same names, where both programs, or one of them, have one.
      gradients: of the parameters.
      losses: of a and of b.
      unmatched_a, unmatched_b: named values and parameters that were not compared.
      note: what else there is to say.
    """

    first: FirstDifference | None
    rows: tuple[Row, ...]
    cotangents: tuple[Row, ...]
    gradients: tuple[Row, ...]
    losses: tuple[float, float]
    unmatched_a: tuple[str, ...]
    unmatched_b: tuple[str, ...]
    note: str = ""

    def __bool__(self) -> bool:
        return self.first is not None

    def __str__(self) -> str:
        return "\n".join(_text(self))


def difference(
    loss_a: Callable[..., Any],
    params_a: PyTree,
    loss_b: Callable[..., Any],
    params_b: PyTree,
    *args: Any,
    args_b: tuple | None = None,
    names: Mapping[str, str] | None = None,
    leaves: Mapping[str, str] | None = None,
    has_aux: bool = False,
) -> Difference:
    """Compare two implementations of one model, and find the first value that differs.

    Named values (the outputs of Linen, NNX and Equinox modules, and what `gradjax.tap` marks) are
    paired by equal names and by `names`; where fewer than half have a partner, also by order and
    shape. Without names the loss is compared, and the search goes through the whole program.

    Args:
      loss_a, loss_b: (params, *args) -> loss of shape (), or (loss, aux) with `has_aux`.
      params_a, params_b: pytrees of floating arrays, or NNX or Equinox models.
      args: arrays in any pytrees, given to both; non-array leaves are static.
      args_b: the arguments of b, where they differ.
      names: name in a -> name in b, where names differ.
      leaves: key path of a parameter in a -> in b, as `jax.tree_util.keystr` gives it. By default
        parameters are paired by key path, by equal entries, or by order and shape.
      has_aux: as in `jax.value_and_grad`, of both.

    Returns:
      `Difference`; `print` it.

    Raises:
      ValueError: as `gradjax.probe`, except that nothing needs a name; a name of `names` or a key
        path of `leaves` that does not exist.

    >>> import jax.numpy as jnp
    >>> from gradjax import tap
    >>> def port(w, x):
    ...     return jnp.sum(tap(w * x, "h") ** 2)
    >>> def original(w, x):
    ...     return jnp.sum(tap(w * x + 1e-3, "h") ** 2)
    >>> found = difference(port, jnp.ones(3), original, jnp.ones(3), jnp.arange(3.0))
    >>> found.first.kind, found.first.name_a, found.first.primitive_b
    ('value', 'h', 'add')
    >>> bool(difference(port, jnp.ones(3), port, jnp.ones(3), jnp.arange(3.0)))
    False
    """
    traced_a = trace(loss_a, params_a, args, has_aux, "difference", needs_names=False)
    traced_b = trace(
        loss_b, params_b, args if args_b is None else args_b, has_aux, "difference", False
    )
    a, b = _side("a", traced_a), _side("b", traced_b)
    pairs = _Pairs(a, b, names or {}, leaves or {})
    found = [*pairs.values(), *pairs.loss(), *pairs.cotangents(), *pairs.gradients()]
    if any(not each.row.equal for each in found):
        a.measure(b)
        b.measure(a)
        found = [each.again() for each in found]
    return Difference(
        first=_first(a, b, found),
        rows=tuple(each.row for each in found if each.kind == "value"),
        cotangents=tuple(each.row for each in found if each.kind == "cotangent"),
        gradients=tuple(each.row for each in found if each.kind == "gradient"),
        losses=(float(a.array(a.listing.loss)), float(b.array(b.listing.loss))),
        unmatched_a=pairs.unmatched_a,
        unmatched_b=pairs.unmatched_b,
        note=pairs.note,
    )


def _side(name: str, traced: Traced) -> Side:
    paths = jax.tree_util.tree_leaves_with_path(traced.params)
    leaves = [jax.tree_util.keystr(path) or "params" for path, _ in paths]
    count = len(traced.leaves) - traced.num_params
    return Side(name, traced, [*leaves, *(f"argument {i}" for i in range(count))])
