"""What a case of the field is: code as others write it, and what a right answer says about it."""

import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

import gradjax
from gradjax.diagnosis.rules import Finding
from gradjax.diagnosis.verdict import Diagnosis

t = gradjax.tap
HE = math.sqrt(2.0)

# An explicit statement that something was not judged.
UNJUDGED = r"(not|cannot|could not|n't|un)[ -]?(be )?(judged|measured|known)|unknown"
ANY = r"\w+"
GROWTH = (
    "exploding_gradients exploding_activations residual_growth batchnorm_explosion "
    "vanishing_gradients vanishing_activations rank_collapse dead_units saturated_units"
)


class FieldCase(NamedTuple):
    """A program, and what is wrong with an answer about it.

    `make` returns (loss_fn, params, args, options) for `gradjax.diagnose`, which is called inside
    `context`. `right` returns "" for a right answer, else what is wrong in words. `kind` is the
    number in `../shared/field.md`.
    """

    name: str
    kind: int
    make: Callable[[], tuple]
    right: Callable[[Diagnosis], str]
    context: Callable[[], AbstractContextManager] = nullcontext


class MonitorCase(NamedTuple):
    """A loop of training, or another use of the library that is not a diagnosis.

    `run` returns what `right` reads: a monitor, a diagnosis, a state.
    """

    name: str
    kind: int
    run: Callable[[], Any]
    right: Callable[[Any], str]


def case(cases: list, kind: int, right: Callable, **fields: Any) -> Callable:
    """Decorator: append the case whose `make` is the function, and which is named like it."""

    def register(make):
        cases.append(FieldCase(make.__name__, kind, make, right, **fields))
        return make

    return register


def monitor_case(cases: list, kind: int, right: Callable) -> Callable:
    """Decorator: append the case whose `run` is the function, and which is named like it."""

    def register(run):
        cases.append(MonitorCase(run.__name__, kind, run, right))
        return run

    return register


# Right answers


def show(finding: Finding) -> str:
    """A finding in one line."""
    remedy = finding.remedies[0] if finding.remedies else "no remedy"
    return f"{finding.pathology} at {finding.where['name']} ({finding.cause}; {remedy})"


def come_out(diagnosis: Diagnosis) -> str:
    """The findings in one line."""
    return "; ".join(map(show, diagnosis.findings)) or "healthy"


def sound(allowed: str = "") -> Callable[[Diagnosis], str]:
    """No finding, but for those whose pathology is among the allowed names."""

    def right(diagnosis: Diagnosis) -> str:
        wrong = [f for f in diagnosis.findings if f.pathology not in allowed.split()]
        if wrong:
            return "healthy, but reported: " + "; ".join(map(show, wrong))
        return ""

    return right


def free_of(names: str, cause: str = "") -> Callable[[Diagnosis], str]:
    """No finding of these names, and none whose cause matches."""

    def right(diagnosis: Diagnosis) -> str:
        for finding in diagnosis.findings:
            if finding.pathology in names.split():
                return f"wrongly reported: {show(finding)}"
            if cause and re.search(cause, finding.cause):
                return f"wrong cause: {show(finding)}"
        return ""

    return right


def says(pattern: str) -> Callable[[Diagnosis], str]:
    """The printed diagnosis holds this pattern."""

    def right(diagnosis: Diagnosis) -> str:
        if re.search(pattern, str(diagnosis), re.IGNORECASE | re.DOTALL):
            return ""
        return f"the text does not say /{pattern}/: {come_out(diagnosis)}"

    return right


def finds(
    names: str, place: str = "", cause: str = "", remedy: str = "", text: str = ""
) -> Callable[[Diagnosis], str]:
    """One finding has one of these names, and its other parts match.

    Args:
      names: pathologies, separated by spaces; a regular expression each.
      place: searched in the name of the place.
      cause: searched in the cause.
      remedy: searched in the first remedy.
      text: searched in the evidence.
    """
    patterns = {"place": place, "cause": cause, "first remedy": remedy, "evidence": text}

    def misses(finding: Finding) -> list[str]:
        first = finding.remedies[0] if finding.remedies else ""
        got = {
            "place": finding.where["name"],
            "cause": finding.cause,
            "first remedy": first,
            "evidence": str(finding.evidence),
        }
        return [
            f"{part} {got[part][:200]!r}, not /{pattern}/"
            for part, pattern in patterns.items()
            if pattern and not re.search(pattern, got[part], re.IGNORECASE)
        ]

    def right(diagnosis: Diagnosis) -> str:
        wanted = re.compile("|".join(names.split()))
        candidates = [f for f in diagnosis.findings if wanted.fullmatch(f.pathology)]
        if not candidates:
            return f"no {names}: {come_out(diagnosis)}"
        best = min((misses(finding) for finding in candidates), key=len)
        if best:
            return f"{'; '.join(best)} in: {come_out(diagnosis)}"
        return ""

    return right


def both(*checks: Callable) -> Callable[[Any], str]:
    """All of them are right."""

    def right(answer: Any) -> str:
        return next((wrong for wrong in (check(answer) for check in checks) if wrong), "")

    return right


def either(*checks: Callable) -> Callable[[Any], str]:
    """One of them is right; otherwise what the first one says."""

    def right(answer: Any) -> str:
        wrong = [check(answer) for check in checks]
        if all(wrong):
            return wrong[0]
        return ""

    return right


def found_or_unjudged(names: str, place: str = "") -> Callable[[Diagnosis], str]:
    """The finding, or the statement that something could not be judged."""
    return either(finds(names, place), says(UNJUDGED))


def range_of(first: int, last: int) -> str:
    """A pattern for the numbers from first to last."""
    return "(" + "|".join(map(str, range(first, last + 1))) + r")(?!\d)"


# Small networks


def draw(seed: int, *shape: int, scale: float = 1.0) -> Array:
    """Normal numbers."""
    return scale * jax.random.normal(jax.random.key(seed), shape)


def matrix(seed: int, n: int, m: int, gain: float = 1.0) -> Array:
    """A random (n, m) matrix that multiplies the rms by `gain`."""
    return draw(seed, n, m, scale=gain / math.sqrt(n))


def matrices(seed: int, depth: int, width: int, gain: float = HE) -> list[Array]:
    """The weights of a chain of layers; by default those of a healthy ReLU network."""
    return [matrix(1000 * seed + i, width, width, gain) for i in range(depth)]


def chain(
    weights: Sequence[Array] | Array, h: Array, act: Callable = jax.nn.relu, name: str = "h"
) -> Array:
    """act(h w) layer after layer; the values are called h0, h1, ..."""
    for i, w in enumerate(weights):
        h = t(act(h @ w), f"{name}{i}")
    return h


def batch(seed: int = 0, n: int = 32, width: int = 64, classes: int = 8) -> tuple[Array, Array]:
    """Inputs of rms 1 and labels."""
    labels = jax.random.randint(jax.random.key(seed + 1), (n,), 0, classes)
    return draw(seed, n, width), labels


def cross_entropy(logits: Array, labels: Array) -> Array:
    """The mean over examples."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def classifier(
    depth: int = 8, width: int = 64, gain: float = HE, act: Callable = jax.nn.relu, seed: int = 1
) -> tuple:
    """(loss_fn, params, args) of a plain network, healthy unless told otherwise."""
    params = {
        "layers": matrices(seed, depth, width, gain),
        "readout": matrix(seed + 77, width, 8),
    }

    def loss_fn(params, x, y):
        h = chain(params["layers"], x, act)
        return cross_entropy(t(h @ params["readout"], "logits"), y)

    return loss_fn, params, batch(width=width)


def state_after(tx: Any, loss_fn: Callable, params: Any, args: tuple, steps: int = 1) -> tuple:
    """(params, opt_state) after some steps of training on one batch."""

    @jax.jit
    def step(params, state):
        loss, gradient = jax.value_and_grad(loss_fn)(params, *args)
        extra = optax.with_extra_args_support(tx)
        updates, state = extra.update(gradient, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def plain_input() -> tuple[Array, Array]:
    """The `x` (8, 4) and the `w` of the list of kinds."""
    return draw(0, 8, 4), jnp.eye(4)
