"""The coordinate check: do activations and their changes keep their size when a network grows wider
or deeper?

For every named value h of a model (`gradjax.probe`), over the first updates and a few seeds,

    log rms h_t,   log rms (h_t - h_0),   log rms (d loss / d h_t),   and log rms of gradient and update per parameter

are fitted by  a + b log width + c log depth  (least squares over sizes and seeds). A
parametrisation whose learning rate can be tuned small and used large keeps the exponents b and c of
h_0 and of h_t - h_0 at zero: coordinates of order one at creation, moved by order one in every
layer. Judged are

    h_0          explodes with the size where its exponent is positive; where it is negative nothing is wrong as long as
                 training moves it (the read-out of muP starts at width^-1/2 and outgrows that in the first steps);
    h_t - h_0    explodes where its exponent is positive, and vanishes where it is negative: the layer is lazy and
                 learns no features (the neural tangent regime, width^-1/2; Yang & Hu 2021).

An exponent counts where it is beyond `tolerance` *and* beyond three of its standard errors.
Theory's exponents are multiples of 1/2, so the default tolerance is half of the smallest wrong one.
Cotangents, gradients and updates have exponents of their own in every right parametrisation: they
are measured, shown, and not judged.

Over widths the names of the values are the same. Over depths the numbers in a name that run further
in deeper models become `*`, and of the values alike the one halfway and the last are compared,
`block_*[last]`: in the limit of large depth h_l depends on l / depth, so the layer next to the
input would be another one at every depth. A scanned stack is one value (rms over its rows). A
branch that its own multiplier shrinks with depth shrinks by design: name the stream, or leave the
branch out by `select`.

Does not cover: later training, and other batches: one batch serves every step and size. A change
smaller than the rounding of its value counts as none. Cost: num_steps + 1 gradients and a
compilation per size, its seeds vmapped.

References:
    Yang & Hu 2021, Tensor Programs IV, arXiv 2011.14522: which parametrisations move features.
    Yang et al. 2022, Tensor Programs V, arXiv 2203.03466: muP for Adam and SGD, and the check over widths.
    Bordelon, Noci, Li, Hanin, Pehlevan 2023, arXiv 2309.16620; Yang, Yu, Zhu, Hayou 2023, Tensor Programs VI, arXiv
    2310.02244: residual branches scaled by 1 / sqrt(depth), and the check over depths.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from jax import Array, lax

from gradjax.core import scale
from gradjax.report import files
from gradjax.taps.probe import probe

VALUES = ("log_value_rms", "log_change_rms", "log_cotangent_rms")  # per named value
LEAVES = ("log_gradient_rms", "log_update_rms")  # per leaf of the parameters
STANDARD_ERRORS = 3.0
_ROUNDINGS = 4.0  # a change below so many roundings of the value is noise: it counts as none


@dataclass(frozen=True)
class Drift:
    """What does not keep its size: `quantity` of `name` goes as size^exponent after `step`
    updates.
    """

    verdict: str  # "explodes", "vanishes", "is not finite" or "does not move"
    quantity: str  # "value" (h_0), "change" (h_t - h_0), or what is not finite
    name: str
    step: int
    size: str  # "width" or "depth"; else the share of runs
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
    """Measurements with their exponents, and what drifts, the earliest step first, then in forward
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
        if self.ok:
            kept = f"Values and their changes keep their size over {' and '.join(self.dataset['size'].values)}"
            names = self.dataset.attrs["unclear"]
            return (
                f"{kept}, but {names} may not: more seeds or larger sizes would tell."
                if names
                else f"{kept}."
            )
        first, more = str(self.findings[0]), len(self.findings) - 1
        return f"{first[0].upper()}{first[1:]}" + f", and {more} more" * bool(more) + "."

    def __str__(self) -> str:
        ds, text = self.dataset, [self.verdict]
        indent, last = max(map(len, ds["name"].values)), ds.sizes["step"] - 1
        shown = [("value", 0), *(("change", step) for step in sorted({1, last}))]
        for size in ds["size"].values:
            sizes = ", ".join(map(str, ds[size].values))
            text += [
                "",
                f"Exponents of {size} ({sizes}; {ds.sizes['seed']} seeds), ± standard error",
            ]
            text.append(
                " " * indent
                + "".join(f"{f'{quantity}, step {step}':>18}" for quantity, step in shown)
            )
            for name in ds["name"].values:
                cells = [_exponent(ds, quantity, step, name, size) for quantity, step in shown]
                written = (
                    f"{round(a, 2) + 0.0:+.2f} ± {b:.2f}" if np.isfinite(a) else "none"
                    for a, b in cells
                )
                text.append(f"{name:<{indent}}" + "".join(f"{cell:>18}" for cell in written))
        if ds.attrs["left_out"]:
            text += ["", f"Left out, for not being at every depth: {ds.attrs['left_out']}"]
        return "\n".join(text)

    def to_json(self) -> str:
        """Valid JSON: ok, the verdict, the findings, and every exponent with its standard error."""
        ds, exponents = self.dataset, []
        for variable in (*VALUES, *LEAVES):
            pair = ds[[f"slope_{variable}", f"error_{variable}"]].to_dataframe(
                ("size", "step", ds[variable].dims[-1])
            )
            for (size, step, name), (slope, error) in zip(pair.index, pair.values, strict=True):
                row = {"quantity": variable, "name": name, "step": step, "size": size}
                exponents.append(row | {"exponent": slope, "standard_error": error})
        return files.dumps(
            {
                "ok": self.ok,
                "verdict": self.verdict,
                "findings": [asdict(finding) for finding in self.findings],
                "exponents": exponents,
                "meta": {str(size): ds[size].values for size in ("width", "depth", "seed", "step")}
                | ds.attrs,
            }
        )


def _exponent(
    ds: xr.Dataset, quantity: str, step: int, name: str, size: str
) -> tuple[float, float]:
    at = {"step": step, "name": name, "size": size}
    return float(ds[f"slope_log_{quantity}_rms"].sel(at)), float(
        ds[f"error_log_{quantity}_rms"].sel(at)
    )


# -- measuring -------------------------------------------------------------------------------------------


def _log_rms(lists: Sequence[Sequence[Array]]) -> list[Array]:
    """Per list of arrays the log rms of each, float32, overflow-safe; one piece of program for all
    of one shape.
    """

    def log_rms(x):
        x, exponent = scale.normalize(x)
        log_unit = jnp.log(jnp.sum(jnp.square(scale.widen(x))) / max(x.size, 1)) / 2
        return log_unit.astype(jnp.float32) + exponent.astype(jnp.float32) * scale.LOG2

    arrays = [x for each in lists for x in each]
    alike: dict[Any, list[int]] = {}
    for i, x in enumerate(arrays):
        alike.setdefault((x.shape, x.dtype), []).append(i)
    logs = [jax.vmap(log_rms)(jnp.stack([arrays[i] for i in group])) for group in alike.values()]
    order = np.argsort([i for group in alike.values() for i in group])
    return jnp.split(jnp.concatenate(logs)[order], np.cumsum([len(each) for each in lists])[:-1])


def _model(make_model: Callable, width: int, depth: int, key: Array) -> tuple[Callable, Any, Any]:
    made = make_model(width, depth, key)
    is_model = (
        isinstance(made, tuple)
        and len(made) == 3
        and callable(made[0])
        and hasattr(made[2], "update")
    )
    if not is_model or not all(hasattr(x, "dtype") for x in jax.tree.leaves(made[1])):
        kinds = (
            f"({', '.join(type(x).__name__ for x in made)})"
            if isinstance(made, tuple)
            else type(made).__name__
        )
        raise ValueError(
            f"coordinate_check: make_model({width}, {depth}, key) returns {kinds}; (loss_fn, params, tx) is needed: a "
            "function loss_fn(params, *args) -> scalar, arrays (of an NNX or Equinox model by gradjax.functional), and "
            "an Optax transformation."
        )
    return made


def _first_steps(
    names: dict, loss_fn, params, tx, args, num_steps, has_aux, select
) -> dict[str, Array]:
    """loss (num_steps + 1,) and the log rms of all (num_steps + 1, names); fills `names`, in
    forward order.
    """
    start = probe(loss_fn, params, *args, has_aux=has_aux).values
    names["name"] = [name for name in start if select is None or select(name)]
    if not names["name"]:
        raise ValueError(f"coordinate_check: `select` keeps none of the values {', '.join(start)}.")
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names["leaf"] = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    start = [start[name] for name in names["name"]]
    tx = optax.with_extra_args_support(tx)

    def step(state, _):
        params, opt_state = state
        seen = probe(loss_fn, params, *args, has_aux=has_aux)
        updates, opt_state = tx.update(
            seen.grads, opt_state, params, value=seen.loss, grad=seen.grads
        )
        values = [seen.values[name] for name in names["name"]]
        cotangents = [seen.cotangents.get(name, jnp.zeros(())) for name in names["name"]]
        changes = [scale.widen(x) - scale.widen(x0) for x, x0 in zip(values, start, strict=True)]
        trees = (values, changes, cotangents, jax.tree.leaves(seen.grads), jax.tree.leaves(updates))
        logs = dict(zip((*VALUES, *LEAVES), _log_rms(trees), strict=True))
        noise = np.log([_ROUNDINGS * float(jnp.finfo(x.dtype).eps) for x in values]).astype(
            np.float32
        )
        is_noise = logs["log_change_rms"] < logs["log_value_rms"] + noise
        logs["log_change_rms"] = jnp.where(is_noise, -jnp.inf, logs["log_change_rms"])
        return (optax.apply_updates(params, updates), opt_state), logs | {
            "loss": seen.loss.astype(jnp.float32)
        }

    return lax.scan(step, (params, tx.init(params)), length=num_steps + 1)[1]


def _measure(
    make_model: Callable, width: int, depth: int, keys: Array, options: tuple
) -> tuple[dict, dict[str, np.ndarray]]:
    """Names, and the measurements with a leading seed axis."""
    names: dict[str, list[str]] = {}
    models = [_model(make_model, width, depth, key) for key in keys]
    loss_fn, _, tx = models[0]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params for _, params, _ in models))
    run = jax.jit(jax.vmap(lambda params: _first_steps(names, loss_fn, params, tx, *options)))
    return names, jax.tree.map(np.asarray, run(stacked))


# -- the same names at every size ------------------------------------------------------------------------


def _matched(names: dict[int, list[str]]) -> tuple[dict[str, dict[int, str]], list[str]]:
    """From the names at every depth: label -> depth -> name, in forward order, and the kinds not at
    every depth.

    >>> list(_matched({1: ["in", "block_0/w", "out"], 2: ["in", "block_0/w", "block_1/w", "out"]})[0])
    ['in', 'block_*/w[middle]', 'block_*/w[last]', 'out']
    """
    numbers: dict[
        str, dict[int, list[tuple]]
    ] = {}  # a name without its numbers -> depth -> the numbers of each such
    for depth, all_names in names.items():
        for name in all_names:
            bare = re.sub(r"\d+", "*", name)
            numbers.setdefault(bare, {}).setdefault(depth, []).append(
                tuple(re.findall(r"\d+", name))
            )

    def kind(name: str) -> str:
        found = numbers[re.sub(r"\d+", "*", name)].values()
        sets = ([frozenset(column) for column in zip(*rows, strict=True)] for rows in found)
        varies = iter([len(set(places)) > 1 for places in zip(*sets, strict=True)])
        return re.sub(r"\d+", lambda number: "*" if next(varies) else number[0], name)

    kinds: dict[str, dict[int, list[str]]] = {}
    for depth, all_names in names.items():
        for name in all_names:
            kinds.setdefault(kind(name), {}).setdefault(depth, []).append(name)
    left_out = [one for one, members in kinds.items() if len(members) < len(names)]
    matched = {}
    for one, members in kinds.items():
        labels = {"[middle]": 0.5, "[last]": 1.0} if "*" in one else {"": 0.0}
        if one not in left_out:
            pick = lambda part, found: found[int(part * (len(found) - 1))]
            matched |= {
                one + k: {d: pick(part, found) for d, found in members.items()}
                for k, part in labels.items()
            }
    return matched, left_out


def _dataset(runs: dict, widths: list[int], depths: list[int]) -> xr.Dataset:
    """The measurements of all sizes, matched by name."""
    left_out: list[str] = []
    variables: dict[str, Any] = {}
    coords: dict[str, Any] = {"width": widths, "depth": depths}
    dims = ("width", "depth", "seed", "step")
    for label, of_label in (("name", VALUES), ("leaf", LEAVES)):
        for depth in depths:
            first = runs[widths[0], depth][0][label]
            for width in widths:
                if first != (found := runs[width, depth][0][label]):
                    missing, new = (
                        ", ".join(set(a) - set(b)) or "none"
                        for a, b in ((first, found), (found, first))
                    )
                    raise ValueError(
                        f"coordinate_check: the {label}s differ between widths {widths[0]} and {width} at depth "
                        f"{depth}: {missing} only at the first, {new} only at the second; one model is compared."
                    )
        all_names = {depth: runs[widths[0], depth][0][label] for depth in depths}
        matched, missing = _matched(all_names)
        left_out += missing
        coords[label] = list(matched)
        if not matched:
            raise ValueError(
                f"coordinate_check: no {label} is at every depth; found {', '.join(missing)}."
            )
        index = {
            depth: [all_names[depth].index(by_depth[depth]) for by_depth in matched.values()]
            for depth in depths
        }
        for name in of_label:
            stack = np.array(
                [
                    [runs[width, depth][1][name][..., index[depth]] for depth in depths]
                    for width in widths
                ]
            )
            variables[name] = ((*dims, label), stack)
    variables["loss"] = (
        dims,
        np.array([[runs[width, depth][1]["loss"] for depth in depths] for width in widths]),
    )
    return xr.Dataset(variables, coords, {"left_out": ", ".join(left_out)})


# -- exponents and verdict -------------------------------------------------------------------------------


def _fitted(ds: xr.Dataset, sizes: list[str]) -> xr.Dataset:
    """With slope_ and error_ of every log rms over (size, step, name); NaN where the data leave
    none.
    """
    ds = ds.assign_coords(size=sizes)
    logs = np.meshgrid(
        *(np.log(ds[size].values) for size in ("width", "depth")),
        np.zeros(ds.sizes["seed"]),
        indexing="ij",
    )
    kept = [
        log.ravel() for size, log in zip(("width", "depth"), logs, strict=False) if size in sizes
    ]
    design = np.stack([np.ones(logs[0].size), *kept], axis=1)
    for variable in (*VALUES, *LEAVES):
        shape, dims = ds[variable].shape[3:], ("size", *ds[variable].dims[3:])
        fits = np.full((2, len(sizes), np.prod(shape)), np.nan)
        for i, y in enumerate(ds[variable].values.astype(float).reshape(len(design), -1).T):
            x, y = design[np.isfinite(y)], y[np.isfinite(y)]
            free = len(x) - x.shape[1]
            if free < 1 or np.linalg.matrix_rank(x) < x.shape[1]:
                continue
            inverse = np.linalg.inv(x.T @ x)
            fit = inverse @ x.T @ y
            errors = np.sqrt(np.sum((y - x @ fit) ** 2) / free * np.diag(inverse))
            fits[:, :, i] = fit[1:], errors[1:]
        ds[f"slope_{variable}"], ds[f"error_{variable}"] = (
            (dims, part.reshape(-1, *shape)) for part in fits
        )
    return ds


def _not_finite(ds: xr.Dataset) -> list[Drift]:
    """The first inf or NaN in time; of one step the forward pass before the backward pass."""
    found = []
    for variable in ("log_value_rms", "loss", "log_cotangent_rms", *LEAVES):
        values = ds[variable].values.reshape(*ds["loss"].shape, -1)
        bad = np.isnan(values) | np.isposinf(values)
        for step in np.flatnonzero(bad.any((0, 1, 2, 4)))[:1]:
            index = bad[:, :, :, step].any((0, 1, 2)).argmax()
            name = "the model" if variable == "loss" else ds[ds[variable].dims[-1]].values[index]
            runs = bad[:, :, :, step, index]
            quantity = variable.removeprefix("log_").removesuffix("_rms")
            found.append(
                Drift(
                    "is not finite",
                    quantity,
                    str(name),
                    int(step),
                    f"{runs.sum()} of {runs.size} runs",
                )
            )
    return sorted(found, key=lambda drift: drift.step)[:1]


def _findings(ds: xr.Dataset, tolerance: float) -> tuple[Drift, ...]:
    """One per quantity, name and size: the first step at which it drifts. Notes what the seeds
    leave unclear.
    """
    first, num_steps = _not_finite(ds), ds.sizes["step"] - 1
    if np.isneginf(ds["log_change_rms"]).all():
        first.append(
            Drift("does not move", "value", str(ds["name"].values[-1]), num_steps, "every run")
        )
    drifts, unclear = [], []
    cells = itertools.product(
        map(str, ds["name"].values), map(str, ds["size"].values), ("value", "change")
    )
    for name, size, quantity in cells:
        for step in [0] if quantity == "value" else range(1, num_steps + 1):
            slope, error = _exponent(ds, quantity, step, name, size)
            wrong = slope > tolerance or (quantity == "change" and slope < -tolerance)
            if wrong and abs(slope) > STANDARD_ERRORS * error:
                verdict = "explodes" if slope > 0 else "vanishes"
                drifts.append(Drift(verdict, quantity, name, step, size, slope, error))
                break
            if (
                wrong or STANDARD_ERRORS * error > 2 * tolerance
            ):  # the smallest wrong exponent is as likely as none
                unclear.append(name)
    ds.attrs["unclear"] = ", ".join(dict.fromkeys(unclear))
    return tuple(first + sorted(drifts, key=lambda drift: drift.step))


def _sizes(name: str, sizes: Any) -> list[int]:
    listed = [int(x) for x in np.atleast_1d(sizes)]
    if (
        not listed
        or min(listed) < 1
        or len(set(listed)) < len(listed)
        or list(np.atleast_1d(sizes)) != listed
    ):
        raise ValueError(
            f"coordinate_check: {name}s = {sizes}; different whole numbers of at least 1 are needed."
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
    """Exponents of width and depth in activations and their changes over the first updates, and a
    verdict.

    Args:
      make_model: (width, depth, key) -> (loss_fn, params, tx), with loss_fn(params, *args) -> () loss. The optimiser
        comes with the model since learning rates of muP depend on the width. Of `key` only params may depend.
      widths, depths: sizes to compare, or one number for what stays as it is; two at least of one
        of them.
      args: the batch, used at every step.
      num_steps: updates (Yang et al. 2022 show 4).
      num_seeds: initialisations per size.
      tolerance: exponents up to it are right; half of 1/2, the smallest that theory calls wrong.
      select: name -> whether that value is checked; all by default.
      has_aux: whether loss_fn returns (loss, aux).
      seed: of the first key.

    Returns:
      `CoordinateCheck`: `.ok`, `.verdict`, `.findings`, `.dataset` (log rms over width, depth, seed, step, name; their
      `slope_` and `error_`), `str()`, `.to_json()`.

    Raises:
      ValueError: nothing to compare, names that differ over widths, a make_model that returns something else or does
        not use its key. Values that are inf or NaN are a finding.
    """
    sizes = {"width": _sizes("width", widths), "depth": _sizes("depth", depths)}
    varied = [size for size, listed in sizes.items() if len(listed) > 1]
    if not varied:
        raise ValueError(
            f"coordinate_check: widths {widths} and depths {depths}; two of one of them at least."
        )
    count = len(sizes["width"]) * len(sizes["depth"]) * num_seeds
    if num_steps < 1 or num_seeds < 1 or count <= len(varied) + 1:
        raise ValueError(
            f"coordinate_check: num_steps {num_steps}, num_seeds {num_seeds} and {count} runs in all; one step and "
            f"{len(varied) + 2} runs at least, or no standard error is known."
        )
    runs = {}
    for width in sizes["width"]:
        for depth in sizes["depth"]:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), width), depth)
            options = (tuple(args), num_steps, has_aux, select)
            runs[width, depth] = _measure(
                make_model, width, depth, jax.random.split(key, num_seeds), options
            )
    ds = _dataset(runs, sizes["width"], sizes["depth"])
    values = ds["log_value_rms"].values
    if num_seeds > 1 and (values == values[:, :, :1]).all():
        raise ValueError(
            "coordinate_check: make_model gives every seed the same values; draw the parameters from key."
        )
    ds = _fitted(ds, varied)
    ds.attrs["tolerance"] = tolerance
    return CoordinateCheck(ds, _findings(ds, tolerance))
