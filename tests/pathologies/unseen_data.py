"""Data, losses and builders shared by the unseen cases.

The images are scikit-learn's handwritten digits (1,797 of 8 x 8 pixels, which need no download),
twice enlarged to 16 x 16: inputs like MNIST's, non-negative and mostly dark. The text is drawn from
a sparse Markov chain, so a language model has something to learn."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from pathologies.case import Problem, last_integer


@functools.cache
def _digits():
    digits = load_digits()
    return (digits.images / 16.0).astype(np.float32).repeat(2, axis=1).repeat(2, axis=2)[
        ..., None
    ], digits.target


def digits(batch=32, scale=1.0, shift=0.0, flat=False, channels_first=False, dtype=np.float32):
    """A `data(seed)`: images (batch, 16, 16, 1) in [shift, shift + scale] and labels, a new batch
    for every seed."""

    def data(seed):
        images, labels = _digits()
        index = np.random.default_rng(seed).permutation(len(labels))[:batch]
        x = (scale * images[index] + shift).astype(dtype)
        x = x.reshape(batch, -1) if flat else x.transpose(0, 3, 1, 2) if channels_first else x
        return jnp.asarray(x), jnp.asarray(labels[index], jnp.int32)

    return data


def text(batch=16, length=24, vocab=32):
    """A `data(seed)`: tokens (batch, length) of a Markov chain with three successors a token, and
    the next tokens."""

    def data(seed):
        successors = np.random.default_rng(0).integers(1, vocab, (vocab, 3))
        rng = np.random.default_rng(seed)
        tokens = [rng.integers(1, vocab, batch)]
        for _ in range(length):
            tokens.append(successors[tokens[-1], rng.integers(0, 3, batch)])
        tokens = jnp.asarray(np.stack(tokens, axis=1), jnp.int32)
        return tokens[:, :-1], tokens[:, 1:]

    return data


def sentiment(batch=16, length=20, vocab=64):
    """A `data(seed)`: tokens (batch, length), labelled by whether more than half come from the
    upper half."""

    def data(seed):
        tokens = np.random.default_rng(seed).integers(0, vocab, (batch, length))
        return jnp.asarray(tokens, jnp.int32), jnp.asarray(
            (tokens >= vocab // 2).mean(axis=1) > 0.5, jnp.int32
        )

    return data


def spirals(batch=32, length=16):
    """A `data(seed)`: (batch, length, 2) spirals that turn one way or the other, and which, as
    floats (batch, 1)."""

    def data(seed):
        rng = np.random.default_rng(seed)
        t, phase = np.linspace(0, 2 * np.pi, length), rng.uniform(0, 2 * np.pi, (batch, 1))
        turn = rng.integers(0, 2, (batch, 1))
        x = (
            np.stack([(2 * turn - 1) * np.sin(t + phase), np.cos(t + phase)], axis=-1)
            / (1 + t)[:, None]
        )
        return jnp.asarray(x, jnp.float32), jnp.asarray(turn, jnp.float32)

    return data


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(loss_fn, params, data, tx, steps, seed, has_aux=False):
    """`params` and `opt_state` after `steps` of `tx`, on eight batches of `data` in turn."""
    batches = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *[data(seed + 1000 + i) for i in range(8)]
    )

    def step(carry, i):
        params, opt_state = carry
        grads = jax.grad(loss_fn, has_aux=has_aux)(
            params, *jax.tree.map(lambda leaf: leaf[i % 8], batches)
        )
        updates, opt_state = tx.update(grads[0] if has_aux else grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    run = jax.jit(
        lambda params: jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))[0]
    )
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam raises a float to the count's power
        return run(params)


def finish(loss_fn, params, data, seed, steps=0, **options):
    """The `Problem`, after `steps` of its own optimiser `options["tx"]`."""
    if steps:
        params, opt_state = train(loss_fn, params, data, options["tx"], steps, seed)
        options = options | {"opt_state": opt_state}
    return Problem(loss_fn, params, data(seed), options)


@functools.cache
def initialiser(model):
    """A Linen model's `init`, compiled once for the cases and seeds that share it."""
    return jax.jit(model.init)


def linen(model, data, alter=lambda params: params, loss=cross_entropy, **options):
    """A `make(seed)` for a Linen model of one input: its parameters, altered, in `loss(model(x),
    y)`."""

    def make(seed):
        params = alter(initialiser(model)(jax.random.key(seed), data(seed)[0])["params"])
        return finish(
            lambda params, x, y: loss(model.apply({"params": params}, x), y),
            params,
            data,
            seed,
            **options,
        )

    return make


def module(build, data, loss, alter=lambda model: model, **options):
    """A `make(seed)` for an NNX or an Equinox model: `build(seed)`, altered, in `loss(model,
    *data)`."""

    def make(seed):
        import gradjax

        loss_fn, params = gradjax.functional(loss, alter(build(seed)))
        return finish(loss_fn, params, data, seed, **options)

    return make


def edit(function, head, *rest):
    """An `alter`: `function` of the one leaf of a nested dict that the path `head, *rest` names."""
    return lambda tree: (
        tree | {head: edit(function, *rest)(tree[head]) if rest else function(tree[head])}
    )


def labelled(pathology, cause=None, layer=None, severity="severe"):
    """The labels of a `Case`; a cause or a layer of None is not judged."""
    return {"pathology": pathology, "cause": cause, "layer": layer, "severity": severity}


def row(where):
    """A `position`: the row of a scanned stack, as in `layers[17]`, or the last integer where
    nothing is scanned."""
    found = re.search(r"\[(\d+)\]", where)
    return int(found.group(1)) if found else last_integer(where)


def order(*names):
    """A `position`: which of `names`, layers from the input on, stands in a finding's place."""

    def position(where):
        found = [
            i
            for i, name in enumerate(names)
            if re.search(rf"(?<![\w\]]){re.escape(name)}(?!\w)", where)
        ]
        return found[0] if found else None

    return position


def numbered(word):
    """A `position`: the integer after `word`, as in `block_3/Dense_0` and `blocks[3].mlp`."""

    def position(where):
        found = re.search(rf"{word}s?[_\[](\d+)", where)
        return int(found.group(1)) if found else None

    return position
