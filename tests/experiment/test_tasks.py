"""Every task: what it declares, its splits, and names that do not exist."""

import doctest
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradjax.experiment import tasks
from gradjax.experiment.tasks import batches, graphs, images, sequences, teacher, text

# task -> shapes of (x, y) of one training example at seq_len = 30; those with files are not here
SHAPES = {
    "digits": ((64,), ()),
    "sequential_digits": ((64, 1), ()),
    "adding": ((30, 2), ()),
    "copy_memory": ((50, 10), (50,)),
    "copy_symbol": ((32, 10), (32,)),
    "temporal_order": ((30, 6), ()),
    "keyword_spotting": ((30, 12), ()),
    "passage": ((30,), (30,)),
    "communities": ((32, 36), (32,)),
    "teacher": ((1000,), (10,)),
}
SIZES = {"digits": 1797, "sequential_digits": 1797, "communities": 1000, "teacher": 10_000}
SIZES["passage"] = 2138
GENERATED = ("adding", "copy_memory", "copy_symbol", "temporal_order", "keyword_spotting")


def rows(x):
    return [row.tobytes() for row in np.asarray(x)]


def slow(case):
    """Its time is the compiler's, and the path of it is seen by fast tests."""
    return pytest.param(case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "module",
    [tasks, images, sequences, text, slow(batches), slow(graphs), slow(teacher)],
    ids=lambda module: module.__name__.rpartition(".")[2],
)
def test_examples_of_the_docstrings(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    "name", [slow(name) if name in ("communities", "teacher") else name for name in SHAPES]
)
def test_a_task_is_what_it_declares(name, key):
    """Shapes, dtypes, sizes of the splits, and the length that chrono initialisation relies on."""
    splits = tasks.load(name, key, seq_len=30, validation=0.1, test=0.2)
    x_shape, y_shape = SHAPES[name]
    task, size = tasks.TASKS[name], SIZES.get(name, 4000)
    sizes = [size - round(0.2 * size) - round(0.1 * size), round(0.1 * size), round(0.2 * size)]
    assert [len(split.y) for split in splits] == sizes
    for split in splits:
        assert split.x.shape[1:] == x_shape and split.y.shape[1:] == y_shape
        assert split.x.dtype == (jnp.int32 if name == "passage" else jnp.float32)
        assert split.y.dtype == (jnp.float32 if name in ("adding", "teacher") else jnp.int32)
    if task.length is None:
        assert len(x_shape) == 1 or name == "communities"
        assert tasks.length(name, 30) == 30
    else:
        assert tasks.length(name, 30) == x_shape[0]
    assert task.folder is None and tasks.fetch(name) == tasks.verify(name) == []


def test_every_task_is_described():
    assert [entry.name for entry in tasks.available()] == list(tasks.TASKS)
    assert set(tasks.TASKS) - set(SHAPES) == {
        name for name, task in tasks.TASKS.items() if task.folder is not None
    }
    places = {entry.name: entry.place for entry in tasks.available()}
    assert {places[name] for name in GENERATED} == {"is generated"}
    assert places["passage"] == "comes with gradjax"
    assert places["digits"] == "comes with scikit-learn"


# Splits


def test_splits_are_disjoint_and_cover_the_data(key):
    source = images.digits()
    splits = tasks.load("digits", key, normalize="none")
    together = np.concatenate([np.asarray(split.x) for split in splits])
    # the 1,797 digits differ from each other, so rows identify examples
    assert sorted(rows(together)) == sorted(rows(source.x.astype(np.float32) / np.float32(16)))
    labels = {row: label for row, label in zip(rows(source.x), source.y, strict=True)}
    x, y = np.rint(np.asarray(splits.train.x) * 16).astype(np.uint8), np.asarray(splits.train.y)
    assert [labels[row] for row in rows(x)] == y.tolist()


def test_a_key_decides_the_splits_and_the_fraction_for_validation_does_not_move_the_test(key):
    first, again = tasks.load("digits", key), tasks.load("digits", key)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    other = tasks.load("digits", jax.random.key(1))
    assert set(rows(first.test.x)) != set(rows(other.test.x))
    few = tasks.load("digits", key, validation=0.0, normalize="none")
    many = tasks.load("digits", key, validation=0.4, normalize="none")
    assert len(few.validation.y) == 0
    np.testing.assert_array_equal(few.test.x, many.test.x)


def test_normalisation_uses_only_the_training_split(key):
    splits = tasks.load("digits", key)
    x = np.asarray(splits.train.x, np.float64)
    # every entry is rounded twice, at a size of at most 3; the means of 80,000 of them even less
    assert abs(x.mean()) < 1e-6 and abs(x.std() - 1) < 1e-6
    raw = tasks.load("digits", key, normalize="none")
    x = np.asarray(raw.train.x, np.float64)
    scaled = (np.asarray(raw.test.x, np.float64) - x.mean()) / x.std()
    np.testing.assert_allclose(splits.test.x, scaled, rtol=0, atol=4 * 3 * 2.0**-24)
    assert x.min() == 0 and x.max() == 1
    assert abs(np.mean(splits.test.x)) > 1e-4  # its own mean is not the one subtracted


def test_normalisation_is_for_images(key):
    """One-hot vectors stay what they are."""
    for name in ("copy_symbol", "temporal_order"):
        both = [tasks.load(name, key, seq_len=30, normalize=n).test.x for n in tasks.NORMALIZE]
        np.testing.assert_array_equal(*both)


def test_digits_pixel_by_pixel_are_the_digits(key):
    splits, flat = tasks.load("sequential_digits", key), tasks.load("digits", key)
    for one, other in zip(splits, flat, strict=True):
        np.testing.assert_array_equal(one.x[..., 0], other.x)
        np.testing.assert_array_equal(one.y, other.y)


def test_names_and_fractions_that_cannot_be_loaded_are_refused(key):
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


@pytest.mark.parametrize(
    ("name", "seq_len"), [("adding", 1), ("temporal_order", 9), ("keyword_spotting", 5)]
)
def test_sequences_with_no_room_are_refused(name, seq_len, key):
    with pytest.raises(ValueError, match=f"{name} of seq_len={seq_len} has no room"):
        tasks.load(name, key, seq_len=seq_len)


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch, key):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"needs sklearn.*pip install 'gradjax\[lab\]'"):
        tasks.load("digits", key)
