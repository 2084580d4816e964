"""The papers' plots, one command each, with claims that can fail.

    python scripts/reproduce.py --list
    python scripts/reproduce.py newman1986 saxe2013_eigenvalues
    python scripts/reproduce.py --tier 1 --seed 1 --json

Each figure (a module of `scripts/papers/`) runs in a worker process, is written to a run folder as
dataset and picture, and its claims are checked against the dataset as it was read back. Exit
status: 0 where every claim passes, 1 where one fails or a figure raises, 2 for input that cannot be
used.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Before NumPy is imported: more threads stall on small matrices.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import dataclasses
import json
import multiprocessing
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import reporting
from papers import common

from gradjax.report import files


def reproduce(
    name: str, folder: Path, seed: int | None = None, small: bool = False, dpi: int = 120
) -> dict[str, Any]:
    """Run one figure, write `<name>.nc` and `<name>.png`, and judge it.

    Args:
        name: of a module of `papers`.
        folder: where to write.
        seed: in place of the config's.
        small: whether to use the figure's sizes for tests.
        dpi: of the picture.

    Returns:
        {name, title, seconds, cpu_seconds, claims: [...], error}; `error` is the traceback of an
        exception, or "".
    """
    wall, cpu = time.perf_counter(), time.process_time()
    row: dict[str, Any] = {"name": name, "title": "", "claims": [], "error": ""}
    try:
        figure = common.module(name)
        row["title"] = common.title(figure)
        config = common.small(figure) if small else figure.Config()
        if seed is not None:
            config = dataclasses.replace(config, seed=seed)
        attributes = {"config": json.dumps(dataclasses.asdict(config))}
        attributes |= {f"version_{key}": value for key, value in files.provenance().items()}
        path = files.save(figure.run(config).assign_attrs(attributes), folder / f"{name}.nc")
        ds = files.load(path)  # what is drawn and judged is what is on disk
        figure.plot(ds).savefig(folder / f"{name}.png", dpi=dpi)
        row["claims"] = [dataclasses.asdict(claim) for claim in figure.check(ds)]
    except Exception:
        row["error"] = traceback.format_exc()
    row["seconds"] = round(time.perf_counter() - wall, 2)
    row["cpu_seconds"] = round(time.process_time() - cpu, 2)
    return row


def ok(row: dict[str, Any]) -> bool:
    """Whether a figure ran and all its claims passed; a figure without claims proves nothing."""
    claims = row["claims"]
    return not row["error"] and bool(claims) and all(claim["passed"] for claim in claims)


def run_all(names: Sequence[str], folder: Path, jobs: int, **options: Any) -> list[dict[str, Any]]:
    """The rows of all figures in the order of `names`, with a progress bar on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    rows = {}
    # spawn: JAX's threads do not survive a fork
    with (
        ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        bar = progress.add_task("figures", total=len(names))
        futures = [pool.submit(reproduce, name, folder, **options) for name in names]
        for future in as_completed(futures):
            row = future.result()
            rows[row["name"]] = row
            progress.console.print(
                f"{'ok  ' if ok(row) else 'FAIL'} {row['name']}, {row['seconds']:.1f} s"
            )
            progress.advance(bar)
    return [rows[name] for name in names]


def summarize(rows: Sequence[dict[str, Any]], seed: int | None) -> dict[str, Any]:
    """The whole run as one dictionary, for `claims.json` and `--json`."""
    claims = [claim for row in rows for claim in row["claims"]]
    return {
        "figures": len(rows),
        "figures_passed": sum(map(ok, rows)),
        "claims": len(claims),
        "claims_passed": sum(claim["passed"] for claim in claims),
        "passed": all(map(ok, rows)),
        "seed": seed,
        "results": list(rows),
    }


def number(x: float) -> str:
    return f"{x:.4g}"


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """A table of claims for each figure, and at the end the exceptions."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for row in rows:
        title = f"{row['title'] or row['name']} [{row['seconds']:.1f} s]"
        table = Table(
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            title=escape(title),
            title_justify="left",
            expand=True,
        )
        table.add_column("claim", ratio=1)
        for heading in ("measured", "expected"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("tolerance", no_wrap=True)
        table.add_column("pass")
        for claim in row["claims"]:
            error = f" ± {claim['error']:.1g}" if claim["error"] else ""
            measured, expected = number(claim["measured"]) + error, number(claim["expected"])
            mark = "[green]yes[/green]" if claim["passed"] else "[red]NO[/red]"
            table.add_row(escape(claim["statement"]), measured, expected, claim["tolerance"], mark)
        console.print(table)
    for row in rows:
        if row["error"]:
            console.print(f"{row['name']} raised:\n{row['error']}", markup=False)


def choose(names: Sequence[str], tier: int | None) -> list[str]:
    """The figures asked for by name and tier; by default all of the folder."""
    known = common.names()
    for name in names:
        if name not in known:
            raise ValueError(reporting.unknown("figure", name, known))
    chosen = list(dict.fromkeys(names)) or known
    return [name for name in chosen if tier is None or common.tier(common.module(name)) == tier]


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = reporting.parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="figures; default: all")
    parser.add_argument("--list", action="store_true", help="list the figures and stop")
    parser.add_argument("--tier", type=int, choices=(1, 2), help="only figures of this tier")
    parser.add_argument("--seed", type=int, help="in place of the seed 0 of every figure")
    parser.add_argument(
        "--small", action="store_true", help="the tests' sizes: seconds, weaker claims"
    )
    parser.add_argument(
        "--jobs", type=int, default=cores(), help="worker processes; default: one per core"
    )
    parser.add_argument("--dpi", type=int, default=120, help="of the pictures; default: 120")
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}; at least 1 worker is needed.")
    try:
        names = choose(args.names, args.tier)
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        for name in names:
            print(f"{name:24} {common.title(common.module(name))}")
        return 0

    began = time.perf_counter()
    folder = files.run_folder(args.output, "reproduce")
    rows = run_all(
        names, folder, min(args.jobs, len(names)), seed=args.seed, small=args.small, dpi=args.dpi
    )
    summary = reporting.save(folder, "claims", summarize(rows, args.seed), began)
    if args.json:
        print(files.dumps(summary))
    else:
        print_table(rows)
        print(
            f"{summary['figures_passed']} of {summary['figures']} figures and "
            f"{summary['claims_passed']} of {summary['claims']} claims pass, "
            f"{summary['seconds']:.0f} s; figures and datasets are in {folder}"
        )
    return 0 if summary["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
