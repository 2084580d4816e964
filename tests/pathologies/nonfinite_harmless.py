"""Plain programs in which inf or NaN occurs and reaches neither loss, gradient nor update."""

import jax
import jax.numpy as jnp
import optax

from pathologies.nonfinite_case import Harmless, ramp, weights

CASES: list[Harmless] = []


def harmless(make):
    CASES.append(Harmless(make.__name__, make))
    return make


@harmless
def causal_mask_of_minus_infinity():
    def loss_fn(params, x):
        q, k, v = (x @ params[name] for name in "qkv")
        causal = jnp.tril(jnp.ones((4, 4), bool))
        scores = jnp.where(causal, q @ k.T / 2.0, -jnp.inf)
        return jnp.mean((jax.nn.softmax(scores, axis=-1) @ v) ** 2)

    return loss_fn, {name: weights(i, 3, 4) for i, name in enumerate("qkv")}, (ramp(4, 3),)


@harmless
def mask_of_minus_infinity_as_an_argument():
    def loss_fn(params, x, bias):
        scores = x @ params["w"] @ x.T + bias
        return jnp.mean(jax.nn.log_softmax(scores, axis=-1)[:, 0])

    bias = jnp.triu(jnp.full((4, 4), -jnp.inf), k=1)
    return loss_fn, {"w": weights(0, 3, 3)}, (ramp(4, 3), bias)


@harmless
def softmax_where():
    def loss_fn(w, x, mask):
        p = jax.nn.softmax(x @ w, axis=-1, where=mask)
        return jnp.sum(p[:, 0] ** 2)

    mask = jnp.arange(5)[None] < jnp.array([[2], [5], [1]])
    return loss_fn, weights(0, 3, 5), (ramp(3, 3), mask)


@harmless
def logsumexp_of_masked_entries():
    def loss_fn(w, x, mask):
        energy = jnp.where(mask, x @ w, -jnp.inf)
        return jnp.mean(jax.nn.logsumexp(energy, axis=-1))

    mask = jnp.arange(5)[None] < jnp.array([[2], [5], [1]])
    return loss_fn, weights(0, 3, 5), (ramp(3, 3), mask)


@harmless
def branch_of_a_cond_not_taken():
    def loss_fn(w, x):
        total = jnp.sum(x @ w)
        return jax.lax.cond(total > 0, jnp.log, jnp.square, total)

    return loss_fn, -jnp.ones(3), (jnp.ones((4, 3)),)


@harmless
def branches_of_a_switch_not_taken():
    def loss_fn(w, x, kind):
        r = jnp.mean(x @ w)
        return jax.lax.switch(kind, [jnp.arctanh, jnp.tanh, jnp.sqrt], r)

    return loss_fn, -jnp.ones(3), (jnp.ones((4, 3)), jnp.array(1))


@harmless
def other_lane_of_a_vmapped_cond():
    def activation(x):
        return jax.lax.cond(x > 0, jnp.sqrt, jnp.tanh, x)

    def loss_fn(w, x):
        return jnp.mean(jax.vmap(activation)(x @ w))

    return loss_fn, jnp.ones(2), (ramp(6, 2),)


@harmless
def safe_double_where():
    def log(x):
        positive = x > 0
        return jnp.where(positive, jnp.log(jnp.where(positive, x, 1.0)), 0.0)

    def loss_fn(w, x):
        return jnp.mean(log(x @ w))

    return loss_fn, jnp.ones(2), (ramp(6, 2),)


@harmless
def safe_norm_of_a_zero_vector():
    def norm(v):
        squared = jnp.sum(v**2)
        return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)

    def loss_fn(w, x):
        return jnp.mean(jax.vmap(norm)(x @ w)) + optax.safe_norm(x[2] @ w, 1e-6)

    return loss_fn, weights(0, 3, 2), (ramp(5, 3).at[2].set(0.0),)


@harmless
def constant_lane_unselected_by_where():
    def loss_fn(w, x):
        prior = jnp.where(x > 0, jnp.log(x), 0.0)
        return jnp.mean((w * x - prior) ** 2)

    return loss_fn, jnp.array(0.5), (ramp(6),)


@harmless
def best_so_far_through_a_scan():
    def loss_fn(params, observations):
        def step(best, x):
            best = jnp.minimum(best, (x - params["centre"]) ** 2)
            return best, best

        _, bests = jax.lax.scan(step, jnp.array(jnp.inf), observations)
        return jnp.mean(bests)

    return loss_fn, {"centre": jnp.array(0.3)}, (ramp(8),)


@harmless
def best_so_far_as_an_argument():
    def loss_fn(w, x, state):
        loss = jnp.mean((x @ w - 1.0) ** 2)
        improved = loss < state["best"]
        return loss + jnp.where(improved, 0.1, 0.0) * jnp.sum(w**2)

    return (
        loss_fn,
        jnp.ones(3),
        (ramp(4, 3), {"best": jnp.array(jnp.inf), "patience": jnp.array(3)}),
    )


@harmless
def line_search_that_starts_from_infinity():
    def objective(w, rate, x):
        return jnp.mean((x @ (w - rate * jnp.sign(w)) - 1.0) ** 2)

    def search(w, x):
        def step(state):
            rate, _, current = state
            return rate / 2.0, current, objective(w, rate / 2.0, x)

        start = jnp.array(1.0), jnp.array(jnp.inf), objective(w, 1.0, x)
        return jax.lax.while_loop(lambda state: state[2] < state[1], step, start)[0]

    def loss_fn(w, x):
        rate = search(jax.lax.stop_gradient(w), x)
        return objective(w, rate, x)

    return loss_fn, jnp.ones(3), (ramp(4, 3),)


@harmless
def missing_features_filled_by_where():
    def loss_fn(params, x, y):
        missing = jnp.isnan(x)
        filled = jnp.where(missing, params["fill"][None], x)
        return jnp.mean((filled @ params["w"] - y) ** 2)

    x = ramp(6, 3).at[1, 2].set(jnp.nan).at[4].set(jnp.nan)
    return loss_fn, {"fill": jnp.zeros(3), "w": jnp.ones(3)}, (x, jnp.ones(6))


@harmless
def missing_features_set_to_zero():
    def loss_fn(w, x, y):
        return jnp.mean((jnp.nan_to_num(x, posinf=5.0) @ w - y) ** 2)

    x = ramp(6, 3).at[1, 2].set(jnp.nan).at[0, 0].set(jnp.inf)
    return loss_fn, jnp.ones(3), (x, jnp.ones(6))


@harmless
def missing_targets_left_out():
    def loss_fn(w, x, y):
        observed = ~jnp.isnan(y)
        error = x @ w - jnp.where(observed, y, 0.0)
        return jnp.mean(error**2, where=observed)

    return loss_fn, jnp.ones(3), (ramp(6, 3), ramp(6).at[2].set(jnp.nan))


@harmless
def missing_targets_filled_by_their_mean():
    def loss_fn(w, x, y):
        y = jnp.where(jnp.isnan(y), jnp.nanmean(y), y)
        return jnp.mean(optax.losses.squared_error(x @ w, y))

    return loss_fn, jnp.ones(3), (ramp(6, 3), ramp(6).at[2].set(jnp.nan))


@harmless
def maximum_from_minus_infinity():
    def loss_fn(w, x, valid):
        score = jnp.max(x @ w, axis=1, initial=-jnp.inf, where=valid)
        return jnp.mean(score)

    valid = jnp.arange(5)[None] < jnp.array([[2], [5], [1]])
    return loss_fn, weights(0, 3, 2)[:, 0], (ramp(3, 5, 3), valid)


@harmless
def sampling_from_the_top_k():
    def loss_fn(w, x, token):
        logits = x @ w
        smallest = jax.lax.top_k(logits, 2)[0][:, -1:]
        logits = jnp.where(logits >= smallest, logits, -jnp.inf)
        return jnp.mean(jax.nn.softmax(logits, axis=-1)[:, token])

    return loss_fn, weights(0, 3, 6), (ramp(4, 3), jnp.array(2))


@harmless
def beam_search_scores():
    def loss_fn(params, length):
        log_p = jax.nn.log_softmax(params["transition"], axis=-1)

        def extend(state, _):
            scores, last = state
            candidates = scores[:, None] + log_p[last]
            scores, index = jax.lax.top_k(candidates.reshape(-1), 3)
            return (scores, index % 4), None

        start = jnp.array([0.0, -jnp.inf, -jnp.inf]), jnp.zeros(3, jnp.int32)
        (scores, _), _ = jax.lax.scan(extend, start, length=4)
        return -scores[0] / length

    return loss_fn, {"transition": weights(0, 4, 4)}, (jnp.array(4.0),)


@harmless
def padding_rows_of_nan():
    def loss_fn(params, x, lengths):
        valid = jnp.arange(4.0)[None] < lengths[:, None]
        x = jnp.where(valid[..., None], x, 0.0)
        pooled = jnp.sum(jnp.tanh(x @ params["w"]), axis=1) / lengths[:, None]
        return jnp.mean(pooled**2)

    lengths = jnp.array([2.0, 4.0, 1.0])
    x = ramp(3, 4, 2).at[0, 2:].set(jnp.nan).at[2, 1:].set(jnp.inf)
    return loss_fn, {"w": weights(0, 2, 3)}, (x, lengths)


@harmless
def hidden_markov_model_with_forbidden_transitions():
    def loss_fn(params, symbols):
        allowed = jnp.tril(jnp.ones((3, 3), bool), k=0).T
        transition = jax.nn.log_softmax(jnp.where(allowed, params["transition"], -jnp.inf), axis=-1)
        emission = jax.nn.log_softmax(params["emission"], axis=-1)

        def step(alpha, symbol):
            alpha = jax.nn.logsumexp(alpha[:, None] + transition, axis=0) + emission[:, symbol]
            return alpha, None

        alpha = jnp.array([0.0, -jnp.inf, -jnp.inf])
        alpha, _ = jax.lax.scan(step, alpha, symbols)
        return -jax.nn.logsumexp(alpha)

    params = {"transition": weights(0, 3, 3), "emission": weights(1, 3, 4)}
    return loss_fn, params, (jnp.array([0, 2, 3, 1, 0]),)


@harmless
def alignment_in_log_space():
    def loss_fn(params, x):
        log_p = jax.nn.log_softmax(x @ params["w"], axis=-1)

        def step(alpha, emitted):
            entered = jnp.concatenate([jnp.array([-jnp.inf]), alpha[:-1]])
            return jnp.logaddexp(alpha, entered) + emitted, None

        alpha = jnp.full(3, -jnp.inf).at[0].set(log_p[0, 0])
        alpha, _ = jax.lax.scan(step, alpha, log_p[1:])
        return -alpha[-1]

    return loss_fn, {"w": weights(0, 2, 3)}, (ramp(6, 2),)


@harmless
def connectionist_temporal_classification():
    def loss_fn(params, x, labels):
        logits = x @ params["w"]
        lengths = jnp.array([[0.0, 0.0, 0.0, 0.0, 0.0, 1.0]])
        padding = jnp.zeros((1, 2))
        return optax.losses.ctc_loss(logits, lengths, labels, padding).sum()

    return loss_fn, {"w": weights(0, 2, 4)}, (ramp(1, 6, 2), jnp.array([[1, 3]]))


@harmless
def nearest_neighbour_with_an_infinite_diagonal():
    def loss_fn(params):
        squared = jnp.sum((params[:, None] - params[None, :]) ** 2, axis=-1)
        nearest = jnp.min(jnp.where(jnp.eye(5, dtype=bool), jnp.inf, squared), axis=1)
        return -jnp.mean(nearest)

    return loss_fn, weights(0, 5, 2), ()


@harmless
def median_of_distances_with_an_infinite_diagonal():
    def loss_fn(points):
        distance = jnp.sum((points[:, None] - points[None, :]) ** 2, axis=-1)
        distance = jnp.where(jnp.eye(5, dtype=bool), jnp.inf, distance)
        bandwidth = jax.lax.stop_gradient(jnp.quantile(distance, 0.5))
        return jnp.mean(jnp.exp(-distance / bandwidth))

    return loss_fn, weights(0, 5, 2), ()


@harmless
def shortest_paths_without_an_edge():
    def loss_fn(lengths, edges):
        distance = jnp.where(edges, jax.nn.softplus(lengths), jnp.inf)

        def relax(distance, _):
            through = jnp.min(distance[:, :, None] + distance[None, :, :], axis=1)
            return jnp.minimum(distance, through), None

        distance, _ = jax.lax.scan(relax, distance, length=2)
        return distance[0, 3]

    return loss_fn, weights(0, 4, 4), (jnp.eye(4, k=1, dtype=bool),)


@harmless
def reciprocal_of_an_overflowed_exp():
    def loss_fn(w, x, time):
        decay = 1.0 / (1.0 + jnp.exp(time))
        return jnp.mean(decay * (x @ w) ** 2)

    return loss_fn, jnp.ones(3), (ramp(6, 3), jnp.linspace(0.0, 200.0, 6))


@harmless
def prior_with_a_class_of_probability_zero():
    def loss_fn(w, x, prior, y):
        logits = x @ w + jnp.log(prior)[None]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    prior = jnp.array([0.5, 0.0, 0.25, 0.25])
    return loss_fn, weights(0, 3, 4), (ramp(5, 3), prior, jnp.array([0, 2, 3, 0, 2]))


@harmless
def weights_replaced_where_they_are_not_finite():
    def loss_fn(w, x, weight):
        weight = jnp.where(jnp.isfinite(weight), weight, 0.0)
        return jnp.mean(weight * (x @ w) ** 2)

    return loss_fn, jnp.ones(3), (ramp(6, 3), 1.0 / jnp.array([1.0, 0.0, 2.0, 1.0, 0.0, 4.0]))


@harmless
def diagnostics_behind_stop_gradient():
    def loss_fn(w, x, y):
        error = x @ w - y
        signal_to_noise = jax.lax.stop_gradient(jnp.log(error) / jnp.sqrt(-jnp.abs(error)))
        usable = jnp.all(jnp.isfinite(signal_to_noise))
        return jnp.where(usable, 2.0, 1.0) * jnp.mean(error**2)

    return loss_fn, jnp.ones(3), (ramp(6, 3), jnp.ones(6))


@harmless
def auxiliary_output_of_nan():
    def losses(w, x, y):
        error = x @ w - y
        correlation = jnp.mean((error - error.mean()) * y) / jnp.std(y)
        return jnp.mean(error**2), {"correlation": correlation, "log_error": jnp.log(error)}

    def loss_fn(w, x, y):
        loss, _ = losses(w, x, y)
        return loss

    return loss_fn, jnp.ones(3), (ramp(6, 3), jnp.ones(6))


@harmless
def metrics_from_inside_a_scan():
    def loss_fn(w, x):
        def step(total, x):
            error = (x @ w) ** 2
            return total + error, {"log": jnp.log(-error), "mean": error}

        total, metrics = jax.lax.scan(step, jnp.zeros(()), x)
        return total / len(x) + 0.1 * jnp.max(metrics["mean"])

    return loss_fn, jnp.ones(3), (ramp(6, 3),)


@harmless
def clip_without_an_upper_bound():
    def loss_fn(params, x, low, high):
        scale = jnp.clip(params["scale"], 1e-3, jnp.inf)
        return jnp.mean(jnp.clip(scale * x, low, high))

    bounds = jnp.full(6, -jnp.inf), jnp.full(6, jnp.inf)
    return loss_fn, {"scale": jnp.array(2.0)}, (ramp(6), *bounds)


@harmless
def root_of_a_relu():
    def loss_fn(w, x):
        return jnp.mean(jnp.sqrt(jax.nn.relu(x @ w)))

    return loss_fn, jnp.ones(2), (ramp(8, 2),)


@harmless
def norm_of_the_initial_state():
    def loss_fn(params, x):
        def step(h, x):
            h = h / (jnp.linalg.norm(h) + 1e-6)
            return jnp.tanh(h @ params["recurrent"] + x @ params["input"]), None

        h, _ = jax.lax.scan(step, jnp.zeros(4), x)
        return jnp.mean(h**2)

    return loss_fn, {"recurrent": weights(0, 4, 4), "input": weights(1, 2, 4)}, (ramp(6, 2),)


@harmless
def inverse_distance_to_oneself():
    def loss_fn(positions, charges):
        squared = jnp.sum((positions[:, None] - positions[None, :]) ** 2, axis=-1)
        squared = jnp.where(jnp.eye(4, dtype=bool), jnp.inf, squared)
        return jnp.sum(charges[:, None] * charges[None, :] / jnp.sqrt(squared))

    return loss_fn, weights(0, 4, 3), (jnp.ones(4),)
