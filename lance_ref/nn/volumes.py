"""Convolutions of sequences and volumes, transposed convolutions, resizing, and tables of vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lance_ref import functional as F
from lance_ref.engine.tensor import Tensor
from lance_ref.functional.volumes import numbers, row_padding
from lance_ref.nn.init import normal_parameter
from lance_ref.nn.layers import Conv2d, Convolution, Rng, Size, positive_integers
from lance_ref.nn.module import Module


class Conv1d(Conv2d):
    """1-D convolution of a batch of sequences (B, C_in, L): a convolution of images of height 1, on views.

    It is a Conv2d in the eyes of ``isinstance``: LANCE and its rivals compress its input as (B, C_in, 1, L).

    Parameters
    ----------
    kernel_size, stride, dilation : int
    padding : int, (before, after), "valid" or "same"
    groups, bias, rng
        As for :class:`Conv2d`.

    Attributes
    ----------
    weight : Parameter (out_channels, in_channels / groups, 1, k)
        ``load_state_dict`` takes PyTorch's shape, without the 1, as well.
    bias : Parameter (out_channels,) or None
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Any = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        rng: Rng = None,
    ) -> None:
        kernel, strides, dilations = (
            (1, *numbers(name, value, 1, 1))
            for name, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
        )
        super().__init__(in_channels, out_channels, kernel, strides, row_padding(padding), dilations, groups, bias, rng)

    def __call__(self, *inputs: Any) -> Tensor:
        """The input as images of height 1, so that hooks on the inputs of convolutions see four dimensions."""
        x = inputs[0] if isinstance(inputs[0], Tensor) else Tensor(inputs[0])
        return _sequence(super().__call__(self._images(x)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.ndim == 4 else _sequence(super().forward(self._images(x)))

    def _images(self, x: Tensor) -> Tensor:
        if x.ndim != 3:
            raise ValueError(f"Conv1d: x has shape {x.shape}, expected 3 dimensions (B, {self.in_channels}, L)")
        return F.reshape(x, (*x.shape[:2], 1, x.shape[2]))

    def own_array(self, name: str, array: np.ndarray) -> np.ndarray:
        return array[:, :, None] if name == "weight" and array.ndim == 3 else array


def _sequence(x: Tensor) -> Tensor:
    return F.reshape(x, (*x.shape[:2], x.shape[3]))


class ConvTranspose2d(Convolution):
    """Transposed 2-D convolution, see :func:`lance_ref.functional.conv_transpose2d`; in PyTorch's order of arguments.

    ``weight`` has shape (in_channels, out_channels / groups, k_h, k_w).
    """

    op = "conv_transpose2d"
    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        rng: Rng = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, dilation, groups, bias, rng)
        self.padding = self.numbers("padding", padding, 0)
        self.output_padding = self.numbers("output_padding", output_padding, 0)

    def extra_repr(self) -> str:
        more = f", output_padding={self.output_padding}" if any(self.output_padding) else ""
        return super().extra_repr() + more

    def forward(self, x: Tensor) -> Tensor:
        sizes = self.stride, self.padding, self.output_padding, self.groups, self.dilation
        return F.conv_transpose2d(x, self.weight, self.bias, *sizes, store=self.store)


class Conv3d(Convolution):
    """3-D convolution, see :func:`lance_ref.functional.conv3d`.

    ``weight`` has shape (out_channels, in_channels / groups, k_d, k_h, k_w).
    """

    op = "conv3d"
    axes = 3

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        rng: Rng = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, dilation, groups, bias, rng)
        self.padding = self.numbers("padding", padding, 0)

    def forward(self, x: Tensor) -> Tensor:
        sizes = self.stride, self.padding, self.dilation, self.groups
        return F.conv3d(x, self.weight, self.bias, *sizes, store=self.store)


class Upsample(Module):
    """Another size, by nearest neighbours or linear interpolation, see :func:`lance_ref.functional.interpolate`."""

    def __init__(
        self,
        size: int | Sequence[int] | None = None,
        scale_factor: float | Sequence[float] | None = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
    ) -> None:
        super().__init__()
        if (size is None) == (scale_factor is None):
            raise ValueError(f"Upsample: size is {size!r} and scale_factor {scale_factor!r}, expected one of them")
        self.size, self.scale_factor, self.mode = size, scale_factor, mode
        self.align_corners = bool(align_corners)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, self.size, self.scale_factor, self.mode, self.align_corners)

    def extra_repr(self) -> str:
        return f"size={self.size}, scale_factor={self.scale_factor}, mode={self.mode!r}"


class Embedding(Module):
    """Rows of a table by their numbers.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Rows, and the size of each.
    padding_idx : int, optional
        A row that starts with zeros and gets no gradient.
    rng : numpy.random.Generator or int, optional
        Source of the initial values, which are normal; the library's default generator otherwise.

    Attributes
    ----------
    weight : Parameter (num_embeddings, embedding_dim)
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, rng: Rng = None
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = positive_integers(
            "Embedding", num_embeddings=num_embeddings, embedding_dim=embedding_dim
        )
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"Embedding: padding_idx is {padding_idx}, expected a row of {num_embeddings}")
        self.padding_idx = padding_idx
        self.weight = normal_parameter((self.num_embeddings, self.embedding_dim), 1.0, rng)
        if padding_idx is not None and not self.weight.is_meta:
            values = self.weight.data.copy()
            values[padding_idx] = 0
            self.weight.data = values

    def forward(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.weight, self.padding_idx)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
