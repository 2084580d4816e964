"""What a labelled case is: a network, how to make it, and what is known to be wrong with it.

A label is physics, never a tool's opinion: each is backed by a measurement that knows nothing of
the diagnosis (explicit values and cotangents of every layer of the network that `make` returns).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


class Problem(NamedTuple):
    """What `gradjax.diagnose(loss_fn, params, *args, **options)` is given."""

    loss_fn: Callable[..., Any]
    params: Any
    args: tuple
    options: dict[str, Any] = {}


def last_integer(name: str) -> int | None:
    """The layer that a name speaks of: `block_3/attn` -> 3, `layers[17]` -> 17, `readout` ->
    None."""
    found = re.findall(r"\d+", name)
    return int(found[-1]) if found else None


@dataclass(frozen=True)
class Case:
    """One labelled network. `pathology=None` is healthy; a None among the other labels is not
    judged.

    `layer` counts hidden layers (or residual blocks) from 0, or time steps from 0 in a recurrent
    network, where `depth` is the sequence's length. `source` says where a healthy set-up is
    published.
    """

    name: str
    framework: str  # "linen" | "nnx" | "equinox" | "plain"
    architecture: str  # "mlp" | "cnn" | "resnet" | "rnn" | "lstm" | "transformer"
    depth: int
    make: Callable[[int], Problem]
    pathology: str | None = None
    cause: str | None = None
    layer: int | None = None
    severity: str = ""  # "mild" | "severe"
    position: Callable[[str], int | None] = last_integer
    source: str = ""
