"""The unseen half of the suite: published examples of Flax, Equinox, Optax and JAX, healthy and
broken.

Their author has not seen how the diagnosis is made, and its thresholds were not fitted to them.
"""

from pathologies import unseen_equinox, unseen_linen_cases, unseen_nnx, unseen_plain
from pathologies.case import Case

EXAMPLES: tuple[Case, ...] = (
    unseen_linen_cases.CASES + unseen_nnx.CASES + unseen_equinox.CASES + unseen_plain.CASES
)
