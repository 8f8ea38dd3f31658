"""Differentiable functions, with PyTorch's names and argument orders.

Operands may be Tensors, NumPy arrays or Python numbers; a number takes the dtype of the other
operand, and float32 is never mixed with float64. Every function also runs on tensors without
data, from shapes alone (:func:`lance_ref.trace`).

Each operation is one :class:`~lance_ref.engine.autograd.Function`: ``output_shape`` checks the arguments,
``forward`` computes and names what it keeps for backward, ``backward`` stands below it.
"""

from lance_ref.functional.convolution import conv2d, linear
from lance_ref.functional.elementwise import add, div, exp, log, mul, neg, pow, sqrt, sub
from lance_ref.functional.exported import clip, erf, expand, fake_quantize, gelu_tanh
from lance_ref.functional.indexing import index
from lance_ref.functional.losses import cross_entropy, mse_loss
from lance_ref.functional.nonlinearities import (
    dropout,
    gelu,
    hardsigmoid,
    hardswish,
    log_softmax,
    relu,
    relu6,
    sigmoid,
    softmax,
    tanh,
)
from lance_ref.functional.normalization import batch_norm, layer_norm
from lance_ref.functional.operators import hand_over
from lance_ref.functional.pooling import adaptive_avg_pool2d, avg_pool2d, max_pool2d
from lance_ref.functional.products import matmul
from lance_ref.functional.reductions import max, mean, sum, var
from lance_ref.functional.shaping import cat, concatenate, flatten, pad, permute, reshape, transpose

__all__ = [
    "adaptive_avg_pool2d",
    "add",
    "avg_pool2d",
    "batch_norm",
    "cat",
    "clip",
    "concatenate",
    "conv2d",
    "cross_entropy",
    "div",
    "dropout",
    "erf",
    "exp",
    "expand",
    "fake_quantize",
    "flatten",
    "gelu",
    "gelu_tanh",
    "hardsigmoid",
    "hardswish",
    "index",
    "layer_norm",
    "linear",
    "log",
    "log_softmax",
    "matmul",
    "max",
    "max_pool2d",
    "mean",
    "mse_loss",
    "mul",
    "neg",
    "pad",
    "permute",
    "pow",
    "relu",
    "relu6",
    "reshape",
    "sigmoid",
    "softmax",
    "sqrt",
    "sub",
    "sum",
    "tanh",
    "transpose",
    "var",
]

hand_over(__all__)
