"""Why an operation gave inf or NaN: from the primitive, its operands and where they come from.

Each reason has words of its own, filled with the operands' values, and remedies, the first one
first.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gradjax.replay.loops import unfold
from gradjax.replay.tape import Constant, Input, Part, Row, Step, Value, is_inexact
from gradjax.replay.walk import Culprit, depends_on, entries
from gradjax.taps.jaxprs import is_transposed


@dataclass(frozen=True)
class Reason:
    """A reason, its words and what to do.

    Attributes:
      name: as in `REASONS`.
      words: one sentence.
      remedies: what to try, in order.
    """

    name: str
    words: str
    remedies: tuple[str, ...]


class Facts(NamedTuple):
    """What is known of a culprit.

    Attributes:
      culprit: the operation, as the walk found it.
      step: its equation.
      primitive: its name.
      forward: the primitive of the forward operation whose derivative it is; else its own.
      phase: "forward" if the loss is not finite, "backward" if only its gradient is not,
        "optimizer" if only the update is not.
      operands: the values of the operands on which the bad entry depends.
      loss_scale: the power of two that the loss is multiplied by, if there is one.
    """

    culprit: Culprit
    step: Step
    primitive: str
    forward: str
    phase: str
    operands: list[np.ndarray | None]
    loss_scale: float | None


# reason -> (words, remedies). The words may use: operation, a, b (values of the operands), value,
# dtype, largest (of the dtype), how_far, forward.
REASONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "zero_over_zero": (
        "0 is divided by 0.",
        (
            "keep the denominator away from 0: x / jnp.maximum(y, eps)",
            "where both are 0, choose the value with a `where` on both sides of the division",
        ),
    ),
    "division_by_zero": (
        "{a} is divided by 0 ({operation}).",
        (
            "keep the denominator away from 0: add an eps inside, x / (y + eps)",
            "normalise with a layer that has an eps of its own",
        ),
    ),
    "log_of_zero": (
        "the logarithm of 0 is taken, which is -inf.",
        (
            "compute from the logits: jax.nn.log_softmax, jax.nn.log_sigmoid, logsumexp, "
            "optax.softmax_cross_entropy",
            "for x log x use jax.scipy.special.xlogy or entr",
            "clip the argument from below",
        ),
    ),
    "log_of_negative": (
        "the logarithm of a negative number, {a}, is taken.",
        (
            "make the argument positive: jax.nn.softplus, or predict the logarithm",
            "clip it from below",
        ),
    ),
    "root_of_negative": (
        "the root of a negative number, {a}, is taken.",
        (
            "clip the argument at 0: jnp.sqrt(jnp.maximum(x, 0) + eps)",
            "compute a variance as mean((x - mean(x))**2), which cannot be negative",
        ),
    ),
    "power_of_negative": (
        "a negative number, {a}, is raised to the power {b}, which is not an integer.",
        ("take the power of jnp.abs(x), or of a value that is positive by construction",),
    ),
    "slope_at_zero": (
        "the derivative of {forward} at 0 is infinite.",
        (
            "add an eps inside: jnp.sqrt(x + eps)",
            "where x is 0 choose the value with a `where` inside and outside: "
            "jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)",
            "use the square of the norm, or optax.safe_norm",
        ),
    ),
    "edge_of_range": (
        "{forward} is evaluated at the end of its range, or beyond: {a}.",
        (
            "clip the argument inside the range: jnp.clip(x, -1 + eps, 1 - eps)",
            "compute the angle with jnp.arctan2, which has no edge",
        ),
    ),
    "overflow": (
        "the result of {operation} is larger than {dtype} can hold, {largest}{how_far}.",
        (
            "make the operands smaller: critical initialisation, normalisation, a bound on the "
            "argument of exp",
            "compute in logarithms (logsumexp, log_softmax)",
            "a dtype of wider range: bfloat16 or float32 in place of float16",
        ),
    ),
    "cast_overflow": (
        "{a} is cast to {dtype}, whose largest number is {largest}.",
        (
            "cast to bfloat16, which has the range of float32",
            "scale before the cast",
        ),
    ),
    "infinity_minus_infinity": (
        "an infinite value is subtracted from an infinite value.",
        (
            "use a large finite number in masks, jnp.finfo(dtype).min, in place of -inf",
            "find out where the infinite values come from: gradjax.tap and gradjax.probe",
        ),
    ),
    "zero_times_infinity": (
        "0 is multiplied by an infinite value.",
        (
            "select with jnp.where in place of multiplying by a mask of 0 and 1",
            "use a large finite number in masks in place of inf",
        ),
    ),
    "masked_row": (
        "every entry of a row is masked with -inf, and the softmax of that row is 0/0.",
        (
            "mask with a large finite number, jnp.finfo(dtype).min, in place of -inf",
            "leave one entry of each row unmasked, or set rows that are all masked to 0 with "
            "jnp.where before and after the softmax",
        ),
    ),
    "double_where": (
        "{forward} is evaluated where a `where` does not select it: the value is not used, but its "
        "derivative is multiplied by 0, and 0 times inf or NaN is NaN.",
        (
            "choose a harmless argument there too: jnp.where(ok, f(jnp.where(ok, x, 1)), 0)",
        ),
    ),
    "degenerate_spectrum": (
        "the derivative of {forward} divides by the difference of two equal eigenvalues or "
        "singular values, or by one that is 0.",
        (
            "use a function of the matrix whose derivative exists: a norm, a trace, slogdet, a "
            "Cholesky factor",
            "add a small diagonal matrix with different entries",
        ),
    ),
    "not_positive_definite": (
        "the matrix has no Cholesky factor: it is not positive definite.",
        (
            "add a jitter to its diagonal: a + 1e-6 * jnp.eye(n)",
            "make it symmetric first, (a + a.T) / 2, and compute it in float64",
        ),
    ),
    "singular_matrix": (
        "the matrix is singular: it cannot be solved for.",
        (
            "add a jitter to its diagonal",
            "solve a least-squares problem: jnp.linalg.lstsq, or pinv",
        ),
    ),
    "empty_mean": (
        "a sum is divided by a count that is 0: nothing was selected.",
        (
            "divide by jnp.maximum(count, 1)",
            "leave out batches without a label, or empty segments",
        ),
    ),
    "loss_scale": (
        "the loss scale of {loss_scale:g} takes {operation} out of the range of {dtype}, whose "
        "largest number is {largest}.",
        (
            "lower the loss scale, or let it adapt: skip the step and halve it",
            "bfloat16, which needs no loss scale",
        ),
    ),
    "zero_eps": (
        "the update is divided by 0: the denominator of the optimiser is 0 in {dtype}, where its "
        "eps is 0 or rounds to it.",
        (
            "an eps that {dtype} can hold: 1e-4 in float16",
            "keep the optimiser's state in float32",
        ),
    ),
    "kernel": (
        "the kernel {operation} gives inf or NaN of finite operands; the search does not look "
        "into it.",
        ("test the kernel on the operands that are shown here",),
    ),
    "invalid_operation": (
        "{operation} is not defined at {a}.",
        ("keep its argument in the range where it is defined",),
    ),
    "bad_data": (
        "it was given that way: it stands in the data.",
        (
            "clean or mask the data: jnp.where(jnp.isnan(x), 0, x) before the model sees it",
            "look at how the batch was made",
        ),
    ),
    "bad_parameter": (
        "it was given that way: it stands in the parameters.",
        (
            "go back to parameters from before it: the update that made them is the one to search",
            "from now on skip such steps: gradjax.transforms.skip_non_finite",
        ),
    ),
}

_BORDERS = {"pallas_call", "ffi_call", "custom_call", "custom_partitioning", "shard_map"}
_EDGES = {"acos", "asin", "atanh", "acosh", "erf_inv", "asinh"}
_SPECTRA = {"eigh", "svd", "eig", "householder_product", "schur"}
_ROOTS = {"sqrt", "rsqrt", "cbrt", "pow", "integer_pow", "abs"}
_FACTORS = {"lu", "triangular_solve", "custom_linear_solve", "lu_pivots_to_permutation", "qr"}


def why(facts: Facts) -> str:
    """The name of the reason."""
    for rule in (_of_derivative, _of_optimizer, _of_infinity, _of_domain, _of_range):
        name = rule(facts)
        if name:
            return name
    return "invalid_operation"


def explain(facts: Facts) -> Reason:
    """The reason with its words."""
    name = why(facts)
    words, remedies = REASONS[name]
    value = facts.culprit.value
    dtype = np.dtype(value.data.dtype)
    given = {
        "operation": facts.primitive,
        "forward": facts.forward,
        "a": _number(_scalar(facts, 0)),
        "b": _number(_scalar(facts, 1) if len(facts.operands) > 1 else None),
        "dtype": dtype.name,
        "largest": f"{_largest(dtype):.3g}",
        "how_far": _how_far(facts),
        "loss_scale": facts.loss_scale or math.nan,
    }
    if name == "edge_of_range":
        given["a"] = _number(_argument(facts))
    return Reason(name, words.format(**given), tuple(x.format(**given) for x in remedies))


def _largest(dtype: Any) -> float:
    import jax.numpy as jnp

    return float(jnp.finfo(dtype).max)


def _scalar(facts: Facts, k: int) -> float | None:
    """The value of an operand at the entry; None where it depends on many."""
    x = facts.operands[k] if k < len(facts.operands) else None
    if x is None or np.size(x) != 1 or np.iscomplexobj(x):
        return None
    return float(np.asarray(x).reshape(()))


def _number(x: float | None) -> str:
    return "a value" if x is None else f"{x:.6g}"


# Rules


def _of_derivative(facts: Facts) -> str | None:
    """Reasons of a backward pass: the slope of a forward operation."""
    if facts.phase == "backward" and _is_not_selected(facts):
        return "double_where"
    if facts.phase != "backward" or not _divides_by_zero(facts):
        return None
    if facts.forward in _SPECTRA:
        return "degenerate_spectrum"
    if facts.forward in _EDGES:
        return "edge_of_range"
    if facts.forward in _ROOTS:
        return "slope_at_zero"
    return None


def _divides_by_zero(facts: Facts) -> bool:
    """Whether the operation divides by an operand that is exactly 0."""
    name = facts.primitive
    if name == "div":
        return _holds_zero(facts, 1)
    if name == "rsqrt":
        return _holds_zero(facts, 0)
    if name == "pow":
        power = _scalar(facts, 1)
        return _holds_zero(facts, 0) and power is not None and power < 0
    if name == "integer_pow":
        return _holds_zero(facts, 0) and facts.step.eqn.params["y"] < 0
    return False


def _holds_zero(facts: Facts, k: int) -> bool:
    x = facts.operands[k] if k < len(facts.operands) else None
    return x is not None and bool(np.any(np.asarray(x) == 0))


def _of_optimizer(facts: Facts) -> str | None:
    """A denominator of an optimiser is sqrt(v) + eps, or the square root of v + eps."""
    if facts.phase != "optimizer" or not _divides_by_zero(facts):
        return None
    names = _origin_names(facts, 1 if facts.primitive == "div" else 0)
    return "zero_eps" if "add" in names[:2] else None


def _of_infinity(facts: Facts) -> str | None:
    """Reasons of an operation that makes NaN of infinite operands."""
    has_inf = [x is not None and _has_inf(x) for x in facts.operands]
    if facts.culprit.kind != "nan" or not any(has_inf):
        return None
    if _comes_from_maximum(facts) or (facts.primitive == "div" and _sums_exponentials(facts)):
        return "masked_row"
    if facts.primitive in ("mul", "dot_general") and not all(has_inf):
        return "zero_times_infinity"
    return "infinity_minus_infinity"


def _has_inf(x: Any) -> bool:
    x = np.asarray(x)
    return is_inexact(x) and bool(np.isinf(x).any())


def _of_domain(facts: Facts) -> str | None:
    """Reasons of an operand outside the domain of the operation."""
    name, a = facts.primitive, _scalar(facts, 0)
    if name in ("cholesky", "potrf"):
        return "not_positive_definite"
    if name in _FACTORS:
        return "singular_matrix"
    if name in _BORDERS:
        return "kernel"
    if name in _EDGES:
        return "edge_of_range"
    if name in ("log", "log1p", "log2") and a is not None:
        shifted = a + 1 if name == "log1p" else a
        if shifted == 0:
            return "masked_row" if _sums_exponentials(facts) else "log_of_zero"
        return "log_of_negative" if shifted < 0 else None
    if name in ("sqrt", "rsqrt", "cbrt") and a is not None and a < 0:
        return "root_of_negative"
    if name == "pow" and a is not None and a < 0 and facts.culprit.kind == "nan":
        return "power_of_negative"
    if _divides_by_zero(facts):
        return _of_division(facts, a)
    return None


def _of_division(facts: Facts, a: float | None) -> str:
    if facts.primitive == "div":
        if _sums_exponentials(facts):
            return "masked_row"
        if _counts(facts):
            return "empty_mean"
        if a == 0 and facts.phase != "backward":
            return "zero_over_zero"
    return "division_by_zero"


def _of_range(facts: Facts) -> str | None:
    """Reasons of finite operands that give inf (or NaN, through inf - inf inside a sum)."""
    if facts.culprit.kind == "nan" and facts.primitive not in _SUMS:
        return None
    dtype = np.dtype(facts.culprit.value.data.dtype)
    if dtype == np.float16 and facts.loss_scale is not None:
        return "loss_scale"
    return "cast_overflow" if facts.primitive == "convert_element_type" else "overflow"


_SUMS = {"dot_general", "conv_general_dilated", "reduce_sum", "cumsum", "add_any", "fft"}


# Where operands come from


def sources(value: Value, entry: Any, steps: int = 12) -> Iterator[tuple[Step, Value, Any]]:
    """(step, value, entry) of what an entry was made of, the nearest first, a few steps back.

    It follows the operand with the value in it: through casts, broadcasts, sums and products with
    one array operand of its own.
    """
    entry = _single(entry)
    for _ in range(steps):
        if entry is not None and (value.bad or isinstance(value.origin, Row | Part)):
            inside, entry = unfold(value, "nan" if value.nan else "inf", entry)
            if inside is not value:
                value = inside
                continue
        if not isinstance(value.origin, Step) or not value.origin.outputs:
            return
        step = value.origin
        yield step, value, entry
        index = depends_on(step, value.position, entry) if entry is not None else None
        arrays = [k for k, x in enumerate(step.operands) if not isinstance(x.origin, Constant)]
        if index is not None:
            arrays = [k for k in arrays if index[k] is not None]
        if step.name == "select_n":
            arrays = [k for k in arrays if k]
        if not arrays:
            return
        k = arrays[0]
        value = step.operands[k]
        entry = _single(index[k]) if index is not None else None


def _single(index: Any) -> Any:
    """An index of one entry; None where it stands for several."""
    if index is None or any(isinstance(i, slice) for i in index):
        return None
    return index


def _origin_names(facts: Facts, k: int) -> list[str]:
    """The primitives that an operand was made by, the nearest first."""
    operand, index = facts.step.operands[k], facts.culprit.operand_index[k]
    return [step.name for step, _, _ in sources(operand, _single(index))]


def _comes_from_maximum(facts: Facts) -> bool:
    """Whether a row's maximum, or the logarithm of its sum, is subtracted from the row."""
    if facts.primitive not in ("sub", "add"):
        return False
    names = _origin_names(facts, 1)
    return "reduce_max" in names or "log" in names


def _sums_exponentials(facts: Facts) -> bool:
    """Whether the last operand is a sum of exponentials of -inf."""
    operand, index = facts.step.operands[-1], facts.culprit.operand_index[-1]
    has_sum = False
    for step, _, _ in sources(operand, _single(index)):
        has_sum |= step.name == "reduce_sum"
        if step.name == "exp":
            return has_sum and step.operands[0].inf
    return False


def _counts(facts: Facts) -> bool:
    """Whether the denominator is a count: the size of an array, an integer, or a sum of what is 0
    or 1.
    """
    operand = facts.step.operands[1]
    if isinstance(operand.origin, Constant) and not operand.origin.captured:
        return True
    has_sum = False
    value = operand
    for step, _, _ in sources(operand, _single(facts.culprit.operand_index[1])):
        has_sum |= step.name in ("reduce_sum", "scatter-add", "scatter_add")
        value = step.operands[-1 if step.name.startswith("scatter") else 0]
        is_cast = step.name == "convert_element_type"
        if is_cast and value.data is not None and not is_inexact(value.data):
            return True
        if has_sum and step.name in ("select_n", "broadcast_in_dim"):
            return True
        if step.name not in _COUNTING:
            return False
    while isinstance(value.origin, Row | Part):
        value = value.origin.whole
    return has_sum and isinstance(value.origin, Input | Constant) and _is_indicator(value.data)


# What may lie between a count and what is counted.
_COUNTING = {
    "broadcast_in_dim",
    "convert_element_type",
    "gather",
    "reduce_sum",
    "reshape",
    "scatter-add",
    "scatter_add",
    "squeeze",
}


def _is_indicator(x: Any) -> bool:
    return bool(np.isin(np.asarray(x), (0, 1)).all())


def _is_not_selected(facts: Facts) -> bool:
    """Whether the bad entry was multiplied by a cotangent of 0 that comes from a `where` which did
    not select what it belongs to.
    """
    zeros = facts.culprit.zeros
    return any(_from_select(operand, entry) for _, operand, entry in zeros)


def _from_select(value: Value, entry: Any) -> bool:
    for step, made, at in sources(value, entry):
        transposed = any(is_transposed(eqn) for eqn in step.eqns)
        if step.name == "select_n" and at is not None and transposed:
            chosen = depends_on(step, made.position, at)
            k = next(i for i, each in enumerate(chosen) if each is not None)
            index = chosen[k]
            x = entries(step.operands[k], index)
            others = [o for i, o in enumerate(step.operands[1:], 1) if i != k]
            # a cotangent goes one way, zeros the other
            return x is not None and bool(np.all(x == 0)) and any(
                not isinstance(o.origin, Constant) for o in others
            )
    return False


def _argument(facts: Facts) -> float | None:
    """The argument of the forward operation whose derivative was taken."""
    a = _scalar(facts, 0)
    if facts.phase != "backward":
        return a
    for operand, index in zip(facts.step.operands, facts.culprit.operand_index, strict=True):
        last = None
        for step, _, at in sources(operand, _single(index)):
            if at is None:
                break
            index_of = depends_on(step, 0, at)
            x = entries(step.operands[0], index_of[0])
            last = None if x is None or np.size(x) != 1 else float(np.asarray(x).reshape(()))
        if last is not None:
            return last
    return a


# How far out of range


def _how_far(facts: Facts) -> str:
    """The size that the result would have, as text; "" where it is not known."""
    log10 = _LOG10.get(facts.primitive)
    values = [_scalar(facts, k) for k in range(len(facts.operands))]
    if log10 is None or any(x is None for x in values):
        return ""
    if facts.primitive == "integer_pow":
        values = [values[0], float(facts.step.eqn.params["y"])]
    with np.errstate(all="ignore"):
        exponent = float(log10(*values))
    shown = ", ".join(f"{x:.6g}" for x in values if x is not None)
    return f": {facts.primitive}({shown}) is about 1e{exponent:.0f}" if exponent < 1e6 else ""


def _log10(x: float) -> float:
    return math.log10(abs(x)) if x else -math.inf


def _product(a: float, b: float) -> float:
    return _log10(a) + _log10(b)


def _quotient(a: float, b: float) -> float:
    return _log10(a) - _log10(b)


def _power(a: float, b: float) -> float:
    return b * _log10(a)


def _exponential(a: float) -> float:
    return a / math.log(10)


def _square(a: float) -> float:
    return 2 * _log10(a)


def _hyperbolic(a: float) -> float:
    return abs(a) / math.log(10) - math.log10(2)


def _total(a: float, b: float) -> float:
    return _log10(float(a) + float(b))


_LOG10: dict[str, Callable[..., float]] = {
    "add": _total,
    "sub": lambda a, b: _total(a, -b),
    "mul": _product,
    "div": _quotient,
    "pow": _power,
    "integer_pow": _power,
    "exp": _exponential,
    "square": _square,
    "cosh": _hyperbolic,
    "sinh": _hyperbolic,
}
