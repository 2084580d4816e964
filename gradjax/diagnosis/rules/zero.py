"""Rules of gradients that are exactly zero: by underflow, on a flat loss; and what only explains
them.
"""

import numpy as np

from gradjax.diagnosis.evidence import Evidence
from gradjax.diagnosis.rules.finding import Finding, where

UNDERFLOWED = 0.1


def gradient_underflow(e: Evidence) -> list[Finding]:
    """Entries of the gradient that are 0 in float16 and are not with a loss scale."""
    found = e.underflow() if e.half else None
    if found is None or found.fraction <= UNDERFLOWED:
        return []
    worst = int(np.argmax(found.by_leaf))
    evidence = {
        "underflowed_fraction": found.fraction,
        "by_leaf": dict(zip(e.leaf_names, found.by_leaf, strict=True)),
        "log2_loss_scale": found.log2_scale,
        "dtype": "float16",
    }
    place = where("leaf", worst, e.leaf_names[worst])
    return [Finding("gradient_underflow", place, "float_range", evidence)]


def flat_loss(e: Evidence) -> list[Finding]:
    """A loss that is not 0 and whose gradient is, in every parameter."""
    is_lost = bool(gradient_underflow(e))
    if e.loss == 0 or not np.isfinite(e.loss) or is_lost or not _is_zero_everywhere(e):
        return []
    place = where("layer", len(e.layers), "loss")
    return [Finding("flat_loss", place, "clipped_or_saturated", {"loss": e.loss})]


def _is_zero_everywhere(e: Evidence) -> bool:
    trained = [x for i, x in enumerate(e.leaf_log_gradient) if i not in e.structure.untrained]
    return bool(trained) and all(np.max(x) == -np.inf for x in trained)


def notes(e: Evidence) -> list[str]:
    """What is no pathology, and explains what was measured."""
    if _is_zero_everywhere(e) and e.loss == 0:
        return [
            "the loss is exactly 0, and so is its gradient: no example of the batch counts (are "
            "all labels masked?), or the loss is at its minimum. The network was not judged by it."
        ]
    zero = [
        name
        for name, shape, size, gradient in zip(
            e.leaf_names, e.leaf_shapes, e.leaf_log_rms, e.leaf_log_gradient, strict=True
        )
        if len(shape) > 1 and np.max(size) == -np.inf and np.max(gradient) > -np.inf
    ]
    behind = [x for x in e.leaf_log_gradient if np.max(x) == -np.inf]
    if not zero or not behind:
        return []
    more = f" and {len(zero) - 1} more" if len(zero) > 1 else ""
    return [
        f"the weights {zero[0]}{more} start at zero: the gradient of {len(behind)} of "
        f"{len(e.leaf_names)} parameter leaves behind them is exactly 0 in the first step, by "
        "design. Ask again after a few steps."
    ]
