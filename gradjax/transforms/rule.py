"""Shared by all rules: the state with its telemetry, `telemetry(opt_state)`, `stacked=`, and checks
of static arguments.

A rule is one pure function on the updates, wrapped by `rule` into an
`optax.GradientTransformationExtraArgs`:

    update(updates, memory, params) -> Outcome(updates, memory, log2_norm, clipped)

`RuleState` records the log2 norm before the rule, what fraction the rule clipped in this step, and
the running mean of that fraction. The state has a fixed structure, so it can live in `lax.scan` and
in a checkpoint; the rule's name, and whether it clips, are static.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
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
    """State of a rule: what it remembers and what it has measured.

    Attributes:
      telemetry: field -> scalar, `TelemetryBuffer`, or a tree of the structure of the params with
        scalar leaves ((depth,) for a stacked leaf).
      memory: what the rule needs at the next step.
      rule: the rule's name.
      clips: whether the rule bounds gradients by a threshold, so that a clip fraction of 0 or 1
        says something about that threshold.
    """

    telemetry: dict[str, PyTree]
    memory: PyTree
    rule: str = dataclasses.field(metadata={"static": True})
    clips: bool = dataclasses.field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TelemetryBuffer:
    """Many scalars of the last measured steps in one array, since each output of a step costs time.

    The names are static: they cost the compiled step nothing, and a checkpoint holds only the
    numbers.

    Attributes:
      values: (..., rows, fields, groups), the newest row last; a group is a leaf, or a layer of a
        stacked leaf.
      fields: names of the second to last axis.
      leaves: (key path, number of layers or 0 if not stacked) of every leaf.
      every: steps from one row to the next.
    """

    values: Array
    fields: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    leaves: tuple[tuple[str, int], ...] = dataclasses.field(metadata={"static": True})
    every: int = dataclasses.field(default=1, metadata={"static": True})

    def named(self) -> dict[str, Any]:
        """The newest row: `<field>/<key path>` -> (...,) or (..., layers); NumPy unless traced."""
        values = self.values if isinstance(self.values, Tracer) else np.asarray(self.values)
        names = [name for name, _ in self.leaves]
        return {
            f"{field}/{name}": values[..., -1, i, column]
            for i, field in enumerate(self.fields)
            for name, column in zip(names, self.columns(), strict=True)
        }

    def columns(self) -> list[int | slice]:
        """Where each leaf's groups are on the last axis of `values`."""
        found, start = [], 0
        for _, layers in self.leaves:
            found.append(slice(start, start + layers) if layers else start)
            start += layers or 1
        return found


class Outcome(NamedTuple):
    """What a rule returns for one step.

    Attributes:
      updates: the new updates.
      log2_norm: before the rule, inf and NaN included.
      clipped: the fraction in [0, 1] of what the rule changed; the structure of `log2_norm`.
      memory: for the next step.
      extra: further telemetry.
    """

    updates: PyTree
    log2_norm: PyTree
    clipped: PyTree
    memory: PyTree = ()
    extra: dict[str, PyTree] = {}


def rule(
    name: str,
    update: Callable[[PyTree, PyTree, PyTree], Outcome],
    init: Callable[[PyTree], PyTree] | None = None,
    clips: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """An Optax transform from a function on the updates.

    Args:
      name: the rule's name in the telemetry.
      update: (updates, memory, params or None) -> `Outcome`.
      init: params -> memory; None for a rule without memory.
      clips: whether it bounds gradients by a threshold (see `RuleState`).
    """

    def init_fn(params):
        memory = () if init is None else init(params)
        shapes = jax.eval_shape(update, params, memory, params)

        def zeros(tree):
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)

        telemetry = {
            "log2_norm": zeros(shapes.log2_norm),
            "clipped": zeros(shapes.clipped),
            "clip_fraction": zeros(shapes.clipped),
            "count": count_of(),
            **zeros(shapes.extra),
        }
        return RuleState(telemetry, memory, name, clips)

    def update_fn(updates, state, params=None, **_):
        out = update(updates, state.memory, params)
        telemetry = count_step(state.telemetry, out.log2_norm, out.clipped)
        return out.updates, RuleState(telemetry | out.extra, out.memory, name, clips)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # type: ignore[arg-type]


def count_step(telemetry: dict[str, PyTree], log2_norm: PyTree, clipped: PyTree) -> dict:
    """The telemetry that all rules have, one step later."""
    count = telemetry["count"] + 1

    def mean(old, new):
        return old + (new - old) / count.astype(old.dtype)

    return {
        "log2_norm": log2_norm,
        "clipped": clipped,
        "clip_fraction": jax.tree.map(mean, telemetry["clip_fraction"], clipped),
        "count": count,
    }


def count_of(value: int = 0) -> Array:
    """`value` as an int32 scalar."""
    return jnp.full((), value, jnp.int32)


# Reading an optimiser state


def telemetry(opt_state: PyTree) -> dict[str, Array]:
    """Every rule's telemetry, flat: `<position>.<rule>/<field>[/<leaf>]` -> array.

    The position is the place in the chain ("0"; "1.0" in a chain within a chain; a label where the
    wrapper has labels, as `optax.multi_transform` does). Works through chains, masks,
    `multi_transform` and `inject_hyperparams`. Under jit and vmap the values are traced or batched
    and the keys are static. The rows of `watch` are converted to NumPy unless they are traced.

    >>> import jax.numpy as jnp, optax
    >>> from gradjax.transforms import clip_by_global_norm
    >>> tx = optax.chain(clip_by_global_norm(1.0), optax.sgd(0.1))
    >>> _, state = tx.update({"w": jnp.full(4, 1e20)}, tx.init({"w": jnp.zeros(4)}))
    >>> round(float(telemetry(state)["0.clip_by_global_norm/log2_norm"]), 2)
    67.44
    """
    found = {}
    for name, state in _named_rules(opt_state):
        for field, tree in state.telemetry.items():
            if isinstance(tree, TelemetryBuffer):
                found |= {f"{name}/{key}": value for key, value in tree.named().items()}
                continue
            for path, value in jax.tree_util.tree_flatten_with_path(tree)[0]:
                leaf = "/" + jax.tree_util.keystr(path) if path else ""
                found[f"{name}/{field}{leaf}"] = value
    return found


def clipping_rules(opt_state: PyTree) -> tuple[str, ...]:
    """The `<position>.<rule>` of every rule that clips, as the keys of `telemetry` begin.

    >>> import jax.numpy as jnp, optax
    >>> from gradjax.transforms import autoclip
    >>> clipping_rules(optax.chain(autoclip(), optax.sgd(0.1)).init(jnp.zeros(3)))
    ('0.autoclip',)
    """
    return tuple(name for name, state in _named_rules(opt_state) if state.clips)


def _named_rules(opt_state: PyTree, prefix: str = "") -> Iterator[tuple[str, RuleState]]:
    """(`<position>.<rule>`, state) of every rule; a wrapper comes before the rules inside it."""
    flat, _ = jax.tree_util.tree_flatten_with_path(
        opt_state, is_leaf=lambda x: isinstance(x, RuleState)
    )
    for path, node in flat:
        if isinstance(node, RuleState):
            position = prefix + (".".join(part for part in map(_part, path) if part) or "0")
            yield f"{position}.{node.rule}", node
            yield from _named_rules(node.memory, f"{position}.")


def _part(key: Any) -> str:
    """One step of a path in an optimiser state; wrappers' field names are left out."""
    if isinstance(key, jax.tree_util.SequenceKey):
        return str(key.idx)
    if isinstance(key, jax.tree_util.DictKey):
        return str(key.key)
    name = getattr(key, "name", str(getattr(key, "key", key)))
    return "" if name in ("inner_state", "inner_states", "inner_opt_state") else name


# Groups of entries


def stacked_leaves(stacked: Stacked, tree: PyTree) -> PyTree:
    """`stacked=` as a tree of bools: does this leaf hold the layers of a scan on its first axis?

    Args:
      stacked: None (no leaf), a bool, a prefix tree of bools, or a predicate on the leaf's key path
        (`lambda path: "layers" in path`, the path as `jax.tree_util.keystr` writes it).
      tree: the updates or params.

    Raises:
      ValueError: if the structure is not a prefix of the tree's, or a stacked leaf is a scalar.
    """
    if callable(stacked):
        named = jax.tree_util.tree_map_with_path(
            lambda path, _: bool(stacked(jax.tree_util.keystr(path))), tree
        )
    else:
        prefix = False if stacked is None else stacked
        try:
            named = jax.tree.map(
                lambda flag, branch: jax.tree.map(lambda _: bool(flag), branch), prefix, tree
            )
        except ValueError as error:
            raise ValueError(
                f"stacked: its structure {jax.tree.structure(stacked)} is not a prefix of the "
                f"updates' {jax.tree.structure(tree)}; pass a prefix tree of bools or a predicate "
                "on the key path."
            ) from error
    pairs = zip(jax.tree.leaves(named), jax.tree.leaves(tree), strict=True)
    if any(flag and jnp.ndim(x) == 0 for flag, x in pairs):
        raise ValueError("stacked: a scalar leaf has no layer axis; leave it out of `stacked`.")
    return named


def columns(structure: Any, rows: Sequence[tuple], count: int) -> list[PyTree]:
    """`count` trees from one row per leaf: tree k has the k-th entry of each row."""
    return [jax.tree.unflatten(structure, [row[k] for row in rows]) for k in range(count)]


def layer_axes(x: Array, is_stacked: bool) -> tuple[int, ...]:
    """The axes of one layer's numbers: all, or all but the first of a stacked leaf."""
    return tuple(range(int(is_stacked), jnp.ndim(x)))


# Checks


def check_number(
    where: str, value: Any, low: float = 0.0, high: float = math.inf, *, open_low: bool = False
) -> None:
    """Refuse NaN and static numbers outside [low, high]; traced values pass.

    Args:
      where: begins the message.
      value: a number or an array of numbers.
      low: smallest allowed value.
      high: largest allowed value.
      open_low: whether `low` itself is refused.

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
