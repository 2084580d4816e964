"""Greedy training of one hidden layer after another, without labels, before back-propagation.

Layer l learns a model of h_{l-1}, the training inputs as the trained layers below pass them on:

    rbm           W and b belong to a restricted Boltzmann machine, trained by contrastive
                  divergence with one step of Gibbs sampling,
                  dW ~ <v h>_data - <v h>_reconstruction. Hidden units are binary, so the activation
                  is the sigmoid; visible units are Gaussian of variance 1 at the inputs and binary
                  above (Hinton, Osindero, Teh 2006, Neural Computation 18; Hinton 2010, a practical
                  guide, UTML TR 2010-003)
    autoencoder   phi(W x' + b) must reproduce x through W^T, where x' is x with a quarter of its
                  entries set to 0 (Vincent et al. 2008, ICML: denoising, tied weights, masking
                  noise). Gradient descent on the cross entropy if x are values of a sigmoid, else
                  on half the squared error

Pure functions that jit and vmap over seeds; all layers but the first are one scan. Covers the plain
MLP only, see `check_compatible`. Cost: `pretrain_steps` steps per layer; the activations of the
whole training split are kept in memory.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gradjax.experiment.models.layers import Activation
from gradjax.experiment.schema import Experiment, Model
from gradjax.experiment.tasks import Split, batch_at

PyTree = Any

# Hinton 2010, section 9.
MOMENTUM = 0.9
# Factor on the rate if visible units are real numbers: at most 1/10 (Hinton 2010, section 13.2).
REAL_RATE = 0.1
# Fraction of the inputs hidden from the autoencoder (Vincent 2008 tries 0, 10, 25 and 40%).
MASKED = 0.25


def _affine(x: Array, kernel: Array, bias: Array) -> Array:
    return x @ kernel + jnp.broadcast_to(bias, (*x.shape[:-1], kernel.shape[1]))


def contrastive_divergence(
    key: Array, layer: PyTree, v: Array, phi: Callable, binary: bool
) -> PyTree:
    """The ascent direction of CD-1, averaged over a batch.

    Args:
      key: PRNG key of the hidden sample.
      layer: kernel (visible, hidden), bias (hidden,), and `back` (visible,), the bias of the
        visible units.
      v: visible vectors (batch, visible).
      phi: the sigmoid.
      binary: whether visible units are binary and v their probabilities, or Gaussian of variance 1.

    Returns:
      A tree like `layer`.
    """
    p = phi(_affine(v, layer["kernel"], layer["bias"]))
    h = (jax.random.uniform(key, p.shape, p.dtype) < p).astype(p.dtype)
    again = _affine(h, layer["kernel"].T, layer["back"])
    if binary:
        # The mean, which has less noise than a sample (Hinton 2010, section 3.2).
        again = phi(again)
    q = phi(_affine(again, layer["kernel"], layer["bias"]))
    size = jnp.asarray(1 / len(v), v.dtype)
    total = {
        "kernel": v.T @ p - again.T @ q,
        "bias": jnp.sum(p - q, 0),
        "back": jnp.sum(v - again, 0),
    }
    return jax.tree.map(lambda x: size * x, total)


def denoising(key: Array, layer: PyTree, x: Array, phi: Callable, binary: bool) -> PyTree:
    """The descent direction of a batch's reconstruction loss; see `contrastive_divergence`.

    `key` draws the mask, x (batch, visible) is what must be reproduced, and phi is the activation.
    """
    hidden = jax.random.uniform(key, x.shape, x.dtype) < MASKED
    seen = jnp.where(hidden, jnp.zeros_like(x), x)

    def loss(layer):
        h = phi(_affine(seen, layer["kernel"], layer["bias"]))
        back = _affine(h, layer["kernel"].T, layer["back"])
        losses = jax.nn.softplus(back) - x * back if binary else 0.5 * jnp.square(back - x)
        return jnp.mean(jnp.sum(losses, axis=1))

    return jax.tree.map(jnp.negative, jax.grad(loss)(layer))


METHODS: dict[str, Callable | None] = {
    "none": None,
    "rbm": contrastive_divergence,
    "autoencoder": denoising,
}


def check_compatible(experiment: Experiment) -> str:
    """Why the network of an experiment cannot be pre-trained as configured; empty if it can."""
    method, model = experiment.train.pretrain, experiment.model
    if method == "none":
        return ""
    needs = _missing(method, model)
    return f"pretraining: train.pretrain = {method!r} needs {needs}." if needs else ""


def _missing(method: str, model: Model) -> str:
    """What a method needs and the network lacks; empty if nothing."""
    if model.name != "mlp":
        return f"a stack of dense layers, which model.name = {model.name!r} is not; choose 'mlp'"
    skips = model.residual or model.highway
    if skips or model.normalization != "none" or model.weight_standardization:
        return "plain layers phi(W h + b): neither skips nor gates nor normalisation"
    if method == "rbm" and model.activation != "sigmoid":
        return (
            "the hidden units' probability as activation, 'sigmoid'; model.activation is "
            f"{model.activation!r}"
        )
    return ""


def pretrain(key: Array, variables: PyTree, data: Split, experiment: Experiment) -> PyTree:
    """The variables of an MLP after greedy training of its hidden layers; the rest is unchanged.

    Args:
      key: PRNG key of batches, samples and masks.
      variables: as `init` of the model returns them.
      data: training split, whose targets are not used.
      experiment: gives the model, `task.batch_size` and `train.pretrain...`; its floats may be
        traced.

    Raises:
      ValueError: a network that the method does not cover.
    """
    if reason := check_compatible(experiment):
        raise ValueError(reason)
    train, model, direction = experiment.train, experiment.model, METHODS[experiment.train.pretrain]
    assert direction is not None
    activation: Any = Activation(model.activation, model.depth, parent=None)
    size = min(experiment.task.batch_size, len(data.x))
    binary_above = model.activation == "sigmoid"

    def greedy(h: Array, theta: tuple, binary: bool = binary_above) -> tuple[Array, PyTree]:
        variables, key = theta
        rate = jnp.asarray(train.pretrain_rate * (1.0 if binary else REAL_RATE), jnp.float32)
        order, noise = jax.random.split(key)

        def act(z):
            return activation.apply(variables["activation"], z)

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
