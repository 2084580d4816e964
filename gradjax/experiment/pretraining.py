"""Greedy training of one hidden layer after the other, without labels; back-propagation then starts
from there.

Layer l learns to describe h_{l-1}, the training inputs as the layers below it, already trained,
pass them on:

    rbm           W, b are those of a restricted Boltzmann machine, trained by contrastive divergence with one step
                  of Gibbs sampling, dW ~ <v h>_data - <v h>_reconstruction; hidden units are binary, so the activation
                  is the sigmoid; visible units are Gaussian of variance 1 at the inputs, binary above
                  (Hinton, Osindero, Teh 2006, Neural Computation 18; Hinton 2010, a practical guide, UTML TR 2010-003)
    autoencoder   phi(W x' + b) has to give x back through W^T, where x' is x with a quarter of its entries set to 0
                  (Vincent et al. 2008, ICML: denoising, tied weights, masking noise), by gradient descent on the cross
                  entropy where x are a sigmoid's values, else on half the squared error

Pure functions: jit, vmap over seeds, and all layers but the first in one scan. Serves the plain
MLP, see `refuses`. Cost: `pretrain_steps` steps of one layer for each; the activations of the whole
training split are held.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gradjax.experiment.models.layers import Activation
from gradjax.experiment.tasks import Split, batch_at

PyTree = Any

MOMENTUM = 0.9  # Hinton 2010, section 9
REAL_RATE = 0.1  # of the rate where visible units are real numbers: ten times lower or more (Hinton 2010, section 13.2)
MASKED = 0.25  # share of the inputs that the autoencoder does not see (Vincent 2008 tries 0, 10, 25, 40%)


def _affine(x: Array, kernel: Array, bias: Array) -> Array:
    return x @ kernel + jnp.broadcast_to(bias, (*x.shape[:-1], kernel.shape[1]))


def contrastive_divergence(
    key: Array, layer: PyTree, v: Array, phi: Callable, binary: bool
) -> PyTree:
    """CD-1's ascent direction, averaged over a batch v of visible vectors, (batch, visible); phi is
    the sigmoid.

    Args:
      layer: kernel (visible, hidden), bias (hidden,), and the visible units' bias `back`
        (visible,).
      binary: whether visible units are binary and v their probabilities, or Gaussian of variance 1.
    """
    p = phi(_affine(v, layer["kernel"], layer["bias"]))
    h = (jax.random.uniform(key, p.shape, p.dtype) < p).astype(p.dtype)
    again = _affine(h, layer["kernel"].T, layer["back"])
    again = (
        phi(again) if binary else again
    )  # the mean: less noise than a sample (Hinton 2010, section 3.2)
    q = phi(_affine(again, layer["kernel"], layer["bias"]))
    size = jnp.asarray(1 / len(v), v.dtype)
    total = {
        "kernel": v.T @ p - again.T @ q,
        "bias": jnp.sum(p - q, 0),
        "back": jnp.sum(v - again, 0),
    }
    return jax.tree.map(lambda x: size * x, total)


def denoising(key: Array, layer: PyTree, x: Array, phi: Callable, binary: bool) -> PyTree:
    """Descent direction of what a batch x, (batch, visible), loses in being given back; arguments
    as above.
    """
    seen = jnp.where(jax.random.uniform(key, x.shape, x.dtype) < MASKED, jnp.zeros_like(x), x)

    def loss(layer):
        back = _affine(
            phi(_affine(seen, layer["kernel"], layer["bias"])), layer["kernel"].T, layer["back"]
        )
        lost = jax.nn.softplus(back) - x * back if binary else 0.5 * jnp.square(back - x)
        return jnp.mean(jnp.sum(lost, axis=1))

    return jax.tree.map(jnp.negative, jax.grad(loss)(layer))


METHODS: dict[str, Callable | None] = {
    "none": None,
    "rbm": contrastive_divergence,
    "autoencoder": denoising,
}


def check_compatible(experiment: Any) -> str:
    """Why the network of a `gradjax.config.Experiment` cannot be pre-trained as asked; empty where
    it can.
    """
    method, model = experiment.train.pretrain, experiment.model
    if method == "none":
        return ""
    wrong = ""
    if model.name != "mlp":
        wrong = f"a stack of dense layers, which model.name = {model.name!r} is not; choose 'mlp'"
    elif (
        model.residual
        or model.highway
        or model.normalization != "none"
        or model.weight_standardization
    ):
        wrong = "plain layers phi(W h + b): neither skips nor gates nor normalisation"
    elif method == "rbm" and model.activation != "sigmoid":
        wrong = f"the hidden units' probability as activation, 'sigmoid'; model.activation is {model.activation!r}"
    return f"pretraining: train.pretrain = {method!r} needs {wrong}." if wrong else ""


def pretrain(key: Array, variables: PyTree, data: Split, experiment: Any) -> PyTree:
    """Variables of an MLP with its hidden layers trained greedily; read-out and all else are as
    they came.

    Args:
      key: PRNG key of batches, samples and masks.
      variables: as `init` of the model returns them.
      data: training split, whose targets are not looked at.
      experiment: its model, `task.batch_size` and `train.pretrain...`; floats may be traced.

    Raises:
      ValueError: a network that the method does not serve.
    """
    if reason := check_compatible(experiment):
        raise ValueError(reason)
    train, model, direction = experiment.train, experiment.model, METHODS[experiment.train.pretrain]
    assert direction is not None
    activation: Any = Activation(model.activation, model.depth, parent=None)
    size = min(experiment.task.batch_size, len(data.x))

    def greedy(
        h: Array, theta: tuple, binary: bool = model.activation == "sigmoid"
    ) -> tuple[Array, PyTree]:
        variables, key = theta
        rate = jnp.asarray(train.pretrain_rate * (1.0 if binary else REAL_RATE), jnp.float32)
        act = lambda z: activation.apply(variables["activation"], z)
        order, noise = jax.random.split(key)

        def step(carry, count):
            layer, speed = carry
            batch = batch_at(Split(h, data.y), order, count, size).x
            push = direction(jax.random.fold_in(noise, count), layer, batch, act, binary)
            speed = jax.tree.map(lambda s, p: MOMENTUM * s + rate * p, speed, push)
            return (jax.tree.map(jnp.add, layer, speed), speed), None

        layer = {**variables["dense"], "back": jnp.zeros(h.shape[1:], h.dtype)}
        start = (layer, jax.tree.map(jnp.zeros_like, layer))
        layer = jax.lax.scan(step, start, jnp.arange(train.pretrain_steps))[0][0]
        layer.pop("back")
        return act(_affine(h, layer["kernel"], layer["bias"])), layer

    def parts(name: str) -> PyTree:
        own = variables["params"][name]
        return {"dense": own["dense"], "activation": {"params": own.get("activation", {})}}

    keys, params = jax.random.split(key, model.depth), dict(variables["params"])
    h, layer = greedy(data.x, (parts("embed"), keys[0]), binary=False)
    params["embed"] = {**params["embed"], "dense": layer}
    if model.depth > 1:
        _, stack = jax.lax.scan(greedy, h, (parts("layers"), keys[1:]))
        params["layers"] = {**params["layers"], "dense": stack}
    return {**variables, "params": params}
