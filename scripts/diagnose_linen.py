"""Diagnose the convolutional network of Flax's MNIST example, on handwritten digits."""

import flax.linen as nn
import jax
import optax
from sklearn.datasets import load_digits

import gradjax


def conv(features):
    return [nn.Conv(features, (3, 3)), nn.relu, lambda h: nn.avg_pool(h, (2, 2), (2, 2))]


def loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()


images, labels = load_digits().images[:64, :, :, None] / 16, load_digits().target[:64]
dense = [lambda h: h.reshape(len(h), -1), nn.Dense(256), nn.relu, nn.Dense(10)]
model = nn.Sequential([*conv(32), *conv(64), *dense])
print(gradjax.diagnose(loss, model.init(jax.random.key(0), images), images, labels))
