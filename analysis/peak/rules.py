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
from analysis.rules.layouts import Layout, Shape
from analysis.rules.op_cost import Call, bit_bytes, index_bytes
from analysis.rules.operations import OPERATIONS, column, fill


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


def alone(grad: Layout, beside: int = 0) -> Backward:
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


def of_result(call: Call) -> int:
    return call.n_out * call.itemsize


def _planes(call: Call) -> int:
    return math.prod(call.record.output.shape[:2])


def _of_windows(call: Call) -> int:
    """Bytes of the numbers of elements that the means of a plane are over, if they differ, and of NumPy's buffers."""
    places = math.prod(call.record.output.shape[2:])
    counts = 0 if call.record.attributes["count_include_pad"] else places
    return (counts + (3 * min(call.n_out, UFUNC_BUFFER) if places > 1 else 0)) * call.itemsize


def positions(call: Call) -> int:
    """Bytes of the positions of an index as the processor's integers."""
    return sum(8 * math.prod(part[1]) for part in call.record.attributes["index"] if isinstance(part, tuple))


BESIDE_RESULT: dict[str, ForwardRule] = {
    **dict.fromkeys(TEMPORARIES, lambda c: in_blocks(c, *TEMPORARIES[c.record.op][0], c.inputs[0])),
    **dict.fromkeys(UNBLOCKED, lambda c: of_result(c) * UNBLOCKED[c.record.op][0]),
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

fill("in_flight_forward", {op: lambda c: of_result(c) + BESIDE_RESULT[c.record.op](c) for op in BESIDE_RESULT})


@backward("relu", "relu6", "hardsigmoid", "dropout", "clip", "fake_quantize")
def masked_backward(call: Call, g: Layout) -> Backward:
    """Over the gradient that came in where that is packed."""
    if reused(call, g) and is_packed(g):
        return Backward(0, (g,))
    return alone(like_input(call), packing(g, call.itemsize))


BESIDE_GRADIENT: dict[str, Callable[[Call, Layout], int]] = {
    "max_pool2d": lambda c, g: packing(g, c.itemsize),
    "avg_pool2d": lambda c, g: of_result(c) + _of_windows(c),  # each window's share
    "adaptive_avg_pool2d": lambda c, g: (_planes(c) + 2 * min(_planes(c), UFUNC_BUFFER)) * c.itemsize,
    "index": lambda c, g: positions(c),
}
"""Bytes of the backward pass beside the gradient, which is packed."""

fill(
    "in_flight_backward",
    {op: lambda c, g: alone(like_input(c), BESIDE_GRADIENT[c.record.op](c, g)) for op in BESIDE_GRADIENT},
)


# ---- element by element ------------------------------------------------------------------


@backward(*TEMPORARIES, *UNBLOCKED)
def unary_backward(call: Call, g: Layout) -> Backward:
    """A gradient whose axes lie like those of the input and of the gradient that came in."""
    grad = new(g.shape, call.itemsize, g, call.inputs[0])
    if call.record.op in UNBLOCKED:
        return alone(grad, grad.storage.nbytes * UNBLOCKED[call.record.op][1])
    costs = TEMPORARIES[call.record.op][1]
    others = () if call.record.op == "neg" else call.inputs[:1]
    over = reused(call, g, *others) and (costs == NONE or call.n_in > BLOCK)
    beside = 0 if costs == NONE else in_blocks(call, *costs, g, call.inputs[0])
    return Backward(beside, (g,)) if over else alone(grad, beside)


@forward("relu", "relu6", "hardsigmoid", "clip", "fake_quantize")
def masked(call: Call) -> int:
    """Result and mask, and the Booleans of one block; a packed copy of an input that is not packed.

    Those of relu go along with the result, the others come first.
    """
    result, op = of_result(call), call.record.op
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
    result = of_result(call) + packing(call.inputs[0], call.itemsize)
    return bit_bytes(call.n_out) + max(min(call.n_in, BLOCK) * 5, result)


@forward("softmax", "log_softmax")
def softmax(call: Call) -> int:
    """Result, and one number for each line: its maximum, then its sum. Of log-softmax, exponentials in pieces."""
    shape, dim = call.record.output.shape, call.record.attributes["dim"]
    lines = of_result(call) // shape[dim]
    exponentials = max(piece(shape, [dim], call.itemsize), lines) if call.record.op == "log_softmax" else 0
    return of_result(call) + lines + exponentials


@backward("softmax", "log_softmax")
def softmax_backward(call: Call, g: Layout) -> Backward:
    dim, shape = call.record.attributes["dim"], call.record.output.shape
    total = new(tuple(1 if axis == dim else n for axis, n in enumerate(shape)), call.itemsize)
    logarithms = call.record.op == "log_softmax"
    pieces = in_blocks(call, *ONE, g, call.output, total) if logarithms else piece(shape, [dim], call.itemsize)
    beside, in_blocks_at_all = total.storage.nbytes + pieces, call.n_in > BLOCK or total.shape != g.shape
    if reused(call, g, call.output) and (in_blocks_at_all or not logarithms):
        return Backward(beside, (g,))
    return alone(new(g.shape, call.itemsize, g, call.output), beside)


# ---- arithmetic of two -------------------------------------------------------------------


@forward("add", "sub", "mul", "div")
def arithmetic(call: Call) -> int:
    """The result, and NumPy's buffers for what is repeated in it."""
    elements, copied = arrays.blocks(call.inputs, UFUNC_BUFFER)
    return (call.n_out + elements * copied) * call.itemsize


def repeated(call: Call, position: int) -> bool:
    """Whether broadcasting repeats that input, so that its gradient is a sum."""
    return call.record.inputs[position].shape != call.record.output.shape


@backward("add", "sub")
def add_backward(call: Call, g: Layout) -> Backward:
    """The gradient itself goes on to both, or its sum over what was repeated; of a subtrahend, its negative."""
    made, shared = Making(call), []
    for position in made.wanted:
        negative, summed = call.record.op == "sub" and position == 1, repeated(call, position)
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
    order = sorted(made.wanted, key=lambda position: not repeated(call, position))
    for position in order:
        shape, other = call.record.inputs[position].shape, call.inputs[1 - position]
        if position == order[-1] and not repeated(call, position) and reused(call, g, other):
            made.gradients[position] = g
            continue
        like = [] if repeated(call, position) else [g, other]
        made.add(position, new(shape, call.itemsize, *like), _product(call, shape, g.shape))
    return made.done()


@backward("div")
def div_backward(call: Call, g: Layout) -> Backward:
    """The quotient g/b, which is the gradient of a, or is summed; its negative, a/b and their product for b."""
    full, over = of_result(call), reused(call, g, call.inputs[1])
    made = Making(call, 0 if over else full)
    for position in made.wanted:
        summed = repeated(call, position)
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
