"""`find_cure`: diagnose a network, train it with every fitting remedy, rank them, diagnose again.

The untreated network is trained with the others, over the same seeds and batches; settings that
differ only in floats share one compiled program (`gradjax.experiment.sweep.compare`). Remedies are
ranked by, in this order,

    1. the fraction of seeds that train (their validation score reached the config's target),
    2. the mean validation score after the last step,
    3. the stability of the gradient norm: the standard deviation of its logarithm along the last
       nine tenths of the steps,
    4. the seconds per training step.

The last score of a diverged seed is that of its last good parameters, and the deviation of its
gradient norm is inf. With `train.stop_at_target` a seed's last step is the one that reached the
target. Intervals are Wilson's at 95% for fractions and Student's for mean scores; they are those of
a single remedy, not of the best of many. If the best single remedy leaves more than a tenth of the
seeds untrained, the pairs of the best three are tried too.

The claim that a remedy cures rests on the same seeds before and after: `is_cured` means 90% or more
of them train, from below 20%. The winner is the first in the ranking if more seeds train with it
than without, or if their scores are higher beyond chance (Student's paired t, at 5% over the number
of remedies, Bonferroni); otherwise there is no winner. Cost: one compilation per program and
num_seeds trainings per remedy.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from gradjax.core.extras import needed_for
from gradjax.cure import remedies
from gradjax.cure.remedies import NotApplicable
from gradjax.diagnosis import words
from gradjax.diagnosis.verdict import Diagnosis, judge
from gradjax.experiment import config, measure, sweep
from gradjax.experiment.progress import Progress, Report, ignore
from gradjax.experiment.schema import ConfigError, Experiment
from gradjax.report import files

with needed_for("gradjax.find_cure"):
    import xarray as xr

UNTREATED = "untreated"
# Fractions of the seeds that train, from and to which a network is cured.
FAILING_FRACTION, CURED_FRACTION = 0.2, 0.9
# Number of best remedies of which pairs are tried.
PAIRS_OF = 3


class Cure(NamedTuple):
    """The result of `find_cure`.

    Attributes:
      verdict: on the untreated network.
      ranking: one row per setting, best first, `untreated` among them.
      left_out: remedy -> why it was not tried.
      winner: a remedy, or `untreated` if none is better.
      after: verdict on the network with the winner, if there is one.
      results: what `gradjax.sweep` returns, along the dimension `remedy`.
      programs: number of training programs compiled.
      experiments: the config of each setting.
    """

    verdict: Diagnosis
    ranking: list[dict[str, Any]]
    left_out: dict[str, str]
    winner: str
    after: Diagnosis | None
    results: xr.Dataset
    programs: int
    experiments: dict[str, Experiment]

    def __str__(self) -> str:
        return story(self)


def find_cure(
    experiment: Experiment,
    names: Sequence[str] | str = "fitting",
    *,
    pairs: bool = True,
    progress: Report = ignore,
) -> Cure:
    """Try remedies on the network of a config.

    A host-level function: it compiles and trains.

    Args:
      experiment: gives the network, the data, the training, the target and the seeds.
      names: "fitting" (those for the findings of the diagnosis), "all", or one or more names of
        `gradjax.cure.remedies`, `a+b` for two at a time.
      pairs: whether to try pairs of the best remedies if no single one is enough.
      progress: called as by `gradjax.sweep`.

    Raises:
      ConfigError: an unknown remedy, or a config that cannot run. A remedy that does not apply is
        left out instead.
    """
    config.check(experiment)
    if experiment.task.validation == 0:
        raise ConfigError(
            "cure: task.validation is 0, and remedies are ranked by validation scores; needed: "
            "above 0"
        )
    if isinstance(names, str) and names not in ("fitting", "all"):
        names = [names]
    if not isinstance(names, str):
        remedies.check_names(names)
    verdict = diagnose_config(experiment, progress)
    progress(Progress(f"verdict: {verdict.headline}"))
    if names == "all":
        names = list(remedies.REMEDIES)
    elif names == "fitting":
        names = remedies.fitting(finding.pathology for finding in verdict.findings)
    experiments, left_out = treat(experiment, names)
    experiments = {UNTREATED: experiment} | experiments
    found = sweep.compare(experiments, progress=progress)
    programs = _count_programs(found)
    rows = rank(found)
    if pairs and rows[0]["fraction"] < CURED_FRACTION:
        more, reasons = treat(experiment, choose_pairs(rows, experiments))
        left_out |= reasons
        more = {name: e for name, e in more.items() if e not in experiments.values()}
        if more:
            progress(Progress(f"no single remedy is enough: {', '.join(more)}"))
            more_found = sweep.compare(more, progress=progress)
            programs += _count_programs(more_found)
            found |= more_found
            experiments |= more
            rows = rank(found)
    winner, after = UNTREATED, None
    if is_better(rows[0]["remedy"], found):
        winner = rows[0]["remedy"]
        after = diagnose_config(experiments[winner], progress)
    return Cure(verdict, rows, left_out, winner, after, join(found), programs, experiments)


def treat(
    experiment: Experiment, names: Iterable[str]
) -> tuple[dict[str, Experiment], dict[str, str]]:
    """The treated experiments by remedy, and the reasons of the remedies that do not apply."""
    treated, left_out = {}, {}
    for name in names:
        try:
            treated[name] = remedies.apply(name, experiment)
        except NotApplicable as reason:
            left_out[name] = str(reason)
    return treated, left_out


def choose_pairs(
    rows: Sequence[Mapping[str, Any]], experiments: Mapping[str, Experiment]
) -> list[str]:
    """`a+b` for the best single remedies that change different settings, from ranked rows."""
    best = [row["remedy"] for row in rows if row["remedy"] != UNTREATED][:PAIRS_OF]
    return [
        f"{a}+{b}"
        for a, b in combinations(best, 2)
        if "+" not in a + b and are_complementary(a, b, experiments)
    ]


def are_complementary(a: str, b: str, experiments: Mapping[str, Experiment]) -> bool:
    """Whether each of two remedies changes a setting that the other one leaves.

    Of two activations, for example, the second would undo the first.
    """
    before = config.flatten(experiments[UNTREATED])
    one, other = (
        {key for key, value in config.flatten(experiments[name]).items() if value != before[key]}
        for name in (a, b)
    )
    return not (one <= other or other <= one)


def diagnose_config(experiment: Experiment, progress: Report) -> Diagnosis:
    """The verdict on a config at initialisation, as `gradjax diagnose` gives it."""
    ds, evidence = measure.examine(experiment, lambda message: progress(Progress(message)))
    meta = {
        "name": experiment.name,
        "config": config.to_dict(experiment),
        "left_out": ds.attrs["left_out"],
    }
    return judge(evidence, ds, meta)


def _count_programs(found: Mapping[str, xr.Dataset]) -> int:
    """Training programs that were compiled."""
    return len({ds.attrs["program"] for ds in found.values()})


def is_better(name: str, found: Mapping[str, xr.Dataset]) -> bool:
    """Whether more seeds train with a remedy than without, or as many to a higher score.

    Args:
      name: a remedy.
      found: the results of all settings, as `gradjax.compare` returns them.
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


# Ranking


def rank(found: Mapping[str, xr.Dataset]) -> list[dict[str, Any]]:
    """One row per setting, best first; see the module."""

    def order(row: Mapping[str, Any]) -> tuple[float, ...]:
        score = _replace_nan(row["score"], -math.inf)
        stability = _replace_nan(row["stability"], math.inf)
        return -row["fraction"], -score, stability, row["seconds_per_step"]

    return sorted((_row(name, ds) for name, ds in found.items()), key=order)


def _replace_nan(value: float, default: float) -> float:
    return default if math.isnan(value) else value


def _row(name: str, ds: xr.Dataset) -> dict[str, Any]:
    """The numbers of one setting."""
    trained, seeds = int(ds["trained"].sum()), ds.sizes["seed"]
    scores = ds["final_score"].values.astype(float)
    score, half = _mean_interval(scores)
    at, diverged = ds["trained_at"].values, ds["diverged_at"].values >= 0
    at = at[at >= 0]
    return {
        "remedy": name,
        "trained": trained,
        "seeds": seeds,
        "fraction": trained / seeds,
        "fraction_interval": files.wilson(trained, seeds),
        "score": score,
        "score_interval": [score - half, score + half],
        "test_score": float(np.mean(ds["test_score"].values)),
        "stability": stability(ds["log_gradient_norm"].values, diverged),
        "diverged": int(diverged.sum()),
        "steps_to_target": float(np.median(at)) if at.size else math.nan,
        "seconds_per_step": ds.attrs["seconds_per_step"],
        "program": ds.attrs["program"],
    }


def _mean_interval(values: np.ndarray) -> tuple[float, float]:
    """Mean, and half the width of Student's 95% interval (nan for a single value)."""
    mean = float(values.mean())
    if len(values) < 2:
        return mean, math.nan
    quantile = scipy.stats.t.ppf(0.975, len(values) - 1)
    return mean, float(quantile * scipy.stats.sem(values))


def stability(log_norm: np.ndarray, diverged: np.ndarray) -> float:
    """Median over seeds of the deviation of the log gradient norm along the last 9/10 of the steps.

    Args:
      log_norm: (seed, step); NaN for steps that were not taken, because the seed had ended or a
        guard skipped them.
      diverged: (seed,) bools.

    Returns:
      The median; the deviation of a seed is inf if it diverged, or if a gradient is zero and has no
      logarithm.
    """

    def deviation(row: np.ndarray) -> float:
        taken = row[~np.isnan(row)]
        late = taken[len(taken) // 10 :]
        return float(late.std()) if len(late) and np.isfinite(late).all() else math.inf

    deviations = [
        math.inf if gone else deviation(row) for row, gone in zip(log_norm, diverged, strict=True)
    ]
    return float(np.median(deviations))


def join(found: Mapping[str, xr.Dataset]) -> xr.Dataset:
    """The datasets along `remedy`; layers are numbered, and those that a network lacks are NaN."""
    each = []
    for ds in found.values():
        attrs = {name: ds.attrs[name] for name in ("program", "seconds_per_step")}
        ds = ds.assign_coords(layer=np.arange(1, ds.sizes["layer"] + 1)).drop_attrs()
        each.append(ds.assign({name: ((), value) for name, value in attrs.items()}))
    index = xr.DataArray(list(found), dims="remedy", name="remedy")
    target = next(iter(found.values())).attrs["target"]
    return xr.concat(each, index, join="outer").assign_attrs(target=target)


# Text


def is_cured(c: Cure) -> bool:
    """Whether the best remedy raised the fraction of seeds that train from below 20% to >= 90%."""
    before = next(row for row in c.ranking if row["remedy"] == UNTREATED)
    best = c.ranking[0]
    return before["fraction"] < FAILING_FRACTION and best["fraction"] >= CURED_FRACTION


def story(c: Cure) -> str:
    """What was wrong, what cured it, by how much, and what did not help."""
    rows = {row["remedy"]: row for row in c.ranking}
    before, best = rows[UNTREATED], c.ranking[0]
    treated = [row for row in c.ranking if row["remedy"] != UNTREATED]
    wrong = "The network is healthy at initialisation."
    if c.verdict.findings:
        wrong = words.explain(c.verdict.findings[0])
    text = (
        f"What was wrong: {wrong} Untreated, {describe_trained(before)} reach the target "
        f"(mean score {before['score']:.3f}). "
    )
    if not treated:
        return text + "No remedy could be tried."
    if before["fraction"] >= CURED_FRACTION:
        more = ""
        if c.winner != UNTREATED:
            more = f"; {best['remedy']} has a higher score, {best['score']:.3f}"
        return text + f"It trains as it is, and needs no cure{more}."
    if c.winner == UNTREATED or best["fraction"] <= before["fraction"]:
        first = treated[0]
        return text + (
            f"Nothing cured it: the best of {len(treated)} remedies, {first['remedy']}, has "
            f"{describe_trained(first)}."
        )
    word = "What cured it" if is_cured(c) else "What helped most"
    text += (
        f"{word}: {best['remedy']} ({describe(best['remedy'])}), with {describe_trained(best)} and "
        f"a mean score of {best['score']:.3f}{describe_after(c)}."
    )
    return text + _describe_others(treated[1:], before["fraction"])


def _describe_others(rows: Sequence[Mapping[str, Any]], untreated: float) -> str:
    """Sentences about the remedies after the best, by the fraction of seeds that they train."""
    good, some, none = [], [], []
    for row in rows:
        name, fraction = row["remedy"], row["fraction"]
        if fraction >= CURED_FRACTION:
            good.append(name)
        elif fraction > untreated:
            some.append(f"{name} ({fraction:.0%})")
        else:
            none.append(name)
    parts = {"Also enough": good, "Helped in part": some, "Did not help": none}
    return "".join(f" {title}: {', '.join(names)}." for title, names in parts.items() if names)


def describe(name: str) -> str:
    """What a remedy, or `a+b`, changes."""
    return "; ".join(remedies.REMEDIES[part].description for part in name.split("+"))


def describe_trained(row: Mapping[str, Any]) -> str:
    """`7 of 8 seeds (95% interval 53% to 98%)`."""
    low, high = row["fraction_interval"]
    return f"{row['trained']} of {row['seeds']} seeds (95% interval {low:.0%} to {high:.0%})"


def describe_after(c: Cure) -> str:
    """The verdict on the network with the winner, as the end of a sentence."""
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
        "cured": is_cured(c),
        "after": None if c.after is None else c.after.headline,
        "story": story(c),
        "ranking": c.ranking,
        "left_out": c.left_out,
        "programs": c.programs,
        "versions": files.provenance(),
    }
