"""All cases of the field, section by section."""

from pathologies import (
    field_clipping,
    field_code,
    field_healthy,
    field_models,
    field_monitor,
    field_places,
    field_programs,
    field_roads,
)

CASES = [
    *field_healthy.CASES,
    *field_roads.CASES,
    *field_programs.CASES,
    *field_places.CASES,
    *field_clipping.CASES,
    *field_models.CASES,
    *field_code.CASES,
]
MONITOR_CASES = [*field_monitor.MONITOR_CASES, *field_code.MONITOR_CASES]
