"""Images of ten classes, as uint8 pixels: scikit-learn's digits (offline), MNIST, Fashion-MNIST.

References:
  Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI (digits, its test set of
  1,797).
  LeCun, Bottou, Bengio, Haffner 1998, Gradient-Based Learning Applied to Document Recognition
  (MNIST).
  Xiao, Rasul, Vollgraf 2017, Fashion-MNIST, arXiv 1708.07747.
"""

import math
from typing import NamedTuple

import numpy as np

from gradjax.core.extras import needed_for
from gradjax.experiment.tasks import files


class Source(NamedTuple):
    """A data set before it is split.

    x and y have one entry per example. `full_scale` is the value of white in uint8 images; where it
    is None, the network sees x as it is. `test` is an official test set (x, y).
    """

    x: np.ndarray
    y: np.ndarray
    full_scale: float | None = None
    test: tuple[np.ndarray, np.ndarray] | None = None


def image_shape(features: int) -> tuple[int, int, int] | None:
    """(side, side, channels) of a flat square image: 1 channel where that fits, else 3, else None.

    >>> image_shape(64), image_shape(147), image_shape(50)
    ((8, 8, 1), (7, 7, 3), None)
    """
    for channels in (1, 3):
        side = math.isqrt(features // channels)
        if side * side * channels == features:
            return side, side, channels
    return None


def digits() -> Source:
    """scikit-learn's digits: no download, no official test set."""
    with needed_for("task.name = 'digits'"):
        from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return Source(np.asarray(x, np.uint8), np.asarray(y), full_scale=16.0)


def idx(name: str) -> Source:
    """MNIST or Fashion-MNIST, with its official test set of 10,000."""
    x, y, test_x, test_y = (_idx(files.read(name, file)) for file in files.pinned(name))
    return Source(x, y, 255.0, (test_x, test_y))


def _idx(data: bytes) -> np.ndarray:
    """A uint8 IDX file as (examples, features) or (examples,).

    Two zero bytes, the type, the number of dimensions, each as a big-endian int32, and the values.
    Nothing is checked here: the bytes have the pinned hash.
    """
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    return values.reshape(shape[0], -1) if len(shape) > 1 else values
