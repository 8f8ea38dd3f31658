"""What a trace is made of: one record for each executed operation, and the recorder that collects them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from lance_ref.engine.state import state
from lance_ref.engine.tensor import Shape, Tensor


@dataclass(frozen=True)
class Value:
    """A tensor as the trace sees it.

    Attributes
    ----------
    id : int
        The same for every use of the same tensor, numbered from 0 in order of appearance.
    shape, dtype : tuple of int, str
        ``dtype`` is NumPy's name, for instance ``"float32"``.
    requires_grad : bool
        Whether a gradient with respect to this value is needed.
    parameter : str or None
        Dotted name of the parameter, None for activations. A parameter shared by several
        layers has one name and one id everywhere.
    """

    id: int
    shape: Shape
    dtype: str
    requires_grad: bool
    parameter: str | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of an array of this shape and dtype."""
        return math.prod(self.shape) * itemsize(self.dtype)


@cache
def itemsize(dtype: str) -> int:
    """Bytes of one element, for NumPy's name of a dtype."""
    return np.dtype(dtype).itemsize


_name_of_dtype = cache(str)  # NumPy puts a dtype's name together anew each time


@dataclass(frozen=True)
class OpRecord:
    """One executed operation.

    Attributes
    ----------
    op : str
        Name of the operation, e.g. ``"conv2d"``.
    path : str
        Dotted path of the module in which it ran, ``""`` for the root.
    inputs : tuple of Value
        The operation's tensor inputs in order; ``input.requires_grad`` says which need gradients.
    output : Value
        Its result; ``output.requires_grad`` is False where nothing is put on the tape.
    attributes : mapping
        The operation's other arguments, normalised (``stride=(2, 2)``, never ``stride=2``).
    """

    op: str
    path: str
    inputs: tuple[Value, ...]
    output: Value
    attributes: Mapping[str, Any] = field(default_factory=dict)


class Recorder:
    """Collects the op records of one thread, in order of execution."""

    def __init__(self, parameter_names: Mapping[int, str]) -> None:
        self.records: list[OpRecord] = []
        self._parameter_names = parameter_names  # by uid
        self._values: dict[int, Value] = {}  # by uid

    def value(self, tensor: Tensor) -> Value:
        """The tensor as the trace sees it: the same object at every use, unless the tensor has changed since."""
        uid = tensor.uid
        known = self._values.get(uid)
        dtype = _name_of_dtype(tensor._dtype)
        if known is not None and known.requires_grad == tensor.requires_grad and known.dtype == dtype:
            return known
        number = len(self._values) if known is None else known.id
        name = self._parameter_names.get(uid)
        if name is None and tensor.is_parameter:
            name = f"parameter {number}"
        value = self._values[uid] = Value(number, tensor._shape, dtype, tensor.requires_grad, name)
        if known is None:
            self.first_seen(tensor, value)
        return value

    def first_seen(self, tensor: Tensor, value: Value) -> None:
        """Called once for every tensor; here it does nothing."""

    def add(self, op: str, inputs: Sequence[Tensor], attributes: Mapping[str, Any], output: Tensor) -> None:
        described = {k: v.describe() if hasattr(v, "describe") else v for k, v in attributes.items()}
        values = tuple([self.value(tensor) for tensor in inputs])
        self.records.append(OpRecord(op, state.path, values, self.value(output), described))

    @contextmanager
    def aside(self) -> Iterator[list[OpRecord]]:
        """Inside the ``with`` block records go to a list of their own."""
        outer, self.records = self.records, []
        try:
            yield self.records
        finally:
            self.records = outer
