"""Variations of images: what each does to a known picture, and that only training sees it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bounds import assert_rounding
from gradjax.experiment import config, tasks, training
from gradjax.experiment.tasks import augment
from gradjax.experiment.tasks.augment import AUGMENT
from gradjax.experiment.tasks.batches import Split

# Bilinear interpolation: two coordinates of four terms, floors, and three weighted means of two.
BILINEAR = 24


@pytest.mark.parametrize("features", [64, pytest.param(3 * 49, marks=pytest.mark.slow)])
def test_contract(features, key):
    """Shape, dtype, range; one draw per key and example; the same inside vmap; a constant image
    stays what it is."""
    x = np.random.default_rng(0).random((20, features), np.float32)
    same, constant = np.broadcast_to(x[:1], x.shape), np.full_like(x, 0.3)
    batches = jnp.stack([x, x, same, constant])
    keys = jax.random.split(key, 2)[np.asarray([0, 1, 0, 0])]

    @jax.jit
    def all_of_them(keys, batches):
        return [
            (vary(keys[0], batches[0]), jax.vmap(vary)(keys, batches)) for vary in AUGMENT.values()
        ]

    for name, (one, many) in zip(AUGMENT, all_of_them(keys, batches), strict=True):
        _, _, same, constant = many
        assert one.shape == x.shape and one.dtype == x.dtype
        assert float(one.min()) >= float(x.min()) and float(one.max()) <= float(x.max())
        assert_rounding(many[0], one, terms=BILINEAR, size=8.0)
        assert_rounding(constant, np.full(x.shape, 0.3), terms=BILINEAR)
        if name == "none":
            np.testing.assert_array_equal(one, x)
        else:
            assert not np.array_equal(many[0], many[1])
            # each example has its own draw
            assert len(np.unique(np.asarray(same), axis=0)) > 1


def test_rotations_of_known_pictures():
    """Bilinear interpolation keeps a x + b y: turned by t it is the picture of the turned
    coefficients, inside. A quarter turn is that of NumPy, and no turn changes nothing."""
    row, column = np.mgrid[:9, :9] - 4.0
    t = 0.2
    # of a drawing, y upwards: f(x, y) = 2 x + y, turned: f of the point turned back
    x, y = column, -row
    image = np.random.default_rng(0).random((9, 9, 3), np.float32)
    linear = np.broadcast_to((2 * x + y)[..., None], (9, 9, 3))
    pictures = np.stack([linear, image, image]).astype(np.float32)
    angles = jnp.asarray([t, np.pi / 2, 0.0], jnp.float32)
    turned, quarter, same = np.asarray(jax.jit(jax.vmap(augment.rotated))(pictures, angles))
    turned = turned[..., 0]
    expected = 2 * (x * np.cos(t) + y * np.sin(t)) + (-x * np.sin(t) + y * np.cos(t))
    inside = np.hypot(x, y) < 3.9
    # coordinates of up to 8 are rounded, at a slope of 3
    assert_rounding(turned[inside], expected[inside], terms=BILINEAR, size=3 * 8, dtype="f4")
    assert np.abs(turned[inside] - expected[::-1][inside]).max() > 0.5
    assert_rounding(quarter, np.rot90(image), terms=BILINEAR, size=8, dtype="f4")
    assert_rounding(same, image, terms=BILINEAR, size=8, dtype="f4")


def test_angles_are_uniform_within_fifteen_degrees(key):
    """Measured on pictures that rise from left to right: at the centre's right neighbour the value
    is the cosine of the angle."""
    column = np.mgrid[:9, :9][1] - 4.0
    x = jnp.asarray(np.broadcast_to(column.ravel(), (4000, 81)), jnp.float32)
    out = np.asarray(jax.jit(augment.rotate)(key, x)).reshape(-1, 9, 9)
    angle = np.degrees(np.arctan2(out[:, 3, 4], out[:, 4, 5]))
    assert angle.min() > -15.001 and angle.max() < 15.001 and max(-angle.min(), angle.max()) > 14.9
    assert abs(angle.mean()) < 3 * 15 / 3**0.5 / 4000**0.5
    assert abs(angle.std() / (15 / 3**0.5) - 1) < 0.05


def test_crops_are_shifts_that_repeat_the_edge(key):
    """Every example is one of the (2 pad + 1)^2 shifts, and all of them come, equally often."""
    images = {n: np.random.default_rng(n).random((n, n), np.float32) for n in (8, 28)}

    @jax.jit
    def crops(key):
        flat = [np.broadcast_to(image.reshape(1, -1), (1000, n * n)) for n, image in images.items()]
        return [augment.crop(key, jnp.asarray(x)) for x in flat]

    for (side, image), pad, out in zip(images.items(), (1, 2), crops(key), strict=True):
        padded = np.pad(image, pad, mode="edge")
        shifts = [
            padded[i : i + side, j : j + side].reshape(1, -1)
            for i, j in np.ndindex(2 * pad + 1, 2 * pad + 1)
        ]
        counts = [int((np.asarray(out) == shift).all(1).sum()) for shift in shifts]
        assert sum(counts) == 1000
        chi2 = sum((n - 1000 / len(shifts)) ** 2 / (1000 / len(shifts)) for n in counts)
        assert chi2 < len(shifts) - 1 + 4 * (2 * len(shifts)) ** 0.5


def test_flips_mirror_half_of_the_images(key):
    image = np.random.default_rng(0).random((5, 5, 3), np.float32)
    x = jnp.asarray(np.broadcast_to(image.reshape(1, -1), (1000, 75)))
    out = np.asarray(jax.jit(augment.flip)(key, x))
    flipped = (out == image[:, ::-1].reshape(1, -1)).all(1)
    assert (flipped | (out == image.reshape(1, -1)).all(1)).all()
    assert abs(flipped.mean() - 0.5) < 3 * 0.5 / 1000**0.5


def test_data_without_images_are_refused(key):
    with pytest.raises(
        ValueError, match=r"shape \(50,\) are no square images.*task.augment = 'none'"
    ):
        jax.eval_shape(augment.rotate, key, jnp.zeros((4, 50)))
    with pytest.raises(ValueError, match=r"shape \(16, 4\)"):
        jax.eval_shape(augment.crop, key, jnp.zeros((4, 16, 4)))
    splits = tasks.Splits(*(Split(np.zeros((80, 50)), np.zeros(80, np.int32)),) * 3)
    experiment = config.replace(config.Experiment(), {"task.augment": "flip"})
    with pytest.raises(ValueError, match="no square images"):
        training.problem_of(experiment, splits)


@pytest.mark.slow
def test_only_training_batches_are_varied(monkeypatch, key):
    """At rate 0 on the full batch the loss stands still, unless each step varies its images;
    validation stays."""
    digits = tasks.load("digits", key)
    base = {
        "model.depth": 1,
        "model.width": 8,
        "train.num_steps": 3,
        "train.eval_every": 3,
        "train.full_batch": True,
    }
    experiment = config.replace(
        config.Experiment(), base | {"optimizer.learning_rate": 0.0, "task.augment": "flip"}
    )

    def trained(vary):
        monkeypatch.setitem(AUGMENT, "flip", vary)
        problem = training.problem_of(experiment, digits)

        def both(key):
            state = training.init(key, {}, digits, problem)
            return training.run_chunk(state, {}, digits, problem)[1]

        return jax.jit(both)(key)

    plain = trained(lambda key, x: x)
    noisy = trained(lambda key, x: jnp.broadcast_to(jax.random.normal(key, (1, 64)), x.shape))
    np.testing.assert_array_equal(noisy.validation.loss, plain.validation.loss)
    assert len(set(plain.loss.tolist())) == 1
    assert len({*noisy.loss.tolist(), float(plain.loss[0])}) == 4
