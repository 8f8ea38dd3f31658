"""Groups of ONNX nodes that stand for one operation: joined, so that they cost what the operation costs.

Exporters take apart what the operator set of their time does not have: a linear layer of tokens becomes a product and
an addition, GELU five nodes around the error function, layer normalisation nine. Each group is replaced only if
nothing else reads what it computes on the way; whatever is not recognised is costed node by node.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from analysis.onnx.file import Node
from analysis.onnx.gates import GATES, SINCE
from analysis.onnx.layers import Weight, fits_as_bias
from analysis.onnx.norms import NORMS, last_axes
from analysis.onnx.scores import SCORES
from analysis.onnx.uses import Match, Uses


def simplify(nodes: Sequence[Node], constants: Mapping[str, Any], outputs: Iterable[str]) -> list[Node]:
    """The nodes with every recognised group replaced by one node.

    The nodes that compute with constants alone are not among them; ``outputs`` are the values read from outside.
    """
    result, read = list(nodes), list(outputs)
    for op, pattern in (("Erf", _gelu), *GATES, ("Sqrt", _layer_norm), *NORMS, *SCORES, ("MatMul", _linear)):
        if any(node.op == op for node in result):
            uses = Uses(result, constants, read)
            result = _replace(result, (_tried(pattern, uses, node) for node in result if node.op == op))
    return result


def _tried(pattern: Callable[[Uses, Node], Match | None], uses: Uses, node: Node) -> Match | None:
    """A match, if there is one; nodes with too few or too many inputs are none, and refused where they are built."""
    try:
        return pattern(uses, node)
    except (IndexError, ValueError):
        return None


def _replace(nodes: Sequence[Node], matches: Iterable[Match | None]) -> list[Node]:
    changed: dict[int, Node | None] = {}
    for match in matches:
        if match is None or any(id(node) in changed for node in match[1]):
            continue
        changed.update((id(node), None) for node in match[1])
        changed[id(match[1][-1])] = match[0]
    kept = (changed.get(id(node), node) for node in nodes)
    return [node for node in kept if node is not None]


def _linear(uses: Uses, product: Node) -> Match | None:
    """x @ W + b, W (in, out) and b (out,) stored; or W @ x + b, W (out, in) and b (out, 1)."""
    left = [isinstance(uses.constants.get(name), Weight) for name in product.inputs] == [True, False]
    weight, add = uses.constants.get(product.inputs[0 if left else 1]), uses.reader(product, "Add")
    if add is None or not isinstance(weight, Weight) or len(weight.shape) != 2:
        return None
    (bias_name,) = [name for name in add.inputs if name != product.outputs[0]] or [""]
    bias = uses.constants.get(bias_name)
    if not isinstance(bias, Weight) or not fits_as_bias(bias.shape, weight.shape[0 if left else 1], left):
        return None
    joined = replace(product, inputs=(*product.inputs, bias_name), outputs=add.outputs)
    return joined, [product, add]


def _gelu(uses: Uses, erf: Node) -> Match | None:
    """½·x·(1 + erf(x/√2)), the three factors in any order; from operator set 20 on a network's own steps."""
    if erf.opset >= SINCE["Gelu"]:
        return None
    scaled = uses.made_by(erf.inputs[0], "Div", "Mul")
    x = uses.times(scaled, 1 / math.sqrt(2))
    add = uses.reader(erf, "Add")
    if scaled is None or x is None or add is None or uses.count[scaled.outputs[0]] != 1:
        return None
    if not any(uses.number(name) == 1 for name in add.inputs):
        return None
    first = uses.reader(add, "Mul")
    if first is None:
        return None
    (other,) = [name for name in first.inputs if name != add.outputs[0]] or [""]
    half = uses.made_by(other, "Mul", "Div")
    if half is not None and uses.times(half, 0.5) == x and uses.count[other] == 1:
        group = [scaled, erf, add, half, first]
    else:
        second = uses.reader(first, "Mul")
        if second is None:
            return None
        rest = next((name for name in second.inputs if name != first.outputs[0]), "")
        if {other, rest} != {x, other if uses.number(other) == 0.5 else rest} or 0.5 not in map(
            uses.number, (other, rest)
        ):
            return None
        group = [scaled, erf, add, first, second]
    return replace(erf, op="Gelu", inputs=(x,), outputs=group[-1].outputs, attributes={}), group


def _layer_norm(uses: Uses, sqrt: Node) -> Match | None:
    """(x − mean) / √(mean((x − mean)²) + eps) · weight + bias over the last dimension."""
    if sqrt.opset >= SINCE["LayerNormalization"]:
        return None
    add = uses.made_by(sqrt.inputs[0], "Add")
    divide, eps = uses.reader(sqrt, "Div"), None
    if add is None or divide is None or divide.inputs[1] != sqrt.outputs[0]:
        return None
    for variance_name, eps_name in (add.inputs, add.inputs[::-1]):
        eps, variance = uses.number(eps_name), uses.made_by(variance_name, "ReduceMean")
        if eps is not None and variance is not None:
            break
    if eps is None or variance is None or not eps > 0:
        return None
    square = uses.made_by(variance.inputs[0], "Pow", "Mul")
    if square is None or not (uses.number(square.inputs[1]) == 2 or square.inputs[0] == square.inputs[1]):
        return None
    differences = [uses.made_by(node.inputs[0], "Sub") for node in (square, divide)]
    means = [uses.made_by(d.inputs[1], "ReduceMean") if d is not None else None for d in differences]
    if any(m is None for m in means):
        return None
    scale = uses.reader(divide, "Mul")
    shift = uses.reader(scale, "Add") if scale is not None else None
    affine = [] if scale is None else [scale, shift]
    group = [n for n in (*means, *differences, square, variance, add, sqrt, divide, *affine) if n is not None]
    group = list({id(n): n for n in group}.values())
    x = differences[0].inputs[0] if differences[0] is not None else ""
    dims = {last_axes(uses, n) for n in group if n.op == "ReduceMean"}
    sources = {n.inputs[0] for n in group if n.op == "Sub"} | {m.inputs[0] for m in means if m is not None}
    if sources != {x} or len(dims) != 1 or dims == {0} or not uses.closed(group):
        return None
    (k,) = dims
    if scale is None:  # without weights of its own
        if any(reader.op == "Mul" for reader in uses.readers.get(divide.outputs[0], [])):
            return None
        attributes: dict[str, Any] = {"axes": k, "epsilon": eps}
        return replace(divide, op="torch.layer_norm", inputs=(x,), attributes=attributes), group
    if shift is None:
        return None
    weight, bias = (_weight(uses, node, k) for node in (scale, shift))
    if not weight or not bias or uses.constants[weight].shape != uses.constants[bias].shape:
        return None
    attributes = {"axis": -k, "epsilon": eps}
    joined = replace(
        sqrt, op="LayerNormalization", inputs=(x, weight, bias), outputs=shift.outputs, attributes=attributes
    )
    return joined, group


def _weight(uses: Uses, node: Node, dims: int) -> str:
    """The name of the stored array of so many dimensions that a node multiplies with or adds; "" if there is none."""
    stored = (n for n in node.inputs if isinstance(uses.constants.get(n), Weight))
    return next((n for n in stored if len(uses.constants[n].shape) == dims), "")
