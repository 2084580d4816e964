"""LSUV: initial weights scaled by the data, layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bounds import assert_rounding
from gradjax.core.activations import ACTIVATIONS
from gradjax.experiment.models import MLP


def pre_activations(model, variables, x):
    """W h of every layer, biases left out."""
    phi, params, rows = ACTIVATIONS[model.activation], variables["params"], []
    stack = params["layers"]["dense"]
    dense = [
        params["embed"]["dense"],
        *({k: v[l] for k, v in stack.items()} for l in range(model.depth - 1)),
    ]
    h = x
    for layer in dense:
        rows.append(h @ layer["kernel"])
        h = phi(rows[-1] + jnp.broadcast_to(layer["bias"], rows[-1].shape))
    return rows


# The terms of a deviation over 64 examples of 32 units, and of the maps before it.
TERMS = 64 * 32 + 3 * 32


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
def test_lsuv_gives_every_layer_unit_variance(activation, key):
    """Mishkin & Matas 2016: Var = 1 after every layer, in the scan, for each seed under vmap.

    Whatever the data; the control is the same network without LSUV.
    """
    x = 3.0 + 10.0 * jax.random.normal(key, (64, 20))
    shape = {"num_outputs": 10, "depth": 12, "width": 32, "activation": activation, "sigma_w": 1.0}
    lsuv, plain = (MLP(**shape, weights=weights) for weights in ("lsuv", "orthogonal"))

    def deviations(key, model):
        variables = model.init(key, x, train=True)
        found = jnp.stack([jnp.std(z) for z in pre_activations(model, variables, x)])
        return found, variables["params"]["layers"]["dense"]["kernel"][:2]

    @jax.jit
    def both(key):
        seeds = jax.vmap(lambda key: deviations(key, lsuv))(jax.random.split(key, 3))
        return *seeds, deviations(key, plain)[0]

    found, kernels, control = both(key)
    assert_rounding(found, np.ones((3, 12)), terms=TERMS)
    # directions stay orthonormal
    for kernel in np.asarray(kernels, np.float64).reshape(-1, 32, 32):
        gram = kernel.T @ kernel
        assert_rounding(gram / gram[0, 0], np.eye(32), terms=8 * 32, dtype="f4")
    assert np.abs(control - 1).max() > 0.5


def test_lsuv_is_times_sigma_w(key):
    x = jax.random.normal(key, (64, 20))
    shape = {"num_outputs": 10, "depth": 4, "width": 32, "activation": "relu"}
    model = MLP(**shape, weights="lsuv", sigma_w=1.5)

    @jax.jit
    def deviations(key):
        variables = model.init(key, x, train=True)
        return jnp.stack([jnp.std(z) for z in pre_activations(model, variables, x)])

    assert_rounding(deviations(key), np.full(4, 1.5), terms=TERMS)
