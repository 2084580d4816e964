"""What every model keeps; a new model is one line in the table of its test file."""

import jax
import jax.numpy as jnp
import numpy as np

from gradjax.core.step import Scan, check_step, signals
from gradjax.experiment import config, models, training
from gradjax.spectrum.jacobian import jacobian_spectrum


def build(name, num_outputs=10, per_step=False, **settings):
    """The model of a checked config."""
    values = {f"model.{key}": value for key, value in {"name": name, **settings}.items()}
    experiment = config.replace(config.Experiment(), values)
    config.check(experiment)
    return models.build(experiment.model, num_outputs, per_step)


def init(model, key, x):
    return jax.jit(lambda key, x: model.init({"params": key, "dropout": key}, x, train=True))(
        key, x
    )


def apply(model, variables, x, key, train=True):
    if not train:
        return model.apply(variables, x, train=False)
    return model.apply(variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"])[0]


def run(h, links):
    """The last state of a list of links."""
    for link in links:
        if isinstance(link, Scan):
            h = jax.lax.scan(
                lambda h, theta, step=link.step: (step(h, theta), None), h, link.thetas
            )[0]
        else:
            h = link[0](h, link[1])
    return h


def check_contract(model, x, key, y=None, *, tolerance=1e-5):
    """Shapes, jit, seeds under vmap, finite gradients, and links that are the network with finite
    signals."""
    variables = init(model, key, x)
    per_step = getattr(model, "per_step", False)
    shape = (*x.shape[: 2 if per_step else 1], model.num_outputs)
    y = jnp.zeros(shape[:-1], jnp.int32) if y is None else y
    for train in (True, False):
        assert apply(model, variables, x, key, train).shape == shape

    def loss(params):
        return training.loss_and_score(
            apply(model, {**variables, "params": params}, x, key), y
        ).loss

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradients))
    assert any(bool((g != 0).any()) for g in jax.tree.leaves(gradients))
    keys = jax.random.split(key, 2)
    seeds = jax.jit(jax.vmap(lambda key: apply(model, init(model, key, x), x, key)))(keys)
    assert seeds.shape == (2, *shape) and not np.array_equal(seeds[0], seeds[1])

    h0, links = model.links(variables, x, key)
    last, wanted = (y[:, -1] if per_step else y), apply(model, variables, x, key)
    out = run(h0, links)
    assert out.shape == (x.shape[0], model.num_outputs)
    if getattr(model, "dropout", None) is None:  # its masks are drawn from other keys
        np.testing.assert_allclose(
            out, wanted[:, -1] if per_step else wanted, atol=tolerance, rtol=tolerance
        )
    loss = lambda logits: training.loss_and_score(logits, last).loss
    seen = jax.jit(lambda h0: signals(links, h0, loss=loss))(
        h0
    )  # op by op it takes three times as long
    assert seen.log_activation_rms.shape[0] == check_step(links, h0) + 1
    assert bool(jnp.isfinite(seen.log_cotangent_rms[1:]).all())


def check_spectrum(model, x, key):
    """One example's states between input map and read-out have a spectrum, descending and of the
    state's size."""
    variables = init(model, key, x)
    h0, links = model.links(variables, x[0], key)
    h1 = run(h0, links[:1])
    found = jacobian_spectrum(links[1:-1], h1)
    values = np.asarray(found.log_singular_values)
    assert np.isfinite(values[0]) and np.all(np.diff(values[np.isfinite(values)]) <= 0)
