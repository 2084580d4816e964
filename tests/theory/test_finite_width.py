"""Theory at finite width against known limits and measured networks, and what it refuses."""

import functools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from scipy import stats

from gradjax.diagnosis import measurements, verdict
from gradjax.experiment import config, tasks
from gradjax.experiment.measure import measure
from gradjax.theory import finite_width, meanfield

SMALL = {
    "model.depth": 60,
    "model.width": 64,
    "diagnose.num_seeds": 16,
    "diagnose.spectrum_seeds": 0,
}
HE = {"model.activation": "relu", "model.sigma_w": 2**0.5, "model.sigma_b": 0.0}
NETWORKS = {
    "demo": {"model.sigma_w": 2.5},
    "critical": {"model.sigma_w": 1.32701},
    "vanishing": {"model.sigma_w": 1.0},
    "relu": HE,
    "orthogonal": {"model.weights": "orthogonal", "model.sigma_w": 2.0},
    "hard_tanh": {"model.activation": "hard_tanh", "model.sigma_w": 1.8},
    "residual": {"model.residual": True, "model.residual_scale": 0.3, "model.sigma_w": 1.5},
}
FAST = ("demo", "relu")


def experiment(name, **values):
    return config.replace(config.Experiment(), {**SMALL, **NETWORKS[name], **values})


@functools.cache
def measured(name):
    return measure(experiment(name))


def batch(task):
    """The batch that `measure` takes."""
    key = jax.random.split(jax.random.key(0))[0]
    splits = tasks.load(
        task.name, key, validation=task.validation, test=task.test, normalize=task.normalize
    )
    return tasks.batch_at(splits.train, key, 0, task.batch_size)


def distance(name, factor=1.0):
    """Standard errors between the measured network and the theory of one whose sigma_w is `factor`
    times as large."""
    one = experiment(name)
    other = config.replace(one, {"model.sigma_w": one.model.sigma_w * factor})
    x, y = batch(one.task)
    line = finite_width.predict(other.model, x, y, 10).log_cotangent_rms
    return measurements.theory(measured(name).assign(theory_log_cotangent_rms=("layer", line)))[
        "standard_errors"
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [FAST, pytest.param(tuple(NETWORKS), marks=pytest.mark.slow)], ids=["two", "all"]
)
def test_measured_growth_agrees_and_sigma_w_5_percent_off_does_not(names, report):
    """By chi-squared, p > 1e-3, jointly over the networks; the same criterion rejects each wrong
    theory by itself."""
    z = np.array([distance(name) for name in names])
    report("theory beside a diagnosis, standard errors", np.abs(z).max())
    p = lambda z: stats.chi2.sf(np.sum(np.square(z)), np.size(z))
    assert p(z) > 1e-3, dict(zip(names, z, strict=True))
    for name in names:
        assert p(distance(name, 1.05)) < 1e-3 and p(distance(name, 0.95)) < 1e-3, name


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_activations_and_the_layer_product_agree(name):
    """The mean over 16 seeds by Student's t, p > 1e-3; the mean gain of a layer within 2%."""
    ds = measure(experiment(name, **{"diagnose.spectrum_seeds": 16}))
    for variable in ("log_activation_rms", "log_product_rms"):
        seeds = np.asarray(ds[variable]).reshape(16, -1)[:, -1]
        z = (seeds.mean() - ds["theory_" + variable].values.ravel()[-1]) / (seeds.std(ddof=1) / 4)
        assert abs(z) < stats.t.isf(5e-4, 15), (variable, z)
    assert abs(float((ds.log_gain - ds.theory_log_gain).mean())) < 0.02


def single(activation, sigma_w, sigma_b, weights="gaussian", depth=200, width=64):
    """Theory of one example: no average over a batch."""
    model = config.replace(
        config.Experiment(), {"model.activation": activation, "model.weights": weights}
    ).model
    model = SimpleNamespace(
        **{**vars(model), "sigma_w": sigma_w, "sigma_b": sigma_b, "depth": depth, "width": width}
    )
    return finite_width.predict(model, np.ones((1, 10)), np.zeros(1, int), 10)


def test_relu_is_hanin_and_nica(report):
    """Formula 8: log ||J u||^2 ~ N(-beta/2, beta), beta = 5 sum 1/n; the activations' walk is the
    same."""
    t = single("relu", 2**0.5, 0.0)
    beta = 5 * 199 / 64
    error = np.abs(
        [t.log_cotangent_rms[0] / (-beta / 4) - 1, t.sd_log_cotangent_rms[0] / (beta**0.5 / 2) - 1]
    ).max()
    report("formula 8, mean and deviation of a diagnosis", error)
    assert error < 1e-8
    np.testing.assert_allclose(2 * t.sd_log_activation_rms[-1], (5 * 200 / 64) ** 0.5, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["gaussian", "orthogonal"])
def test_depth_has_the_rates_of_mean_field(weights):
    """Per layer, far from both ends: log chi_1 with its finite-width shift, and the variance of
    `log_variance`."""
    wide, narrow = (single("tanh", 1.8, 0.3, weights, width=n) for n in (10**6, 64))
    steps = lambda x: np.diff(x)[50:100].mean()
    with jax.enable_x64(True):
        chi, rate = (
            meanfield.chi_1(1.8, 0.3),
            meanfield.log_variance([64], 1.8, 0.3, "tanh", weights=weights),
        )
    assert -2 * steps(wide.log_cotangent_rms) == pytest.approx(float(np.log(chi)), abs=1e-4)
    assert wide.log_gain[100] == pytest.approx(float(np.log(chi)) / 2, abs=1e-10)
    assert -4 * steps(narrow.sd_log_cotangent_rms**2) == pytest.approx(float(rate), rel=1e-3)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model.normalization": "batchnorm"}, "batchnorm"),
        ({"model.normalization": "layernorm"}, "layernorm"),
        ({"model.dropout": 0.1}, "dropout"),
        ({"model.residual": True, "model.activation": "relu"}, "skips around relu"),
        ({"model.sigma_w": 0.0}, "sigma_w = 0"),
    ],
)
def test_what_is_not_covered_says_why(values, words):
    assert words in finite_width.covers(config.replace(config.Experiment(), values).model)


def test_no_theory_is_a_note_and_nulls():
    """As for the networks with LayerNorm and BatchNorm of test_diagnosis."""
    ds = measured("demo")
    ds = ds.drop_vars([name for name in ds if str(name).startswith("theory_")]).assign_attrs(
        theory="none"
    )
    record = json.loads(verdict.judge([], ds).to_json())["theory"]
    assert record["note"] == "none" and record["standard_errors"] is None
    assert record["layers"][0] == {
        "name": "hidden_1",
        "log_cotangent_rms": None,
        "standard_errors": None,
    }


def test_the_json_of_theory():
    record = json.loads(verdict.judge([], measured("demo")).to_json())["theory"]
    assert set(record) == {
        "note", "growth_nats_per_layer", "measured_nats_per_layer", "standard_error", "standard_errors", "layers",
    }  # fmt: skip
    assert record["note"] == "" and len(record["layers"]) == 60
    assert record["layers"][-1]["standard_errors"] is None  # where the growth starts
    z = (record["measured_nats_per_layer"] - record["growth_nats_per_layer"]) / record[
        "standard_error"
    ]
    assert record["layers"][0]["standard_errors"] == record["standard_errors"] == pytest.approx(z)


@pytest.mark.parametrize(
    "values", [{"depth": 1}, {"sigma_w": 1e18}, {"sigma_w": 1e-9, "sigma_b": 0.0}]
)
def test_extremes_end_in_numbers_or_nan(values):
    model = SimpleNamespace(
        **{**vars(config.Experiment().model), "activation": "relu", "depth": 40, **values}
    )
    t = finite_width.predict(model, np.ones((3, 10)), np.array([0, 1, 1]), 2)
    assert t.log_activation_rms.shape == (model.depth,) and abs(t.log_cotangent_rms[-1]) < 1e-12
