"""The step protocol: a deep network and a recurrent network are the same object, a step, scanned.

    h_{l+1} = step(h_l, theta_l),   l = 0 .. depth-1

`step(h, theta) -> h` is a pure function; `h` is a pytree of floating arrays (one example; a step
that couples examples, such as one with BatchNorm, takes the whole batch as its `h`); `thetas` is a
pytree whose leaves have a leading axis of length `depth` (layers of a network, or the inputs of a
recurrence over time) and may be typed PRNG keys from which the step draws its weights. Layers of
unequal shape are a list of links `[(step, theta), ...]`, given in place of `step`, with `thetas`
left out; a link may itself be a stack, `Scan(step, thetas)`, so that `[(embed, theta), Scan(block,
thetas), (readout, theta)]` is a whole network. A batch is a `jax.vmap` outside.

Every function here composes with jit, vmap and grad. Compile time does not depend on depth for the
scanned form. Cost: `layer_jacobians` O(depth * width^2) memory and O(depth * width * cost of one
vjp); `signals` one forward and one backward pass, O(depth * width) memory.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from gradjax.core import scale

PyTree = Any
Step = Callable[[PyTree, PyTree], PyTree]


class Scan(NamedTuple):
    """A link that is a stack of equal layers: `step` scanned over `thetas`, leaves (depth, ...)."""

    step: Step
    thetas: PyTree


Links = Sequence[tuple[Step, PyTree] | Scan]


def is_links(step: Step | Links) -> bool:
    """Whether `step` is a list of links rather than one step to be scanned."""
    return isinstance(step, list | tuple) and not isinstance(step, Scan)


def _describe(tree: PyTree) -> str:
    """Shapes and dtypes of a pytree in one line: `(64,) float32`, or the tree of them."""
    leaves = jax.tree.map(lambda x: f"{tuple(x.shape)} {x.dtype}", tree)
    return leaves if isinstance(leaves, str) else str(leaves).replace("'", "")


def _shapes(tree: PyTree) -> PyTree:
    """ShapeDtypeStructs of a pytree of arrays, numbers or ShapeDtypeStructs."""
    return jax.eval_shape(lambda x: x, tree)


def _check_state(h: PyTree) -> None:
    leaves = jax.tree.leaves(h)
    if not leaves or any(not jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in leaves):
        kinds = _describe(_shapes(h))
        raise ValueError(
            f"step: the state h0 is {kinds or 'empty'}; a Jacobian needs floating arrays. "
            "Cast h0 to float32, and keep integers (tokens, counters) in theta."
        )


def _check_links(links: Links, h0: PyTree, thetas: PyTree | None) -> int:
    if thetas is not None:
        raise ValueError("step: a list of links carries its own thetas; leave `thetas` out.")
    if not links:
        raise ValueError("step: the list of links is empty; at least one (step, theta) is needed.")
    depth, h = 0, _shapes(h0)
    for index, link in enumerate(links):
        if not (isinstance(link, list | tuple) and len(link) == 2 and callable(link[0])):
            raise ValueError(
                f"step: link {index} is {type(link).__name__}; each is (step, theta) or a Scan."
            )
        if isinstance(link, Scan):
            depth += check_step(link.step, h, link.thetas)
            continue
        try:
            depth, h = depth + 1, jax.eval_shape(link[0], h, link[1])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"step: link {index} does not accept the state {_describe(h)}: {error}"
            ) from error
        _check_state(h)
    return depth


def check_step(step: Step | Links, h0: PyTree, thetas: PyTree | None = None) -> int:
    """Check a step against its state and parameters without running it, and return the depth.

    Args:
      step: `step(h, theta) -> h`, or a list of links `[(step, theta), ...]`.
      h0: pytree of floating arrays, the state before the first layer.
      thetas: pytree, every leaf with a leading axis of length depth; None for a list of links.

    Returns:
      depth: the number of layers.

    Raises:
      ValueError: empty or ragged `thetas`, an integer state, a step that changes the state's shape
        or dtype, links that do not fit together; the message holds the shapes.
    """
    _check_state(h0)
    if is_links(step):
        return _check_links(step, h0, thetas)  # type: ignore[arg-type]
    if not callable(step):
        raise ValueError(
            f"step: got {type(step).__name__}; "
            "a callable step(h, theta) -> h or a list of links is needed."
        )
    lengths = {x.shape[0] if jnp.ndim(x) else None for x in jax.tree.leaves(thetas)}
    if len(lengths) != 1 or None in lengths or 0 in lengths:
        found = sorted(map(str, lengths)) or ["no leaves"]
        raise ValueError(
            f"step: the leaves of thetas have leading lengths {', '.join(found)}; "
            "one common length, the depth, of at least 1 is needed on every leaf. "
            "For layers of unequal shape pass a list of (step, theta) links."
        )
    before = _shapes(h0)
    after = jax.eval_shape(lambda h, t: step(h, jax.tree.map(lambda x: x[0], t)), before, thetas)
    same_structure = jax.tree.structure(before) == jax.tree.structure(after)
    if not same_structure or _describe(before) != _describe(after):
        raise ValueError(
            f"step: one step maps {_describe(before)} to {_describe(after)}; a scanned product "
            "needs an equal structure, shape and dtype. For layers of unequal width pass a list of "
            "(step, theta) links."
        )
    return lengths.pop()  # type: ignore[return-value]


def _as_links(step: Step | Links, thetas: PyTree | None) -> Links:
    return step if is_links(step) else [Scan(step, thetas)]  # type: ignore[return-value, arg-type]


def _forward(links: Links, h: PyTree) -> tuple[list[PyTree], PyTree]:
    """The inputs of every layer, and the output.

    The inputs are one stacked pytree per link, of leading axis 1 for a plain link.
    """
    inputs = []
    for link in links:
        if isinstance(link, Scan):
            h, before = lax.scan(
                lambda h, theta, step=link.step: (step(h, theta), h), h, link.thetas
            )
        else:
            before, h = jax.tree.map(lambda x: jnp.asarray(x)[None], h), link[0](h, link[1])
        inputs.append(before)
    return inputs, h


def layer_jacobian(step: Step, h: PyTree, theta: PyTree) -> tuple[Array, PyTree]:
    """Jacobian of one step at `h`, both states flattened by `ravel_pytree`, and the next state.

    By reverse mode, as gradients are: a step with a custom_vjp gives the Jacobian that training
    would see.

    Returns:
      jacobian: (N_out, N_in), d h'_i / d h_j.
      h_next: `step(h, theta)`.
    """
    flat, unravel = ravel_pytree(h)

    def flat_step(v):
        h_next = step(unravel(v), theta)
        return ravel_pytree(h_next)[0], h_next

    return jax.jacrev(flat_step, has_aux=True)(flat)


def layer_jacobians(
    step: Step | Links, h0: PyTree, thetas: PyTree | None = None
) -> Array | list[Array]:
    """The layer Jacobians J_l = d h_{l+1} / d h_l along the trajectory from `h0`, first to last.

    Holds all of them at once; `gradjax.jacobian_spectrum` streams them instead.

    Args:
      step, h0, thetas: as in `check_step`.

    Returns:
      (depth, N, N), or for links a list of (N_{l+1}, N_l).

    >>> import jax, jax.numpy as jnp
    >>> w = jax.random.normal(jax.random.key(0), (3, 4, 4))
    >>> layer_jacobians(lambda h, w: jnp.tanh(w @ h), jnp.ones(4), w).shape
    (3, 4, 4)
    """
    check_step(step, h0, thetas)
    jacobians, h = [], h0
    for link in _as_links(step, thetas):
        one_step, theta = link
        if isinstance(link, Scan):

            def body(h, theta, step=one_step):
                jacobian, h_next = layer_jacobian(step, h, theta)
                return h_next, jacobian

            h, stack = lax.scan(body, h, theta)
            jacobians.extend(stack if is_links(step) else [stack])
        else:
            jacobian, h = layer_jacobian(one_step, h, theta)
            jacobians.append(jacobian)
    return jacobians if is_links(step) else jacobians[0]


def nested_scan(step: Callable, h: PyTree, thetas: PyTree, length: int) -> tuple[PyTree, PyTree]:
    """`lax.scan` whose gradient holds O(sqrt(length)) states, at one or two more forward passes.

    The layers are cut into about sqrt(length) blocks; only the states between blocks are kept, and
    those between the layers of the block that is being differentiated. Layers left over by the
    division form a last block of their own.

    Args:
      step: (h, theta) -> (h, output).
      h: first state.
      thetas: leading axis `length` on every leaf.
      length: number of steps, static.

    References:
      Chen, Xu, Zhang, Guestrin 2016, Training deep nets with sublinear memory cost, arXiv
      1604.06174, section 4.
    """
    size = max(1, math.isqrt(length))
    whole = length // size * size
    inner = jax.checkpoint(lambda h, block: lax.scan(step, h, block))

    def cut(x):
        return x[:whole].reshape(whole // size, size, *x.shape[1:])

    h, outputs = lax.scan(inner, h, jax.tree.map(cut, thetas))
    outputs = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), outputs)
    if whole < length:
        h, rest = inner(h, jax.tree.map(lambda x: x[whole:], thetas))
        outputs = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), outputs, rest)
    return h, outputs


class Signals(NamedTuple):
    """Activations, cotangents and parameter gradients per layer, as natural logarithms.

    Index l of the activations and cotangents is the state h_l, 0 being the input of the first layer
    and depth the last state; index l of the gradients is the parameters theta_l of the layer that
    maps h_l to h_{l+1}.

    Attributes:
      log_activation_rms: (depth + 1,) log sqrt(mean h_l^2).
      log_cotangent_rms: (depth + 1,) log sqrt(mean (d loss / d h_l)^2), overflow- and
        underflow-safe.
      log_gradient_norm: (depth,) log ||d loss / d theta_l||; -inf where theta_l has no floating
        leaf.
      loss: ().
    """

    log_activation_rms: Array
    log_cotangent_rms: Array
    log_gradient_norm: Array
    loss: Array


def _pull_back(step: Step, h: PyTree, theta: PyTree, cotangent: PyTree, exponent: Array):
    """One layer of the backward pass, for the cotangent `cotangent * 2^exponent`.

    Returns:
      the cotangent of h with its largest entry in [1/2, 1); its exponent; log norm of the gradient.
    """
    leaves, structure = jax.tree.flatten(theta)
    floating = [jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in leaves]

    def of_floats(h, floats):
        rest = iter(floats)
        kinds = zip(leaves, floating, strict=True)
        merged = [next(rest) if is_float else x for x, is_float in kinds]
        return step(h, jax.tree.unflatten(structure, merged))

    floats = [x for x, is_float in zip(leaves, floating, strict=True) if is_float]
    _, vjp = jax.vjp(of_floats, h, floats)
    into_h, gradient = vjp(cotangent)
    log_gradient = scale.log_norm(gradient)
    log_gradient = log_gradient + exponent.astype(log_gradient.dtype) * scale.LOG2
    into_h, shift = scale.normalize(into_h)
    return into_h, exponent + shift, log_gradient


def _scaled_log_rms(cotangent: PyTree, exponent: Array) -> Array:
    value = scale.log_rms(cotangent)
    return value + exponent.astype(value.dtype) * scale.LOG2


def signals(
    step: Step | Links, h0: PyTree, thetas: PyTree | None = None, *, loss: Callable[[PyTree], Array]
) -> Signals:
    """Activations, cotangents and gradients per layer, right where float32 gradients are inf or 0.

    The backward pass carries the cotangent as (mantissa, 2^exponent) and rescales it exactly after
    every layer: at gain 0.5 a plain float32 gradient is zero beyond 140 layers, here depth 10,000
    works. The forward pass is the network's own: where the activations themselves overflow, the
    later ones are inf or NaN and are returned as such.

    Args:
      step, h0, thetas: as in `check_step`. With a batched `h0` (and a step that takes one) the
        statistics are over the batch and the gradients those of the batch's loss; for one example
        at a time use `jax.vmap`.
      loss: last state -> () loss.

    Returns:
      `Signals`.

    Raises:
      ValueError: as `check_step`; a loss that is not a scalar.

    >>> import jax, jax.numpy as jnp
    >>> w = 0.5 * jnp.broadcast_to(jnp.eye(4), (1000, 4, 4))  # the gradient is 2^-1000
    >>> s = signals(lambda h, w: w @ h, jnp.ones(4), w, loss=lambda h: h.sum())
    >>> round(float(s.log_cotangent_rms[0]), 2)  # 1000 log 0.5
    -693.15
    """
    check_step(step, h0, thetas)
    links = _as_links(step, thetas)
    inputs, output = _forward(links, h0)
    shape = jax.eval_shape(loss, output)
    if getattr(shape, "shape", None) != ():
        raise ValueError(
            f"signals: the loss returns {_describe(shape)}; a scalar of shape () is needed."
        )
    value, cotangent = jax.value_and_grad(loss)(output)
    carry = scale.normalize(cotangent)
    cotangents, gradients = [_scaled_log_rms(*carry)[None]], []

    def backward(carry, layer, step):
        into_h, exponent, log_gradient = _pull_back(step, *layer, *carry)
        return (into_h, exponent), (_scaled_log_rms(into_h, exponent), log_gradient)

    for link, before in zip(reversed(links), reversed(inputs), strict=True):
        if isinstance(link, Scan):
            body = functools.partial(backward, step=link.step)
            carry, rows = lax.scan(body, carry, (before, link.thetas), reverse=True)
        else:
            carry, rows = backward(carry, (jax.tree.map(lambda x: x[0], before), link[1]), link[0])
            rows = tuple(x[None] for x in rows)
        cotangents.append(rows[0])
        gradients.append(rows[1])
    activations = [jax.vmap(scale.log_rms)(before) for before in inputs]
    return Signals(
        log_activation_rms=jnp.concatenate([*activations, scale.log_rms(output)[None]]),
        log_cotangent_rms=jnp.concatenate(cotangents[::-1]),
        log_gradient_norm=jnp.concatenate(gradients[::-1]),
        loss=value,
    )
