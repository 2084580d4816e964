"""Layers, activations, recurrences and untrained leaves of networks of known structure."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers_taps import equinox, filled
from jax import lax

from gradjax import functional, tap
from gradjax.taps.probe import trace
from gradjax.taps.structure import analyse

X = np.ones((5, 6), np.float32)
TOKENS = np.ones((2, 5, 6), np.float32)
SQUARE = np.ones((6, 6), np.float32)


@pytest.fixture(autouse=True)
def _as_frameworks_promote():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def structure(loss, params, *args, has_aux=False):
    traced = trace(loss, params, args, has_aux)
    return analyse(traced.jaxpr, traced.sites, traced.num_params)


def mean_square(h):
    return jnp.mean(jnp.square(h))


def linen(module, x=X):
    """`Structure` of a Linen module, and the key paths of its parameters."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x))
    variables = filled(dict(shapes))
    params = variables.pop("params")
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]

    def loss(p, x):
        out = module.apply({"params": p, **variables}, x, mutable=list(variables))
        return mean_square(out[0])

    return structure(loss, params, x), paths


def fields(layers):
    return [(layer.name, layer.skip, layer.norm, layer.post_norm) for layer in layers]


# The chain


def test_a_branch_that_a_skip_passes_by_is_not_on_the_chain():
    def loss(ws, x):
        for i, w in enumerate(ws):
            branch = tap(jnp.tanh(x @ w), f"branch{i}")
            x = tap(x + branch, f"sum{i}") if i != 1 else tap(branch, f"sum{i}")
        return mean_square(x)

    found = structure(loss, [SQUARE] * 3, X)
    names = [layer.site.name for layer in found.layers]
    assert names == ["sum0", "sum1", "sum2"]
    assert [layer.skip for layer in found.layers][1:] == [False, True]
    assert [layer.leaves for layer in found.layers] == [frozenset({i}) for i in range(3)]
    assert [layer.kernels[0][1:] for layer in found.layers] == [(6, 6)] * 3
    assert {a.on_chain for a in found.activations if a.layer == "sum0"} == {True}


def test_the_sum_of_a_skip_is_on_the_chain_though_no_module_returns_it():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(6, name="embed")(x)
            for i in range(3):
                x = x + nn.Dense(6, name=f"out{i}")(nn.relu(nn.Dense(8, name=f"in{i}")(x)))
            return nn.Dense(2, name="readout")(x)

    found, paths = linen(Net())
    assert fields(found.layers) == [
        ("embed", False, "", False),
        *[(f"out{i}+skip", True, "", False) for i in range(3)],
        ("readout", False, "", False),
    ]
    for i, layer in enumerate(found.layers[1:4]):
        expected = {f"{k}{i}/{p}" for k in ("in", "out") for p in ("kernel", "bias")}
        assert {paths[leaf] for leaf in layer.leaves} == expected
        assert {kernel[1:] for kernel in layer.kernels} == {(6, 8), (8, 6)}
        assert layer.fan_in == 6 and layer.site.shape == (5, 6)
    assert found.untrained == [] and found.recurrences == []


class Block(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        norm = nn.BatchNorm(use_running_average=False) if "batch" in self.kind else nn.LayerNorm()
        if "post" in self.kind:
            return norm(x + nn.Dense(6)(jnp.tanh(nn.Dense(6)(x))))
        if "plain" in self.kind:
            return jnp.tanh(norm(nn.Dense(6)(x)))
        return x + nn.Dense(6)(jnp.tanh(nn.Dense(6)(norm(x))))


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize(
    "kind", ["batch pre", "layer pre", "layer post", "batch plain", "layer plain"]
)
def test_norms_and_where_they_stand(kind, scanned):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(6, name="embed")(x)
            if scanned:
                axes = {"params": 0, "batch_stats": 0}
                options = {"split_rngs": {"params": True}, "length": 3}
                stack = nn.scan(lambda m, x, _: (m(x), None), axes, **options)
                x = stack(Block(kind, name="blocks"), x, None)[0]
            else:
                for i in range(3):
                    x = nn.remat(Block)(kind, name=f"blocks_{i}")(x)
            return nn.Dense(2, name="readout")(x)

    found, paths = linen(Net())
    norm, post, skip = kind.split()[0], "post" in kind, "plain" not in kind
    name = "blocks[{}]" if scanned else "blocks_{}"
    layers = [layer for layer in found.layers if "blocks" in layer.name]
    assert [layer.name for layer in layers] == [name.format(i) for i in range(3)]
    kinds = [(layer.skip, layer.norm, layer.post_norm) for layer in layers]
    assert kinds == [(skip, norm, post)] * 3
    assert [layer.row for layer in layers] == ([0, 1, 2] if scanned else [None] * 3)
    assert found.layers[0].name == "embed" and found.layers[-1].name == "readout"
    assert all("blocks" in paths[leaf] for layer in layers for leaf in layer.leaves)
    assert [a.site.kind for a in found.activations] == ["tanh"] * (1 if scanned else 3)
    assert [a.gates for a in found.activations] == [False] * len(found.activations)


def test_a_scan_in_reverse_has_its_layers_in_the_order_of_the_computation():
    body = lambda h, w: (tap(jnp.tanh(h @ w), "h"), None)
    loss = lambda ws, x: mean_square(lax.scan(body, x, ws, reverse=True)[0])
    found = structure(jax.jit(loss), np.zeros((4, 6, 6), np.float32), X)
    assert [layer.name for layer in found.layers] == ["h[3]", "h[2]", "h[1]", "h[0]"]
    assert found.recurrences == []
    (activation,) = found.activations
    assert activation.site.kind == "tanh" and activation.site.lead == (4,)


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.up = nnx.Linear(6, 8, rngs=rngs)
        self.down = nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(self.norm(x))))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Linear(6, 6, rngs=rngs)
        self.blocks = getattr(nnx, "List", list)([NNXBlock(rngs) for _ in range(2)])
        self.readout = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.readout(x)


class EqxBlock(eqx.Module):
    norm: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.norm, self.up = eqx.nn.LayerNorm(6), eqx.nn.Linear(6, 8, use_bias=False, key=one)
        self.down = eqx.nn.Linear(8, 6, key=two)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(self.norm(x))))


class EqxNet(eqx.Module):
    embed: eqx.nn.Linear
    blocks: list
    readout: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.embed = eqx.nn.Linear(6, 6, key=keys[0])
        self.readout = eqx.nn.Linear(6, 2, key=keys[1])
        self.blocks = [EqxBlock(key) for key in keys[2:]]

    def __call__(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.readout(x)


def plain_net(p, x):
    x = tap(x @ p["embed"], "embed")
    for i, (up, down) in enumerate(p["blocks"]):
        h = x - jnp.mean(x, axis=-1, keepdims=True)
        h = h * lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-6)
        x = tap(x + jnp.tanh(h @ up) @ down, f"blocks[{i}]")
    return mean_square(tap(x @ p["out"], "readout"))


def in_framework(name):
    if name == "nnx":
        model = nnx.eval_shape(lambda: NNXNet(nnx.Rngs(0)))
        loss, params = functional(lambda m, x: mean_square(m(x)), model)
        return structure(loss, filled(params), X)
    if name == "equinox":
        return structure(lambda m, x: mean_square(jax.vmap(m)(x)), equinox(EqxNet), X)
    zeros = lambda *shape: np.zeros(shape, np.float32)
    blocks = [(zeros(6, 8), zeros(8, 6))] * 2
    return structure(plain_net, {"blocks": blocks, "embed": SQUARE, "out": zeros(6, 2)}, X)


@pytest.mark.parametrize("framework", ["nnx", "equinox", "plain"])
def test_one_network_in_other_frameworks(framework):
    found = in_framework(framework)
    blocks = [(f"blocks[{i}]", True, "layer", False) for i in range(2)]
    assert fields(found.layers) == [
        ("embed", False, "", False),
        *blocks,
        ("readout", False, "", False),
    ]
    for layer in found.layers[1:3]:
        assert sorted(kernel[1:] for kernel in layer.kernels) == [(6, 8), (8, 6)]
    sites = [a.site for a in found.activations]
    # examples first, vmap or not
    assert [(site.kind, site.shape) for site in sites] == [("tanh", (5, 8))] * 2
    assert found.untrained == []


# Kernels


def test_fans_of_convolutions_and_embeddings():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(11, 6, name="embed")(tokens)
            x = nn.relu(nn.Conv(4, (3,), name="conv")(x))
            return nn.Dense(2, name="readout")(x.reshape(len(x), -1))

    found, paths = linen(Net(), np.ones((2, 5), np.int32))
    kernels = {layer.name: layer.kernels for layer in found.layers}
    assert list(kernels) == ["embed", "conv", "readout"]
    assert [k[1:] for k in kernels["embed"]] == [(1, 1)]
    assert [k[1:] for k in kernels["conv"]] == [(18, 12)]
    assert [k[1:] for k in kernels["readout"]] == [(20, 2)]
    assert [paths[leaf] for leaf in kernels["conv"][0][0]] == ["conv/kernel"]


def test_unrolled_layers_that_are_slices_of_one_leaf():
    def loss(ws, x):
        for i in range(3):
            x = tap(jnp.tanh(x @ ws[i]), f"h{i}")
        return mean_square(x)

    found = structure(loss, np.zeros((3, 6, 6), np.float32), X)
    assert [layer.name for layer in found.layers] == ["h0", "h1", "h2"]
    assert found.sliced == {0}
    assert structure(loss, [SQUARE] * 3, X).sliced == frozenset()


# Leaves without a path to the loss


def test_untrained_leaves():
    def loss(p, x):
        h = tap(jnp.tanh(x @ p["used"]), "h")
        lost = lax.stop_gradient(x @ p["stopped"])
        index = jnp.argmax(x @ p["argmax"], axis=1)
        dead = x @ p["dead"]
        rounded = jnp.round(x @ p["rounded"])
        del dead
        picked, decay = jnp.sum(jnp.take(h, index)), 0.1 * jnp.sum(p["decayed"] ** 2)
        return mean_square(h + lost + rounded) + picked + decay

    names = ["argmax", "dead", "decayed", "rounded", "stopped", "used"]
    params = {name: SQUARE for name in names}
    untrained = ["argmax", "dead", "rounded", "stopped"]
    found = structure(loss, params, X)
    assert [names[i] for i in found.untrained] == untrained
    grads = jax.jit(jax.grad(loss))(params, X)
    assert [name for name in names if not np.any(grads[name])] == untrained


def test_untrained_leaves_in_scans_and_of_a_cut_layer():
    def loss(p, x):
        def body(h, row):
            w, v = row
            return jnp.tanh(h @ w), jnp.sum(h @ v)

        h, _ = lax.scan(body, tap(lax.stop_gradient(x @ p["before"]), "cut"), (p["w"], p["v"]))
        return mean_square(tap(h, "h"))

    stack = np.zeros((3, 6, 6), np.float32)
    params = {"before": SQUARE, "v": stack, "w": stack}
    found = structure(loss, params, X)
    assert [list(params)[i] for i in found.untrained] == ["before", "v"]


# Activation functions


FUNCTIONS = {
    "relu": jax.nn.relu,
    "relu by hand": lambda h: jnp.maximum(h, 0.0),
    "tanh": jnp.tanh,
    "logistic": jax.nn.sigmoid,
    "erf": lax.erf,
    "hard_tanh": lambda h: lax.clamp(-1.0, h, 1.0),
    "none": jnp.sin,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_activation_functions(name):
    loss = lambda ws, x: mean_square(tap(FUNCTIONS[name](tap(x @ ws[0], "z")) @ ws[1], "out"))
    found = structure(loss, [SQUARE] * 2, X).activations
    kinds = {"none": [], "relu by hand": ["relu"]}.get(name, [name])
    assert [a.site.kind for a in found] == kinds
    if name in ("tanh", "relu"):
        assert found[0].on_chain and not found[0].gates and found[0].layer == "z"


def test_gates_and_the_variance_of_a_norm():
    def loss(ws, x):
        h = tap(x @ ws[0], "h")
        gate = jax.nn.sigmoid(1.0 + x @ ws[1])
        h = jnp.tanh(h) * gate
        var = jnp.maximum(jnp.mean(h * h, axis=-1, keepdims=True), 0.0)
        return mean_square(tap(h / jnp.sqrt(var + 1e-6), "out"))

    found = structure(loss, [SQUARE] * 2, X).activations
    assert {(a.site.kind, a.gates) for a in found} == {("tanh", True), ("logistic", True)}


def test_attention_has_its_logits():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(6, name="embed")(x)
            x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x, x)
            return nn.Dense(3, name="readout")(jax.nn.softmax(x.mean(1)))

    found, _ = linen(Net(), TOKENS)
    logits = [a for a in found.activations if a.site.kind == "softmax"]
    assert [(a.site.shape, a.on_chain) for a in logits] == [((2, 2, 5, 5), False)]
    assert "attention" in logits[0].site.name


# Recurrences


@pytest.mark.parametrize("reverse", [False, True])
def test_a_recurrence_is_one_node_with_sites_for_its_state(reverse):
    def loss(p, xs):
        step = lambda h, x: (tap(jnp.tanh(h @ p["hh"] + x @ p["xh"]), "h"), None)
        h, _ = lax.scan(step, jnp.zeros((2, 4)), jnp.swapaxes(xs, 0, 1), reverse=reverse)
        return mean_square(tap(h @ p["out"], "readout"))

    shapes = {"hh": (4, 4), "out": (4, 3), "xh": (6, 4)}
    params = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    found = structure(loss, params, TOKENS)
    (recurrence,) = found.recurrences
    assert (recurrence.name, recurrence.length) == ("h", 5)
    assert (recurrence.reverse, recurrence.fan_in) == (reverse, 4)
    assert [(site.shape, site.lead) for site in recurrence.sites] == [((2, 4), (5,))]
    assert [layer.name for layer in found.layers] == ["readout"]
    assert found.untrained == []


@pytest.mark.parametrize(
    ("cell", "states"), [(nn.OptimizedLSTMCell, 2), (nn.GRUCell, 1), (nn.SimpleCell, 1)]
)
def test_recurrent_cells_of_linen(cell, states):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.RNN(cell(4, name="cell"), name="rnn")(nn.Dense(6, name="embed")(x))
            return nn.Dense(3, name="readout")(x[:, -1])

    found, paths = linen(Net(), TOKENS)
    (recurrence,) = found.recurrences
    assert (recurrence.length, recurrence.reverse, len(recurrence.sites)) == (5, False, states)
    assert all(site.lead == (5,) and site.shape == (2, 4) for site in recurrence.sites)
    assert found.layers[-1].name == "readout"
    gates = {a.site.kind: a.gates for a in found.activations}
    assert gates.get("logistic", True)
    assert found.untrained == [] and not {paths[i] for i in found.untrained}
