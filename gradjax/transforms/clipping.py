"""Clipping rules without memory: one threshold each, correct over the whole range of the floats.

Where Optax has the rule, its name, arguments and (wherever Optax's result is right) updates are the
same. The differences: norms are carried as (mantissa, exponent), so a finite gradient is clipped to
its bound from 1.4e-45 to 3.4e38 in every dtype, where Optax returns zeros above 1.8e19 and a norm
of 0 below 1e-23; the layers of a scan-stacked leaf are clipped one by one with `stacked=`; and
every rule records what it did.

A group (the tree, a leaf, a layer, a unit) that holds inf or NaN has no norm to be clipped by: it
is passed on unchanged, its telemetry `log2_norm` is inf or NaN, and the other groups are not
affected. `gradjax.transforms.guards` decides what to do with such a step. Zeros stay zeros; below
the threshold every rule is the identity, bit for bit.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from gradjax.core import scale
from gradjax.core.scale import Norm
from gradjax.transforms.eager import compiled
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
    """`x` scaled from norm `size` to `limit` where `size` is larger and finite, and where it was.

    Args:
      x: the entries.
      size: norms of the groups of `x`, broadcast against it.
      limit: their upper bounds.
    """
    over = scale.greater(size, limit) & jnp.isfinite(size.mantissa)
    scaled = scale.multiply(x, scale.divide(limit, size), shrinks=True)
    return jnp.where(over, scaled, x), over


@compiled
def clip(max_delta: Number) -> optax.GradientTransformationExtraArgs:
    """Every entry into [-max_delta, max_delta], as `optax.clip`; complex entries by magnitude.

    NaN stays NaN, inf becomes max_delta. Telemetry: log2_norm of the tree, clipped = fraction of
    the entries.

    Args:
      max_delta: non-negative, may be traced.
    """
    check_number("clip: max_delta", max_delta)

    def clip_leaf(x):
        if jnp.iscomplexobj(x):
            return limit_to(x, scale.array_norm(x, ()), scale.of_number(max_delta))
        bound = jnp.asarray(max_delta, x.dtype)
        over = jnp.abs(x) > bound
        # A selection does not flush subnormal numbers to zero, as jnp.clip does.
        return jnp.where(over, jnp.copysign(bound, x), x), over

    def update(updates, memory, params):
        log2_norm = scale.log2(scale.norm(updates))
        leaves, structure = jax.tree.flatten(updates)
        done = [clip_leaf(x) for x in leaves]
        entries = max(sum(x.size for x in leaves), 1)
        clipped = jnp.zeros((), jnp.float32)
        for _, over in done:
            clipped += jnp.sum(over, dtype=jnp.float32)
        out = jax.tree.unflatten(structure, [x for x, _ in done])
        return Outcome(out, log2_norm, clipped / entries)

    return rule("clip", update, clips=True)


@compiled
def clip_by_global_norm(max_norm: Number) -> optax.GradientTransformationExtraArgs:
    """g -> g min(1, max_norm / ||g||), ||g|| over the whole tree, as `optax.clip_by_global_norm`.

    Args:
      max_norm: non-negative, may be traced (0 sends everything to zero).

    References:
      Pascanu, Mikolov, Bengio 2013, On the difficulty of training recurrent neural networks, arXiv
      1211.5063, algorithm 1.
    """
    check_number("clip_by_global_norm: max_norm", max_norm)

    def update(updates, memory, params):
        size = scale.norm(updates)
        limit = scale.of_number(max_norm, size.mantissa.dtype)
        clipped = scale.greater(size, limit) & jnp.isfinite(size.mantissa)
        out = jax.tree.map(lambda x: limit_to(x, size, limit)[0], updates)
        return Outcome(out, scale.log2(size), clipped.astype(jnp.float32))

    return rule("clip_by_global_norm", update, clips=True)


def by_group(
    name: str,
    axes: Callable[[Array, bool], tuple[int, ...]],
    limit: Callable[[Array, Norm], Norm],
    stacked: Stacked,
    needs_params: bool = False,
    shrink: Callable[[Array, Norm, Norm], tuple[Array, Array]] = limit_to,
) -> optax.GradientTransformationExtraArgs:
    """A rule that limits the norm of every group of entries of every leaf.

    Args:
      name: the rule's name.
      axes: (leaf, is it stacked?) -> the axes that form one group.
      limit: (leaf, norms of its groups or, with `needs_params`, of its parameters') -> the largest
        norms allowed.
      stacked: as in `stacked_leaves`.
      needs_params: whether `limit` reads the parameters' norms.
      shrink: as `limit_to`.
    """

    def update(updates, memory, params):
        if needs_params and params is None:
            raise ValueError(
                f"{name}: its threshold depends on the parameters; call "
                "update(grads, state, params)."
            )
        leaves, structure = jax.tree.flatten(updates)
        flags = jax.tree.leaves(stacked_leaves(stacked, updates))
        groups = [axes(x, flag) for x, flag in zip(leaves, flags, strict=True)]
        sizes = scale.array_norms(leaves, groups)
        measured = sizes
        if needs_params:
            measured = scale.array_norms(jax.tree.leaves(params), groups)
        done = []
        for x, flag, size, norm in zip(leaves, flags, sizes, measured, strict=True):
            out, over = shrink(x, size, limit(x, norm))
            fraction = layer_rows(over.astype(jnp.float32), flag)
            if x.size:
                fraction = jnp.mean(fraction, axis=-1)
            else:
                fraction = jnp.zeros(fraction.shape[:-1], jnp.float32)
            done.append((out, scale.log2(layer_norm(size, flag)), fraction))
        return Outcome(*columns(structure, done, 3))

    return rule(name, update, clips=True)


def layer_rows(x: Array, is_stacked: bool) -> Array:
    """(layers, rest) of a stacked leaf, else (rest,)."""
    if is_stacked and x.size:
        return x.reshape(x.shape[0], -1)
    return x.reshape((*x.shape[: int(is_stacked)], x.size))


def layer_norm(size: Norm, is_stacked: bool) -> Norm:
    """The norm of a leaf, () or (layers,), from those of its groups."""
    groups = jax.tree.map(lambda part: jnp.moveaxis(layer_rows(part, is_stacked), -1, 0), size)
    if len(groups.mantissa) == 1:
        return jax.tree.map(lambda part: part[0], groups)
    return scale.union(groups)


@compiled
def clip_by_layer_norm(
    max_norm: Number, stacked: Stacked = None
) -> optax.GradientTransformationExtraArgs:
    """Every leaf, or every layer of a stacked leaf, to a norm of at most max_norm.

    Unlike with the global rule, an exploding layer does not shrink the others' gradients.

    Args:
      max_norm: non-negative, may be traced.
      stacked: the leaves whose first axis is the layer of a scan: a prefix tree of bools or a
        predicate on the path.
    """
    check_number("clip_by_layer_norm: max_norm", max_norm)

    def limit(x, size):
        return scale.of_number(max_norm, size.mantissa.dtype)

    return by_group("clip_by_layer_norm", layer_axes, limit, stacked)


@compiled
def clip_by_block_rms(
    threshold: Number, stacked: Stacked = None
) -> optax.GradientTransformationExtraArgs:
    """Every leaf (or layer) to a root mean square of at most threshold, as Optax's rule.

    Args:
      threshold: non-negative, may be traced.
      stacked: as in `clip_by_layer_norm`.

    References:
      Shazeer, Stern 2018, Adafactor, arXiv 1804.04235, section 6.
    """
    check_number("clip_by_block_rms: threshold", threshold)

    def limit(x, size):
        dtype = size.mantissa.dtype
        entries = max(x.size // max(size.mantissa.size, 1), 1)
        root = scale.of_number(np.sqrt(entries), dtype)
        return scale.times(scale.of_number(threshold, dtype), root)

    def shrink(x, size, bound):
        out, over = limit_to(x, size, bound)
        if jnp.iscomplexobj(x) or not x.size:
            return out, over
        # Optax's formula where nothing in it leaves the range of the floats: the same roundings.
        wide = scale.widen(x)
        axes = tuple(a for a in range(x.ndim) if size.mantissa.shape[a : a + 1] == (1,))
        total = jnp.sum(jnp.square(wide), axis=axes, keepdims=True)
        is_plain = (total >= 2.0**-90) & (total < 2.0**120)
        mean = jnp.where(is_plain, total, 1) / (x.size // total.size)
        divisor = jnp.sqrt(mean) / jnp.asarray(threshold, wide.dtype)
        is_plain = over & is_plain & (divisor < 2.0**100)
        # By one divisor for all XLA would multiply with its reciprocal, which is rounded.
        divisor = divisor + 0 * wide
        return jnp.where(is_plain, (wide / divisor).astype(x.dtype), out), over

    return by_group("clip_by_block_rms", layer_axes, limit, stacked, shrink=shrink)


def unit_axes(
    x: Array, is_stacked: bool, axis: int | Sequence[int] | None = None
) -> tuple[int, ...]:
    """The axes over which the norm of one output unit is taken.

    By default those of the fan-in, as in Optax: vectors and scalars are one group, (in, out) and
    (in, heads, out) kernels reduce the first axis, convolutions (..., in, out) all but the last.

    Args:
      x: a leaf.
      is_stacked: whether its first axis is the layer of a scan.
      axis: other axes, counted within one layer.

    Raises:
      ValueError: if the leaf does not have one of the axes.
    """
    first, ndim = int(is_stacked), jnp.ndim(x) - int(is_stacked)
    if axis is not None:
        axes = (axis,) if isinstance(axis, int) else tuple(axis)
        if not all(-ndim <= a < ndim for a in axes):
            raise ValueError(
                f"adaptive_grad_clip: axis is {axis}, which a leaf (or layer) of shape "
                f"{jnp.shape(x)[first:]} does not have; use optax.masked to leave leaves out."
            )
        return tuple(sorted({first + a % ndim for a in axes}))
    if ndim <= 1:
        return layer_axes(x, is_stacked)
    count = 1 if ndim <= 3 else ndim - 1
    return tuple(range(first, first + count))


@compiled
def adaptive_grad_clip(
    clipping: Number,
    eps: Number = 1e-3,
    axis: int | tuple[int, ...] | None = None,
    stacked: Stacked = None,
) -> optax.GradientTransformationExtraArgs:
    """Unit-wise: ||G_i|| to at most clipping * max(||W_i||, eps), as `optax.adaptive_grad_clip`.

    Brock et al. do not clip the classifier's last layer: wrap this rule in `optax.masked` with a
    mask that excludes it.

    Args:
      clipping: lambda; .01 for batches of 4096, larger for smaller (paper, table 6). May be traced.
      eps: floor of the parameter norm, 1e-3 in the paper's section 4.1. May be traced.
      axis: axes over which each unit's norm is taken, in every leaf (in each layer of a stacked
        leaf); default: those of the fan-in, see `unit_axes`.
      stacked: as in `clip_by_layer_norm`; units are then those of each layer.

    References:
      Brock, De, Smith, Simonyan 2021, High-performance large-scale image recognition without
      normalization, arXiv 2102.06171, eq. 3.
    """
    check_number("adaptive_grad_clip: clipping", clipping)
    check_number("adaptive_grad_clip: eps", eps)

    def axes(x, is_stacked):
        return unit_axes(x, is_stacked, axis)

    def limit(x, param):
        dtype = param.mantissa.dtype
        floor, param = scale.of_number(eps, dtype), scale.normal(param)
        use_floor = scale.greater(floor, param)
        floored = Norm(
            jnp.where(use_floor, floor.mantissa, param.mantissa),
            jnp.where(use_floor, floor.exponent, param.exponent),
        )
        return scale.times(scale.of_number(clipping, dtype), floored)

    return by_group("adaptive_grad_clip", axes, limit, stacked, needs_params=True)


@compiled
def normalize_by_norm(
    scale_factor: Number = 1.0, per_layer: bool = False, stacked: Stacked = None
) -> optax.GradientTransformationExtraArgs:
    """g -> scale_factor g / ||g||, ||g|| over the whole tree, or of each leaf (or layer).

    `optax.normalize_by_update_norm` without its eps, so that a gradient of 1e-30 has the norm
    scale_factor too. Zeros stay zeros, and a group that holds inf or NaN is passed on. Telemetry:
    clipped is 1 where a group was scaled.

    Args:
      scale_factor: the norm of the result, non-negative, may be traced.
      per_layer: one norm per leaf.
      stacked: with `per_layer`, as in `clip_by_layer_norm`.

    References:
      Hazan, Levy, Shalev-Shwartz 2015, Beyond convexity: stochastic quasi-convex optimization,
      arXiv 1507.02030, algorithm 1; per layer: Yu et al. 2017, Block-normalized gradient method,
      arXiv 1707.04822.
    """
    check_number("normalize_by_norm: scale_factor", scale_factor)
    if stacked is not None and not per_layer:
        raise ValueError("normalize_by_norm: stacked has a meaning with per_layer=True only.")

    def normalize(x, size):
        changes = (size.mantissa > 0) & jnp.isfinite(size.mantissa)
        factor = scale.divide(scale.of_number(scale_factor, size.mantissa.dtype), size)
        return jnp.where(changes, scale.multiply(x, factor), x), changes.astype(jnp.float32)

    def update(updates, memory, params):
        if not per_layer:
            size = scale.norm(updates)
            changes = normalize(jnp.zeros(()), size)[1]
            out = jax.tree.map(lambda x: normalize(x, size)[0], updates)
            return Outcome(out, scale.log2(size), changes)
        leaves, structure = jax.tree.flatten(updates)
        flags = jax.tree.leaves(stacked_leaves(stacked, updates))
        groups = [layer_axes(x, flag) for x, flag in zip(leaves, flags, strict=True)]
        done = []
        for x, size, flag in zip(leaves, scale.array_norms(leaves, groups), flags, strict=True):
            out, changes = normalize(x, size)
            log2_norm = scale.log2(layer_norm(size, flag))
            done.append((out, log2_norm, layer_rows(changes, flag)[..., 0]))
        return Outcome(*columns(structure, done, 3))

    return rule("normalize_by_norm", update)


@compiled
def per_example_clip(max_norm: Number) -> optax.GradientTransformationExtraArgs:
    """Mean over examples b of g_b min(1, max_norm / ||g_b||): DP-SGD without its noise.

    ||g_b|| is over the whole tree. The one rule that changes shapes: every leaf of the updates has
    a leading example axis, which is removed. An example that holds inf or NaN is passed on, and so
    makes the mean non-finite. Telemetry: log2_norm of the largest example, clipped = the fraction
    of the examples clipped.

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
        has_scalar = any(jnp.ndim(x) == 0 for x in leaves)
        if has_scalar or len({jnp.shape(x)[:1] for x in leaves}) > 1:
            shapes = ", ".join(str(jnp.shape(x)) for x in leaves)
            raise ValueError(
                f"per_example_clip: leaves of shapes {shapes}; a leading axis of one length is "
                "needed."
            )
        norms = [scale.array_norm(x.reshape(x.shape[0], -1), 1) for x in leaves if x.size]
        size = scale.combine(norms) if norms else scale.of_number(jnp.zeros(()))
        limit = scale.of_number(max_norm, size.mantissa.dtype)

        def clip_and_average(x):
            if not x.size:
                return jnp.zeros(x.shape[1:], x.dtype)
            sizes = jax.tree.map(lambda part: part.reshape((-1,) + (1,) * (x.ndim - 1)), size)
            # Half precision is widened, so that it is rounded only once, at the end.
            wide = x if jnp.iscomplexobj(x) else scale.widen(x)
            return mean(limit_to(wide, sizes, limit)[0]).astype(x.dtype)

        over = scale.greater(size, limit) & jnp.isfinite(size.mantissa)
        out = jax.tree.map(clip_and_average, updates)
        return Outcome(out, jnp.max(scale.log2(size)), jnp.mean(over.astype(jnp.float32)))

    tx = rule("per_example_clip", update, clips=True)

    def init(params):
        return tx.init(jax.tree.map(lambda x: jnp.asarray(x)[None], params))

    return optax.GradientTransformationExtraArgs(init, tx.update)
