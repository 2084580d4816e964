"""A program evaluated again, one equation at a time: the first value that is not finite."""

from gradjax.core.names import suggest_names
from gradjax.replay.nonfinite import NonFinite, Search, find_nonfinite

__all__ = ["NonFinite", "Search", "find_nonfinite"]
__getattr__ = suggest_names(__name__, __all__)
