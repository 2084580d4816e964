"""The coordinate check against the exponents of theory: what must pass passes, what must fail
fails.

Exponents of one step at small learning rate, n = width, pre-activations of tanh layers (Yang & Hu
2021, arXiv 2011.14522, for SGD; Adam's first update has entries of size learning rate). They follow
from Delta h = Delta W h with Delta W = -lr (cotangent) h^T for SGD and -lr sign(...) for Adam, and
a cotangent of size n^-1/2 at hidden units:

                  read-in   hidden   logits
    ntk, sgd        -1/2     -1/2      0       lazy
    standard, sgd   -1/2      1/2      1       the read-in is lazy, the rest explodes
    standard, adam    0        1    1 to 3/2   explodes
    mup               0        0       0
"""

import functools
import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr

from gradjax.diagnosis.coordinate import CoordinateCheck, coordinate_check, drifts, fitted
from gradjax.diagnosis.coordinate_runs import LEAVES, VALUES, matched
from gradjax.taps.names import tap
from support import SCRIPTS

SCRIPT = SCRIPTS / "coordinate_check.py"


@pytest.fixture
def as_users_run():
    """Optax's Adam and Linen's Dense mix dtypes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@functools.cache
def script():
    spec = importlib.util.spec_from_file_location("coordinate_script", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exponent(found, quantity, name, step, size="width"):
    ds, at = found.dataset, {"step": step, "name": name, "size": size}
    return float(ds[f"slope_log_{quantity}_rms"].sel(at)), float(
        ds[f"error_log_{quantity}_rms"].sel(at)
    )


def linear(width, depth, key, learning_rate=0.1, std=None, dtype=jnp.float32):
    """h_1 = W x, ..., loss = sum v^2 / 2 with v = the mean of h_depth; one tap per layer."""
    keys = jax.random.split(key, depth)
    sizes = [4] + [width] * depth
    weights = [
        jax.random.normal(k, (m, n), dtype) * jnp.asarray(std or m**-0.5, dtype)
        for k, m, n in zip(keys, sizes, sizes[1:], strict=False)
    ]

    def loss_fn(weights, x):
        h = x
        for i, w in enumerate(weights):
            h = tap(h @ w, f"h{i}")
        return jnp.mean(jnp.square(h)) / 2

    return loss_fn, weights, optax.sgd(learning_rate)


X = (jnp.ones((1, 4)),)


# Theory

# parametrisation, optimiser, learning rate; lower and upper bound of the exponents of the change
# after one step; the verdict
CASES = [
    (
        "ntk",
        "sgd",
        1e-2,
        {"read_in": (-0.5, -0.5), "block_0": (-0.5, -0.5), "read_out": (0, 0)},
        "vanishes",
    ),
    # a lower layer's n^-1/2 adds to the hidden layer's own n^1/2, and Adam's logits add n and
    # n^3/2: bounds
    (
        "standard",
        "sgd",
        1e-3,
        {"read_in": (-0.5, -0.5), "block_0": (0.25, 0.5), "read_out": (0.75, 1)},
        "vanishes",
    ),
    (
        "standard",
        "adam",
        1e-3,
        {"read_in": (0, 0), "block_0": (0.75, 1), "read_out": (1, 1.5)},
        "explodes",
    ),
    ("mup", "sgd", 1e-2, {"read_in": (0, 0), "block_0": (0, 0), "read_out": (0, 0)}, None),
    ("mup", "adam", 1e-3, {"read_in": (0, 0), "block_0": (0, 0), "read_out": (0, 0)}, None),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case[:2]))
def test_exponents_of_width_are_those_of_theory(case, report, as_users_run):
    parametrization, optimizer, learning_rate, expected, verdict = case
    check = script().Check(
        "", parametrization, optimizer, learning_rate, widths=(64, 128, 256, 512), depths=(1,)
    )
    found = coordinate_check(
        functools.partial(script().make_model, check),
        check.widths,
        1,
        args=script().batch(),
        num_seeds=8,
    )
    for name, (low, high) in expected.items():
        slope, error = exponent(found, "change", name, 1)
        z = (slope - np.clip(slope, low, high)) / error
        report("z of exponents of width", abs(z))
        # 8 seeds resolve what a finite width adds to the limit's exponent: up to 0.03 of it
        assert abs(z) < 3.5 or abs(slope - np.clip(slope, low, high)) < 0.03, (name, slope, error)
        assert error < 0.06
    assert found.ok == (verdict is None), found.verdict
    assert verdict is None or verdict in found.verdict


def mlp(mup, width, depth, key):
    """tanh MLP under Adam, drawn by NumPy: make_model need not be traceable."""
    draw = np.random.default_rng(np.asarray(jax.random.key_data(key))).standard_normal
    shapes = {"in": (4, width), "hidden": (width, width), "out": (width, 2)}
    std = {"in": 0.5, "hidden": width**-0.5, "out": 1 / width if mup else width**-0.5}
    params = {
        name: jnp.asarray(std[name] * draw(shape), jnp.float32) for name, shape in shapes.items()
    }

    def loss_fn(params, x):
        h = tap(x @ params["in"], "in")
        h = tap(jnp.tanh(h) @ params["hidden"], "hidden")
        return jnp.mean(jnp.square(tap(jnp.tanh(h) @ params["out"], "out") - 1.0))

    rate = (
        {"in": 1.0, "hidden": 32 / width, "out": 32 / width} if mup else dict.fromkeys(shapes, 1.0)
    )
    scale = optax.stateless(
        lambda updates, _: {name: rate[name] * x for name, x in updates.items()}
    )
    return loss_fn, params, optax.chain(optax.adam(1e-3), scale)


@pytest.mark.slow
def test_standard_parametrisation_fails_and_mup_passes(as_users_run):
    standard, mup = (
        coordinate_check(functools.partial(mlp, is_mup), (32, 256), 1, args=X, num_steps=2)
        for is_mup in (False, True)
    )
    assert not standard.ok
    first = standard.findings[0]
    assert (first.verdict, first.quantity, first.name, first.step) == (
        "explodes",
        "change",
        "hidden",
        1,
    )
    assert (
        abs(first.exponent - 1) < 3.5 * first.standard_error
    )  # of one example, lr sum |h_j|: exact
    assert (
        f"change of hidden after 1 updates goes as width^({first.exponent:+.2f} ± "
        in standard.verdict
    )
    assert mup.ok, mup
    # muP's logits shrink at creation, as width^-1/2, which is no finding
    slope, error = exponent(mup, "value", "out", 0)
    assert abs(slope + 0.5) < 4 * error


DEPTHS = [  # residual, optimiser; whether it passes
    ("scaled", "sgd", True),
    ("scaled", "adam", True),
    ("plain", "sgd", False),
    ("plain", "adam", False),
]


@pytest.mark.slow
@pytest.mark.parametrize(("residual", "optimizer", "passes"), DEPTHS)
def test_residual_branches_scaled_by_depth_keep_their_size(
    residual, optimizer, passes, as_users_run
):
    check = script().Check("", "mup", optimizer, 1e-3, residual, (64,), (4, 8, 16), 64, num_steps=2)
    found = script().run(check)
    assert found.ok == passes, found
    if not passes:
        slope, error = exponent(found, "value", "block_*[last]", 0, "depth")
        assert (
            0.25 < slope < 0.6 and slope > 3 * error
        )  # tends to 1/2: the sum of depth branches of size one
        assert exponent(found, "change", "block_*[last]", 1, "depth")[0] > 0.9
        assert "explodes with depth" in found.verdict


@pytest.mark.slow
def test_the_exponents_of_a_linear_network_are_exact(report):
    # h0 of size 1; the loss is a mean over the width, so each step moves h0 by lr (cotangent = h /
    # width) x^2: n^-1
    found = coordinate_check(linear, (16, 64, 256), 1, args=X, num_steps=1, num_seeds=8)
    slope, error = exponent(found, "value", "h0", 0)
    report("z of exponents of width", abs(slope) / error)
    assert abs(slope) < 3.5 * error
    slope, error = exponent(found, "change", "h0", 1)
    report("z of exponents of width", abs(slope + 1) / error)
    assert abs(slope + 1) < 3.5 * error
    assert found.findings[0].verdict == "vanishes"
    # the gradient is x h / width with x = 1: the same exponent, and a cotangent of h / width
    ds = found.dataset
    np.testing.assert_allclose(
        ds["log_gradient_rms"][..., 0], ds["log_cotangent_rms"][..., 0], rtol=1e-5
    )
    np.testing.assert_allclose(
        ds["log_update_rms"], ds["log_gradient_rms"] + np.log(0.1), rtol=1e-5
    )


@pytest.mark.slow
def test_exponents_of_width_and_depth_together():
    """Weights of std 0.5: h_l grows by 0.5 sqrt(width) per layer, so a depth more counts log(0.5
    sqrt(width)) more."""
    found = coordinate_check(
        lambda w, d, k: linear(w, d, k, std=0.5), (8, 32), (1, 4), args=X, num_steps=1
    )
    ds = found.dataset
    assert list(ds["name"].values) == ["h*[middle]", "h*[last]"]
    assert list(ds["size"].values) == ["width", "depth"]
    assert ds["log_value_rms"].dims == ("width", "depth", "seed", "step", "name")
    # the last layer: log rms h = depth log(0.5 sqrt(width)) + const, fitted by a plane
    w, d = np.meshgrid([8, 32], [1, 4], indexing="ij")
    y = (np.log(0.5 * np.sqrt(4)) + (d - 1) * np.log(0.5 * np.sqrt(w))).ravel()
    design = np.stack([np.ones(4), np.log(w).ravel(), np.log(d).ravel()], 1)
    expected = np.linalg.lstsq(design, y)[0][1:]
    for size, value in zip(("width", "depth"), expected, strict=True):
        slope, error = exponent(found, "value", "h*[last]", 0, size)
        assert abs(slope - value) < 3.5 * error


# What is measured


@pytest.mark.slow
def test_measurements_are_those_of_plain_training():
    found = coordinate_check(linear, (4, 8), 2, args=X, num_steps=3, num_seeds=2, seed=7)
    key = jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 8), 2), 2)[1]
    loss_fn, weights, tx = linear(8, 2, key)
    state, first = tx.init(weights), None
    for step in range(4):
        h = X[0] @ weights[0] @ weights[1]
        first = h if first is None else first
        at = found.dataset.sel(width=8, depth=2, seed=1, step=step)
        np.testing.assert_allclose(
            at["log_value_rms"].sel(name="h1"), 0.5 * jnp.log(jnp.mean(h**2)), rtol=1e-4
        )
        change = 0.5 * jnp.log(jnp.mean((h - first) ** 2))
        np.testing.assert_allclose(at["log_change_rms"].sel(name="h1"), change, rtol=1e-3)
        loss, grads = jax.value_and_grad(loss_fn)(weights, *X)
        np.testing.assert_allclose(at["loss"], loss, rtol=1e-4)
        expected = [0.5 * jnp.log(jnp.mean(g**2)) for g in grads]
        np.testing.assert_allclose(at["log_gradient_rms"], expected, rtol=1e-3)
        updates, state = tx.update(grads, state)
        weights = optax.apply_updates(weights, updates)


@pytest.mark.slow
def test_a_change_below_the_rounding_of_its_value_is_none():
    found = coordinate_check(lambda w, d, k: linear(w, d, k, 1e-9), (4, 8), 1, args=X, num_steps=1)
    assert np.isneginf(found.dataset["log_change_rms"]).all()
    assert not found.ok and "does not move in every run" in found.verdict
    assert "none" in str(found)


@pytest.mark.slow
def test_half_precision_and_values_out_of_the_range_of_squares():
    # squares of 1e30 leave the range of float32; bfloat16 values
    big = lambda w, d, k: linear(w, d, k, std=1e15 / w**0.5)
    found = coordinate_check(big, (4, 8), 1, args=(jnp.full((1, 4), 1e10),), num_steps=1)
    assert (
        25 * np.log(10) - 2
        < float(found.dataset["log_value_rms"].sel(step=0).max())
        < 25 * np.log(10) + 2
    )
    half = lambda w, d, k: linear(w, d, k, dtype=jnp.bfloat16)
    found = coordinate_check(half, (4, 8), 1, args=(jnp.ones((1, 4), jnp.bfloat16),), num_steps=1)
    assert np.isfinite(found.dataset["log_value_rms"]).all()


@pytest.mark.slow
def test_what_is_not_finite_is_a_finding():
    def make_model(width, depth, key):
        loss_fn, params, _ = linear(width, depth, key)
        return loss_fn, params, optax.sgd(jnp.inf if width == 8 else 0.1)

    found = coordinate_check(make_model, (4, 8), 1, args=X, num_steps=2, num_seeds=3)
    first = found.findings[0]
    seen = (first.verdict, first.quantity, first.name, first.step, first.size)
    assert seen == ("is not finite", "update", "0", 0, "3 of 6 runs")
    assert "The update of 0 after 0 updates is not finite in 3 of 6 runs" in found.verdict
    assert json.loads(found.to_json())["findings"][0]["exponent"] == "nan"


def test_a_check_from_models_to_json_and_words():
    found = coordinate_check(
        linear, (4, 8), 2, args=X, num_steps=2, num_seeds=2, select=lambda name: name == "h1"
    )
    assert list(found.dataset["name"].values) == ["h1"]
    record = json.loads(found.to_json())
    assert record["ok"] is found.ok and record["verdict"] == found.verdict
    assert record["meta"]["width"] == [4, 8] and record["meta"]["tolerance"] == 0.25
    assert len(record["findings"]) == len(found.findings)
    rows = record["exponents"]
    at_creation = [row for row in rows if row["quantity"] == "log_value_rms" and row["step"] == 0]
    assert [row["name"] for row in at_creation] == ["h1"]
    expected = exponent(found, "value", "h1", 0)
    assert at_creation[0]["exponent"] == pytest.approx(expected[0])
    assert at_creation[0]["standard_error"] == pytest.approx(expected[1])
    assert {row["name"] for row in rows if row["quantity"] == "log_update_rms"} == {"0", "1"}
    assert str(found).startswith(found.verdict)
    assert "Exponents of width (4, 8; 2 seeds)" in str(found)


def made_up(exponents, widths=(4, 8), seeds=3, steps=3, noise=0.0):
    """A check of measurements that follow exponents of width; a value's exponents are those of its
    size at creation and of its change.
    """
    rng, names = np.random.default_rng(0), list(exponents)
    log_width = np.log(np.array(widths))[:, None, None, None, None]
    shape = (len(widths), 1, seeds, steps, len(names))
    of_value, of_change = np.array(list(exponents.values())).T
    logs = dict.fromkeys((*VALUES, *LEAVES), np.zeros(shape))
    logs["log_value_rms"] = of_value * log_width + np.zeros(shape)
    logs["log_change_rms"] = of_change * log_width + noise * rng.standard_normal(shape)
    dims = ("width", "depth", "seed", "step")
    variables = {name: ((*dims, "name"), logs[name].copy()) for name in VALUES}
    variables |= {name: ((*dims, "leaf"), logs[name].copy()) for name in LEAVES}
    variables["loss"] = (dims, np.zeros(shape[:-1]))
    coords = {"width": list(widths), "depth": [1], "name": names, "leaf": names}
    return xr.Dataset(variables, coords, {"left_out": ""})


def judged(ds):
    ds = fitted(ds, ["width"])
    found, unclear = drifts(ds, 0.25)
    ds.attrs |= {"unclear": ", ".join(unclear), "tolerance": 0.25}
    return CoordinateCheck(ds, found)


def test_exponents_become_a_verdict():
    found = judged(made_up({"in": (0.0, -0.5), "hidden": (0.5, 0.0), "out": (-0.5, 0.0)}))
    seen = [(x.verdict, x.quantity, x.name, x.step, round(x.exponent, 6)) for x in found.findings]
    assert seen == [
        ("explodes", "value", "hidden", 0, 0.5),
        ("vanishes", "change", "in", 1, -0.5),
    ]
    assert found.verdict.startswith("The value of hidden after 0 updates goes as width^(+0.50 ±")
    assert found.verdict.endswith("it explodes with width, and 1 more.")
    assert judged(made_up({"in": (0.2, -0.2)})).ok


def test_the_first_value_that_is_not_finite_is_the_first_finding():
    ds = made_up({"in": (0.0, 0.0), "out": (0.5, 0.0)})
    ds["log_update_rms"][1, 0, :, 0, 1] = np.inf
    ds["log_value_rms"][1, 0, :, 1:, :] = np.nan
    found = judged(ds)
    first = found.findings[0]
    seen = (first.verdict, first.quantity, first.name, first.step, first.size)
    assert seen == ("is not finite", "update", "out", 0, "3 of 6 runs")
    assert "The update of out after 0 updates is not finite in 3 of 6 runs" in found.verdict
    assert json.loads(found.to_json())["findings"][0]["exponent"] == "nan"


def test_values_that_never_move_are_a_finding():
    found = judged(made_up({"in": (0.0, -np.inf)}))
    assert not found.ok and "does not move in every run" in found.verdict
    assert "none" in str(found)


def test_too_few_seeds_to_decide_is_said():
    found = judged(made_up({"in": (0.0, 0.0)}, widths=(4, 5), seeds=2, noise=0.3))
    assert found.ok
    assert found.verdict.endswith("but in may not: more seeds or larger sizes would show it.")


@pytest.mark.slow
def test_a_scanned_stack_is_one_value():
    def make_model(width, depth, key):
        weights = jax.random.normal(key, (depth, width, width)) / width**0.5

        def loss_fn(weights, x):
            h, _ = jax.lax.scan(
                lambda h, w: (tap(h @ w, "h"), None), jnp.ones((1, width)) * x, weights
            )
            return jnp.mean(h**2)

        return loss_fn, weights, optax.sgd(0.1)

    found = coordinate_check(make_model, 8, (2, 4), args=(jnp.ones(()),), num_steps=1)
    assert list(found.dataset["name"].values) == ["h"] and list(found.dataset["size"].values) == [
        "depth"
    ]


def test_names_are_matched_over_depths():
    names = lambda depth: [
        "in",
        *(f"b_{i}/{x}_{j}" for i in range(depth) for x in "ad" for j in range(2)),
        "out",
    ]
    labels, left_out = matched({depth: names(depth) for depth in (2, 4)})
    kinds = [f"b_*/{x}_{j}[{part}]" for x in "ad" for j in range(2) for part in ("middle", "last")]
    assert list(labels) == ["in", *kinds, "out"] and not left_out
    assert labels["b_*/d_1[middle]"] == {2: "b_0/d_1", 4: "b_1/d_1"}
    assert labels["b_*/d_1[last]"] == {2: "b_1/d_1", 4: "b_3/d_1"}
    labels, left_out = matched({1: ["Dense_0", "only"], 3: ["Dense_0", "Dense_1", "Dense_2"]})
    assert labels == {
        "Dense_*[middle]": {1: "Dense_0", 3: "Dense_1"},
        "Dense_*[last]": {1: "Dense_0", 3: "Dense_2"},
    }
    assert left_out == ["only"]


# Bad input


def renamed(width, depth, key):
    _, params, tx = linear(width, depth, key)
    return lambda w, x: jnp.sum(tap(x @ w[0], f"of{width}") ** 2), params, tx


def never(width, depth, key):
    raise AssertionError("the sizes are refused before a model is made")


BAD = [
    (never, 8, 2, {}, "widths 8 and depths 2; at least two of one of them"),
    (never, (8,), [2], {}, "two of one of them are needed"),
    (never, (8, 8), 2, {}, "different whole numbers"),
    (never, (8, 2.5), 2, {}, "different whole numbers"),
    (never, (8, 16), 0, {}, "different whole numbers"),
    (never, (8, 16), 2, {"num_seeds": 1}, "no standard error"),
    (never, (8, 16), 2, {"num_steps": 0}, "at least one step"),
    (
        lambda *_: (never, []),
        (8, 16),
        2,
        {},
        r"returns \(function, list\); \(loss_fn, params, tx\)",
    ),
    (lambda *_: None, (8, 16), 2, {}, "returns NoneType"),
    (lambda *_: (abs, {"a": "b"}, optax.sgd(1.0)), (8, 16), 2, {}, "gradjax.functional"),
]
BAD_WHEN_RUN = [
    (linear, {"select": lambda name: False}, "keeps none of the values h0, h1"),
    (renamed, {}, "names differ between widths 8 and 16 at depth 2: of8 only at the first, of16"),
    (lambda w, d, k: linear(w, d, jax.random.key(0)), {}, "draw the parameters from key"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case[-1][:40])
def test_bad_input_is_one_clear_error(case):
    make_model, widths, depths, options, message = case
    with pytest.raises(ValueError, match=message):
        coordinate_check(make_model, widths, depths, **{"num_steps": 1, "num_seeds": 2} | options)


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD_WHEN_RUN, ids=lambda case: case[-1][:40])
def test_a_model_that_cannot_be_compared_is_one_clear_error(case):
    make_model, options, message = case
    with pytest.raises(ValueError, match=message):
        coordinate_check(make_model, (8, 16), 2, args=X, num_steps=1, num_seeds=2, **options)


# The script and the figure


@pytest.mark.slow
def test_the_figure_has_a_line_for_every_layer_with_its_exponent(tmp_path):
    from gradjax.report.coordinate import coordinate_figure

    found = coordinate_check(linear, (4, 8), (2, 4), args=X, num_steps=1)
    for size in ("width", "depth"):
        figure = coordinate_figure(found.dataset, "title", size)
        assert [ax.get_xlabel() for ax in figure.axes] == [size] * 4
        legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        slope, _ = exponent(found, "value", "h*[last]", 0, size)
        assert f"{slope:+.2f}  h*[last]" in legend
        figure.savefig(tmp_path / "figure.png")


@pytest.mark.slow
def test_the_script_writes_a_figure_and_json(tmp_path):
    command = [
        sys.executable,
        SCRIPT,
        tmp_path / "mup.png",
        "--parametrization",
        "mup",
        "--widths",
        "32",
        "64",
        "--json",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] and (tmp_path / "mup.png").stat().st_size > 10_000
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "--parametrization" in done.stdout
