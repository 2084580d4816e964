"""A probe of Linen, NNX and Equinox models against perturbations put in by hand."""

import gc

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers_taps import ROUNDINGS, agree, at_once, equinox, filled, plainly
from jax import lax

from bounds import assert_rounding
from gradjax import functional, probe, tap
from gradjax.taps import names
from gradjax.taps.probe import trace

X = np.random.default_rng(7).standard_normal((5, 4), dtype=np.float32)
SEQUENCES = np.random.default_rng(8).standard_normal((2, 6, 4), dtype=np.float32)


@pytest.fixture(autouse=True)
def _as_frameworks_promote():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def square(h):
    return jnp.mean(jnp.square(h)) + jnp.sum(h[0])


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def linen(module, x=X, **rngs):
    """(loss, params) of a Linen module."""
    init = lambda: module.init({"params": jax.random.key(0), **rngs}, x)["params"]
    params = filled(jax.eval_shape(init))
    return lambda p, x: square(module.apply({"params": p}, x, rngs=rngs)), params


# Linen


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.Dense(3)(x)
        return x + nn.Dense(4)(jnp.tanh(h))


def block(at, p, x, name):
    h = jnp.tanh(at(dense(p["Dense_0"], x), f"{name}/Dense_0"))
    return at(x + at(dense(p["Dense_1"], h), f"{name}/Dense_1"), name)


class Compact(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.remat(Block)(name="first")(x)
        shared = nn.Dense(4, name="shared")
        x = tap(jnp.sin(shared(jnp.tanh(shared(x)))), "between")
        return nn.jit(Block)(name="last")(x)


def compact(at, p, x):
    x = block(at, p["first"], x, "first")
    x = at(dense(p["shared"], jnp.tanh(at(dense(p["shared"], x), "shared"))), "shared#1")
    return square(at(block(at, p["last"], at(jnp.sin(x), "between"), "last"), "Compact"))


class Setup(nn.Module):
    def setup(self):
        self.blocks = [Block() for _ in range(2)]
        self.out = nn.Dense(2)

    def encode(self, x):
        for each in self.blocks:
            x = each(x)
        return x

    def __call__(self, x):
        return self.out(self.encode(x))


def setup(at, p, x):
    for i in range(2):
        x = block(at, p[f"blocks_{i}"], x, f"blocks_{i}")
    return square(at(at(dense(p["out"], at(x, "Setup.encode")), "out"), "Setup"))


@pytest.mark.slow
@pytest.mark.parametrize(("module", "by_hand"), [(Compact(), compact), (Setup(), setup)])
def test_linen_modules_by_their_paths(module, by_hand, report):
    loss, params = linen(module)
    called = jax.jit(loss)
    called(params, X)
    expected = plainly(by_hand, params, X)
    for each in (loss, called):
        agree(at_once(each, params, X), expected, report)


class Stack(nn.Module):
    remat: bool
    reverse: bool

    @nn.compact
    def __call__(self, x):
        body = nn.remat(Block, prevent_cse=False) if self.remat else Block
        options = {"split_rngs": {"params": True}, "length": 3, "reverse": self.reverse}
        stack = nn.scan(lambda m, x, _: (m(x), None), {"params": 0}, **options)
        return stack(body(name="layers"), x, None)[0]


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_linen_scan_has_rows(remat, reverse, report):
    def by_hand(at, p, x):
        for i in range(3)[:: -1 if reverse else 1]:
            part = jax.tree.map(lambda w, i=i: w[i], p["layers"])
            x = block(lambda h, name, i=i: at(h, f"{name}[{i}]"), part, x, "layers")
        return square(at(x, "Stack"))

    loss, params = linen(Stack(remat, reverse))
    agree(at_once(jax.jit(loss), params, X), plainly(by_hand, params, X), report)


@pytest.mark.slow
def test_linen_vmap_has_the_mapped_axis_first(report):
    class Heads(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"in_axes": None, "out_axes": 2, "axis_size": 3}
            heads = nn.vmap(nn.Dense, {"params": 0}, split_rngs={"params": True}, **axes)
            return heads(4, name="heads")(x)

    def by_hand(at, p, x):
        pairs = zip(p["heads"]["kernel"], p["heads"]["bias"], strict=True)
        each = jnp.stack([x @ w + b for w, b in pairs])
        return square(at(jnp.moveaxis(at(each, "heads"), 0, 2), "Heads"))

    loss, params = linen(Heads())
    agree(at_once(loss, params, X), plainly(by_hand, params, X), report)


@pytest.mark.slow
def test_linen_lstm_has_every_output_of_its_cell():
    loss, params = linen(nn.RNN(nn.OptimizedLSTMCell(3), name="rnn"), SEQUENCES)
    found = at_once(loss, params, SEQUENCES)

    def by_hand(at, p, x):
        c = h = jnp.zeros((2, 3))
        out = []
        for t in range(6):
            gate = lambda k, t=t, h=h: dense(p[f"h{k}"], h) + x[:, t] @ p[f"i{k}"]["kernel"]
            i, f, g, o = (gate(k) for k in "ifgo")
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            c, h, y = at(c, f"c{t}"), at(h, f"h{t}"), at(h, f"y{t}")
            out.append(y)
        return square(at(jnp.stack(out, 1), "out"))

    loss, values, cotangents, grads = plainly(by_hand, params["cell"], SEQUENCES)
    outputs = {"c": "cell[0][0]", "h": "cell[0][1]", "y": "cell[1]"}
    assert set(outputs.values()) < set(found.values)
    same = lambda a, b: assert_rounding(a, b, terms=2 * ROUNDINGS)
    same(found.loss, loss)
    for key, name in outputs.items():
        for t in range(6):
            same(found.values[name][t], values[f"{key}{t}"])
            # The cell's third output is its second: their cotangents add up before both.
            if key != "h":
                same(found.cotangents[name][t], cotangents[f"{key}{t}"])
    same(found.cotangents["RNN" if "RNN" in found.values else "rnn"], cotangents["out"])
    jax.tree.map(same, found.grads["cell"], grads)


@pytest.mark.slow
def test_linen_batchnorm_and_dropout(report):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(3, use_bias=False, name="dense")(x)
            x = nn.BatchNorm(use_running_average=False, momentum=0.9, name="norm")(x)
            return nn.Dropout(0.5, deterministic=False, name="drop")(x)

    model, key = Net(), jax.random.key(2)
    shapes = jax.eval_shape(lambda: model.init({"params": key, "dropout": key}, X))
    params, stats = filled(shapes["params"]), jax.tree.map(jnp.zeros_like, shapes["batch_stats"])

    def loss(p, x, stats, key):
        variables = {"params": p, "batch_stats": stats}
        out, new = model.apply(variables, x, mutable=["batch_stats"], rngs={"dropout": key})
        return square(out), new["batch_stats"]

    found = at_once(loss, params, X, stats, key, has_aux=True)
    kept = np.float32(np.asarray(found.values["drop"]) != 0)

    def by_hand(at, p, x):
        h = normalised(at(x @ p["dense"]["kernel"], "dense"))
        h = at(h * p["norm"]["scale"][None] + p["norm"]["bias"][None], "norm")
        return square(at(at(h * kept * 2, "drop"), "Net"))

    agree(found, plainly(by_hand, params, X), report)
    mean = 0.1 * np.mean(X @ np.asarray(params["dense"]["kernel"]), axis=0)
    assert_rounding(found.aux["norm"]["mean"], mean, terms=12, size=1.0)
    with pytest.raises(ValueError, match=r"changes its state.*mutable=.*has_aux"):
        variables = {"batch_stats": stats}
        rngs = {"dropout": key}
        probe(lambda p: square(model.apply({"params": p, **variables}, X, rngs=rngs)), params)


def normalised(h):
    centred = h - h.mean(0)[None]
    return centred / jnp.sqrt(jnp.mean(jnp.square(centred), 0) + 1e-5)[None]


# NNX


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.linear(x))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = getattr(nnx, "List", list)([Layer(rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.table = getattr(nnx, "Dict", dict)(out=nnx.Linear(4, 3, rngs=rngs))
        self.parent = self  # NNX allows circles

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.table["out"](self.drop(self.norm(x)))


def of(variable):
    """The array of a variable in any Flax."""
    return jax.tree.leaves(variable)[0]


def linear(p, x):
    return x @ of(p["kernel"]) + of(p["bias"])


def net(at, p, x, kept):
    for i in range(2):
        h = at(linear(p["layers"][i]["linear"], x), f"layers_{i}.linear")
        x = at(jnp.tanh(h), f"layers_{i}")
    h = at(normalised(x) * of(p["norm"]["scale"])[None] + of(p["norm"]["bias"])[None], "norm")
    h = at(h * kept * 2, "drop")
    return square(at(at(linear(p["table"]["out"], h), "out"), "Net"))


def plain_names(found):
    """Names in which no bracket means a row, as `rows_of` wants them."""

    def rename(name):
        name = name.replace("table.out", "out").replace("table['out']", "out")
        return name.replace("[", "_").replace("]", "")

    move = lambda tree: {rename(name): x for name, x in tree.items()}
    return found._replace(values=move(found.values), cotangents=move(found.cotangents))


@pytest.mark.slow
@pytest.mark.parametrize("jitted", [False, True])
def test_nnx_modules_by_their_attributes(jitted, report):
    model = Net(nnx.Rngs(0))
    loss = lambda model, x: square(model(x))
    loss = nnx.jit(loss) if jitted else loss
    pure, params = functional(loss, model)
    before = strip(nnx.state(model))
    found = plain_names(at_once(pure, params, X))
    kept = np.float32(np.asarray(found.values["drop"]) != 0)
    assert 0 < kept.mean() < 1
    by_hand = lambda at, p, x: net(at, p, x, kept)
    agree(found, plainly(by_hand, params, X), report)
    # The model in the place of params; and it is as it was.
    again = plain_names(probe(loss, model, X))
    assert_rounding(again.cotangents["norm"], found.cotangents["norm"], terms=ROUNDINGS)
    jax.tree.map(np.testing.assert_array_equal, before, strip(nnx.state(model)))


def strip(state):
    """Arrays of a state, keys as numbers."""
    number = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return [np.asarray(number(jnp.asarray(x))) for x in jax.tree.leaves(state)]


def test_nnx_stacks_have_rows(report):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs):
        return Layer(rngs)

    class Stack(nnx.Module):
        def __init__(self, rngs):
            self.layers = make(rngs)

        def __call__(self, x):
            run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return run(x, self.layers)

    model = nnx.eval_shape(lambda: Stack(nnx.Rngs(0)))
    loss, params = functional(lambda model, x: square(model(x)), model)
    params = filled(params)
    found = at_once(loss, params, X)
    kernel, bias = of(params["layers"]["linear"]["kernel"]), of(params["layers"]["linear"]["bias"])

    def by_hand(at, p, x):
        for i in range(3):
            x = at(jnp.tanh(at(x @ p[0][i] + p[1][i], f"linear[{i}]")), f"layer[{i}]")
        return square(at(x, "Stack"))

    moved = {"Stack": "Stack", "Stack.Layer.linear": "linear", "Stack.Layer": "layer"}
    pick = lambda tree: {moved.get(name) or moved["Stack." + name]: x for name, x in tree.items()}
    rest = found.grads["layers"]["linear"]
    grads = of(rest["kernel"]), of(rest["bias"])
    values, cotangents = pick(found.values), pick(found.cotangents)
    found = found._replace(values=values, cotangents=cotangents, grads=grads)
    agree(found, plainly(by_hand, (kernel, bias), X), report)


# Equinox


class Part(eqx.Module):
    linear: eqx.nn.Linear
    act: object = eqx.field(static=True)

    def __call__(self, x):
        return self.act(self.linear(x))


class Model(eqx.Module):
    parts: list
    out: eqx.nn.Linear
    depth: int

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.parts = [Part(eqx.nn.Linear(4, 4, key=k), jnp.tanh) for k in keys[:2]]
        self.out = eqx.nn.Linear(4, 3, use_bias=False, key=keys[2])
        self.depth = 2

    def __call__(self, x):
        for part in self.parts:
            x = part(x)
        return self.out(x)


def model_by_hand(at, p, x):
    for i, part in enumerate(p.parts):
        h = at(x @ part.linear.weight.T + part.linear.bias[None], f"parts_{i}.linear")
        x = at(jnp.tanh(h), f"parts_{i}")
    return square(at(at(x @ p.out.weight.T, "out"), "Model"))


def test_equinox_modules_under_vmap(report):
    model = equinox(Model)
    loss = lambda model, x: square(jax.vmap(model)(x))
    jitted = eqx.filter_jit(loss)
    jitted(model, jnp.asarray(X))
    pure, params = functional(loss, model)
    other, _ = functional(jitted, model)
    whole = jax.jit(lambda p, x: [probe(pure, p, x), probe(other, p, x), probe(jitted, model, x)])
    found = [plain_names(each) for each in whole(params, X)]
    expected = plainly(model_by_hand, params, X)
    for each in found:
        agree(each, expected, report)
        # weight @ x: vmap leaves the examples last, a probe puts them first
        assert each.values["out"].shape == (5, 3)


def test_equinox_scan_over_stacked_layers(report):
    make = lambda key: Part(eqx.nn.Linear(4, 4, key=key), jnp.tanh)

    class Stack(eqx.Module):
        layers: Part

        def __call__(self, x):
            arrays, static = eqx.partition(self.layers, eqx.is_array)
            return lax.scan(lambda x, layer: (eqx.combine(layer, static)(x), None), x, arrays)[0]

    model = equinox(lambda key: Stack(eqx.filter_vmap(make)(jax.random.split(key, 3))))

    def by_hand(at, p, x):
        for i in range(3):
            weight, bias = p.layers.linear.weight[i], p.layers.linear.bias[i]
            h = at(x @ weight.T + bias[None], f"Part.linear[{i}]")
            x = at(jnp.tanh(h), f"Part[{i}]")
        return square(at(x, "Stack"))

    loss, params = functional(lambda model, x: square(jax.vmap(model)(x)), model)
    agree(at_once(loss, params, X), plainly(by_hand, params, X), report)


# Nothing left behind


def test_classes_are_as_they_were_even_when_the_loss_fails():
    model, nnx_model = equinox(Model), Layer(nnx.Rngs(0))
    classes = [Model, Part, eqx.nn.Linear, Layer, nnx.Linear]
    before = [cls.__dict__.get("__call__") for cls in classes]

    def fails(model, x):
        jax.vmap(model)(x)
        raise RuntimeError("of the user")

    for each in (model, nnx_model):
        with pytest.raises(RuntimeError, match="of the user"):
            probe(fails, each, X)
        trace(lambda m, x: square(jax.vmap(m)(x)), each, (X,), False)
    assert [cls.__dict__.get("__call__") for cls in classes] == before
    assert names._known is None and not names._wrapped and not names._stack
    loss, params = functional(lambda m, x: square(jax.vmap(m)(x)), model)
    jitted = eqx.filter_jit(loss)
    at_once(jitted, params, X)
    assert "gradjax" not in str(jax.make_jaxpr(lambda p, x: jitted(p, x))(params, X))
    gc.collect()


def test_linen_leaves_no_names_in_a_jitted_function():
    loss, params = linen(Block())
    jitted = jax.jit(loss)
    trace(jitted, params, (X,), False)
    assert "gradjax" not in str(jax.make_jaxpr(jitted)(params, X))
    with pytest.raises(RuntimeError, match="of the user"):
        probe(lambda p: raising(loss(p, X)), params)
    assert "gradjax" not in str(jax.make_jaxpr(loss)(params, X))


def raising(_):
    raise RuntimeError("of the user")


def test_functional_takes_models_alone():
    with pytest.raises(ValueError, match=r"model is Dense.*need no wrapping"):
        functional(lambda m, x: m(x), nn.Dense(3))
