"""ResNet-18, -34 and -50 (He et al., CVPR 2016, arXiv 1512.03385), laid out and named as in torchvision."""

from __future__ import annotations

from collections.abc import Sequence

from lance_ref import functional as F
from lance_ref import nn
from lance_ref.engine.tensor import Tensor
from lance_ref.models.initialise import Rng, check_positive_int, kaiming_conv, source
from lance_ref.models.register import SMALL_IMAGE, net


class Block(nn.Module):
    """relu(shortcut(x) + residual(x)); the shortcut is a 1x1 convolution with batch norm where shapes change."""

    relu: nn.ReLU

    def _add_downsample(self, C_in: int, C_out: int, stride: int, rng: Rng) -> None:
        self.has_downsample = stride != 1 or C_in != C_out
        if self.has_downsample:
            self.downsample = nn.Sequential(kaiming_conv(C_in, C_out, 1, stride, rng), nn.BatchNorm2d(C_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self._residual(x) + (self.downsample(x) if self.has_downsample else x))

    def _residual(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class BasicBlock(Block):
    """relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x))))))"""

    expansion = 1

    def __init__(self, C_in: int, width: int, stride: int, rng: Rng) -> None:
        super().__init__()
        C_out = width
        self.conv1 = kaiming_conv(C_in, C_out, 3, stride, rng)
        self.bn1 = nn.BatchNorm2d(C_out)
        self.relu = nn.ReLU()
        self.conv2 = kaiming_conv(C_out, C_out, 3, 1, rng)
        self.bn2 = nn.BatchNorm2d(C_out)
        self._add_downsample(C_in, C_out, stride, rng)

    def _residual(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(out))


class Bottleneck(Block):
    """relu(shortcut(x) + bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))); 1x1 to ``width``, 3x3, 1x1 to four times.

    The stride is that of the 3x3 convolution, as in torchvision; He et al. have it in the first 1x1.
    """

    expansion = 4

    def __init__(self, C_in: int, width: int, stride: int, rng: Rng) -> None:
        super().__init__()
        C_out = self.expansion * width
        self.conv1 = kaiming_conv(C_in, width, 1, 1, rng)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = kaiming_conv(width, width, 3, stride, rng)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = kaiming_conv(width, C_out, 1, 1, rng)
        self.bn3 = nn.BatchNorm2d(C_out)
        self.relu = nn.ReLU()
        self._add_downsample(C_in, C_out, stride, rng)

    def _residual(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))  # (B, width, H, W)
        out = self.relu(self.bn2(self.conv2(out)))  # (B, width, H/stride, W/stride)
        return self.bn3(self.conv3(out))  # (B, 4·width, H/stride, W/stride)


class ResNet(nn.Module):
    """``conv1 bn1 relu maxpool layer1 layer2 layer3 layer4 avgpool fc``; see :func:`resnet18`.

    Parameters
    ----------
    block : type
        :class:`BasicBlock` or :class:`Bottleneck`.
    blocks : sequence of 4 int
        Blocks in each of the four stages.
    """

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], blocks: Sequence[int], num_classes: int, rng: Rng
    ) -> None:
        super().__init__()
        self.conv1 = kaiming_conv(3, 64, 7, 2, rng)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        C_in = 64
        for stage, (width, count) in enumerate(zip((64, 128, 256, 512), blocks, strict=True), start=1):
            C_out = block.expansion * width
            first = block(C_in, width, 1 if stage == 1 else 2, rng)
            others = [block(C_out, width, 1, rng) for _ in range(count - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(first, *others))
            C_in = C_out
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(C_in, num_classes, rng=rng)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))  # (B, 64, H/4, W/4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, 512·expansion, H/32, W/32)
        return self.fc(F.flatten(self.avgpool(x), 1))  # (B, num_classes)

    def stages(self) -> list[nn.Module]:
        """Modules whose composition is ``forward``: the stem, each block, the head."""
        stem = nn.Sequential(self.conv1, self.bn1, self.relu, self.maxpool)
        head = nn.Sequential(self.avgpool, nn.Flatten(), self.fc)
        return [stem, *self.layer1, *self.layer2, *self.layer3, *self.layer4, head]


@net("resnet18", small_shape=SMALL_IMAGE)
def resnet18(num_classes: int = 1000, rng: Rng = None) -> ResNet:
    """ResNet-18 for RGB images (B, 3, H, W).

    Notes
    -----
    As in torchvision, convolutions start from N(0, 2 / (C_out · k_h · k_w)), the classifier from PyTorch's
    default.
    """
    return _resnet(BasicBlock, (2, 2, 2, 2), num_classes, rng)


@net("resnet34", small_shape=SMALL_IMAGE)
def resnet34(num_classes: int = 1000, rng: Rng = None) -> ResNet:
    """ResNet-34 for RGB images (B, 3, H, W); parameters as for :func:`resnet18`."""
    return _resnet(BasicBlock, (3, 4, 6, 3), num_classes, rng)


@net("resnet50", small_shape=SMALL_IMAGE)
def resnet50(num_classes: int = 1000, rng: Rng = None) -> ResNet:
    """ResNet-50 for RGB images (B, 3, H, W), of bottleneck blocks; parameters as for :func:`resnet18`."""
    return _resnet(Bottleneck, (3, 4, 6, 3), num_classes, rng)


def _resnet(block: type[BasicBlock] | type[Bottleneck], blocks: Sequence[int], num_classes: int, rng: Rng) -> ResNet:
    check_positive_int("num_classes", num_classes)
    return ResNet(block, blocks, num_classes, source(rng))
