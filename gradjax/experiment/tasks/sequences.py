"""Sequences whose answer lies far back, generated from a key: the papers' tests of long memory.

Each is a function (key, seq_len, num_examples) -> (x, y) with x float32 (examples, steps,
features).

    adding              sum of the two marked numbers (Hochreiter & Schmidhuber 1997, experiment 4)
    copy_memory         recall ten symbols after a wait (the same, experiment 2; Arjovsky 2016,
                        arXiv 1511.06464)
    copy_symbol         recall one of them
    temporal_order      in which order two symbols came (the same, experiment 6a; Pascanu 2013,
                        arXiv 1211.5063)
    keyword_spotting    which of ten words was spoken (synthetic: formants that glide, at a random
                        time)
    by_pixel            an image, one pixel after the other (Le et al. 2015, arXiv 1504.00941)
"""

import jax
import numpy as np
from jax import Array

# More than a small network can memorise, generated in well under a second.
NUM_EXAMPLES = 4000
# Symbols of copy memory, besides a blank and a marker (Arjovsky 2016, section 5.1), and how many of
# them an example has.
SYMBOLS = 8
COPIED = 10
# Frequency bands of keyword spotting.
BANDS = 12

Data = tuple[np.ndarray, np.ndarray]


def _random(key: Array) -> np.random.Generator:
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())


def _one_hot(symbols: np.ndarray, size: int) -> np.ndarray:
    return np.eye(size, dtype=np.float32)[symbols]


def _at_least(name: str, seq_len: int, needed: int) -> None:
    if seq_len < needed:
        raise ValueError(
            f"tasks: {name} of seq_len={seq_len} has no room; needed: at least {needed}."
        )


def adding(key: Array, seq_len: int, num_examples: int = NUM_EXAMPLES) -> Data:
    """The adding problem: y = the sum of the two numbers that are marked, one in each half.

    Returns:
      x (examples, seq_len, 2): numbers uniform in [0, 1], and marks 0 or 1; y float32 (examples,).
      Always predicting the mean, 1, gives a squared error of 1/6 (R^2 = 0).
    """
    _at_least("adding", seq_len, 2)
    random, rows, half = _random(key), np.arange(num_examples), seq_len // 2
    x = np.zeros((num_examples, seq_len, 2), np.float32)
    x[..., 0] = random.random((num_examples, seq_len), np.float32)
    x[rows, random.integers(0, half, num_examples), 1] = 1
    x[rows, random.integers(half, seq_len, num_examples), 1] = 1
    return x, (x[..., 0] * x[..., 1]).sum(1, dtype=np.float32)


def copy_memory(
    key: Array, seq_len: int, num_examples: int = NUM_EXAMPLES, num_symbols: int = COPIED
) -> Data:
    """Copy memory: recall `num_symbols` symbols after seq_len blanks, the last one a marker.

    Returns:
      x (examples, seq_len + 2 num_symbols, 10): one-hot of 8 symbols, blank and marker; y int32
      (examples, seq_len + 2 num_symbols): the symbols at the last num_symbols steps, -1 (masked)
      before. Guessing has accuracy 1/8 and loss log 8 there, which is 10 log 8 / (seq_len + 20) per
      step in papers that also score the blanks.
    """
    symbols = _random(key).integers(0, SYMBOLS, (num_examples, num_symbols))
    steps = np.full((num_examples, seq_len + 2 * num_symbols), SYMBOLS)
    steps[:, :num_symbols] = symbols
    steps[:, num_symbols + seq_len - 1] = SYMBOLS + 1
    y = np.full(steps.shape, -1, np.int32)
    y[:, -num_symbols:] = symbols
    return _one_hot(steps, SYMBOLS + 2), y


def copy_symbol(key: Array, seq_len: int, num_examples: int = NUM_EXAMPLES) -> Data:
    """`copy_memory` of one symbol."""
    return copy_memory(key, seq_len, num_examples, num_symbols=1)


def temporal_order(key: Array, seq_len: int, num_examples: int = NUM_EXAMPLES) -> Data:
    """Temporal order: which of A, B came in [T/10, 2T/10), and which in [4T/10, 5T/10).

    Returns:
      x (examples, seq_len, 6): one-hot of A, B and the four distractors of all other steps; y int32
      (examples,): AA, AB, BA, BB.
    """
    _at_least("temporal_order", seq_len, 10)
    random, rows = _random(key), np.arange(num_examples)
    steps = random.integers(2, 6, (num_examples, seq_len))
    first, second = random.integers(0, 2, (2, num_examples))
    steps[rows, random.integers(seq_len // 10, 2 * seq_len // 10, num_examples)] = first
    steps[rows, random.integers(4 * seq_len // 10, 5 * seq_len // 10, num_examples)] = second
    return _one_hot(steps, 6), (2 * first + second).astype(np.int32)


# Start and end of two formants, as fractions of the bands, low to high: every word has each of its
# ends in common with other words.
WORDS = np.array(
    [
        [(0.1, 0.4), (0.6, 0.9)], [(0.4, 0.1), (0.6, 0.9)],
        [(0.1, 0.4), (0.9, 0.6)], [(0.4, 0.1), (0.9, 0.6)],
        [(0.1, 0.1), (0.6, 0.9)], [(0.4, 0.4), (0.6, 0.9)],
        [(0.1, 0.1), (0.9, 0.6)], [(0.4, 0.4), (0.9, 0.6)],
        [(0.1, 0.4), (0.6, 0.6)], [(0.4, 0.1), (0.9, 0.9)],
    ]
)  # fmt: skip


def keyword_spotting(key: Array, seq_len: int, num_examples: int = NUM_EXAMPLES) -> Data:
    """Keyword spotting on speech-like spectra: a word of two gliding formants in a noisy frame.

    The word takes a fifth to a third of the frame and begins at a random time in its first half, in
    a voice whose formants lie up to 0.06 of the bands higher or lower; it rises and fades. Noise of
    standard deviation 0.3 is everywhere.

    Returns:
      x (examples, seq_len, 12): magnitudes in 12 bands; y int32 (examples,): one of ten words.
    """
    _at_least("keyword_spotting", seq_len, 10)
    random = _random(key)
    y = random.integers(0, len(WORDS), num_examples).astype(np.int32)
    onset = random.uniform(0, 0.5, (num_examples, 1))
    length = random.uniform(0.2, 0.33, (num_examples, 1))
    voice = random.uniform(-0.06, 0.06, (num_examples, 1))
    # 0 .. 1 inside the word
    place = (np.arange(seq_len) / seq_len - onset) / length
    loudness = np.where((place >= 0) & (place <= 1), np.sin(np.pi * np.clip(place, 0, 1)), 0.0)
    bands = (np.arange(BANDS) + 0.5) / BANDS
    x = random.normal(0, 0.3, (num_examples, seq_len, BANDS))
    for formant in (0, 1):
        start, end = WORDS[y, formant].T[..., None]
        pitch = start + (end - start) * place + voice
        x += loudness[..., None] * np.exp(-0.5 * np.square((bands - pitch[..., None]) / 0.06))
    return x.astype(np.float32), y


def by_pixel(images: np.ndarray) -> np.ndarray:
    """Images (examples, pixels) as sequences (examples, pixels, 1)."""
    return images[..., None]
