"""Clipping that survives the explosion it is for: rules without memory, one threshold each.

Where Optax has the rule, name, arguments and (wherever its result is right) updates are Optax's.
What differs: norms are carried as (mantissa, exponent), so a finite gradient is clipped to its
bound from 1.4e-45 to 3.4e38 in every dtype, where Optax returns zeros above 1.8e19 and a norm of 0
below 1e-23; layers of a scan-stacked leaf are clipped one by one with `stacked=`; and every rule
records what it did.

A group (the tree, a leaf, a layer, a unit) that holds inf or NaN has no norm to be clipped by: it
is passed on as it is and its telemetry `log2_norm` says inf or NaN; other groups are not touched by
it. `gradjax.transforms.guards` decides what becomes of it. Zeros stay zeros; below the threshold
every rule is the identity, bit for bit.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from gradjax.core import scale
from gradjax.core.scale import Norm
from gradjax.transforms.rule import (
    Outcome,
    Stacked,
    check_number,
    columns,
    layer_axes,
    rule,
    stacked_leaves,
)

PyTree = Any
Number = float | Array


def limit_to(x: Array, size: Norm, limit: Norm) -> tuple[Array, Array]:
    """(x scaled from norm `size` to `limit` where it is larger and finite, else x itself; where it
    was scaled).
    """
    over = scale.greater(size, limit) & jnp.isfinite(size.mantissa)
    return jnp.where(over, scale.multiply(x, scale.divide(limit, size), shrinks=True), x), over


def clip(max_delta: Number) -> optax.GradientTransformationExtraArgs:
    """Every entry into [-max_delta, max_delta], as `optax.clip`; complex entries by their
    magnitude.

    NaN stays NaN, inf becomes max_delta. Telemetry: log2_norm of the tree, clipped = share of
      entries.

    Args:
      max_delta: non-negative, may be traced.
    """
    check_number("clip: max_delta", max_delta)

    def one(x):
        if jnp.iscomplexobj(x):
            return limit_to(x, scale.array_norm(x, ()), scale.of_number(max_delta))
        bound = jnp.asarray(max_delta, x.dtype)
        over = jnp.abs(x) > bound
        return jnp.where(
            over, jnp.copysign(bound, x), x
        ), over  # a selection flushes no subnormal, jnp.clip does

    def update(updates, memory, params):
        log2_norm = scale.log2(scale.norm(updates))
        leaves, structure = jax.tree.flatten(updates)
        done = [one(x) for x in leaves]
        size = max(sum(x.size for x in leaves), 1)
        clipped = (
            sum((jnp.sum(over, dtype=jnp.float32) for _, over in done), jnp.zeros((), jnp.float32))
            / size
        )
        return Outcome(jax.tree.unflatten(structure, [x for x, _ in done]), log2_norm, clipped)

    return rule("clip", update)


def clip_by_global_norm(max_norm: Number) -> optax.GradientTransformationExtraArgs:
    """g -> g min(1, max_norm / ||g||), ||g|| over the whole tree, as `optax.clip_by_global_norm`.

    Args:
      max_norm: non-negative, may be traced (0 sends everything to zero).

    References:
      Pascanu, Mikolov, Bengio 2013, On the difficulty of training recurrent neural networks, arXiv
      1211.5063, alg. 1.
    """
    check_number("clip_by_global_norm: max_norm", max_norm)

    def update(updates, memory, params):
        size = scale.norm(updates)
        limit = scale.of_number(max_norm, size.mantissa.dtype)
        clipped = scale.greater(size, limit) & jnp.isfinite(size.mantissa)
        out = jax.tree.map(lambda x: limit_to(x, size, limit)[0], updates)
        return Outcome(out, scale.log2(size), clipped.astype(jnp.float32))

    return rule("clip_by_global_norm", update)


def by_group(
    name: str,
    axes: Callable[[Array, bool], tuple[int, ...]],
    limit: Callable[[Array, Norm], Norm],
    stacked: Stacked,
    needs_params: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """A rule that limits the norm of every group of entries of every leaf.

    Args:
      name: of the rule.
      axes: (leaf, is it stacked?) -> the axes that form one group.
      limit: (leaf, norms of its groups or, with `needs_params`, of its parameters') -> the largest
        norms allowed.
      stacked: as in `stacked_leaves`.
      needs_params: whether `limit` reads the parameters' norms.
    """

    def update(updates, memory, params):
        if needs_params and params is None:
            raise ValueError(
                f"{name}: its threshold depends on the parameters; call update(grads, state, params)."
            )
        leaves, structure = jax.tree.flatten(updates)
        flags = jax.tree.leaves(stacked_leaves(stacked, updates))
        groups = [axes(x, flag) for x, flag in zip(leaves, flags, strict=True)]
        sizes = scale.array_norms(leaves, groups)
        of_params = scale.array_norms(jax.tree.leaves(params), groups) if needs_params else sizes
        done = []
        for x, flag, size, param in zip(leaves, flags, sizes, of_params, strict=True):
            out, over = limit_to(x, size, limit(x, param))
            fraction = layer_rows(over.astype(jnp.float32), flag)
            fraction = (
                jnp.mean(fraction, axis=-1)
                if x.size
                else jnp.zeros(fraction.shape[:-1], jnp.float32)
            )
            done.append((out, scale.log2(layer_norm(size, flag)), fraction))
        return Outcome(*columns(structure, done, 3))

    return rule(name, update)


def layer_rows(x: Array, is_stacked: bool) -> Array:
    """(layers, rest) of a stacked leaf, else (rest,)."""
    return (
        x.reshape(x.shape[0], -1)
        if is_stacked and x.size
        else x.reshape((*x.shape[: int(is_stacked)], x.size))
    )


def layer_norm(size: Norm, is_stacked: bool) -> Norm:
    """The norm of a leaf, () or (layers,), from those of its groups."""
    first = jax.tree.map(lambda part: jnp.moveaxis(layer_rows(part, is_stacked), -1, 0), size)
    return (
        jax.tree.map(lambda part: part[0], first)
        if len(first.mantissa) == 1
        else scale.union(first)
    )


def clip_by_layer_norm(
    max_norm: Number, stacked: Stacked = None
) -> optax.GradientTransformationExtraArgs:
    """Every leaf, or every layer of a stacked leaf, to a norm of at most max_norm.

    One exploding layer leaves the others as they are, which the global rule does not.

    Args:
      max_norm: non-negative, may be traced.
      stacked: the leaves whose first axis is the layer of a scan: a prefix tree of bools or a
        predicate on the path.
    """
    check_number("clip_by_layer_norm: max_norm", max_norm)
    limit = lambda x, size: scale.of_number(max_norm, size.mantissa.dtype)
    return by_group("clip_by_layer_norm", layer_axes, limit, stacked)


def clip_by_block_rms(
    threshold: Number, stacked: Stacked = None
) -> optax.GradientTransformationExtraArgs:
    """Every leaf (or layer of a stacked leaf) to a root mean square of at most threshold, as
    `optax.clip_by_block_rms`.

    Args:
      threshold: non-negative, may be traced.
      stacked: as in `clip_by_layer_norm`.

    References:
      Shazeer, Stern 2018, Adafactor, arXiv 1804.04235, section 6.
    """
    check_number("clip_by_block_rms: threshold", threshold)

    def limit(x, size):
        count = max(x.size // max(size.mantissa.size, 1), 1)
        root = np.sqrt(count)
        high = jnp.asarray(root, size.mantissa.dtype)
        low = jnp.asarray(root - np.asarray(root, size.mantissa.dtype), high.dtype)
        rms = scale.of_number(threshold, high.dtype)
        return scale.product(rms, Norm(high, jnp.zeros((), jnp.int32), low))

    return by_group("clip_by_block_rms", layer_axes, limit, stacked)


def unit_axes(x: Array, is_stacked: bool) -> tuple[int, ...]:
    """The fan-in axes of one output unit: none of a vector's entries is a unit, a kernel's last
    axis is.

    As Optax: vectors and scalars are one group; (in, out) and (in, heads, out) reduce the first axis, convolutions
    (height, width, in, out) all but the last.
    """
    first, ndim = int(is_stacked), jnp.ndim(x) - int(is_stacked)
    if ndim <= 1:
        return layer_axes(x, is_stacked)
    count = 1 if ndim <= 3 else ndim - 1
    return tuple(range(first, first + count))


def adaptive_grad_clip(
    clipping: Number, eps: Number = 1e-3, stacked: Stacked = None
) -> optax.GradientTransformationExtraArgs:
    """Unit-wise: ||G_i|| to at most clipping * max(||W_i||, eps), as `optax.adaptive_grad_clip`.

    Brock et al. leave the classifier's last layer alone: wrap this rule in `optax.masked` with a
    mask that excludes it.

    Args:
      clipping: lambda; .01 for batches of 4096, larger for smaller (paper, table 6). May be traced.
      eps: floor of the parameter norm, 1e-3 in the paper's section 4.1. May be traced.
      stacked: as in `clip_by_layer_norm`; units are then those of each layer.

    References:
      Brock, De, Smith, Simonyan 2021, High-performance large-scale image recognition without normalization,
      arXiv 2102.06171, eq. 3.
    """
    check_number("adaptive_grad_clip: clipping", clipping)
    check_number("adaptive_grad_clip: eps", eps)

    def limit(x, of_param):
        dtype = of_param.mantissa.dtype
        floor = scale.of_number(eps, dtype)._replace(low=jnp.zeros((), dtype))
        use_floor = scale.greater(floor, of_param)
        floored = jax.tree.map(
            lambda a, b: jnp.where(use_floor, a, b.astype(a.dtype)), floor, of_param
        )
        return scale.product(scale.of_number(clipping, dtype), floored)

    return by_group("adaptive_grad_clip", unit_axes, limit, stacked, needs_params=True)


def normalize_by_norm(
    scale_factor: Number = 1.0, per_layer: bool = False, stacked: Stacked = None
) -> optax.GradientTransformationExtraArgs:
    """g -> scale_factor g / ||g||, ||g|| over the whole tree, or of every leaf (or layer of a
    stacked leaf) by itself.

    `optax.normalize_by_update_norm` without its eps, so that a gradient of 1e-30 has the norm scale_factor too. Zeros
    stay zeros, what holds inf or NaN is passed on. Telemetry: clipped is 1 where a group was scaled.

    Args:
      scale_factor: the norm of the result, non-negative, may be traced.
      per_layer: one norm per leaf.
      stacked: with `per_layer`, as in `clip_by_layer_norm`.

    References:
      Hazan, Levy, Shalev-Shwartz 2015, Beyond convexity: stochastic quasi-convex optimization, arXiv 1507.02030,
      algorithm 1; per layer: Yu et al. 2017, Block-normalized gradient method, arXiv 1707.04822.
    """
    check_number("normalize_by_norm: scale_factor", scale_factor)
    if stacked is not None and not per_layer:
        raise ValueError("normalize_by_norm: stacked has a meaning with per_layer=True only.")

    def one(x, size):
        changes = (size.mantissa > 0) & jnp.isfinite(size.mantissa)
        factor = scale.divide(scale.of_number(scale_factor, size.mantissa.dtype), size)
        return jnp.where(changes, scale.multiply(x, factor), x), changes.astype(jnp.float32)

    def update(updates, memory, params):
        if not per_layer:
            size = scale.norm(updates)
            changes = one(jnp.zeros(()), size)[1]
            return Outcome(
                jax.tree.map(lambda x: one(x, size)[0], updates), scale.log2(size), changes
            )
        leaves, structure = jax.tree.flatten(updates)
        flags = jax.tree.leaves(stacked_leaves(stacked, updates))
        sizes = scale.array_norms(
            leaves, [layer_axes(x, flag) for x, flag in zip(leaves, flags, strict=True)]
        )
        done = []
        for x, size, flag in zip(leaves, sizes, flags, strict=True):
            out, changes = one(x, size)
            done.append(
                (out, scale.log2(layer_norm(size, flag)), layer_rows(changes, flag)[..., 0])
            )
        return Outcome(*columns(structure, done, 3))

    return rule("normalize_by_norm", update)


def prune_gradients(
    sparsity: PyTree, largest: bool = False, stacked: Stacked = None
) -> optax.GradientTransformationExtraArgs:
    """The `sparsity` share of the smallest (or largest) entries of every leaf to zero, the others
    as they are.

    round(sparsity * size) entries of a leaf (or of each layer of a stacked leaf) become zero; of equal magnitudes the
    first go first. Complex entries count by magnitude, inf and NaN as the largest. O(n log n). Telemetry: log2_norm of
    each leaf before, clipped = the share of entries set to zero.

    Args:
      sparsity: in [0, 1], may be traced; one number, or a prefix tree of them for a sparsity per
        leaf.
      largest: prune the largest entries, a trimmed gradient, instead of the smallest.
      stacked: as in `clip_by_layer_norm`.

    References:
      Aji, Heafield 2017, Sparse communication for distributed gradient descent, arXiv 1704.05021 (the smallest,
      without their residual).
    """
    jax.tree.map(
        lambda fraction: check_number("prune_gradients: sparsity", fraction, 0.0, 1.0), sparsity
    )

    def one(x, fraction, is_stacked, size):
        shape = x.shape[:1] if is_stacked else ()
        if not x.size:
            return x, jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.float32)
        rows, whole = layer_rows(x, is_stacked), scale.log2(layer_norm(size, is_stacked))
        size = jax.tree.map(lambda part: part.reshape(rows.shape), size)
        nan = jnp.isnan(size.mantissa)
        mantissa, exponent, _ = scale.normal(
            size._replace(mantissa=jnp.where(nan, jnp.inf, size.mantissa))
        )
        exponent = jnp.where(size.mantissa == 0, jnp.iinfo(jnp.int32).min, exponent)
        exponent = jnp.where(
            jnp.isfinite(size.mantissa), exponent, jnp.iinfo(jnp.int32).max - nan.astype(jnp.int32)
        )
        place = jnp.broadcast_to(jnp.arange(rows.shape[-1]), rows.shape)
        order = jax.lax.sort((exponent, mantissa, place), num_keys=3)[2]
        rank = jnp.argsort(order, axis=-1)
        number = jnp.round(jnp.asarray(fraction, jnp.float32) * rows.shape[-1]).astype(jnp.int32)
        dropped = rank >= rows.shape[-1] - number if largest else rank < number
        out = jnp.where(dropped, jnp.zeros((), x.dtype), rows).reshape(x.shape)
        return out, whole, jnp.mean(dropped.astype(jnp.float32), axis=-1)

    def update(updates, memory, params):
        leaves, structure = jax.tree.flatten(updates)
        flags = jax.tree.leaves(stacked_leaves(stacked, updates))
        try:
            spread = jax.tree.map(
                lambda fraction, branch: jax.tree.map(lambda _: fraction, branch), sparsity, updates
            )
        except ValueError as error:
            raise ValueError(
                f"prune_gradients: sparsity {jax.tree.structure(sparsity)} is no prefix of the updates' {structure}; "
                "pass one number or a prefix tree of numbers."
            ) from error
        sizes = scale.array_norms(leaves, [()] * len(leaves))
        done = [
            one(*each) for each in zip(leaves, jax.tree.leaves(spread), flags, sizes, strict=True)
        ]
        return Outcome(*columns(structure, done, 3))

    return rule("prune_gradients", update)


def per_example_clip(max_norm: Number) -> optax.GradientTransformationExtraArgs:
    """mean over examples b of g_b min(1, max_norm / ||g_b||), ||g_b|| over the whole tree: DP-SGD
    without its noise.

    The one rule that changes shapes: every leaf of the updates has a leading example axis, which is removed. An
    example that holds inf or NaN is passed on, and so shows in the mean. Telemetry: log2_norm of the largest example,
    clipped = the share of examples clipped.

    Args:
      max_norm: non-negative, may be traced.

    References:
      Abadi et al. 2016, Deep learning with differential privacy, arXiv 1607.00133, algorithm 1.
    """
    check_number("per_example_clip: max_norm", max_norm)

    def mean(x):
        if jnp.iscomplexobj(x):
            return jax.lax.complex(mean(x.real), mean(x.imag))
        largest = scale.array_norm(x, 0)
        unit = scale.multiply(x, Norm(jnp.ones_like(largest.mantissa), -largest.exponent))
        total = jnp.mean(unit.astype(largest.mantissa.dtype), axis=0)
        return scale.assemble(total, largest.exponent[0])

    def update(updates, memory, params):
        leaves = jax.tree.leaves(updates)
        if len({jnp.shape(x)[:1] for x in leaves} | {()}) > 2 or any(
            jnp.ndim(x) == 0 for x in leaves
        ):
            shapes = ", ".join(str(jnp.shape(x)) for x in leaves)
            raise ValueError(
                f"per_example_clip: leaves of shapes {shapes}; a leading axis of one length is needed."
            )
        norms = [scale.array_norm(x.reshape(x.shape[0], -1), 1) for x in leaves if x.size]
        size = scale.combine(norms) if norms else scale.of_number(jnp.zeros(()))
        limit = scale.of_number(max_norm, size.mantissa.dtype)

        def one(x):
            per_leaf = jax.tree.map(lambda part: part.reshape((-1,) + (1,) * (x.ndim - 1)), size)
            wide = (
                x if jnp.iscomplexobj(x) else scale.widen(x)
            )  # half precision is rounded once, at the end
            return (
                mean(limit_to(wide, per_leaf, limit)[0]).astype(x.dtype)
                if x.size
                else jnp.zeros(x.shape[1:], x.dtype)
            )

        over = scale.greater(size, limit) & jnp.isfinite(size.mantissa)
        return Outcome(
            jax.tree.map(one, updates),
            jnp.max(scale.log2(size)),
            jnp.mean(over.astype(jnp.float32)),
        )

    tx = rule("per_example_clip", update)
    of_one = lambda params: jax.tree.map(lambda x: jnp.asarray(x)[None], params)
    return optax.GradientTransformationExtraArgs(lambda params: tx.init(of_one(params)), tx.update)
