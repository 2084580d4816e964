"""Optimisers and parameters as other libraries hold them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import gradjax
from gradjax.core.unwrap import optimizer_state, plain


class Model(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.first(x)))


def loss_fn(model, x):
    return jnp.mean(model(x) ** 2)


X = jnp.ones((3, 4))


def test_variables_become_their_values_and_other_trees_stay():
    tree = {"a": jnp.ones(2), "b": (None, "text", 3)}
    assert plain(tree) is tree
    state = plain(nnx.state(Model(nnx.Rngs(0)), nnx.Param))
    assert {type(x).__name__ for x in jax.tree.leaves(state)} == {"ArrayImpl"}
    assert all(not isinstance(x, nnx.Variable) for x in jax.tree.leaves(state))


@pytest.mark.parametrize("whole", [True, False])
def test_a_diagnosis_takes_an_nnx_optimizer(whole):
    model, tx = Model(nnx.Rngs(0)), optax.adam(1e-3)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    given = optimizer if whole else optimizer.opt_state
    assert gradjax.diagnose(loss_fn, model, X, tx=tx, opt_state=given).healthy
    assert not gradjax.find_nonfinite(loss_fn, model, X, tx=tx, opt_state=given)


def test_a_monitor_follows_an_nnx_optimizer(tmp_path):
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, gradjax.watch(optax.sgd(0.1)), wrt=nnx.Param)
    with gradjax.Monitor(tmp_path) as monitor:
        for _ in range(3):
            loss, grads = nnx.value_and_grad(loss_fn)(model, X)
            optimizer.update(model, grads)
            monitor.update(optimizer, loss)
    assert len(monitor.history["loss"]) == 3
    assert any("first" in key for key in monitor.history)


def test_a_train_state_is_taken_as_it_is(tmp_path):
    dense = nn.Dense(2)
    params = dense.init(jax.random.key(0), X)
    tx = gradjax.watch(optax.sgd(0.1))
    state = TrainState.create(apply_fn=dense.apply, params=params, tx=tx)
    assert optimizer_state(state) is state.opt_state
    with gradjax.Monitor(tmp_path) as monitor:
        grads = jax.tree.map(jnp.ones_like, params)
        monitor.update(state.apply_gradients(grads=grads), 1.0)
    assert monitor.history["loss"].tolist() == [1.0]


def test_jax_debug_nans_does_not_stop_a_diagnosis():
    mask = jnp.array([0.0, 0.0, 0.0, -jnp.inf])

    def masked(w, x):
        return jnp.mean(jax.nn.softmax(gradjax.tap(x @ w, "h") + mask[None], axis=-1)[:, 0])

    with jax.debug_nans(True), jax.debug_infs(True):
        assert gradjax.diagnose(masked, jnp.eye(4), X).healthy
        assert not gradjax.find_nonfinite(masked, jnp.eye(4), X)
        assert gradjax.find_nonfinite(lambda w: jnp.log(w * 0), jnp.float32(1.0))
