"""MCUNet (Lin et al., NeurIPS 2020, arXiv 2007.10319): the searched ImageNet model for 5 frames a second.

The layout is that of the deployed 8-bit model, with batch norm folded into the convolutions, which
therefore have biases. 128-pixel images, 630,224 parameters with 1000 classes.
"""

from __future__ import annotations

import os

from lance_ref import functional as F
from lance_ref import nn
from lance_ref.datasets.pixels import preprocess_mcunet
from lance_ref.engine.tensor import Tensor
from lance_ref.models.initialise import Rng, check_positive_int, kaiming_conv, source
from lance_ref.models.pretrained import load_plain
from lance_ref.models.register import SMALL_IMAGE, Weights, net

FIRST_CHANNELS = 16

BLOCKS = (
    # expansion, channels out, stride, kernel of the depthwise convolution
    (1, 8, 1, 3),
    (4, 16, 2, 3),
    (3, 16, 1, 3),
    (3, 24, 2, 7),
    (5, 24, 1, 3),
    (5, 40, 2, 3),
    (4, 40, 1, 7),
    (4, 48, 1, 5),
    (3, 48, 1, 3),
    (4, 48, 1, 3),
    (5, 96, 2, 7),
    (4, 96, 1, 5),
    (4, 96, 1, 5),
    (6, 160, 1, 3),
)


class MCUBlock(nn.Module):
    """x + project(relu6(depthwise(relu6(expand(x))))); the addition only where shapes allow it.

    Parameters
    ----------
    stride : {1, 2}
        Of the depthwise convolution.
    expand_ratio : int
        Hidden channels = C_in · expand_ratio; 1 leaves the expansion out.
    kernel_size : int
        Of the depthwise convolution, odd.
    """

    def __init__(self, C_in: int, C_out: int, stride: int, expand_ratio: int, kernel_size: int, rng: Rng) -> None:
        super().__init__()
        hidden = C_in * expand_ratio
        self.use_res_connect = stride == 1 and C_in == C_out
        self.has_expand = expand_ratio != 1
        if self.has_expand:
            self.expand = kaiming_conv(C_in, hidden, 1, 1, rng, bias=True)
        self.depthwise = kaiming_conv(hidden, hidden, kernel_size, stride, rng, groups=hidden, bias=True)
        self.project = kaiming_conv(hidden, C_out, 1, 1, rng, bias=True)
        self.relu6 = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        # (B, hidden, H, W) twice, without names: each is given back as soon as it has been used
        out = self.project(self.relu6(self.depthwise(self.relu6(self.expand(x)) if self.has_expand else x)))
        return x + out if self.use_res_connect else out  # (B, C_out, H/stride, W/stride)


class MCUNet(nn.Module):
    """``first_conv relu6 blocks.0`` … ``blocks.13 classifier``; see :func:`mcunet`."""

    def __init__(self, num_classes: int, rng: Rng) -> None:
        super().__init__()
        self.first_conv = kaiming_conv(3, FIRST_CHANNELS, 3, 2, rng, bias=True)
        self.relu6 = nn.ReLU6()
        blocks = []
        C_in = FIRST_CHANNELS
        for expand_ratio, C_out, stride, kernel_size in BLOCKS:
            blocks.append(MCUBlock(C_in, C_out, stride, expand_ratio, kernel_size, rng))
            C_in = C_out
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(C_in, num_classes, rng=rng)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu6(self.first_conv(x))  # (B, 16, H/2, W/2)
        x = self.blocks(x)  # (B, 160, H/32, W/32)
        return self.classifier(F.flatten(F.adaptive_avg_pool2d(x, 1), 1))  # (B, num_classes)

    def stages(self) -> list[nn.Module]:
        """Modules whose composition is ``forward``: first convolution, each block, head."""
        stem = nn.Sequential(self.first_conv, self.relu6)
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), self.classifier)
        return [stem, *self.blocks, head]


@net(
    "mcunet",
    input_shape=(3, 128, 128),
    small_shape=SMALL_IMAGE,
    preprocess=preprocess_mcunet,
    weights=Weights(
        "weights/imagenet_mcunet_5fps.npz",
        "bd0f0d6d54a04bbaf745432e91e5d678849a54198e47655c76423738671435a2",
        "4c681c100fcf29c0239495cafded767de7589a95dcaa90fe15d1f98c13dd37ae",
        128,
        "MCUNet-5fps of github.com/mit-han-lab/tiny-training, MIT, dequantised from 8 bits; trained on ImageNet",
        (1000,),
    ),
)
def mcunet(num_classes: int = 1000, pretrained: bool | str | os.PathLike[str] | None = None, rng: Rng = None) -> MCUNet:
    """MCUNet-5fps for RGB images (B, 3, H, W), 128x128 by custom; options as in :mod:`lance_ref.models`.

    Notes
    -----
    Without weights, convolutions start from N(0, 2 / (C_out/groups · k_h · k_w)) and bias 0, the
    classifier from PyTorch's default. There is no batch norm, so training from scratch is delicate.
    """
    check_positive_int("num_classes", num_classes)
    net = MCUNet(num_classes, source(rng))
    load_plain(net, "mcunet", pretrained)
    return net
