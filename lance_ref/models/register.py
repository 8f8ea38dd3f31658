"""The register of networks: what each is made by, made for, and was trained on.

A network is written in two places: its own file, in which :func:`net` stands above the function that makes it, and a
line in this package's ``__init__``. Another package registers its networks in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from lance_ref.datasets.pixels import scale_to_one
from lance_ref.engine.tensor import Shape
from lance_ref.io import plugins
from lance_ref.nn.module import Module

SMALL_IMAGE = (3, 36, 72)
"""Leaves the last layers of a net for 224 pixels a map of 2 x 3 places."""

Maker = TypeVar("Maker", bound=Callable[..., Module])


@dataclass(frozen=True)
class Weights:
    """A file of pretrained weights."""

    file: str  #: Relative to the folder of data.
    sha256: str  #: Of the file.
    arrays_sha256: str  #: Of its arrays (:func:`~lance_ref.io.npz.arrays_digest`), whichever file holds them.
    image_size: int  #: What the network was trained with, in pixels.
    origin: str  #: Where the file's contents come from, and their terms.
    #: Numbers of classes for which the file has the classifier; for others a fresh one is drawn. Default: for none.
    classes: tuple[int, ...] = ()


def _nothing(input_shape: Shape) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Net:
    """What the commands must know of a network."""

    #: Takes ``num_classes`` and, like all options, by name: ``rng``, and ``pretrained`` where there are weights.
    make: Callable[..., Module]
    #: One input that it is made for, without the batch. Default: an RGB image of 224 pixels.
    input_shape: Shape = (3, 224, 224)
    #: What trains where nobody says otherwise, as for :func:`lance_ref.tune`. Default: the last four layers.
    tune: str = "last:4"
    #: From uint8 pixels to the input. Default: pixel / 255.
    preprocess: Callable[[np.ndarray], np.ndarray] = scale_to_one
    weights: Weights | None = None  #: Its pretrained weights. Default: none.
    #: From the shape of one input to the options of ``make`` that depend on it. Default: no option does.
    options_for: Callable[[Shape], Mapping[str, Any]] = _nothing
    #: Whether ``make`` takes ``width=``, a factor of all channels, written ``name@0.35``. Default: it does not.
    has_widths: bool = False
    #: A smaller input that it takes too, with other height than width if it can: the validation runs it on that.
    #: Default: ``input_shape``.
    small_shape: Shape = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "small_shape", self.small_shape or self.input_shape)

    @property
    def image_size(self) -> int | None:
        """Pixels of the images that the pretrained weights were trained on; None without weights."""
        return None if self.weights is None else self.weights.image_size


NETS: dict[str, Net] = {}
"""Every network by its name on the command line."""


def net(name: str, **spec: Any) -> Callable[[Maker], Maker]:
    """Register the function below as the one that makes a network; ``spec`` are the other fields of :class:`Net`.

    Raises
    ------
    ValueError
        If there is a network of that name already, or the name cannot be typed on a command line.

    Examples
    --------
    >>> @net("tiny", input_shape=(4,))
    ... def tiny(num_classes=2, rng=None):
    ...     from lance_ref import nn
    ...     return nn.Sequential(nn.Linear(4, num_classes, rng=rng))
    >>> NETS.pop("tiny").input_shape
    (4,)
    """
    if name in NETS:
        raise ValueError(f"there is a network named {name!r} already")
    if not name or set(name) & set(":@. /\\") or name.startswith("-"):
        raise ValueError(f"name is {name!r}, expected letters, digits, '-' and '_'")

    def register(make: Maker) -> Maker:
        NETS[name] = Net(make, **spec)
        return make

    return register


def find(name: str) -> Net:
    """The network of that name; where it is not there, plug-ins are loaded.

    Raises
    ------
    ValueError
        If there is none.
    ImportError
        If a plug-in cannot be imported.
    """
    if name not in NETS:
        plugins.load_plugins()
    if name not in NETS:
        raise ValueError(f"unknown model {name!r}, expected one of {', '.join(sorted(NETS))}")
    return NETS[name]
