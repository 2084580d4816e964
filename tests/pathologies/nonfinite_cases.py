"""The labelled non-finite programs, and the programs whose inf or NaN is harmless."""

from pathologies import (
    nonfinite_backward,
    nonfinite_backward_networks,
    nonfinite_forward,
    nonfinite_forward_networks,
    nonfinite_harmless,
    nonfinite_harmless_networks,
    nonfinite_optimizer,
    nonfinite_range,
)
from pathologies.nonfinite_case import Broken, Harmless, marked_line

BROKEN: tuple[Broken, ...] = (
    *nonfinite_forward.CASES,
    *nonfinite_range.CASES,
    *nonfinite_forward_networks.CASES,
    *nonfinite_backward.CASES,
    *nonfinite_backward_networks.CASES,
    *nonfinite_optimizer.CASES,
)
HARMLESS: tuple[Harmless, ...] = (*nonfinite_harmless.CASES, *nonfinite_harmless_networks.CASES)

__all__ = ["BROKEN", "HARMLESS", "Broken", "Harmless", "marked_line"]
