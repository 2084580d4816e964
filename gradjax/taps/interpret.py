"""Evaluate a jaxpr again and do something at chosen values: the engine of `gradjax.probe`.

Each *site* is the first output of an equation (or a carried value of a scan), known by its path. At
a site the value goes through `attach(path, value, sink)`. Differentiating with respect to the sinks
gives what the backward pass of `attach` returns for them: with value + sink the cotangent itself,
with a function whose backward pass returns statistics in the sink's place those statistics, and the
cotangent is never stored. A scan stacks them, one row for each iteration.

    jit, scan, checkpoint, cond      values and cotangents
    while, custom_jvp, custom_vjp    values only: their derivatives are not those of their insides
    shard_map, pallas_call, ...      refused by name, never missed

In a branch of `cond` that was not taken, values are NaN and cotangents zero. A `while` has the
values of its last iteration.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
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
    kind: str  # "tap", "module", or what else it is ("relu", "skip", "carry", ...)
    label: str  # class of the module
    shape: tuple[int, ...]  # shape of one row
    dtype: Any
    lead: tuple[int, ...] = ()  # lengths of the scans around it
    values_only: bool = False  # it has no cotangent


def enterable(eqn: Any) -> bool:
    """Whether sites inside an equation have values and cotangents."""
    return eqn.primitive.name in INLINE | REMAT | {"scan", "cond"}


def named_sites(
    jaxpr: Any, path: Path = (), lead: tuple[int, ...] = (), values_only: bool = False
) -> tuple[list[Site], dict[str, str]]:
    """Every name in a closed jaxpr.

    Args:
      jaxpr: closed.
      path, lead, values_only: where this jaxpr stands in the whole one.

    Returns:
      sites: in the order of evaluation.
      skipped: name -> why it cannot be watched.
    """
    sites, skipped = [], {}
    for i, eqn in enumerate(jaxpr.jaxpr.eqns):
        here, primitive = (*path, i), eqn.primitive.name
        if is_named(eqn):
            kind, name, label = parse(eqn.params["name"])
            aval = eqn.outvars[0].aval
            sites.append(Site(here, name, kind, label, aval.shape, aval.dtype, lead, values_only))
            continue
        rows = (*lead, eqn.params["length"]) if primitive == "scan" else lead
        is_values_only = primitive in VALUES_ONLY
        for number, (key, each) in enumerate(insides(eqn)):
            branch = (*here, number) if primitive == "cond" else here
            found, refused = named_sites(each, branch, rows, values_only or is_values_only)
            is_condition = primitive == "while" and key == "cond_jaxpr"
            if is_condition or not (enterable(eqn) or is_values_only):
                reason = f"it lies inside {primitive}, which a probe does not look into"
                refused |= {site.name: reason for site in found}
                found = []
            sites += found
            skipped |= refused
    return sites, skipped


class Watch(NamedTuple):
    """What is done at the sites of one run."""

    attach: Callable[[Path, Array, PyTree], Array]  # (path, value, sink) -> value
    measure: Callable[[Path, Array], PyTree]  # (path, value) -> what is returned of it
    paths: frozenset[Path]  # the sites
    prefixes: frozenset[Path]  # the equations that have a site inside


def watching(
    paths: Collection[Path], attach: Callable, measure: Callable = lambda path, value: value
) -> Watch:
    """A `Watch` of the sites at `paths`."""
    prefixes = frozenset(path[:k] for path in paths for k in range(len(path)))
    return Watch(attach, measure, frozenset(paths), prefixes)


def run(
    jaxpr: Any, operands: list, watch: Watch, sinks: Mapping[Path, PyTree], path: Path = ()
) -> tuple[list, dict]:
    """Evaluate a closed jaxpr.

    Args:
      jaxpr: closed.
      operands: its arguments.
      watch: the sites, and what is done there.
      sinks: path -> sink of the sites whose value goes through `watch.attach`.
      path: where this jaxpr stands in the whole one.

    Returns:
      outputs: as the jaxpr's.
      seen: path -> what `watch.measure` returned for the site's value.
    """
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
    """Evaluate an equation with sites inside; returns as `run`."""
    name, depth = eqn.primitive.name, len(here)
    own = {path: sink for path, sink in sinks.items() if path[:depth] == here and len(path) > depth}
    if name == "scan":
        return _scan(eqn, given, watch, own, here)
    if name == "cond":
        return _cond(eqn, given, watch, own, here)
    if name in INLINE:
        return run(inner(eqn), given, watch, own, here)
    if name in REMAT:

        def block(given, own):
            return run(inner(eqn), given, watch, own, here)

        options = {key: eqn.params[key] for key in ("prevent_cse", "policy")}
        return jax.checkpoint(block, **options)(given, own)
    out = bind(eqn, given)
    if name == "while":
        return out, _while(eqn, lax.stop_gradient(given), watch, here)
    return out, run(inner(eqn), lax.stop_gradient(given), watch, {}, here)[1]


def _scan(eqn: Any, given: list, watch: Watch, sinks: Mapping, here: Path) -> tuple[list, dict]:
    num_consts, num_carry = scan_split(eqn)
    end = num_consts + num_carry
    consts, carry, xs = given[:num_consts], given[num_consts:end], given[end:]

    def body(carry, row):
        row_xs, row_sinks = row
        out, seen = run(inner(eqn), [*consts, *carry, *row_xs], watch, row_sinks, here)
        for k in range(num_carry):
            if (site := (*here, -1 - k)) in watch.paths:
                out[k] = _at_site(out[k], site, watch, row_sinks, seen)
        return out[:num_carry], (out[num_carry:], seen)

    options = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
    carry, (ys, seen) = lax.scan(body, carry, (xs, dict(sinks)), **options)
    return [*carry, *ys], seen


def _blank(function: Callable, *args: Any) -> PyTree:
    """What `function` would return, filled with NaN (0 for integers)."""

    def fill(x):
        value = jnp.nan if jnp.issubdtype(x.dtype, jnp.inexact) else 0
        return jnp.full(x.shape, value, x.dtype)

    return jax.tree.map(fill, jax.eval_shape(function, *args))


def _cond(eqn: Any, given: list, watch: Watch, sinks: Mapping, here: Path) -> tuple[list, dict]:
    index, *operands = given
    own = dict(sinks)

    def evaluate(number, operands, own):
        branch = closed(eqn.params["branches"][number])
        return run(branch, operands, watch, own, (*here, number))

    blanks: dict = {}
    numbers = range(len(eqn.params["branches"]))
    for number in numbers:
        seen_in = partial(lambda number, ops, own: evaluate(number, ops, own)[1], number)
        blanks |= _blank(seen_in, operands, own)

    def whole(number, operands, own):
        """The branch, with blanks for what only the others see."""
        out, seen = evaluate(number, operands, own)
        return out, blanks | seen

    return lax.switch(index, [partial(whole, number) for number in numbers], operands, own)


def _while(eqn: Any, given: list, watch: Watch, here: Path) -> dict:
    """What is seen in the last iteration; NaN if there is none."""
    first = eqn.params["cond_nconsts"]
    second = first + eqn.params["body_nconsts"]
    cond_consts, body_consts, carry = given[:first], given[first:second], given[second:]
    condition, iteration = closed(eqn.params["cond_jaxpr"]), closed(eqn.params["body_jaxpr"])
    no_sites = watching((), watch.attach)

    def body(state):
        carry, _ = state
        return run(iteration, [*body_consts, *carry], watch, {}, here)

    def cond(state):
        carry, _ = state
        return run(condition, [*cond_consts, *carry], no_sites, {})[0][0]

    blank = _blank(lambda carry: body((carry, None))[1], carry)
    return lax.while_loop(cond, body, (carry, blank))[1]
