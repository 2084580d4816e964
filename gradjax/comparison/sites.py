"""Names on values that their cotangents get too.

In the jaxpr of a loss each named value becomes a primitive, the identity, whose transpose leaves
the name on the cotangent: both are found in the program of the gradient, inside loops as well, and
no number is changed.
"""

from typing import Any

from jax.extend import core
from jax.interpreters import ad, mlir

from gradjax.replay.gradient import gradient_jaxpr
from gradjax.taps.jaxprs import Path, closed
from gradjax.taps.probe import Traced

VALUE, COTANGENT = "gradjax_value", "gradjax_cotangent"


def _identity(name: str) -> core.Primitive:
    primitive = core.Primitive(name)
    primitive.def_impl(lambda x, *, site: x)
    primitive.def_abstract_eval(lambda x, *, site: x)
    mlir.register_lowering(primitive, lambda ctx, x, *, site: [x])
    return primitive


_value, _tangent, _cotangent = map(_identity, (VALUE, "gradjax_tangent", COTANGENT))


# While a gradient is traced: the sites whose value depends on the parameters.
_varying: set[str] = set()


def _jvp(primals: tuple, tangents: tuple, *, site: str) -> tuple:
    _varying.add(site)
    return _value.bind(*primals, site=site), _tangent.bind(*tangents, site=site)


def _transpose(cotangent: Any, _: Any, *, site: str) -> list:
    if isinstance(cotangent, ad.Zero):
        return [cotangent]
    return [_cotangent.bind(cotangent, site=site)]


def gradient_with_sites(traced: Traced) -> tuple[Any, frozenset[str]]:
    """The program of a loss and its gradient, with names on values and cotangents.

    Args:
      traced: the loss.

    Returns:
      jaxpr: closed; as `gradjax.replay.gradient.gradient_jaxpr`.
      varying: the names of the values that depend on the parameters. The others have no cotangent
        whatever the loss does with them.
    """
    names = {site.path: site.name for site in traced.sites}
    _varying.clear()
    jaxpr = gradient_jaxpr(traced._replace(jaxpr=_with_sites(traced.jaxpr, names)))
    return jaxpr, frozenset(_varying)


ad.primitive_jvps[_value] = _jvp
ad.primitive_transposes[_tangent] = _transpose


def _with_sites(jaxpr: Any, names: dict[Path, str], path: Path = ()) -> Any:
    """The same program, whose named equations are `VALUE`, with names that are unique.

    Args:
      jaxpr: closed.
      names: path of a named equation -> its unique name.
      path: where this jaxpr stands in the whole one.
    """
    eqns = []
    for i, eqn in enumerate(jaxpr.jaxpr.eqns):
        here = (*path, i)
        if here in names:
            eqn = eqn.replace(primitive=_value, params={"site": names[here]})
        elif any(site[: len(here)] == here for site in names):
            eqn = _with_sites_inside(eqn, names, here)
        eqns.append(eqn)
    return core.ClosedJaxpr(jaxpr.jaxpr.replace(eqns=eqns), jaxpr.consts)


def _with_sites_inside(eqn: Any, names: dict[Path, str], here: Path) -> Any:
    params = dict(eqn.params)
    if eqn.primitive.name == "cond":
        branches = enumerate(params["branches"])
        params["branches"] = tuple(_with_sites(closed(b), names, (*here, k)) for k, b in branches)
        return eqn.replace(params=params)
    for key, value in eqn.params.items():
        if hasattr(value, "eqns"):
            marked = _with_sites(closed(value), names, here)
            params[key] = marked if hasattr(value, "consts") else marked.jaxpr
    return eqn.replace(params=params)


__all__ = ["COTANGENT", "VALUE", "gradient_with_sites"]
