"""Generated sequences: what a key decides, and the baselines that the papers state."""

import jax
import numpy as np
import pytest

from bounds import assert_rounding
from gradjax.experiment.tasks import sequences

GENERATED = ("adding", "copy_memory", "copy_symbol", "temporal_order", "keyword_spotting")


@pytest.mark.parametrize("name", GENERATED)
def test_what_a_key_decides(name, key):
    make = getattr(sequences, name)
    first, again, other = (make(k, 30, 50)[0] for k in (key, key, jax.random.key(1)))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_adding_is_the_sum_of_one_number_of_each_half(key):
    x, y = sequences.adding(key, 21, 20_000)
    marks = x[..., 1]
    assert set(np.unique(marks)) == {0, 1}
    np.testing.assert_array_equal(marks[:, :10].sum(1), 1)
    np.testing.assert_array_equal(marks[:, 10:].sum(1), 1)
    assert (marks.sum(0) > 0).all()  # every place is used
    assert_rounding(y, (x[..., 0] * marks).sum(1, dtype=np.float64), terms=2, exact=True)
    # always predicting 1 errs by 1/6; the mean of 20,000 squares has the standard deviation .0014
    assert np.mean((y - 1) ** 2) == pytest.approx(1 / 6, abs=0.005)


@pytest.mark.parametrize("num_symbols", [10, 1])
def test_copy_memory_asks_only_for_the_first_symbols_at_the_end(num_symbols, key):
    x, y = sequences.copy_memory(key, 25, 500, num_symbols)
    steps = x.argmax(-1)
    np.testing.assert_array_equal(x.sum(-1), 1)
    np.testing.assert_array_equal(y[:, -num_symbols:], steps[:, :num_symbols])
    assert (y[:, :-num_symbols] == -1).all()
    assert (steps[:, :num_symbols] < 8).all() and (steps[:, num_symbols:] >= 8).all()
    marks = steps == 9
    assert marks.sum() == 500 and marks[:, num_symbols + 24].all()  # just before the first answer
    assert np.bincount(y[y >= 0], minlength=8).min() > 0


def test_temporal_order_is_the_order_of_its_two_symbols(key):
    x, y = sequences.temporal_order(key, 40, 4000)
    steps = x.argmax(-1)
    relevant = steps < 2
    np.testing.assert_array_equal(relevant.sum(1), 2)
    places = np.nonzero(relevant)[1].reshape(-1, 2)
    assert set(places[:, 0]) == set(range(4, 8)) and set(places[:, 1]) == set(range(16, 20))
    found = np.take_along_axis(steps, places, 1)
    np.testing.assert_array_equal(y, 2 * found[:, 0] + found[:, 1])
    # four classes of 1000 each: three standard deviations are 82
    assert np.abs(np.bincount(y) - 1000).max() < 110
    # no distractor depends on the class
    fraction = np.stack(
        [np.bincount(steps[y == c].ravel(), minlength=6)[2:] / (y == c).sum() for c in range(4)]
    )
    np.testing.assert_allclose(fraction, 38 / 4, rtol=0.03)


def test_keywords_differ_in_their_spectra_and_not_in_their_onset(key):
    x, y = sequences.keyword_spotting(key, 60, 4000)
    assert np.abs(np.bincount(y) - 400).max() < 85
    energy = np.square(x).sum(-1)
    quiet, loud = np.median(energy), np.median(energy.max(1))
    assert loud > 2 * quiet  # a word stands out of the noise
    onset = energy.argmax(1)
    # somewhere in the first half, a third long
    assert onset.min() < 12 and 35 < onset.max() < 52
    # the nearest mean spectrum around the loudest step is right for more than half of the words
    begin = np.maximum(onset - 6, 0)
    frames = np.stack([x[i, t : t + 12].ravel() for i, t in enumerate(begin)])
    means = np.stack([frames[:2000][y[:2000] == c].mean(0) for c in range(10)])
    distance = np.square(frames[2000:, None] - means).sum(-1)
    assert np.mean(distance.argmin(1) == y[2000:]) > 0.5
