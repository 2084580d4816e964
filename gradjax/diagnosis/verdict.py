"""Diagnosis: evidence -> findings, most causal first, as an object, JSON, figure and plain words.

`diagnose` takes any loss function; the command line takes configs and goes the same way
(`gradjax.experiment.measure`). The rules and their thresholds are in `gradjax.diagnosis.rules`,
what they rest on in `gradjax.diagnosis.evidence`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import optax
import xarray as xr

from gradjax.diagnosis import dynamics, measurements, rules, words
from gradjax.diagnosis.evidence import Evidence, Measurement
from gradjax.diagnosis.rules import Finding
from gradjax.report import files

PyTree = Any


@dataclass(frozen=True)
class Diagnosis:
    """The verdict over a network: findings, most causal first, and the measurements they rest
    on.
    """

    findings: tuple[Finding, ...]
    measurements: xr.Dataset
    meta: dict[str, Any]
    not_run: dict[str, str]  # rule -> what it would need

    @property
    def healthy(self) -> bool:
        """Whether there is no finding."""
        return not self.findings

    @property
    def headline(self) -> str:
        """The findings' names in one line, `healthy` without any."""
        return ", ".join(finding.pathology for finding in self.findings) or "healthy"

    def to_json(self) -> str:
        """The JSON object of `gradjax diagnose --json`: valid JSON, non-finite numbers as
        strings.
        """
        return files.dumps(
            {
                "healthy": self.healthy,
                "findings": [asdict(finding) for finding in self.findings],
                "layers": measurements.layers(self.measurements),
                "product": measurements.product(self.measurements),
                "theory": measurements.theory(self.measurements),
                "not_run": self.not_run,
                "meta": self.meta,
            }
        )

    def figure(self) -> Any:
        """A matplotlib figure of what goes forward and what comes back per layer, the findings'
        places marked.
        """
        from gradjax.report.network import diagnosis_figure
        from gradjax.report.verdict import verdict_figure

        ds, title = self.measurements, self.headline.replace("_", " ")
        if "log_gain" in ds:
            return diagnosis_figure(ds, title)
        return verdict_figure(ds, [mark for f in self.findings for mark in _marks(f, ds)], title)

    def __str__(self) -> str:
        parts = [f"verdict: {self.headline}"]
        for finding in self.findings:
            parts += [words.explain(finding), f"Remedies to try: {', '.join(finding.remedies)}."]
        if self.not_run:
            parts.append(
                "Not run: "
                + "; ".join(f"{rule} ({why})" for rule, why in self.not_run.items())
                + "."
            )
        return "\n".join(parts)


# -- the way in ------------------------------------------------------------------------------------------


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
) -> Diagnosis:
    """What ails a network, at the given parameters and data: pathology, layer, cause, numbers,
    remedies.

    Module outputs of Linen, NNX and Equinox have names by themselves; in a plain function mark values with
    `gradjax.tap`. Rules about training need `tx` (they take `num_steps` steps on the given arguments), `learning_rate`
    (the curvature is compared with 2 / learning_rate) or `history`; those without are listed in `not_run`.

    Args:
      loss_fn: (params, *args) -> loss of shape (), or (loss, aux) with `has_aux`.
      params: pytree of floating arrays, or an NNX or Equinox model.
      args: one batch, examples on the first axis; what is no array is static.
      has_aux: as in `jax.value_and_grad`.
      tx: Optax optimiser of the run.
      opt_state: its state; `tx.init(params)` by default.
      learning_rate: of plain gradient descent (or momentum), for the rule on curvature.
      num_steps: how many steps are taken with `tx`.
      history: losses (steps,), or a mapping with "loss" such as `gradjax.Monitor.history`.

    Returns:
      `Diagnosis`; `print` it.

    Raises:
      ValueError: as `gradjax.probe`.

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
    examination = Measurement(loss_fn, params, args, has_aux)
    evidence = examination()
    dynamics_seen, not_run = dynamics.examine(
        examination, args, has_aux, tx, opt_state, learning_rate, num_steps, history
    )
    not_run |= {f"value {name}": why for name, why in evidence.skipped.items()}
    meta = {"loss": evidence.loss, "layers": len(evidence.layers), "hidden_layers": evidence.hidden}
    return Diagnosis(
        rules.findings(evidence, dynamics_seen), measurements.dataset([evidence]), meta, not_run
    )


def _marks(finding: Finding, ds: xr.Dataset) -> list[tuple[str, int, str]]:
    """(dimension of the dataset, index, text) of where a finding starts; none where it has no place
    there.
    """
    kind, index, name = (finding.where[key] for key in ("kind", "index", "name"))
    if kind == "step" and "recurrence" in ds.attrs and name == f"{ds.attrs['recurrence']}[{index}]":
        return [("time", index, finding.pathology.replace("_", " "))]
    is_layer = kind == "layer" or (
        kind == "step" and name != "loss"
    )  # the steps of an unrolled recurrence
    has_place = is_layer and 0 <= index < ds.sizes["layer"]
    return [("layer", index, finding.pathology.replace("_", " "))] if has_place else []


ALWAYS = ("non_finite", "exploding_activations")  # one seed is enough


def vote(seeds: Sequence[tuple[Finding, ...]]) -> tuple[Finding, ...]:
    """The findings of half of the seeds, each as the seed in the middle (by where it starts) has
    it.
    """
    out = []
    for name in rules.CAUSAL:
        found = sorted(
            (f for each in seeds for f in each if f.pathology == name),
            key=lambda f: f.where["index"],
        )
        if found and (2 * len(found) >= len(seeds) or name in ALWAYS):
            middle = found[(len(found) - 1) // 2]
            out.append(
                replace(
                    middle,
                    evidence=middle.evidence | {"fraction_of_seeds": len(found) / len(seeds)},
                )
            )
    return tuple(rules.in_order(out))


def judge(
    evidence: Sequence[Evidence], ds: xr.Dataset, meta: dict[str, Any] | None = None
) -> Diagnosis:
    """The diagnosis of several seeds of one network; `ds` holds what was measured, `meta` goes into
    the JSON.
    """
    return Diagnosis(vote([rules.findings(e, None) for e in evidence]), ds, meta or {}, {})
