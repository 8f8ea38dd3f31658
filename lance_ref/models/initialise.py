"""What the factories share: checks of their arguments, and the initial scale of convolutions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lance_ref import nn
from lance_ref.nn.init import as_generator

Rng = int | np.random.Generator | None


def source(rng: Rng) -> np.random.Generator | None:
    """One generator for a whole network; None leaves every layer to the library's default one."""
    return None if rng is None else as_generator(rng)


def check_positive_int(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} is {value!r}, expected a positive integer")


def check_positive(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a finite number above 0."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} is {value!r}, expected a finite positive number")


def kaiming_fan_out(conv: nn.Conv2d, rng: Rng) -> nn.Conv2d:
    """Draw the weight anew from N(0, 2 / (C_out/groups · k_h · k_w)), and return the layer.

    He et al., ICCV 2015, equation 14: each input reaches C_out/groups · k_h · k_w outputs.
    torchvision leaves ``groups`` out, which starts depthwise convolutions √C_out times smaller; with
    batch norm frozen nothing would make up for that, and the signal would vanish on its way.
    """
    if not conv.weight.is_meta:
        fan_out = conv.out_channels // conv.groups * math.prod(conv.kernel_size)
        values = as_generator(rng).standard_normal(conv.weight.shape, dtype=np.float32)
        conv.weight.data = values * np.float32(math.sqrt(2 / fan_out))
    return conv


def kaiming_conv(
    C_in: int,
    C_out: int,
    kernel_size: int,
    stride: int,
    rng: Rng,
    *,
    groups: int = 1,
    same: bool = False,
    bias: bool = False,
) -> nn.Conv2d:
    """A convolution with the weight of :func:`kaiming_fan_out` and a bias of 0, if any.

    Its padding keeps the size at stride 1: symmetric, or, at ``same``, as TensorFlow has it.
    """
    padding: int | str = "same" if same else (kernel_size - 1) // 2
    conv = nn.Conv2d(C_in, C_out, kernel_size, stride, padding, groups=groups, bias=bias, rng=rng)
    if conv.bias is not None and not conv.bias.is_meta:
        conv.bias.data = np.zeros_like(conv.bias.data)
    return kaiming_fan_out(conv, rng)


def normal_weight(linear: nn.Linear, std: float, rng: Rng) -> nn.Linear:
    """Draw the weight anew from N(0, std²), set the bias to 0, and return the layer."""
    if not linear.weight.is_meta:
        values = as_generator(rng).standard_normal(linear.weight.shape, dtype=np.float32)
        linear.weight.data = values * np.float32(std)
        if linear.bias is not None:
            linear.bias.data = np.zeros_like(linear.bias.data)
    return linear
