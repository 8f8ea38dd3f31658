"""Directions of the layers that train: how many, and random ones, for a program's sizes depend on shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from analysis.device.check import step_trace
from analysis.device.choices import LayerRanks
from lance_ref.algebra.subspace import Subspace
from lance_ref.nn.module import Module

Shapes = Mapping[str, tuple[int, ...]]


def input_shapes(net: Module, input_shape: tuple[int, ...], layers: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shape of the input of each of these layers, for one image, the batch of one first."""
    wanted = set(layers)
    records = [r for r in step_trace(net, input_shape).records if r.path in wanted and r.op in ("conv2d", "linear")]
    return {record.path: (1, *record.inputs[0].shape[1:]) for record in records}


def channel_directions(shapes: Shapes, count: int) -> dict[str, LayerRanks]:
    """That many directions of the channels (or features) alone; a layer that has no more keeps its input as it is.

    Mean-free directions leave the mean's out, so that of n channels at most n - 1 are there.

    >>> channel_directions({"a": (1, 16, 4, 4), "b": (1, 8, 4, 4), "c": (1, 90)}, 8)
    {'a': (8, None, None), 'c': (8,)}
    """
    return {path: (count, *[None] * (len(of) - 2)) for path, of in shapes.items() if count < of[1]}


def random_subspaces(shapes: Shapes, ranks: Mapping[str, LayerRanks]) -> dict[str, Subspace]:
    """Orthonormal directions of these ranks; no direction of the batch."""
    rng = np.random.default_rng(0)
    return {path: Subspace.random(shapes[path], (None, *of), rng) for path, of in ranks.items()}
