"""The loss of a traced or measured step, of whatever the net gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lance_ref import functional as F
from lance_ref.engine.tensor import Tensor


def outputs_of(result: Any) -> list[Tensor]:
    """The floating tensors in what a net gives: one, or a list, tuple or mapping of them, one in the other."""
    if isinstance(result, Tensor):
        return [result] if result.dtype.kind == "f" else []
    parts = result.values() if isinstance(result, Mapping) else result if isinstance(result, (list, tuple)) else ()
    return [tensor for part in parts for tensor in outputs_of(part)]


def is_scores(result: Any, batch: int) -> bool:
    """Whether a result is (batch, classes): what cross-entropy takes."""
    return isinstance(result, Tensor) and result.ndim == 2 and result.shape[0] == batch


def loss_of(result: Any, labels: Tensor) -> Tensor:
    """Mean cross-entropy of (batch, classes); of any other result the sum of all numbers of all outputs."""
    if is_scores(result, labels.shape[0]):
        return F.cross_entropy(result, labels)
    outputs = [output for output in outputs_of(result) if output.requires_grad] or outputs_of(result)
    total = F.sum(outputs[0])
    for output in outputs[1:]:
        total = total + F.sum(output)
    return total
