"""Watch a training loop: history, warnings, and a crash file when it fails."""

from gradjax.core.names import suggest_names
from gradjax.monitor.monitor import Monitor

__all__ = ["Monitor"]
__getattr__ = suggest_names(__name__, __all__)
