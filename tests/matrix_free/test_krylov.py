"""Top singular values and eigenvalues against dense decompositions; residuals against errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jacobians import (
    flat,
    gaussian,
    linear_step,
    singular_values,
    tanh_jacobian,
    tanh_step,
    top_of,
)

from gradjax import matrix_free
from gradjax.core.step import layer_jacobians


def padded(matrix):
    """Weights of four tanh layers whose Jacobian at zero is the matrix (60, 60)."""
    return jnp.concatenate([matrix[None], jnp.broadcast_to(jnp.eye(60), (3, 60, 60))])


def with_values(key, values, shape):
    """A matrix with the given singular values and random vectors."""
    left, right = jax.random.split(key)
    u = np.linalg.qr(np.asarray(jax.random.normal(left, (shape[0], len(values))), np.float64))[0]
    v = np.linalg.qr(np.asarray(jax.random.normal(right, (shape[1], len(values))), np.float64))[0]
    return jnp.asarray((u * np.asarray(values)) @ v.T, jnp.float32)


@pytest.mark.slow
def test_values_and_vectors_are_those_of_the_dense_jacobian(key):
    weights, h0 = gaussian(key, 4, 60), jnp.linspace(-1.0, 1.0, 60)
    top = top_of(tanh_step, h0, weights, k=4, key=key)
    jacobian = tanh_jacobian(h0, weights)
    u, sigma, vt = np.linalg.svd(jacobian)
    np.testing.assert_allclose(top.log_singular_values, np.log(sigma[:4]), atol=2e-6)
    np.testing.assert_allclose(top.mantissa * 2.0 ** float(top.exponent), sigma[:4], rtol=2e-6)
    left, right = flat(top.left), flat(top.right)
    np.testing.assert_allclose(np.abs(np.sum(left * u.T[:4], axis=1)), 1.0, atol=1e-4)
    np.testing.assert_allclose(np.abs(np.sum(right * vt[:4], axis=1)), 1.0, atol=1e-4)
    np.testing.assert_allclose(right @ jacobian.T, sigma[:4, None] * left, atol=2e-6 * sigma[0])
    np.testing.assert_allclose(left @ left.T, np.eye(4), atol=2e-6)
    np.testing.assert_allclose(right @ right.T, np.eye(4), atol=2e-6)
    assert top.converged.all() and (top.residual < 1e-3).all()
    again = top_of(
        tanh_step, h0, weights, k=4, key=jax.random.key(7)
    )  # another start, the same values
    np.testing.assert_allclose(again.log_singular_values, top.log_singular_values, atol=3e-6)


@pytest.mark.slow
def test_what_has_not_converged_says_so(key):
    exact = np.linspace(1.0, 0.9, 60)
    matrix = with_values(key, exact, (60, 60))
    errors = []
    for num_iters in (0, 1, 2):
        top = top_of(tanh_step, jnp.zeros(60), padded(matrix), k=4, key=key, num_iters=num_iters)
        error = np.abs(np.exp(top.log_singular_values) / exact[:4] - 1)
        assert not top.converged.any() and (error <= top.residual).all()
        errors.append(error.max())
    assert errors[0] > errors[1] > errors[2] > 1e-3


@pytest.mark.parametrize("num_iters", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_residual_tracks_the_error(key, num_iters):
    weights, h0 = gaussian(key, 4, 60, 1.0), jnp.linspace(-1.0, 1.0, 60)
    sigma = singular_values(tanh_jacobian(h0, weights))
    for start in jax.random.split(key, 20):
        top = top_of(tanh_step, h0, weights, k=4, key=start, num_iters=num_iters)
        found, residual = (
            np.exp(np.asarray(top.log_singular_values, np.float64)),
            np.asarray(top.residual),
        )
        nearest = np.min(np.abs(found[:, None] - sigma[None]), axis=1)
        assert (nearest <= residual * found + 1e-6 * sigma[0]).all()  # the bound
        error = np.abs(found / sigma[:4] - 1)
        assert (error <= 10 * residual**2 + 2e-6).all()  # the estimate
        assert (error[np.asarray(top.converged)] <= 1e-4).all()


def test_clustered_deficient_and_zero_matrices(key):
    of = lambda matrix: top_of(tanh_step, jnp.zeros(60), padded(matrix), k=4, key=key)
    values = np.r_[[2.0, 2.0, 1.999, 1.999], np.linspace(1.0, 0.1, 56)]
    top = of(with_values(key, values, (60, 60)))
    np.testing.assert_allclose(np.exp(top.log_singular_values), values[:4], rtol=3e-6)
    assert top.converged.all()
    np.testing.assert_allclose(flat(top.left) @ flat(top.left).T, np.eye(4), atol=3e-6)
    top = of(with_values(key, [3.0, 2.0, 1.0], (60, 60)))  # what lies beyond the rank is flagged
    np.testing.assert_allclose(np.exp(top.log_singular_values[:3]), [3.0, 2.0, 1.0], rtol=3e-6)
    assert top.log_singular_values[3] < np.log(3e-6) and top.converged.tolist() == [
        True,
        True,
        True,
        False,
    ]
    assert np.isfinite(flat(top.left)).all() and np.isfinite(flat(top.right)).all()
    top = of(jnp.eye(60))  # the Krylov space ends with the first block
    np.testing.assert_allclose(top.log_singular_values, 0.0, atol=2e-6)
    assert top.converged.all()
    top = of(jnp.zeros((60, 60)))
    assert (top.log_singular_values == -jnp.inf).all() and (top.residual == 0).all()


@pytest.mark.slow
def test_values_far_outside_float32(key):
    keys, h0 = jax.random.split(key, 200), jnp.ones(20)
    rotation = jax.vmap(lambda k: jnp.linalg.qr(jax.random.normal(k, (20, 20)))[0])(keys)
    for gain in (2.0, 0.5):
        top = top_of(linear_step, h0, gain * rotation, k=3, key=key)
        np.testing.assert_allclose(top.log_singular_values, 200 * np.log(gain), atol=1e-4)
        np.testing.assert_allclose(
            top.mantissa * 2.0 ** (int(top.exponent) - 200 * np.log2(gain)), 1.0, rtol=2e-5
        )
        assert top.converged.all()
    dead = top_of(linear_step, h0, rotation.at[100].set(0.0), k=3, key=key)
    assert (dead.log_singular_values == -jnp.inf).all() and not jnp.isnan(dead.residual).any()
    from_keys = lambda h, k: 2.0 * jax.random.orthogonal(k, 20) @ h  # no weights are held
    top = top_of(from_keys, h0, keys, k=3, key=key)
    np.testing.assert_allclose(top.log_singular_values, 200 * np.log(2.0), atol=1e-4)


@pytest.mark.slow
def test_a_graded_product_beyond_float32_agrees_with_the_whole_spectrum(key):
    spectrum = pytest.importorskip("gradjax.spectrum")
    weights, h0 = gaussian(key, 120, 48, 5.0), jnp.ones(48)
    top = top_of(linear_step, h0, weights, k=8, key=key)
    error = np.abs(np.asarray(top.log_singular_values) - spectrum.log_singular_values(weights)[:8])
    assert top.log_singular_values[0] > 150  # beyond float32
    assert top.converged[:2].all() and (error[np.asarray(top.converged)] < 1e-3).all()
    assert not top.converged[error > 1e-2].any()


@pytest.mark.slow
def test_jit_vmap_and_a_function_agree_with_the_step(key):
    weights = jax.vmap(lambda k: gaussian(k, 4, 50))(jax.random.split(key, 3))
    h0 = jnp.linspace(-1.0, 1.0, 50)
    values = lambda w: top_of(tanh_step, h0, w, k=2, key=key).log_singular_values
    batched = jax.jit(jax.vmap(values))(weights)
    single = jax.jit(values)
    np.testing.assert_allclose(batched, [single(w) for w in weights], atol=3e-6)
    network = lambda h: jax.lax.scan(lambda h, w: (tanh_step(h, w), None), h, weights[0])[0]
    by_function = top_of(network, h0, k=2, key=key).log_singular_values
    np.testing.assert_allclose(by_function, batched[0], atol=3e-6)


@pytest.mark.slow
def test_the_derivative_is_that_of_the_singular_value(key):
    weights, h0 = gaussian(key, 3, 40), jnp.linspace(-1.0, 1.0, 40)
    of_krylov = lambda w: top_of(tanh_step, h0, w, k=2, key=key).log_singular_values[1]

    def of_dense(w):
        a, b, c = layer_jacobians(tanh_step, h0, w)
        return jnp.log(jnp.linalg.svd(c @ b @ a, compute_uv=False)[1])

    expected = jax.grad(of_dense)(weights)
    np.testing.assert_allclose(
        jax.jit(jax.grad(of_krylov))(weights), expected, atol=1e-3 * float(jnp.max(expected))
    )


@pytest.mark.slow
@settings(max_examples=5)
@given(
    st.integers(1, 24),
    st.integers(1, 24),
    st.integers(0, 3),
    st.integers(1, 24),
    st.integers(0, 99),
)
def test_random_shapes(rows, columns, num_iters, k, seed):
    k = min(k, rows, columns)
    matrix = jax.random.normal(jax.random.key(seed), (rows, columns))
    top = top_of(
        lambda h: matrix @ h,
        jnp.zeros(columns),
        k=k,
        key=jax.random.key(1),
        block_size=k + 1,
        num_iters=num_iters,
    )
    sigma = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)[:k]
    found = np.exp(np.asarray(top.log_singular_values, np.float64))
    assert (np.diff(found) <= 1e-5 * sigma[0]).all() and (found <= sigma + 1e-5 * sigma[0]).all()
    error = np.abs(found - sigma)
    assert (
        error
        <= np.asarray(top.residual) ** 2 * 10 * sigma[0] + np.asarray(top.residual) * found + 1e-5
    ).all()
    np.testing.assert_allclose(flat(top.right) @ flat(top.right).T, np.eye(k), atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda key: matrix_free.top_singular_values(jnp.tanh, jnp.ones(4), k=5, key=key),
            "k is 5.*rank at most 4",
        ),
        (
            lambda key: matrix_free.top_singular_values(jnp.tanh, jnp.ones(4), k=0, key=key),
            "k is 0",
        ),
        (
            lambda key: matrix_free.top_singular_values(lambda h: h[:2], jnp.ones(4), k=3, key=key),
            "1 <= k <= 2",
        ),
        (
            lambda key: matrix_free.top_singular_values(
                jnp.tanh, jnp.ones(40), k=3, key=key, block_size=2
            ),
            "block_size is 2, below k = 3",
        ),
        (
            lambda key: matrix_free.top_singular_values(
                jnp.tanh, jnp.ones(40), k=3, key=key, num_iters=-1
            ),
            "num_iters is -1",
        ),
        (
            lambda key: matrix_free.top_eigenvalues(lambda v: v, jnp.arange(4), key=key),
            "int32.*floating",
        ),
        (lambda key: matrix_free.top_eigenvalues(lambda v: v, jnp.ones(4), k=5, key=key), "k is 5"),
    ],
)
def test_bad_input_is_named_with_its_shapes(key, call, message):
    with pytest.raises(ValueError, match=message):
        call(key)
