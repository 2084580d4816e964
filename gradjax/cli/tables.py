"""What the commands print in a terminal: tables, progress, the verdict and the ranking."""

import contextlib
import math

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from gradjax.diagnosis import measurements, words
from gradjax.report import files


def print_verdict(verdict, folder) -> None:

    console = Console()
    theory = measurements.theory(verdict.measurements)
    beside = [
        {"theory": row["log_cotangent_rms"], "distance": row["standard_errors"]}
        for row in theory["layers"]
    ]
    parts = [
        a | b
        for a, b in zip(
            files.jsonable(measurements.layers(verdict.measurements)), beside, strict=True
        )
    ]
    columns = {
        "log_activation_rms": "activation",
        "log_cotangent_rms": "cotangent",
        "theory": "theory",
        "distance": "s.e.",
        "log_gradient_norm": "gradient",
        "log_singular_value_max": "max σ",
        "log_singular_value_min": "min σ",
    }
    table = Table(
        title=f"{verdict.meta['name']}: natural logarithms, medians over seeds",
        title_justify="left",
    )
    table.pad_edge, table.padding = False, (0, 1, 0, 0)
    table.box, table.caption = (
        box.SIMPLE_HEAD,
        "theory: of the cotangent; s.e.: standard errors of its growth from it",
    )
    table.add_column("layer")
    for heading in columns.values():
        table.add_column(heading, justify="right")
    step = max(1, math.ceil(len(parts) / 12))
    for i, row in enumerate(parts):
        if i % step == 0 or i == len(parts) - 1:
            cells = (row[name] for name in columns)
            table.add_row(
                row["name"],
                *("-" if c is None else f"{c:.2f}" if isinstance(c, float) else c for c in cells),
            )
    console.print(table)
    product = measurements.product(verdict.measurements)
    values = product["log_singular_values"]
    if values is not None and (values > -math.inf).any():
        alive = values[values > -math.inf]
        rank = "" if len(alive) == len(values) else f", rank {len(alive)} of {len(values)}"
        console.print(
            f"layer product: singular values from {words.factor(alive[0])} down to {words.factor(alive[-1])}"
            f"{rank}; {product['growth_nats_per_layer']:+.3f} nats per layer",
            highlight=False,
        )
    if theory["standard_errors"] is not None:
        console.print(
            f"theory: {theory['growth_nats_per_layer']:+.3f} nats per layer; measured "
            f"{theory['measured_nats_per_layer']:+.3f} ± {theory['standard_error']:.3f}, "
            f"{theory['standard_errors']:+.1f} standard errors",
            highlight=False,
        )
    elif theory["note"]:
        console.print(f"theory: {theory['note']}", highlight=False)
    for name in ("left_out", "notes"):
        if verdict.meta[name]:
            console.print(f"{name.replace('_', ' ')}: {verdict.meta[name]}", highlight=False)
    style = "bold green" if verdict.healthy else "bold red"
    console.print(f"\nverdict: [{style}]{verdict.headline}[/]")
    for finding in verdict.findings:
        console.print(words.explain(finding), highlight=False)
        console.print(f"Remedies to try: {', '.join(finding.remedies)}.", highlight=False)
    console.print(f"figure:  {folder / 'diagnosis.png'}", highlight=False, soft_wrap=True)


def list_remedies() -> int:

    from gradjax.cure.remedies import REMEDIES

    console = Console(highlight=False)
    for name, remedy in REMEDIES.items():
        console.print(f"[bold]{name:24}[/]{remedy.what}")
        console.print(
            f"{'':24}for: {', '.join(remedy.fits) or 'no finding calls for it'}", soft_wrap=True
        )
        console.print(f"{'':24}cost: {remedy.cost}; {remedy.reference}", soft_wrap=True)
    console.print(
        f"{len(REMEDIES)} remedies; `gradjax cure CONFIG --remedies NAME,NAME+NAME` tries some of them"
    )
    return 0


def print_cure(summary, folder) -> None:
    """The ranking, what was left out, and the story."""
    console, rows = Console(), summary["ranking"]
    title = f"{len(rows) - 1} remedies, best first; {summary['programs']} programs compiled"
    table = Table(
        title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1), pad_edge=False
    )
    table.add_column(
        "remedy", overflow="fold"
    )  # of two remedies the name is long; numbers are shown whole
    for heading in ("trained", "95% CI", "score", "steps", "σ", "lost", "ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.caption = (
        "steps: to the target; σ: of the log gradient norm in training; ms: of a step of one seed"
    )
    for row in rows:
        low, high = row["fraction_interval"]
        cells = (
            f"{row['trained']}/{row['seeds']}",
            f"{100 * low:.0f}-{high:.0%}",
            f"{row['score']:.3f}",
        )
        steps = f"{row['steps_to_target']:.0f}" if row["steps_to_target"] > 0 else "-"
        more = (steps, f"{row['stability']:.2f}", f"{row['diverged']}")
        style = "bold" if row["remedy"] == "untreated" else ""
        table.add_row(
            row["remedy"], *cells, *more, f"{1e3 * row['seconds_per_step']:.1f}", style=style
        )
    console.print(table)
    reasons: dict[str, list[str]] = {}
    for name, reason in summary["left_out"].items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        console.print(f"left out: {', '.join(names)}: {reason}", highlight=False)
    console.print(f"\n{summary['story']}", highlight=False)
    where = (
        f"The config with the winner: {folder / 'cured.toml'}"
        if (folder / "cured.toml").exists()
        else ""
    )
    console.print(f"{summary['seconds']} s. {where}", highlight=False, soft_wrap=True)
    console.print(f"figure:  {folder / 'cure.png'}", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def progress_bar():
    """A bar for `gradjax.experiment.sweep.Progress` events on standard error; lines where that is
    no terminal.
    """
    console = Console(stderr=True)
    detail = "{task.fields[speed]:,.0f} steps/s  loss {task.fields[loss]:.3g}  diverged {task.fields[diverged]}"
    columns = (BarColumn(), TextColumn("{task.percentage:3.0f}%"), TextColumn(detail))
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True
    ) as bar:
        task = bar.add_task("", total=None, speed=0.0, loss=float("nan"), diverged=0)

        def show(event) -> None:
            if event.message:
                console.print(event.message, highlight=False)
            else:
                fields = {
                    "speed": event.steps_per_second,
                    "loss": event.loss,
                    "diverged": event.diverged,
                }
                bar.update(task, completed=event.done, total=event.total, **fields)

        yield show


def print_training(ds, summary, figure) -> None:
    """The settings with their shares of seeds trained, best first, and the whole in one line."""
    console = Console()
    rows = summary["settings"]
    table = Table(
        title=f"{len(rows)} settings, best first" if len(rows) > 1 else "all seeds",
        title_justify="left",
    )
    for name in [*summary["swept"], "trained", "95% interval", "validation", "test", "diverged"]:
        table.add_column(name, justify="right")
    for row in rows[:12]:
        low, high = row["trained_interval"]
        cells = [
            f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name])
            for name in summary["swept"]
        ]
        cells += [f"{row['trained']}/{summary['num_seeds']}", f"{low:.0%} to {high:.0%}"]
        table.add_row(
            *cells,
            *(f"{row[key]:.4f}" for key in ("validation_score", "test_score")),
            f"{row['diverged']}",
        )
    console.print(table)
    if len(rows) > 12:
        console.print(f"... and {len(rows) - 12} more in results.nc", highlight=False)
    console.print(
        f"A seed is trained when its validation score reaches {ds.attrs['target']}. {summary['seconds']} s."
    )
    console.print(f"figure:  {figure}", highlight=False, soft_wrap=True)
