"""Graph convolutions: over-smoothing."""

import jax
import numpy as np
import pytest
from jax import lax
from model_contract import build, run, started

from gradjax.experiment.tasks.graphs import communities

LINEAR = {"activation": "linear", "sigma_w": 1.0, "sigma_b": 0.0}


def difference(graph, h):
    """Size of what is left of H beside the direction that all nodes share, sqrt(degree)."""
    common = np.linalg.eigh(graph)[1][:, -1]
    return np.linalg.norm(h - np.outer(common, common @ h))


@pytest.mark.slow
def test_deep_graph_convolutions_smooth_away_all_differences(key):
    """Linear, with orthogonal W: the rate per layer is the second eigenvalue of A_hat; a skip keeps
    the differences."""
    example = communities(key, 1, nodes=16, inside=0.6, between=0.2).x[0]
    graph = np.asarray(example[:, :16], np.float64)
    sizes = {}
    for residual in (False, True):
        model = build("gcn", depth=60, width=4, weights="orthogonal", residual=residual, **LINEAR)

        @jax.jit
        def states(key, example, model=model):
            h0, links = model.links(started(model, key, example[None]), example)
            step, thetas = links[1]

            def twice(h, theta):
                after = step(h, theta)
                return after, after

            return lax.scan(twice, run(h0, links[:1]), thetas)[1]

        states = np.asarray(states(key, example), np.float64)
        sizes[residual] = np.array([difference(graph, state) for state in states])
    second = np.sort(np.abs(np.linalg.eigvalsh(graph)))[-2]
    rate = np.polyfit(np.arange(10, 40), np.log(sizes[False][10:40]), 1)[0]
    np.testing.assert_allclose(rate, np.log(second), rtol=0.03)
    assert sizes[False][40] < 1e-3 * sizes[False][0]
    assert sizes[True][40] > sizes[True][0]
