"""Top singular values of a Jacobian and top eigenvalues of an operator, by block Krylov."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from gradjax.core import scale
from gradjax.core.step import Links, Step
from gradjax.matrix_free import rows
from gradjax.matrix_free.rows import Operator, apply, size

PyTree = Any


class TopSingular(NamedTuple):
    """The largest singular values of J, descending, with their vectors and residuals.

    Attributes:
      log_singular_values: (k,) nats, to 1e-7 of itself (float32); for more digits use
        mantissa * 2^exponent.
      mantissa: (k,) with sigma_i = mantissa_i * 2^exponent.
      exponent: () int32.
      left: (k, ...) u_i, orthonormal, like the last state.
      right: (k, ...) v_i, orthonormal, like h0.
      residual: (k,) ||J^T u_i - sigma_i v_i|| / sigma_i: a singular value lies within
        residual * sigma_i.
      converged: (k,) bool: residual^2, the estimated relative error of sigma_i, is at most tol.
    """

    log_singular_values: Array
    mantissa: Array
    exponent: Array
    left: PyTree
    right: PyTree
    residual: Array
    converged: Array


class TopEigenvalues(NamedTuple):
    """The most positive eigenvalues of a symmetric operator, descending.

    `sharpness` returns one without the leading axis.

    Attributes:
      eigenvalues: (k,).
      vectors: (k, ...) orthonormal, like the operator's argument.
      residual: (k,) ||A v_i - lambda_i v_i|| / |lambda_i|: an eigenvalue lies within
        residual * |lambda_i|.
      converged: (k,) bool: residual^2, the estimated relative error, is at most tol.
    """

    eigenvalues: Array
    vectors: PyTree
    residual: Array
    converged: Array


def _krylov(
    name: str,
    image_of: Callable,
    n: int,
    k: int,
    key: Array,
    block_size: int | None,
    num_iters: int,
):
    """The Krylov space of a random block, with the k, block_size and num_iters of `name` checked.

    Where the blocks would fill the space the basis is the identity. It carries no derivative: at a
    singular vector the value's first derivative is that of the operator only.

    Returns:
      orthonormal rows (m, n); and `image_of(block)[1]` of every block, stacked.
    """
    if not 1 <= k <= n:
        raise ValueError(
            f"{name}: k is {k}; the operator has rank at most {n}, so 1 <= k <= {n} is needed."
        )
    if num_iters < 0:
        raise ValueError(f"{name}: num_iters is {num_iters}; at least 0 is needed.")
    block_size = max(k, 8) if block_size is None else block_size
    if block_size < k:
        raise ValueError(
            f"{name}: block_size is {block_size}, below k = {k}; leave it out or give at least {k}."
        )
    if block_size * (num_iters + 1) >= n:
        return jnp.eye(n), jax.tree.map(lambda x: x[None], image_of(jnp.eye(n))[1])

    def random(key):
        return jax.random.normal(key, (block_size, n), jnp.result_type(float))

    def body(state, index):
        block, basis = state
        basis = basis.at[index].set(block)
        image, kept = image_of(block)
        before = basis.reshape(-1, n)
        block = rows.orthonormal(lax.stop_gradient(image))
        # Where the space is exhausted only rounding errors are left, along the basis itself: a
        # random direction larger than they keeps the basis orthonormal, and below 1e-6 it moves no
        # Ritz value.
        size_of_fresh = 10.0 * jnp.finfo(block.dtype).eps / n**0.5
        fresh = random(jax.random.fold_in(key, index)) * size_of_fresh
        for extra in (fresh, 0.0, 0.0):
            block = rows.orthonormal(block - (block @ before.T) @ before + extra)
        return (block, basis), kept

    key, start = jax.random.split(key)
    first = rows.orthonormal(random(start))
    basis = jnp.zeros((num_iters + 1, block_size, n), first.dtype)
    (_, basis), kept = lax.scan(body, (first, basis), jnp.arange(num_iters + 1))
    return basis.reshape(-1, n), kept


def top_singular_values(
    step: Step | Links | Operator,
    h0: PyTree,
    thetas: PyTree | None = None,
    *,
    k: int,
    key: Array,
    block_size: int | None = None,
    num_iters: int = 6,
    tol: float = 1e-5,
) -> TopSingular:
    """The k largest singular values of the Jacobian at `h0`, with vectors and residuals.

        Q = orth(V, J^T J V, .., (J^T J)^q V),  V random;     J Q = U S Y^T;     v_i = Q y_i

    A block Krylov method. Composes with jit and vmap. The values have derivatives with respect to
    all that J depends on, right to first order where they are converged and simple; vectors and
    residuals have none.

    Args:
      step: `step(h, theta) -> h` to be scanned over `thetas`; a list of links; or, with `thetas`
        left out, any function `f(h) -> h'`, which is one link (and is rescaled only as a whole).
      h0: pytree of real floating arrays, N numbers.
      thetas: pytree, every leaf (depth, ...); PRNG keys from which the step draws its weights are
        made for this.
      k: number of values, at most min(N, N').
      key: draws V. Where the values are converged another key gives the same ones.
      block_size: rows of V, at least k; default max(k, 8). More rows help with clustered values.
      num_iters: q; 6 gives the top 16 of a Gaussian network of width 2048 and depth 32 to 1e-5.
      tol: the relative error that `converged` accepts.

    Returns:
      `TopSingular`. The residual bounds the distance to some singular value; its square is an
      estimate of the relative error, not a bound. Where block_size * (q + 1) >= min(N, N') the
      whole of J is used.

    Raises:
      ValueError: k, block_size or num_iters out of range; a step as in `check_step`.

    References:
      Halko, Martinsson, Tropp, Finding structure with randomness, arXiv:0909.4061, 2009, section
      4.5.
      Musco, Musco, Randomized block Krylov methods for stronger and faster approximate singular
      value decomposition, arXiv:1504.05477, 2015, algorithm 2.

    >>> import jax, jax.numpy as jnp
    >>> w = jnp.broadcast_to(2.0 * jnp.eye(4), (1000, 4, 4))  # sigma = 2^1000
    >>> top = top_singular_values(lambda h, w: w @ h, jnp.ones(4), w, k=2, key=jax.random.key(0))
    >>> [round(float(x), 2) for x in top.log_singular_values], top.converged.tolist()  # 1000 log 2
    ([693.15, 693.15], [True, True])
    """
    links, first, last = rows.linearize(step, h0, thetas)
    # the Krylov space lives on the smaller side
    wide = size(last) < size(first)

    def there_and_back(block):
        there, out = apply(links, block, transpose=wide)
        back, into = apply(links, there, transpose=not wide)
        return back, (there, back, rows.total_shift(out), rows.total_shift(into))

    n = min(size(first), size(last))
    basis, kept = _krylov("top_singular_values", there_and_back, n, k, key, block_size, num_iters)
    there, back, out, into = kept
    alive = jnp.any(there != 0, axis=(1, 2))
    exponent = jnp.where(jnp.any(alive), jnp.max(jnp.where(alive, out, -(2**30))), 0)
    there = rows.times_two_to(there, (out - exponent)[:, None, None]).reshape(basis.shape[0], -1)
    back = rows.times_two_to(back, (out + into - 2 * exponent)[:, None, None]).reshape(basis.shape)
    weights, sigma, images = jnp.linalg.svd(there, full_matrices=False)
    weights, sigma = lax.stop_gradient(weights[:, :k].T), sigma[:k]
    images = lax.stop_gradient(images[:k])
    ritz, value = weights @ basis, lax.stop_gradient(sigma)
    returned = weights @ lax.stop_gradient(back) / jnp.where(value > 0, value, 1.0)[:, None]
    residual = rows.relative(jnp.linalg.norm(returned - value[:, None] * ritz, axis=1), value)
    left, right = (ritz, images) if wide else (images, ritz)
    return TopSingular(
        log_singular_values=jnp.log(sigma) + exponent.astype(sigma.dtype) * scale.LOG2,
        mantissa=sigma,
        exponent=exponent,
        left=rows.rows_like(last, left),
        right=rows.rows_like(first, right),
        residual=residual,
        converged=residual**2 <= tol,
    )


def top_eigenvalues(
    operator: Operator,
    like: PyTree,
    *,
    k: int = 1,
    key: Array,
    block_size: int | None = None,
    num_iters: int = 10,
    tol: float = 1e-5,
) -> TopEigenvalues:
    """The k most positive eigenvalues of a symmetric operator, with vectors and residuals.

        Q = orth(V, A V, .., A^q V),  V random;     Q^T A Q = Y diag(lambda) Y^T;     v_i = Q y_i

    A block Krylov method, at one A v per row of Q.

    Args:
      operator: v -> A v, linear and symmetric, on pytrees like `like`; for the most negative values
        pass -A.
      like: pytree of real floating arrays (or their shapes), such as the parameters.
      k, key, block_size, num_iters, tol: as in `top_singular_values`.

    Returns:
      `TopEigenvalues`; where block_size * (q + 1) fills the space, all eigenvalues were found and
      the top k are returned.

    Raises:
      ValueError: an operator that changes shapes, integers in `like`, k, block_size or num_iters
        out of range.
    """
    matvec, n = rows.flat_operator("top_eigenvalues", operator, like)

    def image_of(block):
        image = jax.vmap(matvec)(block)
        return scale.normalize(lax.stop_gradient(image))[0], image

    basis, images = _krylov("top_eigenvalues", image_of, n, k, key, block_size, num_iters)
    images = images.reshape(basis.shape)
    projected = images @ basis.T
    values, weights = jnp.linalg.eigh((projected + projected.T) / 2.0)
    values, weights = values[::-1][:k], lax.stop_gradient(weights[:, ::-1][:, :k].T)
    vectors, value = weights @ basis, lax.stop_gradient(values)
    error = jnp.linalg.norm(weights @ lax.stop_gradient(images) - value[:, None] * vectors, axis=1)
    residual = rows.relative(error, jnp.abs(value))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda x: x, like))
    return TopEigenvalues(values, rows.rows_like(zeros, vectors), residual, residual**2 <= tol)
