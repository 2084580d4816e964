"""Graphs with communities."""

import jax
import numpy as np
import pytest

from bounds import assert_rounding
from gradjax.experiment.tasks.graphs import communities


@pytest.mark.slow
def test_communities(key):
    """A_hat is symmetric with largest eigenvalue 1, neighbours are alike, features say a little."""
    graphs = jax.jit(lambda key: communities(key, 50))(key)
    assert graphs.x.shape == (50, 32, 36) and graphs.y.shape == (50, 32)
    adjacency, features = np.asarray(graphs.x[..., :32]), np.asarray(graphs.x[..., 32:])
    np.testing.assert_array_equal(adjacency, adjacency.swapaxes(1, 2))
    # an entry takes two roots and two products; an eigenvalue moves by at most the sum of a row
    largest = np.linalg.eigvalsh(adjacency.astype(np.float64))[:, -1]
    assert_rounding(largest, np.ones(50), terms=8, size=32**0.5, dtype="f4")
    y, others = np.asarray(graphs.y), ~np.eye(32, dtype=bool)
    same, edges = y[:, :, None] == y[:, None, :], (adjacency > 0) & others
    assert abs(edges[same & others].mean() - 0.5) < 0.02
    assert abs(edges[~same].mean() - 0.05) < 0.01
    own, smooth = ((f.argmax(-1) == y).mean() for f in (features, adjacency @ features))
    assert 0.4 < own < 0.6 and smooth > own + 0.15
