# Diagnose a pre-LN transformer in NNX whose tokens are the eight rows of a handwritten digit.
from functools import reduce

from flax.nnx import (
    LayerNorm,
    Linear,
    List,
    MultiHeadAttention,
    Rngs,
    Sequential,
    gelu,
    log_softmax,
    one_hot,
)
from sklearn.datasets import load_digits

import gradjax

digits, rngs = load_digits(), Rngs(0)
attention = lambda: Sequential(
    LayerNorm(64, rngs=rngs), MultiHeadAttention(4, 64, decode=False, rngs=rngs)
)
mlp = lambda: Sequential(
    LayerNorm(64, rngs=rngs), Linear(64, 256, rngs=rngs), gelu, Linear(256, 64, rngs=rngs)
)
model = List(
    [Linear(8, 64, rngs=rngs), attention(), mlp(), attention(), mlp(), Linear(64, 10, rngs=rngs)]
)
logits = lambda model, x: model[-1](
    reduce(lambda h, branch: h + branch(h), model[1:-1], model[0](x)).mean(1)
)
loss = lambda model, x, y: -(one_hot(y, 10) * log_softmax(logits(model, x))).sum(1).mean()
print(gradjax.diagnose(loss, model, digits.images[:64] / 16, digits.target[:64]))
