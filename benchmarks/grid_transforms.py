"""Which clipping rules survive which gradients, ours beside Optax's.

The grid is {dtype} x {magnitude} x {jit, eager} x {rule}.

Every cell feeds one gradient, a (4, 3) kernel and a vector of 2 of the given magnitude (cast to the
dtype, so that 1e20 is inf in float16), to a rule whose threshold is known, and holds the update
against the same formula in NumPy float64, each rule against its own documented formula. In the
columns inf and NaN one entry of the kernel is that, and the others are 1. Rules with a memory have
first seen gradients of ones. A cell is

    =  right: every entry within 2 units in the last place of the dtype
    ~  rounded: within 16, as half-precision arithmetic leaves it; not a failure
    !  flagged: the gradient holds inf or NaN, its group is passed on, the telemetry says so, and
       the other groups are right
    0  silent zero: an entry is 0 whose reference is not
    N  silent NaN: an entry is inf or NaN, and nothing says so
    U  silently unclipped: the gradient came back as it was, where the reference clips
    W  silently wrong: anything else

Silent failures are 0, N, U and W. Telemetry excuses nothing while the gradient is finite: there,
everything but `=` and `~` is a failure. Optax's transforms have no telemetry, so what they pass on
is silent.

    python benchmarks/grid_transforms.py [--json]
"""

import argparse
import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradjax import transforms

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
MAGNITUDES = [
    0.0,
    1e-45,
    1e-40,
    1e-30,
    1e-20,
    1.0,
    1e18,
    1.8e19,
    1e20,
    1e38,
    3.4e38,
    np.inf,
    np.nan,
]
SILENT = "0NUW"
PATTERN = {
    "kernel": np.array([[1, -0.75, 0.5], [0.25, 1, -1], [0.5, 0.5, 0.75], [-1, 0.25, 1]]),
    "vector": np.array([0.75, -1]),
}
WHOLE = np.sqrt(14.0)  # the norm of a gradient of ones

Tree = dict[str, np.ndarray]


# The formulas in float64


def limited(x: np.ndarray, norm: Any, limit: Any) -> np.ndarray:
    """`x` scaled from `norm` to `limit` where the norm is larger and finite."""
    with np.errstate(all="ignore"):
        return np.where(np.isfinite(norm) & (norm > limit), x * (limit / np.asarray(norm)), x)


def norm_of(*arrays: np.ndarray) -> float:
    return float(np.sqrt(sum(np.sum(np.square(x)) for x in arrays)))


def by_tree(limit: float) -> Callable[[Tree], Tree]:
    return lambda tree: {k: limited(x, norm_of(*tree.values()), limit) for k, x in tree.items()}


def by_leaf(limit: Callable[[np.ndarray], float]) -> Callable[[Tree], Tree]:
    return lambda tree: {k: limited(x, norm_of(x), limit(x)) for k, x in tree.items()}


def by_entry(tree: Tree) -> Tree:
    return {k: limited(x, np.abs(x), 1.0) for k, x in tree.items()}


def clamped(tree: Tree) -> Tree:
    """Entries in [-1, 1]: unlike a norm, an entry of inf has a bound."""
    return {k: np.clip(x, -1, 1) for k, x in tree.items()}


def by_unit(tree: Tree) -> Tree:
    """clipping = .1 of the norm of a parameter of ones: columns of the kernel, the whole vector."""
    kernel, vector = tree["kernel"], tree["vector"]
    columns = np.sqrt(np.sum(np.square(kernel), axis=0, keepdims=True))
    return {
        "kernel": limited(kernel, columns, 0.1 * 2),
        "vector": limited(vector, norm_of(vector), 0.1 * np.sqrt(2)),
    }


def to_unit_norm(eps: float) -> Callable[[Tree], Tree]:
    def reference(tree):
        norm = norm_of(*tree.values())
        if not np.isfinite(norm) or norm + eps <= 0:
            return tree
        return {k: x / (norm + eps) for k, x in tree.items()}

    return reference


def example_mean(tree: Tree) -> Tree:
    """Over the leading axis, of examples that are each clipped to the norm 1."""
    each = [by_tree(1.0)({k: x[b] for k, x in tree.items()}) for b in range(2)]
    return {k: (each[0][k] + each[1][k]) / 2 for k in tree}


# The rules


class Rule(NamedTuple):
    ours: Callable[[], Any]
    reference: Callable[[Tree], Tree]
    optax: Callable[[], Any] | None = None
    optax_reference: Callable[[Tree], Tree] | None = None
    # gradients of ones before the cell's
    primed: int = 0
    # whether the updates are two examples, the cell's gradient and a quarter of it
    examples: bool = False


def optax_per_example() -> optax.GradientTransformation:
    def update(updates, state, params=None):
        leaves, structure = jax.tree.flatten(updates)
        total, _ = optax.per_example_global_norm_clip(leaves, 1.0)
        return jax.tree.unflatten(structure, [x / 2 for x in total]), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


T = transforms
RULES = {
    "clip": Rule(lambda: T.clip(1.0), clamped, lambda: optax.clip(1.0)),
    "clip_by_global_norm": Rule(
        lambda: T.clip_by_global_norm(1.0), by_tree(1.0), lambda: optax.clip_by_global_norm(1.0)
    ),
    "clip_by_block_rms": Rule(
        lambda: T.clip_by_block_rms(1.0),
        by_leaf(lambda x: np.sqrt(x.size)),
        lambda: optax.clip_by_block_rms(1.0),
    ),
    "adaptive_grad_clip": Rule(
        lambda: T.adaptive_grad_clip(0.1), by_unit, lambda: optax.adaptive_grad_clip(0.1)
    ),
    "normalize_by_norm": Rule(
        T.normalize_by_norm, to_unit_norm(0.0), optax.normalize_by_update_norm, to_unit_norm(1e-6)
    ),
    "per_example_clip": Rule(
        lambda: T.per_example_clip(1.0), example_mean, optax_per_example, examples=True
    ),
    "clip_by_layer_norm": Rule(lambda: T.clip_by_layer_norm(1.0), by_leaf(lambda x: 1.0)),
    "autoclip": Rule(lambda: T.autoclip(50.0, window=8), by_tree(WHOLE), primed=7),
    "historical_clip": Rule(
        lambda: T.historical_clip(3.0, 8, warmup_steps=4), by_tree(WHOLE), primed=7
    ),
    "zclip": Rule(lambda: T.zclip(warmup_steps=5), by_tree(WHOLE), primed=5),
    "adagc": Rule(
        lambda: T.adagc(1.0, warmup_steps=0), by_leaf(lambda x: np.sqrt(x.size)), primed=2
    ),
    "spam": Rule(
        lambda: T.spam(optax.identity(), 1.0, decay=0.0, min_history=1), by_entry, primed=2
    ),
}


# Cells


def gradient(magnitude: float, dtype: Any) -> Tree:
    with np.errstate(all="ignore"):
        finite = magnitude if np.isfinite(magnitude) else 1.0
        tree = {k: (x * finite).astype(dtype) for k, x in PATTERN.items()}
        if not np.isfinite(magnitude):
            tree["kernel"][1, 1] = magnitude
    return tree


def ulps(got: np.ndarray, want: np.ndarray, dtype: Any) -> np.ndarray:
    """|got - want| in units of the last place of `want` in the dtype; inf for a wrong zero."""
    info = jnp.finfo(dtype)
    place = np.floor(np.log2(np.maximum(np.abs(want), float(info.smallest_normal))))
    lost = (got == 0) & (np.abs(want) >= float(info.smallest_subnormal))
    return np.where(lost, np.inf, np.abs(got - want) / (float(info.eps) * 2.0**place))


def judge(got: Tree, want: Tree, given: Tree, dtype: Any, is_flagged: bool) -> str:
    """The letter of a cell, see the top of this file."""
    flat = lambda tree: np.concatenate([np.asarray(x, np.float64).ravel() for x in tree.values()])
    got, want, given = flat(got), flat(want), flat(given)
    finite = np.isfinite(want)
    same = np.array_equal(got[~finite], want[~finite], equal_nan=True)
    error = (
        np.max(ulps(got[finite], want[finite], dtype), initial=0)
        if np.isfinite(got[finite]).all()
        else np.inf
    )
    if same and error <= 2:
        if np.isfinite(got).all():
            return "="
        return "!" if is_flagged else "N"
    if not np.isfinite(got).all():
        return "N"
    if same and error <= 16:
        return "~"
    if np.any((got == 0) & (want != 0)):
        return "0"
    return "U" if np.array_equal(got, given) else "W"


def is_flagged(state: Any) -> bool:
    """Whether a state's telemetry says that the gradient is not finite; Optax's has none."""
    seen = {k: np.asarray(v) for k, v in T.telemetry(state).items() if "/log2_norm" in k}
    return any(np.any(np.isnan(v) | np.isposinf(v)) for v in seen.values())


def cells(
    rule: Rule, make: Callable[[], Any], reference: Callable[[Tree], Tree], dtype: Any, jit: bool
) -> list[str]:
    """One letter for each magnitude."""
    tx = make()
    update = jax.jit(tx.update) if jit else tx.update
    ones = {k: jnp.ones(x.shape, dtype) for k, x in PATTERN.items()}
    state = tx.init(ones)
    for _ in range(rule.primed):
        _, state = update(ones, state, ones)
    letters = []
    for magnitude in MAGNITUDES:
        given = gradient(magnitude, dtype)
        if rule.examples:
            given = {
                k: np.stack([x, (x.astype(np.float64) / 4).astype(dtype)]) for k, x in given.items()
            }
        got, after = update({k: jnp.asarray(x) for k, x in given.items()}, state, ones)
        exact = {k: x.astype(np.float64) for k, x in given.items()}
        with np.errstate(all="ignore"):
            want = reference(exact)
        letters.append(judge(got, want, exact, dtype, is_flagged(after)))
    return letters


def grid(
    rules: dict[str, Rule] = RULES, dtypes: dict[str, Any] = DTYPES, jits: tuple = (True, False)
) -> list[dict]:
    """One row for each rule, dtype and mode: our letters, and Optax's (None without the rule)."""
    rows = []
    for name, rule in rules.items():
        for dtype_name, dtype in dtypes.items():
            for jit in jits:
                row = {"rule": name, "dtype": dtype_name, "mode": "jit" if jit else "eager"}
                row["ours"] = "".join(cells(rule, rule.ours, rule.reference, dtype, jit))
                formula = rule.optax_reference or rule.reference
                row["optax"] = (
                    "".join(cells(rule, rule.optax, formula, dtype, jit)) if rule.optax else None
                )
                rows.append(row)
    return rows


def silent(rows: list[dict], whose: str) -> int:
    return sum(letter in SILENT for row in rows for letter in row[whose] or "")


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    arguments = parser.parse_args()
    rows = grid()
    shared = [row for row in rows if row["optax"]]
    summary = {
        "silent_ours": silent(rows, "ours"),
        "silent_ours_where_optax_has_the_rule": silent(shared, "ours"),
        "silent_optax": silent(shared, "optax"),
        "cells_ours": len(rows) * len(MAGNITUDES),
        "cells_optax": len(shared) * len(MAGNITUDES),
    }
    if arguments.json:
        print(json.dumps({"magnitudes": [str(m) for m in MAGNITUDES], "rows": rows, **summary}))
        return
    table = Table(title="ours | Optax's, for gradients of the magnitude at the top")
    for column in ("rule", "dtype", "mode"):
        table.add_column(column, no_wrap=True)
    for magnitude in MAGNITUDES:
        table.add_column(f"{magnitude:g}", justify="center", no_wrap=True)
    paint = lambda letter: f"[red]{letter}[/red]" if letter in SILENT else letter
    for i, row in enumerate(rows):
        letters = zip(row["ours"], row["optax"] or " " * len(MAGNITUDES), strict=True)
        last = i + 1 == len(rows) or rows[i + 1]["rule"] != row["rule"]
        shown = (f"{paint(a)} {paint(b)}" for a, b in letters)
        table.add_row(row["rule"], row["dtype"], row["mode"], *shown, end_section=last)
    console = Console(width=max(150, Console().width))
    console.print(table)
    console.print(
        "= right   ~ rounded   ! flagged   0 silent zero   N silent NaN   U silently unclipped   "
        "W silently wrong"
    )
    console.print(
        f"silent failures: Optax's {summary['silent_optax']} of {summary['cells_optax']} cells; "
        f"ours {summary['silent_ours_where_optax_has_the_rule']} of the same, "
        f"{summary['silent_ours']} of all {summary['cells_ours']}"
    )


if __name__ == "__main__":
    main()
