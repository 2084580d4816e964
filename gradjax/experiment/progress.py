"""Progress of a sweep: events for the caller, and the meter that counts member-steps."""

import math
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from gradjax.experiment.training import Record


class Progress(NamedTuple):
    """An event for the caller's `progress`, between chunks.

    Attributes:
      message: a line to print, or "".
      done: member-steps so far, of `total`.
      total: member-steps in all.
      steps_per_second: member-steps per second.
      loss: median over the blocks at work of their members' median loss.
      diverged: members so far.
    """

    message: str
    done: float = 0.0
    total: float = 1.0
    steps_per_second: float = 0.0
    loss: float = math.nan
    diverged: int = 0


Report = Callable[[Progress], None]


def ignore(event: Progress) -> None:
    """The default of `progress=`."""


class Meter:
    """Counts member-steps and reports them between chunks; workers call it from their threads."""

    def __init__(self, total: float, progress: Report):
        self.total, self.progress, self.lock = total, progress, threading.Lock()
        self.done, self.computed, self.began = 0.0, 0.0, time.monotonic()
        # (cell, block) -> (diverged members, median loss)
        self.seen: dict[tuple[int, int], tuple[int, float]] = {}

    def start(self) -> None:
        """Start the clock of the speed, unless steps have been computed already."""
        if not self.computed:
            self.began = time.monotonic()

    def skip(self, member_steps: float) -> None:
        """Count what an earlier run has computed."""
        with self.lock:
            self.done += member_steps

    def advance(
        self, block: tuple[int, int], members: int, num_steps: int, record: "Record"
    ) -> None:
        """Count a chunk and report.

        Args:
          block: numbers of the cell and of the block.
          members: members of the block, without the repeated ones.
          num_steps: steps of the chunk.
          record: of the block so far, (lanes, steps).
        """
        with self.lock:
            self.done += members * num_steps
            self.computed += members * num_steps
            diverged = int(record.frozen[:members].sum())
            self.seen[block] = diverged, _median(record.loss[:members, -1])
            loss = _median(np.array([loss for _, loss in self.seen.values()]))
            diverged = sum(count for count, _ in self.seen.values())
            speed = self.computed / max(time.monotonic() - self.began, 1e-9)
            self.progress(Progress("", self.done, self.total, speed, loss, diverged))


def _median(values: Any) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else math.nan
