"""The one validator of settings, whether they come from a file, a flag, a dictionary or a sweep.

A setting has one dotted name (`model.depth`) in files, flags and `replace`. Each value is checked
against the rule of its field in `gradjax.experiment.schema`, and every message names the key, the
value, where it came from, what is allowed and the nearest name.

Not covered: the size of the data (the task rejects a batch larger than the training split). Imports
jax only when `check` needs the tables of names.
"""

import dataclasses
import difflib
import functools
import numbers
import re
from collections.abc import Iterable, Mapping
from typing import Any

from gradjax.experiment.schema import FIELDS, TABLES, ConfigError, Experiment

KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
# NumPy's scalars are accepted too.
_ACCEPTED = {int: numbers.Integral, float: numbers.Real, bool: bool, str: str}


# Values of an experiment


def flatten(experiment: Experiment) -> dict[str, Any]:
    """`{"name": ..., "model.depth": 50, ...}`: every value, in the order of the dataclasses."""
    return {key: functools.reduce(getattr, key.split("."), experiment) for key in FIELDS}


def sweepable() -> list[str]:
    """The dotted names of every float that is not static, including those that default to None."""
    return [key for key, field in FIELDS.items() if _traceable(field)]


def _traceable(field: dataclasses.Field) -> bool:
    return kind_of(field) is float and not field.metadata.get("static")


def replace(experiment: Experiment, values: Mapping[str, Any]) -> Experiment:
    """`experiment` with other values under dotted keys; a float that is not static may be a tracer.

    Raises:
      ConfigError: an unknown key or a value of the wrong type. Ranges are left to `check`.

    >>> replace(Experiment(), {"model.depth": 10, "model.sigma_w": 2}).model.sigma_w
    2.0
    """
    return merge(experiment, {key: (value, "") for key, value in values.items()})


def merge(experiment: Experiment, given: Mapping[str, tuple[Any, str]]) -> Experiment:
    """`experiment` with the values of `given`, which maps a dotted key to its value and origin.

    Raises:
      ConfigError: an unknown key or a value of the wrong type.
    """
    problems, groups = [], {}
    for key, (value, origin) in given.items():
        table, _, name = key.rpartition(".")
        if key not in FIELDS:
            problems.append(describe_unknown(key, value, origin))
        # A float that a sweep traces may be any array or tracer of JAX.
        elif not (_traceable(FIELDS[key]) and hasattr(value, "aval")):
            problems.append(find_problem(key, FIELDS[key], value, origin, only_type=True))
            value = _typed(FIELDS[key], value)
        groups.setdefault(table, {})[name] = value
    reject(problems)
    top = groups.pop("", {})
    for table, values in groups.items():
        top[table] = dataclasses.replace(getattr(experiment, table), **values)
    return dataclasses.replace(experiment, **top)


# Checks


def check(experiment: Experiment, origins: Mapping[str, str] | None = None) -> None:
    """Check every value and every combination of values; a host function, called before tracing.

    Args:
      experiment: what to check.
      origins: dotted key -> where its value came from, for the message.

    Raises:
      ConfigError: one line per value of the wrong type, out of range or of unknown name, or per
        combination that cannot work.
    """
    origins = origins or {}
    values = flatten(experiment)
    reject(find_problem(key, FIELDS[key], v, origins.get(key, "")) for key, v in values.items())
    reject([*_unused(experiment, origins), *_excluded(experiment)])


def _unused(experiment: Experiment, origins: Mapping[str, str]) -> list[str]:
    """The settings that the architecture does not have."""
    from gradjax.experiment import models  # it loads jax

    problems = []
    for name in models.unused(experiment.model):
        key = f"model.{name}"
        value = show(getattr(experiment.model, name)) + origins.get(key, "")
        problems.append(
            f"config: {key} = {value} means nothing to model.name = {experiment.model.name!r}; "
            "leave it out"
        )
    return problems


def _excluded(experiment: Experiment) -> list[str]:
    """The settings that exclude each other."""
    from gradjax.experiment import models, optimizers, pretraining  # they load jax

    problems = []
    task, norm = experiment.task, experiment.model.normalization
    if task.validation + task.test >= 1:
        problems.append(
            f"config: task.validation = {task.validation} and task.test = {task.test} leave "
            "nothing to train on; allowed: a sum below 1"
        )
    if norm == "batchnorm" and task.batch_size < 2:
        problems.append(
            f"config: task.batch_size = {task.batch_size} has no variance for "
            f"model.normalization = {norm!r}; allowed: an integer from 2"
        )
    if experiment.optimizer.name == "lbfgs" and not experiment.train.full_batch:
        problems.append(
            "config: optimizer.name = 'lbfgs' compares gradients of one loss, not of changing "
            "batches; allowed with train.full_batch = true"
        )
    problems.append(models.check_compatible(experiment.model))
    problems.append(pretraining.check_compatible(experiment))
    return problems + optimizers.check_compatible(experiment.optimizer)


def reject(problems: Iterable[str]) -> None:
    """Raise `ConfigError` with the problems that are not empty, if there are any."""
    if found := [problem for problem in problems if problem]:
        raise ConfigError("\n".join(found))


def find_problem(
    key: str, field: dataclasses.Field, value: Any, origin: str, only_type: bool = False
) -> str:
    """The message about a value that its field does not allow; empty if it is allowed."""
    kind, rule = kind_of(field), field.metadata
    typed = _typed(field, value)
    if value is None and field.default is None:
        return ""
    if typed is not None and (only_type or not rule):
        return ""
    allowed, wrong = KINDS[kind], ""
    if "options" in rule:
        names = _options(key, rule["options"])
        allowed = ", ".join(names)
        if typed not in names:
            wrong = f"is unknown{nearest(str(value).lower(), {name: name for name in names})}"
    elif "pattern" in rule:
        allowed += f" ({rule['words']})"
        if not re.fullmatch(rule["pattern"], str(value)):
            wrong = "is not a usable name"
    elif "within" in rule:
        allowed += f" in {rule['within']}"
        if typed is not None and not _is_within(typed, rule["within"]):
            wrong = "is out of range"
    if typed is None:
        wrong = f"is not {KINDS[kind]}"
    if not wrong:
        return ""
    return f"config: {key} = {show(value)}{origin} {wrong}; allowed: {allowed}"


def _is_within(value: float, interval: str) -> bool:
    """Whether a number lies in an interval such as `[0, 1)`."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    return low <= value < high or (value == high and interval[-1] == "]")


def _typed(field: dataclasses.Field, value: Any) -> Any:
    """`value` as its field's type, or None if it has another: 10.5, "10", true are no integers."""
    kind = kind_of(field)
    if not isinstance(value, _ACCEPTED[kind]) or isinstance(value, bool) != (kind is bool):
        return None
    try:
        return kind(value)
    except OverflowError:  # an integer larger than every float
        return None


def kind_of(field: dataclasses.Field) -> type:
    """int, float, bool or str."""
    return next(kind for kind in KINDS if field.type in (kind, kind | None))


def _options(key: str, options: tuple[str, ...] | str) -> tuple[str, ...]:
    """The names allowed for `key`, looked up late: `import` and `--help` need no jax."""
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


# Text of messages


def nearest(word: str, names: Mapping[str, str]) -> str:
    """` (did you mean 'model.depth'?)` for the name whose word is nearest; empty if none is near.

    Args:
      word: what was written.
      names: name -> the word to compare, often the name itself.
    """
    score = {
        name: difflib.SequenceMatcher(None, word, other).ratio() for name, other in names.items()
    }
    best = max(score, key=score.__getitem__, default="")
    return f" (did you mean {best!r}?)" if score.get(best, 0) >= 0.6 else ""


def describe_unknown(key: str, value: Any, origin: str, flags: Iterable[str] = ()) -> str:
    """The message about a key that is no setting; `flags` are further names that it could mean."""
    table, _, word = key.rpartition(".")
    tables = f"tables: {', '.join(TABLES)}"
    if key in TABLES:
        return f"config: {key} = {show(value)}{origin} is not a table; allowed: keys of [{key}]"
    if isinstance(value, Mapping):
        near = nearest(key, {name: name for name in TABLES})
        return f"config: unknown table [{key}]{origin}{near}; {tables}"
    last = {k: k.rpartition(".")[2] for k in (*FIELDS, *flags)}
    keys = ", ".join(w for k, w in last.items() if k.rpartition(".")[0] == table)
    if table in TABLES:
        allowed = f"keys of [{table}]: {keys}"
    elif table:
        allowed = tables
    else:
        allowed = f"keys: {keys}; {tables}"
    # Only the last part is compared, so that `--depth` suggests `--model.depth`; in a tie the key's
    # own table comes first.
    own_first = sorted(last.items(), key=lambda item: item[0].rpartition(".")[0] != table)
    return f"config: unknown key {key!r}{origin}{nearest(word, dict(own_first))}; {allowed}"


def show(value: Any) -> str:
    """A value as TOML spells it, shortened to about 80 characters."""
    try:
        text = str(value).lower() if isinstance(value, bool) else repr(value)
    except ValueError:  # an integer of more than 4,300 digits, which TOML's 0x can spell
        text = hex(value)
    return text if len(text) <= 80 else f"{text[:60]} ... {text[-15:]}"
