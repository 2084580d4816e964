"""A misspelt name of a public module is an AttributeError that suggests the nearest one."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any


def suggest_names(module: str, names: Iterable[str]) -> Callable[[str], Any]:
    """The `__getattr__` of a module with these public names (PEP 562).

    Python calls it only for names that the module does not have.

    Args:
      module: the module's name, as in `__name__`.
      names: its public names, as in `__all__`.
    """
    public = tuple(names)

    def __getattr__(name: str) -> Any:
        message = f"module {module!r} has no attribute {name!r}"
        # Python and its tools ask modules for names such as `__path__`, and expect a short no.
        if name.startswith("__"):
            raise AttributeError(message)
        nearest = difflib.get_close_matches(name, public, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise AttributeError(f"{message}.{hint} Its public names are {', '.join(public)}.")

    return __getattr__
