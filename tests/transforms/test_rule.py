"""One contract for all rules (a new rule is one line of RULES), and the telemetry they share.

What a rule promises is asked of one compiled program per rule: lanes of a vmap, each with a
threshold and a short history of gradients of its own. References are float64 NumPy, written from
the papers; the grid of magnitudes beside Optax's is a benchmark.
"""

import collections
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from transforms.stepping import adam, loose

from gradjax import transforms as T
from gradjax.transforms.rule import stacked_leaves

# References: (leaves, threshold, first gradient) -> (size, limit) of the groups of each leaf


def norm(*arrays):
    return np.sqrt(sum(np.sum(np.abs(x) ** 2) for x in arrays))


def by_tree(xs, t, first):
    return [(norm(*xs), t)] * len(xs)


def by_tree_like_first(xs, t, first):
    return [(norm(*xs), norm(*first))] * len(xs)


def by_leaf(xs, t, first):
    return [(norm(x), t) for x in xs]


def by_leaf_like_first(xs, t, first):
    return [(norm(x), norm(p)) for x, p in zip(xs, first, strict=True)]


def by_rms(xs, t, first):
    return [(norm(x), t * np.sqrt(max(x.size, 1))) for x in xs]


def by_entry(xs, t, first):
    return [(np.abs(x), t) for x in xs]


def by_entry_like_first(xs, t, first):
    return [(np.abs(x), np.abs(p)) for x, p in zip(xs, first, strict=True)]


def by_unit(xs, t, first):
    """Of parameters of ones."""

    def one(x):
        if x.ndim <= 1:
            axes = tuple(range(x.ndim))
        else:
            axes = (0,) if x.ndim <= 3 else tuple(range(x.ndim - 1))
        over = lambda a: np.sqrt(np.sum(np.abs(a) ** 2, axis=axes, keepdims=True))
        return over(x), t * np.maximum(over(np.ones(x.shape)), 1e-3)

    return [one(x) for x in xs]


def to_norm(xs, t):
    size = norm(*xs)
    return [x * (t / size) if 0 < size < np.inf else x for x in xs]


class Rule(NamedTuple):
    """A rule and what is known of it.

    Attributes:
      make: threshold -> transform.
      groups: the rule clips each group's size to its limit.
      expected: (leaves, threshold) -> leaves, of a rule that does something else.
      primed: steps of the first gradient that set the threshold of a rule with a memory.
    """

    make: Callable[[Any], Any]
    groups: Callable | None = None
    expected: Callable | None = None
    primed: int = 0


def schedule(s):
    return loose(optax.scale_by_schedule(s))


RULES = {
    "clip": Rule(T.clip, by_entry),
    "clip_by_global_norm": Rule(T.clip_by_global_norm, by_tree),
    "clip_by_block_rms": Rule(T.clip_by_block_rms, by_rms),
    "clip_by_layer_norm": Rule(T.clip_by_layer_norm, by_leaf),
    "adaptive_grad_clip": Rule(T.adaptive_grad_clip, by_unit),
    "normalize_by_norm": Rule(T.normalize_by_norm, None, to_norm),
    "autoclip": Rule(lambda t: T.autoclip(50.0, window=5), by_tree_like_first, primed=4),
    "historical_clip": Rule(
        lambda t: T.historical_clip(2.0, 5, warmup_steps=3), by_tree_like_first, primed=4
    ),
    "zclip": Rule(lambda t: T.zclip(warmup_steps=3), by_tree_like_first, primed=3),
    "adagc": Rule(lambda t: T.adagc(1.0, warmup_steps=0), by_leaf_like_first, primed=1),
    "spam": Rule(
        lambda t: T.spam(optax.identity(), 1.0, decay=0.0, min_history=1),
        by_entry_like_first,
        primed=2,
    ),
    "skip_non_finite": Rule(lambda t: T.skip_non_finite(adam())),
    "repair": Rule(lambda t: T.skip_non_finite(adam(), repair=True)),
    "skip_spikes": Rule(lambda t: T.skip_spikes(adam(), t, window=4)),
    "freeze_diverged": Rule(lambda t: T.freeze_diverged(adam(), 1e3 * t, max_value=t)),
    "restore_moments": Rule(lambda t: T.restore_moments(adam())),
    "watch": Rule(lambda t: T.watch(adam())),
    "watch, every 2": Rule(lambda t: T.watch(optax.sgd(0.1), every=2)),
    "weight_clip": Rule(T.weight_clip),
    "max_norm": Rule(T.max_norm),
    "spectral_norm": Rule(T.spectral_norm),
    "proximal_l1": Rule(lambda t: T.proximal_l1(t, 0.5)),
    "add_l1": Rule(T.add_l1),
    "reduce_on_plateau": Rule(lambda t: T.reduce_on_plateau(0.5, patience=1, atol=t)),
    "cosine": Rule(lambda t: schedule(T.warmup_cosine_decay_schedule(0.0, t, 2, 9))),
    "exponential": Rule(lambda t: schedule(T.exponential_decay(t, 2, 0.5))),
    "steps": Rule(lambda t: schedule(T.piecewise_constant_schedule(t, {2: 0.1}))),
    "growth": Rule(lambda t: schedule(T.growth_limited_warmup(t, 1e-3))),
}
CLIPPING = [name for name, rule in RULES.items() if rule.groups or rule.expected]
OTHERS = [name for name in RULES if name not in CLIPPING]


def marked(names, quick):
    """As parameters of a test; those that are not quick are asked by `make test-slow`."""
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]


# One of each kind. Of the others test_clipping and test_adaptive ask quickly what is their own.
CONTRACT = ("clip", "clip_by_global_norm", "clip_by_block_rms", "adaptive_grad_clip", "autoclip")
FOLLOWED = ("clip_by_global_norm", "skip_non_finite")

TREES = {
    "mixed": {
        "s": ((), "float32"),
        "k": ((3, 2), "float32"),
        "h": ((4,), "bfloat16"),
        "z": ((0, 2), "float32"),
    },
    "conv": {"w": ((2, 2, 1, 3), "float32"), "h": ((3,), "float16"), "c": ((2,), "complex64")},
}
# Units in the last place: a norm, a quotient and a product; with a memory also remembered norms.
ULPS, ULPS_WITH_MEMORY = 4, 8
NUM_RANDOM = 48


def draw(structure, rng, exponents):
    """A tree of that structure, entries of the decimal exponents given, one for each leaf."""
    tree = {}
    for (name, (shape, dtype)), exponent in zip(TREES[structure].items(), exponents, strict=False):
        x = rng.uniform(0.1, 1, shape) * rng.choice([-1, 1], shape)
        if dtype == "complex64":
            x = x * np.exp(1j * rng.uniform(0, 6, shape))
        size = min(10.0**exponent, float(jnp.finfo(dtype).max))
        tree[name] = np.asarray(x * size).astype(jnp.dtype(dtype))
    return tree


def ones(structure):
    shapes = TREES[structure].items()
    return {name: np.ones(shape, jnp.dtype(dtype)) for name, (shape, dtype) in shapes}


def first_gradient(structure, t):
    """Sets a norm of about t in every leaf."""
    return {
        k: (x * np.asarray(t / np.sqrt(max(x.size, 1)))).astype(x.dtype)
        for k, x in ones(structure).items()
    }


def times(tree, factor):
    return {k: (x * np.asarray(factor, x.dtype)).astype(x.dtype) for k, x in tree.items()}


def exact(tree):
    wide = lambda x: np.asarray(x).astype(np.complex128 if np.iscomplexobj(x) else np.float64)
    return [wide(x) for x in jax.tree.leaves(tree)]


class Lanes(NamedTuple):
    """What the contract asks with: for each lane a threshold and the gradient of the last step."""

    thresholds: np.ndarray
    last: list

    @property
    def scaled(self):
        """Pairs of lanes whose gradients and thresholds differ by the factor 2^20."""
        return [(NUM_RANDOM + i, NUM_RANDOM + 5 + i) for i in range(5)]

    @property
    def non_finite(self):
        """(lane, value) of gradients with one entry that is not finite."""
        return list(zip(range(NUM_RANDOM + 10, NUM_RANDOM + 13), NON_FINITE, strict=True))

    @property
    def zero(self):
        return NUM_RANDOM + 13


NON_FINITE = (np.inf, -np.inf, np.nan)


@functools.cache
def lanes(structure, seed):
    rng = np.random.default_rng(seed)
    exponents = rng.uniform(-44, 38.4, (NUM_RANDOM, 4))
    last = [draw(structure, rng, e) for e in exponents]
    thresholds = list(10 ** rng.uniform(-3, 3, NUM_RANDOM))
    # Further apart, a product is flushed to zero on one side.
    small = [draw(structure, rng, np.clip(e, -8, 8)) for e in exponents[:5]]
    last += small + [times(tree, 2.0**20) for tree in small]
    thresholds += [1.0] * 5 + [2.0**20] * 5
    for value in NON_FINITE:
        tree = draw(structure, rng, (0, 0, 0, 0))
        entry = next(x for x in tree.values() if x.ndim > 1)
        entry[(1,) * entry.ndim if structure == "mixed" else (1, 1, 0, 1)] = value
        last.append(tree)
    last.append(times(ones(structure), 0.0))
    thresholds += [1.0] * 4
    return Lanes(np.asarray(thresholds, np.float32), last)


def history(name, structure, seed):
    """Thresholds (lanes,), and gradients whose leaves have the axes (lanes, steps, ...)."""
    asked, rule = lanes(structure, seed), RULES[name]
    if name in CLIPPING:
        first = [first_gradient(structure, t) for t in asked.thresholds]
        steps = [[tree] * rule.primed + [x] for tree, x in zip(first, asked.last, strict=True)]
    else:
        # a non-finite gradient first comes in the middle
        shifted = asked.last[1:] + asked.last[:1]
        steps = [list(three) for three in zip(shifted, asked.last, asked.last[::-1], strict=True)]
    stack = lambda trees: jax.tree.map(lambda *x: np.stack(x), *trees)
    return asked.thresholds, stack([stack(trees) for trees in steps])


def step(name, updates, state, t, params):
    tx = optax.with_extra_args_support(RULES[name].make(t))
    return tx.update(updates, state, params, value=jnp.float32(1.5))


traces = collections.Counter()


@functools.cache
def program(name, structure):
    """(thresholds, gradients) -> updates and states of all lanes and steps."""

    def run(thresholds, gradients):
        traces[name, structure] += 1
        params = jax.tree.map(jnp.asarray, ones(structure))

        def one(t, gradients):
            def body(state, g):
                out, state = step(name, g, state, t, params)
                return state, (out, state)

            return jax.lax.scan(body, RULES[name].make(t).init(params), gradients)[1]

        return jax.vmap(one)(thresholds, gradients)

    return jax.jit(run)


@functools.cache
def result(name, structure="mixed", seed=0):
    """(gradients, updates, states), each with the axes (lanes, steps, ...), as NumPy arrays."""
    thresholds, gradients = history(name, structure, seed)
    out, states = program(name, structure)(thresholds, gradients)
    return gradients, jax.tree.map(np.asarray, out), jax.tree.map(np.asarray, states)


def at(tree, *index):
    return jax.tree.map(lambda x: x[index], tree)


def assert_within_ulps(got, want, dtype, ulps):
    info = jnp.finfo(dtype)
    largest = np.maximum(np.abs(want), float(info.smallest_normal))
    error = np.abs(got - want) / (float(info.eps) * 2.0 ** np.floor(np.log2(largest)))
    # XLA on the CPU flushes what is below, in each part of a complex number.
    difference = got - want
    flushed = np.maximum(np.abs(difference.real), np.abs(difference.imag)) < 2.0**-126
    assert np.all((error <= ulps) | flushed), (np.max(error), got, want)


def check_formula(name, updates, out, structure, t):
    """One step of a rule that clips is its formula in float64, and keeps its bound."""
    rule, xs = RULES[name], exact(updates)
    ulps = ULPS_WITH_MEMORY if rule.primed else ULPS
    if rule.expected:
        wanted = rule.expected(xs, t)
    else:
        first = exact(first_gradient(structure, t))
        groups = rule.groups(xs, t, first)
        with np.errstate(all="ignore"):
            wanted = [
                np.where(size > limit, x * (limit / np.asarray(size)), x)
                for x, (size, limit) in zip(xs, groups, strict=True)
            ]
        # the bound is rounded as well
        eps = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(out))
        for size, limit in rule.groups(exact(out), t, first):
            assert np.all(size <= limit * (1 + ulps * eps)), name
        leaves = zip(jax.tree.leaves(updates), jax.tree.leaves(out), groups, strict=True)
        for x, got, (size, limit) in leaves:
            if np.all(size <= limit):
                message = "the identity below the threshold, bit for bit"
                assert np.asarray(got).tobytes() == np.asarray(x).tobytes(), message
    for x, got, want in zip(jax.tree.leaves(updates), exact(out), wanted, strict=True):
        assert_within_ulps(got, want, x.dtype, ulps)


def check_random_lanes(name, structure, seed):
    gradients, out, _ = result(name, structure, seed)
    thresholds = lanes(structure, seed).thresholds.astype(np.float64)
    for i in range(NUM_RANDOM):
        updates = at(gradients, i, -1)
        check_formula(name, updates, at(out, i, -1), structure, thresholds[i])


@pytest.mark.parametrize("name", marked(CLIPPING, CONTRACT))
def test_a_clipping_rule_keeps_its_contract(name):
    check_random_lanes(name, "mixed", 0)
    asked = lanes("mixed", 0)
    _, out, states = result(name)
    # scaling the gradient and the threshold scales the update
    for small, large in asked.scaled:
        chex.assert_trees_all_equal(times(at(out, small, -1), 2.0**20), at(out, large, -1))
    # what is not finite is passed on, flagged and not remembered
    for lane, value in asked.non_finite:
        state, kept = at(states, lane, -1), at(out, lane, -1)
        is_bounded = name == "clip" and not np.isnan(value)
        want = np.float32(np.sign(value) if is_bounded else value)
        np.testing.assert_equal(kept["k"][1, 1], want)
        norms = [v for k, v in T.telemetry(state).items() if "log2_norm" in k]
        assert any(np.isnan(v) if np.isnan(value) else v == np.inf for v in norms)
        if RULES[name].groups in (by_tree, by_tree_like_first):
            chex.assert_trees_all_equal(kept, asked.last[lane])
        if RULES[name].groups is by_tree_like_first:
            chex.assert_trees_all_equal(state.memory, at(states, lane, -2).memory)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.memory))
    # zeros stay zeros
    assert not any(np.any(x) for x in at(out, asked.zero, -1).values())
    norms = T.telemetry(at(states, asked.zero, -1))
    assert all(np.all(v == -np.inf) for k, v in norms.items() if "log2_norm" in k)
    # other values do not retrace
    result(name, seed=1)
    assert traces[name, "mixed"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", CLIPPING)
def test_a_clipping_rule_is_its_float64_formula_on_every_tree(name):
    for structure, seed in itertools.product(TREES, range(2, 12)):
        check_random_lanes(name, structure, seed)
        result.cache_clear()


def assert_close(got, want):
    """Equal up to a few roundings, of which a half-precision leaf may show one of its own."""
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        rtol = 1e-6
        if x.dtype in (jnp.bfloat16, jnp.float16):
            rtol, x, y = float(jnp.finfo(x.dtype).eps), np.float32(x), np.float32(y)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("name", marked(RULES, FOLLOWED))
def test_an_eager_step_is_a_lane_of_the_scan(name):
    """One lane of the three holds inf and one NaN, which its neighbours do not notice."""
    gradients, out, states = result(name)
    params = jax.tree.map(jnp.asarray, ones("mixed"))
    chosen = (0, *(lane for lane, _ in lanes("mixed", 0).non_finite[1:]), NUM_RANDOM + 1)
    for lane in chosen:
        t = jnp.float32(lanes("mixed", 0).thresholds[lane])
        state = RULES[name].make(t).init(params)
        for i in range(len(gradients["s"][0])):
            updates = jax.tree.map(jnp.asarray, at(gradients, lane, i))
            got, state = step(name, updates, state, t, params)
            assert_close((got, state), (at(out, lane, i), at(states, lane, i)))


@pytest.mark.parametrize("name", RULES)
def test_structure_shapes_and_dtypes_are_kept(name):
    """Of a tree of every dtype, with empty leaves and branches, and of one without leaves."""
    mixed, conv = ones("mixed"), ones("conv")
    everything = {"h": mixed["h"], "z": mixed["z"], "conv": conv, "empty": {}}
    for params in (jax.tree.map(jnp.asarray, everything), {"a": {}}):
        state = jax.eval_shape(RULES[name].make(1.0).init, params)
        out, after = jax.eval_shape(functools.partial(step, name), params, state, 1.0, params)
        chex.assert_trees_all_equal_shapes_and_dtypes((out, after), (params, state))


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_halves_and_complex_numbers_stay_finite(name):
    thresholds, gradients = np.ones(2, np.float32), ones("conv")
    gradients = jax.tree.map(lambda x: np.broadcast_to(x, (2, 1, *x.shape)), gradients)
    out, _ = program(name, "conv")(thresholds, gradients)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(out))


def test_states_survive_a_checkpoint(tmp_path):
    tree = {k: v for k, v in ones("mixed").items() if v.size}  # Orbax refuses arrays of size zero
    states = jax.eval_shape(lambda: {name: RULES[name].make(1.0).init(tree) for name in RULES})
    count = itertools.count(1)  # no two numbers alike
    states = jax.tree.map(lambda x: jnp.asarray(np.full(x.shape, next(count), x.dtype)), states)
    zeros = jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), states)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", states)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "states", zeros)
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
        (T.adaptive_grad_clip, {"clipping": 0.1, "eps": 1e-3}),
        (T.per_example_clip, {"max_norm": 1.0}),
    ],
)
def test_every_number_may_be_traced(make, numbers):
    updates = {"a": jnp.ones((2, 3))}
    run = lambda numbers: make(**numbers).update(updates, make(**numbers).init(updates), updates)
    jax.eval_shape(jax.vmap(run), jax.tree.map(lambda x: jnp.full(2, x), numbers))


# Telemetry


def keys(tx, params=None):
    params = {"a": jnp.ones(2), "b": jnp.ones((2, 2))} if params is None else params
    state = jax.eval_shape(tx.init, params)
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
    chained = keys(optax.chain(optax.sgd(1.0), leaf))
    assert chained == {f"1.clip_by_layer_norm{x}" for x in per_leaf(["['a']", "['b']"])}
    nested = keys(optax.chain(whole, optax.chain(optax.sgd(1.0), whole)))
    assert {"0.clip_by_global_norm/clipped", "1.1.clip_by_global_norm/clipped"} <= nested
    assert len(nested) == 8
    masked = keys(optax.chain(optax.masked(leaf, {"a": False, "b": True}), optax.sgd(1.0)))
    assert masked == {f"0.clip_by_layer_norm{x}" for x in per_leaf(["['b']"])}
    parts = {"slow": whole, "fast": optax.chain(T.zclip(), optax.sgd(1.0))}
    multi = keys(optax.multi_transform(parts, {"a": "slow", "b": "fast"}))
    assert {"slow.clip_by_global_norm/count", "fast.0.zclip/log2_threshold"} <= multi
    injected = keys(optax.inject_hyperparams(T.clip_by_global_norm)(max_norm=1.0))
    assert injected == {f"0.clip_by_global_norm/{f}" for f in fields}
    assert "0.inner.0.clip_by_global_norm/count" in keys(T.spam(optax.chain(whole, optax.sgd(1.0))))


def test_telemetry_says_what_was_done():
    tx, params = T.clip_by_global_norm(1.0), {"w": jnp.zeros(4)}
    state = tx.init(params)
    for size in (1e20, 0.1, 1e30, 0.2):
        _, state = tx.update({"w": np.full(4, size, np.float32)}, state)
    seen = T.telemetry(state)
    assert seen["0.clip_by_global_norm/clip_fraction"] == 0.5
    assert seen["0.clip_by_global_norm/count"] == 4
    np.testing.assert_allclose(seen["0.clip_by_global_norm/log2_norm"], np.log2(0.4), rtol=1e-6)


def test_a_rule_declares_that_it_clips():
    params = {"w": jnp.ones((2, 2))}
    states = {name: jax.eval_shape(RULES[name].make(1.0).init, params) for name in RULES}
    declared = {name for name, state in states.items() if T.clipping_rules(state)}
    assert declared == set(CLIPPING) - {"normalize_by_norm"}
    tx = T.skip_non_finite(optax.chain(T.zclip(), optax.sgd(0.1), T.weight_clip(1.0)))
    assert T.clipping_rules(jax.eval_shape(tx.init, params)) == ("0.0.zclip",)


def test_a_misspelt_name_suggests_the_nearest():
    with pytest.raises(AttributeError, match="Did you mean 'clip_by_global_norm'"):
        T.clip_by_globl_norm  # noqa: B018
    assert all(getattr(T, name).__doc__ for name in T.__all__ if name != "CAUSES")


def test_stacked_is_refused_where_it_does_not_fit():
    params = {"head": jnp.ones(2), "layers": jnp.ones((5, 3))}
    assert stacked_leaves(lambda path: "layers" in path, params) == {"head": False, "layers": True}
    assert stacked_leaves({"head": False, "layers": True}, params)["layers"]
    with pytest.raises(ValueError, match="not a prefix"):
        stacked_leaves({"head": False, "body": True}, params)
    with pytest.raises(ValueError, match="a scalar leaf has no layer axis"):
        stacked_leaves(True, {"a": jnp.ones(())})
