"""Random variations of the images of a training batch, as pure functions for use inside jit, scan
and vmap.

    AUGMENT[name](key, x) -> x                      (batch, features), square images of 1 or 3 channels, rows first

Each example has its own draw. What a variation brings in from outside the image repeats the nearest
pixel of its edge, so that normalised data need no word about their background. Which variation
keeps the classes is the user's to know: a flipped digit is none.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

MAX_ANGLE = 15.0  # degrees. Our choice: a digit keeps its class


def _square(x: Array) -> Array:
    """(batch, features) as (batch, side, side, channels)."""
    for channels in (1, 3) if x.ndim == 2 else ():
        side = math.isqrt(x.shape[1] // channels)
        if side * side * channels == x.shape[1]:
            return x.reshape(-1, side, side, channels)
    raise ValueError(
        f"augment: examples of shape {x.shape[1:]} are no square images of 1 or 3 channels; set task.augment = 'none'."
    )


def _sample(image: Array, rows: Array, columns: Array) -> Array:
    """Bilinear values of (side, side, channels) at real coordinates (side, side), the edge
    repeated.
    """
    last = jnp.asarray(image.shape[0] - 1, rows.dtype)

    def corners(at):
        at = jnp.clip(at, 0.0, last)
        low = jnp.floor(at)
        return (
            low.astype(jnp.int32),
            jnp.minimum(low + 1.0, last).astype(jnp.int32),
            (at - low)[..., None],
        )

    (r0, r1, r), (c0, c1, c) = corners(rows), corners(columns)
    r, c = (jnp.broadcast_to(fraction, image.shape).astype(image.dtype) for fraction in (r, c))
    top = (1.0 - c) * image[r0, c0] + c * image[r0, c1]
    bottom = (1.0 - c) * image[r1, c0] + c * image[r1, c1]
    return (1.0 - r) * top + r * bottom


def rotated(image: Array, angle: Array) -> Array:
    """(side, side, channels) turned counter-clockwise by `angle` (radians) about its centre,
    bilinear.
    """
    middle = 0.5 * (image.shape[0] - 1)
    row, column = jnp.mgrid[: image.shape[0], : image.shape[1]].astype(jnp.float32) - middle
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    return _sample(
        image, cosine * row + sine * column + middle, cosine * column - sine * row + middle
    )


def rotate(key: Array, x: Array) -> Array:
    """Each image turned by an angle of U(-15, 15) degrees."""
    limit = math.radians(MAX_ANGLE)
    angles = jax.random.uniform(key, x.shape[:1], jnp.float32, -limit, limit)
    return jax.vmap(rotated)(_square(x), angles).reshape(x.shape)


def crop(key: Array, x: Array) -> Array:
    """Each image padded and cropped at random to its size: shifted by up to side / 14 pixels each
    way, at least 1.

    Half of the 4 pixels of 32 of He et al. 2015 (arXiv 1512.03385, section 4.2), since digits fill their frame.
    """
    images = _square(x)
    pad = max(1, images.shape[1] // 14)  # 1 of 8 x 8, 2 of 28 x 28
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
    corners = jax.random.randint(key, (len(x), 2), 0, 2 * pad + 1, jnp.int32)
    cut = lambda image, at: jax.lax.dynamic_slice(
        image, (at[0], at[1], jnp.int32(0)), images.shape[1:]
    )
    return jax.vmap(cut)(padded, corners).reshape(x.shape)


def flip(key: Array, x: Array) -> Array:
    """Each image mirrored left to right with probability 1/2."""
    images = _square(x)
    mirrored = jax.random.bernoulli(key, 0.5, (len(x), 1, 1, 1))
    return jnp.where(jnp.broadcast_to(mirrored, images.shape), images[:, :, ::-1], images).reshape(
        x.shape
    )


AUGMENT: dict[str, Callable[[Array, Array], Array]] = {
    "none": lambda key, x: x,
    "rotate": rotate,
    "crop": crop,
    "flip": flip,
}
