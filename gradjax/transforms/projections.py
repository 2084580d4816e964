"""Projections of the weights after the step, and penalties: constraints on the parameters.

A projection P is a transform that comes *last* in the chain, after the learning rate, and sees the
parameters:

    u' = P(p + u) - p,   so that   p + u' = P(p + u)   to a rounding of p

A group that satisfies its constraint keeps its update bit for bit, so projecting twice is the same
as projecting once. Groups that hold inf or NaN, before or after the step, are passed on (`guards`
decides). For a part of the tree use `optax.masked`.

Penalties (Optax has those of L2, `add_decayed_weights`):

    coupled L2      g + lambda p          `add_decayed_weights(lambda)` before the optimiser
    decoupled L2    u - eta lambda p      `add_decayed_weights(lambda)` after it, before the rate
    coupled L1      g + lambda sign(p)    `add_l1(lambda)` before the optimiser
    decoupled L1    soft threshold of p + u at eta lambda: `proximal_l1(lambda, eta)`, last;
                    it makes exact zeros
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array

from gradjax.core import scale
from gradjax.core.scale import Norm
from gradjax.transforms.clipping import limit_to, unit_axes
from gradjax.transforms.eager import compiled
from gradjax.transforms.rule import (
    Outcome,
    PyTree,
    Stacked,
    check_number,
    columns,
    count_of,
    layer_axes,
    rule,
    stacked_leaves,
)

Number = float | Array
# (the point, where it was moved (broadcasts against it), memory)
Projected = tuple[Array, Array, PyTree]


def projection(
    name: str,
    project: Callable[[Array, bool, PyTree], Projected],
    stacked: Stacked = None,
    remember: Callable[[Array, bool], PyTree] = lambda p, is_stacked: (),
) -> optax.GradientTransformationExtraArgs:
    """A projection from a function of one leaf.

    Telemetry: log2_norm of p + u per leaf (per layer of a stacked one), clipped = the fraction of
    its entries moved.

    Args:
      name: the rule's name.
      project: (p + u, is it stacked?, memory) -> (projected, where, memory).
      stacked: as in `stacked_leaves`.
      remember: (leaf, is it stacked?) -> its first memory.
    """

    def project_leaf(u, p, is_stacked, memory):
        point = p + u.astype(p.dtype)
        projected, where, memory = project(point, is_stacked, memory)
        where = jnp.broadcast_to(where, p.shape)
        axes = layer_axes(p, is_stacked)
        size = scale.log2(scale.array_norm(point, axes))
        if p.size:
            fraction = jnp.mean(where.astype(jnp.float32), axis=axes)
        else:
            fraction = jnp.zeros(p.shape[: int(is_stacked)])
        step = jnp.where(where, (projected - p).astype(u.dtype), u)
        return step, size.reshape(size.shape[: int(is_stacked)]), fraction, memory

    def init(params):
        leaves, flags = jax.tree.leaves(params), jax.tree.leaves(stacked_leaves(stacked, params))
        return tuple(remember(p, flag) for p, flag in zip(leaves, flags, strict=True))

    def update(updates, memory, params):
        if params is None:
            raise ValueError(
                f"{name}: it projects the parameters; call update(updates, state, params)."
            )
        steps, structure = jax.tree.flatten(updates)
        flags = jax.tree.leaves(stacked_leaves(stacked, updates))
        leaves = zip(steps, structure.flatten_up_to(params), flags, memory, strict=True)
        done = [project_leaf(*leaf) for leaf in leaves]
        return Outcome(*columns(structure, done, 3), memory=tuple(each[3] for each in done))

    return rule(name, update, init)


@compiled
def weight_clip(max_delta: Number = 0.01) -> optax.GradientTransformationExtraArgs:
    """Every weight into [-max_delta, max_delta].

    Args:
      max_delta: non-negative, may be traced; .01 in the paper's algorithm 1.

    References:
      Arjovsky, Chintala, Bottou 2017, Wasserstein GAN, arXiv 1701.07875, algorithm 1.
    """
    check_number("weight_clip: max_delta", max_delta)

    def project(point, is_stacked, memory):
        bound = jnp.asarray(max_delta, jnp.real(point).dtype)
        over = (jnp.abs(point) > bound) & jnp.isfinite(point)
        return jnp.sign(point) * bound.astype(point.dtype), over, memory

    return projection("weight_clip", project)


@compiled
def max_norm(limit: Number, stacked: Stacked = None) -> optax.GradientTransformationExtraArgs:
    """The incoming weights of every unit to a norm of at most `limit`.

        w <- w min(1, limit / ||w||)

    A unit is a column of an (in, out) kernel, a filter of a convolution (`clipping.unit_axes`).
    Vectors and scalars (biases, gains) have no incoming weights and are not changed.

    Args:
      limit: non-negative, may be traced; 3 to 4 in the paper's appendix A.2.
      stacked: the leaves whose first axis is the layer of a scan: a prefix tree of bools or a
        predicate on the path.

    References:
      Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov 2014, Dropout, JMLR 15, section 5.1;
      Srebro, Shraibman 2005, Rank, trace-norm and max-norm.
    """
    check_number("max_norm: limit", limit)

    def project(point, is_stacked, memory):
        if jnp.ndim(point) - int(is_stacked) < 2:
            return point, jnp.zeros((), bool), memory
        size = scale.array_norm(point, unit_axes(point, is_stacked))
        projected, over = limit_to(point, size, scale.of_number(limit, size.mantissa.dtype))
        return projected, over, memory

    return projection("max_norm", project, stacked)


@compiled
def spectral_norm(
    limit: Number = 1.0, num_steps: int = 1, stacked: Stacked = None, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Every kernel to a largest singular value of at most `limit`.

        W <- W min(1, limit / sigma(W))

    sigma is estimated by `num_steps` power iterations per step, starting from the last step's
    singular vector, as in the paper. The estimate is from below, so right after a large change a
    few steps (or a larger `num_steps`) are needed until the bound holds. Kernels are matrices (all
    axes but the last, last), each layer of a stacked leaf one. Vectors are not changed. The kernel
    is first scaled to a largest entry in [1/2, 1), so sigma exists from 1e-45 to 3e38.

    Args:
      limit: positive, may be traced; 1 in Miyato et al. and Gouk et al.
      num_steps: power iterations per step; 1 in Miyato et al., appendix A.
      stacked: as in `max_norm`.
      seed: of the first vectors.

    References:
      Gouk, Frank, Pfahringer, Cree 2018, Regularisation of neural networks by enforcing Lipschitz
      continuity, arXiv 1804.04368, algorithm 2 (projection after the step); Miyato, Kataoka,
      Koyama, Yoshida 2018, Spectral normalization, arXiv 1802.05957, algorithm 1; Yoshida, Miyato
      2017, arXiv 1705.10941 (as a penalty).
    """
    check_number("spectral_norm: limit", limit, open_low=True)
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(
            f"spectral_norm: num_steps is {num_steps}; an integer in [1, inf] is needed."
        )

    def remember(p, is_stacked):
        if jnp.ndim(p) - int(is_stacked) < 2:
            return ()
        shape = p.shape[: int(is_stacked)] + p.shape[-1:]
        wide = jax.eval_shape(scale.array_norm, p).mantissa.dtype
        dtype = p.dtype if jnp.iscomplexobj(p) else wide
        return jax.random.normal(jax.random.key(seed), shape, dtype)

    def largest(w, v):
        return _power_iteration(w, v, num_steps)

    def project(point, is_stacked, memory):
        if isinstance(memory, tuple) or not point.size:
            return point, jnp.zeros((), bool), memory
        sigma, memory = (jax.vmap(largest) if is_stacked else largest)(point, memory)
        if is_stacked:
            sigma = jax.tree.map(lambda x: x.reshape((-1,) + (1,) * (point.ndim - 1)), sigma)
        projected, over = limit_to(point, sigma, scale.of_number(limit, sigma.mantissa.dtype))
        return projected, over, memory

    return projection("spectral_norm", project, stacked, remember)


def _power_iteration(w: Array, v: Array, num_steps: int) -> tuple[Norm, Array]:
    """(sigma, right singular vector) of one kernel after some iterations from `v`."""
    # The entries of `unit` are at most 1, so plain norms do not overflow.
    unit, exponent = scale.normalize(w.reshape(-1, w.shape[-1]).astype(v.dtype))

    def length(x):
        return jnp.maximum(jnp.linalg.norm(x), jnp.finfo(x.dtype).tiny).astype(x.dtype)

    def iterate(_, sigma_v):
        v = sigma_v[1]
        u = jnp.matmul(unit, v, precision="highest")
        new = jnp.matmul(unit.conj().T, u / length(u), precision="highest")
        sigma = jnp.linalg.norm(new)
        # A NaN must not stay in the memory.
        fine = jnp.isfinite(sigma) & (sigma > 0)
        return sigma, jnp.where(fine, new / length(new), v)

    zero = jnp.zeros((), jnp.real(v).dtype)
    sigma, v = jax.lax.fori_loop(0, num_steps, iterate, (zero, v))
    return Norm(sigma, exponent), v


@compiled
def proximal_l1(
    strength: Number, learning_rate: Number | optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    """Decoupled L1: p <- sign(z) max(|z| - eta lambda, 0) with z = p + u, exact zeros included.

    The proximal step of eta lambda |p|, the step of ISTA where u is -eta g: last in the chain, with
    the chain's own learning rate. Complex weights shrink by their magnitude.

    Args:
      strength: lambda, non-negative, may be traced.
      learning_rate: eta, a non-negative number (may be traced) or a schedule of the step.

    References:
      Daubechies, Defrise, De Mol 2004, An iterative thresholding algorithm, arXiv math/0307152;
      Duchi, Singer 2009, Efficient online and batch learning using forward backward splitting, JMLR
      10.
    """
    check_number("proximal_l1: strength", strength)
    if not callable(learning_rate):
        check_number("proximal_l1: learning_rate", learning_rate)

    def project(point, is_stacked, count):
        eta = learning_rate(count) if callable(learning_rate) else learning_rate
        real = jnp.real(point).dtype
        threshold = jnp.asarray(strength, real) * jnp.asarray(eta, real)
        size = jnp.abs(point)
        shrunk = jnp.sign(point) * jnp.maximum(size - threshold, 0).astype(point.dtype)
        return shrunk, (threshold > 0) & (size > 0) & jnp.isfinite(point), count + 1

    return projection("proximal_l1", project, None, lambda p, is_stacked: count_of())


@compiled
def add_l1(strength: Number) -> optax.GradientTransformationExtraArgs:
    """Coupled L1: g + lambda sign(p), the subgradient of lambda ||p||_1, 0 at 0.

    It comes before the optimiser.

    Args:
      strength: lambda, non-negative, may be traced.

    References:
      Tibshirani 1996, Regression shrinkage and selection via the lasso.
    """
    check_number("add_l1: strength", strength)

    def update(updates, memory, params):
        if params is None:
            raise ValueError(
                "add_l1: it adds the sign of the parameters; call update(grads, state, params)."
            )

        def add(g, p):
            return g + jnp.asarray(strength, g.dtype) * jnp.sign(p).astype(g.dtype)

        out, log2_norm = jax.tree.map(add, updates, params), scale.log2(scale.norm(updates))
        return Outcome(out, log2_norm, jnp.zeros((), jnp.float32))

    return rule("add_l1", update)
