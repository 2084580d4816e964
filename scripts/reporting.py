"""What the scripts share: numbers with intervals, progress, options, the files of a run."""

import argparse
import contextlib
import difflib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from gradjax.experiment import sweep
from gradjax.report import files

# Numbers with intervals


class Row(NamedTuple):
    """A number with its 95% interval."""

    label: str
    value: float
    low: float
    high: float

    @property
    def numbers(self) -> str:
        """The number and its interval; a count has none."""
        if self.low == self.high:
            return f"{self.value:,.0f}" if self.value == round(self.value) else f"{self.value:.3g}"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def mean(label: str, values: np.ndarray) -> Row:
    """Student's interval of a mean over seeds."""
    values = np.asarray(values, float)
    spread = scipy.stats.sem(values) if len(values) > 1 else math.nan
    half = scipy.stats.t.ppf(0.975, max(len(values) - 1, 1)) * spread
    middle = float(values.mean())
    return Row(label, middle, float(middle - half), float(middle + half))


def fraction(label: str, trained: np.ndarray) -> Row:
    """Wilson's interval of the fraction of seeds that train."""
    return Row(label, float(trained.mean()), *files.wilson(int(trained.sum()), len(trained)))


def above(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether `a` is above `b` seed by seed: the interval of the mean difference lies above 0."""
    return mean("", np.asarray(a, float) - np.asarray(b, float)).low > 0


# Commands


def parser(doc: str) -> argparse.ArgumentParser:
    """Options of every command: --json and --output."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", action="store_true", help="print one JSON object, no table")
    made.add_argument("--output", default="runs", help="folder of the run folder; default: runs")
    return made


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that does not exist, with the nearest and all that do."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]}?" if near else "."
    return f"unknown {what} {name!r}{hint} The {what}s are {', '.join(known)}."


def save(
    folder: Path, name: str, summary: dict[str, Any], began: float, figure: Any = None
) -> dict[str, Any]:
    """Write `<name>.json`, and the figure as PNG and SVG, into the run folder.

    Returns:
        The summary with `seconds` since `began`, the folder, and the versions.
    """
    if figure is not None:
        for kind in ("png", "svg"):
            figure.savefig(folder / f"{name}.{kind}", dpi=120)
    seconds = round(time.perf_counter() - began, 1)
    summary |= {"seconds": seconds, "folder": str(folder), "versions": files.provenance()}
    files.write_text(folder / f"{name}.json", files.dumps(summary) + "\n")
    return summary


class Report(NamedTuple):
    """Two ways to report progress: a line, and an event of `gradjax.compare`."""

    line: Callable[[str], None]
    event: Callable[[sweep.Progress], None]


@contextlib.contextmanager
def progress_bar() -> Iterator[Report]:
    """A bar on standard error."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("measuring", total=None)

        def event(e: sweep.Progress) -> None:
            if not e.message:
                said = f"training, {e.diverged} diverged"
                bar.update(task, completed=e.done, total=e.total, description=said)
            elif len(e.message) < 100:
                line(e.message)
            else:
                line(f"{e.message[:40]} ...: {e.message.rpartition(': ')[2]}")

        def line(text: str) -> None:
            console.print(text, highlight=False, markup=False)

        yield Report(line, event)
