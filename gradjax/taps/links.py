"""A model's layers as steps between named values, and the gradients of single examples.

`links` cuts a loss function at the values that every gradient passes (`gradjax.taps.structure`) and
returns the network between two of them in the step protocol. `gradjax.core.step`,
`gradjax.spectrum` and `gradjax.matrix_free` then serve any Linen, NNX, Equinox or plain model:

    steps, h = gradjax.links(loss_fn, params, x, start="Dense_0", stop="Dense_9")
    # every singular value of d Dense_9 / d Dense_0
    gradjax.jacobian_spectrum(steps, h)
    # the largest ones, for states with many entries
    gradjax.matrix_free.top_singular_values(steps, h)

A value with a skip around it is refused: the product through it would not be the derivative. The
state is that of one example, with the others of the batch held fixed, or of the whole batch
(`example=None`), which BatchNorm couples. Cost: each link is the whole function with one value
replaced; a compiled program computes only the part that it needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gradjax.core import scale
from gradjax.taps import names
from gradjax.taps.interpret import Site, run, watching
from gradjax.taps.names import functional
from gradjax.taps.probe import Traced, trace
from gradjax.taps.structure import Layer, analyse

PyTree = Any


def _at_name(layer: Layer, sites: Sequence[Site]) -> Layer:
    """The layer, ended at the value of its name: it may end at a norm or a sum after that."""
    name = layer.name.removesuffix(f"[{layer.row}]")
    return replace(layer, site=next((site for site in sites if site.name == name), layer.site))


def _pick(
    layers: Sequence[Layer], ends: Sequence[Layer], name: str | None, default: int
) -> tuple[int, Layer]:
    """(index, layer) of the value `name`: by a layer's name or, in `ends`, its last value's."""
    known = [layer.name for layer in layers]
    if name is None:
        return default % len(layers), layers[default]
    for candidates, their_names in ((layers, known), (ends, [layer.site.name for layer in ends])):
        if name in their_names:
            index = their_names.index(name)
            return index, candidates[index]
    shown = ", ".join(known[:8])
    if len(known) > 8:
        shown += f", ... {known[-1]}"
    raise ValueError(
        f"links: not every path to the loss passes {name!r} (a skip or another branch leads around "
        "it), or there is no such value; the layer product is defined between two of: "
        f"{shown}."
    )


def links(
    loss_fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    start: str | None = None,
    stop: str | None = None,
    example: int | None = 0,
    has_aux: bool = False,
) -> tuple[list[tuple[Callable, PyTree]], Array]:
    """The network between two named values as links `[(step, theta), ...]`.

    Args:
      loss_fn, params, args, has_aux: as in `gradjax.probe`.
      start, stop: names of values on the main chain, as `gradjax.diagnose` and the error message
        list them; by default the first and the last layer.
      example: the example whose state is followed (index on the first axis of the values), or None
        for the whole batch.

    Returns:
      links: one for each layer after `start`, for `gradjax.layer_jacobians`, `jacobian_spectrum`
        and `gradjax.matrix_free`.
      h0: the value at `start`, of one example or of the batch.

    Raises:
      ValueError: in the cases of `gradjax.probe`; if some paths do not pass `start` or `stop`; if
        `stop` does not come after `start`; if there are fewer than two layers.

    >>> import jax.numpy as jnp, gradjax
    >>> def loss(ws, x):
    ...     for i, w in enumerate(ws):
    ...         x = gradjax.tap(x @ w, f"h{i}")
    ...     return x.sum()
    >>> steps, h = links(loss, [2 * jnp.eye(3)] * 4, jnp.ones((5, 3)), start="h1")
    >>> spectrum = gradjax.jacobian_spectrum(steps, h)  # of (2 I)^2
    >>> spectrum.log_singular_values.round(3).tolist()
    [1.386, 1.386, 1.386]
    """
    traced = trace(loss_fn, params, args, has_aux, "links")
    layers = analyse(traced.jaxpr, traced.sites, traced.num_params).layers
    if len(layers) < 2:
        raise ValueError(
            f"links: {len(layers)} layer was found on the way to the loss; "
            "a product needs two at least."
        )
    ends, layers = layers, [_at_name(layer, traced.sites) for layer in layers]
    first, at_start = _pick(layers, ends, start, 0)
    last, at_stop = _pick(layers, ends, stop, -1)
    if last <= first:
        raise ValueError(f"links: stop {stop!r} does not come after start {start!r}.")
    chosen = [at_start, *layers[first + 1 : last], at_stop]
    values = _values(traced, chosen)
    steps = []
    for before, after, value in zip(chosen, chosen[1:], values, strict=False):
        theta = {"operands": traced.leaves, "value": value}
        steps.append((_step(traced, before, after, example), theta))
    return steps, values[0] if example is None else values[0][example]


def _values(traced: Traced, layers: Sequence[Layer]) -> list[Array]:
    """The values at the ends of layers, as the network computes them."""
    watch = watching({layer.site.path for layer in layers}, lambda path, value, sink: value)
    seen = jax.jit(lambda leaves: run(traced.jaxpr, leaves, watch, {})[1])(traced.leaves)
    return [seen[x.site.path] if x.row is None else seen[x.site.path][x.row] for x in layers]


def _step(traced: Traced, before: Layer, after: Layer, example: int | None) -> Callable:
    """(state at `before`, theta) -> state at `after`: the whole function, one value replaced."""

    def put(path, value, sink):
        # In a scan the sinks are rows, and `chosen` is true in the iteration of `before`.
        chosen, replacement = sink
        return jnp.where(chosen, replacement.astype(value.dtype), value)

    watch = watching({before.site.path, after.site.path}, put)
    lead = before.site.lead

    def step(h, theta):
        whole = h if example is None else theta["value"].at[example].set(h)
        chosen = jnp.ones((), bool) if before.row is None else jnp.arange(lead[0]) == before.row
        sinks = {before.site.path: (chosen, jnp.broadcast_to(whole, (*lead, *whole.shape)))}
        _, seen = run(traced.jaxpr, theta["operands"], watch, sinks)
        out = seen[after.site.path]
        if after.row is not None:
            out = out[after.row]
        return out if example is None else out[example]

    return step


class PerExample(NamedTuple):
    """The parameter gradients of single examples."""

    # (examples,) natural log of ||g_i||
    log_norm: Array
    # () ||mean g||^2 / mean ||g_i - mean g||^2
    signal_to_noise: Array
    # (examples, examples) cosine of the angle between g_i and g_j
    correlation: Array


def per_example(
    loss_fn: Callable[..., Any], params: PyTree, *args: Any, has_aux: bool = False, block: int = 32
) -> PerExample:
    """Norms, signal to noise and correlation of the gradients of single examples.

    Memory: all gradients are kept, examples times parameters float32 numbers, since every pair is
    compared. `block` does not bound that; for large models pass few examples.

    Args:
      loss_fn: as in `gradjax.probe`; called with batches of one. A loss that couples examples
        (BatchNorm) has no gradient of a single one.
      params: as in `gradjax.probe`.
      args: arrays with the examples on the first axis; arguments that are not arrays, or have no
        axis, are the same for all examples.
      has_aux: whether the loss returns (loss, aux).
      block: examples whose gradients are computed at once, which bounds the memory of their
        activations only.

    Returns:
      `PerExample`; norms and angles neither overflow nor underflow.

    Raises:
      ValueError: unless all arrays of `args` have the same number of examples.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0, 0.0], [0.0, 1e30]])
    >>> found = per_example(lambda w, x: (x @ w).sum(), jnp.ones(2), x)
    >>> found.log_norm.round().tolist(), found.correlation[0, 1].item()
    ([0.0, 69.0], 0.0)
    """
    if names.is_module(params):
        loss_fn, params = functional(loss_fn, params)
    leaves, tree = jax.tree.flatten(args)
    has_rows = [hasattr(x, "dtype") and jnp.ndim(x) > 0 for x in leaves]
    counts = {x.shape[0] for x, keep in zip(leaves, has_rows, strict=True) if keep}
    if len(counts) != 1:
        raise ValueError(
            f"per_example: first axes of {sorted(counts) or 'none'}; "
            "one number of examples is needed."
        )

    def gradient(rows):
        rest = iter(rows)
        merged = [next(rest)[None] if keep else x for x, keep in zip(leaves, has_rows, strict=True)]
        one = jax.tree.unflatten(tree, merged)
        grads = jax.grad(lambda p: loss_fn(p, *one), has_aux=has_aux)(params)
        grads, exponent = scale.normalize(grads[0] if has_aux else grads)
        flat = [x.astype(jnp.float32).reshape(-1) for x in jax.tree.leaves(grads)]
        return jnp.concatenate(flat), exponent

    rows = [x for x, keep in zip(leaves, has_rows, strict=True) if keep]
    grads, exponents = jax.lax.map(gradient, rows, batch_size=min(block, counts.pop()))
    norms = jnp.linalg.norm(grads, axis=1)
    log_norm = jnp.log(norms) + exponents.astype(jnp.float32) * scale.LOG2
    unit = grads / jnp.where(norms > 0, norms, 1.0)[:, None]
    correlation = jnp.matmul(unit, unit.T, precision="highest")
    # Signal to noise is a ratio, so norms relative to the largest suffice.
    weight = jnp.exp(log_norm - jnp.max(log_norm))
    gram = correlation * weight[:, None] * weight[None, :]
    signal = jnp.mean(gram)
    noise = jnp.mean(jnp.diagonal(gram)) - signal
    return PerExample(log_norm, signal / noise, correlation)
