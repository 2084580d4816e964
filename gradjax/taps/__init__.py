"""Values and cotangents inside any model, its layers, and the links between two of them."""

from gradjax.taps.links import PerExample as PerExample
from gradjax.taps.links import per_example as per_example
from gradjax.taps.names import functional as functional
from gradjax.taps.names import tap as tap
from gradjax.taps.probe import Probe as Probe
from gradjax.taps.probe import probe as probe
