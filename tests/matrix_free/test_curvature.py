"""Hessians, Gauss-Newton matrices and sharpness against dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jacobians import compiled

from gradjax import matrix_free


def mlp(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def mlp_problem(key):
    a, b, c, d = jax.random.split(key, 4)
    params = {"w": jax.random.normal(a, (4, 6)), "v": jax.random.normal(b, (6, 2))}
    x, y = jax.random.normal(c, (20, 4)), jax.random.normal(d, (20, 2))
    return params, x, y


def as_matrix(operator, like):
    zeros, unravel = jax.flatten_util.ravel_pytree(like)
    column = lambda e: jax.flatten_util.ravel_pytree(operator(unravel(e)))[0]
    return np.asarray(jax.vmap(column)(jnp.eye(zeros.size)), np.float64).T


@pytest.mark.slow
def test_hessian_and_sharpness_of_a_small_network(key):
    params, x, y = mlp_problem(key)
    loss = lambda p, x, y: jnp.mean((mlp(p, x) - y) ** 2)
    zeros, unravel = jax.flatten_util.ravel_pytree(params)
    expected = np.asarray(jax.hessian(lambda p: loss(unravel(p), x, y))(zeros), np.float64)
    hessian = as_matrix(matrix_free.hessian_operator(loss, params, x, y), params)
    np.testing.assert_allclose(hessian, expected, atol=1e-5)
    values, vectors = np.linalg.eigh(expected)
    found = jax.jit(lambda p: matrix_free.sharpness(loss, p, x, y, key=key, num_iters=7))(params)
    np.testing.assert_allclose(found.eigenvalues, values[-1], rtol=1e-5)
    vector = jax.flatten_util.ravel_pytree(found.vectors)[0]
    assert (
        abs(abs(float(vector @ jnp.asarray(vectors[:, -1], jnp.float32))) - 1) < 1e-4
        and found.converged
    )
    operator = matrix_free.hessian_operator(loss, params, x, y)
    top = compiled(
        matrix_free.top_eigenvalues,
        lambda v: jax.tree.map(jnp.negative, operator(v)),
        params,
        k=2,
        key=key,
    )
    np.testing.assert_allclose(top.eigenvalues, -values[:2], atol=1e-5)
    estimate = compiled(matrix_free.trace, operator, params, key=key, num_samples=400)
    assert abs(float(estimate.value) - np.trace(expected)) < 4 * float(estimate.standard_error)


@pytest.mark.slow
def test_gauss_newton_is_positive_semi_definite_and_exact_for_a_linear_model(key):
    params, x, y = mlp_problem(key)
    softmax = lambda outputs: jnp.mean(jax.nn.logsumexp(outputs, axis=1) - outputs[:, 0])
    matrix = as_matrix(matrix_free.gauss_newton_operator(mlp, softmax, params, x), params)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)
    assert np.linalg.eigvalsh(matrix).min() > -1e-6 < np.linalg.eigvalsh(matrix).max()
    zeros, unravel = jax.flatten_util.ravel_pytree(params)
    outputs = lambda p: mlp(unravel(p), x).reshape(-1)
    jacobian = np.asarray(jax.jacobian(outputs)(zeros), np.float64)
    inner = np.asarray(jax.hessian(lambda o: softmax(o.reshape(20, 2)))(outputs(zeros)), np.float64)
    np.testing.assert_allclose(matrix, jacobian.T @ inner @ jacobian, atol=1e-5)
    linear, squared = lambda p, x: x @ p, lambda o: jnp.sum((o - y) ** 2)
    operator = matrix_free.gauss_newton_operator(linear, squared, jnp.zeros((4, 2)), x)
    hessian = matrix_free.hessian_operator(lambda p: squared(linear(p, x)), jnp.zeros((4, 2)))
    np.testing.assert_allclose(
        as_matrix(operator, jnp.zeros((4, 2))), as_matrix(hessian, jnp.zeros((4, 2))), rtol=1e-5
    )


@pytest.mark.slow
def test_sharpness_of_a_quadratic_and_what_has_not_converged(key):
    curvature = jnp.linspace(-5.0, 4.0, 300)
    quadratic = lambda x: 0.5 * jnp.sum(curvature * x**2)
    found = compiled(matrix_free.sharpness, quadratic, jnp.zeros(300), key=key, num_iters=40)
    np.testing.assert_allclose(found.eigenvalues, 4.0, rtol=1e-5)
    rough = compiled(matrix_free.sharpness, quadratic, jnp.zeros(300), key=key, num_iters=1)
    assert not rough.converged and rough.residual > 0.05 and abs(rough.eigenvalues - 4.0) > 0.05
    flat_loss = matrix_free.sharpness(
        lambda x: 0.5 * jnp.sum(x**2), jnp.zeros(300), key=key
    )  # H = I: one Krylov vector
    np.testing.assert_allclose(flat_loss.eigenvalues, 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda key: matrix_free.sharpness(lambda x: x**2, jnp.ones(4), key=key),
            r"\(4,\).*scalar",
        ),
        (
            lambda key: matrix_free.hessian_operator(lambda x: 1.0 * x.sum(), jnp.arange(4)),
            "int32.*floating",
        ),
        (
            lambda key: matrix_free.gauss_newton_operator(lambda p: p, lambda o: o, jnp.ones(3)),
            "gauss_newton_operator: the loss returns.*scalar",
        ),
    ],
)
def test_bad_input_is_named_with_its_shapes(key, call, message):
    with pytest.raises(ValueError, match=message):
        call(key)
