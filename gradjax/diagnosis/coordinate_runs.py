"""Measurements of a coordinate check: models of several sizes, their first updates, and values of
the same name at every size.

Over depths the numbers in a name that run further in deeper models become `*`, and of the values
alike the one halfway and the last are compared, `block_*[last]`: in the limit of large depth h_l
depends on l / depth, so that the layer next to the input would be another one at every depth.
Cost: num_steps + 1 gradients and a compilation per size, its seeds vmapped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from gradjax.core import scale
from gradjax.core.extras import needed_for
from gradjax.taps.probe import probe

if TYPE_CHECKING:
    import xarray as xr

VALUES = ("log_value_rms", "log_change_rms", "log_cotangent_rms")  # per named value
LEAVES = ("log_gradient_rms", "log_update_rms")  # per leaf of the parameters
_ROUNDINGS = 4.0  # a change below so many roundings of the value is noise: it counts as none

# the names of values ("name") and of leaves ("leaf"), and their measurements with a seed axis
Run = tuple[dict[str, list[str]], dict[str, np.ndarray]]


# First updates


def _log_rms(lists: Sequence[Sequence[Array]]) -> list[Array]:
    """Per list of arrays the log rms of each, float32, without overflow. Arrays of one shape share
    one piece of program.
    """
    arrays = [x for each in lists for x in each]
    alike: dict[Any, list[int]] = {}
    for i, x in enumerate(arrays):
        alike.setdefault((x.shape, x.dtype), []).append(i)
    logs = [
        jax.vmap(_log_rms_of)(jnp.stack([arrays[i] for i in group])) for group in alike.values()
    ]
    order = np.argsort([i for group in alike.values() for i in group])
    return jnp.split(jnp.concatenate(logs)[order], np.cumsum([len(each) for each in lists])[:-1])


def _log_rms_of(x: Array) -> Array:
    x, exponent = scale.normalize(x)
    log_unit = jnp.log(jnp.sum(jnp.square(scale.widen(x))) / max(x.size, 1)) / 2
    return log_unit.astype(jnp.float32) + exponent.astype(jnp.float32) * scale.LOG2


def _model(make_model: Callable, width: int, depth: int, key: Array) -> tuple[Callable, Any, Any]:
    """The model of one size and key.

    Raises:
      ValueError: it is not (loss_fn, params, tx).
    """
    made = make_model(width, depth, key)
    is_triple = isinstance(made, tuple) and len(made) == 3
    is_model = is_triple and callable(made[0]) and hasattr(made[2], "update")
    if is_model and all(hasattr(x, "dtype") for x in jax.tree.leaves(made[1])):
        return made
    kinds = type(made).__name__
    if isinstance(made, tuple):
        kinds = f"({', '.join(type(x).__name__ for x in made)})"
    raise ValueError(
        f"coordinate_check: make_model({width}, {depth}, key) returns {kinds}; (loss_fn, params, "
        "tx) is needed: a function loss_fn(params, *args) -> scalar, arrays (of an NNX or Equinox "
        "model by gradjax.functional), and an Optax transformation."
    )


def _first_steps(
    names: dict[str, list[str]],
    loss_fn: Callable,
    params: Any,
    tx: optax.GradientTransformation,
    args: tuple,
    num_steps: int,
    has_aux: bool,
    select: Callable[[str], bool] | None,
) -> dict[str, Array]:
    """Train on one batch and measure every step.

    Returns:
      loss (num_steps + 1,) and the log rms of all, (num_steps + 1, names). The names are put into
      `names`, in forward order.
    """
    start = probe(loss_fn, params, *args, has_aux=has_aux).values
    names["name"] = [name for name in start if select is None or select(name)]
    if not names["name"]:
        raise ValueError(f"coordinate_check: `select` keeps none of the values {', '.join(start)}.")
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names["leaf"] = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    at_creation = [start[name] for name in names["name"]]
    tx = optax.with_extra_args_support(tx)

    def step(state, _):
        params, opt_state = state
        seen = probe(loss_fn, params, *args, has_aux=has_aux)
        updates, opt_state = tx.update(
            seen.grads, opt_state, params, value=seen.loss, grad=seen.grads
        )
        values = [seen.values[name] for name in names["name"]]
        cotangents = [seen.cotangents.get(name, jnp.zeros(())) for name in names["name"]]
        changes = [
            scale.widen(x) - scale.widen(x0) for x, x0 in zip(values, at_creation, strict=True)
        ]
        trees = (values, changes, cotangents, jax.tree.leaves(seen.grads), jax.tree.leaves(updates))
        logs: dict[str, Array] = dict(zip((*VALUES, *LEAVES), _log_rms(trees), strict=True))
        rounding = np.log([_ROUNDINGS * float(jnp.finfo(x.dtype).eps) for x in values])
        noise = logs["log_value_rms"] + rounding.astype(np.float32)
        is_noise = logs["log_change_rms"] < noise
        logs["log_change_rms"] = jnp.where(is_noise, -jnp.inf, logs["log_change_rms"])
        logs["loss"] = seen.loss.astype(jnp.float32)
        return (optax.apply_updates(params, updates), opt_state), logs

    return lax.scan(step, (params, tx.init(params)), length=num_steps + 1)[1]


def measure(make_model: Callable, width: int, depth: int, keys: Array, options: tuple) -> Run:
    """Run the models of one size, one per key.

    Args:
      options: args, num_steps, has_aux and select of `coordinate_check`.
    """
    names: dict[str, list[str]] = {}
    models = [_model(make_model, width, depth, key) for key in keys]
    loss_fn, _, tx = models[0]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params for _, params, _ in models))
    run = jax.jit(jax.vmap(lambda params: _first_steps(names, loss_fn, params, tx, *options)))
    return names, jax.tree.map(np.asarray, run(stacked))


# The same names at every size


def matched(names: dict[int, list[str]]) -> tuple[dict[str, dict[int, str]], list[str]]:
    """Match the names of values over depths.

    Args:
      names: depth -> names, in forward order.

    Returns:
      label -> depth -> name, in forward order; and the kinds of names that some depth lacks.

    >>> shallow, deep = ["in", "block_0/w"], ["in", "block_0/w", "block_1/w"]
    >>> list(matched({1: shallow, 2: deep})[0])
    ['in', 'block_*/w[middle]', 'block_*/w[last]']
    """
    # a name without its numbers -> depth -> the numbers of each such name
    numbers: dict[str, dict[int, list[tuple[str, ...]]]] = {}
    for depth, all_names in names.items():
        for name in all_names:
            by_depth = numbers.setdefault(re.sub(r"\d+", "*", name), {})
            by_depth.setdefault(depth, []).append(tuple(re.findall(r"\d+", name)))

    def kind(name: str) -> str:
        """The name with `*` for the numbers whose values differ between depths."""
        found = numbers[re.sub(r"\d+", "*", name)].values()
        sets = ([frozenset(column) for column in zip(*rows, strict=True)] for rows in found)
        varies = iter([len(set(places)) > 1 for places in zip(*sets, strict=True)])
        return re.sub(r"\d+", lambda number: "*" if next(varies) else number[0], name)

    kinds: dict[str, dict[int, list[str]]] = {}
    for depth, all_names in names.items():
        for name in all_names:
            kinds.setdefault(kind(name), {}).setdefault(depth, []).append(name)
    left_out, labels = [], {}
    for one, members in kinds.items():
        if len(members) < len(names):
            left_out.append(one)
            continue
        parts = {"[middle]": 0.5, "[last]": 1.0} if "*" in one else {"": 0.0}
        for suffix, part in parts.items():
            labels[one + suffix] = {
                depth: found[int(part * (len(found) - 1))] for depth, found in members.items()
            }
    return labels, left_out


def _check_same_names(
    runs: dict[tuple[int, int], Run], widths: list[int], depth: int, label: str
) -> None:
    first = runs[widths[0], depth][0][label]
    for width in widths[1:]:
        found = runs[width, depth][0][label]
        if found != first:
            missing = ", ".join(set(first) - set(found)) or "none"
            new = ", ".join(set(found) - set(first)) or "none"
            raise ValueError(
                f"coordinate_check: the {label}s differ between widths {widths[0]} and {width} at "
                f"depth {depth}: {missing} only at the first, {new} only at the second; one model "
                "is compared."
            )


def dataset(runs: dict[tuple[int, int], Run], widths: list[int], depths: list[int]) -> xr.Dataset:
    """The measurements of all sizes (width, depth, seed, step, name), matched by name.

    Raises:
      ValueError: names differ over widths, or no name is at every depth.
    """
    with needed_for("gradjax.coordinate_check"):
        import xarray as xr
    dims = ("width", "depth", "seed", "step")
    left_out: list[str] = []
    variables: dict[str, Any] = {}
    coords: dict[str, Any] = {"width": widths, "depth": depths}

    def stacked(pick: Callable[[int, dict], np.ndarray]) -> np.ndarray:
        rows = [[pick(depth, runs[width, depth][1]) for depth in depths] for width in widths]
        return np.array(rows)

    for label, of_label in (("name", VALUES), ("leaf", LEAVES)):
        for depth in depths:
            _check_same_names(runs, widths, depth, label)
        names = {depth: runs[widths[0], depth][0][label] for depth in depths}
        labels, missing = matched(names)
        left_out += missing
        if not labels:
            raise ValueError(
                f"coordinate_check: no {label} is at every depth; found {', '.join(missing)}."
            )
        coords[label] = list(labels)
        index = {
            depth: [names[depth].index(by_depth[depth]) for by_depth in labels.values()]
            for depth in depths
        }
        for name in of_label:
            values = stacked(
                lambda depth, found, name=name, index=index: found[name][..., index[depth]]
            )
            variables[name] = ((*dims, label), values)
    variables["loss"] = (dims, stacked(lambda depth, found: found["loss"]))
    return xr.Dataset(variables, coords, {"left_out": ", ".join(left_out)})
