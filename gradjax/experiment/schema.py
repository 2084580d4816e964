"""The settings of an experiment as frozen dataclasses: names, defaults with their sources, allowed
values.

Floats are what a sweep may trace; ints, bools, strings and the fields marked static compile again.
So `__post_init__` checks nothing: `gradjax.config.check` is the host function that knows ranges and
names. Everything in `gradjax.experiment` may import this module; it imports nothing of gradjax.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

# The allowed names are the keys of a table elsewhere, which `gradjax.config` looks up when it
# checks a value.
BY_NAME = "by name"


class ConfigError(ValueError):
    """What the user wrote cannot be used; the message names key, value, what is allowed, nearest
    name.
    """


def _field(default: Any, **rule: Any) -> Any:
    """A field with its rule: `within` an interval, `options`, `pattern` in `words`, `static`."""
    return dataclasses.field(default=default, metadata=rule)


# sigma_w^2 has to be a float32, hence the upper end of the scales.
@dataclass(frozen=True)
class Model:
    """The network at initialisation. A model takes the settings that it has; any other is
    refused.
    """

    name: str = _field("mlp", options=BY_NAME)
    """Architecture; an unknown name lists them."""
    depth: int = _field(50, within="[1, 1000000]")
    """Hidden layers (blocks of residual, dense and transformer networks, layers of recurrences on top of each other).
    Our choice: past the depth scale of all but nearly critical networks."""
    width: int = _field(128, within="[1, 1000000]")
    """Units per hidden layer, channels of the first stage of a convolutional network. Our choice: mean field holds to
    about 1 / width, and a laptop can do it."""
    activation: str = _field("tanh", options=BY_NAME)
    """A name in gradjax.core.activations; an unknown one lists them. tanh: Schoenholz 2017."""
    sigma_w: float = _field(1.32701, within="[0, 1e18]")
    """Var W = sigma_w^2 / fan_in. Default: critical for tanh at the default sigma_b (Schoenholz
    2017)."""
    sigma_b: float = _field(0.05**0.5, within="[0, 1e18]")
    """Var b = sigma_b^2. Default: sqrt(0.05) (Schoenholz 2017)."""
    weights: str = _field("gaussian", options=BY_NAME)
    """Distribution of the weights, times sigma_w: gaussian (Poole 2016), orthogonal (Saxe 2013), he_normal (He 2015, at
    sigma_w = 1) ...; an unknown name lists them."""
    residual: bool = False
    """h + residual_scale * f(h) instead of f(h) (He 2015)."""
    residual_scale: float = _field(1.0, within="[0, 1e18]")
    """Scale of the branch of a residual layer; 1 is He 2015, 0 the start of ReZero (Bachlechner
    2020)."""
    residual_learned: bool = False
    """Whether the scale is a parameter of each layer (ReZero, Bachlechner 2020; SkipInit, De &
    Smith 2020)."""
    fixup: bool = False
    """Fixup's start of residual branches, with its scalars and no normalisation (Zhang 2019)."""
    bottleneck: int = _field(0, within="[0, 1000000]")
    """Units inside each residual branch, a map down and one up again (He 2015); 0: one map per
    branch."""
    highway: bool = False
    """Layers gated by a learned transform gate (Srivastava 2015), its bias starting at -2."""
    normalization: str = _field("none", options=("none", "batchnorm", "layernorm", "rmsnorm"))
    """batchnorm (Ioffe 2015), layernorm (Ba 2016) or rmsnorm (Zhang 2019), before the activation;
    none."""
    placement: str = _field("pre", options=("pre", "post", "deepnorm"))
    """Norm of a transformer: pre (on the branch), post (after the sum, Vaswani 2017), or deepnorm
    (Wang 2022)."""
    weight_standardization: bool = False
    """Standardised incoming weights of each unit, times sigma_w (Qiao 2019; Brock 2021's gain)."""
    dropout: float | None = _field(None, within="[0, 1)")
    """Rate of dropout after each hidden layer (Srivastava 2014); None: no dropout layer at all."""
    dropout_on: str = _field("all", options=("all", "last"))
    """Whether all hidden layers drop units, or the last alone."""
    num_heads: int = _field(4, within="[1, 1000000]")
    """Attention heads; they divide the width."""
    forget_bias: float | None = _field(None, within="[-1e18, 1e18]")
    """Start of the forget gate's bias (Jozefowicz 2015: 1), or of the gate in its place in other
    cells; None: 0."""
    chrono: float | None = _field(None, within="[2, 1e18]")
    """Longest time of chrono initialisation of the gates (Tallec & Ollivier 2018); None:
    without."""
    remat: bool = False
    """Gradients in O(sqrt(depth)) memory for about one more forward pass (Chen 2016)."""


@dataclass(frozen=True)
class Task:
    """The data, and how it is split."""

    name: str = _field("digits", options=BY_NAME)
    """Images (digits, offline; mnist ...), sequences (temporal_order, adding ...), text, graphs, a regression; an
    unknown name lists them."""
    batch_size: int = _field(64, within="[1, 1000000]")
    """Examples per batch. Our choice."""
    validation: float = _field(0.15, within="[0, 1)", static=True)
    """Share of the examples kept for validation. The usual 70/15/15. Static: it sets array
    shapes."""
    test: float = _field(0.15, within="[0, 1)", static=True)
    """Share kept for the test, where the data have no test set of their own. Static like
    validation."""
    normalize: str = _field("standard", options=BY_NAME)
    """standard: mean 0, variance 1 over the training split (mean field's q_0 is 1); none: within
    [0, 1]."""
    seq_len: int = _field(100, within="[1, 1000000]")
    """Steps of the generated sequences, blanks of copy memory; unused by images."""
    augment: str = _field("none", options=BY_NAME)
    """How the images of a training batch are varied: none, rotate, crop, flip; an unknown name
    lists them."""


@dataclass(frozen=True)
class Optimizer:
    """One chain: guard, clipping, optimiser, regularisation, schedule; see
    gradjax.experiment.optimizers.
    """

    name: str = _field("adam", options=BY_NAME)
    """Optimiser; an unknown name lists them."""
    learning_rate: float = _field(1e-3, within="[0, 1e18]")
    """Peak of the schedule. Default: Adam's (Kingma 2015)."""
    momentum: float | None = _field(None, within="[0, 1)")
    """Momentum, b1 of Adam's kind; None: the optimiser's own, which is .9 (muon .95). "sgd" has
    none."""
    b2: float | None = _field(None, within="[0, 1)")
    """Decay of the squares; None: the optimiser's own (adam .999, lion .99, rmsprop and adadelta
    .9)."""
    schedule: str = _field("constant", options=BY_NAME)
    """constant, cosine, exponential, step, plateau or growth_limited; an unknown name lists
    them."""
    warmup: float = _field(0.0, within="[0, 1)")
    """Share of the steps in which the rate rises linearly from 0 (Goyal 2017)."""
    decay: float = _field(0.1, within="[0, 1]")
    """Last rate over the peak of cosine and exponential; factor per reduction of step and
    plateau."""
    clipping: str = _field("none", options=BY_NAME)
    """Rule for the gradient (of L-BFGS for its direction); an unknown name lists them."""
    max_norm: float = _field(1.0, within="[0, 1e38]")
    """Threshold of the clipping rule, whatever it calls it; autoclip, historical_clip and zclip have none. Default:
    Pascanu 2013's order of magnitude."""
    guard: str = _field("none", options=BY_NAME)
    """What is done about non-finite or spiking gradients; an unknown name lists them. Without one a seed is lost at its
    first such step, with one after 20 in a row."""
    weight_decay: float | None = _field(None, within="[0, 1e18]")
    """Decoupled decay of the weights, times the rate (Loshchilov 2019); None: none."""
    l2: float | None = _field(None, within="[0, 1e18]")
    """Coupled: l2 times the weights is added to the gradient; None: none."""
    l1: float | None = _field(None, within="[0, 1e18]")
    """Coupled: l1 times the signs of the weights is added to the gradient; None: none."""
    weight_clip: float | None = _field(None, within="[0, 1e38]")
    """Bound on every weight after each step (Arjovsky 2017); None: none."""
    weight_norm: float | None = _field(None, within="[0, 1e38]")
    """Bound on the norm of a unit's incoming weights after each step (Srivastava 2014); None:
    none."""
    block: str = _field("layer", options=("layer", "coordinate"))
    """What coordinate descent moves at a time."""
    order: str = _field("cyclic", options=("cyclic", "random"))
    """In which order coordinate descent takes its blocks (Nesterov 2012: random)."""


@dataclass(frozen=True)
class Train:
    """How long, over how many seeds, and what becomes of it."""

    num_steps: int = _field(1000, within="[1, 1000000000]")
    """Training steps."""
    num_seeds: int = _field(1, within="[1, 1000000]")
    """Initialisations, each with its own order of batches, trained side by side."""
    eval_every: int = _field(100, within="[1, 1000000000]")
    """Steps of one compiled chunk; after each, validation, signals per layer, and maybe a
    checkpoint."""
    target: float = _field(0.9, within="[-1e38, 1]", static=True)
    """Validation score (accuracy, or R^2 of a regression) at which a seed counts as trained."""
    stop_at_target: bool = False
    """Whether a seed rests once its validation score has reached the target."""
    max_loss: float = _field(1e30, within="[-1e38, 1e38]")
    """A seed whose loss is above it has diverged. Default: only inf, NaN and what is about to
    be."""
    pretrain: str = _field("none", options=BY_NAME)
    """Greedy training, layer by layer, before the labels are used: rbm (Hinton 2006), autoencoder
    (Vincent 2008)."""
    pretrain_steps: int = _field(200, within="[1, 1000000000]")
    """Steps per layer of the pre-training. Our choice: some 10 epochs of the digits."""
    pretrain_rate: float = _field(0.1, within="[0, 1e18]")
    """Learning rate of the pre-training (Hinton 2010's practical guide, section 7: 0.1 for binary
    units)."""
    full_batch: bool = False
    """The whole training split at every step (L-BFGS needs it) instead of batches."""
    lanes: int = _field(0, within="[0, 1000000]")
    """Members in one vmap; 0: a rule chooses. Results depend on it in their last bits, so it is
    recorded."""
    shard: str = _field("members", options=("members", "batch"))
    """What is spread over the devices: members, or (data parallel) the batch of every member."""
    checkpoint_seconds: float = _field(30.0, within="[0, 1e9]", static=True)
    """Least time between two checkpoints of a block of members; 0: after every chunk."""


@dataclass(frozen=True)
class Diagnose:
    """What `gradjax diagnose` measures."""

    num_seeds: int = _field(8, within="[1, 1000000]")
    """Initialisations; numbers are medians over them. With 8 a median varies half as much as one
    seed."""
    spectrum_seeds: int = _field(4, within="[0, 1000000]")
    """Seeds (the first ones, or all) whose spectra are computed. Our choice: O(depth * width^3)
    each."""


@dataclass(frozen=True)
class Experiment:
    """One experiment; CONFIG sets these values, and a flag here overrides it."""

    name: str = _field(
        "experiment", pattern=r"\w[\w.-]{0,59}", words="up to 60 letters, digits, _ - ."
    )
    """The run's folder: OUTPUT/NAME, then OUTPUT/NAME-2."""
    seed: int = _field(0, within="[0, 4294967295]")
    """Seed of everything random: data split, initialisations."""
    output: str = _field("runs", pattern=r"[^\0\ud800-\udfff]+", words="a folder")
    """Folder of the runs."""
    model: Model = Model()
    """The network."""
    task: Task = Task()
    """The data."""
    optimizer: Optimizer = Optimizer()
    """How the parameters are moved."""
    train: Train = Train()
    """How long it is trained."""
    diagnose: Diagnose = Diagnose()
    """What is measured."""


@dataclass(frozen=True)
class Command:
    """Arguments of a command line beside the experiment's; a subclass adds its own flags.

    Fields are str or bool; one without default is positional.
    """

    config: str
    """TOML file of the experiment; see configs/."""


TABLES: dict[str, type] = {
    "model": Model,
    "task": Task,
    "optimizer": Optimizer,
    "train": Train,
    "diagnose": Diagnose,
}
FIELDS = {f.name: f for f in dataclasses.fields(Experiment) if f.name not in TABLES}
FIELDS |= {f"{table}.{f.name}": f for table, cls in TABLES.items() for f in dataclasses.fields(cls)}
