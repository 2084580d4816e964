"""From a config to one Optax chain: guard, clipping, optimiser, regularisation, schedule.

    g -> [+ l1 sign W + l2 W] -> clipping -> direction -> [+ weight_decay W] -> * -rate(t)
      -> projections of the weights

The guard is wrapped around this chain (spam only around the direction, because it restarts what it
wraps now and then). `freeze_diverged` is wrapped around everything: it gives up a diverged run and
keeps its last good parameters, at the first gradient or loss that is not finite, or, with a guard,
after `PATIENCE` of them in a row. L-BFGS is the exception: a clipped gradient is not a gradient of
the loss that its secant pairs and line search measure (Optax issue 1201), so its *direction* is
clipped. Every float of `gradjax.config.Optimizer` may be traced.

Regularisation acts on kernels, not on biases or the scales of norms. A leaf below `layers` is the
stack of a scan, whose layers the per-layer rules treat one by one.
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
from gradjax.transforms.rule import RuleState

PyTree = Any
# Steps. Our choice: guards absorb an occasional bad batch, not a diverged run.
PATIENCE = 20


def is_stacked(path: str) -> bool:
    """Whether the leaf at this key path holds the stacked layers of a scan in our models."""
    return "['layers']" in path


def kernels(params: PyTree) -> PyTree:
    """A tree of bools: which leaves are matrices of weights."""

    def is_kernel(path, _):
        return "['kernel']" in jax.tree_util.keystr(path)

    return jax.tree_util.tree_map_with_path(is_kernel, params)


# Directions


def _pick(value: Any, default: float) -> Any:
    return default if value is None else value


def adam_uncorrected(
    b1: float | Array = 0.9, b2: float | Array = 0.999
) -> optax.GradientTransformation:
    """Adam without bias correction (Kingma & Ba 2015, arXiv 1412.6980, section 3).

    Optax's rule, started at a step count for which 1 - b^t is 1 to the last bit.
    """
    adam = optax.scale_by_adam(b1, b2)
    late = jnp.asarray(2**30, jnp.int32)

    def init(params):
        return optax.tree.set(adam.init(params), count=late)

    return optax.GradientTransformation(init, adam.update)


def _muon(o: Optimizer) -> optax.GradientTransformation:
    """Muon for the kernels before the read-out, layer by layer in a stack; Adam for all else."""

    def find_axes(path, x):
        name = jax.tree_util.keystr(path)
        if "['kernel']" not in name or "['readout']" in name:
            return None
        first = x.ndim - 2
        return optax.contrib.MuonDimensionNumbers(reduction_axis=first, output_axis=first + 1)

    def dimensions(params):
        return jax.tree_util.tree_map_with_path(find_axes, params)

    muon = optax.contrib.muon(
        1.0,
        beta=_pick(o.momentum, 0.95),
        adam_b2=_pick(o.b2, 0.999),
        muon_weight_dimension_numbers=dimensions,
    )
    # The other optimisers here return a direction to be scaled by -rate; Muon's has that sign.
    return optax.chain(muon, optax.scale(-1.0))


def coordinate_descent(block: str = "layer", order: str = "cyclic") -> optax.GradientTransformation:
    """The gradient of one block of parameters at a time, zero elsewhere.

    Args:
      block: "layer" (the leaves of one module; the layers of a scanned stack are separate blocks)
        or "coordinate" (one number).
      order: "cyclic", or "random": uniform with replacement, with the same draws for every seed of
        the network.

    References:
      Nesterov 2012, Efficiency of coordinate descent methods on huge-scale optimization problems,
      SIAM J. Optim. 22 (random order); Wright 2015, arXiv 1502.04759 (a survey).
    """
    number = _number_coordinates if block == "coordinate" else _number_layers

    def init_fn(params):
        return jnp.zeros((), jnp.int32)

    def update_fn(updates, state, params=None):
        count, (numbers, total) = state, number(updates)
        if order == "random":
            key = jax.random.fold_in(jax.random.key(0), count)
            chosen = jax.random.randint(key, (), 0, max(total, 1), jnp.int32)
        else:
            chosen = count % max(total, 1)
        leaves, structure = jax.tree.flatten(updates)
        kept = [
            jnp.where(jnp.asarray(n) == chosen, x, jnp.zeros_like(x))
            for n, x in zip(numbers, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, kept), count + 1

    return optax.GradientTransformation(init_fn, update_fn)  # type: ignore[arg-type]


def _number_coordinates(params: PyTree) -> tuple[list[np.ndarray], int]:
    """For each leaf the numbers of its entries, and how many numbers there are."""
    numbers, count = [], 0
    for x in jax.tree.leaves(params):
        numbers.append(np.arange(count, count + x.size, dtype=np.int32).reshape(x.shape))
        count += x.size
    return numbers, count


def _number_layers(params: PyTree) -> tuple[list[np.ndarray], int]:
    """For each leaf the number of its block, or of each layer's block; and how many blocks."""
    numbers, names, count = [], {}, 0
    for path, x in jax.tree_util.tree_flatten_with_path(params)[0]:
        is_stack = is_stacked(jax.tree_util.keystr(path))
        module, size = jax.tree_util.keystr(path[:-1]), x.shape[0] if is_stack else 1
        if (module, size) not in names:
            names[module, size] = count
            count += size
        first = names[module, size]
        own = np.arange(first, first + size, dtype=np.int32)
        numbers.append(own.reshape(-1, *[1] * (x.ndim - 1)) if is_stack else own[0])
    return numbers, count


OPTIMIZERS: dict[str, Callable[[Optimizer], optax.GradientTransformation]] = {
    "sgd": lambda o: optax.identity(),
    "momentum": lambda o: optax.trace(_pick(o.momentum, 0.9)),
    "nesterov": lambda o: optax.trace(_pick(o.momentum, 0.9), nesterov=True),
    "adam": lambda o: optax.scale_by_adam(_pick(o.momentum, 0.9), _pick(o.b2, 0.999)),
    "adamw": lambda o: optax.scale_by_adam(_pick(o.momentum, 0.9), _pick(o.b2, 0.999)),
    "nadam": lambda o: optax.scale_by_adam(
        _pick(o.momentum, 0.9), _pick(o.b2, 0.999), nesterov=True
    ),
    "adam_uncorrected": lambda o: adam_uncorrected(_pick(o.momentum, 0.9), _pick(o.b2, 0.999)),
    "rmsprop": lambda o: optax.scale_by_rms(_pick(o.b2, 0.9)),
    "adagrad": lambda o: optax.scale_by_rss(initial_accumulator_value=0.1, eps=1e-7),
    "adadelta": lambda o: optax.scale_by_adadelta(_pick(o.b2, 0.9)),
    "lion": lambda o: optax.scale_by_lion(_pick(o.momentum, 0.9), _pick(o.b2, 0.99)),
    "muon": _muon,
    "lbfgs": lambda o: optax.scale_by_lbfgs(),
    "coordinate": lambda o: coordinate_descent(o.block, o.order),
}

_WITHOUT_THRESHOLD = ("none", "autoclip", "historical_clip", "zclip")
# name -> rule of one threshold, `optimizer.max_norm`; for everything else the adaptive rules take
# their papers' defaults
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
    # `build` wraps it around the direction only.
    "spam": lambda tx: tx,
}

_ADAMS = ("adam", "adamw", "nadam", "adam_uncorrected", "lion", "muon")
# setting -> the field that decides whether it has a meaning, and the values with which it has
_NEEDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "momentum": ("name", ("momentum", "nesterov", *_ADAMS)),
    "b2": ("name", (*_ADAMS, "rmsprop", "adadelta")),
    "block": ("name", ("coordinate",)),
    "order": ("name", ("coordinate",)),
    "decay": ("schedule", ("cosine", "exponential", "step", "plateau")),
    "max_norm": ("clipping", tuple(name for name in CLIPPING if name not in _WITHOUT_THRESHOLD)),
}


def check_compatible(o: Optimizer) -> list[str]:
    """One message per setting that has no meaning beside the others, or cannot go with them."""
    problems = []
    defaults = Optimizer()
    for setting, (owner, useful) in _NEEDS.items():
        value, chosen = getattr(o, setting), getattr(o, owner)
        if value != getattr(defaults, setting) and chosen not in useful:
            problems.append(
                f"optimizers: optimizer.{setting} = {value!r} means nothing to optimizer.{owner} = "
                f"{chosen!r}; leave it out, or choose one of {', '.join(useful)}"
            )
    if o.name == "lbfgs" and o.guard == "spam":
        problems.append(
            "optimizers: optimizer.guard = 'spam' resets moments, and optimizer.name = 'lbfgs' has "
            "none"
        )
    return problems


def find_clipping_rules(o: Optimizer, params: PyTree) -> set[str]:
    """The names under which the clipping rule of a config reports its telemetry."""
    state = jax.eval_shape(CLIPPING[o.clipping](o.max_norm).init, params)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, RuleState))
    return {node.rule for node in nodes if isinstance(node, RuleState)}


# Schedules


def _step_decay(o: Optimizer, num_steps: int) -> optax.Schedule:
    """Reductions at 1/2 and 3/4 of the steps (He et al. 2016, arXiv 1512.03385, section 4.2)."""
    boundaries = {round(fraction * num_steps): o.decay for fraction in (0.5, 0.75)}
    return transforms.piecewise_constant_schedule(o.learning_rate, boundaries)


SCHEDULES: dict[str, Callable[[Optimizer, int], optax.Schedule]] = {
    "constant": lambda o, n: optax.constant_schedule(o.learning_rate),
    "cosine": lambda o, n: transforms.warmup_cosine_decay_schedule(
        o.learning_rate, o.learning_rate, 0, n, o.learning_rate * o.decay
    ),
    "exponential": lambda o, n: transforms.exponential_decay(o.learning_rate, n, o.decay),
    "step": _step_decay,
    # `build` adds the factor that follows the loss.
    "plateau": lambda o, n: optax.constant_schedule(o.learning_rate),
    # From a thousandth of the rate to the whole of it over the first tenth of the steps.
    "growth_limited": lambda o, n: transforms.growth_limited_warmup(
        o.learning_rate, o.learning_rate * 1e-3, 1e3 ** (10 / max(n, 10))
    ),
}


def learning_rate(o: Optimizer, num_steps: int) -> optax.Schedule:
    """Step -> rate: the named schedule, times the linear rise of `warmup`."""
    schedule = SCHEDULES[o.schedule](o, num_steps)

    def rate(count):
        rise = jnp.asarray(o.warmup, jnp.float32) * num_steps
        steps = jnp.asarray(count, jnp.float32) + 1
        risen = jnp.minimum(steps, rise) / jnp.where(rise > 0, rise, 1)
        return schedule(count) * jnp.where(rise > 1, risen, 1)

    return rate


# The chain


def build(
    o: Optimizer, num_steps: int, max_loss: float | Array = jnp.inf
) -> optax.GradientTransformationExtraArgs:
    """The chain of a config; see the module.

    Args:
      o: the optimiser of a config, whose floats may be traced.
      num_steps: length of the schedule.
      max_loss: a run with a larger loss is frozen.

    Returns:
      A transform whose `update` takes params and value=loss (L-BFGS also grad= and value_fn=).
      `gradjax.telemetry` reads its telemetry, and `gradjax.transforms.last_good_params` its last
      good parameters.
    """
    chain = optax.chain(*_links(o, num_steps))
    patience = 1 if o.guard == "none" else PATIENCE
    return transforms.freeze_diverged(GUARDS[o.guard](chain), max_value=max_loss, patience=patience)


def _links(o: Optimizer, num_steps: int) -> list[optax.GradientTransformation]:
    """The links of the chain inside the guard, in order."""
    clip, direction = CLIPPING[o.clipping](o.max_norm), OPTIMIZERS[o.name](o)
    if o.guard == "spam":
        direction = transforms.spam(direction)
    decay = o.weight_decay
    if o.name == "adamw" and decay is None:
        decay = 1e-4  # Optax's default
    links = []
    if o.l1 is not None:
        links.append(optax.masked(transforms.add_l1(o.l1), kernels))
    if o.l2 is not None:
        links.append(optax.add_decayed_weights(o.l2, kernels))
    links += [direction, clip] if o.name == "lbfgs" else [clip, direction]
    if decay is not None:
        links.append(optax.add_decayed_weights(decay, kernels))
    links.append(optax.scale_by_learning_rate(learning_rate(o, num_steps)))
    if o.name == "lbfgs":
        # Nocedal & Wright 2006, algorithms 3.5 and 3.6; never beyond the clipped direction.
        links.append(
            optax.scale_by_zoom_linesearch(20, max_learning_rate=1.0, initial_guess_strategy="one")
        )
    if o.schedule == "plateau":
        window = max(num_steps // 100, 1)
        links.append(transforms.reduce_on_plateau(o.decay, patience=10, accumulation_size=window))
    if o.weight_norm is not None:
        links.append(transforms.max_norm(o.weight_norm, is_stacked))
    if o.weight_clip is not None:
        links.append(transforms.weight_clip(o.weight_clip))
    return links
