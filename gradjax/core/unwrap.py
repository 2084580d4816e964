"""What other libraries wrap around arrays, taken off.

Flax NNX keeps parameters and optimiser states in variables; its `Optimizer`, and Linen's
`TrainState`, hold the state of an Optax optimiser as `opt_state`.
"""

import sys
from typing import Any

import jax

PyTree = Any


def plain(tree: PyTree) -> PyTree:
    """A tree with the values of NNX variables in their places; any other tree as it is."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return tree

    def is_variable(x: Any) -> bool:
        return isinstance(x, nnx.Variable)

    if not any(map(is_variable, jax.tree.leaves(tree, is_leaf=is_variable))):
        return tree
    return jax.tree.map(lambda x: x[...] if is_variable(x) else x, tree, is_leaf=is_variable)


def optimizer_state(x: PyTree) -> PyTree:
    """The state of an Optax optimiser: of an `nnx.Optimizer` or a `TrainState` its `opt_state`,
    with plain arrays.
    """
    # An optimiser's own state may have a field of that name: it is a tuple.
    if hasattr(x, "opt_state") and not isinstance(x, tuple):
        x = x.opt_state
    return plain(x)
