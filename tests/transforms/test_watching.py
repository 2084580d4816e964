"""`watch`: what it measures, what it keeps, and what `telemetry` reads of it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transforms.stepping import GRADS, adam, run, spoiled

from gradjax.transforms import guards, telemetry, watching


def is_stack(path):
    return "layers" in path


def test_watch_measures_every_layer_of_a_stack():
    params = {"layers": jnp.full((3, 4), 2.0), "head": jnp.full((2, 2), 1e-30)}
    grads = {
        "layers": np.outer([1e-40, 1.0, 1e38], np.ones(4)).astype(np.float32),
        "head": np.zeros((2, 2), np.float32),
    }
    tx = watching.watch(optax.sgd(0.5), stacked=is_stack)
    _, state = tx.update(grads, tx.init(params), params)
    seen = {k.removeprefix("0.watch/"): v for k, v in telemetry(state).items()}
    expected = np.log2(2 * np.array([1e-40, 1.0, 1e38]))
    np.testing.assert_allclose(seen["log2_grad/['layers']"], expected, rtol=1e-5)
    np.testing.assert_allclose(seen["log2_update/['layers']"][1:], expected[1:] - 1, rtol=1e-5)
    np.testing.assert_allclose(seen["log2_ratio/['layers']"][1:], expected[1:] - 3, rtol=1e-5)
    assert seen["log2_grad/['head']"] == seen["log2_ratio/['head']"] == -np.inf
    np.testing.assert_allclose(seen["log2_param/['head']"], np.log2(2e-30), rtol=1e-5)
    assert seen["first_bad_leaf"] == -1


def test_watch_names_the_first_leaf_and_step_that_were_not_finite():
    nan = GRADS | {"a": GRADS["a"].at[0].set(jnp.nan)}
    tx = watching.watch(guards.skip_non_finite(adam()))
    _, state = run(tx, [GRADS, GRADS, spoiled(jnp.inf), nan])
    seen = telemetry(state)
    assert (seen["0.watch/first_bad_leaf"], seen["0.watch/first_bad_step"]) == (1, 2)
    assert seen["0.0.skip_non_finite/skipped"] == 2, "the rules inside are read as well"


SHAPES = {
    "float32": [(), (3,), (5, 4), (300, 7)],
    "stacked float32": [(3, 40, 20), (4, 2), (0, 2)],
    "bfloat16": [(2, 0), (5, 4)],
    "float16": [(3,)],
    "stacked complex64": [(4, 2)],
}


def test_the_norms_of_watch_are_right_at_every_magnitude():
    """Leaves small and large, stacked or not, of all dtypes; and one tree of all magnitudes."""
    rng = np.random.default_rng(0)
    kinds = [(kind, shape) for kind, shapes in SHAPES.items() for shape in shapes]
    names = [f"{kind} {shape}" for kind, shape in kinds]
    measure = jax.jit(lambda tree: watching.measure(tree, tree, tree, lambda p: "stacked" in p))
    for fraction in [*np.linspace(0, 1, 20), None]:
        tree, squares = {}, {}
        for name, (kind, shape) in zip(names, kinds, strict=True):
            dtype = jnp.dtype(kind.removeprefix("stacked "))
            info = jnp.finfo("float32" if dtype == np.complex64 else dtype)
            low, high = np.log10(float(info.smallest_subnormal)), np.log10(float(info.max))
            at = rng.uniform() if fraction is None else fraction
            x = rng.uniform(0.5, 1, shape) * rng.choice([-1, 1], shape)
            tree[name] = np.asarray(x * 10.0 ** (low + at * (high - low))).astype(dtype)
            axes = tuple(range("stacked" in kind, len(shape)))
            squares[name] = np.sum(np.abs(tree[name].astype(np.complex128)) ** 2, axis=axes)
        row, bad = measure(tree)
        total = np.concatenate([np.ravel(squares[name]) for name in sorted(names)])
        with np.errstate(divide="ignore"):
            np.testing.assert_allclose(row[0], 0.5 * np.log2(total), rtol=1e-6, atol=1e-5)
        assert bad == -1
    order = sorted(names)
    entries = [i for i, name in enumerate(order) if tree[name].size]
    tree[order[entries[0]]].flat[0], tree[order[entries[1]]].flat[0] = np.nan, np.inf
    row, bad = measure(tree)
    assert bad == entries[0]
    assert np.isnan(row[0]).sum() == 1 and np.isposinf(row[0]).sum() == 1


def test_watch_keeps_the_rows_of_the_last_steps_and_telemetry_reads_the_newest():
    tx = watching.watch(optax.sgd(0.5), keep=3)
    _, state = run(tx, [jax.tree.map(lambda x, k=k: x * 2.0**k, GRADS) for k in range(5)])
    grads = state.telemetry["figures"].values[:, 0]
    np.testing.assert_allclose(np.diff(grads, axis=0), 1.0, rtol=1e-5)
    seen = telemetry(state)
    names = ["0.watch/log2_grad/['a']", "0.watch/log2_grad/['b']['w']"]
    assert [k for k in seen if "grad" in k] == names
    assert seen[names[1]] == grads[-1, 1]
    traced = jax.jit(telemetry)(state)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, traced), jax.tree.map(np.asarray, seen))
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    assert telemetry(stacked)[names[0]].tolist() == [grads[-1, 0]] * 2
    assert len(jax.tree.leaves(state)) == 4, "a step returns four arrays more"


def test_watch_may_measure_only_some_steps():
    stream = [jax.tree.map(lambda x, k=k: x * 2.0**k, GRADS) for k in range(5)]
    third, always = watching.watch(optax.sgd(0.1), every=3), watching.watch(optax.sgd(0.1))
    name = "0.watch/log2_grad/['a']"
    for measured, steps in ((1, 3), (4, 4), (4, 5)):
        seen, expected = run(third, stream[:steps])[1], run(always, stream[:measured])[1]
        np.testing.assert_allclose(telemetry(seen)[name], telemetry(expected)[name], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: watching.watch(optax.sgd(1.0), every=0), r"every is 0; an integer in \[1, inf\)"),
        (lambda: watching.watch(optax.sgd(1.0), keep=0), r"keep is 0; an integer in \[1, inf\)"),
        (
            lambda: watching.watch(optax.sgd(1.0)).update(GRADS, None),
            r"watch: .*update\(grads, state, params\)",
        ),
    ],
)
def test_bad_input_is_refused_with_the_value_and_the_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
