"""The cost of a probe of 100 layers: its time and memory over one gradient's, and compile times.

    python benchmarks/bench_taps.py [--quick] [--json] [--write]

A Linen MLP, 100 x 128, tanh, batch 128, unrolled and as `nn.scan`, float32. `probe` returns every
value and cotangent; `examination` is the program of `gradjax.diagnose`, which returns their
statistics and is compiled to compile fast. All programs run in one process, interleaved in random
order; every ratio is of two times of one round.
"""

import functools
import os
import statistics
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import bench_transforms as bt
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import report
from rich.console import Console
from rich.table import Table

from gradjax import probe
from gradjax.diagnosis.probing import Measurement

GOALS = {"probe": 3.0}
WIDTH, BATCH = 128, 128


class Layer(nn.Module):
    @nn.compact
    def __call__(self, h):
        return jnp.tanh(nn.Dense(WIDTH, name="dense")(h))


class Unrolled(nn.Module):
    depth: int

    @nn.compact
    def __call__(self, h):
        for i in range(self.depth):
            h = Layer(name=f"layers_{i}")(h)
        return nn.Dense(10, name="readout")(h)


class Scanned(nn.Module):
    depth: int

    @nn.compact
    def __call__(self, h):
        def body(layer, h, _):
            return layer(h), None

        stack = nn.scan(body, {"params": 0}, split_rngs={"params": True}, length=self.depth)
        return nn.Dense(10, name="readout")(stack(Layer(name="layers"), h, None)[0])


MODELS = {"unrolled": Unrolled, "nn.scan": Scanned}


def programs(make, depth):
    """name -> (lower(), arguments); the shapes are the same for all."""
    model, x = make(depth), jax.random.normal(jax.random.key(0), (BATCH, WIDTH))
    params, labels = jax.jit(model.init)(jax.random.key(1), x), jnp.arange(BATCH) % 10
    args = (params, x, labels)

    def loss(params, x, labels):
        return bt.cross_entropy(model.apply(params, x), labels)

    def examination():
        made = Measurement(loss, params, (x, labels))
        return made.program.lower(made.traced.leaves, False), (made.traced.leaves,)

    return {
        "gradient": lambda: (jax.jit(jax.value_and_grad(loss)).lower(*args), args),
        "probe": lambda: (jax.jit(functools.partial(probe, loss)).lower(*args), args),
        "examination": examination,
    }


def compiled(lower):
    """(call, seconds to trace and lower, seconds to compile, MiB of temporaries and of outputs)."""
    began = time.perf_counter()
    lowered, args = lower()
    traced = time.perf_counter()
    program = lowered.compile()
    done, memory = time.perf_counter(), program.memory_analysis()
    call = functools.partial(program, *args)
    jax.block_until_ready(call())
    mib = (memory.temp_size_in_bytes / 2**20, memory.output_size_in_bytes / 2**20)
    return call, traced - began, done - traced, *mib


def measure(make, depth, rounds, rng):
    """name -> what `compiled` returns, and (seconds, processor seconds) of every round."""
    ready = {name: compiled(lower) for name, lower in programs(make, depth).items()}
    times = {name: [] for name in ready}
    for _ in range(rounds):
        for name in rng.permutation(list(ready)):
            start, processor = time.perf_counter(), time.process_time()
            jax.block_until_ready(ready[name][0]())
            times[name].append((time.perf_counter() - start, time.process_time() - processor))
    return ready, times


def rows(ready, times):
    found = []
    for name, (_, trace, compile_, temporary, output) in ready.items():
        clock = {n: [t[0] for t in each] for n, each in times.items()}
        processor = {n: [t[1] for t in each] for n, each in times.items()}
        over, goal = report.ratio(clock[name], clock["gradient"]), GOALS.get(name)
        row = {
            "program": name,
            "ms": 1e3 * statistics.median(clock[name]),
            "over_gradient": over,
            "processor_time_over_gradient": report.ratio(processor[name], processor["gradient"]),
            "trace_seconds": trace,
            "compile_seconds": compile_,
            "temporary_mib": temporary,
            "output_mib": output,
            "goal": goal,
            "reached": None if goal is None else over["median"] <= goal,
        }
        found.append(row)
    return found


COLUMNS = (
    "program",
    "ms",
    "over a gradient",
    "processor time",
    "trace s",
    "compile s",
    "MiB: temporary + output",
    "goal",
)


def cells(row, yes, no):
    goal = "" if row["goal"] is None else f"{row['goal']}: {yes if row['reached'] else no}"
    memory = f"{row['temporary_mib']:.0f} + {row['output_mib']:.0f}"
    numbers = (f"{row['trace_seconds']:.2f}", f"{row['compile_seconds']:.2f}")
    ratios = (report.text(row["over_gradient"]), report.text(row["processor_time_over_gradient"]))
    return (row["program"], f"{row['ms']:.1f}", *ratios, *numbers, memory, goal)


def show(model, found, console):
    table = Table(title=f"{model}: one evaluation")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "program" else "right")
    for row in found:
        table.add_row(*cells(row, "[green]yes[/]", "[red]no[/]"))
    console.print(table)


def write(result, about):
    """The section of RESULTS.md."""
    lines = [
        "## Values and cotangents of every layer\n",
        f"`python benchmarks/bench_taps.py`: Linen MLP, {report.in_words(about)}. Ratios of times "
        "of one round: median [quartiles]; a probe returns every value and cotangent.\n",
    ]
    for model, found in result.items():
        rows = [cells(row, "yes", "**no**") for row in found]
        lines += [f"**{model}**\n", *report.table(COLUMNS, rows), ""]
    report.write("bench_taps", lines)


def main():
    parser = report.parser(__doc__, "20 layers, fewer rounds")
    parser.add_argument("--rounds", type=int, default=0, help="rounds per model")
    options = parser.parse_args()
    depth, default = (20, 7) if options.quick else (100, 25)
    rounds = options.rounds or default
    console, rng, result = Console(width=150), np.random.default_rng(0), {}
    for name, make in MODELS.items():
        result[name] = rows(*measure(make, depth, rounds, rng))
        if not options.json:
            show(name, result[name], console)
    about = report.machine(layers=f"{depth} x {WIDTH}", batch=BATCH, rounds=rounds)
    if options.json:
        report.show(about | {"models": result}, as_json=True)
    if options.write:
        write(result, about)


if __name__ == "__main__":
    main()
