"""Cost rule of gradient filtering: patch sums on the tape, both gradients on the grid of patches.

Sizes: patches of r places of the output map, P_h = ⌈H_out/r⌉ by P_w = ⌈W_out/r⌉ of them, windows of s·r places of
the input map. A linear layer's tokens are cut the same way, with stride 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from analysis.rules.op_cost import Call, fresh
from analysis.rules.stores.base import StoreCost, conv_sizes, store_rule


class Grid(NamedTuple):
    """What a layer becomes on the grid of patches."""

    patches: int  #: Of all images together: B·P_h·P_w, B·P, or B.
    kernel: int  #: Kernel positions that the input gradient tells apart, 1 where the whole kernel falls in one patch.
    whole: bool  #: Whether each window is one place, so that nothing is summed.


@store_rule("gradient-filter")
def gradient_filter(call: Call, macs: int) -> StoreCost:
    """The input's patch sums; dW and dA of a 1×1 convolution on the patches.

    grad_weight   patches · C_out · C_in/g            one product, repeated over the kernel
    grad_input    patches · C_out · C_in/g · kernel   the kernel summed, but along axes where it reaches other patches

    ``elementwise``: every input place added once; every output place added, and every patch divided, once for
    each gradient; the weights summed for the input gradient.
    """
    weight = call.record.inputs[1].shape
    grid = conv_grid(call) if call.record.op == "conv2d" else linear_grid(call)
    width, C_in = weight[1], call.record.inputs[0].shape[1 if call.record.op == "conv2d" else -1]
    products = grid.patches * weight[0] * width
    elementwise = 0
    if not grid.whole:
        gradients = 1 + call.needs(0)
        elementwise = call.n_in + gradients * (call.n_out + grid.patches * weight[0])
    if call.needs(0) and grid.kernel < math.prod(weight[2:]):
        elementwise += math.prod(weight)
    sums = fresh("patch_sums", grid.patches * C_in * call.itemsize)
    return StoreCost(
        grad_weight_macs=products,
        paper_grad_weight_macs=products,
        grad_input_macs=products * grid.kernel,
        kept_bytes=grid.patches * C_in * call.itemsize,
        elementwise=elementwise,
        tape=(call.save_input("patch_sums", 0),) if grid.whole else (sums,),
        pytorch=None if grid.whole else (sums,),
    )


def conv_grid(call: Call) -> Grid:
    """Height and width are cut; a kernel with a dilation of d > 1 reaches ⌊d/(s·r)⌋ patches far."""
    attributes, r = call.record.attributes, call.record.attributes["store"]["patch"]
    s = conv_sizes(call)
    patches, kernel, whole = s.B, 1, True
    sizes = zip(s.size, s.size_out, s.kernel, attributes["stride"], attributes["dilation"], strict=True)
    for n, n_out, k, stride, d in sizes:
        patches *= math.ceil(n_out / r)
        kernel *= k if d > 1 and d >= stride * r else 1
        whole = whole and stride * r == 1 and n_out == n
    return Grid(patches, kernel, whole)


def linear_grid(call: Call) -> Grid:
    """The tokens of (B, L, I) are cut, r at a time; of (B, I) nothing is."""
    *leading, _ = call.record.inputs[0].shape
    r = call.record.attributes["store"]["patch"]
    if len(leading) < 2 or r == 1:
        return Grid(math.prod(leading), 1, True)
    *images, tokens = leading
    return Grid(math.prod(images) * math.ceil(tokens / r), 1, False)
