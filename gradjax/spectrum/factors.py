"""Factors of a product as they come in: checked, stacked, and asked whether they are tracers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

PyTree = Any


def x64() -> bool:
    """Whether x64 is on where the caller stands."""
    return jnp.result_type(float) == jnp.float64


def at_least_float32(dtype: Any) -> Any:
    """float32 for half precision, else the dtype itself."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def on_tracers(*trees: PyTree) -> bool:
    """Whether any leaf is a tracer, that is, whether the caller stands under jit, vmap or grad."""
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(trees))


def check_factors(factors: Any, name: str) -> list[Any] | Any:
    """The factors with dtypes: a stack (..., L, N, N), or a list of matrices; ValueError where they
    do not fit.
    """
    is_list = isinstance(factors, list | tuple)
    items = [
        x if hasattr(x, "dtype") else np.asarray(x) for x in (factors if is_list else [factors])
    ]
    shapes = [tuple(x.shape) for x in items]
    for i, x in enumerate(items):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{name}: factor {i} is {shapes[i]} {x.dtype}; real floating factors are needed. Cast them."
            )
    if is_list:
        if not items:
            raise ValueError(
                f"{name}: the list of factors is empty; at least one matrix is needed."
            )
        if any(len(s) != 2 or 0 in s for s in shapes):
            raise ValueError(
                f"{name}: a list holds matrices, got shapes {shapes}; stack equal ones to (..., L, N, N)."
            )
        for i in range(1, len(items)):
            if shapes[i][1] != shapes[i - 1][0]:
                raise ValueError(
                    f"{name}: factor {i} is {shapes[i]} and factor {i - 1} is {shapes[i - 1]}; factors are applied "
                    f"first to last, so {shapes[i][1]} columns must meet {shapes[i - 1][0]} rows."
                )
        return items
    shape = shapes[0]
    if len(shape) < 3 or shape[-1] != shape[-2] or 0 in shape:
        raise ValueError(
            f"{name}: factors have shape {shape}; (..., L, N, N) with L, N at least 1 is needed. For layers of unequal "
            "width pass a list of matrices."
        )
    return items[0]


def stack_factors(factors: Any) -> tuple[Any, list[tuple[int, int]]]:
    """(..., L, N, N) and the shapes of the factors; matrices of unequal shape are padded with
    zeros.

    Padding adds singular values that are exactly zero, and nothing else.
    """
    if not isinstance(factors, list):
        return jnp.asarray(factors), [tuple(factors.shape[-2:])] * factors.shape[-3]
    shapes = [tuple(x.shape[-2:]) for x in factors]
    n = max(max(shape) for shape in shapes)
    dtypes = {x.dtype for x in factors}
    dtype = (
        dtypes.pop()
        if len(dtypes) == 1
        else max(map(at_least_float32, dtypes), key=lambda d: jnp.finfo(d).bits)
    )
    pad = lambda x: [(0, 0)] * (x.ndim - 2) + [(0, n - x.shape[-2]), (0, n - x.shape[-1])]
    return jnp.stack([jnp.pad(jnp.asarray(x, dtype), pad(x)) for x in factors], axis=-3), shapes
