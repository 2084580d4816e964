"""Jacobians as maps of rows: links, pytrees, half precision, custom derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jacobians import (
    flat,
    gaussian,
    jacobian_of,
    linear_step,
    singular_values,
    tanh_step,
    top_of,
)

from gradjax import matrix_free
from gradjax.core.step import Scan


@pytest.mark.slow
def test_links_of_unequal_width_on_the_smaller_side(key):
    a, b, c = jax.random.split(key, 3)
    wide, tall = jax.random.normal(a, (20, 90)) / 9, jax.random.normal(b, (70, 20)) / 4
    links = [(tanh_step, wide), Scan(tanh_step, gaussian(c, 3, 20)), (tanh_step, tall)]
    h0 = jnp.linspace(-1.0, 1.0, 90)
    jacobian = jacobian_of(links, h0)  # (70, 90), of rank 20
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
    sigma = singular_values(jacobian_of(cell, h0, weights))
    np.testing.assert_allclose(np.exp(top.log_singular_values), sigma[:3], rtol=5e-6)
    assert top.left["c"].shape == top.right["h"].shape == (3, 20)


def test_bfloat16_states_are_worked_on_in_float32(key):
    weights, h0 = (
        gaussian(key, 3, 40).astype(jnp.bfloat16),
        jnp.linspace(-1.0, 1.0, 40, dtype=jnp.bfloat16),
    )
    top = top_of(tanh_step, h0, weights, k=2, key=key)
    sigma = singular_values(jacobian_of(tanh_step, h0, weights))
    assert top.mantissa.dtype == jnp.float32 and top.left.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.exp(top.log_singular_values),
        sigma[:2],
        rtol=3e-2,
    )


def test_a_custom_vjp_gives_the_jacobian_that_training_sees(key):
    @jax.custom_vjp
    def halved(x):
        return x

    halved.defvjp(lambda x: (x, None), lambda _, g: (0.5 * g,))
    top = top_of(lambda h, _: halved(h), jnp.ones(6), jnp.zeros((10,)), k=1, key=key)
    np.testing.assert_allclose(top.log_singular_values, 10 * np.log(0.5), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
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
    ],
)
def test_bad_input_is_named_with_its_shapes(key, call, message):
    with pytest.raises(ValueError, match=message):
        call(key)
