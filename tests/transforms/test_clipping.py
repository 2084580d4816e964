"""Rules that clip without a memory, beside Optax's, and layer by layer.

The contract of all rules is in test_rule.py.
"""

import importlib.util

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradjax import transforms as T
from support import ROOT

# Layers of a stack


def in_layers(path):
    return "layers" in path


STACKED = {
    "clip_by_layer_norm": lambda s: T.clip_by_layer_norm(9.0, s),
    "clip_by_block_rms": lambda s: T.clip_by_block_rms(9.0, s),
    "adaptive_grad_clip": lambda s: T.adaptive_grad_clip(9.0, stacked=s),
    "adagc": lambda s: T.adagc(9.0, warmup_steps=0, stacked=s),
}


@pytest.mark.parametrize("name", STACKED)
def test_an_exploding_layer_leaves_the_others_untouched(name):
    params = {"head": jnp.ones((2, 2)), "layers": jnp.ones((5, 3, 2))}
    rng = np.random.default_rng(0)
    calm = {k: np.float32(rng.uniform(0.2, 1, x.shape)) for k, x in params.items()}
    wild = {k: x.copy() for k, x in calm.items()}
    wild["layers"][2] *= 1e30

    def changed(stacked):
        tx = STACKED[name](stacked)
        _, state = tx.update(calm, tx.init(params), params)
        out, state = tx.update(wild, state, params)
        return (np.asarray(out["layers"]) != wild["layers"]).any((1, 2)), out["head"], state

    layers, head, state = changed(in_layers)
    assert layers.tolist() == [False, False, True, False, False]
    np.testing.assert_array_equal(head, wild["head"])
    seen = T.telemetry(state)[f"0.{name}/clipped/['layers']"]
    assert (seen > 0).tolist() == layers.tolist()
    if name == "clip_by_layer_norm":
        assert changed(None)[0].all(), "the control: as one leaf all layers are clipped"


def test_layers_are_normalised_one_by_one():
    x = {"layers": jnp.array([[3.0, -4.0], [3e30, 4e30], [0.0, 0.0]])}
    tx = T.normalize_by_norm(10.0, per_layer=True, stacked=True)
    out, state = tx.update(x, tx.init(x))
    np.testing.assert_allclose(out["layers"], [[6, -8], [6, 8], [0, 0]], rtol=1e-6)
    assert T.telemetry(state)["0.normalize_by_norm/clipped/['layers']"].tolist() == [1, 1, 0]


# Beside Optax

KERNELS = {"vector": (5,), "dense": (4, 3), "heads": (4, 2, 3), "conv": (3, 3, 2, 4)}
OPTAX = {
    "clip": (T.clip(0.5), optax.clip(0.5)),
    "clip_by_global_norm": (T.clip_by_global_norm(0.5), optax.clip_by_global_norm(0.5)),
    "clip_by_block_rms": (T.clip_by_block_rms(0.5), optax.clip_by_block_rms(0.5)),
    "adaptive_grad_clip": (T.adaptive_grad_clip(0.05), optax.adaptive_grad_clip(0.05)),
    "normalize_by_norm": (T.normalize_by_norm(3.0), optax.normalize_by_update_norm(3.0, eps=0.0)),
}


@pytest.mark.parametrize("name", OPTAX)
def test_optax_has_the_same_rule_where_it_is_right(name):
    rng = np.random.default_rng(0)
    tree = lambda size: {k: np.float32(rng.standard_normal(s) * size) for k, s in KERNELS.items()}
    params, (ours, theirs) = tree(1.0), OPTAX[name]
    both = jax.jit(
        lambda grads: [tx.update(grads, tx.init(params), params)[0] for tx in (ours, theirs)]
    )
    for size in (1e-8, 0.3, 1.0, 1e8):
        chex.assert_trees_all_close(*both(tree(size)), rtol=2e-6)
    kept, lost = both(tree(1e20))
    assert all(np.all(np.asarray(x) != 0) for x in jax.tree.leaves(kept))
    if name != "clip":
        is_zero = [np.all(np.asarray(x) == 0) for x in jax.tree.leaves(lost)]
        assert all(is_zero), "the control: Optax's update is zero"


def test_the_axes_of_a_unit_are_those_of_a_layer_too():
    grads = np.float32(np.random.default_rng(0).standard_normal((2, 2, 2, 3, 4)))
    params = {"kernel": jnp.ones(grads.shape)}

    def clipped(axis, stacked):
        tx = T.adaptive_grad_clip(0.5, axis=axis, stacked=stacked)
        return np.asarray(tx.update({"kernel": grads}, tx.init(params), params)[0]["kernel"])

    for axis, stacked, over in (((0, 1, 2), None, (0, 1, 2)), ((0, -2), True, (1, 3))):
        norms = np.sqrt(np.sum(np.square(grads), axis=over, keepdims=True))
        limit = 0.5 * np.sqrt(grads.size / norms.size)
        np.testing.assert_allclose(
            clipped(axis, stacked), grads * np.minimum(1, limit / norms), rtol=1e-6
        )
    with pytest.raises(ValueError, match=r"axis is 5, which a leaf .* of shape \(2, 2, 3, 4\)"):
        T.adaptive_grad_clip(0.5, axis=5, stacked=True).init(params)


def test_examples_are_clipped_one_by_one_and_averaged():
    rng, params = np.random.default_rng(0), {"w": np.zeros((3, 2)), "b": np.zeros(())}
    size = np.array([1e-3, 0.1, 1e3, 1e20, 3e38])
    column = lambda x, p: x.reshape((5,) + (1,) * p.ndim)
    grads = {
        k: np.float32(rng.uniform(-0.5, 0.5, (5, *p.shape)) * column(size, p))
        for k, p in params.items()
    }
    square = lambda g: np.sum(np.square(g.astype(np.float64).reshape(5, -1)), 1)
    norms = np.sqrt(sum(square(g) for g in grads.values()))
    tx = T.per_example_clip(0.7)
    state = tx.init({k: jnp.zeros(p.shape) for k, p in params.items()})
    out, state = tx.update(grads, state)
    for k, g in grads.items():
        factor = column(np.minimum(1, 0.7 / norms), params[k])
        np.testing.assert_allclose(out[k], np.mean(g.astype(float) * factor, 0), rtol=1e-6)
    seen = T.telemetry(state)
    assert seen["0.per_example_clip/clipped"] == np.float32(3 / 5)
    largest = seen["0.per_example_clip/log2_norm"]
    np.testing.assert_allclose(largest, np.log2(norms.max()), rtol=1e-6)
    tame = {k: g[[0, 1, 2, 2, 1]] for k, g in grads.items()}
    theirs, _ = jax.jit(optax.per_example_global_norm_clip)(jax.tree.leaves(tame), 0.7)
    ours = jax.tree.leaves(tx.update(tame, state)[0])
    chex.assert_trees_all_close(ours, [x / 5 for x in theirs], rtol=1e-6)
    with pytest.raises(ValueError, match="leading axis"):
        tx.update({k: jnp.zeros(p.shape) for k, p in params.items()}, state)


def test_a_gradient_of_1e20_is_lost_in_the_clipping_of_optax():
    grads = np.full(4, 20.0, np.float32)
    grads[0] = 1e20
    clipped = lambda tx: np.asarray(tx.update(grads, tx.init(grads))[0])
    assert not np.any(clipped(optax.clip_by_global_norm(1.0))), "the whole step is zero"
    np.testing.assert_allclose(clipped(T.clip_by_global_norm(1.0))[0], 1.0, rtol=1e-6)


# Training


def train(transforms):
    """Distance to the minimum of (x - 20)^2 / 2 after each of 5,000 steps, per transform.

    One of the gradients has an entry of 1e20.
    """

    def run(tx):
        def step(carry, t):
            params, state = carry
            grads = params - 20.0
            grads = jnp.where(t == 100, grads.at[0].set(1e20), grads)
            updates, state = tx.update(grads, state, params)
            return (params + updates, state), jnp.abs(params - 20.0)

        params = jnp.zeros(4)
        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(5000))[1]

    with jax.numpy_dtype_promotion("standard"):  # Adam's bias correction promotes
        return np.asarray(jax.jit(lambda: [run(tx) for tx in transforms])())


def test_one_gradient_of_1e20_freezes_a_parameter_with_optax_and_not_with_ours():
    adam = optax.adam(1e-2)
    ours = optax.chain(T.clip_by_global_norm(1.0), adam)
    *frozen, distance = train([adam, optax.apply_if_finite(adam, 5), ours])
    for control in frozen:
        assert np.all(control[110:, 0] > 15) and np.ptp(control[1000:, 0]) == 0, "frozen for good"
        assert np.all(control[-1, 1:] < 0.1), "the others are not"
    assert np.all(distance[-1] < 0.1)


@pytest.mark.slow
def test_with_each_of_our_rules_it_trains_on():
    adam = optax.adam(1e-2)
    rules = [T.clip(1.0), T.autoclip(), T.zclip(), T.adagc(), T.historical_clip()]
    distance = train([optax.chain(rule, adam) for rule in rules] + [T.spam(adam)])
    assert np.all(distance[:, -1] < 0.1)


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: T.clip(-1.0), r"clip: max_delta is -1.0; a number in \[0, inf\]"),
        (lambda: T.clip_by_global_norm(float("nan")), "max_norm is nan"),
        (lambda: T.normalize_by_norm(-1.0), "scale_factor is -1.0"),
        (lambda: T.normalize_by_norm(stacked=True), "per_layer=True"),
        (lambda: T.per_example_clip(-2.0), "max_norm is -2.0"),
    ],
)
def test_a_number_out_of_range_is_refused_with_its_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_threshold_from_the_parameters_needs_them():
    params = {"a": jnp.ones(2)}
    tx = T.adaptive_grad_clip(0.1)
    with pytest.raises(ValueError, match="depends on the parameters"):
        tx.update(params, jax.eval_shape(tx.init, params))


# The grid


@pytest.mark.slow
def test_no_rule_of_ours_fails_silently_on_the_grid():
    path = ROOT / "benchmarks" / "grid_transforms.py"
    spec = importlib.util.spec_from_file_location("grid_transforms", path)
    grid = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(grid)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # for Optax's
        rows = grid.grid()
    assert grid.silent(rows, "ours") == 0
    assert grid.silent([row for row in rows if row["optax"]], "optax") > 150, "the control"
