"""Experiments from TOML files, dictionaries and flags, and back.

A setting has one dotted name (`model.depth`) in a file, as a flag and in `replace`. Files and flags
are flattened to dotted names first, flags override the file, and one validator
(`gradjax.experiment.validator`) checks every value. The dataclasses, with their defaults and
allowed values, are in `gradjax.experiment.schema`; `gradjax.cli.help` prints them for `--help`.

Imports jax only when a value is checked.
"""

import dataclasses
import functools
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gradjax.core.names import suggest_names
from gradjax.experiment.schema import FIELDS, TABLES, Command, ConfigError, Experiment
from gradjax.experiment.schema import Diagnose as Diagnose
from gradjax.experiment.schema import Model as Model
from gradjax.experiment.schema import Optimizer as Optimizer
from gradjax.experiment.schema import Task as Task
from gradjax.experiment.schema import Train as Train
from gradjax.experiment.validator import (
    KINDS,
    check,
    describe_unknown,
    find_problem,
    flatten,
    kind_of,
    merge,
    nearest,
    reject,
    show,
)
from gradjax.experiment.validator import replace as replace
from gradjax.experiment.validator import sweepable as sweepable

C = TypeVar("C", bound=Command)
# dotted key -> (value, where it came from)
Given = dict[str, tuple[Any, str]]
_ON_COMMAND_LINE = " on the command line"


# Dictionaries and files


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """Nested dictionaries, including None values."""
    return dataclasses.asdict(experiment)


def from_dict(nested: Mapping[str, Any]) -> Experiment:
    """The inverse of `to_dict`, as strict as `load`; missing keys take their defaults.

    >>> from_dict({"name": "mine", "model": {"depth": 10}}).model.depth
    10
    """
    return _checked(_dotted(nested, ""))


def to_toml(experiment: Experiment) -> str:
    """TOML text that `load` reads back to the same values, bit for bit; None is left out."""
    lines, last = [], ""
    for key, value in flatten(experiment).items():
        table, _, name = key.rpartition(".")
        if table != last:
            lines += ["", f"[{table}]"]
            last = table
        if isinstance(value, str):
            # JSON's escapes are TOML's, except for DEL.
            text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            lines.append(f"{name} = {text}")
        elif value is not None:
            lines.append(f"{name} = {repr(value).lower()}")
    return "\n".join(lines) + "\n"


def load(path: str | Path, args: Sequence[str] = ()) -> Experiment:
    """The checked experiment of a TOML file; the flags in `args` override the file.

    Args:
      path: the file.
      args: such as `["--model.depth", "10", "--task.batch-size=32", "--model.no-residual"]`.

    Raises:
      ConfigError: anything wrong with the file, a value or a flag.
    """
    flags, words = _read_flags(args, {})
    reject(f"config: unexpected argument {show(word)}; needed: --key value" for word in words)
    return _checked(_read_settings(path), flags)


def loads(text: str) -> Experiment:
    """The experiment of TOML text, as `to_toml` writes it; as strict as `load`."""
    return _checked(_dotted(_without_sweep(tomllib.loads(text)), ""))


def sweep_tables(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`[sweep.vmap]` and `[sweep.static]` of a TOML file, unchecked; empty where absent.

    `gradjax.experiment.grid.grid` checks them.

    Raises:
      ConfigError: any other key of `[sweep]`.
    """
    table = _read(str(path)).get("sweep", {})
    if not isinstance(table, Mapping) or not all(isinstance(table[key], Mapping) for key in table):
        raise ConfigError(
            f"config: sweep in {path} has to hold tables; allowed: [sweep.vmap], [sweep.static]"
        )
    for key in table:
        if key not in ("vmap", "static"):
            near = nearest(key, {"vmap": "vmap", "static": "static"})
            raise ConfigError(
                f"config: unknown table [sweep.{key}] in {path}{near}; allowed: vmap, static"
            )
    return dict(table.get("vmap", {})), dict(table.get("static", {}))


def _without_sweep(nested: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the experiment itself."""
    return {key: value for key, value in nested.items() if key != "sweep"}


def _read_settings(path: str | Path) -> Given:
    return _dotted(_without_sweep(_read(str(path))), f" in {path}")


def _read(name: str) -> dict[str, Any]:
    path, near = Path(name), ""
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        wrong = "does not exist"
        near = nearest(path.name, {str(p): p.name for p in sorted(path.parent.glob("*.toml"))})
    except IsADirectoryError:
        wrong = "is a directory"
    except OSError as error:
        wrong = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        wrong = f"is not UTF-8 (byte {error.start})"
    except RecursionError:
        wrong = "is not valid TOML: nested too deeply"
    except ValueError as error:  # tomllib names the line; or the path holds a NUL
        wrong = f"is not valid TOML: {error}"
    raise ConfigError(
        f"config: {show(name)} {wrong}{near}; needed: a TOML file such as configs/demo.toml"
    )


def _dotted(nested: Mapping[str, Any], origin: str) -> Given:
    """Flatten the known tables; anything else, an empty table too, stays a value to be rejected."""
    flat = {}
    for table, value in nested.items():
        if table not in TABLES or not isinstance(value, Mapping):
            flat[_quoted(table)] = value, origin
            continue
        for key, v in value.items():
            flat[f"{table}.{_quoted(key)}"] = v, origin
    return flat


def _quoted(key: Any) -> str:
    """A key as TOML spells it: one such as `"model.depth"` keeps its quotes."""
    return str(key) if re.fullmatch(r"[\w-]+", str(key)) else repr(key)


def _checked(*layers: Given) -> Experiment:
    """The defaults with each layer over the one before; overridden values must have their type."""
    experiment = functools.reduce(merge, layers, Experiment())
    check(experiment, {key: origin for layer in layers for key, (_, origin) in layer.items()})
    return experiment


# Flags


def parse(args: Sequence[str], command: type[C] = Command) -> tuple[Experiment, C]:
    """The experiment and the command's own arguments from the words `CONFIG [--flags]`.

    Raises:
      ConfigError: anything wrong with the words, the file or a value.
    """
    fields = {f.name: f for f in dataclasses.fields(command)}
    needed = [name for name, f in fields.items() if f.default is dataclasses.MISSING]
    own = {name: f for name, f in fields.items() if name not in needed}
    flags, words = _read_flags(args, own)
    if len(words) != len(needed):
        came = "too few arguments"
        if len(words) > len(needed):
            came = f"unexpected argument {show(words[-1])}"
        raise ConfigError(
            f"config: {came}; needed: {' '.join(needed).upper()} [--flags], see --help"
        )
    mine = {name: flags.pop(name) for name in own if name in flags}
    reject(find_problem(name, own[name], *given) for name, given in mine.items())
    values = dict(zip(needed, words, strict=True)) | {k: value for k, (value, _) in mine.items()}
    options = command(**values)
    return _checked(_read_settings(options.config), flags), options


def _read_flags(args: Sequence[str], own: Mapping[str, Any]) -> tuple[Given, list[str]]:
    """The flags by dotted key (the last one wins), and the words that are not flags."""
    fields, flags, rest, words = {**FIELDS, **own}, {}, [], list(args)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            rest.append(word)
            continue
        name, equals, text = word.partition("=")
        key = name[2:].replace("-", "_") if name.startswith("--") else name
        if key not in fields:
            # --model.no_residual
            positive = re.sub(r"(^|\.)no_(?=\w+$)", r"\1", key)
            if equals or positive not in fields or kind_of(fields[positive]) is not bool:
                reject([describe_unknown(name.removeprefix("--"), text, _ON_COMMAND_LINE, own)])
            flags[positive] = False, _ON_COMMAND_LINE
            continue
        kind = kind_of(fields[key])
        if not equals:
            following = words[0] if words else "--"
            if kind is bool and following.lower() not in ("true", "false"):
                text = "true"
            elif following.startswith("--"):
                raise ConfigError(f"config: flag {name} needs {KINDS[kind]} after it")
            else:
                text = words.pop(0)
        flags[key] = _parsed(fields[key], text), _ON_COMMAND_LINE
    return flags, rest


def _parsed(field: dataclasses.Field, text: str) -> Any:
    """The value of a flag's text; the text itself if it has none, which the check then rejects."""
    kind, lower = kind_of(field), text.lower()
    if lower == "none" and field.default is None:
        return None
    if kind is bool:
        return {"true": True, "false": False}.get(lower, text)
    try:
        return kind(text)
    except ValueError:
        return text


__getattr__ = suggest_names(__name__)
