"""The stabilised product of many matrices, J = X diag(e^s) T.

    J = W_L ... W_2 W_1 = X diag(e^s) T

X is well conditioned (not orthogonal), s holds natural logarithms of scales, T is unit triangular
with moderate entries: the UDT of quantum Monte Carlo. A sweep multiplies some factors into X,
factorises the result M = W_{l+m} ... W_{l+1} X = X' R by LU with row pivots (a third of the cost of
QR, and X' need only be well conditioned), and folds R into s and T. The number m of factors per
block is chosen as an ODE solver chooses its step: the pivots of R, against the rounding of the
block, bound its error; a block past the bound is thrown away and redone at m / 2, and m follows a
running mean of the nats lost per layer. One factor that is still past the bound enters as two, W =
A D with D the sizes of its columns: a matrix whose rows or columns are merely graded loses nothing.

The sweep cannot gain digits that the factors do not determine. A factor whose condition exceeds
1/eps of its dtype holds singular values that its own rounding has decided; `undetermined` counts
them. Directions that grow apart and draw near again (A ... A then A^-1 ... A^-1) carry rounding
from the large to the small; `closed` measures it.

Cost: O(depth * width^3), memory O(width^2) beside the factors. Everything here runs inside float64
(x64) and knows nothing of steps, lanes or networks; `gradjax.spectrum.grading` turns the result
into singular values.

References: G. W. Stewart, On graded QR decompositions of products of matrices (ETNA 3, 1995); D. E.
Stewart, A new algorithm for the SVD of a long product of matrices and the stability of products
(ETNA 5, 1997); Oliveira & Stewart, Exponential splittings of products of matrices and accurately
computing singular values of long products (Linear Algebra Appl. 309, 2000); Higham, Accuracy and
Stability of Numerical Algorithms, ch. 9 (the rounding |L| |U| of LU).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gradjax.spectrum import blocks
from gradjax.spectrum.blocks import (
    BLOCK_ERROR,
    EPS,
    REST,
    SCALES,
    SLACK,
    WHOLE,
    Block,
    Fixed,
    Layer,
    Pivots,
    State,
)
from gradjax.spectrum.logscale import columns, safe_log, unit_triangle

# Nats that the smallest pivot of a perfectly conditioned block shows under LU.
LU_OFFSET = 3.0

# Largest entry of T that leaves 1e-6 in float64.
GROWTH = 1e7

# Nats by which scales may stand out of order before T stops being moderate.
DISORDER = 12.0

# Nats by which directions may draw near again: 5 cost nothing, 12 to 14 gave errors of 1e-4 to 10.
CLOSED = 9.0

# Factors per block.
LONGEST = 64

# Columns of a block outside [1 / RANGE, RANGE] may have lost digits to under- or overflow.
RANGE = 1e140


class Product(NamedTuple):
    """J = X diag(e^s) T as the sweep leaves it.

    X and T are stored transposed: LAPACK's order, which needs no copies.

    Attributes:
      x_t: (N, N) X^T.
      s: (N,) nats; -inf where the rank is lost, NaN if the sweep gave up.
      t_t: (N, N) T^T.
      log_gain: (depth,) 1/2 log(tr W W^T / N).
      blocks: () factorisations.
      rejects: () blocks thrown away.
      error: () bound on the error of log sigma by the pivots, root sum of squares over blocks.
      worst: () the largest term of `error`.
      closed: () nats by which two directions drew near again after rounding had mixed them.
      growth: () largest entry of T.
      disorder: () nats by which s is out of descending order.
      undetermined: () singular values that one factor's own rounding has decided.
      failed_at: () layer at which the sweep gave up, or -1.
      nonfinite: () whether it gave up because the factor there is NaN or inf.
    """

    x_t: Array
    s: Array
    t_t: Array
    log_gain: Array
    blocks: Array
    rejects: Array
    error: Array
    worst: Array
    closed: Array
    growth: Array
    disorder: Array
    undetermined: Array
    failed_at: Array
    nonfinite: Array


def _int(value: int) -> Array:
    return jnp.asarray(value, jnp.int32)


def _accept(
    fixed: Fixed, st: State, block: Block, pivots: Pivots, keep: Array, lost: Array, size: Array
) -> State:
    """Fold the block into s and T, and choose the length of the next one."""
    x_t, packed, r, g, nats = pivots
    lowest = jnp.min(jnp.where(keep, g, 0.0))
    scaled = unit_triangle(packed, jnp.where(keep, r, 0.0), st.s)

    reach = jnp.max(jnp.abs(safe_log(size))) / float(np.log(RANGE))
    used = jnp.maximum(jnp.maximum(-nats - LU_OFFSET, 0.2), reach * fixed.room)
    now = used / block.m.astype(nats.dtype)
    change = 0.2 * jnp.clip(now - st.slope, -st.slope, st.slope)
    slope = jnp.where(st.slope < 0, now, st.slope + change)
    wanted = jnp.minimum(0.75 * fixed.room / slope, LONGEST).astype(jnp.int32)

    whole = st.part == WHOLE
    error = BLOCK_ERROR * EPS * jnp.exp(-lowest)
    s = jnp.where(keep, st.s + safe_log(r), -jnp.inf)
    # One factor rounds row by row, so that it does not mix what its rows open; a diagonal one
    # mixes nothing.
    level = jnp.where(block.is_single, st.s, st.s + safe_log(block.column))
    mixed = (packed != 0) & keep[:, None] & keep[None, :] & (st.part != SCALES)
    new = st._replace(
        layer=st.layer + jnp.where(st.part == SCALES, 0, block.m),
        part=jnp.where(st.part == SCALES, _int(REST), _int(SCALES if fixed.careful else WHOLE)),
        length=jnp.where(whole, jnp.clip(wanted, 1, 4 * st.length), st.length),
        slope=jnp.where(whole, slope, st.slope),
        carry=block.carry,
        x_t=jnp.where(keep[:, None], x_t, 0.0),
        s=s,
        t_t=tuple(t @ scaled[:b, :b] for t, (_, b) in zip(st.t_t, fixed.rows, strict=True)),
        doubt=st.doubt | (block.is_single & keep & (g < fixed.doubt_below)),
        gap=jnp.where(mixed, jnp.maximum(st.gap, level[:, None] - level[None, :]), st.gap),
        log_gain=block.log_gain,
        blocks=st.blocks + 1,
        error=st.error + error**2,
        worst=jnp.maximum(st.worst, error),
    )

    def live_first():
        """Zero columns amid the next LU would take rows away from live ones."""
        return blocks.reorder(new, jnp.argsort(~keep, stable=True), fixed.rows)

    return lax.cond(jnp.any(lost), live_first, lambda: new)


def _reject(fixed: Fixed, st: State, block: Block) -> State:
    """Half the length next, or one factor in two parts; the sweep ends if a part fails."""
    halve = (st.part == WHOLE) & ~block.is_single
    give_up = st.part != WHOLE
    return st._replace(
        layer=jnp.where(give_up, _int(fixed.depth), st.layer),
        part=jnp.where(halve, _int(WHOLE), _int(SCALES)),
        length=jnp.maximum(block.m // 2, 1),
        rejects=st.rejects + 1,
        s=jnp.where(give_up, jnp.nan, st.s),
        failed_at=jnp.where(give_up, st.layer, st.failed_at),
        nonfinite=give_up & ~jnp.all(jnp.isfinite(block.column)),
    )


def _advance(fixed: Fixed, before: State) -> State:
    """One block: multiply, factorise, and accept or reject it."""
    st, block = before, blocks.next_block(fixed, before)
    if fixed.careful:
        order = jnp.argsort(-(st.s + safe_log(block.column)))
        st = blocks.reorder(st, order, fixed.rows)
        block = block._replace(m_t=block.m_t[order], column=block.column[order])
    pivots = blocks.factorise(st, block)
    live = st.s > -jnp.inf
    if fixed.careful:
        st, pivots, live = blocks.factorise_again(fixed, st, block, pivots)
    keep = live & (pivots.r > 0)
    lost = live & ~keep

    lowest = jnp.min(jnp.where(keep, pivots.g, 0.0))
    size = jnp.where(st.s > -jnp.inf, block.column, 1.0)
    in_range = (jnp.min(size) > 1 / RANGE) & (jnp.max(size) < RANGE)
    good = jnp.where(
        st.part == WHOLE,
        (lowest > fixed.limit) & (in_range | block.is_single),
        lowest > fixed.lost_below,
    )
    rows_are_empty = lax.cond(
        jnp.any(lost),
        lambda: blocks.no_row_left(pivots.packed, lost, keep),
        lambda: jnp.asarray(True),
    )
    good = good & jnp.all(jnp.isfinite(block.column)) & rows_are_empty
    return lax.cond(
        good,
        lambda: _accept(fixed, st, block, pivots, keep, lost, size),
        lambda: _reject(fixed, before, block),
    )


def _first_state(fixed: Fixed, carry: Any) -> State:
    n = fixed.n
    eye = jnp.eye(n)
    first = fixed.layer(carry, _int(0))[1].astype(eye.dtype)
    return State(
        layer=_int(0),
        part=_int(SCALES if fixed.careful else WHOLE),
        length=_int(1 if fixed.careful else 2),
        slope=jnp.asarray(-1.0),
        carry=carry,
        # the columns of J may be sorted freely: large ones first, dead inputs last
        x_t=eye[jnp.argsort(-columns(first.T))],
        s=jnp.zeros(n),
        t_t=tuple(eye[a:b, :b] for a, b in fixed.rows),
        doubt=jnp.zeros(n, bool),
        gap=jnp.zeros((n, n)),
        log_gain=jnp.full(fixed.depth, jnp.nan),
        blocks=_int(0),
        rejects=_int(0),
        error=jnp.asarray(0.0),
        worst=jnp.asarray(0.0),
        failed_at=_int(-1),
        nonfinite=jnp.asarray(False),
    )


def _result(st: State) -> Product:
    t_t, live = blocks.join(st.t_t), st.s > -jnp.inf
    s = jnp.where(live, st.s, 0.0)
    left = jnp.where(
        live[:, None] & live[None, :], jnp.maximum(s[:, None] - s[None, :], 0.0), jnp.inf
    )
    smallest_so_far = lax.cummin(jnp.where(live, st.s, jnp.inf))
    return Product(
        x_t=st.x_t,
        s=st.s,
        t_t=t_t,
        log_gain=st.log_gain,
        blocks=st.blocks,
        rejects=st.rejects,
        error=jnp.sqrt(st.error),
        worst=st.worst,
        closed=jnp.maximum(jnp.max(st.gap - left), 0.0),
        growth=jnp.max(jnp.abs(t_t)),
        disorder=jnp.max(jnp.where(live, st.s - smallest_so_far, 0.0)),
        undetermined=jnp.sum(st.doubt & live, dtype=jnp.int32),
        failed_at=st.failed_at,
        nonfinite=st.nonfinite,
    )


def sweep(
    layer: Layer, carry: Any, depth: int, n: int, *, tol: Array, dtype: Any, careful: bool = False
) -> Product:
    """J = X diag(e^s) T in one pass with blocks of adaptive length.

    Args:
      layer: (carry, index) -> (carry, W (n, n)).
      carry: the state before the first layer.
      depth: number of factors.
      n: width.
      tol: error of log sigma to aim at, nats.
      dtype: of the factors; pivots below its rounding are counted as undetermined.
      careful: the last resort, some ten times as slow: one factor at a time, always as A D, columns
        sorted by scale (T is dense then), and a column that depends on others factorised again in
        the last place, so that it takes no row from them.
    """
    limit = jnp.log(BLOCK_ERROR * EPS / tol)
    fixed = Fixed(
        layer=layer,
        depth=depth,
        n=n,
        careful=careful,
        limit=limit,
        room=-limit - LU_OFFSET,
        lost_below=float(np.log(8 * n * EPS)) + SLACK,
        doubt_below=float(np.log(jnp.finfo(dtype).eps)) + SLACK,
        wide=jnp.finfo(dtype).bits > 32,
        rows=[(0, n)] if careful else blocks.split(n),
    )
    start = _first_state(fixed, carry)
    return _result(
        lax.while_loop(lambda st: st.layer < depth, lambda st: _advance(fixed, st), start)
    )
