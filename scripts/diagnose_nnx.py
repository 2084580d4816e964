"""Diagnose a pre-LN transformer in NNX whose tokens are the eight rows of a handwritten digit."""

import optax
from flax import nnx
from sklearn.datasets import load_digits

import gradjax


def branch(*layers):
    return nnx.Sequential(nnx.LayerNorm(64, rngs=rngs), *layers)


def attention():
    return branch(nnx.MultiHeadAttention(4, 64, decode=False, rngs=rngs))


def mlp():
    return branch(nnx.Linear(64, 256, rngs=rngs), nnx.gelu, nnx.Linear(256, 64, rngs=rngs))


def loss(model, x, y):
    h = model[0](x)
    for block in model[1:-1]:
        h = h + block(h)
    logits = model[-1](h.mean(1))
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


digits, rngs = load_digits(), nnx.Rngs(0)
first, last = nnx.Linear(8, 64, rngs=rngs), nnx.Linear(64, 10, rngs=rngs)
model = nnx.List([first, attention(), mlp(), attention(), mlp(), last])
print(gradjax.diagnose(loss, model, digits.images[:64] / 16, digits.target[:64]))
