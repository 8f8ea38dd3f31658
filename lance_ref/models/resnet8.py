"""ResNet-8, the image-classification network of MLPerf Tiny (Banbury et al., 2021, arXiv 2106.07597)."""

from __future__ import annotations

import os

from lance_ref import functional as F
from lance_ref import nn
from lance_ref.datasets.pixels import preprocess_resnet8
from lance_ref.engine.tensor import Tensor
from lance_ref.models.initialise import Rng, check_positive_int, kaiming_fan_out, source
from lance_ref.models.pretrained import load_plain
from lance_ref.models.register import Weights, net

CHANNELS = (16, 32, 64)
EPS = 1e-3
"""Added to the variance by every batch norm; Keras's default, not PyTorch's."""


class Stem(nn.Module):
    """relu(bn(conv(x)))"""

    def __init__(self, C_out: int, rng: Rng) -> None:
        super().__init__()
        self.conv = _conv(3, C_out, 3, 1, rng)
        self.bn = nn.BatchNorm2d(C_out, EPS)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class Stack(nn.Module):
    """relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x)))))); the shortcut, where shapes change, has no batch norm."""

    def __init__(self, C_in: int, C_out: int, stride: int, rng: Rng) -> None:
        super().__init__()
        self.conv1 = _conv(C_in, C_out, 3, stride, rng)
        self.bn1 = nn.BatchNorm2d(C_out, EPS)
        self.relu = nn.ReLU()
        self.conv2 = _conv(C_out, C_out, 3, 1, rng)
        self.bn2 = nn.BatchNorm2d(C_out, EPS)
        self.has_shortcut = stride != 1 or C_in != C_out
        if self.has_shortcut:
            self.shortcut = _conv(C_in, C_out, 1, stride, rng)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self._residual(x) + (self.shortcut(x) if self.has_shortcut else x))

    def _residual(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(out))


class ResNet8(nn.Module):
    """``stem`` (``conv bn``), ``stacks.0`` … ``stacks.2`` and ``classifier``; see :func:`resnet8`."""

    def __init__(self, num_classes: int, rng: Rng) -> None:
        super().__init__()
        self.stem = Stem(CHANNELS[0], rng)
        self.stacks = nn.Sequential(
            Stack(CHANNELS[0], CHANNELS[0], 1, rng),
            Stack(CHANNELS[0], CHANNELS[1], 2, rng),
            Stack(CHANNELS[1], CHANNELS[2], 2, rng),
        )
        self.classifier = nn.Linear(CHANNELS[2], num_classes, rng=rng)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stacks(self.stem(x))  # (B, 64, H/4, W/4)
        return self.classifier(F.flatten(F.adaptive_avg_pool2d(x, 1), 1))  # (B, num_classes)

    def stages(self) -> list[nn.Module]:
        """Modules whose composition is ``forward``: stem, each stack, head."""
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), self.classifier)
        return [self.stem, *self.stacks, head]


@net(
    "resnet8",
    input_shape=(3, 32, 32),
    small_shape=(3, 24, 32),
    preprocess=preprocess_resnet8,
    weights=Weights(
        "weights/mlperf_tiny_resnet8.npz",
        "a2671cef025ceaeb54c1c3564402b7c0486dfd33ffa19e7e41e136928a75f0d5",
        "c40ca12be6ab36f652b0703d9eac30a9f49af3f3dac63db40a2371b3421475d5",
        32,
        "pretrainedResnet.h5 of github.com/mlcommons/tiny, Apache-2.0; trained on CIFAR-10",
        (10,),
    ),
)
def resnet8(num_classes: int = 10, pretrained: bool | str | os.PathLike[str] | None = None, rng: Rng = None) -> ResNet8:
    """ResNet-8 for RGB images (B, 3, 32, 32), with TensorFlow's "same" padding; options as in :mod:`lance_ref.models`.

    Its pretrained weights are those of CIFAR-10, and take raw pixels 0..255.

    Notes
    -----
    Without weights, convolutions start from N(0, 2 / (C_out · k_h · k_w)), biases and the classifier
    from PyTorch's default.
    """
    check_positive_int("num_classes", num_classes)
    net = ResNet8(num_classes, source(rng))
    load_plain(net, "resnet8", pretrained)
    return net


def _conv(C_in: int, C_out: int, kernel_size: int, stride: int, rng: Rng) -> nn.Conv2d:
    return kaiming_fan_out(nn.Conv2d(C_in, C_out, kernel_size, stride, "same", rng=rng), rng)
