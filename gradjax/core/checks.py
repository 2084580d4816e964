"""JAX's own checks for NaN and inf, switched off where these are what is looked for."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def without_debug_checks() -> Iterator[None]:
    """Without `jax.debug_nans` and `jax.debug_infs`; also a decorator."""
    with jax.debug_nans(False), jax.debug_infs(False):
        yield
