"""LoRA (Hu et al. 2021, arXiv 2106.09685): a frozen layer, and an update of low rank beside it that trains.

    y = W x + b + (α/r)·B(A x)        W (O, I) frozen, A (r, I) and B (O, r) trained

A starts as any layer does and B at zero, so that the layer starts as the one it adapts. The gradients are

    dB = (α/r)·G (A x)ᵀ,   dA = (α/r)·Bᵀ G xᵀ,   dx = Wᵀ G + (α/r)·AᵀBᵀ G,

and W + (α/r)·B A is a plain layer that does the same. What is kept for the backward pass: A x, of r numbers a place,
and x itself, which dA needs. So LoRA saves gradients and optimiser state, (I + O)·r numbers in place of I·O, but no
activations; the frozen weight keeps none either, as it has no gradient.

A 1x1 convolution is a linear layer at every place: A is a 1x1 convolution to r channels with the stride and padding of
the adapted one, B a 1x1 convolution of stride 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np

from lance_ref.engine.counting import matmul
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.init import as_generator, constant_parameter, shapes_only
from lance_ref.nn.layers import Conv2d, Linear, Rng, positive_integers
from lance_ref.nn.module import Module, Parameter, _structure_changed


class Sum(Module):
    """a + b, as a module: the addition has a path of its own, beside the layer that it belongs to."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class LoRALinear(Linear):
    """A linear layer with a trained update of low rank: ``down`` is A, ``up`` is B, ``scale`` is α/r.

    Parameters
    ----------
    base : Linear
        Its weight and bias are shared with it, and frozen.
    rank : int
        r, of the update.
    alpha : float, optional
        α; by default r, so that the update counts once.
    rng : int or numpy.random.Generator, optional
        Source of A.
    """

    down: Linear
    up: Linear
    sum: Sum
    scale: float

    def __init__(self, base: Linear, rank: int, alpha: float | None = None, rng: Rng = None) -> None:
        Module.__init__(self)
        _check(base, Linear, rank)
        self.in_features, self.out_features = base.in_features, base.out_features
        with shapes_only() if base.weight.is_meta else nullcontext():
            self.down = Linear(self.in_features, rank, bias=False, rng=rng)
            self.up = Linear(rank, self.out_features, bias=False, rng=0)
            _adapt(self, base, rank, alpha)

    def forward(self, x: Tensor) -> Tensor:
        return self.sum(super().forward(x), _scaled(self.up(self.down(x)), self.scale))

    def merged(self) -> Linear:
        """A plain layer that does the same: its weight is W + (α/r)·B A."""
        plain = Linear(self.in_features, self.out_features, self.bias is not None, rng=0)
        _fill(plain, self, matmul(self.up.weight.data, self.down.weight.data))
        return plain


class LoRAConv2d(Conv2d):
    """A 1x1 convolution of one group with a trained update of low rank; see :class:`LoRALinear`.

    Parameters
    ----------
    rank, alpha, rng
        As there.

    Raises
    ------
    ValueError
        If the kernel is not 1x1, or there is more than one group.
    """

    down: Conv2d
    up: Conv2d
    sum: Sum
    scale: float

    def __init__(self, base: Conv2d, rank: int, alpha: float | None = None, rng: Rng = None) -> None:
        Module.__init__(self)
        _check(base, Conv2d, rank)
        if base.kernel_size != (1, 1) or base.groups != 1:
            raise ValueError(
                f"LoRAConv2d: base has kernel {base.kernel_size} and {base.groups} groups, expected a 1x1 "
                "convolution of one group"
            )
        for name in ("in_channels", "out_channels", "groups", "kernel_size", "stride", "dilation", "padding"):
            setattr(self, name, getattr(base, name))
        with shapes_only() if base.weight.is_meta else nullcontext():
            self.down = Conv2d(self.in_channels, rank, 1, base.stride, base.padding, base.dilation, bias=False, rng=rng)
            self.up = Conv2d(rank, self.out_channels, 1, bias=False, rng=0)
            _adapt(self, base, rank, alpha)

    def forward(self, x: Tensor) -> Tensor:
        return self.sum(super().forward(x), _scaled(self.up(self.down(x)), self.scale))

    def merged(self) -> Conv2d:
        """A plain convolution that does the same: its weight is W + (α/r)·B A."""
        plain = Conv2d(
            self.in_channels, self.out_channels, 1, self.stride, self.padding, self.dilation, 1,
            self.bias is not None, rng=0,
        )  # fmt: skip
        up, down = (layer.weight.data[:, :, 0, 0] for layer in (self.up, self.down))
        _fill(plain, self, matmul(up, down)[:, :, None, None])  # (O, I, 1, 1)
        return plain


def can_adapt(layer: Module) -> bool:
    """Whether there is a LoRA of this layer: a linear layer, or a 1x1 convolution of one group."""
    if isinstance(layer, Conv2d):
        images = type(layer).forward in (Conv2d.forward, LoRAConv2d.forward)
        return images and layer.kernel_size == (1, 1) and layer.groups == 1
    return isinstance(layer, Linear) and type(layer).forward in (Linear.forward, LoRALinear.forward)


def add_lora(
    net: Module, layers: Sequence[str], rank: int, alpha: float | None = None, rng: Rng = None
) -> dict[str, Module]:
    """Put a trained update of low rank beside some layers of a network, in place.

    ``layers`` are paths of linear layers and 1x1 convolutions of one group. Their weights and biases are frozen; what
    else trains is left as it is. Gives the layers that were replaced, by path, which :func:`put_back` takes.

    Raises
    ------
    ValueError
        If a path is no layer that can be adapted; nothing has been changed then.

    Examples
    --------
    >>> from lance_ref import nn
    >>> net = nn.Sequential(nn.Linear(8, 6, rng=0), nn.ReLU(), nn.Linear(6, 3, rng=1))
    >>> replaced = add_lora(net, ["0"], rank=2)
    >>> [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    ['0.down.weight', '0.up.weight', '2.weight', '2.bias']
    """
    positive_integers("add_lora", rank=rank)
    modules = dict(net.named_modules())
    for path in layers:
        found = modules.get(path)
        if found is None or not path or not can_adapt(found) or isinstance(found, (LoRALinear, LoRAConv2d)):
            came = "no module" if found is None else f"a {type(found).__name__}"
            raise ValueError(f"layers names {path!r}, {came}; expected Linear layers, and 1x1 Conv2d of one group")
    rng = as_generator(rng)
    replaced = {path: modules[path] for path in layers}
    for layer in replaced.values():
        adapted: Module
        if isinstance(layer, Conv2d):
            adapted = LoRAConv2d(layer, rank, alpha, rng)
        else:
            assert isinstance(layer, Linear)
            adapted = LoRALinear(layer, rank, alpha, rng)
        _exchange(net, layer, adapted)
    return replaced


def put_back(net: Module, replaced: dict[str, Module]) -> None:
    """Undo :func:`add_lora`; the updates are gone, and the weights stay frozen."""
    modules = dict(net.named_modules())
    for path, layer in replaced.items():
        _exchange(net, modules[path], layer)


def merge_lora(net: Module) -> None:
    """Replace every layer that has an update of low rank by a plain one that does the same, in place."""
    adapted = [module for module in net.modules() if isinstance(module, (LoRALinear, LoRAConv2d))]
    for layer in adapted:
        _exchange(net, layer, layer.merged())


def _exchange(net: Module, old: Module, new: Module) -> None:
    """Put a module in the place of another wherever that is a child; the order of the children stays."""
    for parent in list(net.modules()):
        parent._modules.update(dict.fromkeys([name for name, module in parent._modules.items() if module is old], new))
    _structure_changed()


def _check(base: Module, kind: type[Module], rank: int) -> None:
    if not isinstance(base, kind):
        raise TypeError(f"LoRA: base is a {type(base).__name__}, expected a {kind.__name__}")
    if base.update is not None:
        raise ValueError("LoRA: base trains in a subspace, expected a plain layer; merge(net) first")
    positive_integers("LoRA", rank=rank)


def _adapt(layer: LoRALinear | LoRAConv2d, base: Linear | Conv2d, rank: int, alpha: float | None) -> None:
    """Take over weight, bias and store of ``base``, frozen; B of zeros; α/r."""
    alpha = float(rank) if alpha is None else float(alpha)
    if not 0 < alpha < float("inf"):
        raise ValueError(f"LoRA: alpha is {alpha}, expected a positive number")
    layer.scale = alpha / rank
    layer.weight, layer.bias, layer.store, layer.update = base.weight, base.bias, base.store, None
    layer.up.weight = constant_parameter(layer.up.weight.shape, 0.0)
    layer.sum = Sum()
    for part in (layer.down, layer.up):
        part.to(base.weight.dtype)
    for parameter in (layer.weight, layer.bias):
        if isinstance(parameter, Parameter):
            parameter.requires_grad_(False)


def _scaled(update: Tensor, scale: float) -> Tensor:
    return update if scale == 1 else update * scale


def _fill(plain: Linear | Conv2d, layer: LoRALinear | LoRAConv2d, product: np.ndarray) -> None:
    """Give a plain layer W + (α/r)·``product`` and the bias."""
    plain.to(layer.weight.dtype)
    plain.weight.data = layer.weight.data + product * np.asarray(layer.scale, product.dtype)
    if plain.bias is not None and layer.bias is not None:
        plain.bias.data = layer.bias.data.copy()
    plain.store = layer.store
