"""Slow growth, losses and gradients of 0: one line each, and none from healthy trainings."""

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

import gradjax
from gradjax.monitor.trend import FIRST_STEPS, Trend

WINDOW = 64


def follow(norms, losses=None, chunk=8):
    """The texts for (steps, quantities) log2 norms and (steps,) losses of one lane."""
    norms = np.asarray(norms, float)[:, None]
    losses = np.ones(len(norms)) if losses is None else np.asarray(losses, float)
    trend, found = Trend(WINDOW), []
    for k in range(0, len(norms), chunk):
        rows = slice(k, k + chunk)
        steps, known = list(range(len(norms)))[rows], np.ones(len(norms[rows]), bool)
        seen = losses[rows, None]
        found += trend.new_alerts(steps, norms[rows], seen, known, np.ones(1, bool))
    return [(step, text) for step, _, text in found]


def three(column):
    """The same column for gradient, update and parameters at rest."""
    still = np.zeros(len(column))
    return np.stack([column, column, still], -1)


@given(st.floats(1.02, 2.0), st.integers(1, 16))
def test_slow_growth_is_announced_once_for_each_norm(factor, chunk):
    steps = int(40 / np.log2(factor))
    found = follow(three(np.arange(steps) * np.log2(factor)), chunk=chunk)
    assert [text.split(" has")[0] for _, text in found] == [
        "norm of the gradient",
        "norm of the update",
    ]
    middle = (FIRST_STEPS - 1) / 2
    # announced in the step in which it passes 2^20, however many steps are read at once
    assert found[0][0] == pytest.approx(middle + 20 / np.log2(factor), abs=1.01)


def test_losses_that_tell_more_than_the_gradients():
    calm = three(np.zeros(200))
    jumps = np.where(np.arange(200) == 150, 3e6, 1.0)
    assert [step for step, text in follow(calm, jumps) if "a million times" in text] == [150]
    for bad in (np.nan, np.inf):
        found = follow(calm, np.where(np.arange(200) >= 40, bad, 1.0))
        assert [(step, "although the gradient is finite" in text) for step, text in found] == [
            (40, True)
        ]
    # with a gradient that is not finite the monitor has a failure of its own
    bad_gradient = three(np.where(np.arange(200) >= 40, np.inf, 0.0))
    assert not follow(bad_gradient, np.where(np.arange(200) >= 40, np.nan, 1.0))


def test_a_gradient_of_zero_is_announced_after_a_window():
    found = follow(three(np.where(np.arange(300) >= 100, -np.inf, 0.0)))
    assert found == [(100 + WINDOW - 1, f"the gradient is exactly 0 for {WINDOW} steps")]
    # some batches without a label are not it
    assert not follow(three(np.where(np.arange(300) % 3 == 0, -np.inf, 0.0)))


def test_a_start_at_zero_and_a_decay_are_no_growth():
    from_zero = np.where(np.arange(300) < 30, -np.inf, 0.0)
    assert not follow(three(from_zero))
    assert not follow(three(-0.2 * np.arange(500)))
    rng = np.random.default_rng(0)
    assert not follow(three(np.cumsum(rng.normal(0, 0.1, 2000))))


def test_a_state_that_never_advances_is_announced(tmp_path):
    tx = gradjax.watch(optax.sgd(0.1))
    state, lines = tx.init(jnp.ones(3)), []
    monitor = gradjax.Monitor(tmp_path, window=16, on_warning=lines.append)
    _, state = tx.update(jnp.ones(3), state, jnp.ones(3))
    for _ in range(60):
        monitor.update(state, 1.0)
    monitor.flush()
    assert len(lines) == 1 and "has not advanced" in lines[0] and "pass the new state" in lines[0]
