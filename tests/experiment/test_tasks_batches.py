"""Minibatches: every epoch is a permutation, uniform over keys, a pure function of (key, step)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradjax.experiment import tasks
from gradjax.experiment.tasks import batches


def toy(n):
    return tasks.Split(jnp.arange(n, dtype=jnp.float32)[:, None], jnp.arange(n))


def stream(split, key, num_steps, batch_size):
    """All batches of the first steps, in one scan."""

    def pick(_, step):
        return None, tasks.batch_at(split, key, step, batch_size)

    return jax.lax.scan(pick, None, jnp.arange(num_steps))[1]


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 1257, 4096])
def test_an_epoch_is_a_permutation(n):
    keys = jax.vmap(jax.random.key)(np.random.default_rng(n).integers(0, 2**32, 25, np.uint32))
    positions = jnp.arange(n, dtype=jnp.uint32)
    orders = jax.jit(jax.vmap(lambda key: batches._permuted(key, positions, n)))(keys)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.broadcast_to(positions, (25, n)))


@pytest.mark.slow
def test_an_epoch_visits_every_example_once_in_a_jitted_scan(key):
    num_steps, batch_size = 30, 8
    keys = jnp.stack([jax.random.key(5), key])

    @jax.jit
    def both(keys):
        seen = jax.vmap(lambda key: stream(toy(120), key, num_steps, batch_size))(keys)
        return seen, tasks.batch_at(toy(120), key, 17, batch_size)

    seen, one = both(keys)
    np.testing.assert_array_equal(seen.x[..., 0].astype(jnp.int32), seen.y)
    first, second = np.asarray(seen.y[1]).reshape(2, -1)
    np.testing.assert_array_equal(np.sort(first), np.arange(120))
    np.testing.assert_array_equal(np.sort(second), np.arange(120))
    assert (first != second).mean() > 0.9
    # pure in (key, step): by itself, in another order, and under vmap over keys
    np.testing.assert_array_equal(one.y, seen.y[1, 17])
    assert (seen.y[0] != seen.y[1]).mean() > 0.9


def test_each_epoch_leaves_out_different_examples(key):
    seen = np.asarray(jax.jit(lambda: stream(toy(7), key, 24, 3).y)()).reshape(12, 6)
    left_out = set()
    for epoch in seen:
        assert len(set(epoch)) == 6
        left_out |= set(range(7)) - set(epoch.tolist())
    assert len(left_out) > 3


@pytest.mark.parametrize("n", [5, 12, 97])
def test_orders_are_uniform_over_keys(n):
    """Counts of (position, example) over keys, and of (first, second example): chi-squared within 5
    sigma."""
    positions = jnp.asarray([0, 1, n - 1], jnp.uint32)

    @jax.jit
    def orders(key):
        return jax.vmap(lambda key: batches._permuted(key, positions, n))(
            jax.random.split(key, 4000)
        )

    order = np.asarray(orders(jax.random.key(0))).astype(int)
    pairs = order[:, 0] * (n - 1) + order[:, 1] - (order[:, 1] > order[:, 0])
    for cells, values in ((n, order[:, 0]), (n, order[:, -1]), (n * (n - 1), pairs)):
        counts = np.bincount(values, minlength=cells)
        chi2 = ((counts - len(order) / cells) ** 2).sum() * cells / len(order)
        assert abs(chi2 - (cells - 1)) < 5 * np.sqrt(2 * (cells - 1)), (n, cells, chi2)


def test_a_batch_larger_than_the_split_is_refused(key):
    for batch_size in (0, 11):
        with pytest.raises(ValueError, match=f"batch_size={batch_size} does not fit a split of 10"):
            tasks.batch_at(toy(10), key, 0, batch_size)
