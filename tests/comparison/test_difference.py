"""Two implementations of one model: where they part, and that equal ones do not."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gradjax
from gradjax import difference, tap

WIDTH = 12
KEYS = jax.random.split(jax.random.key(0), 12)
X = jax.random.normal(KEYS[0], (2, 5, WIDTH))
PARAMS = {
    "w": jax.random.normal(KEYS[1], (WIDTH, WIDTH)) / 3,
    "b": jax.random.normal(KEYS[2], (1, 1, WIDTH)),
    "out": jax.random.normal(KEYS[3], (WIDTH, WIDTH)) / 3,
}


def normalized(h, eps=1e-5, root=jnp.sqrt, axis=-1):
    mean = h.mean(axis, keepdims=True)
    variance = jnp.square(h - mean).mean(axis, keepdims=True)
    return (h - mean) / root(variance + eps)


def normalized_otherwise(h):
    mean = h.mean(-1, keepdims=True)
    variance = jnp.square(h).mean(-1, keepdims=True) - jnp.square(mean)
    return h * jax.lax.rsqrt(variance + 1e-5) - mean * jax.lax.rsqrt(variance + 1e-5)


def dense(x, w, b):
    return x @ w + b


def model(dense=dense, norm=normalized, scale=0.5, hold=None):
    def loss(p, x):
        h = tap(jnp.tanh(dense(x, p["w"], p["b"])), "hidden")
        h = tap(norm(h), "norm")
        if hold is not None:
            h = hold(h)
        h = tap(scale * h, "scaled")
        return jnp.mean(jnp.square(tap(h @ p["out"], "out")))

    return loss


def line_of(function, text):
    """The number of the line of a function's source that holds a text."""
    import inspect

    source, start = inspect.getsourcelines(function)
    return next(start + i for i, line in enumerate(source) if text in line)


def check(found, kind, name, a=None, b=None):
    assert found.first is not None, str(found)
    assert (found.first.kind, found.first.name_a) == (kind, name), str(found)
    if a is not None:
        assert found.first.primitive_a == a, str(found)
    if b is not None:
        assert found.first.primitive_b == b, str(found)


def test_bit_equal_programs_differ_nowhere():
    found = difference(model(), PARAMS, model(), PARAMS, X)
    assert not found
    assert "equal bit for bit" in str(found)
    assert "4 named values, 4 cotangents, 3 gradients" in str(found)


def test_other_order_of_operations_is_rounding():
    found = difference(model(), PARAMS, model(norm=normalized_otherwise), PARAMS, X)
    assert found.first is None, str(found)
    assert "equal within rounding" in str(found)
    norm = found.rows[1]
    assert 0 < norm.ulps < norm.limit < 200


def test_long_sums_in_another_order_are_rounding():
    x = jax.random.normal(KEYS[4], (3, 4096))

    def loss(w, x):
        return jnp.sum(tap((x * w[None]).sum(-1), "sum") ** 2)

    def blocks(w, x):
        return jnp.sum(tap((x * w[None]).reshape(3, 64, 64).sum(1)[:, ::-1].sum(-1), "sum") ** 2)

    found = difference(loss, jnp.ones(4096), blocks, jnp.ones(4096), x)
    assert found.first is None, str(found)


@pytest.mark.parametrize(
    ("options", "name", "a", "b", "text"),
    [
        ({"norm": lambda h: normalized(h, eps=1e-6)}, "norm", "add", "add", "variance + eps"),
        ({"norm": lambda h: normalized(h, root=lambda v: v)}, "norm", "sqrt", "div", "root("),
        ({"norm": lambda h: normalized(h, axis=0)}, "norm", "reduce_sum", "reduce_sum", "h.mean("),
    ],
    ids=["eps", "missing root", "wrong axis"],
)
def test_normalization(options, name, a, b, text):
    found = difference(model(), PARAMS, model(**options), PARAMS, X)
    check(found, "value", name, a, b)
    assert found.first.line_a.line == line_of(normalized, text)
    assert found.first.line_b.function == "normalized"
    assert text in str(found)


def test_eps_that_rounding_hides_is_found_by_its_operation():
    def wide(eps):
        return model(norm=lambda h: normalized(4.0 * h, eps=eps))

    found = difference(wide(1e-5), PARAMS, wide(4e-6), PARAMS, X)
    check(found, "value", "norm", "add", "add")
    assert "1e-05 in a, 4e-06 in b" in found.first.words
    # a constant that is rounded otherwise
    scale = float(np.nextafter(np.float32(0.7), np.float32(1)))
    assert not difference(model(scale=0.7), PARAMS, model(scale=scale), PARAMS, X)


def test_operands_that_differ_are_in_the_words():
    found = difference(model(), PARAMS, model(scale=4.0), PARAMS, X)
    check(found, "value", "scaled", "mul", "mul")
    assert "0.5 in a, 4 in b" in found.first.words
    assert found.first.ratio == pytest.approx(1 / 8)


def test_transposed_weight():
    found = difference(model(), PARAMS, model(lambda x, w, b: x @ w.T + b), PARAMS, X)
    check(found, "value", "hidden", "dot_general", "transpose")


def test_dropped_bias():
    found = difference(model(), PARAMS, model(lambda x, w, b: x @ w), PARAMS, X)
    check(found, "value", "hidden", "add", "tanh")
    assert "which b does not" in found.first.words
    assert found.first.line_a.line == line_of(dense, "x @ w + b")


def test_a_weight_that_is_stored_transposed_agrees():
    def port(p, x):
        return model()({"w": p["kernel"].T, "b": p["bias"], "out": p["head"].T}, x)

    narrow = {**PARAMS, "out": PARAMS["out"][:, :7]}
    stored = {"kernel": narrow["w"].T, "bias": narrow["b"], "head": narrow["out"].T}
    found = difference(model(), narrow, port, stored, X)
    assert not found, str(found)
    pairs = {(row.name_a, row.name_b) for row in found.gradients}
    assert pairs == {("['w']", "['kernel']"), ("['b']", "['bias']"), ("['out']", "['head']")}


def test_mask_of_minus_infinity():
    def attention(fill):
        def loss(p, x):
            logits = jnp.einsum("btd,bsd->bts", x @ p["w"], x)
            logits = jnp.where(jnp.tri(5, dtype=bool)[None], logits, fill)
            return jnp.mean((jax.nn.softmax(tap(logits, "logits")) @ x @ p["out"]) ** 2)

        return loss

    finite, infinite = attention(-1e9), attention(-jnp.inf)
    found = difference(finite, PARAMS, infinite, PARAMS, X)
    check(found, "value", "logits", "select_n", "select_n")
    assert "-1e+09 everywhere in a, -inf everywhere in b" in found.first.words
    # infinite in the same places
    assert not difference(infinite, PARAMS, infinite, PARAMS, X)


def test_dtype_is_reported_as_such():
    def low(x, w, b):
        return (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(x.dtype) + b

    found = difference(model(low), PARAMS, model(), PARAMS, X)
    check(found, "dtype", "hidden")
    assert "in bfloat16, b in float32, first at hidden" in found.first.words
    assert not any(row.differs for row in (*found.rows, *found.cotangents, *found.gradients))


def test_a_difference_beyond_that_of_dtype():
    def low(x, w, b):
        return (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(x.dtype) + b

    found = difference(model(low, scale=0.7), PARAMS, model(), PARAMS, X)
    check(found, "value", "scaled", "mul", "mul")
    assert "bfloat16" in found.first.words


def test_stopped_gradient():
    found = difference(model(), PARAMS, model(hold=jax.lax.stop_gradient), PARAMS, X)
    check(found, "cotangent", "norm", b="stop_gradient")
    assert not any(row.differs for row in found.rows)


def test_custom_derivative():
    @jax.custom_vjp
    def halved(h):
        return h

    halved.defvjp(lambda h: (h, None), lambda _, ct: (0.5 * ct,))
    found = difference(model(), PARAMS, model(hold=halved), PARAMS, X)
    check(found, "cotangent", "norm", b="mul")
    assert found.first.line_b.line == line_of(test_custom_derivative, "0.5 * ct")


class Linen(nn.Module):
    """A perceptron with a normalization."""

    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm(epsilon=1e-6)(nn.Dense(16)(x))
        return nn.Dense(WIDTH)(nn.gelu(h))


class Nnx(nnx.Module):
    """The same in NNX."""

    def __init__(self, epsilon=1e-6):
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(WIDTH, 16, rngs=rngs)
        self.norm = nnx.LayerNorm(16, epsilon=epsilon, rngs=rngs)
        self.down = nnx.Linear(16, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.norm(self.up(x))))


def linen_and(**options):
    """A Linen loss, its parameters, and an NNX model with the same ones."""
    variables = Linen().init(KEYS[5], X)
    params, model = variables["params"], Nnx(**options)
    for linear, name in ((model.up, "Dense_0"), (model.down, "Dense_1")):
        linear.kernel.value, linear.bias.value = params[name]["kernel"], params[name]["bias"]
    return lambda v, x: jnp.mean(Linen().apply(v, x) ** 2), variables, model


def nnx_loss(model, x):
    return jnp.mean(model(x) ** 2)


MAPPING = {"Dense_0": "up", "LayerNorm_0": "norm", "Dense_1": "down"}


@pytest.mark.parametrize("names", [None, MAPPING], ids=["order", "mapping"])
def test_linen_and_nnx(names):
    loss, variables, port = linen_and()
    found = difference(loss, variables, nnx_loss, port, X, names=names)
    assert not found, str(found)
    assert MAPPING.items() <= {row.name_a: row.name_b for row in found.rows}.items()
    # biases of zeros have the same entries; they are paired all the same
    assert len(found.gradients) == 6
    loss, variables, port = linen_and(epsilon=1e-3)
    found = difference(loss, variables, nnx_loss, port, X, names=names)
    check(found, "value", "LayerNorm_0", "add", "add")
    assert (found.first.name_b, "1e-06 in a, 0.001 in b" in found.first.words) == ("norm", True)


def recurrent(late=None):
    def loss(p, x):
        def cell(h, step):
            t, x = step
            z = x @ p["w"] + h @ p["out"]
            if late is not None:
                z = z * jnp.where(t >= late, 1.1, 1.0)
            h = tap(jnp.tanh(z), "h")
            return h, h

        steps = jnp.arange(5), jnp.swapaxes(x, 0, 1)
        return jnp.mean(jax.lax.scan(cell, jnp.zeros_like(x[:, 0]), steps)[1] ** 2)

    return loss


def test_scan():
    assert not difference(recurrent(), PARAMS, recurrent(), PARAMS, X)
    found = difference(recurrent(), PARAMS, recurrent(late=3), PARAMS, X)
    check(found, "value", "h")
    assert found.first.line_b.line == line_of(recurrent, "jnp.where(t >= late")


def test_without_names_the_whole_program_is_searched():
    def loss(p, x):
        return jnp.mean(jnp.square(jnp.tanh(x @ p["w"]) @ p["out"]))

    def port(p, x):
        return jnp.mean(jnp.square(jnp.sin(x @ p["w"]) @ p["out"]))

    found = difference(loss, PARAMS, port, PARAMS, X)
    check(found, "loss", "loss", "tanh", "sin")
    assert "gradjax.tap" in found.note


def test_parameters_that_differ_are_named():
    found = difference(model(), PARAMS, model(), {**PARAMS, "out": 2 * PARAMS["out"]}, X)
    check(found, "value", "out", "dot_general", "dot_general")
    assert "['out'] of a has no equal in b" in found.first.words


def test_other_arguments():
    found = difference(model(), PARAMS, model(), PARAMS, X, args_b=(X[:1],))
    check(found, "value", "hidden")
    assert found.first.ulps == np.inf


@pytest.mark.parametrize(
    ("options", "nearest"),
    [
        ({"names": {"hiden": "hidden"}}, "hidden"),
        ({"names": {"hidden": "nrom"}}, "norm"),
        ({"leaves": {"w": "['w']"}}, r"\['w'\]"),
    ],
)
def test_unknown_names_list_the_nearest(options, nearest):
    with pytest.raises(ValueError, match=f"not in program .*{nearest}"):
        difference(model(), PARAMS, model(), PARAMS, X, **options)


def test_a_loss_that_cannot_be_traced_raises_its_own_error():
    def loss(p, x):
        return jnp.sum(x @ p["w"]) if x.sum() > 0 else jnp.sum(x)

    with pytest.raises(jax.errors.ConcretizationTypeError):
        gradjax.difference(model(), PARAMS, loss, PARAMS, X)


def test_long_tables_are_shortened():
    def deep(gain):
        def loss(p, x):
            for i in range(30):
                x = tap(jnp.tanh(gain * x), f"layer{i}")
            return jnp.mean((x @ p["w"]) ** 2)

        return loss

    text = str(difference(deep(1.0), PARAMS, deep(1.1), PARAMS, X))
    assert "... and 13 more" in text
    assert "layer29" in text
    assert "layer15" not in text
