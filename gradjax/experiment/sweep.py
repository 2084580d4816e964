"""`sweep`: train every seed at every setting with one compiled program -> one labelled dataset.

The members of a program (settings x seeds) are cut into blocks of `lanes` members, each trained by
one vmap; workers take one block after the other (`gradjax.experiment.program`, `blocks`). A block
computes the same bits whatever the number of workers and whichever process runs it, so results are
equal bit for bit at the same lane width, which is recorded. With `train.shard = "batch"` there is
one worker, and the batch is distributed over all devices.

With a folder, a sweep that is killed at any moment can be resumed, also by another number of
processes. Processes of a cluster (`jax.distributed`) divide the blocks among them; they wait for
each other only at the start and after each static setting.

Cost: one compilation per static setting (and accelerator), and one more if `train.eval_every` does
not divide `train.num_steps`.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gradjax.core.extras import needed_for
from gradjax.experiment import config, grid, training
from gradjax.experiment.blocks import Cell, compile_cell, run_cell, unfold
from gradjax.experiment.program import Compiler, rule_for_workers
from gradjax.experiment.progress import Meter, Progress, Report, ignore
from gradjax.experiment.schema import ConfigError, Experiment, Task
from gradjax.experiment.tasks import Splits
from gradjax.report import files

with needed_for("gradjax.sweep"):
    import xarray as xr


def sweep(
    experiment: Experiment | str | Path,
    vary: Mapping[str, Any] | None = None,
    static: Mapping[str, Any] | None = None,
    num_seeds: int | None = None,
    *,
    folder: str | Path | None = None,
    keep_states: bool = False,
    progress: Report = ignore,
) -> xr.Dataset:
    """Train every seed at every setting, one compiled program per static setting.

    A host-level function: it compiles, runs, and with a folder writes.

    Args:
      experiment: as `gradjax.config.load` returns it, or the path of a TOML file.
      vary: dotted float -> values, vmapped, in one of the forms of `gradjax.experiment.grid`.
      static: dotted name -> list of values, each combination of which is a program.
      num_seeds: overrides `train.num_seeds`.
      folder: where shards, checkpoints and `results.nc` go; an unfinished sweep in it is resumed.
        None: nothing is written.
      keep_states: leave the last state of every member in `checkpoints/`.
      progress: called between chunks.

    Returns:
      Dataset with the dimensions static names, swept names (`draw` for random ones), `seed`, and

        step: loss, score, log_gradient_norm (natural log, before clipping) and clipped (a fraction)
          of the training batches;
        evaluation (a step count): validation_loss, validation_score;
        evaluation, layer: layer_log_activation_rms, layer_log_cotangent_rms,
          layer_log_gradient_norm, as `gradjax.core.step.signals` defines them;
        none, one number per member: final_loss, final_score (validation after the last step),
          test_loss, test_score, trained (whether the target was reached), trained_at, diverged_at
          (steps, -1 for never), diverged_leaf, diverged_cause.

      A diverged member keeps its last good parameters, and its later losses are measured at those.

    Raises:
      ConfigError: names and values that cannot be swept, or a folder that belongs to another
        config.
      gradjax.experiment.checkpoint.CheckpointError: the disk is full or read-only; the message
        names the last good state.

    >>> import gradjax
    >>> from gradjax import config
    >>> values = {"model.depth": 2, "model.width": 8, "train.num_steps": 4, "train.eval_every": 2}
    >>> small = config.replace(config.Experiment(), values)
    >>> ds = gradjax.sweep(small, vary={"optimizer.learning_rate": [0.01, 0.1]}, num_seeds=3)
    >>> dict(ds.loss.sizes)
    {'optimizer.learning_rate': 2, 'seed': 3, 'step': 4}
    """
    if isinstance(experiment, str | Path):
        experiment = config.load(experiment)
    if num_seeds is not None:
        experiment = config.replace(experiment, {"train.num_seeds": num_seeds})
    config.check(experiment)
    settings = grid.grid(experiment, vary, static)
    text = config.to_toml(experiment) + grid.to_toml(vary, static)
    folder = None if folder is None else Path(folder)
    if folder is not None:
        _claim(folder, text)
    elif jax.process_count() > 1:
        raise ConfigError(
            f"sweep: {jax.process_count()} processes share their results in a folder; pass folder="
        )
    cells = settings.cells()
    total = len(cells) * settings.num_members
    meter = Meter(total * experiment.train.num_steps, progress)
    programs = f"{len(cells)} training program{'s' * (len(cells) > 1)}"
    progress(Progress(f"{total} members, {programs} to compile"))
    datasets, plans, compiler = [], [], Compiler()
    data: tuple[Task, Splits] | None = None
    for number, values in enumerate(cells):
        own = config.replace(experiment, values)
        if data is None or data[0] != own.task:
            data = own.task, training.splits_of(own)
        cell = compile_cell(number, own, settings, data[1], compiler, folder, keep_states)
        label = "".join(f"{name} = {value}: " for name, value in values.items())
        plans.append(f"{label}{cell.plan}")
        progress(Progress(plans[-1]))
        datasets.append(unfold(run_cell(cell, meter), cell, settings))
    ds = _nest(datasets, settings.static)
    ds = ds.assign_attrs(config=text, plan="\n".join(plans), target=experiment.train.target)
    if folder is not None and jax.process_index() == 0:
        versions = {f"version_{name}": value for name, value in files.provenance().items()}
        files.save(ds.assign_attrs(versions), folder / "results.nc")
    return ds


def _claim(folder: Path, text: str) -> None:
    """Write the sweep's config into its folder, or check that the folder belongs to it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.toml"
    if not path.exists():
        if jax.process_index() == 0:
            files.write_text(path, text)
        return
    differ = grid.differences(config.load(path), config.loads(text))
    before, now = (t.partition("[sweep.")[2] for t in (path.read_text(), text))
    if before != now:
        differ.append("[sweep]: other names or values")
    if differ:
        raise ConfigError(
            f"sweep: {folder} was begun with other settings (there and here): {'; '.join(differ)}"
        )


def _nest(datasets: list[xr.Dataset], static: dict[str, list]) -> xr.Dataset:
    """The cells' datasets along one dimension per static name."""
    for name in reversed(static):
        values, size = static[name], len(static[name])
        index = xr.DataArray(values, dims=name, name=name)
        datasets = [
            xr.concat(datasets[i : i + size], dim=index, join="outer")
            for i in range(0, len(datasets), size)
        ]
    return datasets[0]


def programs(experiments: Mapping[str, Experiment]) -> list[list[str]]:
    """The names grouped by compiled program; those of a group differ in sweepable floats only."""
    floats, groups = set(config.sweepable()), {}
    for name, experiment in experiments.items():
        # A float compiles the same program whatever its value, but not the same as None.
        shape = {
            key: value is None if key in floats else value
            for key, value in config.flatten(experiment).items()
            if key not in ("name", "output")
        }
        groups.setdefault(tuple(shape.items()), []).append(name)
    return list(groups.values())


def compare(
    experiments: Mapping[str, Experiment], *, progress: Report = ignore
) -> dict[str, xr.Dataset]:
    """Train every seed of each experiment; those that differ only in floats share a program.

    A host-level function. As many programs are compiled at a time as there are cores, because each
    compilation keeps one core busy; settings whose training steps are the same function (they
    differ only in the initialisation) share its executable. A member computes what it computes in
    `sweep` at the same lane width.

    Args:
      experiments: name -> experiment; all with the same number of seeds.
      progress: called between chunks.

    Returns:
      name -> dataset as `sweep` returns it for the seeds, with the attributes `program` (number of
      the training program among those that were compiled) and `seconds_per_step` (per member,
      without compilation).

    Raises:
      ConfigError: an experiment that `gradjax.config.check` rejects.
    """
    groups = programs(experiments)
    for experiment in experiments.values():
        config.check(experiment)
    steps = sum(e.train.num_steps * e.train.num_seeds for e in experiments.values())
    meter = Meter(steps, progress)
    progress(Progress(f"{len(experiments)} settings, {len(groups)} training programs to compile"))
    found, executables = {}, {}
    compiled = _compile_groups(experiments, groups, progress)
    for names, (cell, settings) in zip(groups, compiled, strict=True):
        began = time.monotonic()
        blocks = run_cell(cell, meter)
        seconds = time.monotonic() - began
        taken = sum(cell.count_members(i) * ds.sizes["step"] for i, ds in enumerate(blocks))
        ds = unfold(blocks, cell, settings)
        ds = ds.assign_attrs(
            program=executables.setdefault(id(cell.programs[0].chunk), len(executables)),
            seconds_per_step=seconds / taken,
            target=cell.experiment.train.target,
            plan=str(cell.plan),
        )
        for i, name in enumerate(names):
            found[name] = ds.isel({grid.DRAW: i}).drop_vars([*settings.drawn, grid.DRAW])
    return {name: found[name] for name in experiments}


def _compile_groups(
    experiments: Mapping[str, Experiment], groups: list[list[str]], progress: Report
) -> list[tuple[Cell, grid.Grid]]:
    """The cell and the settings of each group.

    All groups are compiled, several at a time, before the first one runs: XLA's CPU client can
    deadlock when more executions wait for each other than it has threads.
    """
    data, lock, compiler = {}, threading.Lock(), Compiler()

    def compile_group(number: int) -> tuple[Cell, grid.Grid]:
        names = groups[number]
        own, columns = experiments[names[0]], _columns([experiments[name] for name in names])
        source = own.task, own.seed
        with lock:
            if source not in data:
                data[source] = training.splits_of(own)
        dims = {grid.DRAW: np.arange(len(names)), "seed": np.arange(own.train.num_seeds)}
        settings = grid.Grid(dims, dict.fromkeys(columns, grid.DRAW), {}, columns)
        cell = compile_cell(number, own, settings, data[source], compiler)
        progress(Progress(f"compiled {', '.join(names)}: {cell.plan}"))
        return cell, settings

    workers = 1
    if jax.default_backend() == "cpu":
        workers = rule_for_workers(next(iter(experiments.values())))
    with ThreadPoolExecutor(workers, thread_name_prefix="gradjax-program") as pool:
        return list(pool.map(compile_group, range(len(groups))))


def _columns(experiments: Sequence[Experiment]) -> dict[str, np.ndarray]:
    """The floats in which the experiments of one program differ: name -> values."""
    values = [config.flatten(experiment) for experiment in experiments]
    names = [name for name in config.sweepable() if len({v[name] for v in values}) > 1]
    return {name: np.array([v[name] for v in values]) for name in names}
