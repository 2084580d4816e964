"""One network written in many ways, and values and cotangents by perturbations put in by hand."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from bounds import gamma
from gradjax import probe

# Roundings between two computations of an entry, forwards and backwards through at most four
# layers: a product of at most 6 terms, a bias and a function of a few ulp are 12 for each layer and
# direction, and errors grow at most tenfold on the way: 2 * 4 * 12 * 10.
ROUNDINGS = 1000


def at_once(net, *args, **options):
    """`probe` as one compiled program: eagerly, each operation would be compiled by itself."""
    return jax.jit(functools.partial(probe, net, **options))(*args)


def plainly(net, params, *args):
    """(loss, values, cotangents, grads) of net(at, params, *args), which says at(h, name)."""

    def record(params):
        values = {}

        def at(h, name):
            assert name not in values
            values[name] = h
            return h

        net(at, params, *args)
        return values

    def moved(params, perturbations):
        values = {}

        def at(h, name):
            values[name] = h
            return h + perturbations[name]

        return net(at, params, *args), values

    def whole(params, zeros):
        return jax.value_and_grad(moved, (0, 1), has_aux=True)(params, zeros)

    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(record, params))
    (loss, values), (grads, cotangents) = jax.jit(whole)(params, zeros)
    return loss, values, cotangents, grads


def x64(on=True):
    return jax.enable_x64(on) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64(on)


def error(a, b):
    """Largest difference relative to the largest entry."""
    a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
    assert a.shape == b.shape
    return float(np.abs(a - b).max(initial=0.0) / max(np.abs(b).max(initial=0.0), 1e-30))


def rows_of(found, name):
    """The value that `plainly` calls "h[1,2]" is row (1, 2) of the probe's h."""
    base, index = re.fullmatch(r"([^\[]*)(?:\[([\d,]+)\])?", name).groups()
    return found[base][tuple(map(int, index.split(",")))] if index else found[base]


def agree(found, expected, report, roundings=ROUNDINGS):
    """A probe against what `plainly` returned."""
    loss, values, cotangents, grads = expected
    errors = [error(found.loss, loss)]
    assert set(found.values) == {name.partition("[")[0] for name in values}
    assert set(found.cotangents) == set(found.values)
    for name in values:
        errors += [error(rows_of(found.values, name), values[name])]
        errors += [error(rows_of(found.cotangents, name), cotangents[name])]
    errors += jax.tree.leaves(jax.tree.map(error, found.grads, grads))
    report("probe against perturbations by hand", max(errors))
    assert max(errors) < 2 * gamma(roundings, found.loss.dtype)


def mean_square(h):
    return jnp.mean(jnp.square(h)) + jnp.sum(h[0]) * 0.1


def layer(at, h, w, name):
    return at(jnp.sin(at(h @ w, f"{name}z") + 0.3), f"{name}h")


def filled(tree, seed=0):
    """`tree` with random numbers in the place of its shapes, without compiling an initialiser."""
    rng = np.random.default_rng(seed)

    def fill(x):
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        return jnp.asarray(0.5 * rng.standard_normal(x.shape), x.dtype)

    return jax.tree.map(fill, tree)


def equinox(make):
    """An Equinox model with random numbers: make(key), without compiling its initialisers."""
    import equinox as eqx

    return filled(eqx.filter_eval_shape(lambda: make(jax.random.key(0))))
