"""The catalogue of pathologies: one entry each, most causal first.

To add a pathology, write its rule (a function from the evidence to findings) in the file it belongs
to, and put its entry at the place in `PATHOLOGIES` where what stands above can bring it about. The
order of the findings, the words of the verdict, the advice and the tables of the documentation
follow from the entry.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from gradjax.diagnosis.rules import growth, numbers, training, units, zero
from gradjax.diagnosis.rules.finding import Finding
from gradjax.diagnosis.rules.main_rule import GROWTH_NATS

When = Literal["first", "always", "finite", "last", "training"]


@dataclass(frozen=True, kw_only=True)
class Pathology:
    """One entry of the catalogue.

    Attributes:
      name: as findings carry it.
      meaning: what it is, for a reader who has never met it.
      first_remedy: what to try first.
      criterion: when a network is said to have it.
      source: where the criterion comes from; `arXiv NNNN.NNNNN` becomes a link in the docs.
      threshold: the bound, where the rule computes none for the network at hand.
      words: sentences about a finding, as format strings. The first one is used of which the
        evidence has all the fields; `gradjax.diagnosis.words.explain` lists the other fields.
      remedies: what to try, in order: names of `gradjax.cure.remedies` where there is one.
      by_cause: cause -> what to try first for that cause, before the others.
      rules: the functions that look for it: evidence -> findings, or `Dynamics` -> findings where
        `when` is "training". Entries may share a rule, which then runs once.
      when: "first": a finding of the rule makes the other measurements useless, so that only the
        rules of "always" and "training" follow. "finite": otherwise. "last": only when nothing else
        was found, since the rule is expensive. "training": when dynamics are given.
      one_seed: whether one seed of several is enough to report it; else half of them.
    """

    name: str
    meaning: str
    first_remedy: str
    criterion: str
    source: str
    threshold: float
    words: tuple[str, ...]
    remedies: tuple[str, ...]
    rules: tuple[Callable[[Any], list[Finding]], ...]
    by_cause: dict[str, tuple[str, ...]] = field(default_factory=dict)
    when: When = "finite"
    one_seed: bool = False


_GROWTH = (
    "{grows}: {growth_nats:+.1f} nats in all, a factor of {factor}, {growth_nats_per_layer:+.3f} "
    "nats per {kind}. The threshold is {threshold:+.1f} nats; the growth is {deviations:.0f} "
    "standard deviations from that of a critical network of this width and depth. Cause: {cause}."
)
_BACKWARD = ("On its way back from {place}{to} the gradient " + _GROWTH,)
_OUT_OF_RANGE = (
    "On its way to {out_of_range_at} the activation " + _GROWTH + " There {operation} leaves the "
    "range of {dtype} ({line})."
)
_FORWARD = ("On its way from {place}{to} the activation " + _GROWTH,)
_HANIN = "Hanin & Nica 2018, arXiv 1812.05994"

PATHOLOGIES: tuple[Pathology, ...] = (
    Pathology(
        name="frozen_optimizer",
        meaning="the optimiser's state overflowed once: those parameters never move again",
        first_remedy="start its state anew; `restore_moments` from then on",
        criterion="the optimiser's state holds inf or NaN; or no entry of an update passes 1e-12 "
        "in any step, though the gradient is not zero",
        source="by definition",
        threshold=training.SMALLEST_UPDATE,
        words=(
            "No entry of an update is above {largest_update:.2g} in {steps} steps, though the "
            "gradient is not zero. Cause: {cause}.",
            "The optimiser's state {place} holds inf or NaN: those parameters never move again. "
            "Cause: {cause}.",
        ),
        remedies=("reset_optimizer_state", "skip_non_finite", "restore_moments"),
        rules=(training.bad_update, training.frozen_optimizer),
        when="training",
    ),
    Pathology(
        name="non_finite",
        meaning="a value is inf or NaN, and it is the first one",
        first_remedy="by cause, named with the operation and its line; see "
        "[the reasons](#why-an-operation-is-not-finite)",
        criterion="the loss, a gradient or a parameter is inf or NaN; named is the first operation "
        "whose result is not finite although its operands are, of those that reach it",
        source="by definition",
        threshold=math.inf,
        words=("{text}", "{reached} is not finite: {words} ({cause})."),
        remedies=("check_data", "skip_non_finite", "lower_learning_rate"),
        rules=(numbers.non_finite,),
        when="first",
        one_seed=True,
    ),
    Pathology(
        name="symmetric_units",
        meaning="all units of a layer are the same, and stay so",
        first_remedy="random initial weights",
        criterion="variance over the units of a layer below 1e-9 of the mean square and the same "
        "weights for all of its outputs, or weights of zero",
        source="rounding leaves more than that; equal units stay equal",
        threshold=units.ALIKE,
        words=(
            "All units of {place} have the same value, and will always have the same gradient. "
            "Cause: {cause}.",
        ),
        remedies=("random_initialization",),
        rules=(units.symmetric_units,),
    ),
    Pathology(
        name="residual_growth",
        meaning="the branches add up without normalisation: the variance doubles per block",
        first_remedy="scale the branches by depth^(-1/2), or start them at zero",
        criterion="activations grow by the main rule, with skips and without normalisation in most "
        "layers",
        source="as the main rule",
        threshold=GROWTH_NATS,
        words=(_OUT_OF_RANGE, *_FORWARD),
        remedies=("residual_scaled", "rezero", "layernorm"),
        rules=(growth.activation_growth,),
    ),
    Pathology(
        name="batchnorm_explosion",
        meaning="BatchNorm without skips: each layer multiplies the gradient, by 1.2 with ReLU",
        first_remedy="skips around the layers",
        criterion="gradients explode by the main rule, BatchNorm in most of the layers, "
        "activations that do not grow",
        source="as the main rule; cf. Yang et al. 2019, arXiv 1902.08129",
        threshold=GROWTH_NATS,
        words=_BACKWARD,
        remedies=("residual", "layernorm", "shallower_network"),
        rules=(growth.gradient_growth,),
    ),
    Pathology(
        name="exploding_gradients",
        meaning="the gradient grows on its way back, over depth or time",
        first_remedy="initialise at the critical gain; where you cannot choose it, "
        "`clip_by_global_norm`",
        criterion="G > 6 and beyond three standard deviations, over depth or time",
        source=_HANIN,
        threshold=GROWTH_NATS,
        words=_BACKWARD,
        remedies=("critical_init", "orthogonal_init", "layernorm", "clip_by_global_norm"),
        rules=(growth.gradient_growth, growth.time_growth),
    ),
    Pathology(
        name="exploding_activations",
        meaning="the forward pass grows, at worst beyond the range of its dtype",
        first_remedy="initialise at the critical gain; bfloat16 in place of float16",
        criterion="activations grow by the main rule, to more than 1; or up to the layer, the step "
        "in time or the loss that leaves the range of its dtype",
        source="as the main rule; 3.4e38, in float16 65,504",
        threshold=GROWTH_NATS,
        words=(_OUT_OF_RANGE, *_FORWARD),
        remedies=("critical_init", "layernorm", "residual_scaled"),
        rules=(growth.activation_growth,),
        one_seed=True,
    ),
    Pathology(
        name="attention_logit_growth",
        meaning="each query sees one key, and the softmax passes no gradient",
        first_remedy="normalise queries and keys; check the 1/sqrt(d)",
        criterion="the logits of a row have a standard deviation above 2 sqrt(2 log keys), and the "
        "largest weight is above 0.9, in the median over rows",
        source="twice the point where a softmax of Gaussian logits freezes (Derrida 1981, random "
        "energy model); cf. Dehghani et al. 2023, arXiv 2302.05442",
        threshold=math.nan,
        words=(
            "The attention logits of {place} spread by {logit_deviation:.3g}: a row sees one key. "
            "Cause: {cause}.",
        ),
        remedies=("qk_norm", "scale_logits", "lower_learning_rate"),
        rules=(units.attention_logit_growth,),
    ),
    Pathology(
        name="saturated_units",
        meaning="tanh or sigmoid units sit in their flat part and pass no gradient",
        first_remedy="by cause: normalise the inputs, smaller weights, biases at zero",
        criterion="half of the units of a tanh, sigmoid or erf in every path have a slope below 5% "
        "of the steepest (the model's output is left out); or nine tenths of every gate of a "
        "recurrence",
        source="saturation as in Glorot & Bengio 2010, section 3",
        threshold=units.SATURATED_FRACTION,
        words=(
            "{saturated_fraction:.0%} of the units of {place} are saturated ({activation}). "
            "Cause: {cause}.",
        ),
        remedies=("critical_init", "normalize_inputs", "relu", "batchnorm"),
        by_cause={"input_scale": ("normalize_inputs",), "bias": ("zero_biases",)},
        rules=(units.saturated_units,),
    ),
    Pathology(
        name="dead_units",
        meaning="ReLU units are off for every example and will not come back",
        first_remedy="lower the learning rate; start again, or a leaky ReLU",
        criterion="more than three quarters of the ReLU units are off for every example of the "
        "batch (for fewer than 36 units: 1/2 + 3 sqrt(1/(4 units)))",
        source="with symmetric weights at most half are, even if all examples are alike",
        threshold=units.DEAD_FRACTION,
        words=(
            "{dead_fraction:.0%} of the ReLU units of {place} are off for every example: no "
            "gradient passes them. Cause: {cause}.",
        ),
        remedies=("lower_learning_rate", "leaky_relu", "zero_biases", "he_init"),
        rules=(units.dead_units,),
    ),
    Pathology(
        name="rank_collapse",
        meaning="all tokens, or all examples, become one point",
        first_remedy="skips around attention",
        criterion="the variance over positions is below 1e-3 of the mean square; over examples, "
        "where there are no positions, below 1e-3 and below a twentieth of that of a critical ReLU "
        "network, 4.5 pi^2 / depth^2; and it was above 1e-2 in the first layer",
        source="Dong et al. 2021, arXiv 2103.03404; the law of ReLU networks, Hayou et al. 2019, "
        "arXiv 1902.06853",
        threshold=units.COLLAPSED,
        words=(
            "From {place} on all {of} become one point (fraction of variance left: "
            "{fraction:.2g}). Cause: {cause}.",
        ),
        remedies=("residual", "critical_init"),
        rules=(units.rank_collapse,),
    ),
    Pathology(
        name="ill_conditioned_jacobian",
        meaning="a layer passes few of its directions",
        first_remedy="orthogonal weights",
        criterion="three quarters of the singular values of a layer's weights lie more than six "
        "nats (a factor of 400) below the largest",
        source="of Gaussian weights the upper quarter lies within one nat "
        "(Marchenko & Pastur 1967)",
        threshold=GROWTH_NATS,
        words=(
            "The weights of {place} pass less than a quarter of their directions. Cause: {cause}.",
        ),
        remedies=("orthogonal_init", "residual"),
        rules=(units.ill_conditioned_jacobian,),
    ),
    Pathology(
        name="vanishing_gradients",
        meaning="the gradient shrinks on its way back",
        first_remedy="initialise at the critical gain; skips; over time, gates with a forget bias "
        "of 1 or more",
        criterion="G < -6 and beyond three standard deviations, over depth or time",
        source=_HANIN,
        threshold=-GROWTH_NATS,
        words=_BACKWARD,
        remedies=("critical_init", "orthogonal_init", "residual", "layernorm"),
        by_cause={
            "layernorm_placement": ("pre_norm",),
            "activation_slope": ("relu", "critical_init"),
        },
        rules=(growth.gradient_growth, growth.time_growth),
    ),
    Pathology(
        name="vanishing_activations",
        meaning="the signal shrinks on its way forward",
        first_remedy="scale the inputs to rms 1, then the weights",
        criterion="activations shrink by the main rule, to less than e^-3; or they are below e^-6 "
        "in every layer",
        source="as the main rule",
        threshold=-GROWTH_NATS,
        words=(
            *_FORWARD,
            "The rms of the activations is {largest} at most in all layers, from {place} on. "
            "Cause: {cause}.",
        ),
        remedies=("critical_init", "layernorm"),
        by_cause={"input_scale": ("normalize_inputs",)},
        rules=(growth.activation_growth,),
    ),
    Pathology(
        name="shattered_gradients",
        meaning="the gradient at one input says nothing of its neighbour's",
        first_remedy="skips; lower frequencies in the input features",
        criterion="cosine below 0.2 between dL/dx at inputs 1% apart; asked only when nothing else "
        "was found",
        source="white noise has 0, a smooth loss 1 (Balduzzi et al. 2017, arXiv 1702.08591)",
        threshold=units.SHATTERED_COSINE,
        words=(
            "Inputs 1% apart have gradients of cosine {cosine:.2f}: white noise, not a slope. "
            "Cause: {cause}.",
        ),
        remedies=("residual", "critical_init", "lower_input_frequency"),
        rules=(units.shattered_gradients,),
        when="last",
    ),
    Pathology(
        name="gradient_underflow",
        meaning="entries of the gradient are below the smallest number of float16, and are 0",
        first_remedy="a loss scale, the power of two that the finding states",
        criterion="more than a tenth of the gradient's entries are 0 in float16 and are not where "
        "the backward pass starts from a larger number",
        source="the smallest number of float16 is 6e-8; loss scaling, Micikevicius et al. 2018, "
        "arXiv 1710.03740",
        threshold=zero.UNDERFLOWED,
        words=(
            "{underflowed_fraction:.0%} of the gradient's entries underflow to 0 in {dtype}, most "
            "of them in {place}. A loss scale of 2^{log2_loss_scale} would save them.",
        ),
        remedies=("loss_scaling", "bfloat16"),
        rules=(zero.gradient_underflow,),
    ),
    Pathology(
        name="flat_loss",
        meaning="the loss is not at its minimum, and its gradient is exactly 0",
        first_remedy="a loss of the logits in place of clipped or saturated probabilities",
        criterion="the gradient of every parameter is exactly 0, the loss is not, and no dtype is "
        "to blame",
        source="by definition",
        threshold=0.0,
        words=(
            "The loss is {loss:.3g} and its gradient exactly 0 in every parameter: something on "
            "the way is clipped, saturated or rounded (flat). Cause: {cause}.",
        ),
        remedies=("loss_of_logits", "remove_clipping"),
        rules=(zero.flat_loss,),
    ),
    Pathology(
        name="untrained_layer",
        meaning="parameters have no path to the loss: a forgotten layer, a `stop_gradient`",
        first_remedy="use the layer, or take it out",
        criterion="no differentiable path in the jaxpr from a parameter to the loss",
        source="by definition",
        threshold=0.0,
        words=(
            "{place} has no differentiable path to the loss, and so have {count} leaves in all. "
            "Cause: {cause}.",
        ),
        remedies=("use_the_layer", "remove_stop_gradient"),
        rules=(numbers.untrained_layer,),
        when="always",
    ),
    Pathology(
        name="norm_overflow",
        meaning="gradients are finite, their squares are not: Optax's norm is inf and clips them "
        "to zero",
        first_remedy="`gradjax.transforms.clip_by_global_norm`",
        criterion="the norm of a finite gradient is above 1.8e19",
        source="its square is inf in float32, and optax.global_norm with it",
        threshold=numbers.LOG_NORM_LIMIT,
        words=(
            "The gradient of {place} has a norm of {norm}: finite, but its square is not. "
            "Cause: {cause}.",
        ),
        remedies=("clip_by_global_norm", "loss_scaling"),
        rules=(numbers.norm_overflow,),
    ),
    Pathology(
        name="unstable_step_size",
        meaning="the step is longer than the curvature allows",
        first_remedy="divide the learning rate by the ratio that the finding states",
        criterion="sharpness above 1.2 times 2 / learning rate; or the loss of one batch more than "
        "doubles in the steps taken on it, or rises tenfold within them",
        source="the edge of stability (Cohen et al. 2021, arXiv 2103.00065)",
        threshold=training.SHARPNESS_MARGIN,
        words=(
            "On one and the same batch the loss goes from {loss_first:.3g} to {loss_last:.3g}.",
            "The sharpness {sharpness:.3g} is {sharpness_over_2_lr:.2g} times 2 / learning_rate.",
        ),
        remedies=("lower_learning_rate", "warmup", "clip_by_global_norm"),
        rules=(training.unstable_step_size,),
        when="training",
    ),
    Pathology(
        name="loss_spikes",
        meaning="the loss jumps out of its history now and then",
        first_remedy="`skip_spikes`, `zclip`",
        criterion="a loss more than six robust standard deviations, and by half, above the median "
        "of the 16 before it",
        source="as `transforms.skip_spikes`",
        threshold=training.SPIKE_DEVIATIONS,
        words=(
            "The loss jumps {spikes} times, first at step {first_step}, at most by "
            "{largest_factor:.3g}. Cause: {cause}.",
        ),
        remedies=("skip_spikes", "zclip", "lower_learning_rate"),
        rules=(training.loss_spikes,),
        when="training",
    ),
    Pathology(
        name="clipping_always",
        meaning="every step is clipped: the threshold has become the learning rate",
        first_remedy="raise it to what the gradients are, or `autoclip`",
        criterion="a clipping rule of ours or of Optax clipped in 99% of the steps, every leaf "
        "where it judges each",
        source="then the threshold sets the step, not the gradient",
        threshold=training.ALWAYS_CLIPPED,
        words=(
            "{place} clips every step, and {leaf} makes {leaf_fraction:.0%} of the norm: the "
            "others are clipped because of it. Cause: {cause}.",
            "{place} clips every step: its threshold sets the step, not the gradient. "
            "Cause: {cause}.",
        ),
        remedies=("raise_max_norm", "autoclip"),
        by_cause={"frozen_leaf": ("clip_without_that_leaf",)},
        rules=(training.clipping,),
        when="training",
    ),
    Pathology(
        name="clipping_never",
        meaning="the threshold does nothing",
        first_remedy="lower it, or take it out",
        criterion="a clipping rule clipped in none of the steps",
        source="then it does nothing",
        threshold=0.0,
        words=("{place} never clips: its threshold does nothing. Cause: {cause}.",),
        remedies=("lower_max_norm", "autoclip"),
        rules=(training.clipping,),
        when="training",
    ),
)
BY_NAME = {pathology.name: pathology for pathology in PATHOLOGIES}
CAUSAL = tuple(BY_NAME)
