"""How much of a gradient is lost below the smallest number of float16.

The backward pass is linear in the cotangent it starts from. Started from S in place of 1 it gives
S times the gradient, so that an entry which is 0 from 1 and is not 0 from S has underflowed. What
is 0 from both (the gradient of a unit that is off) has not. Cost: one gradient and its compilation.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from gradjax.taps.probe import Traced

# The largest gradient after the suggested scaling: a factor of 16 below float16's largest number.
TARGET = 12


@dataclass(frozen=True)
class Underflow:
    """Entries of the gradient that underflowed.

    Attributes:
      fraction: of all entries that are not 0 in exact arithmetic, as far as the scale shows.
      by_leaf: the same for every parameter leaf.
      log2_scale: of the loss scale that would save most of them; 0 where none is known.
    """

    fraction: float
    by_leaf: tuple[float, ...]
    log2_scale: int


def measure(traced: Traced, leaves: list) -> Underflow:
    """The underflow of a loss's gradient at given operands."""
    loss, count = jaxpr_as_fun(traced.jaxpr), traced.num_params
    is_half = traced.jaxpr.out_avals[0].dtype == jnp.float16
    log2_seed = 15 if is_half else 24

    @jax.jit
    def gradient(leaves, log2_seed):
        def of_params(params):
            return loss(*params, *leaves[count:])[0]

        value, back = jax.vjp(of_params, leaves[:count])
        (grads,) = back(jnp.exp2(log2_seed).astype(value.dtype))
        return grads

    plain = [np.asarray(g, np.float64) for g in gradient(leaves, 0.0)]
    scaled = [np.asarray(g, np.float64) for g in gradient(leaves, float(log2_seed))]
    known = [int(np.sum((p != 0) | (s != 0))) for p, s in zip(plain, scaled, strict=True)]
    lost = [int(np.sum((p == 0) & (s != 0))) for p, s in zip(plain, scaled, strict=True)]
    finite = [np.abs(s[np.isfinite(s)]) for s in scaled]
    largest = max((float(x.max(initial=0.0)) for x in finite), default=0.0)
    overflows = any(x.size < s.size for x, s in zip(finite, scaled, strict=True))
    log2_scale = log2_seed + TARGET - math.ceil(math.log2(largest)) if largest else 0
    return Underflow(
        fraction=sum(lost) / max(sum(known), 1),
        by_leaf=tuple(n / max(m, 1) for n, m in zip(lost, known, strict=True)),
        log2_scale=min(log2_scale, log2_seed - 1) if overflows else log2_scale,
    )


def is_half(traced: Traced, layers: Any) -> bool:
    """Whether the loss, a layer or a parameter is in float16."""
    dtypes = [traced.jaxpr.out_avals[0].dtype, *(layer.site.dtype for layer in layers)]
    dtypes += [x.dtype for x in traced.leaves[: traced.num_params]]
    return any(dtype == jnp.float16 for dtype in dtypes)
