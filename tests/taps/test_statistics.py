"""Statistics reduced inside the program against the same in NumPy, and closed forms."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_taps import ROUNDINGS, at_once
from hypothesis import given
from jax import lax

from bounds import assert_rounding, gamma
from gradjax import tap
from gradjax.taps import statistics as stats

# Lists of one length, so that one program serves all examples.
numbers = st.lists(
    st.floats(-(2.0**126), 2.0**126, width=32, allow_subnormal=False), min_size=20, max_size=20
)
log_rms = jax.jit(stats.log_rms)


@given(numbers)
def test_log_rms_is_that_of_float64(values):
    x = np.array(values, np.float32)
    with np.errstate(divide="ignore"):
        want = 0.5 * np.log(np.mean(np.square(x.astype(np.float64))))
    # 20 squares and their sum, a log that carries the relative error, and a sum of logs up to 90.
    np.testing.assert_allclose(log_rms(x), want, atol=gamma(24), rtol=gamma(4))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
def test_statistics_of_what_is_not_finite(dtype):
    seen = jax.jit(stats.statistics)(jnp.array([[1.0, 0.0], [np.inf, np.nan]], dtype))
    assert (seen.bad, seen.first_bad, seen.zeros, seen.log_max) == (2.0, 2.0, 0.25, 0.0)
    assert not np.isfinite(seen.log_rms)


def test_a_histogram_has_every_entry_once():
    found = jax.jit(stats.histogram)(np.float32([0.0, 1e-38, 1.0, 1.5, -300.0, 3e38]))
    expected = np.zeros(stats.BINS)
    # 0 and 1e-38 (below 2^-120), 1 and 1.5 (2^0 to 2^8), 300 (2^8 to 2^16), 3e38 (2^120 on)
    np.add.at(expected, [0, 0, 16, 16, 17, 31], 1 / 6)
    assert_rounding(found, expected, terms=7)


def test_units_that_are_dead_flat_or_alike():
    def whole(h, tanh, logistic, same, steps, logits):
        return (
            stats.dead(h),
            stats.flat(tanh, "tanh"),
            stats.flat(logistic, "logistic"),
            stats.spread(same).units,
            stats.spread(steps).examples,
            stats.logits(logits),
        )

    ones = np.ones(8, np.float32)
    # (examples, units)
    h = np.stack([0 * ones, np.arange(8, dtype=np.float32), -ones, ones], axis=1)
    steps = np.broadcast_to(np.arange(3, dtype=np.float32), (4, 3))
    tanh, logistic = np.float32([0.0, 0.5, 0.99, -0.99]), np.float32([0.5, 0.001, 0.999, 0.9])
    masked = np.float32([[0.0, 5.0, -1e9], [0.0, 5.0, -1e9]])
    *found, logits = jax.jit(whole)(h, tanh, logistic, np.ones((4, 3), np.float32), steps, masked)
    assert found == [0.25, 0.5, 0.5, 0.0, 0.0]
    assert_rounding(np.array([logits.deviation, logits.keys]), [2.5, 2.0], terms=8)


def test_a_probe_reduces_inside_the_program():
    def loss(w, x):
        body = lambda h, w: (tap(jnp.tanh(h @ w), "h"), None)
        return jnp.sum(lax.scan(body, x, w)[0] ** 2)

    rng = np.random.default_rng(0)
    w = rng.standard_normal((5, 6, 6), dtype=np.float32)
    x = rng.standard_normal((4, 6), dtype=np.float32)
    whole, reduced = at_once(loss, w, x), at_once(loss, w, x, statistics=True)
    rms = lambda x: np.log(np.sqrt(np.mean(np.square(np.asarray(x)), axis=(1, 2))))
    for name in ("values", "cotangents"):
        exact, found = getattr(whole, name)["h"], getattr(reduced, name)["h"].log_rms
        # A log carries the relative error of its argument.
        np.testing.assert_allclose(found, rms(exact), atol=2 * gamma(ROUNDINGS))
    assert_rounding(reduced.grads, whole.grads, terms=ROUNDINGS)
    assert reduced.values["h"].histogram.shape == (5, stats.BINS)
