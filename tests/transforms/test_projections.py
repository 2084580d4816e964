"""Projections reach their constraint and are then the identity; penalties are their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transforms.stepping import GRADS, PARAMS, run

from gradjax.transforms import projections, schedules

RNG = np.random.default_rng(0)
KERNELS = {
    "dense": 3 * RNG.standard_normal((6, 5)),
    "conv": 3 * RNG.standard_normal((3, 3, 4, 5)),
    "layers": np.array([1e-3, 1.0, 1e15])[:, None, None] * RNG.standard_normal((3, 6, 6)),
}


def is_stack(path):
    return "layers" in path


def unit_norms(w, stacked):
    return np.sqrt((w**2).sum(1 if stacked else tuple(range(w.ndim - 1))))


def singular(w, stacked):
    return np.linalg.norm(w if stacked else w.reshape(-1, w.shape[-1]), 2, axis=(-2, -1))


CONSTRAINTS = {
    "weight_clip": (projections.weight_clip(0.7), lambda w, _: np.abs(w), 1),
    "max_norm": (projections.max_norm(0.7, is_stack), unit_norms, 1),
    "spectral_norm": (projections.spectral_norm(0.7, 20, is_stack), singular, 12),
}


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_projection_reaches_its_constraint_and_is_then_the_identity(name, dtype):
    tx, measure, num_steps = CONSTRAINTS[name]
    kernels = KERNELS if dtype == jnp.float32 else {"layers": KERNELS["layers"]}
    params = {k: jnp.asarray(w.astype(dtype)) for k, w in kernels.items()}
    zeros = {k: jnp.zeros_like(w) for k, w in params.items()}
    # p + (P(p) - p) is P(p) to a rounding of p: two steps where p is 1e15
    projected, _ = run(tx, [zeros] * (num_steps + 1), params)
    eps = float(jnp.finfo(dtype).eps)
    slack = 2e-3 if name == "spectral_norm" else 0.0
    for key, w in projected.items():
        found = measure(np.asarray(w, np.float64), is_stack(key)).max()
        assert found <= 0.7 * (1 + slack) + 8 * eps
        assert found >= 0.6, "projected onto, not into"
    again, _ = run(tx, [zeros] * (num_steps + 1), projected)
    for key, w in projected.items():
        rtol = 1e-2 if name == "spectral_norm" else 4 * eps
        np.testing.assert_allclose(
            np.asarray(again[key], np.float64), np.asarray(w, np.float64), rtol=rtol
        )
    first = (np.asarray(tree["layers"], np.float64)[0] for tree in (projected, params))
    np.testing.assert_array_equal(*first)  # the layer inside the bound is never touched


def test_proximal_l1_is_the_soft_threshold_and_makes_exact_zeros():
    params = {"w": jnp.array([1.0, -1.0, 0.1, 0.0])}
    grads = {"w": jnp.array([0.5, 0.5, 0.1, 0.0])}
    rate = schedules.piecewise_constant_schedule(0.1, {1: 0.5})
    tx = optax.chain(optax.sgd(0.1), projections.proximal_l1(2.0, rate))
    out, _ = run(tx, [grads], params)
    np.testing.assert_allclose(out["w"], [0.75, -0.85, 0.0, 0.0], atol=1e-6)
    assert out["w"][2] == 0
    # the schedule halves the threshold
    out, _ = run(tx, [grads, jax.tree.map(jnp.zeros_like, grads)], params)
    np.testing.assert_allclose(out["w"], [0.65, -0.75, 0.0, 0.0], atol=1e-6)


def test_coupled_l1_adds_the_subgradient():
    tx, params = projections.add_l1(0.5), {"w": jnp.array([2.0, -2.0, 0.0])}
    updates, _ = tx.update({"w": jnp.ones(3)}, tx.init(params), params)
    np.testing.assert_array_equal(updates["w"], [1.5, 0.5, 1.0])


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: projections.weight_clip(-1.0), r"max_delta is -1\.0; a number in \[0, inf\]"),
        (lambda: projections.max_norm(jnp.nan), r"max_norm: limit is nan"),
        (lambda: projections.spectral_norm(0.0), r"limit is 0\.0; a number in \(0, inf\]"),
        (lambda: projections.spectral_norm(1.0, 0), r"num_steps is 0; an integer in \[1, inf\]"),
        (lambda: projections.proximal_l1(-1.0, 0.1), r"strength is -1\.0"),
        (lambda: projections.add_l1(-1.0), r"strength is -1\.0"),
    ],
)
def test_bad_input_is_refused_with_the_value_and_the_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


NEED_PARAMS = {
    "weight_clip": projections.weight_clip(0.7),
    "max_norm": projections.max_norm(0.7),
    "spectral_norm": projections.spectral_norm(0.7),
    "proximal_l1": projections.proximal_l1(0.3, 0.5),
    "add_l1": projections.add_l1(0.3),
}


@pytest.mark.parametrize("name", NEED_PARAMS)
def test_rules_that_need_the_parameters_say_so(name):
    tx = NEED_PARAMS[name]
    with pytest.raises(ValueError, match=rf"{name}: .*update\(\w+, state, params\)"):
        tx.update(GRADS, jax.eval_shape(tx.init, PARAMS))
