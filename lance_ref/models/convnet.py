"""A small convolutional network for lessons, with images from 8x8 to 32x32."""

from __future__ import annotations

from lance_ref import functional as F
from lance_ref import nn
from lance_ref.engine.tensor import Tensor
from lance_ref.models.initialise import Rng, check_positive_int, source
from lance_ref.models.register import net


class ConvNet(nn.Module):
    """``conv1`` … ``conv3``, each with ReLU, max-pooling after the first two, and ``classifier``."""

    def __init__(self, num_classes: int, in_channels: int, channels: int, rng: Rng) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, rng=rng)
        self.conv2 = nn.Conv2d(channels, 2 * channels, 3, padding=1, rng=rng)
        self.conv3 = nn.Conv2d(2 * channels, 4 * channels, 3, padding=1, rng=rng)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(2)
        self.classifier = nn.Linear(16 * channels, num_classes, rng=rng)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.conv1(x)))  # (B, c, H/2, W/2)
        x = self.maxpool(self.relu(self.conv2(x)))  # (B, 2c, H/4, W/4)
        x = self.relu(self.conv3(x))  # (B, 4c, H/4, W/4)
        return self.classifier(F.flatten(F.adaptive_avg_pool2d(x, 2), 1))  # (B, 16c) to (B, num_classes)

    def stages(self) -> list[nn.Module]:
        """Modules whose composition is ``forward``: each convolution with what follows it, then the head."""
        return [
            nn.Sequential(self.conv1, self.relu, self.maxpool),
            nn.Sequential(self.conv2, self.relu, self.maxpool),
            nn.Sequential(self.conv3, self.relu),
            nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), self.classifier),
        ]


@net("convnet", input_shape=(3, 32, 32), small_shape=(3, 12, 16), options_for=lambda shape: {"in_channels": shape[0]})
def convnet(num_classes: int = 10, in_channels: int = 3, channels: int = 16, rng: Rng = None) -> ConvNet:
    """Three 3x3 convolutions and a linear classifier, without batch norm, for images (B, in_channels, H, W).

    Parameters
    ----------
    channels : int
        Of the first convolution; the second and third have twice and four times as many.
    rng
        See :mod:`lance_ref.models`; the initialisation is PyTorch's default.

    Notes
    -----
    H and W are at least 4. The last maps are averaged to 2x2, so that the classifier sees roughly where a
    feature is. With the defaults a forward pass takes 177,664 multiply-adds for an 8x8
    image, and 16 times the convolutions' share of that for a 32x32 image.
    """
    check_positive_int("num_classes", num_classes)
    check_positive_int("in_channels", in_channels)
    check_positive_int("channels", channels)
    return ConvNet(num_classes, in_channels, channels, source(rng))
