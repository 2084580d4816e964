"""Blocks of a sweep (`gradjax.spectrum.product`): some factors multiplied into X, and their LU.

A block M = W_{l+m} ... W_{l+1} X is factorised as X' R with row pivots. The pivots of R against the
rounding of the block bound the error that the block adds to log sigma.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gradjax.spectrum.logscale import columns, safe_log

EPS = float(np.finfo(np.float64).eps)

# The error of a block is at most BLOCK_ERROR * eps * e^-g, g its smallest log pivot (measured: 25
# to 400). ROUNDING is the same constant where a product's rounding is bounded entry by entry.
BLOCK_ERROR = 500.0
ROUNDING = 100.0
SLACK = float(np.log(BLOCK_ERROR / ROUNDING))

# What of a factor enters next: all of it, its column sizes D, or A of W = A D.
WHOLE, SCALES, REST = 0, 1, 2

# (carry, layer index) -> (carry, W of shape (N, N)); called again after a rejected block, so it
# must be pure.
Layer = Callable[[Any, Array], tuple[Any, Array]]


class State(NamedTuple):
    """Where a sweep is.

    Attributes:
      layer: of the next factor.
      part: WHOLE, SCALES or REST.
      length: factors of the next block.
      slope: nats lost per layer, running mean; -1 before the first block.
      carry: the argument of `layer`.
      x_t, s: as in `Product`.
      t_t: row blocks of T^T, each only up to the diagonal.
      doubt: (N,) whether a direction was decided by rounding.
      gap: (N, N) [j, i]: largest nats of direction j over i at which rounding has mixed them.
      error: sum of the squares of the blocks' bounds.
      log_gain, blocks, rejects, worst, failed_at, nonfinite: as in `Product`.
    """

    layer: Array
    part: Array
    length: Array
    slope: Array
    carry: Any
    x_t: Array
    s: Array
    t_t: tuple[Array, ...]
    doubt: Array
    gap: Array
    log_gain: Array
    blocks: Array
    rejects: Array
    error: Array
    worst: Array
    failed_at: Array
    nonfinite: Array


class Fixed(NamedTuple):
    """What does not change during a sweep.

    Attributes:
      layer, depth, n, careful: as in `sweep`.
      limit: log pivot below which a block is rejected.
      room: nats that a block may lose.
      lost_below: log pivot below which a pivot is nothing but rounding.
      doubt_below: log pivot below which the rounding of a factor's own dtype has decided it.
      wide: whether the factors' entries may have squares beyond float64.
      rows: row blocks of T^T, (first, last + 1) each.
    """

    layer: Layer
    depth: int
    n: int
    careful: bool
    limit: Array
    room: Array
    lost_below: float
    doubt_below: float
    wide: bool
    rows: list[tuple[int, int]]


class Block(NamedTuple):
    """Some factors multiplied into X: M = W_{l+m} ... W_{l+1} X.

    Attributes:
      m: () number of factors.
      is_single: () whether it is one factor or a part of one.
      carry: after the last factor.
      m_t: (N, N) M^T.
      log_gain: (depth,) with this block's filled in.
      total: () sum of the block's log gains.
      column: (N,) 2-norms of the columns of M.
    """

    m: Array
    is_single: Array
    carry: Any
    m_t: Array
    log_gain: Array
    total: Array
    column: Array


class Pivots(NamedTuple):
    """M = X' R by LU.

    Attributes:
      x_t: (N, N) X'^T.
      packed: (N, N) R^T and what lies above it.
      r: (N,) |R_ii|.
      g: (N,) log pivots against the rounding of the block: its error is BLOCK_ERROR eps e^-g.
      nats: () the smallest log pivot against the columns and gains of the block, by which longer
        blocks would be judged.
    """

    x_t: Array
    packed: Array
    r: Array
    g: Array
    nats: Array


def _int(value: int) -> Array:
    return jnp.asarray(value, jnp.int32)


def split(n: int) -> list[tuple[int, int]]:
    """Row blocks of T^T; T being triangular, each block ends at its own diagonal."""
    size = max(64, -(-n // 4))
    return [(a, min(a + size, n)) for a in range(0, n, size)]


def join(t_t: tuple[Array, ...]) -> Array:
    """T^T from its row blocks."""
    n = t_t[-1].shape[1]
    return jnp.concatenate([jnp.pad(t, ((0, 0), (0, n - t.shape[1]))) for t in t_t])


def reorder(st: State, order: Array, rows: list[tuple[int, int]]) -> State:
    """Directions in another order.

    T stays triangular if live directions only move up: they have more columns there.
    """
    whole = join(st.t_t)[:, order]
    t_t = tuple(whole[a:b, :b] for a, b in rows)
    return st._replace(
        x_t=st.x_t[order],
        s=st.s[order],
        t_t=t_t,
        doubt=st.doubt[order],
        gap=st.gap[order][:, order],
    )


def _lu(m_t: Array) -> tuple[Array, Array, Array]:
    """M[order] = L U by row pivots: (X^T, (L and U packed)^T, order) with M = X U and |X_ij| <= 1.

    A column of row numbers takes part in the factorisation: unrolling LAPACK's list of swaps would
    cost more.
    """
    n = m_t.shape[0]
    rows = jnp.arange(n, dtype=m_t.dtype)[None]
    packed = lax.linalg.lu(jnp.concatenate([m_t, rows]).T)[0].T
    l_t = jnp.triu(packed[:n], 1) + jnp.eye(n, dtype=m_t.dtype)
    order = jnp.round(packed[n] @ l_t).astype(jnp.int32)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(n, dtype=jnp.int32))
    return l_t[:, inverse], packed[:n], order


def _log_rounding(m_t: Array, x_t: Array, packed: Array, order: Array, part: Array) -> Array:
    """Log of the rounding in each pivot of M = W X = L U for one factor W, in units of eps.

    The larger of (|L| |U|)_ii, the factorisation's, and ||w_p|| ||x_i||, the product's, p the
    pivot's row. Neither changes when rows or columns are scaled. A diagonal W rounds entry by
    entry, so that the second falls away.
    """
    lower = jnp.tril(packed, -1)
    by_lu = safe_log(jnp.abs(jnp.diagonal(packed)) + jnp.sum(jnp.abs(packed.T * lower), axis=1))
    size = columns(x_t)
    row = jnp.max(jnp.abs(m_t) / jnp.where(size > 0, size, 1.0)[:, None], axis=0)[order]
    by_product = safe_log(row) + safe_log(size)
    return jnp.where(part == SCALES, by_lu, jnp.maximum(by_lu, by_product)) - SLACK


def _log_gain(w: Array, wide: bool) -> Array:
    """1/2 log(tr W W^T / N); `wide`: the entries may have squares beyond float64."""
    flat = w.reshape(-1)
    if wide:
        size = columns(flat[None])[0]
    else:
        # a dot product, since XLA's reductions are not vectorised
        size = jnp.sqrt(flat @ flat)
    return safe_log(size) - 0.5 * float(np.log(w.shape[0]))


def _multiply(fixed: Fixed, st: State, m: Array) -> tuple[Any, Array, Array, Array]:
    """(carry, M^T, log_gain, sum of log gains) after m factors, or after a part of one."""

    def times(x_t, w):
        return jnp.matmul(x_t, w.T, precision="highest")

    def one(i, c):
        carry, x_t, log_gain, total = c
        carry, w = fixed.layer(carry, st.layer + i)
        w = w.astype(x_t.dtype)
        gain = _log_gain(w, fixed.wide)
        return carry, times(x_t, w), log_gain.at[st.layer + i].set(gain), total + gain

    def whole():
        return lax.fori_loop(0, m, one, (st.carry, st.x_t, st.log_gain, jnp.asarray(0.0)))

    def partial():
        carry, w = fixed.layer(st.carry, st.layer)
        w = w.astype(st.x_t.dtype)
        d = jnp.max(jnp.abs(w), axis=0)
        log_gain = st.log_gain.at[st.layer].set(_log_gain(w, fixed.wide))

        def scales():
            return st.carry, st.x_t * d[None, :], log_gain, jnp.asarray(0.0)

        def rest():
            unit = w / jnp.where(d > 0, d, 1.0)[None, :]
            return carry, times(st.x_t, unit), log_gain, jnp.asarray(0.0)

        return lax.cond(st.part == SCALES, scales, rest)

    return partial() if fixed.careful else lax.cond(st.part == WHOLE, whole, partial)


def next_block(fixed: Fixed, st: State) -> Block:
    """The next factors, or part of one, multiplied into X."""
    m = jnp.minimum(st.length, fixed.depth - st.layer)
    is_single = m == 1
    carry, m_t, log_gain, total = _multiply(fixed, st, m)
    # Squares that leave float64 reject a block; a single factor has nothing shorter to fall back
    # on, so its columns are measured without overflow.
    column = lax.cond(
        is_single, lambda: columns(m_t), lambda: jnp.sqrt((m_t * m_t) @ jnp.ones(fixed.n))
    )
    return Block(m, is_single, carry, m_t, log_gain, total, column)


def factorise(st: State, block: Block) -> Pivots:
    """LU of M, with the pivots judged against the rounding of the block."""
    x_t, packed, order = _lu(block.m_t)
    r = jnp.abs(jnp.diagonal(packed))
    live = (st.s > -jnp.inf) & (r > 0)
    by_block = safe_log(r) - jnp.maximum(safe_log(block.column), block.total - SLACK)
    g = lax.cond(
        block.is_single,
        lambda: safe_log(r) - _log_rounding(block.m_t, st.x_t, packed, order, st.part),
        lambda: by_block,
    )
    return Pivots(x_t, packed, r, g, jnp.min(jnp.where(live, by_block, 0.0)))


def factorise_again(
    fixed: Fixed, st: State, block: Block, pivots: Pivots
) -> tuple[State, Pivots, Array]:
    """The careful sweep's second look: columns that depend on others, again in the last place.

    Returns:
      the state in the new order; its pivots; (N,) which directions keep their rank.
    """
    live = st.s > -jnp.inf
    keep = live & (pivots.g > fixed.lost_below)

    def last():
        order = jnp.argsort(~keep, stable=True)
        moved = reorder(st, order, fixed.rows)
        again = factorise(moved, block._replace(m_t=block.m_t[order], column=block.column[order]))
        # coefficients on columns that stood behind them are rounding, blown up by the scales
        stood_before = order[:, None] > order[None, :]
        packed = jnp.where(keep[order][:, None] | stood_before, again.packed, 0.0)
        return moved, again._replace(packed=packed, nats=pivots.nats), keep[order]

    return lax.cond(jnp.any(live & ~keep), last, lambda: (st, pivots, keep))


def no_row_left(packed: Array, lost: Array, keep: Array) -> Array:
    """Whether the rows of lost pivots are empty; else they hold what later columns need."""
    i = jnp.arange(lost.shape[0])
    later = i[:, None] > i[None, :]
    return ~jnp.any(lost[None, :] & keep[:, None] & later & (packed != 0))
