"""The figure of a verdict: drawn without a warning whatever the numbers are, the findings' places
marked."""

import warnings

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from pathologies.synthetic import PLANTED

import gradjax
from gradjax.diagnosis import measurements
from gradjax.diagnosis.verdict import judge
from gradjax.report.verdict import verdict_figure


@pytest.fixture(autouse=True)
def closed():
    """pyplot keeps every figure until it is closed."""
    yield
    plt.close("all")


def measured(depth, seeds=3, seq_len=0):
    rng = np.random.default_rng(0)
    names = [f"a_long_path/of_modules/layers_{i}" for i in range(depth)]
    variables = ("log_activation_rms", "log_cotangent_rms", "log_gradient_norm")
    data = {name: (("seed", "layer"), rng.standard_normal((seeds, depth))) for name in variables}
    if seq_len:
        of_time = ("log_time_activation_rms", "log_time_cotangent_rms")
        shape = (seeds, seq_len)
        data |= {name: (("seed", "time"), rng.standard_normal(shape)) for name in of_time}
    return xr.Dataset(data, {"layer": names}, {"recurrence": "cell"} if seq_len else {})


def drawn(ds, marks=(), title="a verdict"):
    """Labels of the ticks below, texts of the marks, and bars."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = verdict_figure(ds, marks, title)
        figure.canvas.draw()
    low = figure.axes[1 if len(figure.axes) > 1 else 0]
    texts = [text.get_text() for ax in figure.axes for text in ax.texts]
    labels = [label for ax in figure.axes for label in ax.get_legend_handles_labels()[1]]
    bars = [label for label in labels if ":" in label]
    return [label.get_text() for label in low.get_xticklabels()], texts, bars


@pytest.mark.parametrize(
    ("depth", "seq_len"), [(0, 0), (1, 0), (2, 0), (13, 0), (0, 20), (1, 20), (12, 20), (1000, 20)]
)
def test_any_depth_is_drawn(depth, seq_len):
    names, _, bars = drawn(measured(depth, seq_len=seq_len))
    assert not bars
    if not seq_len or depth > 1:
        assert len(names) <= 12 and all(len(name) <= 24 for name in names)


def test_marked_layers_are_named_and_crowded_texts_all_stand():
    marks = [
        ("layer", 7, "saturated units"),
        ("layer", 8, "vanishing gradients"),
        ("layer", 7, "rank collapse"),
    ]
    names, texts, _ = drawn(measured(100), marks)
    assert texts == ["saturated units, rank collapse", "vanishing gradients"]
    assert {"layers_7", "layers_8"} <= {name.rpartition("/")[2] for name in names}


BARS = [(-np.inf, "zero"), (np.inf, "inf or NaN"), (np.nan, "inf or NaN")]


@pytest.mark.parametrize(("value", "text"), BARS)
def test_what_a_logarithm_cannot_show_is_a_bar(value, text):
    ds = measured(20, seq_len=5)
    ds["log_cotangent_rms"].values[:, 3:9] = value
    ds["log_gradient_norm"].values[:] = value
    assert drawn(ds)[2] == [f"cotangent: {text}", f"gradient: {text}"]


def test_a_diagnosis_marks_its_step_of_a_recurrence():
    seen = PLANTED["exploding_gradients"][1]()
    found = judge([seen], measurements.table([seen]))
    assert found.findings[0].where == {"kind": "step", "index": 49, "name": "cell[49]"}
    texts = [text.get_text() for ax in found.figure().axes for text in ax.texts]
    assert "exploding gradients" in texts


@pytest.mark.slow
def test_a_diagnosed_recurrence_is_drawn_over_its_steps():
    def loss(params, x):
        step = lambda h, row: (gradjax.tap(h @ params["w"] + row, "h"), None)
        return jnp.mean(jax.lax.scan(step, jnp.zeros((4, 16)), x)[0] @ params["readout"])

    params = {"w": 1.5 * jnp.eye(16), "readout": jnp.ones((16, 1))}
    verdict = gradjax.diagnose(loss, params, jax.random.normal(jax.random.key(0), (30, 4, 16)))
    assert verdict.measurements.sizes["time"] == 30
    texts = [text.get_text() for ax in verdict.figure().axes for text in ax.texts]
    assert "exploding gradients" in texts
