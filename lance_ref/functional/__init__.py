"""Differentiable functions, with PyTorch's names and argument orders.

Operands may be Tensors, NumPy arrays or Python numbers; a number takes the dtype of the other
operand, and float32 is never mixed with float64. Every function also runs on tensors without
data, from shapes alone (:func:`lance_ref.trace`).

Each operation is one :class:`~lance_ref.engine.autograd.Function`: ``output_shape`` checks the arguments,
``forward`` computes and names what it keeps for backward, ``backward`` stands below it.
"""

from lance_ref.functional.activations import elu, glu, leaky_relu, mish, prelu, silu, softplus
from lance_ref.functional.attention import scaled_dot_product_attention
from lance_ref.functional.convolution import conv2d, linear
from lance_ref.functional.elementwise import add, div, exp, log, mul, neg, pow, sqrt, sub
from lance_ref.functional.exported import clip, erf, expand, fake_quantize, gelu_tanh
from lance_ref.functional.group_norms import group_norm, instance_norm, rms_norm
from lance_ref.functional.indexing import index
from lance_ref.functional.lookups import embedding, where
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
from lance_ref.functional.resizing import interpolate
from lance_ref.functional.shaping import cat, concatenate, flatten, pad, permute, reshape, transpose
from lance_ref.functional.transposed import conv_transpose2d
from lance_ref.functional.volumes import (
    avg_pool1d,
    avg_pool3d,
    conv1d,
    conv3d,
    max_pool1d,
    max_pool3d,
)

__all__ = [
    "adaptive_avg_pool2d",
    "add",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "batch_norm",
    "cat",
    "clip",
    "concatenate",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose2d",
    "cross_entropy",
    "div",
    "dropout",
    "elu",
    "embedding",
    "erf",
    "exp",
    "expand",
    "fake_quantize",
    "flatten",
    "gelu",
    "gelu_tanh",
    "glu",
    "group_norm",
    "hardsigmoid",
    "hardswish",
    "index",
    "instance_norm",
    "interpolate",
    "layer_norm",
    "leaky_relu",
    "linear",
    "log",
    "log_softmax",
    "matmul",
    "max",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "mean",
    "mish",
    "mse_loss",
    "mul",
    "neg",
    "pad",
    "permute",
    "pow",
    "prelu",
    "relu",
    "relu6",
    "reshape",
    "rms_norm",
    "scaled_dot_product_attention",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "sqrt",
    "sub",
    "sum",
    "tanh",
    "transpose",
    "var",
    "where",
]

hand_over(__all__)
