"""Plain programs with a finite loss whose gradient is not finite; a forward line is marked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from pathologies.nonfinite_case import Broken, broken, ramp, weights

CASES: list[Broken] = []
backward = functools.partial(broken, CASES, "backward")


@backward("sqrt", "double_where")
def where_sqrt():
    def loss_fn(w, x):
        z = x @ w
        root = jnp.where(z > 0, jnp.sqrt(z), 0.0)  # <- here
        return jnp.mean(root)

    return loss_fn, jnp.ones(2), (ramp(8, 2),)


@backward("sqrt", "slope_at_zero")
def root_of_a_clipped_variance():
    def loss_fn(params, x):
        second_moment = jnp.maximum(x @ params["w"], 0.0)
        std = jnp.sqrt(second_moment)  # <- here
        return jnp.mean(jnp.log(std + 1e-3))

    return loss_fn, {"w": weights(0, 3, 4)}, (ramp(6, 3),)


@backward("sqrt", "slope_at_zero")
def pairwise_distances_with_the_diagonal():
    def loss_fn(positions, bond):
        difference = positions[:, None] - positions[None, :]
        squared = jnp.sum(difference**2, axis=-1)
        distance = jnp.sqrt(squared)  # <- here
        return jnp.mean((distance - bond) ** 2)

    return loss_fn, weights(0, 4, 3), (jnp.ones((4, 4)),)


@backward("sqrt", "slope_at_zero")
def second_of_two_norms():
    def loss_fn(params, x):
        h = jnp.tanh(x @ params["w1"])
        scale = jnp.linalg.norm(h, axis=-1)
        residual = h @ params["w2"]
        correction = jnp.linalg.norm(residual, axis=-1)  # <- here
        return jnp.mean(scale + correction)

    params = {"w1": weights(0, 3, 4), "w2": jnp.zeros((4, 4))}
    return loss_fn, params, (ramp(6, 3, low=0.1),)


@backward("sqrt", "slope_at_zero")
def standard_deviation_of_a_constant_batch():
    @jax.checkpoint
    def normalise(h):
        mean = jnp.mean(h, axis=0, keepdims=True)
        std = jnp.std(h, axis=0, keepdims=True)  # <- here
        return (h - mean) / (std + 1e-5)

    def loss_fn(params, x, y):
        h = normalise(x @ params["w1"])
        return jnp.mean((jnp.tanh(h) @ params["w2"] - y) ** 2)

    params = {"w1": jnp.zeros((3, 4)), "w2": weights(1, 4, 1)}
    return loss_fn, params, (ramp(8, 3), jnp.ones((8, 1)))


@backward("pow", "slope_at_zero")
def focal_loss_of_a_certain_prediction():
    def loss_fn(w, x):
        p = jax.nn.sigmoid(x @ w)
        focus = (1.0 - p) ** 0.5  # <- here
        return -jnp.mean(focus * jnp.log(p))

    return loss_fn, jnp.ones(2), (jnp.array([[0.5, 1.0], [20.0, 30.0], [1.0, -2.0]]),)


@backward("cbrt", "slope_at_zero")
def cube_root_in_a_branch_of_a_switch():
    def cube_root(x):
        return jnp.cbrt(x)  # <- here

    def loss_fn(params, x, kind):
        total = jnp.mean(x @ params["w"])
        return jax.lax.switch(kind, [jnp.sin, cube_root, jnp.tanh], total) + total

    return loss_fn, {"w": jnp.zeros(3)}, (ramp(4, 3), jnp.array(1))


@backward("acos", "edge_of_range")
def angle_between_equal_directions():
    def loss_fn(params, target):
        q = params["quaternion"]
        angle = 2.0 * jnp.arccos(jnp.dot(q, target))  # <- here
        return angle**2

    identity = jnp.array([1.0, 0.0, 0.0, 0.0])
    return loss_fn, {"quaternion": identity}, (identity,)


@backward("asin", "edge_of_range")
def latitude_of_the_pole_in_a_cond():
    def latitude(z):
        return jnp.arcsin(z)  # <- here

    def loss_fn(point, target, spherical):
        z = point[2] / jnp.linalg.norm(point)
        return (jax.lax.cond(spherical, latitude, jnp.cos, z) - target) ** 2

    return loss_fn, jnp.array([0.0, 0.0, -2.0]), (jnp.array(0.5), jnp.array(True))


@backward("div", "double_where")
def masked_inverse_distance():
    def loss_fn(params, features):
        positions = params["positions"]
        squared = jnp.sum((positions[:, None] - positions[None, :]) ** 2, axis=-1)
        inverse = 1.0 / squared  # <- here
        weight = jnp.where(squared > 0, inverse, 0.0)
        return jnp.mean((weight @ features) ** 2)

    return loss_fn, {"positions": weights(0, 4, 2)}, (ramp(4, 3),)


@backward("div", "double_where")
def proportions_where_the_total_is_positive():
    def proportions(v):
        total = jnp.sum(v)
        fraction = v / total  # <- here
        return jnp.where(total > 0, fraction, jnp.zeros_like(v))

    def loss_fn(w, x):
        return jnp.mean(jax.vmap(proportions)(x @ w)[:, 0])

    return loss_fn, jnp.ones((3, 2)), (ramp(5, 3, low=0.2).at[3].set(0.0),)


@backward("exp", "double_where")
def softplus_with_a_linear_branch():
    def softplus(x):
        smooth = jnp.log1p(jnp.exp(x))  # <- here
        return jnp.where(x < 20.0, smooth, x)

    def loss_fn(params, x):
        return jnp.mean(softplus(x @ params["w"]))

    return loss_fn, {"w": jnp.ones((3, 2))}, (60.0 * ramp(4, 3),)


@backward("sqrt", "double_where")
def vmapped_select_of_a_root():
    def activation(x):
        concave, bounded = jnp.sqrt(x), jnp.tanh(x)  # <- here
        return jax.lax.select(x > 0, concave, bounded)

    def loss_fn(w, x):
        return jnp.mean(jax.vmap(activation)(x @ w))

    return loss_fn, jnp.ones(2), (ramp(6, 2),)


@backward("log", "double_where")
def nan_to_num_of_a_log():
    def loss_fn(params, counts):
        rate = params["root"] ** 2
        log_rate = jnp.nan_to_num(jnp.log(rate), neginf=0.0)  # <- here
        return jnp.mean(rate - counts * log_rate)

    return loss_fn, {"root": jnp.array([0.5, 1.0, 0.0])}, (jnp.array([1.0, 2.0, 0.0]),)


@backward("sqrt", "double_where")
def nan_mean_of_roots():
    def loss_fn(params, x):
        discriminant = x**2 - params["offset"]
        return jnp.nanmean(jnp.sqrt(discriminant))  # <- here

    return loss_fn, {"offset": jnp.array(0.5)}, (ramp(8),)


@backward("eigh", "degenerate_spectrum")
def whitening_by_an_identity_covariance():
    def loss_fn(params, x):
        values, vectors = jnp.linalg.eigh(params["covariance"])  # <- here
        white = x @ (vectors / jnp.sqrt(values)[None]) @ vectors.T
        return jnp.mean(jnp.tanh(white) ** 2)

    return loss_fn, {"covariance": jnp.eye(3)}, (ramp(5, 3),)


@backward("svd", "degenerate_spectrum")
def nearest_rotation_by_svd():
    def loss_fn(matrix, x, y):
        u, _, vt = jnp.linalg.svd(matrix, full_matrices=False)  # <- here
        return jnp.mean((x @ (u @ vt) - y) ** 2)

    x = ramp(5, 3)
    return loss_fn, 2.0 * jnp.eye(3), (x, jnp.roll(x, 1, axis=1))


@backward("div custom_vjp_call", "division_by_zero")
def rule_of_a_custom_vjp_divides_by_zero():
    @jax.custom_vjp
    def normalise(v):
        return v / jnp.maximum(jnp.sum(jnp.abs(v)), 1e-6)

    def normalise_forward(v):
        return normalise(v), (v, jnp.sum(jnp.abs(v)))

    def normalise_backward(residuals, cotangent):
        v, total = residuals
        projected = cotangent - jnp.sum(cotangent * v)
        return (projected / total,)  # <- here

    normalise.defvjp(normalise_forward, normalise_backward)

    def loss_fn(params, target):
        return jnp.sum((normalise(params["v"]) - target) ** 2)

    return loss_fn, {"v": jnp.zeros(3)}, (jnp.array([0.2, 0.3, 0.5]),)


@backward("div custom_jvp_call", "division_by_zero")
def rule_of_a_custom_jvp_divides_by_zero():
    @jax.custom_jvp
    def root(x):
        return jnp.sqrt(jnp.maximum(x, 0.0))

    @root.defjvp
    def root_jvp(primals, tangents):
        y = root(*primals)
        return y, tangents[0] / (2.0 * y)  # <- here

    def loss_fn(params, x):
        return jnp.sum(root(params["scale"] * x))

    return loss_fn, {"scale": jnp.array(2.0)}, (jnp.array([1.0, 0.0, 3.0]),)


@backward("sqrt", "slope_at_zero", iteration=11)
def trajectory_through_its_target():
    def loss_fn(params, target):
        def step(position, _):
            squared = jnp.sum((position - target) ** 2)
            distance = jnp.sqrt(squared)  # <- here
            return position + params["velocity"], distance

        _, distances = jax.lax.scan(step, params["start"], length=20)
        return jnp.mean(distances)

    params = {"start": jnp.zeros(2), "velocity": jnp.array([1.0, 2.0])}
    return loss_fn, params, (jnp.array([11.0, 22.0]),)


@backward("pow", "slope_at_zero", iteration=3)
def sparse_penalty_in_a_fori_loop():
    def loss_fn(x, centres):
        def add(i, total):
            return total + jnp.abs(x - centres[i]) ** 0.5  # <- here

        return jax.lax.fori_loop(0, 6, add, jnp.zeros(()))

    return loss_fn, jnp.array(3.0), (jnp.arange(6.0),)


@backward("convert_element_type", "loss_scale")
def float16_loss_scale():
    def loss_fn(params, x, y):
        w1, w2 = (params[name].astype(jnp.float16) for name in ("w1", "w2"))
        hidden = jnp.tanh(x.astype(jnp.float16) @ w1)
        logits = hidden @ w2
        logits = logits.astype(jnp.float32)  # <- here
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss * 2.0**24

    params = {"w1": weights(0, 3, 8), "w2": weights(1, 8, 4)}
    return loss_fn, params, (ramp(8, 3), jnp.arange(8) % 4)


@backward("log", "overflow")
def log_of_a_small_probability_in_float16():
    def loss_fn(logits, labels):
        p = jax.nn.softmax(logits, axis=-1)
        picked = jnp.take_along_axis(p, labels[:, None], axis=-1)
        return -jnp.sum(jnp.log(picked))  # <- here

    logits = jnp.array([[0, 12], [2, 1]], jnp.float16)
    return loss_fn, logits, (jnp.array([0, 1]),)


@backward("div", "overflow")
def precision_of_a_small_scale_in_float16():
    def loss_fn(params, error):
        precision = 1.0 / params["scale"]  # <- here
        return jnp.mean(error * precision)

    scale = jnp.array([1.0, 0.002], jnp.float16)
    return loss_fn, {"scale": scale}, (jnp.array([1.0, 1.0], jnp.float16),)


@backward("sqrt", "slope_at_zero")
def optax_norm_of_adapters_at_zero():
    def loss_fn(params, x, y):
        h = jnp.tanh(x @ params["base"] + x @ params["lora"]["a"] @ params["lora"]["b"])
        error = optax.losses.squared_error(h, y).mean()
        return error + 0.01 * optax.tree.norm(params["lora"]["b"])  # <- here

    lora = {"a": weights(1, 3, 2), "b": jnp.zeros((2, 4))}
    return loss_fn, {"base": weights(0, 3, 4), "lora": lora}, (ramp(5, 3), jnp.ones((5, 4)))


@backward("sqrt", "slope_at_zero", device_count=2)
def norm_of_a_padding_row_in_a_shard():
    def local(w, x):
        norms = jnp.linalg.norm(x @ w, axis=-1)  # <- here
        return jax.lax.pmean(jnp.mean(norms), "batch")

    def loss_fn(params, x):
        mesh = Mesh(np.array(jax.devices()[:2]), ("batch",))
        specs = (PartitionSpec(), PartitionSpec("batch"))
        mean_norm = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
        return mean_norm(params["w"], x)

    return loss_fn, {"w": weights(0, 3, 4)}, (ramp(8, 3, low=0.2).at[6].set(0.0),)
