"""Experiments: frozen dataclasses, read from TOML files and flags through one strict validator.

A setting has one dotted name (`model.depth`) in a file, as a flag and in `replace`. Files and flags are
flattened to dotted names first, flags over the file, and the same function judges every value; tyro
writes the `--help` from the docstrings below. (tyro does not read the flags: it prints its own errors and
exits, and a TOML `"10"` and `10` are the same token to it.)

Floats are what a sweep may trace; ints, bools, strings and the fields marked static compile again. So
`__post_init__` checks nothing, and `check` is the one host function that knows ranges and names.

Not covered: the size of the data (a batch larger than the training split is the task's to refuse).
Imports neither jax nor tyro until a value is checked or a help text asked for.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib
import io
import json
import numbers
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar


class ConfigError(ValueError):
    """What the user wrote cannot be used; the message names key, value, what is allowed, nearest name."""


def _field(default: Any, **rule: Any) -> Any:
    """A field with its rule: `within` an interval, `options`, `pattern` in `words`, `static`."""
    return dataclasses.field(default=default, metadata=rule)


# sigma_w^2 has to be a float32, hence the upper end of the scales.
@dataclass(frozen=True)
class Model:
    """The network at initialisation. A model takes the settings that it has; any other is refused."""

    name: str = _field("mlp", options="gradjax.models:MODELS")
    """Architecture; an unknown name lists them."""
    depth: int = _field(50, within="[1, 1000000]")
    """Hidden layers (blocks of residual, dense and transformer networks, layers of recurrences on top of each other).
    Our choice: past the depth scale of all but nearly critical networks."""
    width: int = _field(128, within="[1, 1000000]")
    """Units per hidden layer, channels of the first stage of a convolutional network. Our choice: mean field holds to
    about 1 / width, and a laptop can do it."""
    activation: str = _field("tanh", options="gradjax.activations:ACTIVATIONS")
    """A name in gradjax.activations; an unknown one lists them. tanh: Schoenholz 2017."""
    sigma_w: float = _field(1.32701, within="[0, 1e18]")
    """Var W = sigma_w^2 / fan_in. Default: critical for tanh at the default sigma_b (Schoenholz 2017)."""
    sigma_b: float = _field(0.05**0.5, within="[0, 1e18]")
    """Var b = sigma_b^2. Default: sqrt(0.05) (Schoenholz 2017)."""
    weights: str = _field("gaussian", options="gradjax.initializers:WEIGHTS")
    """Distribution of the weights, times sigma_w: gaussian (Poole 2016), orthogonal (Saxe 2013), he_normal (He 2015, at
    sigma_w = 1) ...; an unknown name lists them."""
    residual: bool = False
    """h + residual_scale * f(h) instead of f(h) (He 2015)."""
    residual_scale: float = _field(1.0, within="[0, 1e18]")
    """Scale of the branch of a residual layer; 1 is He 2015, 0 the start of ReZero (Bachlechner 2020)."""
    residual_learned: bool = False
    """Whether the scale is a parameter of each layer (ReZero, Bachlechner 2020; SkipInit, De & Smith 2020)."""
    fixup: bool = False
    """Fixup's start of residual branches, with its scalars and no normalisation (Zhang 2019)."""
    bottleneck: int = _field(0, within="[0, 1000000]")
    """Units inside each residual branch, a map down and one up again (He 2015); 0: one map per branch."""
    highway: bool = False
    """Layers gated by a learned transform gate (Srivastava 2015), its bias starting at -2."""
    normalization: str = _field("none", options=("none", "batchnorm", "layernorm", "rmsnorm"))
    """batchnorm (Ioffe 2015), layernorm (Ba 2016) or rmsnorm (Zhang 2019), before the activation; none."""
    placement: str = _field("pre", options=("pre", "post", "deepnorm"))
    """Norm of a transformer: pre (on the branch), post (after the sum, Vaswani 2017), or deepnorm (Wang 2022)."""
    weight_standardization: bool = False
    """Standardised incoming weights of each unit, times sigma_w (Qiao 2019; Brock 2021's gain)."""
    dropout: float | None = _field(None, within="[0, 1)")
    """Rate of dropout after each hidden layer (Srivastava 2014); None: no dropout layer at all."""
    dropout_on: str = _field("all", options=("all", "last"))
    """Whether all hidden layers drop units, or the last alone."""
    num_heads: int = _field(4, within="[1, 1000000]")
    """Attention heads; they divide the width."""
    forget_bias: float | None = _field(None, within="[-1e18, 1e18]")
    """Start of the forget gate's bias (Jozefowicz 2015: 1), or of the gate in its place in other cells; None: 0."""
    chrono: float | None = _field(None, within="[2, 1e18]")
    """Longest time of chrono initialisation of the gates (Tallec & Ollivier 2018); None: without."""
    remat: bool = False
    """Gradients in O(sqrt(depth)) memory for about one more forward pass (Chen 2016)."""


@dataclass(frozen=True)
class Task:
    """The data, and how it is split."""

    name: str = _field("digits", options="gradjax.tasks:TASKS")
    """Images (digits, offline; mnist ...), sequences (temporal_order, adding ...), text, graphs, a regression; an
    unknown name lists them."""
    batch_size: int = _field(64, within="[1, 1000000]")
    """Examples per batch. Our choice."""
    validation: float = _field(0.15, within="[0, 1)", static=True)
    """Share of the examples kept for validation. The usual 70/15/15. Static: it sets array shapes."""
    test: float = _field(0.15, within="[0, 1)", static=True)
    """Share kept for the test, where the data have no test set of their own. Static like validation."""
    normalize: str = _field("standard", options="gradjax.tasks:NORMALIZE")
    """standard: mean 0, variance 1 over the training split (mean field's q_0 is 1); none: within [0, 1]."""
    seq_len: int = _field(100, within="[1, 1000000]")
    """Steps of the generated sequences, blanks of copy memory; unused by images."""
    augment: str = _field("none", options="gradjax.tasks:AUGMENT")
    """How the images of a training batch are varied: none, rotate, crop, flip; an unknown name lists them."""


@dataclass(frozen=True)
class Optimizer:
    """One chain: guard, clipping, optimiser, regularisation, schedule; see gradjax.optimizers."""

    name: str = _field("adam", options="gradjax.optimizers:OPTIMIZERS")
    """Optimiser; an unknown name lists them."""
    learning_rate: float = _field(1e-3, within="[0, 1e18]")
    """Peak of the schedule. Default: Adam's (Kingma 2015)."""
    momentum: float | None = _field(None, within="[0, 1)")
    """Momentum, b1 of Adam's kind; None: the optimiser's own, which is .9 (muon .95). "sgd" has none."""
    b2: float | None = _field(None, within="[0, 1)")
    """Decay of the squares; None: the optimiser's own (adam .999, lion .99, rmsprop and adadelta .9)."""
    schedule: str = _field("constant", options="gradjax.optimizers:SCHEDULES")
    """constant, cosine, exponential, step, plateau or growth_limited; an unknown name lists them."""
    warmup: float = _field(0.0, within="[0, 1)")
    """Share of the steps in which the rate rises linearly from 0 (Goyal 2017)."""
    decay: float = _field(0.1, within="[0, 1]")
    """Last rate over the peak of cosine and exponential; factor per reduction of step and plateau."""
    clipping: str = _field("none", options="gradjax.optimizers:CLIPPING")
    """Rule for the gradient (of L-BFGS for its direction); an unknown name lists them."""
    max_norm: float = _field(1.0, within="[0, 1e38]")
    """Threshold of the clipping rule, whatever it calls it; autoclip, historical_clip and zclip have none. Default:
    Pascanu 2013's order of magnitude."""
    guard: str = _field("none", options="gradjax.optimizers:GUARDS")
    """What is done about non-finite or spiking gradients; an unknown name lists them. Without one a seed is lost at its
    first such step, with one after 20 in a row."""
    weight_decay: float | None = _field(None, within="[0, 1e18]")
    """Decoupled decay of the weights, times the rate (Loshchilov 2019); None: none."""
    l2: float | None = _field(None, within="[0, 1e18]")
    """Coupled: l2 times the weights is added to the gradient; None: none."""
    l1: float | None = _field(None, within="[0, 1e18]")
    """Coupled: l1 times the signs of the weights is added to the gradient; None: none."""
    weight_clip: float | None = _field(None, within="[0, 1e38]")
    """Bound on every weight after each step (Arjovsky 2017); None: none."""
    weight_norm: float | None = _field(None, within="[0, 1e38]")
    """Bound on the norm of a unit's incoming weights after each step (Srivastava 2014); None: none."""
    block: str = _field("layer", options=("layer", "coordinate"))
    """What coordinate descent moves at a time."""
    order: str = _field("cyclic", options=("cyclic", "random"))
    """In which order coordinate descent takes its blocks (Nesterov 2012: random)."""


@dataclass(frozen=True)
class Train:
    """How long, over how many seeds, and what becomes of it."""

    num_steps: int = _field(1000, within="[1, 1000000000]")
    """Training steps."""
    num_seeds: int = _field(1, within="[1, 1000000]")
    """Initialisations, each with its own order of batches, trained side by side."""
    eval_every: int = _field(100, within="[1, 1000000000]")
    """Steps of one compiled chunk; after each, validation, signals per layer, and maybe a checkpoint."""
    target: float = _field(0.9, within="[-1e38, 1]", static=True)
    """Validation score (accuracy, or R^2 of a regression) at which a seed counts as trained."""
    stop_at_target: bool = False
    """Whether a seed rests once its validation score has reached the target."""
    max_loss: float = _field(1e30, within="[-1e38, 1e38]")
    """A seed whose loss is above it has diverged. Default: only inf, NaN and what is about to be."""
    pretrain: str = _field("none", options="gradjax.pretraining:METHODS")
    """Greedy training, layer by layer, before the labels are used: rbm (Hinton 2006), autoencoder (Vincent 2008)."""
    pretrain_steps: int = _field(200, within="[1, 1000000000]")
    """Steps per layer of the pre-training. Our choice: some 10 epochs of the digits."""
    pretrain_rate: float = _field(0.1, within="[0, 1e18]")
    """Learning rate of the pre-training (Hinton 2010's practical guide, section 7: 0.1 for binary units)."""
    full_batch: bool = False
    """The whole training split at every step (L-BFGS needs it) instead of batches."""
    lanes: int = _field(0, within="[0, 1000000]")
    """Members in one vmap; 0: a rule chooses. Results depend on it in their last bits, so it is recorded."""
    shard: str = _field("members", options=("members", "batch"))
    """What is spread over the devices: members, or (data parallel) the batch of every member."""
    checkpoint_seconds: float = _field(30.0, within="[0, 1e9]", static=True)
    """Least time between two checkpoints of a block of members; 0: after every chunk."""


@dataclass(frozen=True)
class Diagnose:
    """What `gradjax diagnose` measures."""

    num_seeds: int = _field(8, within="[1, 1000000]")
    """Initialisations; numbers are medians over them. With 8 a median varies half as much as one seed."""
    spectrum_seeds: int = _field(4, within="[0, 1000000]")
    """Seeds (the first ones, or all) whose spectra are computed. Our choice: O(depth * width^3) each."""


@dataclass(frozen=True)
class Experiment:
    """One experiment; CONFIG sets these values, and a flag here overrides it."""

    name: str = _field("experiment", pattern=r"\w[\w.-]{0,59}", words="up to 60 letters, digits, _ - .")
    """The run's folder: OUTPUT/NAME, then OUTPUT/NAME-2."""
    seed: int = _field(0, within="[0, 4294967295]")
    """Seed of everything random: data split, initialisations."""
    output: str = _field("runs", pattern=r"[^\0\ud800-\udfff]+", words="a folder")
    """Folder of the runs."""
    model: Model = Model()
    """The network."""
    task: Task = Task()
    """The data."""
    optimizer: Optimizer = Optimizer()
    """How the parameters are moved."""
    train: Train = Train()
    """How long it is trained."""
    diagnose: Diagnose = Diagnose()
    """What is measured."""


@dataclass(frozen=True)
class Command:
    """Arguments of a command line beside the experiment's; a subclass adds its own flags.

    Fields are str or bool; one without default is positional.
    """

    config: str
    """TOML file of the experiment; see configs/."""


C = TypeVar("C", bound=Command)
_TABLES: dict[str, type] = {
    "model": Model,
    "task": Task,
    "optimizer": Optimizer,
    "train": Train,
    "diagnose": Diagnose,
}
_FIELDS = {f.name: f for f in dataclasses.fields(Experiment) if f.name not in _TABLES}
_FIELDS |= {f"{table}.{f.name}": f for table, cls in _TABLES.items() for f in dataclasses.fields(cls)}
_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
_ACCEPTED = {int: numbers.Integral, float: numbers.Real, bool: bool, str: str}  # NumPy's scalars too


# -- the validator ---------------------------------------------------------------------------------------


def check(experiment: Experiment, origins: Mapping[str, str] | None = None) -> None:
    """Raises `ConfigError` with every value of the wrong type, out of range or of unknown name.

    A host function: call it before tracing. `origins` says of a dotted key where its value came from.
    """
    origins = origins or {}
    _refuse(_problem(key, _FIELDS[key], v, origins.get(key, "")) for key, v in flatten(experiment).items())
    task, norm, problems = experiment.task, experiment.model.normalization, []
    for name in _unused(experiment.model):
        key = f"model.{name}"
        value = f"{_show(getattr(experiment.model, name))}{origins.get(key, '')}"
        problems += [f"config: {key} = {value} means nothing to model.name = {experiment.model.name!r}; leave it out"]
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
    """What the architecture, the pre-training and the optimiser say of settings that exclude each other."""
    reasons = [importlib.import_module("gradjax.models").refuses(experiment.model)]
    reasons += [importlib.import_module("gradjax.pretraining").refuses(experiment)]
    return reasons + importlib.import_module("gradjax.optimizers").refuses(experiment.optimizer)


def _unused(model: Model) -> list[str]:
    """What the architecture does not take; looked up as late as the options."""
    return importlib.import_module("gradjax.models").unused(model)


def _refuse(problems: Iterable[str]) -> None:
    if found := [problem for problem in problems if problem]:
        raise ConfigError("\n".join(found))


def _problem(key: str, field: dataclasses.Field, value: Any, origin: str, only_type: bool = False) -> str:
    """The message about a value that its field does not allow; empty when it does."""
    kind, rule, wrong = _kind(field), field.metadata, ""
    allowed, typed = _KINDS[kind], _typed(field, value)
    if (value is None and field.default is None) or (typed is not None and (only_type or not rule)):
        return ""
    if "options" in rule:
        names = _options(rule["options"])
        allowed = ", ".join(names)
        wrong = "" if typed in names else f"is unknown{nearest(str(value).lower(), {n: n for n in names})}"
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
    """`value` as its field's type; None where that would be a guess: 10.5, "10" and true are no integers."""
    kind = _kind(field)
    if not isinstance(value, _ACCEPTED[kind]) or isinstance(value, bool) != (kind is bool):
        return None
    try:
        return kind(value)
    except OverflowError:  # an integer beyond every float
        return None


def _kind(field: dataclasses.Field) -> type:
    return next(kind for kind in _KINDS if field.type in (kind, kind | None))


def _options(options: tuple[str, ...] | str) -> tuple[str, ...]:
    """`module:NAMES` is looked up only now, because `import` and `--help` need no jax."""
    if isinstance(options, tuple):
        return options
    module, _, names = options.partition(":")
    return tuple(getattr(importlib.import_module(module), names))


def nearest(word: str, names: Mapping[str, str]) -> str:
    """` (did you mean 'model.depth'?)` for the name whose word is nearest; empty when none is near."""
    score = {name: difflib.SequenceMatcher(None, word, other).ratio() for name, other in names.items()}
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
    return {key: functools.reduce(getattr, key.split("."), experiment) for key in _FIELDS}


def sweepable() -> list[str]:
    """The dotted names of every float that is not static, those included that are None by default."""
    return [key for key, field in _FIELDS.items() if _traceable(field)]


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
        if key not in _FIELDS:
            problems.append(_unknown(key, value, origin))
        elif not (_traceable(_FIELDS[key]) and hasattr(value, "aval")):  # else an array or tracer of JAX
            problems.append(_problem(key, _FIELDS[key], value, origin, only_type=True))
            value = _typed(_FIELDS[key], value)
        groups.setdefault(table, {})[name] = value
    _refuse(problems)
    top = groups.pop("", {})
    tables = {t: dataclasses.replace(getattr(experiment, t), **values) for t, values in groups.items()}
    return dataclasses.replace(experiment, **top, **tables)


def _unknown(key: str, value: Any, origin: str, own: Iterable[str] = ()) -> str:
    """The message about a key that is no setting (`own`: flags of the command that would be none too)."""
    table, _, word = key.rpartition(".")
    tables = f"tables: {', '.join(_TABLES)}"
    if key in _TABLES:
        return f"config: {key} = {_show(value)}{origin} is not a table; allowed: keys of [{key}]"
    if isinstance(value, Mapping):
        return f"config: unknown table [{key}]{origin}{nearest(key, {t: t for t in _TABLES})}; {tables}"
    last = {k: k.rpartition(".")[2] for k in (*_FIELDS, *own)}
    keys = ", ".join(w for k, w in last.items() if k.rpartition(".")[0] == table)
    inside = f"keys of [{table}]: {keys}" if table in _TABLES else f"keys: {keys}; " * (not table) + tables
    # The last part decides, `--depth` means `--model.depth`; the key's own table comes first in a tie.
    near = nearest(word, dict(sorted(last.items(), key=lambda item: item[0].rpartition(".")[0] != table)))
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
            lines += [f"{name} = " + json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")]
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
    """`[sweep.vmap]` and `[sweep.static]` of a TOML file as they stand there, for `gradjax.grid`; empty if absent.

    Raises: `ConfigError` for any other key of `[sweep]`.
    """
    table = _read(str(path)).get("sweep", {})
    if not isinstance(table, Mapping) or not all(isinstance(table[key], Mapping) for key in table):
        raise ConfigError(f"config: sweep in {path} has to hold tables; allowed: [sweep.vmap], [sweep.static]")
    for key in table:
        if key not in ("vmap", "static"):
            near = nearest(key, {"vmap": "vmap", "static": "static"})
            raise ConfigError(f"config: unknown table [sweep.{key}] in {path}{near}; allowed: vmap, static")
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
        came = f"unexpected argument {_show(words[-1])}" if len(words) > len(needed) else "too few arguments"
        raise ConfigError(f"config: {came}; needed: {' '.join(needed).upper()} [--flags], see --help")
    mine = {name: flags.pop(name) for name in own if name in flags}
    _refuse(_problem(name, own[name], *given) for name, given in mine.items())
    options = command(**dict(zip(needed, words, strict=True)), **{k: value for k, (value, _) in mine.items()})
    return _checked(_dotted(_without_sweep(options.config), f" in {options.config}"), flags), options


def _flags(args: Sequence[str], own: Mapping[str, Any]) -> tuple[dict[str, tuple[Any, str]], list[str]]:
    """The flags by dotted key (the last one wins) with value and origin, and the words that are none."""
    fields, flags, rest, words, origin = {**_FIELDS, **own}, {}, [], list(args), " on the command line"
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            rest.append(word)
            continue
        name, equals, text = word.partition("=")
        key = name[2:].replace("-", "_") if name.startswith("--") else name
        positive = re.sub(r"(^|\.)no_(?=\w+$)", r"\1", key)  # --model.no_residual
        if key not in fields and positive in fields and _kind(fields[positive]) is bool and not equals:
            flags[positive] = False, origin
            continue
        if key not in fields:
            raise ConfigError(_unknown(name.removeprefix("--"), text, origin, own))
        if not equals:
            following = words[0] if words else "--"
            if _kind(fields[key]) is bool and following.lower() not in ("true", "false"):
                text = "true"
            elif following.startswith("--"):
                raise ConfigError(f"config: flag {name} needs {_KINDS[_kind(fields[key])]} after it")
            else:
                text = words.pop(0)
        flags[key] = _meaning(fields[key], text), origin
    return flags, rest


def _meaning(field: dataclasses.Field, text: str) -> Any:
    """The value that a flag's text means; the text itself where it means none, to be refused as such."""
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
        inside = table in _TABLES and isinstance(value, Mapping)
        for key, v in value.items() if inside else [(table, value)]:
            key = key if re.fullmatch(r"[\w-]+", str(key)) else repr(key)  # quoted: "model.depth" = 1
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
    raise ConfigError(f"config: {_show(name)} {wrong}{near}; needed: a TOML file such as configs/demo.toml")


def _checked(*layers: Mapping[str, tuple[Any, str]]) -> Experiment:
    """The defaults with each layer over the one before; also what is overridden must be of its type."""
    experiment = functools.reduce(_merge, layers, Experiment())
    check(experiment, {key: origin for layer in layers for key, (_, origin) in layer.items()})
    return experiment


def help_text(prog: str, command: type[Command] = Command, text: str = "") -> str:
    """The text of `PROG --help`: `text`, the fields with their docstrings (by tyro), examples."""
    import tyro

    experiment = Annotated[Experiment, tyro.conf.arg(name="")]  # --model.depth, not --experiment.model.depth
    groups = [("command", tyro.conf.OmitArgPrefixes[command]), ("experiment", experiment)]
    conf = (tyro.conf.PositionalRequiredArgs, tyro.conf.PositionalMetavarFromFieldName)
    whole = dataclasses.make_dataclass("whole", groups)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        tyro.cli(whole, args=["--help"], prog=prog, description=text, use_underscores=True, config=conf)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    examples = ("", " --model.depth 200 --model.sigma_w=1.5", " --task.name mnist --model.residual")
    lines += ["Flags win over CONFIG, and CONFIG over the defaults above.", "", "examples:"]
    return "\n".join([*lines, *(f"  {prog} configs/demo.toml{flags}" for flags in examples), ""])
