"""One compiled program: the members of one static setting in blocks of lanes, one vmap per block.

A lane is a vmapped member (XLA's word). A worker is an accelerator, or a thread of a CPU: XLA runs
two executions at a time on one CPU device if two threads ask for it. The program of a block is
always that of a single device, because one partitioned over devices differs in its last bits.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from gradjax.experiment import training
from gradjax.experiment.models import CONVOLUTIONAL
from gradjax.experiment.schema import Experiment
from gradjax.experiment.tasks import Splits
from gradjax.experiment.training import Problem, Record, State

PyTree = Any
BATCH = "batch"
# Multiply-adds in one layer's product that keep a CPU core busy. Smaller products are batched over
# lanes, which divides the cost of starting them.
CPU_WORK = 8_000_000
MAX_CPU_LANES = 32
# Fraction of the free memory that a program may take.
MEMORY_FRACTION = 0.8


@dataclass(frozen=True)
class Plan:
    """How the members of one program are laid out.

    Attributes:
      members: settings times seeds.
      lanes: members in one vmap.
      workers: blocks at a time.
      memory: bytes of all workers together, predicted by XLA's analysis of the program.
      notes: what the user should know about the layout.
    """

    members: int
    lanes: int
    workers: int
    memory: int
    notes: tuple[str, ...] = ()

    @property
    def blocks(self) -> int:
        """Blocks of the program."""
        return math.ceil(self.members / self.lanes)

    def __str__(self) -> str:
        text = (
            f"{self.members} members in {self.blocks} blocks of {self.lanes} lanes, "
            f"{self.workers} at a time, {self.memory / 2**20:,.0f} MiB predicted"
        )
        return "; ".join([text, *self.notes])


def rule_for_workers(experiment: Experiment) -> int:
    """Blocks at a time: one per accelerator or CPU core; one in all if the batch is distributed."""
    if experiment.train.shard == BATCH:
        return 1
    devices = jax.local_device_count()
    if jax.default_backend() != "cpu":
        return devices
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return max(devices, cores)


def rule_for_lanes(experiment: Experiment, members: int) -> int:
    """Members in one vmap.

    On an accelerator they are divided evenly among the workers. On a CPU there are as many as make
    an operation worth starting: measured on two cores (seeds x steps per second over PyTorch's),
    784-256-10 is fastest with 1 lane, 20 layers of 128 with 4.
    """
    per_worker = math.ceil(members / (rule_for_workers(experiment) * jax.process_count()))
    if jax.default_backend() != "cpu":
        return per_worker
    if experiment.model.name in CONVOLUTIONAL:
        # In a vmap of four, LeNet-5 costs 1.5 times as much per seed.
        return 1
    work = experiment.task.batch_size * experiment.model.width**2
    return max(1, min(per_worker, MAX_CPU_LANES, CPU_WORK // work))


def free_memory() -> int:
    """Bytes that a program may still take on a device of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    with contextlib.suppress(OSError):  # Linux: what programs may take, page cache included
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Program(NamedTuple):
    """The compiled functions of one static setting on one device, over a leading axis of lanes.

    Attributes:
      start: (keys, hparams, data) -> State.
      chunk: (State, hparams, data) -> (State, Record).
      tail: the last chunk, which may be shorter.
      test: (State, hparams, data) -> Scores.
      like: shapes of a block's state and of the record of one chunk.
      place: puts a tree of host arrays on the device.
      data: the splits, on the device.
      memory: bytes predicted for one block.
    """

    start: Callable
    chunk: Callable
    tail: Callable
    test: Callable
    like: tuple[State, Record]
    place: Callable
    data: Splits
    memory: int


class Compiler:
    """Compiles in parallel (XLA releases Python's lock), and equal functions only once."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="gradjax-compiler")
        self.lock, self.found = threading.Lock(), {}

    def __call__(self, lowered: jax.stages.Lowered, device: Any) -> Future:
        """The executable of a traced function on a device."""
        text = hashlib.sha256(lowered.as_text().encode()).digest()
        key = device, lowered.in_tree, lowered.out_tree, text
        with self.lock:
            if key not in self.found:
                self.found[key] = self.pool.submit(lowered.compile)
            return self.found[key]


def _one_lane(f: Callable) -> Callable:
    """What vmap gives for one lane; without its axis of 1 XLA multiplies matrices faster."""

    def run(member: PyTree, hparams: PyTree, data: Splits) -> PyTree:
        member, hparams = jax.tree.map(lambda x: x[0], (member, hparams))
        return jax.tree.map(lambda x: x[None], f(member, hparams, data))

    return run


def _program(
    problem: Problem,
    names: list[str],
    data: Splits,
    lanes: int,
    device: Any,
    compiler: Compiler,
) -> Program:
    """Trace and compile a program for blocks of `lanes` members."""
    train, where = problem.experiment.train, SingleDeviceSharding(device)
    if train.shard == BATCH:
        mesh = Mesh(np.array(jax.devices()), (BATCH,))
        where = NamedSharding(mesh, PartitionSpec())
        spread = NamedSharding(mesh, PartitionSpec(BATCH))
        problem = dataclasses.replace(problem, batch_sharding=spread)

    def place(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jax.device_put(x, where), tree)

    def lower(f: Callable, *args: PyTree, donate: tuple[int, ...] = ()) -> jax.stages.Lowered:
        vmapped = jax.vmap(f, in_axes=(0, 0, None)) if lanes > 1 else _one_lane(f)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), args
        )
        return jax.jit(vmapped, donate_argnums=donate, out_shardings=where).lower(*shapes)

    def lower_chunk(num_steps: int) -> jax.stages.Lowered:
        def run(state, hparams, data):
            return training.run_chunk(state, hparams, data, problem, num_steps)

        return lower(run, state, hparams, data, donate=(0,))

    data = place(data)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), lanes))
    hparams = {name: jax.ShapeDtypeStruct((lanes,), jnp.float32) for name in names}
    start = lower(lambda k, h, d: training.init(k, h, d, problem), keys, hparams, data)
    state = start.out_info
    whole, last = min(train.eval_every, train.num_steps), train.num_steps % train.eval_every
    chunk = lower_chunk(whole)
    tail = lower_chunk(last) if last and whole < train.num_steps else chunk
    test = lower(lambda s, h, d: training.evaluate(s, h, d.test, problem), state, hparams, data)
    shapes = (state, chunk.out_info[1])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)
    waiting = [compiler(lowered, device) for lowered in (start, chunk, tail, test)]
    start, chunk, tail, test = (future.result() for future in waiting)
    sizes = chunk.memory_analysis()
    memory = sizes.temp_size_in_bytes + sizes.argument_size_in_bytes + sizes.output_size_in_bytes
    # Donated arguments are counted among the outputs as well.
    memory -= sizes.alias_size_in_bytes
    return Program(start, chunk, tail, test, like, place, data, memory)


def fit(
    problem: Problem, names: list[str], data: Splits, members: int, compiler: Compiler
) -> tuple[list[Program], Plan]:
    """A program per worker, with the lanes of `rule_for_lanes`, halved until it fits in memory."""
    train, notes = problem.experiment.train, ()
    lanes = asked = min(train.lanes or rule_for_lanes(problem.experiment, members), members)
    while True:
        workers = min(rule_for_workers(problem.experiment), math.ceil(members / lanes))
        first = _program(problem, names, data, lanes, jax.local_devices()[0], compiler)
        memory = first.memory
        if jax.default_backend() == "cpu":
            # The workers of a CPU have one memory between them.
            memory *= workers
        if memory <= MEMORY_FRACTION * free_memory() or lanes == 1:
            break
        lanes //= 2
        notes = (f"lanes halved from {asked} to {lanes}: {memory / 2**20:,.0f} MiB would not fit",)

    def compile_for(device: Any) -> Program:
        return _program(problem, names, data, lanes, device, compiler)

    devices = jax.local_devices()[1:workers]
    with ThreadPoolExecutor(max(len(devices), 1)) as pool:
        programs = [first, *pool.map(compile_for, devices)]
    programs += [first] * (workers - len(programs))
    return programs, Plan(members, lanes, workers, first.memory * workers, notes)
