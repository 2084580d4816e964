"""The coordinate check: do activations and their changes keep their size when a network grows wider
or deeper?

For every named value h of a model (`gradjax.probe`), over the first updates and a few seeds,

    log rms h_t,   log rms (h_t - h_0),   log rms (d loss / d h_t),
    and log rms of gradient and update per parameter

are fitted by  a + b log width + c log depth  (least squares over sizes and seeds). A
parametrisation whose learning rate can be tuned small and used large keeps the exponents b and c of
h_0 and of h_t - h_0 at zero: coordinates of order one at creation, moved by order one in every
layer. Judged are

    h_0          explodes with the size where its exponent is positive; where it is negative nothing
                 is wrong as long as training moves it (the read-out of muP starts at width^-1/2 and
                 outgrows that in the first steps);
    h_t - h_0    explodes where its exponent is positive, and vanishes where it is negative: the
                 layer is lazy and learns no features (the neural tangent regime, width^-1/2; Yang &
                 Hu 2021).

An exponent counts where it is beyond `tolerance` *and* beyond three of its standard errors.
Theory's exponents are multiples of 1/2, so the default tolerance is half of the smallest wrong one.
Cotangents, gradients and updates have exponents of their own in every right parametrisation: they
are measured, shown, and not judged.

Over widths the names of the values are the same; over depths `gradjax.diagnosis.coordinate_runs`
matches them. A scanned stack is one value (rms over its rows). A branch that its own multiplier
shrinks with depth shrinks by design: name the stream, or leave the branch out by `select`.

Does not cover: later training, and other batches: one batch serves every step and size. A change
smaller than the rounding of its value counts as none. Cost: num_steps + 1 gradients and a
compilation per size, its seeds vmapped.

References:
    Yang & Hu 2021, Tensor Programs IV, arXiv 2011.14522: which parametrisations move features.
    Yang et al. 2022, Tensor Programs V, arXiv 2203.03466: muP for Adam and SGD, and the check over
    widths.
    Bordelon, Noci, Li, Hanin, Pehlevan 2023, arXiv 2309.16620; Yang, Yu, Zhu, Hayou 2023, Tensor
    Programs VI, arXiv 2310.02244: residual branches scaled by 1 / sqrt(depth), and the check over
    depths.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax
from jax import Array

from gradjax.core.extras import needed_for
from gradjax.diagnosis import coordinate_runs
from gradjax.diagnosis.coordinate_runs import LEAVES, VALUES
from gradjax.report import files

if TYPE_CHECKING:
    import xarray as xr

STANDARD_ERRORS = 3.0


@dataclass(frozen=True)
class Drift:
    """A quantity that does not keep its size: it goes as size^exponent.

    Attributes:
      verdict: "explodes", "vanishes", "is not finite" or "does not move".
      quantity: "value" (h_0), "change" (h_t - h_0), or the quantity that is not finite.
      name: of the value or parameter.
      step: after how many updates.
      size: "width" or "depth"; else the number of runs.
      exponent, standard_error: NaN where none is fitted.
    """

    verdict: str
    quantity: str
    name: str
    step: int
    size: str
    exponent: float = np.nan
    standard_error: float = np.nan

    def __str__(self) -> str:
        what = f"the {self.quantity} of {self.name} after {self.step} updates"
        if np.isnan(self.exponent):
            return f"{what} {self.verdict} in {self.size}"
        rate = f"{self.size}^({self.exponent:+.2f} ± {self.standard_error:.2f})"
        return f"{what} goes as {rate}: it {self.verdict} with {self.size}"


@dataclass(frozen=True)
class CoordinateCheck:
    """Measurements with their exponents, and what drifts: the earliest step first, then in forward
    order.
    """

    dataset: xr.Dataset
    findings: tuple[Drift, ...]

    @property
    def ok(self) -> bool:
        """Whether every value and its change keep their size."""
        return not self.findings

    @property
    def verdict(self) -> str:
        """One sentence: what drifts first, and by which exponent."""
        if not self.ok:
            first, more = str(self.findings[0]), len(self.findings) - 1
            rest = f", and {more} more" if more else ""
            return f"{first[0].upper()}{first[1:]}{rest}."
        sizes = " and ".join(self.dataset["size"].values)
        kept = f"Values and their changes keep their size over {sizes}"
        unclear = self.dataset.attrs["unclear"]
        if unclear:
            return f"{kept}, but {unclear} may not: more seeds or larger sizes would show it."
        return f"{kept}."

    def __str__(self) -> str:
        ds, lines = self.dataset, [self.verdict]
        indent, last = max(map(len, ds["name"].values)), ds.sizes["step"] - 1
        shown = [("value", 0), *(("change", step) for step in sorted({1, last}))]
        for size in ds["size"].values:
            sizes = ", ".join(map(str, ds[size].values))
            seeds = ds.sizes["seed"]
            lines += ["", f"Exponents of {size} ({sizes}; {seeds} seeds), ± standard error"]
            header = (f"{f'{quantity}, step {step}':>18}" for quantity, step in shown)
            lines.append(" " * indent + "".join(header))
            for name in ds["name"].values:
                cells = (_cell(*_exponent(ds, *which, name, size)) for which in shown)
                lines.append(f"{name:<{indent}}" + "".join(f"{cell:>18}" for cell in cells))
        if ds.attrs["left_out"]:
            lines += ["", f"Left out, for not being at every depth: {ds.attrs['left_out']}"]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Valid JSON: ok, the verdict, the findings, and every exponent with its standard error."""
        ds, exponents = self.dataset, []
        for variable in (*VALUES, *LEAVES):
            label = ds[variable].dims[-1]
            slopes = ds[f"slope_{variable}"].transpose("size", "step", label)
            errors = ds[f"error_{variable}"].transpose("size", "step", label)
            cells = itertools.product(ds["size"].values, ds["step"].values, ds[label].values)
            pairs = zip(slopes.values.ravel(), errors.values.ravel(), strict=True)
            for (size, step, name), (slope, error) in zip(cells, pairs, strict=True):
                row = {"quantity": variable, "name": str(name), "step": step, "size": str(size)}
                exponents.append(row | {"exponent": slope, "standard_error": error})
        sizes = {size: ds[size].values for size in ("width", "depth", "seed", "step")}
        return files.dumps(
            {
                "ok": self.ok,
                "verdict": self.verdict,
                "findings": [asdict(finding) for finding in self.findings],
                "exponents": exponents,
                "meta": sizes | ds.attrs,
            }
        )


def _cell(exponent: float, standard_error: float) -> str:
    if not np.isfinite(exponent):
        return "none"
    # adding zero turns -0.0 into 0.0
    return f"{round(exponent, 2) + 0.0:+.2f} ± {standard_error:.2f}"


def _exponent(
    ds: xr.Dataset, quantity: str, step: int, name: str, size: str
) -> tuple[float, float]:
    """The exponent and its standard error."""
    at = {"step": step, "name": name, "size": size}
    slope = ds[f"slope_log_{quantity}_rms"].sel(at)
    return float(slope), float(ds[f"error_log_{quantity}_rms"].sel(at))


# Exponents


def fitted(ds: xr.Dataset, sizes: list[str]) -> xr.Dataset:
    """The dataset with slope_ and error_ of every log rms over (size, step, name); NaN where the
    finite runs do not determine them.
    """
    ds = ds.assign_coords(size=sizes)
    log_sizes = [np.log(ds[size].values) for size in ("width", "depth")]
    grids = np.meshgrid(*log_sizes, np.zeros(ds.sizes["seed"]), indexing="ij")
    columns: dict[str, np.ndarray] = dict(zip(("width", "depth"), grids, strict=False))
    ones = np.ones(grids[0].size)
    design = np.stack([ones, *(columns[size].ravel() for size in sizes)], axis=1)
    for variable in (*VALUES, *LEAVES):
        shape, dims = ds[variable].shape[3:], ("size", *ds[variable].dims[3:])
        logs = ds[variable].values.astype(float).reshape(len(design), -1)
        fits = np.stack([_fit(design, y) for y in logs.T], axis=-1)
        ds[f"slope_{variable}"] = dims, fits[0].reshape(-1, *shape)
        ds[f"error_{variable}"] = dims, fits[1].reshape(-1, *shape)
    return ds


def _fit(design: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least squares over the finite runs: slopes and standard errors (2, sizes)."""
    finite = np.isfinite(y)
    x, y = design[finite], y[finite]
    free = len(x) - x.shape[1]
    if free < 1 or np.linalg.matrix_rank(x) < x.shape[1]:
        return np.full((2, design.shape[1] - 1), np.nan)
    inverse = np.linalg.inv(x.T @ x)
    fit = inverse @ x.T @ y
    variance = np.sum((y - x @ fit) ** 2) / free
    return np.stack([fit, np.sqrt(variance * np.diag(inverse))])[:, 1:]


# Verdict


def _not_finite(ds: xr.Dataset) -> list[Drift]:
    """The first inf or NaN in time; within one step the forward pass comes before the backward
    pass.
    """
    found = []
    for variable in ("log_value_rms", "loss", "log_cotangent_rms", *LEAVES):
        values = ds[variable].values.reshape(*ds["loss"].shape, -1)
        bad = np.isnan(values) | np.isposinf(values)
        bad_steps = np.flatnonzero(bad.any((0, 1, 2, 4)))
        if not bad_steps.size:
            continue
        step = int(bad_steps[0])
        index = bad[:, :, :, step].any((0, 1, 2)).argmax()
        runs = bad[:, :, :, step, index]
        name = "the model" if variable == "loss" else ds[ds[variable].dims[-1]].values[index]
        quantity = variable.removeprefix("log_").removesuffix("_rms")
        size = f"{runs.sum()} of {runs.size} runs"
        found.append(Drift("is not finite", quantity, str(name), step, size))
    return sorted(found, key=lambda drift: drift.step)[:1]


def drifts(ds: xr.Dataset, tolerance: float) -> tuple[tuple[Drift, ...], list[str]]:
    """What drifts, and what the seeds leave unclear.

    Returns:
      One `Drift` per quantity, name and size, at the first step at which it drifts; and the names
      of values whose exponents are wrong or uncertain within their standard errors.
    """
    first, num_steps = _not_finite(ds), ds.sizes["step"] - 1
    if np.isneginf(ds["log_change_rms"]).all():
        name = str(ds["name"].values[-1])
        first.append(Drift("does not move", "value", name, num_steps, "every run"))
    found: list[Drift] = []
    unclear: list[str] = []
    names, sizes = map(str, ds["name"].values), map(str, ds["size"].values)
    for name, size, quantity in itertools.product(names, sizes, ("value", "change")):
        for step in [0] if quantity == "value" else range(1, num_steps + 1):
            slope, error = _exponent(ds, quantity, step, name, size)
            wrong = slope > tolerance or (quantity == "change" and slope < -tolerance)
            if wrong and abs(slope) > STANDARD_ERRORS * error:
                verdict = "explodes" if slope > 0 else "vanishes"
                found.append(Drift(verdict, quantity, name, step, size, slope, error))
                break
            # the smallest wrong exponent, 2 tolerance, is as likely as none
            if wrong or STANDARD_ERRORS * error > 2 * tolerance:
                unclear.append(name)
    found.sort(key=lambda drift: drift.step)
    return (*first, *found), list(dict.fromkeys(unclear))


# Entry point


def _sizes(name: str, sizes: Any) -> list[int]:
    given = list(np.atleast_1d(sizes))
    listed = [int(x) for x in given]
    if not listed or listed != given or min(listed) < 1 or len(set(listed)) < len(listed):
        raise ValueError(
            f"coordinate_check: {name}s = {sizes}; different whole numbers of at least 1 are "
            "needed."
        )
    return listed


def coordinate_check(
    make_model: Callable[[int, int, Array], tuple[Callable, Any, optax.GradientTransformation]],
    widths: Sequence[int] | int,
    depths: Sequence[int] | int,
    *,
    args: tuple = (),
    num_steps: int = 4,
    num_seeds: int = 4,
    tolerance: float = 0.25,
    select: Callable[[str], bool] | None = None,
    has_aux: bool = False,
    seed: int = 0,
) -> CoordinateCheck:
    """Check that activations and their changes keep their size over widths and depths.

    Args:
      make_model: (width, depth, key) -> (loss_fn, params, tx), with loss_fn(params, *args) -> loss
        of shape (). The optimiser comes with the model since learning rates of muP depend on the
        width. Only params may depend on `key`.
      widths, depths: sizes to compare, or one number for the size that is kept; at least two of
        one of them.
      args: the batch, used at every step.
      num_steps: updates (Yang et al. 2022 show 4).
      num_seeds: initialisations per size.
      tolerance: exponents up to it are right; half of 1/2, the smallest that theory calls wrong.
      select: name -> whether that value is checked; all by default.
      has_aux: whether loss_fn returns (loss, aux).
      seed: of the first key.

    Returns:
      `CoordinateCheck`: `.ok`, `.verdict`, `.findings`, `.dataset` (log rms over width, depth,
      seed, step, name; their `slope_` and `error_`), `str()`, `.to_json()`.

    Raises:
      ValueError: nothing to compare, names that differ over widths, a make_model that returns
        something else or does not use its key. Values that are inf or NaN are a finding.
      ImportError: xarray is not installed; it comes with `gradjax[lab]`.
    """
    with needed_for("gradjax.coordinate_check"):
        import xarray as _  # noqa: F401 - a missing one is said before anything is compiled
    sizes = {"width": _sizes("width", widths), "depth": _sizes("depth", depths)}
    varied = [size for size, listed in sizes.items() if len(listed) > 1]
    if not varied:
        raise ValueError(
            f"coordinate_check: widths {widths} and depths {depths}; at least two of one of them "
            "are needed."
        )
    count = len(sizes["width"]) * len(sizes["depth"]) * num_seeds
    if num_steps < 1 or num_seeds < 1 or count <= len(varied) + 1:
        raise ValueError(
            f"coordinate_check: num_steps {num_steps}, num_seeds {num_seeds} and {count} runs in "
            f"all; at least one step and {len(varied) + 2} runs are needed, or no standard error "
            "is known."
        )
    options = (tuple(args), num_steps, has_aux, select)
    runs = {}
    for width, depth in itertools.product(sizes["width"], sizes["depth"]):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), width), depth)
        keys = jax.random.split(key, num_seeds)
        runs[width, depth] = coordinate_runs.measure(make_model, width, depth, keys, options)
    ds = coordinate_runs.dataset(runs, sizes["width"], sizes["depth"])
    values = ds["log_value_rms"].values
    if num_seeds > 1 and (values == values[:, :, :1]).all():
        raise ValueError(
            "coordinate_check: make_model gives every seed the same values; draw the parameters "
            "from key."
        )
    ds = fitted(ds, varied)
    findings, unclear = drifts(ds, tolerance)
    ds.attrs |= {"unclear": ", ".join(unclear), "tolerance": tolerance}
    return CoordinateCheck(ds, findings)
