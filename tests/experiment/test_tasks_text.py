"""Text: its windows, the passage of the package, the pinned file and its download."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from gradjax.experiment import tasks
from gradjax.experiment.tasks import files, text
from support import data_folder


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
    assert splits.train.x.shape == splits.train.y.shape == (len(splits.train.y), 64)
    assert len(splits.train.y) > 300
    # the same outputs are enough for all parts
    assert len({int(np.max(split.y)) for split in splits}) == 1


@pytest.mark.slow
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
