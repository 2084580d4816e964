"""A jaxpr evaluated once more, with something done at chosen values: the engine of `gradjax.probe`.

Each *site* is the first output of an equation (or a carried value of a scan), known by its path. At
a site the value goes through `attach(path, value, sink)`; differentiating with respect to the sinks
gives what `attach`'s backward pass says of the cotangent. With x + sink it is the cotangent itself;
with a function whose backward pass returns statistics in the sink's place it is those, and the
cotangent is never stored. A scan stacks them, one row for each iteration.

    jit, scan, checkpoint, cond      values and cotangents; a branch of `cond` not taken has NaN values and no cotangent
    while, custom_jvp, custom_vjp    values alone (of a while the last turn's): their derivatives are not their insides'
    shard_map, pallas_call, ...      refused by name, never missed
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from gradjax.taps.jaxprs import (
    INLINE,
    REMAT,
    Path,
    bind,
    closed,
    inner,
    insides,
    is_named,
    read,
    scan_split,
)
from gradjax.taps.names import parse

PyTree = Any
VALUES_ONLY = {"while", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}


class Site(NamedTuple):
    """A value of a traced function that can be watched."""

    path: Path
    name: str
    kind: str  # "tap", "module", or what found it otherwise ("relu", "skip", "carry", ...)
    label: str  # class of the module
    shape: tuple[int, ...]  # of one row
    dtype: Any
    lead: tuple[int, ...] = ()  # lengths of the scans around it
    values_only: bool = False


def enterable(eqn: Any) -> bool:
    """Whether sites inside an equation have values and cotangents."""
    return eqn.primitive.name in INLINE | REMAT | {"scan", "cond"}


def named_sites(
    jaxpr: Any, path: Path = (), lead: tuple[int, ...] = (), values_only: bool = False
) -> tuple:
    """([Site] of every name in a closed jaxpr in the order of evaluation, {name: why it cannot be
    watched}).
    """
    sites, skipped = [], {}
    for i, eqn in enumerate(jaxpr.jaxpr.eqns):
        here, primitive = (*path, i), eqn.primitive.name
        if is_named(eqn):
            kind, name, label = parse(eqn.params["name"])
            aval = eqn.outvars[0].aval
            sites.append(Site(here, name, kind, label, aval.shape, aval.dtype, lead, values_only))
            continue
        for number, (key, each) in enumerate(insides(eqn)):
            rows = (*lead, eqn.params["length"]) if primitive == "scan" else lead
            branch = (*here, number) if primitive == "cond" else here
            found, refused = named_sites(
                each, branch, rows, values_only or primitive in VALUES_ONLY
            )
            if not (enterable(eqn) or primitive in VALUES_ONLY) or (
                primitive == "while" and key == "cond_jaxpr"
            ):
                refused |= {
                    site.name: f"it lies inside {primitive}, which a probe does not look into"
                    for site in found
                }
                found = []
            sites += found
            skipped |= refused
    return sites, skipped


class Watch(NamedTuple):
    """What is done at the sites of one run."""

    attach: Callable[[Path, Array, PyTree], Array]
    measure: Callable[[Path, Array], PyTree]
    paths: frozenset[Path]
    prefixes: frozenset[Path]  # of equations that have a site inside


def watching(
    paths: Collection[Path], attach: Callable, measure: Callable = lambda path, value: value
) -> Watch:
    """A `Watch` of the sites at `paths`."""
    return Watch(
        attach, measure, frozenset(paths), frozenset(p[:k] for p in paths for k in range(len(p)))
    )


def run(
    jaxpr: Any, operands: list, watch: Watch, sinks: Mapping[Path, PyTree], path: Path = ()
) -> tuple[list, dict]:
    """The outputs of a closed jaxpr, and what `watch.measure` says of every site's value."""
    env, seen = {}, {}
    env.update(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    env.update(zip(jaxpr.jaxpr.invars, operands, strict=True))
    for i, eqn in enumerate(jaxpr.jaxpr.eqns):
        here, given = (*path, i), [read(env, atom) for atom in eqn.invars]
        if here in watch.prefixes:
            out, found = _enter(eqn, given, watch, sinks, here)
            seen.update(found)
        else:
            out = bind(eqn, given)
        if here in watch.paths:
            out[0] = _at_site(out[0], here, watch, sinks, seen)
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(env, atom) for atom in jaxpr.jaxpr.outvars], seen


def _at_site(value: Array, path: Path, watch: Watch, sinks: Mapping, seen: dict) -> Array:
    if path in sinks:
        value = watch.attach(path, value, sinks[path])
    seen[path] = watch.measure(path, value)
    return value


def _enter(eqn: Any, given: list, watch: Watch, sinks: Mapping, here: Path) -> tuple[list, dict]:
    """An equation with sites inside."""
    name, depth = eqn.primitive.name, len(here)
    own = {path: sink for path, sink in sinks.items() if path[:depth] == here and len(path) > depth}
    if name == "scan":
        return _scan(eqn, given, watch, own, here)
    if name == "cond":
        return _cond(eqn, given, watch, own, here)
    if name in INLINE:
        return run(inner(eqn), given, watch, own, here)
    if name in REMAT:
        block = lambda given, own: run(inner(eqn), given, watch, own, here)
        return jax.checkpoint(
            block, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"]
        )(given, own)
    out = bind(eqn, given)
    if name == "while":
        return out, _while(eqn, lax.stop_gradient(given), watch, here)
    return out, run(inner(eqn), lax.stop_gradient(given), watch, {}, here)[1]


def _scan(eqn: Any, given: list, watch: Watch, sinks: Mapping, here: Path) -> tuple[list, dict]:
    num_consts, num_carry = scan_split(eqn)
    consts, carry, xs = (
        given[:num_consts],
        given[num_consts : num_consts + num_carry],
        given[num_consts + num_carry :],
    )

    def body(carry, row):
        row_xs, row_sinks = row
        out, seen = run(inner(eqn), [*consts, *carry, *row_xs], watch, row_sinks, here)
        for k in range(num_carry):
            if (site := (*here, -1 - k)) in watch.paths:
                out[k] = _at_site(out[k], site, watch, row_sinks, seen)
        return out[:num_carry], (out[num_carry:], seen)

    keep = ("length", "reverse", "unroll")
    carry, (ys, seen) = lax.scan(
        body, carry, (xs, dict(sinks)), **{key: eqn.params[key] for key in keep}
    )
    return [*carry, *ys], seen


def _unseen(function: Callable, *args: Any) -> PyTree:
    """What `function` would have seen, as NaN (0 for integers)."""
    blank = lambda x: jnp.full(
        x.shape, jnp.nan if jnp.issubdtype(x.dtype, jnp.inexact) else 0, x.dtype
    )
    return jax.tree.map(blank, jax.eval_shape(function, *args))


def _cond(eqn: Any, given: list, watch: Watch, sinks: Mapping, here: Path) -> tuple[list, dict]:
    index, *operands = given
    branches = [closed(branch) for branch in eqn.params["branches"]]
    each = [
        lambda ops, own, b=b, k=k: run(b, ops, watch, own, (*here, k))
        for k, b in enumerate(branches)
    ]
    blanks: dict = {}
    for function in each:
        blanks |= _unseen(lambda ops, own, f=function: f(ops, own)[1], operands, dict(sinks))

    def whole(function):
        def branch(ops, own):
            out, seen = function(ops, own)
            return out, blanks | seen

        return branch

    return lax.switch(index, [whole(f) for f in each], operands, dict(sinks))


def _while(eqn: Any, given: list, watch: Watch, here: Path) -> dict:
    """The values of the last turn; NaN without one."""
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts, body_consts, carry = (
        given[:first],
        given[first : first + second],
        given[first + second :],
    )
    go_on, turn = closed(eqn.params["cond_jaxpr"]), closed(eqn.params["body_jaxpr"])
    body = lambda carry: run(turn, [*body_consts, *carry], watch, {}, here)
    blank = _unseen(lambda carry: body(carry)[1], carry)
    none = watching((), watch.attach)
    cond = lambda state: run(go_on, [*cond_consts, *state[0]], none, {})[0][0]
    return lax.while_loop(cond, lambda state: body(state[0]), (carry, blank))[1]
