"""The gradient of a very deep network: trace and compile time, temporary memory, and the time that
saves it costs.

    python benchmarks/bench_depth.py [--json] [--quick]

A 10,000-layer MLP of width 128, tanh at criticality, batch 64: plain scan against nested
rematerialisation (`model.remat`). Memory is the compiled program's own analysis; the two runs are
interleaved.
"""

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp

from gradjax.experiment import config, models


def program(depth: int, remat: bool):
    """The compiled gradient, its arguments, and the seconds that tracing and compiling took."""
    model = models.build(config.Model(depth=depth, width=128, remat=remat), 10)
    x = jax.random.normal(jax.random.key(0), (64, 128))
    params = jax.jit(lambda key: model.init(key, x))(jax.random.key(1))
    gradient = jax.jit(
        jax.grad(lambda params, x: jnp.mean(jax.nn.logsumexp(model.apply(params, x), -1)))
    )
    began = time.perf_counter()
    compiled = gradient.lower(params, x).compile()
    return compiled, (params, x), time.perf_counter() - began


def seconds(compiled, args) -> float:
    """One run."""
    began = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    return time.perf_counter() - began


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--quick", action="store_true", help="1,000 layers")
    options = parser.parse_args()
    depth, repeats = (1_000, 3) if options.quick else (10_000, 5)
    (plain, args, compile_plain), (remat, _, compile_remat) = (
        program(depth, False),
        program(depth, True),
    )
    times = [(seconds(plain, args), seconds(remat, args)) for _ in range(repeats + 1)][1:]
    mib = {
        name: x.memory_analysis().temp_size_in_bytes / 2**20
        for name, x in (("plain", plain), ("remat", remat))
    }
    out = {
        "depth": depth,
        "compile_seconds": {"plain": compile_plain, "remat": compile_remat, "goal": 0.5},
        "temporary_mib": {**mib, "goal": 32},
        "time_ratio": {"remat_over_plain": statistics.median(b / a for a, b in times), "goal": 1.1},
        "seconds": {
            "plain": statistics.median(a for a, _ in times),
            "remat": statistics.median(b for _, b in times),
        },
    }
    if options.json:
        print(json.dumps(out, indent=2))
        return
    for name, row in out.items():
        print(
            f"{name:16}", row if isinstance(row, int) else {k: round(v, 3) for k, v in row.items()}
        )


if __name__ == "__main__":
    main()
