"""Where inf or NaN comes from: the operation, its line, and the reason.

    loss, gradients, updates   ->   the first equation whose result is not finite although its
                                    operands are, of those that reach them

The program of value and gradient is traced, with the user's lines, and evaluated one equation at a
time (`gradjax.replay.tape`) until an output is not finite; the walk back from there
(`gradjax.replay.walk`) ends at the operation. Cost: about one compilation of the gradient, and the
memory of what is not finite; nothing of it is part of the user's own program.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from gradjax.core.checks import without_debug_checks
from gradjax.core.unwrap import optimizer_state, plain
from gradjax.replay import reasons, source
from gradjax.replay.causes import Facts, sources
from gradjax.replay.gradient import forward_of, gradient_jaxpr
from gradjax.replay.source import Line
from gradjax.replay.tape import Input, Value, inputs, record
from gradjax.replay.twice import what_changes
from gradjax.replay.walk import Culprit, entries, trace_back
from gradjax.taps.names import parse
from gradjax.taps.probe import Traced, trace

PyTree = Any


@dataclass(frozen=True)
class NonFinite:
    """The first operation whose result is not finite.

    Attributes:
      phase: "forward", "backward", "optimizer", or what was given: "data", "parameter".
      reached: what is not finite because of it: the loss, a gradient, an update, a parameter.
      primitive: the operation in the jaxpr; "" for what was given.
      forward: the forward operation; differs from `primitive` where a derivative failed.
      reason: a name of `gradjax.replay.reasons.REASONS`.
      words: the reason in a sentence.
      remedies: what to try, in order.
      line: the user's line; None where none is known.
      callers: the user's lines that led to it, the nearest first.
      module: path of the module around it, or its named scopes.
      name: key path of the parameter or argument that was given, or whose update failed.
      iterations: ("scan" or "while", index) of the loops around it, the outermost first.
      entry: index of the first entry that is not finite.
      value: what it is: inf, -inf or nan.
      shape, dtype: of the result.
      operands: the operands' values there; of an operand with several, the extremes.
      near: name of the nearest named value: the first one that it makes not finite, or, going
        backward, the one it was computed from; "" without any. In a loop with its row, `h[3]`.
      example: the first index of `entry`, where the result has one row for each example.
    """

    phase: str
    reached: str
    primitive: str
    forward: str
    reason: str
    words: str
    remedies: tuple[str, ...]
    line: Line | None
    callers: tuple[Line, ...]
    module: str
    name: str
    iterations: tuple[tuple[str, int], ...]
    entry: tuple[int, ...]
    value: float
    shape: tuple[int, ...]
    dtype: str
    operands: tuple[str, ...]
    near: str
    example: int | None

    def __str__(self) -> str:
        return "\n".join(_text(self))


@dataclass(frozen=True)
class Search:
    """What `find_nonfinite` found; true if there is a culprit.

    Attributes:
      culprit: the operation; None where nothing is not finite, or where it could not be found.
      loss: its value.
      note: what else there is to say: that nothing is not finite, that the loss changes from one
        evaluation to the next.
    """

    culprit: NonFinite | None
    loss: float
    note: str = ""

    def __bool__(self) -> bool:
        return self.culprit is not None

    def __str__(self) -> str:
        parts = [str(self.culprit)] if self.culprit else []
        return "\n".join(parts + ([self.note] if self.note else []))


@without_debug_checks()
def find_nonfinite(
    loss_fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    has_aux: bool = False,
    tx: Any = None,
    opt_state: PyTree = None,
) -> Search:
    """Find the operation that makes a loss, a gradient or an update inf or NaN.

    Values that are inf or NaN and reach none of these (masks, branches that are not taken, entries
    that are not selected) are not reported.

    Args:
      loss_fn: (params, *args) -> loss of shape (), or (loss, aux) with `has_aux`.
      params: pytree of floating arrays, or an NNX or Equinox model.
      args: arrays in any pytrees; non-array leaves (bools, strings) are static.
      has_aux: as in `jax.value_and_grad`.
      tx: the Optax optimiser; its step is searched if the gradient is finite.
      opt_state: its state; `tx.init(params)` by default.

    Returns:
      `Search`; `print` it.

    Raises:
      ValueError: as `gradjax.probe`, except that nothing needs a name.

    >>> import jax.numpy as jnp
    >>> def loss(w, x):
    ...     return jnp.sum(jnp.sqrt(w * x))
    >>> found = find_nonfinite(loss, jnp.ones(3), jnp.array([1.0, 0.0, 4.0]))
    >>> found.culprit.phase, found.culprit.forward, found.culprit.reason, found.culprit.entry
    ('backward', 'sqrt', 'slope_at_zero', (1,))
    """
    traced = trace(loss_fn, params, args, has_aux, "find_nonfinite", needs_names=False)
    note = what_changes(traced, loss_fn, params, args, has_aux)
    names = Names(traced, loss_fn, args)
    gradient = gradient_jaxpr(traced)
    culprit, outputs = search(traced, gradient, traced.leaves, names)
    loss = float(outputs[0].data) if outputs[0] is not None else np.nan
    if culprit is None and tx is not None:
        values = plain(traced.params)
        grads = [value.data for value in outputs[1:]]
        grads = jax.tree.unflatten(jax.tree.structure(values), grads)
        state = tx.init(values) if opt_state is None else optimizer_state(opt_state)
        culprit = search_update(tx, state, values, grads, loss)
    if culprit is None and not note:
        note = _nothing(gradient, traced, loss, tx is not None)
    return Search(culprit, loss, note)


def search(
    traced: Traced, gradient: Any, leaves: list, names: Names
) -> tuple[NonFinite | None, list[Any]]:
    """Search the loss and its gradient.

    Args:
      traced: the loss.
      gradient: its `gradient_jaxpr`.
      leaves: the operands: parameters, then arrays of the arguments.
      names: of what was given.

    Returns:
      The culprit that comes first, and what was computed: loss and gradients, None where the
      search ended before them.
    """
    outputs = record(gradient, inputs(leaves), until_bad=True)
    found = []
    for i, value in enumerate(outputs):
        if value is not None and value.bad:
            found.append((trace_back(value, "nan" if value.nan else "inf"), i))
            if i == 0:
                break
    if not found:
        return None, outputs
    culprit, i = min(found, key=lambda each: each[0].order)
    reached = names.of_gradient(i)
    if culprit.step is None:
        return _given(culprit, reached, *names.of_given(culprit.value)), outputs
    forward = forward_of(traced.jaxpr, culprit.step)
    facts = _facts(culprit, "backward" if i else "forward")._replace(
        forward=culprit.step.name if forward is None else forward.primitive.name,
        loss_scale=_loss_scale(outputs[0]),
    )
    return _found(facts, reached, names.examples), outputs


# What was given


class Names:
    """The names of a program's operands and outputs."""

    def __init__(self, traced: Traced, loss_fn: Callable, args: tuple):
        paths = jax.tree_util.tree_leaves_with_path(traced.params)
        self.leaves = [jax.tree_util.keystr(path) for path, _ in paths]
        self.arguments = []
        called = _parameter_names(loss_fn)
        for path, x in jax.tree_util.tree_leaves_with_path(args):
            if isinstance(x, jax.Array | np.ndarray | np.generic):
                k, rest = path[0].idx, jax.tree_util.keystr(path[1:])
                first = called[k + 1] if k + 1 < len(called) else f"args[{k}]"
                self.arguments.append(first + rest)
        shapes = [np.shape(x) for x in traced.leaves[traced.num_params :]]
        self.examples = next((shape[0] for shape in shapes if len(shape) > 1), None)

    def of_gradient(self, i: int) -> str:
        """What output number `i` of the gradient's program is."""
        return f"the gradient of {self.leaves[i - 1] or 'params'}" if i else "the loss"

    def of_given(self, value: Value) -> tuple[str, str]:
        """(phase, name) of an operand, or of a constant of the program."""
        if not isinstance(value.origin, Input):
            return "data", "an array that the loss function holds"
        i = value.origin.index
        if i < len(self.leaves):
            return "parameter", self.leaves[i] or "params"
        return "data", self.arguments[i - len(self.leaves)]


def _parameter_names(function: Callable) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in plain]


# From a culprit to its description


def _facts(culprit: Culprit, phase: str) -> Facts:
    step = culprit.step
    assert step is not None
    pairs = zip(step.operands, culprit.operand_index, strict=True)
    there = [entries(operand, index) for operand, index in pairs]
    return Facts(culprit, step, step.name, step.name, phase, there, None)


def _found(facts: Facts, reached: str, examples: int | None) -> NonFinite:
    culprit, step = facts.culprit, facts.step
    value, reason = culprit.value, reasons.explain(facts)
    callers = source.lines(step.eqns)
    has_examples = bool(culprit.entry) and value.shape[0] == examples
    return NonFinite(
        phase=facts.phase,
        reached=reached,
        primitive=step.name,
        forward=facts.forward,
        reason=reason.name,
        words=reason.words,
        remedies=reason.remedies,
        line=callers[0] if callers else None,
        callers=callers,
        module=source.module_path(step.eqns),
        name="",
        iterations=step.context.iterations,
        entry=culprit.entry,
        value=float(np.real(np.asarray(value.data)[culprit.entry])),
        shape=value.shape,
        dtype=str(value.data.dtype),
        operands=tuple(_shown(x, v) for x, v in zip(facts.operands, step.operands, strict=True)),
        near=_near(facts),
        example=culprit.entry[0] if has_examples else None,
    )


def _near(facts: Facts) -> str:
    """The name of the nearest named value, with its row in a loop."""
    named = facts.culprit.named
    if facts.phase == "backward":
        named = None
        pairs = zip(facts.step.operands, facts.culprit.operand_index, strict=True)
        for operand, index in pairs:
            path = sources(operand, index, steps=40)
            named = named or next((s for s, _, _ in path if s.name == "gradjax_name"), None)
    if named is None:
        return ""
    _, name, _ = parse(named.eqn.params["name"])
    iterations = named.context.iterations
    return f"{name}[{iterations[-1][1]}]" if iterations else name


# How a value that was given is called, by its phase.
_OF_GIVEN = {"data": "bad_data", "parameter": "bad_parameter", "optimizer": "bad_state"}


def _given(culprit: Culprit, reached: str, phase: str, name: str) -> NonFinite:
    """The description of a value that was inf or NaN from the start."""
    value, reason = culprit.value, _OF_GIVEN[phase]
    words, remedies = reasons.REASONS[reason]
    return NonFinite(
        phase=phase,
        reached=reached,
        primitive="",
        forward="",
        reason=reason,
        words=words,
        remedies=remedies,
        line=None,
        callers=(),
        module="",
        name=name,
        iterations=(),
        entry=culprit.entry,
        value=float(np.real(np.asarray(value.data)[culprit.entry])),
        shape=value.shape,
        dtype=str(value.data.dtype),
        operands=(),
        near="",
        example=culprit.entry[0] if phase == "data" and culprit.entry else None,
    )


def _shown(x: Any, value: Value) -> str:
    """An operand as text: one number, or how many with their extremes."""
    if x is None:
        return f"{np.dtype(value.data.dtype).name if value.data is not None else ''} not used"
    flat = np.asarray(x)
    if flat.size == 1:
        return f"{flat.reshape(()).item():.6g}" if flat.dtype != bool else str(flat.item())
    if not flat.size or not jnp.issubdtype(flat.dtype, jnp.number):
        return f"{flat.size} entries"
    flat = flat.astype(np.complex128 if np.iscomplexobj(flat) else np.float64)
    magnitude = np.abs(flat)
    return f"{flat.size} entries, |x| from {np.min(magnitude):.3g} to {np.max(magnitude):.3g}"


def _loss_scale(loss: Value | None) -> float | None:
    """The power of two, 128 or more, by which the loss is multiplied; None without one."""
    for step, _, _ in sources(loss, ()) if loss is not None else ():
        if step.name != "mul":
            continue
        for operand in step.operands:
            if operand.data is None or np.size(operand.data) != 1:
                continue
            factor = float(np.asarray(operand.data).reshape(()))
            if np.isfinite(factor) and factor >= 128 and np.log2(factor).is_integer():
                return factor
    return None


# The optimiser


def search_update(
    tx: Any, state: PyTree, params: PyTree, grads: PyTree, loss: float
) -> NonFinite | None:
    """Search one step of an optimiser, of a loss and a gradient that are finite."""
    import optax

    optimizer = optax.with_extra_args_support(tx)
    leaves, tree = jax.tree.flatten((params, grads, state))

    def update(*operands):
        old, own_grads, own_state = jax.tree.unflatten(tree, operands)
        more = {"value": jnp.asarray(loss, jnp.float32), "grad": own_grads}
        updates, _ = optimizer.update(own_grads, own_state, old, **more)
        return [*jax.tree.leaves(updates), *jax.tree.leaves(optax.apply_updates(old, updates))]

    with jax.numpy_dtype_promotion("standard"):
        outputs = record(jax.make_jaxpr(update)(*leaves), inputs(leaves), until_bad=True)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    count = len(names)
    bad = [(i, value) for i, value in enumerate(outputs) if value is not None and value.bad]
    if not bad:
        return None
    found = [(trace_back(value, "nan" if value.nan else "inf"), i) for i, value in bad]
    culprit, i = min(found, key=lambda each: each[0].order)
    reached = f"the {'update of' if i < count else 'new'} {names[i % count] or 'params'}"
    if culprit.step is None:
        return _given(culprit, reached, "optimizer", _of_state(culprit.value, state, 2 * count))
    return replace(_found(_facts(culprit, "optimizer"), reached, None), name=names[i % count])


def _of_state(value: Value, state: PyTree, start: int) -> str:
    """The name of a leaf of an optimiser's state, whose leaves are operands from `start` on."""
    index = value.origin.index - start if isinstance(value.origin, Input) else -1
    if index < 0:
        return "a constant of the optimiser"
    path, _ = jax.tree_util.tree_leaves_with_path(state)[index]
    return f"opt_state{jax.tree_util.keystr(path)}"


def _nothing(gradient: Any, traced: Traced, loss: float, with_update: bool) -> str:
    """What is said where no operation was found."""
    compiled = jax.jit(jaxpr_as_fun(gradient))(*traced.leaves)
    if all(np.isfinite(np.asarray(x)).all() for x in compiled):
        also = ", the update and the new parameters are" if with_update else " are"
        return f"Nothing is not finite: the loss ({loss:.6g}), its gradients{also} finite."
    return (
        "Compiled as one program, the loss or its gradient is not finite; evaluated one operation "
        "at a time, everything is. XLA has fused operations, or uses another precision: a value is "
        "at the edge of its dtype's range. Search again in float32 or float64."
    )


# Text output


def _text(found: NonFinite) -> Iterator[str]:
    shown = "NaN" if np.isnan(found.value) else f"{found.value:g}"
    if found.phase in ("data", "parameter") or not found.primitive:
        kind = {"data": "argument", "parameter": "parameter"}.get(found.phase, "state")
        yield f"{_capital(found.reached)} is not finite: the {kind} {found.name} holds {shown} at "
        yield f"  entry {_entry(found)} of {found.dtype}{list(found.shape)}; {found.words}"
    else:
        of = ""
        if found.phase == "backward":
            is_other = found.forward != found.primitive
            of = f", in the derivative of {found.forward}" if is_other else ", for the gradient"
        module = f" in {found.module}" if found.module else ""
        loops = "".join(f", iteration {i} of the {kind}" for kind, i in found.iterations)
        yield (
            f"{_capital(found.reached)} is not finite. The first operation whose result is not: "
            f"{found.primitive}{of}{module}{loops}."
        )
        if found.line is not None:
            yield f"  {found.line}, in {found.line.function}"
            text = source.marked(found.line)
            if text:
                yield text
        yield (
            f"  result {shown} at entry {_entry(found)} of {found.dtype}{list(found.shape)}; "
            f"operands there: {'; '.join(found.operands)}"
        )
        yield f"Why ({found.reason}): {found.words}"
    yield "What to try:"
    for remedy in found.remedies:
        yield f"  {remedy}"


def _entry(found: NonFinite) -> str:
    example = f" (example {found.example})" if found.example is not None else ""
    return f"{found.entry}{example}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
