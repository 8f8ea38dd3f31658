"""The networks of the benchmarks made of torch.nn: the same layers in the same order as ours. Needs PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from lance_ref import nn as ours
from lance_ref.models.alexnet_cl import CONVOLUTIONS, WIDTH
from lance_ref.models.mcunet import BLOCKS, FIRST_CHANNELS
from lance_ref.models.mobilenetv2 import STAGES
from lance_ref.nn.module import Module

Conv = Callable[..., list[Any]]
"""(C_in, C_out, kernel, stride, groups) -> a convolution and what always follows it."""


class InvertedResidual(nn.Module):
    """x + project(depthwise(expand(x))); the addition only where shapes allow it."""

    def __init__(self, conv: Conv, C_in: int, C_out: int, expansion: int, stride: int, kernel: int) -> None:
        super().__init__()
        wide = C_in * expansion
        layers = [*conv(C_in, wide), nn.ReLU6()] if expansion > 1 else []
        layers += [*conv(wide, wide, kernel, stride, wide), nn.ReLU6(), *conv(wide, C_out)]
        self.body, self.residual = nn.Sequential(*layers), stride == 1 and C_in == C_out

    def forward(self, x: Any) -> Any:
        return x + self.body(x) if self.residual else self.body(x)


def make_mobilenetv2(classes: int) -> nn.Module:
    layers, width = [*_with_norm(3, 32, 3, 2), nn.ReLU6()], 32
    for expansion, channels, blocks, stride in STAGES:
        for i in range(blocks):
            layers.append(InvertedResidual(_with_norm, width, channels, expansion, stride if i == 0 else 1, 3))
            width = channels
    layers += [*_with_norm(width, 1280), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Dropout(0.2), nn.Linear(1280, classes))


def make_mcunet(classes: int) -> nn.Module:
    width = FIRST_CHANNELS
    layers = [*_with_bias(3, width, 3, 2), nn.ReLU6()]
    for expansion, channels, stride, kernel in BLOCKS:
        layers.append(InvertedResidual(_with_bias, width, channels, expansion, stride, kernel))
        width = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def make_alexnet_cl(classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    width = 3
    for (channels, kernel), drop in zip(CONVOLUTIONS, (0.2, 0.2, 0.5), strict=True):
        layers += [nn.Conv2d(width, channels, kernel, bias=False), nn.BatchNorm2d(channels, track_running_stats=False)]
        layers += [nn.ReLU(), nn.Dropout(drop), nn.MaxPool2d(2)]
        width = channels
    layers.append(nn.Flatten())
    for features in (width * 2 * 2, WIDTH):
        layers += [nn.Linear(features, WIDTH, bias=False)]
        layers += [nn.BatchNorm1d(WIDTH, track_running_stats=False), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, classes, bias=False))


def make_mlp(classes: int) -> nn.Module:
    hidden = [nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(100, classes))


MAKERS: dict[str, Callable[[int], nn.Module]] = {
    "mobilenetv2": make_mobilenetv2,
    "mcunet": make_mcunet,
    "alexnet-cl": make_alexnet_cl,
    "mlp": make_mlp,
}


def twin(name: str, net: Module, classes: int) -> nn.Module:
    """The network of that name with our net's values; what trains and what is frozen in ours, is so in it."""
    theirs = MAKERS[name](classes)
    with torch.no_grad():
        for parameter, own in zip(theirs.parameters(), net.parameters(), strict=True):
            parameter.copy_(torch.from_numpy(own.data))  # fails where the shapes differ
            parameter.requires_grad_(own.requires_grad)
        for buffer, array in zip(_statistics(theirs), [a for _, a in net.named_buffers()], strict=True):
            buffer.copy_(torch.from_numpy(array))
    theirs.train(net.training)
    norms = [module for module in theirs.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
    frozen = [m.frozen for m in net.modules() if isinstance(m, (ours.BatchNorm1d, ours.BatchNorm2d))]
    for norm, own_is_frozen in zip(norms, frozen, strict=True):
        norm.train(net.training and not own_is_frozen)
    return theirs


def folded(net: nn.Module) -> nn.Module:
    """The network with channels innermost, and with frozen norms folded into the convolutions before them.

    A convolution that trains then trains W·scale in place of W: the same work, of a step that is another one.
    """
    for sequence in [module for module in net.modules() if isinstance(module, nn.Sequential)]:
        for i, (conv, norm) in enumerate(pairwise(list(sequence))):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and not norm.training:
                sequence[i], sequence[i + 1] = nn.utils.fusion.fuse_conv_bn_eval(conv.eval(), norm), nn.Identity()
    innermost: Any = net.to  # its stub knows no memory format
    result: nn.Module = innermost(memory_format=torch.channels_last)
    return result


def _statistics(net: nn.Module) -> list[Any]:
    return [buffer for name, buffer in net.named_buffers() if not name.endswith("num_batches_tracked")]


def _with_norm(C_in: int, C_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[Any]:
    conv = nn.Conv2d(C_in, C_out, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(C_out)]


def _with_bias(C_in: int, C_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[Any]:
    return [nn.Conv2d(C_in, C_out, kernel, stride, (kernel - 1) // 2, groups=groups)]
