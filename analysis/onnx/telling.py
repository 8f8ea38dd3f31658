"""What an ONNX file does not tell of the network that it was made of, as far as the file shows that.

Exporters fold batch norm into the layer before it, and leave dropout out, unless they are told that the network trains.
What these keep is then missing from every account, and the report says so beside the column.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from analysis.onnx.file import Node
from analysis.onnx.gates import SINCE
from analysis.onnx.host import RANDOM
from analysis.onnx.uses import Uses
from analysis.rules.account import Billed

NORMS = (
    *("BatchNormalization", "LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization"),
    *("torch.rms_norm", "torch.group_norm", "torch.layer_norm", "MeanVarianceNormalization", "LRN", "LpNormalization"),
)
ACTIVATIONS = (
    *("Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh"),
    *("Softplus", "Mish", "Swish", "torch.silu", "torch.mish", "Gelu", "Add", "Mul", "MaxPool"),
)
"""What stands behind a norm, and right behind the layer where the norm was folded into it."""
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
IN_PLACE = ("LeakyRelu", "Elu")
"""PyTorch's functions that keep their result in place of their input where they work in place."""

IN_STEPS = frozenset({
    *("Abs", "Softsign", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum"),
    *("LpNormalization", "LpPool", "MeanVarianceNormalization", "ThresholdedRelu", "Reciprocal"),
})  # fmt: skip
"""Operations that consist of several here, where PyTorch's own may keep other tensors."""
COMPARISONS = ("Less", "LessOrEqual", "Greater", "GreaterOrEqual")

JOINED = {
    **{op: (since, op) for op, since in SINCE.items()},
    "torch.silu": (math.inf, "x·sigmoid(x)"),
    "torch.mish": (math.inf, "Mish"),
    "torch.layer_norm": (math.inf, "LayerNormalization"),
    "torch.rms_norm": (math.inf, "RMSNormalization"),
}
"""Operations that files have in steps: the first operator set with the operation, and what to call it."""

ATTENTION = "torch.scaled_dot_product_attention"
FACTORS = {"Mul": (0, 2), "Div": (0, 2), "torch.rms_norm": (1, 2), "RMSNormalization": (1, 2), ATTENTION: (3, 4)}
"""Operations that keep more where a stored operand trains, and which of their operands those may be."""

HOW = "unless told otherwise (training=TrainingMode.TRAINING, do_constant_folding=False)"


def untold(nodes: Sequence[Node], constants: Mapping[str, Any], outputs: Sequence[str]) -> list[str]:
    """What may be missing from the accounts of a file, one sentence each.

    ``nodes`` are those that depend on an input, groups of them joined; ``constants`` all values that do not.
    """
    found = []
    uses = Uses(nodes, constants, outputs)
    trains, anew = any(_trains(uses, node) for node in nodes), any(node.anew for node in nodes)
    bare = 0 if trains and not anew else _without_norm(uses, nodes)
    if bare:
        some = "one convolution" if bare == 1 else f"{bare} convolutions"
        behind = f"behind {some} of this file" if any(node.op in NORMS for node in nodes) else "in this file"
        how = "the newer one of PyTorch even where a network trains" if trains else f"and leave dropout out, {HOW}"
        found.append(
            f"no batch norm {behind}: exporters fold it into the convolutions, {how}; what they keep is then missing "
            "here"
        )
    elif not trains:
        found.append(f"no dropout in this file: exporters leave it out, {HOW}; what it keeps is then missing here")
    if any(node.op == "Mul" and any(_is_of_gelu(uses, name) for name in node.inputs) for node in nodes):
        found.append("GELU by tanh, in steps: a network may run it as one function of its own, which keeps less")
    if any(node.op == "Transpose" and _may_be_copied(uses, node) for node in nodes):
        found.append(
            "the file does not say whether a value that is also read transposed was copied, as contiguous() does"
        )
    if any(node.op == ATTENTION and _scaled_before(uses, node.inputs[0]) for node in nodes):
        found.append(
            "the file does not say whether queries that are scaled before attention were copied then, as contiguous() "
            "does; the layer behind it would keep its input once more"
        )
    if any(node.op == ATTENTION and any(_strided(uses, name) for name in node.inputs[::2][:2]) for node in nodes):
        found.append(
            "attention of values that lie otherwise than in rows: PyTorch's kernels may refuse these, and then the "
            "scores are kept too"
        )
    in_steps = sorted({what for node in nodes if (what := _in_steps(uses, node))})
    if in_steps:
        found.append(f"{', '.join(in_steps)}: PyTorch's own operation may keep other tensors than the steps do here")
    joined = sorted({JOINED[node.op][1] for node in nodes if node.op in JOINED and node.opset < JOINED[node.op][0]})
    if joined:
        found.append(
            f"{', '.join(joined)}: taken for PyTorch's one operation; a network that runs these steps itself keeps more"
        )
    in_place = sorted({node.op for node in nodes if node.op in IN_PLACE})
    if any(node.op in ("LSTM", "GRU") for node in nodes):
        found.append("LSTM and GRU: PyTorch's own kernels keep another workspace than these operations")
    if in_place:
        found.append(f"{' and '.join(in_place)}: the file does not say whether in place, where PyTorch keeps less")
    return found


def _in_steps(uses: Uses, node: Node) -> str:
    """What a node is part of that PyTorch has as one operation, and this library, or the file, in steps."""
    op = node.op
    if op in IN_STEPS:
        return op
    if op in ("Max", "Min") and len(node.inputs) > 1 and all(uses.array(name) is None for name in node.inputs):
        return op
    if op == "Pad" and node.attributes.get("mode", "constant") in ("reflect", "edge"):
        return f"Pad ({node.attributes['mode']})"
    if op == "Div" and uses.number(node.inputs[0]) == 1:
        root = uses.made_by(node.inputs[1], "Sqrt")
        return "1 / √x" if root is not None and not _of_a_shape(uses, root.inputs[0]) else ""
    if op == "Log" and uses.made_by(node.inputs[0], "Sigmoid", "Softmax"):
        return "Log of a Sigmoid or Softmax"
    if op == "Where":
        either = uses.made_by(node.inputs[0], "Or", "And")
        conditions = list(either.inputs if either is not None else node.inputs[:1])
        casts = [uses.made_by(name, "Cast") for name in conditions]
        conditions = [name if cast is None else cast.inputs[0] for name, cast in zip(conditions, casts, strict=True)]
        if any(uses.made_by(name, *COMPARISONS) for name in conditions):
            return "Where of a comparison"
    if op in ("ReduceMean", "ReduceSum"):
        square = uses.made_by(node.inputs[0], "Mul", "Pow")
        difference = uses.made_by(square.inputs[0], "Sub") if square is not None else None
        if difference is not None and any(uses.made_by(name, "ReduceMean") for name in difference.inputs):
            return "a variance"
    return ""


def _of_a_shape(uses: Uses, name: str) -> bool:
    """Whether a value is one of the sizes of another, as the scale of attention is."""
    node = uses.made_by(name, "Cast", "Slice", "Gather", "Squeeze", "Shape")
    return node is not None and (node.op == "Shape" or _of_a_shape(uses, node.inputs[0]))


def _may_be_copied(uses: Uses, transposed: Node) -> bool:
    """Whether a convolution reads what others, too, keep in another order of its dimensions."""
    readers = uses.readers.get(transposed.outputs[0], [])
    others = len(readers) > 1 or not uses.alone(transposed.inputs[0])
    return others and any(reader.op == "Conv" for reader in readers)


def _strided(uses: Uses, name: str) -> bool:
    """Whether the last dimension of a value was another one before it was transposed."""
    node = uses.made_by(name, "Transpose", "Unsqueeze", "Squeeze", "Slice", "Split", "Gather")
    if node is None or node.op != "Transpose":
        return node is not None and _strided(uses, node.inputs[0])
    order = list(node.attributes.get("perm", ()))
    return not order or order[-1] != len(order) - 1


def _scaled_before(uses: Uses, query: str) -> bool:
    """Whether queries are multiplied with a number before they are shared out to heads."""
    heads = uses.made_by(query, "Transpose")
    shared = None if heads is None else uses.made_by(heads.inputs[0], "Reshape")
    scaled = None if shared is None else uses.made_by(shared.inputs[0], "Mul")
    return scaled is not None and any(uses.number(name) is not None for name in scaled.inputs)


def _is_of_gelu(uses: Uses, name: str) -> bool:
    value = uses.number(name)
    return value is not None and math.isclose(value, math.sqrt(2 / math.pi), rel_tol=1e-5)


def lost_statistics(bills: Mapping[str, Sequence[Billed]]) -> str:
    """What PyTorch's column lacks because the batch norms of a file keep to their statistics; empty up to a hundredth.

    A file that was exported as its network trains takes the statistics of the batch, and PyTorch then keeps a mean and
    a deviation of each channel.
    """
    lost = [
        (2 * sum(bill.record.inputs[-1].nbytes for bill in of if bill.record.op == "batch_norm" and bill.pytorch_bytes),
         sum(bill.pytorch_bytes for bill in of))
        for of in bills.values()
    ]  # fmt: skip
    most, kept = max(lost, key=lambda pair: pair[0] / max(pair[1], 1), default=(0, 1))
    if 100 * most <= kept:
        return ""
    return (
        f"batch norms keep to their statistics here; with those of the batch PyTorch keeps {most:,} bytes more, a mean "
        "and a deviation of each channel"
    )


def left_frozen(stored: Collection[str]) -> list[str]:
    """What a report says of arrays that belong to no layer, so that no selection of layers trains them."""
    if not stored:
        return []
    return [
        f"{len(stored)} of the stored arrays belong to no layer and do not train here (factors of activations, biases "
        "of attention): a network that trains them keeps more"
    ]


def _trains(uses: Uses, node: Node) -> bool:
    """Whether a node is there only because the network was exported as it trains."""
    if node.op == "BatchNormalization":
        return bool(node.attributes.get("training_mode", 0))
    if node.op == "Dropout":
        if node.opset < 12:
            return not node.attributes.get("is_test", 0) and node.opset < 7
        mode = uses.array(node.inputs[2]) if len(node.inputs) > 2 else None
        return bool(mode is not None and np.all(mode))
    return node.op in RANDOM


def _without_norm(uses: Uses, nodes: Sequence[Node]) -> int:
    """How many layers an activation follows at once.

    Linear layers count in networks without convolutions and norms alone: in others they never had one.
    """
    convolutions = any(node.op in ("Conv", "ConvTranspose") for node in nodes)
    if not convolutions and any(node.op in NORMS for node in nodes):
        return 0
    kinds = LAYERS[:2] if convolutions else LAYERS
    layers = [node for node in nodes if node.op in kinds]
    return sum(any(reader.op in ACTIVATIONS for reader in uses.readers.get(node.outputs[0], [])) for node in layers)
