"""Normalisation layers: by the statistics of a batch or of one sample, or by the root mean square."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lance_ref import functional as F
from lance_ref.engine.arguments import positive, share
from lance_ref.engine.tensor import Shape, Tensor
from lance_ref.nn.init import constant_parameter
from lance_ref.nn.layers import positive_integers
from lance_ref.nn.module import Module, Parameter


class BatchNorm2d(Module):
    """Batch normalisation of images, y = (x − mean) / √(var + eps) · weight + bias per channel.

    Parameters
    ----------
    num_features : int
        Channels C.
    eps : float
        Added to the variance.
    momentum : float
        Weight of each training batch in the running statistics, in [0, 1]. PyTorch's None, a cumulative average, is
        refused.
    affine : bool
        Whether there are ``weight`` and ``bias``, (C,) each.
    track_running_stats : bool
        If False the batch's own statistics are always used, in evaluation too.

    Attributes
    ----------
    frozen : bool
        If True the running statistics are used, and left alone, in training mode as well; the
        layer is then an affine map that keeps only (C,) numbers for backward. ``train()`` and
        ``eval()`` do not touch it.
    """

    _dimensions: tuple[int, ...] = (4,)
    _expected = "(B, {C}, H, W)"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__()
        (self.num_features,) = positive_integers(type(self).__name__, num_features=num_features)
        name = type(self).__name__
        if momentum is None:
            raise ValueError(
                f"{name}: momentum is None, which stands for a cumulative average in PyTorch and is not supported; "
                "expected a number in [0, 1]"
            )
        self.eps, self.momentum = positive(name, "eps", eps), share(name, "momentum", momentum)
        self.affine, self.track_running_stats = affine, track_running_stats
        self.frozen = False
        self.weight, self.bias = _affine((self.num_features,), affine)
        if track_running_stats:
            self.register_buffer("running_mean", np.zeros(num_features, np.float32))
            self.register_buffer("running_var", np.ones(num_features, np.float32))
        else:
            self.running_mean = self.running_var = None

    def forward(self, x: Tensor) -> Tensor:
        name = type(self).__name__
        if x.ndim not in self._dimensions or x.shape[1] != self.num_features:
            raise ValueError(f"{name}: x has shape {x.shape}, expected {self._expected.format(C=self.num_features)}")
        if self.frozen and not self.track_running_stats:
            raise RuntimeError(f"{name}: frozen needs running statistics, but track_running_stats is False")
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=not self.track_running_stats or (self.training and not self.frozen),
            momentum=self.momentum,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        text = f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}"
        text += "" if self.track_running_stats else ", track_running_stats=False"
        return text + (", frozen=True" if self.frozen else "")


class BatchNorm1d(BatchNorm2d):
    """Batch normalisation of vectors (B, C) or sequences (B, C, L); all else as for :class:`BatchNorm2d`.

    It is a BatchNorm2d in the eyes of ``isinstance``: whatever freezes or trains the one does so with the other.
    """

    _dimensions = (2, 3)
    _expected = "(B, {C}) or (B, {C}, L)"


class LayerNorm(Module):
    """Layer normalisation over the last dimensions.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        Sizes of the dimensions that are normalised.
    eps : float
        Added to the variance.
    elementwise_affine : bool
        Whether there are ``weight`` and ``bias`` of that shape.
    """

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float = 1e-5, elementwise_affine: bool = True
    ) -> None:
        super().__init__()
        self.normalized_shape = _sizes("LayerNorm", normalized_shape)
        self.eps, self.elementwise_affine = positive("LayerNorm", "eps", eps), elementwise_affine
        self.weight, self.bias = _affine(self.normalized_shape, elementwise_affine)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


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
        self.weight, self.bias = _affine((self.num_channels,), affine)

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
        self.weight, self.bias = _affine((self.num_features,), affine)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim not in self._dimensions or x.shape[1] != self.num_features:
            expected = f"{self._dimensions[0]} dimensions (B, {self.num_features}, ...)"
            raise ValueError(f"{type(self).__name__}: x has shape {x.shape}, expected {expected}")
        return F.instance_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}"


class InstanceNorm1d(InstanceNorm2d):
    """Normalisation of each channel of each sequence, (B, C, L); otherwise as :class:`InstanceNorm2d`."""

    _dimensions = (3,)


class InstanceNorm3d(InstanceNorm2d):
    """Normalisation of each channel of each volume, (B, C, D, H, W); otherwise as :class:`InstanceNorm2d`."""

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
        self.normalized_shape = _sizes("RMSNorm", normalized_shape)
        self.eps = None if eps is None else positive("RMSNorm", "eps", eps)
        self.elementwise_affine = elementwise_affine
        self.weight = constant_parameter(self.normalized_shape, 1.0) if elementwise_affine else None

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


def _affine(shape: Shape, wanted: bool) -> tuple[Parameter | None, Parameter | None]:
    """Weight 1 and bias 0 of that shape, which change no value; None and None where they are not wanted."""
    return (constant_parameter(shape, 1.0), constant_parameter(shape, 0.0)) if wanted else (None, None)


def _sizes(layer: str, normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    """One size or several, as a tuple; ValueError for anything else."""
    sizes: Any = (normalized_shape,) if isinstance(normalized_shape, (int, np.integer)) else normalized_shape
    if not isinstance(sizes, (tuple, list)) or not sizes:
        raise ValueError(f"{layer}: normalized_shape is {normalized_shape!r}, expected one or more sizes")
    return positive_integers(layer, **{f"normalized_shape[{i}]": n for i, n in enumerate(sizes)})
