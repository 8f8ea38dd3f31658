"""Normalisation within one sample, as layers: of groups of channels, single channels, and by the root mean square."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lance_ref import functional as F
from lance_ref.engine.arguments import positive
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.init import constant_parameter
from lance_ref.nn.layers import positive_integers
from lance_ref.nn.module import Module


class GroupNorm(Module):
    """Normalisation of ``num_groups`` groups of channels, (B, num_channels, ...).

    Parameters
    ----------
    num_groups, num_channels : int
        The first divides the second.
    eps : float
        Added to the variance.
    affine : bool
        Whether there are ``weight`` and ``bias``, (num_channels,) each.
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        self.num_groups, self.num_channels = positive_integers(
            "GroupNorm", num_groups=num_groups, num_channels=num_channels
        )
        if num_channels % num_groups:
            raise ValueError(f"GroupNorm: num_groups is {num_groups}, expected a divisor of {num_channels} channels")
        self.eps, self.affine = positive("GroupNorm", "eps", eps), affine
        self.weight = constant_parameter((self.num_channels,), 1.0) if affine else None
        self.bias = constant_parameter((self.num_channels,), 0.0) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[1] != self.num_channels:
            raise ValueError(f"GroupNorm: x has shape {x.shape}, expected (B, {self.num_channels}, ...)")
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}"


class InstanceNorm2d(Module):
    """Normalisation of each channel of each image, (B, num_features, H, W).

    Parameters
    ----------
    num_features : int
        Channels C.
    eps : float
        Added to the variance.
    momentum : float
        Taken as PyTorch's layer takes it, and without effect: no running statistics are kept.
    affine : bool
        Whether there are ``weight`` and ``bias``, (C,) each. Default: there are none.
    track_running_stats : bool
        Only False.
    """

    _dimensions: tuple[int, ...] = (4,)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if track_running_stats:
            raise ValueError(f"{name}: track_running_stats is True, expected False: there are no running statistics")
        (self.num_features,) = positive_integers(name, num_features=num_features)
        self.eps, self.affine = positive(name, "eps", eps), affine
        self.weight = constant_parameter((self.num_features,), 1.0) if affine else None
        self.bias = constant_parameter((self.num_features,), 0.0) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim not in self._dimensions or x.shape[1] != self.num_features:
            expected = f"{self._dimensions[0]} dimensions (B, {self.num_features}, ...)"
            raise ValueError(f"{type(self).__name__}: x has shape {x.shape}, expected {expected}")
        return F.instance_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}"


class InstanceNorm1d(InstanceNorm2d):
    """Of sequences (B, C, L); all else as for :class:`InstanceNorm2d`."""

    _dimensions = (3,)


class InstanceNorm3d(InstanceNorm2d):
    """Of volumes (B, C, D, H, W); all else as for :class:`InstanceNorm2d`."""

    _dimensions = (5,)


class RMSNorm(Module):
    """x / √(mean(x²) + eps) · weight over the last dimensions.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        Sizes of the dimensions whose mean square is taken.
    eps : float, optional
        Default: the spacing of numbers at 1 in the type of the input.
    elementwise_affine : bool
        Whether there is a ``weight`` of that shape.
    """

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float | None = None, elementwise_affine: bool = True
    ) -> None:
        super().__init__()
        sizes: Any = (normalized_shape,) if isinstance(normalized_shape, (int, np.integer)) else normalized_shape
        if not isinstance(sizes, (tuple, list)) or not sizes:
            raise ValueError(f"RMSNorm: normalized_shape is {normalized_shape!r}, expected one or more sizes")
        named = {f"normalized_shape[{i}]": n for i, n in enumerate(sizes)}
        self.normalized_shape = positive_integers("RMSNorm", **named)
        self.eps = None if eps is None else positive("RMSNorm", "eps", eps)
        self.elementwise_affine = elementwise_affine
        self.weight = constant_parameter(self.normalized_shape, 1.0) if elementwise_affine else None

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"
