"""Activation functions by name, elementwise phi: real -> real, with their kinks and slopes.

A new activation is one line in `ACTIVATIONS`, one in `KINKS` where a derivative of it jumps, and
one in `SLOPES` where it is positively homogeneous. That is all the general theory needs; closed
forms know some names of their own (`gradjax.theory.random_matrix`, `gradjax.theory.meanfield`). The
Gaussian moments of an activation, E f(sqrt(q) z), are in `gradjax.theory.gaussian`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Phi = Callable[[Array], Array]


@functools.lru_cache
def tailored_slope(
    network: int | Callable[[Callable[[float], float]], float], eta: float = 0.9
) -> float:
    """Negative slope a of the leaky ReLU that turns orthogonal inputs into inputs correlated `eta`.

    One layer of phi(x) = sqrt(2 / (1 + a^2)) max(x, a x), which keeps lengths at sigma_w = 1,
    sigma_b = 0, maps

        c' = c + (1 - a)^2 / (pi (1 + a^2)) (sqrt(1 - c^2) - c arccos c),

    and a is the root of c_depth(a) = eta from c_0 = 0: between ReLU, a = 0, whose correlations all
    tend to 1, and the linear network, a = 1, which keeps them. Tailored ReLU of deep kernel shaping
    (Zhang, Botev, Martens 2022, arXiv 2203.08120; 0.9 is the default of the authors' code). Cost:
    O(depth).

    Args:
      network: number of layers, or how a network composes its layers' map, as `lambda f: f(f(0.0))`
        for two layers.
      eta: in (0, 1).

    Returns:
      a, to 1e-15; 0 where ReLU itself stays below eta.

    >>> round(tailored_slope(50), 4), tailored_slope(2)
    (0.4305, 0.0)
    """

    def layers(f: Callable[[float], float]) -> float:
        if isinstance(network, int):
            return functools.reduce(lambda c, _: f(c), range(network), 0.0)
        return network(f)

    def last(a: float) -> float:
        fraction = (1 - a) ** 2 / (math.pi * (1 + a * a))
        return layers(lambda c: min(c + fraction * (math.sqrt(1 - c * c) - c * math.acos(c)), 1.0))

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if last(middle) > eta else (low, middle)
    return high if low else 0.0


# The depth that `tailored_relu` assumes when none is given: the config's default.
TAILORED_DEPTH = 50


def _tailored_slopes(depth: int = TAILORED_DEPTH) -> tuple[float, float]:
    a = tailored_slope(depth)
    scale = math.sqrt(2 / (1 + a * a))
    return a * scale, scale


def _leaky(slopes: tuple[float, float]) -> Phi:
    return lambda x: jnp.where(x > 0, slopes[1] * x, slopes[0] * x)


ACTIVATIONS: dict[str, Phi] = {
    "linear": lambda x: x,
    "tanh": jax.numpy.tanh,
    "hard_tanh": jax.nn.hard_tanh,
    "erf": jax.scipy.special.erf,
    "sigmoid": jax.nn.sigmoid,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    # the slope at which training starts (He 2015); models learn it
    "prelu": lambda x: jax.nn.leaky_relu(x, 0.25),
    # for another depth than TAILORED_DEPTH use `at_depth`
    "tailored_relu": _leaky(_tailored_slopes()),
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
}

# Where a derivative of phi jumps.
KINKS: dict[str, tuple[float, ...]] = {
    "hard_tanh": (-1.0, 1.0),
    "relu": (0.0,),
    "leaky_relu": (0.0,),
    "prelu": (0.0,),
    "tailored_relu": (0.0,),
    "elu": (0.0,),
    "selu": (0.0,),
}

# (left, right) slopes of those with phi(a x) = a phi(x) for a > 0: their moments are powers of q.
SLOPES: dict[str, tuple[float, float]] = {
    "linear": (1.0, 1.0),
    "relu": (0.0, 1.0),
    "leaky_relu": (0.01, 1.0),
    "prelu": (0.25, 1.0),
    "tailored_relu": _tailored_slopes(),
}

# Nodes along (x, y) per arm of a pair moment, for 1e-10 up to q = 100: gelu and erf grow fast off
# the real axis.
PAIR_NODES: dict[str, tuple[int, int]] = {"gelu": (48, 36), "erf": (48, 44)}


class Activation(NamedTuple):
    """What the theory needs to know of an activation.

    Attributes:
      phi: the function, elementwise.
      kinks: where a derivative jumps, ascending, in units of the pre-activation.
      slopes: (left, right) where phi is positively homogeneous, else None.
      pair_nodes: quadrature nodes along (x, y) per arm of a pair moment.
    """

    phi: Phi
    kinks: tuple[float, ...]
    slopes: tuple[float, float] | None
    pair_nodes: tuple[int, int] = (48, 36)


def resolve(activation: str | Phi | Activation, kinks: Sequence[float] | None = None) -> Activation:
    """The `Activation` of a name or of an elementwise callable.

    Args:
      activation: a name in `ACTIVATIONS`, a callable, or an `Activation`, which is returned as it
        is.
      kinks: where a derivative jumps; by default those known for the name, none for a callable.

    Raises:
      ValueError: for an unknown name; the message lists the known ones.
    """
    if isinstance(activation, Activation):
        return activation
    if callable(activation):
        return Activation(activation, tuple(sorted(float(k) for k in kinks or ())), None)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation: got {activation!r}; the names are {', '.join(ACTIVATIONS)}. "
            f"Any elementwise function serves too, with kinks=(...) where its derivatives jump."
        )
    own = KINKS.get(activation, ()) if kinks is None else tuple(sorted(float(k) for k in kinks))
    return Activation(
        ACTIVATIONS[activation], own, SLOPES.get(activation), PAIR_NODES.get(activation, (28, 30))
    )


def at_depth(name: str, depth: int | None) -> Activation:
    """The activation of a network of `depth` layers; only `tailored_relu` depends on the depth.

    Args:
      name: in `ACTIVATIONS`.
      depth: number of layers; None for the default of `tailored_relu`, `TAILORED_DEPTH`.

    >>> at_depth("tailored_relu", 100).slopes > at_depth("tailored_relu", 10).slopes  # more linear
    True
    """
    if name != "tailored_relu" or depth is None:
        return resolve(name)
    slopes = _tailored_slopes(depth)
    return Activation(_leaky(slopes), KINKS[name], slopes)
