"""Networks by name, laid out and named as in torchvision where they come from there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lance_ref.models.convnet import ConvNet, convnet
from lance_ref.models.mlp import MLP, mlp
from lance_ref.models.mobilenetv2 import MobileNetV2, mobilenetv2
from lance_ref.models.pretrained import PRETRAINED, Weights, preprocess
from lance_ref.models.resnet import ResNet, resnet18, resnet34
from lance_ref.nn.module import Module

_FACTORIES: dict[str, Callable[..., Module]] = {
    "convnet": convnet,
    "mlp": mlp,
    "mobilenetv2": mobilenetv2,
    "resnet18": resnet18,
    "resnet34": resnet34,
}


def names() -> list[str]:
    """The names that :func:`create` takes, in alphabetical order."""
    return sorted(_FACTORIES)


def create(name: str, **options: Any) -> Module:
    """A network by name.

    Parameters
    ----------
    name : str
        One of :func:`names`.
    **options
        The arguments of the function of that name, e.g. ``num_classes=10``.

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
    if name not in _FACTORIES:
        raise ValueError(f"unknown model {name!r}, expected one of {', '.join(names())}")
    return _FACTORIES[name](**options)


__all__ = [
    "MLP",
    "PRETRAINED",
    "ConvNet",
    "MobileNetV2",
    "ResNet",
    "Weights",
    "convnet",
    "create",
    "mlp",
    "mobilenetv2",
    "names",
    "preprocess",
    "resnet18",
    "resnet34",
]
