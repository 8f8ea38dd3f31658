"""What operations hold at a time that move elements about, or make one number of many: sums, maxima, losses."""

from __future__ import annotations

import math

import numpy as np

from analysis.peak import arrays
from analysis.peak.arrays import (
    UFUNC_BUFFER,
    like_input,
    new,
    packing,
)
from analysis.peak.rules import (
    Backward,
    Making,
    alone,
    backward,
    forward,
    repeated,
)
from analysis.rules.layouts import Layout, Storage, is_basic_index, packed_strides
from analysis.rules.op_cost import Call, index_bytes

# ---- moving elements about ---------------------------------------------------------------


@forward("reshape", "permute")
def moved(call: Call) -> int:
    """Nothing for a view."""
    return 0 if call.output.storage is call.inputs[0].storage else call.n_out * call.itemsize


@backward("reshape", "permute")
def moved_backward(call: Call, g: Layout) -> Backward:
    """A view of the gradient where there can be one."""
    shape = call.record.inputs[0].shape
    if call.record.op == "permute":
        view: Layout | None = g.permuted([int(d) for d in np.argsort(call.record.attributes["dims"])])
    else:
        view = g.reshaped(shape)
    grad = new(shape, call.itemsize) if view is None else view
    return Backward(grad.storage.nbytes if view is None else 0, (grad,), frozenset({0}))


@forward("index")
def index(call: Call) -> int:
    parts = call.record.attributes["index"]
    if is_basic_index(parts):
        return 0
    sizes, kept, most = iter(call.record.inputs[0].shape), 0, 0
    for part in parts:
        size = 0 if part is None else next(sizes)
        if isinstance(part, tuple):
            count = math.prod(part[1])
            most = max(most, kept + 17 * count)  # which are negative, those counted from the front, the choice
            kept += count * index_bytes(size)
    return max(most, kept + call.n_out * call.itemsize)


@backward("concatenate", "pad")
def pieces_of_gradient(call: Call, g: Layout) -> Backward:
    """Views of the gradient: all of it stays alive as long as one of them does."""
    made = Making(call)
    for position in made.wanted:
        made.gradients[position] = Layout(g.storage, call.record.inputs[position].shape, g.strides)
    return made.done(range(len(call.inputs)))


@backward("expand")
def expand_backward(call: Call, g: Layout) -> Backward:
    return alone(like_input(call)) if repeated(call, 0) else Backward(0, (g,), frozenset({0}))


# ---- sums, means, maxima -----------------------------------------------------------------


@backward("sum", "mean")
def spread(call: Call, g: Layout) -> Backward:
    """A view that repeats the gradient (of a mean, the divided gradient)."""
    shape, dims = call.record.inputs[0].shape, call.record.attributes["dim"]
    lost = range(len(shape)) if dims is None else dims
    kept = iter(packed_strides([n for i, n in enumerate(shape) if i not in lost]))
    strides = tuple(0 if i in lost else next(kept) for i in range(len(shape)))
    divided = call.n_out * call.itemsize if call.record.op == "mean" else 0
    return Backward(divided, (Layout(Storage(divided) if divided else g.storage, shape, strides),), frozenset({0}))


def _other_axes(call: Call) -> int:
    """Bytes of the processor's integers 0, 1, … along every axis but that of the maximum, which pick the elements.

    Several such axes are repeated along each other, in a buffer.
    """
    dim = call.record.attributes["dim"]
    sizes = [] if dim is None else [n for axis, n in enumerate(call.record.inputs[0].shape) if axis != dim]
    return 8 * (sum(sizes) + (len(sizes) > 1) * len(sizes) * min(call.n_out, UFUNC_BUFFER))


@forward("max")
def max_forward(call: Call) -> int:
    """Positions as the processor's integers, then small ones, then the values; first a copy with its lines packed."""
    dim, (x, *_) = call.record.attributes["dim"], call.inputs
    lines = x if dim is None else x.permuted([*(axis for axis in range(len(x.shape)) if axis != dim), dim])
    positions, small = 8 * call.n_out, call.on_tape * call.n_out * index_bytes(call.n_in // call.n_out)
    values = small + _other_axes(call) + call.n_out * call.itemsize
    return positions + max(packing(lines, call.itemsize), values)


@backward("max")
def max_backward(call: Call, g: Layout) -> Backward:
    grad = like_input(call)
    return Backward(grad.storage.nbytes + 8 * call.n_out + _other_axes(call), (grad,))


@backward("var")
def var_backward(call: Call, g: Layout) -> Backward:
    """The differences, which become the gradient; mean and slope."""
    grad = new(call.record.inputs[0].shape, call.itemsize, call.inputs[0])
    return Backward(arrays.temporaries(grad.storage.nbytes) + 2 * call.n_out * call.itemsize, (grad,))


@forward("cross_entropy")
def cross_entropy(call: Call) -> int:
    """The scores, which become the probabilities, and for each row: its maximum; the row's number and the score of its
    label; that score, the sum, and the loss; at last the label in its small type."""
    (B, K), item = call.record.inputs[0].shape, call.itemsize
    losing = 2 * B * item + arrays.temporaries(B * item)
    labelled = call.on_tape * (3 * B * item + B * index_bytes(K))
    return B * K * item + max(B * (8 + item), losing, labelled)


@backward("cross_entropy")
def cross_entropy_backward(call: Call, g: Layout) -> Backward:
    """The probabilities less one at the labels: each row's number, its label as an index, and what is taken there."""
    grad = like_input(call)
    rows = call.record.inputs[0].shape[0] * (8 + 8 + call.itemsize)
    return Backward(grad.storage.nbytes + rows, (grad, None))


@backward("mse_loss")
def mse_backward(call: Call, g: Layout) -> Backward:
    """The gradient of a, made in any case, and its negative."""
    grads = tuple(like_input(call, i) if call.needs(i) else None for i in (0, 1))
    return Backward((1 + call.needs(1)) * call.n_in * call.itemsize, grads)
