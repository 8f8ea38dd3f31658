"""What norms hold at a time: of batches, layers, groups and root mean squares."""

from __future__ import annotations

import math

from analysis.peak.arrays import (
    BLOCK,
    division_buffer,
    like_input,
    new,
    packing,
    piece,
)
from analysis.peak.rules import Backward, Making, backward, forward, reused
from analysis.rules.layouts import Layout
from analysis.rules.op_cost import Call
from lance_ref.algebra.kernels.elementwise import SHORT_PLANE

# ---- normalisation -----------------------------------------------------------------------


def _outside(call: Call) -> tuple[int, list[int]]:
    """(numbers of mean and variance, axes that each of them is taken over)."""
    shape = call.record.inputs[0].shape
    if call.record.op == "batch_norm":
        return shape[1], [axis for axis in range(len(shape)) if axis != 1]
    first = len(shape) - len(call.record.attributes["normalized_shape"])
    return math.prod(shape[:first]), list(range(first, len(shape)))


@forward("batch_norm", "layer_norm")
def norm(call: Call) -> int:
    """Result; mean and variance with squares in pieces, then four numbers for each of them while one is scaled."""
    count, axes = _outside(call)
    groups, result = count * call.itemsize, call.n_out * call.itemsize
    if not (call.record.op == "layer_norm" or call.record.attributes["training"]):
        return result + (4 if call.record.attributes["affine"] else 3) * groups
    affine = call.record.attributes["affine"]
    running = call.record.op == "batch_norm" and len(call.record.inputs) > (3 if affine else 1)
    if _in_loops(call):  # mean, variance and 1/√variance; an update of running statistics, or 1 and 0 for a map
        return result + (5 if running or not affine else 3) * groups
    squares = piece(call.record.inputs[0].shape, axes, call.itemsize)
    return max(result + 2 * groups + squares + division_buffer(count), result + (5 if running else 4) * groups)


def _in_loops(call: Call, *gradients: Layout) -> bool:
    """Whether compiled loops normalise by the batch's statistics: packed arrays with planes that are long enough."""
    if call.record.op != "batch_norm":
        return False
    packed = not any(packing(layout, call.itemsize) for layout in (call.inputs[0], *gradients))
    return packed and math.prod(call.record.inputs[0].shape[2:]) >= SHORT_PLANE


@backward("batch_norm")
def batch_norm_backward(call: Call, g: Layout) -> Backward:
    """The gradient that came in, by loops that write over it or over a copy, or x̂, whose products are in pieces."""
    (count, axes), training = _outside(call), call.record.attributes["training"]
    shape, affine = call.record.inputs[0].shape, call.record.attributes["affine"]
    full, groups, of_input = call.n_in * call.itemsize, count * call.itemsize, call.needs(0)
    needs_sums, through = (affine and call.needs(1)) or (training and of_input), training and of_input
    looped = needs_sums and _in_loops(call, g)
    over = reused(call, g, call.inputs[0]) and looped if training else reused(call, g)
    if looped:  # both sums, and the factor of each channel
        made = Making(call, 2 * groups + (full if through and not over else 0))
        made.reach(groups)
    else:  # x̂ in memory, which becomes the gradient
        made = Making(call, groups if needs_sums or (affine and call.needs(2)) else 0)
        if needs_sums:
            made.held += full + groups
            made.reach(max(piece(shape, axes, call.itemsize), 2 * groups if through else 0))
            made.held -= 0 if through else full
    if of_input:
        made.gradients[0] = g if over else new(shape, call.itemsize, call.inputs[0] if training else g)
        made.reach(0 if training or over else full)
    for position in (1, 2) if affine else ():
        if call.needs(position):
            made.gradients[position] = like_input(call, position)
    return made.done()


@backward("layer_norm")
def layer_norm_backward(call: Call, g: Layout) -> Backward:
    """Over the gradient that came in; in pieces x̂, the product with x̂, and with the weight if there is one."""
    count, axes = _outside(call)
    affine = call.record.attributes["affine"]
    made, of_piece = Making(call), piece(call.inputs[0].shape, axes, call.itemsize)
    for position in (2, 1) if affine else ():
        if call.needs(position):
            made.add(position, like_input(call, position))
    if call.needs(0):
        over_gradient(made, call, g)
        made.reach((3 if affine else 2) * of_piece + min(2 * count, BLOCK) * call.itemsize)
    if affine and call.needs(1):
        made.reach(2 * of_piece + call.record.inputs[1].nbytes)
    return made.done()


def over_gradient(made: Making, call: Call, g: Layout) -> None:
    """The gradient of the first input, written over the one that came in where that may be."""
    if reused(call, g, call.inputs[0]):
        made.gradients[0] = g
    else:
        made.add(0, new(call.inputs[0].shape, call.itemsize, call.inputs[0]))


@forward("group_norm", "instance_norm")
def group_norm(call: Call) -> int:
    """The result, and its squares; a copy of an input that is not packed."""
    groups = call.record.inputs[0].shape[0] * call.record.attributes["num_groups"] * call.itemsize
    return 2 * call.n_out * call.itemsize + 3 * groups + packing(call.inputs[0], call.itemsize)


@backward("group_norm", "instance_norm")
def group_norm_backward(call: Call, g: Layout) -> Backward:
    """x̂, which becomes the gradient; g·weight, and a product of both."""
    made, full, affine = Making(call), call.n_in * call.itemsize, call.record.attributes["affine"]
    if affine and call.needs(2):
        made.add(2, like_input(call, 2))
    if call.needs(0) or (affine and call.needs(1)):
        made.held += full
        made.reach(max(full, packing(call.inputs[0], call.itemsize)))
    if affine and call.needs(1):
        made.add(1, like_input(call, 1))
    if call.needs(0):
        made.gradients[0] = like_input(call)
        made.reach((2 if affine else 1) * full)
    return made.done()


@forward("rms_norm")
def rms_norm(call: Call) -> int:
    """The squares, then the result."""
    groups = call.n_out // math.prod(call.record.attributes["normalized_shape"]) * call.itemsize
    return call.n_out * call.itemsize + 2 * groups


@backward("rms_norm")
def rms_norm_backward(call: Call, g: Layout) -> Backward:
    """Over the gradient that came in; in pieces x̂, g·weight, and a product of both."""
    made, weighted = Making(call), len(call.inputs) > 1
    shape = call.record.inputs[0].shape
    inner = range(len(shape) - len(call.record.attributes["normalized_shape"]), len(shape))
    if weighted and call.needs(1):
        made.add(1, like_input(call, 1))
    if call.needs(0):
        over_gradient(made, call, g)
    of_piece = piece(shape, list(inner), call.itemsize)
    made.reach((3 if weighted and call.needs(0) else 2) * of_piece)
    if weighted and call.needs(1):
        made.reach(2 * of_piece + call.record.inputs[1].nbytes)
    return made.done()
