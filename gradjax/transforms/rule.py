"""What every rule shares: its state with telemetry, `telemetry(opt_state)`, `stacked=`, checks of
static arguments.

A rule is one pure function on the updates, wrapped by `rule` into an
`optax.GradientTransformationExtraArgs`:

    update(updates, memory, params) -> Outcome(updates, memory, log2_norm, clipped)

`RuleState` records log2_norm before the rule, whether (or which share of it) was clipped, and the
running mean of that. Its structure is fixed, so it lives in `lax.scan` and in a checkpoint; its
rule's name is static.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer

PyTree = Any
Stacked = PyTree | Callable[[str], bool] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RuleState:
    """State of a rule: what it remembers, and what it has seen."""

    telemetry: dict[
        str, PyTree
    ]  # scalars, `Figures`, or params-shaped trees of scalars ((depth,) for a stacked leaf)
    memory: PyTree
    rule: str = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TelemetryBuffer:
    """Many scalars of the last measured steps as one array: a step that returns each by itself pays
    for each.

    The names are static: they cost the compiled step nothing, and a checkpoint holds the numbers alone.
    """

    values: Array  # (..., rows, fields, groups), the newest row last; groups: leaves, and layers of a stacked leaf
    fields: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    leaves: tuple[tuple[str, int], ...] = dataclasses.field(
        metadata={"static": True}
    )  # key path, layers (0: no stack)
    every: int = dataclasses.field(
        default=1, metadata={"static": True}
    )  # steps from one row to the next

    def named(self) -> dict[str, Any]:
        """The newest row: `<field>/<key path>` -> () or (layers,), behind the axes of a vmap; NumPy
        unless traced.
        """
        values = self.values if isinstance(self.values, Tracer) else np.asarray(self.values)
        columns = [
            (name, part)
            for name, part in zip((x for x, _ in self.leaves), self.columns(), strict=True)
        ]
        return {
            f"{field}/{name}": values[..., -1, i, part]
            for i, field in enumerate(self.fields)
            for name, part in columns
        }

    def columns(self) -> list[int | slice]:
        """Where each leaf's groups are on the last axis of `values`."""
        ends = np.cumsum([0] + [layers or 1 for _, layers in self.leaves]).tolist()
        return [
            slice(a, b) if layers else a
            for a, b, (_, layers) in zip(ends, ends[1:], self.leaves, strict=False)
        ]


class Outcome(NamedTuple):
    """What a rule returns for one step."""

    updates: PyTree
    log2_norm: PyTree  # before the rule; inf and NaN as they came
    clipped: PyTree  # the share in [0, 1] of what the rule changed, of the structure of log2_norm
    memory: PyTree = ()
    extra: dict[str, PyTree] = {}  # further telemetry


def rule(
    name: str,
    update: Callable[[PyTree, PyTree, PyTree], Outcome],
    init: Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An Optax transform from a function on the updates.

    Args:
      name: the rule's name in the telemetry.
      update: (updates, memory, params or None) -> `Outcome`.
      init: params -> memory; None for a rule without memory.
    """

    def init_fn(params):
        memory = () if init is None else init(params)
        seen = jax.eval_shape(update, params, memory, params)
        zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
        telemetry = {
            "log2_norm": zeros(seen.log2_norm),
            "clipped": zeros(seen.clipped),
            "clip_fraction": zeros(seen.clipped),
            "count": jnp.zeros((), jnp.int32),
            **zeros(seen.extra),
        }
        return RuleState(telemetry, memory, name)

    def update_fn(updates, state, params=None, **_):
        out = update(updates, state.memory, params)
        count = state.telemetry["count"] + 1
        mean = lambda old, new: old + (new - old) / count.astype(old.dtype)
        fraction = jax.tree.map(mean, state.telemetry["clip_fraction"], out.clipped)
        telemetry = {
            "log2_norm": out.log2_norm,
            "clipped": out.clipped,
            "clip_fraction": fraction,
            "count": count,
        }
        return out.updates, RuleState(telemetry | out.extra, out.memory, name)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # type: ignore[arg-type]


def telemetry(opt_state: PyTree) -> dict[str, Array]:
    """Every rule's telemetry of an optimiser state, flat: `<position>.<rule>/<field>[/<leaf>]` ->
    array.

    The position is the place in the chain ("0", "1.0" in a chain within a chain; names where the wrapper has names, as
    the labels of `optax.multi_transform`). Works through chains, masks, `multi_transform` and `inject_hyperparams`;
    under jit and vmap the values are traced or batched, the keys static. The figures of `watch` are read on the host.

    >>> import jax.numpy as jnp, optax
    >>> from gradjax.transforms import clip_by_global_norm
    >>> tx = optax.chain(clip_by_global_norm(1.0), optax.sgd(0.1))
    >>> _, state = tx.update({"w": jnp.full(4, 1e20)}, tx.init({"w": jnp.zeros(4)}))
    >>> {k: round(float(v), 2) for k, v in telemetry(state).items()}["0.clip_by_global_norm/log2_norm"]
    67.44
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(
        opt_state, is_leaf=lambda x: isinstance(x, RuleState)
    )
    found = {}
    for path, node in flat:
        if not isinstance(node, RuleState):
            continue
        position = ".".join(part for part in map(_part, path) if part) or "0"
        for field, tree in node.telemetry.items():
            if isinstance(tree, TelemetryBuffer):
                found.update(
                    {
                        f"{position}.{node.rule}/{name}": value
                        for name, value in tree.named().items()
                    }
                )
                continue
            leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
            for leaf_path, value in leaves:
                leaf = "/" + jax.tree_util.keystr(leaf_path) if leaf_path else ""
                found[f"{position}.{node.rule}/{field}{leaf}"] = value
        found.update({f"{position}.{key}": value for key, value in telemetry(node.memory).items()})
    return found


def _part(key: Any) -> str:
    """One step of a path in an optimiser state: indices and labels count, the wrappers' field names
    do not.
    """
    if isinstance(key, jax.tree_util.SequenceKey):
        return str(key.idx)
    if isinstance(key, jax.tree_util.DictKey):
        return str(key.key)
    name = getattr(key, "name", str(getattr(key, "key", key)))
    return "" if name in ("inner_state", "inner_states", "inner_opt_state") else name


# -- which axes form a group -----------------------------------------------------------------------------


def stacked_leaves(stacked: Stacked, tree: PyTree) -> PyTree:
    """`stacked=` as a tree of bools: does this leaf hold the layers of a scan on its first axis?

    Args:
      stacked: None (no leaf), a bool, a prefix tree of bools, or a predicate on the leaf's key path
        (`lambda path: "layers" in path`, the path as `jax.tree_util.keystr` writes it).
      tree: the updates or params.
    """
    if callable(stacked):
        named = jax.tree_util.tree_map_with_path(
            lambda path, _: bool(stacked(jax.tree_util.keystr(path))), tree
        )
    else:
        try:
            prefix = False if stacked is None else stacked
            named = jax.tree.map(
                lambda flag, branch: jax.tree.map(lambda _: bool(flag), branch), prefix, tree
            )
        except ValueError as error:
            raise ValueError(
                f"stacked: its structure {jax.tree.structure(stacked)} is no prefix of the updates' "
                f"{jax.tree.structure(tree)}; pass a prefix tree of bools or a predicate on the key path."
            ) from error
    scalar = [
        flag and jnp.ndim(x) == 0
        for flag, x in zip(jax.tree.leaves(named), jax.tree.leaves(tree), strict=True)
    ]
    if any(scalar):
        raise ValueError("stacked: a scalar leaf has no layer axis; leave it out of `stacked`.")
    return named


def columns(structure: Any, rows: Sequence[tuple], count: int) -> list[PyTree]:
    """The `count` trees whose leaves are the columns of rows, one row for each leaf of the
    structure.
    """
    return [jax.tree.unflatten(structure, [row[k] for row in rows]) for k in range(count)]


def layer_axes(x: Array, is_stacked: bool) -> tuple[int, ...]:
    """The axes of one layer's numbers: all, or all but the first of a stacked leaf."""
    return tuple(range(int(is_stacked), jnp.ndim(x)))


# -- checks ----------------------------------------------------------------------------------------------


def check_number(
    where: str, value: Any, low: float = 0.0, high: float = math.inf, *, open_low: bool = False
) -> None:
    """Refuse a static number outside [low, high] ((low, high] with `open_low`) or NaN; traced
    values pass.

    Raises:
      ValueError: with the value and the allowed range.
    """
    if isinstance(value, Tracer):
        return
    number = np.asarray(value)
    inside = (number > low if open_low else number >= low) & (number <= high)
    if not np.all(inside):
        left = "(" if open_low else "["
        raise ValueError(f"{where} is {value}; a number in {left}{low:g}, {high:g}] is needed.")
