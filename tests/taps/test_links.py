"""Links between named values against Jacobians of the same networks by hand; gradients of single
examples in a loop."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gradjax
from gradjax import layer_jacobians, matrix_free, tap
from gradjax.taps.links import links, per_example

X = jax.random.normal(jax.random.key(7), (5, 4))


@pytest.fixture(autouse=True)
def _as_frameworks_promote():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def error(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    assert a.shape == b.shape
    return np.abs(a - b).max() / np.abs(b).max()


def product(jacobians):
    total = np.eye(jacobians[0].shape[1])
    for each in jacobians:
        total = np.asarray(each, np.float64) @ total
    return total


def check(steps, h, functions, report, tol=1e-5):
    """Every link, and their product, against the functions between the same values."""
    found = layer_jacobians(steps, h)
    assert len(found) == len(functions)
    expected = []
    for each in functions:
        expected.append(
            jax.jacobian(lambda v, f=each, shape=h.shape: f(v.reshape(shape)).reshape(-1))(
                h.reshape(-1)
            )
        )
        h = each(h)
    errors = [error(a, b) for a, b in zip(found, expected, strict=True)] + [
        error(product(found), product(expected))
    ]
    report("links against Jacobians by hand", max(errors))
    assert max(errors) < tol
    return expected


# ---- an unrolled embedding, a stack and a read-out, in four ways


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
        stack = nn.scan(
            lambda m, x, _: (m(x), None),
            {"params": 0},
            split_rngs={"params": True},
            length=3,
            reverse=self.reverse,
        )
        x, _ = stack(Layer(self.residual, name="layers"), x, None)
        return nn.Dense(3, name="readout")(x)


def linen(model, x=X):
    params = model.init(jax.random.key(0), x)["params"]
    return (lambda p, x: jnp.mean(jnp.square(model.apply({"params": p}, x)))), params


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reverse", "residual", "example"), [(False, False, 3), (True, True, 0), (True, False, 4)]
)
def test_unrolled_and_scanned_layers(reverse, residual, example, report):
    loss, p = linen(Stacked(reverse, residual))
    dense = lambda q, h: h @ q["kernel"] + q["bias"]
    rows = [jax.tree.map(lambda x, i=i: x[i], p["layers"]["dense"]) for i in range(3)][
        :: -1 if reverse else 1
    ]
    layer = lambda q: lambda h: jnp.tanh(dense(q, h)) + (h if residual else 0.0)
    first = lambda h: layer(rows[0])(jnp.sin(h))
    functions = [first, layer(rows[1]), layer(rows[2]), lambda h: dense(p["readout"], h)]
    steps, h = links(loss, p, X, example=example)
    assert error(h, dense(p["embed"], X[example])) < 1e-6
    check(steps, h, functions, report)
    order = [2, 1, 0] if reverse else [0, 1, 2]
    steps, h = links(
        loss, p, X, start=f"layers[{order[0]}]", stop=f"layers[{order[2]}]", example=example
    )
    assert error(h, first(dense(p["embed"], X[example]))) < 1e-6
    check(steps, h, functions[1:3], report)


def plain(ws, x):
    for i, w in enumerate(ws):
        x = tap(jnp.tanh(x @ w), f"h{i}")
    return jnp.mean(jnp.square(x))


@pytest.mark.slow
def test_links_serve_the_spectrum_and_matrix_free(report):
    n = 12
    ws = list(jax.random.normal(jax.random.key(0), (5, n, n)) * 1.5 / n**0.5)
    x = jax.random.normal(jax.random.key(1), (3, n))
    steps, h = links(plain, ws, x, start="h1", stop="h4", example=2)
    expected = check(steps, h, [lambda h, w=w: jnp.tanh(h @ w) for w in ws[2:]], report)
    sigma = np.linalg.svd(product(expected), compute_uv=False)
    found = gradjax.jacobian_spectrum(steps, h).log_singular_values
    report("spectrum of links (nats)", np.abs(found - np.log(sigma)).max())
    np.testing.assert_allclose(found, np.log(sigma), atol=1e-4)
    top = matrix_free.top_singular_values(steps, h, k=2, key=jax.random.key(0))
    np.testing.assert_allclose(top.log_singular_values, np.log(sigma[:2]), atol=1e-5)


def test_links_of_nnx_and_equinox(report):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = getattr(nnx, "List", list)(
                [nnx.Linear(4, 4, rngs=rngs) for _ in range(3)]
            )

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

    model = Net(nnx.Rngs(0))
    array = lambda variable: jax.tree.leaves(variable)[0]
    steps, h = links(lambda m, x: jnp.sum(jnp.sin(m(x))), model, X, example=1)
    maps = [lambda h, q=q: jnp.tanh(h) @ array(q.kernel) + array(q.bias) for q in model.layers]
    assert error(h, X[1] @ array(model.layers[0].kernel)) < 1e-6
    check(steps[:2], h, maps[1:], report)
    keys = jax.random.split(jax.random.key(0), 3)
    other = Eqx(
        [eqx.nn.Linear(4, 4, use_bias=False, key=key) for key in keys]
    )  # weight @ x: examples come last
    steps, h = links(lambda m, x: jnp.sum(jnp.sin(jax.vmap(m)(x))), other, X, example=1)
    assert error(h, other.layers[0].weight @ X[1]) < 1e-6
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
    variables = model.init(jax.random.key(0), X)
    p = variables["params"]
    kernel = lambda i: p[f"dense{i}"]["kernel"]

    def loss(p, x, stats):
        out, new = model.apply({"params": p, "batch_stats": stats}, x, mutable=["batch_stats"])
        return jnp.mean(jnp.square(out)) + jnp.sum(out[0]), new

    norm = lambda h: (h - h.mean(0)) / jnp.sqrt(jnp.var(h, axis=0) + 1e-5)
    args = (p, X, variables["batch_stats"])
    steps, h = links(loss, *args, start="dense0", stop="dense2", example=None, has_aux=True)
    whole = [lambda h: jnp.sin(norm(h)) @ kernel(1), lambda h: jnp.sin(norm(h)) @ kernel(2)]
    assert error(h, X @ kernel(0)) < 1e-6
    check(steps, h, whole, report)
    behind, h1 = links(loss, *args, start="norm0", stop="dense2", example=None, has_aux=True)
    assert error(h1, norm(X @ kernel(0))) < 1e-5
    check(behind, h1, [lambda h: jnp.sin(h) @ kernel(1), whole[1]], report)
    one, row = links(loss, *args, start="dense0", stop="dense2", example=0, has_aux=True)
    found = layer_jacobians(one, row)
    full = np.asarray(layer_jacobians(steps, h)[0]).reshape(5, 4, 5, 4)
    assert error(found[0], full[0, :, 0, :]) < 1e-5  # the others of the batch held fixed


def test_links_inside_jit(report):
    ws = list(jax.random.normal(jax.random.key(0), (3, 4, 4)))

    def whole(ws):
        steps, h = links(plain, ws, X)
        for step, theta in steps:
            h = step(h, theta)
        return h

    expected = X[0]
    for w in ws:
        expected = jnp.tanh(expected @ w)
    assert error(jax.jit(whole)(ws), expected) < 1e-5


def test_a_value_with_a_way_around_it_is_refused():
    def skipping(ws, x):
        for i, w in enumerate(ws):
            x = x + tap(jnp.tanh(x @ w), f"branch{i}")
            x = tap(x, f"h{i}")
        return jnp.mean(jnp.square(x))

    ws = list(jax.random.normal(jax.random.key(0), (4, 4, 4)))
    with pytest.raises(
        ValueError, match=r"not every path to the loss passes 'branch1'.*h0.*h1.*h2.*h3"
    ):
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
    found = layer_jacobians(steps, h)
    expected = jax.jacobian(lambda h: h + jnp.tanh(h @ ws[1]))(h)
    assert error(found[0], expected) < 1e-5


# ---- gradients of single examples


def in_a_loop(loss, params, *batch):
    """(log norms, signal to noise, correlation) in float64, one example after the other."""
    rows, gradient = [], jax.jit(jax.grad(loss))
    for i in range(len(batch[0])):
        grads = gradient(params, *(x[i : i + 1] for x in batch))
        rows.append(
            np.concatenate([np.asarray(g, np.float64).ravel() for g in jax.tree.leaves(grads)])
        )
    g = np.stack(rows)
    norms = np.linalg.norm(g, axis=1)
    mean = g.mean(0)
    return (
        np.log(norms),
        mean @ mean / np.mean(((g - mean) ** 2).sum(1)),
        (g @ g.T) / norms / norms[:, None],
    )


@pytest.mark.slow
@pytest.mark.parametrize("block", [2, 32])
@pytest.mark.parametrize("size", [1.0, 1e30, 1e-30])
def test_per_example_against_a_loop(block, size, report):
    params = list(jax.random.normal(jax.random.key(0), (2, 4, 4)))
    scaled = lambda p, x: size * plain(p, x)
    log_norm, snr, correlation = in_a_loop(plain, params, X)
    found = per_example(scaled, params, X, block=block)
    errors = [
        np.abs(found.log_norm - np.log(size) - log_norm).max(),
        abs(found.signal_to_noise / snr - 1),
    ]
    errors.append(np.abs(found.correlation - correlation).max())
    report("per_example against a loop", max(errors))
    assert max(errors) < 5e-5


def test_per_example_over_sixty_decades():
    found = per_example(
        lambda w, x: jnp.sum(w * x), jnp.ones(2), jnp.array([[1e30, 1e30], [1e-30, 0.0]])
    )
    np.testing.assert_allclose(found.log_norm, np.log([2**0.5 * 1e30, 1e-30]), rtol=1e-6)
    np.testing.assert_allclose(found.correlation, [[1, 0.5**0.5], [0.5**0.5, 1]], atol=1e-6)
    np.testing.assert_allclose(found.signal_to_noise, 1.0, rtol=1e-5)  # g / 2 against g / 2
    zero = per_example(
        lambda w, x: jnp.sum(w * x), jnp.ones(2), jnp.array([[1.0, 0.0], [0.0, 0.0]])
    )
    assert zero.log_norm[1] == -np.inf and zero.correlation[1, 1] == 0
    np.testing.assert_allclose(zero.signal_to_noise, 1.0, rtol=1e-5)


def test_per_example_takes_aux_static_arguments_and_models():
    def loss(p, x, y, key, kind):
        assert kind == "square" and x.shape == (1, 4)
        return jnp.sum(jnp.square(x @ p - y)), key

    p, y = jnp.ones((4, 2)), jnp.arange(10.0).reshape(5, 2)
    found = per_example(loss, p, X, y, jax.random.key(0), "square", has_aux=True)
    log_norm, snr, _ = in_a_loop(lambda p, x, y: loss(p, x, y, None, "square")[0], p, X, y)
    np.testing.assert_allclose(found.log_norm, log_norm, rtol=1e-5)
    np.testing.assert_allclose(found.signal_to_noise, snr, rtol=1e-4)
    model = eqx.nn.MLP(4, 2, 3, 1, key=jax.random.key(0))
    of = lambda m, x: jnp.sum(jnp.square(jax.vmap(m)(x)))
    pure, params = gradjax.functional(of, model)
    np.testing.assert_allclose(
        per_example(of, model, X).log_norm, in_a_loop(pure, params, X)[0], rtol=1e-5
    )
    with pytest.raises(ValueError, match=r"first axes of \[2, 5\]"):
        per_example(lambda p, x, y: jnp.sum(p * x), p, X, y[:2])
    with pytest.raises(ValueError, match="first axes of none"):
        per_example(lambda p, x: jnp.sum(p), p, 1.0)
