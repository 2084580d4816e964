"""What a sweep varies: names and values -> settings, checked before anything is traced.

Each name of `vary` (the file's `[sweep.vmap]`) is a float of the config and takes one of

    [0.1, 1.0, 10.0]                                        a list
    {low = 1e-4, high = 1.0, num = 8, scale = "log"}        a grid; scale "log" or "linear" (the default)
    {low = 1e-4, high = 1.0, draws = 32, scale = "log"}     random; all such names are drawn together, along `draw`

and becomes a dimension of the result, beside `seed`. Each name of `static` (`[sweep.static]`) takes
a list of any values; each combination is a program of its own.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gradjax.experiment import config
from gradjax.experiment.schema import ConfigError, Experiment

Vary = Mapping[str, Any]
_SPEC = {"low", "high", "num", "draws", "scale"}
DRAW = "draw"


class Grid(NamedTuple):
    """The settings of a sweep."""

    dims: dict[str, np.ndarray]  # dimension -> coordinate, in order, `seed` last
    along: dict[str, str]  # swept name -> its dimension
    static: dict[str, list]  # static name -> values
    drawn: dict[str, np.ndarray]  # name -> values along `draw`

    @property
    def num_members(self) -> int:
        """Members of one program."""
        return math.prod(len(values) for values in self.dims.values())

    def cells(self) -> list[dict[str, Any]]:
        """The static combinations, the last name fastest."""
        return [
            dict(zip(self.static, each, strict=True))
            for each in itertools.product(*self.static.values())
        ]

    def members(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(seed, {swept name: value}) of every member, the seed fastest."""
        index = np.unravel_index(np.arange(self.num_members), [len(v) for v in self.dims.values()])
        place = dict(zip(self.dims, index, strict=True))
        return self.dims["seed"][place["seed"]], {
            name: (self.drawn[name] if dim == DRAW else self.dims[dim])[place[dim]].astype(
                np.float32
            )
            for name, dim in self.along.items()
        }


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names of nested tables, as TOML reads `optimizer.max_norm = [..]`; a grid's own table
    stays one.
    """
    found = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        inside = isinstance(value, Mapping) and not (value and set(value) <= _SPEC)
        found.update(flat(value, f"{name}.") if inside else {name: value})
    return found


def _numbers(name: str, spec: Any, generator: np.random.Generator) -> tuple[np.ndarray, bool]:
    """The values of one specification, and whether they are drawn."""
    wrong = f"sweep: {name} = {spec!r} is no list of numbers"
    if isinstance(spec, Mapping):
        kind = {"num", "draws"} & set(spec)
        if set(spec) - _SPEC or not {"low", "high"} <= set(spec) or len(kind) != 1:
            raise ConfigError(
                f"{wrong}; needed: low, high and num (a grid) or draws (random), and maybe scale"
            )
        low, high, count, scale = (
            spec["low"],
            spec["high"],
            spec[kind.pop()],
            spec.get("scale", "linear"),
        )
        if scale not in ("log", "linear") or not isinstance(count, int) or count < 1:
            raise ConfigError(
                f"{wrong}; allowed: scale 'log' or 'linear', and an integer num or draws from 1"
            )
        if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in (low, high)):
            raise ConfigError(f"{wrong}; low and high have to be numbers")
        if not -math.inf < low <= high < math.inf or (scale == "log" and low <= 0):
            raise ConfigError(
                f"{wrong}; needed: low <= high, both finite, and low > 0 for scale = 'log'"
            )
        drawn = "draws" in spec
        fraction = generator.random(count) if drawn else np.linspace(0, 1, count)
        if scale == "log":
            return np.exp(math.log(low) + fraction * (math.log(high) - math.log(low))), drawn
        return low + fraction * (high - low), drawn
    if isinstance(spec, str) or not isinstance(spec, Sequence | np.ndarray) or not len(spec):
        raise ConfigError(
            f"{wrong}; allowed: a list, or {{low, high, num, scale}}, or {{low, high, draws, scale}}"
        )
    if not all(isinstance(x, int | float | np.number) and not isinstance(x, bool) for x in spec):
        raise ConfigError(
            f"{wrong}; its values have to be numbers (other settings belong under sweep.static)"
        )
    return np.asarray(spec, np.float64), False


def grid(experiment: Experiment, vary: Vary | None = None, static: Vary | None = None) -> Grid:
    """Check the names and values of a sweep and lay out its settings.

    Args:
      experiment: gives all that is not varied, and `train.num_seeds`.
      vary: name -> values of what is vmapped; see the module.
      static: name -> list of what compiles again.

    Raises:
      ConfigError: a name that does not exist, is not a float or is static; a value out of its
        range.
    """
    vary, static = flat(vary or {}), flat(static or {})
    known = config.flatten(experiment)
    for name in [*vary, *static]:
        if name not in known:
            near = config.nearest(name, {k: k for k in known})
            raise ConfigError(
                f"sweep: unknown name {name!r}{near}; names are those of the config, as model.sigma_w"
            )
    floats = config.sweepable()
    for name in static:
        if name in ("name", "output", "seed"):
            raise ConfigError(
                f"sweep: {name} is the whole sweep's; seeds are varied by train.num_seeds"
            )
    for name in vary:
        if name in static:
            raise ConfigError(
                f"sweep: {name} stands under both vmap and static; one of them has to go"
            )
        if name not in floats:
            raise ConfigError(
                f"sweep: {name} changes the program (it is no float, or it sets shapes), so it cannot be vmapped; "
                f"put it under sweep.static. Names to vmap: {', '.join(floats)}"
            )
    generator = np.random.default_rng(experiment.seed)
    dims, along, drawn, tried = {}, {}, {}, {}
    for name, spec in vary.items():
        values, is_drawn = _numbers(name, spec, generator)
        tried[name] = values
        along[name] = DRAW if is_drawn else name
        if is_drawn:
            drawn[name] = values
        else:
            dims[name] = values
    lengths = {len(values) for values in drawn.values()}
    if len(lengths) > 1:
        raise ConfigError(
            f"sweep: {', '.join(drawn)} are drawn together; their draws differ: {sorted(lengths)}"
        )
    dims |= {DRAW: np.arange(lengths.pop())} if drawn else {}
    for name, values in static.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ConfigError(f"sweep: {name} = {values!r} under static has to be a list of values")
    dims["seed"] = np.arange(experiment.train.num_seeds)
    settings = Grid(dims, along, {name: list(values) for name, values in static.items()}, drawn)
    for number, own in enumerate(config.replace(experiment, cell) for cell in settings.cells()):
        config.check(own)
        for name, values in tried.items():
            for value in values[: 1 if number else None]:  # ranges are the same in every cell
                config.check(config.replace(own, {name: float(value)}))
    return settings


def to_toml(vary: Vary | None, static: Vary | None) -> str:
    """The `[sweep]` tables of a config file, as `grid` reads them."""
    lines = []
    for table, names in (("vmap", flat(vary or {})), ("static", flat(static or {}))):
        lines += ["", f"[sweep.{table}]"] if names else []
        for name, spec in names.items():
            spec = spec.tolist() if isinstance(spec, np.ndarray) else spec
            inside = (
                ", ".join(f"{k} = {json.dumps(v)}" for k, v in spec.items())
                if isinstance(spec, Mapping)
                else ""
            )
            lines += [f'"{name}" = ' + (f"{{{inside}}}" if inside else json.dumps(list(spec)))]
    return "\n".join(lines) + "\n" if lines else ""


def differences(a: Experiment, b: Experiment) -> list[str]:
    """`model.depth: 10 and 20` for every setting that differs, where it could change a result."""
    mine, yours = config.flatten(a), config.flatten(b)
    harmless = {"output", "name", "train.checkpoint_seconds"}
    return [
        f"{key}: {mine[key]} and {yours[key]}"
        for key in mine
        if key not in harmless and mine[key] != yours[key]
    ]
