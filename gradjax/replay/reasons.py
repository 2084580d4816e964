"""The reasons for inf and NaN: words filled with the operands' values, and remedies."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from gradjax.replay.causes import Facts, argument, scalar, why


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


# reason -> (words, remedies). The words may use: operation, forward, a (the value of the first
# operand), dtype, largest (of the dtype), how_far, loss_scale.
REASONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "zero_over_zero": (
        "0 is divided by 0.",
        (
            "keep the denominator away from 0: x / jnp.maximum(y, eps)",
            "where both are 0, choose the value with a `where` on both sides of the division",
        ),
    ),
    "division_by_zero": (
        "{a} is divided by 0, by {operation}.",
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
        "a negative number, {a}, is raised to a power that is not an integer.",
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
        "the result of {operation} is larger than {dtype} can hold ({largest}{how_far}).",
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
        ("choose a harmless argument there too: jnp.where(ok, f(jnp.where(ok, x, 1)), 0)",),
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
        "the loss scale of {loss_scale} takes {operation} out of the range of {dtype}, whose "
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
        "{operation} is a kernel that the search does not look into; it gives inf or NaN of finite "
        "operands.",
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
    "bad_state": (
        "it was given that way: it stands in the optimiser's state.",
        (
            "start the state anew: tx.init(params)",
            "from then on: gradjax.transforms.restore_moments",
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


def explain(facts: Facts) -> Reason:
    """The reason with its words."""
    name = why(facts)
    words, remedies = REASONS[name]
    value = facts.culprit.value
    dtype = np.dtype(value.data.dtype)
    given = {
        "operation": facts.primitive,
        "forward": facts.forward,
        "a": _number(scalar(facts, 0)),
        "dtype": dtype.name,
        "largest": f"{float(jnp.finfo(dtype).max):.5g}",
        "how_far": _how_far(facts),
        "loss_scale": f"2^{math.log2(facts.loss_scale):.0f}" if facts.loss_scale else "",
    }
    if name == "division_by_zero" and facts.primitive != "div":
        given["a"] = "1"
    if name == "edge_of_range":
        given["a"] = _number(argument(facts))
    return Reason(name, words.format(**given), tuple(x.format(**given) for x in remedies))


def _number(x: float | None) -> str:
    return "a value" if x is None else f"{x:.6g}"


# How far out of range


def _how_far(facts: Facts) -> str:
    """The size that the result would have, as text; "" where it is not known."""
    log10 = _LOG10.get(facts.primitive)
    values = [scalar(facts, k) for k in range(len(facts.operands))]
    if log10 is None or any(x is None for x in values):
        return ""
    if facts.primitive == "integer_pow":
        values = [values[0], float(facts.step.eqn.params["y"])]
    with np.errstate(all="ignore"):
        exponent = float(log10(*values))
    shown = ", ".join(f"{x:.6g}" for x in values if x is not None)
    return f"; {facts.primitive}({shown}) is about 1e{exponent:.0f}" if exponent < 1e6 else ""


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
