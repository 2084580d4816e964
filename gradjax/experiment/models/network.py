"""Networks as a list of parts: an architecture says what it is made of, and has its `links`.

    h_0 = x,   h_{p+1} = part_p(h_p),   logits = h_P

A part is one layer, or `count` equal layers that are scanned, so that compile time does not depend
on their number. `Network.links` gives the same parts as steps for the analysis.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from gradjax.core.step import Links, Scan
from gradjax.experiment.models.layers import plus, settings
from gradjax.experiment.schema import Model

PyTree = Any

# The name by which `stacked=` predicates recognise the leaves of a scan.
LAYERS = "layers"


class Part(NamedTuple):
    """A layer of a network, or `count` equal ones on top of each other, which are scanned.

    `layer` takes name= or parent= and returns a module that is called as (h, train).
    """

    name: str
    layer: Callable[..., nn.Module]
    count: int = 0

    def variables(self, network: PyTree) -> dict[str, PyTree]:
        """The variables of this part, stacked for a stack, among those of the network."""
        own = {kind: tree[self.name] for kind, tree in network.items() if self.name in tree}
        if self.count and self.name != LAYERS:
            return {kind: tree[LAYERS] for kind, tree in own.items()}
        return own


def part(
    name: str, owner: nn.Module, kind: Callable[..., Any], count: int = 0, /, **own: Any
) -> Part:
    """A part made of layers `kind` with their `own` fields, and the others from `owner`."""
    return Part(name, lambda **where: settings(owner, kind, **own, **where), count)


def scanned(layer: nn.Module, count: int, h: PyTree, train: bool) -> PyTree:
    """The state after `count` layers like `layer`, each with variables of its own."""
    stack = nn.scan(
        lambda layer, h, _: (layer(h, train), None),
        variable_axes={"params": 0, "batch_stats": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        length=count,
    )
    return stack(layer, h, None)[0]


class Stack(nn.Module):
    """Equal layers, scanned, under a name of their own."""

    layer: Callable[..., nn.Module]
    count: int

    @nn.compact
    def __call__(self, h: PyTree, train: bool) -> PyTree:
        """The state after all of them."""
        return scanned(self.layer(name=LAYERS), self.count, h, train)


class Readout(nn.Module):
    """Logits V h + c, V ~ 1 / fan_in (or 0) and c = 0.

    `averaged` axes before the last are averaged first: 2 of an image's pixels, 1 of nodes or steps.
    """

    num_outputs: int
    zero: bool = False
    averaged: int = 0

    @nn.compact
    def __call__(self, h: Array, train: bool) -> Array:
        """(..., features) -> (..., num_outputs)."""
        if self.averaged:
            h = jnp.mean(h, tuple(range(-1 - self.averaged, -1)))
        start = nn.initializers.zeros if self.zero else nn.initializers.lecun_normal()
        z = h @ self.param("kernel", start, (h.shape[-1], self.num_outputs))
        return plus(z, self.param("bias", nn.initializers.zeros, (self.num_outputs,)))


class Network(nn.Module, kw_only=True):
    """A network of parts; an architecture adds its settings and `_parts`.

    An architecture with a target for every step or node has a field `per_step`; its links then
    end in the logits of the last one.
    """

    num_outputs: int
    activation: str = "tanh"
    sigma_w: float | Array = 1.0
    sigma_b: float | Array = 0.0
    weights: str = "gaussian"
    weight_standardization: bool = False
    normalization: str = "none"

    @staticmethod
    def check_compatible(model: Model) -> str:
        """Why the settings exclude each other; empty where they do not.

        `model` may also be the network itself, whose fields have the same names.
        """
        return ""

    @nn.nowrap
    def _check(self, x: Array) -> None:
        """Raises `ValueError` for settings that exclude each other or inputs of a wrong shape."""
        if reason := self.check_compatible(self):  # type: ignore[arg-type]
            raise ValueError(reason)

    @nn.nowrap
    def _first_state(self, x: Array) -> Array:
        """The state that the first part takes."""
        return x

    def _parts(self, x: Array) -> Sequence[Part]:
        """The layers, from the first state to the logits."""
        raise NotImplementedError

    @nn.nowrap
    def _run(self, part: Part, h: PyTree, train: bool) -> PyTree:
        """The state after a part."""
        if not part.count:
            return part.layer(name=part.name)(h, train)
        if part.name == LAYERS:
            return scanned(part.layer(name=LAYERS), part.count, h, train)
        return Stack(part.layer, part.count, name=part.name)(h, train)

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Logits (batch, num_outputs), or with per_step (batch, seq_len, num_outputs).

        Args:
          x: a batch of examples, as the task gives them.
          train: BatchNorm uses the batch's statistics (make "batch_stats" mutable), and dropout
            draws from the "dropout" key.

        Raises:
          ValueError: settings that exclude each other, or inputs of a wrong shape.
        """
        self._check(x)
        h: PyTree = self._first_state(x)
        for part in self._parts(x):
            h = self._run(part, h, train)
        return h

    def links(self, variables: PyTree, x: Array, key: Array | None = None) -> tuple[Array, Links]:
        """The parts in training mode as links, for `gradjax.core.step` and `gradjax.spectrum`.

        Args:
          variables: as `init` returns them.
          x: one example, or a batch of them.
          key: PRNG key of the dropout masks, needed where there is dropout.

        Returns:
          The first state, and a link (step, theta) for each part, a `Scan` for a stack; theta holds
          the layer's variables and, with dropout, its key. With BatchNorm the states are whole
          batches.

        Raises:
          ValueError: a network with dropout and no key.
        """
        links: list = []
        parts = self._parts(x)
        for index, part in enumerate(parts):
            module = part.layer(parent=None)
            theta: dict[str, Any] = {"variables": part.variables(variables)}
            if getattr(module, "dropout", None) is not None:
                if key is None:
                    raise ValueError(
                        "links: a network with dropout draws masks; pass key=jax.random.key(...)."
                    )
                own_key = jax.random.fold_in(key, index)
                theta["key"] = jax.random.split(own_key, part.count) if part.count else own_key
            last = index == len(parts) - 1
            step = _step(module, last_only=last and getattr(self, "per_step", False))
            links.append(Scan(step, theta) if part.count else (step, theta))
        return self._first_state(x), links


def _step(module: nn.Module, last_only: bool) -> Callable[[PyTree, PyTree], PyTree]:
    """The layer in training mode as a step, reduced to its last time step or node if asked to."""

    def step(h: PyTree, theta: PyTree) -> PyTree:
        rngs = {"dropout": theta["key"]} if "key" in theta else {}
        out = module.apply(theta["variables"], h, True, rngs=rngs, mutable=["batch_stats"])[0]
        return out[..., -1, :] if last_only else out

    return step
