"""The top 16 singular values of a wide network's Jacobian, against matfree, scipy and torch.

The cost of a block of products is measured too. All peers of this process get the linearised
network (its derivatives stored), interleaved; a ratio is the median over rounds against matfree's
bidiagonalisation with 64 products, which reaches 1e-6. Ours gets the network itself and pays for
its linearisation. torch runs in a process of its own and is left out with a note where it is not
installed.

    python benchmarks/bench_matrix_free.py [--quick] [--json] [--write]

`--write` puts the Markdown table into benchmarks/RESULTS.md. Two cores: about 2 minutes; --quick:
half a minute.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import functools
import importlib.util
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import report
import scipy.sparse.linalg
from bench_spectrum import tanh_step
from jax import lax
from matfree import decomp, eig
from report import row

from gradjax import matrix_free
from gradjax.matrix_free import rows as blocks

K, GAIN = 16, 1.1


@functools.partial(jax.jit, static_argnums=(0, 1))
def network(n, depth):
    """(weights, input, phi' of every layer)."""
    weights = GAIN / n**0.5 * jax.random.normal(jax.random.key(0), (depth, n, n))
    h0 = jax.random.normal(jax.random.key(1), (n,))

    def layer(h, w):
        h = tanh_step(h, w)
        return h, 1 - h**2

    return weights, h0, lax.scan(layer, h0, weights)[1]


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
    values = scipy.sparse.linalg.svds(operator, k=K, rng=np.random.default_rng(0))[1]
    return np.log(np.sort(values)[::-1])


def top(n, depth, rounds):
    weights, h0, slopes = network(n, depth)
    key = jax.random.key(2)
    values, residual, *_ = ours(weights, h0, jax.random.key(3), block_size=2 * K, num_iters=9)
    exact = np.asarray(values, np.float64)
    what = "reference: 32 rows, 9 iterations, largest residual"
    found = [row(what, float(jnp.max(residual)), unit="")]

    def forward(v):
        return there(v, weights, slopes)

    def backward(u):
        return back(u, weights, slopes)

    def matfree(num_matvecs):
        return bidiagonalisation(h0, weights, slopes, num_matvecs=num_matvecs)[0]

    base = "matfree bidiagonalisation, k=64"
    todo = {
        base: lambda: matfree(64),
        "ours: 16 rows, 6 iterations (the default)": lambda: ours(weights, h0, key),
        "ours: 24 rows, 4 iterations": lambda: ours(weights, h0, key, block_size=24, num_iters=4),
        "matfree bidiagonalisation, k=32": lambda: matfree(32),
        "scipy svds": lambda: svds(forward, backward, n),
    }
    returned = {name: f() for name, f in todo.items()}
    seconds = report.interleave(todo, rounds)
    milliseconds = 1e3 * statistics.median(seconds[base])
    for name, out in returned.items():
        logs = out[0] if isinstance(out, tuple) else out
        note = f"largest relative error {np.abs(np.asarray(logs, np.float64) - exact).max():.1e}"
        if isinstance(out, tuple):
            note += f", largest residual^2 {float(jnp.max(out[1])) ** 2:.1e}"
        goal = 0.25 if "default" in name and n == 2048 else None
        value, unit = report.median_ratio(seconds[name], seconds[base]), "x matfree k=64"
        if name == base:
            value, unit = milliseconds, "ms"
        found.append(row(f"top {K}, N={n}, L={depth}: {name}", value, goal, note, unit))
    return found, milliseconds


def block_cost(n, depth, rounds):
    """A block's price in single products J v (float32, stored slopes, the network's own layout)."""
    weights, h0, slopes = network(n, depth)

    def twice(w, h, b, transpose):
        # Twice, so that the linearisation is not in the difference.
        links = blocks.linearize(tanh_step, h, w)[0]
        once = blocks.apply(links, b, transpose=transpose)[0]
        return blocks.apply(links, once, transpose=transpose)[0]

    def linearisation(w, h):
        return blocks.linearize(tanh_step, h, w)[0][0].layers[0]

    run = jax.jit(twice, static_argnames="transpose")
    todo = {}
    for size in (1, 8, 16, 32):
        block = jax.random.normal(jax.random.key(size), (size, n))
        for transpose in (False, True):
            name = f"{'J^T u' if transpose else 'J v'}, {size} rows"
            todo[name] = functools.partial(run, weights, h0, block, transpose=transpose)
    todo["linearisation"] = functools.partial(jax.jit(linearisation), weights, h0)
    todo["one vector"] = functools.partial(there, h0, weights, slopes)
    seconds = {name: np.array(x) for name, x in report.interleave(todo, rounds).items()}
    base, whole = seconds.pop("one vector"), seconds.pop("linearisation")

    def in_products(what, times):
        return row(what, float(np.median(times / base)), unit="x J v of one vector")

    found = [in_products(f"linearisation, N={n}, L={depth}", whole)]
    return found + [in_products(name, (x - whole) / 2) for name, x in seconds.items()]


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
        return [
            row(name, None, note="torch is not installed here (make bench installs it)", unit="")
        ]
    command = [sys.executable, "-c", TORCH, str(n), str(depth)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return [row(name, None, note=f"failed: {done.stderr.strip().splitlines()[-1]}")]
    over = 1e3 * float(done.stdout.split()[-1]) / milliseconds
    return [row(name, over, note="its own process", unit="x matfree k=64")]


def main():
    options = report.parser(__doc__, "width 512, depth 8").parse_args()
    n, depth = (512, 8) if options.quick else (2048, 32)
    began = time.time()
    found, milliseconds = top(n, depth, 3)
    found += block_cost(n, depth, 3) + torch_peer(n, depth, milliseconds)
    said = (
        "Times are medians of ratios over interleaved rounds; errors are against a larger Krylov "
        "space."
    )
    title = "Top singular values, matrix-free"
    report.finish("bench_matrix_free", title, said, found, began, options)


if __name__ == "__main__":
    main()
