"""The transposed 2-D convolution: the input gradient of a convolution, as an operation of its own.

A convolution that takes (B, C_out, H_out, W_out) to (B, C_in, H, W) with the same weight is the geometry of all three
products. Each of them takes B·H·W·C_in·(C_out/g)·k_h·k_w multiply-adds.
"""
# mypy: disable-error-code="override"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lance_ref.algebra.geometry import ConvGeometry, Pair
from lance_ref.engine.arguments import Context, Gradients, require_floating
from lance_ref.engine.autograd import Function
from lance_ref.engine.counting import spending_on
from lance_ref.engine.state import state
from lance_ref.engine.tensor import Shape, Tensor, as_tensor
from lance_ref.functional.convolution import pair
from lance_ref.stores import EXACT, ActivationStore


def require_exact(op: str, store: ActivationStore) -> None:
    """Raise ValueError for a store other than that of the whole input, naming the layer and both."""
    if store is not EXACT:
        raise ValueError(
            f"layer {state.path or '(root)'}: {store.name} compresses the inputs of conv2d and linear, not of {op}"
        )


class ConvTranspose2d(Function):
    """Inputs: x (B, C_in, H, W), weight (C_in, C_out/g, k_h, k_w)[, bias (C_out,)]."""

    op = "conv_transpose2d"

    @staticmethod
    def output_shape(x: Tensor, weight: Tensor, *bias: Tensor, store: ActivationStore, **sizes: Any) -> Shape:
        shape = _geometry(x.shape, weight.shape, **sizes).input_shape
        for b in bias:
            if b.shape != (shape[1],):
                raise ValueError(f"conv_transpose2d: bias has shape {b.shape}, expected ({shape[1]},)")
        return shape

    @staticmethod
    def forward(
        ctx: Context, x: np.ndarray, weight: np.ndarray, *bias: np.ndarray, store: ActivationStore, **sizes: Any
    ) -> np.ndarray:
        ctx.geometry = _geometry(x.shape, weight.shape, **sizes)
        if ctx.needs_input_grad[0]:
            ctx.save_input("weight", 1)
        if ctx.needs_input_grad[1]:
            ctx.save_input("activation", 0)
        out: np.ndarray = ctx.geometry.input_gradient(weight, x)
        for b in bias:
            out += b[:, None, None]
        return out

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        grads: list[np.ndarray | None] = [None] * len(ctx.needs_input_grad)
        if ctx.needs_input_grad[0]:
            with spending_on("grad_input"):
                grads[0] = ctx.geometry.forward(grad_output, ctx["weight"])
        if ctx.needs_input_grad[1]:
            with spending_on("grad_weight"):
                grads[1] = ctx.geometry.weight_gradient(grad_output, ctx["activation"])
        if ctx.needs_input_grad[2:] == (True,):
            grads[2] = grad_output.sum(axis=(0, 2, 3))
        return tuple(grads)


def _geometry(
    x: Shape, weight: Shape, stride: Pair, padding: Pair, output_padding: Pair, dilation: Pair, groups: int
) -> ConvGeometry:
    """Of the convolution whose output is x."""
    size = [
        (n - 1) * s - 2 * p + d * (k - 1) + more + 1
        for n, s, p, d, k, more in zip(x[2:], stride, padding, dilation, weight[2:], output_padding, strict=True)
    ]
    pads = ((padding[0], padding[0]), (padding[1], padding[1]))
    return ConvGeometry((x[0], weight[1] * groups, *size), weight, stride, pads, dilation, groups)


def conv_transpose2d(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    store: ActivationStore = EXACT,
) -> Tensor:
    """Transposed 2-D convolution of a batch of images, in PyTorch's order of arguments.

    Parameters
    ----------
    x : Tensor (B, C_in, H, W)
    weight : Tensor (C_in, C_out/groups, k_h, k_w)
    bias : Tensor (C_out,), optional
    stride, dilation : int or pair
        Of the convolution that this one is the transpose of.
    padding : int or pair
        Rows and columns that are taken off on each side.
    output_padding : int or pair
        Rows at the bottom and columns at the right that are added; less than ``stride``.
    groups : int
        Divides C_in; C_out is groups times the second size of the weight.
    store : ActivationStore
        The exact one alone: nothing compresses the input of a transposed convolution.

    Returns
    -------
    Tensor (B, C_out, H_out, W_out)
        H_out = (H − 1)·stride − 2·padding + dilation·(k_h − 1) + output_padding + 1.

    Raises
    ------
    ValueError, TypeError
        If shapes or dtypes do not fit, ``groups`` does not divide, the output would be empty, or the store is another.
    """
    x, weight = as_tensor(x), as_tensor(weight)
    op = "conv_transpose2d"
    require_floating(op, x=x, weight=weight)
    if x.ndim != 4 or weight.ndim != 4 or 0 in weight.shape or 0 in x.shape[1:]:
        raise ValueError(
            f"{op}: x has shape {x.shape} and weight {weight.shape}, expected (B, C_in, H, W) and "
            "(C_in, C_out/groups, k_h, k_w), sizes of at least 1"
        )
    if isinstance(groups, bool) or not isinstance(groups, (int, np.integer)) or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"{op}: groups is {groups!r}, expected a divisor of C_in = {x.shape[1]}")
    if weight.shape[0] != x.shape[1]:
        raise ValueError(
            f"{op}: weight has shape {weight.shape}, expected ({x.shape[1]}, C_out/groups, k_h, k_w) "
            f"for x of shape {x.shape}"
        )
    strides, more = pair("stride", stride, 1), pair("output_padding", output_padding, 0)
    if any(m >= s for m, s in zip(more, strides, strict=True)):
        raise ValueError(f"{op}: output_padding is {more}, expected less than stride {strides}")
    require_exact(op, store)
    sizes = {"stride": strides, "padding": pair("padding", padding, 0), "output_padding": more}
    sizes |= {"dilation": pair("dilation", dilation, 1)}
    geometry = _geometry(x.shape, weight.shape, **sizes, groups=int(groups))
    if min(geometry.input_shape[1:]) < 1:
        raise ValueError(
            f"{op}: the output would be empty, {geometry.input_shape}: x has shape {x.shape}, weight {weight.shape}, "
            f"stride {strides}, padding {sizes['padding']}"
        )
    inputs = [x, weight] if bias is None else [x, weight, as_tensor(bias)]
    return ConvTranspose2d.apply(*inputs, **sizes, groups=int(groups), store=store)
