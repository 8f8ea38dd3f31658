"""The layers of PyTorch that have a counterpart here: one function each, known by the name of the class.

PyTorch itself is not imported: a module that is converted has brought it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lance_ref import functional as F
from lance_ref import nn
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.init import shapes_only
from lance_ref.nn.module import Module, Parameter

Shared = dict[int, Parameter]
"""Parameters that were converted, by the identity of PyTorch's: what is shared there is shared here."""


class Applied(Module):
    """A layer without weights that is one function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", "")


def array_of(tensor: Any) -> np.ndarray:
    """A copy of a tensor's numbers.

    Raises ValueError for a dtype that NumPy, or this library, does not have.
    """
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in ("float32", "float64"):
        raise ValueError(f"a tensor of dtype {name}, expected float32 or float64")
    return np.array(tensor.detach().cpu().numpy())


def parameter_of(tensor: Any, shared: Shared) -> Parameter | None:
    """A parameter with the same numbers, that trains if the other one does; None for None."""
    if tensor is None:
        return None
    if id(tensor) not in shared:
        shared[id(tensor)] = Parameter(array_of(tensor), bool(tensor.requires_grad))
    return shared[id(tensor)]


def kind_of(module: Any) -> str:
    """Module and name of a class: ``torch.nn.modules.conv.Conv2d``."""
    return f"{type(module).__module__}.{type(module).__name__}"


def is_layer(module: Any) -> bool:
    """Whether a module is taken as a whole: it has a counterpart, or is one of PyTorch's own without one."""
    if type(module).__name__ in LAYERS:
        return kind_of(module).startswith(KNOWN_PACKAGES)  # a user's class of that name may be anything
    return kind_of(module).startswith("torch.nn.") and not kind_of(module).endswith(CONTAINERS)


def counterpart(module: Any, shared: Shared) -> Module:
    """The same layer of this library, with its weights, in the same mode.

    Raises ValueError, which says why, where there is none.
    """
    make = LAYERS.get(type(module).__name__)
    if make is None:
        raise ValueError("no such layer")
    with shapes_only():
        made = make(module)
    made.training = bool(module.training)
    for name in ("weight", "bias"):
        if getattr(module, name, None) is not None:
            setattr(made, name, parameter_of(getattr(module, name), shared))
    for name in ("running_mean", "running_var"):
        if getattr(module, name, None) is not None:
            made.register_buffer(name, array_of(getattr(module, name)))
    return made


def _refuse(module: Any, **allowed: Any) -> None:
    """Raise ValueError for an option that has another value than the only one there is here."""
    for name, value in allowed.items():
        if getattr(module, name) != value:
            raise ValueError(f"{name} is {getattr(module, name)!r}, expected {value!r}")


def _linear(m: Any) -> Module:
    return nn.Linear(m.in_features, m.out_features, bias=m.bias is not None)


def _conv2d(m: Any) -> Module:
    _refuse(m, padding_mode="zeros")
    sizes = m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.dilation, m.groups
    return nn.Conv2d(*sizes, bias=m.bias is not None)


def _batch_norm(kind: type[nn.BatchNorm2d]) -> Callable[[Any], Module]:
    return lambda m: kind(m.num_features, m.eps, m.momentum, m.affine, m.track_running_stats)


def _layer_norm(m: Any) -> Module:
    if m.elementwise_affine and m.bias is None:
        raise ValueError("bias is False, expected True")
    return nn.LayerNorm(tuple(m.normalized_shape), m.eps, m.elementwise_affine)


def _max_pool(m: Any) -> Module:
    _refuse(m, return_indices=False)
    if m.dilation not in (1, (1, 1)):
        raise ValueError(f"dilation is {m.dilation!r}, expected 1")
    return nn.MaxPool2d(m.kernel_size, m.stride, m.padding, ceil_mode=m.ceil_mode)


def _avg_pool(m: Any) -> Module:
    _refuse(m, divisor_override=None)
    options = {"ceil_mode": m.ceil_mode, "count_include_pad": m.count_include_pad}
    return nn.AvgPool2d(m.kernel_size, m.stride, m.padding, **options)


def _gelu(m: Any) -> Module:
    return nn.GELU() if getattr(m, "approximate", "none") == "none" else Applied(F.gelu_tanh)


def _softmax(m: Any) -> Module:
    if m.dim is None:
        raise ValueError("dim is None, expected a dimension")
    return nn.Softmax(m.dim)


def _dropped_paths(m: Any) -> Module:
    share = getattr(m, "drop_prob", getattr(m, "p", 0.0))
    if m.training and share:
        raise ValueError(f"it drops whole samples with probability {share:g}; expected 0, or a module in evaluation")
    return nn.Identity()


LAYERS: dict[str, Callable[[Any], Module]] = {
    "Linear": _linear,
    "Conv2d": _conv2d,
    "BatchNorm2d": _batch_norm(nn.BatchNorm2d),
    "BatchNorm1d": _batch_norm(nn.BatchNorm1d),
    "LayerNorm": _layer_norm,
    "MaxPool2d": _max_pool,
    "AvgPool2d": _avg_pool,
    "AdaptiveAvgPool2d": lambda m: nn.AdaptiveAvgPool2d(m.output_size),
    "Dropout": lambda m: nn.Dropout(m.p),
    "Flatten": lambda m: nn.Flatten(m.start_dim, m.end_dim),
    "Identity": lambda m: nn.Identity(),
    "ReLU": lambda m: nn.ReLU(),
    "ReLU6": lambda m: nn.ReLU6(),
    "Hardswish": lambda m: nn.Hardswish(),
    "Hardsigmoid": lambda m: nn.Hardsigmoid(),
    "Sigmoid": lambda m: nn.Sigmoid(),
    "Tanh": lambda m: nn.Tanh(),
    "SiLU": lambda m: nn.SiLU(),
    "GELU": _gelu,
    "Softmax": _softmax,
    "StochasticDepth": _dropped_paths,
    "DropPath": _dropped_paths,
}
"""By the name of the class."""

KNOWN_PACKAGES = ("torch.nn.", "torchvision.", "timm.")
"""Whose classes of these names are what they are called."""

CONTAINERS = (".Sequential", ".ModuleList", ".ModuleDict")
"""Modules of PyTorch that only hold others."""
