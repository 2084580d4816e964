"""What a probe of 100 layers costs: its time and temporary memory over those of one gradient, and
compile times.

    python benchmarks/bench_taps.py [--quick] [--json] [--write]

A Linen MLP, 100 x 128, tanh, batch 128, unrolled and as `nn.scan`, float32. `probe` returns every
value and cotangent; `examination` is the program of `gradjax.diagnose`, which returns their
statistics and is compiled to compile fast. All programs run in one process, interleaved in random
order; every ratio is of two times of one round.
"""

import argparse
import functools
import json
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
from gradjax.diagnosis.evidence import Measurement

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
        body = lambda layer, h, _: (layer(h), None)
        stack = nn.scan(body, {"params": 0}, split_rngs={"params": True}, length=self.depth)
        return nn.Dense(10, name="readout")(stack(Layer(name="layers"), h, None)[0])


MODELS = {"unrolled": Unrolled, "nn.scan": Scanned}


def programs(make, depth):
    """name -> (lower(), arguments); the shapes are the same for all."""
    model, x = make(depth), jax.random.normal(jax.random.key(0), (BATCH, WIDTH))
    params, labels = jax.jit(model.init)(jax.random.key(1), x), jnp.arange(BATCH) % 10
    loss = lambda params, x, labels: bt.cross_entropy(model.apply(params, x), labels)
    args = (params, x, labels)

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
        row = {"program": name, "ms": 1e3 * statistics.median(clock[name]), "over_gradient": over}
        row |= {
            "processor_time_over_gradient": report.ratio(processor[name], processor["gradient"])
        }
        row |= {
            "trace_seconds": trace,
            "compile_seconds": compile_,
            "temporary_mib": temporary,
            "output_mib": output,
        }
        row |= {"goal": goal, "reached": None if goal is None else over["median"] <= goal}
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
    """Put the tables between this benchmark's markers in RESULTS.md, where other benchmarks have
    theirs.
    """
    said = report.in_words(about)
    lines = [
        "## Values and cotangents of every layer\n",
        f"`python benchmarks/bench_taps.py`: Linen MLP, {said}.",
    ]
    lines[-1] += (
        " Ratios of times of one round: median [quartiles]; a probe returns every value and cotangent.\n"
    )
    for model, found in result.items():
        lines += [f"**{model}**\n", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += [f"| {' | '.join(cells(row, 'yes', '**no**'))} |" for row in found] + [""]
    report.write("bench_taps", lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="20 layers, fewer rounds")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of tables"
    )
    parser.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    parser.add_argument("--rounds", type=int, default=0, help="rounds per model")
    args = parser.parse_args()
    depth, rounds = (20, args.rounds or 7) if args.quick else (100, args.rounds or 25)
    console, rng, result = Console(width=150), np.random.default_rng(0), {}
    for name, make in MODELS.items():
        result[name] = rows(*measure(make, depth, rounds, rng))
        if not args.json:
            show(name, result[name], console)
    about = report.machine(layers=f"{depth} x {WIDTH}", batch=BATCH, rounds=rounds)
    if args.json:
        print(json.dumps(about | {"models": result}, indent=1))
    if args.write:
        write(result, about)


if __name__ == "__main__":
    main()
