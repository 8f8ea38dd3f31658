"""MobileNetV3-Small (Howard et al., ICCV 2019, arXiv 1905.02244), laid out and named as in torchvision."""

from __future__ import annotations

from typing import NamedTuple

from lance_ref import functional as F
from lance_ref import nn
from lance_ref.engine.tensor import Tensor
from lance_ref.models.initialise import Rng, check_positive, check_positive_int, kaiming_conv, normal_weight, source
from lance_ref.models.mobilenetv2 import divisible
from lance_ref.models.register import SMALL_IMAGE, net

EPS, MOMENTUM = 1e-3, 0.01
"""The settings of every batch norm: TensorFlow's choices, which torchvision took over."""

FIRST_CHANNELS = 16
LAST_WIDTH = 1024
"""The width of the hidden layer of the classifier."""


class Block(NamedTuple):
    """One row of Table 2 of the paper; channels at width 1."""

    kernel_size: int
    hidden: int
    C_out: int
    squeeze: bool
    hardswish: bool
    stride: int


SMALL = (
    Block(3, 16, 16, True, False, 2),
    Block(3, 72, 24, False, False, 2),
    Block(3, 88, 24, False, False, 1),
    Block(5, 96, 40, True, True, 2),
    Block(5, 240, 40, True, True, 1),
    Block(5, 240, 40, True, True, 1),
    Block(5, 120, 48, True, True, 1),
    Block(5, 144, 48, True, True, 1),
    Block(5, 288, 96, True, True, 2),
    Block(5, 576, 96, True, True, 1),
    Block(5, 576, 96, True, True, 1),
)


class SqueezeExcitation(nn.Module):
    """x · hardsigmoid(fc2(relu(fc1(mean of x)))), one factor for each channel (Hu et al., CVPR 2018)."""

    def __init__(self, channels: int, rng: Rng) -> None:
        super().__init__()
        squeezed = divisible(channels // 4)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = kaiming_conv(channels, squeezed, 1, 1, rng, bias=True)
        self.relu = nn.ReLU()
        self.fc2 = kaiming_conv(squeezed, channels, 1, 1, rng, bias=True)
        self.scale_activation = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale_activation(self.fc2(self.relu(self.fc1(self.avgpool(x)))))  # (B, C, 1, 1)
        return scale * x


class InvertedResidual(nn.Module):
    """x + project(squeeze(depthwise(expand(x)))); the addition only where shapes allow it.

    Parameters
    ----------
    block : Block
        Its channels as they are to be, already scaled. Without more channels there is no expansion.
    """

    def __init__(self, C_in: int, block: Block, rng: Rng) -> None:
        super().__init__()
        hidden = block.hidden
        self.use_res_connect = block.stride == 1 and C_in == block.C_out
        activation = nn.Hardswish if block.hardswish else nn.ReLU
        layers: list[nn.Module] = []
        if hidden != C_in:
            layers.append(_conv_bn(C_in, hidden, 1, 1, 1, activation, rng))
        layers.append(_conv_bn(hidden, hidden, block.kernel_size, block.stride, hidden, activation, rng))
        if block.squeeze:
            layers.append(SqueezeExcitation(hidden, rng))
        layers.append(_conv_bn(hidden, block.C_out, 1, 1, 1, None, rng))
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x)  # (B, C_out, H/stride, W/stride)
        return out + x if self.use_res_connect else out


class MobileNetV3(nn.Module):
    """``features.0`` … ``features.12``, ``avgpool`` and ``classifier``; see :func:`mobilenetv3_small`."""

    def __init__(self, num_classes: int, width: float, dropout: float, rng: Rng) -> None:
        super().__init__()
        C_in = divisible(FIRST_CHANNELS * width)
        layers: list[nn.Module] = [_conv_bn(3, C_in, 3, 2, 1, nn.Hardswish, rng)]
        for row in SMALL:
            block = row._replace(hidden=divisible(row.hidden * width), C_out=divisible(row.C_out * width))
            layers.append(InvertedResidual(C_in, block, rng))
            C_in = block.C_out
        layers.append(_conv_bn(C_in, 6 * C_in, 1, 1, 1, nn.Hardswish, rng))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        last = divisible(LAST_WIDTH * width)
        self.classifier = nn.Sequential(
            normal_weight(nn.Linear(6 * C_in, last, rng=rng), 0.01, rng),
            nn.Hardswish(),
            nn.Dropout(dropout, rng),
            normal_weight(nn.Linear(last, num_classes, rng=rng), 0.01, rng),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)  # (B, 576, H/32, W/32)
        return self.classifier(F.flatten(self.avgpool(x), 1))  # (B, num_classes)

    def stages(self) -> list[nn.Module]:
        """Modules whose composition is ``forward``: each of ``features``, then the classifier."""
        return [*self.features, nn.Sequential(self.avgpool, nn.Flatten(), self.classifier)]


@net("mobilenetv3-small", small_shape=SMALL_IMAGE, has_widths=True)
def mobilenetv3_small(
    num_classes: int = 1000, width: float = 1.0, dropout: float = 0.2, rng: Rng = None
) -> MobileNetV3:
    """MobileNetV3-Small for RGB images (B, 3, H, W), H and W multiples of 32 by custom.

    Parameters
    ----------
    width : float
        Multiplies all channel counts, which are then rounded to multiples of 8.
    dropout : float
        Probability before the last layer.

    Notes
    -----
    Convolutions start from N(0, 2 / (C_out/groups · k_h · k_w)) and bias 0, linear layers from N(0, 0.01²) and
    bias 0. torchvision leaves ``groups`` out of the former.

    The two 1x1 convolutions of a squeeze see one pixel for each channel, B·C numbers; :func:`lance_ref.tune` counts
    them as layers like any other.
    """
    check_positive_int("num_classes", num_classes)
    check_positive("width", width)
    return MobileNetV3(num_classes, width, dropout, source(rng))


def _conv_bn(
    C_in: int, C_out: int, kernel_size: int, stride: int, groups: int, activation: type[nn.Module] | None, rng: Rng
) -> nn.Sequential:
    """``0`` convolution without bias, ``1`` batch norm, ``2`` the activation if there is one."""
    conv = kaiming_conv(C_in, C_out, kernel_size, stride, rng, groups=groups)
    return nn.Sequential(conv, nn.BatchNorm2d(C_out, EPS, MOMENTUM), *([activation()] if activation else []))
