"""Factors as the user gives them: stacked, padded, refused."""

import numpy as np
import pytest
from products import rng

from gradjax.spectrum.factors import stack_factors
from gradjax.spectrum.jacobian import log_singular_values


def test_padding_adds_zeros_only():
    factors = [rng(i).standard_normal(s) for i, s in enumerate([(7, 4), (8, 7), (6, 8)])]
    stack, shapes = stack_factors([w.astype(np.float32) for w in factors])
    assert stack.shape == (3, 8, 8) and shapes == [(7, 4), (8, 7), (6, 8)]
    padded = np.linalg.multi_dot(np.asarray(stack, np.float64)[::-1])
    found = np.linalg.svd(padded, compute_uv=False)
    exact = np.linalg.svd(factors[2] @ factors[1] @ factors[0], compute_uv=False)
    np.testing.assert_allclose(found[:4], exact[:4], rtol=1e-5)
    assert found[4:].max() < 1e-12 * found[0]


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
