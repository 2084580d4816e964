"""Generated sequences and text: shapes, what a key decides, and the baselines that the papers
state."""

import doctest
import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradjax.experiment import tasks
from gradjax.experiment.tasks import files, sequences, text
from support import data_folder

GENERATED = {
    "adding": ((4000, 30, 2), (4000,), np.float32),
    "copy_memory": ((4000, 50, 10), (4000, 50), np.int32),
    "copy_symbol": ((4000, 32, 10), (4000, 32), np.int32),
    "temporal_order": ((4000, 30, 6), (4000,), np.int32),
    "keyword_spotting": ((4000, 30, 12), (4000,), np.int32),
}


@pytest.mark.parametrize("name", GENERATED)
def test_shapes_and_what_a_key_decides(name, key):
    x_shape, y_shape, dtype = GENERATED[name]
    x, y = getattr(sequences, name)(key, 30)
    assert x.shape == x_shape and x.dtype == np.float32
    assert y.shape == y_shape and y.dtype == dtype
    again, other = (getattr(sequences, name)(k, 30, 50)[0] for k in (key, jax.random.key(1)))
    np.testing.assert_array_equal(again, getattr(sequences, name)(key, 30, 50)[0])
    assert not np.array_equal(again, other)


@pytest.mark.parametrize("name", GENERATED)
def test_splits(name, key):
    splits = tasks.load(name, key, seq_len=30)
    x_shape, y_shape, dtype = GENERATED[name]
    assert [len(split.y) for split in splits] == [2800, 600, 600]
    assert splits.train.x.shape[1:] == x_shape[1:] and splits.train.y.shape[1:] == y_shape[1:]
    assert splits.train.x.dtype == jnp.float32 and splits.train.y.dtype == dtype
    # normalisation is for images: one-hot vectors stay what they are
    np.testing.assert_array_equal(
        splits.test.x, tasks.load(name, key, seq_len=30, normalize="none").test.x
    )


def test_adding_is_the_sum_of_one_number_of_each_half(key):
    x, y = sequences.adding(key, 21, 20_000)
    marks = x[..., 1]
    assert set(np.unique(marks)) == {0, 1}
    np.testing.assert_array_equal(marks[:, :10].sum(1), 1)
    np.testing.assert_array_equal(marks[:, 10:].sum(1), 1)
    assert (marks.sum(0) > 0).all()  # every place is used
    np.testing.assert_allclose(y, (x[..., 0] * marks).sum(1), rtol=1e-6)
    # who always says 1 errs by 1/6; the mean of 20,000 squares has the standard deviation .0014
    assert np.mean((y - 1) ** 2) == pytest.approx(1 / 6, abs=0.005)


@pytest.mark.parametrize("num_symbols", [10, 1])
def test_copy_memory_asks_for_the_first_symbols_at_the_end_alone(num_symbols, key):
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
    # no distractor tells of the class
    fraction = np.stack(
        [np.bincount(steps[y == c].ravel(), minlength=6)[2:] / (y == c).sum() for c in range(4)]
    )
    np.testing.assert_allclose(fraction, 38 / 4, rtol=0.03)


def test_keywords_are_told_apart_by_their_spectra_and_not_by_their_onset(key):
    x, y = sequences.keyword_spotting(key, 60, 4000)
    assert np.abs(np.bincount(y) - 400).max() < 85
    energy = np.square(x).sum(-1)
    quiet, loud = np.median(energy), np.median(energy.max(1))
    assert loud > 2 * quiet  # a word stands out of the noise
    onset = energy.argmax(1)
    assert (
        onset.min() < 12 and onset.max() > 35 and onset.max() < 52
    )  # somewhere in the first half, a third long
    # the nearest mean spectrum around the loudest step tells more than half of the ten words
    frames = np.stack(
        [x[i, max(t - 6, 0) : max(t - 6, 0) + 12].ravel() for i, t in enumerate(onset)]
    )
    means = np.stack([frames[:2000][y[:2000] == c].mean(0) for c in range(10)])
    distance = np.square(frames[2000:, None] - means).sum(-1)
    assert np.mean(distance.argmin(1) == y[2000:]) > 0.5


def test_digits_pixel_by_pixel_are_the_digits(key):
    splits, flat = tasks.load("sequential_digits", key), tasks.load("digits", key)
    assert splits.train.x.shape == (1257, 64, 1)
    for one, other in zip(splits, flat, strict=True):
        np.testing.assert_array_equal(one.x[..., 0], other.x)
        np.testing.assert_array_equal(one.y, other.y)


# --- text


def test_the_target_of_a_character_is_the_next_one(key):
    x, y = text.characters("abracadabra", 4, 2)
    # a comes five times, b and r twice, c and d once: the rarest is 0
    assert x.max() == y.max() == x[0, 0] == 4
    np.testing.assert_array_equal(x[:, 1:], y[:, :-1])
    np.testing.assert_array_equal(x[1], [*y[0, 1:], y[1, 2]])
    with pytest.raises(ValueError, match=r"seq_len=11 leaves no window in a text of 11"):
        text.characters("abracadabra", 11, 1)


def test_the_passage_comes_with_the_package(key):
    splits = tasks.load("passage", key, seq_len=64)
    assert splits.train.x.dtype == splits.train.y.dtype == jnp.int32
    assert splits.train.x.shape == splits.train.y.shape == (splits.train.y.shape[0], 64)
    assert len(splits.train.y) > 300
    assert all(
        int(split.y.max()) == int(splits.train.y.max()) for split in splits
    )  # the same outputs serve all
    assert tasks.fetch("passage") == []


def test_shakespeare_is_the_pinned_file(key, monkeypatch):
    monkeypatch.setenv(files.VARIABLE, str(data_folder("text/tinyshakespeare.txt")))
    assert [check.ok for check in tasks.verify("shakespeare")] == [True]
    splits = tasks.load("shakespeare", key, seq_len=100)
    assert sum(len(split.y) for split in splits) == 1_115_394 // 100
    assert int(splits.train.y.max()) == 64  # 65 characters
    space = np.mean(np.asarray(splits.train.x) == 64)
    assert space == pytest.approx(0.152, abs=0.005)


def test_an_altered_text_is_refused(tmp_path, monkeypatch, key):
    monkeypatch.setenv(files.VARIABLE, str(tmp_path))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "tinyshakespeare.txt").write_text("To be, or not to be")
    found = hashlib.sha256(b"To be, or not to be").hexdigest()
    with pytest.raises(tasks.DataError, match=found):
        tasks.load("shakespeare", key)


def test_the_text_is_downloaded_unpacked(tmp_path, monkeypatch):
    import pooch

    monkeypatch.setenv(files.VARIABLE, str(tmp_path))
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache")
    monkeypatch.setitem(
        files._SHA256, "text", {"tinyshakespeare.txt": hashlib.sha256(b"words").hexdigest()}
    )

    def retrieve(url, known_hash, fname, path):
        assert url == files._MIRRORS["text"][0] and fname == "tinyshakespeare.txt"
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / fname).write_bytes(b"words")
        return str(Path(path) / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    assert [path.read_bytes() for path in tasks.fetch("shakespeare")] == [b"words"]


@pytest.mark.parametrize(
    ("name", "seq_len"), [("adding", 1), ("temporal_order", 9), ("keyword_spotting", 5)]
)
def test_what_has_no_room_is_refused(name, seq_len, key):
    with pytest.raises(ValueError, match=f"{name} of seq_len={seq_len} has no room"):
        tasks.load(name, key, seq_len=seq_len)


def test_examples_of_the_docstrings():
    assert all(doctest.testmod(module).failed == 0 for module in (sequences, text))


def test_every_generated_task_says_so():
    places = {entry.name: entry.place for entry in tasks.available()}
    assert {places[name] for name in GENERATED} == {"is generated"}
    assert places["passage"] == "comes with gradjax"
