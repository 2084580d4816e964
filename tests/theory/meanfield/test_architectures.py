"""Residual branches, BatchNorm, shattered gradients and gates: closed forms and simulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from theory.reference import joint_p, z_score

from gradjax.theory import meanfield


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: meanfield.batchnorm_growth(8, "tanh"), "linear, relu or leaky_relu"),
        (lambda: meanfield.gated("rhn", 1.0), "minimal_rnn, gru, lstm"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def batchnorm_samples(phi, slope, b, draws=4000):
    """Per draw of a batch of one unit: numerator and denominator of the growth, by its
    definition."""
    rng = np.random.default_rng(0)
    center = np.eye(b) - 1 / b
    h = rng.standard_normal((draws, b)) @ center
    norm = np.linalg.norm(h, axis=1)[:, None, None]
    r = h[:, :, None] / norm
    x = np.sqrt(b) * r[..., 0]
    jacobian = np.sqrt(b) / norm * (center - r * r.transpose(0, 2, 1)) * slope(x)[:, None]  # P D
    y = phi(x)
    numerator = np.sum((jacobian @ center) ** 2, (1, 2))
    return np.stack([numerator, np.sum((y - y.mean(1, keepdims=True)) ** 2, 1)], 1) / (b - 1)


def test_formula_7_batchnorm():
    """Yang 2019: linear (B-2)/(B-3); ReLU by simulation of one unit, 2% off rejected; pi/(pi-1) as
    B grows."""
    batches = np.array([8.0, 32.0, 128.0])
    linear = meanfield.batchnorm_growth(batches, "linear")
    np.testing.assert_allclose(linear, (batches - 2) / (batches - 3), rtol=1e-12)
    assert round(float(meanfield.batchnorm_growth(1e8)), 5) == 1.46694
    assert np.isinf(meanfield.batchnorm_growth(3))
    for b in (8, 32):
        x = batchnorm_samples(lambda x: np.maximum(x, 0), lambda x: (x > 0).astype(float), b)
        ratio = x[:, 0].mean() / x[:, 1].mean()
        spread = np.std(x[:, 0] - ratio * x[:, 1]) / x[:, 1].mean() / np.sqrt(len(x))
        expected = float(meanfield.batchnorm_growth(b))
        assert abs(ratio - expected) < 3 * spread, (b, ratio, expected, spread)
        assert abs(ratio - expected * (1.02 + 1 / b)) > 3 * spread, b


def test_formula_9_residual():
    """Tanh: log chi_0 / chi_L ~ A sqrt(L); ReLU: 1 + sigma_v^2 sigma_w^2 / 2 per layer, exactly."""
    w, v, a = 1.5, 1.2, 0.3
    total = np.cumsum(meanfield.residual(1000, w, 0.1, v, a).log_growth)
    slope = (total[999] - total[499]) / (1000**0.5 - 500**0.5)
    expected = 4 / 3 * (2 / np.pi) ** 0.5 * v**2 * w / (v**2 + a**2) ** 0.5
    assert slope == pytest.approx(expected, rel=4e-3)
    assert slope != pytest.approx(1.05 * expected, rel=4e-3)
    relu = meanfield.residual(5, w, 0.1, v, a, "relu")
    np.testing.assert_allclose(relu.log_growth, np.log1p(v**2 * w**2 / 2), rtol=1e-12)


@pytest.mark.slow
def test_formula_9_residual_simulated():
    """p, c and the gradient after six layers of a network with both matrices."""
    w, b, v, a, depth = 1.5, 0.2, 0.8, 0.1, 6
    samples = residual_samples(w, b, v, a, depth)
    theory = meanfield.residual(depth, w, b, v, a, c=0.5)
    p, growth = float(theory.p[-1]), np.exp(np.sum(np.asarray(theory.log_growth)))
    expected = np.array([p, p * float(theory.c[-1]), growth])
    assert joint_p(z_score(samples, expected)) > 1e-3, z_score(samples, expected)
    assert joint_p(z_score(samples, expected * 1.05)) < 1e-3


def residual_samples(w, b, v, a, depth, n=300, draws=60):
    """Per draw: p, p c and the growth of tangents, from inputs with p = 1 and c = 1/2."""
    rng, out = np.random.default_rng(1), []
    for _ in range(draws):
        h = np.linalg.cholesky([[1, 0.5], [0.5, 1]]) @ rng.standard_normal((2, n))
        u = rng.standard_normal((n, 20))
        u = u / np.linalg.norm(u, axis=0)
        for _ in range(depth):
            ws, vs = (s / np.sqrt(n) * rng.standard_normal((n, n)) for s in (w, v))
            z = h @ ws.T + b * rng.standard_normal(n)
            u = u + vs @ ((1 - np.tanh(z[0]) ** 2)[:, None] * (ws @ u))
            h = h + np.tanh(z) @ vs.T + a * rng.standard_normal(n)
        growth = np.mean(np.sum(u**2, 0))
        out.append([np.mean(h[0] ** 2), np.mean(h[0] * h[1]), growth])
    return np.asarray(out)


def test_formula_10_shattered_gradients():
    """Balduzzi 2017: 2^-L without skips at c = 0; L^(-1/2) with them."""
    assert np.log2(float(meanfield.gradient_correlation(0.0))) == pytest.approx(-1, rel=1e-10)
    layers = np.arange(1.0, 4001.0)
    factors = np.asarray(meanfield.gradient_correlation(0.0, branch=1 / (layers + 1)))
    total = np.cumsum(np.log(factors))
    assert (total[3999] - total[999]) / np.log(4) == pytest.approx(-0.5, rel=2e-3)


@pytest.mark.slow
def test_gradients_of_one_input_are_one_gradient():
    assert meanfield.gradient_correlation(1.0, 2.0, "tanh") == pytest.approx(1.0, rel=1e-10)


def gated_samples(cell, sigma_w, variance, bias, n=100, steps=40, draws=24):
    """E h^2 and the mean squared singular value of the last step's Jacobian, per draw, from
    jax.jacfwd of the cell with untied weights."""

    def minimal_rnn(h, w, x):
        u = jax.nn.sigmoid(w[0] @ h + x[0] + bias)
        return u * h + (1 - u) * jnp.tanh(x[1])

    def gru(h, w, x):
        r, z = jax.nn.sigmoid(w[0] @ h + x[0]), jax.nn.sigmoid(w[1] @ h + x[1] + bias)
        return (1 - z) * jnp.tanh(x[2] + r * (w[2] @ h)) + z * h

    def lstm(state, w, x):
        c, h = state[:n], state[n:]
        f, i, o = (jax.nn.sigmoid(w[k] @ h + x[k] + (bias if k == 0 else 0.0)) for k in range(3))
        c = f * c + i * jnp.tanh(w[3] @ h + x[3])
        return jnp.concatenate([c, o * jnp.tanh(c)])

    step = {"minimal_rnn": minimal_rnn, "gru": gru, "lstm": lstm}[cell]
    run, jacobian = jax.jit(step), jax.jit(lambda *a: jnp.sum(jnp.square(jax.jacfwd(step)(*a))))
    rng, out = np.random.default_rng(5), []
    for _ in range(draws):
        state = jnp.zeros(2 * n if cell == "lstm" else n)
        for t in range(steps):
            weights = jnp.asarray(sigma_w / np.sqrt(n) * rng.standard_normal((4, n, n)))
            args = (state, weights, jnp.asarray(np.sqrt(variance) * rng.standard_normal((4, n))))
            if t < steps - 1:
                state = run(*args)
        out.append([float(jnp.mean(jnp.square(state[-n:]))), float(jacobian(*args)) / state.size])
    return np.asarray(out)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["minimal_rnn", "gru", "lstm"])
def test_formula_12_gated(cell):
    """Per-step mean squared singular value, untied: 3 standard errors and 3%; sigma_w 20% off
    rejected; bias -> 1."""
    samples = gated_samples(cell, 2.0, 0.5, 1.0)
    theory = meanfield.gated(cell, 2.0, 0.5, 1.0)
    assert joint_p(z_score(samples, np.array(theory))) > 1e-3, (samples.mean(0), theory)
    assert samples[:, 1].mean() == pytest.approx(float(theory.chi), rel=0.03)
    assert joint_p(z_score(samples, np.array(meanfield.gated(cell, 2.4, 0.5, 1.0)))) < 1e-3
    chi = np.array(
        [float(meanfield.gated(cell, 1.0, 1.0, bias).chi) for bias in (0.0, 2.0, 4.0, 8.0)]
    )
    assert np.all(np.diff(chi) > 0) and (cell == "lstm" or abs(chi[-1] - 1) < 0.01)
