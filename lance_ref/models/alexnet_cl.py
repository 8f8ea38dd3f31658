"""The small AlexNet on which gradient projection is compared (Saha et al., GPM, ICLR 2021, arXiv 2103.09762).

Layers, names and sizes are those of the authors' program for Split CIFAR-100; it goes back to Serrà et al.
(HAT, ICML 2018). No layer has a bias, and batch norm keeps no running statistics.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np

from lance_ref import functional as F
from lance_ref import nn
from lance_ref.engine.tensor import Tensor
from lance_ref.models.initialise import Rng, check_positive_int, source
from lance_ref.models.register import net

CONVOLUTIONS = ((64, 4), (128, 3), (256, 2))
"""Channels and kernel size; each is followed by 2x2 max-pooling: maps of 32, 29, 14, 12, 6, 5, 2 pixels."""
WIDTH = 2048


class Heads(nn.Sequential):
    """Linear classifiers ``0``, ``1``, … on the same features, of which ``selected`` runs."""

    def __init__(self, in_features: int, num_classes: int, heads: int, rng: Rng) -> None:
        super().__init__(*(nn.Linear(in_features, num_classes, bias=False, rng=rng) for _ in range(heads)))
        self.selected = 0

    def forward(self, x: Tensor) -> Tensor:
        return self[self.selected](x)


class AlexNetCL(nn.Module):
    """``conv1`` … ``conv3``, ``fc1``, ``fc2`` with ``bn1`` … ``bn5``, and the heads ``fc3.0``, ``fc3.1``, ….

    ``head`` selects the one that runs.
    """

    def __init__(self, num_classes: int, heads: int, rng: Rng) -> None:
        super().__init__()
        C_in = 3
        for i, (C_out, kernel_size) in enumerate(CONVOLUTIONS, start=1):
            self.add_module(f"conv{i}", nn.Conv2d(C_in, C_out, kernel_size, bias=False, rng=rng))
            self.add_module(f"bn{i}", nn.BatchNorm2d(C_out, track_running_stats=False))
            C_in = C_out
        self.maxpool, self.relu = nn.MaxPool2d(2), nn.ReLU()
        self.drop1, self.drop2 = nn.Dropout(0.2, rng), nn.Dropout(0.5, rng)
        self.fc1 = nn.Linear(C_in * 2 * 2, WIDTH, bias=False, rng=rng)
        self.bn4 = nn.BatchNorm1d(WIDTH, track_running_stats=False)
        self.fc2 = nn.Linear(WIDTH, WIDTH, bias=False, rng=rng)
        self.bn5 = nn.BatchNorm1d(WIDTH, track_running_stats=False)
        self.fc3 = Heads(WIDTH, num_classes, heads, rng)

    @property
    def head(self) -> int:
        return self.fc3.selected

    @head.setter
    def head(self, task: Any) -> None:
        count = len(self.fc3)
        if isinstance(task, bool) or not isinstance(task, (int, np.integer)) or not 0 <= task < count:
            raise ValueError(f"head is {task!r}, expected an integer from 0 to {count - 1}, as there are {count} heads")
        self.fc3.selected = int(task)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.drop1(self.relu(self.bn1(self.conv1(x)))))  # (B, 64, 14, 14)
        x = self.maxpool(self.drop1(self.relu(self.bn2(self.conv2(x)))))  # (B, 128, 6, 6)
        x = self.maxpool(self.drop2(self.relu(self.bn3(self.conv3(x)))))  # (B, 256, 2, 2)
        x = self.drop2(self.relu(self.bn4(self.fc1(F.flatten(x, 1)))))  # (B, 1024) to (B, 2048)
        x = self.drop2(self.relu(self.bn5(self.fc2(x))))  # (B, 2048)
        return self.fc3(x)  # (B, num_classes)

    def stages(self) -> list[nn.Module]:
        """Modules whose composition is ``forward``: each layer with what follows it, then the heads.

        The heads come as a whole: the last stage runs the one that is selected at the time.
        """
        drops = (self.drop1, self.drop1, self.drop2)
        stages: list[nn.Module] = [
            _named(self, f"conv{i}", f"bn{i}", relu=self.relu, drop=drop, maxpool=self.maxpool)
            for i, drop in enumerate(drops, start=1)
        ]
        stages.append(nn.Sequential(nn.Flatten(), self.fc1, self.bn4, self.relu, self.drop2))
        return [*stages, nn.Sequential(self.fc2, self.bn5, self.relu, self.drop2), self.fc3]


@net("alexnet-cl", input_shape=(3, 32, 32))
def alexnet_cl(num_classes: int = 10, heads: int = 1, rng: Rng = None) -> AlexNetCL:
    """AlexNet for continual learning, for RGB images (B, 3, 32, 32).

    Parameters
    ----------
    num_classes : int
        Of each head.
    heads : int
        One for each task; ``net.head = t`` selects the one that runs. With 1 the net is an ordinary classifier.
    rng
        See :mod:`lance_ref.models`; the initialisation is PyTorch's default.

    Notes
    -----
    Without running statistics batch norm uses those of the batch in evaluation too, so that the answer for an
    image depends on the others in its batch, and a batch of one image fails in ``bn4``. That is as published.

    With several heads :func:`lance_ref.tune` takes the last one alone for the head, and counts the others as layers.

    Examples
    --------
    >>> net = alexnet_cl(num_classes=10, heads=3, rng=0)
    >>> net.head = 2
    >>> sum(p.size for p in net.parameters()) - 3 * 2048 * 10  # without the heads
    6508416
    """
    check_positive_int("num_classes", num_classes)
    check_positive_int("heads", heads)
    return AlexNetCL(num_classes, heads, source(rng))


def _named(net: nn.Module, *names: str, **others: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict([(name, getattr(net, name)) for name in names] + list(others.items())))
