"""Evidence made by hand: what a network with a known pathology would be measured to have, without a
network. It asks the rules, and compiles nothing.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from gradjax.diagnosis.clipped import Clip
from gradjax.diagnosis.evidence import Evidence
from gradjax.diagnosis.rules import Dynamics
from gradjax.diagnosis.underflow import Underflow
from gradjax.replay.nonfinite import NonFinite
from gradjax.replay.source import Line
from gradjax.taps.interpret import Site
from gradjax.taps.statistics import Logits, Statistics
from gradjax.taps.structure import Activation, Layer, Recurrence, Structure


def site(path: tuple, name: str, kind: str, shape: tuple = (8, 128)) -> Site:
    return Site(path, name, kind, "", shape, np.float32)


def evidence(growth, width=128, activation=None, **layer) -> Evidence:
    """Evidence of a network whose log cotangent rms grows by growth[l] from layer l+1 back to layer
    l.

    Args:
      growth: (depth - 1,) nats.
      width: units of every layer.
      activation: (depth,) log rms of the layers; 0 by default.
      layer: other fields of every `Layer`.
    """
    growth = np.asarray(growth, float)
    depth = len(growth) + 1
    with np.errstate(invalid="ignore"):
        cotangent = np.append(np.cumsum(growth[::-1])[::-1], 0.0)
    fields = {"skip": False, "norm": "", "post_norm": False, "weighs": True, "fan_in": width}
    fields |= {"row": None, "leaves": frozenset(), "kernels": ()} | layer
    names = [f"hidden_{i + 1}" for i in range(depth)]
    layers = [
        Layer(site=site((i,), name, "module", (8, width)), name=name, **fields)
        for i, name in enumerate(names)
    ]
    value = Statistics(*map(np.float32, (0.0, 0.0, 0.0, -1.0, 0.0)))
    return Evidence(
        loss=1.0,
        half=False,
        aux=None,
        structure=Structure(layers, [], [], []),
        layers=layers,
        log_activation=np.zeros(depth) if activation is None else np.asarray(activation, float),
        log_cotangent=cotangent,
        log_gradient=cotangent,
        size=np.full(depth, 8.0 * width),
        examples=np.ones(depth),
        tokens=np.full(depth, np.nan),
        units=np.ones(depth),
        values={name: value for name in names},
        cotangents={},
        activations=[],
        recurrences=[],
        leaf_names=[],
        leaf_shapes=[],
        leaf_log_rms=[],
        leaf_log_gradient=[],
        leaf_bad=[],
        arg_log_rms=[0.0],
        culprit=None,
        skipped={},
    )


def _still(**changes) -> Evidence:
    """A healthy network of ten layers with changes."""
    return replace(evidence([0.0] * 9), **changes)


def _with_activation(kind: str, seen) -> Evidence:
    """Its third layer is followed by an activation function that was measured to be `seen`."""
    found = Activation(site((2, 1), "", kind), on_chain=True, gates=False, layer="hidden_3")
    return _still(activations=[(found, seen)])


def _with_weights(w: np.ndarray, **changes) -> Evidence:
    """Every layer applies the same weights."""
    kernels = ((frozenset({0}), *w.shape),)
    still = evidence([0.0] * 9, leaves=frozenset({0}), kernels=kernels)
    with np.errstate(divide="ignore"):
        log_rms = 0.5 * np.log(np.mean(w**2))
    leaf = {"leaf_names": ["w"], "leaf_shapes": [w.shape], "leaf_bad": [False], "params": [w]}
    leaf |= {"leaf_log_rms": [log_rms], "leaf_log_gradient": [np.float64(0.0)]}
    return replace(still, **leaf | changes)


def over_time(per_step: float) -> Evidence:
    """A recurrence of 50 steps whose cotangent grows by `per_step` nats from each step back."""
    back = per_step * np.arange(50.0)[::-1]
    cell = Recurrence((site((3, 0), "h", "state"),), "cell", 50, False, 128, frozenset())
    return _still(recurrences=[(cell, np.zeros(50), back)])


def _gates(saturated: float) -> Evidence:
    """A recurrence of three gates whose units are saturated in that fraction."""
    seen = over_time(0.0)
    gates = [
        Activation(site((3, i), "", "logistic"), on_chain=False, gates=True, layer="cell")
        for i in range(1, 4)
    ]
    return replace(seen, activations=[(gate, np.full(50, saturated)) for gate in gates])


def _untrained() -> Evidence:
    still = _with_weights(np.eye(128))
    return replace(still, structure=still.structure._replace(untrained=[0]))


def _dynamics(losses=(1.0, 1.0, 1.0), **changes) -> Dynamics:
    return Dynamics(losses=np.array(losses, float), telemetry={}, **changes)


def clipped(fraction: float, *of_leaves: float, declared: bool = True) -> Dynamics:
    """Twenty steps with a rule that clipped in that fraction of them, or of each leaf's."""
    rule = "0.a_rule"
    telemetry = {f"{rule}/count": np.int32(20)}
    if of_leaves:
        for i, x in enumerate((fraction, *of_leaves)):
            leaf = {f"{rule}/clip_fraction/[{i}]": x, f"{rule}/log2_norm/[{i}]": 1.0}
            telemetry |= {key: np.float32(value) for key, value in leaf.items()}
    else:
        telemetry |= {f"{rule}/clip_fraction": np.float32(fraction)}
        telemetry |= {f"{rule}/log2_norm": np.float32(1.0)}
    return Dynamics(np.ones(21), telemetry, clipping=(rule,) if declared else ())


def clip(log_size: float, log_norms: np.ndarray) -> Clip:
    """Optax's global clip at 1, given a norm of that size in every step."""
    steps, leaves = log_norms.shape
    names = tuple(f"w{i}" for i in range(leaves))
    size = np.full((steps, 1), log_size)
    return Clip("clip_by_global_norm", names, size, np.zeros(steps), log_norms)


def culprit(**changes) -> NonFinite:
    """An overflow of the forward pass in the fourth layer, with changes."""
    line = Line("model.py", 7, 7, 8, 20, "loss_fn")
    found = NonFinite(
        phase="forward",
        reached="the loss",
        primitive="mul",
        forward="mul",
        reason="overflow",
        words="the result of mul is larger than float32 can hold.",
        remedies=("make the operands smaller",),
        line=line,
        callers=(line,),
        module="hidden_4",
        name="",
        iterations=(),
        entry=(0, 1),
        value=np.inf,
        shape=(8, 128),
        dtype="float32",
        operands=("1e+20", "1e+30"),
        near="hidden_4",
        example=0,
    )
    return replace(found, **changes)


_LOW_RANK = np.linalg.qr(np.random.default_rng(0).standard_normal((128, 128)))[0]
_LOW_RANK[:, 8:] *= 1e-6
_SPIKE = np.where(np.arange(40) == 30, 9.0, 1.0 + 0.01 * np.sin(np.arange(40.0)))

# Pathology -> evidence, or dynamics, of networks that have it: each of its criteria once, so that
# each of its sentences is printed.
PLANTED: dict[str, list[Callable[[], Evidence | Dynamics]]] = {
    "frozen_optimizer": [
        lambda: _dynamics(opt_bad=("[0].mu['w']",)),
        lambda: _dynamics(largest_update=0.0, log_norms=np.zeros(2)),
    ],
    "non_finite": [
        lambda: _still(culprit=culprit()),
        lambda: _still(culprit=culprit(phase="data", name="x", primitive="", reason="bad_data")),
        lambda: _still(leaf_bad=[False, True], leaf_names=["w", "b"]),
        lambda: _still(loss=np.nan),
        lambda: _still(culprit=culprit(phase="backward", reason="slope_at_zero")),
        lambda: _still(culprit=culprit(phase="backward")),
        lambda: _dynamics(bad_update=(0, culprit(phase="optimizer", reason="zero_eps"))),
        lambda: _dynamics([1.0, np.inf, np.nan], half=True),
    ],
    "symmetric_units": [
        lambda: _with_weights(np.full((128, 128), 0.1), units=np.zeros(10)),
        lambda: _with_weights(np.zeros((128, 128)), log_activation=np.full(10, -np.inf)),
    ],
    "residual_growth": [
        lambda: evidence([0.0] * 60, activation=0.3 * np.arange(61), skip=True),
        lambda: replace(
            evidence([0.0] * 60, activation=0.3 * np.arange(61), skip=True), culprit=culprit()
        ),
    ],
    "batchnorm_explosion": [lambda: evidence([0.19] * 60, norm="batch")],
    "exploding_gradients": [lambda: evidence([0.3] * 99), lambda: over_time(0.5)],
    "exploding_activations": [
        lambda: evidence([0.0] * 60, activation=0.2 * np.arange(61)),
        lambda: replace(
            evidence([0.0] * 60, activation=np.append(0.2 * np.arange(60), np.inf)),
            culprit=culprit(),
        ),
    ],
    "attention_logit_growth": [lambda: _with_activation("softmax", Logits(20.0, 16.0, 0.99))],
    "saturated_units": [lambda: _with_activation("tanh", 0.8), lambda: _gates(0.95)],
    "dead_units": [lambda: _with_activation("relu", 0.9)],
    "rank_collapse": [
        lambda: _still(examples=np.exp(-2.0 * np.arange(10))),
        lambda: _still(tokens=np.exp(-2.0 * np.arange(10))),
    ],
    "ill_conditioned_jacobian": [lambda: _with_weights(_LOW_RANK)],
    "vanishing_gradients": [lambda: evidence([-0.3] * 99), lambda: over_time(-0.5)],
    "vanishing_activations": [
        lambda: evidence([0.0] * 60, activation=-0.2 * np.arange(61)),
        lambda: _still(log_activation=np.full(10, -7.0)),
    ],
    "shattered_gradients": [lambda: _still(shattering=lambda: (0.05, 0.4))],
    "gradient_underflow": [
        lambda: _with_weights(np.eye(128), half=True, underflow=lambda: Underflow(0.4, (0.4,), 18))
    ],
    "flat_loss": [lambda: _with_weights(np.eye(128), leaf_log_gradient=[np.float64(-np.inf)])],
    "untrained_layer": [_untrained],
    "norm_overflow": [lambda: _still(leaf_names=["w"], leaf_log_gradient=[np.float64(50.0)])],
    "unstable_step_size": [
        lambda: _dynamics(sharpness=100.0, learning_rate=0.1),
        lambda: _dynamics([1.0, 2.0, 30.0]),
    ],
    "loss_spikes": [lambda: _dynamics(_SPIKE, from_history=True)],
    "clipping_always": [
        lambda: clipped(1.0),
        lambda: clipped(1.0, 0.995),
        lambda: _dynamics(np.ones(21), clips=(clip(1.0, np.zeros((20, 2))),)),
        lambda: _dynamics(np.ones(21), clips=(clip(9.0, np.tile([9.0, 0.0], (20, 1))),)),
    ],
    "clipping_never": [lambda: clipped(0.0), lambda: clipped(0.0, 0.0)],
}
