"""Findings in plain words."""

import math

from gradjax.diagnosis.rules import Finding


def factor(nats: float) -> str:
    """e^nats as people read it, however large: `8.5e+12`, `1.4e+217`.

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


_WORDS = {
    "non_finite": "{place} holds inf or NaN ({cause}).",
    "exploding_activations": "The forward pass grows until {place}; the largest entry before it is {before}.",
    "saturated_units": "{saturated_fraction:.0%} of the units of {place} are saturated ({activation}).",
    "dead_units": "{dead_fraction:.0%} of the ReLU units of {place} are off for every example: no gradient passes them.",
    "symmetric_units": "All units of {place} have the same value, and will always have the same gradient.",
    "rank_collapse": "From {place} on all {of} become one point (share of variance left: {fraction:.2g}).",
    "attention_logit_growth": "The attention logits of {place} spread by {logit_deviation:.3g}: a row sees one key.",
    "ill_conditioned_jacobian": "The weights of {place} pass less than a quarter of their directions.",
    "shattered_gradients": "Inputs 1% apart have gradients of cosine {cosine:.2f}: white noise, not a slope.",
    "untrained_layer": "{place} has no differentiable path to the loss, and so have {count} leaves in all.",
    "norm_overflow": "The gradient of {place} has a norm of {norm}: finite, but its square is not.",
    "frozen_optimizer": "The optimiser's state {place} holds inf or NaN: those parameters never move again.",
    "loss_spikes": "The loss jumps {spikes} times, first at step {first_step}, at most by {largest_factor:.3g}.",
    "clipping_always": "{place} clips every step: its threshold sets the step, not the gradient.",
    "clipping_never": "{place} never clips: its threshold does nothing.",
}


def explain(finding: Finding) -> str:
    """One finding in plain words, with its numbers."""
    e, place = finding.evidence, finding.where["name"]
    if "growth_nats" in e:
        return _explain_growth(finding)
    if finding.pathology == "unstable_step_size":
        if "sharpness" in e and e["sharpness_over_2_lr"] > 1:
            return f"The sharpness {e['sharpness']:.3g} is {e['sharpness_over_2_lr']:.2g} times 2 / learning_rate."
        return f"On one and the same batch the loss goes from {e['loss_first']:.3g} to {e['loss_last']:.3g}."
    before = factor(e["log_max_before"]) if "log_max_before" in e else "unknown"
    norm = factor(e["log_norm"]) if "log_norm" in e else ""
    text = _WORDS[finding.pathology].format(
        place=place,
        cause=finding.cause.replace("_", " "),
        before=before,
        norm=norm,
        count=len(e.get("leaves", ())),
        **e,
    )
    return text + (
        f" Cause: {finding.cause.replace('_', ' ')}." if finding.pathology != "non_finite" else ""
    )


def _explain_growth(finding: Finding) -> str:
    e, growth = finding.evidence, finding.evidence["growth_nats"]
    what = (
        "gradient"
        if "gradient" in finding.pathology or "batchnorm" in finding.pathology
        else "activation"
    )
    way = f"from {finding.where['name']}" + (
        f" to {e['run_ends_at']}" if "run_ends_at" in e else ""
    )
    back = "On its way back " if what == "gradient" else "On its way "
    return (
        f"{back}{way} the {what} {'grows' if growth > 0 else 'shrinks'}: {growth:+.1f} nats in all, a factor of "
        f"{factor(growth)}, {e['growth_nats_per_layer']:+.3f} nats per {finding.where['kind']}. The threshold is "
        f"{finding.threshold:+.1f} nats; the growth is {abs(e['standard_deviations']):.0f} standard deviations from "
        f"that of a critical network of this width and depth. Cause: {finding.cause.replace('_', ' ')}."
    )
