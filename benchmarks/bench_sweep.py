"""Seeds x steps per second of an ensemble: PyTorch one by one, torch.func.vmap, JAX one by one, and
`gradjax.sweep`.

    python benchmarks/bench_sweep.py [--json] [--quick]

S = 32 seeds of the 784-256-10 and the 20 x 128 ReLU MLP, batch 128, Adam, all on the same cores.
Ours trains through the sweep's own blocks and workers, with validation, signals per layer and the
guard against divergence that the peers lack; the first run compiles and is not timed. PyTorch's
rows need it installed (`make bench`) and are else left out.
"""

import argparse
import itertools
import json
import os
import statistics
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradjax.experiment import config, grid, sweep
from gradjax.experiment.program import Compiler
from gradjax.experiment.tasks import Split, Splits

NETWORKS = {"784-256-10": (1, 256), "20 x 128": (20, 128)}
BATCH, EXAMPLES = 128, 12_800


def data() -> Splits:
    """Numbers of MNIST's shape: what is in them changes no time."""
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.standard_normal((EXAMPLES + 512, 784), np.float32))
    y = jnp.asarray(generator.integers(0, 10, EXAMPLES + 512), jnp.int32)
    return Splits(
        *(
            Split(x[part], y[part])
            for part in (slice(EXAMPLES), slice(-512, -256), slice(-256, None))
        )
    )


def experiment(network: str, seeds: int, steps: int) -> config.Experiment:
    """The network as a config."""
    depth, width = NETWORKS[network]
    values = {
        "model.depth": depth,
        "model.width": width,
        "model.activation": "relu",
        "model.sigma_w": 2**0.5,
    }
    values |= {
        "model.sigma_b": 0.0,
        "task.batch_size": BATCH,
        "train.num_seeds": seeds,
        "train.num_steps": steps,
    }
    return config.replace(config.Experiment(), values | {"train.eval_every": steps})


def ours(network: str, seeds: int, steps: int, splits: Splits):
    """A function that trains all seeds and returns seeds x steps per second; and the plan."""
    base = experiment(network, seeds, steps)
    cell = sweep._cell(0, base, grid.grid(base), splits, Compiler())

    def run() -> float:
        began = time.perf_counter()
        cell.run(range(cell.plan.blocks), lambda *event: None)
        return seeds * steps / (time.perf_counter() - began)

    return run, str(cell.plan)


def jax_one_by_one(network: str, seeds: int, steps: int, splits: Splits):
    """A plain Optax loop as a user writes it: one seed, one jitted step, one batch from the host at
    a time.
    """
    from gradjax.experiment import models

    base = experiment(network, seeds, steps)
    model, tx = models.build(base.model, 10), optax.adam(1e-3)
    params = model.init(jax.random.key(0), splits.train.x[:2])
    x, y = np.asarray(splits.train.x), np.asarray(splits.train.y)

    @jax.jit
    def step(params, state, x, y):
        loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(
            model.apply(p, x), y
        ).mean()
        updates, state = tx.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    def run() -> float:
        now, state = params, tx.init(params)
        order = np.random.default_rng(0)
        began = time.perf_counter()
        for _ in range(steps):
            rows = order.integers(0, EXAMPLES, BATCH)
            now, state = step(now, state, x[rows], y[rows])
        jax.block_until_ready(now)
        return steps / (time.perf_counter() - began)

    return run


def torch_network(network: str):
    """The same MLP for PyTorch."""
    from torch import nn

    depth, width = NETWORKS[network]
    sizes = [784] + [width] * depth
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def torch_one_by_one(network: str, steps: int, splits: Splits):
    """PyTorch eager, one seed."""
    import torch

    x, y = (
        torch.tensor(np.asarray(splits.train.x)),
        torch.tensor(np.asarray(splits.train.y), dtype=torch.long),
    )

    def run() -> float:
        model = torch_network(network)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        began = time.perf_counter()
        for _ in range(steps):
            rows = torch.randint(0, EXAMPLES, (BATCH,))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        return steps / (time.perf_counter() - began)

    return run


def torch_ensemble(network: str, seeds: int, steps: int, splits: Splits):
    """torch.func: the gradient vmapped over stacked parameters, Adam on the stacks."""
    import torch
    from torch.func import functional_call, grad, stack_module_state, vmap

    x, y = (
        torch.tensor(np.asarray(splits.train.x)),
        torch.tensor(np.asarray(splits.train.y), dtype=torch.long),
    )
    models = [torch_network(network) for _ in range(seeds)]
    base = torch_network(network).to("meta")

    def loss(params, x, y):
        return torch.nn.functional.cross_entropy(functional_call(base, params, (x,)), y)

    gradient = vmap(grad(loss))

    def run() -> float:
        params, _ = stack_module_state(models)
        params = {name: value.detach().clone() for name, value in params.items()}
        optimizer = torch.optim.Adam(params.values(), 1e-3)
        began = time.perf_counter()
        for _ in range(steps):
            rows = torch.randint(0, EXAMPLES, (seeds, BATCH))
            for name, value in gradient(params, x[rows], y[rows]).items():
                params[name].grad = value
            optimizer.step()
        return seeds * steps / (time.perf_counter() - began)

    return run


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--quick", action="store_true", help="8 seeds, one round")
    options = parser.parse_args()
    seeds, rounds, splits, out = (8, 1, data(), {}) if options.quick else (32, 3, data(), {})
    for network in NETWORKS:
        mine, plan = ours(network, seeds, 100, splits)
        peers = {"jax_one_by_one": jax_one_by_one(network, seeds, 100, splits)}
        try:
            peers["torch_one_by_one"] = torch_one_by_one(network, 100, splits)
            peers["torch_func_vmap"] = torch_ensemble(network, seeds, 5, splits)
        except ImportError:
            out["note"] = "PyTorch is not installed: its rows are left out"
        speeds: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
        for turn in range(rounds + 1):
            for name, run in {"ours": mine, **peers}.items():
                speed = run()
                if turn:
                    speeds[name].append(speed)
        ratios = {
            name: statistics.median(
                a / b for a, b in zip(speeds["ours"], speeds[name], strict=True)
            )
            for name in peers
        }
        out[network] = {
            "seeds": seeds,
            "plan": plan,
            "seeds_x_steps_per_second": {
                name: round(statistics.median(v), 1) for name, v in speeds.items()
            },
            "ours_over": {name: round(value, 2) for name, value in ratios.items()},
            "goals": {"torch_one_by_one": 8, "torch_func_vmap": 2.5},
        }
    print(
        json.dumps(out, indent=2)
        if options.json
        else "\n".join(f"{k}: {v}" for k, v in out.items())
    )


if __name__ == "__main__":
    main()
