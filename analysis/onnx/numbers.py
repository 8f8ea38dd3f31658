"""What the operations of an ONNX file share in reading their operands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lance_ref.engine.tensor import Tensor

Inputs = Sequence[Any]
"""Tensors, small arrays, or None for what is absent."""


def number(value: Any, what: str, default: float | None = None) -> float:
    """The one number of an array."""
    if value is None and default is not None:
        return default
    array = np.zeros(0) if isinstance(value, Tensor) else np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "iufb":
        raise ValueError(f"{what} is not one number, known beforehand")
    return float(array.reshape(()))


def operand(value: Any, like: Tensor) -> Any:
    """An array beside a Tensor: a number where it has one element, else a Tensor of the same type."""
    if isinstance(value, np.ndarray):
        if value.size == 1 and value.ndim <= like.ndim:
            return float(value.reshape(()))
        return Tensor(value.astype(like.dtype))
    return value
