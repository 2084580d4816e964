"""Diagnosis: measurements -> findings, most causal first, each with its numbers, threshold and remedies.

The main rule. G is the change of log rms of the cotangent d loss / d h from the last hidden layer to the first. A
critical network of finite width does not have G = 0: for a product of L layers of widths n_l

    log ||J u||^2  ~  N(-beta/2, beta),   beta = 5 sum_l 1 / n_l        (ReLU; Hanin & Nica 2018, arXiv 1812.05994)

so G is called exploding (vanishing) when G > 6 (G < -6), a factor of 400, *and* it lies more than three standard
deviations, 3 sqrt(beta)/2, above (below) the critical mean -beta/4. Smoother activations fluctuate less: the rule
errs towards calling them healthy.

The start of an explosion is where the maximal-sum run of the growths per layer begins, in the direction of the
backward pass: the last hidden layer when every layer contributes, the guilty one when one does.

Does not cover: the first training steps, and pathologies without growth (saturation, dead units ...).
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import xarray as xr

from gradjax import results

GROWTH_NATS = 6.0
STANDARD_DEVIATIONS = 3.0
_SOURCE = (
    "design rule |G| > 6 nats (a factor of 400), beyond 3 standard deviations of the finite-width fluctuation "
    "log||Ju||^2 ~ N(-beta/2, beta), beta = 5 sum 1/n (Hanin & Nica 2018, arXiv 1812.05994)"
)
REMEDIES = {
    "exploding_gradients": ("critical_initialization", "orthogonal_weights", "layernorm", "clip_by_global_norm"),
    "vanishing_gradients": ("critical_initialization", "orthogonal_weights", "residual", "layernorm"),
    "exploding_activations": ("critical_initialization", "layernorm", "residual_scaling"),
    "non_finite": ("normalize_inputs", "critical_initialization", "lower_learning_rate"),
}


@dataclass(frozen=True)
class Finding:
    """One pathology: what, where it starts, by which numbers, against which threshold, and what to try."""

    pathology: str
    where: dict[str, Any]  # {"kind": "layer", "index": 0-based, "name"}
    evidence: dict[str, Any]  # natural logarithms unless the name says otherwise
    threshold: float
    source: str
    remedies: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """The verdict over one measured network: findings, most causal first, and the measurements they rest on."""

    findings: tuple[Finding, ...]
    measurements: xr.Dataset
    meta: dict[str, Any]

    @property
    def healthy(self) -> bool:
        """Whether there is no finding."""
        return not self.findings

    def to_json(self) -> str:
        """The JSON object of `gradjax diagnose --json`: valid JSON, non-finite numbers as strings."""
        return results.dumps(
            {
                "healthy": self.healthy,
                "findings": [asdict(finding) for finding in self.findings],
                "layers": layers(self.measurements),
                "product": product(self.measurements),
                "theory": theory(self.measurements),
                "meta": self.meta,
            }
        )


def median(ds: xr.Dataset, name: str) -> np.ndarray | None:
    """Median over seeds of a measurement, None where it was too dear to compute; exact with -inf among the seeds."""
    if name not in ds:
        return None
    values = np.asarray(ds[name])
    if np.isnan(values).any():
        return np.where(np.isnan(values).any(0), np.nan, np.median(np.nan_to_num(values, nan=0.0), axis=0))
    low, high = (np.quantile(values, 0.5, axis=0, method=m) for m in ("lower", "higher"))  # -inf + inf is no median
    with np.errstate(invalid="ignore"):
        return np.where(low == high, low, 0.5 * low + 0.5 * high)


_LAYER_FIELDS = (
    "log_activation_rms", "log_cotangent_rms", "log_gradient_norm", "log_singular_value_max", "log_singular_value_min",
)  # fmt: skip


def layers(ds: xr.Dataset) -> list[dict[str, Any]]:
    """One row per hidden layer: its name and the medians over seeds, None for what was too dear."""
    columns = {name: median(ds, name) for name in _LAYER_FIELDS}
    return [
        {"name": str(layer)} | {name: None if x is None else float(x[i]) for name, x in columns.items()}
        for i, layer in enumerate(ds["layer"].values)
    ]


def product(ds: xr.Dataset) -> dict[str, Any]:
    """Log singular values of J, its growth log(||J||_F / sqrt(N)) per layer, and log(sigma_max / sigma_min).

    Medians over seeds; the condition is inf where J has lost rank, and nan where J is zero.
    """
    values = median(ds, "log_singular_values")
    if values is None:
        return {"log_singular_values": None, "growth_nats_per_layer": None, "condition_nats": None}
    seeds = np.asarray(ds["log_singular_values"])
    rms = 0.5 * (np.logaddexp.reduce(2 * seeds, axis=1) - math.log(seeds.shape[1]))
    with np.errstate(invalid="ignore"):
        condition = seeds[:, 0] - seeds[:, -1]
    return {
        "log_singular_values": values,
        "growth_nats_per_layer": float(np.median(rms)) / (ds.sizes["layer"] - 1),
        "condition_nats": float(np.median(condition)),
    }


def theory(ds: xr.Dataset) -> dict[str, Any]:
    """The growth G_l of log rms cotangent from the last layer to layer l: theory, measurement, and their distance

        z_l = (mean_s G_l - G_l of theory) / (max(std_s G_l, sd_l of theory) / sqrt(num_seeds)),      s the seeds

    Theory is `gradjax.theory`'s mean of the log at this width and batch: no bias of order depth / width is left in G.
    The larger deviation counts because few seeds of a skewed law often show too small a one, and theory's leaves out
    what it does not know. `note` says why there is none; null where something is not finite.
    """
    fields = ("growth_nats_per_layer", "measured_nats_per_layer", "standard_error", "standard_errors")
    rows = [{"name": str(name), "log_cotangent_rms": None, "standard_errors": None} for name in ds["layer"].values]
    out: dict[str, Any] = {"note": ds.attrs.get("theory", ""), **dict.fromkeys(fields), "layers": rows}
    steps = len(rows) - 1
    if "theory_log_cotangent_rms" not in ds or not steps:
        return out
    expected, measured = np.asarray(ds["theory_log_cotangent_rms"]), np.asarray(ds["log_cotangent_rms"])
    with np.errstate(all="ignore"):
        growth = measured - measured[:, -1:]
        spread = growth.std(0, ddof=min(1, len(growth) - 1))
        error = np.fmax(spread, ds["theory_sd_log_cotangent_rms"].values) / math.sqrt(len(growth))
        z = (growth.mean(0) - expected + expected[-1]) / error
    finite = lambda x: float(x) if np.isfinite(x) else None
    for i, row in enumerate(rows):
        row |= {"log_cotangent_rms": finite(expected[i]), "standard_errors": finite(z[i])}
    per_layer = (np.array([expected[0] - expected[-1], growth[:, 0].mean(), error[0]]) / steps).tolist()
    return out | dict(zip(fields, map(finite, (*per_layer, z[0])), strict=True))


def maximal_run(growth: np.ndarray) -> tuple[int, int]:
    """The run [first, last] of `growth` with the largest sum (Kadane's algorithm); ties go to the earliest.

    >>> maximal_run(np.array([0.1, -3.0, 2.0, 2.0, -0.5, 0.2]))
    (2, 3)
    """
    best, run = (-math.inf, 0, 0), (0.0, 0)
    for i, value in enumerate(growth):
        run = (run[0] + float(value), run[1]) if run[0] > 0 else (float(value), i)
        if run[0] > best[0]:
            best = (run[0], run[1], i)
    return best[1], best[2]


def _where(ds: xr.Dataset, index: int) -> dict[str, Any]:
    return {"kind": "layer", "index": index, "name": str(ds["layer"].values[index])}


def _overflow(ds: xr.Dataset) -> Finding | None:
    """The first layer whose activations are not finite in some seed: nothing behind it can be measured."""
    activation = np.asarray(ds["log_activation_rms"])
    bad = np.isnan(activation) | np.isposinf(activation)
    if not bad.any():
        return None
    starts = [int(row.argmax()) for row in bad if row.any()]
    start = int(np.median(starts))
    before = activation[bad.any(1), max(start - 1, 0)]
    return Finding(
        "exploding_activations",
        _where(ds, start),
        {"share_of_seeds": len(starts) / len(bad), "log_activation_rms_before": float(np.median(before))},
        math.log(float(np.finfo(np.float32).max)),
        "the forward pass leaves the range of float32, |h| > 3.4e38; gradients behind it cannot be measured",
        REMEDIES["exploding_activations"],
    )


def _non_finite(ds: xr.Dataset) -> Finding | None:
    """Finite activations but a loss or cotangent that is not: the read-out or the loss itself."""
    cotangent = np.asarray(ds["log_cotangent_rms"])
    bad = np.isnan(cotangent) | np.isposinf(cotangent)
    if not bad.any():
        return None
    last = max(int(np.flatnonzero(row)[-1]) for row in bad if row.any())
    evidence = {"share_of_seeds": float(bad.any(1).mean()), "loss": float(np.median(ds["loss"]))}
    source = "a cotangent that is inf or NaN where every activation is finite"
    return Finding("non_finite", _where(ds, last), evidence, math.inf, source, REMEDIES["non_finite"])


def _gradient_growth(ds: xr.Dataset) -> Finding | None:
    """The main rule of the module's docstring."""
    cotangent, activation, gain = (median(ds, f"log_{x}") for x in ("cotangent_rms", "activation_rms", "gain"))
    assert cotangent is not None and activation is not None
    steps = len(cotangent) - 1
    if steps == 0 or cotangent[-1] == -np.inf:
        return None
    beta = 5.0 * steps / float(ds.attrs["width"])
    mean, deviation = -beta / 4, math.sqrt(beta) / 2
    growth = float(cotangent[0] - cotangent[-1])
    exploding = max(GROWTH_NATS, mean + STANDARD_DEVIATIONS * deviation)
    vanishing = min(-GROWTH_NATS, mean - STANDARD_DEVIATIONS * deviation)
    if vanishing <= growth <= exploding:
        return None
    pathology = "exploding_gradients" if growth > 0 else "vanishing_gradients"
    with np.errstate(invalid="ignore"):  # behind a cut every cotangent is -inf
        backward = np.sign(growth) * (cotangent[:-1] - cotangent[1:])[::-1]
    first, last = _guilty_run(backward)
    return Finding(
        pathology,
        _where(ds, steps - first),
        {
            "growth_nats": growth,
            "growth_nats_per_layer": growth / steps,
            "standard_deviations": (growth - mean) / deviation,
            "run_ends_at": str(ds["layer"].values[steps - 1 - last]),
            "log_layer_gain": None if gain is None else float(np.median(gain[1:])),
            "log_activation_rms_first": float(activation[0]),
            "log_activation_rms_last": float(activation[-1]),
        },
        exploding if growth > 0 else vanishing,
        _SOURCE,
        REMEDIES[pathology],
    )


def _guilty_run(backward: np.ndarray) -> tuple[int, int]:
    """Where a growth per layer (in the order of the backward pass, of positive sum) takes place.

    The run of the largest sum after half the mean growth is taken off every layer, so that the fluctuations of
    healthy layers do not join the run of one guilty layer. An infinite growth (a cut) is a run by itself.
    """
    infinite = np.flatnonzero(np.isposinf(backward))
    if infinite.size:
        return int(infinite[0]), int(infinite[0])
    return maximal_run(backward - backward.mean() / 2)


def judge(ds: xr.Dataset, meta: dict[str, Any] | None = None) -> Diagnosis:
    """Findings of a dataset of `gradjax.measure.measure` (medians over its seeds); `meta` goes into the JSON."""
    overflow = _overflow(ds) or _non_finite(ds)
    found = [overflow or _gradient_growth(ds)]
    return Diagnosis(tuple(f for f in found if f is not None), ds, meta or {})


# -- in words --------------------------------------------------------------------------------------------


def factor(nats: float) -> str:
    """e^nats as people read it, however large: `8.5e+12`, `1.4e+217`.

    >>> factor(0.5), factor(500.0)
    ('1.65', '1.4e+217')
    """
    if not math.isfinite(nats):
        return "0" if nats < 0 else str(nats)
    if abs(nats) < 3:
        return f"{math.exp(nats):.2f}"
    exponent = math.floor(nats / math.log(10))
    digits = f"{math.exp(nats - exponent * math.log(10)):.1f}"
    return f"{digits.removesuffix('.0')}e{exponent:+03d}"


def explain(finding: Finding) -> str:
    """One finding in plain words, with its numbers."""
    name, e = finding.where["name"], finding.evidence
    if finding.pathology == "exploding_activations":
        return (
            f"The forward pass leaves the range of float32 at {name} in {e['share_of_seeds']:.0%} of the seeds "
            f"(rms before it {factor(e['log_activation_rms_before'])}); nothing behind it can be measured."
        )
    if finding.pathology == "non_finite":
        return f"Activations are finite, but the cotangent at {name} is not (median loss {e['loss']:.3g})."
    growth = e["growth_nats"]
    text = (
        f"On its way back from {name} to {e['run_ends_at']} the gradient {'grows' if growth > 0 else 'shrinks'}: "
        f"{growth:+.1f} nats in all, a factor of {factor(growth)}, {e['growth_nats_per_layer']:+.3f} nats per layer. "
        f"The threshold is {finding.threshold:+.1f} nats; the growth is {abs(e['standard_deviations']):.0f} standard "
        "deviations from that of a critical network of this width and depth."
    )
    if e["log_layer_gain"] is not None:
        text += (
            f" Why: a layer Jacobian multiplies by {factor(e['log_layer_gain'])} (rms singular value, median over "
            "layers), where 1 keeps a gradient."
        )
    return text
