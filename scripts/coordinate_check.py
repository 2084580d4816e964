r"""The coordinate check of an MLP: which parametrisation keeps its scales when the network grows?

    # fails: it explodes with width
    python scripts/coordinate_check.py standard.png --parametrization standard
    # passes
    python scripts/coordinate_check.py mup.png --parametrization mup
    python scripts/coordinate_check.py deep.png --parametrization mup --residual scaled \
      --widths 128 --depths 2 4 8 16

`make_model` below is what a check of your own model needs: copy it and put in your model, loss and
optimiser. Three parametrisations (Yang & Hu 2021, arXiv 2011.14522; Yang et al. 2022, arXiv
2203.03466), n = width, with learning rates relative to those of `--base-width`:

            weights: read-in  hidden   read-out     learning rates: SGD                 Adam
    standard         N(0, 1 / fan_in) everywhere    1        1       1          1        1        1
    ntk              N(0, 1) / sqrt(fan_in)         1        1       1          1        1        1
    mup              1/sqrt(d) 1/sqrt(n) 1/n        n        1       1/n        1        1/n     1/n

Residual blocks h + m W tanh(h) have m = 1, or with `--residual scaled` m = 1 / sqrt(depth) and
Adam's hidden learning rate times the same (Yang et al. 2023, arXiv 2310.02244; Bordelon et al.
2023, arXiv 2309.16620). The default takes some ten seconds on two cores. Exit status: 0 where the
check passes, 1 where it fails.
"""

import functools
import sys
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import optax
import tyro

from gradjax.diagnosis.coordinate import coordinate_check

matplotlib.use("Agg")

INPUTS, CLASSES, BATCH = 16, 4, 8


@dataclass(frozen=True)
class Check:
    """Check the coordinates of an MLP over widths or depths, and draw them."""

    output: tyro.conf.Positional[str] = ""
    """The image to write, e.g. coordinates.png; empty for none."""
    parametrization: Literal["standard", "ntk", "mup"] = "standard"
    """How weights and learning rates depend on the width."""
    optimizer: Literal["sgd", "adam"] = "adam"
    """Its learning rates are constant."""
    learning_rate: float = 1e-3
    """At the base width."""
    residual: Literal["none", "plain", "scaled"] = "none"
    """Hidden layers without skips, with skips, or with branches times 1 / sqrt(depth)."""
    widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Widths to compare."""
    depths: tuple[int, ...] = (2,)
    """Numbers of hidden layers to compare."""
    base_width: int = 32
    """Where the learning rates of all parametrisations agree."""
    num_steps: int = 4
    """Updates."""
    num_seeds: int = 4
    """Initialisations per size."""
    json: bool = False
    """Print JSON in place of the table."""


class Linear(nn.Module):
    """x -> x W * multiplier with W ~ N(0, std^2)."""

    features: int
    std: float
    multiplier: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param(
            "kernel", nn.initializers.normal(self.std), (x.shape[-1], self.features)
        )
        return x @ kernel * jnp.asarray(self.multiplier, x.dtype)


class Block(nn.Module):
    """A hidden layer, h -> W tanh(h) or h + m W tanh(h)."""

    linear: functools.partial
    residual: str
    depth: int

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        branch = self.linear(h.shape[-1], name="branch")(jnp.tanh(h))
        if self.residual == "none":
            return branch
        return h + branch / jnp.sqrt(
            jnp.asarray(self.depth if self.residual == "scaled" else 1, h.dtype)
        )


class MLP(nn.Module):
    """Read-in, `depth` hidden layers, read-out."""

    width: int
    depth: int
    parametrization: str
    residual: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def linear(fan_in: int, power: float) -> functools.partial:
            if self.parametrization == "ntk":
                return functools.partial(Linear, std=1.0, multiplier=fan_in**-0.5)
            return functools.partial(Linear, std=fan_in**-power, multiplier=1.0)

        h = linear(x.shape[-1], 0.5)(self.width, name="read_in")(x)
        for i in range(self.depth):
            h = Block(linear(self.width, 0.5), self.residual, self.depth, name=f"block_{i}")(h)
        readout = linear(self.width, 1.0 if self.parametrization == "mup" else 0.5)
        return readout(CLASSES, name="read_out")(jnp.tanh(h))


def learning_rates(check: Check, width: int, depth: int) -> dict[str, float]:
    """Factors on the learning rate of the read-in, the hidden layers and the read-out."""
    n = width / check.base_width
    factors = {"read_in": 1.0, "block": 1.0, "read_out": 1.0}
    if check.parametrization == "mup":
        adam = check.optimizer == "adam"
        factors = {
            "read_in": 1.0 if adam else n,
            "block": 1 / n if adam else 1.0,
            "read_out": 1 / n,
        }
    if check.residual == "scaled" and check.optimizer == "adam":
        factors["block"] *= depth**-0.5
    return factors


def make_model(check: Check, width: int, depth: int, key: jax.Array):
    """(loss_fn, params, tx) of one size; `coordinate_check` passes the last three arguments."""
    model = MLP(width, depth, check.parametrization, check.residual)
    params = model.init(key, jnp.zeros((1, INPUTS)))

    def loss_fn(params, x, labels):
        return optax.softmax_cross_entropy_with_integer_labels(
            model.apply(params, x), labels
        ).mean()

    factors = learning_rates(check, width, depth)
    optimizer = {"sgd": optax.sgd, "adam": optax.adam}[check.optimizer]
    rates = {name: optimizer(check.learning_rate * factor) for name, factor in factors.items()}

    def kinds(tree):
        return {
            "params": {
                k: jax.tree.map(lambda _, k=k: _kind(k), v) for k, v in tree["params"].items()
            }
        }

    return loss_fn, params, optax.multi_transform(rates, kinds)


def _kind(name: str) -> str:
    return "block" if name.startswith("block") else name


def batch(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Gaussian inputs of rms 1 and random labels."""
    key_x, key_y = jax.random.split(jax.random.key(seed))
    return jax.random.normal(key_x, (BATCH, INPUTS)), jax.random.randint(
        key_y, (BATCH,), 0, CLASSES
    )


def run(check: Check):
    """The check that the flags describe."""
    return coordinate_check(
        functools.partial(make_model, check),
        check.widths,
        check.depths,
        args=batch(),
        num_steps=check.num_steps,
        num_seeds=check.num_seeds,
    )


def main() -> int:
    """Command line."""
    check = tyro.cli(Check, description=__doc__)
    found = run(check)
    print(found.to_json() if check.json else found)
    if check.output:
        from gradjax.report.coordinate import coordinate_figure

        skips = {"none": "", "plain": ", skips", "scaled": ", scaled skips"}[check.residual]
        title = f"{check.parametrization}, {check.optimizer}{skips}"
        coordinate_figure(found.dataset, title).savefig(check.output, dpi=150)
        print(f"wrote {check.output}", file=sys.stderr)
    return 0 if found.ok else 1


if __name__ == "__main__":
    sys.exit(main())
