"""What a sweep varies: forms of values, layout of members, and every name that cannot be swept."""

import numpy as np
import pytest

from gradjax.experiment import config, grid
from gradjax.experiment.schema import ConfigError, Experiment

BASE = config.replace(Experiment(), {"train.num_seeds": 3, "optimizer.clipping": "clip"})


def test_members_are_the_product_of_the_dimensions_with_the_seed_fastest():
    sweep = grid.grid(BASE, {"optimizer.learning_rate": [0.1, 1.0], "model.sigma_w": [1.0, 2.0]})
    seeds, values = sweep.members()
    assert (
        list(sweep.dims) == ["optimizer.learning_rate", "model.sigma_w", "seed"]
        and sweep.num_members == 12
    )
    np.testing.assert_array_equal(seeds, [0, 1, 2] * 4)
    np.testing.assert_array_equal(values["model.sigma_w"], np.repeat([1, 2, 1, 2], 3))
    np.testing.assert_allclose(values["optimizer.learning_rate"], np.repeat([0.1, 1], 6))


def test_grids_and_draws():
    log = {"low": 1e-4, "high": 1.0, "num": 5, "scale": "log"}
    drawn = {"low": 1e-4, "high": 1.0, "draws": 400, "scale": "log"}
    sweep = grid.grid(
        BASE,
        {"optimizer.max_norm": log, "optimizer.learning_rate": drawn, "model.sigma_w": {**drawn}},
    )
    np.testing.assert_allclose(
        sweep.dims["optimizer.max_norm"], 10.0 ** np.arange(-4, 1), rtol=1e-12
    )
    assert sweep.dims["draw"].size == 400 and list(sweep.dims) == [
        "optimizer.max_norm",
        "draw",
        "seed",
    ]
    exponent = np.log10(sweep.drawn["optimizer.learning_rate"])
    assert -4 <= exponent.min() < exponent.max() <= 0
    # uniform in the logarithm: the mean of 400 is within 3 standard errors of -2, and that of a
    # linear draw is not
    assert abs(exponent.mean() + 2) < 3 * 4 / np.sqrt(12 * 400)
    assert abs(np.corrcoef(exponent, np.log(sweep.drawn["model.sigma_w"]))[0, 1]) < 0.2
    again = grid.grid(BASE, {"optimizer.learning_rate": drawn, "model.sigma_w": drawn})
    assert list(again.drawn) == ["optimizer.learning_rate", "model.sigma_w"]


def test_a_name_that_is_none_by_default_may_be_swept():
    assert (
        grid.grid(
            BASE, {"model.dropout": [0.1, 0.5], "optimizer.weight_decay": [0.0, 1e-3]}
        ).num_members
        == 12
    )


def test_static_combinations_are_cells():
    cells = grid.grid(
        BASE, {}, {"model.activation": ["tanh", "relu"], "model.depth": [2, 5]}
    ).cells()
    assert cells[1] == {"model.activation": "tanh", "model.depth": 5} and len(cells) == 4


@pytest.mark.parametrize(
    "vary, static, words",
    [
        ({"optimizer.learning_rat": [1.0]}, {}, "did you mean 'optimizer.learning_rate'"),
        ({"model.depth": [1, 2]}, {}, "put it under sweep.static"),
        ({"task.validation": [0.1]}, {}, "cannot be vmapped"),
        ({"optimizer.name": ["sgd"]}, {}, "cannot be vmapped"),
        ({"model.sigma_w": [-1.0]}, {}, "model.sigma_w = -1.0 is out of range"),
        ({"model.sigma_w": [float("nan")]}, {}, "out of range"),
        ({"model.sigma_w": ["1"]}, {}, "have to be numbers"),
        ({"model.sigma_w": []}, {}, "is no list of numbers"),
        ({"model.sigma_w": 1.0}, {}, "is no list of numbers"),
        ({"model.sigma_w": {"low": 1.0, "num": 3}}, {}, "needed: low, high and num"),
        ({"model.sigma_w": {"low": 0.0, "high": 1.0, "num": 3, "scale": "log"}}, {}, "low > 0"),
        (
            {"model.sigma_w": {"low": 0.0, "high": 1.0, "num": 3, "scale": "ln"}},
            {},
            "'log' or 'linear'",
        ),
        ({"model.sigma_w": [1.0]}, {"model.sigma_w": [2.0]}, "under both"),
        ({}, {"model.activation": ["tanhh"]}, "did you mean 'tanh'"),
        ({}, {"model.activation": "tanh"}, "has to be a list"),
        ({}, {"seed": [0, 1]}, "varied by train.num_seeds"),
        ({"model.sigma_w": {"low": "1e-4", "high": 1.0, "num": 3}}, {}, "have to be numbers"),
        (
            {"optimizer.momentum": [0.1]},
            {"optimizer.name": ["adam", "sgd"]},
            "nothing to optimizer.name = 'sgd'",
        ),
        (
            {"optimizer.max_norm": [0.1, 1.0]},
            {"optimizer.clipping": ["zclip"]},
            "nothing to optimizer.clipping",
        ),
        (
            {},
            {"model.normalization": ["none", "batchnorm"], "task.batch_size": [1, 64]},
            "batch_size = 1 has no var",
        ),
        (
            {
                "model.sigma_w": {"low": 1, "high": 2, "draws": 3},
                "model.sigma_b": {"low": 1, "high": 2, "draws": 4},
            },
            {},
            "their draws differ",
        ),
    ],
)
def test_what_cannot_be_swept_is_refused_by_name(vary, static, words):
    with pytest.raises(ConfigError, match="(?s)" + words.replace("(", r"\(")):
        grid.grid(BASE, vary, static)


def test_the_tables_of_a_file_come_back(tmp_path):
    spec = {"low": 0.01, "high": 100.0, "num": 8, "scale": "log"}
    text = grid.to_toml(
        {"optimizer": {"max_norm": spec}, "model.sigma_w": [1.0, 2.0]},
        {"model.activation": ["relu"]},
    )
    path = tmp_path / "sweep.toml"
    path.write_text(config.to_toml(BASE) + text)
    vary, static = (grid.flat(table) for table in config.sweep_tables(path))
    assert vary == {"optimizer.max_norm": spec, "model.sigma_w": [1.0, 2.0]} and static == {
        "model.activation": ["relu"]
    }
    assert config.load(path) == config.loads(path.read_text()) == BASE


def test_another_table_below_sweep_is_refused(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text("[sweep.vmapp]\nx = [1]\n")
    with pytest.raises(ConfigError, match="did you mean 'vmap'"):
        config.sweep_tables(path)
