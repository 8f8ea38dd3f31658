"""Normalisation layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lance_ref import functional as F
from lance_ref.engine.arguments import positive, share
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.init import constant_parameter
from lance_ref.nn.layers import positive_integers
from lance_ref.nn.module import Module


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
        self.weight = constant_parameter((num_features,), 1.0) if affine else None
        self.bias = constant_parameter((num_features,), 0.0) if affine else None
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
        sizes: Any = (normalized_shape,) if isinstance(normalized_shape, (int, np.integer)) else normalized_shape
        if not isinstance(sizes, (tuple, list)) or not sizes:
            raise ValueError(f"LayerNorm: normalized_shape is {normalized_shape!r}, expected one or more sizes")
        self.normalized_shape = positive_integers(
            "LayerNorm", **{f"normalized_shape[{i}]": n for i, n in enumerate(sizes)}
        )
        self.eps, self.elementwise_affine = positive("LayerNorm", "eps", eps), elementwise_affine
        self.weight = constant_parameter(self.normalized_shape, 1.0) if elementwise_affine else None
        self.bias = constant_parameter(self.normalized_shape, 0.0) if elementwise_affine else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"
