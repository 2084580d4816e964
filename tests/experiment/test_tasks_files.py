"""Files of data sets: where they are found, how they are checked, how they are downloaded."""

import gzip
import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from gradjax.experiment import tasks
from gradjax.experiment.tasks import files
from support import data_folder


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without network and with empty folders: (GRADJAX_DATA_DIR, cache)."""
    import pooch

    def offline(url, *args, **kwargs):
        raise ConnectionError(url)

    own, cache = tmp_path / "own", tmp_path / "cache"
    own.mkdir()
    monkeypatch.setattr(pooch, "retrieve", offline)
    monkeypatch.setattr(pooch, "os_cache", lambda project: cache / project)
    monkeypatch.setenv(files.VARIABLE, str(own))
    return own, cache / "gradjax"


@pytest.fixture
def tiny(monkeypatch):
    """A stand-in for MNIST whose four files the test knows: their bytes by name."""
    rng = np.random.default_rng(0)
    content = {}
    for part, n in (("train", 20), ("t10k", 6)):
        pixels, labels = rng.integers(0, 256, n * 4, np.uint8), rng.integers(0, 10, n, np.uint8)
        shape = np.array([n, 2, 2], ">i4").tobytes()
        content[f"{part}-images-idx3-ubyte"] = bytes([0, 0, 8, 3]) + shape + pixels.tobytes()
        content[f"{part}-labels-idx1-ubyte"] = bytes([0, 0, 8, 1]) + shape[:4] + labels.tobytes()
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    monkeypatch.setitem(files._SHA256, "mnist", hashes)
    return content


def put(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    for index, (name, data) in enumerate(content.items()):  # packed and unpacked in turn
        path = folder / (name if index % 2 else f"{name}.gz")
        path.write_bytes(data if index % 2 else gzip.compress(data))


@pytest.mark.parametrize("place", [0, 1], ids=["own folder", "cache"])
def test_idx_files_are_read_packed_or_not(machine, tiny, place, key):
    put(machine[place] / "mnist", tiny)
    splits = tasks.load("mnist", key, validation=0.25, normalize="none")
    assert [len(split.y) for split in splits] == [15, 5, 6]
    pixels = np.frombuffer(tiny["t10k-images-idx3-ubyte"][16:], np.uint8).reshape(6, 4)
    np.testing.assert_array_equal(splits.test.x, pixels.astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(splits.test.y, list(tiny["t10k-labels-idx1-ubyte"][8:]))
    assert all(check.ok for check in tasks.verify("mnist"))
    assert [entry.place for entry in tasks.available() if entry.name == "mnist"] == [
        str(machine[place] / "mnist")
    ]


def test_a_missing_file_says_what_to_put_where(machine, tiny, key):
    own, cache = machine
    first, digest = next(iter(files._SHA256["mnist"].items()))
    with pytest.raises(tasks.DataError) as caught:
        tasks.load("mnist", key)
    for part in (first, digest, str(own), str(cache / "mnist"), files.VARIABLE, "ConnectionError"):
        assert part in str(caught.value)
    assert tasks.verify("mnist") == [(name, None, False) for name in tiny]
    assert [entry.place for entry in tasks.available() if entry.name == "mnist"] == [None]


def test_a_wrong_data_folder_is_named(machine, monkeypatch, key):
    monkeypatch.setenv(files.VARIABLE, "/nowhere/at/all")
    with pytest.raises(
        tasks.DataError, match="GRADJAX_DATA_DIR is /nowhere/at/all, which is no folder"
    ):
        tasks.load("mnist", key)


def cut(data):
    return data[: len(data) // 2]


def flip(data):
    return data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]


@pytest.mark.parametrize(
    "damage", [cut, flip, lambda data: b""], ids=["truncated", "flipped bit", "empty"]
)
@pytest.mark.parametrize("packed", [True, False], ids=["gz", "unpacked"])
def test_damaged_files_are_refused_by_name_and_hash(machine, tiny, damage, packed, key):
    put(machine[0] / "mnist", tiny)
    name = list(tiny)[0 if packed else 1]
    path = machine[0] / "mnist" / (f"{name}.gz" if packed else name)
    path.write_bytes(damage(path.read_bytes()))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(tasks.DataError) as caught:
        tasks.load("mnist", key)
    for part in (str(path), found, files._SHA256["mnist"][name]):
        assert part in str(caught.value)
    assert [(check.file, check.sha256) for check in tasks.verify("mnist") if not check.ok] == [
        (str(path), found)
    ]
    with pytest.raises(tasks.DataError):
        tasks.fetch("mnist")
    assert path.exists()  # the user's own folder is never written to


def test_fetch_downloads_what_is_missing_or_damaged_and_tries_the_next_mirror(
    machine, tiny, monkeypatch
):
    import pooch

    folder = machine[1] / "mnist"
    put(folder, tiny)
    images_gz = folder / "train-images-idx3-ubyte.gz"
    images_gz.write_bytes(cut(images_gz.read_bytes()))
    (folder / "t10k-labels-idx1-ubyte").unlink()
    asked = []

    def retrieve(url, known_hash, fname, path):
        asked.append(url)
        data = gzip.compress(tiny[fname.removesuffix(".gz")])
        (Path(path) / fname).write_bytes(
            cut(data) if url.startswith(files._MIRRORS["mnist"][0]) else data
        )
        return str(Path(path) / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    assert [path.name for path in tasks.fetch("mnist")] == [
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
    ]
    assert len(asked) == 4  # two files, two mirrors
    assert all(check.ok for check in tasks.verify("mnist"))
    monkeypatch.setattr(
        pooch, "retrieve", lambda *args, **kwargs: pytest.fail("a second fetch downloads")
    )
    tasks.fetch("mnist")


def test_a_mirror_with_other_bytes_leaves_nothing_behind(machine, tiny, monkeypatch):
    import pooch

    def retrieve(url, known_hash, fname, path):
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / fname).write_bytes(gzip.compress(b"a captive portal"))
        return str(Path(path) / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with pytest.raises(tasks.DataError, match="other bytes than the pinned ones"):
        tasks.fetch("mnist")
    assert not list((machine[1] / "mnist").iterdir())


@pytest.fixture
def real(monkeypatch):
    """A folder with the real MNIST, where this machine has one."""
    folder = data_folder("mnist")
    monkeypatch.setenv(files.VARIABLE, str(folder))
    return folder


@pytest.mark.slow
def test_real_mnist(real, key):
    assert all(check.ok for check in tasks.verify("mnist"))
    splits = tasks.load("mnist", key, validation=1 / 6)
    assert [split.x.shape for split in splits] == [(50000, 784), (10000, 784), (10000, 784)]
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(splits.test.y).tolist() == counts
    # LeCun et al.'s pixels: mean 0.1307, standard deviation 0.3081 over the 60,000
    assert float(splits.train.x.min()) == pytest.approx(-0.1307 / 0.3081, abs=2e-3)
    assert np.std(splits.train.x) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_a_flipped_bit_in_the_real_files_is_found(real, tmp_path, monkeypatch):
    shutil.copytree(real / "mnist", tmp_path / "mnist")
    monkeypatch.setenv(files.VARIABLE, str(tmp_path))
    path = tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz"
    path.chmod(0o644)
    path.write_bytes(flip(path.read_bytes()))
    assert [check.ok for check in tasks.verify("mnist")] == [True, True, True, False]
