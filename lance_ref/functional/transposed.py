"""The transposed 2-D convolution: the input gradient of a convolution, as an operation of its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from lance_ref.algebra.convolution import Convolution
from lance_ref.algebra.geometry import Pair
from lance_ref.algebra.volumes import TransposedGeometry
from lance_ref.engine.arguments import require_floating
from lance_ref.engine.tensor import Shape, Tensor, as_tensor
from lance_ref.functional.convolution import Convolved, pair
from lance_ref.stores import EXACT, ActivationStore


class ConvTranspose2d(Convolved):
    """Inputs: x (B, C_in, H, W), weight (C_in, C_out/g, k_h, k_w)[, bias (C_out,)]."""

    op = "conv_transpose2d"

    @staticmethod
    def geometry(x: Shape, weight: Shape, attributes: dict[str, Any]) -> Convolution:
        a = attributes
        return _geometry(x, weight, a["stride"], a["padding"], a["output_padding"], a["dilation"], a["groups"])


@lru_cache(maxsize=1024)
def _geometry(
    x: Shape, weight: Shape, stride: Pair, padding: Pair, output_padding: Pair, dilation: Pair, groups: int
) -> TransposedGeometry:
    pads = ((padding[0], padding[0]), (padding[1], padding[1]))
    return TransposedGeometry(x, weight, stride, pads, dilation, groups, output_padding)


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
        What is kept of ``x`` for the weight gradient; all of it by default.

    Returns
    -------
    Tensor (B, C_out, H_out, W_out)
        H_out = (H − 1)·stride − 2·padding + dilation·(k_h − 1) + output_padding + 1.

    Raises
    ------
    ValueError, TypeError
        If shapes or dtypes do not fit, ``groups`` does not divide, the output would be empty, or the store does not
        take the input of a transposed convolution.
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
    pads, dilations = pair("padding", padding, 0), pair("dilation", dilation, 1)
    geometry = _geometry(x.shape, weight.shape, strides, pads, more, dilations, int(groups))
    if min(geometry.output_shape[1:]) < 1:
        raise ValueError(
            f"{op}: the output would be empty, {geometry.output_shape}: x has shape {x.shape}, weight {weight.shape}, "
            f"stride {strides}, padding {pads}"
        )
    inputs = [x, weight] if bias is None else [x, weight, as_tensor(bias)]
    sizes = {"stride": strides, "padding": pads, "output_padding": more, "dilation": dilations}
    return ConvTranspose2d.apply(*inputs, **sizes, groups=int(groups), store=store)
