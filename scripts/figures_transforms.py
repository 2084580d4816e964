"""The figures of docs/transforms.md: `python scripts/figures_transforms.py` (about half a minute).

A small network learns another one: gradients are real, the accident is planted.
"""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

from gradjax import transforms as gt

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent.parent / "docs"
SHAPES = [(8, 32), (32, 32), (32, 1)]
NUM_STEPS, ACCIDENT = 400, 150


def init(key):
    keys = jax.random.split(key, len(SHAPES))
    return [jax.random.normal(k, s) / np.sqrt(s[0]) for k, s in zip(keys, SHAPES, strict=True)]


def loss(params, data):
    x, y = data
    for w in params[:-1]:
        x = jnp.tanh(x @ w)
    return jnp.mean((x @ params[-1] - y) ** 2)


def train(tx, accident, num_steps=NUM_STEPS):
    """Per step the loss and the norm of the first layer's update.

    `accident(grads, step)` spoils a gradient.
    """
    params, teacher = init(jax.random.key(0)), init(jax.random.key(1))

    def step(carry, k):
        params, state = carry
        x = jax.random.normal(jax.random.key(k), (64, 8))
        value, grads = jax.value_and_grad(loss)(
            params, (x, jnp.tanh(jnp.tanh(x @ teacher[0]) @ teacher[1]) @ teacher[2])
        )
        grads = accident(grads, k)
        updates, state = tx.update(grads, state, params, value=value)
        return (optax.apply_updates(params, updates), state), (value, jnp.linalg.norm(updates[0]))

    @jax.jit
    def run():
        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(num_steps))

    return [np.asarray(x) for x in run()[1]]


def spoil(value):
    """The first layer's gradient times `value` at one step."""
    return lambda grads, k: [jnp.where(k == ACCIDENT, grads[0] * value, grads[0]), *grads[1:]]


def panel(axis, runs, title, ylabel="loss"):
    for style, (label, values) in zip(["k--", "C0", "C1", "C2", "C3"], runs, strict=False):
        last = values[:ACCIDENT] if not np.isfinite(values).all() else values
        gone = f": NaN from step {ACCIDENT + 1}" if len(last) < len(values) else ""
        axis.semilogy(last, style, label=label + gone, lw=1.2)
    axis.axvline(ACCIDENT, color="0.8", zorder=0)
    axis.set(title=title, xlabel="step", ylabel=ylabel)
    axis.title.set_fontsize(10)
    low, high = axis.get_ylim()
    axis.set_ylim(low, high * (high / low) ** 0.45)  # room for the legend
    axis.legend(fontsize=8, frameon=False, loc="upper right")


def clipping(path):
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.4))
    sizes = np.logspace(-40, 38, 157)
    for name, rule, style in (
        ("optax.clip_by_global_norm(1)", optax.clip_by_global_norm(1.0), "k--"),
        ("clip_by_global_norm(1)", gt.clip_by_global_norm(1.0), "C0"),
    ):
        grads = jnp.asarray(np.outer(sizes, np.ones(8)), jnp.float32)
        out = jax.vmap(lambda g, rule=rule: rule.update(g, rule.init(g))[0])(grads)
        norms = np.linalg.norm(np.asarray(out, np.float64), axis=1)
        axes[0].loglog(sizes * np.sqrt(8), np.where(norms > 0, norms, 1e-44), style, label=name)
    axes[0].set(
        xlabel="norm of the gradient",
        ylabel="norm of the update",
        title="float32; at the bottom: zero",
    )
    axes[0].title.set_fontsize(10)
    axes[0].set_ylim(1e-46, 1e8)
    axes[0].legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.42, 0.12))

    def sgd():
        return optax.sgd(0.1, momentum=0.9)

    rules = {
        "clip_by_global_norm": gt.clip_by_global_norm(1.0),
        "clip_by_layer_norm": gt.clip_by_layer_norm(1.0),
    }
    rules |= {"zclip": gt.zclip(), "adaptive_grad_clip": gt.adaptive_grad_clip(0.05)}
    runs = [("no clipping", train(sgd(), spoil(1e6))[0])]
    runs += [(name, train(optax.chain(rule, sgd()), spoil(1e6))[0]) for name, rule in rules.items()]
    panel(axes[1], runs, f"SGD, first layer's gradient times 1e6 at step {ACCIDENT}")
    save(figure, path)


def guards(path):
    def adam():
        return optax.adam(3e-3)

    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.4))
    wrap = {"skip_non_finite": gt.skip_non_finite, "freeze_diverged": gt.freeze_diverged}
    runs = [("Adam", train(adam(), spoil(jnp.nan))[0])]
    runs += [(name, train(guard(adam()), spoil(jnp.nan))[0]) for name, guard in wrap.items()]
    panel(axes[0], runs, f"a NaN gradient at step {ACCIDENT}")
    wrap = {"restore_moments": gt.restore_moments, "skip_spikes": gt.skip_spikes}
    runs = [("Adam: 0 for good", train(adam(), spoil(1e23))[1])]
    runs += [(name, train(guard(adam()), spoil(1e23))[1]) for name, guard in wrap.items()]
    runs = [(name, np.maximum(values, 1e-9)) for name, values in runs]
    panel(
        axes[1],
        runs,
        "first layer's gradient times 1e23: its moments overflow",
        "norm of its update",
    )
    save(figure, path)


def schedules(path):
    steps = jnp.arange(1000)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    peaks = jnp.geomspace(1e-3, 1e-1, 5)
    cosine = jax.vmap(
        lambda p: jax.vmap(gt.warmup_cosine_decay_schedule(0.0, p, 100, 1000, p / 100))(steps)
    )(peaks)
    axes[0].semilogy(steps[1:], cosine.T[1:], "C0")
    axes[0].set(title="five peaks in one vmapped program", xlabel="step", ylabel="learning rate")
    for name, schedule in {
        "exponential_decay": gt.exponential_decay(1e-2, 200, 0.5),
        "piecewise_constant_schedule": gt.piecewise_constant_schedule(1e-2, {300: 0.3, 600: 0.1}),
        "growth_limited_warmup, 1.02 per step": gt.growth_limited_warmup(1e-2, 1e-5, 1.02),
    }.items():
        axes[1].semilogy(steps, jax.vmap(schedule)(steps), label=name)
    axes[1].set(title="decays and a growth limit", xlabel="step", ylim=(1e-5, 2e-2))
    axes[1].legend(fontsize=8, frameon=False)
    save(figure, path)


def projections(path):
    def bound(rule):
        return train_norms(optax.chain(optax.sgd(0.3), rule) if rule else optax.sgd(0.3))

    figure, axis = plt.subplots(figsize=(5.5, 3.2))
    for name, rule in {
        "none": None,
        "spectral_norm(1.5)": gt.spectral_norm(1.5),
        "max_norm(0.8)": gt.max_norm(0.8),
    }.items():
        axis.plot(bound(rule), label=name)
    axis.axhline(1.5, color="0.8", zorder=0)
    axis.set_ylim(1.35, 2.6)
    axis.set(
        title="largest singular value of the middle layer, SGD at 0.3",
        xlabel="step",
        ylabel="sigma",
    )
    axis.title.set_fontsize(10)
    axis.legend(fontsize=8, frameon=False, loc="upper right", ncols=3)
    save(figure, path)


def train_norms(tx, num_steps=200):
    params, teacher = init(jax.random.key(0)), init(jax.random.key(1))

    def step(carry, k):
        params, state = carry
        x = jax.random.normal(jax.random.key(k), (64, 8))
        grads = jax.grad(loss)(
            params, (x, 3 * jnp.tanh(jnp.tanh(x @ teacher[0]) @ teacher[1]) @ teacher[2])
        )
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), jnp.linalg.norm(params[1], 2)

    return jax.jit(
        lambda: jax.lax.scan(step, (params, tx.init(params)), jnp.arange(num_steps))[1]
    )()


def save(figure, path):
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    print(path)


if __name__ == "__main__":
    for draw in (clipping, guards, projections, schedules):
        draw(DOCS / f"transforms_{draw.__name__}.png")
