"""Data: a name and a PRNG key give a training, a validation and a test split.

    splits = load("digits", key)
    batch = batch_at(splits.train, key, step, batch_size=64)

The permutation that cuts the splits is a function of the key alone: the test split does not move when the
share for validation changes. `digits` needs no network; MNIST and Fashion-MNIST are read from the folder in
GRADJAX_DATA_DIR, from the cache, or downloaded, and are refused unless their bytes have the pinned sha256.

Not covered: augmentation, streaming, data that do not fit in memory.
"""

import difflib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gradjax.tasks import files, images
from gradjax.tasks.batches import Split as Split
from gradjax.tasks.batches import batch_at as batch_at
from gradjax.tasks.files import Check as Check
from gradjax.tasks.files import DataError as DataError

TASKS = {"digits": images.digits, "mnist": images.mnist, "fashion_mnist": images.fashion_mnist}
NORMALIZE = ("standard", "none")
AUGMENT = ("none",)


class Splits(NamedTuple):
    """Disjoint parts of a data set, each a `Split`."""

    train: Split
    validation: Split
    test: Split


class Entry(NamedTuple):
    """A row of `gradjax data list`: name, what it is, and where it lies (None: not on this machine)."""

    name: str
    description: str
    place: str | None


def load(name: str, key: Array, *, validation: float = 0.15, test: float = 0.15, normalize: str = "standard") -> Splits:
    """Read a data set and cut it into training, validation and test split.

    `standard` subtracts one mean and divides by one standard deviation, both scalars over all features of the
    TRAINING split alone, so that q_0 = |x|^2 / n is about 1 and dead pixels stay finite.

    Args:
      name: a name in `TASKS`.
      key: PRNG key that decides which example falls into which split, and nothing else.
      validation: share of the examples kept for validation, in [0, 1). 0.15: the usual 70/15/15.
      test: the same for the test. A data set with an official test set (MNIST, Fashion-MNIST) keeps that one,
        ignores this share, and takes `validation` from its official training set.
      normalize: "standard", or "none": pixels in [0, 1].

    Returns:
      Splits with x float32 of shape (examples, features) and y int32 of shape (examples,).

    Raises:
      ValueError: an unknown name, or shares that leave nothing to train on.
      DataError: files that are missing and cannot be downloaded, or whose bytes are not the pinned ones.

    >>> splits = load("digits", jax.random.key(0))
    >>> [split.x.shape for split in splits]
    [(1257, 64), (270, 64), (270, 64)]
    """
    _known("data set", name, TASKS)
    _known("normalisation", normalize, NORMALIZE)
    if not (0 <= validation < 1 and 0 <= test < 1 and validation + test < 1):
        raise ValueError(
            f"tasks: validation={validation} and test={test} leave nothing to train on; needed: shares of the "
            f"examples, each in [0, 1), with a sum below 1."
        )
    source = TASKS[name]()
    order = np.asarray(jax.random.permutation(key, len(source.y)))
    num_test = 0 if source.test else round(test * len(order))
    num_held = num_test + round(validation * len(order))
    held_out, kept = order[:num_test], order[num_held:]
    if not len(kept):
        raise ValueError(
            f"tasks: validation={validation} and test={test} leave none of the {len(order)} examples of "
            f"{name} to train on; lower them."
        )
    parts = [(source.x[part], source.y[part]) for part in (kept, order[num_test:num_held], held_out)]
    if source.test:
        parts[2] = source.test
    mean, std = 0.0, source.full_scale
    if normalize == "standard":
        train = parts[0][0]
        mean = train.mean(dtype=np.float64)
        # einsum sums in buffers: no float64 copy of the data
        std = np.sqrt(np.einsum("ij,ij->", train, train, dtype=np.float64) / train.size - mean**2)
    return Splits(*(Split(_scaled(x, mean, std), jnp.asarray(y, jnp.int32)) for x, y in parts))


def fetch(name: str) -> list[Path]:
    """Make sure that the files of a data set lie on this machine, intact; download what does not.

    A damaged file in the cache is replaced; one in the user's GRADJAX_DATA_DIR is reported, never touched.

    Returns:
      Their paths; none for a data set that comes with a package.

    Raises:
      DataError: no mirror answers with the pinned bytes.
    """
    _known("data set", name, TASKS)
    return [files.fetch(name, file) for file in files.pinned(name)]


def verify(name: str) -> list[Check]:
    """Compare every file of a data set with its pinned sha256, downloading nothing.

    Returns:
      One (file, sha256 found, ok) per file; sha256 is None where the file is missing.
    """
    _known("data set", name, TASKS)
    return [files.verify(name, file) for file in files.pinned(name)]


def available() -> list[Entry]:
    """Every data set, with the folder of its files or None where they are still to be fetched."""
    rows = []
    for name, description in images.DESCRIPTIONS.items():
        paths = [files.find(name, file) for file in files.pinned(name)]
        missing = None in paths
        place = None if missing else str(paths[0].parent) if paths and paths[0] else "comes with scikit-learn"
        rows.append(Entry(name, description, place))
    return rows


def _known(what: str, name: str, options) -> None:
    if name not in options:
        near = difflib.get_close_matches(str(name).lower().replace("-", "_"), options, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"tasks: {what} {name!r} is unknown; known: {', '.join(options)}{hint}")


def _scaled(x: np.ndarray, mean: float, std: float) -> Array:
    return jnp.asarray((x.astype(np.float32) - np.float32(mean)) / np.float32(std))
