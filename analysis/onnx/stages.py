"""A network in an ONNX file as stages one after the other, each of which takes one value of the graph and gives one.

Stages are what checkpointing runs again, and what a frozen part whose output is kept ends with. They are cut where a
single value goes on from all that was computed before.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from analysis.onnx.host import RANDOM
from lance_ref.engine.autograd import no_grad
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.module import Module
from lance_ref.nn.tracing import record


class Stage(Module):
    """Some steps of a file, from a value to the next one that everything behind it comes from."""

    def __init__(self, net: Any, steps: range, takes: str, gives: str) -> None:
        super().__init__()
        self.__dict__["net"] = net  # no module within: the network holds the stage's layers, and gives them their names
        self.steps, self.takes, self.gives = steps, takes, gives
        within = (net.modules_by_step()[i] for i in steps)
        for number, module in enumerate(dict.fromkeys(module for module in within if module is not None)):
            self.add_module(str(number), module)

    def forward(self, x: Any) -> Any:
        values = {self.takes: x}
        self.net.run_steps(values, self.steps, x.shape[0])
        return values[self.gives]

    def extra_repr(self) -> str:
        return f"{self.takes} -> {self.gives}"


def stages(net: Any) -> list[Module]:
    """The stages of an ``OnnxNet``; empty for one that cannot be cut.

    The frozen layers at its start are one stage. The rest is about the square root of the number of its layers, of as
    many layers each, as far as there are places to cut. A file is not cut that has several inputs or outputs, leaves
    sizes open and has not run yet, or draws random numbers by an operation, which nobody would see.
    """
    shape = net.known_shape
    if len(net.graph.inputs) != 1 or len(net.graph.outputs) != 1 or shape is None:
        return []
    if any(node.op in RANDOM for node in net.graph.nodes):
        return []
    cuts = _cuts(net, shape)
    parameters = [[] if module is None else list(module.parameters()) for module in net.modules_by_step()]
    layers = [bool(of) for of in parameters]
    trains = [any(parameter.requires_grad for parameter in of) for of in parameters]
    first = trains.index(True) if True in trains else len(trains)
    chosen = [cut for cut in cuts if cut <= first][-1:]
    start = chosen[0] if chosen else 0
    behind = sum(layers[start:])
    each = behind / max(1, math.isqrt(behind))
    for cut in cuts:
        if cut > start and sum(layers[(chosen or [0])[-1] : cut]) >= each:
            chosen.append(cut)
    if not chosen:
        return []
    borders = [0, *chosen, len(trains)]
    names = [net.graph.inputs[0].name, *(cuts[cut] for cut in chosen), net.graph.outputs[0]]
    spans = zip(pairwise(borders), pairwise(names), strict=True)
    return [Stage(net, range(start, stop), takes, gives) for (start, stop), (takes, gives) in spans]


def _cuts(net: Any, shape: tuple[int, ...]) -> dict[int, str]:
    """By number of a step: the only value that is left before it, if that has the images in its first dimension."""
    cuts = {}
    with record(), no_grad():  # aside: these operations are not the network's own
        x = Tensor.meta(shape, net.input_dtype)
        values: dict[str, Any] = {net.graph.inputs[0].name: x}
        for i in range(len(net.modules_by_step()) - 1):
            net.run_steps(values, range(i, i + 1), shape[0], quietly=True)
            if len(values) == 1:
                ((name, value),) = values.items()
                if isinstance(value, Tensor) and value.ndim and value.shape[0] == shape[0]:
                    cuts[i + 1] = name
    return cuts
