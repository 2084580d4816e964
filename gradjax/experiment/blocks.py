"""One static setting of a sweep: its compiled programs, its members in blocks, each block trained.

With a folder, a finished block is a file in `shards/` and an unfinished one has checkpoints in
`checkpoints/`. What a block computes does not depend on the other blocks, on the number of workers
or on the process that runs it.
"""

import contextlib
import dataclasses
import json
import queue
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from gradjax.core.extras import needed_for
from gradjax.experiment import checkpoint, config, grid, training
from gradjax.experiment.program import BATCH, Compiler, Plan, Program, fit
from gradjax.experiment.progress import Meter
from gradjax.experiment.schema import ConfigError, Experiment
from gradjax.experiment.tasks import Splits
from gradjax.experiment.training import Record, State
from gradjax.report import files
from gradjax.transforms import CAUSES, leaf_name

with needed_for("gradjax.sweep"):
    import xarray as xr

PyTree = Any


@dataclass
class Block:
    """A block in training.

    Attributes:
      index: its place among the members.
      step: steps taken.
      state: of its lanes; None: not begun.
      record: a Record of NumPy arrays (lanes, steps ...).
    """

    index: int
    step: int = 0
    state: Any = None
    record: Any = None


@dataclass
class Cell:
    """One static setting.

    Attributes:
      number: its place among the static settings.
      programs: one per worker.
      plan: layout of the members.
      experiment: of this setting.
      keys: (members,) PRNG keys.
      hparams: swept name -> (members,) values.
      folder: where blocks are stored, if anywhere.
      keep_states: whether the last checkpoint of a finished block stays.
    """

    number: int
    programs: list[Program]
    plan: Plan
    experiment: Experiment
    keys: jax.Array
    hparams: dict[str, np.ndarray]
    folder: Path | None
    keep_states: bool

    def path(self, kind: str, block: int) -> Path | None:
        """Where a block's shard (`shards`) or its `checkpoints` are."""
        suffix = ".nc" if kind == "shards" else ""
        return self.folder and self.folder / kind / f"{self.number:03d}-{block:05d}{suffix}"

    def members_of(self, block: int) -> np.ndarray:
        """The member of each lane; the last block repeats the last member."""
        lanes = self.plan.lanes
        return np.minimum(np.arange(block * lanes, (block + 1) * lanes), self.plan.members - 1)

    def count_members(self, block: int) -> int:
        """How many different members a block has."""
        return len(np.unique(self.members_of(block)))

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        values = {name: sorted({float(x) for x in column}) for name, column in self.hparams.items()}
        settings = config.to_dict(self.experiment)
        return {"config": settings, "lanes": self.plan.lanes, "values": values}

    def finished(self, block: int) -> xr.Dataset | None:
        """The block's results if they are on disk and intact."""
        path = self.path("shards", block)
        if path is None or not path.exists():
            return None
        try:
            return files.load(path)
        except Exception as error:  # HDF5 raises many kinds for a damaged file
            message = f"sweep: {path} is damaged and is computed again: {str(error)[:120]}"
            warnings.warn(message, stacklevel=2)
            return None

    def restore(self, block: int) -> Block:
        """The block at its newest intact checkpoint, or not begun."""
        folder = self.path("checkpoints", block)
        found = checkpoint.restore(folder, self._shapes_at) if folder else None
        if found is None:
            return Block(block)
        check_identity(found.meta, self.identity(), str(folder))
        return Block(block, found.step, found.tree["state"], found.tree["record"])

    def _shapes_at(self, step: int) -> PyTree:
        """The shapes of a block's state and record after `step` steps."""
        state, chunk = self.programs[0].like
        evaluations = -(-step // self.experiment.train.eval_every)

        def with_axis(tree: PyTree, size: int, drop: int = 0) -> PyTree:
            """An axis of `size` behind the lanes, in place of `drop` axes."""
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((x.shape[0], size, *x.shape[1 + drop :]), x.dtype),
                tree,
            )

        per_step = {name: with_axis(getattr(chunk, name), step, 1) for name in Record._fields[:4]}
        record = chunk._replace(
            **per_step,
            validation=with_axis(chunk.validation, evaluations),
            signals=with_axis(chunk.signals, evaluations),
        )
        return {"state": state, "record": record}

    def run(self, todo: Sequence[int], meter: Meter) -> dict[int, xr.Dataset]:
        """Train the blocks `todo`; each worker takes the next one."""
        waiting, done, stop = queue.SimpleQueue(), {}, threading.Event()
        for block in todo:
            waiting.put(block)

        def work(program: Program) -> None:
            with contextlib.suppress(queue.Empty):
                while not stop.is_set():
                    block = waiting.get_nowait()
                    if (ds := self._train(block, program, meter, stop)) is not None:
                        done[block] = ds

        with ThreadPoolExecutor(len(self.programs), thread_name_prefix="gradjax") as pool:
            futures = [pool.submit(work, program) for program in self.programs]
            try:
                for future in as_completed(futures):
                    future.result()
            finally:
                # After a failure, or Ctrl-C, the others end after their chunk.
                stop.set()
        return done

    def _train(
        self, index: int, program: Program, meter: Meter, stop: threading.Event
    ) -> xr.Dataset | None:
        """Train one block to its end and return its dataset; None if stopped before."""
        train, members, block = self.experiment.train, self.members_of(index), self.restore(index)
        count = self.count_members(index)
        meter.skip(count * block.step)
        hparams = program.place({name: values[members] for name, values in self.hparams.items()})
        if block.state is None:
            state = program.start(program.place(self.keys[members]), hparams, program.data)
        else:
            state = program.place(block.state)
        path, saved = self.path("checkpoints", index), time.monotonic()
        with checkpoint.Writer(path) if path else contextlib.nullcontext() as writer:
            while not self._has_ended(block.step, state):
                if stop.is_set():
                    return None
                left = train.num_steps - block.step
                chunk = program.chunk if left >= train.eval_every else program.tail
                state, record = chunk(state, hparams, program.data)
                taken = min(train.eval_every, left)
                block.step += taken
                block.record = _join(block.record, jax.tree.map(np.asarray, record))
                meter.advance((self.number, index), count, taken, block.record)
                due = time.monotonic() - saved >= train.checkpoint_seconds
                if self._has_ended(block.step, state):
                    due = self.keep_states
                if writer and due:
                    saved = time.monotonic()
                    tree = {"state": state, "record": block.record}
                    writer.save(block.step, tree, self.identity())
        scores = program.test(state, hparams, program.data)
        ds = _dataset(state, scores, block.record, self.experiment)
        if shard := self.path("shards", index):
            shard.parent.mkdir(parents=True, exist_ok=True)
            files.save(ds, shard)
            if path and not self.keep_states:
                checkpoint.remove(path)
        return ds

    def _has_ended(self, step: int, state: State) -> bool:
        """Whether all steps are taken, or (with `train.stop_at_target`) every member is frozen."""
        train = self.experiment.train
        stopped = (np.asarray(state.stopped_at) >= 0) | (np.asarray(training.frozen_at(state)) >= 0)
        return step >= train.num_steps or (train.stop_at_target and bool(stopped.all()))


def compile_cell(
    number: int,
    experiment: Experiment,
    settings: grid.Grid,
    data: Splits,
    compiler: Compiler,
    folder: Path | None = None,
    keep_states: bool = False,
) -> Cell:
    """Compile a static setting; a folder that was begun with some number of lanes keeps it."""
    seeds, hparams = settings.members()
    # Seed i is the network that `diagnose` measures.
    model_key = jax.random.split(jax.random.key(experiment.seed))[1]
    keys = jax.vmap(lambda i: jax.random.fold_in(model_key, i))(jnp.asarray(seeds))
    problem = training.problem_of(experiment, data)
    note = folder and folder / f"lanes-{number:03d}.json"
    if note and note.exists() and not experiment.train.lanes:
        lanes = {"train.lanes": json.loads(note.read_text())}
        problem = dataclasses.replace(problem, experiment=config.replace(experiment, lanes))
    programs, plan = fit(problem, sorted(hparams), data, settings.num_members, compiler)
    if note and jax.process_index() == 0:
        files.write_text(note, json.dumps(plan.lanes))
    return Cell(number, programs, plan, experiment, keys, hparams, folder, keep_states)


def run_cell(cell: Cell, meter: Meter) -> list[xr.Dataset]:
    """The datasets of all blocks in order: this process computes its own and reads the others."""
    mine = range(cell.plan.blocks)
    if cell.experiment.train.shard != BATCH:
        mine = mine[jax.process_index() :: jax.process_count()]
    done = {block: ds for block in mine if (ds := cell.finished(block)) is not None}
    meter.start()
    meter.skip(sum(map(cell.count_members, done)) * cell.experiment.train.num_steps)
    done |= cell.run([block for block in mine if block not in done], meter)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"cell {cell.number}")
        others = [block for block in range(cell.plan.blocks) if block not in done]
        done |= {
            block: files.load(path) for block in others if (path := cell.path("shards", block))
        }
    return [done[block] for block in range(cell.plan.blocks)]


def check_identity(meta: Mapping[str, Any], mine: Mapping[str, Any], where: str) -> None:
    """Reject a checkpoint of other settings.

    Raises:
      ConfigError: the message names the fields that differ.
    """
    differ = grid.differences(config.from_dict(meta["config"]), config.from_dict(mine["config"]))
    for name, words in (("lanes", "lane width"), ("values", "swept values")):
        if meta[name] != mine[name]:
            differ.append(f"{words}: {meta[name]} and {mine[name]}")
    if differ:
        raise ConfigError(
            f"sweep: {where} was written with other settings (there and here): {'; '.join(differ)}"
        )


def _join(record: Record | None, new: Record) -> Record:
    """Append a chunk along the axis of steps, or of evaluations."""
    validation, signals = jax.tree.map(lambda x: x[:, None], (new.validation, new.signals))
    new = new._replace(validation=validation, signals=signals)
    if record is None:
        return new
    before, after = record._replace(frozen=()), new._replace(frozen=())
    joined = jax.tree.map(lambda a, b: np.concatenate([a, b], 1), before, after)
    return joined._replace(frozen=new.frozen)


def _dataset(
    state: State, scores: training.Scores, record: Record, experiment: Experiment
) -> xr.Dataset:
    """The measurements of one block, along `lane`."""
    train = experiment.train
    steps, evaluations = record.loss.shape[1], record.validation.loss.shape[1]
    ends = np.minimum(train.eval_every * np.arange(1, evaluations + 1), train.num_steps)
    broken = {name: np.asarray(value) for name, value in training.divergence(state).items()}
    params, signals = state.variables["params"], record.signals
    leaves = [leaf_name(params, int(i)) for i in broken["diverged_leaf"]]
    causes = [CAUSES[int(i)] for i in broken["diverged_cause"]]
    layer = [f"hidden_{i + 1}" for i in range(signals.log_activation_rms.shape[-1] - 2)]
    reached = record.validation.score >= train.target
    trained = reached.any(1)
    lane, step, each = ("lane",), ("lane", "step"), ("lane", "evaluation")
    return xr.Dataset(
        {
            "loss": (step, record.loss),
            "score": (step, record.score),
            "log_gradient_norm": (step, record.log_gradient_norm),
            "clipped": (step, record.clipped),
            "validation_loss": (each, record.validation.loss),
            "validation_score": (each, record.validation.score),
            "layer_log_activation_rms": ((*each, "layer"), signals.log_activation_rms[..., 1:-1]),
            "layer_log_cotangent_rms": ((*each, "layer"), signals.log_cotangent_rms[..., 1:-1]),
            "layer_log_gradient_norm": ((*each, "layer"), signals.log_gradient_norm[..., :-1]),
            "final_loss": (lane, record.validation.loss[:, -1]),
            "final_score": (lane, record.validation.score[:, -1]),
            "test_loss": (lane, np.asarray(scores.loss)),
            "test_score": (lane, np.asarray(scores.score)),
            "trained": (lane, trained),
            "trained_at": (lane, np.where(trained, ends[reached.argmax(1)], -1)),
            "diverged_at": (lane, broken["diverged_at"]),
            "diverged_leaf": (lane, np.array(leaves, dtype=str)),
            "diverged_cause": (lane, np.array(causes, dtype=str)),
        },
        coords={"step": np.arange(steps), "evaluation": ends, "layer": layer},
    )


def unfold(blocks: list[xr.Dataset], cell: Cell, settings: grid.Grid) -> xr.Dataset:
    """The blocks of a cell in order, with the dimensions of the sweep in place of `lane`."""
    ds = xr.concat(blocks, "lane", join="outer").isel(lane=slice(cell.plan.members))
    shape = [len(values) for values in settings.dims.values()]
    variables = {
        str(name): ((*settings.dims, *x.dims[1:]), x.values.reshape(*shape, *x.shape[1:]))
        for name, x in ds.items()
    }
    drawn = {name: (settings.along[name], values) for name, values in settings.drawn.items()}
    return xr.Dataset(variables, coords={**ds.coords, **settings.dims, **drawn})
