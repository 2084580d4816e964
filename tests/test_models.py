"""One contract for every model: shapes, jit, vmap over seeds, finite gradients, and its links are itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradjax.activations import ACTIVATIONS
from gradjax.models import MLP
from gradjax.models.layers import Dropout
from gradjax.step import Scan, check_step

VARIANTS = {
    "plain": {},
    "one_layer": {"depth": 1},
    "orthogonal": {"weights": "orthogonal"},
    "residual": {"residual": True, "residual_scale": 0.1},
    "layernorm": {"normalization": "layernorm"},
    "batchnorm": {"normalization": "batchnorm"},
    "dropout": {"dropout": 0.3},
    "relu": {"activation": "relu", "sigma_w": 2**0.5, "sigma_b": 0.0},
}


def build(**options):
    return MLP(**{"num_outputs": 10, "depth": 12, "width": 32, "sigma_w": 1.3, "sigma_b": 0.2} | options)


def init(model, key, x):
    return model.init({"params": key, "dropout": key}, x, train=True)


def apply(model, variables, x, key):
    return model.apply(variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"])[0]


def first_step(model, variables, x):
    h, ((step, theta), *_) = model.links(variables, x)
    return step(h, theta)


@pytest.fixture
def x(key):
    return jax.random.normal(key, (8, 64))


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_contract(options, key, x):
    model = build(**options)
    variables = init(model, key, x)
    loss = lambda params: jnp.mean(apply(model, {**variables, "params": params}, x, key) ** 2)
    gradients = jax.jit(jax.grad(loss))(variables["params"])
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradients))
    seeds = jax.vmap(lambda key: init(model, key, x))(jax.random.split(key, 3))
    assert jax.tree.leaves(seeds)[0].shape[0] == 3
    assert apply(model, variables, x, key).shape == (8, 10)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_links_are_the_network(options, key, x):
    model = build(**options)
    variables = init(model, key, x)
    h, links = model.links(variables, x, key)
    assert check_step(links, h) == model.depth + 1
    for link in links:
        h = (
            jax.lax.scan(lambda h, t, s=link[0]: (s(h, t), None), h, link[1])[0]
            if type(link) is Scan
            else link[0](h, link[1])
        )
    if model.dropout is None:  # its masks are drawn from other keys
        np.testing.assert_allclose(h, apply(model, variables, x, key), atol=1e-5)
    assert h.shape == (8, 10)


@pytest.mark.parametrize("weights", ["gaussian", "orthogonal"])
@pytest.mark.parametrize("features", [64, 300])
def test_weights_have_the_mean_field_variance(weights, features, key):
    """E z^2 = sigma_w^2 E x^2, whichever way the width changes; sigma_w 5% off is told apart."""
    x = jax.random.normal(key, (features,))
    keys = jax.random.split(key, 400)
    model = build(weights=weights, width=128, depth=1, sigma_w=1.7, sigma_b=0.0, activation="linear")
    z = jax.vmap(lambda k: first_step(model, init(model, k, x), x))(keys)
    each = jnp.mean(z**2, axis=1) / jnp.mean(x**2)
    error = float(each.std()) / 20 + 1e-6
    assert abs(float(each.mean()) - 1.7**2) < 3 * error
    assert abs(float(each.mean()) - (1.05 * 1.7) ** 2) > 3 * error


def test_orthogonal_layers_are_isometries(key, x):
    model = build(weights="orthogonal", sigma_w=1.0)
    kernel = init(model, key, x)["params"]["layers"]["dense"]["kernel"]
    np.testing.assert_allclose(
        jnp.einsum("lij,lik->ljk", kernel, kernel), np.broadcast_to(np.eye(32), (11, 32, 32)), atol=1e-5
    )


def test_every_float_may_be_traced(key, x):
    def output(sigma_w, sigma_b, residual_scale, rate):
        model = build(sigma_w=sigma_w, sigma_b=sigma_b, residual=True, residual_scale=residual_scale, dropout=rate)
        return apply(model, init(model, key, x), x, key)

    values = [jnp.array([1.0, 1.5]), jnp.array([0.0, 0.1]), jnp.array([0.5, 1.0]), jnp.array([0.0, 0.4])]
    batched = jax.jit(jax.vmap(output))(*values)
    for i in range(2):
        np.testing.assert_allclose(batched[i], output(*(float(v[i]) for v in values)), atol=2e-4)


def test_dropout_keeps_the_mean_and_drops_its_share(key):
    h = jnp.ones(100_000)
    out = Dropout(0.3).apply({}, h, rngs={"dropout": key})
    share = float(jnp.mean(out == 0))
    assert abs(share - 0.3) < 3 * (0.3 * 0.7 / 1e5) ** 0.5
    np.testing.assert_allclose(out[out > 0], 1 / 0.7, rtol=1e-6)


def test_dropout_needs_a_key_for_its_links(key, x):
    model = build(dropout=0.1)
    with pytest.raises(ValueError, match=r"key=jax\.random\.key"):
        model.links(init(model, key, x), x)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_elementwise_with_finite_slopes(name):
    x = jnp.linspace(-30, 30, 101)
    assert ACTIVATIONS[name](x).shape == x.shape
    assert jnp.isfinite(jax.vmap(jax.grad(ACTIVATIONS[name]))(x)).all()


def test_compile_time_does_not_depend_on_depth(key, x):
    size = lambda depth: str(jax.make_jaxpr(lambda k: init(build(depth=depth), k, x))(key)).count(" = ")
    assert size(10_000) == size(10)


@pytest.mark.parametrize("options", [{"depth": 12}, {"depth": 19, "normalization": "batchnorm", "residual": True}])
def test_rematerialised_layers_are_the_same_to_rounding(options, key, x):
    """Also where sqrt(depth) does not divide the depth, running statistics included."""
    plain, remat = (MLP(num_outputs=5, width=16, **options, remat=remat) for remat in (False, True))
    variables = plain.init({"params": key}, x, train=True)

    def run(model):
        def loss(params):
            out, changed = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
            return jnp.sum(out**2), changed

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(a).max()))

    jax.tree.map(close, run(plain), run(remat))
