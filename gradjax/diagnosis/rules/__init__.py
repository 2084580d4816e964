"""The rules of a diagnosis: a function for each pathology, from evidence to findings, with its
threshold's source.

`findings` puts them in causal order: saturated units before the gradients that vanish in them. To
add a rule, write the function in the file it belongs to, name it in `RULES`, and give its remedies
a place in `gradjax.diagnosis.rules.finding`.
"""

from collections.abc import Sequence
from dataclasses import replace

from gradjax.diagnosis.evidence import Evidence
from gradjax.diagnosis.rules import growth, numbers, training, units
from gradjax.diagnosis.rules.finding import CAUSAL as CAUSAL
from gradjax.diagnosis.rules.finding import REMEDIES as REMEDIES
from gradjax.diagnosis.rules.finding import Finding as Finding
from gradjax.diagnosis.rules.training import Dynamics as Dynamics

RULES = (
    units.symmetric_units, growth.gradient_growth, growth.time_growth, growth.activation_growth, units.dead_units,
    units.saturated_units, units.rank_collapse, units.attention_logit_growth, units.ill_conditioned_jacobian,
    numbers.norm_overflow,
)  # fmt: skip
OF_TRAINING = (
    training.frozen_optimizer,
    training.unstable_step_size,
    training.loss_spikes,
    training.clipping,
)


def findings(e: Evidence, d: Dynamics | None) -> tuple[Finding, ...]:
    """Every rule's findings in causal order."""
    broken = numbers.non_finite(e)
    found = numbers.untrained_layer(e) + broken
    if not broken:
        for rule in RULES:
            found += rule(e)
        if not any(
            "exploding" in f.pathology or f.pathology == "batchnorm_explosion" for f in found
        ):
            found += numbers.backward_overflow(e)
        if not found:  # it costs a gradient more, and what was found explains it
            found += units.shattered_gradients(e)
    if d is not None:
        for rule in OF_TRAINING:
            found += rule(d)
    return tuple(replace(f, remedies=REMEDIES[f.pathology]) for f in in_order(found))


def in_order(found: Sequence[Finding]) -> list[Finding]:
    """Findings, most causal first."""
    order = {name: i for i, name in enumerate(CAUSAL)}
    names = {f.pathology for f in found}
    late = set()
    if "rank_collapse" in names and not any(f.cause == "averaging" for f in found):
        late |= {"rank_collapse"}  # the ordered phase: examples merge because the weights are small
    return sorted(found, key=lambda f: (f.pathology in late, order[f.pathology]))
