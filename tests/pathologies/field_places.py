"""Section C of the field: the right sickness in the wrong place, for the wrong reason, with the
wrong remedy; kinds 13 to 19.
"""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from pathologies.field_case import (
    ANY,
    HE,
    batch,
    both,
    case,
    chain,
    classifier,
    cross_entropy,
    draw,
    either,
    finds,
    free_of,
    matrices,
    matrix,
    plain_input,
    range_of,
    sound,
    t,
)

CASES = []

# Kind 13: NaN made by a derivative


@case(CASES, 13, finds("non_finite", r"^c$", "slope_at_zero", text="sqrt"))
def root_of_zero():
    x, w = plain_input()

    def loss_fn(w, x):
        a = t(x @ w, "a")
        b = t(a * 0, "b")
        c = t(b.sum(-1) ** 2, "c")
        return jnp.mean(jnp.sqrt(c))

    return loss_fn, w, (x,), {}


@case(CASES, 13, finds("non_finite", "layer2", "where|root|slope", text="sqrt"))
def root_outside_of_where():
    x, w = plain_input()

    def loss_fn(w, x):
        h = t(x @ w, "layer1")
        y = t(h @ w, "layer2")
        return jnp.mean(t(jnp.where(y > 0, jnp.sqrt(y), 0), "layer3"))

    return loss_fn, w, (x,), {}


# Kind 14: overflow


@case(CASES, 14, finds("non_finite|exploding_activations", cause="overflow|range", text="exp"))
def exponential_overflows():
    x, w = plain_input()

    def loss_fn(w, x):
        return jnp.mean(t(jnp.exp(100 + t(x @ w, "h")), "e"))

    return loss_fn, w, (x,), {}


@case(CASES, 14, finds("non_finite|exploding_activations", cause="overflow|range", text="mul"))
def product_overflows():
    x, w = plain_input()

    def loss_fn(w, x):
        return jnp.mean(t((1e20 + t(x @ w, "h")) * 1e30, "product"))

    return loss_fn, w, (x,), {}


@case(CASES, 14, finds("non_finite", cause="overflow|loss_scale|range", text="float16"))
def loss_scale_overflows():
    x, w = plain_input()
    w = w.astype(jnp.float16)

    def loss_fn(w, x):
        h = t(x.astype(jnp.float16) @ w, "h")
        return jnp.mean(h**2) * jnp.float16(2.0**12) * jnp.float16(2.0**12)

    return loss_fn, w, (x,), {}


@case(CASES, 14, finds("exploding_activations", cause="weights_too_large"))
def overflow_by_explosion():
    """3.2 times He's gain for 40 layers: an rms of e^46, whose square leaves float32."""
    params = {"layers": matrices(1, 40, 64, 3.2 * HE), "readout": matrix(2, 64, 64)}

    def loss_fn(params, x):
        h = chain(params["layers"], x)
        return jnp.mean((h @ params["readout"]) ** 2)

    return loss_fn, params, (draw(3, 32, 64),), {}


def orthogonal(seed: int, n: int) -> jax.Array:
    return jnp.linalg.qr(draw(seed, n, n))[0]


def identity(z):
    return z


def recurrence(gain: float, steps: int, act=identity) -> tuple:
    """h <- act(h w) + x_k, and a linear read-out of the last one."""
    params = {"w": gain * orthogonal(1, 32), "embed": matrix(2, 8, 32), "out": matrix(3, 32, 1)}

    def loss_fn(params, x):
        def step(h, x):
            h = t(act(h @ params["w"]) + x @ params["embed"], "h")
            return h, None

        h, _ = lax.scan(step, jnp.zeros((x.shape[1], 32)), x)
        return jnp.mean(h @ params["out"])

    return loss_fn, params, (draw(4, steps, 8, 8),), {}


@case(CASES, 14, finds("exploding_activations exploding_gradients", cause="weights_too_large"))
def overflow_over_time():
    """1.4^300 = e^101 is beyond float32."""
    return recurrence(1.4, 300)


# Kind 15: times that leave float32


def nats(expected: float, tolerance: float, names: str):
    """The growth of a finding is as expected, in nats."""

    def right(diagnosis):
        found = [f for f in diagnosis.findings if f.pathology in names.split()]
        growths = [f.evidence.get("growth_nats") for f in found]
        if any(g is not None and abs(g - expected) < tolerance for g in growths):
            return ""
        return f"growth {growths}, not {expected} nats"

    return right


@case(
    CASES,
    15,
    both(finds("vanishing_gradients", r"h\[39\d\]"), nats(-89.0, 1.5, "vanishing_gradients")),
)
def gain_of_0_8_for_400_steps():
    return recurrence(0.8, 400)


@case(
    CASES,
    15,
    both(finds("exploding_gradients", r"h\[39\d\]"), nats(72.7, 1.5, "exploding_gradients")),
)
def gain_of_1_2_for_400_steps():
    return recurrence(1.2, 400)


@case(CASES, 15, both(finds("vanishing_gradients"), nats(-276.5, 3, "vanishing_gradients")))
def gain_of_0_5_for_400_steps():
    return recurrence(0.5, 400)


@case(CASES, 15, sound())
def gain_of_1_for_400_steps():
    return recurrence(1.0, 400)


# Kind 16: gradients that are exactly zero


def scaled_half(log2_scale: int, depth: int = 3, dtype=jnp.float16) -> tuple:
    """A classifier in half precision whose loss is scaled."""
    params = {"layers": matrices(1, depth, 64), "readout": matrix(2, 64, 8)}
    params = jax.tree.map(lambda w: w.astype(dtype), params)
    x, y = batch()

    def loss_fn(params, x, y):
        logits = t(chain(params["layers"], x) @ params["readout"], "logits")
        scale = jnp.asarray(2.0**log2_scale, jnp.float32)
        return cross_entropy(logits.astype(jnp.float32), y) * scale

    return loss_fn, params, (x.astype(dtype), y), {}


@case(CASES, 16, finds("gradient_underflow", text="float16"))
def all_gradients_underflow():
    return scaled_half(-30)


@case(CASES, 16, finds("gradient_underflow", text="float16"))
def half_of_the_entries_underflow():
    return scaled_half(-19)


@case(CASES, 16, sound())
def float16_with_a_good_loss_scale():
    return scaled_half(8)


@case(CASES, 16, sound())
def bfloat16_does_not_underflow():
    return scaled_half(-19, dtype=jnp.bfloat16)


FLAT = "clip|clamp|saturat|flat"


@case(
    CASES,
    16,
    both(free_of("gradient_underflow"), either(finds(ANY, cause=FLAT), finds(ANY, text=FLAT))),
)
def clipped_probabilities_are_saturated():
    """Every example is wrong with a probability clipped at 1e-7: loss 16.1, gradient 0."""
    params = {"layers": matrices(1, 3, 32), "readout": matrix(2, 32, 1)}
    x, _ = batch(width=32)

    def loss_fn(params, x):
        score = t(chain(params["layers"], x) @ params["readout"], "score")
        p = jnp.clip(jax.nn.sigmoid(-100 + score), 1e-7, 1 - 1e-7)
        return -jnp.mean(jnp.log(p))

    return loss_fn, params, (x,), {}


# Kind 17: two names in one step of a scan


def divided_in_a_scan(zero_first: int, zero_second: int) -> tuple:
    """Each step divides twice, by numbers from the data of which one is zero."""
    x, w = plain_input()
    first = jnp.ones(20).at[zero_first].set(0) if zero_first >= 0 else jnp.ones(20)
    second = jnp.ones(20).at[zero_second].set(0) if zero_second >= 0 else jnp.ones(20)

    def loss_fn(w, x, first, second):
        def step(h, divisors):
            h = t(jnp.tanh(h @ w) / divisors[0], "first")
            h = t(h / divisors[1], "second")
            return h, None

        h, _ = lax.scan(step, x, (first, second))
        return jnp.mean(h**2)

    return loss_fn, w, (x, first, second), {}


@case(CASES, 17, finds("non_finite", r"second\[11\]", "division_by_zero"))
def second_name_of_a_step():
    return divided_in_a_scan(-1, 11)


@case(CASES, 17, finds("non_finite", r"first\[5\]", "division_by_zero"))
def first_name_of_a_step():
    return divided_in_a_scan(5, 11)


# Kind 19: causes and remedies

CHAOS = both(
    finds("exploding_gradients", cause="chao|dynamic|lyapunov"),
    free_of("", "weights_too_large"),
    free_of("non_finite"),
)


@case(CASES, 19, CHAOS)
def lorenz_simulation():
    """Lyapunov exponent 0.9 per unit of time, 20 units in 2,000 steps of Runge-Kutta."""
    params = {"sigma": jnp.float32(10), "rho": jnp.float32(28), "beta": jnp.float32(8 / 3)}

    def field(p, s):
        x, y, z = s
        return jnp.stack([p["sigma"] * (y - x), x * (p["rho"] - z) - y, x * y - p["beta"] * z])

    def loss_fn(params, start, target):
        def step(s, _):
            middle = s + 0.005 * field(params, s)
            return t(s + 0.01 * field(params, middle), "state"), None

        end, _ = lax.scan(step, start, length=2000)
        return jnp.mean((end - target) ** 2)

    return loss_fn, params, (jnp.array([1.0, 2.0, 20.0]), jnp.array([3.0, 3.0, 25.0])), {}


@case(CASES, 19, CHAOS)
def logistic_maps():
    """x <- r x (1 - x) at r = 3.9: exponent 0.5 per step, 60 steps, learned starts."""
    params = {"r": jnp.full(32, 3.9), "start": jnp.linspace(0.1, 0.9, 32)}

    def loss_fn(params, target):
        def step(x, _):
            return t(params["r"] * x * (1 - x), "x"), None

        x, _ = lax.scan(step, params["start"], length=60)
        return jnp.mean((x - target) ** 2)

    return loss_fn, params, (jnp.full(32, 0.5),), {}


class Residual(nn.Module):
    """Blocks h + conv-free branch with two BatchNorms that use their running statistics."""

    @nn.compact
    def __call__(self, h):
        for i in range(8):
            out = nn.Dense(32, name=f"block{i}_first")(h)
            out = nn.relu(nn.BatchNorm(use_running_average=True, name=f"block{i}_norm1")(out))
            out = nn.Dense(32, name=f"block{i}_second")(out)
            h = h + 0.3 * nn.BatchNorm(use_running_average=True, name=f"block{i}_norm2")(out)
            h = t(h, f"block{i}")
        return nn.Dense(8, name="readout")(h)


def with_running_statistics(variance: float) -> tuple:
    model, (x, y) = Residual(), batch(width=32)
    variables = dict(model.init(jax.random.key(0), x))
    params, stats = variables["params"], variables["batch_stats"]
    for norm in ("block4_norm1", "block4_norm2"):
        stats[norm]["var"] = jnp.full(32, variance)

    def loss_fn(params, x, y, stats):
        return cross_entropy(model.apply({"params": params, "batch_stats": stats}, x), y)

    return loss_fn, params, (x, y, stats), {}


@case(
    CASES,
    19,
    finds(
        "exploding_gradients exploding_activations residual_growth batchnorm_explosion",
        "block4",
        "batch|norm|running|variance|statistic",
    ),
)
def running_variance_of_zero():
    """Both norms of block 4 multiply by 1 / sqrt(eps) = 316."""
    return with_running_statistics(0.0)


@case(CASES, 19, sound())
def running_variance_of_one():
    return with_running_statistics(1.0)


INPUTS = finds(ANY, cause="input|data", remedy="normalize_inputs")


@case(CASES, 19, INPUTS)
def tanh_on_inputs_of_1e6():
    loss_fn, params, (x, y) = classifier(6, act=jnp.tanh, gain=1.0)
    return loss_fn, params, (1e6 * x, y), {}


@case(CASES, 19, INPUTS)
def relu_on_inputs_of_1e6():
    loss_fn, params, (x, y) = classifier(6)
    return loss_fn, params, (1e6 * x, y), {}


@case(CASES, 19, finds("clipping_always", remedy="^(?!raise_max_norm)", text="frozen"))
def frozen_leaf_fills_the_clip_norm():
    loss_fn, params, (x, y) = classifier(4)
    params = {"frozen": jnp.ones(64), "trained": params}

    def with_input_scale(params, x, y):
        penalty = 100 * jnp.sum(params["frozen"] ** 2)
        return loss_fn(params["trained"], x * params["frozen"], y) + penalty

    labels = {"frozen": "freeze", "trained": "train"}
    rules = {"train": optax.sgd(0.1), "freeze": optax.set_to_zero()}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(rules, labels))
    return with_input_scale, params, (x, y), {"tx": tx}


def offers(pattern: str, names: str):
    """One of the remedies of a finding of these names matches."""

    def right(diagnosis):
        found = [f for f in diagnosis.findings if f.pathology in names.split()]
        remedies = [remedy for finding in found for remedy in finding.remedies]
        if any(re.search(pattern, remedy) for remedy in remedies):
            return ""
        return f"no remedy /{pattern}/ among {remedies}"

    return right


@case(CASES, 19, offers("lstm|gru|forget|gate|chrono", "vanishing_gradients"))
def gates_for_a_recurrence_that_vanishes():
    return recurrence(0.8, 60, jnp.tanh)


@case(CASES, 19, finds("non_finite", remedy="^(?!normalize_inputs|check_data)"))
def remedy_of_a_negative_logarithm():
    x, w = plain_input()

    def loss_fn(w, x):
        return jnp.mean(t(jnp.log(t(x @ w, "h")), "log"))

    return loss_fn, w, (x,), {}


@case(CASES, 19, finds("exploding_gradients", "h" + range_of(14, 14), "weights_too_large"))
def one_layer_is_to_blame():
    loss_fn, params, args = classifier(24)
    params["layers"][14] = 3e4 * params["layers"][14]
    return loss_fn, params, args, {}
