"""Training on MNIST's shapes: our sweep's program, a plain Optax loop and a plain PyTorch loop.

Each returns a function that trains once and returns its seconds.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradjax.experiment import config, grid
from gradjax.experiment.blocks import compile_cell
from gradjax.experiment.program import Compiler
from gradjax.experiment.progress import Meter, ignore
from gradjax.experiment.tasks import Split, Splits


def splits(examples: int) -> Splits:
    """Random numbers of MNIST's shape; their values do not change the time."""
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.standard_normal((examples + 512, 784), np.float32))
    y = jnp.asarray(generator.integers(0, 10, examples + 512), jnp.int32)
    parts = (slice(examples), slice(-512, -256), slice(-256, None))
    return Splits(*(Split(x[part], y[part]) for part in parts))


def sweep_program(base: config.Experiment, data: Splits) -> tuple[Callable[[], float], str]:
    """The sweep's own blocks and workers on all seeds of an experiment; and their plan."""
    cell = compile_cell(0, base, grid.grid(base), data, Compiler())

    def run() -> float:
        began = time.perf_counter()
        cell.run(range(cell.plan.blocks), Meter(0, ignore))
        return time.perf_counter() - began

    return run, str(cell.plan)


def optax_loop(model: Any, steps: int, batch: int, data: Splits) -> Callable[[], float]:
    """A plain loop as a user writes it: one jitted step, one batch from the host at a time."""
    tx = optax.adam(1e-3)
    params = model.init(jax.random.key(0), data.train.x[:2])
    x, y = np.asarray(data.train.x), np.asarray(data.train.y)

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()

    @jax.jit
    def step(params, state, x, y):
        updates, state = tx.update(jax.grad(loss)(params, x, y), state)
        return optax.apply_updates(params, updates), state

    def run() -> float:
        now, state, order = params, tx.init(params), np.random.default_rng(0)
        began = time.perf_counter()
        for _ in range(steps):
            rows = order.integers(0, len(x), batch)
            now, state = step(now, state, x[rows], y[rows])
        jax.block_until_ready(now)
        return time.perf_counter() - began

    return run


def torch_data(data: Splits):
    """The training split as PyTorch's tensors."""
    import torch

    x, y = (np.asarray(a) for a in (data.train.x, data.train.y))
    return torch.tensor(x), torch.tensor(y, dtype=torch.long)


def torch_loop(make: Callable[[], Any], steps: int, batch: int, x: Any, y: Any):
    """PyTorch eager, one network of `make`, Adam."""
    import torch

    def run() -> float:
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        began = time.perf_counter()
        for _ in range(steps):
            rows = torch.randint(0, len(x), (batch,))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        return time.perf_counter() - began

    return run
