"""Small pieces of linear algebra on diag(e^s) T, with scales s as natural logarithms."""

import jax.numpy as jnp
from jax import Array

# Cap on s_j - s_i above the diagonal of T: e^60 lies far beyond what GROWTH accepts.
CLIP = 60.0


def safe_log(x: Array) -> Array:
    """log, with -inf (and no NaN) at zero."""
    return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1.0)), -jnp.inf)


def columns(m_t: Array) -> Array:
    """2-norms of the columns of M, overflow-safe, from M^T."""
    top = jnp.max(jnp.abs(m_t), axis=1)
    unit = m_t / jnp.where(top > 0, top, 1.0)[:, None]
    return top * jnp.sqrt(jnp.sum(unit * unit, axis=1))


def unit_triangle(r_t: Array, r: Array, s: Array) -> Array:
    """(R_ij / r_i e^(s_j - s_i))^T for i <= j; zero where r_i = 0."""
    i = jnp.arange(r_t.shape[0])
    # a lost scale (-inf) has r = 0 or an empty row: any finite value serves
    s = jnp.where(jnp.isfinite(s), s, 0.0)
    weight = jnp.exp(jnp.minimum(s[:, None] - s[None, :], CLIP))
    r = r[None, :]
    return jnp.where(
        (i[:, None] >= i[None, :]) & (r > 0), r_t * weight / jnp.where(r > 0, r, 1.0), 0.0
    )
