"""The `gradjax` command.

    gradjax diagnose CONFIG [--flags]   measure a network at initialisation, and say what ails it
    gradjax cure CONFIG [--flags]       try remedies over its seeds, rank them, diagnose the winner
    gradjax train CONFIG [--flags]      train all its seeds side by side
    gradjax sweep CONFIG [--flags]      train every seed at every setting of its [sweep] tables
    gradjax data {fetch,verify,list}    the data sets

Exit status 0 for every verdict, a sick one too; 2 for input that cannot be used, with one message
and no traceback. Heavy imports are inside the commands, so that `gradjax --help` answers at once;
the thread count of the LAPACK that jaxlib ships is set before JAX starts, because two threads make
its small factorisations a hundred times slower.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gradjax.experiment import config

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
    """gradjax diagnose CONFIG: measure a network at initialisation, over several seeds, and give a
    verdict.
    """

    json: bool = False
    """Print one JSON object to standard output and nothing else."""


def _diagnose(args: Sequence[str]) -> int:
    if {"-h", "--help"} & set(args):
        print(config.help_text("gradjax diagnose", DiagnoseCommand, DiagnoseCommand.__doc__ or ""))
        return 0
    experiment, options = config.parse(args, DiagnoseCommand)
    _say_of_sweep(options.config, "diagnose")

    from rich.console import Console

    from gradjax.cli import tables
    from gradjax.diagnosis.verdict import judge
    from gradjax.experiment.measure import examine
    from gradjax.report import files

    started = time.monotonic()
    with Console(stderr=True).status("starting JAX") as status:
        ds, evidence = examine(experiment, progress=status.update)
        status.update("verdict, figure and files")
        folder = files.run_folder(experiment.output, experiment.name)
        meta = {
            "name": experiment.name,
            "folder": str(folder),
            "seed": experiment.seed,
            "seconds": round(time.monotonic() - started, 2),
            "left_out": ds.attrs["left_out"],
            "notes": ds.attrs["notes"],
            "spectrum_seeds": ds.sizes.get("spectrum_seed", 0),
            "config": config.to_dict(experiment),
            "versions": files.provenance(),
        }
        verdict = judge(evidence, ds, meta)
        _write(folder, experiment, verdict)
    if options.json:
        print(verdict.to_json())
    else:
        tables.print_verdict(verdict, folder)
    return 0


def _write(folder, experiment: config.Experiment, verdict) -> None:
    """The run folder: config, dataset with its provenance, verdict, figure."""
    import matplotlib

    matplotlib.use("Agg")
    from gradjax.report import files
    from gradjax.report.network import diagnosis_figure

    text = config.to_toml(experiment)
    provenance = {f"version_{name}": value for name, value in verdict.meta["versions"].items()}
    ds = verdict.measurements.assign_attrs(config=text, seed=experiment.seed, **provenance)
    (folder / "config.toml").write_text(text)
    (folder / "diagnosis.json").write_text(verdict.to_json() + "\n")
    files.save(ds, folder / "results.nc")
    figure = diagnosis_figure(ds, f"{experiment.name}: {verdict.headline.replace('_', ' ')}")
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"diagnosis.{suffix}", dpi=160)


@dataclass(frozen=True)
class CureCommand(config.Command):
    """gradjax cure CONFIG: diagnose, try the remedies that fit over all seeds, rank them, diagnose
    the winner.
    """

    remedies: str = "fitting"
    """fitting (what the diagnosis calls for), all, or names with commas between; a+b gives two at a
    time."""
    pairs: bool = True
    """Try the pairs of the best three where no single remedy is enough (--no_pairs)."""
    json: bool = False
    """Print one JSON object to standard output and nothing else."""


def _cure(args: Sequence[str]) -> int:
    if {"-h", "--help"} & set(args):
        print(config.help_text("gradjax cure", CureCommand, CureCommand.__doc__ or ""))
        return 0
    if list(args) == ["--list"]:
        from gradjax.cli import tables

        return tables.list_remedies()
    experiment, options = config.parse(args, CureCommand)
    _say_of_sweep(options.config, "cure")

    import matplotlib

    matplotlib.use("Agg")
    from gradjax.cli import tables
    from gradjax.cure import search
    from gradjax.report import files
    from gradjax.report.cure import cure_figure

    started = time.monotonic()
    names = options.remedies
    chosen = (
        names
        if names in ("fitting", "all")
        else [name.strip() for name in names.split(",") if name.strip()]
    )
    with tables.progress_bar() as progress:
        found = search.find_cure(experiment, chosen, pairs=options.pairs, progress=progress)
    folder = files.run_folder(experiment.output, experiment.name)
    files.write_text(folder / "config.toml", config.to_toml(experiment))
    summary = search.to_dict(found) | {
        "folder": str(folder),
        "seconds": round(time.monotonic() - started, 1),
    }
    title = f"{experiment.name}: no remedy is better"
    if found.winner != search.UNTREATED:
        title = f"{experiment.name}: {found.winner}"
        files.write_text(folder / "cured.toml", config.to_toml(found.experiments[found.winner]))
    files.save(found.results.assign_attrs(config=config.to_toml(experiment)), folder / "results.nc")
    files.write_text(folder / "cure.json", files.dumps(summary) + "\n")
    files.write_text(folder / "cure.txt", summary["story"] + "\n")
    before, after = found.verdict.measurements, found.after and found.after.measurements
    figure = cure_figure(found.ranking, found.results, before, after, title)
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"cure.{suffix}", dpi=160)
    print(files.dumps(summary)) if options.json else tables.print_cure(summary, folder)
    return 0


@dataclass(frozen=True)
class TrainCommand(config.Command):
    """gradjax train CONFIG: train all seeds of an experiment side by side, with checkpoints."""

    resume: bool = False
    """Go on with the newest unfinished run of this name, bit for bit as if it had not been
    interrupted."""
    json: bool = False
    """Print one JSON object to standard output and nothing else."""


@dataclass(frozen=True)
class SweepCommand(TrainCommand):
    """gradjax sweep CONFIG: train every seed at every setting of [sweep.vmap] and
    [sweep.static].
    """


def _say_of_sweep(path: str, command: str) -> None:
    if any(config.sweep_tables(path)):
        print(
            f"{command}: [sweep] in {path} is for `gradjax sweep`; the values outside it are used.",
            file=sys.stderr,
        )


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
        raise config.ConfigError(
            f"sweep: {options.config} varies nothing; needed: [sweep.vmap] or [sweep.static]"
        )

    import matplotlib

    matplotlib.use("Agg")
    from gradjax.cli import tables
    from gradjax.experiment import grid, sweep
    from gradjax.report import files
    from gradjax.report.sweep import sweep_figure
    from gradjax.report.training import training_figure

    grid.grid(experiment, vary, static)  # a name that cannot be swept leaves no folder behind
    started, first = time.monotonic(), sweep.join_cluster()
    folder = sweep.agreed_folder(experiment, options.resume)
    with tables.progress_bar() as progress:
        ds = sweep.sweep(
            experiment, vary, static, folder=folder, keep_states=name == "train", progress=progress
        )
    if not first:
        return 0  # the first process writes and prints for all
    figure = (
        training_figure(ds, experiment.name)
        if name == "train"
        else sweep_figure(ds, experiment.name)
    )
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"{name}.{suffix}", dpi=160)
    summary = files.summary(ds) | {
        "folder": str(folder),
        "seconds": round(time.monotonic() - started, 1),
    }
    files.write_text(folder / "summary.json", files.dumps(summary) + "\n")
    if options.json:
        print(files.dumps(summary))
    else:
        tables.print_training(ds, summary, folder / f"{name}.png")
    return 0


def _data(args: Sequence[str]) -> int:
    from gradjax.experiment import tasks

    usage = "usage: gradjax data list | gradjax data fetch NAME | gradjax data verify NAME"
    if not args or {"-h", "--help"} & set(args):
        print(usage)
        return 0
    match list(args):
        case ["list"]:
            for name, description, place in tasks.available():
                print(
                    f"{name:18}{description}\n{'':18}{place or 'not here yet: gradjax data fetch ' + name}"
                )
        case ["fetch", name]:
            print(
                "\n".join(map(str, tasks.fetch(name)))
                or f"{name} comes with scikit-learn; nothing to fetch"
            )
        case ["verify", name]:
            rows = tasks.verify(name)
            for file, sha256, good in rows:
                print(
                    f"{'ok     ' if good else 'DAMAGED' if sha256 else 'MISSING'}  {file}  {sha256 or ''}"
                )
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
            raise config.ConfigError(
                f"gradjax: unknown command {args[0]!r}{near}; commands: {', '.join(COMMANDS)}"
            )
        return COMMANDS[args[0]](args[1:])
    except ValueError as error:  # config and data errors, and the checks that come before tracing
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"gradjax: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
