"""Values and cotangents inside any model: `probe`, beside `tap` and `functional`.

    probe(loss_fn, params, *args)  ->  loss,  v,  d loss / d v  of every named v,  d loss / d params

The loss is traced to a jaxpr in which the outputs of Linen, NNX and Equinox modules and the values
that `tap` marks have names (`gradjax.taps.names`). That jaxpr is evaluated again with a zero added
at every name, and differentiated with respect to the zeros (`gradjax.taps.interpret`). Cost: one
gradient, and the memory of what is returned.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from gradjax.taps import names
from gradjax.taps import statistics as stats
from gradjax.taps.interpret import Site, named_sites, run, watching
from gradjax.taps.names import functional as functional
from gradjax.taps.names import tap as tap

PyTree = Any


class Reasons(dict):
    """name -> why it has no value.

    As a pytree it has no leaves, since jit and vmap could not return strings.
    """


jax.tree_util.register_pytree_node(
    Reasons, lambda d: ((), tuple(d.items())), lambda items, _: Reasons(items)
)


class Probe(NamedTuple):
    """What `probe` returns; printed, a table of its values' and cotangents' sizes.

    A name inside a scan has a row for every iteration, on a leading axis.
    """

    loss: Array  # ()
    values: dict[str, Array]
    cotangents: dict[str, Array]  # same shapes as `values`; only where a cotangent exists
    grads: PyTree  # like params
    aux: PyTree = None
    skipped: Reasons = Reasons()  # names without a value

    def __repr__(self) -> str:
        # As a pytree it may hold anything, such as the axes of a vmap.
        if isinstance(self.values, dict) and isinstance(self.cotangents, dict):
            return _table(self)
        return f"Probe{tuple(self)!r}"

    __str__ = __repr__


class Traced(NamedTuple):
    """A loss as a jaxpr with names, and how to call it."""

    jaxpr: Any  # closed; operands: the leaves of params, then the arrays of args
    sites: list[Site]  # one for every name, names unique, in the order of evaluation
    skipped: dict[str, str]
    leaves: list[Any]  # the operands
    num_params: int
    params: PyTree
    out_tree: Any
    loss_fn: Callable[..., Any]  # a function of params; pure if `probe` was given a model


def _unique(sites: Sequence[Site]) -> list[Site]:
    """Make site names unique: repeated calls become `name#1`; a repeated tap name is an error."""
    counts: Counter = Counter()
    total = Counter(site.name for site in sites if site.kind == "tap")
    if twice := [name for name, count in total.items() if count > 1]:
        raise ValueError(
            f"probe: the tap name {twice[0]!r} is used {total[twice[0]]} times; each name can mark "
            "one value. In a function that is called several times let it differ, as in "
            'tap(h, f"block{i}").'
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
    """The arrays among the leaves of `args`; other leaves (bools, strings) are static."""
    return [x for x in jax.tree.leaves(args) if _is_array(x)]


def merger(args: tuple) -> Callable[[list], tuple]:
    """The function that puts arrays back among the static leaves of `args`."""
    leaves, tree = jax.tree.flatten(args)

    def merge(arrays):
        rest = iter(arrays)
        return jax.tree.unflatten(tree, [next(rest) if _is_array(x) else x for x in leaves])

    return merge


def trace(
    loss_fn: Callable[..., Any],
    params: PyTree,
    args: tuple,
    has_aux: bool,
    where: str = "probe",
    needs_names: bool = True,
) -> Traced:
    """Trace `loss_fn(params, *args)` to a jaxpr in which module outputs have names, and check it.

    Args:
      loss_fn, params, args, has_aux: as in `probe`.
      where: the name of the public function, which begins the error messages.
      needs_names: whether a loss without any named value is an error.

    Raises:
      ValueError: see `probe`.
    """
    if names.is_module(params):
        loss_fn, params = functional(loss_fn, params)
    # as `jax.grad` takes it, a Python float is an array
    params = jax.tree.map(lambda x: jnp.asarray(x) if type(x) is float else x, params)
    leaves, tree = jax.tree.flatten(params)
    _check_params(leaves, where)
    arrays, merge = arrays_of(args), merger(args)

    def flat(leaves, arrays):
        return loss_fn(jax.tree.unflatten(tree, leaves), *merge(arrays))

    with names.naming():
        try:
            jaxpr, shape = jax.make_jaxpr(flat, return_shape=True)(leaves, arrays)
        except Exception as error:
            if type(error).__name__ == "ModifyScopeVariableError":
                raise ValueError(
                    f"{where}: the model changes its state in apply "
                    f"({str(error).split(' (http')[0]}). Call "
                    'model.apply(..., mutable=["batch_stats"]) and return the new state as aux, '
                    "with has_aux=True."
                ) from error
            raise
    _check_loss(shape, has_aux, where)
    sites, skipped = named_sites(jaxpr)
    if needs_names and not sites:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise ValueError(
            f"{where}: no named value was found{f' ({reasons})' if reasons else ''}. Outputs of "
            "Linen, NNX and Equinox modules have names by themselves (call the module inside the "
            'loss); in a plain function mark values: h = gradjax.tap(h, "layer3").'
        )
    return Traced(
        jaxpr=jaxpr,
        sites=_unique(sites),
        skipped=skipped,
        leaves=leaves + arrays,
        num_params=len(leaves),
        params=params,
        out_tree=jax.tree.structure(shape),
        loss_fn=loss_fn,
    )


def _check_params(leaves: list, where: str) -> None:
    if leaves and all(jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in leaves):
        return
    kinds = set()
    for x in leaves:
        kinds.add(str(jnp.result_type(x)) if hasattr(x, "dtype") else type(x).__name__)
    raise ValueError(
        f"{where}: the leaves of params are {', '.join(sorted(kinds)) or 'none'}; floating arrays "
        "are needed, the rest goes in args or the loss itself."
    )


def _check_loss(shape: Any, has_aux: bool, where: str) -> None:
    """Check what the loss returns, of which `shape` has the shapes."""
    if has_aux and not (isinstance(shape, tuple) and len(shape) == 2):
        raise ValueError(
            f"{where}: with has_aux=True the loss must return (loss, aux); "
            f"it returns {_kind(shape)}."
        )
    loss: Any = shape[0] if has_aux else shape
    if getattr(loss, "shape", None) == () and jnp.issubdtype(loss.dtype, jnp.floating):
        return
    hint = "Take its mean or sum."
    if isinstance(loss, tuple):
        hint = "If it returns (loss, aux), say has_aux=True."
    raise ValueError(
        f"{where}: the loss returns {_kind(loss)}; a floating scalar of shape () is needed. {hint}"
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
    """Evaluate any model once and return its named values, their cotangents, and its gradients.

    Module outputs of Linen, NNX and Equinox are named by themselves, other values by `gradjax.tap`.
    Works through jit, scan (one row for each iteration), remat, vmap and cond, and composes with
    jit and vmap. Values inside `while`, `custom_jvp` and `custom_vjp` have no cotangents, since the
    derivatives of these are not those of their insides. A branch of a `cond` that was not taken has
    NaN values.

    Args:
      loss_fn: (params, *args) -> loss of shape (), or (loss, aux) with `has_aux`.
      params: pytree of floating arrays, or an NNX or Equinox model (see `gradjax.functional`).
      args: arrays in any pytrees; non-array leaves (bools, strings) are static.
      has_aux: whether the loss returns (loss, aux).
      statistics: reduce inside the program, for models whose activations are too large to return.
        Values are then `gradjax.taps.statistics.Summary` (log rms, log of the largest magnitude,
        entries that are not finite and the first of them, fraction of zeros, histogram over powers
        of two), cotangents are `gradjax.taps.statistics.Cotangent`, and no cotangent is stored.

    Returns:
      `Probe`. Repeated calls to one module get numbered names: `Dense_0`, `Dense_0#1`.

    Raises:
      ValueError: a loss that is not a floating scalar, no named value, a tap's name used twice,
        parameters that are not floating, a Linen model that changes state without `mutable`.

    >>> import jax.numpy as jnp
    >>> w, x = jnp.ones(2), jnp.array([1.0, 3.0])
    >>> found = probe(lambda w, x: jnp.sum(tap(w * x, "h") ** 2), w, x)
    >>> found.values["h"].tolist(), found.cotangents["h"].tolist(), found.grads.tolist()
    ([1.0, 3.0], [2.0, 6.0], [2.0, 18.0])
    >>> found
    Probe: loss 10, named values: 1
    name  shape  log10 rms  of cotangent
    h     (2,)        0.35          0.65
    """
    traced = trace(loss_fn, params, args, has_aux)
    paths = {site.path for site in traced.sites}
    sites = [site for site in traced.sites if not site.values_only]
    zeros: dict = {}
    if statistics:
        watch = watching(
            paths,
            attach=lambda path, value, sink: stats.observed(value, sink),
            measure=lambda path, value: stats.summary(jax.lax.stop_gradient(value)),
        )
        for site in sites:
            zeros[site.path] = stats.Cotangent(
                *(jnp.broadcast_to(x, site.lead) for x in stats.blank())
            )
    else:
        watch = watching(paths, attach=lambda path, value, sink: value + sink)
        for site in sites:
            zeros[site.path] = jnp.zeros((*site.lead, *site.shape), site.dtype)

    def evaluate(leaves, zeros):
        out, seen = run(traced.jaxpr, [*leaves, *traced.leaves[traced.num_params :]], watch, zeros)
        return out[0], (out, seen)

    gradient = jax.value_and_grad(evaluate, argnums=(0, 1), has_aux=True)
    (loss, (out, seen)), (grads, cotangents) = gradient(traced.leaves[: traced.num_params], zeros)
    out = jax.tree.unflatten(traced.out_tree, out)
    return Probe(
        loss=loss,
        values={site.name: seen[site.path] for site in traced.sites},
        cotangents={site.name: cotangents[site.path] for site in sites},
        grads=jax.tree.unflatten(jax.tree.structure(traced.params), grads),
        aux=out[1] if has_aux else None,
        skipped=Reasons(traced.skipped),
    )


# Text output

# Names in the table: the first and the last ones of a long list.
_HEAD, _TAIL = 9, 8


def _table(probe: Probe) -> str:
    """One line for each named value: name, shape, log10 of the rms of the value and cotangent."""
    lines = [("name", "shape", "log10 rms", "of cotangent")]
    for name, value in probe.values.items():
        cotangent = probe.cotangents.get(name)
        lines.append((name, _shape(value), _log10_rms(value), _log10_rms(cotangent)))
    hidden = len(lines) - 1 - _HEAD - _TAIL
    if hidden > 1:
        lines = lines[: 1 + _HEAD] + lines[-_TAIL:]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [f"Probe: loss {_loss(probe.loss)}, named values: {len(probe.values)}"]
    for name, shape, value, cotangent in lines:
        left = f"{name:<{widths[0]}}  {shape:<{widths[1]}}"
        text.append(f"{left}  {value:>{widths[2]}}  {cotangent:>{widths[3]}}".rstrip())
    if hidden > 1:
        text.insert(2 + _HEAD, f"... and {hidden} more")
    if probe.skipped:
        text.append(f"without a value: {len(probe.skipped)}, for the reasons in .skipped")
    return "\n".join(text)


def _shape(x: Any) -> str:
    """The shape; of statistics in place of a value that of their rows."""
    return str(tuple(getattr(getattr(x, "log_rms", x), "shape", ())))


def _loss(x: Any) -> str:
    if _is_readable(x) and np.ndim(x) == 0:
        return f"{float(x):.6g}"
    return _kind(x)


def _is_readable(x: Any) -> bool:
    """Whether the host can read an array: it is not traced, deleted or on other machines."""
    if isinstance(x, Tracer) or not _is_array(x):
        return False
    return not isinstance(x, jax.Array) or (x.is_fully_addressable and not x.is_deleted())


def _log10_rms(x: Any) -> str:
    """log10 of the rms of an array or of the value that statistics are of; "" if unknown."""
    if hasattr(x, "log_rms"):
        if not _is_readable(x.log_rms):
            return ""
        # A scan has a row for each iteration; the rows' mean squares are averaged.
        logs = np.asarray(x.log_rms, np.float64) / math.log(10)
        top = np.max(logs, initial=-np.inf)
        rows = 10.0 ** (logs - top) if np.isfinite(top) else None
    else:
        if not _is_readable(x) or not np.size(x):
            return ""
        entries = np.abs(np.asarray(x)).astype(np.float64)
        largest = np.max(entries)
        with np.errstate(divide="ignore"):
            top = np.log10(largest)
        rows = entries / largest if np.isfinite(top) else None
    if rows is None:
        return f"{top:.2f}"
    return f"{top + 0.5 * np.log10(np.mean(np.square(rows))):.2f}"
