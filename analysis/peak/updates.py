"""What a layer holds at a time that trains in a subspace, W = s·W_0 + D ×₂ Q, beside its input and its parameters.

s is taken to be 1, as it is without weight decay: otherwise s·W_0, or nothing more in the factored way, comes on top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from analysis.rules.op_cost import Call
from analysis.rules.subspace import is_merged


@dataclass(frozen=True)
class Narrow:
    """The layers Qᵀ and D of the factored way.

    Attributes
    ----------
    between : int
        Bytes of what goes from one to the other.
    down_forward, up_forward, down_input, up_input : int
        Bytes that their outputs and input gradients take beside what goes in and comes out.
    """

    between: int
    down_forward: int = 0
    up_forward: int = 0
    down_input: int = 0
    up_input: int = 0


def forward(call: Call, result: int, workspace: int, narrow: Narrow) -> int:
    """The most bytes of the output, itself included; ``workspace`` is that of the product with the whole weight."""
    if is_merged(call.record):
        return max(merging(call), call.weight.nbytes + result + workspace)
    between = result + narrow.between
    return max(result + workspace, between + narrow.down_forward, between + result + narrow.up_forward)


def input_gradient(call: Call, gradient: int, workspace: int, narrow: Narrow) -> int:
    """The most bytes of the input gradient, itself included."""
    if is_merged(call.record):
        return max(merging(call), call.weight.nbytes + gradient + workspace)
    between = gradient + narrow.between
    return max(gradient + workspace, between + narrow.up_input, between + gradient + narrow.down_input)


def merging(call: Call) -> int:
    """The most bytes of writing W down: a product whose axes are put in the weight's order, W_0 being added in place.

    The rows of D are packed first. A kernel of one place needs neither.
    """
    weight, one_place = call.weight.nbytes, _places(call) == 1
    return weight if one_place else weight + max(weight, call.record.inputs[1].nbytes)


def coordinates(call: Call) -> int:
    """Bytes beside D's gradient of making it from that of the weight, which is packed for it."""
    weight, one_place = call.weight.nbytes, _places(call) == 1
    return weight if one_place else 2 * weight + call.record.inputs[1].nbytes


def _places(call: Call) -> int:
    """Of the kernel that D has."""
    return math.prod(call.record.inputs[1].shape[2:])
