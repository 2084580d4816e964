"""The labelled pairs of programs: those that differ, and those that agree."""

from pathologies import (
    difference_attention,
    difference_dtypes,
    difference_equal_bits,
    difference_equal_rounding,
    difference_gradients,
    difference_layers,
    difference_losses,
    difference_norms,
    difference_ports,
    difference_recurrent,
    difference_rewritten,
)
from pathologies.difference_case import Pair, marked_lines

PLANTED: tuple[Pair, ...] = (
    *difference_attention.PAIRS,
    *difference_norms.PAIRS,
    *difference_layers.PAIRS,
    *difference_recurrent.PAIRS,
    *difference_dtypes.PAIRS,
    *difference_losses.PAIRS,
    *difference_gradients.PAIRS,
    *difference_ports.PAIRS,
    *difference_rewritten.PAIRS,
)
EQUAL: tuple[Pair, ...] = (*difference_equal_bits.PAIRS, *difference_equal_rounding.PAIRS)

__all__ = ["EQUAL", "PLANTED", "Pair", "marked_lines"]
