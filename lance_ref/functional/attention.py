"""Scaled dot-product attention as one operation."""
# mypy: disable-error-code="override"

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lance_ref.engine.arguments import Context, Gradients, positive, require_floating, unbroadcast
from lance_ref.engine.autograd import Function
from lance_ref.engine.counting import matmul, spending_on
from lance_ref.engine.tensor import Shape, Tensor, as_tensor


class ScaledDotProductAttention(Function):
    """Inputs: q, k, v[, mask]; the probabilities are kept, and the operands whose partner needs a gradient."""

    op = "scaled_dot_product_attention"

    @staticmethod
    def output_shape(q: Tensor, k: Tensor, v: Tensor, *mask: Tensor, scale: float, is_causal: bool) -> Shape:
        name = "scaled_dot_product_attention"
        require_floating(name, query=q, key=k, value=v)
        shapes = f"query has shape {q.shape}, key {k.shape} and value {v.shape}"
        if min(q.ndim, k.ndim, v.ndim) < 2 or not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
            raise ValueError(f"{name}: {shapes}, expected (..., L, E), (..., S, E) and (..., S, E_v)")
        if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2] or 0 in (*q.shape[-1:], *k.shape[-2:-1]):
            raise ValueError(f"{name}: {shapes}, expected (..., L, E), (..., S, E) and (..., S, E_v), S and E above 0")
        scores = (*q.shape[:-1], k.shape[-2])
        for m in mask:
            lead = len(scores) - m.ndim
            if lead < 0 or any(n not in (1, full) for n, full in zip(m.shape, scores[lead:], strict=True)):
                raise ValueError(f"{name}: attn_mask has shape {m.shape}, expected one that broadcasts to {scores}")
        return (*q.shape[:-1], v.shape[-1])

    @staticmethod
    def forward(
        ctx: Context, q: np.ndarray, k: np.ndarray, v: np.ndarray, *mask: np.ndarray, scale: float, is_causal: bool
    ) -> np.ndarray:
        scores = matmul(q, np.swapaxes(k, -1, -2))  # (..., L, S)
        scores *= scores.dtype.type(scale)
        if is_causal:
            np.copyto(scores, -np.inf, where=np.tri(*scores.shape[-2:]) == 0)
        for m in mask:
            if m.dtype.kind == "f":
                scores += m
            else:
                np.copyto(scores, -np.inf, where=~m.astype(bool))
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        needs_q, needs_k, _, *_ = ctx.needs_input_grad
        ctx.scale = scale
        ctx.save_for_backward(probabilities=scores)
        for name, position, kept in (("q", 0, needs_k), ("k", 1, needs_q), ("v", 2, needs_q or needs_k)):
            if kept or (position == 2 and any(ctx.needs_input_grad[3:])):
                ctx.save_input(name, position)
        return matmul(scores, v)

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        p, scale = ctx["probabilities"], grad_output.dtype.type(ctx.scale)
        needs = ctx.needs_input_grad
        grads: list[np.ndarray | None] = [None] * len(needs)
        with spending_on("grad_input"):
            if needs[2]:
                grads[2] = matmul(np.swapaxes(p, -1, -2), grad_output)
            if needs[0] or needs[1] or any(needs[3:]):
                g = matmul(grad_output, np.swapaxes(ctx["v"], -1, -2))  # of the probabilities, (..., L, S)
                g -= (g * p).sum(axis=-1, keepdims=True)
                g *= p  # of the scores
                if any(needs[3:]):
                    grads[3] = unbroadcast(g, ctx.input_shapes[3]).copy()
                g *= scale
                if needs[0]:
                    grads[0] = matmul(g, ctx["k"])
                if needs[1]:
                    grads[1] = matmul(np.swapaxes(g, -1, -2), ctx["q"])
        return tuple(grads)


def scaled_dot_product_attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, *, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """softmax(scale·Q Kᵀ + mask)·V over the last two dimensions.

    Parameters
    ----------
    query : Tensor (..., L, E)
    key : Tensor (..., S, E)
    value : Tensor (..., S, E_v)
    attn_mask : Tensor that broadcasts to (..., L, S), optional
        Booleans, False where nothing is to be looked at, or numbers that are added to the scores.
    is_causal : bool
        Whether place i looks at places up to i alone; not together with a mask.
    scale : float, optional
        1/√E by default.

    Returns
    -------
    Tensor (..., L, E_v)
        The probabilities, (..., L, S), are kept for backward. PyTorch's kernel for the CPU keeps one number for each
        row of them instead, and works them out again.

    Raises
    ------
    ValueError, TypeError
        If shapes or dtypes do not fit, a row may look at nothing, or both kinds of mask are given.
    """
    q, k, v = as_tensor(query), as_tensor(key), as_tensor(value)
    name = "scaled_dot_product_attention"
    masks = [] if attn_mask is None else [as_tensor(attn_mask)]
    if masks and is_causal:
        raise ValueError(f"{name}: attn_mask and is_causal are both given, expected one of them")
    if masks and masks[0].dtype.kind not in "fb":
        raise TypeError(f"{name}: attn_mask has dtype {masks[0].dtype}, expected Booleans or floating numbers")
    if masks and not masks[0].is_meta:
        hidden = ~masks[0].data if masks[0].dtype.kind == "b" else np.isneginf(masks[0].data)
        if hidden.all(axis=-1).any():
            raise ValueError(f"{name}: attn_mask hides everything from a row, expected at least one place to look at")
    scale = 1 / math.sqrt(max(q.shape[-1] if q.ndim else 1, 1)) if scale is None else positive(name, "scale", scale)
    return ScaledDotProductAttention.apply(q, k, v, *masks, scale=float(scale), is_causal=bool(is_causal))
