"""The gradient of a very deep network: compile time, temporary memory, and the cost of saving it.

    python benchmarks/bench_depth.py [--json] [--quick]

A 10,000-layer MLP of width 128, tanh at criticality, batch 64: plain scan against nested
rematerialisation (`model.remat`). Memory is the compiled program's own analysis; the two runs are
interleaved.
"""

import functools
import os
import statistics
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import report

from gradjax.experiment import config, models


def program(depth: int, remat: bool):
    """The compiled gradient with its arguments bound, MiB of temporaries, seconds to compile."""
    model = models.build(config.Model(depth=depth, width=128, remat=remat), 10)
    x = jax.random.normal(jax.random.key(0), (64, 128))
    params = jax.jit(lambda key: model.init(key, x))(jax.random.key(1))

    def loss(params, x):
        return jnp.mean(jax.nn.logsumexp(model.apply(params, x), -1))

    began = time.perf_counter()
    compiled = jax.jit(jax.grad(loss)).lower(params, x).compile()
    seconds = time.perf_counter() - began
    mib = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return functools.partial(compiled, params, x), mib, seconds


def main() -> None:
    options = report.parser(__doc__, "1,000 layers", write=False).parse_args()
    depth, rounds = (1_000, 3) if options.quick else (10_000, 5)
    made = {name: program(depth, name == "remat") for name in ("plain", "remat")}
    times = report.interleave({name: call for name, (call, *_) in made.items()}, rounds)
    over = report.median_ratio(times["remat"], times["plain"])
    out = {
        "depth": depth,
        "compile_seconds": {name: seconds for name, (*_, seconds) in made.items()} | {"goal": 0.5},
        "temporary_mib": {name: mib for name, (_, mib, _) in made.items()} | {"goal": 32},
        "time_ratio": {"remat_over_plain": over, "goal": 1.1},
        "seconds": {name: statistics.median(each) for name, each in times.items()},
    }
    if not options.json:
        for row in out.values():
            if isinstance(row, dict):
                row.update({name: round(value, 3) for name, value in row.items()})
    report.show(out, options.json)


if __name__ == "__main__":
    main()
