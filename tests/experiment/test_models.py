"""The multilayer perceptron and the parts that architectures share: contract, starts, what each
setting does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_contract import apply, build, check_contract, check_spectrum, init, run

from gradjax.core.activations import ACTIVATIONS, at_depth, tailored_slope
from gradjax.core.step import layer_jacobians
from gradjax.experiment import config
from gradjax.experiment.models import MLP
from gradjax.experiment.models.layers import Dense, Dropout, normalize, standardized

SMALL = {"depth": 6, "width": 16, "sigma_w": 1.3, "sigma_b": 0.2}
BRANCH = {"residual": True, "residual_scale": 0.3}
slow = lambda options: pytest.param(options, marks=pytest.mark.slow)
VARIANTS = {
    "plain": slow({}),
    "bottleneck": BRANCH | {"bottleneck": 5, "normalization": "rmsnorm", "remat": True},
    "batchnorm": slow({"normalization": "batchnorm", "activation": "prelu", "highway": True}),
    "one_layer": slow({"depth": 1}),
    "residual": slow(BRANCH),
    "rezero": slow({"residual": True, "residual_learned": True, "residual_scale": 0.0}),
    "layernorm": slow({"normalization": "layernorm"}),
    "standardised": slow({"weight_standardization": True, "activation": "tailored_relu"}),
    "dropout": slow({"dropout": 0.3}),
    "dropout_on_last": slow({"dropout": 0.3, "dropout_on": "last", "residual": True}),
    "lsuv": slow({"weights": "lsuv"}),
}


def mlp(**options):
    return build("mlp", **SMALL | options)


@pytest.fixture
def key():
    """Of XLA's own generator, which compiles three times as fast as Threefry."""
    return jax.random.key(0, impl="unsafe_rbg")


@pytest.fixture
def x(key):
    return jax.random.normal(key, (8, 24))


@pytest.mark.slow
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_contract(options, key, x):
    check_contract(mlp(**options), x, key)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [BRANCH | {"bottleneck": 5}, slow({}), slow({"highway": True})], ids=str
)
def test_spectrum(options, key, x):
    check_spectrum(mlp(**options), x, key)


def test_regression_and_a_single_example(key):
    """1000-100-10 is a depth of one; an example without its batch axis is the batch's row."""
    model = build("mlp", depth=1, width=100)
    x = jax.random.normal(key, (3, 1000))
    variables = init(model, key, x)
    assert {k: v["kernel"].shape for k, v in (("in", variables["params"]["embed"]["dense"]),)} == {
        "in": (1000, 100)
    }
    np.testing.assert_allclose(
        model.apply(variables, x[1]), model.apply(variables, x)[1], atol=1e-6
    )


@pytest.mark.parametrize("weights", ["gaussian", "orthogonal"])
@pytest.mark.parametrize("features", [64, 300])
def test_weights_have_the_mean_field_variance(weights, features, key):
    """E z^2 = sigma_w^2 E x^2, whichever way the width changes; sigma_w 5% off is told apart."""
    x = jax.random.normal(key, (features,))
    keys = jax.random.split(key, 400)
    model = mlp(weights=weights, width=128, depth=1, sigma_w=1.7, sigma_b=0.0, activation="linear")

    def first_step(variables):
        h, ((step, theta), *_) = model.links(variables, x)
        return step(h, theta)

    z = jax.jit(jax.vmap(lambda k: first_step(init(model, k, x))))(keys)
    each = jnp.mean(z**2, axis=1) / jnp.mean(x**2)
    error = float(each.std()) / 20 + 1e-6
    assert abs(float(each.mean()) - 1.7**2) < 3 * error
    assert abs(float(each.mean()) - (1.05 * 1.7) ** 2) > 3 * error


# -- what the settings do ----------------------------------------------------------------------------------


def hidden(model, variables, x, key=None):
    """The states before and after the square layers."""
    h0, links = model.links(variables, x, key)
    before = run(h0, links[:1])
    return before, run(before, links[1:2]), links


def test_a_bottleneck_is_a_map_down_an_activation_and_a_map_up(key, x):
    model = mlp(**BRANCH, bottleneck=5, depth=2)
    variables = init(model, key, x)
    h, after, _ = hidden(model, variables, x)
    p = jax.tree.map(lambda leaf: leaf[0], variables["params"]["layers"])
    assert p["dense"]["kernel"].shape == (16, 5) and p["up"]["kernel"].shape == (5, 16)
    row = lambda b: b[None]
    branch = jnp.tanh(h @ p["dense"]["kernel"] + row(p["dense"]["bias"])) @ p["up"]["kernel"] + row(
        p["up"]["bias"]
    )
    np.testing.assert_allclose(after, h + 0.3 * branch, atol=1e-6)
    assert not np.allclose(after, h + branch, atol=1e-2)


@pytest.mark.slow
def test_rezero_starts_as_the_identity_and_learns_its_scales(key, x):
    """J = I exactly, and each scale has a gradient; without the learned scale there is none."""
    model = mlp(residual=True, residual_learned=True, residual_scale=0.0)
    variables = init(model, key, x)
    h0, links = model.links(variables, x[0])
    for jacobian in layer_jacobians(links[1].step, run(h0, links[:1]), links[1].thetas):
        np.testing.assert_array_equal(jacobian, np.eye(16))
    scales = variables["params"]["layers"]["skip"]["scale"]
    assert scales.shape == (5,) and not scales.any()
    loss = lambda params: jnp.sum(apply(model, {"params": params}, x, key) ** 2)
    assert (jax.grad(loss)(variables["params"])["layers"]["skip"]["scale"] != 0).all()
    assert "skip" not in init(mlp(residual=True), key, x)["params"]["layers"]


@pytest.mark.slow
def test_fixup_starts_as_the_identity_with_small_branches_and_its_scalars(key, x):
    """Zhang 2019, rules 1 to 3, and its claim: the first step of SGD moves the logits alike at
    every depth."""
    model = mlp(
        residual=True,
        fixup=True,
        weights="he_normal",
        sigma_w=1.0,
        activation="relu",
        depth=65,
        width=32,
    )
    variables = init(model, key, x)
    params = variables["params"]
    layers = params["layers"]
    assert not layers["up"]["kernel"].any() and not params["readout"]["kernel"].any()
    assert layers["skip"]["scale"].tolist() == [1.0] * 64
    assert {name for name in layers if "bias" in name} == {"bias_1", "bias_2", "bias_3", "bias_4"}
    assert all("bias" not in layers[name] for name in ("dense", "up"))
    variance = float(jnp.var(layers["dense"]["kernel"])) * 32 / 2  # of He's rule
    assert abs(variance * 64 - 1) < 5 * (2 / 64 / 32**2) ** 0.5
    before, after, _ = hidden(model, variables, x)
    np.testing.assert_array_equal(before, after)
    moved = jax.tree.map(
        lambda p: p + 0.1 * jax.random.normal(key, p.shape), variables
    )  # its outputs start at 0
    np.testing.assert_allclose(
        run(*model.links(moved, x)), apply(model, moved, x, key), rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
def test_fixup_moves_the_logits_alike_at_every_depth(key, x):
    """Change of the logits in the second and third step of SGD, over depth; that of He's start
    explodes with it."""

    def moved(depth, **start):
        model = mlp(
            residual=True,
            activation="relu",
            weights="he_normal",
            sigma_w=1.0,
            sigma_b=0.0,
            depth=depth,
            width=32,
            **start,
        )
        params = init(model, key, x)["params"]
        target = jax.random.normal(jax.random.key(1), (8, 10))
        loss = lambda params: jnp.mean((apply(model, {"params": params}, x, key) - target) ** 2)
        step = jax.jit(lambda p: jax.tree.map(lambda a, g: a - 0.01 * g, p, jax.grad(loss)(p)))
        two = step(step(params))
        return float(
            jnp.linalg.norm(
                apply(model, {"params": step(two)}, x, key) - apply(model, {"params": two}, x, key)
            )
        )

    few, many = moved(5, fixup=True), moved(129, fixup=True)
    assert abs(np.log(many / few)) < 0.7
    assert not moved(129) < 1e3 * moved(5)


def test_a_highway_layer_carries_most_of_its_input_at_first(key, x):
    """T = sigmoid(-2) = .119 where the gate sees nothing; h' = T f + (1 - T) h."""
    model = mlp(highway=True, depth=2)
    variables = init(model, key, x)
    h, after, _ = hidden(model, variables, x)
    p = jax.tree.map(lambda leaf: leaf[0], variables["params"]["layers"])
    assert (p["gate"]["bias"] == -2).all()
    gate = jax.nn.sigmoid(h @ p["gate"]["kernel"] - 2)
    f = jnp.tanh(h @ p["dense"]["kernel"] + p["dense"]["bias"][None])
    np.testing.assert_allclose(after, gate * f + (1 - gate) * h, atol=1e-6)
    calm = jax.tree.map(lambda leaf: leaf, variables)
    calm["params"]["layers"]["gate"]["kernel"] = jnp.zeros((1, 16, 16))
    _, after, _ = hidden(model, calm, x)
    np.testing.assert_allclose(after, 0.1192029 * f + 0.8807971 * h, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("layernorm", lambda z: (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True)),
        ("rmsnorm", lambda z: z / np.sqrt((z**2).mean(1, keepdims=True))),
        ("batchnorm", lambda z: (z - z.mean(0, keepdims=True)) / z.std(0, keepdims=True)),
    ],
)
def test_normalisations_by_their_definition(kind, expected, key):
    import flax.linen as nn

    class One(nn.Module):
        @nn.compact
        def __call__(self, z, train):
            return normalize(kind, z, train)

    z = 3 + 2 * jax.random.normal(key, (64, 16))
    out, variables = One().init_with_output(key, z, True)
    np.testing.assert_allclose(out, expected(np.asarray(z)), atol=2e-3)
    assert not np.allclose(out, z, atol=0.1)
    if (
        kind == "batchnorm"
    ):  # at test time the running averages, .99 of their start (0, 1) after one batch
        mean = variables["batch_stats"]["norm"]["mean"]
        tested = One().apply(
            {**variables, "batch_stats": {"norm": {"mean": mean + 1, "var": jnp.full(16, 4.0)}}},
            z,
            False,
        )
        np.testing.assert_allclose(tested, (z - (mean + 1)[None]) / 2, atol=1e-4)


def test_running_statistics_are_learnt_in_every_layer_of_the_scan(key, x):
    model = mlp(normalization="batchnorm")
    variables = init(model, key, x)
    _, changed = model.apply(variables, x, train=True, mutable=["batch_stats"])
    before, after = (tree["batch_stats"]["layers"]["norm"]["mean"] for tree in (variables, changed))
    assert after.shape == (5, 16) and (before != after).all()


def test_standardised_weights(key, x):
    """Mean 0 and square 1 / fan_in per unit, times sigma_w, whatever is added to or multiplied with
    the kernel."""
    kernel = 3 + jax.random.normal(key, (3, 3, 8, 5))
    w = np.asarray(standardized(kernel)).reshape(72, 5)
    np.testing.assert_allclose(w.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose((w**2).sum(0), 1, rtol=1e-5)
    layer = Dense(5, sigma_w=1.7, weight_standardization=True)
    variables = layer.init(key, x)
    scaled = {"params": {**variables["params"], "kernel": 4 * variables["params"]["kernel"] + 1}}
    np.testing.assert_allclose(layer.apply(scaled, x), layer.apply(variables, x), atol=1e-4)
    z = x @ standardized(variables["params"]["kernel"])
    np.testing.assert_allclose(layer.apply(variables, x), 1.7 * z, atol=1e-5)


def test_prelu_learns_a_slope_per_layer_from_a_quarter(key, x):
    model = mlp(activation="prelu")
    params = init(model, key, x)["params"]
    slope = params["layers"]["activation"]["prelu"]["negative_slope"]
    assert slope.tolist() == [0.25] * 5
    gradients = jax.grad(lambda p: jnp.sum(apply(model, {"params": p}, x, key) ** 2))(params)
    assert (gradients["layers"]["activation"]["prelu"]["negative_slope"] != 0).all()


def test_tailored_relu_brings_orthogonal_inputs_to_its_correlation(key):
    """.9 after as many layers as the network has; ReLU at its critical start, and a slope for fewer
    layers, fail."""
    width = 4000

    def last(activation, sigma_w, layers=30):
        phi = at_depth(activation, layers).phi

        def layer(h, key):
            """W h of two states without W: two Gaussian vectors with their covariances."""
            root = jnp.linalg.cholesky(h @ h.T / width + 1e-6 * jnp.eye(2))
            return phi(sigma_w * root @ jax.random.normal(key, (2, width))), None

        def correlation(key):
            h, _ = jax.lax.scan(layer, width**0.5 * jnp.eye(2, width), jax.random.split(key, 30))
            return (h[0] @ h[1]) / jnp.linalg.norm(h[0]) / jnp.linalg.norm(h[1])

        found = jax.jit(jax.vmap(correlation))(jax.random.split(key, 20))
        return float(found.mean()), float(found.std()) / 20**0.5

    mean, error = last("tailored_relu", 1.0)
    assert abs(mean - 0.9) < 3 * error + 0.001 < 0.02
    assert last("relu", 2**0.5)[0] > 0.95 < last("tailored_relu", 1.0, layers=12)[0]


def test_models_tailor_their_activation_to_their_depth(key, x):
    for depth in (3, 40):
        model = mlp(activation="tailored_relu", depth=depth)
        variables = init(model, key, x)
        dense = variables["params"]["embed"]["dense"]
        h = at_depth("tailored_relu", depth).phi(x @ dense["kernel"] + dense["bias"][None])
        np.testing.assert_allclose(hidden(model, variables, x)[0], h, atol=1e-5)
        assert not np.allclose(
            h, ACTIVATIONS["tailored_relu"](x @ dense["kernel"] + dense["bias"][None]), atol=1e-3
        )


def test_tailored_slopes_are_the_published_ones():
    """The authors' code gives .6291800290 for its ResNet-101, whose branches and skips compose the
    map thus, at .75."""

    def resnet(f, skip=0.6**2):
        branch = lambda c: f(f(f(c)))
        c = 0.0
        for blocks in (3, 4, 23, 3):
            for block in range(blocks):
                c = skip * (c if block else f(c)) + (1 - skip) * branch(c)
        return max(f(c), branch(0.0))

    assert abs(tailored_slope(resnet, 0.75) - 0.6291800290) < 1e-8
    assert abs(tailored_slope(resnet, 0.76) - 0.6291800290) > 1e-3
    assert tailored_slope(1) == 0.0  # one layer of ReLU brings orthogonal inputs to 1 / pi


def test_dropout_keeps_the_mean_and_drops_its_share(key):
    h = jnp.ones(100_000)
    out = Dropout(0.3).apply({}, h, rngs={"dropout": key})
    fraction = float(jnp.mean(out == 0))
    assert abs(fraction - 0.3) < 3 * (0.3 * 0.7 / 1e5) ** 0.5
    np.testing.assert_allclose(out[out > 0], 1 / 0.7, rtol=1e-6)


@pytest.mark.slow
def test_dropout_on_the_last_layer_leaves_the_others_alone(key, x):
    """States before the read-out are the same under other masks; with all layers dropping they are
    not."""
    other = jax.random.key(1)
    for on, same in (("last", True), ("all", False)):
        model = mlp(dropout=0.5, dropout_on=on)
        variables = init(model, key, x)
        a, b = (hidden(model, variables, x, k)[1] for k in (key, other))
        assert bool((a == b).all()) == same
        assert not (apply(model, variables, x, key) == apply(model, variables, x, other)).all()
        np.testing.assert_array_equal(
            apply(model, variables, x, key, False), apply(model, variables, x, other, False)
        )


def test_dropout_needs_a_key_for_its_links(key, x):
    model = mlp(dropout=0.1)
    with pytest.raises(ValueError, match=r"key=jax\.random\.key"):
        model.links(init(model, key, x), x)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"fixup": True}, "model.fixup shapes residual branches"),
        ({"bottleneck": 4}, "model.bottleneck shapes residual branches"),
        ({"residual_learned": True}, "model.residual_learned shapes"),
        ({"highway": True, "residual": True}, "model.highway = true is a gate in the skip's place"),
        (
            {"fixup": True, "residual": True, "normalization": "layernorm"},
            "in normalisation's place",
        ),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings, reason, key, x):
    with pytest.raises(config.ConfigError, match=reason):
        mlp(**settings)
    with pytest.raises(ValueError, match=reason):
        init(MLP(10, 3, 8, **settings), key, x)


def test_lsuv_of_standardised_weights_is_refused(key, x):
    with pytest.raises(ValueError, match="choose one of the two"):
        init(mlp(weights="lsuv", weight_standardization=True), key, x)


# -- floats, depth, memory ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_float_may_be_traced(key, x):
    def output(sigma_w, sigma_b, residual_scale, rate):
        floats = {
            "sigma_w": sigma_w,
            "sigma_b": sigma_b,
            "residual_scale": residual_scale,
            "dropout": rate,
        }
        model = MLP(10, 12, 32, residual=True, bottleneck=8, **floats)
        return apply(model, init(model, key, x), x, key)

    values = [
        jnp.array([1.0, 1.5]),
        jnp.array([0.0, 0.1]),
        jnp.array([0.5, 1.0]),
        jnp.array([0.0, 0.4]),
    ]
    batched, alone = jax.jit(jax.vmap(output))(*values), jax.jit(output)
    for i in range(2):
        np.testing.assert_allclose(batched[i], alone(*(v[i] for v in values)), atol=2e-4)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_elementwise_with_finite_slopes(name):
    x = jnp.linspace(-30, 30, 101)
    assert ACTIVATIONS[name](x).shape == x.shape
    assert jnp.isfinite(jax.vmap(jax.grad(ACTIVATIONS[name]))(x)).all()


def test_compile_time_does_not_depend_on_depth(key, x):
    size = lambda depth: str(jax.make_jaxpr(lambda k: init(mlp(depth=depth), k, x))(key)).count(
        " = "
    )
    assert size(10_000) == size(10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"depth": 12}, {"depth": 19, "normalization": "batchnorm", "residual": True}]
)
def test_rematerialised_layers_are_the_same_to_rounding(options, key, x):
    """Also where sqrt(depth) does not divide the depth, running statistics included."""
    plain, remat = (MLP(num_outputs=5, width=16, **options, remat=remat) for remat in (False, True))
    variables = plain.init({"params": key}, x, train=True)

    def run(model):
        def loss(params):
            out, changed = model.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            return jnp.sum(out**2), changed

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(a).max()))

    jax.tree.map(close, run(plain), run(remat))
