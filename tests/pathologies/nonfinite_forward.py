"""Plain programs whose forward pass is not finite, and the line that is to blame."""

import functools

import jax
import jax.numpy as jnp

from pathologies.nonfinite_case import Broken, broken, ramp, weights

CASES: list[Broken] = []
forward = functools.partial(broken, CASES, "forward")


@forward("log", "log_of_zero", iteration=37)
def scan_fails_at_step_37():
    def loss_fn(params, inflow):
        def step(level, flow):
            pressure = jnp.log(level)  # <- here
            return level - params["drain"] + flow, pressure

        _, pressures = jax.lax.scan(step, params["level"], inflow)
        return -jnp.mean(pressures)

    return loss_fn, {"drain": jnp.array(1.0), "level": jnp.array(37.0)}, (jnp.zeros(50),)


@forward("log", "log_of_zero")
def entropy_of_a_certain_policy():
    def loss_fn(params, observations):
        hidden = jnp.tanh(observations @ params["hidden"])
        p = jax.nn.softmax(500.0 * hidden @ params["policy"])
        entropy = -jnp.sum(p * jnp.log(p), axis=-1)  # <- here
        return -jnp.mean(entropy)

    return loss_fn, {"hidden": weights(0, 4, 8), "policy": weights(1, 8, 3)}, (ramp(6, 4),)


@forward("log", "log_of_zero")
def likelihood_as_a_product():
    def loss_fn(w, x):
        p = jax.nn.sigmoid(x @ w)
        likelihood = jnp.prod(p)
        return -jnp.log(likelihood)  # <- here

    return loss_fn, jnp.full(2, -6.0), (jnp.ones((16, 2)),)


@forward("log", "log_of_zero")
def log_of_a_vanishing_determinant():
    def loss_fn(params, eps):
        determinant = jnp.linalg.det(params["scale"])
        log_q = -0.5 * jnp.sum(eps**2, axis=-1)
        return jnp.mean(log_q) - jnp.log(jnp.abs(determinant))  # <- here

    return loss_fn, {"scale": jnp.array([[1.0, 2.0], [2.0, 4.0]])}, (ramp(8, 2),)


@forward("log", "log_of_negative")
def box_cox_of_a_negative_value():
    def loss_fn(params, x):
        transformed = jnp.log(x + params["shift"])  # <- here
        return jnp.var(transformed) - jnp.mean(transformed)

    return loss_fn, {"shift": jnp.array(0.5)}, (ramp(8),)


@forward("log1p", "log_of_negative")
def log_return_below_minus_one():
    @jax.jit
    def log_wealth(returns):
        return jnp.sum(jnp.log1p(returns))  # <- here

    def loss_fn(allocation, returns):
        return -log_wealth(returns @ jax.nn.softmax(allocation) * 3.0)

    return loss_fn, jnp.zeros(4), (ramp(8, 4, low=-0.6, high=0.6),)


@forward("sqrt", "root_of_negative")
def parabola_without_roots():
    def loss_fn(params, target):
        a, b, c = params["a"], params["b"], params["c"]
        root = jnp.sqrt(b**2 - 4.0 * a * c)  # <- here
        return (target - (root - b) / (2.0 * a)) ** 2

    params = {"a": jnp.array(1.0), "b": jnp.array(1.0), "c": jnp.array(2.0)}
    return loss_fn, params, (jnp.array(0.5),)


@forward("sqrt", "root_of_negative", iteration=7)
def diffusion_step_above_one():
    def loss_fn(params, x, noise):
        def diffuse(alpha, eps):
            noised = jnp.sqrt(alpha) * x + jnp.sqrt(1.0 - alpha) * eps  # <- here
            return alpha + params["slope"], jnp.mean((noised * params["w"] - eps) ** 2)

        _, losses = jax.lax.scan(diffuse, jnp.array(0.25), noise)
        return losses.mean()

    params = {"slope": jnp.array(0.125), "w": jnp.array(0.3)}
    return loss_fn, params, (ramp(4), ramp(8, 4))


@forward("sqrt", "root_of_negative")
def sine_of_an_unnormalised_cosine():
    @jax.checkpoint
    def torque(w, x):
        cosine = jnp.tanh(x @ w) * 1.5
        sine = jnp.sqrt(1.0 - cosine**2)  # <- here
        return sine * cosine

    def loss_fn(w, x):
        return jnp.mean(torque(w, x) ** 2)

    return loss_fn, jnp.full((3, 2), 4.0), (ramp(8, 3),)


@forward("pow", "power_of_negative")
def gamma_correction_of_a_negative_pixel():
    def loss_fn(params, image):
        linear = image @ params["colour"]
        srgb = linear ** (1 / 2.2)  # <- here
        return jnp.mean(srgb)

    return loss_fn, {"colour": jnp.eye(3)}, (ramp(8, 3, low=-0.05),)


@forward("div", "zero_over_zero")
def cosine_similarity_of_a_zero_vector():
    def cosine(a, b):
        norms = jnp.linalg.norm(a) * jnp.linalg.norm(b)
        return jnp.dot(a, b) / norms  # <- here

    def loss_fn(params, words, others):
        embedded = params["table"][words]
        return -jnp.mean(jax.vmap(cosine)(embedded, others))

    table = weights(0, 8, 4).at[0].set(0.0)
    return loss_fn, {"table": table}, (jnp.array([3, 1, 0, 2]), ramp(4, 4, low=1.0, high=2.0))


@forward("div", "zero_over_zero")
def min_max_scaling_of_a_constant_feature():
    def loss_fn(w, x, y):
        low, high = x.min(axis=0, keepdims=True), x.max(axis=0, keepdims=True)
        scaled = (x - low) / (high - low)  # <- here
        return jnp.mean((scaled @ w - y) ** 2)

    x = ramp(8, 3).at[:, 1].set(4.0)
    return loss_fn, jnp.ones(3), (x, jnp.ones(8))


@forward("div", "division_by_zero")
def percentage_error_of_a_zero_target():
    def loss_fn(params, x, y):
        prediction = jnp.tanh(x @ params["w1"]) @ params["w2"]
        error = jnp.abs((prediction - y) / y)  # <- here
        return 100.0 * error.mean()

    y = jnp.array([[1.0], [2.0], [0.0], [3.0]])
    return loss_fn, {"w1": weights(0, 3, 8), "w2": weights(1, 8, 1)}, (ramp(4, 3) + 2.0, y)


@forward("div", "division_by_zero")
def coulomb_energy_with_the_diagonal():
    def loss_fn(params, charges):
        positions = params["positions"]
        distance = jnp.abs(positions[:, None] - positions[None, :])
        energy = charges[:, None] * charges[None, :] / distance  # <- here
        return 0.5 * jnp.sum(energy)

    return loss_fn, {"positions": ramp(5)}, (jnp.ones(5),)


@forward("div", "division_by_zero", iteration=1)
def newton_reaches_a_flat_point():
    def newton(start, offset):
        def step(state):
            i, x = state
            return i + 1, x - (x**2 + offset) / (2.0 * x)  # <- here

        return jax.lax.while_loop(lambda state: state[0] < 5, step, (0, start))[1]

    def loss_fn(params, offset):
        root = newton(jax.lax.stop_gradient(params["start"]), offset)
        return (params["readout"] * root - 1.0) ** 2

    return loss_fn, {"start": jnp.array(1.0), "readout": jnp.array(0.5)}, (jnp.array(1.0),)


@forward("div", "zero_over_zero", iteration=2)
def power_iteration_of_a_nilpotent_matrix():
    def spectral_norm(matrix, v):
        def step(_, v):
            v = matrix @ v
            return v / jnp.linalg.norm(v)  # <- here

        return jnp.linalg.norm(matrix @ jax.lax.fori_loop(0, 6, step, v))

    def loss_fn(params, v):
        return spectral_norm(params["recurrent"], v)

    return loss_fn, {"recurrent": jnp.eye(3, k=1)}, (jnp.array([0.0, 0.0, 1.0]),)


@forward("log", "log_of_zero")
def branch_of_a_cond_takes_a_log():
    def relative(x):
        return jnp.log(x)  # <- here

    def loss_fn(params, x, relative_error):
        total = jnp.sum(jax.nn.relu(x @ params["w"]))
        return jax.lax.cond(relative_error, relative, jnp.square, total)

    return loss_fn, {"w": -jnp.ones((3, 2))}, (jnp.ones((4, 3)), jnp.array(True))


@forward("atanh", "edge_of_range")
def branch_of_a_switch_takes_arctanh():
    def fisher(r):
        return jnp.arctanh(r)  # <- here

    def loss_fn(w, x, kind):
        r = jnp.sign(jnp.mean(x @ w))
        return jax.lax.switch(kind, [jnp.sin, jnp.square, fisher], r) + jnp.mean(w)

    return loss_fn, jnp.ones(3), (jnp.ones((4, 3)), jnp.array(2))


@forward("div", "division_by_zero")
def selected_lane_of_a_vmapped_cond():
    def rate(x):
        def inverse(x):
            return 1.0 / x  # <- here

        return jax.lax.cond(x >= 0.0, inverse, jnp.exp, x)

    def loss_fn(scale, x):
        return jnp.mean(jax.vmap(rate)(scale * x))

    return loss_fn, jnp.array(2.0), (jnp.array([-1.0, 0.5, 0.0, 2.0]),)
