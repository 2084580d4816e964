"""Recurrent networks and transformers: the contract, and what each one's equations promise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_contract import apply, build, check_contract, check_spectrum

import gradjax
from gradjax.core import step
from gradjax.experiment import models, training
from gradjax.experiment.models.recurrent import BIASES, cayley
from gradjax.experiment.models.transformer import positions

RECURRENT = {
    "rnn": ("rnn", {"depth": 3, "residual": True, "residual_scale": 0.5, "activation": "prelu"}),
    "rnn_dropout": (
        "rnn",
        {"depth": 2, "residual": True, "dropout": 0.3, "normalization": "rmsnorm"},
    ),
    "orthogonal": ("orthogonal_rnn", {}),
    "lstm": (
        "lstm",
        {"depth": 2, "normalization": "layernorm", "weights": "orthogonal", "forget_bias": 1.0},
    ),
    "gru": ("gru", {"chrono": 20.0}),
    "minimal": ("minimal_rnn", {"forget_bias": 1.0}),
}
TRANSFORMERS = {
    "pre": {"placement": "pre", "normalization": "layernorm", "dropout": 0.1},
    "post": {
        "placement": "post",
        "normalization": "rmsnorm",
        "residual_scale": 0.5,
        "residual_learned": True,
    },
    "deepnorm": {"placement": "deepnorm", "normalization": "layernorm", "weights": "orthogonal"},
}
SMALL = {"depth": 1, "width": 8, "sigma_w": 1.0, "sigma_b": 0.1}
TRANSFORMER = {
    "name": "transformer",
    "depth": 3,
    "width": 8,
    "num_heads": 2,
    "sigma_w": 1.0,
    "activation": "gelu",
}


def init(model, key, x):
    """Compiled: op by op it takes seconds."""
    return jax.jit(lambda key, x: model.init({"params": key, "dropout": key}, x, train=True))(
        key, x
    )


@pytest.fixture
def x(key):
    return jax.random.normal(key, (4, 6, 3))


# --- the contract


SLOW = {"rnn_dropout", "pre", "deepnorm"}


def cases(table):
    marks = lambda name: [pytest.mark.slow] if name in SLOW else []
    values = {name: case if isinstance(case, tuple) else (case,) for name, case in table.items()}
    return [pytest.param(*case, id=name, marks=marks(name)) for name, case in values.items()]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), cases(RECURRENT))
def test_recurrent_contract(name, options, key, x):
    check_contract(build(name, 5, **{**SMALL, **options}), x, key)


@pytest.mark.slow
@pytest.mark.parametrize("options", cases(TRANSFORMERS))
def test_transformer_contract(options, key, x):
    check_contract(build(**TRANSFORMER, num_outputs=5, **options), x, key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm", pytest.param("transformer", marks=pytest.mark.slow)])
def test_contract_per_step_on_tokens(name, key):
    tokens = jax.random.randint(key, (4, 6), 0, 5)
    options = (
        {**TRANSFORMER, "depth": 2}
        if name == "transformer"
        else {"name": name, **SMALL, "depth": 2}
    )
    check_contract(
        build(**options, num_outputs=5, per_step=True), tokens, key, jnp.roll(tokens, -1, axis=1)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_spectrum(name, key, x):
    options = TRANSFORMER if name == "transformer" else {"name": name, **SMALL, "depth": 2}
    check_spectrum(build(**options, num_outputs=5), x, key)


def test_gated_cells_alone_have_gates():
    for name in ("rnn", "orthogonal_rnn", "transformer", "mlp"):
        assert not models.takes(name, "chrono") and not models.takes(name, "forget_bias")
        with pytest.raises(ValueError, match=r"model\.chrono = 20\.0 means nothing to model\.name"):
            build(name, chrono=20.0)
    for name in ("lstm", "gru", "minimal_rnn"):
        assert models.takes(name, "chrono") and models.takes(name, "forget_bias")
    assert not models.takes("rnn", "cell") and not models.takes("orthogonal_rnn", "weights")


# --- time


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rnn", "lstm"])
def test_links_have_a_step_per_time_step_with_its_own_gradient(name, key, x):
    model = build(name, 5, **SMALL)
    variables = init(model, key, x)
    loss = lambda logits: jnp.sum(jnp.square(logits))
    h0, links = model.links(variables, x)
    assert step.check_step(links, h0) == 6 + 1
    # the gradients of the steps add up to that of the shared weights: check where only one step is
    # there
    h0, links = model.links(variables, x[:, :1])
    assert step.check_step(links, h0) == 1 + 1

    @jax.jit
    def signals(variables, x):
        h0, links = model.links(variables, x)
        return step.signals(links, h0, loss=loss)

    seen, alone = signals(variables, x), signals(variables, x[:, :1])
    own = jax.jit(
        jax.grad(
            lambda w: loss(model.apply({"params": {**variables["params"], "layer_0": w}}, x[:, :1]))
        )
    )
    leaves = jax.tree.leaves(own(variables["params"]["layer_0"]))
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in leaves))
    np.testing.assert_allclose(jnp.exp(alone.log_gradient_norm[0]), norm, rtol=1e-5)
    assert np.isfinite(seen.log_gradient_norm).all()


def test_compile_time_depends_neither_on_time_nor_on_the_depth_of_transformers(key):
    def size(model, seq_len):
        x = jnp.zeros((2, seq_len, 3))
        return str(jax.make_jaxpr(lambda key: init(model, key, x))(key)).count(" = ")

    lstm = build("lstm", 5, **SMALL)
    assert size(lstm, 1000) == size(lstm, 10)
    deep = [build(**{**TRANSFORMER, "depth": depth}, num_outputs=5) for depth in (4, 400)]
    assert size(deep[0], 6) == size(deep[1], 6)


# --- cells


def one_step(model, variables, x, state):
    """The state after one step from `state`, which is the tuple of the layers' states."""
    _, links = model.links(variables, x)
    return links[0][0](state, links[0][1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm", "gru", "minimal_rnn"])
def test_a_wide_open_forget_gate_keeps_the_state(name, key, x):
    model = build(name, 5, **{**SMALL, "forget_bias": 40.0})
    variables = init(model, key, x)
    h = jax.random.normal(key, (4, 8))
    if name != "lstm":
        np.testing.assert_allclose(one_step(model, variables, x, (h,))[0], h, atol=1e-6)
        return
    chrono = build(name, 5, **{**SMALL, "sigma_b": 0.0, "chrono": 1e15})
    kept = one_step(chrono, init(chrono, key, x), x, ((h, jnp.zeros_like(h)),))[0][0]
    np.testing.assert_allclose(kept, h, atol=1e-2)  # input gates are shut
    moved = one_step(model, variables, x, ((h, jnp.zeros_like(h)),))[0][0]
    assert float(jnp.abs(moved - h).max()) > 0.05  # here they are not


@pytest.mark.slow
def test_cells_are_those_of_flax(key, x):
    """An LSTM and a GRU against Flax's own, whose gates are matrices of their own."""
    import flax.linen as nn

    h = jax.random.normal(key, (4, 8))
    for name, order, theirs in (("lstm", "ifgo", nn.LSTMCell(8)), ("gru", "rzn", nn.GRUCell(8))):
        model = build(name, 5, **SMALL)
        layer = init(model, key, x)["params"]["layer_0"]
        cut = lambda w: jnp.split(w, w.shape[-1] // 8, axis=-1)
        params = {}
        for gate, w, u, b in zip(
            order,
            cut(layer["input"]["kernel"]),
            cut(layer["recurrent"]["kernel"]),
            cut(layer["bias"]),
            strict=True,
        ):
            if name == "lstm":
                params |= {f"i{gate}": {"kernel": w}, f"h{gate}": {"kernel": u, "bias": b}}
            else:
                params |= {f"i{gate}": {"kernel": w, "bias": b}, f"h{gate}": {"kernel": u}}
        if name == "gru":
            params["hn"]["bias"] = jnp.zeros(8)
        state = (jnp.tanh(h), h) if name == "lstm" else h
        with jax.numpy_rank_promotion("allow"):
            wanted = theirs.apply({"params": params}, state, x[:, 0])[0]
        got = one_step(model, {"params": {"layer_0": layer, "readout": {}}}, x, (state,))[0]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, wanted)


@pytest.mark.slow
def test_minimal_rnn_is_its_equation(key, x):
    model = build("minimal_rnn", 5, **SMALL)
    w = (variables := init(model, key, x))["params"]["layer_0"]
    h = jax.random.normal(key, (4, 8))
    b, b_u = (jnp.broadcast_to(b, h.shape) for b in jnp.split(w["bias"], 2))
    z = jnp.tanh(x[:, 0] @ w["input"]["kernel"] + b)
    u = jax.nn.sigmoid(h @ w["recurrent"]["kernel"] + z @ w["gate"]["kernel"] + b_u)
    np.testing.assert_allclose(
        one_step(model, variables, x, (h,))[0], u * h + (1 - u) * z, atol=1e-6
    )


@pytest.mark.slow
def test_chrono_spreads_the_memories_evenly_over_time(key, x):
    """b_f = log U(1, T - 1), whose mean is known; b_i = -b_f; a plain uniform b_f would be told
    apart."""
    longest = 100.0
    for name in ("lstm", "gru", "minimal_rnn"):
        model = build(name, 5, depth=1, width=500, sigma_w=0.0, sigma_b=0.0, chrono=longest)
        start = init(model, key, x)["params"]["layer_0"]["bias"]
        blocks = jnp.split(start, len(BIASES[name]))
        forget = np.asarray(blocks[BIASES[name].index("forget")], np.float64)
        times = np.exp(forget)
        assert 1 <= times.min() < 3 and 97 < times.max() < 99.01
        error = 3 * 98 / 12**0.5 / 500**0.5
        assert abs(times.mean() - 50) < error
        if name == "lstm":
            np.testing.assert_array_equal(blocks[0], -blocks[1])
        assert all(
            not np.any(b) for b, start in zip(blocks, BIASES[name], strict=True) if start is None
        )


@pytest.mark.slow
def test_the_recurrence_of_orthogonal_rnns_stays_orthogonal_and_moves(key, x):
    model = build("orthogonal_rnn", 4, depth=1, width=16, sigma_w=1.0, sigma_b=0.0)
    variables = init(model, key, x)
    y = jnp.arange(4)

    @jax.jit
    def update(params):
        loss = lambda params: training.loss_and_score(model.apply({"params": params}, x), y).loss
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, jax.grad(loss)(params))

    params = variables["params"]
    before = cayley(params["layer_0"]["skew"])
    for _ in range(20):
        params = update(params)
    after = cayley(params["layer_0"]["skew"])
    assert float(jnp.abs(after - before).max()) > 0.02
    np.testing.assert_allclose(after @ after.T, jnp.eye(16), atol=1e-5)
    # eigenvalues on the circle, over most of it
    assert np.abs(np.angle(np.linalg.eigvals(np.asarray(before)))).max() > 1.5


@pytest.mark.slow
def test_recurrent_weights_have_their_scale_block_by_block(key, x):
    model = build("lstm", 5, depth=1, width=64, sigma_w=0.7, weights="orthogonal")
    kernel = init(model, key, x)["params"]["layer_0"]["recurrent"]["kernel"]
    for block in jnp.split(kernel, 4, axis=1):
        np.testing.assert_allclose(block @ block.T, 0.49 * jnp.eye(64), atol=1e-5)


def test_irnn_is_the_identity_at_the_start(key, x):
    if "identity" not in gradjax.core.initializers.WEIGHTS:
        pytest.skip("no identity among the weights")
    model = build(
        "rnn", 5, depth=1, width=8, activation="relu", weights="identity", sigma_w=1.0, sigma_b=0.0
    )
    h = jnp.abs(jax.random.normal(key, (4, 8)))
    variables = init(model, key, x)
    np.testing.assert_allclose(one_step(model, variables, jnp.zeros_like(x), (h,))[0], h, atol=1e-6)


@pytest.mark.slow
def test_every_float_may_be_traced(key, x):
    floats = {"sigma_w": 0.5, "sigma_b": 0.1, "residual_scale": 0.3, "dropout": 0.2, "chrono": 9.0}

    def output(values):
        model = build("lstm", 5, depth=2, width=8, residual=True)
        model = dataclasses.replace(model, **values)
        return apply(model, init(model, key, x), x, key)

    static = jax.jit(lambda: output(floats))
    np.testing.assert_allclose(jax.jit(output)(floats), static(), atol=1e-5)


# --- transformers


@pytest.mark.slow
def test_per_step_sees_no_later_step_and_else_all(key, x):
    changed = x.at[:, 4].set(7.0)
    for per_step in (True, False):
        model = build(**TRANSFORMER, num_outputs=5, per_step=per_step, normalization="layernorm")
        variables = init(model, key, x)
        before, after = (jax.jit(model.apply)(variables, x) for x in (x, changed))
        if per_step:
            np.testing.assert_array_equal(before[:, :4], after[:, :4])
            assert (jnp.abs(before - after).max((0, 2))[4:] > 1e-4).all()
        else:
            assert float(jnp.abs(before - after).max()) > 1e-4


@pytest.mark.slow
def test_deepnorm_has_the_papers_scales(key):
    """alpha = (2 N)^(1/4) on the skip, beta = (8 N)^(-1/4) on all weights but those of query and
    key."""
    x = jax.random.normal(key, (2, 4, 64))
    scales = {}
    for placement in ("post", "deepnorm"):
        model = build(
            **{**TRANSFORMER, "width": 64, "depth": 8}, num_outputs=5, placement=placement
        )
        layers = init(model, key, x)["params"]["layers"]
        for name, own in {**layers["attention"], **layers["mlp"]}.items():
            scales[placement, name] = float(jnp.std(own["kernel"]))
    for (placement, name), value in scales.items():
        beta = (8 * 8) ** -0.25 if placement == "deepnorm" and name not in ("query", "key") else 1.0
        fan_in = 256 if name == "down" else 64
        assert value == pytest.approx(beta / fan_in**0.5, rel=0.02)
    model = build(
        **{**TRANSFORMER, "sigma_w": 0.0, "sigma_b": 0.0, "depth": 8},
        num_outputs=5,
        placement="deepnorm",
    )
    h0, links = model.links(init(model, key, x), x)
    h = links[0][0](h0, links[0][1])
    block, thetas = links[1]
    out = block(h, jax.tree.map(lambda t: t[0], thetas))
    np.testing.assert_allclose(out, h * (2 * 8) ** 0.5, rtol=1e-5)  # two skips, without a norm


@pytest.mark.slow
def test_post_norm_holds_the_state_and_pre_norm_lets_it_grow(key):
    x, states = jax.random.normal(key, (2, 4, 32)), {}
    for placement in ("post", "pre"):
        options = {
            **TRANSFORMER,
            "width": 32,
            "depth": 24,
            "placement": placement,
            "normalization": "layernorm",
        }
        model = build(**options, num_outputs=5)

        @jax.jit
        def rms(variables, model=model):
            h0, links = model.links(variables, x)
            seen = step.signals(links, h0, loss=lambda logits: jnp.sum(jnp.square(logits)))
            return jnp.exp(seen.log_activation_rms[1:-1])

        states[placement] = np.asarray(rms(init(model, key, x)))
    np.testing.assert_allclose(states["post"][1:], 1.0, rtol=1e-3)
    assert states["pre"][-1] > 3 * states["pre"][0]


def test_positions_tell_the_steps_apart():
    table = np.asarray(positions(50, 16), np.float64)
    np.testing.assert_allclose(np.square(table).sum(1), 8, rtol=1e-5)
    distance = np.square(table[:, None] - table).sum(-1) + 10 * np.eye(50)
    assert distance.min() > 0.5


@pytest.mark.slow
def test_attention_logits_are_visible_and_judged_when_they_grow(key):
    x = jax.random.normal(key, (8, 6, 3))
    model = build(**TRANSFORMER, num_outputs=5, normalization="layernorm")
    variables = init(model, key, x)
    _, sown = model.apply(variables, x, mutable=["intermediates"])
    (logits,) = sown["intermediates"]["layers"]["attention"]["attention_logits"]
    assert logits.shape == (3, 8, 2, 6, 6)

    def loss(params):
        return training.loss_and_score(
            model.apply({"params": params}, x), jnp.zeros(8, jnp.int32)
        ).loss

    query = lambda path, w: w.at[1].multiply(80.0) if "query" in jax.tree_util.keystr(path) else w
    planted = jax.tree_util.tree_map_with_path(query, variables["params"])
    (found,) = (
        f
        for f in gradjax.diagnose(loss, planted).findings
        if f.pathology == "attention_logit_growth"
    )
    assert "[1]" in found.where["name"]  # the healthy block before it is not accused


# --- refusals


@pytest.mark.slow
def test_what_no_sequence_model_can_do_is_refused(key, x):
    flat = jnp.zeros((4, 64))
    for options in ({"name": "rnn", **SMALL}, TRANSFORMER):
        with pytest.raises(
            ValueError, match=r"needs sequences \(batch, seq_len, features\).*got float32 of shape"
        ):
            init(build(**options, num_outputs=5), key, flat)
        with pytest.raises(ValueError, match="has no batchnorm"):
            init(build(**options, num_outputs=5, normalization="batchnorm"), key, x)
        dropping = build(**options, num_outputs=5, dropout=0.1)
        with pytest.raises(ValueError, match=r"key=jax\.random\.key"):
            dropping.links(init(dropping, key, x), x)
    with pytest.raises(ValueError, match="a recurrence has no lsuv"):
        init(build("rnn", 5, **SMALL, weights="lsuv"), key, x)
    with pytest.raises(ValueError, match="3 heads do not divide a width of 8"):
        init(build(**{**TRANSFORMER, "num_heads": 3}, num_outputs=5), key, x)
