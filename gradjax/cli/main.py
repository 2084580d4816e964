"""The `gradjax` command.

    gradjax diagnose CONFIG [--flags]   measure a network at initialisation and give a verdict
    gradjax cure CONFIG [--flags]       try remedies over its seeds, rank them, diagnose the winner
    gradjax train CONFIG [--flags]      train all its seeds in parallel
    gradjax sweep CONFIG [--flags]      train every seed at every setting of its [sweep] tables
    gradjax data {fetch,verify,list}    the data sets

The exit status is 0 for every verdict, and 2 for input that cannot be used, with one message and no
traceback. Heavy imports are inside the commands, so that `gradjax --help` answers at once. The
thread count of jaxlib's LAPACK is set before JAX starts, because two threads make its small
factorisations a hundred times slower.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradjax.cli import cache
from gradjax.core.extras import needed_for
from gradjax.experiment import config
from gradjax.experiment.schema import Command, Experiment

USAGE = """usage: gradjax COMMAND ...

See, explain, cure and prove exploding and vanishing gradients in JAX.

commands:
  diagnose CONFIG [--flags]   measure a network at initialisation: verdict, table, figure
  cure CONFIG [--flags]       try remedies over its seeds: ranking, figure, verdicts; --list
  train CONFIG [--flags]      train all its seeds in parallel: scores, curves; --resume
  sweep CONFIG [--flags]      train every seed at every setting of [sweep], one program; --resume
  data {list,fetch,verify}    the data sets: where they are, fetch one, check its hashes

examples:
  gradjax diagnose configs/demo.toml
  gradjax diagnose configs/demo.toml --model.depth 200 --json
  gradjax cure configs/deep_sigmoid_mlp.toml
  gradjax cure configs/demo.toml --remedies critical_init,clip_by_global_norm+adam
  gradjax train configs/mlp_mnist.toml --train.num_seeds 8
  gradjax sweep configs/clip_threshold.toml --resume
  gradjax data fetch mnist

`gradjax COMMAND --help` lists the flags of a command. Compiled programs are kept for the next
command in the user's cache folder (GRADJAX_CACHE_DIR); --no_cache turns that off.
"""
NO_CACHE = {"--no_cache", "--no-cache"}
DATA_USAGE = "usage: gradjax data list | gradjax data fetch NAME | gradjax data verify NAME"


@dataclass(frozen=True)
class JsonCommand(Command):
    """A command that prints text, or one JSON object."""

    json: bool = False
    """Print one JSON object to standard output and nothing else."""


@dataclass(frozen=True)
class DiagnoseCommand(JsonCommand):
    """Measure a network at initialisation, over several seeds, and give a verdict."""


@dataclass(frozen=True)
class CureCommand(JsonCommand):
    """Diagnose, try the remedies that fit over all seeds, rank them, diagnose the winner."""

    remedies: str = "fitting"
    """fitting (those for the findings of the diagnosis), all, or names separated by commas; a+b
    applies two at a time."""
    pairs: bool = True
    """Try the pairs of the best three if no single remedy is enough (--no_pairs: do not)."""


@dataclass(frozen=True)
class TrainCommand(JsonCommand):
    """Train all seeds of an experiment in parallel, with checkpoints."""

    resume: bool = False
    """Continue the newest unfinished run of this name, bit for bit as if it had not been
    interrupted."""


@dataclass(frozen=True)
class SweepCommand(TrainCommand):
    """Train every seed at every setting of [sweep.vmap] and [sweep.static]."""


def _diagnose(experiment: Experiment, options: DiagnoseCommand) -> None:
    from rich.console import Console

    from gradjax.cli import tables
    from gradjax.diagnosis.verdict import judge
    from gradjax.experiment.measure import examine
    from gradjax.report import files
    from gradjax.report.network import diagnosis_figure

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
        text = config.to_toml(experiment)
        versions = {f"version_{name}": value for name, value in meta["versions"].items()}
        ds = verdict.measurements.assign_attrs(config=text, seed=experiment.seed, **versions)
        files.write_text(folder / "config.toml", text)
        files.write_text(folder / "diagnosis.json", verdict.to_json() + "\n")
        files.save(ds, folder / "results.nc")
        title = f"{experiment.name}: {verdict.headline.replace('_', ' ')}"
        _save_figure(diagnosis_figure(ds, title), folder / "diagnosis")
    if options.json:
        print(verdict.to_json())
    else:
        tables.print_verdict(verdict, folder)


def _cure(experiment: Experiment, options: CureCommand) -> None:
    from gradjax.cli import tables
    from gradjax.cure import search
    from gradjax.report import files
    from gradjax.report.cure import cure_figure

    started = time.monotonic()
    names: str | list[str] = options.remedies
    if names not in ("fitting", "all"):
        names = [name.strip() for name in names.split(",") if name.strip()]
    with tables.progress_bar() as progress:
        found = search.find_cure(experiment, names, pairs=options.pairs, progress=progress)
    folder = files.run_folder(experiment.output, experiment.name)
    text = config.to_toml(experiment)
    files.write_text(folder / "config.toml", text)
    files.save(found.results.assign_attrs(config=text), folder / "results.nc")
    title = f"{experiment.name}: no remedy is better"
    if found.winner != search.UNTREATED:
        title = f"{experiment.name}: {found.winner}"
        files.write_text(folder / "cured.toml", config.to_toml(found.experiments[found.winner]))
    summary = _summarize(search.to_dict(found), folder, started, folder / "cure.json")
    files.write_text(folder / "cure.txt", summary["story"] + "\n")
    before, after = found.verdict.measurements, found.after and found.after.measurements
    figure = cure_figure(found.ranking, found.results, before, after, title)
    _save_figure(figure, folder / "cure")
    if options.json:
        print(files.dumps(summary))
    else:
        tables.print_cure(summary, folder)


def _train(experiment: Experiment, options: TrainCommand) -> None:
    from gradjax.report.training import training_figure

    _run_training("train", experiment, options, {}, {}, training_figure)


def _sweep(experiment: Experiment, options: SweepCommand) -> None:
    from gradjax.report.sweep import sweep_figure

    vary, static = config.sweep_tables(options.config)
    if not vary and not static:
        raise config.ConfigError(
            f"sweep: {options.config} varies nothing; needed: [sweep.vmap] or [sweep.static]"
        )
    _run_training("sweep", experiment, options, vary, static, sweep_figure)


def _run_training(
    name: str,
    experiment: Experiment,
    options: TrainCommand,
    vary: dict[str, Any],
    static: dict[str, Any],
    draw: Callable,
) -> None:
    from gradjax.cli import tables
    from gradjax.experiment import cluster, grid, sweep
    from gradjax.report import files

    # Checked here so that a name that cannot be swept leaves no folder behind.
    grid.grid(experiment, vary, static)
    started, is_first = time.monotonic(), cluster.join_cluster()
    folder = cluster.agree_on_folder(experiment, options.resume)
    keep = name == "train"
    with tables.progress_bar() as progress:
        ds = sweep.sweep(
            experiment, vary, static, folder=folder, keep_states=keep, progress=progress
        )
    if not is_first:
        # The first process writes and prints for all.
        return
    _save_figure(draw(ds, experiment.name), folder / name)
    summary = _summarize(files.summary(ds), folder, started, folder / "summary.json")
    if options.json:
        print(files.dumps(summary))
    else:
        tables.print_training(summary, experiment.train.target, folder / f"{name}.png")


def _summarize(summary: dict[str, Any], folder: Path, started: float, path: Path) -> dict[str, Any]:
    """The summary with folder and time, which is also written to `path`."""
    from gradjax.report import files

    seconds = round(time.monotonic() - started, 1)
    summary = summary | {"folder": str(folder), "seconds": seconds}
    files.write_text(path, files.dumps(summary) + "\n")
    return summary


def _save_figure(figure: Any, path: Path) -> None:
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=160)


def _data(args: Sequence[str]) -> int:
    from gradjax.experiment import tasks

    if not args or {"-h", "--help"} & set(args):
        print(DATA_USAGE)
        return 0
    match list(args):
        case ["list"]:
            for name, description, place in tasks.available():
                print(f"{name:18}{description}")
                print(f"{'':18}{place or f'not here yet: gradjax data fetch {name}'}")
        case ["fetch", name]:
            fetched = "\n".join(map(str, tasks.fetch(name)))
            print(fetched or f"{name} comes with scikit-learn; nothing to fetch")
        case ["verify", name]:
            rows = tasks.verify(name)
            for file, sha256, good in rows:
                status = "ok" if good else "MISSING"
                if sha256 and not good:
                    status = "DAMAGED"
                print(f"{status:7}  {file}  {sha256 or ''}")
            return 0 if all(good for *_, good in rows) else 2
        case _:
            raise config.ConfigError(f"data: got {' '.join(args)!r}; {DATA_USAGE}")
    return 0


# name -> the dataclass of its arguments, and what runs it
COMMANDS: dict[str, tuple[type[Command], Callable[[Experiment, Any], None]]] = {
    "diagnose": (DiagnoseCommand, _diagnose),
    "cure": (CureCommand, _cure),
    "train": (TrainCommand, _train),
    "sweep": (SweepCommand, _sweep),
}


def _run(name: str, args: Sequence[str]) -> int:
    """Run one command and return its exit status."""
    if name == "data":
        return _data(args)
    if name not in COMMANDS:
        names = [*COMMANDS, "data"]
        near = config.nearest(name, {known: known for known in names})
        raise config.ConfigError(
            f"gradjax: unknown command {name!r}{near}; commands: {', '.join(names)}"
        )
    command, run = COMMANDS[name]
    if {"-h", "--help"} & set(args):
        from gradjax.cli.help import help_text

        print(help_text(f"gradjax {name}", command), end="")
        return 0
    if name == "cure" and list(args) == ["--list"]:
        from gradjax.cli import tables

        tables.list_remedies()
        return 0
    experiment, options = config.parse(args, command)
    if name != "sweep" and any(config.sweep_tables(options.config)):
        print(
            f"{name}: [sweep] in {options.config} is for `gradjax sweep`; the values outside it "
            "are used.",
            file=sys.stderr,
        )
    import matplotlib

    if matplotlib.get_backend().lower() != "agg":
        matplotlib.use("Agg")
    run(experiment, options)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = [word for word in given if word not in NO_CACHE]
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if args[0] == "--version":
        import gradjax

        print(f"gradjax {gradjax.__version__}")
        return 0
    if args == given and not {"-h", "--help"} & set(args):
        # Before JAX is imported, which reads the setting once.
        cache.turn_on()
    try:
        with needed_for(f"gradjax {args[0]}"):
            return _run(args[0], args[1:])
    except ImportError as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        # A package of the extra `lab` is missing, and the message says how to install it.
        print(error, file=sys.stderr)
    except ValueError as error:  # config and data errors, and the checks before tracing
        print(error, file=sys.stderr)
    except OSError as error:
        print(f"gradjax: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
