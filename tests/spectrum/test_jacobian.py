"""Identities that the log singular values of a product must satisfy, and exact references."""

import functools
import subprocess
import sys
import warnings

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import assume, given, settings

from gradjax.core.step import Scan
from gradjax.spectrum.jacobian import (
    jacobian_spectrum,
    log_singular_values,
    lyapunov_exponents,
    moments,
)
from support import data_folder

REFERENCE = "product_svd/reference.npz"
CASES = [
    "gauss_lin_32x200",
    "gauss_tanh15_32x200",
    "orth_tanh_32x200",
    "orth_lin_32x200",
    "gauss_lin_32x24",
]


def rng(seed=0):
    return np.random.default_rng(seed)


DEPTH, N = 12, 8  # one shape for most tests: every other one compiles again


def gaussian(depth=DEPTH, n=N, seed=0, dtype=np.float32):
    return (rng(seed).standard_normal((depth, n, n)) / np.sqrt(n)).astype(dtype)


def orthogonal(n, seed):
    return np.linalg.qr(rng(seed).standard_normal((n, n)))[0]


def descending(x):
    return -np.sort(-np.asarray(x, float))


def multiprecision(factors, digits=400):
    """Log singular values by mpmath; exact to far below 1e-12 where the condition is below
    10^(digits / 2)."""
    with mpmath.workdps(digits):
        product = mpmath.matrix(np.asarray(factors[0], float).tolist())
        for factor in factors[1:]:
            product = mpmath.matrix(np.asarray(factor, float).tolist()) * product
        sigma = mpmath.svd_r(product, compute_uv=False)
        return descending([float(mpmath.log(x)) if x > 0 else -np.inf for x in map(abs, sigma)])


def tanh_step(h, w):
    return jnp.tanh(w @ h)


def naive(factors):
    """What float64 makes of the same question."""
    product = functools.reduce(lambda j, w: w.astype(float) @ j, factors, np.eye(factors.shape[-1]))
    with np.errstate(divide="ignore"):
        return np.log(np.linalg.svd(product, compute_uv=False))


# ---- exact references


@pytest.mark.parametrize("case", CASES)
def test_reference_table(case):
    data = np.load(data_folder(REFERENCE) / REFERENCE)
    values, info = log_singular_values(data[f"{case}_W"], return_info=True)
    assert np.abs(values - data[f"{case}_ref"]).max() < 1e-6
    assert info.trusted and info.undetermined == 0 and info.error_bound < 1e-4


def test_the_reference_table_can_fail():
    """Negative controls: plain float64, and factors perturbed in their last float32 bit."""
    data = np.load(data_folder(REFERENCE) / REFERENCE)
    factors, exact = data["gauss_lin_32x200_W"], data["gauss_lin_32x200_ref"]
    assert np.abs(naive(factors) - exact).max() > 100
    assert (
        np.abs(
            log_singular_values(factors * (1 + 2.0**-23 * rng().choice([-1, 1], factors.shape)))
            - exact
        ).max()
        > 1e-6
    )


@pytest.mark.parametrize(
    "n, depth, dtype", [(N, DEPTH, np.float32), (N, DEPTH, np.float64), (12, 40, np.float32)]
)
def test_multiprecision(n, depth, dtype):
    factors = gaussian(depth, n, seed=n, dtype=dtype)
    assert np.abs(log_singular_values(factors) - multiprecision(factors)).max() < 1e-6


def test_graded_product_where_float64_is_noise():
    factors = gaussian(40, 12, seed=3)
    exact = multiprecision(factors)
    assert exact[0] - exact[-1] > 60
    assert np.abs(log_singular_values(factors) - exact).max() < 1e-6
    assert np.abs(naive(factors) - exact).max() > 1  # the control: the test can fail


@pytest.mark.slow
@settings(max_examples=15)
@given(
    n=st.sampled_from([1, 5, N]), seed=st.integers(0, 2**16), gain=st.sampled_from([1e-9, 1, 1e9])
)
def test_random_sizes(n, seed, gain):
    factors = gaussian(DEPTH, n, seed) * np.float32(gain)
    assume(max(np.linalg.cond(w) for w in factors.astype(float)) < 1e4)
    assert np.abs(log_singular_values(factors) - multiprecision(factors)).max() < 1e-6


def known_product(n, depth, span, noise=0.3, seed=0):
    """Q_L D_L Q_{L-1}^T ... Q_1 D_1 Q_0^T and its log singular values; `span` nats in all."""
    q = [orthogonal(n, seed + i) for i in range(depth + 1)]
    logs = np.linspace(span / 2, -span / 2, n) / depth + noise * rng(seed).standard_normal(
        (depth, n)
    )
    factors = np.stack([q[i + 1] @ np.diag(np.exp(d)) @ q[i].T for i, d in enumerate(logs)])
    return factors, descending(logs.sum(0))


@pytest.mark.parametrize(
    "n", [64, pytest.param(256, marks=pytest.mark.slow), pytest.param(512, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("flip", [False, True])
def test_known_singular_values_at_condition_1e300(n, flip):
    factors, exact = known_product(n, depth=60, span=690.8)
    if flip:
        factors = np.swapaxes(factors[::-1], 1, 2)
    assert exact[0] - exact[-1] > 600
    assert np.abs(log_singular_values(factors) - exact).max() < 1e-6


@pytest.mark.parametrize(
    "logs",
    [
        [0] * 8,
        [5, 5, 5, 0, 0, -5, -5, -5],
        [1e-9, 0, -1e-9, 0, 3, 3, 3, 3],
        [50, 0, 0, 0, 0, 0, 0, -50],
    ],
)
def test_duplicated_and_clustered_values(logs):
    n, depth = N, DEPTH
    q = [orthogonal(n, i) for i in range(depth + 1)]
    d = np.exp(np.array(logs) / depth)
    factors = np.stack([q[i + 1] @ np.diag(d) @ q[i].T for i in range(depth)])
    assert np.abs(log_singular_values(factors) - descending(logs)).max() < 1e-7


# ---- identities


FAMILIES = {
    "gaussian": gaussian(30, 24),
    "orthogonal": np.stack([orthogonal(24, i) for i in range(30)]).astype(np.float32),
    "residual": (np.eye(24) + 0.1 * gaussian(30, 24, 1)).astype(np.float32),
    "saturated": (
        gaussian(30, 24, 2) * np.float32(3) * 10.0 ** -rng(3).uniform(0, 7, (30, 1, 24))
    ).astype(np.float32),
}
family = pytest.mark.parametrize("factors", FAMILIES.values(), ids=FAMILIES.keys())


@pytest.mark.slow
@family
def test_sum_is_log_determinant(factors):
    exact = np.linalg.slogdet(factors.astype(float))[1].sum()
    assert abs(log_singular_values(factors).sum() - exact) < 1e-6


@family
def test_transpose(factors):
    there, back = (
        log_singular_values(factors),
        log_singular_values(np.swapaxes(factors[::-1], 1, 2)),
    )
    assert np.abs(there - back).max() < 2e-6


@family
def test_rotation_of_first_and_last(factors):
    w = factors.astype(float)
    turned = np.concatenate(
        [(w[0] @ orthogonal(24, 7))[None], w[1:-1], (orthogonal(24, 8) @ w[-1])[None]]
    )
    assert np.abs(log_singular_values(turned) - log_singular_values(w)).max() < 2e-6


@family
@pytest.mark.parametrize("c", [1e-30, 3.0, 1e30])
def test_scaling_one_factor(factors, c):
    w = factors.astype(float)
    scaled = w.copy()
    scaled[11] *= c
    assert np.abs(log_singular_values(scaled) - np.log(c) - log_singular_values(w)).max() < 2e-6


@family
def test_order_and_bounds(factors):
    values = log_singular_values(factors)
    assert (np.diff(values) <= 0).all()
    each = log_singular_values(factors[:, None])
    assert values[0] <= each[:, 0].sum() + 1e-9  # ||AB|| <= ||A|| ||B||
    assert values[-1] >= each[:, -1].sum() - 1e-9
    # Horn: the partial sums are submultiplicative too
    assert (np.cumsum(values) <= np.cumsum(each, axis=1).sum(0) + 1e-6).all()


@family
def test_splitting_the_product(factors):
    """Multiplying two neighbours beforehand (exact in float64 up to rounding) changes nothing."""
    w = factors.astype(float)
    merged = np.concatenate([w[:4], (w[5] @ w[4])[None], np.eye(24)[None], w[6:]])
    assert np.abs(log_singular_values(merged) - log_singular_values(w)).max() < 2e-6


@family
def test_tolerance_is_kept(factors):
    tight = log_singular_values(factors, tol=1e-9)
    for tol in (1e-3, 1e-6):
        values, info = log_singular_values(factors, tol=tol, return_info=True)
        assert np.abs(values - tight).max() < tol
        assert info.trusted


# ---- extreme scales and structure


@pytest.mark.parametrize("order", ["random", "ascending", "descending", "permuted"])
def test_diagonal_across_600_decades(order):
    n, depth = N, DEPTH
    logs = rng(1).uniform(-20, 20, (depth, n))
    logs[:, 0], logs[:, 1] = 300 / depth, -300 / depth
    if order in ("ascending", "descending"):
        logs = np.sort(logs, axis=1)[:, :: 1 if order == "ascending" else -1]
    factors = np.stack([np.diag(10.0**d) for d in logs])
    total = logs.sum(0)
    if order == "permuted":
        total, perm = np.zeros(n), np.arange(n)
        for i, d in enumerate(logs):
            total += d[perm]
            shuffle = rng(i).permutation(n)
            factors[i] = factors[i][shuffle]
            perm = np.argsort(shuffle)[perm]
    assert np.abs(log_singular_values(factors) - descending(total * np.log(10))).max() < 1e-9


def test_one_factor_across_600_decades():
    d = 10.0 ** np.linspace(-300, 300, N)
    assert np.abs(log_singular_values(np.diag(d)[None]) - descending(np.log(d))).max() < 1e-9


@pytest.mark.parametrize("gain", [1e-30, 1e30])
def test_float32_gains_at_the_end_of_their_range(gain):
    factors = gaussian()
    scaled = factors * np.float32(gain)
    shift = np.log(scaled.astype(float)[0, 0, 0] / factors[0, 0, 0])
    assert (
        np.abs(log_singular_values(scaled) - DEPTH * shift - log_singular_values(factors)).max()
        < 1e-4
    )


@pytest.mark.parametrize("side", ["rows", "columns", "both"])
def test_graded_factors_keep_their_small_values(side):
    """Saturated units scale rows or columns by 1e-20; the values are determined, and kept."""
    factors = gaussian(dtype=np.float64)
    d = 10.0 ** -np.linspace(0, 20, 8)
    if side != "columns":
        factors[2] *= d[:, None]
    if side != "rows":
        factors[3] *= d[::-1]
    values, info = log_singular_values(factors, return_info=True)
    assert np.abs(values - multiprecision(factors)).max() < 1e-6
    assert info.trusted


@pytest.mark.parametrize("n, depth", [(1, 1), (1, DEPTH), (N, 1)])
def test_smallest_sizes(n, depth):
    factors = gaussian(depth, n, dtype=np.float64) * 1e100
    exact = (
        descending(np.log(np.linalg.svd(factors[0])[1]))
        if depth == 1
        else np.log(np.abs(factors)).sum(0)[0]
    )
    assert np.abs(log_singular_values(factors) - exact).max() < 1e-9


# ---- rank


def test_relu_rank_is_exact():
    depth, n = 30, 24
    alive = rng(2).uniform(size=(depth, n)) < 0.7
    factors = gaussian(depth, n) * alive[:, :, None]
    values, info = log_singular_values(factors, return_info=True)
    assert np.isfinite(values).sum() == alive.sum(1).min()
    assert (values[alive.sum(1).min() :] == -np.inf).all()
    assert info.trusted and info.method == "lu"


def test_relu_values_against_multiprecision():
    depth, n = DEPTH, N
    alive = rng(5).uniform(size=(depth, n)) < 0.8
    factors = gaussian(depth, n) * alive[:, :, None]
    rank = alive.sum(1).min()
    exact = multiprecision(factors)
    values = log_singular_values(factors)
    assert np.isfinite(values).sum() == rank
    assert np.abs(values[:rank] - exact[:rank]).max() < 1e-6


@pytest.mark.parametrize(
    "what",
    ["dead input", "dead unit", "equal columns", "equal rows", "constant", "zero", "two of them"],
)
def test_rank_loss_by_structure(what):
    n = N
    factors = gaussian(dtype=np.float64)
    rank = n - 1
    if what in ("dead input", "two of them"):
        factors[0][:, 2] = 0
    if what in ("dead unit", "two of them"):
        factors[4][3] = 0
    if what == "equal columns":
        factors[4][:, 1] = factors[4][:, 6]
    if what == "equal rows":
        factors[4][1] = factors[4][6]
    if what == "constant":
        factors[4], rank = 1.0, 1
    if what == "zero":
        factors[4], rank = 0.0, 0
    values = log_singular_values(factors)
    assert (values[rank:] == -np.inf).all() and np.isfinite(values[:rank]).all()
    if rank:
        assert np.abs(values[:rank] - multiprecision(factors)[:rank]).max() < 1e-6


def test_unequal_widths():
    shapes = [(7, 4), (8, 7), (6, 8)]
    factors = [rng(i).standard_normal(s) for i, s in enumerate(shapes)]
    exact = np.log(np.linalg.svd(factors[2] @ factors[1] @ factors[0], compute_uv=False))
    assert np.abs(log_singular_values(factors) - exact).max() < 1e-9


def test_bottleneck_is_structural_zero():
    factors = [rng(i).standard_normal(s) for i, s in enumerate([(3, 6), (8, 3), (5, 8)])]
    values = log_singular_values(factors)
    exact = np.log(np.linalg.svd(factors[2] @ factors[1] @ factors[0], compute_uv=False))
    assert values.shape == (5,)
    assert np.abs(values[:3] - exact[:3]).max() < 1e-9 and (values[3:] == -np.inf).all()


# ---- what cannot be known is told


@pytest.mark.slow
def test_nan_and_inf_stay_in_their_lane():
    factors = np.stack([gaussian(seed=i) for i in range(4)])
    clean = log_singular_values(factors)
    broken = factors.copy()
    broken[1, 7, 2, 3], broken[3, 5, 0, 0] = np.nan, np.inf
    with pytest.warns(UserWarning, match="lane 1, layer 7"):
        values, info = log_singular_values(broken, return_info=True)
    assert info.failed_layer.tolist() == [-1, 7, -1, 5]
    assert np.isnan(values[[1, 3]]).all() and not info.trusted[[1, 3]].any()
    assert (values[[0, 2]] == clean[[0, 2]]).all()


def test_a_factor_too_ill_conditioned_warns():
    factors = gaussian(dtype=np.float64)
    factors[5] = orthogonal(N, 0) @ np.diag(10.0 ** -np.linspace(0, 15, N)) @ orthogonal(N, 1)
    with pytest.warns(UserWarning, match="rounding decides"):
        _, info = log_singular_values(factors, return_info=True)
    assert not info.trusted and info.error_bound > 1e-6


def test_there_and_back_warns():
    """A ... A then A^-1 ... A^-1 is the identity, but its rounding is not."""
    a = known_product(N, DEPTH // 2, span=50, seed=3)[0][:, :, ::-1]
    with pytest.warns(UserWarning, match="draw near again"):
        log_singular_values(np.concatenate([a, np.linalg.inv(a)[::-1]]))


@pytest.mark.slow
def test_undetermined_values_are_counted():
    """A matrix of ones, perturbed in the last float32 bit: seven of its values are rounding."""
    factors = np.full((1, 8, 8), np.float32(1) / 3)
    factors = factors * (
        1 + np.float32(2**-23) * rng().integers(0, 2, (1, 8, 8)).astype(np.float32)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, info = log_singular_values(factors, return_info=True)
    assert info.undetermined >= 1


@pytest.mark.parametrize(
    "factors, message",
    [
        ([], "empty"),
        (np.zeros((0, 3, 3)), r"\(0, 3, 3\)"),
        (np.zeros((3, 3)), r"\(3, 3\)"),
        (np.zeros((2, 3, 4)), r"\(2, 3, 4\)"),
        (np.zeros((2, 3, 3), int), "int64"),
        (np.zeros((2, 3, 3), complex), "complex128"),
        ([np.zeros((3, 4)), np.zeros((3, 4))], r"factor 1 is \(3, 4\)"),
        ([np.zeros((3, 4, 4))], r"\(3, 4, 4\)"),
    ],
)
def test_bad_factors(factors, message):
    with pytest.raises(ValueError, match=message):
        log_singular_values(factors)


@pytest.mark.parametrize("tol", [0.0, 1e-12, 1.0, -1e-6, float("nan")])
def test_bad_tolerance(tol):
    with pytest.raises(ValueError, match="tol is"):
        log_singular_values(np.eye(2)[None], tol=tol)


# ---- lanes, tracers, devices


def test_batch_is_a_loop():
    factors = np.stack([[gaussian(seed=3 * i + j) for j in range(3)] for i in range(2)])
    together, info = log_singular_values(factors, return_info=True)
    alone = np.stack([[log_singular_values(f) for f in row] for row in factors])
    assert together.shape == (2, 3, 8) and info.method.shape == (2, 3)
    assert (together == alone).all()


def test_numpy_jax_and_half_precision_inputs():
    factors = gaussian()
    assert (log_singular_values(factors) == log_singular_values(jnp.asarray(factors))).all()
    half = jnp.asarray(factors, jnp.bfloat16)
    assert (log_singular_values(half) == log_singular_values(np.asarray(half, np.float32))).all()
    assert log_singular_values(half).dtype == np.float64


@pytest.mark.slow
@pytest.mark.parametrize(
    "n", [pytest.param(1, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow), N]
)
def test_on_tracers(n):
    factors = jnp.asarray(np.stack([gaussian(DEPTH, n, i) for i in range(3)]))
    exact = log_singular_values(factors)
    jitted = jax.jit(log_singular_values)(factors)
    mapped = jax.vmap(log_singular_values)(factors)
    assert jitted.dtype == jnp.float32
    assert np.abs(jitted - exact).max() < 1e-3 and np.abs(mapped - exact).max() < 1e-3


@pytest.mark.parametrize("case", CASES[:4])
def test_on_tracers_against_reference(case):
    data = np.load(data_folder(REFERENCE) / REFERENCE)
    values = jax.jit(log_singular_values)(jnp.asarray(data[f"{case}_W"]))
    perturbed = np.abs(data[f"{case}_pert"] - data[f"{case}_ref"]).max()
    assert np.abs(values - data[f"{case}_ref"]).max() < max(30 * perturbed, 1e-4)


def test_on_tracers_rank_and_nan():
    alive = rng(2).uniform(size=(DEPTH, N)) < 0.8
    factors = (gaussian() * alive[:, :, None]).astype(np.float32)
    values = jax.jit(log_singular_values)(jnp.asarray(factors))
    exact = log_singular_values(factors)
    assert (np.isfinite(values) == np.isfinite(exact)).all()
    assert np.abs(np.asarray(values) - exact)[np.isfinite(exact)].max() < 1e-3
    factors[3, 0, 0] = np.nan
    assert np.isnan(jax.jit(log_singular_values)(jnp.asarray(factors))).all()


def test_derivative_refuses_by_name():
    with pytest.raises(
        NotImplementedError, match=r"log_singular_values has no derivative.*lyapunov_exponents"
    ):
        jax.grad(lambda w: log_singular_values(w).sum())(jnp.asarray(gaussian(4, 3)))


SHARDED = """
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from gradjax.spectrum import log_singular_values
w = np.random.default_rng(0).standard_normal((4, 12, 8, 8)).astype(np.float32)
mesh = Mesh(np.array(jax.devices()), ("seed",))
sharded = jax.device_put(w, NamedSharding(mesh, PartitionSpec("seed")))
assert len(sharded.sharding.device_set) == 2
assert np.abs(log_singular_values(sharded) - log_singular_values(w)).max() < 1e-9
"""


@pytest.mark.slow
def test_factors_sharded_over_devices():
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


# ---- steps


def layer_products(step, h, thetas):
    """The layer Jacobians by jacfwd in a plain loop: an independent path."""
    jacobians = []
    for theta in thetas:
        jacobians.append(np.asarray(jax.jacfwd(step)(h, theta)))
        h = step(h, theta)
    return np.stack(jacobians)


@pytest.mark.slow
def test_step_is_its_layer_jacobians():
    weights, h = jnp.asarray(1.5 * gaussian()), jnp.ones(N)
    found = jacobian_spectrum(tanh_step, h, weights, layers=True)
    factors = layer_products(tanh_step, h, weights)
    assert found.log_singular_values.shape == (N,) and found.log_singular_values.dtype == np.float64
    assert (
        np.abs(found.log_singular_values - log_singular_values(factors)).max() < 1e-3
    )  # float32 Jacobians
    assert found.layer_log_singular_values.shape == (DEPTH, N)
    each = np.log(np.linalg.svd(factors.astype(float), compute_uv=False))
    assert np.abs(found.layer_log_singular_values - each).max() < 1e-3
    gain = 0.5 * np.log((factors.astype(float) ** 2).sum((1, 2)) / N)
    assert found.log_gain.shape == (DEPTH,) and np.abs(found.log_gain - gain).max() < 1e-5
    assert found.condition_nats == pytest.approx(
        found.log_singular_values[0] - found.log_singular_values[-1]
    )


@pytest.mark.slow
def test_pytree_state_and_thetas():
    """An LSTM-like cell: the state is a dict, theta holds an input and a gate."""

    def cell(state, theta):
        c = jax.nn.sigmoid(theta["gate"]) * state["c"] + jnp.tanh(theta["w"] @ state["h"])
        return {"c": c, "h": jnp.tanh(c)}

    thetas = {
        "w": jnp.asarray(gaussian(10, 5)),
        "gate": jnp.asarray(rng().standard_normal((10, 5)), jnp.float32),
    }
    h0 = {"c": jnp.ones(5), "h": jnp.zeros(5)}
    found = jacobian_spectrum(cell, h0, thetas)
    assert found.log_singular_values.shape == (10,)
    assert np.isfinite(found.log_singular_values[:5]).all()


@pytest.mark.slow
def test_keys_as_thetas_are_the_weights_they_draw():
    keys = jax.random.split(jax.random.key(1), DEPTH)
    draw = lambda key: jax.random.normal(key, (N, N)) / np.float32(np.sqrt(N))
    found = jacobian_spectrum(lambda h, key: draw(key) @ h, jnp.ones(N), keys)
    assert (
        np.abs(found.log_singular_values - log_singular_values(jax.vmap(draw)(keys))).max() < 1e-4
    )


@pytest.mark.slow
def test_the_step_keeps_its_dtypes_and_draws():
    """Inside x64, jnp.zeros, random.normal and a dropout mask would all be others; here they are
    not."""
    seen = []

    def step(h, key):
        noise = jax.random.normal(key, h.shape)
        mask = jax.random.bernoulli(key, 0.9, h.shape)
        seen.append((jnp.zeros(3).dtype, noise.dtype, h.dtype, jnp.arange(3).dtype))
        return jnp.where(
            mask,
            jnp.tanh(noise[:, None] * jnp.outer(noise, h).T.sum(1, keepdims=True)).sum(1) + h,
            0 * h,
        )

    keys = jax.random.split(jax.random.key(2), DEPTH)
    found = jacobian_spectrum(step, jnp.ones(N), keys)
    assert {tuple(map(str, kinds)) for kinds in seen} == {
        ("float32", "float32", "float32", "int32")
    }
    exact = log_singular_values(layer_products(step, jnp.ones(N), keys))
    assert (np.isfinite(found.log_singular_values) == np.isfinite(exact)).all()


def test_the_gradient_that_training_sees():
    """A custom_vjp step gives the Jacobian of its backward pass."""

    @jax.custom_vjp
    def straight_through(x):
        return jnp.sign(x)

    straight_through.defvjp(lambda x: (jnp.sign(x), None), lambda _, g: (2 * g,))
    weights = jnp.asarray(gaussian())
    found = jacobian_spectrum(lambda h, w: straight_through(w @ h), jnp.ones(N), weights)
    assert (
        np.abs(found.log_singular_values - DEPTH * np.log(2) - log_singular_values(weights)).max()
        < 1e-5
    )


@pytest.mark.slow
def test_lanes_of_inputs_and_of_seeds():
    weights = jnp.asarray(np.stack([1.2 * gaussian(seed=i) for i in range(3)]))
    inputs = jnp.asarray(rng().standard_normal((3, N)), jnp.float32)
    both = jacobian_spectrum(tanh_step, inputs, weights, in_axes=(0, 0), layers=True)
    one_net = jacobian_spectrum(tanh_step, inputs, weights[0], in_axes=(0, None))
    one_input = jacobian_spectrum(tanh_step, inputs[0], weights, in_axes=(None, 0))
    for found, pick in (
        (both, lambda i: (i, i)),
        (one_net, lambda i: (i, 0)),
        (one_input, lambda i: (0, i)),
    ):
        assert found.log_singular_values.shape == (3, N) and found.log_gain.shape == (3, DEPTH)
        assert found.condition_nats.shape == (3,)
        for lane in range(3):
            i, j = pick(lane)
            alone = jacobian_spectrum(tanh_step, inputs[i], weights[j], layers=True)
            assert np.abs(found.log_singular_values[lane] - alone.log_singular_values).max() < 1e-4
            if found is both:
                assert found.layer_log_singular_values.shape == (3, DEPTH, N)
                each = found.layer_log_singular_values[lane] - alone.layer_log_singular_values
                assert np.abs(each).max() < 1e-4


def test_links_are_the_scan():
    weights, h = jnp.asarray(1.2 * gaussian()), jnp.ones(N)
    scanned = jacobian_spectrum(tanh_step, h, weights, layers=True)
    linked = jacobian_spectrum([(tanh_step, w) for w in weights], h, layers=True)
    for a, b in zip(scanned[:4], linked[:4], strict=True):
        assert np.abs(a - b).max() < 1e-4


@pytest.mark.slow
def test_links_of_unequal_width_and_stacks():
    embed, readout = (
        jnp.asarray(rng(1).standard_normal((N, 3)), jnp.float32),
        jnp.asarray(gaussian(1)[0, :2]),
    )
    links = [
        (tanh_step, embed),
        Scan(tanh_step, jnp.asarray(gaussian(4, N))),
        (lambda h, w: w @ h, readout),
    ]
    found = jacobian_spectrum(links, jnp.ones(3), layers=True)
    assert found.log_singular_values.shape == (2,) and found.log_gain.shape == (6,)
    assert np.isfinite(found.layer_log_singular_values).sum(1).tolist() == [3, N, N, N, N, 2]
    lanes = jacobian_spectrum(links, jnp.ones((4, 3)), in_axes=(0, None)).log_singular_values
    assert lanes.shape == (4, 2)
    assert np.abs(lanes - found.log_singular_values).max() < 1e-4


@pytest.mark.slow
def test_step_on_tracers():
    weights, inputs = (
        jnp.asarray(1.2 * gaussian()),
        jnp.asarray(rng().standard_normal((3, N)), jnp.float32),
    )
    host = jacobian_spectrum(tanh_step, inputs, weights, in_axes=(0, None), layers=True)
    traced = jax.jit(jax.vmap(lambda h: jacobian_spectrum(tanh_step, h, weights, layers=True)))(
        inputs
    )
    assert traced.info is None
    for a, b in zip(host[:4], traced[:4], strict=True):
        assert a.shape == b.shape and np.abs(a - np.asarray(b)).max() < 1e-3


def test_rank_loss_is_infinite_condition():
    weights = jnp.asarray(gaussian() * (np.arange(N) > 0)[:, None])
    assert jacobian_spectrum(lambda h, w: w @ h, jnp.ones(N), weights).condition_nats == np.inf


def test_activations_that_overflow_are_named():
    weights = jnp.broadcast_to(1e10 * jnp.eye(4), (8, 4, 4))
    with pytest.warns(UserWarning, match="layer 2"):  # h is 1, 1e10, inf
        found = jacobian_spectrum(
            lambda h, w: (w @ h) * jnp.abs(w @ h) / jnp.float32(1e10), jnp.ones(4), weights
        )
    assert np.isnan(found.log_singular_values).all() and np.isnan(found.condition_nats)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"in_axes": (1, None)}, "in_axes"),
        ({"in_axes": (0, 0), "h0": jnp.ones((3, 4))}, "leading lengths"),
        ({"h0": jnp.ones(4, int)}, "floating"),
        ({"step": lambda h, w: (w @ h)[:2]}, r"\(2,\)"),
        ({"thetas": {}}, "no leaves"),
        ({"tol": 5.0}, "tol is"),
    ],
)
def test_bad_steps(kwargs, message):
    arguments = {
        "step": tanh_step,
        "h0": jnp.ones(4),
        "thetas": jnp.asarray(gaussian(5, 4)),
    } | kwargs
    with pytest.raises(ValueError, match=message):
        jacobian_spectrum(**arguments)


def test_a_second_call_does_not_compile():
    weights, h = jnp.asarray(gaussian()), jnp.ones(N)
    jacobian_spectrum(tanh_step, h, weights)
    with jax.log_compiles(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "make_jaxpr", lambda *a, **k: pytest.fail("the step was traced again"))
        jacobian_spectrum(tanh_step, 2 * h, weights + 1)


# ---- Lyapunov exponents and moments


def test_exponents_of_commuting_factors():
    logs = descending(rng(1).standard_normal(5))
    factors = np.stack([np.diag(np.exp(logs))] * 30)
    found = lyapunov_exponents(factors)
    assert (
        np.abs(found.exponents - logs).max() < 1e-12 and np.abs(found.standard_errors).max() < 1e-12
    )


def test_exponents_sum_to_log_determinant():
    factors = np.stack([gaussian(40, 6, i) for i in range(2)])
    found = lyapunov_exponents(factors)
    assert found.exponents.shape == (2, 6) and found.exponents.dtype == np.float64
    assert (
        np.abs(found.exponents.sum(-1) - np.linalg.slogdet(factors.astype(float))[1].mean(-1)).max()
        < 1e-12
    )


@pytest.mark.slow
def test_newman_exponents():
    """Formula of Newman 1986; the joint chi-squared over all exponents, and a gain 1% off as the
    control."""
    from scipy.special import digamma, polygamma
    from scipy.stats import chi2

    n, depth = 8, 4000
    factors = rng(4).standard_normal((depth, n, n)) / np.sqrt(n)
    i = np.arange(1, n + 1)
    exact = 0.5 * (np.log(2 / n) + digamma((n - i + 1) / 2))
    error = np.sqrt(polygamma(1, (n - i + 1) / 2) / (4 * depth))
    for values in (log_singular_values(factors) / depth, lyapunov_exponents(factors).exponents):
        assert chi2.sf((((values - exact) / error) ** 2).sum(), n) > 1e-3
        assert chi2.sf((((values + 0.01 - exact) / error) ** 2).sum(), n) < 1e-3
    reported = lyapunov_exponents(factors).standard_errors
    assert (reported / error < 2).all() and (reported / error > 0.5).all()


def test_exponents_differentiate():
    with jax.enable_x64(True):
        factors = jnp.asarray(np.eye(4) + 0.3 * gaussian(6, 4, dtype=np.float64))
        direction = jnp.asarray(rng(9).standard_normal(factors.shape))
        weights = jnp.arange(1.0, 5.0)
        f = lambda t: jnp.sum(weights * lyapunov_exponents(factors + t * direction).exponents ** 2)
        slope = jax.jit(jax.grad(f))(0.0)
        differences = [(jax.jit(f)(e) - jax.jit(f)(-e)) / (2 * e) for e in (1e-4, 1e-5)]
        assert abs(slope - differences[1]) < 1e-7 * (1 + abs(slope))
        assert jnp.isfinite(jax.jit(jax.grad(jax.grad(f)))(0.0))


def test_exponents_refuse_unequal_widths():
    with pytest.raises(ValueError, match="square"):
        lyapunov_exponents([np.zeros((3, 4)), np.zeros((2, 3))])


@pytest.mark.parametrize("gain", [1e-20, 1.0, 1e20])
def test_moments_are_those_of_the_singular_values(gain):
    factors = gaussian() * np.float32(gain)
    values = log_singular_values(factors)
    found = moments(factors, (1, 2, 5))
    exact = [mpmath.log(sum(mpmath.exp(2 * k * v) for v in values) / 8) for k in (1, 2, 5)]
    assert np.abs(found - np.array(exact, float)).max() < 1e-5 * max(1, np.log10(gain) ** 2)
    assert moments(factors, 2) == pytest.approx(found[1])
    traced = jax.jit(lambda w: moments(w, (1, 2, 5)))(factors)
    assert traced.dtype == jnp.float32 and np.abs(traced / found - 1).max() < 1e-4


def test_moments_differentiate_and_take_unequal_widths():
    with jax.enable_x64(True):
        factors = [jnp.asarray(rng(i).standard_normal(s)) for i, s in enumerate([(5, 3), (4, 5)])]
        j = factors[1] @ factors[0]
        assert moments(factors, 1) == pytest.approx(float(jnp.log(jnp.sum(j * j) / 4)), abs=1e-12)
        f = lambda t: moments([factors[0] * (1 + t), factors[1]], 2)
        assert jax.jit(jax.grad(f))(0.0) == pytest.approx(4.0)  # the second moment is of degree 4


def test_moments_of_zero_and_bad_k():
    assert moments(np.zeros((3, 2, 2)), 1) == -np.inf
    with pytest.raises(ValueError, match="k is 0"):
        moments(np.zeros((3, 2, 2)), 0)


# ---- the large ones


@pytest.mark.slow
def test_depth_ten_thousand():
    """Keys as thetas: no weight is held; Newman's exponents are not rejected."""
    from scipy.special import digamma, polygamma
    from scipy.stats import chi2

    n, depth = 64, 10_000
    step = lambda h, key: jax.random.normal(key, (n, n)) @ h / np.float32(np.sqrt(n))
    found = jacobian_spectrum(step, jnp.zeros(n), jax.random.split(jax.random.key(3), depth))
    i = np.arange(1, n + 1)
    exact = 0.5 * (np.log(2 / n) + digamma((n - i + 1) / 2))
    z = (found.log_singular_values / depth - exact) / np.sqrt(
        polygamma(1, (n - i + 1) / 2) / (4 * depth)
    )
    assert chi2.sf((z**2).sum(), n) > 1e-3 and found.info.trusted
