"""Text, character by character: the target of every step is the next character.

shakespeare   1.1 million characters of his plays (Karpathy 2015's file; 65 characters)
passage       the opening of Melville's Moby-Dick (1851, public domain), part of the package

Both are ASCII. Case is kept, and line ends are characters.
"""

from importlib import resources

import numpy as np

from gradjax.experiment.tasks import files

Data = tuple[np.ndarray, np.ndarray]


def shakespeare(seq_len: int) -> Data:
    """Windows of the plays that do not overlap, by `characters`."""
    return characters(files.read("text", *files.pinned("text")).decode("ascii"), seq_len, seq_len)


def passage(seq_len: int) -> Data:
    """Windows of the passage that begin seq_len / 16 characters apart, by `characters`.

    They overlap, and so do the splits: a validation score measures how well the passage has been
    memorised.
    """
    folder = resources.files("gradjax.experiment.tasks")
    text = folder.joinpath("passage.txt").read_text(encoding="ascii")
    return characters(text, seq_len, max(1, seq_len // 16))


def characters(text: str, seq_len: int, stride: int) -> Data:
    """Windows of a text and the same windows one character on.

    Characters are numbered by how often they come, the rarest 0: the largest number then occurs in
    every part of the text, and the number of outputs derived from it is enough for all of them.

    Returns:
      x int32 (windows, seq_len), y int32 (windows, seq_len), the characters that follow.
    """
    if len(text) <= seq_len:
        raise ValueError(
            f"tasks: seq_len={seq_len} leaves no window in a text of {len(text)}; lower it."
        )
    codes, inverse, counts = np.unique(
        np.frombuffer(text.encode(), np.uint8), return_inverse=True, return_counts=True
    )
    number = np.empty(len(codes), np.int32)
    number[np.argsort(counts, kind="stable")] = np.arange(len(codes), dtype=np.int32)
    tokens = number[inverse]
    windows = np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)[::stride]
    return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])
