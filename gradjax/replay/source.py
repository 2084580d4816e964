"""Where an equation was written: the user's file, line and columns, and the module around it.

The frames of JAX, Flax, Optax and of every other installed package are left out, and so are our
own, as long as another one remains. An equation inside a jitted function or a loop has its own
frames up to the border of that function; the equations around it have the others.
"""

import functools
import itertools
import linecache
import os
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from gradjax.taps.jaxprs import frames, scopes
from gradjax.taps.names import SCOPE

_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
# The part of gradjax whose models are a user's as much as ours.
_LABORATORY = os.path.join(_OWN, "experiment", "models") + os.sep
_INSTALLED = tuple(
    os.path.abspath(sysconfig.get_path(name)) + os.sep for name in ("purelib", "platlib", "stdlib")
)
_FRAMEWORKS = ("flax", "optax", "equinox", "haiku", "chex")
_ENGINES = ("jax", "jaxlib", "numpy")
_SITE = {"site-packages", "dist-packages"}
# Frames beyond these files are those of whoever called us.
_TRACING = {os.path.join(_OWN, *path) for path in (("taps", "probe.py"), ("replay", "gradient.py"))}


class Line(NamedTuple):
    """A place in a source file.

    Attributes:
      file: its path.
      line: number of the line, from 1.
      end_line: number of the last line of the expression.
      column: where the expression starts in `line`, from 0; -1 if unknown.
      end_column: where it ends in `end_line`.
      function: name of the function around it.
    """

    file: str
    line: int
    end_line: int
    column: int
    end_column: int
    function: str

    @property
    def text(self) -> str:
        """The line, "" if the source is not at hand."""
        return linecache.getline(self.file, self.line).rstrip("\n")

    def __str__(self) -> str:
        return f"{_short(self.file)}:{self.line}"


def _short(file: str) -> str:
    """A path as one would type it: relative if it lies below the current folder."""
    try:
        relative = os.path.relpath(file)
    except ValueError:
        return file
    return file if relative.startswith("..") or file.startswith("<") else relative


@functools.cache
def _rank(file: str) -> int:
    """0 for a user's file, 1 for an installed package, 2 for a framework, 3 for JAX and our own."""
    if file.startswith("<frozen"):
        return 3
    path = os.path.abspath(file)
    if path.startswith(_OWN):
        return 1 if path.startswith(_LABORATORY) else 3
    for rank, names in ((3, _ENGINES), (2, _FRAMEWORKS)):
        if any(path.startswith(folder) for folder in map(_folder_of, names) if folder):
            return rank
    is_installed = any(path.startswith(folder) for folder in _INSTALLED)
    return 1 if is_installed or _SITE.intersection(path.split(os.sep)) else 0


def _folder_of(package: str) -> str:
    """The folder of an imported package, "" if it is not imported."""
    file = getattr(sys.modules.get(package), "__file__", None)
    return os.path.dirname(os.path.abspath(file)) + os.sep if file else ""


def _line(code: Any, instruction: int) -> Line:
    positions = list(code.co_positions())
    k = instruction // 2
    first, last, column, end = positions[k] if k < len(positions) else (None,) * 4
    line = first or code.co_firstlineno
    return Line(
        code.co_filename,
        line,
        last or line,
        -1 if column is None else column,
        -1 if end is None else end,
        code.co_name,
    )


def lines(eqns: Sequence[Any]) -> tuple[Line, ...]:
    """The user's lines that led to an equation, the innermost first.

    Args:
      eqns: the equations around it, the outermost first, and the equation itself.
    """
    found: list[tuple[Any, int]] = []
    for eqn in reversed(eqns):
        found += _own_frames(eqn)
        for name in reversed(scopes(eqn)):
            found += _calls.get(name, ())
    for rank in range(4):
        chosen = [frame for frame in found if _rank(frame[0].co_filename) <= rank]
        if chosen:
            return tuple(dict.fromkeys(_line(*frame) for frame in chosen))
    return ()


# Begins the scope that stands for the call of a function with a rule of its own.
_CALL = "call:"
# Scope -> frames of the call, the last ones only: code objects and numbers, no program is kept.
_calls: dict[str, list[tuple[Any, int]]] = {}
_MOST_CALLS = 2**14
_numbers = itertools.count()


def named_call(eqn: Any) -> str:
    """A scope that leads to the lines of an equation from what is traced inside of it.

    `gradjax.replay.gradient` opens it around a rule, whose equations have lines of their own.
    """
    scope = f"{_CALL}{next(_numbers)}"
    _calls[scope] = _own_frames(eqn)
    while len(_calls) > _MOST_CALLS:
        _calls.pop(next(iter(_calls)))
    return scope


def _own_frames(eqn: Any) -> list[tuple[Any, int]]:
    """An equation's frames, up to the one that traced it."""
    own = []
    for code, instruction in frames(eqn):
        if code.co_filename in _TRACING:
            break
        own.append((code, instruction))
    return own


def marked(line: Line, before: int = 1, after: int = 1) -> str:
    """Some lines of source around an expression, with the expression underlined."""
    if not line.text:
        return ""
    numbers = range(max(1, line.line - before), line.line + after + 1)
    rows = [(n, linecache.getline(line.file, n).rstrip("\n")) for n in numbers]
    while rows and not rows[-1][1].strip() and rows[-1][0] != line.line:
        rows.pop()
    width = len(str(rows[-1][0]))
    out = []
    for number, text in rows:
        out.append(f"  {number:>{width}} | {text}")
        if number == line.line and line.column >= 0:
            end = line.end_column if line.end_line == line.line else len(text)
            # columns are counted in bytes of UTF-8
            start = len(text.encode()[: line.column].decode(errors="ignore"))
            length = len(text.encode()[line.column : end].decode(errors="ignore"))
            out.append(f"  {'':>{width}} | {' ' * start}{'^' * max(length, 1)}")
    return "\n".join(out)


def module_path(eqns: Iterable[Any]) -> str:
    """The module around an equation (Linen, NNX, Equinox), else its named scopes; "" if none.

    Args:
      eqns: as in `lines`.
    """
    names = [name for eqn in eqns for name in scopes(eqn) if not name.startswith(_CALL)]
    modules = [name.removeprefix(SCOPE) for name in names if name.startswith(SCOPE)]
    if modules and modules[-1]:
        return modules[-1]
    return "/".join(name for name in names if not name.startswith(SCOPE))
