"""Diagnosis: evidence -> findings, most causal first, as an object, JSON, figure and plain words.

`diagnose` takes any loss function; the command line takes configs and goes the same way
(`gradjax.experiment.measure`). The rules and their thresholds are in `gradjax.diagnosis.rules`, the
measurements they rest on in `gradjax.diagnosis.evidence`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import optax

from gradjax.core.checks import without_debug_checks
from gradjax.core.extras import needed_for
from gradjax.diagnosis import dynamics, measurements, rules, words
from gradjax.diagnosis.evidence import Evidence
from gradjax.diagnosis.probing import Measurement
from gradjax.diagnosis.rules import Finding
from gradjax.report import files

if TYPE_CHECKING:
    import xarray as xr

PyTree = Any


@dataclass(frozen=True)
class Diagnosis:
    """The verdict on a network: findings, most causal first, and the measurements they rest on.

    Attributes:
      findings: one for each pathology and place.
      measured: the measurements per layer and seed; `measurements` has them as a dataset.
      meta: the loss, the number of layers, and what the caller adds.
      not_run: rule -> what it would need.
      notes: what is no pathology, and explains what was measured.
    """

    findings: tuple[Finding, ...]
    measured: measurements.Table | xr.Dataset
    meta: dict[str, Any]
    not_run: dict[str, str]
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def measurements(self) -> xr.Dataset:
        """What was measured, as an `xarray.Dataset` over layers and seeds.

        Raises:
          ImportError: xarray is not installed; it comes with `gradjax[lab]`.
        """
        if isinstance(self.measured, measurements.Table):
            return self.measured.to_xarray()
        return self.measured

    @property
    def healthy(self) -> bool:
        """Whether there is no finding."""
        return not self.findings

    @property
    def headline(self) -> str:
        """The findings' names in one line, `healthy` without any."""
        return ", ".join(finding.pathology for finding in self.findings) or "healthy"

    def to_json(self) -> str:
        """The JSON object of `gradjax diagnose --json`; non-finite numbers are strings."""
        return files.dumps(
            {
                "healthy": self.healthy,
                "findings": [asdict(finding) for finding in self.findings],
                "layers": measurements.layers(self.measured),
                "product": measurements.product(self.measured),
                "theory": measurements.theory(self.measured),
                "not_run": self.not_run,
                "notes": list(self.notes),
                "meta": self.meta,
            }
        )

    def figure(self) -> Any:
        """A matplotlib figure of signals and gradients per layer, with the findings' places marked.

        Raises:
          ImportError: matplotlib or xarray is not installed; both come with `gradjax[lab]`.
        """
        with needed_for("Diagnosis.figure"):
            from gradjax.report.network import diagnosis_figure
            from gradjax.report.verdict import verdict_figure
        ds, title = self.measurements, self.headline.replace("_", " ")
        if "log_gain" in ds:
            return diagnosis_figure(ds, title)
        marks = [_mark(finding, ds) for finding in self.findings]
        return verdict_figure(ds, [mark for mark in marks if mark], title)

    def __str__(self) -> str:
        lines = [f"verdict: {self.headline}"]
        for finding in self.findings:
            lines.append(words.explain(finding))
            if "text" not in finding.evidence or finding.pathology != "non_finite":
                lines.append(f"Remedies to try: {', '.join(finding.remedies)}.")
        lines += [f"Note: {note}" for note in self.notes]
        if self.not_run:
            rules_left = [f"{rule} ({why})" for rule, why in self.not_run.items()]
            lines.append(f"Not run: {'; '.join(rules_left)}.")
        return "\n".join(lines)


def _mark(finding: Finding, ds: xr.Dataset) -> tuple[str, int, str] | None:
    """(axis of the dataset, index, text) of the place where a finding starts; None where the
    dataset does not hold that place.
    """
    kind, index, name = (finding.where[key] for key in ("kind", "index", "name"))
    text = finding.pathology.replace("_", " ")
    if kind == "step" and "recurrence" in ds.attrs and name == f"{ds.attrs['recurrence']}[{index}]":
        return "time", index, text
    # the layers may be the steps of an unrolled recurrence; a step of training has no place here
    is_layer = kind == "layer" or (kind == "step" and name != "loss")
    if is_layer and 0 <= index < ds.sizes["layer"]:
        return "layer", index, text
    return None


# Entry points


@without_debug_checks()
def diagnose(
    loss_fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    has_aux: bool = False,
    tx: optax.GradientTransformation | None = None,
    opt_state: PyTree = None,
    learning_rate: float | None = None,
    num_steps: int = 20,
    history: Any = None,
    unused: Sequence[str] = (),
) -> Diagnosis:
    """Find what is wrong with a network at the given parameters and data: pathology, layer, cause,
    numbers, remedies.

    Module outputs of Linen, NNX and Equinox are named automatically; in a plain function mark
    values with `gradjax.tap`. Rules about training need `tx` (they take `num_steps` steps on the
    given arguments), `learning_rate` (the curvature is compared with 2 / learning_rate) or
    `history`; those without are listed in `not_run`.

    Args:
      loss_fn: (params, *args) -> loss of shape (), or (loss, aux) with `has_aux`.
      params: pytree of floating arrays, or an NNX or Equinox model.
      args: one batch, examples on the first axis; non-array leaves are static.
      has_aux: as in `jax.value_and_grad`.
      tx: the Optax optimiser of the run.
      opt_state: its state, also as an `nnx.Optimizer` or a `TrainState`; `tx.init(params)` by
        default.
      learning_rate: of plain gradient descent (or momentum), for the rule on curvature.
      num_steps: how many steps are taken with `tx`, at least 1.
      history: losses (steps,), or a mapping with "loss" such as `gradjax.Monitor.history`.
      unused: key paths, or pieces of them (`"target"`, `"edges[2]"`), of parameters that are meant
        to have no gradient: frozen ones, buffers, a last layer that is not read. They are not
        reported as untrained.

    Returns:
      `Diagnosis`; `print` it.

    Raises:
      ValueError: `num_steps`, `history` or `unused` is not as above; and as `gradjax.probe`.

    >>> import jax, jax.numpy as jnp, gradjax
    >>> def loss(ws, x):
    ...     for i, w in enumerate(ws):
    ...         x = gradjax.tap(jnp.tanh(x @ w), f"layer{i}")
    ...     return jnp.mean(x**2)
    >>> ws = 3.0 / 64**0.5 * jax.random.normal(jax.random.key(0), (40, 64, 64))
    >>> gradjax.diagnose(loss, list(ws), jax.random.normal(jax.random.key(1), (32, 64))).headline
    'exploding_gradients'
    """
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"diagnose: num_steps is {num_steps}; an integer of at least 1 is needed.")
    measurement = Measurement(loss_fn, params, args, has_aux)
    evidence = _without(measurement(), unused)
    seen, not_run = dynamics.observe(
        measurement, args, has_aux, tx, opt_state, learning_rate, num_steps, history
    )
    not_run |= {f"value {name}": why for name, why in evidence.skipped.items()}
    meta = {"loss": evidence.loss, "layers": len(evidence.layers), "hidden_layers": evidence.hidden}
    found = rules.findings(evidence, seen)
    notes = tuple(rules.notes(evidence))
    return Diagnosis(found, measurements.table([evidence]), meta, not_run, notes)


def _without(evidence: Evidence, unused: Sequence[str]) -> Evidence:
    """The evidence in which the untrained parameters that are declared so are left out."""
    pieces = (unused,) if isinstance(unused, str) else tuple(unused)
    names = [_keys(name) for name in evidence.leaf_names]
    for piece in pieces:
        if not any(_keys(piece) in name for name in names):
            raise ValueError(
                f"diagnose: unused={piece!r} is in no parameter's key path; they are "
                f"{', '.join(evidence.leaf_names)}."
            )
    declared = {i for i, name in enumerate(names) if any(_keys(p) in name for p in pieces)}
    left = [i for i in evidence.structure.untrained if i not in declared]
    return replace(evidence, structure=evidence.structure._replace(untrained=left))


def _keys(path: str) -> str:
    """A key path as its keys: `['edges'][2]` and `edges[2]` are the same."""
    return "/".join(["", *re.findall(r"[^\[\]'\".]+", path), ""])


def judge(
    evidence: Sequence[Evidence],
    ds: measurements.Table | xr.Dataset,
    meta: dict[str, Any] | None = None,
) -> Diagnosis:
    """The diagnosis of several seeds of one network.

    Args:
      evidence: of every seed.
      ds: their measurements.
      meta: what the JSON object reports beside the findings.
    """
    found = vote([rules.findings(e, None) for e in evidence])
    return Diagnosis(found, ds, meta or {}, {})


def vote(seeds: Sequence[tuple[Finding, ...]]) -> tuple[Finding, ...]:
    """The findings of at least half of the seeds (of some pathologies, of any seed), most causal
    first. Each is that of the seed in the middle, by where it starts.
    """
    out = []
    for name, entry in rules.BY_NAME.items():
        found = [finding for seed in seeds for finding in seed if finding.pathology == name]
        if not found or (2 * len(found) < len(seeds) and not entry.one_seed):
            continue
        found.sort(key=lambda finding: finding.where["index"])
        middle = found[(len(found) - 1) // 2]
        fraction = {"fraction_of_seeds": len(found) / len(seeds)}
        out.append(replace(middle, evidence=middle.evidence | fraction))
    return tuple(rules.in_order(out))
