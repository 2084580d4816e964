"""Plain programs that leave the range of their dtype, average nothing or decompose badly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.stats import multivariate_normal
from jax.sharding import Mesh, PartitionSpec

from pathologies.nonfinite_case import Broken, broken, ramp, weights

CASES: list[Broken] = []
forward = functools.partial(broken, CASES, "forward")


@forward("exp", "overflow")
def handwritten_softmax_without_the_maximum():
    @jax.jit
    def softmax(z):
        e = jnp.exp(z)  # <- here
        return e / jnp.sum(e, axis=-1, keepdims=True)

    @jax.jit
    def predict(params, x):
        return softmax(jnp.tanh(x @ params["w1"]) @ params["w2"])

    def loss_fn(params, x, y):
        return jnp.mean((predict(params, x) - y) ** 2)

    params = {"w1": weights(0, 4, 8), "w2": 100.0 * weights(1, 8, 3)}
    return loss_fn, params, (5.0 * ramp(8, 4), jax.nn.one_hot(jnp.arange(8) % 3, 3))


@forward("reduce_sum", "overflow")
def handwritten_logsumexp_whose_sum_overflows():
    def loss_fn(logits, labels):
        normaliser = jnp.sum(jnp.exp(logits), axis=-1)  # <- here
        picked = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
        return jnp.mean(jnp.log(normaliser) - picked)

    return loss_fn, jnp.full((4, 8), 88.0), (jnp.arange(4),)


@forward("exp", "overflow")
def handwritten_softplus_with_a_custom_rule():
    @jax.custom_jvp
    def softplus(x):
        return jnp.log(1.0 + jnp.exp(x))  # <- here

    @softplus.defjvp
    def softplus_jvp(primals, tangents):
        return softplus(*primals), jax.nn.sigmoid(primals[0]) * tangents[0]

    def loss_fn(w, x):
        return jnp.mean(softplus(x @ w))

    return loss_fn, jnp.full(3, 20.0), (jnp.ones((4, 3)) * 2.0,)


@forward("integer_pow", "overflow")
def polynomial_features_of_raw_inputs():
    def loss_fn(w, x):
        features = jnp.stack([x, x**2, x**13], axis=-1)  # <- here
        return jnp.mean(features @ w)

    def scaled(params, x):
        return loss_fn(params["w"], params["scale"] * x)

    return scaled, {"w": jnp.ones(3), "scale": jnp.array(1.0)}, (ramp(6, low=1.0, high=2000.0),)


@forward("cosh", "overflow")
def log_cosh_of_a_large_error():
    def loss_fn(w, x, y):
        error = x @ w - y
        return jnp.mean(jnp.log(jnp.cosh(error)))  # <- here

    return loss_fn, jnp.ones(3), (ramp(8, 3), jnp.full(8, 250.0))


@forward("cumprod", "overflow")
def importance_ratios_over_a_trajectory():
    def loss_fn(log_scale, log_ratio, rewards):
        ratio = jnp.exp(log_scale * log_ratio)
        weight = jnp.cumprod(ratio, axis=-1)  # <- here
        return -jnp.mean(weight * rewards)

    return loss_fn, jnp.array(1.0), (jnp.full((2, 16), 8.0), ramp(2, 16, low=1.0, high=2.0))


@forward("square integer_pow mul", "overflow")
def squared_error_in_float16():
    def loss_fn(params, x, y):
        hidden = jax.nn.relu(x @ params["w1"])
        error = hidden @ params["w2"] - y
        return jnp.mean(jnp.square(error))  # <- here

    params = {"w1": jnp.ones((4, 8), jnp.float16), "w2": jnp.ones((8, 1), jnp.float16)}
    return loss_fn, params, (jnp.full((4, 4), 10, jnp.float16), jnp.zeros((4, 1), jnp.float16))


@forward("exp", "overflow")
def contrastive_loss_in_float16():
    def embed(w, x):
        z = x @ w
        return z / jnp.sqrt(jnp.sum(z**2, axis=-1, keepdims=True))

    def loss_fn(w, x, other):
        similarity = embed(w, x) @ embed(w, other).T
        scores = jnp.exp(similarity / 0.07)  # <- here
        return -jnp.mean(jnp.log(jnp.diag(scores) / jnp.sum(scores, axis=-1)))

    x = ramp(4, 3).astype(jnp.float16)
    return loss_fn, jnp.eye(3, dtype=jnp.float16), (x, x)


@forward("exp", "overflow")
def poisson_rate_in_bfloat16():
    def loss_fn(params, x, counts):
        log_rate = x @ params["w"] + params["b"][None]
        rate = jnp.exp(log_rate)  # <- here
        return jnp.mean(rate - counts * log_rate)

    params = {"w": jnp.ones((2, 1), jnp.bfloat16), "b": jnp.full(1, 100, jnp.bfloat16)}
    return loss_fn, params, (jnp.ones((4, 2), jnp.bfloat16), jnp.ones((4, 1), jnp.bfloat16))


@forward("mul", "loss_scale")
def loss_scaled_in_float16():
    def loss_fn(params, x, y):
        error = x @ params["w"] - y
        loss = jnp.mean(error**2)
        return loss * 2.0**15  # <- here

    params = {"w": jnp.ones((2, 1), jnp.float16)}
    return loss_fn, params, (jnp.ones((4, 2), jnp.float16), jnp.full((4, 1), 4, jnp.float16))


@forward("add", "overflow", iteration=8)
def running_sum_in_float16():
    def loss_fn(scale, increments):
        def accumulate(total, x):
            total = total + scale * x  # <- here
            return total, total

        total, _ = jax.lax.scan(accumulate, jnp.zeros((), jnp.float16), increments)
        return total / 10

    return loss_fn, jnp.ones((), jnp.float16), (jnp.full(10, 8000, jnp.float16),)


@forward("convert_element_type", "cast_overflow")
def raw_features_cast_to_float16():
    def loss_fn(params, x, y):
        x = x.astype(jnp.float16)  # <- here
        w = params["w"].astype(jnp.float16)
        prediction = jax.nn.leaky_relu(x @ w).astype(jnp.float32)
        return jnp.mean((prediction - y) ** 2)

    x = ramp(8, 3).at[5, 1].set(1e5)
    return loss_fn, {"w": weights(0, 3, 2)}, (x, jnp.zeros((8, 2)))


@forward("mul", "zero_times_infinity")
def transport_cost_of_forbidden_pairs():
    def loss_fn(points, targets, forbidden):
        distance = (points[:, None] - targets[None, :]) ** 2
        cost = jnp.where(forbidden, jnp.inf, distance)
        plan = jnp.where(forbidden, 0.0, jnp.exp(-distance))
        return jnp.sum(plan * cost)  # <- here

    return loss_fn, ramp(4), (ramp(4) + 0.1, jnp.eye(4, dtype=bool))


@forward("sub", "infinity_minus_infinity")
def kl_of_two_masked_distributions():
    def loss_fn(params, x, old_logits, legal):
        new = jax.nn.log_softmax(jnp.where(legal, x @ params["w"], -jnp.inf))
        old = jax.nn.log_softmax(jnp.where(legal, old_logits, -jnp.inf))
        divergence = jnp.exp(old) * (old - new)  # <- here
        return divergence.sum(axis=-1).mean()

    legal = jnp.ones((4, 3), bool).at[1, 2].set(False)
    return loss_fn, {"w": weights(0, 2, 3)}, (ramp(4, 2), ramp(4, 3), legal)


@forward("sub", "infinity_minus_infinity")
def margin_between_two_masked_candidates():
    def margin(scores, allowed):
        best, _ = jax.lax.top_k(jnp.where(allowed, scores, -jnp.inf), 3)
        return best[1] - best[2]  # <- here

    def loss_fn(w, x, allowed):
        return -jnp.mean(jax.vmap(margin)(x @ w, allowed))

    allowed = jnp.ones((4, 5), bool).at[2, 1:].set(False)
    return loss_fn, weights(0, 3, 5), (ramp(4, 3), allowed)


@forward("log", "masked_row")
def logsumexp_of_a_padded_row():
    def loss_fn(w, x, mask):
        energy = jnp.where(mask, x @ w, -jnp.inf)
        return -jnp.mean(jax.nn.logsumexp(energy, axis=-1))  # <- here

    mask = jnp.ones((4, 5), bool).at[3].set(False)
    return loss_fn, weights(0, 3, 5), (ramp(4, 3), mask)


@forward("div", "empty_mean")
def masked_loss_without_a_token():
    def loss_fn(params, tokens, targets, mask):
        logits = params["embedding"][tokens] @ params["readout"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(losses * mask) / jnp.sum(mask)  # <- here

    params = {"embedding": weights(0, 8, 4), "readout": weights(1, 4, 8)}
    tokens = jnp.arange(8).reshape(2, 4)
    return loss_fn, params, (tokens, 7 - tokens, jnp.zeros((2, 4)))


@forward("div", "empty_mean")
def mean_of_an_empty_slice():
    def loss_fn(w, x, y):
        losses = (jnp.tanh(x @ w) - y) ** 2
        warm, rest = losses[:8], losses[8:]
        return jnp.mean(warm) + jnp.mean(rest)  # <- here

    return loss_fn, jnp.ones(3), (ramp(8, 3), jnp.zeros(8))


@forward("div", "empty_mean")
def mean_where_nothing_is_selected():
    def loss_fn(w, x, y):
        error = x @ w - y
        hard = jnp.abs(error) > 100.0
        return jnp.mean(error**2, where=hard)  # <- here

    return loss_fn, jnp.ones(3), (ramp(8, 3), jnp.zeros(8))


@forward("div", "empty_mean", device_count=2)
def shard_without_a_valid_example():
    def local(w, x, valid):
        error = jnp.sum(valid * (x @ w) ** 2)
        mean = error / jnp.sum(valid)  # <- here
        return jax.lax.pmean(mean, "data")

    def loss_fn(w, x, valid):
        mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
        data, everywhere = PartitionSpec("data"), PartitionSpec()
        specs = (everywhere, data, data)
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=everywhere)(w, x, valid)

    return loss_fn, jnp.ones(3), (ramp(8, 3), jnp.repeat(jnp.array([1.0, 0.0]), 4))


@forward("log", "log_of_zero", device_count=2)
def pmapped_probability_of_zero():
    def local(w, x):
        p = jnp.mean(jax.nn.relu(x @ w))
        return -jnp.log(p)  # <- here

    def loss_fn(w, x):
        losses = jax.pmap(local, in_axes=(None, 0), devices=jax.devices()[:2])(w, x)
        return losses.mean()

    x = jnp.stack([jnp.ones((4, 3)), -jnp.ones((4, 3))])
    return loss_fn, jnp.ones(3), (x,)


@forward("acos", "edge_of_range")
def rotation_angle_beyond_its_range():
    def loss_fn(rotation, target):
        trace = jnp.trace(rotation @ target.T)
        angle = jnp.arccos((trace - 1.0) / 2.0)  # <- here
        return angle**2

    return loss_fn, 1.001 * jnp.eye(3), (jnp.eye(3),)


@forward("cholesky", "not_positive_definite")
def gaussian_process_of_duplicate_points():
    def loss_fn(params, x, y):
        distance = (x[:, None] - x[None, :]) ** 2
        kernel = jnp.exp(params["log_amplitude"] - distance * jnp.exp(params["log_scale"]))
        factor = jnp.linalg.cholesky(kernel)  # <- here
        white = jax.scipy.linalg.solve_triangular(factor, y, lower=True)
        return 0.5 * jnp.sum(white**2) + jnp.sum(jnp.log(jnp.diag(factor)))

    params = {"log_amplitude": jnp.array(0.0), "log_scale": jnp.array(0.0)}
    return loss_fn, params, (jnp.array([0.0, 0.0, 3.0]), jnp.array([1.0, 2.0, 0.0]))


@forward("cholesky", "not_positive_definite")
def log_density_of_an_indefinite_covariance():
    def loss_fn(params, x):
        cov = params["root"] + params["root"].T

        def log_density(x):
            return multivariate_normal.logpdf(x, params["mean"], cov)  # <- here

        return -jnp.mean(jax.vmap(log_density)(x))

    params = {"mean": jnp.zeros(2), "root": jnp.array([[1.0, 2.0], [2.0, 1.0]])}
    return loss_fn, params, (ramp(6, 2),)


@forward("triangular_solve lu custom_linear_solve", "singular_matrix")
def least_squares_with_a_duplicate_feature():
    def loss_fn(scale, x, y):
        x = scale * x
        coefficients = jnp.linalg.solve(x.T @ x, x.T @ y)  # <- here
        return jnp.mean((x @ coefficients - y) ** 2)

    x = jnp.array([[1.0, 1.0], [2.0, 2.0], [0.0, 0.0], [1.0, 1.0]])
    return loss_fn, jnp.array(1.0), (x, jnp.array([1.0, 0.0, 2.0, 1.0]))


@forward("triangular_solve lu custom_linear_solve", "singular_matrix")
def inverse_of_a_rank_one_metric():
    def loss_fn(params, gradient):
        metric = params["direction"][:, None] * params["direction"][None, :]
        natural = jnp.linalg.inv(metric) @ gradient  # <- here
        return jnp.dot(natural, gradient)

    return loss_fn, {"direction": jnp.array([1.0, 2.0])}, (jnp.array([1.0, -1.0]),)
