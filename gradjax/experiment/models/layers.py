"""The parts that architectures share: affine maps, normalisation, activation, dropout, skips.

    z = W h + b,   W ~ sigma_w * (the distribution `weights`),   b ~ N(0, sigma_b^2)

Each part is named as `gradjax.config.Model` names the setting that chooses it, and every float may
be traced. `weights = "lsuv"` scales an orthogonal W by the data that the module is initialised on
(Mishkin & Matas 2016, arXiv 1511.06422, algorithm 1, whose iteration a linear map ends at once): W
h has variance sigma_w^2, 1 in the paper. So initialise on a real batch. `weight_standardization`
(Qiao et al. 2019, arXiv 1903.10520, eq. 4; with the scale 1 / sqrt(fan_in) of Brock et al. 2021,
arXiv 2101.08692, eq. 5) subtracts from each unit's incoming weights their mean and divides by their
deviation; sigma_w is then a fixed factor, Brock's gain gamma.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from gradjax.core.activations import at_depth
from gradjax.core.initializers import WEIGHTS, bias


def weight(
    module: nn.Module, h: Array, shape: tuple[int, ...], apply: Callable[[Array, Array], Array]
) -> Array:
    """The kernel of an affine map `apply(h, kernel)` as the module's fields ask for it.

    Raises:
      ValueError: LSUV of weights whose scale is standardised away.
    """
    if reason := no_scale(module):
        raise ValueError(reason)
    draw = WEIGHTS[module.weights](module.sigma_w)  # type: ignore[attr-defined]

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        kernel = draw(key, shape, dtype)
        if module.weights != "lsuv":  # type: ignore[attr-defined]
            return kernel
        return kernel * module.sigma_w / jnp.maximum(jnp.std(apply(h, kernel)), 1e-6)  # type: ignore[attr-defined]

    kernel = module.param("kernel", init, shape)
    if not module.weight_standardization:  # type: ignore[attr-defined]
        return kernel
    return jnp.asarray(module.sigma_w, kernel.dtype) * standardized(kernel)  # type: ignore[attr-defined]


def no_scale(model: Any) -> str:
    """Why weights whose scale is standardised away have no LSUV, where it is asked for; empty where
    not.
    """
    if model.weights != "lsuv" or not model.weight_standardization:
        return ""
    return (
        "models: model.weights = 'lsuv' sets the scale of the weights, and model.weight_standardization takes it away "
        "again; choose one of the two."
    )


def standardized(kernel: Array) -> Array:
    """Each unit's incoming weights with mean 0 and mean square 1 / fan_in."""
    axes = tuple(range(kernel.ndim - 1))
    centred = kernel - jnp.mean(kernel, axes, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axes, keepdims=True)
    return centred * jax.lax.rsqrt(variance * math.prod(kernel.shape[:-1]) + 1e-8)


class Dense(nn.Module):
    """z = W h + b over the last axis; a `bias_start` is where every b begins, in place of the
    distribution.
    """

    width: int
    weights: str = "gaussian"
    sigma_w: float | Array = 1.0
    sigma_b: float | Array = 0.0
    weight_standardization: bool = False
    use_bias: bool = True
    bias_start: float | Array | None = None

    @nn.compact
    def __call__(self, h: Array) -> Array:
        """(..., fan_in) -> (..., width)."""
        kernel = weight(self, h, (h.shape[-1], self.width), jnp.matmul)
        z = h @ kernel
        if not self.use_bias:
            return z
        start = (
            bias(self.sigma_b)
            if self.bias_start is None
            else nn.initializers.constant(self.bias_start)
        )
        return z + jnp.broadcast_to(self.param("bias", start, (self.width,)), z.shape)


class Dropout(nn.Module):
    """Inverted dropout whose rate in [0, 1) may be traced (Flax's own branches on it)."""

    rate: float | Array

    @nn.compact
    def __call__(self, h: Array) -> Array:
        """`h` with a share `rate` of its entries zero and the others divided by 1 - rate."""
        keep = jax.random.uniform(self.make_rng("dropout"), h.shape, h.dtype) >= self.rate
        return jnp.where(keep, h / (1.0 - jnp.asarray(self.rate, h.dtype)), jnp.zeros_like(h))


class Activation(nn.Module):
    """A function of `gradjax.core.activations` by name; `prelu` learns its negative slope from He
    2015's start, 0.25.

    `depth`, the number of layers in a row that the network has of it, is what `tailored_relu` is tailored to.
    """

    name_of: str
    depth: int | None = None

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """phi(z), elementwise."""
        if self.name_of == "prelu":
            return nn.PReLU(negative_slope_init=0.25, name="prelu")(z)
        return at_depth(self.name_of, self.depth).phi(z)


def normalize(kind: str, z: Array, train: bool) -> Array:
    """`z` normalised over its last axis, or over the batch with running averages; call it inside a
    compact module.
    """
    if kind == "layernorm":
        return nn.LayerNorm(name="norm")(z)
    if kind == "rmsnorm":
        return nn.RMSNorm(name="norm")(z)
    if kind == "batchnorm":
        return nn.BatchNorm(use_running_average=not train, name="norm")(z)
    return z


class Skip(nn.Module):
    """h + scale * branch; `learned` makes the scale a parameter (ReZero, SkipInit: from 0)."""

    scale: float | Array = 1.0
    learned: bool = False

    @nn.compact
    def __call__(self, h: Array, branch: Array) -> Array:
        """The sum of two states of one shape."""
        scale = jnp.asarray(self.scale, branch.dtype)
        if self.learned:
            scale = self.param("scale", lambda key: jnp.asarray(self.scale, jnp.float32)).astype(
                branch.dtype
            )
        return h + scale * branch


def image_of(x: Array) -> Array:
    """(..., features) as (..., side, side, channels): 1 channel where the side is whole, else 3."""
    for channels in (1, 3):
        side = math.isqrt(x.shape[-1] // channels)
        if side * side * channels == x.shape[-1]:
            return x.reshape(*x.shape[:-1], side, side, channels)
    raise ValueError(
        f"models: {x.shape[-1]} features are no square image of 1 or 3 channels; choose a task of images, as "
        "task.name = 'digits', or a model that takes any features, as model.name = 'mlp'."
    )


class Treated(nn.Module):
    """The settings that a hidden layer of any architecture has."""

    activation: str
    sigma_w: float | Array
    sigma_b: float | Array
    weights: str
    weight_standardization: bool
    normalization: str


def settings(owner: nn.Module, kind: Callable[..., Any], **own: Any) -> Any:
    """`kind` with the fields that it shares with the module `owner`, and its `own`."""
    fields = kind.__dataclass_fields__  # type: ignore[attr-defined]
    shared = [
        name for name in fields if name not in ("name", "parent", *own) and hasattr(owner, name)
    ]
    return kind(**{name: getattr(owner, name) for name in shared}, **own)


def fields_of(model: type[nn.Module], config: Any) -> dict[str, Any]:
    """The settings of a `gradjax.config.Model` that a module declares as its fields."""
    own = {name for name in model.__dataclass_fields__ if name not in ("name", "parent")}
    return {name: getattr(config, name) for name in own if hasattr(config, name)}
