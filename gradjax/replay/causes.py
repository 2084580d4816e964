"""Which reason an operation has to give inf or NaN: from the primitive, its operands and where they
come from.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from gradjax.replay.loops import unfold
from gradjax.replay.tape import Constant, Input, Part, Row, Step, Value, is_inexact
from gradjax.replay.walk import Culprit, depends_on, entries
from gradjax.taps.jaxprs import is_transposed


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


_BORDERS = {"pallas_call", "ffi_call", "custom_call", "custom_partitioning", "shard_map"}
_EDGES = {"acos", "asin", "atanh", "acosh", "erf_inv", "asinh"}
_SPECTRA = {"eigh", "svd", "eig", "householder_product", "schur"}
_ROOTS = {"sqrt", "rsqrt", "cbrt", "pow", "integer_pow", "abs", "atan2"}
_FACTORS = {"lu", "triangular_solve", "custom_linear_solve", "lu_pivots_to_permutation", "qr"}


def why(facts: Facts) -> str:
    """The name of the reason."""
    for rule in (_of_derivative, _of_optimizer, _of_infinity, _of_domain, _of_range):
        name = rule(facts)
        if name:
            return name
    return "invalid_operation"


def scalar(facts: Facts, k: int) -> float | None:
    """The value of an operand at the entry; None where it depends on many."""
    x = facts.operands[k] if k < len(facts.operands) else None
    if x is None or np.size(x) != 1 or np.iscomplexobj(x):
        return None
    return float(np.asarray(x).reshape(()))


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
        power = scalar(facts, 1)
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
    name, a = facts.primitive, scalar(facts, 0)
    if name in ("cholesky", "potrf"):
        return "not_positive_definite"
    if name in _FACTORS:
        return "singular_matrix"
    if name in _BORDERS:
        return "kernel"
    if name in _EDGES:
        return "edge_of_range"
    if name == "log" and facts.forward == "pow" and a is not None and a < 0:
        return "power_of_negative"
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
            return (
                x is not None
                and bool(np.all(x == 0))
                and any(not isinstance(o.origin, Constant) for o in others)
            )
    return False


def argument(facts: Facts) -> float | None:
    """The argument of the forward operation whose derivative was taken."""
    a = scalar(facts, 0)
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
