"""`find_cure`: diagnose a network, train it under every remedy that fits, rank them, diagnose the
winner.

The untreated network is trained beside the others, over the same seeds and batches; settings that
differ in floats alone share one compiled program (`gradjax.experiment.sweep.compare`). Remedies are
ranked by, in this order,

    1. the share of seeds that train (their validation score reached the config's target),
    2. the mean validation score after the last step,
    3. the stability of the gradient norm: the deviation of its logarithm along the last nine tenths of the steps,
    4. the seconds of a training step.

A lost seed's last score is that of its last good parameters, and its gradient norm has no
deviation: inf. With `train.stop_at_target` a seed's last step is the one at which it came to rest.
Intervals are Wilson's at 95% for shares, and Student's for the means of scores; they are those of
one remedy, not of the best of many. Where the best single remedy leaves more than a tenth of the
seeds untrained, the pairs of the best three are tried too.

The claim that a remedy cures rests on the same seeds before and after: `cured` is a share of 90% or
more from below 20%. The winner is the first of the ranking if more seeds train with it than
without, or their scores are higher beyond chance (Student's paired t, at 5% over the number of
remedies, Bonferroni); else there is none. Cost: one compilation per program and num_seeds trainings
per remedy.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
import xarray as xr

from gradjax.cure import remedies
from gradjax.cure.remedies import NotApplicable
from gradjax.diagnosis import words
from gradjax.diagnosis.verdict import Diagnosis, judge
from gradjax.experiment import config, measure, sweep
from gradjax.experiment.schema import ConfigError, Experiment
from gradjax.experiment.sweep import Progress
from gradjax.report import files

UNTREATED = "untreated"
HEALTHY_SHARE, SICK_SHARE = 0.9, 0.2
PAIRS_OF = 3


class Cure(NamedTuple):
    """What was wrong, what was tried, and what came of it."""

    verdict: Diagnosis  # of the network as it is
    ranking: list[dict[str, Any]]  # best first, `untreated` among them
    left_out: dict[str, str]  # remedy -> why it was not tried
    winner: str  # a remedy, or `untreated` where none is better
    after: Diagnosis | None  # of the winner
    results: xr.Dataset  # dimension `remedy`, and what `gradjax.sweep` returns along it
    programs: int  # compiled for training
    experiments: dict[str, Experiment]

    def __str__(self) -> str:
        return story(self)


def find_cure(
    experiment: Experiment,
    names: Sequence[str] | str = "fitting",
    *,
    pairs: bool = True,
    progress: Callable[[Progress], None] = lambda event: None,
) -> Cure:
    """Try remedies on the network of a config.

    A host-level function: it compiles and trains.

    Args:
      experiment: gives the network, the data, the training, the target and the seeds.
      names: "fitting" (those for what the diagnosis finds), "all", or one or more names of `gradjax.cure.remedies`, `a+b`
        for two.
      pairs: whether pairs of the best are tried where no single remedy is enough.
      progress: called as by `gradjax.sweep`.

    Raises:
      ConfigError: an unknown remedy, or a config that cannot run. A remedy that does not apply is
        left out instead.
    """
    config.check(experiment)
    if experiment.task.validation == 0:
        raise ConfigError(
            "cure: task.validation is 0, and remedies are ranked by validation scores; needed: above 0"
        )
    if isinstance(names, str) and names not in ("fitting", "all"):
        names = [names]
    if not isinstance(names, str):
        remedies.known(names)
    say = lambda message: progress(Progress(message))
    verdict = diagnosed(experiment, say)
    say(f"verdict: {verdict.headline}")
    if isinstance(names, str):
        names = (
            list(remedies.REMEDIES)
            if names == "all"
            else remedies.fitting(f.pathology for f in verdict.findings)
        )
    experiments, left_out = {UNTREATED: experiment}, {}
    _add(names, experiment, experiments, left_out)
    found = sweep.compare(experiments, progress=progress)
    programs = _programs(found)
    rows = ranked(found)
    if pairs and rows[0]["fraction"] < HEALTHY_SHARE:
        best = [row["remedy"] for row in rows if row["remedy"] != UNTREATED][:PAIRS_OF]
        more: dict[str, Experiment] = {}
        two = [(a, b) for a, b in combinations(best, 2) if "+" not in a + b]
        _add([f"{a}+{b}" for a, b in two if _add_up(a, b, experiments)], experiment, more, left_out)
        more = {name: e for name, e in more.items() if e not in experiments.values()}
        if more:
            say(f"no remedy alone is enough: {', '.join(more)}")
            more_found = sweep.compare(more, progress=progress)
            programs += _programs(more_found)
            found |= more_found
            experiments |= more
            rows = ranked(found)
    winner = rows[0]["remedy"] if is_better(rows[0]["remedy"], found) else UNTREATED
    after = None if winner == UNTREATED else diagnosed(experiments[winner], say)
    return Cure(verdict, rows, left_out, winner, after, joined(found), programs, experiments)


def is_better(name: str, found: Mapping[str, xr.Dataset]) -> bool:
    """Whether more seeds train with a remedy than without, or as many to a higher score; see the
    module.
    """
    trained = {each: int(found[each]["trained"].sum()) for each in (name, UNTREATED)}
    if name == UNTREATED or trained[name] != trained[UNTREATED]:
        return trained[name] > trained[UNTREATED]
    gain = (found[name]["final_score"] - found[UNTREATED]["final_score"]).values
    if len(gain) < 2 or not np.isfinite(gain).all():
        return False
    if not gain.std():
        return bool(gain[0] > 0)
    chance: Any = scipy.stats.ttest_1samp(gain, 0, alternative="greater")
    return bool(chance.pvalue < 0.05 / max(len(found) - 1, 1))


def _programs(found: Mapping[str, xr.Dataset]) -> int:
    """Training programs that were compiled."""
    return len({ds.attrs["program"] for ds in found.values()})


def _add_up(a: str, b: str, experiments: Mapping[str, Experiment]) -> bool:
    """Whether each of two remedies changes something that the other leaves: of two activations one
    is undone.
    """
    before = config.flatten(experiments[UNTREATED])
    one, other = (
        {k for k, v in config.flatten(experiments[n]).items() if v != before[k]} for n in (a, b)
    )
    return not (one <= other or other <= one)


def _add(
    names: Sequence[str], experiment: Experiment, experiments: dict, left_out: dict[str, str]
) -> None:
    """The treated experiments by name, and the reasons of those that cannot be."""
    for name in names:
        try:
            experiments[name] = remedies.apply(name, experiment)
        except NotApplicable as reason:
            left_out[name] = str(reason)


def diagnosed(experiment: Experiment, say: Callable[[str], None]) -> Diagnosis:
    """The verdict on a config at initialisation, as `gradjax diagnose` gives it."""
    ds, evidence = measure.examine(experiment, say)
    meta = {
        "name": experiment.name,
        "config": config.to_dict(experiment),
        "left_out": ds.attrs["left_out"],
    }
    return judge(evidence, ds, meta)


# -- ranking ---------------------------------------------------------------------------------------------


def ranked(found: Mapping[str, xr.Dataset]) -> list[dict[str, Any]]:
    """One row per setting, best first; see the module."""
    rows = [_row(name, ds) for name, ds in found.items()]
    order = lambda r: (
        -r["fraction"],
        -_or(r["score"], -math.inf),
        _or(r["stability"], math.inf),
        r["seconds_per_step"],
    )
    return sorted(rows, key=order)


def _or(value: float, instead: float) -> float:
    return instead if math.isnan(value) else value


def _row(name: str, ds: xr.Dataset) -> dict[str, Any]:
    trained, seeds = int(ds["trained"].sum()), ds.sizes["seed"]
    scores = ds["final_score"].values.astype(float)
    score, half = _mean_interval(scores)
    at, lost = ds["trained_at"].values, ds["diverged_at"].values >= 0
    return {
        "remedy": name,
        "trained": trained,
        "seeds": seeds,
        "fraction": trained / seeds,
        "fraction_interval": files.wilson(trained, seeds),
        "score": score,
        "score_interval": [score - half, score + half],
        "test_score": float(np.mean(ds["test_score"].values)),
        "stability": stability(ds["log_gradient_norm"].values, lost),
        "diverged": int(lost.sum()),
        "steps_to_target": float(np.median(at[at >= 0])) if (at >= 0).any() else math.nan,
        "seconds_per_step": ds.attrs["seconds_per_step"],
        "program": ds.attrs["program"],
    }


def _mean_interval(values: np.ndarray) -> tuple[float, float]:
    """Mean, and half the width of Student's 95% interval; of one seed it is not known."""
    if len(values) < 2:
        return float(values.mean()), math.nan
    return float(values.mean()), float(
        scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    )


def stability(log_norm: np.ndarray, lost: np.ndarray) -> float:
    """Median over seeds of the deviation of the log gradient norm (seed, step) along a seed's last
    nine tenths.

    NaN are steps that were not taken: behind a seed's end, or left out by a guard. A lost seed has no stability, nor
    has a gradient of zero, which has no logarithm: inf.
    """

    def one(row: np.ndarray) -> float:
        taken = row[~np.isnan(row)]
        late = taken[len(taken) // 10 :]
        return float(late.std()) if len(late) and np.isfinite(late).all() else math.inf

    return float(
        np.median(
            [math.inf if gone else one(row) for row, gone in zip(log_norm, lost, strict=True)]
        )
    )


def joined(found: Mapping[str, xr.Dataset]) -> xr.Dataset:
    """The datasets along `remedy`; layers are numbered, and those that a network lacks are NaN."""
    each = []
    for ds in found.values():
        attrs = {name: ds.attrs[name] for name in ("program", "seconds_per_step")}
        ds = ds.assign_coords(layer=np.arange(1, ds.sizes["layer"] + 1)).drop_attrs()
        each.append(ds.assign({name: ((), value) for name, value in attrs.items()}))
    index = xr.DataArray(list(found), dims="remedy", name="remedy")
    target = next(iter(found.values())).attrs["target"]
    return xr.concat(each, index, join="outer").assign_attrs(target=target)


# -- in words --------------------------------------------------------------------------------------------


def cured(c: Cure) -> bool:
    """Whether the best remedy brought the share of seeds that train from below 20% to 90% or
    more.
    """
    before = next(row for row in c.ranking if row["remedy"] == UNTREATED)
    return before["fraction"] < SICK_SHARE and c.ranking[0]["fraction"] >= HEALTHY_SHARE


def story(c: Cure) -> str:
    """What was wrong, what cured it, by how much, and what did not help."""
    rows = {row["remedy"]: row for row in c.ranking}
    before, best = rows[UNTREATED], c.ranking[0]
    treated = [row for row in c.ranking if row["remedy"] != UNTREATED]
    found = c.verdict.findings
    wrong = words.explain(found[0]) if found else "The network is healthy at initialisation."
    text = [
        f"What was wrong: {wrong} Untreated, {_of(before)} reach the target (mean score {before['score']:.3f})."
    ]
    if not treated:
        return " ".join([*text, "No remedy could be tried."])
    if before["fraction"] >= HEALTHY_SHARE:
        more = (
            f"; {best['remedy']} has a higher score, {best['score']:.3f}"
            if c.winner != UNTREATED
            else ""
        )
        return " ".join([*text, f"It trains as it is, and needs no cure{more}."])
    if c.winner == UNTREATED or best["fraction"] <= before["fraction"]:
        first = treated[0]
        text += [
            f"Nothing cured it: the best of {len(treated)} remedies, {first['remedy']}, has {_of(first)}."
        ]
        return " ".join(text)
    word = "What cured it" if cured(c) else "What helped most"
    text += [
        f"{word}: {best['remedy']} ({what(best['remedy'])}), with {_of(best)} and a mean score of {best['score']:.3f}"
        f"{_after(c)}."
    ]
    good = [row["remedy"] for row in treated[1:] if row["fraction"] >= HEALTHY_SHARE]
    part = [row for row in treated[1:] if before["fraction"] < row["fraction"] < HEALTHY_SHARE]
    some = [f"{row['remedy']} ({row['fraction']:.0%})" for row in part]
    none = [
        row["remedy"]
        for row in treated[1:]
        if row["fraction"] <= before["fraction"] and row["fraction"] < HEALTHY_SHARE
    ]
    text += [f"Also enough: {', '.join(good)}."] if good else []
    text += [f"Helped in part: {', '.join(some)}."] if some else []
    text += [f"Did not help: {', '.join(none)}."] if none else []
    return " ".join(text)


def what(name: str) -> str:
    """What a remedy, or two, change."""
    return "; ".join(remedies.REMEDIES[part].what for part in name.split("+"))


def _of(row: Mapping[str, Any]) -> str:
    low, high = row["fraction_interval"]
    return f"{row['trained']} of {row['seeds']} seeds (95% interval {low:.0%} to {high:.0%})"


def _after(c: Cure) -> str:
    if c.after is None:
        return ""
    if c.after.healthy:
        return "; at initialisation it is now healthy"
    return f"; at initialisation it still shows {', '.join(f.pathology for f in c.after.findings)}"


def to_dict(c: Cure) -> dict[str, Any]:
    """What `gradjax cure --json` prints."""
    return {
        "verdict": c.verdict.headline,
        "winner": c.winner,
        "cured": cured(c),
        "after": None if c.after is None else c.after.headline,
        "story": story(c),
        "ranking": c.ranking,
        "left_out": c.left_out,
        "programs": c.programs,
        "versions": files.provenance(),
    }
