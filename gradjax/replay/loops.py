"""Look into one iteration of a loop, or into a program over several devices, once it is known to
have made something bad.

A loop is evaluated again, compiled, with two bits for every carried value and iteration: whether it
holds NaN, whether it holds inf. The iteration in which a value became bad is then evaluated one
equation at a time, from its own carried values. Cost: two runs of the loop and one compilation,
however many iterations it has.

A program over several devices (`shard_map`) is turned into one that is mapped over the devices'
shards, whose collectives are sums and the like over the mapped axis.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun, primitives

from gradjax.replay.tape import Carried, Context, Part, Row, Step, Value, is_inexact, record
from gradjax.taps.jaxprs import closed, inner, scan_split


class Loop(NamedTuple):
    """A scan or a while as one kind of loop.

    Attributes:
      body: (carry, t) -> (carry, rows given out at iteration t); traced.
      jaxpr: the closed jaxpr of the body.
      consts: what the body reads and no iteration changes.
      carry: the first carried values.
      rows: arrays of which iteration t reads row `row_of(t)`.
      length: number of iterations.
      reverse: whether the rows are read from the last to the first.
    """

    body: Callable[[list, Any], list]
    jaxpr: Any
    consts: list[Value]
    carry: list[Value]
    rows: list[Value]
    length: int
    reverse: bool

    def row_of(self, iteration: Any) -> Any:
        """The row that an iteration reads and writes."""
        return self.length - 1 - iteration if self.reverse else iteration


def loop_of(step: Step) -> Loop:
    """The loop that a step is."""
    return _once(step, "loop", _scan if step.name == "scan" else _while)


def _once(step: Step, key: Any, make: Callable[[Step], Any]) -> Any:
    """What `make` returns for a step, computed once."""
    if key not in step.unfolded:
        step.unfolded[key] = make(step)
    return step.unfolded[key]


def _scan(step: Step) -> Loop:
    num_consts, num_carry = scan_split(step.eqn)
    end = num_consts + num_carry
    consts, carry, rows = (
        step.operands[:num_consts],
        step.operands[num_consts:end],
        step.operands[end:],
    )
    params, jaxpr = step.eqn.params, inner(step.eqn)
    function = jaxpr_as_fun(jaxpr)
    length, reverse = params["length"], params["reverse"]

    def body(carry, t):
        row = length - 1 - t if reverse else t
        own = [lax.dynamic_index_in_dim(x.data, row, keepdims=False) for x in rows]
        return function(*(x.data for x in consts), *carry, *own)

    return Loop(body, jaxpr, consts, carry, rows, length, reverse)


def _while(step: Step) -> Loop:
    params = step.eqn.params
    first = params["cond_nconsts"]
    second = first + params["body_nconsts"]
    cond_consts = [x.data for x in step.operands[:first]]
    consts, carry = step.operands[first:second], step.operands[second:]
    jaxpr = closed(params["body_jaxpr"])
    function, condition = jaxpr_as_fun(jaxpr), jaxpr_as_fun(closed(params["cond_jaxpr"]))

    def body(carry, t):
        return function(*(x.data for x in consts), *carry)

    @jax.jit
    def count(carry):
        def advance(state):
            return body(state[0], None), state[1] + 1

        return lax.while_loop(lambda state: condition(*cond_consts, *state[0])[0], advance, carry)

    length = int(count(([x.data for x in carry], 0))[1])
    return Loop(body, jaxpr, consts, carry, [], length, False)


def _advance(step: Step) -> Callable:
    """The compiled function `stop -> (carried values before iteration stop, bits)`.

    bits: for every output of the body (iterations, 2), whether it holds NaN and inf.
    """
    loop = loop_of(step)
    count = len(loop.carry)
    num_out = len(loop.jaxpr.jaxpr.outvars)

    @jax.jit
    def advance(carry, stop):
        def iteration(t, state):
            carry, bits = state
            out = loop.body(carry, t)
            now = jnp.stack([_bits(x) for x in out]) if out else jnp.zeros((0, 2), bool)
            return out[:count], bits.at[t].set(now)

        bits = jnp.zeros((loop.length, num_out, 2), bool)
        return lax.fori_loop(0, stop, iteration, (carry, bits))

    carry = [x.data for x in loop.carry]
    return lambda stop: advance(carry, stop)


def _bits(x: Any) -> Any:
    if not is_inexact(x):
        return jnp.zeros(2, bool)
    return jnp.stack([jnp.isnan(x).any(), jnp.isinf(x).any()])


def _history(step: Step) -> np.ndarray:
    """(iterations, outputs of the body, 2): whether each holds NaN, inf."""
    advance = _once(step, "advance", _advance)
    return np.asarray(advance(loop_of(step).length)[1])


def _start(step: Step, position: int, iteration: int, kind: str) -> int:
    """The first of the iterations up to this one in all of which an output was bad in that way."""
    bits = _once(step, "history", _history)[: iteration + 1, position, 0 if kind == "nan" else 1]
    good = np.flatnonzero(~bits)
    return min(int(good[-1]) + 1, iteration) if good.size else 0


def _iteration(step: Step, iteration: int) -> list[Any]:
    """The outputs of one iteration, evaluated one equation at a time."""
    key = ("iteration", iteration)
    if key in step.unfolded:
        return step.unfolded[key]
    loop = loop_of(step)
    carry = loop.carry
    if iteration:
        found, _ = _once(step, "advance", _advance)(iteration)
        carry = [Value(x, Carried(step, j, iteration - 1)) for j, x in enumerate(found)]
    row = int(loop.row_of(iteration))
    rows = [Value(x.data[row], Row(x, row)) for x in loop.rows]
    context = Context(
        (*step.context.calls, step.eqn),
        (*step.context.iterations, (step.name, row)),
        (*step.order, iteration),
    )
    out = record(loop.jaxpr, [*loop.consts, *carry, *rows], context)
    step.unfolded[key] = out
    return out


def unfold(value: Value, kind: str, entry: tuple[int, ...]) -> tuple[Value, tuple[int, ...]]:
    """The value inside a loop or a program over devices that an output, a carried value or a row
    comes from, with the entry there.

    Returns:
      The same value where there is nothing to look into.
    """
    origin = value.origin
    if isinstance(origin, Row):
        return origin.whole, (origin.index, *entry)
    if isinstance(origin, Part):
        flat = origin.indices[entry]
        return origin.whole, tuple(int(i) for i in np.unravel_index(flat, origin.whole.shape))
    if isinstance(origin, Carried):
        return _at_iteration(origin.step, origin.position, origin.iteration, kind, entry)
    if not isinstance(origin, Step):
        return value, entry
    if origin.name == "shard_map":
        outputs = _once(origin, "devices", _over_devices)
        return (value, entry) if outputs is None else outputs[value.position](kind)
    if origin.name not in ("scan", "while"):
        return value, entry
    loop = loop_of(origin)
    if value.position < len(loop.carry):
        if not loop.length:
            return loop.carry[value.position], entry
        return _at_iteration(origin, value.position, loop.length - 1, kind, entry)
    iteration = int(loop.row_of(entry[0]))
    return _at_iteration(origin, value.position, iteration, kind, entry[1:])


def _at_iteration(
    step: Step, position: int, iteration: int, kind: str, entry: tuple[int, ...]
) -> tuple[Value, tuple[int, ...]]:
    if position < len(loop_of(step).carry):
        iteration = _start(step, position, iteration, kind)
    made = _iteration(step, iteration)[position]
    bad = made.where(kind)
    if not bad.any():
        # Evaluated one equation at a time, it came out finite.
        return Value(made.data, step, position), entry
    return made, entry if entry_is(bad, entry) else made.first(kind)


def entry_is(bad: np.ndarray, entry: tuple[int, ...]) -> bool:
    """Whether an entry exists and is marked."""
    within = len(entry) == bad.ndim and all(i < n for i, n in zip(entry, bad.shape, strict=True))
    return within and bool(bad[entry])


# Several devices

# Collectives that say that their result is the same on every device -> those that do not say so.
_PLAIN = {
    "psum_invariant": primitives.psum_p,
    "all_gather_invariant": primitives.all_gather_p,
}


def _over_devices(step: Step) -> list[Callable] | None:
    """For every output, the function kind -> (value of the mapped program, entry there).

    None where the program cannot be mapped: it is a border of the search.
    """
    params = step.eqn.params
    if "in_specs" not in params:
        return None
    sizes = {name: params["mesh"].shape[name] for name in sorted(params["newly_manual_axes"])}
    function = jaxpr_as_fun(_plain(inner(step.eqn)))
    for name in reversed(sizes):
        function = jax.vmap(function, axis_name=name, axis_size=sizes[name])
    shards, given = [], []
    for whole, spec in zip(step.operands, params["in_specs"], strict=True):
        indices = np.arange(whole.size).reshape(whole.shape)
        shards.append(_shards(jnp.asarray(whole.data), spec, sizes))
        given.append(Value(shards[-1], Part(whole, np.asarray(_shards(indices, spec, sizes)))))
    try:
        mapped = jax.make_jaxpr(function)(*shards)
    except Exception:
        return None
    context = Context((*step.context.calls, step.eqn), step.context.iterations, step.order)
    outputs = record(mapped, given, context)
    return [partial(_first_on_a_device, value) for value in outputs]


def _first_on_a_device(value: Value, kind: str) -> tuple[Value, tuple[int, ...]]:
    return value, value.first(kind)


def _plain(jaxpr: Any) -> ClosedJaxpr:
    """A jaxpr without what `vmap` does not know of collectives."""
    eqns = []
    for eqn in jaxpr.jaxpr.eqns:
        params = {
            key: _plain(value) if hasattr(value, "consts") else value
            for key, value in eqn.params.items()
        }
        primitive = eqn.primitive
        if primitive.name in _PLAIN:
            primitive = _PLAIN[primitive.name]
            params.setdefault("axis_index_groups", None)
        elif primitive.name in ("pvary", "pcast"):
            primitive, params = primitives.copy_p, {}
        eqns.append(eqn.replace(primitive=primitive, params=params))
    return ClosedJaxpr(jaxpr.jaxpr.replace(eqns=eqns), jaxpr.consts)


def _shards(x: Any, spec: Any, sizes: dict[str, int]) -> Any:
    """The shards of an array, one leading axis for each name of the mesh.

    Args:
      x: the whole array.
      spec: for each of its axes None, a name, or several names.
      sizes: name -> number of devices along that axis of the mesh.
    """
    shape, lead = [], {}
    for axis, size in enumerate(x.shape):
        part = spec[axis] if axis < len(spec) else None
        names = part if isinstance(part, tuple) else (part,) if part else ()
        for name in names:
            if name in sizes:
                lead[name] = len(shape)
                shape.append(sizes[name])
                size //= sizes[name]
        shape.append(size)
    x = x.reshape(shape)
    present = [name for name in sizes if name in lead]
    axes = [lead[name] for name in present]
    rest = [axis for axis in range(x.ndim) if axis not in axes]
    x = x.transpose(axes + rest)
    for position, name in enumerate(sizes):
        if name not in lead:
            x = x[(slice(None),) * position + (None,)].repeat(sizes[name], axis=position)
    return x
