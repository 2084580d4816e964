"""Transformers: causality, placements of the norm, positions, attention logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_contract import build, init, started

import gradjax
from bounds import assert_rounding
from gradjax.core import step
from gradjax.experiment import training
from gradjax.experiment.models.transformer import positions

SMALL = {"depth": 3, "width": 8, "num_heads": 2, "sigma_w": 1.0, "activation": "gelu"}


def transformer(per_step=False, **options):
    return build("transformer", per_step=per_step, **{**SMALL, **options})


@pytest.fixture
def key():
    """Of XLA's own generator, which compiles three times as fast as Threefry."""
    return jax.random.key(0, impl="unsafe_rbg")


@pytest.fixture
def x(key):
    return jax.random.normal(key, (4, 6, 3))


@pytest.mark.slow
@pytest.mark.parametrize("per_step", [True, False])
def test_per_step_sees_no_later_step_and_else_all(per_step, key, x):
    model = transformer(per_step, normalization="layernorm")

    @jax.jit
    def both(key, x):
        variables = started(model, key, x)
        return jax.vmap(lambda x: model.apply(variables, x))(jnp.stack([x, x.at[:, 4].set(7.0)]))

    before, after = np.asarray(both(key, x))
    if per_step:
        np.testing.assert_array_equal(before[:, :4], after[:, :4])
        assert (np.abs(before - after).max((0, 2))[4:] > 1e-4).all()
    else:
        assert np.abs(before - after).max() > 1e-4


@pytest.mark.slow
def test_deepnorm_has_the_papers_scales(key):
    """alpha = (2 N)^(1/4) on the skip, beta = (8 N)^(-1/4) on all weights but those of query and
    key."""
    x = jax.random.normal(key, (2, 4, 64))
    scales = {}
    for placement in ("post", "deepnorm"):
        model = transformer(width=64, depth=8, placement=placement)
        layers = init(model, key, x)["params"]["layers"]
        for name, own in {**layers["attention"], **layers["mlp"]}.items():
            scales[placement, name] = float(np.std(own["kernel"]))
    for (placement, name), value in scales.items():
        beta = (8 * 8) ** -0.25 if placement == "deepnorm" and name not in ("query", "key") else 1.0
        fan_in = 256 if name == "down" else 64
        assert value == pytest.approx(beta / fan_in**0.5, rel=0.02)
    model = transformer(sigma_w=0.0, sigma_b=0.0, depth=8, placement="deepnorm")

    @jax.jit
    def block(key, x):
        h0, links = model.links(started(model, key, x), x)
        h = links[0][0](h0, links[0][1])
        return h, links[1].step(h, jax.tree.map(lambda t: t[0], links[1].thetas))

    h, out = block(key, x)
    assert_rounding(out, np.asarray(h, np.float64) * (2 * 8) ** 0.5, terms=8)  # two skips, no norm


@pytest.mark.slow
def test_post_norm_holds_the_state_and_pre_norm_lets_it_grow(key):
    x, states = jax.random.normal(key, (2, 4, 32)), {}
    for placement in ("post", "pre"):
        model = transformer(width=32, depth=24, placement=placement, normalization="layernorm")

        @jax.jit
        def rms(key, x, model=model):
            h0, links = model.links(started(model, key, x), x)
            seen = step.signals(links, h0, loss=lambda logits: jnp.sum(jnp.square(logits)))
            return jnp.exp(seen.log_activation_rms[1:-1])

        states[placement] = np.asarray(rms(key, x))
    # layernorm's epsilon of 1e-6 beside a variance of at least .1
    np.testing.assert_allclose(states["post"][1:], 1.0, rtol=1e-3)
    assert states["pre"][-1] > 3 * states["pre"][0]


def test_positions_differ_from_step_to_step():
    table = np.asarray(positions(50, 16), np.float64)
    assert_rounding(np.square(table).sum(1), np.full(50, 8.0), terms=4 * 16, dtype="f4")
    distance = np.square(table[:, None] - table).sum(-1) + 10 * np.eye(50)
    assert distance.min() > 0.5


@pytest.mark.slow
def test_attention_logits_are_visible_and_judged_when_they_grow(key):
    x = jax.random.normal(key, (8, 6, 3))
    model = transformer(normalization="layernorm")

    @jax.jit
    def sown(key, x):
        variables = started(model, key, x)
        return variables["params"], model.apply(variables, x, mutable=["intermediates"])[1]

    params, seen = sown(key, x)
    (logits,) = seen["intermediates"]["layers"]["attention"]["attention_logits"]
    assert logits.shape == (3, 8, 2, 6, 6)

    def loss(params):
        logits = model.apply({"params": params}, x)
        return training.loss_and_score(logits, jnp.zeros(8, jnp.int32)).loss

    def planted(path, w):
        return w.at[1].multiply(80.0) if "query" in jax.tree_util.keystr(path) else w

    params = jax.tree_util.tree_map_with_path(planted, params)
    findings = gradjax.diagnose(loss, params).findings
    (found,) = (f for f in findings if f.pathology == "attention_logit_growth")
    assert "[1]" in found.where["name"]  # the healthy block before it is not accused
