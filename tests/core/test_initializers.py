"""Initialisers: their closed forms, with a control for each; LSUV by the data; critical starts of
every activation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradjax.core.activations import ACTIVATIONS
from gradjax.core.initializers import WEIGHTS, bias
from gradjax.experiment.models import MLP
from gradjax.theory import meanfield

SIGMA_W = 1.7
# variance of an entry at sigma_w = 1 as a function of (fan_in, fan_out)
VARIANCES = {
    "gaussian": lambda n, m: 1 / n,
    "lecun_normal": lambda n, m: 1 / n,
    "lecun_uniform": lambda n, m: 1 / n,
    "he_normal": lambda n, m: 2 / n,
    "he_uniform": lambda n, m: 2 / n,
    "glorot_normal": lambda n, m: 2 / (n + m),
    "glorot_uniform": lambda n, m: 2 / (n + m),
    "uniform": lambda n, m: 0.05**2 / 3,
}
slow = lambda name: pytest.param(name, marks=pytest.mark.slow)
ISOMETRIC = ("orthogonal", "delta_orthogonal", "identity", "lsuv")


def test_every_rule_has_its_law():
    assert set(WEIGHTS) == set(VARIANCES) | set(ISOMETRIC)


@pytest.mark.parametrize("name", VARIANCES)
@pytest.mark.parametrize("shape", [(60, 250), (3, 3, 20, 40)], ids=str)
def test_variance_of_the_entries(name, shape, key):
    """Mean 0 and the law's variance within sampling error, for matrices and convolutions; 5% off is
    told apart."""
    receptive = int(np.prod(shape[:-2]))
    expected = SIGMA_W**2 * VARIANCES[name](receptive * shape[-2], receptive * shape[-1])
    draw = jax.jit(jax.vmap(lambda key: WEIGHTS[name](SIGMA_W)(key, shape, jnp.float32)))
    w = np.asarray(draw(jax.random.split(key, 8)), np.float64).ravel()
    error = np.std(w**2) / w.size**0.5
    assert abs(np.mean(w)) < 4 * (expected / w.size) ** 0.5
    assert (
        abs(np.mean(w**2) - expected) < 4 * error + 1e-3 * expected
    )  # JAX's cut normals are right to 1e-3
    assert abs(np.mean(w**2) - 1.05 * expected) > 4 * error
    if "uniform" in name:
        assert np.abs(w).max() <= (3 * expected) ** 0.5 * 1.0001


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9)], ids=str)
def test_orthogonal_keeps_lengths(shape, key):
    """W W^T or W^T W is sigma_w^2 times the identity, times fan_out / fan_in where the width
    grows."""
    widening = max(shape[1] / shape[0], 1)
    for name in ("orthogonal", "delta_orthogonal"):
        w = np.asarray(WEIGHTS[name](SIGMA_W)(key, shape, jnp.float32))
        gram = w @ w.T if shape[0] <= shape[1] else w.T @ w
        np.testing.assert_allclose(gram, SIGMA_W**2 * widening * np.eye(min(shape)), atol=1e-5)
    np.testing.assert_array_equal(w, WEIGHTS["orthogonal"](SIGMA_W)(key, shape, jnp.float32))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 3, 4, 4), (3, 3, 4, 8), (5, 4, 8, 4)], ids=str)
def test_a_delta_orthogonal_convolution_is_an_isometry(shape, key):
    """Circular, it keeps the norm of every image (Xiao 2018); an orthogonal kernel that is spread
    out does not."""
    kernel = WEIGHTS["delta_orthogonal"](1.0)(key, shape, jnp.float32)
    centre = tuple((k - 1) // 2 for k in shape[:2])
    assert not np.delete(
        np.asarray(kernel).reshape(-1, *shape[2:]), centre[0] * shape[1] + centre[1], axis=0
    ).any()

    def convolved(kernel, x):
        rolled = [
            jnp.roll(x, (i, j), (0, 1)) @ kernel[i, j]
            for i in range(shape[0])
            for j in range(shape[1])
        ]
        return sum(rolled)

    narrow = jax.random.normal(key, (6, 6, min(shape[2:])))
    x = (
        narrow if shape[2] <= shape[3] else narrow @ kernel[centre].T
    )  # where it narrows: on the rows it sees
    ratio = float(jnp.linalg.norm(convolved(kernel, x)) / jnp.linalg.norm(x))
    assert abs(ratio / max(shape[3] / shape[2], 1) ** 0.5 - 1) < 1e-5
    spread = WEIGHTS["orthogonal"](1.0)(key, shape, jnp.float32)
    assert abs(float(jnp.linalg.norm(convolved(spread, x)) / jnp.linalg.norm(x)) - ratio) > 1e-2


def test_delta_orthogonal_is_jaxs_where_jax_has_it(key):
    ours = WEIGHTS["delta_orthogonal"](1.0)(key, (3, 3, 8, 8), jnp.float32)
    theirs = jax.nn.initializers.delta_orthogonal()(key, (3, 3, 8, 8), jnp.float32)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_identity_passes_what_fits(key):
    draw = lambda shape: np.asarray(WEIGHTS["identity"](0.5)(key, shape, jnp.float32))
    np.testing.assert_array_equal(draw((4, 4)), 0.5 * np.eye(4))
    np.testing.assert_array_equal(np.arange(1.0, 5) @ draw((4, 6)), [0.5, 1, 1.5, 2, 0, 0])
    np.testing.assert_array_equal(np.arange(1.0, 5) @ draw((4, 2)), [0.5, 1])
    kernel = draw((3, 3, 2, 2))
    np.testing.assert_array_equal(kernel[1, 1], 0.5 * np.eye(2))
    assert kernel.sum() == 1.0


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_scale_may_be_traced(name, key):
    draw = lambda sigma: WEIGHTS[name](sigma)(key, (5, 7), jnp.float32)
    scaled = jax.jit(jax.vmap(draw))(jnp.array([1.0, 2.0]))
    factor = 1.0 if name == "lsuv" else 2.0  # its scale is the data's
    np.testing.assert_allclose(scaled[1], factor * scaled[0], rtol=1e-6)


def test_biases(key):
    b = np.asarray(bias(0.3)(key, (20_000,), jnp.float32))
    assert (
        abs(b.std() / 0.3 - 1) < 3 * (1 / 40_000) ** 0.5
        and not bias(0.0)(key, (9,), jnp.float32).any()
    )


# -- LSUV: by the data -------------------------------------------------------------------------------------


def pre_activations(model, variables, x):
    """W h of every layer, biases left out."""
    phi, params, rows = ACTIVATIONS[model.activation], variables["params"], []
    row = lambda z, b: z + jnp.broadcast_to(b, z.shape)
    stack = params["layers"]["dense"]
    dense = [
        params["embed"]["dense"],
        *({k: v[l] for k, v in stack.items()} for l in range(model.depth - 1)),
    ]
    h = x
    for layer in dense:
        rows.append(h @ layer["kernel"])
        h = phi(row(rows[-1], layer["bias"]))
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", slow("sigmoid"), slow("tanh")])
def test_lsuv_gives_every_layer_unit_variance(activation, key):
    """Mishkin & Matas 2016: Var = 1 after every layer, in the scan, for each seed under vmap,
    whatever the data."""
    x = 3.0 + 10.0 * jax.random.normal(key, (64, 20))
    model = MLP(10, 12, 32, activation=activation, weights="lsuv", sigma_w=1.0)
    seeds = jax.jit(jax.vmap(lambda key: model.init(key, x, train=True)))(jax.random.split(key, 3))
    plain = MLP(10, 12, 32, activation=activation, weights="orthogonal", sigma_w=1.0)
    for seed in range(3):
        variables = jax.tree.map(lambda leaf, i=seed: leaf[i], seeds)
        deviations = [float(jnp.std(z)) for z in pre_activations(model, variables, x)]
        np.testing.assert_allclose(deviations, 1.0, atol=1e-4)
        for kernel in variables["params"]["layers"]["dense"]["kernel"][
            :2
        ]:  # directions stay orthonormal
            gram = kernel.T @ kernel
            np.testing.assert_allclose(gram / gram[0, 0], np.eye(32), atol=1e-4)
    variables = jax.jit(lambda key: plain.init(key, x, train=True))(key)
    start = [float(jnp.std(z)) for z in pre_activations(plain, variables, x)]
    assert max(abs(s - 1) for s in start) > 0.5


def test_lsuv_is_times_sigma_w(key):
    x = jax.random.normal(key, (64, 20))
    model = MLP(10, 4, 32, activation="relu", weights="lsuv", sigma_w=1.5)
    deviations = [
        float(jnp.std(z)) for z in pre_activations(model, model.init(key, x, train=True), x)
    ]
    np.testing.assert_allclose(deviations, 1.5, atol=1e-4)


# -- critical starts ---------------------------------------------------------------------------------------

# sigma_b at which the critical length is stable: any for most; those of half-stable criticality
# need some (Roberts, Yaida, Hanin 2021, arXiv 2106.10165, section 5.3.3: GELU from 0.416 on).
# Softplus has none.
BIASES = {"gelu": 0.5, "silu": 0.8}


QUICK = ("tanh", "relu", "prelu", "tailored_relu", "gelu", "silu", "softplus")


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in ACTIVATIONS])
def test_every_activation_has_a_critical_start(name):
    """chi_1 = 1 at the limit of the lengths; 2% more sigma_w is chaos or explosion. Softplus has no
    critical point."""
    with jax.enable_x64(True):
        sigma_b = BIASES.get(name, 0.0)
        sigma_w = meanfield.critical_sigma_w(sigma_b, name)
        if name == "softplus":
            assert np.isnan(sigma_w)
            return
        chi = float(meanfield.chi_1(sigma_w, sigma_b, name))
        assert abs(chi - 1) < 1e-9
        assert abs(float(meanfield.chi_1(1.02 * sigma_w, sigma_b, name)) - 1) > 1e-4
