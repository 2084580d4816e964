"""Links between named values, and gradients of single examples, against the same by hand."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers_taps import ROUNDINGS, equinox, error, filled

import gradjax
from bounds import assert_rounding, gamma
from gradjax import layer_jacobians, matrix_free, tap
from gradjax.taps.links import links, per_example

X = np.random.default_rng(7).standard_normal((5, 4), dtype=np.float32)


def weights(*shape, scale=1.0):
    return np.float32(scale * np.random.default_rng(0).standard_normal(shape))


@pytest.fixture(autouse=True)
def _as_frameworks_promote():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def product(jacobians):
    total = np.eye(jacobians[0].shape[1])
    for each in jacobians:
        total = np.asarray(each, np.float64) @ total
    return total


def check(steps, h, functions, report):
    """Every link, and their product, against the functions between the same values."""

    def by_hand(h):
        out = []
        for each in functions:
            flat = lambda v, f=each, shape=h.shape: f(v.reshape(shape)).reshape(-1)
            out.append(jax.jacobian(flat)(h.reshape(-1)))
            h = each(h)
        return out

    both = jax.jit(lambda h: (layer_jacobians(steps, h), by_hand(h)))
    found, expected = both(h)
    assert len(found) == len(functions)
    pairs = [*zip(found, expected, strict=True), (product(found), product(expected))]
    errors = [error(a, b) for a, b in pairs]
    report("links against Jacobians by hand", max(errors))
    assert max(errors) < 2 * gamma(ROUNDINGS)
    return expected


# An unrolled embedding, a stack and a read-out, in four ways


class Layer(nn.Module):
    residual: bool = False

    @nn.compact
    def __call__(self, x):
        z = jnp.tanh(nn.Dense(4, bias_init=nn.initializers.normal(0.3), name="dense")(x))
        return x + z if self.residual else z


class Stacked(nn.Module):
    reverse: bool = False
    residual: bool = False

    @nn.compact
    def __call__(self, x):
        x = jnp.sin(nn.Dense(4, name="embed")(x))
        options = {"split_rngs": {"params": True}, "length": 3, "reverse": self.reverse}
        stack = nn.scan(lambda m, x, _: (m(x), None), {"params": 0}, **options)
        x, _ = stack(Layer(self.residual, name="layers"), x, None)
        return nn.Dense(3, name="readout")(x)


def linen(model, x=X):
    params = filled(jax.eval_shape(lambda: model.init(jax.random.key(0), x)["params"]))
    return (lambda p, x: jnp.mean(jnp.square(model.apply({"params": p}, x)))), params


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reverse", "residual", "example"), [(False, False, 3), (True, True, 0), (True, False, 4)]
)
def test_unrolled_and_scanned_layers(reverse, residual, example, report):
    loss, p = linen(Stacked(reverse, residual))
    dense = lambda q, h: h @ q["kernel"] + q["bias"]
    order = [2, 1, 0] if reverse else [0, 1, 2]
    rows = [jax.tree.map(lambda x, i=i: x[i], p["layers"]["dense"]) for i in order]
    layer = lambda q: lambda h: jnp.tanh(dense(q, h)) + (h if residual else 0.0)
    first = lambda h: layer(rows[0])(jnp.sin(h))
    functions = [first, layer(rows[1]), layer(rows[2]), lambda h: dense(p["readout"], h)]
    steps, h = links(loss, p, X, example=example)
    assert_rounding(h, dense(p["embed"], X[example]), terms=6, size=10.0)
    check(steps, h, functions, report)
    ends = {"start": f"layers[{order[0]}]", "stop": f"layers[{order[2]}]"}
    steps, h = links(loss, p, X, **ends, example=example)
    assert_rounding(h, first(dense(p["embed"], X[example])), terms=ROUNDINGS)
    check(steps, h, functions[1:3], report)


def plain(ws, x):
    for i, w in enumerate(ws):
        x = tap(jnp.tanh(x @ w), f"h{i}")
    return jnp.mean(jnp.square(x))


@pytest.mark.slow
def test_links_serve_the_spectrum_and_matrix_free(report):
    n = 12
    ws = list(weights(5, n, n, scale=1.5 / n**0.5))
    x = weights(3, n)
    steps, h = links(plain, ws, x, start="h1", stop="h4", example=2)
    expected = check(steps, h, [lambda h, w=w: jnp.tanh(h @ w) for w in ws[2:]], report)
    sigma = np.linalg.svd(product(expected), compute_uv=False)
    found = gradjax.jacobian_spectrum(steps, h).log_singular_values
    report("spectrum of links (nats)", np.abs(found - np.log(sigma)).max())
    # Weyl: singular values move by at most the norm of the error, so the small ones by more nats.
    np.testing.assert_array_less(abs(np.exp(found) - sigma), 2 * gamma(ROUNDINGS) * sigma[0])
    top = matrix_free.top_singular_values(steps, h, k=2, key=jax.random.key(0))
    nats = abs(top.log_singular_values - np.log(sigma[:2]))
    np.testing.assert_array_less(nats, 4 * gamma(ROUNDINGS) * sigma[0] / sigma[1])


def test_links_of_nnx_and_equinox(report):
    class Net(nnx.Module):
        def __init__(self, rngs):
            layers = [nnx.Linear(4, 4, rngs=rngs) for _ in range(3)]
            self.layers = getattr(nnx, "List", list)(layers)

        def __call__(self, x):
            for layer in self.layers:
                x = jnp.tanh(layer(x))
            return x

    class Eqx(eqx.Module):
        layers: list

        def __call__(self, x):
            for layer in self.layers:
                x = jnp.tanh(layer(x))
            return x

    model = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    loss, params = gradjax.functional(lambda m, x: jnp.sum(jnp.sin(m(x))), model)
    params = filled(params)
    array = lambda variable: jax.tree.leaves(variable)[0]
    layers = [params["layers"][i] for i in range(3)]
    (w, b), *rest = [(array(each["kernel"]), array(each["bias"])) for each in layers]
    steps, h = links(loss, params, X, example=1)
    assert_rounding(h, X[1] @ np.asarray(w) + np.asarray(b), terms=6, size=10.0)
    maps = [lambda h, w=w, b=b: jnp.tanh(h) @ w + b for w, b in rest]
    check(steps[:2], h, maps, report)

    def make(key):
        keys = jax.random.split(key, 3)
        return Eqx([eqx.nn.Linear(4, 4, use_bias=False, key=key) for key in keys])

    # weight @ x: examples come last
    other = equinox(make)
    steps, h = links(lambda m, x: jnp.sum(jnp.sin(jax.vmap(m)(x))), other, X, example=1)
    assert_rounding(h, np.asarray(other.layers[0].weight) @ X[1], terms=6, size=10.0)
    check(steps[:2], h, [lambda h, q=q: q.weight @ jnp.tanh(h) for q in other.layers[1:]], report)


@pytest.mark.slow
def test_a_whole_batch_that_batchnorm_couples(report):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(3):
                x = nn.Dense(4, use_bias=False, name=f"dense{i}")(x)
                x = jnp.sin(nn.BatchNorm(use_running_average=False, name=f"norm{i}")(x))
            return x

    model = Net()
    variables = filled(jax.eval_shape(lambda: model.init(jax.random.key(0), X)))
    p = variables["params"]
    kernel = lambda i: p[f"dense{i}"]["kernel"]

    def loss(p, x, stats):
        out, new = model.apply({"params": p, "batch_stats": stats}, x, mutable=["batch_stats"])
        return jnp.mean(jnp.square(out)) + jnp.sum(out[0]), new

    def norm(h, i):
        whitened = (h - h.mean(0)) / jnp.sqrt(jnp.var(h, axis=0) + 1e-5)
        return whitened * p[f"norm{i}"]["scale"] + p[f"norm{i}"]["bias"]

    args = (p, X, variables["batch_stats"])
    steps, h = links(loss, *args, start="dense0", stop="dense2", example=None, has_aux=True)
    whole = [lambda h, i=i: jnp.sin(norm(h, i)) @ kernel(i + 1) for i in range(2)]
    assert_rounding(h, X @ np.asarray(kernel(0)), terms=6, size=10.0)
    check(steps, h, whole, report)
    behind, h1 = links(loss, *args, start="norm0", stop="dense2", example=None, has_aux=True)
    assert_rounding(h1, norm(X @ kernel(0), 0), terms=ROUNDINGS)
    check(behind, h1, [lambda h: jnp.sin(h) @ kernel(1), whole[1]], report)
    one, row = links(loss, *args, start="dense0", stop="dense2", example=0, has_aux=True)
    found, full = jax.jit(lambda a, b: (layer_jacobians(one, a), layer_jacobians(steps, b)))(row, h)
    full = np.asarray(full[0]).reshape(5, 4, 5, 4)
    # The others of the batch are held fixed.
    assert_rounding(found[0], full[0, :, 0, :], terms=ROUNDINGS)


def test_links_inside_jit():
    ws = list(weights(3, 4, 4))

    def whole(ws):
        steps, h = links(plain, ws, X)
        for step, theta in steps:
            h = step(h, theta)
        return h

    expected = X[0]
    for w in ws:
        expected = np.tanh(expected @ w)
    assert_rounding(jax.jit(whole)(ws), expected, terms=ROUNDINGS)


def test_a_value_with_a_way_around_it_is_refused(report):
    def skipping(ws, x):
        for i, w in enumerate(ws):
            x = x + tap(jnp.tanh(x @ w), f"branch{i}")
            x = tap(x, f"h{i}")
        return jnp.mean(jnp.square(x))

    ws = list(weights(4, 4, 4))
    message = r"not every path to the loss passes 'branch1'.*h0.*h1.*h2.*h3"
    with pytest.raises(ValueError, match=message):
        links(skipping, ws, X, start="branch1")
    with pytest.raises(ValueError, match="'nowhere'"):
        links(skipping, ws, X, stop="nowhere")
    with pytest.raises(ValueError, match=r"stop 'h1' does not come after start 'h2'"):
        links(skipping, ws, X, start="h2", stop="h1")
    with pytest.raises(ValueError, match=r"1 layer was found.*two"):
        links(plain, ws[:1], X)
    with pytest.raises(ValueError, match=r"links: the loss returns \(5, 4\)"):
        links(lambda w, x: tap(x @ w, "h"), ws[0], X)
    steps, h = links(skipping, ws, X, start="h0", stop="h2")
    check(steps, h, [lambda h, w=w: h + jnp.tanh(h @ w) for w in ws[1:3]], report)


# Gradients of single examples


def in_a_loop(loss, params, *batch):
    """(log norms, signal to noise, correlation) in float64, one example after the other."""
    rows, gradient = [], jax.jit(jax.grad(loss))
    for i in range(len(batch[0])):
        grads = gradient(params, *(x[i : i + 1] for x in batch))
        parts = [np.asarray(g, np.float64).ravel() for g in jax.tree.leaves(grads)]
        rows.append(np.concatenate(parts))
    g = np.stack(rows)
    norms, mean = np.linalg.norm(g, axis=1), g.mean(0)
    noise = np.mean(((g - mean) ** 2).sum(1))
    return np.log(norms), mean @ mean / noise, (g @ g.T) / norms / norms[:, None]


def agree(found, expected, size=1.0):
    """`per_example` against `in_a_loop`.

    Logs and cosines carry the relative error of the gradients. The signal is (1 + 1 / snr) times
    smaller than what is summed to it, the noise (1 + snr) times: errors grow by these factors.
    """
    log_norm, snr, correlation = expected
    relative = 2 * gamma(ROUNDINGS)
    np.testing.assert_allclose(
        found.log_norm, np.log(size) + log_norm, atol=relative, rtol=gamma(4)
    )
    np.testing.assert_allclose(found.correlation, correlation, atol=relative, rtol=0)
    grows = 2 + snr + 1 / snr
    np.testing.assert_allclose(found.signal_to_noise, snr, rtol=relative * grows)


@pytest.mark.parametrize("block", [2, 32])
def test_per_example_against_a_loop(block):
    params = list(weights(2, 4, 4))

    def scaled(p, x, size):
        return size * plain(p, x)

    expected = in_a_loop(plain, params, X)
    compiled = jax.jit(lambda size: per_example(scaled, params, X, size, block=block))
    for size in (1.0, 1e30, 1e-30):
        agree(compiled(jnp.float32(size)), expected, size)


def test_per_example_over_sixty_decades():
    compiled = jax.jit(lambda x: per_example(lambda w, x: jnp.sum(w * x), jnp.ones(2), x))
    found = compiled(np.float32([[1e30, 1e30], [1e-30, 0.0]]))
    # A norm of two terms, its log, and that of a power of two.
    np.testing.assert_allclose(found.log_norm, np.log([2**0.5 * 1e30, 1e-30]), rtol=gamma(12))
    cosines = [[1, 0.5**0.5], [0.5**0.5, 1]]
    assert_rounding(found.correlation, cosines, terms=8)
    # g / 2 against g / 2
    assert_rounding(found.signal_to_noise, 1.0, terms=24)
    zero = compiled(np.float32([[1.0, 0.0], [0.0, 0.0]]))
    assert zero.log_norm[1] == -np.inf and zero.correlation[1, 1] == 0
    assert_rounding(zero.signal_to_noise, 1.0, terms=24)


def test_per_example_takes_aux_static_arguments_and_models():
    def loss(p, x, y, key, kind):
        assert kind == "square" and x.shape == (1, 4)
        return jnp.sum(jnp.square(x @ p - y)), key

    p, y = np.ones((4, 2), np.float32), np.arange(10, dtype=np.float32).reshape(5, 2)
    found = per_example(loss, p, X, y, jax.random.key(0), "square", has_aux=True)
    agree(found, in_a_loop(lambda p, x, y: loss(p, x, y, None, "square")[0], p, X, y))
    model = equinox(lambda key: eqx.nn.MLP(4, 2, 3, 1, key=key))
    of = lambda m, x: jnp.sum(jnp.square(jax.vmap(m)(x)))
    pure, params = gradjax.functional(of, model)
    found = jax.jit(lambda x: per_example(of, model, x))(X)
    agree(found, in_a_loop(pure, params, X))
    with pytest.raises(ValueError, match=r"first axes of \[2, 5\]"):
        per_example(lambda p, x, y: jnp.sum(p * x), p, X, y[:2])
    with pytest.raises(ValueError, match="first axes of none"):
        per_example(lambda p, x: jnp.sum(p), p, 1.0)
