"""Variations of images: what each does to a known picture, that it may be compiled, and that
training alone sees it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradjax.experiment import config, tasks, training
from gradjax.experiment.tasks import augment
from gradjax.experiment.tasks.augment import AUGMENT
from gradjax.experiment.tasks.batches import Split


@pytest.fixture
def images(key):
    return jax.random.uniform(key, (40, 64))


@pytest.mark.parametrize("name", AUGMENT)
@pytest.mark.parametrize("features", [64, 3 * 49])
def test_contract(name, features, key):
    """Shape, dtype, range; one draw per key and example; the same inside jit and vmap; a constant
    stays what it is."""
    x = jax.random.uniform(key, (20, features))
    vary = AUGMENT[name]
    keys = jax.random.split(key, 3)
    one = vary(keys[0], x)
    assert one.shape == x.shape and one.dtype == x.dtype
    assert float(one.min()) >= float(x.min()) and float(one.max()) <= float(x.max())
    many = jax.jit(jax.vmap(vary, in_axes=(0, None)))(keys, x)
    np.testing.assert_allclose(many[0], one, atol=1e-6)
    np.testing.assert_allclose(vary(key, jnp.full_like(x, 0.3)), 0.3, rtol=1e-6)
    if name == "none":
        np.testing.assert_array_equal(one, x)
    else:
        assert not np.array_equal(many[0], many[1])
        same = vary(keys[0], jnp.broadcast_to(x[:1], x.shape))
        assert len(np.unique(np.asarray(same), axis=0)) > 1  # each example has its own draw


def test_a_rotation_of_a_linear_picture_is_exact(key):
    """Bilinear interpolation keeps a x + b y: turned by t it is the picture of the turned
    coefficients, inside."""
    row, column = np.mgrid[:9, :9] - 4.0
    picture = jnp.asarray((2.0 * column - row)[..., None], jnp.float32)
    t = 0.2
    turned = augment.rotated(picture, jnp.float32(t))[..., 0]
    x, y = (
        column,
        -row,
    )  # of a drawing: y upwards; f(x, y) = 2 x + y, turned: f of the point turned back
    expected = 2 * (x * np.cos(t) + y * np.sin(t)) + (-x * np.sin(t) + y * np.cos(t))
    inside = np.hypot(x, y) < 3.9
    np.testing.assert_allclose(turned[inside], expected[inside], atol=1e-5)
    assert np.abs(np.asarray(turned)[inside] - expected[::-1][inside]).max() > 0.5


def test_a_quarter_turn_is_that_of_numpy(key):
    image = jax.random.uniform(key, (8, 8, 3))
    np.testing.assert_allclose(
        augment.rotated(image, jnp.float32(np.pi / 2)), np.rot90(image), atol=1e-5
    )
    np.testing.assert_allclose(augment.rotated(image, jnp.float32(0)), image, atol=1e-6)


def test_angles_are_uniform_within_fifteen_degrees(key):
    """Read off pictures that rise from left to right: at the centre's right neighbour the value is
    cos of the angle."""
    column = np.mgrid[:9, :9][1] - 4.0
    x = jnp.asarray(np.broadcast_to(column.ravel(), (4000, 81)), jnp.float32)
    out = augment.rotate(key, x).reshape(-1, 9, 9)
    angle = np.degrees(np.arctan2(out[:, 3, 4], out[:, 4, 5]))
    assert angle.min() > -15.001 and angle.max() < 15.001 and max(-angle.min(), angle.max()) > 14.9
    assert abs(angle.mean()) < 3 * 15 / 3**0.5 / 4000**0.5
    assert abs(angle.std() / (15 / 3**0.5) - 1) < 0.05


@pytest.mark.parametrize(("side", "pad"), [(8, 1), (28, 2)])
def test_crops_are_shifts_that_repeat_the_edge(side, pad, key):
    """Every example is one of the (2 pad + 1)^2 shifts, and all of them come, equally often."""
    image = np.asarray(jax.random.uniform(key, (side, side)))
    padded = np.pad(image, pad, mode="edge")
    shifts = {
        (i, j): padded[i : i + side, j : j + side]
        for i in range(2 * pad + 1)
        for j in range(2 * pad + 1)
    }
    out = np.asarray(augment.crop(key, jnp.broadcast_to(image.reshape(1, -1), (1000, side**2))))
    counts = [int((out == shift.reshape(1, -1)).all(1).sum()) for shift in shifts.values()]
    assert sum(counts) == 1000
    chi2 = sum((n - 1000 / len(shifts)) ** 2 / (1000 / len(shifts)) for n in counts)
    assert chi2 < len(shifts) - 1 + 4 * (2 * len(shifts)) ** 0.5


def test_flips_mirror_half_of_the_images(key):
    image = np.asarray(jax.random.uniform(key, (5, 5, 3)))
    out = np.asarray(augment.flip(key, jnp.broadcast_to(image.reshape(1, -1), (1000, 75))))
    flipped = (out == image[:, ::-1].reshape(1, -1)).all(1)
    assert (flipped | (out == image.reshape(1, -1)).all(1)).all()
    assert abs(flipped.mean() - 0.5) < 3 * 0.5 / 1000**0.5


def test_what_is_no_image_is_refused(key):
    with pytest.raises(
        ValueError, match=r"shape \(50,\) are no square images.*task.augment = 'none'"
    ):
        augment.rotate(key, jnp.zeros((4, 50)))
    with pytest.raises(ValueError, match=r"shape \(16, 4\)"):
        augment.crop(key, jnp.zeros((4, 16, 4)))
    splits = tasks.Splits(*(Split(jnp.zeros((80, 50)), jnp.zeros(80, jnp.int32)),) * 3)
    experiment = config.replace(config.Experiment(), {"task.augment": "flip"})
    with pytest.raises(ValueError, match="no square images"):
        training.problem_of(experiment, splits)


@pytest.mark.slow
def test_training_batches_alone_are_varied(monkeypatch, key):
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
    assert (
        len(set(plain.loss.tolist())) == 1
        and len({*noisy.loss.tolist(), float(plain.loss[0])}) == 4
    )
