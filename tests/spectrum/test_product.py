"""The stabilised product: exact references, identities, extreme scales, rank."""

import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given, settings
from products import (
    DEPTH,
    N,
    descending,
    gaussian,
    known_product,
    multiprecision,
    naive,
    orthogonal,
    rng,
)

from gradjax.spectrum.jacobian import log_singular_values
from support import data_folder

REFERENCE = "product_svd/reference.npz"
CASES = ["gauss_lin_32x200", "gauss_tanh15_32x200", "orth_tanh_32x200", "orth_lin_32x200"]


# Exact references


@pytest.mark.parametrize("case", [*CASES, pytest.param("gauss_lin_32x24", marks=pytest.mark.slow)])
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
    perturbed = factors * (1 + 2.0**-23 * rng().choice([-1, 1], factors.shape))
    perturbed = perturbed.astype(np.float32)
    assert np.abs(log_singular_values(perturbed) - exact).max() > 1e-6


@pytest.mark.parametrize("dtype", [np.float64, pytest.param(np.float32, marks=pytest.mark.slow)])
def test_multiprecision(dtype):
    factors = gaussian(seed=N, dtype=dtype)
    assert np.abs(log_singular_values(factors) - multiprecision(factors)).max() < 1e-6


@pytest.mark.slow
def test_graded_product_where_float64_is_noise():
    factors = gaussian(40, 12, seed=3, dtype=np.float32)
    exact = multiprecision(factors)
    assert exact[0] - exact[-1] > 60
    assert np.abs(log_singular_values(factors) - exact).max() < 1e-6
    # the control: the test can fail
    assert np.abs(naive(factors) - exact).max() > 1


@pytest.mark.slow
@settings(max_examples=15)
@given(
    n=st.sampled_from([1, 5, N]), seed=st.integers(0, 2**16), gain=st.sampled_from([1e-9, 1, 1e9])
)
def test_random_sizes(n, seed, gain):
    factors = gaussian(DEPTH, n, seed, np.float32) * np.float32(gain)
    assume(max(np.linalg.cond(w) for w in factors.astype(float)) < 1e4)
    assert np.abs(log_singular_values(factors) - multiprecision(factors)).max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("n", [64, 256])
def test_known_singular_values_at_condition_1e300(n):
    factors, exact = known_product(n, depth=60, span=690.8)
    assert exact[0] - exact[-1] > 600
    for w in (factors, np.swapaxes(factors[::-1], 1, 2)):
        assert np.abs(log_singular_values(w) - exact).max() < 1e-6


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
    q = [orthogonal(N, i) for i in range(DEPTH + 1)]
    d = np.exp(np.array(logs) / DEPTH)
    factors = np.stack([q[i + 1] @ np.diag(d) @ q[i].T for i in range(DEPTH)])
    assert np.abs(log_singular_values(factors) - descending(logs)).max() < 1e-7


# Identities, for all families and variants as the lanes of one program

LONG, WIDE = 60, 24
SCALES = (1e-30, 3.0, 1e30)
FAMILIES = {
    "gaussian": gaussian(LONG, WIDE),
    "orthogonal": np.stack([orthogonal(WIDE, i) for i in range(LONG)]),
    "residual": np.eye(WIDE) + 0.1 * gaussian(LONG, WIDE, 1),
    "saturated": gaussian(LONG, WIDE, 2) * 3 * 10.0 ** -rng(3).uniform(0, 7, (LONG, 1, WIDE)),
}


def variants(w):
    """Products whose singular values are those of `w`, up to a known factor."""
    yield "itself", w
    yield "transpose", np.swapaxes(w[::-1], 1, 2)
    first, last = w[0] @ orthogonal(WIDE, 7), orthogonal(WIDE, 8) @ w[-1]
    yield "rotation", np.concatenate([first[None], w[1:-1], last[None]])
    # two neighbours multiplied beforehand: exact in float64 up to rounding
    yield "splitting", np.concatenate([w[:4], (w[5] @ w[4])[None], np.eye(WIDE)[None], w[6:]])
    for c in SCALES:
        scaled = w.copy()
        scaled[11] *= c
        yield c, scaled


KNOWN, KNOWN_VALUES = known_product(WIDE, LONG, span=690.8)
STACK = {
    (name, kind): product
    for name, factors in FAMILIES.items()
    for kind, product in variants(factors)
} | {("known", "itself"): KNOWN, ("known", "transpose"): np.swapaxes(KNOWN[::-1], 1, 2)}


def values_at(tol):
    stack = np.stack(list(STACK.values()))
    with warnings.catch_warnings():
        # a product of two saturated factors has lost what a tolerance of 1e-9 asks for
        warnings.filterwarnings("ignore", "log_singular_values: in . of", UserWarning)
        values, info = log_singular_values(stack, tol=tol, return_info=True)
    assert info.trusted[[kind == "itself" for _, kind in STACK]].all() or tol < 1e-8
    return dict(zip(STACK, values, strict=True))


@pytest.fixture(scope="module")
def at_default():
    return values_at(1e-6)


def test_lanes_with_known_values_at_condition_1e300(at_default):
    assert KNOWN_VALUES[0] - KNOWN_VALUES[-1] > 600
    for kind in ("itself", "transpose"):
        assert np.abs(at_default["known", kind] - KNOWN_VALUES).max() < 1e-6


family = pytest.mark.parametrize("name", FAMILIES)


@family
def test_sum_is_log_determinant(name, at_default):
    exact = np.linalg.slogdet(FAMILIES[name])[1].sum()
    assert abs(at_default[name, "itself"].sum() - exact) < 1e-6


@family
@pytest.mark.parametrize("kind", ["transpose", "rotation", "splitting"])
def test_products_with_the_same_values(name, kind, at_default):
    assert np.abs(at_default[name, kind] - at_default[name, "itself"]).max() < 2e-6


@family
def test_scaling_one_factor(name, at_default):
    for c in SCALES:
        shifted = at_default[name, c] - np.log(c)
        assert np.abs(shifted - at_default[name, "itself"]).max() < 2e-6


@family
def test_order_and_bounds(name, at_default):
    values = at_default[name, "itself"]
    assert (np.diff(values) <= 0).all()
    each = np.log(np.linalg.svd(FAMILIES[name], compute_uv=False))
    # ||AB|| <= ||A|| ||B||
    assert values[0] <= each[:, 0].sum() + 1e-6
    assert values[-1] >= each[:, -1].sum() - 1e-6
    # Horn: the partial sums are submultiplicative too
    assert (np.cumsum(values) <= np.cumsum(each, axis=1).sum(0) + 1e-6).all()


@pytest.mark.parametrize("best", [1e-6, pytest.param(1e-9, marks=pytest.mark.slow)])
def test_tolerance_is_kept(best, at_default):
    exact, loose = values_at(best), values_at(1e-3)
    for tol, found in ((1e-3, loose), (1e-6, at_default)):
        for lane, values in found.items():
            assert np.abs(values - exact[lane]).max() < tol


# Extreme scales and structure


@pytest.mark.parametrize("order", ["random", "ascending", "descending", "permuted"])
def test_diagonal_across_600_decades(order):
    logs = rng(1).uniform(-20, 20, (DEPTH, N))
    logs[:, 0], logs[:, 1] = 300 / DEPTH, -300 / DEPTH
    if order in ("ascending", "descending"):
        logs = np.sort(logs, axis=1)[:, :: 1 if order == "ascending" else -1]
    factors = np.stack([np.diag(10.0**d) for d in logs])
    total = logs.sum(0)
    if order == "permuted":
        total, perm = np.zeros(N), np.arange(N)
        for i, d in enumerate(logs):
            total += d[perm]
            shuffle = rng(i).permutation(N)
            factors[i] = factors[i][shuffle]
            perm = np.argsort(shuffle)[perm]
    assert np.abs(log_singular_values(factors) - descending(total * np.log(10))).max() < 1e-9


@pytest.mark.slow
def test_one_factor_across_600_decades():
    d = 10.0 ** np.linspace(-300, 300, N)
    assert np.abs(log_singular_values(np.diag(d)[None]) - descending(np.log(d))).max() < 1e-9
    one = gaussian(1) * 1e100
    exact = descending(np.log(np.linalg.svd(one[0])[1]))
    assert np.abs(log_singular_values(one) - exact).max() < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("depth", [DEPTH, 1])
def test_width_one(depth):
    factors = gaussian(depth, 1) * 1e100
    exact = np.log(np.abs(factors)).sum(0)[0]
    assert np.abs(log_singular_values(factors) - exact).max() < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("gain", [1e-30, 1e30])
def test_float32_gains_at_the_end_of_their_range(gain):
    factors = gaussian(dtype=np.float32)
    scaled = factors * np.float32(gain)
    shift = np.log(scaled.astype(float)[0, 0, 0] / factors[0, 0, 0])
    found = log_singular_values(scaled) - DEPTH * shift
    assert np.abs(found - log_singular_values(factors)).max() < 1e-4


@pytest.mark.parametrize("side", ["rows", "columns", "both"])
def test_graded_factors_keep_their_small_values(side):
    """Saturated units scale rows or columns by 1e-20; the values are determined, and kept."""
    factors = gaussian()
    d = 10.0 ** -np.linspace(0, 20, 8)
    if side != "columns":
        factors[2] *= d[:, None]
    if side != "rows":
        factors[3] *= d[::-1]
    values, info = log_singular_values(factors, return_info=True)
    assert np.abs(values - multiprecision(factors)).max() < 1e-6
    assert info.trusted


def test_a_list_of_unequal_widths():
    """Twelve factors between 3 and 8 wide; a bottleneck of 3 leaves structural zeros."""
    widths = [6, 3, 8, 5, 7, 8, 4, 8, 6, 8, 5, 7, 5]
    factors = [rng(i).standard_normal((widths[i + 1], widths[i])) for i in range(DEPTH)]
    product = np.linalg.multi_dot(factors[::-1])
    values = log_singular_values(factors)
    assert values.shape == (5,) and (values[3:] == -np.inf).all()
    exact = np.log(np.linalg.svd(product, compute_uv=False)[:3])
    assert np.abs(values[:3] - exact).max() < 1e-9


# Rank


def test_relu_rank_is_exact():
    alive = rng(5).uniform(size=(DEPTH, N)) < 0.8
    factors = gaussian() * alive[:, :, None]
    rank = alive.sum(1).min()
    values, info = log_singular_values(factors, return_info=True)
    assert info.trusted and info.method == "lu"
    assert np.isfinite(values[:rank]).all() and (values[rank:] == -np.inf).all()
    assert np.abs(values[:rank] - multiprecision(factors)[:rank]).max() < 1e-6


@pytest.mark.parametrize(
    "what",
    ["dead input", "dead unit", "equal columns", "equal rows", "constant", "zero", "two of them"],
)
def test_rank_loss_by_structure(what):
    factors = gaussian()
    rank = N - 1
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
