"""What theory says of a configured network at finite width, to be drawn over what was measured.

Along the layers, with q the length of the pre-activations, f = phi^2, e = phi'^2 and means over h ~
N(0, q),

    q' = V(q) = sigma_w^2 E f + sigma_b^2,      X = log chi(q),  chi = sigma_w^2 E e

are mean field's length and growth of log ||dL/dh||^2 (Poole et al. 2016, arXiv 1606.05340;
Schoenholz et al. 2017, arXiv 1611.01232). A width n adds noise: (3 E e^2 / (E e)^2 - 1) / n to X,
Hanin and Nica's 5/n for ReLU (arXiv 1812.05994), sigma_w^4 Var f / (n V^2) to log q', and both
covary, being sums over the same units; orthogonal weights lack the noise of the radius. Means and
variances are carried to first order in depth / width, the response of later layers to a length
included. Derived for this package from these references.

What is measured is the log of a batch's mean square, log mean exp(Y_x), Y log-normal: examples of
correlation c_l with cotangents of correlation gamma_l share a part of the noise, Cov(Y_1, Y_2), and
average the rest. All pairs are taken to have the mean correlation, and cotangents start at the
read-out as those of a uniform softmax.

Covered: plain networks; skips around an odd phi, to mean field's order for their length (sigma_v =
scale of Yang & Schoenholz 2017, arXiv 1712.08969). Not covered, and said so by `covers`: BatchNorm,
LayerNorm and dropout; skips around another phi, whose mean adds up along the skip and turns the
gradient its way. Cost: 10,000 activations per layer.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gradjax.core.activations import resolve
from gradjax.theory.gaussian import REACH, graded_nodes, density, derivative

ODD = ("linear", "tanh", "hard_tanh", "erf")


class Theory(NamedTuple):
    """Natural logarithms per hidden layer, means over networks; `sd_` are the standard deviations
    of one network.
    """

    log_activation_rms: np.ndarray  # (depth,)
    sd_log_activation_rms: np.ndarray  # (depth,), NaN with skips
    log_cotangent_rms: np.ndarray  # (depth,) relative to the last layer's
    sd_log_cotangent_rms: np.ndarray
    log_gain: np.ndarray  # (depth,) log rms singular value of a layer, mean field
    log_product_rms: float  # log rms singular value of J_depth .. J_2
    sd_log_product_rms: float


def covers(model: Any) -> str:
    """Why there is no theory for a `gradjax.config.Model`, empty where there is."""
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
    for part in (part for part, has in parts.items() if has):
        return f"none for a network with {part} at finite width"
    if model.residual and model.activation not in ODD:
        return f"none for skips around {model.activation}, whose mean adds up along them; {', '.join(ODD)} have one"
    return "" if model.sigma_w > 0 else "none for sigma_w = 0"


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _moments(activation: str, depth: int, residual: bool, w2, b2, scale2, q, c) -> dict[str, Array]:
    """Per layer: q, c, E h^2, and the Gaussian moments of f and e, with their derivatives in log q
    and over pairs.
    """
    act = resolve(activation)
    slope = derivative(act.phi)
    u = jnp.asarray(
        np.arange(-5.90625, 6, 0.1875), q.dtype
    )  # pairs enter fluctuations alone, where a plain grid is enough
    grid = density(u) / jnp.sum(density(u))

    def layer(state, first):
        q, c, p, shared = state
        s = jnp.sqrt(q)
        z, w = graded_nodes(
            jnp.asarray(act.kinks or (0.0,), q.dtype) / s,
            jnp.minimum(1 / s, 1.0),
            -REACH,
            REACH,
            48,
        )
        w, value, tangent = w * density(z), act.phi(s * z), slope(s * z)
        powers = jnp.stack([value**2, tangent**2])
        # a mean, its first two derivatives along log q, and q^2 d^2/dq^2 of it, by Stein's identity
        stein = jnp.stack(
            [jnp.ones_like(z), (z**2 - 1) / 2, (z**4 - 4 * z**2 + 1) / 4, (z**4 - 6 * z**2 + 3) / 4]
        )
        f, e = jnp.einsum("az,kz,z->ak", powers, stein, w)
        means = jnp.stack([f[0], e[0]])
        one, two = s * u[:, None], s * (c * u[:, None] + jnp.sqrt(1 - c * c) * u[None])
        over = lambda g: grid @ (g(one) * g(two)) @ grid
        first_powers, both = (jnp.stack([act.phi(x) ** 2, slope(x) ** 2]) for x in (one, two))
        own = first_powers[:, :, 0] @ grid
        pair = jnp.einsum(
            "aij,bij,i,j->ab", jnp.broadcast_to(first_powers, both.shape), both, grid, grid
        )
        branch = jnp.where(first | (not residual), 1.0, scale2)
        skip = jnp.where(first | (not residual), 0.0, 1.0)
        p, shared = skip * p + branch * f[0], skip * shared + branch * f[0] * over(act.phi) / own[0]
        out = dict(
            q=q, c=c, p=p, f=f, e=e, tilt=jnp.sum(w * value * tangent * z) ** 2 / (f[0] * e[0]),
            single=jnp.einsum("az,bz,z->ab", powers, powers, w) / (means[:, None] * means[None]),
            pair=pair / (own[:, None] * own[None]), turn=over(slope) / own[1],
        )  # fmt: skip
        return (
            w2 * p + b2,
            jnp.clip((w2 * shared + b2) / (w2 * p + b2), -1.0, 1.0),
            p,
            shared,
        ), out

    return jax.lax.scan(layer, (q, c, 0 * q, 0 * q), jnp.arange(depth) == 0)[1]


def _average(variance: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the log of a mean of `size` log-normal numbers of mean log 0.

    variance: (2, depth), of the log of one, and the covariance of two. By 500 fixed draws at each of 30 variances.
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


def _along(m: dict[str, np.ndarray], model: Any, size: int, gamma2: float) -> list[np.ndarray]:
    """Activation, growth back from the last layer, each with its deviation, and gain; `size`
    examples, see above.

    gamma2: mean squared correlation of two cotangents at the last layer.
    """
    n, w2, b2, orthogonal = (
        model.width,
        model.sigma_w**2,
        model.sigma_b**2,
        model.weights == "orthogonal",
    )
    depth, (f, f1, f2, f3), (e, e1, e2, e3) = model.depth, m["f"].T, m["e"].T
    plain = np.arange(depth) < (1 if model.residual else depth)
    chi = w2 * e * np.where(plain, 1.0, model.residual_scale**2)
    mix = np.where(plain, 1.0, chi / (1 + chi))  # the branch's share of a layer's squared gain
    gain = np.where(plain, np.log(chi), np.log1p(chi))
    a, a2 = e1 / e * plain, (e2 / e - (e1 / e) ** 2) * plain  # derivatives of log chi along log q
    r, r2 = f1 / f, f2 / f - (f1 / f) ** 2  # of log E f
    fraction, weight = (m["q"] - b2) / m["q"] * plain, w2 * f / (w2 * f + b2) * plain
    slope, bend = weight * r, weight * f2 / f - (weight * r) ** 2  # of log V
    radius = orthogonal * fraction**2 / n  # what the fixed norm of W x takes away
    length_pull, growth_pull = radius * f3 / f, radius * e3 / e

    gammas = np.empty(depth)
    for l in range(depth - 1, -1, -1):
        gammas[l] = gamma2
        kept = (1 - mix[l] + mix[l] * m["turn"][l]) ** 2 * gamma2
        gamma2 = kept + (1 - kept) * mix[l] ** 2 * m["pair"][l, 1, 1] / n

    def noise(relative, gamma2, turn, c):
        """Covariances of two examples' noise: in X, in X and log E f, in log E f."""
        pinned = orthogonal * ((c * m["q"] - b2) / m["q"] * plain) ** 2
        of = lambda i, j: relative[:, i, j] - 1
        x = (
            (1 + 2 * gamma2) * of(1, 1)
            + 2 * turn**2 * gamma2 * (not orthogonal)
            - 2 * pinned * a**2
        )
        x = 4 * mix * (1 - mix) * turn * gamma2 + mix**2 * x
        return np.stack([x, of(0, 1) - 2 * pinned * a * r, of(0, 0) - 2 * pinned * r**2]) / n

    own = noise(m["single"], 1.0, 1.0, 1.0)
    both = np.stack(
        [own, noise(m["pair"], gammas, m["turn"], m["c"])]
    )  # (one or two, which, layer)

    drift, cos2 = 0.0, 1 / n  # of log q; squared cosine of the gradient with the signal
    lengths = np.zeros((2, depth + 1))  # variance of log q of one example, covariance of two
    expected, activation = (
        gain - own[0] / 2 - growth_pull,
        np.log(m["p"]) - (own[2] / 2 + length_pull) * plain,
    )
    for l in range(depth):
        v = lengths[0, l]
        expected[l] += (
            a[l] * drift + a2[l] * v / 2 + 2 * fraction[l] * (cos2 - orthogonal / n) * a[l]
        )
        activation[l] += (r[l] * drift + r2[l] * v / 2) * plain[l]
        cos2 = fraction[l] * m["tilt"][l] * (cos2 - orthogonal / n) + m["single"][l, 0, 1] / n
        drift = slope[l] * drift + bend[l] * v / 2 - weight[l] * (own[2, l] / 2 + length_pull[l])
        lengths[:, l + 1] = slope[l] ** 2 * lengths[:, l] + weight[l] ** 2 * both[:, 2, l]
    spread = plain * (r**2 * lengths[:, :-1] + both[:, 2])

    response, noises, variance = (
        0.0,
        0.0,
        np.zeros((2, depth)),
    )  # of all growth behind a layer to its length
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


def predict(model: Any, x: Any, labels: Any, classes: int) -> Theory:
    """Theory of a covered `gradjax.config.Model` on a batch `x`, (batch, features), in float64 on
    the host.

    The Jacobians are those at its first example. NaN where a length leaves float64.
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
    gain[0] += 0.5 * np.log(model.width / x.shape[1])  # per input of a matrix that is not square
    return Theory(h, sd_h, growth, sd_growth, gain, float(product[0]), float(sd[0]))
