"""The planted networks: each has a known pathology, and was measured to have it."""

from pathologies import planted_growth, planted_rest, planted_units
from pathologies.case import Case

PLANTED: tuple[Case, ...] = (
    *planted_growth.EXPLODING,
    *planted_growth.VANISHING,
    *planted_units.SATURATED,
    *planted_units.DEAD,
    *planted_units.BATCHNORM,
    *planted_units.RESIDUAL,
    *planted_units.ATTENTION,
    *planted_units.POST_LN,
    *planted_rest.RANGE,
    *planted_rest.WEIGHTS,
    *planted_rest.SHATTERED,
    *planted_rest.NUMBERS,
    *planted_rest.OPTIMIZERS,
    *planted_rest.GATES,
)
