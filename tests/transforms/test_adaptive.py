"""Clipping rules with a memory, step by step against the papers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradjax import transforms as T


def history(seed, num_steps=60):
    """Gradients of two leaves, (steps, 3) and (steps, 2), over decades, with spikes up to 1e30."""
    rng = np.random.default_rng(seed)
    size = 10 ** np.cumsum(rng.normal(0, 0.1, num_steps))
    size[[30, 41, 55]] *= [1e2, 1e30, 1e12]
    x = rng.standard_normal((num_steps, 5)) * size[:, None]
    return {"a": np.float32(x[:, :3]), "b": np.float32(x[:, 3:])}


def scanned(tx, grads):
    first = jax.tree.map(lambda x: x[0], grads)
    return jax.lax.scan(lambda state, g: tx.update(g, state, first)[::-1], tx.init(first), grads)[1]


def run(tx, grads):
    out = jax.jit(lambda grads: scanned(tx, grads))(grads)
    return {k: np.asarray(x, np.float64) for k, x in out.items()}


def norm(*arrays):
    return np.sqrt(sum(np.sum(np.abs(x.astype(np.float64)) ** 2) for x in arrays))


def by_norm(grads, rule):
    """Apply (norm -> clipped norm) step by step to the norm of the tree."""
    norms = [norm(*step) for step in zip(grads["a"], grads["b"], strict=True)]
    factor = np.array([rule(n) / n for n in norms])[:, None]
    return {k: x.astype(np.float64) * factor for k, x in grads.items()}


@pytest.mark.parametrize("window", [7, pytest.param(1000, marks=pytest.mark.slow)])
def test_autoclip_is_the_papers(window):
    percentiles, grads = np.float32([10.0, 50.0, 99.0]), history(window)
    got = jax.jit(jax.vmap(lambda p: scanned(T.autoclip(p, window), grads)))(percentiles)
    for k, percentile in enumerate(percentiles.tolist()):
        seen = []

        def paper(n, seen=seen, percentile=percentile):
            seen.append(n)
            return min(n, np.percentile(seen[-window:], percentile))

        lane = {name: np.asarray(x[k], np.float64) for name, x in got.items()}
        chex.assert_trees_all_close(lane, by_norm(grads, paper), rtol=1e-5)


def test_zclip_is_the_papers():
    grads, warm, mu, var = history(2), [], 0.0, 0.0

    def paper(n):
        nonlocal mu, var
        if len(warm) < 25:
            warm.append(n)
            mu, var = np.mean(warm), np.var(warm)
            return n
        z = (n - mu) / np.sqrt(var)
        kept = mu + 2.5**2 * np.sqrt(var) / z if z > 2.5 else n
        mu = 0.97 * mu + 0.03 * kept
        var = 0.97 * var + 0.03 * (kept - mu) ** 2
        return kept

    want = by_norm(grads, paper)
    chex.assert_trees_all_close(run(T.zclip(), grads), want, rtol=1e-5)
    assert norm(want["a"][41]) < 100 < norm(grads["a"][41])


def test_historical_clip_is_mean_plus_sigmas():
    grads, seen = history(3), []

    def formula(n):
        kept = min(n, np.mean(seen[-20:]) + 2.5 * np.std(seen[-20:])) if len(seen) >= 10 else n
        seen.append(kept)
        return kept

    got = run(T.historical_clip(2.5, 20), grads)
    chex.assert_trees_all_close(got, by_norm(grads, formula), rtol=1e-5)


def test_adagc_is_the_papers():
    grads = history(4)
    want, gamma = {k: np.asarray(x, np.float64) for k, x in grads.items()}, {}
    for t in range(60):
        whole = norm(want["a"][t], want["b"][t])
        for k, x in want.items():
            h = min(1, 0.5 / whole) if t < 20 else min(1, 1.05 * gamma[k] / norm(x[t]))
            x[t] *= h
            n = norm(x[t])
            gamma[k] = min(gamma.get(k, np.inf), n) if t < 20 else 0.98 * gamma[k] + 0.02 * n
    chex.assert_trees_all_close(run(T.adagc(1.05, 0.5, warmup_steps=20), grads), want, rtol=1e-5)


def test_spam_is_its_equations():
    grads = history(5)
    options = {"reset_every": 25, "warmup_steps": 10, "decay": 0.95, "min_history": 5}
    got = run(T.spam(optax.trace(0.9), 50.0, **options), grads)
    for k, x in grads.items():
        v, m = 0.0, 0.0
        for t, g in enumerate(np.asarray(x, np.float64)):
            g = np.where((g**2 > 50 * v) & (t >= 5), np.sign(g) * np.sqrt(50 * v), g)
            v = 0.95 * v + 0.05 * g**2
            m = 0.9 * (0 if t % 25 == 0 else m) + g
            warm = 1.0
            if t >= 25 and t % 25 < 10:
                warm = 1 - 0.99 * (1 + np.cos(np.pi * (t % 25) / 11)) / 2
            np.testing.assert_allclose(got[k][t], warm * m, rtol=1e-5, atol=1e-6 * np.abs(m).max())


@pytest.mark.parametrize(
    "tx",
    [
        T.adagc(warmup_steps=0),
        pytest.param(T.autoclip(10.0, 5), marks=pytest.mark.slow),
        pytest.param(T.spam(optax.identity(), min_history=0), marks=pytest.mark.slow),
    ],
)
def test_a_leaf_that_was_zero_for_long_is_not_frozen(tx):
    """Its zeros would drive any average of norms to zero, and the threshold with it."""
    zero, one = {"a": jnp.zeros(2)}, {"a": jnp.ones(2)}
    state = tx.init(zero)
    for grads in [one] + [zero] * 9:
        _, state = tx.update(grads, state, zero)
    np.testing.assert_allclose(tx.update(one, state, zero)[0]["a"], 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: T.autoclip(101.0), r"percentile is 101.0; a number in \[0, 100\]"),
        (lambda: T.autoclip(window=0), r"window is 0; a number in \[1, inf\]"),
        (lambda: T.historical_clip(-1.0), "num_sigmas is -1.0"),
        (lambda: T.historical_clip(window=-3), "window is -3"),
        (lambda: T.zclip(alpha=1.0), r"alpha is 1.0; a number in \[0, 1\)"),
        (lambda: T.zclip(z_thres=float("nan")), "z_thres is nan"),
        (lambda: T.adagc(beta=1.0), r"beta is 1.0; a number in \[0, 1\)"),
        (lambda: T.spam(optax.sgd(1.0), reset_every=0), r"reset_every is 0; a number in \[1, "),
    ],
)
def test_a_number_out_of_range_is_refused_with_its_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
