"""The static parts of an optimiser state with one `gradjax.watch`: its names and their places."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gradjax.monitor.alarm import QUANTITIES
from gradjax.transforms import RuleState, telemetry

PyTree = Any


class WatchedState(NamedTuple):
    """The static parts of a watched optimiser state."""

    prefix: str  # of watch's keys in the telemetry
    lanes: tuple[int, ...]  # shape of a vmap over the state
    fields: tuple[str, ...]
    columns: list[tuple[str, int | slice]]  # key path of a leaf -> its groups
    labels: list[str]  # one for each group
    picked: list[int]  # the leaves of the state that are telemetry
    structure: Any  # the structure that they make

    @classmethod
    def of(cls, opt_state: PyTree) -> "WatchedState":
        """Read a state.

        Raises:
          ValueError: unless the state holds exactly one `watch`; if it is traced.
        """
        states = list(watches(opt_state))
        if len(states) != 1:
            raise ValueError(
                f"Monitor: the optimiser state holds {len(states)} gradjax.watch; one is needed: "
                "put it around the optimiser, tx = gradjax.watch(tx), and pass the state that "
                "tx.update returned."
            )
        buffer, count = states[0].telemetry["figures"], states[0].telemetry["count"]
        if isinstance(count, Tracer):
            raise ValueError(
                "Monitor: update was traced; call it outside of jit, with what the jitted step "
                "returned."
            )
        keys = telemetry(_telemetry_only(opt_state))
        prefix = next(key for key in keys if key.endswith(".watch/count")).removesuffix("count")
        labels = []
        for name, layers in buffer.leaves:
            labels += [f"{name}[{i}]" for i in range(layers)] if layers else [name]
        names = [name for name, _ in buffer.leaves]
        # The state with the indices of its leaves in their places shows which are telemetry.
        leaves, structure = jax.tree.flatten(opt_state)
        indices = jax.tree.unflatten(structure, range(len(leaves)))
        picked, small = jax.tree.flatten(_telemetry_only(indices))
        return cls(
            prefix=prefix,
            lanes=jnp.shape(count),
            fields=buffer.fields,
            columns=list(zip(names, buffer.columns(), strict=True)),
            labels=labels,
            picked=picked,
            structure=small,
        )

    def pick(self, opt_state: PyTree) -> list[Any]:
        """The leaves of a state that are telemetry."""
        leaves = jax.tree.leaves(opt_state)
        return [leaves[i] for i in self.picked]

    def restore(self, copies: list[Any]) -> PyTree:
        """What `pick` returned, as a state without all else, in NumPy arrays."""
        return jax.tree.unflatten(self.structure, [np.asarray(x) for x in copies])

    def named(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Telemetry keys -> columns of (..., fields, groups)."""
        return {
            f"{self.prefix}{field}/{name}": rows[..., i, part]
            for i, field in enumerate(self.fields)
            for name, part in self.columns
        }

    def first_bad(self, row: np.ndarray) -> dict[str, Any]:
        """The first leaf of (fields, groups) that is not finite.

        Parameters come first: they existed before the gradient and the update.
        """
        is_bad = ~(row < np.inf)
        quantity = next(q for q in (2, 0, 1) if is_bad[q].any())
        group = int(np.argmax(is_bad[quantity]))
        return {
            "quantity": QUANTITIES[quantity],
            "leaf": self.labels[group],
            "log2_norm": row[quantity, group],
            "leaves": int(is_bad[quantity].sum()),
        }


def _is_rule(x: Any) -> bool:
    return isinstance(x, RuleState)


def watches(tree: PyTree) -> Iterator[RuleState]:
    """The states of every `watch` in a tree."""
    for node in filter(_is_rule, jax.tree.leaves(tree, is_leaf=_is_rule)):
        if node.rule == "watch":
            yield node
        yield from watches(node.memory)


def _telemetry_only(tree: PyTree) -> PyTree:
    """An optimiser state with only its telemetry; every rule keeps its place."""

    def keep(x):
        if not _is_rule(x):
            return None
        return dataclasses.replace(x, memory=_telemetry_only(x.memory))

    return jax.tree.map(keep, tree, is_leaf=_is_rule)
