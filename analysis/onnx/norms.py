"""Normalisations that exporters take apart: by the root mean square, and of groups of channels."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from analysis.onnx.file import Node
from analysis.onnx.uses import Match, Uses


def last_axes(uses: Uses, node: Node) -> int:
    """Over how many of the last dimensions a reduction is that keeps them; 0 if it is over others."""
    axes: Any = uses.array(node.inputs[1]) if len(node.inputs) > 1 else node.attributes.get("axes")
    if axes is None or node.attributes.get("keepdims", 1) != 1:
        return 0
    found = sorted(int(n) for n in np.asarray(axes).reshape(-1))
    return len(found) if found == list(range(-len(found), 0)) else 0


def _rms_norm(uses: Uses, sqrt: Node) -> Match | None:
    """x / √(mean(x²) + eps), times a weight that is stored."""
    add = uses.made_by(sqrt.inputs[0], "Add")
    if add is None:
        return None
    eps, mean = next(
        ((uses.number(b), uses.made_by(a, "ReduceMean")) for a, b in (add.inputs, add.inputs[::-1])
         if uses.number(b) is not None and uses.made_by(a, "ReduceMean") is not None),
        (None, None),
    )  # fmt: skip
    square = uses.made_by(mean.inputs[0], "Pow", "Mul") if mean is not None else None
    if mean is None or square is None or eps is None or not eps > 0 or not last_axes(uses, mean):
        return None
    x = square.inputs[0]
    centred = uses.made_by(x, "Sub")
    if centred is not None and uses.made_by(centred.inputs[1], "ReduceMean") is not None:
        return None  # the steps of a layer norm, which were not joined
    if not (uses.number(square.inputs[1]) == 2 or (square.op == "Mul" and square.inputs[1] == x)):
        return None
    group = [square, mean, add, sqrt]
    divided = uses.reader(sqrt, "Div")
    reciprocal = uses.reader(sqrt, "Reciprocal")
    if divided is not None and uses.number(divided.inputs[0]) == 1 and divided.inputs[1] == sqrt.outputs[0]:
        reciprocal, divided = divided, None
    if reciprocal is not None:
        group.append(reciprocal)
        normalised = uses.reader(reciprocal, "Mul")
        if normalised is None or uses.other(normalised, reciprocal.outputs[0]) != x:
            return None
    elif divided is not None and divided.inputs == (x, sqrt.outputs[0]):
        normalised = divided
    else:
        return None
    group.append(normalised)
    inputs: tuple[str, ...] = (x,)
    scaled = uses.reader(normalised, "Mul")
    if scaled is not None:
        weight = uses.other(scaled, normalised.outputs[0])
        stored = uses.weight(weight)
        if stored is not None and len(stored.shape) == last_axes(uses, mean):
            inputs, group = (x, weight), [*group, scaled]
    if not uses.closed(group):
        return None
    attributes = {"axes": last_axes(uses, mean), "epsilon": eps}
    return replace(sqrt, op="torch.rms_norm", inputs=inputs, outputs=group[-1].outputs, attributes=attributes), group


def _group_norm(uses: Uses, norm: Node) -> Match | None:
    """Groups laid out as channels of an InstanceNormalization without weights of its own, then weight and bias."""
    before = uses.made_by(norm.inputs[0], "Reshape")
    after = uses.reader(norm, "Reshape")
    scale, shift = (_values(uses, name) for name in norm.inputs[1:3])
    if before is None or after is None or scale is None or shift is None or not uses.alone(norm.inputs[0]):
        return None
    shape = uses.array(before.inputs[1])
    if shape is None or shape.size != 3 or int(shape[1]) != scale.size or (scale != 1).any() or (shift != 0).any():
        return None
    attributes = {"num_groups": int(shape[1]), "epsilon": norm.attributes.get("epsilon", 1e-5)}
    group = [before, norm, after]
    inputs: tuple[str, ...] = (before.inputs[0],)
    scaled = uses.reader(after, "Mul")
    shifted = uses.reader(scaled, "Add") if scaled is not None else None
    if scaled is not None and shifted is not None:
        weight, bias = uses.other(scaled, after.outputs[0]), uses.other(shifted, scaled.outputs[0])
        stored = uses.weight(weight), uses.weight(bias)
        plain = [_values(uses, name) for name in (weight, bias)]
        if all(v is not None and (v == n).all() for v, n in zip(plain, (1, 0), strict=True)) and None in stored:
            group = [*group, scaled, shifted]  # what the exporter puts in place of weights that are not there
        if stored[0] is not None and stored[1] is not None and all(_by_channel(w.shape) for w in stored if w):
            group, inputs = [*group, scaled, shifted], (before.inputs[0], weight, bias)
    if not uses.closed(group):
        return None
    return replace(norm, op="torch.group_norm", inputs=inputs, outputs=group[-1].outputs, attributes=attributes), group


def _values(uses: Uses, name: str) -> np.ndarray | None:
    """Values of a constant, a parameter or not."""
    stored = uses.weight(name)
    if stored is not None:
        return np.asarray(stored.constant.load())
    return uses.array(name)


def _by_channel(shape: tuple[int, ...]) -> bool:
    """(C, 1, ...), or (C,) for vectors."""
    return len(shape) >= 1 and math.prod(shape) == shape[0]


NORMS = (("Sqrt", _rms_norm), ("InstanceNormalization", _group_norm))
"""The operation that a group is recognised by, and the function that looks around it."""
