"""A probe of Linen, NNX and Equinox models against perturbations put in by hand."""

import gc

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from test_probe import agree, error, plainly

from gradjax import functional, probe, tap
from gradjax.taps import names

X = jax.random.normal(jax.random.key(7), (5, 4))
SEQUENCES = jax.random.normal(jax.random.key(8), (2, 6, 4))


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
    params = module.init({"params": jax.random.key(0), **rngs}, x)["params"]
    params = jax.tree.map(lambda p: p + 0.1, params)  # biases that are not zero
    return lambda p, x: square(module.apply({"params": p}, x, rngs=rngs)), params


# ---- Linen


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.Dense(3)(x)
        return x + nn.Dense(4)(jnp.tanh(h))


def block(at, p, x, name):
    h = at(jnp.tanh(at(dense(p["Dense_0"], x), f"{name}/Dense_0")) @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"],
           f"{name}/Dense_1")  # fmt: skip
    return at(x + h, name)


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
    agree(probe(loss, params, X), plainly(by_hand, params, X), report)
    called = jax.jit(loss)
    called(params, X)
    agree(probe(called, params, X), plainly(by_hand, params, X), report)


class Stack(nn.Module):
    remat: bool
    reverse: bool

    @nn.compact
    def __call__(self, x):
        body = nn.remat(Block, prevent_cse=False) if self.remat else Block
        stack = nn.scan(
            lambda m, x, _: (m(x), None),
            {"params": 0},
            split_rngs={"params": True},
            length=3,
            reverse=self.reverse,
        )
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
    agree(probe(jax.jit(loss), params, X), plainly(by_hand, params, X), report)


@pytest.mark.slow
def test_linen_vmap_has_the_mapped_axis_first(report):
    class Heads(nn.Module):
        @nn.compact
        def __call__(self, x):
            heads = nn.vmap(
                nn.Dense,
                {"params": 0},
                split_rngs={"params": True},
                in_axes=None,
                out_axes=2,
                axis_size=3,
            )
            return heads(4, name="heads")(x)

    def by_hand(at, p, x):
        each = jnp.stack(
            [x @ w + b for w, b in zip(p["heads"]["kernel"], p["heads"]["bias"], strict=True)]
        )
        return square(at(jnp.moveaxis(at(each, "heads"), 0, 2), "Heads"))

    loss, params = linen(Heads())
    agree(probe(loss, params, X), plainly(by_hand, params, X), report)


@pytest.mark.slow
def test_linen_lstm_has_every_output_of_its_cell(report):
    module = nn.RNN(nn.OptimizedLSTMCell(3), name="rnn")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        loss, params = linen(module, SEQUENCES)
        found = probe(loss, params, SEQUENCES)
        cell = params["cell"]

        def by_hand(at, p, x):
            c = h = jnp.zeros((2, 3))
            out = []
            for t in range(6):
                gate = lambda k, t=t, h=h: (
                    x[:, t] @ p[f"i{k}"]["kernel"] + h @ p[f"h{k}"]["kernel"] + p[f"h{k}"]["bias"]
                )
                i, f, g, o = (gate(k) for k in "ifgo")
                c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
                h = jax.nn.sigmoid(o) * jnp.tanh(c)
                c, h, y = at(c, f"c{t}"), at(h, f"h{t}"), at(h, f"y{t}")
                out.append(y)
            return square(at(jnp.stack(out, 1), "out"))

        loss, values, cotangents, grads = plainly(by_hand, cell, SEQUENCES)
    outputs = {"c": "cell[0][0]", "h": "cell[0][1]", "y": "cell[1]"}
    assert set(outputs.values()) < set(found.values)
    # the cell's third output is its second, so that their cotangents add up before both
    assert error(found.loss, loss) < 1e-6
    for key in "chy":
        for t in range(6):
            assert error(found.values[outputs[key]][t], values[f"{key}{t}"]) < 1e-5
            if key != "h":
                assert error(found.cotangents[outputs[key]][t], cotangents[f"{key}{t}"]) < 1e-5
    assert (
        error(found.cotangents["RNN" if "RNN" in found.values else "rnn"], cotangents["out"]) < 1e-5
    )
    report(
        "probe against perturbations by hand",
        max(jax.tree.leaves(jax.tree.map(error, found.grads["cell"], grads))),
    )


@pytest.mark.slow
def test_linen_batchnorm_and_dropout(report):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False, momentum=0.9, name="norm")(
                nn.Dense(3, use_bias=False, name="dense")(x)
            )
            return nn.Dropout(0.5, deterministic=False, name="drop")(x)

    model, key = Net(), jax.random.key(2)
    variables = model.init({"params": key, "dropout": key}, X)

    def loss(p, x, stats, key):
        out, new = model.apply(
            {"params": p, "batch_stats": stats}, x, mutable=["batch_stats"], rngs={"dropout": key}
        )
        return square(out), new["batch_stats"]

    params, stats = variables["params"], variables["batch_stats"]
    found = probe(loss, params, X, stats, key, has_aux=True)
    kept = jnp.float32(found.values["drop"] != 0)

    def by_hand(at, p, x):
        h = at(x @ p["dense"]["kernel"], "dense")
        h = (h - h.mean(0)[None]) / jnp.sqrt(jnp.mean(jnp.square(h - h.mean(0)[None]), 0) + 1e-5)[
            None
        ]
        h = at(h * p["norm"]["scale"][None] + p["norm"]["bias"][None], "norm")
        return square(at(at(h * kept * 2, "drop"), "Net"))

    agree(found, plainly(by_hand, params, X), report, 2e-5)
    mean = 0.1 * (X @ params["dense"]["kernel"]).mean(0)
    assert error(found.aux["norm"]["mean"], mean) < 1e-5
    with pytest.raises(ValueError, match=r"changes its state.*mutable=.*has_aux"):
        probe(
            lambda p: square(
                model.apply({"params": p, "batch_stats": stats}, X, rngs={"dropout": key})
            ),
            params,
        )


# ---- NNX


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


def net(at, p, x, kept):
    for i in range(2):
        h = at(
            x @ of(p["layers"][i]["linear"]["kernel"]) + of(p["layers"][i]["linear"]["bias"]),
            f"layers_{i}.linear",
        )
        x = at(jnp.tanh(h), f"layers_{i}")
    h = (x - x.mean(0)[None]) / jnp.sqrt(jnp.mean(jnp.square(x - x.mean(0)[None]), 0) + 1e-5)[None]
    h = at(h * of(p["norm"]["scale"])[None] + of(p["norm"]["bias"])[None], "norm")
    h = at(h * kept * 2, "drop")
    return square(
        at(at(h @ of(p["table"]["out"]["kernel"]) + of(p["table"]["out"]["bias"]), "out"), "Net")
    )


def plain_names(found):
    """Names in which no bracket means a row, as `rows_of` wants them."""
    rename = lambda name: (
        name.replace("table.out", "out")
        .replace("table['out']", "out")
        .replace("[", "_")
        .replace("]", "")
    )
    move = lambda tree: {rename(name): x for name, x in tree.items()}
    return found._replace(values=move(found.values), cotangents=move(found.cotangents))


@pytest.mark.slow
@pytest.mark.parametrize("jitted", [False, True])
def test_nnx_modules_by_their_attributes(jitted, report):
    model = Net(nnx.Rngs(0))
    loss = lambda model, x: square(model(x))
    loss = nnx.jit(loss) if jitted else loss
    pure, params = functional(loss, model)
    before = nnx.state(model)
    found = plain_names(probe(pure, params, X))
    kept = jnp.float32(found.values["drop"] != 0)
    assert 0 < kept.mean() < 1
    by_hand = lambda at, p, x: net(at, p, x, kept)
    loss_, values, cotangents, grads = plainly(by_hand, params, X)
    agree(found, (loss_, values, cotangents, grads), report, 2e-5)
    jax.tree.map(
        np.testing.assert_array_equal, strip(before), strip(nnx.state(model))
    )  # the model is as it was
    again = plain_names(probe(loss, model, X))  # the model in the place of params
    np.testing.assert_array_equal(again.cotangents["norm"], found.cotangents["norm"])


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

    loss, params = functional(lambda model, x: square(model(x)), Stack(nnx.Rngs(0)))
    found = probe(loss, params, X)
    kernel, bias = of(params["layers"]["linear"]["kernel"]), of(params["layers"]["linear"]["bias"])

    def by_hand(at, p, x):
        for i in range(3):
            x = at(jnp.tanh(at(x @ p[0][i] + p[1][i], f"linear[{i}]")), f"layer[{i}]")
        return square(at(x, "Stack"))

    loss_, values, cotangents, grads = plainly(by_hand, (kernel, bias), X)
    moved = {"Stack": "Stack", "Stack.Layer.linear": "linear", "Stack.Layer": "layer"}
    pick = lambda tree: {moved.get(name) or moved["Stack." + name]: x for name, x in tree.items()}
    rest = found.grads["layers"]["linear"]
    found = found._replace(
        values=pick(found.values),
        cotangents=pick(found.cotangents),
        grads=(of(rest["kernel"]), of(rest["bias"])),
    )
    agree(found, (loss_, values, cotangents, grads), report)


# ---- Equinox


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


@pytest.mark.parametrize("jitted", [False, True])
def test_equinox_modules_under_vmap(jitted, report):
    model = Model(jax.random.key(0))
    loss = lambda model, x: square(jax.vmap(model)(x))
    loss = eqx.filter_jit(loss) if jitted else loss
    loss(model, X)
    pure, params = functional(loss, model)
    found = plain_names(probe(pure, params, X))
    agree(found, plainly(model_by_hand, params, X), report)
    assert found.values["out"].shape == (
        5,
        3,
    )  # weight @ x: vmap leaves the examples last, a probe puts them first
    np.testing.assert_array_equal(probe(loss, model, X).grads.out.weight, found.grads.out.weight)


def test_equinox_scan_over_stacked_layers(report):
    make = lambda key: Part(eqx.nn.Linear(4, 4, key=key), jnp.tanh)

    class Stack(eqx.Module):
        layers: Part

        def __call__(self, x):
            arrays, static = eqx.partition(self.layers, eqx.is_array)
            return lax.scan(lambda x, layer: (eqx.combine(layer, static)(x), None), x, arrays)[0]

    model = Stack(eqx.filter_vmap(make)(jax.random.split(jax.random.key(0), 3)))

    def by_hand(at, p, x):
        for i in range(3):
            h = at(
                x @ p.layers.linear.weight[i].T + p.layers.linear.bias[i][None], f"Part.linear[{i}]"
            )
            x = at(jnp.tanh(h), f"Part[{i}]")
        return square(at(x, "Stack"))

    loss, params = functional(lambda model, x: square(jax.vmap(model)(x)), model)
    found = probe(loss, params, X)
    agree(found, plainly(by_hand, params, X), report)


# ---- nothing left behind


def test_classes_are_as_they_were_even_when_the_loss_fails():
    model, nnx_model = Model(jax.random.key(0)), Layer(nnx.Rngs(0))
    classes = [Model, Part, eqx.nn.Linear, Layer, nnx.Linear]
    before = [cls.__dict__.get("__call__") for cls in classes]

    def fails(model, x):
        jax.vmap(model)(x)
        raise RuntimeError("of the user")

    for each in (model, nnx_model):
        with pytest.raises(RuntimeError, match="of the user"):
            probe(fails, each, X)
        probe(lambda m, x: square(jax.vmap(m)(x)), each, X)
    assert [cls.__dict__.get("__call__") for cls in classes] == before
    assert names._known is None and not names._wrapped and not names._stack
    loss, params = functional(lambda m, x: square(jax.vmap(m)(x)), model)
    jitted = eqx.filter_jit(loss)
    probe(jitted, params, X)
    assert "gradjax" not in str(jax.make_jaxpr(lambda p, x: jitted(p, x))(params, X))
    gc.collect()


def test_linen_leaves_no_names_in_a_jitted_function():
    loss, params = linen(Block())
    jitted = jax.jit(loss)
    probe(jitted, params, X)
    assert "gradjax" not in str(jax.make_jaxpr(jitted)(params, X))
    with pytest.raises(RuntimeError, match="of the user"):
        probe(lambda p: 1 / 0 if loss(p, X) is None else raising(), params)
    assert "gradjax" not in str(jax.make_jaxpr(loss)(params, X))


def raising():
    raise RuntimeError("of the user")


def test_functional_takes_models_alone():
    with pytest.raises(ValueError, match=r"model is Dense.*need no wrapping"):
        functional(lambda m, x: m(x), nn.Dense(3))
