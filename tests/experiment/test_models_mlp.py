"""What each setting of the multilayer perceptron does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_contract import apply, build, init, roundings, run, started

from bounds import assert_rounding
from gradjax.core.activations import ACTIVATIONS, at_depth
from gradjax.core.step import layer_jacobians
from gradjax.experiment.models import MLP

SMALL = {"depth": 6, "width": 16, "sigma_w": 1.3, "sigma_b": 0.2}
BRANCH = {"residual": True, "residual_scale": 0.3}
# terms of tanh, sigmoid and other elementwise functions: XLA's are within some ulp
ELEMENTWISE = 16


def mlp(**options):
    return build("mlp", num_outputs=10, **SMALL | options)


@pytest.fixture
def key():
    """Of XLA's own generator, which compiles three times as fast as Threefry."""
    return jax.random.key(0, impl="unsafe_rbg")


@pytest.fixture
def x(key):
    return jax.random.normal(key, (8, 24))


def doubles(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def hidden(model, key, x):
    """Parameters, and the states before and after the square layers."""

    @jax.jit
    def states(key, x):
        variables = started(model, key, x)
        h0, links = model.links(variables, x, key)
        before = run(h0, links[:1])
        return variables["params"], before, run(before, links[1:2])

    return doubles(states(key, x))


def layer_of(params):
    """The parameters of the one square layer of a network of depth 2."""
    return jax.tree.map(lambda leaf: leaf[0], params["layers"])


def affine(h, layer):
    return h @ layer["kernel"] + layer["bias"]


def test_a_regression_of_depth_one_and_a_single_example(key):
    """1000-100-10 is a depth of one; an example without its batch axis is the batch's row."""
    model = build("mlp", num_outputs=10, depth=1, width=100)
    x = jax.random.normal(key, (3, 1000))

    @jax.jit
    def both(key, x):
        variables = started(model, key, x)
        return variables["params"], model.apply(variables, x[1]), model.apply(variables, x)[1]

    params, one, row = both(key, x)
    assert params["embed"]["dense"]["kernel"].shape == (1000, 100)
    assert params["readout"]["kernel"].shape == (100, 10) and "layers" not in params
    # tanh has a slope of at most 1, so the sum of 1000 comes into each of 100 units
    assert_rounding(one, row, terms=1100 + ELEMENTWISE, size=10)


def test_a_bottleneck_is_a_map_down_an_activation_and_a_map_up(key, x):
    params, h, after = hidden(mlp(**BRANCH, bottleneck=5, depth=2), key, x)
    p = layer_of(params)
    assert p["dense"]["kernel"].shape == (16, 5) and p["up"]["kernel"].shape == (5, 16)
    branch = affine(np.tanh(affine(h, p["dense"])), p["up"])
    size = 1 + np.abs(h) @ np.abs(p["dense"]["kernel"]) @ np.abs(p["up"]["kernel"])
    assert_rounding(after, h + 0.3 * branch, terms=16 + 5 + 4 + ELEMENTWISE, size=size, dtype="f4")
    assert not np.allclose(after, h + branch, atol=1e-2)


@pytest.mark.slow
def test_rezero_starts_as_the_identity_and_learns_its_scales(key, x):
    """J = I exactly, and each scale has a gradient; without the learned scale there is none."""
    model = mlp(residual=True, residual_learned=True, residual_scale=0.0)

    @jax.jit
    def all_of_it(key, x):
        variables = started(model, key, x)
        h0, links = model.links(variables, x[0])
        jacobians = layer_jacobians(links[1].step, run(h0, links[:1]), links[1].thetas)

        def loss(params):
            return jnp.sum(apply(model, {"params": params}, x, key) ** 2)

        gradients = jax.grad(loss)(variables["params"])
        return jacobians, variables["params"], gradients

    jacobians, params, gradients = all_of_it(key, x)
    np.testing.assert_array_equal(jacobians, np.broadcast_to(np.eye(16), (5, 16, 16)))
    scales = params["layers"]["skip"]["scale"]
    assert scales.shape == (5,) and not scales.any()
    assert (gradients["layers"]["skip"]["scale"] != 0).all()
    plain = jax.eval_shape(lambda: started(mlp(residual=True), key, x))
    assert "skip" not in plain["params"]["layers"]


@pytest.mark.slow
def test_fixup_starts_as_the_identity_with_small_branches_and_its_scalars(key, x):
    """Zhang 2019, rules 1 to 3."""
    relu = {"activation": "relu", "weights": "he_normal", "sigma_w": 1.0}
    model = mlp(residual=True, fixup=True, depth=65, width=32, **relu)
    params, before, after = hidden(model, key, x)
    layers = params["layers"]
    assert not layers["up"]["kernel"].any() and not params["readout"]["kernel"].any()
    assert layers["skip"]["scale"].tolist() == [1.0] * 64
    assert {name for name in layers if "bias" in name} == {"bias_1", "bias_2", "bias_3", "bias_4"}
    assert all("bias" not in layers[name] for name in ("dense", "up"))
    variance = np.var(layers["dense"]["kernel"]) * 32 / 2  # of He's rule
    assert abs(variance * 64 - 1) < 5 * (2 / 64 / 32**2) ** 0.5
    np.testing.assert_array_equal(before, after)

    @jax.jit
    def moved(key, x):
        """Links and network at other parameters: the outputs start at 0."""
        variables = started(model, key, x)
        variables = jax.tree.map(lambda p: p + 0.03 * jax.random.normal(key, p.shape), variables)
        return run(*model.links(variables, x)), apply(model, variables, x, key)

    links, network = moved(key, x)
    assert np.abs(network).max() > 0.01
    assert_rounding(links, network, terms=roundings(params))


@pytest.mark.slow
def test_fixup_moves_the_logits_alike_at_every_depth(key, x):
    """Change of the logits in the second and third step of SGD, over depth; that of He's start
    explodes with it."""
    plain = {"activation": "relu", "weights": "he_normal", "sigma_w": 1.0, "sigma_b": 0.0}
    target = jax.random.normal(jax.random.key(1), (8, 10))

    def moved(depth, **start):
        model = mlp(residual=True, depth=depth, width=32, **plain, **start)

        def logits(params):
            return apply(model, {"params": params}, x, key)

        def step(params, _):
            gradients = jax.grad(lambda p: jnp.mean((logits(p) - target) ** 2))(params)
            return jax.tree.map(lambda a, g: a - 0.01 * g, params, gradients), logits(params)

        @jax.jit
        def outputs(key):
            return jax.lax.scan(step, started(model, key, x)["params"], None, length=4)[1]

        return float(np.linalg.norm(np.subtract(*outputs(key)[2:])))

    few, many = moved(5, fixup=True), moved(129, fixup=True)
    assert abs(np.log(many / few)) < 0.7
    assert not moved(129) < 1e3 * moved(5)


def test_a_highway_layer_carries_most_of_its_input_at_first(key, x):
    """T = sigmoid(-2) = .119 where the gate sees nothing; h' = T f + (1 - T) h."""

    model = mlp(highway=True, depth=2)

    @jax.jit
    def states(key, x):
        """With a gate that sees the state, and with one whose kernel is 0."""
        variables = started(model, key, x)
        h0, links = model.links(variables, x)
        before, (step, theta) = run(h0, links[:1]), links[1]
        theta = jax.tree.map(lambda leaf: leaf[0], theta)
        after = [step(before, theta)]
        gate = theta["variables"]["params"]["gate"]
        gate["kernel"] = jnp.zeros_like(gate["kernel"])
        return variables["params"], before, [*after, step(before, theta)]

    terms = {"terms": 16 + 4 + 2 * ELEMENTWISE, "size": 8.0, "dtype": "f4"}
    params, h, (after, blind) = doubles(states(key, x))
    p = layer_of(params)
    assert (p["gate"]["bias"] == -2).all()
    f = np.tanh(affine(h, p["dense"]))
    gate = 1 / (1 + np.exp(-affine(h, p["gate"])))
    assert_rounding(after, gate * f + (1 - gate) * h, **terms)
    assert_rounding(blind, 0.1192029220 * f + 0.8807970780 * h, **terms)
    assert np.abs(gate - 0.1192).max() > 0.01


@pytest.mark.slow
def test_prelu_learns_a_slope_per_layer_from_a_quarter(key, x):
    model = mlp(activation="prelu")

    @jax.jit
    def slopes(key, x):
        params = started(model, key, x)["params"]
        gradients = jax.grad(lambda p: jnp.sum(apply(model, {"params": p}, x, key) ** 2))(params)
        return params["layers"]["activation"], gradients["layers"]["activation"]

    slope, gradient = (own["prelu"]["negative_slope"] for own in slopes(key, x))
    assert slope.tolist() == [0.25] * 5 and (gradient != 0).all()


def test_models_tailor_their_activation_to_their_depth(key, x):
    depths = (3, 40)

    @jax.jit
    def first_states(key, x):
        found = []
        for depth in depths:
            model = mlp(activation="tailored_relu", depth=depth)
            variables = started(model, key, x)
            h0, links = model.links(variables, x)
            dense = variables["params"]["embed"]["dense"]
            found.append((run(h0, links[:1]), x @ dense["kernel"] + dense["bias"][None]))
        return found

    for depth, (h, z) in zip(depths, first_states(key, x), strict=True):
        assert_rounding(h, at_depth("tailored_relu", depth).phi(z), terms=24 + ELEMENTWISE)
        assert not np.allclose(h, ACTIVATIONS["tailored_relu"](z), atol=1e-3)


@pytest.mark.slow
def test_dropout_on_the_last_layer_leaves_the_others_alone(key, x):
    """States before the read-out are the same under other masks; with all layers dropping they are
    not."""
    for on, same in (("last", True), ("all", False)):
        model = mlp(dropout=0.5, dropout_on=on)
        variables = init(model, key, x)

        @jax.jit
        def outputs(mask_key, variables=variables, model=model):
            h0, links = model.links(variables, x, mask_key)
            network = [apply(model, variables, x, mask_key, train) for train in (True, False)]
            return run(h0, links[:-1]), *network

        (h, train, test), other = outputs(key), outputs(jax.random.key(1, impl="unsafe_rbg"))
        assert bool((h == other[0]).all()) == same
        assert not (train == other[1]).all()
        np.testing.assert_array_equal(test, other[2])


@pytest.mark.slow
def test_every_float_may_be_traced(key, x):
    """A vmap over all floats gives what each of them gives alone."""

    def output(sigma_w, sigma_b, residual_scale, rate):
        floats = {"sigma_w": sigma_w, "sigma_b": sigma_b, "residual_scale": residual_scale}
        shape = {"num_outputs": 10, "depth": 12, "width": 32, "residual": True, "bottleneck": 8}
        model = MLP(**shape, **floats, dropout=rate)
        variables = started(model, key, x)
        return apply(model, variables, x, key), variables["params"]

    values = np.asarray([[1.0, 1.5], [0.0, 0.1], [0.5, 1.0], [0.0, 0.4]], np.float32)
    batched, _ = jax.jit(jax.vmap(output))(*values)
    alone = jax.jit(output)
    for i in range(2):
        wanted, own = alone(*values[:, i])
        # the products of 12 layers, whose branches of two maps are added at a scale of up to 1.5^2
        assert_rounding(batched[i], wanted, terms=roundings(own), size=8 * np.abs(wanted).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"depth": 12}, {"depth": 19, "normalization": "batchnorm", "residual": True}]
)
def test_rematerialised_layers_are_the_same_to_rounding(options, key, x):
    """Also where sqrt(depth) does not divide the depth, running statistics included."""
    plain, remat = (MLP(num_outputs=5, width=16, **options, remat=remat) for remat in (False, True))

    def step(model, variables):
        def loss(params):
            out, changed = model.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            return jnp.sum(out**2), changed

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    @jax.jit
    def both(key):
        variables = started(plain, key, x)
        return variables["params"], step(plain, variables), step(remat, variables)

    params, wanted, found = both(key)
    # forward and back, twice as many roundings
    terms = 2 * roundings(params)
    jax.tree.map(lambda a, b: assert_rounding(a, b, terms=terms), found, wanted)
