"""The user's line of an equation, in plain code and inside of libraries."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from gradjax import find_nonfinite
from gradjax.replay import source
from gradjax.replay.source import Line, marked


def culprit(loss, params, *args):
    return find_nonfinite(loss, params, *args).culprit


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.Dense(3, name="first")(x)
        return nn.Dense(3, name="second")(jnp.log(h * 0))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return jnp.log(self.inner(x) * 0)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([NnxBlock(rngs), NnxBlock(rngs)])

    def __call__(self, x):
        return self.blocks[1](x)


class EquinoxModel(eqx.Module):
    layers: list

    def __call__(self, x):
        return jnp.log(self.layers[0](x) * 0)


X = jnp.ones(3)
LINEN = LinenBlock()


@pytest.mark.parametrize(
    ("loss", "params", "module"),
    [
        (lambda p, x: jnp.sum(LINEN.apply(p, x)), LINEN.init(jax.random.key(0), X), ""),
        (lambda m, x: jnp.sum(m(x)), NnxModel(nnx.Rngs(0)), "blocks[1]"),
        (
            lambda m, x: jnp.sum(m(x)),
            EquinoxModel([eqx.nn.Linear(3, 3, key=jax.random.key(0))]),
            "",
        ),
    ],
    ids=["linen", "nnx", "equinox"],
)
def test_the_line_stands_in_the_users_module(loss, params, module):
    found = culprit(loss, params, X)
    assert found.line.file == __file__ and found.line.function == "__call__"
    assert "jnp.log(" in found.line.text and module in found.module
    assert found.callers[-1].function == "<lambda>"


def test_an_operation_inside_a_layer_of_a_library_names_the_layer_and_the_call():
    def loss(p, x):
        return jnp.sum(LINEN.apply(p, x))

    params = LINEN.init(jax.random.key(0), X)
    kernel = jnp.full((3, 3), 3e38)
    params = {"params": params["params"] | {"first": {"kernel": kernel, "bias": jnp.zeros(3)}}}
    found = culprit(loss, params, X)
    assert (found.primitive, found.module) == ("dot_general", "first")
    assert found.line.text.strip() == 'h = nn.Dense(3, name="first")(x)'


def test_a_named_scope_is_the_path_in_plain_code():
    def loss(w):
        with jax.named_scope("encoder"), jax.named_scope("block"):
            return jnp.log(w * 0)

    assert culprit(loss, jnp.float32(1.0)).module == "encoder/block"


def test_an_expression_over_several_lines_is_marked_to_the_end_of_the_first():
    def loss(w):
        return jnp.sum(
            jnp.log(w * 0),
            where=jnp.array(
                # two lines
                [True],
            ),
        )

    found = culprit(lambda w: loss(w), jnp.ones(1))
    assert marked(found.line).count("^") == len("jnp.log(w * 0)")
    spread = found.line._replace(line=found.line.line - 1, end_line=found.line.line + 5, column=15)
    text = marked(spread).splitlines()
    assert text[1].endswith("return jnp.sum(") and text[2].endswith("^^^^^^^^")


def test_code_without_source_has_a_line_and_no_text():
    space: dict = {"jnp": jnp}
    exec(compile("def loss(w):\n    return jnp.log(w * 0)", "<cell 3>", "exec"), space)
    found = culprit(space["loss"], jnp.float32(1.0))
    assert str(found.line) == "<cell 3>:2" and marked(found.line) == ""
    assert "<cell 3>:2, in loss" in str(found)


def test_columns_are_those_of_characters(tmp_path):
    file = tmp_path / "model.py"
    file.write_text("def loss(w, jnp):\n    ü = jnp.log(w * 0)\n    return ü\n", "utf-8")
    space: dict = {}
    exec(compile(file.read_text("utf-8"), str(file), "exec"), space)
    text = marked(culprit(lambda w: space["loss"](w, jnp), jnp.float32(1.0)).line).splitlines()
    start = text[2].index("^")
    assert text[1][start : start + text[2].count("^")] == "jnp.log(w * 0)"


def test_no_source_at_all_gives_nothing():
    assert marked(Line("/nowhere/at/all.py", 3, 3, 0, 4, "f")) == ""


def test_what_is_kept_of_calls_is_bounded(monkeypatch):
    monkeypatch.setattr(source, "_MOST_CALLS", 3)

    def loss(w):
        for _ in range(5):
            w = jax.nn.relu(w)
        return jnp.log(w * 0)

    for _ in range(2):
        assert culprit(loss, jnp.float32(1.0)).line.text.strip() == "return jnp.log(w * 0)"
    assert len(source._calls) <= 3
