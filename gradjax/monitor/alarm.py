"""Early warning: which norms of a watched training leave their history, and which of that is news.

With x = log2 of the norm of the gradient, the update or the parameters, of every leaf (layer) and
of the whole tree, and the median m of the last `window` steps, a step is out of its history where

    x > m + max(deviations * 1.4826 median|x_i - m|, log2(factor))

(1.4826 makes the median deviation a standard deviation for Gaussian x; the rule of
`transforms.skip_spikes`, with its sources). `factor` = 4 is ours: against its own median a norm
that grows linearly from zero is at 2, and one that grows quadratically at 4; only faster growth,
and jumps, are beyond it. An update may jump as far as its gradient: momentum smooths what is noise
there, and then shows a single large gradient all the more. Leaves are many, and the gradient of one
is noisier than that of all, so a leaf has to be out for two steps in a row. One episode, which ends
after half a window without any, gives one line for each of gradient, update and parameters. Cost:
two medians of the window every quarter of one.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

QUANTITIES = ("gradient", "update", "parameters")  # the first fields of watch's figures
_SUSPECTS = 10


class Alarm:
    """Which norms left their history, since when, and what of it is news; groups are the leaves and
    the whole tree.
    """

    def __init__(self, window: int, deviations: float, least: float):
        self.window, self.is_on = window, False
        self.labels: list[str] = []  # of the leaves
        self._deviations, self._least = deviations, least  # least: log2
        self._rows: deque[np.ndarray] = deque(maxlen=window)  # (lanes, quantities, groups + 1)
        self._unused = 0  # rows that the limits do not know yet
        self._calm = 0  # rows since the last that was out
        self._middle = self._limit = self._runs = np.zeros(0)
        self._since = self._bar = np.zeros(0)  # the step of leaving, and the limit that was passed
        self._told: set[tuple[Any, str]] = set()  # of this episode

    def new_alerts(
        self, steps: list[int], rows: np.ndarray, alive: np.ndarray
    ) -> Iterator[tuple[int, int, str]]:
        """(step, lane, text) of what is new in some rows, which are remembered.

        Args:
          steps: of the rows.
          rows: (steps, lanes, fields, groups), watch's figures.
          alive: (lanes,), those that are to be judged.
        """
        if not len(rows):
            return
        rows = _with_whole(rows[:, :, : len(QUANTITIES)])
        if not self._rows:
            self._runs, self._since = np.zeros(rows.shape[1:], int), np.full(rows.shape[1:], -1)
            self._bar = np.full(rows.shape[1:], np.inf)
        is_calm = not self.is_on and not self._runs.any() and (rows < np.inf).all()
        if is_calm and (
            not self._limit.size or not (rows > self._limit).any()
        ):  # nearly always, and cheaper
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
        excess[:, 1] = np.maximum(
            excess[:, 0], excess[:, 1]
        )  # the update may jump as far as the gradient
        self._middle, self._limit = (
            middle,
            np.where(np.isfinite(middle), np.nan_to_num(middle) + excess, np.inf),
        )

    def _compare(self, step: int, row: np.ndarray, alive: np.ndarray) -> Iterator[tuple]:
        if not self._limit.size:
            return
        if self._told and self._calm >= self.window // 2:  # the episode is over
            self.is_on, self._since = (
                False,
                np.where(row > self._bar, self._since, -1),
            )  # what grew on did not return
            self._told.clear()
        self._runs = np.where(row > self._limit, self._runs + 1, 0)
        self._runs[~alive] = 0
        out = self._runs >= 2  # a leaf: twice in a row
        out[:, :, -1] = self._runs[:, :, -1] >= 1
        self._calm = 0 if out.any() else self._calm + 1
        if out.any():
            self.is_on = True
            is_new = out & (self._since < 0)
            self._since = np.where(is_new, step - (self._runs - 1), self._since)
            self._bar = np.where(is_new, self._limit, self._bar)
            for lane, quantity in np.argwhere(out.any(2)):
                if (lane, QUANTITIES[quantity]) not in self._told:
                    self._told.add((lane, QUANTITIES[quantity]))
                    yield (
                        step,
                        lane,
                        self._describe(row[lane, quantity], out[lane, quantity], lane, quantity),
                    )

    def _caught(self, step: int, row: np.ndarray, alive: np.ndarray) -> Iterator[tuple]:
        is_bad = ~(row[:, 0, :-1] < np.inf)
        for lane in np.flatnonzero(is_bad.any(1) & alive):
            self._calm = 0
            if (lane, "caught") not in self._told:
                self._told.add((lane, "caught"))
                leaf = self.labels[int(np.argmax(is_bad[lane]))]
                yield (
                    step,
                    lane,
                    f"gradient of {leaf} not finite; the update is finite, a guard may hold it",
                )

    def _score(self, x: np.ndarray, middle: np.ndarray, limit: np.ndarray) -> np.ndarray:
        """1 at the limit; 0 at the median."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.nan_to_num((x - middle) / (limit - middle), nan=0.0, neginf=0.0)

    def _describe(self, x: np.ndarray, out: np.ndarray, lane: int, quantity: int) -> str:
        """Of the leaf furthest out; of the whole tree where that is out alone."""
        middle, limit = self._middle[lane, quantity], self._limit[lane, quantity]
        score = self._score(x, middle, limit)[:-1]
        leaf = self.labels[int(np.argmax(score))] if self.labels else ""
        at, whose = (
            (int(np.argmax(score)), f"of {leaf}")
            if out[:-1].any()
            else (-1, f"of all (most in {leaf})")
        )
        factor, most = (2.0 ** min(float(value[at] - middle[at]), 1000.0) for value in (x, limit))
        text = f"norm of the {QUANTITIES[quantity]} {whose} is {factor:.3g} times its median of {len(self._rows)} steps"
        return f"{text} (limit {most:.3g})"

    def suspects(self, lane: int) -> list[dict[str, Any]]:
        """The leaves in the order in which they left their history for good, then by how near they
        are to that.
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
            one = {"leaf": self.labels[at[1]], "quantity": QUANTITIES[at[0]]}
            one |= {
                "out_since": int(since[at]) if since[at] >= 0 else None,
                "fraction_of_limit": score[at],
            }
            found.setdefault(one["leaf"], one | {"log2_norm": x[at], "log2_median": middle[at]})
        return list(found.values())[:_SUSPECTS]


def _median(x: np.ndarray) -> np.ndarray:
    """Over the first axis, the lower of two: -inf among numbers makes no NaN."""
    return np.partition(x, (len(x) - 1) // 2, axis=0)[(len(x) - 1) // 2]


def _with_whole(rows: np.ndarray) -> np.ndarray:
    """Behind the log2 norms of the groups on the last axis that of all together."""
    largest = np.max(rows, axis=-1, initial=-np.inf, keepdims=True)
    with np.errstate(all="ignore"):
        total = (
            0.5 * np.log2(np.sum(np.exp2(2 * (rows - largest)), axis=-1, keepdims=True)) + largest
        )
    return np.concatenate([rows, np.where(np.isfinite(largest), total, largest)], axis=-1)
