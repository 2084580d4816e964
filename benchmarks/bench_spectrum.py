"""The spectrum of the layer product against the least work that forms the product at all.

Floor: a `lax.scan` of L float32 N x N matrix products, in the same process. Rows are measured
interleaved with their floor, and a ratio is the median over rounds, so that a busy machine disturbs
both alike. Peers run in processes of their own; one that is not installed is left out with a note.

    python benchmarks/bench_spectrum.py [--quick] [--json] [--write]

`--write` puts the Markdown table into benchmarks/RESULTS.md. Two cores: about 6 minutes; --quick:
1.
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
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import report
from jax import lax
from report import row

from gradjax import spectrum
from gradjax.spectrum import grading

HERE = Path(__file__).parent
DATA = Path(os.environ.get("GRADJAX_DATA_DIR", HERE.parents[1] / "shared" / "data"))
DEPTH = 128
# kind, gain, tolerance, goal in floors
NETWORKS = [
    ("orthogonal", 1.0, 1e-5, 1.5),
    ("orthogonal", 1.0, 1e-6, 2.2),
    ("gaussian", 1.0, 1e-6, 4.5),
]
NETWORKS += [("gaussian", 1.5, 1e-6, 4.5)]


def tanh_step(h, w):
    return jnp.tanh(w @ h)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def network(kind, gain, depth, n, seed):
    """(weights, layer Jacobians, input) of a tanh network."""
    keys = jax.random.split(jax.random.key(seed), depth)
    initial = jax.nn.initializers.normal(gain / n**0.5)
    if kind == "orthogonal":
        initial = jax.nn.initializers.orthogonal(gain)
    weights = lax.map(lambda key: initial(key, (n, n)), keys)
    h0 = jax.random.normal(jax.random.key(seed + 1000), (n,))

    def one(h, w):
        h = tanh_step(h, w)
        return h, (1 - h * h)[:, None] * w

    return weights, lax.scan(one, h0, weights)[1], h0


@jax.jit
def floor(factors):
    """L float32 products; networks along a leading axis are multiplied one after another."""

    def one(w):
        start = jnp.eye(w.shape[-1], dtype=w.dtype)
        return lax.scan(lambda j, x: (x @ j, None), start, w)[0]

    return lax.map(one, factors) if factors.ndim == 4 else one(factors)


@jax.jit
def batched_floor(factors):
    start = jnp.broadcast_to(
        jnp.eye(factors.shape[-1], dtype=factors.dtype), (factors.shape[0], *factors.shape[2:])
    )
    return lax.scan(lambda j, w: (w @ j, None), start, jnp.swapaxes(factors, 0, 1))[0]


@jax.jit
def naive(h0, weights):
    """What one writes without gradjax: jacrev of the whole network, and its SVD, in float32."""

    def forward(h):
        return lax.scan(lambda h, w: (tanh_step(h, w), None), h, weights)[0]

    return jnp.log(jnp.linalg.svd(jax.jacrev(forward)(h0), compute_uv=False))


def interleave(base, functions, rounds):
    """{name: median of time / base time}, and the median base time in ms."""
    times = report.interleave({"base": base, **functions}, rounds)
    over = {name: report.median_ratio(times[name], times["base"]) for name in functions}
    return over, 1e3 * statistics.median(times["base"])


def accuracy(quick):
    rows = []
    file = DATA / "product_svd" / "reference.npz"
    if file.exists():
        data = np.load(file)
        for case in sorted(k[:-2] for k in data if k.endswith("_W")):
            factors, exact = data[f"{case}_W"], data[f"{case}_ref"]
            values, info = spectrum.log_singular_values(factors, return_info=True)
            traced = jax.jit(spectrum.log_singular_values)(jnp.asarray(factors))
            perturbed = np.abs(data[f"{case}_pert"] - exact).max()
            note = (
                f"perturbing the factors by 2^-24: {perturbed:.1e}; blocks {info.blocks}, "
                f"rejects {info.rejects}"
            )
            error = float(np.abs(values - exact).max())
            rows.append(row(f"error, {case}", error, 1e-6, note, "nats"))
            error = float(np.abs(np.asarray(traced) - exact).max())
            what = f"error, {case}, float32 on tracers"
            rows.append(row(what, error, float(10 * perturbed), "", "nats"))
    for n in (64,) if quick else (64, 256, 512):
        rng = np.random.default_rng(n)
        q = [np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(61)]
        logs = np.linspace(690.8 / 2, -690.8 / 2, n) / 60 + 0.3 * rng.standard_normal((60, n))
        factors = np.stack([q[i + 1] * np.exp(d) @ q[i].T for i, d in enumerate(logs)])
        exact = -np.sort(-logs.sum(0))
        error = float(np.abs(spectrum.log_singular_values(factors) - exact).max())
        what = f"error, built to condition 1e300, N={n}, L=60"
        rows.append(row(what, error, 1e-6, "", "nats"))
    return rows


def speed(quick):
    rows = []
    for n in (128,) if quick else (256, 512):
        rounds = 5 if n < 512 else 3
        for kind, gain, tol, goal in NETWORKS:
            weights, jacobians, h0 = network(kind, gain, DEPTH, n, 0)
            where = f"{kind} tanh g={gain}, N={n}, L={DEPTH}, tol {tol:.0e}"

            def of_factors(j=jacobians, t=tol):
                return spectrum.log_singular_values(j, tol=t)

            def of_step(w=weights, h=h0, t=tol):
                return spectrum.jacobian_spectrum(tanh_step, h, w, tol=t)

            todo = {"factors": of_factors, "step": of_step}
            if tol == 1e-6:
                todo["naive"] = lambda w=weights, h=h0: naive(h, w)
                todo["finish"] = finish_of(jacobians, tol)
            found, ms = interleave(lambda j=jacobians: floor(j), todo, rounds)
            values, info = spectrum.log_singular_values(jacobians, tol=tol, return_info=True)
            spread = values[0] - values[-1]
            note = f"floor {ms:.0f} ms; blocks {info.blocks}, rejects {info.rejects}, "
            note += f"{spread:.0f} nats"
            rows.append(row(f"layer Jacobians given: {where}", found["factors"], goal, note))
            note = "each layer's jacrev multiplies by the identity: one float32 product more"
            rows.append(row(f"from the step: {where}", found["step"], goal, note))
            if "naive" in found:
                error = np.abs(np.asarray(naive(h0, weights), float) - values)
                note = "noise" if not error.max() < 0.1 else ""
                note = f"max error {error.max():.1e} nats {note}"
                what = f"jax.jacrev + SVD in float32: {where}"
                rows.append(row(what, found["naive"], None, note))
                rows.append(row(f"the finish: {where}", found["finish"], 0.4))
    return rows


def finish_of(jacobians, tol):
    """Grading and windows of a finished sweep."""
    from gradjax.spectrum import product

    with jax.enable_x64(True):
        depth, n = jacobians.shape[:2]

        def layer(w):
            return lambda carry, i: (carry, w[i])

        sweep = jax.jit(
            lambda w: product.sweep(layer(w), (), depth, n, tol=jnp.asarray(tol), dtype=w.dtype)
        )
        done = jax.block_until_ready(sweep(jacobians))
        grade = jax.jit(
            lambda p: jax.tree.map(lambda x: x[None], grading.finish(p, grading.passes(tol)))
        )

    def run():
        with jax.enable_x64(True):
            return grading.windows(grade(done), tol)

    return run


def batch(quick):
    rows = []
    for kind, gain in (("orthogonal", 1.0), ("gaussian", 1.0), ("gaussian", 1.5)):
        factors = jnp.stack([network(kind, gain, 32, 64, seed)[1] for seed in range(16)])
        todo = {
            "spectrum": lambda j=factors: spectrum.log_singular_values(j),
            "map": lambda j=factors: floor(j),
        }
        found, ms = interleave(lambda j=factors: batched_floor(j), todo, 9)
        note = f"batched floor {ms:.1f} ms, one network after another {found['map']:.2f} of it"
        rows.append(
            row(f"batch of 16, {kind} tanh g={gain}, N=64, L=32", found["spectrum"], 4.0, note)
        )
    return rows


DEEP = """
import re, sys, time
import jax, jax.numpy as jnp, numpy as np
from scipy.special import digamma, polygamma
from scipy.stats import chi2
from gradjax.spectrum import jacobian_spectrum
n, depth = int(sys.argv[1]), int(sys.argv[2])
step = lambda h, key: jax.random.normal(key, (n, n)) @ h / np.float32(n**0.5)
start = time.time()
found = jacobian_spectrum(step, jnp.zeros(n), jax.random.split(jax.random.key(3), depth))
seconds = time.time() - start
i = np.arange(1, n + 1)
exact = 0.5 * (np.log(2 / n) + digamma((n - i + 1) / 2))
error = np.sqrt(polygamma(1, (n - i + 1) / 2) / (4 * depth))
z = (found.log_singular_values / depth - exact) / error
# ru_maxrss would be the parent's, whose memory this process shared until exec
peak = int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 2**10
print(seconds, peak, chi2.sf((z**2).sum(), n), np.sqrt((z**2).mean()), float(found.condition_nats))
"""


def deep(quick):
    n, depth = (64, 2000) if quick else (256, 10_000)
    done = subprocess.run(
        [sys.executable, "-c", DEEP, str(n), str(depth)], capture_output=True, text=True, check=True
    )
    seconds, peak, p, rms, spread = map(float, done.stdout.split()[-5:])
    where = f"depth {depth}, N={n}, keys as thetas"
    note = (
        f"Newman's exponents: chi-squared p = {p:.3f} (rms z {rms:.2f}), spread {spread:.0f} nats"
    )
    return [
        row(f"{where}: seconds with compilation", seconds, None, note, "s"),
        row(f"{where}: peak memory of the process", peak, 1024.0, "", "MiB"),
        row(f"{where}: Newman rejected (p below 1e-3)", float(p < 1e-3), 0.0, "", ""),
    ]


TORCH = """
import sys, time, torch
n, depth, gain, kind = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
torch.manual_seed(0)
def draw():
    w = torch.empty(n, n)
    if kind == "orthogonal":
        return torch.nn.init.orthogonal_(w)
    return torch.nn.init.normal_(w, std=n**-0.5)
weights = [gain * draw() for _ in range(depth)]
def forward(h):
    for w in weights:
        h = torch.tanh(w @ h)
    return h
h0 = torch.randn(n)
def chain():
    j = torch.eye(n)
    for w in weights:
        j = w @ j
    return j
def run():
    try:
        return torch.linalg.svdvals(torch.func.jacrev(forward)(h0)).log()
    except Exception:
        return torch.full((n,), float("nan"))
chain(), run()
times = []
for _ in range(3):
    start = time.perf_counter(); run(); times.append(time.perf_counter() - start)
print(sorted(times)[1], bool(torch.isfinite(run()).all()))
"""


def torch_peer(quick):
    if importlib.util.find_spec("torch") is None:
        missing = "torch is not installed here (make bench installs it)"
        return [row("torch jacrev + svdvals", None, note=missing)]
    rows = []
    for n in (128,) if quick else (256, 512):
        for kind, gain in (("orthogonal", 1.0), ("gaussian", 1.5)):
            command = [sys.executable, "-c", TORCH, str(n), str(DEPTH), str(gain), kind]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, finite = done.stdout.split()[-2:]
            weights, _, h0 = network(kind, gain, DEPTH, n, 0)
            ours = functools.partial(spectrum.jacobian_spectrum, tanh_step, h0, weights)
            jax.block_until_ready(ours())
            over = report.clock(ours) / float(seconds)
            note = f"torch {1e3 * float(seconds):.0f} ms, its values finite: {finite}"
            goal = 0.4 if kind == "orthogonal" else 1.0
            what = f"over torch jacrev + svdvals: {kind} g={gain}, N={n}"
            rows.append(row(what, over, goal, note, "x"))
    return rows


def main():
    options = report.parser(__doc__, "small sizes").parse_args()
    began, rows = time.time(), []
    for part in (accuracy, speed, batch, deep, torch_peer):
        print(part.__name__, flush=True)
        rows += part(options.quick)
    said = (
        "Floor: a float32 `lax.scan` of the same products, interleaved; ratios are medians of "
        "rounds. A load above the number of cores means that other work ran beside it."
    )
    title = "Spectrum of the layer product"
    report.finish("bench_spectrum", title, said, rows, began, options)


if __name__ == "__main__":
    main()
