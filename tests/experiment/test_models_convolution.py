"""Convolutional and graph architectures: the contract of every model, and what each of them is
known for."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from model_contract import apply, build, check_contract, check_spectrum, init, run

from gradjax.core.step import check_step
from gradjax.experiment.models.convolution import (
    Conv,
    convolve,
    direct,
    neighbours,
    pool,
    blocks_per_stage,
    tiled,
)
from gradjax.experiment.tasks.graphs import communities
from gradjax.spectrum.jacobian import jacobian_spectrum

RELU = {"activation": "relu", "sigma_w": 2**0.5, "sigma_b": 0.0}
BATCHNORM = {**RELU, "normalization": "batchnorm"}
SMALL = {"depth": 4, "width": 4}
LINEAR = {"activation": "linear", "sigma_w": 1.0, "sigma_b": 0.0}
VARIANTS = [
    ("lenet5", RELU),
    ("circular_cnn", {"depth": 3, "width": 4, "weights": "delta_orthogonal"}),
    # slow from here on: the compiler's time
    ("resnet", {"depth": 2, "width": 4, **BATCHNORM}),
    ("lenet5", {"weights": "lsuv", "dropout": 0.2}),
    ("alexnet", {"width": 3, "dropout": 0.5, **RELU}),
    ("vgg", {"depth": 7, "width": 2, **BATCHNORM}),
    ("resnet", {"depth": 4, "width": 4, **RELU, "residual_learned": True, "residual_scale": 0.5}),
    ("densenet", {"depth": 4, "width": 4, **BATCHNORM}),
    ("inception", {**RELU, "depth": 2, "width": 8, "weights": "orthogonal"}),
    ("circular_cnn", {"depth": 1, "width": 4, "weight_standardization": True}),
]
FIXUP = (
    "resnet",
    {"depth": 4, "width": 4, **RELU, "fixup": True},
)  # its logits start at 0, whatever the seed
GRAPHS = [
    ("gcn", {"depth": 4, "width": 4}),
    (
        "gcn",
        {"depth": 4, "width": 4, "residual": True, "residual_scale": 0.5, "residual_learned": True},
    ),
    ("gcn", {"depth": 1, "width": 4, "normalization": "layernorm"}),
]
SPECTRA = [
    ("resnet", {"depth": 2, "width": 2}),
    ("lenet5", {}),
    ("alexnet", {"width": 1}),
    ("vgg", {"depth": 3, "width": 2}),
    ("densenet", {"depth": 2, "width": 2}),
    ("inception", {"depth": 2, "width": 8}),
]


def rows(table, fast=None):
    return [
        pytest.param(
            name,
            settings,
            id=f"{name}-{'-'.join(settings)}",
            marks=[pytest.mark.slow] * (fast is not None and i >= fast),
        )
        for i, (name, settings) in enumerate(table)
    ]


@pytest.fixture
def x(key):
    """Four images of 8 x 8."""
    return jax.random.normal(key, (4, 64))


@pytest.mark.parametrize(("name", "settings"), rows([*VARIANTS, FIXUP]))
def test_shapes(name, settings, key, x):
    """What needs no compilation: the network and its links are traced, in training and in test
    mode, and fit."""
    model = build(name, **settings)
    variables = jax.eval_shape(lambda key: init(model, key, x), key)

    def traced(variables):
        h0, links = model.links(variables, x, key)
        assert check_step(links, h0) >= 2
        network = [apply(model, variables, x, key, train) for train in (True, False)]
        return [*network, run(h0, links)]

    assert [out.shape for out in jax.eval_shape(traced, variables)] == [(4, 10)] * 3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), rows(VARIANTS, fast=2))
def test_contract(name, settings, key, x):
    check_contract(build(name, **settings), x, key)


@pytest.mark.slow
@pytest.mark.parametrize("per_step", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "settings"), rows(GRAPHS, fast=1))
def test_contract_of_graphs(name, settings, per_step, key):
    graphs = communities(key, 3, nodes=8)
    model = build(name, num_outputs=4, per_step=per_step, **settings)
    check_contract(model, graphs.x, key, graphs.y if per_step else graphs.y[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), rows(SPECTRA, fast=1))
def test_spectrum(name, settings, key, x):
    check_spectrum(build(name, **settings), x, key)


def test_every_float_may_be_traced(x):
    """The training traces all of them; no compilation is needed to see it."""

    def network(name, **floats):
        key = jax.random.key(0)
        return init(build_traced(name, **floats), key, x)

    for name, floats in {
        "lenet5": {"sigma_w": 1.0, "sigma_b": 0.1, "dropout": 0.2},
        "resnet": {"sigma_w": 1.0, "sigma_b": 0.1, "residual_scale": 0.3},
        "inception": {"sigma_w": 1.0, "sigma_b": 0.1},
    }.items():
        jax.eval_shape(lambda floats, name=name: network(name, **floats), floats)


def build_traced(name, **floats):
    from gradjax.experiment import config, models

    shape = {"model.name": name, "model.depth": 3, "model.width": 8}
    experiment = config.replace(
        config.Experiment(), shape | {f"model.{key}": value for key, value in floats.items()}
    )
    return models.build(experiment.model, 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg", "resnet", "inception", "circular_cnn", "gcn"])
def test_size_of_the_program_does_not_depend_on_depth(name, key, x):
    x = communities(key, 2, nodes=4).x if name == "gcn" else x
    size = lambda depth: str(
        jax.make_jaxpr(lambda k: init(build(name, depth=depth, width=8), k, x))(key)
    ).count(" = ")
    assert size(60) == size(600)


# -- convolutions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "size", "stride", "tile"),
    [((7, 11), 5, 1, (2, 4)), ((9, 6), 3, 2, (3, 2)), ((6, 6), 5, 1, None)],
)
def test_lowerings_agree(side, size, stride, tile, key):
    """Values and both gradients; the last tile may reach beyond the image."""
    h, kernel = jax.random.normal(key, (2, 3, *side, 2)), jax.random.normal(key, (size, size, 2, 3))

    def of(lowering):
        def loss(h, kernel):
            z = lowering(h, kernel)
            return jnp.sum(jnp.sin(z)), z

        (_, z), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(h, kernel)
        return [z, *gradients]

    for a, b in zip(
        of(lambda h, k: tiled(h, k, stride, tile)),
        of(lambda h, k: direct(h, k, stride)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=3e-5)


@pytest.mark.parametrize(
    ("side", "cin", "size", "stride"),
    [
        ((7, 11), 1, 5, 1),
        ((8, 8), 2, 5, 1),
        ((6, 15), 1, 3, 1),
        ((5, 7), 2, 5, 1),
        ((7, 6), 64, 3, 1),
        ((9, 8), 2, 3, 2),
    ],
)
def test_tiles_pool_what_they_give(side, cin, size, stride, key):
    """Values, gradients, forward mode and vmap of the pooled tiles are those of XLA's convolution
    and `pool`."""
    h, kernel = (
        jax.random.normal(key, (2, 3, *side, cin)),
        jax.random.normal(key, (size, size, cin, 3)),
    )
    ours, other = (
        functools.partial(tiled, stride=stride, pooled=True),
        lambda h, kernel: pool(direct(h, kernel, stride)),
    )

    def of(f):
        loss = lambda h, kernel: jnp.sum(jnp.sin(f(h, kernel)))
        moved = jax.jvp(f, (h, kernel), (jnp.cos(h), jnp.cos(kernel)))[1]
        one = jax.vmap(jax.vmap(lambda h: jax.jvp(lambda h: f(h, kernel), (h,), (jnp.sin(h),))[1]))(
            h
        )
        return [f(h, kernel), *jax.grad(loss, (0, 1))(h, kernel), moved, one]

    for a, b in zip(
        jax.jit(of, static_argnums=0)(ours), jax.jit(of, static_argnums=0)(other), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("padding", ["same", "circular"])
@pytest.mark.parametrize("size", [3, 5])
def test_padding(padding, size, key):
    """z_i = sum of W_a h_{i + a - centre}, beyond the edge 0 or the other side."""
    h, kernel = jax.random.normal(key, (6, 7, 2)), jax.random.normal(key, (size, size, 2, 3))
    wanted, c = np.zeros((6, 7, 3)), size // 2
    for i, j, a, b in np.ndindex(6, 7, size, size):
        p, q = i + a - c, j + b - c
        if padding == "circular" or (0 <= p < 6 and 0 <= q < 7):
            wanted[i, j] += np.asarray(h[p % 6, q % 7] @ kernel[a, b])
    np.testing.assert_allclose(convolve(h, kernel, padding=padding), wanted, atol=1e-4)


def test_pooling(key):
    h = jax.random.normal(key, (3, 7, 4, 2))
    window = lambda h, size, step, padding: lax.reduce_window(
        h, -jnp.inf, lax.max, size, step, padding
    )
    np.testing.assert_array_equal(pool(h), window(h, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"))
    np.testing.assert_array_equal(neighbours(h), window(h, (1, 3, 3, 1), (1, 1, 1, 1), "SAME"))
    np.testing.assert_allclose(
        pool(h, average=True)[0, 1, 0], h[0, 2:4, :2].mean((0, 1)), rtol=1e-5
    )
    assert pool(h[:, :1]).shape == (3, 1, 4, 2)
    assert convolve(
        jnp.ones((3, 5, 6, 2)), jnp.ones((5, 5, 2, 3)), padding="valid", pooled=True
    ).shape == (3, 1, 2, 3)
    assert Conv(3, 5, pooled=True).init_with_output(key, h)[0].shape == (3, 3, 2, 3)


def test_derivative_of_pooling(key):
    """The largest has it, ties share it, and nan is not lost."""
    h = jnp.asarray([[1.0, 3.0], [2.0, 0.0]])[None, ..., None]
    of = lambda h: np.asarray(jax.grad(lambda h: jnp.sum(pool(h)))(h)[0, ..., 0])
    np.testing.assert_array_equal(of(h), [[0, 1], [0, 0]])
    np.testing.assert_array_equal(of(jnp.maximum(h, 2)), [[0, 1], [0, 0]])
    np.testing.assert_array_equal(of(jnp.ones_like(h)), np.full((2, 2), 0.25))
    np.testing.assert_array_equal(of(h.at[0, 1, 0].set(3)), [[0, 0.5], [0.5, 0]])
    assert (
        np.isnan(pool(h.at[0, 0, 0].set(jnp.nan))).all()
        and np.isnan(of(h.at[0, 0, 0].set(jnp.nan))).all()
    )
    h = jax.random.normal(key, (4, 6, 5, 3))
    chex.assert_numerical_grads(pool, (h,), order=1, atol=1e-2, rtol=1e-2)


def test_stages():
    assert [blocks_per_stage(depth) for depth in (1, 2, 3, 8)] == [
        [1],
        [1, 1],
        [1, 1, 1],
        [3, 3, 2],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["gaussian", "orthogonal", "delta_orthogonal"])
def test_weights_have_the_mean_field_variance(weights, key):
    """On a torus E z^2 = sigma_w^2 E x^2, fan_in being 9 channels; zeros beyond the edge cost a
    part of it."""
    h = jax.random.normal(key, (8, 8, 4))

    def length(k, padding):
        layer = Conv(4, padding=padding, weights=weights, sigma_w=1.7)
        return jnp.mean(layer.init_with_output(k, h)[0] ** 2) / jnp.mean(h**2)

    both = jax.jit(
        lambda keys: lax.map(lambda k: jnp.stack([length(k, "circular"), length(k, "same")]), keys)
    )
    each, cut = np.asarray(both(jax.random.split(key, 300))).T
    error = 3 * each.std() / 300**0.5 + 1e-5
    assert abs(each.mean() - 1.7**2) < error < abs(each.mean() - (1.1 * 1.7) ** 2)
    if weights != "delta_orthogonal":  # which has no weight beyond the edge
        assert cut.mean() < 1.7**2 - 3 * cut.std() / 300**0.5


@pytest.mark.slow
def test_linear_circular_network_is_an_isometry(key, x, report):
    """Xiao et al. 2018: every singular value of the product of delta-orthogonal layers is 1."""
    model = build("circular_cnn", depth=25, width=3, weights="delta_orthogonal", **LINEAR)
    h0, links = model.links(init(model, key, x), x[0])
    values = jacobian_spectrum(links[1:-1], run(h0, links[:1])).log_singular_values
    error = float(np.abs(np.exp(values) - 1).max())
    report("isometry of a circular delta-orthogonal network", error)
    assert error < 1e-5


# -- architectures ---------------------------------------------------------------------------------------


def test_lenet_has_its_61706_parameters():
    count = lambda features: sum(
        leaf.size
        for leaf in jax.tree.leaves(
            jax.eval_shape(
                lambda k: init(build("lenet5"), k, jnp.zeros((2, features))), jax.random.key(0)
            )
        )
    )
    assert count(784) == 61_706
    assert count(64) == 156 + 2416 + (2 * 2 * 16 + 1) * 120 + 121 * 84 + 85 * 10


def test_only_square_images_and_graphs(key):
    shape = lambda model, features: jax.eval_shape(
        lambda k: init(model, k, jnp.zeros((2, features))), key
    )
    with pytest.raises(ValueError, match="no square image"):
        shape(build("lenet5"), 65)
    with pytest.raises(ValueError, match="a graph is"):
        shape(build("gcn", depth=2, width=4), 64)
    with pytest.raises(ValueError, match="fixup stands in normalisation's place"):
        shape(build("resnet", depth=2, width=4, fixup=True, normalization="batchnorm"), 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"residual_learned": True, "residual_scale": 0.0}, {"fixup": True}]
)
def test_residual_blocks_start_as_the_identity(settings, key, x):
    """SkipInit and Fixup: a stage of equal blocks changes nothing before the first step."""
    model = build(
        "resnet", depth=2, width=4, **RELU, **settings
    )  # stages of one block each: 1, and one that halves
    h0, links = model.links(init(model, key, x), x)
    h1 = run(h0, links[:1])
    np.testing.assert_array_equal(run(h1, links[1:2]), h1)
    h1 = run(h1, links[1:3])
    assert h1.shape == (4, 4, 4, 8)


def differences(graph, h):
    """Size of what is left of H beside the direction that all nodes share, sqrt(degree)."""
    values, vectors = np.linalg.eigh(np.asarray(graph, np.float64))
    h, common = np.asarray(h, np.float64), vectors[:, -1]
    return np.linalg.norm(h - np.outer(common, common @ h)), values


def states(model, variables, graph_and_features):
    h0, links = model.links(variables, graph_and_features)
    h1 = run(h0, links[:1])
    step, thetas = links[1]
    return lax.scan(lambda h, theta: ((new := step(h, theta)), new), h1, thetas)[1]


@pytest.mark.slow
def test_deep_graph_convolutions_smooth_away_all_differences(key):
    """Linear, with orthogonal W: the rate per layer is the second eigenvalue of A_hat; a skip keeps
    the differences."""
    graph = communities(key, 1, nodes=16, inside=0.6, between=0.2).x[0]
    sizes = {}
    for residual in (False, True):
        model = build("gcn", depth=60, width=4, weights="orthogonal", residual=residual, **LINEAR)
        h = states(model, init(model, key, graph[None]), graph)
        sizes[residual] = np.array([differences(graph[:, :16], one)[0] for one in h])
    second = np.sort(np.abs(differences(graph[:, :16], h[0])[1]))[-2]
    rate = np.polyfit(np.arange(10, 40), np.log(sizes[False][10:40]), 1)[0]
    np.testing.assert_allclose(rate, np.log(second), rtol=0.03)
    assert sizes[False][40] < 1e-3 * sizes[False][0]
    assert sizes[True][40] > sizes[True][0]


@pytest.mark.slow
def test_communities(key):
    """A_hat is symmetric with largest eigenvalue 1, neighbours are alike, features say a little."""
    graphs = communities(key, 50)
    assert (
        graphs.x.shape == (50, 32, 36)
        and graphs.y.shape == (50, 32)
        and graphs.y.dtype == jnp.int32
    )
    adjacency, features = np.asarray(graphs.x[..., :32]), np.asarray(graphs.x[..., 32:])
    np.testing.assert_array_equal(adjacency, adjacency.swapaxes(1, 2))
    np.testing.assert_allclose(np.linalg.eigvalsh(adjacency)[:, -1], 1, atol=1e-5)
    same, edges = (
        graphs.y[:, :, None] == graphs.y[:, None, :],
        (adjacency > 0) & ~np.eye(32, dtype=bool),
    )
    inside = edges[np.asarray(same) & ~np.eye(32, dtype=bool)].mean()
    assert abs(inside - 0.5) < 0.02 and abs(edges[~np.asarray(same)].mean() - 0.05) < 0.01
    own, smooth = ((f.argmax(-1) == graphs.y).mean() for f in (features, adjacency @ features))
    assert 0.4 < own < 0.6 and smooth > own + 0.15


def test_halves_meet_floats_alike():
    """Images in bfloat16 and kernels in float32, as mixed precision has them, by either way."""
    h = jax.random.normal(jax.random.key(0), (2, 6, 6, 3)).astype(jnp.bfloat16)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 4))
    with jax.numpy_dtype_promotion("standard"):
        by_tiles, by_xla = tiled(h, kernel), direct(h, kernel)
    assert by_tiles.dtype == by_xla.dtype == jnp.float32
    np.testing.assert_allclose(by_tiles, by_xla, rtol=1e-5, atol=1e-5)
