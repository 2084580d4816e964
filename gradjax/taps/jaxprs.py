"""What gradjax knows of the insides of a jaxpr: where it holds others, and how to bind one equation
again.

`jax.extend` and `jax.interpreters` promise no stability, so this file holds what is used of them
(and `core.Literal`); the tests run on the oldest and the newest supported jax. A *path* names an
equation: the indices of the equations on the way to it, so (3, 0) is the first equation of the
jaxpr inside the fourth.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.extend import core
from jax.interpreters import ad, batching, mlir

Path = tuple[int, ...]

INLINE = {
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "core_closed_call",
}  # evaluated as if written in place
REMAT = {"checkpoint", "remat", "remat2"}
_INSIDES = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def closed(jaxpr: Any) -> core.ClosedJaxpr:
    """A jaxpr with its constants; those of an open one are none."""
    return jaxpr if hasattr(jaxpr, "consts") else core.ClosedJaxpr(jaxpr, ())


def inner(eqn: Any) -> core.ClosedJaxpr | None:
    """The jaxpr of an equation that is one: a call, a rematerialised block, a scan, a custom
    derivative's function.
    """
    for key in _INSIDES:
        if key in eqn.params and hasattr(eqn.params[key], "eqns"):
            return closed(eqn.params[key])
    return None


def insides(eqn: Any) -> list[tuple[str, core.ClosedJaxpr]]:
    """Every jaxpr among the parameters of an equation, with the parameter's name."""
    found = []
    for key, value in eqn.params.items():
        for each in value if isinstance(value, tuple | list) else (value,):
            if hasattr(each, "eqns"):
                found.append((key, closed(each)))
    return found


def scan_split(eqn: Any) -> tuple[int, int]:
    """(number of constants, number of carried values) of a scan; the rest of its operands are
    scanned over.
    """
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, *_ = (len(part) for part in eqn.params["ft_in"].unpack())  # jax 0.11 on
    return consts, carry


# The identity with a name. It is a primitive of our own, not `checkpoint_name`, for the sake of
# vmap: a mapped axis may lie anywhere in a value, as it does in `vmap(lambda x: w @ x)`; where
# `front` is set, this one moves it to the front.
_name = core.Primitive("gradjax_name")
_name.def_impl(lambda x, *, name, front: x)
_name.def_abstract_eval(lambda x, *, name, front: x)
ad.primitive_jvps[_name] = lambda primals, tangents, **params: (
    _name.bind(*primals, **params),
    tangents[0],
)
mlir.register_lowering(_name, lambda ctx, x, *, name, front: [x])


def _mapped(operands: tuple, dims: tuple, *, name: str, front: bool) -> tuple[Array, int]:
    (x,), (dim,) = operands, dims
    x, dim = (jnp.moveaxis(x, dim, 0), 0) if front else (x, dim)
    return _name.bind(x, name=name, front=front), dim


batching.primitive_batchers[_name] = _mapped


def named(x: Array, name: str, front: bool) -> Array:
    """`x`, with an equation in the jaxpr that says its name; with `front`, axes that a vmap maps
    come first.
    """
    return _name.bind(x, name=name, front=front)


def is_named(eqn: Any) -> bool:
    """Whether an equation is one of our names."""
    return eqn.primitive is _name


def bind(eqn: Any, operands: list) -> list:
    """The outputs of one equation evaluated as it stands."""
    found = eqn.primitive.get_bind_params(eqn.params)
    functions, params = found if isinstance(found, tuple) else ((), found)
    out = eqn.primitive.bind(*functions, *operands, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def read(env: dict, atom: Any) -> Any:
    """The value of a variable or literal."""
    return atom.val if isinstance(atom, core.Literal) else env[atom]


def outer_scan(jaxpr: Any, path: Path) -> Path:
    """The path of the outermost scan around an equation, () for none."""
    k = 0
    while k < len(path) - 1:
        eqn = jaxpr.jaxpr.eqns[path[k]]
        if eqn.primitive.name == "scan":
            return path[: k + 1]
        within = insides(eqn)
        branch = path[k + 1] if eqn.primitive.name == "cond" else 0
        k += 2 if eqn.primitive.name == "cond" else 1
        jaxpr = within[branch][1]
    return ()
