"""Data, losses, surgery on parameters, and training: what planted and healthy networks share."""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from gradjax.core.initializers import gaussian, orthogonal
from pathologies.case import Problem

PyTree = Any
GAIN = 2.0**0.5  # He's, for ReLU
HE, UNIT, ORTHOGONAL = gaussian(GAIN), gaussian(1.0), orthogonal(1.0)


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return x.astype(np.float32), y.astype(np.int32)


def digits(
    seed: int, batch: int = 32, *, image: bool = False, scale: float = 1.0
) -> tuple[Array, Array]:
    """Standardised digits (batch, 64) or (batch, 8, 8, 1) times `scale`, and their labels
    (batch,)."""
    x, y = _digits()
    rows = np.random.default_rng(seed).permutation(len(y))[:batch]
    x = scale * (x[rows] - x.mean()) / x.std()
    return jnp.asarray(x.reshape(-1, 8, 8, 1) if image else x, jnp.float32), jnp.asarray(y[rows])


def gaussian_inputs(seed: int, batch: int = 32, features: int = 64) -> tuple[Array, Array]:
    """Standard normal inputs (batch, features) with random labels of ten classes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, features), np.float32)
    return jnp.asarray(x), jnp.asarray(rng.integers(0, 10, batch, np.int32))


def sequences(
    seed: int, seq_len: int, batch: int = 32, features: int = 8, scale: float = 1.0
) -> tuple[Array, Array]:
    """Normal sequences (batch, seq_len, features); the class is the index of the first step's
    largest feature."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, seq_len, features), np.float32)
    return jnp.asarray(np.float32(scale) * x), jnp.asarray(x[:, 0].argmax(-1).astype(np.int32))


def cross_entropy(logits: Array, y: Array) -> Array:
    """Mean softmax cross-entropy, in float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), y).mean()


def pool(h: Array) -> Array:
    """Means over squares of 2 x 2 pixels of (batch, height, width, channels); Flax's divides by an
    int."""
    batch, height, width, channels = h.shape
    return h.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def edit(
    problem: Problem, layer: int | None, leaf: str, change: Callable[[Array], Array]
) -> Problem:
    """Apply `change` to the leaves whose key path matches the pattern `leaf` in `layer` (None: in
    every one).

    A leaf's layer is the first integer of its key path; in a stack (a path without one), the row of
    that index.

    Raises:
      ValueError: no leaf matches, so that nothing would be planted.
    """
    changed = []

    def one(path, x):
        name = jax.tree_util.keystr(path)
        numbers = re.findall(r"\d+", name)
        if not re.search(leaf, name):
            return x
        stacked = not numbers and "layers" in name
        if layer is not None and not stacked and (not numbers or int(numbers[0]) != layer):
            return x
        changed.append(name)
        return x.at[layer].set(change(x[layer])) if stacked and layer is not None else change(x)

    params = jax.tree_util.tree_map_with_path(one, problem.params)
    if not changed:
        raise ValueError(f"edit: no leaf of layer {layer} matches {leaf!r}.")
    return problem._replace(params=params)


def times(factor: float) -> Callable[[Array], Array]:
    """x -> factor x, in x's dtype."""
    return lambda x: x * jnp.asarray(factor, x.dtype)


def plus(amount: float) -> Callable[[Array], Array]:
    """x -> x + amount, in x's dtype."""
    return lambda x: x + jnp.asarray(amount, x.dtype)


def filled(value: float) -> Callable[[Array], Array]:
    """x -> value everywhere."""
    return lambda x: jnp.full_like(x, value)


def low_rank(rank: int, seed: int = 0) -> Callable[[Array], Array]:
    """A matrix of `rank` with the Frobenius norm of the one it replaces."""

    def change(w: Array) -> Array:
        a, b = (
            jax.random.normal(jax.random.key(seed + i), (n, rank), w.dtype)
            for i, n in enumerate(w.shape)
        )
        low = a @ b.T
        return low * (jnp.linalg.norm(w) / jnp.linalg.norm(low))

    return change


def train(
    problem: Problem,
    tx: optax.GradientTransformation,
    num_steps: int,
    data: tuple[Array, ...] | None = None,
) -> tuple[PyTree, PyTree]:
    """Params and optimiser state after `num_steps`: on random batches of `data`, else on the
    problem's own batch."""
    has_aux = problem.options.get("has_aux", False)
    batch = len(problem.args[0])

    def step(carry, key):
        params, state = carry
        args = problem.args
        if data is not None:
            rows = jax.random.choice(key, len(data[0]), (batch,), replace=False)
            args = (*(x[rows] for x in data), *problem.args[len(data) :])
        grads = jax.grad(
            lambda p: problem.loss_fn(p, *args)[0] if has_aux else problem.loss_fn(p, *args)
        )(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda params, keys: jax.lax.scan(step, (params, tx.init(params)), keys)[0])
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam raises a float to an integer power
        return run(problem.params, jax.random.split(jax.random.key(1), num_steps))


def with_options(problem: Problem, **options: Any) -> Problem:
    """The problem with more keyword arguments for `diagnose`."""
    return problem._replace(options={**problem.options, **options})


def sharpness(problem: Problem, num_steps: int = 60) -> float:
    """Largest eigenvalue of the loss's Hessian, by power iteration on Hessian-vector products."""
    flat, unravel = jax.flatten_util.ravel_pytree(problem.params)
    grad = jax.grad(lambda p: problem.loss_fn(unravel(p), *problem.args))

    @jax.jit
    def step(v):
        hv = jax.jvp(grad, (flat,), (v,))[1]
        return hv / jnp.linalg.norm(hv), v @ hv

    v = jax.random.normal(jax.random.key(0), flat.shape)
    v, value = v / jnp.linalg.norm(v), jnp.zeros(())
    for _ in range(num_steps):
        v, value = step(v)
    return abs(float(value))
