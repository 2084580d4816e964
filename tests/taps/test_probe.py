"""Values and cotangents of a probe against perturbations put in by hand into the same function,
unrolled; bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_taps import ROUNDINGS, agree, at_once, layer, mean_square, plainly, x64
from jax import lax

from bounds import assert_rounding
from gradjax import probe, tap
from gradjax.taps.probe import Probe

# One network, written in many ways: params w (4, 3, 3), x (5, 3)
WEIGHTS = np.float32(0.7 * np.random.default_rng(0).standard_normal((4, 3, 3)))
X = np.random.default_rng(1).standard_normal((5, 3), dtype=np.float32)


@pytest.fixture
def weights():
    return jnp.asarray(WEIGHTS), jnp.asarray(X)


def jitted(*functions):
    """The functions of one tuple of arguments as one compiled program."""
    return jax.jit(lambda *args: [function(*args) for function in functions])


def unrolled(at, ws, x):
    for i in range(4):
        x = layer(at, x, ws[i], f"{i}")
    return mean_square(x)


def as_jit(ws, x):
    inner = jax.jit(lambda h, w, i: layer(tap, h, w, f"{i}"), static_argnums=2)
    return jax.jit(
        lambda ws, x: mean_square(functools.reduce(lambda h, i: inner(h, ws[i], i), range(4), x))
    )(ws, x)


def as_vmap(ws, x):
    one = lambda x: functools.reduce(lambda h, i: layer(tap, h, ws[i], f"{i}"), range(4), x)
    return mean_square(jax.vmap(one)(x))


def as_remat(ws, x):
    keep = jax.checkpoint_policies.dots_saveable
    for i in range(4):
        options = {"policy": keep} if i % 2 else {"prevent_cse": False}
        x = jax.checkpoint(lambda h, w, i=i: layer(tap, h, w, f"{i}"), **options)(x, ws[i])
    return mean_square(x)


def as_it_stands(ws, x):
    return unrolled(tap, ws, x)


def probes_of(*losses):
    """Probes of several losses of the same arguments in one compiled program."""
    return jitted(*(functools.partial(probe, loss) for loss in losses))


def test_calls_are_looked_into(weights, report):
    expected = plainly(unrolled, *weights)
    for found in probes_of(as_jit, as_vmap, as_remat, as_it_stands)(*weights):
        agree(found, expected, report)


@pytest.mark.slow
def test_calls_are_looked_into_without_compiling_the_whole(weights, report):
    expected = plainly(unrolled, *weights)
    for written in (as_jit, as_vmap, as_remat, as_it_stands):
        agree(probe(written, *weights), expected, report)


def looped(at, ws, x, order=range(4)):
    for i in order:
        h = at(x @ ws[i], f"z[{i}]")
        x = at(jnp.sin(h + 0.3), f"h[{i}]")
    return mean_square(x)


def scanned(ws, x, remat="", **options):
    def body(h, w):
        return layer(tap, h, w, ""), None

    if remat == "body":
        body = jax.checkpoint(body, prevent_cse=False)

    def whole(ws, x):
        return mean_square(lax.scan(body, x, ws, **options)[0])

    return jax.jit(jax.checkpoint(whole))(ws, x) if remat == "whole" else whole(ws, x)


SCANS = [{}, {"reverse": True}, {"unroll": 2}]


def test_a_scan_has_a_row_for_each_iteration(weights, report):
    """Forwards, backwards and unrolled, each plain and rematerialised in two ways."""
    kinds = [options | {"remat": r} for r in ("", "body", "whole") for options in SCANS]
    found = probes_of(*(functools.partial(scanned, **kind) for kind in kinds))(*weights)
    backwards = functools.partial(looped, order=(3, 2, 1, 0))
    expected = {False: plainly(looped, *weights), True: plainly(backwards, *weights)}
    for kind, each in zip(kinds, found, strict=True):
        agree(each, expected["reverse" in kind], report)


def test_nested_scans_have_rows_on_two_axes(weights, report):
    ws, x = weights

    def scanned(ws, x):
        inner = lambda h, w: (tap(jnp.sin(h @ w), "h"), tap(jnp.sum(h), "s"))
        outer = lambda h, pair: lax.scan(inner, h, pair, reverse=True)
        h, sums = lax.scan(outer, x, ws.reshape(2, 2, 3, 3))
        return mean_square(h) + jnp.sum(jnp.square(sums))

    def by_hand(at, ws, x):
        total = 0.0
        for i in range(2):
            for j in (1, 0):
                total += at(jnp.sum(x), f"s[{i},{j}]") ** 2
                x = at(jnp.sin(x @ ws[2 * i + j]), f"h[{i},{j}]")
        return mean_square(x) + total

    found = at_once(scanned, ws, x)
    assert found.values["h"].shape == found.cotangents["h"].shape == (2, 2, 5, 3)
    agree(found, plainly(by_hand, ws, x), report)


def test_map_and_a_loop_of_known_length_are_scans(weights, report):
    ws, x = weights

    def mapped(ws, x):
        h = lax.map(lambda row: tap(row @ ws[0], "z"), x)
        return mean_square(lax.fori_loop(0, 3, lambda i, h: tap(jnp.sin(h) @ ws[1], "h"), h))

    def by_hand(at, ws, x):
        h = jnp.stack([at(row @ ws[0], f"z[{i}]") for i, row in enumerate(x)])
        for i in range(3):
            h = at(jnp.sin(h) @ ws[1], f"h[{i}]")
        return mean_square(h)

    agree(at_once(mapped, ws, x), plainly(by_hand, ws, x), report)


def test_a_loss_that_holds_a_gradient(weights, report):
    ws, x = weights

    def penalty(at, ws, x):
        slope = jax.grad(lambda x: jnp.sum(jnp.tanh(x @ ws[0])))(x)
        return mean_square(at(slope, "slope")) + jnp.sum(at(jnp.sin(x @ ws[1]), "h"))

    def inside(at, ws, x):
        return jnp.sum(jax.grad(lambda x: jnp.sum(at(jnp.tanh(x @ ws[0]), "h") ** 2))(x))

    def unmarked(ws, x):
        grads = jax.grad(functools.partial(inside, lambda h, name: h))(ws, x)
        return grads, jnp.tanh(x @ ws[0])

    losses = [functools.partial(each, tap) for each in (penalty, inside)]
    both, (grads, value) = jitted(probes_of(*losses), unmarked)(ws, x)
    agree(both[0], plainly(penalty, ws, x), report)
    assert_rounding(both[1].values["h"], value, terms=ROUNDINGS)
    assert_rounding(both[1].grads, grads, terms=ROUNDINGS)


# Branches, loops and rules of their own


def branches(ws, x, index):
    each = [lambda h, i=i: layer(tap, h, ws[i], f"{i}") for i in range(3)]
    return mean_square(layer(tap, lax.switch(index, each, x), ws[3], "3"))


def test_the_branch_that_was_taken(weights, report):
    compiled = jax.jit(functools.partial(probe, branches))
    for index in (0, 2):

        def by_hand(at, ws, x, index=index):
            return mean_square(layer(at, layer(at, x, ws[index], f"{index}"), ws[3], "3"))

        found = compiled(*weights, jnp.int32(index))
        for i in {0, 1, 2} - {index}:
            for name in (f"{i}z", f"{i}h"):
                assert np.isnan(found.values.pop(name)).all()
                assert not found.cotangents.pop(name).any()
        agree(found, plainly(by_hand, *weights), report)


def test_cond_in_a_scan_by_rows_and_under_vmap(weights, report):
    ws, x = weights

    def gated(ws, x, gates):
        def on(h, w):
            return tap(jnp.sin(h @ w), "on")

        def off(h, w):
            return tap(h * 0.5, "off")

        def body(h, row):
            w, gate = row
            return lax.cond(gate, on, off, h, w), None

        return mean_square(lax.scan(body, x, (ws, gates))[0])

    def by_hand(at, ws, x, gates):
        for i, gate in enumerate(gates):
            x = at(jnp.sin(x @ ws[i]), f"on[{i}]") if gate else at(x * 0.5, f"off[{i}]")
        return mean_square(x)

    rows = [(True, False, True, True), (False, True, False, True)]
    compiled = jax.jit(lambda gates: probe(gated, ws, x, gates))
    lanes = jax.jit(jax.vmap(compiled))(jnp.array(rows))
    for lane, gates in enumerate(rows):
        found = compiled(jnp.array(gates))
        each = jax.tree.map(lambda x, i=lane: np.asarray(x)[i], lanes)
        expected = plainly(functools.partial(by_hand, gates=gates), ws, x)
        agree(found, expected, report)
        agree(each, expected, report)
        for i, gate in enumerate(gates):
            off = "off" if gate else "on"
            for one in (found, each):
                assert np.isnan(np.asarray(one.values[off])[i]).all()
                assert not np.asarray(one.cotangents[off])[i].any()


def test_loops_have_the_values_of_their_last_turn(weights):
    ws, x = weights

    def loss(scale, ws, x, count):
        def go_on(state):
            return jnp.max(tap(jnp.abs(state[1]), "seen")) + 3.0 > state[0]

        def turn(state):
            return state[0] + 1.0, tap(jnp.sin(state[1] @ lax.stop_gradient(ws[0])), "h")

        _, h = lax.while_loop(go_on, turn, (0.0, x))
        g = lax.fori_loop(0, count, lambda i, h: tap(h + 1.0, "g"), x)
        return jnp.sum(tap(h * scale, "out")) + jnp.sum(g)

    # Three turns are known beforehand: a scan.
    found = at_once(lambda scale, ws, x: loss(scale, ws, x, 3), jnp.float32(2.0), ws, x)
    h, turns = X, 0.0
    while np.max(np.abs(h)) + 3.0 > turns:
        h, turns = np.sin(h @ WEIGHTS[0]), turns + 1.0
    assert turns > 2
    assert_rounding(found.values["h"], h, terms=ROUNDINGS)
    assert_rounding(found.values["out"], 2 * h, terms=ROUNDINGS)
    assert set(found.cotangents) == {"out", "g"}
    assert found.cotangents["g"].shape == (3, 5, 3)
    assert "while" in found.skipped["seen"]
    compiled = jax.jit(functools.partial(probe, loss))
    found = compiled(jnp.float32(2.0), ws, x, jnp.int32(2))
    assert_rounding(found.values["g"], X + 2, terms=2)
    assert set(found.cotangents) == {"out"}
    none = compiled(jnp.float32(2.0), ws, x, jnp.int32(0))
    assert np.isnan(none.values["g"]).all()


@jax.custom_vjp
def tripled(x):
    return tap(jnp.sin(x), "inside")


tripled.defvjp(lambda x: (tripled(x), None), lambda _, g: (3 * g,))


@jax.custom_jvp
def straight(x):
    return tap(jnp.round(x), "inside")


straight.defjvp(lambda primals, tangents: (straight(*primals), 5 * tangents[0]))


def test_rules_of_their_own_keep_their_derivative(weights):
    rules = {"sin": (tripled, np.sin, 3.0), "round": (straight, np.round, 5.0)}

    def once(rule, ws, x):
        return jnp.sum(rule(tap(x @ ws[0], "z")) * 2)

    def many(rule, ws, x):
        return jnp.sum(lax.scan(lambda h, w: (rule(tap(h @ w, "z")), None), x, ws)[0])

    for rule, inside, slope in rules.values():
        plain, scan = functools.partial(once, rule), jax.jit(functools.partial(many, rule))
        (one, rows), grads = jitted(probes_of(plain, scan), jax.grad(scan))(*weights)
        assert_rounding(one.values["inside"], inside(np.asarray(one.values["z"])), terms=8)
        assert set(one.cotangents) == {"z"}
        np.testing.assert_array_equal(one.cotangents["z"], np.full((5, 3), 2 * slope))
        assert rows.values["inside"].shape == (4, 5, 3)
        assert_rounding(rows.grads, grads, terms=ROUNDINGS)


def test_names_in_a_shard_map_are_refused(weights):
    ws, x = weights
    try:
        from jax import shard_map
    except ImportError:  # before jax 0.6.1
        from jax.experimental.shard_map import shard_map
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("i",))
    spec = jax.sharding.PartitionSpec()
    inside = shard_map(lambda x: tap(x * 2, "hidden"), mesh=mesh, in_specs=spec, out_specs=spec)
    found = at_once(lambda ws, x: jnp.sum(tap(inside(x @ ws[0]), "seen")), ws, x)
    assert set(found.values) == {"seen"}
    assert "shard_map" in found.skipped["hidden"]
    with pytest.raises(ValueError, match=r"no named value.*hidden.*shard_map"):
        probe(lambda ws, x: jnp.sum(inside(x @ ws[0])), ws, x)


# Composition, dtypes, arguments


def test_axes_that_a_vmap_maps_come_first():
    w = np.ones((4, 3), np.float32)

    # vmap by itself puts the examples last: (4, 5)
    def loss(w, x):
        return jnp.sum(jnp.sin(jax.vmap(lambda x: tap(w @ x, "h"))(x)))

    def twice(w, x):
        inner = jax.vmap(lambda x: tap(w @ x, "h"))
        return jnp.sum(jax.vmap(inner)(jnp.stack([x, 2 * x])))

    once, both = probes_of(loss, twice)(w, X)
    assert_rounding(once.values["h"], X @ w.T, terms=3)
    cosine = np.cos(np.asarray(once.values["h"]))
    assert_rounding(once.cotangents["h"], cosine, terms=8, size=1.0)
    assert_rounding(both.values["h"], np.stack([X @ w.T, 2 * X @ w.T]), terms=3)
    # Without a probe nothing is moved for the name's sake.
    plain = jax.make_jaxpr(loss)(w, X)
    names = [eqn for eqn in plain.jaxpr.eqns if eqn.primitive.name == "gradjax_name"]
    assert [eqn.outvars[0].aval.shape for eqn in names] == [(4, 5)]


@pytest.mark.slow
def test_a_probe_inside_jit_vmap_and_grad(report):
    seeds = np.float32(0.7 * np.random.default_rng(5).standard_normal((3, 4, 3, 3)))

    def one(ws):
        return probe(as_it_stands, ws, X)

    lanes = jax.jit(jax.vmap(one))(seeds)
    by_hand = [plainly(unrolled, ws, X) for ws in seeds]
    for i, expected in enumerate(by_hand):
        agree(jax.tree.map(lambda x, i=i: np.asarray(x)[i], lanes), expected, report)

    def size(ws):
        return jnp.sum(jnp.square(one(ws).cotangents["1h"]))

    def size_by_hand(ws):
        def rest(h):
            for i in (2, 3):
                h = jnp.sin(h @ ws[i] + 0.3)
            return mean_square(h)

        h = X
        for i in (0, 1):
            h = jnp.sin(h @ ws[i] + 0.3)
        return jnp.sum(jnp.square(jax.grad(rest)(h)))

    grads, found, expected = jitted(
        jax.grad(lambda ws: one(ws).loss), jax.grad(size), jax.grad(size_by_hand)
    )(seeds[0])
    assert_rounding(grads, by_hand[0][3], terms=ROUNDINGS)
    assert_rounding(found, expected, terms=ROUNDINGS)


# Each layer and direction rounds three results to the dtype, whose errors here do not grow; sums
# are at least as exact.
@pytest.mark.parametrize(
    ("dtype", "roundings"), [("bfloat16", 30), ("float16", 30), ("float64", ROUNDINGS)]
)
def test_dtypes(dtype, roundings, report):
    with x64(dtype == "float64"):
        ws, x = (jnp.asarray(a, dtype) for a in (WEIGHTS, X))
        found = at_once(scanned, ws, x)
        arrays = (*found.values.values(), *found.cotangents.values(), found.loss)
        assert {str(x.dtype) for x in arrays} == {dtype}
        kind = lambda name, error: report(f"probe in {dtype}", error)
        agree(found, plainly(looped, ws, x), kind, roundings)


def test_arguments_of_every_kind(weights):
    ws, _ = weights

    def loss(params, key, batch, kind, twice, nothing):
        h = tap(batch["x"] @ params[0], "h")
        assert kind == "tanh" and nothing is None
        noise = jax.random.normal(key, h.shape)
        h = tap(jnp.tanh(h) + noise, "noisy")
        # an integer: the identity, and no name
        count = tap(jnp.argmax(h, axis=1), "count")
        loss = jnp.mean(h) * (2 if twice else 1) + jnp.take(h, 0) * batch["number"]
        return loss, {"count": count, "key": key}

    args = (jax.random.key(3), {"x": X, "number": 2.5}, "tanh", True, None)
    found = probe(loss, (ws[0],), *args, has_aux=True)
    noisy = np.asarray(found.values["noisy"])
    assert_rounding(found.loss, np.mean(noisy) * 2 + noisy[0, 0] * 2.5, terms=20, size=10.0)
    assert set(found.values) == {"h", "noisy"}
    np.testing.assert_array_equal(found.aux["count"], np.argmax(noisy, axis=1))
    assert found.aux["key"] == args[0]
    cotangent = np.full((5, 3), 2 / 15)
    cotangent[0, 0] += 2.5
    assert_rounding(found.cotangents["noisy"], cotangent, terms=8)


def test_a_tap_of_a_pytree_names_its_leaves():
    def loss(w):
        marked = tap({"a": w, "b": (2 * w, jnp.int32(1))}, "p")
        return jnp.sum(marked["a"] * marked["b"][0])

    found = probe(loss, jnp.ones(2))
    assert {name: x.tolist() for name, x in found.cotangents.items()} == {
        "p['a']": [2.0, 2.0],
        "p['b'][0]": [1.0, 1.0],
    }


# Text output


def squares(w, x):
    for i in range(len(w)):
        x = tap(w[i] * x, f"h{i}")
    return jnp.sum(x**2)


def test_a_probe_prints_a_summary_of_few_lines(weights):
    """Shapes and log10 rms of values and cotangents; many names in twenty lines."""
    w, x = np.full(3, 100.0, np.float32), np.full((2, 5), 1e15, np.float32)
    text = str(at_once(squares, w, x))
    lines = text.splitlines()
    assert lines[0] == "Probe: loss inf, named values: 3"
    assert lines[1].split() == ["name", "shape", "log10", "rms", "of", "cotangent"]
    assert lines[2].split() == ["h0", "(2,", "5)", "17.00", "25.30"]
    assert lines[4].split() == ["h2", "(2,", "5)", "21.00", "21.30"]
    many = Probe(jnp.ones(3), {f"h{i}": X for i in range(300)}, {}, {})
    lines = repr(many).splitlines()
    assert len(lines) <= 20 and "... and 283 more" in lines
    assert "loss (3,) float32" in lines[0] and "h299" in lines[-1]
    assert repr(many._replace(values={})).startswith("Probe: loss (3,) float32, named values: 0")


def test_a_probe_prints_what_is_not_finite_and_what_has_no_numbers():
    values = {"zero": np.zeros(2), "nan": np.array([np.nan, 1.0]), "inf": np.array([np.inf, 1.0])}
    empty = {"empty": np.zeros((0, 3)), "half": jnp.ones((2, 2), jnp.bfloat16)}
    found = Probe(jnp.float32(1.0), values | empty, {"zero": 1e-300 * np.ones(2)}, {})
    rows = [line.split() for line in str(found).splitlines()[2:]]
    assert rows == [
        ["zero", "(2,)", "-inf", "-300.00"],
        ["nan", "(2,)", "nan"],
        ["inf", "(2,)", "inf"],
        ["empty", "(0,", "3)"],
        ["half", "(2,", "2)", "0.00"],
    ]
    # A probe is a pytree, so it may hold anything.
    assert ["zero", "()"] in [
        line.split() for line in str(jax.tree.map(lambda x: "leaf", found)).splitlines()
    ]
    assert repr(Probe(0, 0, None, 0)) == "Probe(0, 0, None, 0, None, {})"
    deleted = jnp.ones(3)
    deleted.delete()
    assert str(found._replace(values={"gone": deleted})).splitlines()[2].split() == ["gone", "(3,)"]


def test_a_probe_prints_under_jit_and_with_statistics(weights):
    printed = []

    def loss(ws, x):
        found = probe(scanned, ws, x)
        printed.append(repr(found))
        return found, probe(scanned, ws, x, statistics=True)

    whole, reduced = jax.jit(loss)(*weights)
    assert printed[0].splitlines()[0] == "Probe: loss () float32, named values: 2"
    assert printed[0].splitlines()[2].split() == ["z", "(4,", "5,", "3)"]
    exact = [line.split() for line in str(whole).splitlines()[2:]]
    rows = [line.split() for line in str(reduced).splitlines()[2:]]
    # jit returns dictionaries in the order of their keys
    assert [row[:2] for row in rows] == [["h", "(4,)"], ["z", "(4,)"]]
    for a, b in zip(exact, rows, strict=True):
        np.testing.assert_allclose(np.float64(a[-2:]), np.float64(b[-2:]), atol=0.011)


# Traced anew, and nothing left behind


def test_functions_jitted_and_called_before_are_probed(weights, report):
    ws, x = weights
    inner = jax.jit(lambda h, w: layer(tap, h, w, ""))

    @jax.jit
    def scanned(ws, x):
        return mean_square(lax.scan(lambda h, w: (inner(h, w), None), x, ws)[0])

    gradient = jax.jit(jax.grad(scanned))
    before = gradient(ws, x)
    agree(probe(scanned, ws, x), plainly(looped, ws, x), report)
    agree(at_once(scanned, ws, x), plainly(looped, ws, x), report)
    np.testing.assert_array_equal(gradient(ws, x), before)


# Bad input


def marked(w, x):
    return jnp.sum(tap(w * x, "h"))


@pytest.mark.parametrize(
    ("loss", "params", "options", "words"),
    [
        (
            lambda w, x: tap(w * x, "h"),
            1.0,
            {},
            r"loss returns \(5, 4\) float32.*scalar.*mean or sum",
        ),
        (lambda w, x: (marked(w, x), x), 1.0, {}, r"loss returns a tuple.*has_aux=True"),
        (marked, 1.0, {"has_aux": True}, r"must return \(loss, aux\)"),
        (lambda w, x: jnp.argmax(tap(w * x, "h")), 1.0, {}, r"\(\) int32.*floating scalar"),
        (lambda w, x: jnp.sum(w * x), 1.0, {}, r"no named value.*gradjax\.tap\(h, "),
        (
            lambda w, x: marked(w, x) + marked(w, x),
            1.0,
            {},
            r"name 'h' is used 2 times.*f\"block\{i\}\"",
        ),
        (marked, np.int32(1), {}, r"leaves of params are int32; floating"),
        (
            lambda w, x: marked(w["a"], x),
            {"a": 1.0, "n": np.int32(3)},
            {},
            r"int32; floating arrays",
        ),
        (lambda w, x: jnp.sum(tap(x, "h")), {}, {}, r"leaves of params are none"),
        (lambda w, x: jnp.sum(tap(w * x, "")), 1.0, {}, r"tap: the name is ''"),
        (lambda w, x: jnp.sum(tap(w * x, 3)), 1.0, {}, r"tap: the name is 3"),
    ],
)
def test_bad_input_is_refused(loss, params, options, words):
    params = jnp.float32(params) if isinstance(params, float) else params
    with pytest.raises(ValueError, match=words):
        probe(loss, params, jnp.ones((5, 4)), **options)
