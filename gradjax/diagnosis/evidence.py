"""What a diagnosis rests on: numbers per layer of a loss, at given parameters and data, from one
evaluation.

    A_l = log rms h_l,   C_l = log rms dL/dh_l,   per layer l of the main chain

(`gradjax.taps.structure`), with the fraction of dead and saturated units, the spread over examples
and units, attention logits, the gradient and weights of every parameter leaf, and for recurrences
the carried state's cotangent at every step. `gradjax.diagnosis.probing.Measurement` measures it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradjax.diagnosis.underflow import Underflow
from gradjax.replay.nonfinite import NonFinite
from gradjax.taps import statistics as stats
from gradjax.taps.structure import Activation, Layer, Recurrence, Structure


def _not_measured() -> None:
    return None


@dataclass(frozen=True)
class Evidence:
    """The numbers of one network, in NumPy, logarithms natural.

    Arrays over layers run along the chain, read-out included. What stands inside a scan has a first
    axis of rows, one per iteration.

    Attributes:
      loss: its value.
      half: whether the loss, a layer or a parameter is in float16, whose largest number is 65504.
      aux: what the loss function returned beside the loss.
      structure: layers, activation functions and recurrences of the traced loss.
      layers: those of the chain.
      log_activation: (layers,) log rms of each layer's value.
      log_cotangent: (layers,) log rms of each layer's cotangent.
      log_gradient: (layers,) log norm of the gradient of each layer's parameters; -inf without any.
      size: (layers,) entries of each value.
      examples: (layers,) variance over examples, a fraction of the mean square.
      tokens: (layers,) variance over the positions of one example, likewise; NaN without positions.
      units: (layers,) variance over units, likewise.
      values: statistics by the name of a value.
      cotangents: statistics of the cotangents, by the name of a value.
      activations: each activation function with its dead or flat fraction, or `Logits`.
      recurrences: each with log rms of the state and of its cotangent, (T,) both.
      leaf_names: key paths of the parameters.
      leaf_shapes: their shapes.
      leaf_log_rms: their log rms.
      leaf_log_gradient: log norms of their gradients.
      leaf_bad: whether they hold inf or NaN.
      arg_log_rms: of the floating arguments.
      culprit: the operation that makes the loss or a gradient inf or NaN; None if all are finite,
        or if it was not found.
      skipped: named values that cannot be measured -> why.
      shattering: measures how the gradient changes with the input, `Measurement.shattering`; a
        function, since it compiles a gradient of its own.
      underflow: measures how much of the gradient underflows, asked where `half`; a function for
        the same reason.
      params: the parameters.
    """

    loss: float
    half: bool
    aux: Any
    structure: Structure
    layers: list[Layer]
    log_activation: np.ndarray
    log_cotangent: np.ndarray
    log_gradient: np.ndarray
    size: np.ndarray
    examples: np.ndarray
    tokens: np.ndarray
    units: np.ndarray
    values: dict[str, stats.Statistics]
    cotangents: dict[str, stats.Cotangent]
    activations: list[tuple[Activation, Any]]
    recurrences: list[tuple[Recurrence, np.ndarray, np.ndarray]]
    leaf_names: list[str]
    leaf_shapes: list[tuple[int, ...]]
    leaf_log_rms: list[np.ndarray]
    leaf_log_gradient: list[np.ndarray]
    leaf_bad: list[bool]
    arg_log_rms: list[float]
    culprit: NonFinite | None
    skipped: dict[str, str]
    shattering: Callable[[], tuple[float, float] | None] = _not_measured
    underflow: Callable[[], Underflow | None] = _not_measured
    params: list[np.ndarray] = field(default_factory=list, repr=False)

    @property
    def hidden(self) -> int:
        """How many of the layers are hidden: all but a read-out, whose shape differs from that of
        the layer before it.
        """
        last = len(self.layers) - 1
        if last < 1 or self.layers[last].row is not None or self.size[last] == self.size[last - 1]:
            return len(self.layers)
        return last
