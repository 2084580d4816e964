"""`Monitor` in loops as users write them, with one planted thing that goes wrong."""

import functools
import itertools
import json
import runpy
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradjax
from bounds import assert_rounding
from gradjax.monitor.monitor import Monitor
from gradjax.transforms import skip_non_finite, telemetry, watch
from support import SCRIPTS

PARAMS = {
    "a": np.float32([1.0, -2.0, 3.0]),
    "b": {"w": np.float32([[0.5, -1.0], [2.0, 4.0]])},
}
KEY = "0.watch/log2_grad/['a']"
# One optimiser for all tests that ask nothing of it, so that its step is compiled once.
SGD = watch(optax.sgd(0.1))


def copies(tree):
    return jax.tree.map(lambda x: jnp.asarray(np.array(x)), tree)


def noisy(step):
    """The gradients of a healthy step: some 10 % of noise about the parameters."""
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda x: np.float32(x * (1 + 0.1 * rng.standard_normal(x.shape))), PARAMS)


@functools.cache
def stepper(tx, donate=True):
    """(params, opt_state, grads) -> (params, opt_state, loss), as a jitted user's step."""

    @functools.partial(jax.jit, donate_argnums=(0, 1) if donate else ())
    def train_step(params, opt_state, grads):
        loss = sum(jnp.sum(x) for x in jax.tree.leaves(grads))
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return train_step


def follow(monitor, tx, num_steps, grads_of=noisy, donate=True, **extra):
    """Trains; the batch's key is the step. Returns the telemetry after every step."""
    monitors = monitor if isinstance(monitor, list) else [monitor]
    params, train_step = copies(PARAMS), stepper(tx, donate)
    opt_state, seen = tx.init(params), []
    for step in range(num_steps):
        params, opt_state, loss = train_step(params, opt_state, grads_of(step))
        seen.append(telemetry(opt_state) | {"loss": float(loss)})
        more = {name: function(step, params) for name, function in extra.items()}
        for each in monitors:
            each.update(opt_state, loss, key=step, **more)
    return seen


def spoiled(at, value=np.nan, leaf="b"):
    """`noisy` with one entry of one leaf replaced at one step."""

    def grads_of(step):
        grads = noisy(step)
        if step == at:
            x = grads["a"] if leaf == "a" else grads["b"]["w"]
            x[(0,) * x.ndim] = value
        return grads

    return grads_of


def silent(tmp_path, **options):
    """A monitor whose lines are only collected, in `.warnings`."""
    return Monitor(tmp_path, on_warning=lambda text: None, **options)


# History


@pytest.mark.parametrize("donate", [True, False])
@pytest.mark.parametrize(
    ("looks", "measured", "keep"), [((1, 8, 5), 1, 8), ((8,), 3, 4), ((3,), 1, 1)]
)
def test_the_history_is_what_telemetry_said_after_every_step(
    tmp_path, looks, measured, keep, donate
):
    """Monitors that look at one state in so many follow the same training."""
    monitors = [silent(tmp_path, every=every) for every in looks]
    tx = SGD if keep == 8 else watch(optax.sgd(0.1), every=measured, keep=keep)
    seen = follow(monitors, tx, 20, donate=donate)
    for every, monitor in zip(looks, monitors, strict=True):
        history = monitor.history
        if keep * measured < every:
            # rows are lost, and the steps say which
            assert history["step"].tolist() == [*range(0, 19, 3), 19]
        else:
            assert history["step"].tolist() == list(range(0, 20, measured))
        for name in ("loss", KEY, "0.watch/log2_ratio/['b']['w']"):
            expected = [seen[step][name] for step in history["step"]]
            np.testing.assert_array_equal(history[name], expected)
        assert set(history) == {"step", "loss"} | {k for k in seen[0] if "log2" in k}


def test_the_history_is_bounded_and_layers_are_columns(tmp_path):
    params = {"layers": np.ones((3, 4), np.float32), "head": np.ones(2, np.float32)}
    tx = watch(optax.sgd(0.1), stacked={"layers": True, "head": False})
    monitor = silent(tmp_path, history=6, every=4)
    opt_state, update = tx.init(params), jax.jit(tx.update)
    for step in range(11):
        grads = jax.tree.map(lambda x, s=step: x * np.float32(2.0**s), params)
        _, opt_state = update(grads, opt_state, params)
        monitor.update(opt_state, 0.5)
    history = monitor.history
    np.testing.assert_array_equal(history["step"], range(5, 11))
    expected = np.tile(np.arange(5.0, 11.0)[:, None], (1, 3)) + 1
    # Four squares, a root and a log2, which carries the relative error of its argument.
    found = history["0.watch/log2_grad/['layers']"]
    assert_rounding(found, expected, terms=12, dtype=np.float32)
    assert history["loss"].tolist() == [0.5] * 6


def test_watch_is_found_within_chains_and_the_rules_inside_go_into_the_crash_file(tmp_path):
    inside = gradjax.transforms.clip_by_global_norm(1e3)
    tx = optax.chain(optax.identity(), watch(optax.chain(inside, optax.sgd(0.1))))
    monitor = silent(tmp_path)
    with pytest.raises(FloatingPointError):
        follow(monitor, tx, 12, spoiled(5))
        monitor.flush()
    last = json.loads(monitor.crash.read_text())["last_good_telemetry"]
    assert "1.watch/log2_grad/['a']" in monitor.history
    assert last["1.0.clip_by_global_norm/clipped"] == 0


def test_a_resumed_run_goes_on_counting_and_one_that_goes_back_is_followed(tmp_path):
    train_step = stepper(SGD, donate=False)
    params, opt_state = copies(PARAMS), SGD.init(copies(PARAMS))
    for step in range(10):
        params, opt_state, loss = train_step(params, opt_state, noisy(step))
    saved, monitor = (params, opt_state), silent(tmp_path, every=4)
    for attempt in range(2):
        params, opt_state = saved
        for step in range(10, 18):
            params, opt_state, loss = train_step(params, opt_state, noisy(step))
            monitor.update(opt_state, loss, key=(attempt, step))
        monitor.flush()
    assert monitor.history["step"].tolist()[:8] == list(range(10, 18))
    assert monitor.history["step"].tolist()[8:] == list(range(10, 18))
    assert not np.isnan(monitor.history["loss"]).any()


# Failure


@pytest.mark.parametrize("every", [1, 8])
@pytest.mark.parametrize("at", [0, 5, 19])
def test_a_failure_is_attributed_to_its_step_leaf_and_batch(tmp_path, at, every):
    monitor = silent(tmp_path / "new" / "folder", every=every)
    message = rf"step {at}: gradient of \['b'\]\['w'\] not finite \(1 of 2"
    with pytest.raises(FloatingPointError, match=message) as error:
        follow(monitor, SGD, 25, spoiled(at))
        monitor.flush()
    report = json.loads(monitor.crash.read_text())
    assert monitor.crash == tmp_path / "new" / "folder" / f"crash-{at}.json"
    assert str(monitor.crash) in str(error.value)
    assert (report["step"], report["key"], report["loss"]) == (at, at, "nan")
    assert report["first_non_finite"]["leaf"] == "['b']['w']" and report["seeds"] is None
    assert report["noticed_after_calls"] <= at + 1 + 2 * every
    assert report["history"]["step"] == list(range(at))
    assert report["versions"]["jax"] == jax.__version__
    if at:
        assert report["last_good_telemetry"]["step"] == at - 1
        assert np.isfinite(report["last_good_telemetry"]["0.watch/log2_grad/['b']['w']"])


def test_parameters_that_overflow_are_a_failure_of_the_next_step(tmp_path):
    monitor, large = silent(tmp_path, every=1), {"a": np.full(3, -3e38, np.float32)}
    grads_of = lambda step: noisy(step) | (large if step in (3, 4) else {})
    tx = watch(optax.sgd(1.0))
    with pytest.raises(FloatingPointError, match=r"step 5: parameters of \['a'\]"):
        follow(monitor, tx, 9, grads_of)
        monitor.flush()


def test_no_file_is_overwritten_and_who_goes_on_gets_one(tmp_path):
    for _ in range(2):
        monitor = silent(tmp_path, on_failure="warn", every=4)
        follow(monitor, SGD, 20, spoiled(6))
        # once, though all is NaN from then on
        assert [step for step, text in monitor.warnings if "not finite" in text] == [6]
        assert monitor.history["step"].tolist() == list(range(20))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["crash-6-2.json", "crash-6.json"]


def test_a_folder_that_cannot_be_written_hides_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FloatingPointError, match=r"step 2: .*could not be written"):
        follow(silent(tmp_path / "file", every=1), SGD, 6, spoiled(2))


def test_where_rows_are_lost_the_state_knows_the_step(tmp_path):
    monitor = silent(tmp_path, every=10)
    with pytest.raises(FloatingPointError, match=r"step 23: "):
        follow(monitor, watch(optax.sgd(0.1), keep=1), 45, spoiled(23))
    assert json.loads(monitor.crash.read_text())["key"] == 23


def test_a_loop_that_ends_or_breaks_before_the_next_look_is_read_to_its_end(tmp_path):
    with pytest.raises(FloatingPointError, match="step 11"), silent(tmp_path, every=8) as monitor:
        follow(monitor, SGD, 13, spoiled(11))
    with pytest.raises(KeyboardInterrupt), silent(tmp_path, every=8) as monitor:
        follow(monitor, SGD, 13, spoiled(12))
        raise KeyboardInterrupt
    assert monitor.crash.name == "crash-12.json"


def test_a_gradient_that_a_guard_caught_is_a_warning(tmp_path):
    monitor = silent(tmp_path)
    follow(monitor, watch(skip_non_finite(optax.sgd(0.1))), 30, spoiled(7))
    monitor.flush()
    assert [step for step, _ in monitor.warnings] == [7] and monitor.crash is None
    assert "gradient of ['b']['w'] not finite; the update is finite" in monitor.warnings[0][1]


def test_calls_that_are_no_steps_have_no_batch(tmp_path):
    """Accumulated gradients: the state counts every third call."""
    tx, monitor = optax.MultiSteps(watch(optax.sgd(0.1)), 3), silent(tmp_path, every=1)
    with pytest.raises(FloatingPointError, match="step 4"), jax.numpy_dtype_promotion("standard"):
        follow(monitor, tx, 20, spoiled(13))
        monitor.flush()
    assert monitor.history["step"].tolist() == [0, 1, 2, 3]


def test_lanes_of_a_vmap_are_followed_one_by_one(tmp_path):
    stack = lambda tree: jax.tree.map(lambda x: np.stack([x] * 3), tree)
    params, opt_state = stack(PARAMS), stack(SGD.init(copies(PARAMS)))
    train_step = jax.jit(jax.vmap(stepper(SGD, donate=False)), donate_argnums=(0, 1))
    monitor = silent(tmp_path, on_failure="warn", every=4)
    for step in range(20):
        lanes = [noisy(step), spoiled(9)(step), spoiled(13, np.inf)(step)]
        grads = jax.tree.map(lambda *x: np.stack(x), *lanes)
        params, opt_state, loss = train_step(params, opt_state, grads)
        monitor.update(opt_state, loss, key=step)
    history = monitor.history
    assert history["loss"].shape == history[KEY].shape == (20, 3)
    assert np.isfinite(history["loss"][:, 0]).all()
    warned = [(step, "seeds [1]: gradient" in text) for step, text in monitor.warnings]
    assert warned == [(9, True), (13, False)]
    assert "seeds [2]: gradient of ['b']['w'] not finite" in monitor.warnings[1][1]
    assert json.loads((tmp_path / "crash-9.json").read_text())["seeds"] == [1]


def test_sharded_states_are_read(tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    place = functools.partial(jax.device_put, device=everywhere)
    monitor, train_step = silent(tmp_path, every=2), stepper(SGD)
    params, opt_state = place(copies(PARAMS)), place(SGD.init(copies(PARAMS)))
    for step in range(6):
        params, opt_state, loss = train_step(params, opt_state, place(noisy(step)))
        monitor.update(opt_state, loss)
    assert np.isfinite(monitor.history[KEY]).all() and len(monitor.history[KEY]) == 6


KEYS = {
    "typed": (lambda: jax.random.key(3), {"impl": "threefry2x32", "data": [0, 3]}),
    "raw": (lambda: jax.random.PRNGKey(3), [0, 3]),
    "number": (lambda: 17, 17),
    "tuple": (lambda: ("epoch", 2), "('epoch', 2)"),
}


@pytest.mark.parametrize("kind", KEYS)
def test_the_key_of_the_batch_may_be_anything(tmp_path, kind):
    monitor, params = silent(tmp_path, every=1), copies(PARAMS)
    _, opt_state, _ = stepper(SGD)(params, SGD.init(params), spoiled(0)(0))
    with pytest.raises(FloatingPointError):
        monitor.update(opt_state, jnp.nan, key=KEYS[kind][0]())
        monitor.flush()
    assert json.loads(monitor.crash.read_text())["key"] == KEYS[kind][1]


# Diagnosis


class StandIn:
    """Remembers what it was called with."""

    def __call__(self, params, *args, history):
        self.params, self.args, self.history = params, args, history
        return self

    def to_json(self):
        return json.dumps({"healthy": False, "findings": [{"pathology": "non_finite"}]})


def test_the_diagnosis_sees_good_parameters_and_the_batch_of_the_failure(tmp_path):
    """An explosion that is announced: its parameters are those right before the failing step."""
    diagnose = StandIn()

    def growing(step):
        factor = np.float32(2.0 ** (3 * max(step - 80, 0)))
        return jax.tree.map(lambda x: x * factor, noisy(step))

    monitor, seen = silent(tmp_path, diagnose=diagnose), {}
    with pytest.raises(FloatingPointError):
        extra = {
            "params": lambda step, params: seen.setdefault(step, copies(params)),
            "args": lambda step, params: (step,),
        }
        follow(monitor, SGD, 150, growing, **extra)
    report = json.loads(monitor.crash.read_text())
    assert report["diagnosis"]["findings"][0]["pathology"] == "non_finite"
    assert "diagnosis_error" not in report
    assert diagnose.args == (report["step"],) and diagnose.history["step"][-1] == report["step"] - 1
    jax.tree.map(np.testing.assert_array_equal, diagnose.params, seen[report["step"] - 1])
    assert report["diagnosis_of"].startswith("the parameters 1 calls before")


def test_a_diagnosis_that_fails_hides_nothing(tmp_path):
    def broken(params, *args, history):
        raise RuntimeError("no such layer")

    monitor = silent(tmp_path, diagnose=broken)
    with pytest.raises(FloatingPointError, match="step 3"):
        follow(monitor, SGD, 30, spoiled(3), params=lambda step, params: params)
    report = json.loads(monitor.crash.read_text())
    assert report["diagnosis"] is None
    assert report["diagnosis_error"] == "RuntimeError: no such layer"
    monitor = silent(tmp_path, diagnose=broken)
    with pytest.raises(FloatingPointError, match="step 3"):
        follow(monitor, SGD, 30, spoiled(3))
    assert "pass params=" in json.loads(monitor.crash.read_text())["diagnosis_error"]


# Early warning


def spiked(*steps):
    """`noisy`, a hundred times as large at some steps."""

    def grads_of(step):
        factor = np.float32(100.0 if step in steps else 1.0)
        return jax.tree.map(lambda x: x * factor, noisy(step))

    return grads_of


def test_a_spike_of_the_gradient_is_announced_once(tmp_path):
    monitor = silent(tmp_path)
    with jax.numpy_dtype_promotion("standard"):
        follow(monitor, watch(optax.adam(1e-3)), 200, spiked(90, 91, 92))
    monitor.flush()
    assert [step for step, _ in monitor.warnings] == [90]
    assert "norm of the gradient of all (most in" in monitor.warnings[0][1]


def test_one_leaf_that_grows_is_named_and_the_first_suspect(tmp_path):
    """Its update is a thousandth of the whole."""

    def growing(step):
        grads = noisy(step)
        return grads | {"a": grads["a"] * np.float32(1e-3 * 1.5 ** max(step - 100, 0))}

    monitor = silent(tmp_path)
    with pytest.raises(FloatingPointError) as error:
        follow(monitor, watch(optax.sgd(0.01)), 400, growing)
    step, text = monitor.warnings[0]
    assert 104 <= step <= 107 and "of ['a'] is" in text, text
    suspects = json.loads(monitor.crash.read_text())["suspects"]
    assert suspects[0]["leaf"] == "['a']" and suspects[0]["out_since"] in (step, step - 1)
    assert "First out of its history, at step" in str(error.value)


def test_warnings_are_pythons_by_default(tmp_path):
    words = r"gradjax.Monitor: step 70: norm of the (gradient|update)"
    with pytest.warns(RuntimeWarning, match=words) as caught:
        follow(Monitor(tmp_path), SGD, 90, spiked(70))
    assert len(caught) == 2


# Bad input

REFUSED = [
    (lambda m: m(every=0), r"every is 0; an integer in \[1, inf\)"),
    (lambda m: m(window=3), r"window is 3; an integer in \[4"),
    (lambda m: m(history=0), r"history is 0"),
    (lambda m: m(factor=0.5), r"factor 0\.5"),
    (lambda m: m(on_failure="stop"), r"on_failure is 'stop'"),
    (
        lambda m: m().update(optax.adam(1.0).init(PARAMS), 0.0),
        r"holds 0 gradjax.watch; .*tx = gradjax.watch\(tx\)",
    ),
    (lambda m: m().update(watch(SGD).init(PARAMS), 0.0), "holds 2 gradjax.watch"),
    (lambda m: m().update(SGD.init(PARAMS), jnp.ones(4)), r"loss has shape \(4,\).*mean"),
    (
        lambda m: jax.jit(m().update)(SGD.init(PARAMS), 0.0),
        "traced; call it outside of jit",
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_bad_input_is_refused_with_what_to_do(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        make(functools.partial(Monitor, tmp_path))


# Without the packages of the lab extra

WITHOUT_LAB = """
import sys
from gradjax.core.extras import LAB
for name in LAB:
    sys.modules[name] = None

import jax, jax.numpy as jnp, numpy as np, optax
import gradjax, gradjax.matrix_free, gradjax.monitor, gradjax.spectrum, gradjax.taps
import gradjax.transforms

def loss_fn(ws, x):
    for i, w in enumerate(ws):
        x = gradjax.tap(jnp.tanh(x @ w), f"h{i}")
    return jnp.mean(jnp.square(x))

ws, x = [2 * np.eye(3, dtype=np.float32)] * 3, np.ones((5, 3), np.float32)
print(jax.jit(lambda ws: gradjax.probe(loss_fn, ws, x))(ws))
spectrum = gradjax.jacobian_spectrum(*gradjax.links(loss_fn, ws, x))
assert np.isfinite(spectrum.log_singular_values).all()

def diagnose(params, *args, history):
    import xarray

clip = gradjax.transforms.clip_by_global_norm(1.0)
tx = gradjax.watch(optax.chain(clip, optax.sgd(0.1)))

@jax.jit
def train_step(params, opt_state, grads):
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

opt_state, params = tx.init(ws), ws
with gradjax.Monitor(sys.argv[1], every=2, diagnose=diagnose) as monitor:
    for i in range(9):
        grads = [np.full_like(w, np.nan if i >= 3 else 1.0) for w in ws]
        params, opt_state = train_step(params, opt_state, grads)
        monitor.update(opt_state, 0.0, key=i, params=params)
"""


def test_the_library_works_and_loses_nothing_without_the_lab_extra(tmp_path):
    """Probe, spectrum, clip, watch and a crash where the extra's packages cannot be imported."""
    command = [sys.executable, "-c", WITHOUT_LAB, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "Probe: loss" in done.stdout, done.stderr
    assert "FloatingPointError: gradjax.Monitor: step " in done.stderr, done.stderr
    (path,) = tmp_path.iterdir()
    report = json.loads(path.read_text())
    assert report["first_non_finite"]["leaf"] == "[0]" and report["key"] == report["step"]
    assert report["history"]["step"] == list(range(report["step"]))
    assert report["last_good_telemetry"] and report["versions"]["jax"] == jax.__version__
    assert "xarray" in report["diagnosis_error"] and report["diagnosis"] is None


# Whole trainings


@pytest.mark.slow
def test_the_script_that_diverges_is_announced_and_its_layer_is_named(tmp_path, monkeypatch):
    """From step 60 on the rate of layer 3 grows: the warning comes before the loss rises, in the
    loop's own time."""
    warned = []

    class Followed(Monitor):
        def update(self, opt_state, loss, **extra):
            self.losses = [*getattr(self, "losses", []), float(loss)]
            self.me.append(self)
            super().update(opt_state, loss, **extra)

        me = []

    monkeypatch.setattr(gradjax, "Monitor", Followed, raising=False)
    monkeypatch.setattr("sys.argv", ["diverging.py", str(tmp_path)])
    script = SCRIPTS / "diverging.py"
    record = lambda text, *_, **__: warned.append((len(Followed.me), str(text)))
    monkeypatch.setattr(warnings, "warn", record)
    message = r"First out of its history, at step \d+: update of \['layer3'\]"
    with (
        pytest.raises(FloatingPointError, match=message),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        runpy.run_path(str(script))
    losses = np.array(Followed.me[-1].losses)
    rises = 60 + int(np.argmax(losses[60:] > 1.25 * losses[20:60].max()))
    announced = min(calls for calls, text in warned if "gradjax.Monitor" in text)
    assert 60 < announced < rises, (announced, rises)
    report = json.loads(Followed.me[-1].crash.read_text())
    assert report["suspects"][0]["leaf"] == "['layer3']" and not np.isfinite(float(report["loss"]))
    assert not report.get("diagnosis_error")
    assert report["diagnosis"]["findings"][0]["where"]["name"] == "layer3"


def digits_run(make_tx, seeds, num_steps, batch=32, width=48, depth=3, activation=jax.nn.relu):
    """Train on digits for several seeds in one vmapped program."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
    sizes = list(itertools.pairwise([64, *[width] * depth, 10]))
    tx = watch(make_tx(num_steps))

    def init(seed):
        params, keys = {}, jax.random.split(jax.random.key(seed), depth + 2)
        for i, (a, b) in enumerate(sizes):
            kernel = jax.random.normal(keys[i], (a, b)) * (2 / a) ** 0.5
            params[f"layer{i}"] = {"w": kernel, "b": jnp.zeros(b)}
        return params, tx.init(params), keys[-1]

    def loss_fn(params, x, y):
        for i in range(depth + 1):
            x = x @ params[f"layer{i}"]["w"] + params[f"layer{i}"]["b"]
            x = activation(x) if i < depth else x
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(x, y))

    def train_step(params, opt_state, key, step):
        index = jax.random.randint(jax.random.fold_in(key, step), (batch,), 0, 1500)
        loss, grads = jax.value_and_grad(loss_fn)(params, images[index], labels[index])
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params, opt_state, keys = jax.jit(jax.vmap(init))(np.array(seeds))
    train_steps = jax.jit(jax.vmap(train_step, in_axes=(0, 0, 0, None)), donate_argnums=(0, 1))
    for step in range(num_steps):
        params, opt_state, loss = train_steps(params, opt_state, keys, step)
        yield opt_state, loss


HEALTHY = {
    "Adam, warm-up": (
        lambda n: optax.adam(optax.warmup_cosine_decay_schedule(0.0, 1e-3, 100, n)),
        {},
    ),
    "Adam": (lambda n: optax.adam(1e-3), {"batch": 64}),
    "SGD with momentum": (lambda n: optax.sgd(0.05, momentum=0.9), {"activation": jnp.tanh}),
    "SGD, batch 8": (lambda n: optax.sgd(0.02, momentum=0.9), {"batch": 8}),
    "deep": (
        lambda n: optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 3e-4, 100, n)),
        {"depth": 12, "width": 32},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_trainings_of_every_kind_are_left_alone(tmp_path, name):
    make_tx, options = HEALTHY[name]
    monitor, losses = silent(tmp_path), []
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for opt_state, loss in digits_run(make_tx, range(4), 2000, **options):
            monitor.update(opt_state, loss)
            losses.append(np.asarray(loss))
    monitor.flush()
    first, last = np.mean(losses[:20], axis=0), np.mean(losses[-100:], axis=0)
    assert (last < 0.8 * first).all(), "it trains"
    assert monitor.warnings == []
