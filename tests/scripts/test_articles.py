"""The articles' claims: verdicts follow the numbers, whatever they are; and the comparison of
optimisers."""

import json

import article_claims as claims
import articles
import numpy as np
import optimizers
import pytest
import reporting
from article_numbers import CONDITIONAL, CONFIRMED, REFUTED, SMALL, Run, Verdict, best

from gradjax.experiment import config, sweep
from support import CONFIGS

SEEDS = 6
NOISE = np.linspace(-1e-3, 1e-3, SEEDS)


def starts(**values: float) -> dict[str, np.ndarray]:
    """Made-up numbers per seed, by label."""
    return {label: value + NOISE for label, value in values.items()}


def run(test: float, trained: bool = False, steps: int = 100, rate: float = 0.1) -> Run:
    """A made-up training of every seed."""
    each = np.full(SEEDS, trained)
    return Run(
        rate, test + NOISE, test + NOISE[::-1], each, np.full(SEEDS, steps) + np.arange(SEEDS) % 2
    )


# Intervals


def test_a_fraction_has_wilsons_interval():
    row = reporting.fraction("x", np.array([True] * 8))
    assert (row.value, row.high) == (1.0, 1.0)
    assert row.low == pytest.approx(8 / (8 + 1.959964**2), rel=1e-6)  # n / (n + z^2) for n of n


def test_mean_is_students_interval():
    row = reporting.mean("x", np.array([1.0, 2.0, 3.0]))
    assert row.value == pytest.approx(2)
    assert row.high - row.value == pytest.approx(4.302653 / 3**0.5, rel=1e-6)


def test_above_is_paired():
    """Differences between seeds larger than the gap do not hide it; noise of its size does."""
    base = np.arange(8.0)
    assert reporting.above(base + 0.1, base)
    assert not reporting.above(base, base + 0.1)
    assert not reporting.above(base + np.tile([1.0, -1.0], 4), base)


def test_best_is_chosen_by_validation_not_by_test():
    good = run(0.5)._replace(validation=np.full(SEEDS, 0.9), rate=1.0)
    assert best([run(0.8), good]).rate == 1.0


# Verdicts on made-up numbers


def relu(**more: float) -> dict[str, np.ndarray]:
    table = {f"{a}, {t} x critical": 0.0 for a in claims.ACTIVATIONS for t in (1, 2, 4)}
    return starts(
        **{**table, **{k.replace("_", ", ", 1) + " x critical": v for k, v in more.items()}}
    )


@pytest.mark.parametrize(
    "numbers, word",
    [
        ({"relu_1": 1.0}, CONFIRMED),  # only ReLU explodes at its own scale
        ({"linear_2": 1.0, "relu_2": 1.0}, REFUTED),  # the scale does it
        ({"relu_2": 1.0}, CONDITIONAL),  # only with ReLU, but not at its own scale
        ({"relu_1": 1.0, "tanh_1": 1.0}, CONDITIONAL),
    ],
)
def test_relu(numbers, word):
    assert claims.judge_relu(SMALL, relu(**numbers), {}).word == word


@pytest.mark.parametrize(
    "sigmoid, he, word", [(-2, 0, CONFIRMED), (-2, -2, CONDITIONAL), (0, -2, REFUTED)]
)
def test_sigmoid(sigmoid, he, word):
    numbers = {
        k: float(sigmoid if k.startswith("sigmoid") else he) for k in claims._sigmoid_starts(SMALL)
    }
    assert claims.judge_sigmoid(SMALL, starts(**numbers), {}).word == word


@pytest.mark.parametrize("adam, word", [(0.9, CONFIRMED), (0.6, CONDITIONAL), (0.3, REFUTED)])
def test_adam(adam, word):
    runs = {label: [run(0.4)] for label, _ in claims._adam(SMALL)} | {"SGD, He's scale": [run(0.8)]}
    assert claims.judge_adam(SMALL, {}, runs | {"Adam": [run(adam)]}).word == word


@pytest.mark.parametrize(
    "at_same, at_best, word", [(200, 180, CONFIRMED), (200, 100, CONDITIONAL), (100, 100, REFUTED)]
)
def test_clipping(at_same, at_best, word):
    runs = {"no clipping": [run(0.9, steps=100), run(0.9, steps=150, rate=1.0)]}
    for limit in claims.THRESHOLDS:
        runs[f"clipping at {limit:g}"] = [
            run(0.9, steps=at_same),
            run(0.9, steps=at_best, rate=1.0),
        ]
    assert claims.judge_slow(SMALL, {}, runs).word == word


@pytest.mark.parametrize(
    "with_norm, deep, word",
    [(True, 0.0, CONFIRMED), (True, 1.0, CONDITIONAL), (False, 0.0, REFUTED)],
)
def test_batchnorm(with_norm, deep, word):
    numbers = {k: deep if "layers" in k else 0.0 for k in claims._batchnorm_starts(SMALL)}
    runs = {
        label: [run(0.9, "BatchNorm" in label and with_norm)]
        for label, _ in claims._batchnorm(SMALL)
    }
    assert claims.judge_batchnorm(SMALL, starts(**numbers), runs).word == word


@pytest.mark.parametrize("without, word", [(0.1, REFUTED), (0.95, CONFIRMED)])
def test_batchnorm_at_test(without, word):
    numbers = {"running averages": 0.95, "batch statistics": 0.95, "without the norm": without}
    assert claims.judge_test_mode(SMALL, starts(**numbers), {}).word == word


@pytest.mark.parametrize(
    "curing, word",
    [((), REFUTED), (("max-norm",), CONDITIONAL), (tuple(claims.REGULARIZERS), CONFIRMED)],
)
def test_regularizers(curing, word):
    labels = {label for label, _ in claims._regularizers(SMALL)}
    runs = {label: [run(0.5, label.startswith(curing or ("nothing",)))] for label in labels}
    assert claims.judge_regularizers(SMALL, {}, runs).word == word


@pytest.mark.parametrize("skips, word", [(0.1, CONFIRMED), (0.7, CONDITIONAL), (2.0, REFUTED)])
def test_residual(skips, word):
    plain = dict(zip(claims.RESIDUAL_SIGMAS, (-1.0, -0.9, 0.5, 0.4), strict=True))
    numbers = {f"plain, {k}": v for k, v in plain.items()} | {f"skips, {k}": skips for k in plain}
    assert claims.judge_residual(SMALL, starts(**numbers), {}).word == word


@pytest.mark.parametrize(
    "vanishing, healthy, word",
    [(0.2, 0.1, CONFIRMED), (0.2, 0.0, CONDITIONAL), (0, -0.1, REFUTED)],
)
def test_pretraining(vanishing, healthy, word):
    gain = {"sigmoid, RBMs first": vanishing, "ReLU, He, autoencoders first": healthy}
    runs = {label: [run(0.5 + gain.get(label, 0))] for label, _ in claims._pretraining(SMALL)}
    assert claims.judge_pretraining(SMALL, {}, runs).word == word


@pytest.mark.parametrize("lstm, word", [(-0.01, CONFIRMED), (-0.2, CONDITIONAL), (-2.0, REFUTED)])
def test_lstm(lstm, word):
    numbers = {k: lstm for k in claims._lstm_starts(SMALL)} | {
        "RNN, gain 0.5": -1.0,
        "RNN, gain 1": -0.3,
    }
    assert claims.judge_lstm(SMALL, starts(**{**numbers, "RNN, gain 1.5": -0.1}), {}).word == word


@pytest.mark.parametrize(
    "cured, word", [((True, True), CONFIRMED), ((True, False), CONDITIONAL), ((), REFUTED)]
)
def test_normalised(cured, word):
    runs = {label: [run(0.4)] for label, _ in claims._normalized(SMALL)}
    for kind, yes in zip(("exploding", "vanishing"), cured, strict=False):
        runs[f"{kind}, normalised"] = [run(0.9, yes)]
    assert claims.judge_normalized(SMALL, {}, runs).word == word


# The experiments


def test_few_programs_serve_all_claims():
    """With and without clipping are one program, and so are all regularisers."""
    every = [e for claim in claims.CLAIMS.values() for e in claim.trainings(SMALL).values()]
    trainings = {str(i): experiment for i, experiment in enumerate(every)}
    for experiment in trainings.values():
        config.check(experiment)
    assert len(sweep.programs(trainings)) == 8


def test_identity_skips_have_no_parameters():
    numbers = claims.measure_parameters(SMALL)
    assert numbers["identity skips"] == numbers["plain"]
    assert numbers["skips with a learned scale"] == numbers["plain"] + SMALL.deep - 1
    verdict = claims.judge_parameters(SMALL, numbers, {})
    assert verdict.word == REFUTED
    more = numbers | {"identity skips": numbers["plain"] + 1}
    assert claims.judge_parameters(SMALL, more, {}).word == CONFIRMED


# The commands


def test_list_names_every_claim(capsys):
    assert articles.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(claims.CLAIMS)


@pytest.mark.parametrize("arguments", [["relu_explode"], ["--seeds", "1"]])
def test_what_cannot_be_used_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        articles.main(arguments)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "did you mean relu_explodes?" in message or "at least 2" in message


@pytest.mark.slow
def test_claims_from_end_to_end(tmp_path, capsys):
    """Claims of every kind: measured by itself, at the start, in training, and after it."""
    names = ["residual_parameters", "residual_delta", "lstm_vanishes_less", "batchnorm_at_test"]
    names += ["clipping_slows", "pretraining_helps"]
    assert articles.main([*names, "--small", "--json", "--output", str(tmp_path)]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert list(summary["claims"]) == names
    assert summary["claims"]["residual_parameters"]["word"] == REFUTED
    grown = {row["label"]: row["value"] for row in summary["claims"]["residual_delta"]["rows"]}
    # mean field: chi = sigma_w^2 / 2, with a skip 1 + that
    for name, sigma in claims.RESIDUAL_SIGMAS.items():
        assert grown[f"plain, {name}"] == pytest.approx(0.5 * np.log(sigma**2 / 2), abs=0.1)
        assert grown[f"skips, {name}"] == pytest.approx(0.5 * np.log(1 + sigma**2 / 2), abs=0.1)
    folder = tmp_path / "articles"
    assert (folder / "articles.png").stat().st_size > 10_000
    assert json.loads((folder / "articles.json").read_text())["claims"] == summary["claims"]


def test_the_report_prints_every_claim(capsys):
    """Of made-up verdicts."""
    rows = [reporting.Row("all", 1.0, 0.5, 1.5)]
    made = {name: Verdict(REFUTED, "because", "nats", rows) for name in claims.CLAIMS}
    articles.print_report(made)
    out = capsys.readouterr().out
    assert all(name in out for name in claims.CLAIMS)
    assert articles.figure(made).get_axes()


def test_an_optimiser_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        optimizers.main(["configs/clip_threshold.toml", "adamm"])
    assert "unknown optimiser 'adamm'; allowed: sgd, " in capsys.readouterr().err


def test_optimisers_share_a_program_with_and_without_clipping():
    base = config.load(CONFIGS / "clip_threshold.toml")
    wanted = {
        str(key): e for key, e in optimizers.experiments(base, list(optimizers.RATES), 1.0).items()
    }
    for experiment in wanted.values():
        config.check(experiment)
    assert len(sweep.programs(wanted)) == len(optimizers.RATES) == 9


@pytest.mark.slow
def test_two_optimisers_from_end_to_end(tmp_path, capsys):
    names, sizes = ["sgd", "coordinate"], ["--steps", "30", "--seeds", "2"]
    command = ["configs/clip_threshold.toml", *names, *sizes, "--output", str(tmp_path)]
    assert optimizers.main(command) == 0
    assert "40 trainings in 2 compiled programs" in capsys.readouterr().out
    assert (tmp_path / "optimizers" / "optimizers.png").stat().st_size > 10_000
