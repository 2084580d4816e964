"""Architectures in Flax Linen, one per file, each with its `links`: the same network as steps.

A model is a module with

    model.apply(variables, x, train=False) -> logits    (batch, num_outputs), or with per_step
                                                        (batch, seq_len, num_outputs)
    model.links(variables, x, key=None) -> (h0, links)  run from h0 they give the logits (of the
                                                        last step)
    model.check_compatible(settings) -> str             why settings that it takes exclude each
                                                        other, so that a config is rejected before
                                                        anything is compiled; empty where they fit

Most are a `gradjax.models.network.Network`, which has `links` and `apply` already. Apart from
`num_outputs`, and `per_step` of models that can answer at every step, the fields are settings of
`gradjax.config.Model` with the same names: a model takes the settings that it declares, `unused`
lists the others, and a field that is no setting is an error as soon as this module is imported.
`MODELS` is the one place that knows the names: name -> (module, fixed fields). Initialise on a real
batch: `weights = "lsuv"` looks at it.
"""

import dataclasses
import difflib
from typing import Any

from gradjax.core.names import suggest_names
from gradjax.experiment.models.alexnet import AlexNet
from gradjax.experiment.models.cells import CELLS
from gradjax.experiment.models.circular import CircularCNN
from gradjax.experiment.models.convolution import ConvNet
from gradjax.experiment.models.densenet import DenseNet
from gradjax.experiment.models.graph import GCN
from gradjax.experiment.models.inception import Inception
from gradjax.experiment.models.layers import no_scale
from gradjax.experiment.models.lenet import LeNet5
from gradjax.experiment.models.mlp import MLP
from gradjax.experiment.models.recurrent import Recurrent
from gradjax.experiment.models.resnet import ResNet
from gradjax.experiment.models.transformer import Transformer
from gradjax.experiment.models.vgg import VGG
from gradjax.experiment.schema import Model

MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mlp": (MLP, {}),
    **{name: (Recurrent, {"cell": name, **cell.all_fixed()}) for name, cell in CELLS.items()},
    "transformer": (Transformer, {"weight_standardization": False}),
    "lenet5": (LeNet5, {}),
    "alexnet": (AlexNet, {}),
    "vgg": (VGG, {}),
    "resnet": (ResNet, {}),
    "densenet": (DenseNet, {}),
    "inception": (Inception, {}),
    "circular_cnn": (CircularCNN, {}),
    "gcn": (GCN, {}),
}
CONVOLUTIONAL = tuple(name for name, (model, _) in MODELS.items() if issubclass(model, ConvNet))
SETTINGS = {field.name for field in dataclasses.fields(Model)} - {"name"}
# Fields of a module that are no settings: two that `build` passes, and Flax's own.
_PASSED = {"num_outputs", "per_step"}
_FLAX = {"name", "parent"}


def check_fields(model: Any, fixed: dict[str, Any]) -> None:
    """Check that every field of a model is a setting, is passed by `build`, or is fixed.

    Raises:
      TypeError: a field that would silently stay at its default; names the nearest setting.
    """
    for name in model.__dataclass_fields__:
        if name in SETTINGS | _PASSED | _FLAX | set(fixed):
            continue
        near = difflib.get_close_matches(name, SETTINGS | _PASSED, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise TypeError(
            f"models: {model.__name__} has a field {name!r}, which is no setting of "
            f"gradjax.experiment.schema.Model and would stay at its default.{hint} Rename it, add "
            "the setting to Model, or fix its value in MODELS."
        )


for _model, _fixed in MODELS.values():
    check_fields(_model, _fixed)


def takes(name: str, setting: str) -> bool:
    """Whether the model of this name has the setting."""
    model, fixed = MODELS[name]
    return setting in model.__dataclass_fields__ and setting not in fixed


def build(config: Model, num_outputs: int, per_step: bool = False) -> Any:
    """The module of a `gradjax.config.Model`.

    Args:
      config: its floats may be traced.
      num_outputs: classes, or 1 for a regression.
      per_step: whether the task has a target for every step of a sequence.

    Raises:
      ValueError: `per_step` for a network that is no sequence model.
    """
    model, fixed = MODELS[config.name]
    fields = {name: getattr(config, name) for name in SETTINGS if takes(config.name, name)}
    if takes(config.name, "per_step"):
        fields["per_step"] = per_step
    elif per_step:
        able = ", ".join(name for name in MODELS if takes(name, "per_step"))
        raise ValueError(
            f"models: {config.name} gives one answer per example, and the task has a target per "
            f"step; choose one of {able}."
        )
    return model(num_outputs=num_outputs, **fields, **fixed)


def unused(config: Model) -> list[str]:
    """The settings that differ from their defaults although the model does not take them."""
    return [
        field.name
        for field in dataclasses.fields(config)
        if field.name != "name"
        and not takes(config.name, field.name)
        and getattr(config, field.name) != field.default
    ]


def check_compatible(config: Model) -> str:
    """Why settings that the model takes exclude each other; empty where they do not."""
    model, _ = MODELS[config.name]
    return no_scale(config) or model.check_compatible(config)


__all__ = ["MLP", "MODELS", "build", "check_compatible", "takes", "unused"]

__getattr__ = suggest_names(__name__)
