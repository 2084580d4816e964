"""What five popular articles say about exploding and vanishing gradients, tested by experiment.

    python scripts/articles.py --list
    python scripts/articles.py
    python scripts/articles.py sigmoid_vanishes adam_beats_others --seeds 16 --json

Two kinds of numbers are measured, over seeds. *At the start*: how much the gradient of the loss
grows on its way back, in nats per layer (or time step) between the last state and the first; times
the layers in between, more than 6 nats (a factor of 400) explode and less than -6 vanish, as for
`gradjax diagnose`. *In training*: the fraction of seeds whose validation accuracy reaches 90%, and
the test accuracy after the last step; every contestant has its own grid of learning rates and is
judged at the best of them by validation, because at one rate for all the comparison would be of
rates. A difference counts if the 95% interval of the paired difference over seeds excludes 0.

A verdict is computed from these numbers: confirmed, refuted, or conditional if the sentence holds
only in some cases; the docstring of each judge in `article_claims.py` states the rule. The exit
status is 0 whatever the verdicts are.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Before NumPy is imported: more threads stall on small matrices.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import reporting
from article_claims import CLAIMS
from article_numbers import CONDITIONAL, CONFIRMED, REFUTED, SMALL, Run, Size, Verdict

import gradjax
from gradjax.experiment import config, models, sweep, tasks, training
from gradjax.experiment.program import rule_for_workers
from gradjax.experiment.schema import Experiment
from gradjax.report import files

# Measuring


def growth(
    experiments: Mapping[str, Experiment], seeds: int, say: Callable[[str], None]
) -> dict[str, np.ndarray]:
    """Nats per layer by which the gradient grows from the last hidden state to the first.

    On the first training batch of the digits or pixels; experiments that differ only in floats
    share a compiled program.

    Returns:
        label -> (seeds,).
    """
    groups = sweep.programs(experiments)

    def program(names: Sequence[str]) -> dict[str, np.ndarray]:
        own = experiments[names[0]]
        values = [config.flatten(experiments[name]) for name in names]
        columns = {key: [v[key] for v in values] for key in config.sweepable()}
        columns = {key: column for key, column in columns.items() if len(set(column)) > 1}
        task, data_key = own.task, jax.random.key(own.seed)
        train = tasks.load(
            task.name, data_key, normalize=task.normalize, seq_len=task.seq_len
        ).train
        x, y = train.x[: task.batch_size], train.y[: task.batch_size]
        num_outputs = int(train.y.max()) + 1

        def one(floats: Mapping[str, jax.Array], key: jax.Array) -> jax.Array:
            model = models.build(config.replace(own, floats).model, num_outputs)
            first, second = jax.random.split(key)
            variables = model.init({"params": first, "dropout": second}, x, train=True)
            h0, links = model.links(variables, x, second)

            def loss(logits):
                return training.loss_and_score(logits, y).loss

            back = gradjax.signals(links, h0, loss=loss).log_cotangent_rms[1:-1]
            return (back[0] - back[-1]) / (len(back) - 1)

        floats = {key: jnp.asarray(column, jnp.float32) for key, column in columns.items()}
        keys = jax.random.split(jax.random.key(own.seed + 1), seeds)
        run = jax.vmap(one, (None, 0))
        if floats:
            run = jax.vmap(run, (0, None))
        found = np.reshape(jax.jit(run)(floats, keys), (len(names), seeds))
        m = own.model
        network = f"{m.activation} {m.name}, {m.depth} x {m.width}"
        say(f"at the start: {network}, {len(names)} settings x {seeds} seeds")
        return dict(zip(names, np.asarray(found, float), strict=True))

    with ThreadPoolExecutor(rule_for_workers(Experiment())) as pool:
        parts = list(pool.map(program, groups))
    return {name: values for part in parts for name, values in part.items()}


def run_of(rate: float, ds: Any) -> Run:
    """What the verdicts need of a dataset of `gradjax.compare`."""
    steps = np.where(ds["trained_at"].values >= 0, ds["trained_at"].values, ds.sizes["step"])
    return Run(rate, ds["final_score"].values, ds["test_score"].values, ds["trained"].values, steps)


def check(names: Sequence[str], size: Size, report: reporting.Report) -> dict[str, Verdict]:
    """Measure and judge the claims of these names; equal experiments run once for all of them."""
    claims = {name: CLAIMS[name] for name in names}
    starts = {name: claim.starts(size) for name, claim in claims.items()}
    trainings = {name: claim.trainings(size) for name, claim in claims.items()}

    def unique(tables):
        different = dict.fromkeys(e for table in tables for e in table.values())
        return {str(i): e for i, e in enumerate(different)}

    at_start, trained = unique(starts.values()), unique(trainings.values())
    grown = growth(at_start, size.starts, report.line) if at_start else {}
    grown = {at_start[i]: values for i, values in grown.items()}
    found = gradjax.compare(trained, progress=report.event) if trained else {}
    found = {trained[i]: ds for i, ds in found.items()}
    verdicts = {}
    for name, claim in claims.items():
        numbers = {label: grown[e] for label, e in starts[name].items()} | claim.measure(size)
        runs: dict[str, list[Run]] = {}
        for (label, rate), e in trainings[name].items():
            runs.setdefault(label, []).append(run_of(rate, found[e]))
        verdicts[name] = claim.judge(size, numbers, runs)
        report.line(f"{name}: {verdicts[name].word}")
    return verdicts


# Text and figure


COLOURS = {CONFIRMED: "#009e73", REFUTED: "#d55e00", CONDITIONAL: "#0072b2"}


def figure(verdicts: Mapping[str, Verdict]) -> Any:
    """One panel per claim: its numbers with their intervals, the verdict above."""
    import textwrap

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    per_row = min(len(verdicts), 3)
    names = list(verdicts)
    lines = [names[i : i + per_row] for i in range(0, len(names), per_row)]
    heights = [0.21 * max(len(verdicts[n].rows) for n in line) + 0.9 for line in lines]
    style: Any = {"font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        fig = plt.figure(figsize=(5.2 * per_row, sum(heights)), layout="constrained")
        grid = fig.add_gridspec(len(lines), per_row, height_ratios=heights)
        for place, name in enumerate(names):
            v, ax = verdicts[name], fig.add_subplot(grid[place // per_row, place % per_row])
            colour, y = COLOURS[v.word], np.arange(len(v.rows))[::-1]
            value, low, high = (
                np.array([getattr(row, key) for row in v.rows]) for key in ("value", "low", "high")
            )
            spread = np.nan_to_num(np.clip([value - low, high - value], 0, None))
            ax.errorbar(value, y, xerr=spread, fmt="o", ms=4, lw=1.3, color=colour)
            ax.set_yticks(y, [row.label for row in v.rows])
            ax.set_ylim(-0.7, len(v.rows) - 0.3)
            ax.grid(axis="x", color="#e6e6e6")
            if v.quantity.startswith("nats"):
                ax.axvline(0, color="#767676", lw=0.8)
            elif v.quantity == "test accuracy":
                ax.axvline(0.9, color="#767676", lw=0.8, ls="--")
                ax.set_xlim(0, 1.02)
            else:
                ax.set_xlim(0, None)
            ax.xaxis.set_major_locator(MaxNLocator(5))
            ax.set_xlabel(v.quantity)
            says = "\n".join(textwrap.wrap(f"{CLAIMS[name].says}: {v.word}", 40))
            ax.set_title(says, loc="left", color=colour, fontsize=9.5, fontweight="bold")
    return fig


def print_report(verdicts: Mapping[str, Verdict]) -> None:
    """Every claim with its verdict, why, and its numbers; the verdicts once more at the end."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table(title="The articles' claims", title_justify="left")
    for heading in ("claim", "name", "verdict"):
        table.add_column(heading)
    for name, v in verdicts.items():
        word = Text(v.word, style=f"bold {COLOURS[v.word]}")
        table.add_row(CLAIMS[name].says, name, word)
        console.print(Text.assemble("\n", word, f"  {CLAIMS[name].says} ({name})"))
        console.print(v.because, markup=False)
        longest = max(len(row.label) for row in v.rows)
        console.print(f"  {'':{longest}}  {v.quantity}, 95% interval over seeds", style="dim")
        for row in v.rows:
            console.print(f"  {row.label:{longest}}  {row.numbers}", markup=False)
    console.print()
    console.print(table)


def choose(names: Sequence[str]) -> list[str]:
    """The claims asked for; all of them if none is named."""
    for name in names:
        if name not in CLAIMS:
            raise ValueError(reporting.unknown("claim", name, CLAIMS))
    return list(dict.fromkeys(names)) or list(CLAIMS)


def size_of(small: bool, seeds: int | None) -> Size:
    """The size of the experiments; four times as many starts as trainings."""
    size = SMALL if small else Size()
    if seeds is None:
        return size
    if seeds < 2:
        raise ValueError(f"--seeds is {seeds}; an interval needs at least 2.")
    return size._replace(seeds=seeds, starts=4 * seeds)


def record(name: str, verdict: Verdict) -> dict[str, Any]:
    """A verdict for the JSON."""
    rows = [row._asdict() for row in verdict.rows]
    return {"says": CLAIMS[name].says} | verdict._asdict() | {"rows": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = reporting.parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="CLAIM", help="claims; default: all")
    parser.add_argument("--list", action="store_true", help="list the claims and stop")
    parser.add_argument(
        "--seeds", type=int, help="trainings per setting (default 8); four times as many starts"
    )
    parser.add_argument(
        "--small", action="store_true", help="the tests' sizes: seconds, and meaningless verdicts"
    )
    args = parser.parse_args(arguments)
    try:
        names, size = choose(args.names), size_of(args.small, args.seeds)
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        for name in names:
            print(f"{name:22} {CLAIMS[name].says}")
        return 0

    began = time.perf_counter()
    with reporting.progress_bar() as report:
        verdicts = check(names, size, report)
    folder = files.run_folder(args.output, "articles")
    summary = {
        "claims": {name: record(name, verdict) for name, verdict in verdicts.items()},
        "size": size._asdict(),
    }
    summary = reporting.save(folder, "articles", summary, began, figure(verdicts))
    if args.json:
        print(files.dumps(summary))
        return 0
    print_report(verdicts)
    words = [v.word for v in verdicts.values()]
    count = ", ".join(f"{words.count(word)} {word}" for word in COLOURS)
    print(
        f"{len(verdicts)} claims: {count}; {summary['seconds']:.0f} s; "
        f"figure and numbers in {folder}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
