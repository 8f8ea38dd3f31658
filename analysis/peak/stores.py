"""What each activation store holds at a time: while it saves, and while it makes a weight gradient.

Bytes beside the activation, the output gradient, and what was saved; ``save`` includes what it keeps, the weight
gradient itself is counted by the layer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

from analysis.peak.arrays import BLOCK, UFUNC_BUFFER
from analysis.rules.layouts import Layout
from analysis.rules.op_cost import Call
from analysis.rules.stores import sketch
from lance_ref.algebra.geometry import WORKSPACE_BYTES as BLOCK_BYTES
from lance_ref.stores.quantized import row_blocks

Ranks = Sequence[int | None]


class Layer(ABC):
    """The exact products of a layer, as far as stores use them."""

    @abstractmethod
    def forward_workspace(self, x: Layout | None) -> int:
        """Bytes beside the result; a layout of None is that of a packed array."""

    @abstractmethod
    def input_workspace(self, g: Layout | None) -> int:
        """Bytes beside the input gradient."""

    @abstractmethod
    def weight_workspace(self, g: Layout | None, x: Layout | None) -> int:
        """Bytes beside the weight gradient."""

    @abstractmethod
    def smaller(self, x: tuple[int, ...], weight: tuple[int, ...]) -> int:
        """The same for the layer on packed arrays of other sizes."""

    @abstractmethod
    def on_places(self, places: tuple[int, int]) -> int:
        """Bytes beside the weight gradient of a 1×1 convolution of the same channels and groups; 0 if linear."""


@dataclass(frozen=True)
class StorePeak:
    """The rules of one activation store.

    ``carried``: (input shape, what the store says of itself) -> elements that it has from the step before.
    ``by_image``: what the store says of itself -> whether it keeps of an image what it keeps of that image alone, so
    that a batch may go in chunks.
    """

    save: Callable[[Call, Layer], int]
    weight_gradient: Callable[[Call, Layer, Layout], int]
    input_gradient: Callable[[Call, Layer, Layout], int] | None = None
    shared: Callable[[Call], bool] = lambda call: False
    carried: Callable[[tuple[int, ...], Mapping[str, Any]], int] | None = None
    by_image: Callable[[Mapping[str, Any]], bool] = lambda store: False


STORES: dict[str, StorePeak] = {}
"""One entry per activation store."""


# ---- plain backpropagation, sketches, codes, patches -----------------------------------------


STORES["exact"] = StorePeak(
    lambda call, layer: 0,
    lambda call, layer, g: layer.weight_workspace(g, call.inputs[0]),
    by_image=lambda store: True,
)


def _sketch_rows(call: Call) -> tuple[int, int]:
    """(images of the batch, directions)."""
    n = call.record.inputs[0].shape[0]
    return n, sketch.directions(n, call.record.attributes["store"]["ratio"])


def _sketch_save(call: Call, layer: Layer) -> int:
    n, r = _sketch_rows(call)
    sketch = call.n_in // n * r
    return sketch * call.itemsize + max(drawing(n, r, call.itemsize), checking(sketch))


def checking(kept: int) -> int:
    """Bytes of looking for a number that is not finite among so many that are kept: a Boolean for each of a block."""
    return min(kept, BLOCK)


def drawing(n: int, r: int, itemsize: int) -> int:
    """Bytes while n by r random directions are drawn: in float64 three times, and R with its mask or the result."""
    return 24 * n * r + max(n * r * itemsize, 9 * r * r)


def _sketch_weight(call: Call, layer: Layer, g: Layout) -> int:
    n, r = _sketch_rows(call)
    x, weight = (value.shape for value in call.record.inputs[:2])
    sketched = call.n_out // n * r * call.itemsize
    return sketched + max(drawing(n, r, call.itemsize), layer.smaller((r, *x[1:]), weight))


STORES["sketch"] = StorePeak(_sketch_save, _sketch_weight)


def _row_blocks(call: Call) -> tuple[int, int]:
    """Bytes of the images of a block as floats, and of those of the next one, which may be smaller; 0 without one."""
    x, bits = call.record.inputs[0], call.record.attributes["store"]["bits"]
    images = [rows.stop - rows.start for rows in islice(row_blocks(x.shape, call.itemsize, bits), 2)]
    first, second = (*images, 0)[:2]
    return first * x.nbytes // x.shape[0], second * x.nbytes // x.shape[0]


def _quantized_save(call: Call, layer: Layer) -> int:
    """The codes, and a block while it is packed, or beside the next one."""
    block, following = _row_blocks(call)
    bits = call.record.attributes["store"]["bits"]
    packing = 0 if bits == 8 else block // call.itemsize * 2
    return -(-call.n_in * bits // 8) + block + max(packing, _buffer(call, block), following)


def _buffer(call: Call, block: int) -> int:
    """Bytes of NumPy's buffer for ranges that are repeated along a block."""
    return min(UFUNC_BUFFER, block // call.itemsize) * call.itemsize


def _quantized_weight(call: Call, layer: Layer, g: Layout) -> int:
    """Of a block its images and as much again while they are made, the images before still there; or its products."""
    block, following = _row_blocks(call)
    x, weight = (value.shape for value in call.record.inputs[:2])
    images = max(1, block * x[0] // max(call.n_in * call.itemsize, 1))
    products = layer.smaller((images, *x[1:]), weight) + call.record.inputs[1].nbytes

    def made(nbytes: int) -> int:
        unpacked = 0 if call.record.attributes["store"]["bits"] == 8 else nbytes // call.itemsize
        return 2 * nbytes + unpacked + _buffer(call, nbytes)

    return max(made(block), block + made(following), block + products)


STORES["quantized"] = StorePeak(_quantized_save, _quantized_weight)


# ---- the gradient filter ---------------------------------------------------------------------


def _pooled(call: Call, shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Elements of the sums over windows after each axis that is cut."""
    patch = call.record.attributes["store"]["patch"]
    x, out = call.record.inputs[0].shape, call.record.output.shape
    axes = (2, 3) if len(x) == 4 else (len(x) - 2,) if len(x) > 2 else ()
    sizes, found = list(shape), []
    for axis, s in zip(axes, strides, strict=False):
        if (patch * s, out[axis]) != (1, x[axis]):
            sizes[axis] = -(-out[axis] // patch)
            found.append(math.prod(sizes))
    return found


def _strides(call: Call) -> Sequence[int]:
    return tuple(call.record.attributes["stride"]) if call.record.op == "conv2d" else (1,)


def at_a_time(elements: Sequence[int]) -> int:
    sizes = [0, *elements]
    return max((a + b for a, b in pairwise(sizes)), default=0)


def _filter_save(call: Call, layer: Layer) -> int:
    """Sums axis by axis; then, for each number that is kept, whether it is finite."""
    sums = _pooled(call, call.record.inputs[0].shape, _strides(call))
    made, kept = (sums[-1], sums[-1]) if sums else (0, call.n_in)
    return max(at_a_time(sums) * call.itemsize, made * call.itemsize + checking(kept))


def _filter_weight(call: Call, layer: Layer, g: Layout) -> int:
    """Means, the product of 1×1, and its repetition over the kernel, which comes last."""
    weight, out = call.record.inputs[1].shape, call.record.output.shape
    means, item = _pooled(call, out, _strides(call)), call.itemsize
    held, weights = means[-1] if means else 0, call.record.inputs[1].nbytes
    if call.record.op == "linear":
        return max(at_a_time(means), held) * item
    patch = call.record.attributes["store"]["patch"]
    places = tuple(-(-n // patch) for n in out[2:])
    point = math.prod(weight[:2]) * item
    product = layer.on_places(places) + point
    return max(at_a_time(means) * item - weights, held * item + product - weights, held * item + point)


def _filter_input(call: Call, layer: Layer, g: Layout) -> int:
    """Means, the small gradient, and its spreading axis by axis."""
    x, out = call.record.inputs[0].shape, call.record.output.shape
    means, small = _pooled(call, out, _strides(call)), _pooled(call, x, _strides(call))
    if not means:
        return call.n_in * call.itemsize + layer.input_workspace(g)
    spreading = [small[-1]]
    if len(small) == 2:  # the last axis first
        spreading.append(small[-1] // -(-out[3] // call.record.attributes["store"]["patch"]) * x[3])
    spreading.append(call.n_in)
    workspace = min(2 * small[-1], 2 * BLOCK_BYTES // call.itemsize) if len(x) == 4 else 0
    most = max(at_a_time(means), means[-1] + small[-1] + workspace, means[-1] + at_a_time(spreading))
    return most * call.itemsize


STORES["gradient-filter"] = StorePeak(
    _filter_save,
    _filter_weight,
    _filter_input,
    shared=lambda call: call.record.inputs[1].shape[2:] == (1, 1),
    by_image=lambda store: True,
)
