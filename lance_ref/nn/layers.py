"""Layers: what those with weights share, the two most common ones, Sequential, and dropout."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from lance_ref import functional as F
from lance_ref.algebra.geometry import Pair
from lance_ref.engine.tensor import Tensor
from lance_ref.functional.convolution import pair, resolve_padding
from lance_ref.functional.volumes import numbers
from lance_ref.nn.init import as_generator, default_bound, uniform_parameter
from lance_ref.nn.module import Module
from lance_ref.stores import EXACT, ActivationStore

Rng = np.random.Generator | int | None
Size = int | Sequence[int]


def positive_integers(layer: str, **values: Any) -> tuple[int, ...]:
    """The values as integers; raises ValueError with the name of the first that is not positive."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{layer}: {name} is {value!r}, expected a positive integer")
    return tuple(int(value) for value in values.values())


class Linear(Module):
    """y = x Wᵀ + b, for x of shape (..., in_features).

    Parameters
    ----------
    rng : numpy.random.Generator or int, optional
        Source of the initial weights; the library's default generator otherwise.

    Attributes
    ----------
    weight : Parameter (out_features, in_features)
    bias : Parameter (out_features,) or None
    store : ActivationStore
        What is kept of the input for the weight gradient.
    update : SubspaceUpdate or None
        What trains in place of the weight (:mod:`lance_ref.nn.subspace`).
    """

    op = "linear"

    def __init__(self, in_features: int, out_features: int, bias: bool = True, rng: Rng = None) -> None:
        super().__init__()
        self.in_features, self.out_features = positive_integers(
            "Linear", in_features=in_features, out_features=out_features
        )
        rng = as_generator(rng)
        shape = (self.out_features, self.in_features)
        self.weight = uniform_parameter(shape, default_bound(shape), rng)
        self.bias = uniform_parameter(shape[:1], default_bound(shape), rng) if bias else None
        self.store: ActivationStore = EXACT
        self.update: Any = None

    def forward(self, x: Tensor) -> Tensor:
        update = None if self.update is None else self.update.parts()
        return F.linear(x, self.weight, self.bias, store=self.store, update=update)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}{_store_repr(self.store)}"


class Convolution(Module):
    """What convolutions of all kinds share: channels in groups, a weight, and what is kept of the input.

    Attributes
    ----------
    op : str
        The operation that it runs.
    axes : int
        Axes of a map: 2 for images, 3 for volumes.
    transposed : bool
        Whether the weight is (in_channels, out_channels / groups, k, ...) in place of
        (out_channels, in_channels / groups, k, ...).
    weight : Parameter
    bias : Parameter (out_channels,) or None
    store : ActivationStore
        What is kept of the input for the weight gradient.
    update : SubspaceUpdate or None
        What trains in place of the weight (:mod:`lance_ref.nn.subspace`); of a Conv2d alone.
    """

    op: ClassVar[str]
    axes: ClassVar[int] = 2
    transposed: ClassVar[bool] = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size,
        dilation: Size,
        groups: int,
        bias: bool,
        rng: Rng,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.in_channels, self.out_channels, self.groups = positive_integers(
            name, in_channels=in_channels, out_channels=out_channels, groups=groups
        )
        for what, count in (("in_channels", in_channels), ("out_channels", out_channels)):
            if count % groups:
                raise ValueError(f"{name}: groups is {groups}, expected a divisor of {what} = {count}")
        sizes = (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
        self.kernel_size, self.stride, self.dilation = [self.numbers(what, value, 1) for what, value in sizes]
        channels = self.out_channels, self.in_channels
        outer, inner = channels[::-1] if self.transposed else channels
        shape = (outer, inner // self.groups, *self.kernel_size)
        generator = as_generator(rng)
        self.weight = uniform_parameter(shape, default_bound(shape), generator)
        self.bias = uniform_parameter((self.out_channels,), default_bound(shape), generator) if bias else None
        self.store: ActivationStore = EXACT
        self.update: Any = None

    def numbers(self, name: str, value: Any, smallest: int) -> tuple[int, ...]:
        """An integer for each axis of a map, from one or from as many; ValueError for anything else."""
        return pair(name, value, smallest) if self.axes == 2 else numbers(name, value, self.axes, smallest)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, default in (("padding", 0), ("dilation", (1,) * self.axes), ("groups", 1)):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)!r}"
        return text + ("" if self.bias is not None else ", bias=False") + _store_repr(self.store)


class Conv2d(Convolution):
    """2-D convolution of a batch of images, see :func:`lance_ref.functional.conv2d`.

    Parameters
    ----------
    kernel_size, stride, dilation : int or pair
    padding : int, pair, ((top, bottom), (left, right)), "valid" or "same"
    groups : int
        Divides both numbers of channels.
    rng : numpy.random.Generator or int, optional
        Source of the initial weights; the library's default generator otherwise.

    Attributes
    ----------
    weight : Parameter (out_channels, in_channels / groups, k_h, k_w)
    bias : Parameter (out_channels,) or None
    store : ActivationStore
        What is kept of the input for the weight gradient.
    update : SubspaceUpdate or None
        What trains in place of the weight (:mod:`lance_ref.nn.subspace`).
    """

    op = "conv2d"
    kernel_size: Pair
    stride: Pair
    dilation: Pair

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
        super().__init__(in_channels, out_channels, kernel_size, stride, dilation, groups, bias, rng)
        self.padding = padding
        resolve_padding(padding, (1, 1), self.kernel_size, self.stride, self.dilation)  # only to refuse a bad one now

    def forward(self, x: Tensor) -> Tensor:
        update = None if self.update is None else self.update.parts()
        sizes = self.stride, self.padding, self.dilation, self.groups
        return F.conv2d(x, self.weight, self.bias, *sizes, store=self.store, update=update)


def _store_repr(store: ActivationStore) -> str:
    return "" if store is EXACT else f", store={store.name}"


class Sequential(Module):
    """Modules one after the other.

    Takes the modules themselves, named "0", "1", ..., or one OrderedDict of names and modules.
    """

    def __init__(self, *modules: Any) -> None:
        super().__init__()
        named = modules[0].items() if len(modules) == 1 and isinstance(modules[0], dict) else enumerate(modules)
        for name, module in named:
            self.add_module(str(name), module)

    def forward(self, x: Tensor) -> Tensor:
        for module in self._modules.values():
            x = module(x)
        return x

    def stages(self) -> list[Module]:
        """The modules, whose composition is ``forward``."""
        return list(self)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Module]:
        return iter(self._modules.values())

    def __getitem__(self, index: int | slice) -> Module:
        """The module at a position, or a new Sequential of a slice, under the same names."""
        items = list(self._modules.items())
        if isinstance(index, slice):
            return Sequential(OrderedDict(items[index]))
        return items[index][1]


class Identity(Module):
    """y = x. Takes and ignores any constructor arguments, as PyTorch's does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x


class Flatten(Module):
    """Merge the dimensions from ``start_dim`` to ``end_dim`` into one."""

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        super().__init__()
        self.start_dim, self.end_dim = start_dim, end_dim

    def forward(self, x: Tensor) -> Tensor:
        return F.flatten(x, self.start_dim, self.end_dim)

    def extra_repr(self) -> str:
        return f"start_dim={self.start_dim}, end_dim={self.end_dim}"


class Dropout(Module):
    """Zero elements with probability ``p`` while training; the identity in evaluation.

    Parameters
    ----------
    p : float in [0, 1]
    rng : numpy.random.Generator or int, optional
        Source of the masks; the library's default generator otherwise.
    inplace : bool
        Taken as PyTorch's layer takes it: the result is a new array.
    """

    def __init__(self, p: float = 0.5, rng: Rng = None, *, inplace: bool = False) -> None:
        super().__init__()
        if isinstance(rng, bool):  # PyTorch's second argument
            rng = None
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
            raise ValueError(f"Dropout: p is {p!r}, expected a number in [0, 1]")
        self.p = float(p)
        self.rng = None if rng is None else as_generator(rng)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training, self.rng)

    def extra_repr(self) -> str:
        return f"p={self.p}"
