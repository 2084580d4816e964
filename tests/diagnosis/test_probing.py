"""Statistics reduced inside the program, and evidence against `gradjax.signals` and closed
forms."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import gradjax
from gradjax.diagnosis.probing import Measurement
from gradjax.experiment import config, models
from gradjax.taps import statistics as stats

numbers = st.lists(
    st.floats(-(2.0**126), 2.0**126, width=32, allow_subnormal=False), min_size=1, max_size=20
)


@given(numbers)
def test_log_rms_is_that_of_float64(values):
    x = np.array(values, np.float32)
    with np.errstate(divide="ignore"):
        want = 0.5 * np.log(np.mean(np.square(x.astype(np.float64))))
    got = stats.log_rms(jnp.asarray(x))
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
def test_statistics_of_what_is_not_finite(dtype):
    seen = stats.statistics(jnp.array([[1.0, 0.0], [jnp.inf, jnp.nan]], dtype))
    assert (seen.bad, seen.first_bad, seen.zeros, seen.log_max) == (2.0, 2.0, 0.25, 0.0)
    assert not np.isfinite(seen.log_rms)


def test_a_histogram_has_every_entry_once():
    x = jnp.array([0.0, 1e-38, 1.0, 1.5, -300.0, 3e38])
    found = stats.histogram(x)
    assert found.shape == (stats.BINS,)
    np.testing.assert_allclose(found.sum(), 1.0, rtol=1e-6)
    np.testing.assert_allclose(found[16], 2 / 6, rtol=1e-6)  # 2^0 .. 2^8
    np.testing.assert_allclose(found[17], 1 / 6, rtol=1e-6)  # 2^8 .. 2^16


def test_units_that_are_dead_flat_or_alike():
    h = jnp.stack(
        [jnp.zeros(8), jnp.arange(8.0), -jnp.ones(8), jnp.ones(8)], axis=1
    )  # (examples, units)
    assert stats.dead(h) == 0.25
    assert stats.flat(jnp.array([0.0, 0.5, 0.99, -0.99]), "tanh") == 0.5
    assert stats.flat(jnp.array([0.5, 0.001, 0.999, 0.9]), "logistic") == 0.5
    assert stats.spread(jnp.ones((4, 3))).units == 0.0
    assert stats.spread(jnp.broadcast_to(jnp.arange(3.0), (4, 3))).examples == 0.0
    masked = stats.logits(jnp.array([[0.0, 5.0, -1e9], [0.0, 5.0, -1e9]]))
    np.testing.assert_allclose([masked.deviation, masked.keys], [2.5, 2.0])


def test_a_probe_reduces_inside_the_program():
    def loss(w, x):
        body = lambda h, w: (gradjax.tap(jnp.tanh(h @ w), "h"), None)
        return jnp.sum(jax.lax.scan(body, x, w)[0] ** 2)

    w = jax.random.normal(jax.random.key(0), (5, 6, 6))
    x = jax.random.normal(jax.random.key(1), (4, 6))
    whole, reduced = gradjax.probe(loss, w, x), gradjax.probe(loss, w, x, statistics=True)
    rms = lambda x: np.log(np.sqrt(np.mean(np.square(x), axis=(1, 2))))
    np.testing.assert_allclose(reduced.values["h"].log_rms, rms(whole.values["h"]), atol=1e-5)
    np.testing.assert_allclose(
        reduced.cotangents["h"].log_rms, rms(whole.cotangents["h"]), atol=1e-5
    )
    np.testing.assert_allclose(reduced.grads, whole.grads, rtol=1e-6)
    assert reduced.values["h"].histogram.shape == (5, stats.BINS)


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
