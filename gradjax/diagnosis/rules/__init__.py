"""The rules of a diagnosis: from evidence to findings, most causal first.

A pathology is an entry of `gradjax.diagnosis.rules.catalogue` and a function that looks for it.
Each finding carries its threshold and the threshold's source.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gradjax.diagnosis.evidence import Evidence
from gradjax.diagnosis.rules import numbers
from gradjax.diagnosis.rules.catalogue import BY_NAME as BY_NAME
from gradjax.diagnosis.rules.catalogue import CAUSAL as CAUSAL
from gradjax.diagnosis.rules.catalogue import PATHOLOGIES as PATHOLOGIES
from gradjax.diagnosis.rules.catalogue import Pathology as Pathology
from gradjax.diagnosis.rules.catalogue import When
from gradjax.diagnosis.rules.finding import Finding as Finding
from gradjax.diagnosis.rules.training import Dynamics as Dynamics
from gradjax.diagnosis.rules.zero import notes as notes

# What helps a recurrence, before what helps any network.
_OVER_TIME = {
    "vanishing_gradients": ("lstm", "gru", "forget_bias", "orthogonal_init"),
    "exploding_gradients": ("clip_by_global_norm", "orthogonal_init"),
}


def findings(e: Evidence, d: Dynamics | None) -> tuple[Finding, ...]:
    """The findings of all rules, most causal first."""
    broken = _ask("first", e)
    found = broken + _ask("always", e)
    if not broken:
        found += _ask("finite", e)
        # an explosion that was found explains cotangents out of range
        explosions = ("exploding_gradients", "exploding_activations", "batchnorm_explosion")
        if not any(f.pathology in explosions for f in found):
            found += numbers.backward_overflow(e)
        if not found:
            found += _ask("last", e)
    if d is not None:
        found += _ask("training", d)
    return tuple(_completed(f) for f in in_order(found))


def _ask(when: When, given: Any) -> list[Finding]:
    """What the rules of one kind find, each asked once."""
    rules = [rule for entry in PATHOLOGIES if entry.when == when for rule in entry.rules]
    return [finding for rule in dict.fromkeys(rules) for finding in rule(given)]


def _completed(finding: Finding) -> Finding:
    """A finding with its remedies, and the threshold and the source that its rule left out."""
    entry = BY_NAME[finding.pathology]
    threshold = entry.threshold if math.isnan(finding.threshold) else finding.threshold
    source = finding.source or f"{entry.criterion}; {entry.source}"
    first = entry.by_cause.get(finding.cause, ())
    if finding.where["kind"] == "step" and finding.pathology in _OVER_TIME:
        first = _OVER_TIME[finding.pathology]
    remedies = finding.remedies or tuple(dict.fromkeys((*first, *entry.remedies)))
    return replace(finding, threshold=threshold, source=source, remedies=remedies)


def in_order(found: Sequence[Finding]) -> list[Finding]:
    """Findings, most causal first."""
    order = {name: i for i, name in enumerate(CAUSAL)}
    # In the ordered phase examples merge because the weights are small: a consequence, not a cause.
    averaging = any(f.pathology == "rank_collapse" and f.cause == "averaging" for f in found)

    def rank(finding: Finding) -> tuple[bool, int]:
        late = finding.pathology == "rank_collapse" and not averaging
        return late, order[finding.pathology]

    return sorted(found, key=rank)
