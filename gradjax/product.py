"""The stabilised product of many matrices, J = X diag(e^s) T, and its singular values in log scale.

    J = W_L ... W_2 W_1 = X diag(e^s) T

X is well conditioned (not orthogonal), s holds natural logarithms of scales, T is unit triangular with moderate
entries: the UDT of quantum Monte Carlo. A sweep multiplies some factors into X, factorises the result
M = W_{l+m} ... W_{l+1} X = X' R by LU with row pivots (a third of the cost of QR, and X' need only be well
conditioned), and folds R into s and T. The number m of factors per block is chosen as an ODE solver chooses its
step: the pivots of R bound the error of the block, `C eps exp(-min_i log(|M_i| / |r_ii|))`; a block past the bound
is thrown away and redone at m / 2, and m follows a running mean of the nats lost per layer.

At the end diag(e^s) T is graded by QR in log scale until rows far apart in scale no longer see each other, and its
singular values come from float64 SVDs of overlapping windows of a few nats.

What it does not do: gain digits that the factors do not determine. One factor whose condition exceeds 1/eps of its
dtype holds singular values that its own rounding has decided; they are counted in `undetermined`.

Cost: O(depth * width^3), memory O(width^2) beside the factors. Everything here runs inside float64 (x64) and knows
nothing of steps, lanes or networks.

References: G. W. Stewart, On graded QR decompositions of products of matrices (ETNA 3, 1995); D. E. Stewart, A new
algorithm for the SVD of a long product of matrices and the stability of products (ETNA 5, 1997); Oliveira & Stewart,
Exponential splittings of products of matrices and accurately computing singular values of long products (Linear
Algebra Appl. 309, 2000); Drmac, Accurate computation of the product-induced singular value decomposition (SIAM J.
Numer. Anal. 35, 1998).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

EPS = float(np.finfo(np.float64).eps)
BLOCK_ERROR = 500.0  # error of a block <= BLOCK_ERROR * eps * e^-g, g its smallest log pivot; measured 25 to 400
LU_OFFSET = 3.0  # nats that the smallest pivot of a perfectly conditioned block shows under LU
CLIP = 60.0  # cap on s_j - s_i above the diagonal of T: e^60 lies far beyond what GROWTH accepts
GROWTH = 1e7  # largest entry of T that leaves 1e-6 in float64
DISORDER = 12.0  # nats by which scales may stand out of order before T stops being moderate
LONGEST = 64  # factors per block
RANGE = 1e140  # columns of a block outside [1 / RANGE, RANGE] may have lost digits to under- or overflow
ONE_SVD = 14.0  # nats of spread that one float64 SVD resolves to 1e-8 without grading
CORE = 12.0  # nats solved by one window

# (carry, layer index) -> (carry, W of shape (N, N)); called again after a rejected block, so it must be pure
Layer = Callable[[Any, Array], tuple[Any, Array]]


class Product(NamedTuple):
    """J = X diag(e^s) T as the sweep leaves it; X and T are stored transposed (LAPACK's order, no copies)."""

    x_t: Array  # (N, N) X^T
    s: Array  # (N,) nats; -inf where the rank is lost, NaN if the sweep gave up
    t_t: Array  # (N, N) T^T
    log_gain: Array  # (depth,) 1/2 log(tr W W^T / N)
    blocks: Array  # () factorisations
    rejects: Array  # () blocks thrown away
    error: Array  # () bound on the error of log sigma by the pivots, root of the sum of squares over blocks
    growth: Array  # () largest entry of T
    disorder: Array  # () nats by which s is out of descending order
    undetermined: Array  # () singular values that one factor's own rounding has decided
    failed_at: Array  # () layer at which the sweep gave up, or -1
    nonfinite: Array  # () whether it gave up because the factor there is NaN or inf


class _State(NamedTuple):
    layer: Array
    length: Array  # of the next block
    slope: Array  # nats lost per layer, running mean; -1 before the first block
    carry: Any
    x_t: Array
    s: Array
    t_t: tuple[Array, ...]  # row blocks of T^T, each only up to the diagonal
    log_gain: Array
    blocks: Array
    rejects: Array
    error: Array  # sum of squares
    doubt: Array  # (N,) bool
    failed_at: Array
    nonfinite: Array


def _int(value: int) -> Array:
    return jnp.asarray(value, jnp.int32)


def safe_log(x: Array) -> Array:
    """log, with -inf (and no NaN) at zero."""
    return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1.0)), -jnp.inf)


def _lu(m_t: Array) -> tuple[Array, Array, Array]:
    """M[order] = L U by row pivots, all transposed: (X^T, U^T, order) with M = X U and |X_ij| <= 1.

    A column of row numbers rides along in the factorisation: unrolling LAPACK's list of swaps costs more.
    """
    n = m_t.shape[0]
    rows = jnp.arange(n, dtype=m_t.dtype)[None]
    packed = lax.linalg.lu(jnp.concatenate([m_t, rows]).T)[0].T
    l_t = jnp.triu(packed[:n], 1) + jnp.eye(n, dtype=m_t.dtype)
    order = jnp.round(packed[n] @ l_t).astype(jnp.int32)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(n, dtype=jnp.int32))
    return l_t[:, inverse], packed[:n], order


def columns(m_t: Array) -> Array:
    """2-norms of the columns of M: overflow-safe."""
    top = jnp.max(jnp.abs(m_t), axis=1)
    unit = m_t / jnp.where(top > 0, top, 1.0)[:, None]
    return top * jnp.sqrt(jnp.sum(unit * unit, axis=1))


def graded(r_t: Array, r: Array, s: Array) -> Array:
    """(R_ij / r_i e^(s_j - s_i))^T for i <= j; zero where r_i = 0."""
    i = jnp.arange(r_t.shape[0])
    # a lost scale (-inf) has r = 0 or an empty row: any finite value serves
    s = jnp.where(jnp.isfinite(s), s, 0.0)
    weight = jnp.exp(jnp.minimum(s[:, None] - s[None, :], CLIP))
    r = r[None, :]
    return jnp.where((i[:, None] >= i[None, :]) & (r > 0), r_t * weight / jnp.where(r > 0, r, 1.0), 0.0)


def _split(n: int) -> list[tuple[int, int]]:
    """Row blocks of T^T; T being triangular, each block ends at its own diagonal."""
    size = max(64, -(-n // 4))
    return [(a, min(a + size, n)) for a in range(0, n, size)]


def _join(t_t: tuple[Array, ...]) -> Array:
    n = t_t[-1].shape[1]
    return jnp.concatenate([jnp.pad(t, ((0, 0), (0, n - t.shape[1]))) for t in t_t])


def _compact(live: Array, x_t: Array, s: Array, t_t: tuple[Array, ...]):
    """Live columns first, in their order: zero columns amid an LU would take rows away from the live ones.

    T stays triangular: a row of T only moves up, where more columns are allowed.
    """
    order = jnp.argsort(~live, stable=True)
    whole = jnp.where(live[None, :], _join(t_t), 0.0)[:, order]
    rows = _split(s.shape[0])
    return jnp.where(live[:, None], x_t, 0.0)[order], s[order], tuple(whole[a:b, :b] for a, b in rows)


def _log_gain(w: Array) -> Array:
    return safe_log(columns(w.reshape(1, -1))[0]) - 0.5 * float(np.log(w.shape[0]))


def _rank_limit(n: int) -> float:
    """Log pivot of one equilibrated factor below which it is rounding: the rank is lost."""
    return float(np.log(8 * n * EPS))


def sweep(layer: Layer, carry: Any, depth: int, n: int, *, tol: float, eps: float, gains: bool) -> Product:
    """J = X diag(e^s) T in one pass with blocks of adaptive length.

    Args:
      layer: (carry, index) -> (carry, W (n, n)).
      carry: the state before the first layer.
      depth: number of factors.
      n: width.
      tol: error of log sigma to aim at, nats.
      eps: unit roundoff of the factors' own dtype: pivots below it are counted as undetermined.
      gains: whether to fill `log_gain`.
    """
    limit = -float(np.log(tol / (BLOCK_ERROR * EPS)))
    rows = _split(n)

    def multiply(st: _State, m: Array):
        def one(i, c):
            carry, x_t, log_gain = c
            carry, w = layer(carry, st.layer + i)
            w = w.astype(x_t.dtype)
            if gains:
                log_gain = log_gain.at[st.layer + i].set(_log_gain(w))
            return carry, jnp.matmul(x_t, w.T, precision="highest"), log_gain

        return lax.fori_loop(0, m, one, (st.carry, st.x_t, st.log_gain))

    def body(st: _State) -> _State:
        m = jnp.minimum(st.length, depth - st.layer)
        alone = m == 1
        carry, m_t, log_gain = multiply(st, m)
        column = columns(m_t)
        x_t, r_t, order = _lu(m_t)
        r = jnp.abs(jnp.diagonal(r_t))
        live = st.s > -jnp.inf
        keep = live & (r > 0)
        g = jnp.where(keep, safe_log(r) - safe_log(column), 0.0)

        def against_row():  # what one factor has scaled down by rows has lost nothing
            top = jnp.max(jnp.abs(m_t) / jnp.where(column > 0, column, 1.0)[:, None], axis=0)[order]
            return jnp.where(keep, g - safe_log(top), 0.0)

        g = lax.cond(alone, against_row, lambda: g)
        lowest = jnp.min(g)
        lost = live & ~keep

        def no_row_left():  # a lost pivot's row must be empty, or it holds what later columns need
            i = jnp.arange(n)
            return ~jnp.any((lost[None, :] & keep[:, None] & (i[:, None] > i[None, :])) & (r_t != 0))

        scales = jnp.where(live, column, 1.0)
        in_range = (jnp.min(scales) > 1 / RANGE) & (jnp.max(scales) < RANGE)
        good = jnp.where(alone, lowest > _rank_limit(n), (lowest > limit) & in_range)
        good = good & jnp.all(jnp.isfinite(column)) & lax.cond(jnp.any(lost), no_row_left, lambda: jnp.asarray(True))

        def accept() -> _State:
            s = jnp.where(keep, st.s + safe_log(r), -jnp.inf)
            scaled = graded(r_t, jnp.where(keep, r, 0.0), st.s)
            t_t = tuple(t @ scaled[:b, :b] for t, (_, b) in zip(st.t_t, rows, strict=True))
            new = lax.cond(
                jnp.any(lost), lambda: _compact(keep, x_t, s, t_t), lambda: (jnp.where(keep[:, None], x_t, 0.0), s, t_t)
            )
            range_used = jnp.max(jnp.abs(safe_log(scales))) / np.log(RANGE)
            used = jnp.maximum(jnp.maximum(-lowest - LU_OFFSET, 0.2), range_used * (-limit - LU_OFFSET))
            now = used / m.astype(used.dtype)
            slope = jnp.where(st.slope < 0, now, st.slope + 0.2 * jnp.clip(now - st.slope, -st.slope, st.slope))
            wanted = jnp.minimum(0.75 * (-limit - LU_OFFSET) / slope, LONGEST).astype(jnp.int32)
            return _State(
                layer=st.layer + m,
                length=jnp.clip(wanted, 1, 4 * st.length),
                slope=slope,
                carry=carry,
                x_t=new[0],
                s=new[1],
                t_t=new[2],
                log_gain=log_gain,
                blocks=st.blocks + 1,
                rejects=st.rejects,
                error=st.error + (BLOCK_ERROR * EPS * jnp.exp(-lowest)) ** 2,
                doubt=st.doubt | (alone & keep & (g < float(np.log(eps)))),
                failed_at=st.failed_at,
                nonfinite=st.nonfinite,
            )

        def reject() -> _State:
            return st._replace(
                layer=jnp.where(alone, depth, st.layer).astype(jnp.int32),
                length=jnp.maximum(m // 2, 1),
                rejects=st.rejects + 1,
                s=jnp.where(alone, jnp.nan, st.s),
                failed_at=jnp.where(alone, st.layer, st.failed_at),
                nonfinite=alone & ~jnp.all(jnp.isfinite(column)),
            )

        return lax.cond(good, accept, reject)

    eye = jnp.eye(n)
    first = layer(carry, _int(0))[1].astype(eye.dtype)
    start = _State(
        layer=_int(0),
        length=_int(2),
        slope=jnp.asarray(-1.0),
        carry=carry,
        # the columns of J may be sorted freely: large ones first, dead inputs last
        x_t=eye[jnp.argsort(-columns(first.T))],
        s=jnp.zeros(n),
        t_t=tuple(eye[a:b, :b] for a, b in rows),
        log_gain=jnp.full((depth if gains else 0,), jnp.nan),
        blocks=_int(0),
        rejects=_int(0),
        error=jnp.asarray(0.0),
        doubt=jnp.zeros(n, bool),
        failed_at=_int(-1),
        nonfinite=jnp.asarray(False),
    )
    return _product(lax.while_loop(lambda st: st.layer < depth, body, start), _join)


def _product(st: Any, join: Callable[[Any], Array]) -> Product:
    """What the checks need to know about a finished sweep."""
    t_t = join(st.t_t)
    live = st.s > -jnp.inf
    disorder = jnp.max(jnp.where(live, st.s - lax.cummin(jnp.where(live, st.s, jnp.inf)), 0.0))
    return Product(
        x_t=st.x_t,
        s=st.s,
        t_t=t_t,
        log_gain=st.log_gain,
        blocks=st.blocks,
        rejects=st.rejects,
        error=jnp.sqrt(st.error),
        growth=jnp.max(jnp.abs(t_t)),
        disorder=disorder,
        undetermined=jnp.sum((st.doubt & live).astype(jnp.int32)),
        failed_at=st.failed_at,
        nonfinite=st.nonfinite,
    )


def sweep_sorted(layer: Layer, carry: Any, depth: int, n: int, *, eps: float, gains: bool) -> Product:
    """The last resort: one factor at a time, columns sorted by scale, T dense.

    Each factor enters as two, W = A D with D the norms of its columns, so that a factor graded by columns loses
    nothing; rank loss is decided on equilibrated rows and columns, and a lost column is factorised again in the
    last place, so that it takes no row from the others. About six times as slow as `sweep`.
    """

    def absorb(index, state, w):
        x_t, s, t_t, error, doubt, failed_at = state
        m_t = jnp.matmul(x_t, w.T, precision="highest")
        column = columns(m_t)
        order = jnp.argsort(-(s + safe_log(column)))
        m_t, s, t_t, column, doubt = m_t[order], s[order], t_t[:, order], column[order], doubt[order]
        live = (s > -jnp.inf) & (column > 0)
        m_t = jnp.where(live[:, None], m_t, 0.0)

        def pivots(x_r_order, live, column, m_t):
            _, r_t, order = x_r_order
            top = jnp.max(jnp.abs(m_t) / jnp.where(column > 0, column, 1.0)[:, None], axis=0)[order]
            return jnp.where(live, safe_log(jnp.abs(jnp.diagonal(r_t))) - safe_log(column) - safe_log(top), 0.0)

        factors = _lu(m_t)
        g = pivots(factors, live, column, m_t)
        keep = live & (g > _rank_limit(n))

        def again():
            last = jnp.argsort(~keep, stable=True)
            moved = m_t[last]
            x_t, r_t, order = _lu(moved)
            # coefficients of a lost column on columns that stood behind it are rounding, blown up by their scales
            earlier = last[:, None] > last[None, :]
            r_t = jnp.where(keep[last][:, None] | earlier, r_t, 0.0)
            g = pivots((x_t, r_t, order), keep[last], column[last], moved)
            return x_t, r_t, g, keep[last], s[last], t_t[:, last], doubt[last]

        x_t, r_t, g, keep, s, t_t, doubt = lax.cond(
            jnp.any(live & ~keep), again, lambda: (factors[0], factors[1], g, keep, s, t_t, doubt)
        )
        r = jnp.where(keep, jnp.abs(jnp.diagonal(r_t)), 0.0)
        g = jnp.where(keep, g, 0.0)
        bad = ~jnp.all(jnp.isfinite(column)) | ~jnp.all(jnp.isfinite(r))
        return (
            jnp.where(keep[:, None], x_t, 0.0),
            jnp.where(bad, jnp.nan, jnp.where(keep, s + safe_log(r), -jnp.inf)),
            t_t @ graded(r_t, r, s),
            error + (BLOCK_ERROR * EPS * jnp.exp(-jnp.min(g))) ** 2,
            doubt | (keep & (g < float(np.log(eps)))),
            jnp.where(bad & (failed_at < 0), index, failed_at),
        )

    def one(index, c):
        carry, log_gain, state = c
        carry, w = layer(carry, index)
        w = w.astype(log_gain.dtype)
        if gains:
            log_gain = log_gain.at[index].set(_log_gain(w))
        d = jnp.max(jnp.abs(w), axis=0)
        state = absorb(index, state, jnp.diag(d))
        state = absorb(index, state, w / jnp.where(d > 0, d, 1.0)[None, :])
        return carry, log_gain, state

    eye = jnp.eye(n)
    state = (eye, jnp.zeros(n), eye, jnp.asarray(0.0), jnp.zeros(n, bool), _int(-1))
    start = (carry, jnp.full((depth if gains else 1,), jnp.nan), state)
    _, log_gain, (x_t, s, t_t, error, doubt, failed_at) = lax.fori_loop(0, depth, one, start)
    st = _State(
        layer=_int(depth), length=_int(1), slope=error, carry=None, x_t=x_t, s=s, t_t=(t_t,),
        log_gain=log_gain[: depth if gains else 0], blocks=_int(2 * depth), rejects=_int(0), error=error,
        doubt=doubt, failed_at=failed_at, nonfinite=failed_at >= 0,
    )  # fmt: skip
    return _product(st, lambda t_t: t_t[0])


def fold_and_sort(s: Array, t: Array) -> tuple[Array, Array]:
    """Row norms of T into s; rows by descending scale, lost ones (s = -inf, zero rows) last."""
    norm = columns(t)
    s = jnp.where(jnp.isfinite(s), s, -jnp.inf) + safe_log(norm)
    order = jnp.argsort(-s)
    return s[order], (t / jnp.where(norm > 0, norm, 1.0)[:, None])[order]


def log_qr(a: Array, s: Array) -> tuple[Array, Array]:
    """A diag(e^s) = Q diag(e^s') U, U unit triangular, for s descending: (s', U^T)."""
    r_factor = jnp.linalg.qr(a, mode="r")
    r = jnp.where(s > -jnp.inf, jnp.abs(jnp.diagonal(r_factor)), 0.0)
    return s + safe_log(r), graded(r_factor.T, r, s)


def grade(product: Product, passes: int) -> tuple[Array, Array]:
    """X diag(e^s) T -> (s, T) with the same singular values, T upper triangular and nearly diagonal.

    A pass is diag(e^s) T = (Q R)^T in log scale. Rows that lie d nats apart mix by e^-d after the first pass, and
    by e^-2d less with each further one.
    """
    column = columns(product.x_t)
    order = jnp.argsort(-(product.s + safe_log(column)))
    s, t_t = product.s[order], product.t_t[:, order]
    s, u_t = log_qr(product.x_t[order].T, s)
    s, t = fold_and_sort(s, (t_t @ u_t).T)
    for i in range(passes):
        s, u_t = log_qr(t.T, s)
        s, t = (s, u_t.T) if i == passes - 1 else fold_and_sort(s, u_t.T)
    return s, t


class Graded(NamedTuple):
    """A product ready for its last SVDs."""

    whole: Array  # (N,) log singular values by one SVD; NaN where the spread needs windows
    s: Array  # (N,)
    t: Array  # (N, N)


def finish(product: Product, passes: int) -> Graded:
    """One SVD where the product is well conditioned, else a graded (s, T) for `windows`."""
    top, bottom = jnp.max(product.s), jnp.min(product.s)

    def whole():
        a = (product.t_t * jnp.exp(product.s - top)[None, :]) @ product.x_t
        values = top + jnp.log(jnp.linalg.svd(a, compute_uv=False))
        return Graded(values, product.s, product.t_t)

    def by_windows():
        return Graded(jnp.full_like(product.s, jnp.nan), *grade(product, passes))

    return lax.cond(top - bottom < ONE_SVD, whole, by_windows)  # NaN and -inf compare false


@functools.partial(jax.jit, static_argnames=("size",))
def _window_values(s: Array, t: Array, lane: Array, start: Array, first: Array, last: Array, *, size: int):
    """Log singular values of rows first..last-1 of the slices start..start+size-1 of each lane's diag(e^s) T."""

    def one(window):
        lane, start, first, last = window
        scale = lax.dynamic_slice(s, (lane, start), (1, size))[0]
        block = lax.dynamic_slice(t, (lane, start, start), (1, size, size))[0]
        i = jnp.arange(size, dtype=jnp.int32)
        inside = (i >= first) & (i < last)
        weight = jnp.where(inside, jnp.exp(jnp.minimum(scale - scale[first], CLIP)), 0.0)
        a = jnp.where(inside[None, :], weight[:, None] * block, 0.0)
        return scale[first] + safe_log(jnp.linalg.svd(a, compute_uv=False))

    return lax.map(one, (lane, start, first, last))


def _plan(s: np.ndarray, halo: float, core: float) -> list[tuple[int, int, int, int]]:
    """Windows (start, stop, first, last) over a nearly descending s; the cores first..last-1 tile it."""
    upper = np.maximum.accumulate(s[::-1])[::-1]  # robust to rows slightly out of order
    lower = np.minimum.accumulate(s)
    plan, i = [], 0
    while i < len(s):
        j = i + max(1, int(np.searchsorted(-upper[i:], core - upper[i], "right")))
        start = int(np.searchsorted(-lower, -(upper[i] + halo), "left"))
        stop = max(j, int(np.searchsorted(-upper, -(lower[j - 1] - halo), "right")))
        plan.append((start, stop, i, j))
        i = j
    return plan


def windows(graded: Graded, tol: float) -> np.ndarray:
    """Log singular values of every lane, descending, (lanes, N) NumPy; NaN for lanes whose s is NaN.

    Host-level: where the windows lie depends on the values.
    """
    out = np.asarray(graded.whole).copy()
    lanes = np.flatnonzero(np.isnan(out).any(axis=1))
    if not lanes.size:
        return out
    n = out.shape[1]
    halo, core = halo_and_core(tol)
    scales = np.asarray(graded.s)
    jobs: dict[int, list[tuple[int, int, int, int, int]]] = {}
    for lane in lanes.tolist():
        if np.isnan(scales[lane]).any():
            continue
        out[lane] = -np.inf
        rank = int((scales[lane] > -np.inf).sum())
        for start, stop, first, last in _plan(scales[lane, :rank], halo, core):
            size = min(n, max(16, 1 << (stop - start - 1).bit_length()))
            jobs.setdefault(size, []).append((lane, start, stop, first, last))
    for size, todo in jobs.items():
        padded = np.array(todo + [todo[-1]] * ((1 << (len(todo) - 1).bit_length()) - len(todo)), np.int32)
        lane, start, stop = padded[:, 0], padded[:, 1], padded[:, 2]
        offset = np.minimum(start, n - size).astype(np.int32)
        values = np.asarray(_window_values(graded.s, graded.t, lane, offset, start - offset, stop - offset, size=size))
        for row, (lane, start, _, first, last) in zip(values, todo, strict=False):
            out[lane, first:last] = row[first - start : last - start]
    return -np.sort(-out, axis=1)


def halo_and_core(tol: float) -> tuple[float, float]:
    """Nats kept beside, and solved inside, one window, for `passes(tol)` passes of grading."""
    if tol >= 1e-7:
        return 6.0, CORE  # e^-18 by three factors of e^-halo
    return 4.5, 5.0


def passes(tol: float) -> int:
    """Grading passes; what is left between windows is e^-((2 passes - 1) halo)."""
    return 2 if tol >= 1e-7 else 4
