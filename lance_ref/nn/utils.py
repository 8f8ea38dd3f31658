"""Gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from lance_ref.algebra import magnitude
from lance_ref.engine.blocks import BLOCK_ELEMENTS
from lance_ref.engine.tensor import Tensor


def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float) -> float:
    """Scale all gradients, in place, so that their joint 2-norm is at most ``max_norm``; gives the norm before.

    Tensors without a gradient are passed over. As in PyTorch the factor is max_norm / (norm + 1e-6), and never above 1.
    Squares are summed in float64.

    Raises
    ------
    ValueError
        If ``max_norm`` is not positive, or the norm is NaN or infinite: scaling could not mend that.
    """
    whole = isinstance(max_norm, (int, float, np.integer, np.floating)) and not isinstance(max_norm, bool)
    if not whole or not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm!r}, expected a positive number (infinity does not clip)")
    tensors = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [tensor.grad for tensor in tensors if tensor.grad is not None]
    with np.errstate(over="ignore", under="ignore"):
        norm = math.sqrt(sum(_sum_of_squares(grad.ravel(order="K")) for grad in grads))
    if not 1e-150 < norm < math.inf:  # squares may have left the range, which those of float32 do not
        norm = math.hypot(*(magnitude.norm(grad) for grad in grads))
    if not math.isfinite(norm):
        raise ValueError(f"the norm of the gradients is {norm}, expected a finite number: the loss has diverged")
    factor = max_norm / (norm + 1e-6)
    if factor < 1:
        for grad in grads:
            grad *= factor
    return norm


def _sum_of_squares(flat: np.ndarray) -> float:
    """The sum of squares in float64, a block at a time, in the order of NumPy's pairwise sum."""
    if flat.size <= BLOCK_ELEMENTS:
        return float(np.square(flat, dtype=np.float64).sum())
    half = flat.size // 2 // 8 * 8
    return _sum_of_squares(flat[:half]) + _sum_of_squares(flat[half:])
