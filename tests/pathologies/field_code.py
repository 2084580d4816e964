"""Section D of the field: frameworks, declared parameters and neighbours, kinds 22, 28 and 30."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx, serialization
from flax.training.train_state import TrainState
from jax import lax

import gradjax
from gradjax import transforms, watch
from pathologies.field_case import (
    batch,
    case,
    classifier,
    come_out,
    cross_entropy,
    draw,
    finds,
    matrices,
    matrix,
    monitor_case,
    sound,
    state_after,
    t,
)
from pathologies.field_monitor import new_monitor

CASES, MONITOR_CASES = [], []

# Kind 22: objects as the user has them


class Model(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, 64, rngs=rngs)
        self.second = nnx.Linear(64, 8, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def nnx_loss(model, x, y):
    return cross_entropy(model(x), y)


def nnx_training(steps: int = 3) -> tuple:
    """(model, transform, optimiser, last loss)."""
    model, (x, y) = Model(nnx.Rngs(0)), batch()
    tx = watch(optax.adam(1e-3))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    loss = jnp.zeros(())
    for _ in range(steps):
        loss, gradient = nnx.value_and_grad(nnx_loss)(model, x, y)
        optimizer.update(model, gradient)
    return model, tx, optimizer, loss


@case(CASES, 22, sound())
def diagnose_with_the_state_of_nnx_optimizer():
    model, tx, optimizer, _ = nnx_training()
    return nnx_loss, model, batch(), {"tx": tx, "opt_state": optimizer.opt_state}


@case(CASES, 22, sound())
def diagnose_with_nnx_optimizer():
    model, tx, optimizer, _ = nnx_training()
    return nnx_loss, model, batch(), {"tx": tx, "opt_state": optimizer}


@case(CASES, 22, sound())
def diagnose_with_train_state():
    loss_fn, params, args = classifier(3)
    state = TrainState.create(apply_fn=None, params=params, tx=optax.adam(1e-3))
    state = state.apply_gradients(grads=jax.grad(loss_fn)(params, *args))
    return loss_fn, state.params, args, {"tx": state.tx, "opt_state": state}


def has_rows(count: int):
    """The history has a finite loss and a finite gradient norm for so many steps."""

    def right(monitor):
        history = monitor.history
        losses = [loss for loss in history["loss"] if jnp.isfinite(loss)]
        if len(history["step"]) == len(losses) == count:
            return ""
        return f"{len(losses)} losses in {len(history['step'])} steps, not {count}"

    return right


def monitored_nnx(pick) -> gradjax.Monitor:
    monitor = new_monitor()
    model, (x, y) = Model(nnx.Rngs(0)), batch()
    optimizer = nnx.Optimizer(model, watch(optax.sgd(1e-2)), wrt=nnx.Param)
    for _ in range(10):
        loss, gradient = nnx.value_and_grad(nnx_loss)(model, x, y)
        optimizer.update(model, gradient)
        monitor.update(pick(optimizer), loss)
    monitor.flush()
    return monitor


@monitor_case(MONITOR_CASES, 22, has_rows(10))
def monitor_with_the_state_of_nnx_optimizer():
    return monitored_nnx(lambda optimizer: optimizer.opt_state)


@monitor_case(MONITOR_CASES, 22, has_rows(10))
def monitor_with_nnx_optimizer():
    return monitored_nnx(lambda optimizer: optimizer)


# Kind 28: unused or frozen by design


def graph_net() -> tuple:
    """Edges and nodes by turns, three times; the last update of the edges is read by nobody."""
    senders, receivers = jnp.arange(24) % 12, (5 * jnp.arange(24) + 1) % 12
    params = {
        "edges": [matrix(i, 48, 16) for i in range(3)],
        "nodes": [matrix(10 + i, 32, 16) for i in range(3)],
        "readout": matrix(20, 16, 1),
    }

    def loss_fn(params, nodes, edges, target):
        layers = zip(params["nodes"], params["edges"], strict=True)
        for i, (node_weights, edge_weights) in enumerate(layers):
            arriving = jax.ops.segment_sum(edges, receivers, 12) / 2
            both = jnp.concatenate([nodes, arriving], -1)
            nodes = t(jax.nn.relu(both @ node_weights), f"nodes{i}")
            ends = jnp.concatenate([edges, nodes[senders], nodes[receivers]], -1)
            edges = t(jax.nn.relu(ends @ edge_weights), f"edges{i}")
        return jnp.mean(((nodes @ params["readout"]).mean() - target) ** 2)

    return loss_fn, params, (draw(1, 12, 16), draw(2, 24, 16), jnp.ones(()))


@case(CASES, 28, sound())
def graph_net_with_a_declared_edge_update():
    return *graph_net(), {"unused": ("edges[2]",)}


@case(CASES, 28, finds("untrained_layer", r"edges.*2"))
def graph_net_without_a_declaration():
    return *graph_net(), {}


class Normalised(eqx.Module):
    """A linear model whose statistics are buffers under `stop_gradient`, as Equinox advises."""

    mean: jax.Array
    layers: list
    readout: jax.Array

    def __call__(self, x):
        h = x - lax.stop_gradient(self.mean)
        for i, w in enumerate(self.layers):
            h = t(jax.nn.relu(h @ w), f"h{i}")
        return h @ self.readout


@case(CASES, 28, sound())
def equinox_buffer_declared():
    model = Normalised(jnp.zeros(64), matrices(1, 3, 64), matrix(2, 64, 8))

    def loss_fn(model, x, y):
        return cross_entropy(model(x), y)

    return loss_fn, model, batch(), {"unused": ("mean",)}


@case(CASES, 28, sound())
def ema_target_declared():
    """BYOL: the target network is a running mean of the online one."""
    layers = matrices(1, 3, 64)
    params = {"online": layers, "target": list(layers), "predictor": matrix(2, 64, 64)}

    def loss_fn(params, x, noise):
        h, target = x, x + 0.1 * noise
        for i, w in enumerate(params["online"]):
            h = t(jax.nn.relu(h @ w), f"online{i}")
        for w in lax.stop_gradient(params["target"]):
            target = jax.nn.relu(target @ w)
        return jnp.mean((h @ params["predictor"] - target) ** 2)

    return loss_fn, params, (draw(3, 32, 64), draw(4, 32, 64)), {"unused": ("target",)}


@case(CASES, 28, sound())
def leaf_of_size_zero():
    inner, params, args = classifier(3)

    def loss_fn(params, x, y):
        first = jnp.concatenate([params["layers"]["layers"][0], params["extra"]])
        layers = [first, *params["layers"]["layers"][1:]]
        return inner(params["layers"] | {"layers": layers}, x, y)

    return loss_fn, {"layers": params, "extra": jnp.zeros((0, 64))}, args, {}


# Kind 30: neighbours


def debugging():
    return jax.debug_nans(True)


@case(CASES, 30, sound(), context=debugging)
def debug_nans_with_a_classifier():
    return *classifier(3), {}


@case(CASES, 30, sound(), context=debugging)
def debug_nans_with_a_meant_zero_over_zero():
    """The mean over no examples is 0/0, and not selected."""
    inner, params, (x, y) = classifier(3)

    def loss_fn(params, x, y, mask):
        count, total = mask.sum(), (mask[:, None] * x).sum(0)
        mean = t(jnp.where(count > 0, total / count, 0.0), "mean")
        return inner(params, x - mean, y)

    return loss_fn, params, (x, y, jnp.zeros(32)), {}


@case(CASES, 30, sound())
def python_float_among_parameters():
    inner, params, args = classifier(3)

    def loss_fn(params, x, y):
        return inner(params["net"], params["scale"] * x, y)

    return loss_fn, {"net": params, "scale": 1.0}, args, {}


def equals_itself(pair):
    """The state that was read back is the one that was written."""
    before, after = map(jax.tree.leaves, pair)
    if len(before) != len(after):
        return f"{len(after)} leaves came back of {len(before)}"
    same = [jnp.array_equal(a, b, equal_nan=True) for a, b in zip(before, after, strict=True)]
    return "" if all(same) else "a leaf came back with other values"


@monitor_case(MONITOR_CASES, 30, equals_itself)
def state_through_flax_serialization():
    loss_fn, params, args = classifier(3)
    tx = watch(optax.chain(transforms.clip_by_global_norm(1.0), optax.adam(1e-3)))
    _, state = state_after(tx, loss_fn, params, args)
    return state, serialization.from_bytes(tx.init(params), serialization.to_bytes(state))


def is_finite(updates):
    """All floating leaves are finite."""
    leaves = [x for x in jax.tree.leaves(updates) if jnp.issubdtype(x.dtype, jnp.floating)]
    return "" if all(jnp.isfinite(x).all() for x in leaves) else "an update is not finite"


@monitor_case(MONITOR_CASES, 30, is_finite)
def integer_leaf_under_masked():
    params = {"w": jnp.ones((4, 4)), "step": jnp.zeros((), jnp.int32)}
    tx = watch(optax.masked(optax.adam(1e-3), {"w": True, "step": False}))
    gradient = {"w": jnp.ones((4, 4)), "step": jnp.zeros((), jnp.int32)}
    updates, _ = tx.update(gradient, tx.init(params), params)
    return updates


def unchanged(params):
    return params


def monitored(tx, init=unchanged, steps: int = 24) -> gradjax.Monitor:
    """Training of a small classifier, each call with its loss."""
    loss_fn, params, args = classifier(2, 16)
    monitor, params = new_monitor(), init(params)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        loss, gradient = jax.value_and_grad(loss_fn)(getattr(params, "fast", params), *args)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    for _ in range(steps):
        params, state, loss = step(params, state)
        monitor.update(state, loss)
    monitor.flush()
    return monitor


def has_no_lost_loss(monitor):
    """Every step of the history has its loss."""
    losses = monitor.history["loss"]
    lost = int(jnp.sum(~jnp.isfinite(jnp.asarray(losses))))
    if len(losses) and not lost:
        return ""
    return f"{lost} of {len(losses)} losses in the history are not finite"


@monitor_case(MONITOR_CASES, 30, has_no_lost_loss)
def multi_steps_outside_of_watch():
    return monitored(optax.MultiSteps(watch(optax.adam(1e-3)), 4))


@monitor_case(MONITOR_CASES, 30, has_no_lost_loss)
def sam_outside_of_watch():
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    return monitored(optax.contrib.sam(watch(optax.sgd(1e-2)), adversary, sync_period=2))


@monitor_case(MONITOR_CASES, 30, has_no_lost_loss)
def lookahead_inside_of_watch():
    tx = watch(optax.lookahead(optax.sgd(1e-2), 5, 0.5))
    return monitored(tx, optax.LookaheadParams.init_synced)


class Parallel(nn.Module):
    """A norm that averages over devices when it trains."""

    @nn.compact
    def __call__(self, x):
        h = nn.BatchNorm(use_running_average=False, axis_name="batch")(nn.Dense(32)(x))
        return nn.Dense(8)(nn.relu(h))


def is_sound_or_explained(answer):
    """Healthy, or an error of ours that names the axis."""
    if isinstance(answer, NameError):
        return f"NameError: {answer}"
    if isinstance(answer, Exception):
        return "" if "batch" in str(answer) else f"{type(answer).__name__}: {answer}"
    return "" if answer.healthy else come_out(answer)


@monitor_case(MONITOR_CASES, 30, is_sound_or_explained)
def batch_norm_over_an_axis_of_devices():
    model, (x, y) = Parallel(), batch()
    variables = model.init(jax.random.key(0), x)

    def loss_fn(params, stats, x, y):
        logits, new = model.apply({"params": params, **stats}, x, mutable=["batch_stats"])
        return cross_entropy(logits, y), new

    stats = {"batch_stats": variables["batch_stats"]}
    try:
        return gradjax.diagnose(loss_fn, variables["params"], stats, x, y, has_aux=True)
    except Exception as error:
        return error
