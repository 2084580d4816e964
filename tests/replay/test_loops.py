"""The iteration of a loop, and the entry, at which something became inf or NaN."""

import os
import subprocess
import sys

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax import lax

from gradjax import find_nonfinite
from gradjax.replay.loops import _shards
from gradjax.replay.tape import inputs, record
from gradjax.replay.walk import trace_back

LENGTH = 12


def walk(function, *args):
    (value,) = record(jax.make_jaxpr(function)(*args), inputs(list(args)))
    return trace_back(value, "nan" if value.nan else "inf")


@settings(max_examples=15)
@given(st.integers(0, LENGTH - 1), st.integers(0, 2), st.booleans(), st.booleans())
def test_the_iteration_at_which_a_scan_fails(bad, row, reverse, in_carry):
    rows = np.ones((LENGTH, 3), np.float32)
    rows[bad, row] = 0.0

    def loss(scale, rows):
        def step(h, x):
            logs = jnp.log(scale * x)
            return (h + logs, h) if in_carry else (h * 0.5, logs)

        h, given_out = lax.scan(step, jnp.zeros(3), rows, reverse=reverse)
        return jnp.sum(h) + jnp.sum(given_out)

    culprit = walk(loss, jnp.float32(1.0), jnp.asarray(rows))
    assert culprit.step.name == "log" and culprit.entry == (row,)
    assert culprit.step.context.iterations == (("scan", bad),)


def test_the_iteration_of_a_while_and_of_a_scan_around_it():
    def loss(w, rows):
        def outer(total, x):
            def body(state):
                i, h = state
                return i + 1, h / (x - i)

            _, h = lax.while_loop(lambda state: state[0] < 6, body, (0.0, w))
            return total + h, None

        return lax.scan(outer, w, rows)[0]

    culprit = walk(loss, jnp.float32(1.0), jnp.array([9.5, 8.5, 4.0, 7.5]))
    assert culprit.step.name == "div"
    assert culprit.step.context.iterations == (("scan", 2), ("while", 4))


def test_a_value_that_was_bad_before_the_loop_is_followed_out_of_it():
    def loss(w, x):
        h, _ = lax.scan(lambda h, _: (h * 0.5, None), jnp.log(w * x), None, length=20)
        return jnp.sum(h)

    culprit = walk(loss, jnp.float32(0.0), jnp.ones(3))
    assert culprit.step.name == "log" and culprit.step.context.iterations == ()


def test_the_first_of_thousands_of_iterations_is_found_at_once():
    def loss(w, x):
        h, _ = lax.scan(lambda h, _: (h * w, None), x, None, length=3000)
        return jnp.sum(h)

    culprit = walk(loss, jnp.float32(1.3), jnp.ones(3))
    ((_, iteration),) = culprit.step.context.iterations
    assert iteration == int(np.log(np.finfo(np.float32).max) / np.log(1.3))


def test_the_backward_pass_of_a_scan_leads_to_its_forward_iteration():
    def loss(w, x):
        def step(h, t):
            return h + jnp.sqrt(jnp.abs(w * (t - 7))), None

        return jnp.sum(lax.scan(step, x, jnp.arange(10.0))[0])

    found = find_nonfinite(loss, jnp.float32(1.0), jnp.zeros(3)).culprit
    assert (found.forward, found.phase, found.iterations) == ("sqrt", "backward", (("scan", 7),))


@pytest.mark.parametrize("spec", [(None, "a"), ("b", "a"), (("a", "b"), None), ("a",), ()])
def test_shards_hold_the_entries_of_the_whole(spec):
    sizes = {"a": 2, "b": 3}
    whole = np.arange(12 * 4).reshape(12, 4)
    shards = _shards(whole, spec, sizes)
    names = [n for part in spec for n in (part if isinstance(part, tuple) else (part,)) if n]
    local = whole.size // int(np.prod([sizes[name] for name in names], initial=1))
    assert shards.shape[:2] == (2, 3) and shards[0, 0].size == local
    assert sorted(set(shards.ravel())) == list(range(whole.size))
    if spec == ("b", "a"):
        assert (shards[1, 2] == whole[8:, 2:]).all()
    if spec == (("a", "b"), None):
        assert (shards[1, 0] == whole[6:8]).all()


@pytest.mark.slow
@pytest.mark.parametrize("check", [True, False])
def test_a_program_over_two_devices(check):
    """In a process of its own, which has them."""
    program = f"""
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from gradjax import find_nonfinite
mesh = Mesh(np.array(jax.devices()), ("data",))
def local(w, x):
    total = jax.lax.psum(jnp.sum(x), "data")
    return jax.lax.pmean(jnp.sum(jnp.log(x @ w)) / total, "data")
mapped = jax.shard_map(
    local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma={check}
)
x = jnp.ones((4, 3)).at[2].set(0.0)
found = find_nonfinite(lambda w, x: mapped(w, x), jnp.ones(3), x).culprit
print(found.reason, found.line.text.strip(), found.entry)
"""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert done.stdout.split()[0] == "log_of_zero" and "(1, 0)" in done.stdout, done.stderr
