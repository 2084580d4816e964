"""From a config to one Optax chain: guard, clipping, optimiser, regularisation, schedule.

    g -> [+ l1 sign W + l2 W] -> clipping -> direction -> [+ weight_decay W] -> * -rate(t) -> weight
    projections

and around it the guard (spam: around the direction alone, since what is inside starts anew now and
then), and around all `freeze_diverged`, which gives a lost run up and keeps its last good
parameters: at its first gradient or loss that is not finite, or, with a guard, after `PATIENCE` of
them in a row. L-BFGS is the exception: a clipped gradient is no gradient of the loss its secant
pairs and line search measure (Optax issue 1201), so its *direction* is clipped. Every float of
`gradjax.config.Optimizer` may be traced.

Regularisation acts on kernels, not on biases and norms' scales. A leaf below `layers` holds a
scanned stack, and rules per layer treat its layers one by one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from gradjax import transforms
from gradjax.experiment.schema import Optimizer

PyTree = Any
PATIENCE = 20  # steps; ours: a guard is for a bad batch, not for a run of which nothing is left


def is_stacked(path: str) -> bool:
    """Whether our models keep the layers of a scan in the leaf at this key path."""
    return "['layers']" in path


def kernels(params: PyTree) -> PyTree:
    """A tree of bools: which leaves are matrices of weights."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "['kernel']" in jax.tree_util.keystr(path), params
    )


# -- directions ------------------------------------------------------------------------------------------


def _or(value: Any, default: float) -> Any:
    return default if value is None else value


def adam_uncorrected(
    b1: float | Array = 0.9, b2: float | Array = 0.999
) -> optax.GradientTransformation:
    """Adam without bias correction (Kingma & Ba 2015, arXiv 1412.6980, section 3 without its last
    step).

    Optax's rule with a step count at which 1 - b^t is 1 to the last bit.
    """
    adam = optax.scale_by_adam(b1, b2)
    late = jnp.asarray(2**30, jnp.int32)

    def init(params):
        return optax.tree.set(adam.init(params), count=late)

    return optax.GradientTransformation(init, adam.update)


def _muon(o: Optimizer) -> optax.GradientTransformation:
    """Muon for the kernels before the read-out (of each layer of a stack its own), Adam for all
    else.
    """

    def dimensions(params):
        def one(path, x):
            name = jax.tree_util.keystr(path)
            if "['kernel']" not in name or "['readout']" in name:
                return None
            first = x.ndim - 2
            return optax.contrib.MuonDimensionNumbers(reduction_axis=first, output_axis=first + 1)

        return jax.tree_util.tree_map_with_path(one, params)

    muon = optax.contrib.muon(
        1.0,
        beta=_or(o.momentum, 0.95),
        adam_b2=_or(o.b2, 0.999),
        muon_weight_dimension_numbers=dimensions,
    )
    return optax.chain(muon, optax.scale(-1.0))  # a direction, as all the others


def coordinate_descent(block: str = "layer", order: str = "cyclic") -> optax.GradientTransformation:
    """The gradient of one block of parameters at a time, zero elsewhere.

    Args:
      block: "layer": the leaves of one module, a scanned stack's layer by layer; or "coordinate":
        one number.
      order: "cyclic", or "random": uniform with replacement, the same for every seed of the
        network.

    References:
      Nesterov 2012, Efficiency of coordinate descent methods on huge-scale optimization problems, SIAM J. Optim. 22
      (random order); Wright 2015, arXiv 1502.04759 (a survey).
    """

    def blocks(params) -> tuple[list[np.ndarray], int]:
        """Of each leaf the number of the block that its entries belong to, broadcasting against the
        leaf.
        """
        flat, numbers, names, count = jax.tree_util.tree_flatten_with_path(params)[0], [], {}, 0
        for path, x in flat:
            name = jax.tree_util.keystr(path)
            if block == "coordinate":
                numbers.append(np.arange(count, count + x.size, dtype=np.int32).reshape(x.shape))
                count += x.size
                continue
            module = jax.tree_util.keystr(path[:-1])
            size = x.shape[0] if is_stacked(name) else 1
            if (module, size) not in names:
                names[module, size] = count
                count += size
            first = names[module, size]
            own = np.arange(first, first + size, dtype=np.int32)
            numbers.append(own.reshape(-1, *[1] * (x.ndim - 1)) if is_stacked(name) else own[0])
        return numbers, count

    def update_fn(updates, state, params=None):
        count, (numbers, total) = state, blocks(updates)
        if order == "random":
            chosen = jax.random.randint(
                jax.random.fold_in(jax.random.key(0), count), (), 0, max(total, 1), jnp.int32
            )
        else:
            chosen = count % max(total, 1)
        leaves, structure = jax.tree.flatten(updates)
        kept = [
            jnp.where(jnp.asarray(n) == chosen, x, jnp.zeros_like(x))
            for n, x in zip(numbers, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, kept), count + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update_fn)  # type: ignore[arg-type]


OPTIMIZERS: dict[str, Callable[[Optimizer], optax.GradientTransformation]] = {
    "sgd": lambda o: optax.identity(),
    "momentum": lambda o: optax.trace(_or(o.momentum, 0.9)),
    "nesterov": lambda o: optax.trace(_or(o.momentum, 0.9), nesterov=True),
    "adam": lambda o: optax.scale_by_adam(_or(o.momentum, 0.9), _or(o.b2, 0.999)),
    "adamw": lambda o: optax.scale_by_adam(_or(o.momentum, 0.9), _or(o.b2, 0.999)),
    "nadam": lambda o: optax.scale_by_adam(_or(o.momentum, 0.9), _or(o.b2, 0.999), nesterov=True),
    "adam_uncorrected": lambda o: adam_uncorrected(_or(o.momentum, 0.9), _or(o.b2, 0.999)),
    "rmsprop": lambda o: optax.scale_by_rms(_or(o.b2, 0.9)),
    "adagrad": lambda o: optax.scale_by_rss(initial_accumulator_value=0.1, eps=1e-7),
    "adadelta": lambda o: optax.scale_by_adadelta(_or(o.b2, 0.9)),
    "lion": lambda o: optax.scale_by_lion(_or(o.momentum, 0.9), _or(o.b2, 0.99)),
    "muon": _muon,
    "lbfgs": lambda o: optax.scale_by_lbfgs(),
    "coordinate": lambda o: coordinate_descent(o.block, o.order),
}

_WITHOUT_THRESHOLD = ("none", "autoclip", "historical_clip", "zclip")
# name -> rule of one threshold, `optimizer.max_norm`; the adaptive ones take their papers' defaults
# for the rest
CLIPPING: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "none": lambda limit: optax.identity(),
    "clip": transforms.clip,
    "clip_by_global_norm": transforms.clip_by_global_norm,
    "clip_by_block_rms": transforms.clip_by_block_rms,
    "clip_by_layer_norm": lambda limit: transforms.clip_by_layer_norm(limit, stacked=is_stacked),
    "adaptive_grad_clip": lambda limit: transforms.adaptive_grad_clip(limit, stacked=is_stacked),
    "normalize_by_norm": lambda limit: optax.chain(
        transforms.normalize_by_norm(), optax.scale(limit)
    ),
    "autoclip": lambda limit: transforms.autoclip(),
    "historical_clip": lambda limit: transforms.historical_clip(),
    "zclip": lambda limit: transforms.zclip(),
    "adagc": lambda limit: transforms.adagc(lambda_abs=limit, stacked=is_stacked),
}

GUARDS: dict[str, Callable[[optax.GradientTransformation], optax.GradientTransformation]] = {
    "none": lambda tx: tx,
    "skip_non_finite": transforms.skip_non_finite,
    "repair_non_finite": lambda tx: transforms.skip_non_finite(tx, repair=True),
    "skip_spikes": transforms.skip_spikes,
    "restore_moments": transforms.restore_moments,
    "spam": lambda tx: tx,  # it belongs around the direction alone, see `build`
}

# setting -> the field that decides whether it means anything, and the values with which it does
_ADAMS = ("adam", "adamw", "nadam", "adam_uncorrected", "lion", "muon")
_NEEDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "momentum": ("name", ("momentum", "nesterov", *_ADAMS)),
    "b2": ("name", (*_ADAMS, "rmsprop", "adadelta")),
    "block": ("name", ("coordinate",)),
    "order": ("name", ("coordinate",)),
    "decay": ("schedule", ("cosine", "exponential", "step", "plateau")),
    "max_norm": ("clipping", tuple(name for name in CLIPPING if name not in _WITHOUT_THRESHOLD)),
}


def check_compatible(o: Optimizer) -> list[str]:
    """What of the settings means nothing to the others, or cannot go with them."""
    told = []
    for setting, (owner, useful) in _NEEDS.items():
        value, chosen = getattr(o, setting), getattr(o, owner)
        if value != Optimizer.__dataclass_fields__[setting].default and chosen not in useful:
            told += [
                f"optimizers: optimizer.{setting} = {value!r} means nothing to optimizer.{owner} = {chosen!r}; leave "
                f"it out, or choose one of {', '.join(useful)}"
            ]
    if o.name == "lbfgs" and o.guard == "spam":
        told += [
            "optimizers: optimizer.guard = 'spam' resets moments, and optimizer.name = 'lbfgs' has none"
        ]
    return told


# -- schedules -------------------------------------------------------------------------------------------


def _step_decay(o: Optimizer, num_steps: int) -> optax.Schedule:
    """At a half and three quarters of the steps, as He et al. 2016 (arXiv 1512.03385, section
    4.2).
    """
    boundaries = {round(fraction * num_steps): o.decay for fraction in (0.5, 0.75)}
    return transforms.piecewise_constant_schedule(o.learning_rate, boundaries)


SCHEDULES: dict[str, Callable[[Optimizer, int], optax.Schedule]] = {
    "constant": lambda o, n: optax.constant_schedule(o.learning_rate),
    "cosine": lambda o, n: transforms.warmup_cosine_decay_schedule(
        o.learning_rate, o.learning_rate, 0, n, o.learning_rate * o.decay
    ),
    "exponential": lambda o, n: transforms.exponential_decay(o.learning_rate, n, o.decay),
    "step": _step_decay,
    "plateau": lambda o, n: optax.constant_schedule(
        o.learning_rate
    ),  # its factor follows the loss, see `build`
    # from a thousandth of the rate to all of it in the first tenth of the steps
    "growth_limited": lambda o, n: transforms.growth_limited_warmup(
        o.learning_rate, o.learning_rate * 1e-3, 1e3 ** (10 / max(n, 10))
    ),
}


def learning_rate(o: Optimizer, num_steps: int) -> optax.Schedule:
    """Step -> rate: the named schedule, times a linear rise over the first `warmup` share of the
    steps.
    """
    schedule = SCHEDULES[o.schedule](o, num_steps)

    def rate(count):
        rise = jnp.asarray(o.warmup, jnp.float32) * num_steps
        risen = jnp.minimum(jnp.asarray(count, jnp.float32) + 1, rise) / jnp.where(
            rise > 0, rise, 1
        )
        return schedule(count) * jnp.where(rise > 1, risen, 1)

    return rate


# -- the chain -------------------------------------------------------------------------------------------


def build(
    o: Optimizer, num_steps: int, max_loss: float | Array = jnp.inf
) -> optax.GradientTransformationExtraArgs:
    """The chain of a config; see the module.

    Args:
      o: `gradjax.config.Optimizer`, whose floats may be traced.
      num_steps: length of the schedule.
      max_loss: a run whose loss is above it is frozen.

    Returns:
      A transform whose `update` takes params and value=loss (L-BFGS also grad= and value_fn=), whose telemetry
      `gradjax.telemetry` reads, and whose last good parameters `gradjax.transforms.last_good_params`.
    """
    clip, direction = CLIPPING[o.clipping](o.max_norm), OPTIMIZERS[o.name](o)
    direction = transforms.spam(direction) if o.guard == "spam" else direction
    decay = (
        1e-4 if o.name == "adamw" and o.weight_decay is None else o.weight_decay
    )  # Optax's default
    parts = [] if o.l1 is None else [optax.masked(transforms.add_l1(o.l1), kernels)]
    parts += [] if o.l2 is None else [optax.add_decayed_weights(o.l2, kernels)]
    parts += [direction, clip] if o.name == "lbfgs" else [clip, direction]
    parts += [] if decay is None else [optax.add_decayed_weights(decay, kernels)]
    parts += [optax.scale_by_learning_rate(learning_rate(o, num_steps))]
    if (
        o.name == "lbfgs"
    ):  # Nocedal & Wright 2006, algorithms 3.5 and 3.6; never beyond the clipped direction
        parts += [
            optax.scale_by_zoom_linesearch(20, max_learning_rate=1.0, initial_guess_strategy="one")
        ]
    if o.schedule == "plateau":
        parts += [
            transforms.reduce_on_plateau(
                o.decay, patience=10, accumulation_size=max(num_steps // 100, 1)
            )
        ]
    parts += [] if o.weight_norm is None else [transforms.max_norm(o.weight_norm, is_stacked)]
    parts += [] if o.weight_clip is None else [transforms.weight_clip(o.weight_clip)]
    patience = 1 if o.guard == "none" else PATIENCE
    return transforms.freeze_diverged(
        GUARDS[o.guard](optax.chain(*parts)), max_value=max_loss, patience=patience
    )
