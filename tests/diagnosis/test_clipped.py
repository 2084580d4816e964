"""Optax's clipping rules note what they are given, wherever they stand, and change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradjax.diagnosis.clipped import noting

PARAMS = {"a": jnp.ones(4), "b": jnp.full((2, 3), 2.0)}
GRADS = {"a": jnp.full(4, 3.0), "b": jnp.full((2, 3), 0.5)}
NORM = float(np.sqrt(4 * 9 + 6 * 0.25))
LABELS = {"a": "clipped", "b": "free"}


def global_clip(limit=1.0):
    return optax.clip_by_global_norm(limit)


# optimiser -> the norms that its clips are given
PLACES = {
    "alone": (lambda: global_clip(), [NORM]),
    "in a chain, after a factor": (
        lambda: optax.chain(optax.scale(10.0), global_clip(), optax.sgd(0.1)),
        [10 * NORM],
    ),
    "twice": (lambda: optax.chain(global_clip(2.0), global_clip(1.0)), [NORM, 2.0]),
    "masked": (lambda: optax.masked(global_clip(), {"a": True, "b": False}), [6.0]),
    "partitioned": (
        lambda: optax.partition({"clipped": global_clip(), "free": optax.sgd(0.1)}, LABELS),
        [6.0],
    ),
    "injected": (
        lambda: optax.inject_hyperparams(optax.clip_by_global_norm)(max_norm=1.0),
        [NORM],
    ),
    "named": (lambda: optax.named_chain(("clip", global_clip()), ("step", optax.sgd(0.1))), [NORM]),
    "inside of a wrapper": (
        lambda: optax.apply_if_finite(optax.chain(optax.adam(0.1), optax.scale(2.0)), 3),
        [],
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_clip_notes_its_norm_wherever_it_stands(place):
    make, norms = PLACES[place]
    tx, notes = make(), []
    state = tx.init(PARAMS)
    with jax.numpy_dtype_promotion("standard"):
        expected, _ = tx.update(GRADS, state, PARAMS)
        found, _ = noting(tx, notes).update(GRADS, state, PARAMS)
    assert [float(jnp.exp(note.log_size[0])) for note in notes] == pytest.approx(norms)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), found, expected)))


def test_rules_of_each_leaf_note_each_leaf():
    notes = []
    tx = optax.chain(optax.clip_by_block_rms(0.1), optax.clip(0.05))
    noting(tx, notes).update(GRADS, tx.init(PARAMS), PARAMS)
    assert [note.rule for note in notes] == ["clip_by_block_rms", "clip"]
    assert notes[0].leaves == ("['a']", "['b']")
    assert np.exp(notes[0].log_size) == pytest.approx([3.0, 0.5])
    # the first rule has made every rms 0.1
    assert np.exp(notes[1].log_size) == pytest.approx([0.1, 0.1])
    assert np.exp(notes[1].log_limit) == pytest.approx(0.05)


def test_the_users_own_optimiser_is_not_touched():
    notes, tx = [], optax.chain(global_clip(), optax.sgd(0.1))
    noting(tx, notes)
    tx.update(GRADS, tx.init(PARAMS), PARAMS)
    assert not notes
