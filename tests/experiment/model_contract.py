"""What every model keeps; the table of the models is in test_models.py."""

import jax
import jax.numpy as jnp
import numpy as np

from bounds import assert_rounding
from gradjax.core.step import Scan, check_step, signals
from gradjax.experiment import config, models, training
from gradjax.experiment.tasks.graphs import communities
from gradjax.spectrum.jacobian import jacobian_spectrum

OUTPUTS = 5


def settings_of(name, **settings):
    """The checked `gradjax.config.Model` of this name."""
    values = {f"model.{key}": value for key, value in {"name": name, **settings}.items()}
    experiment = config.replace(config.Experiment(), values)
    config.check(experiment)
    return experiment.model


def build(name, num_outputs=OUTPUTS, per_step=False, **settings):
    """The model of a checked config."""
    return models.build(settings_of(name, **settings), num_outputs, per_step)


def started(model, key, x):
    """Variables in training mode, not compiled: call it inside jit or `eval_shape`."""
    return model.init({"params": key, "dropout": key}, x, train=True)


def init(model, key, x):
    return jax.jit(lambda key, x: started(model, key, x))(key, x)


def apply(model, variables, x, key, train=True):
    if not train:
        return model.apply(variables, x, train=False)
    return model.apply(variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"])[0]


def run(h, links):
    """The last state of a list of links."""

    def stack(h, link):
        return jax.lax.scan(lambda h, theta: (link.step(h, theta), None), h, link.thetas)[0]

    for link in links:
        h = stack(h, link) if isinstance(link, Scan) else link[0](h, link[1])
    return h


def example_of(model, key):
    """A batch (x, y) of the first kind of data that the model takes: images, sequences, graphs."""
    numbers = np.random.default_rng(0).normal(size=4 * 64).astype(np.float32)
    kinds = (
        lambda: numbers.reshape(4, 64),
        lambda: numbers[: 4 * 6 * 3].reshape(4, 6, 3),
        lambda: jax.jit(lambda key: communities(key, 3, nodes=8).x)(key),
    )
    keys, reasons = {"params": key, "dropout": key}, []
    for kind in kinds:
        x = jnp.asarray(kind())
        try:
            out = jax.eval_shape(lambda x: model.init_with_output(keys, x)[0], x)
        except ValueError as reason:
            reasons.append(str(reason))
            continue
        per_step = getattr(model, "per_step", False)
        assert out.shape == (*x.shape[: 1 + per_step], OUTPUTS)
        return x, jnp.asarray(np.arange(np.prod(out.shape[:-1])).reshape(out.shape[:-1]) % OUTPUTS)
    raise AssertionError(f"no data for this model: {reasons}")


def roundings(params):
    """Roundings from the inputs to the logits: the terms of all sums, and 20 per parameter."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    kernels = [leaf for path, leaf in leaves if "kernel" in jax.tree_util.keystr(path)]
    return sum(int(np.prod(leaf.shape[:-1])) for leaf in kernels) + 20 * len(leaves)


def check_contract(model, x, key, y):
    """Shapes in both modes, seeds under vmap in one program, finite gradients, and links that are
    the network with finite signals.
    """
    per_step = getattr(model, "per_step", False)

    def everything(key):
        variables = started(model, key, x)

        def loss(params):
            return training.loss_and_score(
                apply(model, {**variables, "params": params}, x, key), y
            ).loss

        h0, links = model.links(variables, x, key)
        last = y[:, -1] if per_step else y
        seen = signals(links, h0, loss=lambda z: training.loss_and_score(z, last).loss)
        assert seen.log_activation_rms.shape[0] == check_step(links, h0) + 1
        return {
            "params": variables["params"],
            "train": apply(model, variables, x, key),
            "test": apply(model, variables, x, key, train=False),
            "gradients": jax.grad(loss)(variables["params"]),
            "links": run(h0, links),
            "cotangents": seen.log_cotangent_rms,
        }

    seen = jax.jit(jax.vmap(everything))(jax.random.split(key, 2))
    shape = (2, *x.shape[: 1 + per_step], model.num_outputs)
    assert seen["train"].shape == seen["test"].shape == shape
    assert not np.array_equal(seen["train"][0], seen["train"][1])
    gradients = [np.asarray(g) for g in jax.tree.leaves(seen["gradients"])]
    assert all(np.isfinite(g).all() for g in gradients) and any((g != 0).any() for g in gradients)
    assert np.isfinite(seen["cotangents"][:, 1:]).all()
    assert seen["links"].shape == (2, x.shape[0], model.num_outputs)
    if getattr(model, "dropout", None) is None:  # its masks are drawn from other keys
        wanted = seen["train"][:, :, -1] if per_step else seen["train"]
        one_seed = jax.tree.map(lambda leaf: leaf[0], seen["params"])
        assert_rounding(seen["links"], wanted, terms=roundings(one_seed))


def check_spectrum(model, x, key):
    """The states of one example between input map and read-out have a descending spectrum."""
    variables = init(model, key, x)
    h0, links = model.links(variables, x[0], key)
    h1 = jax.jit(lambda h0: run(h0, links[:1]))(h0)
    values = np.asarray(jacobian_spectrum(links[1:-1], h1).log_singular_values)
    assert np.isfinite(values[0]) and np.all(np.diff(values[np.isfinite(values)]) <= 0)
