"""Sweeps: one labelled dataset, with equal bits however it is laid out, interrupted or resumed."""

import json
import warnings

import jax
import numpy as np
import pytest
import xarray as xr

from gradjax.experiment import blocks, cluster, config, program, sweep
from gradjax.experiment.schema import ConfigError
from gradjax.report import files

BASE = config.replace(
    config.Experiment(),
    {
        "model.depth": 2,
        "model.width": 8,
        "model.activation": "relu",
        "optimizer.name": "sgd",
        "optimizer.clipping": "clip_by_global_norm",
        "train.num_steps": 30,
        "train.eval_every": 10,
        "train.num_seeds": 3,
        "train.lanes": 2,
    },
)
VARY = {"optimizer.learning_rate": [1e-1, 3e-1, 1e18]}
# Ten steps of training, each of which at most doubles the rounding errors of those before it.
TEN_STEPS = 2**10 * float(np.finfo(np.float32).eps)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "run"
    return folder, sweep.sweep(BASE, VARY, folder=folder)


def equal(a: xr.Dataset, b: xr.Dataset) -> bool:
    return a.drop_attrs().identical(b.drop_attrs())


@pytest.mark.slow
def test_the_dataset_is_labelled_and_written(whole):
    folder, ds = whole
    assert dict(ds.loss.sizes) == {"optimizer.learning_rate": 3, "seed": 3, "step": 30}
    assert dict(ds.layer_log_gradient_norm.sizes) == {
        "optimizer.learning_rate": 3,
        "seed": 3,
        "evaluation": 3,
        "layer": 2,
    }
    assert ds.evaluation.values.tolist() == [10, 20, 30] and ds.layer.values.tolist() == [
        "hidden_1",
        "hidden_2",
    ]
    assert equal(files.load(folder / "results.nc"), ds)
    assert "2 lanes" in ds.attrs["plan"] and config.load(folder / "config.toml") == BASE
    # a finished block needs no checkpoint
    assert not any((folder / "checkpoints").glob("*"))


def test_a_diverged_member_is_marked_and_the_others_train(whole):
    ds = whole[1]
    wild = ds.sel({"optimizer.learning_rate": 1e18})
    assert (
        (wild.diverged_at >= 0).all()
        and (wild.diverged_cause != "").all()
        and np.isfinite(wild.final_loss).all()
    )
    calm = ds.isel({"optimizer.learning_rate": [0, 1]})
    assert (calm.diverged_at == -1).all() and (
        calm.loss[..., -5:].mean("step") < calm.loss[..., :5].mean("step")
    ).all()


@pytest.mark.slow
def test_in_memory_and_on_one_worker_the_bits_are_equal(whole, monkeypatch):
    monkeypatch.setattr(program, "rule_for_workers", lambda experiment: 1)
    assert equal(sweep.sweep(BASE, VARY), whole[1])


class Stop(Exception):
    pass


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_with_the_same_bits_and_skips_what_is_done(whole, tmp_path):
    def interrupt_after(count):
        def progress(event):
            nonlocal count
            count -= not event.message
            if count < 0:
                raise Stop

        return progress

    always = config.replace(BASE, {"train.checkpoint_seconds": 0.0})
    run = tmp_path / "run"
    for count in (2, 5):
        with pytest.raises(Stop):
            sweep.sweep(always, VARY, folder=run, progress=interrupt_after(count))
    assert list((run / "checkpoints").iterdir())
    events = []
    assert equal(sweep.sweep(always, VARY, folder=run, progress=events.append), whole[1])
    work = [e for e in events if not e.message]
    # five blocks of three chunks, some of which were done
    assert len(work) < 15 and work[-1].done == work[-1].total == 270


@pytest.mark.slow
def test_a_damaged_shard_is_computed_again(whole, tmp_path):
    import shutil

    shutil.copytree(whole[0], tmp_path / "run")
    shard = tmp_path / "run/shards/000-00001.nc"
    data = bytearray(shard.read_bytes())
    third = len(data) // 3
    data[third : 2 * third] = bytes(third)
    shard.write_bytes(data)
    with pytest.warns(UserWarning, match=r"000-00001\.nc is damaged and is computed again"):
        assert equal(sweep.sweep(BASE, VARY, folder=tmp_path / "run"), whole[1])


@pytest.mark.parametrize(
    "values, vary, words",
    [
        ({"model.sigma_w": 2.0}, VARY, r"model\.sigma_w: 1\.32701 and 2\.0"),
        ({"train.num_seeds": 4}, VARY, r"train\.num_seeds: 3 and 4"),
        ({}, {"optimizer.learning_rate": [1e-1]}, "other names or values"),
    ],
)
def test_a_folder_of_another_config_is_refused_and_the_field_named(whole, values, vary, words):
    with pytest.raises(ConfigError, match=words):
        sweep.sweep(config.replace(BASE, values), vary, folder=whole[0])


def test_a_checkpoint_of_another_config_is_refused_and_the_field_named():
    mine = {"config": config.to_dict(BASE), "lanes": 2, "values": {}}
    other = json.loads(
        json.dumps(
            mine | {"lanes": 4, "config": config.to_dict(config.replace(BASE, {"model.depth": 9}))}
        )
    )
    with pytest.raises(ConfigError, match=r"model\.depth: 9 and 2; lane width: 4 and 2"):
        blocks.check_identity(other, mine, "folder")


@pytest.mark.slow
def test_static_settings_are_programs_of_their_own_along_their_dimensions():
    small = config.replace(BASE, {"train.num_steps": 10, "train.num_seeds": 2})
    ds = sweep.sweep(small, None, {"model.depth": [1, 3], "optimizer.name": ["sgd"]})
    assert dict(ds.final_loss.sizes) == {"model.depth": 2, "optimizer.name": 1, "seed": 2}
    assert ds.layer_log_gradient_norm.sel({"model.depth": 1}).isnull().any()  # it has no hidden_2


@pytest.mark.slow
def test_what_does_not_fit_into_memory_gets_fewer_lanes_and_says_so(whole, monkeypatch):
    monkeypatch.setattr(program, "free_memory", lambda: 1)
    ds = sweep.sweep(config.replace(BASE, {"train.num_steps": 10}), VARY)
    assert (
        "lanes halved from 2 to 1" in ds.attrs["plan"] and "9 blocks of 1 lanes" in ds.attrs["plan"]
    )
    # one lane, which has no axis, trains as several do
    calm = {"optimizer.learning_rate": [0, 1]}
    np.testing.assert_allclose(
        ds.loss.isel(calm), whole[1].loss.isel(calm)[..., :10], rtol=TEN_STEPS
    )


@pytest.mark.slow
def test_the_batch_spread_over_devices_trains_the_same_network():
    small = config.replace(BASE, {"train.num_steps": 10, "train.shard": "batch"})
    ds = sweep.sweep(small, {"optimizer.learning_rate": [1e-1]})
    plain = sweep.sweep(
        config.replace(small, {"train.shard": "members"}), {"optimizer.learning_rate": [1e-1]}
    )
    np.testing.assert_allclose(ds.loss, plain.loss, rtol=TEN_STEPS)


@pytest.mark.slow
def test_five_of_64_diverge_at_different_steps_and_59_keep_their_bits(capsys):
    """Five members have such learning rates that they overflow one after another."""
    one = config.replace(
        BASE,
        {"train.num_seeds": 1, "train.lanes": 16, "train.num_steps": 40, "optimizer.name": "sgd"},
    )
    one = config.replace(
        one,
        {
            "optimizer.name": "sgd",
            "optimizer.clipping": "none",
            "model.activation": "linear",
            "model.depth": 3,
        },
    )
    calm = np.linspace(1e-3, 2e-3, 64)
    wild, diverging = calm.copy(), [3, 17, 30, 31, 60]
    wild[diverging] = [0.9, 3.0, 30.0, 1e4, 1e12]
    a, b = (sweep.sweep(one, {"optimizer.learning_rate": list(rates)}) for rates in (calm, wild))
    others = [i for i in range(64) if i not in diverging]
    take = lambda ds: ds.isel({"optimizer.learning_rate": others}).drop_vars(
        "optimizer.learning_rate"
    )
    assert equal(take(a), take(b)) and (b.diverged_at.values[others] == -1).all()
    steps = b.diverged_at.values[diverging, 0].tolist()
    causes = b.diverged_cause.values[diverging, 0].tolist()
    with capsys.disabled():
        print(f"\n59 of 64 bit for bit unchanged; 5 diverged at steps {steps}, by {causes}")
    assert (
        min(steps) >= 0
        and len(set(steps)) >= 4
        and np.isfinite(b.final_loss.values[diverging]).all()
    )


@pytest.mark.slow
def test_progress_and_summary(whole):
    events = []
    sweep.sweep(config.replace(BASE, {"train.num_steps": 10}), VARY, progress=events.append)
    assert (
        "9 members, 1 training program to compile" in events[0].message
        and "MiB predicted" in events[1].message
    )
    last = events[-1]
    assert last.done == last.total == 90 and last.steps_per_second > 0 and last.diverged == 3
    rows = files.summary(whole[1])["settings"]
    assert len(rows) == 3 and rows[-1]["diverged"] == 3 and rows[0]["trained_interval"][1] < 1
    assert rows[0]["validation_score"] == max(row["validation_score"] for row in rows)


def test_processes_need_a_folder(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with warnings.catch_warnings(), pytest.raises(ConfigError, match="pass folder="):
        sweep.sweep(BASE, VARY)


@pytest.mark.parametrize(
    "environ", [{"JAX_NUM_PROCESSES": "2"}, {"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}]
)
def test_half_a_cluster_is_refused(monkeypatch, environ):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="needed: host:port"):
        cluster.join_cluster()
