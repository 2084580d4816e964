"""One compiled program: many seeds of one static setting, laid out as blocks of lanes, one vmap per
block.

A worker is an accelerator, or a thread of a CPU (XLA runs two executions at a time on one CPU
device if two threads ask). The program of a block is that of one device everywhere: one partitioned
over devices differs in its last bits.
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
# Multiply-adds of one layer's product that keep a CPU core busy; below it lanes share the cost of
# starting it.
CPU_WORK = 8_000_000
MAX_CPU_LANES = 32
MEMORY_SHARE = 0.8  # of what is free


@dataclass(frozen=True)
class Plan:
    """How the members of one program are laid out."""

    members: int
    lanes: int  # members in one vmap
    workers: int  # blocks at a time
    memory: int  # bytes predicted by the compiled program's own analysis, all workers together
    notes: tuple[str, ...] = ()

    @property
    def blocks(self) -> int:
        """Blocks of the program."""
        return math.ceil(self.members / self.lanes)

    def __str__(self) -> str:
        text = f"{self.members} members in {self.blocks} blocks of {self.lanes} lanes, {self.workers} at a time"
        return "; ".join([f"{text}, {self.memory / 2**20:,.0f} MiB predicted", *self.notes])


def rule_for_workers(experiment: Experiment) -> int:
    """Blocks at a time: one per accelerator, per core of a CPU, and one alone where the batch is
    spread.
    """
    if experiment.train.shard == BATCH:
        return 1
    if jax.default_backend() == "cpu":
        return max(
            jax.local_device_count(),
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
        )
    return jax.local_device_count()


def rule_for_lanes(experiment: Experiment, members: int) -> int:
    """Members in one vmap: a worker's share of all on an accelerator, on a CPU what makes an
    operation worth starting.

    Measured on two cores (seeds x steps per second over PyTorch's): 784-256-10 is fastest at 1 lane, 20 x 128 at 4.
    """
    fraction = math.ceil(members / (rule_for_workers(experiment) * jax.process_count()))
    if jax.default_backend() != "cpu":
        return fraction
    if (
        experiment.model.name in CONVOLUTIONAL
    ):  # a seed costs 1.5 times as much among four (LeNet-5)
        return 1
    work = experiment.task.batch_size * experiment.model.width**2
    return max(1, min(fraction, MAX_CPU_LANES, CPU_WORK // work))


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
    """The compiled functions of one static setting on one device, for arrays with a leading axis of
    lanes.
    """

    start: Callable  # (keys, hparams, data) -> State
    chunk: Callable  # (State, hparams, data) -> (State, Record)
    tail: Callable  # the last chunk, which may be shorter
    test: Callable  # (State, hparams, data) -> Scores
    like: tuple[State, Record]  # shapes of a block's state and of the record of one chunk
    place: Callable  # a tree of host arrays -> on the device
    data: Splits  # on the device
    memory: int


class Compiler:
    """Compiles side by side (XLA does it without Python's lock); functions equal in every letter
    only once.
    """

    def __init__(self):
        self.pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="gradjax-compiler")
        self.lock, self.found = threading.Lock(), {}

    def __call__(self, lowered: Any, device: Any) -> Future:
        """The executable of a traced function for a device."""
        text = hashlib.sha256(lowered.as_text().encode()).digest()
        key = device, lowered.in_tree, lowered.out_tree, text
        with self.lock:
            if key not in self.found:
                self.found[key] = self.pool.submit(lowered.compile)
            return self.found[key]


def _alone(f: Callable) -> Callable:
    """`f` for one lane: what vmap gives, without an axis of 1 that keeps XLA from its best products
    of matrices.
    """

    def run(member: PyTree, hparams: PyTree, data: Splits) -> PyTree:
        member, hparams = jax.tree.map(lambda x: x[0], (member, hparams))
        return jax.tree.map(lambda x: x[None], f(member, hparams, data))

    return run


def _program(
    problem: Problem, names: list[str], data: Splits, lanes: int, device: Any, compiler: Compiler
) -> Program:
    """Trace and compile a program for blocks of `lanes` members."""
    train, where = problem.experiment.train, SingleDeviceSharding(device)
    if train.shard == BATCH:
        mesh = Mesh(np.array(jax.devices()), (BATCH,))
        where = NamedSharding(mesh, PartitionSpec())
        problem = dataclasses.replace(
            problem, batch_sharding=NamedSharding(mesh, PartitionSpec(BATCH))
        )

    def lowered(f: Callable, *args: PyTree, donate: tuple[int, ...] = ()) -> Any:
        vmapped = jax.vmap(f, in_axes=(0, 0, None)) if lanes > 1 else _alone(f)
        described = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), args
        )
        return jax.jit(vmapped, donate_argnums=donate, out_shardings=where).lower(*described)

    def chunk(num_steps: int) -> Any:
        run = lambda s, h, d: training.run_chunk(s, h, d, problem, num_steps)
        return lowered(run, state, hparams, data, donate=(0,))

    place = lambda tree: jax.tree.map(lambda x: jax.device_put(x, where), tree)
    data = place(data)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), lanes))
    hparams = {name: jax.ShapeDtypeStruct((lanes,), jnp.float32) for name in names}
    start = lowered(lambda k, h, d: training.init(k, h, d, problem), keys, hparams, data)
    state = start.out_info
    whole, last = min(train.eval_every, train.num_steps), train.num_steps % train.eval_every
    run = chunk(whole)
    tail = chunk(last) if last and whole < train.num_steps else None
    test = lowered(lambda s, h, d: training.evaluate(s, h, d.test, problem), state, hparams, data)
    record = run.out_info[1]
    waiting = [compiler(f, device) for f in (start, run, tail or run, test)]
    start, run, tail, test = (f.result() for f in waiting)
    sizes = run.memory_analysis()
    memory = sizes.temp_size_in_bytes + sizes.argument_size_in_bytes + sizes.output_size_in_bytes
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, record))
    return Program(start, run, tail, test, like, place, data, memory - sizes.alias_size_in_bytes)


def fit(
    problem: Problem, names: list[str], data: Splits, members: int, compiler: Compiler
) -> tuple[list[Program], Plan]:
    """A program per worker with the rule's lanes, halved until it fits into memory."""
    train, notes, cpu = problem.experiment.train, (), jax.default_backend() == "cpu"
    lanes = asked = min(train.lanes or rule_for_lanes(problem.experiment, members), members)
    while True:
        workers = min(rule_for_workers(problem.experiment), math.ceil(members / lanes))
        first = _program(problem, names, data, lanes, jax.local_devices()[0], compiler)
        memory = first.memory * (workers if cpu else 1)  # a CPU's workers share one memory
        if memory <= MEMORY_SHARE * free_memory() or lanes == 1:
            break
        lanes //= 2
        notes = (f"lanes halved from {asked} to {lanes}: {memory / 2**20:,.0f} MiB would not fit",)
    devices = jax.local_devices()[1:workers]
    with ThreadPoolExecutor(max(len(devices), 1)) as pool:
        more = list(
            pool.map(
                lambda device: _program(problem, names, data, lanes, device, compiler), devices
            )
        )
    programs = [first, *more]
    programs += [first] * (workers - len(programs))
    return programs, Plan(members, lanes, workers, first.memory * workers, notes)
