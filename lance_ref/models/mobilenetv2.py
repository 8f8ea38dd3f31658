"""MobileNetV2 (Sandler et al., CVPR 2018, arXiv 1801.04381), laid out and named as in torchvision."""

from __future__ import annotations

import os

from lance_ref import functional as F
from lance_ref import nn
from lance_ref.datasets.pixels import preprocess
from lance_ref.engine.tensor import Tensor
from lance_ref.models.initialise import Rng, check_positive, check_positive_int, kaiming_conv, source
from lance_ref.models.pretrained import load_mobilenetv2
from lance_ref.models.register import SMALL_IMAGE, Weights, net

STAGES = (
    # expansion t, channels c, blocks n, stride s of the first block (Table 2)
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class ConvBNReLU6(nn.Sequential):
    """``0`` convolution without bias, ``1`` batch norm, ``2`` ReLU6."""

    def __init__(
        self, C_in: int, C_out: int, kernel_size: int, stride: int, groups: int, padding: str, rng: Rng
    ) -> None:
        super().__init__(
            kaiming_conv(C_in, C_out, kernel_size, stride, rng, groups=groups, same=padding == "same"),
            nn.BatchNorm2d(C_out),
            nn.ReLU6(),
        )


class InvertedResidual(nn.Module):
    """x + project(depthwise(expand(x))); the addition only where shapes allow it.

    Parameters
    ----------
    stride : {1, 2}
        Of the depthwise convolution.
    expand_ratio : int
        Hidden channels = C_in · expand_ratio; 1 leaves the expansion out.
    padding : {"symmetric", "same"}
    """

    def __init__(self, C_in: int, C_out: int, stride: int, expand_ratio: int, padding: str, rng: Rng) -> None:
        super().__init__()
        hidden = C_in * expand_ratio
        self.use_res_connect = stride == 1 and C_in == C_out
        expand = [ConvBNReLU6(C_in, hidden, 1, 1, 1, padding, rng)] if expand_ratio != 1 else []
        self.conv = nn.Sequential(
            *expand,
            ConvBNReLU6(hidden, hidden, 3, stride, hidden, padding, rng),
            kaiming_conv(hidden, C_out, 1, 1, rng, same=padding == "same"),
            nn.BatchNorm2d(C_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class MobileNetV2(nn.Module):
    """``features.0`` … ``features.18`` and ``classifier`` (``0`` dropout, ``1`` linear)."""

    def __init__(self, num_classes: int, width: float, dropout: float, padding: str, rng: Rng) -> None:
        super().__init__()
        self.padding = padding
        C_in = divisible(32 * width)
        last = divisible(1280 * max(1.0, width))
        layers: list[nn.Module] = [ConvBNReLU6(3, C_in, 3, 2, 1, padding, rng)]
        for t, c, n, s in STAGES:
            C_out = divisible(c * width)
            for block in range(n):
                layers.append(InvertedResidual(C_in, C_out, s if block == 0 else 1, t, padding, rng))
                C_in = C_out
        layers.append(ConvBNReLU6(C_in, last, 1, 1, 1, padding, rng))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(dropout, rng), nn.Linear(last, num_classes, rng=rng))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)  # (B, 1280, H/32, W/32)
        x = F.flatten(F.adaptive_avg_pool2d(x, 1), 1)  # (B, 1280)
        return self.classifier(x)  # (B, num_classes)

    def stages(self) -> list[nn.Module]:
        """Modules whose composition is ``forward``: each of ``features``, then the head."""
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), self.classifier)
        return [*self.features, head]


@net(
    "mobilenetv2",
    small_shape=SMALL_IMAGE,
    preprocess=preprocess,
    has_widths=True,
    weights=Weights(
        "weights/imagenet_mobilenet_v2_1.0_224.npz",
        "5aadcf25572a7692c015f73c60d3e4c36b985cf57977146c9f42c2ef440084d4",
        "d8f469c0a9851df5c76701e10e7ffcef55e61a401168f7821af79b4fc6cb4c36",
        224,
        "mobilenet_v2_1.0_224_quant.tflite of github.com/google-coral/test_data, Apache-2.0; trained on ImageNet",
        (1000, 1001),
    ),
)
def mobilenetv2(
    num_classes: int = 1000,
    width: float = 1.0,
    dropout: float = 0.2,
    padding: str | None = None,
    pretrained: bool | str | os.PathLike[str] | None = None,
    rng: Rng = None,
) -> MobileNetV2:
    """MobileNetV2 for RGB images (B, 3, H, W), H and W multiples of 32 by custom.

    Parameters
    ----------
    width : float
        Multiplies all channel counts, which are then rounded to multiples of 8.
    dropout : float
        Probability before the classifier.
    padding : {"symmetric", "same"}, optional
        Of the 3x3 convolutions. ``"symmetric"`` is 1 on every side (torchvision); ``"same"`` is
        TensorFlow's, asymmetric at stride 2. By default what the weights need: ``"same"`` for
        pretrained ones, ``"symmetric"`` otherwise.
    pretrained, rng
        See :mod:`lance_ref.models`. The classifier of the weights has 1001 outputs (output 0 is "background", output k
        is ImageNet class k − 1), which are loaded for 1001 classes and, without the background, for 1000.

    Notes
    -----
    Convolutions start from N(0, 2 / (C_out/groups · k_h · k_w)), the classifier from PyTorch's default.
    """
    check_positive_int("num_classes", num_classes)
    check_positive("width", width)
    if padding not in (None, "symmetric", "same"):
        raise ValueError(f"padding is {padding!r}, expected 'symmetric' or 'same'")
    wanted = pretrained is not None and pretrained is not False
    path = None if isinstance(pretrained, bool) else pretrained
    if wanted and padding == "symmetric":
        raise ValueError("padding is 'symmetric', but the pretrained weights were trained with 'same'")
    if wanted and width != 1:
        raise ValueError(f"width is {width}, but the pretrained weights are for width 1.0")
    net = MobileNetV2(num_classes, width, dropout, padding or ("same" if wanted else "symmetric"), source(rng))
    if wanted:
        load_mobilenetv2(net, path)
    return net


def divisible(channels: float, divisor: int = 8) -> int:
    """The multiple of ``divisor`` next to ``channels``, but never more than 10 % below it.

    >>> divisible(32 * 0.35), divisible(24 * 0.75)
    (16, 24)
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor
