"""Networks as JAX's and Optax's examples write them in plain functions: healthy as published, and
broken.

A value's name is that of its tap: `hidden_0` is the first hidden layer.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pathologies.case import Case
from pathologies.unseen_data import cross_entropy, digits, finish, labelled


def dense(key, sizes, stddev=None):
    """Weights and zero biases; `stddev` None is LeCun's 1 / sqrt(fan_in)."""
    keys = jax.random.split(key, len(sizes) - 1)
    scales = [np.float32(m**-0.5 if stddev is None else stddev) for m in sizes]
    shapes = zip(keys, sizes, sizes[1:], scales, strict=False)
    return [(scale * jax.random.normal(k, (m, n)), jnp.zeros(n)) for k, m, n, scale in shapes]


def mlp(params, x, act=jax.nn.relu):
    """Taps every hidden layer as `hidden_<i>`."""
    import gradjax

    for i, (w, b) in enumerate(params[:-1]):
        x = gradjax.tap(act(x @ w + b[None]), f"hidden_{i}")
    w, b = params[-1]
    return x @ w + b[None]


flat = digits(flat=True)


def plain(sizes, loss=cross_entropy, data=flat, stddev=None, act=jax.nn.relu, **more):
    """A `make(seed)` for an MLP of `sizes` in `loss(logits, y)`; `more` may alter parameters and
    inputs."""
    alter, before = more.pop("alter", lambda params: params), more.pop("before", lambda x: x)

    def make(seed):
        params = alter(dense(jax.random.key(seed), sizes, stddev))
        return finish(
            lambda params, x, y: loss(mlp(params, before(x), act), y), params, data, seed, **more
        )

    return make


def max_pool(x):
    """The maximum over overlapping squares of 2 x 2."""
    return jnp.maximum(
        jnp.maximum(x[:, :-1, :-1], x[:, 1:, :-1]), jnp.maximum(x[:, :-1, 1:], x[:, 1:, 1:])
    )


def conv(x, w, stride, padding):
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def cnn(**options):
    """Two convolutions with overlapping max-pooling and two dense layers, Glorot's weights, no
    library."""

    def loss_fn(params, x, y):
        import gradjax

        x = max_pool(gradjax.tap(jax.nn.relu(conv(x, params["conv0"], 2, "SAME")), "hidden_0"))
        x = max_pool(gradjax.tap(jax.nn.relu(conv(x, params["conv1"], 2, "VALID")), "hidden_1"))
        x = gradjax.tap(jax.nn.relu(x.reshape(len(x), -1) @ params["dense0"]), "hidden_2")
        return cross_entropy(x @ params["dense1"], y)

    def make(seed):
        shapes = {
            "conv0": (8, 8, 1, 8),
            "conv1": (4, 4, 8, 16),
            "dense0": (16, 32),
            "dense1": (32, 10),
        }
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        glorot = jax.nn.initializers.glorot_normal()
        params = {
            name: glorot(key, shape)
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        return finish(loss_fn, params, digits(), seed, **options)

    return make


def log_of_softmax(temperature):
    """The cross entropy written out, of logits divided by a small temperature: the softmax
    underflows to 0."""

    def loss(logits, y):
        p = jax.nn.softmax(logits / temperature, axis=-1)
        return -jnp.log(jnp.take_along_axis(p, y[:, None], axis=1)).mean()

    return loss


def masked_entropy(logits, y):
    """Cross entropy and the entropy over the lower five classes, whose `where` guards the value,
    not the gradient."""
    p = jax.nn.softmax(jnp.where(jnp.arange(10)[None] < 5, logits, -1e9), axis=-1)
    entropy = -jnp.where(p > 0, p * jnp.log(p), 0.0).sum(axis=-1)
    return cross_entropy(logits, y) - 0.01 * entropy.mean()


def triplet(logits, y):
    """The mean distance between neighbours in the batch and itself: the norm of 0 has no
    derivative."""
    distance = jnp.linalg.norm(logits[:, None] - logits[None], axis=-1)
    same = (y[:, None] == y[None]).astype(jnp.float32)
    return (same * distance + (1 - same) * jax.nn.relu(1 - distance)).mean()


def standardise(x):
    """Every pixel less its mean, over its own standard deviation, which is 0 for the corners."""
    return (x - x.mean(axis=0, keepdims=True)) / x.std(axis=0, keepdims=True)


def with_nan(seed):
    x, y = digits(flat=True)(seed)
    return x.at[3, 17].set(jnp.nan), y


def scaled_loss(exponent):
    """A loss scale that doubled whenever nothing overflowed, in a format where nothing does."""
    return lambda logits, y: 2.0**exponent * cross_entropy(logits, y)


def poisoned(tx, value):
    """A `make(seed)` whose Adam carries second moments of `value`, left by one overflowed
    gradient."""
    healthy = plain((256, 64, 64, 10), tx=tx)

    def make(seed):
        problem = healthy(seed)
        adam, *rest = tx.init(problem.params)
        adam = adam._replace(
            count=adam.count + 100,
            nu=jax.tree.map(lambda leaf: jnp.full_like(leaf, value), adam.nu),
        )
        return problem._replace(options={"tx": tx, "opt_state": (adam, *rest)})

    return make


half = functools.partial(jax.tree.map, lambda leaf: leaf.astype(jnp.float16))
SIZES = (256, 64, 64, 10)
case = functools.partial(Case, framework="plain", architecture="mlp")

CASES = (
    case(
        name="jax_mlp",
        depth=2,
        make=plain((256, 128, 128, 10), stddev=0.01, tx=optax.sgd(0.1)),
        source="JAX documentation, training a simple network with tfds: weights of 0.01, SGD",
    ),
    case(
        name="optax_private_cnn",
        architecture="cnn",
        depth=3,
        make=cnn(tx=optax.sgd(0.1)),
        source="optax/examples/contrib/differentially_private_sgd.ipynb with DPSGD = False",
    ),
    case(
        name="jax_mlp_ten_layers",
        depth=10,
        make=plain((256, *10 * (128,), 10), stddev=0.01),
        source="the same weights of 0.01 in a network of ten hidden layers",
        **labelled("vanishing_gradients", "weights_too_small", 9),
    ),
    case(
        name="plain_weights_unscaled",
        depth=44,
        make=plain((256, *44 * (256,), 10), stddev=1.0),
        source="jax.random.normal(key, (m, n)) as it comes, 44 layers: overflows float32",
        **labelled("exploding_activations", "weights_too_large", 36),
    ),
    case(
        name="plain_sigmoid_unscaled",
        depth=3,
        make=plain((256, 512, 512, 512, 10), stddev=1.0, act=jax.nn.sigmoid),
        source="jax.random.normal(key, (m, n)) as it comes, before a sigmoid",
        **labelled("saturated_units", "weights_too_large", 0),
    ),
    case(
        name="plain_log_of_softmax",
        depth=2,
        make=plain(SIZES, log_of_softmax(0.002)),
        source="log(softmax(logits / 0.002)), as in many an issue about a NaN loss",
        **labelled("non_finite", "log_of_zero"),
    ),
    case(
        name="plain_where_after_log",
        depth=2,
        make=plain(SIZES, masked_entropy),
        source="JAX documentation, FAQ: gradients contain NaN where using where",
        **labelled("non_finite", "double_where"),
    ),
    case(
        name="plain_norm_of_zero",
        depth=2,
        make=plain(SIZES, triplet),
        source="github.com/jax-ml/jax/issues/3058: the derivative of the norm at 0",
        **labelled("non_finite", "slope_at_zero"),
    ),
    case(
        name="plain_zero_deviation",
        depth=2,
        make=plain(SIZES, data=digits(flat=True), before=standardise),
        source="features divided by a standard deviation of 0, as in neural-lam's issue 136",
        **labelled("non_finite", "zero_over_zero"),
    ),
    case(
        name="plain_nan_pixel",
        depth=2,
        make=plain(SIZES, data=with_nan),
        source="one NaN in the batch",
        **labelled("non_finite", "bad_data"),
    ),
    case(
        name="plain_half_adam",
        depth=2,
        make=plain(
            SIZES, data=digits(flat=True, dtype=np.float16), alter=half, tx=optax.adam(1e-3)
        ),
        source="github.com/google-deepmind/optax/issues/1754: Adam's eps is 0 in float16, and so "
        "are some gradients",
        **labelled("non_finite", "zero_eps"),
    ),
    case(
        name="plain_loss_scale_2_74",
        depth=2,
        make=plain(
            SIZES, scaled_loss(74), tx=optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
        ),
        source="a dynamic loss scale that went on doubling in float32",
        **labelled("norm_overflow", "float_range"),
    ),
    case(
        name="plain_adam_poisoned",
        depth=2,
        make=poisoned(optax.adam(1e-3), jnp.inf),
        source="Adam after one gradient whose square overflowed: every later update is 0",
        **labelled("frozen_optimizer", "optimizer_state"),
    ),
    case(
        name="plain_warmup_of_no_steps",
        depth=2,
        make=plain(SIZES, tx=optax.adam(optax.linear_schedule(0.0, 1e-3, transition_steps=0))),
        source="Optax keeps a schedule of 0 transition steps at its first value, here 0",
        **labelled("frozen_optimizer", "learning_rate"),
    ),
)
