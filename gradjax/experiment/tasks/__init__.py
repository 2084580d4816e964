"""Data: a name and a PRNG key give a training, a validation and a test split.

    splits = load("digits", key)
    batch = batch_at(splits.train, key, step, batch_size=64)

The permutation that cuts the splits is a function of the key only: the test split does not move
when the fraction for validation changes. `digits`, `passage` and generated tasks need no network;
MNIST, Fashion-MNIST and Shakespeare are read from the folder in GRADJAX_DATA_DIR, from the cache,
or downloaded, and are refused unless their bytes have the pinned sha256. To add a task, add an
entry to `TASKS`.

Not covered: streaming, data that do not fit in memory.
"""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gradjax.core.names import suggest_names
from gradjax.experiment.tasks import files, graphs, images, sequences, teacher, text
from gradjax.experiment.tasks.augment import AUGMENT as AUGMENT
from gradjax.experiment.tasks.batches import Split as Split
from gradjax.experiment.tasks.batches import batch_at as batch_at
from gradjax.experiment.tasks.files import Check as Check
from gradjax.experiment.tasks.files import DataError as DataError
from gradjax.experiment.tasks.images import Source


def _by_pixel(source: Source) -> Source:
    test = source.test and (sequences.by_pixel(source.test[0]), source.test[1])
    return source._replace(x=sequences.by_pixel(source.x), test=test)


class Task(NamedTuple):
    """A data set: all that gradjax knows of it."""

    description: str
    """One line for `gradjax data list`."""
    make: Callable[[Array, int], Any]
    """(key, seq_len) -> (x, y), or a `Source`, which says more."""
    length: Callable[[int], int] | None
    """seq_len -> steps of its sequences, which chrono initialisation relies on; None where its
    examples are no sequences."""
    folder: str | None = None
    """Folder of its pinned files; None where it has none."""
    package: str | None = None
    """The package that it comes with, if any."""


def _as_asked(seq_len: int) -> int:
    """Steps of a task whose sequences are as long as the config says."""
    return seq_len


# name -> Task
TASKS: dict[str, Task] = {
    "digits": Task(
        "1,797 handwritten digits, 8 x 8 pixels, 10 classes",
        lambda key, n: images.digits(),
        length=None,
        package="scikit-learn",
    ),
    "mnist": Task(
        "60,000 + 10,000 handwritten digits, 28 x 28 pixels, 10 classes",
        lambda key, n: images.idx("mnist"),
        length=None,
        folder="mnist",
    ),
    "fashion_mnist": Task(
        "60,000 + 10,000 pieces of clothing, 28 x 28 pixels, 10 classes",
        lambda key, n: images.idx("fashion_mnist"),
        length=None,
        folder="fashion_mnist",
    ),
    "sequential_digits": Task(
        "the digits pixel by pixel, 64 steps",
        lambda key, n: _by_pixel(images.digits()),
        length=lambda n: 64,
        package="scikit-learn",
    ),
    "sequential_mnist": Task(
        "MNIST pixel by pixel, 784 steps",
        lambda key, n: _by_pixel(images.idx("mnist")),
        length=lambda n: 784,
        folder="mnist",
    ),
    "adding": Task(
        "sum of two marked numbers of a sequence, a regression",
        sequences.adding,
        length=_as_asked,
    ),
    "copy_memory": Task(
        "recall ten symbols after seq_len blanks",
        sequences.copy_memory,
        length=lambda n: n + 2 * sequences.COPIED,
    ),
    "copy_symbol": Task(
        "recall one symbol after seq_len blanks",
        sequences.copy_symbol,
        length=lambda n: n + 2,
    ),
    "temporal_order": Task(
        "in which order two symbols came among distractors, 4 classes",
        sequences.temporal_order,
        length=_as_asked,
    ),
    "keyword_spotting": Task(
        "synthetic spectra of ten words at a random time in noise",
        sequences.keyword_spotting,
        length=_as_asked,
    ),
    "shakespeare": Task(
        "1.1 million characters of plays, predict the next one at every step",
        lambda key, n: text.shakespeare(n),
        length=_as_asked,
        folder="text",
    ),
    "passage": Task(
        "the first 2,168 characters of Moby-Dick, a memorisation task",
        lambda key, n: text.passage(n),
        length=_as_asked,
        package="gradjax",
    ),
    "communities": Task(
        "nodes of a random graph, to be classified by their community",
        lambda key, n: graphs.communities(key),
        length=None,
    ),
    "teacher": Task(
        "a random 1000-100-10 network to be learned, a regression",
        lambda key, n: teacher.teacher(key),
        length=None,
    ),
}
NORMALIZE = ("standard", "none")


class Splits(NamedTuple):
    """Disjoint parts of a data set, each a `Split`."""

    train: Split
    validation: Split
    test: Split


class Entry(NamedTuple):
    """A row of `gradjax data list`; `place` is where it lies, None if not on this machine."""

    name: str
    description: str
    place: str | None


def load(
    name: str,
    key: Array,
    *,
    validation: float = 0.15,
    test: float = 0.15,
    normalize: str = "standard",
    seq_len: int = 100,
) -> Splits:
    """Read or generate a data set and cut it into training, validation and test split.

    `standard` subtracts one mean and divides by one standard deviation, both scalars over all
    features of only the TRAINING split, so that q_0 = |x|^2 / n is about 1 and dead pixels stay
    finite. It acts on images, also pixel by pixel; generated data come in the units of their
    definition, and tokens stay tokens.

    Args:
      name: a name in `TASKS`.
      key: PRNG key that decides which example falls into which split, and what is generated.
      validation: fraction of the examples kept for validation, in [0, 1). 0.15: the usual 70/15/15.
      test: the same for the test. A data set with an official test set (MNIST, Fashion-MNIST) keeps
        that one, ignores this fraction, and takes `validation` from its official training set.
      normalize: "standard", or "none": pixels in [0, 1].
      seq_len: steps of the sequences that have no length of their own, blanks of copy memory.

    Returns:
      Splits with x float32 of shape (examples, features), (examples, steps, features) or (examples,
      nodes, nodes + features), or int32 tokens (examples, steps), and y int32 classes of shape
      (examples,), (examples, steps) or (examples, nodes), or float32 values (examples,) or
      (examples, outputs); negative classes are masked (ignored in loss and score).

    Raises:
      ValueError: an unknown name, fractions that leave nothing to train on, or a seq_len that the
        task has no room in.
      DataError: files that are missing and cannot be downloaded, or whose bytes are not the pinned
        ones.
      ImportError: the task comes with a package that is not installed.

    >>> splits = load("digits", jax.random.key(0))
    >>> [split.x.shape for split in splits]
    [(1257, 64), (270, 64), (270, 64)]
    """
    _known("data set", name, TASKS)
    _known("normalisation", normalize, NORMALIZE)
    if not (0 <= validation < 1 and 0 <= test < 1 and validation + test < 1):
        raise ValueError(
            f"tasks: validation={validation} and test={test} leave nothing to train on; needed: "
            "fractions of the examples, each in [0, 1), with a sum below 1."
        )
    made = TASKS[name].make(jax.random.fold_in(key, 1), seq_len)
    source = made if isinstance(made, Source) else Source(*made)
    order = np.asarray(jax.random.permutation(key, len(source.y)))
    num_test = 0 if source.test else round(test * len(order))
    num_held = num_test + round(validation * len(order))
    held_out, kept = order[:num_test], order[num_held:]
    if not len(kept):
        raise ValueError(
            f"tasks: validation={validation} and test={test} leave none of the {len(order)} "
            f"examples of {name} to train on; lower them."
        )
    x, y = np.asarray(source.x), np.asarray(source.y)
    parts = [(x[part], y[part]) for part in (kept, order[num_test:num_held], held_out)]
    if source.test:
        parts[2] = source.test
    if source.full_scale is not None:
        mean, std = _moments(parts[0][0]) if normalize == "standard" else (0.0, source.full_scale)
        parts = [(_scaled(x, mean, std), y) for x, y in parts]
    dtype = jnp.int32 if np.issubdtype(y.dtype, np.integer) else jnp.float32
    return Splits(*(Split(jnp.asarray(x), jnp.asarray(y, dtype)) for x, y in parts))


def length(name: str, seq_len: int) -> int:
    """Steps of the sequences of a task whose config has this `seq_len`.

    It is `seq_len` itself for a task that has no sequences.

    >>> length("adding", 50), length("sequential_mnist", 50)
    (50, 784)
    """
    own = TASKS[name].length
    return seq_len if own is None else own(seq_len)


def fetch(name: str) -> list[Path]:
    """Make sure that the files of a data set lie on this machine, intact; download the others.

    A damaged file in the cache is replaced; one in the user's GRADJAX_DATA_DIR is reported, never
    touched.

    Returns:
      Their paths; none for a data set that comes with a package.

    Raises:
      DataError: no mirror answers with the pinned bytes.
    """
    return [files.fetch(folder, file) for folder, file in _files(name)]


def verify(name: str) -> list[Check]:
    """Compare every file of a data set with its pinned sha256, downloading nothing.

    Returns:
      One (file, sha256 found, ok) per file; sha256 is None where the file is missing.
    """
    return [files.verify(folder, file) for folder, file in _files(name)]


def available() -> list[Entry]:
    """Every data set, with the folder of its files or None where they are still to be fetched."""
    rows = []
    for name, task in TASKS.items():
        paths = [files.find(folder, file) for folder, file in _files(name)]
        place = f"comes with {task.package}" if task.package else "is generated"
        if paths:
            place = None if None in paths else str(paths[0].parent)  # type: ignore[union-attr]
        rows.append(Entry(name, task.description, place))
    return rows


def _files(name: str) -> list[tuple[str, str]]:
    """(folder, file) of every pinned file of a data set."""
    _known("data set", name, TASKS)
    folder = TASKS[name].folder
    return [] if folder is None else [(folder, file) for file in files.pinned(folder)]


def _known(what: str, name: str, options) -> None:
    if name not in options:
        near = difflib.get_close_matches(str(name).lower().replace("-", "_"), options, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"tasks: {what} {name!r} is unknown; known: {', '.join(options)}{hint}")


def _moments(x: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of all entries."""
    flat, mean = x.reshape(len(x), -1), x.mean(dtype=np.float64)
    # einsum sums in buffers: no float64 copy of the data
    return mean, np.sqrt(np.einsum("ij,ij->", flat, flat, dtype=np.float64) / x.size - mean**2)


def _scaled(x: np.ndarray, mean: float, std: float) -> np.ndarray:
    return (x.astype(np.float32) - np.float32(mean)) / np.float32(std)


__getattr__ = suggest_names(__name__)
