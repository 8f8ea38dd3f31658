"""Layers, with PyTorch's names and argument orders."""

from lance_ref.nn import init, utils
from lance_ref.nn.attention import SelfAttention
from lance_ref.nn.layers import (
    GELU,
    AdaptiveAvgPool2d,
    AvgPool2d,
    Conv2d,
    Dropout,
    Flatten,
    Hardsigmoid,
    Hardswish,
    Identity,
    Linear,
    MaxPool2d,
    ReLU,
    ReLU6,
    Sequential,
    Sigmoid,
    Softmax,
    Tanh,
)
from lance_ref.nn.module import Module, Parameter
from lance_ref.nn.normalization import BatchNorm1d, BatchNorm2d, LayerNorm
from lance_ref.nn.recompute import Recompute, checkpoint_sequential

__all__ = [
    "GELU",
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "Conv2d",
    "Dropout",
    "Flatten",
    "Hardsigmoid",
    "Hardswish",
    "Identity",
    "LayerNorm",
    "Linear",
    "MaxPool2d",
    "Module",
    "Parameter",
    "ReLU",
    "ReLU6",
    "Recompute",
    "SelfAttention",
    "Sequential",
    "Sigmoid",
    "Softmax",
    "Tanh",
    "checkpoint_sequential",
    "init",
    "utils",
]
