"""The parts that architectures share, each by its definition."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bounds import assert_rounding
from gradjax.core.activations import ACTIVATIONS, at_depth, tailored_slope
from gradjax.experiment.models.layers import Dense, Dropout, normalize, standardized


def test_weights_have_the_mean_field_variance(key):
    """E z^2 = sigma_w^2 E x^2, whichever way the width changes; sigma_w 5% off is detected."""

    @jax.jit
    def lengths(keys):
        found = {}
        for features in (16, 75):
            x = jax.random.normal(key, (features,))
            for weights in ("gaussian", "orthogonal"):
                layer = Dense(32, weights, sigma_w=1.7)
                z = jax.vmap(lambda k, layer=layer, x=x: layer.init_with_output(k, x)[0])(keys)
                found[weights, features] = jnp.mean(z**2, axis=1) / jnp.mean(x**2)
        return list(found.values())

    for each in lengths(jax.random.split(key, 300)):
        error = float(each.std()) / 300**0.5 + 1e-6
        assert abs(float(each.mean()) - 1.7**2) < 3 * error
        assert abs(float(each.mean()) - (1.05 * 1.7) ** 2) > 3 * error


def test_normalisations_by_their_definition(key):
    class One(nn.Module):
        kind: str

        @nn.compact
        def __call__(self, z, train):
            return normalize(self.kind, z, train)

    z = 3 + 2 * jax.random.normal(key, (64, 16))
    kinds = ("layernorm", "rmsnorm", "batchnorm")

    @jax.jit
    def all_kinds(z):
        found = [One(kind).init_with_output(key, z, True) for kind in kinds]
        stats = {"norm": {"mean": found[2][1]["batch_stats"]["norm"]["mean"] + 1}}
        stats["norm"]["var"] = jnp.full(16, 4.0)
        tested = One("batchnorm").apply({**found[2][1], "batch_stats": stats}, z, False)
        return [out for out, _ in found], stats["norm"]["mean"], tested

    (layer, rms, batch), mean, tested = all_kinds(z)
    z, mean = np.asarray(z, np.float64), np.asarray(mean, np.float64)
    over_layer = (z - z.mean(1, keepdims=True)) / np.sqrt(z.var(1, keepdims=True) + 1e-6)
    over_batch = (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5)
    root = np.sqrt((z**2).mean(1, keepdims=True) + 1e-6)
    # Flax takes E z^2 - (E z)^2 for the variance: cancellation multiplies the sums' rounding by
    # (9 + 4) / 4, and a division and a root come on top
    assert_rounding(layer, over_layer, terms=16 + 10, size=4 * (1 + np.abs(over_layer)))
    assert_rounding(rms, z / root, terms=16 + 10)
    assert_rounding(batch, over_batch, terms=64 + 10, size=4 * (1 + np.abs(over_batch)))
    # at test time the running averages, here moved by 1 and 4
    assert_rounding(tested, (z - mean) / np.sqrt(4 + 1e-5), terms=10, size=10)


def test_standardised_weights(key):
    """Mean 0 and square 1 / fan_in per unit, times sigma_w, at any mean and scale of the kernel."""
    x = jax.random.normal(key, (8, 24))
    layer = Dense(5, sigma_w=1.7, weight_standardization=True)

    @jax.jit
    def outputs(key, x):
        variables = layer.init(key, x)
        kernel = variables["params"]["kernel"]
        scaled = {"params": {**variables["params"], "kernel": 4 * kernel + 1}}
        conv = standardized(3 + jax.random.normal(key, (3, 3, 8, 5)))
        return conv, standardized(kernel), layer.apply(variables, x), layer.apply(scaled, x)

    conv, own, plain, scaled = outputs(key, x)
    w = np.asarray(conv, np.float64).reshape(72, 5)
    # the kernel's mean, 3, is subtracted: its rounding stands beside weights of 1 / sqrt(72)
    assert_rounding(w.mean(0), np.zeros(5), terms=72, size=4 / 72**0.5, dtype=np.float32)
    assert_rounding((w**2).sum(0), np.ones(5), terms=3 * 72, size=4.0, dtype=np.float32)
    z = 1.7 * np.asarray(x, np.float64) @ np.asarray(own, np.float64)
    size = 1.7 * np.abs(x) @ np.abs(own)
    assert_rounding(plain, z, terms=24 + 4, size=size)
    # there 4 w + 1 is rounded at a size of 2 to 5 where w itself is below 1
    assert_rounding(scaled, plain, terms=3 * 24, size=5 * size)


def test_tailored_relu_brings_orthogonal_inputs_to_its_correlation():
    """.9 after as many layers as the network has; ReLU at its critical start, and a slope for fewer
    layers, fail."""
    width = 2000
    noise = np.random.default_rng(0).standard_normal((20, 30, 2, width), np.float32)

    def last(activation, sigma_w, layers=30):
        phi = at_depth(activation, layers).phi

        def layer(h, own):
            """W h of two states without W: two Gaussian vectors with their covariances."""
            root = jnp.linalg.cholesky(h @ h.T / width + 1e-6 * jnp.eye(2))
            return phi(sigma_w * root @ own), None

        def correlation(noise):
            h, _ = jax.lax.scan(layer, width**0.5 * jnp.eye(2, width), noise)
            return (h[0] @ h[1]) / jnp.linalg.norm(h[0]) / jnp.linalg.norm(h[1])

        return np.asarray(jax.jit(jax.vmap(correlation))(noise))

    found, relu = last("tailored_relu", 1.0), last("relu", 2**0.5)
    shorter = last("tailored_relu", 1.0, layers=12)
    assert abs(found.mean() - 0.9) < 3 * found.std() / 20**0.5 + 0.001 < 0.02
    assert relu.mean() > 0.95 < shorter.mean()


def test_tailored_slopes_are_the_published_ones():
    """The authors' code gives .6291800290 for its ResNet-101, whose branches and skips compose the
    map thus, at .75."""

    def resnet(f, skip=0.6**2):
        def branch(c):
            return f(f(f(c)))

        c = 0.0
        for blocks in (3, 4, 23, 3):
            for block in range(blocks):
                c = skip * (c if block else f(c)) + (1 - skip) * branch(c)
        return max(f(c), branch(0.0))

    assert abs(tailored_slope(resnet, 0.75) - 0.6291800290) < 1e-8
    assert abs(tailored_slope(resnet, 0.76) - 0.6291800290) > 1e-3
    assert tailored_slope(1) == 0.0  # one layer of ReLU brings orthogonal inputs to 1 / pi


def test_dropout_keeps_the_mean_and_drops_its_fraction(key):
    h = jnp.ones(100_000)
    out = np.asarray(jax.jit(lambda: Dropout(0.3).apply({}, h, rngs={"dropout": key}))())
    assert abs(np.mean(out == 0) - 0.3) < 3 * (0.3 * 0.7 / 1e5) ** 0.5
    kept = out[out > 0]
    assert_rounding(kept, np.full(len(kept), 1 / 0.7), terms=3)


def test_activations_are_elementwise_with_finite_slopes():
    @jax.jit
    def all_of_them(x):
        return [(phi(x), jax.vmap(jax.grad(phi))(x)) for phi in ACTIVATIONS.values()]

    for name, (value, slope) in zip(
        ACTIVATIONS, all_of_them(jnp.linspace(-30, 30, 101)), strict=True
    ):
        assert value.shape == (101,) and np.isfinite(slope).all(), name
