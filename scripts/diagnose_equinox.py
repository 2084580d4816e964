"""Diagnose an Equinox MLP on handwritten digits."""

import equinox as eqx
import jax
import optax
from sklearn.datasets import load_digits

import gradjax


def loss(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y).mean()


digits = load_digits()
model = eqx.nn.MLP(64, 10, width_size=128, depth=3, key=jax.random.key(0))
print(gradjax.diagnose(loss, model, digits.data[:64] / 16, digits.target[:64]))
