"""What the operations hold at a time that the library's own networks do without: attention, volumes, embeddings.

As :mod:`analysis.peak.rules`, two rules for each. Most of these operations work on whole arrays, so that their
temporaries are as large as what they work on.
"""

from __future__ import annotations

import math

from analysis.peak.arrays import in_blocks, like_input, new, piece
from analysis.peak.rules import Backward, Making, backward, forward, reused
from analysis.rules.layouts import Layout, Shape
from analysis.rules.op_cost import Call, bit_bytes, index_bytes


def _bytes(call: Call, shape: Shape) -> int:
    return math.prod(shape) * call.itemsize


# ---- element by element ----------------------------------------------------------------------


@forward("leaky_relu")
def leaky_relu(call: Call) -> int:
    """Mask, then result."""
    mask = bit_bytes(call.n_out) if call.on_tape else 0
    return mask + call.n_out * call.itemsize + in_blocks(call, 1.25, 2.25, call.inputs[0])


@backward("leaky_relu")
def leaky_relu_backward(call: Call, g: Layout) -> Backward:
    """The mask as bytes; over the gradient that came in."""
    if reused(call, g):
        return Backward(call.n_out, (g,))
    grad = new(g.shape, call.itemsize, g)
    return Backward(grad.storage.nbytes + call.n_out, (grad,))


@forward("prelu")
def prelu(call: Call) -> int:
    """x·w, which of the two, and the result."""
    return 2 * call.n_out * call.itemsize + call.n_out


@backward("prelu")
def prelu_backward(call: Call, g: Layout) -> Backward:
    """For x as in the forward pass; for w what is below 0, and its product."""
    made, full = Making(call), call.n_out * call.itemsize
    if call.needs(0):
        made.add(0, like_input(call), full + call.n_out)
    if call.needs(1):
        made.add(1, like_input(call, 1), full)
    return made.done((1,))


@forward("glu")
def glu(call: Call) -> int:
    """Result, and the temporaries of a sigmoid."""
    return call.n_out * call.itemsize + 4 * piece(call.record.output.shape, (), call.itemsize)


@backward("glu")
def glu_backward(call: Call, g: Layout) -> Backward:
    grad = like_input(call)
    return Backward(grad.storage.nbytes + 6 * piece(call.record.output.shape, (), call.itemsize), (grad,))


@forward("where")
def where(call: Call) -> int:
    mask = bit_bytes(call.n_in) if call.on_tape else 0
    return call.n_out * call.itemsize + mask


@backward("where")
def where_backward(call: Call, g: Layout) -> Backward:
    """The condition as bytes; for each a gradient, which is summed where the input was repeated."""
    made = Making(call, call.n_in)
    for position in (1, 2):
        if call.needs(position):
            repeated = call.record.inputs[position].shape != call.record.output.shape
            made.add(position, like_input(call, position), call.n_out * call.itemsize if repeated else 0)
    return made.done()


@forward("embedding")
def embedding(call: Call) -> int:
    indices = call.n_in * index_bytes(call.record.inputs[1].shape[0]) if call.on_tape else 0
    return indices + call.n_out * call.itemsize


@backward("embedding")
def embedding_backward(call: Call, g: Layout) -> Backward:
    """The table's gradient; the positions as the processor's integers."""
    grad = like_input(call, 1)
    return Backward(grad.storage.nbytes + 8 * call.n_in, (None, grad))


# ---- resizing and pooling ---------------------------------------------------------------------


def _resized(call: Call) -> list[Shape]:
    """The shape after each axis has its new size, one by one."""
    shape, shapes = list(call.record.inputs[0].shape), []
    for axis, size in enumerate(call.record.attributes["size"], start=2):
        shape[axis] = size
        shapes.append(tuple(shape))
    return shapes


@forward("interpolate")
def interpolate(call: Call) -> int:
    """Each axis after the other; linear: the two neighbours of every place."""
    before, most = 0, 0
    for shape in _resized(call):
        made = _bytes(call, shape)
        most = max(most, before + made * (1 if call.record.attributes["mode"] == "nearest" else 2))
        before = made
    return most


@backward("interpolate")
def interpolate_backward(call: Call, g: Layout) -> Backward:
    """From the last axis to the first: what comes in, weighted; what comes out, and twice the sums of each place."""
    shapes = [call.record.inputs[0].shape, *_resized(call)]
    most = 0
    for i in reversed(range(1, len(shapes))):
        into, out = _bytes(call, shapes[i]), _bytes(call, shapes[i - 1])
        weighted = 0 if call.record.attributes["mode"] == "nearest" else into
        most = max(most, (into if i < len(shapes) - 1 else 0) + weighted + out + 2 * min(into, out))
    grad = like_input(call)
    return Backward(max(most, 2 * grad.storage.nbytes), (grad,))


def _padded(call: Call) -> int:
    padding = call.record.attributes["padding"]
    shape = call.record.inputs[0].shape
    return _bytes(call, (*shape[:2], *(n + 2 * p for n, p in zip(shape[2:], padding, strict=True))))


@forward("max_pool3d", "avg_pool3d")
def pool3d(call: Call) -> int:
    """The padded volume and the result; of a maximum its places, and what is larger."""
    result = call.n_out * call.itemsize
    if call.record.op == "avg_pool3d":
        return _padded(call) + result
    return _padded(call) + result + call.n_out * (index_bytes(math.prod(call.record.attributes["kernel_size"])) + 4)


@backward("max_pool3d", "avg_pool3d")
def pool3d_backward(call: Call, g: Layout) -> Backward:
    """The padded volume, and what one place of the window gets, or each window's share; then a copy of the inside."""
    grad, result = like_input(call), call.n_out * call.itemsize
    cut = 0 if not any(call.record.attributes["padding"]) else grad.storage.nbytes
    return Backward(_padded(call) + max(result + call.n_out, cut), (grad,))


# ---- products ----------------------------------------------------------------------------------


@forward("scaled_dot_product_attention")
def attention(call: Call) -> int:
    """The scores, which become the probabilities, and the result."""
    q, k = call.record.inputs[:2]
    rows = q.size // q.shape[-1]
    hidden = 9 * k.shape[-2] * q.shape[-2] if call.record.attributes["is_causal"] else 0
    scores = rows * k.shape[-2] * call.itemsize
    return scores + max(call.n_out * call.itemsize, rows * call.itemsize, hidden)


@backward("scaled_dot_product_attention")
def attention_backward(call: Call, g: Layout) -> Backward:
    """The gradient of V; that of the scores, and its product with them; then those of Q and K."""
    q, k = call.record.inputs[:2]
    scores = q.size // q.shape[-1] * k.shape[-2] * call.itemsize
    made = Making(call)
    if call.needs(2):
        made.add(2, like_input(call, 2))
    if any(call.needs(i) for i in range(len(call.inputs)) if i != 2):
        made.held += scores
        made.reach(scores)
        for position in (3, 0, 1):
            if position < len(call.inputs) and call.needs(position):
                made.add(position, like_input(call, position))
    return made.done()
