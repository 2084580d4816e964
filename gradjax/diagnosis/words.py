"""Findings in plain words."""

import math
import string
from typing import Any

from gradjax.diagnosis.rules import BY_NAME, Finding


def factor(nats: float) -> str:
    """Format e^nats in scientific notation without overflow: `8.5e+12`, `1.4e+217`.

    >>> factor(0.5), factor(500.0)
    ('1.65', '1.4e+217')
    """
    if not math.isfinite(nats):
        return "0" if nats < 0 else str(nats)
    if abs(nats) < 3:
        return f"{math.exp(nats):.2f}"
    exponent = math.floor(nats / math.log(10))
    digits = f"{math.exp(nats - exponent * math.log(10)):.1f}"
    return f"{digits.removesuffix('.0')}e{exponent:+03d}"


def explain(finding: Finding) -> str:
    """One finding in plain words, with its numbers.

    The words are those of the catalogue, `gradjax.diagnosis.rules.catalogue`; beside the evidence
    they may use the fields of `fields`.
    """
    known = finding.evidence | fields(finding)
    for template in BY_NAME[finding.pathology].words:
        needed = {name for _, name, _, _ in string.Formatter().parse(template) if name}
        if needed <= known.keys():
            return template.format(**known)
    raise ValueError(
        f"explain: the words of {finding.pathology} need evidence that this finding does not have; "
        f"it has {', '.join(known)}."
    )


def fields(finding: Finding) -> dict[str, Any]:
    """What words may use beside the evidence.

    Returns:
      place, kind, cause and threshold; of a growth also factor, grows (or "shrinks"), deviations
      and to (" to X", the end of the run, or nothing); and where the evidence has the number
      norm and largest (as factors), and count (of leaves).
    """
    evidence = finding.evidence
    known: dict[str, Any] = {
        "place": finding.where["name"],
        "kind": finding.where["kind"],
        "cause": finding.cause.replace("_", " "),
        "threshold": finding.threshold,
    }
    logs = {
        "norm": "log_norm",
        "largest": "log_activation_rms_largest",
        "factor": "growth_nats",
    }
    known |= {field: factor(evidence[name]) for field, name in logs.items() if name in evidence}
    if "leaves" in evidence:
        known["count"] = len(evidence["leaves"])
    if "growth_nats" in evidence:
        known["grows"] = "grows" if evidence["growth_nats"] > 0 else "shrinks"
        known["deviations"] = abs(evidence["standard_deviations"])
        known["to"] = f" to {evidence['run_ends_at']}" if "run_ends_at" in evidence else ""
    return known
