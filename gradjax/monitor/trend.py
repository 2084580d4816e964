"""What shows over a whole training and not in a jump: announced once each.

    loss         inf or NaN although the gradient is finite; a million times its median
    gradient     exactly 0 in every leaf for a whole window
    growth       a norm 2^20 times what it was in the first steps: at 1.02 per step after 700 steps

A window's median follows a slow growth, so that `gradjax.monitor.alarm` never sees one. 2^20 is
ours: a training that learns does not change the norm of its gradient, of its update or of its
parameters a millionfold, unless it started from (nearly) nothing; norms of 0 have no growth.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from gradjax.monitor.alarm import QUANTITIES

# Steps whose median is what the growth is measured from.
FIRST_STEPS = 16
GROWTH = 20.0
LOSS_FACTOR = 1e6


class Trend:
    """Loss and total norms of every lane, since the first step.

    Args:
      window: number of steps of a loss's history, and of gradients of 0 that are announced.
    """

    def __init__(self, window: int):
        self.window = window
        # of the first steps, until they are FIRST_STEPS
        self._first: list[np.ndarray] = []
        self._start = np.zeros(0)
        self._losses: deque[np.ndarray] = deque(maxlen=window)
        self._middle = np.zeros(0)
        # steps since the median was taken; steps in a row without a gradient
        self._unused, self._zeros = 0, np.zeros(0, int)
        self._announced: set[tuple[int, str]] = set()

    def new_alerts(
        self,
        steps: list[int],
        norms: np.ndarray,
        losses: np.ndarray,
        known: np.ndarray,
        alive: np.ndarray,
    ) -> Iterator[tuple[int, int, str]]:
        """Append steps and yield what is new in them.

        Args:
          steps: one for each row.
          norms: (steps, lanes, quantities), log2 of the total norms.
          losses: (steps, lanes).
          known: (steps,), whether the loss of a step is known.
          alive: (lanes,), the lanes that are judged.

        Yields:
          (step, lane, text).
        """
        if not steps:
            return
        # What growth is measured from is learned before it is asked for.
        missing = FIRST_STEPS - len(self._first)
        if 0 < missing < len(steps):
            for part in (slice(missing), slice(missing, None)):
                rows = norms[part], losses[part], known[part]
                yield from self.new_alerts(steps[part], *rows, alive)
            return
        if not self._zeros.size:
            self._zeros = np.zeros(losses.shape[1], int)
        # Calm steps, which nearly all are, need no look at each.
        if self._is_calm(norms, losses, known):
            self._zeros[:] = 0
        else:
            for step, norm, loss, is_known in zip(steps, norms, losses, known, strict=True):
                for lane, what, text in self._found(norm, loss if is_known else None):
                    if alive[lane] and (lane, what) not in self._announced:
                        self._announced.add((lane, what))
                        yield step, int(lane), text
        self._learn(norms, losses[known])

    def _is_calm(self, norms: np.ndarray, losses: np.ndarray, known: np.ndarray) -> bool:
        if not self._start.size or not np.isfinite(losses[known]).all():
            return False
        is_large = self._middle.size and self._is_large(losses[known]).any()
        return not (is_large or np.isneginf(norms[:, :, 0]).any() or self._grown(norms).any())

    def _learn(self, norms: np.ndarray, losses: np.ndarray) -> None:
        if len(self._first) < FIRST_STEPS:
            self._first += list(norms[: FIRST_STEPS - len(self._first)])
            if len(self._first) == FIRST_STEPS:
                self._start = np.median(np.stack(self._first), axis=0)
        self._losses.extend(np.abs(losses))
        self._unused += len(losses)
        if self._unused >= self.window // 4 and len(self._losses) >= self.window // 2:
            self._middle, self._unused = np.median(np.stack(self._losses), axis=0), 0

    def _is_large(self, losses: np.ndarray) -> np.ndarray:
        return (np.abs(losses) > LOSS_FACTOR * self._middle) & (self._middle > 0)

    def _grown(self, norms: np.ndarray) -> np.ndarray:
        """Which norms have grown out of proportion; from 0 or to inf there is no growth."""
        with np.errstate(invalid="ignore"):
            growth = norms - self._start
        return (growth > GROWTH) & np.isfinite(growth)

    def _found(self, norm: np.ndarray, loss: np.ndarray | None) -> Iterator[tuple[Any, str, str]]:
        """(lane, what, text) of what one step shows."""
        self._zeros = np.where(np.isneginf(norm[:, 0]), self._zeros + 1, 0)
        for lane in np.flatnonzero(self._zeros >= self.window):
            yield lane, "zero", f"the gradient is exactly 0 for {self.window} steps"
        if loss is not None:
            for lane in np.flatnonzero(~np.isfinite(loss) & (norm[:, 0] < np.inf)):
                text = f"the loss is {loss[lane]} although the gradient is finite"
                yield lane, "loss", text
        if loss is not None and self._middle.size:
            for lane in np.flatnonzero(np.isfinite(loss) & self._is_large(loss)):
                middle = self._middle[lane]
                text = f"the loss is {loss[lane]:.3g}, a million times its median {middle:.3g}"
                yield lane, "large loss", text
        if self._start.size:
            for lane, k in np.argwhere(self._grown(norm)):
                quantity, exponent = QUANTITIES[k], norm[lane, k] - self._start[lane, k]
                yield (
                    lane,
                    f"growth of {quantity}",
                    f"norm of the {quantity} has grown by 2^{exponent:.0f} since the first "
                    f"{FIRST_STEPS} steps",
                )
