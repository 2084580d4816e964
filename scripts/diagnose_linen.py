"""Diagnose the convolutional network of Flax's MNIST example, on handwritten digits."""

import flax.linen as nn
import jax
import optax
from sklearn.datasets import load_digits

import gradjax

images, labels = load_digits().images[:64, :, :, None] / 16, load_digits().target[:64]
conv = lambda features: [
    nn.Conv(features, (3, 3)),
    nn.relu,
    lambda h: nn.avg_pool(h, (2, 2), (2, 2)),
]
dense = [lambda h: h.reshape(len(h), -1), nn.Dense(256), nn.relu, nn.Dense(10)]
model = nn.Sequential([*conv(32), *conv(64), *dense])
loss = lambda params, x, y: optax.softmax_cross_entropy_with_integer_labels(
    model.apply(params, x), y
).mean()
print(gradjax.diagnose(loss, model.init(jax.random.key(0), images), images, labels))
