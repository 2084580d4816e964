"""The healthy networks: published set-ups at initialisation, and after some steps of training."""

from pathologies import healthy_start, healthy_trained
from pathologies.case import Case

HEALTHY: tuple[Case, ...] = (
    *healthy_start.MLPS,
    *healthy_start.IMAGES,
    *healthy_start.SEQUENCES,
    *healthy_start.TRANSFORMERS,
    *healthy_trained.TRAINED,
    *healthy_trained.OPTIMIZED,
)
