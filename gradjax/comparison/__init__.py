"""Two programs that should agree, and the first value in which they do not."""

from gradjax.comparison.difference import Difference, FirstDifference, difference
from gradjax.core.names import suggest_names

__all__ = ["Difference", "FirstDifference", "difference"]
__getattr__ = suggest_names(__name__, __all__)
