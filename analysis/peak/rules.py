"""What each operation holds at a time while it runs: results, what it keeps, and temporaries.

Two rules for every operation. ``forward``: the most bytes that it has allocated at any moment of its forward
pass, its result and what it keeps included. ``backward``: the same for its backward pass, and the gradients that
come out of it, each with the memory it lives in, which often is the memory of the gradient that came in.

Elementwise formulas run in blocks (:mod:`analysis.peak.arrays`), so that their temporaries are small. The rules are
those of the compiled loops; the plain NumPy twins (``LANCE_REF_NUMBA=0``) take more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from analysis.peak import arrays
from analysis.peak.arrays import (
    BLOCK,
    UFUNC_BUFFER,
    division_buffer,
    in_blocks,
    is_packed,
    like_input,
    new,
    packing,
    piece,
)
from analysis.rules.layouts import Layout, Shape, Storage, is_basic_index, packed_strides
from analysis.rules.op_cost import Call, bit_bytes, index_bytes
from analysis.rules.operations import OPERATIONS, column, fill
from lance_ref.algebra.kernels.elementwise import SHORT_PLANE


@dataclass(frozen=True)
class Backward:
    """The backward pass of one operation."""

    most: int  #: Bytes that it has allocated at a time, the gradients it returns included.
    gradients: tuple[Layout | None, ...]  #: One per input; None where none is computed.
    #: Positions whose gradient is a look at memory that others see, or is handed out twice: a leaf takes a copy of it.
    shared: frozenset[int] = frozenset()


class Making:
    """The gradients of an operation as they are made one after the other; those that are there stay.

    ``held`` counts the bytes that stay, ``most`` the bytes at a time.
    """

    def __init__(self, call: Call, held: int = 0) -> None:
        self.held = self.most = held
        self.gradients: list[Layout | None] = [None] * len(call.inputs)
        self.wanted = [i for i in range(len(call.inputs)) if call.needs(i)]

    def reach(self, beside: int) -> None:
        """So many bytes are there for a while, beside those that stay."""
        self.most = max(self.most, self.held + beside)

    def add(self, position: int, gradient: Layout, beside: int = 0) -> None:
        """One more gradient, and the bytes that are there while it is made."""
        self.gradients[position] = gradient
        self.held += gradient.storage.nbytes
        self.reach(beside)

    def done(self, shared: Iterable[int] = ()) -> Backward:
        return Backward(self.most, tuple(self.gradients), frozenset(shared))


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


def reused(call: Call, g: Layout, *others: Layout) -> bool:
    """Whether the result is written over the gradient that came in; ``others`` are what it is computed from besides."""
    return call.owns_gradient and all(x.shape != g.shape or lie_alike(x, g) for x in others)


def lie_alike(a: Layout, b: Layout) -> bool:
    """Whether two arrays of one shape lie in memory the same way."""
    return all(n == 1 or i == j for n, i, j in zip(a.shape, a.strides, b.strides, strict=True))


def run_backward(call: Call, g: Layout) -> Backward:
    """By the operation's backward rule; without one, an upper estimate: gradients that leaves copy, and temporaries."""
    row = OPERATIONS[call.record.op]
    if row.in_flight_backward is not None:
        found: Backward = row.in_flight_backward(call, g)
        return found
    made = Making(call)
    for position in made.wanted:
        made.add(position, like_input(call, position))
    made.reach(_ordinary(call))
    return made.done(range(len(call.inputs)))


def _ordinary(call: Call) -> int:
    """Bytes of three arrays of the size of each input and of the result: temporaries of a formula of some length."""
    return 3 * (call.record.output.nbytes + sum(value.nbytes for value in call.record.inputs))


def _alone(grad: Layout, beside: int = 0) -> Backward:
    """The gradient of the only input that has one, and what is there while it is made."""
    return Backward(grad.storage.nbytes + beside, (grad,))


# ---- one formula each ----------------------------------------------------------------------

NONE, ONE, TWO = (0.0, 0.0), (1.0, 2.0), (2.0, 3.0)
TEMPORARIES = {  # arrays beside the result, forward and backward: (of a small array, of a block)
    "neg": (NONE, NONE), "exp": (NONE, NONE), "log": (NONE, NONE), "sqrt": (NONE, ONE), "pow": (NONE, ONE),
    "silu": ((3.0, 3.0), (3.0, 3.0)), "mish": (ONE, (5.0, 5.0)), "softplus": ((2.25, 3.25), (4.25, 4.25)),
    "elu": ((1.25, 2.25), (1.25, 2.25)),
    "tanh": (NONE, ONE), "sigmoid": ((3.0, 3.0), (1.0, 1.0)), "gelu": (ONE, TWO), "hardswish": (ONE, (1.5, 2.5)),
}  # fmt: skip
UNBLOCKED = {"erf": (0, 1), "gelu_tanh": (1, 5)}
"""The same for formulas that are not worked out in blocks: whole arrays."""


def _result(call: Call) -> int:
    return call.n_out * call.itemsize


def _planes(call: Call) -> int:
    return math.prod(call.record.output.shape[:2])


def _of_windows(call: Call) -> int:
    """Bytes of the numbers of elements that the means of a plane are over, if they differ, and of NumPy's buffers."""
    places = math.prod(call.record.output.shape[2:])
    counts = 0 if call.record.attributes["count_include_pad"] else places
    return (counts + (3 * min(call.n_out, UFUNC_BUFFER) if places > 1 else 0)) * call.itemsize


def _positions(call: Call) -> int:
    """Bytes of the positions of an index as the processor's integers."""
    return sum(8 * math.prod(part[1]) for part in call.record.attributes["index"] if isinstance(part, tuple))


BESIDE_RESULT: dict[str, ForwardRule] = {
    **dict.fromkeys(TEMPORARIES, lambda c: in_blocks(c, *TEMPORARIES[c.record.op][0], c.inputs[0])),
    **dict.fromkeys(UNBLOCKED, lambda c: _result(c) * UNBLOCKED[c.record.op][0]),
    **dict.fromkeys(("concatenate", "pad", "expand", "matmul", "sum"), lambda c: 0),
    "mean": lambda c: division_buffer(c.n_out),
    "var": lambda c: (c.n_in + c.n_out) * c.itemsize + division_buffer(c.n_out),  # the differences from the mean, whole
    "mse_loss": lambda c: (2 * c.n_in - c.n_out) * c.itemsize,
    "max_pool2d": lambda c: (
        c.n_out * index_bytes(math.prod(c.record.attributes["kernel_size"])) + packing(c.inputs[0], c.itemsize)
    ),
    "avg_pool2d": _of_windows,
    "adaptive_avg_pool2d": lambda c: division_buffer(_planes(c)),  # means of all planes at one place
}
"""Bytes of the forward pass beside the result."""

fill("in_flight_forward", {op: lambda c: _result(c) + BESIDE_RESULT[c.record.op](c) for op in BESIDE_RESULT})


@backward("relu", "relu6", "hardsigmoid", "dropout", "clip", "fake_quantize")
def masked_backward(call: Call, g: Layout) -> Backward:
    """Over the gradient that came in where that is packed."""
    if reused(call, g) and is_packed(g):
        return Backward(0, (g,))
    return _alone(like_input(call), packing(g, call.itemsize))


BESIDE_GRADIENT: dict[str, Callable[[Call, Layout], int]] = {
    "max_pool2d": lambda c, g: packing(g, c.itemsize),
    "avg_pool2d": lambda c, g: _result(c) + _of_windows(c),  # each window's share
    "adaptive_avg_pool2d": lambda c, g: (_planes(c) + 2 * min(_planes(c), UFUNC_BUFFER)) * c.itemsize,
    "index": lambda c, g: _positions(c),
}
"""Bytes of the backward pass beside the gradient, which is packed."""

fill(
    "in_flight_backward",
    {op: lambda c, g: _alone(like_input(c), BESIDE_GRADIENT[c.record.op](c, g)) for op in BESIDE_GRADIENT},
)


# ---- element by element ------------------------------------------------------------------


@backward(*TEMPORARIES, *UNBLOCKED)
def unary_backward(call: Call, g: Layout) -> Backward:
    """A gradient whose axes lie like those of the input and of the gradient that came in."""
    grad = new(g.shape, call.itemsize, g, call.inputs[0])
    if call.record.op in UNBLOCKED:
        return _alone(grad, grad.storage.nbytes * UNBLOCKED[call.record.op][1])
    costs = TEMPORARIES[call.record.op][1]
    others = () if call.record.op == "neg" else call.inputs[:1]
    over = reused(call, g, *others) and (costs == NONE or call.n_in > BLOCK)
    beside = 0 if costs == NONE else in_blocks(call, *costs, g, call.inputs[0])
    return Backward(beside, (g,)) if over else _alone(grad, beside)


@forward("relu", "relu6", "hardsigmoid", "clip", "fake_quantize")
def masked(call: Call) -> int:
    """Result and mask, and the Booleans of one block; a packed copy of an input that is not packed.

    Those of relu go along with the result, the others come first.
    """
    result, op = _result(call), call.record.op
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
    result = _result(call) + packing(call.inputs[0], call.itemsize)
    return bit_bytes(call.n_out) + max(min(call.n_in, BLOCK) * 5, result)


@forward("softmax", "log_softmax")
def softmax(call: Call) -> int:
    """Result, and one number for each line: its maximum, then its sum. Of log-softmax, exponentials in pieces."""
    shape, dim = call.record.output.shape, call.record.attributes["dim"]
    lines = _result(call) // shape[dim]
    exponentials = max(piece(shape, [dim], call.itemsize), lines) if call.record.op == "log_softmax" else 0
    return _result(call) + lines + exponentials


@backward("softmax", "log_softmax")
def softmax_backward(call: Call, g: Layout) -> Backward:
    dim, shape = call.record.attributes["dim"], call.record.output.shape
    total = new(tuple(1 if axis == dim else n for axis, n in enumerate(shape)), call.itemsize)
    logarithms = call.record.op == "log_softmax"
    pieces = in_blocks(call, *ONE, g, call.output, total) if logarithms else piece(shape, [dim], call.itemsize)
    beside, in_blocks_at_all = total.storage.nbytes + pieces, call.n_in > BLOCK or total.shape != g.shape
    if reused(call, g, call.output) and (in_blocks_at_all or not logarithms):
        return Backward(beside, (g,))
    return _alone(new(g.shape, call.itemsize, g, call.output), beside)


# ---- arithmetic of two -------------------------------------------------------------------


@forward("add", "sub", "mul", "div")
def arithmetic(call: Call) -> int:
    """The result, and NumPy's buffers for what is repeated in it."""
    elements, copied = arrays.blocks(call.inputs, UFUNC_BUFFER)
    return (call.n_out + elements * copied) * call.itemsize


def _repeated(call: Call, position: int) -> bool:
    """Whether broadcasting repeats that input, so that its gradient is a sum."""
    return call.record.inputs[position].shape != call.record.output.shape


@backward("add", "sub")
def add_backward(call: Call, g: Layout) -> Backward:
    """The gradient itself goes on to both, or its sum over what was repeated; of a subtrahend, its negative."""
    made, shared = Making(call), []
    for position in made.wanted:
        negative, summed = call.record.op == "sub" and position == 1, _repeated(call, position)
        if not (negative or summed):
            made.gradients[position] = g
            if not call.owns_gradient or len(made.wanted) > 1:
                shared.append(position)
            continue
        if negative and not summed and len(made.wanted) == 1 and reused(call, g):
            made.gradients[position] = g
            continue
        grad = like_input(call, position)
        both = arrays.temporaries(grad.storage.nbytes) - grad.storage.nbytes
        made.add(position, grad, both if negative and summed else 0)
    return made.done(shared)


def _product(call: Call, shape: Shape, full: Shape) -> int:
    """Bytes beside a gradient of ``shape`` that is a product of ``full`` shape, summed over what was repeated.

    The product is made in pieces, but as a whole where nothing is left to cut it along.
    """
    lead = len(full) - len(shape)
    repeated = [axis for axis, n in enumerate(full) if axis < lead or shape[axis - lead] != n]
    return piece(full, repeated, call.itemsize) if repeated else 0


@backward("mul")
def mul_backward(call: Call, g: Layout) -> Backward:
    """A product for each, sums first; the last one over the gradient that came in, where it has its shape."""
    made = Making(call)
    order = sorted(made.wanted, key=lambda position: not _repeated(call, position))
    for position in order:
        shape, other = call.record.inputs[position].shape, call.inputs[1 - position]
        if position == order[-1] and not _repeated(call, position) and reused(call, g, other):
            made.gradients[position] = g
            continue
        like = [] if _repeated(call, position) else [g, other]
        made.add(position, new(shape, call.itemsize, *like), _product(call, shape, g.shape))
    return made.done()


@backward("div")
def div_backward(call: Call, g: Layout) -> Backward:
    """The quotient g/b, which is the gradient of a, or is summed; its negative, a/b and their product for b."""
    full, over = _result(call), reused(call, g, call.inputs[1])
    made = Making(call, 0 if over else full)
    for position in made.wanted:
        summed = _repeated(call, position)
        grad = like_input(call, position) if summed else new(g.shape, call.itemsize, g)
        if position == 0 and not summed and over:
            grad = g
        made.gradients[position] = grad
        if position == 1:
            made.reach(full + max(arrays.temporaries(full), grad.storage.nbytes if summed else 0))
        elif summed:
            made.add(position, grad)
    return made.done()


@backward("matmul")
def matmul_backward(call: Call, g: Layout) -> Backward:
    """One product for each operand that needs it; where broadcasting repeated the operand, it is summed afterwards.

    That of a vector is a view, which a leaf copies.
    """
    batch = call.record.output.shape[: -2 if min(len(v.shape) for v in call.record.inputs) > 1 else -1]
    made = Making(call)
    for position in made.wanted:
        value = call.record.inputs[position]
        full = value.nbytes
        if len(value.shape) > 2 or position == 0:
            full = max(full, math.prod(batch) * math.prod(value.shape[-2:]) * call.itemsize)
        made.add(position, new(value.shape, call.itemsize), full if full > value.nbytes else 0)
    return made.done()


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
    return _alone(like_input(call)) if _repeated(call, 0) else Backward(0, (g,), frozenset({0}))


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
