"""What each operation holds at a time while it runs: results, what it keeps, and temporaries.

Two rules for every operation. ``forward``: the most bytes that it has allocated at any moment of its forward
pass, its result and what it keeps included. ``backward``: the same for its backward pass, and the gradients that
come out of it, each with the memory it lives in: often the memory of the gradient that came in.

Elementwise formulas run in blocks (:mod:`analysis.peak.arrays`), so that their temporaries are small. The rules are
those of the compiled loops; the plain NumPy twins (``LANCE_REF_NUMBA=0``) take more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from analysis.peak.arrays import (
    BLOCK,
    UFUNC_BUFFER,
    blocks,
    division_buffer,
    in_blocks,
    like_input,
    new,
    packing,
    piece,
    temporaries,
)
from analysis.rules.layouts import Layout, Shape, Storage, is_basic_index, packed_strides
from analysis.rules.op_cost import Call, bit_bytes, index_bytes
from analysis.rules.operations import OPERATIONS, column


@dataclass(frozen=True)
class Backward:
    """The backward pass of one operation.

    Attributes
    ----------
    most : int
        Bytes that it has allocated at a time, the gradients it returns included.
    gradients : tuple of Layout or None
        One per input; None where none is computed.
    shared : frozenset of int
        Positions whose gradient is a view or is handed out twice: a leaf takes a copy of it.
    """

    most: int
    gradients: tuple[Layout | None, ...]
    shared: frozenset[int] = frozenset()


ForwardRule = Callable[[Call], int]
BackwardRule = Callable[[Call, Layout], Backward]


forward: Callable[..., Callable[[ForwardRule], ForwardRule]] = column("in_flight_forward")
backward: Callable[..., Callable[[BackwardRule], BackwardRule]] = column("in_flight_backward")
"""``@backward("add", "sub")``: the function below is the rule of these operations, which are our own."""


def most_forward(call: Call) -> int:
    """Bytes by the operation's forward rule; without one, an upper estimate of result, what is kept and temporaries."""
    row = OPERATIONS[call.record.op]
    if row.in_flight_forward is not None:
        return row.in_flight_forward(call)
    outside = {call.output.storage, *(x.storage for x in call.inputs)}
    kept = row.cost(call).tape if row.cost is not None else []
    return call.record.output.nbytes + sum(s.storage.nbytes for s in kept if s.storage not in outside) + _ordinary(call)


def run_backward(call: Call, g: Layout) -> Backward:
    """By the operation's backward rule; without one, an upper estimate: gradients that leaves copy, and temporaries."""
    row = OPERATIONS[call.record.op]
    if row.in_flight_backward is not None:
        found: Backward = row.in_flight_backward(call, g)
        return found
    positions = range(len(call.inputs))
    grads = tuple(like_input(call, i) if call.needs(i) else None for i in positions)
    made = sum(grad.storage.nbytes for grad in grads if grad is not None)
    return Backward(made + _ordinary(call), grads, frozenset(positions))


def _ordinary(call: Call) -> int:
    """Bytes of three arrays of the size of each input and of the result: temporaries of a formula of some length."""
    return 3 * (call.record.output.nbytes + sum(value.nbytes for value in call.record.inputs))


# ---- element by element ------------------------------------------------------------------

NONE, ONE, TWO = (0.0, 0.0), (1.0, 2.0), (2.0, 3.0)
TEMPORARIES = {  # arrays beside the result, forward and backward: (of a small array, of a block)
    "neg": (NONE, NONE), "exp": (NONE, NONE), "log": (NONE, NONE), "sqrt": (NONE, ONE), "pow": (NONE, ONE),
    "tanh": (NONE, ONE), "sigmoid": ((3.0, 3.0), (1.0, 1.0)), "gelu": (ONE, TWO), "hardswish": (ONE, (1.5, 2.5)),
}  # fmt: skip
UNBLOCKED = {"erf": (0, 1), "gelu_tanh": (1, 5)}
"""The same for formulas that are not worked out in blocks: whole arrays."""


@forward(*TEMPORARIES)
def unary(call: Call) -> int:
    return call.n_out * call.itemsize + in_blocks(call, *TEMPORARIES[call.record.op][0], call.inputs[0])


@backward(*TEMPORARIES)
def unary_backward(call: Call, g: Layout) -> Backward:
    grad = new(g.shape, call.itemsize, g, call.inputs[0])
    costs = TEMPORARIES[call.record.op][1]
    temporary = 0 if costs == NONE else in_blocks(call, *costs, g, call.inputs[0])
    return Backward(grad.storage.nbytes + temporary, (grad,))


@forward(*UNBLOCKED)
def unblocked(call: Call) -> int:
    return call.n_out * call.itemsize * (1 + UNBLOCKED[call.record.op][0])


@backward(*UNBLOCKED)
def unblocked_backward(call: Call, g: Layout) -> Backward:
    grad = new(g.shape, call.itemsize, g, call.inputs[0])
    return Backward(grad.storage.nbytes * (1 + UNBLOCKED[call.record.op][1]), (grad,))


@forward("relu", "relu6", "hardsigmoid", "clip", "fake_quantize")
def masked(call: Call) -> int:
    """Result and mask, and the Booleans of one block; a packed copy of an input that is not packed.

    Those of relu go along with the result, the others come first.
    """
    result, op = call.n_out * call.itemsize, call.record.op
    if op in ("hardsigmoid", "fake_quantize"):
        result += in_blocks(call, *ONE, call.inputs[0])
    if not call.on_tape:
        return result
    mask, block, copy = bit_bytes(call.n_out), min(call.n_in, BLOCK), packing(call.inputs[0], call.itemsize)
    if op in ("relu", "relu6"):
        return result + mask + (2 if op == "relu" else 4) * block + copy
    deciding = copy + (2 * block * call.itemsize if op == "fake_quantize" else 3 * block)
    return mask + max(deciding, result)


@forward("dropout")
def dropout(call: Call) -> int:
    """Mask, then result; the random numbers of one block."""
    random = min(call.n_in, BLOCK) * 5
    copy = packing(call.inputs[0], call.itemsize)
    return bit_bytes(call.n_out) + max(random, call.n_out * call.itemsize + copy)


@backward("relu", "relu6", "hardsigmoid", "dropout", "clip", "fake_quantize")
def masked_backward(call: Call, g: Layout) -> Backward:
    grad = like_input(call)
    return Backward(grad.storage.nbytes + packing(g, call.itemsize), (grad,))


@forward("softmax", "log_softmax")
def softmax(call: Call) -> int:
    """Result, and one number for each line: its maximum, then its sum. Of log-softmax, exponentials in pieces."""
    result, dim = call.n_out * call.itemsize, call.record.attributes["dim"]
    lines = result // call.record.output.shape[dim]
    if call.record.op == "softmax":
        return result + lines
    return result + lines + max(piece(call.record.output.shape, [dim], call.itemsize), lines)


@backward("softmax", "log_softmax")
def softmax_backward(call: Call, g: Layout) -> Backward:
    dim, shape = call.record.attributes["dim"], call.record.output.shape
    total = new(tuple(1 if axis == dim else n for axis, n in enumerate(shape)), call.itemsize)
    grad = new(g.shape, call.itemsize, g, call.output)
    if call.record.op == "log_softmax":
        pieces = in_blocks(call, *ONE, g, call.output, total)
    else:
        pieces = piece(shape, [dim], call.itemsize)
    return Backward(grad.storage.nbytes + total.storage.nbytes + pieces, (grad,))


# ---- arithmetic of two -------------------------------------------------------------------


@forward("concatenate", "pad", "expand")
def result_alone(call: Call) -> int:
    return call.n_out * call.itemsize


@forward("add", "sub", "mul", "div")
def arithmetic(call: Call) -> int:
    """The result, and NumPy's buffers for what is repeated in it."""
    elements, copied = blocks(call.inputs, UFUNC_BUFFER)
    return (call.n_out + elements * copied) * call.itemsize


def _repeated(call: Call, position: int) -> bool:
    """Whether broadcasting repeats that input, so that its gradient is a sum."""
    return call.record.inputs[position].shape != call.record.output.shape


@backward("add", "sub")
def add_backward(call: Call, g: Layout) -> Backward:
    """The gradient itself goes on to both, or its sum over what was repeated; of a subtrahend, its negative."""
    held = most = 0
    grads: list[Layout | None] = []
    for position in (0, 1):
        grad: Layout | None = None
        if call.needs(position):
            negative, summed = call.record.op == "sub" and position == 1, _repeated(call, position)
            grad = like_input(call, position) if summed or negative else g
            made = 0 if grad is g else grad.storage.nbytes
            most = max(most, held + (temporaries(made) if negative and summed else made))
            held += made
        grads.append(grad)
    return Backward(most, tuple(grads), frozenset(i for i, grad in enumerate(grads) if grad is g))


def _product(call: Call, shape: Shape, full: Shape) -> int:
    """Bytes beside a gradient of ``shape`` that is a product of ``full`` shape, summed over what was repeated.

    The product is made in pieces, but as a whole where nothing is left to cut it along.
    """
    lead = len(full) - len(shape)
    repeated = [axis for axis, n in enumerate(full) if axis < lead or shape[axis - lead] != n]
    return piece(full, repeated, call.itemsize) if repeated else 0


@backward("mul")
def mul_backward(call: Call, g: Layout) -> Backward:
    """A product for each."""
    held = most = 0
    grads: list[Layout | None] = []
    for position in (0, 1):
        grad: Layout | None = None
        if call.needs(position):
            value = call.record.inputs[position]
            grad = new(
                value.shape, call.itemsize, *([] if _repeated(call, position) else [g, call.inputs[1 - position]])
            )
            most = max(most, held + value.nbytes + _product(call, value.shape, g.shape))
            held += value.nbytes
        grads.append(grad)
    return Backward(most, tuple(grads))


@backward("div")
def div_backward(call: Call, g: Layout) -> Backward:
    """The quotient g/b, which is the gradient of a, or is summed; its negative, a/b and their product for b."""
    full = call.n_out * call.itemsize
    held = most = full
    grads: list[Layout | None] = [None, None]
    if call.needs(0):
        summed = _repeated(call, 0)
        grads[0] = like_input(call) if summed else new(g.shape, call.itemsize, g)
        held += call.record.inputs[0].nbytes if summed else 0
    if call.needs(1):
        summed = _repeated(call, 1)
        grads[1] = like_input(call, 1) if summed else new(g.shape, call.itemsize, g)
        most = held + full + temporaries(full)
        if summed:
            most = max(most, held + full + call.record.inputs[1].nbytes)
    return Backward(max(most, held), tuple(grads))


# ---- moving elements about ---------------------------------------------------------------


@forward("reshape", "permute")
def moved(call: Call) -> int:
    """Nothing for a view."""
    return 0 if call.output.storage is call.inputs[0].storage else call.n_out * call.itemsize


@backward("reshape")
def reshape_backward(call: Call, g: Layout) -> Backward:
    shape = call.record.inputs[0].shape
    view = g.reshaped(shape)
    if view is not None:
        return Backward(0, (view,), frozenset({0}))
    grad = new(shape, call.itemsize)
    return Backward(grad.storage.nbytes, (grad,), frozenset({0}))


@backward("permute")
def permute_backward(call: Call, g: Layout) -> Backward:
    return Backward(0, (g.permuted([int(d) for d in np.argsort(call.record.attributes["dims"])]),), frozenset({0}))


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


@backward("index")
def index_backward(call: Call, g: Layout) -> Backward:
    """Zeros, and the positions as the processor's integers."""
    parts = call.record.attributes["index"]
    positions = sum(8 * math.prod(part[1]) for part in parts if isinstance(part, tuple))
    grad = like_input(call)
    return Backward(grad.storage.nbytes + positions, (grad,))


@backward("concatenate", "pad")
def pieces_of_gradient(call: Call, g: Layout) -> Backward:
    """Views of the gradient: all of it stays alive as long as one of them does."""
    grads = tuple(
        Layout(g.storage, value.shape, g.strides) if call.needs(position) else None
        for position, value in enumerate(call.record.inputs)
    )
    return Backward(0, grads, frozenset(range(len(grads))))


@backward("expand")
def expand_backward(call: Call, g: Layout) -> Backward:
    if not _repeated(call, 0):
        return Backward(0, (g,), frozenset({0}))
    grad = like_input(call)
    return Backward(grad.storage.nbytes, (grad,))


# ---- sums, means, maxima -----------------------------------------------------------------


@forward("sum", "mean")
def reduced(call: Call) -> int:
    return call.n_out * call.itemsize + (division_buffer(call.n_out) if call.record.op == "mean" else 0)


@backward("sum", "mean")
def spread(call: Call, g: Layout) -> Backward:
    """A view that repeats the gradient (of a mean, the divided gradient)."""
    shape, dims = call.record.inputs[0].shape, call.record.attributes["dim"]
    lost = range(len(shape)) if dims is None else dims
    kept = iter(packed_strides([n for i, n in enumerate(shape) if i not in lost]))
    strides = tuple(0 if i in lost else next(kept) for i in range(len(shape)))
    divided = call.record.op == "mean"
    storage = Storage(call.n_out * call.itemsize) if divided else g.storage
    return Backward(storage.nbytes if divided else 0, (Layout(storage, shape, strides),), frozenset({0}))


def _other_axes(call: Call) -> int:
    """Bytes of the processor's integers 0, 1, … along every axis but that of the maximum, which pick the elements.

    Several such axes are repeated along each other, in a buffer.
    """
    dim = call.record.attributes["dim"]
    if dim is None:
        return 0
    sizes = [n for axis, n in enumerate(call.record.inputs[0].shape) if axis != dim]
    return 8 * (sum(sizes) + (len(sizes) > 1) * len(sizes) * min(call.n_out, UFUNC_BUFFER))


@forward("max")
def max_forward(call: Call) -> int:
    """Positions as the processor's integers, then small ones, then the values; first a copy with its lines packed."""
    dim, (x, *_) = call.record.attributes["dim"], call.inputs
    axes = [axis for axis in range(len(x.shape)) if axis != dim]
    lines = x if dim is None else x.permuted([*axes, dim])
    positions, small = 8 * call.n_out, call.on_tape * call.n_out * index_bytes(call.n_in // call.n_out)
    choosing = packing(lines, call.itemsize) + positions
    return max(choosing, positions + small + _other_axes(call) + call.n_out * call.itemsize)


@backward("max")
def max_backward(call: Call, g: Layout) -> Backward:
    grad = like_input(call)
    return Backward(grad.storage.nbytes + 8 * call.n_out + _other_axes(call), (grad,), frozenset({0}))


@forward("var")
def var_forward(call: Call) -> int:
    """The differences from the mean, whole."""
    return (call.n_in + 2 * call.n_out) * call.itemsize + division_buffer(call.n_out)


@backward("var")
def var_backward(call: Call, g: Layout) -> Backward:
    """The differences, which become the gradient; mean and slope."""
    grad = new(call.record.inputs[0].shape, call.itemsize, call.inputs[0])
    return Backward(temporaries(grad.storage.nbytes) + 2 * call.n_out * call.itemsize, (grad,))


@forward("cross_entropy")
def cross_entropy(call: Call) -> int:
    """The scores, which become the probabilities, and for each row: its maximum; the row's number and the score of its
    label; that score, the sum, and the loss; at last the label in its small type."""
    (B, K), item = call.record.inputs[0].shape, call.itemsize
    losing = 2 * B * item + temporaries(B * item)
    labelled = call.on_tape * (3 * B * item + B * index_bytes(K))
    return B * K * item + max(B * (8 + item), losing, labelled)


@backward("cross_entropy")
def cross_entropy_backward(call: Call, g: Layout) -> Backward:
    """The probabilities less one at the labels: each row's number, its label as an index, and what is taken there."""
    grad = like_input(call)
    B = call.record.inputs[0].shape[0]
    return Backward(grad.storage.nbytes + B * (8 + 8 + call.itemsize), (grad, None))


@forward("mse_loss")
def mse_loss(call: Call) -> int:
    return 2 * call.n_in * call.itemsize


@backward("mse_loss")
def mse_backward(call: Call, g: Layout) -> Backward:
    """The gradient of a, made in any case, and its negative."""
    grads = tuple(like_input(call, i) if call.needs(i) else None for i in (0, 1))
    return Backward((1 + call.needs(1)) * call.n_in * call.itemsize, grads)


# ---- pooling -----------------------------------------------------------------------------


@forward("max_pool2d")
def max_pool(call: Call) -> int:
    places = index_bytes(math.prod(call.record.attributes["kernel_size"]))
    return call.n_out * (call.itemsize + places) + packing(call.inputs[0], call.itemsize)


@forward("avg_pool2d", "adaptive_avg_pool2d")
def avg_pool(call: Call) -> int:
    """Sums, and the counts that they are divided by; of the adaptive one, means of all planes at one place."""
    planes = math.prod(call.record.output.shape[:2])
    if call.record.op == "adaptive_avg_pool2d":
        return call.n_out * call.itemsize + division_buffer(planes)
    return call.n_out * call.itemsize + _of_windows(call)


def _of_windows(call: Call) -> int:
    """Bytes of the numbers of elements that the means of a plane are over, if they differ, and of NumPy's buffers."""
    places = math.prod(call.record.output.shape[2:])
    counts = 0 if call.record.attributes["count_include_pad"] else places
    return (counts + (3 * min(call.n_out, UFUNC_BUFFER) if places > 1 else 0)) * call.itemsize


@backward("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")
def pool_backward(call: Call, g: Layout) -> Backward:
    """Beside the gradient: a packed copy of the one that came in; each window's share, or all planes' at one place."""
    grad, planes = like_input(call), math.prod(call.record.output.shape[:2])
    if call.record.op == "max_pool2d":
        shares = packing(g, call.itemsize)
    elif call.record.op == "avg_pool2d":
        shares = call.n_out * call.itemsize + _of_windows(call)
    else:
        shares = (planes + 2 * min(planes, UFUNC_BUFFER)) * call.itemsize
    return Backward(grad.storage.nbytes + shares, (grad,))


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
    squares = piece(call.record.inputs[0].shape, axes, call.itemsize)
    return max(result + 2 * groups + squares + division_buffer(count), result + 4 * groups)


@backward("batch_norm")
def batch_norm_backward(call: Call, g: Layout) -> Backward:
    """x̂, which becomes the gradient where the statistics are the batch's own; products with it in pieces."""
    (count, axes), training = _outside(call), call.record.attributes["training"]
    shape, affine = call.record.inputs[0].shape, call.record.attributes["affine"]
    full, groups = call.n_in * call.itemsize, count * call.itemsize
    normalised = (affine and call.needs(1)) or (training and call.needs(0))
    grad = new(shape, call.itemsize, call.inputs[0] if training else g) if call.needs(0) else None
    held = groups if (affine and call.needs(2)) or (training and call.needs(0)) else 0
    most = held
    if normalised:
        most = held + full + groups + piece(shape, axes, call.itemsize)
        held += full + groups
    if grad is not None:
        most = max(most, held + (2 * groups if training else full))
    grads: list[Layout | None] = [grad, *[None] * (len(call.inputs) - 1)]
    for position in (1, 2) if affine else ():
        if call.needs(position):
            grads[position] = like_input(call, position)
    return Backward(max(most, held), tuple(grads), frozenset({1}))


@backward("layer_norm")
def layer_norm_backward(call: Call, g: Layout) -> Backward:
    """x̂, which becomes the gradient piece by piece, of each the product with x̂, and with the weight if there is one."""
    _, axes = _outside(call)
    x, affine = call.inputs[0], call.record.attributes["affine"]
    outer = [axis for axis in range(len(x.shape)) if axis not in axes]
    groups = new(tuple(1 if axis in axes else n for axis, n in enumerate(x.shape)), call.itemsize)
    held = most = 0
    grads: list[Layout | None] = [None] * len(call.inputs)
    if call.needs(0) or (affine and call.needs(1)):
        held = call.n_in * call.itemsize
        most = held + in_blocks(call, 1.0, 1.0, x, groups, groups)
    for position in (1, 2) if affine else ():
        if call.needs(position):
            grads[position] = like_input(call, position)
            held += call.record.inputs[position].nbytes
            most = max(most, held + (piece(x.shape, outer, call.itemsize) if position == 1 and outer else 0))
    if call.needs(0):
        grads[0] = new(x.shape, call.itemsize, x)
        pieces = (2 if affine else 1) * piece(x.shape, axes, call.itemsize)
        most = max(most, held + pieces + min(2 * groups.storage.nbytes, BLOCK * call.itemsize))
    return Backward(most, tuple(grads))
