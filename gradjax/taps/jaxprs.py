"""The insides of jaxprs: where an equation holds other jaxprs, and how to bind it again.

`jax.extend` and `jax.interpreters` promise no stability, so the taps use them in this file only. A
*path* names an equation: the indices of the equations on the way to it, so (3, 0) is the first
equation of the jaxpr inside the fourth.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.extend import core
from jax.interpreters import ad, batching, mlir

Path = tuple[int, ...]
Literal = core.Literal

# Calls that are evaluated as if they were written in place.
INLINE = {"jit", "pjit", "closed_call", "core_call", "core_closed_call"}
REMAT = {"checkpoint", "remat", "remat2"}
_INSIDES = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def closed(jaxpr: Any) -> core.ClosedJaxpr:
    """A jaxpr with its constants; an open jaxpr has none."""
    return jaxpr if hasattr(jaxpr, "consts") else core.ClosedJaxpr(jaxpr, ())


def inner(eqn: Any) -> core.ClosedJaxpr | None:
    """The one jaxpr inside an equation, None if it has none.

    Calls, rematerialised blocks, scans and functions with custom derivatives have one.
    """
    for key in _INSIDES:
        if key in eqn.params and hasattr(eqn.params[key], "eqns"):
            return closed(eqn.params[key])
    return None


def insides(eqn: Any) -> list[tuple[str, core.ClosedJaxpr]]:
    """Every jaxpr among the parameters of an equation, with the parameter's name.

    An open jaxpr whose constants are kept elsewhere cannot be evaluated and is left out.
    """
    found = []
    for key, value in eqn.params.items():
        for each in value if isinstance(value, tuple | list) else (value,):
            if is_whole(each):
                found.append((key, closed(each)))
    return found


def is_whole(x: Any) -> bool:
    """Whether something is a jaxpr that has all its constants."""
    return hasattr(x, "eqns") and (hasattr(x, "consts") or not x.constvars)


def scan_split(eqn: Any) -> tuple[int, int]:
    """(number of constants, number of carried values) of a scan; the other operands are mapped."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    # From jax 0.11 on the operands are grouped.
    consts, carry, *_ = (len(part) for part in eqn.params["ft_in"].unpack())
    return consts, carry


# The identity with a name. It is a primitive of our own, not `checkpoint_name`, for the sake of
# vmap: a mapped axis may lie anywhere in a value, as it does in `vmap(lambda x: w @ x)`; with
# `front` set, this primitive moves it to the front.
_name = core.Primitive("gradjax_name")
_name.def_impl(lambda x, *, name, front: x)
_name.def_abstract_eval(lambda x, *, name, front: x)
mlir.register_lowering(_name, lambda ctx, x, *, name, front: [x])


def _jvp(primals: tuple, tangents: tuple, **params: Any) -> tuple:
    return _name.bind(*primals, **params), tangents[0]


def _mapped(operands: tuple, dims: tuple, *, name: str, front: bool) -> tuple[Array, int]:
    (x,), (dim,) = operands, dims
    if front:
        x, dim = jnp.moveaxis(x, dim, 0), 0
    return _name.bind(x, name=name, front=front), dim


ad.primitive_jvps[_name] = _jvp
batching.primitive_batchers[_name] = _mapped


def named(x: Array, name: str, front: bool) -> Array:
    """Return `x`, and leave an equation with its name in the jaxpr.

    With `front`, the axes that a vmap maps come first in the named value.
    """
    return _name.bind(x, name=name, front=front)


def is_named(eqn: Any) -> bool:
    """Whether an equation is one of our names."""
    return eqn.primitive is _name


def bind(eqn: Any, operands: list) -> list:
    """The outputs of one equation, evaluated unchanged."""
    found = eqn.primitive.get_bind_params(eqn.params)
    functions, params = found if isinstance(found, tuple) else ((), found)
    out = eqn.primitive.bind(*functions, *operands, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def read(env: dict, atom: Any) -> Any:
    """The value of a variable or literal."""
    return atom.val if isinstance(atom, Literal) else env[atom]


# Where an equation comes from


def frames(eqn: Any) -> list[tuple[Any, int]]:
    """(code object, index of the instruction) of the calls that made an equation, the innermost
    first. Inside a jitted function they end at its border.
    """
    traceback = eqn.source_info.traceback
    return [] if traceback is None else list(zip(*traceback.raw_frames(), strict=True))


def scopes(eqn: Any) -> list[str]:
    """The names of the `jax.named_scope`s around an equation, within its own jaxpr."""
    stack = eqn.source_info.name_stack.stack
    return [part.name for part in stack if type(part).__name__ == "Scope"]


def at_place_of(eqn: Any, scope: str) -> Any:
    """The equation without a traceback of its own and in one more scope.

    What is traced while it is evaluated then has the frames of the Python code that runs.
    """
    info = eqn.source_info
    bare = type(info)(None, info.name_stack.extend(scope))
    return eqn.replace(source_info=bare)


def is_transposed(eqn: Any) -> bool:
    """Whether an equation belongs to a backward pass, as far as its own jaxpr shows."""
    stack = eqn.source_info.name_stack.stack
    return any(type(part).__name__ == "Transform" and part.name == "transpose" for part in stack)
