"""Values and cotangents inside any model: `tap`, `functional` and `probe`.

    probe(loss_fn, params, *args)  ->  loss,  v,  d loss / d v  of every named v,  d loss / d params

The loss is traced to a jaxpr in which the outputs of Linen, NNX and Equinox modules and what `tap`
marks have names (`gradjax.taps.names`); that jaxpr is evaluated once more with a zero added at
every name, and differentiated with respect to the zeros (`gradjax.taps.interpret`). Cost: one
gradient and the memory of what is returned.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gradjax.taps import names
from gradjax.taps import statistics as stats
from gradjax.taps.interpret import Site, named_sites, run, watching
from gradjax.taps.names import functional as functional
from gradjax.taps.names import tap as tap

PyTree = Any


class Reasons(dict):
    """name -> why it has no value. Texts are no leaves of a pytree, so that a `Probe` may leave jit
    and vmap.
    """


jax.tree_util.register_pytree_node(
    Reasons, lambda d: ((), tuple(d.items())), lambda items, _: Reasons(items)
)


class Probe(NamedTuple):
    """What `probe` returns. A name inside a scan has a row for every iteration, on a leading
    axis.
    """

    loss: Array  # ()
    values: dict[str, Array]
    cotangents: dict[str, Array]  # of the shapes of values; those that can be had
    grads: PyTree  # like params
    aux: PyTree = None
    skipped: Reasons = Reasons()


class Traced(NamedTuple):
    """A loss as a jaxpr with names, and how to call it."""

    jaxpr: Any  # closed; operands: the leaves of params, then the arrays of args
    sites: list[Site]  # of every name, uniquely named, in the order of evaluation
    skipped: dict[str, str]
    leaves: list[Any]  # the operands
    num_params: int
    params: PyTree
    out_tree: Any
    loss_fn: Callable[..., Any]  # of params, made a pure function where they were a model


def _unique(sites: Sequence[Site]) -> list[Site]:
    """The same sites, module names that come again numbered `name#1`, `name#2`; a tap's may not
    come again.
    """
    counts: Counter = Counter()
    total = Counter(site.name for site in sites if site.kind == "tap")
    if twice := [name for name, count in total.items() if count > 1]:
        raise ValueError(
            f"probe: the tap name {twice[0]!r} is used {total[twice[0]]} times; each name can mark one value. In a "
            'function that is called several times let it differ, as in tap(h, f"block{i}").'
        )
    out = []
    for site in sites:
        count = counts[site.name]
        counts[site.name] += 1
        out.append(site._replace(name=f"{site.name}#{count}") if count else site)
    return out


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def arrays_of(args: tuple) -> list:
    """The arrays among the leaves of `args`; what is none (a bool, a text) is static."""
    return [x for x in jax.tree.leaves(args) if _is_array(x)]


def merger(args: tuple) -> Callable[[list], tuple]:
    """The function that puts arrays back among what is static in `args`."""
    leaves, tree = jax.tree.flatten(args)

    def merge(arrays):
        rest = iter(arrays)
        return jax.tree.unflatten(tree, [next(rest) if _is_array(x) else x for x in leaves])

    return merge


def trace(
    loss_fn: Callable[..., Any], params: PyTree, args: tuple, has_aux: bool, where: str = "probe"
) -> Traced:
    """`loss_fn(params, *args)` as a jaxpr in which every module's output has its name, checked.

    Raises:
      ValueError: see `probe`.
    """
    if names.is_module(params):
        loss_fn, params = functional(loss_fn, params)
    leaves, tree = jax.tree.flatten(params)
    if not leaves or any(not jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in leaves):
        kinds = sorted(
            {str(jnp.result_type(x)) if hasattr(x, "dtype") else type(x).__name__ for x in leaves}
        )
        raise ValueError(
            f"{where}: the leaves of params are {', '.join(kinds) or 'none'}; floating arrays are needed, the "
            "rest goes in args or the loss itself."
        )
    arrays, merge = arrays_of(args), merger(args)

    def flat(leaves, arrays):
        return loss_fn(jax.tree.unflatten(tree, leaves), *merge(arrays))

    with names.naming():
        try:
            jaxpr, shape = jax.make_jaxpr(flat, return_shape=True)(leaves, arrays)
        except Exception as error:
            if type(error).__name__ == "ModifyScopeVariableError":
                raise ValueError(
                    f"{where}: the model changes its state in apply ({str(error).split(' (http')[0]}). Call "
                    'model.apply(..., mutable=["batch_stats"]) and return the new state as aux, with has_aux=True.'
                ) from error
            raise
    if has_aux and not (isinstance(shape, tuple) and len(shape) == 2):
        raise ValueError(
            f"{where}: with has_aux=True the loss must return (loss, aux); it returns {_kind(shape)}."
        )
    loss: Any = shape[0] if has_aux else shape  # type: ignore[index]
    if getattr(loss, "shape", None) != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        hint = (
            " If it returns (loss, aux), say has_aux=True."
            if isinstance(loss, tuple)
            else " Take its mean or sum."
        )
        raise ValueError(
            f"{where}: the loss returns {_kind(loss)}; a floating scalar of shape () is needed.{hint}"
        )
    sites, skipped = named_sites(jaxpr)
    if not sites:
        why = (
            f" ({'; '.join(f'{name}: {reason}' for name, reason in skipped.items())})"
            if skipped
            else ""
        )
        raise ValueError(
            f"{where}: no named value was found{why}. Outputs of Linen, NNX and Equinox modules have names by "
            "themselves (call the module inside the loss); in a plain function mark values: "
            'h = gradjax.tap(h, "layer3").'
        )
    out_tree = jax.tree.structure(shape)
    return Traced(
        jaxpr, _unique(sites), skipped, leaves + arrays, len(leaves), params, out_tree, loss_fn
    )


def _kind(shape: PyTree) -> str:
    if hasattr(shape, "shape"):
        return f"{tuple(shape.shape)} {shape.dtype}"
    return f"a {type(shape).__name__}"


def probe(
    loss_fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    has_aux: bool = False,
    statistics: bool = False,
) -> Probe:
    """Loss, every named value and its cotangent, and the parameters' gradients, of any model in one
    evaluation.

    Module outputs of Linen, NNX and Equinox are named by themselves, other values by `gradjax.tap`. Works through jit,
    scan (one row for each iteration), remat, vmap and cond, and composes with jit and vmap. Inside `while`,
    `custom_jvp` and `custom_vjp` values have no cotangents, since their derivatives are not those of their insides; a
    branch of a `cond` that was not taken has NaN values.

    Args:
      loss_fn: (params, *args) -> loss of shape (), or (loss, aux) with `has_aux`.
      params: pytree of floating arrays, or an NNX or Equinox model (see `gradjax.functional`).
      args: arrays in any pytrees; what is no array (a bool, a string) is static.
      statistics: reduce inside the program, for models whose activations are too large to return: values are then
        `gradjax.taps.statistics.Summary` (log rms, largest, share of zeros, first entry that is not finite, histogram
        over powers of two), cotangents `gradjax.taps.statistics.Cotangent`; a cotangent is never stored whole.

    Returns:
      `Probe`. A name that comes again because a module is called again is numbered: `Dense_0`,
      `Dense_0#1`.

    Raises:
      ValueError: a loss that is not a floating scalar, no named value, a tap's name used twice, parameters that are not
        floating, a Linen model that changes state without `mutable`.

    >>> import jax.numpy as jnp
    >>> found = probe(lambda w, x: jnp.sum(tap(w * x, "h") ** 2), jnp.ones(2), jnp.array([1.0, 3.0]))
    >>> found.values["h"].tolist(), found.cotangents["h"].tolist(), found.grads.tolist()
    ([1.0, 3.0], [2.0, 6.0], [2.0, 18.0])
    """
    traced = trace(loss_fn, params, args, has_aux)
    paths, sites = (
        {site.path for site in traced.sites},
        [s for s in traced.sites if not s.values_only],
    )
    if statistics:
        attach = lambda path, value, sink: stats.observed(value, sink)
        watch = watching(
            paths, attach, lambda path, value: stats.summary(jax.lax.stop_gradient(value))
        )
        rows = lambda lead: jax.tree.map(lambda x: jnp.broadcast_to(x, lead), stats.blank())
        zeros: dict = {s.path: rows(s.lead) for s in sites}
    else:
        watch = watching(paths, lambda path, value, sink: value + sink)
        zeros = {s.path: jnp.zeros((*s.lead, *s.shape), s.dtype) for s in sites}

    def evaluate(leaves, zeros):
        out, seen = run(traced.jaxpr, [*leaves, *traced.leaves[traced.num_params :]], watch, zeros)
        return out[0], (out, seen)

    gradient = jax.value_and_grad(evaluate, argnums=(0, 1), has_aux=True)
    (loss, (out, seen)), (grads, cotangents) = gradient(traced.leaves[: traced.num_params], zeros)
    out = jax.tree.unflatten(traced.out_tree, out)
    return Probe(
        loss=loss,
        values={site.name: seen[site.path] for site in traced.sites},
        cotangents={
            site.name: cotangents[site.path] for site in traced.sites if site.path in cotangents
        },
        grads=jax.tree.unflatten(jax.tree.structure(traced.params), grads),
        aux=out[1] if has_aux else None,
        skipped=Reasons(traced.skipped),
    )
