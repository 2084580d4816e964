"""Values and cotangents of a probe against perturbations put in by hand into the same function,
unrolled; bad input."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gradjax import probe, tap


def plainly(net, params, *args):
    """(loss, values, cotangents, grads) of net(at, params, *args): zeros added where it says at(h,
    name)."""

    def record(params):
        values = {}

        def at(h, name):
            assert name not in values
            values[name] = h
            return h

        return net(at, params, *args), values

    loss, values = jax.jit(record)(params)
    moved = lambda params, eps: net(lambda h, name: h + eps[name], params, *args)
    grads, cotangents = jax.jit(jax.grad(moved, (0, 1)))(
        params, jax.tree.map(jnp.zeros_like, values)
    )
    return loss, values, cotangents, grads


def x64(on=True):
    return jax.enable_x64(on) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64(on)


def error(a, b):
    """Largest difference as a share of the largest entry."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    assert a.shape == b.shape
    return float(np.abs(a - b).max(initial=0.0) / max(np.abs(b).max(initial=0.0), 1e-30))


def rows_of(found, name):
    """The value that `plainly` calls "h[1,2]" is row (1, 2) of the probe's h."""
    base, index = re.fullmatch(r"([^\[]*)(?:\[([\d,]+)\])?", name).groups()
    return found[base][tuple(map(int, index.split(",")))] if index else found[base]


def agree(found, expected, report, tol=1e-5):
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
    assert max(errors) < tol


# ---- one network, written in many ways: params w (4, 3, 3), x (5, 3)


@pytest.fixture
def weights(key):
    return 0.7 * jax.random.normal(key, (4, 3, 3)), jax.random.normal(jax.random.key(1), (5, 3))


def layer(at, h, w, name):
    return at(jnp.sin(at(h @ w, f"{name}z") + 0.3), f"{name}h")


def mean_square(h):
    return jnp.mean(jnp.square(h)) + jnp.sum(h[0]) * 0.1


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


@pytest.mark.slow
@pytest.mark.parametrize("written", [as_jit, as_vmap, as_remat, lambda ws, x: unrolled(tap, ws, x)])
def test_calls_are_looked_into(written, weights, report):
    expected = plainly(unrolled, *weights)
    agree(probe(written, *weights), expected, report)
    agree(jax.jit(functools.partial(probe, written))(*weights), expected, report)


def looped(at, ws, x):
    for i in range(4):
        h = at(x @ ws[i], f"z[{i}]")
        x = at(jnp.sin(h + 0.3), f"h[{i}]")
    return mean_square(x)


def looped_backwards(at, ws, x):
    for i in reversed(range(4)):
        h = at(x @ ws[i], f"z[{i}]")
        x = at(jnp.sin(h + 0.3), f"h[{i}]")
    return mean_square(x)


@pytest.mark.parametrize("remat", ["", "body", "whole"])
@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"unroll": 2}])
def test_a_scan_has_a_row_for_each_iteration(options, remat, weights, report):
    body = lambda h, w: (layer(tap, h, w, ""), None)
    body = jax.checkpoint(body, prevent_cse=False) if remat == "body" else body
    whole = lambda ws, x: mean_square(lax.scan(body, x, ws, **options)[0])
    whole = jax.jit(jax.checkpoint(whole)) if remat == "whole" else whole
    expected = plainly(looped_backwards if "reverse" in options else looped, *weights)
    agree(probe(whole, *weights), expected, report)


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

    found = probe(scanned, ws, x)
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

    agree(probe(mapped, ws, x), plainly(by_hand, ws, x), report)


def test_a_loss_that_holds_a_gradient(weights, report):
    ws, x = weights

    def penalty(at, ws, x):
        slope = jax.grad(lambda x: jnp.sum(jnp.tanh(x @ ws[0])))(x)
        return mean_square(at(slope, "slope")) + jnp.sum(at(jnp.sin(x @ ws[1]), "h"))

    agree(probe(lambda ws, x: penalty(tap, ws, x), ws, x), plainly(penalty, ws, x), report)
    inside = lambda ws, x: jnp.sum(
        jax.grad(lambda x: jnp.sum(tap(jnp.tanh(x @ ws[0]), "h") ** 2))(x)
    )
    found = probe(inside, ws, x)
    assert error(found.values["h"], jnp.tanh(x @ ws[0])) < 1e-6
    assert error(found.grads, jax.grad(inside)(ws, x)) < 1e-6


# ---- branches, loops and rules of their own


def branches(ws, x, index):
    graded_nodes = [lambda h, i=i: layer(tap, h, ws[i], f"{i}") for i in range(3)]
    return mean_square(layer(tap, lax.switch(index, graded_nodes, x), ws[3], "3"))


@pytest.mark.parametrize("index", [0, 2])
def test_the_branch_that_was_taken(index, weights, report):
    ws, x = weights

    def by_hand(at, ws, x):
        return mean_square(layer(at, layer(at, x, ws[index], f"{index}"), ws[3], "3"))

    loss, values, cotangents, grads = plainly(by_hand, ws, x)
    found = jax.jit(functools.partial(probe, branches))(ws, x, jnp.int32(index))
    for i in {0, 1, 2} - {index}:
        for name in (f"{i}z", f"{i}h"):
            assert np.isnan(found.values.pop(name)).all() and not found.cotangents.pop(name).any()
    agree(found, (loss, values, cotangents, grads), report)


@pytest.mark.slow
def test_cond_in_a_scan_by_rows_and_under_vmap(weights, report):
    ws, x = weights

    def gated(ws, x, gates):
        arm = lambda h, w: tap(jnp.sin(h @ w), "on")
        body = lambda h, row: (
            lax.cond(row[1], arm, lambda h, w: tap(h * 0.5, "off"), h, row[0]),
            None,
        )
        return mean_square(lax.scan(body, x, (ws, gates))[0])

    def by_hand(at, ws, x, gates):
        for i, gate in enumerate(gates):
            x = at(jnp.sin(x @ ws[i]), f"on[{i}]") if gate else at(x * 0.5, f"off[{i}]")
        return mean_square(x)

    rows = [(True, False, True, True), (False, True, False, True)]
    lanes = jax.vmap(lambda gates: probe(gated, ws, x, gates))(jnp.array(rows))
    for lane, gates in enumerate(rows):
        found, each = (
            probe(gated, ws, x, jnp.array(gates)),
            jax.tree.map(lambda x, i=lane: x[i], lanes),
        )
        agree(found, plainly(by_hand, ws, x, gates), report)
        agree(each, plainly(by_hand, ws, x, gates), report)
        for i, gate in enumerate(gates):
            off = "off" if gate else "on"
            for one in (found, each):
                assert np.isnan(one.values[off][i]).all() and not one.cotangents[off][i].any()


def test_loops_have_the_values_of_their_last_turn(weights):
    ws, x = weights
    turn = lambda h: tap(jnp.sin(h @ lax.stop_gradient(ws[0])), "h")

    def loss(scale, x, count):
        go_on = lambda state: jnp.max(tap(jnp.abs(state[1]), "seen")) + 3.0 > state[0]
        _, h = lax.while_loop(go_on, lambda s: (s[0] + 1.0, turn(s[1])), (0.0, x))
        g = lax.fori_loop(0, count, lambda i, h: tap(h + 1.0, "g"), x)
        return jnp.sum(tap(h * scale, "out")) + jnp.sum(g)

    found = probe(loss, jnp.float32(2.0), x, 3)
    h, turns = x, 0.0
    while jnp.max(jnp.abs(h)) + 3.0 > turns:
        h, turns = jnp.sin(h @ ws[0]), turns + 1.0
    assert turns > 2
    assert error(found.values["h"], h) < 1e-6
    assert error(found.values["out"], 2 * h) < 1e-6
    assert set(found.cotangents) == {"out", "g"}  # three turns are known beforehand: a scan
    assert found.cotangents["g"].shape == (3, 5, 3)
    assert "while" in found.skipped["seen"]
    found = jax.jit(functools.partial(probe, loss))(jnp.float32(2.0), x, jnp.int32(2))
    assert error(found.values["g"], x + 2) < 1e-6
    assert set(found.cotangents) == {"out"}
    assert np.isnan(probe(loss, jnp.float32(2.0), x, jnp.int32(0)).values["g"]).all()


@jax.custom_vjp
def tripled(x):
    return tap(jnp.sin(x), "inside")


tripled.defvjp(lambda x: (tripled(x), None), lambda _, g: (3 * g,))


@jax.custom_jvp
def straight(x):
    return tap(jnp.round(x), "inside")


straight.defjvp(lambda primals, tangents: (straight(*primals), 5 * tangents[0]))


@pytest.mark.parametrize(
    ("rule", "inside", "slope"), [(tripled, jnp.sin, 3.0), (straight, jnp.round, 5.0)]
)
def test_rules_of_their_own_keep_their_derivative(rule, inside, slope, weights):
    ws, x = weights
    found = probe(lambda ws, x: jnp.sum(rule(tap(x @ ws[0], "z")) * 2), ws, x)
    assert error(found.values["inside"], inside(x @ ws[0])) < 1e-6
    assert set(found.cotangents) == {"z"}
    np.testing.assert_array_equal(found.cotangents["z"], np.full((5, 3), 2 * slope))
    scanned = lambda ws, x: jnp.sum(lax.scan(lambda h, w: (rule(tap(h @ w, "z")), None), x, ws)[0])
    found = probe(jax.jit(scanned), ws, x)
    assert found.values["inside"].shape == (4, 5, 3)
    np.testing.assert_array_equal(found.grads, jax.grad(scanned)(ws, x))


def test_names_in_a_shard_map_are_refused(weights):
    ws, x = weights
    try:
        from jax import shard_map
    except ImportError:  # before jax 0.6.1
        from jax.experimental.shard_map import shard_map
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("i",))
    spec = jax.sharding.PartitionSpec()
    inside = shard_map(lambda x: tap(x * 2, "hidden"), mesh=mesh, in_specs=spec, out_specs=spec)
    found = probe(lambda ws, x: jnp.sum(tap(inside(x @ ws[0]), "seen")), ws, x)
    assert set(found.values) == {"seen"}
    assert "shard_map" in found.skipped["hidden"]
    with pytest.raises(ValueError, match=r"no named value.*hidden.*shard_map"):
        probe(lambda ws, x: jnp.sum(inside(x @ ws[0])), ws, x)


# ---- composition, dtypes, arguments


def test_axes_that_a_vmap_maps_come_first(weights):
    w, x = jnp.ones((4, 3)), weights[1]
    loss = lambda w, x: jnp.sum(
        jnp.sin(jax.vmap(lambda x: tap(w @ x, "h"))(x))
    )  # of its own accord vmap gives (4, 5)
    found = probe(loss, w, x)
    assert error(found.values["h"], x @ w.T) < 1e-6
    assert error(found.cotangents["h"], jnp.cos(x @ w.T)) < 1e-6
    twice = lambda w, x: jnp.sum(
        jax.vmap(lambda y: jax.vmap(lambda x: tap(w @ x, "h"))(y))(jnp.stack([x, 2 * x]))
    )
    assert error(probe(twice, w, x).values["h"], jnp.stack([x @ w.T, 2 * x @ w.T])) < 1e-6
    plain = jax.make_jaxpr(loss)(w, x)  # without a probe nothing is moved for the name's sake
    names = [eqn for eqn in plain.jaxpr.eqns if eqn.primitive.name == "gradjax_name"]
    assert [eqn.outvars[0].aval.shape for eqn in names] == [(4, 5)]


@pytest.mark.slow
def test_a_probe_inside_jit_vmap_and_grad(weights, report):
    _, x = weights
    seeds = 0.7 * jax.random.normal(jax.random.key(5), (3, 4, 3, 3))
    loss = lambda ws, x: unrolled(tap, ws, x)
    lanes = jax.jit(jax.vmap(lambda ws: probe(loss, ws, x)))(seeds)
    for i, ws in enumerate(seeds):
        agree(jax.tree.map(lambda x, i=i: x[i], lanes), plainly(unrolled, ws, x), report)
    grads = jax.grad(lambda ws: probe(loss, ws, x).loss)(seeds[0])
    assert error(grads, plainly(unrolled, seeds[0], x)[3]) < 1e-6
    size = lambda of: lambda ws: jnp.sum(jnp.square(of(ws)))
    found = jax.grad(size(lambda ws: probe(loss, ws, x).cotangents["1h"]))(seeds[0])
    expected = jax.grad(size(lambda ws: plainly(unrolled, ws, x)[2]["1h"]))(seeds[0])
    assert error(found, expected) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "tol"), [("bfloat16", 0.02), ("float16", 0.003), ("float64", 1e-14)]
)
def test_dtypes(dtype, tol, weights, report):
    with x64(dtype == "float64"):
        ws, x = (jnp.asarray(np.asarray(a), dtype) for a in weights)
        found = probe(looped_scan, ws, x)
        assert {
            str(x.dtype) for x in (*found.values.values(), *found.cotangents.values(), found.loss)
        } == {dtype}
        agree(
            found,
            plainly(looped, ws, x),
            lambda name, error: report(f"probe in {dtype}", error),
            tol,
        )


def looped_scan(ws, x):
    return mean_square(lax.scan(lambda h, w: (layer(tap, h, w, ""), None), x, ws)[0])


def test_arguments_of_every_kind(weights):
    ws, x = weights

    def loss(params, key, batch, kind, twice, nothing):
        h = tap(batch["x"] @ params[0], "h")
        assert kind == "tanh" and nothing is None
        noise = jax.random.normal(key, h.shape)
        h = tap(jnp.tanh(h) + noise, "noisy")
        count = tap(jnp.argmax(h, axis=1), "count")  # an integer: the identity, and no name
        loss = jnp.mean(h) * (2 if twice else 1) + jnp.take(h, 0) * batch["number"]
        return loss, {"count": count, "key": key}

    args = (jax.random.key(3), {"x": np.asarray(x), "number": 2.5}, "tanh", True, None)
    found = probe(loss, (ws[0],), *args, has_aux=True)
    expected, aux = loss((ws[0],), *args)
    assert error(found.loss, expected) < 1e-6
    assert set(found.values) == {"h", "noisy"}
    np.testing.assert_array_equal(found.aux["count"], aux["count"])
    assert found.aux["key"] == args[0]
    cotangent = jnp.full((5, 3), 2 / 15).at[0, 0].add(2.5)
    assert error(found.cotangents["noisy"], cotangent) < 1e-6


def test_a_tap_of_a_pytree_names_its_leaves():
    def loss(w):
        marked = tap({"a": w, "b": (2 * w, jnp.int32(1))}, "p")
        return jnp.sum(marked["a"] * marked["b"][0])

    found = probe(loss, jnp.ones(2))
    assert {name: x.tolist() for name, x in found.cotangents.items()} == {
        "p['a']": [2.0, 2.0],
        "p['b'][0]": [1.0, 1.0],
    }


# ---- traced anew, and nothing left behind


def test_functions_jitted_and_called_before_are_probed(weights, report):
    ws, x = weights
    inner = jax.jit(lambda h, w: layer(tap, h, w, ""))
    scanned = jax.jit(
        lambda ws, x: mean_square(lax.scan(lambda h, w: (inner(h, w), None), x, ws)[0])
    )
    before = jax.grad(scanned)(ws, x)
    for _ in range(2):
        agree(probe(scanned, ws, x), plainly(looped, ws, x), report)
    np.testing.assert_array_equal(jax.grad(scanned)(ws, x), before)
    np.testing.assert_array_equal(probe(scanned, ws, x).grads, before)


# ---- bad input


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
