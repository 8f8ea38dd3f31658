"""Activation functions that exporters take apart: products of a value with a function of itself, or of its other half.

x·σ(x) is SiLU, x·hardsigmoid(x) Hardswish, x·tanh(softplus(x)) Mish, and a·σ(b) of two halves the gated unit. GELU by
tanh takes eight nodes.
"""

from __future__ import annotations

import math
from dataclasses import replace

from analysis.onnx.file import Node
from analysis.onnx.uses import Match, Uses

SINCE = {"HardSwish": 14, "LayerNormalization": 17, "Gelu": 20}
"""The first operator set for which PyTorch's exporter writes each: from it on steps are those of the network itself."""


def _gated(uses: Uses, gate: Node, x: str) -> Node | None:
    """The product, and nothing else, that reads a gate of x."""
    product = uses.reader(gate, "Mul")
    return product if product is not None and uses.other(product, gate.outputs[0]) == x else None


def _silu(uses: Uses, sigmoid: Node) -> Match | None:
    (x,) = sigmoid.inputs
    product = _gated(uses, sigmoid, x)
    if product is not None:
        return replace(product, op="torch.silu", inputs=(x,), attributes={}), [sigmoid, product]
    return _glu(uses, sigmoid)


def _glu(uses: Uses, sigmoid: Node) -> Match | None:
    """Of both halves of a Split, each read here alone."""
    (b,) = sigmoid.inputs
    split, product = uses.made_by(b, "Split"), uses.reader(sigmoid, "Mul")
    if split is None or product is None or len(split.outputs) != 2 or split.outputs[1] != b:
        return None
    a = split.outputs[0]
    sizes = uses.array(split.inputs[1]) if len(split.inputs) > 1 else split.attributes.get("split")
    if sizes is not None and len({int(n) for n in sizes}) > 1:
        return None
    if uses.other(product, sigmoid.outputs[0]) != a or not uses.alone(a) or not uses.alone(b):
        return None
    attributes = {"axis": split.attributes.get("axis", 0)}
    joined = replace(product, op="torch.glu", inputs=(split.inputs[0],), attributes=attributes)
    return joined, [split, sigmoid, product]


def _hardswish(uses: Uses, gate: Node) -> Match | None:
    if gate.opset >= SINCE["HardSwish"]:
        return None
    alpha, beta = gate.attributes.get("alpha", 0.2), gate.attributes.get("beta", 0.5)
    product = _gated(uses, gate, gate.inputs[0])
    if product is None or not math.isclose(alpha, 1 / 6, rel_tol=1e-5) or beta != 0.5:
        return None
    return replace(product, op="HardSwish", inputs=gate.inputs, attributes={}), [gate, product]


def _hard(uses: Uses, clip: Node) -> Match | None:
    """Clip(x + 3, 0, 6): divided by 6 hardsigmoid, and with x among the factors Hardswish."""
    low = uses.number(clip.inputs[1]) if len(clip.inputs) > 1 else clip.attributes.get("min")
    high = uses.number(clip.inputs[2]) if len(clip.inputs) > 2 else clip.attributes.get("max")
    add = uses.made_by(clip.inputs[0], "Add")
    if (low, high) != (0, 6) or add is None or not uses.alone(clip.inputs[0]):
        return None
    threes = [name for name in add.inputs if uses.number(name) == 3]
    x = uses.other(add, threes[0]) if threes else ""
    if not x:
        return None
    divided = uses.reader(clip, "Div") or uses.reader(clip, "Mul")
    if uses.times(divided, 1 / 6) == clip.outputs[0] and divided is not None:
        product = _gated(uses, divided, x) if clip.opset < SINCE["HardSwish"] else None
        if product is not None:
            return replace(product, op="HardSwish", inputs=(x,), attributes={}), [add, clip, divided, product]
        attributes = {"alpha": 1 / 6, "beta": 0.5}
        return replace(divided, op="HardSigmoid", inputs=(x,), attributes=attributes), [add, clip, divided]
    product = _gated(uses, clip, x) if clip.opset < SINCE["HardSwish"] else None
    last = product and (uses.reader(product, "Div") or uses.reader(product, "Mul"))
    if product is None or last is None or uses.times(last, 1 / 6) != product.outputs[0]:
        return None
    return replace(last, op="HardSwish", inputs=(x,), attributes={}), [add, clip, product, last]


def _mish(uses: Uses, softplus: Node) -> Match | None:
    (x,) = softplus.inputs
    tanh = uses.reader(softplus, "Tanh")
    product = _gated(uses, tanh, x) if tanh is not None else None
    if tanh is None or product is None:
        return None
    return replace(product, op="torch.mish", inputs=(x,), attributes={}), [softplus, tanh, product]


def _gelu_tanh(uses: Uses, tanh: Node) -> Match | None:
    """½·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))), the factors in any order, as far as PyTorch's exporter writes that.

    The operator sets from 20 on have the operation, and the exporter for older ones multiplies x three times: whoever
    writes it otherwise runs these steps one by one, and keeps what they do.
    """
    if tanh.opset >= SINCE["Gelu"]:
        return None
    scaled = uses.made_by(tanh.inputs[0], "Mul")
    inner = uses.made_by(uses.times(scaled, math.sqrt(2 / math.pi)) or "", "Add")
    plus_one = uses.reader(tanh, "Add")
    if scaled is None or inner is None or plus_one is None or not any(uses.number(n) == 1 for n in plus_one.inputs):
        return None
    for x, name in (inner.inputs, inner.inputs[::-1]):
        bent = uses.made_by(name, "Mul")
        cube = uses.made_by(uses.times(bent, 0.044715) or "", "Mul")
        if bent is None or cube is None:
            continue
        square = uses.made_by(uses.other(cube, x), "Mul")
        if square is None or tuple(square.inputs) != (x, x):
            continue
        group = [square, cube, bent, inner, scaled, tanh, plus_one]
        ending = _halved(uses, plus_one, x)
        if ending is None:
            continue
        nodes = [*[node for node in ending[:-1] if node not in group], *group, ending[-1]]
        if uses.closed(nodes):
            return replace(ending[-1], op="Gelu", inputs=(x,), attributes={"approximate": "tanh"}), nodes
    return None


def _halved(uses: Uses, value: Node, x: str) -> list[Node] | None:
    """The nodes that make ½·x·value: (½x)·value, or two products in a row."""
    first = uses.reader(value, "Mul")
    if first is None:
        return None
    other = uses.other(first, value.outputs[0])
    half = uses.made_by(other, "Mul", "Div")
    if half is not None and uses.times(half, 0.5) == x:
        return [half, first]
    second = uses.reader(first, "Mul")
    if second is None:
        return None
    rest = uses.other(second, first.outputs[0])
    if (other == x and uses.number(rest) == 0.5) or (rest == x and uses.number(other) == 0.5):
        return [first, second]
    return None


GATES = (
    ("Sigmoid", _silu),
    ("HardSigmoid", _hardswish),
    ("Clip", _hard),
    ("Softplus", _mish),
    ("Tanh", _gelu_tanh),
)
"""The operation that a group is recognised by, and the function that looks around it."""
