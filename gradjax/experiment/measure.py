"""Measurements of a configured network at initialisation, over seeds: config -> evidence, Dataset.

Per seed and hidden layer: activation rms, cotangent rms and parameter-gradient norm of one training
batch, measured as for any loss function (`gradjax.diagnosis.evidence`); the largest, smallest and
rms singular value of each layer's Jacobian; and all log singular values of the layer product
(`gradjax.spectrum`), at the batch's first example. Natural logarithms.

The batch and its split depend on `experiment.seed` only, and seed i of the network is the same for
every `num_seeds`. Cost: one compiled program for the signals, O(depth * width^3) per seed for the
spectra.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gradjax.core.extras import needed_for
from gradjax.core.step import Scan, layer_jacobian
from gradjax.diagnosis import measurements
from gradjax.diagnosis.evidence import Evidence
from gradjax.diagnosis.probing import Measurement
from gradjax.experiment import models, tasks, training
from gradjax.experiment.schema import Experiment, Model
from gradjax.experiment.training import Network
from gradjax.spectrum.jacobian import jacobian_spectrum
from gradjax.theory import finite_width

with needed_for("gradjax.experiment.measure"):
    import xarray as xr

PyTree = Any
Variables = dict[str, tuple[tuple[str, ...], np.ndarray]]
Progress = Callable[[str], None]
# Work of the spectra in units of width^3, 30 per layer; two cores do about 2e9 of it per second.
# Above the first limit fewer seeds are measured, above the second (for one seed) none: BatchNorm's
# state is the whole batch.
ALL_SEEDS_WORK = 5e10
ONE_SEED_WORK = 5e11


def _ignore(message: str) -> None:
    """The default of `progress=`."""


def _spectrum_seeds(experiment: Experiment, state_size: int) -> int:
    """How many seeds get spectra: as many as configured, fewer or none above the work limits."""
    asked = min(experiment.diagnose.spectrum_seeds, experiment.diagnose.num_seeds)
    work = 30.0 * experiment.model.depth * state_size**3
    if work > ONE_SEED_WORK:
        return 0
    return min(asked, max(1, int(ALL_SEEDS_WORK // work)))


def _rms(log_values: np.ndarray, size: int) -> np.ndarray:
    """log sqrt(sum e^(2 v) / size) over the last axis."""
    return 0.5 * (np.logaddexp.reduce(2 * log_values, axis=-1) - np.log(size))


def _log_svd(matrices: np.ndarray) -> np.ndarray:
    """Log singular values of matrices; -inf for values within the rounding error of the SVD."""
    values = np.linalg.svd(matrices, compute_uv=False)
    noise = values[..., :1] * max(matrices.shape[-2:]) * np.finfo(np.float64).eps
    return np.log(values, out=np.full_like(values, -np.inf), where=values > noise)


def _links(model: Network, network: tuple[PyTree, Array], x: Array) -> tuple[Any, list]:
    """First state and links of a network, (variables, key of its dropout)."""
    variables, key = network
    return model.links(variables, x, key)


def _spectra(model: Network, networks: tuple, x: Array, num_seeds: int) -> Variables:
    """Singular values per layer and of the product of an MLP; networks have a leading seed axis."""
    thetas = jax.vmap(lambda network: [theta for _, theta in _links(model, network, x)[1]])(
        networks
    )
    # The steps of the first network serve all of them.
    first_network = jax.tree.map(lambda leaf: leaf[0], networks)
    steps = [step for step, _ in _links(model, first_network, x)[1]]
    (embed, theta), *stack = list(zip(steps, thetas, strict=True))[:-1]
    inputs = jnp.broadcast_to(x, (num_seeds, *x.shape))
    jacobian, h = jax.jit(jax.vmap(lambda x, theta: layer_jacobian(embed, x, theta)))(inputs, theta)
    first = _log_svd(np.asarray(jacobian, np.float64))
    largest, smallest, gain = first[:, :1], first[:, -1:], _rms(first, jacobian.shape[2])[:, None]
    variables = {}
    if stack:
        spectrum = jacobian_spectrum(stack[0][0], h, stack[0][1], in_axes=(0, 0), layers=True)
        each = np.asarray(spectrum.layer_log_singular_values)
        largest, smallest = np.hstack([largest, each[..., 0]]), np.hstack([smallest, each[..., -1]])
        gain = np.hstack([gain, spectrum.log_gain])
        variables = _product_variables(np.asarray(spectrum.log_singular_values))
    return variables | {
        "log_singular_value_max": (("spectrum_seed", "layer"), largest),
        "log_singular_value_min": (("spectrum_seed", "layer"), smallest),
        "log_gain": (("spectrum_seed", "layer"), gain),
    }


def _product(model: Network, networks: tuple, x: Array, num_seeds: int) -> Variables:
    """Singular values of the product of all links but input map and read-out, seed by seed."""
    found = []
    for seed in range(num_seeds):
        h0, links = _links(model, jax.tree.map(lambda leaf, i=seed: leaf[i], networks), x)
        h1 = links[0][0](h0, links[0][1])
        found.append(np.asarray(jacobian_spectrum(links[1:-1], h1).log_singular_values))
    return _product_variables(np.stack(found))


def _product_variables(values: np.ndarray) -> Variables:
    """The variables of the product's log singular values (seed, index)."""
    return {
        "log_singular_values": (("spectrum_seed", "index"), values),
        "log_product_rms": (("spectrum_seed",), _rms(values, values.shape[1])),
    }


def _theory(model: Model, batch: tasks.Split, classes: int, anchor: float) -> dict[str, tuple]:
    """The variables `theory_*`; the cotangents' line ends at `anchor`, the last layer's median."""
    predicted = finite_width.predict(model, batch.x, batch.y, classes)
    predicted = predicted._replace(log_cotangent_rms=predicted.log_cotangent_rms + anchor)
    return {
        f"theory_{name}": (("layer",)[: np.ndim(x)], x) for name, x in predicted._asdict().items()
    }


def _largest_state(model: Network, init: Callable, given: tuple, x: Array) -> int:
    """Numbers in the largest state between the links."""

    def find_states(*given):
        h, links = _links(model, init(*given), x)
        found = []
        for link in links[:-1]:
            theta = link[1]
            if isinstance(link, Scan):
                theta = jax.tree.map(lambda x: x[0], theta)
            h = link[0](h, theta)
            found.append(h)
        return found

    states = jax.eval_shape(find_states, *given)
    return max(sum(leaf.size for leaf in jax.tree.leaves(h)) for h in states)


def _evidence(
    model: Network, init: Callable, keys: Array, batch: tasks.Split, train: tasks.Split, depth: int
) -> list[Evidence]:
    """The evidence of every seed, by one compiled program.

    The first `depth` layers are named hidden_1, hidden_2 ...; the others keep the names that
    `gradjax.diagnosis.evidence` finds.
    """

    def loss_fn(params, rest, key, x, y):
        rngs = {"dropout": key}
        logits, _ = model.apply(
            {"params": params, **rest}, x, True, rngs=rngs, mutable=["batch_stats"]
        )
        return training.loss_and_score(logits, y).loss

    @jax.jit
    def make(key: Array, train: tasks.Split) -> tuple:
        variables, dropout_key = init(key, train)
        return variables.pop("params"), (variables, dropout_key, batch.x, batch.y)

    measurement = Measurement(loss_fn, *make(keys[0], train))
    found = [measurement(*make(key, train)) for key in keys]
    named = []
    for one in found:
        hidden = [replace(x, name=f"hidden_{i + 1}") for i, x in enumerate(one.layers[:depth])]
        named.append(replace(one, layers=[*hidden, *one.layers[depth:]]))
    return named


def measure(experiment: Experiment, progress: Progress = _ignore) -> xr.Dataset:
    """The dataset of `examine`."""
    return examine(experiment, progress)[0]


def examine(
    experiment: Experiment, progress: Progress = _ignore
) -> tuple[xr.Dataset, list[Evidence]]:
    """Measure a network at initialisation, or after pre-training if the config has one.

    Args:
      experiment: as `gradjax.config.load` returns it.
      progress: called with a line of text before each long part.

    Returns:
      The dataset, and the evidence of every seed for `gradjax.diagnosis.judge`. The dataset holds
      float64 natural logarithms. Its dimension `layer` is hidden_1 .. hidden_depth for an MLP, else
      the names that `gradjax.diagnosis.evidence` finds; `seed` are the networks, `spectrum_seed`
      the first of them, `index` the singular values in descending order. Variables:

        seed, layer: log_activation_rms, log_cotangent_rms (of d loss / d h, with the batch's mean
          loss), log_gradient_norm (of the parameters of that layer);
        seed: loss, log_gradient_norm_readout;
        spectrum_seed, layer: log_singular_value_max, log_singular_value_min, log_gain (log of the
          rms singular value), for an MLP only;
        spectrum_seed, index: log_singular_values of the product J = J_depth .. J_2;
        spectrum_seed: log_product_rms, their rms;
        layer: theory_log_activation_rms, theory_log_cotangent_rms (from the measured last layer
          on), theory_log_gain; none: theory_log_product_rms: what `gradjax.theory.finite_width`
          predicts, with theory_sd_log_*, the deviation of one network.

      Spectra above the work limit are absent, and the attribute `left_out` says so; `notes` holds
      the warnings of the spectra, `theory` why there is no theory.

    Raises:
      ValueError: a batch larger than the training split, or a missing or damaged data file, which
        the message names.
    """
    depth, num_seeds = experiment.model.depth, experiment.diagnose.num_seeds
    is_mlp = experiment.model.name == "mlp"
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
    evidence = _evidence(model, init, keys, batch, splits.train, depth if is_mlp else 0)
    ds = measurements.dataset(evidence)
    readout = np.array([e.log_gradient[-1] for e in evidence])
    variables = {"log_gradient_norm_readout": (("seed",), readout)}
    no_theory = finite_width.covers(experiment.model)
    if experiment.train.pretrain != "none":
        no_theory = "pre-trained weights are not random"
    if not no_theory:
        last = float(np.median(ds["log_cotangent_rms"].values[:, -1]))
        variables |= _theory(experiment.model, batch, problem.num_outputs, last)

    # With BatchNorm the state is the whole batch.
    x = batch.x if experiment.model.normalization == "batchnorm" else batch.x[0]
    state_size = _largest_state(model, init, (keys[0], splits.train), x)
    spectrum_seeds, left_out, notes = _spectrum_seeds(experiment, state_size), "", []
    if spectrum_seeds:
        progress(f"singular values of {depth} layers and their product, {spectrum_seeds} seeds")
        networks = jax.jit(jax.vmap(init, (0, None)))(keys[:spectrum_seeds], splits.train)
        measure_spectra = _spectra if is_mlp else _product
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            variables |= measure_spectra(model, networks, x, spectrum_seeds)
        notes = [str(each.message) for each in caught if issubclass(each.category, UserWarning)]
    elif experiment.diagnose.spectrum_seeds:
        left_out = (
            f"spectra of {depth} layers\nwith {state_size} entries each: above the work limit"
        )
    attrs = {
        "left_out": left_out,
        "notes": "\n".join(notes),
        "theory": no_theory,
        "width": experiment.model.width,
    }
    return ds.assign(variables).assign_attrs(attrs), evidence
