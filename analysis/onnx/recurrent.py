"""LSTM and GRU of an ONNX file, as the library's recurrent layers."""

from __future__ import annotations

from typing import Any

import numpy as np

from analysis.onnx.file import Node
from lance_ref import functional as F
from lance_ref import nn
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.init import shapes_only
from lance_ref.nn.module import Module, Parameter

ORDER = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2)}
"""Which of ONNX's gates (i, o, f, c and z, r, h) stands where in PyTorch's order (i, f, g, o and r, z, n)."""

_FUNCTIONS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh")}


class Recurrent(Module):
    """One layer, of one or two directions, on (T, B, I); its results are ONNX's, (T, directions, B, H) and states."""

    def __init__(self, node: Node, input_size: int, hidden_size: int, directions: int, bias: bool) -> None:
        super().__init__()
        kind: Any = nn.LSTM if node.op == "LSTM" else nn.GRU
        self.inner = kind(input_size, hidden_size, bias=bias, bidirectional=directions == 2)
        self.directions, self.hidden_size, self.is_lstm = directions, hidden_size, node.op == "LSTM"

    def forward(self, x: Tensor, h: Any = None, c: Any = None) -> Any:
        given = None
        if h is not None or c is not None:
            h, c = (_state(s, x, (self.directions, x.shape[1], self.hidden_size)) for s in (h, c))
            given = (h, c) if self.is_lstm else h
        y, states = self.inner(x, given)
        T, B, _ = y.shape
        apart = F.permute(F.reshape(y, (T, B, self.directions, self.hidden_size)), (0, 2, 1, 3))
        return [apart, *(states if self.is_lstm else (states,))]


def _state(state: Any, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A state that is given, or zeros."""
    if isinstance(state, Tensor) and state.requires_grad:
        return state
    if x.is_meta:
        return Tensor.meta(shape, x.dtype)
    if state is None:
        return Tensor(np.zeros(shape, x.dtype))
    return Tensor(np.asarray(state.data if isinstance(state, Tensor) else state).astype(x.dtype))  # each its own copy


def arrays_of(node: Node, W: np.ndarray, R: np.ndarray, B: np.ndarray | None) -> dict[str, np.ndarray]:
    """The state dict of the inner layer: ONNX's weights, (directions, gates·H, ...), gates in PyTorch's order."""
    order = ORDER[node.op]

    def turned(rows: np.ndarray) -> np.ndarray:
        parts = np.split(rows, len(order))
        return np.concatenate([parts[i] for i in order])

    arrays = {}
    for d in range(len(W)):
        prefix = f"l0{'_reverse' if d else ''}"
        arrays[f"{prefix}.ih.weight"], arrays[f"{prefix}.hh.weight"] = turned(W[d]), turned(R[d])
        if B is not None:
            of_input, of_state = np.split(B[d], 2)
            arrays[f"{prefix}.ih.bias"], arrays[f"{prefix}.hh.bias"] = turned(of_input), turned(of_state)
    return arrays


def check(node: Node, x: list[Any]) -> None:
    """Raise ValueError for what PyTorch's layers do not do."""
    reverse = node.attributes.get("direction", "forward")
    if reverse not in ("forward", "bidirectional"):
        raise ValueError(f"direction is {reverse!r}, expected 'forward' or 'bidirectional'")
    for name, plain in (("clip", None), ("input_forget", 0), ("layout", 0)):
        if node.attributes.get(name, plain) != plain:
            raise ValueError(f"{name} is {node.attributes[name]!r}, expected {plain!r}")
    if node.op == "GRU" and not node.attributes.get("linear_before_reset", 0):
        raise ValueError("linear_before_reset is 0, expected 1, as PyTorch has it")
    functions = node.attributes.get("activations")
    if functions and tuple(functions) != _FUNCTIONS[node.op] * (2 if reverse != "forward" else 1):
        raise ValueError(f"activations are {list(functions)}, expected {list(_FUNCTIONS[node.op])}")
    if len(x) > 7 and x[7] is not None:
        raise ValueError("it has peepholes")
    if len(x) > 4 and x[4] is not None:
        raise ValueError("the sequences have lengths of their own")


def layer(node: Node, x: list[Any], with_weights: bool) -> Recurrent:
    """The layer of a node whose weights are stored; ``x`` are its inputs, None for those that are absent or computed.

    Raises ValueError for weights that are not stored, that do not fit each other, or what PyTorch's layers do not do.
    """
    check(node, x)
    W, R, B = (*x[1:], None, None)[:3]
    if W is None or R is None:
        raise ValueError("its weights are not stored in the file")
    (directions, rows, input_size), hidden = W.shape, R.shape[-1]
    gates = len(ORDER[node.op])
    if rows != gates * hidden or R.shape != (directions, rows, hidden):
        raise ValueError(f"its weights have shapes {W.shape} and {R.shape}, expected {gates} gates in both")
    if B is not None and B.shape != (directions, 2 * rows):
        raise ValueError(f"its bias has shape {B.shape}, expected {(directions, 2 * rows)}")
    with shapes_only():
        made = Recurrent(node, input_size, hidden, directions, B is not None)
    if with_weights:
        values: list[Any] = [None if v is None else v.constant.load().astype(np.float32) for v in (W, R, B)]
        for name, array in arrays_of(node, *values).items():
            path, _, key = name.rpartition(".")
            setattr(made.inner.get_submodule(path), key, Parameter(array.copy()))
    return made
