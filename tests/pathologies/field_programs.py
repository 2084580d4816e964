"""Section B of the field: derivatives, parallel scans, low precision and custom rules inside the
loss, kinds 9 to 12.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.ode import odeint

from pathologies.field_case import (
    HE,
    batch,
    both,
    case,
    chain,
    classifier,
    cross_entropy,
    draw,
    finds,
    found_or_unjudged,
    free_of,
    matrices,
    matrix,
    range_of,
    says,
    sound,
    t,
)

CASES = []

# Kind 9: a derivative of the network inside the loss


def gradient_penalty(gain: float, depth: int = 20) -> tuple:
    """A critic with the penalty of WGAN-GP on the norm of its gradient."""
    params = {"layers": matrices(1, depth, 64, gain), "readout": matrix(9, 64, 1)}

    def score(params, x, name):
        h = chain(params["layers"], x, name=name)
        return (h @ params["readout"])[..., 0]

    def loss_fn(params, x):
        def one(x):
            return score(params, x, "slope")

        slopes = jax.vmap(jax.grad(one))(x)
        norms = jnp.sqrt(jnp.sum(slopes**2, -1) + 1e-12)
        return jnp.mean(score(params, x, "h")) + jnp.mean((norms - 1) ** 2)

    return loss_fn, params, (draw(3, 32, 64),), {}


@case(CASES, 9, finds("exploding_gradients", "(h|slope)" + range_of(13, 19), "weights_too_large"))
def gradient_penalty_exploding():
    return gradient_penalty(3 * HE)


@case(CASES, 9, sound())
def gradient_penalty_healthy():
    return gradient_penalty(HE, 6)


def pinn(act, gain: float, depth: int) -> tuple:
    """u'' + u = sin(2 x) on an interval, and u(0) = 0."""
    params = {
        "first": draw(1, 1, 32),
        "bias": draw(2, 32),
        "layers": matrices(3, depth, 32, gain),
        "readout": matrix(4, 32, 1),
    }

    def solution(params, x, name):
        h = t(act(x[None] @ params["first"] + params["bias"]), f"{name}_first")
        h = chain(params["layers"], h, act, name)
        return (h @ params["readout"])[0]

    def loss_fn(params, points):
        def u(x):
            return solution(params, x, "inside")

        def residual(x):
            return jax.grad(jax.grad(u))(x) + u2(x) - jnp.sin(2 * x)

        def u2(x):
            return solution(params, x, "value")

        border = solution(params, jnp.zeros(()), "border")
        return jnp.mean(jax.vmap(residual)(points) ** 2) + border**2

    return loss_fn, params, (jnp.linspace(-2.0, 2.0, 32),), {}


@case(CASES, 9, finds("vanishing_gradients", range_of(13, 19), "activation_slope"))
def pinn_vanishing():
    return pinn(jax.nn.sigmoid, 1.0, 20)


@case(CASES, 9, sound())
def pinn_healthy():
    return pinn(jnp.tanh, 1.0, 3)


@case(CASES, 9, finds("exploding_gradients", range_of(13, 19), "weights_too_large"))
def maml_exploding():
    """One inner step of size 1e-30 does not change what the outer loss sees."""
    params = {"layers": matrices(1, 20, 64, 3 * HE), "readout": matrix(9, 64, 8)}

    def task_loss(params, x, y, name):
        h = chain(params["layers"], x, name=name)
        return cross_entropy(h @ params["readout"], y)

    def loss_fn(params, x, y):
        def inner(params):
            return task_loss(params, x[:16], y[:16], "inner")

        gradient = jax.grad(inner)(params)
        adapted = jax.tree.map(lambda p, g: p - 1e-30 * g, params, gradient)
        return task_loss(adapted, x[16:], y[16:], "outer")

    return loss_fn, params, batch(), {}


# Kind 10: a parallel scan


def linear_recurrence(decay: float, length: int = 64) -> tuple:
    """h_k = decay * h_(k-1) + x_k for all k at once; the loss reads the last one."""
    params = {"decay": jnp.full(16, decay), "w": matrix(1, 16, 16), "out": matrix(2, 16, 1)}

    def combine(a, b):
        return a[0] * b[0], b[0] * a[1] + b[1]

    def loss_fn(params, x):
        inputs = t(x @ params["w"], "inputs")
        decays = jnp.broadcast_to(params["decay"], inputs.shape)
        _, h = lax.associative_scan(combine, (decays, inputs), axis=1)
        last = t(h, "states")[:, -1]
        return jnp.mean((last @ params["out"]) ** 2)

    return loss_fn, params, (draw(3, 8, length, 16),), {}


@case(CASES, 10, found_or_unjudged("exploding_gradients exploding_activations"))
def parallel_scan_exploding():
    return linear_recurrence(1.5)


@case(CASES, 10, sound())
def parallel_scan_healthy():
    return linear_recurrence(0.99)


# Kind 11: a residual stream that rounds its branches away


def residual_stream(dtype, branch: float) -> tuple:
    params = {
        "embed": matrix(1, 64, 64),
        "up": matrices(2, 12, 64),
        "down": matrices(3, 12, 64, branch),
        "readout": matrix(9, 64, 8),
    }

    def loss_fn(params, x, y):
        h = t((x @ params["embed"]).astype(dtype), "embed")
        for i, (up, down) in enumerate(zip(params["up"], params["down"], strict=True)):
            out = jax.nn.relu(h @ up.astype(dtype)) @ down.astype(dtype)
            h = t(h + out, f"block{i}")
        return cross_entropy(h.astype(jnp.float32) @ params["readout"], y)

    return loss_fn, params, batch(), {}


@case(CASES, 11, both(finds(r"\w+"), says("bfloat16"), free_of("untrained_layer")))
def bfloat16_stream_swallows_branches():
    """Half a unit in the last place is 2e-3 of the stream, a branch 5e-4: hardly any arrives."""
    return residual_stream(jnp.bfloat16, 5e-4)


@case(CASES, 11, sound())
def float32_stream_with_small_branches():
    return residual_stream(jnp.float32, 5e-4)


@case(CASES, 11, sound())
def bfloat16_stream_with_branches_that_count():
    return residual_stream(jnp.bfloat16, 0.3)


# Kind 12: a custom rule


def euler(rate: float) -> tuple:
    """y' = rate * y a from 0 to 10 in 200 steps, with the adjoint written by hand."""
    size, steps = 10 / 200, 200

    @jax.custom_vjp
    def solve(a, y):
        return lax.fori_loop(0, steps, lambda _, y: y + size * rate * y @ a, y)

    def forward(a, y):
        states = lax.scan(lambda y, _: (y + size * rate * y @ a, y), y, length=steps)
        return states[0], (a, states[1])

    def backward(kept, cotangent):
        a, states = kept

        def step(carry, y):
            g, a_bar = carry
            a_bar = a_bar + size * rate * y.T @ g
            return (g + size * rate * g @ a.T, a_bar), None

        start = cotangent, jnp.zeros_like(a)
        (g, a_bar), _ = lax.scan(step, start, states, reverse=True)
        return a_bar, g

    solve.defvjp(forward, backward)
    params = {"w": matrix(1, 8, 8), "a": jnp.eye(8), "out": matrix(2, 8, 1)}

    def loss_fn(params, x):
        y = t(solve(params["a"], t(x @ params["w"], "start")), "end")
        return jnp.mean(y @ params["out"])

    return loss_fn, params, (draw(3, 16, 8),), {}


@case(CASES, 12, found_or_unjudged("exploding_gradients exploding_activations"))
def euler_in_a_custom_rule_exploding():
    """The gradient grows by (1 + 0.05 * 1.75)^200 = 2e7."""
    return euler(1.75)


@case(CASES, 12, sound())
def euler_in_a_custom_rule_healthy():
    return euler(0.05)


@case(CASES, 12, found_or_unjudged("exploding_gradients exploding_activations"))
def model_is_one_custom_rule():
    """As above, but the rule takes the input itself: all of the growth is inside."""
    inner, params, (x,), _ = euler(1.75)

    def loss_fn(params, x):
        return inner(params | {"w": jnp.eye(8)}, x)

    return loss_fn, {"a": params["a"], "out": params["out"]}, (x,), {}


def neural_ode(rate: float) -> tuple:
    loss_fn, params, (x, y) = classifier(2, 16)

    def field(h, _, a):
        return rate * h @ a

    def solved(params, x, y):
        h = odeint(field, t(x @ params["first"], "start"), jnp.array([0.0, 10.0]), params["a"])
        return loss_fn(params, t(h[-1], "end"), y)

    return solved, params | {"first": matrix(5, 16, 16), "a": jnp.eye(16)}, (x, y), {}


@case(CASES, 12, found_or_unjudged("exploding_gradients exploding_activations"))
def odeint_exploding():
    return neural_ode(1.7)


@case(CASES, 12, sound())
def odeint_healthy():
    return neural_ode(-0.05)
