"""Theory at finite width against known limits, simulated and measured networks."""

import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from scipy import stats
from theory.reference import panels

from gradjax.core.activations import ACTIVATIONS
from gradjax.diagnosis import measurements, verdict
from gradjax.experiment import config, tasks
from gradjax.experiment.measure import measure
from gradjax.theory import finite_width, meanfield
from gradjax.theory.gaussian import derivative

SMALL = {
    "model.depth": 60,
    "model.width": 64,
    "diagnose.num_seeds": 16,
    "diagnose.spectrum_seeds": 16,
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
    ds = measured(name).assign(theory_log_cotangent_rms=("layer", line))
    return measurements.theory(ds)["standard_errors"]


@pytest.mark.slow
def test_measured_growth_agrees_and_sigma_w_5_percent_off_does_not(report):
    """By chi-squared, p > 1e-3, jointly over the networks; the same criterion rejects each wrong
    theory by itself."""
    z = np.array([distance(name) for name in NETWORKS])
    report("theory beside a diagnosis, standard errors", np.abs(z).max())

    def p(z):
        return stats.chi2.sf(np.sum(np.square(z)), np.size(z))

    assert p(z) > 1e-3, dict(zip(NETWORKS, z, strict=True))
    for name in NETWORKS:
        assert p(distance(name, 1.05)) < 1e-3 and p(distance(name, 0.95)) < 1e-3, name


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_activations_and_the_layer_product_agree(name):
    """The mean over 16 seeds by Student's t, p > 1e-3; the mean gain of a layer within 2%."""
    ds = measured(name)
    for variable in ("log_activation_rms", "log_product_rms"):
        seeds = np.asarray(ds[variable]).reshape(16, -1)[:, -1]
        z = (seeds.mean() - ds["theory_" + variable].values.ravel()[-1]) / (seeds.std(ddof=1) / 4)
        assert abs(z) < stats.t.isf(5e-4, 15), (variable, z)
    assert abs(float((ds.log_gain - ds.theory_log_gain).mean())) < 0.02


def single(activation, sigma_w, sigma_b, weights="gaussian", depth=200, width=64, q=None):
    """Theory of one example, so without an average over a batch; q: the length of its first layer,
    by default that of an input of ones."""
    network = SimpleNamespace(
        activation=activation, weights=weights, sigma_w=sigma_w, sigma_b=sigma_b, depth=depth,
        width=width, residual=False, residual_scale=1.0,
    )  # fmt: skip
    x = np.ones((1, 10)) if q is None else np.full((1, 10), np.sqrt(q - sigma_b**2) / sigma_w)
    return finite_width.predict(network, x, np.zeros(1, int), 10)


def rate(theory, width=64):
    """Variance of log ||J u||^2 per layer, times the width, far from both ends."""
    return -4 * np.diff(theory.sd_log_cotangent_rms**2)[50:100].mean() * width


def test_relu_is_hanin_and_nica(report):
    """Formula 8: log ||J u||^2 ~ N(-beta/2, beta), beta = 5 sum 1/n; the activations' walk is the
    same."""
    t = single("relu", 2**0.5, 0.0)
    beta = 5 * 199 / 64
    mean = t.log_cotangent_rms[0] / (-beta / 4) - 1
    deviation = t.sd_log_cotangent_rms[0] / (beta**0.5 / 2) - 1
    report("formula 8, mean and deviation of a diagnosis", max(abs(mean), abs(deviation)))
    assert max(abs(mean), abs(deviation)) < 1e-8
    np.testing.assert_allclose(2 * t.sd_log_activation_rms[-1], (5 * 200 / 64) ** 0.5, rtol=1e-6)


@pytest.mark.slow
def test_rates_of_orthogonal_and_linear_networks():
    """3 (mu_2 / mu_1^2 - 1) = 3 for ReLU with orthogonal weights, 2 and 0 for linear networks."""
    for activation, weights, expected in (
        ("relu", "orthogonal", 3.0),
        ("linear", "gaussian", 2.0),
        ("linear", "orthogonal", 0.0),
    ):
        sigma_w = 2**0.5 if activation == "relu" else 1.0
        found = rate(single(activation, sigma_w, 0.0, weights))
        assert found == pytest.approx(expected, abs=1e-6), (activation, weights)


def tanh_rate(q, sigma_w, sigma_b, orthogonal):
    """The rate of Var log ||J u||^2 for tanh at its fixed length q, with f = phi^2 and
    e = phi'^2 / mu_1: 3 E e^2 - 1 + 2 D Cov(e, f) + D^2 Var f, D = sigma_w^2 (d log mu_1 / dq) /
    (1 - dq'/dq), each without what a pinned |W x| removes if W is orthogonal."""
    z, w = panels([])
    x = np.sqrt(q) * z
    f, slope2 = np.tanh(x) ** 2, (1 - np.tanh(x) ** 2) ** 2
    stein = (z**2 - 1) / (2 * q)  # d/dq of a mean by Stein's identity
    mu = w @ slope2
    e = slope2 / mu
    ee, ef, ff = w @ e**2, w @ (e * f) - w @ f, w @ f**2 - (w @ f) ** 2
    found = 3 * ee - 1
    if orthogonal:
        pinned = ((q - sigma_b**2) / q) ** 2 / (2 * q**2)
        fx, ex = (w @ (g * (x**2 - q)) for g in (f, e))
        found = 3 * (ee - 1) - pinned * ex**2
        ff, ef = ff - pinned * fx**2, ef - pinned * fx * ex
    drift = sigma_w**2 * (w @ (stein * e)) / (1 - sigma_w**2 * (w @ (stein * f)))
    return found + 2 * drift * ef + drift**2 * ff


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["gaussian", "orthogonal"])
def test_depth_has_the_rates_of_mean_field(weights):
    """Per layer, far from both ends: log chi_1 with its finite-width shift, and the variance."""
    wide, narrow = (single("tanh", 1.8, 0.3, weights, width=n) for n in (10**6, 64))
    with jax.enable_x64(True):
        d = meanfield.phase_diagram(1.8, 0.3, correlations=False)
    log_chi = float(np.log(d.chi_1))
    growth = -2 * np.diff(wide.log_cotangent_rms)[50:100].mean()
    assert growth == pytest.approx(log_chi, abs=1e-4)
    assert wide.log_gain[100] == pytest.approx(log_chi / 2, abs=1e-10)
    expected = tanh_rate(float(d.q_star), 1.8, 0.3, weights == "orthogonal")
    assert rate(narrow) == pytest.approx(expected, rel=1e-3)


def log_growths(name, sigma_w, weights, q, n=48, depth=30, draws=1200):
    """log ||J u||^2 of random networks from their stationary length on."""
    phi, slope = ACTIVATIONS[name], derivative(ACTIVATIONS[name])

    def draw(key):
        def layer(state, key):
            h, u, log = state
            k1, k2 = jax.random.split(key)
            w = jax.random.normal(k1, (n, n)) / np.float32(np.sqrt(n))
            if weights == "orthogonal":
                w = jax.random.orthogonal(k2, n)
            g, u = sigma_w * (w @ phi(h)), sigma_w * (w @ (slope(h) * u))
            size = jnp.sum(u**2)
            return (g, u / jnp.sqrt(size), log + jnp.log(size)), None

        k1, k2, k3 = jax.random.split(key, 3)
        h, u = np.float32(np.sqrt(q)) * jax.random.normal(k1, (n,)), jax.random.normal(k2, (n,))
        start = (h, u / jnp.linalg.norm(u), jnp.zeros(()))
        return jax.lax.scan(layer, start, jax.random.split(k3, depth))[0][2]

    return np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), draws)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "weights"), [("relu", "gaussian"), ("tanh", "gaussian"), ("tanh", "orthogonal")]
)
def test_formula_8_variance_of_simulated_networks(name, weights):
    """Var log ||J u||^2 = beta within 8% + sampling error; half as much again is rejected."""
    sigma_w, q = 2**0.5, 1.0
    if name == "tanh":
        sigma_w = 1.5
        with jax.enable_x64(True):
            q = float(meanfield.q_star(sigma_w, 0.0))
    logs = log_growths(name, sigma_w, weights, q)
    theory = single(name, sigma_w, 0.0, weights, depth=31, width=48, q=q)
    beta = 4 * theory.sd_log_cotangent_rms[0] ** 2
    error = np.sqrt(2 / len(logs))
    print(name, weights, logs.var(), beta)
    assert abs(logs.var() / beta - 1) < 0.08 + 3 * error
    assert abs(logs.var() / (1.5 * beta) - 1) > 0.08 + 3 * error


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
def test_a_network_without_theory_has_a_reason(values, words):
    assert words in finite_width.covers(config.replace(config.Experiment(), values).model)


@pytest.fixture
def dataset():
    """A made-up measurement of three layers and two seeds."""
    layers = ["hidden_1", "hidden_2", "hidden_3"]
    return xr.Dataset(
        {
            "log_cotangent_rms": (("seed", "layer"), [[2.0, 1.5, 1.0], [3.0, 1.7, 1.0]]),
            "theory_log_cotangent_rms": ("layer", [1.9, 1.4, 0.9]),
            "theory_sd_log_cotangent_rms": ("layer", [0.1, 0.2, 0.0]),
        },
        {"layer": layers},
        {"theory": ""},
    )


def test_no_theory_is_a_note_and_nulls(dataset):
    """As for the networks with LayerNorm and BatchNorm of test_verdict."""
    gone = [name for name in dataset if str(name).startswith("theory_")]
    record = measurements.theory(dataset.drop_vars(gone).assign_attrs(theory="none"))
    assert record["note"] == "none" and record["standard_errors"] is None
    nothing = {"name": "hidden_1", "log_cotangent_rms": None, "standard_errors": None}
    assert record["layers"][0] == nothing


def check_record(record, layers):
    assert set(record) == {
        "note", "growth_nats_per_layer", "measured_nats_per_layer", "standard_error",
        "standard_errors", "layers",
    }  # fmt: skip
    assert record["note"] == "" and len(record["layers"]) == layers
    assert record["layers"][-1]["standard_errors"] is None  # where the growth starts
    off = record["measured_nats_per_layer"] - record["growth_nats_per_layer"]
    z = off / record["standard_error"]
    assert record["layers"][0]["standard_errors"] == record["standard_errors"] == pytest.approx(z)


def test_the_record_of_theory(dataset):
    """The deviation over the seeds, sqrt(1/2), is larger than the theory's."""
    record = measurements.theory(dataset)
    check_record(record, 3)
    assert record["growth_nats_per_layer"] == pytest.approx(0.5)
    assert record["measured_nats_per_layer"] == pytest.approx(0.75)
    assert record["standard_errors"] == pytest.approx(0.5 / (0.5**0.5 / 2**0.5))


@pytest.mark.slow
def test_the_json_of_theory():
    record = json.loads(verdict.judge([], measured("demo")).to_json())["theory"]
    check_record(record, 60)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"depth": 1}, marks=pytest.mark.slow),
        {"sigma_w": 1e18},
        {"sigma_w": 1e-9, "sigma_b": 0.0},
    ],
)
def test_extremes_end_in_numbers_or_nan(values):
    """At the depth of `test_relu_is_hanin_and_nica`, whose program they share."""
    model = SimpleNamespace(
        **{**vars(config.Experiment().model), "activation": "relu", "depth": 200, **values}
    )
    t = finite_width.predict(model, np.ones((3, 10)), np.array([0, 1, 1]), 2)
    assert t.log_activation_rms.shape == (model.depth,) and abs(t.log_cotangent_rms[-1]) < 1e-12
