"""The layers of PyTorch that have a counterpart here: one function each, known by the name of the class.

PyTorch itself is not imported: a module that is converted has brought it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from lance_ref import functional as F
from lance_ref import nn
from lance_ref.convert.functions import FUNCTIONS
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
        return getattr(getattr(self.function, "func", self.function), "__name__", "")


def array_of(tensor: Any) -> np.ndarray:
    """A copy of a tensor's numbers.

    Raises ValueError for a dtype that NumPy, or this library, does not have.
    """
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in ("float32", "float64"):
        raise ValueError(f"a tensor of dtype {name}, expected float32 or float64")
    return np.array(tensor.detach().cpu().numpy())


def parameter_of(tensor: Any, shared: Shared, shape: tuple[int, ...] | None = None) -> Parameter:
    """A parameter with the same numbers, that trains if the other one does, in another shape where one is given.

    Raises ValueError if it was converted before, in another shape.
    """
    if id(tensor) not in shared:
        array = array_of(tensor)
        shared[id(tensor)] = Parameter(
            array.reshape(array.shape if shape is None else shape), bool(tensor.requires_grad)
        )
    found = shared[id(tensor)]
    if shape not in (None, found.shape):
        raise ValueError(f"its weight of shape {shape} is that of another layer too, where it has shape {found.shape}")
    return found


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
    for name, parameter in module.named_parameters(recurse=False):
        owner, own = _place_of(made, name)
        setattr(owner, own, parameter_of(parameter, shared, getattr(owner, own).shape))
    for name in ("running_mean", "running_var"):
        if getattr(module, name, None) is not None:
            made.register_buffer(name, array_of(getattr(module, name)))
    return made


def _place_of(layer: Module, name: str) -> tuple[Module, str]:
    """Where a parameter stands here: ``weight_ih_l0`` of a recurrent layer is the weight of its child ``l0.ih``."""
    of_state = re.fullmatch(r"(weight|bias)_(ih|hh)_(l\d+(?:_reverse)?)", name)
    return (layer, name) if of_state is None else (getattr(getattr(layer, of_state[3]), of_state[2]), of_state[1])


def _refuse(module: Any, **allowed: Any) -> None:
    """Raise ValueError for an option that has another value than the only one there is here."""
    for name, value in allowed.items():
        if getattr(module, name) != value:
            raise ValueError(f"{name} is {getattr(module, name)!r}, expected {value!r}")


def _linear(m: Any) -> Module:
    return nn.Linear(m.in_features, m.out_features, bias=m.bias is not None)


def _convolution(kind: Callable[..., Module]) -> Callable[[Any], Module]:
    def make(m: Any) -> Module:
        _refuse(m, padding_mode="zeros")
        sizes = m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.dilation, m.groups
        return kind(*sizes, bias=m.bias is not None)

    return make


def _conv_transpose2d(m: Any) -> Module:
    _refuse(m, padding_mode="zeros")
    sizes = m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.output_padding, m.groups
    return nn.ConvTranspose2d(*sizes, bias=m.bias is not None, dilation=m.dilation)


def _recurrent(kind: type[nn.LSTM] | type[nn.GRU]) -> Callable[[Any], Module]:
    def make(m: Any) -> Module:
        _refuse(m, proj_size=0)
        options = m.num_layers, m.bias, m.batch_first, m.dropout, m.bidirectional
        return kind(m.input_size, m.hidden_size, *options)

    return make


def _embedding(m: Any) -> Module:
    _refuse(m, max_norm=None, scale_grad_by_freq=False)
    return nn.Embedding(m.num_embeddings, m.embedding_dim, m.padding_idx)


def _upsample(m: Any) -> Module:
    _refuse(m, recompute_scale_factor=None)
    return nn.Upsample(m.size, m.scale_factor, m.mode, m.align_corners)


def _batch_norm(kind: type[nn.BatchNorm2d]) -> Callable[[Any], Module]:
    return lambda m: kind(m.num_features, m.eps, m.momentum, m.affine, m.track_running_stats)


def _layer_norm(m: Any) -> Module:
    if m.elementwise_affine and m.bias is None:
        raise ValueError("bias is False, expected True")
    return nn.LayerNorm(tuple(m.normalized_shape), m.eps, m.elementwise_affine)


def _instance_norm(kind: type[nn.InstanceNorm2d]) -> Callable[[Any], Module]:
    return lambda m: kind(m.num_features, m.eps, m.momentum, m.affine, m.track_running_stats)


ORDINARY = {"return_indices": False, "divisor_override": None, "ceil_mode": False, "dilation": 1}
"""What poolings of PyTorch can be asked for, and what they are not asked for by default."""


def _pool(kind: Callable[..., Module], *known: str) -> Callable[[Any], Module]:
    """``known``: which options layers of this kind have here too."""

    def make(m: Any) -> Module:
        for name, ordinary in ORDINARY.items():
            value = getattr(m, name, ordinary)
            if name not in known and any(
                each != ordinary for each in (value if isinstance(value, tuple) else (value,))
            ):
                raise ValueError(f"{name} is {value!r}, expected {ordinary!r}")
        return kind(m.kernel_size, m.stride, m.padding, **{name: getattr(m, name) for name in known})

    return make


def _gelu(m: Any) -> Module:
    return nn.GELU() if getattr(m, "approximate", "none") == "none" else Applied(F.gelu_tanh)


def _softmax(m: Any) -> Module:
    if m.dim is None:
        raise ValueError("dim is None, expected a dimension")
    return nn.Softmax(m.dim)


def _by(function: str, **options: str) -> Callable[[Any], Module]:
    """A layer that calls one function; ``options``: by name of its arguments, the layer's attributes."""
    return lambda m: Applied(partial(FUNCTIONS[function], **{to: getattr(m, own) for to, own in options.items()}))


def _dropped_paths(m: Any) -> Module:
    share = getattr(m, "drop_prob", getattr(m, "p", 0.0))
    if m.training and share:
        raise ValueError(f"it drops whole samples with probability {share:g}; expected 0, or a module in evaluation")
    return nn.Identity()


LAYERS: dict[str, Callable[[Any], Module]] = {
    "Linear": _linear,
    "Conv1d": _convolution(nn.Conv1d),
    "Conv2d": _convolution(nn.Conv2d),
    "Conv3d": _convolution(nn.Conv3d),
    "ConvTranspose2d": _conv_transpose2d,
    "LSTM": _recurrent(nn.LSTM),
    "GRU": _recurrent(nn.GRU),
    "Embedding": _embedding,
    "Upsample": _upsample,
    "BatchNorm2d": _batch_norm(nn.BatchNorm2d),
    "BatchNorm1d": _batch_norm(nn.BatchNorm1d),
    "InstanceNorm1d": _instance_norm(nn.InstanceNorm1d),
    "InstanceNorm2d": _instance_norm(nn.InstanceNorm2d),
    "InstanceNorm3d": _instance_norm(nn.InstanceNorm3d),
    "GroupNorm": lambda m: nn.GroupNorm(m.num_groups, m.num_channels, m.eps, m.affine),
    "LayerNorm": _layer_norm,
    "RMSNorm": lambda m: nn.RMSNorm(tuple(m.normalized_shape), m.eps, m.elementwise_affine),
    "MaxPool1d": _pool(nn.MaxPool1d, "ceil_mode"),
    "MaxPool2d": _pool(nn.MaxPool2d, "ceil_mode"),
    "MaxPool3d": _pool(nn.MaxPool3d),
    "AvgPool1d": _pool(nn.AvgPool1d, "ceil_mode", "count_include_pad"),
    "AvgPool2d": _pool(nn.AvgPool2d, "ceil_mode", "count_include_pad"),
    "AvgPool3d": _pool(nn.AvgPool3d, "count_include_pad"),
    "AdaptiveAvgPool1d": _by("adaptive_avg_pool1d", output_size="output_size"),
    "AdaptiveAvgPool2d": lambda m: nn.AdaptiveAvgPool2d(m.output_size),
    "AdaptiveAvgPool3d": _by("adaptive_avg_pool3d", output_size="output_size"),
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
    "Mish": lambda m: nn.Mish(),
    "GELU": _gelu,
    "LeakyReLU": lambda m: nn.LeakyReLU(m.negative_slope),
    "PReLU": lambda m: nn.PReLU(m.num_parameters),
    "ELU": lambda m: nn.ELU(m.alpha),
    "Softplus": lambda m: nn.Softplus(m.beta, m.threshold),
    "GLU": lambda m: nn.GLU(m.dim),
    "Hardtanh": _by("hardtanh", min_val="min_val", max_val="max_val"),
    "Softmax": _softmax,
    "LogSoftmax": _by("log_softmax", dim="dim"),
    "Unflatten": lambda m: Applied(lambda x: FUNCTIONS["unflatten"](x, m.dim, m.unflattened_size)),
    "ZeroPad2d": _by("pad", pad="padding"),
    "ConstantPad2d": _by("pad", pad="padding", value="value"),
    "StochasticDepth": _dropped_paths,
    "DropPath": _dropped_paths,
}
"""By the name of the class."""

KNOWN_PACKAGES = ("torch.nn.", "torchvision.", "timm.")
"""Whose classes of these names are what they are called."""

CONTAINERS = (".Sequential", ".ModuleList", ".ModuleDict")
"""Modules of PyTorch that only hold others."""
