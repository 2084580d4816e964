"""What theory predicts for a configured network at finite width, to draw over measurements.

Along the layers, with q the length of the pre-activations, f = phi^2, e = phi'^2 and means over
h ~ N(0, q),

    q' = V(q) = sigma_w^2 E f + sigma_b^2,      X = log chi(q),  chi = sigma_w^2 E e

are mean field's length and growth of log ||dL/dh||^2 (Poole et al. 2016, arXiv 1606.05340;
Schoenholz et al. 2017, arXiv 1611.01232). A width n adds noise: (3 E e^2 / (E e)^2 - 1) / n to X,
Hanin and Nica's 5/n for ReLU (arXiv 1812.05994), and sigma_w^4 Var f / (n V^2) to log q'. The two
covary, being sums over the same units; orthogonal weights lack the noise of the radius. Means and
variances are carried to first order in depth / width, including the response of later layers to a
length. Derived for this package from these references.

A measurement is the log of a batch's mean square, log mean exp(Y_x), Y log-normal: examples of
correlation c_l with cotangents of correlation gamma_l have a part of the noise in common,
Cov(Y_1, Y_2), and average over the rest. All pairs are taken to have the mean correlation, and
cotangents start at the read-out as those of a uniform softmax.

Covered: plain networks, and skips around an odd phi, to mean field's order for their length
(sigma_v = scale of Yang & Schoenholz 2017, arXiv 1712.08969). Not covered, with the reason given by
`covers`: BatchNorm, LayerNorm and dropout; skips around another phi, whose mean adds up along the
skip and aligns the gradient with it. Cost: 10,000 activations per layer.
"""

# ruff: noqa: D102  (`gradjax.config.Model` describes the fields of the protocols)

import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gradjax.core.activations import resolve
from gradjax.theory.gaussian import REACH, density, derivative, graded_nodes

ODD = ("linear", "tanh", "hard_tanh", "erf")


class Plain(Protocol):
    """The settings of a network that `predict` reads, as `gradjax.config.Model` has them."""

    @property
    def depth(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def activation(self) -> str: ...
    @property
    def sigma_w(self) -> float: ...
    @property
    def sigma_b(self) -> float: ...
    @property
    def weights(self) -> str: ...
    @property
    def residual(self) -> bool: ...
    @property
    def residual_scale(self) -> float: ...


class Configured(Plain, Protocol):
    """The further settings that `covers` reads."""

    @property
    def name(self) -> str: ...
    @property
    def normalization(self) -> str: ...
    @property
    def dropout(self) -> float | None: ...
    @property
    def weight_standardization(self) -> bool: ...
    @property
    def highway(self) -> bool: ...
    @property
    def fixup(self) -> bool: ...
    @property
    def bottleneck(self) -> int: ...


class Theory(NamedTuple):
    """Natural logarithms per hidden layer, means over networks.

    The fields `sd_...` are standard deviations over networks.
    """

    log_activation_rms: np.ndarray  # (depth,)
    sd_log_activation_rms: np.ndarray  # (depth,), NaN with skips
    log_cotangent_rms: np.ndarray  # (depth,) relative to the last layer's
    sd_log_cotangent_rms: np.ndarray
    log_gain: np.ndarray  # (depth,) log rms singular value of a layer, mean field
    log_product_rms: float  # log rms singular value of J_depth .. J_2
    sd_log_product_rms: float


def covers(model: Configured) -> str:
    """Why there is no theory for a `gradjax.config.Model`; empty where there is one."""
    if model.name != "mlp":
        return f"none for {model.name} at finite width"
    parts = {
        model.normalization: model.normalization != "none",
        "dropout": model.dropout is not None,
        f"{model.weights} weights": model.weights not in ("gaussian", "orthogonal"),
        "standardised weights": model.weight_standardization,
        "gates": model.highway,
        "branches of two maps": model.fixup or bool(model.bottleneck),
        model.activation: model.activation in ("prelu", "tailored_relu"),
    }
    for part, present in parts.items():
        if present:
            return f"none for a network with {part} at finite width"
    if model.residual and model.activation not in ODD:
        return (
            f"none for skips around {model.activation}, whose mean adds up along them; "
            f"{', '.join(ODD)} have one"
        )
    return "" if model.sigma_w > 0 else "none for sigma_w = 0"


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _moments(activation: str, depth: int, residual: bool, w2, b2, scale2, q, c) -> dict[str, Array]:
    """Moments per layer: q, c, p = E h^2, and those of f and e, along log q and over pairs.

    Args:
      activation: its name, static, as depth and residual.
      depth: number of layers.
      residual: whether there are skips.
      w2: sigma_w^2.
      b2: sigma_b^2.
      scale2: square of the scale of a branch.
      q: () length of the first layer.
      c: () correlation of two examples there.

    Returns:
      Arrays with a leading axis (depth,), by name; `f` and `e` hold the mean, its first two
      derivatives along log q, and q^2 d^2/dq^2 of it.
    """
    act = resolve(activation)
    slope = derivative(act.phi)
    # Pairs enter the fluctuations only, for which a plain grid is enough.
    u = jnp.asarray(np.arange(-5.90625, 6, 0.1875), q.dtype)
    grid = density(u) / jnp.sum(density(u))

    def layer(state, first):
        q, c, p, shared = state
        s = jnp.sqrt(q)
        kinks = jnp.asarray(act.kinks or (0.0,), q.dtype)
        z, w = graded_nodes(kinks / s, jnp.minimum(1 / s, 1.0), -REACH, REACH, 48)
        w, value, tangent = w * density(z), act.phi(s * z), slope(s * z)
        powers = jnp.stack([value**2, tangent**2])
        # the mean and its derivatives by Stein's identity
        stein = jnp.stack(
            [jnp.ones_like(z), (z**2 - 1) / 2, (z**4 - 4 * z**2 + 1) / 4, (z**4 - 6 * z**2 + 3) / 4]
        )
        f, e = jnp.einsum("az,kz,z->ak", powers, stein, w)
        means = jnp.stack([f[0], e[0]])
        one, two = s * u[:, None], s * (c * u[:, None] + jnp.sqrt(1 - c * c) * u[None])

        def over_pairs(g):
            return grid @ (g(one) * g(two)) @ grid

        first_powers, both = (jnp.stack([act.phi(x) ** 2, slope(x) ** 2]) for x in (one, two))
        own = first_powers[:, :, 0] @ grid
        pair = jnp.einsum(
            "aij,bij,i,j->ab", jnp.broadcast_to(first_powers, both.shape), both, grid, grid
        )
        plain = first | (not residual)
        branch, skip = jnp.where(plain, 1.0, scale2), jnp.where(plain, 0.0, 1.0)
        p = skip * p + branch * f[0]
        shared = skip * shared + branch * f[0] * over_pairs(act.phi) / own[0]
        out = dict(
            q=q,
            c=c,
            p=p,
            f=f,
            e=e,
            tilt=jnp.sum(w * value * tangent * z) ** 2 / (f[0] * e[0]),
            single=jnp.einsum("az,bz,z->ab", powers, powers, w) / (means[:, None] * means[None]),
            pair=pair / (own[:, None] * own[None]),
            turn=over_pairs(slope) / own[1],
        )
        after = w2 * p + b2
        return (after, jnp.clip((w2 * shared + b2) / after, -1.0, 1.0), p, shared), out

    return jax.lax.scan(layer, (q, c, 0 * q, 0 * q), jnp.arange(depth) == 0)[1]


def _average(variance: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the log of a mean of `size` log-normal numbers of mean log 0.

    By 500 fixed draws at each of 30 variances.

    Args:
      variance: (2, depth), of the log of one number, and the covariance of two.
      size: how many numbers are averaged.
    """
    apart = np.maximum(variance[0] - variance[1], 0.0)
    grid = np.linspace(0, np.max(np.nan_to_num(apart, posinf=0.0)) + 1e-9, 30)
    normal = np.random.default_rng(0).standard_normal((250, min(size, 1000)))
    normal = np.concatenate([normal, -normal]) / np.sqrt(np.mean(normal**2))
    logs = np.array(
        [np.logaddexp.reduce(np.sqrt(s) * normal, 1) - np.log(normal.shape[1]) for s in grid]
    )
    mean, own = (np.interp(apart, grid, f(logs, axis=1)) for f in (np.mean, np.var))
    return mean, np.sqrt(variance[1] + own)


def _cotangent_correlations(m: dict[str, np.ndarray], mix: np.ndarray, n: int, gamma2: float):
    """Mean squared correlation of two cotangents at each layer, (depth,), from the last one's."""
    gammas = np.empty(len(mix))
    for l in range(len(mix) - 1, -1, -1):
        gammas[l] = gamma2
        kept = (1 - mix[l] + mix[l] * m["turn"][l]) ** 2 * gamma2
        gamma2 = kept + (1 - kept) * mix[l] ** 2 * m["pair"][l, 1, 1] / n
    return gammas


def _along(m: dict[str, np.ndarray], model: Plain, size: int, gamma2: float) -> list[np.ndarray]:
    """Activations, growth back from the last layer, each with its deviation, and gain.

    Args:
      m: the moments of every layer.
      model: the network.
      size: number of examples over which the squares are averaged.
      gamma2: mean squared correlation of two cotangents at the last layer.

    Returns:
      Five arrays (depth,): activation, its deviation, growth, its deviation, gain.
    """
    depth, n, w2, b2 = model.depth, model.width, model.sigma_w**2, model.sigma_b**2
    orthogonal = model.weights == "orthogonal"
    (f, f1, f2, f3), (e, e1, e2, e3) = m["f"].T, m["e"].T
    plain = np.arange(depth) < (1 if model.residual else depth)
    chi = w2 * e * np.where(plain, 1.0, model.residual_scale**2)
    # the fraction of a layer's squared gain that comes from its branch
    mix = np.where(plain, 1.0, chi / (1 + chi))
    gain = np.where(plain, np.log(chi), np.log1p(chi))
    # derivatives along log q: of log chi (a, a2), of log E f (r, r2), of log V (slope, bend)
    a, a2 = e1 / e * plain, (e2 / e - (e1 / e) ** 2) * plain
    r, r2 = f1 / f, f2 / f - (f1 / f) ** 2
    fraction, weight = (m["q"] - b2) / m["q"] * plain, w2 * f / (w2 * f + b2) * plain
    slope, bend = weight * r, weight * f2 / f - (weight * r) ** 2
    # the variance that the fixed norm of W x removes
    radius = orthogonal * fraction**2 / n
    length_pull, growth_pull = radius * f3 / f, radius * e3 / e

    def noise(relative, gamma2, turn, c):
        """Covariances of two examples' noise: in X, in X and log E f, in log E f."""
        pinned = orthogonal * ((c * m["q"] - b2) / m["q"] * plain) ** 2
        excess = relative - 1
        x = (1 + 2 * gamma2) * excess[:, 1, 1] - 2 * pinned * a**2
        if not orthogonal:
            x = x + 2 * turn**2 * gamma2
        x = 4 * mix * (1 - mix) * turn * gamma2 + mix**2 * x
        return (
            np.stack([x, excess[:, 0, 1] - 2 * pinned * a * r, excess[:, 0, 0] - 2 * pinned * r**2])
            / n
        )

    gammas = _cotangent_correlations(m, mix, n, gamma2)
    own = noise(m["single"], 1.0, 1.0, 1.0)
    both = np.stack(
        [own, noise(m["pair"], gammas, m["turn"], m["c"])]
    )  # (one or two, which, layer)

    # forwards: the drift of log q, and the squared cosine of the gradient with the signal
    drift, cos2 = 0.0, 1 / n
    lengths = np.zeros((2, depth + 1))  # variance of log q of one example, covariance of two
    expected = gain - own[0] / 2 - growth_pull
    activation = np.log(m["p"]) - (own[2] / 2 + length_pull) * plain
    for l in range(depth):
        v, tilt = lengths[0, l], cos2 - orthogonal / n
        expected[l] += a[l] * drift + a2[l] * v / 2 + 2 * fraction[l] * tilt * a[l]
        activation[l] += (r[l] * drift + r2[l] * v / 2) * plain[l]
        cos2 = fraction[l] * m["tilt"][l] * tilt + m["single"][l, 0, 1] / n
        drift = slope[l] * drift + bend[l] * v / 2 - weight[l] * (own[2, l] / 2 + length_pull[l])
        lengths[:, l + 1] = slope[l] ** 2 * lengths[:, l] + weight[l] ** 2 * both[:, 2, l]
    spread = plain * (r**2 * lengths[:, :-1] + both[:, 2])

    # backwards: the response to a layer's length of all growth behind it
    response, noises, variance = 0.0, 0.0, np.zeros((2, depth))
    for l in range(depth - 1, 0, -1):
        answer = response * weight[l]
        noises = noises + both[:, :, l] @ np.array([1.0, 2 * answer, answer**2])
        response = a[l] + slope[l] * response
        variance[:, l - 1] = noises + response**2 * lengths[:, l]
    total = np.append(np.cumsum(expected[:0:-1])[::-1], 0.0)
    (rise, sd), (lift, sd_activation) = _average(variance, size), _average(spread, size)
    return [
        (activation + lift) / 2,
        np.where(plain, sd_activation / 2, np.nan),
        (total + rise) / 2,
        sd / 2,
        gain / 2,
    ]


def predict(
    model: Plain, x: np.ndarray | Array, labels: np.ndarray | Array, classes: int
) -> Theory:
    """Theory of a covered network on a batch, in float64 on the host.

    Args:
      model: a `gradjax.config.Model` for which `covers` is empty.
      x: (batch, ...) inputs; the Jacobians are those at the first one.
      labels: (batch,) classes, non-negative integers.
      classes: their number.

    Returns:
      `Theory`; NaN where a length leaves float64.
    """
    x = np.asarray(x, np.float64).reshape(len(x), -1)
    w2, b2, batch = model.sigma_w**2, model.sigma_b**2, len(x)
    lengths, pairs = np.mean(x**2, 1), max(batch * (batch - 1), 1)
    overlap = (np.square(x.sum(0)).mean() - lengths.sum()) / pairs
    same = (np.square(np.bincount(labels)).sum() - batch) / pairs
    q = w2 * np.array([lengths.mean(), lengths[0]]) + b2
    c = np.array([np.clip((w2 * overlap + b2) / q[0], -1.0, 1.0), 1.0])
    with jax.enable_x64(True), np.errstate(all="ignore"):
        scan = functools.partial(_moments, model.activation, model.depth, bool(model.residual))
        moments = jax.vmap(lambda q, c: scan(w2, b2, model.residual_scale**2, q, c))(q, c)
        whole, one = (
            {name: np.asarray(value[i]) for name, value in moments.items()} for i in (0, 1)
        )
        h, sd_h, growth, sd_growth, _ = _along(
            whole, model, batch, same + (1 - same) / (classes - 1) ** 2
        )
        _, _, product, sd, gain = _along(one, model, model.width, 1 / model.width)
    # A matrix that is not square has its gain per input.
    gain[0] += 0.5 * np.log(model.width / x.shape[1])
    return Theory(h, sd_h, growth, sd_growth, gain, float(product[0]), float(sd[0]))
