"""Random variations of the images of a training batch, for use inside jit, scan and vmap.

    AUGMENT[name](key, x) -> x    (batch, features), square images of 1 or 3 channels, rows first

Each example has its own draw. Pixels from outside the image repeat the nearest pixel of its edge,
so that the background of normalised data need not be known. Whether a variation keeps the classes
is for the user to decide: a flipped digit is no digit.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from gradjax.experiment.tasks.images import image_shape

# Degrees. Our choice: a digit keeps its class.
MAX_ANGLE = 15.0


def _square(x: Array) -> Array:
    """(batch, features) as (batch, side, side, channels)."""
    shape = image_shape(x.shape[1]) if x.ndim == 2 else None
    if shape is None:
        raise ValueError(
            f"augment: examples of shape {x.shape[1:]} are no square images of 1 or 3 channels; "
            "set task.augment = 'none'."
        )
    return x.reshape(-1, *shape)


def _sample(image: Array, rows: Array, columns: Array) -> Array:
    """Bilinear values of (side, side, channels) at real coordinates (side, side).

    Outside the image the edge is repeated.
    """
    last = jnp.asarray(image.shape[0] - 1, rows.dtype)

    def corners(at):
        at = jnp.clip(at, 0.0, last)
        low = jnp.floor(at)
        high = jnp.minimum(low + 1.0, last)
        return low.astype(jnp.int32), high.astype(jnp.int32), (at - low)[..., None]

    (r0, r1, r), (c0, c1, c) = corners(rows), corners(columns)
    r, c = (jnp.broadcast_to(fraction, image.shape).astype(image.dtype) for fraction in (r, c))
    top = (1.0 - c) * image[r0, c0] + c * image[r0, c1]
    bottom = (1.0 - c) * image[r1, c0] + c * image[r1, c1]
    return (1.0 - r) * top + r * bottom


def rotated(image: Array, angle: Array) -> Array:
    """(side, side, channels) turned counter-clockwise by `angle` (radians) about its centre."""
    middle = 0.5 * (image.shape[0] - 1)
    row, column = jnp.mgrid[: image.shape[0], : image.shape[1]].astype(jnp.float32) - middle
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    turned_row, turned_column = cosine * row + sine * column, cosine * column - sine * row
    return _sample(image, turned_row + middle, turned_column + middle)


def rotate(key: Array, x: Array) -> Array:
    """Each image turned by an angle of U(-15, 15) degrees."""
    limit = math.radians(MAX_ANGLE)
    angles = jax.random.uniform(key, x.shape[:1], jnp.float32, -limit, limit)
    return jax.vmap(rotated)(_square(x), angles).reshape(x.shape)


def crop(key: Array, x: Array) -> Array:
    """Each image padded and cropped at random to its size.

    That is a shift by up to side / 14 pixels each way, at least 1: 1 of 8 x 8, 2 of 28 x 28. It is
    half of the 4 pixels of 32 of He et al. 2015 (arXiv 1512.03385, section 4.2), since digits fill
    their frame.
    """
    images = _square(x)
    pad = max(1, images.shape[1] // 14)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
    corners = jax.random.randint(key, (len(x), 2), 0, 2 * pad + 1, jnp.int32)

    def cut(image: Array, at: Array) -> Array:
        return jax.lax.dynamic_slice(image, (at[0], at[1], jnp.int32(0)), images.shape[1:])

    return jax.vmap(cut)(padded, corners).reshape(x.shape)


def flip(key: Array, x: Array) -> Array:
    """Each image mirrored left to right with probability 1/2."""
    images = _square(x)
    mirrored = jax.random.bernoulli(key, 0.5, (len(x), 1, 1, 1))
    mirrored = jnp.broadcast_to(mirrored, images.shape)
    return jnp.where(mirrored, images[:, :, ::-1], images).reshape(x.shape)


AUGMENT: dict[str, Callable[[Array, Array], Array]] = {
    "none": lambda key, x: x,
    "rotate": rotate,
    "crop": crop,
    "flip": flip,
}
