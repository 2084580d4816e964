"""What gradjax knows of the insides of a jaxpr: where it holds others, and how to bind one equation again.

`jax.extend` promises no stability, so this file and `gradjax.taps.interpret` are the only ones on it; their tests run on
the oldest and the newest supported jax. A *path* names an equation: the indices of the equations on the way to it, so
(3, 0) is the first equation of the jaxpr inside the fourth.
"""

from typing import Any

from jax.extend import core

PREFIX = "gradjax."
Path = tuple[int, ...]

INLINE = {"jit", "pjit", "closed_call", "core_call", "core_closed_call"}  # evaluated as if written in place
REMAT = {"checkpoint", "remat", "remat2"}
_INSIDES = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def closed(jaxpr: Any) -> core.ClosedJaxpr:
    """A jaxpr with its constants; those of an open one are none."""
    return jaxpr if hasattr(jaxpr, "consts") else core.ClosedJaxpr(jaxpr, ())


def inner(eqn: Any) -> core.ClosedJaxpr | None:
    """The jaxpr of an equation that is one: a call, a rematerialised block, a scan, a custom derivative's function."""
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
    """(number of constants, number of carried values) of a scan; the rest of its operands are scanned over."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, *_ = (len(part) for part in eqn.params["ft_in"].unpack())  # jax 0.11 on
    return consts, carry


def is_named(eqn: Any) -> bool:
    """Whether an equation is one of our names."""
    return eqn.primitive.name == "name" and eqn.params["name"].startswith(PREFIX)


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
