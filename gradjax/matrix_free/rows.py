"""A Jacobian as maps of blocks of rows, layer by layer, rescaled by exact powers of two.

A block (b, N) costs little more than one vector where its vectors are rows: a layer's weights are
read once. The state of every layer is stored, and its residuals of up to 8 times the state's size,
O(depth * width); larger residuals (the weights, or what a key draws) are computed again from theta.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from gradjax.core import scale
from gradjax.core.step import Links, Scan, Step, check_step, is_links

PyTree = Any
Operator = Callable[[PyTree], PyTree]

# Residuals of up to this many times the size of a layer's state are stored.
STORED = 8


class Link(NamedTuple):
    """One link linearised.

    Attributes:
      maps: layer -> (v -> J_l v, u -> J_l^T u).
      layers: the stack of its layers, each an argument of `maps`; None for a single layer.
    """

    maps: Callable[[PyTree], tuple[Callable, Callable]]
    layers: PyTree


def size(tree: PyTree) -> int:
    """Numbers in a pytree."""
    return sum(jnp.size(x) for x in jax.tree.leaves(tree))


def rows_like(like: PyTree, rows: Array) -> PyTree:
    """Each row of (k, N) as a pytree like `like`."""
    flat, unravel = ravel_pytree(like)
    return jax.vmap(unravel)(rows.astype(flat.dtype))


def _pull_back(step: Step, h: PyTree, theta: PyTree) -> tuple[PyTree, Callable]:
    """(next state, u -> J^T u on flat states); the latter is a pytree of its residuals."""
    flat, unravel = ravel_pytree(h)

    def flat_step(x):
        h_next = step(unravel(x), theta)
        return ravel_pytree(h_next)[0], h_next

    _, pull, h_next = jax.vjp(flat_step, flat, has_aux=True)
    return h_next, pull


def _both_ways(pull: Callable, h_next: PyTree) -> tuple[Callable, Callable]:
    """(v -> J v, u -> J^T u) in the default float dtype, whatever the state's."""
    like, dtype = jax.eval_shape(lambda h: ravel_pytree(h)[0], h_next), jnp.result_type(float)

    def up(u):
        return pull(u.astype(like.dtype))[0].astype(dtype)

    # transposed twice, a product has the vector as its first operand: under vmap, rows
    down = jax.linear_transpose(up, jax.ShapeDtypeStruct(like.shape, dtype))
    return (lambda v: down(v)[0]), up


def linearize(
    step: Step | Links | Operator, h0: PyTree, thetas: PyTree | None
) -> tuple[list[Link], PyTree, PyTree]:
    """The Jacobian at h0 of a step, of links, or (thetas None) of a function of h only.

    Returns:
      the linearised links; the first state; the last state.
    """
    if callable(step) and thetas is None:
        function = step
        step = [(lambda h, _: function(h), None)]  # type: ignore[call-arg]
    try:
        check_step(step, h0, thetas)  # type: ignore[arg-type]
    except TypeError as error:
        # inner dimensions that do not match, from within the step
        shapes = [tuple(jnp.shape(x)) for x in jax.tree.leaves(h0)]
        raise ValueError(
            f"matrix_free: the step does not accept h0 of shapes {shapes}: {error}"
        ) from error
    if any(jnp.iscomplexobj(x) for x in jax.tree.leaves(h0)):
        raise ValueError("matrix_free: the state h0 is complex; real floating arrays are needed.")

    def small(pull, h):
        return [x.size <= STORED * size(h) for x in jax.tree.leaves(pull)]

    h, found = jax.tree.map(jnp.asarray, h0), []
    for link in step if is_links(step) else [Scan(step, thetas)]:  # type: ignore[union-attr, arg-type]
        one_step, theta = link
        if not isinstance(link, Scan):
            h, pull = _pull_back(one_step, h, theta)
            both = _both_ways(pull, h)
            found.append(Link(lambda _, both=both: both, None))
            continue

        def forward(h, theta, one_step=one_step):
            h_next, pull = _pull_back(one_step, h, theta)
            leaves = zip(jax.tree.leaves(pull), small(pull, h), strict=True)
            return h_next, (h, [x for x, keep in leaves if keep])

        def maps(layer, one_step=one_step):
            # the stored residuals replace those just computed, and the compiler drops their
            # computation
            (h, stored), theta = layer
            h_next, pull = _pull_back(one_step, h, theta)
            (leaves, structure), stored = jax.tree.flatten(pull), iter(stored)
            leaves = [
                next(stored) if keep else x for x, keep in zip(leaves, small(pull, h), strict=True)
            ]
            return _both_ways(jax.tree.unflatten(structure, leaves), h_next)

        h, kept = lax.scan(forward, h, theta)
        found.append(Link(maps, (kept, theta)))
    return found, h0, h


def times_two_to(block: Array, exponent: Array) -> Array:
    """block * 2^exponent, exact for normal numbers; exponents are clipped to +-126."""
    return block * jnp.ldexp(jnp.ones((), block.dtype), jnp.clip(exponent, -126, 126))


def apply(
    links: list[Link], block: Array, shifts: list[Array] | None = None, *, transpose: bool = False
):
    """block J^T / 2^sum(shifts), or with `transpose` block J / 2^sum(shifts), and the shifts.

    Args:
      links: of `linearize`.
      block: (b, N).
      shifts: (depth,) int32 per link, the powers of two taken out after each layer; by default
        those that bring the block's largest entry into [1/2, 1).
      transpose: whether the block comes from the last state.
    """
    used: list[Any] = [None] * len(links)
    for i in reversed(range(len(links))) if transpose else range(len(links)):

        def layer(block, row, maps=links[i].maps):
            layer, shift = row
            block = jax.vmap(maps(layer)[transpose])(block)
            if shift is None:
                shift = jnp.clip(scale.normalize(lax.stop_gradient(block))[1], -126, 126)
            return times_two_to(block, -shift), shift

        given = None if shifts is None else shifts[i]
        if links[i].layers is None:
            block, shift = layer(block, (None, None if given is None else given[0]))
            used[i] = shift[None]
        else:
            block, used[i] = lax.scan(layer, block, (links[i].layers, given), reverse=transpose)
    return block, used


def total_shift(shifts: list[Array]) -> Array:
    """The exponent of the power of two that `apply` took out."""
    return sum((jnp.sum(x, dtype=jnp.int32) for x in shifts), jnp.zeros((), jnp.int32))


def scaled(
    step: Any, h0: PyTree, thetas: PyTree | None, key: Array
) -> tuple[Callable, Array, int, int]:
    """J / 2^e with largest singular value near 1, as matfree takes it.

    The power of two per layer is fixed, that of the top direction after two power iterations, so
    the map is linear.

    Returns:
      matvec(v, transpose); e; N; N'.
    """
    links, first, last = linearize(step, h0, thetas)
    block = jax.random.normal(key, (min(4, size(first)), size(first)), jnp.result_type(float))
    for _ in range(2):
        block = apply(links, apply(links, block)[0], transpose=True)[0]
    block, shifts = apply(links, orthonormal(block))
    rest = jnp.frexp(jnp.max(jnp.linalg.norm(block, axis=1)))[1].astype(jnp.int32)
    shifts = jax.tree.map(lax.stop_gradient, [*shifts[:-1], shifts[-1].at[-1].add(rest)])

    def matvec(v, transpose=False):
        return apply(links, v[None], shifts, transpose=transpose)[0][0]

    return matvec, total_shift(shifts), size(first), size(last)


def orthonormal(rows: Array) -> Array:
    """An orthonormal basis, as rows, of a space that holds the given rows."""
    return jnp.linalg.qr(rows.T)[0].T


def relative(error: Array, value: Array) -> Array:
    """error / value for value >= 0; at value 0 it is 0 for no error and inf otherwise."""
    at_zero = jnp.where(error > 0, jnp.inf, 0.0)
    return jnp.where(value > 0, error / jnp.where(value > 0, value, 1.0), at_zero)


def flat_operator(
    name: str, operator: Operator, like: PyTree
) -> tuple[Callable[[Array], Array], int]:
    """The operator on flat vectors of the default float dtype, its shapes checked.

    Returns:
      v -> A v; the length of v.
    """
    shapes = jax.eval_shape(lambda x: x, like)
    leaves = jax.tree.leaves(shapes)
    if not leaves or any(not jnp.issubdtype(x.dtype, jnp.floating) for x in leaves):
        raise ValueError(
            f"{name}: the operator's argument is like {shapes}; real floating arrays are needed."
        )
    image = jax.eval_shape(operator, shapes)
    if jax.tree.map(jnp.shape, image) != jax.tree.map(jnp.shape, shapes):
        raise ValueError(
            f"{name}: the operator maps {shapes} to {image}; "
            "equal structures and shapes are needed."
        )
    zeros, unravel = ravel_pytree(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))

    def matvec(v):
        image = operator(unravel(v.astype(zeros.dtype)))
        return ravel_pytree(image)[0].astype(jnp.result_type(float))

    return matvec, zeros.size
