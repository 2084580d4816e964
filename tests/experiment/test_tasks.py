import doctest
import gzip
import hashlib
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradjax.experiment import tasks
from gradjax.experiment.tasks import batches, files, images
from support import data_folder


def rows(x):
    return [row.tobytes() for row in np.asarray(x)]


@pytest.mark.parametrize("module", [tasks, batches], ids=lambda module: module.__name__)
def test_examples_of_the_docstrings(module):
    assert doctest.testmod(module).failed == 0


# --- splits


def test_splits_are_disjoint_and_cover_the_data(key):
    source = images.digits()
    splits = tasks.load("digits", key, normalize="none")
    together = np.concatenate([np.asarray(split.x) for split in splits])
    # the 1,797 digits differ from each other, so rows identify examples
    assert sorted(rows(together)) == sorted(rows(source.x.astype(np.float32) / np.float32(16)))
    labels = {row: label for row, label in zip(rows(source.x), source.y, strict=True)}
    x, y = np.rint(np.asarray(splits.train.x) * 16).astype(np.uint8), np.asarray(splits.train.y)
    assert [labels[row] for row in rows(x)] == y.tolist()


def test_types_and_shapes(key):
    for split in tasks.load("digits", key):
        assert split.x.dtype == jnp.float32 and split.y.dtype == jnp.int32
        assert split.x.shape == (len(split.y), 64)


def test_a_key_decides_the_splits(key):
    first, again = tasks.load("digits", key), tasks.load("digits", key)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first, again))
    other = tasks.load("digits", jax.random.key(1))
    assert set(rows(first.test.x)) != set(rows(other.test.x))


def test_the_test_split_does_not_move_with_the_share_for_validation(key):
    few = tasks.load("digits", key, validation=0.0, normalize="none")
    many = tasks.load("digits", key, validation=0.4, normalize="none")
    assert len(few.validation.y) == 0
    np.testing.assert_array_equal(few.test.x, many.test.x)


def test_normalisation_uses_the_training_split_alone(key):
    splits = tasks.load("digits", key)
    x = np.asarray(splits.train.x, np.float64)
    assert x.mean() == pytest.approx(0, abs=1e-6) and x.std() == pytest.approx(1, abs=1e-6)
    raw = tasks.load("digits", key, normalize="none")
    x = np.asarray(raw.train.x, np.float64)
    mean, std = x.mean(), x.std()
    np.testing.assert_allclose(splits.test.x, (np.asarray(raw.test.x) - mean) / std, atol=1e-5)
    assert x.min() == 0 and x.max() == 1
    assert abs(np.mean(splits.test.x)) > 1e-4  # its own mean is not the one subtracted


def test_what_cannot_be_loaded_is_refused(key):
    with pytest.raises(
        ValueError, match=r"'minst' is unknown; known: digits, mnist, .*did you mean 'mnist'"
    ):
        tasks.load("minst", key)
    with pytest.raises(ValueError, match="did you mean 'fashion_mnist'"):
        tasks.fetch("Fashion-MNIST")
    with pytest.raises(ValueError, match="'zscore' is unknown; known: standard, none"):
        tasks.load("digits", key, normalize="zscore")
    for fractions in (
        {"validation": 0.5, "test": 0.5},
        {"validation": -0.1},
        {"test": float("nan")},
        {"test": 1.0},
    ):
        with pytest.raises(ValueError, match="nothing to train on"):
            tasks.load("digits", key, **fractions)
    with pytest.raises(ValueError, match="leave none of the 1797"):
        tasks.load("digits", key, validation=0.9999, test=0.0)


# --- batches


permuted = jax.jit(batches._permuted, static_argnums=2)


def toy(n):
    return tasks.Split(jnp.arange(n, dtype=jnp.float32)[:, None], jnp.arange(n))


@given(n=st.sampled_from([1, 2, 3, 16, 17, 1257, 4096]), seed=st.integers(0, 2**32 - 1))
def test_an_epoch_is_a_permutation(n, seed):
    positions = jnp.arange(n, dtype=jnp.uint32)
    image = permuted(jax.random.key(seed), positions, n)
    np.testing.assert_array_equal(jnp.sort(image), positions)


@pytest.mark.slow
def test_an_epoch_visits_every_example_once_in_a_jitted_scan(key):
    num_steps, batch_size = 30, 8

    @jax.jit
    def stream(key):
        pick = lambda _, step: (None, tasks.batch_at(toy(120), key, step, batch_size))
        return jax.lax.scan(pick, None, jnp.arange(num_steps))[1]

    seen = stream(key)
    np.testing.assert_array_equal(seen.x[..., 0].astype(jnp.int32), seen.y)
    first, second = seen.y.reshape(2, -1)
    np.testing.assert_array_equal(jnp.sort(first), jnp.arange(120))
    np.testing.assert_array_equal(jnp.sort(second), jnp.arange(120))
    assert (first != second).mean() > 0.9
    # pure in (key, step): alone, in another order, and under vmap over keys
    np.testing.assert_array_equal(tasks.batch_at(toy(120), key, 17, batch_size).y, seen.y[17])
    keys = jnp.stack([jax.random.key(5), key])
    np.testing.assert_array_equal(jax.vmap(stream)(keys).y[1], seen.y)


@pytest.mark.slow
def test_the_remainder_of_an_epoch_is_another_one_each_time(key):
    left_out = set()
    for epoch in range(12):
        seen = [
            int(y) for step in (0, 1) for y in tasks.batch_at(toy(7), key, 2 * epoch + step, 3).y
        ]
        assert len(set(seen)) == 6
        left_out |= set(range(7)) - set(seen)
    assert len(left_out) > 3


@pytest.mark.parametrize("n", [5, 12, 97])
def test_orders_are_uniform_over_keys(n):
    """Counts of (position, example) over keys, and of (first, second example): chi-squared within 5
    sigma."""
    keys = jax.random.split(jax.random.key(0), 4000)
    order = jax.vmap(lambda key: batches._permuted(key, jnp.arange(n, dtype=jnp.uint32), n))(keys)
    order = np.asarray(order).astype(int)
    for cells, values in (
        (n, order[:, 0]),
        (n, order[:, -1]),
        (n * (n - 1), order[:, 0] * (n - 1) + order[:, 1] - (order[:, 1] > order[:, 0])),
    ):
        counts = np.bincount(values, minlength=cells)
        chi2 = ((counts - len(keys) / cells) ** 2).sum() * cells / len(keys)
        assert abs(chi2 - (cells - 1)) < 5 * np.sqrt(2 * (cells - 1)), (n, cells, chi2)


def test_a_batch_larger_than_the_split_is_refused(key):
    for batch_size in (0, 11):
        with pytest.raises(ValueError, match=f"batch_size={batch_size} does not fit a split of 10"):
            tasks.batch_at(toy(10), key, 0, batch_size)


# --- files


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


def test_digits_need_no_files():
    assert tasks.fetch("digits") == [] and tasks.verify("digits") == []


@pytest.mark.parametrize(
    "name", ["sequential_digits", "adding", "copy_memory", "copy_symbol", "passage"]
)
def test_the_length_of_a_sequence_is_known_beforehand(name, key):
    assert tasks.load(name, key, seq_len=30).train.x.shape[1] == tasks.length(name, 30)


def test_every_task_is_described():
    assert [entry.name for entry in tasks.available()] == list(tasks.TASKS)


@pytest.fixture
def real(monkeypatch):
    """A folder with the real MNIST, where this machine has one."""
    folder = data_folder("mnist")
    monkeypatch.setenv(files.VARIABLE, str(folder))
    return folder


def test_real_mnist(real, key):
    assert all(check.ok for check in tasks.verify("mnist"))
    splits = tasks.load("mnist", key, validation=1 / 6)
    assert [split.x.shape for split in splits] == [(50000, 784), (10000, 784), (10000, 784)]
    assert np.bincount(splits.test.y).tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]
    # LeCun et al.'s pixels: mean 0.1307, standard deviation 0.3081 over the 60,000
    assert float(splits.train.x.min()) == pytest.approx(-0.1307 / 0.3081, abs=2e-3)
    assert np.std(splits.train.x) == pytest.approx(1, abs=1e-5)


def test_a_flipped_bit_in_the_real_files_is_found(real, tmp_path, monkeypatch):
    shutil.copytree(real / "mnist", tmp_path / "mnist")
    monkeypatch.setenv(files.VARIABLE, str(tmp_path))
    path = tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz"
    path.chmod(0o644)
    path.write_bytes(flip(path.read_bytes()))
    assert [check.ok for check in tasks.verify("mnist")] == [True, True, True, False]
