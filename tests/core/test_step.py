"""The step protocol: Jacobians and signals against float64, closed forms, and each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradjax import layer_jacobians, signals
from gradjax.core.step import Scan, check_step, layer_jacobian


def tanh_step(h, w):
    return jnp.tanh(w @ h)


def square_loss(h):
    return jnp.sum(jnp.square(h))


def weights(key, depth=12, width=16, gain=2.0):
    return jax.random.normal(key, (depth, width, width)) * (gain / width**0.5)


def run(step, h, thetas):
    return jax.lax.scan(lambda h, theta: (step(h, theta), None), h, thetas)[0]


def float64_log_gradients(w, h):
    """log ||d loss / d W_l|| by hand in NumPy float64."""
    w, h = np.asarray(w, np.float64), np.asarray(h, np.float64)
    states = [h]
    for matrix in w:
        states.append(np.tanh(matrix @ states[-1]))
    cotangent, norms = 2 * states[-1], []
    for matrix, before, after in zip(w[::-1], states[-2::-1], states[:0:-1], strict=True):
        local = cotangent * (1 - after**2)
        norms.append(np.linalg.norm(np.outer(local, before)))
        cotangent = matrix.T @ local
    return np.log(norms[::-1])


@pytest.mark.slow
def test_layer_jacobians_multiply_to_the_jacobian_of_the_network(key):
    w, h = weights(key), jnp.linspace(-1, 1, 16)
    product = functools.reduce(lambda j, factor: factor @ j, layer_jacobians(tanh_step, h, w))
    np.testing.assert_allclose(
        product, jax.jacfwd(lambda h: run(tanh_step, h, w))(h), rtol=2e-4, atol=1e-4
    )


@pytest.mark.slow
def test_signals_are_float64_gradients(key):
    w, h = weights(key), jnp.linspace(-1, 1, 16)
    measured = signals(tanh_step, h, w, loss=square_loss)
    np.testing.assert_allclose(measured.log_gradient_norm, float64_log_gradients(w, h), atol=1e-4)


def test_signals_are_those_of_the_plain_gradient(key):
    w, h = weights(key), jnp.linspace(-1, 1, 16)
    measured = signals(tanh_step, h, w, loss=square_loss)
    value, (into_h, into_w) = jax.value_and_grad(
        lambda h, w: square_loss(run(tanh_step, h, w)), (0, 1)
    )(h, w)
    assert measured.loss == value
    np.testing.assert_allclose(
        measured.log_gradient_norm, jnp.log(jnp.linalg.norm(into_w, axis=(1, 2))), atol=1e-4
    )
    np.testing.assert_allclose(
        measured.log_cotangent_rms[0], jnp.log(jnp.sqrt(jnp.mean(jnp.square(into_h)))), atol=1e-4
    )


@pytest.mark.parametrize("gain", [0.5, 2.0])
def test_cotangents_survive_ten_thousand_layers(gain):
    """A diagonal network has cotangent gain^L: 2^-10000 and 2^10000, far outside float32 and
    float64."""
    depth = 10_000

    def step(h, theta):  # forward the identity, backward the gain: the activations stay finite
        return h + theta * (h - jax.lax.stop_gradient(h)) * (gain - 1.0)

    measured = signals(step, jnp.ones(4), jnp.ones(depth), loss=jnp.sum)
    expected = np.log(gain) * np.arange(depth, -1, -1)
    np.testing.assert_allclose(measured.log_cotangent_rms, expected, rtol=1e-5, atol=1e-4)


def test_a_plain_float32_gradient_fails_where_signals_do_not():
    """The negative control of the test above."""
    w = jnp.broadcast_to(0.5 * jnp.eye(4), (400, 4, 4))
    linear = lambda h, w: w @ h
    assert jnp.all(jax.grad(lambda h: jnp.sum(run(linear, h, w)))(jnp.ones(4)) == 0)
    measured = signals(linear, jnp.ones(4), w, loss=jnp.sum)
    np.testing.assert_allclose(measured.log_cotangent_rms[0], 400 * np.log(0.5), rtol=1e-6)


@pytest.mark.slow
def test_links_scans_and_mixtures_of_them_agree(key):
    w, h = weights(key), jnp.linspace(-1, 1, 16)
    scanned = signals(tanh_step, h, w, loss=square_loss)
    links = [(tanh_step, matrix) for matrix in w]
    mixed = [links[0], Scan(tanh_step, w[1:-1]), links[-1]]
    for other in (links, mixed, [Scan(tanh_step, w)]):
        assert check_step(other, h) == len(w)
        for a, b in zip(scanned, signals(other, h, loss=square_loss), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)
        np.testing.assert_allclose(
            jnp.stack(layer_jacobians(other, h)), layer_jacobians(tanh_step, h, w), atol=1e-6
        )


def test_links_of_unequal_width(key):
    a, b = jax.random.normal(key, (7, 4)), jax.random.normal(key, (3, 7))
    links = [(lambda h, w: jnp.tanh(w @ h), a), (lambda h, w: w @ h, b)]
    jacobians = layer_jacobians(links, jnp.ones(4))
    assert [j.shape for j in jacobians] == [(7, 4), (3, 7)]
    np.testing.assert_allclose(jacobians[1], b, atol=1e-6)


def test_a_pytree_state_is_one_vector(key):
    """An LSTM's state (c, h) has one Jacobian of both parts."""

    def step(state, x):
        c, h = state
        return (0.9 * c + h * x, jnp.tanh(c))

    jacobian, after = layer_jacobian(step, (jnp.ones(3), jnp.zeros(3)), jnp.float32(2.0))
    expected = np.block(
        [
            [0.9 * np.eye(3), 2 * np.eye(3)],
            [np.diag(np.full(3, 1 - np.tanh(1) ** 2)), np.zeros((3, 3))],
        ]
    )
    np.testing.assert_allclose(jacobian, expected, atol=1e-6)
    np.testing.assert_allclose(after[0], np.full(3, 0.9))


@pytest.mark.slow
def test_thetas_may_be_keys_from_which_the_step_draws(key):
    def step(h, key):
        return tanh_step(h, jax.random.normal(key, (16, 16)) * 0.5)

    keys, h = jax.random.split(key, 30), jnp.linspace(-1, 1, 16)
    w = jax.vmap(lambda key: jax.random.normal(key, (16, 16)) * 0.5)(keys)
    drawn, held = (
        signals(step, h, keys, loss=square_loss),
        signals(tanh_step, h, w, loss=square_loss),
    )
    np.testing.assert_allclose(drawn.log_cotangent_rms, held.log_cotangent_rms, atol=1e-4)
    assert np.all(np.isneginf(drawn.log_gradient_norm))  # no parameter is there to have a gradient


@pytest.mark.slow
def test_jit_vmap_and_grad_compose(key):
    w, hs = weights(key), jax.random.normal(key, (5, 16))
    growth = lambda h, w: signals(tanh_step, h, w, loss=square_loss).log_cotangent_rms[0]
    batched = jax.jit(jax.vmap(growth, (0, None)))(hs, w)
    np.testing.assert_allclose(batched, jnp.stack([growth(h, w) for h in hs]), atol=1e-4)
    slope = jax.grad(lambda g: growth(hs[0], g * w))(jnp.float32(1.0))
    low, high = growth(hs[0], 0.999 * w), growth(hs[0], 1.001 * w)
    np.testing.assert_allclose(slope, (high - low) / 0.002, rtol=0.02)


def test_compilation_does_not_depend_on_depth(key):
    """The program of 1,000 layers has as many equations as that of 10."""

    def size(depth):
        w = jnp.zeros((depth, 8, 8))
        return str(
            jax.make_jaxpr(lambda w: signals(tanh_step, jnp.ones(8), w, loss=jnp.sum))(w)
        ).count(" = ")

    assert size(1000) == size(10)


def test_an_overflowing_forward_pass_is_reported_not_hidden():
    w = jnp.broadcast_to(10.0 * jnp.eye(4), (50, 4, 4))
    measured = signals(lambda h, w: w @ h, jnp.ones(4), w, loss=jnp.sum)
    first = int(np.argmax(~np.isfinite(measured.log_activation_rms)))
    assert first == 39  # 1e39 > 3.4e38


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (lambda h, w: h[:3], np.ones(4, np.float32), np.ones((2, 4))),
            r"maps \(4,\) float32 to \(3,\) float32",
        ),
        ((lambda h, w: h, np.ones(4, np.int32), np.ones((2, 4))), r"\(4,\) int32"),
        (
            (lambda h, w: h, np.ones(4, np.float32), {"a": np.ones((2, 1)), "b": np.ones((3, 1))}),
            "lengths 2, 3",
        ),
        ((lambda h, w: h, np.ones(4, np.float32), {}), "no leaves"),
        ((lambda h, w: h, np.ones(4, np.float32), np.float32(1)), "lengths None"),
        ((lambda h, w: h, np.ones(4, np.float32), np.ones((0, 4))), "lengths 0"),
        ((lambda h, w: h, {}, np.ones((2, 4))), "floating"),
        (("tanh", np.ones(4, np.float32), np.ones((2, 4))), "got str"),
        (([], np.ones(4, np.float32)), "empty"),
        (
            ([(tanh_step, np.ones((3, 5), np.float32))], np.ones(4, np.float32)),
            r"link 0 does not accept .*\(4,\)",
        ),
        (([tanh_step], np.ones(4, np.float32)), "link 0 is function"),
        (
            ([(tanh_step, np.ones((4, 4)))], np.ones(4, np.float32), np.ones(2)),
            "leave `thetas` out",
        ),
    ],
)
def test_bad_input_is_refused_with_its_shapes(arguments, message):
    with pytest.raises(ValueError, match=message):
        signals(*arguments, loss=jnp.sum)


def test_a_loss_that_is_no_scalar_is_refused(key):
    with pytest.raises(ValueError, match=r"\(16,\) float32; a scalar"):
        signals(tanh_step, jnp.ones(16), weights(key), loss=lambda h: h)
