"""What following a training costs: a loop of jitted steps with `watch` and `Monitor`, or without.

    python benchmarks/bench_watch.py [--quick] [--json] [--write] [--rounds N]

Models: a 20 x 128 MLP (of twenty layers, 42 leaves; and scanned, 4 leaves), LeNet-5 and a two-block
transformer, Adam, float32, buffers donated. The loop is a user's, in Python: one call per step, and
the monitor has every step in its history. All variants run in one process, interleaved in random
order, each round from the same first state (a training that goes on would measure gradients that
vanish); every ratio is of two times of one round. Other work on the machine counts: what is added
can then not run beside the step, so the load stands with the figures, and the processor time too.
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
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
from rich.console import Console
from rich.table import Table

from gradjax.monitor.monitor import Monitor
from gradjax.transforms import watch

GOAL = 1.05
STACKED = lambda path: "layers" in path


def unrolled_mlp(key, depth=20):
    """The layers of `bench_transforms.mlp` as leaves of their own."""
    params, _, (x, labels) = bt.mlp(key, depth)
    layers = params.pop("layers")
    params |= {f"layer{i}": jax.tree.map(lambda w, i=i: w[i], layers) for i in range(depth)}

    def loss(params, data):
        x, labels = data
        h = jax.nn.relu(x @ params["in"])
        for i in range(depth):
            h = jax.nn.relu(h @ params[f"layer{i}"]["w"] + params[f"layer{i}"]["b"])
        return bt.cross_entropy(h @ params["out"], labels)

    return params, loss, (x, labels)


MODELS = {
    "MLP 20x128": (unrolled_mlp, 20),
    "MLP 20x128, scanned": (bt.mlp, 20),
    "LeNet-5": (bt.lenet5, 10),
    "transformer": (bt.transformer, 5),
}  # steps per round
VARIANTS = {  # name -> (watched every, looked at every; None for not at all)
    "none": (None, None),
    "watch": (1, None),
    "watch + Monitor": (1, 8),
    "watch + Monitor(every=1)": (1, 1),
    "watch(every=10) + Monitor": (10, 8),
}
OF_THE_GOAL = "watch + Monitor"


def loop(tx, loss, look):
    """(params, opt_state, data, steps, monitor) -> None: so many jitted steps, monitored."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, opt_state, data):
        value, grads = jax.value_and_grad(loss)(params, data)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    def run(params, opt_state, data, steps, monitor):
        for _ in range(steps):
            params, opt_state, value = train_step(params, opt_state, data)
            if monitor is not None:
                monitor.update(opt_state, value)
        jax.block_until_ready((params, opt_state))

    return run


def measure(model, rounds, rng):
    """name -> (wall times, processor times), one of each per round and step."""
    make, steps = MODELS[model]
    params, loss, data = make(jax.random.key(0))
    calls = {}
    for name, (every, look) in VARIANTS.items():
        tx = optax.adam(1e-4) if every is None else watch(optax.adam(1e-4), STACKED, every)
        monitor = (
            None if look is None else Monitor("runs/bench_watch", every=look, on_warning=print)
        )
        calls[name] = (loop(tx, loss, look), jax.jit(tx.init)(params), monitor)
    times = {name: ([], []) for name in calls}
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    for k in range(rounds + 1):
        for name in rng.permutation(list(calls)):
            run, state, monitor = calls[name]
            start = jax.block_until_ready(copy((params, state)))
            wall, cpu = time.perf_counter(), time.process_time()
            run(*start, data, steps, monitor)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if k:  # the first round compiles
                times[name][0].append(wall / steps)
                times[name][1].append(cpu / steps)
    return times


def rows(times):
    found = []
    for name in VARIANTS:
        row = {"variant": name, "ms_per_step": 1e3 * statistics.median(times[name][0])}
        over = [report.ratio(*pair) for pair in zip(times[name], times["none"], strict=True)]
        row |= {"over_none": over[0], "processor_time_over_none": over[1]}
        is_goal = name == OF_THE_GOAL
        row |= {
            "goal": GOAL if is_goal else None,
            "reached": row["over_none"]["median"] <= GOAL if is_goal else None,
        }
        found.append(row)
    return found


def show(model, found, console):
    table = Table(title=f"{model}: time of a training step")
    for column in ("variant", "ms", "over none", "processor time over none", "goal"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in found:
        goal = ""
        if row["goal"] is not None:
            goal = f"{row['goal']}: " + ("[green]yes[/]" if row["reached"] else "[red]no[/]")
        cells = (report.text(row["over_none"]), report.text(row["processor_time_over_none"]), goal)
        table.add_row(row["variant"], f"{row['ms_per_step']:.2f}", *cells)
    console.print(table)


def write(result, about):
    """Put the tables between this benchmark's markers in RESULTS.md."""
    said = report.in_words(about)
    lines = [
        "## Watching a training\n",
        f"`python benchmarks/bench_watch.py`: {said}. A user's loop, buffers donated;",
    ]
    lines[-1] += " ratios of times of one round: median [quartiles].\n"
    for model, found in result.items():
        lines += [
            f"**{model}**\n",
            "| variant | ms | over none | processor time over none | goal |",
            "|---|---|---|---|---|",
        ]
        for row in found:
            goal = ""
            if row["goal"] is not None:
                goal = f"{row['goal']}: " + ("yes" if row["reached"] else "**no**")
            cells = (
                report.text(row["over_none"]),
                report.text(row["processor_time_over_none"]),
                goal,
            )
            lines.append(f"| {row['variant']} | {row['ms_per_step']:.2f} | {' | '.join(cells)} |")
        lines.append("")
    report.write("bench_watch", lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of tables"
    )
    parser.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    parser.add_argument("--rounds", type=int, default=0, help="rounds per model")
    parser.add_argument("--model", choices=MODELS, default=None)
    args = parser.parse_args()
    rounds = args.rounds or (15 if args.quick else 41)
    console, rng, result = Console(width=130), np.random.default_rng(0), {}
    for model in [args.model] if args.model else MODELS:
        result[model] = rows(measure(model, rounds, rng))
        if not args.json:
            show(model, result[model], console)
    about = report.machine(rounds=rounds, optax=optax.__version__)
    if args.json:
        print(json.dumps(about | {"models": result}, indent=1))
    if args.write:
        write(result, about)


if __name__ == "__main__":
    main()
