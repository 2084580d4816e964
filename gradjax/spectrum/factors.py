"""Factors of a product as the user gives them: checks, stacking, and whether they are tracers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

PyTree = Any


def x64() -> bool:
    """Whether x64 is on in the caller's context."""
    return jnp.result_type(float) == jnp.float64


def at_least_float32(dtype: Any) -> Any:
    """float32 for half precision, else the dtype itself."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def on_tracers(*trees: PyTree) -> bool:
    """Whether any leaf is a tracer, that is, whether the caller runs under jit, vmap or grad."""
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(trees))


def check_factors(factors: Any, name: str) -> list[Any] | Any:
    """The factors as arrays: a stack (..., L, N, N), or a list of matrices.

    Raises:
      ValueError: factors that are not real floating arrays, or do not fit together; `name` is the
        function that the message speaks for.
    """
    is_list = isinstance(factors, list | tuple)
    given = factors if is_list else [factors]
    items = [x if hasattr(x, "dtype") else np.asarray(x) for x in given]
    shapes = [tuple(x.shape) for x in items]
    for i, x in enumerate(items):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{name}: factor {i} is {shapes[i]} {x.dtype}; "
                "real floating factors are needed. Cast them."
            )
    if is_list:
        if not items:
            raise ValueError(
                f"{name}: the list of factors is empty; at least one matrix is needed."
            )
        if any(len(s) != 2 or 0 in s for s in shapes):
            raise ValueError(
                f"{name}: a list holds matrices, got shapes {shapes}; "
                "stack equal ones to (..., L, N, N)."
            )
        for i in range(1, len(items)):
            if shapes[i][1] != shapes[i - 1][0]:
                raise ValueError(
                    f"{name}: factor {i} is {shapes[i]} and factor {i - 1} is {shapes[i - 1]}; "
                    f"factors are applied first to last, so {shapes[i][1]} columns must meet "
                    f"{shapes[i - 1][0]} rows."
                )
        return items
    shape = shapes[0]
    if len(shape) < 3 or shape[-1] != shape[-2] or 0 in shape:
        raise ValueError(
            f"{name}: factors have shape {shape}; (..., L, N, N) with L, N at least 1 is needed. "
            "For layers of unequal width pass a list of matrices."
        )
    return items[0]


def stack_factors(factors: Any) -> tuple[Any, list[tuple[int, int]]]:
    """(..., L, N, N) and the shapes of the factors.

    Matrices of unequal shape are padded with zeros, which only adds singular values that are
    exactly zero.
    """
    if not isinstance(factors, list):
        return jnp.asarray(factors), [tuple(factors.shape[-2:])] * factors.shape[-3]
    shapes = [tuple(x.shape[-2:]) for x in factors]
    n = max(max(shape) for shape in shapes)
    dtypes = {x.dtype for x in factors}
    if len(dtypes) == 1:
        dtype = dtypes.pop()
    else:
        dtype = max(map(at_least_float32, dtypes), key=lambda d: jnp.finfo(d).bits)

    def padded(x):
        widths = [(0, 0)] * (x.ndim - 2) + [(0, n - x.shape[-2]), (0, n - x.shape[-1])]
        return jnp.pad(jnp.asarray(x, dtype), widths)

    return jnp.stack([padded(x) for x in factors], axis=-3), shapes
