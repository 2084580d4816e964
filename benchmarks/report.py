"""What the benchmarks share: options, rounds, ratios, the machine, a section of RESULTS.md."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).with_name("RESULTS.md")


def parser(doc: str, quick: str, write: bool = True) -> argparse.ArgumentParser:
    """The options of every benchmark; `quick` says what --quick makes smaller."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help=quick)
    made.add_argument("--json", action="store_true", help="print one JSON object")
    if write:
        made.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    return made


def show(out: Mapping[str, Any], as_json: bool) -> None:
    """Print a result as JSON or as one line per entry."""
    if as_json:
        print(json.dumps(out, indent=2))
        return
    for name, value in out.items():
        print(f"{name}: {value}")


def clock(f: Callable[[], Any]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    jax.block_until_ready(f())
    return time.perf_counter() - began


def interleave(
    functions: Mapping[str, Callable[[], Any]], rounds: int, measure: Callable = clock
) -> dict[str, list[float]]:
    """What `measure` returns of each function in every round, the functions taking turns.

    A first round, in which the functions compile, is not kept.
    """
    found: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, f in functions.items():
            value = measure(f)
            if turn:
                found[name].append(value)
    return found


def median_ratio(values: Iterable[float], base: Iterable[float]) -> float:
    """Median over the rounds of values / base."""
    return statistics.median(a / b for a, b in zip(values, base, strict=True))


def ratio(times, base):
    """Median and quartiles of the ratios within each round; None without a base."""
    if base is None:
        return None
    low, middle, high = statistics.quantiles([a / b for a, b in zip(times, base, strict=True)], n=4)
    return {"median": middle, "low": low, "high": high}


def text(r):
    return f"{r['median']:.3f} [{r['low']:.2f}, {r['high']:.2f}]" if r else ""


# Rows with a goal


def row(what: str, value: float | None, goal: float | None = None, note="", unit="floors") -> dict:
    """One measured value, which is also printed; `value` is None where a peer is missing."""
    met = None if goal is None or value is None else bool(value <= goal)
    shown = value if value is None else format(value, ".3g")
    print(f"  {what:62s} {shown} {unit}  goal {goal}  {note}", flush=True)
    return {"what": what, "value": value, "unit": unit, "goal": goal, "met": met, "note": note}


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    head = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return head + [f"| {' | '.join(cells)} |" for cells in rows]


def goal_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The Markdown table of what `row` returned."""

    def cells(r):
        value = "-" if r["value"] is None else f"{r['value']:.2g} {r['unit']}".strip()
        goal = "-" if r["goal"] is None else f"{r['goal']:.2g}"
        met = {None: "", True: "yes", False: "**no**"}[r["met"]]
        return r["what"], value, goal, met, r["note"]

    return table(("what", "value", "goal", "met", "note"), map(cells, rows))


def finish(section: str, title: str, said: str, rows: Sequence[Mapping], began: float, options):
    """Print and write the rows of a benchmark, as its options say; `said` describes the method."""
    import numpy as np

    about, seconds = machine(numpy=np.__version__), time.time() - began
    if options.json:
        print(json.dumps({"machine": about, "seconds": seconds, "rows": rows}, indent=1))
    if options.write:
        lines = [f"## {title}", "", f"{in_words(about)}; {seconds:.0f} s in all.", "", said, ""]
        write(section, lines + goal_table(rows))
    print(f"{seconds:.0f} s")


# The machine, and RESULTS.md


def machine(**more):
    """The machine's description for a table; its load counts, because other work slows both."""
    about = {"cpu": cpu_name(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    return about | more | {"jax": jax.__version__}


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def in_words(about):
    return ", ".join(str(v) if k == "cpu" else f"{k} {v}" for k, v in about.items())


def write(section, lines):
    """Put lines of Markdown between the markers of a section in RESULTS.md."""
    begin, end = f"<!-- {section} -->\n", f"<!-- /{section} -->\n"
    before, _, rest = RESULTS.read_text().partition(begin)
    after = rest.partition(end)[2]
    body = "\n".join(lines).rstrip("\n") + "\n"
    RESULTS.write_text(before.rstrip("\n") + "\n\n" + begin + body + end + after)
