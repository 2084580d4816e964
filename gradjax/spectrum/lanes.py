"""Lanes of spectra: the compiled programs, and the host loop that runs, judges and repeats them.

A lane is one product of a batch. Lanes are mapped sequentially inside a program, so that a rejected
block in one does not stall the others, and chunks of lanes run on one thread per core. A lane whose
scales end out of order or whose T grew too large is run again by the careful sweep
(`gradjax.spectrum.product`); one whose factor is NaN or inf is NaN.
"""

import functools
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.extend.core
import numpy as np
from jax import Array, lax

from gradjax.core.step import layer_jacobian
from gradjax.spectrum import grading, jacobi, product
from gradjax.spectrum.factors import stack_factors

PyTree = Any
InAxes = tuple[int | None, int | None]


class SpectrumInfo(NamedTuple):
    """How each lane's log singular values were found, and how far they can be trusted.

    Every field has the shape of the lanes.

    Attributes:
      method: str: "lu", "careful" (the fallback), "none" (the lane is NaN).
      blocks: int: factorisations.
      rejects: int: blocks thrown away and redone shorter.
      error_bound: nats: from the pivots, 10 to 1000 times the errors that were measured; inf where
        there is no bound.
      undetermined: int: values decided by the rounding of one factor in its own dtype.
      failed_layer: int: the layer whose factor is NaN or inf, or -1.
      trusted: bool: all checks passed; a warning is issued when False.
    """

    method: np.ndarray
    blocks: np.ndarray
    rejects: np.ndarray
    error_bound: np.ndarray
    undetermined: np.ndarray
    failed_layer: np.ndarray
    trusted: np.ndarray


# Programs: jitted inside x64


def _solve(
    layer: product.Layer,
    carry: PyTree,
    depth: int,
    n: int,
    tol: Array,
    *,
    dtype: Any,
    careful: bool,
    passes: int,
):
    """One lane: (what is left for `grading.windows`, the sweep without its matrices)."""
    found = product.sweep(layer, carry, depth, n, tol=tol, dtype=dtype, careful=careful)
    graded = grading.finish(found, passes)
    return graded, {k: x for k, x in found._asdict().items() if k not in ("x_t", "s", "t_t")}


@functools.partial(jax.jit, static_argnames=("careful", "passes"))
def of_factors(factors: Array, lanes: Array, tol: Array, **static: Any):
    """`_solve` of some lanes of a stack of factors.

    Args:
      factors: (..., L, N, N); flattened here, where it costs no copy.
      lanes: (b,) indices into the flattened leading axes.
      tol: nats.
      **static: `careful` and `passes` of `_solve`.
    """
    factors = factors.reshape(-1, *factors.shape[-3:])

    def one(lane):
        def layer(carry, index):
            return carry, factors[lane, index]

        depth, n = factors.shape[1], factors.shape[-1]
        return _solve(layer, (), depth, n, tol, dtype=factors.dtype, **static)

    return lax.map(one, lanes)


def shapes_of(tree: PyTree, drop: int = 0) -> PyTree:
    """ShapeDtypeStructs of a pytree of arrays without their first `drop` axes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[drop:], x.dtype), tree)


class Context(NamedTuple):
    """The caller's JAX settings that decide a step's numbers; both are local to a thread."""

    x64: bool
    precision: str | None


def _jacobian_in(context: Context, step: Callable, h: PyTree, theta: PyTree) -> Callable:
    """`layer_jacobian(step)` as it is traced under the caller's own settings.

    Traced inside x64 the step would be another network: `jnp.zeros(4)` and `random.normal` would be
    float64, and dropout would draw other masks. Evaluating its jaxpr there keeps every dtype and
    bit.
    """
    with jax.enable_x64(context.x64), jax.default_matmul_precision(context.precision):
        jaxpr, shapes = jax.make_jaxpr(functools.partial(layer_jacobian, step), return_shape=True)(
            shapes_of(h), shapes_of(theta)
        )
    run, structure = jax.extend.core.jaxpr_as_fun(jaxpr), jax.tree.structure(shapes)
    return lambda h, theta: jax.tree.unflatten(structure, run(*jax.tree.leaves((h, theta))))


def _pick(tree: PyTree, *index: Array) -> PyTree:
    return jax.tree.map(lambda x: x[index], tree)


@functools.partial(jax.jit, static_argnames=("step", "in_axes", "context", "careful", "passes"))
def of_step(
    h0: PyTree, thetas: PyTree, lanes: Array, tol: Array, *, step, in_axes, context, **static: Any
):
    """`_solve` of some lanes of a step, whose layer Jacobians are made inside the sweep.

    Memory O(N^2) per lane beside the thetas.
    """
    depth = jax.tree.leaves(thetas)[0].shape[0 if in_axes[1] is None else 1]

    def one(lane):
        h = h0 if in_axes[0] is None else _pick(h0, lane)

        def theta(index):
            return _pick(thetas, index) if in_axes[1] is None else _pick(thetas, lane, index)

        jacobian = _jacobian_in(context, step, h, theta(0))
        w = jax.eval_shape(jacobian, h, theta(0))[0]

        def layer(h, index):
            w, h_next = jacobian(h, theta(index))
            return h_next, w

        return _solve(layer, h, depth, w.shape[0], tol, dtype=w.dtype, **static)

    return lax.map(one, lanes)


# The host: run, judge, fall back, warn


def _workers() -> int:
    """Threads that run lanes: one per core on a CPU, where one lane's LAPACK calls use one core."""
    if jax.default_backend() != "cpu":
        return 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _in_lanes(
    program: Callable, lanes: np.ndarray, tol: float, careful: bool
) -> tuple[np.ndarray, dict]:
    """(log singular values, what the sweeps found) of some lanes, in chunks over the cores."""

    def chunk(lanes):
        # x64 is local to a thread
        with jax.enable_x64(True):
            graded, found = program(
                lanes, np.float64(tol), careful=careful, passes=grading.passes(tol)
            )
            return grading.windows(graded, tol), {name: np.array(x) for name, x in found.items()}

    workers = _workers()
    size = max(1, len(lanes) // (4 * workers)) if workers > 1 else len(lanes)
    # the last chunk is filled up from the first
    chunks = np.resize(lanes, (-(-len(lanes) // size), size)).astype(np.int32)
    # the first runs by itself, since it may have to compile
    done = [chunk(chunks[0])]
    if len(chunks) > 1:
        with ThreadPoolExecutor(workers) as pool:
            done += pool.map(chunk, chunks[1:])

    def join(parts):
        return np.concatenate(parts)[: len(lanes)]

    values = join([x for x, _ in done])
    return values, {name: join([found[name] for _, found in done]) for name in done[0][1]}


def run(program: Callable, count: int, tol: float) -> tuple[np.ndarray, np.ndarray, SpectrumInfo]:
    """(log singular values (count, N), log_gain (count, depth), info) of `count` lanes."""
    values, found = _in_lanes(program, np.arange(count), tol, careful=False)
    solved = found["failed_at"] < 0
    moderate = (found["growth"] < product.GROWTH) & (found["disorder"] < product.DISORDER)
    method = np.full(count, "lu", "<U8")
    again = np.flatnonzero(~(solved & moderate) & ~found["nonfinite"])
    if again.size:
        values[again], careful = _in_lanes(program, again, tol, careful=True)
        for name, x in careful.items():
            found[name][again] = x
        method[again] = "careful"
    failed = found["failed_at"] >= 0
    values[failed], method[failed] = np.nan, "none"
    steady = found["closed"] < product.CLOSED
    info = SpectrumInfo(
        method=method,
        blocks=found["blocks"],
        rejects=found["rejects"],
        error_bound=np.where(steady, found["error"], np.inf),
        undetermined=found["undetermined"],
        failed_layer=found["failed_at"],
        trusted=~np.isnan(values).any(axis=1) & steady & (found["worst"] <= 1.001 * tol),
    )
    return values, found["log_gain"], info


def warn(info: SpectrumInfo, name: str) -> None:
    """Warn of lanes that are NaN, by layer, and of those that rounding decides."""
    for lane in np.argwhere(info.failed_layer >= 0)[:5]:
        at = tuple(int(i) for i in lane)
        where = ""
        if at:
            where = f"lane {at[0] if len(at) == 1 else at}, "
        warnings.warn(
            f"{name}: {where}layer {int(info.failed_layer[at])}: the factor holds NaN or inf; that "
            "lane is NaN, the others are not affected.",
            stacklevel=3,
        )
    doubtful = int(((info.failed_layer < 0) & ~info.trusted).sum())
    if doubtful:
        warnings.warn(
            f"{name}: in {doubtful} of {info.trusted.size} products rounding decides the smallest "
            "values: a factor is too ill-conditioned for float64, or directions grow apart and "
            "draw near again. See info.error_bound.",
            stacklevel=3,
        )


def of_arrays(factors: Any, tol: float) -> tuple[np.ndarray, SpectrumInfo]:
    """(log singular values, info) of checked factors, without the warnings."""
    with jax.enable_x64(True):
        stack, shapes = stack_factors(factors)
        lanes, n = stack.shape[:-3], stack.shape[-1]
    values, _, info = run(functools.partial(of_factors, stack), int(np.prod(lanes)), tol)
    info = SpectrumInfo(*(x.reshape(lanes) for x in info))
    return values.reshape(*lanes, n)[..., : min(shapes[0][1], shapes[-1][0])], info


def of_tracers(factors: Any) -> Array:
    """Log singular values in the factors' own dtype."""
    stack, shapes = stack_factors(factors)
    values = jax.vmap(jacobi.log_singular_values)(stack.reshape(-1, *stack.shape[-3:]))
    return values.reshape(*stack.shape[:-3], -1)[..., : min(shapes[0][1], shapes[-1][0])]
