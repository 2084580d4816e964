"""Log singular values of the layer product J = W_L ... W_2 W_1 of a network, at any depth.

    log sigma_i(J),  i = 1 .. N

J is the input-output Jacobian of a network (W_l the Jacobian of layer l) or of a recurrence over L
steps; its singular values say by how much a perturbation grows forward and a gradient backward,
direction by direction (Saxe, McClelland, Ganguli 2013; Pennington, Schoenholz, Ganguli 2017). They
spread over hundreds of decades, so the product formed in floating point is inf, zero, or right in
its largest value only; the diagonal of a QR sweep gives the Lyapunov exponents, which differ from
the singular values by nats at any finite depth. Here the product is kept as X diag(e^s) T
(`gradjax.spectrum.product`), float64 inside, and every value comes out to `tol` nats.

It does not cover singular vectors, nor the top few values of a width that has no N x N matrix
(`gradjax.matrix_free` does), nor derivatives of the singular values (`lyapunov_exponents` and
`moments` have derivatives). Digits that the factors themselves do not determine are counted in
`undetermined`.

Cost: O(depth * width^3) time; O(width^2) memory per lane beyond the factors or thetas.

`log_singular_values` and `jacobian_spectrum` are host-level: they open x64 around a jitted program
of their own (`gradjax.spectrum.lanes`) and return NumPy float64. On CPU, set OPENBLAS_NUM_THREADS=1
before jax is imported: LAPACK with more threads stalls on matrices of this size. On tracers, under
jit, vmap or grad, they run in the factors' own dtype (`gradjax.spectrum.jacobi`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradjax.core import scale
from gradjax.core.step import Scan, check_step, is_links, layer_jacobian, layer_jacobians
from gradjax.spectrum import lanes
from gradjax.spectrum.exponents import LyapunovExponents as LyapunovExponents
from gradjax.spectrum.exponents import lyapunov_exponents as lyapunov_exponents
from gradjax.spectrum.exponents import moments as moments
from gradjax.spectrum.factors import check_factors, on_tracers, stack_factors, x64
from gradjax.spectrum.lanes import InAxes
from gradjax.spectrum.lanes import SpectrumInfo as SpectrumInfo

PyTree = Any

# Bytes of layer Jacobians held at a time for `layers=True`.
CHUNK_BYTES = 1 << 26


class JacobianSpectrum(NamedTuple):
    """The spectrum of a network's layer product: natural logarithms, leading axes the lanes'.

    Attributes:
      log_singular_values: (..., N) log sigma_i of the product, descending; -inf is a structural
        zero.
      layer_log_singular_values: (..., depth, N) of each layer Jacobian; None unless asked for.
      log_gain: (..., depth) 1/2 log(tr J_l J_l^T / N): 0 keeps the mean square of a gradient.
      condition_nats: (...) log(sigma_max / sigma_min); inf with rank loss.
      info: how the values were found; None on tracers.
    """

    log_singular_values: np.ndarray
    layer_log_singular_values: np.ndarray | None
    log_gain: np.ndarray
    condition_nats: np.ndarray
    info: SpectrumInfo | None


def _over_lanes(f: Callable, in_axes: InAxes) -> Callable:
    return f if in_axes == (None, None) else jax.vmap(f, in_axes=in_axes)


def _check_tol(tol: float, name: str) -> float:
    if not 1e-9 <= tol <= 1e-2:
        raise ValueError(
            f"{name}: tol is {tol}; a float from 1e-9 to 1e-2 (nats) is needed. "
            "The default is 1e-6."
        )
    return float(tol)


def log_singular_values(factors: Any, *, tol: float = 1e-6, return_info: bool = False):
    """Natural logarithms of all singular values of W_L ... W_2 W_1.

    Args:
      factors: (..., L, N, N) floating, or a list of matrices (N_l, N_{l-1}) of unequal shapes with
        matching inner dimensions; applied first to last. Leading axes are lanes: separate products.
      tol: nats of error to aim at in each value, 1e-9 to 1e-2.
      return_info: also return a `SpectrumInfo`.

    Returns:
      (..., min(N_0, N_L)) NumPy float64, nats, descending. -inf is a structural zero (dead units, a
      bottleneck). A lane with a NaN or inf factor is NaN and named in a warning and in the info.

      On tracers (under jit, vmap or grad): a jax array in the factors' own dtype, no info. In
      float32 it is accurate to 1e-5 to 1e-2 nats in the smallest values. It has no derivative and
      raises NotImplementedError under grad; see `lyapunov_exponents`.

    Raises:
      ValueError: empty, ragged, integer or complex factors, inner dimensions that do not match, tol
        out of range.

    References:
      Oliveira & Stewart 2000; D. E. Stewart, ETNA 5, 1997 (the module `gradjax.spectrum.product`
      has the algorithm).

    >>> import jax.numpy as jnp
    >>> w = jnp.broadcast_to(jnp.diag(jnp.array([2.0, 0.5])), (1000, 2, 2))  # 2^1000 and 2^-1000
    >>> log_singular_values(w).round(3).tolist()
    [693.147, -693.147]
    """
    name = "log_singular_values"
    tol = _check_tol(tol, name)
    factors = check_factors(factors, name)
    if on_tracers(factors):
        return lanes.of_tracers(factors)
    values, info = lanes.of_arrays(factors, tol)
    lanes.warn(info, name)
    return (values, info) if return_info else values


def jacobian_spectrum(
    step: Any,
    h0: PyTree,
    thetas: PyTree = None,
    *,
    in_axes: InAxes = (None, None),
    layers: bool = False,
    tol: float = 1e-6,
) -> JacobianSpectrum:
    """The spectrum of the layer product of a scanned step, streamed: depth 10,000 fits in memory.

    J = J_L ... J_1 with J_l = d h_{l+1} / d h_l along the trajectory from `h0`, each by reverse
    mode in the step's own dtype (as training differentiates), then multiplied in float64. The step
    is called again after a rejected block, so it must be pure. Its dtypes and random draws are
    those that it has outside this function.

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
      ValueError: a step, state or thetas that do not fit together
        (`gradjax.core.step.check_step`), in_axes other than 0 or None, lane axes of unequal length,
        tol out of range.

    >>> import jax, jax.numpy as jnp
    >>> keys = jax.random.split(jax.random.key(0), 1000)  # the weights are never held in memory
    >>> step = lambda h, key: jax.random.orthogonal(key, 8) @ h
    >>> spectrum = jacobian_spectrum(step, jnp.ones(8), keys)
    >>> bool(abs(spectrum.log_singular_values).max() < 1e-4)  # the rounding of 1000 factors
    True
    """
    name = "jacobian_spectrum"
    tol = _check_tol(tol, name)
    h0, thetas, count = _check_lanes(step, h0, thetas, in_axes)
    in_axes = (in_axes[0], in_axes[1])
    if is_links(step) or on_tracers(h0, thetas):
        return _of_whole_network(step, h0, thetas, in_axes, layers, tol)
    context = lanes.Context(x64(), getattr(jax.config, "jax_default_matmul_precision", None))
    program = functools.partial(
        lanes.of_step, h0, thetas, step=step, in_axes=in_axes, context=context
    )
    values, log_gain, info = lanes.run(program, count or 1, tol)
    each = None
    if layers:
        each = _each_layer(step, h0, thetas, in_axes, values.shape[-1], count or 1, tol)
    if count is None:
        values, log_gain, info = values[0], log_gain[0], SpectrumInfo(*(x[0] for x in info))
    lanes.warn(info, name)
    return JacobianSpectrum(values, each, log_gain, _condition(values, np), info)


@functools.partial(jax.jit, static_argnames=("step", "in_axes"))
def _layer_stack(h: PyTree, thetas: PyTree, *, step: Callable, in_axes: InAxes):
    """(last state, (..., depth, N, N)) of a chunk of layers, traced as the user has x64."""

    def scanned(h, thetas):
        def one(h, theta):
            jacobian, h_next = layer_jacobian(step, h, theta)
            return h_next, jacobian

        return lax.scan(one, h, thetas)

    return _over_lanes(scanned, in_axes)(h, thetas)


def _each_layer(step, h0, thetas, in_axes, n: int, count: int, tol: float) -> np.ndarray:
    """(..., depth, N) log singular values of the layer Jacobians, held a chunk at a time."""
    axis = 0 if in_axes[1] is None else 1
    depth = jax.tree.leaves(thetas)[0].shape[axis]
    chunk = max(1, CHUNK_BYTES // (8 * n * n * count))
    h, found = h0, []
    for start in range(0, depth, chunk):
        part = (slice(None),) * axis + (slice(start, start + chunk),)
        some = jax.tree.map(lambda x, part=part: x[part], thetas)
        h, stack = _layer_stack(h, some, step=step, in_axes=in_axes)
        in_axes = (None if in_axes == (None, None) else 0, in_axes[1])
        found.append(lanes.of_arrays(stack[..., None, :, :], tol)[0])
    return np.concatenate(found, axis=-2)


@functools.partial(jax.jit, static_argnames=("steps", "in_axes"))
def _all_layers(h: PyTree, thetas: PyTree, *, steps: tuple, in_axes: InAxes):
    """(layer Jacobians, log gains (..., depth)), all held at once.

    The Jacobians are a stack, or a list where their shapes are unequal.
    """

    def jacobians(h, thetas):
        if callable(steps[0]):
            return layer_jacobians(steps[0], h, thetas)
        return layer_jacobians([_link(x, theta) for x, theta in zip(steps, thetas, strict=True)], h)

    def gain(w):
        return scale.log_norm(w) - float(0.5 * np.log(w.shape[0]))

    def one(h, thetas):
        found = jacobians(h, thetas)
        if isinstance(found, list):
            return found, jnp.stack([gain(w) for w in found])
        return found, jax.vmap(gain)(found)

    return _over_lanes(one, in_axes)(h, thetas)


def _of_whole_network(step, h0, thetas, in_axes, layers: bool, tol: float) -> JacobianSpectrum:
    """Links of unequal width, and tracers: all layer Jacobians are held at once."""
    steps = (step,)
    if is_links(step):
        steps = tuple((link[0], isinstance(link, Scan)) for link in step)
        thetas = [link[1] for link in step]
    factors, log_gain = _all_layers(h0, thetas, steps=steps, in_axes=in_axes)
    stack, shapes = stack_factors(factors)
    exists = np.array([[i < min(shape) for i in range(stack.shape[-1])] for shape in shapes])
    exists = np.broadcast_to(exists, stack.shape[:-1])
    each, one_by_one = None, stack[..., None, :, :]
    if on_tracers(h0, thetas):
        values = lanes.of_tracers(factors)
        if layers:
            each = jnp.where(exists, lanes.of_tracers(one_by_one), jnp.nan)
        spectrum: Any = (values, each, log_gain, _condition(values, jnp), None)
        return JacobianSpectrum(*spectrum)
    values, info = lanes.of_arrays(factors, tol)
    lanes.warn(info, "jacobian_spectrum")
    if layers:
        each = np.where(exists, lanes.of_arrays(one_by_one, tol)[0], np.nan)
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
    of_links = is_links(step) and thetas is None
    trees = (h0, [link[1] for link in step] if of_links else thetas)

    sizes = set()
    for tree, axis in zip(trees, in_axes, strict=True):
        if axis == 0:
            sizes |= {np.shape(x)[0] if np.ndim(x) else None for x in jax.tree.leaves(tree)}
    if len(sizes) > 1 or None in sizes or 0 in sizes:
        raise ValueError(
            f"{name}: in_axes={tuple(in_axes)} asks for one leading lane axis, but the leaves have "
            f"leading lengths {', '.join(sorted(map(str, sizes)))}; "
            "one common length of at least 1 is needed."
        )

    one = [
        lanes.shapes_of(tree, 0 if axis is None else 1)
        for tree, axis in zip(trees, in_axes, strict=True)
    ]
    if of_links:
        kinds = [(link[0], isinstance(link, Scan)) for link in step]
        check_step([_link(kind, theta) for kind, theta in zip(kinds, one[1], strict=True)], one[0])
    else:
        check_step(step, *one)
    return h0, thetas, sizes.pop() if sizes else None
