"""Section D of the field: what a monitor has to hear, kinds 21 and 31, with healthy twins."""

import functools
import json
import re
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

import gradjax
from gradjax import watch
from pathologies.field_case import (
    HE,
    both,
    chain,
    cross_entropy,
    draw,
    matrices,
    matrix,
    monitor_case,
)

MONITOR_CASES = []


def new_monitor(**options) -> gradjax.Monitor:
    """A monitor that warns in silence, and writes its crash files to a temporary folder."""
    quiet = {"on_failure": "warn", "on_warning": lambda text: None}
    return gradjax.Monitor(tempfile.mkdtemp(), **(quiet | options))


def warns(
    pattern: str = "", most: int = 6, before: int = 10_000
) -> Callable[[gradjax.Monitor], str]:
    """One line holds the pattern, the first comes before that step, and there are not too many."""

    def right(monitor):
        texts = [text for _, text in monitor.warnings]
        if not texts:
            return "no line"
        if not any(re.search(pattern, text, re.IGNORECASE) for text in texts):
            return f"no line says /{pattern}/: {texts[0]}"
        if len(texts) > most:
            return f"{len(texts)} lines, {texts[0]}"
        first = monitor.warnings[0][0]
        return f"the first line only at step {first}" if first >= before else ""

    return right


def is_silent(monitor: gradjax.Monitor) -> str:
    """No line, no crash."""
    if monitor.crash:
        return f"a crash file: {monitor.warnings[-1]}"
    return f"a false line: {monitor.warnings[0]}" if monitor.warnings else ""


# Kind 21: slow divergence, losses, zeros, a state that stands still


def diverging(growth: float, steps: int) -> gradjax.Monitor:
    """Gradient descent on a parabola with a rate that multiplies the parameters by -growth."""
    tx, monitor = watch(optax.sgd(1 + growth)), new_monitor()
    params = {"a": draw(1, 16), "b": draw(2, 8)}
    state = tx.init(params)

    def loss_fn(params):
        return 0.5 * sum(jnp.sum(p**2) for p in params.values())

    @jax.jit
    def step(params, state):
        loss, gradient = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    for _ in range(steps):
        params, state, loss = step(params, state)
        monitor.update(state, loss)
    monitor.flush()
    return monitor


@monitor_case(MONITOR_CASES, 21, warns())
def growth_of_1_02_per_step():
    return diverging(1.02, 2000)


@monitor_case(MONITOR_CASES, 21, warns())
def growth_of_1_2_per_step():
    return diverging(1.2, 220)


@monitor_case(MONITOR_CASES, 21, warns())
def growth_of_2_per_step():
    return diverging(2.0, 60)


def same_loss(step, loss):
    return loss


def full_gradient(step):
    return 1.0


def regression(
    steps: int,
    tx=None,
    told: Callable = same_loss,
    scale: Callable = full_gradient,
    keep_state: bool = False,
) -> gradjax.Monitor:
    """A small network on fresh batches.

    Args:
      steps: of training.
      tx: the optimiser, Adam by default.
      told: what the monitor gets as the loss.
      scale: a factor of the gradient.
      keep_state: the loop gives the monitor the first state again and again.
    """
    tx, monitor = watch(tx or optax.adam(1e-3)), new_monitor()
    params = {"layers": matrices(1, 2, 16), "out": matrix(2, 16, 1)}
    teacher = matrix(3, 16, 1)
    state = first = tx.init(params)

    def loss_fn(params, x):
        return jnp.mean((chain(params["layers"], x) @ params["out"] - x @ teacher) ** 2)

    @jax.jit
    def step(params, state, key, factor):
        x = jax.random.normal(key, (16, 16))
        loss, gradient = jax.value_and_grad(loss_fn)(params, x)
        gradient = jax.tree.map(lambda g: factor * g, gradient)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    for i in range(steps):
        key = jax.random.key(i)
        params, state, loss = step(params, state, key, jnp.float32(scale(i)))
        monitor.update(first if keep_state else state, told(i, loss))
    monitor.flush()
    return monitor


def from_step(first: int, change: Callable) -> Callable:
    """The change of a loss from that step on."""

    def told(step, loss):
        return change(loss) if step >= first else loss

    return told


@monitor_case(MONITOR_CASES, 21, warns("loss"))
def loss_is_nan_with_finite_gradients():
    return regression(250, told=from_step(150, lambda loss: loss * jnp.nan))


@monitor_case(MONITOR_CASES, 21, warns("loss"))
def loss_is_inf_with_finite_gradients():
    return regression(250, told=from_step(150, lambda loss: jnp.float32(jnp.inf)))


@monitor_case(MONITOR_CASES, 21, warns("loss"))
def loss_is_a_million_times_its_median():
    return regression(250, told=from_step(150, lambda loss: 1e6 * loss))


@monitor_case(MONITOR_CASES, 21, warns("gradient"))
def gradient_is_zero_after_100_steps():
    return regression(400, optax.sgd(1e-2), scale=lambda step: float(step < 100))


@monitor_case(MONITOR_CASES, 21, warns("gradient"))
def gradient_is_zero_from_the_start():
    return regression(300, optax.sgd(1e-2), scale=lambda step: 0.0)


@monitor_case(MONITOR_CASES, 21, warns("state|advance|step"))
def state_never_advances():
    return regression(200, keep_state=True)


@monitor_case(MONITOR_CASES, 21, is_silent)
def healthy_regression():
    return regression(1500)


@monitor_case(MONITOR_CASES, 21, is_silent)
def healthy_warmup():
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.05, 200, 1000)
    return regression(1000, optax.sgd(rate, momentum=0.9))


# Kind 31: the first steps


def small_gpt() -> tuple:
    """(loss_fn, params, batch) of two blocks and 64 words."""
    width, tokens, classes = 32, 16, 64

    def block(seed):
        return {
            "qkv": matrix(seed, width, 3 * width),
            "o": matrix(seed + 1, width, width, 0.3),
            "up": matrix(seed + 2, width, 4 * width),
            "down": matrix(seed + 3, 4 * width, width, 0.3),
        }

    params = {
        "embed": 0.02 * draw(1, classes, width),
        "position": 0.02 * draw(2, tokens, width),
        "blocks": [block(10), block(20)],
        "readout": matrix(3, width, classes, 0.3),
    }
    mask = jnp.tril(jnp.ones((tokens, tokens), bool))

    def loss_fn(params, x, y):
        h = params["embed"][x] + params["position"]
        for i, p in enumerate(params["blocks"]):
            q, k, v = jnp.split(jax.nn.standardize(h) @ p["qkv"], 3, axis=-1)
            scores = jnp.where(mask, q @ k.swapaxes(1, 2) / width**0.5, -1e9)
            h = gradjax.tap(h + jax.nn.softmax(scores) @ v @ p["o"], f"attention{i}")
            up = jax.nn.gelu(jax.nn.standardize(h) @ p["up"])
            h = gradjax.tap(h + up @ p["down"], f"mlp{i}")
        return cross_entropy(jax.nn.standardize(h) @ params["readout"], y)

    words = jax.random.randint(jax.random.key(4), (8, tokens + 1), 0, classes)
    return loss_fn, params, (words[:, :-1], words[:, 1:])


def trained(problem: tuple, tx, steps: int, learning_rate: float) -> gradjax.Monitor:
    """Training with the diagnosis in the monitor."""
    loss_fn, params, args = problem
    diagnose = functools.partial(gradjax.diagnose, loss_fn, learning_rate=learning_rate)
    tx, monitor = watch(tx), new_monitor(diagnose=diagnose)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        loss, gradient = jax.value_and_grad(loss_fn)(params, *args)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    for _ in range(steps):
        params, state, loss = step(params, state)
        monitor.update(state, loss, params=params, args=args)
        if monitor.crash:
            break
    monitor.flush()
    return monitor


# The loss is 30 times what it was after three steps.
EARLY = warns(before=40)


@monitor_case(MONITOR_CASES, 31, EARLY)
def gpt_with_a_rate_times_100():
    return trained(small_gpt(), optax.sgd(30.0), 60, 30.0)


@monitor_case(MONITOR_CASES, 31, EARLY)
def gpt_with_a_rate_times_1000():
    return trained(small_gpt(), optax.sgd(300.0), 60, 300.0)


@monitor_case(MONITOR_CASES, 31, is_silent)
def gpt_with_a_good_rate():
    return trained(small_gpt(), optax.adam(3e-4), 60, 0.1)


def crash_is_explained(monitor: gradjax.Monitor) -> str:
    """The crash file has suspects, and its diagnosis is not healthy."""
    if monitor.crash is None:
        return "no crash file"
    report = json.loads(monitor.crash.read_text())
    if not report["suspects"]:
        return f"step {report['step']}: no suspects"
    diagnosis = report["diagnosis"]
    if diagnosis is None:
        return f"no diagnosis: {report.get('diagnosis_error')}"
    if diagnosis["healthy"]:
        return f"healthy in the crash file: {report.get('diagnosis_of')}"
    return ""


def exploding_training(rate: float) -> gradjax.Monitor:
    """A squared loss and a rate far too long: the gradient explodes within three steps."""
    params = {"layers": matrices(1, 4, 32, HE), "out": matrix(2, 32, 1)}

    def loss_fn(params, x):
        return jnp.mean((chain(params["layers"], x) @ params["out"] - 1) ** 2)

    return trained((loss_fn, params, (draw(3, 16, 32),)), optax.sgd(rate), 20, rate)


@monitor_case(MONITOR_CASES, 31, both(warns(), crash_is_explained))
def nan_at_once_after_growth():
    return exploding_training(100.0)


@monitor_case(MONITOR_CASES, 31, both(warns(), crash_is_explained))
def nan_after_a_few_steps_of_growth():
    return exploding_training(3.0)
