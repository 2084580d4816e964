"""What the figures share: claims that can fail, and the look of a figure.

A claim compares a number with an absolute prediction. It passes where every tolerance given holds:

    relative      |measured - expected| <= relative |expected|
    absolute      |measured - expected| <= absolute
    error         the difference is no rarer than LEVEL, by Student's t with the error's degrees of
                  freedom

Many numbers make one joint chi-squared test, not one test each. LEVEL = 1e-4 is a claim's chance to
fail though it is true: with some 60 sampled claims over 13 seeds, one run of that size in thirteen
has a false failure; the usual three standard errors (2.7e-3) would fail twice in every one.
"""

import functools
import importlib
import math
import pkgutil
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import jax
import numpy as np
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import papers
from gradjax.theory import random_matrix

LEVEL = 1e-4
_RARER = f"p > 1e{round(math.log10(LEVEL))}"

THEORY, MEASURED, LIMIT, GREY = "#c2410c", "#475569", "#1d4ed8", "#c9ced6"
# The lines of one panel.
COLOURS = ("#0f766e", "#7e22ce", "#1d4ed8", "#a16207", "#be185d", "#475569")


# Claims


@dataclass(frozen=True)
class Claim:
    """What a paper says, what was measured, and whether they agree."""

    statement: str
    measured: float
    error: float  # standard error of `measured`; 0 where nothing was sampled
    expected: float
    tolerance: str  # in words: "5%, p > 1e-4"
    source: str  # of what is expected: formula, paper, section
    passed: bool


def close(
    statement: str,
    measured: Any,
    expected: Any,
    source: str,
    *,
    error: Any = None,
    dof: float = math.inf,
    relative: float | None = None,
    absolute: float | None = None,
    asymptotic: bool = False,
) -> Claim:
    """`measured` is `expected`, within every tolerance given.

    Args:
        error: standard error of `measured`; given, the difference is also judged by Student's t.
        dof: its degrees of freedom, n - 1 for the mean of n samples; inf where the error is known.
        relative, absolute: bounds on the difference.
        asymptotic: `expected` holds for infinite width or is a rounded number in print, so that
            enough samples would refute it: the error is reported and not judged.
    """
    measured, expected = float(measured), float(expected)
    off = abs(measured - expected)
    bounds, words = [], []
    if relative is not None:
        bounds.append(relative * abs(expected))
        words.append(f"{100 * relative:g}%")
    if absolute is not None:
        bounds.append(absolute)
        words.append(f"{absolute:g}")
    if error is not None and not asymptotic:
        bounds.append(float(scipy.stats.t.isf(LEVEL / 2, dof)) * float(error))
        words.append(_RARER)
    if not bounds:
        raise ValueError(
            f"close: no tolerance for {statement!r}; give relative or absolute, or an error to "
            "judge by."
        )
    passed = all(off <= bound for bound in bounds)  # NaN passes nothing
    return Claim(statement, measured, float(error or 0), expected, ", ".join(words), source, passed)


def joint(
    statement: str, measured: Any, expected: Any, error: Any, source: str, *, dof: float = math.inf
) -> Claim:
    """Many independent numbers at once: chi-squared per number, expected to be 1.

    Args:
        measured, expected, error: arrays that broadcast; `error` the standard error of each number.
        dof: degrees of freedom of each error; a t is first turned into the normal deviate that is
            as rare.
    """
    t = np.abs(
        (np.asarray(measured, float) - np.asarray(expected, float)) / np.asarray(error, float)
    )
    z2 = scipy.stats.chi2.isf(2 * scipy.stats.t.sf(t, dof), 1) if math.isfinite(dof) else t**2
    count = z2.size
    per_number = float(np.mean(z2))
    passed = bool(scipy.stats.chi2.sf(count * per_number, count) > LEVEL)
    words = f"chi^2 of {count}, {_RARER}"
    return Claim(statement, per_number, math.sqrt(2 / count), 1.0, words, source, passed)


def apart(
    statement: str, measured: Any, refuted: Any, source: str, *, error: Any, dof: float = math.inf
) -> Claim:
    """`measured` is NOT `refuted`, what another theory says: the difference is rarer than LEVEL."""
    measured, refuted, error = float(measured), float(refuted), float(error)
    passed = bool(abs(measured - refuted) > scipy.stats.t.isf(LEVEL / 2, dof) * error)
    words = f"must differ, {_RARER}".replace(">", "<")
    return Claim(statement, measured, error, refuted, words, source, passed)


def between(
    statement: str, measured: Any, low: float, high: float, source: str, *, error: Any = 0.0
) -> Claim:
    """`measured` lies in a published range, whose middle stands as the expected value."""
    measured, passed = float(measured), bool(low <= float(measured) <= high)
    words = f"{low:g} to {high:g}"
    return Claim(statement, measured, float(error), (low + high) / 2, words, source, passed)


def mean_error(samples: Any, axis: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(mean, its standard error) over the samples along `axis`.

    The degrees of freedom are the number of samples less one.
    """
    samples = np.asarray(samples, float)
    return samples.mean(axis), samples.std(axis, ddof=1) / math.sqrt(samples.shape[axis])


def gaussian(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Weights N(0, 1 / fan_in), (..., N_out, N_in)."""
    return rng.standard_normal(shape) / math.sqrt(shape[-1])


def orthogonal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Haar orthogonal matrices (..., N, N)."""
    q, r = np.linalg.qr(rng.standard_normal(shape))
    return q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[..., None, :]


WEIGHTS = {"gaussian": gaussian, "orthogonal": orthogonal}

_density = jax.jit(random_matrix.product_density, static_argnames=("weights", "num"))
_limit = jax.jit(random_matrix.limit_density, static_argnames=("universality", "num"))


def density(
    law: random_matrix.DerivativeLaw, depth: float, sigma_w: Any = 1.0, weights: str = "gaussian"
) -> random_matrix.ProductDensity:
    """`random_matrix.product_density` in float64 and NumPy, compiled once for all depths."""
    with jax.enable_x64(True):
        law = jax.tree.map(lambda x: np.asarray(x, np.float64), law)
        return jax.tree.map(
            np.asarray, _density(law, np.float64(depth), np.float64(sigma_w), weights=weights)
        )


def limit(spread: float, universality: str) -> random_matrix.ProductDensity:
    """`random_matrix.limit_density` in float64 and NumPy."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, _limit(np.float64(spread), universality=universality))


@functools.cache
def norm_moments(widths: tuple[int, ...]) -> random_matrix.NormMoments:
    """`random_matrix.norm_moments` of a ReLU network in float64 and NumPy."""
    with jax.enable_x64(True):
        law = jax.jit(lambda keep: random_matrix.norm_moments(widths, keep))(0.5)
        return jax.tree.map(np.asarray, law)


# Figures


def panels(rows: int = 1, columns: int = 1, size: tuple[float, float] = (4.2, 3.4), **options: Any):
    """(figure, axes) of rows x columns panels, `size` inches each, without top and right spines."""
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def points(ax: Axes, x: Any, y: Any, error: Any = None, **options: Any) -> None:
    """Measured values: dots, with error bars where there are errors."""
    ax.errorbar(
        x, y, error, **{"fmt": "o", "ms": 3.5, "lw": 1, "capsize": 1.5, "color": MEASURED} | options
    )


# The folder


def names() -> list[str]:
    """Every figure of the folder."""
    found = (module.name for module in pkgutil.iter_modules(papers.__path__))
    return sorted(name for name in found if name != "common" and not name.startswith("_"))


def module(name: str) -> ModuleType:
    return importlib.import_module(f"papers.{name}")


def tier(figure: ModuleType) -> int:
    return getattr(figure, "TIER", 1)


def title(figure: ModuleType) -> str:
    return (figure.__doc__ or "").strip().splitlines()[0]


def small(figure: ModuleType) -> Any:
    """The config for tests."""
    return figure.Config(**figure.SMALL)


def without(config: Any, *names: str) -> Any:
    """The config with its seed and the fields `names` at their defaults.

    As a static argument it lets a figure and its controls, which differ in numbers that are passed
    as arrays, run one compiled program.
    """
    default = type(config)()
    return replace(config, **{name: getattr(default, name) for name in ("seed", *names)})


def controls(figure: ModuleType) -> dict[str, Any]:
    """The wrong settings: name -> config."""
    return {name: replace(small(figure), **wrong) for name, wrong in figure.CONTROLS.items()}
