"""The curvature of a loss as operators: Hessian, Gauss-Newton matrix, sharpness.

    H = d^2 loss / d params^2,   sharpness = lambda_max(H)
    G = J^T (d^2 loss / d f^2) J,   J = d f / d params

Gradient descent at rate eta is unstable on a quadratic of sharpness above 2 / eta; training drives
the sharpness there (Cohen, Kaur, Li, Kolter, Talwalkar, arXiv:2103.00065, 2021). Each operator is
linearised once: a product costs about two gradients and holds their residuals.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gradjax.matrix_free.krylov import TopEigenvalues, top_eigenvalues
from gradjax.matrix_free.rows import Operator

PyTree = Any


def _check_scalar(name: str, loss: Callable, *args: PyTree) -> None:
    shapes = jax.eval_shape(lambda x: x, args[0])
    leaves = jax.tree.leaves(shapes)
    if not leaves or any(not jnp.issubdtype(x.dtype, jnp.floating) for x in leaves):
        raise ValueError(
            f"{name}: the parameters are {shapes}; real floating arrays are needed, "
            "the rest goes in args."
        )
    out = jax.eval_shape(loss, *args)
    if getattr(out, "shape", None) != ():
        raise ValueError(
            f"{name}: the loss returns {out}; a scalar of shape () is needed. Take its mean or sum."
        )


def hessian_operator(loss: Callable[..., Array], params: PyTree, *args: PyTree) -> Operator:
    """v -> H v with H = d^2 loss / d params^2 at (params, *args).

    Forward over reverse (Pearlmutter 1994).

    Args:
      loss: (params, *args) -> ().
      params: pytree of real floating arrays; v and H v are like it.
      args: held fixed, such as a batch.

    Returns:
      The operator, linearised at `params`.

    Raises:
      ValueError: parameters that are not floating, a loss that is not a scalar.

    >>> import jax.numpy as jnp
    >>> hessian_operator(lambda x: (x**3).sum(), jnp.array([1.0, 2.0]))(jnp.ones(2)).tolist()  # 6 x
    [6.0, 12.0]
    """
    _check_scalar("hessian_operator", loss, params, *args)
    return jax.linearize(jax.grad(lambda p: loss(p, *args)), params)[1]


def gauss_newton_operator(
    model: Callable[..., PyTree], loss: Callable[[PyTree], Array], params: PyTree, *args: PyTree
) -> Operator:
    """v -> G v, the generalised Gauss-Newton matrix of loss(model(params, *args)).

    Args:
      model: (params, *args) -> outputs, a pytree.
      loss: outputs -> (), convex for G to be positive semi-definite.
      params: pytree of real floating arrays; v and G v are like it.
      args: held fixed, such as the inputs.

    Returns:
      The operator, linearised at `params`.

    Raises:
      ValueError: parameters or outputs that are not floating, a loss that is not a scalar.

    References:
      Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, Neural
      Comp. 14, 2002.
    """
    _check_scalar("gauss_newton_operator", lambda p: loss(model(p, *args)), params)
    outputs, pull = jax.vjp(lambda p: model(p, *args), params)
    _check_scalar("gauss_newton_operator", loss, outputs)
    push = jax.linear_transpose(lambda u: pull(u)[0], outputs)
    curve = jax.linearize(jax.grad(loss), outputs)[1]
    return lambda v: pull(curve(push(v)[0]))[0]


def sharpness(
    loss: Callable[..., Array],
    params: PyTree,
    *args: PyTree,
    key: Array,
    block_size: int = 4,
    num_iters: int = 10,
    tol: float = 1e-5,
) -> TopEigenvalues:
    """The largest eigenvalue of the loss's Hessian, its vector and its residual, by block Krylov.

    Args:
      loss, params, args: as in `hessian_operator`.
      key, block_size, num_iters, tol: as in `top_eigenvalues`; block_size * (num_iters + 1) vectors
        like params are held.

    Returns:
      `TopEigenvalues` without the leading axis; the vector is like params.

    Raises:
      ValueError: as `hessian_operator` and `top_eigenvalues`.

    >>> import jax, jax.numpy as jnp
    >>> found = sharpness(lambda x: x[0] ** 2 - x[1] ** 2, jnp.zeros(2), key=jax.random.key(0))
    >>> float(found.eigenvalues), bool(found.converged)
    (2.0, True)
    """
    _check_scalar("sharpness", loss, params, *args)
    operator = hessian_operator(loss, params, *args)
    top = top_eigenvalues(
        operator, params, key=key, block_size=block_size, num_iters=num_iters, tol=tol
    )
    return jax.tree.map(lambda x: x[0], top)
