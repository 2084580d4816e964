"""Moments, traces and densities by Monte Carlo against dense values, within their errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jacobians import compiled, gaussian, linear_step, singular_values, tanh_jacobian, tanh_step

from gradjax import matrix_free


@pytest.mark.slow
def test_log_moments_match_the_exact_ones_within_their_error(key):
    weights, h0 = gaussian(key, 4, 50), jnp.linspace(-1.0, 1.0, 50)
    sigma = singular_values(tanh_jacobian(h0, weights))
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
    sigma = singular_values(tanh_jacobian(h0, weights))
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


@pytest.mark.parametrize(
    ("call", "message"),
    [
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
        (lambda key: matrix_free.trace(lambda v: v, {}, key=key), "floating arrays are needed"),
    ],
)
def test_bad_input_is_named_with_its_shapes(key, call, message):
    with pytest.raises(ValueError, match=message):
        call(key)
