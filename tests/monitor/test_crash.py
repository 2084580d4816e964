"""A crash file names the operation and the line of a real training that fails."""

import functools
import json

import jax
import jax.numpy as jnp
import optax
import pytest

import gradjax


def loss_fn(w, x):
    h = gradjax.tap(jnp.tanh(x @ w), "h")
    return jnp.mean(jnp.linalg.norm(h, axis=-1))


def test_the_crash_file_names_the_operation_and_its_line(tmp_path):
    tx = gradjax.watch(optax.sgd(0.01))
    w = jax.random.normal(jax.random.key(0), (3, 4))
    state = tx.init(w)

    @jax.jit
    def train_step(w, state, x):
        loss, grads = jax.value_and_grad(loss_fn)(w, x)
        updates, state = tx.update(grads, state, w)
        return optax.apply_updates(w, updates), state, loss

    diagnose = functools.partial(gradjax.diagnose, loss_fn)
    monitor = gradjax.Monitor(tmp_path, diagnose=diagnose, on_warning=print)
    with pytest.raises(FloatingPointError), monitor:
        for step in range(20):
            x = jax.random.normal(jax.random.key(step), (5, 3))
            # an example of zeros has a norm of 0
            x = x.at[2].set(0.0) if step == 9 else x
            w, state, loss = train_step(w, state, x)
            monitor.update(state, loss, params=w, args=(x,))
    report = json.loads(monitor.crash.read_text())
    (finding,) = report["diagnosis"]["findings"]
    evidence = finding["evidence"]
    assert (report["step"], finding["cause"]) == (9, "slope_at_zero")
    assert evidence["source"] == "return jnp.mean(jnp.linalg.norm(h, axis=-1))"
    assert evidence["derivative_of"] == "sqrt" and evidence["entry"] == [2]
