"""Diagnosis: evidence -> findings, most causal first, as an object, JSON, figure and plain words.

`diagnose` takes any loss function; the command line takes configs and goes the same way (`gradjax.measure`). The rules
and their thresholds are in `gradjax.rules`, what they rest on in `gradjax.evidence`.
"""

import math
import types
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from jax import lax

from gradjax import matrix_free, results, rules, scale
from gradjax.evidence import Evidence, Examination
from gradjax.rules import Dynamics, Finding
from gradjax.taps import arrays_of, merger
from gradjax.transforms import telemetry

PyTree = Any


@dataclass(frozen=True)
class Diagnosis:
    """The verdict over a network: findings, most causal first, and the measurements they rest on."""

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
        """The JSON object of `gradjax diagnose --json`: valid JSON, non-finite numbers as strings."""
        return results.dumps(
            {
                "healthy": self.healthy,
                "findings": [asdict(finding) for finding in self.findings],
                "layers": layers(self.measurements),
                "product": product(self.measurements),
                "theory": theory(self.measurements),
                "not_run": self.not_run,
                "meta": self.meta,
            }
        )

    def figure(self) -> Any:
        """A matplotlib figure of what goes forward and what comes back per layer, the findings' places marked."""
        from gradjax import plots

        ds, title = self.measurements, self.headline.replace("_", " ")
        if "log_gain" in ds:
            return plots.diagnosis_figure(ds, title)
        return plots.verdict_figure(ds, [mark for f in self.findings for mark in _marks(f, ds)], title)

    def __str__(self) -> str:
        parts = [f"verdict: {self.headline}"]
        for finding in self.findings:
            parts += [explain(finding), f"Remedies to try: {', '.join(finding.remedies)}."]
        if self.not_run:
            parts.append("Not run: " + "; ".join(f"{rule} ({why})" for rule, why in self.not_run.items()) + ".")
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
    """What ails a network, at the given parameters and data: pathology, layer, cause, numbers, remedies.

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
    examination = Examination(loss_fn, params, args, has_aux)
    evidence = examination()
    dynamics, not_run = _dynamics(examination, args, has_aux, tx, opt_state, learning_rate, num_steps, history)
    not_run |= {f"value {name}": why for name, why in evidence.skipped.items()}
    meta = {"loss": evidence.loss, "layers": len(evidence.layers), "hidden_layers": evidence.hidden}
    return Diagnosis(rules.findings(evidence, dynamics), dataset([evidence]), meta, not_run)


def _dynamics(examination, args, has_aux, tx, opt_state, learning_rate, num_steps, history) -> tuple[Dynamics, dict]:
    """What is known of training, and which rules have nothing to go by."""
    not_run, losses, seen, bad, sharpness = {}, np.zeros(0), {}, _bad_leaves(opt_state), None
    largest, log_norms, max_norms = None, None, _max_norms(tx)
    loss_fn, params = examination.traced.loss_fn, examination.traced.params
    scalar = (lambda p, *a: loss_fn(p, *a)[0]) if has_aux else loss_fn
    if tx is not None:
        state = tx.init(params) if opt_state is None else opt_state
        losses, state, largest, log_norms = _steps(scalar, tx, params, state, args, num_steps)
        seen = {key: np.asarray(value) for key, value in telemetry(state).items()}
        bad = bad or (_bad_leaves(state) if np.isfinite(losses).all() else ())
    elif opt_state is None:
        not_run["frozen_optimizer"] = "needs opt_state or tx"
    if not any(key.endswith("/clip_fraction") for key in seen) and not max_norms:
        not_run["clipping_always, clipping_never"] = "need tx that clips: a rule of gradjax.transforms, or by norm"
    if learning_rate is not None:
        found = matrix_free.sharpness(scalar, params, *args, key=jax.random.key(0))
        sharpness = float(found.eigenvalues)
    elif tx is None:
        not_run["unstable_step_size"] = "needs learning_rate or tx"
    from_history = history is not None
    if from_history:
        past = history.get("loss") if isinstance(history, Mapping) else history
        if past is None or np.ndim(past) != 1:
            raise ValueError('diagnose: history must be losses (steps,), or a mapping with such a "loss".')
        losses = np.asarray(past, float)
    else:
        not_run["loss_spikes"] = "needs history"
    half = any(x.dtype == jnp.float16 for x in jax.tree.leaves(params))
    steps = (largest, log_norms, max_norms, half, sharpness, learning_rate, from_history)
    return Dynamics(losses, seen, bad, *steps), not_run


def _max_norms(tx: Any) -> tuple[float, ...]:
    """The thresholds of `optax.clip_by_global_norm` inside an optimiser, which leaves no trace in its state."""
    found: list[Any] = []
    todo: list[Any] = [getattr(tx, "update", None)]
    known: set[int] = set()
    while todo:
        function: Any = todo.pop()
        if isinstance(function, (tuple, list)):
            todo += function
            continue
        if id(function) in known or not isinstance(function, types.FunctionType):
            continue
        known.add(id(function))
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        inside = {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
        if function.__qualname__.startswith("clip_by_global_norm.") and function.__module__.startswith("optax"):
            found.append(inside.get("max_norm"))
        todo += [getattr(value, "update", value) for value in inside.values()]
    return tuple(float(x) for x in found if isinstance(x, int | float))


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _steps(scalar: Callable, tx: Any, params: PyTree, state: PyTree, args: tuple, num_steps: int) -> tuple:
    """Training on one batch.

    Returns:
      losses before each step and after the last, the optimiser's state, the largest entry of an update, the gradients'
      log norms.
    """
    tx = optax.with_extra_args_support(tx)
    arrays, merge = arrays_of(args), merger(args)

    @jax.jit
    def run(params, state, arrays):
        loss_of = lambda p: scalar(p, *merge(arrays))

        def one(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(loss_of)(params)
            updates, state = tx.update(grads, state, params, value=loss, grad=grads, value_fn=loss_of)
            seen = loss, jnp.max(jnp.stack([jnp.max(jnp.abs(u)).astype(float) for u in jax.tree.leaves(updates)]))
            return (optax.apply_updates(params, updates), state), (*seen, scale.log_norm(grads))

        (params, state), (losses, largest, norms) = lax.scan(one, (params, state), None, length=num_steps)
        return jnp.append(losses, loss_of(params)), state, jnp.max(largest), norms

    with jax.numpy_dtype_promotion("standard"):  # Optax's own rules need it
        losses, state, largest, norms = run(params, state, arrays)
    return np.asarray(losses, float), state, float(largest), np.asarray(norms, float)


def _bad_leaves(tree: PyTree) -> tuple[str, ...]:
    """Key paths of the floating leaves that hold inf or NaN."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    floats = [(p, x) for p, x in flat if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)]
    return tuple(jax.tree_util.keystr(p) for p, x in floats if not np.isfinite(np.asarray(x, np.float64)).all())


def dataset(evidences: Sequence[Evidence]) -> xr.Dataset:
    """The measurements of one network, or of several seeds of it, per hidden layer: float64 natural logarithms."""
    first = evidences[0]
    hidden = slice(0, first.hidden)
    stack = lambda name: (("seed", "layer"), np.stack([getattr(e, name)[hidden] for e in evidences]))
    names = [layer.name for layer in first.layers[hidden]]
    counts = Counter(names)
    unique = [name if counts[name] == 1 else f"{name} ({i})" for i, name in enumerate(names)]
    ds = xr.Dataset(
        {
            "log_activation_rms": stack("log_activation"),
            "log_cotangent_rms": stack("log_cotangent"),
            "log_gradient_norm": stack("log_gradient"),
            "loss": (("seed",), np.array([e.loss for e in evidences])),
        },
        coords={"layer": unique, "seed": np.arange(len(evidences))},
        attrs={"left_out": "see gradjax.jacobian_spectrum", "notes": "", "theory": "", "width": min(first.size[hidden])}
        if names
        else {"left_out": "no layer was found", "notes": "", "theory": ""},
    )
    over_time, name = _over_time(evidences)
    return ds.assign(over_time).assign_attrs(name)


def _over_time(evidences: Sequence[Evidence]) -> tuple[dict[str, Any], dict[str, str]]:
    """Variables over the steps of a recurrence, of several the one whose cotangent changes most, and its name."""
    change = lambda back: np.ptp(back[np.isfinite(back)]) if np.isfinite(back).any() else np.inf
    found = evidences[0].recurrences
    if not found:
        return {}, {}
    chosen = int(np.argmax([change(back) for _, _, back in found]))
    stack = lambda part: (("seed", "time"), np.stack([e.recurrences[chosen][part] for e in evidences]))
    variables = {"log_time_activation_rms": stack(1), "log_time_cotangent_rms": stack(2)}
    return variables, {"recurrence": found[chosen][0].name}


def _marks(finding: Finding, ds: xr.Dataset) -> list[tuple[str, int, str]]:
    """(dimension of the dataset, index, text) of where a finding starts; none where it has no place there."""
    kind, index, name = (finding.where[key] for key in ("kind", "index", "name"))
    if kind == "step" and "recurrence" in ds.attrs and name == f"{ds.attrs['recurrence']}[{index}]":
        return [("time", index, finding.pathology.replace("_", " "))]
    is_layer = kind == "layer" or (kind == "step" and name != "loss")  # the steps of an unrolled recurrence
    has_place = is_layer and 0 <= index < ds.sizes["layer"]
    return [("layer", index, finding.pathology.replace("_", " "))] if has_place else []


ALWAYS = ("non_finite", "exploding_activations")  # one seed is enough


def vote(seeds: Sequence[tuple[Finding, ...]]) -> tuple[Finding, ...]:
    """The findings of half of the seeds, each as the seed in the middle (by where it starts) has it."""
    out = []
    for name in rules.CAUSAL:
        found = sorted((f for each in seeds for f in each if f.pathology == name), key=lambda f: f.where["index"])
        if found and (2 * len(found) >= len(seeds) or name in ALWAYS):
            middle = found[(len(found) - 1) // 2]
            out.append(replace(middle, evidence=middle.evidence | {"share_of_seeds": len(found) / len(seeds)}))
    return tuple(rules.in_order(out))


def judge(evidence: Sequence[Evidence], ds: xr.Dataset, meta: dict[str, Any] | None = None) -> Diagnosis:
    """The diagnosis of several seeds of one network; `ds` holds what was measured, `meta` goes into the JSON."""
    return Diagnosis(vote([rules.findings(e, None) for e in evidence]), ds, meta or {}, {})


# -- what the JSON says ----------------------------------------------------------------------------------


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


_WORDS = {
    "non_finite": "{place} holds inf or NaN ({cause}).",
    "exploding_activations": "The forward pass grows until {place}; the largest entry before it is {before}.",
    "saturated_units": "{saturated_share:.0%} of the units of {place} are saturated ({activation}).",
    "dead_units": "{dead_share:.0%} of the ReLU units of {place} are off for every example: no gradient passes them.",
    "symmetric_units": "All units of {place} have the same value, and will always have the same gradient.",
    "rank_collapse": "From {place} on all {of} become one point (share of variance left: {share:.2g}).",
    "attention_logit_growth": "The attention logits of {place} spread by {logit_deviation:.3g}: a row sees one key.",
    "ill_conditioned_jacobian": "The weights of {place} pass less than a quarter of their directions.",
    "shattered_gradients": "Inputs 1% apart have gradients of cosine {cosine:.2f}: white noise, not a slope.",
    "untrained_layer": "{place} has no differentiable path to the loss, and so have {count} leaves in all.",
    "norm_overflow": "The gradient of {place} has a norm of {norm}: finite, but its square is not.",
    "frozen_optimizer": "The optimiser's state {place} holds inf or NaN: those parameters never move again.",
    "loss_spikes": "The loss jumps {spikes} times, first at step {first_step}, at most by {largest_factor:.3g}.",
    "clipping_always": "{place} clips every step: its threshold sets the step, not the gradient.",
    "clipping_never": "{place} never clips: its threshold does nothing.",
}


def explain(finding: Finding) -> str:
    """One finding in plain words, with its numbers."""
    e, place = finding.evidence, finding.where["name"]
    if "growth_nats" in e:
        return _explain_growth(finding)
    if finding.pathology == "unstable_step_size":
        if "sharpness" in e and e["sharpness_over_2_lr"] > 1:
            return f"The sharpness {e['sharpness']:.3g} is {e['sharpness_over_2_lr']:.2g} times 2 / learning_rate."
        return f"On one and the same batch the loss goes from {e['loss_first']:.3g} to {e['loss_last']:.3g}."
    before = factor(e["log_max_before"]) if "log_max_before" in e else "unknown"
    norm = factor(e["log_norm"]) if "log_norm" in e else ""
    text = _WORDS[finding.pathology].format(
        place=place,
        cause=finding.cause.replace("_", " "),
        before=before,
        norm=norm,
        count=len(e.get("leaves", ())),
        **e,
    )
    return text + (f" Cause: {finding.cause.replace('_', ' ')}." if finding.pathology != "non_finite" else "")


def _explain_growth(finding: Finding) -> str:
    e, growth = finding.evidence, finding.evidence["growth_nats"]
    what = "gradient" if "gradient" in finding.pathology or "batchnorm" in finding.pathology else "activation"
    way = f"from {finding.where['name']}" + (f" to {e['run_ends_at']}" if "run_ends_at" in e else "")
    back = "On its way back " if what == "gradient" else "On its way "
    return (
        f"{back}{way} the {what} {'grows' if growth > 0 else 'shrinks'}: {growth:+.1f} nats in all, a factor of "
        f"{factor(growth)}, {e['growth_nats_per_layer']:+.3f} nats per {finding.where['kind']}. The threshold is "
        f"{finding.threshold:+.1f} nats; the growth is {abs(e['standard_deviations']):.0f} standard deviations from "
        f"that of a critical network of this width and depth. Cause: {finding.cause.replace('_', ' ')}."
    )
