"""Pre-training: its directions against brute force, what it changes, rejects and cures."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradjax.core import step
from gradjax.experiment import config, measure, models, pretraining, tasks, training
from gradjax.experiment.pretraining import contrastive_divergence, denoising, pretrain

SMALL = {
    "model.depth": 3,
    "model.width": 12,
    "model.activation": "sigmoid",
    "model.sigma_b": 0.0,
    "task.batch_size": 16,
    "train.num_steps": 20,
    "train.eval_every": 20,
    "train.pretrain_steps": 25,
}


def experiment(**more):
    return config.replace(
        config.Experiment(),
        SMALL | {name.replace("__", "."): value for name, value in more.items()},
    )


@pytest.fixture(scope="module")
def digits():
    return tasks.load("digits", jax.random.key(0))


@pytest.fixture
def layer(key):
    k1, k2, k3 = jax.random.split(key, 3)
    return {
        "kernel": jax.random.normal(k1, (5, 4)),
        "bias": jax.random.normal(k2, (4,)),
        "back": jax.random.normal(k3, (5,)),
    }


def expected_cd1(layer, v, binary):
    """The direction's mean over the hidden sample, all 2^4 of them weighed by their probability, in
    NumPy."""
    w, b, c = (np.asarray(layer[k], np.float64) for k in ("kernel", "bias", "back"))
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    total = {"kernel": 0.0, "bias": 0.0, "back": 0.0}
    for one in np.asarray(v, np.float64):
        p = sigmoid(one @ w + b)
        for h in itertools.product((0.0, 1.0), repeat=4):
            chance = np.prod(np.where(h, p, 1 - p))
            back = w @ np.array(h) + c
            back = sigmoid(back) if binary else back
            q = sigmoid(back @ w + b)
            total["kernel"] += chance * (np.outer(one, p) - np.outer(back, q)) / len(v)
            total["bias"] += chance * (p - q) / len(v)
            total["back"] += chance * (one - back) / len(v)
    return total


@pytest.mark.slow
@pytest.mark.parametrize("binary", [True, False])
def test_contrastive_divergence_against_all_hidden_samples(binary, layer, key):
    v = jax.random.uniform(key, (3, 5))
    draw = lambda key: contrastive_divergence(key, layer, v, jax.nn.sigmoid, binary)
    found = jax.jit(jax.vmap(draw))(jax.random.split(key, 20_000))
    wanted, other = expected_cd1(layer, v, binary), expected_cd1(layer, v, not binary)
    for name, draws in found.items():
        error = np.std(draws, axis=0) / 20_000**0.5 + 1e-6
        assert (np.abs(np.mean(draws, axis=0) - wanted[name]) < 4.5 * error).all()
        assert (np.abs(np.mean(draws, axis=0) - other[name]) > 4.5 * error).any()


@pytest.mark.slow
def test_contrastive_divergence_raises_the_likelihood_of_the_data(layer, key):
    """Exact log-likelihood of a binary machine of 5 + 4 units, by its 2^5 visible states, along 300
    steps."""
    v = (jnp.arange(20)[:, None] % jnp.array([[2, 4, 2, 4, 5]]) == 0).astype(jnp.float32)
    every = jnp.asarray(list(itertools.product((0.0, 1.0), repeat=5)), jnp.float32)

    def log_likelihood(layer):
        free = lambda v: (
            v @ layer["back"]
            + jnp.sum(jax.nn.softplus(v @ layer["kernel"] + layer["bias"][None]), 1)
        )
        return jnp.mean(free(v)) - jax.nn.logsumexp(free(every))

    def step(layer, key):
        push = contrastive_divergence(key, layer, v, jax.nn.sigmoid, True)
        return jax.tree.map(lambda p, d: p + 0.1 * d, layer, push), None

    trained = jax.jit(lambda layer: jax.lax.scan(step, layer, jax.random.split(key, 300))[0])(layer)
    uniform = -5 * np.log(2)
    assert log_likelihood(layer) < uniform + 0.5 < log_likelihood(trained) - 0.5


@pytest.mark.slow
@pytest.mark.parametrize("binary", [True, False])
def test_denoising_is_the_gradient_of_giving_back_what_was_masked(binary, layer, key, monkeypatch):
    """Without masks the direction is that of the plain loss, tied weights in both places; a quarter
    is masked."""
    x = jax.random.uniform(key, (6, 5))

    def loss(layer, seen):
        back = (
            jax.nn.sigmoid(seen @ layer["kernel"] + layer["bias"][None]) @ layer["kernel"].T
            + layer["back"][None]
        )
        if binary:
            p = jax.nn.sigmoid(back)
            return -jnp.mean(jnp.sum(x * jnp.log(p) + (1 - x) * jnp.log1p(-p), 1))
        return jnp.mean(jnp.sum((back - x) ** 2, 1)) / 2

    mask = jax.random.uniform(key, x.shape) >= 0.25
    found = jax.jit(lambda layer: denoising(key, layer, x, jax.nn.sigmoid, binary))(layer)
    for seen, same in ((jnp.where(mask, x, 0.0), True), (x, False)):
        wanted = jax.jit(jax.grad(loss))(layer, seen)
        for name in found:
            assert np.allclose(found[name], -wanted[name], atol=1e-5) == same


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rbm", "autoencoder"])
def test_only_hidden_layers_move_one_after_the_other(method, digits):
    """Read-out and structure stay; at rate 0 nothing moves; the first layer's result does not
    depend on those above."""

    def trained(depth, rate):
        e = experiment(train__pretrain=method, model__depth=depth)
        problem = training.problem_of(e, digits)
        keys = jax.random.split(jax.random.key(1), 2)
        run = lambda key, rate: training.init(
            key, {"train.pretrain_rate": rate}, digits, problem
        ).variables["params"]
        return jax.jit(jax.vmap(run))(keys, jnp.array([rate, 0.0]))

    params = trained(3, 0.05)
    problem = training.problem_of(experiment(model__depth=3), digits)
    plain = jax.jit(
        jax.vmap(lambda key: training.init(key, {}, digits, problem).variables["params"])
    )(jax.random.split(jax.random.key(1), 2))
    assert jax.tree.structure(params) == jax.tree.structure(plain)
    for (path, new), old in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(plain), strict=True
    ):
        moved = bool((new[0] != old[0]).any())
        assert moved == ("readout" not in jax.tree_util.keystr(path)), path
        np.testing.assert_array_equal(new[1], old[1])  # the member whose rate is 0
    kernels = params["layers"]["dense"]["kernel"][0]
    assert (kernels != plain["layers"]["dense"]["kernel"][0]).any(axis=(1, 2)).all()


@pytest.mark.slow
def test_layers_learn_what_those_below_pass_on(digits):
    """The second layer reproduces the first one's activations better than it did untrained."""
    e = experiment(train__pretrain="autoencoder", train__pretrain_rate=0.05, model__depth=2)
    problem = training.problem_of(config.replace(e, {"train.pretrain": "none"}), digits)
    start = jax.jit(lambda key: training.init(key, {}, digits, problem))(
        jax.random.key(1)
    ).variables
    both = jax.jit(lambda key: pretrain(key, start, digits.train, e))(jax.random.key(2))["params"]
    dense = both["embed"]["dense"]
    h = jax.nn.sigmoid(digits.train.x @ dense["kernel"] + dense["bias"][None])
    loss = {}
    for name, params in (("before", start["params"]), ("after", both)):
        w = {k: v[0] for k, v in params["layers"]["dense"].items()}
        back = jax.nn.sigmoid(jax.nn.sigmoid(h @ w["kernel"] + w["bias"][None]) @ w["kernel"].T)
        loss[name] = float(jnp.mean((back - h) ** 2))
    assert loss["after"] < 0.8 * loss["before"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model__residual": True}, "neither skips nor gates nor normalisation"),
        ({"model__normalization": "batchnorm"}, "neither skips nor gates nor normalisation"),
        ({"model__highway": True}, "neither skips"),
        ({"model__activation": "tanh"}, "'sigmoid'; model.activation is 'tanh'"),
    ],
)
def test_networks_that_it_cannot_serve_are_refused(settings, reason):
    e = experiment(train__pretrain="rbm", **settings)
    with pytest.raises(config.ConfigError, match=reason):
        config.check(e)
    part = tasks.Split(np.zeros((16, 64), np.float32), np.arange(16, dtype=np.int32) % 10)
    data = tasks.Splits(part, part, part)
    problem = training.problem_of(e, data)
    with pytest.raises(ValueError, match=reason):
        training.init(jax.random.key(0), {}, data, problem)
    config.check(config.replace(e, {"train.pretrain": "none"}))
    other = type("Model", (), {"name": "lenet5"})()
    assert "'lenet5' is not" in pretraining.check_compatible(
        type("E", (), {"train": e.train, "model": other})()
    )


@pytest.mark.slow
def test_a_diagnosis_is_of_the_pre_trained_network(digits):
    """Its signals are those of the variables that training starts from, not of the random ones
    below them."""
    small = {"diagnose__num_seeds": 2, "diagnose__spectrum_seeds": 0, "train__pretrain_steps": 20}
    plain, trained = (experiment(train__pretrain=method, **small) for method in ("none", "rbm"))
    before, after = measure.measure(plain), measure.measure(trained)
    assert abs(before["log_gradient_norm"] - after["log_gradient_norm"]).min() > 1e-3
    assert not before.attrs["theory"] and "pre-trained" in after.attrs["theory"]
    key = jax.random.fold_in(jax.random.split(jax.random.key(trained.seed))[1], 0)
    problem = training.problem_of(trained, training.splits_of(trained))
    splits = training.splits_of(trained)
    model = models.build(trained.model, problem.num_outputs)
    first = tasks.batch_at(
        splits.train, jax.random.split(jax.random.key(trained.seed))[0], 0, trained.task.batch_size
    )
    start = jax.jit(lambda key: training.start(key, model, trained, first, splits.train))(key)
    state = jax.jit(lambda key: training.init(key, {}, splits, problem))(key)
    for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(state.variables), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    h0, links = model.links(start, first.x)

    def loss(logits):
        return training.loss_and_score(logits, first.y).loss

    seen = jax.jit(lambda h0: step.signals(links, h0, loss=loss))(h0)
    np.testing.assert_allclose(
        after["log_gradient_norm"][0], seen.log_gradient_norm[:-1], rtol=1e-4
    )


@pytest.mark.slow
def test_an_autoencoder_serves_any_activation(digits):
    config.check(experiment(train__pretrain="autoencoder", model__activation="prelu"))
    e = experiment(
        train__pretrain="autoencoder", model__activation="prelu", train__pretrain_rate=0.01
    )
    problem = training.problem_of(e, digits)
    state = jax.jit(lambda key: training.init(key, {}, digits, problem))(jax.random.key(0))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state.variables))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "rbm", "autoencoder"])
def test_a_deep_sigmoid_network_trains_only_from_there(method, digits):
    """Ten layers of 64, sigma_w = 1: at 17% after 1000 steps of Adam, above 90% for every seed when
    pre-trained."""
    settings = {"model.depth": 10, "model.width": 64, "model.sigma_w": 1.0, "task.batch_size": 64}
    more = {
        "train.num_steps": 1000,
        "train.eval_every": 1000,
        "train.pretrain": method,
        "train.pretrain_steps": 200,
    }
    e = config.replace(experiment(), settings | more)
    problem = training.problem_of(e, digits)

    def score(key):
        state = training.init(key, {}, digits, problem)
        return training.run_chunk(state, {}, digits, problem)[1].validation.score

    scores = jax.jit(jax.vmap(score))(jax.random.split(jax.random.key(1), 4))
    assert (scores > 0.9).all() if method != "none" else (scores < 0.5).all()
