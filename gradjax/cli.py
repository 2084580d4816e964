"""The `gradjax` command.

    gradjax diagnose CONFIG [--flags]   measure a network at initialisation, and say what ails it
    gradjax cure CONFIG [--flags]       try remedies over its seeds, rank them, diagnose the winner
    gradjax train CONFIG [--flags]      train all its seeds side by side
    gradjax sweep CONFIG [--flags]      train every seed at every setting of its [sweep] tables
    gradjax data {fetch,verify,list}    the data sets

Exit status 0 for every verdict, a sick one too; 2 for input that cannot be used, with one message and no traceback.
Heavy imports are inside the commands, so that `gradjax --help` answers at once; the thread count of the LAPACK that
jaxlib ships is set before JAX starts, because two threads make its small factorisations a hundred times slower.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gradjax import config

USAGE = """usage: gradjax COMMAND ...

See, explain, cure and prove exploding and vanishing gradients in JAX.

commands:
  diagnose CONFIG [--flags]   measure a network at initialisation: verdict, table, figure
  cure CONFIG [--flags]       try remedies over its seeds: ranking, figure, verdict before and after; --list
  train CONFIG [--flags]      train all its seeds side by side: scores, curves; --resume
  sweep CONFIG [--flags]      train every seed at every setting of [sweep], one program; --resume
  data {list,fetch,verify}    the data sets: where they lie, fetch one, check its hashes

examples:
  gradjax diagnose configs/demo.toml
  gradjax diagnose configs/demo.toml --model.depth 200 --json
  gradjax cure configs/deep_sigmoid_mlp.toml
  gradjax cure configs/demo.toml --remedies critical_init,clip_by_global_norm+adam
  gradjax train configs/mlp_mnist.toml --train.num_seeds 8
  gradjax sweep configs/clip_threshold.toml --resume
  gradjax data fetch mnist

`gradjax COMMAND --help` lists the flags of a command.
"""


@dataclass(frozen=True)
class DiagnoseCommand(config.Command):
    """gradjax diagnose CONFIG: measure a network at initialisation, over several seeds, and give a verdict."""

    json: bool = False
    """Print one JSON object to standard output and nothing else."""


def _diagnose(args: Sequence[str]) -> int:
    if {"-h", "--help"} & set(args):
        print(config.help_text("gradjax diagnose", DiagnoseCommand, DiagnoseCommand.__doc__ or ""))
        return 0
    experiment, options = config.parse(args, DiagnoseCommand)
    _say_of_sweep(options.config, "diagnose")

    from rich.console import Console

    from gradjax import diagnosis, results
    from gradjax.measure import examine

    started = time.monotonic()
    with Console(stderr=True).status("starting JAX") as status:
        ds, evidence = examine(experiment, progress=status.update)
        status.update("verdict, figure and files")
        folder = results.run_folder(experiment.output, experiment.name)
        meta = {
            "name": experiment.name,
            "folder": str(folder),
            "seed": experiment.seed,
            "seconds": round(time.monotonic() - started, 2),
            "left_out": ds.attrs["left_out"],
            "notes": ds.attrs["notes"],
            "spectrum_seeds": ds.sizes.get("spectrum_seed", 0),
            "config": config.to_dict(experiment),
            "versions": results.provenance(),
        }
        verdict = diagnosis.judge(evidence, ds, meta)
        _write(folder, experiment, verdict)
    if options.json:
        print(verdict.to_json())
    else:
        _print_verdict(verdict, folder)
    return 0


def _write(folder, experiment: config.Experiment, verdict) -> None:
    """The run folder: config, dataset with its provenance, verdict, figure."""
    import matplotlib

    matplotlib.use("Agg")
    from gradjax import plots, results

    text = config.to_toml(experiment)
    provenance = {f"version_{name}": value for name, value in verdict.meta["versions"].items()}
    ds = verdict.measurements.assign_attrs(config=text, seed=experiment.seed, **provenance)
    (folder / "config.toml").write_text(text)
    (folder / "diagnosis.json").write_text(verdict.to_json() + "\n")
    results.save(ds, folder / "results.nc")
    figure = plots.diagnosis_figure(ds, f"{experiment.name}: {verdict.headline.replace('_', ' ')}")
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"diagnosis.{suffix}", dpi=160)


def _print_verdict(verdict, folder) -> None:
    import math

    from rich import box
    from rich.console import Console
    from rich.table import Table

    from gradjax import diagnosis, results

    console = Console()
    theory = diagnosis.theory(verdict.measurements)
    beside = [{"theory": row["log_cotangent_rms"], "distance": row["standard_errors"]} for row in theory["layers"]]
    parts = [a | b for a, b in zip(results.jsonable(diagnosis.layers(verdict.measurements)), beside, strict=True)]
    columns = {
        "log_activation_rms": "activation",
        "log_cotangent_rms": "cotangent",
        "theory": "theory",
        "distance": "s.e.",
        "log_gradient_norm": "gradient",
        "log_singular_value_max": "max σ",
        "log_singular_value_min": "min σ",
    }
    table = Table(title=f"{verdict.meta['name']}: natural logarithms, medians over seeds", title_justify="left")
    table.pad_edge, table.padding = False, (0, 1, 0, 0)
    table.box, table.caption = box.SIMPLE_HEAD, "theory: of the cotangent; s.e.: standard errors of its growth from it"
    table.add_column("layer")
    for heading in columns.values():
        table.add_column(heading, justify="right")
    step = max(1, math.ceil(len(parts) / 12))
    for i, row in enumerate(parts):
        if i % step == 0 or i == len(parts) - 1:
            cells = (row[name] for name in columns)
            table.add_row(
                row["name"], *("-" if c is None else f"{c:.2f}" if isinstance(c, float) else c for c in cells)
            )
    console.print(table)
    product = diagnosis.product(verdict.measurements)
    values = product["log_singular_values"]
    if values is not None and (values > -math.inf).any():
        alive = values[values > -math.inf]
        rank = "" if len(alive) == len(values) else f", rank {len(alive)} of {len(values)}"
        console.print(
            f"layer product: singular values from {diagnosis.factor(alive[0])} down to {diagnosis.factor(alive[-1])}"
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
        console.print(diagnosis.explain(finding), highlight=False)
        console.print(f"Remedies to try: {', '.join(finding.remedies)}.", highlight=False)
    console.print(f"figure:  {folder / 'diagnosis.png'}", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class CureCommand(config.Command):
    """gradjax cure CONFIG: diagnose, try the remedies that fit over all seeds, rank them, diagnose the winner."""

    remedies: str = "fitting"
    """fitting (what the diagnosis calls for), all, or names with commas between; a+b gives two at a time."""
    pairs: bool = True
    """Try the pairs of the best three where no single remedy is enough (--no_pairs)."""
    json: bool = False
    """Print one JSON object to standard output and nothing else."""


def _cure(args: Sequence[str]) -> int:
    if {"-h", "--help"} & set(args):
        print(config.help_text("gradjax cure", CureCommand, CureCommand.__doc__ or ""))
        return 0
    if list(args) == ["--list"]:
        return _list_remedies()
    experiment, options = config.parse(args, CureCommand)
    _say_of_sweep(options.config, "cure")

    import matplotlib

    matplotlib.use("Agg")
    from gradjax import cure, plots_cure, results

    started = time.monotonic()
    names = options.remedies
    chosen = names if names in ("fitting", "all") else [name.strip() for name in names.split(",") if name.strip()]
    with _progress() as progress:
        found = cure.find_cure(experiment, chosen, pairs=options.pairs, progress=progress)
    folder = results.run_folder(experiment.output, experiment.name)
    results.write_text(folder / "config.toml", config.to_toml(experiment))
    summary = cure.to_dict(found) | {"folder": str(folder), "seconds": round(time.monotonic() - started, 1)}
    title = f"{experiment.name}: no remedy is better"
    if found.winner != cure.UNTREATED:
        title = f"{experiment.name}: {found.winner}"
        results.write_text(folder / "cured.toml", config.to_toml(found.experiments[found.winner]))
    results.save(found.results.assign_attrs(config=config.to_toml(experiment)), folder / "results.nc")
    results.write_text(folder / "cure.json", results.dumps(summary) + "\n")
    results.write_text(folder / "cure.txt", summary["story"] + "\n")
    before, after = found.verdict.measurements, found.after and found.after.measurements
    figure = plots_cure.cure_figure(found.ranking, found.results, before, after, title)
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"cure.{suffix}", dpi=160)
    print(results.dumps(summary)) if options.json else _print_cure(summary, folder)
    return 0


def _list_remedies() -> int:
    from rich.console import Console

    from gradjax.remedies import REMEDIES

    console = Console(highlight=False)
    for name, remedy in REMEDIES.items():
        console.print(f"[bold]{name:24}[/]{remedy.what}")
        console.print(f"{'':24}for: {', '.join(remedy.fits) or 'no finding calls for it'}", soft_wrap=True)
        console.print(f"{'':24}cost: {remedy.cost}; {remedy.reference}", soft_wrap=True)
    console.print(f"{len(REMEDIES)} remedies; `gradjax cure CONFIG --remedies NAME,NAME+NAME` tries some of them")
    return 0


def _print_cure(summary, folder) -> None:
    """The ranking, what was left out, and the story."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console, rows = Console(), summary["ranking"]
    title = f"{len(rows) - 1} remedies, best first; {summary['programs']} programs compiled"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1), pad_edge=False)
    table.add_column("remedy", overflow="fold")  # of two remedies the name is long; numbers are shown whole
    for heading in ("trained", "95% CI", "score", "steps", "σ", "lost", "ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.caption = "steps: to the target; σ: of the log gradient norm in training; ms: of a step of one seed"
    for row in rows:
        low, high = row["share_interval"]
        cells = (f"{row['trained']}/{row['seeds']}", f"{100 * low:.0f}-{high:.0%}", f"{row['score']:.3f}")
        steps = f"{row['steps_to_target']:.0f}" if row["steps_to_target"] > 0 else "-"
        more = (steps, f"{row['stability']:.2f}", f"{row['diverged']}")
        style = "bold" if row["remedy"] == "untreated" else ""
        table.add_row(row["remedy"], *cells, *more, f"{1e3 * row['seconds_per_step']:.1f}", style=style)
    console.print(table)
    reasons: dict[str, list[str]] = {}
    for name, reason in summary["left_out"].items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        console.print(f"left out: {', '.join(names)}: {reason}", highlight=False)
    console.print(f"\n{summary['story']}", highlight=False)
    where = f"The config with the winner: {folder / 'cured.toml'}" if (folder / "cured.toml").exists() else ""
    console.print(f"{summary['seconds']} s. {where}", highlight=False, soft_wrap=True)
    console.print(f"figure:  {folder / 'cure.png'}", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class TrainCommand(config.Command):
    """gradjax train CONFIG: train all seeds of an experiment side by side, with checkpoints."""

    resume: bool = False
    """Go on with the newest unfinished run of this name, bit for bit as if it had not been interrupted."""
    json: bool = False
    """Print one JSON object to standard output and nothing else."""


@dataclass(frozen=True)
class SweepCommand(TrainCommand):
    """gradjax sweep CONFIG: train every seed at every setting of [sweep.vmap] and [sweep.static]."""


def _say_of_sweep(path: str, command: str) -> None:
    if any(config.sweep_tables(path)):
        print(f"{command}: [sweep] in {path} is for `gradjax sweep`; the values outside it are used.", file=sys.stderr)


def _train(args: Sequence[str]) -> int:
    return _run_training(args, TrainCommand, "train")


def _sweep(args: Sequence[str]) -> int:
    return _run_training(args, SweepCommand, "sweep")


def _run_training(args: Sequence[str], command: type[TrainCommand], name: str) -> int:
    if {"-h", "--help"} & set(args):
        print(config.help_text(f"gradjax {name}", command, command.__doc__ or ""))
        return 0
    experiment, options = config.parse(args, command)
    vary, static = config.sweep_tables(options.config)
    if name == "train":
        _say_of_sweep(options.config, name)
        vary, static = {}, {}
    elif not vary and not static:
        raise config.ConfigError(f"sweep: {options.config} varies nothing; needed: [sweep.vmap] or [sweep.static]")

    import matplotlib

    matplotlib.use("Agg")
    from gradjax import ablation, grid, plots, results

    grid.grid(experiment, vary, static)  # a name that cannot be swept leaves no folder behind
    started, first = time.monotonic(), ablation.join_cluster()
    folder = ablation.agreed_folder(experiment, options.resume)
    with _progress() as progress:
        ds = ablation.sweep(experiment, vary, static, folder=folder, keep_states=name == "train", progress=progress)
    if not first:
        return 0  # the first process writes and prints for all
    figure = plots.training_figure(ds, experiment.name) if name == "train" else plots.sweep_figure(ds, experiment.name)
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"{name}.{suffix}", dpi=160)
    summary = results.summary(ds) | {"folder": str(folder), "seconds": round(time.monotonic() - started, 1)}
    results.write_text(folder / "summary.json", results.dumps(summary) + "\n")
    if options.json:
        print(results.dumps(summary))
    else:
        _print_training(ds, summary, folder / f"{name}.png")
    return 0


@contextlib.contextmanager
def _progress():
    """A bar for `gradjax.ablation.Progress` events on standard error; lines where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    detail = "{task.fields[speed]:,.0f} steps/s  loss {task.fields[loss]:.3g}  diverged {task.fields[diverged]}"
    columns = (BarColumn(), TextColumn("{task.percentage:3.0f}%"), TextColumn(detail))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=None, speed=0.0, loss=float("nan"), diverged=0)

        def show(event) -> None:
            if event.message:
                console.print(event.message, highlight=False)
            else:
                fields = {"speed": event.steps_per_second, "loss": event.loss, "diverged": event.diverged}
                bar.update(task, completed=event.done, total=event.total, **fields)

        yield show


def _print_training(ds, summary, figure) -> None:
    """The settings with their shares of seeds trained, best first, and the whole in one line."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    rows = summary["settings"]
    table = Table(title=f"{len(rows)} settings, best first" if len(rows) > 1 else "all seeds", title_justify="left")
    for name in [*summary["swept"], "trained", "95% interval", "validation", "test", "diverged"]:
        table.add_column(name, justify="right")
    for row in rows[:12]:
        low, high = row["trained_interval"]
        cells = [f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name]) for name in summary["swept"]]
        cells += [f"{row['trained']}/{summary['num_seeds']}", f"{low:.0%} to {high:.0%}"]
        table.add_row(*cells, *(f"{row[key]:.4f}" for key in ("validation_score", "test_score")), f"{row['diverged']}")
    console.print(table)
    if len(rows) > 12:
        console.print(f"... and {len(rows) - 12} more in results.nc", highlight=False)
    console.print(f"A seed is trained when its validation score reaches {ds.attrs['target']}. {summary['seconds']} s.")
    console.print(f"figure:  {figure}", highlight=False, soft_wrap=True)


def _data(args: Sequence[str]) -> int:
    from gradjax import tasks

    usage = "usage: gradjax data list | gradjax data fetch NAME | gradjax data verify NAME"
    if not args or {"-h", "--help"} & set(args):
        print(usage)
        return 0
    match list(args):
        case ["list"]:
            for name, description, place in tasks.available():
                print(f"{name:18}{description}\n{'':18}{place or 'not here yet: gradjax data fetch ' + name}")
        case ["fetch", name]:
            print("\n".join(map(str, tasks.fetch(name))) or f"{name} comes with scikit-learn; nothing to fetch")
        case ["verify", name]:
            rows = tasks.verify(name)
            for file, sha256, good in rows:
                print(f"{'ok     ' if good else 'DAMAGED' if sha256 else 'MISSING'}  {file}  {sha256 or ''}")
            return 0 if all(good for *_, good in rows) else 2
        case _:
            raise config.ConfigError(f"data: got {' '.join(args)!r}; {usage}")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "diagnose": _diagnose,
    "cure": _cure,
    "train": _train,
    "sweep": _sweep,
    "data": _data,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    try:
        if args[0] == "--version":
            import gradjax

            print(f"gradjax {gradjax.__version__}")
            return 0
        if args[0] not in COMMANDS:
            near = config.nearest(args[0], {name: name for name in COMMANDS})
            raise config.ConfigError(f"gradjax: unknown command {args[0]!r}{near}; commands: {', '.join(COMMANDS)}")
        return COMMANDS[args[0]](args[1:])
    except ValueError as error:  # config and data errors, and the checks that come before tracing
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"gradjax: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
