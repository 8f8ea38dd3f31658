"""What each operation holds at a time while it runs: results, what it keeps, and temporaries.

Two rules for every operation. ``forward``: the most bytes that it has allocated at any moment of its forward
pass, its result and what it keeps included. ``backward``: the same for its backward pass, and the gradients that
come out of it, each with the memory it lives in: often the memory of the gradient that came in.

Elementwise formulas run in blocks (:data:`BLOCK`), so that their temporaries are small. The rules are those of the
compiled loops; the plain NumPy twins (``LANCE_REF_NUMBA=0``) take more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from analysis.rules.layouts import Layout, Shape, Storage, is_basic_index, packed_strides
from analysis.rules.op_cost import Call, MissingRuleError, bit_bytes, index_bytes

BLOCK = 1 << 16
"""Elements of an elementwise formula that are worked on at a time."""


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
FORWARD: dict[str, ForwardRule] = {}
BACKWARD: dict[str, BackwardRule] = {}


def forward(*ops: str) -> Callable[[ForwardRule], ForwardRule]:
    """Register the forward rule of these operations."""

    def register(function: ForwardRule) -> ForwardRule:
        FORWARD.update(dict.fromkeys(ops, function))
        return function

    return register


def backward(*ops: str) -> Callable[[BackwardRule], BackwardRule]:
    """Register the backward rule of these operations."""

    def register(function: BackwardRule) -> BackwardRule:
        BACKWARD.update(dict.fromkeys(ops, function))
        return function

    return register


def check_rule(op: str, path: str) -> None:
    """Raise MissingRuleError unless an operation has both rules; the message names it and the layer."""
    if op not in FORWARD or op not in BACKWARD:
        raise MissingRuleError(f"no rule of peak memory for operation {op!r} in layer {path or '(root)'!r}")


# ---- arrays ------------------------------------------------------------------------------


def new(shape: Shape, itemsize: int, like: Layout | None = None) -> Layout:
    """An array of its own, packed; its axes in memory in the order of ``like``'s, else in C order."""
    order = like.axis_order if like is not None and len(like.shape) == len(shape) else None
    return Layout(Storage(math.prod(shape) * itemsize), tuple(shape), packed_strides(shape, order))


def like_input(call: Call, position: int = 0) -> Layout:
    """A new array of an input's shape, in C order."""
    return new(call.record.inputs[position].shape, call.itemsize)


def is_packed(layout: Layout) -> bool:
    """Whether the array lies in memory in C order without gaps."""
    pairs = zip(layout.shape, layout.strides, packed_strides(layout.shape), strict=True)
    return 0 in layout.shape or all(n == 1 or have == want for n, have, want in pairs)


def packing(layout: Layout, itemsize: int) -> int:
    """Bytes of the copy that a loop over packed arrays needs; 0 for a packed one."""
    return 0 if is_packed(layout) else math.prod(layout.shape) * itemsize


def reshaping(layout: Layout, shape: Shape, itemsize: int) -> int:
    """Bytes of the copy that a reshape makes; 0 where it is a view."""
    return 0 if layout.reshaped(shape) is not None else math.prod(shape) * itemsize


def in_blocks(call: Call, small: float, large: float) -> int:
    """Bytes of an elementwise formula's temporaries, its result aside: of the array if it is small, else of a block."""
    return int((large if call.n_in > BLOCK else small) * piece(call, call.n_in))


def piece(call: Call, elements: int) -> int:
    """Bytes of one piece of an array that is worked on piece by piece."""
    return min(elements, BLOCK) * call.itemsize


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
    return call.n_out * call.itemsize + in_blocks(call, *TEMPORARIES[call.record.op][0])


@backward(*TEMPORARIES)
def unary_backward(call: Call, g: Layout) -> Backward:
    grad = new(g.shape, call.itemsize, call.inputs[0])
    return Backward(grad.storage.nbytes + in_blocks(call, *TEMPORARIES[call.record.op][1]), (grad,))


@forward(*UNBLOCKED)
def unblocked(call: Call) -> int:
    return call.n_out * call.itemsize * (1 + UNBLOCKED[call.record.op][0])


@backward(*UNBLOCKED)
def unblocked_backward(call: Call, g: Layout) -> Backward:
    grad = new(g.shape, call.itemsize, call.inputs[0])
    return Backward(grad.storage.nbytes * (1 + UNBLOCKED[call.record.op][1]), (grad,))


@forward("relu", "relu6", "hardsigmoid", "clip", "fake_quantize")
def masked(call: Call) -> int:
    """Result and mask, and the Booleans of one block; a packed copy of an input that is not packed."""
    if not call.on_tape:
        return call.n_out * call.itemsize
    booleans = (2 if call.record.op == "relu" else 4) * min(call.n_in, BLOCK)
    if call.record.op == "hardsigmoid":
        booleans = in_blocks(call, *ONE)
    copy = packing(call.inputs[0], call.itemsize)
    return call.n_out * call.itemsize + bit_bytes(call.n_out) + booleans + copy


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
    lines = call.n_out // call.record.output.shape[call.record.attributes["dim"]]
    logarithm = piece(call, call.n_out) if call.record.op == "log_softmax" else 0
    return (call.n_out + 2 * lines) * call.itemsize + logarithm


@backward("softmax", "log_softmax")
def softmax_backward(call: Call, g: Layout) -> Backward:
    lines = call.n_out // call.record.output.shape[call.record.attributes["dim"]]
    grad = new(g.shape, call.itemsize, call.output)
    pieces = (3 if call.record.op == "log_softmax" else 1) * piece(call, call.n_out)
    return Backward(grad.storage.nbytes + lines * call.itemsize + pieces, (grad,))


# ---- arithmetic of two -------------------------------------------------------------------


@forward("add", "sub", "mul", "div", "concatenate", "pad", "expand")
def result_alone(call: Call) -> int:
    return call.n_out * call.itemsize


def _repeated(call: Call, position: int) -> bool:
    """Whether broadcasting repeats that input, so that its gradient is a sum."""
    return call.record.inputs[position].shape != call.record.output.shape


@backward("add", "sub")
def add_backward(call: Call, g: Layout) -> Backward:
    """The gradient itself goes on to both, or its sum over what was repeated; of a subtrahend, its negative."""
    most, grads = 0, []
    for position in (0, 1):
        grad: Layout | None = None
        if call.needs(position):
            negative = call.record.op == "sub" and position == 1
            grad = like_input(call, position) if _repeated(call, position) or negative else g
            most += 0 if grad is g else grad.storage.nbytes
        grads.append(grad)
    return Backward(most, tuple(grads), frozenset(i for i, grad in enumerate(grads) if grad is g))


@backward("mul", "div")
def mul_backward(call: Call, g: Layout) -> Backward:
    """A product for each; where it has to be summed it is made in pieces (mul) or as a whole (div)."""
    full, is_div = call.n_out * call.itemsize, call.record.op == "div"
    held, most, grads = full if is_div else 0, full if is_div else 0, []
    for position in (0, 1):
        grad: Layout | None = None
        if call.needs(position):
            temporary = 0
            if _repeated(call, position):
                temporary = full if is_div else 2 * piece(call, call.n_out)
            if is_div and position == 1:
                temporary += full
            grad = new(call.record.inputs[position].shape, call.itemsize, call.inputs[position])
            most = max(most, held + grad.storage.nbytes + temporary)
            held += grad.storage.nbytes
        grads.append(grad)
    return Backward(most, tuple(grads))


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
    kept = sum(math.prod(part[1]) * (8 + index_bytes(call.n_in)) for part in parts if isinstance(part, tuple))
    return call.n_out * call.itemsize + kept


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
    return Backward(grad.storage.nbytes, (grad,), frozenset({0}))


# ---- sums, means, maxima -----------------------------------------------------------------


@forward("sum", "mean")
def reduced(call: Call) -> int:
    return call.n_out * call.itemsize


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


@forward("max")
def max_forward(call: Call) -> int:
    return call.n_out * (call.itemsize + 8 + index_bytes(call.n_in // call.n_out))


@forward("var")
def var_forward(call: Call) -> int:
    """The differences from the mean, whole."""
    return (call.n_in + 2 * call.n_out) * call.itemsize


@backward("max", "var")
def scattered(call: Call, g: Layout) -> Backward:
    grad = like_input(call)
    extra = 8 * call.n_out if call.record.op == "max" else grad.storage.nbytes
    return Backward(grad.storage.nbytes + extra, (grad,), frozenset({0}))


@forward("cross_entropy")
def cross_entropy(call: Call) -> int:
    B, K = call.record.inputs[0].shape
    return B * K * call.itemsize + B * (4 * call.itemsize + 8)


@forward("mse_loss")
def mse_loss(call: Call) -> int:
    return 2 * call.n_in * call.itemsize


@backward("cross_entropy", "mse_loss")
def loss_backward(call: Call, g: Layout) -> Backward:
    grads = tuple(like_input(call, i) if call.needs(i) else None for i in range(len(call.inputs)))
    return Backward(max(1, sum(g is not None for g in grads)) * call.n_in * call.itemsize, grads)


# ---- pooling -----------------------------------------------------------------------------


@forward("max_pool2d")
def max_pool(call: Call) -> int:
    places = index_bytes(math.prod(call.record.attributes["kernel_size"]))
    return call.n_out * (call.itemsize + places) + packing(call.inputs[0], call.itemsize)


@forward("avg_pool2d", "adaptive_avg_pool2d")
def avg_pool(call: Call) -> int:
    return call.n_out * call.itemsize


@backward("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")
def pool_backward(call: Call, g: Layout) -> Backward:
    grad = like_input(call)
    shares = {"max_pool2d": packing(g, call.itemsize), "avg_pool2d": call.n_out * call.itemsize}
    return Backward(grad.storage.nbytes + shares.get(call.record.op, 0), (grad,))


# ---- normalisation -----------------------------------------------------------------------


def _groups(call: Call) -> int:
    """Numbers of mean and variance: one per channel, or one per normalised stretch."""
    if call.record.op == "batch_norm":
        return call.record.inputs[0].shape[1]
    return call.n_in // math.prod(call.record.attributes["normalized_shape"])


@forward("batch_norm", "layer_norm")
def norm(call: Call) -> int:
    """Result and statistics; squares in pieces."""
    own = call.record.op == "layer_norm" or call.record.attributes["training"]
    return (call.n_out + 4 * _groups(call)) * call.itemsize + own * piece(call, call.n_in)


@backward("batch_norm", "layer_norm")
def norm_backward(call: Call, g: Layout) -> Backward:
    """x̂, which becomes the gradient where the statistics are the input's own; products with it in pieces."""
    count, affine = len(call.inputs), call.record.attributes["affine"]
    own = call.record.op == "layer_norm" or call.record.attributes["training"]
    needs_weight = affine and call.needs(1)
    x_hat = call.n_in * call.itemsize if needs_weight or (own and call.needs(0)) else 0
    grad = new(call.record.inputs[0].shape, call.itemsize, call.inputs[0] if own else g) if call.needs(0) else None
    most = x_hat + (call.n_in * call.itemsize if call.needs(0) and not own else 0)
    most += 4 * _groups(call) * call.itemsize + (3 * piece(call, call.n_in) if x_hat else 0)
    grads: list[Layout | None] = [grad, *[None] * (count - 1)]
    for position in (1, 2) if affine else ():
        if call.needs(position):
            grads[position] = like_input(call, position)
    return Backward(most, tuple(grads), frozenset({1}))
