"""What a method makes of the step of a PyTorch module: other things kept for the weight gradients of tuned layers.

A method that changes only what layers keep of their inputs is computed on the storages that PyTorch showed: the input
of a tuned layer goes where nobody else holds it, and the method's core comes. Its costs are those of the library's own
layers of the same shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from analysis.rules.layouts import Memory
from analysis.rules.op_cost import Call
from analysis.rules.stores import STORES, StoreCost
from analysis.steps.methods import METHODS
from analysis.steps.register import tuned_layers
from analysis.steps.settings import NotApplicableError, Ranks, Settings, TunedLayer
from analysis.torch_modules.step import Layer, TorchStep
from lance_ref.engine.recording import OpRecord, Value

if TYPE_CHECKING:
    from lance_ref.stores import ActivationStore

INSTEAD = {
    "bias-only": "freeze weights by name, as --freeze '*weight'",
    "checkpoint": "use torch.utils.checkpoint in the module, which is counted as it is",
    "micro-batch": "ask for a smaller --batch",
    "lora": "give the module with its adapters, for instance a model of peft, which is counted as it is",
}
"""Methods that are something else in PyTorch, and what to do instead."""


def check_method(name: str, settings: Settings) -> None:
    """Raise NotApplicableError for a method that changes more of a step than what tuned layers keep."""
    method = METHODS[name]
    if name not in ("bp", "head-only") and (method.make is None or method.runs is not None or method.tune):
        instead = INSTEAD.get(name, "it changes which operations run")
        raise NotApplicableError(f"it is for networks of this library; with PyTorch {instead}")
    if settings.of(method.names).get("update"):
        raise NotApplicableError("training in a subspace (--update) is for networks of this library")


def record_of(layer: Layer, store: Mapping[str, Any] | None = None) -> OpRecord:
    """A call of a layer as an operation of the library."""
    dtype = {2: "float16", 8: "float64"}.get(layer.itemsize, "float32")
    values = (Value(0, layer.shape, dtype, True), Value(1, layer.weight_shape, dtype, True, f"{layer.path}.weight"))
    attributes = {**layer.attributes, "store": {"name": "exact"} if store is None else dict(store)}
    return OpRecord(layer.op, layer.path, values, Value(2, layer.output_shape, dtype, True), attributes)


def layer_macs(layer: Layer) -> int:
    """Multiply-adds of one call, forward."""
    if layer.op == "conv2d":
        return layer.shape[0] * math.prod(layer.output_shape[2:]) * math.prod(layer.weight_shape)
    return math.prod(layer.shape[:-1]) * math.prod(layer.weight_shape)


def store_costs(name: str, step: TorchStep, ranks: Mapping[str, Ranks], settings: Settings) -> dict[str, StoreCost]:
    """What the method's store keeps and computes in one call of every layer that it compresses, by path.

    A layer without ranks, where the method has them, stays exact; so does one of which the store would keep the input.
    """
    costs = {}
    for asked in _asked(name, step, ranks, settings):
        make = METHODS[name].describe or (lambda layer: _made(name, layer).describe())
        layer = step.layers[asked.path]
        store = make(asked)
        record = record_of(layer, store)
        memory = Memory()
        inputs = tuple(memory.of(value) for value in record.inputs)
        call = Call(record, inputs, memory.of(record.output), on_tape=True)
        cost = STORES[store["name"]](call, layer_macs(layer))
        if cost.pytorch is not None:
            costs[asked.path] = cost
    return costs


def real_stores(
    name: str, step: TorchStep, ranks: Mapping[str, Ranks], settings: Settings
) -> dict[str, tuple[ActivationStore, tuple[int, ...]]]:
    """The activation store that the method puts into every layer that it compresses, by path, and its input's shape."""
    compressed = store_costs(name, step, ranks, settings)
    asked = _asked(name, step, ranks, settings)
    return {layer.path: (_made(name, layer), layer.shape) for layer in asked if layer.path in compressed}


def _asked(name: str, step: TorchStep, ranks: Mapping[str, Ranks], settings: Settings) -> Iterator[TunedLayer]:
    """The layers for which the method has a store: all that it knows, or those with ranks where it has ranks."""
    method, layers = METHODS[name], step.compressible
    if method.make is None:
        return iter(())
    paths = layers if method.ranks is None else [path for path in layers if path in ranks]
    dtype = step.dtype if step.dtype in ("float32", "float64") else "float32"
    return tuned_layers(dtype, {path: layers[path].shape for path in paths}, ranks, settings)


def _made(name: str, layer: TunedLayer) -> ActivationStore:
    make = METHODS[name].make
    if make is None:
        raise ValueError(f"method {name!r} has no activation store")
    return make(layer)


def paper_bytes(layer: Layer) -> int:
    """Of the inputs of a layer in all of its calls, as the papers count them."""
    return layer.calls * math.prod(layer.shape) * layer.itemsize
