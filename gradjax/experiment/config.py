"""Experiments: frozen dataclasses, read from TOML files and flags through one strict validator.

A setting has one dotted name (`model.depth`) in a file, as a flag and in `replace`. Files and flags
are flattened to dotted names first, flags over the file, and the same function judges every value;
tyro writes the `--help` from the docstrings below. (tyro does not read the flags: it prints its own
errors and exits, and a TOML `"10"` and `10` are the same token to it.)

Floats are what a sweep may trace; ints, bools, strings and the fields marked static compile again.
So `__post_init__` checks nothing, and `check` is the one host function that knows ranges and names.

Not covered: the size of the data (a batch larger than the training split is the task's to refuse).
Imports neither jax nor tyro until a value is checked or a help text asked for.
"""

import contextlib
import dataclasses
import difflib
import functools
import io
import json
import numbers
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from gradjax.experiment.schema import FIELDS, TABLES, Command, ConfigError, Experiment, Model
from gradjax.experiment.schema import Diagnose as Diagnose
from gradjax.experiment.schema import Optimizer as Optimizer
from gradjax.experiment.schema import Task as Task
from gradjax.experiment.schema import Train as Train

C = TypeVar("C", bound=Command)
_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
_ACCEPTED = {
    int: numbers.Integral,
    float: numbers.Real,
    bool: bool,
    str: str,
}  # NumPy's scalars too


# -- the validator ---------------------------------------------------------------------------------------


def check(experiment: Experiment, origins: Mapping[str, str] | None = None) -> None:
    """Raises `ConfigError` with every value of the wrong type, out of range or of unknown name.

    A host function: call it before tracing. `origins` says of a dotted key where its value came from.
    """
    origins = origins or {}
    _refuse(
        _problem(key, FIELDS[key], v, origins.get(key, ""))
        for key, v in flatten(experiment).items()
    )
    task, norm, problems = experiment.task, experiment.model.normalization, []
    for name in _unused(experiment.model):
        key = f"model.{name}"
        value = f"{_show(getattr(experiment.model, name))}{origins.get(key, '')}"
        problems += [
            f"config: {key} = {value} means nothing to model.name = {experiment.model.name!r}; leave it out"
        ]
    if task.validation + task.test >= 1:
        problems += [
            f"config: task.validation = {task.validation} and task.test = {task.test} leave nothing to "
            "train on; allowed: a sum below 1"
        ]
    if norm == "batchnorm" and task.batch_size < 2:
        problems += [
            f"config: task.batch_size = {task.batch_size} has no variance for model.normalization = "
            f"{norm!r}; allowed: an integer from 2"
        ]
    if experiment.optimizer.name == "lbfgs" and not experiment.train.full_batch:
        problems += [
            "config: optimizer.name = 'lbfgs' compares gradients of one loss, not of changing batches; "
            "allowed with train.full_batch = true"
        ]
    problems += _excluded(experiment)
    _refuse(problems)


def _excluded(experiment: Experiment) -> list[str]:
    """Settings that exclude each other, in the words of the architecture, the pre-training and the
    optimiser.
    """
    from gradjax.experiment import models, optimizers, pretraining  # they load jax

    reasons = [models.check_compatible(experiment.model), pretraining.check_compatible(experiment)]
    return reasons + optimizers.check_compatible(experiment.optimizer)


def _unused(model: Model) -> list[str]:
    """Settings that the architecture does not have."""
    from gradjax.experiment import models  # it loads jax

    return models.unused(model)


def _refuse(problems: Iterable[str]) -> None:
    if found := [problem for problem in problems if problem]:
        raise ConfigError("\n".join(found))


def _problem(
    key: str, field: dataclasses.Field, value: Any, origin: str, only_type: bool = False
) -> str:
    """The message about a value that its field does not allow; empty when it does."""
    kind, rule, wrong = _kind(field), field.metadata, ""
    allowed, typed = _KINDS[kind], _typed(field, value)
    if (value is None and field.default is None) or (typed is not None and (only_type or not rule)):
        return ""
    if "options" in rule:
        names = _options(key, rule["options"])
        allowed = ", ".join(names)
        wrong = (
            ""
            if typed in names
            else f"is unknown{nearest(str(value).lower(), {n: n for n in names})}"
        )
    elif "pattern" in rule:
        allowed += f" ({rule['words']})"
        wrong = "" if re.fullmatch(rule["pattern"], str(value)) else "is not a usable name"
    elif "within" in rule:
        allowed += f" in {rule['within']}"
        low, high = (float(end) for end in rule["within"][1:-1].split(","))
        closed = rule["within"][-1] == "]"
        if typed is not None and not (low <= typed <= high and (typed < high or closed)):
            wrong = "is out of range"
    if typed is None:
        wrong = f"is not {_KINDS[kind]}"
    return f"config: {key} = {_show(value)}{origin} {wrong}; allowed: {allowed}" if wrong else ""


def _typed(field: dataclasses.Field, value: Any) -> Any:
    """`value` as its field's type; None where that would be a guess: 10.5, "10" and true are no
    integers.
    """
    kind = _kind(field)
    if not isinstance(value, _ACCEPTED[kind]) or isinstance(value, bool) != (kind is bool):
        return None
    try:
        return kind(value)
    except OverflowError:  # an integer beyond every float
        return None


def _kind(field: dataclasses.Field) -> type:
    return next(kind for kind in _KINDS if field.type in (kind, kind | None))


def _options(key: str, options: tuple[str, ...] | str) -> tuple[str, ...]:
    """The names allowed for `key`. Tables are looked up only now, because `import` and `--help`
    need no jax.
    """
    if isinstance(options, tuple):
        return options
    from gradjax.core import activations, initializers
    from gradjax.experiment import models, optimizers, pretraining, tasks

    tables: dict[str, Iterable[str]] = {
        "model.name": models.MODELS,
        "model.activation": activations.ACTIVATIONS,
        "model.weights": initializers.WEIGHTS,
        "task.name": tasks.TASKS,
        "task.normalize": tasks.NORMALIZE,
        "task.augment": tasks.AUGMENT,
        "optimizer.name": optimizers.OPTIMIZERS,
        "optimizer.schedule": optimizers.SCHEDULES,
        "optimizer.clipping": optimizers.CLIPPING,
        "optimizer.guard": optimizers.GUARDS,
        "train.pretrain": pretraining.METHODS,
    }
    return tuple(tables[key])


def nearest(word: str, names: Mapping[str, str]) -> str:
    """` (did you mean 'model.depth'?)` for the name whose word is nearest; empty when none is
    near.
    """
    score = {
        name: difflib.SequenceMatcher(None, word, other).ratio() for name, other in names.items()
    }
    best = max(score, key=score.__getitem__, default="")
    return f" (did you mean {best!r}?)" if score.get(best, 0) >= 0.6 else ""


def _show(value: Any) -> str:
    try:
        text = str(value).lower() if isinstance(value, bool) else repr(value)
    except ValueError:  # an integer of more than 4,300 digits, which TOML's 0x can spell
        text = hex(value)
    return text if len(text) <= 80 else f"{text[:60]} ... {text[-15:]}"


# -- dotted names ----------------------------------------------------------------------------------------


def flatten(experiment: Experiment) -> dict[str, Any]:
    """`{"name": ..., "model.depth": 50, ...}`: every value, in the order of the dataclasses."""
    return {key: functools.reduce(getattr, key.split("."), experiment) for key in FIELDS}


def sweepable() -> list[str]:
    """The dotted names of every float that is not static, those included that are None by
    default.
    """
    return [key for key, field in FIELDS.items() if _traceable(field)]


def _traceable(field: dataclasses.Field) -> bool:
    return _kind(field) is float and not field.metadata.get("static")


def replace(experiment: Experiment, values: Mapping[str, Any]) -> Experiment:
    """`experiment` with other values under dotted keys; a float that is not static may be a tracer.

    >>> replace(Experiment(), {"model.depth": 10, "model.sigma_w": 2}).model.sigma_w
    2.0

    Raises: `ConfigError` for an unknown key or a wrong type; ranges are `check`'s.
    """
    return _merge(experiment, {key: (value, "") for key, value in values.items()})


def _merge(experiment: Experiment, given: Mapping[str, tuple[Any, str]]) -> Experiment:
    """The one way in for values: `given` maps a dotted key to its value and origin."""
    problems, groups = [], {}
    for key, (value, origin) in given.items():
        table, _, name = key.rpartition(".")
        if key not in FIELDS:
            problems.append(_unknown(key, value, origin))
        elif not (
            _traceable(FIELDS[key]) and hasattr(value, "aval")
        ):  # else an array or tracer of JAX
            problems.append(_problem(key, FIELDS[key], value, origin, only_type=True))
            value = _typed(FIELDS[key], value)
        groups.setdefault(table, {})[name] = value
    _refuse(problems)
    top = groups.pop("", {})
    tables = {
        t: dataclasses.replace(getattr(experiment, t), **values) for t, values in groups.items()
    }
    return dataclasses.replace(experiment, **top, **tables)


def _unknown(key: str, value: Any, origin: str, own: Iterable[str] = ()) -> str:
    """The message about a key that is no setting (`own`: flags of the command that would be none
    too).
    """
    table, _, word = key.rpartition(".")
    tables = f"tables: {', '.join(TABLES)}"
    if key in TABLES:
        return f"config: {key} = {_show(value)}{origin} is not a table; allowed: keys of [{key}]"
    if isinstance(value, Mapping):
        return (
            f"config: unknown table [{key}]{origin}{nearest(key, {t: t for t in TABLES})}; {tables}"
        )
    last = {k: k.rpartition(".")[2] for k in (*FIELDS, *own)}
    keys = ", ".join(w for k, w in last.items() if k.rpartition(".")[0] == table)
    inside = (
        f"keys of [{table}]: {keys}"
        if table in TABLES
        else f"keys: {keys}; " * (not table) + tables
    )
    # The last part decides, `--depth` means `--model.depth`; the key's own table comes first in a
    # tie.
    near = nearest(
        word, dict(sorted(last.items(), key=lambda item: item[0].rpartition(".")[0] != table))
    )
    return f"config: unknown key {key!r}{origin}{near}; {inside}"


# -- files, dictionaries, flags --------------------------------------------------------------------------


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """Nested dictionaries, None included."""
    return dataclasses.asdict(experiment)


def from_dict(nested: Mapping[str, Any]) -> Experiment:
    """The inverse of `to_dict`, as strict as `load`; what is left out has its default.

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
        if isinstance(value, str):  # JSON's escapes are TOML's, but for DEL
            lines += [
                f"{name} = " + json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            ]
        elif value is not None:
            lines += [f"{name} = " + repr(value).lower()]
    return "\n".join(lines) + "\n"


def load(path: str | Path, args: Sequence[str] = ()) -> Experiment:
    """The experiment of a TOML file, with the flags of `args` over it, checked.

    Args: `args`, such as `["--model.depth", "10", "--task.batch-size=32", "--model.no-residual"]`.
    Raises: `ConfigError` for everything that a file or a flag can have wrong.
    """
    flags, words = _flags(args, {})
    _refuse(f"config: unexpected argument {_show(word)}; needed: --key value" for word in words)
    return _checked(_dotted(_without_sweep(str(path)), f" in {path}"), flags)


def loads(text: str) -> Experiment:
    """The experiment of TOML text, as `to_toml` writes it; as strict as `load`."""
    return _checked(_dotted({k: v for k, v in tomllib.loads(text).items() if k != "sweep"}, ""))


def sweep_tables(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`[sweep.vmap]` and `[sweep.static]` of a TOML file as they stand there, for
    `gradjax.experiment.grid`; empty if absent.

    Raises: `ConfigError` for any other key of `[sweep]`.
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


def _without_sweep(path: str) -> dict[str, Any]:
    """What the file says of the one experiment that a sweep varies."""
    return {key: value for key, value in _read(path).items() if key != "sweep"}


def parse(args: Sequence[str], command: type[C] = Command) -> tuple[Experiment, C]:
    """The experiment and the command's own arguments from the words `CONFIG [--flags]`."""
    fields = {f.name: f for f in dataclasses.fields(command)}
    needed = [name for name, f in fields.items() if f.default is dataclasses.MISSING]
    own = {name: f for name, f in fields.items() if name not in needed}
    flags, words = _flags(args, own)
    if len(words) != len(needed):
        came = (
            f"unexpected argument {_show(words[-1])}"
            if len(words) > len(needed)
            else "too few arguments"
        )
        raise ConfigError(
            f"config: {came}; needed: {' '.join(needed).upper()} [--flags], see --help"
        )
    mine = {name: flags.pop(name) for name in own if name in flags}
    _refuse(_problem(name, own[name], *given) for name, given in mine.items())
    options = command(
        **dict(zip(needed, words, strict=True)), **{k: value for k, (value, _) in mine.items()}
    )
    return _checked(
        _dotted(_without_sweep(options.config), f" in {options.config}"), flags
    ), options


def _flags(
    args: Sequence[str], own: Mapping[str, Any]
) -> tuple[dict[str, tuple[Any, str]], list[str]]:
    """The flags by dotted key (the last one wins) with value and origin, and the words that are
    none.
    """
    fields, flags, rest, words, origin = (
        {**FIELDS, **own},
        {},
        [],
        list(args),
        " on the command line",
    )
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            rest.append(word)
            continue
        name, equals, text = word.partition("=")
        key = name[2:].replace("-", "_") if name.startswith("--") else name
        positive = re.sub(r"(^|\.)no_(?=\w+$)", r"\1", key)  # --model.no_residual
        if (
            key not in fields
            and positive in fields
            and _kind(fields[positive]) is bool
            and not equals
        ):
            flags[positive] = False, origin
            continue
        if key not in fields:
            raise ConfigError(_unknown(name.removeprefix("--"), text, origin, own))
        if not equals:
            following = words[0] if words else "--"
            if _kind(fields[key]) is bool and following.lower() not in ("true", "false"):
                text = "true"
            elif following.startswith("--"):
                raise ConfigError(
                    f"config: flag {name} needs {_KINDS[_kind(fields[key])]} after it"
                )
            else:
                text = words.pop(0)
        flags[key] = _meaning(fields[key], text), origin
    return flags, rest


def _meaning(field: dataclasses.Field, text: str) -> Any:
    """The value that a flag's text means; the text itself where it means none, to be refused as
    such.
    """
    kind, lower = _kind(field), text.lower()
    if lower == "none" and field.default is None:
        return None
    try:
        return {"true": True, "false": False}.get(lower, text) if kind is bool else kind(text)
    except ValueError:
        return text


def _dotted(nested: Mapping[str, Any], origin: str) -> dict[str, tuple[Any, str]]:
    """Flattens the known tables only: any other, an empty one too, stays a value and is refused."""
    flat = {}
    for table, value in nested.items():
        inside = table in TABLES and isinstance(value, Mapping)
        for key, v in value.items() if inside else [(table, value)]:
            key = (
                key if re.fullmatch(r"[\w-]+", str(key)) else repr(key)
            )  # quoted: "model.depth" = 1
            flat[f"{table}.{key}" if inside else str(key)] = v, origin
    return flat


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
    except ValueError as error:  # tomllib says the line; or a NUL in the name
        wrong = f"is not valid TOML: {error}"
    raise ConfigError(
        f"config: {_show(name)} {wrong}{near}; needed: a TOML file such as configs/demo.toml"
    )


def _checked(*layers: Mapping[str, tuple[Any, str]]) -> Experiment:
    """The defaults with each layer over the one before; also what is overridden must be of its
    type.
    """
    experiment = functools.reduce(_merge, layers, Experiment())
    check(experiment, {key: origin for layer in layers for key, (_, origin) in layer.items()})
    return experiment


def help_text(prog: str, command: type[Command] = Command, text: str = "") -> str:
    """The text of `PROG --help`: `text`, the fields with their docstrings (by tyro), examples."""
    import tyro

    experiment = Annotated[
        Experiment, tyro.conf.arg(name="")
    ]  # --model.depth, not --experiment.model.depth
    groups = [("command", tyro.conf.OmitArgPrefixes[command]), ("experiment", experiment)]
    conf = (tyro.conf.PositionalRequiredArgs, tyro.conf.PositionalMetavarFromFieldName)
    whole = dataclasses.make_dataclass("whole", groups)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        tyro.cli(
            whole, args=["--help"], prog=prog, description=text, use_underscores=True, config=conf
        )
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    examples = ("", " --model.depth 200 --model.sigma_w=1.5", " --task.name mnist --model.residual")
    lines += ["Flags win over CONFIG, and CONFIG over the defaults above.", "", "examples:"]
    return "\n".join([*lines, *(f"  {prog} configs/demo.toml{flags}" for flags in examples), ""])
