"""Values and cotangents inside any model, its layers, and the links between two of them."""

from gradjax.core.names import suggest_names
from gradjax.taps.links import PerExample, links, per_example
from gradjax.taps.names import functional, tap
from gradjax.taps.probe import Probe, probe

__all__ = ["PerExample", "Probe", "functional", "links", "per_example", "probe", "tap"]
__getattr__ = suggest_names(__name__, __all__)
