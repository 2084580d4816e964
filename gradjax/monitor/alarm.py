"""Early warning: which norms of a watched training leave their history, announced once each.

With x = log2 of the norm of the gradient, the update or the parameters, of every leaf (layer) and
of the whole tree, and the median m of the last `window` steps, a step is out of its history where

    x > m + max(deviations * 1.4826 median|x_i - m|, log2(factor))

(1.4826 makes the median deviation a standard deviation for Gaussian x; the rule of
`transforms.skip_spikes`, with its sources). `factor` = 4 is ours: a norm that grows linearly from
zero is at 2 times its own median, and one that grows quadratically at 4 times; only faster growth
and jumps exceed it. An update may jump as far as its gradient: momentum smooths noise, and so a
single large gradient stands out of it all the more. There are many leaves, and the gradient of one
is noisier than that of all, so a leaf has to be out for two steps in a row. One episode, which ends
after half a window with no norm out, gives one line for each of gradient, update and parameters.
Cost: two medians of the window in every quarter of a window.

A *lane* is one member of a vmap over the training.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

# The first fields of watch's rows.
QUANTITIES = ("gradient", "update", "parameters")
# Leaves in a crash file's list.
_SUSPECTS = 10


class Alarm:
    """Which norms left their history, and since when. Groups are the leaves and the whole tree.

    Args:
      window: number of steps of the history.
      deviations: how many deviations a norm may lie above its median.
      least: log2 of the smallest growth that counts.

    Attributes:
      is_on: whether an episode has begun and not ended.
      labels: names of the leaves.
      totals: (rows, lanes, quantities) of the rows seen last, norms of the whole tree.
    """

    def __init__(self, window: int, deviations: float, least: float):
        self.window, self.is_on = window, False
        self.labels: list[str] = []
        self.totals = np.zeros((0, 0, len(QUANTITIES)))
        self._deviations, self._least = deviations, least
        # (lanes, quantities, groups + 1) each
        self._rows: deque[np.ndarray] = deque(maxlen=window)
        # rows since the limits were computed, and since the last one with a norm out
        self._unused = 0
        self._calm = 0
        self._middle = self._limit = self._runs = np.zeros(0)
        # the step at which a norm left its history, and the limit that it passed
        self._since = self._bar = np.zeros(0)
        # (lane, what) that this episode has announced
        self._announced: set[tuple[Any, str]] = set()

    def new_alerts(
        self, steps: list[int], rows: np.ndarray, alive: np.ndarray
    ) -> Iterator[tuple[int, int, str]]:
        """Append rows to the history and yield what is new in them.

        Args:
          steps: one for each row.
          rows: (steps, lanes, fields, groups), watch's rows.
          alive: (lanes,), the lanes that are judged.

        Yields:
          (step, lane, text).
        """
        if not len(rows):
            return
        rows = _with_whole(rows[:, :, : len(QUANTITIES)])
        self.totals = rows[..., -1]
        if not self._rows:
            self._runs, self._since = np.zeros(rows.shape[1:], int), np.full(rows.shape[1:], -1)
            self._bar = np.full(rows.shape[1:], np.inf)
        is_calm = not self.is_on and not self._runs.any() and (rows < np.inf).all()
        if is_calm and self._limit.size:
            is_calm = not (rows > self._limit).any()
        # Calm rows, which nearly all are, need no look at each.
        if is_calm:
            self._calm += len(rows)
        else:
            for step, row in zip(steps, rows, strict=True):
                yield from self._compare(step, row, alive)
                yield from self._caught(step, row, alive)
        self._rows.extend(rows)
        self._unused += len(rows)
        if self._unused >= self.window // 4 and len(self._rows) >= self.window // 2:
            self._learn()

    def _learn(self) -> None:
        past, self._unused = np.stack(self._rows), 0
        with np.errstate(invalid="ignore"):
            middle = _median(past)
            spread = _median(np.abs(past - middle))
        excess = np.maximum(
            self._deviations * 1.4826 * np.nan_to_num(spread, nan=np.inf), self._least
        )
        # The update may jump as far as the gradient.
        excess[:, 1] = np.maximum(excess[:, 0], excess[:, 1])
        self._middle = middle
        self._limit = np.where(np.isfinite(middle), np.nan_to_num(middle) + excess, np.inf)

    def _compare(self, step: int, row: np.ndarray, alive: np.ndarray) -> Iterator[tuple]:
        if not self._limit.size:
            return
        if self._announced and self._calm >= self.window // 2:
            # The episode is over; a norm that stayed above the limit it passed did not return.
            self.is_on = False
            self._since = np.where(row > self._bar, self._since, -1)
            self._announced.clear()
        self._runs = np.where(row > self._limit, self._runs + 1, 0)
        self._runs[~alive] = 0
        # A leaf is out after two steps in a row, the whole tree after one.
        out = self._runs >= 2
        out[:, :, -1] = self._runs[:, :, -1] >= 1
        self._calm = 0 if out.any() else self._calm + 1
        if out.any():
            self.is_on = True
            is_new = out & (self._since < 0)
            self._since = np.where(is_new, step - (self._runs - 1), self._since)
            self._bar = np.where(is_new, self._limit, self._bar)
            for lane, quantity in np.argwhere(out.any(2)):
                if (lane, QUANTITIES[quantity]) not in self._announced:
                    self._announced.add((lane, QUANTITIES[quantity]))
                    norms, is_out = row[lane, quantity], out[lane, quantity]
                    yield step, lane, self._describe(norms, is_out, lane, quantity)

    def _caught(self, step: int, row: np.ndarray, alive: np.ndarray) -> Iterator[tuple]:
        """Gradients that are not finite, though the update is."""
        is_bad = ~(row[:, 0, :-1] < np.inf)
        for lane in np.flatnonzero(is_bad.any(1) & alive):
            self._calm = 0
            if (lane, "caught") not in self._announced:
                self._announced.add((lane, "caught"))
                leaf = self.labels[int(np.argmax(is_bad[lane]))]
                text = f"gradient of {leaf} not finite; the update is finite, a guard may hold it"
                yield step, lane, text

    def _score(self, x: np.ndarray, middle: np.ndarray, limit: np.ndarray) -> np.ndarray:
        """1 at the limit; 0 at the median."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.nan_to_num((x - middle) / (limit - middle), nan=0.0, neginf=0.0)

    def _describe(self, x: np.ndarray, out: np.ndarray, lane: int, quantity: int) -> str:
        """Describe the leaf furthest out, or the whole tree if only that is out."""
        middle, limit = self._middle[lane, quantity], self._limit[lane, quantity]
        score = self._score(x, middle, limit)[:-1]
        leaf = self.labels[int(np.argmax(score))] if self.labels else ""
        at, whose = -1, f"of all (most in {leaf})"
        if out[:-1].any():
            at, whose = int(np.argmax(score)), f"of {leaf}"
        factor, most = (2.0 ** min(float(value[at] - middle[at]), 1000.0) for value in (x, limit))
        return (
            f"norm of the {QUANTITIES[quantity]} {whose} is {factor:.3g} times its median of "
            f"{len(self._rows)} steps (limit {most:.3g})"
        )

    def suspects(self, lane: int) -> list[dict[str, Any]]:
        """The leaves in the order in which they left their history for good.

        Those that did not follow in the order of how near they are to it.
        """
        if not self._limit.size or not self.labels:
            return []
        x, middle, limit, since = (
            a[lane, :, :-1] for a in (self._rows[-1], self._middle, self._limit, self._since)
        )
        score = self._score(x, middle, limit)
        order = np.lexsort((-score.ravel(), np.where(since < 0, np.iinfo(int).max, since).ravel()))
        found: dict[str, dict[str, Any]] = {}
        for at in zip(*np.unravel_index(order, since.shape), strict=True):
            leaf = self.labels[at[1]]
            if leaf in found:
                continue
            found[leaf] = {
                "leaf": leaf,
                "quantity": QUANTITIES[at[0]],
                "out_since": int(since[at]) if since[at] >= 0 else None,
                "fraction_of_limit": score[at],
                "log2_norm": x[at],
                "log2_median": middle[at],
            }
        return list(found.values())[:_SUSPECTS]


def _median(x: np.ndarray) -> np.ndarray:
    """The median over the first axis, the lower of two: with -inf their mean could be NaN."""
    middle = (len(x) - 1) // 2
    return np.partition(x, middle, axis=0)[middle]


def _with_whole(rows: np.ndarray) -> np.ndarray:
    """Append to the log2 norms of the groups, on the last axis, that of all together."""
    largest = np.max(rows, axis=-1, initial=-np.inf, keepdims=True)
    with np.errstate(all="ignore"):
        squares = np.sum(np.exp2(2 * (rows - largest)), axis=-1, keepdims=True)
        total = 0.5 * np.log2(squares) + largest
    return np.concatenate([rows, np.where(np.isfinite(largest), total, largest)], axis=-1)
