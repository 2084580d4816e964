"""One contract for all rules (a new rule is one line of RULES), then what is particular to those
that clip.

Guards, projections and schedules have theirs in test_guards.py. References are float64 NumPy,
written from the papers; the grid of magnitudes beside Optax's is a benchmark."""

import functools
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from hypothesis import Phase, given, settings

from gradjax import transforms as T
from gradjax.transforms.rule import stacked_leaves
from support import ROOT

# -- references: (leaves, threshold, first gradient) -> (size, limit) of the groups of each leaf ---------


def norm(*arrays):
    return np.sqrt(sum(np.sum(np.abs(x) ** 2) for x in arrays))


by_tree = lambda xs, t, prime: [(norm(*xs), t)] * len(xs)
by_tree_like_prime = lambda xs, t, prime: [(norm(*xs), norm(*prime))] * len(xs)
by_leaf = lambda xs, t, prime: [(norm(x), t) for x in xs]
by_leaf_like_prime = lambda xs, t, prime: [
    (norm(x), norm(p)) for x, p in zip(xs, prime, strict=True)
]
by_rms = lambda xs, t, prime: [(norm(x), t * np.sqrt(max(x.size, 1))) for x in xs]
by_entry = lambda xs, t, prime: [(np.abs(x), t) for x in xs]
by_entry_like_prime = lambda xs, t, prime: [
    (np.abs(x), np.abs(p)) for x, p in zip(xs, prime, strict=True)
]


def by_unit(xs, t, prime):
    """Of parameters of ones."""

    def one(x):
        axes = (
            tuple(range(x.ndim))
            if x.ndim <= 1
            else (0,)
            if x.ndim <= 3
            else tuple(range(x.ndim - 1))
        )
        over = lambda a: np.sqrt(np.sum(np.abs(a) ** 2, axis=axes, keepdims=True))
        return over(x), t * np.maximum(over(np.ones(x.shape)), 1e-3)

    return [one(x) for x in xs]


def to_norm(xs, t):
    size = norm(*xs)
    return [x * (t / size) if 0 < size < np.inf else x for x in xs]


def pruned(xs, t):
    def one(x):
        flat = x.ravel().copy()
        flat[np.argsort(np.abs(flat), kind="stable")[: round(0.5 * x.size)]] = 0
        return flat.reshape(x.shape)

    return [one(x) for x in xs]


class Rule(NamedTuple):
    make: Callable[[Any], Any]  # from the threshold
    groups: Callable | None = None  # the rule clips each group's size to its limit
    expected: Callable | None = (
        None  # (leaves, threshold) -> leaves, of a rule that does something else
    )
    primed: int = 0  # steps of the first gradient that set the threshold of a rule with a memory


def loose(tx):
    """Optax's optimisers, some of which add integers to floats: strict promotion is for what wraps
    them."""

    def update(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return optax.with_extra_args_support(tx).update(*args, **kwargs)

    return optax.GradientTransformationExtraArgs(tx.init, update)


adam = lambda: loose(optax.adam(0.1))

RULES = {
    "clip": Rule(lambda t: T.clip(t), by_entry),
    "clip_by_global_norm": Rule(lambda t: T.clip_by_global_norm(t), by_tree),
    "clip_by_block_rms": Rule(lambda t: T.clip_by_block_rms(t), by_rms),
    "clip_by_layer_norm": Rule(lambda t: T.clip_by_layer_norm(t), by_leaf),
    "adaptive_grad_clip": Rule(lambda t: T.adaptive_grad_clip(t), by_unit),
    "normalize_by_norm": Rule(lambda t: T.normalize_by_norm(t), None, to_norm),
    "prune_gradients": Rule(lambda t: T.prune_gradients(0.5), None, pruned),
    "autoclip": Rule(lambda t: T.autoclip(50.0, window=5), by_tree_like_prime, primed=4),
    "historical_clip": Rule(
        lambda t: T.historical_clip(2.0, 5, warmup_steps=3), by_tree_like_prime, primed=4
    ),
    "zclip": Rule(lambda t: T.zclip(warmup_steps=3), by_tree_like_prime, primed=3),
    "adagc": Rule(lambda t: T.adagc(1.0, warmup_steps=0), by_leaf_like_prime, primed=1),
    "spam": Rule(
        lambda t: T.spam(optax.identity(), 1.0, decay=0.0, min_history=1),
        by_entry_like_prime,
        primed=2,
    ),
    "skip_non_finite": Rule(lambda t: T.skip_non_finite(adam())),
    "repair": Rule(lambda t: T.skip_non_finite(adam(), repair=True)),
    "skip_spikes": Rule(lambda t: T.skip_spikes(adam(), t, window=4)),
    "freeze_diverged": Rule(lambda t: T.freeze_diverged(adam(), 1e3 * t, max_value=t)),
    "restore_moments": Rule(lambda t: T.restore_moments(adam())),
    "watch": Rule(lambda t: T.watch(adam())),
    "watch, every 2": Rule(lambda t: T.watch(optax.sgd(0.1), every=2)),
    "weight_clip": Rule(lambda t: T.weight_clip(t)),
    "max_norm": Rule(lambda t: T.max_norm(t)),
    "spectral_norm": Rule(lambda t: T.spectral_norm(t)),
    "proximal_l1": Rule(lambda t: T.proximal_l1(t, 0.5)),
    "add_l1": Rule(lambda t: T.add_l1(t)),
    "reduce_on_plateau": Rule(lambda t: T.reduce_on_plateau(0.5, patience=1, atol=t)),
    "cosine": Rule(
        lambda t: loose(optax.scale_by_schedule(T.warmup_cosine_decay_schedule(0.0, t, 2, 9)))
    ),
    "exponential": Rule(lambda t: loose(optax.scale_by_schedule(T.exponential_decay(t, 2, 0.5)))),
    "steps": Rule(
        lambda t: loose(optax.scale_by_schedule(T.piecewise_constant_schedule(t, {2: 0.1})))
    ),
    "growth": Rule(lambda t: loose(optax.scale_by_schedule(T.growth_limited_warmup(t, 1e-3)))),
}
CLIPPING = [name for name, rule in RULES.items() if rule.groups or rule.expected]
# of the scope of a module: the tests of a rule stand together, and one worker compiles it
every_rule = pytest.mark.parametrize("name", RULES, scope="module")
every_clipping = pytest.mark.parametrize("name", CLIPPING, scope="module")
EAGER = (
    "clip_by_global_norm",
    "clip_by_layer_norm",
    "autoclip",
    "skip_non_finite",
    "weight_clip",
    "growth",
)
SLOW = (
    "historical_clip",
    "spam",
    "repair",
    "watch, every 2",
    "proximal_l1",
    "spectral_norm",
)  # like their neighbours
marked = lambda names: [
    pytest.param(name, marks=[pytest.mark.slow] if name in names else []) for name in RULES
]

TREES = {
    "mixed": {
        "s": ((), "float32"),
        "k": ((3, 2), "float32"),
        "h": ((4,), "bfloat16"),
        "z": ((0, 2), "float32"),
    },
    "conv": {"w": ((2, 2, 1, 3), "float32"), "h": ((3,), "float16"), "c": ((2,), "complex64")},
}
WITH_MEMORY = 4  # ulp, where thresholds are remembered as rounded norms; others: 2


def draw(structure, seed, exponents):
    """A tree of that structure, entries of the decimal exponents given, one for each leaf."""
    rng = np.random.default_rng(seed)
    tree = {}
    for (name, (shape, dtype)), exponent in zip(TREES[structure].items(), exponents, strict=True):
        x = rng.uniform(0.1, 1, shape) * rng.choice([-1, 1], shape)
        x = x * np.exp(1j * rng.uniform(0, 6, shape)) if dtype == "complex64" else x
        bound = float(jnp.finfo(dtype).max)
        tree[name] = jnp.asarray((x * min(10.0**exponent, bound)).astype(jnp.dtype(dtype)))
    return tree


def ones(structure):
    return {name: jnp.ones(shape, dtype) for name, (shape, dtype) in TREES[structure].items()}


def first_gradient(structure, t):
    """Sets a norm of about t in every leaf."""
    return {
        k: x * jnp.asarray(t / np.sqrt(max(x.size, 1)), x.dtype) for k, x in ones(structure).items()
    }


def exact(tree):
    wide = lambda x: np.asarray(x).astype(np.complex128 if jnp.iscomplexobj(x) else np.float64)
    return [wide(x) for x in jax.tree.leaves(tree)]


@functools.cache
def compiled(name):
    """update(updates, state, threshold, params), compiled once for every structure."""
    return jax.jit(lambda *args: step(name, *args))


def step(name, updates, state, t, params):
    tx = optax.with_extra_args_support(RULES[name].make(t))
    return tx.update(updates, state, params, value=jnp.float32(1.5))


@functools.cache
def fresh(name, structure):
    return jax.jit(RULES[name].make(1.0).init)(ones(structure))


def primed(name, structure, t):
    params, state = ones(structure), fresh(name, structure)
    for _ in range(RULES[name].primed):
        _, state = compiled(name)(first_gradient(structure, t), state, jnp.float32(t), params)
    return state


def apply(name, updates, structure="mixed", t=1.0):
    return compiled(name)(updates, primed(name, structure, t), jnp.float32(t), ones(structure))


def expected(name, updates, structure, t):
    """The reference's result, and whether each leaf is below its thresholds."""
    xs, rule = exact(updates), RULES[name]
    t = float(np.float32(t))
    if rule.expected:
        return rule.expected(xs, t), None
    groups = rule.groups(xs, t, exact(first_gradient(structure, t)))
    with np.errstate(all="ignore"):
        clip = lambda x, size, limit: np.where(size > limit, x * (limit / np.asarray(size)), x)
        return [clip(x, *g) for x, g in zip(xs, groups, strict=True)], [
            np.all(s <= limit) for s, limit in groups
        ]


def assert_within_ulps(got, want, dtype, ulps):
    info = jnp.finfo(dtype)
    largest = np.maximum(np.abs(want), float(info.smallest_normal))
    error = np.abs(got - want) / (float(info.eps) * 2.0 ** np.floor(np.log2(largest)))
    flushed = (
        np.abs(got - want) < 2.0**-126
    )  # XLA on the CPU flushes what is below, also a part of a complex number
    assert np.all((error <= ulps) | flushed), (np.max(error), got, want)


# -- the contract ----------------------------------------------------------------------------------------


def check_reference(name, structure, seed, exponents, t):
    updates = draw(structure, seed, exponents)
    out, state = apply(name, updates, structure, t)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, fresh(name, structure))
    want, below = expected(name, updates, structure, t)
    for i, (x, got) in enumerate(zip(jax.tree.leaves(updates), jax.tree.leaves(out), strict=True)):
        assert_within_ulps(
            exact(got)[0], want[i], x.dtype, WITH_MEMORY if RULES[name].primed else 2
        )
        if below is not None and below[i]:
            assert np.asarray(got).tobytes() == np.asarray(x).tobytes(), (
                "the identity below the threshold, bit for bit"
            )
    if RULES[name].groups:
        t = float(np.float32(t))
        sizes = RULES[name].groups(exact(out), t, exact(first_gradient(structure, t)))
        for (size, limit), x in zip(sizes, jax.tree.leaves(out), strict=True):
            eps = max(
                float(jnp.finfo(d.dtype).eps) for d in jax.tree.leaves(out)
            )  # the bound is rounded as well
            assert np.all(size <= limit * (1 + 4 * eps)), (name, x.dtype)


QUICK = {
    "phases": [Phase.explicit, Phase.reuse, Phase.generate]
}  # a failing tree is small as it is: no shrinking
EXPONENTS = st.tuples(*[st.floats(-44, 38.4)] * 4)


@pytest.mark.slow
@every_clipping
@settings(max_examples=12, **QUICK)
@given(seed=st.integers(0, 10**6), exponents=EXPONENTS, log_t=st.floats(-3, 3))
def test_a_rule_is_its_float64_formula(name, seed, exponents, log_t):
    check_reference(name, "mixed", seed, exponents, 10.0**log_t)


@pytest.mark.slow
@every_clipping
@settings(max_examples=100, **QUICK)
@given(
    structure=st.sampled_from(sorted(TREES)),
    seed=st.integers(0, 10**6),
    exponents=EXPONENTS,
    log_t=st.floats(-3, 3),
)
def test_a_rule_is_its_float64_formula_on_every_tree(name, structure, seed, exponents, log_t):
    check_reference(name, structure, seed, exponents[: len(TREES[structure])], 10.0**log_t)


@every_clipping
@settings(max_examples=5, **QUICK)
@given(seed=st.integers(0, 10**6), exponents=EXPONENTS)
def test_scaling_gradient_and_threshold_scales_the_update(name, seed, exponents):
    exponents = np.clip(exponents, -8, 8)  # further apart, a product is flushed to zero on one side
    updates, factor = draw("mixed", seed, exponents), 2.0**20
    scaled = jax.tree.map(lambda x: x * jnp.asarray(factor, x.dtype), updates)
    small, large = apply(name, updates, t=1.0)[0], apply(name, scaled, t=factor)[0]
    chex.assert_trees_all_equal(
        jax.tree.map(lambda x: x * jnp.asarray(factor, x.dtype), small), large
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", marked(set(RULES) - set(EAGER)), scope="module")
def test_eager_is_jitted(name):
    updates, params, state = draw("mixed", 0, (10, 30, 2, 0)), ones("mixed"), fresh(name, "mixed")
    both = (
        f(updates, state, jnp.float32(1.0), params)
        for f in (functools.partial(step, name), compiled(name))
    )
    chex.assert_trees_all_close(*both, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", marked(SLOW), scope="module")
def test_lanes_of_a_scan_are_single_steps_and_nothing_retraces(name):
    """Each lane has a threshold of its own; one of them receives a NaN, which leaves its neighbours
    alone."""
    params, thresholds = ones("mixed"), jnp.array([0.5, 1.0, 8.0])
    steps = [
        [draw("mixed", 3 * j + i, (e, e, e, 0)) for i in range(3)]
        for j, e in enumerate((-30, 0, 20))
    ]
    steps[1][1]["k"] = steps[1][1]["k"].at[1, 1].set(jnp.nan)
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(thresholds, steps):
        def one(t, steps):
            body = lambda state, g: step(name, g, state, t, params)[::-1]
            return jax.lax.scan(body, RULES[name].make(t).init(params), steps)[::-1]

        return jax.vmap(one, in_axes=(0, 1))(thresholds, steps)

    out, states = run(thresholds, stack([stack(lanes) for lanes in steps]))
    run(thresholds + 1, stack([stack(lanes) for lanes in steps[::-1]]))
    for i, t in enumerate(thresholds):
        state = fresh(name, "mixed")
        for j in range(3):
            got, after = compiled(name)(steps[j][i], state, t, params)
            chex.assert_trees_all_close(
                jax.tree.map(lambda x, at=(i, j): x[at], out), got, rtol=1e-6
            )
            state = after
        chex.assert_trees_all_equal_shapes_and_dtypes(state, fresh(name, "mixed"))
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], states), state, rtol=1e-6, atol=1e-6
        )


@every_rule
@pytest.mark.parametrize("structure", TREES)
def test_structure_shapes_and_dtypes_are_kept(name, structure):
    params, state = ones(structure), jax.eval_shape(RULES[name].make(1.0).init, ones(structure))
    out, after = jax.eval_shape(
        functools.partial(step, name), params, state, jnp.float32(1.0), params
    )
    chex.assert_trees_all_equal_shapes_and_dtypes((out, after), (params, state))


@pytest.mark.slow
@every_rule
def test_halves_and_complex_numbers_stay_finite(name):
    out, _ = apply(name, ones("conv"), "conv")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(out))


@every_clipping
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_passed_on_flagged_and_forgotten(name, value):
    updates = draw("mixed", 3, (0, 0, 0, 0))
    updates["k"] = updates["k"].at[1, 1].set(value)
    before = primed(name, "mixed", 1.0)
    out, state = compiled(name)(updates, before, jnp.float32(1.0), ones("mixed"))
    bounded = name == "clip" and not np.isnan(value)
    np.testing.assert_equal(
        np.asarray(out["k"][1, 1]), np.float32(np.sign(value) if bounded else value)
    )
    norms = [v for k, v in T.telemetry(state).items() if "log2_norm" in k]
    assert any(np.isnan(v) if np.isnan(value) else v == np.inf for v in norms)
    if RULES[name].groups in (by_tree, by_tree_like_prime):
        chex.assert_trees_all_equal(out, updates)
        chex.assert_trees_all_equal(state.memory, before.memory)
    assert np.isfinite(
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.memory)] or [[0.0]])
    ).all()


@every_clipping
def test_zeros_stay_zeros_and_are_no_news(name):
    zeros = jax.tree.map(jnp.zeros_like, ones("mixed"))
    out, state = apply(name, zeros)
    chex.assert_trees_all_equal(out, zeros)
    assert all(v == -np.inf for k, v in T.telemetry(state).items() if "log2_norm" in k)


@every_rule
@pytest.mark.parametrize("tree", [{}, {"a": {}}])
def test_an_empty_tree_is_a_tree(name, tree):
    init = RULES[name].make(1.0).init(tree)
    out, state = step(name, tree, init, 1.0, tree)
    assert out == tree
    chex.assert_trees_all_equal_structs(state, init)


def test_states_survive_a_checkpoint(tmp_path):
    tree = {k: v for k, v in ones("mixed").items() if v.size}  # Orbax refuses arrays of size zero
    states = jax.eval_shape(lambda: {name: RULES[name].make(1.0).init(tree) for name in RULES})
    count = itertools.count(1)
    states = jax.tree.map(
        lambda x: jnp.full(x.shape, next(count), x.dtype), states
    )  # no two numbers alike
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", states)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "states", jax.tree.map(jnp.zeros_like, states))
    chex.assert_trees_all_equal(restored, states)


@pytest.mark.parametrize(
    ("make", "numbers"),
    [
        (T.autoclip, {"percentile": 5.0}),
        (T.historical_clip, {"num_sigmas": 2.0, "warmup_steps": 3}),
        (T.zclip, {"alpha": 0.9, "z_thres": 2.0, "warmup_steps": 3}),
        (T.adagc, {"lambda_rel": 1.1, "lambda_abs": 2.0, "beta": 0.9, "warmup_steps": 3}),
        (
            functools.partial(T.spam, optax.sgd(0.1)),
            {"threshold": 9.0, "reset_every": 3, "warmup_steps": 3, "decay": 0.9},
        ),
        (T.prune_gradients, {"sparsity": 0.3}),
        (T.adaptive_grad_clip, {"clipping": 0.1, "eps": 1e-3}),
        (T.per_example_clip, {"max_norm": 1.0}),
    ],
)
def test_every_number_may_be_traced(make, numbers):
    updates = {"a": jnp.ones((2, 3))}
    run = lambda numbers: make(**numbers).update(updates, make(**numbers).init(updates), updates)
    jax.eval_shape(jax.vmap(run), jax.tree.map(lambda x: jnp.full(2, x), numbers))


# -- layers of a stack -----------------------------------------------------------------------------------

IN_LAYERS = lambda path: "layers" in path
STACKED = {
    "clip_by_layer_norm": lambda s: T.clip_by_layer_norm(9.0, s),
    "clip_by_block_rms": lambda s: T.clip_by_block_rms(9.0, s),
    "adaptive_grad_clip": lambda s: T.adaptive_grad_clip(9.0, stacked=s),
    "adagc": lambda s: T.adagc(9.0, warmup_steps=0, stacked=s),
}


@pytest.mark.parametrize("name", STACKED)
def test_an_exploding_layer_leaves_the_others_untouched(name):
    params = {"head": jnp.ones((2, 2)), "layers": jnp.ones((5, 3, 2))}
    calm = {
        k: jnp.asarray(np.random.default_rng(0).uniform(0.2, 1, x.shape), jnp.float32)
        for k, x in params.items()
    }
    wild = calm | {"layers": calm["layers"].at[2].mul(1e30)}

    def changed(stacked):
        tx = STACKED[name](stacked)
        update = jax.jit(tx.update)
        _, state = update(calm, tx.init(params), params)
        out, state = update(wild, state, params)
        return (out["layers"] != wild["layers"]).any((1, 2)), out["head"], state

    layers, head, state = changed(IN_LAYERS)
    assert layers.tolist() == [False, False, True, False, False]
    np.testing.assert_array_equal(head, wild["head"])
    seen = T.telemetry(state)[f"0.{name}/clipped/['layers']"]
    assert (seen > 0).tolist() == layers.tolist()
    assert stacked_leaves(IN_LAYERS, params) == {"head": False, "layers": True}
    if name == "clip_by_layer_norm":
        assert changed(None)[0].all(), "the control: as one leaf all layers are clipped"
    with pytest.raises(ValueError, match="no prefix"):
        STACKED[name]({"head": False, "body": True}).init(params)


def test_layers_are_normalised_and_pruned_one_by_one():
    x = {"layers": jnp.stack([jnp.array([3.0, -4.0]), jnp.array([3e30, 4e30]), jnp.zeros(2)])}
    apply = lambda tx: jax.jit(tx.update)(x, tx.init(x))
    out, state = apply(T.normalize_by_norm(10.0, per_layer=True, stacked=True))
    np.testing.assert_allclose(out["layers"], [[6, -8], [6, 8], [0, 0]], rtol=1e-6)
    assert T.telemetry(state)["0.normalize_by_norm/clipped/['layers']"].tolist() == [1, 1, 0]
    out, _ = apply(T.prune_gradients(0.5, stacked=True))
    np.testing.assert_array_equal(out["layers"], jnp.array([[0, -4.0], [0, 4e30], [0, 0]]))
    out, _ = apply(T.prune_gradients({"layers": 1 / 6}, largest=True))
    np.testing.assert_array_equal(out["layers"], jnp.array([[3.0, -4.0], [3e30, 0], [0, 0]]))


# -- beside Optax ----------------------------------------------------------------------------------------

KERNELS = {"vector": (5,), "dense": (4, 3), "heads": (4, 2, 3), "conv": (3, 3, 2, 4)}
OPTAX = {
    "clip": (T.clip(0.5), optax.clip(0.5)),
    "clip_by_global_norm": (T.clip_by_global_norm(0.5), optax.clip_by_global_norm(0.5)),
    "clip_by_block_rms": (T.clip_by_block_rms(0.5), optax.clip_by_block_rms(0.5)),
    "adaptive_grad_clip": (T.adaptive_grad_clip(0.05), optax.adaptive_grad_clip(0.05)),
    "normalize_by_norm": (T.normalize_by_norm(3.0), optax.normalize_by_update_norm(3.0, eps=0.0)),
}


@pytest.mark.parametrize("name", OPTAX)
def test_optax_has_the_same_rule_where_it_is_right(name):
    rng = np.random.default_rng(0)
    tree = lambda size: {
        k: jnp.asarray(rng.standard_normal(s) * size, jnp.float32) for k, s in KERNELS.items()
    }
    params, (ours, theirs) = tree(1.0), OPTAX[name]
    both = jax.jit(
        lambda grads: [tx.update(grads, tx.init(params), params)[0] for tx in (ours, theirs)]
    )
    for size in (1e-8, 0.3, 1.0, 1e8):
        chex.assert_trees_all_close(*both(tree(size)), rtol=2e-6)
    kept, lost = both(tree(1e20))
    assert all(np.all(x != 0) for x in jax.tree.leaves(kept))
    if name != "clip":
        assert all(np.all(x == 0) for x in jax.tree.leaves(lost)), (
            "the control: Optax's update is zero"
        )


@pytest.mark.slow
def test_examples_are_clipped_one_by_one_and_averaged():
    rng, params = np.random.default_rng(0), {"w": jnp.zeros((3, 2)), "b": jnp.zeros(())}
    size = np.array([1e-3, 0.1, 1e3, 1e20, 3e38])
    grads = {
        k: rng.uniform(-0.5, 0.5, (5, *p.shape)) * size.reshape((5,) + (1,) * p.ndim)
        for k, p in params.items()
    }
    grads = {k: jnp.asarray(g, jnp.float32) for k, g in grads.items()}
    norms = np.sqrt(
        sum(np.sum(np.square(np.asarray(g, np.float64).reshape(5, -1)), 1) for g in grads.values())
    )
    tx = T.per_example_clip(0.7)
    out, state = jax.jit(tx.update)(grads, tx.init(params), params)
    for k, g in grads.items():
        factor = np.minimum(1, 0.7 / norms).reshape((5,) + (1,) * params[k].ndim)
        np.testing.assert_allclose(
            out[k], np.mean(np.asarray(g, np.float64) * factor, 0), rtol=1e-6
        )
    seen = T.telemetry(state)
    assert seen["0.per_example_clip/clipped"] == np.float32(3 / 5)
    np.testing.assert_allclose(
        seen["0.per_example_clip/log2_norm"], np.log2(norms.max()), rtol=1e-6
    )
    tame = jax.tree.leaves(jax.tree.map(lambda g: g[jnp.array([0, 1, 2, 2, 1])], grads))
    theirs = [x / 5 for x in optax.per_example_global_norm_clip(tame, 0.7)[0]]
    ours = jax.jit(tx.update)(jax.tree.unflatten(jax.tree.structure(grads), tame), state, params)[0]
    chex.assert_trees_all_close(jax.tree.leaves(ours), theirs, rtol=1e-6)
    with pytest.raises(ValueError, match="leading axis"):
        tx.update(params, state)


# -- step by step against the papers ---------------------------------------------------------------------


def history(seed, num_steps=60, spikes=True):
    """Gradients of two leaves, (num_steps, 3) and (num_steps, 2), drifting over decades, with
    spikes up to 1e30."""
    rng = np.random.default_rng(seed)
    size = 10 ** np.cumsum(rng.normal(0, 0.1, num_steps))
    if spikes:
        size[[30, 41, 55]] *= [1e2, 1e30, 1e12]
    x = rng.standard_normal((num_steps, 5)) * size[:, None]
    return {"a": jnp.asarray(x[:, :3], jnp.float32), "b": jnp.asarray(x[:, 3:], jnp.float32)}


def scanned(tx, grads):
    first = jax.tree.map(lambda x: x[0], grads)
    return jax.lax.scan(lambda state, g: tx.update(g, state, first)[::-1], tx.init(first), grads)[1]


def run(tx, grads):
    return {
        k: np.asarray(x, np.float64)
        for k, x in jax.jit(lambda grads: scanned(tx, grads))(grads).items()
    }


def by_norm(grads, rule):
    """Apply (norm -> clipped norm) step by step to the norm of the tree."""
    a, b = (np.asarray(grads[k], np.float64) for k in "ab")
    norms = np.sqrt((a**2).sum(1) + (b**2).sum(1))
    factor = np.array([rule(n) / n for n in norms])[:, None]
    return {"a": a * factor, "b": b * factor}


def test_autoclip_is_the_papers():
    percentiles = jnp.array([10.0, 50.0, 99.0])
    for seed, window in ((0, 1000), (1, 7)):
        grads = history(seed)
        lanes = jax.vmap(lambda p, g=grads, w=window: scanned(T.autoclip(p, w), g))
        got = jax.jit(lanes)(percentiles)
        for k, percentile in enumerate(percentiles.tolist()):
            seen = []
            paper = lambda n, s=seen, w=window, p=percentile: (
                s.append(n),
                min(n, np.percentile(s[-w:], p)),
            )[1]
            chex.assert_trees_all_close(
                jax.tree.map(lambda x, k=k: x[k], got), by_norm(grads, paper), rtol=1e-5
            )


def test_zclip_is_the_papers():
    grads, warm, mu, var = history(2), [], 0.0, 0.0

    def paper(n):
        nonlocal mu, var
        if len(warm) < 25:
            warm.append(n)
            mu, var = np.mean(warm), np.var(warm)
            return n
        z = (n - mu) / np.sqrt(var)
        kept = mu + 2.5**2 * np.sqrt(var) / z if z > 2.5 else n
        mu = 0.97 * mu + 0.03 * kept
        var = 0.97 * var + 0.03 * (kept - mu) ** 2
        return kept

    want = by_norm(grads, paper)
    chex.assert_trees_all_close(run(T.zclip(), grads), want, rtol=1e-5)
    assert norm(want["a"][41]) < 100 < norm(exact(grads)[0][41])


def test_historical_clip_is_mean_plus_sigmas():
    grads, seen = history(3), []

    def formula(n):
        kept = min(n, np.mean(seen[-20:]) + 2.5 * np.std(seen[-20:])) if len(seen) >= 10 else n
        seen.append(kept)
        return kept

    got = run(T.historical_clip(2.5, 20), grads)
    chex.assert_trees_all_close(got, by_norm(grads, formula), rtol=1e-5)


def test_adagc_is_the_papers():
    grads = history(4)
    want, gamma = {k: np.asarray(x, np.float64) for k, x in grads.items()}, {}
    for t in range(60):
        whole = norm(want["a"][t], want["b"][t])
        for k, x in want.items():
            h = min(1, 0.5 / whole) if t < 20 else min(1, 1.05 * gamma[k] / norm(x[t]))
            x[t] *= h
            n = norm(x[t])
            gamma[k] = min(gamma.get(k, np.inf), n) if t < 20 else 0.98 * gamma[k] + 0.02 * n
    chex.assert_trees_all_close(run(T.adagc(1.05, 0.5, warmup_steps=20), grads), want, rtol=1e-5)


def test_spam_is_its_equations():
    grads = history(5)
    got = run(
        T.spam(optax.trace(0.9), 50.0, reset_every=25, warmup_steps=10, decay=0.95, min_history=5),
        grads,
    )
    for k, x in grads.items():
        v, m = 0.0, 0.0
        for t, g in enumerate(np.asarray(x, np.float64)):
            g = np.where((g**2 > 50 * v) & (t >= 5), np.sign(g) * np.sqrt(50 * v), g)
            v = 0.95 * v + 0.05 * g**2
            m = 0.9 * (0 if t % 25 == 0 else m) + g
            warm = (
                1 - 0.99 * (1 + np.cos(np.pi * (t % 25) / 11)) / 2 if t >= 25 and t % 25 < 10 else 1
            )
            np.testing.assert_allclose(got[k][t], warm * m, rtol=1e-5, atol=1e-6 * np.abs(m).max())


def test_a_leaf_that_was_zero_for_long_is_not_frozen():
    """Its zeros would drive any average of norms to zero, and the threshold with it."""
    zero, one = {"a": jnp.zeros(2)}, {"a": jnp.ones(2)}
    for tx in (
        T.autoclip(10.0, 5),
        T.adagc(warmup_steps=0),
        T.spam(optax.identity(), min_history=0),
    ):
        state, update = tx.init(zero), jax.jit(tx.update)
        for grads in [one] + [zero] * 9:
            _, state = update(grads, state, zero)
        np.testing.assert_allclose(update(one, state, zero)[0]["a"], 1.0, rtol=1e-6)


# -- a training run --------------------------------------------------------------------------------------


def train(tx):
    """Distance to the minimum of (x - 20)^2 / 2 after 5,000 steps, one of whose gradients has an
    entry of 1e20."""

    def step(carry, t):
        params, state = carry
        grads = params - 20.0
        updates, state = tx.update(jnp.where(t == 100, grads.at[0].set(1e20), grads), state, params)
        return (params + updates, state), jnp.abs(params - 20.0)

    params = jnp.zeros(4)
    with jax.numpy_dtype_promotion("standard"):  # Adam's bias correction promotes
        return np.asarray(
            jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), jnp.arange(5000)))()[1]
        )


@pytest.mark.parametrize("guard", [lambda adam: adam, lambda adam: optax.apply_if_finite(adam, 5)])
def test_one_gradient_of_1e20_freezes_a_parameter_with_optax(guard):
    distance = train(guard(optax.adam(1e-2)))
    assert np.all(distance[110:, 0] > 15) and np.ptp(distance[1000:, 0]) == 0, "frozen for good"
    assert np.all(distance[-1, 1:] < 0.1), "the others are not"


def test_the_same_gradient_is_lost_in_the_clipping_of_optax():
    grads = jnp.full(4, 20.0).at[0].set(1e20)
    clipped = lambda tx: tx.update(grads, tx.init(grads))[0]
    assert not np.any(clipped(optax.clip_by_global_norm(1.0))), "the whole step is zero"
    np.testing.assert_allclose(clipped(T.clip_by_global_norm(1.0))[0], 1.0, rtol=1e-6)


CURES = [T.clip, T.clip_by_global_norm, T.autoclip, T.zclip, T.adagc, T.historical_clip, T.spam]
CURES = [
    pytest.param(c, marks=[pytest.mark.slow] if c in CURES[4:6] else [], id=c.__name__)
    for c in CURES
]


@pytest.mark.slow
@pytest.mark.parametrize("cure", CURES)
def test_with_ours_it_trains_on(cure):
    adam = optax.adam(1e-2)
    threshold = (1.0,) if cure in (T.clip, T.clip_by_global_norm) else ()
    tx = cure(adam) if cure is T.spam else optax.chain(cure(*threshold), adam)
    assert np.all(train(tx)[-1] < 0.1)


# -- telemetry -------------------------------------------------------------------------------------------


def keys(tx, params=None):
    params = {"a": jnp.ones(2), "b": jnp.ones((2, 2))} if params is None else params
    state = tx.init(params)
    seen = T.telemetry(jax.eval_shape(tx.update, params, state, params)[1])
    rules = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, T.RuleState))
    count = sum(len(jax.tree.leaves(x.telemetry)) for x in rules if isinstance(x, T.RuleState))
    assert len(seen) >= count, "keys are unique"
    return set(seen)


def test_telemetry_names_the_position_the_rule_and_the_leaf():
    whole, leaf = T.clip_by_global_norm(1.0), T.clip_by_layer_norm(1.0)
    fields = {"log2_norm", "clipped", "clip_fraction", "count"}
    assert keys(whole) == {f"0.clip_by_global_norm/{f}" for f in fields}
    per_leaf = lambda leaves: {f"/{f}/{x}" for f in fields - {"count"} for x in leaves} | {"/count"}
    assert keys(optax.chain(optax.sgd(1.0), leaf)) == {
        f"1.clip_by_layer_norm{x}" for x in per_leaf(["['a']", "['b']"])
    }
    nested = keys(optax.chain(whole, optax.chain(optax.sgd(1.0), whole)))
    assert {"0.clip_by_global_norm/clipped", "1.1.clip_by_global_norm/clipped"} <= nested and len(
        nested
    ) == 8
    masked = keys(optax.chain(optax.masked(leaf, {"a": False, "b": True}), optax.sgd(1.0)))
    assert masked == {f"0.clip_by_layer_norm{x}" for x in per_leaf(["['b']"])}
    labels = {"a": "slow", "b": "fast"}
    multi = keys(
        optax.multi_transform(
            {"slow": whole, "fast": optax.chain(T.zclip(), optax.sgd(1.0))}, labels
        )
    )
    assert {"slow.clip_by_global_norm/count", "fast.0.zclip/log2_threshold"} <= multi
    injected = keys(optax.inject_hyperparams(T.clip_by_global_norm)(max_norm=1.0))
    assert injected == {f"0.clip_by_global_norm/{f}" for f in fields}
    assert "0.inner.0.clip_by_global_norm/count" in keys(T.spam(optax.chain(whole, optax.sgd(1.0))))


def test_telemetry_says_what_was_done():
    tx, params = T.clip_by_global_norm(1.0), {"w": jnp.zeros(4)}
    state, update = tx.init(params), jax.jit(tx.update)
    for size in (1e20, 0.1, 1e30, 0.2):
        _, state = update({"w": jnp.full(4, size)}, state)
    seen = T.telemetry(state)
    assert (
        seen["0.clip_by_global_norm/clip_fraction"] == 0.5
        and seen["0.clip_by_global_norm/count"] == 4
    )
    np.testing.assert_allclose(seen["0.clip_by_global_norm/log2_norm"], np.log2(0.4), rtol=1e-6)


# -- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: T.clip(-1.0), r"clip: max_delta is -1.0; a number in \[0, inf\]"),
        (lambda: T.clip_by_global_norm(float("nan")), "max_norm is nan"),
        (lambda: T.normalize_by_norm(-1.0), "scale_factor is -1.0"),
        (lambda: T.normalize_by_norm(stacked=True), "per_layer=True"),
        (lambda: T.per_example_clip(-2.0), "max_norm is -2.0"),
        (lambda: T.prune_gradients({"a": 0.5, "b": 1.5}), r"sparsity is 1.5; a number in \[0, 1\]"),
        (lambda: T.autoclip(101.0), r"percentile is 101.0; a number in \[0, 100\]"),
        (lambda: T.autoclip(window=0), r"window is 0; a number in \[1, inf\]"),
        (lambda: T.historical_clip(-1.0), "num_sigmas is -1.0"),
        (lambda: T.historical_clip(window=-3), "window is -3"),
        (lambda: T.zclip(alpha=1.0), r"alpha is 1.0; a number in \[0, 1\)"),
        (lambda: T.zclip(z_thres=float("nan")), "z_thres is nan"),
        (lambda: T.adagc(beta=1.0), r"beta is 1.0; a number in \[0, 1\)"),
        (lambda: T.spam(optax.sgd(1.0), reset_every=0), r"reset_every is 0; a number in \[1, "),
    ],
)
def test_a_number_out_of_range_is_refused_with_its_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_does_not_fit_the_tree_is_refused():
    params = {"a": jnp.ones(2)}
    tx = T.adaptive_grad_clip(0.1)
    with pytest.raises(ValueError, match="depends on the parameters"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="no prefix"):
        T.prune_gradients({"b": 0.5}).init(params)


# -- the grid --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_rule_of_ours_fails_silently_on_the_grid():
    path = ROOT / "benchmarks" / "grid_transforms.py"
    spec = importlib.util.spec_from_file_location("grid_transforms", path)
    grid = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(grid)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # for Optax's
        rows = grid.grid()
    assert grid.silent(rows, "ours") == 0
    assert grid.silent([row for row in rows if row["optax"]], "optax") > 150, "the control"
