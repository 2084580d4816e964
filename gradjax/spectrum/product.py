"""The stabilised product of many matrices, J = X diag(e^s) T.

    J = W_L ... W_2 W_1 = X diag(e^s) T

X is well conditioned (not orthogonal), s holds natural logarithms of scales, T is unit triangular
with moderate entries: the UDT of quantum Monte Carlo. A sweep multiplies some factors into X,
factorises the result M = W_{l+m} ... W_{l+1} X = X' R by LU with row pivots (a third of the cost of
QR, and X' need only be well conditioned), and folds R into s and T. The number m of factors per
block is chosen as an ODE solver chooses its step: the pivots of R, against the rounding of the
block, bound its error; a block past the bound is thrown away and redone at m / 2, and m follows a
running mean of the nats lost per layer. One factor that is still past the bound enters as two, W =
A D with D the sizes of its columns: what is merely graded by rows or columns loses nothing.

What it does not do: gain digits that the factors do not determine. One factor whose condition
exceeds 1/eps of its dtype holds singular values that its own rounding has decided; they are counted
in `undetermined`. Directions that grow apart and draw near again (A ... A then A^-1 ... A^-1) carry
rounding from the large to the small; `closed` tells.

Cost: O(depth * width^3), memory O(width^2) beside the factors. Everything here runs inside float64
(x64) and knows nothing of steps, lanes or networks; `gradjax.spectrum.grading` turns the result
into singular values.

References: G. W. Stewart, On graded QR decompositions of products of matrices (ETNA 3, 1995); D. E.
Stewart, A new algorithm for the SVD of a long product of matrices and the stability of products
(ETNA 5, 1997); Oliveira & Stewart, Exponential splittings of products of matrices and accurately
computing singular values of long products (Linear Algebra Appl. 309, 2000); Higham, Accuracy and
Stability of Numerical Algorithms, ch. 9 (the rounding |L| |U| of LU).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

EPS = float(np.finfo(np.float64).eps)
BLOCK_ERROR = 500.0  # error of a block <= BLOCK_ERROR * eps * e^-g, g its smallest log pivot; measured 25 to 400
ROUNDING = 100.0  # the same constant where the rounding of a product is bounded entry by entry
SLACK = float(np.log(BLOCK_ERROR / ROUNDING))
LU_OFFSET = 3.0  # nats that the smallest pivot of a perfectly conditioned block shows under LU
CLIP = 60.0  # cap on s_j - s_i above the diagonal of T: e^60 lies far beyond what GROWTH accepts
GROWTH = 1e7  # largest entry of T that leaves 1e-6 in float64
DISORDER = 12.0  # nats by which scales may stand out of order before T stops being moderate
CLOSED = 9.0  # nats by which directions may draw near again: 5 cost nothing, 12 to 14 gave errors of 1e-4 to 10
LONGEST = 64  # factors per block
RANGE = 1e140  # columns of a block outside [1 / RANGE, RANGE] may have lost digits to under- or overflow
WHOLE, SCALES, REST = (
    0,
    1,
    2,
)  # what of a factor enters next: all of it, its column sizes D, or A of W = A D

# (carry, layer index) -> (carry, W of shape (N, N)); called again after a rejected block, so it
# must be pure
Layer = Callable[[Any, Array], tuple[Any, Array]]


class Product(NamedTuple):
    """J = X diag(e^s) T as the sweep leaves it; X and T are stored transposed (LAPACK's order, no
    copies).
    """

    x_t: Array  # (N, N) X^T
    s: Array  # (N,) nats; -inf where the rank is lost, NaN if the sweep gave up
    t_t: Array  # (N, N) T^T
    log_gain: Array  # (depth,) 1/2 log(tr W W^T / N)
    blocks: Array  # () factorisations
    rejects: Array  # () blocks thrown away
    error: Array  # () bound on the error of log sigma by the pivots, root of the sum of squares over blocks
    worst: Array  # () the largest term of `error`
    closed: Array  # () nats by which two directions drew near again after rounding had mixed them
    growth: Array  # () largest entry of T
    disorder: Array  # () nats by which s is out of descending order
    undetermined: Array  # () singular values that one factor's own rounding has decided
    failed_at: Array  # () layer at which the sweep gave up, or -1
    nonfinite: Array  # () whether it gave up because the factor there is NaN or inf


class _State(NamedTuple):
    layer: Array
    part: Array  # WHOLE, SCALES or REST
    length: Array  # of the next block
    slope: Array  # nats lost per layer, running mean; -1 before the first block
    carry: Any
    x_t: Array
    s: Array
    t_t: tuple[Array, ...]  # row blocks of T^T, each only up to the diagonal
    doubt: Array  # (N,) bool
    gap: Array  # (N, N) [j, i]: largest nats of direction j over i at which rounding has mixed them
    log_gain: Array
    blocks: Array
    rejects: Array
    error: Array  # sum of squares
    worst: Array
    failed_at: Array
    nonfinite: Array


def _int(value: int) -> Array:
    return jnp.asarray(value, jnp.int32)


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


def _lu(m_t: Array) -> tuple[Array, Array, Array]:
    """M[order] = L U by row pivots: (X^T, (L and U packed)^T, order) with M = X U and |X_ij| <= 1.

    A column of row numbers rides along in the factorisation: unrolling LAPACK's list of swaps costs more.
    """
    n = m_t.shape[0]
    rows = jnp.arange(n, dtype=m_t.dtype)[None]
    packed = lax.linalg.lu(jnp.concatenate([m_t, rows]).T)[0].T
    l_t = jnp.triu(packed[:n], 1) + jnp.eye(n, dtype=m_t.dtype)
    order = jnp.round(packed[n] @ l_t).astype(jnp.int32)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(n, dtype=jnp.int32))
    return l_t[:, inverse], packed[:n], order


def _log_rounding(m_t: Array, x_t: Array, packed: Array, order: Array, part: Array) -> Array:
    """Log of the rounding that sits in each pivot of M = W X = L U for one factor W, in units of
    eps.

    The larger of (|L| |U|)_ii, the factorisation's, and ||w_p|| ||x_i||, the product's, p the pivot's row. Neither
    changes when rows or columns are scaled. A diagonal W rounds entry by entry, so that the second falls away.
    """
    lower = jnp.tril(packed, -1)
    by_lu = safe_log(jnp.abs(jnp.diagonal(packed)) + jnp.sum(jnp.abs(packed.T * lower), axis=1))
    size = columns(x_t)
    row = jnp.max(jnp.abs(m_t) / jnp.where(size > 0, size, 1.0)[:, None], axis=0)[order]
    by_product = safe_log(row) + safe_log(size)
    return jnp.where(part == SCALES, by_lu, jnp.maximum(by_lu, by_product)) - SLACK


def _split(n: int) -> list[tuple[int, int]]:
    """Row blocks of T^T; T being triangular, each block ends at its own diagonal."""
    size = max(64, -(-n // 4))
    return [(a, min(a + size, n)) for a in range(0, n, size)]


def _join(t_t: tuple[Array, ...]) -> Array:
    n = t_t[-1].shape[1]
    return jnp.concatenate([jnp.pad(t, ((0, 0), (0, n - t.shape[1]))) for t in t_t])


def _reorder(st: _State, order: Array, rows: list[tuple[int, int]]) -> _State:
    """Directions in another order. T stays triangular if live ones only move up: they have more
    columns there.
    """
    whole = _join(st.t_t)[:, order]
    t_t = tuple(whole[a:b, :b] for a, b in rows)
    return st._replace(
        x_t=st.x_t[order],
        s=st.s[order],
        t_t=t_t,
        doubt=st.doubt[order],
        gap=st.gap[order][:, order],
    )


def _log_gain(w: Array, wide: bool) -> Array:
    """1/2 log(tr W W^T / N); `wide`: the entries may have squares beyond float64."""
    flat = w.reshape(-1)
    size = (
        columns(flat[None])[0] if wide else jnp.sqrt(flat @ flat)
    )  # a dot: XLA's reductions are not vectorised
    return safe_log(size) - 0.5 * float(np.log(w.shape[0]))


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
      careful: the last resort, some ten times as slow: one factor at a time, always as A D, columns sorted by scale
        (T is dense then), and a column that depends on others factorised again in the last place, so that it takes
        no row from them.
    """
    limit = jnp.log(BLOCK_ERROR * EPS / tol)
    room = -limit - LU_OFFSET
    lost_below = float(np.log(8 * n * EPS)) + SLACK  # a pivot that is nothing but rounding
    doubt_below = float(np.log(jnp.finfo(dtype).eps)) + SLACK
    wide = jnp.finfo(dtype).bits > 32
    rows = [(0, n)] if careful else _split(n)
    first_part = SCALES if careful else WHOLE

    def times(x_t, w):
        return jnp.matmul(x_t, w.T, precision="highest")

    def multiply(st: _State, m: Array):
        """(carry, M^T, log_gain, sum of log gains) after m factors, or after a part of one."""

        def one(i, c):
            carry, x_t, log_gain, total = c
            carry, w = layer(carry, st.layer + i)
            w = w.astype(x_t.dtype)
            gain = _log_gain(w, wide)
            return carry, times(x_t, w), log_gain.at[st.layer + i].set(gain), total + gain

        def whole():
            return lax.fori_loop(0, m, one, (st.carry, st.x_t, st.log_gain, jnp.asarray(0.0)))

        def partial():
            carry, w = layer(st.carry, st.layer)
            w = w.astype(st.x_t.dtype)
            d = jnp.max(jnp.abs(w), axis=0)
            log_gain = st.log_gain.at[st.layer].set(_log_gain(w, wide))
            scaled = lambda: (st.carry, st.x_t * d[None, :], log_gain, jnp.asarray(0.0))
            rest = lambda: (
                carry,
                times(st.x_t, w / jnp.where(d > 0, d, 1.0)[None, :]),
                log_gain,
                jnp.asarray(0.0),
            )
            return lax.cond(st.part == SCALES, scaled, rest)

        return partial() if careful else lax.cond(st.part == WHOLE, whole, partial)

    def factorise(st: _State, m_t: Array, column: Array, total: Array, alone: Array):
        """LU of M, and the log pivots g against the rounding of the block: its error is BLOCK_ERROR
        eps e^-g.

        Also the smallest pivot against the columns and gains of the block, which longer blocks would be judged by.
        """
        x_t, packed, order = _lu(m_t)
        r = jnp.abs(jnp.diagonal(packed))
        live = (st.s > -jnp.inf) & (r > 0)
        by_block = safe_log(r) - jnp.maximum(safe_log(column), total - SLACK)
        g = lax.cond(
            alone,
            lambda: safe_log(r) - _log_rounding(m_t, st.x_t, packed, order, st.part),
            lambda: by_block,
        )
        return x_t, packed, r, g, jnp.min(jnp.where(live, by_block, 0.0))

    def body(st: _State) -> _State:
        m = jnp.minimum(st.length, depth - st.layer)
        alone = m == 1
        carry, m_t, log_gain, total = multiply(st, m)
        # squares that leave float64 reject a block; one factor has nothing shorter to fall back on
        column = lax.cond(alone, lambda: columns(m_t), lambda: jnp.sqrt((m_t * m_t) @ jnp.ones(n)))
        old = st
        if careful:
            order = jnp.argsort(-(st.s + safe_log(column)))
            st, m_t, column = _reorder(st, order, rows), m_t[order], column[order]
        x_t, packed, r, g, nats = factorise(st, m_t, column, total, alone)
        live = st.s > -jnp.inf
        if careful:
            keep = live & (g > lost_below)

            def last():
                """Dependent columns again, in the last place."""
                order = jnp.argsort(~keep, stable=True)
                moved = _reorder(st, order, rows)
                x_t, packed, r, g, _ = factorise(moved, m_t[order], column[order], total, alone)
                # their coefficients on columns that stood behind them are rounding, blown up by the
                # scales
                stood_before = order[:, None] > order[None, :]
                packed = jnp.where(keep[order][:, None] | stood_before, packed, 0.0)
                return moved, x_t, packed, r, g, keep[order]

            st, x_t, packed, r, g, keep = lax.cond(
                jnp.any(live & ~keep), last, lambda: (st, x_t, packed, r, g, keep)
            )
            live = keep
        keep = live & (r > 0)
        lost = live & ~keep

        def no_row_left():  # a lost pivot's row must be empty, or it holds what later columns need
            i = jnp.arange(n)
            return ~jnp.any(
                lost[None, :] & keep[:, None] & (i[:, None] > i[None, :]) & (packed != 0)
            )

        lowest = jnp.min(jnp.where(keep, g, 0.0))
        size = jnp.where(st.s > -jnp.inf, column, 1.0)
        in_range = (jnp.min(size) > 1 / RANGE) & (jnp.max(size) < RANGE)
        good = jnp.where(
            st.part == WHOLE, (lowest > limit) & (in_range | alone), lowest > lost_below
        )
        good = (
            good
            & jnp.all(jnp.isfinite(column))
            & lax.cond(jnp.any(lost), no_row_left, lambda: jnp.asarray(True))
        )

        def accept() -> _State:
            scaled = unit_triangle(packed, jnp.where(keep, r, 0.0), st.s)
            reach = jnp.max(jnp.abs(safe_log(size))) / float(np.log(RANGE))
            now = jnp.maximum(jnp.maximum(-nats - LU_OFFSET, 0.2), reach * room) / m.astype(
                nats.dtype
            )
            slope = jnp.where(
                st.slope < 0, now, st.slope + 0.2 * jnp.clip(now - st.slope, -st.slope, st.slope)
            )
            wanted = jnp.minimum(0.75 * room / slope, LONGEST).astype(jnp.int32)
            whole = st.part == WHOLE
            error = BLOCK_ERROR * EPS * jnp.exp(-lowest)
            s = jnp.where(keep, st.s + safe_log(r), -jnp.inf)
            # one factor rounds row by row, so that what its rows open is not mixed by it; a
            # diagonal one mixes nothing
            level = jnp.where(alone, st.s, st.s + safe_log(column))
            mixed = (packed != 0) & keep[:, None] & keep[None, :] & (st.part != SCALES)
            new = st._replace(
                layer=st.layer + jnp.where(st.part == SCALES, 0, m),
                part=jnp.where(st.part == SCALES, _int(REST), _int(first_part)),
                length=jnp.where(whole, jnp.clip(wanted, 1, 4 * st.length), st.length),
                slope=jnp.where(whole, slope, st.slope),
                carry=carry,
                x_t=jnp.where(keep[:, None], x_t, 0.0),
                s=s,
                t_t=tuple(t @ scaled[:b, :b] for t, (_, b) in zip(st.t_t, rows, strict=True)),
                doubt=st.doubt | (alone & keep & (g < doubt_below)),
                gap=jnp.where(mixed, jnp.maximum(st.gap, level[:, None] - level[None, :]), st.gap),
                log_gain=log_gain,
                blocks=st.blocks + 1,
                error=st.error + error**2,
                worst=jnp.maximum(st.worst, error),
            )
            # live directions first: zero columns amid the next LU would take rows away from them
            packed_up = lambda: _reorder(new, jnp.argsort(~keep, stable=True), rows)
            return lax.cond(jnp.any(lost), packed_up, lambda: new)

        def reject() -> _State:
            halve = (st.part == WHOLE) & ~alone
            give_up = st.part != WHOLE
            return old._replace(
                layer=jnp.where(give_up, _int(depth), st.layer),
                part=jnp.where(halve, _int(WHOLE), _int(SCALES)),
                length=jnp.maximum(m // 2, 1),
                rejects=st.rejects + 1,
                s=jnp.where(give_up, jnp.nan, old.s),
                failed_at=jnp.where(give_up, st.layer, st.failed_at),
                nonfinite=give_up & ~jnp.all(jnp.isfinite(column)),
            )

        return lax.cond(good, accept, reject)

    eye = jnp.eye(n)
    first = layer(carry, _int(0))[1].astype(eye.dtype)
    start = _State(
        layer=_int(0),
        part=_int(first_part),
        length=_int(1 if careful else 2),
        slope=jnp.asarray(-1.0),
        carry=carry,
        # the columns of J may be sorted freely: large ones first, dead inputs last
        x_t=eye[jnp.argsort(-columns(first.T))],
        s=jnp.zeros(n),
        t_t=tuple(eye[a:b, :b] for a, b in rows),
        doubt=jnp.zeros(n, bool),
        gap=jnp.zeros((n, n)),
        log_gain=jnp.full(depth, jnp.nan),
        blocks=_int(0),
        rejects=_int(0),
        error=jnp.asarray(0.0),
        worst=jnp.asarray(0.0),
        failed_at=_int(-1),
        nonfinite=jnp.asarray(False),
    )
    st = lax.while_loop(lambda st: st.layer < depth, body, start)
    t_t, live = _join(st.t_t), st.s > -jnp.inf
    s = jnp.where(live, st.s, 0.0)
    left = jnp.where(
        live[:, None] & live[None, :], jnp.maximum(s[:, None] - s[None, :], 0.0), jnp.inf
    )
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
        disorder=jnp.max(jnp.where(live, st.s - lax.cummin(jnp.where(live, st.s, jnp.inf)), 0.0)),
        undetermined=jnp.sum(st.doubt & live, dtype=jnp.int32),
        failed_at=st.failed_at,
        nonfinite=st.nonfinite,
    )
