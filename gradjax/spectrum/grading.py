"""Singular values of J = X diag(e^s) T in log scale: grading, then overlapping windows.

diag(e^s) T is graded by QR in log scale until rows far apart in scale no longer see each other; its
singular values then come from float64 SVDs of overlapping windows of a few nats, each of which
yields the values of its core. A product whose values all lie within 14 nats is one SVD.

The coupling left between windows is e^-((2 passes - 1) halo): 1e-8 at the default tolerance.
Cost: 3 QR factorisations and O(N) per window of the SVDs; `windows` is host-level, since the values
decide where the windows lie.

References: as in `gradjax.spectrum.product`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gradjax.spectrum.logscale import CLIP, columns, safe_log, unit_triangle
from gradjax.spectrum.product import Product

# Nats of spread that one float64 SVD resolves to 1e-8 without grading.
ONE_SVD = 14.0


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
    return s + safe_log(r), unit_triangle(r_factor.T, r, s)


def grade(product: Product, passes: int) -> tuple[Array, Array]:
    """X diag(e^s) T -> (s, T) with the same singular values, T triangular and nearly diagonal.

    A pass is diag(e^s) T = (Q R)^T in log scale. Rows that lie d nats apart mix by e^-d after the
    first pass, and by e^-2d less with each further one.
    """
    column = columns(product.x_t)
    order = jnp.argsort(-(product.s + safe_log(column)))
    s, t_t = product.s[order], product.t_t[:, order]
    s, u_t = log_qr(product.x_t[order].T, s)
    s, t = fold_and_sort(s, (t_t @ u_t).T)
    for i in range(passes):
        s, u_t = log_qr(t.T, s)
        t = u_t.T
        if i < passes - 1:
            s, t = fold_and_sort(s, t)
    return s, t


class Graded(NamedTuple):
    """A product ready for its last SVDs.

    Attributes:
      whole: (N,) log singular values by one SVD; NaN where the spread needs windows.
      s: (N,) scales, nats.
      t: (N, N) triangular.
    """

    whole: Array
    s: Array
    t: Array


def finish(product: Product, passes: int) -> Graded:
    """One SVD where the product is well conditioned, else a graded (s, T) for `windows`."""
    top, bottom = jnp.max(product.s), jnp.min(product.s)

    def whole():
        a = (product.t_t * jnp.exp(product.s - top)[None, :]) @ product.x_t
        values = top + jnp.log(jnp.linalg.svd(a, compute_uv=False))
        return Graded(values, product.s, product.t_t)

    def by_windows():
        return Graded(jnp.full_like(product.s, jnp.nan), *grade(product, passes))

    # a spread of NaN or inf compares false
    return lax.cond(top - bottom < ONE_SVD, whole, by_windows)


@functools.partial(jax.jit, static_argnames=("size",))
def _window_values(s: Array, t: Array, jobs: Array, count: Array, *, size: int) -> Array:
    """Log singular values of `count` windows of diag(e^s) T, one row each; other rows are NaN.

    A job is (lane, start, first, last): rows first..last-1 of the slice start..start+size-1.
    """
    i = jnp.arange(size, dtype=jnp.int32)

    def one(k, found):
        lane, start, first, last = jobs[k]
        scale = lax.dynamic_slice(s, (lane, start), (1, size))[0]
        block = lax.dynamic_slice(t, (lane, start, start), (1, size, size))[0]
        inside = (i >= first) & (i < last)
        weight = jnp.where(inside, jnp.exp(jnp.minimum(scale - scale[first], CLIP)), 0.0)
        a = jnp.where(inside[None, :], weight[:, None] * block, 0.0)
        return found.at[k].set(scale[first] + safe_log(jnp.linalg.svd(a, compute_uv=False)))

    return lax.fori_loop(0, count, one, jnp.full((jobs.shape[0], size), jnp.nan))


def _plan(s: np.ndarray, halo: float, core: float) -> list[tuple[int, int, int, int]]:
    """Windows (start, stop, first, last) over a nearly descending s.

    The cores first..last-1 tile it.
    """
    # running extremes, for rows slightly out of order
    upper = np.maximum.accumulate(s[::-1])[::-1]
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
    """(lanes, N) log singular values of every lane, descending, in NumPy; NaN where s is NaN.

    Host-level: the values decide where the windows lie.
    """
    out = np.asarray(graded.whole).copy()
    lanes = np.flatnonzero(np.isnan(out).any(axis=1))
    if not lanes.size:
        return out
    n = out.shape[1]
    halo, core = _halo_and_core(tol)
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
        # one length whatever the windows, so that it compiles once per size
        table = np.zeros((out.size, 4), np.int32)
        offset = [min(start, n - size) for _, start, *_ in todo]
        table[: len(todo)] = [
            (lane, o, start - o, stop - o)
            for o, (lane, start, stop, *_) in zip(offset, todo, strict=True)
        ]
        values = np.asarray(
            _window_values(graded.s, graded.t, table, np.int32(len(todo)), size=size)
        )
        for row, (lane, start, _, first, last) in zip(values, todo, strict=False):
            out[lane, first:last] = row[first - start : last - start]
    return -np.sort(-out, axis=1)


def _halo_and_core(tol: float) -> tuple[float, float]:
    """Nats kept beside, and solved inside, one window, for `passes(tol)` passes of grading."""
    if tol >= 1e-7:
        # e^-18 by three factors of e^-halo
        return 6.0, 12.0
    return 4.5, 5.0


def passes(tol: float) -> int:
    """Grading passes; the coupling left between windows is e^-((2 passes - 1) halo)."""
    return 2 if tol >= 1e-7 else 4
