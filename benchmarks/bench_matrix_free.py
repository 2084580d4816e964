"""The top 16 singular values of a wide network's Jacobian, against matfree, scipy and torch; what a
block costs.

All peers of this process get the linearised network (its derivatives stored), interleaved; a ratio
is the median over rounds against matfree's bidiagonalisation with 64 products, which reaches 1e-6.
Ours gets the network itself and pays for its linearisation. torch runs in a process of its own and
is left out with a note where it is not installed.

    python benchmarks/bench_matrix_free.py [--quick] [--json] [--write]

`--write` puts the Markdown table into benchmarks/RESULTS.md. Two cores: about 2 minutes; --quick:
half a minute.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
import functools
import importlib.util
import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import report
import scipy.sparse.linalg
from bench_spectrum import row, tanh_step  # its neighbours in this folder
from jax import lax
from matfree import decomp, eig

from gradjax import matrix_free
from gradjax.matrix_free import rows as blocks

K, GAIN = 16, 1.1


@functools.partial(jax.jit, static_argnums=(0, 1))
def network(n, depth):
    """(weights, input, phi' of every layer)."""
    weights = GAIN / n**0.5 * jax.random.normal(jax.random.key(0), (depth, n, n))
    h0 = jax.random.normal(jax.random.key(1), (n,))
    return (
        weights,
        h0,
        lax.scan(lambda h, w: (tanh_step(h, w), 1 - tanh_step(h, w) ** 2), h0, weights)[1],
    )


def product(v, weights, slopes):
    """J v of one vector, linear in v."""
    return lax.scan(lambda v, layer: (layer[1] * (layer[0] @ v), None), v, (weights, slopes))[0]


there = jax.jit(product)
back = jax.jit(
    lambda u, weights, slopes: jax.linear_transpose(lambda v: product(v, weights, slopes), u)(u)[0]
)


@functools.partial(jax.jit, static_argnames=("block_size", "num_iters"))
def ours(weights, h0, key, **options):
    top = matrix_free.top_singular_values(tanh_step, h0, weights, k=K, key=key, **options)
    return top.log_singular_values, top.residual, top.left, top.right


@functools.partial(jax.jit, static_argnames="num_matvecs")
def bidiagonalisation(v, weights, slopes, *, num_matvecs):
    run = eig.svd_partial(decomp.bidiag(num_matvecs, materialize=True, reortho="full"))
    left, values, right = run(product, v, weights, slopes)
    return jnp.log(values[:K]), left[:K], right[:K]


def svds(forward, backward, n):
    operator = scipy.sparse.linalg.LinearOperator(
        (n, n),
        matvec=lambda v: np.asarray(forward(v.reshape(-1))),
        rmatvec=lambda u: np.asarray(backward(u.reshape(-1))),
        dtype=np.float32,
    )
    return np.log(
        np.sort(scipy.sparse.linalg.svds(operator, k=K, rng=np.random.default_rng(0))[1])[::-1]
    )


def interleave(functions, rounds):
    """({name: seconds of every round}, {name: what it returned}), the functions taking turns."""
    returned = {name: jax.block_until_ready(f()) for name, f in functions.items()}
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, f in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(f())
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(x) for name, x in seconds.items()}, returned


def top(n, depth, rounds):
    weights, h0, slopes = network(n, depth)
    key = jax.random.key(2)
    values, residual, *_ = ours(weights, h0, jax.random.key(3), block_size=2 * K, num_iters=9)
    exact = np.asarray(values, np.float64)
    found = [
        row(
            "reference: 32 rows, 9 iterations, largest residual",
            float(jnp.max(residual)),
            None,
            "",
            "",
        )
    ]
    one = lambda v: there(v, weights, slopes)
    back_one = lambda u: back(u, weights, slopes)
    base = "matfree bidiagonalisation, k=64"
    todo = {
        base: lambda: bidiagonalisation(h0, weights, slopes, num_matvecs=64)[0],
        "ours: 16 rows, 6 iterations (the default)": lambda: ours(weights, h0, key),
        "ours: 24 rows, 4 iterations": lambda: ours(weights, h0, key, block_size=24, num_iters=4),
        "matfree bidiagonalisation, k=32": lambda: bidiagonalisation(
            h0, weights, slopes, num_matvecs=32
        )[0],
        "scipy svds": lambda: svds(one, back_one, n),
    }
    seconds, returned = interleave(todo, rounds)
    for name, out in returned.items():
        error = np.abs(
            np.asarray(out[0] if isinstance(out, tuple) else out, np.float64) - exact
        ).max()
        note = f"largest relative error {error:.1e}"
        if isinstance(out, tuple):
            note += f", largest residual^2 {float(jnp.max(out[1])) ** 2:.1e}"
        goal = 0.25 if "default" in name and n == 2048 else None
        value, unit = float(np.median(seconds[name] / seconds[base])), "x matfree k=64"
        if name == base:
            value, unit = 1e3 * float(np.median(seconds[base])), "ms"
        found.append(row(f"top {K}, N={n}, L={depth}: {name}", value, goal, note, unit))
    return found, 1e3 * float(np.median(seconds[base]))


def block_cost(n, depth, rounds):
    """A block's price in single products J v (float32, stored slopes, the network's own layout)."""
    weights, h0, slopes = network(n, depth)

    todo = {}
    for size in (1, 8, 16, 32):
        block = jax.random.normal(jax.random.key(size), (size, n))
        for transpose in (False, True):

            def run(
                w, h, b, t=transpose
            ):  # twice, so that the linearisation is not in the difference
                links = blocks.linearize(tanh_step, h, w)[0]
                return blocks.apply(links, blocks.apply(links, b, transpose=t)[0], transpose=t)[0]

            name = f"{'J^T u' if transpose else 'J v'}, {size} rows"
            todo[name] = functools.partial(jax.jit(run), weights, h0, block)
    todo["linearisation"] = functools.partial(
        jax.jit(lambda w, h: blocks.linearize(tanh_step, h, w)[0][0].layers[0]), weights, h0
    )
    todo["one vector"] = functools.partial(there, h0, weights, slopes)
    seconds, _ = interleave(todo, rounds)
    unit, base, whole = (
        "x J v of one vector",
        seconds.pop("one vector"),
        seconds.pop("linearisation"),
    )
    found = [
        row(f"linearisation, N={n}, L={depth}", float(np.median(whole / base)), None, "", unit)
    ]
    return found + [
        row(k, float(np.median((x - whole) / 2 / base)), None, "", unit) for k, x in seconds.items()
    ]


TORCH = """
import sys, time, torch
n, depth = map(int, sys.argv[1:])
torch.manual_seed(0)
weights = 1.1 / n**0.5 * torch.randn(depth, n, n)
def f(h):
    for w in weights:
        h = torch.tanh(w @ h)
    return h
def run():
    return torch.svd_lowrank(torch.func.jacrev(f)(torch.randn(n)), q=32, niter=2)[1][:16]
run()
start = time.perf_counter()
run()
print(time.perf_counter() - start)
"""


def torch_peer(n, depth, milliseconds):
    name = "torch jacrev + svd_lowrank (q=32, niter=2)"
    if importlib.util.find_spec("torch") is None:
        return [row(name, None, None, "torch is not installed here (make bench installs it)", "")]
    done = subprocess.run(
        [sys.executable, "-c", TORCH, str(n), str(depth)], capture_output=True, text=True
    )
    if done.returncode:
        return [row(name, None, None, f"failed: {done.stderr.strip().splitlines()[-1]}")]
    return [
        row(
            name,
            1e3 * float(done.stdout.split()[-1]) / milliseconds,
            None,
            "its own process",
            "x matfree k=64",
        )
    ]


def markdown(rows, about, seconds):
    lines = ["## Top singular values, matrix-free", "", f"{about}; {seconds:.0f} s in all.", ""]
    lines += [
        "Times are medians of ratios over interleaved rounds; errors are against a larger Krylov space.",
        "",
    ]
    lines += ["| what | value | goal | met | note |", "|---|---|---|---|---|"]
    for r in rows:
        value = "-" if r["value"] is None else f"{r['value']:.2g} {r['unit']}".strip()
        met = {None: "", True: "yes", False: "**no**"}[r["met"]]
        lines.append(f"| {r['what']} | {value} | {r['goal'] or '-'} | {met} | {r['note']} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="width 512, depth 8")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON at the end")
    parser.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    args = parser.parse_args()
    n, depth = (512, 8) if args.quick else (2048, 32)
    start, about = time.time(), report.machine(numpy=np.__version__)
    found, milliseconds = top(n, depth, 3)
    found += block_cost(n, depth, 3) + torch_peer(n, depth, milliseconds)
    seconds = time.time() - start
    if args.json:
        print(json.dumps({"machine": about, "seconds": seconds, "rows": found}, indent=1))
    if args.write:
        report.write("bench_matrix_free", markdown(found, report.in_words(about), seconds))
    print(f"{seconds:.0f} s")


if __name__ == "__main__":
    main()
