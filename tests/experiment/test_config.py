"""Files and flags: what is read back is what was written, and nothing else is accepted."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradjax.core.activations import ACTIVATIONS
from gradjax.experiment import config, grid
from gradjax.experiment.schema import ConfigError, Diagnose, Experiment, Model, Task
from support import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


@dataclasses.dataclass(frozen=True)
class Options(config.Command):
    """A command with flags of its own."""

    json: bool = False
    """One JSON object."""
    figure: str | None = None
    """Where the figure goes."""


@pytest.fixture
def toml(tmp_path):
    def write(text, name="x.toml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


# What is written is read back

floats = st.floats(0, 1e18) | st.integers(0, 10).map(float)
ints = st.integers(1, 10**6)
experiments = st.builds(
    Experiment,
    name=st.from_regex(r"\A\w[\w.-]{0,20}\Z"),
    seed=st.integers(0, 2**32 - 1),
    output=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
    model=st.builds(
        Model,
        depth=ints,
        width=ints,
        activation=st.sampled_from(sorted(ACTIVATIONS)),
        sigma_w=floats,
        sigma_b=floats,
        weights=st.sampled_from(["gaussian", "orthogonal"]),
        residual=st.booleans(),
        residual_scale=floats,
        normalization=st.sampled_from(["none", "layernorm", "batchnorm"]),
        dropout=st.none() | st.floats(0, 1, exclude_max=True),
    ),
    task=st.builds(
        Task,
        name=st.sampled_from(["digits", "mnist", "fashion_mnist"]),
        batch_size=st.integers(2, 1000),
        validation=st.floats(0, 0.49),
        test=st.floats(0, 0.5),
        normalize=st.sampled_from(["standard", "none"]),
    ),
    diagnose=st.builds(Diagnose, num_seeds=ints, spectrum_seeds=ints),
)


@given(experiments)
def test_toml_and_dict_and_flags_round_trip(tmp_path_factory, experiment):
    path = tmp_path_factory.getbasetemp() / "round_trip.toml"
    path.write_bytes(config.to_toml(experiment).encode())
    assert config.load(path) == experiment
    assert config.from_dict(config.to_dict(experiment)) == experiment
    assert config.replace(Experiment(), config.flatten(experiment)) == experiment
    path.write_bytes(b"")
    flags = [f"--{key}={value}" for key, value in config.flatten(experiment).items()]
    assert config.load(path, flags) == experiment


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_load_under_their_own_name_and_say_how_they_run(path):
    experiment = config.load(path)
    config.check(experiment)
    assert experiment.name == path.stem
    text = path.read_text()
    assert text.startswith("# ") and re.search(
        rf"gradjax (diagnose|train|sweep) configs/{path.name}", text
    )
    grid.grid(experiment, *config.sweep_tables(path))


def test_the_three_phases_differ_only_in_sigma_w():
    demo, healthy, vanishing = (
        config.load(CONFIGS[0].with_name(f"{name}.toml"))
        for name in ("demo", "healthy", "vanishing")
    )
    assert demo.model.sigma_w > healthy.model.sigma_w > vanishing.model.sigma_w
    for twin in (healthy, vanishing):
        assert config.replace(twin, {"name": "demo", "model.sigma_w": demo.model.sigma_w}) == demo


# Who wins


def test_flags_over_file_over_defaults(toml):
    path = toml("[model]\ndepth = 7\nwidth = 9\n")
    experiment = config.load(path, ["--model.depth", "11", "--model.depth=12", "--seed", "3"])
    assert (experiment.model.depth, experiment.model.width, experiment.seed) == (12, 9, 3)
    assert experiment.task == Task()


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        (["--task.batch_size", "3"], "task.batch_size", 3),
        (["--task.batch-size=3"], "task.batch_size", 3),
        (["--model.sigma-w", "2"], "model.sigma_w", 2.0),
        (["--model.residual"], "model.residual", True),
        (["--model.residual", "--seed", "1"], "model.residual", True),
        (["--model.residual", "true"], "model.residual", True),
        (["--model.residual", "--model.no-residual"], "model.residual", False),
        (["--model.residual", "--model.no_residual"], "model.residual", False),
        (["--model.residual=False"], "model.residual", False),
        (["--model.dropout", "0"], "model.dropout", 0.0),
        (["--model.dropout=0.5", "--model.dropout", "none"], "model.dropout", None),
        (["--output=--odd"], "output", "--odd"),
    ],
)
def test_spellings_of_a_flag(toml, flags, key, value):
    got = config.flatten(config.load(toml(""), flags))[key]
    assert got == value and type(got) is type(value)


def test_a_command_has_arguments_of_its_own(toml):
    path = str(toml("seed = 5"))
    experiment, options = config.parse(["--json", path, "--model.depth", "3"], Options)
    assert options == Options(path, json=True) and (experiment.seed, experiment.model.depth) == (
        5,
        3,
    )
    assert config.parse([path, "--figure", "a.png"], Options)[1].figure == "a.png"
    assert config.parse([path])[1] == config.Command(path)


# What is refused, and in which words

KEYS = "keys of [model]: name, depth, width"
DEPTH = "allowed: an integer in [1, 1000000]"
BAD_TOML = {
    "[model]\ndept = 1": ["unknown key 'model.dept' in X", "(did you mean 'model.depth'?)", KEYS],
    "depth = 1": [
        "unknown key 'depth' in X",
        "(did you mean 'model.depth'?)",
        "keys: name, seed, output",
    ],
    "[task]\ndepth = 1": [
        "'task.depth'",
        "(did you mean 'model.depth'?)",
        "keys of [task]: name, batch",
    ],
    "[modle]\ndepth = 1": [
        "unknown table [modle] in X (did you mean 'model'?)",
        "tables: model, task",
    ],
    "[modle]": ["unknown table [modle] in X"],
    '"model.depth" = 1': ["unknown key", "model.depth"],
    "model = 3": ["model = 3 in X is not a table", "keys of [model]"],
    "[[model]]\ndepth = 1": ["model = [{'depth': 1}] in X is not a table"],
    "[model.depth]": ["model.depth = {} in X is not an integer", DEPTH],
    "[model]\ndepth = '10'": ["model.depth = '10' in X is not an integer", DEPTH],
    "[model]\ndepth = 10.5": ["model.depth = 10.5 in X is not an integer", DEPTH],
    "[model]\ndepth = 10.0": ["model.depth = 10.0 in X is not an integer", DEPTH],
    "[model]\ndepth = true": ["model.depth = true in X is not an integer", DEPTH],
    "[model]\ndepth = 0": ["model.depth = 0 in X is out of range", DEPTH],
    "[model]\nresidual = 1": [
        "model.residual = 1 in X is not true or false",
        "allowed: true or false",
    ],
    "[model]\nsigma_w = 'a'": ["model.sigma_w = 'a' in X is not a number", "a number in [0, 1e18]"],
    "[model]\nsigma_w = true": ["model.sigma_w = true in X is not a number"],
    "[model]\nsigma_w = -1": ["model.sigma_w = -1.0 in X is out of range", "a number in [0, 1e18]"],
    "[model]\nsigma_w = nan": ["model.sigma_w = nan in X is out of range"],
    "[model]\nsigma_w = inf": ["model.sigma_w = inf in X is out of range"],
    "[model]\nsigma_w = 1" + "0" * 400: ["model.sigma_w = 1000", "is not a number"],
    "[model]\ndropout = 1.0": ["model.dropout = 1.0 in X is out of range", "a number in [0, 1)"],
    "[model]\nname = 'mpl'": [
        "model.name = 'mpl' in X is unknown (did you mean 'mlp'?)",
        "allowed: mlp",
    ],
    "[model]\nactivation = 'tahn'": [
        "model.activation = 'tahn' in X",
        "did you mean 'tanh'?",
        "relu",
    ],
    "[model]\nactivation = 'ReLU'": ["(did you mean 'relu'?)"],
    "[model]\nweights = 'gauss'": ["(did you mean 'gaussian'?)", "allowed: gaussian, orthogonal"],
    "[model]\nnormalization = 'batch_norm'": [
        "(did you mean 'batchnorm'?)",
        "none, batchnorm, layernorm",
    ],
    "[task]\nname = 'minst'": ["task.name = 'minst' in X", "(did you mean 'mnist'?)", "digits"],
    "[task]\nnormalize = 'standart'": ["(did you mean 'standard'?)", "allowed: standard, none"],
    "[task]\nvalidation = 0.5\ntest = 0.5": [
        "task.validation = 0.5",
        "task.test = 0.5",
        "a sum below 1",
    ],
    "[task]\nbatch_size = 1\n[model]\nnormalization = 'batchnorm'": [
        "task.batch_size = 1",
        "from 2",
    ],
    "name = 3": ["name = 3 in X is not a string"],
    "name = '../up'": ["name = '../up' in X is not a usable name", "letters, digits"],
    "output = ''": ["output = '' in X is not a usable name"],
    "seed = -1": ["seed = -1 in X is out of range", "an integer in [0, 4294967295]"],
    "seed = 1979-05-27": ["seed = datetime.date(1979, 5, 27) in X is not an integer"],
    "seed = 1\nseed = = 2": ["X' is not valid TOML", "at line 2"],
    "seed = 1" + "0" * 5000: ["X' is not valid TOML", "4300 digits"],
    "seed = 0x1" + "0" * 5000: ["seed = 0x1000", "in X is out of range"],
    '["mo\\ndel"]': [r"unknown table ['mo\ndel'] in X"],
    "a = " + "[" * 100_000: ["X' is not valid TOML", "nested too deeply"],
    b"\xff\xfe": ["X' is not UTF-8 (byte 0)"],
}
BAD_FLAGS = {
    "--model.dept 10": [
        "unknown key 'model.dept' on the command line (did you mean 'model.depth'?)",
        KEYS,
    ],
    "--model.dept=10": ["unknown key 'model.dept'"],
    "--modle.depth 1": [
        "unknown key 'modle.depth'",
        "(did you mean 'model.depth'?)",
        "tables: model, task",
    ],
    "--depth 1": ["unknown key 'depth'", "(did you mean 'model.depth'?)"],
    "--model.no-depth": ["unknown key 'model.no-depth'", "(did you mean 'model.depth'?)"],
    "--model 3": ["model = '' on the command line is not a table"],
    "-x": ["unknown key '-x'"],
    "--": ["unknown key ''"],
    "--model.depth": ["flag --model.depth needs an integer"],
    "--model.depth --seed 1": ["flag --model.depth needs an integer"],
    "--model.depth ten": ["model.depth = 'ten' on the command line is not an integer", DEPTH],
    "--model.depth 10.5": ["model.depth = '10.5' on the command line is not an integer", DEPTH],
    "--model.depth True": ["model.depth = 'True' on the command line is not an integer"],
    "--model.depth none": ["model.depth = 'none' on the command line is not an integer"],
    "--model.depth -1": ["model.depth = -1 on the command line is out of range", DEPTH],
    "--model.sigma-w nan": ["model.sigma_w = nan on the command line is out of range"],
    "--model.residual=1": ["model.residual = '1' on the command line is not true or false"],
    "--model.residual 1": ["unexpected argument '1'"],
    "--model.activation tahn": [
        "model.activation = 'tahn' on the command line",
        "(did you mean 'tanh'?)",
    ],
    "extra": ["unexpected argument 'extra'"],
}


def refusal(call, *args):
    with pytest.raises(ConfigError) as caught:
        call(*args)
    text = str(caught.value)
    assert text.startswith("config: ") and (
        "allowed" in text or "need" in text or "keys" in text or "tables" in text
    )
    return text


@pytest.mark.parametrize("text", BAD_TOML, ids=lambda t: str(t[:40]))
def test_a_bad_file_is_refused(toml, text):
    path = toml(text)
    message = refusal(config.load, path).replace(str(path), "X")
    assert "\n" not in message
    for part in BAD_TOML[text]:
        assert part in message


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_bad_flag_is_refused(toml, flags):
    message = refusal(config.load, toml(""), flags.split())
    assert "\n" not in message
    for part in BAD_FLAGS[flags]:
        assert part in message


def test_every_problem_is_reported_at_once(toml):
    lines = refusal(config.load, toml("[model]\ndepth = 0\nsigma_w = nan\nactivation = 'x'")).split(
        "\n"
    )
    assert [re.split(r"[ =]+", line)[1] for line in lines] == [
        "model.depth",
        "model.activation",
        "model.sigma_w",
    ]


def test_a_flag_does_not_hide_a_broken_file(toml):
    assert "model.depth = 'ten' in" in refusal(
        config.load, toml("[model]\ndepth = 'ten'"), ["--model.depth=1"]
    )


def test_a_file_that_cannot_be_read(toml, tmp_path):
    path = toml("", "demo.toml")
    assert f"(did you mean {str(path)!r}?)" in refusal(config.load, tmp_path / "dem.toml")
    assert "does not exist" in refusal(config.load, tmp_path / "no" / "where.toml")
    assert "is a directory" in refusal(config.load, tmp_path)
    assert "needed: a TOML file" in refusal(config.load, "a" * 5000)
    assert "needed: a TOML file" in refusal(config.load, "\0")
    assert config.load(toml(b"\xef\xbb\xbfseed = 1")).seed == 1  # as Windows' editors save it


def test_a_bad_command_line(toml):
    path = str(toml(""))
    assert "too few arguments; needed: CONFIG" in refusal(config.parse, [])
    assert "unexpected argument 'b'" in refusal(config.parse, [path, "b"])
    assert "unknown key 'jsn' on the command line (did you mean 'json'?)" in refusal(
        config.parse, [path, "--jsn"], Options
    )
    assert "json = 'maybe' on the command line is not true or false" in refusal(
        config.parse, [path, "--json=maybe"], Options
    )


def test_from_dict_is_as_strict():
    assert "did you mean 'model.depth'" in refusal(config.from_dict, {"model": {"dept": 1}})
    assert "unknown table [modle]" in refusal(config.from_dict, {"modle": {}})
    assert "model.depth = 0 is out of range" in refusal(config.from_dict, {"model": {"depth": 0}})
    assert "model.depth = None is not an integer" in refusal(
        config.from_dict, {"model": {"depth": None}}
    )
    assert "unknown key '3'" in refusal(config.from_dict, {3: 1})
    model = config.from_dict({"model": {"depth": np.int64(3), "sigma_w": np.float32(0.5)}}).model
    assert type(model.depth) is int and type(model.sigma_w) is float
