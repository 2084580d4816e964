"""The settings of an experiment: frozen dataclasses with defaults, sources and allowed values.

A sweep may trace the floats; another int, bool, string or static field compiles another program.
`__post_init__` therefore checks nothing: `gradjax.config.check` is the host function that knows
ranges and names. Everything in `gradjax.experiment` may import this module; it imports nothing of
gradjax.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

# The allowed names are the keys of a table in another module, which the validator looks up when it
# checks a value: the tables need jax, and this module does not.
BY_NAME = "by name"


class ConfigError(ValueError):
    """A setting that cannot be used; the message names key, value, allowed values, nearest name."""


def _field(default: Any, **rule: Any) -> Any:
    """A field with its rule: `within` (an interval), `options`, `pattern` and `words`, `static`."""
    return dataclasses.field(default=default, metadata=rule)


# Scales end at 1e18 because sigma_w^2 must be a float32.
@dataclass(frozen=True)
class Model:
    """The network at initialisation. A setting that the model does not have is an error."""

    name: str = _field("mlp", options=BY_NAME)
    """Architecture; an unknown name lists them."""
    depth: int = _field(50, within="[1, 1000000]")
    """Hidden layers: blocks of a residual, dense or transformer network, stacked layers of a
    recurrent one. Our choice: past the depth scale of all but nearly critical networks."""
    width: int = _field(128, within="[1, 1000000]")
    """Units per hidden layer; channels of the first stage of a convolutional network. Our choice:
    mean field is accurate to about 1 / width, and a laptop can train it."""
    activation: str = _field("tanh", options=BY_NAME)
    """A name in gradjax.core.activations; an unknown one lists them. tanh: Schoenholz 2017."""
    sigma_w: float = _field(1.32701, within="[0, 1e18]")
    """Var W = sigma_w^2 / fan_in. Default: critical for tanh at the default sigma_b
    (Schoenholz 2017)."""
    sigma_b: float = _field(0.05**0.5, within="[0, 1e18]")
    """Var b = sigma_b^2. Default: sqrt(0.05) (Schoenholz 2017)."""
    weights: str = _field("gaussian", options=BY_NAME)
    """Distribution of the weights, times sigma_w: gaussian (Poole 2016), orthogonal (Saxe 2013),
    he_normal (He 2015, at sigma_w = 1) ...; an unknown name lists them."""
    residual: bool = False
    """h + residual_scale * f(h) instead of f(h) (He 2015)."""
    residual_scale: float = _field(1.0, within="[0, 1e18]")
    """Scale of the branch of a residual layer; 1 is He 2015, 0 the start of ReZero
    (Bachlechner 2020)."""
    residual_learned: bool = False
    """Make the scale a parameter of each layer (ReZero, Bachlechner 2020; SkipInit, De & Smith
    2020)."""
    fixup: bool = False
    """Fixup initialisation of the residual branches: its scalars, no normalisation (Zhang 2019)."""
    bottleneck: int = _field(0, within="[0, 1000000]")
    """Units inside each residual branch, between a map down and a map up (He 2015); 0: one map per
    branch."""
    highway: bool = False
    """Layers with a learned transform gate, whose bias starts at -2 (Srivastava 2015)."""
    normalization: str = _field("none", options=("none", "batchnorm", "layernorm", "rmsnorm"))
    """Normalisation before the activation: batchnorm (Ioffe 2015), layernorm (Ba 2016), rmsnorm
    (Zhang 2019) or none."""
    placement: str = _field("pre", options=("pre", "post", "deepnorm"))
    """Where a transformer normalises: pre (on the branch), post (after the sum, Vaswani 2017) or
    deepnorm (Wang 2022)."""
    weight_standardization: bool = False
    """Standardise the incoming weights of each unit, times sigma_w (Qiao 2019; gain of Brock
    2021)."""
    dropout: float | None = _field(None, within="[0, 1)")
    """Dropout rate after each hidden layer (Srivastava 2014); None: no dropout layer at all."""
    dropout_on: str = _field("all", options=("all", "last"))
    """Whether all hidden layers drop units, or only the last."""
    num_heads: int = _field(4, within="[1, 1000000]")
    """Attention heads; the width must be a multiple of it."""
    forget_bias: float | None = _field(None, within="[-1e18, 1e18]")
    """Initial bias of the forget gate (Jozefowicz 2015: 1), or of the corresponding gate of other
    cells; None: 0."""
    chrono: float | None = _field(None, within="[2, 1e18]")
    """Longest time of the gates' chrono initialisation (Tallec & Ollivier 2018); None: no chrono
    initialisation."""
    remat: bool = False
    """Gradients in O(sqrt(depth)) memory, for about one more forward pass (Chen 2016)."""


@dataclass(frozen=True)
class Task:
    """The data, and how it is split."""

    name: str = _field("digits", options=BY_NAME)
    """Images (digits, offline; mnist ...), sequences (temporal_order, adding ...), text, graphs or
    a regression; an unknown name lists them."""
    batch_size: int = _field(64, within="[1, 1000000]")
    """Examples per batch. Our choice."""
    validation: float = _field(0.15, within="[0, 1)", static=True)
    """Fraction of the examples kept for validation. The usual 70/15/15. Static: it sets array
    shapes."""
    test: float = _field(0.15, within="[0, 1)", static=True)
    """Fraction kept for the test, where the data have no test set of their own. Static like
    validation."""
    normalize: str = _field("standard", options=BY_NAME)
    """standard: mean 0, variance 1 over the training split (q_0 = 1 in mean field); none: within
    [0, 1]."""
    seq_len: int = _field(100, within="[1, 1000000]")
    """Length of the generated sequences (blanks of copy memory); unused by images."""
    augment: str = _field("none", options=BY_NAME)
    """How the images of a training batch are augmented: none, rotate, crop, flip; an unknown name
    lists them."""


@dataclass(frozen=True)
class Optimizer:
    """Guard, clipping, optimiser, regularisation, schedule: see gradjax.experiment.optimizers."""

    name: str = _field("adam", options=BY_NAME)
    """Optimiser; an unknown name lists them."""
    learning_rate: float = _field(1e-3, within="[0, 1e18]")
    """Peak of the schedule. Default: Adam's (Kingma 2015)."""
    momentum: float | None = _field(None, within="[0, 1)")
    """Momentum, or b1 of Adam and its relatives; None: the optimiser's own, .9 (muon .95). "sgd"
    has none."""
    b2: float | None = _field(None, within="[0, 1)")
    """Decay of the mean square; None: the optimiser's own (adam .999, lion .99, rmsprop and
    adadelta .9)."""
    schedule: str = _field("constant", options=BY_NAME)
    """constant, cosine, exponential, step, plateau or growth_limited."""
    warmup: float = _field(0.0, within="[0, 1)")
    """Fraction of the steps over which the rate rises linearly from 0 (Goyal 2017)."""
    decay: float = _field(0.1, within="[0, 1]")
    """cosine and exponential: last rate over the peak; step and plateau: factor per reduction."""
    clipping: str = _field("none", options=BY_NAME)
    """Rule for the gradient (for L-BFGS, the direction); an unknown name lists them."""
    max_norm: float = _field(1.0, within="[0, 1e38]")
    """Threshold of the clipping rule, whatever the rule calls it; autoclip, historical_clip and
    zclip have none. Default: the order of magnitude of Pascanu 2013."""
    guard: str = _field("none", options=BY_NAME)
    """What to do about non-finite or spiking gradients; an unknown name lists them. Without a guard
    a seed diverges at its first non-finite step, with one after 20 in a row."""
    weight_decay: float | None = _field(None, within="[0, 1e18]")
    """Decoupled decay of the weights, times the rate (Loshchilov 2019); None: none."""
    l2: float | None = _field(None, within="[0, 1e18]")
    """Coupled decay: l2 times the weights is added to the gradient; None: none."""
    l1: float | None = _field(None, within="[0, 1e18]")
    """Coupled decay: l1 times the signs of the weights is added to the gradient; None: none."""
    weight_clip: float | None = _field(None, within="[0, 1e38]")
    """Bound on every weight after each step (Arjovsky 2017); None: none."""
    weight_norm: float | None = _field(None, within="[0, 1e38]")
    """Bound on the norm of each unit's incoming weights after each step (Srivastava 2014); None:
    none."""
    block: str = _field("layer", options=("layer", "coordinate"))
    """What coordinate descent updates at a time."""
    order: str = _field("cyclic", options=("cyclic", "random"))
    """Order in which coordinate descent takes its blocks (Nesterov 2012: random)."""


@dataclass(frozen=True)
class Train:
    """Length of the training, number of seeds, stopping, pre-training and layout."""

    num_steps: int = _field(1000, within="[1, 1000000000]")
    """Training steps."""
    num_seeds: int = _field(1, within="[1, 1000000]")
    """Initialisations, each with its own order of batches, trained in parallel."""
    eval_every: int = _field(100, within="[1, 1000000000]")
    """Steps of one compiled chunk; each chunk ends with validation, signals per layer and perhaps a
    checkpoint."""
    target: float = _field(0.9, within="[-1e38, 1]", static=True)
    """Validation score (accuracy, or R^2 of a regression) at which a seed counts as trained."""
    stop_at_target: bool = False
    """Freeze a seed once its validation score has reached the target."""
    max_loss: float = _field(1e30, within="[-1e38, 1e38]")
    """A seed with a larger loss has diverged. Default: only inf, NaN and losses about to become
    so."""
    pretrain: str = _field("none", options=BY_NAME)
    """Greedy layer-by-layer training without labels, before training: rbm (Hinton 2006),
    autoencoder (Vincent 2008) or none."""
    pretrain_steps: int = _field(200, within="[1, 1000000000]")
    """Pre-training steps per layer. Our choice: about 10 epochs of the digits."""
    pretrain_rate: float = _field(0.1, within="[0, 1e18]")
    """Learning rate of the pre-training (Hinton 2010, a practical guide, section 7: 0.1 for binary
    units)."""
    full_batch: bool = False
    """Use the whole training split at every step (L-BFGS needs it) instead of batches."""
    lanes: int = _field(0, within="[0, 1000000]")
    """Members (seed and setting) in one vmap; 0: chosen by a rule. Results depend on it in their
    last bits, so it is recorded."""
    shard: str = _field("members", options=("members", "batch"))
    """What is distributed over the devices: members, or every member's batch (data parallel)."""
    checkpoint_seconds: float = _field(30.0, within="[0, 1e9]", static=True)
    """Least number of seconds between checkpoints of a block of members; 0: after every chunk."""


@dataclass(frozen=True)
class Diagnose:
    """What `gradjax diagnose` measures."""

    num_seeds: int = _field(8, within="[1, 1000000]")
    """Initialisations over which medians are taken. A median of 8 varies half as much as one
    seed."""
    spectrum_seeds: int = _field(4, within="[0, 1000000]")
    """Number of seeds, the first ones, whose spectra are computed, in O(depth * width^3) each. Our
    choice."""


@dataclass(frozen=True)
class Experiment:
    """One experiment. CONFIG sets these values, and a flag overrides them."""

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
    """How the parameters are updated."""
    train: Train = Train()
    """How long it is trained."""
    diagnose: Diagnose = Diagnose()
    """What is measured."""


@dataclass(frozen=True)
class Command:
    """The arguments of a command other than the experiment's; a subclass adds flags.

    Fields are str or bool. A field without a default is positional.
    """

    config: str
    """TOML file of the experiment; configs/ holds examples."""


TABLES: dict[str, type] = {
    "model": Model,
    "task": Task,
    "optimizer": Optimizer,
    "train": Train,
    "diagnose": Diagnose,
}
# dotted name -> field
FIELDS = {f.name: f for f in dataclasses.fields(Experiment) if f.name not in TABLES}
FIELDS |= {f"{table}.{f.name}": f for table, cls in TABLES.items() for f in dataclasses.fields(cls)}
