"""Networks by name, laid out and named as in torchvision where they come from there.

Each function that makes a network takes ``rng``, the seed or the generator of the initial weights and of dropout masks
(by default the library's generator), and raises ValueError for an option that is out of range.

``pretrained=True`` reads the weights of :data:`PRETRAINED` from the folder of data (``LANCE_REF_DATA``) and checks
their SHA-256; a path reads a file of the same layout. The classifier is loaded where the numbers of classes agree;
otherwise a fresh one stays. FileNotFoundError says that the weights are not there, ValueError that they do not fit.
:func:`preprocessing` prepares the pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lance_ref.datasets.pixels import preprocess
from lance_ref.io import plugins
from lance_ref.models.alexnet_cl import AlexNetCL, alexnet_cl
from lance_ref.models.convnet import ConvNet, convnet
from lance_ref.models.deit import DeiT, deit_small, deit_tiny
from lance_ref.models.mcunet import MCUNet, mcunet
from lance_ref.models.mlp import MLP, mlp
from lance_ref.models.mobilenetv2 import MobileNetV2, mobilenetv2
from lance_ref.models.mobilenetv3 import MobileNetV3, mobilenetv3_small
from lance_ref.models.register import NETS, Net, Weights, find, net
from lance_ref.models.resnet import ResNet, resnet18, resnet34, resnet50
from lance_ref.models.resnet8 import ResNet8, resnet8
from lance_ref.nn.module import Module

PRETRAINED: dict[str, Weights] = {name: of.weights for name, of in NETS.items() if of.weights is not None}
"""Files of pretrained weights by name of the network, for those of this package."""


def names() -> list[str]:
    """The names that :func:`create` takes, in alphabetical order, those of plug-ins included.

    Raises
    ------
    ImportError
        If a plug-in cannot be imported (:mod:`lance_ref.io.plugins`).
    """
    plugins.load_plugins()
    return sorted(NETS)


def create(name: str, **options: Any) -> Module:
    """A network by name, one of :func:`names`, with the options of its own function, e.g. ``num_classes=10``.

    Raises
    ------
    ValueError
        If there is no such network, or an option is out of range.
    TypeError
        If the network has no such option.

    Examples
    --------
    >>> create("mlp", in_features=64, hidden=(32,)).classifier.weight.shape
    (10, 32)
    """
    return find(name).make(**options)


def preprocessing(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """What turns pixels into the input of a network, for ``normalise=`` of :func:`lance_ref.datasets.batches`.

    It takes uint8 (B, H, W, C) to float32 (B, C, H, W). Networks with pretrained weights get what these were trained
    on, RGB alone: (pixel − 128) / 128 for ``mobilenetv2``, (pixel − 127.5) · 2 / 255 for ``mcunet``, the pixel itself
    for ``resnet8``. The others expect nothing in particular and get pixel / 255, grey or RGB.

    Examples
    --------
    >>> preprocessing("mcunet")(np.full((1, 1, 1, 3), 255, np.uint8)).ravel().tolist()
    [1.0, 1.0, 1.0]
    """
    return find(name).preprocess


__all__ = [
    "MLP",
    "NETS",
    "PRETRAINED",
    "AlexNetCL",
    "ConvNet",
    "DeiT",
    "MCUNet",
    "MobileNetV2",
    "MobileNetV3",
    "Net",
    "ResNet",
    "ResNet8",
    "Weights",
    "alexnet_cl",
    "convnet",
    "create",
    "deit_small",
    "deit_tiny",
    "find",
    "mcunet",
    "mlp",
    "mobilenetv2",
    "mobilenetv3_small",
    "names",
    "net",
    "preprocess",
    "preprocessing",
    "resnet8",
    "resnet18",
    "resnet34",
    "resnet50",
]
