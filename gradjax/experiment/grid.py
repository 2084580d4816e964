"""What a sweep varies: names and values -> settings, checked before anything is traced.

Each name of `vary` (the file's `[sweep.vmap]`) is a float of the config and takes one of

    [0.1, 1.0, 10.0]                                        a list
    {low = 1e-4, high = 1.0, num = 8, scale = "log"}        a grid
    {low = 1e-4, high = 1.0, draws = 32, scale = "log"}     random draws

with scale "log" or "linear" (the default). Each name becomes a dimension of the result, beside
`seed`; all random names are drawn together, along the one dimension `draw`. Each name of `static`
(`[sweep.static]`) takes a list of any values; each combination is a program of its own.
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
    """The settings of a sweep.

    Attributes:
      dims: dimension -> coordinate, in order, `seed` last.
      along: swept name -> its dimension.
      static: static name -> values.
      drawn: name -> values along `draw`.
    """

    dims: dict[str, np.ndarray]
    along: dict[str, str]
    static: dict[str, list]
    drawn: dict[str, np.ndarray]

    @property
    def num_members(self) -> int:
        """Members of one program: settings times seeds."""
        return math.prod(len(values) for values in self.dims.values())

    def cells(self) -> list[dict[str, Any]]:
        """The static combinations, the last name fastest."""
        return [
            dict(zip(self.static, each, strict=True))
            for each in itertools.product(*self.static.values())
        ]

    def members(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(seed, {swept name: value}) of every member, the seed fastest; values are float32."""
        index = np.unravel_index(np.arange(self.num_members), [len(v) for v in self.dims.values()])
        place = dict(zip(self.dims, index, strict=True))
        values = {}
        for name, dim in self.along.items():
            coordinate = self.drawn[name] if dim == DRAW else self.dims[dim]
            values[name] = coordinate[place[dim]].astype(np.float32)
        return self.dims["seed"][place["seed"]], values


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables by dotted name, as TOML reads `optimizer.max_norm = [..]`, by dotted name.

    The table of a grid or of draws stays a table.
    """
    found = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        inside = isinstance(value, Mapping) and not (value and set(value) <= _SPEC)
        found.update(flat(value, f"{name}.") if inside else {name: value})
    return found


def _numbers(name: str, spec: Any, generator: np.random.Generator) -> tuple[np.ndarray, bool]:
    """The values of one specification, and whether they are random."""
    if isinstance(spec, Mapping):
        return _spaced(name, spec, generator)
    wrong = f"sweep: {name} = {spec!r} is no list of numbers"
    if isinstance(spec, str) or not isinstance(spec, Sequence | np.ndarray) or not len(spec):
        raise ConfigError(
            f"{wrong}; allowed: a list, or {{low, high, num, scale}}, or "
            "{low, high, draws, scale}"
        )
    if not all(map(_is_number, spec)):
        raise ConfigError(
            f"{wrong}; its values have to be numbers (other settings belong under sweep.static)"
        )
    return np.asarray(spec, np.float64), False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _spaced(
    name: str, spec: Mapping[str, Any], generator: np.random.Generator
) -> tuple[np.ndarray, bool]:
    """The values of a grid or of random draws, and whether they are random."""
    wrong = f"sweep: {name} = {spec!r} is no list of numbers"
    kind = {"num", "draws"} & set(spec)
    if set(spec) - _SPEC or not {"low", "high"} <= set(spec) or len(kind) != 1:
        raise ConfigError(
            f"{wrong}; needed: low, high and num (a grid) or draws (random), and maybe scale"
        )
    low, high, count = spec["low"], spec["high"], spec[kind.pop()]
    scale = spec.get("scale", "linear")
    if scale not in ("log", "linear") or not isinstance(count, int) or count < 1:
        raise ConfigError(
            f"{wrong}; allowed: scale 'log' or 'linear', and an integer num or draws from 1"
        )
    if not _is_number(low) or not _is_number(high):
        raise ConfigError(f"{wrong}; low and high have to be numbers")
    if not -math.inf < low <= high < math.inf or (scale == "log" and low <= 0):
        raise ConfigError(
            f"{wrong}; needed: low <= high, both finite, and low > 0 for scale = 'log'"
        )
    is_random = "draws" in spec
    fraction = generator.random(count) if is_random else np.linspace(0, 1, count)
    if scale == "log":
        return np.exp(math.log(low) + fraction * (math.log(high) - math.log(low))), is_random
    return low + fraction * (high - low), is_random


def grid(experiment: Experiment, vary: Vary | None = None, static: Vary | None = None) -> Grid:
    """Check the names and values of a sweep and lay out its settings.

    Args:
      experiment: gives everything that is not varied, and `train.num_seeds`.
      vary: name -> values to vmap over; see the module.
      static: name -> list of values, each combination of which compiles its own program.

    Raises:
      ConfigError: a name that does not exist, is not a float or is static; a value out of its
        range.
    """
    vary, static = flat(vary or {}), flat(static or {})
    _check_names(experiment, vary, static)
    generator = np.random.default_rng(experiment.seed)
    dims, along, drawn, tried = {}, {}, {}, {}
    for name, spec in vary.items():
        values, is_random = _numbers(name, spec, generator)
        tried[name] = values
        along[name] = DRAW if is_random else name
        (drawn if is_random else dims)[name] = values
    lengths = {len(values) for values in drawn.values()}
    if len(lengths) > 1:
        raise ConfigError(
            f"sweep: {', '.join(drawn)} are drawn together; their draws differ: {sorted(lengths)}"
        )
    if drawn:
        dims[DRAW] = np.arange(lengths.pop())
    for name, values in static.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ConfigError(f"sweep: {name} = {values!r} under static has to be a list of values")
    dims["seed"] = np.arange(experiment.train.num_seeds)
    settings = Grid(dims, along, {name: list(values) for name, values in static.items()}, drawn)
    _check_values(experiment, settings, tried)
    return settings


def _check_names(experiment: Experiment, vary: Vary, static: Vary) -> None:
    """Reject the names that cannot be swept, or not in this way."""
    known, floats = config.flatten(experiment), config.sweepable()
    for name in [*vary, *static]:
        if name not in known:
            near = config.nearest(name, {key: key for key in known})
            raise ConfigError(
                f"sweep: unknown name {name!r}{near}; names are those of the config, as "
                "model.sigma_w"
            )
    for name in static:
        if name in ("name", "output", "seed"):
            raise ConfigError(
                f"sweep: {name} belongs to the whole sweep; seeds are varied by train.num_seeds"
            )
    for name in vary:
        if name in static:
            raise ConfigError(
                f"sweep: {name} stands under both vmap and static; one of them has to go"
            )
        if name not in floats:
            raise ConfigError(
                f"sweep: {name} changes the program (it is no float, or it sets shapes), so it "
                "cannot be vmapped; put it under sweep.static. Names to vmap: "
                f"{', '.join(floats)}"
            )


def _check_values(experiment: Experiment, settings: Grid, tried: Mapping[str, np.ndarray]) -> None:
    """Reject values out of range, and those that exclude each other in a static combination."""
    for number, cell in enumerate(settings.cells()):
        own = config.replace(experiment, cell)
        config.check(own)
        for name, values in tried.items():
            # Ranges are the same in every cell, so one value serves in all but the first.
            for value in values[:1] if number else values:
                config.check(config.replace(own, {name: float(value)}))


def to_toml(vary: Vary | None, static: Vary | None) -> str:
    """The `[sweep]` tables of a config file, as `grid` reads them."""
    lines = []
    for table, names in (("vmap", flat(vary or {})), ("static", flat(static or {}))):
        if names:
            lines += ["", f"[sweep.{table}]"]
        lines += [f'"{name}" = {_spec_to_toml(spec)}' for name, spec in names.items()]
    return "\n".join(lines) + "\n" if lines else ""


def _spec_to_toml(spec: Any) -> str:
    if isinstance(spec, Mapping):
        return "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in spec.items()) + "}"
    return json.dumps(spec.tolist() if isinstance(spec, np.ndarray) else list(spec))


def differences(a: Experiment, b: Experiment) -> list[str]:
    """`model.depth: 10 and 20` for every setting that differs and could change a result."""
    mine, yours = config.flatten(a), config.flatten(b)
    harmless = {"output", "name", "train.checkpoint_seconds"}
    return [
        f"{key}: {mine[key]} and {yours[key]}"
        for key in mine
        if key not in harmless and mine[key] != yours[key]
    ]
