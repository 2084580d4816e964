"""A training that diverges at a known step and layer, and what `gradjax.Monitor` says about it.

    python scripts/diverging.py runs/diverging

From step 60 on the learning rate of layer 3 grows by a quarter per step: a schedule with the wrong
sign. The warning comes before the loss rises; the crash file names the layer.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import optax

import gradjax

key = jax.random.key(0)
params = {
    f"layer{i}": jax.random.normal(jax.random.fold_in(key, i), (32, 32)) / 4 for i in range(6)
}


def growing(step):
    return 0.02 * 1.25 ** jnp.maximum(step - 59.0, 0.0)


rates = {"healthy": optax.sgd(0.02), "faulty": optax.sgd(growing)}
tx = gradjax.watch(
    optax.multi_transform(rates, {k: "faulty" if k == "layer3" else "healthy" for k in params})
)


def loss_fn(params, x):
    h = x
    for name, w in params.items():
        h = gradjax.tap(jax.nn.leaky_relu(h @ w), name)
    return jnp.mean((h - x) ** 2)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(params, opt_state, x):
    loss, grads = jax.value_and_grad(loss_fn)(params, x)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


opt_state, folder = tx.init(params), sys.argv[1] if len(sys.argv) > 1 else "runs/diverging"
with gradjax.Monitor(folder, diagnose=functools.partial(gradjax.diagnose, loss_fn)) as monitor:
    for step in range(200):
        batch_key = jax.random.fold_in(key, 100 + step)
        x = jax.random.normal(batch_key, (64, 32))
        params, opt_state, loss = train_step(params, opt_state, x)
        monitor.update(opt_state, loss, key=batch_key, params=params, args=(x,))
        if step % 4 == 0:
            print(f"step {step:3d}  loss {loss:.3g}")
