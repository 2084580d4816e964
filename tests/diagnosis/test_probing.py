"""Evidence against closed forms and against `gradjax.signals`, beyond the range of float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradjax
from gradjax.diagnosis.probing import Measurement
from gradjax.experiment import config, models


def test_a_cotangent_beyond_the_range_of_float32_is_that_of_the_closed_form():
    """Every layer is twice an orthogonal matrix, so that norms double exactly."""
    depth, width = 160, 4
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((width, width)))[0]
    ws = jnp.asarray(np.tile(2 * q, (depth, 1, 1)), jnp.float32)
    x = 1e-30 * jnp.eye(width)

    def loss(ws, x):
        return jnp.sum(jax.lax.scan(lambda h, w: (gradjax.tap(h @ w, "h"), None), x, ws)[0])

    evidence = Measurement(loss, ws, (x,))()
    assert len(evidence.layers) == depth
    # 2 width + 1 roundings per layer, of relative size 2^-24 each, add up over the layers
    bound = depth * (2 * width + 1) * 2.0**-24 * 4
    log2 = np.log(2.0)
    layer = np.arange(1, depth + 1)
    at_input = np.log(1e-30) - 0.5 * np.log(width)
    np.testing.assert_allclose(evidence.log_activation, at_input + layer * log2, atol=bound)
    np.testing.assert_allclose(evidence.log_cotangent, (depth - layer) * log2, atol=bound)
    assert evidence.log_cotangent[0] > np.log(np.finfo(np.float32).max)
    # dL/dw_l = h_(l-1)^T g_l with h orthogonal times 1e-30 2^(l-1), and |g_l| = width 2^(depth - l)
    expected = np.log(1e-30) + (depth - 1) * log2 + np.log(width)
    np.testing.assert_allclose(evidence.log_gradient, expected, atol=bound)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "sigma_w", "depth", "size"),
    [("tanh", 1.3, 20, 1.0), ("tanh", 0.5, 300, 1.0), ("linear", 2.0, 160, 1e-30)],
)
def test_evidence_agrees_with_signals_beyond_the_range_of_float32(activation, sigma_w, depth, size):
    """Gradients of e^-200 and e^+110 at the first layer; linear, for an exploding tanh is chaotic
    in its rounding."""
    settings = {
        "model.depth": depth,
        "model.width": 32,
        "model.sigma_w": sigma_w,
        "model.activation": activation,
    }
    settings |= {"model.sigma_b": 0.0} if activation == "linear" else {}
    model = models.build(config.replace(config.Experiment(), settings).model, 10)
    x = size * jax.random.normal(jax.random.key(1), (8, 16))
    variables = model.init(jax.random.key(0), x)
    of_logits = lambda logits: jnp.mean(logits)
    signals = gradjax.signals(model.links(variables, x)[1], x, loss=of_logits)
    evidence = Measurement(
        lambda p, x: of_logits(model.apply({"params": p}, x)), variables["params"], (x,)
    )()
    assert evidence.hidden == depth
    hidden = slice(0, depth)
    np.testing.assert_allclose(
        evidence.log_activation[hidden], signals.log_activation_rms[1:-1], atol=1e-3
    )
    np.testing.assert_allclose(
        evidence.log_cotangent[hidden], signals.log_cotangent_rms[1:-1], atol=2e-3
    )
    np.testing.assert_allclose(evidence.log_gradient, signals.log_gradient_norm, atol=2e-3)
    growth = abs(float(signals.log_cotangent_rms[1] - signals.log_cotangent_rms[-2]))
    assert depth < 100 or growth > 88  # else nothing left the range


@pytest.mark.parametrize(("gain", "steps"), [(0.8, 400), (0.5, 150), (1.3, 320)])
def test_a_recurrence_is_measured_beyond_the_range_of_float32(gain, steps):
    """A linear recurrence: each step back multiplies the cotangent by the gain."""
    w = gain * jnp.linalg.qr(jax.random.normal(jax.random.key(0), (16, 16)))[0]

    def loss(w, h, inputs):
        h, _ = jax.lax.scan(lambda h, u: (gradjax.tap(h @ w + u, "h"), None), h, inputs)
        return jnp.mean(jnp.sin(h))

    inputs = 1e-3 * jax.random.normal(jax.random.key(1), (steps, 4, 16))
    evidence = Measurement(loss, w, (jnp.zeros((4, 16)), inputs))()
    ((_, _, back),) = evidence.recurrences
    measured = back[0] - back[-1]
    # one rounding of the product and one of the logarithm for each step
    expected = (steps - 1) * np.log(np.float64(gain))
    assert abs(measured - expected) < steps * 16 * np.finfo(np.float32).eps
