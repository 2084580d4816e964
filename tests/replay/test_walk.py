"""What an entry depends on, against numeric Jacobians; and where walks end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gradjax.replay.tape import Constant, Input, Step, inputs, record
from gradjax.replay.walk import depends_on, trace_back


def last_step(function, *args) -> Step:
    jaxpr = jax.make_jaxpr(function)(*args)
    return record(jaxpr, inputs(list(args)))[0].origin


X = jnp.arange(1.0, 13.0).reshape(3, 4)
Y = jnp.arange(2.0, 14.0).reshape(3, 4)
PREDICATE = jnp.array(np.arange(12).reshape(3, 4) % 3 == 0)
OPERATIONS = {
    "mul": (lambda x, y: x * y, (X, Y)),
    "mul_by_a_scalar": (lambda x, y: x * y, (X, jnp.float32(2.0))),
    "sub_of_a_column": (lambda x, y: lax.sub(x, y), (X, Y[:, :1])),
    "exp": (jnp.exp, (X,)),
    "transpose": (lambda x: x.T, (X,)),
    "reshape": (lambda x: x.reshape(2, 6), (X,)),
    "broadcast_in_dim": (lambda x: lax.broadcast_in_dim(x, (3, 2, 4), (0, 2)), (X,)),
    "slice": (lambda x: x[1:, ::2], (X,)),
    "rev": (lambda x: lax.rev(x, (1,)), (X,)),
    "concatenate": (lambda x, y: lax.concatenate((x, y), 1), (X, Y)),
    "dynamic_slice": (lambda x, i: lax.dynamic_slice(x, (i, 0), (2, 4)), (X, jnp.int32(1))),
    "gather": (lambda x, i: jnp.take(x, i, axis=0, mode="clip"), (X, jnp.array([2, 0, 2]))),
    "reduce_sum": (lambda x: lax.reduce_sum_p.bind(x, axes=(0,), out_sharding=None), (X,)),
    "reduce_max": (lambda x: lax.reduce_max(x, (1,)), (X,)),
    "dot_general": (lambda x, y: x @ y, (X, Y.T)),
    "dot_general_batched": (
        lambda x, y: lax.dot_general(x, y, (((1,), (1,)), ((0,), (0,)))),
        (jnp.stack([X, Y], -1), jnp.stack([Y, X, Y], -1)),
    ),
    "select_n": (lambda p, x, y: lax.select_n(p, x, y), (PREDICATE, X, Y)),
    "cumsum": (lambda x: lax.cumsum(x, 1), (X,)),
    "pad": (lambda x: lax.pad(x, jnp.float32(0), ((1, 0, 0), (0, 0, 1))), (X,)),
    "sort": (lambda x: lax.sort(x, dimension=1), (X[:, ::-1],)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_entry_depends_on_what_its_derivative_says(name):
    """Every operand entry with a derivative is among those named; for the operations whose rule is
    known, no other is.
    """
    function, args = OPERATIONS[name]
    step = last_step(function, *args)
    exact = name not in ("cumsum", "pad", "sort", "reduce_max")
    shape = step.outputs[0].shape
    floats = [k for k, x in enumerate(args) if jnp.issubdtype(x.dtype, jnp.floating)]
    jacobians = jax.jacobian(function, argnums=floats)(*args)
    for flat in range(0, int(np.prod(shape)), 3):
        entry = tuple(int(i) for i in np.unravel_index(flat, shape))
        index = depends_on(step, 0, entry)
        for k, jacobian in zip(floats, jacobians, strict=True):
            named = np.zeros(args[k].shape, bool)
            if index[k] is not None:
                named[index[k]] = True
            needed = np.asarray(jacobian)[entry] != 0
            assert not (needed & ~named).any(), (entry, index)
            assert not exact or (named == needed).all(), (entry, index)


# Where walks end


def walk(function, *args):
    jaxpr = jax.make_jaxpr(function)(*args)
    (value,) = record(jaxpr, inputs(list(args)))
    return trace_back(value, "nan" if value.nan else "inf")


def test_a_walk_ends_at_the_first_operation_of_several():
    culprit = walk(lambda x: jnp.sum(jnp.sqrt(jnp.log(x) - 1.0) * 2.0), X - 2.0)
    assert (culprit.step.name, culprit.entry) == ("log", (0, 0))


def test_inf_that_was_given_on_purpose_is_not_the_culprit():
    mask = jnp.where(PREDICATE, 0.0, -jnp.inf).at[1].set(-jnp.inf)
    masked = walk(lambda x, m: jnp.sum(jax.nn.softmax(x + m, axis=-1)), X, mask)
    assert masked.step.name == "sub" and masked.entry[0] == 1
    literal = walk(lambda x: jnp.sum(jnp.where(x > 0, x, -jnp.inf) * 0.0), X - 3.0)
    assert (literal.step.name, literal.entry) == ("mul", (0, 0))
    data = walk(lambda x: jnp.sum(x - jnp.mean(x)), X.at[2, 1].set(jnp.inf))
    assert isinstance(data.value.origin, Input) and data.entry == (2, 1)


def test_inf_that_an_operation_made_is_the_culprit_of_the_nan_it_becomes():
    culprit = walk(lambda x: jnp.sum(jnp.exp(x * 50.0) * 0.0), X)
    assert culprit.step.name == "exp" and [step.name for step in culprit.through] == ["mul"]


def test_an_entry_that_is_not_selected_is_never_met():
    x = X.at[0, 1].set(jnp.nan)
    assert not record(
        jax.make_jaxpr(lambda x: jnp.sum(jnp.where(jnp.isnan(x), 0.0, x)))(x), inputs([x])
    )[0].bad
    culprit = walk(lambda x: jnp.sum(jnp.where(jnp.isnan(x), 0.0, jnp.log(x - 4.0))), x)
    assert (culprit.step.name, culprit.entry) == ("log", (0, 0))


def test_a_captured_array_is_given_and_a_literal_is_a_constant():
    held = X.at[1, 1].set(jnp.nan)
    culprit = walk(lambda x: jnp.sum(x * held), X)
    assert culprit.value.origin == Constant(captured=True) and culprit.entry == (1, 1)
    assert walk(lambda x: jnp.sum(x) * jnp.nan, X).value.origin == Constant(captured=False)
