"""The text of `gradjax COMMAND --help`, from the dataclasses and the docstrings of their fields.

Imports no jax.
"""

import ast
import dataclasses
import inspect
import itertools
import textwrap
from collections.abc import Iterator

from gradjax.experiment.schema import TABLES, Command, Experiment
from gradjax.experiment.validator import kind_of

_INDENT = 28
_EXAMPLES = ("", " --model.depth 200 --model.sigma_w=1.5", " --task.name mnist --model.residual")


def field_docs(cls: type) -> dict[str, str]:
    """Field -> the string below it in the source, on one line."""
    (body,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for field, below in itertools.pairwise(body.body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            docs[ast.unparse(field.target)] = " ".join(ast.literal_eval(below.value).split())
    return docs


def _describe_fields(cls: type, prefix: str = "") -> Iterator[str]:
    """The lines of a dataclass's flags; a field that is a table is left out."""
    docs = {}
    for base in reversed(cls.__mro__[:-1]):
        docs |= field_docs(base)
    for field in dataclasses.fields(cls):
        if field.name in TABLES:
            continue
        name, text = f"--{prefix}{field.name}", docs[field.name]
        kind = kind_of(field)
        if field.default is dataclasses.MISSING:
            name = field.name.upper()
        else:
            text += f" (default: {field.default})"
            name += f", --{prefix}no_{field.name}" if kind is bool else f" {kind.__name__.upper()}"
        yield from _entry(name, text)


def _entry(name: str, text: str) -> list[str]:
    """A name with its text in a second column, below it if the name is long."""
    lines = textwrap.wrap(text, 100, initial_indent=" " * _INDENT, subsequent_indent=" " * _INDENT)
    if len(name) + 4 > _INDENT:
        return [f"  {name}", *lines]
    return [f"  {name:{_INDENT - 2}}{lines[0].lstrip()}", *lines[1:]]


def help_text(prog: str, command: type[Command] = Command, text: str = "") -> str:
    """Usage, `text`, every flag with its docstring and default, and examples.

    Args:
      prog: such as `gradjax train`.
      command: the dataclass of the command's own arguments.
      text: what the command does; default: the docstring of `command`.
    """
    text = text or inspect.cleandoc(command.__doc__ or "")
    lines = [f"usage: {prog} CONFIG [--flags]", "", text, "", *_describe_fields(command)]
    lines += _entry("--no_cache", "Do not keep compiled programs in the user's cache folder.")
    lines += ["", inspect.cleandoc(Experiment.__doc__ or ""), "", *_describe_fields(Experiment)]
    for table, cls in TABLES.items():
        lines += ["", f"{table}: {inspect.cleandoc(cls.__doc__ or '')}", ""]
        lines += _describe_fields(cls, f"{table}.")
    lines += [
        "",
        "Flags override CONFIG, and CONFIG overrides the defaults above.",
        "",
        "examples:",
    ]
    lines += [f"  {prog} configs/demo.toml{flags}" for flags in _EXAMPLES]
    return "\n".join(lines) + "\n"
