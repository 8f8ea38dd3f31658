"""What a layer that trains keeps, and the sizes that follow from its ranks: in numbers, not in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from analysis.device.choices import DeviceSettings
from analysis.device.operations import Map, Network, Operation, Weights


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer of one image's step.

    Attributes
    ----------
    weights : Weights
    source, output : (C, H, W)
        Of whole maps.
    channels, height, width : int or None
        Directions of its input that the core has; None for a mode left alone, in all three if there is no core.
    in_subspace : bool
        Whether its weight trains as D.
    at_once : bool
        Whether it is a head or a tail with one group, which takes its whole core for the weight gradient.
    """

    weights: Weights
    source: Map
    output: Map
    channels: int | None = None
    height: int | None = None
    width: int | None = None
    in_subspace: bool = False
    at_once: bool = False

    @property
    def has_core(self) -> bool:
        """Whether it keeps a projection of its input rather than the input."""
        return (self.channels, self.height, self.width) != (None, None, None)

    @property
    def has_places_projected(self) -> bool:
        """Whether height or width are projected."""
        return (self.height, self.width) != (None, None)

    @property
    def core(self) -> Map:
        """(channels, height, width) of the core; a core of vectors has one place."""
        C, H, W = self.source
        if self.weights.is_linear and self.channels is not None:
            return self.channels, 1, 1
        return self.channels or C, self.height or H, self.width or W

    @property
    def half(self) -> int:
        """Numbers of a channel of which either height or width is projected, the larger of the two."""
        (_, H, W), (_, h, w) = self.source, self.core
        return max(h * W, H * w)

    @property
    def kernel_of_change(self) -> int:
        """Places of the kernels of D."""
        return 1 if self.weights.is_linear else self.weights.places

    @property
    def change(self) -> int:
        """Numbers of D: a kernel for each output channel and direction."""
        return self.weights.outputs * (self.channels or 0) * self.kernel_of_change

    @property
    def projected(self) -> int:
        """Numbers of U^T x, and of D^T g: a map, or for a linear layer a number, for each direction."""
        _, H, W = self.source
        return (self.channels or 0) * (1 if self.weights.is_linear else H * W)


def layer(net: Network, operation: Operation, settings: DeviceSettings, is_end: bool) -> Layer:
    """The layer of an operation with weights; ``is_end`` says whether it is the head or the tail of its segment."""
    weights = operation.weights
    assert weights is not None
    ranks = settings.ranks.get(operation.path, ()) if weights.trains else ()
    channels, height, width = (*ranks, None, None, None)[:3]
    source = net.maps[operation.inputs[0]]
    fewer = channels is not None and weights.groups == 1 and channels < _features(weights, source)
    return Layer(
        weights, source, net.maps[operation.output], channels, height, width,
        settings.in_subspace and fewer, is_end and weights.groups == 1,
    )  # fmt: skip


def _features(weights: Weights, source: Map) -> int:
    """What the first factor projects: channels, or all numbers of the input of a linear layer."""
    C, H, W = source
    return C * H * W if weights.is_linear else C
