"""Which values share memory: the storage and the strides of every value of a trace.

A reshape, a permutation or a slice is a look at the same memory, and memory that is kept must be
billed once, whole, however many names it has. Whether a reshape is a look or a copy depends on the
strides; so they are followed through the trace, for NumPy and PyTorch alike (both lay results out
the same way: new results are packed, and element-wise results keep the order of their input's axes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from analysis.rules.operations import LIKE_INPUT, PACKED, fill, known
from lance_ref.engine.recording import OpRecord, Value

Shape = tuple[int, ...]


class Storage:
    """One block of memory; two storages are never equal, whatever their sizes."""

    __slots__ = ("is_parameter", "nbytes")

    def __init__(self, nbytes: int, is_parameter: bool = False) -> None:
        self.nbytes = nbytes
        self.is_parameter = is_parameter


class Layout(NamedTuple):
    """Where a value lives: its storage, and its shape and strides (in elements) there."""

    storage: Storage
    shape: Shape
    strides: Shape

    def reshaped(self, shape: Shape) -> Layout | None:
        """The same memory under another shape, or None if only a copy can have it."""
        strides = reshape_strides(self.shape, self.strides, shape)
        return None if strides is None else Layout(self.storage, shape, strides)

    def permuted(self, dims: Sequence[int]) -> Layout:
        return Layout(self.storage, tuple(self.shape[d] for d in dims), tuple(self.strides[d] for d in dims))

    def indexed(self, index: Any) -> Layout:
        """Basic indexing: integers, slices and None."""
        one = np.zeros(1, np.int8)  # nothing is read: only shape and strides of the view are of interest
        view = np.lib.stride_tricks.as_strided(one, self.shape, self.strides, writeable=False)[index]
        return Layout(self.storage, view.shape, view.strides)

    @property
    def axis_order(self) -> list[int]:
        """Axes from the slowest to the fastest in memory."""
        if any(s == 0 and n > 1 for s, n in zip(self.strides, self.shape, strict=True)):
            return list(range(len(self.shape)))  # something is repeated: its result is packed
        return sorted(range(len(self.shape)), key=lambda axis: -abs(self.strides[axis]))


def packed_strides(shape: Sequence[int], axis_order: Sequence[int] | None = None) -> Shape:
    """Strides of a result without gaps; C order unless told otherwise.

    >>> packed_strides((2, 3, 4)), packed_strides((2, 3, 4), (2, 0, 1))
    ((12, 4, 1), (3, 1, 6))
    """
    strides, step = [0] * len(shape), 1
    for axis in reversed(range(len(shape)) if axis_order is None else axis_order):
        strides[axis] = step
        step *= max(shape[axis], 1)
    return tuple(strides)


def reshape_strides(shape: Sequence[int], strides: Sequence[int], new_shape: Sequence[int]) -> Shape | None:
    """Strides with which the same memory shows ``new_shape``, None if there are none.

    Groups of old axes are matched with groups of new axes of the same product; a group can be shown
    otherwise only if its old axes lie in memory like one long axis.

    >>> reshape_strides((2, 3, 4), (12, 4, 1), (6, 4)), reshape_strides((3, 2), (1, 3), (6,))
    ((4, 1), None)
    """
    if math.prod(shape) != math.prod(new_shape):
        raise ValueError(f"cannot reshape {tuple(shape)} to {tuple(new_shape)}: the numbers of elements differ")
    old = [(n, s) for n, s in zip(shape, strides, strict=True) if n != 1]
    result = [1] * len(new_shape)
    position = 0
    i = 0
    while i < len(old):
        old_product, j = old[i][0], i + 1
        first = position
        while position < len(new_shape) and new_shape[position] == 1:
            position += 1
        new_product = new_shape[position]
        position += 1
        while old_product != new_product:
            if old_product < new_product:
                old_product *= old[j][0]
                j += 1
            else:
                new_product *= new_shape[position]
                position += 1
        for k in range(i, j - 1):
            if old[k][1] != old[k + 1][0] * old[k + 1][1]:
                return None
        step = old[j - 1][1]
        for axis in reversed(range(first, position)):
            result[axis] = step
            step *= new_shape[axis]
        i = j
    return tuple(result)


def is_basic_index(parts: Sequence[Any]) -> bool:
    """Whether an index gives a look at the same memory (slices, integers, None), not a copy (arrays)."""
    return all(part is None or isinstance(part, (slice, int)) for part in parts)


@dataclass
class Memory:
    """The layout of every value seen so far while walking through a trace."""

    in_pytorch: bool = False  #: Whether results lie as PyTorch's do, not as our own.
    layouts: dict[int, Layout] = field(default_factory=dict)

    def of(self, value: Value) -> Layout:
        """The layout of a value; one that no operation made (an input, a parameter) is packed."""
        layout = self.layouts.get(value.id)
        if layout is None:
            layout = self.layouts[value.id] = self._new(value, value.parameter is not None)
        return layout

    def follow(self, record: OpRecord, inputs: Sequence[Layout] | None = None) -> Layout:
        """Take in one operation; gives the layout of its result. ``inputs``: those of its inputs, if they are known."""
        if inputs is None:
            inputs = [self.of(value) for value in record.inputs]
        for inside in record.attributes.get("records", ()):  # of a recomputed segment
            self.follow(inside)
        seen = self.layouts.get(record.output.id)
        if seen is not None:  # the operation returned its input, or this record has been followed already
            return seen
        lies = known(record.op).lies(self.in_pytorch)
        layout: Layout | None = lies(record, inputs) if callable(lies) else None
        if layout is None:
            layout = self._new(record.output, False)
            if lies == LIKE_INPUT:
                alike = [x for x in inputs if x.shape == layout.shape or record.op in ("concatenate", "glu")]
                if alike and alike[0].strides != layout.strides:
                    layout = Layout(layout.storage, layout.shape, packed_strides(layout.shape, alike[0].axis_order))
        self.layouts[record.output.id] = layout
        return layout

    @staticmethod
    def _new(value: Value, is_parameter: bool) -> Layout:
        return Layout(Storage(value.nbytes, is_parameter), value.shape, packed_strides(value.shape))


def backward_reaches(records: Sequence[OpRecord], start: Value | None = None) -> list[bool]:
    """For each record, whether a backward pass from ``start``, by default the last output, comes through it."""
    if start is None and records:
        start = records[-1].output
    wanted = set() if start is None else {start.id}
    reached = []
    for record in reversed(records):
        here = record.output.requires_grad and record.output.id in wanted
        if here:
            wanted.update(value.id for value in record.inputs if value.requires_grad)
        reached.append(here)
    return reached[::-1]


# ---- how the results of our own operations lie -----------------------------------------------


_ARITHMETIC = (
    *("add", "sub", "mul", "div", "neg", "pow", "exp", "sqrt", "tanh", "sigmoid", "log", "gelu"),
    *("hardsigmoid", "hardswish", "erf", "gelu_tanh", "clip", "fake_quantize"),
    *("silu", "mish", "softplus", "elu", "leaky_relu", "prelu"),
)
_ON_OUR_TAPE = ("softmax", "log_softmax", "batch_norm", "layer_norm", "rms_norm", "concatenate")
fill("layout", dict.fromkeys((*_ARITHMETIC, *_ON_OUR_TAPE), LIKE_INPUT))
_AS_X_IN_PYTORCH = ("relu", "relu6", "dropout", "glu")
fill("layout_in_pytorch", dict.fromkeys(_ON_OUR_TAPE, PACKED) | dict.fromkeys(_AS_X_IN_PYTORCH, LIKE_INPUT))


def _as_pytorchs_kernel(record: OpRecord, inputs: Sequence[Layout]) -> Layout | None:
    """Attention of four dimensions comes out in the order of the queries' axes; the rest packed."""
    shape = record.output.shape
    if len(shape) != 4 or inputs[0].shape != shape or any(v.requires_grad for v in record.inputs[3:]):
        return None
    return Layout(Storage(record.output.nbytes), shape, packed_strides(shape, inputs[0].axis_order))


def _repeated(record: OpRecord, inputs: Sequence[Layout]) -> Layout:
    """A view of PyTorch's, with steps of 0 where something is repeated."""
    x, shape = inputs[0], record.output.shape
    lead = len(shape) - len(x.shape)
    steps = [s if n == m else 0 for n, m, s in zip(x.shape, shape[lead:], x.strides, strict=True)]
    return Layout(x.storage, shape, (*[0] * lead, *steps))


fill("layout_in_pytorch", {"scaled_dot_product_attention": _as_pytorchs_kernel, "expand": _repeated})
fill("layout", {
    "reshape": lambda record, inputs: inputs[0].reshaped(record.output.shape),
    "permute": lambda record, inputs: inputs[0].permuted(record.attributes["dims"]),
    "index": lambda record, x: x[0].indexed(i) if is_basic_index(i := record.attributes["index"]) else None,
})  # fmt: skip
