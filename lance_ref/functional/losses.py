"""Loss functions."""
# mypy: disable-error-code="override"

from __future__ import annotations

from typing import Any

import numpy as np

from lance_ref.engine.arguments import Context, Gradients, operands, require_floating, smallest_unsigned
from lance_ref.engine.autograd import Function
from lance_ref.engine.tensor import Shape, Tensor, as_tensor

REDUCTIONS = ("mean", "sum")


class CrossEntropy(Function):
    """L = −Σ_b log p[b, target_b] (divided by B for the mean), p = softmax(logits); dL/dlogits = p − onehot."""

    op = "cross_entropy"

    @staticmethod
    def output_shape(x: Tensor, target: Tensor, reduction: str) -> Shape:
        require_floating("cross_entropy", x=x)
        if x.ndim != 2 or 0 in x.shape:
            raise ValueError(f"cross_entropy: x has shape {x.shape}, expected (B, K) scores, B and K at least 1")
        if target.dtype.kind not in "iu":
            raise TypeError(f"cross_entropy: target has dtype {target.dtype}, expected integer labels")
        if target.shape != x.shape[:1]:
            raise ValueError(
                f"cross_entropy: target has shape {target.shape}, expected {x.shape[:1]} for x of shape {x.shape}"
            )
        if not target.is_meta:
            labels = target.data
            outside = np.flatnonzero((labels < 0) | (labels >= x.shape[1]))
            if outside.size:
                first = outside[0]
                raise ValueError(
                    f"cross_entropy: target[{first}] is {labels[first]}, expected labels in [0, {x.shape[1]})"
                )
        return ()

    @staticmethod
    def forward(ctx: Context, x: np.ndarray, target: np.ndarray, reduction: str) -> np.ndarray:
        B, K = x.shape
        scores = x - x.max(axis=1, keepdims=True)  # (B, K)
        of_target = scores[np.arange(B), target]  # (B,)
        np.exp(scores, out=scores)
        total = scores.sum(axis=1, keepdims=True)  # (B, 1)
        losses = np.log(total[:, 0]) - of_target
        if ctx.needs_input_grad[0]:
            scores /= total
            ctx.mean = reduction == "mean"
            ctx.save_for_backward(probabilities=scores, labels=target.astype(smallest_unsigned(K - 1)))
        return np.asarray(losses.mean() if reduction == "mean" else losses.sum())

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        probabilities, labels = ctx["probabilities"], ctx["labels"]
        B = len(labels)
        grad = probabilities.copy()
        grad[np.arange(B), labels] -= 1
        grad *= grad_output / B if ctx.mean else grad_output
        return grad, None


class MseLoss(Function):
    """L = Σ (a − b)² (divided by the number of elements for the mean)."""

    op = "mse_loss"

    @staticmethod
    def output_shape(a: Tensor, b: Tensor, reduction: str) -> Shape:
        require_floating("mse_loss", a=a, b=b)
        if a.shape != b.shape or a.size == 0:
            raise ValueError(f"mse_loss: a has shape {a.shape} and b {b.shape}, expected equal, non-empty shapes")
        return ()

    @staticmethod
    def forward(ctx: Context, a: np.ndarray, b: np.ndarray, reduction: str) -> np.ndarray:
        difference = np.asarray(a - b)
        ctx.scale = 2 / difference.size if reduction == "mean" else 2
        ctx.save_for_backward(difference=difference)
        squares = np.square(difference)
        return np.asarray(squares.mean() if reduction == "mean" else squares.sum())

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        grad = np.asarray(ctx["difference"] * (ctx.scale * grad_output))
        needs_a, needs_b = ctx.needs_input_grad
        return grad if needs_a else None, np.asarray(-grad) if needs_b else None


def cross_entropy(x: Any, target: Any, reduction: str = "mean") -> Tensor:
    """Cross-entropy of softmax(x) with integer labels, computed without overflow.

    Parameters
    ----------
    x : Tensor (B, K)
        Scores before softmax.
    target : integer array, list or Tensor (B,)
        Labels in [0, K).
    reduction : {"mean", "sum"}
        Over the batch.

    Raises
    ------
    ValueError, TypeError
        If shapes or dtypes do not fit, or a label is out of range.
    """
    labels = target if isinstance(target, Tensor) else Tensor(np.asarray(target))
    return CrossEntropy.apply(as_tensor(x), labels, reduction=_checked("cross_entropy", reduction))


def mse_loss(a: Any, b: Any, reduction: str = "mean") -> Tensor:
    """Squared difference of prediction and target, of one shape; both may need gradients.

    ``reduction``, "mean" or "sum", is over all elements.
    """
    return MseLoss.apply(*operands(a, b), reduction=_checked("mse_loss", reduction))


def _checked(op: str, reduction: str) -> str:
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction is {reduction!r}, expected one of {REDUCTIONS}")
    return reduction
