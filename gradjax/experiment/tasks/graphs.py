"""Graphs whose nodes are to be classified by community: stochastic block models (Holland 1983).

    A_ij ~ Bernoulli(inside) within a community, Bernoulli(between) across
    A_hat = D^(-1/2) (A + I) D^(-1/2),   x_i = signal e_{y_i} + N(0, 1)

e_y is the unit vector of the community y: noise drowns the signal of a node's own features, and the
mean over its neighbours has more of it. So a few graph convolutions help, and many make all nodes
alike. Cost: O(nodes^2) each.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Graphs(NamedTuple):
    """Graphs and the communities of their nodes.

    x: [A_hat | X], float32 (examples, nodes, nodes + communities).
    y: the community, int32 (examples, nodes).
    """

    x: Array
    y: Array


def communities(
    key: Array,
    num_examples: int = 1000,
    *,
    nodes: int = 32,
    num_communities: int = 4,
    inside: float = 0.5,
    between: float = 0.05,
    signal: float = 1.0,
) -> Graphs:
    """Random graphs of `nodes` nodes, each in one of `num_communities` communities at random.

    Args:
      key: PRNG key.
      num_examples: graphs. Our choice, like the sizes: a network of 64 units trains in seconds.
      nodes: per graph.
      num_communities: equally likely, and the number of features.
      inside: probability of an edge within a community.
      between: the same between two; must be below `inside`, or the graph holds no information.
      signal: size of a node's own features relative to their noise.

    Returns:
      `Graphs`; q_0 of the features is 1 + signal^2 / num_communities. Do not standardise x: A_hat
      must stay as it is.

    >>> [part.shape for part in communities(jax.random.key(0), 10)]
    [(10, 32, 36), (10, 32)]
    """
    y_key, edge_key, noise_key = jax.random.split(key, 3)
    y = jax.random.randint(y_key, (num_examples, nodes), 0, num_communities)
    same = y[:, :, None] == y[:, None, :]
    drawn = jax.random.uniform(edge_key, same.shape) < jnp.where(same, inside, between)
    upper = jnp.triu(drawn.astype(jnp.float32), 1)
    noise = jax.random.normal(noise_key, (*y.shape, num_communities))
    features = signal * jax.nn.one_hot(y, num_communities) + noise
    graph = normalized(upper + jnp.swapaxes(upper, 1, 2))
    return Graphs(jnp.concatenate([graph, features], -1), y)


def normalized(adjacency: Array) -> Array:
    """A_hat = D^(-1/2) (A + I) D^(-1/2), D the degrees with the loop (Kipf & Welling 2017)."""
    loops = jnp.eye(adjacency.shape[-1], dtype=adjacency.dtype)
    looped = adjacency + jnp.broadcast_to(loops, adjacency.shape)
    scale = jax.lax.rsqrt(jnp.sum(looped, -1))
    return scale[..., :, None] * looped * scale[..., None, :]
