"""A probe of random programs (nested scans, branches, calls) against the same written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_taps import at_once, mean_square, plainly, rows_of, x64
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from gradjax import tap

# Random programs: h (2, 3, 4), one scalar of params for each operation

OPS = {
    "scale": lambda h, s: h * s,
    "tanh": lambda h, s: jnp.tanh(h + s),
    "sin": lambda h, s: jnp.sin(s * h),
    "roll": lambda h, s: h + s * jnp.roll(h, 1, axis=-1),
    "norm": lambda h, s: h / jnp.sqrt(s**2 + jnp.sum(h * h, axis=-1, keepdims=True)),
}
MAX = 40


def operations():
    leaf = st.tuples(st.sampled_from(sorted(OPS)), st.booleans())

    def wrapped(inner):
        body = st.lists(inner, min_size=1, max_size=3)
        return st.one_of(
            st.tuples(st.sampled_from(["jit", "remat"]), body),
            st.tuples(st.just("scan"), body, st.integers(1, 3), st.booleans()),
            st.tuples(st.just("cond"), body, body),
        )

    return st.lists(st.recursive(leaf, wrapped, max_leaves=6), min_size=1, max_size=4)


def numbered(program, count):
    """The program with numbers, so that every operation has a parameter and name of its own."""
    out = []
    for kind, *rest in program:
        k = next(count)
        parts = [numbered(part, count) if isinstance(part, list) else part for part in rest]
        out.append((kind, k, *parts))
    return out


def structured(program, params, h, row):
    """With scan, cond, jit and remat; `row` counts iterations, and decides which branches are
    taken."""
    for kind, k, *rest in program:
        run = lambda h, row, part=rest[0]: structured(part, params, h, row)
        if kind in OPS:
            h = OPS[kind](h, params[k] * (1 + 0.1 * row.astype(params.dtype)))
            h = tap(h, f"h{k}") if rest[0] else h
        elif kind == "jit":
            h = jax.jit(run)(h, row)
        elif kind == "remat":
            h = jax.checkpoint(run)(h, row)
        elif kind == "scan":
            body = lambda h, i, run=run, row=row: (run(h, row + i), None)
            h, _ = lax.scan(body, h, jnp.arange(rest[1], dtype=jnp.int32), reverse=rest[2])
        else:
            other = lambda h, row, part=rest[1]: structured(part, params, h, row)
            h = lax.cond((k + row) % 2 == 0, run, other, h, row)
    return h


def written_out(at, program, params, h, row=0, rows=()):
    for kind, k, *rest in program:
        if kind in OPS:
            h = OPS[kind](h, params[k] * (1 + 0.1 * row))
            h = at(h, f"h{k}[{','.join(map(str, rows))}]" if rows else f"h{k}") if rest[0] else h
        elif kind == "scan":
            for i in range(rest[1])[:: -1 if rest[2] else 1]:
                h = written_out(at, rest[0], params, h, row + i, (*rows, i))
        else:
            part = rest[(k + row) % 2] if kind == "cond" else rest[0]
            h = written_out(at, part, params, h, row, rows)
    return h


def error(a, b):
    """Largest difference relative to the largest entry, or to 0.01: norms in a row cancel a
    cotangent to nothing."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return np.abs(a - b).max() / max(np.abs(b).max(), 0.01)


def check_random_program(program, vmapped):
    # In float64 the cancellation in the program itself is far below the tolerance.
    with x64():
        program = [*numbered(program, iter(range(MAX - 1))), ("tanh", MAX - 1, True)]
        rng = np.random.default_rng(0)
        params, x = jnp.asarray(0.5 + rng.random(MAX)), jnp.asarray(rng.standard_normal((2, 3, 4)))

        def loss(params, x):
            run = lambda x: structured(program, params, x, jnp.int32(0))
            return mean_square((jax.vmap(jax.vmap(run)) if vmapped else run)(x).reshape(6, 4))

        def by_hand(at, params, x):
            return mean_square(written_out(at, program, params, x).reshape(6, 4))

        found = at_once(loss, params, x)
        value, values, cotangents, grads = plainly(by_hand, params, x)
        assert max(error(found.loss, value), error(found.grads, grads)) < 1e-12
        taken = {name: np.zeros(found.values[name].shape[:-3], bool) for name in found.values}
        for name, expected in values.items():
            base, _, index = name.rstrip("]").partition("[")
            taken[base][tuple(map(int, index.split(","))) if index else ()] = True
            assert error(rows_of(found.values, name), expected) < 1e-12
            assert error(rows_of(found.cotangents, name), cotangents[name]) < 1e-12
        assert set(found.cotangents) == set(found.values)
        # Branches that were not taken.
        for name, rows in taken.items():
            assert np.isnan(np.asarray(found.values[name])[~rows]).all()
            assert not np.asarray(found.cotangents[name])[~rows].any()


LEAF, OTHER = ("norm", True), ("roll", True)
NESTED = [
    ("scan", [("cond", [LEAF], [("jit", [OTHER])]), ("remat", [("tanh", True)])], 3, True),
    ("cond", [("scan", [LEAF, ("scale", True)], 2, False)], [("sin", True)]),
]


def test_a_program_of_every_kind():
    check_random_program(NESTED, vmapped=True)


@pytest.mark.slow
@settings(max_examples=15)
@given(operations(), st.booleans())
def test_random_programs(program, vmapped):
    check_random_program(program, vmapped)
