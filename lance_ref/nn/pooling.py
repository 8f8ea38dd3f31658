"""Pooling layers: the maximum or the mean of each window of a sequence, an image or a volume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from lance_ref import functional as F
from lance_ref.engine.tensor import Tensor
from lance_ref.functional.convolution import pair
from lance_ref.nn.layers import Size
from lance_ref.nn.module import Module


class Pool(Module):
    """What all layers with windows share: ``pool`` is called with the window, and with the options by their names.

    Parameters
    ----------
    kernel_size : int or sequence of int
        The window, one size for all axes or one for each.
    stride : like ``kernel_size``, optional
        Places between two windows. Default: ``kernel_size``, so that windows do not overlap.
    padding : like ``kernel_size``
        Places outside the input on each side. Default: 0.
    options : bool
        Other arguments of ``pool``.
    """

    pool: ClassVar[Callable[..., Tensor]]

    def __init__(self, kernel_size: Any, stride: Any, padding: Any, **options: bool) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.padding, self.options = kernel_size, stride, padding, options

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x, self.kernel_size, self.stride, self.padding, **self.options)

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}{options}"


class Pool2d(Pool):
    """Pooling of images: a wrong window is refused here, and options are shown where they are not PyTorch's defaults.

    Parameters
    ----------
    kernel_size, stride, padding
        An int or a pair each, as for :class:`Pool`.
    """

    def __init__(self, kernel_size: Size, stride: Size | None, padding: Size, **options: bool) -> None:
        window = pair("kernel_size", kernel_size, 1)
        steps = window if stride is None else pair("stride", stride, 1)
        super().__init__(window, steps, pair("padding", padding, 0), **options)

    def extra_repr(self) -> str:
        usual = {"ceil_mode": False, "count_include_pad": True}
        text = f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
        return text + "".join(f", {name}={value}" for name, value in self.options.items() if value != usual[name])


class MaxPool1d(Pool):
    """The maximum of each window of a sequence; ``stride`` is ``kernel_size`` by default."""

    pool = staticmethod(F.max_pool1d)

    def __init__(
        self, kernel_size: int, stride: int | None = None, padding: int = 0, *, ceil_mode: bool = False
    ) -> None:
        super().__init__(kernel_size, stride, padding, ceil_mode=ceil_mode)


class MaxPool2d(Pool2d):
    """The maximum of each window; ``stride`` is ``kernel_size`` by default."""

    pool = staticmethod(F.max_pool2d)

    def __init__(
        self, kernel_size: Size, stride: Size | None = None, padding: Size = 0, *, ceil_mode: bool = False
    ) -> None:
        super().__init__(kernel_size, stride, padding, ceil_mode=ceil_mode)


class MaxPool3d(Pool):
    """The maximum of each window of a volume; ``stride`` is ``kernel_size`` by default."""

    pool = staticmethod(F.max_pool3d)

    def __init__(self, kernel_size: Size, stride: Size | None = None, padding: Size = 0) -> None:
        super().__init__(kernel_size, stride, padding)


class AvgPool1d(Pool):
    """The mean of each window of a sequence; ``stride`` is ``kernel_size`` by default."""

    pool = staticmethod(F.avg_pool1d)

    def __init__(
        self,
        kernel_size: int,
        stride: int | None = None,
        padding: int = 0,
        *,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> None:
        super().__init__(kernel_size, stride, padding, ceil_mode=ceil_mode, count_include_pad=count_include_pad)


class AvgPool2d(Pool2d):
    """The mean of each window; ``stride`` is ``kernel_size`` by default."""

    pool = staticmethod(F.avg_pool2d)

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        *,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> None:
        super().__init__(kernel_size, stride, padding, ceil_mode=ceil_mode, count_include_pad=count_include_pad)


class AvgPool3d(Pool):
    """The mean of each window of a volume; ``stride`` is ``kernel_size`` by default."""

    pool = staticmethod(F.avg_pool3d)

    def __init__(
        self, kernel_size: Size, stride: Size | None = None, padding: Size = 0, *, count_include_pad: bool = True
    ) -> None:
        super().__init__(kernel_size, stride, padding, count_include_pad=count_include_pad)


class AdaptiveAvgPool2d(Module):
    """Means over a grid of ``output_size`` windows that cover the image; None: as many as the image has places."""

    def __init__(self, output_size: int | Sequence[int | None] | None) -> None:
        super().__init__()
        asked = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
        sizes = pair("output_size", tuple(1 if n is None else n for n in asked), 1)
        self.output_size = tuple(None if n is None else size for n, size in zip(asked, sizes, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, self.output_size)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}"
