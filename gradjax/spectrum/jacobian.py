"""Log singular values of the layer product J = W_L ... W_2 W_1, its Lyapunov exponents and moments,
at any depth.

    log sigma_i(J),  i = 1 .. N,      lambda_i = lim 1/L log sigma_i(J),      m_k = tr (J J^T)^k / N

J is the input-output Jacobian of a network (W_l the Jacobian of layer l) or of a recurrence over L
steps; its singular values say by how much a perturbation grows forward and a gradient backward,
direction by direction (Saxe, McClelland, Ganguli 2013; Pennington, Schoenholz, Ganguli 2017). They
spread over hundreds of decades, so the product formed in floating point is inf, zero, or right in
its largest value only; the diagonal of a QR sweep is the Lyapunov exponents, which differ from the
singular values by nats at any finite depth. Here the product is kept as X diag(e^s) T
(`gradjax.spectrum.product`), float64 inside, and every value comes out to `tol` nats.

What it does not cover: singular vectors and the top few values of a width that has no N x N matrix
(matrix-free methods); derivatives of the singular values (`lyapunov_exponents` and `moments` have
derivatives); digits that the factors themselves do not determine (`undetermined` counts them).

Cost: O(depth * width^3) time; O(width^2) memory per lane beyond the factors or thetas.

`log_singular_values` and `jacobian_spectrum` are host-level: they open x64 around a jitted program
of their own and return NumPy float64. On CPU, set OPENBLAS_NUM_THREADS=1 before jax is imported:
LAPACK with more threads stalls on matrices of this size. On tracers, under jit, vmap or grad, they
run in the factors' own dtype (`gradjax.spectrum.jacobi`).
"""

import functools
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gradjax.core import scale
from gradjax.core.step import Scan, check_step, is_links, layer_jacobian, layer_jacobians
from gradjax.spectrum import grading, jacobi, product
from gradjax.spectrum.exponents import LyapunovExponents as LyapunovExponents
from gradjax.spectrum.exponents import lyapunov_exponents as lyapunov_exponents
from gradjax.spectrum.exponents import moments as moments
from gradjax.spectrum.factors import check_factors, on_tracers, stack_factors, x64

PyTree = Any

CHUNK_BYTES = 1 << 26  # of layer Jacobians held at a time for `layers=True`


class SpectrumInfo(NamedTuple):
    """How each lane's log singular values were found, and what they are worth; every field has the
    lanes' shape.
    """

    method: np.ndarray  # str: "lu", "careful" (the fallback), "none" (NaN)
    blocks: np.ndarray  # int: factorisations
    rejects: np.ndarray  # int: blocks thrown away and redone shorter
    error_bound: (
        np.ndarray
    )  # nats: from the pivots, 10 to 1000 times the errors that were measured; inf: no bound
    undetermined: np.ndarray  # int: values decided by the rounding of one factor in its own dtype
    failed_layer: np.ndarray  # int: the layer whose factor is NaN or inf, or -1
    trusted: np.ndarray  # bool: the checks passed; False is also told by a warning


class JacobianSpectrum(NamedTuple):
    """The spectrum of a network's layer product; natural logarithms, leading axes those of the
    lanes.
    """

    log_singular_values: (
        np.ndarray
    )  # (..., N) log sigma_i of the product, descending; -inf is a structural zero
    layer_log_singular_values: (
        np.ndarray | None
    )  # (..., depth, N) of each layer Jacobian, if asked for
    log_gain: (
        np.ndarray
    )  # (..., depth) 1/2 log(tr J_l J_l^T / N): 0 keeps the mean square of a gradient
    condition_nats: np.ndarray  # (...) log(sigma_max / sigma_min); inf with rank loss
    info: SpectrumInfo | None  # None on tracers


# ---- programs: jitted inside x64, one lane after another, so that no lane waits for another's rejected blocks


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
def _of_factors(factors: Array, lanes: Array, tol: Array, **static: Any):
    """factors (..., L, N, N), lanes (b,) indices into the leading axes, flattened here where it
    costs no copy.
    """
    factors = factors.reshape(-1, *factors.shape[-3:])

    def one(lane):
        layer = lambda carry, index: (carry, factors[lane, index])
        depth, n = factors.shape[1], factors.shape[-1]
        return _solve(layer, (), depth, n, tol, dtype=factors.dtype, **static)

    return lax.map(one, lanes)


def _shapes(tree: PyTree, drop: int = 0) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[drop:], x.dtype), tree)


class _Context(NamedTuple):
    """What of the caller's JAX settings decides the numbers of a step; both are local to a
    thread.
    """

    x64: bool
    precision: str | None


def _jacobian_in(context: _Context, step: Callable, h: PyTree, theta: PyTree) -> Callable:
    """`layer_jacobian(step)` as it is traced under the caller's own settings.

    Traced inside x64 the step would be another network: `jnp.zeros(4)` and `random.normal` would be float64, and
    dropout would draw other masks. Evaluating its jaxpr there keeps every dtype and bit.
    """
    with jax.enable_x64(context.x64), jax.default_matmul_precision(context.precision):
        jaxpr, shapes = jax.make_jaxpr(functools.partial(layer_jacobian, step), return_shape=True)(
            _shapes(h), _shapes(theta)
        )
    run, structure = jax.extend.core.jaxpr_as_fun(jaxpr), jax.tree.structure(shapes)
    return lambda h, theta: jax.tree.unflatten(structure, run(*jax.tree.leaves((h, theta))))


def _pick(tree: PyTree, *index: Array) -> PyTree:
    return jax.tree.map(lambda x: x[index], tree)


@functools.partial(jax.jit, static_argnames=("step", "in_axes", "context", "careful", "passes"))
def _of_step(
    h0: PyTree, thetas: PyTree, lanes: Array, tol: Array, *, step, in_axes, context, **static: Any
):
    """The layer Jacobians are made inside the sweep from (h, theta_l): memory O(N^2) per lane."""
    depth = jax.tree.leaves(thetas)[0].shape[0 if in_axes[1] is None else 1]

    def one(lane):
        h = h0 if in_axes[0] is None else _pick(h0, lane)
        theta = lambda index: (
            _pick(thetas, index) if in_axes[1] is None else _pick(thetas, lane, index)
        )
        jacobian = _jacobian_in(context, step, h, theta(0))
        w = jax.eval_shape(jacobian, h, theta(0))[0]

        def layer(h, index):
            w, h_next = jacobian(h, theta(index))
            return h_next, w

        return _solve(layer, h, depth, w.shape[0], tol, dtype=w.dtype, **static)

    return lax.map(one, lanes)


@functools.partial(jax.jit, static_argnames=("step", "in_axes"))
def _layer_stack(
    h: PyTree, thetas: PyTree, *, step: Callable, in_axes: tuple[int | None, int | None]
):
    """(last state, (..., depth, N, N)) of a chunk of layers, traced as the user has x64."""

    def scanned(h, thetas):

        def one(h, theta):
            jacobian, h_next = layer_jacobian(step, h, theta)
            return h_next, jacobian

        return lax.scan(one, h, thetas)

    return _over_lanes(scanned, in_axes)(h, thetas)


def _over_lanes(f: Callable, in_axes: tuple[int | None, int | None]) -> Callable:
    return f if in_axes == (None, None) else jax.vmap(f, in_axes=in_axes)


# ---- the host: run, judge, fall back, warn


def _workers() -> int:
    """Threads that run lanes: one per core on a CPU, where one lane's LAPACK calls use one core."""
    if jax.default_backend() != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_lanes(
    program: Callable, lanes: np.ndarray, tol: float, careful: bool
) -> tuple[np.ndarray, dict]:
    """(log singular values, what the sweeps found) of some lanes: chunks of them, over the
    cores.
    """

    def chunk(lanes):
        with jax.enable_x64(True):  # local to a thread
            graded, found = program(
                lanes, np.float64(tol), careful=careful, passes=grading.passes(tol)
            )
            return grading.windows(graded, tol), {name: np.array(x) for name, x in found.items()}

    workers = _workers()
    size = max(1, len(lanes) // (4 * workers)) if workers > 1 else len(lanes)
    chunks = np.resize(lanes, (-(-len(lanes) // size), size)).astype(
        np.int32
    )  # the last one filled up from the first
    done = [chunk(chunks[0])]  # alone: it may have to compile
    if len(chunks) > 1:
        with ThreadPoolExecutor(workers) as pool:
            done += pool.map(chunk, chunks[1:])
    join = lambda parts: np.concatenate(parts)[: len(lanes)]
    return join([x for x, _ in done]), {
        name: join([found[name] for _, found in done]) for name in done[0][1]
    }


def _run(program: Callable, count: int, tol: float) -> tuple[np.ndarray, np.ndarray, SpectrumInfo]:
    """(log singular values (count, N), log_gain (count, depth), info) of `count` lanes of a
    program.
    """
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


def _warn(info: SpectrumInfo, name: str) -> None:
    for lane in np.argwhere(info.failed_layer >= 0)[:5]:
        at = tuple(int(i) for i in lane)
        where = f"lane {at[0] if len(at) == 1 else at}, " if at else ""
        warnings.warn(
            f"{name}: {where}layer {int(info.failed_layer[at])}: the factor holds NaN or inf; that lane is NaN, others "
            "are not touched.",
            stacklevel=3,
        )
    doubtful = int(((info.failed_layer < 0) & ~info.trusted).sum())
    if doubtful:
        warnings.warn(
            f"{name}: in {doubtful} of {info.trusted.size} products rounding decides the smallest values: a factor is "
            "too ill-conditioned for float64, or directions grow apart and draw near again. See info.error_bound.",
            stacklevel=3,
        )


def _check_tol(tol: float, name: str) -> float:
    if not 1e-9 <= tol <= 1e-2:
        raise ValueError(
            f"{name}: tol is {tol}; a float from 1e-9 to 1e-2 (nats) is needed. The default is 1e-6."
        )
    return float(tol)


def _of_arrays(factors: Any, tol: float) -> tuple[np.ndarray, SpectrumInfo]:
    """(log singular values, info) of checked factors, without the warnings."""
    with jax.enable_x64(True):
        stack, shapes = stack_factors(factors)
        lanes, n = stack.shape[:-3], stack.shape[-1]
    values, _, info = _run(functools.partial(_of_factors, stack), int(np.prod(lanes)), tol)
    info = SpectrumInfo(*(x.reshape(lanes) for x in info))
    return values.reshape(*lanes, n)[..., : min(shapes[0][1], shapes[-1][0])], info


def _of_tracers(factors: Any) -> Array:
    """Log singular values in the factors' own dtype."""
    stack, shapes = stack_factors(factors)
    values = jax.vmap(jacobi.log_singular_values)(stack.reshape(-1, *stack.shape[-3:]))
    return values.reshape(*stack.shape[:-3], -1)[..., : min(shapes[0][1], shapes[-1][0])]


def log_singular_values(factors: Any, *, tol: float = 1e-6, return_info: bool = False):
    """Natural logarithms of all singular values of W_L ... W_2 W_1, for factors applied first to
    last.

    Args:
      factors: (..., L, N, N) floating, or a list of matrices (N_l, N_{l-1}) of unequal shapes with matching inner
        dimensions. Leading axes are lanes: separate products.
      tol: nats of error to aim at in each value, 1e-9 to 1e-2.
      return_info: also return a `SpectrumInfo`.

    Returns:
      (..., min(N_0, N_L)) NumPy float64, nats, descending. -inf is a structural zero (dead units, a bottleneck). A
      lane with a NaN or inf factor is NaN and named in a warning and in the info.

      On tracers (under jit, vmap or grad): a jax array in the factors' own dtype, no info. In float32 that is worth
      1e-5 to 1e-2 nats in the smallest values; its derivative refuses, see `lyapunov_exponents`.

    Raises:
      ValueError: empty, ragged, integer or complex factors, inner dimensions that do not match, tol
        out of range.

    References:
      Oliveira & Stewart 2000; D. E. Stewart, ETNA 5, 1997 (the module `gradjax.spectrum.product`
      has the algorithm).

    >>> import jax.numpy as jnp
    >>> w = jnp.broadcast_to(jnp.diag(jnp.array([2.0, 0.5])), (1000, 2, 2))    # 2^1000 and 2^-1000
    >>> log_singular_values(w).round(3).tolist()
    [693.147, -693.147]
    """
    name = "log_singular_values"
    tol = _check_tol(tol, name)
    factors = check_factors(factors, name)
    if on_tracers(factors):
        return _of_tracers(factors)
    values, info = _of_arrays(factors, tol)
    _warn(info, name)
    return (values, info) if return_info else values


def jacobian_spectrum(
    step: Any,
    h0: PyTree,
    thetas: PyTree = None,
    *,
    in_axes: tuple[int | None, int | None] = (None, None),
    layers: bool = False,
    tol: float = 1e-6,
) -> JacobianSpectrum:
    """The spectrum of the layer product of a step, scanned: streaming, so that depth 10,000 fits in
    memory.

    J = J_L ... J_1 with J_l = d h_{l+1} / d h_l along the trajectory from `h0`, each by reverse mode in the step's own
    dtype (as training differentiates), then multiplied in float64. The step is called again after a rejected block:
    it must be pure. Its dtypes and random draws are those that it has outside this function.

    Args:
      step: `step(h, theta) -> h`, or a list of links `[(step, theta), ...]` for layers of unequal
        width.
      h0: pytree of floating arrays, the state of ONE example, N numbers in all.
      thetas: pytree with a leading axis of length depth on every leaf, typed PRNG keys included;
        None for links.
      in_axes: which of (h0, thetas) carry one leading lane axis (seeds or inputs): 0 or None each.
      layers: also return each layer's log singular values, at depth times the cost of one SVD.
      tol: nats of error to aim at, as in `log_singular_values`.

    Returns:
      `JacobianSpectrum`, whose leading axes (...) are (lanes,) or ().

    Raises:
      ValueError: a step, state or thetas that do not fit together (`gradjax.core.step.check_step`), in_axes other than 0 or
        None, lane axes of unequal length, tol out of range.

    >>> import jax, jax.numpy as jnp
    >>> keys = jax.random.split(jax.random.key(0), 1000)               # the weights are never held in memory
    >>> step = lambda h, key: jax.random.orthogonal(key, 8) @ h
    >>> spectrum = jacobian_spectrum(step, jnp.ones(8), keys)
    >>> bool(abs(spectrum.log_singular_values).max() < 1e-4)           # the float32 rounding of 1000 factors
    True
    """
    name = "jacobian_spectrum"
    tol = _check_tol(tol, name)
    h0, thetas, count = _check_lanes(step, h0, thetas, in_axes)
    in_axes = (in_axes[0], in_axes[1])
    if is_links(step) or on_tracers(h0, thetas):
        return _of_whole_network(step, h0, thetas, in_axes, layers, tol)
    context = _Context(x64(), getattr(jax.config, "jax_default_matmul_precision", None))
    program = functools.partial(_of_step, h0, thetas, step=step, in_axes=in_axes, context=context)
    values, log_gain, info = _run(program, count or 1, tol)
    each = (
        _each_layer(step, h0, thetas, in_axes, values.shape[-1], count or 1, tol)
        if layers
        else None
    )
    if count is None:
        values, log_gain, info = values[0], log_gain[0], SpectrumInfo(*(x[0] for x in info))
    _warn(info, name)
    return JacobianSpectrum(values, each, log_gain, _condition(values, np), info)


def _each_layer(step, h0, thetas, in_axes, n: int, count: int, tol: float) -> np.ndarray:
    """(..., depth, N) log singular values of the layer Jacobians, of which a bounded number is held
    at a time.
    """
    axis = 0 if in_axes[1] is None else 1
    depth = jax.tree.leaves(thetas)[0].shape[axis]
    chunk = max(1, CHUNK_BYTES // (8 * n * n * count))
    h, found = h0, []
    for start in range(0, depth, chunk):
        part = [slice(None)] * axis + [slice(start, start + chunk)]
        h, stack = _layer_stack(
            h, jax.tree.map(lambda x, p=tuple(part): x[p], thetas), step=step, in_axes=in_axes
        )
        in_axes = (None if in_axes == (None, None) else 0, in_axes[1])
        found.append(_of_arrays(stack[..., None, :, :], tol)[0])
    return np.concatenate(found, axis=-2)


@functools.partial(jax.jit, static_argnames=("steps", "in_axes"))
def _all_layers(h: PyTree, thetas: PyTree, *, steps: tuple, in_axes: tuple[int | None, int | None]):
    """(layer Jacobians, a stack or a list of unequal shapes; log gains (..., depth)), all held at
    once.
    """

    def jacobians(h, thetas):
        if callable(steps[0]):
            return layer_jacobians(steps[0], h, thetas)
        return layer_jacobians([_link(x, theta) for x, theta in zip(steps, thetas, strict=True)], h)

    def gain(w):
        return scale.log_norm(w) - float(0.5 * np.log(w.shape[0]))

    def one(h, thetas):
        found = jacobians(h, thetas)
        return found, jnp.stack([gain(w) for w in found]) if isinstance(found, list) else jax.vmap(
            gain
        )(found)

    return _over_lanes(one, in_axes)(h, thetas)


def _of_whole_network(step, h0, thetas, in_axes, layers: bool, tol: float) -> JacobianSpectrum:
    """Links of unequal width, and tracers: all layer Jacobians are held at once."""
    steps = (step,)
    if is_links(step):
        steps, thetas = (
            tuple((link[0], isinstance(link, Scan)) for link in step),
            [link[1] for link in step],
        )
    factors, log_gain = _all_layers(h0, thetas, steps=steps, in_axes=in_axes)
    stack, shapes = stack_factors(factors)
    exists = np.array([[i < min(shape) for i in range(stack.shape[-1])] for shape in shapes])
    exists = np.broadcast_to(exists, stack.shape[:-1])
    each, one_by_one = None, stack[..., None, :, :]
    if on_tracers(h0, thetas):
        values = _of_tracers(factors)
        if layers:
            each = jnp.where(exists, _of_tracers(one_by_one), jnp.nan)
        return JacobianSpectrum(values, each, log_gain, _condition(values, jnp), None)  # pyright: ignore
    values, info = _of_arrays(factors, tol)
    _warn(info, "jacobian_spectrum")
    if layers:
        each = np.where(exists, _of_arrays(one_by_one, tol)[0], np.nan)
    return JacobianSpectrum(values, each, np.asarray(log_gain, float), _condition(values, np), info)


def _link(step: tuple[Callable, bool], theta: PyTree) -> Any:
    return Scan(step[0], theta) if step[1] else (step[0], theta)


def _condition(values: Any, xp: Any) -> Any:
    top, bottom = values[..., 0], values[..., -1]
    lost = bottom == -xp.inf
    return xp.where(lost, xp.inf, top - xp.where(lost, 0.0, bottom))


def _check_lanes(
    step: Any, h0: PyTree, thetas: PyTree, in_axes: Any
) -> tuple[PyTree, PyTree, int | None]:
    """Arrays for the pytrees, and the number of lanes (None: one, without an axis)."""
    name = "jacobian_spectrum"
    if len(tuple(in_axes)) != 2 or any(axis not in (0, None) for axis in in_axes):
        raise ValueError(
            f"{name}: in_axes is {in_axes}; a pair for (h0, thetas), each 0 or None, is needed."
        )
    h0, thetas = jax.tree.map(jnp.asarray, (h0, thetas))
    trees = (h0, [link[1] for link in step] if is_links(step) and thetas is None else thetas)
    leaves = [
        x
        for tree, axis in zip(trees, in_axes, strict=True)
        if axis == 0
        for x in jax.tree.leaves(tree)
    ]
    sizes = {np.shape(x)[0] if np.ndim(x) else None for x in leaves}
    if len(sizes) > 1 or None in sizes or 0 in sizes:
        raise ValueError(
            f"{name}: in_axes={tuple(in_axes)} asks for one leading lane axis, but the leaves have leading lengths "
            f"{', '.join(sorted(map(str, sizes)))}; one common length of at least 1 is needed."
        )
    one = [
        _shapes(tree, 0 if axis is None else 1) for tree, axis in zip(trees, in_axes, strict=True)
    ]
    if is_links(step) and thetas is None:
        links = [
            _link((link[0], isinstance(link, Scan)), theta)
            for link, theta in zip(step, one[1], strict=True)
        ]
        check_step(links, one[0])
    else:
        check_step(step, *one)
    return h0, thetas, sizes.pop() if sizes else None
