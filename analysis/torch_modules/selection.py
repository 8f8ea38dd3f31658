"""Which parameters of a PyTorch module train: as they are, without those frozen by name, or those of some layers."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Sequence
from typing import Any

from analysis.torch_modules.step import Layer
from lance_ref.nn.selection import select_paths


def weighted_layers(module: Any) -> dict[str, Any]:
    """Linear and convolution layers by path, in order of registration, as ``lance_ref.tune`` would number them."""
    from torch import nn

    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return {path: part for path, part in module.named_modules() if isinstance(part, kinds) or _is_conv1d(part)}


def _is_conv1d(part: Any) -> bool:
    """The linear layer of GPT-2, whose weight lies transposed."""
    kind = type(part)
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def freeze(module: Any, patterns: Iterable[str]) -> None:
    """Parameters whose names match get no gradient.

    Raises ValueError if a pattern matches none.
    """
    for pattern in patterns:
        matching = [p for name, p in module.named_parameters() if fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            names = [name for name, _ in module.named_parameters()]
            listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            raise ValueError(f"--freeze {pattern!r} matches no parameter, expected a glob of {listed}")
        for parameter in matching:
            parameter.requires_grad_(False)


def tune(module: Any, selection: str | Sequence[str]) -> None:
    """Selected layers and the head train, everything else does not.

    ``selection`` is as for :func:`lance_ref.tune`; the mode of batch norm stays what it is. Raises ValueError if the
    selection fits nothing.
    """
    layers = weighted_layers(module)
    if not layers:
        raise ValueError(f"module has no linear or convolution layer to tune, it is a {type(module).__name__}")
    *body, head = layers
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    for path in (*select_paths(body, head, selection), head):
        for parameter in layers[path].parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)


def training_layers(module: Any) -> dict[str, Any]:
    """The weighted layers whose weight trains."""
    found = {}
    for path, layer in weighted_layers(module).items():
        weight = getattr(layer, "weight", None)
        if weight is not None and weight.requires_grad:
            found[path] = layer
    return found


def described(
    path: str, layer: Any, shapes: set[tuple[tuple[int, ...], tuple[int, ...]]], calls: int, itemsize: int
) -> Layer:
    """A layer that ran, as methods see it.

    ``shapes`` are those of input and output in all of its calls. A linear layer on maps, (B, H, W, C), is one on
    tokens (B, H·W, C).
    """
    from torch import nn

    shape, output = next(iter(shapes))
    weight = tuple(layer.weight.shape)
    exact = "its inputs have several shapes, and factors fit one" if len(shapes) > 1 else ""
    if isinstance(layer, nn.Conv2d) and len(shape) == 4:
        attributes = {name: getattr(layer, name) for name in ("groups", "stride", "dilation")}
        return Layer(path, "conv2d", shape, weight, output, attributes, itemsize, calls, exact)
    if isinstance(layer, nn.Linear) or _is_conv1d(layer):
        weight = weight[::-1] if _is_conv1d(layer) else weight
        exact = exact or ("" if len(shape) > 1 else "its input has one dimension")
        return Layer(path, "linear", on_tokens(shape), weight, on_tokens(output), {}, itemsize, calls, exact)
    kind = type(layer).__name__
    return Layer(path, kind, shape, weight, output, {}, itemsize, calls, exact or f"no method knows {kind}")


def on_tokens(shape: tuple[int, ...]) -> tuple[int, ...]:
    """At most three dimensions: those between the first and the last become one."""
    return (shape[0], math.prod(shape[1:-1]), shape[-1]) if len(shape) > 3 else shape
