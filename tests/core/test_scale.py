"""Norms as (mantissa, exponent) against float64, where float32 and half precision overflow or
underflow."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from bounds import assert_rounding, gamma
from gradjax.core import scale

log_norm = jax.jit(scale.log_norm)
normalize = jax.jit(scale.normalize)

MAGNITUDES = [1e-37, 1e-30, 1e-20, 1e-3, 1.0, 1e10, 1.8e19, 1e20, 1e38, 3.38e38]


def reference(tree):
    """log ||tree|| in float64, each leaf divided by the largest magnitude first (exact enough
    there)."""
    flat = np.concatenate(
        [np.abs(np.asarray(x, np.complex128)).ravel() for x in jax.tree.leaves(tree)]
    )
    top = flat.max()
    return np.log(top) + 0.5 * np.log(np.sum((flat / top) ** 2))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_log_norm_is_right_over_the_whole_range(dtype):
    for magnitude in MAGNITUDES:
        tree = {"a": np.full((3, 5), magnitude, dtype), "b": np.full((7,), -magnitude / 3, dtype)}
        for function in (log_norm, scale.log_norm):
            np.testing.assert_allclose(function(tree), reference(tree), rtol=0, atol=2e-5)


def test_float16_neither_overflows_nor_underflows():
    for value in (6e4, 1e-7, 255.0):
        tree = np.full((100,), value, np.float16)
        np.testing.assert_allclose(log_norm(tree), reference(tree), atol=1e-5)


def test_a_hundred_thousand_ones_in_bfloat16():
    """A bfloat16 accumulation would stop at 256."""
    np.testing.assert_allclose(
        log_norm(np.ones(100_000, jnp.bfloat16)), 0.5 * np.log(1e5), rtol=1e-6
    )


@pytest.mark.parametrize("tree", [{}, jnp.zeros(3), [jnp.zeros((0,)), jnp.zeros(2)]])
def test_zero_has_the_logarithm_minus_infinity(tree):
    assert scale.log_norm(tree) == -np.inf


@pytest.mark.parametrize(
    ("value", "expected"), [(np.inf, np.inf), (-np.inf, np.inf), (np.nan, np.nan)]
)
def test_non_finite_trees_say_so(value, expected):
    tree = {"a": jnp.array([1.0, value]), "b": jnp.ones(3)}
    np.testing.assert_equal(np.asarray(scale.log_norm(tree)), np.float32(expected))


def test_complex_leaves_count_by_magnitude():
    tree = jnp.array([3e30 + 4e30j], jnp.complex64)
    np.testing.assert_allclose(scale.log_norm(tree), np.log(5e30), rtol=1e-6)


@given(exponent=st.integers(-120, 120), seed=st.integers(0, 1000))
def test_normalize_is_exact_and_brings_the_maximum_into_one_binade(exponent, seed):
    x = np.ldexp(np.random.default_rng(seed).uniform(0.5, 1, 8).astype(np.float32), exponent)
    unit, shift = normalize(x)
    np.testing.assert_array_equal(np.ldexp(np.asarray(unit), int(shift)), x)
    assert 0.5 <= np.abs(unit).max() < 1


def test_log_rms_divides_by_the_number_of_entries():
    tree = {"a": jnp.full((4, 4), 2.0), "b": jnp.full(9, 2.0)}
    np.testing.assert_allclose(scale.log_rms(tree), np.log(2.0), rtol=1e-6)


def test_vmap_is_a_loop():
    x = jnp.asarray(
        np.random.default_rng(0).standard_normal((5, 7)) * np.logspace(-30, 30, 5)[:, None],
        jnp.float32,
    )
    # seven squares and their sum, a root, a logarithm and its scaled exponent
    whole, rows = jax.jit(jax.vmap(scale.log_norm))(x), np.stack([log_norm(row) for row in x])
    assert_rounding(whole, rows, terms=12)


def test_the_gradient_of_the_log_norm_is_the_unit_vector_over_the_norm():
    x = jnp.array([3e15, 4e15])
    np.testing.assert_allclose(
        jax.jit(jax.grad(scale.log_norm))(x), np.array([3.0, 4.0]) / 5 / 5e15, rtol=1e-5
    )


SUBNORMAL = [1e-45, 1e-42, 1e-40, 1.1e-38, 1.2e-38, 1e-36]


def test_subnormal_norms_survive_an_arithmetic_that_flushes_them():
    times = jax.jit(lambda x: x * 2.0**24)
    for magnitude in SUBNORMAL:
        x = (np.linspace(0.3, 1, 7) * magnitude).astype(np.float32)
        assert not np.asarray(times(x))[x < 1e-38].any(), "the control: XLA flushes these numbers"
        for function in (log_norm, scale.log_norm):
            np.testing.assert_allclose(function(x), reference(x.astype(np.float64)), atol=2e-5)


@jax.jit
def to_unit_norm(x):
    return scale.multiply(x, scale.divide(scale.of_number(1.0), scale.array_norm(x)))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_multiply_brings_any_tree_to_unit_norm(dtype):
    for magnitude in (1e-40, 1e-30, 1e-6, 1.0, 6e4, 1e20, 3.38e38):
        with np.errstate(over="ignore"):
            x = (np.linspace(0.3, 1, 7) * magnitude).astype(dtype)
        if not np.isfinite(x.astype(np.float64)).all() or not x.astype(np.float64).any():
            continue
        size = np.linalg.norm(np.asarray(to_unit_norm(x), np.float64))
        # the norm of 7 entries, the quotient and the product; then a rounding to the dtype
        np.testing.assert_allclose(size, 1.0, rtol=gamma(12) + float(jnp.finfo(dtype).eps))


def test_float64_leaves_keep_float64():
    with jax.enable_x64(True):
        for magnitude in (5e-324, 1e-310, 1e-160, 1.0, 1e200, 1.7e308):
            x = np.linspace(0.5, 1, 5) * magnitude
            np.testing.assert_allclose(log_norm(x), reference(x), rtol=1e-13)


def test_groups_of_an_array_have_their_own_exponent():
    """The layers of a stack, one of which explodes and one of which is subnormal."""
    x = np.stack([np.full(4, 1e-42), np.full(4, 1.0), np.full(4, 1e38)]).astype(np.float32)
    got = jax.jit(lambda x: scale.log2(scale.array_norm(x, axis=1)))(x)
    np.testing.assert_allclose(got[:, 0], np.log2(2 * x[:, 0].astype(np.float64)), rtol=1e-6)


@jax.jit
def compared(a, b):
    x, y = scale.of_number(a), scale.of_number(b)
    return scale.greater(x, y), scale.log2(scale.divide(x, y))


@given(a=st.floats(2.0**-149, 2.0**127, width=32), b=st.floats(2.0**-149, 2.0**127, width=32))
def test_greater_and_divide_are_those_of_real_numbers(a, b):
    is_greater, log2_ratio = compared(np.float32(a), np.float32(b))
    assert bool(is_greater) == (a > b)
    np.testing.assert_allclose(log2_ratio, np.log2(a) - np.log2(b), atol=1e-4)


def test_to_unit_and_array_log_rms_pass_over_what_is_not_finite():
    x = np.array([[3e-30, 0.0], [np.inf, 4e-30]], np.float32)
    unit, exponent = jax.jit(scale.to_unit)(x)
    np.testing.assert_array_equal(np.ldexp(np.asarray(unit), int(exponent)), x)
    assert 1 <= np.asarray(unit)[1, 1] < 2
    rms = jax.jit(lambda x: scale.array_log_rms(x, 1))(x)
    np.testing.assert_allclose(rms, [np.log(3e-30 / 2**0.5), np.inf], rtol=1e-6)


def test_an_integer_leaf_is_refused():
    with pytest.raises(ValueError, match=r"\(3,\) int32"):
        scale.norm({"steps": jnp.arange(3)})
