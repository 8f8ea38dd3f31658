"""A ``torch.nn.Module`` as a network of this library: :func:`from_torch`."""

from __future__ import annotations

import copy
from typing import Any

from lance_ref import nn
from lance_ref.convert.functions import FUNCTIONS, name_of
from lance_ref.convert.graph import Graph, Part, Ref, Step, with_ends
from lance_ref.convert.layers import Shared, counterpart, is_layer, kind_of, parameter_of
from lance_ref.nn.module import Module


def from_torch(module: Any) -> Module:
    """Layers and weights of a module of PyTorch as a network of this library, to train, to plan and to compile.

    Parameters
    ----------
    module : torch.nn.Module
        A layer, layers one after the other in ``nn.Sequential``, or a module that ``torch.fx`` can trace: of one
        tensor, without branches that depend on values. It is left as it is.

    Returns
    -------
    Module
        With the same paths, weights (copies), dtype, mode, and parameters that train.

    Raises
    ------
    TypeError
        If it is no module of PyTorch.
    ValueError
        If something has no counterpart: all of it is listed.

    Examples
    --------
    ``lance_ref.from_torch(torchvision.models.resnet18())``
    """
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(module).__mro__}
    if "torch.nn.modules.module.Module" not in kinds:
        raise TypeError(f"module is a {type(module).__name__}, expected a torch.nn.Module")
    missing: dict[str, str] = {}
    shared: Shared = {}
    made = _whole(module, "", shared, missing)
    if made is None:
        made = _traced(module, shared, missing)
    if missing:
        listed = "; ".join(f"{what} ({why})" if why else what for what, why in missing.items())
        raise ValueError(f"{type(module).__name__} has parts without a counterpart in this library: {listed}")
    made.training = bool(module.training)
    return made


def _whole(module: Any, path: str, shared: Shared, missing: dict[str, str]) -> Module | None:
    """A layer, or layers one after the other; None where a module of another kind is among them."""
    if type(module).__name__ == "Sequential" and kind_of(module).startswith("torch.nn."):
        children = {
            name: _whole(child, f"{path}.{name}" if path else name, shared, missing)
            for name, child in module.named_children()
        }
        if any(child is None for child in children.values()):
            return None
        made = nn.Sequential(children)
        made.training = bool(module.training)
        return made
    return _layer(module, path, shared, missing) if is_layer(module) else None


def _layer(module: Any, path: str, shared: Shared, missing: dict[str, str]) -> Module:
    """The counterpart of a layer; one that stands for nothing where there is none, which is noted."""
    try:
        return counterpart(module, shared)
    except (ValueError, TypeError) as error:
        missing.setdefault(f"layer {path or '(root)'}: {type(module).__name__}", str(error))
        return nn.Identity()


def _traced(module: Any, shared: Shared, missing: dict[str, str]) -> Module:
    """The steps of a traced graph."""
    import torch.fx

    module = copy.deepcopy(module)  # tracing runs what a forward() does to its own buffers

    class Tracer(torch.fx.Tracer):  # type: ignore[misc, unused-ignore]
        def is_leaf_module(self, m: Any, qualname: str) -> bool:
            return is_layer(m)

    try:
        graph = Tracer().trace(module)
    except Exception as error:  # a user's forward() may raise anything
        raise ValueError(
            f"{type(module).__name__} cannot be traced by torch.fx: {' '.join(str(error).split())}"
        ) from None
    missing.clear()  # of layers that were looked at as a sequence
    numbers: dict[Any, int] = {}
    steps: list[Step] = []
    layers: dict[str, Module] = {}
    result: Any = None
    for node in graph.nodes:
        args, kwargs = (_referring(value, numbers) for value in (node.args, node.kwargs))
        if node.op == "placeholder":
            if not numbers:
                numbers[node] = -1
            elif not node.args:
                missing.setdefault(f"input {node.target!r}", "networks of this library have one input")
            continue
        if node.op == "output":
            result = _referring(node.args[0], numbers)
            continue
        numbers[node] = len(steps)
        if node.op == "call_module":
            if node.target not in layers:
                layers[node.target] = _layer(module.get_submodule(node.target), node.target, shared, missing)
            steps.append(Step("layer", node.target, args, kwargs))
        elif node.op == "get_attr":
            layers.setdefault(node.target, _stored(module, node.target, shared, missing))
            steps.append(Step("parameter", node.target, (), {}))
        else:
            name = name_of(node.target)
            if name not in FUNCTIONS:
                missing.setdefault(f"{node.op.removeprefix('call_')} {name}", "")
            steps.append(Step("function", name, args, kwargs))
    made = Graph(type(module).__name__, with_ends(steps, result), result)
    for path, _ in module.named_modules():  # in PyTorch's order, which says what the last layer is
        if path in layers:
            _place(made, path, layers[path], module)
    for path, value in layers.items():
        if not isinstance(value, Module):
            _place(made, path, value, module)
    return made


def _stored(module: Any, path: str, shared: Shared, missing: dict[str, str]) -> Any:
    """A parameter, or a buffer as one that does not train."""
    owner, _, name = path.rpartition(".")
    value = getattr(module.get_submodule(owner), name)
    try:
        return None if value is None else parameter_of(value, shared)
    except ValueError as error:
        missing.setdefault(f"tensor {path}", str(error))
        return None


def _place(made: Module, path: str, value: Any, module: Any) -> None:
    """Register a layer or parameter under its path, with the modules above it."""
    *above, name = path.split(".")
    place = made
    for depth, part in enumerate(above):
        child = place._modules.get(part)
        if child is None:
            child = Part()
            child.training = bool(module.get_submodule(".".join(above[: depth + 1])).training)
            place.add_module(part, child)
        place = child
    setattr(place, name, value)


def _referring(value: Any, numbers: dict[Any, int]) -> Any:
    """Arguments of a graph with numbers of steps in place of its nodes."""
    if type(value).__name__ == "Node" and type(value).__module__ == "torch.fx.node":
        return Ref(numbers[value]) if value in numbers else None  # an input that is not given has its default
    if isinstance(value, slice):
        return slice(*(_referring(each, numbers) for each in (value.start, value.stop, value.step)))
    if isinstance(value, dict):
        return {name: _referring(each, numbers) for name, each in value.items()}
    if isinstance(value, (tuple, list)):  # lists of torch.fx are of a class of their own
        kind = list if isinstance(value, list) else tuple
        return kind(_referring(each, numbers) for each in value)
    return value
