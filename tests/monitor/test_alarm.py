"""The rule of early warnings, on series of norms."""

import numpy as np

from gradjax.monitor.alarm import Alarm


def rows_of(x):
    """(steps, lanes, fields, groups) of one leaf and lane from log2 norms."""
    return np.tile(np.asarray(x, np.float32)[:, None, None, None], (1, 1, 4, 1))


def alarms(x, window=64):
    alarm = Alarm(window, 6.0, 2.0)
    alarm.labels = ["w"]
    found = []
    for step, row in enumerate(rows_of(x)):
        found += alarm.new_alerts([step], row[None], np.ones(1, bool))
    return [step for step, _, text in found if "gradient" in text]


def test_the_rule_is_its_formula():
    """Constant norms: a factor of four; noisy ones: six deviations."""
    noise = np.random.default_rng(0).standard_normal(2000)
    assert alarms(np.r_[np.zeros(200), 1.99]) == [] and alarms(np.r_[np.zeros(200), 2.01]) == [200]
    assert alarms(noise) == []
    # Median and deviation of 64 norms are good to a fifth.
    assert alarms(np.r_[noise[:200], 9.0]) == [200]


def test_slow_growth_zeros_and_levels_that_stay_are_no_news():
    assert alarms(np.log2(np.arange(1.0, 500.0))) == []
    assert alarms(1.2 * np.log2(np.arange(1.0, 500.0))) == []
    assert alarms(np.r_[np.full(200, -np.inf), 0.0, 0.0]) == [], "zeros are no history"
    assert alarms(np.r_[np.zeros(100), np.full(300, 5.0)]) == [100], "accepted after a while"
    assert alarms(np.r_[np.zeros(20), 9.0]) == [], "half a window first"
