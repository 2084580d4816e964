"""What the commands print in a terminal: tables, progress, the verdict and the ranking."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from gradjax.cure.remedies import REMEDIES
from gradjax.diagnosis import measurements, words
from gradjax.experiment import progress
from gradjax.report import files

if TYPE_CHECKING:
    from gradjax.diagnosis.verdict import Diagnosis

# Rows of a table of layers, and of settings.
LAYER_ROWS, SETTING_ROWS = 12, 12
# variable -> heading
_COLUMNS = {
    "log_activation_rms": "activation",
    "log_cotangent_rms": "cotangent",
    "theory": "theory",
    "distance": "s.e.",
    "log_gradient_norm": "gradient",
    "log_singular_value_max": "max σ",
    "log_singular_value_min": "min σ",
}


def print_verdict(verdict: "Diagnosis", folder: Path) -> None:
    """Layers, layer product, theory, verdict and findings."""
    console = Console(highlight=False)
    console.print(_layer_table(verdict))
    if line := _product_line(verdict.measurements):
        console.print(line)
    if line := _theory_line(verdict.measurements):
        console.print(line)
    for name in ("left_out", "notes"):
        if verdict.meta[name]:
            console.print(f"{name.replace('_', ' ')}: {verdict.meta[name]}")
    style = "bold green" if verdict.healthy else "bold red"
    console.print(f"\nverdict: [{style}]{verdict.headline}[/]")
    for finding in verdict.findings:
        console.print(words.explain(finding))
        console.print(f"Remedies to try: {', '.join(finding.remedies)}.")
    console.print(f"figure:  {folder / 'diagnosis.png'}", soft_wrap=True)


def _layer_table(verdict: "Diagnosis") -> Table:
    """The measurements of some twelve layers, evenly spaced, the first and the last among them."""
    table = Table(
        title=f"{verdict.meta['name']}: natural logarithms, medians over seeds",
        title_justify="left",
        caption="theory: of the cotangent; s.e.: standard errors of its growth from it",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("layer")
    for heading in _COLUMNS.values():
        table.add_column(heading, justify="right")
    layers = files.jsonable(measurements.layers(verdict.measurements))
    expected = measurements.theory(verdict.measurements)["layers"]
    step = max(1, math.ceil(len(layers) / LAYER_ROWS))
    for i, (row, theory) in enumerate(zip(layers, expected, strict=True)):
        if i % step == 0 or i == len(layers) - 1:
            row["theory"] = theory["log_cotangent_rms"]
            row["distance"] = theory["standard_errors"]
            table.add_row(row["name"], *(_cell(row[name]) for name in _COLUMNS))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else value


def _product_line(ds: Any) -> str:
    """The singular values of the layer product; empty if it was not computed or is zero."""
    product = measurements.product(ds)
    values = product["log_singular_values"]
    if values is None or not (values > -math.inf).any():
        return ""
    nonzero = values[values > -math.inf]
    rank = "" if len(nonzero) == len(values) else f", rank {len(nonzero)} of {len(values)}"
    return (
        f"layer product: singular values from {words.factor(nonzero[0])} down to "
        f"{words.factor(nonzero[-1])}{rank}; {product['growth_nats_per_layer']:+.3f} nats per layer"
    )


def _theory_line(ds: Any) -> str:
    """Measured growth beside the theory, or why there is none."""
    theory = measurements.theory(ds)
    if theory["standard_errors"] is None:
        return f"theory: {theory['note']}" if theory["note"] else ""
    return (
        f"theory: {theory['growth_nats_per_layer']:+.3f} nats per layer; measured "
        f"{theory['measured_nats_per_layer']:+.3f} ± {theory['standard_error']:.3f}, "
        f"{theory['standard_errors']:+.1f} standard errors"
    )


def list_remedies() -> None:
    """The catalogue of remedies."""
    console = Console(highlight=False)
    for name, remedy in REMEDIES.items():
        console.print(f"[bold]{name:24}[/]{remedy.description}")
        fits = ", ".join(remedy.fits) or "no finding calls for it"
        console.print(f"{'':24}for: {fits}", soft_wrap=True)
        console.print(f"{'':24}cost: {remedy.cost}; {remedy.reference}", soft_wrap=True)
    console.print(
        f"{len(REMEDIES)} remedies; `gradjax cure CONFIG --remedies NAME,NAME+NAME` tries some of "
        "them"
    )


def print_cure(summary: Mapping[str, Any], folder: Path) -> None:
    """The ranking, what was left out, and the story."""
    console = Console(highlight=False)
    console.print(_ranking_table(summary))
    reasons: dict[str, list[str]] = {}
    for name, reason in summary["left_out"].items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        console.print(f"left out: {', '.join(names)}: {reason}")
    console.print(f"\n{summary['story']}")
    where = ""
    if (folder / "cured.toml").exists():
        where = f" The config with the winner: {folder / 'cured.toml'}"
    console.print(f"{summary['seconds']} s.{where}", soft_wrap=True)
    console.print(f"figure:  {folder / 'cure.png'}", soft_wrap=True)


def _ranking_table(summary: Mapping[str, Any]) -> Table:
    rows = summary["ranking"]
    table = Table(
        title=f"{len(rows) - 1} remedies, best first; {summary['programs']} programs compiled",
        title_justify="left",
        caption="steps: to the target; σ: of the log gradient norm in training; ms: of a step of "
        "one seed",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
    )
    # A pair has a long name, which may be folded; numbers may not.
    table.add_column("remedy", overflow="fold")
    for heading in ("trained", "95% CI", "score", "steps", "σ", "lost", "ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        low, high = row["fraction_interval"]
        table.add_row(
            row["remedy"],
            f"{row['trained']}/{row['seeds']}",
            f"{100 * low:.0f}-{high:.0%}",
            f"{row['score']:.3f}",
            f"{row['steps_to_target']:.0f}" if row["steps_to_target"] > 0 else "-",
            f"{row['stability']:.2f}",
            f"{row['diverged']}",
            f"{1e3 * row['seconds_per_step']:.1f}",
            style="bold" if row["remedy"] == "untreated" else "",
        )
    return table


@contextlib.contextmanager
def progress_bar() -> Iterator[progress.Report]:
    """A progress bar on standard error; plain lines if that is no terminal."""
    console = Console(stderr=True)
    detail = (
        "{task.fields[speed]:,.0f} steps/s  loss {task.fields[loss]:.3g}  "
        "diverged {task.fields[diverged]}"
    )
    columns = (BarColumn(), TextColumn("{task.percentage:3.0f}%"), TextColumn(detail))
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, speed=0.0, loss=math.nan, diverged=0)

        def show(event: progress.Progress) -> None:
            if event.message:
                console.print(event.message, highlight=False)
                return
            bar.update(
                task,
                completed=event.done,
                total=event.total,
                speed=event.steps_per_second,
                loss=event.loss,
                diverged=event.diverged,
            )

        yield show


def print_training(summary: Mapping[str, Any], target: float, figure: Path) -> None:
    """The settings with the seeds they train, best first, and one line about the whole."""
    console = Console()
    rows, swept = summary["settings"], summary["swept"]
    title = f"{len(rows)} settings, best first" if len(rows) > 1 else "all seeds"
    table = Table(title=title, title_justify="left")
    for name in [*swept, "trained", "95% interval", "validation", "test", "diverged"]:
        table.add_column(name, justify="right")
    for row in rows[:SETTING_ROWS]:
        low, high = row["trained_interval"]
        values = (row[name] for name in swept)
        table.add_row(
            *(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values),
            f"{row['trained']}/{summary['num_seeds']}",
            f"{low:.0%} to {high:.0%}",
            f"{row['validation_score']:.4f}",
            f"{row['test_score']:.4f}",
            f"{row['diverged']}",
        )
    console.print(table)
    if len(rows) > SETTING_ROWS:
        console.print(f"... and {len(rows) - SETTING_ROWS} more in results.nc", highlight=False)
    console.print(
        f"A seed is trained when its validation score reaches {target}. {summary['seconds']} s."
    )
    console.print(f"figure:  {figure}", highlight=False, soft_wrap=True)
