"""The step protocol: Jacobians and signals against float64, closed forms, and each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bounds import gamma
from gradjax import layer_jacobians, signals
from gradjax.core.step import Scan, check_step, layer_jacobian

DEPTH, WIDTH = 12, 16


def tanh_step(h, w):
    return jnp.tanh(w @ h)


def linear_step(h, w):
    return w @ h


def square_loss(h):
    return jnp.sum(jnp.square(h))


@functools.partial(jax.jit, static_argnames=("step", "loss"))
def _signals(step, h0, thetas, loss):
    return signals(step, h0, thetas, loss=loss)


def signals_of(step, h0, thetas=None, *, loss):
    """`signals` as one compiled program."""
    if callable(step):
        return _signals(step, h0, thetas, loss)
    return jax.jit(lambda h: signals(step, h, loss=loss))(h0)


@pytest.fixture(scope="module")
def weights():
    draw = np.random.default_rng(0).standard_normal((DEPTH, WIDTH, WIDTH))
    return jnp.asarray(draw * (2.0 / WIDTH**0.5), jnp.float32)


H0 = np.linspace(-1, 1, WIDTH, dtype=np.float32)


@pytest.fixture(scope="module")
def measured(weights):
    return signals_of(tanh_step, H0, weights, loss=square_loss)


def run(step, h, thetas):
    return jax.lax.scan(lambda h, theta: (step(h, theta), None), h, thetas)[0]


def by_hand(w):
    """(layer Jacobians, log ||d loss / d W_l||, log cotangent rms) in NumPy float64."""
    w, states = np.asarray(w, np.float64), [H0.astype(np.float64)]
    for matrix in w:
        states.append(np.tanh(matrix @ states[-1]))
    jacobians = [(1 - h[:, None] ** 2) * matrix for matrix, h in zip(w, states[1:], strict=True)]
    cotangents, norms = [2 * states[-1]], []
    for matrix, before, after in zip(w[::-1], states[-2::-1], states[:0:-1], strict=True):
        local = cotangents[-1] * (1 - after**2)
        norms.append(np.linalg.norm(np.outer(local, before)))
        cotangents.append(matrix.T @ local)
    rms = [np.sqrt(np.mean(c**2)) for c in cotangents]
    return np.stack(jacobians), np.log(norms[::-1]), np.log(rms[::-1])


# To first order an error of one rounding per operation reaches every later layer, amplified by at
# most the norm of the product in between, which the tolerance takes as 30.
TOLERANCE = 30 * gamma(DEPTH * (WIDTH + 10))


def test_layer_jacobians_are_those_of_float64(weights):
    found = jax.jit(functools.partial(layer_jacobians, tanh_step))(H0, weights)
    np.testing.assert_allclose(found, by_hand(weights)[0], atol=TOLERANCE)


def test_signals_are_float64_gradients(weights, measured):
    _, norms, cotangents = by_hand(weights)
    np.testing.assert_allclose(measured.log_gradient_norm, norms, atol=TOLERANCE)
    np.testing.assert_allclose(measured.log_cotangent_rms, cotangents, atol=TOLERANCE)


@pytest.mark.slow
def test_signals_are_those_of_the_plain_gradient(weights, measured):
    @jax.jit
    def plain(h, w):
        loss = lambda h, w: square_loss(run(tanh_step, h, w))
        return jax.value_and_grad(loss, (0, 1))(h, w)

    value, (into_h, into_w) = plain(H0, weights)
    np.testing.assert_allclose(measured.loss, value, rtol=TOLERANCE)
    norms = np.linalg.norm(np.asarray(into_w), axis=(1, 2))
    np.testing.assert_allclose(measured.log_gradient_norm, np.log(norms), atol=TOLERANCE)
    rms = np.sqrt(np.mean(np.square(into_h)))
    np.testing.assert_allclose(measured.log_cotangent_rms[0], np.log(rms), atol=TOLERANCE)


def gated_step(h, gain):
    """The identity forward, `gain` backward: the activations stay finite."""
    return h + (h - jax.lax.stop_gradient(h)) * (gain - 1.0)


def test_cotangents_survive_ten_thousand_layers():
    """The cotangent is gain^L: 2^-10000 and 2^10000, far outside float32 and float64."""
    depth = 10_000
    for gain in (0.5, 2.0):
        thetas = np.full(depth, gain, np.float32)
        found = signals_of(gated_step, np.ones(4, np.float32), thetas, loss=jnp.sum)
        expected = np.log(gain) * np.arange(depth, -1, -1)
        np.testing.assert_allclose(found.log_cotangent_rms, expected, rtol=1e-5, atol=1e-4)


def test_a_plain_float32_gradient_fails_where_signals_do_not():
    """The negative control of the test above."""
    w, ones = np.broadcast_to(0.5 * np.eye(4, dtype=np.float32), (400, 4, 4)), np.ones(4)
    ones = ones.astype(np.float32)
    assert not jax.jit(jax.grad(lambda h: jnp.sum(run(linear_step, h, w))))(ones).any()
    found = signals_of(linear_step, ones, w, loss=jnp.sum)
    np.testing.assert_allclose(found.log_cotangent_rms[0], 400 * np.log(0.5), rtol=1e-6)


def test_an_overflowing_forward_pass_is_reported_not_hidden():
    w = np.broadcast_to(10.0 * np.eye(4, dtype=np.float32), (400, 4, 4))
    found = signals_of(linear_step, np.ones(4, np.float32), w, loss=jnp.sum)
    # 1e39 is beyond float32's 3.4e38
    assert int(np.argmax(~np.isfinite(found.log_activation_rms))) == 39


@pytest.mark.slow
def test_links_scans_and_mixtures_of_them_agree(weights, measured):
    links = [(tanh_step, matrix) for matrix in weights]
    mixed = [links[0], Scan(tanh_step, weights[1:-1]), links[-1]]
    exact = by_hand(weights)[0]
    for other in (links, mixed, [Scan(tanh_step, weights)]):
        assert check_step(other, H0) == len(weights)
        for a, b in zip(measured, signals_of(other, H0, loss=square_loss), strict=True):
            np.testing.assert_allclose(a, b, atol=TOLERANCE)
        jacobians = jax.jit(lambda h, other=other: layer_jacobians(other, h))(H0)
        np.testing.assert_allclose(np.stack(jacobians), exact, atol=TOLERANCE)


def test_links_of_unequal_width():
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((7, 4), (3, 7)))
    links = [(tanh_step, a), (linear_step, b)]
    jacobians = jax.jit(lambda h: layer_jacobians(links, h))(np.ones(4, np.float32))
    assert [j.shape for j in jacobians] == [(7, 4), (3, 7)]
    np.testing.assert_allclose(jacobians[1], b, atol=gamma(7) * float(jnp.abs(b).max()))


def test_a_pytree_state_is_one_vector():
    """An LSTM's state (c, h) has one Jacobian of both parts."""

    def step(state, x):
        c, h = state
        return (0.9 * c + h * x, jnp.tanh(c))

    state = (np.ones(3, np.float32), np.zeros(3, np.float32))
    jacobian, after = jax.jit(functools.partial(layer_jacobian, step))(state, np.float32(2.0))
    slope = np.diag(np.full(3, 1 - np.tanh(1) ** 2))
    expected = np.block([[0.9 * np.eye(3), 2 * np.eye(3)], [slope, np.zeros((3, 3))]])
    np.testing.assert_allclose(jacobian, expected, atol=1e-6)
    np.testing.assert_allclose(after[0], np.full(3, 0.9), rtol=1e-6)


@pytest.mark.slow
def test_thetas_may_be_keys_from_which_the_step_draws(key):
    def draw(key):
        return jax.random.normal(key, (WIDTH, WIDTH)) * 0.5

    keys = jax.random.split(key, DEPTH)
    drawn = signals_of(lambda h, key: tanh_step(h, draw(key)), H0, keys, loss=square_loss)
    held = signals_of(tanh_step, H0, jax.jit(jax.vmap(draw))(keys), loss=square_loss)
    np.testing.assert_allclose(drawn.log_cotangent_rms, held.log_cotangent_rms, atol=1e-4)
    # no parameter is there to have a gradient
    assert np.all(np.isneginf(drawn.log_gradient_norm))


@pytest.mark.slow
def test_jit_vmap_and_grad_compose(key, weights):
    hs = jax.random.normal(key, (5, WIDTH))

    def growth(h, w):
        return signals(tanh_step, h, w, loss=square_loss).log_cotangent_rms[0]

    batched, one = jax.jit(jax.vmap(growth, (0, None)))(hs, weights), jax.jit(growth)
    np.testing.assert_allclose(batched, np.stack([one(h, weights) for h in hs]), atol=TOLERANCE)
    slope = jax.jit(jax.grad(lambda g: growth(hs[0], g * weights)))(jnp.float32(1.0))
    low, high = one(hs[0], 0.999 * weights), one(hs[0], 1.001 * weights)
    np.testing.assert_allclose(slope, (high - low) / 0.002, rtol=0.02)


def test_compilation_does_not_depend_on_depth():
    """The program of 1,000 layers has as many equations as that of 10."""

    def size(depth):
        w = jax.ShapeDtypeStruct((depth, 8, 8), jnp.float32)
        program = jax.make_jaxpr(lambda w: signals(tanh_step, jnp.ones(8), w, loss=jnp.sum))(w)
        return str(program).count(" = ")

    assert size(1000) == size(10)


ONES = np.ones(4, np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((lambda h, w: h[:3], ONES, np.ones((2, 4))), r"maps \(4,\) float32 to \(3,\) float32"),
        ((lambda h, w: h, np.ones(4, np.int32), np.ones((2, 4))), r"\(4,\) int32"),
        ((lambda h, w: h, ONES, {"a": np.ones((2, 1)), "b": np.ones((3, 1))}), "lengths 2, 3"),
        ((lambda h, w: h, ONES, {}), "no leaves"),
        ((lambda h, w: h, ONES, np.float32(1)), "lengths None"),
        ((lambda h, w: h, ONES, np.ones((0, 4))), "lengths 0"),
        ((lambda h, w: h, {}, np.ones((2, 4))), "floating"),
        (("tanh", ONES, np.ones((2, 4))), "got str"),
        (([], ONES), "empty"),
        (([(tanh_step, np.ones((3, 5), np.float32))], ONES), r"link 0 does not accept .*\(4,\)"),
        (([tanh_step], ONES), "link 0 is function"),
        (([(tanh_step, np.ones((4, 4)))], ONES, np.ones(2)), "leave `thetas` out"),
    ],
)
def test_bad_input_is_refused_with_its_shapes(arguments, message):
    with pytest.raises(ValueError, match=message):
        signals(*arguments, loss=jnp.sum)


def test_a_loss_that_is_no_scalar_is_refused(weights):
    with pytest.raises(ValueError, match=r"\(16,\) float32; a scalar"):
        signals_of(tanh_step, H0, weights, loss=lambda h: h)
