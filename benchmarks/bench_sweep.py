"""Seeds x steps per second of an ensemble: PyTorch, torch.func.vmap, JAX, and `gradjax.sweep`.

    python benchmarks/bench_sweep.py [--json] [--quick]

S = 32 seeds of the 784-256-10 and the 20 x 128 ReLU MLP, batch 128, Adam, all on the same cores;
PyTorch and JAX train one seed after another. Ours trains through the sweep's own blocks and
workers, with validation, signals per layer and the guard against divergence that the peers lack;
the first run compiles and is not timed. PyTorch's rows need it installed (`make bench`) and are
otherwise left out.
"""

import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import peers
import report

from gradjax.experiment import config, models
from gradjax.experiment.tasks import Splits

NETWORKS = {"784-256-10": (1, 256), "20 x 128": (20, 128)}
BATCH, EXAMPLES = 128, 12_800
STEPS, ENSEMBLE_STEPS = 100, 5


def experiment(network: str, seeds: int) -> config.Experiment:
    """The network as a config."""
    depth, width = NETWORKS[network]
    values = {
        "model.depth": depth,
        "model.width": width,
        "model.activation": "relu",
        "model.sigma_w": 2**0.5,
        "model.sigma_b": 0.0,
        "task.batch_size": BATCH,
        "train.num_seeds": seeds,
        "train.num_steps": STEPS,
        "train.eval_every": STEPS,
    }
    return config.replace(config.Experiment(), values)


def torch_network(network: str):
    """The same MLP for PyTorch."""
    from torch import nn

    depth, width = NETWORKS[network]
    sizes = [784] + [width] * depth
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def torch_ensemble(network: str, seeds: int, splits: Splits) -> Callable[[], float]:
    """torch.func: the gradient vmapped over stacked parameters, Adam on the stacks."""
    import torch
    from torch.func import functional_call, grad, stack_module_state, vmap

    x, y = peers.torch_data(splits)
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
        for _ in range(ENSEMBLE_STEPS):
            rows = torch.randint(0, EXAMPLES, (seeds, BATCH))
            for name, value in gradient(params, x[rows], y[rows]).items():
                params[name].grad = value
            optimizer.step()
        return time.perf_counter() - began

    return run


def main() -> None:
    options = report.parser(__doc__, "8 seeds, one round", write=False).parse_args()
    seeds, rounds = (8, 1) if options.quick else (32, 3)
    data, out = peers.splits(EXAMPLES), {}
    for network in NETWORKS:
        base = experiment(network, seeds)
        ours, plan = peers.sweep_program(base, data)
        one = peers.optax_loop(models.build(base.model, 10), STEPS, BATCH, data)
        # name -> the run, and how many seeds x steps it makes
        runs = {"ours": (ours, seeds * STEPS), "jax_one_by_one": (one, STEPS)}
        try:
            make = functools.partial(torch_network, network)
            eager = peers.torch_loop(make, STEPS, BATCH, *peers.torch_data(data))
            runs["torch_one_by_one"] = eager, STEPS
            ensemble = torch_ensemble(network, seeds, data)
            runs["torch_func_vmap"] = ensemble, seeds * ENSEMBLE_STEPS
        except ImportError:
            out["note"] = "PyTorch is not installed: its rows are left out"
        speeds = report.interleave(runs, rounds, measure=lambda made: made[1] / made[0]())
        over = {n: report.median_ratio(speeds["ours"], v) for n, v in speeds.items() if n != "ours"}
        out[network] = {
            "seeds": seeds,
            "plan": plan,
            "seeds_x_steps_per_second": {
                name: round(statistics.median(v), 1) for name, v in speeds.items()
            },
            "ours_over": {name: round(value, 2) for name, value in over.items()},
            "goals": {"torch_one_by_one": 8, "torch_func_vmap": 2.5},
        }
    report.show(out, options.json)


if __name__ == "__main__":
    main()
