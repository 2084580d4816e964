"""Watch a training loop: history, warnings, and a crash file when it fails."""

from gradjax.monitor.monitor import Monitor as Monitor
