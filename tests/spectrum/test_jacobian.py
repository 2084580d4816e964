"""The spectrum of a step's layer product against its layer Jacobians, links and lanes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import DEPTH, N, gaussian, naive, rng

from gradjax.core.step import Scan
from gradjax.spectrum.jacobian import jacobian_spectrum, log_singular_values


def tanh_step(h, w):
    return jnp.tanh(w @ h)


def layer_products(step, h, thetas):
    """The layer Jacobians by jacfwd in a plain loop: an independent path."""
    jacobian = jax.jit(lambda h, theta: (jax.jacfwd(step)(h, theta), step(h, theta)))
    jacobians = []
    for theta in thetas:
        w, h = jacobian(h, theta)
        jacobians.append(np.asarray(w, np.float64))
    return np.stack(jacobians)


@pytest.fixture(scope="module")
def weights():
    return jnp.asarray(1.2 * gaussian(), jnp.float32)


ONES = np.ones(N, np.float32)


@pytest.fixture(scope="module")
def scanned(weights):
    return jacobian_spectrum(tanh_step, ONES, weights)


@pytest.mark.parametrize("tol", [0.0, 1e-12, 1.0, -1e-6, float("nan")])
def test_bad_tolerance(tol):
    with pytest.raises(ValueError, match="tol is"):
        log_singular_values(np.eye(2)[None], tol=tol)


def test_step_is_its_layer_jacobians(weights, scanned):
    factors = layer_products(tanh_step, ONES, weights)
    values = scanned.log_singular_values
    assert values.shape == (N,) and values.dtype == np.float64
    # the Jacobians are float32
    assert np.abs(values - naive(factors)).max() < 1e-3
    assert scanned.layer_log_singular_values is None
    gain = 0.5 * np.log((factors**2).sum((1, 2)) / N)
    assert scanned.log_gain.shape == (DEPTH,) and np.abs(scanned.log_gain - gain).max() < 1e-5
    assert scanned.condition_nats == pytest.approx(values[0] - values[-1])


def test_a_second_call_does_not_compile(weights, scanned):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "make_jaxpr", lambda *a, **k: pytest.fail("the step was traced again"))
        jacobian_spectrum(tanh_step, 2 * ONES, weights + 1)


def test_the_gradient_that_training_sees_and_rank_loss():
    """A custom_vjp step gives the Jacobian of its backward pass; lost rank is an inf condition."""

    @jax.custom_vjp
    def straight_through(x):
        return jnp.sign(x)

    straight_through.defvjp(lambda x: (jnp.sign(x), None), lambda _, g: (2 * g,))

    def step(h, w):
        return straight_through(w @ h)

    dead_unit = (np.arange(N) > 0)[:, None]
    weights = (gaussian() * dead_unit).astype(np.float32)
    found = jacobian_spectrum(step, ONES, weights)
    expected = DEPTH * np.log(2) + naive(weights)[:-1]
    assert np.abs(found.log_singular_values[:-1] - expected).max() < 1e-5
    assert found.log_singular_values[-1] == -np.inf and found.condition_nats == np.inf


def links_of(weights):
    return [(tanh_step, weights[0]), Scan(tanh_step, weights[1:-1]), (tanh_step, weights[-1])]


def test_links_are_the_scan(weights, scanned):
    linked = jacobian_spectrum(links_of(weights), ONES)
    for name in ("log_singular_values", "log_gain", "condition_nats"):
        assert np.abs(getattr(scanned, name) - getattr(linked, name)).max() < 1e-4


@pytest.mark.slow
def test_values_of_each_layer(weights):
    factors = layer_products(tanh_step, ONES, weights)
    each = np.log(np.linalg.svd(factors, compute_uv=False))
    for found in (
        jacobian_spectrum(tanh_step, ONES, weights, layers=True),
        jacobian_spectrum(links_of(weights), ONES, layers=True),
    ):
        assert found.layer_log_singular_values.shape == (DEPTH, N)
        assert np.abs(found.layer_log_singular_values - each).max() < 1e-3


@pytest.mark.slow
def test_links_of_unequal_width_and_stacks():
    embed = jnp.asarray(rng(1).standard_normal((N, 3)), jnp.float32)
    readout = jnp.asarray(gaussian(1)[0, :2], jnp.float32)
    links = [
        (tanh_step, embed),
        Scan(tanh_step, jnp.asarray(gaussian(4, N), jnp.float32)),
        (lambda h, w: w @ h, readout),
    ]
    found = jacobian_spectrum(links, jnp.ones(3), layers=True)
    assert found.log_singular_values.shape == (2,) and found.log_gain.shape == (6,)
    assert np.isfinite(found.layer_log_singular_values).sum(1).tolist() == [3, N, N, N, N, 2]
    lanes = jacobian_spectrum(links, jnp.ones((4, 3)), in_axes=(0, None)).log_singular_values
    assert lanes.shape == (4, 2)
    assert np.abs(lanes - found.log_singular_values).max() < 1e-4


@pytest.mark.slow
def test_pytree_state_and_thetas():
    """An LSTM-like cell: the state is a dict, theta holds an input and a gate."""

    def cell(state, theta):
        c = jax.nn.sigmoid(theta["gate"]) * state["c"] + jnp.tanh(theta["w"] @ state["h"])
        return {"c": c, "h": jnp.tanh(c)}

    thetas = {
        "w": jnp.asarray(gaussian(10, 5), jnp.float32),
        "gate": jnp.asarray(rng().standard_normal((10, 5)), jnp.float32),
    }
    h0 = {"c": jnp.ones(5), "h": jnp.zeros(5)}
    found = jacobian_spectrum(cell, h0, thetas)
    assert found.log_singular_values.shape == (10,)
    assert np.isfinite(found.log_singular_values[:5]).all()


@pytest.mark.slow
def test_keys_as_thetas_are_the_weights_they_draw():
    keys = jax.random.split(jax.random.key(1), DEPTH)
    draw = lambda key: jax.random.normal(key, (N, N)) / np.float32(np.sqrt(N))
    found = jacobian_spectrum(lambda h, key: draw(key) @ h, ONES, keys).log_singular_values
    assert np.abs(found - log_singular_values(jax.jit(jax.vmap(draw))(keys))).max() < 1e-4


@pytest.mark.slow
def test_the_step_keeps_its_dtypes_and_draws():
    """Inside x64, jnp.zeros, random.normal and a dropout mask would be others."""
    seen = []

    def step(h, key):
        noise = jax.random.normal(key, h.shape)
        mask = jax.random.bernoulli(key, 0.9, h.shape)
        seen.append((jnp.zeros(3).dtype, noise.dtype, h.dtype, jnp.arange(3).dtype))
        mixed = noise[:, None] * jnp.outer(noise, h).T.sum(1, keepdims=True)
        return jnp.where(mask, jnp.tanh(mixed).sum(1) + h, 0 * h)

    keys = jax.random.split(jax.random.key(2), DEPTH)
    found = jacobian_spectrum(step, ONES, keys)
    kinds = {tuple(map(str, kinds)) for kinds in seen}
    assert kinds == {("float32", "float32", "float32", "int32")}
    exact = log_singular_values(layer_products(step, ONES, keys))
    assert (np.isfinite(found.log_singular_values) == np.isfinite(exact)).all()


@pytest.mark.slow
def test_lanes_of_inputs_and_of_seeds():
    weights = jnp.asarray(np.stack([1.2 * gaussian(seed=i) for i in range(3)]), jnp.float32)
    inputs = jnp.asarray(rng().standard_normal((3, N)), jnp.float32)
    both = jacobian_spectrum(tanh_step, inputs, weights, in_axes=(0, 0), layers=True)
    one_net = jacobian_spectrum(tanh_step, inputs, weights[0], in_axes=(0, None))
    one_input = jacobian_spectrum(tanh_step, inputs[0], weights, in_axes=(None, 0))
    for found, pick in (
        (both, lambda i: (i, i)),
        (one_net, lambda i: (i, 0)),
        (one_input, lambda i: (0, i)),
    ):
        assert found.log_singular_values.shape == (3, N) and found.log_gain.shape == (3, DEPTH)
        assert found.condition_nats.shape == (3,)
        for lane in range(3):
            i, j = pick(lane)
            by_one = jacobian_spectrum(tanh_step, inputs[i], weights[j], layers=True)
            assert np.abs(found.log_singular_values[lane] - by_one.log_singular_values).max() < 1e-4
            if found is both:
                assert found.layer_log_singular_values.shape == (3, DEPTH, N)
                each = found.layer_log_singular_values[lane] - by_one.layer_log_singular_values
                assert np.abs(each).max() < 1e-4


@pytest.mark.slow
def test_step_on_tracers(weights):
    inputs = jnp.asarray(rng().standard_normal((3, N)), jnp.float32)
    host = jacobian_spectrum(tanh_step, inputs, weights, in_axes=(0, None), layers=True)
    one = lambda h: jacobian_spectrum(tanh_step, h, weights, layers=True)
    traced = jax.jit(jax.vmap(one))(inputs)
    assert traced.info is None
    for a, b in zip(host[:4], traced[:4], strict=True):
        assert a.shape == b.shape and np.abs(a - np.asarray(b)).max() < 1e-3


@pytest.mark.slow
def test_activations_that_overflow_are_named():
    weights = jnp.broadcast_to(1e10 * jnp.eye(4), (8, 4, 4))
    # h is 1, 1e10, inf
    step = lambda h, w: (w @ h) * jnp.abs(w @ h) / jnp.float32(1e10)
    with pytest.warns(UserWarning, match="layer 2"):
        found = jacobian_spectrum(step, jnp.ones(4), weights)
    assert np.isnan(found.log_singular_values).all() and np.isnan(found.condition_nats)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"in_axes": (1, None)}, "in_axes"),
        ({"in_axes": (0, 0), "h0": np.ones((3, 4))}, "leading lengths"),
        ({"h0": np.ones(4, int)}, "floating"),
        ({"step": lambda h, w: (w @ h)[:2]}, r"\(2,\)"),
        ({"thetas": {}}, "no leaves"),
        ({"tol": 5.0}, "tol is"),
    ],
)
def test_bad_steps(kwargs, message):
    arguments = {
        "step": tanh_step,
        "h0": np.ones(4, np.float32),
        "thetas": gaussian(5, 4, dtype=np.float32),
    }
    with pytest.raises(ValueError, match=message):
        jacobian_spectrum(**(arguments | kwargs))
