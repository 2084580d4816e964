"""Time of an epoch of LeNet-5 on MNIST's shapes: `gradjax.sweep`'s own program against PyTorch.

    python benchmarks/bench_lenet.py [--json] [--quick] [--write]

One seed of `configs/lenet5_mnist.toml` (its batch size, Adam, ReLU), all on the same cores, rounds
interleaved. Ours trains through the sweep's own program, with the guard against divergence and,
after the epoch, validation and signals per layer, which PyTorch's loop lacks; the first round
compiles and is not timed. A plain Optax loop on XLA's own convolutions and windowed maxima, as a
user of Flax writes it, is timed too. PyTorch's row needs it installed (`make bench`) and is
otherwise left out. The goal: at most 0.7 of PyTorch's time.
"""

import importlib.metadata
import os
import statistics
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import flax.linen as nn
import peers
import report

from gradjax.experiment import config

CONFIG = Path(__file__).parents[1] / "configs" / "lenet5_mnist.toml"
GOAL = 0.7  # of PyTorch's time


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


def torch_network():
    """LeNet-5 of PyTorch's layers, on flat images."""
    from torch import nn

    return nn.Sequential(
        *(nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def lines(out: dict, about: dict) -> list[str]:
    """The section of RESULTS.md."""

    def cells(name, seconds):
        over, goal = out["ours_over"].get(name), out["goals"].get(name)
        met = "" if goal is None else f"{goal}: {'yes' if over <= goal else '**no**'}"
        return name.replace("_", " "), str(seconds), "" if over is None else str(over), met

    said = (
        f"`python benchmarks/bench_lenet.py`: {report.in_words(about)}. Medians of rounds; ours "
        "includes validation, signals per layer and the divergence guard.\n"
    )
    rows = [cells(name, seconds) for name, seconds in out["seconds"].items()]
    columns = ("program", "s", "ours over it", "goal")
    return ["## LeNet-5: an epoch of MNIST\n", said, *report.table(columns, rows)]


def main() -> None:
    options = report.parser(__doc__, "a tenth of an epoch, one round").parse_args()
    examples, rounds = (5_700, 1) if options.quick else (57_000, 3)
    data, batch = peers.splits(examples), config.load(CONFIG).task.batch_size
    steps, out = examples // batch, {}
    values = {"train.num_steps": steps, "train.eval_every": steps}
    ours, _ = peers.sweep_program(config.replace(config.load(CONFIG), values), data)
    runs = {"ours": ours, "flax_loop": peers.optax_loop(Plain(), steps, batch, data)}
    try:
        runs["torch_loop"] = peers.torch_loop(torch_network, steps, batch, *peers.torch_data(data))
    except ImportError:
        out["note"] = "PyTorch is not installed: its row is left out"
    seconds = report.interleave(runs, rounds, measure=lambda run: run())
    over = {n: report.median_ratio(seconds["ours"], s) for n, s in seconds.items() if n != "ours"}
    out |= {
        "examples": examples,
        "batch": batch,
        "seconds": {name: round(statistics.median(each), 2) for name, each in seconds.items()},
        "ours_over": {name: round(value, 3) for name, value in over.items()},
        "goals": {"torch_loop": GOAL},
    }
    if options.write:
        peer = {"PyTorch": importlib.metadata.version("torch")} if "torch_loop" in runs else {}
        about = report.machine(examples=examples, batch=batch, rounds=rounds, **peer)
        report.write("bench_lenet", lines(out, about))
    report.show(out, options.json)


if __name__ == "__main__":
    main()
