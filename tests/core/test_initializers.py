"""Initialisers: their closed forms, with a control for each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bounds import assert_rounding
from gradjax.core.initializers import WEIGHTS, bias

SIGMA_W = 1.7
# variance of an entry at sigma_w = 1 as a function of (fan_in, fan_out)
VARIANCES = {
    "gaussian": lambda n, m: 1 / n,
    "lecun_normal": lambda n, m: 1 / n,
    "lecun_uniform": lambda n, m: 1 / n,
    "he_normal": lambda n, m: 2 / n,
    "he_uniform": lambda n, m: 2 / n,
    "glorot_normal": lambda n, m: 2 / (n + m),
    "glorot_uniform": lambda n, m: 2 / (n + m),
    "uniform": lambda n, m: 0.05**2 / 3,
}
ISOMETRIC = ("orthogonal", "delta_orthogonal", "identity", "lsuv")


def test_every_rule_has_its_law():
    assert set(WEIGHTS) == set(VARIANCES) | set(ISOMETRIC)


@pytest.mark.parametrize("name", VARIANCES)
@pytest.mark.parametrize("shape", [(200, 600), (3, 3, 80, 160)], ids=str)
def test_variance_of_the_entries(name, shape, key):
    """Mean 0 and the law's variance within sampling error, for matrices and convolutions.

    A variance 5% off is rejected.
    """
    receptive = int(np.prod(shape[:-2]))
    expected = SIGMA_W**2 * VARIANCES[name](receptive * shape[-2], receptive * shape[-1])
    w = np.asarray(WEIGHTS[name](SIGMA_W)(key, shape, jnp.float32), np.float64).ravel()
    error = np.std(w**2) / w.size**0.5
    assert abs(np.mean(w)) < 4 * (expected / w.size) ** 0.5
    # JAX's truncated normals are right to 1e-3
    assert abs(np.mean(w**2) - expected) < 4 * error + 1e-3 * expected
    assert abs(np.mean(w**2) - 1.05 * expected) > 4 * error
    if "uniform" in name:
        assert np.abs(w).max() <= (3 * expected) ** 0.5 * 1.0001


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9)], ids=str)
def test_orthogonal_keeps_lengths(shape, key):
    """W W^T or W^T W is sigma_w^2 times the identity, times fan_out / fan_in where it widens."""
    widening = max(shape[1] / shape[0], 1)
    for name in ("orthogonal", "delta_orthogonal"):
        w = np.asarray(WEIGHTS[name](SIGMA_W)(key, shape, jnp.float32))
        gram = w @ w.T if shape[0] <= shape[1] else w.T @ w
        expected = SIGMA_W**2 * widening * np.eye(min(shape))
        # Householder QR of n rows: a modest multiple of n roundings (Higham 2002, theorem 19.4)
        assert_rounding(gram, expected, terms=20 * max(shape), size=SIGMA_W**2 * widening)
    np.testing.assert_array_equal(w, WEIGHTS["orthogonal"](SIGMA_W)(key, shape, jnp.float32))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 3, 4, 4), (3, 3, 4, 8), (5, 4, 8, 4)], ids=str)
def test_a_delta_orthogonal_convolution_is_an_isometry(shape, key):
    """Circular, it keeps the norm of every image (Xiao 2018); a spread-out kernel does not."""
    kernel = np.asarray(WEIGHTS["delta_orthogonal"](1.0)(key, shape, jnp.float32))
    centre = tuple((k - 1) // 2 for k in shape[:2])
    place = centre[0] * shape[1] + centre[1]
    assert not np.delete(kernel.reshape(-1, *shape[2:]), place, axis=0).any()

    def convolved(kernel, x):
        rolled = [
            np.roll(x, (i, j), (0, 1)) @ kernel[i, j]
            for i in range(shape[0])
            for j in range(shape[1])
        ]
        return sum(rolled)

    x = np.random.default_rng(0).standard_normal((6, 6, min(shape[2:]))).astype(np.float32)
    if shape[2] > shape[3]:
        # a narrowing kernel keeps the lengths of images in the span of its rows
        x = x @ kernel[centre].T
    ratio = np.linalg.norm(convolved(kernel, x)) / np.linalg.norm(x)
    assert abs(ratio / max(shape[3] / shape[2], 1) ** 0.5 - 1) < 1e-5
    spread = np.asarray(WEIGHTS["orthogonal"](1.0)(key, shape, jnp.float32))
    assert abs(np.linalg.norm(convolved(spread, x)) / np.linalg.norm(x) - ratio) > 1e-2


def test_delta_orthogonal_is_jaxs_where_jax_has_it(key):
    ours = WEIGHTS["delta_orthogonal"](1.0)(key, (3, 3, 8, 8), jnp.float32)
    theirs = jax.nn.initializers.delta_orthogonal()(key, (3, 3, 8, 8), jnp.float32)
    assert_rounding(ours, theirs, terms=20 * 8)


def test_identity_passes_what_fits(key):
    draw = lambda shape: np.asarray(WEIGHTS["identity"](0.5)(key, shape, jnp.float32))
    np.testing.assert_array_equal(draw((4, 4)), 0.5 * np.eye(4))
    np.testing.assert_array_equal(np.arange(1.0, 5) @ draw((4, 6)), [0.5, 1, 1.5, 2, 0, 0])
    np.testing.assert_array_equal(np.arange(1.0, 5) @ draw((4, 2)), [0.5, 1])
    kernel = draw((3, 3, 2, 2))
    np.testing.assert_array_equal(kernel[1, 1], 0.5 * np.eye(2))
    assert kernel.sum() == 1.0


def test_the_scale_may_be_traced(key):
    """One program for all rules; only `lsuv` takes its scale from the data instead."""

    @jax.jit
    @jax.vmap
    def draw(sigma):
        return {name: rule(sigma)(key, (5, 7), jnp.float32) for name, rule in WEIGHTS.items()}

    for name, w in draw(jnp.array([1.0, 2.0])).items():
        factor = 1.0 if name == "lsuv" else 2.0
        assert_rounding(w[1], factor * np.asarray(w[0]), terms=2)


def test_biases(key):
    b = np.asarray(bias(0.3)(key, (20_000,), jnp.float32))
    assert abs(b.std() / 0.3 - 1) < 3 * (1 / 40_000) ** 0.5
    assert not bias(0.0)(key, (9,), jnp.float32).any()
