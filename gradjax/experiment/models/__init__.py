"""Architectures in Flax Linen, one per file, each with its `links`: the same network as steps.

A model is a module with

    model.apply(variables, x, train=False) -> logits            (batch, num_outputs), or (batch, seq_len, num_outputs)
    model.links(variables, x, key=None) -> (h0, links)          run from h0 they give the logits (of the last step)

whose fields are settings of `gradjax.config.Model` of the same names, and no other: what a model
does not declare it does not take, and `unused` says so. Settings that it takes but not together it
names in a static `refuses(settings)`, so that a config is refused before anything is compiled.
`MODELS` is the one place that knows the names: name -> (module, fixed fields). Initialise on a real
batch: `weights = "lsuv"` looks at it.
"""

import dataclasses
from typing import Any

from gradjax.experiment.models.alexnet import AlexNet
from gradjax.experiment.models.circular import CircularCNN
from gradjax.experiment.models.densenet import DenseNet
from gradjax.experiment.models.graph import GCN
from gradjax.experiment.models.inception import Inception
from gradjax.experiment.models.layers import fields_of, no_scale
from gradjax.experiment.models.lenet import LeNet5
from gradjax.experiment.models.mlp import MLP
from gradjax.experiment.models.recurrent import Recurrent
from gradjax.experiment.models.resnet import ResNet
from gradjax.experiment.models.transformer import Transformer
from gradjax.experiment.models.vgg import VGG

_NO_GATES = {"forget_bias": None, "chrono": None}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mlp": (MLP, {}),
    "rnn": (Recurrent, {"cell": "rnn", **_NO_GATES}),
    "orthogonal_rnn": (Recurrent, {"cell": "orthogonal_rnn", "weights": "gaussian", **_NO_GATES}),
    "lstm": (Recurrent, {"cell": "lstm"}),
    "gru": (Recurrent, {"cell": "gru"}),
    "minimal_rnn": (Recurrent, {"cell": "minimal_rnn"}),
    "transformer": (Transformer, {}),
    "lenet5": (LeNet5, {}),
    "alexnet": (AlexNet, {}),
    "vgg": (VGG, {}),
    "resnet": (ResNet, {}),
    "densenet": (DenseNet, {}),
    "inception": (Inception, {}),
    "circular_cnn": (CircularCNN, {}),
    "gcn": (GCN, {}),
}


CONVOLUTIONAL = ("lenet5", "alexnet", "vgg", "resnet", "densenet", "inception", "circular_cnn")


def build(config: Any, num_outputs: int, per_step: bool = False) -> Any:
    """The module of a `gradjax.config.Model`.

    Args:
      config: its floats may be traced.
      num_outputs: classes, or 1 for a regression.
      per_step: whether the task has a target for every step of a sequence.

    Raises:
      ValueError: `per_step` for a network that is no sequence model.
    """
    model, fixed = MODELS[config.name]
    sequential = "per_step" in model.__dataclass_fields__
    if per_step and not sequential:
        raise ValueError(
            f"models: {config.name} gives one answer per example, and the task has a target per step; choose one of "
            f"{', '.join(name for name, (m, _) in MODELS.items() if 'per_step' in m.__dataclass_fields__)}."
        )
    more = {"per_step": per_step} if sequential else {}
    return model(num_outputs=num_outputs, **{**fields_of(model, config), **fixed}, **more)


def unused(config: Any) -> list[str]:
    """The settings that differ from their defaults though the model of this name does not take
    them.
    """
    model, fixed = MODELS[config.name]
    taken = (set(model.__dataclass_fields__) - set(fixed)) | {"name"}
    return [
        field.name
        for field in dataclasses.fields(config)
        if field.name not in taken and getattr(config, field.name) != field.default
    ]


def check_compatible(config: Any) -> str:
    """Why there is no such network though the model takes each of the settings; empty where there
    is.
    """
    model, _ = MODELS[config.name]
    return no_scale(config) or (
        model.check_compatible(config) if hasattr(model, "check_compatible") else ""
    )


def takes(name: str, setting: str) -> bool:
    """Whether the model of this name has the setting."""
    model, fixed = MODELS[name]
    return setting in model.__dataclass_fields__ and setting not in fixed


__all__ = ["MLP", "MODELS", "build", "check_compatible", "takes", "unused"]
