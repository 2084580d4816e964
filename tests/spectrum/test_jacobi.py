"""Log singular values under a trace, in the factors' own dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import DEPTH, N, gaussian, naive, rng

from gradjax.spectrum.jacobian import log_singular_values
from support import data_folder

REFERENCE = "product_svd/reference.npz"
jitted = jax.jit(log_singular_values)


def test_rank_and_nan():
    alive = rng(2).uniform(size=(DEPTH, N)) < 0.8
    factors = (gaussian() * alive[:, :, None]).astype(np.float32)
    values, rank = np.asarray(jitted(factors)), alive.sum(1).min()
    assert values.dtype == np.float32 and (values[rank:] == -np.inf).all()
    assert np.abs(values[:rank] - naive(factors)[:rank]).max() < 1e-3
    factors[3, 0, 0] = np.nan
    assert np.isnan(jitted(factors)).all()


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 5])
def test_jit_and_vmap(n):
    factors = np.stack([gaussian(DEPTH, n, i, np.float32) for i in range(3)])
    exact = log_singular_values(factors)
    assert np.abs(jitted(factors) - exact).max() < 1e-3
    assert np.abs(jax.jit(jax.vmap(log_singular_values))(factors) - exact).max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["gauss_lin_32x200", "gauss_tanh15_32x200", "orth_tanh_32x200", "orth_lin_32x200"]
)
def test_against_reference(case):
    data = np.load(data_folder(REFERENCE) / REFERENCE)
    values = jitted(data[f"{case}_W"])
    perturbed = np.abs(data[f"{case}_pert"] - data[f"{case}_ref"]).max()
    assert np.abs(values - data[f"{case}_ref"]).max() < max(30 * perturbed, 1e-4)


def test_derivative_refuses_by_name():
    message = r"log_singular_values has no derivative.*lyapunov_exponents"
    with pytest.raises(NotImplementedError, match=message):
        jax.grad(lambda w: log_singular_values(w).sum())(jnp.asarray(gaussian(4, 3)))
