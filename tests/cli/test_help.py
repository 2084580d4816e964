"""The help text: it names every flag with its docstring, and needs no jax."""

import dataclasses
import re
import subprocess
import sys

import pytest

from gradjax.cli.help import field_docs, help_text
from gradjax.cli.main import COMMANDS
from gradjax.experiment import config
from gradjax.experiment.schema import TABLES, Command, Experiment


@dataclasses.dataclass(frozen=True)
class Options(Command):
    """Measures."""

    json: bool = False
    """One JSON object."""
    figure: str | None = None
    """Where the figure goes."""


def test_help_names_every_flag_and_every_flag_it_names_is_read(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text("")
    text = help_text("gradjax diagnose", Options)
    flags = set(re.findall(r"(?<=[ ,])--[a-z][\w.]*", text.partition("examples:")[0]))
    # The command line takes it out before the flags are read.
    flags.remove("--no_cache")
    assert {f"--{key}" for key in config.flatten(Experiment())} <= flags
    assert "CONFIG" in text and "Measures." in text and "Var W = sigma_w^2 / fan_in" in text
    assert "(default: 1.32701)" in text and max(map(len, text.splitlines())) <= 100
    for flag in sorted(flags):
        key = flag[2:].replace("no_", "")
        value = config.flatten(Experiment()).get(key, True)
        given = [flag] if isinstance(value, bool) and key != "figure" else [flag, str(value)]
        if key in ("model.fixup", "model.residual_learned"):
            given.append("--model.residual")
        config.parse([str(path), *given], Options)


@pytest.mark.parametrize(
    "cls", [Experiment, Command, *TABLES.values(), *(command for command, _ in COMMANDS.values())]
)
def test_every_field_is_documented(cls):
    for base in cls.__mro__[:-1]:
        own = {name for name in base.__annotations__ if name not in TABLES}
        assert own <= set(field_docs(base))


def test_help_needs_no_jax():
    code = (
        "from gradjax.cli.help import help_text; import sys; help_text('x'); "
        "print('jax' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False"]
