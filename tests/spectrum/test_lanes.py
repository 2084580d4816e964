"""Batches of products: lanes, what cannot be determined and is reported, devices."""

import subprocess
import sys
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from products import DEPTH, N, gaussian, known_product, orthogonal, rng

from gradjax.spectrum.jacobian import log_singular_values


def ill_conditioned():
    factors = gaussian()
    factors[5] = orthogonal(N, 0) @ np.diag(10.0 ** -np.linspace(0, 15, N)) @ orthogonal(N, 1)
    return factors


def there_and_back():
    """A ... A then A^-1 ... A^-1 is the identity, but its rounding is not."""
    a = known_product(N, DEPTH // 2, span=50, seed=3)[0][:, :, ::-1]
    return np.concatenate([a, np.linalg.inv(a)[::-1]])


@pytest.fixture(scope="module")
def batch():
    """(2, 3) lanes, of which (1, 1) and (1, 2) cannot be trusted."""
    sound = [gaussian(seed=i) for i in range(4)]
    return np.stack([*sound, ill_conditioned(), there_and_back()]).reshape(2, 3, DEPTH, N, N)


@pytest.fixture(scope="module")
def together(batch):
    with pytest.warns(UserWarning, match=r"in 2 of 6 products rounding decides.*draw near again"):
        return log_singular_values(batch, return_info=True)


def test_what_rounding_decides_is_not_trusted(together):
    values, info = together
    assert values.shape == (2, 3, N) and info.method.shape == (2, 3)
    assert info.trusted.tolist() == [[True, True, True], [True, False, False]]
    assert info.error_bound[1, 1] > 1e-6 and info.error_bound[1, 2] == np.inf


def test_nan_stays_in_its_lane(batch, together):
    broken = batch.copy()
    broken[0, 1, 7, 2, 3], broken[1, 2, 5, 0, 0] = np.nan, np.inf
    with pytest.warns(UserWarning) as caught:
        values, info = log_singular_values(broken, return_info=True)
    messages = " ".join(str(w.message) for w in caught)
    assert "lane (0, 1), layer 7" in messages and "lane (1, 2), layer 5" in messages
    assert info.failed_layer.tolist() == [[-1, 7, -1], [-1, -1, 5]]
    bad = info.failed_layer >= 0
    assert np.isnan(values[bad]).all() and not info.trusted[bad].any()
    assert (values[~bad] == together[0][~bad]).all()


def test_lanes_do_not_depend_on_their_place(batch, together):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        turned = log_singular_values(batch[::-1, ::-1])
    assert (turned[::-1, ::-1] == together[0]).all()


@pytest.mark.slow
def test_batch_is_a_loop(batch, together):
    by_one = np.stack([log_singular_values(factors) for factors in batch[0]])
    assert (together[0][0] == by_one).all()


@pytest.mark.slow
def test_numpy_jax_and_half_precision_inputs():
    factors = gaussian(dtype=np.float32)
    assert (log_singular_values(factors) == log_singular_values(jnp.asarray(factors))).all()
    half = jnp.asarray(factors, jnp.bfloat16)
    found = log_singular_values(half)
    assert (found == log_singular_values(np.asarray(half, np.float32))).all()
    assert found.dtype == np.float64


@pytest.mark.slow
def test_undetermined_values_are_counted():
    """A matrix of ones, perturbed in the last float32 bit: seven of its values are rounding."""
    perturbation = np.float32(2**-23) * rng().integers(0, 2, (1, 8, 8)).astype(np.float32)
    factors = np.full((1, 8, 8), np.float32(1) / 3) * (1 + perturbation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, info = log_singular_values(factors, return_info=True)
    assert info.undetermined >= 1


SHARDED = """
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from gradjax.spectrum import log_singular_values
w = np.random.default_rng(0).standard_normal((4, 12, 8, 8)).astype(np.float32)
mesh = Mesh(np.array(jax.devices()), ("seed",))
sharded = jax.device_put(w, NamedSharding(mesh, PartitionSpec("seed")))
assert len(sharded.sharding.device_set) == 2
assert np.abs(log_singular_values(sharded) - log_singular_values(w)).max() < 1e-9
"""


@pytest.mark.slow
def test_factors_sharded_over_devices():
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
