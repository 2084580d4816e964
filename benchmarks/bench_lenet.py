"""Time of an epoch of LeNet-5 on MNIST's shapes: `gradjax.sweep`'s own program against PyTorch.

    python benchmarks/bench_lenet.py [--json] [--quick] [--write]

One seed of `configs/lenet5_mnist.toml` (its batch size, Adam, ReLU), all on the same cores, rounds
interleaved. Ours trains through the sweep's own program, with the guard against divergence and,
after the epoch, validation and signals per layer, which PyTorch's loop lacks; the first round
compiles and is not timed. Beside it a plain Optax loop on XLA's own convolutions and windowed
maxima, as a user of Flax writes it. PyTorch's row needs it installed (`make bench`) and is else
left out. The goal: at most 0.7 of PyTorch's time.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report

from gradjax.experiment import config, grid, sweep
from gradjax.experiment.program import Compiler
from gradjax.experiment.tasks import Split, Splits

CONFIG = Path(__file__).parents[1] / "configs" / "lenet5_mnist.toml"
GOAL = 0.7  # of PyTorch's time


def data(examples: int) -> Splits:
    """Numbers of MNIST's shape: what is in them changes no time."""
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.standard_normal((examples + 512, 784), np.float32))
    y = jnp.asarray(generator.integers(0, 10, examples + 512), jnp.int32)
    return Splits(
        *(
            Split(x[part], y[part])
            for part in (slice(examples), slice(-512, -256), slice(-256, None))
        )
    )


def ours(steps: int, splits: Splits):
    """A function that trains for an epoch and returns its seconds."""
    base = config.replace(
        config.load(CONFIG), {"train.num_steps": steps, "train.eval_every": steps}
    )
    cell = sweep._cell(0, base, grid.grid(base), splits, Compiler())

    def run() -> float:
        began = time.perf_counter()
        cell.run(range(cell.plan.blocks), lambda *event: None)
        return time.perf_counter() - began

    return run


class Plain(nn.Module):
    """LeNet-5 of Flax's own layers."""

    @nn.compact
    def __call__(self, x):
        """Logits of flat images."""
        h = x.reshape(-1, 28, 28, 1)
        h = nn.max_pool(nn.relu(nn.Conv(6, (5, 5))(h)), (2, 2), (2, 2))
        h = nn.max_pool(nn.relu(nn.Conv(16, (5, 5), padding="VALID")(h)), (2, 2), (2, 2))
        h = nn.relu(nn.Dense(120)(h.reshape(len(h), -1)))
        return nn.Dense(10)(nn.relu(nn.Dense(84)(h)))


def flax_loop(steps: int, batch: int, splits: Splits):
    """A plain loop: one jitted step, one batch from the host at a time."""
    model, tx = Plain(), optax.adam(1e-3)
    params = model.init(jax.random.key(0), splits.train.x[:2])
    x, y = np.asarray(splits.train.x), np.asarray(splits.train.y)

    @jax.jit
    def step(params, state, x, y):
        loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(
            model.apply(p, x), y
        ).mean()
        updates, state = tx.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    def run() -> float:
        now, state, order = params, tx.init(params), np.random.default_rng(0)
        began = time.perf_counter()
        for _ in range(steps):
            rows = order.integers(0, len(x), batch)
            now, state = step(now, state, x[rows], y[rows])
        jax.block_until_ready(now)
        return time.perf_counter() - began

    return run


def torch_loop(steps: int, batch: int, splits: Splits):
    """PyTorch eager."""
    import torch
    from torch import nn

    x, y = (
        torch.tensor(np.asarray(splits.train.x)),
        torch.tensor(np.asarray(splits.train.y), dtype=torch.long),
    )
    x = x.reshape(-1, 1, 28, 28)

    def run() -> float:
        model = nn.Sequential(
            *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
        )
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        began = time.perf_counter()
        for _ in range(steps):
            rows = torch.randint(0, len(x), (batch,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        return time.perf_counter() - began

    return run


def lines(out: dict, about: dict) -> list[str]:
    """The section of RESULTS.md."""
    said = f"`python benchmarks/bench_lenet.py`: {report.in_words(about)}. Medians of rounds; ours includes validation,"
    found = [
        "## LeNet-5: an epoch of MNIST\n",
        f"{said} signals per layer and the divergence guard.\n",
    ]
    found += ["| program | s | ours over it | goal |", "|---|---|---|---|"]
    for name, seconds in out["seconds"].items():
        over, goal = out["ours_over"].get(name), out["goals"].get(name)
        met = "" if goal is None else f"{goal}: {'yes' if over <= goal else '**no**'}"
        found.append(
            f"| {name.replace('_', ' ')} | {seconds} | {'' if over is None else over} | {met} |"
        )
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--quick", action="store_true", help="a tenth of an epoch, one round")
    parser.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    options = parser.parse_args()
    examples, rounds = (5_700, 1) if options.quick else (57_000, 3)
    splits = data(examples)
    batch = config.load(CONFIG).task.batch_size
    steps, out = examples // batch, {}
    peers = {"flax_loop": flax_loop(steps, batch, splits)}
    try:
        peers["torch_loop"] = torch_loop(steps, batch, splits)
    except ImportError:
        out["note"] = "PyTorch is not installed: its row is left out"
    runs = {"ours": ours(steps, splits), **peers}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            passed = run()
            if turn:
                seconds[name].append(passed)
    out |= {
        "examples": examples,
        "batch": batch,
        "seconds": {name: round(statistics.median(values), 2) for name, values in seconds.items()},
        "ours_over": {
            name: round(
                statistics.median(
                    a / b for a, b in zip(seconds["ours"], seconds[name], strict=True)
                ),
                3,
            )
            for name in peers
        },
        "goals": {"torch_loop": GOAL},
    }
    if options.write:
        peer = {"PyTorch": importlib.metadata.version("torch")} if "torch_loop" in peers else {}
        report.write(
            "bench_lenet",
            lines(out, report.machine(examples=examples, batch=batch, rounds=rounds, **peer)),
        )
    print(
        json.dumps(out, indent=2)
        if options.json
        else "\n".join(f"{k}: {v}" for k, v in out.items())
    )


if __name__ == "__main__":
    main()
