"""The parts that architectures share: affine maps, normalisation, activation, dropout, skips.

    z = W h + b,   W ~ sigma_w * (the distribution `weights`),   b ~ N(0, sigma_b^2)

Each part is named after the setting of `gradjax.config.Model` that chooses it, and every float may
be traced. `weights = "lsuv"` scales an orthogonal W by the data that the module is initialised on
(Mishkin & Matas 2016, arXiv 1511.06422, algorithm 1, whose iteration ends at once for a linear
map): W h has variance sigma_w^2, 1 in the paper. So initialise on a real batch.
`weight_standardization` (Qiao et al. 2019, arXiv 1903.10520, eq. 4; with the scale 1 / sqrt(fan_in)
of Brock et al. 2021, arXiv 2101.08692, eq. 5) subtracts the mean of each unit's incoming weights
and divides by their deviation; sigma_w is then a fixed factor, Brock's gain gamma.
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
from gradjax.experiment.tasks.images import image_shape


class Treated(nn.Module):
    """The settings that a hidden layer of any architecture has."""

    activation: str
    sigma_w: float | Array
    sigma_b: float | Array
    weights: str
    weight_standardization: bool
    normalization: str


def settings(owner: nn.Module, kind: Callable[..., Any], /, **own: Any) -> Any:
    """`kind` with its `own` fields, and every other field that the module `owner` has as well."""
    fields = kind.__dataclass_fields__  # type: ignore[attr-defined]
    names = set(fields) - {"name", "parent", *own}
    shared = {name: getattr(owner, name) for name in names if hasattr(owner, name)}
    return kind(**shared, **own)


def weight(
    module: Any, h: Array, shape: tuple[int, ...], apply: Callable[[Array, Array], Array]
) -> Array:
    """The kernel of the affine map `apply(h, kernel)`, made as the fields of `module` say.

    Args:
      module: has the fields `weights`, `sigma_w` and `weight_standardization`, and gets the
        parameter "kernel".
      h: input of the map; LSUV looks at it.
      shape: of the kernel, outputs last.
      apply: (h, kernel) -> the map's output without its bias.

    Raises:
      ValueError: LSUV together with weight standardisation.
    """
    if reason := no_scale(module):
        raise ValueError(reason)
    draw = WEIGHTS[module.weights](module.sigma_w)

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        kernel = draw(key, shape, dtype)
        if module.weights != "lsuv":
            return kernel
        return kernel * module.sigma_w / jnp.maximum(jnp.std(apply(h, kernel)), 1e-6)

    kernel = module.param("kernel", init, shape)
    if not module.weight_standardization:
        return kernel
    return jnp.asarray(module.sigma_w, kernel.dtype) * standardized(kernel)


def no_scale(model: Any) -> str:
    """Why LSUV cannot be combined with weight standardisation; empty where it is not."""
    if model.weights != "lsuv" or not model.weight_standardization:
        return ""
    return (
        "models: model.weights = 'lsuv' sets the scale of the weights, and "
        "model.weight_standardization takes it away again; choose one of the two."
    )


def standardized(kernel: Array) -> Array:
    """Each unit's incoming weights with mean 0 and mean square 1 / fan_in."""
    axes = tuple(range(kernel.ndim - 1))
    centred = kernel - jnp.mean(kernel, axes, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axes, keepdims=True)
    return centred * jax.lax.rsqrt(variance * math.prod(kernel.shape[:-1]) + 1e-8)


def plus(z: Array, vector: Array) -> Array:
    """`z` plus a vector along its last axis; the broadcast is explicit for strict promotion."""
    return z + jnp.broadcast_to(vector, z.shape)


class Dense(nn.Module):
    """z = W h + b over the last axis; all of b starts at `bias_start` where one is given."""

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
        if self.bias_start is None:
            start = bias(self.sigma_b)
        else:
            start = nn.initializers.constant(self.bias_start)
        return plus(z, self.param("bias", start, (self.width,)))


class Dropout(nn.Module):
    """Inverted dropout whose rate in [0, 1) may be traced (Flax's own branches on it)."""

    rate: float | Array

    @nn.compact
    def __call__(self, h: Array) -> Array:
        """`h` with a fraction `rate` of its entries zero and the others divided by 1 - rate."""
        keep = jax.random.uniform(self.make_rng("dropout"), h.shape, h.dtype) >= self.rate
        return jnp.where(keep, h / (1.0 - jnp.asarray(self.rate, h.dtype)), jnp.zeros_like(h))


class Activation(nn.Module):
    """A function of `gradjax.core.activations` by name.

    `prelu` learns its negative slope, starting at 0.25 (He 2015). `depth` is the number of
    consecutive layers that use it in the network; only `tailored_relu` depends on it.
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
    """`z` normalised over its last axis, or over the batch with running averages.

    Call it inside a compact module, which gets the submodule "norm".
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
            start = jnp.asarray(self.scale, jnp.float32)
            scale = self.param("scale", lambda key: start).astype(branch.dtype)
        return h + scale * branch


def image_of(x: Array) -> Array:
    """(..., features) as (..., side, side, channels), see `image_shape`.

    Raises:
      ValueError: the features are not a square image of 1 or 3 channels.
    """
    shape = image_shape(x.shape[-1])
    if shape is None:
        raise ValueError(
            f"models: {x.shape[-1]} features are no square image of 1 or 3 channels; choose a task "
            "of images, as task.name = 'digits', or a model that takes any features, as "
            "model.name = 'mlp'."
        )
    return x.reshape(*x.shape[:-1], *shape)
