"""A misspelt name of a public module is an AttributeError that suggests the nearest one."""

import difflib
import sys
from collections.abc import Callable, Iterable
from typing import Any


def suggest_names(module: str, names: Iterable[str] | None = None) -> Callable[[str], Any]:
    """The `__getattr__` of a module with these public names (PEP 562).

    Python calls it only for names that the module does not have.

    Args:
      module: the module's name, as in `__name__`.
      names: its public names, as in `__all__`; by default the functions and classes of gradjax
        that it holds.
    """
    given = None if names is None else tuple(names)

    def __getattr__(name: str) -> Any:
        message = f"module {module!r} has no attribute {name!r}"
        # Python and its tools ask modules for names such as `__path__`, and expect a short no.
        if name.startswith("_"):
            raise AttributeError(message)
        public = _public_names(module) if given is None else given
        nearest = difflib.get_close_matches(name, public, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise AttributeError(f"{message}.{hint} Its public names are {', '.join(public)}.")

    return __getattr__


def _public_names(module: str) -> tuple[str, ...]:
    """Names of the functions and classes of gradjax that a module holds."""
    return tuple(
        name
        for name, value in vars(sys.modules[module]).items()
        if not name.startswith("_")
        and callable(value)
        and getattr(value, "__module__", "").startswith("gradjax.")
        and name != "suggest_names"
    )
