"""What an ONNX file computes with constants alone: done once, when the file is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from analysis.commands.memory import check_memory
from analysis.onnx.file import Graph, Node
from analysis.onnx.host import HOST, MAX_ELEMENTS, RANDOM, evaluate
from analysis.onnx.layers import Weight
from analysis.onnx.recurrent import ORDER as RECURRENT
from analysis.onnx.tensor import Constant, shown

EXPECTED = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, MemoryError)
"""What reading a file and running a graph may raise."""

LITERAL = ("Resize", "Upsample", *RANDOM)
"""Operations whose stored numbers say what to do, and are no weights."""

CUTTING = ("Slice", "Concat", "Unsqueeze", "Squeeze", "Transpose", "Reshape", "Identity")
"""Operations that move the numbers of a weight about."""

MAX_FOLDED = 2**26
"""Elements of all arrays that are computed from constants alone."""

MAX_FILLED = 2**27
"""Elements of a weight that a file fills with one number; they are made only where numbers are needed."""


@contextmanager
def at(graph: Graph, node: Node) -> Iterator[None]:
    """Errors say where."""
    try:
        yield
    except EXPECTED as error:
        text = " ".join(str(error).split()) or type(error).__name__
        if text.startswith(shown(graph.file)):
            raise ValueError(text) from None
        raise ValueError(f"{shown(graph.file)}: {node}: {text[:500]}") from None


def put_together(nodes: Sequence[Node], constants: dict[str, Any], live: set[str], graph: Graph) -> list[Node]:
    """The weights of recurrent layers, whose gates exporters cut out and join in another order, as one each.

    They are put into ``constants``; the nodes that made them go.
    """
    maker = {name: node for node in nodes for name in node.outputs}
    stored = dict(constants)

    def array(name: str, with_values: bool) -> np.ndarray:
        value = stored.get(name)
        if isinstance(value, Weight):
            return np.asarray(value.constant.load() if with_values else np.zeros(value.shape, np.int8))
        if value is not None or name not in maker or maker[name].op not in CUTTING:
            return np.asarray(value)
        inputs = [array(each, with_values) if each else None for each in maker[name].inputs]
        if maker[name].op == "Concat":
            return np.concatenate([x for x in inputs if x is not None], maker[name].attributes["axis"])
        return np.asarray(HOST[maker[name].op](maker[name], inputs))

    for node in nodes:
        for name in node.inputs[1:4] if node.op in RECURRENT else ():
            if name in maker and name not in live and maker[name].op in CUTTING:
                with at(graph, node):
                    shape = array(name, False).shape
                loaded = Constant(shape, np.dtype(np.float32), partial(array, name, True))
                constants[name] = Weight(loaded, (name,))
    if not any(node.op in RECURRENT for node in nodes):
        return list(nodes)
    needed, kept = set(graph.outputs), []
    for node in reversed(nodes):
        if any(name in needed and name not in constants for name in node.outputs):
            needed.update(node.inputs)
            kept.append(node)
    return kept[::-1]


def told_apart(nodes: Sequence[Node], constants: dict[str, Any]) -> list[Node]:
    """Rows of numbers that several modules read, as one for each: an exporter stores equal ones once.

    Fresh scales and biases are ones and zeros everywhere. A module that runs twice has one path, and keeps its own.
    """
    scopes: dict[Any, set[str]] = {}
    for node in nodes:
        for weight in (constants.get(name) for name in node.inputs):
            if isinstance(weight, Weight) and weight.source is None and len(weight.shape) == 1:
                scopes.setdefault(weight.key, set()).add(node.scope)
    several = {key for key, found in scopes.items() if len(found) > 1 and "" not in found}
    result = []
    for node in nodes:
        own = {}
        for name in node.inputs:
            weight = constants.get(name)
            if isinstance(weight, Weight) and weight.key in several:
                own[name] = f"{name}/{node.scope}"
                constants.setdefault(own[name], Weight(weight.constant, (own[name],)))
        result.append(replace(node, inputs=tuple(own.get(name, name) for name in node.inputs)) if own else node)
    return result


def weight_or_array(graph: Graph, name: str, constant: Constant) -> Any:
    """Floating tensors of several numbers are weights; the rest are arrays, if small."""
    if constant.size > 1 and (constant.is_floating or constant.size > MAX_ELEMENTS):
        return Weight(constant, (name,))
    try:
        array = constant.load()
    except OSError as error:
        raise ValueError(f"{shown(graph.file)}: tensor {shown(name)}: {error.strerror}") from None
    return array if array.dtype.kind in "iubf" else array.astype(np.float32)


def _filled(shape: tuple[int, ...], value: float) -> np.ndarray:
    check_memory(4 * math.prod(shape), "a weight that is filled with one number")
    return np.full(shape, value, np.float32)


def folded(node: Node, inputs: list[Any]) -> list[Any] | None:
    """The outputs of a node that has constants alone; None if it must run as an operation on parameters."""
    if node.op in ("QuantizeLinear", "DequantizeLinear") and isinstance(inputs[0], np.ndarray):
        inputs = [Weight.of(inputs[0], node.inputs[0]), *inputs[1:]]
    if node.op == "Constant" and isinstance(node.attributes.get("value"), Constant):
        constant = node.attributes["value"]
        if constant.size > MAX_ELEMENTS and constant.is_floating:
            return [Weight(constant, (node.outputs[0],))]
    if node.op == "ConstantOfShape" and isinstance(inputs[0], np.ndarray):
        shape = tuple(int(n) for n in inputs[0].reshape(-1))
        if MAX_ELEMENTS < math.prod(shape) <= MAX_FILLED and min(shape) >= 0:
            fill = node.attributes.get("value")
            value = float(np.asarray(fill.load()).reshape(-1)[0]) if fill is not None else 0.0
            filled = Constant(shape, np.dtype(np.float32), partial(_filled, shape, value))
            return [Weight(filled, (node.outputs[0],))]
    if any(isinstance(x, Weight) for x in inputs):
        if node.op in ("Shape", "Size"):
            return evaluate(node, inputs)
        return Weight.folded(node, inputs)
    return evaluate(node, inputs) if node.op in HOST else Weight.folded(node, inputs)
