"""`sweep`: one compiled program trains every seed at every setting -> one labelled dataset.

The members of a program (settings x seeds) are cut into blocks of `lanes` members, which one vmap
trains; workers take one block after the other until all are done (`gradjax.experiment.program`).
What a block computes does not depend on the others, on the number of workers, or on the process
that runs it, so results are equal bit for bit at the same lane width, which is recorded. With
`train.shard = "batch"` there is one worker, and the batch is spread over all devices.

With a folder, a finished block is a file in `shards/` and an unfinished one a checkpoint in
`checkpoints/`: what is killed at any moment goes on from there, in another number of processes too.
Processes of a cluster (`jax.distributed`) share the blocks out and wait for each other only at the
start and after each static setting.

Cost: one compilation per static setting (and accelerator), and one more where `train.eval_every`
does not divide `train.num_steps`.
"""

import contextlib
import dataclasses
import json
import math
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax.experimental import multihost_utils

from gradjax.experiment import checkpoint, config, grid, training
from gradjax.experiment.program import BATCH, Compiler, Plan, Program, fit, rule_for_workers
from gradjax.experiment.schema import ConfigError, Experiment
from gradjax.experiment.training import Record, State
from gradjax.report import files
from gradjax.transforms import CAUSES, leaf_name

PyTree = Any


class Progress(NamedTuple):
    """What the caller's `progress` is given between chunks."""

    message: str  # a line to print, or ""
    done: float = 0.0  # member-steps so far, of `total`
    total: float = 1.0
    steps_per_second: float = 0.0  # member-steps
    loss: float = math.nan  # median over the members at work
    diverged: int = 0  # so far


# -- blocks ----------------------------------------------------------------------------------------------


@dataclass
class _Block:
    """A block at work: its place among the members, its state (None: not begun) and what it has
    recorded.
    """

    index: int
    step: int = 0
    state: Any = None
    record: Any = None  # a Record of NumPy arrays (lanes, steps ...)


def _join(record: Record | None, new: Record) -> Record:
    """Appends a chunk along the axis of steps, or of evaluations."""
    ends = lambda tree: jax.tree.map(lambda x: x[:, None], tree)
    new = new._replace(validation=ends(new.validation), signals=ends(new.signals))
    if record is None:
        return new
    joined = jax.tree.map(
        lambda a, b: np.concatenate([a, b], 1), record._replace(frozen=()), new._replace(frozen=())
    )
    return joined._replace(frozen=new.frozen)


@dataclass
class _Cell:
    """One static setting: its program and members, and where its blocks are kept."""

    number: int
    programs: list[Program]  # one per worker
    plan: Plan
    experiment: Experiment
    keys: jax.Array  # (members,)
    hparams: dict[str, np.ndarray]  # (members,)
    folder: Path | None
    keep_states: bool

    def path(self, kind: str, block: int) -> Path | None:
        """Where a block's shard or its checkpoints are."""
        suffix = ".nc" if kind == "shards" else ""
        return self.folder and self.folder / kind / f"{self.number:03d}-{block:05d}{suffix}"

    def members_of(self, block: int) -> np.ndarray:
        """The member of each lane; the last block repeats the last member."""
        lanes = self.plan.lanes
        return np.minimum(np.arange(block * lanes, (block + 1) * lanes), self.plan.members - 1)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        values = {name: sorted({float(x) for x in column}) for name, column in self.hparams.items()}
        return {
            "config": config.to_dict(self.experiment),
            "lanes": self.plan.lanes,
            "values": values,
        }

    def finished(self, block: int) -> xr.Dataset | None:
        """The block's results if they are on disk and intact."""
        path = self.path("shards", block)
        if path is None or not path.exists():
            return None
        try:
            return files.load(path)
        except Exception as error:  # whatever HDF5 makes of a damaged file
            warnings.warn(
                f"sweep: {path} is damaged and is computed again: {str(error)[:120]}", stacklevel=2
            )
            return None

    def restored(self, block: int) -> _Block:
        """The block at its newest good checkpoint, or not begun."""
        folder = self.path("checkpoints", block)
        state, chunk = self.programs[0].like

        def like(step):
            ends = -(-step // self.experiment.train.eval_every)
            evaluations = jax.tree.map(lambda x: _shape(x, ends), (chunk.validation, chunk.signals))
            steps = {
                name: _shape(getattr(chunk, name), step, drop=1) for name in Record._fields[:4]
            }
            validation, signals = evaluations
            return {
                "state": state,
                "record": chunk._replace(**steps, validation=validation, signals=signals),
            }

        found = checkpoint.restore(folder, like) if folder else None
        if found is None:
            return _Block(block)
        _agree(found.meta, self.identity(), str(folder))
        return _Block(block, found.step, found.tree["state"], found.tree["record"])

    def run(
        self, todo: Sequence[int], report: Callable[["_Cell", int, Record], None]
    ) -> dict[int, xr.Dataset]:
        """Train the blocks `todo`; each worker takes the next one."""
        waiting, done, stop = queue.SimpleQueue(), {}, threading.Event()
        for block in todo:
            waiting.put(block)

        def work(program: Program) -> None:
            with contextlib.suppress(queue.Empty):
                while not stop.is_set():
                    block = waiting.get_nowait()
                    if (ds := self._train(block, program, report, stop)) is not None:
                        done[block] = ds

        with ThreadPoolExecutor(len(self.programs), thread_name_prefix="gradjax") as pool:
            futures = [pool.submit(work, program) for program in self.programs]
            try:
                for future in as_completed(futures):
                    future.result()
            finally:
                stop.set()  # one that fails, or Ctrl-C, ends the others after their chunk
        return done

    def _train(
        self, index: int, program: Program, report: Callable, stop: threading.Event
    ) -> xr.Dataset | None:
        """One block from where it stands to its end, and its dataset; None if stopped before."""
        train, members, block = self.experiment.train, self.members_of(index), self.restored(index)
        hparams = program.place({name: values[members] for name, values in self.hparams.items()})
        if block.state is None:
            state = program.start(program.place(self.keys[members]), hparams, program.data)
        else:
            state = program.place(block.state)
        path, saved = self.path("checkpoints", index), time.monotonic()
        with checkpoint.Writer(path) if path else contextlib.nullcontext() as writer:
            while not self._ended(block.step, state):
                if stop.is_set():
                    return None
                left = train.num_steps - block.step
                state, record = (program.chunk if left >= train.eval_every else program.tail)(
                    state, hparams, program.data
                )
                block.step += min(train.eval_every, left)
                block.record = _join(block.record, jax.tree.map(np.asarray, record))
                report(self, index, block.record)
                due = time.monotonic() - saved >= train.checkpoint_seconds
                if writer and (self.keep_states if self._ended(block.step, state) else due):
                    saved = time.monotonic()
                    writer.save(
                        block.step, {"state": state, "record": block.record}, self.identity()
                    )
        ds = _dataset(
            state, program.test(state, hparams, program.data), block.record, self.experiment
        )
        if shard := self.path("shards", index):
            shard.parent.mkdir(parents=True, exist_ok=True)
            files.save(ds, shard)
            if path and not self.keep_states:
                checkpoint.remove(path)
        return ds

    def _ended(self, step: int, state: State) -> bool:
        """Whether all steps are taken, or every member rests (and the config lets it)."""
        train = self.experiment.train
        stopped = (np.asarray(state.stopped_at) >= 0) | (np.asarray(training.frozen_at(state)) >= 0)
        return step >= train.num_steps or (train.stop_at_target and bool(stopped.all()))


def _shape(x: Any, size: int, drop: int = 0) -> jax.ShapeDtypeStruct:
    """The shape with an axis of `size` behind the lanes, in place of `drop` axes."""
    return jax.ShapeDtypeStruct((x.shape[0], size, *x.shape[1 + drop :]), x.dtype)


def _agree(meta: Mapping[str, Any], mine: Mapping[str, Any], where: str) -> None:
    """Refuse what another config has left behind, naming the fields."""
    differ = grid.differences(config.from_dict(meta["config"]), config.from_dict(mine["config"]))
    for name in ("lanes", "values"):
        if meta[name] != mine[name]:
            differ.append(
                f"{'lane width' if name == 'lanes' else 'swept values'}: {meta[name]} and {mine[name]}"
            )
    if differ:
        raise ConfigError(
            f"sweep: {where} was written with other settings (there and here): {'; '.join(differ)}"
        )


def _dataset(
    state: State, scores: training.Scores, records: Record, experiment: Experiment
) -> xr.Dataset:
    """What one block has measured, along `lane`."""
    train = experiment.train
    steps, evaluations = records.loss.shape[1], records.validation.loss.shape[1]
    ends = np.minimum(train.eval_every * np.arange(1, evaluations + 1), train.num_steps)
    broken = {name: np.asarray(value) for name, value in training.divergence(state).items()}
    params = state.variables["params"]
    seen = records.signals
    layer = [f"hidden_{i + 1}" for i in range(seen.log_activation_rms.shape[-1] - 2)]
    reached = records.validation.score >= train.target
    lane, step, each = ("lane",), ("lane", "step"), ("lane", "evaluation")
    return xr.Dataset(
        {
            "loss": (step, records.loss),
            "score": (step, records.score),
            "log_gradient_norm": (step, records.log_gradient_norm),
            "clipped": (step, records.clipped),
            "validation_loss": (each, records.validation.loss),
            "validation_score": (each, records.validation.score),
            "layer_log_activation_rms": ((*each, "layer"), seen.log_activation_rms[..., 1:-1]),
            "layer_log_cotangent_rms": ((*each, "layer"), seen.log_cotangent_rms[..., 1:-1]),
            "layer_log_gradient_norm": ((*each, "layer"), seen.log_gradient_norm[..., :-1]),
            "final_loss": (lane, records.validation.loss[:, -1]),
            "final_score": (lane, records.validation.score[:, -1]),
            "test_loss": (lane, np.asarray(scores.loss)),
            "test_score": (lane, np.asarray(scores.score)),
            "trained": (lane, reached.any(1)),
            "trained_at": (lane, np.where(reached.any(1), ends[reached.argmax(1)], -1)),
            "diverged_at": (lane, broken["diverged_at"]),
            "diverged_leaf": (
                lane,
                np.array([leaf_name(params, int(i)) for i in broken["diverged_leaf"]], dtype=str),
            ),
            "diverged_cause": (
                lane,
                np.array([CAUSES[int(i)] for i in broken["diverged_cause"]], dtype=str),
            ),
        },
        coords={"step": np.arange(steps), "evaluation": ends, "layer": layer},
    )


# -- the sweep -------------------------------------------------------------------------------------------


def _unfolded(blocks: list[xr.Dataset], cell: _Cell, settings: grid.Grid) -> xr.Dataset:
    """The blocks of a cell in order, with the dimensions of the sweep in place of `lane`."""
    ds = xr.concat(blocks, "lane", join="outer").isel(lane=slice(cell.plan.members))
    shape = [len(values) for values in settings.dims.values()]
    variables = {
        str(name): ((*settings.dims, *x.dims[1:]), x.values.reshape(*shape, *x.shape[1:]))
        for name, x in ds.items()
    }
    drawn = {name: (settings.along[name], values) for name, values in settings.drawn.items()}
    return xr.Dataset(variables, coords={**ds.coords, **settings.dims, **drawn})


def _nested(datasets: list[xr.Dataset], static: dict[str, list]) -> xr.Dataset:
    """The cells' datasets along one dimension per static name."""
    for name in reversed(static):
        values, size = static[name], len(static[name])
        index = xr.DataArray(values, dims=name, name=name)
        datasets = [
            xr.concat(datasets[i : i + size], dim=index, join="outer")
            for i in range(0, len(datasets), size)
        ]
    return datasets[0]


def sweep(
    experiment: Experiment | str | Path,
    vary: Mapping[str, Any] | None = None,
    static: Mapping[str, Any] | None = None,
    num_seeds: int | None = None,
    *,
    folder: str | Path | None = None,
    keep_states: bool = False,
    progress: Callable[[Progress], None] = lambda event: None,
) -> xr.Dataset:
    """Train every seed at every setting, one compiled program per static setting.

    A host-level function: it compiles, runs, and with a folder writes.

    Args:
      experiment: as `gradjax.config.load` returns it, or the path of a TOML file.
      vary: dotted float -> values, vmapped; `gradjax.experiment.grid` says in which forms.
      static: dotted name -> list of values, a program each.
      num_seeds: overrides `train.num_seeds`.
      folder: where shards, checkpoints and `results.nc` go; one that holds an unfinished sweep is resumed. None: no
        file is written.
      keep_states: leave the last state of every member in `checkpoints/`.
      progress: called between chunks.

    Returns:
      Dataset with the dimensions static names, swept names (`draw` for what is drawn at random), `seed`, and
        step: loss, score, log_gradient_norm (before clipping, natural log), clipped (share) of the training batches;
        evaluation (a step count): validation_loss, validation_score; (evaluation, layer): layer_log_activation_rms,
        layer_log_cotangent_rms, layer_log_gradient_norm, as `gradjax.core.step.signals` defines them;
        per member: final_loss, final_score (validation after its last step), test_loss, test_score, trained (the
        target was reached), trained_at, diverged_at (a step, -1 for never), diverged_leaf, diverged_cause. A diverged
        member keeps its last good parameters, and its later losses are those.

    Raises:
      ConfigError: names and values that cannot be swept, or a folder that belongs to another config.
      gradjax.experiment.checkpoint.CheckpointError: the disk is full or read-only; the last good state is named.

    >>> import gradjax
    >>> from gradjax import config
    >>> values = {"model.depth": 2, "model.width": 8, "train.num_steps": 4, "train.eval_every": 2}
    >>> small = config.replace(config.Experiment(), values)
    >>> ds = gradjax.sweep(small, vary={"optimizer.learning_rate": [0.01, 0.1]}, num_seeds=3)
    >>> dict(ds.loss.sizes)
    {'optimizer.learning_rate': 2, 'seed': 3, 'step': 4}
    """
    experiment = config.load(experiment) if isinstance(experiment, str | Path) else experiment
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
    meter = _Meter(total * experiment.train.num_steps, progress)
    progress(
        Progress(
            f"{total} members, {len(cells)} training program{'s' * (len(cells) > 1)} to compile"
        )
    )
    datasets, plans, data, compiler = [], [], (None, None), Compiler()
    for number, values in enumerate(cells):
        own = config.replace(experiment, values)
        data = data if data[0] == own.task else (own.task, training.splits_of(own))
        cell = _cell(number, own, settings, data[1], compiler, folder, keep_states)
        label = "".join(f"{name} = {value}: " for name, value in values.items())
        plans.append(f"{label}{cell.plan}")
        progress(Progress(plans[-1]))
        datasets.append(_unfolded(_run(cell, meter), cell, settings))
    ds = _nested(datasets, settings.static)
    ds = ds.assign_attrs(config=text, plan="\n".join(plans), target=experiment.train.target)
    if folder is not None and jax.process_index() == 0:
        versions = {f"version_{name}": value for name, value in files.provenance().items()}
        files.save(ds.assign_attrs(versions), folder / "results.nc")
    return ds


def programs(experiments: Mapping[str, Experiment]) -> list[list[str]]:
    """The names that share a compiled program: those that differ in sweepable floats alone."""
    floats, groups = set(config.sweepable()), {}
    for name, experiment in experiments.items():
        values = config.flatten(experiment)
        shape = {
            k: v is None if k in floats else v
            for k, v in values.items()
            if k not in ("name", "output")
        }
        groups.setdefault(tuple(shape.items()), []).append(name)
    return list(groups.values())


def compare(
    experiments: Mapping[str, Experiment],
    *,
    progress: Callable[[Progress], None] = lambda event: None,
) -> dict[str, xr.Dataset]:
    """Train every seed of each experiment; those that differ in sweepable floats alone share one
    compiled program.

    A host-level function. Programs are compiled as many at a time as there are cores, since compiling keeps one busy;
    settings whose training steps are the same function (they differ in the initialisation) share its executable. What
    a member computes is what `sweep` computes at the same lane width.

    Args:
      experiments: name -> experiment; all with the same number of seeds.
      progress: called between chunks.

    Returns:
      name -> dataset as `sweep` returns it for the seeds alone, with the attributes `program` (which of the training
      programs that were compiled) and `seconds_per_step` (of a member, compilation left out).

    Raises:
      ConfigError: an experiment that `gradjax.config.check` refuses.
    """
    groups, data, lock, compiler = programs(experiments), {}, threading.Lock(), Compiler()
    for experiment in experiments.values():
        config.check(experiment)
    steps = sum(e.train.num_steps * e.train.num_seeds for e in experiments.values())
    meter = _Meter(steps, progress)
    progress(Progress(f"{len(experiments)} settings, {len(groups)} training programs to compile"))

    def compile(number: int) -> tuple[_Cell, grid.Grid]:
        names = groups[number]
        own, columns = experiments[names[0]], _columns([experiments[name] for name in names])
        with lock:  # read once
            if (source := (own.task, own.seed)) not in data:
                data[source] = training.splits_of(own)
        dims = {grid.DRAW: np.arange(len(names)), "seed": np.arange(own.train.num_seeds)}
        settings = grid.Grid(dims, dict.fromkeys(columns, grid.DRAW), {}, columns)
        cell = _cell(number, own, settings, data[source], compiler)
        progress(Progress(f"compiled {', '.join(names)}: {cell.plan}"))
        return cell, settings

    # XLA's CPU client can deadlock when more executions wait for each other than it has threads:
    # compile side by side, then train one program after the other on all cores
    workers = (
        1 if jax.default_backend() != "cpu" else rule_for_workers(next(iter(experiments.values())))
    )
    found, executables = {}, {}
    with ThreadPoolExecutor(workers, thread_name_prefix="gradjax-program") as pool:
        compiled = list(pool.map(compile, range(len(groups))))
    for names, (cell, settings) in zip(groups, compiled, strict=True):
        began = time.monotonic()
        blocks = _run(cell, meter)
        taken = sum(
            len(np.unique(cell.members_of(i))) * ds.sizes["step"] for i, ds in enumerate(blocks)
        )
        seconds, target = (time.monotonic() - began) / taken, cell.experiment.train.target
        ds = _unfolded(blocks, cell, settings)
        program = executables.setdefault(id(cell.programs[0].chunk), len(executables))
        attrs = {
            "program": program,
            "seconds_per_step": seconds,
            "target": target,
            "plan": str(cell.plan),
        }
        drop = [*settings.drawn, grid.DRAW]
        found |= {
            n: ds.isel({grid.DRAW: i}).drop_vars(drop).assign_attrs(attrs)
            for i, n in enumerate(names)
        }
    return {name: found[name] for name in experiments}


def _columns(experiments: Sequence[Experiment]) -> dict[str, np.ndarray]:
    """The floats in which the experiments of one program differ."""
    values = [config.flatten(experiment) for experiment in experiments]
    names = [name for name in config.sweepable() if len({v[name] for v in values}) > 1]
    return {name: np.array([v[name] for v in values]) for name in names}


def join_cluster() -> bool:
    """Join the other processes of this command, if there are any, and say whether this one is the
    first.

    Coordinates come from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or from Slurm. Call it before
    anything else of JAX.
    """
    count = os.environ.get("JAX_NUM_PROCESSES")
    if count:
        address, index = os.environ.get("JAX_COORDINATOR_ADDRESS"), os.environ.get("JAX_PROCESS_ID")
        if not (
            address and index and count.isdigit() and index.isdigit() and int(index) < int(count)
        ):
            raise ConfigError(
                f"sweep: JAX_NUM_PROCESSES = {count!r} with JAX_COORDINATOR_ADDRESS = {address!r} and JAX_PROCESS_ID = "
                f"{index!r}; needed: host:port, and an index below the count"
            )
        jax.distributed.initialize(address, int(count), int(index))
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        jax.distributed.initialize()
    return jax.process_index() == 0


def agreed_folder(experiment: Experiment, resume: bool) -> Path:
    """The run folder, the newest unfinished one or a new one, as the first process chooses it for
    all.
    """
    chosen = None
    if jax.process_index() == 0:
        chosen = files.unfinished(experiment.output, experiment.name) if resume else None
        chosen = chosen or files.run_folder(experiment.output, experiment.name)
    if jax.process_count() == 1:
        assert chosen is not None
        return chosen
    text = np.zeros(4096, np.uint8)
    name = str(chosen or "").encode()
    text[: len(name)] = np.frombuffer(name, np.uint8)
    agreed = np.asarray(multihost_utils.broadcast_one_to_all(text))
    return Path(bytes(agreed[agreed > 0].astype(np.uint8)).decode())


def _claim(folder: Path, text: str) -> None:
    """Make the folder this sweep's own, or make sure that it is."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.toml"
    if path.exists():
        differ = grid.differences(config.load(path), config.loads(text))
        before, now = (t.partition("[sweep.")[2] for t in (path.read_text(), text))
        differ += ["[sweep]: other names or values"] if before != now else []
        if differ:
            raise ConfigError(
                f"sweep: {folder} was begun with other settings (there and here): {'; '.join(differ)}"
            )
    elif jax.process_index() == 0:
        files.write_text(path, text)


def _cell(
    number: int,
    experiment: Experiment,
    settings: grid.Grid,
    data: Any,
    compiler: Compiler,
    folder: Path | None = None,
    keep_states: bool = False,
) -> _Cell:
    """Compile a static setting; a folder that was begun at some lane width keeps it."""
    seeds, hparams = settings.members()
    model_key = jax.random.split(jax.random.key(experiment.seed))[
        1
    ]  # seed i is the network that `diagnose` measures
    keys = jax.vmap(lambda i: jax.random.fold_in(model_key, i))(jnp.asarray(seeds))
    problem, note = (
        training.problem_of(experiment, data),
        folder and folder / f"lanes-{number:03d}.json",
    )
    if note and note.exists() and not experiment.train.lanes:
        lanes = {"train.lanes": json.loads(note.read_text())}
        problem = dataclasses.replace(problem, experiment=config.replace(experiment, lanes))
    programs, plan = fit(problem, sorted(hparams), data, settings.num_members, compiler)
    if note and jax.process_index() == 0:
        files.write_text(note, json.dumps(plan.lanes))
    return _Cell(number, programs, plan, experiment, keys, hparams, folder, keep_states)


def _run(cell: _Cell, meter: "_Meter") -> list[xr.Dataset]:
    """The datasets of all blocks in order: those of this process computed, those of the others
    read.
    """
    mine = range(cell.plan.blocks)
    if cell.experiment.train.shard != BATCH:
        mine = mine[jax.process_index() :: jax.process_count()]
    done = {block: ds for block in mine if (ds := cell.finished(block)) is not None}
    meter.skip(
        sum(len(np.unique(cell.members_of(b))) for b in done) * cell.experiment.train.num_steps
    )
    done |= cell.run([b for b in mine if b not in done], meter.advance)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"cell {cell.number}")
        others = [b for b in range(cell.plan.blocks) if b not in done]
        done |= {b: files.load(path) for b in others if (path := cell.path("shards", b))}
    return [done[block] for block in range(cell.plan.blocks)]


class _Meter:
    """Counts member-steps, and tells the caller between chunks."""

    def __init__(self, total: float, progress: Callable[[Progress], None]):
        self.total, self.progress, self.lock = total, progress, threading.Lock()
        self.done, self.computed, self.began = 0.0, 0.0, time.monotonic()
        self.seen: dict[
            tuple[int, int], tuple[int, int, float]
        ] = {}  # block -> steps, diverged, median loss

    def skip(self, member_steps: float) -> None:
        """What was finished before; the clock starts now."""
        self.done += member_steps
        self.began = (
            time.monotonic() - self.computed / max(self.speed, 1e-9)
            if self.computed
            else time.monotonic()
        )

    @property
    def speed(self) -> float:
        """Member-steps per second."""
        return self.computed / max(time.monotonic() - self.began, 1e-9)

    def advance(self, cell: _Cell, block: int, record: Record) -> None:
        """A block has come a chunk further (called from its worker)."""
        count, steps = len(np.unique(cell.members_of(block))), record.loss.shape[1]
        with self.lock:
            before = self.seen.get((cell.number, block))
            new = (
                count * (steps - before[0])
                if before
                else count * min(steps, cell.experiment.train.eval_every)
            )
            self.done += new if before else count * steps  # a restored block brings what it had
            self.computed += new
            self.seen[cell.number, block] = (
                steps,
                int(record.frozen[:count].sum()),
                _median(record.loss[:count, -1]),
            )
            loss = _median(np.array([loss for *_, loss in self.seen.values()]))
            diverged = sum(n for _, n, _ in self.seen.values())
            self.progress(Progress("", self.done, self.total, self.speed, loss, diverged))


def _median(values: Any) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else math.nan
