"""Nine optimisers on one exploding network, with and without clipping: which of them train it?

    python scripts/optimizers.py
    python scripts/optimizers.py configs/chaotic_tanh_mlp.toml adam sgd --seeds 16 --target 0.8

The network is that of a config (default: 20 ReLU layers at 1.41 times He's scale, whose gradient
grows by a factor of 700 on its way back). Every optimiser is trained at learning rates of its own,
with clip_by_global_norm at `--max-norm` and without, over the same seeds and batches, and judged at
the rate that is best by validation (an interval is that of one rate, not of the best of five); a
rate printed with `*` is at the end of its grid. "Without" means a threshold that no norm reaches,
so that both share a compiled program: one per optimiser.

L-BFGS measures secant pairs of one loss, so it takes the whole training split at every step and a
tenth of the steps (each is 20 batches, times up to 20 evaluations of its line search); its
direction is clipped, not its gradient. Coordinate descent moves one layer at a time, in turn.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Before NumPy is imported: more threads stall on small matrices.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import reporting
import xarray as xr

import gradjax
from gradjax.experiment import config
from gradjax.experiment.schema import Experiment
from gradjax.report import files

NO_LIMIT = 1e38  # a threshold that no norm reaches
KINDS = {"without": NO_LIMIT, "with clipping": None}

# name -> learning rates without and with clipping: five around what was best in trials on the
# default network
RATES: dict[str, tuple[Sequence[float], Sequence[float]]] = {
    "sgd": ((1e-6, 1e-5, 1e-4, 3e-4, 1e-3), (0.01, 0.03, 0.1, 0.3, 1.0)),
    "momentum": ((1e-7, 1e-6, 1e-5, 1e-4, 3e-4), (0.003, 0.01, 0.03, 0.1, 0.3)),
    "rmsprop": ((1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
    "adagrad": ((1e-3, 3e-3, 1e-2, 3e-2, 0.1), (1e-3, 3e-3, 1e-2, 3e-2, 0.1)),
    "adadelta": ((0.3, 1.0, 3.0, 10.0, 30.0), (0.3, 1.0, 3.0, 10.0, 30.0)),
    "adam": ((3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "nadam": ((3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "lbfgs": ((0.1, 1.0, 10.0), (0.1, 1.0, 10.0)),  # its line search has the last word
    "coordinate": ((1e-5, 1e-4, 1e-3, 1e-2, 0.1), (0.03, 0.1, 0.3, 1.0, 3.0)),
}
TITLES = {
    "sgd": "SGD",
    "momentum": "momentum",
    "rmsprop": "RMSprop",
    "adagrad": "AdaGrad",
    "adadelta": "AdaDelta",
    "adam": "Adam",
    "nadam": "Nadam",
    "lbfgs": "L-BFGS",
    "coordinate": "coordinate descent",
}


class Result(NamedTuple):
    """An optimiser with or without clipping, at its best rate."""

    name: str
    kind: str
    rate: float
    at_end: bool  # of its grid
    ds: xr.Dataset  # as `gradjax.compare` returns it

    @property
    def fraction(self) -> reporting.Row:
        """Of the seeds that reach the target."""
        return reporting.fraction(self.label, self.ds["trained"].values)

    @property
    def test(self) -> reporting.Row:
        """Mean test accuracy after the last step."""
        return reporting.mean(self.label, self.ds["test_score"].values)

    @property
    def label(self) -> str:
        """Name and kind."""
        return f"{TITLES[self.name]}, {self.kind}"

    @property
    def lost(self) -> int:
        """Seeds that diverged."""
        return int((self.ds["diverged_at"].values >= 0).sum())


def experiments(
    base: Experiment, names: Sequence[str], max_norm: float
) -> dict[tuple[str, str, float], Experiment]:
    """(optimiser, kind, rate) -> experiment."""
    found = {}
    for name in names:
        values: dict[str, Any] = {
            "optimizer.name": name,
            "optimizer.clipping": "clip_by_global_norm",
        }
        values |= {"optimizer.momentum": None, "optimizer.b2": None}  # each its own
        if name == "lbfgs":
            steps = max(base.train.num_steps // 10, 1)
            values |= {
                "train.full_batch": True,
                "train.num_steps": steps,
                "train.eval_every": max(steps // 15, 1),
            }
        for (kind, limit), rates in zip(KINDS.items(), RATES[name], strict=True):
            for rate in rates:
                more = {"optimizer.max_norm": limit or max_norm, "optimizer.learning_rate": rate}
                found[name, kind, rate] = config.replace(base, values | more)
    return found


def at_best(found: Mapping[tuple[str, str, float], xr.Dataset]) -> list[Result]:
    """One result per optimiser and kind, best first.

    At the rate with the largest fraction of trained seeds, then the best validation score.
    """
    groups: dict[tuple[str, str], dict[float, xr.Dataset]] = {}
    for (name, kind, rate), ds in found.items():
        groups.setdefault((name, kind), {})[rate] = ds
    chosen = []
    for (name, kind), runs in groups.items():
        scores = {
            rate: (float(ds["trained"].mean()), float(ds["final_score"].mean()))
            for rate, ds in runs.items()
        }
        rate = max(scores, key=lambda rate: scores[rate])
        chosen.append(Result(name, kind, rate, rate in (min(runs), max(runs)), runs[rate]))
    return sorted(chosen, key=lambda r: (-r.fraction.value, -r.test.value))


def print_table(found: Sequence[Result]) -> None:
    """Best first."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="Optimisers at their best rates, best first",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        padding=(0, 1),
        pad_edge=False,
    )
    for heading in ("optimiser", "clipping"):
        table.add_column(heading, no_wrap=True)
    for heading in ("rate", "trained", "95% interval", "test accuracy", "steps", "lost"):
        table.add_column(heading, justify="right", no_wrap=True)
    for r in found:
        fraction, test, at = r.fraction, r.test, r.ds["trained_at"].values
        table.add_row(
            TITLES[r.name],
            "no" if r.kind == "without" else "yes",
            f"{r.rate:g}" + "*" * r.at_end,
            f"{int(r.ds['trained'].sum())}/{r.ds.sizes['seed']}",
            f"{fraction.low:.0%} to {fraction.high:.0%}",
            f"{test.value:.3f} ± {test.high - test.value:.3f}",
            f"{np.median(at[at >= 0]):.0f}" if (at >= 0).any() else "-",
            str(r.lost),
        )
    Console().print(table)


PAIR = {"without": "#d55e00", "with clipping": "#0072b2"}


def figure(found: Sequence[Result], target: float, title: str) -> Any:
    """Fractions with Wilson's intervals on the left; a panel of learning curves per optimiser."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(r.name for r in found))
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    style: Any = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
    }
    with plt.rc_context(style | {"grid.color": "#e6e6e6", "legend.frameon": False}):
        fig = plt.figure(
            figsize=(4.4 + 2.3 * columns, max(4.2, 2.1 * lines + 0.6)), layout="constrained"
        )
        grid = fig.add_gridspec(lines, columns + 1, width_ratios=(1.7, *[1] * columns))
        _fractions(fig.add_subplot(grid[:, 0]), found, names, target)
        first = None
        for place, name in enumerate(names):
            line, column = divmod(place, columns)
            ax = fig.add_subplot(grid[line, column + 1], sharey=first)
            first = first or ax
            _curves(ax, [r for r in found if r.name == name], target)
            ax.set_title(TITLES[name], fontsize=9.5)
            ax.set_ylabel("validation accuracy" if column == 0 else "")
            ax.set_xlabel("step" if place + columns >= len(names) else "")
        fig.suptitle(title, fontsize=11)
    return fig


def _fractions(ax: Any, found: Sequence[Result], names: Sequence[str], target: float) -> None:
    for kind, colour in PAIR.items():
        shift = 0.17 if kind == "without" else -0.17
        for r in (r for r in found if r.kind == kind):
            y, row = len(names) - 1 - names.index(r.name) + shift, r.fraction
            spread = np.clip([[row.value - row.low], [row.high - row.value]], 0, None)
            ax.errorbar(row.value, y, xerr=spread, fmt="o", ms=5, lw=1.5, color=colour)
            ax.text(1.04, y, f"{r.test.value:.2f}", color=colour, va="center", fontsize=8.5)
    ax.set_yticks(range(len(names)), [TITLES[name] for name in names][::-1])
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.6, len(names) - 0.4), title=f"Seeds that reach {target:g}")
    ax.set_xlabel("fraction, 95% interval; right: test accuracy")
    ax.grid(axis="y", visible=False)
    for place in range(1, len(names)):
        ax.axhline(place - 0.5, color="#e6e6e6", lw=0.8)


def _curves(ax: Any, pair: Sequence[Result], target: float) -> None:
    """Median validation accuracy, and the band of all seeds."""
    for r in pair:
        values = r.ds["validation_score"].transpose("seed", ...).values
        steps, colour = r.ds["evaluation"].values, PAIR[r.kind]
        ax.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.18, lw=0)
        label = f"{r.kind}, {r.rate:g}"
        ax.plot(steps, np.median(values, 0), color=colour, lw=1.6, label=label)
    ax.axhline(target, color="#767676", lw=0.8, ls="--")
    ax.set_ylim(0, 1)
    ax.legend(fontsize=7.5, loc="upper left")


def record(result: Result) -> dict[str, Any]:
    """A result for the JSON."""
    return {
        "optimizer": result.name,
        "clipping": result.kind != "without",
        "rate": result.rate,
        "rate_at_end_of_grid": result.at_end,
        "trained": result.fraction._asdict(),
        "test": result.test._asdict(),
        "lost": result.lost,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = reporting.parser(__doc__)
    parser.add_argument(
        "config", nargs="?", default="configs/clip_threshold.toml", help="TOML file of the network"
    )
    parser.add_argument(
        "names", nargs="*", metavar="OPTIMISER", help=f"some of {', '.join(RATES)}; default: all"
    )
    parser.add_argument("--seeds", type=int, default=8, help="default 8")
    parser.add_argument("--steps", type=int, default=300, help="training steps; default 300")
    parser.add_argument(
        "--target", type=float, default=0.6, help="validation accuracy to reach; default 0.6"
    )
    parser.add_argument(
        "--max-norm", type=float, default=1.0, help="threshold of the clipping; default 1"
    )
    args = parser.parse_args(arguments)
    for name in args.names:
        if name not in RATES:
            parser.error(f"unknown optimiser {name!r}; allowed: {', '.join(RATES)}")
    try:
        values = {
            "train.num_seeds": args.seeds,
            "train.num_steps": args.steps,
            "train.target": args.target,
            "train.eval_every": max(args.steps // 15, 1),
        }
        base = config.replace(config.load(args.config), values)
        wanted = experiments(base, args.names or list(RATES), args.max_norm)
        for experiment in wanted.values():
            config.check(experiment)
    except config.ConfigError as error:
        parser.error(str(error))

    began = time.perf_counter()
    with reporting.progress_bar() as report:
        found = gradjax.compare({str(key): e for key, e in wanted.items()}, progress=report.event)
    best = at_best({key: found[str(key)] for key in wanted})
    m = base.model
    network = f"{m.depth} x {m.width} {m.activation}, sigma_w = {m.sigma_w:g}"
    drawn = figure(best, args.target, f"{network}: optimisers at their best learning rates")
    summary = {
        "results": [record(r) for r in best],
        "programs": len({ds.attrs["program"] for ds in found.values()}),
        "trainings": sum(ds.sizes["seed"] for ds in found.values()),
    }
    folder = files.run_folder(args.output, "optimizers")
    summary = reporting.save(folder, "optimizers", summary, began, drawn)
    files.write_text(folder / "config.toml", config.to_toml(base))
    if args.json:
        print(files.dumps(summary))
        return 0
    print_table(best)
    print(
        f"{summary['trainings']} trainings in {summary['programs']} compiled programs, "
        f"{summary['seconds']:.0f} s; * best rate at the end of its grid; "
        f"figure and numbers in {folder}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
