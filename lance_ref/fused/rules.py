"""Which operations a fused pass can run, known from shapes and attributes alone.

All of them treat each image for itself. Those of :data:`STREAMED` run on a few images at a time, those of
:data:`WHOLE` on the whole batch once the streamed ones are through: they take little, and come last in a net.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lance_ref.algebra.kernels.channels_last import CLAMP, HARDSIGMOID, HARDSWISH, Activation
from lance_ref.engine.autograd import Function
from lance_ref.engine.tensor import Shape
from lance_ref.functional.convolution import Conv2d, Linear, has_bias
from lance_ref.functional.elementwise import Add, Mul
from lance_ref.functional.nonlinearities import Hardsigmoid, Hardswish, Relu, Relu6
from lance_ref.functional.normalization import BatchNorm
from lance_ref.functional.pooling import AdaptiveAvgPool2d, MaxPool2d
from lance_ref.functional.shaping import Reshape

ACTIVATIONS = {
    "relu": Activation(CLAMP, 0.0, np.inf),
    "relu6": Activation(CLAMP, 0.0, 6.0),
    "hardswish": Activation(HARDSWISH),
    "hardsigmoid": Activation(HARDSIGMOID),
}

_STREAMED: tuple[type[Function], ...] = (
    *(Conv2d, BatchNorm, Relu, Relu6, Hardswish, Hardsigmoid, Add, Mul, MaxPool2d, AdaptiveAvgPool2d),
)
STREAMED = {function.op: function for function in _STREAMED}
WHOLE: dict[str, type[Function]] = {function.op: function for function in (Reshape, Linear)}


def operands(op: str) -> int:
    """How many of an operation's inputs, the first ones, are images; the others are the layer's own arrays."""
    return 2 if op in ("add", "mul") else 1


def why_not(op: str, shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> str | None:
    """Why an operation of :data:`STREAMED` cannot be streamed with these inputs; None if it can."""
    x = shapes[0]
    if len(x) != 4 or 0 in x:
        return "its input is no batch of images"
    if op == "conv2d":
        weight = shapes[1]
        if attributes.get("update") is not None:
            return "its weight is a sum"
        if attributes["groups"] != 1 and not (weight[1] == 1 and weight[0] == x[1]):
            return "its groups have several channels"
    elif op == "batch_norm" and attributes["training"]:
        return "it takes the statistics of the batch"
    elif op in ("add", "mul") and shapes[1] != x:
        per_channel = (*x[:2], 1, 1)
        if op == "add" or shapes[1][:2] != x[:2] or per_channel not in shapes:
            return f"its inputs have shapes {shapes[0]} and {shapes[1]}"
    elif op == "max_pool2d" and attributes["ceil_mode"]:
        return "its windows reach beyond the image"
    elif op == "adaptive_avg_pool2d" and attributes["output_size"] != (1, 1):
        return "it has several windows"
    return None


def detail(op: str, shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of an operation, beside its images, decides how it is run: for convolutions and pooling."""
    if op == "conv2d":
        geometry = tuple(attributes[name] for name in ("stride", "padding", "dilation", "groups"))
        return (shapes[1], *geometry, has_bias(len(shapes)))
    if op == "max_pool2d":
        return tuple(attributes[name] for name in ("kernel_size", "stride", "padding"))
    return ()
