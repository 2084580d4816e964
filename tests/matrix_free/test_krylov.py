"""Matrix-free values against dense SVDs, eigendecompositions and closed forms; residuals against
errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradjax import matrix_free
from gradjax.core import step as step_module
from gradjax.core.step import Scan


def tanh_step(h, w):
    return jnp.tanh(w @ h)


def linear_step(h, w):
    return w @ h


def gaussian(key, depth, n, gain=1.2):
    return gain / n**0.5 * jax.random.normal(key, (depth, n, n))


def dense(layers):
    """The product in float64 of layer Jacobians applied first to last."""
    product = np.eye(layers[0].shape[1])
    for layer in layers:
        product = np.asarray(layer, np.float64) @ product
    return product


@functools.partial(jax.jit, static_argnames=("step", "k", "block_size", "num_iters"))
def _top(step, h0, thetas, key, **options):
    return matrix_free.top_singular_values(step, h0, thetas, key=key, **options)


def top_of(step, h0, thetas=None, *, key, **options):
    """`top_singular_values` compiled, once per step and shapes; links are not hashable and are
    closed over."""
    if step_module.is_links(step):
        return jax.jit(
            lambda h0, key: matrix_free.top_singular_values(step, h0, key=key, **options)
        )(h0, key)
    return _top(step, h0, thetas, key, **options)


def compiled(function, *args, key, **options):
    """`function(*args, key=key, **options)` as one compiled program."""
    return jax.jit(lambda key: function(*args, key=key, **options))(key)


def padded(matrix):
    """Weights of four tanh layers whose Jacobian at zero is the matrix (60, 60)."""
    return jnp.concatenate([matrix[None], jnp.broadcast_to(jnp.eye(60), (3, 60, 60))])


def flat(rows):
    """(k, N) of a pytree with leading axes k."""
    return np.concatenate(
        [np.asarray(x, np.float64).reshape(x.shape[0], -1) for x in jax.tree.leaves(rows)], axis=1
    )


def with_values(key, values, shape):
    """A matrix with the given singular values and random vectors."""
    left, right = jax.random.split(key)
    u = np.linalg.qr(np.asarray(jax.random.normal(left, (shape[0], len(values))), np.float64))[0]
    v = np.linalg.qr(np.asarray(jax.random.normal(right, (shape[1], len(values))), np.float64))[0]
    return jnp.asarray((u * np.asarray(values)) @ v.T, jnp.float32)


# ---- top singular values; most at depth 4, width 60, k = 4, so that few programs are compiled


@pytest.mark.slow
def test_values_and_vectors_are_those_of_the_dense_jacobian(key):
    weights, h0 = gaussian(key, 4, 60), jnp.linspace(-1.0, 1.0, 60)
    top = top_of(tanh_step, h0, weights, k=4, key=key)
    jacobian = dense(step_module.layer_jacobians(tanh_step, h0, weights))
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
    sigma = np.linalg.svd(
        dense(step_module.layer_jacobians(tanh_step, h0, weights)), compute_uv=False
    )
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
def test_links_of_unequal_width_on_the_smaller_side(key):
    a, b, c = jax.random.split(key, 3)
    wide, tall = jax.random.normal(a, (20, 90)) / 9, jax.random.normal(b, (70, 20)) / 4
    links = [(tanh_step, wide), Scan(tanh_step, gaussian(c, 3, 20)), (tanh_step, tall)]
    h0 = jnp.linspace(-1.0, 1.0, 90)
    jacobian = dense(step_module.layer_jacobians(links, h0))  # (70, 90), of rank 20
    sigma = np.linalg.svd(jacobian, compute_uv=False)
    top = top_of(links, h0, k=4, key=key)
    np.testing.assert_allclose(np.exp(top.log_singular_values), sigma[:4], atol=3e-6 * sigma[0])
    np.testing.assert_allclose(
        jacobian @ flat(top.right)[0], sigma[0] * flat(top.left)[0], atol=1e-5
    )
    np.testing.assert_allclose(
        flat(top.left)[0] @ jacobian, sigma[0] * flat(top.right)[0], atol=1e-5
    )


def test_pytree_states(key):
    def cell(state, w):
        c, h = state["c"], state["h"]
        c = jax.nn.sigmoid(w[0] @ h) * c + jnp.tanh(w[1] @ h)
        return {"c": c, "h": jnp.tanh(c)}

    weights = jax.random.normal(key, (5, 2, 20, 20)) / 3
    h0 = {"c": jnp.linspace(0.0, 1.0, 20), "h": jnp.linspace(-1.0, 1.0, 20)}
    top = top_of(cell, h0, weights, k=3, key=key)
    sigma = np.linalg.svd(dense(step_module.layer_jacobians(cell, h0, weights)), compute_uv=False)
    np.testing.assert_allclose(np.exp(top.log_singular_values), sigma[:3], rtol=5e-6)
    assert top.left["c"].shape == top.right["h"].shape == (3, 20)


def test_bfloat16_states_are_worked_on_in_float32(key):
    weights, h0 = (
        gaussian(key, 3, 40).astype(jnp.bfloat16),
        jnp.linspace(-1.0, 1.0, 40, dtype=jnp.bfloat16),
    )
    top = top_of(tanh_step, h0, weights, k=2, key=key)
    layers = [
        np.asarray(x.astype(jnp.float32))
        for x in step_module.layer_jacobians(tanh_step, h0, weights)
    ]
    assert top.mantissa.dtype == jnp.float32 and top.left.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.exp(top.log_singular_values),
        np.linalg.svd(dense(layers), compute_uv=False)[:2],
        rtol=3e-2,
    )


def test_a_custom_vjp_gives_the_jacobian_that_training_sees(key):
    @jax.custom_vjp
    def halved(x):
        return x

    halved.defvjp(lambda x: (x, None), lambda _, g: (0.5 * g,))
    top = top_of(lambda h, _: halved(h), jnp.ones(6), jnp.zeros((10,)), k=1, key=key)
    np.testing.assert_allclose(top.log_singular_values, 10 * np.log(0.5), rtol=1e-6)


@pytest.mark.slow
def test_jit_vmap_and_a_function_agree_with_the_step(key):
    weights = jax.vmap(lambda k: gaussian(k, 4, 50))(jax.random.split(key, 3))
    h0 = jnp.linspace(-1.0, 1.0, 50)
    values = lambda w: top_of(tanh_step, h0, w, k=2, key=key).log_singular_values
    batched = jax.jit(jax.vmap(values))(weights)
    single = jax.jit(values)
    np.testing.assert_allclose(batched, [single(w) for w in weights], atol=3e-6)
    network = lambda h: jax.lax.scan(lambda h, w: (tanh_step(h, w), None), h, weights[0])[0]
    alone = top_of(network, h0, k=2, key=key).log_singular_values
    np.testing.assert_allclose(alone, batched[0], atol=3e-6)


@pytest.mark.slow
def test_the_derivative_is_that_of_the_singular_value(key):
    weights, h0 = gaussian(key, 3, 40), jnp.linspace(-1.0, 1.0, 40)
    of_krylov = lambda w: top_of(tanh_step, h0, w, k=2, key=key).log_singular_values[1]

    def of_dense(w):
        a, b, c = step_module.layer_jacobians(tanh_step, h0, w)
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


# ---- Monte Carlo


@pytest.mark.slow
def test_log_moments_match_the_exact_ones_within_their_error(key):
    weights, h0 = gaussian(key, 4, 50), jnp.linspace(-1.0, 1.0, 50)
    sigma = np.linalg.svd(
        dense(step_module.layer_jacobians(tanh_step, h0, weights)), compute_uv=False
    )
    found = compiled(
        matrix_free.log_moments, tanh_step, h0, weights, key=key, order=3, num_samples=400
    )
    exact = np.log([np.mean(sigma ** (2 * j)) for j in (1, 2, 3)])
    assert (np.abs(found.value - exact) < 4 * found.standard_error).all()
    assert (found.standard_error < 0.15).all() and (found.standard_error > 0).all()


def test_log_moments_far_outside_float32(key):
    weights = 2.0 * jnp.broadcast_to(jnp.eye(8), (1000, 8, 8))
    found = compiled(matrix_free.log_moments, linear_step, jnp.ones(8), weights, key=key, order=2)
    np.testing.assert_allclose(found.value, [2000 * np.log(2), 4000 * np.log(2)], rtol=1e-6)
    one = compiled(
        matrix_free.log_moments, linear_step, jnp.ones(8), weights, key=key, num_samples=1
    )
    assert jnp.isinf(one.standard_error).all()


@pytest.mark.slow
def test_singular_value_density_integrates_to_one_and_has_the_moments(key):
    weights, h0 = gaussian(key, 3, 60), jnp.linspace(-1.0, 1.0, 60)
    sigma = np.linalg.svd(
        dense(step_module.layer_jacobians(tanh_step, h0, weights)), compute_uv=False
    )
    found = compiled(
        matrix_free.singular_value_density, tanh_step, h0, weights, key=key, num_samples=100
    )
    assert (
        abs(float(jnp.trapezoid(found.density, found.grid)) - 1) < 1e-3 and found.mass_at_zero == 0
    )
    np.testing.assert_allclose(found.weights.sum(axis=1), 1.0, atol=1e-5)
    for order in (1, 2, 3):
        samples = np.sum(found.weights * jnp.exp(2 * order * found.nodes), axis=1)
        assert abs(samples.mean() - np.mean(sigma ** (2 * order))) < 4 * samples.std() / 10
    assert abs(float(found.nodes.max()) - np.log(sigma[0])) < 1e-3


@pytest.mark.slow
def test_singular_value_density_of_rank_deficient_orthogonal_and_exploding_products(key):
    half = jnp.diag(jnp.where(jnp.arange(16) < 8, 1.0, 0.0))
    found = compiled(matrix_free.singular_value_density, lambda h: half @ h, jnp.ones(16), key=key)
    np.testing.assert_allclose(found.mass_at_zero, 0.5, atol=1e-5)
    np.testing.assert_allclose(jnp.trapezoid(found.density, found.grid), 0.5, atol=1e-3)
    weights = 2.0 * jnp.broadcast_to(
        jnp.eye(16), (300, 16, 16)
    )  # the Krylov space ends after one vector
    found = compiled(
        matrix_free.singular_value_density,
        linear_step,
        jnp.ones(16),
        weights,
        key=key,
        bandwidth=0.1,
    )
    peak = found.grid[jnp.argmax(found.density)]
    np.testing.assert_allclose(peak, 300 * np.log(2), atol=0.01)
    np.testing.assert_allclose(found.density.max(), 1 / (0.1 * (2 * np.pi) ** 0.5), rtol=1e-2)


@pytest.mark.slow
def test_spectral_density_of_a_symmetric_operator(key):
    values = np.linspace(-1.0, 3.0, 80)
    q = np.linalg.qr(np.asarray(jax.random.normal(key, (80, 80)), np.float64))[0]
    matrix = jnp.asarray((q * values) @ q.T, jnp.float32)
    found = compiled(
        matrix_free.spectral_density, lambda v: matrix @ v, jnp.zeros(80), key=key, num_samples=64
    )
    assert abs(float(jnp.trapezoid(found.density, found.grid)) - 1) < 1e-3
    samples = np.sum(found.weights * found.nodes**2, axis=1)
    assert abs(samples.mean() - np.mean(values**2)) < 4 * samples.std() / 8
    inside = (found.grid > -0.7) & (found.grid < 2.7)
    np.testing.assert_allclose(found.density[inside], 0.25, atol=0.06)
    assert jnp.isfinite(found.standard_error).all()
    identity = compiled(matrix_free.spectral_density, lambda v: v, jnp.zeros(10), key=key)
    np.testing.assert_allclose(identity.grid[jnp.argmax(identity.density)], 1.0, atol=1e-3)


def test_trace_within_its_error_and_exact_for_a_diagonal(key):
    matrix = jax.random.normal(key, (70, 70))
    found = compiled(
        matrix_free.trace, lambda v: matrix @ v, jnp.zeros(70), key=key, num_samples=300
    )
    assert abs(float(found.value - jnp.trace(matrix))) < 4 * float(found.standard_error)
    off = matrix - jnp.diag(jnp.diag(matrix))
    predicted = float(jnp.sum(off**2 + off * off.T) / 300) ** 0.5  # Hutchinson's variance
    assert 0.7 < float(found.standard_error) / predicted < 1.4
    diagonal = compiled(
        matrix_free.trace, lambda v: {"a": 2.0 * v["a"]}, {"a": jnp.zeros((3, 4))}, key=key
    )
    np.testing.assert_allclose([diagonal.value, diagonal.standard_error], [24.0, 0.0], atol=1e-5)


# ---- curvature


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


# ---- bad input


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
            lambda key: matrix_free.top_singular_values(jnp.abs, jnp.arange(4), k=1, key=key),
            r"\(4,\) int32",
        ),
        (
            lambda key: matrix_free.top_singular_values(jnp.sign, 1j * jnp.ones(4), k=1, key=key),
            "complex",
        ),
        (
            lambda key: matrix_free.top_singular_values(
                linear_step, jnp.ones(4), jnp.ones((3, 4, 5)), k=1, key=key
            ),
            r"does not accept h0 of shapes \[\(4,\)\]",
        ),
        (
            lambda key: matrix_free.top_singular_values(
                linear_step, jnp.ones(5), jnp.ones((3, 4, 5)), k=1, key=key
            ),
            r"\(5,\) float32 to \(4,\) float32",
        ),
        (
            lambda key: matrix_free.top_singular_values(
                [(linear_step, jnp.ones((3, 4))), (linear_step, jnp.ones((2, 5)))],
                jnp.ones(4),
                k=1,
                key=key,
            ),
            r"link 1 does not accept the state \(3,\)",
        ),
        (
            lambda key: matrix_free.log_moments(jnp.tanh, jnp.ones(4), key=key, order=0),
            "order is 0",
        ),
        (
            lambda key: matrix_free.log_moments(jnp.tanh, jnp.ones(4), key=key, num_samples=0),
            "num_samples is 0",
        ),
        (
            lambda key: matrix_free.singular_value_density(
                jnp.tanh, jnp.ones(4), key=key, num_matvecs=0
            ),
            "num_matvecs",
        ),
        (
            lambda key: matrix_free.spectral_density(lambda v: v[:2], jnp.ones(4), key=key),
            r"maps .*\(4,\)|shape=\(4,\)",
        ),
        (
            lambda key: matrix_free.top_eigenvalues(lambda v: v, jnp.arange(4), key=key),
            "int32.*floating",
        ),
        (lambda key: matrix_free.top_eigenvalues(lambda v: v, jnp.ones(4), k=5, key=key), "k is 5"),
        (lambda key: matrix_free.trace(lambda v: v, {}, key=key), "floating arrays are needed"),
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
