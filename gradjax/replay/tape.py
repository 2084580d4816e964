"""Evaluate a jaxpr one equation at a time and keep how every value was made.

`record` is an interpreter: each equation is evaluated as it stands, calls (jit, checkpoint, custom
rules) and the branch of a `cond` that is taken are entered, and a `Value` knows the `Step` that
made it. Loops and programs over several devices are evaluated whole;
`gradjax.replay.loops.unfold` looks into one iteration of them when it is asked to.

A large value is forgotten after its last use, unless it is bad or was read where a bad value came
out: what is kept is what leads to inf or NaN. Cost: one compilation per distinct operation and
shape.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradjax.taps.jaxprs import INLINE, REMAT, Literal, bind, closed, inner

# Entries up to which a finite value is kept although nothing bad came of it.
SMALL = 2**14
LOOPS = {"scan", "while"}
# Their implementation outside of jit is slow, or does not exist.
_WHOLE = LOOPS | {"shard_map", "xla_pmap", "pallas_call", "custom_linear_solve"}
_CUSTOM = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}


class Context(NamedTuple):
    """Where a jaxpr stands in the whole program.

    Attributes:
      calls: the equations around it, the outermost first.
      iterations: (kind of loop, index of the iteration) of the loops around it.
      order: place in the order of evaluation.
    """

    calls: tuple[Any, ...] = ()
    iterations: tuple[tuple[str, int], ...] = ()
    order: tuple[int, ...] = ()


WHOLE = Context()


class Input(NamedTuple):
    """Origin of a value that the whole program was given: operand number `index`."""

    index: int


class Constant(NamedTuple):
    """Origin of a value that stands in the program: a literal, or an array from a closure."""

    captured: bool


class Row(NamedTuple):
    """Origin of one row of an array that a loop goes through."""

    whole: "Value"
    index: int


class Part(NamedTuple):
    """Origin of the shards of an array; `indices` are those of its entries in the whole, flat."""

    whole: "Value"
    indices: np.ndarray


class Carried(NamedTuple):
    """Origin of a carried value: output number `position` of an iteration of a loop."""

    step: "Step"
    position: int
    iteration: int


class Value:
    """An array, and where it comes from.

    Attributes:
      data: the array; None once it is forgotten.
      origin: the `Step` that made it, or an `Input`, a `Constant`, a `Row`, a `Part`, a `Carried`.
      position: which output of that step it is.
      nan, inf: whether it holds such entries.
    """

    __slots__ = ("data", "inf", "nan", "origin", "position", "shape", "size")

    def __init__(self, data: Any, origin: Any, position: int = 0):
        self.data, self.origin, self.position = data, origin, position
        self.nan, self.inf = holds(data)
        self.shape, self.size = np.shape(data), np.size(data)

    @property
    def bad(self) -> bool:
        """Whether it holds inf or NaN."""
        return self.nan or self.inf

    def where(self, kind: str) -> np.ndarray:
        """The entries that are bad in that way ("nan", "inf"), as booleans."""
        if self.data is None or not is_inexact(self.data):
            return np.zeros(self.shape, bool)
        x = np.asarray(self.data)
        return np.isnan(x) if kind == "nan" else np.isinf(x)

    def first(self, kind: str) -> tuple[int, ...]:
        """The index of the first entry that is bad in that way."""
        flat = int(np.argmax(self.where(kind).reshape(-1)))
        return tuple(int(i) for i in np.unravel_index(flat, self.shape))


class Step:
    """One evaluated equation.

    Attributes:
      eqn: the equation.
      operands, outputs: its values.
      context: where it stands.
      order: place in the order of evaluation; compares with that of other steps.
      unfolded: what `gradjax.replay.loops` has computed of it.
    """

    __slots__ = ("context", "eqn", "operands", "order", "outputs", "unfolded")

    def __init__(self, eqn: Any, operands: list[Value], context: Context, order: tuple[int, ...]):
        self.eqn, self.operands, self.context, self.order = eqn, operands, context, order
        self.outputs: list[Value] = []
        self.unfolded: dict[Any, Any] = {}

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.eqn.primitive.name

    @property
    def eqns(self) -> tuple[Any, ...]:
        """The equations around it and its own."""
        return (*self.context.calls, self.eqn)


def is_inexact(x: Any) -> bool:
    """Whether an array, or what has a dtype, holds floating or complex numbers."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def holds(x: Any) -> tuple[bool, bool]:
    """Whether an array holds (NaN, inf)."""
    if not hasattr(x, "dtype"):
        x = np.asarray(x)
    if not is_inexact(x):
        return False, False
    host = np.asarray(x)
    if np.isfinite(host).all():
        return False, False
    return bool(np.isnan(host).any()), bool(np.isinf(host).any())


def inputs(operands: list) -> list[Value]:
    """The operands of a program as values."""
    return [Value(x, Input(i)) for i, x in enumerate(operands)]


def record(
    jaxpr: Any, operands: list[Value], context: Context = WHOLE, until_bad: bool = False
) -> list[Any]:
    """Evaluate a closed jaxpr.

    Args:
      jaxpr: closed.
      operands: its arguments.
      context: where it stands in the whole program.
      until_bad: stop at the first output that is inf or NaN.

    Returns:
      The outputs as values; None for those that were not reached.
    """
    open_jaxpr = jaxpr.jaxpr
    env: dict[Any, Value] = {}
    for var, const in zip(open_jaxpr.constvars, jaxpr.consts, strict=True):
        env[var] = Value(const, Constant(captured=True))
    env.update(zip(open_jaxpr.invars, operands, strict=True))
    last_use = _last_uses(open_jaxpr)
    wanted = {var for var in open_jaxpr.outvars if not isinstance(var, Literal)}

    def read(atom):
        if isinstance(atom, Literal):
            dtype: Any = getattr(atom.aval, "dtype", None)
            return Value(np.asarray(atom.val, dtype), Constant(captured=False))
        return env[atom]

    for i, eqn in enumerate(open_jaxpr.eqns):
        given = [read(atom) for atom in eqn.invars]
        out = evaluate(eqn, given, context, (*context.order, i))
        env.update(zip(eqn.outvars, out, strict=True))
        for var in last_use.get(i, ()):
            _forget(env.pop(var))
        if until_bad and any(env[v].bad for v in eqn.outvars if v in wanted):
            break
    return [read(a) if isinstance(a, Literal) or a in env else None for a in open_jaxpr.outvars]


def _last_uses(jaxpr: Any) -> dict[int, list[Any]]:
    """Number of an equation -> the variables that no later one reads."""
    last = {}
    for i, eqn in enumerate(jaxpr.eqns):
        for var in (*eqn.invars, *eqn.outvars):
            if not isinstance(var, Literal):
                last[var] = i
    # Outputs are wanted, and what came from outside may be wanted there.
    for var in (*jaxpr.outvars, *jaxpr.invars, *jaxpr.constvars):
        if not isinstance(var, Literal):
            last.pop(var, None)
    uses: dict[int, list[Any]] = {}
    for var, i in last.items():
        uses.setdefault(i, []).append(var)
    return uses


def _forget(value: Value) -> None:
    """Drop a large finite value, unless a bad step has read it."""
    if value.bad or value.size <= SMALL or not isinstance(value.origin, Step):
        return
    if not value.origin.unfolded.get(("read", value.position)):
        value.data = None


def evaluate(eqn: Any, given: list[Value], context: Context, order: tuple[int, ...]) -> list[Value]:
    """The outputs of one equation; calls and the branch of a `cond` are entered."""
    name = eqn.primitive.name
    within = Context((*context.calls, eqn), context.iterations, order)
    if name in INLINE | REMAT | _CUSTOM and inner(eqn) is not None:
        return record(inner(eqn), given, within)
    if name == "cond":
        branches = eqn.params["branches"]
        number = int(np.clip(np.asarray(given[0].data).astype(int), 0, len(branches) - 1))
        return record(closed(branches[number]), given[1:], within)
    step = Step(eqn, given, context, order)
    arrays = [value.data for value in given]
    if name in _WHOLE:
        out = jax.jit(lambda operands: bind(eqn, operands))(arrays)
    else:
        out = bind(eqn, arrays)
    step.outputs = [Value(x, step, i) for i, x in enumerate(out)]
    if any(value.bad for value in step.outputs):
        for value in given:
            if isinstance(value.origin, Step):
                value.origin.unfolded["read", value.position] = True
    return step.outputs
