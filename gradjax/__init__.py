"""gradjax: see, explain, cure and prove exploding and vanishing gradients in JAX.

The public names, and nothing else. Each is imported when it is first used (PEP 562), so that
`gradjax --help` answers at once and the command line can set thread counts before JAX starts.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradjax.ablation import compare as compare
    from gradjax.ablation import sweep as sweep
    from gradjax.blocks import links as links
    from gradjax.blocks import per_example as per_example
    from gradjax.coordinate import coordinate_check as coordinate_check
    from gradjax.cure import find_cure as find_cure
    from gradjax.diagnosis import diagnose as diagnose
    from gradjax.monitor import Monitor as Monitor
    from gradjax.spectrum import jacobian_spectrum as jacobian_spectrum
    from gradjax.spectrum import log_singular_values as log_singular_values
    from gradjax.spectrum import lyapunov_exponents as lyapunov_exponents
    from gradjax.spectrum import moments as moments
    from gradjax.step import layer_jacobians as layer_jacobians
    from gradjax.step import signals as signals
    from gradjax.taps import functional as functional
    from gradjax.taps import probe as probe
    from gradjax.taps import tap as tap
    from gradjax.transforms import telemetry as telemetry
    from gradjax.transforms import watch as watch

__version__ = "0.1.0"

_HOME = {
    "Monitor": "monitor",
    "compare": "ablation",
    "coordinate_check": "coordinate",
    "find_cure": "cure",
    "links": "blocks",
    "per_example": "blocks",
    "diagnose": "diagnosis",
    "functional": "taps",
    "probe": "taps",
    "tap": "taps",
    "jacobian_spectrum": "spectrum",
    "log_singular_values": "spectrum",
    "lyapunov_exponents": "spectrum",
    "moments": "spectrum",
    "layer_jacobians": "step",
    "signals": "step",
    "sweep": "ablation",
    "telemetry": "transforms",
    "watch": "transforms",
}

__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"gradjax.{_HOME[name]}"), name)
    raise AttributeError(f"module 'gradjax' has no attribute {name!r}; its public names are {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
