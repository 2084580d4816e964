"""`find_nonfinite` on planted programs, on harmless ones, and on bad input."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pathologies.nonfinite import BROKEN, HARMLESS, misses, search

from gradjax import find_nonfinite
from gradjax.replay.reasons import REASONS
from support import ROOT

# One of each reason, and of each kind of program, in the fast tests.
FAST = {
    "sqrt_at_zero_behind_three_layers",
    "attention_row_all_masked",
    "float16_loss_scale",
    "scan_fails_at_step_37",
    "adam_zero_eps_float16",
    "where_sqrt",
    "parabola_without_roots",
    "mean_of_an_empty_slice",
    "nearest_rotation_by_svd",
    "rule_of_a_custom_vjp_divides_by_zero",
    "sparse_penalty_in_a_fori_loop",
    "angle_between_equal_directions",
    "transport_cost_of_forbidden_pairs",
}
ONE_DEVICE = [case for case in BROKEN if case.device_count == 1]
SEVERAL_DEVICES = [case.name for case in BROKEN if case.device_count > 1]


def parameters(cases, fast):
    return [
        pytest.param(case, id=case.name, marks=() if fast(case) else pytest.mark.slow)
        for case in cases
    ]


def test_the_planted_programs_have_every_reason():
    assert len(BROKEN) >= 60 and len(HARMLESS) >= 40
    assert {case.name for case in BROKEN} >= FAST
    unplanted = set(REASONS) - {case.reason for case in BROKEN}
    assert unplanted == {"invalid_operation", "kernel", "bad_state"}


@pytest.mark.parametrize("case", parameters(ONE_DEVICE, lambda case: case.name in FAST))
def test_operation_line_and_reason_of_a_planted_program(case):
    found = search(case)
    assert not misses(case, found), f"{misses(case, found)}\n{found}"
    assert REASONS[case.reason][0].split("{")[0] in str(found)


@pytest.mark.parametrize("case", parameters(HARMLESS, lambda case: HARMLESS.index(case) % 9 == 0))
def test_inf_that_reaches_nothing_is_not_reported(case):
    found = search(case)
    assert not found and found.note.startswith("Nothing is not finite"), str(found)


@pytest.mark.slow
def test_programs_over_several_devices():
    command = [sys.executable, str(ROOT / "tests" / "pathologies" / "nonfinite.py"), "--only"]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run([*command, *SEVERAL_DEVICES], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr


# What is said


def root_of_the_norm(w, x):
    return jnp.mean(jnp.sqrt(jnp.sum((x @ w) ** 2, -1)))


def test_the_text_shows_the_line_with_the_operation_marked():
    found = find_nonfinite(root_of_the_norm, jnp.zeros((3, 3)), jnp.ones((2, 3)))
    text = str(found)
    assert "The gradient of params is not finite" in text
    assert "in the derivative of sqrt" in text and "in root_of_the_norm" in text
    marked = next(line for line in text.splitlines() if "^" in line)
    source = text.splitlines()[text.splitlines().index(marked) - 1]
    start, end = marked.index("^"), marked.rindex("^") + 1
    assert source[start:end] == "jnp.sqrt(jnp.sum((x @ w) ** 2, -1))"
    assert found.culprit.example == 0 and found.culprit.operands == ("0.5", "0")
    assert "add an eps inside" in text


def test_how_far_out_of_range_is_the_logarithm_of_the_result():
    for function, exponent in (
        (lambda w: jnp.exp(w * 200.0), 200 / np.log(10)),
        (lambda w: w * jnp.float32(1e20) * 1e30, 50),
        (lambda w: jnp.square(w * 1e25), 50),
        (lambda w: (w * 1e13) ** 4, 52),
        (lambda w: jnp.float32(1e30) * w / 1e-20, 50),
        (lambda w: jnp.cosh(w * 100.0), 100 / np.log(10) - np.log10(2)),
    ):
        found = find_nonfinite(lambda w, f=function: jnp.sum(f(w)), jnp.float32(1.0)).culprit
        assert found.reason == "overflow" and f"about 1e{exponent:.0f}" in found.words, found.words


def test_an_outer_line_is_named_where_the_operation_is_in_a_library():
    def loss(params, labels):
        logits = jnp.log(params * 0)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    found = find_nonfinite(loss, jnp.ones((2, 3)), jnp.array([0, 1])).culprit
    assert found.line.function == "loss" and "jnp.log(params * 0)" in found.line.text
    assert found.line.file == __file__


# Nothing, and bad input


def mean_square(w, x):
    return jnp.mean((x @ w) ** 2)


def test_finite_programs_are_said_to_be_finite():
    found = find_nonfinite(mean_square, jnp.eye(3), jnp.ones((2, 3)), tx=optax.sgd(0.1))
    assert not found and found.culprit is None and found.loss == 1.0
    assert str(found) == (
        "Nothing is not finite: the loss (1), its gradients, the update and the new parameters "
        "are finite."
    )


def test_a_loss_that_changes_between_two_traces_is_said_to():
    rng = np.random.default_rng(0)

    def drawn(w, x):
        return mean_square(w, x) * rng.random()

    def captured(w, x):
        return mean_square(w, x + rng.random(x.shape).astype(np.float32))

    for loss, what in ((drawn, "mul at"), (captured, "an array of shape (2, 3)")):
        note = find_nonfinite(loss, jnp.eye(3), jnp.ones((2, 3))).note
        assert "traced twice" in note and what in note and "as arguments" in note


def test_errors_of_a_loss_are_those_of_jax():
    with pytest.raises(jax.errors.TracerBoolConversionError):
        find_nonfinite(lambda w: w if w > 0 else -w, jnp.float32(1.0))
    with pytest.raises(ValueError, match="find_nonfinite: the loss returns"):
        find_nonfinite(lambda w: w, jnp.ones(3))
    with pytest.raises(ValueError, match="find_nonfinite: the leaves of params are int32"):
        find_nonfinite(mean_square, jnp.ones((3, 3), jnp.int32), jnp.ones((2, 3)))


def test_aux_is_left_alone():
    def loss(w, x):
        return mean_square(w, x), {"log": jnp.log(w * 0)}

    assert not find_nonfinite(loss, jnp.eye(3), jnp.ones((2, 3)), has_aux=True)


def test_a_state_that_is_not_finite_is_named():
    tx = optax.adam(0.1)
    state = tx.init(jnp.eye(3))
    bad = (state[0]._replace(mu=state[0].mu.at[0, 0].set(jnp.nan)), *state[1:])
    found = find_nonfinite(mean_square, jnp.eye(3), jnp.ones((2, 3)), tx=tx, opt_state=bad).culprit
    assert (found.phase, found.name, found.reason) == ("optimizer", "opt_state[0].mu", "bad_state")


def test_an_optimiser_that_needs_the_loss_gets_it():
    tx = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    assert not find_nonfinite(mean_square, jnp.eye(3), jnp.ones((2, 3)), tx=tx)
