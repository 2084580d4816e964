"""Recurrent networks: cells by their equations, starts of their weights, steps in time."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_contract import apply, build, roundings, started

from bounds import assert_rounding
from gradjax.core import step
from gradjax.experiment import training
from gradjax.experiment.models.cells import CELLS, cayley

SMALL = {"depth": 1, "width": 8, "sigma_w": 1.0, "sigma_b": 0.1}
# W x of 3, U h of 8, a bias, and functions that are within some ulp, twice over
CELL = 3 + 8 + 2 * 16


@pytest.fixture
def key():
    """Of XLA's own generator, which compiles three times as fast as Threefry."""
    return jax.random.key(0, impl="unsafe_rbg")


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 3)), jnp.float32)


@pytest.fixture
def h():
    return jnp.asarray(np.random.default_rng(1).normal(size=(4, 8)), jnp.float32)


def one_step(model, key, x, state):
    """Parameters of the layer, and the state after one step from the tuple of layers' states."""

    @jax.jit
    def stepped(key, x, state):
        variables = started(model, key, x)
        _, links = model.links(variables, x)
        return variables["params"]["layer_0"], links[0][0](state, links[0][1])

    return stepped(key, x, state)


def start(model, key, x):
    """Parameters of the layer."""
    return jax.jit(lambda key, x: started(model, key, x)["params"]["layer_0"])(key, x)


def doubles(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rnn", "lstm"])
def test_links_have_a_step_per_time_step_with_its_own_gradient(name, key, x):
    """The gradient of the only step is that of the weights; of six steps each has its own."""
    model = build(name, **SMALL)

    def loss(logits):
        return jnp.sum(jnp.square(logits))

    @jax.jit
    def all_of_it(key, x):
        variables = started(model, key, x)

        def network(layer):
            params = {**variables["params"], "layer_0": layer}
            return loss(model.apply({"params": params}, x[:, :1]))

        norms = []
        for steps in (6, 1):
            h0, links = model.links(variables, x[:, :steps])
            assert step.check_step(links, h0) == steps + 1
            norms.append(step.signals(links, h0, loss=loss).log_gradient_norm)
        return norms, jax.grad(network)(variables["params"]["layer_0"])

    (six, one), own = all_of_it(key, x)
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(own)]
    norm = np.linalg.norm(np.concatenate(leaves))
    assert_rounding(np.exp(one[0]), norm, terms=2 * CELL + sum(map(len, leaves)))
    assert np.isfinite(six).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm", "gru", "minimal_rnn"])
def test_a_wide_open_forget_gate_keeps_the_state(name, key, x, h):
    model = build(name, **{**SMALL, "forget_bias": 40.0})
    if name != "lstm":
        _, (kept,) = one_step(model, key, x, (h,))
        assert_rounding(kept, h, terms=4)
        return
    # a cell's input gates are open here, and shut by chrono initialisation
    _, ((moved, _),) = one_step(model, key, x, ((h, jnp.zeros_like(h)),))
    assert float(jnp.abs(moved - h).max()) > 0.05
    chrono = build(name, **{**SMALL, "sigma_b": 0.0, "chrono": 1e15})
    _, ((kept, _),) = one_step(chrono, key, x, ((h, jnp.zeros_like(h)),))
    np.testing.assert_allclose(kept, h, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "order", "theirs"),
    [("lstm", "ifgo", nn.LSTMCell(8)), ("gru", "rzn", nn.GRUCell(8))],
    ids=["lstm", "gru"],
)
def test_cells_are_those_of_flax(name, order, theirs, key, x, h):
    """Flax's own have gates that are matrices of their own."""
    state = (jnp.tanh(h), h) if name == "lstm" else h
    layer, (got,) = one_step(build(name, **SMALL), key, x, (state,))

    def cut(w):
        return jnp.split(w, w.shape[-1] // 8, axis=-1)

    parts = (layer["input"]["kernel"], layer["recurrent"]["kernel"], layer["bias"])
    params = {}
    for gate, w, u, b in zip(order, *map(cut, parts), strict=True):
        if name == "lstm":
            params |= {f"i{gate}": {"kernel": w}, f"h{gate}": {"kernel": u, "bias": b}}
        else:
            params |= {f"i{gate}": {"kernel": w, "bias": b}, f"h{gate}": {"kernel": u}}
    if name == "gru":
        params["hn"]["bias"] = jnp.zeros(8)
    with jax.numpy_rank_promotion("allow"):
        wanted = jax.jit(theirs.apply)({"params": params}, state, x[:, 0])[0]
    jax.tree.map(lambda a, b: assert_rounding(a, b, terms=CELL, size=8.0), got, wanted)


@pytest.mark.parametrize(
    "name",
    [
        "lstm",
        *[
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("rnn", "orthogonal_rnn", "gru", "minimal_rnn")
        ],
    ],
)
def test_cells_are_their_equations(name, key, x, h):
    state = (jnp.tanh(h), h) if name == "lstm" else h
    layer, (got,) = one_step(build(name, **SMALL), key, x, (state,))
    layer, got, h, c = doubles((layer, got, h, jnp.tanh(h)))
    if name == "orthogonal_rnn":
        a = (layer["skew"] - layer["skew"].T) * 0.5**0.5
        u = np.linalg.solve(np.eye(8) + a, np.eye(8) - a)
    else:
        u = layer["recurrent"]["kernel"]
    z, r, b = np.asarray(x[:, 0], np.float64) @ layer["input"]["kernel"], h @ u, layer["bias"]
    if name == "minimal_rnn":
        wanted = np.tanh(z + b[:8])
        gate = sigmoid(r + wanted @ layer["gate"]["kernel"] + b[8:])
        wanted = gate * h + (1 - gate) * wanted
    elif name == "gru":
        reset, gate = sigmoid((z + b)[:, :8] + r[:, :8]), sigmoid((z + b)[:, 8:16] + r[:, 8:16])
        wanted = gate * h + (1 - gate) * np.tanh((z + b)[:, 16:] + reset * r[:, 16:])
    elif name == "lstm":
        i, f, g, o = np.split(z + r + b, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        wanted = (c, sigmoid(o) * np.tanh(c))
    else:
        wanted = np.tanh(z + r + b)
    # the solve of an orthogonal matrix is within some n^2 roundings of it
    terms = CELL + (8**2 if name == "orthogonal_rnn" else 0)
    assert_rounding(got, wanted, terms=terms, size=16.0, dtype="f4")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm", "gru", "minimal_rnn"])
def test_chrono_spreads_the_memories_evenly_over_time(name, key, x):
    """b_f = log U(1, T - 1), whose mean is known; b_i = -b_f; a plain uniform b_f is detected."""
    model = build(name, depth=1, width=500, sigma_w=0.0, sigma_b=0.0, chrono=100.0)
    starts = CELLS[name].starts
    blocks = np.split(np.asarray(start(model, key, x)["bias"], np.float64), len(starts))
    times = np.exp(blocks[starts.index("forget")])
    assert 1 <= times.min() < 3 and 97 < times.max() < 99.01
    assert abs(times.mean() - 50) < 3 * 98 / 12**0.5 / 500**0.5
    if name == "lstm":
        np.testing.assert_array_equal(blocks[0], -blocks[1])
    assert all(not np.any(b) for b, kind in zip(blocks, starts, strict=True) if kind is None)


@pytest.mark.slow
def test_the_recurrence_of_orthogonal_rnns_stays_orthogonal_and_moves(key, x):
    model = build("orthogonal_rnn", depth=1, width=16, sigma_w=1.0, sigma_b=0.0)
    y = jnp.arange(4)

    def update(params, _):
        def loss(params):
            return training.loss_and_score(model.apply({"params": params}, x), y).loss

        return jax.tree.map(lambda p, g: p - 0.5 * g, params, jax.grad(loss)(params)), None

    @jax.jit
    def trained(key):
        params = started(model, key, x)["params"]
        after, _ = jax.lax.scan(update, params, None, length=20)
        return cayley(params["layer_0"]["skew"]), cayley(after["layer_0"]["skew"])

    before, after = trained(key)
    assert float(jnp.abs(after - before).max()) > 0.02
    after = np.asarray(after, np.float64)
    # backward stable, and |1 + A| is at most 1 + its largest eigenvalue, 3 to 5
    assert_rounding(after @ after.T, np.eye(16), terms=16**2, size=5.0, dtype="f4")
    # eigenvalues on the circle, over most of it
    assert np.abs(np.angle(np.linalg.eigvals(np.asarray(before)))).max() > 1.5


@pytest.mark.slow
def test_recurrent_weights_have_their_scale_block_by_block(key, x):
    model = build("lstm", depth=1, width=64, sigma_w=0.7, weights="orthogonal")
    kernel = np.asarray(start(model, key, x)["recurrent"]["kernel"], np.float64)
    for block in np.split(kernel, 4, axis=1):
        assert_rounding(block @ block.T, 0.49 * np.eye(64), terms=4 * 64, size=1.0, dtype="f4")


def test_irnn_is_the_identity_at_the_start(key, x, h):
    irnn = {"activation": "relu", "weights": "identity", "sigma_w": 1.0, "sigma_b": 0.0}
    model = build("rnn", depth=1, width=8, **irnn)
    _, (after,) = one_step(model, key, jnp.zeros_like(x), (jnp.abs(h),))
    np.testing.assert_array_equal(after, np.abs(h))


@pytest.mark.slow
def test_every_float_may_be_traced(key, x):
    floats = {"sigma_w": 0.5, "sigma_b": 0.1, "residual_scale": 0.3, "dropout": 0.2, "chrono": 9.0}
    plain = build("lstm", depth=2, width=8, residual=True)

    def output(values):
        model = dataclasses.replace(plain, **values)
        variables = started(model, key, x)
        return apply(model, variables, x, key), variables["params"]

    traced, params = jax.jit(output)(floats)
    static, _ = jax.jit(lambda: output(floats))()
    # six steps of two layers
    assert_rounding(traced, static, terms=6 * roundings(params), size=1.0)
