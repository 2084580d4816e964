"""How far rounding moves the values of a program, and whether two arrays differ beyond it.

The movement is measured (Monte Carlo arithmetic): the program is evaluated again, and every
operation whose result the other program does not have bit for bit gets an error of random sign,

    |error of y|       = eps |y|                   + - * / and square roots; 4 eps |y| for others,
                                                   which 16-bit dtypes evaluate in float32
    |error of sum x_i| = eps sqrt(n) (||x||_2 / 2 + |sum x_i| / 4)              sums of n terms

of the dtype it is computed in. The second line is what errors of random sign add up to in a sum
of terms in random order, one after the other, where partial sums are sqrt(k) rms(x) + k mean(x),
with about twice the rms of a correctly rounded operation. Where it is more, as it is for terms that
are sorted, the error is twice what changes if the terms are added from the last to the first. Sums
of 16-bit factors are accumulated in float32.

Two arrays differ beyond rounding where an entry of one is farther from the other's than both moved
together, in the largest of `RUNS` evaluations and of all entries of about the same size.

References:
  D. S. Parker, Monte Carlo Arithmetic: how to gamble with floating point and win (2000), Computing
    in Science and Engineering 2(4).
  N. J. Higham and T. Mary, A New Approach to Probabilistic Rounding Error Analysis (2019), SIAM J.
    Sci. Comput. 41(5): why errors of random sign give sqrt(n) in place of n.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradjax.comparison.listing import Data, Equation, Listing, Node, Signs
from gradjax.taps.jaxprs import bind

# Evaluations with rounding errors.
RUNS = 4
# Entries are of about the same size if their exponents lie in one such range.
_OCTAVES = 4
# A smaller entry is allowed what so many of all entries are allowed.
_TYPICAL = 0.1

# Operations whose result is one of their operands' entries, or is never rounded.
# fmt: off
EXACT = {
    "abs", "argmax", "argmin", "broadcast_in_dim", "ceil", "clamp", "concatenate", "conj",
    "copy", "copy_p", "dynamic_slice", "dynamic_update_slice", "expand_dims", "floor", "gather",
    "gradjax_cotangent", "gradjax_name", "gradjax_tangent", "gradjax_value", "imag", "iota",
    "is_finite", "max", "min", "neg", "optimization_barrier", "pad", "real", "reduce_max",
    "reduce_min", "reshape", "rev", "round", "scatter", "select_and_gather_add", "select_n",
    "sign", "slice", "sort", "split", "squeeze", "stack", "stop_gradient", "tile", "transpose",
}
# fmt: on
_CORRECTLY_ROUNDED = {
    "add",
    "add_any",
    "convert_element_type",
    "div",
    "mul",
    "reduce_precision",
    "rsqrt",
    "sqrt",
    "square",
    "sub",
}
_SUMS = {
    "conv_general_dilated",
    "cumsum",
    "dot_general",
    "reduce_sum",
    "reduce_window_sum",
    "scatter-add",
    "scatter_add",
}
_CONTAINERS = {"cond", "scan"}


def is_inexact(x: Any) -> bool:
    """Whether an array holds floating or complex numbers."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def epsilon(x: Any) -> float:
    """The spacing of numbers at 1 in the dtype of an array."""
    return float(jnp.finfo(x.dtype).eps)


def rounds(equation: Equation, data: Data) -> bool:
    """Whether an equation's first output is rounded."""
    if not equation.outputs or equation.name in EXACT | _CONTAINERS:
        return False
    out = data[equation.outputs[0]]
    if not is_inexact(out):
        return False
    if equation.name == "convert_element_type":
        given = equation.eqn.invars[0].aval
        return is_inexact(given) and epsilon(out) > epsilon(given)
    return True


# Rounding errors


def _terms(eqn: Any) -> int:
    """How many numbers an entry of a sum is the sum of."""
    sizes = [math.prod(var.aval.shape) for var in eqn.invars]
    out = max(1, math.prod(eqn.outvars[0].aval.shape))
    if eqn.primitive.name == "dot_general":
        contracted, _ = eqn.params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return math.prod(shape[axis] for axis in contracted[0])
    if eqn.primitive.name == "conv_general_dilated":
        channel = eqn.params["dimension_numbers"].rhs_spec[0]
        return max(1, sizes[1] // eqn.invars[1].aval.shape[channel])
    if eqn.primitive.name == "cumsum":
        return eqn.invars[0].aval.shape[eqn.params["axis"]]
    return max(2, sizes[-1] // out)


@partial(jax.jit, static_argnames="factor")
def _moved(x: Any, sign: Any, factor: float) -> Any:
    """An array with relative errors of some `eps`."""
    moved = x + factor * epsilon(x) * jnp.abs(x).astype(x.dtype) * sign.astype(x.dtype)
    return jnp.where(jnp.isfinite(x), moved, x)


@partial(jax.jit, static_argnames=("terms", "eps"))
def _moved_sum(
    x: Any, sign: Any, squares: Any, scale: Any, turned: Any, terms: int, eps: float
) -> Any:
    """The same for sums; `squares` are the sums of the terms' squares, over the scale's."""
    norm = jnp.abs(scale) * jnp.sqrt(jnp.abs(squares))
    size = jnp.abs(x)
    errors = eps * math.sqrt(terms) * (norm / 2 + size / 4)
    change = jnp.where(jnp.isfinite(x), jnp.abs(turned - x), 0)
    relative = change / jnp.where(norm > 0, norm, jnp.ones_like(norm))
    errors = jnp.maximum(errors, 2 * jnp.sqrt(jnp.mean(jnp.square(relative))) * norm)
    moved = x + (errors + epsilon(x) * size).astype(x.dtype) * sign.astype(x.dtype)
    return jnp.where(jnp.isfinite(x), moved.astype(x.dtype), x)


def perturbed(equation: Equation, given: list, out: list, signs: list) -> list:
    """The outputs of an equation with rounding errors of these signs."""
    if equation.name in _SUMS:
        return [_perturbed_sum(equation, given, out[0], signs[0])]
    found = []
    for x, sign in zip(out, signs, strict=True):
        if sign is None:
            found.append(x)
            continue
        is_wide = jnp.finfo(x.dtype).bits > 16
        exact = equation.name in _CORRECTLY_ROUNDED
        found.append(_moved(x, sign, 4.0 if is_wide and not exact else 1.0))
    return found


def _perturbed_sum(equation: Equation, given: list, out: Any, sign: Any) -> Any:
    eqn, eps = equation.eqn, epsilon(out)
    if equation.name in ("dot_general", "conv_general_dilated"):
        eps = min(eps, float(jnp.finfo(np.float32).eps))
    squares, scale = [], jnp.ones((), out.dtype)
    for x in given:
        if is_inexact(x):
            square, largest = _squared(x)
            squares.append(square)
            scale = scale * largest.astype(out.dtype)
        else:
            squares.append(x)
    total = bind(eqn, squares)[0]
    return _moved_sum(out, sign, total, scale, _turned(eqn, given, out), _terms(eqn), eps)


@jax.jit
def _squared(x: Any) -> tuple[Any, Any]:
    """The squares of an array's entries over its largest, and that one."""
    size = jnp.abs(x)
    largest = jnp.max(jnp.where(jnp.isfinite(size), size, 0), initial=jnp.finfo(x.dtype).tiny)
    return jnp.square(size / largest).astype(x.dtype), largest


def _turned(eqn: Any, given: list, out: Any) -> Any:
    """The sums, with their terms added in the reverse order; `out` where that is not simple."""
    if eqn.primitive.name == "reduce_sum":
        return bind(eqn, [lax.rev(given[0], eqn.params["axes"])])[0]
    if eqn.primitive.name == "dot_general":
        contracted, _ = eqn.params["dimension_numbers"]
        turned = [lax.rev(x, axes) for x, axes in zip(given, contracted, strict=True)]
        return bind(eqn, turned)[0]
    return out


def movements(
    listing: Listing, data: Data, noisy: Collection[Equation], inputs: Collection[Node]
) -> dict[Node, np.ndarray]:
    """How far rounding errors move the entries of every node, at most, in `RUNS` evaluations.

    Args:
      listing: the program.
      data: its arrays, without errors.
      noisy: the equations whose results get an error.
      inputs: the operands that get one.

    Returns:
      node -> absolute movement, of the shape of its array; inf where a finite number
      became infinite or NaN; nodes that never move are left out.
    """
    found: dict[Node, np.ndarray] = {}
    generator = np.random.default_rng(0)
    for _ in range(RUNS):
        operands = []
        for node in listing.inputs:
            x = data[node]
            if node in inputs:
                x = _moved(x, _signs(generator, x), 1.0)
            operands.append(x)
        signs: Signs = {}
        for each in noisy:
            arrays = [data[node] for node in each.outputs]
            signs[each] = [_signs(generator, x) if is_inexact(x) else None for x in arrays]
        _add(found, data, listing.evaluate(operands, perturbed, signs))
    return found


def _signs(generator: np.random.Generator, x: Any) -> np.ndarray:
    return (2 * generator.integers(0, 2, np.shape(x)) - 1).astype(np.int8)


def _add(found: dict[Node, np.ndarray], data: Data, moved: Data) -> None:
    """Take the larger of what is known and how far `moved` lies from `data`."""
    for node, x in moved.items():
        if not is_inexact(x):
            continue
        before, after = _at_least_single(data[node]), _at_least_single(x)
        with np.errstate(invalid="ignore", over="ignore"):
            distance = np.abs(after - before)
        if not np.isfinite(distance).all():
            both = np.isfinite(before) & np.isfinite(after)
            distance = np.where(both, distance, np.where(np.isfinite(before), np.inf, 0.0))
        if distance.any():
            known = found.get(node)
            found[node] = distance if known is None else np.maximum(known, distance)


def _at_least_single(x: Any) -> np.ndarray:
    array = np.asarray(x)
    return array.astype(np.float32) if array.dtype.itemsize < 4 else array


def wide(x: Any) -> np.ndarray:
    """An array in float64 or complex128; a key as its words."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    array = np.asarray(x)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        return array.astype(np.complex128)
    return array.astype(np.float64)


# Two arrays


def allowance(x: np.ndarray, movement: np.ndarray | None) -> np.ndarray:
    """How far each entry may be off, from the movements of all entries of about its size.

    Args:
      x: wide.
      movement: of its shape; None if nothing moves.

    Returns:
      of the shape of `x`.
    """
    if movement is None or not x.size:
        return np.zeros(x.shape)
    size, moved = np.abs(x).reshape(-1), movement.reshape(-1)
    some = np.isfinite(size) & (size > 0)
    pooled = some & np.isfinite(moved)
    largest = float(np.max(moved[np.isfinite(moved)], initial=0.0))
    if not pooled.any():
        return np.where(np.isfinite(movement), largest, np.inf)
    octave = np.full(size.shape, -10_000)
    octave[some] = np.floor(np.log2(size[some]) / _OCTAVES).astype(int)
    ranges, counts = np.unique(octave[pooled], return_counts=True)
    most = np.zeros(len(ranges))
    np.maximum.at(most, np.searchsorted(ranges, octave[pooled]), moved[pooled])
    # Entries that are small, or 0, by cancellation are as uncertain as the others.
    typical = int(np.searchsorted(np.cumsum(counts), _TYPICAL * counts.sum()))
    own = np.clip(np.searchsorted(ranges, octave), 0, len(ranges) - 1)
    allowed = most[np.maximum(own, typical)]
    allowed[octave < ranges[typical]] = np.max(most[: typical + 1])
    allowed = np.where(np.isfinite(moved), np.maximum(allowed, moved), np.inf)
    return allowed.reshape(x.shape)


@dataclass(frozen=True)
class Comparison:
    """Two arrays.

    Attributes:
      ulps: largest distance of two entries, in ulps of the wider dtype at the largest magnitude;
        inf if they are not finite in different places, or their sizes differ.
      elementwise: the same, each in the ulps of its own entry.
      limit: what rounding explains, of `ulps`.
      ratio: rms of a over that of b, of the finite entries.
      differs: whether an entry differs beyond rounding.
      exceeding: where entries do.
    """

    ulps: float
    elementwise: float
    limit: float
    ratio: float
    differs: bool
    exceeding: np.ndarray


def rms_ratio(x: np.ndarray, y: np.ndarray) -> float:
    """The ratio of the rms of two arrays' finite entries; inf if only the second is 0."""
    first, second = _log_rms(x), _log_rms(y)
    if first == second == -math.inf:
        return 1.0
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.exp(np.float64(first - second)))


def _log_rms(x: np.ndarray) -> float:
    size = np.abs(x[np.isfinite(x)])
    largest = np.max(size, initial=0.0)
    if not size.size or largest == 0:
        return -math.inf
    return float(np.log(largest) + 0.5 * np.log(np.mean(np.square(size / largest))))


def _ulp(size: Any, eps: float, tiny: float) -> Any:
    return eps * np.exp2(np.floor(np.log2(np.maximum(size, tiny))))


def compare(
    x: np.ndarray, y: np.ndarray, dtypes: tuple[Any, Any], allowed: np.ndarray | float
) -> Comparison:
    """Compare two arrays of one shape.

    Args:
      x, y: wide.
      dtypes: what they were computed in.
      allowed: how far entries may lie apart.
    """
    info = min((jnp.finfo(dtype) for dtype in dtypes), key=lambda each: float(each.eps))
    eps, tiny = float(info.eps), float(info.tiny)
    finite = np.isfinite(x) & np.isfinite(y)
    same = np.where(finite, True, (x == y) | (np.isnan(x) & np.isnan(y)))
    with np.errstate(invalid="ignore"):
        distance = np.where(finite, np.abs(x - y), np.where(same, 0.0, np.inf))
    size = np.maximum(np.where(finite, np.abs(x), 0.0), np.where(finite, np.abs(y), 0.0))
    ulp = _ulp(np.max(size, initial=0.0), eps, tiny)
    own_ulp = _ulp(size, eps, tiny)
    limit = np.broadcast_to(np.maximum(allowed, own_ulp), x.shape)
    with np.errstate(invalid="ignore"):
        excess = np.where(np.isinf(limit), 0.0, distance / limit)
    bounded = limit[np.isfinite(limit)]
    return Comparison(
        ulps=float(np.max(distance, initial=0.0) / ulp),
        elementwise=float(np.max(distance / own_ulp, initial=0.0)),
        limit=float(np.max(bounded, initial=0.0) / ulp),
        ratio=rms_ratio(x, y),
        differs=bool(np.any(excess > 1)),
        exceeding=excess > 1,
    )


def together(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How far two entries may lie apart that move by so much, each by itself."""
    return np.hypot(first, second)


__all__ = [
    "Comparison",
    "allowance",
    "compare",
    "epsilon",
    "is_inexact",
    "movements",
    "rounds",
    "together",
    "wide",
]
