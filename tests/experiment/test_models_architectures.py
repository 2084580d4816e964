"""What convolutional architectures are known for: LeNet-5, ResNet, the network on a torus."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_contract import build, run, started

from gradjax.spectrum.jacobian import jacobian_spectrum

RELU = {"activation": "relu", "sigma_w": 2**0.5, "sigma_b": 0.0}
LINEAR = {"activation": "linear", "sigma_w": 1.0, "sigma_b": 0.0}


def test_lenet_has_its_61706_parameters(key):
    def count(features):
        model = build("lenet5", num_outputs=10)
        shapes = jax.eval_shape(lambda: started(model, key, jnp.zeros((2, features))))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    assert count(784) == 61_706
    assert count(64) == 156 + 2416 + (2 * 2 * 16 + 1) * 120 + 121 * 84 + 85 * 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"residual_learned": True, "residual_scale": 0.0}, {"fixup": True}]
)
def test_residual_blocks_start_as_the_identity(settings, key):
    """SkipInit and Fixup: a stage of equal blocks changes nothing before the first step."""
    # stages of one block each: an equal one, and one that halves
    model = build("resnet", depth=2, width=4, **RELU, **settings)
    x = jax.random.normal(key, (4, 64))

    @jax.jit
    def states(key, x):
        h0, links = model.links(started(model, key, x), x)
        h1 = run(h0, links[:1])
        return h1, run(h1, links[1:2]), run(h1, links[1:3])

    before, after, halved = states(key, x)
    np.testing.assert_array_equal(before, after)
    assert halved.shape == (4, 4, 4, 8)


@pytest.mark.slow
def test_linear_circular_network_is_an_isometry(key, report):
    """Xiao et al. 2018: every singular value of the product of delta-orthogonal layers is 1."""
    model = build("circular_cnn", depth=25, width=3, weights="delta_orthogonal", **LINEAR)
    x = jax.random.normal(key, (4, 64))
    h0, links = model.links(jax.jit(lambda: started(model, key, x))(), x[0])
    values = jacobian_spectrum(links[1:-1], run(h0, links[:1])).log_singular_values
    error = float(np.abs(np.exp(values) - 1).max())
    report("isometry of a circular delta-orthogonal network", error)
    # 24 layers of orthogonal 3 x 3 matrices, each of them orthogonal to some 10 eps
    assert error < 24 * 20 * np.finfo(np.float32).eps
