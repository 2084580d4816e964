"""gradjax: see, explain, cure and prove exploding and vanishing gradients in JAX.

The public names, and nothing else. Each is imported when it is first used (PEP 562), so that
`gradjax --help` answers at once and the command line can set thread counts before JAX starts.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from typing import TYPE_CHECKING, Any

from gradjax.core.names import suggest_names

if TYPE_CHECKING:
    import gradjax.report.files as results  # noqa: F401
    from gradjax import comparison as comparison
    from gradjax import cure as cure
    from gradjax import diagnosis as diagnosis
    from gradjax import matrix_free as matrix_free
    from gradjax import monitor as monitor
    from gradjax import replay as replay
    from gradjax import spectrum as spectrum
    from gradjax import taps as taps
    from gradjax import transforms as transforms
    from gradjax.comparison.difference import difference as difference
    from gradjax.core.step import layer_jacobians as layer_jacobians
    from gradjax.core.step import signals as signals
    from gradjax.cure.search import find_cure as find_cure
    from gradjax.diagnosis.coordinate import coordinate_check as coordinate_check
    from gradjax.diagnosis.verdict import diagnose as diagnose
    from gradjax.experiment import config as config
    from gradjax.experiment import models as models
    from gradjax.experiment import tasks as tasks
    from gradjax.experiment.sweep import compare as compare
    from gradjax.experiment.sweep import sweep as sweep
    from gradjax.monitor.monitor import Monitor as Monitor
    from gradjax.replay.nonfinite import find_nonfinite as find_nonfinite
    from gradjax.spectrum.exponents import lyapunov_exponents as lyapunov_exponents
    from gradjax.spectrum.exponents import moments as moments
    from gradjax.spectrum.jacobian import jacobian_spectrum as jacobian_spectrum
    from gradjax.spectrum.jacobian import log_singular_values as log_singular_values
    from gradjax.taps.links import links as links
    from gradjax.taps.links import per_example as per_example
    from gradjax.taps.names import functional as functional
    from gradjax.taps.names import tap as tap
    from gradjax.taps.probe import probe as probe
    from gradjax.theory import meanfield as meanfield
    from gradjax.theory import random_matrix as random_matrix
    from gradjax.transforms import telemetry as telemetry
    from gradjax.transforms import watch as watch

__version__ = "0.1.0"

# public name -> the module it comes from
_HOME = {
    "Monitor": "monitor.monitor",
    "compare": "experiment.sweep",
    "coordinate_check": "diagnosis.coordinate",
    "diagnose": "diagnosis.verdict",
    "difference": "comparison.difference",
    "find_cure": "cure.search",
    "find_nonfinite": "replay.nonfinite",
    "functional": "taps.names",
    "jacobian_spectrum": "spectrum.jacobian",
    "layer_jacobians": "core.step",
    "links": "taps.links",
    "log_singular_values": "spectrum.jacobian",
    "lyapunov_exponents": "spectrum.exponents",
    "moments": "spectrum.exponents",
    "per_example": "taps.links",
    "probe": "taps.probe",
    "signals": "core.step",
    "sweep": "experiment.sweep",
    "tap": "taps.names",
    "telemetry": "transforms",
    "watch": "transforms",
}

# public modules, by where they are
_MODULES = {
    "comparison": "comparison",
    "config": "experiment.config",
    "cure": "cure",
    "diagnosis": "diagnosis",
    "matrix_free": "matrix_free",
    "meanfield": "theory.meanfield",
    "models": "experiment.models",
    "monitor": "monitor",
    "random_matrix": "theory.random_matrix",
    "replay": "replay",
    "results": "report.files",
    "spectrum": "spectrum",
    "taps": "taps",
    "tasks": "experiment.tasks",
    "transforms": "transforms",
}

__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]
_suggest = suggest_names(__name__, [*_HOME, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"gradjax.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"gradjax.{_MODULES[name]}")
    return _suggest(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets `import gradjax.config` find `gradjax.experiment.config`, as one and the same module."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        package, _, name = fullname.partition(".")
        top, _, below = name.partition(".")
        if package != "gradjax" or _MODULES.get(top, top) == top:
            return None
        spec = importlib.machinery.ModuleSpec(fullname, self)
        spec.loader_state = ".".join(filter(None, ["gradjax", _MODULES[top], below]))
        return spec

    def create_module(self, spec: Any) -> Any:
        module = importlib.import_module(spec.loader_state)
        spec.loader_state = module, module.__spec__
        return module

    def exec_module(self, module: Any) -> None:
        """The module has run where it lives; importlib has replaced its spec, which is put back."""
        alias = module.__spec__
        assert alias is not None
        module.__spec__ = alias.loader_state[1]


sys.meta_path.append(_Moved())
