"""Measurements of a configured network at initialisation, over seeds: config -> evidence, Dataset.

Per seed and hidden layer: activation rms, cotangent rms and parameter-gradient norm of one training
batch, on the path that any loss function takes (`gradjax.diagnosis.evidence`); per layer Jacobian
its largest, smallest and rms singular value; of the layer product all log singular values
(`gradjax.spectrum`), at the batch's first example. Natural logarithms.

The batch and its split depend on `experiment.seed` alone; seed i of the network is the same
whatever `num_seeds` is. Cost: one compiled program for the signals, O(depth * width^3) per seed for
the spectra.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array

from gradjax.core.step import Scan, layer_jacobian
from gradjax.diagnosis import measurements
from gradjax.diagnosis.evidence import Evidence, Measurement
from gradjax.experiment import models, tasks, training
from gradjax.experiment.schema import Experiment, Model
from gradjax.spectrum.jacobian import jacobian_spectrum
from gradjax.theory import finite_width

PyTree = Any
# Work of the spectra in units of width^3, 30 per layer: some 2e9 a second on two cores.
ALL_SEEDS_WORK = 5e10  # fewer seeds beyond it
ONE_SEED_WORK = (
    5e11  # none where one seed alone is beyond it (BatchNorm's state is the whole batch)
)


def _spectrum_seeds(experiment: Experiment, state_size: int) -> int:
    """How many seeds get their spectra: as many as asked for within the work above, one at least,
    or none.
    """
    asked = min(experiment.diagnose.spectrum_seeds, experiment.diagnose.num_seeds)
    work = 30.0 * experiment.model.depth * state_size**3
    return 0 if work > ONE_SEED_WORK else min(asked, max(1, int(ALL_SEEDS_WORK // work)))


def _rms(log_values: np.ndarray, size: int) -> np.ndarray:
    """log sqrt(sum e^(2 v) / size) over the last axis."""
    return 0.5 * (np.logaddexp.reduce(2 * log_values, axis=-1) - np.log(size))


def _log_svd(matrices: np.ndarray) -> np.ndarray:
    """Log singular values of single matrices; -inf at and below the rounding error of their
    decomposition.
    """
    values = np.linalg.svd(matrices, compute_uv=False)
    noise = values[..., :1] * max(matrices.shape[-2:]) * np.finfo(np.float64).eps
    return np.log(values, out=np.full_like(values, -np.inf), where=values > noise)


def _links(model: Any, network: tuple[PyTree, Array], x: Array) -> tuple[Any, list]:
    """First state and links of (variables, key of its dropout)."""
    variables, key = network
    return model.links(variables, x, key)


def _spectra(
    model: Any, networks: tuple, x: Array, lanes: int
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Singular values per layer and of the product of an MLP; the networks have a leading seed
    axis.
    """
    thetas = jax.vmap(lambda network: [theta for _, theta in _links(model, network, x)[1]])(
        networks
    )
    one = _links(model, jax.tree.map(lambda leaf: leaf[0], networks), x)[
        1
    ]  # its steps serve every lane
    (embed, theta), *stack = [(step, theta) for (step, _), theta in zip(one, thetas, strict=True)][
        :-1
    ]
    inputs = jnp.broadcast_to(x, (lanes, *x.shape))
    jacobian, h = jax.jit(jax.vmap(lambda x, theta: layer_jacobian(embed, x, theta)))(inputs, theta)
    first = _log_svd(np.asarray(jacobian, np.float64))
    largest, smallest, gain = first[:, :1], first[:, -1:], _rms(first, jacobian.shape[2])[:, None]
    variables = {}
    if stack:
        spectrum = jacobian_spectrum(stack[0][0], h, stack[0][1], in_axes=(0, 0), layers=True)
        each = np.asarray(spectrum.layer_log_singular_values)
        largest, smallest = np.hstack([largest, each[..., 0]]), np.hstack([smallest, each[..., -1]])
        gain = np.hstack([gain, spectrum.log_gain])
        values = np.asarray(spectrum.log_singular_values)
        variables["log_singular_values"] = (("spectrum_seed", "index"), values)
        variables["log_product_rms"] = (("spectrum_seed",), _rms(values, values.shape[1]))
    return variables | {
        "log_singular_value_max": (("spectrum_seed", "layer"), largest),
        "log_singular_value_min": (("spectrum_seed", "layer"), smallest),
        "log_gain": (("spectrum_seed", "layer"), gain),
    }


def _theory(model: Model, batch: tasks.Split, classes: int, anchor: float) -> dict[str, tuple]:
    """The variables `theory_*`, the cotangents' line through the last layer's median."""
    predicted = finite_width.predict(model, batch.x, batch.y, classes)
    predicted = predicted._replace(log_cotangent_rms=predicted.log_cotangent_rms + anchor)
    return {
        f"theory_{name}": (("layer",)[: np.ndim(x)], x) for name, x in predicted._asdict().items()
    }


def _largest_state(model: Any, init: Callable, given: tuple, x: Array) -> int:
    """Numbers in the largest state between the links."""

    def states(*given):
        h, links = _links(model, init(*given), x)
        found = []
        for link in links[:-1]:
            theta = jax.tree.map(lambda x: x[0], link[1]) if isinstance(link, Scan) else link[1]
            found.append(h := link[0](h, theta))
        return found

    return max(
        sum(leaf.size for leaf in jax.tree.leaves(h)) for h in jax.eval_shape(states, *given)
    )


def _product(
    model: Any, networks: tuple, x: Array, lanes: int
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Singular values of the product of all links but the input map and the read-out, network by
    network.
    """
    found = []
    for seed in range(lanes):
        h0, links = _links(model, jax.tree.map(lambda leaf, i=seed: leaf[i], networks), x)
        h1 = links[0][0](h0, links[0][1])
        found.append(np.asarray(jacobian_spectrum(links[1:-1], h1).log_singular_values))
    values = np.stack(found)
    return {
        "log_singular_values": (("spectrum_seed", "index"), values),
        "log_product_rms": (("spectrum_seed",), _rms(values, values.shape[1])),
    }


def _evidence(
    model: Any, init: Callable, keys: Array, batch: tasks.Split, train: tasks.Split, depth: int
) -> list[Evidence]:
    """The evidence of every seed, by one compiled program; `depth` hidden layers are called
    hidden_1, hidden_2 ...
    """

    def loss_fn(params, rest, key, x, y):
        rngs = {"dropout": key}
        logits, _ = model.apply(
            {"params": params, **rest}, x, True, rngs=rngs, mutable=["batch_stats"]
        )
        return training.loss_and_score(logits, y).loss

    def network(key: Array, train: tasks.Split) -> tuple:
        variables, dropout_key = init(key, train)
        return variables.pop("params"), (variables, dropout_key, batch.x, batch.y)

    make = jax.jit(network)
    examination = Measurement(loss_fn, *make(keys[0], train))
    found = [examination(*make(key, train)) for key in keys]
    rename = lambda layers: [
        replace(x, name=f"hidden_{i + 1}") if i < depth else x for i, x in enumerate(layers)
    ]
    return [replace(e, layers=rename(e.layers)) for e in found]


def measure(
    experiment: Experiment, progress: Callable[[str], None] = lambda message: None
) -> xr.Dataset:
    """The dataset of `examine`."""
    return examine(experiment, progress)[0]


def examine(
    experiment: Experiment, progress: Callable[[str], None] = lambda message: None
) -> tuple[xr.Dataset, list[Evidence]]:
    """Measure the network of a checked config at initialisation, pre-trained where the config asks
    for it.

    Args:
      experiment: as `gradjax.config.load` returns it.
      progress: called with a line of text before each long part.

    Returns:
      (dataset, evidence of every seed for `gradjax.diagnosis.judge`). The dataset holds float64 natural logarithms.
      Dimension `layer` is hidden_1 .. hidden_depth (of an MLP; else the names that `gradjax.diagnosis.evidence` finds), `seed`
      the networks, `spectrum_seed` the first of them, `index` the singular values in descending order:
        log_activation_rms, log_cotangent_rms (of d loss / d h, the batch's mean loss), log_gradient_norm (of the
        parameters of that layer): (seed, layer); loss, log_gradient_norm_readout: (seed,);
        log_singular_value_max, log_singular_value_min, log_gain (log rms singular value): (spectrum_seed, layer);
        log_singular_values of the product J = J_depth .. J_2: (spectrum_seed, index), log_product_rms their rms;
        theory_log_activation_rms, theory_log_cotangent_rms (from the measured last layer on), theory_log_gain:
        (layer,), theory_log_product_rms: (): what `gradjax.theory.finite_width` expects; theory_sd_log_*: one network's deviation.
      What was too dear to compute is absent, and the attribute `left_out` says so; `notes` holds what the spectra warn
      of, `theory` why there is no theory.

    Raises:
      ValueError: a batch larger than the training split; `gradjax.tasks` names missing and damaged
        files.
    """
    depth, num_seeds = experiment.model.depth, experiment.diagnose.num_seeds
    progress(f"reading {experiment.task.name}")
    data_key, model_key = jax.random.split(jax.random.key(experiment.seed))
    splits = training.splits_of(experiment)
    batch = tasks.batch_at(splits.train, data_key, 0, experiment.task.batch_size)
    problem = training.problem_of(experiment, splits)
    model = models.build(experiment.model, problem.num_outputs, problem.per_step)

    def init(key: Array, train: tasks.Split) -> tuple:
        return training.start(key, model, experiment, batch, train), jax.random.split(key)[1]

    progress(f"signals of {num_seeds} seeds, {depth} layers")
    keys = jax.vmap(lambda i: jax.random.fold_in(model_key, i))(jnp.arange(num_seeds))
    evidence = _evidence(
        model, init, keys, batch, splits.train, depth if experiment.model.name == "mlp" else 0
    )
    ds = measurements.dataset(evidence)
    variables = {
        "log_gradient_norm_readout": (("seed",), np.array([e.log_gradient[-1] for e in evidence]))
    }
    last = ds["log_cotangent_rms"].values[:, -1]
    no_theory = "" if experiment.train.pretrain == "none" else "pre-trained weights are not random"
    no_theory = no_theory or finite_width.covers(experiment.model)
    if not no_theory:
        variables |= _theory(experiment.model, batch, problem.num_outputs, float(np.median(last)))

    coupled = experiment.model.normalization == "batchnorm"  # then the state is the batch
    x = batch.x if coupled else batch.x[0]
    state_size = _largest_state(model, init, (keys[0], splits.train), x)
    lanes, left_out, notes = _spectrum_seeds(experiment, state_size), "", []
    if lanes:
        progress(f"singular values of {depth} layers and their product, {lanes} seeds")
        networks = jax.jit(jax.vmap(init, (0, None)))(keys[:lanes], splits.train)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            variables |= (_spectra if experiment.model.name == "mlp" else _product)(
                model, networks, x, lanes
            )
        notes = [
            str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)
        ]
    elif experiment.diagnose.spectrum_seeds:
        left_out = f"spectra of {depth} layers\nwith {state_size} entries each: too dear"
    attrs = {
        "left_out": left_out,
        "notes": "\n".join(notes),
        "theory": no_theory,
        "width": experiment.model.width,
    }
    return ds.assign(variables).assign_attrs(attrs), evidence
