"""What a step is to do, and what the compiler chose: all that a prediction needs besides the trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LayerRanks = tuple[int | None, ...]
"""Directions kept of channels (or features), height and width of one image; None for a mode left alone."""


@dataclass(frozen=True)
class DeviceSettings:
    """How a step trains.

    Attributes
    ----------
    ranks : mapping of layer path to LayerRanks
        Layers that keep a core; other layers whose weight trains keep their input.
    in_subspace : bool
        Whether D trains, in W = W_0 + D U^T, where it has fewer directions than the weight has input channels.
    adds_up : bool
        Whether gradients are added up over a batch of images.
    momentum : bool
        Whether the optimiser has a velocity.
    pixels : bool
        Whether an image is stored as bytes rather than as numbers.
    """

    ranks: Mapping[str, LayerRanks] = field(default_factory=dict)
    in_subspace: bool = True
    adds_up: bool = True
    momentum: bool = False
    pixels: bool = True


@dataclass(frozen=True)
class Choices:
    """What the compiler was free to choose.

    Attributes
    ----------
    heads : tuple of bool
        For each convolution that mixes channels, in order, whether it makes channels (a head) or uses them up (a tail).
    tiled : int
        How many segments, from the first, run tile by tile.
    tile : pair of int
        Height and width of a tile of the last of these.
    merged : frozenset of str
        Layers whose D is merged into the weight before a product; of the others it is a product of its own.
    """

    heads: tuple[bool, ...]
    tiled: int = 0
    tile: tuple[int, int] = (0, 0)
    merged: frozenset[str] = frozenset()
