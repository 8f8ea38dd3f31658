"""Attention that PyTorch computes in one operation, and its exporters write as two products around a softmax.

``scaled_dot_product_attention`` is told from attention that a network writes out by its two factors: the exporter
scales queries and keys by the root of the scale each.
"""

from __future__ import annotations

from dataclasses import replace

from analysis.onnx.file import Node
from analysis.onnx.uses import Match, Uses


def _attention(uses: Uses, softmax: Node) -> Match | None:
    """softmax(s₁q · s₂kᵀ + mask) · v"""
    if softmax.attributes.get("axis", -1 if softmax.opset >= 13 else 1) not in (-1, 3):
        return None
    last = uses.reader(softmax, "MatMul")
    if last is None or last.inputs[0] != softmax.outputs[0]:
        return None
    scores, group, mask = uses.made_by(softmax.inputs[0], "MatMul", "Add"), [softmax, last], ""
    if scores is not None and scores.op == "Add":
        added = scores
        scores = next((m for name in added.inputs if (m := uses.made_by(name, "MatMul"))), None)
        mask = uses.other(added, scores.outputs[0]) if scores is not None else ""
        group.insert(0, added)
        if not mask:
            return None
    if scores is None:
        return None
    scaled = [uses.made_by(name, "Mul") for name in scores.inputs]
    q, k = scaled
    if q is None or k is None or uses.made_by(q.inputs[0], "Softmax"):
        return None
    factors = [next((name for name in node.inputs if _is_factor(uses, name)), "") for node in (q, k)]
    operands = [uses.other(node, factor) for node, factor in zip((q, k), factors, strict=True)]
    group = [q, k, scores, *group]
    if not all(factors) or not all(operands) or not uses.closed(group):
        return None
    inputs = (operands[0], operands[1], last.inputs[1], mask, *factors)
    return replace(last, op="torch.scaled_dot_product_attention", inputs=inputs, attributes={}), group


def _safe_softmax(uses: Uses, is_nan: Node) -> Match | None:
    """Zeros in place of NaN in the result of a softmax: PyTorch's attention takes a softmax that gives those itself."""
    (name,) = is_nan.inputs
    softmax, where = uses.made_by(name, "Softmax"), uses.reader(is_nan, "Where")
    if softmax is None or where is None or where.inputs[0] != is_nan.outputs[0] or where.inputs[2] != name:
        return None
    if uses.number(where.inputs[1]) != 0 or uses.count[name] != 2:
        return None
    return replace(softmax, outputs=where.outputs), [softmax, is_nan, where]


def _is_factor(uses: Uses, name: str) -> bool:
    """A number: a constant, or the root that the exporter takes of a scale made from a shape."""
    if uses.number(name) is not None:
        return True
    node = uses.made_by(name, "Sqrt")
    for _ in range(8):  # Sqrt, Cast, Div, Sqrt, Cast, Slice, Shape
        if node is None:
            return False
        if node.op == "Shape":
            return True
        node = next((made for n in node.inputs if (made := uses.maker.get(n)) is not None), None)
    return False


SCORES = (("IsNaN", _safe_softmax), ("Softmax", _attention))
"""The operation that a group is recognised by, and the function that looks around it."""
